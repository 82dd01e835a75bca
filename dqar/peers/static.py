"""FORA: attention and feed-forward reused between evenly spread computed steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from dqar.peers.rival import Rival
from dqar.peers.shared import Progress, block_modules, check_range, watched


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
    check_range(interval=(interval, 1, math.inf))
    with watched(pipe, num_inference_steps) as run:
        for module in block_modules(pipe.transformer):
            module.forward = _reused(module.forward, run, num_inference_steps, interval, from_end)
        yield


def _reused(forward: Callable, run: Progress, num_inference_steps: int, interval: int, from_end: bool) -> Callable:
    kept: list[torch.Tensor] = []
    run.on_start.append(kept.clear)

    def reuse(*args, **kwargs):
        counted = num_inference_steps - 1 - run.step if from_end else run.step
        if not kept or counted % interval == 0:
            kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    return reuse


RIVALS = (
    Rival(
        "static interval",
        keeps="attention and feed-forward of every block",
        source="FORA, Selvaraju et al. 2024, arXiv 2407.01425",
        adapter=static_interval,
        sweep=tuple({"interval": n, "from_end": from_end} for n in (2, 3, 4, 5, 6) for from_end in (False, True)),
    ),
)
