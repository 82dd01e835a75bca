"""What all figures share: colours, sizes, headlines, tables, and files that change only with what they show."""

from __future__ import annotations

import functools
import io
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.colors as mcolors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageChops, UnidentifiedImageError

from dqar.files import atomic_path
from dqar.measure.results import Run, commit, provenance

ACCENT = "#D55E00"
"""DQAR, and nothing else; where several of its methods stand side by side, markers tell them apart."""
REUSE, COMPUTE = ACCENT, "#DCE3EA"
BLUE, GREEN, GREY, DARK = "#0072B2", "#009E73", "#5B6670", "#222222"
SMALLEST = 16
"""Points of the smallest text on the 12.8 × 7.2 inch canvas."""
TITLE_SIZE = 21
LARGEST_FILE = 120_000
"""Bytes of a PNG."""
WORDS = ("figure", "title", "claimed", "alt", "smallest_text", "note", "measured_on", "body_top", "table", "charts")
"""What a sidecar says of the picture; its other keys are provenance."""

CLAIMS = {
    # slide: its subject, and what the deck says there
    4: ("Entropy and SNR", "the formulas of attention entropy and SNR"),
    5: ("Reuse gate", "reuse where H < τ(p) and the SNR is in [0.5, 50]; τ(8) ≈ 2.0"),
    6: ("Quantized cache", "INT8 halves the cache of FP16; K in FP16 with V in INT8 as an option"),
    7: ("Learned policy", "a network of fewer than 0.5 M parameters, labelled by FID"),
    8: ("Layer schedule", "shallow layers stabilise first, deep ones last"),
    9: ("Controller", "the controller's loop"),
    10: ("Architecture", "a controller above policy, scheduler, stats, cache and quantizer"),
    11: ("Set-up", "DiT-XL/2 on an A100, COCO prompts, DPM-Solver++ in 50 steps"),
    12: ("Results", "−23.2 % time, −18.1 % memory, +0.6 FID, 47 reuses a run"),
    13: ("Quality", "FID 10.8 against 10.2; zero reuse in steps 0 to 15"),
    14: ("Over time", "entropy falls from 4.8 to 0.8, SNR grows from 0.1 to 201.5, reuse peaks at step 30"),
    15: ("Challenges", "five problems and their solutions"),
    16: ("Future work", "six directions"),
    17: ("Conclusions", "unified, principled, 23 % faster, drop-in, open"),
}

# Slide 14's table: step, entropy (nats), SNR, reuse events.
SLIDE14 = pd.DataFrame(
    [
        (0, 4.8, 0.1, 0),
        (5, 4.2, 0.3, 0),
        (10, 3.5, 0.8, 0),
        (15, 2.8, 2.1, 5),
        (20, 2.1, 5.4, 18),
        (25, 1.7, 12.8, 42),
        (30, 1.4, 28.3, 55),
        (35, 1.2, 52.7, 48),
        (40, 1.0, 89.4, 35),
        (45, 0.9, 142.1, 22),
        (50, 0.8, 201.5, 12),
    ],
    columns=["step", "entropy", "snr", "events"],
)


def use_style() -> None:
    """16:9, readable from the back of a room."""
    sns.set_theme(context="talk", style="whitegrid", palette="colorblind")
    names = ("font.size", "xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize")
    sizes: dict[Any, int] = dict.fromkeys(names, SMALLEST)
    plt.rcParams.update(
        {
            **sizes,
            "axes.labelsize": 17,
            "axes.titlesize": 18,
            "axes.titleweight": "bold",
            "figure.figsize": (12.8, 7.2),
            "figure.constrained_layout.use": True,
            "svg.fonttype": "path",
            "svg.hashsalt": "dqar",
            "font.family": "DejaVu Sans",
        }
    )


REHEARSAL = "REHEARSAL: random weights"
"""Stands in every figure of a rehearsal."""


def save(
    run: Run,
    name: str,
    figure: Figure,
    table: pd.DataFrame,
    note: str = "",
    editable: dict[str, Any] | None = None,
    described: str = "",
) -> Figure:
    """Writes ``name`` as PNG (1920 × 1080, with a palette), SVG and JSON sidecar; closes and returns the figure.

    The footer (``add_footer``) says what was measured: ``note`` (how many images, what the bars are), model, device and
    seed. The date and the commits of measurement and drawing stand in the sidecar alone, and the files are written only
    where picture or words have changed: drawing the same thing again changes no file.

    Args:
        name: ``"slide14"`` is slide 14 of the deck; any other name, such as ``"slide14_curves"``, is appendix.
        table: what is drawn; ``table.attrs`` brings the provenance of a measured one.
        note: how many images, what the bars are.
        editable: what ``dqar deck`` makes a native table or native charts of: ``{"table": …}`` as by ``save_table``, or
            ``{"charts": [...]}`` of ``bar_chart``.
        described: for the alternative text, what a picture without axes shows.
    """
    source = table.attrs.get("provenance") or provenance(run.profile, run.seed)
    device = source["device"].replace("(R)", "").removesuffix(" Processor")
    rehearsal = REHEARSAL if run.profile.rehearsal else ""
    measured_on = ""
    if len(table.columns):  # something was measured
        measured_on = f"{source['profile']['name']} · {device} · seed {source['seed']}"
    note = add_footer(figure, with_minus(note), " · ".join(filter(None, (rehearsal, measured_on))))
    for text in figure.findobj(Text):
        if (signed := with_minus(text.get_text())) != text.get_text():
            text.set_text(signed)
    title = figure.get_suptitle() or (figure.axes[0].get_title() or figure.axes[0].get_title("left"))
    title = title.replace("\n", " ")
    panels = [" against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel()))) for ax in figure.axes]
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    words = {
        "figure": name,
        "title": title,
        **_claimed(name),
        "alt": ". ".join(filter(None, [title, described, *panels, note, rehearsal])).replace("\n", " ").strip(". ")
        + ".",
        "smallest_text": min(text.get_fontsize() for text in texts),
        "note": note,
        "measured_on": measured_on,
        "body_top": _below_title(figure.get_suptitle().count("\n") + 1 if figure.get_suptitle() else 0),
        **(editable or {}),
    }
    png = with_palette(Image.open(drawn))
    target = path_of(run, name).with_suffix(".png")
    if not shows_the_same(target, png, words):
        with atomic_path(target.with_suffix(".svg")) as path:
            figure.savefig(path, dpi=100, metadata={"Date": None})
        _write_with_sidecar(target, png, words, source)
    plt.close(figure)
    return figure


def _alt(run: Run, title: str) -> str:
    """Of a picture that has no axes to describe."""
    return f"{title}. {REHEARSAL}." if run.profile.rehearsal else f"{title}."


def save_animation(
    run: Run, name: str, frames: list[Image.Image], milliseconds: list[int], title: str, source: dict[str, Any]
) -> Path:
    """Writes ``name`` as an endless GIF and a JSON sidecar, where picture or words have changed.

    Args:
        frames: of one size, in RGB; they get one palette in common.
        milliseconds: that each frame is shown.
        title: the finding; also the alternative text.
        source: provenance.
    """
    key = _in_colors(frames[-1], 64)
    drawn = [frame.quantize(palette=key, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    drawn[0].save(file, "GIF", save_all=True, append_images=drawn[1:], duration=milliseconds, loop=0, optimize=True)
    target = path_of(run, name).with_suffix(".gif")
    words = {"figure": name, "title": title, "alt": _alt(run, title)}
    if not shows_the_same(target, file.getvalue(), words):
        _write_with_sidecar(target, file.getvalue(), words, source)
    return target


def add_footer(figure: Figure, note: str, source: str = "") -> str:
    """Writes a note at the left below what will be drawn, and at the right where that comes from.

    The note is broken into as few lines as end before the source, of about equal length, and what is drawn makes room
    for them.

    Returns:
        The note, with its line breaks.

    Raises:
        ValueError: no room is left for a word of the note.
    """
    place: dict[str, Any] = {"y": 0.008, "size": SMALLEST, "color": GREY, "va": "bottom"}
    right = figure.text(0.992, s=source, ha="right", **place)
    left = figure.text(0.008, s=note, ha="left", **place)
    room = right.get_window_extent().x0 - 0.016 * figure.bbox.width
    said, lines = "", 0
    for width in range(max(len(note), 1), 0, -1):
        broken = textwrap.wrap(note, width, break_long_words=False)
        if lines and len(broken) > lines:
            break
        left.set_text("\n".join(broken))
        if left.get_window_extent().x1 <= room:
            said, lines = left.get_text(), max(len(broken), 1)
    if not lines:
        raise ValueError(f"the note {note!r} has no room beside {source!r}: write less")
    left.set_text(said)
    figure.set_layout_engine("constrained", rect=(0, 0.045 * lines, 1, 1 - 0.045 * lines))
    return said


def frame_of(figure: Figure) -> Image.Image:
    """The figure as it is now, in RGB: a frame for ``save_animation``."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])  # type: ignore[attr-defined]


def mosaic(images: torch.Tensor, a_row: int = 5) -> np.ndarray:
    """Images ``[N, C, H, W]``, so many ``a_row``, with white between them: ``[height, width, C]``."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0 if images.shape[1] == 1 else 1)
    rows = [torch.cat(list(row), dim=2) for row in padded.split(a_row)]
    return torch.cat(rows, dim=1).permute(1, 2, 0).clamp(0, 1).numpy()


def bar_chart(
    title: str,
    categories: list[str],
    series: dict[str, list[float | None]],
    labels: list[str] | None = None,
    horizontal: bool = False,
) -> dict[str, Any]:
    """A bar chart as a sidecar keeps it, for ``dqar deck``.

    Args:
        series: numbers by name, one a category; ``None`` is a gap. The first is the one that ``labels`` stand at.
        labels: text at each bar, such as a value with its interval.
    """
    return {"title": title, "categories": categories, "series": series, "labels": labels, "horizontal": horizontal}


def _claimed(name: str) -> dict[str, str]:
    """What the deck says where the figure ``name`` belongs; nothing for the appendix."""
    slide = next((slide for slide in CLAIMS if name == f"slide{slide:02}"), None)
    return {} if slide is None else {"claimed": CLAIMS[slide][1]}


def with_minus(text: str) -> str:
    """``text`` with a minus sign, not a hyphen, before its negative numbers."""
    return re.sub(r"(?<![\w)\]}.-])-(?=[\d.])", "−", text)


def _below_title(lines: int) -> float:
    """Where a headline of so many lines ends: the share of the canvas above what is drawn."""
    return round((0.07 + lines * TITLE_SIZE * 1.2 / 72) / 7.2, 4) if lines else 0.0


def _write_with_sidecar(target: Path, picture: bytes, words: dict, source: dict[str, Any]) -> None:
    with atomic_path(target) as path:
        path.write_bytes(picture)
    _write_sidecar(target.with_suffix(".json"), words, source)


def _write_sidecar(target: Path, words: dict, source: dict[str, Any]) -> None:
    with atomic_path(target) as path:
        path.write_text(json.dumps({**words, "drawn_at": commit(), **source}, indent=2, ensure_ascii=False) + "\n")


def pictures(run: Run) -> str:
    """What the profile's model draws, in a word."""
    return "digits" if run.profile.model == "digits" else "images"


def path_of(run: Run, name: str) -> Path:
    """Where a figure of that name goes, without suffix; its folder is made."""
    folder = run.figures / ("deck" if re.fullmatch(r"slide\d\d", name) else "appendix")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def with_palette(picture: Image.Image) -> bytes:
    """A PNG of ``picture`` in as many of 256 colours as fit ``LARGEST_FILE``; in 16 where not even those fit."""
    picture = picture.convert("RGB")
    for colors in (256, 128, 64, 32, 16):
        file = io.BytesIO()
        _in_colors(picture, colors).save(file, "PNG", optimize=True)
        if file.tell() <= LARGEST_FILE:
            break
    return file.getvalue()


def _in_colors(picture: Image.Image, colors: int) -> Image.Image:
    """An RGB picture in so many colours of its own, among which white and the project's colours are as they are."""
    exact = np.array([mcolors.to_rgb(color) for color in ("white", ACCENT, COMPUTE, BLUE, GREEN, GREY, DARK)]) * 255
    sample = Image.new("RGB", (picture.width, picture.height + 20 * len(exact)))  # a strip of each below
    sample.paste(picture)
    for row, color in enumerate(exact):
        top = picture.height + 20 * row
        sample.paste(tuple(color.round().astype(int)), (0, top, picture.width, top + 20))
    drawn = sample.quantize(colors, dither=Image.Dither.NONE).crop((0, 0, picture.width, picture.height))
    entries = np.array(drawn.getpalette()).reshape(-1, 3)
    for color in exact:
        entries[np.abs(entries - color).sum(1).argmin()] = color.round()
    drawn.putpalette(entries.ravel().tolist())
    return drawn


def shows_the_same(target: Path, picture: bytes, words: dict) -> bool:
    """Whether the figure at ``target`` has the pixels of a PNG, or the bytes of a GIF, and its ``words`` already."""
    if not says_the_same(target, words):
        return False
    try:
        if target.suffix == ".gif":
            return target.read_bytes() == picture
        pictures = [Image.open(file).convert("RGB") for file in (target, io.BytesIO(picture))]
    except (OSError, UnidentifiedImageError, ValueError):
        return False
    return pictures[0].size == pictures[1].size and ImageChops.difference(*pictures).getbbox() is None


def says_the_same(target: Path, words: dict) -> bool:
    """Whether the sidecar of the figure at ``target`` has these ``words`` already."""
    try:
        return words_of(target) == words
    except (OSError, ValueError):
        return False


def words_of(picture: Path) -> dict[str, Any]:
    """What a picture's sidecar says of it, without its provenance.

    Raises:
        OSError: there is no sidecar.
        ValueError: the sidecar isn't JSON.
    """
    sidecar = json.loads(picture.with_suffix(".json").read_text())
    return {key: sidecar[key] for key in WORDS if key in sidecar}


def save_plain_table(
    run: Run, name: str, title: str, table: pd.DataFrame, source: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Writes a table that is too long to be drawn: Markdown, LaTeX and a sidecar; returns it.

    Args:
        source: the measured table that it was made of, with its provenance.
    """
    write_table(run, name, table)
    cells = table.map(lambda cell: with_minus(str(cell)))
    native = {"columns": list(cells.columns), "rows": cells.values.tolist()}
    words: dict[str, Any] = {"figure": name, "title": title, "alt": _alt(run, title), "table": native}
    target = path_of(run, name).with_suffix(".json")
    if not says_the_same(target, words):
        measured = source.attrs.get("provenance") if source is not None else None
        _write_sidecar(target, words, measured or provenance(run.profile, run.seed))
    return table


def write_table(run: Run, name: str, table: pd.DataFrame) -> None:
    """Writes a table as Markdown and LaTeX."""
    table = table.map(lambda cell: with_minus(str(cell).replace("\n", " / ")))
    table = table.rename(columns=lambda column: column.replace("\n", " "))
    markdown = table.to_markdown(index=False, disable_numparse=True)  # else 3.30 becomes 3.3
    for suffix, text in ((".md", markdown), (".tex", _latex(table))):
        with atomic_path(path_of(run, name).with_suffix(suffix)) as path:
            path.write_text(text + "\n")


def save_table(
    run: Run,
    name: str,
    title: str,
    table: pd.DataFrame,
    widths: list[int],
    source: pd.DataFrame | None = None,
    note: str = "",
) -> Figure:
    """Writes a table as Markdown and LaTeX and, drawn, as a figure.

    Args:
        widths: in characters a column; some 95 fill the canvas.
        source: the measured table that it was made of, with its provenance.
    """
    write_table(run, name, table)
    table = table.map(lambda cell: with_minus(str(cell)))
    wide = [int(0.85 * width) for width in widths]  # bold letters take more room
    cells = [
        [_wrapped(str(x), width) for x, width in zip(row, chars, strict=True)]
        for row, chars in [(table.columns, wide), *((row, widths) for row in table.values)]
    ]
    heights = [0.5 + max(cell.count("\n") + 1 for cell in row) for row in cells]
    total = max(sum(heights), 12)
    figure, axes = plt.subplots()
    axes.set(xlim=(0, sum(widths)), ylim=(total, 0))
    axes.axis("off")
    headline(figure, title)
    lefts = np.cumsum([0, *widths[:-1]])
    top = 0.0
    size = max(SMALLEST, min(19, 330 / total, 1500 / sum(widths)))
    for number, (row, height) in enumerate(zip(cells, heights, strict=True)):
        if number % 2 == 0 and number:
            axes.axhspan(top, top + height, color="#F3F5F7", zorder=0)
        for left, cell in zip(lefts, row, strict=True):
            ours = number and row[0].startswith("DQAR")
            color = ACCENT if ours else GREEN if cell == "✓" else DARK
            weight = "bold" if number == 0 or ours else "normal"
            place: dict[str, Any] = {
                "va": "center",
                "linespacing": 1.15,
                "size": size,
                "weight": weight,
                "color": color,
            }
            axes.text(left + 0.5, top + height / 2, cell, **place)
        axes.axhline(top + height, color="#B8C0C8", lw=2 if number == 0 else 0.6)
        top += height
    native = {"columns": list(table.columns), "rows": table.values.tolist(), "widths": widths}
    rows = "; ".join(": ".join((row[0], ", ".join(filter(None, row[1:])))) for row in table.values.tolist())
    described = f"Table of {', '.join(filter(None, table.columns))}: {rows}"
    return save(run, name, figure, source if source is not None else table, note, {"table": native}, described)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""])


def plain_ticks(axis: Axis, percent: bool = False) -> None:
    """Numbers as they are at the ticks of a logarithmic axis: 0.01 or 1%, not a power of ten."""
    axis.set_major_formatter((lambda x, _: f"{100 * x:,.6g}%") if percent else "{x:,.6g}")


def headline(figure: Figure, text: str) -> None:
    """The finding, in one sentence, as the figure's title; lines of about equal length."""
    number = len(textwrap.wrap(text, 68))
    width = next(width for width in range(len(text) // number, 69) if len(textwrap.wrap(text, width)) <= number)
    figure.suptitle("\n".join(textwrap.wrap(text, width)), weight="bold", size=TITLE_SIZE)


def recorded(what: str) -> Callable:
    """For figures of recorded tables: where one is ``None``, the figure says that ``what`` is not measured yet."""

    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def figure_or_gap(run: Run, *tables: pd.DataFrame | None) -> Figure:
            if all(table is not None for table in tables):
                return draw(run, *tables)
            return missing(run, draw.__name__, what)

        return figure_or_gap

    return decorate


def missing(run: Run, name: str, what: str) -> Figure:
    """A figure in place of one whose measurement has not been recorded, with the command that records it."""
    figure, axes = plt.subplots()
    axes.axis("off")
    text = f"not measured yet for profile {run.profile.name}:\n{what}\n\ndqar record --profile {run.profile.name}"
    axes.text(0.5, 0.5, text, ha="center", va="center", size=26, color=GREY)
    return save(run, name, figure, pd.DataFrame())


LATEX = {
    **{sign: f"\\{sign}" for sign in "&%_#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": "$|$", '"': "''", "[": "{[}", "]": "{]}"},
    **{"×": r"$\times$", "≤": r"$\le$", "≥": r"$\ge$", "≈": r"$\approx$", "√": r"$\surd$", "∈": r"$\in$"},
    **{"·": r"$\cdot$", "±": r"$\pm$", "∞": r"$\infty$", "‖": r"$\|$", "→": r"$\to$", "↓": r"$\downarrow$"},
    **{"τ": r"$\tau$", "ρ": r"$\rho$", "δ": r"$\delta$", "ε": r"$\epsilon$", "α": r"$\alpha$", "σ": r"$\sigma$"},
    **{"Σ": r"$\Sigma$", "ᾱ": r"$\bar\alpha$", "₀": "$_0$", "²": r"\textsuperscript{2}", "é": r"\'e"},
    **{"−": "--", "–": "--", "…": r"\dots{}", "’": "'", "✓": r"$\checkmark$", "✗": "no"},
}
"""Signs that a LaTeX document with ``amssymb`` and ``booktabs`` can't take, or prints as another sign, as they are.

A bracket that begins a row would be read as the argument of the line break before it.
"""


def _latex(table: pd.DataFrame) -> str:
    """A ``tabular`` in ASCII.

    Raises:
        ValueError: a sign that ``LATEX`` doesn't know.
    """

    def escaped(text: str) -> str:
        for sign in text:
            if sign not in LATEX and not sign.isascii():
                raise ValueError(f"{sign!r} in {text!r} has no LaTeX form: add it to dqar.figures.style.LATEX")
        return "".join(LATEX.get(sign, sign) for sign in text)

    return table.map(escaped).rename(columns=escaped).style.hide(axis="index").to_latex(hrules=True)


use_style()
