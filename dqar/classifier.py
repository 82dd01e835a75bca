"""A small digit classifier: its features measure the Fréchet distance ``FD-digits``, its logits class accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FEATURES = 64


class DigitClassifier(nn.Module):
    """Three convolutions and a linear layer for ``[B, 1, 8, 8]`` images in [-1, 1]; 10 classes."""

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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, 10]``."""
        return self.head(self.features(images))

    def save_pretrained(self, folder: Path, accuracy: float) -> None:
        """Writes ``model.safetensors`` and ``card.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        card = {"held_out_accuracy": accuracy, "data": "scikit-learn digits, fixed 80/20 split"}
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> DigitClassifier:
        """Reads what ``save_pretrained`` wrote, in eval mode."""
        model = cls()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
