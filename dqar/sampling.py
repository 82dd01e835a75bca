"""Drawing images: same seed, same noise, whatever the configuration, so that every comparison is paired."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm

from dqar.attention import apply_dqar
from dqar.captions import NUM_CAPTIONS, coco_captions
from dqar.config import DQARConfig
from dqar.families import family
from dqar.models import Profile, num_classes
from dqar.trace import Trace

OPEN = DQARConfig(entropy_threshold=math.inf, snr_range=(0, math.inf))
"""Reuses whatever the schedule allows: neither entropy nor SNR has a say."""
LOOK = DQARConfig(schedule="none", record_entropy=True)
"""Reuses nothing and measures everything."""


@dataclass(frozen=True)
class Samples:
    """Images ``[N, C, H, W]`` float32 in [0, 1], their labels ``[N]``, and the trace if DQAR was on.

    A label is a class, or the number of a caption.
    """

    images: torch.Tensor
    labels: torch.Tensor
    trace: Trace | None = None


def sample(
    pipe: DiffusionPipeline,
    profile: Profile,
    seed: int,
    config: DQARConfig | None = None,
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
        config: applies DQAR for these samples; ``None`` is the untouched pipeline.
        num_samples, num_inference_steps: in place of the profile's.
        first_image: number of the set's first image to draw.
        description: of the progress bar.
    """
    images = torch.arange(first_image, first_image + (num_samples or profile.num_samples))
    labels = class_labels(pipe, images)
    session = None if config is None else apply_dqar(pipe, config)
    try:
        batches = []
        for part in tqdm(images.split(profile.batch_size), desc=description, leave=False):
            drawn = pipe(
                **_conditions(pipe, part),
                guidance_scale=profile.guidance_scale,
                num_inference_steps=num_inference_steps or profile.num_inference_steps,
                generator=noise_generators(seed, part),
                output_type="pt",
            ).images
            batches.append(drawn.float().cpu())
    finally:
        if session is not None:
            session.remove()
    return Samples(torch.cat(batches), labels, session.trace if session else None)


def class_labels(pipe: DiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """The classes, or numbers of captions, of the images with these numbers: all in turn."""
    if isinstance(pipe, PixArtAlphaPipeline):
        return images % NUM_CAPTIONS
    return images % num_classes(pipe)


def _conditions(pipe: DiffusionPipeline, images: torch.Tensor) -> dict:
    """What the pipeline is asked for in these images."""
    labels = class_labels(pipe, images).tolist()
    if not isinstance(pipe, PixArtAlphaPipeline):
        return {"class_labels": labels}
    captions = coco_captions()
    # COCO's captions are clean, and the images have the model's own, square size.
    prompts = [captions[label] for label in labels]
    return {"prompt": prompts, "clean_caption": False, "use_resolution_binning": False}


def noise_generators(seed: int, images: torch.Tensor) -> list[torch.Generator]:
    """One generator for the noise of each image of a seed's set."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + image) for image in images.tolist()]


def first_latents(pipe: DiffusionPipeline, scheduler: SchedulerMixin, seed: int, images: torch.Tensor) -> torch.Tensor:
    """The noise ``[N, C, H, W]`` that ``sample`` begins these images of a seed's set with."""
    config = pipe.transformer.config
    shape = (len(images), config.in_channels, config.sample_size, config.sample_size)
    generators = noise_generators(seed, images)
    noise = randn_tensor(shape, generator=generators, device=pipe.device, dtype=pipe.transformer.dtype)
    return noise * scheduler.init_noise_sigma


class ChangeRecorder:
    """How much each attention layer's output changes from one step to the next: the error that reusing it would cause.

    ``‖o_t − o_{t−1}‖ / ‖o_t‖`` per layer and guidance half, measured with forward hooks on the untouched computation;
    and ``layer_change``, the same against the output of the layer before.
    """

    def __init__(self, transformer: torch.nn.Module, num_inference_steps: int):
        self.rows: list[dict] = []
        self._last: dict[int, torch.Tensor] = {}
        self._forwards, self._num_inference_steps = 0, num_inference_steps
        self._branches = family(transformer).branch_order
        blocks = transformer.transformer_blocks
        self._handles = [block.attn1.register_forward_hook(self._see(i)) for i, block in enumerate(blocks)]

    def __enter__(self) -> ChangeRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, layer_id: int):
        def hook(_module, _args, output):
            self._forwards += layer_id == 0
            run, step = divmod(self._forwards - 1, self._num_inference_steps)
            last = self._last.get(layer_id)
            self._last[layer_id] = output
            if step == 0:
                return
            changes = {"change": _relative_change(output, last)}
            if layer_id > 0:
                changes["layer_change"] = _relative_change(output, self._last[layer_id - 1])
            for half, branch in enumerate(self._branches):
                means = {name: change.chunk(2)[half].mean().item() for name, change in changes.items()}
                self.rows.append({"run": run, "step": step, "layer": layer_id, "branch": branch, **means})

        return hook


def _relative_change(output: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (output - before).flatten(1).norm(dim=1) / output.flatten(1).norm(dim=1)


class StateRecorder:
    """The latents that the transformer is given at every step (under guidance, the first half of its batch)."""

    def __init__(self, transformer: torch.nn.Module):
        self._seen: dict[float, list[torch.Tensor]] = {}
        self._handle = transformer.register_forward_pre_hook(self._see, with_kwargs=True)

    def __enter__(self) -> StateRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def states(self) -> torch.Tensor:
        """``[steps, images, C, H, W]``."""
        return torch.stack([torch.cat(parts) for parts in self._seen.values()])

    def _see(self, _module, args, kwargs):
        latents = args[0] if args else kwargs["hidden_states"]
        self._seen.setdefault(float(kwargs["timestep"].flatten()[0]), []).append(latents.chunk(2)[0].float().cpu())
