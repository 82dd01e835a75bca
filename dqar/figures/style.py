"""Colours, saving and headlines that all figures share."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dqar.measure.results import Run, atomic_path, provenance

ACCENT = "#D55E00"
"""DQAR, in every figure."""


REUSE, COMPUTE = ACCENT, "#DCE3EA"


BLUE, GREEN, GREY = "#0072B2", "#009E73", "#555555"


BRANCH_COLORS = {"cond": BLUE, "uncond": GREEN}


# Slide 14's table: step, entropy (nats), SNR, reuse events.
SLIDE14 = pd.DataFrame(
    [
        (0, 4.8, 0.1, 0),
        (5, 4.2, 0.3, 0),
        (10, 3.5, 0.8, 0),
        (15, 2.8, 2.1, 5),
        (20, 2.1, 5.4, 18),
        (25, 1.7, 12.8, 42),
        (30, 1.4, 28.3, 55),
        (35, 1.2, 52.7, 48),
        (40, 1.0, 89.4, 35),
        (45, 0.9, 142.1, 22),
        (50, 0.8, 201.5, 12),
    ],
    columns=["step", "entropy", "snr", "events"],
)


def use_style() -> None:
    """16:9, readable from the back of a room."""
    sns.set_theme(context="talk", style="whitegrid", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.figsize": (12.8, 7.2),
            "figure.constrained_layout.use": True,
            "axes.titleweight": "bold",
            "axes.titlesize": "medium",
            "svg.fonttype": "none",
            "font.family": "DejaVu Sans",
        }
    )


def save(run: Run, name: str, figure: Figure, table: pd.DataFrame, transparent: bool = False) -> Figure:
    """Writes ``name`` as PNG (2560 × 1440), SVG and JSON sidecar to the run's figures; closes and returns the figure.

    The footer and the sidecar say what was measured; ``table.attrs`` brings the provenance of a measured table.
    """
    source = table.attrs.get("provenance") or provenance(run.profile, run.seed)
    text = f"profile {source['profile']['name']} · {source['device']}, {source['dtype']} · seed {source['seed']}"
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965))
    figure.text(0.995, 0.008, f"{text} · {source['commit']} · {source['date'][:10]}", ha="right", size=10, color=GREY)
    for suffix, options in ((".png", {"dpi": 200}), (".svg", {"metadata": {"Date": None}})):
        with atomic_path(run.figures / f"{name}{suffix}") as path:
            figure.savefig(path, transparent=transparent, **options)
    title = figure.get_suptitle().replace("\n", " ") or (figure.axes[0].get_title() if figure.axes else "")
    with atomic_path(run.figures / f"{name}.json") as path:
        path.write_text(json.dumps({"figure": name, "title": title, **source}, indent=2) + "\n")
    plt.close(figure)
    return figure


def save_table(
    run: Run, name: str, title: str, table: pd.DataFrame, widths: list[int], source: pd.DataFrame | None = None
) -> Figure:
    """Writes a table as Markdown and LaTeX and, drawn, as a figure; ``widths`` in characters a column."""
    for suffix, text in ((".md", table.to_markdown(index=False)), (".tex", _latex(table))):
        with atomic_path(run.figures / f"{name}{suffix}") as path:
            path.write_text(text + "\n")
    cells = [
        ["\n".join(textwrap.wrap(str(x), width)) for x, width in zip(row, widths, strict=True)]
        for row in [table.columns, *table.values]
    ]
    heights = [0.45 + max(cell.count("\n") + 1 for cell in row) for row in cells]
    total, size = sum(heights), min(18.0, 400 / sum(heights), 1560 / sum(widths))
    figure, axes = plt.subplots()
    axes.set(xlim=(0, sum(widths)), ylim=(total, 0))
    axes.axis("off")
    axes.set_title(title, loc="left")
    lefts = np.cumsum([0, *widths[:-1]])
    top = 0.0
    for number, (row, height) in enumerate(zip(cells, heights, strict=True)):
        if number % 2 == 0 and number:
            axes.axhspan(top, top + height, color="#F3F5F7", zorder=0)
        for left, cell in zip(lefts, row, strict=True):
            weight = "bold" if number == 0 else "normal"
            axes.text(left + 0.5, top + height / 2, cell, va="center", size=size, weight=weight, linespacing=1.15)
        axes.axhline(top + height, color="#B8C0C8", lw=2 if number == 0 else 0.6)
        top += height
    return save(run, name, figure, source if source is not None else table)


def headline(figure: Figure, text: str) -> None:
    """The finding, as the figure's title."""
    figure.suptitle("\n".join(textwrap.wrap(text, 80)), weight="bold", size=19.5)


def times(series: pd.Series) -> str:
    return f"{series.iloc[-1] / series.iloc[0]:,.0f}-fold"


def _latex(table: pd.DataFrame) -> str:
    return table.style.hide(axis="index").to_latex(hrules=True).replace("%", r"\%").replace("_", r"\_")


use_style()


def recorded(what: str) -> Callable:
    """For figures of recorded tables: where one is ``None``, the figure says that ``what`` is not measured yet."""

    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def figure_or_gap(run: Run, *tables: pd.DataFrame | None) -> Figure:
            if all(table is not None for table in tables):
                return draw(run, *tables)
            figure, axes = plt.subplots()
            axes.axis("off")
            command = f"dqar record --profile {run.profile.name}"
            text = f"not measured yet for profile {run.profile.name}:\n{what}\n\n{command}"
            axes.text(0.5, 0.5, text, ha="center", va="center", size=26, color=GREY)
            return save(run, draw.__name__, figure, pd.DataFrame())

        return figure_or_gap

    return decorate
