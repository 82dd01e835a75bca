"""The model zoo: profiles, pipelines, schedulers, and the loading of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError

from dqar.classifier import DigitClassifier

DIT_XL_2 = "facebook/DiT-XL-2-256"
WEIGHTS = Path(__file__).parent / "weights"
SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpm-solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": (EulerDiscreteScheduler, {}),
}
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_NAMES = {str(digit): name for digit, name in enumerate(_NAMES)}


@dataclass(frozen=True)
class Profile:
    """One way to run the notebooks: a model, how it is sampled, and how much of it."""

    name: str
    model: Literal["digits", "dit-xl-2"]
    scheduler: Literal["ddim", "dpm-solver++", "euler"] = "dpm-solver++"
    num_inference_steps: int = 50
    guidance_scale: float = 2.0
    num_samples: int = 12
    """Images of each configuration that a notebook compares."""
    batch_size: int = 12
    repeats: int = 5
    """Interleaved timing repeats."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", "digits", num_inference_steps=8, num_samples=4, batch_size=4, repeats=2),
        Profile("digits", "digits"),
        # Slide 11: 50 steps of DPM-Solver++ at guidance 7.5, batch 1; the pipeline's own guidance would be 4.0.
        Profile(
            "dit-xl-2",
            "dit-xl-2",
            guidance_scale=7.5,
            num_samples=16,
            batch_size=1,
            device="cuda",
            dtype=torch.float16,
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


class EmbeddedDiTPipeline(DiffusionPipeline):
    """Samples a pixel-space ``DiTTransformer2DModel``, called like ``DiTPipeline``.

    ``DiTPipeline`` itself takes 1000 for the null class and decodes with a VAE; the null class here is the model's own,
    ``num_embeds_ada_norm``, and the latents are the image.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label)

    @property
    def labels(self) -> dict[str, int]:
        """Class ids by name."""
        return {name: int(label) for label, name in (self.config.id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """``DiTPipeline``'s arguments and results; ``output_type="latent"`` gives ``[B, C, H, W]`` in about [-1, 1]."""
        config, batch = self.transformer.config, len(class_labels)
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        device = self._execution_device
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        labels = torch.tensor(class_labels, device=device).reshape(-1)
        if guidance_scale > 1:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            noise = guided_prediction(self.transformer, self.scheduler, latents, t, labels, guidance_scale)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        images = latents
        if output_type != "latent":
            images = (latents / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                images = images.permute(0, 2, 3, 1).float().cpu().numpy()
                images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def guided_prediction(
    transformer: DiTTransformer2DModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor,
    guidance_scale: float,
) -> torch.Tensor:
    """The noise ``[B, C, H, W]`` that the model predicts in ``latents``, guided if there are twice as many ``labels``.

    Guidance computes both branches in one batch: the first half of ``labels`` conditional, the second the null class.
    """
    guided = len(labels) == 2 * len(latents)
    model_input = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
    noise = transformer(model_input, timestep=t.to(latents.device).expand(len(model_input)), class_labels=labels).sample
    noise = noise[:, : latents.shape[1]]  # DiT-XL/2 predicts variances too
    if guided:
        cond, uncond = noise.chunk(2)
        noise = uncond + guidance_scale * (cond - uncond)
    return noise


def load_pipeline(profile: Profile) -> DiffusionPipeline:
    """The profile's pipeline on its device, in its dtype, with its scheduler.

    Raises:
        OSError: weights that can't be found or read, saying which.
        RuntimeError: no such device here.
    """
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"profile {profile.name!r} needs a CUDA GPU and there is none: profile 'digits' runs on a CPU"
        )
    if profile.model == "digits":
        pipe = load_embedded("digits", profile.dtype)
    else:
        try:
            pipe = DiTPipeline.from_pretrained(DIT_XL_2, dtype=profile.dtype)
        except OSError as error:
            raise OSError(
                f"profile {profile.name!r} needs {DIT_XL_2} from the Hugging Face hub or its local cache"
            ) from error
    pipe.scheduler = make_scheduler(profile.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(profile.device)


def load_embedded(name: str, dtype: torch.dtype = torch.float32, folder: Path = WEIGHTS) -> EmbeddedDiTPipeline:
    """An embedded model, with the same code that loads DiT-XL/2.

    Raises:
        OSError: missing or truncated weights, naming the folder.
    """
    path = folder / name
    if not (path / EmbeddedDiTPipeline.config_name).exists():
        raise OSError(f"the weights in {path} are missing")
    try:
        return EmbeddedDiTPipeline.from_pretrained(path, dtype=dtype)
    except (SafetensorError, OSError, ValueError) as error:
        raise OSError(f"the weights in {path} can't be read: {error}") from error


def load_classifier() -> DigitClassifier:
    """The digit classifier behind ``FD-digits`` and class accuracy."""
    return DigitClassifier.from_pretrained(WEIGHTS / "digits-classifier")


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """The named scheduler on the noise schedule of another one, never clipping samples.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is unknown: choose one of {', '.join(SCHEDULERS)}")
    cls, options = SCHEDULERS[name]
    return cls.from_config(like.config, **options)
