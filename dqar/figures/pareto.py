"""Quality against speed: the figures of plans, peers and forecasting caches, drawn from recorded tables."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image as DisplayedImage
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from dqar.figures.style import (
    ACCENT,
    BLUE,
    COMPUTE,
    DARK,
    GREEN,
    GREY,
    REHEARSAL,
    SMALLEST,
    headline,
    missing,
    recorded,
    save,
    save_animation,
    save_table,
    write_table,
)
from dqar.forecast.fit import Target
from dqar.forecast.plan import ForecastPlan
from dqar.measure.results import Run, provenance, slug
from dqar.studies import cache_memory, pareto
from dqar.studies.compare import FULL

SAMPLER_NAMES = {"dpm-solver++": "DPM-Solver++", "ddim": "DDIM"}
SHOWN = {
    "fewer steps": (GREY, "X"),
    "bespoke solver": ("#7A5195", "P"),
    "learned timesteps": ("#56B4E9", "*"),
    "output extrapolation": (BLUE, "o"),
    "TaylorSeer": (GREEN, "s"),
    "SeaCache": ("#CC79A7", "^"),
    "DQAR sites": ("#E69F00", "v"),
}
"""Drawn in colours of their own; all other peers in one."""
OTHERS = "#A9B4BF"
TARGETS: dict[Target, str] = {"reference": "to the 50-step reference", "converged": "to the converged solution"}
COMPARED = {"reference": "full compute", "converged": "converged solution"}


@recorded("quality and MACs of every method")
def _slide13_pareto(run: Run, table: pd.DataFrame) -> Figure:
    sampler = table.attrs["sampler"]
    points = pareto.summary(table)
    figure, panels = plt.subplots(1, 2, sharey=True)
    for axes, (target, label) in zip(panels, TARGETS.items(), strict=True):
        _draw_families(axes, points, target)
        steps = run.profile.num_inference_steps
        axes.set(xlabel="MACs of full compute / of this", xscale="log", xlim=(1.08, 6.3))
        ticks = (1.25, 1.5, 2, 3, 4, 5, 6)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(label.replace("50", str(steps)))
    full = points[points.family == FULL.name].psnr_converged.iloc[0]
    error = panels[1].axhline(full, color=DARK, ls="--", lw=2)
    panels[1].legend([error], ["full compute's own error"], loc="upper right")
    ours = points[points.family == pareto.PLAN].psnr_reference.max()  # NaN without a plan
    panels[0].set(ylabel="PSNR (dB)", ylim=(0, max(66.0, ours + 3)))
    panels[0].legend(loc="lower left", ncols=2, columnspacing=1, handlelength=1.3)
    verdicts = pareto.verdicts(points)
    won = int((verdicts.ours > verdicts.peer).sum())
    headline(
        figure,
        f"With {SAMPLER_NAMES[sampler]}, DQAR's plans are better than every peer at {won} of {len(verdicts)} budgets, "
        f"by {(verdicts.ours - verdicts.peer).median():.1f} dB in the median",
    )
    note = f"n = {table.image.nunique()} images, PSNR of their mean squared error; n = 1,000: slide13_plan_distances"
    return save(run, f"slide13_pareto_{slug(sampler).replace('-', '_')}", figure, table, note)


def _draw_families(axes: Axes, points: pd.DataFrame, target: Target) -> None:
    points = pareto.made_for(points, target)
    peers = [f for f in points.family.unique() if f not in (pareto.PLAN, FULL.name)]
    others = [family for family in peers if family not in SHOWN]
    for number, family in enumerate(others):
        line = pareto.frontier(points[points.family == family], target)
        label = f"{len(others)} other caches" if number == 0 else None
        axes.plot(line.macs_speedup, line[f"psnr_{target}"], color=OTHERS, lw=1.5, marker=".", ms=7, label=label)
    for family, (color, marker) in SHOWN.items():
        if family not in peers:
            continue
        line = pareto.frontier(points[points.family == family], target)
        axes.plot(line.macs_speedup, line[f"psnr_{target}"], color=color, lw=2, marker=marker, ms=8, label=family)
    line = pareto.frontier(pareto.own_plans(points, target), target)
    axes.plot(line.macs_speedup, line[f"psnr_{target}"], color=ACCENT, lw=4.5, marker="D", ms=10, label="DQAR plan")


def slide13_pareto(run: Run, sampler: str, table: pd.DataFrame | None) -> Figure:
    """PSNR against MACs saved, to the run's reference and to the converged solution: every family's best settings."""
    if table is not None:
        table.attrs["sampler"] = sampler
    return _slide13_pareto(run, table)


def slide12_pareto(run: Run, tables: dict[str, pd.DataFrame]) -> Figure:
    """At each budget: DQAR's plan and the best peer at its best settings; all columns are in the Markdown."""
    found = [pareto.verdicts(pareto.summary(table)).assign(sampler=sampler) for sampler, table in tables.items()]
    if not found:
        return missing(run, "slide12_pareto", "quality and MACs of every method")
    verdicts = pd.concat(found, ignore_index=True)
    verdicts["cell"] = [f"{ours:.1f} / {peer:.1f}" for ours, peer in zip(verdicts.ours, verdicts.peer, strict=True)]
    wide = verdicts.pivot(index=["sampler", "target"], columns="budget", values="cell").reset_index()
    wide["sampler"], wide["target"] = wide.sampler.map(SAMPLER_NAMES), wide.target.map(COMPARED)
    wide.columns = ["Sampler", "PSNR to", *(f"{budget:g}×" for budget in wide.columns[2:])]
    won, enough = int((verdicts.ours > verdicts.peer).sum()), int((verdicts.macs_needed.round(2) <= 0.8).sum())
    title = (
        f"DQAR's plans are ahead at {won} of {len(verdicts)} budgets; at {enough} they need at most 0.8 of the MACs "
        "for the best peer's quality"
    )
    note = f"a cell: plan / best peer (dB); columns: MAC reduction; n = {tables[next(iter(tables))].image.nunique()}"
    source = next(iter(tables.values()))
    figure = save_table(run, "slide12_pareto", title, wide, [16, 22, *[14] * (len(wide.columns) - 2)], source, note)
    shown = pd.DataFrame(
        {
            "sampler": verdicts.sampler.map(SAMPLER_NAMES),
            "PSNR to": verdicts.target,
            "MAC reduction": verdicts.budget.map("{:g}×".format),
            "DQAR (dB)": verdicts.ours.map("{:.1f}".format),
            "best peer (dB)": verdicts.peer.map("{:.1f}".format),
            "which": verdicts.which,
            "MACs for the peer's quality": verdicts.macs_needed.map(lambda x: "–" if np.isnan(x) else f"{x:.2f} of it"),
        }
    )
    write_table(run, "slide12_pareto", shown)
    return figure


@recorded("images of plans and their rivals")
def slide13_plan_distances(run: Run, table: pd.DataFrame) -> Figure:
    """Fréchet distance at equal MACs (``results.beside_plans``): growth over full compute on the same seeds."""
    figure, axes = plt.subplots()
    budgets = sorted(table.budget.unique())
    kinds = {"DQAR plan": (ACCENT, "D"), "output extrapolation": SHOWN["output extrapolation"]}
    kinds |= {"best other cache": SHOWN["SeaCache"], "fewer steps": SHOWN["fewer steps"]}
    box = {"fc": "white", "ec": "none", "pad": 1}
    for number, (kind, (color, marker)) in enumerate(kinds.items()):
        own = table[table.kind == kind].set_index("budget").reindex(budgets)
        spread = [own.fd_growth - own.fd_growth_low, own.fd_growth_high - own.fd_growth]
        where = np.arange(len(own)) + 0.23 * (number - 1.5)
        axes.errorbar(where, own.fd_growth, spread, fmt=marker, ms=12, color=color, capsize=6, lw=3, label=kind)
        for x, row in zip(where, own.itertuples(), strict=True):
            top = (x, row.fd_growth_high)
            axes.annotate(f"{row.psnr:.0f} dB", top, (0, 6), textcoords="offset points", ha="center", bbox=box)
    axes.axhline(0, color=DARK, ls="--", lw=2)
    axes.set_xticks(range(len(budgets)), [f"{budget:g}× fewer MACs" for budget in budgets])
    axes.set(xlim=(-0.5, len(budgets) - 0.5), ylabel=f"{run.profile.distance} over full compute's")
    axes.margins(y=0.12)
    axes.legend()
    plans = table[table.kind == "DQAR plan"]
    farther = int((plans.fd_growth_low > 0).sum())
    headline(
        figure,
        f"{farther} of {len(plans)} plans are farther from the data than full compute; "
        f"they keep {plans.psnr.min():.0f} to {plans.psnr.max():.0f} dB",
    )
    note = f"n = {run.profile.images:,} images; bars: 95%; dB: PSNR to full compute, of the mean squared error"
    return save(run, "slide13_plan_distances", figure, table, note)


def slide08_plans(run: Run, plans: dict[str, list[ForecastPlan]]) -> Figure:
    """The steps that each plan for full compute's images computes; and the error it was predicted to have."""
    figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
    sampler, shown = next(iter(plans.items()))
    rows = [[step in plan.computed for step in range(plan.num_inference_steps)] for plan in shown]
    colors = ListedColormap([COMPUTE, ACCENT])
    left.pcolormesh(np.array(rows), cmap=colors, vmin=0, vmax=1, ec="white", lw=0.4, rasterized=True)
    left.invert_yaxis()
    left.set_yticks(np.arange(len(shown)) + 0.5, [f"{plan.macs_speedup:.2g}×" for plan in shown])
    left.set(xlabel="denoising step", ylabel="MAC reduction")
    left.set_title(f"Computed steps (orange), {SAMPLER_NAMES[sampler.split(',')[0]]}")
    left.grid(False)
    pairs = []
    for (name, made), color in zip(plans.items(), (ACCENT, BLUE, GREEN, GREY), strict=False):
        trials = pd.DataFrame([trial for plan in made for trial in plan.provenance["trials"]])
        name = name.replace("dpm-solver++", "DPM-Solver++").replace("ddim", "DDIM")
        right.scatter(trials.predicted**0.5, trials.measured**0.5, color=color, s=45, lw=0, alpha=0.8, label=name)
        pairs.append(trials)
    right.set(xscale="log", yscale="log", xlabel="predicted error (latents)", ylabel="measured error (images)")
    right.set_ylim(top=0.3)  # room for the legend
    right.legend(loc="upper left")
    right.set_title("Every set of steps tried")
    trials = pd.concat(pairs)
    rho = trials.predicted.corr(trials.measured, "spearman")
    headline(
        figure,
        f"A plan computes the steps that matter: the error it predicts ranks {len(trials)} sets of steps "
        f"like the measured one (correlation {rho:.2f})",
    )
    trials.attrs["provenance"] = next(iter(plans.values()))[-1].provenance
    return save(run, "slide08_plans", figure, trials, "errors: root mean square")


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
        f"A plan that computes {len(drawn.computed)} of {steps} steps, {drawn.macs_speedup:.1f}× fewer MACs, draws "
        f"the same images: PSNR {drawn.psnr:.0f} dB"
    )
    headline(figure, title)
    figure.set_layout_engine("constrained", rect=(0, 0.045, 1, 0.955))
    note = f"PSNR of the mean squared error over these {number} images · {run.profile.name} · seed {run.seed}"
    if run.profile.rehearsal:
        note = f"{REHEARSAL} · {note}"
    figure.text(0.008, 0.008, note, size=SMALLEST, color=GREY, va="bottom")
    sides = {"Full compute": (drawn.full, range(steps), GREY), "DQAR plan": (drawn.planned, drawn.computed, ACCENT)}
    shown = []
    for (above, below), (name, (states, computed, color)) in zip(axes.T, sides.items(), strict=True):
        above.axis("off")
        picture = above.imshow(_mosaic(states[0]), cmap="gray_r", vmin=0, vmax=1)
        cells = below.bar(range(steps), 1, width=0.8, color="white", ec=GREY, lw=1)
        below.set(xlim=(-0.6, steps - 0.4), ylim=(0, 1), yticks=[], xlabel="denoising step (filled: computed)")
        below.grid(visible=False)
        shown.append((name, states, computed, color, above, picture, cells))
    frames = []
    for step in range(steps + 1):
        for name, states, computed, color, above, picture, cells in shown:
            picture.set_data(_mosaic(states[step]))
            if step:
                cells[step - 1].set_facecolor(color if step - 1 in computed else COMPUTE)
            above.set_title(f"{name}: {sum(own < step for own in computed)} steps computed")
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))  # type: ignore[attr-defined]
    plt.close(figure)
    milliseconds = [100] * steps + [4000]
    path = save_animation(run, "denoising", frames, milliseconds, title, provenance(run.profile, run.seed))
    return DisplayedImage(path, alt=title)


def _mosaic(images: torch.Tensor) -> np.ndarray:
    """Images ``[N, C, H, W]`` in rows of five, with white between them: ``[height, width, C]``."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0 if images.shape[1] == 1 else 1)
    rows = [torch.cat(list(row), dim=2) for row in padded.split(5)]
    return torch.cat(rows, dim=1).permute(1, 2, 0).clamp(0, 1).numpy()


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
        panels[0].scatter(
            [], [], color="#222222", marker=marker, s=120, label="unquantized" if bits == 16 else f"INT{bits}"
        )
    panels[0].set(xscale="log", xlabel="cache (MB an image)", ylabel="PSNR to the reference (dB)")
    panels[0].set_xticks([0.75, 1.5, 3, 6], ["0.75", "1.5", "3", "6"])
    panels[0].minorticks_off()
    panels[0].set_title("Filled: every 2nd step computed, hollow: every 3rd", size=16)
    panels[0].legend(loc="center", ncols=2, columnspacing=1, handletextpad=0.3)
    linear = points[(points.order == 1) & (points.interval == 2)].set_index("bits")
    losses = [linear.psnr_reference[16] - linear.psnr_reference[bits] for bits in (8, 4)]
    shares = [linear.cache_bytes[bits] / linear.cache_bytes[16] for bits in (8, 4)]
    bars = panels[1].bar(["INT8", "INT4"], losses, color=[ACCENT, BLUE])
    panels[1].bar_label(bars, [f"{x:.2f} dB\n{s:.2f} of the bytes" for x, s in zip(losses, shares, strict=True)])
    panels[1].margins(y=0.25)
    panels[1].set(ylabel="PSNR lost to quantization (dB)")
    panels[1].set_title("Linear forecast, every 2nd step", size=16)
    headline(
        figure,
        f"Forecasting attention and feed-forward from an INT8 cache loses {losses[0]:.2f} dB and takes "
        f"{shares[0]:.2f} of the bytes",
    )
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
    title = (
        f"Keeping every site takes up to {linear[16].max() / 1e9:.0f} GB a sample; the model's output alone takes at "
        f"most {rows.output_cache_bytes.max() / 1e6:.0f} MB"
    )
    note = "linear forecast, one sample; ✗: over 24 GiB with the weights"
    return save_table(run, "slide12_cache_memory", title, shown, [25, 13, 15, 13, 13, 16], pd.DataFrame(), note)
