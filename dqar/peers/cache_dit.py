"""cache-dit's DBCache, alone and with its calibrators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffusers import DiffusionPipeline

from dqar.peers.rival import Rival
from dqar.peers.shared import check_range, load_package, quiet, watched


@contextmanager
def _dbcache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    calibrator: str,
    calibrator_settings: Mapping[str, Any],
    Fn_compute_blocks: int,
    Bn_compute_blocks: int,
    residual_diff_threshold: float,
    max_warmup_steps: int,
    max_continuous_cached_steps: int,
) -> Iterator[None]:
    """DBCache with the calibrator whose config has this name, ``TaylorSeer``, ``DMD`` or ``FoCa``; ``""`` is none."""
    blocks = len(pipe.transformer.transformer_blocks)
    check_range(
        Fn_compute_blocks=(Fn_compute_blocks, 1, blocks - 1),
        Bn_compute_blocks=(Bn_compute_blocks, 0, blocks - 1 - Fn_compute_blocks),
        residual_diff_threshold=(residual_diff_threshold, 0, math.inf),
        max_warmup_steps=(max_warmup_steps, 0, math.inf),
        max_continuous_cached_steps=(max_continuous_cached_steps, -1, math.inf),
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
    calibrator_config = None
    if calibrator:
        # DiT's blocks return one tensor: no encoder states to forecast.
        make_config = getattr(cache_dit, f"{calibrator}CalibratorConfig")
        calibrator_config = make_config(enable_encoder_calibrator=False, **calibrator_settings)
    with quiet("CACHE_DIT"), watched(pipe, num_inference_steps) as run:
        transformer = pipe.transformer
        cache_dit.enable_cache(transformer, cache_config=config, calibrator_config=calibrator_config)
        run.on_start.append(lambda: cache_dit.refresh_context(transformer, num_inference_steps=num_inference_steps))
        try:
            yield
        finally:
            cache_dit.disable_cache(transformer)


def dbcache(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    Fn_compute_blocks: int = 8,
    Bn_compute_blocks: int = 0,
    residual_diff_threshold: float = 0.08,
    max_warmup_steps: int = 8,
    max_continuous_cached_steps: int = -1,
) -> AbstractContextManager[None]:
    """cache-dit's DBCache: the first blocks tell whether the middle ones are computed, the last ones always are.

    It needed: its adapter for the bare transformer, since it knows pipelines by name and ``EmbeddedDiTPipeline`` isn't
    one of them; that one brings the patched forward which DiT needs (``DiTPatchFunctor``: the unpatched one looks into
    ``transformer_blocks[0].norm1``, which the cached blocks don't have); its context made anew at every run, and its
    log silenced.

    Args:
        Fn_compute_blocks, Bn_compute_blocks, residual_diff_threshold, max_warmup_steps, max_continuous_cached_steps:
            of ``DBCacheConfig``; -1 is no limit.

    Raises:
        ValueError: a setting out of range; more first and last blocks than there are.
        ImportError: no cache-dit.
    """
    return _dbcache(
        pipe,
        num_inference_steps,
        "",
        {},
        Fn_compute_blocks,
        Bn_compute_blocks,
        residual_diff_threshold,
        max_warmup_steps,
        max_continuous_cached_steps,
    )


def dbcache_taylorseer(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    Fn_compute_blocks: int = 8,
    Bn_compute_blocks: int = 0,
    residual_diff_threshold: float = 0.08,
    max_warmup_steps: int = 8,
    max_continuous_cached_steps: int = -1,
    taylorseer_order: int = 1,
) -> AbstractContextManager[None]:
    """``dbcache`` with cache-dit's TaylorSeer calibrator, which forecasts the middle blocks' residual.

    Raises:
        ValueError: as ``dbcache``; an order below 1.
        ImportError: no cache-dit.
    """
    check_range(taylorseer_order=(taylorseer_order, 1, 16))
    return _dbcache(
        pipe,
        num_inference_steps,
        "TaylorSeer",
        {"taylorseer_order": taylorseer_order},
        Fn_compute_blocks,
        Bn_compute_blocks,
        residual_diff_threshold,
        max_warmup_steps,
        max_continuous_cached_steps,
    )


def dbcache_dmd(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    Fn_compute_blocks: int = 8,
    Bn_compute_blocks: int = 0,
    residual_diff_threshold: float = 0.08,
    max_warmup_steps: int = 8,
    max_continuous_cached_steps: int = -1,
    dmd_history: int = 6,
) -> AbstractContextManager[None]:
    """``dbcache`` with cache-dit's DMD calibrator: the residual as a sum of exponentials over the steps.

    Dynamic mode decomposition (Schmid 2010) of the last computed residuals, of each image by itself. It needs four of
    them at even distances, and until then forecasts a line.

    Args:
        dmd_history: residuals that it is fitted to, at most.

    Raises:
        ValueError: as ``dbcache``; a history below 4.
        ImportError: no cache-dit.
    """
    check_range(dmd_history=(dmd_history, 4, 64))
    return _dbcache(
        pipe,
        num_inference_steps,
        "DMD",
        {"dmd_history": dmd_history},
        Fn_compute_blocks,
        Bn_compute_blocks,
        residual_diff_threshold,
        max_warmup_steps,
        max_continuous_cached_steps,
    )


def dbcache_foca(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    Fn_compute_blocks: int = 8,
    Bn_compute_blocks: int = 0,
    residual_diff_threshold: float = 0.08,
    max_warmup_steps: int = 8,
    max_continuous_cached_steps: int = -1,
) -> AbstractContextManager[None]:
    """``dbcache`` with cache-dit's FoCa calibrator (Zheng et al. 2025, arXiv 2508.16211): Heun's rule on the residual.

    FoCa's paper reports 5.5 times less time on FLUX.1-dev. cache-dit 1.5.3 takes the difference of the last two
    computed residuals for one step's, however many steps lie between them, so that its forecasts go too far.

    Raises:
        ValueError, ImportError: as ``dbcache``.
    """
    return _dbcache(
        pipe,
        num_inference_steps,
        "FoCa",
        {},
        Fn_compute_blocks,
        Bn_compute_blocks,
        residual_diff_threshold,
        max_warmup_steps,
        max_continuous_cached_steps,
    )


_CALIBRATED = tuple(
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
)
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
        sweep=_CALIBRATED,
        decides_by_batch=True,
    ),
    Rival(
        "DBCache + DMD",
        keeps="the blocks between the first and the last, forecast by exponentials",
        source="cache-dit; dynamic mode decomposition, Schmid 2010",
        adapter=dbcache_dmd,
        sweep=_CALIBRATED,
        decides_by_batch=True,
    ),
    Rival(
        "DBCache + FoCa",
        keeps="the blocks between the first and the last, forecast by Heun's rule",
        source="Zheng et al. 2025, arXiv 2508.16211; cache-dit",
        adapter=dbcache_foca,
        sweep=_CALIBRATED,
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
