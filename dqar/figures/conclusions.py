"""Figures of notebook 09: future work and conclusions (slides 16, 17)."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import (
    ACCENT,
    BLUE,
    COMPUTE,
    DARK,
    GREY,
    headline,
    recorded,
    save,
    save_plain_table,
    save_table,
)
from dqar.measure.results import Run
from dqar.studies import batches as batch_study
from dqar.studies import search as search_study
from dqar.studies.compare import FULL

SETTINGS = {
    "target": "what is reused",
    "schedule": "the schedule",
    "interval": "the interval of computed steps",
    "order": "the order of the forecast",
    "bits_shallow": "the bits of shallow layers",
    "bits_middle": "the bits of middle layers",
    "bits_deep": "the bits of deep layers",
    "entropy": "the entropy threshold",
    "snr": "the SNR threshold",
    "last": "how many last steps are computed",
}
"""Of ``studies.search.SPACE``, in words."""
MARKS = {"holds": "✓", "does not hold": "✗", "not certain": "=", "not testable here": "not testable here"}


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
    note = "bits: dB to an unquantized cache, ✓ from 40; =: the interval includes 0; ( ): 95%"
    return save_table(run, "slide16", title, table, [17, 16, 12, 60], directions, note)


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
    note = "first reason of each; all of them: appendix"
    return save_table(run, "slide17", title, table, [28, 12, 60], verdicts, note)


def slide17_reasons(run: Run, verdicts: pd.DataFrame) -> pd.DataFrame:
    """Each claim of slide 17 with all its reasons, as files; no picture."""
    title = f"Of {len(verdicts)} claims, {_counts(verdicts)}: all reasons"
    return save_plain_table(run, "slide17_reasons", title, verdicts.rename(columns=str.capitalize), verdicts)


@recorded("batches of several sizes")
def slide16_batches(run: Run, batches: pd.DataFrame) -> Figure:
    """Slide 16's batches: speed and quality against images at once, one gate deciding for all of them.

    Args:
        batches: of ``studies.batches.record_batches``.
    """
    points = batch_study.points(batches)
    looks: dict[str, dict[str, Any]] = {
        batch_study.GATE: {"color": ACCENT, "marker": "o", "mfc": "white", "mew": 2.5},
        batch_study.PLAN: {"color": ACCENT, "marker": "D"},
        FULL.name: {"color": GREY, "marker": "o"},
    }
    names = {batch_study.GATE: "a gate, one for all", batch_study.PLAN: f"a plan, {batch_study.BUDGET}× fewer MACs"}
    figure, (left, right) = plt.subplots(1, 2)
    for method, line in points.groupby("method", sort=False):
        look = {**looks[method], "lw": 3, "ms": 10, "label": names.get(method, method)}
        spread = [line.speed - line.speed_low, line.speed_high - line.speed]
        left.errorbar(line.together, line.speed, yerr=spread, capsize=6, **look)
        if line["median"].notna().any():
            right.plot(line.together, line["median"], **{**look, "label": "_"})
            right.plot(line.together, line.worst, **{**look, "ls": ":", "label": "_"})
    gate = points[points.method == batch_study.GATE].set_index("together")
    right.axhline(gate["median"][1], color=DARK, lw=1.5, ls="--", label="a gate of each image's own")
    right.plot([], [], color=GREY, lw=3, label="the median image")
    right.plot([], [], color=GREY, lw=3, ls=":", label="the worst image")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="images at once")
        axes.set_xticks(sorted(set(points.together)), sorted(set(points.together)), minor=False)
        axes.minorticks_off()
    left.set_ylabel("speed over full compute, one at once")
    right.set_ylabel("PSNR to full compute (dB)")
    left.legend()
    right.legend()
    most, full = points.together.max(), points[points.method == FULL.name].set_index("together").speed
    change, low, high = batch_study.sharing(batches)
    headline(
        figure,
        f"{most} images at once are drawn {full[most]:.2f} times as fast as one by one; one gate for all of them "
        f"instead of one each changes their median PSNR by {change:+.1f} dB ({low:+.1f} to {high:+.1f})",
    )
    number, repeats = int(batches.image.nunique()), int(batches.repeat.nunique())
    clock = "CPU time" if run.profile.device == "cpu" else "time"
    return save(
        run, "slide16_batches", figure, points, f"n = {number} images, 95% interval; {clock}: quartiles of {repeats}"
    )


@recorded("a search over settings of reuse and extrapolation")
def slide16_search(run: Run, trials: pd.DataFrame, front: pd.DataFrame, importance: pd.DataFrame) -> Figure:
    """Slide 16's search: every trial, the front on images that it wasn't searched on, and what matters.

    Args:
        trials, front, importance: the three tables of ``studies.search.record_search``.
    """
    tried, (again, by_hand) = search_study.points(trials), search_study.remeasured(trials, front)
    before = tried.set_index("trial").psnr_5th.reindex(again.trial)
    figure, (left, right) = plt.subplots(1, 2, width_ratios=[3, 2])
    left.scatter(tried.macs_speedup, tried.psnr_5th, s=60, color=COMPUTE, edgecolor=GREY, label="settings tried")
    left.plot(again.macs_speedup, before, color=GREY, lw=2, ls="--", marker="o", ms=9, label="the best, as searched")
    left.plot(again.macs_speedup, again.psnr_5th, color=ACCENT, lw=3, marker="o", ms=10, label="the best, other images")
    left.plot(by_hand.macs_speedup, by_hand.psnr_5th, "s", color=BLUE, ms=11, label="by hand, other images")
    left.set(xlabel="MACs of full compute / of this", ylabel="PSNR at the 5th percentile (dB)")
    left.legend()
    shares = importance[importance.objective == "dB"].set_index("setting").importance.rename(SETTINGS).nlargest(8)[::-1]
    right.barh(shares.index, shares, color=GREY)
    right.xaxis.set_major_formatter("{x:.0%}")
    right.set(xlabel=f"share of variance, {len(shares)} largest")
    change = (again.psnr_5th.to_numpy() - before.to_numpy()).mean()
    headline(
        figure,
        f"On other images, the best settings' 5th percentile changes by {change:+.1f} dB (mean of {len(again)}); "
        f"what matters most to quality is {shares.index[-1]} ({shares.iloc[-1]:.0%} of its variance)",
    )
    note = (
        f"n = {trials.image.nunique()} images of each of {len(tried)} settings, {front.image.nunique()} others of the "
        f"{len(again)} best; no interval (slide 16 has that of the lead over the settings by hand)"
    )
    return save(run, "slide16_search", figure, trials, note)


def _counts(table: pd.DataFrame) -> str:
    counts = table.verdict.value_counts()
    holding, failing, level = (counts.get(verdict, 0) for verdict in ("holds", "does not hold", "not certain"))
    parts = [
        f"{holding} {'holds' if holding == 1 else 'hold'} here",
        f"{failing} {'does' if failing == 1 else 'do'} not",
    ]
    if level:
        parts.append(f"{level} {'is' if level == 1 else 'are'} not certain")
    return f"{', '.join(parts)}, {counts.get('not testable here', 0)} can't be tested here"
