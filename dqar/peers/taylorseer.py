"""TaylorSeer as published for DiT: module outputs forecast by finite differences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from dqar.peers.rival import Rival
from dqar.peers.shared import Progress, block_modules, check_range, watched


@contextmanager
def taylorseer(
    pipe: DiffusionPipeline, num_inference_steps: int, interval: int = 4, order: int = 4, first_enhance: int = 2
) -> Iterator[None]:
    """TaylorSeer as published for DiT (Liu et al., ICCV 2025, arXiv 2503.06923): forecasts by finite differences.

    Own code after the repository Shenyi-Z/TaylorSeer, ``TaylorSeer-DiT``, which has a DiT of its own and can't be
    installed: the same sites (output of attention and feed-forward before the gate), schedule, differences and order
    (those of the first steps too: no difference is taken before step ``first_enhance - 1``). The defaults are its
    recommended ones. It needs nothing of DiT but its modules' names; factors are kept in the model's dtype, as there.

    Args:
        interval: of computed steps after the first ones.
        order: of the Taylor polynomial; 0 reuses the last output, and with ``first_enhance=1`` is ``static_interval``.
        first_enhance: steps at the start that are computed; there it is 2.

    Raises:
        ValueError: a setting out of range.
    """
    check_range(interval=(interval, 1, math.inf), order=(order, 0, 16), first_enhance=(first_enhance, 1, math.inf))
    with watched(pipe, num_inference_steps) as run:
        forecast_modules(pipe.transformer, run, interval, order, first_enhance, _power)
        yield


Basis = Callable[[int, int], float]
"""``(i, x)``: what a forecast ``x`` steps ahead multiplies the ``i``-th difference by: a polynomial of degree ``i``."""


def forecast_modules(
    transformer: torch.nn.Module, run: Progress, interval: int, order: int, first_enhance: int, basis: Basis
) -> None:
    """Attention and feed-forward of every block, computed at TaylorSeer's steps and forecast at the others."""
    for module in block_modules(transformer):
        forecast = _Forecast(module.forward, run, interval, order, first_enhance, basis)
        run.on_start.append(forecast.reset)
        module.forward = forecast


def _power(i: int, x: int) -> float:
    return x**i


class _Forecast:
    """The forward of one module: its output, or the polynomial through its last computed outputs.

    ``F(s) = Σ_i Δ^i basis(i, s − c) / i!`` at step ``s`` after the last computed step ``c``, with ``Δ^0`` the output
    there and ``Δ^{i+1} = (Δ^i − Δ^i at the computed step before) / (steps between the two)``.
    """

    def __init__(self, forward: Callable, run: Progress, interval: int, order: int, first_enhance: int, basis: Basis):
        self._forward, self._run, self._basis = forward, run, basis
        self._interval, self._order, self._first = interval, order, first_enhance - 1
        self.reset()

    def reset(self) -> None:
        self._factors: list[torch.Tensor] = []
        self._computed_at = 0

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        step = self._run.step
        since = step - self._computed_at
        if step > self._first and (step - self._first) % self._interval:
            terms = (f * (self._basis(i, since) / math.factorial(i)) for i, f in enumerate(self._factors))
            return functools.reduce(torch.add, terms)
        factors = [self._forward(*args, **kwargs)]
        if step >= self._first:
            for before in self._factors[: self._order]:
                factors.append((factors[-1] - before) / since)
        self._factors, self._computed_at = factors, step
        return factors[0]


RIVALS = (
    Rival(
        "TaylorSeer",
        keeps="attention and feed-forward of every block",
        source="Liu et al., ICCV 2025, arXiv 2503.06923",
        adapter=taylorseer,
        sweep=(
            *(
                {"interval": interval, "order": order}
                for interval, order in ((2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 4), (5, 2), (6, 2))
            ),
            # As many computed steps as 2 and 3 times fewer MACs allow, of 50.
            {"interval": 3, "order": 3, "first_enhance": 12},
            {"interval": 4, "order": 4, "first_enhance": 4},
        ),
        strong=True,
    ),
)
