"""Notebook 02's panel and the trial behind it."""

import math

import pytest

from dqar.config import DQARConfig
from dqar.figures import panel
from dqar.measure.results import Run
from dqar.studies import gate


@pytest.fixture
def run(tmp_path):
    return Run("smoke", 0, tmp_path)


def test_a_trial_counts_what_its_trace_says(run):
    closed = gate.try_gate(run, DQARConfig(entropy_threshold=0.0), images=1)
    assert closed.share == 0 and math.isinf(closed.psnr) and closed.macs_speedup < 1  # it looks, and reuses nothing
    reuse = DQARConfig(entropy_threshold=None, snr_range=None, schedule="static", reuse_target="output")
    opened = gate.try_gate(run, reuse, images=1)
    assert opened.share == pytest.approx(0.5) == (opened.decisions.decision == "reuse").mean()
    assert opened.macs_speedup > 1.1 and 10 < opened.psnr < 100
    assert panel.summary(opened).startswith("50% of the sites reused, ") and "(n = 1)" in panel.summary(opened)
    with pytest.raises(ValueError, match="images=0 is not accepted"):
        gate.try_gate(run, reuse, images=0)


def test_the_knobs_say_what_the_configuration_is(run, monkeypatch):
    config = DQARConfig(entropy_threshold=3.65, schedule="all", max_reuse_streak=2, quantize_bits=4)
    knobs = panel.controls(config)
    assert panel.configured(config, **{name: knob.value for name, knob in knobs.items()}) == config
    assert type(panel.explore(run, config, images=1)).__name__ == "Figure"  # nobody watches
    monkeypatch.setattr(panel, "is_watched", lambda: True)
    shown = []
    monkeypatch.setattr(panel, "display", shown.append)
    widget = panel.explore(run, config, images=1)
    assert shown == []
    widget.update()
    assert [type(figure).__name__ for figure in shown] == ["Figure"]
