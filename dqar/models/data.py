"""The data of the embedded models."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Literal

import torch

Dataset = Literal["digits", "cifar10"]
Split = Literal["train", "test"]
CIFAR10_FOLDERS = ("../shared/data", "shared/data")


def load_split(dataset: Dataset, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[N, C, H, W]`` float32 in [-1, 1] and labels ``[N]`` int64 of an embedded model's data."""
    return {"digits": load_digits_split, "cifar10": load_cifar10_split}[dataset](split)


def load_digits_split(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 handwritten digits: images ``[N, 1, 8, 8]`` float32 in [-1, 1] and labels ``[N]`` int64.

    A fixed stratified split: 80 % train both the DiT and the classifier, 20 % are seen by neither.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    chosen = {"train": train, "test": test}[split]
    images = torch.tensor(digits.images[chosen], dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(digits.target[chosen], dtype=torch.int64)


def moving_digits(images: torch.Tensor, frames: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Each digit bouncing in a square frame: videos ``[N, C, frames, size, size]`` in [-1, 1] on its background of -1.

    It starts anywhere, moves one pixel a frame along one axis or both, and turns round at the edges.

    Args:
        images: digits ``[N, C, S, S]`` in [-1, 1], smaller than the frame.
        frames, size: of the videos.
        generator: of start and direction.
    """
    number, channels, side, _ = images.shape
    room = size - side
    start = torch.randint(2 * room, (number, 2), generator=generator)  # a place on the way there and back
    directions = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])
    direction = directions[torch.randint(len(directions), (number,), generator=generator)]
    way = (start[:, None] + direction[:, None] * torch.arange(frames)[:, None]) % (2 * room)
    corner = torch.minimum(way, 2 * room - way)
    videos = images.new_full((number, channels, frames, size, size), -1.0)
    for i, corners in enumerate(corner.tolist()):
        for frame, (top, left) in enumerate(corners):
            videos[i, :, frame, top : top + side, left : left + side] = images[i]
    return videos


def load_cifar10_split(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """CIFAR-10's 50,000 training or 10,000 test images ``[N, 3, 32, 32]`` and labels, from parquet of JPEG bytes.

    Looked for as ``cifar10-jpeg-<split>.parquet`` in ``$DQAR_DATA``, ``../shared/data`` and ``shared/data``.

    Raises:
        OSError: it is in none of them, or can't be read.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folders = [Path(folder) for folder in (os.environ.get("DQAR_DATA"), *CIFAR10_FOLDERS) if folder]
    path = next((folder / f"cifar10-jpeg-{split}.parquet" for folder in folders if folder.is_dir()), None)
    if path is None or not path.exists():
        raise OSError(f"cifar10-jpeg-{split}.parquet is in none of {', '.join(map(str, folders))}: set DQAR_DATA")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise OSError(f"{path} can't be read: {error}") from error
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in table["image"].to_pylist()])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
