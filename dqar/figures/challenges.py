"""Figures of notebook 08: one measurement for each challenge (slide 15)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dqar.figures.style import (
    ACCENT,
    BLUE,
    DARK,
    GREEN,
    GREY,
    headline,
    pictures,
    plain_ticks,
    recorded,
    save,
    save_table,
)
from dqar.measure.results import Run
from dqar.studies import challenges, policy
from dqar.studies.recording import Sizes

CACHES = {
    "per tensor": "one scale",
    "per tensor + CSB": "balanced",
    "per tensor + top 4": "top 4 kept",
    "per tensor + CSB + top 4": "balanced, top 4 kept",
    "per channel": "a scale a channel",
}
"""Variants of ``challenges.record_accumulation``, in words."""
LOOKING = {
    "fused": "exact, tile by tile",
    "fused, every 4th step": "exact, tile by tile,\nevery 4th step",
    "maps": "exact, from whole maps",
}
"""Ways to measure entropy, in words; that from a few queries is called after their number."""


@recorded("few-bit caches, step by step; branches that share; single reuses; the cost of looking")
def slide15(
    run: Run,
    labels: pd.DataFrame,
    oracle: pd.DataFrame,
    accumulation: pd.DataFrame,
    overhead: pd.DataFrame,
    sharing: pd.DataFrame,
) -> Figure:
    """Slide 15: each challenge, the deck's solution, and what was measured of it."""
    measured = challenges.solutions(labels, oracle, accumulation, overhead, sharing, run.profile.num_inference_steps)
    off, shared = measured.off, measured.shared
    cost = {name: f"{middle:.0%} ({low:.0%} to {high:.0%})" for name, (low, middle, high) in measured.looking.items()}
    rows = [
        (
            "1. Threshold calibration",
            "τ(p) = τ √(p/64)",
            f"entropy varies by {measured.within:.2f} nats from site to site, by {measured.between:.2f} from class to "
            "class; other prompt lengths: not testable here",
        ),
        (
            "2. Quantization error",
            "channel-wise salience balancing, top-k channels",
            f"latents end {off['per tensor']:.2%} off in INT8, {off['per tensor + CSB']:.2%} with balancing, "
            f"{off['per tensor + CSB + top 4']:.2%} with the top 4 channels kept too, {off['per channel']:.2%} with a "
            "scale for each channel",
        ),
        (
            "3. Policy overfitting",
            "diverse data, L2, two layers",
            f"area under the ROC curve on unseen classes: {measured.auc:.3f} with the deck's L2, "
            f"{measured.auc_without_l2:.3f} without",
        ),
        (
            "4. Metric overhead",
            "vectorized operations, compute once",
            f"exact entropy adds {cost['fused']} to a step tile by tile, {cost['maps']} from whole maps, "
            f"{cost['fused, every 4th step']} tile by tile at every 4th step",
        ),
        (
            "5. CFG branch sharing",
            "separate caches, sharing where entropies agree",
            f"separate caches are exact; sharing saves {1 - 1 / shared.macs_speedup:.0%} of the MACs at "
            f"{shared.psnr:.1f} dB ({shared.psnr_low:.1f} to {shared.psnr_high:.1f})",
        ),
    ]
    table = pd.DataFrame(rows, columns=["Problem", "The deck's solution", "Measured"])
    best = off["per channel"] < off["per tensor + CSB"]
    title = "A scale for each channel beats balancing" if best else "Balancing channels helps"
    title = f"{title}; exact entropy at every site adds {cost['fused']} to a step; sharing branches costs quality"
    repeats, images = overhead.repeat.nunique(), sharing.image.nunique()
    note = f"n = {len(labels):,} reuses (1, 3: early stop), {images} images (2; 5: 95%), {repeats} runs (4: quartiles)"
    return save_table(run, "slide15", title, table, [20, 27, 48], sharing, note)


@recorded("errors of single reuses")
def slide15_thresholds(run: Run, labels: pd.DataFrame) -> Figure:
    """Challenge 1: entropy by class. Every label is one word long, so τ(p) has nothing to adapt to."""
    figure, axes = plt.subplots()
    sns.ecdfplot(
        labels,
        x="entropy",
        hue="label",
        ax=axes,
        palette=[BLUE] * labels.label.nunique(),
        lw=2.5,
        alpha=0.5,
        legend=False,
    )
    between, within = challenges.entropy_spreads(labels)
    axes.set(xlabel="entropy of a site (nats)", ylabel="share of sites with less")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title(f"A line for each of {labels.label.nunique()} classes (every label is one word long: p = 1)")
    headline(
        figure,
        f"Classes differ by {between:.2f} nats and the sites of one class by {within:.2f}: a threshold must adapt to "
        "the site",
    )
    note = f"n = {len(labels):,} sites of single images; standard deviations"
    return save(run, "slide15_thresholds", figure, labels, note)


@recorded("few-bit caches, step by step")
def slide15_accumulation(run: Run, accumulation: pd.DataFrame) -> Figure:
    """Challenge 2: error of the latents over the steps in 8, 4 and 2 bits, with CSB and kept channels."""
    figure, axes = plt.subplots(1, 3, sharey=True)
    variants = list(CACHES)
    colors = dict(zip(variants, [GREY, BLUE, GREEN, ACCENT, DARK], strict=True))
    for ax, bits in zip(axes, (8, 4, 2), strict=True):
        for variant in variants:
            part = accumulation[
                (accumulation.bits == bits) & (accumulation.variant == variant) & (accumulation.step > 0)
            ]
            ax.plot(part.step, part.relative_error.replace(0, np.nan), color=colors[variant], lw=3,
                    label=CACHES[variant])  # fmt: skip
        ax.set(yscale="log", xlabel="denoising step")
        plain_ticks(ax.yaxis, percent=True)
        ax.set_title(f"INT{bits}")
    axes[0].set_ylabel("relative error of the latents")
    axes[0].legend(loc="upper left")
    last = accumulation[accumulation.step == accumulation.step.max()].set_index(["bits", "variant"]).relative_error
    errors = ", ".join(f"{last[bits, 'per tensor']:.1%}" for bits in (8, 4, 2))
    gains = ", ".join(f"{last[bits, 'per tensor'] / last[bits, 'per tensor + CSB']:.1f}" for bits in (8, 4, 2))
    headline(
        figure,
        f"In 8, 4 and 2 bits the latents end {errors} off; balancing the channels makes that {gains} times smaller",
    )
    note = (
        f"n = {Sizes.of(run.profile).sweep_images} images (means, no interval); K and V of every 2nd step from the "
        "cache; orange: all that the deck proposes"
    )
    return save(run, "slide15_accumulation", figure, accumulation, note)


@recorded("errors of single reuses")
def slide15_overfitting(run: Run, labels: pd.DataFrame, oracle: pd.DataFrame) -> Figure:
    """Challenge 3: loss on what was trained on and on held-out classes and seeds, with and without L2."""
    delta, steps = policy.calibrated_delta(oracle), run.profile.num_inference_steps
    studies = {
        name: policy.study(labels, delta, steps, l2=l2, patience=None, max_epochs=150)
        for name, l2 in (("no L2", 0.0), ("the deck's L2, 0.0001", 1e-4), ("L2 of 0.01", 1e-2))
    }
    figure, axes = plt.subplots(1, len(studies), sharey=True)
    for ax, (name, study) in zip(axes, studies.items(), strict=True):
        ax.plot(study.history.epoch, study.history.train, color=GREY, lw=3, label="trained on")
        ax.plot(study.history.epoch, study.history.held_out, color=ACCENT, lw=3, label="held out")
        ax.set(xlabel="epoch")
        ax.set_title(f"{name}:\narea {study.auc():.3f}")
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[0].legend()
    without, with_l2, more = (study.auc() for study in studies.values())
    headline(
        figure,
        f"The deck's L2 moves the area under the ROC curve by {with_l2 - without:+.3f} on {pictures(run)} that the "
        f"network has not seen, a hundred times as much by {more - without:+.3f}",
    )
    classes = f"{labels.label.nunique()} classes, {len(policy.TEST)} held out"
    note = (
        f"n = {len(labels):,} single reuses of {classes}; one training each, no interval; these run to the end, slide "
        "15's are stopped early"
    )
    return save(run, "slide15_overfitting", figure, labels, note)


@recorded("whole steps with the entropy in different ways")
def slide15_looking(run: Run, overhead: pd.DataFrame) -> Figure:
    """Challenge 4: what the entropy costs, as a share of a whole step of this profile's model."""
    share = challenges.looking(overhead).drop(columns="none")
    few = next(name for name in share if name.endswith("queries"))
    names = {"fused": LOOKING["fused"], few: few.removeprefix("fused, "), **LOOKING}
    share = share[list(names)]
    quartiles = share.quantile([0.25, 0.5, 0.75])
    middle = quartiles.loc[0.5]
    figure, axes = plt.subplots()
    spread = [middle - quartiles.loc[0.25], quartiles.loc[0.75] - middle]
    colors = [GREY if name == "maps" else ACCENT for name in names]
    axes.barh(list(names.values()), middle, xerr=spread, color=colors, capsize=6)
    for y, name in enumerate(names):
        axes.annotate(
            f"{middle[name]:+.0%}", (quartiles.loc[0.75, name], y), (10, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.margins(x=0.15)
    axes.set(xlabel="time added to a denoising step (median, quartiles)", ylabel="how entropy is measured")
    headline(
        figure,
        f"On this model exact entropy adds {middle['fused']:.0%} to a step tile by tile, {middle['maps']:.0%} from "
        f"whole attention maps, and {middle['fused, every 4th step']:.0%} tile by tile at every 4th step",
    )
    clock = "CPU time" if run.profile.device == "cpu" else "time"
    note = f"n = {len(share)} runs taken in turn; {clock}"
    return save(run, "slide15_looking", figure, overhead, note)


@recorded("branches that share")
def slide15_sharing(run: Run, sharing: pd.DataFrame) -> Figure:
    """Challenge 5: one branch takes the other's attention where entropies differ by less than ε."""
    runs = challenges.shared_runs(sharing)
    figure, axes = plt.subplots()
    for target, label, face in (("kv", "K and V shared", "white"), ("output", "attention output shared", ACCENT)):
        part = runs[runs.target == target]
        spread = [part.psnr - part.psnr_low, part.psnr_high - part.psnr]
        axes.errorbar(part.macs_speedup, part.psnr, spread, color=ACCENT, lw=3, marker="o", ms=11, mew=2.5, mfc=face,
                      elinewidth=1.5, capsize=4, label=label)  # fmt: skip
        for row in part.drop_duplicates("macs_speedup").itertuples():  # beyond some ε all is shared that may be
            place, side = ((8, 8), "left") if target == "output" else ((-10, -14), "right")
            text = "all" if np.isinf(row.epsilon) else f"below {row.epsilon:g}"
            point = row.macs_speedup, row.psnr
            axes.annotate(text, point, place, textcoords="offset points", ha=side)
    axes.set(xlabel="MACs of full compute / of this", ylabel="PSNR to full compute (dB)")
    axes.margins(0.15)
    axes.legend()
    best = runs.loc[runs[runs.target == "output"].macs_speedup.idxmax()]
    headline(
        figure,
        f"Sharing attention between the two branches saves at most {1 - 1 / best.macs_speedup:.0%} of the MACs, "
        f"at {best.psnr:.1f} dB ({best.psnr_low:.1f} to {best.psnr_high:.1f})",
    )
    note = (
        f"n = {sharing.image.nunique()} images, bars: 95%, PSNR of the mean squared error; below: entropies (nats) "
        "that differ by less are taken for equal"
    )
    return save(run, "slide15_sharing", figure, sharing, note)
