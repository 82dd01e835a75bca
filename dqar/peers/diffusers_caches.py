"""diffusers' own caches on DiT, which has neither their cache contexts nor their resets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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

from dqar.families import CONDITIONS, family, null_class
from dqar.peers.rival import Rival
from dqar.peers.shared import COMPONENTS, Progress, calibrate, check_range, quiet, watched


@contextmanager
def _diffusers_cache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    apply: Callable[[torch.nn.Module, Any], None],
    make_config: Callable[[Progress], Any],
) -> Iterator[Progress]:
    """One of diffusers' caches, with what ``CacheMixin`` and the newer pipelines would do for it, which DiT's don't.

    That is: its hooks are reset at the start of every run, and at every step they are given a cache context, with the
    step, and with the noise level σ of the flow-matching path that has the step's signal-to-noise ratio.
    """
    with watched(pipe, num_inference_steps) as run:
        apply(pipe.transformer, make_config(run))
        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.invalidate_child_registries_cache()

        def set_context():
            context = CacheContext(
                "inference",
                step_index=run.step,
                num_inference_steps=num_inference_steps,
                timestep=run.timestep,
                sigma=flow_sigma(pipe.scheduler, run.timestep),
            )
            _set_cache_context(pipe.transformer, context)

        run.on_start.append(registry.reset_stateful_hooks)
        run.on_step.append(set_context)
        yield run


def flow_sigma(scheduler: Any, timestep: float) -> float:
    """σ in ``x / (√ᾱ + √(1−ᾱ)) = (1 − σ) x0 + σ ε``: a variance-preserving step as one of flow matching."""
    alpha_bar = float(scheduler.alphas_cumprod[round(timestep)])
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    return noise / (signal + noise)


@contextmanager
def diffusers_taylorseer(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    interval: int = 5,
    order: int = 1,
    warmup: int = 3,
    lite: bool = False,
) -> Iterator[None]:
    """diffusers' own TaylorSeer, ``TaylorSeerCacheConfig``, with its own schedule.

    It needed: patterns that match DiT's attention and feed-forward (the default ones match no module, silently), a
    cache context at every step, its hooks reset between runs, and the factors in the model's dtype (BF16 by default).
    It computes steps 0 to ``warmup - 1``, forecasts the next one, then computes every ``interval``-th.

    Args:
        interval, order, warmup: of ``TaylorSeerCacheConfig``, in other words.
        lite: forecasts the model's last layer only. It needed patterns, too: ``use_lite_mode`` would look for
            ``proj_out``, which is ``proj_out_2`` in DiT, find none, and still let every block return zeros at the
            steps in between.

    Raises:
        ValueError: a setting out of range.
    """
    check_range(interval=(interval, 1, math.inf), order=(order, 0, 16), warmup=(warmup, 1, math.inf))
    blocks = r"transformer_blocks\.\d+"
    last_layer = rf"^{family(pipe.transformer).last_layer}$"
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        disable_cache_before_step=warmup,
        taylor_factors_dtype=pipe.transformer.dtype,
        cache_identifiers=[last_layer if lite else rf"{blocks}\.({'|'.join(COMPONENTS)})"],
        skip_predict_identifiers=[blocks] if lite else None,
    )
    with _diffusers_cache(pipe, num_inference_steps, apply_taylorseer_cache, lambda _: config):
        yield


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
    check_range(skip_range=(skip_range, 1, math.inf))

    def config(run: Progress) -> PyramidAttentionBroadcastConfig:
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
    check_range(threshold=(threshold, 0, math.inf))
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
    check_range(
        threshold=(threshold, 0, math.inf),
        max_skip_steps=(max_skip_steps, 1, math.inf),
        retention_ratio=(retention_ratio, 0, 1),
        calibration_images=(calibration_images, 1, math.inf),
    )

    def measure(draw: Callable[[], object]) -> list[float]:
        # At the configured last step it would print the ratios and drop them.
        config = MagCacheConfig(calibrate=True, num_inference_steps=num_inference_steps + 1)
        with _diffusers_cache(pipe, num_inference_steps, apply_mag_cache, lambda _: config):
            draw()
            head = pipe.transformer.transformer_blocks[0]._diffusers_hook.get_hook(_MAG_CACHE_LEADER_BLOCK_HOOK)
            return list(head.state_manager.get_state().calibration_ratios)

    ratios = calibrate(pipe, num_inference_steps, guidance_scale, calibration_images, "MagCache", measure)
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

    def config(run: Progress) -> SeaCacheConfig:
        def latents(_module: torch.nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
            batch = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            sigma = flow_sigma(pipe.scheduler, run.timestep)
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

    It needed: ``class_labels`` among the inputs that it halves, or else it raises; the first input by its name; of DiT
    the two halves swapped on their way in and out, since it takes the second one for the conditional one and DiT's
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
    check_range(uncond_skip_range=(uncond_skip_range, 1, math.inf))
    check_range(attention_skip_range=(attention_skip_range, 1, math.inf))

    def config(run: Progress) -> FasterCacheConfig:
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
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", *CONDITIONS],
        )

    def apply(transformer: torch.nn.Module, config: FasterCacheConfig) -> None:
        with quiet("diffusers.hooks.faster_cache"):  # of being experimental
            apply_faster_cache(transformer, config)

    with _diffusers_cache(pipe, num_inference_steps, apply, config) as run:
        forward, cond_first = pipe.transformer.forward, family(pipe.transformer).branch_order[0] == "cond"

        def swapped(hidden_states, **kwargs):
            half = len(hidden_states) // 2
            if run.step == 0 and not _guided(pipe.transformer, hidden_states, kwargs):
                raise ValueError("FasterCache needs guidance: the batch has no unconditional second half")
            if not cond_first:
                return forward(hidden_states=hidden_states, **kwargs)
            kwargs["class_labels"] = kwargs["class_labels"].roll(half, 0)
            output = forward(hidden_states=hidden_states.roll(half, 0), **kwargs)
            if isinstance(output, tuple):
                return (output[0].roll(half, 0),)
            output.sample = output.sample.roll(half, 0)
            return output

        pipe.transformer.forward = swapped
        yield


def _guided(transformer: torch.nn.Module, latents: torch.Tensor, named: dict[str, Any]) -> bool:
    """Whether the batch has both branches: null classes behind the labels, or, of captions, the same latents twice."""
    half = len(latents) // 2
    if (labels := named.get("class_labels")) is not None:
        return len(labels) % 2 == 0 and bool((labels[half:] == null_class(transformer)).all())
    return len(latents) % 2 == 0 and torch.equal(latents[:half], latents[half:])


_INTERVALS = tuple({"interval": interval, "order": order} for interval in (2, 3, 4, 5, 6) for order in (1, 2))
RIVALS = (
    Rival(
        "TaylorSeer, diffusers",
        keeps="attention and feed-forward of every block",
        source="diffusers' TaylorSeerCacheConfig",
        adapter=diffusers_taylorseer,
        sweep=_INTERVALS,
    ),
    Rival(
        "TaylorSeer-Lite, diffusers",
        keeps="the model's last layer",
        source="diffusers' TaylorSeerCacheConfig",
        adapter=partial(diffusers_taylorseer, lite=True),
        sweep=_INTERVALS,
    ),
    Rival(
        "PAB",
        keeps="attention",
        source="Pyramid Attention Broadcast, Zhao et al. 2024, arXiv 2408.12588; diffusers",
        adapter=pyramid_attention_broadcast,
        # Up to 1.5 times fewer MACs: feed-forward is always computed.
        sweep=tuple(
            {"skip_range": skip_range, "timesteps": timesteps}
            for timesteps in ((100, 800), (0, 1000))
            for skip_range in (2, 3, 4, 6, 8)
        ),
    ),
    Rival(
        "First-Block-Cache",
        keeps="all blocks but the first",
        source="ParaAttention; diffusers",
        adapter=first_block_cache,
        sweep=tuple({"threshold": threshold} for threshold in (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.15)),
        decides_by_batch=True,
    ),
    Rival(
        "MagCache",
        keeps="all blocks",
        source="Ma et al. 2025, arXiv 2506.09045; diffusers",
        adapter=mag_cache,
        sweep=tuple(
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
        ),
        calibration_images=8,
    ),
    Rival(
        "SeaCache",
        keeps="all blocks",
        source="arXiv 2602.18993; diffusers",
        adapter=sea_cache,
        sweep=tuple(
            {"threshold": threshold, "max_consecutive_cached": cached, "residual_order": order}
            for order in (1, 0)
            for threshold, cached in ((0.05, 2), (0.1, 2), (0.15, 2), (0.2, 2), (0.25, 2), (0.5, 3), (1.0, 4))
        ),
        decides_by_batch=True,
        strong=True,
    ),
    Rival(
        "FasterCache",
        keeps="the unconditional branch, and attention",
        source="Lv et al. 2024, arXiv 2410.19355; diffusers",
        adapter=faster_cache,
        # Up to 2.1 times fewer MACs: the conditional half is always computed.
        sweep=tuple(
            {"uncond_skip_range": uncond, "uncond_timesteps": (-1, most), "attention_timesteps": (-1, most)}
            for most in (641, 1000)
            for uncond in (2, 3, 5, 8)
        ),
    ),
    Rival(
        "TaylorSeer, diffusers' defaults",
        keeps="nothing",
        source="diffusers' TaylorSeerCacheConfig",
        unusable=(
            "its default patterns end in `attn` and match no module of DiT's, so that it silently does nothing: images "
            "and MACs of a run are those of the untouched pipeline (use 'TaylorSeer, diffusers')"
        ),
    ),
    Rival(
        "Text KV cache",
        keeps="nothing",
        source="diffusers' TextKVCacheConfig",
        unusable=(
            "diffusers' TextKVCache hooks NucleusMoEImageTransformerBlock only, and DiT has no text: images and MACs "
            "of a run are those of the untouched pipeline"
        ),
    ),
)
