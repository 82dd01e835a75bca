"""LeMiCa: which steps to compute, by the path through measured errors whose worst one is least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from dqar.peers.linear import number_computed
from dqar.peers.rival import Rival
from dqar.peers.shared import calibrate, check_range
from dqar.peers.trials import SWEEP, Trials, residual_reuse

Errors = Mapping[tuple[int, int], float]
"""Of ``(i, j)``: what the steps between ``i`` and ``j`` do to the image when they reuse step ``i``."""


@contextmanager
def lemica(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    speedup: float = 3.0,
    longest: int = 8,
    calibration_images: int = 2,
    guidance_scale: float = 4.0,
) -> Iterator[None]:
    """LeMiCa (Gao et al., NeurIPS 2025, arXiv 2511.00090): steps chosen for the worst error, not by a threshold.

    Written from its project page; its repository has other models' schedules, and no code that makes them. An edge from
    computed step ``i`` to the next one ``j`` weighs as much as the image changes (mean absolute difference) when
    nothing but the steps between them reuse what all blocks added at ``i``. Of all paths with the given number of
    computed steps, the one is taken whose largest weight is least, then its second largest, and so on. They report 2.9
    times less time on Latte.

    Args:
        speedup: the number of steps over that of computed steps, at least.
        longest: way from one computed step to the next; all those up to it are measured, a run each.
        calibration_images, guidance_scale: of these runs; once per model and sampler.

    Raises:
        ValueError: a setting out of range; more steps to skip than ``longest`` allows.
    """
    check_range(
        speedup=(speedup, 1, num_inference_steps),
        longest=(longest, 1, math.inf),
        calibration_images=(calibration_images, 1, 10_000),
    )
    number = number_computed(num_inference_steps, speedup)
    if number * longest < num_inference_steps:
        raise ValueError(f"longest={longest} is out of range: {number} computed steps reach {number * longest} steps")

    def measure(draw: Callable[[], torch.Tensor]) -> Errors:
        return caching_errors(Trials(pipe, num_inference_steps, draw), num_inference_steps, longest)

    what = f"LeMiCa {longest}"
    errors = calibrate(pipe, num_inference_steps, guidance_scale, calibration_images, what, measure)
    with residual_reuse(pipe, num_inference_steps, minimax_path(errors, num_inference_steps, number)):
        yield


def caching_errors(trials: Trials, num_inference_steps: int, longest: int) -> Errors:
    """The weight of every edge up to ``longest``; past the last step there is one more node."""
    errors = {(i, i + 1): 0.0 for i in range(num_inference_steps)}
    for i in range(num_inference_steps):
        for j in range(i + 2, min(i + longest, num_inference_steps) + 1):
            images = trials.images({*range(i + 1), *range(j, num_inference_steps)})
            errors[i, j] = (images - trials.full).abs().mean().item()
    return errors


def minimax_path(errors: Errors, num_inference_steps: int, computed: int) -> tuple[int, ...]:
    """The ``computed`` steps, step 0 among them, whose errors in descending order come first in the dictionary.

    A path's best beginning doesn't depend on its end, since one more error on both sides leaves the order of two lists
    of errors as it is.
    """
    best: dict[int, tuple[list[float], tuple[int, ...]]] = {0: ([], (0,))}
    for _ in range(computed):
        reached: dict[int, tuple[list[float], tuple[int, ...]]] = {}
        for (i, j), error in errors.items():
            if i in best:
                weights, path = best[i]
                candidate = (sorted([*weights, error], reverse=True), (*path, j))
                reached[j] = min(candidate, reached.get(j, candidate))
        best = reached
    return best[num_inference_steps][1][:-1]


RIVALS = (
    Rival(
        "LeMiCa",
        keeps="what all blocks add, at steps chosen on calibration runs",
        source="Gao et al., NeurIPS 2025, arXiv 2511.00090",
        adapter=lemica,
        sweep=SWEEP,
        calibration_images=50 * 7 * 2,
    ),
)
