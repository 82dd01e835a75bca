"""Figures of notebook 09: future work and conclusions (slides 16, 17)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import save_table, write_table
from dqar.measure.results import Run

MARKS = {"holds": "✓", "does not hold": "✗", "not testable here": "not testable here"}


def slide16(run: Run, directions: pd.DataFrame) -> Figure:
    """Each direction of slide 16 with what is measured of it already.

    Args:
        directions: of ``studies.conclusions.future_work``.
    """
    table = pd.DataFrame(
        {
            "Direction": directions.direction,
            "The deck hopes for": directions.deck,
            "Holds here?": directions.verdict.map(MARKS),
            "Measured": directions.measured.str.split("; ").str[:2].str.join("; "),
        }
    )
    title = f"Of {len(table)} hopes for future work, {_counts(directions)}"
    figure = save_table(run, "slide16", title, table, [19, 21, 12, 43], directions)
    write_table(run, "slide16", directions.rename(columns=str.capitalize))
    return figure


def slide17(run: Run, verdicts: pd.DataFrame) -> Figure:
    """Each claim of slide 17 with ✓, ✗ or "not testable here", and the first reason; the table has all reasons.

    Args:
        verdicts: of ``studies.conclusions.verdicts``.
    """
    table = pd.DataFrame(
        {
            "Claim": verdicts.claim,
            "Holds here?": verdicts.verdict.map(MARKS),
            "Why": verdicts.reason.str.split(". ", regex=False).str[0].str.rstrip("."),
        }
    )
    title = f"Of {len(table)} claims, {_counts(verdicts)}"
    figure = save_table(run, "slide17", title, table, [30, 12, 53], verdicts)
    write_table(run, "slide17", verdicts.rename(columns=str.capitalize))
    return figure


def _counts(table: pd.DataFrame) -> str:
    counts = table.verdict.value_counts()
    holding = counts.get("holds", 0)
    return (
        f"{holding} {'holds' if holding == 1 else 'hold'} here, {counts.get('does not hold', 0)} do not, "
        f"{counts.get('not testable here', 0)} can't be tested here"
    )
