"""What is known of a rival caching method: each file of this folder lists its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rival:
    """A caching method: how it is put on a pipeline, the settings worth comparing, and facts about it.

    Attributes:
        name: its own, with the library in it where two have the same method.
        keeps: what it reuses or forecasts, in words.
        source: paper or library.
        adapter: context manager ``(pipe, num_inference_steps, **settings)``; ``None`` where it can't run on DiT.
        sweep: settings of its own knobs, from little saved to much, as far as it goes. On the digits model (50 steps)
            they cover about 1.2 to 5 times fewer MACs, unless said otherwise.
        decides_by_batch: decides by what it sees, for a whole batch at once, so that small batches suit it better.
        calibration_images: that it draws for each sampler of 50 steps, at most, before it can draw by all of its sweep;
            with any, it takes the comparison's ``guidance_scale`` as a setting.
        strong: one of the best in a first look, so that it is compared under every spacing of the steps.
        unusable: why it can't run on DiT.
    """

    name: str
    keeps: str
    source: str
    adapter: Callable[..., AbstractContextManager[Any]] | None = None
    sweep: tuple[Mapping[str, Any], ...] = ()
    decides_by_batch: bool = False
    calibration_images: int = 0
    strong: bool = False
    unusable: str = ""
