"""Figures of notebook 06: who decides (slide 7)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from dqar.figures.style import ACCENT, BLUE, GREY, headline, recorded, save
from dqar.measure.results import Run
from dqar.studies import policy

DECIDERS = {"oracle": "#222222", "policy": ACCENT, "rule": BLUE, "chance": GREY}


@recorded("errors of single reuses")
def slide07_policy(run: Run, labels: pd.DataFrame, oracle: pd.DataFrame) -> Figure:
    """Training curve, ROC against the rule, calibration, and what each feature is worth."""
    delta, steps = policy.calibrated_delta(oracle), run.profile.num_inference_steps
    study, ablation = policy.study(labels, delta, steps), policy.ablation(labels, delta, steps)
    correlations = policy.correlations(labels)
    figure, ((losses, roc), (calibration, worth)) = plt.subplots(2, 2)
    losses.plot(study.history.epoch, study.history.train, color=GREY, lw=3, label="trained on")
    losses.plot(study.history.epoch, study.history.held_out, color=ACCENT, lw=3, label="stopped by")
    losses.axvline(study.history.held_out.idxmin(), color=GREY, ls=":")
    losses.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    losses.legend(fontsize=13)
    losses.set_title("Training")
    for score, color in (("policy", ACCENT), ("rule", BLUE)):
        wrong, right, _ = roc_curve(study.held_out.harmless, study.held_out[score])
        roc.plot(wrong, right, color=color, lw=3, label=f"{score}: area {study.auc(score):.2f}")
    roc.plot([0, 1], [0, 1], color=GREY, ls="--")
    roc.set(xlabel="harmful reuses accepted", ylabel="harmless accepted")
    roc.legend(fontsize=13, loc="lower right")
    roc.set_title("Held-out classes and seeds")
    really, said = calibration_curve(study.held_out.harmless, study.held_out.policy, n_bins=8, strategy="quantile")
    calibration.plot([0, 1], [0, 1], color=GREY, ls="--")
    calibration.plot(said, really, color=ACCENT, lw=3, marker="o")
    calibration.set(xlabel="p_reuse, as said", ylabel="harmless, in fact")
    calibration.set_title("Calibration")
    means = ablation.groupby("omitted", sort=False).auc.agg(["mean", "min", "max"])
    spread = [means["mean"] - means["min"], means["max"] - means["mean"]]
    colors = [ACCENT if name == "nothing" else GREY for name in means.index]
    worth.barh(means.index, means["mean"], xerr=spread, color=colors, capsize=4)
    worth.invert_yaxis()
    worth.set(xlim=(0.5, 1.0), xlabel="area under the ROC curve without …")
    worth.set_title("What a feature is worth")
    worth.tick_params(axis="y", labelsize=13)
    given = correlations[(correlations.layer < 0) & (correlations.signal == "entropy")].set_index("given").rho
    headline(
        figure,
        f"The policy's area is {study.auc():.2f}, without entropy {means['mean']['entropy']:.2f}; the rule's "
        f"{study.auc('rule'):.2f} (ρ of entropy and error {given['nothing']:+.2f}, given step and SNR "
        f"{given['step and SNR']:+.2f})",
    )
    return save(run, "slide07_policy", figure, labels)


@recorded("errors of single reuses")
def slide07_entropy_by_layer(run: Run, labels: pd.DataFrame) -> Figure:
    """Does entropy predict the reuse error once step and SNR are known? By layer."""
    correlations = policy.correlations(labels)
    figure, axes = plt.subplots()
    table = correlations[correlations.layer >= 0]
    axes.bar(table.layer, table.rho, color=[ACCENT if rho > 0 else BLUE for rho in table.rho])
    axes.axhline(0, color="#222222")
    axes.set(xlabel="layer", ylabel="partial Spearman's ρ (entropy, error | step, SNR)")
    rising = int((table.rho > 0).sum())
    axes.set_title(f"The error rises with entropy in {rising} of {len(table)} layers, falls in {len(table) - rising}")
    return save(run, "slide07_entropy_by_layer", figure, labels)


@recorded("runs of rule, policy, oracle and chance")
def slide07_deciders(run: Run, deciders: pd.DataFrame) -> Figure:
    """Rule, policy, oracle and chance at equal reuse: the image's error."""
    figure, axes = plt.subplots(1, 2, sharey=True)
    runs = deciders.groupby(["target", "method", "wanted"], as_index=False)[
        ["mse", "sites_reused", "macs_speedup"]
    ].mean()
    runs["psnr"] = -10 * np.log10(runs.mse)
    for ax, target in zip(axes, ("output", "kv"), strict=True):
        for name, color in DECIDERS.items():
            part = runs[(runs.target == target) & (runs.method == name)].sort_values("sites_reused")
            ax.plot(part.sites_reused, part.psnr, color=color, lw=3, marker="o", ms=9, label=name,
                    ls="--" if name == "oracle" else "-")  # fmt: skip
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.set(xlabel="sites reused (share)", ylabel="PSNR to full compute (dB)")
        ax.set_title(f"reuse of {'K and V' if target == 'kv' else 'the attention output'}")
    axes[0].legend()
    wide = _at_equal_share(runs[runs.target == "output"])
    headline(
        figure,
        "At 20% of the sites (output): "
        + ", ".join(f"{name} {wide[name]:.1f} dB" for name in DECIDERS if name in wide)
        + "; nothing twice in a row",
    )
    return save(run, "slide07_deciders", figure, deciders)


@recorded("runs of accepted decisions")
def slide07_delta(run: Run, oracle: pd.DataFrame) -> Figure:
    """What runs of accepted decisions do to the set: how δ was chosen."""
    accepted, delta = policy.accepted_runs(oracle), policy.calibrated_delta(oracle)
    figure, (left, right) = plt.subplots(1, 2)
    shown = accepted[accepted.share > 0]
    left.plot(shown.share, shown.fd_growth, color=ACCENT, lw=4, marker="o", ms=10)
    left.axhline(policy.DELTA_FD, color=GREY, ls="--", label="accepted growth")
    left.xaxis.set_major_formatter("{x:.0%}")
    left.yaxis.set_major_formatter("{x:.1%}")
    left.set(xlabel="sites reused", ylabel="growth of FD-digits")
    left.legend()
    right.plot(shown.delta, shown.psnr, color=ACCENT, lw=4, marker="o", ms=10)
    right.axvline(delta, color=GREY, ls="--", label=f"δ = {delta:.1e}")
    right.set(xscale="log", xlabel="largest error accepted of a site (MSE)", ylabel="PSNR of the run (dB)")
    right.legend()
    headline(
        figure,
        f"A reuse is labelled harmless below δ = {delta:.1e}: a run of such reuses changes the Fréchet distance by "
        f"{shown.fd_growth[shown.delta == delta].mean():+.1%}",
    )
    return save(run, "slide07_delta", figure, oracle)


def _at_equal_share(runs: pd.DataFrame, share: float = 0.2) -> dict[str, float]:
    """PSNR of each decider at ``share`` of the sites, between the runs on either side of it."""
    found = {}
    for name, part in runs.groupby("method"):
        part = part.sort_values("sites_reused")
        if part.sites_reused.min() <= share <= part.sites_reused.max():
            found[name] = float(np.interp(share, part.sites_reused, part.psnr))
    return found
