"""Plans for profiles: which calls of its pipeline a profile is calibrated on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dqar.forecast.fit import Calibration, Target
from dqar.forecast.plan import ForecastPlan
from dqar.measure.results import provenance
from dqar.measure.sampling import conditions, noise_generators
from dqar.models.profiles import Profile

PLAN_SEED = 500
"""Of the calibration images: of none that is compared later."""
BATCH = 8
"""Images of one calibration call of a profile."""


def profile_calls(
    pipe: DiffusionPipeline, profile: Profile, num_images: int, seed: int = PLAN_SEED
) -> list[dict[str, Any]]:
    """Calls for calibration images of all classes or captions in turn, with noises that ``sample`` draws them from."""
    return [
        {
            **conditions(pipe, images),
            "guidance_scale": profile.guidance_scale,
            "generator": noise_generators(seed, images),
        }
        for images in torch.arange(num_images).split(BATCH)
    ]


def calibrate_profile(
    pipe: DiffusionPipeline,
    profile: Profile,
    target: Target,
    num_images: int,
    work: Path | None = None,
    history_bits: int = 16,
) -> Calibration:
    """The profile's calibration images, followed in full compute."""
    calls = profile_calls(pipe, profile, num_images)
    return Calibration(pipe, calls, profile.num_inference_steps, target, work=work, history_bits=history_bits)


def with_provenance(plan: ForecastPlan, profile: Profile) -> ForecastPlan:
    """The plan, saying also which profile it was made for."""
    return dataclasses.replace(plan, provenance={**plan.provenance, **provenance(profile, PLAN_SEED)})
