"""Figures of notebook 04: the quantized cache (slide 6)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, DARK, GREEN, GREY, headline, plain_ticks, recorded, save
from dqar.measure import metrics
from dqar.measure.results import Run
from dqar.studies import arena
from dqar.studies import quantized_cache as study

CACHES = {
    # bits and mode of a row of quantization_quality: what it is called
    (16, "per_channel"): "K and V in FP16",
    (8, "per_tensor"): "INT8, one scale a tensor",
    (8, "per_channel"): "INT8, one scale a channel",
    (8, "mixed"): "K in FP16, V in INT8",
    (4, "per_channel"): "INT4, one scale a channel",
    (4, "per_channel fitted"): "INT4, levels fitted",
    (2, "per_channel"): "INT2, one scale a channel",
    (2, "per_channel fitted"): "INT2, levels fitted",
}


def slide06(run: Run, quality: pd.DataFrame) -> Figure:
    """Slide 6's formula, and the bytes of each kind of cache with what its bits cost in the image.

    Args:
        quality: of ``quantized_cache.quantization_quality``.
    """
    table = quality[quality.target == "kv"].set_index(["bits", "mode"]).loc[list(CACHES)].reset_index()
    # Kept as it is, a value takes this profile's bytes; the deck counts FP16's two.
    unquantized = table.cache_bytes[0] * 2 / run.profile.dtype.itemsize
    share = table.cache_bytes.where(table.bits < 16, unquantized) / unquantized
    figure, axes = plt.subplots()
    names = list(CACHES.values())
    colors = [GREY if bits == 16 else ACCENT for bits, _ in CACHES]
    bars = axes.barh(names, share, color=colors)
    dbs = table[["median", "5th percentile"]].to_numpy()
    quality_of = ["" if np.isinf(most) else f" of FP16; {most:.0f} dB ({least:.0f})" for most, least in dbs]
    axes.bar_label(bars, [f"{s:.2f}{text}" for s, text in zip(share, quality_of, strict=True)], padding=8,
                   bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.axvline(0.5, color=GREY, ls="--", lw=2, zorder=0)
    axes.set(xlim=(0, 1.15), xlabel="memory of the cache, scales included (FP16 = 1; dashed: the deck's INT8, 0.5)")
    axes.set_xticks(np.arange(0, 1.01, 0.25))
    axes.set_title(
        r"$K_q=\mathrm{clip}(\mathrm{round}(K/s_K),\,-127,\,127),\quad s_K=\max|K|\,/\,127$", size=20, pad=14
    )
    by_name = dict(zip(names, share, strict=True))
    scales, mixed = by_name["INT8, one scale a channel"], by_name["K in FP16, V in INT8"]
    headline(
        figure,
        f"INT8 with one scale a channel takes {scales:.2f} of FP16's memory; "
        f"the mixed mode keeps K in FP16 and takes {mixed:.2f}",
    )
    note = f"n = {table.images[0]}, every 2nd step reused; dB to an unquantized cache: median (5th percentile)"
    return save(run, "slide06", figure, quality, note)


def slide06_errors(run: Run, error: pd.DataFrame, quality: pd.DataFrame) -> Figure:
    """Error against bytes for each bit width and mode; and what the bits cost in the image.

    Args:
        error: of ``quantized_cache.quantization_error``.
        quality: of ``quantized_cache.quantization_quality``.
    """
    figure, (left, right) = plt.subplots(1, 2)
    means = _by_levels(error).groupby(["tensor", "bits", "scale", "fitted"], as_index=False)
    means = means[["relative_error", "bytes_per_value"]].mean()
    for scale, color in (("tensor", "#A9B4BF"), ("channel", DARK), ("token", GREY)):
        for fitted, line in ((False, "-"), (True, "--")):
            part = means[(means.scale == scale) & (means.fitted == fitted)].groupby("bits")
            left.plot(part.bytes_per_value.mean(), part.relative_error.median(), color=color, lw=3, ls=line, marker="o",
                      ms=10, mfc="white" if fitted else color, mew=2.5, label=None if fitted else scale)  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="bytes a value, scales included", ylabel="relative error")
    left.set_xticks([0.25, 0.5, 1.0], ["0.25", "0.5", "1"])
    left.minorticks_off()
    left.set_title("Error of the cached tensors")
    plain_ticks(left.yaxis, percent=True)
    left.plot([], [], color=GREY, lw=3, ls="--", marker="o", ms=10, mfc="white", mew=2.5, label="levels fitted")
    left.legend(title="one scale a", loc="lower left")
    shown = _by_levels(quality[(quality.bits < 16) & (quality["mode"] != "mixed")])
    rows = {8: 0, 4: 1, 2: 2}
    for (target, fitted), part in shown.groupby(["target", "fitted"]):
        color, shift = {"kv": (BLUE, -0.15), "output": (GREEN, 0.15)}[target]
        name = {"kv": "K and V", "output": "output"}[target] + ", fitted" * fitted
        right.scatter(part["median"], part.bits.map(rows) + shift, s=150, marker="D" if fitted else "o", lw=2.5,
                      color="white" if fitted else color, ec=color, label=name)  # fmt: skip
    right.set(xlabel="median PSNR to an unquantized cache (dB)", ylim=(2.5, -0.9))
    right.set_yticks(list(rows.values()), [f"INT{bits}" for bits in rows])
    right.legend(loc="upper left", ncols=2, columnspacing=1, handletextpad=0.3)
    right.set_title("Of the finished image")
    best = shown.groupby("bits")["median"].max()
    two = shown[shown.bits == 2].groupby("fitted")["median"].max()
    headline(
        figure,
        f"At its best a cache gives {best[8]:.0f}, {best[4]:.0f} and {best[2]:.0f} dB in 8, 4 and 2 bits; in 2 bits "
        f"{two[False]:.0f} dB with even levels, {two[True]:.0f} with fitted ones",
    )
    note = (
        f"n = {quality.images[0]} images, every 2nd step reused, no interval; left: of one image, median of K, V and "
        "attention output"
    )
    return save(run, "slide06_errors", figure, quality, note)


@recorded("bits of each layer")
def slide06_layers(
    run: Run, layers: pd.DataFrame, steps: pd.DataFrame, output: pd.DataFrame, kv: pd.DataFrame
) -> Figure:
    """Which layers and steps tolerate which bits; and quality against bytes, of uniform and of mixed bits.

    Args:
        layers, steps, output, kv: ``bits-layers-output``, ``bits-steps-output``, ``bits-output`` and ``bits-kv`` of
            ``studies.quantized_cache.record_bits``.
    """
    figure, axes = plt.subplot_mosaic([["layer", "bytes"], ["step", "bytes"]], width_ratios=(5, 4))
    colors = {8: DARK, 4: BLUE, 2: GREEN}
    for place, table in (("layer", layers), ("step", steps)):
        quality = metrics.decibels(table[table.bits < 16].groupby([place, "bits"]).mse.mean()).unstack()
        for bits, color in colors.items():
            axes[place].plot(quality.index, quality[bits], color=color, lw=2.5, label=f"INT{bits}")
        axes[place].set(xlabel=f"the only {place} whose cache is in few bits", ylabel="PSNR (dB)")
        if place == "layer":
            shown = output[output.method == study.of_equal_bytes(output).mixed]
            chosen = [int(bits) for bits in shown.layer_bits.iloc[0].split()]
            axes[place].scatter(quality.index, [quality.at[layer, bits] for layer, bits in enumerate(chosen)], s=60,
                                color=[colors[bits] for bits in chosen])  # fmt: skip
    axes["layer"].set_title("Dots: the bits chosen in INT4's bytes")
    axes["step"].legend(ncols=3, columnspacing=1, handlelength=1.2)
    for table, target, face in ((output, "output", None), (kv, "K and V", "white")):
        points = arena.standings(table, "reference", ("family", "share")).sort_values("share")
        for family, words, color in (("uniform", "equal bits", GREY), ("mixed", "by layer", ACCENT)):
            part = points[points.family == family]
            place = part.share + (0.003 if face else 0)  # beside the output's, whose bytes are the same
            axes["bytes"].plot(place, part["median"], color=color, lw=2.5, marker="o", ms=11, mew=2.5,
                               mfc=face or color, label=f"{target}, {words}")  # fmt: skip
            axes["bytes"].vlines(place, part["5th percentile"], part["median"], color=color, lw=1.5, zorder=0)
    axes["bytes"].set(xlabel="share of a 16-bit cache's bytes", ylabel="PSNR to an unquantized cache (dB)")
    axes["bytes"].set_title("On other images")
    axes["bytes"].legend(loc="lower right")
    headline(figure, study.mixed_in_words(output, kv))
    note = f"left: output, n = {layers.image.nunique()}; right: median, line to 5th percentile"
    note += f", n = {output.image.nunique()}"
    return save(run, "slide06_layers", figure, output, note)


def _by_levels(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with its ``mode`` in two columns: ``scale`` (tensor, channel, token), and ``fitted`` levels or not."""
    scale = table["mode"].str.removesuffix(" fitted").str.removeprefix("per_")
    return table.assign(scale=scale, fitted=table["mode"].str.endswith("fitted"))
