"""cache-dit's DBCache, alone and with its TaylorSeer calibrator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline

from dqar.peers.rival import Rival
from dqar.peers.shared import check_range, load_package, quiet, watched


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
    check_range(
        Fn_compute_blocks=(Fn_compute_blocks, 1, blocks - 1),
        Bn_compute_blocks=(Bn_compute_blocks, 0, blocks - 1 - Fn_compute_blocks),
        residual_diff_threshold=(residual_diff_threshold, 0, math.inf),
        max_warmup_steps=(max_warmup_steps, 0, math.inf),
        max_continuous_cached_steps=(max_continuous_cached_steps, -1, math.inf),
        taylorseer_order=(taylorseer_order, 0, 16),
    )
    cache_dit = load_package("cache_dit", "cache-dit")
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
    with quiet("CACHE_DIT"), watched(pipe, num_inference_steps) as run:
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
    check_range(taylorseer_order=(taylorseer_order, 1, 16))
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


RIVALS = (
    Rival(
        "DBCache",
        keeps="the blocks between the first and the last",
        source="cache-dit",
        adapter=dbcache,
        sweep=tuple(
            {"Fn_compute_blocks": blocks, "residual_diff_threshold": threshold, "max_warmup_steps": 4}
            for blocks, thresholds in ((1, (0.05, 0.06, 0.08, 0.12, 0.2)), (8, (0.08, 0.12, 0.2, 0.3, 0.4)))
            for threshold in thresholds
        ),
        decides_by_batch=True,
    ),
    Rival(
        "DBCache + TaylorSeer",
        keeps="the blocks between the first and the last, forecast",
        source="cache-dit",
        adapter=dbcache_taylorseer,
        sweep=tuple(
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
        ),
        decides_by_batch=True,
    ),
    Rival(
        "DBPrune",
        keeps="blocks whose residual changes little",
        source="cache-dit 1.5.3",
        unusable=(
            "cache-dit 1.5.3's PrunedBlocks_Pattern_3_4_5 calls its own _process_block_outputs with one argument too "
            "many, so that the first step of a run raises TypeError"
        ),
    ),
)
