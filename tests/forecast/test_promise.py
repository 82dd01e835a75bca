"""Promises against the binomial's closed form, SciPy's beta, and the share of images that keep them."""

import dataclasses
import math

import numpy as np
import pytest
from helpers import embedded_pipeline
from scipy.stats import beta

from dqar import extrapolation, fit_plan
from dqar.families import describe_model
from dqar.forecast.promise import conformal_bound, images_needed, keep_promise, least_share


@pytest.mark.parametrize(("kept", "images"), [(0, 5), (1, 5), (95, 100), (100, 100), (297, 300)])
def test_the_least_share_is_clopper_and_pearsons(kept, images):
    for confidence in (0.5, 0.9, 0.99):
        expected = beta.ppf(1 - confidence, kept, images - kept + 1) if kept else 0.0
        assert least_share(kept, images, confidence) == pytest.approx(expected, abs=1e-9)
        if kept == images:
            assert least_share(kept, images, confidence) == pytest.approx((1 - confidence) ** (1 / images))


@pytest.mark.parametrize(("share", "confidence", "number"), [(0.95, 0.9, 45), (0.99, 0.9, 230), (0.5, 0.5, 1)])
def test_so_many_images_are_needed(share, confidence, number):
    assert images_needed(share, confidence) == number
    assert least_share(number, number, confidence) >= share - 1e-9 > least_share(number - 1, number - 1, confidence)


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


def test_the_sparsest_plan_that_keeps_it_is_taken():
    pipe = embedded_pipeline()
    for parameter in pipe.transformer.parameters():
        parameter.data *= 0.4
    calls = [{"class_labels": [*range(i, i + 4)], "guidance_scale": 3.0} for i in range(5)]
    plan = fit_plan(pipe, calls[:1], 8, macs=2, refinements=0)
    timesteps, model = plan.timesteps, describe_model(pipe.transformer)
    every, poor = (extrapolation(own, timesteps, 3.0, model, 0) for own in (range(8), (0, 1)))
    promised = keep_promise(pipe, [poor, plan, every], calls[1:], 30, 0.8, 0.9)
    assert promised == plan and promised.provenance["promise"]["images"] == 16
    assert promised.provenance["promise"]["kept"] == 16 and promised.provenance["promise"]["expected"] > 30
    assert "PSNR >= 30 dB in 80% of images" in promised.provenance["promise"]["statement"]
    assert keep_promise(pipe, [poor, plan, every], calls[1:], 200, 0.8, 0.9) == every
    with pytest.raises(ValueError, match=r"no plan keeps the promise: with the densest, \d+ of 16"):
        keep_promise(pipe, [poor], calls[1:], 100, 0.8, 0.9)
    with pytest.raises(ValueError, match="16 images.* 45 or more"):
        keep_promise(pipe, [plan], calls[1:], 30, 0.95, 0.9)
    other = dataclasses.replace(poor, timesteps=[*timesteps[:-1], 0.5])
    with pytest.raises(ValueError, match="the same timesteps"):
        keep_promise(pipe, [plan, other], calls[1:])
