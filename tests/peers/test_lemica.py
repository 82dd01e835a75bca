import itertools
import random

import pytest
import torch
from helpers import draw, embedded_pipeline
from plain import reference

from dqar.peers.lemica import caching_errors, minimax_path
from dqar.peers.registry import Peer
from dqar.peers.trials import Trials, residual_reuse

STEPS = 8


def random_errors(seed, steps=9, longest=5, values=6):
    """Small whole numbers, so that many paths share their worst errors."""
    rng = random.Random(seed)
    edges = ((i, j) for i in range(steps) for j in range(i + 1, min(i + longest, steps) + 1))
    return {edge: float(rng.randrange(values)) for edge in edges}


def reuse(skipped):
    """Of the plain run: steps that add what the blocks added at the last step that is none of them."""
    kept = []

    def blocks(step, h, compute):
        if step not in skipped:
            kept[:] = [compute() - h]
        return h + kept[0]

    return blocks


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("computed", [2, 4, 6])
def test_no_path_of_the_same_length_has_lesser_errors(seed, computed):
    errors = random_errors(seed)

    def sorted_errors(path):
        return sorted((errors[edge] for edge in itertools.pairwise([*path, 9])), reverse=True)

    paths = [(0, *rest) for rest in itertools.combinations(range(1, 9), computed - 1)]
    least = min(sorted_errors(p) for p in paths if all(edge in errors for edge in itertools.pairwise([*p, 9])))
    path = minimax_path(errors, 9, computed)
    assert len(path) == computed and path[0] == 0 and sorted_errors(path) == least


def test_an_edge_weighs_what_its_reused_steps_do_to_the_image():
    pipe = embedded_pipeline()
    pipe.transformer.double()
    errors = caching_errors(Trials(pipe, STEPS, lambda: draw(pipe, steps=STEPS)), STEPS, longest=3)
    assert set(errors) == {(i, j) for i in range(STEPS) for j in range(i + 1, min(i + 3, STEPS) + 1)}
    with torch.no_grad():
        full = reference(pipe, steps=STEPS)
        for (i, j), error in errors.items():
            change = (reference(pipe, blocks=reuse(set(range(i + 1, j))), steps=STEPS) - full).abs().mean().item()
            assert error == pytest.approx(change, rel=1e-9, abs=1e-9) and (error > 0) == (j > i + 1)


def test_a_trial_draws_bit_for_bit_what_the_method_draws(pipe):
    trials = Trials(pipe, STEPS, lambda: draw(pipe, steps=STEPS))
    assert torch.equal(trials.full, draw(pipe, steps=STEPS))
    for computed in ((0,), (0, 1, 2, 5), (0, 2, 4, 6), range(STEPS)):
        with residual_reuse(pipe, STEPS, computed):
            drawn = draw(pipe, steps=STEPS)
        assert torch.equal(trials.images(computed), drawn)
        assert torch.equal(drawn, trials.full) == (len(computed) == STEPS)


def test_the_chosen_steps_reuse_what_all_blocks_added(pipe):
    pipe.transformer.double()
    calls, ran = [], []
    settings = (("speedup", 2.0), ("longest", 4), ("calibration_images", 2), ("guidance_scale", 3.0))
    with Peer("LeMiCa", settings).attach(pipe, STEPS):
        pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(len(calls)))
        pipe.transformer.transformer_blocks[0].attn1.register_forward_hook(lambda *_: ran.append(calls[-1]))
        drawn = draw(pipe, steps=STEPS)
    assert len(ran) == 4 and ran[0] == 0
    with torch.no_grad():
        plain = reference(pipe, blocks=reuse(set(range(STEPS)) - set(ran)), steps=STEPS)
    torch.testing.assert_close(drawn, plain, rtol=1e-9, atol=1e-9)


def test_computing_every_step_draws_bit_identical_images(pipe):
    untouched = draw(pipe, steps=STEPS)
    settings = (("speedup", 1.0), ("longest", 2), ("calibration_images", 1))
    with Peer("LeMiCa", settings).attach(pipe, STEPS):
        assert torch.equal(draw(pipe, steps=STEPS), untouched)


def test_steps_too_far_apart_to_be_measured_are_refused(pipe):
    settings = (("speedup", 4.0), ("longest", 3))
    with pytest.raises(ValueError, match="longest=3 is out of range: 2 computed steps reach 6 steps"):
        Peer("LeMiCa", settings).attach(pipe, STEPS).__enter__()
