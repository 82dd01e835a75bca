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
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from rich.console import Console
from tqdm import tqdm

from dqar.config import check, check_choice
from dqar.families import describe_model
from dqar.forecast import FinalHiddenStates, from_patches, to_patches
from dqar.models import SCHEDULERS, Profile, branch_predictions, get_profile, guide, load_pipeline
from dqar.plan import ForecastPlan
from dqar.results import provenance
from dqar.sampling import class_labels, first_latents

PLAN_SEED = 500
"""Of the calibration images: of none that is compared later."""
HISTORY = 4
KERNEL = 5
"""Side of the kernels: on the digits, each size more (1, 3, 5) brought 1 to 2 dB on images not fitted on."""
FINER = 5
"""Steps of the converged run for each one of the planned run."""
RIDGE = 1e-9
"""Of the least squares, relative to normalised columns: outputs of neighbouring steps are nearly parallel."""
NEIGHBOURS_RIDGE = 1e-5
"""The same for the weights of a pixel's neighbours, the many of which would else fit noise."""
READOUT_RIDGE = 3e-3
"""The same for what is read from the hidden states."""
Target = Literal["reference", "converged"]


@dataclass(frozen=True)
class Trajectories:
    """Denoisings of some images, at the timesteps of the planned run.

    ``latents`` ``[steps + 1, images, C, H, W]``, and the model's predictions in them, ``[steps, images, C, H, W]``;
    ``uncond`` is ``None`` without guidance.
    """

    latents: torch.Tensor
    cond: torch.Tensor
    uncond: torch.Tensor | None
    labels: torch.Tensor
    target: Target

    @property
    def num_steps(self) -> int:
        """Denoising steps."""
        return len(self.cond)

    def first(self, images: int) -> Trajectories:
        """Those of the first so many images."""
        uncond = None if self.uncond is None else self.uncond[:, :images]
        return Trajectories(self.latents[:, :images], self.cond[:, :images], uncond, self.labels[:images], self.target)


def trajectories(
    pipe: DiffusionPipeline, profile: Profile, target: Target, num_images: int = 120, seed: int = PLAN_SEED
) -> Trajectories:
    """Denoises calibration images of all classes in full compute.

    Args:
        pipe: with a class-conditional transformer, DQAR not applied.
        profile: steps and guidance.
        target: the run itself, or one with ``FINER`` times the steps.

    Raises:
        ValueError: an unknown target, or a scheduler whose finer steps don't include the coarse ones.
    """
    check_choice("target", target, get_args(Target))
    images = torch.arange(num_images)
    labels = class_labels(pipe, images).to(pipe.device)
    scheduler, every = _scheduler(pipe, profile.num_inference_steps), 1
    if target == "converged":
        scheduler, every = _finer(pipe, profile.num_inference_steps)
    latents = first_latents(pipe, scheduler, seed, images).float()  # a half-precision model runs between float32 states
    states, conds, unconds = [], [], []
    for step, t in enumerate(tqdm(scheduler.timesteps, desc=f"{target} trajectories", leave=False)):
        cond, uncond = _predict(pipe, profile, scheduler.scale_model_input(latents, t), t, labels)
        if step % every == 0:
            states.append(latents)
            conds.append(cond)
            unconds.append(uncond)
        latents = scheduler.step(guide(cond, uncond, profile.guidance_scale), t, latents).prev_sample
    both = None if unconds[0] is None else torch.stack(unconds)
    return Trajectories(torch.stack([*states, latents]), torch.stack(conds), both, labels, target)


class Jumps:
    """How wrong the latents are after a jump from one computed step to a later one: all of them, by least squares."""

    def __init__(self, known: Trajectories):
        self.num_steps = known.num_steps
        parts = [known.latents, known.cond, *([] if known.uncond is None else [known.uncond])]
        vectors = torch.cat([part.flatten(1) for part in parts]).double()
        self.gram, self.size = (vectors @ vectors.T).cpu(), vectors.shape[1]
        offsets = np.cumsum([0, *map(len, parts)])[1:-1]
        self._outputs = [int(offset) for offset in offsets]
        self._known: dict[tuple[int, int | None], np.ndarray] = {}

    def errors(self, step: int, before: int | None) -> np.ndarray:
        """Mean squared error of the latents at steps ``step + 1 ...``, computed last at ``step`` and at ``before``."""
        if (step, before) not in self._known:
            columns = [step, *(offset + step for offset in self._outputs)]
            columns += [] if before is None else [offset + before for offset in self._outputs]
            later = torch.arange(step + 1, self.num_steps + 1)
            norms = self.gram.diagonal()[columns].sqrt().clamp_min(1e-12)
            system = self.gram[columns][:, columns] / norms / norms[:, None]
            wanted = self.gram[columns][:, later] / norms[:, None]
            weights = torch.linalg.solve(system + RIDGE * torch.eye(len(columns), dtype=system.dtype), wanted)
            fitted = 2 * (weights * wanted).sum(0) - (weights * (system @ weights)).sum(0)
            error = (self.gram.diagonal()[later] - fitted).clamp_min(0) / self.size
            self._known[step, before] = error.numpy()
        return self._known[step, before]


def choose_steps(jumps: Jumps, num_computed: int, gains: np.ndarray) -> tuple[tuple[int, ...], float]:
    """The steps to compute, so that the errors of all jumps, each times the gain where it lands, add up to the least.

    Dynamic programming over the last two computed steps.

    Args:
        num_computed: how many; the first step always is.
        gains: ``[steps + 1]``: what a squared error of the latents there is worth in the end.

    Returns:
        The steps, and the predicted mean squared error.
    """
    steps = jumps.num_steps
    check("num_computed", num_computed, 2 <= num_computed <= steps, f"an int from 2 to {steps}")
    longest = math.ceil(3 * steps / num_computed)
    best: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {(0, None): (0.0, (0,))}
    for count in range(1, num_computed):
        longer: dict[tuple[int, int | None], tuple[float, tuple[int, ...]]] = {}
        for (step, before), (cost, path) in best.items():
            errors = jumps.errors(step, before)
            for later in range(step + 1, min(steps - (num_computed - count) + 1, step + 1 + longest)):
                total = cost + gains[later] * errors[later - step - 1]
                if total < longer.get((later, step), (math.inf,))[0]:
                    longer[later, step] = total, (*path, later)
        best = longer
    totals = [(cost + gains[steps] * jumps.errors(*last)[-1], path) for last, (cost, path) in best.items()]
    error, path = min(totals)
    return path, float(error)


def measure_gains(pipe: DiffusionPipeline, profile: Profile, known: Trajectories, points: int = 10) -> np.ndarray:
    """The squared error of the finished image for a squared error of the latents at each step, ``[steps + 1]``.

    At ``points`` steps the latents are displaced by the error of a jump of the usual length, and the run is finished in
    full compute; between the points, interpolated.
    """
    steps, jump = known.num_steps, max(1, known.num_steps // 16)
    where = np.unique(np.linspace(jump, steps - 1, points).round().astype(int))
    scheduler = _scheduler(pipe, steps)
    measured = []
    for step in tqdm(range(steps), desc="gains", leave=False):
        t = scheduler.timesteps[step]
        if step in where:
            displaced = _jumped(known, step, max(0, step - jump))
            latents, own = known.latents[step] + displaced, copy.deepcopy(scheduler)
            for later in range(step, steps):
                latents = _full_step(pipe, profile, own, own.timesteps[later], latents, known.labels)
            final = _finished(pipe, latents) - _finished(pipe, known.latents[-1])
            measured.append(float(final.square().mean() / displaced.square().mean()))
        uncond = None if known.uncond is None else known.uncond[step]
        scheduler.step(guide(known.cond[step], uncond, profile.guidance_scale), t, known.latents[step])
    return np.interp(np.arange(steps + 1), where, measured)


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
    states = list(like.states[: start + 1]) if start else [_State(_scheduler(pipe, known.num_steps), known.latents[0])]
    rows, readouts = (list(like.weights[:start]), list(like.readouts[:start])) if start else ([], [])
    for step in range(start, known.num_steps):
        state, scheduler = states[step], copy.deepcopy(states[step].scheduler)
        t, latents, conds, unconds = scheduler.timesteps[step], state.latents, state.conds, state.unconds
        model_input, hidden_states = scheduler.scale_model_input(latents, t), state.hidden_states
        if step in computed:
            with FinalHiddenStates(pipe.transformer) as seen:
                cond, uncond = _predict(pipe, profile, model_input, t, known.labels)
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
            weights, matrix = _fit_step(columns[:fitted_on], hidden_states[:fitted_on], wanted[:fitted_on])
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
    error = (_finished(pipe, latents) - _finished(pipe, known.latents[-1])).square().flatten(1).mean(1)
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
    scheduler = _scheduler(pipe, known.num_steps)
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


def _jumped(known: Trajectories, step: int, start: int) -> torch.Tensor:
    """The error of the latents at ``step`` if nothing is computed after ``start``."""
    uncond = [] if known.uncond is None else [known.uncond[start]]
    columns = torch.stack([x.flatten() for x in (known.latents[start], known.cond[start], *uncond)], 1).double()
    wanted = known.latents[step].flatten().double()
    return (columns @ _least_squares(columns, wanted) - wanted).view_as(known.latents[step]).to(known.latents.dtype)


def _neighbourhoods(x: torch.Tensor) -> torch.Tensor:
    """What a kernel sees of ``[images, C, H, W]``: ``[images, C * H * W, KERNEL²]`` in float64, zeros beyond edges."""
    seen = F.unfold(x.flatten(0, 1)[:, None].double(), KERNEL, padding=KERNEL // 2)
    return seen.transpose(1, 2).reshape(len(x), -1, KERNEL**2)


def _fit_step(
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


def _least_squares(columns: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    norms = columns.norm(dim=0).clamp_min(1e-12)
    columns = columns / norms
    system = columns.T @ columns
    system.diagonal().add_(RIDGE)
    return torch.linalg.solve(system, columns.T @ wanted) / norms


def _scheduler(pipe: DiffusionPipeline, num_inference_steps: int) -> Any:
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def _finer(pipe: DiffusionPipeline, num_inference_steps: int) -> tuple[Any, int]:
    """A scheduler with about ``FINER`` times the steps, every ``FINER``-th of which is one of the coarse ones."""
    coarse = _scheduler(pipe, num_inference_steps).timesteps
    for steps in (FINER * num_inference_steps, FINER * (num_inference_steps - 1) + 1):  # without and with both ends
        fine = _scheduler(pipe, steps)
        if torch.equal(fine.timesteps[::FINER], coarse):
            return fine, FINER
    raise ValueError(
        f"{type(pipe.scheduler).__name__} with {FINER} times {num_inference_steps} steps doesn't visit the same "
        "timesteps: use timestep_spacing='trailing', or target='reference'"
    )


@torch.no_grad()
def _predict(
    pipe: DiffusionPipeline, profile: Profile, model_input: torch.Tensor, t: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if profile.guidance_scale > 1:
        labels = torch.cat([labels, torch.full_like(labels, pipe.transformer.config.num_embeds_ada_norm)])
    cond, uncond = branch_predictions(pipe.transformer, model_input.to(pipe.transformer.dtype), t, labels)
    return cond.float(), None if uncond is None else uncond.float()


def _full_step(
    pipe: DiffusionPipeline,
    profile: Profile,
    scheduler: Any,
    t: torch.Tensor,
    latents: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    cond, uncond = _predict(pipe, profile, scheduler.scale_model_input(latents, t), t, labels)
    return scheduler.step(guide(cond, uncond, profile.guidance_scale), t, latents).prev_sample


def _copied_step(scheduler: Any, output: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(scheduler).step(output, t, latents).prev_sample


def _finished(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """What is compared in the end: a pixel-space model's latents are the picture, which clips them."""
    return latents if hasattr(pipe, "vae") else latents.clamp(-1, 1)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m dqar.planner", description=__doc__.split("\n\n")[0])
    parser.add_argument("--profile", default="digits", help="see dqar/models.py (default: digits)")
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


if __name__ == "__main__":
    sys.exit(main())
