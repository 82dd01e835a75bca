"""Small classifiers: features for Fréchet distances (``FD-digits``, ``FD-cifar10``), logits for class accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FEATURES = 64


class Classifier(nn.Module):
    """``features`` ``[B, FEATURES]`` of images in [-1, 1], and a linear ``head`` on them for 10 classes."""

    features: nn.Sequential
    head: nn.Linear

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, 10]``."""
        return self.head(self.features(images))

    def save_pretrained(self, folder: Path, **card: object) -> None:
        """Writes ``model.safetensors`` and ``card.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Classifier:
        """Reads what ``save_pretrained`` wrote, in eval mode."""
        model = cls()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


class DigitClassifier(Classifier):
    """Three convolutions and a linear layer for ``[B, 1, 8, 8]`` images."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, FEATURES, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(FEATURES, FEATURES, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * FEATURES, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, 10)


class CifarClassifier(Classifier):
    """Six convolutions with batch norm for ``[B, 3, 32, 32]`` images."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for channels, width, stride in ((3, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
        layers += [nn.Conv2d(256, FEATURES, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, 10)


CLASSIFIERS = {"digits": DigitClassifier, "cifar10": CifarClassifier}
