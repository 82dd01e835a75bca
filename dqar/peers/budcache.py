"""BudCache: which steps to compute under a budget, by simulated annealing and hill climbing on whole runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from dqar.peers.linear import number_computed, spread_steps
from dqar.peers.rival import Rival
from dqar.peers.shared import calibrate, check_range
from dqar.peers.trials import SWEEP, Trials, residual_reuse

Steps = tuple[int, ...]
NEAR = 3
"""Steps that a computed one moves by at most in a small move."""
JUMPS = 2
"""Moves of each computed step to anywhere that hill climbing tries beside the small ones."""


@contextmanager
def budcache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    speedup: float = 3.0,
    annealing: int = 200,
    climbing: int = 100,
    calibration_images: int = 4,
    guidance_scale: float = 4.0,
) -> Iterator[None]:
    """BudCache (Lei et al., ICML 2026, arXiv 2606.13496): the computed steps themselves are searched for.

    Own code after the first stage of the repository Westlake-AGI-Lab/BudCache, which searches on FLUX, Wan and Z-Image:
    the same reuse (what all blocks added at the last computed step), first quarter of the computed steps at the start,
    moves and schedule of temperatures. Three things differ: temperatures are relative to the first error, as the same
    numbers would make a walk at random of this model's small errors; the search begins with evenly spread steps instead
    of random ones; and hill climbing ends after so many runs, not after 20 rounds, which would be thousands of them.
    The error is the mean squared one of the images, theirs of the latents. The second stage, which learns timesteps, is
    optional there and left out. They report up to 3.73 times less time on FLUX.1-dev, at 6 model calls.

    Args:
        speedup: the number of steps over that of computed steps, at least.
        annealing, climbing: trial runs of each; that are made once per model, sampler and speedup.
        calibration_images, guidance_scale: of these runs. With one image, in a trial of 25 steps on the digits model,
            the chosen steps were worse for other images than evenly spread ones.

    Raises:
        ValueError: a setting out of range.
    """
    check_range(
        speedup=(speedup, 1, num_inference_steps),
        annealing=(annealing, 1, 1_000_000),
        climbing=(climbing, 0, 1_000_000),
        calibration_images=(calibration_images, 1, 10_000),
    )
    number = number_computed(num_inference_steps, speedup)

    def measure(draw: Callable[[], torch.Tensor]) -> Steps:
        trials = Trials(pipe, num_inference_steps, draw)

        def error(computed: Steps) -> float:
            return (trials.images(computed) - trials.full).square().mean().item()

        return search(error, num_inference_steps, number, annealing, climbing)

    what = f"BudCache {number} {annealing} {climbing}"
    computed = calibrate(pipe, num_inference_steps, guidance_scale, calibration_images, what, measure)
    with residual_reuse(pipe, num_inference_steps, computed):
        yield


def search(
    error: Callable[[Steps], float], num_inference_steps: int, number: int, annealing: int, climbing: int
) -> Steps:
    """The ``number`` steps of least error found; the first quarter of them, and step 0, stay where they are.

    Args:
        error: of a choice of steps, ascending; asked once for each choice.
        num_inference_steps: to choose from.
        number: of computed steps.
        annealing: moves that are tried in turn.
        climbing: errors that may be asked for afterwards, of moves from the best choice.
    """
    known = dict[Steps, float]()

    def error_of(steps: Steps) -> float:
        if steps not in known:
            known[steps] = error(steps)
        return known[steps]

    rng, fixed = random.Random(0), max(1, number // 4)
    current = spread_steps(num_inference_steps, number, first=fixed, last=0)
    if number in (num_inference_steps, fixed):
        return current
    hottest = error_of(current)
    for i in range(annealing):
        temperature = hottest * 0.05 * (1e-5 / 0.05) ** (i / annealing)
        candidate = _random_move(rng, current, num_inference_steps, fixed)
        worse = error_of(candidate) - error_of(current)
        if worse < 0 or rng.random() < math.exp(-worse / max(temperature, 1e-300)):
            current = candidate
    return _climb(rng, known, error_of, num_inference_steps, fixed, climbing)


def _climb(
    rng: random.Random,
    known: dict[Steps, float],
    error_of: Callable[[Steps], float],
    num_inference_steps: int,
    fixed: int,
    climbing: int,
) -> Steps:
    """From the best choice known to the best of its neighbours, until none is better or too many were asked for."""
    asked = len(known) + climbing
    best = min(known, key=error_of)
    while True:
        for neighbour in _neighbours(rng, best, num_inference_steps, fixed):
            if len(known) < asked:
                error_of(neighbour)
        if (better := min(known, key=error_of)) == best:
            return best
        best = better


def _moved(steps: Steps, sources: list[int], targets: list[int]) -> Steps:
    return tuple(sorted({*steps} - {*sources} | {*targets}))


def _random_move(rng: random.Random, steps: Steps, num_inference_steps: int, fixed: int) -> Steps:
    """One computed step moves, mostly by a little; every tenth time two of them move anywhere."""
    movable = list(steps[fixed:])
    free = [step for step in range(fixed, num_inference_steps) if step not in steps]
    if rng.random() >= 0.9 and min(len(movable), len(free)) > 1:
        return _moved(steps, rng.sample(movable, 2), rng.sample(free, 2))
    source = rng.choice(movable)
    near = [step for step in free if abs(step - source) <= NEAR]
    return _moved(steps, [source], [rng.choice(near if near and rng.random() < 0.7 else free)])


def _neighbours(rng: random.Random, steps: Steps, num_inference_steps: int, fixed: int) -> list[Steps]:
    """Every small move of one computed step, and a few of each to anywhere, in random order."""
    free = [step for step in range(fixed, num_inference_steps) if step not in steps]
    moves = set[Steps]()
    for source in steps[fixed:]:
        targets = [step for step in free if abs(step - source) <= NEAR] + rng.choices(free, k=JUMPS)
        moves |= {_moved(steps, [source], [target]) for target in targets}
    return rng.sample(sorted(moves), len(moves))


RIVALS = (
    Rival(
        "BudCache",
        keeps="what all blocks add, at steps searched for on calibration runs",
        source="Lei et al., ICML 2026, arXiv 2606.13496",
        adapter=budcache,
        sweep=SWEEP,
        calibration_images=len(SWEEP) * (1 + 200 + 100) * 4,
    ),
)
