"""Figure of notebook 09's panel on cross-layer sharing (slide 16)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, headline, recorded, save
from dqar.measure.results import Run
from dqar.studies import layers


@recorded("attention maps shared between neighbouring layers")
def slide16_layers(run: Run, table: pd.DataFrame, overlaps: pd.DataFrame) -> Figure:
    """How alike layers' maps are, early and late, and what sharing them saves and costs, alone and on step reuse.

    Args:
        table: recorded by ``studies.layers.record_layers``.
        overlaps: of ``studies.layers.similarity``.
    """
    points, images = layers.summary(table), table.image.nunique()
    figure, panels = plt.subplots(1, 3, width_ratios=(3, 3, 4))
    steps = overlaps.step.max() + 1
    for axes, step in zip(panels, (steps // 5, steps - 1 - steps // 5), strict=False):
        grid = overlaps[overlaps.step == step].pivot(index="layer", columns="other", values="overlap")
        picture = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
        axes.grid(visible=False)
        below = np.diagonal(grid.to_numpy(), -1).mean()
        axes.set(xlabel=f"whose map is taken\n(layer below: {below:.2f})", title=f"Step {step}")
    panels[0].set(ylabel="layer")
    figure.colorbar(picture, ax=panels[:2], pad=0.02, label="overlap of two layers' maps, 1: equal")
    looks = {
        layers.ALONE: ("sharing alone", BLUE, "o"),
        layers.STEPWISE: ("sharing, and reuse\nover steps", ACCENT, "s"),
    }
    for family, (label, color, marker) in looks.items():
        line = points[points.family == family].sort_values("macs_speedup")
        panels[2].plot(line.macs_speedup, line["median"], marker=marker, ms=10, color=color, label=label)
        panels[2].vlines(line.macs_speedup, line["5th percentile"], line["median"], color=color, lw=1.2)
    panels[2].set(xlabel="times fewer MACs", ylabel="PSNR to full compute (dB)")
    panels[2].legend(loc="upper right")
    headline(figure, layers.in_words(table))
    note = f"markers: median, lines: to the 5th percentile, n = {images}; maps of {layers.IMAGES} images"
    return save(run, "slide16_layers", figure, table, note)
