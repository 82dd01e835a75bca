"""cache-dit's DBCache, alone and with its calibrators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from diffusers import DiffusionPipeline

from dqar.checks import check_choice
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
    calibrator: str = "",
    taylorseer_order: int = 1,
    dmd_history: int = 6,
) -> Iterator[None]:
    """cache-dit's DBCache: the first blocks tell whether the middle ones are computed, the last ones always are.

    It needed: its adapter for the bare transformer, since it knows pipelines by name and ``EmbeddedDiTPipeline`` isn't
    one of them; that one brings the patched forward which DiT needs (``DiTPatchFunctor``: the unpatched one looks into
    ``transformer_blocks[0].norm1``, which the cached blocks don't have); its context made anew at every run, and its
    log silenced.

    A calibrator forecasts the middle blocks' residual, which is reused as it is otherwise:

    - ``TaylorSeer``: by finite differences.
    - ``DMD``: as a sum of exponentials over the steps, of each image by itself (dynamic mode decomposition, Schmid
      2010). It needs four residuals at even distances, and until then forecasts a line.
    - ``FoCa`` (Zheng et al. 2025, arXiv 2508.16211): by Heun's rule. The paper reports 5.5 times less time on
      FLUX.1-dev. cache-dit 1.5.3 takes the difference of the last two computed residuals for one step's, however many
      steps lie between them, so that its forecasts go too far.

    Args:
        Fn_compute_blocks, Bn_compute_blocks, residual_diff_threshold, max_warmup_steps, max_continuous_cached_steps:
            of ``DBCacheConfig``; -1 is no limit.
        calibrator: ``"TaylorSeer"``, ``"DMD"`` or ``"FoCa"``; ``""`` is none.
        taylorseer_order: of TaylorSeer.
        dmd_history: last residuals that DMD is fitted to, at most.

    Raises:
        ValueError: another calibrator; a setting out of range; more first and last blocks than there are.
        ImportError: no cache-dit.
    """
    check_choice("calibrator", calibrator, ("", "TaylorSeer", "DMD", "FoCa"))
    blocks = len(pipe.transformer.transformer_blocks)
    check_range(
        Fn_compute_blocks=(Fn_compute_blocks, 1, blocks - 1),
        Bn_compute_blocks=(Bn_compute_blocks, 0, blocks - 1 - Fn_compute_blocks),
        residual_diff_threshold=(residual_diff_threshold, 0, math.inf),
        max_warmup_steps=(max_warmup_steps, 0, math.inf),
        max_continuous_cached_steps=(max_continuous_cached_steps, -1, math.inf),
        taylorseer_order=(taylorseer_order, 1, 16),
        dmd_history=(dmd_history, 4, 64),
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
        settings = {"TaylorSeer": {"taylorseer_order": taylorseer_order}, "DMD": {"dmd_history": dmd_history}}
        make_config = getattr(cache_dit, f"{calibrator}CalibratorConfig")
        # DiT's blocks return one tensor: no encoder states to forecast.
        calibrator_config = make_config(enable_encoder_calibrator=False, **settings.get(calibrator, {}))
    with quiet("CACHE_DIT"), watched(pipe, num_inference_steps) as run:
        transformer = pipe.transformer
        cache_dit.enable_cache(transformer, cache_config=config, calibrator_config=calibrator_config)
        run.on_start.append(lambda: cache_dit.refresh_context(transformer, num_inference_steps=num_inference_steps))
        try:
            yield
        finally:
            cache_dit.disable_cache(transformer)


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
    *(
        Rival(
            f"DBCache + {calibrator}",
            keeps=f"the blocks between the first and the last, forecast{how}",
            source=source,
            adapter=partial(dbcache, calibrator=calibrator),
            sweep=_CALIBRATED,
            decides_by_batch=True,
        )
        for calibrator, how, source in (
            ("TaylorSeer", "", "cache-dit"),
            ("DMD", " by exponentials", "cache-dit; dynamic mode decomposition, Schmid 2010"),
            ("FoCa", " by Heun's rule", "Zheng et al. 2025, arXiv 2508.16211; cache-dit"),
        )
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
