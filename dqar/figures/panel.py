"""Notebook 02's panel: turn the gate's settings, and see what it decides, saves and does to the images."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import ipywidgets as widgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dqar.config import DQARConfig
from dqar.figures.controller import REASONS
from dqar.figures.notebook import is_watched
from dqar.figures.style import GREY, headline
from dqar.measure.results import Run
from dqar.scheduler import ScheduleKind
from dqar.studies.gate import Trial, try_gate

SNRS = (0, 0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 5, 10, 20, 50, 100, 300, 1000, math.inf)
"""Ends of an SNR window that the panel offers."""
LAYOUT = widgets.Layout(width="34em")


def explore(run: Run, config: DQARConfig, images: int = 2) -> widgets.Widget | Figure:
    """The panel, beginning with ``config``; where nobody can turn a knob, as under papermill, the map of ``config``."""
    if not is_watched():
        return decision_map(try_gate(run, config, images))

    def draw(**values: Any) -> None:
        display(decision_map(try_gate(run, configured(config, **values), images)))

    return widgets.interactive(draw, {"manual": True, "manual_name": "Draw"}, **controls(config))


def configured(config: DQARConfig, *, threshold: float, window: tuple[float, float], **fields: Any) -> DQARConfig:
    """``config`` with what the knobs say; ``fields`` have the names of ``DQARConfig``."""
    return dataclasses.replace(config, entropy_threshold=threshold, snr_range=window, **fields)


def controls(config: DQARConfig) -> dict[str, widgets.Widget]:
    """The knobs, by the argument of ``configured`` that each sets, and standing as in ``config``."""
    low, high = config.snr_range or (0, math.inf)
    ends = min(SNRS, key=lambda snr: abs(snr - low)), min(SNRS, key=lambda snr: abs(snr - high))
    style = {"description_width": "12em"}

    def knob(kind: Any, description: str, **options: Any) -> widgets.Widget:
        return kind(description=description, style=style, layout=LAYOUT, **options)

    threshold = 10.0 if config.entropy_threshold is None else config.entropy_threshold
    return {
        "threshold": knob(widgets.FloatSlider, "entropy below (nats)", value=threshold, min=0, max=6, step=0.05),
        "window": knob(widgets.SelectionRangeSlider, "SNR window", options=[(f"{x:g}", x) for x in SNRS], value=ends),
        "max_reuse_streak": knob(widgets.IntSlider, "reuses in a row", value=config.max_reuse_streak, min=1, max=10),
        "schedule": knob(widgets.Dropdown, "schedule", options=get_args(ScheduleKind), value=config.schedule),
        "quantize_bits": knob(widgets.Dropdown, "bits", options=(16, 8, 4, 2), value=config.quantize_bits),
    }


def decision_map(trial: Trial) -> Figure:
    """What was decided at every step and layer, with its reason, and what it saved and did to the images."""
    table = trial.decisions[(trial.decisions.branch == "cond") & (trial.decisions.run == trial.decisions.run.min())]
    reasons = {**REASONS, "streak": ("streak limit reached", REASONS["streak"][1])}
    present = [reason for reason in reasons if (table.reason == reason).any()]
    present += [reason for reason in table.reason.unique() if reason not in reasons]
    looks = [reasons.get(reason, (reason, GREY)) for reason in present]
    figure, axes = plt.subplots(figsize=(12.8, 6))
    grid = table.pivot(index="layer", columns="step", values="reason").map(present.index)
    colors = ListedColormap([color for _, color in looks])
    axes.pcolormesh(grid.columns, grid.index, grid.values, cmap=colors, vmin=-0.5, vmax=len(looks) - 0.5)
    axes.grid(False)
    axes.set(xlabel="denoising step", ylabel="layer")
    handles = [plt.Rectangle((0, 0), 1, 1, fc=color, ec=GREY) for _, color in looks]
    axes.legend(handles, [label for label, _ in looks], loc="upper left", bbox_to_anchor=(1.01, 1))
    headline(figure, summary(trial))
    plt.close(figure)  # it is returned, and would be shown twice
    return figure


def summary(trial: Trial) -> str:
    """One sentence: sites reused, MACs and PSNR (dB)."""
    saved = 1 - 1 / trial.macs_speedup
    macs = f"{saved:.0%} fewer MACs" if saved >= 0 else f"{-saved:.0%} more MACs, as looking costs some"
    images = "identical images" if math.isinf(trial.psnr) else f"images at {trial.psnr:.1f} dB to full compute's"
    return f"{trial.share:.0%} of the sites reused, {macs}, {images} (n = {trial.images})"
