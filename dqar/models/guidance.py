"""Classifier-free guidance: the two predictions of a class-conditional model, and one of both."""

from __future__ import annotations

import torch
from diffusers import (
    DiTTransformer2DModel,
    SchedulerMixin,
)


def guided_prediction(
    transformer: DiTTransformer2DModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    guidance_scale: float,
) -> torch.Tensor:
    """The noise ``[B, C, H, W]`` predicted in ``latents``, guided if there are twice as many ``labels``."""
    model_input = scheduler.scale_model_input(latents, t)
    return guide(*branch_predictions(transformer, model_input, t, labels), guidance_scale)


def guide(cond: torch.Tensor, uncond: torch.Tensor | None, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: both branches' predictions as one; without a second one, the first."""
    return cond if uncond is None else uncond + guidance_scale * (cond - uncond)


def branch_predictions(
    transformer: DiTTransformer2DModel, model_input: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The noise ``[B, C, H, W]`` predicted in each branch; without guidance, ``None`` for the second.

    Guidance computes both branches in one batch: the first half of ``labels`` conditional, the second the null class.
    """
    guided = len(labels) == 2 * len(model_input)
    batch = torch.cat([model_input, model_input]) if guided else model_input
    noise = transformer(batch, timestep=t.to(batch.device).expand(len(batch)), class_labels=labels).sample
    noise = noise[:, : batch.shape[1]]  # DiT-XL/2 predicts variances too
    return noise.chunk(2) if guided else (noise, None)
