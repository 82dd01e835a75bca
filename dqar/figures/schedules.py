"""Figures of notebook 03: schedules (slide 8)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, COMPUTE, GREY, REUSE, headline, save
from dqar.measure.results import Run


def slide08_layer_step_maps(run: Run, maps: pd.DataFrame) -> Figure:
    """What each schedule did, as traced, at every step and layer."""
    families = list(dict.fromkeys(maps.family))
    figure, axes = plt.subplots(2, 3, sharex=True, sharey=True)
    for ax, family in zip(axes.flat, families, strict=True):
        grid = (maps[maps.family == family].pivot(index="layer", columns="step", values="decision") == "reuse").astype(
            int
        )
        ax.pcolormesh(grid.columns, grid.index, grid.values, cmap=ListedColormap([COMPUTE, REUSE]), vmin=0, vmax=1)
        ax.set_title(f"{family}: {grid.values.mean():.0%} reused", size=17)
        ax.grid(False)
    for ax in axes[1]:
        ax.set_xlabel("denoising step")
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    headline(figure, "Six schedules, six different runs (orange: reused, at most three steps in a row)")
    return save(run, "slide08_layer_step_maps", figure, maps)


def slide08_quality_against_macs(run: Run, schedules: pd.DataFrame) -> Figure:
    """PSNR against MACs saved: schedules and reuse targets, and the plainest rival, fewer steps."""
    figure, axes = plt.subplots()
    table = schedules.assign(kind=schedules.target.fillna("fewer steps"))
    for kind, color, marker in (("kv", BLUE, "o"), ("output", ACCENT, "D"), ("fewer steps", GREY, "X")):
        part = table[table.kind == kind]
        axes.scatter(part.macs_speedup, part.psnr, color=color, marker=marker, s=170, zorder=3,
                     label=kind if kind == "fewer steps" else f"reuse of {kind}")  # fmt: skip
        offset = (10, -5) if kind == "kv" else (10, 6)  # the points of kv are near each other
        for row in part.itertuples():
            text = row.method if kind == "fewer steps" else row.family
            place = (row.macs_speedup, row.psnr)
            axes.annotate(text, place, offset, textcoords="offset points", size=13, color=color)
    axes.set(xlabel="MACs: full compute / this (×, further right is cheaper)", ylabel="PSNR to full compute (dB)")
    axes.margins(0.12)
    axes.legend()
    rival = table[table.kind == "fewer steps"].sort_values("macs_speedup")
    ours = table[table.kind != "fewer steps"]
    ahead = int((ours.psnr > np.interp(ours.macs_speedup, rival.macs_speedup, rival.psnr)).sum())
    axes.set_title(f"{ahead} of {len(ours)} attention-only schedules beat fewer steps at equal MACs")
    return save(run, "slide08_quality_against_macs", figure, schedules)
