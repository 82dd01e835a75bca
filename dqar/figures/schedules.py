"""Figures of notebook 03: schedules (slide 8)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, COMPUTE, GREEN, GREY, REUSE, headline, save
from dqar.measure.results import Run
from dqar.scheduler import eligible_layers
from dqar.studies.schedules import settling

NAMES = {
    "depth_aware": "the deck's, shallow first",
    "linear": "linear",
    "linear_reverse": "deep first",
    "all": "all layers",
    "static 2": "every 2nd step",
    "static 3": "2 of 3 steps",
}


def slide08(run: Run, sites: pd.DataFrame) -> Figure:
    """How much each layer's attention changes from step to step: what "shallow layers stabilise first" turns out to be.

    Args:
        sites: of ``trace.sites``.
    """
    shown = sites.dropna(subset=["change"])
    layers, steps = shown.layer.max() + 1, run.profile.num_inference_steps
    ends = [max(eligible_layers(step, steps, layers, "depth_aware")) for step in range(steps)]
    shallow, middle = ends[0], ends[steps // 2]
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1, 1.1))
    grid = shown.groupby(["layer", "step"]).change.mean().unstack()
    mesh = left.pcolormesh(grid.columns, grid.index, grid.values, cmap="cividis_r", vmin=0, vmax=0.4, rasterized=True)
    left.step(range(steps), np.array(ends) + 0.5, where="mid", color=ACCENT, lw=4)
    left.grid(False)
    left.set(xlabel="denoising step (line: the deck reuses below)", ylabel="layer", xlim=(0.5, steps - 0.5))
    left.set_ylim(-0.5, layers - 0.5)
    left.set_title("Relative change since the step before")
    figure.colorbar(mesh, ax=left, extend="max", pad=0.01)
    groups = {
        f"shallow: 0 to {shallow}": (shown.layer <= shallow, BLUE),
        f"middle: {shallow + 1} to {middle}": (shown.layer.between(shallow + 1, middle), GREEN),
        f"deep: {middle + 1} to {layers - 1}": (shown.layer > middle, GREY),
    }
    for name, (inside, color) in groups.items():
        quartiles = shown[inside].groupby("step").change.quantile([0.25, 0.5, 0.75]).unstack()
        right.plot(quartiles.index, quartiles[0.5], color=color, lw=4, label=name)
        right.fill_between(quartiles.index, quartiles[0.25], quartiles[0.75], color=color, alpha=0.2, lw=0)
    for place, name in ((0.15, "early"), (0.85, "late")):
        right.axvspan((place - 0.15) * (steps - 1), (place + 0.15) * (steps - 1), color=COMPUTE, alpha=0.6, zorder=0)
        right.text(place * (steps - 1), 0.395, name, ha="center", va="top", weight="bold")
    right.set(xlabel="denoising step", ylabel="relative change", xlim=(0, steps - 1), ylim=(0, 0.4))
    right.legend(title="layers", loc="upper center", bbox_to_anchor=(0.5, 0.94))
    right.set_title("Median and middle half, by depth")
    headline(figure, settling_in_words(settling(shown, steps)))
    note = f"n = {run.profile.num_samples} images, both branches; early, late: first, last 30% of the steps"
    return save(run, "slide08", figure, sites, note)


def settling_in_words(change: pd.DataFrame) -> str:
    """Whether "shallow layers stabilise first, deep ones last" is true of ``studies.schedules.settling``."""
    early, late = (change[part] for part in ("early", "late"))
    least = [part.shallow < min(part.middle, part.deep) for part in (early, late)]
    verdict = "do stabilise first" if all(least) else "are calmest only late" if least[1] else "do not stabilise first"
    settled = "deep ones do too" if late.deep < early.deep else "deep ones do not"
    return (
        f"Shallow layers {verdict} ({early.shallow:.0%} change a step early, {late.shallow:.0%} late); "
        f"{settled} ({early.deep:.0%}, {late.deep:.0%})"
    )


def slide08_maps(run: Run, maps: pd.DataFrame) -> Figure:
    """What each schedule did, as traced, at every step and layer."""
    families = list(dict.fromkeys(maps.family))
    figure, axes = plt.subplots(2, 3, sharex=True, sharey=True)
    for ax, family in zip(axes.flat, families, strict=True):
        table = maps[maps.family == family].pivot(index="layer", columns="step", values="decision")
        grid = (table == "reuse").astype(int)
        colors = ListedColormap([COMPUTE, REUSE])
        ax.pcolormesh(grid.columns, grid.index, grid.values, cmap=colors, vmin=0, vmax=1, rasterized=True)
        ax.set_title(f"{NAMES[family]}: {grid.values.mean():.0%}", size=17)
        ax.grid(False)
    for ax in axes[1]:
        ax.set_xlabel("denoising step")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    headline(figure, "Six schedules reuse different layers (orange) at different steps, at most three steps in a row")
    return save(run, "slide08_maps", figure, maps, "n = 1 image")


def slide08_quality(run: Run, schedules: pd.DataFrame) -> Figure:
    """PSNR (dB) against MACs saved: schedules and reuse targets, and the plainest rival, fewer steps."""
    figure, axes = plt.subplots()
    table = schedules.assign(kind=schedules.target.fillna("fewer steps"))
    labels = {"kv": "reuse of K and V", "output": "reuse of the attention output", "fewer steps": "fewer steps"}
    for kind, color, marker in (("kv", ACCENT, "o"), ("output", ACCENT, "D"), ("fewer steps", GREY, "X")):
        part = table[table.kind == kind]
        spread = [part.psnr - part.psnr_low, part.psnr_high - part.psnr]
        axes.errorbar(part.macs_speedup, part.psnr, spread, fmt=marker, color=color, ms=13, mew=2.5, capsize=4, lw=1.5,
                      mfc="white" if kind == "kv" else color, label=labels[kind])  # fmt: skip
        for row in part[part.kind != "kv"].itertuples():  # the points of K and V lie too close together for names
            text, place = NAMES.get(row.family, row.method), (row.macs_speedup, row.psnr)
            below = row.family == "depth_aware"  # else over another's bar
            axes.annotate(text, place, (10, -20 if below else 6), textcoords="offset points", color=color)
    axes.set(xlabel="MACs of full compute / of this (further right is cheaper)", ylabel="PSNR to full compute (dB)")
    axes.margins(0.15)
    axes.legend(loc="upper right")
    rival = table[table.kind == "fewer steps"].sort_values("macs_speedup")
    ours = table[table.kind != "fewer steps"]
    ahead = int((ours.psnr > np.interp(ours.macs_speedup, rival.macs_speedup, rival.psnr)).sum())
    headline(
        figure,
        f"{ahead or 'None'} of {len(ours)} schedules of attention reuse beats fewer steps at equal MACs"
        if ahead < 2
        else f"{ahead} of {len(ours)} schedules of attention reuse beat fewer steps at equal MACs",
    )
    note = f"n = {run.profile.num_samples} images; PSNR of the mean squared error; bars: 95%"
    return save(run, "slide08_quality", figure, schedules, note)
