"""Notebook 04: in how few bits a cache can be kept (slide 6)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, get_args

import pandas as pd
import torch

from dqar.config import CacheFormat, DQARConfig, ReuseTarget
from dqar.measure import metrics
from dqar.measure.results import Run
from dqar.measure.sampling import OPEN, sample
from dqar.models.pipelines import cached_pipeline
from dqar.quantizer import QuantizeMode, quantize
from dqar.studies.compare import FULL, Method, compare, draw, summarize
from dqar.studies.recording import RESULT_SEED, Recording

FORMATS = tuple(itertools.product((8, 4, 2), get_args(QuantizeMode), (False, True)))
"""Bits, mode, and whether the levels are fitted."""
DRAWN = tuple(
    (bits, mode, fitted)
    for bits, mode, fitted in FORMATS
    if (mode == "per_channel" and not (fitted and bits == 8)) or (bits, mode, fitted) == (8, "per_tensor", False)
)
"""Of these, the ones that images are drawn with: a scale a channel, with fitted levels too where bits are few, and the
deck's one scale a tensor."""


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

    def unquantized(config: DQARConfig) -> DQARConfig:
        cache = dataclasses.replace(config.cache, fitted=False)
        return dataclasses.replace(config, quantize_bits=16, mixed_precision=False, balance=False, cache=cache)

    return measure(
        [
            [
                Method(f"{number}: 16 bit", config=unquantized(config)),
                Method(
                    f"{number}: INT{config.quantize_bits} {config.quantize_mode}{' + CSB' * config.balance}",
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
    recording.growing("formats", parts, RESULT_SEED)
