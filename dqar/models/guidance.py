"""Classifier-free guidance: the two predictions of a conditional model, and one of both."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin


def guided_prediction(
    transformer: ModelMixin,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    t: torch.Tensor,
    guidance_scale: float,
    **asked: Any,
) -> torch.Tensor:
    """The noise ``[B, C, H, W]`` predicted in ``latents``; guided if what is ``asked`` for has twice as many rows.

    Guidance computes both branches in one batch, the conditional one first.

    Args:
        transformer, scheduler: of a pipeline.
        latents: ``[B, C, H, W]``.
        t: the timestep ``[]``.
        guidance_scale: of guidance.
        asked: the transformer's other arguments, such as ``class_labels`` ``[B]`` or ``[2B]``.
    """
    latents = scheduler.scale_model_input(latents, t)
    rows = next(len(x) for x in asked.values() if isinstance(x, torch.Tensor))
    batch = latents.repeat(rows // len(latents), 1, 1, 1)
    noise = transformer(batch, timestep=t.to(batch.device).expand(rows), **asked).sample
    noise = noise[:, : batch.shape[1]]  # DiT-XL/2 predicts variances too
    if rows == len(latents):
        return noise
    cond, uncond = noise.chunk(2)
    return guide(cond, uncond, guidance_scale)


def guide(cond: torch.Tensor, uncond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): both branches' predictions ``[b, ...]`` as one."""
    return uncond + guidance_scale * (cond - uncond)
