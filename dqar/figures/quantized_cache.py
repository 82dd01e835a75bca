"""Figures of notebook 04: the quantized cache (slide 6)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dqar.figures.style import ACCENT, BLUE, headline, save
from dqar.measure.results import Run


def slide06_quantization(run: Run, error: pd.DataFrame, quality: pd.DataFrame) -> Figure:
    """Error against bytes for each tensor, bit width and mode; and what the bits cost in the image."""
    figure, (left, right) = plt.subplots(1, 2)
    means = error.groupby(["tensor", "bits", "mode"], as_index=False)[["relative_error", "bytes_per_value"]].mean()
    sns.lineplot(means, x="bytes_per_value", y="relative_error", hue="mode", style="tensor", markers=True, ax=left,
                 markersize=12, lw=2, errorbar=None)  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="bytes per value, scales included", ylabel="relative error (RMS)")
    left.set_xticks([0.25, 0.5, 1.0, 2.0], ["0.25", "0.5", "1", "2 (FP16)"])
    left.minorticks_off()
    left.set_title("Error of the cached tensors")
    left.legend(fontsize=12, loc="lower left")
    shown = quality[quality.bits < 16].assign(kind=lambda t: t.target + ", " + t["mode"])
    sns.stripplot(shown, x="psnr_cache", y=shown.bits.map("INT{}".format), hue="target", ax=right, size=13, jitter=0.12,
                  palette={"kv": BLUE, "output": ACCENT}, order=["INT8", "INT4", "INT2"])  # fmt: skip
    right.set(xlabel="PSNR to unquantized reuse (dB)", ylabel="")
    right.legend(title="what is cached", fontsize=14, title_fontsize=14)
    right.set_title("Error in the image (a dot a mode)")
    best = shown.groupby("bits").psnr_cache.max()
    headline(
        figure,
        f"Best mode, dB to an unquantized cache: {best[8]:.0f} at 8 bits, {best[4]:.0f} at 4, {best[2]:.0f} at 2",
    )
    return save(run, "slide06_quantization", figure, quality)
