"""What the rivals share: one notion of a run, one way to take everything off again, and checks.

A run begins when the scheduler's timesteps are set anew. Guidance doubles the batch (conditional half first); except
FasterCache, every peer takes that batch as one input and decides once for both halves.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dqar.measure.sampling import conditions, noise_generators
from dqar.takeover import handler_of

COMPONENTS = ("attn1", "ff")
"""The two modules of a DiT block that hold its work; what they return is not yet multiplied by the adaLN gate."""
CALIBRATION_SEED = 400
"""Of the noise that rivals are calibrated on: of no image that is compared."""


class Progress:
    """Where the run is: its step from 0, and that step's timestep; and whom to tell."""

    def __init__(self):
        self.on_start: list[Callable[[], None]] = []
        self.on_step: list[Callable[[], None]] = []
        self.step, self.timestep = -1, math.nan

    def start(self) -> None:
        """A run begins: it is before its first step."""
        self.step, self.timestep = -1, math.nan
        for call in self.on_start:
            call()

    def advance(self, _module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the transformer."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.step, self.timestep = self.step + 1, float(timestep.flatten()[0])
        for call in self.on_step:
            call()


@contextmanager
def watched(pipe: DiffusionPipeline, num_inference_steps: int) -> Iterator[Progress]:
    """Follows the runs of a pipeline, and puts back whatever is changed meanwhile on its transformer's modules.

    Raises:
        ValueError: other hooks on the transformer; at ``set_timesteps``, a run of another number of steps.
    """
    transformer, scheduler = pipe.transformer, pipe.scheduler
    modules = list(transformer.modules())
    registries = [vars(module).get("_diffusers_hook") for module in modules]
    taken = any(map(handler_of, modules))
    if taken or "set_timesteps" in vars(scheduler) or any(registry and registry.hooks for registry in registries):
        raise ValueError("the pipeline has a peer, DQAR or other diffusers hooks on it: take them off first")
    if any(hasattr(module, "_hf_hook") for module in modules):
        raise ValueError("the pipeline is offloaded by accelerate, which replaces the forward that a peer needs")
    before = [(module, dict(vars(module)), dict(module._modules)) for module in modules]
    set_timesteps, run = scheduler.set_timesteps, Progress()

    @functools.wraps(set_timesteps)
    def start_run(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        if len(scheduler.timesteps) != num_inference_steps:
            raise ValueError(f"a run of {len(scheduler.timesteps)} steps, but attached for {num_inference_steps}")
        run.start()

    scheduler.set_timesteps = start_run
    handle = transformer.register_forward_pre_hook(run.advance, with_kwargs=True)
    try:
        yield run
    finally:
        handle.remove()
        del scheduler.set_timesteps
        for module, attributes, children in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)


def block_modules(transformer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Attention and feed-forward of every block, in the order of computation."""
    blocks: Any = transformer.transformer_blocks
    for block in blocks:
        for component in COMPONENTS:
            yield getattr(block, component)


def check_range(**settings: tuple[Any, float, float]) -> None:
    """Raises ``ValueError`` for a ``name=(value, least, most)`` out of its range."""
    for name, (value, least, most) in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"{name}={value!r} is out of range: from {least} to {most}")


def load_package(name: str, distribution: str) -> Any:
    """An optional package, loaded when it is needed; ``ImportError`` says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this peer needs {distribution}: pip install -e .[peers]") from error


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """A logger and its own handlers, which a package's other loggers may share, that say nothing below an error."""
    logger = logging.getLogger(name)
    speakers: list[Any] = [logger, *logger.handlers]
    levels = [speaker.level for speaker in speakers]
    for speaker in speakers:
        speaker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for speaker, level in zip(speakers, levels, strict=True):
            speaker.setLevel(level)


_calibrated: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()


def calibrate(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    guidance_scale: float,
    images: int,
    what: str,
    measure: Callable[[Callable[[], torch.Tensor]], Any],
) -> Any:
    """``measure(draw)``, once per model, sampler and settings.

    ``draw()`` runs the pipeline, always on the same noise, of no image that is compared, and returns its images
    ``[N, ...]``.
    """
    config = pipe.scheduler.config
    sampler = (type(pipe.scheduler).__name__, tuple(sorted((name, repr(value)) for name, value in config.items())))
    key = (what, pipe.transformer.dtype, sampler, num_inference_steps, guidance_scale, images)

    def draw() -> torch.Tensor:
        numbers = torch.arange(images)
        drawn = pipe(
            **conditions(pipe, numbers),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=noise_generators(CALIBRATION_SEED, numbers),
            output_type="np",
        )
        return torch.as_tensor(drawn.images)

    calibrated = _calibrated.setdefault(pipe.transformer, {})
    if key not in calibrated:
        calibrated[key] = measure(draw)
    return calibrated[key]
