"""Notebook 10: what the mechanism costs at DiT-XL/2's size (``dqar benchmark``, ``make benchmarks``).

Everything is timed in turn within one run and read as ratios. Each device has a table of its own in
``recorded/benchmarks``: a GPU's stands beside a CPU's, and the two are never mixed. ``--overhead`` measures instead
what deciding costs on the small digits model, beside hand-written floors (``dqar.studies.overhead``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch.nn import functional as F

from dqar import stats
from dqar.attention import apply_dqar
from dqar.config import DQARConfig, Probe
from dqar.families import describe_model
from dqar.forecast.plan import extrapolation
from dqar.measure import metrics
from dqar.measure.results import BENCHMARKS, Run, load_table, provenance, save_table
from dqar.models.pipelines import EmbeddedDiTPipeline, load_pipeline, make_scheduler, random_dit_xl_2
from dqar.models.profiles import get_profile
from dqar.plan import BRANCHES, ReusePlan
from dqar.quantizer import QuantizeMode, quantize
from dqar.studies import overhead
from dqar.studies.compare import Method

DIT_XL_2_ATTENTION = (2, 16, 256, 72)
"""Batch (both branches of guidance), heads, tokens and width of a head."""


def overhead_of_looking(run: Run, shape: tuple[int, int, int, int] | None = None) -> pd.DataFrame:
    """What the entropy of one attention costs, measured now in three ways, as a multiple of plain attention's time.

    Args:
        shape: batch, heads, tokens and width of a head to measure anew, in place of DiT-XL/2's, whose table is kept.

    Returns:
        A row a way: ``method``, ``cost`` (median) with its quartiles ``cost_low`` and ``cost_high``, and ``max_error``,
        the largest relative error of the estimate from some of the queries.
    """
    calls = attention_calls(run.profile.device, seed=run.seed, shape=shape or DIT_XL_2_ATTENTION)

    def measure() -> pd.DataFrame:
        times = metrics.interleaved_times(calls, 20 * run.profile.repeats, run.profile.device)
        few = next(name for name in calls if name.endswith("queries"))
        exact, estimate = calls["fused entropy"]()[1], calls[few]()[1]
        error = ((estimate - exact).abs() / exact).max().item()
        return costs(times, "plain").assign(max_error=lambda table: (table.index == few) * error).reset_index()

    return run.table("overhead_of_looking", measure) if shape is None else measure()


FOLDER = BENCHMARKS
"""Of the recorded tables."""
OVERHEAD = "overhead/digits-cpu.parquet"
"""Of ``dqar.studies.overhead``'s table, within the folder."""
SITES, FORECAST = "plan of sites", "forecast plan"
"""Families of whole denoisings by a plan."""
STEPS = 4
"""Denoising steps of a timed run: enough for reuse to alternate, few enough to take turns often."""
GUIDANCE = 7.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Calls = dict[str, Callable[[], Any]]


def attention_calls(
    device: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: tuple[int, int, int, int] = DIT_XL_2_ATTENTION,
) -> Calls:
    """One attention ``[B, H, N, D]``, plain and with its entropy in three ways, one of them from an eighth of N."""
    tokens = shape[2]
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))

    def with_maps() -> tuple[torch.Tensor, torch.Tensor]:
        weights = (query @ key.transpose(-1, -2) * shape[-1] ** -0.5).softmax(-1)
        return weights @ value, stats.attention_entropy(weights, reduction="none")

    return {
        "plain": lambda: F.scaled_dot_product_attention(query, key, value),
        "fused entropy": lambda: stats.fused_attention_with_entropy(query, key, value),
        f"{tokens // 8} of {tokens} queries": lambda: stats.fused_attention_with_entropy(
            query, key, value, num_queries=tokens // 8
        ),
        "maps": with_maps,
    }


def layer_calls(pipe: EmbeddedDiTPipeline, hidden_states: torch.Tensor) -> Calls:
    """One attention layer on ``[B, N, C]``: computed, committed to a cache, and reused from it in both ways."""
    attn = pipe.transformer.transformer_blocks[0].attn1

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def with_cached(key: Callable, value: Callable) -> torch.Tensor:
        query = by_head(attn.to_q(hidden_states))
        out = F.scaled_dot_product_attention(query, by_head(key()), by_head(value()))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    output, key, value = attn(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    kept = {
        name: quantize(x, 8, "per_channel", batch_dims=1) for name, x in zip("okv", (output, key, value), strict=True)
    }
    return {
        "computed": lambda: attn(hidden_states),
        "computed, output kept in INT8": lambda: quantize(attn(hidden_states), 8, "per_channel", batch_dims=1),
        "reused: output, 16 bit": lambda: output.clone(),
        "reused: output, INT8": kept["o"].dequantize,
        "reused: K and V, 16 bit": lambda: with_cached(lambda: key, lambda: value),
        "reused: K and V, INT8": lambda: with_cached(kept["k"].dequantize, kept["v"].dequantize),
    }


def quantizer_calls(pipe: EmbeddedDiTPipeline, hidden_states: torch.Tensor) -> Calls:
    """Quantizing and dequantizing one layer's output for ``hidden_states`` ``[B, N, C]``, beside computing it."""
    attn = pipe.transformer.transformer_blocks[0].attn1
    calls: Calls = {"layer computed": lambda: attn(hidden_states)}
    for bits in (8, 4, 2):
        for mode in get_args(QuantizeMode):
            again = functools.partial(quantize, hidden_states, bits, mode, batch_dims=1)
            calls[f"quantize INT{bits} {mode}"] = again
            calls[f"dequantize INT{bits} {mode}"] = again().dequantize
    return calls


def every_second_step(num_layers: int) -> ReusePlan:
    """Attention computed at even steps and reused at odd ones, in all layers and both branches."""
    sites = {(s, layer, b) for s in range(1, STEPS, 2) for layer in range(num_layers) for b in BRANCHES}
    return ReusePlan(frozenset(sites), num_layers, STEPS)


def step_methods(pipe: EmbeddedDiTPipeline) -> list[Method]:
    """What a whole denoising is timed with; the first is the untouched pipeline."""
    num_layers = len(pipe.transformer.transformer_blocks)
    pipe.scheduler.set_timesteps(STEPS)
    timesteps, model = pipe.scheduler.timesteps.tolist(), describe_model(pipe.transformer)
    look = DQARConfig(schedule="none", probe=Probe(record=True))
    half = every_second_step(num_layers)
    most = {(step, layer, branch) for step in range(1, STEPS) for _, layer, branch in half.sites}
    late = ReusePlan(frozenset(most), num_layers, STEPS)
    forecast = extrapolation(range(0, STEPS, 2), timesteps, GUIDANCE, model)
    return [
        Method("plain"),
        Method("applied, closed", "closed", DQARConfig(schedule="none")),
        Method("entropy, exact", "entropy", look),
        Method(
            "entropy, 32 of 256 queries", "entropy", DQARConfig(schedule="none", probe=Probe(record=True, queries=32))
        ),
        Method("entropy, every 4th step", "entropy", DQARConfig(schedule="none", probe=Probe(record=True, interval=4))),
        Method("plan: output, every 2nd step", SITES, DQARConfig(plan=half, reuse_target="output")),
        Method("plan: K and V, every 2nd step", SITES, DQARConfig(plan=half)),
        Method("plan: output, 3 of 4 steps", SITES, DQARConfig(plan=late, reuse_target="output")),
        Method("plan: model's output forecast, every 2nd step", FORECAST, forecast),
    ]


def drawing(pipe: EmbeddedDiTPipeline, method: Method, images: int) -> Callable[[], object]:
    """A guided denoising of so many images, DQAR put on before and taken off after it."""

    def call() -> object:
        with contextlib.nullcontext() if method.config is None else apply_dqar(pipe, method.config):
            return pipe([207] * images, GUIDANCE, torch.Generator().manual_seed(0), STEPS, output_type="latent")

    return call


def compiled_methods(pipe: EmbeddedDiTPipeline) -> list[Method]:
    """What is timed with every block compiled; full compute compiled is the fair baseline, not compiled the first."""
    plain, *others = step_methods(pipe)
    chosen = [m for m in others if m.family == "closed" or (m.family == SITES and m.columns()["target"] != "kv")]
    compiled = [dataclasses.replace(method, name=f"compiled, {method.name}") for method in (plain, *chosen)]
    return [dataclasses.replace(plain, name="eager, plain"), *compiled]


def compiled_calls(pipe: EmbeddedDiTPipeline, images: int, device: str) -> Calls:
    """``compiled_methods`` on a pipeline whose blocks are compiled here.

    Without CUDA graphs: of blocks that are compiled one by one, one graph overwrites what another still reads.
    """
    for block in pipe.transformer.transformer_blocks:
        block.compile()
    eager, *compiled = compiled_methods(pipe)
    calls = {method.name: drawing(pipe, method, images) for method in compiled}
    return {eager.name: torch.compiler.set_stance("force_eager")(drawing(pipe, eager, images)), **calls}


def run(device: str, dtype: torch.dtype, images: int, num_layers: int, repeats: int, path: Path) -> pd.DataFrame:
    """Times everything and saves it, part by part.

    Returns:
        Tidy: ``part``, ``method``, ``repeat``, ``seconds``; of whole denoisings also ``family`` and ``target`` (see
        ``Method.columns``), and, not compiled, ``macs`` and ``peak_bytes`` (``metrics.peak_memory_bytes``); else NaN.
        The first method of a part is what the others are compared with.
        ``"compiled"`` is left out where there is no C++ compiler.
    """
    whole = random_dit_xl_2(dtype=dtype, num_layers=num_layers)
    pipe = EmbeddedDiTPipeline(whole.transformer, make_scheduler("dpm-solver++", whole.scheduler)).to(device)
    pipe.set_progress_bar_config(disable=True)
    hidden_states = torch.randn(2 * images, 256, 1152, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    methods = {"step": step_methods(pipe), "compiled": compiled_methods(pipe)}
    steps = {method.name: drawing(pipe, method, images) for method in methods["step"]}
    parts: dict[str, tuple[Callable[[], Calls], int]] = {
        "attention": (lambda: attention_calls(device, dtype), 20 * repeats),
        "layer": (lambda: layer_calls(pipe, hidden_states), 4 * repeats),
        "quantizer": (lambda: quantizer_calls(pipe, hidden_states), 4 * repeats),
        "step": (lambda: steps, repeats),
        "compiled": (lambda: compiled_calls(pipe, images, device), repeats),
    }
    if shutil.which("c++") is None:  # torch.compile has nothing to compile with
        del parts["compiled"]
    profile = get_profile("dit-xl-2-random", device=device, dtype=dtype, batch_size=images, num_inference_steps=STEPS)
    tables = []
    for part, (calls, times) in parts.items():
        with torch.no_grad():
            made = calls()
            table = metrics.interleaved_times(made, times, device).assign(part=part)
            if part in methods:
                facts = pd.DataFrame([method.columns() for method in methods[part]])
                table = table.merge(facts[["method", "family", "target"]], on="method")
            if part == "step":
                costs = pd.DataFrame([{"method": name, **_costs(call, device)} for name, call in made.items()])
                table = table.merge(costs, on="method")
        tables.append(table)
        source = {**provenance(profile, 0), "num_layers": num_layers}
        save_table(pd.concat(tables, ignore_index=True), path, source)
    return load_table(path)


def _costs(call: Callable[[], object], device: str) -> dict[str, float]:
    metrics.reset_peak_memory(device)
    return {"macs": metrics.count_macs(call), "peak_bytes": metrics.peak_memory_bytes(device)}


def costs(times: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Of each method of ``metrics.interleaved_times``: ``cost``, its time over the baseline's, with quartiles."""
    ratios = 1 / metrics.speedups(times, baseline)
    return ratios.set_axis(["cost_high", "cost", "cost_low"], axis=1)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Each method beside its part's first: ``cost`` (time, relative) with quartiles, and ``ms``.

    Of whole denoisings also ``family`` and ``target``, ``macs_speedup``, ``realised`` (the share of the MAC saving that
    the clock shows), and ``peak_bytes``.
    """
    rows = []
    for part, timed in table.groupby("part", sort=False):
        baseline = timed.method.iloc[0]
        ratios = costs(timed, baseline)
        for method in timed.method.unique():
            mine = timed[timed.method == method]
            row = {"part": part, "method": method, "family": mine.family.iloc[0], "target": mine.target.iloc[0]}
            row |= {"ms": 1000 * mine.seconds.median(), **ratios.loc[method]}
            if "macs" in mine and mine.macs.notna().all():
                speedup = timed[timed.method == baseline].macs.iloc[0] / mine.macs.iloc[0]
                row |= {"macs_speedup": speedup, "peak_bytes": mine.peak_bytes.iloc[0]}
                if speedup > 1.001:
                    row["realised"] = (1 / row["cost"] - 1) / (speedup - 1)
            rows.append(row)
    columns = [
        "part",
        "method",
        "family",
        "target",
        "ms",
        "cost",
        "cost_low",
        "cost_high",
        "macs_speedup",
        "realised",
        "peak_bytes",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def targets(table: pd.DataFrame) -> pd.DataFrame:
    """What the mechanism is meant to cost at most, what it costs, and whether that is met."""
    steps = summary(table).query("part == 'step'").set_index("method")
    on_gpu = table.attrs["provenance"]["profile"]["device"] == "cuda"
    entropy, closed = steps.cost["entropy, exact"] - 1, steps.cost["applied, closed"] - 1
    rows = [
        ("exact entropy, share of a step", 0.05 if on_gpu else 0.10, entropy, entropy <= (0.05 if on_gpu else 0.10))
    ]
    rows.append(("applied with everything closed", 0.01, closed, closed < 0.01))
    # K and V need fresh queries: what they save is small, and nobody promised it.
    plans = steps.family.isin((SITES, FORECAST)) & (steps.target != "kv")
    for method, realised in steps.realised[plans].items():
        rows.append((f"realised share of MACs saved, {method}", 0.9, realised, realised >= 0.9))
    return pd.DataFrame(rows, columns=["target", "bound", "measured", "met"])


def recorded() -> dict[str, pd.DataFrame]:
    """All recorded tables, by device, dtype and batch."""
    tables = [load_table(path) for path in sorted(FOLDER.glob("*.parquet"))]
    return {
        "{device}, {dtype}, {profile[batch_size]} images".format(**table.attrs["provenance"]).replace(
            " 1 images", " 1 image"
        ): table
        for table in tables
    }


def recorded_overhead() -> pd.DataFrame:
    """The recorded table of ``dqar.studies.overhead``."""
    return load_table(FOLDER / OVERHEAD)


def run_overhead(repeats: int, path: Path) -> pd.DataFrame:
    """Measures ``dqar.studies.overhead`` on the digits model and saves its table, which is returned."""
    profile = get_profile("digits", batch_size=1, num_inference_steps=overhead.STEPS, num_samples=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_table(overhead.measure(load_pipeline(profile), repeats), path, provenance(profile, 0))
    return load_table(path)
