"""How δ of the policy's labels is chosen."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from dqar.measure import metrics
from dqar.studies import policy
from dqar.studies.reference import Reference

REAL = np.random.default_rng(0).normal(size=(400, 8))


def oracle(images, shift, errors=(0.0, 1e-6, 1e-5, 1e-3)):
    """Runs of 0, 10, 20 and 30 % of the sites; each moves all features by ``shift`` more, with these errors."""
    parts = [
        pd.DataFrame({"share": run / 10, "delta": run * 1e-3, "image": range(images), "mse": error}).assign(
            features=list(REAL[:images] + run * shift)
        )
        for run, error in enumerate(errors)
    ]
    table = pd.concat(parts, ignore_index=True)
    table.attrs["provenance"] = {"profile": {"model": "digits"}}
    return table


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    # Far from all runs' features, so that a distance grows by a known share of itself.
    moved = Reference(metrics.Gaussian.of(torch.tensor(REAL - 1)))
    monkeypatch.setattr(policy, "reference_of", lambda model, folder: moved)


@pytest.mark.parametrize("shift, accepted", [(0.001, 3e-3), (0.02, 2e-3), (0.04, 1e-3), (0.5, 1e-3)])
def test_the_largest_delta_is_taken_whose_images_are_as_near_to_the_test_data(shift, accepted):
    # Features moved by s are nearly (1 + s)^2 as far: 4 % more at 0.02, 8 % at 0.04, 12 % at 0.06.
    assert policy.calibrated_delta(oracle(400, shift)) == accepted


def test_fewer_images_than_features_have_no_distance_and_the_images_themselves_decide():
    few = oracle(7, 10.0)
    assert policy.accepted_runs(few).fd.isna().all()
    assert policy.calibrated_delta(few) == 2e-3  # 50 dB; the third run has 30
    assert policy.accepted_runs(oracle(8, 10.0)).fd.notna().all()


def test_a_deciders_lead_is_that_of_its_median_image_at_the_share_asked_for():
    rows = [
        ("output", name, wanted, image, 10 ** (-(level + 2 * image) / 10), reused)
        for name, runs in {"rule": [(0.1, 50), (0.3, 40)], "chance": [(0.15, 44), (0.35, 30)]}.items()
        for wanted, level in runs
        for reused in [wanted - 0.02 * (name == "rule")]  # less than was asked for
        for image in range(3)
    ]
    rows += [("kv", "rule", 0.1, image, 1e-9, 0.2) for image in range(3)]
    table = pd.DataFrame(rows, columns=["target", "method", "wanted", "image", "mse", "sites_reused"])
    # At 20 %: the rule's median image lies at 52 − 10 · 0.12 / 0.2 = 46 dB, chance's at 42.5; all images lead alike.
    assert policy.lead_at_share(table, "rule", "chance") == pytest.approx((3.5, 3.5, 3.5))
    assert policy.lead_at_share(table, "rule", "chance", 0.25) == pytest.approx((4.5, 4.5, 4.5))
    assert all(map(math.isnan, policy.lead_at_share(table, "rule", "oracle")))
    assert all(map(math.isnan, policy.lead_at_share(table, "rule", "chance", 0.5)))


def test_the_interval_of_a_correlation_draws_images_and_not_sites():
    rng = np.random.default_rng(0)
    entropy = rng.random(300)
    labels = pd.DataFrame({"image": np.arange(300) % 3, "entropy": entropy, "error": entropy + 0.3 * rng.random(300)})
    low, high = policy.correlation_interval(labels, "entropy", ())
    assert low < policy.partial_correlation(labels, "entropy", ()) < high
    doubled = pd.concat([labels, labels])  # twice the sites, of the same images
    assert policy.correlation_interval(doubled, "entropy", ()) == pytest.approx((low, high), abs=1e-3)
