"""Figures of notebook 05: controller and architecture (slides 9, 10)."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dqar.figures.style import ACCENT, BLUE, COMPUTE, DARK, GREEN, GREY, REUSE, SMALLEST, headline, save
from dqar.measure.results import Run
from dqar.studies import architecture

PSEUDOCODE = """\
controller = DQARController(28, config)
for step in range(steps):
  controller.begin_step(step, steps, snr)
  for layer in range(28):
    decision = controller.should_reuse(
      layer, branch)
    if decision.use_cache:
      K = decision.entry.k.dequantize()
      V = decision.entry.v.dequantize()
      controller.reuse(decision.entry)
      Q = fresh query
    else:
      Q, K, V = fresh projections
      controller.commit(layer, branch,
        keys=K, values=V, entropy=H)
    output = softmax(Q @ K.T / √d) @ V"""
REASONS = {
    # as traced: how it is called and coloured
    "reuse": ("reused", REUSE),
    "entropy": ("entropy too high", BLUE),
    "snr": ("SNR outside", COMPUTE),
    "streak": ("limit of 3 in a row", GREEN),
    "no cache": ("nothing kept yet", DARK),
    "schedule": ("not scheduled", "#FFFFFF"),
}


def slide09(run: Run, gated: pd.DataFrame) -> Figure:
    """Slide 9's loop, and what the controller answered at every site of a real run."""
    figure, panels = plt.subplot_mosaic(
        [["code", "map"], ["code", "reasons"]], width_ratios=(1.12, 1), height_ratios=(1, 0.22)
    )
    left, right, legend = panels["code"], panels["map"], panels["reasons"]
    left.axis("off")
    legend.axis("off")
    left.add_patch(FancyBboxPatch((0, 0), 1, 1, boxstyle="round,pad=0.01", fc="#F3F5F7", ec="none"))
    left.text(0.02, 0.98, PSEUDOCODE, family="DejaVu Sans Mono", size=SMALLEST, va="top", linespacing=1.45)
    left.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    left.set_title("What is called")
    calibrated = (gated.family == "calibrated") & (gated.target == "kv")
    table = gated[calibrated & (gated.branch == "cond") & (gated.run == gated.run.min())]
    names = list(REASONS)
    grid = table.pivot(index="layer", columns="step", values="reason").map(names.index)
    colors = ListedColormap([color for _, color in REASONS.values()])
    right.pcolormesh(grid.columns, grid.index, grid.values, cmap=colors, vmin=-0.5, vmax=len(names) - 0.5,
                     rasterized=True)  # fmt: skip
    present = [REASONS[name] for i, name in enumerate(names) if (grid.values == i).any()]
    handles = [plt.Rectangle((0, 0), 1, 1, fc=color, ec=GREY) for _, color in present]
    legend.legend(handles, [label for label, _ in present], ncols=2, loc="center")
    right.grid(False)
    right.set(xlabel="denoising step", ylabel="layer")
    right.set_title("What it answered")
    share = (table.decision == "reuse").mean()
    both = (gated[calibrated].decision == "reuse").mean()
    note = f"calibrated gate, conditional branch, 4 images: n = {len(table):,} sites; both branches: {both:.0%}"
    headline(figure, f"The controller gives a reason for every decision; here it reused {share:.0%} of the sites")
    return save(run, "slide09", figure, gated, note)


BOXES = {
    # slide 10's boxes: where each stands, what it does, and its files
    "Controller": ((0.5, 0.84), "asks the others,\nreuses, keeps", ("controller.py", "gate.py")),
    "Policy": ((0.125, 0.47), "predicts whether\na reuse is harmless", ("policy.py",)),
    "Scheduler": ((0.375, 0.47), "says which layers\nmay reuse", ("scheduler.py",)),
    "Stats": ((0.625, 0.47), "measures entropy,\nSNR and norms", ("stats.py",)),
    "Cache": ((0.875, 0.47), "stores K and V\nor the output", ("cache.py",)),
    "Quantizer": ((0.875, 0.13), "INT8, INT4, INT2;\nbalanced channels", ("quantizer.py",)),
}


def slide10(run: Run) -> Figure:
    """Slide 10's tree of six boxes, each with its responsibility and the length of its files."""
    figure, axes = plt.subplots()
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    lines = {}
    for name, ((x, y), purpose, files) in BOXES.items():
        lines[name] = sum(len((architecture.PACKAGE / file).read_text().splitlines()) for file in files)
        color = "#FBE9DD" if name == "Controller" else "white"
        axes.add_patch(FancyBboxPatch((x - 0.108, y - 0.11), 0.216, 0.22, boxstyle="round,pad=0.008", zorder=2, lw=3,
                                      fc=color, ec=ACCENT))  # fmt: skip
        axes.text(x, y + 0.075, name, ha="center", va="center", size=20, weight="bold", zorder=3)
        axes.text(x, y - 0.01, purpose, ha="center", va="center", zorder=3)
        axes.text(x, y - 0.09, f"{lines[name]} lines", ha="center", va="center", color=GREY, zorder=3)
    trunk: dict[str, Any] = {"color": GREY, "lw": 3, "zorder": 0}
    axes.plot([0.5, 0.5], [0.73, 0.65], **trunk)
    axes.plot([0.125, 0.875], [0.65, 0.65], **trunk)
    arrow = {"arrowstyle": "-|>", "color": GREY, "lw": 3, "shrinkA": 0}
    for name in ("Policy", "Scheduler", "Stats", "Cache"):
        x = BOXES[name][0][0]
        axes.annotate("", (x, 0.585), (x, 0.65), arrowprops=arrow)
    axes.annotate("", (0.875, 0.245), (0.875, 0.35), arrowprops=arrow)
    headline(
        figure, "The code has slide 10's six parts: a controller, four modules that it asks, and the cache's quantizer"
    )
    boxes = [f"{name}: {' '.join(purpose.split())}, {lines[name]} lines" for name, (_, purpose, _) in BOXES.items()]
    return save(run, "slide10", figure, pd.DataFrame(), described=". ".join(boxes))


def slide10_imports(run: Run) -> Figure:
    """The core as it is: which module imports which, from the code's own imports."""
    graph = architecture.core_graph()
    return _draw_imports(run, "slide10_imports", graph, f"The core's {len(graph)} modules import each other in one "
                         "direction only, and nothing that measures, draws or trains")  # fmt: skip


def slide10_folders(run: Run) -> Figure:
    """The package's folders: which imports from which, from the code's own imports."""
    return _draw_imports(run, "slide10_folders", architecture.folder_graph(),
                         "No folder imports from one that is built on it")  # fmt: skip


def _draw_imports(run: Run, name: str, graph: dict[str, set[str]], title: str) -> Figure:
    """A row and a column for each part, the lowest level first: imports are dots, all of them below the diagonal."""
    levels = architecture.levels(graph)
    order = sorted(graph, key=lambda part: (levels[part], part))
    place = {part: number for number, part in enumerate(order)}
    dots = [(place[imported], place[part]) for part in order for imported in graph[part]]
    figure, axes = plt.subplots()
    axes.fill_between([-0.5, len(order) - 0.5], [-0.5, len(order) - 0.5], -0.5, color=COMPUTE, lw=0, zorder=0)
    size = min(30, 250 / len(order))
    axes.plot(*zip(*dots, strict=True), "o", color=BLUE, ms=size)
    numbers = range(len(order))
    axes.set(xlim=(-0.5, len(order) - 0.5), ylim=(len(order) - 0.5, -0.5), xticks=numbers, yticks=numbers)
    axes.set_yticklabels([f"{part}  {number + 1}" for part, number in place.items()])
    axes.set_xticklabels([f"{number + 1}" for number in numbers])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="is imported", ylabel="this module imports" if len(order) > 10 else "this folder imports from")
    axes.text(0.98, 0.95, "no dot here: nothing imports\nwhat is built on it", transform=axes.transAxes, ha="right",
              va="top", color=GREY)  # fmt: skip
    headline(figure, title)
    return save(run, name, figure, pd.DataFrame())
