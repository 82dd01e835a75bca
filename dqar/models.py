"""The model zoo: profiles, pipelines, schedulers, and the loading of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    ImagePipelineOutput,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError

from dqar.classifier import CLASSIFIERS, Classifier

WEIGHTS = Path(__file__).parent / "weights"
DPM_SOLVER = {"algorithm_type": "dpmsolver++", "solver_order": 2}
SCHEDULERS = {
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


def load_pipeline(profile: Profile) -> DiffusionPipeline:
    """The profile's pipeline on its device, in its dtype, with its scheduler.

    Raises:
        OSError: weights that can't be found or read, saying which.
        RuntimeError: no such device here, or too little memory on it.
    """
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"profile {profile.name!r} needs a CUDA GPU and there is none: profile 'digits' runs on a CPU"
        )
    if profile.model in CLASSIFIERS:
        pipe = load_embedded(profile.model, profile.dtype)
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


def _load_pretrained(profile: Profile) -> DiffusionPipeline:
    """The pipeline and, if it has its own, the transformer, from the hub, its local cache, or a folder."""
    pipeline, transformer = {
        "dit-xl-2": (DiTPipeline, DiTTransformer2DModel),
        "pixart": (PixArtAlphaPipeline, PixArtTransformer2DModel),
    }[profile.model]
    wanted, parts = profile.weights, {}
    try:
        if profile.transformer is not None:
            wanted = profile.transformer
            parts["transformer"] = transformer.from_pretrained(
                wanted.source, subfolder="transformer", revision=wanted.revision, dtype=profile.dtype
            )
            wanted = profile.weights
        return pipeline.from_pretrained(wanted.source, revision=wanted.revision, dtype=profile.dtype, **parts)
    except OSError as error:
        at = f" at revision {wanted.revision}" if wanted.revision else ""
        raise OSError(
            f"profile {profile.name!r} needs {wanted.source}{at} from the Hugging Face hub, its local cache or a "
            "folder: is there a network? Once it has been loaded, HF_HUB_OFFLINE=1 uses the cache"
        ) from error


def random_dit_xl_2(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: int) -> DiTPipeline:
    """DiT-XL/2's ``DiTPipeline`` at its full size, VAE and all, with random weights: for time and memory.

    Args:
        seed, dtype: of the weights.
        changes: to the transformer's configuration, such as ``num_layers=2``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(**{**DIT_XL_2_CONFIG, **changes}).eval()
        vae = AutoencoderKL(**SD_VAE_CONFIG).eval()
    for part in (transformer, vae):
        torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns of checkpoints' layers that are to stay in float32
    return DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))


PIPELINES = {"digits": EmbeddedDiTPipeline, "cifar10": DiTPipeline}
"""Of the embedded models: one draws pixels, the other latents for an autoencoder, as DiT-XL/2 does."""


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
        raise OSError(
            f"the weights in {path} are missing: `python -m dqar.train {name} --out {path.parent}` makes them"
        )
    try:
        return PIPELINES[name].from_pretrained(path, dtype=dtype)
    except (SafetensorError, OSError, ValueError) as error:
        raise OSError(f"the weights in {path} can't be read: {error}") from error


def num_classes(pipe: DiffusionPipeline) -> int:
    """How many classes a class-conditional pipeline can be asked for: the named ones, or all that it embeds.

    ``DiTPipeline``'s transformer embeds 1,000 classes and the null class, whatever number was trained.
    """
    return len(set(pipe.labels.values())) or pipe.transformer.config.num_embeds_ada_norm


def load_classifier(name: str = "digits", folder: Path | None = None) -> Classifier:
    """The classifier behind ``FD-digits`` or ``FD-cifar10`` and class accuracy; ``folder`` as for ``load_embedded``.

    Raises:
        OSError: missing or truncated weights, naming the folder.
    """
    path = (folder or WEIGHTS) / f"{name}-classifier"
    if not path.exists():
        command = f"python -m dqar.train {path.name} --out {path.parent}"
        raise OSError(f"the weights in {path} are missing: `{command}` makes them")
    try:
        return CLASSIFIERS[name].from_pretrained(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise OSError(f"the weights in {path} can't be read: {error}") from error


def make_scheduler(name: str, like: SchedulerMixin) -> SchedulerMixin:
    """The named scheduler on the noise schedule of another one, never clipping samples.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler {name!r} is unknown: choose one of {', '.join(SCHEDULERS)}")
    cls, options = SCHEDULERS[name]
    return cls.from_config(like.config, **options)
