"""Makes forecast plans: which steps to compute, and the weights that forecast the others from them.

1. **Trajectories** of a few calibration images: the run's own states (``target="reference"``), or those of the same
   sampler with five times the steps (``"converged"``), at the run's timesteps.
2. **Steps.** What is known at a computed step, its latents and the last two outputs of both branches, is fitted by
   least squares to the latents at any later step. The residual of each such jump needs inner products of the
   trajectories only, so that all jumps of all lengths are known at once; weighted by what an error made there does to
   the finished image, they add up, and dynamic programming finds the best steps for a budget.
3. **Weights.** The planned run is followed from step to step, and at each the output is fitted that would lead the
   scheduler to the target's next latents. So a forecast also mends what those before it did wrong. Each cached tensor
   is weighted by a small kernel: what a pixel's neighbours did tells where the output bends. So do the hidden states
   that the last layer was given at the newest computed step, of which a matrix reads what to add.
4. **Refinement.** Neighbouring sets of steps are tried, and kept if the joint error of a run is smaller on images that
   the weights were not fitted on.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from rich.console import Console
from tqdm import tqdm

from dqar.config import check
from dqar.families import describe_model
from dqar.forecast.plan import ForecastPlan
from dqar.forecast.run import FinalHiddenStates, from_patches, to_patches
from dqar.forecast.steps import Jumps, choose_steps, measure_gains
from dqar.forecast.trajectories import (
    PLAN_SEED,
    RIDGE,
    Target,
    Trajectories,
    finished,
    make_run_scheduler,
    predict,
    trajectories,
)
from dqar.measure.results import provenance
from dqar.models.guidance import guide
from dqar.models.pipelines import load_pipeline
from dqar.models.profiles import SCHEDULERS, Profile, get_profile

HISTORY = 4


KERNEL = 5
"""Side of the kernels: on the digits, each size more (1, 3, 5) brought 1 to 2 dB on images not fitted on."""


NEIGHBOURS_RIDGE = 1e-5
"""The same for the weights of a pixel's neighbours, the many of which would else fit noise."""


READOUT_RIDGE = 3e-3
"""The same for what is read from the hidden states."""


@dataclass(frozen=True)
class _State:
    """What a step of a planned run begins with; the outputs newest first."""

    scheduler: Any
    latents: torch.Tensor
    conds: tuple[torch.Tensor, ...] = ()
    unconds: tuple[torch.Tensor, ...] = ()
    hidden_states: torch.Tensor | None = None
    """Both branches' in one, ``[images, tokens, width]``."""


@dataclass(frozen=True)
class Fitted:
    """A planned run that was followed: its ``weights`` and ``readouts``, as ``ForecastPlan`` has them, what each step
    began with, and each image's mean squared error when finished, ``[images]``."""

    computed: tuple[int, ...]
    fitted_on: int
    weights: tuple[tuple[float, ...], ...]
    readouts: tuple[tuple[float, ...], ...]
    states: tuple[_State, ...]
    error: torch.Tensor


def fit(
    pipe: DiffusionPipeline,
    profile: Profile,
    computed: tuple[int, ...],
    known: Trajectories,
    fitted_on: int,
    like: Fitted | None = None,
) -> Fitted:
    """Follows a run that computes only at ``computed``, and fits each step's weights as it comes by.

    Args:
        fitted_on: the first so many images of ``known`` are fitted on; all follow.
        like: an earlier fit on the same images: what it did before the first step that differs is taken from it.
    """
    start = 0
    if like is not None and like.fitted_on == fitted_on:
        start = min(set(computed) ^ set(like.computed), default=known.num_steps - 1)
    states = (
        list(like.states[: start + 1])
        if start
        else [_State(make_run_scheduler(pipe, known.num_steps), known.latents[0])]
    )
    rows, readouts = (list(like.weights[:start]), list(like.readouts[:start])) if start else ([], [])
    for step in range(start, known.num_steps):
        state, scheduler = states[step], copy.deepcopy(states[step].scheduler)
        t, latents, conds, unconds = scheduler.timesteps[step], state.latents, state.conds, state.unconds
        model_input, hidden_states = scheduler.scale_model_input(latents, t), state.hidden_states
        if step in computed:
            with FinalHiddenStates(pipe.transformer) as seen:
                cond, uncond = predict(pipe, profile, model_input, t, known.labels)
            conds = (cond, *conds)[:HISTORY]
            unconds = () if uncond is None else (uncond, *unconds)[:HISTORY]
            hidden_states = torch.cat(seen.take().split(len(latents)), -1)
        newest = guide(conds[0], unconds[0] if unconds else None, profile.guidance_scale)
        if step == 0:
            rows.append(())
            readouts.append(())
            output = newest
        else:
            columns = torch.cat([_neighbourhoods(x) for x in (*conds, *unconds, model_input)], -1)
            # The output that takes the scheduler to the target's next latents: they are affine in it.
            nowhere = _copied_step(scheduler, torch.zeros_like(latents), t, latents)
            slope = (_copied_step(scheduler, torch.ones_like(latents), t, latents) - nowhere).flatten()[0]
            wanted = (known.latents[step + 1] - nowhere) / slope - newest
            weights, matrix = fit_step(columns[:fitted_on], hidden_states[:fitted_on], wanted[:fitted_on])
            centers = weights.view(-1, KERNEL**2)[:, KERNEL**2 // 2]
            centers[0] += profile.guidance_scale if unconds else 1
            if unconds:
                centers[len(conds)] += 1 - profile.guidance_scale
            rows.append(tuple(float(f"{w:.7g}") for w in weights.tolist()))
            readouts.append(tuple(float(f"{w:.5g}") for w in matrix.flatten().tolist()))
            read = from_patches(hidden_states.double() @ matrix, latents.shape)
            output = ((columns @ weights).view_as(latents) + read).to(latents.dtype)
        latents = scheduler.step(output, t, latents).prev_sample
        states.append(_State(scheduler, latents, conds, unconds, hidden_states))
    error = (finished(pipe, latents) - finished(pipe, known.latents[-1])).square().flatten(1).mean(1)
    return Fitted(computed, fitted_on, tuple(rows), tuple(readouts), tuple(states), error)


def make_plan(
    pipe: DiffusionPipeline,
    profile: Profile,
    num_computed: int,
    known: Trajectories,
    gains: np.ndarray,
    refinements: int = 12,
    starts: Sequence[tuple[int, ...]] = (),
) -> ForecastPlan:
    """The best plan found that computes ``num_computed`` steps.

    Args:
        refinements: neighbours to try.
        starts: sets of steps to begin with, in place of the predicted ones: of an earlier plan that is to be improved.

    Its provenance has ``trials``, the sets of steps that were tried, each with its ``predicted`` and ``measured`` mean
    squared error: the latter of finished images in [-1, 1] that the weights had not been fitted on.
    """
    jumps, half = Jumps(known), len(known.labels) // 2
    trials: dict[tuple[int, ...], tuple[float, float]] = {}
    best: Fitted | None = None
    generator = np.random.default_rng(len(starts))
    starts = starts or [choose_steps(jumps, num_computed, gains**power)[0] for power in (0, 0.5, 1)]
    for trial in tqdm(range(len(starts) + refinements), desc=f"refining {num_computed} steps", leave=False):
        steps = starts[trial] if trial < len(starts) else _neighbour(best.computed, known.num_steps, trials, generator)
        if steps in trials:
            continue
        fitted = fit(pipe, profile, steps, known, half, like=best)
        error = fitted.error[half:].mean().item()
        if not trials or error < min(measured for _, measured in trials.values()):
            best = fitted
        trials[steps] = _predicted(jumps, steps, gains), error
    final = fit(pipe, profile, best.computed, known, len(known.labels))
    scheduler = make_run_scheduler(pipe, known.num_steps)
    source = {
        "target": known.target,
        "calibration_images": len(known.labels),
        "trials": [{"computed": list(s), "predicted": p, "measured": m} for s, (p, m) in trials.items()],
        **provenance(profile, PLAN_SEED),
    }
    guidance, model = max(1.0, profile.guidance_scale), describe_model(pipe.transformer)
    timesteps = scheduler.timesteps.tolist()
    return ForecastPlan(
        final.weights,
        best.computed,
        timesteps,
        guidance,
        HISTORY,
        model,
        KERNEL,
        source,
        final.readouts,
        type(scheduler).__name__,
    )


def _predicted(jumps: Jumps, computed: tuple[int, ...], gains: np.ndarray) -> float:
    path = [None, *computed, jumps.num_steps]
    landings = zip(path[:-2], path[1:-1], path[2:], strict=True)
    return float(sum(gains[later] * jumps.errors(step, before)[later - step - 1] for before, step, later in landings))


def _neighbour(
    computed: tuple[int, ...], num_steps: int, tried: Collection[tuple[int, ...]], generator: np.random.Generator
) -> tuple[int, ...]:
    """One computed step, but not the first, moved by one or two, so that the set is new."""
    for _ in range(100):
        moved = list(computed)
        which = generator.integers(1, len(moved))
        moved[which] += int(generator.choice([-2, -1, 1, 2]))
        if 0 < moved[which] < num_steps and moved[which] not in computed and tuple(sorted(moved)) not in tried:
            return tuple(sorted(moved))
    return computed  # nearly all steps are computed, or all neighbours tried


def _neighbourhoods(x: torch.Tensor) -> torch.Tensor:
    """What a kernel sees of ``[images, C, H, W]``: ``[images, C * H * W, KERNEL²]`` in float64, zeros beyond edges."""
    seen = F.unfold(x.flatten(0, 1)[:, None].double(), KERNEL, padding=KERNEL // 2)
    return seen.transpose(1, 2).reshape(len(x), -1, KERNEL**2)


def fit_step(
    columns: torch.Tensor, hidden_states: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels and the matrix of the hidden states that together come closest to what is wanted.

    The kernels are the same for all pixels, while the matrix has a column for each of a patch's. It is eliminated
    first, which leaves a small system for the kernels.

    Args:
        columns: ``[images, C * H * W, K]``, what the kernels see.
        hidden_states: ``[images, tokens, width]``.
        wanted: ``[images, C, H, W]``.

    Returns:
        ``[K]`` and ``[width, size of a patch]``, float64.
    """
    tokens, kernels = hidden_states.shape[1], columns.shape[2]
    maps = columns.transpose(1, 2).reshape(-1, *wanted.shape[1:])
    maps = to_patches(maps, tokens).view(len(wanted), kernels, tokens, -1).permute(0, 2, 3, 1)
    maps, goal = maps.flatten(0, 1), to_patches(wanted.double(), tokens).flatten(0, 1)  # [rows, size, K], [rows, size]
    norms, state_norms = maps.flatten(0, 1).norm(dim=0), hidden_states.double().flatten(0, 1).norm(dim=0)
    maps, states = maps / norms.clamp_min(1e-12), hidden_states.double().flatten(0, 1) / state_norms.clamp_min(1e-12)

    of_states = states.T @ states
    of_states.diagonal().add_(READOUT_RIDGE)
    factor = torch.linalg.cholesky(of_states)
    by_maps, by_goal = states.T @ maps.flatten(1), states.T @ goal
    for_maps, for_goal = torch.cholesky_solve(by_maps, factor), torch.cholesky_solve(by_goal, factor)
    by_maps, for_maps = by_maps.view(-1, kernels), for_maps.reshape(-1, kernels)

    ridge = torch.full((KERNEL**2,), NEIGHBOURS_RIDGE, dtype=maps.dtype, device=maps.device)
    ridge[KERNEL**2 // 2] = RIDGE
    flat = maps.flatten(0, 1)
    system = flat.T @ flat - by_maps.T @ for_maps
    system.diagonal().add_(ridge.repeat(kernels // len(ridge)))
    weights = torch.linalg.solve(system, flat.T @ goal.flatten() - by_maps.T @ for_goal.flatten())
    matrix = for_goal - (for_maps @ weights).view_as(for_goal)
    return weights / norms.clamp_min(1e-12), matrix / state_norms.clamp_min(1e-12)[:, None]


def _copied_step(scheduler: Any, output: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(scheduler).step(output, t, latents).prev_sample


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="dqar plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="digits", help="see dqar/models/profiles.py (default: digits)")
    parser.add_argument("--scheduler", help=f"in place of the profile's: one of {', '.join(SCHEDULERS)}")
    parser.add_argument("--macs", type=float, default=3.0, help="full compute's over the plan's, at least (default: 3)")
    parser.add_argument("--target", default="reference", help=f"{' or '.join(get_args(Target))} (default: reference)")
    parser.add_argument("--images", type=int, default=120, help="calibration images (default: 120)")
    parser.add_argument("--refinements", type=int, default=12, help="neighbouring sets of steps to try (default: 12)")
    parser.add_argument("--start", type=Path, help="an earlier plan with as many computed steps, to be improved")
    parser.add_argument("--out", type=Path, default=Path("plan.json"))
    options = parser.parse_args(arguments)
    console = Console()
    try:
        changes = {"scheduler": options.scheduler} if options.scheduler else {}
        profile = get_profile(options.profile, **changes)
        check("--macs", options.macs, 1 <= options.macs <= profile.num_inference_steps / 2, "from 1 to half the steps")
        check("--images", options.images, options.images >= 2, "2 or more")
        check("--refinements", options.refinements, options.refinements >= 0, "0 or more")
        number = int(profile.num_inference_steps / options.macs)
        starts = [] if options.start is None else [tuple(sorted(ForecastPlan.load(options.start).computed))]
        if starts and len(starts[0]) != number:
            raise ValueError(f"{options.start} computes {len(starts[0])} steps, {number} are wanted")
        pipe = load_pipeline(profile)
        known = trajectories(pipe, profile, options.target, options.images)
        gains = measure_gains(pipe, profile, known.first(8))
        plan = make_plan(pipe, profile, number, known, gains, options.refinements, starts)
        plan.save(options.out)
    except (ValueError, OSError, RuntimeError) as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    error = min(trial["measured"] for trial in plan.provenance["trials"])
    # Images in [-1, 1] have four times the squared error of those in [0, 1].
    quality = f"{-10 * math.log10(max(error / 4, 1e-12)):.1f} dB to the {options.target} on images not fitted on"
    console.print(
        f"{options.out}: computes {len(plan.computed)} of {plan.num_inference_steps} steps, "
        f"{plan.macs_speedup:.2f}× fewer MACs; {quality}",
        highlight=False,
    )
    return 0
