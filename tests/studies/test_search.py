"""The search: resumes, puts back what was cut off, refuses other studies, and measures its front on other images."""

import json

import optuna
import pandas as pd
import pytest
from helpers import image_pipeline
from optuna.trial import TrialState

from dqar.__main__ import main
from dqar.figures import conclusions as figures
from dqar.measure.results import Run, load_table
from dqar.models.profiles import get_profile
from dqar.studies import compare, conclusions, search
from dqar.studies.recording import Recording


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """``dqar search`` on a small random model; what its images are is never looked at."""
    tiny = image_pipeline()
    monkeypatch.setattr(compare, "cached_pipeline", lambda profile: tiny)
    return ["search", "--profile", "smoke", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]


def tables(tmp_path):
    names = ("search", "search-front", "search-importance")
    return [load_table(next((tmp_path / "out").rglob(f"{name}.parquet"))) for name in names]


def test_a_search_goes_on_and_its_front_is_measured_on_other_images(asked, tmp_path, monkeypatch, capsys):
    seeds, draw = [], compare.draw

    def counted(method, profile, seed, *own):
        seeds.append((method.name, seed))
        return draw(method, profile, seed, *own)

    monkeypatch.setattr(compare, "draw", counted)
    assert main([*asked, "--trials", "3"]) == 0
    before = tables(tmp_path)
    assert before[0].groupby("trial").size().tolist() == [2, 2, 2] and {"mse", "front", *search.SPACE} <= set(before[0])
    assert {seed for name, seed in seeds if name.startswith("trial")} == {search.SEARCH_SEED, search.FRONT_SEED}
    seeds.clear()
    assert main([*asked, "--trials", "5"]) == 0
    trials, front, importance = tables(tmp_path)
    pd.testing.assert_frame_equal(trials[trials.trial < 3][before[0].columns].drop(columns="front"),
                                  before[0].drop(columns="front"))  # fmt: skip
    assert {name for name, seed in seeds if seed == search.SEARCH_SEED} == {"trial 3", "trial 4"}
    shares = importance.groupby("objective").importance.sum()
    assert set(importance.setting) == set(search.SPACE) and (shares > 0).all() and (shares <= 1 + 1e-9).all()
    points = search.points(trials)
    for row in points.itertuples():  # the front by its definition
        better = (points.macs_speedup >= row.macs_speedup) & (points.psnr_5th >= row.psnr_5th)
        strictly = better & ((points.macs_speedup > row.macs_speedup) | (points.psnr_5th > row.psnr_5th))
        assert row.front == (not strictly.any())
    assert set(front.trial) <= {0, 1, 2, *points[points.front].trial} and "trial" in capsys.readouterr().out
    again, by_hand = search.remeasured(trials, front)
    assert set(again.trial) <= set(points[points.front].trial) and set(by_hand.trial) == {0, 1, 2}
    run = Run("smoke", 0, tmp_path / "figures")
    title = " ".join(figures.slide16_search(run, trials, front, importance).get_suptitle().split())
    change = again.psnr_5th - points.set_index("trial").psnr_5th.loc[again.trial].to_numpy()
    assert f"the best settings' 5th percentile changes by {change.mean():+.1f} dB".replace("-", "−") in title
    assert figures.slide16_search(run, None, front, importance).get_suptitle() == ""
    assert conclusions.by_search(trials, front, "")[0] in ("holds", "does not hold", "not testable here")


def test_what_was_cut_off_is_tried_again(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "compare", lambda *own: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*asked, "--trials", "3"]) == 130
    recording = Recording(get_profile("smoke"), tmp_path / "work", tmp_path / "out")
    study = search.Trials(recording).study
    cut = study.ask(search_space())  # as a killed process leaves it
    again = search.Trials(recording).study
    waiting = [trial.system_attrs["fixed_params"] for trial in again.get_trials(states=(TrialState.WAITING,))]
    assert cut.params in waiting and not again.get_trials(states=(TrialState.RUNNING,))


def search_space():
    distributions = optuna.distributions
    space = {}
    for name, among in search.SPACE.items():
        if name in search.CHOICES:
            space[name] = distributions.CategoricalDistribution(among)
        elif isinstance(among[0], int):
            space[name] = distributions.IntDistribution(*among)
        else:
            space[name] = distributions.FloatDistribution(*among, log=name in search.LOGARITHMIC)
    return space


def test_a_study_of_another_search_space_or_no_study_is_refused(asked, tmp_path, monkeypatch, capsys):
    recording = Recording(get_profile("smoke"), tmp_path / "work", tmp_path / "out")
    assert search.Trials(recording).study.user_attrs["facts"]["images"] == 2
    monkeypatch.setitem(search.SPACE, "bits_deep", (4, 8))
    assert main(asked) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "search.db is a study of another search space: space is " in said and "choose another --work" in said
    search.Trials(recording).path.write_bytes(b"nonsense" * 1000)
    assert main(asked) == 2
    assert "search.db is no study of this Optuna: remove it" in capsys.readouterr().err.splitlines()[-1]
    assert main([*asked, "--trials", "2"]) == 2
    assert "trials=2 is not accepted: an int of 3 or more" in capsys.readouterr().err.splitlines()[-1]


def test_settings_that_were_tried_twice_take_one_place_of_the_front():
    tried = [(0, 1.0, 1e-6), (1, 2.0, 1e-4), (2, 2.0, 1e-4), (3, 3.0, 1e-3)]
    rows = [{"trial": n, "macs_speedup": speedup, "front": True, "mse": mse} for n, speedup, mse in tried]
    assert search.front_of(pd.DataFrame(rows), 2).trial.tolist() == [1, 3]


def test_settings_become_the_method_that_they_name():
    values = {
        "target": "block",
        "schedule": "static",
        "interval": 3,
        "order": 1,
        "bits_shallow": 8,
        "bits_middle": 4,
        "bits_deep": 2,
    }
    values |= {"entropy": 3.5, "snr": 0.5, "last": 2}
    profile = get_profile("smoke")
    config = search.method_of(7, values, profile).config
    assert (config.reuse_target, config.static_interval, config.max_reuse_streak, config.cooldown) == ("block", 3, 2, 2)
    assert (config.entropy_threshold, config.snr_range[0]) == (3.5, 0.5)
    assert config.cache.layer_bits == (8,) * 10 + (4,) * 9 + (2,) * 9  # thirds of 28 layers
    assert config.cache.forecast_order == 1
    assert search.method_of(7, {**values, "target": "kv"}, profile).config.cache.forecast_order == 0
    plan = search.method_of(7, {**values, "target": "model"}, profile).config
    assert set(plan.computed) == {0, 3, 6, 7}
    assert search.tail(pd.Series([0.0] * 20 + [1e-3])) == pytest.approx(search.BEST)
    assert json.dumps(search.SPACE)
