"""Pipelines: embedded, pretrained and random ones, and what is known of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SchedulerMixin,
)
from diffusers.pipelines.latte.pipeline_latte import LattePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError

from dqar.checks import check
from dqar.models.guidance import guide, guided_prediction
from dqar.models.profiles import SCHEDULERS, SD_VAE_CONFIG, WEIGHTS, Profile

DIT_XL_2_CONFIG = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
"""DiT-XL/2 at 256², as its checkpoint has it; the rest are ``DiTTransformer2DModel``'s defaults."""


class _EmbeddedPipeline(DiffusionPipeline):
    """A pixel-space transformer with a scheduler, asked for classes by number: its latents are what it draws."""

    def __init__(self, transformer: ModelMixin, scheduler: SchedulerMixin, id2label: dict[str, str] | None = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label)

    @property
    def labels(self) -> dict[str, int]:
        """Class ids by name."""
        return {name: int(label) for label, name in (self.config.id2label or {}).items()}


class EmbeddedDiTPipeline(_EmbeddedPipeline):
    """Samples a pixel-space ``DiTTransformer2DModel``, called like ``DiTPipeline``.

    ``DiTPipeline`` itself takes 1000 for the null class and decodes with a VAE; the null class here is the model's own,
    ``num_embeds_ada_norm``, and the latents are the image.
    """

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
            noise = guided_prediction(self.transformer, self.scheduler, latents, t, guidance_scale, class_labels=labels)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        images = latents
        if output_type != "latent":
            images = (latents / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                images = images.permute(0, 2, 3, 1).float().cpu().numpy()
                images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def class_captions(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Classes ``[N]`` as captions ``[N, 1, num_classes]`` of one token: one-hot; the null class is all zeros."""
    return F.one_hot(labels, num_classes + 1)[:, None, :num_classes].float()


class EmbeddedLattePipeline(_EmbeddedPipeline):
    """Samples videos of a pixel-space ``LatteTransformer3DModel``, called like ``EmbeddedDiTPipeline``.

    ``LattePipeline`` itself needs T5 and a VAE; the caption here is the class, and the latents are the video.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_frames: int | None = None,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> LattePipelineOutput | tuple:
        """Draws a video a label.

        Args:
            class_labels: ``[B]``.
            num_frames: of each video, as many as the model was made for; ``None``: these.
            guidance_scale, generator, num_inference_steps, return_dict: as ``DiTPipeline``'s.
            output_type: ``"pil"``: lists of frames; ``"pt"``: ``[B, F, C, H, W]`` in [0, 1]; ``"np"``: ``[B, F, H, W,
                C]``; ``"latent"``: ``[B, C, F, H, W]`` in about [-1, 1].

        Raises:
            ValueError: another number of frames.
        """
        config, batch = self.transformer.config, len(class_labels)
        fits = num_frames in (None, config.video_length)
        check("num_frames", num_frames, fits, f"this model draws {config.video_length}")
        shape = (batch, config.in_channels, config.video_length, config.sample_size, config.sample_size)
        device, dtype = self._execution_device, self.transformer.dtype
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        labels, null = torch.tensor(class_labels, device=device), config.caption_channels
        if guidance_scale > 1:
            labels = torch.cat([torch.full_like(labels, null), labels])
        captions = class_captions(labels, null).to(dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(latents, t).repeat(len(labels) // batch, 1, 1, 1, 1)
            noise = self.transformer(model_input, t.to(device).expand(len(labels)), captions).sample
            if guidance_scale > 1:
                uncond, cond = noise.chunk(2)
                noise = guide(cond, uncond, guidance_scale)
            latents = self.scheduler.step(noise, t, latents).prev_sample
        frames = latents
        if output_type != "latent":
            frames = (latents / 2 + 0.5).clamp(0, 1).transpose(1, 2)
            if output_type != "pt":
                frames = frames.permute(0, 1, 3, 4, 2).float().cpu().numpy()
                frames = list(map(self.numpy_to_pil, frames)) if output_type == "pil" else frames
        self.maybe_free_model_hooks()
        return LattePipelineOutput(frames=frames) if return_dict else (frames,)


def check_device(profile: Profile) -> None:
    """Raises ``RuntimeError`` for a GPU that isn't there."""
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"profile {profile.label!r} needs a CUDA GPU and torch finds none: --device cpu, or profile 'digits'"
        )


def load_pipeline(profile: Profile, folder: Path | None = None) -> DiffusionPipeline:
    """The profile's pipeline on its device, in its dtype, with its scheduler.

    Args:
        profile: a model, its sampler and where it runs.
        folder: of an embedded model's weights, as for ``load_embedded``.

    Raises:
        OSError: weights that can't be found or read, saying which.
        RuntimeError: no such device here, or too little memory on it.
    """
    check_device(profile)
    if profile.model in PIPELINES:
        pipe = load_embedded(profile.model, profile.dtype, folder)
    elif profile.model == "dit-xl-2-random":
        pipe = random_dit_xl_2(dtype=profile.dtype)
    else:
        pipe = _load_pretrained(profile)
    pipe.scheduler = make_scheduler(profile.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        if not profile.offload:
            return pipe.to(profile.device)
        pipe.enable_model_cpu_offload(device=profile.device)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"profile {profile.name!r} doesn't fit into the memory of {torch.cuda.get_device_name()}: "
            "get_profile(..., offload=True) keeps only what is at work there"
        ) from error
    return pipe


def cached_pipeline(profile: Profile) -> DiffusionPipeline:
    """One pipeline for all profiles of the same model, sampler, dtype and device, shared within the process.

    Pipelines of several samplers share the model: a GPU holds it once.
    """
    return _with_scheduler(
        dataclasses.replace(
            profile, num_inference_steps=1, guidance_scale=1.0, num_samples=1, images=1, batch_size=1, repeats=1
        )
    )


@functools.lru_cache(maxsize=8)
def _with_scheduler(profile: Profile) -> DiffusionPipeline:
    loaded = _loaded(dataclasses.replace(profile, scheduler="ddim"))
    return with_parts(loaded, scheduler=make_scheduler(profile.scheduler, loaded.scheduler))


_loaded = functools.lru_cache(maxsize=4)(load_pipeline)


def with_parts(pipe: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """A pipeline of the same parts but these, which are not copied."""
    labels = {} if (id2label := pipe.config.get("id2label")) is None else {"id2label": id2label}
    other = type(pipe)(**{**pipe.components, **labels, **parts})
    if "labels" in vars(pipe):  # DiTPipeline's classes by name, which are in no config
        other.labels = pipe.labels
    other.set_progress_bar_config(disable=True)
    return other


def _load_pretrained(profile: Profile) -> DiffusionPipeline:
    """The pipeline and, if it has its own, the transformer, from the hub, its local cache, or a folder."""
    pipeline, transformer = {
        "dit-xl-2": (DiTPipeline, DiTTransformer2DModel),
        "pixart": (PixArtAlphaPipeline, PixArtTransformer2DModel),
    }[profile.model]
    if profile.weights is None:
        raise ValueError(f"profile {profile.name!r} doesn't say where its weights come from: weights=Weights(...)")
    asked, parts = profile.weights, {}
    try:
        if profile.transformer is not None:
            asked = profile.transformer
            parts["transformer"] = transformer.from_pretrained(
                asked.source, subfolder="transformer", revision=asked.revision, dtype=profile.dtype
            )
            asked = profile.weights
        return pipeline.from_pretrained(asked.source, revision=asked.revision, dtype=profile.dtype, **parts)
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        at = f" at revision {asked.revision}" if asked.revision else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"profile {profile.name!r} needs {asked.source}{at} from the Hugging Face hub, its local cache or a "
            "folder: is there a network, or is it half-downloaded? Once it has been loaded, HF_HUB_OFFLINE=1 uses the "
            f"cache ({reason})"
        ) from error


def random_dit_xl_2(dtype: torch.dtype = torch.float32, **changes: int) -> DiTPipeline:
    """DiT-XL/2's ``DiTPipeline`` at its full size, VAE and all, with random weights: for time and memory.

    Args:
        dtype: of the weights.
        changes: to the transformer's configuration, such as ``num_layers=2``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(**{**DIT_XL_2_CONFIG, **changes}).eval()
        vae = AutoencoderKL(**SD_VAE_CONFIG).eval()
    for part in (transformer, vae):
        torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns of checkpoints' layers that are to stay in float32
    return DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))


PIPELINES = {"digits": EmbeddedDiTPipeline, "moving-digits": EmbeddedLattePipeline, "cifar10": DiTPipeline}
"""Of the embedded models: two draw pixels, the third latents for an autoencoder, as DiT-XL/2 does."""


def load_embedded(name: str, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> DiffusionPipeline:
    """An embedded model, with the same code that loads DiT-XL/2.

    Args:
        name: a key of ``PIPELINES``.
        dtype: of the weights once they are loaded.
        folder: with a folder ``name`` in it; the package's own weights by default.

    Raises:
        OSError: missing or truncated weights, naming the folder.
    """
    path = (folder or WEIGHTS) / name
    if not (path / DiffusionPipeline.config_name).exists():
        raise OSError(f"the weights in {path} are missing: `dqar train {name} --out {path.parent}` makes them")
    try:
        return PIPELINES[name].from_pretrained(path, dtype=dtype)
    except (SafetensorError, OSError, ValueError) as error:
        raise OSError(f"the weights in {path} can't be read: {error}") from error


def num_classes(pipe: DiffusionPipeline) -> int:
    """How many classes a class-conditional pipeline can be asked for: the named ones, or all that it embeds.

    ``DiTPipeline``'s transformer embeds 1,000 classes and the null class, whatever number was trained.
    """
    return len(set(pipe.labels.values())) or pipe.transformer.config.num_embeds_ada_norm


@torch.no_grad()
def to_images(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Finished latents ``[B, C, H, W]`` as images ``[B, C, H, W]`` float32 in [0, 1], decoded where there is a VAE."""
    vae = getattr(pipe, "vae", None)
    pixels = latents if vae is None else vae.decode(latents / vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1).float()


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """The named scheduler on the noise schedule of another one, never clipping samples.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is unknown: choose one of {', '.join(SCHEDULERS)}")
    cls, options = SCHEDULERS[name]
    return cls.from_config(like.config, **options)
