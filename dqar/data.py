"""The data of the embedded models."""

from __future__ import annotations

from typing import Literal

import torch


def load_digits_split(split: Literal["train", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
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
