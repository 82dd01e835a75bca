"""Figures of notebook 09: future work and conclusions (slides 16, 17)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import save_plain_table, save_table
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
            "The deck": directions.deck,
            "Holds here?": directions.verdict.map(MARKS),
            "Measured": directions.measured,
        }
    )
    title = f"Of {len(table)} hopes for future work, {_counts(directions)}"
    note = "PSNR to an unquantized cache (✓ from 40 dB) and to full compute"
    return save_table(run, "slide16", title, table, [18, 18, 12, 47], directions, note)


def slide17(run: Run, verdicts: pd.DataFrame) -> Figure:
    """Each claim of slide 17 with ✓, ✗ or "not testable here", and the first reason.

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
    return save_table(run, "slide17", title, table, [30, 12, 53], verdicts)


def slide17_reasons(run: Run, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Each claim of slide 17 with all its reasons, as files; no picture."""
    title = f"Of {len(verdicts)} claims, {_counts(verdicts)}: all reasons"
    return save_plain_table(run, "slide17_reasons", title, verdicts.rename(columns=str.capitalize), verdicts)


def _counts(table: pd.DataFrame) -> str:
    counts = table.verdict.value_counts()
    holding = counts.get("holds", 0)
    return (
        f"{holding} {'holds' if holding == 1 else 'hold'} here, {counts.get('does not hold', 0)} do not, "
        f"{counts.get('not testable here', 0)} can't be tested here"
    )
