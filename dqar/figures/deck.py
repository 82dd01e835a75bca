"""The PowerPoint deck: slides with editable titles, native tables and charts, and notes, from the figures' sidecars."""

from __future__ import annotations

import colorsys
import io
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pptx import Presentation
from pptx.chart.data import CategoryChartData
from pptx.dml.color import RGBColor
from pptx.enum.chart import XL_CHART_TYPE, XL_LABEL_POSITION, XL_LEGEND_POSITION
from pptx.enum.text import MSO_ANCHOR, PP_ALIGN
from pptx.oxml.ns import qn
from pptx.util import Emu, Inches, Pt

from dqar.figures.style import ACCENT, CLAIMS, DARK, GREEN, GREY, SMALLEST, TITLE_SIZE

WIDTH, HEIGHT = 12.8, 7.2
"""Inches, as of the figures: text has the same size in a picture and beside it."""
FOOTER = 0.33
"""Inches of each line below the picture: how many images, model, hardware, seed."""
NIGHT = "#14181D"
"""Background of a dark deck."""
FONT = "Arial"
CONVERTER = "soffice"


BOUNDS = {
    # slide: what facts or arithmetic allow, where ``studies.claims.errata`` has no row of it
    6: "8 of 16 bits are 0.50 of FP16's bytes, K in FP16 with V in INT8 0.75, before scales",
    7: "five features, two hidden layers of 64 and one output have 4,609 parameters",
    10: "none; the structure is read from the code",
    11: "DiT-XL/2 takes class labels, so COCO's captions cannot be its input",
    13: "where the intervals of two distances overlap, they show no difference",
    16: "b bits take b/16 of FP16's bytes before scales",
    17: "reuse of K and V at every site saves at most 16 % of DiT-XL/2's MACs, so 1.19× at most",
}


@dataclass(frozen=True)
class Look:
    """Colours of a deck: light or dark, on a background of its own or on none."""

    dark: bool = False
    transparent: bool = False

    def color(self, light: str) -> RGBColor:
        """A colour of the light figures in this deck."""
        red, green, blue = (int(light[i : i + 2], 16) for i in (1, 3, 5))
        return RGBColor(*(darkened((red, green, blue)) if self.dark else (red, green, blue)))


def write_deck(figures: Path, target: Path, slides: Iterable[int] | None = None, look: Look | None = None) -> None:
    """Writes a PowerPoint file of the deck's slides; reads pictures and sidecars, and measures nothing.

    Args:
        figures: folder that ``dqar workbook --figures`` fills; its ``deck/`` has one picture a slide.
        target: the file to write.
        slides: numbers of the deck's slides; all, in order, if ``None``.
        look: colours; the light figures' own if ``None``.

    Raises:
        ValueError: a slide that the deck doesn't have.
        OSError: a picture or sidecar is missing, or ``target`` can't be written.
    """
    chosen = list(CLAIMS) if slides is None else sorted(set(slides))
    for number in chosen:
        if number not in CLAIMS:
            raise ValueError(f"slide {number} is not accepted: the deck has slides {min(CLAIMS)} to {max(CLAIMS)}")
        for suffix in (".png", ".json"):
            if not (path := _picture(figures, number).with_suffix(suffix)).exists():
                raise FileNotFoundError(f"{path} is missing: `make figures` draws it")
    errata = _errata(figures / "appendix/slide04_claims.md")
    look = look or Look()
    deck = Presentation()
    deck.slide_width, deck.slide_height = Inches(WIDTH), Inches(HEIGHT)
    deck.core_properties.title = "Dynamic Quantized Attention Reuse: claimed and measured"
    for number in chosen:
        _add_slide(deck, figures, number, errata, look)
    target.parent.mkdir(parents=True, exist_ok=True)
    deck.save(str(target))


def write_pdf(deck: Path) -> Path:
    """Converts a PowerPoint file to PDF beside it, by LibreOffice.

    Raises:
        RuntimeError: LibreOffice isn't installed, or fails.
    """
    converter = shutil.which(CONVERTER)
    if converter is None:
        raise RuntimeError(f"{deck} is written, but a PDF of it needs LibreOffice's {CONVERTER}, which isn't installed")
    target = deck.with_suffix(".pdf")
    with tempfile.TemporaryDirectory() as folder:  # a user profile of its own: LibreOffice may be open meanwhile
        options = [f"-env:UserInstallation={Path(folder).as_uri()}", "--headless", "--convert-to", "pdf"]
        command = [converter, *options, "--outdir", folder, str(deck)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        made = Path(folder) / target.name
        if done.returncode or not made.exists():
            raise RuntimeError(f"LibreOffice could not convert {deck}: {done.stderr.strip() or done.stdout.strip()}")
        shutil.copyfile(made, target)
    return target


def notes(slide: int, sidecar: dict[str, Any], errata: list[dict[str, str]]) -> str:
    """A slide's speaker notes: claimed, bound, measured, hardware, seed, commits of measurement and drawing.

    Args:
        sidecar: of the slide's figure.
        errata: rows of ``studies.claims.errata``; those of other slides are left out.
    """
    subject, claim = CLAIMS[slide]
    lines = [f"Slide {slide}: {subject}", f"The deck claims: {claim}.", f"Measured: {sidecar['title']}."]
    if sidecar["note"]:
        lines.append(f"How: {' '.join(sidecar['note'].split())}.")
    for row in errata:
        if str(slide) in row["slide"].split(", "):
            lines.append(f"Claimed: {row['claimed']}. Bound: {row['bound']}. Measured: {row['measured']}.")
    if slide in BOUNDS:
        lines.append(f"Bound: {BOUNDS[slide]}.")
    lines.append(
        f"Hardware: {_source(sidecar)}." if sidecar["measured_on"] else "Hardware, seed: none, nothing was run."
    )
    if images := sidecar.get("images"):  # times and images were recorded apart
        lines.append(f"Images: {_source(images)}; commit {images['commit']}, {images['date'][:10]}.")
    lines.append(f"Measured at commit {sidecar['commit']}, {sidecar['date'][:10]}; drawn at {sidecar['drawn_at']}.")
    return "\n".join(lines)


def _source(provenance: dict[str, Any]) -> str:
    """Device, precision, threads and seed in words."""
    threads = "1 thread" if provenance["threads"] == 1 else f"{provenance['threads']} threads"
    return f"{provenance['device']}, {provenance['dtype']}, {threads}; seed {provenance['seed']}"


def darkened(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """The colour of the same hue for a dark slide: white becomes ``NIGHT``, and black white."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(part / 255 for part in color))
    inverted = colorsys.hls_to_rgb(hue, 1 - lightness, saturation)
    night = [int(NIGHT[i : i + 2], 16) for i in (1, 3, 5)]
    red, green, blue = (round(low + part * (255 - low)) for low, part in zip(night, inverted, strict=True))
    return red, green, blue


def picture_of(path: Path, top: float, look: Look, footer: float = FOOTER) -> Image.Image:
    """A figure without its title and footer, in the look's colours.

    Args:
        path: of a PNG with a palette.
        top: share of the picture that its title takes.
        footer: inches at its bottom.
    """
    with Image.open(path) as whole:
        edges = round(top * whole.height), round((1 - footer / HEIGHT) * whole.height)
        picture = whole.crop((0, edges[0], whole.width, edges[1]))
    palette = picture.getpalette() or []
    colors = [(palette[i], palette[i + 1], palette[i + 2]) for i in range(0, len(palette), 3)]
    shown = [darkened(color) for color in colors] if look.dark else colors
    if look.transparent:
        # The background shows through by as much as a colour is like it, so that blurred edges fit any background.
        alphas = [255 - min(color) for color in colors]
        background = darkened((255, 255, 255)) if look.dark else (255, 255, 255)
        shown = [_without(color, background, alpha) for color, alpha in zip(shown, alphas, strict=True)]
        picture.info["transparency"] = bytes(alphas)
    picture.putpalette([part for color in shown for part in color])
    return picture


def _without(color: tuple[int, ...], background: tuple[int, ...], alpha: int) -> tuple[int, int, int]:
    """The colour that, ``alpha``/255 opaque on ``background``, looks like ``color``."""
    share = max(alpha, 1) / 255
    parts = ((part - (1 - share) * below) / share for part, below in zip(color, background, strict=True))
    red, green, blue = (min(255, max(0, round(part))) for part in parts)
    return red, green, blue


def _picture(figures: Path, slide: int) -> Path:
    return figures / f"deck/slide{slide:02}.png"


def _errata(path: Path) -> list[dict[str, str]]:
    """Rows of the Markdown table that ``studies.claims.errata`` is written to; none where it isn't written."""
    if not path.exists():
        return []
    lines = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in path.read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def _add_slide(deck: Any, figures: Path, number: int, errata: list[dict[str, str]], look: Look) -> None:
    path = _picture(figures, number)
    sidecar = json.loads(path.with_suffix(".json").read_text())
    slide = deck.slides.add_slide(deck.slide_layouts[5])  # title only
    if look.dark and not look.transparent:
        slide.background.fill.solid()
        slide.background.fill.fore_color.rgb = look.color("#FFFFFF")
    title = slide.shapes.title
    top = max(sidecar["body_top"] * HEIGHT, 0.5)
    title.left, title.top, title.width, title.height = (Inches(x) for x in (0.3, 0.04, WIDTH - 0.6, top - 0.04))
    _write(title.text_frame, sidecar["title"], look.color(DARK), TITLE_SIZE, bold=True, align=PP_ALIGN.CENTER)
    title.text_frame.vertical_anchor = MSO_ANCHOR.MIDDLE
    foot = FOOTER * (sidecar["note"].count("\n") + 1)
    box = (0.3, top + 0.06, WIDTH - 0.6, HEIGHT - foot - top - 0.1)
    if "table" in sidecar:
        _add_table(slide, sidecar["table"], box, look).set("descr", sidecar["alt"])
    elif "charts" in sidecar:
        _add_charts(slide, sidecar["charts"], box, look)
    else:
        file = io.BytesIO()
        picture_of(path, sidecar["body_top"], look, foot).save(file, "PNG")
        shown = slide.shapes.add_picture(file, 0, Inches(sidecar["body_top"] * HEIGHT), width=Inches(WIDTH))
        shown.name = path.stem
        shown._element._nvXxPr.cNvPr.set("descr", sidecar["alt"])
    for text, align in ((sidecar["note"], PP_ALIGN.LEFT), (sidecar["measured_on"], PP_ALIGN.RIGHT)):
        if text:
            # Nine inches for the longer one, at either side; the shorter never reaches so far.
            left = 0.0 if align == PP_ALIGN.LEFT else WIDTH - 5
            width = 9.0 if align == PP_ALIGN.LEFT else 5
            footer = slide.shapes.add_textbox(*(Inches(x) for x in (left, HEIGHT - foot, width, foot)))
            _write(footer.text_frame, text, look.color(GREY), SMALLEST, align=align)
    slide.notes_slide.notes_text_frame.text = notes(number, sidecar, errata)


def _write(
    frame: Any, text: str, color: RGBColor, size: float, *, bold: bool = False, align: Any = PP_ALIGN.LEFT
) -> None:
    frame.word_wrap = True
    frame.margin_top = frame.margin_bottom = Emu(0)
    for number, line in enumerate(text.split("\n")):
        paragraph = frame.paragraphs[0] if number == 0 else frame.add_paragraph()
        paragraph.alignment = align
        run = paragraph.add_run()
        run.text = line
        _set_font(run.font, color, size, bold)


def _set_font(font: Any, color: RGBColor, size: float = SMALLEST, bold: bool = False) -> None:
    font.name, font.size, font.bold = FONT, Pt(size), bold
    font.color.rgb = color


def _add_table(slide: Any, table: dict[str, Any], box: tuple[float, ...], look: Look) -> Any:
    """A native table; its rows are as high as their text, and share what is left. Returns its non-visual properties."""
    rows = [table["columns"], *table["rows"]]
    left, top, width, height = box
    widths = [width * share / sum(table["widths"]) for share in table["widths"]]
    lines = [max(_lines(cell, inches) for cell, inches in zip(row, widths, strict=True)) for row in rows]
    line = SMALLEST * 1.2 / 72
    spare = max(0.04, (height - line * sum(lines)) / len(rows))
    shape = slide.shapes.add_table(len(rows), len(widths), *(Inches(x) for x in box))
    shape.name = "table"
    style = shape._element.graphic.graphicData.tbl.find(qn("a:tblPr")).find(qn("a:tableStyleId"))
    style.text = "{2D5ABB26-0587-4C30-8999-92F81FD0307C}"  # no style, no grid: cells bring their own colours
    native = shape.table
    for column, inches in zip(native.columns, widths, strict=True):
        column.width = Inches(inches)
    for number, (row, count) in enumerate(zip(rows, lines, strict=True)):
        native.rows[number].height = Inches(line * count + min(spare, 0.35))
        ours = number > 0 and row[0].startswith("DQAR")
        for place, text in enumerate(row):
            cell = native.cell(number, place)
            cell.vertical_anchor = MSO_ANCHOR.MIDDLE
            cell.margin_left = cell.margin_right = Inches(0.06)
            light = ACCENT if ours else GREEN if text == "✓" else DARK
            _write(cell.text_frame, text, look.color(light), SMALLEST, bold=number == 0 or ours)
            if number and number % 2 == 0 and not look.transparent:
                cell.fill.solid()
                cell.fill.fore_color.rgb = look.color("#F3F5F7")
            else:
                cell.fill.background()
    return shape._element._nvXxPr.cNvPr


def _lines(text: str, inches: float) -> int:
    """Lines that ``text`` takes in a column; a letter is at most 0.56 of its height wide on average."""
    room = max(1, int((inches - 0.12) * 72 / (SMALLEST * 0.56)))
    return sum(max(1, math.ceil(len(line) / room)) for line in text.split("\n"))


def _add_charts(slide: Any, charts: list[dict[str, Any]], box: tuple[float, ...], look: Look) -> None:
    """Native charts: those with horizontal bars beside each other, the others below them."""
    left, top, width, height = box
    above = [chart for chart in charts if chart["horizontal"]]
    below = [chart for chart in charts if not chart["horizontal"]]
    share = 0.52 if above and below else float(bool(above))
    for row, start, part in ((above, top, share), (below, top + share * height, 1 - share)):
        for place, chart in enumerate(row):
            inches = width / len(row)
            _add_chart(slide, chart, (left + place * inches, start, inches, part * height), look)


def _add_chart(slide: Any, chart: dict[str, Any], box: tuple[float, ...], look: Look) -> None:
    data = CategoryChartData()
    data.categories = chart["categories"]
    for name, values in chart["series"].items():
        data.add_series(name, values)
    kind = XL_CHART_TYPE.BAR_CLUSTERED if chart["horizontal"] else XL_CHART_TYPE.COLUMN_CLUSTERED
    shape = slide.shapes.add_chart(kind, *(Inches(x) for x in box), data)
    shape.name = chart["title"]
    shape._element._nvXxPr.cNvPr.set("descr", _in_words(chart))
    native, color = shape.chart, look.color(DARK)
    _set_font(native.font, color)
    native.has_title = True
    _write(native.chart_title.text_frame, chart["title"], color, SMALLEST, bold=True)
    native.has_legend = len(chart["series"]) > 1
    if native.has_legend:
        native.legend.position, native.legend.include_in_layout = XL_LEGEND_POSITION.TOP, False
    native.value_axis.has_major_gridlines = not chart["horizontal"]
    native.value_axis.minimum_scale = 0
    if native.value_axis.has_major_gridlines:
        native.value_axis.major_gridlines.format.line.color.rgb = look.color("#B8C0C8")
    if chart["horizontal"]:
        native.category_axis.reverse_order = True  # the first on top, as in a table
        native.value_axis.visible = False
        # Room for the labels at the bars' ends.
        native.value_axis.maximum_scale = 1.9 * max(v for v in next(iter(chart["series"].values())) if v is not None)
    plot = native.plots[0]
    plot.gap_width, plot.overlap = 40, 0
    single = len(chart["series"]) == 1
    for number, series in enumerate(plot.series):
        series.format.fill.solid()
        series.format.fill.fore_color.rgb = look.color(GREY if single or number else ACCENT)
        for place, category in enumerate(chart["categories"]):
            if single and category.startswith("DQAR"):
                series.points[place].format.fill.solid()
                series.points[place].format.fill.fore_color.rgb = look.color(ACCENT)
            if number == 0 and chart["labels"]:
                label = series.points[place].data_label
                _write(label.text_frame, chart["labels"][place], color, SMALLEST)
                label.text_frame.word_wrap = False
                label.position = XL_LABEL_POSITION.OUTSIDE_END


def _in_words(chart: dict[str, Any]) -> str:
    """Alternative text of a chart: its numbers, where they are few."""
    labels = chart["labels"] or []
    return ": ".join([chart["title"], ", ".join(map(" ".join, zip(chart["categories"], labels, strict=False)))])
