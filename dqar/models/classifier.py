"""Small classifiers: features for Fréchet distances (``FD-digits``, ``FD-cifar10``), logits for class accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dqar.models.profiles import WEIGHTS


def load_classifier(name: str = "digits", folder: Path | None = None) -> Classifier:
    """The classifier behind ``FD-digits`` or ``FD-cifar10`` and class accuracy; ``folder`` as for ``load_embedded``.

    Raises:
        OSError: missing or truncated weights, naming the folder.
    """
    path = (folder or WEIGHTS) / f"{name}-classifier"
    if not path.exists():
        command = f"dqar train {path.name} --out {path.parent}"
        raise OSError(f"the weights in {path} are missing: `{command}` makes them")
    try:
        return CLASSIFIERS[name].from_pretrained(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise OSError(f"the weights in {path} can't be read: {error}") from error


FEATURES = 64


class Classifier(nn.Module):
    """``features`` ``[B, FEATURES]`` of images in [-1, 1], and a linear ``head`` on them for 10 classes."""

    features: nn.Sequential
    head: nn.Linear

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, 10]``."""
        return self.head(self.features(images))

    def save_pretrained(self, folder: Path, **card: object) -> None:
        """Writes ``model.safetensors``, in FP16, and ``card.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: x.half() if x.is_floating_point() else x for name, x in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Classifier:
        """Reads what ``save_pretrained`` wrote, in eval mode and float32."""
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
    """A residual net of a million parameters for ``[B, 3, 32, 32]`` images; most of it works on 8×8 and 4×4 pixels."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 32),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 128, stride=2),
            Residual(128),
            *_convolution(128, 192, stride=2),
            Residual(192),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(192, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, 10)


class Residual(nn.Module):
    """Adds what two convolutions make of ``[B, width, H, W]``."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(*_convolution(width, width), *_convolution(width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, width, H, W]``, as ``hidden``."""
        return hidden + self.branch(hidden)


def _convolution(channels: int, width: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()


CLASSIFIERS = {"digits": DigitClassifier, "cifar10": CifarClassifier}
