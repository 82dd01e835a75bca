"""Quality against speed: the figures of plans, peers and forecasting caches, drawn from recorded tables."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, COMPUTE, GREEN, GREY, headline, recorded, save, save_table
from dqar.forecast.plan import ForecastPlan
from dqar.measure.results import Run, slug
from dqar.studies import cache_memory, pareto
from dqar.studies.compare import FULL

SAMPLER_NAMES = {"dpm-solver++": "DPM-Solver++", "ddim": "DDIM"}


SHOWN = {
    "fewer steps": (GREY, "X"),
    "output extrapolation": (BLUE, "o"),
    "TaylorSeer": (GREEN, "s"),
    "SeaCache": ("#CC79A7", "^"),
    "DQAR sites": ("#E69F00", "v"),
}
"""Drawn in colours of their own; all other peers in one."""


OTHERS = "#A9B4BF"


TARGETS = {"reference": "to the 50-step reference", "converged": "to the converged solution"}


@recorded("quality and MACs of every method")
def _slide13_pareto(run: Run, table: pd.DataFrame) -> Figure:
    sampler = table.attrs["sampler"]
    points = pareto.summary(table)
    figure, panels = plt.subplots(1, 2, sharey=True)
    for axes, (target, label) in zip(panels, TARGETS.items(), strict=True):
        _draw_families(axes, points, target)
        steps = run.profile.num_inference_steps
        axes.set(xlabel="MACs: full compute / this (×)", xscale="log", xlim=(1.08, 6.3))
        ticks = (1.25, 1.5, 2, 3, 4, 5, 6)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(label.replace("50", str(steps)), size=17)
    full = points[points.family == FULL.name].psnr_converged.iloc[0]
    error = panels[1].axhline(full, color="#222222", ls="--", lw=2)
    panels[1].legend([error], ["full compute's own error"], loc="lower left", fontsize=13)
    ours = points[points.family == pareto.PLAN].psnr_reference.max()  # NaN without a plan
    panels[0].set(ylabel="PSNR (dB)", ylim=(12, max(66.0, ours + 3)))
    panels[0].legend(loc="lower left", ncols=2, fontsize=13)
    verdicts = pareto.verdicts(points)
    won = int((verdicts.ours > verdicts.peer).sum())
    headline(
        figure,
        f"{SAMPLER_NAMES[sampler]}: DQAR's plans lead at {won} of {len(verdicts)} budgets, "
        f"by {(verdicts.ours - verdicts.peer).median():.1f} dB (median)",
    )
    return save(run, f"slide13_pareto_{slug(sampler).replace('-', '_')}", figure, table)


def _draw_families(axes: Axes, points: pd.DataFrame, target: str) -> None:
    peers = [f for f in points.family.unique() if f not in (pareto.PLAN, FULL.name)]
    others = [family for family in peers if family not in SHOWN]
    for number, family in enumerate(others):
        line = pareto.frontier(points[points.family == family], target)
        label = f"{len(others)} other caches" if number == 0 else None
        axes.plot(line.macs_speedup, line[f"psnr_{target}"], color=OTHERS, lw=1.5, marker=".", ms=7, label=label)
    for family, (color, marker) in SHOWN.items():
        line = pareto.frontier(points[points.family == family], target)
        axes.plot(line.macs_speedup, line[f"psnr_{target}"], color=color, lw=2, marker=marker, ms=8, label=family)
    line = pareto.frontier(pareto.own_plans(points, target), target)
    axes.plot(line.macs_speedup, line[f"psnr_{target}"], color=ACCENT, lw=4.5, marker="D", ms=10, label="DQAR plan")


def slide13_pareto(run: Run, sampler: str, table: pd.DataFrame | None) -> Figure:
    """PSNR against MACs saved, to the run's reference and to the converged solution: every family's best settings."""
    if table is not None:
        table.attrs["sampler"] = sampler
    return _slide13_pareto(run, table)


def slide12_pareto_verdicts(run: Run, tables: dict[str, pd.DataFrame]) -> Figure:
    """At each budget: DQAR's plan, the best peer at its best settings, and the MACs needed for the peer's quality."""
    found = [pareto.verdicts(pareto.summary(table)).assign(sampler=sampler) for sampler, table in tables.items()]
    verdicts = pd.concat(found, ignore_index=True)
    shown = pd.DataFrame(
        {
            "sampler": verdicts.sampler.map(SAMPLER_NAMES),
            "PSNR to": verdicts.target,
            "fewer MACs": verdicts.budget.map("{:g}×".format),
            "DQAR (dB)": verdicts.ours.map("{:.1f}".format),
            "best peer (dB)": verdicts.peer.map("{:.1f}".format),
            "which": verdicts.which,
            "MACs for the peer's quality": verdicts.macs_needed.map(lambda x: "–" if np.isnan(x) else f"{x:.2f} of it"),
        }
    )
    won, enough = int((verdicts.ours > verdicts.peer).sum()), int((verdicts.macs_needed.round(2) <= 0.8).sum())
    title = f"Ahead at {won} of {len(verdicts)} budgets; at {enough} the peer's quality takes at most 0.8 of its MACs"
    source = next(iter(tables.values()))
    return save_table(run, "slide12_pareto_verdicts", title, shown, [14, 11, 9, 12, 12, 46, 16], source)


@recorded("images of plans and their rivals")
def slide13_plan_distances(run: Run, table: pd.DataFrame) -> Figure:
    """Fréchet distance at equal MACs (``results.beside_plans``): growth over full compute on the same seeds."""
    figure, axes = plt.subplots()
    budgets = sorted(table.budget.unique())
    kinds = {"DQAR plan": (ACCENT, "D"), "output extrapolation": SHOWN["output extrapolation"]}
    kinds |= {"best other cache": SHOWN["SeaCache"], "fewer steps": SHOWN["fewer steps"]}
    lowest, box = 0, {"fc": "white", "ec": "none", "pad": 1}
    for number, (kind, (color, marker)) in enumerate(kinds.items()):
        own = table[table.kind == kind].set_index("budget").reindex(budgets)
        spread = [own.fd_growth - own.fd_growth_low, own.fd_growth_high - own.fd_growth]
        where = np.arange(len(own)) + 0.23 * (number - 1.5)
        axes.errorbar(where, own.fd_growth, spread, fmt=marker, ms=12, color=color, capsize=6, lw=3, label=kind)
        for x, row in zip(where, own.itertuples(), strict=True):
            top = (x, row.fd_growth_high)
            axes.annotate(f"{row.psnr:.1f}", top, (0, 6), textcoords="offset points", ha="center", size=14, bbox=box)
    for budget in budgets:
        own = table[table.budget == budget]
        lowest += own.loc[own.fd_growth.idxmin()].kind == "DQAR plan"
    axes.axhline(0, color="#222222", ls="--", lw=2)
    axes.set_xticks(range(len(budgets)), [f"{budget:g}× fewer MACs" for budget in budgets])
    axes.set(xlim=(-0.5, len(budgets) - 0.5), ylabel="FD-digits over full compute's (95 %)")
    axes.legend(fontsize=15)
    plans = table[table.kind == "DQAR plan"]
    farther = int((plans.fd_growth_low > 0).sum())
    headline(
        figure,
        f"Fréchet distance (and PSNR to full compute, dB): {farther} of {len(plans)} plans are "
        f"farther from the data than full compute; a plan is the lowest at {lowest} of {len(budgets)} budgets",
    )
    return save(run, "slide13_plan_distances", figure, table)


def slide08_plans(run: Run, plans: dict[str, list[ForecastPlan]]) -> Figure:
    """The steps that each plan computes; and the error it was predicted to have against the one it has."""
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
    names, rows = [], []
    for name, own in plans.items():
        for plan in own:
            rows.append([step in plan.computed for step in range(plan.num_inference_steps)])
            names.append(f"{plan.macs_speedup:.2g}×")
        names[-len(own)] = f"{name.replace('dpm-solver++', 'DPM++').replace('ddim', 'DDIM')}  {names[-len(own)]}"
    left.pcolormesh(np.array(rows), cmap=ListedColormap([COMPUTE, ACCENT]), vmin=0, vmax=1, ec="white", lw=0.4)
    left.invert_yaxis()
    left.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=12)
    for top in np.cumsum([len(own) for own in plans.values()]):
        left.axhline(top, color="white", lw=5)
    left.set(xlabel="denoising step")
    left.set_title("Computed steps (orange)", size=17)
    left.grid(False)
    pairs = []
    for (name, own), color in zip(plans.items(), (ACCENT, BLUE, GREEN, GREY), strict=False):
        trials = pd.DataFrame([trial for plan in own for trial in plan.provenance["trials"]])
        right.scatter(trials.predicted**0.5, trials.measured**0.5, color=color, s=45, lw=0, alpha=0.8, label=name)
        pairs.append(trials)
    right.set(xscale="log", yscale="log", xlabel="predicted RMS (latents)", ylabel="measured RMS (images)")
    right.set_ylim(top=0.1)  # room for the legend
    right.legend(fontsize=12, loc="upper left")
    right.set_title("Every set of steps tried", size=17)
    trials = pd.concat(pairs)
    rho = trials.predicted.corr(trials.measured, "spearman")
    headline(figure, f"Which steps a plan computes; predicted errors rank like measured ones (ρ = {rho:.2f})")
    trials.attrs["provenance"] = next(iter(plans.values()))[-1].provenance
    return save(run, "slide08_plans", figure, trials)


@recorded("quality and MACs of every method")
def slide06_forecast_cache(run: Run, points: pd.DataFrame) -> Figure:
    """DQAR inside the blocks (``pareto.site_points``): what forecast order and bits do to quality, against bytes."""
    figure, panels = plt.subplots(1, 2, width_ratios=(3, 2))
    markers, colors = {16: "o", 8: "s", 4: "^"}, {0: GREY, 1: ACCENT, 2: BLUE}
    for row in points[points.interval <= 3].itertuples():
        filled = colors[row.order] if row.interval == 2 else "none"
        panels[0].scatter(row.cache_bytes / 1e6, row.psnr_reference, marker=markers[row.bits], s=170, color=filled,
                          ec=colors[row.order], lw=2.5)  # fmt: skip
    for order, color in colors.items():
        panels[0].scatter([], [], color=color, s=120, label=("as is", "linear forecast", "quadratic forecast")[order])
    for bits, marker in markers.items():
        panels[0].scatter([], [], color="#222222", marker=marker, s=120, label="32 bit" if bits == 16 else f"INT{bits}")
    panels[0].set(xscale="log", xlabel="cache (MB an image)", ylabel="PSNR to the reference (dB)")
    panels[0].set_xticks([0.75, 1.5, 3, 6], ["0.75", "1.5", "3", "6"])
    panels[0].minorticks_off()
    panels[0].set_title("Filled: every 2nd step computed; hollow: every 3rd", size=16)
    panels[0].legend(fontsize=13, ncols=2)
    linear = points[(points.order == 1) & (points.interval == 2)].set_index("bits")
    losses = [linear.psnr_reference[16] - linear.psnr_reference[bits] for bits in (8, 4)]
    shares = [linear.cache_bytes[bits] / linear.cache_bytes[16] for bits in (8, 4)]
    bars = panels[1].bar(["INT8", "INT4"], losses, color=[ACCENT, BLUE])
    panels[1].bar_label(
        bars, [f"{x:.1f} dB\n{s:.2f} of the bytes" for x, s in zip(losses, shares, strict=True)], size=14
    )
    panels[1].margins(y=0.25)
    panels[1].set(ylabel="PSNR lost against 32 bit (dB)")
    panels[1].set_title("Linear forecast, every 2nd step", size=16)
    headline(figure, f"Attention and feed-forward forecast from a cache in few bits: INT8 costs {losses[0]:.1f} dB")
    return save(run, "slide06_forecast_cache", figure, points)


def slide12_cache_memory(run: Run) -> Figure:
    """Bytes of a linear forecast's cache at the size of real models, from their configurations."""
    table = cache_memory.table()
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
    title = "Cache of a linear forecast, one sample (✗: over 24 GiB with the weights)"
    return save_table(run, "slide12_cache_memory", title, shown, [32, 16, 19, 13, 13, 20], pd.DataFrame())
