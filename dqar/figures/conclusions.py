"""Figures of notebook 09: future work and conclusions (slides 16, 17)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import save_table
from dqar.measure.results import Run


def slide16_future_work(run: Run, directions: pd.DataFrame) -> Figure:
    """Each direction of slide 16 with what is measured of it already."""
    table = directions.rename(columns=str.capitalize)
    title = "Slide 16: what of the future work is measured already"
    return save_table(run, "slide16_future_work", title, table, [28, 32, 64], directions)


def slide17_conclusions(run: Run, verdicts: pd.DataFrame) -> Figure:
    """Each claim of slide 17 with its verdict and the reason."""
    table = verdicts.rename(columns=str.capitalize)
    return save_table(run, "slide17_conclusions", "Slide 17: what holds", table, [36, 20, 68], verdicts)
