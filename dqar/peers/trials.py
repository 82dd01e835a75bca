"""Trial runs on calibration noise: the images when given steps are computed and the others reuse the blocks' residual.

LeMiCa and BudCache choose their steps by such runs, and draw like them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dqar.peers.linear import forecast_blocks, reuse_weights
from dqar.peers.shared import Progress, watched

SWEEP = tuple({"speedup": x} for x in (1.25, 1.55, 2.0, 2.05, 2.6, 3.1, 4.1, 5.6))
"""Settings of both, a little beyond the budgets of the comparison; 2.05: with a decoder."""


@contextmanager
def residual_reuse(pipe: DiffusionPipeline, num_inference_steps: int, computed: Collection[int]) -> Iterator[Progress]:
    """Steps that aren't ``computed`` reuse what all blocks added at the last one that was; step 0 is computed."""
    with watched(pipe, num_inference_steps) as run:
        weights = reuse_weights(num_inference_steps, computed)
        forecast_blocks(pipe.transformer, run, weights, residual=True)
        yield run


class Trials:
    """The images ``[N, ...]`` of full computation, and of runs that skip steps.

    Args:
        pipe: that draws.
        num_inference_steps: of a run.
        draw: a run, always with the same noise; its images.
    """

    def __init__(self, pipe: DiffusionPipeline, num_inference_steps: int, draw: Callable[[], torch.Tensor]):
        self._pipe, self._steps, self._draw = pipe, num_inference_steps, draw
        self._outputs: list[Any] = []
        with pipe.transformer.register_forward_hook(lambda _module, _args, output: self._outputs.append(output)):
            self.full = draw()

    def images(self, computed: Collection[int]) -> torch.Tensor:
        """The images ``[N, ...]`` of a run that computes these steps.

        Up to the first skipped step the model sees what it saw in full computation, so that its outputs are taken from
        there; only the last of these steps runs, for its residual.
        """
        skipped = set(range(self._steps)) - set(computed)
        recorded = min(skipped, default=1) - 1
        with residual_reuse(self._pipe, self._steps, computed) as run:
            forward = self._pipe.transformer.forward

            def replayed(*args, **kwargs):
                return self._outputs[run.step] if run.step < recorded else forward(*args, **kwargs)

            self._pipe.transformer.forward = replayed
            return self._draw()
