"""Figures of notebook 06: who decides (slide 7)."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.metrics import roc_curve

from dqar.figures.style import ACCENT, COMPUTE, DARK, GREY, headline, pictures, plain_ticks, recorded, save
from dqar.measure.quality import reference_of
from dqar.measure.results import Run
from dqar.studies import policy, results
from dqar.studies.compare import FULL

LOOKS: dict[str, dict[str, Any]] = {
    "oracle": {"color": DARK, "ls": "--", "marker": "o"},
    "policy": {"color": ACCENT, "ls": "-", "marker": "o"},
    "rule": {"color": ACCENT, "ls": ":", "marker": "s", "mfc": "white", "mew": 2.5},
    "chance": {"color": GREY, "ls": "-", "marker": "o"},
}
"""Of deciders: DQAR's network filled, its rule hollow."""
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
    right.bar(2, rule, color="white", edgecolor=ACCENT, lw=3, ls=":")
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
    for score, place in (("policy", (0.14, 0.74)), ("rule", (0.6, 0.17))):  # off both curves
        wrong, right, _ = roc_curve(study.held_out.harmless, study.held_out[score])
        roc.plot(wrong, right, color=ACCENT, lw=3, ls=LOOKS[score]["ls"])
        text = f"{NAMES[score].removeprefix('the ')}:\narea {study.auc(score):.2f}"
        roc.text(*place, text, color=ACCENT, va="top", weight="bold")
    roc.plot([0, 1], [0, 1], color=GREY, ls="--")
    roc.set(xlabel="harmful reuses accepted", ylabel="harmless reuses accepted")
    roc.set_title(f"Held-out {pictures(run)}")
    groups = study.held_out.groupby(pd.qcut(study.held_out.policy, 8, duplicates="drop"), observed=True)
    said, really = groups.policy.mean(), groups.harmless.mean()
    tests = [binomtest(int(part.sum()), len(part)) for _, part in groups.harmless]
    ends = np.array([test.proportion_ci(method="wilson") for test in tests]).T
    spread = np.clip([really - ends[0], ends[1] - really], 0, None)
    calibration.plot([0, 1], [0, 1], color=GREY, ls="--")
    calibration.errorbar(said, really, spread, color=ACCENT, lw=3, marker="o", elinewidth=1.5, capsize=4)
    calibration.set(xlabel="predicted probability", ylabel="share that is harmless")
    calibration.set_title("Calibration")
    worst = np.abs(really - said).max()
    headline(
        figure,
        f"On {pictures(run)} that it has not seen, the network's probabilities are off by at most {worst:.2f}, which "
        f"is within the intervals"
        if all(low <= p <= high for p, low, high in zip(said, *ends, strict=True))
        else f"On {pictures(run)} that it has not seen, the network's probabilities are off by up to {worst:.2f}",
    )
    note = f"n = {len(study.held_out)} held-out reuses; calibration: {len(groups)} groups of some "
    note += f"{len(study.held_out) // len(groups)}, bars: 95%"
    return save(run, "slide07_training", figure, labels, note)


@recorded("errors of single reuses")
def slide07_entropy_by_layer(run: Run, labels: pd.DataFrame) -> Figure:
    """Does entropy predict the reuse error once step and SNR are known? By layer."""
    correlations = policy.correlations(labels)
    figure, axes = plt.subplots()
    table = correlations[correlations.layer >= 0]
    axes.plot(table.layer, table.rho, color=GREY, lw=1.5, zorder=1)
    noise = 1.96 / (len(labels) / len(table)) ** 0.5
    colors = [DARK if abs(rho) > noise else GREY for rho in table.rho]
    axes.scatter(table.layer, table.rho, s=160, color=colors, zorder=2)
    axes.axhline(0, color=DARK)
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
        for name, look in LOOKS.items():
            part = runs[(runs.target == target) & (runs.method == name)].sort_values("sites_reused")
            spread = [part.psnr - part.psnr_low, part.psnr_high - part.psnr]
            ax.errorbar(part.sites_reused, part.psnr, np.clip(spread, 0, None), **look, lw=3, ms=9, elinewidth=1.5,
                        capsize=4, label=NAMES[name])  # fmt: skip
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.set(xlabel="sites reused (share)")
        ax.set_title(f"reuse of {'K and V' if target == 'kv' else 'the attention output'}")
    axes[0].set_ylabel("median PSNR to full compute (dB)")
    axes[0].legend()
    at = policy.psnr_at_share(runs[runs.target == "output"])
    kept = ", ".join(f"{at[name]:.0f} dB by {NAMES[name]}" for name in LOOKS if name in at)
    headline(figure, f"Reusing 20% of the attention outputs keeps {kept}")
    note = f"n = {deciders.image.nunique()} images, bars: 95%; no site twice in a row"
    lead, low, high = policy.lead_at_share(deciders, "rule", "chance")
    if not np.isnan(lead):
        note += f"; rule over chance at 20%: {lead:+.1f} dB ({low:+.1f} to {high:+.1f})"
    note += "; the rule has a threshold for each share, slide 12's gate another"
    return save(run, "slide07_deciders", figure, deciders, note)


@recorded("runs of accepted decisions")
def slide07_delta(run: Run, oracle: pd.DataFrame) -> Figure:
    """What runs of accepted decisions do to the set: how δ was chosen."""
    accepted, delta = policy.accepted_runs(oracle), policy.calibrated_delta(oracle)
    figure, (left, right) = plt.subplots(1, 2)
    shown = accepted[accepted.share > 0]
    by_distance = shown.fd_growth.notna().all()
    look = {"color": DARK, "lw": 3, "marker": "o", "ms": 10, "capsize": 5}
    interval = [shown.psnr - shown.psnr_low, shown.psnr_high - shown.psnr]
    if by_distance:
        shown = shown.merge(_growth_intervals(run, oracle), on="share")
        spread = [shown.fd_growth - shown.growth_low, shown.growth_high - shown.fd_growth]
        left.errorbar(shown.share, shown.fd_growth, np.clip(spread, 0, None), **look)
    else:
        left.errorbar(shown.share, shown.psnr, interval, **look)
    left.axhline(policy.DELTA_FD if by_distance else policy.DELTA_PSNR, color=GREY, ls="--", label="accepted")
    left.xaxis.set_major_formatter("{x:.0%}")
    left.set(xlabel="sites reused", ylabel="PSNR of the run (dB)")
    if by_distance:
        left.yaxis.set_major_formatter("{x:.1%}")
        left.set_ylabel(f"growth of {run.profile.distance}")
    left.legend()
    right.errorbar(1e9 * shown.delta, shown.psnr, interval, **look)
    right.axvline(1e9 * delta, color=GREY, ls="--", label="accepted")
    right.set(xscale="log", xlabel="largest error accepted (MSE, billionths)", ylabel="PSNR of the run (dB)")
    plain_ticks(right.xaxis)
    right.legend()
    chosen = shown[shown.delta == delta].iloc[0]
    moves = ""
    if by_distance:
        certain = not chosen.growth_low <= 0 <= chosen.growth_high
        moves = f"moves {run.profile.distance} by {f'{chosen.fd_growth:+.1%}' if certain else 'no measurable amount'} "
        moves += f"({chosen.growth_low:+.1%} to {chosen.growth_high:+.1%}), but "
    headline(
        figure,
        f"Reusing the {chosen.share:.0%} of the sites with the smallest single errors {moves}leaves images at "
        f"{chosen.psnr:.0f} dB ({chosen.psnr_low:.0f} to {chosen.psnr_high:.0f})",
    )
    note = f"n = {oracle.image.nunique()} images; bars: 95%; PSNR: of the mean squared error"
    return save(run, "slide07_delta", figure, oracle, note if by_distance else f"{note}; too few for a distance")


def _growth_intervals(run: Run, oracle: pd.DataFrame) -> pd.DataFrame:
    """95 % intervals of each run's growth of the distance, relative: ``share``, ``growth_low``, ``growth_high``."""
    real = reference_of(run.profile.model, run.recordings)
    assert real is not None  # else there were no distances
    names = oracle.share.map(lambda share: f"{share:g}" if share else FULL.name)
    distances = results.frechet_intervals(oracle.assign(method=names), real)
    full = distances.fd[distances.method == FULL.name].item()
    grown = distances[distances.method != FULL.name]
    ends = {"growth_low": grown.fd_growth_low / full, "growth_high": grown.fd_growth_high / full}
    return pd.DataFrame({"share": grown.method.astype(float), **ends})
