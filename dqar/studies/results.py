"""Notebook 07: what each method costs and does, from the recorded images, with intervals (slides 12, 13 and 17)."""

from __future__ import annotations

import dataclasses
import functools
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from dqar.config import DQARConfig, ReuseTarget
from dqar.measure import metrics
from dqar.measure.calibrate import propose_gate
from dqar.measure.quality import Reference, reference_of
from dqar.measure.results import Run, load_table, slug
from dqar.measure.sampling import OPEN
from dqar.models.profiles import Profile
from dqar.peers import w8a8
from dqar.peers.registry import RIVALS
from dqar.studies import pareto, policy
from dqar.studies.compare import FACTS, FULL, Method, check_again, speeds, summarize, times
from dqar.studies.recording import RESULT_SEED, Recording

BOTH: tuple[ReuseTarget, ...] = ("kv", "output")


def methods(profile: Profile, folder: Path) -> list[Method]:
    """Full compute, slide 11's baselines, DQAR by a calibrated rule, by its policy and by plans, and beside each plan
    what saves as much.

    Args:
        folder: of the profile's recorded tables. What needs one that isn't there is left out.
    """
    steps, labels = profile.num_inference_steps, folder / "labels-output.parquet"
    gate = propose_gate(load_table(labels)) if labels.exists() else None
    dtypes = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}
    static = dataclasses.replace(OPEN, schedule="static")
    chosen = [
        FULL,
        *(Method(f"{FULL.name}, {n}", FULL.name, dtype=d) for n, d in dtypes.items() if d != profile.dtype),
        *(_fewer_steps(profile, number) for number in (steps * 4 // 5, steps // 2)),
        *(_by_target("static", "static reuse", static, target) for target in BOTH),
        Method("W8A8", w8a8="plain"),
        Method("W8A8 + CSB", "W8A8", w8a8="balanced"),
        *(_by_target("DQAR rule", "DQAR rule", gate, target) for target in BOTH if gate is not None),
    ]
    for target in BOTH:
        if (network := policy.policy_path(folder, target)).exists():
            chosen.append(_by_target("DQAR policy", "DQAR policy", policy.policy_config(network, target), target))
    rivals = _best_rivals(profile, folder)
    for method in plans(profile, folder):
        assert method.budget is not None
        number = pareto.computed_steps(profile, method.budget)
        chosen += [_fewer_steps(profile, number), *rivals.get(method.budget, ()), method]
    return list({method.name: method for method in chosen}.values())


def plans(profile: Profile, folder: Path) -> list[Method]:
    """The recorded plans for full compute's images, from the densest to the sparsest."""
    made = {budget: pareto.recorded_plan(folder, profile, budget) for budget in pareto.BUDGETS}
    return [
        Method(f"DQAR plan, {budget:g}×", pareto.PLAN, plan, budget=budget, made_for="reference")
        for budget, plan in made.items()
        if plan is not None
    ]


def _by_target(name: str, family: str, config: DQARConfig, target: ReuseTarget) -> Method:
    return Method(f"{name}, {target}", family, dataclasses.replace(config, reuse_target=target))


def _fewer_steps(profile: Profile, number: int) -> Method:
    budgets = {pareto.computed_steps(profile, budget): budget for budget in reversed(pareto.BUDGETS)}
    return Method(f"{number} steps", "fewer steps", num_inference_steps=number, budget=budgets.get(number))


def _best_rivals(profile: Profile, folder: Path) -> dict[float, list[Method]]:
    """By budget: output extrapolation and the best of all other caches, at their best recorded settings within it."""
    path = folder / f"{pareto.table_name(profile.scheduler)}.parquet"
    if not path.exists():
        return {}
    points, sampler = pareto.summary(load_table(path)), profile.scheduler
    kinds = (("output extrapolation",), pareto.extrapolations), (tuple(RIVALS), pareto.rivals)
    best: dict[float, list[Method]] = {budget: [] for budget in pareto.BUDGETS}
    for families, make in kinds:
        by_name = {method.name: method for method in make(profile, sampler)}
        for budget, chosen in best.items():
            point = pareto.best_at(points[points.family.isin(families)], budget)
            if point is not None and point.method in by_name:
                method = by_name[point.method]
                short = "extrapolation" if method.peer is None else method.family
                chosen.append(dataclasses.replace(method, name=f"{short}, {budget:g}×", budget=budget))
    return best


def samples(run: Run, chosen: list[Method]) -> pd.DataFrame:
    """The recorded images of the chosen methods; empty if there are none.

    Returns:
        The columns of ``compare``; those of ``FACTS`` are the methods' own.
    """
    tables = [table for method in chosen if (table := run.recorded(f"samples-{slug(method.name)}")) is not None]
    if not tables:
        return pd.DataFrame(columns=["method"])
    facts = pd.DataFrame([method.columns() for method in chosen])
    rows = pd.concat([table.drop(columns=FACTS[1:], errors="ignore") for table in tables], ignore_index=True)
    rows = rows.merge(facts, on="method", how="left")
    rows.attrs = tables[0].attrs
    return rows


def summary(run: Run, resamples: int = 200) -> pd.DataFrame:
    """One row per method; what hasn't been recorded is NaN.

    Returns:
        The columns of ``FACTS``; ``images``, ``psnr`` (dB), ``ssim``, ``class_accuracy``; ``fd`` (Fréchet distance to
        the reference, in the classifier's or Inception's features) and ``fd_growth`` (over full compute, on the same
        seeds), with ``_low`` and ``_high``: 95 % bootstrap intervals; ``sfid``, ``lpips``, ``clip``, where they were
        taken; ``sites_reused`` (share), ``events`` (a run),
        ``macs_speedup``; ``ms_per_step`` (four images) and ``speedup`` with quartiles; ``weight_bytes``,
        ``cache_bytes`` (an image), ``added_bytes`` (what drawing four images adds to the process at its peak).
    """
    chosen = methods(run.profile, run.recordings)
    images = samples(run, chosen)
    table = pd.DataFrame([method.columns() for method in chosen])
    if len(images):
        measured = summarize(images).drop(columns=FACTS[1:], errors="ignore")
        if (real := reference_of(run.profile.model, run.recordings)) is not None and "features" in images:
            measured = measured.merge(frechet_intervals(images, real, resamples), on="method", how="left")
        table = table.merge(measured, on="method", how="left")
    seconds, memory = run.recorded("speed"), run.recorded("memory")
    if seconds is not None:
        table = table.merge(speeds(seconds, run.profile), on="method", how="left")
    if memory is not None:
        table = table.merge(memory, on="method", how="left")
    table = table.reindex(columns=[*FACTS, *COLUMNS])
    table.attrs = dict(images.attrs)
    if seconds is not None:  # the hardware on which time was measured, not the one that drew the images
        table.attrs = {"provenance": {**seconds.attrs["provenance"], "images": images.attrs.get("provenance")}}
    table.attrs["distance"] = run.profile.distance
    return table


def beside_plans(run: Run, resamples: int = 200) -> pd.DataFrame | None:
    """Fréchet distances at equal MACs: every plan and what saves as much; ``None`` if no plan is recorded.

    Returns:
        ``budget``, ``kind`` (the family; ``"best other cache"`` of a rival), ``psnr`` (dB to full compute), and
        ``fd``, ``fd_growth`` (over full compute, on the same seeds), with ``_low`` and ``_high`` as in
        ``frechet_intervals``.
    """
    images = samples(run, methods(run.profile, run.recordings))
    real = reference_of(run.profile.model, run.recordings)
    if real is None or "features" not in images or not (images.family == pareto.PLAN).any():
        return None
    budgets = images.budget[images.family == pareto.PLAN].unique()
    images = images[images.budget.isin(budgets) | (images.method == FULL.name)]
    distances = frechet_intervals(images, real, resamples)
    points = summarize(images)[["method", "family", "budget", "psnr"]].merge(distances, on="method")
    points = points[points.method != FULL.name].reset_index(drop=True)
    points["kind"] = points.family.where(~points.family.isin(list(RIVALS)), "best other cache")
    points.attrs = images.attrs
    return points


COLUMNS = [
    "images",
    *("psnr", "ssim", "class_accuracy", "fd", "fd_low", "fd_high", "fd_growth", "fd_growth_low", "fd_growth_high"),
    *("sfid", "lpips", "clip"),
    *("sites_reused", "events", "macs_speedup", "ms_per_step", "speedup", "speedup_low", "speedup_high"),
    *("weight_bytes", "cache_bytes", "added_bytes"),
]


def frechet_intervals(images: pd.DataFrame, real: Reference, resamples: int = 200) -> pd.DataFrame:
    """Fréchet distance to a reference by method, and its growth over full compute, with 95 % intervals.

    Images are drawn with replacement, the same ones for all methods. A set with doublets is farther away than one
    without, so the interval is the bootstrap's pivotal one, ``2θ − q``, in which that bias cancels. The distance
    depends on the number of images, so methods with fewer than the others are left out.

    Args:
        images: rows with ``method``, ``image`` and ``features``; ``"full compute"`` among the methods.
        real: the reference.
        resamples: of the bootstrap; of more than 256 features 50 resamples at most.

    Returns:
        ``method``, ``fd`` and ``fd_growth``, each with ``_low`` and ``_high``; ``sfid`` where images and reference have
        spatial features.
    """
    most = images.groupby("method").size().max()
    images = images.groupby("method").filter(lambda group: len(group) == most)
    wide = images.pivot(index="image", columns="method", values="features")
    features = {method: torch.tensor(np.stack(wide[method])).double() for method in images.method.unique()}
    if len(real.features.mean) > 256:  # a distance of Inception's features takes seconds
        resamples = min(resamples, 50)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(wide), (resamples, len(wide)), generator=generator)
    values = {method: metrics.frechet_distance(x, real.features) for method, x in features.items()}
    trials = {
        method: np.array([metrics.frechet_distance(x[rows], real.features) for rows in chosen])
        for method, x in tqdm(features.items(), desc="bootstrap", leave=False)
    }
    rows = []
    for method, value in values.items():
        growth = value - values[FULL.name]
        high, low = 2 * value - np.quantile(trials[method], [0.025, 0.975])
        growth_trials = trials[method] - trials[FULL.name]
        growth_high, growth_low = 2 * growth - np.quantile(growth_trials, [0.025, 0.975])
        rows.append((method, value, low, high, growth, growth_low, growth_high))
    columns = ["method", "fd", "fd_low", "fd_high", "fd_growth", "fd_growth_low", "fd_growth_high"]
    table = pd.DataFrame(rows, columns=columns)
    if real.spatial is not None and "spatial" in images:
        by = images.groupby("method").spatial
        places = by.apply(lambda x: metrics.frechet_distance(torch.tensor(np.stack(list(x))), real.spatial))
        table["sfid"] = table.method.map(places)
    return table


def check_recorded(run: Run) -> pd.DataFrame:
    """``check_again`` with the recorded methods that decide nothing by measured signals: baselines, and one of W8A8."""
    fixed = [m for m in methods(run.profile, run.recordings) if m.family in ("fewer steps", "static reuse", "W8A8")]
    half = run.profile.num_inference_steps // 2
    fixed = [m for m in fixed if m.w8a8 != "plain" and m.num_inference_steps in (None, half)]
    images = samples(run, fixed)
    recorded = [method for method in fixed if method.name in set(images.method)]
    return check_again(recorded, images, run.profile, RESULT_SEED, 4)


# --- recording -------------------------------------------------------------------------------------------------------


def record_samples(recording: Recording) -> None:
    """Every method's images, a table a method: ``recorded_samples``."""
    for method in _needed(recording):
        recorded_samples(recording, method)


def recorded_samples(recording: Recording, method: Method) -> pd.DataFrame:
    """A method's images, recorded where they aren't yet: the columns of ``compare``."""
    # Another dtype changes next to nothing, and FP16 is slow on a CPU: no Fréchet distance of its own.
    number = recording.sizes.samples if method.dtype is None else recording.sizes.part
    return recording.compared(f"samples-{slug(method.name)}", method, RESULT_SEED, number)


def record_speed(recording: Recording) -> pd.DataFrame:
    """Seconds of every method, four images a batch, taken in turn: ``compare.times``."""
    measure = functools.partial(times, _needed(recording), recording.profile, RESULT_SEED)
    return recording.table("speed", {"all": measure}, RESULT_SEED)


def record_memory(recording: Recording) -> pd.DataFrame:
    """``weight_bytes``, and ``added_bytes`` that drawing four images adds at its peak; a process for every method."""

    def measure() -> pd.DataFrame:
        calls = [(recording.profile, method) for method in _needed(recording)]
        cuda = recording.profile.device == "cuda"
        processes = multiprocessing.get_context("spawn" if cuda else "forkserver")  # CUDA doesn't outlive a fork
        if cuda:
            torch.cuda.empty_cache()
        else:
            processes.set_forkserver_preload([__name__])  # imported once, for all of them
        with ProcessPoolExecutor(1, processes, max_tasks_per_child=1) as pool:
            return pd.DataFrame(tqdm(pool.map(_memory, calls), total=len(calls), desc="memory"))

    return recording.table("memory", {"all": measure}, RESULT_SEED)


def _needed(recording: Recording) -> list[Method]:
    """All methods, and first the policies that some of them need."""
    for target in BOTH:
        policy.recorded_policy(recording, target)
    return methods(recording.profile, recording.folder)


def _memory(call: tuple[Profile, Method]) -> dict[str, object]:
    profile, method = call
    torch.set_num_threads(1)
    transformer = method.pipeline(profile).transformer
    gc.collect()
    metrics.reset_peak_memory(profile.device)
    loaded = metrics.peak_memory_bytes(profile.device)
    method.draw(dataclasses.replace(profile, batch_size=4), RESULT_SEED, num_samples=4)
    peak = metrics.peak_memory_bytes(profile.device)
    return {"method": method.name, "weight_bytes": w8a8.weight_bytes(transformer), "added_bytes": peak - loaded}
