"""Which steps to compute: errors of all jumps at once, and dynamic programming over them."""

from __future__ import annotations

import math

import numpy as np
import torch

from dqar.checks import check

RIDGE = 1e-9
"""Of the least squares, relative to normalised columns: outputs of neighbouring steps are nearly parallel."""


class Jumps:
    """How wrong the latents are after a jump from one computed step to a later one: all of them, by least squares.

    Args:
        gram: inner products, summed over all images, of the latents at each step and at the end, then of each branch's
            outputs at each step; ``[n, n]`` float64.
        size: numbers in all images' latents.
        num_steps: of the run.
    """

    def __init__(self, gram: torch.Tensor, size: int, num_steps: int):
        self.gram, self.size, self.num_steps = gram, size, num_steps
        self._outputs = list(range(num_steps + 1, len(gram), num_steps))
        self._errors: dict[tuple[int, int | None], np.ndarray] = {}

    def errors(self, step: int, before: int | None) -> np.ndarray:
        """Mean squared error of the latents at steps ``step + 1 ...``, computed last at ``step`` and at ``before``."""
        if (step, before) not in self._errors:
            columns = [step, *(offset + step for offset in self._outputs)]
            columns += [] if before is None else [offset + before for offset in self._outputs]
            later = torch.arange(step + 1, self.num_steps + 1)
            norms = self.gram.diagonal()[columns].sqrt().clamp_min(1e-12)
            system = self.gram[columns][:, columns] / norms / norms[:, None]
            target = self.gram[columns][:, later] / norms[:, None]
            weights = torch.linalg.solve(system + RIDGE * torch.eye(len(columns), dtype=system.dtype), target)
            fitted = 2 * (weights * target).sum(0) - (weights * (system @ weights)).sum(0)
            error = (self.gram.diagonal()[later] - fitted).clamp_min(0) / self.size
            self._errors[step, before] = error.numpy()
        return self._errors[step, before]


def choose_steps(
    jumps: Jumps, num_computed: int, gains: np.ndarray, length_power: float = 0
) -> tuple[tuple[int, ...], float]:
    """The steps to compute, so that the errors of all jumps, each times the gain where it lands, add up to the least.

    Dynamic programming over the last two computed steps.

    Args:
        num_computed: how many; the first step always is.
        gains: ``[steps + 1]``: what a squared error of the latents there is worth in the end.
        length_power: each jump's error counts times its length to this power. A jump is fitted by the last two outputs;
            a forecast that draws on more, and on neighbours, is of higher order: wrong by less in a short jump, and
            hardly in a long one.

    Returns:
        The steps, and what their errors add up to: without ``length_power``, the predicted mean squared error.

    Raises:
        ValueError: fewer than 2 steps, or more than there are.
    """
    steps = jumps.num_steps
    check("num_computed", num_computed, 2 <= num_computed <= steps, f"an int from 2 to {steps}")
    longest = math.ceil(3 * steps / num_computed)
    worth = np.arange(1, steps + 1) ** float(length_power)  # by length
    best: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {(0, None): (0.0, (0,))}
    for count in range(1, num_computed):
        longer: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {}
        for (step, before), (cost, path) in best.items():
            errors = jumps.errors(step, before)
            for later in range(step + 1, min(steps - (num_computed - count) + 1, step + 1 + longest)):
                total = cost + gains[later] * worth[later - step - 1] * errors[later - step - 1]
                if total < longer.get((later, step), (math.inf,))[0]:
                    longer[later, step] = total, (*path, later)
        best = longer
    totals = [
        (cost + gains[steps] * worth[steps - last[0] - 1] * jumps.errors(*last)[-1], path)
        for last, (cost, path) in best.items()
    ]
    error, path = min(totals)
    return path, float(error)


def gram(latents: torch.Tensor, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What ``Jumps`` needs of one call: latents ``[steps + 1, ...]``, each branch's outputs ``[steps, ...]``."""
    vectors = torch.cat([part.flatten(1) for part in (latents, *outputs.values())]).double()
    return vectors @ vectors.T


def least_squares(columns: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The weights of columns ``[n, k]`` that come closest to the target ``[n]``, with ``RIDGE``."""
    norms = columns.norm(dim=0).clamp_min(1e-12)
    columns = columns / norms
    system = columns.T @ columns
    system.diagonal().add_(RIDGE)
    return torch.linalg.solve(system, columns.T @ target) / norms
