"""What ``test_situations.py`` stands on: small pipelines with random weights, hand-written loops, and naive reuse."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re

import torch
from helpers import NULL, draw, draw_text, make_dit, make_pixart

from dqar import DQARConfig, Probe, apply_dqar, describe_model, extrapolation

OPEN = {"entropy_threshold": math.inf, "snr_range": (0, math.inf), "schedule": "all"}
CLOSED = DQARConfig(schedule="none")
LOOKING = DQARConfig(entropy_threshold=0, snr_range=(0.5, 50.0), schedule="all", probe=Probe(record=True))
TARGETS = ("kv", "output", "block", "residual")
same = torch.equal


def every(target="output", **options):
    """Reuses wherever there is something to reuse: steps 0, 4, 8 ... of a run compute."""
    return DQARConfig(**{**OPEN, "reuse_target": target, "quantize_bits": 16, **options})


EVERY = every()


# --- dqar -------------------------------------------------------------------------------------------------------------


def make_plan(pipe, computed=(0, 2, 3, 7), steps=8, guidance=3.0, order=1):
    """The plainest ForecastPlan: computes these steps, extrapolates the guided output at the others."""
    pipe.scheduler.set_timesteps(steps)
    return plan_for(pipe.transformer, pipe.scheduler.timesteps, computed, guidance, order)


def plan_for(transformer, timesteps, computed, guidance=3.0, order=1):
    return extrapolation(computed, timesteps.tolist(), guidance, describe_model(transformer), order)


def with_readouts(plan, transformer, std=0.05):
    """The plan, and random readouts wherever it forecasts."""
    config = transformer.config
    patch = config.patch_size**2 * config.in_channels
    size = (2 if plan.guided else 1) * config.num_attention_heads * config.attention_head_dim * patch
    torch.manual_seed(0)
    rows = tuple(tuple((std * torch.randn(size)).tolist()) if row else () for row in plan.weights)
    return dataclasses.replace(plan, readouts=rows)


MODES = ("closed", "looking", *TARGETS, "int8", "balanced", "plan", "readouts")


def mode(name, pipe, steps=8, guidance=3.0):
    """One of ``MODES`` for this pipeline."""
    if name in TARGETS:
        return every(name)
    if name in ("plan", "readouts"):
        plan = make_plan(pipe, {0, 2, 3, steps - 1} & set(range(steps)), steps, guidance)
        return plan if name == "plan" else with_readouts(plan, pipe.transformer)
    return {
        "closed": CLOSED,
        "looking": LOOKING,
        "int8": DQARConfig(**OPEN, reuse_target="output"),
        "balanced": DQARConfig(**OPEN, quantize_mode="per_tensor", balance=True),
    }[name]


def rows(session, module="self_attention"):
    return session.trace.to_pandas(module)


def timesteps_of(session, module="self_attention"):
    """The traced timesteps, a number per run and step, in the order in which they were run."""
    table = rows(session, module)
    return table.groupby(["run", "step"], sort=False).timestep.first().tolist()


REMEDY = re.compile(
    r"\b(add|apply|begin|build|call|choose|compute|detach|give|go|keep|leave|make|move|needs?|only|pass|put|remove|run|"
    r"set|start|stop|switch|take|turn|unfuse|unload|use|without|wrap|write)\b",
    re.IGNORECASE,
)


def check_refusal(error):
    """A ``ValueError`` in whole words that says what to do instead."""
    text = str(error)
    assert len(text.split()) >= 6, f"too short to help: {text}"
    assert REMEDY.search(text), f"names no way out: {text}"
    assert not re.search(r"\b1 (steps|layers|runs|images|calls|channels|heads|rows|branches)\b", text), text


@contextlib.contextmanager
def or_refused():
    """What stands below is right, or is refused with words that help. ``refused`` tells a caller which it was."""
    outcome = type("Outcome", (), {"refused": False})()
    try:
        yield outcome
    except ValueError as error:
        outcome.refused = True
        check_refusal(error)


def near(got, want, tolerance=1e-4):
    """Equal to rounding: the difference in norm, relative to what is wanted."""
    return bool(got.shape == want.shape and (got - want).norm() <= tolerance * want.norm())


# --- drawing ----------------------------------------------------------------------------------------------------------


@functools.cache
def untouched(kind="dit", **options):
    """What a fresh, untouched pipeline draws."""
    return draw(make_dit(), **options) if kind == "dit" else draw_text(make_pixart(), **options)


@functools.cache
def alone(name, kind="dit", **options):
    """What a fresh pipeline draws with dqar in this mode, in its only run."""
    pipe = make_dit() if kind == "dit" else make_pixart()
    given = {key: options[key] for key in ("steps", "guidance") if key in options}
    given = given if kind == "dit" else {"steps": 6, "guidance": 4.5, **given}
    with apply_dqar(pipe, mode(name, pipe, **given)):
        return draw(pipe, **options) if kind == "dit" else draw_text(pipe, **options)


def noise(seed, *shape):
    return torch.randn(*(shape or (1, 4, 8, 8)), generator=torch.Generator().manual_seed(seed))


class Naive:
    """Reuse by forward hooks: what a module last returned to this caller, three steps in a row, unquantized."""

    def __init__(self, transformer, target="output", streak=3, reused=None):
        self.streak, self.reused, self.caller, self.step = streak, reused, "", 0
        self.kept, self.age = {}, {}
        modules = {
            "output": lambda block: (block.attn1,),
            "kv": lambda block: (block.attn1.to_k, block.attn1.to_v),
            "block": lambda block: (block.attn1, block.ff),
            "residual": lambda block: (block,),
        }[target]
        self.residual = target == "residual"
        watched = [module for block in transformer.transformer_blocks for module in modules(block)]
        self.handles = [module.register_forward_hook(self.hook) for module in watched]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()

    def at(self, step, caller=""):
        self.step, self.caller = step, caller

    def forget(self):
        self.kept, self.age = {}, {}

    def hook(self, module, args, output):
        key = module, self.caller
        due = self.age.get(key, 0) < self.streak if self.reused is None else self.step in self.reused
        if key in self.kept and due:
            self.age[key] = self.age.get(key, 0) + 1
            return args[0] + self.kept[key] if self.residual else self.kept[key]
        self.kept[key], self.age[key] = output - args[0] if self.residual else output, 0
        return None


def _line(steps, step):
    """Weights of the polynomial through ``steps`` at ``step``."""
    return [math.prod((step - b) / (a - b) for b in steps if b != a) for a in steps]


@torch.no_grad()
def loop(
    pipe,
    labels=lambda i: 1,
    steps=8,
    seed=0,
    guidance=lambda i: 3.0,
    start=0,
    stop=None,
    timesteps=None,
    calls="both",
    scheduler=None,
    size=8,
    batch=1,
    naive=None,
    forecast=None,
    see=None,
    transformer=None,
):
    """A hand-written sampling loop: latents.

    Args:
        labels: class at step i.
        guidance: scale at step i; ``None`` leaves the unconditional branch out.
        start, stop: of the scheduler's timesteps; ``timesteps``: those instead, and the scheduler isn't set.
        calls: how a step calls the model: ``"both"`` branches in one batch, ``"cond first"``, ``"uncond first"``.
        naive: told which step and caller it is. ``forecast``: (computed steps, order), forecast by hand.
        see: is given step, model input, latents and guided prediction.
    """
    scheduler, transformer = scheduler or pipe.scheduler, transformer or pipe.transformer
    if timesteps is None:
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[start:stop]
    torch.manual_seed(seed)  # of schedulers that add noise
    x = noise(seed, batch, 4, size, size) * getattr(scheduler, "init_noise_sigma", 1.0)
    computed = []

    def call(inputs, t, classes, caller):
        if naive is not None:
            naive.at(i, caller)
        classes = torch.tensor(classes).repeat_interleave(batch)
        return transformer(inputs, timestep=t.expand(len(inputs)), class_labels=classes).sample[:, :4]

    for i, t in enumerate(timesteps, start):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        scale = guidance(i)
        if forecast is not None and i not in forecast[0]:
            last = computed[: forecast[1] + 1]
            weights = _line([step for step, _ in last], i)
            predicted = sum(w * old for w, (_, old) in zip(weights, last, strict=True))
        else:
            if scale is None:
                predicted = call(scaled, t, [labels(i)], "cond")
            else:
                if calls == "both":
                    c, u = call(torch.cat([scaled, scaled]), t, [labels(i), NULL], "both").chunk(2)
                else:
                    order = ("cond", "uncond") if calls == "cond first" else ("uncond", "cond")
                    got = {b: call(scaled, t, [labels(i) if b == "cond" else NULL], b) for b in order}
                    c, u = got["cond"], got["uncond"]
                predicted = u + scale * (c - u)
            computed.insert(0, (i, predicted))
        if see is not None:
            see(i, scaled, x, predicted)
        x = scheduler.step(predicted, t, x).prev_sample
    return x


def caption(pipe, prompt):
    embeddings, mask, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    return embeddings.detach(), mask


def text_forward(transformer, x, t, embeddings, mask):
    t = torch.as_tensor(t).reshape(-1)[:1].expand(len(x))
    sizes = {"resolution": None, "aspect_ratio": None}
    inputs = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}
    return transformer(x, timestep=t, **inputs).sample[:, :4]


@torch.no_grad()
def text_loop(pipe, captions, steps=6, guidance=4.5, calls="both", seed=0, stop=None, naive=None, size=8):
    """A hand-written sampling loop over PixArt's transformer; ``captions(i)``: by branch, embeddings and mask."""
    pipe.scheduler.set_timesteps(steps)
    x = noise(seed, 1, 4, size, size)

    def call(x, t, embeddings, mask, caller):
        if naive is not None:
            naive.at(i, caller)
        return text_forward(pipe.transformer, x, t, embeddings, mask)

    for i, t in enumerate(pipe.scheduler.timesteps[:stop]):
        given = captions(i)
        if "uncond" not in given:
            predicted = call(x, t, *given["cond"], "cond")
        else:
            if calls == "both":
                both = (torch.cat([given["uncond"][k], given["cond"][k]]) for k in (0, 1))
                u, c = call(torch.cat([x, x]), t, *both, "both").chunk(2)
            else:
                order = ("cond", "uncond") if calls == "cond first" else ("uncond", "cond")
                got = {branch: call(x, t, *given[branch], branch) for branch in order}
                c, u = got["cond"], got["uncond"]
            predicted = u + guidance * (c - u)
        x = pipe.scheduler.step(predicted, t, x).prev_sample
    return x
