"""Figures of notebook 02: the gate (slide 5)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dqar import stats
from dqar.figures.style import ACCENT, BLUE, COMPUTE, DARK, GREY, headline, pictures, plain_ticks, recorded, save
from dqar.measure.metrics import mean_psnr
from dqar.measure.results import Run
from dqar.studies import policy, trace
from dqar.studies.gate import calibrated_gate

REUSED = {
    "calibrated gate, output": "outputs reused by the calibrated gate",
    "every 2nd step, output": "outputs at every 2nd step",
    "every 2nd step, kv, INT2": "K and V in INT2 at every 2nd step",
}
"""Of ``studies.gate.sample_methods``: what each reuses, in words."""


def slide05(run: Run, sites: pd.DataFrame) -> Figure:
    """The rule, and the entropy-SNR plane: where the gates open, and how far sites move from step to step there."""
    shown = sites.dropna(subset=["change"])
    figure, axes = plt.subplots()
    points = axes.scatter(shown.snr, shown.entropy, c=shown.change.clip(upper=1), s=18, cmap="cividis_r", lw=0,
                          rasterized=True)  # fmt: skip
    bar = figure.colorbar(points, ax=axes, label="relative change since the step before", pad=0.01)
    plain_ticks(bar.ax.yaxis, percent=True)
    gate = calibrated_gate(run)
    assert gate.snr_range is not None  # as proposed
    low, high = gate.snr_range
    bottom = min(1.7, shown.entropy.min() - 0.1)
    inside = shown[shown.snr.between(low, high) & (shown.entropy < gate.entropy_threshold)]
    opened = int((shown.snr.between(low, high) & (shown.entropy < 2.0)).sum())
    change, everywhere = inside.change.median(), shown.change.median()
    calibrated = f"gate calibrated on this model: H < {gate.entropy_threshold:.2f}"
    for threshold, label, style, color in (
        (gate.entropy_threshold, calibrated, "-", ACCENT),
        (2.0, f"the deck's gate: H < 2.0, {opened:,} sites inside", "--", DARK),
    ):
        axes.plot(
            [low, low, high, high], [bottom, threshold, threshold, bottom], ls=style, color=color, lw=4, label=label
        )
    axes.set(xscale="log", xlabel="SNR (with the predicted $x_0$)", ylabel="entropy of attention (nats)")
    plain_ticks(axes.xaxis)
    axes.set_ylim(bottom, np.log(sites.tokens.iloc[0]) + 0.7)
    axes.legend(loc="upper right")
    axes.set_title(r"Reuse if  $H_t<\tau(p)=\tau\,\sqrt{p/64}$  and  $\mathrm{SNR}_t\in[a,b]$", size=20, pad=12)
    headline(
        figure,
        f"The deck's gate opens at {opened:,} of {len(shown):,} sites; inside a calibrated one a site changes by "
        f"{change:.0%} a step, over all sites by {everywhere:.0%} (medians)",
    )
    layers, steps = shown.layer.nunique(), shown.step.nunique()
    quartiles = (part.change.quantile([0.25, 0.75]) for part in (inside, shown))
    halves = ", ".join(f"{100 * low:.0f}–{high:.0%}" for low, high in quartiles)
    note = f"n = {run.profile.num_samples} images; {layers} layers, {steps} steps, 2 branches; middle halves: {halves}"
    return save(run, "slide05", figure, sites, note)


def slide05_tau(run: Run, sites: pd.DataFrame) -> Figure:
    """τ(p) of slide 5, the deck's example, and the entropies that this model really has."""
    figure, axes = plt.subplots()
    words = np.arange(1, 129)
    axes.plot(words, [stats.tau(2.0, int(p)) for p in words], color=ACCENT, lw=4, label=r"$\tau(p)=2.0\,\sqrt{p/64}$")
    axes.scatter([8], [2.0], s=200, color=DARK, marker="X", zorder=3, label="the deck's example: τ(8) ≈ 2.0")
    axes.scatter([8, 64], [stats.tau(2.0, 8), 2.0], s=120, color=ACCENT, zorder=3)
    axes.annotate(f"τ(8) = {stats.tau(2.0, 8):.2f}", (8, stats.tau(2.0, 8)), (14, -8), textcoords="offset points")
    axes.annotate("τ(64) = 2.00", (64, 2.0), (8, -24), textcoords="offset points")
    axes.axhspan(
        sites.entropy.min(),
        sites.entropy.max(),
        color=BLUE,
        alpha=0.2,
        lw=0,
        label="measured entropies, means of all images",
    )
    axes.set(xlabel="prompt length p (words)", ylabel="entropy threshold (nats)", ylim=(0, None))
    axes.legend(loc="lower right")
    reached = next((int(p) for p in range(1, 100_000) if stats.tau(2.0, int(p)) > sites.entropy.min()), 100_000)
    headline(
        figure,
        f"The deck's threshold is lower than the mean entropy of every site up to prompts of {reached - 1} words",
    )
    note = f"n = {run.profile.num_samples} images, whose means are shown; single images lie lower and higher"
    return save(run, "slide05_tau", figure, sites, note)


@recorded("errors of single reuses")
def slide05_correlations(run: Run, sites: pd.DataFrame, labels: pd.DataFrame) -> Figure:
    """Spearman's ρ of entropy with two measures of a reuse's error, and with step and SNR held fixed.

    Args:
        labels: the error that each of some reuses alone causes in the finished image (``sensitivity.site_errors``).
    """
    relations = trace.relations(sites)
    held = policy.correlations(labels).query("layer < 0 and signal == 'entropy'").set_index("given").rho
    changes = {
        "change since the step before,\nall sites": relations["entropy"],
        "change since the step before,\nwithin one step": relations["entropy_within_step"],
    }
    errors = {
        f"error of the finished image,\n{'all sites' if given == 'nothing' else f'{given} held fixed'}": rho
        for given, rho in held.items()
    }
    intervals = np.array([policy.correlation_interval(labels, "entropy", policy.GIVEN[given]) for given in held.index])
    figure, axes = plt.subplots()
    axes.barh(list(changes), list(changes.values()), color=GREY)
    axes.barh(list(errors), list(errors.values()), color=BLUE)
    axes.hlines(list(errors), *intervals.T, color=DARK, lw=2.5)
    ends = [(rho, rho) for rho in changes.values()] + intervals.tolist()
    for y, (rho, (low, high)) in enumerate(zip([*changes.values(), *errors.values()], ends, strict=True)):
        place, side = ((high, 8), "left") if rho > 0 else ((low, -8), "right")
        axes.annotate(f"{rho:+.2f}", (place[0], y), (place[1], 0), textcoords="offset points", ha=side, va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=GREY)
    axes.axvspan(0, 1, color=COMPUTE, alpha=0.6, zorder=0)
    axes.text(0.98, 4.4, "what the deck expects", ha="right", color=GREY)
    axes.set(xlim=(-1, 1), xlabel="rank correlation with entropy (Spearman's ρ)")
    change, error = ("small" if rho > 0 else "large" for rho in (relations["entropy"], held["nothing"]))
    headline(
        figure,
        f"Where entropy is low, the change since the step before is {change}, "
        f"and the error that a reuse leaves in the image is {error}",
    )
    note = (
        f"change: {sites.change.notna().sum():,} sites, means of {run.profile.num_samples} images, no interval; error: "
        f"n = {len(labels):,} single reuses in {labels.image.nunique()} images, lines: 95% (images drawn anew)"
    )
    return save(run, "slide05_correlations", figure, labels, note)


def samples(run: Run, images: dict[str, torch.Tensor]) -> Figure:
    """Eight seeds of ``[N, C, H, W]`` under each method; below, five times, the difference from full compute."""
    methods = list(images)
    reference = images[methods[0]][:8]
    figure, axes = plt.subplots(2 * len(methods) - 1, len(reference), squeeze=False)
    rows = [(methods[0], False), *((method, difference) for method in methods[1:] for difference in (False, True))]
    for (method, is_difference), line in zip(rows, axes, strict=True):
        for image, original, ax in zip(images[method], reference, line, strict=False):
            picture = (0.5 + 5 * (image - original)).clamp(0, 1) if is_difference else image
            options = {"cmap": "coolwarm" if is_difference else "gray_r", "vmin": 0, "vmax": 1}
            ax.imshow(picture.permute(1, 2, 0), **options)
            ax.set(xticks=[], yticks=[])
        label = "5 × difference" if is_difference else method.replace("kv", "K and V").replace(", ", ",\n", 1)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", size=16)
    decibels = {name: mean_psnr(drawn[: len(reference)], reference) for name, drawn in list(images.items())[1:]}
    said = ", ".join(f"{psnr:.0f} dB with {REUSED.get(name, name)}" for name, psnr in decibels.items())
    headline(figure, f"How near {pictures(run)} come to full compute's: {said}")
    note = f"n = {len(reference)} images of the same seeds; dB: PSNR of the mean squared error, no interval"
    return save(run, "samples", figure, pd.Series(decibels).to_frame("psnr"), note)
