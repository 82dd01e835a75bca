"""Drawing images: same seed, same noise, whatever the configuration, so that every comparison is paired."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from dqar.attention import apply_dqar
from dqar.config import DQARConfig, Probe
from dqar.forecast.plan import ForecastPlan
from dqar.models.captions import NUM_CAPTIONS, coco_captions
from dqar.models.pipelines import num_classes
from dqar.models.profiles import Profile
from dqar.plan import ReusePlan
from dqar.trace import Trace

Result = TypeVar("Result")
OPEN = DQARConfig(entropy_threshold=None, snr_range=None)
"""Reuses whatever the schedule allows: neither entropy nor SNR has a say."""
LOOK = DQARConfig(schedule="none", probe=Probe(record=True))
"""Reuses nothing and measures everything."""


@dataclass(frozen=True)
class Samples:
    """Images ``[N, C, H, W]`` float32 in [0, 1], their labels ``[N]``, and the trace if DQAR was on.

    Videos are ``[N, F, C, H, W]``. A label is a class, or the number of a caption.
    """

    images: torch.Tensor
    labels: torch.Tensor
    trace: Trace | None = None

    @property
    def traced(self) -> Trace:
        """The trace.

        Raises:
            ValueError: DQAR was off.
        """
        if self.trace is None:
            raise ValueError("these samples have no trace: DQAR was off")
        return self.trace


def sample(
    pipe: DiffusionPipeline,
    profile: Profile,
    seed: int,
    config: DQARConfig | ReusePlan | ForecastPlan | None = None,
    *,
    num_samples: int | None = None,
    first_image: int = 0,
    num_inference_steps: int | None = None,
    description: str = "sample",
) -> Samples:
    """Draws ``num_samples`` images, classes or captions in turn, each from a noise of its own.

    Image ``i`` depends on ``(seed, i)`` only, not on the batch it is drawn in.

    Args:
        pipe: from ``load_pipeline``.
        profile: guidance, steps, batch size and, unless given here, the number of samples.
        seed: of the whole set.
        config: a configuration or plan that DQAR is applied with; ``None`` is the untouched pipeline.
        num_samples, num_inference_steps: in place of the profile's.
        first_image: number of the set's first image to draw.
        description: of the progress bar.

    Raises:
        RuntimeError: not even one image fits into the GPU's memory; of more, half as many are drawn at once.
    """
    images = torch.arange(first_image, first_image + (num_samples or profile.num_samples))
    labels = class_labels(pipe, images)

    def draw(batch_size: int) -> tuple[list[torch.Tensor], Trace | None]:
        session = None if config is None else apply_dqar(pipe, config)
        try:
            batches = []
            for part in tqdm(images.split(batch_size), desc=description, leave=False):
                drawn = pipe(
                    **conditions(pipe, part),
                    guidance_scale=profile.guidance_scale,
                    num_inference_steps=num_inference_steps or profile.num_inference_steps,
                    generator=noise_generators(seed, part),
                    output_type="pt",
                )[0]
                batches.append(drawn.float().cpu())
        finally:
            if session is not None:
                session.remove()
        return batches, session.trace if session else None

    batches, trace = within_memory(draw, min(profile.batch_size, len(images)), profile.label)
    return Samples(torch.cat(batches), labels, trace)


_FITS: dict[str, int] = {}
"""The largest number of images at once that has fitted, by whatever ran out of memory with more."""


def images_at_once(profile: Profile, number: int) -> int:
    """Of ``number`` images, as many as ``sample`` draws at once: fewer than asked for where they haven't fitted."""
    return min(profile.batch_size, number, _FITS.get(profile.label, number))


def within_memory(run: Callable[[int], Result], batch_size: int, what: str) -> Result:
    """``run(batch_size)``; where the GPU's memory is too small for that, from the start with half as many at once.

    Args:
        run: starts afresh at each call.
        batch_size: at most.
        what: needs so much memory; it is remembered, and said once.

    Raises:
        RuntimeError: one at once doesn't fit.
    """
    batch_size = min(batch_size, _FITS.get(what, batch_size))
    while True:
        try:
            return run(batch_size)
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise RuntimeError(
                    f"{what}: not even one image fits into the GPU's memory: --set offload=true keeps less there"
                ) from error
        before, batch_size = batch_size, batch_size // 2
        torch.cuda.empty_cache()
        if what not in _FITS:
            text = f"{what}: the GPU's memory is too small for {before} images at once"
            warnings.warn(f"{text}: {batch_size} are tried, and fewer if need be", stacklevel=2)
        _FITS[what] = batch_size


def class_labels(pipe: DiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """The classes, or numbers of captions, ``[N]`` of the images with these numbers ``[N]``: all in turn."""
    if isinstance(pipe, PixArtAlphaPipeline):
        return images % NUM_CAPTIONS
    return images % num_classes(pipe)


def conditions(pipe: DiffusionPipeline, images: torch.Tensor) -> dict:
    """What the pipeline is asked for in the images with these numbers ``[N]``."""
    labels = class_labels(pipe, images).tolist()
    if not isinstance(pipe, PixArtAlphaPipeline):
        return {"class_labels": labels}
    captions = coco_captions()
    # COCO's captions are clean, and the images have the model's own, square size.
    prompts = [captions[label] for label in labels]
    return {"prompt": prompts, "clean_caption": False, "use_resolution_binning": False}


def noise_generators(seed: int, images: torch.Tensor) -> list[torch.Generator]:
    """One generator for the noise of each image of a seed's set, by their numbers ``[N]``."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + image) for image in images.tolist()]


def first_latents(pipe: DiffusionPipeline, scheduler: SchedulerMixin, seed: int, images: torch.Tensor) -> torch.Tensor:
    """The noise ``[N, C, H, W]`` that ``sample`` begins these images of a seed's set with."""
    config = pipe.transformer.config
    shape = (len(images), config.in_channels, config.sample_size, config.sample_size)
    generators = noise_generators(seed, images)
    noise = randn_tensor(shape, generator=generators, device=pipe.device, dtype=pipe.transformer.dtype)
    return noise * scheduler.init_noise_sigma
