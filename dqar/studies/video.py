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
from dqar.measure.recorders import StepCounter
from dqar.measure.results import Run
from dqar.models.profiles import Profile, get_profile
from dqar.studies import arena
from dqar.studies.compare import FULL, Drawn, Method, compare, draw, only
from dqar.studies.pareto import computed_steps, extrapolated, plan_path
from dqar.studies.recording import ARENA_SEED, Recording, Sizes
from dqar.takeover import taken_over

Over = Literal["steps", "frames"]
OVER: tuple[Over, ...] = get_args(Over)
FRAMES = 8
"""Of the model's videos."""
BUDGETS = (2, 3)
"""Full compute's steps over those of a plan, and of fewer steps."""
INTERVALS = (2, 4)
"""Of steps or frames, every so manieth is computed."""
KERNELS: dict[str, tuple[int, ...]] = {"space": (1, 3, 3), "neither": (1, 1, 1)}
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
        return Way(FULL).draw(profile, ARENA_SEED, profile.images)

    def part(way: Way) -> pd.DataFrame:
        with way.attached(profile):
            table = compare(way.method, reference(), profile, ARENA_SEED)
        return table.assign(over=way.over, interval=way.interval, order=way.order)

    parts = {way.method.name: functools.partial(part, way) for way in ways(recording)}
    return recording.growing("video", parts, ARENA_SEED, profile.images)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a family and number of MACs: of several orders, the one whose median video is best.

    Args:
        table: of ``record_video``.

    Returns:
        ``method``, ``family``, ``interval``, ``order``, ``macs_speedup``, and PSNR (dB) by each of ``arena.MEASURES``.
    """
    facts = ("family", "interval", "order", "budget", "macs_speedup")
    points = arena.standings(table[table.family != FULL.name], "reference", facts)
    every = points.interval.fillna(points.budget)
    best = points.groupby([points.family, every])["median"].idxmax()
    return points.loc[best].reset_index(drop=True)


def halves(table: pd.DataFrame) -> tuple[pd.Series, pd.Series, pd.Series]:
    """The rows of ``summary`` where every other result is computed: inside the blocks over steps and over frames, and
    by a plan."""
    points = summary(table)
    steps, frames = (only(points, family=f"sites over {over}", interval=INTERVALS[0]) for over in OVER)
    return steps, frames, only(points, family=PLAN, budget=BUDGETS[0])


def in_words(table: pd.DataFrame) -> str:
    """The finding of ``record_video``."""
    steps, frames, plan = halves(table)
    return (
        f"Every other result reused inside the blocks: {steps['median']:.1f} dB over steps, {frames['median']:.1f} "
        f"over frames; a plan of {plan.macs_speedup:.1f}× fewer MACs: {plan['median']:.1f} dB"
    )


@dataclass(frozen=True)
class Shown:
    """Videos of one seed, drawn in several ways.

    Attributes:
        videos: ``[N, F, C, H, W]`` in [0, 1], by the way's name; full compute first, then a plan.
        costs: by the others' names, their rows of ``summary``.
        recorded: number of videos that these stand on.
    """

    videos: dict[str, torch.Tensor]
    costs: pd.DataFrame
    recorded: int


def shown(run: Run, table: pd.DataFrame | None, number: int = 10) -> Shown | None:
    """Draws videos by full compute and in the ways of ``halves``; ``None`` where those aren't recorded.

    Args:
        table: of ``record_video``.
        number: of videos.
    """
    if table is None:
        return None
    profile = dataclasses.replace(profile_for(run.profile), batch_size=number)
    *reuse, plan = halves(table)
    config = ForecastPlan.load(video_plan_path(run.recordings, profile, BUDGETS[0]))
    ways = {FULL.name: Way(FULL), PLAN: Way(Method(PLAN, config=config))}
    for over, row in zip(OVER, reuse, strict=True):
        sites = functools.partial(reused_sites, over=over, interval=INTERVALS[0], order=int(row["order"]))
        ways[f"reuse over {over}"] = Way(Method(f"reuse over {over}"), attach=sites)
    videos = {name: way.draw(profile, run.seed, number).images for name, way in ways.items()}
    costs = pd.DataFrame([plan, *reuse]).set_index(pd.Index(list(videos)[1:]))
    costs.attrs = table.attrs
    return Shown(videos, costs, table.image.nunique())


# --- plans -----------------------------------------------------------------------------------------------------------


def make_plans(recording: Recording) -> None:
    """Plans for every budget; for the largest also with narrower kernels, at the same computed steps."""
    profile, sizes = recording.profile, recording.sizes
    paths = {budget: video_plan_path(recording.folder, profile, budget) for budget in BUDGETS}
    narrow = {name: video_plan_path(recording.folder, profile, BUDGETS[-1], name) for name in KERNELS}
    if all(path.exists() for path in (*paths.values(), *narrow.values())):
        return
    pipe = FULL.pipeline(profile)
    calls = profile_calls(pipe, profile, sizes.plan_images, PLAN_SEED)
    calibration = _Calibration(pipe, calls, profile.num_inference_steps)
    for budget, path in paths.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            plan = calibration.plan(computed_steps(profile, budget), sizes.refinements // 4)
            with_provenance(plan, profile).save(path)
    computed = tuple(sorted(ForecastPlan.load(paths[BUDGETS[-1]]).computed))
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


def video_plan_path(folder: Path, profile: Profile, budget: float, kernel: str = "") -> Path:
    """Of the plan for a profile of videos; ``kernel``: one of ``KERNELS``, in place of the widest."""
    sampler = f"video {kernel} {profile.scheduler}" if kernel else f"video {profile.scheduler}"
    return plan_path(folder, sampler, "reference", computed_steps(profile, budget))


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

    def attached(self, profile: Profile) -> AbstractContextManager:
        """Reuses so on the profile's pipeline."""
        return nullcontext() if self.attach is None else self.attach(self.method.pipeline(profile))

    def draw(self, profile: Profile, seed: int, number: int) -> Drawn:
        """The first videos of a seed."""
        with self.attached(profile):
            return draw(self.method, profile, seed, num_samples=number)


def ways(recording: Recording) -> list[Way]:
    """Everything that is compared."""
    profile, chosen = recording.profile, [Way(FULL)]
    for budget in BUDGETS:
        steps = computed_steps(profile, budget)
        fewer = Method(f"{steps} steps", "fewer steps", num_inference_steps=steps, budget=budget)
        plan = ForecastPlan.load(video_plan_path(recording.folder, profile, budget))
        chosen += [Way(fewer), Way(Method(f"plan, {budget}×", PLAN, config=plan, budget=budget))]
    for kernel in KERNELS:
        plan = ForecastPlan.load(video_plan_path(recording.folder, profile, BUDGETS[-1], kernel))
        chosen.append(
            Way(Method(f"plan, {BUDGETS[-1]}×, {kernel}", f"{PLAN}, {kernel}", config=plan, budget=BUDGETS[-1]))
        )
    for interval, order in itertools.product(INTERVALS, (0, 1)):
        config, options = extrapolated(profile, interval, 1, order), {"interval": interval, "order": order}
        attached: dict[str, Any] = {"prediction over steps": None}
        attached["prediction over frames"] = functools.partial(fewer_frames, **options)
        attached |= {f"sites over {over}": functools.partial(reused_sites, over=over, **options) for over in OVER}
        for family, attach in attached.items():
            name, whole = f"{family}, every {interval}, order {order}", None if attach else config
            over = next(level for level in OVER if family.endswith(level))
            chosen.append(Way(Method(name, family, config=whole), over, interval, order, attach))
    return chosen


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

    with taken_over({model: predict}):
        yield


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
    with taken_over(handlers):
        yield


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
        results = original(rows(hidden_states), **named).unflatten(0, (-1, len(computed)))
        return torch.einsum("fk,bknd->bfnd", by_frame, results).flatten(0, 1)

    return handle


def _of_steps(model: Any, sites: list[Any], interval: int, order: int) -> dict[Any, Callable]:
    kept: dict[Any, list[torch.Tensor]] = {}
    counter = StepCounter()

    def handle(site: Any, original: Callable, *args: Any, **named: Any) -> torch.Tensor:
        past = counter.step % interval
        if past == 0:
            earlier = kept[site] if counter.step else []
            kept[site] = [original(*args, **named), *earlier[:order]]
        newest, *older = kept[site]
        return torch.lerp(older[0], newest, 1 + past / interval) if older and past else newest

    return {model: counter, **{site: functools.partial(handle, site) for site in sites}}
