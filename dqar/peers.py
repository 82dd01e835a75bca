"""Rival caching methods on the pipelines of ``DiTTransformer2DModel``, so that a comparison can run them beside DQAR.

Each runs its own published or library code wherever that can be made to run on DiT; its docstring says whose code runs
and what it needed. What they share is here: one notion of a run, which begins when the scheduler's timesteps are set
anew, and one way to take everything off again. Guidance doubles the batch (conditional half first); except
FasterCache, every peer takes that batch as one input and decides once for both halves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_sea_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.mag_cache import _MAG_CACHE_LEADER_BLOCK_HOOK
from diffusers.models.attention import BasicTransformerBlock

from dqar.models import num_classes
from dqar.takeover import handler_of

COMPONENTS = ("attn1", "ff")
"""The two modules of a DiT block that hold its work; what they return is not yet multiplied by the adaLN gate."""
CALIBRATION_SEED = 400
"""Of the noise that SmoothCache and MagCache are calibrated on: of no image that is compared."""


@dataclass(frozen=True)
class Peer:
    """A rival caching method with its settings."""

    name: str
    """A key of ``ADAPTERS``."""
    settings: tuple[tuple[str, Any], ...] = ()
    """The adapter's keyword arguments, such as ``(("interval", 3), ("order", 2))``."""

    def attach(self, pipe: DiffusionPipeline, num_inference_steps: int) -> AbstractContextManager[None]:
        """Puts the method on ``pipe.transformer`` for any number of runs of ``num_inference_steps`` steps.

        Afterwards the pipeline is as before and draws bit-identical images.

        Raises:
            ValueError: an unknown method or setting, or a value out of range; a pipeline with other hooks on it.
            ImportError: the method's package isn't installed.
        """
        if self.name in UNUSABLE:
            raise ValueError(f"peer {self.name!r} can't run on DiT: {UNUSABLE[self.name]}")
        if self.name not in ADAPTERS:
            raise ValueError(f"peer {self.name!r} is unknown: choose one of {', '.join(ADAPTERS)}")
        adapter, settings = ADAPTERS[self.name], dict(self.settings)
        known = list(inspect.signature(adapter).parameters)[2:]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(f"setting {unknown[0]!r} of {self.name!r} is unknown: choose from {', '.join(known)}")
        return adapter(pipe, num_inference_steps, **settings)


# --- what all share --------------------------------------------------------------------------------------------------


class _Run:
    """Where the run is: its step from 0, and that step's timestep; and whom to tell."""

    def __init__(self):
        self.on_start: list[Callable[[], None]] = []
        self.on_step: list[Callable[[], None]] = []
        self.step, self.timestep = -1, math.nan

    def start(self) -> None:
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
def _watched(pipe: DiffusionPipeline, num_inference_steps: int) -> Iterator[_Run]:
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
    set_timesteps, run = scheduler.set_timesteps, _Run()

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


@contextmanager
def _diffusers_cache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    apply: Callable[[torch.nn.Module, Any], None],
    make_config: Callable[[_Run], Any],
) -> Iterator[_Run]:
    """One of diffusers' caches, with what ``CacheMixin`` and the newer pipelines would do for it, which DiT's don't.

    That is: its hooks are reset at the start of every run, and at every step they are given a cache context, with the
    step, and with the noise level σ of the flow-matching path that has the step's signal-to-noise ratio.
    """
    with _watched(pipe, num_inference_steps) as run:
        apply(pipe.transformer, make_config(run))
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.invalidate_child_registries_cache()

        def set_context():
            context = CacheContext(
                "inference",
                step_index=run.step,
                num_inference_steps=num_inference_steps,
                timestep=run.timestep,
                sigma=_flow_sigma(pipe.scheduler, run.timestep),
            )
            _set_cache_context(pipe.transformer, context)

        run.on_start.append(registry.reset_stateful_hooks)
        run.on_step.append(set_context)
        yield run


def _flow_sigma(scheduler: Any, timestep: float) -> float:
    """σ in ``x / (√ᾱ + √(1−ᾱ)) = (1 − σ) x0 + σ ε``: a variance-preserving step as one of flow matching."""
    alpha_bar = float(scheduler.alphas_cumprod[round(timestep)])
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    return noise / (signal + noise)


def _modules(transformer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Attention and feed-forward of every block, in the order of computation."""
    for block in transformer.transformer_blocks:
        for component in COMPONENTS:
            yield getattr(block, component)


def _in_range(**settings: tuple[Any, float, float]) -> None:
    """Checks ``name=(value, least, most)``."""
    for name, (value, least, most) in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"{name}={value!r} is out of range: from {least} to {most}")


def _package(name: str, distribution: str) -> Any:
    """An optional package, loaded when it is needed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this peer needs {distribution}: pip install -e .[peers]") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger and its own handlers, which a package's other loggers may share, that say nothing below an error."""
    logger = logging.getLogger(name)
    speakers = [logger, *logger.handlers]
    levels = [speaker.level for speaker in speakers]
    for speaker in speakers:
        speaker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for speaker, level in zip(speakers, levels, strict=True):
            speaker.setLevel(level)


_calibrated: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()


def _calibrate(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    guidance_scale: float,
    images: int,
    what: str,
    measure: Callable[[Callable[[], None]], Any],
) -> Any:
    """``measure(draw)``, once per model, sampler and settings; ``draw()`` runs the pipeline on noise of its own."""
    config = pipe.scheduler.config
    sampler = (type(pipe.scheduler).__name__, tuple(sorted((name, repr(value)) for name, value in config.items())))
    key = (what, pipe.transformer.dtype, sampler, num_inference_steps, guidance_scale, images)

    def draw():
        pipe(
            class_labels=[image % num_classes(pipe) for image in range(images)],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(CALIBRATION_SEED * 1_000_003 + i) for i in range(images)],
            output_type="np",
        )

    known = _calibrated.setdefault(pipe.transformer, {})
    if key not in known:
        known[key] = measure(draw)
    return known[key]


# --- static interval and TaylorSeer ----------------------------------------------------------------------------------


@contextmanager
def static_interval(
    pipe: DiffusionPipeline, num_inference_steps: int, interval: int = 2, from_end: bool = False
) -> Iterator[None]:
    """Attention and feed-forward of every block computed at every ``interval``-th step, reused as they are in between.

    Own code for FORA (Selvaraju et al. 2024, arXiv 2407.01425), which has the same sites. It needs nothing of DiT but
    its modules' names.

    Args:
        interval: of computed steps.
        from_end: counts from the last step, as FORA's code does, so that the last step is always computed, and the
            first too; otherwise from the first.

    Raises:
        ValueError: an interval below 1.
    """
    _in_range(interval=(interval, 1, math.inf))
    with _watched(pipe, num_inference_steps) as run:
        for module in _modules(pipe.transformer):
            module.forward = _reused(module.forward, run, num_inference_steps, interval, from_end)
        yield


def _reused(forward: Callable, run: _Run, num_inference_steps: int, interval: int, from_end: bool) -> Callable:
    kept: list[torch.Tensor] = []
    run.on_start.append(kept.clear)

    def reuse(*args, **kwargs):
        counted = num_inference_steps - 1 - run.step if from_end else run.step
        if not kept or counted % interval == 0:
            kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    return reuse


@contextmanager
def taylorseer(
    pipe: DiffusionPipeline, num_inference_steps: int, interval: int = 4, order: int = 4, first_enhance: int = 2
) -> Iterator[None]:
    """TaylorSeer as published for DiT (Liu et al., ICCV 2025, arXiv 2503.06923): forecasts by finite differences.

    Own code after the repository Shenyi-Z/TaylorSeer, ``TaylorSeer-DiT``, which has a DiT of its own and can't be
    installed: the same sites (output of attention and feed-forward before the gate), schedule, differences and order
    (those of the first steps too: no difference is taken before step ``first_enhance - 1``). The defaults are its
    recommended ones. It needs nothing of DiT but its modules' names; factors are kept in the model's dtype, as there.

    Args:
        interval: of computed steps after the first ones.
        order: of the Taylor polynomial; 0 reuses the last output, and with ``first_enhance=1`` is ``static_interval``.
        first_enhance: steps at the start that are computed; there it is 2.

    Raises:
        ValueError: a setting out of range.
    """
    _in_range(interval=(interval, 1, math.inf), order=(order, 0, 16), first_enhance=(first_enhance, 1, math.inf))
    with _watched(pipe, num_inference_steps) as run:
        for module in _modules(pipe.transformer):
            forecast = _TaylorForecast(module.forward, run, interval, order, first_enhance)
            run.on_start.append(forecast.reset)
            module.forward = forecast
        yield


class _TaylorForecast:
    """The forward of one module: its output, or the polynomial through its last computed outputs.

    ``F(s) = Σ_i Δ^i (s − c)^i / i!`` at step ``s`` after the last computed step ``c``, with ``Δ^0`` the output there
    and ``Δ^{i+1} = (Δ^i − Δ^i at the computed step before) / (steps between the two)``.
    """

    def __init__(self, forward: Callable, run: _Run, interval: int, order: int, first_enhance: int):
        self._forward, self._run = forward, run
        self._interval, self._order, self._first = interval, order, first_enhance - 1
        self.reset()

    def reset(self) -> None:
        self._factors: list[torch.Tensor] = []
        self._computed_at = 0

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        step = self._run.step
        since = step - self._computed_at
        if step > self._first and (step - self._first) % self._interval:
            return sum(factor * (since**i / math.factorial(i)) for i, factor in enumerate(self._factors))
        factors = [self._forward(*args, **kwargs)]
        if step >= self._first:
            for before in self._factors[: self._order]:
                factors.append((factors[-1] - before) / since)
        self._factors, self._computed_at = factors, step
        return factors[0]


@contextmanager
def diffusers_taylorseer(
    pipe: DiffusionPipeline, num_inference_steps: int, interval: int = 5, order: int = 1, warmup: int = 3
) -> Iterator[None]:
    """diffusers' own TaylorSeer, ``TaylorSeerCacheConfig``, with its own schedule.

    It needed: patterns that match DiT's attention and feed-forward (the default ones match no module, silently), a
    cache context at every step, its hooks reset between runs, and the factors in the model's dtype (BF16 by default).
    It computes steps 0 to ``warmup - 1``, forecasts the next one, then computes every ``interval``-th.

    Raises:
        ValueError: a setting out of range.
    """
    _in_range(interval=(interval, 1, math.inf), order=(order, 0, 16), warmup=(warmup, 1, math.inf))
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        disable_cache_before_step=warmup,
        taylor_factors_dtype=pipe.transformer.dtype,
        cache_identifiers=[rf"transformer_blocks\.\d+\.({'|'.join(COMPONENTS)})"],
    )
    with _diffusers_cache(pipe, num_inference_steps, apply_taylorseer_cache, lambda _: config):
        yield


@contextmanager
def diffusers_taylorseer_lite(
    pipe: DiffusionPipeline, num_inference_steps: int, interval: int = 5, order: int = 1, warmup: int = 3
) -> Iterator[None]:
    """diffusers' TaylorSeer-Lite: forecasts the model's last layer only, with the schedule of ``diffusers_taylorseer``.

    It needed, besides what that needed: patterns for DiT, since ``use_lite_mode`` would look for ``proj_out``, which is
    ``proj_out_2`` here, find none, and still let every block return zeros at the steps in between.

    Raises:
        ValueError: a setting out of range.
    """
    _in_range(interval=(interval, 1, math.inf), order=(order, 0, 16), warmup=(warmup, 1, math.inf))
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        disable_cache_before_step=warmup,
        taylor_factors_dtype=pipe.transformer.dtype,
        cache_identifiers=["proj_out_2"],
        skip_predict_identifiers=[r"transformer_blocks\.\d+"],
    )
    with _diffusers_cache(pipe, num_inference_steps, apply_taylorseer_cache, lambda _: config):
        yield


# --- diffusers' others -----------------------------------------------------------------------------------------------


@contextmanager
def pyramid_attention_broadcast(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    skip_range: int = 2,
    timesteps: tuple[float, float] = (100, 800),
) -> Iterator[None]:
    """diffusers' Pyramid Attention Broadcast (Zhao et al. 2024, arXiv 2408.12588): attention only, at an interval.

    It needed: the timestep, which DiT's pipelines don't tell (``current_timestep_callback``), and its hooks reset
    between runs, without which a run reuses what the run before left. DiT has spatial attention only.

    Args:
        skip_range: every how many steps attention is computed.
        timesteps: the open interval of timesteps in which it may be reused; the default is diffusers'.

    Raises:
        ValueError: a skip range below 1.
    """
    _in_range(skip_range=(skip_range, 1, math.inf))

    def config(run: _Run) -> PyramidAttentionBroadcastConfig:
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip_range,
            spatial_attention_timestep_skip_range=timesteps,
            current_timestep_callback=lambda: run.timestep,
        )

    with _diffusers_cache(pipe, num_inference_steps, apply_pyramid_attention_broadcast, config):
        yield


@contextmanager
def first_block_cache(pipe: DiffusionPipeline, num_inference_steps: int, threshold: float = 0.05) -> Iterator[None]:
    """diffusers' First-Block-Cache (ParaAttention): the first block tells whether the others are computed.

    It needed: a cache context at every step, without which it raises, and its hooks reset between runs. DiT's
    ``BasicTransformerBlock`` is in diffusers' registry already, and returns a tensor, which the hooks can deal with.

    Args:
        threshold: of the mean absolute change of the first block's residual, relative to its mean absolute value.

    Raises:
        ValueError: a negative threshold.
    """
    _in_range(threshold=(threshold, 0, math.inf))
    config = FirstBlockCacheConfig(threshold)
    with _diffusers_cache(pipe, num_inference_steps, apply_first_block_cache, lambda _: config):
        yield


@contextmanager
def mag_cache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    threshold: float = 0.06,
    max_skip_steps: int = 3,
    retention_ratio: float = 0.2,
    calibration_images: int = 8,
    guidance_scale: float = 4.0,
) -> Iterator[None]:
    """diffusers' MagCache (Ma et al. 2025, arXiv 2506.09045): skips while the residual's magnitude is predictable.

    It needed: the ratios of magnitudes of this model and sampler, which its own calibration measures in one run of
    full compute but only prints, so that they are read from its state before it forgets them; and its hooks reset
    between runs, which it does itself only after complete ones.

    Args:
        threshold, max_skip_steps, retention_ratio: of ``MagCacheConfig``.
        calibration_images, guidance_scale: of the run that it is calibrated on; once per model and sampler.

    Raises:
        ValueError: a setting out of range.
    """
    _in_range(
        threshold=(threshold, 0, math.inf),
        max_skip_steps=(max_skip_steps, 1, math.inf),
        retention_ratio=(retention_ratio, 0, 1),
        calibration_images=(calibration_images, 1, math.inf),
    )

    def measure(draw: Callable[[], None]) -> list[float]:
        # At the configured last step it would print the ratios and drop them.
        config = MagCacheConfig(calibrate=True, num_inference_steps=num_inference_steps + 1)
        with _diffusers_cache(pipe, num_inference_steps, apply_mag_cache, lambda _: config):
            draw()
            head = pipe.transformer.transformer_blocks[0]._diffusers_hook.get_hook(_MAG_CACHE_LEADER_BLOCK_HOOK)
            return list(head.state_manager.get_state().calibration_ratios)

    ratios = _calibrate(pipe, num_inference_steps, guidance_scale, calibration_images, "MagCache", measure)
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip_steps,
        retention_ratio=retention_ratio,
        num_inference_steps=num_inference_steps,
        mag_ratios=ratios,
    )
    with _diffusers_cache(pipe, num_inference_steps, apply_mag_cache, lambda _: config):
        yield


@contextmanager
def sea_cache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    threshold: float = 0.25,
    residual_order: int = 1,
    max_consecutive_cached: int = 2,
    power_exp: float = 3.0,
) -> Iterator[None]:
    """diffusers' SeaCache (arXiv 2602.18993): skips while the latents, denoised by a Wiener filter, change little.

    It needed: ``raw_vision_callback``, which gives the latents as one frame each, and the step and its σ in the cache
    context, all without which it computes everything. It is made for flow matching: latents and σ are those of the
    flow-matching path with the same signal-to-noise ratio, for which its filter is the same.

    Args:
        threshold: of the accumulated relative change.
        residual_order, max_consecutive_cached, power_exp: of ``SeaCacheConfig``.

    Raises:
        ValueError: a setting out of range, of ``SeaCacheConfig``.
    """

    def config(run: _Run) -> SeaCacheConfig:
        def latents(_module: torch.nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
            batch = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            sigma = _flow_sigma(pipe.scheduler, run.timestep)
            scale = math.sqrt((1 - sigma) ** 2 + sigma**2)  # 1 / (√ᾱ + √(1−ᾱ))
            return list((batch * scale)[:, :, None].unbind())

        return SeaCacheConfig(
            threshold=threshold,
            residual_order=residual_order,
            max_consecutive_cached=max_consecutive_cached,
            power_exp=power_exp,
            raw_vision_callback=latents,
        )

    with _diffusers_cache(pipe, num_inference_steps, apply_sea_cache, config):
        yield


@contextmanager
def faster_cache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    uncond_skip_range: int = 5,
    uncond_timesteps: tuple[float, float] = (-1, 641),
    attention_skip_range: int = 2,
    attention_timesteps: tuple[float, float] = (-1, 681),
    attention_weight: float = 0.5,
    alpha: float = 1.1,
) -> Iterator[None]:
    """diffusers' FasterCache (Lv et al. 2024, arXiv 2410.19355): leaves out the unconditional half of the batch.

    It needed: ``class_labels`` among the inputs that it halves, or else it raises; DiT's first input by its name; the
    two halves swapped on their way in and out, since it takes the second one for the conditional one and DiT's
    pipelines put that first; the format ``BCHW``, the timestep, and its hooks reset between runs. It needs guidance.

    Args:
        uncond_skip_range: every how many steps the unconditional half is computed; it is forecast from its difference
            to the conditional one's low and high frequencies.
        attention_skip_range: every how many steps attention is computed, while that half is left out.
        uncond_timesteps, attention_timesteps: the open intervals of timesteps in which that is done.
        attention_weight: of the last change of attention, in forecasting it.
        alpha: by which the differences grow at every step.

    Raises:
        ValueError: a skip range below 1; at the first step, a batch without guidance.
    """
    _in_range(uncond_skip_range=(uncond_skip_range, 1, math.inf))
    _in_range(attention_skip_range=(attention_skip_range, 1, math.inf))

    def config(run: _Run) -> FasterCacheConfig:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=attention_skip_range,
            spatial_attention_timestep_skip_range=attention_timesteps,
            unconditional_batch_skip_range=uncond_skip_range,
            unconditional_batch_timestep_skip_range=uncond_timesteps,
            alpha_low_frequency=alpha,
            alpha_high_frequency=alpha,
            attention_weight_callback=lambda _: attention_weight,
            tensor_format="BCHW",
            current_timestep_callback=lambda: run.timestep,
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
        )

    def apply(transformer: torch.nn.Module, config: FasterCacheConfig) -> None:
        with _quiet("diffusers.hooks.faster_cache"):  # of being experimental
            apply_faster_cache(transformer, config)

    with _diffusers_cache(pipe, num_inference_steps, apply, config) as run:
        forward = pipe.transformer.forward

        def swapped(hidden_states, timestep=None, class_labels=None, **kwargs):
            null, half = pipe.transformer.config.num_embeds_ada_norm, len(class_labels) // 2
            if run.step == 0 and (len(class_labels) % 2 or not bool((class_labels[half:] == null).all())):
                raise ValueError("FasterCache needs guidance: the batch has no unconditional second half")
            hidden_states, class_labels = hidden_states.roll(half, 0), class_labels.roll(half, 0)
            output = forward(hidden_states=hidden_states, timestep=timestep, class_labels=class_labels, **kwargs)
            if isinstance(output, tuple):
                return (output[0].roll(half, 0),)
            output.sample = output.sample.roll(half, 0)
            return output

        pipe.transformer.forward = swapped
        yield


# --- cache-dit and SmoothCache ---------------------------------------------------------------------------------------


@contextmanager
def dbcache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    Fn_compute_blocks: int = 8,
    Bn_compute_blocks: int = 0,
    residual_diff_threshold: float = 0.08,
    max_warmup_steps: int = 8,
    max_continuous_cached_steps: int = -1,
    taylorseer_order: int = 0,
) -> Iterator[None]:
    """cache-dit's DBCache: the first blocks tell whether the middle ones are computed, the last ones always are.

    It needed: its adapter for the bare transformer, since it knows pipelines by name and ``EmbeddedDiTPipeline`` isn't
    one of them; that one brings the patched forward which DiT needs (``DiTPatchFunctor``: the unpatched one looks into
    ``transformer_blocks[0].norm1``, which the cached blocks don't have); its context made anew at every run, and its
    log silenced.

    Args:
        Fn_compute_blocks, Bn_compute_blocks, residual_diff_threshold, max_warmup_steps, max_continuous_cached_steps:
            of ``DBCacheConfig``; -1 is no limit.
        taylorseer_order: of ``TaylorSeerCalibratorConfig``, which forecasts the middle blocks' residual; 0 is none.

    Raises:
        ValueError: a setting out of range; more first and last blocks than there are.
        ImportError: no cache-dit.
    """
    blocks = len(pipe.transformer.transformer_blocks)
    _in_range(
        Fn_compute_blocks=(Fn_compute_blocks, 1, blocks - 1),
        Bn_compute_blocks=(Bn_compute_blocks, 0, blocks - 1 - Fn_compute_blocks),
        residual_diff_threshold=(residual_diff_threshold, 0, math.inf),
        max_warmup_steps=(max_warmup_steps, 0, math.inf),
        max_continuous_cached_steps=(max_continuous_cached_steps, -1, math.inf),
        taylorseer_order=(taylorseer_order, 0, 16),
    )
    cache_dit = _package("cache_dit", "cache-dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=Fn_compute_blocks,
        Bn_compute_blocks=Bn_compute_blocks,
        residual_diff_threshold=residual_diff_threshold,
        max_warmup_steps=max_warmup_steps,
        max_continuous_cached_steps=max_continuous_cached_steps,
        num_inference_steps=num_inference_steps,
        enable_separate_cfg=False,
    )
    calibrator = None
    if taylorseer_order:
        # DiT's blocks return one tensor: no encoder states to forecast.
        calibrator = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=taylorseer_order, enable_encoder_calibrator=False
        )
    with _quiet("CACHE_DIT"), _watched(pipe, num_inference_steps) as run:
        transformer = pipe.transformer
        cache_dit.enable_cache(transformer, cache_config=config, calibrator_config=calibrator)
        run.on_start.append(lambda: cache_dit.refresh_context(transformer, num_inference_steps=num_inference_steps))
        try:
            yield
        finally:
            cache_dit.disable_cache(transformer)


@contextmanager
def dbcache_taylorseer(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    Fn_compute_blocks: int = 8,
    Bn_compute_blocks: int = 0,
    residual_diff_threshold: float = 0.08,
    max_warmup_steps: int = 8,
    max_continuous_cached_steps: int = -1,
    taylorseer_order: int = 1,
) -> Iterator[None]:
    """``dbcache`` with cache-dit's TaylorSeer calibrator.

    Raises:
        ValueError: as ``dbcache``; an order below 1.
        ImportError: no cache-dit.
    """
    _in_range(taylorseer_order=(taylorseer_order, 1, 16))
    with dbcache(
        pipe,
        num_inference_steps,
        Fn_compute_blocks,
        Bn_compute_blocks,
        residual_diff_threshold,
        max_warmup_steps,
        max_continuous_cached_steps,
        taylorseer_order,
    ):
        yield


@contextmanager
def smoothcache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    threshold: float = 0.18,
    lookahead: int = 3,
    components: tuple[str, ...] = COMPONENTS,
    calibration_images: int = 8,
    guidance_scale: float = 4.0,
) -> Iterator[None]:
    """SmoothCache (Liu et al. 2024, arXiv 2411.10510): one schedule a component, from errors measured beforehand.

    ``dit-smoothcache``'s ``SmoothCacheHelper`` reuses. Its wheel comes without the calibration of its repository
    (Roblox/SmoothCache), so that this is own code for the same measure and the same scan. It needed: the feed-forward
    as a component (its helper for diffusers wraps ``attn1`` only, the one for the original DiT, and the paper, both),
    its counters reset between runs, and silence: it prints a line for every module at every step.

    Args:
        threshold: of the relative L1 change, averaged over blocks, up to which an output is reused.
        lookahead: most steps in a row that reuse.
        components: of a block: ``attn1``, ``ff``.
        calibration_images, guidance_scale: of the run that it is calibrated on; once per model and sampler.

    Raises:
        ValueError: a setting out of range.
        ImportError: no dit-smoothcache.
    """
    _in_range(
        threshold=(threshold, 0, math.inf),
        lookahead=(lookahead, 1, num_inference_steps),
        calibration_images=(calibration_images, 1, math.inf),
    )
    if not components or set(components) - set(COMPONENTS):
        raise ValueError(f"components={components!r} is out of range: some of {', '.join(COMPONENTS)}")
    with contextlib.redirect_stdout(None):  # it prints what else it would like to have
        package = _package("SmoothCache", "dit-smoothcache")

    def measure(draw: Callable[[], None]) -> dict[str, list[list[float]]]:
        with _watched(pipe, num_inference_steps):
            seen = [_ChangeMeter(module, lookahead) for module in _modules(pipe.transformer)]
            draw()
        count = len(COMPONENTS)
        return {name: _mean_changes([meter.changes for meter in seen[i::count]]) for i, name in enumerate(COMPONENTS)}

    what = f"SmoothCache {lookahead}"
    changes = _calibrate(pipe, num_inference_steps, guidance_scale, calibration_images, what, measure)
    schedule = {name: smoothcache_schedule(changes[name], threshold, num_inference_steps) for name in components}
    with _watched(pipe, num_inference_steps) as run:
        helper = package.SmoothCacheHelper(pipe.transformer, BasicTransformerBlock, list(components), schedule)
        helper.enable()
        for block in pipe.transformer.transformer_blocks:
            for component in components:
                module = getattr(block, component)
                module.forward = _silent(module.forward)
        run.on_start.append(helper.reset_state)
        try:
            yield
        finally:
            helper.disable()


class _ChangeMeter:
    """Relative L1 change of a module's output against the ones 1, 2, ... ``lookahead`` steps before.

    ``changes[k][s]`` is ``‖o_{s+k+1} − o_s‖₁ / ‖o_{s+k+1}‖₁``, over the whole batch, as SmoothCache measures it.
    """

    def __init__(self, module: torch.nn.Module, lookahead: int):
        self.changes: list[list[float]] = [[] for _ in range(lookahead)]
        self._seen: list[torch.Tensor] = []
        self._forward = module.forward
        module.forward = self

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        output = self._forward(*args, **kwargs)
        now = output.float()
        for before, changes in zip(self._seen, self.changes, strict=False):
            changes.append(((now - before).norm(p=1) / now.norm(p=1)).item())
        self._seen = [now, *self._seen][: len(self.changes)]
        return output


def _mean_changes(changes: list[list[list[float]]]) -> list[list[float]]:
    """The mean over modules of their ``changes[k][s]``."""
    return [torch.tensor(rows).mean(0).tolist() for rows in zip(*changes, strict=True)]


def smoothcache_schedule(changes: list[list[float]], threshold: float, num_inference_steps: int) -> list[int]:
    """SmoothCache's schedule: 1 for a step that is computed, 0 for one that reuses.

    From a computed step on, as many steps reuse as the change against it allows, tried from the most to one; the first
    and the last step are always computed.

    Args:
        changes: ``[k][s]``, the mean change from step ``s`` to step ``s + k + 1``.
        threshold: up to which a step reuses.
        num_inference_steps: of the schedule.
    """
    schedule, step = [1] * num_inference_steps, 0
    while step < num_inference_steps:
        allowed = (
            k + 1 for k in reversed(range(len(changes))) if step < len(changes[k]) and changes[k][step] <= threshold
        )
        reused = next(allowed, 0)
        schedule[step + 1 : step + 1 + reused] = [0] * reused
        step += reused + 1
    schedule[-1] = 1
    return schedule


def _silent(forward: Callable) -> Callable:
    """What ``forward`` prints itself is dropped."""

    def silent(*args, **kwargs):
        with contextlib.redirect_stdout(None):
            return forward(*args, **kwargs)

    return silent


ADAPTERS: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "static interval": static_interval,
    "TaylorSeer": taylorseer,
    "TaylorSeer, diffusers": diffusers_taylorseer,
    "TaylorSeer-Lite, diffusers": diffusers_taylorseer_lite,
    "PAB": pyramid_attention_broadcast,
    "First-Block-Cache": first_block_cache,
    "MagCache": mag_cache,
    "SeaCache": sea_cache,
    "FasterCache": faster_cache,
    "DBCache": dbcache,
    "DBCache + TaylorSeer": dbcache_taylorseer,
    "SmoothCache": smoothcache,
}
"""Context managers ``(pipe, num_inference_steps, **settings)`` by name."""

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "static interval": [
        {"interval": interval, "from_end": from_end} for interval in (2, 3, 4, 5, 6) for from_end in (False, True)
    ],
    "TaylorSeer": [
        {"interval": interval, "order": order}
        for interval, order in ((2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 4), (5, 2), (6, 2))
    ],
    "TaylorSeer, diffusers": [
        {"interval": interval, "order": order} for interval in (2, 3, 4, 5, 6) for order in (1, 2)
    ],
    "TaylorSeer-Lite, diffusers": [
        {"interval": interval, "order": order} for interval in (2, 3, 4, 5, 6) for order in (1, 2)
    ],
    "PAB": [
        {"skip_range": skip_range, "timesteps": timesteps}
        for timesteps in ((100, 800), (0, 1000))
        for skip_range in (2, 3, 4, 6, 8)
    ],
    "First-Block-Cache": [{"threshold": threshold} for threshold in (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15)],
    "MagCache": [
        {"threshold": threshold, "max_skip_steps": skip, "retention_ratio": retention}
        for threshold, skip, retention in (
            (0.01, 2, 0.2),
            (0.02, 3, 0.2),
            (0.06, 3, 0.2),
            (0.12, 4, 0.2),
            (0.01, 2, 0.1),
            (0.02, 3, 0.1),
            (0.06, 3, 0.1),
            (0.12, 4, 0.1),
            (0.24, 5, 0.1),
            (0.24, 6, 0.04),
        )
    ],
    "SeaCache": [
        {"threshold": threshold, "max_consecutive_cached": cached, "residual_order": order}
        for order in (1, 0)
        for threshold, cached in ((0.05, 2), (0.1, 2), (0.25, 2), (0.5, 3), (1.0, 4))
    ],
    "FasterCache": [
        {"uncond_skip_range": uncond, "uncond_timesteps": (-1, most), "attention_timesteps": (-1, most)}
        for most in (641, 1000)
        for uncond in (2, 3, 5, 8)
    ],
    "DBCache": [
        {"Fn_compute_blocks": blocks, "residual_diff_threshold": threshold, "max_warmup_steps": 4}
        for blocks, thresholds in ((1, (0.05, 0.06, 0.08, 0.12, 0.2)), (8, (0.08, 0.12, 0.2, 0.3, 0.4)))
        for threshold in thresholds
    ],
    "DBCache + TaylorSeer": [
        {
            "Fn_compute_blocks": blocks,
            "residual_diff_threshold": threshold,
            "max_warmup_steps": 4,
            "max_continuous_cached_steps": cached,
        }
        for blocks, pairs in (
            (1, ((0.05, 2), (0.08, 2), (0.12, 3), (0.2, 3), (0.2, 5))),
            (8, ((0.08, 2), (0.12, 3), (0.2, 3), (0.4, 4), (0.4, 8))),
        )
        for threshold, cached in pairs
    ],
    "SmoothCache": [
        {"threshold": threshold, "lookahead": lookahead}
        for threshold, lookahead in (
            (0.08, 3),
            (0.1, 3),
            (0.12, 3),
            (0.15, 3),
            (0.18, 3),
            (0.25, 3),
            (0.35, 3),
            (0.35, 5),
            (0.6, 5),
            (0.6, 7),
        )
    ],
}
"""Settings worth comparing, by name: each method's own knobs, from little saved to much, as far as it goes.

On the embedded model (50 steps) from about 1.2 to 5 times fewer MACs; PAB up to 1.5, since feed-forward is always
computed, FasterCache up to 2.1, since the conditional half is. To SmoothCache and MagCache belongs a ``guidance_scale``
too, the comparison's own, for their calibration.
"""

UNUSABLE: dict[str, str] = {
    "TaylorSeer, diffusers' defaults": (
        "its default patterns end in `attn` and match no module of DiT's, so that it silently does nothing: images and "
        "MACs of a run are those of the untouched pipeline (use 'TaylorSeer, diffusers')"
    ),
    "Text KV cache": (
        "diffusers' TextKVCache hooks NucleusMoEImageTransformerBlock only, and DiT has no text: images and MACs of a "
        "run are those of the untouched pipeline"
    ),
    "DBPrune": (
        "cache-dit 1.5.3's PrunedBlocks_Pattern_3_4_5 calls its own _process_block_outputs with one argument too many, "
        "so that the first step of a run raises TypeError"
    ),
}
"""Methods that can't run on DiT: why, and the check that found it (``tests/test_peers.py`` repeats it)."""
