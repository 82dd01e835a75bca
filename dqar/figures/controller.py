"""Figures of notebook 05: controller and architecture (slides 9, 10)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dqar.figures.style import ACCENT, BLUE, COMPUTE, GREEN, GREY, REUSE, headline, save
from dqar.measure.results import Run
from dqar.studies import architecture

PSEUDOCODE = """\
controller = DQARController(num_layers=28, config)
for step in range(total_steps):
    controller.begin_step(step, total_steps, snr)
    for layer_id in range(num_layers):
        decision = controller.should_reuse(
            layer_id, branch)
        if decision.use_cache:
            K = decision.entry.k.dequantize()
            V = decision.entry.v.dequantize()
            controller.reuse(decision.entry)
            Q = fresh query
        else:
            Q, K, V = fresh projections
            controller.commit(layer_id, branch,
                keys=K, values=V, entropy=H)
        output = softmax(Q @ K.T / sqrt(d)) @ V"""


def slide09_controller(run: Run, gated: pd.DataFrame) -> Figure:
    """The controller's calls, and what it answered at every site of a real run."""
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1.08, 1))
    left.axis("off")
    left.add_patch(FancyBboxPatch((0, 0), 1, 1, boxstyle="round,pad=0.01", fc="#F3F5F7", ec="none"))
    left.text(0.02, 0.97, PSEUDOCODE, family="DejaVu Sans Mono", size=12.6, va="top", linespacing=1.5)
    left.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    left.set_title("What is called")
    calibrated = (gated.family == "calibrated") & (gated.target == "kv")
    table = gated[calibrated & (gated.branch == "cond") & (gated.run == gated.run.min())]
    reasons = ["reuse", "entropy", "snr", "streak", "no cache", "schedule"]
    colors = [REUSE, BLUE, COMPUTE, GREEN, "#222222", "#FFFFFF"]
    grid = table.pivot(index="layer", columns="step", values="reason").map(reasons.index)
    right.pcolormesh(
        grid.columns, grid.index, grid.values, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(reasons) - 0.5
    )
    present = [i for i in range(len(reasons)) if (grid.values == i).any()]
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colors[i], ec=GREY) for i in present]
    names = {"reuse": "reused", "streak": "limit of 3 in a row", "snr": "SNR outside", "entropy": "entropy too high"}
    right.legend(handles, [names.get(reasons[i], reasons[i]) for i in present], fontsize=13, ncols=2,
                 loc="upper center", bbox_to_anchor=(0.5, -0.16))  # fmt: skip
    right.grid(False)
    right.set(xlabel="denoising step", ylabel="layer")
    right.set_title("What it answered")
    share = (table.decision == "reuse").mean()
    headline(figure, f"Every decision has a reason: {share:.0%} of the sites of this run were reused")
    return save(run, "slide09_controller", figure, gated)


def slide10_architecture(run: Run) -> Figure:
    """The package as it is: modules by level, arrows from the code's own imports."""
    inner, outer = architecture.core_graph(), architecture.folder_graph()
    figure, panels = plt.subplots(1, 2, width_ratios=(3, 4))
    for axes, own, color, size in zip(panels, (inner, outer), (ACCENT, BLUE), (14, 14), strict=True):
        place = _places(architecture.levels(own))
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(-0.8, max(y for _, y in place.values()) + 0.5))
        for name, (x, y) in place.items():
            axes.text(x, y, name, ha="center", va="center", size=size, weight="bold", zorder=2, color="white",
                      bbox={"boxstyle": "round,pad=0.4", "fc": color, "ec": "white"})  # fmt: skip
        for name, imports in own.items():
            # An import that another one implies is left out, as in every layered picture.
            implied = {deeper for other in imports for deeper in _below(own, other)}
            for other in imports - implied:
                arrow = {"arrowstyle": "->", "color": GREY, "lw": 2, "shrinkA": 20, "shrinkB": 20}
                axes.annotate("", place[other], place[name], zorder=1, arrowprops=arrow)
    panels[0].set_title(f"The core: {len(inner)} modules", size=18)
    panels[1].set_title("The folders around it", size=18)
    headline(figure, "The core imports nothing that measures, draws or trains, and no import goes in a circle")
    return save(run, "slide10_architecture", figure, pd.DataFrame())


def _places(levels: dict[str, int]) -> dict[str, tuple[float, float]]:
    """x from 0 to 1, and the level as y; every second one of a crowded row, and of lone ones, makes room."""
    place = {}
    for j in range(max(levels.values()) + 1):
        row = sorted(name for name in levels if levels[name] == j)
        for i, name in enumerate(row):
            aside = 0.17 * (-1) ** j if len(row) == 1 else 0
            place[name] = ((i + 0.5) / len(row) + aside, j - 0.5 * (i % 2 and len(row) > 3))
    return place


def _below(graph: dict[str, set[str]], name: str) -> set[str]:
    return graph[name].union(*(_below(graph, other) for other in graph[name]))
