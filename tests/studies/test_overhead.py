import pandas as pd
import pytest
import torch
from helpers import draw, embedded_pipeline

from dqar.studies import benchmarks, overhead


@pytest.mark.parametrize("kind", overhead.FLOORS)
def test_a_floor_is_reuse_at_every_second_step_and_nothing_else(pipe, kind):
    """Against hooks of PyTorch's own."""
    plain = draw(pipe)
    modules = {name: (module, set(vars(module))) for name, module in pipe.transformer.named_modules()}
    with overhead.floor(pipe.transformer, kind):
        got = draw(pipe)
    assert {name: (module, set(vars(module))) for name, module in pipe.transformer.named_modules()} == modules
    assert torch.equal(draw(pipe), plain) and not torch.equal(got, plain)
    kept, calls = {}, {}

    def hook(module, given, output):
        step = calls[module] = calls.get(module, -1) + 1
        base = given[0] if kind == "whole blocks" else 0
        if step % 2:
            return base + kept[module]
        kept[module] = output - base
        return None

    for block in pipe.transformer.transformer_blocks:
        parts = {"attention": (block.attn1,), "whole blocks": (block,)}.get(kind, (block.attn1, block.ff))
        for part in parts:
            part.register_forward_hook(hook)
    torch.testing.assert_close(got, draw(pipe), rtol=1e-5, atol=1e-5)


def test_every_method_is_measured_and_compared_with_its_floor(monkeypatch):
    monkeypatch.setattr(overhead, "STEPS", 2)
    table = overhead.measure(embedded_pipeline(), repeats=2)
    assert (table.seconds > 0).all() and set(table.groupby(["kind", "method", "modulations"]).size()) == {2}
    summary = overhead.summary(table)
    assert summary.method.tolist() == [case.name for case in overhead.CASES]
    assert summary.floor.notna().sum() == 4


def test_shares_are_of_the_floor_in_the_same_repeat():
    seconds = {("plain", "plain", "anew"): 4.0, ("floor", "attention", "anew"): 2.0}
    keys = list(overhead.contexts(embedded_pipeline()))
    rows = [(*key, repeat, seconds.get(key, 2.5) * (1 + repeat)) for key in keys for repeat in (0, 1)]
    table = pd.DataFrame(rows, columns=["kind", "method", "modulations", "repeat", "seconds"])
    row = overhead.summary(table).set_index("method").loc["attention output, 16 bit"]
    assert (row.anew, row.floor, row.share) == pytest.approx((1.6, 2.0, 0.8)) and not row.met


def test_the_recorded_table_has_every_method():
    table = benchmarks.recorded_overhead()
    assert overhead.summary(table).method.tolist() == [case.name for case in overhead.CASES]
    assert table.groupby(["kind", "method", "modulations"]).size().min() >= 10
