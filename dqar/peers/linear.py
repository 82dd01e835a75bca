"""Skipped steps as weighted sums of computed ones: what L2P, Spectrum, LeMiCa and BudCache have in common.

They differ in what is summed (the model's output, its last hidden states, or what all blocks add), in the weights, and
in which steps they compute. All of that is known before a run begins.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dqar.peers.shared import Progress

Weights = Mapping[int, Mapping[int, float]]
"""Of every skipped step: the weight of each computed step before it."""


def number_computed(num_inference_steps: int, speedup: float) -> int:
    """The most steps that may be computed for ``speedup`` times fewer, and at least one."""
    return max(1, int(num_inference_steps / speedup + 1e-9))


def spread_steps(num_inference_steps: int, computed: int, first: int, last: int) -> tuple[int, ...]:
    """``computed`` steps: the ``first`` and the ``last`` ones, and evenly spread ones in between.

    Where there are too few for that, the first ones come first.
    """
    computed = min(computed, num_inference_steps)
    first = min(first, computed)
    last = min(last, computed - first)
    between, gap = computed - first - last, num_inference_steps - first - last
    middle = (first + (2 * i + 1) * gap // (2 * between) for i in range(between))
    return (*range(first), *middle, *range(num_inference_steps - last, num_inference_steps))


def reuse_weights(num_inference_steps: int, computed: Collection[int]) -> Weights:
    """Every skipped step is the last computed one."""
    skipped = set(range(num_inference_steps)) - set(computed)
    return {step: {max(c for c in computed if c < step): 1.0} for step in skipped}


class _Sum:
    """What the computed steps of a run gave, and its weighted sums."""

    def __init__(self, run: Progress, weights: Weights):
        self._run, self._weights, self._kept = run, weights, dict[int, torch.Tensor]()
        run.on_start.append(self._kept.clear)

    @property
    def skips(self) -> bool:
        """Whether this step is one of those that aren't computed."""
        return self._run.step in self._weights

    def keep(self, value: torch.Tensor) -> None:
        self._kept[self._run.step] = value

    def value(self) -> torch.Tensor:
        terms = (w * self._kept[step] for step, w in self._weights[self._run.step].items())
        return functools.reduce(torch.add, terms)


def forecast_output(transformer: torch.nn.Module, run: Progress, weights: Weights) -> None:
    """At the skipped steps the model doesn't run, and its output is the weighted sum of computed ones."""
    outputs, forward = _Sum(run, weights), transformer.forward

    @functools.wraps(forward)
    def forecast(*args, **kwargs):
        if outputs.skips:
            sample = outputs.value()
            return Transformer2DModelOutput(sample) if kwargs.get("return_dict", True) else (sample,)
        output = forward(*args, **kwargs)
        outputs.keep(output_of(output))
        return output

    transformer.forward = forecast


def output_of(returned: Any) -> torch.Tensor:
    """The output ``[B, ...]`` itself, of what a transformer's forward returns."""
    return returned[0] if isinstance(returned, tuple) else returned.sample


def forecast_blocks(transformer: Any, run: Progress, weights: Weights, residual: bool) -> None:
    """At the skipped steps no block runs; embeddings and last layer always do.

    The last hidden states are then the weighted sum of computed ones; with ``residual`` the first hidden states plus
    the weighted sum of what the blocks added.
    """
    blocks, results, entered = list(transformer.transformer_blocks), _Sum(run, weights), list[torch.Tensor]()

    def wrapped(forward, is_first: bool, is_last: bool):
        def forecast(hidden_states, *args, **kwargs):
            if is_first:
                entered[:] = [hidden_states]
            if results.skips:
                if not is_last:
                    return hidden_states
                return hidden_states + results.value() if residual else results.value()
            output = forward(hidden_states, *args, **kwargs)
            if is_last:
                results.keep(output - entered[0] if residual else output)
            return output

        return forecast

    for i, block in enumerate(blocks):
        block.forward = wrapped(block.forward, i == 0, i == len(blocks) - 1)
