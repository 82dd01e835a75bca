import json

import pytest
from PIL import Image

from dqar.figures import style
from dqar.figures.gallery import NOTEBOOKS
from dqar.figures.style import CLAIMS

FOLDER = NOTEBOOKS.parent / "figures"
PICTURES = sorted(FOLDER.rglob("*.png"))


def test_every_slide_has_its_picture():
    assert [path.stem for path in sorted((FOLDER / "deck").glob("*.png"))] == [f"slide{slide:02}" for slide in CLAIMS]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_committed_picture_can_be_shown(path):
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size <= style.LARGEST_FILE
    assert sidecar["smallest_text"] >= style.SMALLEST
    assert len(sidecar["title"].split()) >= 5 and sidecar["alt"].startswith(sidecar["title"])
    assert sidecar["commit"] and "not measured yet" not in path.with_suffix(".svg").read_text()
    with Image.open(path) as picture:
        assert picture.size == (1920, 1080) and picture.mode == "P"


def test_the_gallery_shows_every_picture_and_its_command():
    gallery = (FOLDER / "README.md").read_text()
    lines = [line for line in gallery.splitlines() if ".png" in line]
    assert len(lines) == len(PICTURES) and all("`dqar workbook --only " in line for line in lines)
