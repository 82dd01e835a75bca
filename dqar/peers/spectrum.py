"""Spectrum: the last hidden states as Chebyshev polynomials over the steps, fitted by ridge regression."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from diffusers import DiffusionPipeline

from dqar.peers.linear import Weights, forecast_blocks
from dqar.peers.rival import Rival
from dqar.peers.shared import check_range, watched


@contextmanager
def spectrum(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    window: float = 2.0,
    growth: float = 0.75,
    first: int = 5,
    degree: int = 4,
    ridge: float = 0.1,
    mix: float = 1.0,
) -> Iterator[None]:
    """Spectrum (Han et al., CVPR 2026, arXiv 2603.01623): a global fit over all computed steps, no local expansion.

    Own code after the repository hanjq17/Spectrum, which has forward passes of its own for other models: the same site
    (the hidden states behind the last block), basis, regression, schedule and defaults. There features and fit are
    BF16; here the features keep the model's dtype, and the fit is float64: a forecast is a weighted sum of the computed
    features, and the weights depend on the steps alone. They report 4.79 times less time on FLUX.1.

    Args:
        window, growth: after the first steps every ``⌊window⌋``-th is computed; ``window`` grows by ``growth`` with
            each.
        first: steps at the start that are computed.
        degree: of the polynomials.
        ridge: λ of the regression.
        mix: share of the polynomials; the rest is the line through the last two computed steps, which their code
            recommends up to 0.5, and the paper doesn't have.

    Raises:
        ValueError: a setting out of range.
    """
    check_range(
        window=(window, 1, math.inf),
        growth=(growth, 0, math.inf),
        first=(first, 1, math.inf),
        degree=(degree, 0, 16),
        ridge=(ridge, 1e-12, math.inf),
        mix=(mix, 0, 1),
    )
    computed = spectrum_steps(num_inference_steps, window, growth, first)
    with watched(pipe, num_inference_steps) as run:
        weights = spectrum_weights(num_inference_steps, computed, degree, ridge, mix)
        forecast_blocks(pipe.transformer, run, weights, residual=False)
        yield


def spectrum_steps(num_inference_steps: int, window: float, growth: float, first: int) -> list[int]:
    """The steps that are computed."""
    computed = list(range(min(first, num_inference_steps)))
    while (step := computed[-1] + math.floor(window)) < num_inference_steps:
        computed.append(step)
        window += growth
    return computed


def spectrum_weights(
    num_inference_steps: int, computed: Sequence[int], degree: int, ridge: float, mix: float
) -> Weights:
    """Of every skipped step, the weights of the computed ones before it, ascending in ``computed``."""
    weights = {}
    for step in sorted(set(range(num_inference_steps)) - set(computed)):
        before = [c for c in computed if c < step]
        # All steps of a run span [-1, 1], as in their code: the polynomials leave the interval they are fitted in.
        times = np.array([*before, step]) * 2 / num_inference_steps - 1
        basis = np.polynomial.chebyshev.chebvander(times, degree)
        seen, ahead = basis[:-1], basis[-1]
        fitted = mix * ahead @ np.linalg.solve(seen.T @ seen + ridge * np.eye(degree + 1), seen.T)
        weights[step] = dict(zip(before, (fitted + (1 - mix) * _line(before, step)).tolist(), strict=True))
    return weights


def _line(before: Sequence[int], step: int) -> np.ndarray:
    """The weights of the line through the last two steps; of a single one, it is constant."""
    weights = np.zeros(len(before))
    weights[-1] = 1.0
    if len(before) > 1:
        slope = (step - before[-1]) / (before[-1] - before[-2])
        weights[-2:] = -slope, 1 + slope
    return weights


RIVALS = (
    Rival(
        "Spectrum",
        keeps="the last hidden states, as Chebyshev polynomials over the steps",
        source="Han et al., CVPR 2026, arXiv 2603.01623",
        adapter=spectrum,
        sweep=(
            *(
                {"window": window, "growth": growth, "first": first, "mix": 0.5}
                for window, growth, first in (
                    (1.0, 0.04, 5),
                    (1.0, 0.1, 5),
                    (2.0, 0.0, 2),
                    (2.0, 0.045, 1),
                    (3.0, 0.0, 4),
                    (4.0, 0.0, 5),
                    (6.0, 0.0, 5),
                    (7.0, 0.0, 3),
                )
            ),
            {"window": 2.0, "growth": 0.1, "first": 5, "mix": 1.0},
            {"window": 2.0, "growth": 0.75, "first": 5, "mix": 1.0},  # their own
        ),
    ),
)
