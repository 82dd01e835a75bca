import io
import json

import numpy as np
import pandas as pd
import pytest
from lxml import etree
from PIL import Image
from pptx import Presentation
from pptx.enum.dml import MSO_FILL
from pptx.util import Inches

from dqar.__main__ import main
from dqar.commands import deck as deck_command
from dqar.figures import deck, style
from dqar.figures.gallery import NOTEBOOKS
from dqar.figures.style import CLAIMS
from dqar.measure.results import Run

FIGURES = NOTEBOOKS.parent / "figures"
DARK = deck.Look(dark=True)


def sidecar(slide):
    return json.loads((FIGURES / f"deck/slide{slide:02}.json").read_text())


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    path = tmp_path_factory.mktemp("deck") / "deck.pptx"
    deck.write_deck(FIGURES, path)
    return dict(zip(CLAIMS, Presentation(str(path)).slides, strict=True))


def texts(slide):
    return [shape.text_frame.text for shape in slide.shapes if shape.has_text_frame]


@pytest.mark.parametrize("number", CLAIMS)
def test_a_slide_has_its_finding_as_title_and_stays_on_the_canvas(slides, number):
    slide = slides[number]
    assert slide.shapes.title.text_frame.text == sidecar(number)["title"]
    for shape in slide.shapes:
        assert shape.left >= 0 and shape.left + shape.width <= Inches(deck.WIDTH)
        assert shape.top >= 0 and shape.top + shape.height <= Inches(deck.HEIGHT)
    content = [shape for shape in slide.shapes if shape.has_table or shape.has_chart or shape.shape_type == 13]
    assert content and all(shape._element._nvXxPr.cNvPr.get("descr") for shape in content)


@pytest.mark.parametrize("number", CLAIMS)
def test_nothing_is_smaller_than_in_the_figures(slides, number):
    for shape in slides[number].shapes:
        frames = [shape.text_frame] if shape.has_text_frame else []
        if shape.has_table:
            frames = [cell.text_frame for row in shape.table.rows for cell in row.cells]
        for run in (run for frame in frames for paragraph in frame.paragraphs for run in paragraph.runs):
            assert run.font.size.pt >= deck.SMALLEST


@pytest.mark.parametrize("number", [11, 12, 14, 15, 16, 17])
def test_a_table_of_the_deck_is_a_native_table_with_the_figures_own_cells(slides, number):
    [table] = [shape.table for shape in slides[number].shapes if shape.has_table]
    cells = [[cell.text_frame.text for cell in row.cells] for row in table.rows]
    assert cells == [sidecar(number)["table"]["columns"], *sidecar(number)["table"]["rows"]]


def test_native_cells_are_those_of_the_markdown_table_to_the_last_zero(tmp_path):
    run = Run("smoke", 0, tmp_path)
    table = pd.DataFrame([("0", "3.30", "1.0", "-0.50"), ("DQAR", "1,400", "0.100", "a\nb")], columns=list("abcd"))
    style.save_table(run, "slide14", "A finding in five words", table, [20, 20, 20, 20])
    deck.write_deck(run.figures, tmp_path / "deck.pptx", [14])
    [slide] = Presentation(str(tmp_path / "deck.pptx")).slides
    [native] = [shape.table for shape in slide.shapes if shape.has_table]
    lines = style.path_of(run, "slide14").with_suffix(".md").read_text().splitlines()
    markdown = [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]
    assert [[cell.text_frame.text.replace("\n", " / ") for cell in row.cells] for row in native.rows] == markdown
    assert markdown[1] == ["0", "3.30", "1.0", "−0.50"]


def test_slide_13_has_native_bars_with_the_measured_distances(slides):
    charts = {shape.chart.chart_title.text_frame.text: shape.chart for shape in slides[13].shapes if shape.has_chart}
    claimed, measured, events = charts.values()
    assert list(claimed.plots[0].series[0].values) == [10.2, 10.5, 10.6, 10.8]
    rows = sidecar(12)["table"]["rows"][:4]
    shown = [f"{value:.2f}" for value in measured.plots[0].series[0].values]
    assert shown == [row[-1].split("\n")[1].split(" ")[0] for row in rows]
    by_step = dict(zip(events.plots[0].categories, events.plots[0].series[0].values, strict=True))
    table = {row[0]: float(row[-1]) for row in sidecar(14)["table"]["rows"]}
    assert {step: by_step[step] for step in table if step in by_step} == {
        step: count for step, count in table.items() if step in by_step
    }
    assert len(by_step) >= 10


@pytest.mark.parametrize("number", CLAIMS)
def test_notes_say_what_was_claimed_and_how_it_was_measured(slides, number):
    said, source = slides[number].notes_slide.notes_text_frame.text, sidecar(number)
    assert f"The deck claims: {CLAIMS[number][1]}." in said and f"Measured: {source['title']}." in said
    assert source["commit"] in said and source["note"].replace("\n", " ") in said
    if source["measured_on"]:
        assert source["device"] in said and f"seed {source['seed']}" in said


def test_notes_of_a_doubtful_claim_give_its_bound(slides):
    said = slides[12].notes_slide.notes_text_frame.text
    assert "Claimed: 47 reuses a run give −23 % time. Bound: 47 of 1400 sites save at most" in said
    assert said.count("Bound: ") == 2


@pytest.mark.parametrize("number", CLAIMS)
def test_notes_give_a_bound_hardware_and_where_images_were_recorded_apart(slides, number):
    said, images = slides[number].notes_slide.notes_text_frame.text, sidecar(number).get("images")
    assert "Bound: " in said and "Hardware" in said and "seed" in said
    assert ("Images: " in said) == bool(images)
    if images:
        assert f"{images['device']}, {images['dtype']}" in said.split("Images: ")[1] and images["commit"] in said


def test_a_picture_fits_under_its_title_and_shows_the_same_pixels(slides):
    [shown] = [shape for shape in slides[4].shapes if shape.shape_type == 13]
    top = sidecar(4)["body_top"]
    whole = Image.open(FIGURES / "deck/slide04.png").convert("RGB")
    part = deck.picture_of(FIGURES / "deck/slide04.png", top, deck.Look()).convert("RGB")
    start = round(top * whole.height)
    assert np.array_equal(np.array(part), np.array(whole)[start : start + part.height])
    assert shown.top == pytest.approx(Inches(top * deck.HEIGHT), abs=Inches(0.01))
    assert shown.height / shown.width == pytest.approx(part.height / part.width, rel=1e-3)
    assert shown.top + shown.height <= Inches(deck.HEIGHT - deck.FOOTER + 0.02)


def test_dark_colours_keep_their_hue_and_turn_white_to_night():
    assert "#{:02X}{:02X}{:02X}".format(*deck.darkened((255, 255, 255))) == deck.NIGHT
    assert deck.darkened((0, 0, 0)) == (255, 255, 255)
    red, green, blue = deck.darkened((0xD5, 0x5E, 0x00))
    assert red > green > blue


@pytest.mark.parametrize("look", [deck.Look(transparent=True), deck.Look(dark=True, transparent=True)])
def test_a_transparent_picture_looks_the_same_on_its_own_background(look):
    path, top = FIGURES / "deck/slide06.png", sidecar(6)["body_top"]
    solid = deck.picture_of(path, top, deck.Look(dark=look.dark)).convert("RGB")
    clear = deck.picture_of(path, top, look).convert("RGBA")
    night = deck.darkened((255, 255, 255)) if look.dark else (255, 255, 255)
    placed = Image.new("RGBA", clear.size, night)
    placed.alpha_composite(clear)
    difference = np.abs(np.array(placed.convert("RGB")).astype(int) - np.array(solid).astype(int))
    assert clear.getpixel((2, 2))[3] == 0 and difference.max() <= 3


def test_chosen_slides_come_in_order_and_a_dark_deck_has_a_background(tmp_path):
    deck.write_deck(FIGURES, tmp_path / "dark.pptx", [14, 6, 14], DARK)
    dark = Presentation(str(tmp_path / "dark.pptx")).slides
    assert [slide.shapes.title.text_frame.text for slide in dark] == [sidecar(6)["title"], sidecar(14)["title"]]
    assert str(dark[0].background.fill.fore_color.rgb) == deck.NIGHT[1:]


def test_a_transparent_slide_has_no_fill_of_its_own_and_a_picture_with_alpha(tmp_path):
    deck.write_deck(FIGURES, tmp_path / "deck.pptx", [4, 14], deck.Look(dark=True, transparent=True))
    picture, table = Presentation(str(tmp_path / "deck.pptx")).slides
    assert picture.follow_master_background and table.follow_master_background
    [shown] = [shape for shape in picture.shapes if shape.shape_type == 13]
    alpha = np.array(Image.open(io.BytesIO(shown.image.blob)).convert("RGBA"))[..., 3]
    assert alpha.min() == 0 and alpha.max() > 200
    [native] = [shape.table for shape in table.shapes if shape.has_table]
    assert {cell.fill.type for row in native.rows for cell in row.cells} == {MSO_FILL.BACKGROUND}
    opaque = deck.Look(dark=True)
    deck.write_deck(FIGURES, tmp_path / "dark.pptx", [14], opaque)
    [dark] = [shape.table for shape in Presentation(str(tmp_path / "dark.pptx")).slides[0].shapes if shape.has_table]
    assert dark.cell(2, 0).fill.fore_color.rgb == opaque.color("#F3F5F7")
    assert dark.cell(1, 0).text_frame.paragraphs[0].runs[0].font.color.rgb == opaque.color(style.DARK)


@pytest.mark.parametrize(
    "options, chosen, look",
    [
        ([], list(CLAIMS), deck.Look()),
        (["--slide", "14"], [14], deck.Look()),
        (["--slide", "14", "--slide", "6", "--dark"], [6, 14], DARK),
        (["--slide", "4", "--dark", "--transparent"], [4], deck.Look(dark=True, transparent=True)),
    ],
)
def test_the_command_writes_the_slides_and_the_look_that_it_is_asked_for(options, chosen, look, tmp_path, monkeypatch):
    monkeypatch.setattr(deck_command, "write_pdf", lambda path: path.with_suffix(".pdf"))
    assert main(["deck", *options, "--out", str(tmp_path / "new"), "--figures", str(FIGURES)]) == 0
    deck.write_deck(FIGURES, tmp_path / "wanted.pptx", chosen, look)
    made, committed = (
        Presentation(str(path)).slides for path in (tmp_path / "new/deck.pptx", tmp_path / "wanted.pptx")
    )
    assert [slide.shapes.title.text_frame.text for slide in made] == [sidecar(number)["title"] for number in chosen]
    assert [etree.tostring(slide._element) for slide in made] == [etree.tostring(slide._element) for slide in committed]


def test_without_libreoffice_the_command_keeps_the_pptx_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deck, "CONVERTER", "no-such-office")
    assert main(["deck", "--slide", "14", "--out", str(tmp_path)]) == 1
    assert "is written, but a PDF of it needs LibreOffice's no-such-office" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["deck.pptx"]
    assert main(["deck", "--slide", "3", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "dqar deck: slide 3 is not accepted: the deck has slides 4 to 17\n"


def test_a_slide_that_is_not_in_the_deck_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="slide 3 is not accepted: the deck has slides 4 to 17"):
        deck.write_deck(FIGURES, tmp_path / "deck.pptx", [14, 3])
    with pytest.raises(FileNotFoundError, match="slide14.png is missing: `make figures` draws it"):
        deck.write_deck(tmp_path, tmp_path / "deck.pptx", [14])
    assert not list(tmp_path.iterdir())
