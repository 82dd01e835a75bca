"""Notebook 04: in how few bits a cache can be kept (slide 6)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, get_args

import pandas as pd
import torch

from dqar.config import CacheFormat, DQARConfig, ReuseTarget
from dqar.measure import metrics
from dqar.measure.bits import choose_bits, layer_errors, step_errors, unquantized, with_layer_bits
from dqar.measure.results import Run
from dqar.measure.sampling import OPEN, sample
from dqar.models.pipelines import cached_pipeline
from dqar.quantizer import QuantizeMode, quantize
from dqar.studies import arena
from dqar.studies.compare import FULL, Method, compare, draw, summarize
from dqar.studies.recording import LABEL_SEED, RESULT_SEED, Recording

FORMATS = tuple(itertools.product((8, 4, 2), get_args(QuantizeMode), (False, True)))
"""Bits, mode, and whether the levels are fitted."""
DRAWN = tuple(
    (bits, mode, fitted)
    for bits, mode, fitted in FORMATS
    if (mode == "per_channel" and not (fitted and bits == 8)) or (bits, mode, fitted) == (8, "per_tensor", False)
)
"""Of these, the ones that images are drawn with: a scale a channel, with fitted levels too where bits are few, and the
deck's one scale a tensor."""
MIXED: dict[ReuseTarget, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "output": ((4, 2), (1, 0.6, 0.3)),
    "kv": ((4,), (1,)),  # whose levels take long to fit
}
"""Bits that all layers have; and the bytes that mixed ones are chosen for: from INT2's so far towards INT4's."""


def quantization_error(run: Run) -> pd.DataFrame:
    """Relative error of this model's own K, V and attention outputs in few bits: tensor, bits, mode, layer, step."""

    def measure() -> pd.DataFrame:
        pipe, rows = cached_pipeline(run.profile), []
        every = max(1, run.profile.num_inference_steps // 5)
        calls = 0

        def look(tensor: str, layer: int):
            def hook(_module, _args, x):
                nonlocal calls
                calls += tensor == "K" and layer == 0
                if (calls - 1) % every:
                    return
                for bits, mode, fitted in FORMATS:
                    scales = torch.float16 if fitted else torch.float32  # as the cache keeps them
                    kept = quantize(x, bits, mode, batch_dims=1, fitted=fitted, scale_dtype=scales)
                    error = ((kept.dequantize() - x).norm() / x.norm()).item()
                    row = {"tensor": tensor, "bits": bits, "mode": f"{mode} fitted" if fitted else mode}
                    row |= {"layer": layer, "step": calls - 1}
                    rows.append({**row, "relative_error": error, "bytes_per_value": kept.nbytes / x.numel()})

            return hook

        with ExitStack() as hooks:
            for layer, block in enumerate(pipe.transformer.transformer_blocks):
                for tensor, module in (("K", block.attn1.to_k), ("V", block.attn1.to_v), ("output", block.attn1)):
                    hooks.enter_context(module.register_forward_hook(look(tensor, layer)))
            sample(pipe, run.profile, run.seed, num_samples=1, description="quantization error")
        return pd.DataFrame(rows)

    return run.table("quantization_error", measure)


def cached(target: ReuseTarget, bits: int, **options: Any) -> DQARConfig:
    """Every second step reused from a cache of so many bits; ``options`` are other fields of ``DQARConfig``."""
    return dataclasses.replace(OPEN, schedule="static", reuse_target=target, quantize_bits=bits, **options)


def cache_methods(target: ReuseTarget) -> list[Method]:
    """A cache in 16, 8, 4 and 2 bits in the formats of ``DRAWN``; the unquantized one first."""
    methods = [Method(f"{target} unquantized", config=cached(target, 16))]
    for bits, mode, fitted in DRAWN:
        config = cached(target, bits, quantize_mode=mode, cache=CacheFormat(fitted=fitted))
        methods.append(Method(f"{target} INT{bits} {mode}{' fitted' if fitted else ''}", config=config))
    if target == "kv":
        methods.append(Method("kv K-FP16 V-INT8", config=cached("kv", 8, mixed_precision=True)))
    return methods


def quantization_quality(run: Run, configs: Sequence[DQARConfig] | None = None) -> pd.DataFrame:
    """Images drawn with the cache in 16, 8, 4 and 2 bits, every second step reused: the recorded ones, or a few.

    Args:
        configs: to measure anew, each beside itself in 16 bits; in place of ``cache_methods``.

    Returns:
        ``summarized``: ``psnr`` is to full compute and holds the error of the reuse too; ``median`` and ``5th
        percentile`` are to the same reuse with an unquantized cache, and hold the error of the bits alone.
    """

    def measure(groups: Sequence[Sequence[Method]]) -> pd.DataFrame:
        number = max(4, run.profile.num_samples // 2)
        reference = draw(FULL, run.profile, run.seed, num_samples=number)
        rows = []
        for methods in groups:
            unquantized = {"cache": methods[0].draw(run.profile, run.seed, num_samples=number).images}
            rows += [compare(method, reference, run.profile, run.seed, beside=unquantized) for method in methods]
        return summarized(pd.concat(rows, ignore_index=True))

    if configs is None:
        if (recorded := run.recorded("formats")) is not None:
            return summarized(recorded)
        return run.table("quantization_quality", lambda: measure([cache_methods("kv"), cache_methods("output")]))

    return measure(
        [
            [
                Method(f"{number}: 16 bit", config=unquantized(config)),
                Method(
                    f"{number}: INT{config.mean_bits:g} {config.quantize_mode}{' + CSB' * config.balance}",
                    config=config,
                ),
            ]
            for number, config in enumerate(configs)
        ]
    )


def summarized(rows: pd.DataFrame) -> pd.DataFrame:
    """``compare.summarize``, with ``median`` and ``5th percentile`` (dB) of the rows' ``mse_cache``."""
    table = summarize(rows).set_index("method")
    quality = metrics.decibels(rows.mse_cache).groupby(rows.method)
    table["median"], table["5th percentile"] = quality.median(), quality.quantile(0.05)
    table.attrs = rows.attrs
    return table.reset_index()


def record_formats(recording: Recording) -> None:
    """``formats``: every second step reused from a cache in each of ``cache_methods``, on many images.

    The columns of ``compare``; ``mse_cache`` is to the same reuse from an unquantized cache.
    """
    number = recording.sizes.arena_images

    def part(method: Method, unquantized: Method) -> pd.DataFrame:
        reference, beside = (recording.drawn(drawn, RESULT_SEED, 0, number) for drawn in (FULL, unquantized))
        images = {"cache": beside.images}
        return compare(method, reference, recording.many_at_once, RESULT_SEED, beside=images)

    targets: tuple[ReuseTarget, ...] = ("kv", "output")
    groups = [cache_methods(target) for target in targets]
    parts = {method.name: functools.partial(part, method, group[0]) for group in groups for method in group}
    recording.growing("formats", parts, RESULT_SEED, number)


# --- bits by layer ---------------------------------------------------------------------------------------------------


def record_bits(recording: Recording) -> None:
    """What few bits do layer by layer and step by step; and bits of each layer chosen by that, on other images.

    Every second step is reused, and levels are fitted. For each of ``MIXED``, ``bits-layers-…`` and ``bits-steps-…``
    hold what ``measure.bits`` measures; ``bits-…`` has the columns of ``compare`` for uniform and for mixed bits: its
    ``mse`` is to an unquantized cache, ``layer_bits`` a text, ``share`` of a 16-bit cache's bytes.
    """
    profile, number = recording.many_at_once, recording.sizes.bits_images
    pipe = cached_pipeline(profile)

    def measured(name: str, measure: Callable[..., pd.DataFrame], target: ReuseTarget) -> pd.DataFrame:
        part = functools.partial(measure, pipe, profile, LABEL_SEED, _fitted(target), number)
        return recording.table(f"bits-{name}-{target}", {"all": part}, LABEL_SEED)

    for target, (uniform, budgets) in MIXED.items():
        _record_mixed(recording, target, measured("layers", layer_errors, target), uniform, budgets)
    for target in MIXED:
        measured("steps", step_errors, target)


def _record_mixed(
    recording: Recording, target: ReuseTarget, errors: pd.DataFrame, uniform: Sequence[int], budgets: Sequence[float]
) -> None:
    kept = errors.groupby(["layer", "bits"]).bytes.mean().unstack()
    most, least = (kept[bits].sum() for bits in (4, 2))
    half = kept[16].sum() * 2 / recording.profile.dtype.itemsize
    number, chosen = recording.sizes.arena_images, {f"INT{bits}": (bits,) * len(kept) for bits in uniform}
    for budget in budgets:
        allowed = least + budget * (most - least)
        chosen[f"mixed, {allowed / half:.2f} of 16 bits"] = choose_bits(errors, allowed)

    def part(name: str, bits: tuple[int, ...]) -> pd.DataFrame:
        reference = recording.drawn(cache_methods(target)[0], RESULT_SEED, 0, number)
        method = Method(name, "mixed" if "mixed" in name else "uniform", with_layer_bits(_fitted(target), bits))
        rows = compare(method, reference, recording.many_at_once, RESULT_SEED)
        return rows.assign(share=rows.cache_bytes / half, layer_bits=" ".join(map(str, bits)))

    parts = {name: functools.partial(part, name, bits) for name, bits in chosen.items()}
    recording.growing(f"bits-{target}", parts, RESULT_SEED, number)


def _fitted(target: ReuseTarget) -> DQARConfig:
    return cached(target, 8, cache=CacheFormat(fitted=True))


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """What mixed bits gain over uniform ones.

    Args:
        table: ``bits-…`` of ``record_bits``.

    Returns:
        One row for each mixed and uniform method and each of ``arena.SHOWN``: ``mixed``, ``uniform``, ``measure``; the
        bytes' ``share`` and ``uniform_share`` of 16 bits; ``gain`` in dB with its 95 % interval ``low`` and ``high``,
        paired bootstrap over the images.
    """
    errors = table.pivot(index="image", columns="method", values="mse")
    points, rows = table.drop_duplicates("method").set_index("method"), []
    families = (points.index[points.family == family] for family in ("mixed", "uniform"))
    for mixed, uniform, measure in itertools.product(*families, arena.SHOWN):
        change = arena.gain(errors[uniform].to_numpy(), errors[mixed].to_numpy(), measure)
        rows.append((mixed, uniform, measure, points.share[mixed], points.share[uniform], *change))
    columns = ["mixed", "uniform", "measure", "share", "uniform_share", "gain", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def of_equal_bytes(table: pd.DataFrame) -> pd.Series:
    """The row of ``gains`` in the median for mixed bits of INT4's bytes over INT4.

    Args:
        table: ``bits-…`` of ``record_bits``.
    """
    changes = gains(table).query("uniform == 'INT4' and measure == 'median'")
    return changes.loc[changes.share.idxmax()]


def mixed_in_words(output: pd.DataFrame, kv: pd.DataFrame) -> str:
    """The finding of ``record_bits``, of its tables ``bits-output`` and ``bits-kv``."""
    ours, theirs = of_equal_bytes(output), of_equal_bytes(kv)
    return (
        f"In INT4's bytes, bits chosen by layer change the median by {ours.gain:+.1f} dB ({ours.low:+.1f} to "
        f"{ours.high:+.1f}) for outputs, {theirs.gain:+.1f} ({theirs.low:+.1f} to {theirs.high:+.1f}) for K and V"
    )
