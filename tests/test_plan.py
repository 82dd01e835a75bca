import dataclasses
import json
import math

import pytest
import torch
from helpers import draw, embedded_pipeline, random_transformer

from dqar import DQARConfig, DQARController, ReusePlan, apply_dqar
from dqar.models.pipelines import make_scheduler

SITES = {(1, 0, "cond"), (2, 3, "uncond"), (2, 1, "cond"), (7, 3, "cond")}
PLAN = ReusePlan(SITES, 4, 8, "DDIMScheduler", {"seed": 3})


def test_a_saved_plan_is_the_same_and_small(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    loaded = ReusePlan.load(tmp_path / "plan.json")
    assert loaded == PLAN and loaded.provenance == {"seed": 3}
    rows = json.loads((tmp_path / "plan.json").read_text())["reuse"]
    assert rows["cond"][1] == "1000" and rows["uncond"][2] == "0001" and rows["uncond"][1] == "0000"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    full = ReusePlan({(s, la, b) for s in range(50) for la in range(28) for b in ("cond", "uncond")}, 28, 50)
    full.save(tmp_path / "full.json")
    assert (tmp_path / "full.json").stat().st_size < 5000 and full.share == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace("dqar-plan-1", "dqar-plan-9"),
        lambda text: text.replace('"1000"', '"100"'),
        lambda text: text.replace('"1000"', '"1002"'),
        lambda text: text.replace('"uncond"', '"other"'),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="plan.json is truncated or no dqar-plan-1 file"):
        ReusePlan.load(path)


@pytest.mark.parametrize(
    "site",
    [(8, 0, "cond"), (-1, 0, "cond"), (1, 4, "cond"), (1, 0, "both"), (1.0, 0, "cond"), (True, 0, "cond"), (1, 0), 1],
)
def test_a_site_outside_the_table_is_named(site):
    with pytest.raises(ValueError, match="a step from 0 to 7, a layer from 0 to 3"):
        ReusePlan({site}, 4, 8)


@pytest.mark.parametrize(
    "layers, steps, field", [(0, 8, "num_layers"), (4, 0, "num_inference_steps"), (4.0, 8, "num_layers")]
)
def test_a_table_needs_a_size(layers, steps, field):
    with pytest.raises(ValueError, match=field):
        ReusePlan((), layers, steps)


def test_a_plan_of_another_size_is_refused(pipe):
    with pytest.raises(ValueError, match="made for 3 layers, this model has 4"):
        apply_dqar(pipe, DQARConfig(plan=ReusePlan((), 3, 8)))
    assert not hasattr(pipe.transformer, "_diffusers_hook")  # nothing was left half applied
    with apply_dqar(pipe, DQARConfig(plan=PLAN)), pytest.raises(ValueError, match="made for 8 steps, this run takes 5"):
        draw(pipe, steps=5)
    controller = DQARController(4, DQARConfig(plan=PLAN))
    with pytest.raises(ValueError, match="made for 8 steps, this run takes 9"):
        controller.begin_step(0, 9)


def test_a_plan_of_another_scheduler_is_refused(pipe):
    pipe.scheduler = make_scheduler("euler", pipe.scheduler)
    with (
        apply_dqar(pipe, DQARConfig(plan=PLAN)),
        pytest.raises(ValueError, match="DDIMScheduler.* EulerDiscreteScheduler"),
    ):
        draw(pipe)
    with apply_dqar(pipe, DQARConfig(plan=ReusePlan(SITES, 4, 8))):
        draw(pipe)


def test_runs_are_planned_by_what_most_of_them_did(pipe):
    config = DQARConfig(entropy_threshold=2.65, snr_range=(0, math.inf), schedule="all")
    with apply_dqar(pipe, config) as session:
        for seed in range(3):
            draw(pipe, seed=seed)
    table = session.trace.to_pandas()
    plan = ReusePlan.from_trace(table)
    counts = table[table.decision == "reuse"].groupby(["step", "layer", "branch"]).size()
    assert plan.sites == {site for site, count in counts.items() if count >= 2}
    assert (counts == 1).any() and (counts == 3).any()  # runs differ
    with pytest.raises(ValueError, match=r"runs of \[5, 8\] steps"), apply_dqar(pipe, config) as session:
        draw(pipe)
        draw(pipe, steps=5)
        ReusePlan.from_trace(session.trace.to_pandas())
    with pytest.raises(ValueError, match="no steps"):
        ReusePlan.from_trace(table[:0])


class _Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_a_planned_step_waits_for_nothing(monkeypatch):
    """``item`` and ``equal`` are seen as operations, ``tolist`` as a method."""
    lists, original = [], torch.Tensor.tolist

    def tolist(self):
        lists.append(self.shape)
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def waits(steps, config):
        pipe = embedded_pipeline()
        with _Waits() as plain:
            draw(pipe, steps=steps)
        before = len(lists)
        with apply_dqar(pipe, config(steps)), _Waits() as with_plan:
            draw(pipe, steps=steps)
        return with_plan.count - plain.count + len(lists) - before

    def planned(steps):
        return DQARConfig(plan=ReusePlan({(s, 1, "cond") for s in range(1, steps, 2)}, 4, steps), quantize_bits=16)

    assert waits(6, planned) == waits(12, planned)  # once a run, never a step
    assert waits(12, lambda _: DQARConfig()) - waits(6, lambda _: DQARConfig()) >= 6  # a gate's numbers: a wait a step


def test_a_planned_run_still_finds_what_is_not_finite():
    pipe = embedded_pipeline()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[2].ff.net[2].bias.fill_(math.nan)
    with (
        apply_dqar(pipe, DQARConfig(plan=PLAN)),
        pytest.raises(FloatingPointError, match="before step 7: a run without the plan"),
    ):
        draw(pipe)


def test_a_bare_transformer_follows_a_plan_from_its_first_step():
    transformer = random_transformer()
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), apply_dqar(transformer, DQARConfig(plan=ReusePlan({(1, 2, "cond")}, 4, 3))) as session:
        for t in (999, 666, 333):
            transformer(latents, timestep=torch.tensor([t, t]), class_labels=torch.tensor([1, 2]))
    table = session.trace.to_pandas()
    assert table[table.decision == "reuse"][["step", "layer"]].values.tolist() == [[1, 2]]


def test_a_plan_for_latents_of_another_size_is_refused(tmp_path):
    pipe = embedded_pipeline()
    with apply_dqar(pipe, DQARConfig(schedule="static", entropy_threshold=None, snr_range=None)) as session:
        draw(pipe)
    plan = ReusePlan.from_trace(session.trace.to_pandas())
    plan.save(tmp_path / "plan.json")
    assert ReusePlan.load(tmp_path / "plan.json") == plan and plan.latent_size == "8 x 8"
    with apply_dqar(pipe, plan):
        draw(pipe)
    other = dataclasses.replace(plan, latent_size="16 x 16")
    with apply_dqar(pipe, other), pytest.raises(ValueError, match="made for 16 x 16 latents, these are 8 x 8: make"):
        draw(pipe)
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["latent_size"]  # as files were before it was noted
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with apply_dqar(pipe, older := ReusePlan.load(tmp_path / "plan.json")):
        draw(pipe)
    assert older.latent_size is None and older.sites == plan.sites
