"""Plans on pipelines of every kind: fitted from their calls, followed as a plain loop would, refused elsewhere."""

import dataclasses
import math
import threading

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
)
from planned import (
    SHAPE,
    UNREAD,
    channels_first,
    line,
    models_of,
    naive,
    random_plan,
    scales_of,
    state,
    timesteps_of,
    unchanged,
)
from tiny import STEPS, TINY, caption, dit, drawn, flux, sd3, sd3_img2img, wan, wan22

from dqar import ForecastPlan, apply_dqar, describe_model, extrapolation, fit_plan
from dqar.forecast.fit import HISTORY, Calibration
from dqar.forecast.run import FinalHiddenStates, from_patches, mixture, patch_sides, to_patches

pytestmark = pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor")
EMPTY = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.mark.parametrize("name", TINY)
def test_a_plan_that_computes_every_step_changes_nothing(name):
    pipe, call = TINY[name]()
    untouched, before = drawn(pipe, call(0)), [state(model) for model in models_of(pipe)]
    plan = line(name, pipe, call(0), range(len(timesteps_of(pipe, call(0)))))
    with apply_dqar(pipe, plan) as session:
        assert torch.equal(drawn(pipe, call(0)), untouched)
    table = session.trace.to_pandas("model")
    assert len(table) == len(plan.timesteps) * len(plan.branches) and set(table.decision) == {"compute"}
    assert all(map(unchanged, models_of(pipe), before)) and "step" not in vars(pipe.scheduler)


def _in_bfloat16(call):
    return {
        name: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in call.items()
    }


def test_steps_are_told_apart_in_bfloat16():
    """Flux is given a thousandth of the timestep, rounded twice; a shifted schedule's first steps are 0.3 % apart."""
    pipe, call = flux()
    pipe = pipe.to(torch.bfloat16)
    pipe.scheduler = type(pipe.scheduler)(shift=6.0)
    call = _in_bfloat16(call(0))
    untouched = drawn(pipe, call, steps=50)
    plan = extrapolation(range(50), pipe.scheduler.timesteps.tolist(), 1.0, describe_model(pipe.transformer))
    assert 1 - plan.timesteps[1] / plan.timesteps[0] < 4e-3
    with apply_dqar(pipe, plan) as session:
        assert torch.equal(drawn(pipe, call, steps=50), untouched)
    assert session.trace.to_pandas("model").step.tolist() == list(range(50))


@pytest.mark.parametrize("name", TINY)
def test_a_planned_run_is_a_plain_loop(name):
    """Random kernels and readouts at every step, computed ones too."""
    pipe, call = TINY[name]()
    plan = random_plan(name, pipe, call(0))
    expected, untouched = naive(name, pipe, plan, call(0)), drawn(pipe, call(0))
    with apply_dqar(pipe, plan):
        planned, other, again = drawn(pipe, call(0)), drawn(pipe, call(1), seed=1), drawn(pipe, call(0))
    assert torch.equal(planned, again)  # what another call left behind isn't seen
    tolerance = 1e-4 * untouched.abs().max().item()
    torch.testing.assert_close(planned, expected, rtol=1e-4, atol=tolerance)
    if name != "dit":  # which decodes, with little contrast
        assert (planned - untouched).abs().max() > 100 * tolerance and not torch.allclose(planned, other)


@pytest.mark.parametrize(
    "name", [name for name in TINY if name not in ("sd3_img2img", "cogvideox", "hunyuan_video", "latte", *UNREAD)]
)
def test_patches_are_those_of_the_model(name):
    """What the last layer makes of the hidden states, put together, is the output."""
    pipe, call = TINY[name]()
    outputs = []
    handle = pipe.transformer.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
    with FinalHiddenStates([pipe.transformer]) as seen:
        [layer] = seen.layers
        drawn(pipe, call(0), steps=1)
        patches = layer(seen.take())
    handle.remove()
    output = channels_first(name, outputs[-1])
    assert torch.equal(from_patches(patches, output.shape), output)
    assert torch.equal(to_patches(output, patches.shape[1]), patches)


def test_patches_tile_the_grid_or_there_are_none():
    assert patch_sides((8, 8), 16) == (2, 2) and patch_sides((8, 12), 96) == (1, 1)
    assert patch_sides((3, 4, 6), 18) == (1, 2, 2) and patch_sides((4, 4, 4), 8) == (2, 2, 2)
    assert patch_sides((32,), 32) == (1,)
    assert patch_sides((8, 8), 17) is None and patch_sides((32,), 16) is None and patch_sides((8, 8), 32) is None


@pytest.mark.parametrize(("scale", "sign"), [(3.0, 1), (1.0, 1), (7.5, -1)])
def test_guidance_is_told_from_what_it_makes(scale, sign):
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 500)
    guidance, ahead, rest = mixture(sign * (uncond + scale * (cond - uncond)), cond, uncond)
    assert guidance.item() == pytest.approx(scale, rel=1e-5)
    assert (ahead.item(), rest.item()) == pytest.approx((sign * scale, sign * (1 - scale)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_a_fitted_plan_beats_extrapolation(name):
    pipe, call = TINY[name]()
    calls = [call(i) for i in range(2)]
    reference = [drawn(pipe, one, seed=i) for i, one in enumerate(calls)]
    before = [state(model) for model in models_of(pipe)]
    plan = fit_plan(pipe, calls, STEPS, macs=2, refinements=1)
    assert plan.macs_speedup >= 2 and plan.timesteps == tuple(timesteps_of(pipe, call(0)))
    assert plan.latents == tuple(channels_first(name, torch.empty(1, *SHAPE[name][0])).shape[1:])
    assert plan.history == HISTORY and any(plan.readouts) != (name in (*UNREAD, "qwen"))
    assert plan.scheduler == type(pipe.scheduler).__name__ and plan.guidance == scales_of(name, call(0))
    errors = []
    for own in (plan, line(name, pipe, call(0), plan.computed)):
        with apply_dqar(pipe, own):
            planned = [drawn(pipe, one, seed=i) for i, one in enumerate(calls)]
        errors.append(sum((a - b).square().mean().item() for a, b in zip(planned, reference, strict=True)))
    # Qwen-Image's plan has no kernels and reads no hidden states: a number for each cached output.
    assert errors[0] < (0.5 if name == "qwen" else 0.3) * errors[1]
    assert all(map(unchanged, models_of(pipe), before)) and "step" not in vars(pipe.scheduler)
    assert all(torch.equal(drawn(pipe, one, seed=i), reference[i]) for i, one in enumerate(calls))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("calibration")]


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_what_the_planner_follows_is_what_the_pipeline_runs(name):
    pipe, call = TINY[name]()
    calls = [call(i) for i in range(2)]
    calibration = Calibration(pipe, calls, STEPS)
    plan = calibration.plan(4, refinements=0)
    fitted = calibration.fit(tuple(sorted(plan.computed)), 2)
    reference = [drawn(pipe, one, seed=i) for i, one in enumerate(calls)]
    with apply_dqar(pipe, plan):
        planned = [drawn(pipe, one, seed=i) for i, one in enumerate(calls)]
    errors = torch.stack([(a - b).square().mean() for a, b in zip(planned, reference, strict=True)])
    torch.testing.assert_close(errors, fitted.error, rtol=0.02, atol=1e-10)


@pytest.mark.parametrize("name", TINY)
def test_a_saved_and_offloaded_pipeline_follows_the_same_plan(name, tmp_path):
    pipe, call = TINY[name]()
    plan = random_plan(name, pipe, call(0))
    with apply_dqar(pipe, plan):
        planned = drawn(pipe, call(0))
    pipe.save_pretrained(tmp_path)
    absent = {part: None for part, module in pipe.components.items() if module is None}
    loaded = type(pipe).from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    loaded.enable_model_cpu_offload(device="cpu")
    untouched = drawn(loaded, call(0))
    with apply_dqar(loaded, plan):
        assert torch.equal(drawn(loaded, call(0)), planned)
    assert torch.equal(drawn(loaded, call(0)), untouched)


@pytest.mark.parametrize("name, times", [("flux", 1), ("hunyuan_video", 1000)])
def test_embedded_guidance_beyond_what_was_fitted_is_refused_at_once(name, times, tmp_path):
    """Guidance that is an argument of the model, which HunyuanVideo is given a thousand times as large."""
    pipe, call = TINY[name]()
    calls = [{**call(i), "guidance_scale": scale} for i, scale in enumerate((3.5, 5.0))]
    plan = fit_plan(pipe, calls, STEPS, macs=2, refinements=0)
    assert plan.embedded_guidance == (3.5 * times, 5 * times) and plan.guidance == (1, 1)
    plan.save(tmp_path / "plan.json")
    assert ForecastPlan.load(tmp_path / "plan.json") == plan
    computed = []
    handle = pipe.transformer.register_forward_hook(lambda *_: computed.append(1))
    for applied in (plan, dataclasses.replace(plan, embedded_guidance=None)):
        with apply_dqar(pipe, applied):
            drawn(pipe, {**call(9), "guidance_scale": 4.0})
            computed.clear()
            if applied is plan:
                with pytest.raises(
                    ValueError, match=f"guidance={3.5 * times:g} to {5 * times:g}, .*gives it {7 * times}"
                ):
                    drawn(pipe, {**call(9), "guidance_scale": 7.0})
                assert not computed
            else:  # which doesn't say what it was made for
                drawn(pipe, {**call(9), "guidance_scale": 7.0})
                assert computed
    handle.remove()
    single = fit_plan(pipe, [{**one, "guidance_scale": 3.5} for one in calls], STEPS, macs=2, refinements=0)
    with (
        apply_dqar(pipe.to(torch.bfloat16), single),
        pytest.raises(ValueError, match="make one for this guidance_scale"),
    ):
        drawn(pipe, {**_in_bfloat16(call(9)), "guidance_scale": 3.6})


def test_models_without_embedded_guidance_are_asked_for_none():
    pipe, call = sd3()
    assert fit_plan(pipe, [call(0), call(1)], STEPS, macs=2, refinements=0).embedded_guidance is None


def test_under_model_offload_the_plan_is_the_same():
    pipe, call = flux()
    calls = [call(0), call(1)]
    plan = fit_plan(pipe, calls, STEPS, macs=2, refinements=0)
    pipe.enable_model_cpu_offload(device="cpu")
    assert fit_plan(pipe, calls, STEPS, macs=2, refinements=0) == plan


def test_what_is_recorded_is_what_the_pipeline_does():
    pipe, call = sd3()
    calibration = Calibration(pipe, [{**call(0), "generator": torch.Generator().manual_seed(7)}, call(1)], STEPS)
    assert torch.equal(calibration.trajectories[0].previous[-1], drawn(pipe, call(0), seed=7))
    assert torch.equal(calibration.trajectories[1].previous[-1], drawn(pipe, call(1), seed=1))


def test_a_plan_for_several_scales_serves_those_between_and_no_others():
    pipe, call = wan()
    calls = [{**call(i), "guidance_scale": scale} for i, scale in enumerate((2.0, 3.0, 5.0, 4.0))]
    plan = fit_plan(pipe, calls, STEPS, macs=2, refinements=0)
    assert plan.guidance == (2, 5)
    ask = {**call(9), "guidance_scale": 3.3}
    reference = drawn(pipe, ask)
    with apply_dqar(pipe, plan):
        planned = drawn(pipe, ask)
        for other in (1.5, 6.0):
            with pytest.raises(ValueError, match=f"guidance_scale=2 to 5, this run has {other:g}"):
                drawn(pipe, {**ask, "guidance_scale": other})
        with pytest.raises(ValueError, match="4 x 3 x 4 x 4 latents, these are 4 x 2 x 4 x 4"):
            drawn(pipe, {**ask, "num_frames": 5})
    with apply_dqar(pipe, extrapolation(plan.computed, plan.timesteps, 3.3, plan.model)):
        line = drawn(pipe, ask)
    assert (planned - reference).norm() < 0.5 * (line - reference).norm()


def test_a_plan_of_two_transformers_says_which_steps_and_scales_each_has(tmp_path):
    pipe, call = wan22()
    pipe.save_pretrained(tmp_path / "wan")
    loaded = type(pipe).from_pretrained(tmp_path / "wan", text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    calls = [{**call(i), "guidance_scale_2": scale} for i, scale in enumerate((3.0, 2.5, 3.0))]
    plan = fit_plan(loaded, calls, STEPS, macs=2, refinements=0)
    begins = sum(t >= 800 for t in plan.timesteps)
    assert 0 < begins < STEPS and plan.second == (begins, (4, 4), (2.5, 3)) and plan.guidance == (2.5, 4)
    plan.save(tmp_path / "plan.json")
    assert ForecastPlan.load(tmp_path / "plan.json") == plan != dataclasses.replace(plan, second=None)
    reference = drawn(loaded, call(5))
    with apply_dqar(loaded, plan):
        planned = drawn(loaded, call(5))
        with pytest.raises(ValueError, match="guidance_scale=4 at step 0, this run has 3"):
            drawn(loaded, {**call(5), "guidance_scale": 3.0})
        with pytest.raises(ValueError, match=f"guidance_scale=2.5 to 3 at step {begins}, this run has 4"):
            drawn(loaded, {**call(5), "guidance_scale_2": 4.0})
        loaded.register_to_config(boundary_ratio=0.6)
        with pytest.raises(ValueError, match=f"second transformer from step {begins} on, here another one makes step"):
            drawn(loaded, call(5))
        loaded.register_to_config(boundary_ratio=0.8)
        assert torch.equal(drawn(loaded, call(5)), planned)
    with apply_dqar(loaded, line("wan22", loaded, call(5), plan.computed)):
        straight = drawn(loaded, call(5))
    assert (planned - reference).norm() < 0.5 * (straight - reference).norm()
    with pytest.raises(ValueError, match="this is WanTransformer3DModel"):
        apply_dqar(wan()[0], plan)
    for wrong in ((0, (4, 4), (3, 3)), (STEPS, (4, 4), (3, 3)), (begins, (4, 3), (3, 3))):
        with pytest.raises(ValueError, match="second=.*a step after the first"):
            dataclasses.replace(plan, second=wrong)


def test_a_run_that_the_plan_was_not_made_for_is_refused(tmp_path):
    pipe, call = sd3_img2img()
    plan = fit_plan(pipe, [call(0), call(1)], STEPS, macs=2, refinements=0)
    plan.save(tmp_path / "plan.json")
    assert ForecastPlan.load(tmp_path / "plan.json") == plan and len(plan.timesteps) == 6
    forwards = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    refused = {
        "begin at timestep|changed what it draws|spacing": {**call(0), "strength": 1.0},
        "guidance_scale=4, this run has 2": {**call(0), "guidance_scale": 2.0},
        "is without guidance": {**call(0), "guidance_scale": 1.0},
        "8 x 8 latents, these are 8 x 16": {
            **call(0),
            "image": caption(0, 1, 3, 8, 16).clamp(-1, 1),
            "height": 8,
            "width": 16,
        },
    }
    with apply_dqar(pipe, plan):
        for text, other in refused.items():
            forwards.clear()
            with pytest.raises(ValueError, match=text):
                drawn(pipe, other)
            assert len(forwards) <= 1
        with pytest.raises(ValueError, match="another spacing|made for 6 steps"):
            drawn(pipe, call(0), steps=12)
        drawn(pipe, call(0))
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with apply_dqar(pipe, plan), pytest.raises(ValueError, match="another spacing|made for 6 steps"):
        drawn(pipe, call(0))
    with pytest.raises(ValueError, match="made for SD3Transformer2DModel.*this is FluxTransformer2DModel"):
        apply_dqar(flux()[0], plan)


def test_other_deterministic_samplers_may_follow_a_plan_and_no_stochastic_ones():
    pipe, call = TINY["hunyuan_dit"]()
    calls, config = [call(i) for i in range(3)], pipe.scheduler.config
    plan = fit_plan(pipe, calls, STEPS, macs=2, refinements=1)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    reference, errors = [drawn(pipe, one, seed=i) for i, one in enumerate(calls)], []
    for own in (plan, line("hunyuan_dit", pipe, calls[0], plan.computed)):
        with apply_dqar(pipe, own):
            planned = [drawn(pipe, one, seed=i) for i, one in enumerate(calls)]
        errors.append(sum((a - b).square().mean().item() for a, b in zip(planned, reference, strict=True)))
    assert errors[0] < 0.5 * errors[1]
    for scheduler in (
        DDPMScheduler.from_config(config),
        DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"),
    ):
        pipe.scheduler = scheduler
        with apply_dqar(pipe, plan), pytest.raises(ValueError, match=f"{type(scheduler).__name__} adds noise"):
            drawn(pipe, calls[0])


def test_what_cant_be_planned_is_said(monkeypatch):
    pipe, call = dit()
    calls = [call(0), call(1)]

    def refused(text, calls=calls, steps=STEPS, pipe=pipe, error=ValueError, **options):
        with pytest.raises(error, match=text):
            fit_plan(pipe, calls, steps, **{"macs": 2, "refinements": 0, **options})
        assert type(pipe.transformer) is before and not vars(pipe.scheduler).get("step")
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("calibration")]

    before = type(pipe.transformer)
    refused("macs=5", macs=5)
    refused("macs='2'", macs="2")
    refused("num_inference_steps=None", steps=None)
    refused("target='best'", target="best")
    refused("calls=", calls=[])
    refused("calls=", calls=["a cat"])
    refused("holds num_inference_steps", calls=[{**call(0), "num_inference_steps": 8}] * 2)
    refused("takes no argument 'prompt'", calls=[{"prompt": "a cat"}])
    refused("call 1 failed", calls=[call(0), {"class_labels": ["no class"]}])
    refused("call 0 failed before its first step", calls=[{"class_labels": [10**6]}], error=RuntimeError)
    refused("two images or more", calls=[{"class_labels": [1], "guidance_scale": 3.0}])
    refused("call 1 has other branches", calls=[call(0), {**call(0), "guidance_scale": 1.0}])
    refused("more than max_bytes", max_bytes=1000)
    applied = extrapolation((0, 1), (9, 5, 1), 1.0, describe_model(pipe.transformer))
    with apply_dqar(pipe, applied), pytest.raises(ValueError, match="taken over by DQAR already"):
        fit_plan(pipe, calls, STEPS, macs=2)
    good = pipe.scheduler
    for stochastic in (DDPMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()):
        pipe.scheduler = stochastic
        refused(f"{type(stochastic).__name__} adds noise")
    pipe.scheduler = type(good).from_config(good.config, clip_sample=True, clip_sample_range=0.01)
    refused("clip_sample=False")
    pipe.scheduler = good
    pipe.transformer.proj_out_2.bias.data[0] = float("nan")
    refused("call 0.* NaN", error=FloatingPointError)
    no_pipe = type("UNetPipeline", (), {})()
    with pytest.raises(ValueError, match="UNetPipeline has no transformer"):
        fit_plan(no_pipe, calls, STEPS)


class Stopped(KeyboardInterrupt):
    pass


def test_a_fit_that_was_stopped_goes_on_from_there(tmp_path):
    pipe, call = flux()
    calls, forwards = [call(i) for i in range(4)], []
    limit = [math.inf]

    def count(*_):
        forwards.append(1)
        if len(forwards) > limit[0]:
            raise Stopped

    pipe.transformer.register_forward_pre_hook(count)
    whole = fit_plan(pipe, calls, STEPS, macs=2, refinements=2)
    total = len(forwards)
    for stop in (3 * STEPS, 10 * STEPS):  # while recording, and while trying steps or measuring gains
        forwards.clear()
        limit[0] = stop
        with pytest.raises(KeyboardInterrupt):
            fit_plan(pipe, calls, STEPS, macs=2, refinements=2, work=tmp_path)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("calibration")]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing half written
    forwards.clear()
    limit[0] = math.inf
    assert fit_plan(pipe, calls, STEPS, macs=2, refinements=2, work=tmp_path) == whole
    assert len(forwards) < total - 4 * STEPS + 1
    forwards.clear()
    pipe.scheduler.register_to_config(_use_default_values=["another", "process's", "order"])
    assert fit_plan(pipe, calls, STEPS, macs=2, refinements=2, work=tmp_path) == whole
    assert len(forwards) == 4 * len(whole.computed)  # the last fit alone
    other = [{**calls[0], "guidance_scale": 2.0}, *calls[1:]]
    assert fit_plan(pipe, other, STEPS, macs=2, refinements=0, work=tmp_path).weights != whole.weights


def test_on_a_saved_pipeline_as_the_readme_does(tmp_path):
    pipe, call = flux()
    pipe.save_pretrained(tmp_path / "flux")
    pipe = FluxPipeline.from_pretrained(tmp_path / "flux", **dict.fromkeys(EMPTY))
    plan = fit_plan(pipe, calls=[call(i) for i in range(3)], num_inference_steps=STEPS, macs=3)
    plan.save(tmp_path / "plan.json")
    with apply_dqar(pipe, ForecastPlan.load(tmp_path / "plan.json")) as session:
        drawn(pipe, call(5))
    assert session.summary()["steps"] == STEPS and session.summary()["forecast_steps"] == STEPS - 2
