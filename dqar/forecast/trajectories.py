"""Full denoisings of calibration images: what plans are made from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from dqar.config import check_choice
from dqar.measure.sampling import class_labels, first_latents
from dqar.models.guidance import branch_predictions, guide
from dqar.models.profiles import Profile

PLAN_SEED = 500
"""Of the calibration images: of none that is compared later."""


FINER = 5
"""Steps of the converged run for each one of the planned run."""


RIDGE = 1e-9
"""Of the least squares, relative to normalised columns: outputs of neighbouring steps are nearly parallel."""


Target = Literal["reference", "converged"]


@dataclass(frozen=True)
class Trajectories:
    """Denoisings of some images, at the timesteps of the planned run.

    ``latents`` ``[steps + 1, images, C, H, W]``, and the model's predictions in them, ``[steps, images, C, H, W]``;
    ``uncond`` is ``None`` without guidance.
    """

    latents: torch.Tensor
    cond: torch.Tensor
    uncond: torch.Tensor | None
    labels: torch.Tensor
    target: Target

    @property
    def num_steps(self) -> int:
        """Denoising steps."""
        return len(self.cond)

    def first(self, images: int) -> Trajectories:
        """Those of the first so many images."""
        uncond = None if self.uncond is None else self.uncond[:, :images]
        return Trajectories(self.latents[:, :images], self.cond[:, :images], uncond, self.labels[:images], self.target)


def trajectories(
    pipe: DiffusionPipeline, profile: Profile, target: Target, num_images: int = 120, seed: int = PLAN_SEED
) -> Trajectories:
    """Denoises calibration images of all classes in full compute.

    Args:
        pipe: with a class-conditional transformer, DQAR not applied.
        profile: steps and guidance.
        target: the run itself, or one with ``FINER`` times the steps.

    Raises:
        ValueError: an unknown target, or a scheduler whose finer steps don't include the coarse ones.
    """
    check_choice("target", target, get_args(Target))
    images = torch.arange(num_images)
    labels = class_labels(pipe, images).to(pipe.device)
    scheduler, every = make_run_scheduler(pipe, profile.num_inference_steps), 1
    if target == "converged":
        scheduler, every = _finer(pipe, profile.num_inference_steps)
    latents = first_latents(pipe, scheduler, seed, images).float()  # a half-precision model runs between float32 states
    states, conds, unconds = [], [], []
    for step, t in enumerate(tqdm(scheduler.timesteps, desc=f"{target} trajectories", leave=False)):
        cond, uncond = predict(pipe, profile, scheduler.scale_model_input(latents, t), t, labels)
        if step % every == 0:
            states.append(latents)
            conds.append(cond)
            unconds.append(uncond)
        latents = scheduler.step(guide(cond, uncond, profile.guidance_scale), t, latents).prev_sample
    both = None if unconds[0] is None else torch.stack(unconds)
    return Trajectories(torch.stack([*states, latents]), torch.stack(conds), both, labels, target)


def jumped(known: Trajectories, step: int, start: int) -> torch.Tensor:
    """The error of the latents at ``step`` if nothing is computed after ``start``."""
    uncond = [] if known.uncond is None else [known.uncond[start]]
    columns = torch.stack([x.flatten() for x in (known.latents[start], known.cond[start], *uncond)], 1).double()
    wanted = known.latents[step].flatten().double()
    return (columns @ _least_squares(columns, wanted) - wanted).view_as(known.latents[step]).to(known.latents.dtype)


def _least_squares(columns: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    norms = columns.norm(dim=0).clamp_min(1e-12)
    columns = columns / norms
    system = columns.T @ columns
    system.diagonal().add_(RIDGE)
    return torch.linalg.solve(system, columns.T @ wanted) / norms


def make_run_scheduler(pipe: DiffusionPipeline, num_inference_steps: int) -> Any:
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def _finer(pipe: DiffusionPipeline, num_inference_steps: int) -> tuple[Any, int]:
    """A scheduler with about ``FINER`` times the steps, every ``FINER``-th of which is one of the coarse ones."""
    coarse = make_run_scheduler(pipe, num_inference_steps).timesteps
    for steps in (FINER * num_inference_steps, FINER * (num_inference_steps - 1) + 1):  # without and with both ends
        fine = make_run_scheduler(pipe, steps)
        if torch.equal(fine.timesteps[::FINER], coarse):
            return fine, FINER
    raise ValueError(
        f"{type(pipe.scheduler).__name__} with {FINER} times {num_inference_steps} steps doesn't visit the same "
        "timesteps: use timestep_spacing='trailing', or target='reference'"
    )


@torch.no_grad()
def predict(
    pipe: DiffusionPipeline, profile: Profile, model_input: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if profile.guidance_scale > 1:
        labels = torch.cat([labels, torch.full_like(labels, pipe.transformer.config.num_embeds_ada_norm)])
    cond, uncond = branch_predictions(pipe.transformer, model_input.to(pipe.transformer.dtype), t, labels)
    return cond.float(), None if uncond is None else uncond.float()


def full_step(
    pipe: DiffusionPipeline,
    profile: Profile,
    scheduler: Any,
    t: torch.Tensor,
    latents: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    cond, uncond = predict(pipe, profile, scheduler.scale_model_input(latents, t), t, labels)
    return scheduler.step(guide(cond, uncond, profile.guidance_scale), t, latents).prev_sample


def finished(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """What is compared in the end: a pixel-space model's latents are the picture, which clips them."""
    return latents if hasattr(pipe, "vae") else latents.clamp(-1, 1)
