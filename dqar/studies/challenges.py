"""Notebook 08: one measurement for each problem that slide 15 names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention

from dqar import stats
from dqar.config import CacheFormat, DQARConfig, Probe, ReuseTarget
from dqar.measure import metrics
from dqar.measure.recorders import StateRecorder
from dqar.measure.results import slug
from dqar.measure.sampling import LOOK, OPEN
from dqar.studies import policy
from dqar.studies.compare import FULL, Method
from dqar.studies.layers import attended, attention_map
from dqar.studies.recording import RESULT_SEED, SWEEP_SEED, Recording


def record_accumulation(recording: Recording) -> pd.DataFrame:
    """Error of the latents at every step when K and V are kept in few bits, against an unquantized cache.

    Returns:
        ``bits``, ``variant``, ``step``, ``relative_error`` (mean over images), ``bytes_per_site`` (an image, at most).
    """
    top = CacheFormat(keep_channels=4)
    variants: dict[str, dict[str, Any]] = {
        "per tensor": {"quantize_mode": "per_tensor"},
        "per tensor + CSB": {"quantize_mode": "per_tensor", "balance": True},
        "per tensor + top 4": {"quantize_mode": "per_tensor", "cache": top},
        "per tensor + CSB + top 4": {"quantize_mode": "per_tensor", "balance": True, "cache": top},
        "per channel": {"quantize_mode": "per_channel"},
    }
    number = recording.sizes.sweep_images

    def states(**options: Any) -> tuple[torch.Tensor, float]:
        method = Method("static, kv", config=dataclasses.replace(OPEN, schedule="static", **options))
        with StateRecorder(method.pipeline(recording.profile).transformer) as recorder:
            drawn = method.draw(recording.many_at_once, SWEEP_SEED, num_samples=number)
        return recorder.states(), drawn.traced.to_pandas()["bytes"].max() / number

    def part(bits: int, variant: str) -> pd.DataFrame:
        latents, nbytes = states(quantize_bits=bits, **variants[variant])
        error = (latents - unquantized()).flatten(2).norm(dim=2) / unquantized().flatten(2).norm(dim=2)
        rows = {"step": range(len(error)), "relative_error": error.mean(1), "bytes_per_site": nbytes}
        return pd.DataFrame(rows).assign(bits=bits, variant=variant)

    @functools.cache
    def unquantized() -> torch.Tensor:
        return states(quantize_bits=16)[0]

    parts = {f"{b}-{slug(v)}": functools.partial(part, b, v) for b in (8, 4, 2) for v in variants}
    return recording.table("accumulation", parts, SWEEP_SEED)


def record_sharing(recording: Recording) -> pd.DataFrame:
    """The unconditional branch takes the conditional one's, where their entropies differ by less than ε nats.

    Returns:
        The columns of ``compare``, and ``epsilon`` (nats).
    """

    def part(target: ReuseTarget, epsilon: float) -> pd.DataFrame:
        config = DQARConfig(schedule="none", reuse_target=target, share_below=epsilon)
        method = Method(f"ε = {epsilon:g}", "shared branches", config)
        return recording.compare(method, SWEEP_SEED, 0, recording.sizes.sweep_images).assign(epsilon=epsilon)

    targets: tuple[ReuseTarget, ...] = ("kv", "output")
    epsilons = (0.01, 0.03, 0.1, 0.3, math.inf)
    parts = {f"{t}-{e}": functools.partial(part, t, e) for t in targets for e in epsilons}
    return recording.table("sharing", parts, SWEEP_SEED)


def record_overhead(recording: Recording) -> pd.DataFrame:
    """Seconds of a whole denoising with the entropy measured in different ways, taken in turn; CPU time on a CPU.

    Returns:
        ``method``, ``repeat``, ``seconds``, of four images at once. ``"none"`` is DQAR with nothing to decide;
        ``"maps"`` is no DQAR, but attention processors that make whole maps and their entropy.
    """
    profile = dataclasses.replace(recording.profile, batch_size=4)
    model = FULL.pipeline(profile).transformer.config
    tokens = (model.sample_size // model.patch_size) ** 2
    few = Probe(record=True, queries=tokens // 8)
    methods = (
        Method("none", config=DQARConfig(schedule="none")),
        Method("fused", config=LOOK),
        Method(f"fused, {tokens // 8} of {tokens} queries", config=dataclasses.replace(LOOK, probe=few)),
        Method("fused, every 4th step", config=dataclasses.replace(LOOK, probe=Probe(record=True, interval=4))),
    )

    def by_maps() -> None:
        with whole_maps(FULL.pipeline(profile)):
            FULL.draw(profile, RESULT_SEED, num_samples=4)

    def measure() -> pd.DataFrame:
        calls = {m.name: functools.partial(m.draw, profile, RESULT_SEED, num_samples=4) for m in methods}
        clock = metrics.cost_clock(profile.device)
        return metrics.interleaved_times({**calls, "maps": by_maps}, 4 * profile.repeats, profile.device, clock)

    return recording.table("overhead", {"all": measure}, RESULT_SEED)


# --- what came out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solutions:
    """What was measured of each of slide 15's five solutions.

    Attributes:
        between, within: standard deviations of entropy (nats): of the classes' means, and of the sites within a class.
        off: by kind of cache in INT8, the relative error of the finished latents.
        auc, auc_without_l2: of a trained policy on unseen classes.
        looking: by way of measuring the entropy, the share of a step that it adds: its quartiles, by 0.25, 0.5, 0.75.
        shared: of the cheapest run with shared outputs, a row of ``shared_runs``.
    """

    between: float
    within: float
    off: pd.Series
    auc: float
    auc_without_l2: float
    looking: pd.DataFrame
    shared: pd.Series


def solutions(
    labels: pd.DataFrame,
    oracle: pd.DataFrame,
    accumulation: pd.DataFrame,
    overhead: pd.DataFrame,
    sharing: pd.DataFrame,
    total_steps: int,
) -> Solutions:
    """``Solutions`` from the recorded tables of these names."""
    last = accumulation[(accumulation.step == accumulation.step.max()) & (accumulation.bits == 8)]
    between, within = entropy_spreads(labels)
    delta = policy.calibrated_delta(oracle)
    auc, auc_without_l2 = (policy.study(labels, delta, total_steps, l2=l2).auc() for l2 in (1e-4, 0.0))
    return Solutions(
        between=between,
        within=within,
        off=last.set_index("variant").relative_error,
        auc=auc,
        auc_without_l2=auc_without_l2,
        looking=looking(overhead).quantile([0.25, 0.5, 0.75]),
        shared=shared_runs(sharing).query("target == 'output'").iloc[-1],
    )


def entropy_spreads(labels: pd.DataFrame) -> tuple[float, float]:
    """Standard deviation (nats) of the classes' mean entropies, and that of the sites within a class."""
    by_class = labels.groupby("label").entropy
    return by_class.mean().std(), by_class.std().mean()


def looking(overhead: pd.DataFrame) -> pd.DataFrame:
    """Time that measuring entropy adds to a step, as a share of it: a column a method, a row a repeat."""
    wide = overhead.pivot(index="repeat", columns="method", values="seconds")
    return wide.div(wide["none"], axis=0) - 1


def shared_runs(sharing: pd.DataFrame) -> pd.DataFrame:
    """Mean quality and cost of each target and ε; ``psnr`` in dB to full compute, of the mean squared error, with its
    95 % interval ``psnr_low`` and ``psnr_high``."""
    by = sharing.groupby(["target", "epsilon"])
    runs = by[["mse", "macs_speedup", "sites_reused"]].mean()
    low, high = zip(*(metrics.psnr_interval(part.mse.to_numpy()) for _, part in by), strict=True)
    return runs.assign(psnr=metrics.decibels(runs.mse.replace(0, math.nan)), psnr_low=low, psnr_high=high).reset_index()


# --- whole maps ------------------------------------------------------------------------------------------------------


class MapProcessor:
    """An attention processor of diffusers' kind that makes the whole map ``[B, H, N, N]`` and measures its entropy.

    ``entropy`` ``[B, H]``, in nats, is that of the last call.
    """

    entropy: torch.Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weights = attention_map(attn, hidden_states)
        self.entropy = stats.attention_entropy(weights, reduction="none")
        return attended(attn, weights, hidden_states)


@contextlib.contextmanager
def whole_maps(pipe: DiffusionPipeline) -> Iterator[None]:
    """Every block's self-attention by a ``MapProcessor``; the processors that were there come back."""
    layers = [block.attn1 for block in pipe.transformer.transformer_blocks]
    processors = [layer.processor for layer in layers]
    for layer in layers:
        layer.set_processor(MapProcessor())
    try:
        yield
    finally:
        for layer, processor in zip(layers, processors, strict=True):
            layer.set_processor(processor)
