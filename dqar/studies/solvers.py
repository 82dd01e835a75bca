"""Notebook 11's learned solvers: made from pairs of noise and image of the profile's own model, once and for all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from dqar.files import atomic_path
from dqar.forecast.fit import Target
from dqar.measure.results import provenance
from dqar.measure.sampling import class_labels, first_latents
from dqar.models.frozen_dit import FrozenDiT
from dqar.models.guidance import guide
from dqar.models.pipelines import make_scheduler
from dqar.models.profiles import Profile
from dqar.peers.bespoke import BespokeSolver, LearnedSolver, Prediction, best_start, learn
from dqar.peers.learned_timesteps import TimestepsSolver
from dqar.studies.compare import FULL
from dqar.studies.pareto import converged, solver_path, solver_steps
from dqar.studies.recording import Recording

SOLVER_SEED = 900
"""Of the pairs: of none that is compared."""
BATCH = 16
"""Pairs that are drawn at once."""
SOLVERS: dict[str, Callable[..., LearnedSolver]] = {"bespoke": BespokeSolver, "timesteps": TimestepsSolver}
SPACED = ("dpm-solver++", "dpm-solver++-lu", "dpm-solver++-karras")
STARTS = {"bespoke": (*SPACED, "unipc2-exponential", "unipc3-exponential"), "timesteps": SPACED}
"""Where each kind may begin: the one that is best on the pairs."""
SHARES = {"bespoke": 1.0, "timesteps": 0.5}
"""Of the iterations that each kind takes: timesteps alone are a tenth as many numbers."""


@dataclass(frozen=True)
class Pairs:
    """What solvers are learned from.

    Attributes:
        predict: the model's guided noise; image i has the label that ``sample`` gives it.
        noise, target: ``[N, C, H, W]`` float32: x_T, and the latents that it should become.
    """

    predict: Prediction
    noise: torch.Tensor
    target: torch.Tensor


def record_solvers(recording: Recording) -> None:
    """The learned solvers of all kinds, targets and numbers of steps, one by one; those that are there are kept.

    Only of embedded models: gradients through all calls of a large one would take a day of a GPU and much memory.
    """
    profile, sizes = recording.profile, recording.sizes
    if not profile.embedded:
        return
    for target in get_args(Target):
        missing = {
            solver_path(recording.folder, kind, target, number): (kind, number)
            for number in solver_steps(profile)
            for kind in SOLVERS
            if not solver_path(recording.folder, kind, target, number).exists()
        }
        if missing:
            pairs = make_pairs(profile, target, sizes.solver_pairs)
            for path, (kind, number) in missing.items():
                save_solver(profile, pairs, kind, number, math.ceil(SHARES[kind] * sizes.solver_iterations), path)


def make_pairs(profile: Profile, target: Target, number: int) -> Pairs:
    """The first ``number`` pairs: what the profile's own sampler draws, or the converged solution."""
    full = converged(profile) if target == "converged" else FULL
    pipe, steps = full.pipeline(profile), full.num_inference_steps or profile.num_inference_steps
    predict = guided(pipe, profile.guidance_scale)
    images = torch.arange(number)
    noise = first_latents(pipe, pipe.scheduler, SOLVER_SEED, images).float()
    drawn = [_drawn(predict, pipe.scheduler, steps, noise[part], part) for part in images.split(BATCH)]
    return Pairs(predict, noise, torch.cat(drawn))


def guided(pipe: DiffusionPipeline, guidance_scale: float) -> Prediction:
    """The noise that the pipeline's DiT predicts, guided, with gradients to latents and timestep."""
    model, null = FrozenDiT(pipe.transformer), pipe.transformer.config.num_embeds_ada_norm

    def predict(latents: torch.Tensor, timestep: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        labels = class_labels(pipe, images).to(latents.device)
        if guidance_scale <= 1:
            return model(latents, timestep, labels)
        both = torch.cat([labels, torch.full_like(labels, null)])
        cond, uncond = model(torch.cat([latents, latents]), timestep, both).chunk(2)
        return guide(cond, uncond, guidance_scale)

    return predict


@torch.no_grad()
def _drawn(
    predict: Prediction, scheduler: SchedulerMixin, steps: int, latents: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        latents = scheduler.step(predict(latents, t, images), t, latents).prev_sample
    return latents


def save_solver(profile: Profile, pairs: Pairs, kind: str, number: int, iterations: int, path: Path) -> None:
    """Learns one solver of ``number`` steps; ``provenance.json`` is written beside it."""
    like, started = FULL.pipeline(profile).scheduler, time.monotonic()
    starts = {name: make_scheduler(name, like) for name in STARTS[kind]}
    start = best_start(pairs.predict, list(starts.values()), number, pairs.noise, pairs.target)
    scheduler = learn(SOLVERS[kind](start, number), pairs.predict, pairs.noise, pairs.target, iterations=iterations)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        **provenance(profile, SOLVER_SEED),
        "start": next(name for name, scheduler in starts.items() if scheduler is start),
        "pairs": len(pairs.noise),
        "iterations": iterations,
        "seconds": time.monotonic() - started,
    }
    (path.parent / "provenance.json").write_text(json.dumps(facts, indent=1, default=str))
    with atomic_path(path) as temporary:  # the last: what is there is finished
        scheduler.to_json_file(temporary)
