"""Profiles: a model, its sampler and its guidance under one name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)

WEIGHTS = Path(__file__).parent.parent / "weights"
# Trailing steps begin at the last timestep, as the noise does, and are among those of five times as many steps; leading
# ones, as in DiT-XL/2's own configuration, are neither.
DPM_SOLVER = {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "trailing"}
KARRAS, EXPONENTIAL, LU = ({name: True} for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"))
UNIPC = {"solver_order": 2, "timestep_spacing": "trailing", "final_sigmas_type": "zero"}  # its corrector is "bh2"
DEIS = {"algorithm_type": "deis", "solver_type": "logrho", "timestep_spacing": "trailing"}
SA_SOLVER = {
    **{"algorithm_type": "data_prediction", "predictor_order": 3, "corrector_order": 3},
    **{"tau_func": lambda _timestep: 0, "timestep_spacing": "trailing"},
}
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    "dpm-solver++": (DPMSolverMultistepScheduler, DPM_SOLVER),
    "dpm-solver++3": (DPMSolverMultistepScheduler, {**DPM_SOLVER, "solver_order": 3}),
    # Other spacings of the same steps: even in log-SNR (Lu et al. 2022), or Karras et al.'s (2022). The exponential
    # sigmas of the other solvers are even in log-SNR, too: diffusers' sigma is noise over signal.
    "dpm-solver++-lu": (DPMSolverMultistepScheduler, {**DPM_SOLVER, **LU}),
    "dpm-solver++3-lu": (DPMSolverMultistepScheduler, {**DPM_SOLVER, **LU, "solver_order": 3}),
    "dpm-solver++-karras": (DPMSolverMultistepScheduler, {**DPM_SOLVER, **KARRAS}),
    # UniPC (Zhao et al. 2023), DEIS (Zhang and Chen 2022), and SA-Solver (Xue et al. 2023) without its noise.
    "unipc2-exponential": (UniPCMultistepScheduler, {**UNIPC, **EXPONENTIAL}),
    "unipc2-karras": (UniPCMultistepScheduler, {**UNIPC, **KARRAS}),
    "unipc3-exponential": (UniPCMultistepScheduler, {**UNIPC, **EXPONENTIAL, "solver_order": 3}),
    "deis2-karras": (DEISMultistepScheduler, {**DEIS, **KARRAS, "solver_order": 2}),
    "deis3-exponential": (DEISMultistepScheduler, {**DEIS, **EXPONENTIAL, "solver_order": 3}),
    "sa-solver3-exponential": (SASolverScheduler, {**SA_SOLVER, **EXPONENTIAL}),
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
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Weights:
    """Where weights come from: a repository of the Hugging Face hub, pinned to a commit, or a local folder."""

    source: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Weights:
        """A folder, or ``REPO`` or ``REPO@REVISION`` of the hub; a folder that is there becomes absolute."""
        if Path(text).exists():
            return cls(str(Path(text).resolve()))
        source, _, revision = text.partition("@")
        return cls(source, revision or None)


@dataclass(frozen=True)
class Profile:
    """One way to run the notebooks: a model, how it is sampled, and how much of it."""

    name: str
    model: Literal["digits", "moving-digits", "cifar10", "dit-xl-2", "dit-xl-2-random", "pixart"]
    scheduler: str = "dpm-solver++"
    """A key of ``SCHEDULERS``."""
    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    num_samples: int = 12
    """Images of each configuration that a notebook compares."""
    images: int = 1000
    """Images of each method that are recorded for the sets' distance; fewer than the other recorded parts take limit
    those, too."""
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
    reference: str | None = None
    """Of the Fréchet distance, for models without a classifier of their own: an ``.npz`` with ``mu`` and ``sigma``, or
    a folder of images; ``None``: what full compute draws from other seeds."""
    rehearsal: bool = False
    """The weights are random, and a stand-in takes Inception's place: every figure says so."""

    @property
    def trained(self) -> bool:
        """Whether the model draws anything: a random one is timed, never scored."""
        return self.model != "dit-xl-2-random"

    @property
    def embedded(self) -> bool:
        """Whether the model is one of the package's own, whose images a classifier knows."""
        return self.model in CLASS_NAMES

    @property
    def video(self) -> bool:
        """Whether the model draws videos."""
        return self.model == "moving-digits"

    @property
    def distance(self) -> str:
        """What the Fréchet distance of its images is called, after features and reference."""
        if self.rehearsal:
            return "stand-in distance"
        if self.embedded:
            return f"FD-{self.model}"
        return "FID" if self.reference else "FID to full compute"

    @property
    def label(self) -> str:
        """The name, and what differs from the profile of that name: results of different settings never mix."""
        usual, texts = PROFILES.get(self.name, self), []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _NO_RESULT or (field.name == "transformer" and value is None):
                continue
            if value != getattr(usual, field.name):
                text = value.source if isinstance(value, Weights) else str(value).removeprefix("torch.")
                texts.append(f"{field.name}-{text.rstrip('/').rsplit('/', 1)[-1]}")
        return "-".join(re.sub(r"\W+", "-", text).replace("_", "-").strip("-").lower() for text in [self.name, *texts])


_NO_RESULT = ("name", "num_samples", "batch_size", "repeats", "device", "offload")
"""Fields that don't change what is recorded, but for how fast it is on which device."""


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", "digits", num_inference_steps=8, num_samples=4, images=6, batch_size=4, repeats=2),
        Profile("digits", "digits"),
        Profile("moving-digits", "moving-digits", num_inference_steps=30, images=64, batch_size=8),
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


def get_profile(name: str, **changes: Any) -> Profile:
    """The profile called ``name``, with some of its fields changed.

    Args:
        changes: values, or their text as on a command line, such as ``dtype="float16"`` or ``weights="REPO@REVISION"``.

    Raises:
        ValueError: for an unknown profile or field, or a text that isn't of the field's type.
    """
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} is unknown: choose one of {', '.join(PROFILES)}")
    fields = {field.name for field in dataclasses.fields(Profile)}
    if unknown := set(changes) - fields:
        raise ValueError(f"profile field {sorted(unknown)[0]!r} is unknown: choose from {', '.join(sorted(fields))}")
    values = {field: _typed(field, value) if isinstance(value, str) else value for field, value in changes.items()}
    return dataclasses.replace(PROFILES[name], **values)


def profile_of(asked: str | Mapping[str, Any]) -> Profile:
    """A profile by its name, or by a mapping of ``name`` and the fields to change, as notebooks are given it."""
    return get_profile(asked) if isinstance(asked, str) else get_profile(**asked)


def _typed(field: str, text: str) -> Any:
    """The value that ``text`` stands for in a field of ``Profile``."""
    hint: Any = get_type_hints(Profile)[field]
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and text == "none":
        return None
    values: dict[Any, Any] = {"true": True, "false": False} if hint is bool else {}
    if hint is torch.dtype:
        values = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    elif field in ("scheduler", "device"):
        values = {name: name for name in (SCHEDULERS if field == "scheduler" else ("cpu", "cuda"))}
    elif isinstance(kinds[0], str):
        values = {name: name for name in kinds}
    if values:
        if text not in values:
            raise ValueError(f"profile field {field}={text} is not accepted: {', '.join(values)}")
        return values[text]
    if Weights in kinds:
        return Weights.parse(text)
    if field == "reference":
        return str(Path(text).resolve())
    if hint not in (int, float):
        return text
    try:
        value = hint(text)
    except ValueError:
        value = -1
    if not 0 < value < float("inf"):
        raise ValueError(
            f"profile field {field}={text} is not accepted: {'a whole' if hint is int else 'a'} number > 0"
        )
    return value
