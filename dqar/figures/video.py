"""Figures of notebook 09's video panel: reuse over steps, over frames, and plans, on videos (slide 16)."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image as DisplayedImage
from matplotlib.figure import Figure

from dqar.figures.style import (
    ACCENT,
    BLUE,
    DARK,
    GREEN,
    GREY,
    add_footer,
    frame_of,
    headline,
    missing,
    mosaic,
    plain_ticks,
    recorded,
    save,
    save_animation,
)
from dqar.measure.results import Run
from dqar.studies import video
from dqar.studies.compare import FULL

LOOKS = {
    video.PLAN: ("plan (forecast over steps)", ACCENT, "o", "-"),
    "fewer steps": ("fewer steps", GREY, "D", "-"),
    "prediction over steps": ("model's output, over steps", BLUE, "s", "--"),
    "sites over steps": ("inside the blocks, over steps", BLUE, "o", "-"),
    "prediction over frames": ("model's picture, over frames", GREEN, "s", "--"),
    "sites over frames": ("inside the blocks, over frames", GREEN, "o", "-"),
}
"""Of families: words, colour, marker and line."""
WHAT = "reuse over steps and over frames, and plans, on videos"


@recorded(WHAT)
def slide16_video(run: Run, table: pd.DataFrame) -> Figure:
    """Quality against MACs of reuse over steps and over frames at the same sites, of plans and of fewer steps.

    Args:
        table: recorded by ``studies.video.record_video``.
    """
    points, images = video.summary(table), table.image.nunique()
    figure, axes = plt.subplots()
    for family, (words, color, marker, line) in LOOKS.items():
        part = points[points.family == family].sort_values("macs_speedup")
        axes.plot(part.macs_speedup, part["median"], line, marker=marker, ms=11, lw=2.5, color=color, label=words)
        axes.vlines(part.macs_speedup, part["5th percentile"], part["median"], color=color, lw=1.2)
    axes.set(xscale="log", xlabel="times fewer MACs, counted", ylabel="PSNR to full compute (dB)")
    axes.set_xticks([1.5, 2, 3, 4])
    axes.minorticks_off()
    plain_ticks(axes.xaxis)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    headline(figure, video.in_words(table))
    note = f"marker: median, line: to the 5th percentile, n = {images} videos of {video.FRAMES} frames"
    return save(run, "slide16_video", figure, table, note)


def slide16_contact_sheet(run: Run, drawn: video.Shown | None) -> Figure:
    """Two videos, frame by frame, a row each: by full compute, a plan, and reuse over steps and over frames.

    Args:
        drawn: of ``studies.video.shown``.
    """
    if drawn is None:
        return missing(run, "slide16_contact_sheet", WHAT)
    figure, panels = plt.subplots(len(drawn.videos), 1)
    for axes, (name, videos) in zip(panels, drawn.videos.items(), strict=True):
        axes.imshow(mosaic(videos[3:5].flatten(0, 1), videos.shape[1]), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.set_ylabel(_label(drawn, name), rotation=0, ha="right", va="center", color=_color(name))
    headline(figure, _finding(drawn))
    return save(run, "slide16_contact_sheet", figure, drawn.costs, _note(drawn))


def slide16_moving_digits(run: Run, drawn: video.Shown | None) -> Figure | DisplayedImage:
    """A GIF of ten videos by full compute, a plan, and reuse over steps and over frames.

    Args:
        drawn: of ``studies.video.shown``.
    """
    if drawn is None:
        return missing(run, "slide16_moving_digits", WHAT)
    figure, panels = plt.subplots(2, 2, dpi=75)
    headline(figure, _finding(drawn))
    add_footer(figure, _note(drawn))
    shown = []
    for axes, (name, videos) in zip(panels.flat, drawn.videos.items(), strict=True):
        axes.axis("off")
        axes.set_title(_label(drawn, name).replace("\n", ": "), color=_color(name))
        shown.append((axes.imshow(mosaic(videos[:, 0]), cmap="gray_r", vmin=0, vmax=1), videos))
    figure.canvas.draw()
    figure.set_layout_engine("none")  # all frames have the first one's
    frames = []
    for frame in range(video.FRAMES):
        for picture, videos in shown:
            picture.set_data(mosaic(videos[:, frame]))
        frames.append(frame_of(figure))
    plt.close(figure)
    source = drawn.costs.attrs["provenance"]
    path: Path = save_animation(run, "slide16_moving_digits", frames, [250] * video.FRAMES, _finding(drawn), source)
    return DisplayedImage(path, alt=_finding(drawn))


def _finding(drawn: video.Shown) -> str:
    plan, steps, frames = drawn.costs["median"]
    return f"The same videos: a plan keeps {plan:.1f} dB, reuse over steps {steps:.1f}, over frames {frames:.1f}"


def _note(drawn: video.Shown) -> str:
    return f"×: times fewer MACs; dB: median of {drawn.recorded} videos"


def _label(drawn: video.Shown, name: str) -> str:
    if name == FULL.name:
        return name.capitalize()
    return f"{name.capitalize()}\n{drawn.costs.macs_speedup[name]:.2f}×"


def _color(name: str) -> str:
    return {FULL.name: DARK, video.PLAN: ACCENT}.get(name, BLUE if "steps" in name else GREEN)
