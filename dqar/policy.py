"""Slide 7's policy network, which predicts from five features whether a reuse is harmless."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dqar.files import atomic_path

FEATURES = ("entropy", "log_snr", "log_norm", "step_progress", "prompt_length")


def policy_features(
    entropy: float, snr: float, norm: float, step: int, total_steps: int, prompt_length: float
) -> list[float]:
    """Slide 7's features, in its order: ``H, log(SNR + 1e-8), log(‖x_t‖ + 1e-8), t / (T − 1), min(p, 128) / 128``."""
    logs = torch.tensor([snr, norm], dtype=torch.float64).add(1e-8).log().tolist()
    return [entropy, *logs, step / max(total_steps - 1, 1), min(prompt_length, 128) / 128]


class ReusePolicy(nn.Module):
    """5 → 64 → 64 → 1 with tanh and a sigmoid: 4,480 weights (the slide's count) and 129 biases, 4,609 in all.

    Features are standardized with the training set's mean and spread, which are saved with the weights.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(FEATURES)))
        self.register_buffer("std", torch.ones(len(FEATURES)))
        self.layers = nn.Sequential(
            nn.Linear(len(FEATURES), hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``p_reuse`` in [0, 1], ``[B]``, for features ``[B, 5]`` in slide 7's order."""
        return self.layers((features - self.mean) / self.std).squeeze(-1).sigmoid()

    def save(self, path: str | Path, card: dict | None = None) -> None:
        """Writes weights, feature names and ``card`` (what it was trained on) as one safetensors file."""
        metadata = {"features": ",".join(FEATURES), "card": json.dumps(card or {})}
        with atomic_path(Path(path)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ReusePolicy:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file is cut off, is no policy, or was made for other features.
        """
        try:
            with safe_open(path, framework="pt") as file:
                features = (file.metadata() or {}).get("features", "none")
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable policy file: {error}") from error
        if features != ",".join(FEATURES):
            raise ValueError(f"{path} was made for features {features}, this version uses {','.join(FEATURES)}")
        policy = cls(hidden=len(state["layers.0.bias"]))
        policy.load_state_dict(state)
        return policy.eval()
