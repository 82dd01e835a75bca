"""Figures of notebook 11: quality against speed, of plans, peers and forecasting caches (slides 6, 8, 12, 13)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image as DisplayedImage
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.transforms import Transform

from dqar.figures.style import (
    ACCENT,
    BLUE,
    COMPUTE,
    DARK,
    GREEN,
    GREY,
    REHEARSAL,
    SMALLEST,
    add_footer,
    frame_of,
    headline,
    missing,
    mosaic,
    plain_ticks,
    recorded,
    save,
    save_animation,
    save_plain_table,
    save_table,
    write_table,
)
from dqar.forecast.fit import Target
from dqar.forecast.plan import ForecastPlan
from dqar.measure.results import Run, provenance, slug
from dqar.models.profiles import Profile
from dqar.peers.registry import ALL_RIVALS, RIVALS
from dqar.studies import arena, cache_memory, pareto, plans
from dqar.studies.compare import FULL
from dqar.studies.recording import Sizes

SAMPLER_NAMES = {"dpm-solver++": "DPM-Solver++", "ddim": "DDIM"}
KINDS = {
    "DQAR plan": (ACCENT, "D"),
    "learned solver": ("#CC79A7", "P"),
    "fewer steps": (GREY, "X"),
    "output extrapolation": (BLUE, "o"),
    "best cache": (GREEN, "s"),
    "DQAR inside the blocks": ("#E69F00", "v"),
}
"""Looks of ``arena.KINDS``' kinds and of the best cache, in the order in which they are drawn."""
WAYS = {
    plans.LADDER: (ACCENT, "D"),
    plans.NETWORK: ("#CC79A7", "P"),
    plans.MIX: (BLUE, "o"),
    plans.FIXED: (GREY, "X"),
}
SIGNS = {"ahead": "✓", "level": "=", "behind": "✗"}


def slide13_fronts(run: Run, tables: dict[str, pd.DataFrame]) -> list[Figure]:
    """Every kind of method at its best at each budget: median, mean and 5th percentile of PSNR, in dB.

    Args:
        tables: of ``arena.recorded``, by sampler: a picture each. One more is of photographs, once they are recorded.
    """
    pictures = []
    for sampler, table in tables.items():
        name = f"slide13_fronts_{slug(sampler).replace('-', '_')}"
        where = f"On {_model(run.profile)} with {SAMPLER_NAMES[sampler]}"
        pictures.append(_front(run, name, where, table, sampler))
    if photographs := arena.of_photographs(run):
        other_run, table = photographs
        where = "On photographs of 32 × 32 pixels"
        pictures.append(_front(other_run, "slide13_fronts_photographs", where, table, other_run.profile.scheduler))
    return pictures or [missing(run, "slide13_fronts", "many images of every method at its best")]


def _front(run: Run, name: str, where: str, table: pd.DataFrame, sampler: str) -> Figure:
    figure, panels, below = _two_panels(legend_height=1.1)
    for axes, (target, label) in zip(panels, _targets(run.profile).items(), strict=True):
        number = arena.images(table, target)
        axes.set_title(f"to {label}" + f", n = {number:,}" * (number > 0))
        if number:
            _draw_kinds(axes, arena.best_of_kinds(table, target))
        else:
            _not_measured(axes, 0.4, axes.transAxes, sampler)
            axes.tick_params(labelbottom=False)
    if "converged" in arena.measured(table):
        points = arena.standings(table, "converged")
        full = points[points.family == FULL.name]["median"].iloc[0]
        panels[1].axhline(full, color=DARK, ls="--", lw=2, label="full compute itself")
    drawn = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    named = {kind: drawn[kind] for kind in (*KINDS, *drawn) if kind in drawn}
    tight = {"handlelength": 1.0, "handletextpad": 0.4, "columnspacing": 1.2, "ncols": 4}
    below.legend(named.values(), named.keys(), loc="center", fontsize=SMALLEST, **tight)
    panels[0].set_ylabel("PSNR (dB)")
    headline(figure, f"{where}, {_lead(arena.verdicts(table).assign(sampler=''))}{rivals_drawn(run, [table])}")
    return save(run, name, figure, table, "line: median to 5th percentile, ○: of the mean squared error; n: images")


def _targets(profile: Profile) -> dict[Target, str]:
    """What images are compared with, in words."""
    return {"reference": f"the {profile.num_inference_steps}-step reference", "converged": "the converged solution"}


def _two_panels(legend_height: float) -> tuple[Figure, list[Axes], Axes]:
    """Two panels beside each other with one y axis, and below them a row for their legend."""
    figure, axes = plt.subplot_mosaic([["left", "right"], ["legend", "legend"]], height_ratios=(7, legend_height))
    panels = [axes["left"], axes["right"]]
    panels[1].sharey(panels[0])
    panels[1].tick_params(labelleft=False)
    axes["legend"].axis("off")
    return figure, panels, axes["legend"]


def _not_measured(axes: Axes, y: float, transform: Transform, sampler: str) -> None:
    """Says so, or that nothing is compared with the converged solution under this sampler."""
    compared = "converged" in pareto.targets(sampler)
    text = "not measured" if compared else f"not compared under {SAMPLER_NAMES[sampler]}"
    axes.text(0.5, y, text, transform=transform, ha="center", va="center", size=SMALLEST)


def _draw_kinds(axes: Axes, points: pd.DataFrame) -> None:
    budgets = sorted(points.budget.unique()) if len(points) else []
    for number, (kind, (color, marker)) in enumerate(KINDS.items()):  # each in its place, drawn or not
        if not len(points) or kind not in set(points.kind):
            continue
        line = points[points.kind == kind].set_index("budget").reindex(budgets)
        where = np.arange(len(budgets)) + 0.14 * (number - (len(KINDS) - 1) / 2)
        axes.vlines(where, line["5th percentile"], line["median"], color=color, lw=3)
        axes.plot(where, line["5th percentile"], "_", color=color, ms=12, mew=3)
        axes.plot(where, line["median"], marker, color=color, ms=12, ls="none", label=kind)
        axes.plot(where, line["mean"], "o", mfc="white", mec=color, ms=7, mew=2)
    axes.set_xticks(range(len(budgets)), [f"{budget:g}×" for budget in budgets])
    axes.set(xlabel="at least so many times fewer MACs", xlim=(-0.5, max(len(budgets), 1) - 0.5))


def rivals_drawn(run: Run, tables: Iterable[pd.DataFrame]) -> str:
    """How many of the rivals that are fast enough to be compared have been drawn on many images, for a title.

    Nothing where all have been; else it says too if no learned solver is among them.
    """
    solvers = set(pareto.SOLVERS.values())
    fastest = arena.fastest(run)
    slow = set(fastest.index[fastest < arena.BUDGETS[0]])
    rivals = {"fewer steps", "output extrapolation", *solvers, *RIVALS} - slow
    drawn = rivals & {family for table in tables for family in table.family}
    if drawn == rivals:
        return ""
    return f" ({len(drawn)} of {len(rivals)} rivals drawn so far{'' if drawn & solvers else ', no learned solver'})"


def _lead(verdicts: pd.DataFrame) -> str:
    """Where the plans stand, in words that follow from the intervals; ``sampler`` is a column of the verdicts."""
    judged = arena.shown(verdicts)
    if judged.empty:
        return "no plan is measured beside a rival yet"
    count, least = judged.verdict.value_counts(), judged.loc[judged.lead.idxmin()]
    rivals, all_of_them = judged.family.nunique(), len(judged)
    if count.get("ahead", 0) == all_of_them:
        # Under several samplers and targets, so many under each.
        drawn_at = judged.groupby(["sampler", "target", "budget"]).family.nunique().groupby("budget")
        drawn = [f"{_range(numbers)} at {budget:g}×" for budget, numbers in drawn_at]
        rivals_at = drawn[0].replace(" at", " rivals at") + "".join(f", {more}" for more in drawn[1:])
        certain = f"{least.lead:.1f} dB ({least.lead_low:.1f} to {least.lead_high:.1f}) or more"
        return f"DQAR's plans are ahead of {rivals_at}, in the median and the tail, by {certain}"
    return (
        f"DQAR's plans are ahead of {rivals} rivals in {count.get('ahead', 0)} of {all_of_them} comparisons, level in "
        f"{count.get('level', 0)}, behind in {count.get('behind', 0)}"
    )


def slide12_pareto(run: Run, tables: dict[str, pd.DataFrame]) -> Figure:
    """At each budget: DQAR's plan, the strongest rival, and who is ahead; every rival stands in the Markdown."""
    judged = [arena.verdicts(table).assign(sampler=name) for name, table in tables.items()]
    distances = [_distances(*pair) for pair in zip(tables.values(), judged, strict=True)]
    if not any(map(len, judged)):
        return missing(run, "slide12_pareto", "many images of every method at its best")
    verdicts = pd.concat(judged, ignore_index=True)
    verdicts["sampler"] = verdicts.sampler.map(SAMPLER_NAMES)
    verdicts["target"] = verdicts.target.map(_targets(run.profile)).str.removeprefix("the ")
    facing = pd.concat(arena.strongest(arena.shown(part)) for _, part in verdicts.groupby("sampler", sort=False))
    facing["cell"] = [f"{row.ours:.1f} / {row.theirs:.1f} {SIGNS[row.verdict]}" for row in facing.itertuples()]
    wide = facing.pivot(index=["sampler", "target", "measure"], columns="budget", values="cell")
    wide = wide.reindex(facing.set_index(["sampler", "target", "measure"]).index.unique()).fillna("–").reset_index()
    wide.columns = ["Sampler", "PSNR to", "Measure", *(f"{budget:g}×" for budget in wide.columns[3:])]
    table = next(iter(tables.values()))
    signs = ", ".join(f"{sign} {name}" for name, sign in SIGNS.items())
    note = f"plan / rival (dB); {signs} (95% interval); n = {_numbers(tables.values())}"
    widths = [14, 18, 14, *[13] * (len(wide.columns) - 3)]
    title = f"On {_model(run.profile)}, {_lead(verdicts)}{rivals_drawn(run, tables.values())}"
    figure = save_table(run, "slide12_pareto", title, wide, widths, table, note)
    shown = pd.DataFrame(
        {
            "sampler": verdicts.sampler,
            "PSNR to": verdicts.target,
            "MAC reduction": verdicts.budget.map("{:g}×".format),
            "measure": verdicts.measure,
            "DQAR's plan (dB)": verdicts.ours.map("{:.1f}".format),
            "rival": verdicts.method,
            "rival (dB)": verdicts.theirs.map("{:.1f}".format),
            "lead (dB), 95%": _leads(verdicts),
            "verdict": verdicts.verdict,
            f"{run.profile.distance}: plan / rival (images)": list(itertools.chain(*distances)),
        }
    )
    write_table(run, "slide12_pareto", shown)
    return figure


def slide13_conditions(run: Run, tables: dict[arena.Condition, pd.DataFrame]) -> Figure:
    """The plan's lead over the strongest rival, with its interval, wherever it has been recorded.

    Args:
        tables: of ``arena.conditions``.
    """
    judged = {condition: arena.shown(arena.verdicts(table)) for condition, table in tables.items()}
    judged = {condition: verdicts for condition, verdicts in judged.items() if len(verdicts)}
    if not judged:
        return missing(run, "slide13_conditions", "many images of every method at its best")
    figure, panels, below = _two_panels(legend_height=0.4)
    panels[1].sharex(panels[0])
    rows, ticks, place = [], dict[float, str](), 0.0
    for condition, verdicts in judged.items():
        facing, drawn = arena.strongest(verdicts), tables[condition]
        at = {budget: place + line for line, budget in enumerate(sorted(facing.budget.unique()))}
        ticks |= {line: f"{budget:g}×" for budget, line in at.items()}
        names = {"condition": _where(condition), "latents": condition.latents}
        number = facing.target.map({target: arena.images(drawn, target) for target in arena.ERRORS})
        rows.append(facing.assign(**names, n=number, place=facing.budget.map(at)))
        rivals = _range(verdicts.groupby(["target", "budget"]).family.nunique())
        beside = (
            f"{_where(condition).replace(', guidance', chr(10) + 'guidance')}\nn = {_numbers([drawn])}, {rivals} rivals"
        )
        where, middle = panels[0].get_yaxis_transform(), sum(at.values()) / len(at)
        panels[0].text(-0.16, middle, beside, transform=where, ha="right", va="center", size=SMALLEST)
        for axes, target in zip(panels, arena.ERRORS, strict=True):
            if target not in set(facing.target):
                _not_measured(axes, middle, axes.get_yaxis_transform(), condition.sampler)
        place += len(at) + 0.6
    table = pd.concat(rows, ignore_index=True)
    table.attrs = next(iter(tables.values())).attrs
    for axes, (target, title) in zip(panels, _targets(run.profile).items(), strict=True):
        for measure, color, marker, shift in (("median", ACCENT, "D", -0.15), ("5th percentile", DARK, "o", 0.15)):
            part = table[(table.target == target) & (table.measure == measure)]
            spread = [part.lead - part.lead_low, part.lead_high - part.lead]
            axes.errorbar(
                part.lead,
                part.place + shift,
                xerr=spread,
                fmt=marker,
                color=color,
                ms=9,
                lw=3,
                capsize=4,
                label=measure,
            )
        axes.axvline(0, color=GREY, ls="--", lw=2, zorder=0.8)
        axes.set_title(f"to {title}")
        axes.set(xlabel="lead (dB)", ylim=(place - 0.9, -0.7))
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(list(ticks), list(ticks.values()), size=SMALLEST)
    below.legend(*panels[0].get_legend_handles_labels(), loc="center", ncols=2, fontsize=SMALLEST, borderpad=0.2)
    headline(figure, leads_in_words(table))
    shown = table.assign(to=table.target.map(_targets(run.profile)))[
        ["condition", "n", "to", "budget", "measure", "plan", "method", "verdict"]
    ]
    shown = shown.rename(columns={"method": "strongest rival"})
    shown["lead (dB), 95%"] = _leads(table)
    write_table(run, "slide13_conditions", shown)
    return save(run, "slide13_conditions", figure, table, "n: images; rivals: from 4× to 2×; bars: 95%, paired")


def _numbers(tables: Iterable[pd.DataFrame]) -> str:
    """Of how many images some tables have errors to their targets."""
    numbers = dict.fromkeys(arena.images(table, target) for table in tables for target in arena.ERRORS)
    return " and ".join(f"{number:,}" for number in numbers if number)


def _range(numbers: pd.Series) -> str:
    """The least and the most of some counts, or the only one."""
    return " to ".join(map(str, dict.fromkeys((numbers.min(), numbers.max()))))


def _leads(verdicts: pd.DataFrame) -> list[str]:
    """Each lead with its interval, as a cell."""
    return [f"{row.lead:.1f} ({row.lead_low:.1f} to {row.lead_high:.1f})" for row in verdicts.itertuples()]


def _distances(table: pd.DataFrame, verdicts: pd.DataFrame) -> list[str]:
    """The Fréchet distances to test data of each plan and rival, and of how many images they are, as a cell."""
    if "fd" not in table:
        return ["–"] * len(verdicts)
    distances = table.groupby("method").fd.agg(["first", "count"])
    ours, theirs = distances.loc[verdicts.plan], distances.loc[verdicts.method]
    numbers = zip(ours["first"], theirs["first"], ours["count"], strict=True)
    return [f"{plan:.2f} / {rival:.2f} ({count})" if count else "–" for plan, rival, count in numbers]


def _model(profile: Profile) -> str:
    """A profile's model in words."""
    return {"cifar10": "photographs"}.get(profile.model, profile.name)


def _where(condition: arena.Condition) -> str:
    """A condition in words."""
    profile = condition.profile
    how = f"{_model(profile)}, {SAMPLER_NAMES[condition.sampler]}, guidance {profile.guidance_scale:g}"
    return f"{how}, latents" if condition.latents else how


def leads_in_words(strongest: pd.DataFrame) -> str:
    """Where plans stand beside the strongest rivals of several conditions, in words that follow from the intervals."""
    latents, decoded = (strongest[strongest.latents == inside] for inside in (True, False))
    count, where = decoded.verdict.value_counts(), f"in {decoded.condition.nunique()} conditions"
    if len(latents):  # of images that are compared decoded, too
        where += f"; in latents ahead in {(latents.verdict == 'ahead').sum()} of {len(latents)}"
    if count.get("ahead", 0) == len(decoded):
        return f"DQAR's plans are ahead of the strongest rival by {decoded.lead.min():.1f} dB or more, {where}"
    return (
        f"DQAR's plans are ahead of the strongest rival in {count.get('ahead', 0)} of {len(decoded)} comparisons, "
        f"level in {count.get('level', 0)}, behind in {count.get('behind', 0)}, {where}"
    )


def slide12_rivals(run: Run, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What each cache keeps, where it comes from, and at which budgets it has been compared; as files, no picture.

    Args:
        tables: of ``arena.recorded``, by sampler.
    """
    at: dict[str, set[float]] = {}
    for table in tables.values():
        for (family, budget), _ in arena.verdicts(table, resamples=1).groupby(["family", "budget"]):
            at.setdefault(family, set()).add(budget)
    fastest = arena.fastest(run)

    def compared(name: str) -> str:
        if name not in at and fastest.get(name, math.inf) < arena.BUDGETS[0]:
            return f"none: reaches {fastest[name]:.2f}×"
        return ", ".join(f"{budget:g}×" for budget in sorted(at.get(name, ()))) or "not yet"

    shown = pd.DataFrame(
        {
            "cache": list(ALL_RIVALS),
            "keeps": [rival.keeps for rival in ALL_RIVALS.values()],
            "source": [rival.source for rival in ALL_RIVALS.values()],
            "compared at": [rival.unusable or compared(name) for name, rival in ALL_RIVALS.items()],
        }
    )
    others = len(ALL_RIVALS) - len(RIVALS)
    title = f"{len(RIVALS)} caches run on DiT, {others} others don't: what each keeps, and its source"
    return save_plain_table(run, "slide12_rivals", title, shown)


@recorded("images of plans and their rivals")
def slide13_plan_distances(run: Run, table: pd.DataFrame) -> Figure:
    """Fréchet distance at equal MACs (``results.beside_plans``): growth over full compute on the same seeds."""
    figure, axes = plt.subplots()
    budgets = sorted(table.budget.unique())
    kinds = {"DQAR plan": KINDS["DQAR plan"], "output extrapolation": KINDS["output extrapolation"]}
    kinds |= {"best other cache": KINDS["best cache"], "fewer steps": KINDS["fewer steps"]}
    drawn = dict.fromkeys(table.family[table.kind == "best other cache"])
    names = {"best other cache": ", ".join(drawn)}
    for number, (kind, (color, marker)) in enumerate(kinds.items()):
        line = table[table.kind == kind].set_index("budget").reindex(budgets)
        spread = [line.fd_growth - line.fd_growth_low, line.fd_growth_high - line.fd_growth]
        where = np.arange(len(line)) + 0.23 * (number - 1.5)
        axes.errorbar(
            where, line.fd_growth, spread, fmt=marker, ms=12, color=color, capsize=6, lw=3, label=names.get(kind, kind)
        )
        for x, row in zip(where, line.itertuples(), strict=True):
            top = (x, row.fd_growth_high)
            axes.annotate(f"{row.psnr:.0f} dB", top, (0, 9), textcoords="offset points", ha="center", zorder=1,
                          bbox={"fc": "white", "ec": "none", "pad": 0})  # fmt: skip
    axes.axhline(0, color=DARK, ls="--", lw=2, zorder=0.8)
    axes.set_xticks(range(len(budgets)), [f"{budget:g}× fewer MACs" for budget in budgets])
    axes.set(xlim=(-0.5, len(budgets) - 0.5), ylabel=f"{run.profile.distance} over full compute's")
    axes.margins(y=0.12)
    axes.legend()
    plans = table[table.kind == "DQAR plan"]
    farther = int((plans.fd_growth_low > 0).sum())
    headline(
        figure,
        f"{farther or 'None'} of {len(plans)} plans {'is' if farther < 2 else 'are'} measurably farther from the data "
        f"than full compute (intervals above 0); they keep {plans.psnr.min():.0f} to {plans.psnr.max():.0f} dB",
    )
    note = f"n = {run.profile.images:,} images; bars: 95%; dB: PSNR to full compute, of the mean squared error"
    return save(run, "slide13_plan_distances", figure, table, note)


def slide08_plans(run: Run, made: dict[tuple[str, Target], list[ForecastPlan]]) -> Figure:
    """The steps that plans of the first sampler and target compute; and of all sets of steps that were tried for any
    plan, the predicted and the measured error.

    Args:
        made: ``pareto.made_plans``.
    """
    if not made:
        return missing(run, "slide08_plans", "plans")
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
    (sampler, _), shown = next(iter(made.items()))
    shown = sorted(shown, key=lambda plan: min(abs(plan.macs_speedup - x) for x in pareto.BUDGETS))[:8]
    shown.sort(key=lambda plan: plan.macs_speedup)
    rows = [[step in plan.computed for step in range(plan.num_inference_steps)] for plan in shown]
    colors = ListedColormap([ACCENT, COMPUTE])
    left.pcolormesh(np.array(rows), cmap=colors, vmin=0, vmax=1, ec="white", lw=0.4, rasterized=True)
    left.invert_yaxis()
    left.set_yticks(np.arange(len(shown)) + 0.5, [f"{plan.macs_speedup:.2g}×" for plan in shown])
    left.set(xlabel="denoising step", ylabel="MAC reduction")
    left.set_title(f"Forecast steps (orange), {SAMPLER_NAMES[sampler]}")
    left.grid(False)
    pairs = list[pd.DataFrame]()
    for ((sampler, target), own), color in zip(made.items(), (BLUE, GREEN, DARK, "#A9B4BF"), strict=False):
        columns = ["computed", "predicted", "measured"]
        of_plans = [pd.DataFrame(plan.provenance["trials"], columns=columns) for plan in own]
        trials = pd.concat(of_plans)
        name = f"{SAMPLER_NAMES[sampler]}, {'full compute' if target == 'reference' else target}"
        right.scatter(trials.predicted**0.5, trials.measured**0.5, color=color, s=45, lw=0, alpha=0.8, label=name)
        pairs += of_plans
    right.set(xscale="log", yscale="log", xlabel="predicted error (latents)", ylabel="measured error (images)")
    right.set_ylim(top=0.3)  # room for the legend
    plain_ticks(right.xaxis)
    plain_ticks(right.yaxis)
    right.legend(loc="upper left")
    right.set_title("Every set of steps tried")
    trials = pd.concat(pairs)
    rho = trials.predicted.corr(trials.measured, "spearman")
    within = pd.Series([part.predicted.corr(part.measured, "spearman") for part in pairs]).median()  # NaN of one trial
    headline(
        figure,
        f"The error that a fit predicts ranks {len(trials)} sets of steps with a correlation of {rho:.2f}, and those "
        f"of one plan, all as many steps, with {within:.2f} (median): so they are drawn and measured",
    )
    trials.attrs["provenance"] = next(iter(made.values()))[-1].provenance
    note = f"n = {len(trials)} sets of steps; errors: root mean square, to full compute or converged"
    return save(run, "slide08_plans", figure, trials, note)


def slide12_promise(run: Run, judged: pd.DataFrame | None) -> Figure:
    """What each way to keep a promise costs, and how often it is kept on other images (``plans.promises``)."""
    if judged is None or judged.empty:
        return missing(run, "slide12_promise", "enough images of several plans to promise anything")
    figure, panels = plt.subplots(1, 2, width_ratios=(3, 2))
    speedups = plans.typical(judged)
    ways = {way: style for way, style in WAYS.items() if way in speedups}
    for place, (decibels, share) in enumerate(speedups.index):
        splits = judged[(judged.decibels == decibels) & (judged.share == share)]
        for number, (way, (color, marker)) in enumerate(ways.items()):
            for axes, values in zip(panels, (splits.macs_speedup, 100 * splits.kept), strict=True):
                low, middle, high = np.quantile(values[splits.way == way], [0.05, 0.5, 0.95])
                where = place + 0.2 * (number - (len(ways) - 1) / 2)
                axes.vlines(where, low, high, color=color, lw=3)
                axes.plot(where, middle, marker, color=color, ms=12, ls="none", label=None if place else way)
        panels[1].hlines(100 * share, place - 0.4, place + 0.4, color=DARK, ls="--", lw=2)
    for axes in panels:
        labels = [f"{decibels:g} dB\nin {share:.0%}" for decibels, share in speedups.index]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    panels[0].set(ylabel="MAC reduction", ylim=(0.9, 1.45 * judged.macs_speedup.max()))  # room for the legend
    panels[0].legend(loc="upper left", labelspacing=0.3)
    panels[1].set(ylabel="images that have it (%)")
    panels[1].set_title("dashed: promised")
    headline(figure, promises_in_words(judged))
    note = f"line: 5th to 95th percentile of {judged.split.nunique()} splits of n = {judged.attrs['images']:,} images"
    return save(run, "slide12_promise", figure, judged, f"{note}; {plans.CONFIDENCE:.0%} confidence")


def promises_in_words(judged: pd.DataFrame) -> str:
    """In how many promises a ladder is ahead of the random mix, and what each way takes in one of the middle."""
    speedups = plans.typical(judged)
    ahead = int((speedups[plans.LADDER] > speedups[plans.MIX]).sum())
    decibels, share = speedups.index[len(speedups) // 2]
    typical = speedups.loc[decibels, share]
    splits = judged[(judged.decibels == decibels) & (judged.share == share)]
    splits = splits.pivot(index="split", columns="way", values="macs_speedup")
    more = int((splits[plans.LADDER] > splits[plans.MIX]).sum())
    return (
        f"A plan for each image saves more than a random mix in {ahead} of {len(speedups)} promises (medians): "
        f"{decibels:g} dB in {share:.0%} of images takes {typical[plans.LADDER]:.2f}× fewer MACs, the mix "
        f"{typical[plans.MIX]:.2f}× (less in {more} of {len(splits)} splits), one plan for all "
        f"{typical[plans.FIXED]:.2f}×"
    )


def denoising(run: Run, drawn: pareto.Denoising | None) -> Figure | DisplayedImage:
    """A GIF of full compute beside a plan, step by step from the same noise: the images, and which steps are computed.

    Args:
        drawn: of ``pareto.denoising``.
    """
    if drawn is None:
        return missing(run, "denoising", "a plan at 3× fewer MACs")
    steps, number = drawn.full.shape[0] - 1, drawn.full.shape[1]
    figure, axes = plt.subplots(2, 2, height_ratios=(8, 1), dpi=75)
    title = (
        f"A plan that computes {len(drawn.computed)} of {steps} steps, {drawn.macs_speedup:.1f}× fewer MACs: these "
        f"{number} images have {drawn.psnr:.0f} dB to full compute's"
    )
    headline(figure, title)
    note = f"PSNR of the mean squared error over these {number} images · {run.profile.name} · seed {run.seed}"
    if run.profile.rehearsal:
        note = f"{REHEARSAL} · {note}"
    add_footer(figure, note)
    sides = {"Full compute": (drawn.full, range(steps), GREY), "DQAR plan": (drawn.planned, drawn.computed, ACCENT)}
    shown = []
    for (above, below), (name, (states, computed, color)) in zip(axes.T, sides.items(), strict=True):
        above.axis("off")
        picture = above.imshow(mosaic(states[0]), cmap="gray_r", vmin=0, vmax=1)
        cells = below.bar(range(steps), 1, width=0.8, color="white", ec=GREY, lw=1)
        below.set(xlim=(-0.6, steps - 0.4), ylim=(0, 1), yticks=[], xlabel="denoising step (filled: computed)")
        below.grid(visible=False)
        shown.append((name, states, computed, color, above, picture, cells))
    frames = []
    for step in range(steps + 1):
        for name, states, computed, color, above, picture, cells in shown:
            picture.set_data(mosaic(states[step]))
            if step:
                cells[step - 1].set_facecolor(color if step - 1 in computed else COMPUTE)
            above.set_title(f"{name}: {sum(done < step for done in computed)} steps computed")
        frames.append(frame_of(figure))
    plt.close(figure)
    milliseconds = [100] * steps + [4000]
    path = save_animation(run, "denoising", frames, milliseconds, title, provenance(run.profile, run.seed))
    return DisplayedImage(path, alt=title)


@recorded("quality and MACs of every method")
def slide06_forecast_cache(run: Run, points: pd.DataFrame) -> Figure:
    """DQAR inside the blocks (``pareto.site_points``): what forecast order and bits do to quality, against bytes."""
    figure, panels = plt.subplots(1, 2, width_ratios=(3, 2))
    markers, colors = {16: "o", 8: "s", 4: "^"}, {0: GREY, 1: BLUE, 2: GREEN}
    for row in points.itertuples():
        filled = colors[row.order] if row.interval == 2 else "none"
        panels[0].scatter(row.cache_bytes / 1e6, row.psnr_reference, marker=markers[row.bits], s=170, color=filled,
                          ec=colors[row.order], lw=2.5)  # fmt: skip
    for order, color in colors.items():
        panels[0].scatter([], [], color=color, s=120, label=("as is", "linear forecast", "quadratic forecast")[order])
    for bits, marker in markers.items():
        panels[0].scatter(
            [], [], color="#222222", marker=marker, s=120, label="unquantized" if bits == 16 else f"INT{bits}"
        )
    panels[0].set(xscale="log", xlabel="cache (MB an image)", ylabel="PSNR to full compute (dB)")
    panels[0].set_xticks([0.75, 1.5, 3, 6], ["0.75", "1.5", "3", "6"])
    panels[0].minorticks_off()
    panels[0].set_title("Filled: every 2nd step computed, hollow: every 3rd", size=16)
    panels[0].legend(loc="center", ncols=2, columnspacing=1, handletextpad=0.3)
    linear = points[(points.order == 1) & (points.interval == 2)].set_index("bits")
    losses = [linear.psnr_reference[16] - linear.psnr_reference[bits] for bits in (8, 4)]
    half_precision = linear.cache_bytes[16] * 2 / run.profile.dtype.itemsize  # kept as it is, a value takes these bytes
    shares = [linear.cache_bytes[bits] / half_precision for bits in (8, 4)]
    bars = panels[1].bar(["INT8", "INT4"], losses, color=BLUE)
    panels[1].bar_label(bars, [f"{x:.2f} dB\n{s:.2f} of FP16" for x, s in zip(losses, shares, strict=True)])
    panels[1].margins(y=0.25)
    panels[1].set(ylabel="PSNR lost to quantization (dB)")
    panels[1].set_title("Linear forecast, every 2nd step", size=16)
    headline(
        figure,
        f"Forecasting attention and feed-forward from an INT8 cache loses {losses[0]:.2f} dB and takes "
        f"{shares[0]:.2f} of FP16's bytes",
    )
    note = (
        f"n = {Sizes.of(run.profile).pareto_images} images, mean squared error, no interval; unquantized: "
        f"{8 * run.profile.dtype.itemsize} bits here"
    )
    return save(run, "slide06_forecast_cache", figure, points, note)


def slide12_cache_memory(run: Run) -> Figure:
    """Bytes of a linear forecast's cache at the size of real models, from their configurations."""
    table = cache_memory.table()
    table = table[table.model != "PixArt-α XL/2 512²"]  # between its other two sizes: eight rows can be read
    linear = table[table.order == 1].pivot(index="model", columns="bits", values="cache_bytes")
    rows = table[(table.order == 1) & (table.bits == 16)].set_index("model")
    fits = table[table.order == 1].pivot(index="model", columns="bits", values="fits_24gb")

    def cell(model: str, bits: int) -> str:
        return f"{linear[bits][model] / 1e9:.2f} GB{'' if fits[bits][model] else ' ✗'}"

    shown = pd.DataFrame(
        {
            "model": list(rows.index),
            "weights, 16 bit": [f"{x / 1e9:.1f} GB" for x in rows.weight_bytes],
            "every site, 16 bit": [cell(model, 16) for model in rows.index],
            "INT8": [cell(model, 8) for model in rows.index],
            "INT4": [cell(model, 4) for model in rows.index],
            "model's output only": [f"{x / 1e6:.2f} MB" for x in rows.output_cache_bytes],
        }
    )
    title = (
        f"Keeping every site takes up to {linear[16].max() / 1e9:.0f} GB a sample; the model's output alone takes at "
        f"most {rows.output_cache_bytes.max() / 1e6:.0f} MB"
    )
    note = "linear forecast, one sample; ✗: over 24 GiB with the weights"
    return save_table(run, "slide12_cache_memory", title, shown, [25, 13, 15, 13, 13, 16], pd.DataFrame(), note)
