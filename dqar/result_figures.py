"""The figures of slides 7, 12, 13 and 15 to 17, drawn from recorded tables; what is missing is shown as missing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from dqar import benchmark, decisions
from dqar.figures import ACCENT, BLUE, GREEN, GREY, headline, save, save_table
from dqar.results import Run

DECIDERS = {"oracle": "#222222", "policy": ACCENT, "rule": BLUE, "chance": GREY}


def recorded(what: str) -> Callable:
    """For figures of recorded tables: where one is ``None``, the figure says that ``what`` is not measured yet."""

    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def figure_or_gap(run: Run, *tables: pd.DataFrame | None) -> Figure:
            if all(table is not None for table in tables):
                return draw(run, *tables)
            figure, axes = plt.subplots()
            axes.axis("off")
            command = f"python -m dqar.record --profile {run.profile.name}"
            text = f"not measured yet for profile {run.profile.name}:\n{what}\n\n{command}"
            axes.text(0.5, 0.5, text, ha="center", va="center", size=26, color=GREY)
            return save(run, draw.__name__, figure, pd.DataFrame())

        return figure_or_gap

    return decorate


@recorded("errors of single reuses")
def slide07_policy(run: Run, labels: pd.DataFrame, oracle: pd.DataFrame) -> Figure:
    """Training curve, ROC against the rule, calibration, and what each feature is worth."""
    delta, steps = decisions.calibrated_delta(oracle), run.profile.num_inference_steps
    study, ablation = decisions.study(labels, delta, steps), decisions.ablation(labels, delta, steps)
    correlations = decisions.correlations(labels)
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
    correlations = decisions.correlations(labels)
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
    accepted, delta = decisions.accepted_runs(oracle), decisions.calibrated_delta(oracle)
    figure, (left, right) = plt.subplots(1, 2)
    shown = accepted[accepted.share > 0]
    left.plot(shown.share, shown.fd_growth, color=ACCENT, lw=4, marker="o", ms=10)
    left.axhline(decisions.DELTA_FD, color=GREY, ls="--", label="accepted growth")
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


FORECAST = "plan: model's output forecast, every 2nd step"
CLAIMED = {
    # slide 12: ms a step, MB, reuse events, FID
    "full compute": ("11.2", "199", "0", "10.2"),
    "static, kv": ("8.8", "195", "0", "10.5"),
    "W8A8 + CSB": ("10.8", "170", "0", "10.6"),
    "DQAR rule, kv": ("8.6", "163", "47", "10.8"),
}


def slide12_results(run: Run, summary: pd.DataFrame, bounds: pd.DataFrame) -> Figure:
    """The deck's results table: claimed, bound, measured."""
    names = {"full compute": "Baseline", "static, kv": "Static", "W8A8 + CSB": "PTQ4DiT", "DQAR rule, kv": "DQAR"}
    measured = summary.set_index("method")
    most = bounds.set_index(["target", "sites"]).speedup_bound
    limits = {
        "full compute": "weights alone: 1350 MB in FP16",
        "static, kv": f"every 2nd step: 700 events (1,400 with guidance); K, V of all sites: {most['kv', 1400]:.2f}×",
        "W8A8 + CSB": "same MACs; int8 kernels decide",
        "DQAR rule, kv": f"47 events save {1 - 1 / most['kv', 47]:.1%} (kv), {1 - 1 / most['output', 47]:.1%} (output)",
    }
    rows = []
    for method, claim in CLAIMED.items():
        got = measured.loc[method] if method in measured.index else pd.Series(np.nan, index=measured.columns)
        rows.append(
            (
                names[method],
                "{} ms, {} MB, {} events, FID {}".format(*claim),
                limits[method],
                f"{_number(got.ms_per_step, '.1f')} ms ({_number(got.speedup, '.2f')}×), weights "
                f"{_number(got.weight_bytes / 1e6, '.1f')} MB, cache {_number(got.cache_bytes / 1e6, '.2f')} MB, peak "
                f"+{_number(got.added_bytes / 1e6, '.0f')} MB, {_number(got.events, '.0f')} events, FD-digits "
                f"{_number(got.fd, '.2f')}",
            )
        )
    table = pd.DataFrame(
        rows, columns=["Method", "Claimed (DiT-XL/2, A100)", "Bound", f"Measured ({run.profile.name})"]
    )
    title = "Slide 12: what the deck claims, what arithmetic allows, what was measured"
    return save_table(run, "slide12_results", title, table, [10, 28, 32, 52], summary)


def slide12_methods(run: Run, summary: pd.DataFrame) -> Figure:
    """Every method: cost and quality, measured in this project."""
    table = pd.DataFrame(
        {
            "Method": summary.method,
            "ms/step": [_number(x, ".1f") for x in summary.ms_per_step],
            "Speedup (quartiles)": [
                f"{r.speedup:.2f}× ({r.speedup_low:.2f}–{r.speedup_high:.2f})" if r.speedup == r.speedup else "–"
                for r in summary.itertuples()
            ],
            "MACs": [_number(x, ".2f", "×") for x in summary.macs_speedup],
            "Events": [_number(x, ".0f") for x in summary.events],
            "Sites": [_number(x * 100, ".0f", " %") for x in summary.sites_reused],
            "MB: weights, cache, peak +": [
                f"{_number(r.weight_bytes / 1e6, '.1f')}, {_number(r.cache_bytes / 1e6, '.2f')}, "
                f"{_number(r.added_bytes / 1e6, '.0f')}"
                for r in summary.itertuples()
            ],
            "FD-digits (95 %)": [
                f"{r.fd:.2f} ({r.fd_low:.2f}–{r.fd_high:.2f})" if r.fd == r.fd else "–" for r in summary.itertuples()
            ],
            "PSNR": [_number(x, ".1f", " dB") if x != np.inf else "identical" for x in summary.psnr],
            "SSIM": [_number(x, ".4f") for x in summary.ssim],
            "Class": [_number(x * 100, ".1f", " %") for x in summary.class_accuracy],
            "n": [_number(x, ".0f") for x in summary.images],
        }
    )
    title = "All methods, same seeds (MACs: saved over full compute; –: not recorded)"
    return save_table(run, "slide12_methods", title, table, [27, 8, 20, 7, 7, 6, 17, 20, 9, 7, 8, 5], summary)


@recorded("images of every method")
def slide13_quality(run: Run, summary: pd.DataFrame | None) -> Figure:
    """Fréchet distance and PSNR of every method, with intervals."""
    table = summary.dropna(subset=["fd"]).reset_index(drop=True)
    table.attrs = {}
    figure, (left, right) = plt.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    colors = [ACCENT if name.startswith("DQAR") else BLUE if name == "full compute" else GREY for name in table.method]
    spread = [(table.fd - table.fd_low).clip(lower=0), (table.fd_high - table.fd).clip(lower=0)]
    left.barh(table.method, table.fd, xerr=spread, color=colors, capsize=4)
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=13)
    left.set(xlabel="FD-digits to held-out digits (95 %)")
    shown = table[np.isfinite(table.psnr)]
    right.barh(shown.method, shown.psnr, color=[colors[i] for i in shown.index])
    right.set(xlabel="PSNR to full compute (dB)", xlim=(0, 1.2 * shown.psnr.max() if len(shown) else 1))
    right.grid(axis="y", visible=False)
    for y, row in enumerate(table.itertuples()):
        text = "identical" if np.isinf(row.psnr) else f"{row.psnr:.1f}"
        right.annotate(
            text, (0 if np.isinf(row.psnr) else row.psnr, y), (6, 0), textcoords="offset points", va="center", size=14
        )
    others = table[table.method != "full compute"]
    text = f"FD-digits of {int(table.images.max()):,} images"
    if len(others):
        worst = others.loc[others.fd_growth.idxmax()]
        closer, farther = int((others.fd_growth_high < 0).sum()), int((others.fd_growth_low > 0).sum())
        text += (
            f": {farther} of {len(others)} methods are farther from the data than full compute, {closer} are closer; "
            f"largest growth {worst.fd_growth:+.2f} ({worst.method})"
        )
    headline(figure, text)
    return save(run, "slide13_quality", figure, summary)


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
        own = benchmark.summary(table)
        own = own[own.part.isin(["step", "compiled"]) & (own.method != "eager, plain")].reset_index(drop=True)
        colors = [ACCENT if "plan" in name else BLUE if "plain" in name else GREY for name in own.method]
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
    delta, steps = decisions.calibrated_delta(oracle), run.profile.num_inference_steps
    studies = {
        name: decisions.study(labels, delta, steps, l2=l2, patience=None, max_epochs=150)
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


def slide16_future_work(run: Run, directions: pd.DataFrame) -> Figure:
    """Each direction of slide 16 with what is measured of it already."""
    table = directions.rename(columns=str.capitalize)
    title = "Slide 16: what of the future work is measured already"
    return save_table(run, "slide16_future_work", title, table, [28, 32, 64], directions)


def slide17_conclusions(run: Run, verdicts: pd.DataFrame) -> Figure:
    """Each claim of slide 17 with its verdict and the reason."""
    table = verdicts.rename(columns=str.capitalize)
    return save_table(run, "slide17_conclusions", "Slide 17: what holds", table, [36, 20, 68], verdicts)


def _at_equal_share(runs: pd.DataFrame, share: float = 0.2) -> dict[str, float]:
    """PSNR of each decider at ``share`` of the sites, between the runs on either side of it."""
    found = {}
    for name, part in runs.groupby("method"):
        part = part.sort_values("sites_reused")
        if part.sites_reused.min() <= share <= part.sites_reused.max():
            found[name] = float(np.interp(share, part.sites_reused, part.psnr))
    return found


def _number(value: float, spec: str, unit: str = "") -> str:
    return "–" if value != value else f"{value:{spec}}{unit}"
