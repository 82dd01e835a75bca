import itertools
import random

import pytest
import torch
from helpers import draw

from dqar.peers.budcache import search
from dqar.peers.linear import spread_steps
from dqar.peers.registry import Peer
from dqar.peers.trials import Trials

STEPS = 8


def distance_to(*best):
    """An error with a single minimum."""
    return lambda steps: 1e-3 * sum(abs(a - b) for a, b in zip(steps, best, strict=True))


def test_the_search_finds_the_best_of_all_choices():
    rng = random.Random(0)
    table = {(0, 1, *rest): rng.random() + 0.1 for rest in itertools.combinations(range(2, 12), 6)}
    best = search(table.__getitem__, 12, 8, annealing=400, climbing=200)
    assert best == min(table, key=table.__getitem__)


@pytest.mark.parametrize("annealing, climbing", [(300, 0), (1, 300)])
def test_annealing_and_climbing_each_find_the_bottom_of_a_valley(annealing, climbing):
    best = (0, 1, 5, 6, 11, 17, 18, 19)
    assert search(distance_to(*best), 20, 8, annealing, climbing) == best


def test_no_choice_is_asked_for_twice_and_not_more_than_allowed():
    asked = []

    def error(steps):
        asked.append(steps)
        return distance_to(0, 1, 2, 3, 4, 5, 6, 7)(steps)

    search(error, 30, 8, annealing=50, climbing=20)
    assert len(asked) == len(set(asked)) <= 1 + 50 + 20
    assert all(len(steps) == 8 and steps[:2] == (0, 1) and sorted(set(steps)) == list(steps) for steps in asked)


def test_where_there_is_nothing_to_choose_nothing_is_asked_for():
    assert search(None, 6, 6, annealing=9, climbing=9) == tuple(range(6))
    assert search(None, 6, 1, annealing=9, climbing=9) == (0,)


def test_the_chosen_steps_are_nearer_to_full_computation_than_evenly_spread_ones(pipe):
    trials = Trials(pipe, STEPS, lambda: draw(pipe, steps=STEPS))

    def error(steps):
        return (trials.images(steps) - trials.full).square().mean().item()

    chosen = search(error, STEPS, 4, annealing=20, climbing=20)
    everything = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), 3)]
    assert error(chosen) <= sorted(map(error, everything))[2] < error(spread_steps(STEPS, 4, 1, 0))


def test_computing_every_step_draws_bit_identical_images(pipe):
    untouched = draw(pipe, steps=STEPS)
    with Peer("BudCache", (("speedup", 1.0), ("calibration_images", 1))).attach(pipe, STEPS):
        assert torch.equal(draw(pipe, steps=STEPS), untouched)
