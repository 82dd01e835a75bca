import math

import numpy as np
import pytest
import torch
from helpers import draw, embedded_pipeline
from plain import reference

from dqar.peers.registry import Peer
from dqar.peers.spectrum import spectrum_steps, spectrum_weights

STEPS = 12


def test_the_steps_of_the_repository_at_its_own_settings():
    """Its counters written out: every ⌊window⌋-th call after the first ones, and a window that grows with each."""

    def counted(steps, window, growth, first):
        computed, cached = [], 0
        for step in range(steps):
            actual = step < first or (cached + 1) % math.floor(window) == 0
            if step >= first and actual:
                window += growth
            cached = 0 if actual else cached + 1
            computed += [step] if actual else []
        return computed

    for window, growth, first in ((2, 0.75, 5), (2, 0.0, 5), (1.5, 0.25, 1), (4, 0.5, 3)):
        assert spectrum_steps(50, window, growth, first) == counted(50, window, growth, first)


@pytest.mark.parametrize("mix", [1.0, 0.5])
def test_a_run_equals_a_ridge_regression_in_plain_python(mix):
    history = {}

    def chebyshev(step):
        return [math.cos(k * math.acos(2 * step / STEPS - 1)) for k in range(4)]

    def hidden_states(step, _h, compute):
        if step in (0, 1, 2, 4, 6, 9):
            history[step] = compute()
            return history[step]
        x = np.array([chebyshev(s) for s in history])
        features = np.stack([h.numpy().ravel() for h in history.values()])
        coefficients = np.linalg.inv(x.T @ x + 0.2 * np.eye(4)) @ x.T @ features
        (s, a), (t, b) = list(history.items())[-2:]
        line = b + (step - t) / (t - s) * (b - a)
        return mix * torch.from_numpy(chebyshev(step) @ coefficients).reshape(b.shape) + (1 - mix) * line

    pipe = embedded_pipeline()
    pipe.transformer.double()
    settings = {"window": 2.0, "growth": 0.5, "first": 3, "degree": 3, "ridge": 0.2, "mix": mix}
    with Peer("Spectrum", tuple(settings.items())).attach(pipe, STEPS):
        drawn = draw(pipe, steps=STEPS)
    with torch.no_grad():
        torch.testing.assert_close(drawn, reference(pipe, blocks=hidden_states), rtol=1e-8, atol=1e-8)


def test_without_ridge_polynomials_of_its_degree_are_forecast_exactly():
    weights = spectrum_weights(20, [*range(5), 8], degree=3, ridge=1e-12, mix=1.0)
    for step, row in weights.items():
        for power in range(4):
            assert sum(w * c**power for c, w in row.items()) == pytest.approx(step**power, rel=1e-5)


def test_a_window_of_1_draws_bit_identical_images(pipe):
    untouched = draw(pipe, steps=STEPS)
    with Peer("Spectrum", (("window", 1.0), ("growth", 0.0))).attach(pipe, STEPS):
        assert torch.equal(draw(pipe, steps=STEPS), untouched)
