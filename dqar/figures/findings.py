"""Each notebook's answer to its question, in plain sentences whose numbers are computed from its tables."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from dqar.figures.style import SLIDE14
from dqar.measure import metrics
from dqar.measure.results import Run
from dqar.studies import arena
from dqar.studies import benchmarks as benchmark_tables
from dqar.studies import challenges as challenges_study
from dqar.studies import claims as claims_study
from dqar.studies import pareto as pareto_study
from dqar.studies import policy as policy_study
from dqar.studies import schedules as schedules_study
from dqar.studies.compare import only
from dqar.studies.trace import relations

DECIDERS = {"policy": "The network", "oracle": "Measured errors", "rule": "The deck's rule", "chance": "Chance"}
WORKS = "works here"
CLEAR = 0.1
"""The rank correlation above which a signal is said to tell something."""


def recorded(answer: Callable[..., str]) -> Callable[..., str]:
    """Where a table that an answer needs is ``None`` or empty, the answer says so."""

    @functools.wraps(answer)
    def answer_or_gap(run: Run, *tables: pd.DataFrame | Mapping | None) -> str:
        if all(table is not None and len(table) for table in tables):
            return answer(run, *tables)
        name = run.profile.name
        return f"Not measured yet for the profile {name}: `dqar record --profile {name}` makes the tables."

    return answer_or_gap


def _saved(macs_speedup: float) -> str:
    """What a method does to the MACs, as a verb: looking may cost more than reuse saves."""
    saved = 1 - 1 / macs_speedup
    return f"saves {saved:.0%} of the MACs" if saved >= 0 else f"takes {-saved:.0%} more MACs"


def claims(run: Run, gates: pd.DataFrame) -> str:
    """Notebook 00: slide 12's reuses against arithmetic, and the deck's gate."""
    most = claims_study.bounds().set_index(["target", "sites"]).speedup_bound
    deck, calibrated = (only(gates, family=family, target="output") for family in ("deck's gate", "calibrated"))
    return (
        f"Slide 12's numbers contradict each other: 47 reuses of 1400 save at most {1 - 1 / most['output', 47]:.1%} of "
        f"the computation, not 23% of the time; reusing the attention of every layer at every step would save "
        f"{1 - 1 / most['output', 1400]:.0%}. On this model the deck's gate reuses {deck.sites_reused:.0%} of the "
        f"sites. A threshold calibrated on the model reuses {calibrated.sites_reused:.0%} and "
        f"{_saved(calibrated.macs_speedup)}, with images at {calibrated.psnr:.1f} dB to full compute's."
    )


def trace(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> str:
    """Notebook 01: slide 14's patterns."""
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    (first, snr_first), (last, snr_last) = by_step.iloc[0], by_step.iloc[-1]
    above = by_step.snr[by_step.snr > 10]
    dip = f" after a low of {by_step.snr.min():.1f} at step {by_step.snr.idxmin()}" if by_step.snr.idxmin() else ""
    when = f"first passes 10 at step {above.index[0]} of {len(by_step)}" if len(above) else "never passes 10"
    falling = (by_step.entropy.diff().dropna() <= 0).mean()
    falls = "does not fall" if last >= first else "falls" if falling == 1 else "falls, but not steadily"
    reused, lowest = int((gated[gated.family == "deck's gate"].decision == "reuse").sum()), sites.entropy.min()
    return (
        f"Entropy {falls}: it starts at {first:.2f} nats, ends at {last:.2f} and falls in {falling:.0%} of the steps; "
        f"the deck says from {SLIDE14.entropy.iloc[0]} to {SLIDE14.entropy.iloc[-1]}, and in all of them; "
        f"{sites.tokens.iloc[0]} tokens allow at most {math.log(sites.tokens.iloc[0]):.2f}. The SNR "
        f"{'grows' if snr_last > snr_first else 'does not grow'}, from {snr_first:.1f} to {snr_last:.0f}{dip}, and "
        f"{when}. The lowest entropy of a site is {lowest:.1f} nats (mean of {run.profile.num_samples} images), and "
        f"the deck's gate at 2.0 nats reuses {reused} times."
    )


@recorded
def gate(run: Run, sites: pd.DataFrame, labels: pd.DataFrame) -> str:
    """Notebook 02: entropy against the two errors of a reuse."""
    change, error = relations(sites)["entropy"], labels.entropy.corr(labels.error, "spearman")
    held = policy_study.partial_correlation(labels, "entropy", ("step", "snr"))
    if min(change, error, held) > CLEAR:
        return (
            "Yes, somewhat, on this model: where entropy is low, a site moves less from one step to the next (rank "
            f"correlation ρ(entropy, change) = {change:+.2f}), and a reuse leaves a smaller error in the finished "
            f"image (ρ(entropy, error) = {error:+.2f}; with step and SNR held fixed {held:+.2f})."
        )
    return (
        "No. Low entropy does not make a reuse safe. The rank correlation of entropy with how far a site moves from "
        f"one step to the next, ρ(entropy, change), is {change:+.2f}; that with the error that a reuse leaves in the "
        f"image, ρ(entropy, error), is {error:+.2f}, and with step and SNR held fixed {held:+.2f} (n = {len(labels):,} "
        f"single reuses in {labels.image.nunique()} images). For the rule to work, both of these would have to be "
        "clearly positive; the one with the change says only which sites move slowly."
    )


def schedules(run: Run, sites: pd.DataFrame, table: pd.DataFrame) -> str:
    """Notebook 03: whether shallow layers stabilise first, and schedules against fewer steps."""
    change = schedules_study.settling(sites, run.profile.num_inference_steps)
    early, late = (change[part] for part in ("early", "late"))
    first = all(part.shallow < min(part.middle, part.deep) for part in (early, late))
    half = only(table, family="static 2", target="output")
    fewer = table[table.family == "fewer steps"].sort_values("macs_speedup")
    rival = float(np.interp(half.macs_speedup, fewer.macs_speedup, fewer.psnr))
    pays = "pays" if half.psnr > rival else "does not pay"
    verdict = "Yes, shallow layers stabilise first" if first else "No, shallow layers do not stabilise first"
    return (
        f"{verdict}: in the first 30% of a run they change by {early.shallow:.0%} a step and deep layers by "
        f"{early.deep:.0%}, in the last 30% by {late.shallow:.0%} and {late.deep:.0%} (medians). A fixed schedule "
        f"{pays}: the attention output reused at every 2nd step {_saved(half.macs_speedup)}, with images at "
        f"{half.psnr:.1f} dB to full compute's; fewer steps at equal MACs give {rival:.1f} dB."
    )


def quantized_cache(run: Run, quality: pd.DataFrame) -> str:
    """Notebook 04: the fewest bits that nobody sees."""
    integers = quality[(quality.bits < 16) & (quality["mode"] != "mixed")]  # which keeps K in FP16
    best = integers.groupby("bits")["median"].max()
    unseen = [int(bits) for bits in sorted(best.index) if best[bits] >= 40]
    fewest = f"{unseen[0]} bits are enough" if unseen else "no width below 16 bits is enough"
    sizes = quality[quality.target == "output"].set_index(["bits", "mode"]).cache_bytes
    tables = [run.recorded(name) for name in ("bits-layers-output", "bits-output")]
    half = sizes[8, "per_channel"] / (sizes[16].iloc[0] * 2 / run.profile.dtype.itemsize)
    return (
        f"For a median image at 40 dB or more to an unquantized cache's, {fewest}: at their best, 8, 4 and 2 bits come "
        f"to {best[8]:.0f}, {best[4]:.0f} and {best[2]:.0f} dB (n = {quality.images.iloc[0]}). INT8 does not quite "
        f"halve FP16's memory, because scales are kept too: an attention output takes {half:.2f} of it."
        + (layers_apart(*tables) if all(table is not None for table in tables) else "")
    )


def layers_apart(layers: pd.DataFrame, mixed: pd.DataFrame) -> str:
    """How far apart layers are in what their bits do, and what that spares.

    Args:
        layers, mixed: ``bits-layers-…`` and ``bits-…`` of ``quantized_cache.record_bits``.
    """
    alone = metrics.decibels(layers[layers.bits == 2].groupby("layer").mse.mean())
    points = arena.standings(mixed, "reference", ("family", "share")).set_index("method")
    four, cheap = points.loc["INT4"], points[points.family == "mixed"].sort_values("share").iloc[-2]
    return (
        f" Layers differ: with the output of one alone in 2 bits, images have {alone.min():.0f} dB (layer "
        f"{alone.idxmin()}) to {alone.max():.0f} dB (layer {alone.idxmax()}). With bits chosen for each, "
        f"{cheap.share:.2f} of FP16's memory gives {cheap['median']:.1f} dB, where INT4 takes {four.share:.2f} for "
        f"{four['median']:.1f} dB (n = {mixed.image.nunique()})."
    )


def controller(run: Run, gated: pd.DataFrame) -> str:
    """Notebook 05: the commonest answers."""
    asked = gated[(gated.family == "calibrated") & (gated.target == "kv")]
    shares = asked.reason.value_counts(normalize=True)
    names = {"reuse": "reused", "entropy": "entropy too high", "snr": "SNR outside its window"}
    names |= {"streak": "reused too often in a row", "no cache": "nothing kept yet", "schedule": "not scheduled"}
    answers = ", ".join(f"{names.get(reason, reason)} {share:.0%}" for reason, share in shares.items())
    return (
        f"With a gate calibrated on this model the controller answered: {answers} (n = {len(asked):,}). The code "
        "has slide 10's six parts, and no part imports another that is built on it."
    )


@recorded
def policy(run: Run, deciders: pd.DataFrame, labels: pd.DataFrame, oracle: pd.DataFrame) -> str:
    """Notebook 06: the deciders at equal reuse, and the network with and without entropy (means of 3 trainings)."""
    runs = policy_study.runs_of_deciders(deciders)
    at = policy_study.psnr_at_share(runs[runs.target == "output"])
    images = ", ".join(f"{DECIDERS[name].lower()} {at[name]:.1f} dB" for name in DECIDERS if name in at)
    best = DECIDERS[max(at, key=lambda name: at[name])] if at else "None"
    lead, low, high = policy_study.lead_at_share(deciders, "rule", "chance")
    delta, steps = policy_study.calibrated_delta(oracle), run.profile.num_inference_steps
    whole, without = (
        np.mean([policy_study.study(labels, delta, steps, omit=omit, seed=seed).auc() for seed in range(3)])
        for omit in (None, "entropy")
    )
    gain = whole - without
    number = deciders.image.nunique()
    helps = "does not help the network" if gain <= 0 else "helps the network" + " little" * bool(gain < 0.02)
    rule = "better than" if low > 0 else "worse than" if high < 0 else "no better than"
    rule = "not comparable with" if math.isnan(lead) else rule
    interval = "" if math.isnan(lead) else f" ({lead:+.1f} dB, {low:+.1f} to {high:+.1f})"
    return (
        f"{best}. With 20% of the attention outputs reused, the median of {number} images comes to: {images}. The "
        f"deck's rule, low entropy inside an SNR window, is {rule} chance here{interval}. Entropy {helps}: the area "
        f"under the network's ROC curve on unseen classes is {whole:.2f} with it and {without:.2f} without."
    )


@recorded
def results(run: Run, summary: pd.DataFrame) -> str:
    """Notebook 07: the deck's method and a plan."""
    kv, output = (only(summary, family="DQAR rule", target=target) for target in ("kv", "output"))
    plan = only(summary, family=pareto_study.PLAN, budget=2)
    if math.isnan(kv.speedup) or math.isnan(plan.speedup):
        return f"Speed is not measured yet for the profile {run.profile.name}."
    faster = [row.speedup > 1 for row in (kv, output)]
    time = "saves time here" if all(faster) else "costs time here" if not any(faster) else "saves time in one form"
    return (
        f"The deck's own method {time}: a gate runs at {kv.speedup:.2f} (K and V) and {output.speedup:.2f} "
        f"(attention output) times full compute's speed, with images at {kv.psnr:.1f} and {output.psnr:.1f} dB. A "
        f"forecast plan of half the MACs runs at {plan.speedup:.2f} times full speed, with images at "
        f"{plan.psnr:.1f} dB (n = {plan.images:,.0f} images each)."
    )


def conclusions(verdicts: pd.DataFrame, hopes: pd.DataFrame) -> str:
    """Notebook 09: the verdicts by name, with the number that each rests on."""

    def names(table: pd.DataFrame, reason: str, verdict: str) -> str:
        those = table[table.verdict == verdict]
        numbers = those[reason].map(_first_number) if verdict != "not testable here" else [""] * len(those)
        return "; ".join(f"“{name}”{number}" for name, number in zip(those.iloc[:, 0], numbers, strict=True)) or "none"

    lines = []
    for what, table, reason in (("claims", verdicts, "reason"), ("hopes", hopes, "measured")):
        count = table.verdict.value_counts()
        counts = (
            f"{count.get(verdict, 0)} {one if count.get(verdict) == 1 else more}: {names(table, reason, verdict)}"
            for verdict, one, more in (
                ("holds", "holds here", "hold here"),
                ("does not hold", "does not hold", "do not hold"),
                ("not certain", "is not certain", "are not certain"),
                ("not testable here", "can't be tested here", "can't be tested here"),
            )
            if verdict != "not certain" or verdict in count
        )
        lines.append(f"Of slide {17 if what == 'claims' else 16}'s {len(table)} {what}, {'. '.join(counts)}.")
    return " ".join(lines)


def _first_number(reason: str) -> str:
    """In brackets, the first part of a reason that has a number in it; ``""`` where none has."""
    parts = re.split(r"(?<=[.;]) ", reason)
    return next((f" ({part.rstrip('.;')})" for part in parts if any(map(str.isdigit, part))), "")


def benchmarks(tables: Mapping[str, pd.DataFrame], deciding: pd.DataFrame) -> str:
    """Notebook 10: saved computation against saved time, the targets, and kept modulations.

    Args:
        tables: of ``benchmarks.recorded``.
        deciding: of ``overhead.summary``.
    """
    if not tables:
        return "Not measured yet: `dqar benchmark` makes the tables."
    lines = []
    for device, table in tables.items():
        steps = benchmark_tables.summary(table).query("part == 'step'").dropna(subset=["macs_speedup"])
        shares = steps[steps.macs_speedup > 1.01].groupby("family").realised.median()
        saved = ", ".join(f"{family} {share:.0%}" for family, share in shares.items())
        targets = benchmark_tables.targets(table)
        missed = "; ".join(f"{row.target}: {row.measured:.3f} (goal {row.bound:g})"
                           for row in targets[~targets.met.astype(bool)].itertuples())  # fmt: skip
        lines.append(
            f"On {device}, at DiT-XL/2's size, the clock shows this much of the speedup that the MACs promise: {saved}."
            f" Looking at the exact entropy of every site adds {targets.measured.iloc[0]:.0%} to a step. "
            f"{targets.met.sum()} of {len(targets)} targets are met; missed: {missed or 'none'}."
        )
    output = only(deciding, method="attention output, INT8")
    lines.append(
        f"On the digits model, {deciding.met.sum()} of {len(deciding)} goals for what deciding costs are met where the "
        f"modulations are made anew, {deciding.met_kept.sum()} where they are kept from run to run: with reuse of "
        f"the attention output in INT8, keeping them turns a speedup of {output.anew:.2f} into {output.kept:.2f}."
    )
    return " ".join(lines)


@recorded
def pareto(run: Run, tables: Mapping[str, pd.DataFrame]) -> str:
    """Notebook 11: plans against every rival, by the verdicts' intervals."""
    lines = _plans_and_rivals(tables)
    if not lines:
        return f"No plan has been compared yet for the profile {run.profile.name}."
    if photographs := arena.of_photographs(run):
        [first, *others] = _plans_and_rivals({"photographs": photographs[1]})
        lines += [f"On photographs: {first[0].lower()}{first[1:]}", *others]
    lines.append(
        "A plan is a solver with fitted numbers: it has to be fitted for each model and number of steps, as learned "
        "solvers do; most other rivals need no fitting."
    )
    return " ".join(lines)


def _plans_and_rivals(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Where plans stand among their rivals, and from how many MACs on they are as good as full compute."""
    parts = []
    for table in tables.values():
        judged = arena.shown(arena.verdicts(table))
        parts.append(
            judged.assign(n=judged.target.map({target: arena.images(table, target) for target in arena.ERRORS}))
        )
    verdicts, lines = pd.concat(parts, ignore_index=True), []
    for measure, judged in verdicts.groupby("measure", sort=False):
        count, least = judged.verdict.value_counts(), judged.loc[judged.lead.idxmin()]
        lines.append(
            f"In the {measure} of {judged.n.min():,} images{' or more' * (judged.n.nunique() > 1)}, DQAR's forecast "
            f"plans are ahead of their rivals in {count.get('ahead', 0)} of {len(judged)} comparisons, level in "
            f"{count.get('level', 0)}, behind in {count.get('behind', 0)} (95% intervals); the smallest lead is "
            f"{least.lead:+.1f} dB, over {least.family} at {least.budget:g}×."
        )
    for table in tables.values():
        lossless = arena.lossless(table)
        if lines and not math.isnan(lossless):
            lines.append(
                f"By median and 5th percentile, a plan that takes {lossless:.1f} times fewer MACs is as near to "
                "the converged solution as full compute."
            )
    return lines


@recorded
def challenges(
    run: Run,
    labels: pd.DataFrame,
    oracle: pd.DataFrame,
    accumulation: pd.DataFrame,
    overhead: pd.DataFrame,
    sharing: pd.DataFrame,
) -> str:
    """Notebook 08: a verdict on each of the deck's five solutions, from the tables of slide 15's figure."""
    measured = challenges_study.solutions(
        labels, oracle, accumulation, overhead, sharing, run.profile.num_inference_steps
    )
    plain, balanced, channel = (measured.off[name] for name in ("per tensor", "per tensor + CSB", "per channel"))
    gain, better = measured.auc - measured.auc_without_l2, "helps here, but a scale a channel helps more"
    cost, shared = measured.looking.loc[0.5], measured.shared
    rows = (
        (
            "threshold calibration",
            "can't be tested here",
            f"τ(p) needs prompts of many lengths; entropy varies by {measured.within:.2f} nats from site to site",
        ),
        (
            "balancing of channels",
            WORKS if balanced < min(plain, channel) else better if balanced < plain else "does not help here",
            f"in INT8 the latents end {balanced:.2%} off, {plain:.2%} without it; with a scale a channel {channel:.2%}",
        ),
        (
            "L2 against overfitting",
            WORKS if gain > 0.005 else "does harm here" if gain < -0.005 else "makes no difference here",
            f"area under the ROC curve on unseen classes {measured.auc:.3f} with it, "
            f"{measured.auc_without_l2:.3f} without",
        ),
        (
            "entropy in one pass",
            WORKS if cost["fused"] <= 0.1 else "costs too much here",
            f"it adds {cost['fused']:.0%} to a step, whole maps {cost['maps']:.0%}; at every 4th step it adds "
            f"{cost['fused, every 4th step']:.0%}",
        ),
        (
            "sharing of branches",
            WORKS if shared.psnr >= 40 else "costs too much quality here",
            f"at most it {_saved(shared.macs_speedup)}, with images at {shared.psnr:.0f} dB; separate caches, the "
            "other half of this solution, are exact",
        ),
    )
    good = ", ".join(name for name, verdict, _ in rows if verdict == WORKS)
    answers = "\n".join(
        f"{number}. {name[0].upper()}{name[1:]} {verdict}: {why}."
        for number, (name, verdict, why) in enumerate(rows, 1)
    )
    if good:
        return f"Of the deck's five solutions, these work here: {good}.\n\n{answers}"
    return f"None of the deck's five solutions is the best choice here, and one can't be tested.\n\n{answers}"
