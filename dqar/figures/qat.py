"""Figure of notebook 09's panel on quantization-aware training (slide 16)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, DARK, GREEN, GREY, headline, recorded, save
from dqar.measure.quality import reference_of
from dqar.measure.results import Run
from dqar.studies import qat

LOOKS = {
    qat.SHIPPED: ("as shipped", GREY),
    qat.UNQUANTIZED: ("tuned, nothing rounded", GREEN),
    **{f"tuned, INT{bits}": (f"tuned through INT{bits}", color) for bits, color in ((4, BLUE), (2, "#CC79A7"))},
}
"""Of models: words and colour."""


@recorded("fine-tuning with the cache's quantizer in the loop, and a plan's weights fitted through it")
def slide16_qat(run: Run, table: pd.DataFrame, history: pd.DataFrame) -> Figure:
    """Quality of every model with every cache, and what knowing of the quantizer gains in a tuning and in a plan's fit.

    Args:
        table: recorded by ``studies.qat.record_qat``.
        history: recorded by ``studies.plans.record_history``.
    """
    real = reference_of(run.profile.model, run.recordings)
    assert real is not None  # only the digits model is tuned
    points = qat.summary(table, real)
    figure, (shipped, gained) = plt.subplots(1, 2)
    _draw_models(shipped, points, "median")
    shipped.set_title("PSNR to the shipped model (dB)")
    shipped.set_xlabel("cache (none: full compute)")
    _draw_gains(gained, qat.gains(table, history))
    low, high = shipped.get_ylim()
    shipped.set_ylim(low - 0.4 * (high - low), high)  # room for the legend
    shipped.legend(loc="lower left", handletextpad=0.0)
    headline(figure, qat.in_words(table, history))
    tuned, number = table.iloc[0], table.image.nunique()
    note = f"medians, 95% intervals, ×: 5th percentile, n = {number}; "
    note += f"tuned: {tuned.tuning_steps} steps of {tuned.tuning_batch} images"
    return save(run, "slide16_qat", figure, table, note)


def _draw_models(axes: Axes, points: pd.DataFrame, column: str) -> None:
    """A marker with its interval for each model, at each cache; beside a median a cross at the 5th percentile."""
    for number, (model, (label, color)) in enumerate(LOOKS.items()):
        drawn = points[points.family == model].dropna(subset=[column])
        at = [list(qat.CACHES).index(None if np.isnan(bits) else int(bits)) + 0.16 * (number - 1.5)
              for bits in drawn.bits]  # fmt: skip
        axes.plot(at, drawn[column], "o", ms=9, color=color, label=label)
        axes.vlines(at, drawn[f"{column}_low"], drawn[f"{column}_high"], color=color, lw=2)
        if (tail := column.replace("median", "5th percentile")) != column:
            axes.plot(at, drawn[tail], "x", ms=9, mew=2, color=color)
    axes.set_xticks(range(len(qat.CACHES)), ["none", *list(qat.CACHES.values())[1:]])
    axes.set_xlim(-0.5, len(qat.CACHES) - 0.5)
    axes.grid(visible=False, axis="x")


def _draw_gains(axes: Axes, gains: pd.DataFrame) -> None:
    """Bars with intervals: what all of the tuning gains, and the quantizer in tuning or fit."""
    names, colors = [], []
    for row in gains.itertuples():
        fitted = row.what == qat.FITTED
        less = (
            f"unrounded, n = {row.images}" if fitted else LOOKS[row.over if row.over in LOOKS else qat.UNQUANTIZED][0]
        )
        names.append(
            f"{'plan fitted' if fitted else 'tuned'} through INT{row.bits}\nminus {less.removeprefix('tuned, ')}"
        )
        colors.append(ACCENT if fitted else LOOKS[f"tuned, INT{row.bits}"][1])
    axes.barh(names, gains.gain, color=colors)
    axes.hlines(names, gains.low, gains.high, color=DARK, lw=2)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=1)
    axes.grid(visible=False, axis="y")
    axes.set_title("Gain in median PSNR (dB)")
