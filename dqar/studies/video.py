"""Notebook 09's video panel: results reused over steps and over frames, and plans, on the embedded video model.

Reuse is measured at two levels. Inside the blocks, every attention and feed-forward is computed at some steps for all
frames, or at all steps for some frames. Of the whole model, the prediction is: at other steps its output is reused, in
other frames the clean picture that it predicts, since the noise of each frame is its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention

from dqar.forecast.fit import Calibration
from dqar.forecast.plan import ForecastPlan
from dqar.forecast.profiles import PLAN_SEED, profile_calls, with_provenance
from dqar.models.profiles import Profile, get_profile
from dqar.studies.compare import FULL, Drawn, Method, compare, draw
from dqar.studies.pareto import computed_steps, extrapolated, plan_path
from dqar.studies.recording import ARENA_SEED, Recording, Sizes
from dqar.takeover import give_back, take_over

Over = Literal["steps", "frames"]
BUDGETS = (2, 3, 4)
"""Full compute's steps over those of a plan, and of fewer steps."""
INTERVALS = (2, 4)
"""Of steps or frames, every so manieth is computed."""
KERNELS: dict[str, tuple[int, ...]] = {"space": (1, 3, 3), "time": (3, 1, 1), "neither": (1, 1, 1)}
"""Of plans, beside those over space and time: where a forecast looks beyond its own pixel and frame."""
PLAN = "plan"


def profile_for(profile: Profile) -> Profile:
    """The video model's, with as many steps and videos as the digits' profile has, where those are fewer."""
    video = get_profile("moving-digits")
    steps, images = min(video.num_inference_steps, profile.num_inference_steps), min(video.images, profile.images)
    return dataclasses.replace(video, num_inference_steps=steps, images=images)


def record_video(recording: Recording) -> pd.DataFrame | None:
    """Plans and every way of reuse on the same videos, beside what is recorded of the digits; of others, nothing.

    Returns:
        The columns of ``compare``, with ``over`` ("steps" or "frames"), ``interval`` and ``order`` of reuse.
    """
    if recording.profile.model != "digits":
        return None
    recording = copy.copy(recording)
    recording.profile = profile = profile_for(recording.profile)
    recording.sizes = Sizes.of(profile)
    make_plans(recording)

    @functools.cache
    def reference() -> Drawn:
        return draw(FULL, profile, ARENA_SEED, num_samples=profile.images)

    def part(way: Way) -> pd.DataFrame:
        with way.attach(way.method.pipeline(profile)) if way.attach else nullcontext():
            table = compare(way.method, reference(), profile, ARENA_SEED)
        return table.assign(over=way.over, interval=way.interval, order=way.order)

    parts = {way.method.name: functools.partial(part, way) for way in ways(recording)}
    return recording.growing("video", parts, ARENA_SEED)


# --- plans -----------------------------------------------------------------------------------------------------------


def make_plans(recording: Recording) -> None:
    """Plans for every budget; for the middle one also with narrower kernels, at the same computed steps."""
    profile, sizes = recording.profile, recording.sizes
    paths = {budget: _plan_path(recording, budget) for budget in BUDGETS}
    narrow = {name: _plan_path(recording, BUDGETS[1], name) for name in KERNELS}
    if all(path.exists() for path in (*paths.values(), *narrow.values())):
        return
    pipe = FULL.pipeline(profile)
    calls = profile_calls(pipe, profile, sizes.plan_images, PLAN_SEED)
    calibration = _Calibration(pipe, calls, profile.num_inference_steps)
    for budget, path in paths.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            plan = calibration.plan(computed_steps(profile, budget), sizes.refinements // 2)
            with_provenance(plan, profile).save(path)
    computed = tuple(sorted(ForecastPlan.load(paths[BUDGETS[1]]).computed))
    for name, path in narrow.items():
        if not path.exists():
            calibration.own_kernel = KERNELS[name]
            plan = calibration.plan(len(computed), 0, [computed])
            with_provenance(plan, profile).save(path)


class _Calibration(Calibration):
    """A calibration whose kernels can be set."""

    own_kernel: tuple[int, ...] | None = None

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.own_kernel or super().kernel


def _plan_path(recording: Recording, budget: float, kernel: str = "") -> Path:
    profile = recording.profile
    sampler = f"video {kernel} {profile.scheduler}" if kernel else f"video {profile.scheduler}"
    return plan_path(recording.folder, sampler, "reference", computed_steps(profile, budget))


# --- reuse -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A method, and what is reused meanwhile of the pipeline that it draws with.

    Attributes:
        over: what computed results are reused for.
        interval: every so manieth step or frame is computed.
        order: 0: others take the nearest computed result as it is; 1: a straight line through two.
        attach: reuses so until the context that it returns ends, where the method itself doesn't.
    """

    method: Method
    over: Over | None = None
    interval: int | None = None
    order: int | None = None
    attach: Callable[[DiffusionPipeline], AbstractContextManager] | None = None


def ways(recording: Recording) -> list[Way]:
    """Everything that is compared."""
    profile, found = recording.profile, [Way(FULL)]
    for budget in BUDGETS:
        steps = computed_steps(profile, budget)
        fewer = Method(f"{steps} steps", "fewer steps", num_inference_steps=steps, budget=budget)
        plan = ForecastPlan.load(_plan_path(recording, budget))
        found += [Way(fewer), Way(Method(f"plan, {budget}×", PLAN, config=plan, budget=budget))]
    for kernel in KERNELS:
        plan = ForecastPlan.load(_plan_path(recording, BUDGETS[1], kernel))
        found.append(Way(Method(f"plan, {BUDGETS[1]}×, {kernel}", f"{PLAN}, {kernel}", config=plan, budget=BUDGETS[1])))
    for interval, order in itertools.product(INTERVALS, (0, 1)):
        text = f"every {interval}, order {order}"
        config = extrapolated(profile, interval, 1, order)
        found.append(Way(Method(f"prediction over steps, {text}", config=config), "steps", interval, order))
        fewer = functools.partial(fewer_frames, interval=interval, order=order)
        found.append(Way(Method(f"prediction over frames, {text}"), "frames", interval, order, fewer))
        for over in get_args(Over):
            sites = functools.partial(reused_sites, over=over, interval=interval, order=order)
            found.append(Way(Method(f"sites over {over}, {text}"), over, interval, order, sites))
    return found


def frame_weights(frames: int, interval: int, order: int) -> tuple[list[int], torch.Tensor]:
    """The computed frames, and the weights ``[frames, computed]`` that make all frames' results of theirs.

    Args:
        frames: of the video, a multiple of ``interval``.
        interval: one of so many is computed, from the middle of each group.
        order: 0: the nearest one, of two the earlier; 1: a straight line between two, beyond the ends the nearest.
    """
    computed = list(range((interval - 1) // 2, frames, interval))
    weights = torch.zeros(frames, len(computed))
    for frame in range(frames):
        place = min(max((frame - computed[0]) / interval, 0), len(computed) - 1)
        low = int(place)
        if order == 0 or place == low:
            weights[frame, math.ceil(place - 0.5)] = 1
        else:
            weights[frame, low : low + 2] = torch.tensor([low + 1 - place, place - low])
    return computed, weights


@contextmanager
def fewer_frames(pipe: DiffusionPipeline, interval: int, order: int) -> Iterator[None]:
    """Gives the model some of the frames; the others' clean pictures are made of those that it predicts."""
    model: Any = pipe.transformer
    computed, weights = frame_weights(model.config.video_length, interval, order)
    positions = model.temp_pos_embed

    def predict(original: Callable, hidden_states: torch.Tensor, timestep: torch.Tensor, *args: Any) -> Any:
        kept = pipe.scheduler.alphas_cumprod.to(hidden_states)[timestep.flatten()[0].long()]
        signal, noise = kept.sqrt(), (1 - kept).sqrt()
        seen = hidden_states[:, :, computed]
        model.temp_pos_embed = positions[:, computed]
        try:
            output = original(seen, timestep, *args)
        finally:
            model.temp_pos_embed = positions
        clean = (seen - noise * output.sample) / signal
        clean = torch.einsum("fk,bckhw->bcfhw", weights.to(clean), clean)
        output.sample = (hidden_states - signal * clean) / noise
        return output

    take_over(model, predict)
    try:
        yield
    finally:
        give_back(model)


@contextmanager
def reused_sites(pipe: DiffusionPipeline, over: Over, interval: int, order: int) -> Iterator[None]:
    """Computes every attention and feed-forward at some steps, or for some frames, and makes the rest of those.

    Along time a frame's attention still sees all frames' keys and values. Over steps ``order`` 1 continues the straight
    line through the last two computed results.
    """
    model: Any = pipe.transformer
    sites = {
        module: along_time
        for blocks, along_time in ((model.transformer_blocks, False), (model.temporal_transformer_blocks, True))
        for block in blocks
        for module in (block.attn1, block.attn2, block.ff)
        if module is not None
    }
    handlers: dict[Any, Callable] = (
        {site: _of_frames(site, model.config.video_length, interval, order, along) for site, along in sites.items()}
        if over == "frames"
        else _of_steps(model, list(sites), interval, order)
    )
    try:
        for module, handler in handlers.items():
            take_over(module, handler)
        yield
    finally:
        for module in handlers:
            give_back(module)


def _of_frames(site: Any, frames: int, interval: int, order: int, along_time: bool) -> Callable:
    computed, weights = frame_weights(frames, interval, order)

    def handle(
        original: Callable, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **named: Any
    ) -> torch.Tensor:
        """Answers with ``[B * frames, tokens, D]``, or, along time, with ``[B * tokens, frames, D]``."""
        by_frame = weights.to(hidden_states)
        if along_time:
            if isinstance(site, Attention):
                named["encoder_hidden_states"] = hidden_states
            return by_frame @ original(hidden_states[:, computed], **named)

        def rows(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(0, (-1, frames))[:, computed].flatten(0, 1)

        if encoder_hidden_states is not None:
            named["encoder_hidden_states"] = rows(encoder_hidden_states)
        found = original(rows(hidden_states), **named).unflatten(0, (-1, len(computed)))
        return torch.einsum("fk,bknd->bfnd", by_frame, found).flatten(0, 1)

    return handle


def _of_steps(model: Any, sites: list[Any], interval: int, order: int) -> dict[Any, Callable]:
    kept: dict[Any, list[torch.Tensor]] = {}
    now = {"step": -1, "timestep": -1.0}

    def begin(original: Callable, hidden_states: torch.Tensor, timestep: torch.Tensor, *args: Any) -> Any:
        value = float(timestep.flatten()[0])
        if value >= now["timestep"]:  # time only falls within a run
            now["step"] = -1
            kept.clear()
        now.update(step=now["step"] + 1, timestep=value)
        return original(hidden_states, timestep, *args)

    def handle(site: Any, original: Callable, *args: Any, **named: Any) -> torch.Tensor:
        past = now["step"] % interval
        if past == 0:
            kept[site] = [original(*args, **named), *kept.get(site, [])[:order]]
        newest, *older = kept[site]
        return torch.lerp(older[0], newest, 1 + past / interval) if older and past else newest

    return {model: begin, **{site: functools.partial(handle, site) for site in sites}}
