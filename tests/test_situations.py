"""What people do with a pipeline besides drawing one image after another, each against an independent truth.

The truth is the untouched pipeline (bit for bit where the gate is closed), reuse or a forecast written by hand, or a
fresh model that never was in the situation. Where a situation may be refused, ``or_refused`` says so: a ``ValueError``
before the image, in words that help.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import math
import pickle
import re
import threading
import types

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from diffusers import hooks as diffusers_hooks
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from helpers import LAYERS, NULL, draw, draw_text, make_dit, make_latte, make_pixart, randomize
from situations import (
    CLOSED,
    EVERY,
    LOOKING,
    OPEN,
    TARGETS,
    Naive,
    alone,
    caption,
    check_refusal,
    every,
    loop,
    make_plan,
    mode,
    near,
    noise,
    or_refused,
    plan_for,
    rows,
    same,
    text_forward,
    text_loop,
    timesteps_of,
    untouched,
    with_readouts,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from dqar import (
    CacheFormat,
    DQARConfig,
    DQARController,
    ForecastPlan,
    Probe,
    ReusePlan,
    apply_dqar,
    quantizer,
    remove_dqar,
    stats,
)

CPU = torch.device("cpu")
FEW = ("closed", "output", "int8", "plan")
BATCHES = ((3, 4), (1, 2))


# --- 1. offloading, and other libraries' hooks ------------------------------------------------------------------------


def offload(pipe, how, folder):
    """Everything on the CPU still puts all hooks in place; sequential and disk leave the weights on ``meta``."""
    model = pipe.transformer
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":  # the pipeline's own enable_sequential_cpu_offload trips over the VAE of this size
        accelerate.cpu_offload(model, execution_device=CPU)
    elif how == "disk":
        accelerate.disk_offload(model, folder, execution_device=CPU)
    elif how == "group by block":
        diffusers_hooks.apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    else:
        diffusers_hooks.apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


OFFLOADS = ("model", "sequential", "disk", "group by block", "group by leaf")


@pytest.mark.parametrize(
    "how, name",
    [
        *((how, name) for how in OFFLOADS for name in ("residual", "readouts")),
        *((how, name) for how in ("sequential", "disk", "group by leaf") for name in ("closed", "kv", "balanced")),
    ],
)
def test_offloaded_runs_are_those_in_memory(dit, how, name, tmp_path):
    config = mode(name, dit)
    offload(dit, how, tmp_path)
    with apply_dqar(dit, config) as session:
        for labels in BATCHES:
            got = draw(dit, labels)
            assert same(got, alone(name, labels=labels))
            if name in ("closed", "looking"):
                assert same(got, untouched(labels=labels))
    table = rows(session, "model" if "compute" not in set(rows(session).get("decision", ())) else "self_attention")
    assert table.run.nunique() == len(BATCHES)
    if name not in ("closed", "looking"):
        assert set(table[table.run == table.run.max()].decision) == {"compute", "reuse"}
    assert same(draw(dit), untouched(labels=(1, 2)))


@pytest.mark.parametrize(
    "how, name",
    [*((how, "output") for how in OFFLOADS), ("model", "closed"), ("disk", "plan"), ("group by block", "plan")],
)
def test_offloading_may_begin_while_attached(dit, how, name, tmp_path):
    """accelerate wraps whatever ``forward`` it finds."""
    with apply_dqar(dit, mode(name, dit)):
        draw(dit, (7, 8))
        offload(dit, how, tmp_path)
        for labels in BATCHES:
            assert same(draw(dit, labels), alone(name, labels=labels))
    assert same(draw(dit), untouched(labels=(1, 2)))


@pytest.mark.parametrize(
    "how, when, name",
    [
        ("model", "before", "int8"),
        ("model", "meanwhile", "plan"),
        ("sequential", "before", "plan"),
        ("sequential", "meanwhile", "int8"),
        ("sequential", "meanwhile", "closed"),
    ],
)
def test_offloading_may_end_while_attached(dit, how, when, name, tmp_path):
    config = mode(name, dit)
    if when == "before":
        offload(dit, how, tmp_path)
    with apply_dqar(dit, config):
        if when == "meanwhile":
            offload(dit, how, tmp_path)
        draw(dit, (7, 8))
        dit.remove_all_hooks()
        for labels in BATCHES:
            assert same(draw(dit, labels), alone(name, labels=labels))
    assert same(draw(dit), untouched(labels=(1, 2)))


@pytest.mark.parametrize(
    "how, name",
    [
        ("model", "kv"),
        ("sequential", "closed"),
        ("sequential", "residual"),
        ("group by leaf", "kv"),
        ("group by leaf", "plan"),
    ],
)
def test_an_offloaded_text_pipeline(pixart, how, name, tmp_path):
    config = mode(name, pixart, 6, 4.5)
    offload(pixart, how, tmp_path)
    with apply_dqar(pixart, config):
        for prompts in (("a dog",), ("a cat", "the park"), ("a dog",)):
            assert same(draw_text(pixart, prompts), alone(name, "pixart", prompts=prompts))
    assert same(draw_text(pixart, ("a dog",)), untouched("pixart", prompts=("a dog",)))


def test_offloading_stays_after_removal(dit):
    dit.enable_model_cpu_offload(device="cpu")
    with apply_dqar(dit, EVERY):
        draw(dit)
    assert hasattr(dit.transformer, "_hf_hook")
    assert same(draw(dit), untouched())


@pytest.mark.parametrize("name", ["closed", "output", "plan"])
def test_weights_kept_in_another_dtype(dit, name):
    """Layerwise casting: diffusers' own hooks on every leaf."""
    other = make_dit()
    for pipe in (dit, other):
        config = mode(name, pipe)
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = draw(other)
    with apply_dqar(dit, config):
        first, second = draw(dit), draw(dit)
    assert same(first, second) and same(first, plain) == (name == "closed")
    assert same(draw(dit), plain)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class CountingForDiffusers(diffusers_hooks.ModelHook):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Other:
    """A hook of another library's, of one of four makes, on one module."""

    def __init__(self, module, make):
        self.module, self.make = module, make
        self.hook = CountingForDiffusers() if make == "diffusers" else Counting()

    @property
    def calls(self):
        return self.hook.calls

    def put_on(self):
        if self.make == "accelerate":
            add_hook_to_module(self.module, self.hook)
        elif self.make == "diffusers":
            registry = diffusers_hooks.HookRegistry.check_if_exists_or_initialize(self.module)
            registry.register_hook(self.hook, "other")
        elif self.make == "torch":
            self.handle = self.module.register_forward_pre_hook(lambda module, args: self.count())
        else:  # as ToMe, DeepCache and many scripts do
            self.before = self.module.forward

            def forward(module, *args, **kwargs):
                self.count()
                return self.before(*args, **kwargs)

            self.module.forward = types.MethodType(forward, self.module)

    def count(self):
        self.hook.calls += 1

    def take_off(self):
        if self.make == "accelerate":
            remove_hook_from_module(self.module)
        elif self.make == "diffusers":
            self.module._diffusers_hook.remove_hook("other", recurse=False)
        elif self.make == "torch":
            self.handle.remove()
        else:
            self.module.forward = self.before


PLACES = {
    "transformer": lambda model: model,
    "block": lambda model: model.transformer_blocks[1],
    "attention": lambda model: model.transformer_blocks[1].attn1,
    "feed-forward": lambda model: model.transformer_blocks[1].ff,
}


@pytest.mark.parametrize(
    "place, on, off",
    [
        *(
            (place, *when)
            for place in ("transformer", "feed-forward")
            for when in (("before", "after"), ("mid", "mid"))
        ),
        *((place, *when) for place in ("block", "attention") for when in (("before", "meanwhile"), ("mid", "after"))),
    ],
)
@pytest.mark.parametrize("make", ["accelerate", "diffusers", "torch", "patched"])
def test_other_libraries_hooks_come_and_go(dit, place, make, on, off):
    target = "residual" if place in ("block", "feed-forward") else "output"
    other = Other(PLACES[place](dit.transformer), make)
    if on == "before":
        other.put_on()
    session = apply_dqar(dit, every(target))
    assert same(draw(dit, steps=4), alone(target, steps=4))
    if on == "mid":
        other.put_on()
        assert same(draw(dit, steps=4), alone(target, steps=4))
    assert other.calls > 0
    if off != "after":
        other.take_off()
        with or_refused():
            assert same(draw(dit, steps=4), alone(target, steps=4))
    session.remove()
    if off == "after":
        calls = other.calls
        assert same(draw(dit, steps=4), untouched(steps=4))
        assert other.calls == calls + 4, "the other library's hook is lost"
        other.take_off()
    calls = other.calls
    assert same(draw(dit, steps=4), untouched(steps=4))
    assert other.calls == calls
    with apply_dqar(dit, every(target)):
        assert same(draw(dit, steps=4), alone(target, steps=4))


def test_hooks_taken_off_recursively_while_attached(dit):
    """``remove_hook_from_module(..., recurse=True)`` is what ``remove_all_hooks`` does."""
    with apply_dqar(dit, every("residual")):
        for module in (
            dit.transformer,
            dit.transformer.transformer_blocks[0],
            dit.transformer.transformer_blocks[1].ff,
        ):
            add_hook_to_module(module, Counting())
        draw(dit)
        remove_hook_from_module(dit.transformer, recurse=True)
        assert same(draw(dit), alone("residual"))
    assert same(draw(dit), untouched())


@pytest.mark.parametrize(
    "part, when",
    [
        ("ff", "before"),
        ("norm1", "meanwhile"),
        ("attn1.to_out", "meanwhile"),
        ("attn1", "before"),
        ("attn1", "meanwhile"),
    ],
)
def test_what_anothers_hook_changes_is_changed(dit, part, when):
    """Steering, ControlNet-like adapters and probes change outputs by hooks; a closed gate lets them."""

    def change(_module, _args, output):
        return tuple(1.1 * x for x in output) if isinstance(output, tuple) else 1.1 * output

    other = make_dit()
    module = other.transformer.transformer_blocks[1].get_submodule(part)
    if part == "attn1.to_out":
        module = module[0]
    module.register_forward_hook(change)
    want = draw(other)
    module = dit.transformer.transformer_blocks[1].get_submodule(part)
    if part == "attn1.to_out":
        module = module[0]
    if when == "before":
        module.register_forward_hook(change)
    with apply_dqar(dit, CLOSED):
        if when == "meanwhile":
            draw(dit)
            module.register_forward_hook(change)
        assert same(draw(dit), want) and same(draw(dit), want)


# --- 2. the scheduler -------------------------------------------------------------------------------------------------

VARIANCE_PRESERVING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DDIMInverseScheduler",
)
OTHERS = (
    "IPNDMScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "CogVideoXDDIMScheduler",
)


def make_scheduler(name, **options):
    return getattr(diffusers, name)(**options)


@pytest.mark.parametrize("name", [*VARIANCE_PRESERVING, *OTHERS])
def test_a_closed_gate_under_every_scheduler(dit, name):
    dit.scheduler = make_scheduler(name)
    plain = loop(dit, steps=5)
    with apply_dqar(dit, CLOSED) as session:
        for _ in range(2):
            assert same(loop(dit, steps=5), plain)
    visited = dit.scheduler.timesteps.tolist()
    assert timesteps_of(session) == pytest.approx(2 * visited)
    table = rows(session)
    assert set(table.run) == {0, 1} and set(table.decision) == {"compute"}
    assert set(table.total_steps) == {len(dit.scheduler.timesteps)}


@pytest.mark.parametrize("name", [*VARIANCE_PRESERVING, *OTHERS])
def test_reuse_under_every_scheduler_is_a_naive_one(dit, name):
    """Heun, KDPM2 and PNDM call the model at one timestep twice; each of the calls is a step."""
    dit.scheduler = make_scheduler(name)
    with Naive(dit.transformer) as naive:
        want = loop(dit, steps=6, naive=naive)
    with apply_dqar(dit, EVERY) as session:
        for _ in range(2):
            assert near(loop(dit, steps=6), want)
    assert timesteps_of(session) == pytest.approx(2 * dit.scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    "name, order",
    [
        ("HeunDiscreteScheduler", 0),
        ("HeunDiscreteScheduler", 1),
        ("KDPM2DiscreteScheduler", 0),
        ("EulerDiscreteScheduler", 1),
        ("FlowMatchHeunDiscreteScheduler", 0),
        ("EDMEulerScheduler", 0),
        ("UniPCMultistepScheduler", 1),
        ("PNDMScheduler", 1),
    ],
)
def test_a_forecast_under_any_scheduler_is_one_by_hand(dit, name, order):
    dit.scheduler = make_scheduler(name)
    computed = (0, 1, 3, 5, 6)
    dit.scheduler.set_timesteps(8)
    plan = plan_for(dit.transformer, dit.scheduler.timesteps, computed, order=order)
    want = loop(dit, forecast=(computed, order))
    with apply_dqar(dit, plan) as session:
        for _ in range(2):
            assert near(loop(dit), want, 1e-3)
    table = rows(session, "model").query("run == 1 and branch == 'cond'")
    assert table[table.decision == "compute"].step.tolist() == list(computed)


@pytest.mark.parametrize("name", [*VARIANCE_PRESERVING[:14], "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_the_decks_gate_looks_under_every_scheduler(dit, name):
    """It asks for the SNR: from each scheduler in its own way, as a number that rises as noise goes."""
    dit.scheduler = make_scheduler(name)
    plain = loop(dit, steps=5)
    with apply_dqar(dit, LOOKING) as session:
        assert same(loop(dit, steps=5), plain)
    ratios = rows(session).groupby("step", sort=True).snr_schedule.first()
    assert ratios.notna().all() and (ratios >= 0).all() and ratios.is_monotonic_increasing


FLOWS = {
    "Euler": lambda: make_scheduler("FlowMatchEulerDiscreteScheduler"),
    "Euler, shifted": lambda: make_scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "Heun": lambda: make_scheduler("FlowMatchHeunDiscreteScheduler"),
    "UniPC": lambda: make_scheduler(
        "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    ),
    "DPM-Solver++": lambda: make_scheduler(
        "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True
    ),
}


@pytest.mark.parametrize("flow", FLOWS)
def test_the_snr_of_a_flow(dit, flow):
    """x_t = (1 − σ) x0 + σ ε, v = ε − x0: x0 = x_t − σ v, and the schedule's SNR is ((1 − σ) / σ)²."""
    dit.scheduler = FLOWS[flow]()
    expected, schedule = [], []

    def see(i, scaled, x, predicted):
        sigma = dit.scheduler.sigmas[i].item()
        clean = x - sigma * predicted
        expected.append(stats.snr(clean, x).item())
        schedule.append(((1 - sigma) / sigma) ** 2)

    loop(dit, see=see)
    with apply_dqar(dit, LOOKING) as session:
        loop(dit)
    table = rows(session).groupby("step", sort=True)
    assert table.snr_schedule.first().tolist() == pytest.approx(schedule, rel=1e-3, abs=1e-6)
    assert table.snr.first().tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_the_snr_of_edm(dit, name):
    """x_t = x0 + σ ε: 1 / σ², and x0 by the preconditioner.

    The contract leaves open whether σ_data counts (0.5 there: 0.25 / σ²) and in which scale ‖x_t − x0‖ is taken (the
    latents' own, or those that the model is given), so either is accepted, but one for all steps.
    """
    dit.scheduler = make_scheduler(name)
    raw, model, sigmas = [], [], []

    def see(i, scaled, x, predicted):
        sigma = dit.scheduler.sigmas[i]
        sigmas.append(sigma.item())
        clean = dit.scheduler.precondition_outputs(x, predicted, sigma)
        raw.append(stats.snr(clean, x).item())
        model.append(stats.snr(clean, x / (1 + sigma**2).sqrt()).item())

    loop(dit, see=see)
    with apply_dqar(dit, LOOKING) as session:
        loop(dit)
    table = rows(session).groupby("step", sort=True)
    schedule, traced = table.snr_schedule.first().tolist(), table.snr.first().tolist()
    assert any(schedule == pytest.approx([c / s**2 for s in sigmas], rel=1e-3) for c in (1, 0.25))
    assert any(traced == pytest.approx(snr, rel=1e-3) for snr in (raw, model))


@pytest.mark.parametrize(
    "name, kind",
    [
        ("DDIMScheduler", "v_prediction"),
        ("DPMSolverMultistepScheduler", "epsilon"),
        ("DPMSolverMultistepScheduler", "sample"),
        ("EulerDiscreteScheduler", "epsilon"),
        ("EulerDiscreteScheduler", "v_prediction"),
    ],
)
def test_the_snr_of_variance_preserving_schedulers(dit, name, kind):
    options = {"prediction_type": kind, **({"clip_sample": False} if name == "DDIMScheduler" else {})}
    dit.scheduler = make_scheduler(name, **options)
    expected, schedule = [], []

    def see(i, scaled, x, predicted):
        sigma = getattr(dit.scheduler, "sigmas", None)
        bar = (
            dit.scheduler.alphas_cumprod[int(dit.scheduler.timesteps[i])] if sigma is None else 1 / (1 + sigma[i] ** 2)
        )
        signal, rest = bar.sqrt(), (1 - bar).sqrt()
        clean = {
            "epsilon": (scaled - rest * predicted) / signal,
            "v_prediction": signal * scaled - rest * predicted,
            "sample": predicted,
        }[kind]
        expected.append(stats.snr(clean, scaled).item())
        schedule.append((bar / (1 - bar)).item())

    loop(dit, see=see)
    with apply_dqar(dit, LOOKING) as session:
        loop(dit)
    table = rows(session).groupby("step", sort=True)
    assert table.snr_schedule.first().tolist() == pytest.approx(schedule, rel=2e-3)
    assert table.snr.first().tolist() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", [*VARIANCE_PRESERVING, *OTHERS])
def test_the_signature_of_step_is_the_same_all_the_while(dit, name):
    dit.scheduler = make_scheduler(name)
    before, documentation = inspect.signature(dit.scheduler.step), dit.scheduler.step.__doc__
    session = apply_dqar(dit, EVERY if name == "IPNDMScheduler" else LOOKING)  # which tells no noise levels
    assert inspect.signature(dit.scheduler.step) == before
    for _ in range(2):
        loop(dit, steps=4)
        assert inspect.signature(dit.scheduler.step) == before and dit.scheduler.step.__doc__ == documentation
        assert dit.scheduler.step.__name__ == "step"
    session.remove()
    assert inspect.signature(dit.scheduler.step) == before and "step" not in vars(dit.scheduler)


@pytest.mark.parametrize(
    "scheduler, name",
    [
        ("DDIMScheduler", "closed"),
        ("DDIMScheduler", "output"),
        ("EulerAncestralDiscreteScheduler", "output"),
        ("DPMSolverMultistepScheduler", "closed"),
        ("DDPMScheduler", "output"),
    ],
)
def test_generators_and_eta_reach_the_scheduler_in_every_run(scheduler, name):
    def fresh():
        options = {"algorithm_type": "sde-dpmsolver++"} if scheduler == "DPMSolverMultistepScheduler" else {}
        return make_pixart(scheduler=make_scheduler(scheduler, **options))

    pipe = fresh()
    with apply_dqar(pipe, mode(name, pipe, 6, 4.5)):
        want = draw_text(pipe, eta=0.7)
    pipe = fresh()
    plain = draw_text(pipe, eta=0.7)
    assert same(want, plain) == (name in ("closed", "looking"))
    with apply_dqar(pipe, mode(name, pipe, 6, 4.5)):
        for _ in range(2):
            torch.rand(3)  # the global generator's state must not matter
            assert same(draw_text(pipe, eta=0.7), want)
    assert same(draw_text(pipe, eta=0.7), plain)


def test_step_called_by_keywords_alone(dit):
    def run():
        dit.scheduler.set_timesteps(5)
        x = noise(0)
        with torch.no_grad():
            for t in dit.scheduler.timesteps:
                predicted = dit.transformer(x, timestep=t.expand(1), class_labels=torch.tensor([1]), return_dict=False)[
                    0
                ]
                x = dit.scheduler.step(sample=x, timestep=t, model_output=predicted[:, :4], return_dict=False)[0]
        return x

    plain = run()
    for config in (CLOSED, LOOKING):
        with apply_dqar(dit, config) as session:
            assert same(run(), plain) and same(run(), plain)
        assert rows(session).run.nunique() == 2
    with apply_dqar(dit, EVERY):
        assert same(run(), run())


def twin(scheduler, how):
    if how == "pickle":
        return pickle.loads(pickle.dumps(scheduler))
    if how == "from_config":
        return type(scheduler).from_config(scheduler.config)
    return (copy.deepcopy if how == "deepcopy" else copy.copy)(scheduler)


@pytest.mark.parametrize(
    "name, how",
    [
        ("EulerDiscreteScheduler", "deepcopy"),
        ("EulerDiscreteScheduler", "copy"),
        ("DPMSolverMultistepScheduler", "copy"),
        ("DPMSolverMultistepScheduler", "pickle"),
        ("DPMSolverMultistepScheduler", "from_config"),
    ],
)
def test_a_copied_scheduler_with_a_state_is_on_its_own(name, how):
    """Their step index and history show on whom a copy's ``step`` acts, while dqar is there and after."""
    dit, other = make_dit(scheduler=make_scheduler(name)), make_dit(5, scheduler=make_scheduler(name))
    want, plain = loop(other, steps=5), loop(dit)
    session = apply_dqar(dit, LOOKING)
    loop(dit)
    length = len(session.trace)
    copied = twin(dit.scheduler, how)
    for _ in range(2):
        dit.scheduler.set_timesteps(8)
        assert same(loop(other, steps=5, scheduler=copied), want)
        assert dit.scheduler.step_index is None, "the copy steps the original"
        assert len(session.trace) == length
        session.remove()
    assert same(loop(dit), plain)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_scheduler_copied_in_mid_run_goes_on_by_itself(how):
    dit = make_dit(scheduler=DPMSolverMultistepScheduler())
    want = loop(dit)
    with apply_dqar(dit, CLOSED), torch.no_grad():
        dit.scheduler.set_timesteps(8)
        x = noise(0)
        for i, t in enumerate(dit.scheduler.timesteps):
            if i == 4:
                dit.scheduler = twin(dit.scheduler, how)
            labels = torch.tensor([1, NULL])
            c, u = dit.transformer(torch.cat([x, x]), timestep=t.expand(2), class_labels=labels).sample[:, :4].chunk(2)
            x = dit.scheduler.step(u + 3.0 * (c - u), t, x).prev_sample
    assert same(x, want)


@pytest.mark.parametrize("name", FEW)
def test_another_scheduler_between_runs(dit, name):
    """``pipe.scheduler = X.from_config(pipe.scheduler.config)``, the documented way."""
    others = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
    first = dit.scheduler
    config = mode(name, dit)
    with apply_dqar(dit, config) as session:
        draw(dit)
        for other in others:
            dit.scheduler = getattr(diffusers, other).from_config(first.config)
            fresh = make_dit(scheduler=getattr(diffusers, other).from_config(first.config))
            with or_refused() as outcome:
                got = draw(dit)
            if outcome.refused:
                assert name == "plan"
                continue
            if name == "plan":  # allowed where the timesteps are the plan's own
                assert got.isfinite().all()
                continue
            with apply_dqar(fresh, config):
                assert same(got, draw(fresh))
            assert timesteps_of(session)[-8:] == pytest.approx(dit.scheduler.timesteps.tolist())
        dit.scheduler = first
        assert same(draw(dit), alone(name))
    assert "step" not in vars(first) and "step" not in vars(dit.scheduler)


def test_a_schedulers_subclass_with_a_step_of_its_own(dit):
    class Louder(DDIMScheduler):
        def step(self, model_output, timestep, sample, louder=1.01, **kwargs):
            return super().step(louder * model_output, timestep, sample, **kwargs)

    dit.scheduler = Louder.from_config(dit.scheduler.config)
    signature, plain = inspect.signature(dit.scheduler.step), loop(dit)
    with apply_dqar(dit, CLOSED):
        assert same(loop(dit), plain) and same(loop(dit), plain)
        assert inspect.signature(dit.scheduler.step) == signature
    with Naive(dit.transformer) as naive:
        want = loop(dit, naive=naive)
    with apply_dqar(dit, EVERY):
        assert near(loop(dit), want)


def test_a_step_wrapped_by_someone_else_meanwhile(dit):
    """Whoever wraps ``step`` while dqar is there (a logger) keeps the wrapper, in either order of removal."""
    plain, calls = draw(dit), []

    def logged(original):
        def step(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs)

        return step

    session = apply_dqar(dit, LOOKING)
    draw(dit)
    own = dit.scheduler.step = logged(dit.scheduler.step)
    assert same(draw(dit), plain) and len(calls) == 8
    session.remove()
    assert dit.scheduler.step is own
    assert same(draw(dit), plain) and len(calls) == 16


@pytest.mark.parametrize("name", ["closed", "output", "plan"])
def test_a_pipeline_per_request(dit, name):
    """A server's way: the components shared, the scheduler copied, a pipeline object a request."""
    want = alone(name)
    with apply_dqar(dit, mode(name, dit)):
        for labels in ((5, 6), (1, 2), (1, 2)):
            request = DiTPipeline(dit.transformer, dit.vae, copy.deepcopy(dit.scheduler))
            request.set_progress_bar_config(disable=True)
            with or_refused() as outcome:
                got = draw(request, labels)
            assert not (outcome.refused and name == "closed")
            if labels == (1, 2) and not outcome.refused:
                assert same(got, want) or same(got, untouched())
        assert same(draw(dit), want)
    assert same(draw(dit), untouched())


def test_pipelines_made_from_one_another(dit):
    """``from_pipe`` shares the components, the scheduler object too."""
    with apply_dqar(dit, EVERY):
        want = draw(dit)
        other = DiTPipeline(**dit.components)
        other.set_progress_bar_config(disable=True)
        assert same(draw(other), want) and same(draw(dit), want)


# --- 3. which step is it? ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target, start", [("kv", 1), ("kv", 3), ("residual", 3), ("residual", 7)])
def test_reuse_in_a_run_that_starts_late(dit, start, target):
    """Image to image: the first call computes, its step is the schedule's own."""
    with Naive(dit.transformer, target) as naive:
        want = loop(dit, start=start, naive=naive)
    with apply_dqar(dit, every(target)) as session:
        draw(dit)
        assert near(loop(dit, start=start), want)
        assert same(draw(dit), alone(target))
        assert near(loop(dit, start=start), want)
    late = rows(session).query("run == 1")
    assert sorted(set(late.step)) == list(range(start, 8)) and set(late.total_steps) == {8}
    assert late.groupby("step").timestep.first().tolist() == dit.scheduler.timesteps[start:].tolist()


def test_the_schedule_of_a_run_that_starts_late_is_that_of_its_steps(dit):
    """``static``: every second step of the schedule computes, not every second call."""
    with Naive(dit.transformer, reused={5, 7}) as naive:
        want = loop(dit, start=3, naive=naive)
    with apply_dqar(dit, every(schedule="static")):
        assert near(loop(dit, start=3), want)


@pytest.mark.parametrize("start", [2, 3, 5])
def test_a_forecast_in_a_run_that_starts_late(dit, start):
    """Step 2 of (0, 2, 3, 7) computes; at 5 there is nothing to forecast from."""
    with apply_dqar(dit, make_plan(dit)) as session, or_refused() as outcome:
        got = loop(dit, start=start)
    if not outcome.refused:
        decisions = rows(session, "model").query("branch == 'cond'").set_index("step").decision
        assert sorted(decisions.index) == list(range(start, 8))
        assert decisions[start] == "compute", "forecast from nothing"
        assert {7} <= set(decisions.index[decisions == "compute"])
        if start != 5:
            assert near(got, loop(dit, start=start, forecast=((2, 3, 7), 1)), 1e-3)


@pytest.mark.parametrize(
    "name, then",
    [
        ("closed", {"start": 3}),
        *(
            ("kv", then)
            for then in ({}, {"labels": lambda i: 2}, {"steps": 6}, {"start": 3}, {"start": 4}, {"seed": 4})
        ),
        ("residual", {}),
        ("residual", {"labels": lambda i: 2}),
    ],
)
def test_a_run_stopped_early_leaves_nothing_to_the_next(dit, name, then):
    with apply_dqar(dit, mode(name, dit)):
        want = loop(dit, **then)
    with apply_dqar(dit, mode(name, dit)) as session:
        for stop in (1, 3):
            loop(dit, seed=9, stop=stop)
            assert same(loop(dit, **then), want)
    assert rows(session).run.nunique() == 4


@pytest.mark.parametrize("then", [{}, {"labels": lambda i: 2}, {"seed": 4}])
def test_a_planned_run_stopped_early_leaves_nothing_to_the_next(dit, then):
    plan = with_readouts(make_plan(dit), dit.transformer)
    with apply_dqar(dit, plan):
        want = loop(dit, **then)
    with apply_dqar(dit, plan):
        for stop in (1, 2, 3, 5):
            loop(dit, seed=9, stop=stop)
            assert same(loop(dit, **then), want)


def test_the_same_labels_object_and_latents_shape_after_a_stop_by_the_pipeline(pixart):
    """A callback that raises is how people stop PixArt."""

    class Stop(Exception):
        pass

    def stop(i, _t, _latents):
        if i == 2:
            raise Stop

    with apply_dqar(pixart, EVERY):
        with pytest.raises(Stop):
            draw_text(pixart, seed=3, callback=stop)
        assert same(draw_text(pixart), alone("output", "pixart"))


@pytest.mark.parametrize("name", ["closed", "output", "plan"])
def test_several_runs_on_one_list_of_timesteps(dit, name):
    """``set_timesteps`` once, then many images; a stopped one among them."""
    with apply_dqar(dit, mode(name, dit)):
        want = [loop(dit, seed=seed) for seed in (0, 1)]
    dit.scheduler.set_timesteps(8)
    timesteps = dit.scheduler.timesteps
    with apply_dqar(dit, mode(name, dit)) as session:
        assert same(loop(dit, timesteps=timesteps, seed=0), want[0])
        assert same(loop(dit, timesteps=timesteps, seed=1), want[1])
        loop(dit, timesteps=timesteps[:3], seed=2)
        assert same(loop(dit, timesteps=timesteps, seed=0), want[0])
    assert rows(session, "model" if name == "plan" else "self_attention").run.nunique() == 4


@pytest.mark.parametrize("name", ["closed", "output"])
def test_custom_timesteps(name):
    """PixArt hands them on to ``set_timesteps``."""
    given = [950, 800, 790, 400, 120, 7]

    def fresh():
        return make_pixart(scheduler=DPMSolverMultistepScheduler())

    plain, pipe = draw_text(fresh(), timesteps=given), fresh()
    with apply_dqar(pipe, mode(name, pipe)) as session:
        first = draw_text(pipe, timesteps=given)
        assert same(draw_text(pipe, timesteps=given), first)
    assert same(first, plain) == (name == "closed")
    assert timesteps_of(session) == 2 * given


def test_timesteps_assigned_to_the_scheduler(dit):
    """``scheduler.timesteps = scheduler.timesteps[4:]``: what some image-to-image scripts do."""

    def run():
        dit.scheduler.set_timesteps(8)
        dit.scheduler.timesteps = dit.scheduler.timesteps[4:]
        return loop(dit, timesteps=dit.scheduler.timesteps)

    plain = run()
    with Naive(dit.transformer) as naive:
        dit.scheduler.set_timesteps(8)
        want = loop(dit, timesteps=dit.scheduler.timesteps[4:], naive=naive)
    with apply_dqar(dit, CLOSED) as session:
        assert same(run(), plain) and same(run(), plain)
    assert timesteps_of(session) == 2 * dit.scheduler.timesteps.tolist()
    with apply_dqar(dit, EVERY):
        assert near(run(), want) and near(run(), want)


@pytest.mark.parametrize("name", ["closed", "looking", "output", "plan"])
def test_timesteps_that_the_scheduler_does_not_have(dit, name):
    """Refused, computed in full, or reused in the order of the calls: nothing else is right."""
    plan = mode(name, dit)
    foreign = torch.tensor([990, 777, 555, 333, 111])
    dit.scheduler.set_timesteps(8)
    plain = loop(dit, timesteps=foreign)
    with Naive(dit.transformer, reused={2, 3, 4}) as naive:  # the first two tell how many there are
        reused = loop(dit, timesteps=foreign, naive=naive)
    with apply_dqar(dit, plan) as session:
        for _ in range(2):
            dit.scheduler.set_timesteps(8)
            with or_refused() as outcome:
                got = loop(dit, timesteps=foreign)
            assert not (outcome.refused and name in ("closed", "looking"))
            if not outcome.refused:
                assert same(got, plain) or (name == "output" and near(got, reused))
                if name in ("closed", "looking"):
                    assert set(rows(session).timestep) == set(foreign.tolist())
        assert same(draw(dit), alone(name))


def test_timesteps_given_as_numbers_floats_and_other_dtypes(dit):
    """A model doesn't mind whether t is int64, float32 or a view of one number."""
    dit.scheduler.set_timesteps(8)
    for cast in (lambda t: t.float(), lambda t: t.to(torch.int32), lambda t: t):

        def run(cast=cast):
            x = noise(0)
            with torch.no_grad():
                for t in dit.scheduler.timesteps:
                    out = dit.transformer(x, timestep=cast(t).reshape(1), class_labels=torch.tensor([1])).sample[:, :4]
                    x = dit.scheduler.step(out, t, x).prev_sample
            return x

        plain = run()
        with Naive(dit.transformer):
            want = run()
        with apply_dqar(dit, CLOSED) as session:
            assert same(run(), plain)
        assert timesteps_of(session) == dit.scheduler.timesteps.tolist()
        with apply_dqar(dit, EVERY):
            assert near(run(), want)


@pytest.mark.parametrize("name", ["closed", "kv", "int8", "readouts"])
def test_batches_and_numbers_of_steps_change_between_runs(dit, name):
    with apply_dqar(dit, mode(name, dit)):
        for labels in ((1,), (1, 2, 3), (1, 2), (1,)):
            assert same(draw(dit, labels), alone(name, labels=labels))
        if name not in ("plan", "readouts"):
            for steps in (5, 8, 3):
                assert same(draw(dit, steps=steps), alone(name, steps=steps))
            assert same(draw(dit, guidance=1.0), alone(name, guidance=1.0))
            assert same(draw(dit, guidance=7.5), alone(name, guidance=7.5))


@pytest.mark.parametrize("name", ["closed", *TARGETS])
def test_sizes_change_between_runs(pixart, name):
    with apply_dqar(pixart, mode(name, pixart)):
        for size in (8, 16, 8):
            got = draw_text(pixart, height=size, width=size)
            assert same(got, alone(name, "pixart", height=size, width=size))
    with apply_dqar(pixart, mode(name, pixart)):
        for shape in ((8, 16), (16, 8)):
            assert same(
                draw_text(pixart, height=shape[0], width=shape[1]),
                alone(name, "pixart", height=shape[0], width=shape[1]),
            )


@pytest.mark.parametrize("target, change", [("kv", 3), ("kv", 4), ("residual", 6)])
def test_reuse_goes_on_at_its_step_when_the_class_changes(dit, target, change):
    """Prompt travel: the cache may serve on or begin anew, but the step is the step."""

    def labels(i):
        return 1 if i < change else 2

    plain, allowed = loop(dit, labels), []
    for anew in (False, True):
        with Naive(dit.transformer, target) as naive:

            def at(i, caller="", naive=naive, anew=anew, note=naive.at):
                note(i, caller)
                if anew and i == change:
                    naive.forget()

            naive.at = at
            allowed.append(loop(dit, labels, naive=naive))
    with apply_dqar(dit, every(target)) as session, or_refused() as outcome:
        got = loop(dit, labels)
    if not outcome.refused:
        assert any(near(got, want) for want in allowed)
        assert timesteps_of(session) == dit.scheduler.timesteps.tolist()
    with apply_dqar(dit, CLOSED) as session:
        assert same(loop(dit, labels), plain)
    assert timesteps_of(session) == dit.scheduler.timesteps.tolist()


@pytest.mark.parametrize("ramp", ["jump", "line", "down", "last step"])
def test_a_forecast_follows_guidance_that_changes_or_refuses(dit, ramp):
    scale = {
        "jump": lambda i: 3.0 if i < 5 else 6.0,
        "line": lambda i: 3.0 + 0.5 * i,
        "down": lambda i: 3.0 - 0.25 * i,
        "last step": lambda i: 3.0 if i < 7 else 6.0,
    }[ramp]
    full, flat = loop(dit, guidance=scale), loop(dit)
    with apply_dqar(dit, make_plan(dit, (0, 1, 2, 3, 4, 6))), or_refused() as outcome:
        got = loop(dit, guidance=scale)
    if not outcome.refused:
        assert (got - full).norm() < 0.5 * (got - flat).norm()


@pytest.mark.parametrize("target", TARGETS)
def test_reuse_minds_no_scale(dit, target):
    """Reuse is by branch: guidance of any course is only applied to it."""

    def ramp(i):
        return 3.0 + i

    with Naive(dit.transformer, target) as naive:
        want = loop(dit, guidance=ramp, naive=naive)
    with apply_dqar(dit, every(target)) as session:
        assert near(loop(dit, guidance=ramp), want)
    assert rows(session).run.nunique() == 1


INTERVALS = {
    "off at 3": lambda i: 3.0 if i < 3 else None,
    "off at 4": lambda i: 3.0 if i < 4 else None,
    "on at 3": lambda i: None if i < 3 else 3.0,
    "in the middle": lambda i: 3.0 if 2 <= i < 6 else None,
    "alternating": lambda i: 3.0 if i % 2 else None,
}


@pytest.mark.parametrize("interval", INTERVALS)
def test_guidance_in_an_interval_through_a_closed_gate(dit, interval):
    plain = loop(dit, guidance=INTERVALS[interval])
    for config in (CLOSED, LOOKING):
        with apply_dqar(dit, config) as session:
            for _ in range(2):
                assert same(loop(dit, guidance=INTERVALS[interval]), plain)
        table = rows(session)
        assert timesteps_of(session) == 2 * dit.scheduler.timesteps.tolist()
        guided = {step for step in range(8) if INTERVALS[interval](step) is not None}
        assert set(table[table.branch == "uncond"].step) == guided
        assert set(table[table.branch == "cond"].step) == set(range(8))


@pytest.mark.parametrize(
    "target, interval",
    [*(("kv", interval) for interval in INTERVALS), ("block", "off at 3"), ("block", "in the middle")],
)
def test_guidance_in_an_interval_reuses_each_branch_by_itself(dit, target, interval):
    """By hand: a cache a branch that goes on, or one that begins anew whenever guidance comes or goes."""
    scale, allowed = INTERVALS[interval], []
    for forget in (None, "both", "uncond"):
        with Naive(dit.transformer, target) as naive:

            def at(i, caller="", naive=naive, forget=forget, note=naive.at, done=set()):  # noqa: B006
                note(i, caller)
                if i and (scale(i) is None) != (scale(i - 1) is None) and i not in done:
                    done.add(i)
                    if forget == "both":
                        naive.forget()
                    elif forget == "uncond":
                        naive.kept = {key: value for key, value in naive.kept.items() if key[1] != "uncond"}

            naive.at = at
            allowed.append(loop(dit, guidance=scale, calls="cond first", naive=naive))
    with apply_dqar(dit, every(target)), or_refused() as outcome:
        got = loop(dit, guidance=scale)
    if not outcome.refused:
        assert any(near(got, want) for want in allowed)


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_forecast_refuses_guidance_that_comes_and_goes_or_is_right(dit, interval):
    """The plan's weights make guided outputs of two branches."""
    scale = INTERVALS[interval]
    full = loop(dit, guidance=scale)
    with apply_dqar(dit, make_plan(dit, (0, 1, 2, 3, 4, 6))), or_refused() as outcome:
        got = loop(dit, guidance=scale)
    if not outcome.refused:
        assert (got - full).norm() < 0.5 * (got - loop(dit)).norm()


# Several calls a step.


@torch.no_grad()
def windows(pipe, seeds, sizes=None, order=None, steps=8, naive=None, labels=None, guided=False):
    """Independent pictures denoised side by side, a call each a step: what tiles and micro-batches are to the model."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    sizes = sizes or [(1, 8)] * len(seeds)
    labels = labels or [1] * len(seeds)
    parts = [noise(seed, n, 4, size, size) for seed, (n, size) in zip(seeds, sizes, strict=True)]
    for i, t in enumerate(scheduler.timesteps):
        outputs = {}
        for k in order(i) if order else range(len(parts)):
            if naive is not None:
                naive.at(i, k)
            x = torch.cat([parts[k], parts[k]]) if guided else parts[k]
            classes = [labels[k]] * len(parts[k]) + [NULL] * (len(x) - len(parts[k]))
            out = pipe.transformer(x, timestep=t.expand(len(x)), class_labels=torch.tensor(classes)).sample[:, :4]
            if guided:
                c, u = out.chunk(2)
                out = u + 3.0 * (c - u)
            outputs[k] = out
        together = torch.cat([outputs[k].flatten() for k in range(len(parts))])
        latents = torch.cat([x.flatten() for x in parts])
        shape = (1, 4, -1, 8)
        new = scheduler.step(together.view(shape), t, latents.view(shape)).prev_sample.flatten()
        parts = [new_part.view_as(x) for new_part, x in zip(new.split([x.numel() for x in parts]), parts, strict=True)]
    return parts


WINDOWS = {
    "two": {"seeds": (1, 2)},
    "three": {"seeds": (1, 2, 3)},
    "two, guided": {"seeds": (1, 2), "guided": True},
    "two sizes": {"seeds": (1, 2), "sizes": [(1, 8), (1, 16)]},
    "micro-batches": {"seeds": (1, 2), "sizes": [(2, 8), (2, 8)]},
    "micro-batches and a rest": {"seeds": (1, 2), "sizes": [(2, 8), (1, 8)]},
    "micro-batches and a rest, guided": {"seeds": (1, 2), "sizes": [(2, 8), (1, 8)], "guided": True},
    "two classes": {"seeds": (1, 2), "labels": [1, 2]},
    "one class a picture, guided": {"seeds": (1, 2, 3), "labels": [1, 2, 1], "guided": True},
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_several_calls_a_step_through_a_closed_gate(dit, kind):
    plain = windows(dit, **WINDOWS[kind])
    for config in (CLOSED, LOOKING):
        with apply_dqar(dit, config) as session:
            for _ in range(2):
                assert all(map(same, windows(dit, **WINDOWS[kind]), plain))
        assert rows(session).run.nunique() == 2 and set(rows(session).step) == set(range(8))
        assert timesteps_of(session) == 2 * dit.scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "kind, target",
    [*((kind, "output") for kind in WINDOWS), ("three", "kv"), ("micro-batches and a rest, guided", "kv")],
)
def test_each_of_several_calls_a_step_gets_its_own_result(dit, kind, target):
    with Naive(dit.transformer, target) as naive:
        want = windows(dit, **WINDOWS[kind], naive=naive)
    plain = windows(dit, **WINDOWS[kind])
    with apply_dqar(dit, every(target)):
        for _ in range(2):
            with or_refused() as outcome:
                got = windows(dit, **WINDOWS[kind])
            if not outcome.refused:  # each reused by itself, or computed in full
                assert all(map(near, got, want)) or all(map(same, got, plain))
        assert same(draw(dit), alone(target))


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_forecast_of_several_calls_a_step_is_each_ones_own(dit, kind):
    options = WINDOWS[kind]
    plan = make_plan(dit, (0, 2, 4, 6), guidance=3.0 if options.get("guided") else 1.0, order=0)
    plain = windows(dit, **options)
    with apply_dqar(dit, plan), or_refused() as outcome:
        got = windows(dit, **options)
    if not outcome.refused:
        for k, (mine, truth) in enumerate(zip(got, plain, strict=True)):
            others = [other for j, other in enumerate(plain) if j != k and other.shape == mine.shape]
            assert all((mine - truth).norm() < (mine - other).norm() for other in others)


@pytest.mark.parametrize(
    "kind, name",
    [("two", "output"), ("three", "kv"), ("three", "plan"), ("two classes", "output"), ("two classes", "plan")],
)
def test_windows_whose_order_changes_get_their_own_results_or_are_refused(dit, kind, name):
    """Boustrophedon or random tiles. Unsure how far the contract goes: counting the calls of a step is not enough."""
    options = WINDOWS[kind]
    config = make_plan(dit, (0, 2, 4, 6), guidance=1.0, order=0) if name == "plan" else every(name)

    def back_and_forth(i):
        numbers = range(len(options["seeds"]))
        return numbers if i % 2 else reversed(numbers)

    plain = windows(dit, **options)
    with apply_dqar(dit, CLOSED):
        assert all(map(same, windows(dit, **options, order=back_and_forth), plain))
    with apply_dqar(dit, config), or_refused() as outcome:
        got = windows(dit, **options, order=back_and_forth)
    if not outcome.refused:
        for k, mine in enumerate(got):
            assert all((mine - plain[k]).norm() < (mine - o).norm() for j, o in enumerate(plain) if j != k)


def test_windows_whose_number_changes(dit):
    """A tile is left out at some steps. Closed: the same; open: finite, and nothing stays for the next run."""

    @torch.no_grad()
    def run():
        dit.scheduler.set_timesteps(8)
        x = [noise(1), noise(2), noise(3)]
        for i, t in enumerate(dit.scheduler.timesteps):
            for k in range(3 if i % 3 else 2):
                out = dit.transformer(x[k], timestep=t.expand(1), class_labels=torch.tensor([1])).sample[:, :4]
                x[k] = x[k] - 0.1 * out
            dit.scheduler.step(torch.zeros_like(x[0]), t, x[0])
        return torch.cat(x)

    plain = run()
    with apply_dqar(dit, CLOSED):
        assert same(run(), plain)
    with apply_dqar(dit, EVERY):
        with or_refused():
            assert run().isfinite().all()
        assert same(draw(dit), alone("output"))


@pytest.mark.parametrize(
    "target, calls",
    [("kv", "cond first"), ("output", "uncond first"), ("block", "cond first"), ("residual", "uncond first")],
)
def test_guidance_by_two_calls_is_guidance_in_a_batch(dit, target, calls):
    plain = loop(dit, calls=calls)
    with apply_dqar(dit, CLOSED) as session:
        for _ in range(2):
            assert same(loop(dit, calls=calls), plain)
    table = rows(session)
    assert set(table.run) == {0, 1} and set(table.step) == set(range(8)) and len(table) == 2 * 8 * LAYERS * 2
    assert timesteps_of(session) == 2 * dit.scheduler.timesteps.tolist()
    with Naive(dit.transformer, target) as naive:
        want = loop(dit, naive=naive)
    with apply_dqar(dit, every(target)) as session:
        for _ in range(2):
            assert near(loop(dit, calls=calls), want)
    table = rows(session)
    assert len(table) == 2 * 8 * LAYERS * 2 and table.groupby("branch").size().to_dict() == dict.fromkeys(
        ("cond", "uncond"), 16 * LAYERS
    )
    assert (table.decision == "reuse").mean() == 6 / 8


def test_the_branches_of_two_calls_are_told_by_the_null_class(dit):
    """The entropy traced for each branch is the same whichever call comes first."""
    tables = []
    for calls in ("both", "cond first", "uncond first"):
        with apply_dqar(dit, DQARConfig(schedule="none", probe=Probe(record=True))) as session:
            loop(dit, calls=calls)
        tables.append(rows(session).set_index(["step", "layer", "branch"]).entropy.sort_index())
    for other in tables[1:]:
        assert other.index.equals(tables[0].index)
        assert other.tolist() == pytest.approx(tables[0].tolist(), rel=1e-4)


@pytest.mark.parametrize("calls", ["cond first", "uncond first"])
def test_a_forecast_of_guidance_by_two_calls(dit, calls):
    want = loop(dit, forecast=((0, 2, 3, 7), 1))
    with apply_dqar(dit, make_plan(dit)) as session, or_refused() as outcome:
        assert near(loop(dit, calls=calls), want, 1e-3)
        assert near(loop(dit, calls=calls), want, 1e-3)
    if not outcome.refused:
        assert rows(session, "model").run.nunique() == 2


@pytest.mark.parametrize(
    "target, negative, calls",
    [
        ("kv", "", "cond first"),
        ("kv", "the big park", "both"),
        ("kv", "the big park", "uncond first"),
        ("block", "", "uncond first"),
        ("block", "the big park", "cond first"),
    ],
)
def test_captions_guided_by_two_calls(pixart, target, negative, calls):
    """There is no null class: nothing but the captions tells the branches apart."""
    given = {"cond": caption(pixart, "two red dog"), "uncond": caption(pixart, negative)}
    plain = text_loop(pixart, lambda i: given, calls=calls)
    with apply_dqar(pixart, CLOSED) as session:
        for _ in range(2):
            assert same(text_loop(pixart, lambda i: given, calls=calls), plain)
    assert timesteps_of(session) == 2 * pixart.scheduler.timesteps.tolist()
    with Naive(pixart.transformer, target) as naive:
        want = text_loop(pixart, lambda i: given, naive=naive)
    with apply_dqar(pixart, every(target)) as session:
        for _ in range(2):
            assert near(text_loop(pixart, lambda i: given, calls=calls), want)
    assert rows(session).run.nunique() == 2 and (rows(session).decision == "reuse").mean() == 4 / 6


@pytest.mark.parametrize(
    "target, layout",
    [("kv", "three calls"), ("kv", "a batch of three"), ("residual", "three calls"), ("residual", "two and one")],
)
def test_guidance_by_three_predictions(dit, target, layout):
    """Perturbed attention, InstructPix2Pix, a second negative prompt: more than two branches a step."""
    groups = {"three calls": ((0,), (1,), (2,)), "a batch of three": ((0, 1, 2),), "two and one": ((0, 1), (2,))}[
        layout
    ]

    @torch.no_grad()
    def run(naive=None):
        dit.scheduler.set_timesteps(8)
        x, classes = noise(0), (NULL, 1, 2)
        for i, t in enumerate(dit.scheduler.timesteps):
            out = []
            for group in groups:
                if naive is not None:
                    naive.at(i, group)
                n, labels = len(group), torch.tensor([classes[k] for k in group])
                out.append(
                    dit.transformer(x.repeat(n, 1, 1, 1), timestep=t.expand(n), class_labels=labels).sample[:, :4]
                )
            none, one, two = torch.cat(out).split(1)
            x = dit.scheduler.step(none + 2.0 * (one - none) - 1.5 * (two - none), t, x).prev_sample
        return x

    plain = run()
    with apply_dqar(dit, CLOSED) as session:
        assert same(run(), plain) and same(run(), plain)
    assert timesteps_of(session) == 2 * dit.scheduler.timesteps.tolist()
    with Naive(dit.transformer, target) as naive:
        want = run(naive)
    with apply_dqar(dit, every(target)), or_refused():
        got = run()
        assert near(got, want) or same(got, plain)


@pytest.mark.parametrize(
    "name, own_scheduler", [("closed", True), ("closed", False), ("kv", True), ("kv", False), ("residual", True)]
)
def test_two_pictures_denoised_in_turn_are_independent(dit, name, own_scheduler):
    """One loop, a step of this picture and a step of that, each with a ``scheduler.step`` of its own."""

    def run(first_seed, first_label):
        schedulers = [dit.scheduler, copy.deepcopy(dit.scheduler) if own_scheduler else dit.scheduler]
        for scheduler in schedulers:
            scheduler.set_timesteps(8)
        x, labels = [noise(first_seed), noise(5)], (first_label, 2)
        with torch.no_grad():
            for t in dit.scheduler.timesteps:
                for k in (0, 1):
                    classes = torch.tensor([labels[k]])
                    out = dit.transformer(x[k], timestep=t.expand(1), class_labels=classes).sample[:, :4]
                    x[k] = schedulers[k].step(out, t, x[k]).prev_sample
        return x

    plain = run(1, 1)
    with apply_dqar(dit, mode(name, dit)):
        with or_refused() as outcome:
            seen = [run(seed, label)[1] for seed, label in ((1, 1), (1, 2), (8, 3))]
            if name == "closed":
                assert all(map(same, run(1, 1), plain))
            else:
                assert same(seen[0], seen[1]) and same(seen[0], seen[2]), "one picture is seen in the other"
        assert not (outcome.refused and name == "closed")
        assert same(draw(dit), alone(name))


@pytest.mark.parametrize("name", ["closed", "output", "kv"])
def test_two_pipelines_with_schedulers_of_their_own_on_one_transformer(dit, name):
    """In turn, of different numbers of steps and samplers: each is as it is alone."""
    other = DiTPipeline(dit.transformer, dit.vae, DPMSolverMultistepScheduler())
    other.set_progress_bar_config(disable=True)
    plain = draw(other, (3,), steps=5)
    with apply_dqar(dit, mode(name, dit)):
        want = draw(other, (3,), steps=5)
        assert same(want, plain) or name != "closed"
    with apply_dqar(dit, mode(name, dit)) as session:
        for _ in range(2):
            assert same(draw(dit), alone(name))
            assert same(draw(other, (3,), steps=5), want)
        if name == "closed":
            mine, its = dit.scheduler.timesteps.tolist(), other.scheduler.timesteps.tolist()
            assert timesteps_of(session) == pytest.approx(2 * (mine + its))


def test_a_plan_is_for_its_own_pipeline_and_steps(dit):
    other = DiTPipeline(dit.transformer, dit.vae, copy.deepcopy(dit.scheduler))
    other.set_progress_bar_config(disable=True)
    with apply_dqar(dit, make_plan(dit)):
        with pytest.raises(ValueError) as refused:
            draw(other, steps=5)
        check_refusal(refused.value)
        with or_refused():
            got = draw(other)
            assert same(got, alone("plan")) or same(got, untouched())
        assert same(draw(dit), alone("plan"))


# A transformer without a pipeline.


@pytest.mark.parametrize(
    "name, kind",
    [
        ("closed", "uncond first"),
        ("kv", "both"),
        ("kv", "cond first"),
        ("kv", "uncond first"),
        ("residual", "cond first"),
    ],
)
def test_a_bare_transformer_guided_either_way(dit, name, kind):
    plain = loop(dit, calls=kind)
    with apply_dqar(dit.transformer, mode(name, dit)) as session:
        first = loop(dit, calls=kind)
        for _ in range(2):
            loop(dit, calls=kind, seed=4, stop=3)  # left off, the next begins at a higher timestep
            assert same(loop(dit, calls=kind), first)
    assert same(first, plain) == (name == "closed")
    assert rows(session).run.nunique() == 5
    assert timesteps_of(session)[:8] == dit.scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "scheduler", ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DDIMInverseScheduler"]
)
def test_a_bare_transformer_under_any_scheduler(dit, scheduler):
    """Repeated timesteps, fractions of one, and rising ones."""
    dit.scheduler = make_scheduler(scheduler)
    plain = loop(dit)
    with apply_dqar(dit.transformer, CLOSED):
        assert same(loop(dit), plain) and same(loop(dit), plain)
    with apply_dqar(dit.transformer, EVERY), or_refused():
        first = loop(dit)
        loop(dit, seed=4, labels=lambda i: 3)
        assert same(loop(dit), first)


@pytest.mark.parametrize("kind", WINDOWS)
def test_several_calls_a_step_of_a_bare_transformer(dit, kind):
    plain = windows(dit, **WINDOWS[kind])
    with apply_dqar(dit.transformer, CLOSED):
        assert all(map(same, windows(dit, **WINDOWS[kind]), plain))
    with apply_dqar(dit.transformer, EVERY), or_refused():
        got = windows(dit, **WINDOWS[kind])
        for k, mine in enumerate(got):
            others = [other for j, other in enumerate(plain) if j != k and other.shape == mine.shape]
            assert all((mine - plain[k]).norm() < (mine - other).norm() for other in others)


def test_a_model_called_once_outside_of_any_run(dit):
    """A probe between two steps (a preview, a FLOP counter) changes nothing that comes after."""

    @torch.no_grad()
    def run(probe):
        dit.scheduler.set_timesteps(8)
        x = noise(0)
        for i, t in enumerate(dit.scheduler.timesteps):
            if probe and i in (0, 3):
                dit.transformer(noise(7, 1, 4, 8, 8), timestep=torch.tensor([13]), class_labels=torch.tensor([9]))
            out = dit.transformer(x, timestep=t.expand(1), class_labels=torch.tensor([1])).sample[:, :4]
            x = dit.scheduler.step(out, t, x).prev_sample
        return x

    plain = run(False)
    with Naive(dit.transformer):
        want = run(False)
    with apply_dqar(dit, CLOSED):
        assert same(run(True), plain)
    with apply_dqar(dit, EVERY), or_refused():
        got = run(True)
        anew = (got - plain).norm() < (want - plain).norm()  # a probe may cost some reuse
        assert near(got, want) or anew


# --- 4. who owns the model? -------------------------------------------------------------------------------------------


def copied(pipe, how):
    """The transformer once more, as people come by one."""
    if how == "deepcopy of the pipeline":
        return copy.deepcopy(pipe).transformer
    if how == "deepcopy":
        return copy.deepcopy(pipe.transformer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(pipe.transformer))
    buffer = io.BytesIO()
    torch.save(pipe.transformer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "how, name",
    [
        ("deepcopy", "closed"),
        ("deepcopy", "residual"),
        ("deepcopy", "readouts"),
        ("deepcopy of the pipeline", "readouts"),
        ("deepcopy of the pipeline", "residual"),
        ("pickle", "closed"),
        ("pickle", "residual"),
        ("torch.save", "readouts"),
    ],
)
def test_a_copy_of_the_model_is_a_model_of_its_own(dit, how, name):
    session = apply_dqar(dit, mode(name, dit))
    draw(dit, steps=8)
    loop(dit, seed=3, stop=2)  # a run is open
    other = make_dit()
    other.transformer = copied(dit, how)
    mine, its = dict(dit.transformer.named_parameters()), dict(other.transformer.named_parameters())
    assert all(mine[key].data_ptr() != its[key].data_ptr() for key in mine)
    length = len(session.trace)
    assert same(loop(other), loop(make_dit())), "the copy isn't clean"
    assert len(session.trace) == length, "the copy's runs are traced in the original's session"
    randomize(other.transformer, 0.1)
    fresh = make_dit()
    fresh.transformer.load_state_dict(other.transformer.state_dict())
    assert same(loop(other), loop(fresh)), "the copy answers with the original's weights"
    remove_dqar(other.transformer)
    assert same(draw(dit), alone(name))
    with apply_dqar(other, EVERY), apply_dqar(fresh, EVERY):
        assert same(loop(other), loop(fresh))
    session.remove()
    assert same(draw(dit), untouched()) and same(loop(other), loop(fresh))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_pipeline_draws_by_itself(dit, how):
    session = apply_dqar(dit, LOOKING)
    draw(dit)
    other = copy.deepcopy(dit) if how == "deepcopy" else pickle.loads(pickle.dumps(dit))
    length = len(session.trace)
    assert same(draw(other), untouched()) and len(session.trace) == length
    remove_dqar(other)
    draw(dit)
    assert len(session.trace) == 2 * length
    session.remove()
    assert same(draw(other), untouched()) and same(draw(dit), untouched())


@pytest.mark.parametrize("target", ["kv", "residual"])
def test_saving_meanwhile_saves_the_model_alone(pixart, target, tmp_path):
    keys = list(pixart.transformer.state_dict())
    with apply_dqar(pixart, every(target)):
        draw_text(pixart)
        assert list(pixart.transformer.state_dict()) == keys
        pixart.save_pretrained(tmp_path)
    loaded = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert same(draw_text(loaded), untouched("pixart"))


@pytest.mark.parametrize(
    "name, when",
    [
        *((name, "between runs") for name in ("closed", "kv", "block", "readouts")),
        ("closed", "before the first"),
        ("readouts", "before the first"),
    ],
)
def test_a_model_moved_to_another_dtype_meanwhile(dit, name, when):
    fresh = make_dit()
    config = mode(name, dit)
    fresh.to(torch.bfloat16)
    with apply_dqar(fresh, config):
        want = draw(fresh)
    with apply_dqar(dit, config):
        if when == "between runs":
            draw(dit)
        dit.to(torch.bfloat16)
        assert same(draw(dit), want) and same(draw(dit), want)


COMPILED = {
    "wrapped": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
    "in place": lambda pipe: pipe.transformer.compile(backend="eager"),
    "blocks": lambda pipe: [block.compile(backend="eager") for block in pipe.transformer.transformer_blocks],
}


@pytest.mark.parametrize(
    "how, when, name",
    [
        ("wrapped", "before", "residual"),
        ("in place", "before", "kv"),
        ("in place", "meanwhile", "readouts"),
        ("blocks", "meanwhile", "closed"),
    ],
)
def test_compiled_models(dit, how, when, name):
    torch._dynamo.reset()
    config = mode(name, dit, 3)
    with contextlib.ExitStack() as stack:
        if when == "meanwhile":
            stack.enter_context(apply_dqar(dit, config))
        COMPILED[how](dit)
        if when == "before":
            with or_refused() as outcome:
                stack.enter_context(apply_dqar(dit, config))
            if outcome.refused:
                assert name != "closed"
                return
        for labels in ((1, 2), (3, 4)):
            assert near(draw(dit, labels, steps=3), alone(name, labels=labels, steps=3))
    assert near(draw(dit, steps=3), untouched(steps=3))


class Wrapper(torch.nn.Module):
    """As PEFT wraps: ``base_model``, attributes of the model's, and ``get_base_model``."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def get_base_model(self):
        return self.base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


@pytest.mark.parametrize("name", ["closed", "kv", "residual", "plan"])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_wrapped_model(kind, name):
    """PEFT's and others' wrappers: the branches of PixArt's batch stay in its order."""
    pipe, take = (make_dit(), draw) if kind == "dit" else (make_pixart(), draw_text)
    config = mode(name, pipe) if kind == "dit" else mode(name, pipe, 6, 4.5)
    pipe.transformer = Wrapper(pipe.transformer)
    with or_refused() as outcome:
        session = apply_dqar(pipe, config)
    if not outcome.refused:
        for _ in range(2):
            assert same(take(pipe), alone(name, kind))
        table = rows(session, "model" if name == "plan" else "self_attention")
        assert set(table.branch) == {"cond", "uncond"} and table.run.nunique() == 2
        session.remove()
    assert same(take(pipe), untouched(kind))


def test_branches_of_a_wrapped_model_are_not_swapped():
    tables = []
    for wrap in (lambda model: model, Wrapper, lambda model: torch.compile(model, backend="eager")):
        torch._dynamo.reset()
        pipe = make_pixart()
        pipe.transformer = wrap(pipe.transformer)
        with (
            or_refused() as outcome,
            apply_dqar(pipe, DQARConfig(schedule="none", probe=Probe(record=True))) as session,
        ):
            draw_text(pipe)
        if not outcome.refused:
            tables.append(rows(session).set_index(["step", "layer", "branch"]).entropy.sort_index())
    for other in tables[1:]:
        assert other.tolist() == pytest.approx(tables[0].tolist(), rel=1e-4)


def test_peft_wrappers():
    peft = pytest.importorskip("peft")
    pipe = make_pixart()
    lora = peft.LoraConfig(target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipe.transformer = peft.get_peft_model(pipe.transformer, lora)
    plain = draw_text(pipe)
    for config in (CLOSED, EVERY):
        with or_refused(), apply_dqar(pipe, config) as session:
            assert same(draw_text(pipe), plain) == (config is CLOSED)
            assert set(rows(session).branch) == {"cond", "uncond"}
    assert same(draw_text(pipe), plain)


class LowRank(torch.nn.Module):
    """What a loaded LoRA puts in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        torch.manual_seed(3)
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


WEIGHTS = (
    "norm1.linear",
    "norm1.emb.timestep_embedder.linear_1",
    "norm1.emb.class_embedder.embedding_table",
    "attn1.to_k",
)


def change(model, how, path, number=1):
    """Changes one layer's weights, in one of the ways that people and libraries do it."""
    block = model.transformer_blocks[number]
    layer = block.get_submodule(path)
    torch.manual_seed(1)
    new = layer.weight.detach() + 0.3 * torch.randn(layer.weight.shape)
    if how == "in place":  # an optimizer
        with torch.no_grad():
            layer.weight.copy_(new)
    elif how == "through .data":  # PEFT's merge: no version counter moves
        layer.weight.data += new - layer.weight.data
    elif how == "another .data":
        layer.weight.data = new
    elif how == "another parameter":
        layer.weight = torch.nn.Parameter(new)
    elif how == "load_state_dict":
        model.load_state_dict({**model.state_dict(), f"transformer_blocks.{number}.{path}.weight": new})
    elif how == "another layer":
        parent, _, name = path.rpartition(".")
        parent = block.get_submodule(parent)
        setattr(parent, name, LowRank(layer) if isinstance(layer, torch.nn.Linear) else copy.deepcopy(layer))
    elif how == "a hook":
        layer.register_forward_hook(lambda _module, _args, output: 1.1 * output)
    elif how == "patched forward":
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: 1.1 * forward(*args, **kwargs)


CHANGES = (
    "in place",
    "through .data",
    "another .data",
    "another parameter",
    "load_state_dict",
    "another layer",
    "a hook",
    "patched forward",
)


@pytest.mark.parametrize(
    "path, how",
    [
        *((WEIGHTS[1], how) for how in CHANGES),
        *((WEIGHTS[0], how) for how in ("in place", "through .data", "another layer", "a hook")),
        *((WEIGHTS[2], how) for how in ("in place", "another .data", "another layer", "patched forward")),
        *((WEIGHTS[3], how) for how in ("in place", "through .data")),
    ],
)
def test_weights_that_change_are_seen_at_once(dit, how, path):
    """What is kept for the next run of the same labels and timesteps must not outlive the weights that made it."""
    fresh = make_dit()
    change(fresh.transformer, how, path)
    want = loop(fresh, steps=5)
    for config in (CLOSED, EVERY) if how == "in place" else (CLOSED,):
        other = make_dit()
        with apply_dqar(fresh, config):
            changed = loop(fresh, steps=5)
        assert same(changed, want) == (config is CLOSED)
        with apply_dqar(other, config):
            before = loop(other, steps=5)
            assert same(loop(other, steps=5), before)
            change(other.transformer, how, path)
            for _ in range(2):
                assert same(loop(other, steps=5), changed), "stale"


def test_weights_of_the_first_block_alone(dit):
    """diffusers computes the last layer's conditioning by block 0's embedder; the others' may differ from it."""
    for block in (0, 1):
        change(dit.transformer, "in place", "norm1.emb.timestep_embedder.linear_1", block)
    fresh = make_dit()
    fresh.transformer.load_state_dict(dit.transformer.state_dict())
    want = loop(fresh)
    with apply_dqar(dit, CLOSED):
        assert same(loop(dit), want)
        change(dit.transformer, "through .data", "norm1.emb.timestep_embedder.linear_1", 0)
        change(fresh.transformer, "in place", "norm1.emb.timestep_embedder.linear_1", 0)
        assert near(loop(dit), loop(fresh))


def test_embedders_that_are_equal_until_one_changes(dit):
    """Converted checkpoints have the same embedder in each block; a fine-tuned one needn't."""
    model, fresh = dit.transformer, make_dit()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for pipe in (dit, fresh):
        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    plain = loop(fresh)
    with apply_dqar(dit, CLOSED):
        assert same(loop(dit), plain)
        for how in ("in place", "through .data"):
            for pipe in (dit, fresh):
                change(pipe.transformer, how, WEIGHTS[1])
            assert same(loop(dit), loop(fresh)) and not same(loop(dit), plain)


def test_weights_changed_in_mid_run(dit):
    fresh, seen = make_dit(), []

    def alter(model):
        def see(i, *_args):
            if i == 3:
                change(model, "in place", WEIGHTS[0])

        return see

    seen.append(loop(fresh, see=alter(fresh.transformer)))
    with apply_dqar(dit, CLOSED):
        loop(dit)
        seen.append(loop(dit, see=alter(dit.transformer)))
    assert same(*seen)


def test_labels_and_timesteps_changed_in_place(dit):
    """One tensor, filled anew at every step: its identity says nothing."""

    def run():
        dit.scheduler.set_timesteps(6)
        x, t_kept, labels = noise(0), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            for i, t in enumerate(dit.scheduler.timesteps):
                t_kept.fill_(t.item())
                labels.fill_(1 + i % 3)
                x = dit.scheduler.step(dit.transformer(x, t_kept, labels).sample[:, :4], t, x).prev_sample
        return x

    plain = run()
    with apply_dqar(dit, CLOSED):
        assert same(run(), plain) and same(run(), plain)


def test_autocast_for_one_run_only(dit):
    plain = loop(dit)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loop(dit)
    with apply_dqar(dit, CLOSED):
        for _ in range(2):
            assert same(loop(dit), plain)
            with torch.autocast("cpu", torch.bfloat16):
                assert same(loop(dit), cast)


def test_functional_calls_with_other_weights(dit):
    """``torch.func.functional_call`` with an exponential moving average, on the attached model."""
    other = {key: value * 1.05 for key, value in dit.transformer.state_dict().items()}

    def run():
        t, labels = torch.tensor([500]), torch.tensor([1])
        with torch.no_grad():
            inputs = (noise(0), t, labels)
            own = dit.transformer(*inputs).sample
            return torch.func.functional_call(dit.transformer, other, inputs).sample, own

    want = run()
    with apply_dqar(dit, CLOSED):
        for _ in range(2):
            assert all(map(same, run(), want))


@pytest.mark.parametrize("how", ["session", "remove_dqar"])
def test_removal_after_the_transformer_was_exchanged(dit, how):
    old, fresh = dit.transformer, make_dit(1)
    session = apply_dqar(dit, EVERY)
    draw(dit)
    dit.transformer = copy.deepcopy(fresh.transformer)
    with or_refused():
        assert same(draw(dit), draw(fresh))
    session.remove() if how == "session" else remove_dqar(dit)
    assert same(draw(dit), draw(fresh))
    dit.transformer = old
    assert same(draw(dit), untouched()), "the old transformer is still hooked"
    with apply_dqar(dit, EVERY):
        assert same(draw(dit), alone("output"))


@pytest.mark.parametrize(
    "first, second, name",
    [("pipe", "pipe", "output"), ("pipe", "pipe", "plan"), ("pipe", "bare", "output"), ("bare", "pipe", "plan")],
)
def test_applying_twice_is_refused(dit, first, second, name):
    target = {"pipe": dit, "bare": dit.transformer}
    plan = mode(name, dit)
    with apply_dqar(target[first], EVERY):
        with pytest.raises(ValueError, match="remove_dqar") as refused:
            apply_dqar(target[second], plan)
        check_refusal(refused.value)
        if first == "pipe":
            assert same(draw(dit), alone("output"))
    assert same(draw(dit), untouched())


@pytest.mark.parametrize("name", ["closed", "output", "plan"])
def test_a_session_entered_a_second_time_works_or_says_so(dit, name):
    session = apply_dqar(dit, mode(name, dit))
    with session:
        draw(dit)
    with or_refused() as outcome, session:
        assert same(draw(dit), alone(name))
        assert len(rows(session, "model" if name == "plan" else "self_attention")) > 0
        assert rows(session, "model" if name == "plan" else "self_attention").run.nunique() == 2
    assert same(draw(dit), untouched())
    if not outcome.refused:
        with apply_dqar(dit, mode(name, dit)):
            assert same(draw(dit), alone(name))


REFUSED = {
    "a plan for another model": lambda pipe: ForecastPlan(((),), {0}, (999,), (3, 3), 1, "another model"),
    "layers of another number": lambda pipe: DQARConfig(plan=ReusePlan(frozenset(), 9, 8)),
    "readouts of another size": lambda pipe: _misfit(pipe),
}


def _misfit(pipe):
    plan = with_readouts(make_plan(pipe), pipe.transformer)
    fields = {**vars(plan), "readouts": tuple(row[:-1] for row in plan.readouts)}
    return ForecastPlan(**{name: fields[name] for name in inspect.signature(ForecastPlan).parameters})


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused_leaves_no_trace(dit, wrong):
    """Refused when applied, or before the first image; then it is as if it had never been."""
    before = {name: set(vars(module)) for name, module in dit.transformer.named_modules()}
    config, session = REFUSED[wrong](dit), None
    with pytest.raises(ValueError) as refused:
        session = apply_dqar(dit, config)
        draw(dit)
    check_refusal(refused.value)
    if session is not None:
        session.remove()
    assert {name: set(vars(module)) for name, module in dit.transformer.named_modules()} == before
    assert same(draw(dit), untouched())
    with apply_dqar(dit, EVERY):
        assert same(draw(dit), alone("output"))


@pytest.mark.parametrize(
    "name, error",
    [
        ("closed", KeyboardInterrupt),
        ("kv", KeyboardInterrupt),
        ("kv", "nan"),
        ("residual", RuntimeError),
        ("residual", "nan"),
        ("int8", "nan"),
        ("readouts", KeyboardInterrupt),
        ("readouts", "nan"),
    ],
)
def test_a_run_that_breaks_off_leaves_a_clean_next_one(dit, error, name):
    """Out of memory, Ctrl-C, or NaN, in the middle of a block."""
    breaks = []

    def fail(_module, _args, output):
        breaks.append(1)
        if len(breaks) == 2:
            if error == "nan":
                return output * math.nan
            raise error("in the middle")
        return None

    with apply_dqar(dit, mode(name, dit)):
        for block in (0, 1):
            handle = dit.transformer.transformer_blocks[block].ff.register_forward_hook(fail)
            breaks.clear()
            with contextlib.suppress(KeyboardInterrupt, RuntimeError, FloatingPointError):
                draw(dit)
            handle.remove()
            assert same(draw(dit), alone(name))
    assert same(draw(dit), untouched())


@pytest.mark.parametrize("name", ["output", "plan"])
def test_nan_latents_are_forgotten(dit, name):
    with apply_dqar(dit, mode(name, dit)):
        for _ in range(2):
            with contextlib.suppress(FloatingPointError):
                loop(dit, guidance=lambda i: 3.0, seed=1, see=lambda i, s, x, p: p.fill_(math.nan) if i == 2 else None)
            assert same(draw(dit), alone(name))


@pytest.mark.parametrize("name", ["output", "plan"])
def test_pipelines_in_threads(name):
    """Two at once, each with its own session; and one in another thread than where dqar was applied."""
    pipes, got = [make_dit(), make_dit()], {}
    sessions = [apply_dqar(pipe, mode(name, pipe)) for pipe in pipes]

    def work(i):
        for _ in range(2):
            got[i] = draw(pipes[i], ((1, 2), (3, 4))[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, labels in enumerate(((1, 2), (3, 4))):
        assert same(got[i], alone(name, labels=labels))
        assert rows(sessions[i], "model" if name == "plan" else "self_attention").run.nunique() == 2
        sessions[i].remove()


# --- 5. attention processors ------------------------------------------------------------------------------------------


class Halved(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 0.5 * super().__call__(*args, **kwargs)


class Mine:
    """A processor of one's own that is no kin of diffusers'."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return 0.5 * AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)


OWN = {
    "a subclass": Halved,
    "one's own": Mine,
    "the first": AttnProcessor,
    "sliced": lambda: processors.SlicedAttnProcessor(1),
}


@pytest.mark.parametrize(
    "place, make, name",
    [
        *(("attn1", make, "closed") for make in OWN),
        *(("attn2", make, "closed") for make in OWN),
        ("attn1", "a subclass", "residual"),
        ("attn2", "a subclass", "residual"),
    ],
)
def test_processors_that_dqar_does_not_know_are_refused_by_name(pixart, place, make, name):
    """In self-attention there is no other way; a cross-attention may also be left alone."""
    for layer in (0, 1, 2) if name == "closed" else (1,):
        getattr(pixart.transformer.transformer_blocks[layer], place).set_processor(OWN[make]())
    own = draw_text(pixart)
    chosen = [getattr(block, place).processor for block in pixart.transformer.transformer_blocks]
    kind = type(chosen[1]).__name__
    if place == "attn1":
        with pytest.raises(ValueError, match=rf"\b{kind}\b") as refused:
            apply_dqar(pixart, mode(name, pixart))
        check_refusal(refused.value)
    else:
        try:
            session = apply_dqar(pixart, mode(name, pixart))
        except ValueError as refused:
            assert re.search(rf"\b{kind}\b", str(refused))
            check_refusal(refused)
        else:
            got = draw_text(pixart)
            if name == "closed":
                assert same(got, own)
            session.remove()
    assert [getattr(block, place).processor for block in pixart.transformer.transformer_blocks] == chosen
    assert same(draw_text(pixart), own)


CHOICES = {
    "set_default_attn_processor": lambda model: model.set_default_attn_processor(),
    "set_attn_processor": lambda model: model.set_attn_processor(Halved()),
    "a new AttnProcessor2_0": lambda model: model.set_attn_processor(AttnProcessor2_0()),
    "one layer": lambda model: model.transformer_blocks[1].attn1.set_processor(Halved()),
    "a cross-attention": lambda model: model.transformer_blocks[1].attn2.set_processor(Halved()),
    "fused": lambda model: model.fuse_qkv_projections(),
}


@pytest.mark.parametrize(
    "when, name, choice",
    [
        *(("after a run", name, choice) for choice in CHOICES for name in ("closed", "residual")),
        ("at once", "closed", "one layer"),
        ("at once", "closed", "fused"),
    ],
)
def test_processors_chosen_meanwhile_are_noticed_and_kept(pixart, choice, when, name):
    """Noticed at the next run; what the user chose works there if it isn't refused, and survives removal."""
    fresh = make_pixart()
    CHOICES[choice](fresh.transformer)
    own = draw_text(fresh)
    session = apply_dqar(pixart, mode(name, pixart))
    if when == "after a run":
        draw_text(pixart)
    with or_refused() as outcome:
        CHOICES[choice](pixart.transformer)
        chosen = {key: type(p) for key, p in fresh.transformer.attn_processors.items()}
    if not outcome.refused:
        with or_refused():
            got = draw_text(pixart)
            if name == "closed":
                assert near(got, own)
            else:
                assert near(got, own) or choice in (
                    "a new AttnProcessor2_0",
                    "a cross-attention",
                    "fused",
                    "set_default_attn_processor",
                )
    session.remove()
    if not outcome.refused:
        assert {key: type(p) for key, p in pixart.transformer.attn_processors.items()} == chosen
        assert near(draw_text(pixart), own)
    if choice == "fused" and not outcome.refused:
        pixart.transformer.unfuse_qkv_projections()
        with or_refused(), apply_dqar(pixart, CLOSED):
            assert near(draw_text(pixart), untouched("pixart"))


def test_projections_fused_before(pixart):
    pixart.transformer.fuse_qkv_projections()
    own = draw_text(pixart)
    for config in (CLOSED, EVERY):
        with or_refused() as outcome, apply_dqar(pixart, config):
            got = draw_text(pixart)
            assert same(got, own) or config is EVERY
        assert same(draw_text(pixart), own)
    pixart.transformer.unfuse_qkv_projections()
    with apply_dqar(pixart, EVERY):
        assert near(draw_text(pixart), alone("output", "pixart"))
    assert outcome is not None


def test_the_same_processor_instance_in_all_layers(pixart):
    """``set_attn_processor(AttnProcessor2_0())`` shares one."""
    one = AttnProcessor2_0()
    pixart.transformer.set_attn_processor(one)
    for target in TARGETS:
        with apply_dqar(pixart, every(target)):
            assert same(draw_text(pixart), alone(target, "pixart"))
    assert all(p is one for p in pixart.transformer.attn_processors.values())


@pytest.mark.parametrize("name", ["closed", *TARGETS])
def test_latte_frame_by_frame(name):
    """Spatial attention sees batch × frames, temporal attention batch × places. Against a naive cache of hooks."""
    text, model = noise(9, 2, 5, 16), make_latte()

    def run(model):
        out = []
        with torch.no_grad():
            for i in range(5):
                x = noise(i, 2, 4, 2, 8, 8)
                t = torch.tensor([900 - 100 * i] * 2)
                out.append(model(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0])
        return out

    plain = run(model)
    with or_refused() as outcome:
        session = apply_dqar(model, mode(name, model))
        got = run(model)
        session.remove()
    if not outcome.refused:
        if name == "closed":
            assert all(map(same, got, plain))
        else:
            kept, seen, handles = {}, {}, []

            def hook(module, given, output):
                step = seen[module] = seen.get(module, -1) + 1
                base = given[0] if name == "residual" else 0
                if step >= 2:  # a bare transformer reuses from the third step on
                    return base + kept[module]
                kept[module] = output - base

            for block in model.transformer_blocks:
                parts = {
                    "kv": (block.attn1.to_k, block.attn1.to_v),
                    "output": (block.attn1,),
                    "block": (block.attn1, block.ff),
                    "residual": (block,),
                }[name]
                handles += [part.register_forward_hook(hook) for part in parts]
            want = run(model)
            for handle in handles:
                handle.remove()
            assert all(map(near, got, want)) and not near(got[-1], plain[-1])
    assert all(map(same, run(model), plain))


# --- 6. captions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "travel, calls",
    [
        *((travel, "cond first") for travel in ("blended in place", "blended anew", "equal objects", "switched")),
        *((travel, "both") for travel in ("blended in place", "switched", "mask in place")),
        ("mask in place", "uncond first"),
    ],
)
def test_captions_that_change_are_never_stale(pixart, travel, calls):
    (first, mask), (second, _), null = (caption(pixart, p) for p in ("a cat", "two big red dog", ""))

    def captions():
        kept, kept_mask = first.clone(), mask.clone()

        def at(i):
            if travel == "blended in place":
                kept.copy_(torch.lerp(first, second, i / 6))
            elif travel == "mask in place":
                kept_mask[:, 2 + i] = 1
            now = {
                "blended anew": torch.lerp(first, second, i / 6),
                "equal objects": first.clone(),
                "switched": first if i < 3 else second,
            }.get(travel, kept)
            return {"cond": (now, kept_mask), "uncond": null}

        return at

    plain = text_loop(pixart, captions(), calls=calls)
    for config in (CLOSED, DQARConfig(schedule="none", cache=CacheFormat(cross_attention=False))):
        with apply_dqar(pixart, config) as session:
            for _ in range(2):
                assert same(text_loop(pixart, captions(), calls=calls), plain)
        assert timesteps_of(session) == 2 * pixart.scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ["closed", *TARGETS])
def test_captions_of_one_shape_in_runs_one_after_another(pixart, name):
    """In one embedding tensor that is filled anew, at one address, between runs that may stop early."""
    buffer, mask = (x.clone() for x in caption(pixart, "a cat"))
    texts = [caption(pixart, p) for p in ("a cat", "two big red dog", "the park")]
    want = []
    for embeddings, its_mask in texts:
        with apply_dqar(pixart, mode(name, pixart)):
            want.append(text_loop(pixart, lambda i, e=embeddings, m=its_mask: {"cond": (e, m)}))
    with apply_dqar(pixart, mode(name, pixart)):
        for _ in range(2):
            for (embeddings, its_mask), expected in zip(texts, want, strict=True):
                buffer.copy_(embeddings)
                mask.copy_(its_mask)
                assert same(text_loop(pixart, lambda i: {"cond": (buffer, mask)}), expected)
                text_loop(pixart, lambda i: {"cond": (buffer, mask)}, stop=2)


def test_a_caption_without_a_mask(pixart):
    embeddings, mask = caption(pixart, "a cat")
    for given in ((embeddings, None), (embeddings, mask.bool()), (embeddings, mask.float())):
        plain = text_loop(pixart, lambda i, given=given: {"cond": given})
        with apply_dqar(pixart, CLOSED):
            assert same(text_loop(pixart, lambda i, given=given: {"cond": given}), plain)
            assert same(text_loop(pixart, lambda i, given=given: {"cond": given}, seed=0), plain)


def test_weights_of_the_captions_projections_change(pixart):
    with apply_dqar(pixart, CLOSED):
        draw_text(pixart)
        fresh = make_pixart()
        for pipe in (pixart, fresh):
            layer = pipe.transformer.transformer_blocks[1].attn2.to_v
            layer.weight.data += 0.3
        assert same(draw_text(pixart), draw_text(fresh))


@pytest.mark.parametrize("kind", ["dit", "pixart"])
@pytest.mark.parametrize("target", ["kv", "output"])
def test_sharing_between_branches_by_hand(kind, target):
    """The unconditional branch takes what the conditional one computes at the step, from the second step on."""
    pipe = make_dit() if kind == "dit" else make_pixart()
    cond, uncond = (0, 1) if kind == "dit" else (1, 0)
    take = (lambda: draw(pipe)) if kind == "dit" else (lambda: draw_text(pipe))
    with apply_dqar(pipe, DQARConfig(schedule="none", share_below=math.inf, reuse_target=target)) as session:
        got = take()
    table = rows(session)
    shared = table[table.decision == "share"]
    assert set(shared.branch) == {"uncond"} and len(shared)
    steps = {(row.step, row.layer) for row in shared.itertuples()}
    calls = {}

    def share(layer):
        def hook(module, _args, output):
            step = calls[module] = calls.get(module, -1) + 1
            if (step, layer) not in steps:
                return None
            halves = list(output.chunk(2))
            halves[uncond] = halves[cond]
            return torch.cat(halves)

        return hook

    for layer, block in enumerate(pipe.transformer.transformer_blocks):
        for module in (block.attn1,) if target == "output" else (block.attn1.to_k, block.attn1.to_v):
            module.register_forward_hook(share(layer))
    assert near(got, take(), 1e-3)


@pytest.mark.parametrize("calls", ["cond first", "uncond first"])
@pytest.mark.parametrize("target", ["kv", "output"])
def test_sharing_between_branches_in_calls_of_their_own(dit, target, calls):
    """Cond first: as in a batch. Uncond first: it cannot take what isn't there yet; then nothing is shared."""
    config = DQARConfig(schedule="none", share_below=math.inf, reuse_target=target)
    plain = loop(dit, calls=calls)
    with apply_dqar(dit, config):
        batched = loop(dit)
    with apply_dqar(dit, config) as session, or_refused() as outcome:
        got = loop(dit, calls=calls)
    if not outcome.refused:
        shares = rows(session).query("decision == 'share'")
        assert near(got, batched) if len(shares) else same(got, plain)
        assert set(shares.branch) <= {"uncond"}


# --- 7. training ------------------------------------------------------------------------------------------------------


def gradients(kind, pipe, steps=3, train=False):
    """Of a few training steps, one backward pass each."""
    model, out = pipe.transformer, []
    model.train(train)
    given = caption(pipe, "a cat") if kind == "pixart" else None
    for step in range(steps):
        torch.manual_seed(step)
        model.zero_grad()
        if kind == "pixart":
            predicted = text_forward(model, noise(step), 500, *given)
        else:
            labels = torch.tensor([1, NULL, 3])
            x, t = noise(step, 3, 4, 8, 8), torch.tensor([500, 400, 300])
            predicted = model(x, timestep=t, class_labels=labels).sample[:, :4]
        predicted.square().mean().backward()
        out.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
    model.eval()
    return out


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_training_steps_through_a_closed_gate(kind, checkpointing, train):
    """The optimizer's steps too; in train mode labels are dropped at random, by as many draws as ever."""
    make = make_dit if kind == "dit" else make_pixart
    pipes = [make(), make()]
    for pipe in pipes:
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
    want = gradients(kind, pipes[0], train=train)
    with apply_dqar(pipes[1], CLOSED):
        got = gradients(kind, pipes[1], train=train)
    assert all(map(same, got, want))
    take = loop if kind == "dit" else draw_text
    assert same(take(pipes[0]), take(pipes[1]))


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_training_between_drawings(kind, before):
    """Tensors kept from inference mode can't be saved for a backward pass."""
    make, take = (make_dit, draw) if kind == "dit" else (make_pixart, draw_text)
    pipes = [make(), make()]

    def work(pipe):
        seen = []
        for _ in range(2):
            with before():
                seen.append(take(pipe))
            seen.extend(gradients(kind, pipe))
        return seen

    want = work(pipes[0])
    with apply_dqar(pipes[1], CLOSED):
        got = work(pipes[1])
    assert all(map(same, got, want))


def test_the_latents_gradient_through_a_closed_gate(dit):
    """Guidance by a loss on x0 asks for the gradient of the input, with frozen weights, at every step of a run."""
    dit.transformer.requires_grad_(False)

    def run():
        dit.scheduler.set_timesteps(5)
        x = noise(0)
        for t in dit.scheduler.timesteps:
            x = x.detach().requires_grad_()
            out = dit.transformer(x, timestep=t.expand(1), class_labels=torch.tensor([1])).sample[:, :4]
            (slope,) = torch.autograd.grad((x - out).square().mean(), x)
            with torch.no_grad():
                x = dit.scheduler.step(out, t, x).prev_sample - 0.1 * slope
        return x.detach()

    plain = run()
    with apply_dqar(dit, CLOSED):
        assert same(run(), plain) and same(run(), plain)


def test_reuse_keeps_no_graph(dit):
    """With gradients on by oversight, the cache must not hold a run's whole graph."""
    dit.scheduler.set_timesteps(8)
    with apply_dqar(dit, EVERY) as session, or_refused():
        x = noise(0)
        for t in dit.scheduler.timesteps[:3]:
            out = dit.transformer(x, timestep=t.expand(1), class_labels=torch.tensor([1])).sample[:, :4]
            x = dit.scheduler.step(out.detach(), t, x).prev_sample
        for entry in session.controller.cache:
            assert not entry.output.dequantize().requires_grad


# --- 8. smaller things ------------------------------------------------------------------------------------------------


class Upcasts(TorchDispatchMode):
    """Counts operations that make float64 of what wasn't: a device without float64 (MPS) refuses them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        narrow = any(x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in given)
        if narrow and any(x.dtype == torch.float64 for x in made):
            self.seen.append(str(function))
        return out


@pytest.mark.parametrize("name", ["looking", "int8", "balanced"])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_no_float64_of_a_models_tensors(kind, name):
    pipe, take = (make_dit(), draw) if kind == "dit" else (make_pixart(), draw_text)
    config = mode(name, pipe)
    with Upcasts() as plain:
        take(pipe)
    with apply_dqar(pipe, config), Upcasts() as upcasts:
        take(pipe)
    assert len(upcasts.seen) <= len(plain.seen), set(upcasts.seen)


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's: refuses to make any of what isn't."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.dtype == torch.float64 for x in made) and not any(x.dtype == torch.float64 for x in given):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return out


@pytest.mark.parametrize("name", ["looking", "int8", "balanced", "readouts"])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_device_without_float64(kind, name):
    pipe, guidance, steps = (make_dit(), 3.0, 8) if kind == "dit" else (make_pixart(), 4.5, 6)
    config = mode(name, pipe, steps, guidance)

    def run():
        x, caption = noise(0, 2, 4, 8, 8).clone(), noise(1, 2, 5, 16)
        x[1] = x[0]
        given = {"class_labels": torch.tensor([1, NULL])} if kind == "dit" else {"encoder_hidden_states": caption}
        given |= {} if kind == "dit" else {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        order = (0, 1) if kind == "dit" else (1, 0)
        outputs = []
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                both = pipe.transformer(x, timestep=t.expand(2), **given).sample[:, :4]
                cond, uncond = (both[i : i + 1] for i in order)
                x = x - 0.05 * (uncond + guidance * (cond - uncond))
                outputs.append(x)
        return torch.stack(outputs)

    pipe.scheduler.set_timesteps(steps)
    with apply_dqar(pipe, config):
        want = run()
    with apply_dqar(pipe, config), WithoutFloat64():
        got = run()
    assert near(got, want, 1e-3)


def test_a_plan_of_a_trace_with_stopped_runs(dit):
    """Two runs that stopped before a site don't say that it computes."""
    with apply_dqar(dit, EVERY) as session:
        loop(dit)
        whole = ReusePlan.from_trace(rows(session))
        for _ in range(3):
            loop(dit, stop=2)
    with or_refused() as outcome:
        plan = ReusePlan.from_trace(rows(session))
    assert outcome.refused or plan == whole
    assert len(whole.sites) == 6 * LAYERS * 2


def test_a_plan_of_a_trace_that_only_has_stopped_or_late_runs(dit):
    for part in ({"stop": 5}, {"start": 4}):
        with apply_dqar(dit, EVERY) as session:
            loop(dit, **part)
        with or_refused() as outcome:
            plan = ReusePlan.from_trace(rows(session))
        if not outcome.refused:  # then it says nothing about the steps that nobody ran
            assert plan.num_inference_steps == 8
            assert {step for step, _, _ in plan.sites} <= set(rows(session).step)


@pytest.mark.parametrize("readouts", [False, True])
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_a_plan_for_other_sizes_is_refused(kind, readouts):
    if kind == "dit":
        pipe = make_dit()
        plan, take = make_plan(pipe), lambda: loop(pipe, size=16)
    else:
        pipe = make_pixart()
        plan, take = make_plan(pipe, (0, 2, 3, 5), 6, 4.5), lambda: draw_text(pipe, height=16, width=16)
    plan = with_readouts(plan, pipe.transformer) if readouts else plan
    with apply_dqar(pipe, plan):
        with pytest.raises(ValueError) as refused:
            take()
        check_refusal(refused.value)
        assert same(draw(pipe) if kind == "dit" else draw_text(pipe), alone("plan", kind)) or readouts


@pytest.mark.parametrize("scale", [2.97, 3.055, 1.5])
def test_guidance_near_the_plans_is_followed_exactly_or_refused(dit, scale):
    exact = loop(dit, guidance=lambda i: scale, forecast=((0, 2, 3, 7), 1))
    with apply_dqar(dit, make_plan(dit)), or_refused() as outcome:
        got = loop(dit, guidance=lambda i: scale)
    if not outcome.refused:
        assert near(got, exact, 1e-3)


@pytest.mark.parametrize(
    "scale, dtype",
    [(1.5, torch.bfloat16), (1.5, torch.float16), (3.0, torch.float32), (7.5, torch.bfloat16), (7.5, torch.float16)],
)
def test_the_plans_own_guidance_is_never_refused(dit, scale, dtype):
    """Rounding of half precision is no other scale."""
    dit.transformer.to(dtype)
    dit.vae.to(dtype)
    with apply_dqar(dit, make_plan(dit, guidance=scale)):
        for labels in ((1,), (1, 2), (7, 8, 9)):
            assert draw(dit, labels, guidance=scale).isfinite().all()


def test_unguided_runs_of_a_guided_plan_and_the_other_way_round(dit):
    for planned, given in ((3.0, 1.0), (1.0, 3.0)):
        with apply_dqar(dit, make_plan(dit, guidance=planned)):
            with pytest.raises(ValueError) as refused:
                draw(dit, guidance=given)
            check_refusal(refused.value)
            assert not re.search(r"this run has 1\b", str(refused.value)), refused.value
            assert draw(dit, guidance=planned).isfinite().all()


def test_messages_count_in_words_that_fit(dit):
    """One step, not 1 steps."""
    wrong = []
    for plan, steps in ((ReusePlan(frozenset(), LAYERS, 8), 1), (ReusePlan(frozenset(), LAYERS, 1), 8)):
        with apply_dqar(dit, DQARConfig(plan=plan)), pytest.raises(ValueError) as refused:
            draw(dit, steps=steps)
        wrong.append(refused.value)
    with apply_dqar(dit, make_plan(dit)), pytest.raises(ValueError) as refused:
        draw(dit, steps=1)
    wrong.append(refused.value)
    with pytest.raises(ValueError) as refused:
        apply_dqar(dit, DQARConfig(plan=ReusePlan(frozenset(), 1, 8)))
    for error in (*wrong, refused.value):
        check_refusal(error)


def test_a_plan_under_another_sampler_is_said_or_measured(dit):
    """With equal timesteps. Unsure how it is said: a warning, the summary, or a refusal are all that can be seen."""
    plan = make_plan(dit)
    other = DPMSolverMultistepScheduler.from_config(dit.scheduler.config)
    dit.scheduler = other
    dit.scheduler.set_timesteps(8)
    with apply_dqar(dit, plan), or_refused():
        assert draw(dit).isfinite().all()


def test_the_trace_can_be_cleared_at_any_time(dit):
    with apply_dqar(dit, DQARConfig(**OPEN, probe=Probe(record=True))) as session:
        want = draw(dit)
        session.trace.clear()
        assert len(session.trace) == 0 and len(rows(session)) == 0
        assert same(draw(dit), want) and rows(session).run.nunique() == 1

        def clear(i, *_args):
            if i == 4:
                session.trace.clear()

        plain = loop(dit)
        assert same(loop(dit, see=clear), plain)
        assert set(rows(session).step) == {5, 6, 7}


def test_the_trace_does_not_grow_for_ever(dit):
    """Bounded, or cleared by the user; one of the two is said. A bound must not tear a run in two."""
    with apply_dqar(dit, CLOSED) as session:
        for _ in range(4):
            draw(dit, steps=3)
        table = rows(session)
        assert (table.groupby("run").size() == 3 * LAYERS * 2).all()
        session.trace.clear()
        draw(dit, steps=3)
        assert len(rows(session)) == 3 * LAYERS * 2


@pytest.mark.parametrize(
    "kind, name",
    [*(("dit", name) for name in (*TARGETS, "int8", "balanced")), ("pixart", "kv"), ("pixart", "residual")],
)
def test_nothing_is_cached_while_the_vae_decodes(kind, name):
    pipe = make_dit() if kind == "dit" else make_pixart()
    held = []
    decode = pipe.vae.decode
    with apply_dqar(pipe, mode(name, pipe)) as session:
        pipe.vae.decode = lambda *args, **kwargs: (
            held.append(session.controller.cache.nbytes),
            decode(*args, **kwargs),
        )[1]
        for _ in range(2):
            if kind == "dit":
                draw(pipe)
            else:
                draw_text(pipe, output_type="pt")
    assert held == [0, 0]


@pytest.mark.parametrize("channels", [32_768, 40_000, 70_000])
def test_salient_channels_beyond_16_bit_numbers(channels):
    x = torch.zeros(1, 2, channels)
    x[..., -1], x[..., 5], x[..., 33_000 % channels] = 100.0, 50.0, 77.0
    kept = quantizer.quantize(x, 8, "per_tensor", keep_channels=3)
    assert same(kept.dequantize(), x)


def test_reuse_plans_are_for_one_scheduler_name_and_number_of_steps(dit):
    plan = ReusePlan({(3, 1, "cond"), (3, 1, "uncond")}, LAYERS, 8, "DDIMScheduler")
    with Naive(dit.transformer, "kv", reused=()) as naive:
        plain = loop(dit, naive=naive)
    with apply_dqar(dit, DQARConfig(**OPEN, plan=plan)) as session:
        assert not same(loop(dit), plain)
        assert rows(session).query("decision == 'reuse'").step.tolist() == [3, 3]
        for wrong in ({"steps": 5}, {"scheduler": DPMSolverMultistepScheduler()}):
            if "scheduler" in wrong:
                dit.scheduler = wrong.pop("scheduler")
            with pytest.raises(ValueError) as refused:
                loop(dit, **wrong)
            check_refusal(refused.value)


def test_a_reuse_plan_in_a_run_that_starts_late(dit):
    """Its steps are the schedule's; what was never computed can't be reused."""
    plan = ReusePlan(
        {(s, layer, b) for s in (3, 5, 7) for layer in range(LAYERS) for b in ("cond", "uncond")}, LAYERS, 8
    )
    with Naive(dit.transformer, reused={5, 7}) as naive:
        want = loop(dit, start=3, naive=naive)
    with apply_dqar(dit, every(plan=plan)) as session, or_refused() as outcome:
        assert near(loop(dit, start=3), want)
    if not outcome.refused:
        assert set(rows(session).query("decision == 'reuse'").step) == {5, 7}


# --- 9. slide 9's calls, one by one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond"), ("uncond", "cond")])
@pytest.mark.parametrize("bits", [8, 16])
def test_slide_9_by_hand(branches, bits):
    """A loop of one's own: what the decision returns is what was committed, quantized."""
    config = DQARConfig(entropy_threshold=math.inf, snr_range=(0.5, 50.0), quantize_bits=bits, schedule="all")
    controller = DQARController(num_layers=3, config=config)
    kept, decisions = {}, []
    for run in range(2):
        for step in range(6):
            clean, noisy = noise(step), noise(step) + 0.5 * noise(step + 50)
            controller.begin_step(
                step_index=step, total_steps=6, snr=stats.snr(clean, noisy), prompt_length=len(["a", "red", "fox"])
            )
            for layer in range(3):
                for branch in branches:
                    decision = controller.should_reuse(layer_id=layer, branch=branch)
                    decisions.append((run, step, layer, branch, decision.use_cache))
                    if decision.use_cache and decision.entry:
                        k, v, at = kept[layer, branch]
                        error = 1e-6 if bits == 16 else 0.02
                        assert near(decision.entry.k.dequantize(), k, error)
                        assert near(decision.entry.v.dequantize(), v, error)
                        assert at < step and step - at <= 3
                        controller.reuse(decision.entry)
                        continue
                    k, v = noise(100 * step + layer, 1, 16, 8), noise(7 + 100 * step + layer, 1, 16, 8)
                    attention = noise(step, 1, 2, 16, 16).softmax(-1)
                    controller.commit(
                        layer_id=layer,
                        branch=branch,
                        attn_map=attention,
                        keys=k,
                        values=v,
                        clean_latent=clean,
                        noisy_latent=noisy,
                    )
                    kept[layer, branch] = k, v, step
    table = controller.trace.to_pandas()
    assert len(table) == len(decisions) and table.run.nunique() == 2
    reused = {(run, step) for run, step, *_, use in decisions if use}
    assert reused == {(run, step) for run in (0, 1) for step in (1, 2, 3, 5)}
    assert (table.decision == "reuse").tolist() == [use for *_, use in decisions]
    computed = table[table.decision == "compute"]
    entropies = [stats.attention_entropy(noise(s, 1, 2, 16, 16).softmax(-1)).item() for s in computed.step]
    assert computed.entropy.tolist() == pytest.approx(entropies, rel=1e-4)
    assert (table.bytes > 0).all()


def test_slide_9_with_the_decks_own_gate():
    """H < τ(p) and SNR in range, by numbers chosen on either side; entropies per head or as a number."""
    controller = DQARController(2, DQARConfig(entropy_threshold=2.0, snr_range=(0.5, 50.0), schedule="all"))
    k = noise(1, 1, 16, 8)
    for step, (entropy, snr) in enumerate([(1.0, 1.0), (1.0, 1.0), (3.0, 0.1), (1.0, 1.0), (1.0, 60.0)]):
        controller.begin_step(step, 6, snr=snr)
        for layer in (0, 1):
            decision = controller.should_reuse(layer)
            assert decision.use_cache == (step == 1), (step, decision.reason)
            if decision.use_cache:
                controller.reuse(decision.entry)
            else:
                controller.commit(layer, keys=k, values=k, entropy=torch.full((1, 2), entropy))
    reasons = controller.trace.to_pandas().groupby("step").reason.first().tolist()
    assert reasons == ["no cache", "reuse", "snr", "entropy", "snr"]
    controller.begin_step(5, 6, snr=1.0, prompt_length=1)  # τ(1) = 0.25
    assert not controller.should_reuse(0).use_cache and controller.should_reuse(0).reason == "entropy"


def test_slide_9s_calls_in_an_odd_order():
    """Asked twice, a layer left out, a step repeated, a run begun anew: as numbered, not as counted."""
    controller = DQARController(2, DQARConfig(**OPEN, quantize_bits=16))
    with pytest.raises((RuntimeError, ValueError)):
        controller.should_reuse(0)
    k = noise(1, 1, 4, 8)
    controller.begin_step(0, 4)
    for layer in (1, 0):
        assert not controller.should_reuse(layer).use_cache
        controller.commit(layer, keys=k + layer, values=k - layer)
    controller.begin_step(2, 4)  # step 1 was left out
    for _ in range(2):
        assert controller.should_reuse(1).use_cache
    assert same(controller.should_reuse(1).entry.k.dequantize(), k + 1)
    controller.reuse(controller.should_reuse(1).entry)
    controller.begin_step(3, 4)
    assert controller.should_reuse(0).use_cache
    controller.begin_step(0, 4)
    assert not controller.should_reuse(0).use_cache and not controller.should_reuse(1).use_cache
    for wrong in ({"layer_id": 2}, {"layer_id": -1}, {"layer_id": 0, "branch": "both"}):
        with pytest.raises(ValueError):
            controller.should_reuse(**wrong)
    with pytest.raises(ValueError):
        controller.begin_step(4, 4)


# --- 10. images of a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, target, bits, quantizing",
    [
        *(("dit", target, 16, "per_channel") for target in TARGETS),
        *(("dit", "output", 8, quantizing) for quantizing in ("per_tensor", "per_channel", "per_token")),
        ("dit", "kv", 8, "per_tensor"),
        ("pixart", "kv", 16, "per_channel"),
        ("pixart", "output", 8, "per_token"),
        ("pixart", "residual", 8, "per_tensor"),
    ],
)
def test_an_image_of_a_batch_is_the_image_alone(kind, target, bits, quantizing):
    """No scale, streak or cache is shared. Rounding differs in a batch, and may tip a value to the next integer."""
    pipe = make_dit() if kind == "dit" else make_pixart()
    options = {"reuse_target": target, "quantize_bits": bits, "quantize_mode": quantizing}
    tolerance = 1e-4 if bits == 16 else 5e-3 if kind == "dit" else 1e-3
    batch = (1, 2, 500) if kind == "dit" else ("a cat", "two big red dog runs in the park", "the mat")
    with apply_dqar(pipe, DQARConfig(**OPEN, **options)):
        if kind == "dit":
            together = draw(pipe, batch)
            single = [draw(pipe, (label,), seed=i) for i, label in enumerate(batch)]
        else:
            together = draw_text(pipe, batch)
            single = [draw_text(pipe, (prompt,), seed=i) for i, prompt in enumerate(batch)]
    for got, want in zip(together, single, strict=True):
        assert near(got, want[0], tolerance)


@pytest.mark.parametrize("mode_of", ["per_tensor", "per_channel", "per_token"])
@pytest.mark.parametrize(
    "options", [{}, {"balance": True}, {"cache": CacheFormat(keep_channels=3)}, {"mixed_precision": True}]
)
@pytest.mark.parametrize("bits", [8, 2])
def test_images_of_a_batch_share_no_scale(dit, mode_of, options, bits):
    """A picture beside another 50 times as loud is, bit by bit, as beside a copy of itself."""
    config = DQARConfig(**OPEN, quantize_bits=bits, quantize_mode=mode_of, **options)
    controller = DQARController(1, config)
    seen = []
    partner = {"key_partner": torch.ones(2, 1, 8), "value_partner": torch.ones(2, 1, 8)} if "balance" in options else {}
    for loud in (1.0, 50.0):
        x = torch.cat([noise(1, 1, 16, 8), loud * noise(2 if loud > 1 else 1, 1, 16, 8)])
        controller.begin_step(0, 4)
        controller.should_reuse(0)
        controller.commit(0, keys=x, values=2 * x, **partner)
        controller.begin_step(1, 4)
        entry = controller.should_reuse(0).entry
        seen.append((entry.k.dequantize()[0], entry.v.dequantize()[0]))
    assert all(map(same, *seen))


@pytest.mark.parametrize("name", [*TARGETS, "int8", "readouts"])
def test_an_image_does_not_depend_on_who_else_is_in_its_batch(dit, name):
    """Bit by bit: the same rows of the same matrix products, beside other neighbours."""
    with apply_dqar(dit, mode(name, dit)):
        first, second = draw(dit, (1, 2, 3)), draw(dit, (1, 7, 900))
    assert near(first[0], second[0], 1e-5)


@pytest.mark.parametrize("how", ["in place", "another parameter", "another layer", "a hook", "patched forward"])
def test_projections_of_the_caption_that_change_in_mid_run(how):
    """What is kept of a caption must not outlive the weights that made it; ``.data`` leaves no trace."""

    def drawn(pipe):
        def alter(step, _timestep, _latents):
            if step == 2:
                change(pipe.transformer, how, "attn2.to_k", 0)
                change(pipe.transformer, how, "attn2.to_v", 2)

        return draw_text(pipe, callback=alter, callback_steps=1)

    want, pipe = drawn(make_pixart()), make_pixart()
    assert not same(want, draw_text(pipe))
    with apply_dqar(pipe, CLOSED):
        assert same(drawn(pipe), want)


def test_timesteps_near_the_schedulers_are_no_timesteps_of_its(dit):
    """Embeddings are kept for the timestep that the model was given, not for the one that it stands for."""

    def drawn(pipe, shifts):
        pipe.scheduler.set_timesteps(8)
        x = noise(0)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                outputs = [pipe.transformer(x, (t - shift).expand(1), torch.tensor([1])).sample for shift in shifts]
                x = pipe.scheduler.step(sum(outputs)[:, :4] / len(shifts), t, x).prev_sample
        return x

    kinds = ((0,), (2,), (0, 1))
    want = [drawn(make_dit(), shifts) for shifts in kinds]
    with apply_dqar(dit, CLOSED):
        assert all(same(drawn(dit, shifts), image) for shifts, image in zip(kinds, want, strict=True))


def test_timesteps_that_are_changed_in_place(dit):
    def drawn(pipe):
        pipe.scheduler.set_timesteps(8)
        first = loop(pipe, timesteps=pipe.scheduler.timesteps)
        pipe.scheduler.timesteps.sub_(7)
        return first, loop(pipe, timesteps=pipe.scheduler.timesteps)

    want = drawn(make_dit())
    assert not same(*want)
    with apply_dqar(dit, CLOSED):
        assert all(map(same, drawn(dit), want))


def test_embeddings_of_one_number_format_are_not_given_in_another(dit):
    def drawn(pipe):
        images = []
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                images.append(loop(pipe))
        return images

    want = drawn(make_dit())
    with apply_dqar(dit, CLOSED):
        assert all(map(same, drawn(dit), want))


def test_a_hook_that_comes_in_mid_run(dit):
    def drawn(pipe):
        def see(i, *_args):
            if i == 3:
                change(pipe.transformer, "a hook", "norm1.linear")

        return loop(pipe), loop(pipe, see=see)

    want = drawn(make_dit())
    assert not same(*want)
    with apply_dqar(dit, CLOSED):
        assert all(map(same, drawn(dit), want))


@pytest.mark.parametrize("options", [{}, {"reuse_target": "kv"}, {"balance": True}])
def test_weights_that_torchao_has_quantized(dit, options):
    quantize_(dit.transformer, Int8WeightOnlyConfig())
    want = loop(dit)
    with apply_dqar(dit, dataclasses.replace(CLOSED, **options)):
        assert same(loop(dit), want) and same(loop(dit), want)


@pytest.mark.parametrize("config", ["plan.json", {}, 5, CacheFormat()])
def test_what_is_no_configuration_is_refused_before_anything_is_touched(dit, config):
    with pytest.raises(ValueError, match=r"config=.* is not accepted: use a DQARConfig, ReusePlan") as refused:
        apply_dqar(dit, config)
    check_refusal(refused.value)
    assert same(draw(dit), draw(make_dit()))


def test_a_model_compiled_as_one_graph_is_refused_in_words(dit):
    torch._dynamo.reset()
    dit.transformer.compile(backend="eager", fullgraph=True)
    want = draw(dit, steps=3)
    with apply_dqar(dit, EVERY), pytest.raises(ValueError, match="without fullgraph=True"):
        draw(dit, steps=3)
    assert same(draw(dit, steps=3), want)


def test_a_plan_is_saved_to_a_file_in_a_folder(dit, tmp_path):
    """Else the message names what was asked for, not a file beside it."""
    plan = make_plan(dit)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path / 'nowhere'} is no folder: make it first"):
        plan.save(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder: name a file"):
        plan.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
