import json
import os
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dqar.figures import style
from dqar.figures.gallery import NOTEBOOKS, publish
from dqar.measure import results
from dqar.measure.results import Run

FIGURES = NOTEBOOKS.parent / "figures"


def dense(run):
    """A map of 28 × 50 numbers, three thousand points, and text: as dense as any picture of the deck."""
    rng = np.random.default_rng(0)
    figure, (left, right) = plt.subplots(1, 2)
    mesh = left.pcolormesh(rng.random((28, 50)), cmap="cividis", rasterized=True)
    figure.colorbar(mesh, ax=left)
    right.scatter(*rng.random((2, 3_000)), c=rng.random(3_000), s=10, cmap="viridis", rasterized=True)
    right.set(xlabel="denoising step", ylabel="entropy (nats)")
    style.headline(figure, "A dense map and three thousand points " * 3)
    style.save(run, "slide99_dense", figure, pd.DataFrame({"x": [1]}), "n = 12 images")
    return style.path_of(run, "slide99_dense")


def plain(run, seed=0, name="slide99_plain"):
    """A line and a title."""
    figure, axes = plt.subplots()
    axes.plot(np.random.default_rng(seed).random(9))
    style.headline(figure, "A line of nine points")
    style.save(run, name, figure, pd.DataFrame({"x": [1]}), "n = 12 images")
    return style.path_of(run, name)


def test_a_dense_picture_is_small_and_keeps_the_projects_colours(tmp_path):
    path = dense(Run("smoke", 0, tmp_path))
    assert path.with_suffix(".png").stat().st_size <= style.LARGEST_FILE
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.mode == "P" and picture.size == (1920, 1080)
        assert picture.convert("RGB").getpixel((3, 1076)) == (255, 255, 255)
    vector = path.with_suffix(".svg").read_text()
    assert vector.count("<image") >= 2 and len(vector) < 500_000  # map and points as pixels, text as paths


def test_what_is_drawn_twice_is_written_once(tmp_path):
    run = Run("smoke", 0, tmp_path)
    path = plain(run)
    for suffix in (".png", ".svg", ".json"):
        os.utime(path.with_suffix(suffix), (1, 1))
    assert plain(run).with_suffix(".png").stat().st_mtime == 1
    assert path.with_suffix(".svg").stat().st_mtime == 1 and path.with_suffix(".json").stat().st_mtime == 1
    plain(run, seed=1)
    assert all(path.with_suffix(suffix).stat().st_mtime > 1 for suffix in (".png", ".svg", ".json"))


def test_what_is_not_measured_yet_is_not_published(tmp_path):
    run = Run("smoke", 0, tmp_path / "out")
    style.missing(run, "slide06", "a table")
    assert list(run.figures.rglob("slide06.png")) and publish(run.figures, tmp_path / "committed") == []


def test_only_changed_pictures_are_published_whatever_their_commit(tmp_path):
    run, again, committed = Run("smoke", 0, tmp_path / "a"), Run("smoke", 0, tmp_path / "b"), tmp_path / "figures"
    plain(run)
    plain(run, name="slide04")
    assert len(publish(run.figures, committed)) == 6
    before = (committed / "deck/slide04.json").read_text()
    plain(again, name="slide04")
    sidecar = style.path_of(again, "slide04").with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "commit": "another", "date": "tomorrow"}))
    assert publish(again.figures, committed) == [] and (committed / "deck/slide04.json").read_text() == before
    plain(again, seed=1, name="slide04")
    assert publish(again.figures, committed) == [f"deck/slide04.{suffix}" for suffix in ("json", "png", "svg")]
    gallery = (committed / "README.md").read_text()
    assert "deck/slide04.png" in gallery and "appendix/slide99_plain.png" in gallery


def test_a_table_says_everything_in_markdown_and_latex(tmp_path):
    run = Run("smoke", 0, tmp_path)
    table = pd.DataFrame({"τ": ["τ(8) ≈ 2.0\n√x"], "50 %": ["a_b"], "verdict": ["✗"]})
    style.save_table(run, "slide98", "A finding", table, [20, 20, 20])
    path = style.path_of(run, "slide98")
    assert "τ(8) ≈ 2.0 / √x" in path.with_suffix(".md").read_text()
    latex = path.with_suffix(".tex").read_text()
    assert r"50 \%" in latex and r"a\_b" in latex and latex.isascii()
    assert json.loads(path.with_suffix(".json").read_text())["title"] == "A finding"


@pytest.mark.parametrize(
    "cell, latex",
    [
        ("[0.5, 50]", "{[}0.5, 50{]}"),  # a bracket after a line break is read as its argument
        ("H < 2 > 1 | x", "H $<$ 2 $>$ 1 $|$ x"),  # the standard font has other signs in their places
        (
            r"a\b {c} 5 % #1 $2 x_t & ~^",
            r"a\textbackslash{}b \{c\} 5 \% \#1 \$2 x\_t \& \textasciitilde{}\textasciicircum{}",
        ),
        ("“τ(8) ≈ 2”", None),  # curly quotes have no form yet: refused, and not written wrongly
        ("−0.5 to 3× ≤ ∞ ✓", r"--0.5 to 3$\times$ $\le$ $\infty$ $\checkmark$"),
    ],
)
def test_signs_that_latex_cannot_take_are_escaped_or_refused(tmp_path, cell, latex):
    run = Run("smoke", 0, tmp_path)
    table = pd.DataFrame({"a": [cell], "b": ["x"]})
    if latex is None:
        with pytest.raises(ValueError, match="'“' in .* has no LaTeX form"):
            style.write_table(run, "slide98", table)
        return
    style.write_table(run, "slide98", table)
    lines = style.path_of(run, "slide98").with_suffix(".tex").read_text().splitlines()
    assert lines[:4] == [r"\begin{tabular}{ll}", r"\toprule", r"a & b \\", r"\midrule"]
    assert lines[4] == rf"{latex} & x \\"


@pytest.mark.parametrize("path", sorted(FIGURES.rglob("*.tex")), ids=lambda path: path.stem)
def test_a_committed_latex_table_has_the_columns_and_rows_of_its_markdown(path):
    text = path.read_text()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = len(re.search(r"tabular}{(l+)}", text)[1])
    assert text.isascii() and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    markdown = path.with_suffix(".md").read_text().splitlines()
    assert len(rows) == len(markdown) - 1  # whose second line separates the head
    for row in rows:
        plain = re.sub(r"\\[&%_#${}\\]", "", row)
        assert plain.count("$") % 2 == 0 and plain.count("{") == plain.count("}")
        assert not re.search(r"[%#~]", plain) and not re.search(r"[_^]", re.sub(r"\$[^$]*\$", "", plain))


def test_a_table_too_long_to_draw_has_a_sidecar_that_changes_only_with_its_cells(tmp_path):
    run, committed = Run("smoke", 0, tmp_path / "a"), tmp_path / "figures"

    def write(cell):
        style.save_plain_table(run, "slide98_claims", "Two cells", pd.DataFrame({"a": [cell], "b": [1]}))
        return style.path_of(run, "slide98_claims").with_suffix(".json")

    sidecar = write("x")
    words = json.loads(sidecar.read_text())
    assert words["title"] == "Two cells" and words["table"] == {"columns": ["a", "b"], "rows": [["x", "1"]]}
    assert words["commit"] and words["seed"] == 0
    assert publish(run.figures, committed) == [f"appendix/slide98_claims.{suffix}" for suffix in ("json", "md", "tex")]
    sidecar.write_text(json.dumps({**words, "commit": "another"}))
    assert publish(run.figures, committed) == [] and json.loads(write("x").read_text())["commit"] == "another"
    write("y")
    assert publish(run.figures, committed) == [f"appendix/slide98_claims.{suffix}" for suffix in ("json", "md", "tex")]
    plain(run, name="slide04")
    publish(run.figures, committed)
    assert "(appendix/slide98_claims.md) | Two cells |" in (committed / "README.md").read_text()


def test_a_figure_of_the_deck_keeps_what_the_deck_claims_beside_what_was_measured(tmp_path):
    run = Run("smoke", 0, tmp_path)
    sidecar = json.loads(plain(run, name="slide13").with_suffix(".json").read_text())
    assert sidecar["claimed"] == "FID 10.8 against 10.2; zero reuse in steps 0 to 15"
    assert sidecar["title"].startswith("A line") and {"alt", "commit", "device", "seed"} <= sidecar.keys()
    assert "claimed" not in json.loads(plain(run).with_suffix(".json").read_text())


def test_an_animation_keeps_every_frame_its_time_and_its_words(tmp_path):
    run = Run("smoke", 0, tmp_path)
    colors = [(255, 255, 255), (213, 94, 0), (0, 0, 0)]
    frames = [Image.new("RGB", (40, 30), "white") for _ in colors]
    for number, (frame, color) in enumerate(zip(frames, colors, strict=True)):
        frame.paste(color, (10 * number, 0, 10 * number + 10, 30))
    frames[-1].paste(colors[1], (0, 0, 10, 30))  # whose palette all frames share
    source = {"commit": "abc", "seed": 0}
    path = style.save_animation(run, "moves", frames, [100, 100, 4000], "Three frames", source)
    with Image.open(path) as gif:
        assert gif.format == "GIF" and gif.size == (40, 30) and gif.n_frames == 3 and gif.info["loop"] == 0
        for number, milliseconds in enumerate([100, 100, 4000]):
            gif.seek(number)
            assert gif.info["duration"] == milliseconds
            assert np.array_equal(np.array(gif.convert("RGB")), np.array(frames[number]))
    sidecar = json.loads(path.with_suffix(".json").read_text())
    words = {"figure": "moves", "title": "Three frames", "alt": "Three frames."}
    assert sidecar == {**words, "drawn_at": results.commit(), **source}  # measured at another commit than drawn
    for file in (path, path.with_suffix(".json")):
        os.utime(file, (1, 1))
    style.save_animation(run, "moves", frames, [100, 100, 4000], "Three frames", {"commit": "def", "seed": 0})
    assert path.stat().st_mtime == 1 and path.with_suffix(".json").stat().st_mtime == 1
    style.save_animation(run, "moves", frames[::-1], [100, 100, 4000], "Three frames", source)
    assert path.stat().st_mtime > 1


@pytest.mark.parametrize("text, lines", [("Short.", 1), ("word " * 20, 2), ("word " * 36, 3)])
def test_a_headline_is_broken_into_lines_of_equal_length(text, lines):
    figure = plt.figure()
    style.headline(figure, text.strip())
    broken = figure.get_suptitle().splitlines()
    plt.close(figure)
    assert len(broken) == lines and max(map(len, broken)) - min(map(len, broken)) < 14


@pytest.mark.parametrize("words, lines", [(0, 1), (10, 1), (26, 2), (39, 3)])
def test_a_footer_is_broken_before_it_reaches_what_it_was_measured_on_and_the_picture_makes_room(words, lines):
    figure, axes = plt.subplots()
    axes.set_xlabel("denoising step")
    said = style.add_footer(figure, " ".join(["reuse"] * words), "digits · AMD EPYC · seed 100")
    figure.canvas.draw()
    right, left = (text.get_window_extent() for text in figure.texts)
    label = axes.xaxis.label.get_window_extent()
    plt.close(figure)
    assert said.count("\n") + 1 == lines and said.split() == ["reuse"] * words
    assert left.x0 >= 0 and left.x1 < right.x0 and right.x1 <= figure.bbox.width
    assert left.y1 <= label.y0 and min(left.y0, right.y0) >= 0


def test_a_word_without_room_beside_what_it_was_measured_on_is_refused(tmp_path):
    figure = plt.figure()
    with pytest.raises(ValueError, match="has no room beside 'digits'"):
        style.add_footer(figure, "reuse" * 60, "digits")
    plt.close(figure)
