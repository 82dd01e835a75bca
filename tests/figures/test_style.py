import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dqar.figures import style
from dqar.figures.gallery import publish
from dqar.measure.results import Run


def dense(run, seed=0, name="slide99_dense"):
    """A map of 28 × 50 numbers, three thousand points, and text: as dense as any picture of the deck."""
    rng = np.random.default_rng(seed)
    figure, (left, right) = plt.subplots(1, 2)
    mesh = left.pcolormesh(rng.random((28, 50)), cmap="cividis", rasterized=True)
    figure.colorbar(mesh, ax=left)
    right.scatter(*rng.random((2, 3_000)), c=rng.random(3_000), s=10, cmap="viridis", rasterized=True)
    right.set(xlabel="denoising step", ylabel="entropy (nats)")
    style.headline(figure, "A dense map and three thousand points " * 3)
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
    path = dense(run)
    for suffix in (".png", ".svg", ".json"):
        os.utime(path.with_suffix(suffix), (1, 1))
    assert dense(run).with_suffix(".png").stat().st_mtime == 1
    assert path.with_suffix(".svg").stat().st_mtime == 1 and path.with_suffix(".json").stat().st_mtime == 1
    dense(run, seed=1)
    assert all(path.with_suffix(suffix).stat().st_mtime > 1 for suffix in (".png", ".svg", ".json"))


def test_only_changed_pictures_are_published_whatever_their_commit(tmp_path):
    run, again, committed = Run("smoke", 0, tmp_path / "a"), Run("smoke", 0, tmp_path / "b"), tmp_path / "figures"
    dense(run)
    dense(run, name="slide04")
    assert len(publish(run.figures, committed)) == 6
    before = (committed / "deck/slide04.json").read_text()
    dense(again, name="slide04")
    sidecar = style.path_of(again, "slide04").with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "commit": "another", "date": "tomorrow"}))
    assert publish(again.figures, committed) == [] and (committed / "deck/slide04.json").read_text() == before
    dense(again, seed=1, name="slide04")
    assert publish(again.figures, committed) == [f"deck/slide04.{suffix}" for suffix in ("json", "png", "svg")]
    gallery = (committed / "README.md").read_text()
    assert "deck/slide04.png" in gallery and "appendix/slide99_dense.png" in gallery


def test_a_table_says_everything_in_markdown_and_latex(tmp_path):
    run = Run("smoke", 0, tmp_path)
    table = pd.DataFrame({"τ": ["τ(8) ≈ 2.0\n√x"], "50 %": ["a_b"], "verdict": ["✗"]})
    style.save_table(run, "slide98", "A finding", table, [20, 20, 20])
    path = style.path_of(run, "slide98")
    assert "τ(8) ≈ 2.0 / √x" in path.with_suffix(".md").read_text()
    latex = path.with_suffix(".tex").read_text()
    assert r"50 \%" in latex and r"a\_b" in latex and latex.isascii()
    assert json.loads(path.with_suffix(".json").read_text())["title"] == "A finding"


@pytest.mark.parametrize("text, lines", [("Short.", 1), ("word " * 20, 2), ("word " * 36, 3)])
def test_a_headline_is_broken_into_lines_of_equal_length(text, lines):
    figure = plt.figure()
    style.headline(figure, text.strip())
    found = figure.get_suptitle().splitlines()
    plt.close(figure)
    assert len(found) == lines and max(map(len, found)) - min(map(len, found)) < 14
