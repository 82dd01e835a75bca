import functools
import math

import pandas as pd
import pytest
import torch
from helpers import draw, embedded_pipeline

from dqar import DQARConfig, ReusePlan, apply_dqar, remove_dqar
from dqar.__main__ import main
from dqar.measure import metrics
from dqar.studies import benchmarks


def timed(part, seconds, **columns):
    rows = [
        {"part": part, "method": method, "repeat": i, "seconds": s, **{k: v[method] for k, v in columns.items()}}
        for method, times in seconds.items()
        for i, s in enumerate(times)
    ]
    return pd.DataFrame(rows)


SECONDS = {
    "plain": [1.0, 2.0, 4.0],
    "applied, closed": [1.005, 2.01, 4.02],
    "entropy, exact": [1.08, 2.1, 4.32],
    "plan: output, every 2nd step": [0.8, 1.6, 3.2],
    "plan: output, 3 of 4 steps": [0.5, 1.0, 2.0],
}
MACS = dict(zip(SECONDS, [100, 100, 101, 80, 40], strict=True))
FAMILIES = dict(zip(SECONDS, ["plain", "closed", "entropy", benchmarks.SITES, benchmarks.SITES], strict=True))


@pytest.mark.parametrize("device, entropy_met", [("cpu", True), ("cuda", False)])
def test_costs_are_paired_by_repeat_and_held_against_the_targets(device, entropy_met):
    columns = {"macs": MACS, "family": FAMILIES, "target": dict.fromkeys(SECONDS, "output")}
    table = timed("step", SECONDS, **columns, peak_bytes=dict.fromkeys(SECONDS, 7))
    table.attrs = {"provenance": {"profile": {"device": device}}}
    summary = benchmarks.summary(table).set_index("method")
    assert summary.cost.tolist() == pytest.approx([1, 1.005, 1.08, 0.8, 0.5])
    assert summary.realised["plan: output, every 2nd step"] == pytest.approx(1)
    assert summary.realised["plan: output, 3 of 4 steps"] == pytest.approx(1 / 1.5)
    assert math.isnan(summary.realised["plain"]) and summary.ms["plain"] == 2000
    targets = benchmarks.targets(table)
    assert targets.met.tolist() == [entropy_met, True, True, False]
    assert targets.bound[0] == (0.05 if device == "cuda" else 0.10)


def test_a_whole_benchmark_of_one_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.shutil, "which", lambda name: None)  # compiling takes a minute
    small = functools.partial(benchmarks.random_dit_xl_2, sample_size=16)
    monkeypatch.setattr(benchmarks, "random_dit_xl_2", small)
    times = metrics.interleaved_times
    monkeypatch.setattr(metrics, "interleaved_times", lambda calls, _repeats, device: times(calls, 1, device))
    assert main(["benchmark", "--num-layers", "1", "--repeats", "1", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    ((device, table),) = benchmarks.recorded().items()
    assert device.endswith(", float32, 1 image") and set(table.part) == {"attention", "layer", "quantizer", "step"}
    assert (table.seconds > 0).all() and len(benchmarks.targets(table)) == 5
    steps = benchmarks.summary(table).query("part == 'step'").set_index("method")
    # attention is 4 projections of 12 and the products with 64 keys; the rest of the model is small beside a block
    share = (4 * 1152 + 2 * 64) / (12 * 1152 + 2 * 64)
    assert steps.macs_speedup["plan: output, every 2nd step"] == pytest.approx(1 / (1 - share / 2), rel=0.02)
    assert steps.macs_speedup["plan: output, 3 of 4 steps"] == pytest.approx(1 / (1 - share * 3 / 4), rel=0.02)
    # Block 0's embedder is asked twice a step, and answers once: 1.6 M of a forward's 1 G.
    assert steps.macs_speedup["applied, closed"] == pytest.approx(1, rel=2e-3)
    assert steps.macs_speedup["plan: model's output forecast, every 2nd step"] == pytest.approx(2, rel=1e-4)


def test_wrong_arguments_are_named(capsys):
    assert (
        main(["benchmark", "--repeats", "0"]) == 2
        and "--repeats=0 is not accepted: 1 or more" in capsys.readouterr().err
    )
    if not torch.cuda.is_available():
        assert main(["benchmark", "--device", "cuda"]) == 2 and "there is no CUDA GPU" in capsys.readouterr().err


def test_compiled_blocks_are_reused_around():
    pipe = embedded_pipeline(num_layers=1)  # each takes long to trace
    plan = DQARConfig(plan=ReusePlan({(1, 0, "cond"), (3, 0, "uncond")}, 1, 4), reuse_target="output")
    expected = draw(pipe, steps=4)
    with apply_dqar(pipe, plan):
        planned = draw(pipe, steps=4)
    tolerance = 1e-4 * expected.abs().max().item()
    assert (planned - expected).abs().max() > 100 * tolerance
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(draw(pipe, steps=4), expected, rtol=0, atol=tolerance)
    apply_dqar(pipe, plan)
    torch.testing.assert_close(draw(pipe, steps=4), planned, rtol=0, atol=tolerance)
    remove_dqar(pipe)
    torch.testing.assert_close(draw(pipe, steps=4), expected, rtol=0, atol=tolerance)
