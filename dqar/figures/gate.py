"""Figures of notebook 02: the gate (slide 5)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dqar import stats
from dqar.figures.style import ACCENT, BLUE, GREY, headline, save
from dqar.measure.calibrate import propose_gate
from dqar.measure.results import Run
from dqar.studies import trace


def slide05_gate(run: Run, sites: pd.DataFrame) -> Figure:
    """The entropy-SNR plane: where the gates open, and how wrong a reuse would be there."""
    known = sites.dropna(subset=["change"])
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
    points = left.scatter(known.snr, known.entropy, c=known.change.clip(upper=1), s=14, cmap="cividis_r", lw=0)
    figure.colorbar(points, ax=left, label="relative error of a reuse", pad=0.01)
    gate = propose_gate(sites)
    low, high = gate.snr_range
    inside = known[known.snr.between(low, high) & (known.entropy < gate.entropy_threshold)]
    left.set(xscale="log", xlabel="SNR (predicted $x_0$)", ylabel="attention entropy (nats)")
    bottom = min(1.8, known.entropy.min() - 0.1)
    left.set_ylim(bottom, np.log(sites.tokens.iloc[0]) + 0.1)
    for threshold, label, style in (
        (2.0, "deck's gate: H < 2.0", ":"),
        (gate.entropy_threshold, "calibrated gate", "-"),
    ):
        left.plot(
            [low, low, high, high], [bottom, threshold, threshold, bottom], ls=style, color=ACCENT, lw=3, label=label
        )
    left.legend(loc="lower right", fontsize=14)
    deck_opens = int((known.snr.between(low, high) & (known.entropy < 2.0)).sum())
    left.set_title(f"The deck's gate opens for {deck_opens:,} of {len(known):,} sites")
    relations = trace.relations(sites)
    names = ["entropy", "entropy,\nsame step", "SNR", "SNR,\nsame layer"]
    values = list(relations.values())
    right.barh(names, values, color=[BLUE, BLUE, GREY, GREY])
    for y, value in enumerate(values):
        right.annotate(f"{value:+.2f}", (value, y), (6 if value >= 0 else -6, 0), textcoords="offset points",
                       va="center", ha="left" if value >= 0 else "right", size=15)  # fmt: skip
    right.invert_yaxis()
    right.axvline(0, color=GREY)
    right.set(xlim=(-1.1, 1.1), xlabel="Spearman's ρ")
    right.set_title("Does it predict the error?")
    headline(
        figure,
        f"Inside the calibrated gate a reuse errs by {inside.change.median():.0%} (median), "
        f"over all sites by {known.change.median():.0%}",
    )
    return save(run, "slide05_gate", figure, sites)


def slide05_tau(run: Run, sites: pd.DataFrame) -> Figure:
    """τ(p) of slide 5, the deck's example, and the entropies that this model really has."""
    figure, axes = plt.subplots()
    words = np.arange(1, 129)
    axes.plot(words, [stats.tau(2.0, int(p)) for p in words], color=ACCENT, lw=4, label=r"$\tau(p)=2.0\,\sqrt{p/64}$")
    axes.scatter([8], [2.0], s=160, color=GREY, marker="X", zorder=3, label="the deck's example: τ(8) ≈ 2.0")
    axes.scatter([8, 64], [stats.tau(2.0, 8), 2.0], s=120, color=ACCENT, zorder=3)
    axes.annotate(f"τ(8) = {stats.tau(2.0, 8):.2f}", (8, stats.tau(2.0, 8)), (14, -8), textcoords="offset points")
    axes.annotate("τ(64) = 2.00", (64, 2.0), (8, -24), textcoords="offset points")
    axes.axhspan(
        sites.entropy.min(), sites.entropy.max(), color=BLUE, alpha=0.2, lw=0, label="measured entropies, all sites"
    )
    axes.set(xlabel="prompt length p (words)", ylabel="entropy threshold (nats)", ylim=(0, None))
    axes.legend(loc="lower right")
    reached = next((int(p) for p in range(1, 100_000) if stats.tau(2.0, int(p)) > sites.entropy.min()), None)
    axes.set_title(f"On this model τ(p) first reaches a measured entropy at p = {reached} words")
    return save(run, "slide05_tau", figure, sites)


def samples_grid(run: Run, images: dict[str, torch.Tensor]) -> Figure:
    """The same seeds under each method, and below each its difference from full compute, five times amplified."""
    methods = list(images)
    reference = images[methods[0]]
    rows = [(m, images[m], False) for m in methods]
    rows = [
        row
        for m, x, _ in rows
        for row in ([(m, x, False)] + ([("5 × difference", x, True)] if m != methods[0] else []))
    ]
    figure, axes = plt.subplots(len(rows), len(reference), squeeze=False)
    for (name, x, is_difference), line in zip(rows, axes, strict=True):
        for image, original, ax in zip(x, reference, line, strict=True):
            picture = (0.5 + 5 * (image - original)).clamp(0, 1) if is_difference else image
            options = {"cmap": "coolwarm" if is_difference else "gray_r", "vmin": 0, "vmax": 1}
            ax.imshow(picture.permute(1, 2, 0), **options)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", size=13)
    headline(figure, "Same seeds: full compute and reuse")
    return save(run, "samples", figure, pd.DataFrame())
