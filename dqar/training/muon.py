"""Muon on stacks of matrices; ``torch.optim.Muon`` takes single ones only, and 28 small ones in turn are slow."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""


class StackedMuon(torch.optim.Optimizer):
    """Nesterov momentum, each matrix of it replaced by the nearest orthogonal one (Jordan et al. 2024).

    The same update as ``torch.optim.Muon`` without weight decay, on many matrices at once.

    Args:
        parameters: matrices along the last two dimensions ``[..., out, in]``; convolutions ``[out, in, height, width]``
            are one matrix each, ``out`` high.
        lr: of matrices that are wider than high; of others by √(height / width) more.
        momentum: of the gradients' running mean.
        parts: how many matrices lie on top of one another in each, as query, key and value do.
    """

    def __init__(self, parameters: Iterable, lr: float, momentum: float = 0.95, parts: int = 1):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "parts": parts})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter by its gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(mean, group["momentum"])
                matrices = update.flatten(1) if update.ndim == 4 else update
                for part in matrices.chunk(group["parts"], -2):
                    part.copy_(orthogonalized(part))
                height, width = matrices.shape[-2] // group["parts"], matrices.shape[-1]
                parameter.add_(matrices.view_as(parameter), alpha=-group["lr"] * max(1, height / width) ** 0.5)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Each of ``[..., out, in]`` with its singular values brought to between about 0.7 and 1.2, computed in BF16."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
