import pytest
import torch
from helpers import draw
from plain import reference

from dqar.peers import l2p
from dqar.peers.l2p import l2p_weights, mean_products
from dqar.peers.registry import Peer
from dqar.peers.shared import watched

STEPS = 12


def test_the_weights_are_those_of_a_least_squares_fit():
    torch.manual_seed(0)
    outputs = torch.randn(8, 500, dtype=torch.float64)
    weights = l2p_weights(mean_products(outputs), (0, 2, 3, 6))
    assert {step: list(row) for step, row in weights.items()} == {1: [0], 4: [0, 2, 3], 5: [0, 2, 3], 7: [0, 2, 3, 6]}
    for step, row in weights.items():
        fitted = torch.linalg.lstsq(outputs[list(row)].T, outputs[step][:, None]).solution.flatten()
        torch.testing.assert_close(torch.tensor(list(row.values()), dtype=torch.float64), fitted, rtol=1e-4, atol=1e-5)


def test_outputs_that_are_sums_of_earlier_ones_are_forecast_exactly():
    torch.manual_seed(0)
    outputs = torch.randn(3, 100, dtype=torch.float64)
    outputs = torch.stack([*outputs, 2 * outputs[2] - 0.5 * outputs[0]])
    row = l2p_weights(mean_products(outputs), (0, 1, 2))[3]
    assert list(row.values()) == pytest.approx([-0.5, 0.0, 2.0], abs=1e-4)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_it_is_fitted_to_the_guided_outputs_of_full_computation(pipe, guidance):
    pipe.transformer.double()
    outputs = []

    def look(_step, compute):
        outputs.append(compute())
        return outputs[-1]

    with torch.no_grad():
        reference(pipe, output=look, guidance=guidance)
    cond, uncond = torch.stack(outputs).chunk(2, dim=1)
    expected = (uncond + guidance * (cond - uncond)).flatten(1)
    seen = l2p.guided_outputs(pipe, STEPS, guidance, lambda: draw(pipe, steps=STEPS, guidance=guidance))
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
    with watched(pipe, STEPS):
        pass  # nothing is left behind that would refuse another peer


def test_computing_every_step_draws_bit_identical_images(pipe):
    untouched = draw(pipe, steps=STEPS)
    settings = (("speedup", 1.0), ("calibration_images", 2), ("guidance_scale", 3.0))
    with Peer("L2P", settings).attach(pipe, STEPS):
        assert torch.equal(draw(pipe, steps=STEPS), untouched)
