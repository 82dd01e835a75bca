"""The measurements behind the notebooks: one function a question, each returning a tidy table of this run.

A table that this very code has measured already is read back (``Run.table``), so an interrupted run resumes and
notebooks share what they have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pandas as pd
import torch
from tqdm import tqdm

from dqar import benchmark, metrics
from dqar.calibrate import propose_gate, trace_sites
from dqar.classifier import CLASSIFIERS
from dqar.config import DQARConfig
from dqar.models import Profile, load_classifier, load_pipeline
from dqar.quantizer import quantize
from dqar.results import Run
from dqar.sampling import LOOK, OPEN, sample

_pipeline = functools.cache(load_pipeline)


# --- slides 4, 5, 14: what the signals do ----------------------------------------------------------------------------


def sites(run: Run) -> pd.DataFrame:
    """Every site of an untouched denoising: entropy, SNR, and the change of its output since the step before.

    One row per step, layer and branch (means over the profile's images): ``entropy`` (nats, mean over heads and
    queries), ``snr`` (by predicted x0), ``snr_schedule``, ``change`` (relative: what reuse would do wrong there),
    ``layer_change`` (the same against the layer before).
    """

    def measure() -> pd.DataFrame:
        table = trace_sites(_pipeline(run.profile), run.profile, run.seed)
        return table.groupby(["step", "timestep", "layer", "branch", "tokens"], as_index=False)[
            ["entropy", "snr", "snr_schedule", "change", "layer_change"]
        ].mean()

    return run.table("sites", measure)


def heads(run: Run) -> pd.DataFrame:
    """Entropy (nats) of every head at every step, layer and branch, mean over four images."""

    def measure() -> pd.DataFrame:
        trace = sample(_pipeline(run.profile), run.profile, run.seed, LOOK, num_samples=4, description="heads").trace
        return trace.heads_to_pandas().groupby(["step", "layer", "branch", "head"], as_index=False)["entropy"].mean()

    return run.table("heads", measure)


def relations(table: pd.DataFrame) -> dict[str, float]:
    """Spearman's ρ of the two signals with ``change``, overall and within steps (entropy) or layers (SNR)."""
    known = table.dropna(subset=["change"])

    def within(by: str, signal: str) -> float:
        return known.groupby(by).apply(lambda g: g[signal].corr(g.change, "spearman"), include_groups=False).mean()

    return {
        "entropy": known.entropy.corr(known.change, "spearman"),
        "entropy_within_step": within("step", "entropy"),
        "snr": known.snr.corr(known.change, "spearman"),
        "snr_within_layer": within("layer", "snr"),
    }


def gate_configs(run: Run) -> dict[str, DQARConfig | None]:
    """The gates that slides 5 and 12 are about: closed, the deck's, and one calibrated on this model's trace."""
    calibrated = propose_gate(sites(run))
    return {
        "full compute": None,
        "looking only": LOOK,
        "deck's gate, kv": DQARConfig(reuse_target="kv"),
        "deck's gate, output": DQARConfig(reuse_target="output"),
        "calibrated, kv": dataclasses.replace(calibrated, reuse_target="kv"),
        "calibrated, output": dataclasses.replace(calibrated, reuse_target="output"),
    }


def gates(run: Run) -> pd.DataFrame:
    """Quality and cost of each gate, and its speed against full compute, measured in turn in one process."""

    def measure() -> pd.DataFrame:
        configs = gate_configs(run)
        return compare(run, configs).merge(_time(run, configs), on="method")

    return run.table("gates", measure)


def gated_sites(run: Run) -> pd.DataFrame:
    """The full trace, site by site, of the deck's gate and the calibrated one; column ``method``; four images."""

    def measure() -> pd.DataFrame:
        return pd.concat(
            sample(_pipeline(run.profile), run.profile, run.seed, config, num_samples=4, description=method)
            .trace.to_pandas()
            .assign(method=method)
            for method, config in gate_configs(run).items()
            if config is not None and config != LOOK
        )

    return run.table("gated_sites", measure)


# --- slide 8: schedules ----------------------------------------------------------------------------------------------


def schedule_configs() -> dict[str, DQARConfig]:
    """Every schedule with the gate wide open, for both reuse targets."""
    kinds = {
        "depth_aware": {"schedule": "depth_aware"},
        "linear": {"schedule": "linear"},
        "linear_reverse": {"schedule": "linear_reverse"},
        "all": {"schedule": "all"},
        "static 2": {"schedule": "static", "static_interval": 2},
        "static 3": {"schedule": "static", "static_interval": 3},
    }
    return {
        f"{name}, {target}": dataclasses.replace(OPEN, reuse_target=target, **options)
        for name, options in kinds.items()
        for target in ("kv", "output")
    }


def schedules(run: Run) -> pd.DataFrame:
    """Quality and MACs of each schedule, and of simply taking fewer steps."""

    def measure() -> pd.DataFrame:
        full = run.profile.num_inference_steps
        fewer = {f"{steps} steps": steps for steps in (full * 9 // 10, full * 8 // 10, full // 2)}
        return compare(run, {**schedule_configs(), **fewer})

    return run.table("schedules", measure)


def schedule_maps(run: Run) -> pd.DataFrame:
    """What each schedule did at each step and layer of one image, as traced: method, step, layer, decision."""

    def measure() -> pd.DataFrame:
        tables = []
        for method, config in schedule_configs().items():
            if config.reuse_target == "output":
                drawn = sample(_pipeline(run.profile), run.profile, run.seed, config, num_samples=1, description=method)
                table = drawn.trace.to_pandas()
                tables.append(table[table.branch == "cond"].assign(method=method.split(",")[0]))
        return pd.concat(tables)[["method", "step", "layer", "decision", "reason"]]

    return run.table("schedule_maps", measure)


# --- slide 6: quantization -------------------------------------------------------------------------------------------


def quantization_error(run: Run) -> pd.DataFrame:
    """Relative error of this model's own K, V and attention outputs in few bits: tensor, bits, mode, layer, step."""

    def measure() -> pd.DataFrame:
        pipe, rows = _pipeline(run.profile), []
        every = max(1, run.profile.num_inference_steps // 5)
        calls = 0

        def look(tensor: str, layer: int):
            def hook(_module, _args, x):
                nonlocal calls
                calls += tensor == "K" and layer == 0
                if (calls - 1) % every:
                    return
                for bits in (8, 4, 2):
                    for mode in ("per_tensor", "per_channel", "per_token"):
                        kept = quantize(x, bits, mode, batch_dims=1)
                        error = ((kept.dequantize() - x).norm() / x.norm()).item()
                        row = {"tensor": tensor, "bits": bits, "mode": mode, "layer": layer, "step": calls - 1}
                        rows.append({**row, "relative_error": error, "bytes_per_value": kept.nbytes / x.numel()})

            return hook

        handles = []
        for layer, block in enumerate(pipe.transformer.transformer_blocks):
            for tensor, module in (("K", block.attn1.to_k), ("V", block.attn1.to_v), ("output", block.attn1)):
                handles.append(module.register_forward_hook(look(tensor, layer)))
        try:
            sample(pipe, run.profile, run.seed, num_samples=1, description="quantization error")
        finally:
            for handle in handles:
                handle.remove()
        return pd.DataFrame(rows)

    return run.table("quantization_error", measure)


def quantization_quality(run: Run) -> pd.DataFrame:
    """Images drawn with the cache in 16, 8, 4 and 2 bits, every second step reused; ``bits``, ``mode``, ``target``.

    ``psnr`` is to full compute and holds the error of the reuse too; ``psnr_cache`` is to the same reuse with an
    unquantized cache, and holds the error of the bits alone.
    """

    def measure() -> pd.DataFrame:
        tables = []
        for target in ("kv", "output"):
            base = dataclasses.replace(OPEN, schedule="static", reuse_target=target, quantize_bits=16)
            configs = {f"{target} 16 bit": base}
            for bits in (8, 4, 2):
                for mode in ("per_tensor", "per_channel", "per_token"):
                    configs[f"{target} INT{bits} {mode}"] = dataclasses.replace(
                        base, quantize_bits=bits, quantize_mode=mode
                    )
            if target == "kv":
                configs["kv K-FP16 V-INT8"] = dataclasses.replace(base, quantize_bits=8, mixed_precision=True)
            table = compare(run, configs, same_as=f"{target} 16 bit", num_samples=max(4, run.profile.num_samples // 2))
            tables.append(
                table.assign(
                    target=target,
                    bits=[c.quantize_bits for c in configs.values()],
                    mode=["mixed" if c.mixed_precision else c.quantize_mode for c in configs.values()],
                )
            )
        return pd.concat(tables)

    return run.table("quantization_quality", measure)


# --- what all comparisons share --------------------------------------------------------------------------------------


def compare(
    run: Run,
    methods: dict[str, DQARConfig | int | None],
    same_as: str | None = None,
    num_samples: int | None = None,
) -> pd.DataFrame:
    """One row per method, on the same seeds as the reference (full compute).

    Args:
        methods: a configuration, a number of steps, or ``None`` for the untouched pipeline.
        same_as: a method whose images ``psnr_cache`` compares with.
        num_samples: in place of the profile's.

    Returns:
        ``psnr`` (dB, ``inf`` if identical), ``ssim``, ``class_accuracy`` (where there is a classifier),
        ``sites_reused`` (share), ``macs_speedup`` (counted), ``cache_bytes`` (largest at any step, per image).
    """
    pipe, profile = _pipeline(run.profile), run.profile
    reference = sample(pipe, profile, run.seed, num_samples=num_samples, description="reference")
    classifier = load_classifier(profile.model) if profile.model in CLASSIFIERS and profile.trained else None
    rows, images = [], {}
    for method, how in tqdm(methods.items(), desc="compare", leave=False):
        if isinstance(how, int):
            drawn = sample(
                pipe, profile, run.seed, num_samples=num_samples, num_inference_steps=how, description=method
            )
        else:
            drawn = sample(pipe, profile, run.seed, how, num_samples=num_samples, description=method)
        images[method] = drawn.images
        row = {
            "method": method,
            # What a random model draws is no picture, and no method of it is better or worse than another.
            "psnr": metrics.mean_psnr(drawn.images, reference.images) if profile.trained else math.nan,
            "ssim": metrics.ssim(drawn.images, reference.images).mean().item() if profile.trained else math.nan,
            "sites_reused": 0.0,
            "macs_speedup": profile.num_inference_steps / how if isinstance(how, int) else 1.0,
            "cache_bytes": 0.0,
        }
        if classifier is not None:
            predicted, _ = metrics.classify(classifier, drawn.images)
            row["class_accuracy"] = (predicted == drawn.labels).double().mean().item()
        if same_as is not None:
            row["psnr_cache"] = metrics.mean_psnr(drawn.images, images[same_as])
        if drawn.trace is not None:
            table = drawn.trace.to_pandas()
            row["sites_reused"] = (table.decision != "compute").mean()
            saved = row["sites_reused"] * reuse_saving(run.profile, how.reuse_target)
            row["macs_speedup"] = 1 / (1 - saved)
            row["cache_bytes"] = table.groupby(["run", "step"])["bytes"].sum().max() / min(
                profile.batch_size, len(drawn.images)
            )
        rows.append(row)
    return pd.DataFrame(rows)


@functools.cache
def _macs(profile: Profile, target: str | None) -> int:
    """MACs of a two-step, one-image sampling; with a ``target``, all sites of the second step are reused."""
    config = None
    if target is not None:  # the sites alone: what is kept of the modulations saves some, too
        config = dataclasses.replace(OPEN, schedule="all", reuse_target=target, keep_modulations=False)
    pipe = _pipeline(profile)
    return metrics.count_macs(
        lambda: sample(pipe, profile, 0, config, num_samples=1, num_inference_steps=2, description="count MACs")
    )


def reuse_saving(profile: Profile, target: str) -> float:
    """The share of a step's MACs that reusing every attention site of it saves."""
    full = _macs(profile, None)
    return (full - _macs(profile, target)) / (full / 2)


def _time(run: Run, configs: dict[str, DQARConfig | None]) -> pd.DataFrame:
    """Speedup over full compute: median and quartiles, the methods timed in turn."""
    pipe, profile = _pipeline(run.profile), dataclasses.replace(run.profile, batch_size=4)

    def call(config: DQARConfig | None):
        return lambda: sample(pipe, profile, run.seed, config, num_samples=min(4, profile.num_samples))

    times = metrics.interleaved_times({m: call(c) for m, c in configs.items()}, profile.repeats, profile.device)
    ms_per_step = times.groupby("method").seconds.median() * 1000 / profile.num_inference_steps
    return metrics.speedups(times, "full compute").assign(ms_per_step=ms_per_step).reset_index()


def overhead_of_looking(run: Run) -> pd.DataFrame:
    """Seconds of one attention, B2 H16 N256 D72 (DiT-XL/2's), plain and with entropy in three ways; tidy."""
    calls = benchmark.attention_calls(run.profile.device, seed=run.seed)

    def measure() -> pd.DataFrame:
        times = metrics.interleaved_times(calls, 20 * run.profile.repeats, run.profile.device)
        exact, estimate = calls["fused entropy"]()[1], calls["32 of 256 queries"]()[1]
        error = ((estimate - exact).abs() / exact).max().item()
        ratios = 1 / metrics.speedups(times, "plain")
        ratios.columns = ["cost_high", "cost", "cost_low"]
        return ratios.assign(max_error=[error if name.startswith("32") else 0.0 for name in ratios.index]).reset_index()

    return run.table("overhead_of_looking", measure)


def bounds() -> pd.DataFrame:
    """Slide 12's speed claim against arithmetic: the most that reuse of ``sites`` can save at DiT-XL/2's shape.

    A block at N tokens and width d costs ``12Nd² + 2N²d`` MACs; K and V projections ``2Nd²``, the whole attention
    ``4Nd² + 2N²d``.
    """
    tokens, width, layers, steps = 256, 1152, 28, 50
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    saved = {"kv": 2 * tokens * width**2 / block, "output": (4 * tokens * width**2 + 2 * tokens**2 * width) / block}
    rows = []
    for target, share in saved.items():
        for sites_reused in (47, layers * steps):
            speedup = 1 / (1 - share * sites_reused / (layers * steps))
            rows.append({"target": target, "sites": sites_reused, "share_of_block": share, "speedup_bound": speedup})
    return pd.DataFrame(rows)


def reuse_samples(run: Run) -> dict[str, torch.Tensor]:
    """Images ``[10, C, H, W]`` of the same seeds: full compute, the calibrated gate, and every step reused in turn."""
    configs = {
        "full compute": None,
        "calibrated gate, output": gate_configs(run)["calibrated, output"],
        "every 2nd step, output": dataclasses.replace(OPEN, schedule="static", reuse_target="output"),
        "every 2nd step, kv, INT2": dataclasses.replace(OPEN, schedule="static", quantize_bits=2),
    }
    pipe = _pipeline(run.profile)
    number = min(10, run.profile.num_samples)
    return {
        method: sample(pipe, run.profile, run.seed, config, num_samples=number, description=method).images
        for method, config in configs.items()
    }


def transformer_facts(run: Run) -> dict[str, str]:
    """Size and shape of the profile's model, in words, for slide 11's table."""
    transformer = _pipeline(run.profile).transformer
    config, millions = transformer.config, sum(p.numel() for p in transformer.parameters()) / 1e6
    size = config.sample_size
    tokens = (size // config.patch_size) ** 2
    width = config.num_attention_heads * config.attention_head_dim
    return {
        "model": f"DiT, {config.num_layers} layers, {width} wide, {millions:.1f}M params",
        "classes": str(config.num_embeds_ada_norm),
        "resolution": f"{size}×{size} {'pixels' if config.in_channels == 1 else 'latents'}, {tokens} tokens",
    }
