"""Figures of notebook 07: cost and quality of every method (slides 12, 13)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, COMPUTE, GREY, SLIDE14, bar_chart, headline, missing, save, save_table
from dqar.figures.trace import events
from dqar.measure.results import Run
from dqar.studies.compare import FULL, OURS
from dqar.studies.pareto import PLAN

CLAIMED = pd.DataFrame(
    # slide 12: ms a step, MB, reuse events, FID; and the method that stands for it here
    [
        ("Baseline", FULL.name, 11.2, 199, 0, 10.2),
        ("Static", "static, kv", 8.8, 195, 0, 10.5),
        ("PTQ4DiT", "W8A8 + CSB", 10.8, 170, 0, 10.6),
        ("DQAR", "DQAR rule, kv", 8.6, 163, 47, 10.8),
    ],
    columns=["name", "method", "ms_per_step", "megabytes", "events", "fd"],
)


def measured(summary: pd.DataFrame) -> pd.DataFrame:
    """Slide 12's four methods as measured, in its order; NaN where nothing was recorded.

    Args:
        summary: of ``studies.results.summary``.
    """
    rows = summary.set_index("method").reindex(CLAIMED.method).reset_index()
    return rows.assign(name=CLAIMED.name, megabytes=(rows.weight_bytes + rows.added_bytes) / 1e6)


def slide12(run: Run, summary: pd.DataFrame) -> Figure:
    """Slide 12's table with its columns and its Improvement row, each claimed and measured."""
    here = measured(summary)
    names = {"PTQ4DiT": "PTQ4DiT (here W8A8, balanced)"}
    rows = [
        (
            names.get(claim.name, claim.name),
            "claimed\nmeasured",
            f"{claim.ms_per_step}\n{_number(got.ms_per_step, '.1f')}",
            f"{claim.megabytes}\n{_number(got.megabytes, '.0f')}",
            f"{claim.events}\n{_number(got.events, '.0f')}",
            f"{claim.fd}\n{_number(got.fd, '.2f')} ({_number(got.fd_low, '.2f')} to {_number(got.fd_high, '.2f')})",
        )
        for claim, got in zip(CLAIMED.itertuples(), here.itertuples(), strict=True)
    ]
    full, ours = here.iloc[0], here.iloc[-1]
    sites = (here.events / here.sites_reused).replace(np.inf, np.nan).median()
    longer = 1 / ours.speedup - 1  # of runs taken in turn, as every speed of the workbook
    larger = ours.megabytes / full.megabytes - 1
    rows.append(
        (
            "Improvement",
            "claimed\nmeasured",
            f"−23.2%\n{_percent(longer)}",
            f"−18.1%\n{_percent(larger)}",
            "–\n–",
            f"+0.6\n{_number(ours.fd_growth, '+.2f')} ({_number(ours.fd_growth_low, '+.2f')} to "
            f"{_number(ours.fd_growth_high, '+.2f')})",
        )
    )
    columns = [
        "Method",
        "",
        "Runtime\n(ms a step)",
        "Memory\n(peak, MB)",
        "Reuse events" + ("" if np.isnan(sites) else f"\n(here of {sites:,.0f})"),
        f"FID claimed, {run.profile.distance} measured",
    ]
    table = pd.DataFrame(rows, columns=columns)
    slower, more = ("more" if x > 0 else "less" for x in (longer, larger))
    title = (
        f"Reuse of K and V by a calibrated gate takes {abs(longer):.0%} {slower} time than full compute "
        f"and {abs(larger):.0%} {more} memory"
        if longer == longer
        else "Slide 12 as claimed; nothing has been recorded here yet"
    )
    note = "4 images a step, improvement of runs in pairs"
    if not np.isnan(full.images):
        note += f"; ( ): 95%, bias-corrected, n = {full.images:,.0f}"
    return save_table(run, "slide12", title, table, [17, 11, 13, 12, 11, 29], summary, note)


def slide12_methods(run: Run, summary: pd.DataFrame) -> Figure:
    """Measured speed against what the MACs promise, every method."""
    if summary.speedup.isna().all():
        return missing(run, "slide12_methods", "time and images of every method")
    figure, axes = plt.subplots()
    shown = summary.dropna(subset=["speedup", "macs_speedup"])
    gates = shown.family.isin(["DQAR rule", "DQAR policy"])
    kinds = {
        "DQAR's plans": (shown.family == PLAN, ACCENT, "D"),
        "DQAR's gates": (gates, ACCENT, "o"),
        "fewer steps": (shown.family == "fewer steps", GREY, "X"),
    }
    rest = ~pd.concat([inside for inside, _, _ in kinds.values()], axis=1).any(axis=1)
    kinds["everything else"] = (rest & (shown.method != FULL.name), "#A9B4BF", "s")
    for label, (inside, color, marker) in kinds.items():
        part = shown[inside]
        spread = [part.speedup - part.speedup_low, part.speedup_high - part.speedup]
        axes.errorbar(part.macs_speedup, part.speedup, spread, fmt=marker, ms=11, color=color, label=label, capsize=5,
                      mfc="white" if label == "DQAR's gates" else color)  # fmt: skip
    end = shown.macs_speedup.max() * 1.05
    axes.plot([1, end], [1, end], color=GREY, ls="--", zorder=0)
    middle = 1 + 0.7 * (end - 1)
    axes.text(middle, middle, "as the MACs promise", ha="center", va="bottom", color=GREY, rotation=45,
              rotation_mode="anchor", transform_rotates_text=True)  # fmt: skip
    axes.set(xlabel="MACs of full compute / of this", ylabel="speedup over full compute")
    axes.legend(loc="lower right")
    repeats = run.recorded("speed")
    rule, network = (shown[shown.family == family].speedup for family in ("DQAR rule", "DQAR policy"))
    speeds = f"The rule's gates run at {rule.min():.2f} to {rule.max():.2f} times full speed"
    if len(network):
        speeds += f", the network's at {network.min():.2f} to {network.max():.2f}"
    plans = shown[kinds["DQAR's plans"][0]]
    realised = ((plans.speedup - 1) / (plans.macs_speedup - 1)).median()
    headline(
        figure,
        f"{speeds}; the median of {len(plans)} plans gains {realised:.0%} of what its MACs promise over 1×",
    )
    count = "" if repeats is None else f"n = {repeats.repeat.nunique()} runs of each, taken in turn; "
    return save(run, "slide12_methods", figure, summary, f"{count}median, quartiles; gates' MACs without looking")


def slide13(run: Run, summary: pd.DataFrame, gated: pd.DataFrame) -> Figure:
    """Slide 13's four bars, claimed beside measured, and what became of "zero reuse in steps 0 to 15"."""
    here = measured(summary)
    figure, panels = plt.subplot_mosaic([["claimed", "measured"], ["events", "events"]], height_ratios=(1.25, 1))
    colors = [ACCENT if name == "DQAR" else GREY for name in CLAIMED.name]
    claimed, right, early = panels.values()
    bars = claimed.barh(CLAIMED.name, CLAIMED.fd, color=colors)
    claimed.bar_label(bars, [f"{fd}" for fd in CLAIMED.fd], padding=4)
    claimed.set(xlim=(0, 13))
    claimed.set_title("Claimed: FID")
    spread = np.nan_to_num([here.fd - here.fd_low, here.fd_high - here.fd]).clip(min=0)
    right.barh(here.name, here.fd, xerr=spread, color=colors, capsize=5)
    for y, row in enumerate(here.itertuples()):
        right.annotate(_number(row.fd, ".2f"), (np.nanmax([row.fd_high, row.fd, 0]), y), (8, 0),
                       textcoords="offset points", va="center")  # fmt: skip
    right.set(yticks=range(len(here)), yticklabels=[], xlim=(0, 1.5 * np.nanmax([*here.fd_high, *here.fd, 1e-9])))
    right.set_title("Measured: " + run.profile.distance + (" (not FID)" if run.profile.embedded else ""))
    for ax in (claimed, right):
        ax.invert_yaxis()
        ax.grid(visible=False)
    reuse = events(gated, "calibrated")
    before = int(reuse[reuse.index <= 15].sum())
    early.axvspan(-0.5, 15.5, color=COMPUTE, zorder=0)
    early.bar(reuse.index, reuse, color=ACCENT, label=f"measured: {before} in steps 0 to 15")
    early.plot(SLIDE14.step, SLIDE14.events, color=GREY, ls=":", marker="o", lw=2, label="claimed")
    early.set(xlabel="denoising step", ylabel="reuse events", xlim=(-0.5, run.profile.num_inference_steps + 0.5))
    early.set_ylim(0, 1.45 * max(SLIDE14.events.max(), reuse.max()))
    early.legend(loc="upper left", ncols=2)
    growth, ours = "Nothing was recorded", here.iloc[-1]
    if not np.isnan(ours.fd_growth):
        growth = compared(ours, run.profile.distance)
    headline(figure, f"{growth}; reuse begins at step {int(reuse[reuse > 0].index.min())}, not after step 15")
    count = summary.images.max()
    note = "events: of 4 images"
    if not np.isnan(count):
        note = f"n = {int(count):,} images, bars: 95% of each, title: of pairs; {note}"
    intervals = [
        f"{_number(row.fd, '.2f')} ({_number(row.fd_low, '.2f')} to {_number(row.fd_high, '.2f')})"
        for row in here.itertuples()
    ]
    claims = SLIDE14.set_index("step").events
    counted: dict[str, list[float | None]] = {
        "measured": [float(count) for count in reuse],
        "claimed": [float(claims[step]) if step in claims.index else None for step in reuse.index],
    }
    names, distances = list(CLAIMED.name), [None if np.isnan(fd) else fd for fd in here.fd]
    charts = [
        bar_chart("Claimed: FID", names, {"FID": CLAIMED.fd.tolist()}, [f"{fd}" for fd in CLAIMED.fd], True),
        bar_chart(f"Measured: {run.profile.distance} (95%)", names, {run.profile.distance: distances}, intervals, True),
        bar_chart("Reuse events at each step (claimed: at every fifth)", [f"{step}" for step in reuse.index], counted),
    ]
    return save(run, "slide13", figure, summary, note, {"charts": charts})


def compared(ours: pd.Series, distance: str) -> str:
    """How far the rule moves the Fréchet distance, by the interval over the same seeds, as on slide 12."""
    interval = f"{_number(ours.fd_growth_low, '+.2f')} to {_number(ours.fd_growth_high, '+.2f')}"
    if ours.fd_growth_low <= 0 <= ours.fd_growth_high:
        return f"DQAR's rule moves {distance} by no measurable amount ({interval})"
    return f"DQAR's rule moves {distance} by {_number(ours.fd_growth, '+.2f')} ({interval})"


def slide13_distances(run: Run, summary: pd.DataFrame) -> Figure:
    """Fréchet distance's growth over full compute and PSNR (dB), for DQAR and the plainest rivals."""
    if summary.fd.isna().all():
        return missing(run, "slide13_distances", "images of every method")
    half = f"{run.profile.num_inference_steps // 2} steps"
    names = {
        **{"static, kv": "every 2nd step, K and V", "static, output": "every 2nd step, output", half: half},
        **{"W8A8 + CSB": "W8A8, balanced", "DQAR rule, kv": "DQAR rule, K and V"},
        **{"DQAR policy, output": "DQAR network, output", "DQAR plan, 2×": "DQAR plan, 2×"},
    }
    table = summary.set_index("method").reindex(list(names)).dropna(subset=["fd"]).reset_index()
    figure, (left, right) = plt.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    colors = [ACCENT if family in OURS else GREY for family in table.family]
    spread = [table.fd_growth - table.fd_growth_low, table.fd_growth_high - table.fd_growth]
    labels = table.method.map(names)
    left.barh(labels, table.fd_growth, xerr=np.clip(spread, 0, None), color=colors, capsize=5)
    left.axvline(0, color=GREY)
    left.invert_yaxis()
    left.set(xlabel=f"{run.profile.distance} over full compute's")
    bars = right.barh(labels, table.psnr, color=colors)
    right.bar_label(bars, [f"{psnr:.1f}" for psnr in table.psnr], padding=5)
    right.set(xlabel="PSNR to full compute (dB)", xlim=(0, 1.25 * table.psnr.max()))
    right.grid(visible=False)
    closer = int((table.fd_growth_high < 0).sum())
    headline(
        figure,
        f"In pairs, {closer} of {len(table)} methods come closer to the data than full compute, though their images "
        "differ from its: a smaller distance is no better image",
    )
    return save(
        run,
        "slide13_distances",
        figure,
        summary,
        f"n = {int(table.images.max()):,} images; bars: 95% of the difference on the same seeds",
    )


def methods_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Every method's cost and quality, in words; "–" where nothing was recorded."""
    return pd.DataFrame(
        {
            "Method": summary.method,
            "ms a step": [_number(x, ".1f") for x in summary.ms_per_step],
            "Speedup (quartiles)": [
                f"{r.speedup:.2f} ({r.speedup_low:.2f}–{r.speedup_high:.2f})" if r.speedup == r.speedup else "–"
                for r in summary.itertuples()
            ],
            "MAC reduction": [_number(x, ".2f", "×") for x in summary.macs_speedup],
            "Events": [_number(x, ".0f") for x in summary.events],
            "Sites reused": [_number(x * 100, ".0f", " %") for x in summary.sites_reused],
            "MB: weights, cache, added at the peak": [
                f"{_number(r.weight_bytes / 1e6, '.1f')}, {_number(r.cache_bytes / 1e6, '.2f')}, "
                f"{_number(r.added_bytes / 1e6, '.0f')}"
                for r in summary.itertuples()
            ],
            f"{summary.attrs.get('distance', 'Fréchet distance')} (95 %)": [
                f"{r.fd:.2f} ({r.fd_low:.2f}–{r.fd_high:.2f})" if r.fd == r.fd else "–" for r in summary.itertuples()
            ],
            **{
                name.upper().replace("SFID", "sFID"): [_number(x, ".3g") for x in summary[name]]
                for name in ("sfid", "lpips", "clip")
                if summary[name].notna().any()
            },
            "PSNR": [_number(x, ".1f", " dB") if x != np.inf else "identical" for x in summary.psnr],
            "SSIM": [_number(x, ".4f") for x in summary.ssim],
            "Class right": [_number(x * 100, ".1f", " %") for x in summary.class_accuracy],
            "n": [_number(x, ".0f") for x in summary.images],
        }
    )


def _number(value: float, spec: str, unit: str = "") -> str:
    return "–" if value != value else f"{value:{spec}}{unit}".replace("-", "−")


def _percent(value: float) -> str:
    return _number(100 * value, "+.0f", "%")
