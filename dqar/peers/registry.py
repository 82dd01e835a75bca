"""Every rival by its name: how it is put on a pipeline, and the settings that it is compared at.

Each runs its own published or library code wherever that can be made to run on DiT; its docstring says whose code runs
and what it needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from dqar.peers.cache_dit import dbcache, dbcache_taylorseer
from dqar.peers.diffusers_caches import (
    diffusers_taylorseer,
    diffusers_taylorseer_lite,
    faster_cache,
    first_block_cache,
    mag_cache,
    pyramid_attention_broadcast,
    sea_cache,
)
from dqar.peers.smoothcache import smoothcache
from dqar.peers.static import static_interval
from dqar.peers.taylorseer import taylorseer


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
