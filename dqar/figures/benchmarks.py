"""Figures of notebook 10: what the mechanism costs at the deck's size (slides 12, 15)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.results import FORECAST
from dqar.figures.style import ACCENT, BLUE, GREY, headline, save
from dqar.measure.results import Run
from dqar.studies import benchmarks


def slide15_overhead(run: Run, overhead: pd.DataFrame) -> Figure:
    """What one attention costs when its entropy is measured too, at DiT-XL/2's shape."""
    figure, axes = plt.subplots()
    table = overhead[overhead.method != "plain"].sort_values("cost")
    spread = [table.cost - table.cost_low, table.cost_high - table.cost]
    axes.barh(
        table.method, table.cost, xerr=spread, color=[ACCENT if m != "maps" else GREY for m in table.method], capsize=6
    )
    axes.axvline(1, color="#222222", lw=2)
    for y, row in enumerate(table.itertuples()):
        error = f", error up to {row.max_error:.1%}" if row.max_error else ", exact"
        axes.annotate(f"{row.cost:.2f}×{error}", (row.cost_high, y), (10, 0), textcoords="offset points", va="center")
    axes.set(
        xlabel="time of one attention with entropy / without (×; median, quartiles)",
        xlim=(0, table.cost_high.max() * 1.5),
    )
    fused = table.set_index("method").cost["fused entropy"]
    headline(figure, f"With exact entropy an attention takes {fused:.2f}× as long (B2 H16 N256 D72), no map kept")
    return save(run, "slide15_overhead", figure, overhead)


def slide12_benchmarks(run: Run, tables: dict[str, pd.DataFrame]) -> Figure:
    """Whole denoising steps of DiT-XL/2, a panel a device: time beside full compute, and what the MACs promise.

    Args:
        tables: ``benchmark.recorded()``.
    """
    figure, axes = plt.subplots(1, max(1, len(tables)), squeeze=False, sharey=True)
    if not tables:
        axes[0, 0].axis("off")
        axes[0, 0].text(0.5, 0.5, "not measured yet\n\nmake benchmarks", ha="center", va="center", size=26, color=GREY)
        return save(run, "slide12_benchmarks", figure, pd.DataFrame())
    findings = []
    for ax, (device, table) in zip(axes[0], tables.items(), strict=True):
        own = benchmarks.summary(table)
        own = own[own.part.isin(["step", "compiled"]) & (own.method != "eager, plain")].reset_index(drop=True)
        plans = (benchmarks.SITES, benchmarks.FORECAST)
        colors = [ACCENT if f in plans else BLUE if f == "plain" else GREY for f in own.family]
        spread = [own.cost - own.cost_low, own.cost_high - own.cost]
        ax.barh(own.method, own.cost, xerr=spread, color=colors, capsize=4, alpha=0.9)
        promised = own.dropna(subset=["realised"])
        ax.scatter(1 / promised.macs_speedup, promised.method, marker="|", s=900, lw=4, color="black", zorder=3)
        for y, row in own.iterrows():
            ax.annotate(
                f"{row.cost:.2f}×", (row.cost_high, y), (8, 0), textcoords="offset points", va="center", size=14
            )
        ax.axvline(1, color=GREY, ls="--")
        ax.set(xlabel="time (plain, eager = 1); |: as the MACs promise", xlim=(0, 1.25 * own.cost_high.max()))
        ax.set_title(device, size=15)
        ax.tick_params(axis="y", labelsize=14)
        ax.grid(axis="y", visible=False)
        by_method = own.set_index("method")
        looking, realised = by_method.cost["entropy, exact"] - 1, by_method.realised
        findings.append(
            f"exact entropy costs {looking:+.0%} of a step; of the MACs saved, output reuse realises "
            f"{realised['plan: output, 3 of 4 steps']:.0%}, a forecast plan "
            f"{realised[FORECAST]:.0%}"
        )
    axes[0, 0].invert_yaxis()
    gap = (
        ""
        if any(t.attrs["provenance"]["profile"]["device"] == "cuda" for t in tables.values())
        else "; no GPU recorded"
    )
    headline(figure, f"DiT-XL/2, random weights: {'; '.join(findings)}{gap}")
    return save(run, "slide12_benchmarks", figure, next(iter(tables.values())))
