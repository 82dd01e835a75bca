"""docs/families.md says what each family supports; here each of its rows is checked on the real class."""

import math
import re
from pathlib import Path
from typing import get_args

import planned
import pytest
import torch
from diffusers import DDIMScheduler
from helpers import make_pixart
from tiny import TINY, drawn

from dqar import DQARConfig, Probe, apply_dqar, fit_plan
from dqar.config import ReuseTarget
from dqar.forecast.ladder import PlanLadder, Promise

ROWS = re.findall(
    r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", Path("docs/families.md").read_text(), re.MULTILINE
)
MAKERS = {**TINY, "pixart": lambda: (make_pixart(), None)}


def test_every_tested_family_has_a_row():
    named = [pipeline for pipeline, *_ in ROWS]
    assert len(set(named)) == len(named)
    assert set(named) == {type(make()[0]).__name__ for make in MAKERS.values()}
    assert {plan for _, plan, *_ in ROWS} == {"yes"}


@pytest.mark.parametrize("name", MAKERS)
def test_trace_and_reuse_are_supported_as_the_table_says(name):
    pipe, call = MAKERS[name]()
    [(trace, reuse)] = [cells for pipeline, _, *cells in ROWS if pipeline == type(pipe).__name__]
    accepted = []
    for target in get_args(ReuseTarget):
        try:
            with apply_dqar(pipe, DQARConfig(reuse_target=target)) as session:
                assert session.attached
        except ValueError as error:
            assert re.search("attention|processor", str(error))
        else:
            accepted.append(f"`{target}`")
    assert (", ".join(accepted) or "no") == reuse
    measured = {"no": 0, "yes": 1, "by modality": 3}[trace]
    if measured and call:
        config = DQARConfig(schedule="none", reuse_target="output", probe=Probe(record=True))
        with apply_dqar(pipe, config) as session:
            drawn(pipe, call(0), steps=2)
        assert session.trace.to_pandas().filter(like="entropy").notna().any().sum() == measured
    assert (trace == "no") == (reuse == "no")


def together(first, second):
    """The arguments of two calls, for one call of both images."""
    joined = {
        name: torch.cat([value, second[name]]) if isinstance(value, torch.Tensor) else value + second[name]
        for name, value in first.items()
        if isinstance(value, (torch.Tensor, list))
    }
    return {**first, **joined}


def in_float64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


UNGUIDED = {"guidance_scale": 1.0}
CALLS = [
    *((name, {}) for name in TINY if name != "dit"),
    *((name, UNGUIDED) for name in ("pixart_sigma", "sd3", "aura_flow")),
]


@pytest.mark.parametrize("name, changes", CALLS, ids=[f"{name}-{len(changes)}" for name, changes in CALLS])
def test_two_prompts_of_one_seed_are_drawn_as_each_alone(name, changes):
    """Equal latents in both halves of a batch are no two branches of guidance."""
    pipe, call = TINY[name]()
    pipe.to(torch.float64)  # some latents grow to hundreds: single precision rounds them differently in a batch
    calls = [{key: in_float64(value) for key, value in {**call(seed), **changes}.items()} for seed in range(2)]

    def draw(named, images):
        generators = [torch.Generator().manual_seed(0) for _ in range(images)]
        return drawn(pipe, {**named, "generator": generators if images > 1 else generators[0]})

    with apply_dqar(pipe, planned.random_plan(name, pipe, calls[0])):
        alone = torch.cat([draw(named, 1) for named in calls])
        assert not torch.equal(*alone.chunk(2))
        torch.testing.assert_close(draw(together(*calls), 2), alone, rtol=1e-4, atol=1e-5)


def test_images_of_one_seed_share_no_attention_without_guidance():
    """PixArt's pipeline doesn't say whether it guides: the sampler, which is given both images, does."""
    pipe, call = TINY["pixart_sigma"]()
    calls = [{**call(seed), **UNGUIDED} for seed in range(2)]
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]

    def draw():
        for generator in generators:
            generator.manual_seed(0)
        return drawn(pipe, {**together(*calls), "generator": generators})

    plain = draw()
    with apply_dqar(pipe, DQARConfig(schedule="none", share_below=10.0)) as session:
        torch.testing.assert_close(draw(), plain)
    assert session.summary()["sites_shared"] == 0


@pytest.mark.parametrize("made_for, drawn_with", [(1.0, 4.0), (4.0, 1.0)])
def test_a_plan_refuses_runs_with_guidance_or_without_whatever_the_seeds(made_for, drawn_with):
    pipe, call = TINY["pixart_sigma"]()
    plan = planned.random_plan("pixart_sigma", pipe, {**call(0), "guidance_scale": made_for})
    named = {**together(call(0), call(1)), "guidance_scale": drawn_with}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with apply_dqar(pipe, plan), pytest.raises(ValueError, match="the plan was made (for|without) guidance"):
        drawn(pipe, {**named, "generator": generators})


def test_a_fitted_plan_refuses_noise_at_each_step():
    """Which DDIM adds with ``eta``, whatever its configuration says."""
    pipe, call = TINY["pixart_sigma"]()
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    plan = fit_plan(pipe, [call(seed) for seed in range(2)], 8, macs=2, refinements=0)
    want = drawn(pipe, {**call(0), "eta": 1.0})
    with apply_dqar(pipe, plan), pytest.raises(ValueError, match="eta=1.0 is not accepted"):
        drawn(pipe, {**call(0), "eta": 1.0})
    assert torch.equal(drawn(pipe, {**call(0), "eta": 1.0}), want)


def test_a_ladder_without_guidance_takes_images_of_one_seed():
    pipe, call = TINY["pixart_sigma"]()
    calls = [{**call(seed), **UNGUIDED} for seed in range(2)]
    plan = planned.random_plan("pixart_sigma", pipe, calls[0])
    ladder = PlanLadder((plan,), ((0.0,),), math.inf, Promise(40.0, 0.9, 0.9, 1, 1, 1.0, 1.0))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with apply_dqar(pipe, ladder):
        alone = torch.cat([drawn(pipe, named) for named in calls])
        both = drawn(pipe, {**together(*calls), "generator": generators})
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
