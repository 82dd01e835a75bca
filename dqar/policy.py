"""Slide 7's policy network, which predicts from five features whether a reuse is harmless, and its training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from dqar.checks import check_choice
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

    Features are standardized with the training set's mean and spread, which are saved with the weights. A ladder's rule
    takes other ``inputs``.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, hidden: int = 64, inputs: int = len(FEATURES)):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden),
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


def train_policy(
    features: torch.Tensor,
    labels: torch.Tensor,
    held_out_features: torch.Tensor,
    held_out_labels: torch.Tensor,
    *,
    l2: float = 1e-4,
    omit: str | None = None,
    patience: int | None = 30,
    max_epochs: int = 300,
    seed: int = 0,
) -> tuple[ReusePolicy, list[dict[str, float]]]:
    """Slide 7's training: binary cross-entropy with L2, stopped when the held-out loss no longer falls.

    Args:
        features, held_out_features: ``[B, 5]`` in slide 7's order, or ``[B, F]`` of a ladder's rule; the held-out ones
            of other images.
        labels, held_out_labels: ``[B]``, 1 for a harmless reuse, else 0.
        l2: weight of the squared weights in the loss.
        omit: a feature to replace by its mean, for ablations.
        patience: stops after so many epochs without a better held-out loss; ``None`` trains for ``max_epochs`` and
            returns the last network instead of the best.

    Returns:
        The policy, and one row an epoch: ``epoch``, ``train`` and ``held_out`` loss.

    Raises:
        ValueError: an unknown feature, or labels that are all equal.
    """
    check_choice("omit", omit, (None, *FEATURES))
    if len(labels.unique()) < 2:
        raise ValueError(f"the {len(labels)} labels are all of one kind: needs harmless and harmful reuses")
    torch.manual_seed(seed)
    policy = ReusePolicy(inputs=features.shape[1])
    policy.mean.copy_(features.mean(0))
    policy.std.copy_(features.std(0).clamp_min(1e-6))
    hidden = torch.zeros(features.shape[1])
    if omit is not None:
        hidden[FEATURES.index(omit)] = 1
        features, held_out_features = (torch.lerp(x, policy.mean, hidden) for x in (features, held_out_features))
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, weight_decay=2 * l2)  # gradient of l2 · ‖w‖²
    history, best, best_state = [], math.inf, {}
    for epoch in range(max_epochs):
        for rows in torch.randperm(len(features)).split(256):
            loss = F.binary_cross_entropy(policy(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            train = F.binary_cross_entropy(policy(features), labels).item()
            held_out = F.binary_cross_entropy(policy(held_out_features), held_out_labels).item()
        history.append({"epoch": epoch, "train": train, "held_out": held_out})
        if held_out < best:
            best, best_state = held_out, {name: x.clone() for name, x in policy.state_dict().items()}
            best_epoch = epoch
        if patience is not None and epoch - best_epoch >= patience:
            break
    if patience is not None:
        policy.load_state_dict(best_state)
    return policy.eval(), history
