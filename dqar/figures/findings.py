"""Each notebook's answer to its question, in plain sentences whose numbers are computed from its tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import SLIDE14
from dqar.measure import metrics
from dqar.measure.results import Run
from dqar.studies import arena
from dqar.studies import benchmarks as benchmark_tables
from dqar.studies import claims as claims_study
from dqar.studies import pareto as pareto_study
from dqar.studies.compare import only
from dqar.studies.trace import relations

DECIDERS = {"policy": "The network", "oracle": "Measured errors", "rule": "The deck's rule", "chance": "Chance"}
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


def claims(run: Run, gates: pd.DataFrame) -> str:
    """Notebook 00: slide 12's reuses against arithmetic, and the deck's gate."""
    most = claims_study.bounds().set_index(["target", "sites"]).speedup_bound
    deck, own = (only(gates, family=family, target="output") for family in ("deck's gate", "calibrated"))
    return (
        f"Slide 12's numbers contradict each other: 47 reuses of 1400 save at most {1 - 1 / most['output', 47]:.1%} of "
        f"the computation, not 23% of the time; reusing the attention of every layer at every step would save "
        f"{1 - 1 / most['output', 1400]:.0%}. On this model the deck's gate reuses {deck.sites_reused:.0%} of the "
        f"sites. A threshold calibrated on the model reuses {own.sites_reused:.0%} and changes the MACs by "
        f"{1 / own.macs_speedup - 1:+.0%}, with images at {own.psnr:.1f} dB to full compute's."
    )


def trace(run: Run, sites: pd.DataFrame, gated: pd.DataFrame) -> str:
    """Notebook 01: slide 14's patterns."""
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    (first, snr_first), (last, snr_last) = by_step.iloc[0], by_step.iloc[-1]
    above = by_step.snr[by_step.snr > 10]
    when = f"first passes 10 at step {above.index[0]} of {len(by_step)}" if len(above) else "never passes 10"
    reused, lowest = int((gated[gated.family == "deck's gate"].decision == "reuse").sum()), sites.entropy.min()
    return (
        f"Entropy {'falls' if last < first else 'does not fall'}: it starts at {first:.1f} nats and ends at "
        f"{last:.1f}, where the deck says {SLIDE14.entropy.iloc[0]} and {SLIDE14.entropy.iloc[-1]}; "
        f"{sites.tokens.iloc[0]} tokens allow at most {math.log(sites.tokens.iloc[0]):.2f}. The SNR "
        f"{'grows' if snr_last > snr_first else 'does not grow'}, from {snr_first:.1f} to {snr_last:.0f}, and {when}. "
        f"The lowest entropy of a site is {lowest:.1f} nats, and the deck's gate at 2.0 nats reuses {reused} times."
    )


@recorded
def gate(run: Run, sites: pd.DataFrame, labels: pd.DataFrame) -> str:
    """Notebook 02: entropy against the two errors of a reuse."""
    change, error = relations(sites)["entropy"], labels.entropy.corr(labels.error, "spearman")
    if min(change, error) > CLEAR:
        return (
            f"Yes, somewhat, on this model: where entropy is low, a site moves less from one step to the next (rank "
            f"correlation {change:+.2f}), and a reuse leaves a smaller error in the finished image ({error:+.2f})."
        )
    return (
        f"No. Low entropy does not make a reuse safe. Its rank correlation with how far a site moves from one step to "
        f"the next is {change:+.2f}, and with the error that a reuse leaves in the image {error:+.2f}; for the "
        "rule to work, both would have to be clearly positive."
    )


def schedules(run: Run, sites: pd.DataFrame, table: pd.DataFrame) -> str:
    """Notebook 03: shallow layers, and schedules against fewer steps."""
    third, last = sites.layer.max() / 3, sites.step.max()
    later = sites[sites.step > 0.7 * last]
    shallow, deep = (later[part].change.mean() for part in (later.layer < third, later.layer > 2 * third))
    half = only(table, family="static 2", target="output")
    fewer = table[table.family == "fewer steps"].sort_values("macs_speedup")
    rival = float(np.interp(half.macs_speedup, fewer.macs_speedup, fewer.psnr))
    pays = "pays" if half.psnr > rival else "does not pay"
    return (
        f"Shallow layers are {'calmer' if shallow < deep else 'no calmer'} than deep ones late in a run ({shallow:.0%} "
        f"against {deep:.0%} change a step). A fixed schedule {pays}: the attention output reused at every 2nd "
        f"step changes the MACs by {1 / half.macs_speedup - 1:+.0%}, with images at {half.psnr:.1f} dB to full "
        f"compute's; fewer steps at equal MACs give {rival:.1f} dB."
    )


def quantized_cache(run: Run, quality: pd.DataFrame) -> str:
    """Notebook 04: the fewest bits that nobody sees."""
    best = quality[quality.bits < 16].groupby("bits").psnr_cache.max()
    unseen = [int(bits) for bits in sorted(best.index) if best[bits] >= 40]
    fewest = f"{unseen[0]} bits are enough" if unseen else "no width below 16 bits is enough"
    sizes = quality[quality.target == "output"].set_index(["bits", "mode"]).cache_bytes
    half = sizes[8, "per_channel"] / (sizes[16].iloc[0] * 2 / run.profile.dtype.itemsize)
    return (
        f"For images at 40 dB or more to an unquantized cache's, {fewest}: at their best, 8, 4 and 2 bits come to "
        f"{best[8]:.0f}, {best[4]:.0f} and {best[2]:.0f} dB. INT8 does not quite halve FP16's memory, because scales "
        f"are kept too: an attention output takes {half:.2f} of it."
    )


def controller(run: Run, gated: pd.DataFrame) -> str:
    """Notebook 05: the commonest answers."""
    own = gated[(gated.family == "calibrated") & (gated.target == "kv")]
    shares = own.reason.value_counts(normalize=True)
    names = {"reuse": "reused", "entropy": "entropy too high", "snr": "SNR outside its window"}
    names |= {"streak": "reused too often in a row", "no cache": "nothing kept yet", "schedule": "not scheduled"}
    answers = ", ".join(f"{names.get(reason, reason)} {share:.0%}" for reason, share in shares.items())
    return (
        f"With a gate calibrated on this model the controller answered: {answers} (n = {len(own):,}). The code "
        "has slide 10's six parts, and no part imports another that is built on it."
    )


@recorded
def policy(run: Run, deciders: pd.DataFrame) -> str:
    """Notebook 06: the deciders at equal reuse."""
    own = (
        deciders[deciders.target == "output"]
        .groupby(["method", "wanted"], as_index=False)[["mse", "sites_reused"]]
        .mean()
    )
    at = {
        name: float(np.interp(0.2, part.sites_reused, metrics.decibels(part.mse)))
        for name, part in own.sort_values("sites_reused").groupby("method")
    }
    found = ", ".join(f"{DECIDERS[name].lower()} {at[name]:.1f} dB" for name in DECIDERS if name in at)
    lead = at["rule"] - at["chance"]
    rule = "as good as" if abs(lead) < 1 else f"{abs(lead):.1f} dB {'better' if lead > 0 else 'worse'} than"
    return (
        f"{DECIDERS[max(at, key=lambda name: at[name])]}. With 20% of the attention outputs reused, images come to: "
        f"{found}. The deck's rule, low entropy inside an SNR window, is {rule} chance here."
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
    """Notebook 09: the verdicts by name."""

    def names(table: pd.DataFrame, verdict: str) -> str:
        return "; ".join(table[table.verdict == verdict].iloc[:, 0].map(lambda name: f"“{name}”")) or "none"

    untested = "not testable here"
    return (
        f"Of slide 17's claims, these hold: {names(verdicts, 'holds')}. These do not hold on this model: "
        f"{names(verdicts, 'does not hold')}. Not testable here: {names(verdicts, untested)}. Of slide 16's hopes, "
        f"what holds: {names(hopes, 'holds')}; what does not: {names(hopes, 'does not hold')}; not testable here: "
        f"{names(hopes, untested)}."
    )


def benchmarks(tables: Mapping[str, pd.DataFrame]) -> str:
    """Notebook 10: saved computation against saved time."""
    if not tables:
        return "Not measured yet: `dqar benchmark` makes the tables."
    lines = []
    for device, table in tables.items():
        steps = benchmark_tables.summary(table).query("part == 'step'").dropna(subset=["macs_speedup"])
        looking = steps[steps.method.str.contains("look|entropy", regex=True)]
        shares = steps[steps.macs_speedup > 1.01].groupby("family").realised.median()
        saved = ", ".join(f"{family} {share:.0%}" for family, share in shares.items())
        looks = f" Looking at the entropy makes a step up to {looking.cost.max():.2f} times as long." * bool(
            len(looking)
        )
        lines.append(f"On {device}, the clock shows this much of the speedup that the MACs promise: {saved}.{looks}")
    return " ".join(lines)


@recorded
def pareto(run: Run, tables: Mapping[str, pd.DataFrame]) -> str:
    """Notebook 11: plans against every rival, by the verdicts' intervals."""
    found = pd.concat(arena.shown(arena.verdicts(table)).assign(n=table.image.nunique()) for table in tables.values())
    if found.empty:
        return f"No plan has been compared yet for the profile {run.profile.name}."
    lines = []
    for measure, own in found.groupby("measure", sort=False):
        count, least = own.verdict.value_counts(), own.loc[own.lead.idxmin()]
        lines.append(
            f"In the {measure} of {own.n.min()} images, DQAR's forecast plans are ahead of their rivals in "
            f"{count.get('ahead', 0)} of {len(own)} comparisons, level in {count.get('level', 0)}, behind in "
            f"{count.get('behind', 0)} (95% intervals); the smallest lead is {least.lead:+.1f} dB, over {least.family} "
            f"at {least.budget:g}×."
        )
    lossless = max(arena.lossless(table) for table in tables.values())
    if not math.isnan(lossless):
        lines.append(
            f"By both, a plan that takes {lossless:.1f} times fewer MACs is as near to the converged solution as "
            "full compute."
        )
    lines.append(
        "A plan is a solver with fitted numbers: it has to be fitted for each model and number of steps, as learned "
        "solvers do; most other rivals need no fitting."
    )
    return " ".join(lines)


def challenges(run: Run, panel: Figure) -> str:
    """Notebook 08: the finding of the panel that has all five."""
    title = " ".join(panel.get_suptitle().split())
    if not title:
        return f"Not measured yet for the profile {run.profile.name}: `dqar record --profile {run.profile.name}`."
    return f"{title}. The deck's τ(p) was not tested: that takes prompts of many lengths."
