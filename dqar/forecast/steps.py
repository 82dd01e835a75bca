"""Which steps to compute: errors of all jumps at once, and dynamic programming over them."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from dqar.config import check
from dqar.forecast.trajectories import RIDGE, Trajectories, finished, full_step, jumped, make_run_scheduler
from dqar.models.guidance import guide
from dqar.models.profiles import Profile


class Jumps:
    """How wrong the latents are after a jump from one computed step to a later one: all of them, by least squares."""

    def __init__(self, known: Trajectories):
        self.num_steps = known.num_steps
        parts = [known.latents, known.cond, *([] if known.uncond is None else [known.uncond])]
        vectors = torch.cat([part.flatten(1) for part in parts]).double()
        self.gram, self.size = (vectors @ vectors.T).cpu(), vectors.shape[1]
        offsets = np.cumsum([0, *map(len, parts)])[1:-1]
        self._outputs = [int(offset) for offset in offsets]
        self._known: dict[tuple[int, int | None], np.ndarray] = {}

    def errors(self, step: int, before: int | None) -> np.ndarray:
        """Mean squared error of the latents at steps ``step + 1 ...``, computed last at ``step`` and at ``before``."""
        if (step, before) not in self._known:
            columns = [step, *(offset + step for offset in self._outputs)]
            columns += [] if before is None else [offset + before for offset in self._outputs]
            later = torch.arange(step + 1, self.num_steps + 1)
            norms = self.gram.diagonal()[columns].sqrt().clamp_min(1e-12)
            system = self.gram[columns][:, columns] / norms / norms[:, None]
            wanted = self.gram[columns][:, later] / norms[:, None]
            weights = torch.linalg.solve(system + RIDGE * torch.eye(len(columns), dtype=system.dtype), wanted)
            fitted = 2 * (weights * wanted).sum(0) - (weights * (system @ weights)).sum(0)
            error = (self.gram.diagonal()[later] - fitted).clamp_min(0) / self.size
            self._known[step, before] = error.numpy()
        return self._known[step, before]


def choose_steps(jumps: Jumps, num_computed: int, gains: np.ndarray) -> tuple[tuple[int, ...], float]:
    """The steps to compute, so that the errors of all jumps, each times the gain where it lands, add up to the least.

    Dynamic programming over the last two computed steps.

    Args:
        num_computed: how many; the first step always is.
        gains: ``[steps + 1]``: what a squared error of the latents there is worth in the end.

    Returns:
        The steps, and the predicted mean squared error.
    """
    steps = jumps.num_steps
    check("num_computed", num_computed, 2 <= num_computed <= steps, f"an int from 2 to {steps}")
    longest = math.ceil(3 * steps / num_computed)
    best: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {(0, None): (0.0, (0,))}
    for count in range(1, num_computed):
        longer: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {}
        for (step, before), (cost, path) in best.items():
            errors = jumps.errors(step, before)
            for later in range(step + 1, min(steps - (num_computed - count) + 1, step + 1 + longest)):
                total = cost + gains[later] * errors[later - step - 1]
                if total < longer.get((later, step), (math.inf,))[0]:
                    longer[later, step] = total, (*path, later)
        best = longer
    totals = [(cost + gains[steps] * jumps.errors(*last)[-1], path) for last, (cost, path) in best.items()]
    error, path = min(totals)
    return path, float(error)


def measure_gains(pipe: DiffusionPipeline, profile: Profile, known: Trajectories, points: int = 10) -> np.ndarray:
    """The squared error of the finished image for a squared error of the latents at each step, ``[steps + 1]``.

    At ``points`` steps the latents are displaced by the error of a jump of the usual length, and the run is finished in
    full compute; between the points, interpolated.
    """
    steps, jump = known.num_steps, max(1, known.num_steps // 16)
    where = np.unique(np.linspace(jump, steps - 1, points).round().astype(int))
    scheduler = make_run_scheduler(pipe, steps)
    measured = []
    for step in tqdm(range(steps), desc="gains", leave=False):
        t = scheduler.timesteps[step]
        if step in where:
            displaced = jumped(known, step, max(0, step - jump))
            latents, own = known.latents[step] + displaced, copy.deepcopy(scheduler)
            for later in range(step, steps):
                latents = full_step(pipe, profile, own, own.timesteps[later], latents, known.labels)
            final = finished(pipe, latents) - finished(pipe, known.latents[-1])
            measured.append(float(final.square().mean() / displaced.square().mean()))
        uncond = None if known.uncond is None else known.uncond[step]
        scheduler.step(guide(known.cond[step], uncond, profile.guidance_scale), t, known.latents[step])
    return np.interp(np.arange(steps + 1), where, measured)
