"""Slide 16's verdicts, and the one gate that all figures show, from tables worked out by hand."""

import math

import pandas as pd
import pytest

from dqar.measure.results import Run
from dqar.studies import conclusions, gate, results
from dqar.studies.pareto import CONVERGED_BY


@pytest.fixture
def run(tmp_path):
    return Run("smoke", 0, tmp_path)


@pytest.mark.parametrize("two_bits, verdict", [(41.0, "holds"), (30.0, "does not hold")])
def test_lower_bits_are_two_judgements_each_at_its_best_and_40_db_away(run, two_bits, verdict):
    rows = [
        ("kv", 16, "per_channel", math.inf, 4000),
        ("output", 16, "per_channel", math.inf, 2000),
        ("kv", 8, "per_channel", 72.0, 1040),  # of FP16's 2000 bytes
        ("output", 8, "per_token", 60.0, 500),
        ("kv", 4, "per_channel", 40.0, 500),
        ("output", 4, "per_token fitted", 46.0, 280),  # of FP16's 1000
        ("kv", 2, "per_channel", two_bits - 10, 300),
        ("kv", 2, "per_channel fitted", two_bits, 320),
        ("kv", 8, "mixed", 90.0, 1500),  # not 8 bits: K stays in FP16
    ]
    quality = pd.DataFrame(rows, columns=["target", "bits", "mode", "median", "cache_bytes"]).assign(images=9)
    eight = "INT8: 72 dB in 0.52; n = 9"
    four, two = conclusions.lower_bits(run, quality, None)
    assert four == ("holds", f"46 dB in 0.28 of FP16's bytes (attention output, levels fitted); {eight}")
    assert two == (verdict, f"{two_bits:.0f} dB in 0.16 of FP16's bytes (K and V, levels fitted); {eight}")
    drawn = [("INT2", "uniform", 0.16, 1e-9), ("mixed", "mixed", 0.19, 1e-4), ("mixed, more", "mixed", 0.25, 1e-5)]
    mixed = pd.DataFrame(drawn, columns=["method", "family", "share", "mse"]).assign(image=0)
    beside = two[1].replace(eight, "by layer: 40 dB in 0.19; n = 9, 1")
    assert conclusions.lower_bits(run, quality, mixed) == [four, (verdict, beside)]
    mixed = mixed.merge(pd.DataFrame({"image": range(9)}), how="cross", suffixes=("_", ""))
    assert conclusions.lower_bits(run, quality, mixed)[1][1].endswith("by layer: 40 dB in 0.19; n = 9")


@pytest.mark.parametrize("plan", [44.2, 41.0])
def test_what_fitting_the_steps_gives_is_said_beside_the_best_rival_at_3_times_fewer_macs(plan):
    drawn = [("full compute", None, 1, 90.0), ("DQAR plan", "reference", 3.1, plan), ("SeaCache", None, 3, 42.1)]
    rows = [
        (family, family, made_for, speedup, image, 10 ** (-decibels / 10))
        for family, made_for, speedup, decibels in drawn
        for image in range(4)
    ]
    table = pd.DataFrame(rows, columns=["method", "family", "made_for", "macs_speedup", "image", "mse"])
    table = table.assign(mse_converged=table.mse, converged_by=CONVERGED_BY)
    assert conclusions.searched(table) == f"fitted steps at 3×: median {plan:.1f} dB (best rival 42.1); n = 4"
    assert conclusions.searched(None) == "" == conclusions.searched(table[table.family != "DQAR plan"])


def searched_rows(*trials):
    rows = [(number, speed, image, 10 ** (-decibels / 10)) for number, speed, decibels in trials for image in (0, 1)]
    table = pd.DataFrame(rows, columns=["trial", "macs_speedup", "image", "mse"])
    return table.assign(front=table.trial > 2)


@pytest.mark.parametrize("decibels, verdict", [(34.0, "holds"), (30.0, "does not hold")])
def test_a_search_holds_where_its_settings_beat_those_by_hand_at_2_times_fewer_macs(decibels, verdict):
    # Trials 0 to 2 are by hand; on the images of the search they were better.
    trials = searched_rows((0, 2.5, 39.0), (1, 1.5, 50.0), (2, 2.1, 38.0), (7, 2.2, 60.0), (9, 1.4, 55.0))
    front = searched_rows((7, 2.2, decibels), (9, 1.4, 55.0), (0, 2.5, 31.0), (1, 1.5, 50.0), (2, 2.1, 25.0))
    lead = f"{decibels - 31:+.1f}"  # all images gain alike, so every resample does
    said = f"5th percentile {decibels:.1f} dB at 2.2×, by hand 31.0 at 2.5×: {lead} ({lead} to {lead})"
    said += f"; medians {decibels:.1f} and 31.0; n = 2"
    assert conclusions.by_search(trials, front, "") == (verdict, said)
    assert conclusions.by_search(trials, front, "fitted steps") == (verdict, f"{said}; fitted steps")


def test_a_search_is_not_certain_where_the_interval_of_its_lead_includes_0():
    by_hand = searched_rows((0, 2.5, 31.0))
    trials = pd.concat([by_hand, searched_rows((7, 2.2, 34.0))])
    front = trials.assign(mse=trials.mse.where(~trials.front | (trials.image == 0), 10**-2.8))  # 34 and 28 dB
    verdict, said = conclusions.by_search(trials, front, "")
    assert verdict == "not certain" and "(-3.0 to +3.0)" in said


def test_a_search_that_is_not_recorded_is_not_judged_by_fitted_steps():
    untested, none = "not testable here", "layers, thresholds and bits: no search is recorded"
    assert conclusions.by_search(None, None, "fitted steps") == (untested, f"{none}; fitted steps")
    slow = searched_rows((0, 1.5, 31.0))
    assert conclusions.by_search(slow, slow, "") == (untested, "nothing searched takes half of the MACs")


def test_every_figure_shows_the_recorded_gate_where_there_is_one(run, monkeypatch):
    traced = pd.DataFrame({"snr": [1.0, 1.0, 1.0, 99.0], "entropy": [1.0, 2.0, 3.0, 9.0]})
    monkeypatch.setattr(gate, "sites", lambda run: traced)
    monkeypatch.setattr(Run, "recorded", lambda self, name: None)
    assert gate.calibrated_gate(run).entropy_threshold == pytest.approx(2.0)  # the median at SNR 0.5 to 50
    monkeypatch.setattr(Run, "recorded", lambda self, name: traced.assign(entropy=traced.entropy + 0.5))
    assert gate.calibrated_gate(run).entropy_threshold == pytest.approx(2.5)
    shown = {method.config.entropy_threshold for method in gate.gate_methods(run) if method.family == "calibrated"}
    assert shown == {gate.calibrated_gate(run).entropy_threshold}


def test_slide_12s_gate_is_the_gate_of_the_other_figures(tmp_path):
    run = Run("digits", 0, tmp_path)
    recorded = [
        method.config for method in results.methods(run.profile, run.recordings) if method.family == "DQAR rule"
    ]
    own = gate.calibrated_gate(run)
    assert len(recorded) == 2
    for config in recorded:
        assert (config.entropy_threshold, config.snr_range, config.schedule) == (
            own.entropy_threshold,
            own.snr_range,
            own.schedule,
        )
