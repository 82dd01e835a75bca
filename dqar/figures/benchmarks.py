"""Figures of notebook 10: what the mechanism costs at the deck's size (slide 12)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, DARK, GREY, headline, save
from dqar.measure.results import Run
from dqar.studies import benchmarks

REUSED, FORECAST = "plan: output, 3 of 4 steps", "plan: model's output forecast, every 2nd step"
SHOWN = {
    # a method of the step benchmark: how it is called
    "applied, closed": "gate closed",
    "entropy, exact": "exact entropy at every step",
    "entropy, every 4th step": "exact entropy, every 4th step",
    "plan: K and V, every 2nd step": "K and V reused, every 2nd step",
    "plan: output, every 2nd step": "output reused, every 2nd step",
    REUSED: "output reused, 3 of 4 steps",
    FORECAST: "model's output forecast, every 2nd step",
}


def slide12_benchmarks(run: Run, tables: dict[str, pd.DataFrame]) -> Figure:
    """Whole denoising steps of DiT-XL/2, a panel a device: time beside full compute, and what the MACs promise.

    Args:
        tables: of ``benchmarks.recorded``.
    """
    figure, panels = plt.subplots(1, max(1, len(tables)), squeeze=False, sharey=True)
    if not tables:
        panels[0, 0].axis("off")
        text = "not measured yet\n\nmake benchmarks"
        panels[0, 0].text(0.5, 0.5, text, ha="center", va="center", size=26, color=GREY)
        return save(run, "slide12_benchmarks", figure, pd.DataFrame())
    for axes, (device, table) in zip(panels[0], tables.items(), strict=True):
        summary = benchmarks.summary(table)
        steps = summary[summary.part == "step"].set_index("method").loc[list(SHOWN)].reset_index()
        names = steps.method.map(SHOWN)
        spread = [steps.cost - steps.cost_low, steps.cost_high - steps.cost]
        colors = [ACCENT if method.startswith("plan") else GREY for method in steps.method]
        axes.barh(names, steps.cost, xerr=spread, color=colors, capsize=5)
        promised = steps.macs_speedup > 1.01
        axes.scatter(1 / steps.macs_speedup[promised], names[promised], marker="|", s=1600, lw=4, color=DARK, zorder=3,
                     label="as the MACs promise")  # fmt: skip
        for y, row in steps.iterrows():
            place = (row.cost_high, y)
            axes.annotate(f"{row.cost:.2f}", place, (10, 0), textcoords="offset points", va="center",
                          bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
        axes.axvline(1, color=GREY, ls="--")
        axes.set(xlabel="time of a step (full compute = 1; median, quartiles)", xlim=(0, 1.3 * steps.cost_high.max()))
        axes.set_title(device)
        axes.grid(axis="y", visible=False)
    panels[0, 0].invert_yaxis()
    panels[0, -1].legend(loc="lower right", markerscale=0.5)
    costs = steps.set_index("method").cost
    headline(
        figure,
        f"At DiT-XL/2's size, reusing attention outputs at 3 of 4 steps takes {costs[REUSED]:.2f} of the time, "
        f"forecasting every 2nd step {costs[FORECAST]:.2f}",
    )
    runs = [int(table[table.part == "step"].groupby("method").size().min()) for table in tables.values()]
    note = f"n = {' and '.join(map(str, runs))} runs of each; random weights: time only"
    return save(run, "slide12_benchmarks", figure, next(iter(tables.values())), note)
