"""Slides 12, 13 and 17: what each method costs and does, from the recorded images, with intervals and verdicts."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from dqar.measure import metrics
from dqar.measure.results import Run, slug
from dqar.studies import policy
from dqar.studies.methods import EXTRAPOLATIONS, Method, methods, names_at
from dqar.studies.record import RESULT_SEED, draw


def all_methods(run: Run) -> dict[str, Method]:
    """The methods that were or would be recorded; only the baselines, if no policy has been."""
    labels = run.recorded("labels-output")
    gate = None if labels is None else policy.rule_gate(labels)
    return methods(run.profile, gate)


def samples(run: Run) -> pd.DataFrame:
    """All recorded images of all methods; empty if there are none."""
    tables = [run.recorded(f"samples-{slug(name)}") for name in all_methods(run)]
    tables = [table for table in tables if table is not None]
    found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["method"])
    found.attrs = tables[0].attrs if tables else {}
    return found


def summary(run: Run, resamples: int = 200) -> pd.DataFrame:
    """One row per method; what hasn't been recorded is NaN.

    Returns:
        ``images``, ``psnr`` (dB), ``ssim``, ``class_accuracy``; ``fd`` (FD-digits to held-out digits) and
        ``fd_growth`` (over full compute, on the same seeds), with ``_low`` and ``_high``: 95 % bootstrap intervals;
        ``sites_reused`` (share), ``events`` (a run), ``macs_speedup``; ``ms_per_step`` (four images) and ``speedup``
        with quartiles; ``weight_bytes``, ``cache_bytes`` (an image), ``added_bytes`` (what drawing four
        images adds to the process at its peak).
    """
    images = samples(run)
    table = pd.DataFrame({"method": list(all_methods(run))})
    if len(images):
        by_method = images.groupby("method")
        first = by_method[["sites_reused", "events", "macs_speedup", "cache_bytes"]].mean()
        quality = pd.DataFrame(
            {
                "images": by_method.size(),
                "psnr": by_method.mse.mean().map(lambda mse: -10 * math.log10(mse) if mse else math.inf),
                "ssim": by_method.ssim.mean(),
                "class_accuracy": by_method.apply(lambda g: (g.predicted == g.label).mean(), include_groups=False),
            }
        )
        distances = frechet_intervals(images, resamples)
        table = table.merge(quality.join(first).join(distances.set_index("method")), on="method", how="left")
    speed, memory = run.recorded("speed"), run.recorded("memory")
    if speed is not None:
        ms = speed.groupby("method").seconds.median() * 1000 / run.profile.num_inference_steps
        ratios = metrics.speedups(speed, "full compute").assign(ms_per_step=ms).reset_index()
        table = table.merge(ratios, on="method", how="left")
    if memory is not None:
        table = table.merge(memory, on="method", how="left")
    table = table.reindex(columns=["method", *COLUMNS])
    table.attrs = images.attrs
    if speed is not None:  # the hardware on which time was measured, not the one that drew the images
        table.attrs = {"provenance": {**speed.attrs["provenance"], "images": images.attrs.get("provenance")}}
    return table


def beside_plans(run: Run, resamples: int = 200) -> pd.DataFrame | None:
    """FD-digits at equal MACs: every plan and its rivals (``methods.names_at``); ``None`` if no plan is recorded.

    Returns:
        ``budget``, ``kind`` (of ``names_at``), ``psnr`` (dB to full compute), and ``fd``, ``fd_growth``
        (over full compute, on the same seeds), with ``_low`` and ``_high`` as in ``frechet_intervals``.
    """
    names = {b: names_at(run.profile, b) for b in EXTRAPOLATIONS}
    kinds = {name: (budget, kind) for budget, named in names.items() for kind, name in named.items()}
    images = samples(run)
    images = images[images.method.isin([*kinds, "full compute"])]
    plans = [name for name in images.method.unique() if kinds.get(name, ("", ""))[1] == "DQAR plan"]
    if not plans:
        return None
    table = frechet_intervals(images, resamples).query("method != 'full compute'")
    psnr = -10 * np.log10(images.groupby("method").mse.mean().clip(lower=1e-12))
    table = table.assign(psnr=table.method.map(psnr), budget=[kinds[name][0] for name in table.method])
    table = table.assign(kind=[kinds[name][1] for name in table.method])
    table.attrs = run.recorded(f"samples-{slug(plans[0])}").attrs
    return table


COLUMNS = [
    "images",
    *("psnr", "ssim", "class_accuracy", "fd", "fd_low", "fd_high", "fd_growth", "fd_growth_low", "fd_growth_high"),
    *("sites_reused", "events", "macs_speedup", "ms_per_step", "speedup", "speedup_low", "speedup_high"),
    *("weight_bytes", "cache_bytes", "added_bytes"),
]


def frechet_intervals(images: pd.DataFrame, resamples: int = 200, seed: int = 0) -> pd.DataFrame:
    """Fréchet distance to the held-out digits by method, and its growth over full compute, with 95 % intervals.

    Images are drawn with replacement, the same ones for all methods. A set with doublets is farther away than one
    without, so the interval is the bootstrap's pivotal one, ``2θ − q``, in which that bias cancels. The distance
    depends on the number of images, so methods with fewer than the others are left out.

    Args:
        images: rows with ``method``, ``image`` and ``features``; ``"full compute"`` among the methods.
    """
    real = policy.held_out_features()
    most = images.groupby("method").size().max()
    images = images.groupby("method").filter(lambda own: len(own) == most)
    wide = images.pivot(index="image", columns="method", values="features")
    features = {method: torch.tensor(np.stack(wide[method])).double() for method in images.method.unique()}
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(wide), (resamples, len(wide)), generator=generator)
    values = {method: metrics.frechet_distance(x, real) for method, x in features.items()}
    trials = {
        method: np.array([metrics.frechet_distance(x[rows], real) for rows in chosen])
        for method, x in tqdm(features.items(), desc="bootstrap", leave=False)
    }
    rows = []
    for method, value in values.items():
        growth = value - values["full compute"]
        high, low = 2 * value - np.quantile(trials[method], [0.025, 0.975])
        growth_trials = trials[method] - trials["full compute"]
        growth_high, growth_low = 2 * growth - np.quantile(growth_trials, [0.025, 0.975])
        rows.append((method, value, low, high, growth, growth_low, growth_high))
    columns = ["method", "fd", "fd_low", "fd_high", "fd_growth", "fd_growth_low", "fd_growth_high"]
    return pd.DataFrame(rows, columns=columns)


def check_recorded(run: Run, number: int = 4, tolerance: float = 3.0) -> pd.DataFrame:
    """Draws a few of the recorded images anew and warns where they disagree: ``method``, ``recorded``, ``live`` (dB).

    Only of methods that decide nothing by measured signals: a gate decides for a batch as a whole, so that fewer images
    at once are other decisions. Within ``tolerance`` dB (or both beyond 60 dB) counts as agreement.
    """
    rows = []
    profile = dataclasses.replace(run.profile, batch_size=number)
    reference = Method().draw(profile, RESULT_SEED, num_samples=number, description="reference").images
    found = all_methods(run)
    for name in (f"{run.profile.num_inference_steps // 2} steps", "W8A8 + CSB", "static, kv", "static, output"):
        recorded = run.recorded(f"samples-{slug(name)}")
        if recorded is None:
            continue
        live = draw(name, found[name], profile, RESULT_SEED, 0, reference).mse.mean()
        before = recorded[recorded.image < number].mse.mean()
        was, now = (-10 * math.log10(max(mse, 1e-12)) for mse in (before, live))
        rows.append({"method": name, "recorded": was, "live": now})
        if abs(was - now) > tolerance and min(was, now) < 60:
            warnings.warn(f"{name}: recorded {was:.1f} dB, now {now:.1f} dB: run `make results` anew", stacklevel=2)
    return pd.DataFrame(rows, columns=["method", "recorded", "live"])
