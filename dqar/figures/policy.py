"""Figures of notebook 06: who decides (slide 7)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from dqar.figures.style import ACCENT, BLUE, COMPUTE, DARK, GREY, headline, pictures, plain_ticks, recorded, save
from dqar.measure.results import Run
from dqar.studies import policy

DECIDERS = {"oracle": DARK, "policy": ACCENT, "rule": BLUE, "chance": GREY}
NAMES = {"oracle": "measured errors", "policy": "the network", "rule": "the rule", "chance": "chance"}


@recorded("errors of single reuses")
def slide07(run: Run, labels: pd.DataFrame, oracle: pd.DataFrame) -> Figure:
    """Slide 7's network with its parameter count, and how well it tells harmless reuses beside the rule."""
    delta, steps = policy.calibrated_delta(oracle), run.profile.num_inference_steps
    study, ablation = policy.study(labels, delta, steps), policy.ablation(labels, delta, steps)
    count = sum(parameter.numel() for parameter in study.policy.parameters())
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(1.7, 1))
    left.axis("off")
    left.set(xlim=(0, 10), ylim=(0, 10))
    left.set_title(f"{count:,} parameters", size=18)
    features = [r"$H_t$", r"$\log\,\mathrm{SNR}_t$", r"$\log\,\|x_t\|_2$", r"$t/(T-1)$", r"$\min(p,128)/128$"]
    columns = [(2.9, features, "5 features"), (5.1, [""] * 7, "64, tanh"), (7.3, [""] * 7, "64, tanh"),
               (9.3, [""], "1, sigmoid")]  # fmt: skip
    places = [[(x, 5 - 1.1 * (i - (len(names) - 1) / 2)) for i in range(len(names))] for x, names, _ in columns]
    for before, after in zip(places[:-1], places[1:], strict=True):
        for start in before:
            for end in after:
                left.plot(*zip(start, end, strict=True), color="#A9B4BF", lw=1, zorder=0)
    for (x, names, label), spots in zip(columns, places, strict=True):
        left.scatter(*zip(*spots, strict=True), s=520, color=GREY if x < 3 else ACCENT, zorder=1)
        left.text(x, 0.2, label, ha="center", weight="bold")
        for name, (_, y) in zip(names, spots, strict=True):
            left.text(x - 0.5, y, name, ha="right", va="center", size=17)
    left.text(9.3, 5.9, r"$p_\mathrm{reuse}$", ha="center", size=19)
    areas = ablation.groupby("omitted").auc.agg(["mean", "min", "max"])
    bars = {"network": areas.loc["nothing"], "network\nwithout\nentropy": areas.loc["entropy"]}
    rule = study.auc("rule")
    for number, area in enumerate(bars.values()):
        # Clipped, since the mean of equal areas may lie beside them by rounding.
        spread = np.clip([[area["mean"] - area["min"]], [area["max"] - area["mean"]]], 0, None)
        right.bar(number, area["mean"], yerr=spread, color=ACCENT, capsize=8, alpha=1 if number == 0 else 0.55)
        right.text(number, area["max"] + 0.02, f"{area['mean']:.2f}", ha="center")
    right.bar(2, rule, color=GREY)
    right.text(2, rule + 0.02, f"{rule:.2f}", ha="center")
    right.axhline(0.5, color=DARK, ls="--", lw=2)
    right.text(2.45, 0.52, "chance", ha="right")
    right.set_xticks(range(3), [*bars, "slide 5's\nrule"])
    right.set(ylim=(0, 1.05), ylabel="area under the ROC curve")
    right.set_title(f"Held-out {pictures(run)}")
    right.grid(axis="x", visible=False)
    whole, without = areas["mean"][["nothing", "entropy"]]
    worse = "does not" if rule < 0.55 else "less well" if rule < whole else "as well or better"
    useful = "nothing" if without >= whole else "little" if whole - without < 0.02 else f"{whole - without:.2f}"
    headline(
        figure,
        f"A network of {count:,} parameters tells harmless reuses from harmful ones, the rule {worse}; "
        f"to the network, entropy adds {useful}",
    )
    harmful = int((~study.held_out.harmless.astype(bool)).sum())
    note = f"n = {len(study.held_out)} reuses, {harmful} of them harmful; bars: range of 3 trainings"
    return save(run, "slide07", figure, labels, note)


@recorded("errors of single reuses")
def slide07_training(run: Run, labels: pd.DataFrame, oracle: pd.DataFrame) -> Figure:
    """Training curve, ROC against the rule, and calibration of the network."""
    study = policy.study(labels, policy.calibrated_delta(oracle), run.profile.num_inference_steps)
    figure, (losses, roc, calibration) = plt.subplots(1, 3)
    losses.plot(study.history.epoch, study.history.train, color=GREY, lw=3, label="trained on")
    losses.plot(study.history.epoch, study.history.held_out, color=ACCENT, lw=3, label="validation")
    losses.axvline(study.history.held_out.idxmin(), color=GREY, ls=":")
    losses.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    losses.legend()
    losses.set_title("Training")
    for score, color in (("policy", ACCENT), ("rule", BLUE)):
        wrong, right, _ = roc_curve(study.held_out.harmless, study.held_out[score])
        roc.plot(wrong, right, color=color, lw=3)
        place, side = ((0.14, 0.7), "left") if score == "policy" else ((0.97, 0.17), "right")  # off both curves
        text = f"{NAMES[score]}:\narea {study.auc(score):.2f}"
        roc.text(*place, text, color=color, ha=side, va="top", weight="bold")
    roc.plot([0, 1], [0, 1], color=GREY, ls="--")
    roc.set(xlabel="harmful reuses accepted", ylabel="harmless reuses accepted")
    roc.set_title(f"Held-out {pictures(run)}")
    really, said = calibration_curve(study.held_out.harmless, study.held_out.policy, n_bins=8, strategy="quantile")
    calibration.plot([0, 1], [0, 1], color=GREY, ls="--")
    calibration.plot(said, really, color=ACCENT, lw=3, marker="o")
    calibration.set(xlabel="predicted probability", ylabel="share that is harmless")
    calibration.set_title("Calibration")
    worst = np.abs(really - said).max()
    headline(
        figure, f"The network's probabilities are off by at most {worst:.2f} on {pictures(run)} that it has not seen"
    )
    return save(run, "slide07_training", figure, labels, f"n = {len(study.held_out)} held-out reuses")


@recorded("errors of single reuses")
def slide07_entropy_by_layer(run: Run, labels: pd.DataFrame) -> Figure:
    """Does entropy predict the reuse error once step and SNR are known? By layer."""
    correlations = policy.correlations(labels)
    figure, axes = plt.subplots()
    table = correlations[correlations.layer >= 0]
    axes.plot(table.layer, table.rho, color=GREY, lw=1.5, zorder=1)
    axes.scatter(table.layer, table.rho, s=160, color=[ACCENT if rho > 0 else BLUE for rho in table.rho], zorder=2)
    axes.axhline(0, color=DARK)
    noise = 1.96 / (len(labels) / len(table)) ** 0.5
    axes.axhspan(-noise, noise, color=COMPUTE, zorder=0)
    axes.set(xlabel="layer", ylabel="rank correlation, step and SNR held fixed")
    rising, falling = int((table.rho > noise).sum()), int((table.rho < -noise).sum())
    headline(
        figure,
        f"At equal step and SNR, the error of a reuse clearly rises with entropy in {rising} of {len(table)} layers "
        f"and clearly falls in {falling}",
    )
    note = f"n = {len(labels):,} single reuses, some {len(labels) // len(table)} a layer; grey: within 95% of chance"
    return save(run, "slide07_entropy_by_layer", figure, labels, note)


@recorded("runs of rule, policy, oracle and chance")
def slide07_deciders(run: Run, deciders: pd.DataFrame) -> Figure:
    """Rule, policy, oracle and chance at equal reuse: the image's error."""
    figure, axes = plt.subplots(1, 2, sharey=True)
    runs = policy.runs_of_deciders(deciders)
    for ax, target in zip(axes, ("output", "kv"), strict=True):
        for name, color in DECIDERS.items():
            part = runs[(runs.target == target) & (runs.method == name)].sort_values("sites_reused")
            ax.plot(part.sites_reused, part.psnr, color=color, lw=3, marker="o", ms=9, label=NAMES[name],
                    ls="--" if name == "oracle" else "-")  # fmt: skip
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.set(xlabel="sites reused (share)")
        ax.set_title(f"reuse of {'K and V' if target == 'kv' else 'the attention output'}")
    axes[0].set_ylabel("median PSNR to full compute (dB)")
    axes[0].legend()
    at = policy.psnr_at_share(runs[runs.target == "output"])
    kept = ", ".join(f"{at[name]:.0f} dB by {NAMES[name]}" for name in DECIDERS if name in at)
    headline(figure, f"Reusing 20% of the attention outputs keeps {kept}")
    note = f"n = {deciders.image.nunique()} images; no site twice in a row"
    return save(run, "slide07_deciders", figure, deciders, note)


@recorded("runs of accepted decisions")
def slide07_delta(run: Run, oracle: pd.DataFrame) -> Figure:
    """What runs of accepted decisions do to the set: how δ was chosen."""
    accepted, delta = policy.accepted_runs(oracle), policy.calibrated_delta(oracle)
    figure, (left, right) = plt.subplots(1, 2)
    shown = accepted[accepted.share > 0]
    by_distance = shown.fd_growth.notna().all()
    left.plot(shown.share, shown.fd_growth if by_distance else shown.psnr, color=ACCENT, lw=4, marker="o", ms=10)
    left.axhline(policy.DELTA_FD if by_distance else policy.DELTA_PSNR, color=GREY, ls="--", label="accepted")
    left.xaxis.set_major_formatter("{x:.0%}")
    left.set(xlabel="sites reused", ylabel="PSNR of the run (dB)")
    if by_distance:
        left.yaxis.set_major_formatter("{x:.1%}")
        left.set_ylabel(f"growth of {run.profile.distance}")
    left.legend()
    right.plot(1e9 * shown.delta, shown.psnr, color=ACCENT, lw=4, marker="o", ms=10)
    right.axvline(1e9 * delta, color=GREY, ls="--", label="accepted")
    right.set(xscale="log", xlabel="largest error accepted (MSE, billionths)", ylabel="PSNR of the run (dB)")
    plain_ticks(right.xaxis)
    right.legend()
    chosen = shown[shown.delta == delta].iloc[0]
    headline(
        figure,
        f"Reusing the {chosen.share:.0%} of the sites with the smallest single errors "
        + ("" if np.isnan(chosen.fd_growth) else f"moves {run.profile.distance} by {chosen.fd_growth:+.1%}, but ")
        + f"leaves images at {chosen.psnr:.0f} dB",
    )
    judged = f"distance: {run.profile.distance}" if by_distance else "too few for a Fréchet distance"
    return save(run, "slide07_delta", figure, oracle, f"n = {oracle.image.nunique()} images; {judged}")
