"""Figures of notebook 07: cost and quality of every method (slides 12, 13)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, GREY, headline, recorded, save, save_table
from dqar.measure.results import Run
from dqar.studies.compare import FULL, OURS

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
    colors = [ACCENT if f in OURS else BLUE if f == FULL.name else GREY for f in table.family]
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


def _number(value: float, spec: str, unit: str = "") -> str:
    return "–" if value != value else f"{value:{spec}}{unit}"
