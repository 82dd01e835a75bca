"""The training of slide 7's policy network."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from dqar.checks import check_choice
from dqar.policy import FEATURES, ReusePolicy


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
        features, held_out_features: ``[B, 5]`` in slide 7's order; the held-out ones of other seeds and classes.
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
    policy = ReusePolicy()
    policy.mean.copy_(features.mean(0))
    policy.std.copy_(features.std(0).clamp_min(1e-6))
    hidden = torch.zeros(len(FEATURES))
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
