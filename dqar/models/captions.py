"""The deck's prompts (slide 11): 128 captions of COCO-2017's validation images, downloaded once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm.auto import tqdm

ARCHIVE = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
ARCHIVE_SHA1 = "8551ee4bb5860311e79dace7e79cb91e432e78b3"  # as gluon-cv and others publish it
MEMBER = "annotations/captions_val2017.json"
NUM_CAPTIONS, SEED = 128, 0


@functools.cache
def coco_captions() -> tuple[str, ...]:
    """128 captions, always the same ones: of images chosen by seed 0, each image's first by annotation number.

    Kept in ``$DQAR_CACHE``, by default ``~/.cache/dqar``; the first call downloads 241 MB.

    Raises:
        OSError: no network, and nothing kept.
        ValueError: the download, or what was kept, isn't what it should be.
    """
    kept = Path(os.environ.get("DQAR_CACHE", Path.home() / ".cache" / "dqar")) / "coco-val2017-captions.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:  # on the same disk, so that renaming is atomic
            archive, chosen = Path(folder) / "annotations.zip", Path(folder) / kept.name
            _download(ARCHIVE, archive)
            chosen.write_text(json.dumps(_choose(_read(archive)), indent=1))
            chosen.replace(kept)
    try:
        captions = tuple(json.loads(kept.read_text()))
    except ValueError as error:
        raise ValueError(f"{kept} is truncated: remove it, and the captions are downloaded again") from error
    return captions


def _choose(annotations: list[dict]) -> list[str]:
    first: dict[int, dict] = {}
    for annotation in sorted(annotations, key=lambda a: a["id"]):
        first.setdefault(annotation["image_id"], annotation)
    images = random.Random(SEED).sample(sorted(first), NUM_CAPTIONS)
    return [" ".join(first[image]["caption"].split()) for image in images]


def _read(archive: Path) -> list[dict]:
    with zipfile.ZipFile(archive) as content, content.open(MEMBER) as file:
        return json.load(file)["annotations"]


def _download(url: str, path: Path) -> None:
    digest = hashlib.sha1(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, path.open("wb") as file:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(desc="COCO captions", total=total, unit="B", unit_scale=True) as progress:
                while block := response.read(2**20):
                    file.write(block)
                    digest.update(block)
                    progress.update(len(block))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise OSError(f"the captions of COCO-2017 can't be downloaded from {url}: {error}") from error
    if digest.hexdigest() != ARCHIVE_SHA1:
        raise ValueError(f"{url} has the SHA-1 {digest.hexdigest()}, not {ARCHIVE_SHA1}: truncated, or another file")
