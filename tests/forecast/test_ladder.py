"""Ladders: rows of one batch follow plans of their own, as if all rows followed each; and the file that holds them."""

import dataclasses
import json
import math

import pytest
import torch
from planned import models_of, random_plan, state, unchanged
from tiny import STEPS, TINY, drawn

from dqar import PlanLadder, apply_dqar
from dqar.forecast.ladder import Promise, first_step_features, rows_of
from dqar.measure import metrics

PROMISE = Promise(45.0, 0.95, 0.9, 100, 100, 46.0, 2.0)
IMAGES = 3


def plans_for(name, pipe, call):
    """A plan that computes all steps but one, which it draws on the newest output alone, and a sparser random one."""
    sparse = random_plan(name, pipe, call)
    steps, branches = len(sparse.timesteps), len(sparse.branches)
    computed = set(range(steps)) - {4}
    row = torch.zeros(branches, sparse.cached_at(steps) + 1, *sparse.kernel)
    row[(slice(None), 0, *(side // 2 for side in sparse.kernel))] = 0.9
    weights = [tuple(row.flatten().tolist()) if step == 4 else () for step in range(steps)]
    return dataclasses.replace(sparse, computed=computed, weights=weights, readouts=()), sparse


def batch_of(call):
    """One call for what would be several."""
    batch = call(0)
    for other in map(call, range(1, IMAGES)):
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[name] = torch.cat([value, other[name]])
            elif isinstance(value, list):
                batch[name] = value + other[name]
    return batch


def ladder_between(pipe, call, plans):
    """One that gives the image with the smallest first feature the denser plan, and the others the sparser."""
    alone = PlanLadder(plans[:1], ((0.0,),), math.inf, PROMISE)
    with apply_dqar(pipe, alone) as session:
        drawn(pipe, call)
    told = torch.stack([features for features, _ in session.engine.chosen])
    first, second = told[:, 0].sort().values[:2].tolist()
    rest = (0.0,) * (told.shape[1] - 1)
    return PlanLadder(plans, ((0.0, *rest, 0.0), (1.0, *rest, 0.0)), (first + second) / 2, PROMISE), told


# One call with both branches, one branch, guidance by two calls, lists, two transformers, frame by frame.
@pytest.mark.parametrize("name", ["dit", "flux", "wan22", "qwen", "z_image", "latte", "hunyuan_dit"])
def test_each_row_follows_its_own_plan(name):
    pipe, call = TINY[name]()
    call = batch_of(call)
    plans = plans_for(name, pipe, TINY[name]()[1](0))
    whole = []
    for plan in plans:
        with apply_dqar(pipe, plan):
            whole.append(drawn(pipe, call))
    before = [state(model) for model in models_of(pipe)]
    ladder, told = ladder_between(pipe, call, plans)
    rungs = ladder.choose(told)
    assert sorted(rungs) == [0, *[1] * (len(rungs) - 1)]
    with apply_dqar(pipe, ladder) as session:
        mixed, again = drawn(pipe, call), drawn(pipe, call)
    assert torch.equal(mixed, again)
    for image, rung in enumerate(rungs):
        tolerance = 1e-4 * whole[0].abs().max().item()
        torch.testing.assert_close(mixed[image], whole[rung][image], rtol=1e-3, atol=tolerance)
        if name != "dit":
            assert not torch.allclose(mixed[image], whole[1 - rung][image], rtol=1e-3, atol=tolerance)
    summary = session.summary()
    assert summary["plan_of_image"] == [len(plans[rung].computed) for rung in rungs] * 2
    assert summary["promise"].startswith("PSNR >= 45 dB in 95% of images, with 90% confidence: 100 of 100")
    assert summary["runs"] == 2 and summary["steps"] == 2 * STEPS
    assert all(map(unchanged, models_of(pipe), before)) and "step" not in vars(pipe.scheduler)


def test_rows_of_a_ladder_have_the_weights_of_their_classes():
    pipe, call = TINY["dit"]()
    own, call = call(0), batch_of(call)
    plans = []
    for plan in plans_for("dit", pipe, own):
        added = [tuple(0.05 * x for x in row) for row in plan.weights]
        plans.append(dataclasses.replace(plan, classes={call["class_labels"][1]: (added, plan.readouts)}))
    whole = []
    for plan in plans:
        with apply_dqar(pipe, plan):
            whole.append(drawn(pipe, call))
    ladder, told = ladder_between(pipe, call, tuple(plans))
    with apply_dqar(pipe, ladder):
        mixed = drawn(pipe, call)
    for image, rung in enumerate(ladder.choose(told)):
        tolerance = 1e-4 * whole[0].abs().max().item()
        torch.testing.assert_close(mixed[image], whole[rung][image], rtol=1e-3, atol=tolerance)


def test_a_step_is_computed_for_the_rows_that_need_it():
    pipe, call = TINY["sd3"]()
    call = batch_of(call)
    plans = plans_for("sd3", pipe, TINY["sd3"]()[1](0))
    ladder, _ = ladder_between(pipe, call, plans)
    macs = []
    for own in (*plans, ladder):
        with apply_dqar(pipe, own):
            macs.append(metrics.count_macs(lambda: drawn(pipe, call)))
    dense, sparse, mixed = macs
    assert mixed == pytest.approx(dense / 3 + 2 * sparse / 3, rel=0.01) and sparse < 0.8 * dense


def test_rows_are_taken_where_there_is_one_an_image():
    rows, value = torch.tensor([2, 0]), torch.arange(12).view(4, 3)
    taken = rows_of({"a": value, "b": [1, 2, 3, 4], "c": value.T, "d": None, "e": torch.tensor(4)}, rows, 4)
    assert torch.equal(taken["a"], value[[2, 0]]) and taken["b"] == [3, 1]
    assert torch.equal(taken["c"], value.T) and taken["d"] is None and taken["e"].item() == 4


def test_features_are_what_they_say():
    torch.manual_seed(0)
    cond, uncond, states, captions = (torch.randn(2, *shape) for shape in ((3, 4), (3, 4), (5, 6), (7,)))
    told = first_step_features({"cond": cond, "uncond": uncond}, states, captions)
    size = cond.flatten(1).norm(dim=1)
    torch.testing.assert_close(told[:, 0], size.log().double())
    torch.testing.assert_close(told[:, 1].float(), ((cond - uncond).flatten(1).norm(dim=1) / size).log())
    torch.testing.assert_close(told[:, 2:].float(), torch.cat([states.mean(1), captions], 1))
    assert first_step_features({"cond": cond}, None, None).shape == (2, 1)


def test_a_ladder_is_one_file_and_a_wrong_one_is_named(tmp_path):
    pipe, call = TINY["sana"]()
    plans = plans_for("sana", pipe, call(0))
    ladder, path = PlanLadder(plans, ((1.0, 2.0), (3.0, 4.0)), math.inf, PROMISE), tmp_path / "ladder.json"
    for own in (ladder, dataclasses.replace(ladder, threshold=46.5)):
        own.save(path)
        assert PlanLadder.load(path) == own and [file.name for file in tmp_path.iterdir()] == ["ladder.json"]
    good = json.loads(path.read_text())
    for wrong in ({**good, "plans": []}, {**good, "format": "x"}, {**good, "promise": {}}, {**good, "weights": [[1]]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="ladder.json is truncated or no dqar-ladder-1 file"):
            PlanLadder.load(path)
    with pytest.raises(ValueError, match="from the densest to the sparsest"):
        dataclasses.replace(ladder, plans=plans[::-1])
    with pytest.raises(ValueError, match="2 kinds of runs"):
        dataclasses.replace(ladder, plans=(plans[0], dataclasses.replace(plans[1], scheduler="Other")))
    with pytest.raises(ValueError, match="fewer than 16 history_bits are not accepted in a ladder"):
        dataclasses.replace(ladder, plans=(plans[0], dataclasses.replace(plans[1], history_bits=8)))
    with pytest.raises(ValueError, match="1 rows of weights"):
        dataclasses.replace(ladder, weights=((1.0,),))
    with pytest.raises(ValueError, match="reads 1 numbers of the first step, .* give 5"):
        dataclasses.replace(ladder, threshold=1.0).choose(torch.zeros(2, 5))
