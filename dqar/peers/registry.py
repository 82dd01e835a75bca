"""Every rival by its name, and how one of them is put on a pipeline.

Each runs its own published or library code wherever that can be made to run on DiT; its docstring says whose code runs
and what it needed.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from dqar.peers import (
    budcache,
    cache_dit,
    diffusers_caches,
    hicache,
    l2p,
    lemica,
    smoothcache,
    spectrum,
    static,
    taylorseer,
)
from dqar.peers.rival import Rival

_FILES = (static, taylorseer, diffusers_caches, cache_dit, smoothcache, hicache, spectrum, l2p, lemica, budcache)
ALL_RIVALS: dict[str, Rival] = {rival.name: rival for file in _FILES for rival in file.RIVALS}
"""By name, with those that can't run on DiT."""
RIVALS = {name: rival for name, rival in ALL_RIVALS.items() if not rival.unusable}


@dataclass(frozen=True)
class Peer:
    """A rival caching method with its settings."""

    name: str
    """A key of ``RIVALS``."""
    settings: tuple[tuple[str, Any], ...] = ()
    """The adapter's keyword arguments, such as ``(("interval", 3), ("order", 2))``."""

    @property
    def rival(self) -> Rival:
        """What is known of the method.

        Raises:
            ValueError: an unknown method, or one that can't run on DiT.
        """
        rival = ALL_RIVALS.get(self.name)
        if rival is None:
            raise ValueError(f"peer {self.name!r} is unknown: choose one of {', '.join(RIVALS)}")
        if rival.unusable:
            raise ValueError(f"peer {self.name!r} can't run on DiT: {rival.unusable}")
        return rival

    def attach(self, pipe: DiffusionPipeline, num_inference_steps: int) -> AbstractContextManager[Any]:
        """Puts the method on ``pipe.transformer`` for any number of runs of ``num_inference_steps`` steps.

        Afterwards the pipeline is as before and draws bit-identical images.

        Raises:
            ValueError: an unknown method or setting, or a value out of range; a pipeline with other hooks on it.
            ImportError: the method's package isn't installed.
        """
        adapter, settings = self.rival.adapter, dict(self.settings)
        assert adapter is not None
        accepted = list(inspect.signature(adapter).parameters)[2:]
        if unknown := sorted(set(settings) - set(accepted)):
            raise ValueError(f"setting {unknown[0]!r} of {self.name!r} is unknown: choose from {', '.join(accepted)}")
        return adapter(pipe, num_inference_steps, **settings)
