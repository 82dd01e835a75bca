"""Promises against the binomial's closed form, SciPy's beta, and the share of images that keep them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import embedded_pipeline
from scipy.stats import beta

from dqar import PlanLadder, apply_dqar, extrapolation, fit_plan
from dqar.forecast.ladder import Promise
from dqar.forecast.promise import (
    RIDGES,
    STOPPING,
    calibrated,
    conformal_bound,
    images_needed,
    is_certain,
    ladder_from,
    ridge,
)
from dqar.policy import train_policy


def least_share(kept, images, confidence):
    """By Clopper and Pearson, from SciPy's beta."""
    return beta.ppf(1 - confidence, kept, images - kept + 1) if kept else 0.0


@pytest.mark.parametrize(("kept", "images"), [(0, 5), (1, 5), (95, 100), (100, 100), (297, 300)])
def test_the_least_share_that_is_certain_is_clopper_and_pearsons(kept, images):
    for confidence in (0.5, 0.9, 0.99):
        least = least_share(kept, images, confidence)
        assert not is_certain(kept, images, least + 1e-9, confidence)
        assert not kept or is_certain(kept, images, least - 1e-9, confidence)
        if kept == images:
            assert least == pytest.approx((1 - confidence) ** (1 / images))


@pytest.mark.parametrize(("share", "confidence", "number"), [(0.95, 0.9, 45), (0.99, 0.9, 230), (0.5, 0.5, 1)])
def test_so_many_images_are_needed(share, confidence, number):
    assert images_needed(share, confidence) == number
    assert least_share(number, number, confidence) >= share - 1e-9 > least_share(number - 1, number - 1, confidence)


def test_it_is_certain_where_the_least_share_is_as_large():
    for kept in range(41):
        certain = is_certain(kept, 40, 0.9, 0.9)
        assert certain == (least_share(kept, 40, 0.9) >= 0.9) and (certain or kept < 40)


def test_the_next_value_keeps_the_bound_as_often_as_said():
    """The bound's coverage over many draws is 1 - k / (n + 1), whatever the distribution."""
    generator = np.random.default_rng(0)
    for images, share in ((19, 0.95), (40, 0.9), (99, 0.95)):
        draws = generator.standard_cauchy((20_000, images + 1))
        covered = np.mean([row[-1] >= conformal_bound(row[:-1], share) for row in draws])
        exact = 1 - math.floor((images + 1) * (1 - share) + 1e-9) / (images + 1)
        assert covered == pytest.approx(exact, abs=0.006) and exact >= share - 1e-12
    assert conformal_bound(range(18), 0.95) == -math.inf and conformal_bound(range(19), 0.95) == 0


def test_a_promise_is_broken_as_rarely_as_said():
    """Among plans that keep it in just less than the share, one in ten is taken at 90 % confidence."""
    generator = np.random.default_rng(1)
    kept = generator.binomial(100, 0.9499, 20_000)
    shares = {number: least_share(number, 100, 0.9) for number in set(kept.tolist())}
    assert np.mean([shares[number] >= 0.95 for number in kept.tolist()]) <= 0.1


def draft(decibels, share, plans=3):
    """A ladder of plans that compute 8, 4 and 2 of 8 steps; the second feature tells how hard an image is."""
    computed = (range(8), (0, 2, 4, 6), (0, 4))[:plans]
    own = tuple(extrapolation(steps, range(8, 0, -1), 1.0, "model") for steps in computed)
    weights = tuple((0.0, 10.0, 60.0 - 10 * rung) for rung in range(plans))
    return PlanLadder(own, weights, math.inf, Promise(decibels, share, 0.9, 0, 0, 0.0, 1.0))


def drawn_alike(generator, images):
    """Features, and each plan's PSNR: ten times the second feature, less for sparser plans, and what no rule tells."""
    features = generator.standard_normal((images, 2))
    noise = 4 * generator.standard_normal((images, 1))
    return torch.tensor(features), 10 * features[:, 1:] + noise + np.array([70.0, 50.0, 40.0])


def test_a_ladder_breaks_its_promise_as_rarely_as_said():
    generator = np.random.default_rng(2)
    features, quality = drawn_alike(generator, 50_000)
    broken, speedups = [], []
    for _ in range(400):
        ladder = calibrated(draft(40.0, 0.9), *drawn_alike(generator, 80))
        rungs = ladder.choose(features)
        broken.append(np.mean(quality[range(len(rungs)), rungs] >= 40) < 0.9)
        speedups.append(ladder.promise.macs_speedup)
    assert np.mean(broken) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 400) and np.mean(speedups) > 1.5


def test_a_ladder_is_cheaper_than_its_cheapest_plan_alone_that_keeps_the_promise():
    told, quality = drawn_alike(np.random.default_rng(3), 300)
    ladder = calibrated(draft(40.0, 0.9), told, quality)
    assert [least_share(int((own >= 40).sum()), 300, 0.9) >= 0.9 for own in quality.T] == [True, False, False]
    assert ladder.promise.macs_speedup > 1.4 and ladder.promise.kept >= 0.9 * 300 and ladder.promise.expected >= 40
    rungs = ladder.choose(told)
    assert ladder.promise.kept == sum(quality[i, rung] >= 40 for i, rung in enumerate(rungs))
    assert ladder.promise.macs_speedup == pytest.approx(8 * 300 / sum((8, 4, 2)[rung] for rung in rungs))
    with pytest.raises(ValueError, match=r"no plan keeps the promise: with the densest, \d+ of 300 images have 90 dB"):
        calibrated(draft(90.0, 0.9), told, quality)


def test_the_rule_is_ridge_regression():
    """Against the closed form, and leaving each image out in turn."""
    generator = np.random.default_rng(0)
    features = np.c_[generator.standard_normal((30, 5)) * [1, 2, 3, 4, 5], np.full(30, 7.0)]  # one never varies
    values = features[:, 0] - features[:, 3] + generator.standard_normal(30) + 50

    def closed_form(x, y, strength, images=None):
        z = (x - features.mean(0)) / features.std(0).clip(1e-9)
        z, goal = z[:, :5], y - values.mean()
        return np.linalg.solve(z.T @ z + strength * 30 * np.eye(5), z.T @ goal)

    candidates = [closed_form(features, values, strength) for strength in RIDGES]
    own = ridge(features, values)
    scaled = own[:5] * features.std(0)[:5]
    assert own[5] == 0 and any(np.allclose(scaled, one) for one in candidates)
    assert own[-1] == pytest.approx(values.mean() - own[:-1] @ features.mean(0))
    noise = ridge(features, generator.standard_normal(30))  # nothing to tell: the strongest ridge
    assert np.abs(noise[:5] * features.std(0)[:5]).max() < 0.1


def test_the_rule_may_be_the_slides_network():
    """Layer by layer as PyTorch's own module, with its standardised features, and better where no line can tell."""
    generator = np.random.default_rng(4)

    def images(number):
        features, noise = generator.standard_normal((number, 3)) * [1, 5, 0.2] + 7, generator.standard_normal(number)
        hard = 10 * np.abs(features[:, 0] - 7) + noise
        return torch.tensor(features), np.c_[np.full(number, 90.0), 58 - hard, 52 - hard]

    told, quality = images(900)
    speedups = {}
    for rule in ("linear", "policy"):
        ladder = ladder_from(draft(40.0, 0.9).plans, told, quality, draft(40.0, 0.9).promise, rule)
        speedups[rule] = ladder.promise.macs_speedup
        others, better = images(2000)
        rungs = ladder.choose(others)
        assert np.mean(better[range(2000), rungs] >= 40) > 0.88
    assert speedups["policy"] > 1.2 * speedups["linear"]
    assert [len(layers) for layers in ladder.hidden] == [1, 2, 2] and len(ladder.hidden[1][0]) == 64
    first, stop = told[:300].float(), torch.arange(300) % STOPPING == STOPPING - 1
    good = torch.tensor(quality[:300, 1] >= 40).float()
    policy, _ = train_policy(first[~stop], good[~stop], first[stop], good[stop])
    alone = dataclasses.replace(
        ladder, plans=ladder.plans[:2], hidden=ladder.hidden[:2], weights=ladder.weights[:2], threshold=0.0
    )
    with torch.no_grad():
        assert alone.choose(others) == (policy(others.float()) >= 0.5).long().tolist()


def tame():
    pipe = embedded_pipeline()
    for parameter in pipe.transformer.parameters():
        parameter.data *= 0.4
    return pipe


def test_a_promise_is_fitted_from_calls_alone(tmp_path):
    pipe = tame()
    calls = [{"class_labels": [*range(i, i + 4)], "guidance_scale": 3.0} for i in range(6)]
    ladder = fit_plan(pipe, calls, 8, macs=4, promise=(30.0, 0.5), refinements=0)
    assert [len(plan.computed) for plan in ladder.plans] == [5, 4, 2]
    assert all(plan.provenance["calibration_images"] == 12 for plan in ladder.plans)
    assert ladder.promise.images == 8 and ladder.promise.kept >= 6 and ladder.promise.decibels == 30
    ladder.save(tmp_path / "ladder.json")
    decibels = []
    for number, call in enumerate(calls[3:], 3):  # those that it wasn't fitted on, from the noise that they had
        call = {**call, "num_inference_steps": 8, "output_type": "np"}
        reference = pipe(**call, generator=torch.Generator().manual_seed(number)).images
        with apply_dqar(pipe, PlanLadder.load(tmp_path / "ladder.json")) as session:
            planned = pipe(**call, generator=torch.Generator().manual_seed(number)).images
        assert len(session.summary()["plan_of_image"]) == 4 and "30 dB in 50%" in session.summary()["promise"]
        decibels += (-10 * np.log10(np.square(planned - reference).mean((1, 2, 3)))).tolist()
    assert sum(own >= 30 for own in decibels[4:]) == ladder.promise.kept
    by_network = fit_plan(pipe, calls, 8, macs=4, promise=(30.0, 0.5), refinements=0, rule="policy")
    assert by_network.plans == ladder.plans and len(by_network.hidden) == 3 and by_network.promise.images == 8
    by_network.save(tmp_path / "ladder.json")
    assert PlanLadder.load(tmp_path / "ladder.json") == by_network
    with pytest.raises(ValueError, match="rule='best' is not accepted"):
        fit_plan(pipe, calls, 8, macs=4, promise=(30.0, 0.5), rule="best")
    with pytest.raises(ValueError, match=r"with the densest, \d+ of 8 images have 200 dB"):
        fit_plan(pipe, calls, 8, macs=4, promise=(200.0, 0.5), refinements=0)


def test_what_cant_be_promised_is_said_before_anything_is_drawn():
    pipe, calls, forwards = tame(), [{"class_labels": [1, 2]}] * 4, []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    for promise, text in (
        ((45.0, 1.5), "share=1.5 is not accepted"),
        ((math.nan, 0.9), "decibels=nan is not accepted"),
        (45.0, "promise=45.0 is not accepted"),
    ):
        with pytest.raises(ValueError, match=text):
            fit_plan(pipe, calls, 8, macs=2, promise=promise)
    with pytest.raises(ValueError, match="target='converged' is not accepted: 'reference'"):
        fit_plan(pipe, calls, 8, macs=2, target="converged", promise=(45.0, 0.9))
    assert not forwards
    with pytest.raises(ValueError, match="calls='4 held-out images' is not accepted: 68 or more"):
        fit_plan(pipe, calls, 8, macs=2, promise=(45.0, 0.95))
