import math

import pytest
import torch
from helpers import draw, embedded_pipeline
from plain import of_second_order, reference

from dqar.peers.hicache import scaled_hermite
from dqar.peers.registry import Peer

STEPS = 12


@pytest.mark.parametrize("contraction", [0.5, 0.8])
def test_the_basis_is_of_hermite_polynomials(contraction):
    def scaled(n, x):
        y = contraction * x
        return contraction**n * (1, 2 * y, 4 * y**2 - 2, 8 * y**3 - 12 * y)[n]

    for degree in range(4):
        for x in (1, 2, 5):
            assert scaled_hermite(contraction, degree, x) == pytest.approx(scaled(degree, x))


@torch.no_grad()
def test_a_run_equals_one_in_plain_python():
    s = 0.6
    pipe = embedded_pipeline()
    pipe.transformer.double()
    settings = (("interval", 3), ("order", 2), ("first_enhance", 2), ("contraction", s))
    with Peer("HiCache", settings).attach(pipe, STEPS):
        drawn = draw(pipe, steps=STEPS)
    forecast = of_second_order(lambda x: 2 * s**2 * x, lambda x: s**2 * (4 * (s * x) ** 2 - 2) / 2)
    torch.testing.assert_close(drawn, reference(pipe, forecast), rtol=1e-9, atol=1e-9)


def test_the_first_order_at_a_contraction_of_the_root_of_a_half_is_taylorseers(pipe):
    pipe.transformer.double()
    drawn = []
    for name, settings in (("TaylorSeer", {}), ("HiCache", {"contraction": math.sqrt(0.5)})):
        with Peer(name, (("interval", 3), ("order", 1), *settings.items())).attach(pipe, STEPS):
            drawn.append(draw(pipe, steps=STEPS))
    torch.testing.assert_close(*drawn, rtol=1e-9, atol=1e-9)
