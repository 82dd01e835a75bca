import pytest
import torch
from helpers import draw, embedded_pipeline
from plain import reference

from dqar.peers.linear import forecast_blocks, forecast_output, number_computed, reuse_weights, spread_steps
from dqar.peers.shared import watched

STEPS = 12
WEIGHTS = {3: {0: -0.5, 2: 1.5}, 4: {0: 0.25, 1: -1.0, 2: 1.75}, 8: {7: 1.0}}


def put_on(site, pipe, run, weights):
    if site == "output":
        forecast_output(pipe.transformer, run, weights)
    else:
        forecast_blocks(pipe.transformer, run, weights, residual=site == "residual")


@pytest.mark.parametrize("site", ["output", "hidden states", "residual"])
def test_a_run_with_weighted_sums_equals_one_in_plain_python(site):
    kept = {}

    def output(step, compute):
        if step in WEIGHTS:
            return sum(weight * kept[c] for c, weight in WEIGHTS[step].items())
        kept[step] = compute()
        return kept[step]

    def hidden_states(step, h, compute):
        return output(step, compute)

    def residual(step, h, compute):
        return h + output(step, lambda: compute() - h)

    pipe = embedded_pipeline()
    pipe.transformer.double()
    with watched(pipe, STEPS) as run:
        put_on(site, pipe, run, WEIGHTS)
        drawn = draw(pipe, steps=STEPS)
    ways = {
        "output": {"output": output},
        "hidden states": {"blocks": hidden_states},
        "residual": {"blocks": residual},
    }
    with torch.no_grad():
        torch.testing.assert_close(drawn, reference(pipe, **ways[site]), rtol=1e-9, atol=1e-9)
    assert set(kept) == set(range(STEPS)) - set(WEIGHTS)


@pytest.mark.parametrize("site", ["output", "hidden states", "residual"])
def test_without_skipped_steps_the_images_are_bit_identical(pipe, site):
    untouched = draw(pipe, steps=STEPS)
    with watched(pipe, STEPS) as run:
        put_on(site, pipe, run, {})
        assert torch.equal(draw(pipe, steps=STEPS), untouched)
    assert torch.equal(draw(pipe, steps=STEPS), untouched)


@pytest.mark.parametrize("as_object", [True, False])
def test_a_skipped_output_comes_in_the_form_that_is_asked_for(pipe, as_object):
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad(), watched(pipe, STEPS) as run:
        forecast_output(pipe.transformer, run, {1: {0: 2.0}})
        first, second = (
            pipe.transformer(x, timestep=torch.tensor([9, 9]), class_labels=labels, return_dict=as_object)
            for _ in range(2)
        )
    before, now = (returned.sample if as_object else returned[0] for returned in (first, second))
    assert torch.equal(now, 2 * before)


def test_steps_are_spread_evenly_between_the_first_and_the_last():
    assert spread_steps(10, 5, first=1, last=1) == (0, 2, 5, 7, 9)
    assert spread_steps(12, 12, first=3, last=1) == tuple(range(12))
    assert spread_steps(12, 4, first=3, last=1) == (0, 1, 2, 11)
    assert spread_steps(12, 2, first=3, last=1) == (0, 1)
    for computed in range(1, 51):
        for first, last in ((1, 0), (1, 1), (3, 4)):
            steps = spread_steps(50, computed, first, last)
            assert len(set(steps)) == computed and list(steps) == sorted(steps) and steps[0] == 0 and steps[-1] < 50


def test_a_speedup_is_of_at_least_so_many_fewer_steps():
    assert [number_computed(50, speedup) for speedup in (1, 1.25, 2, 2.1, 3, 60)] == [50, 40, 25, 23, 16, 1]


def test_reuse_takes_the_last_computed_step():
    assert reuse_weights(6, (0, 3)) == {1: {0: 1.0}, 2: {0: 1.0}, 4: {3: 1.0}, 5: {3: 1.0}}
