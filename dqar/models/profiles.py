"""Profiles: a model, its sampler and its guidance under one name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

WEIGHTS = Path(__file__).parent.parent / "weights"
DPM_SOLVER = {"algorithm_type": "dpmsolver++", "solver_order": 2}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpm-solver++": (DPMSolverMultistepScheduler, DPM_SOLVER),
    # Other spacings of the same steps: even in log-SNR (Lu et al. 2022), or Karras et al.'s (2022).
    "dpm-solver++-lu": (DPMSolverMultistepScheduler, {**DPM_SOLVER, "use_lu_lambdas": True}),
    "dpm-solver++3-lu": (DPMSolverMultistepScheduler, {**DPM_SOLVER, "use_lu_lambdas": True, "solver_order": 3}),
    "dpm-solver++-karras": (DPMSolverMultistepScheduler, {**DPM_SOLVER, "use_karras_sigmas": True}),
    "ddim-leading": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "leading", "steps_offset": 1}),
    "euler": (EulerDiscreteScheduler, {}),
}
CLASS_NAMES = {
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
SD_VAE_CONFIG = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Weights:
    """Where weights come from: a repository of the Hugging Face hub, pinned to a commit, or a local folder."""

    source: str
    revision: str | None = None


@dataclass(frozen=True)
class Profile:
    """One way to run the notebooks: a model, how it is sampled, and how much of it."""

    name: str
    model: Literal["digits", "cifar10", "dit-xl-2", "dit-xl-2-random", "pixart"]
    scheduler: str = "dpm-solver++"
    """A key of ``SCHEDULERS``."""
    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    num_samples: int = 12
    """Images of each configuration that a notebook compares."""
    batch_size: int = 12
    repeats: int = 5
    """Interleaved timing repeats."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    weights: Weights | None = None
    """Of the whole pipeline; the embedded and the random model have their own."""
    transformer: Weights | None = None
    """Of another transformer to put into the pipeline."""
    offload: bool = False
    """Keeps only the part of the pipeline that is at work on the GPU: slower, in less of its memory."""

    @property
    def trained(self) -> bool:
        """Whether the model draws anything: a random one is timed, never scored."""
        return self.model != "dit-xl-2-random"


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", "digits", num_inference_steps=8, num_samples=4, batch_size=4, repeats=2),
        Profile("digits", "digits"),
        Profile("cifar10", "cifar10", device="cuda" if HAS_GPU else "cpu"),
        # Slide 11: 50 steps of DPM-Solver++ at guidance 7.5, batch 1; the pipeline's own guidance would be 4.0.
        Profile(
            "dit-xl-2",
            "dit-xl-2",
            guidance_scale=7.5,
            num_samples=16,
            batch_size=1,
            device="cuda",
            dtype=torch.float16,
            weights=Weights("facebook/DiT-XL-2-256", "eab87f77abd5aef071a632f08807fbaab0b704d0"),
        ),
        Profile(
            "dit-xl-2-random",
            "dit-xl-2-random",
            guidance_scale=7.5,
            num_samples=1,
            batch_size=1,
            device="cuda" if HAS_GPU else "cpu",
            dtype=torch.float16 if HAS_GPU else torch.float32,
        ),
        # The 256² checkpoint is a transformer only; tokenizer, T5 and VAE are those of the 512² pipeline. Its commit
        # couldn't be looked up where this was written: `transformer=Weights(..., revision)` pins it.
        Profile(
            "pixart",
            "pixart",
            guidance_scale=4.5,
            num_samples=16,
            batch_size=1,
            device="cuda",
            dtype=torch.float16,
            weights=Weights("PixArt-alpha/PixArt-XL-2-512x512", "50f702106901db6d0f8b67eb88e814c56ded2692"),
            transformer=Weights("PixArt-alpha/PixArt-XL-2-256x256"),
        ),
    )
}


def get_profile(name: str, **changes) -> Profile:
    """The profile called ``name``, with some of its fields changed.

    Raises:
        ValueError: for an unknown profile or field.
    """
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown: choose one of {', '.join(PROFILES)}")
    known = {field.name for field in dataclasses.fields(Profile)}
    if unknown := set(changes) - known:
        raise ValueError(f"profile field {sorted(unknown)[0]!r} is unknown: choose from {', '.join(sorted(known))}")
    return dataclasses.replace(PROFILES[name], **changes)
