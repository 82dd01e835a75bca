"""Figures of notebook 01: entropy and SNR over the steps (slides 4, 14)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, COMPUTE, GREY, SLIDE14, headline, plain_ticks, save, save_table
from dqar.measure.results import Run


def slide04(run: Run, sites: pd.DataFrame) -> Figure:
    """Slide 4's two formulas, and below each what it gives at every step of a real run."""
    figure, (left, right) = plt.subplots(1, 2)
    tokens, layers = int(sites.tokens.iloc[0]), sites.layer.nunique()
    left.set_title(r"$H_t=-\frac{1}{H}\sum_h\,\sum_{ij}A^{(h)}_t(i,j)\,\ln\left(A^{(h)}_t(i,j)+\varepsilon\right)$",
                   size=20, pad=50)  # fmt: skip
    left.text(0.5, 1.015, "plotted: mean over the queries i, not their sum", transform=left.transAxes, ha="center",
              va="bottom", color=GREY)  # fmt: skip
    by_step = sites.groupby("step").entropy.quantile([0.0, 0.25, 0.5, 0.75, 1.0]).unstack()
    left.plot(by_step.index, by_step[0.5], color=BLUE, lw=4, label=f"median of {layers} layers")
    left.fill_between(by_step.index, by_step[0.25], by_step[0.75], color=BLUE, alpha=0.3, lw=0, label="middle half")
    left.fill_between(by_step.index, by_step[0.0], by_step[1.0], color=BLUE, alpha=0.12, lw=0, label="all layers")
    left.axhline(np.log(tokens), color=GREY, ls="--", lw=3)
    left.text(sites.step.max(), np.log(tokens) + 0.04, f"most possible: ln {tokens} = {np.log(tokens):.2f}", ha="right",
              va="bottom", color=GREY)  # fmt: skip
    left.set(xlabel="denoising step", ylabel="entropy, mean over queries (nats)", ylim=(0, 1.12 * np.log(tokens)))
    left.legend(loc="lower left")
    right.set_title(r"$\mathrm{SNR}_t=\|x_0\|_2^2\,/\,\left(\|x_t-x_0\|_2^2+\varepsilon\right)$", size=20, pad=50)
    snr = sites.groupby("step")[["snr", "snr_schedule"]].mean()
    right.plot(snr.index, snr.snr, color=BLUE, lw=4, label=r"with the predicted $x_0$")
    right.plot(snr.index, snr.snr_schedule, color=GREY, lw=3, ls="--", label="by the noise schedule alone")
    right.axhspan(0.5, 50, color=COMPUTE, alpha=0.6, lw=0, label="the deck's window, 0.5 to 50")
    right.set(xlabel="denoising step", ylabel="SNR", yscale="log")
    plain_ticks(right.yaxis)
    right.legend(loc="upper left")
    low, high = sites.entropy.min(), sites.entropy.max()
    headline(
        figure,
        f"While the SNR grows {times(snr.snr)}, the entropy of attention stays between {low:.1f} and {high:.1f} nats",
    )
    return save(run, "slide04", figure, sites, f"{_images(run)}; each site: their mean")


def slide14_curves(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> Figure:
    """Entropy, SNR and reuse events by step, beside slide 14's."""
    figure, axes = plt.subplots(3, 1, sharex=True)
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    for ax, column, label in ((axes[0], "entropy", "entropy (nats)"), (axes[1], "snr", "SNR")):
        ax.plot(by_step.index, by_step[column], color=BLUE, lw=4, label="measured")
        ax.plot(SLIDE14.step, SLIDE14[column], color=GREY, lw=2, ls=":", marker="o", ms=6, label="claimed")
        ax.set_ylabel(label)
    axes[1].set_yscale("log")
    plain_ticks(axes[1].yaxis)
    axes[0].legend(loc="lower left")
    calibrated, deck = (events(gated, family) for family in ("calibrated", "deck's gate"))
    axes[2].bar(calibrated.index, calibrated, color=ACCENT, label="measured, calibrated gate")
    axes[2].plot(SLIDE14.step, SLIDE14.events, color=GREY, lw=2, ls=":", marker="o", ms=6)
    axes[2].set(xlabel="denoising step", ylabel="reuse events")
    axes[2].legend(loc="upper left")
    figure.align_ylabels(axes)
    change, falls = by_step.entropy.iloc[-1] - by_step.entropy.iloc[0], (by_step.entropy.diff().dropna() <= 0).mean()
    headline(
        figure,
        f"Entropy does not fall steadily: it changes by {change:+.2f} nats in all and falls in {falls:.0%} of the "
        f"steps; the deck's gate reuses {deck.sum():.0f} times",
    )
    return save(run, "slide14_curves", figure, sites, f"{_images(run)}; {events_in_words(gated, run)}")


def slide14(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> Figure:
    """Slide 14's table with the measured columns beside the claimed ones."""
    last = run.profile.num_inference_steps - 1
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    calibrated, deck = (events(gated, family) for family in ("calibrated", "deck's gate"))
    rows = {}
    for claim in SLIDE14.itertuples():
        step = min(claim.step, last)
        rows[step] = (
            f"{claim.step}" if claim.step <= last else f"{claim.step} ({last})",
            *(f"{claim.entropy}", f"{by_step.entropy[step]:.2f}"),
            *(f"{claim.snr}", f"{by_step.snr[step]:.3g}"),
            *(f"{claim.events}", f"{deck[step]:.0f}", f"{calibrated[step]:.0f}"),
        )
    columns = ["Step", "Entropy claimed", "Entropy measured", "SNR claimed", "SNR measured", "Events claimed",
               "Events, deck's gate", "Events, calibrated"]  # fmt: skip
    table = pd.DataFrame(list(rows.values()), columns=columns)
    peak = int(calibrated[list(rows)].idxmax())
    title = (
        f"Entropy goes from {by_step.entropy.iloc[0]:.2f} nats to {by_step.entropy.iloc[-1]:.2f}; the deck's gate "
        f"never opens, and of these steps a calibrated one reuses most at step {peak}"
        if deck.sum() == 0
        else f"The deck's gate reuses {deck.sum():.0f} times, of these steps a calibrated one most at step {peak}"
    )
    note = f"{_images(run)}; {events_in_words(gated, run)}"
    return save_table(run, "slide14", title, table, [9, 12, 12, 11, 12, 12, 12, 14], sites, note)


def slide04_heads(run: Run, heads: pd.DataFrame) -> Figure:
    """Entropy of every head, layer by layer, over the run."""
    table = heads[heads.branch == "cond"]
    count = table["head"].nunique()
    figure, axes = plt.subplots(1, count, sharey=True, squeeze=False)
    low, high = table.entropy.min(), table.entropy.max()
    for head, ax in enumerate(axes[0]):
        grid = table[table["head"] == head].pivot(index="layer", columns="step", values="entropy")
        mesh = ax.pcolormesh(
            grid.columns, grid.index, grid.values, vmin=low, vmax=high, cmap="cividis", rasterized=True
        )
        ax.set(title=f"head {head}", xlabel="denoising step")
        ax.grid(False)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(mesh, ax=axes, label="entropy (nats)")
    between = table.groupby(["layer", "head"]).entropy.mean().std()
    within = table.groupby(["layer", "head"]).entropy.std().mean()
    more = "more" if between > within else "less"
    headline(
        figure,
        f"Heads differ {more} from each other ({between:.2f} nats) than one head does from step to step ({within:.2f})",
    )
    return save(run, "slide04_heads", figure, heads, "n = 4 images; spreads are standard deviations")


def events(gated: pd.DataFrame, family: str) -> pd.Series:
    """Reuses of K and V by step, of a trace of ``gate.gated_sites``; the images of one batch are decided alike."""
    rows = gated[(gated.family == family) & (gated.target == "kv")]
    return (rows.decision == "reuse").groupby(rows.step).sum() / rows.run.nunique()


def events_in_words(gated: pd.DataFrame, run: Run) -> str:
    """How many sites the calibrated gate reuses in the trace of ``gate.gated_sites``, and why slide 12 has another
    number: a batch shares its decisions, so that other images are other decisions."""
    counted = gated[(gated.family == "calibrated") & (gated.target == "kv")]
    share = (counted.decision == "reuse").mean()
    sites = len(counted) // counted.run.nunique()
    return (
        f"events: {share * sites:,.0f} of {sites:,} sites ({share:.0%}) in 4 images (slide 12: in "
        f"{run.profile.images:,})"
    )


def times(series: pd.Series) -> str:
    """How many-fold the last value is of the first, in words."""
    return f"{series.iloc[-1] / series.iloc[0]:,.0f}-fold"


def _images(run: Run) -> str:
    return f"n = {run.profile.num_samples} images"
