"""What ways to keep a promise cost, on made-up images whose quality is known."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import embedded_pipeline, image_pipeline

from dqar import apply_dqar, extrapolation
from dqar.families import describe_model
from dqar.figures.pareto import promises_in_words
from dqar.forecast.ladder import PlanLadder, Promise
from dqar.forecast.profiles import profile_calls
from dqar.measure.results import load_table
from dqar.models.profiles import get_profile
from dqar.peers.w8a8 import quantize_transformer
from dqar.studies import pareto, plans
from dqar.studies.compare import Method
from dqar.studies.recording import Recording

COMPUTED = (8, 4, 2)


def ladder():
    steps = (range(8), (0, 2, 4, 6), (0, 4))
    return [extrapolation(own, range(8, 0, -1), 1.0, "model") for own in steps]


def recorded(told, images=1000, seed=0):
    """A feature of each image, of which so much is told of its quality; sparser plans have 12 dB less each."""
    generator = np.random.default_rng(seed)
    hard, noise = generator.standard_normal((2, images))
    rows = []
    for rung, computed in enumerate(COMPUTED):
        quality = 75 - 12 * rung + 8 * (told * hard + np.sqrt(1 - told**2) * noise)
        own = pd.DataFrame({"image": range(images), "label": 0, "computed": computed, "mse": 10 ** (-quality / 10)})
        rows.append(own.assign(macs_speedup=8 / computed))
    rows[0]["features"] = list(np.c_[hard, np.ones(images)])
    return pd.concat(rows, ignore_index=True)


def test_a_rule_that_can_tell_beats_the_random_mix_and_one_that_cannot_does_not():
    speedups = {}
    for told in (0.0, 0.95):
        judged = plans.judged(recorded(told), ladder(), splits=4)
        kept = plans.typical(judged, "kept")
        assert (kept.sub([share for _, share in kept.index], axis=0) > -0.02).all(axis=None)
        speedups[told] = plans.typical(judged).loc[45.0, 0.95]
    assert speedups[0.95][plans.LADDER] > 1.15 * speedups[0.95][plans.MIX]
    assert speedups[0.0][plans.LADDER] < speedups[0.0][plans.MIX]  # which spends no images on a rule
    # Gaussian, 8 dB wide: 98.8 % have 45 dB by the middle plan, 77 % by the sparsest.
    assert speedups[0.0][plans.FIXED] == 2.0 and speedups[0.0][plans.MIX] > 2.0


def test_the_network_is_judged_on_the_same_splits():
    table = recorded(0.95, images=300)
    found = plans.judged(table, ladder(), splits=1, ways=tuple(plans.RULES))
    assert set(found.way) == {plans.LADDER, plans.NETWORK} and (plans.typical(found) >= 1).all(axis=None)
    whole = plans.judged(table, ladder(), splits=1)
    pd.testing.assert_frame_equal(*(own[own.way == plans.LADDER].reset_index(drop=True) for own in (found, whole)))


def test_full_compute_is_left_where_nothing_can_be_promised_and_few_images_promise_nothing():
    table = recorded(0.5)
    table["mse"] = 1.0
    judged = plans.judged(table, ladder(), splits=2)
    assert not judged.promised.any() and set(judged.macs_speedup) == {1.0} and set(judged.kept) == {1.0}
    few = plans.judged(recorded(0.5, images=200), ladder(), splits=2)
    assert set(few.share) == {0.95, 0.9}  # 230 images are needed to tell 99 %
    assert plans.judged(recorded(0.5, images=20), ladder(), splits=2).empty


def test_the_figures_sentence_is_of_the_table():
    judged = plans.judged(recorded(0.95), ladder(), splits=1)
    own = plans.typical(judged).loc[45.0, 0.95]
    said = promises_in_words(judged)
    assert f"takes {own[plans.LADDER]:.2f}× fewer MACs, the mix {own[plans.MIX]:.2f}×" in said
    worse = judged.assign(macs_speedup=judged.macs_speedup.where(judged.way != plans.LADDER, 1.0))
    assert "in 0 of 3 promises" in promises_in_words(worse)


def test_first_steps_are_what_a_ladder_sees(monkeypatch):
    """The same features that ``apply_dqar`` chooses by, of the same images."""
    pipe = embedded_pipeline()
    profile = dataclasses.replace(get_profile("digits"), num_inference_steps=4, batch_size=5)
    monkeypatch.setattr(plans.Method, "pipeline", lambda method, profile: pipe)
    told = plans.first_steps(profile, 3, 10)
    pipe.scheduler.set_timesteps(4)
    timesteps, model = pipe.scheduler.timesteps.tolist(), describe_model(pipe.transformer)
    plan = extrapolation((0, 2), timesteps, profile.guidance_scale, model)
    alone = PlanLadder((plan,), ((0.0,),), float("inf"), Promise(45.0, 0.95, 0.9, 0, 0, 0.0, 1.0))
    with apply_dqar(pipe, alone) as session:
        for call in profile_calls(pipe, profile, 10, 3):
            pipe(**call, num_inference_steps=4)
    seen = torch.stack([features for features, _ in session.engine.chosen])
    torch.testing.assert_close(told, seen, rtol=1e-4, atol=1e-5)


def test_weights_of_each_class_gain_what_their_errors_say():
    """Ten times smaller errors are 10 dB in every measure, and on every draw of the images."""
    errors = np.geomspace(1e-6, 1e-4, 20)
    of = {plans.OF_CLASS: errors / 10, plans.COMMON: errors}
    tables = [pd.DataFrame({"image": range(20), "mse": mse, "weights": own}) for own, mse in of.items()]
    table = pd.concat(tables).assign(calibration_images=120).sample(frac=1, random_state=0)  # in any order
    gains = plans.class_gains(SimpleNamespace(recorded={"classes": table}.get))
    assert gains.index.tolist() == [(120, measure) for measure in ("mean", "median", "5th percentile")]
    np.testing.assert_allclose(gains, 10.0)


def test_the_networks_ladder_stands_beside_the_other_ways_once_it_is_recorded(monkeypatch):
    table, network = recorded(0.95, images=300), pd.DataFrame({"way": [plans.NETWORK], "kept": [0.5]})
    methods = {number: Method("a plan", config=ladder()[0]) for number in table.computed.unique()}
    monkeypatch.setattr(plans, "ladder_methods", lambda profile, folder: methods)
    monkeypatch.setattr(plans, "judged", lambda table, given: pd.DataFrame({"way": [plans.MIX], "kept": [0.9]}))
    run = SimpleNamespace(profile=None, recordings=None, recorded={"promise": table, "rules": network}.get)
    for second, ways in (("09", [plans.MIX, plans.NETWORK]), ("07", [plans.MIX])):  # the promise was recorded at 08
        table.attrs["provenance"] = {"date": "2026-11-28T08:00:08+00:00"}
        network.attrs["provenance"] = {"date": f"2026-11-28T08:00:{second}+00:00"}
        assert plans.promises(run).way.tolist() == ways


def test_what_is_recorded_of_a_plan(tmp_path, monkeypatch):
    """A tiny model: the plan under each sampler, in each format of its history, by class, and beside first steps."""
    pipes = {name: image_pipeline(name) for name in ("dpm-solver++", *plans.OTHER_SAMPLERS)}
    quantized = image_pipeline("dpm-solver++")
    quantized.transformer = quantize_transformer(quantized.transformer)

    def pipeline(method, profile):
        return quantized if method.w8a8 else pipes[method.scheduler or profile.scheduler]

    monkeypatch.setattr(Method, "pipeline", pipeline)
    monkeypatch.setattr(plans, "CLASS_IMAGES", 1)
    profile = get_profile("smoke", num_inference_steps=8)
    recording = Recording(profile, tmp_path / "work", tmp_path)
    run = SimpleNamespace(
        profile=profile,
        recordings=recording.folder,
        recorded=lambda name: load_table(path) if (path := recording.folder / f"{name}.parquet").exists() else None,
    )
    unrecorded = plans.promises, plans.samplers, plans.history, plans.classes, plans.class_gains, plans.w8a8
    assert all(table(run) is None for table in unrecorded)
    records = plans.record_promise, plans.record_samplers, plans.record_history, plans.record_classes
    records = (*records, plans.record_w8a8)
    for record in records:
        with pytest.raises(ValueError, match="record plans first"):
            record(recording)
    with pytest.raises(ValueError, match="record promise first"):
        plans.record_rules(recording)
    path = pareto.plan_path(recording.folder, "dpm-solver++", "reference", 2)
    path.parent.mkdir()
    pipe = pipes["dpm-solver++"]
    pipe.scheduler.set_timesteps(8)
    timesteps, model = pipe.scheduler.timesteps.tolist(), describe_model(pipe.transformer)
    extrapolation((0, 4), timesteps, profile.guidance_scale, model).save(path)
    for record in records:
        record(recording)
    history = plans.history(run)
    assert history.index.tolist() == [(4, 4), (4, 16), (8, 8), (8, 16), (16, 16)] and (history.images == 2).all()
    whole = history.cache_bytes[16, 16]
    assert all(history.cache_bytes[bits, 16] == history.cache_bytes[bits, bits] < bits / 16 * whole for bits in (8, 4))
    assert history["mean"].nunique() == 5
    by_class = plans.classes(run)
    weights = [plans.OF_CLASS, plans.COMMON]
    assert by_class.index.tolist() == [(images, own) for images in (10, 20) for own in weights]
    assert by_class["mean"].nunique() == 4 and (by_class.images == 2).all()
    means = by_class["mean"].unstack()
    for images in (10, 20):
        gained = plans.class_gains(run).gain[images, "mean"]
        assert gained == pytest.approx(means[plans.OF_CLASS][images] - means[plans.COMMON][images])
    names = ["other samplers", "quantized history", "W8A8", "weights of each class", "what they gain"]
    assert list(plans.other_ways(run)) == names
    drawn = plans.w8a8(run)["mean"]
    assert drawn["the W8A8 model", "none"] == 120 and drawn["the model as it was", "none"] < 120
    fitted = [drawn["the W8A8 model", own.name] for own in (plans.QUANTIZED, plans.FULL)]
    assert fitted[0] != fitted[1] and all(quality < 120 for quality in fitted)
    under = plans.samplers(run)["mean"]
    assert under.index.tolist() == [(name, "dpm-solver++") for name in ("ddim", "dpm-solver++", "dpm-solver++3")]
    assert under.nunique() == 3
    table = run.recorded("promise")
    assert set(table.computed) == {2} and table.macs_speedup.iloc[0] == pytest.approx(4, rel=0.01)
    assert plans.promises(run).empty
    plans.record_rules(recording)  # of so few images nothing is promised
    assert run.recorded("rules").empty
