"""Figures of notebook 01: entropy and SNR over the steps (slides 4, 14)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, BRANCH_COLORS, GREY, SLIDE14, headline, save, save_table, times
from dqar.measure.results import Run


def slide04_entropy_snr(run: Run, sites: pd.DataFrame) -> Figure:
    """Entropy of all layers and SNR against the denoising step."""
    figure, (left, right) = plt.subplots(1, 2)
    tokens = int(sites.tokens.iloc[0])
    for branch, color in BRANCH_COLORS.items():
        by_step = sites[sites.branch == branch].groupby("step").entropy
        quantiles = by_step.quantile([0.0, 0.25, 0.5, 0.75, 1.0]).unstack()
        left.plot(quantiles.index, quantiles[0.5], color=color, lw=3, label=f"{branch}, median of layers")
        left.fill_between(quantiles.index, quantiles[0.25], quantiles[0.75], color=color, alpha=0.3, lw=0)
        left.fill_between(quantiles.index, quantiles[0.0], quantiles[1.0], color=color, alpha=0.12, lw=0)
    left.axhline(np.log(tokens), color=GREY, ls="--")
    left.plot([], [], color=GREY, ls="--", label=f"uniform attention, ln {tokens} = {np.log(tokens):.2f}")
    left.set(xlabel="denoising step", ylabel="attention entropy (nats)")
    left.set_title(r"$H_t=-\frac{1}{HN}\sum_h\sum_{ij}A\,\ln A$")
    left.legend(loc="lower left", fontsize=14, title="bands: quartiles, range", title_fontsize=13)
    by_step = sites.groupby("step")[["snr", "snr_schedule"]].mean()
    right.plot(by_step.index, by_step.snr, color=ACCENT, lw=3, label=r"predicted $x_0$")
    right.plot(
        by_step.index, by_step.snr_schedule, color=GREY, lw=3, ls="--", label=r"schedule, $\bar\alpha/(1-\bar\alpha)$"
    )
    right.axhspan(0.5, 50, color=ACCENT, alpha=0.1, lw=0, label="the deck's window")
    right.set(xlabel="denoising step", ylabel="SNR", yscale="log")
    right.set_title(r"$\mathrm{SNR}_t=\|x_0\|^2/\|x_t-x_0\|^2$")
    right.legend(loc="upper left", fontsize=14)
    low, high = sites.entropy.min(), sites.entropy.max()
    headline(
        figure, f"Entropy stays between {low:.2f} and {high:.2f} nats; SNR grows {times(by_step.snr)} over the run"
    )
    return save(run, "slide04_entropy_snr", figure, sites)


def slide14_temporal_evolution(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> Figure:
    """Entropy, SNR and reuse events by step, beside slide 14's."""
    figure, axes = plt.subplots(3, 1, sharex=True)
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    for ax, column, label in ((axes[0], "entropy", "entropy (nats)"), (axes[1], "snr", "SNR")):
        ax.plot(by_step.index, by_step[column], color=BLUE, lw=4, label="measured")
        ax.plot(SLIDE14.step, SLIDE14[column], color=GREY, lw=2, ls=":", marker="o", ms=6, label="the deck's claim")
        ax.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[1].axhspan(0.5, 50, color=ACCENT, alpha=0.12, lw=0)
    axes[0].legend(loc="lower left", fontsize=13)
    per_image = (
        gated[gated.target == "kv"]
        .groupby(["family", "step"])
        .apply(lambda g: (g.decision == "reuse").sum() / g.run.nunique(), include_groups=False)
    )
    calibrated, deck = per_image["calibrated"], per_image["deck's gate"]
    axes[2].bar(calibrated.index, calibrated, color=ACCENT, label="calibrated gate")
    axes[2].plot(deck.index, deck, color="#222222", lw=3, label=f"the deck's gate: {deck.sum():.0f} in all")
    axes[2].plot(SLIDE14.step, SLIDE14.events, color=GREY, lw=2, ls=":", marker="o", ms=6)
    axes[2].set(xlabel="denoising step", ylabel="reuse events")
    axes[2].legend(loc="upper left", fontsize=14)
    figure.align_ylabels(axes)
    change = by_step.entropy.iloc[-1] - by_step.entropy.iloc[0]
    falls = (by_step.entropy.diff().dropna() <= 0).mean()
    headline(
        figure,
        f"Entropy moves by {change:+.2f} nats and falls in {falls:.0%} of the steps; reuse peaks at step "
        f"{int(calibrated.idxmax())}",
    )
    return save(run, "slide14_temporal_evolution", figure, sites)


def slide14_table(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> Figure:
    """Slide 14's table with the measured columns beside the claimed ones."""
    last = run.profile.num_inference_steps - 1
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    reuse = gated[(gated.target == "kv") & (gated.decision == "reuse")]
    rows = []
    for claim in SLIDE14.itertuples():
        step = min(claim.step, last)
        events = [
            f"{(reuse[(reuse.family == m) & (reuse.step == step)].groupby('run').size().mean()):.0f}"
            if len(reuse[(reuse.family == m) & (reuse.step == step)])
            else "0"
            for m in ("deck's gate", "calibrated")
        ]
        measured = (f"{by_step.entropy[step]:.2f}", f"{by_step.snr[step]:.3g}")
        rows.append((step, claim.entropy, measured[0], claim.snr, measured[1], claim.events, *events))
    columns = [
        "step",
        "H claimed",
        "H measured",
        "SNR claimed",
        "SNR measured",
        "events claimed",
        "deck's gate",
        "calibrated",
    ]
    table = pd.DataFrame(rows, columns=columns).drop_duplicates("step")
    title = f"Slide 14, claimed and measured (the last step of {last + 1} is number {last})"
    return save_table(run, "slide14_table", title, table.astype(str), [7, 13, 13, 14, 15, 16, 14, 13], sites)


def slide04_head_map(run: Run, heads: pd.DataFrame) -> Figure:
    """Entropy of every head, layer by layer, over the run."""
    table = heads[heads.branch == "cond"]
    count = table["head"].nunique()
    figure, axes = plt.subplots(1, count, sharey=True)
    low, high = table.entropy.min(), table.entropy.max()
    for head, ax in enumerate(np.atleast_1d(axes)):
        grid = table[table["head"] == head].pivot(index="layer", columns="step", values="entropy")
        mesh = ax.pcolormesh(grid.columns, grid.index, grid.values, vmin=low, vmax=high, cmap="cividis")
        ax.set(title=f"head {head}", xlabel="step")
        ax.grid(False)
    np.atleast_1d(axes)[0].set_ylabel("layer")
    figure.colorbar(mesh, ax=axes, label="entropy (nats)")
    between = table.groupby(["layer", "head"]).entropy.mean().std()
    within = table.groupby(["layer", "head"]).entropy.std().mean()
    headline(figure, f"Heads differ by {between:.2f} nats, steps of one head by {within:.2f} (std, cond)")
    return save(run, "slide04_head_map", figure, heads)
