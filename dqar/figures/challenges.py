"""Figures of notebook 08: one measurement for each challenge (slide 15)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, GREEN, GREY, headline, recorded, save
from dqar.measure.results import Run
from dqar.studies import policy


@recorded("errors of single reuses")
def slide15_thresholds(run: Run, labels: pd.DataFrame) -> Figure:
    """Challenge 1: entropy by class. Every label is one word long, so τ(p) has nothing to adapt to."""
    figure, axes = plt.subplots()
    sns.boxplot(labels, x="label", y="entropy", ax=axes, color=ACCENT, width=0.6, fliersize=0)
    between = labels.groupby("label").entropy.mean().std()
    within = labels.groupby("label").entropy.std().mean()
    axes.set(
        xlabel="class, each label p = 1 word (other lengths: not measured, the model takes no text)",
        ylabel="entropy of a site (nats)",
    )
    headline(
        figure,
        f"Threshold calibration: at one prompt length, classes differ by {between:.2f} nats, sites of one class by "
        f"{within:.2f} (std): the site matters, not the prompt",
    )
    return save(run, "slide15_thresholds", figure, labels)


@recorded("few-bit caches, step by step")
def slide15_accumulation(run: Run, accumulation: pd.DataFrame) -> Figure:
    """Challenge 2: error of the latents over the steps in 8, 4 and 2 bits, with CSB and kept channels."""
    figure, axes = plt.subplots(1, 3, sharey=True)
    variants = list(dict.fromkeys(accumulation.variant))
    colors = dict(zip(variants, [GREY, BLUE, GREEN, ACCENT, "#222222"], strict=True))
    for ax, bits in zip(axes, (8, 4, 2), strict=True):
        for variant in variants:
            part = accumulation[
                (accumulation.bits == bits) & (accumulation.variant == variant) & (accumulation.step > 0)
            ]
            ax.plot(part.step, part.relative_error.replace(0, np.nan), color=colors[variant], lw=3, label=variant)
        ax.set(yscale="log", xlabel="denoising step")
        ax.set_title(f"INT{bits}")
    axes[0].set_ylabel("relative error of the latents")
    axes[2].legend(fontsize=12)
    last = accumulation[accumulation.step == accumulation.step.max()].set_index(["bits", "variant"]).relative_error
    gain = {bits: last[bits, "per tensor"] / last[bits, "per tensor + CSB"] for bits in (8, 4, 2)}
    headline(
        figure,
        f"Quantization error: at the last step {last[8, 'per tensor']:.1e}, {last[4, 'per tensor']:.1e}, "
        f"{last[2, 'per tensor']:.1e} in 8, 4, 2 bits; CSB makes it "
        + ", ".join(f"{value:.2g}×" for value in gain.values())
        + " smaller",
    )
    return save(run, "slide15_accumulation", figure, accumulation)


@recorded("errors of single reuses")
def slide15_overfitting(run: Run, labels: pd.DataFrame, oracle: pd.DataFrame) -> Figure:
    """Challenge 3: loss on what was trained on and on held-out classes and seeds, with and without L2."""
    delta, steps = policy.calibrated_delta(oracle), run.profile.num_inference_steps
    studies = {
        name: policy.study(labels, delta, steps, l2=l2, patience=None, max_epochs=150)
        for name, l2 in (("no L2", 0.0), ("L2 1e-4", 1e-4), ("L2 1e-2", 1e-2))
    }
    figure, axes = plt.subplots(1, len(studies), sharey=True)
    for ax, (name, study) in zip(axes, studies.items(), strict=True):
        ax.plot(study.history.epoch, study.history.train, color=GREY, lw=3, label="trained on")
        ax.plot(study.history.epoch, study.history.held_out, color=ACCENT, lw=3, label="held out")
        ax.set(xlabel="epoch")
        ax.set_title(f"{name}: area {study.auc():.3f}")
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[0].legend()
    gaps = [study.history.held_out.iloc[-1] - study.history.train.iloc[-1] for study in studies.values()]
    headline(
        figure,
        f"Policy overfitting: held-out minus training loss after {len(study.history)} epochs: "
        + ", ".join(f"{gap:+.3f} ({name})" for gap, name in zip(gaps, studies, strict=True)),
    )
    return save(run, "slide15_overfitting", figure, labels)


@recorded("whole steps with the entropy in different ways")
def slide15_step_overhead(run: Run, overhead: pd.DataFrame) -> Figure:
    """Challenge 4: what the entropy costs, as a share of a whole step."""
    wide = overhead.pivot(index="repeat", columns="method", values="seconds")
    share = wide.div(wide["none"], axis=0) - 1
    order = [name for name in dict.fromkeys(overhead.method) if name != "none"]
    quartiles = share[order].quantile([0.25, 0.5, 0.75])
    figure, axes = plt.subplots()
    middle = quartiles.loc[0.5]
    spread = [middle - quartiles.loc[0.25], quartiles.loc[0.75] - middle]
    axes.barh(order, middle, xerr=spread, color=[GREY if name == "maps" else ACCENT for name in order], capsize=6)
    for y, name in enumerate(order):
        axes.annotate(
            f"{middle[name]:+.0%}", (quartiles.loc[0.75, name], y), (10, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.margins(x=0.15)
    axes.set(xlabel="added to a denoising step (median, quartiles)")
    headline(
        figure,
        f"Metric overhead on this small model: exact entropy adds {middle['fused']:.0%} to a step, "
        f"maps {middle['maps']:.0%}, "
        f"every 4th step {middle['fused, every 4th step']:.0%}",
    )
    return save(run, "slide15_step_overhead", figure, overhead)


@recorded("branches that share")
def slide15_sharing(run: Run, sharing: pd.DataFrame) -> Figure:
    """Challenge 5: one branch takes the other's attention where entropies differ by less than ε."""
    runs = sharing.groupby(["target", "epsilon"], as_index=False)[["mse", "macs_speedup", "sites_reused"]].mean()
    runs["psnr"] = -10 * np.log10(runs.mse.replace(0, np.nan))
    figure, axes = plt.subplots()
    for target, color in (("kv", BLUE), ("output", ACCENT)):
        part = runs[runs.target == target]
        axes.plot(part.macs_speedup, part.psnr, color=color, lw=3, marker="o", ms=10, label=f"shared {target}")
        for row in part.drop_duplicates("macs_speedup").itertuples():  # beyond some ε all is shared that may be
            axes.annotate(
                f"ε = {row.epsilon:g}", (row.macs_speedup, row.psnr), (8, 8), textcoords="offset points", size=14
            )
    axes.set(xlabel="MACs: full compute / this (×)", ylabel="PSNR to full compute (dB)")
    axes.margins(0.15)
    axes.legend()
    best = runs.loc[runs[runs.target == "output"].macs_speedup.idxmax()]
    headline(
        figure,
        f"CFG branch sharing: at most {best.macs_speedup:.2f}× fewer MACs, at {best.psnr:.1f} dB; separate caches are "
        "exact",
    )
    return save(run, "slide15_sharing", figure, sharing)
