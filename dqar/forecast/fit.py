"""Makes forecast plans: which steps to compute, and the weights that forecast the others from them.

1. **Trajectories.** The pipeline itself runs the calibration calls in full compute: the run itself
   (``target="reference"``), or one with five times the steps (``"converged"``), at the run's timesteps.
2. **Steps.** What is known at a computed step, its latents and the last two outputs of each branch, is fitted by
   least squares to the latents at any later step. The residual of each such jump needs inner products of the
   trajectories only, so that all jumps of all lengths are known at once; weighted by what an error made there does to
   the finished image, they add up, and dynamic programming finds the best steps for a budget. Real forecasts draw on
   more than two outputs, which helps short jumps most: so sets are found for which longer jumps count more, too.
3. **Weights.** All calls are followed from step to step, side by side, computing only the chosen steps. At each step
   the outputs are fitted that would lead the schedulers to the target's next latents. So a forecast also mends what
   those before it did wrong. Each cached tensor is weighted by a small kernel: what a pixel's neighbours did tells
   where the output bends. So do the hidden states that the last layer was given at the newest computed step, of which
   a matrix reads what to add. Each branch of guidance has weights of its own; all are fitted together, to what
   guidance makes of them. Images that have come off their way weigh less. A class with enough images then gets what
   its own images still ask for.
4. **Refinement.** Neighbouring sets of steps are tried, and kept if the joint error of a run is smaller on images that
   the weights were not fitted on; so is a firmer ridge.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm.auto import tqdm

from dqar.checks import check, check_choice, check_count, is_number
from dqar.families import bare, describe_models, family, null_class, transformers
from dqar.files import atomic_path, write_json
from dqar.forecast.ladder import PlanLadder
from dqar.forecast.lockstep import Answer, CallRun, Lockstep, Moment
from dqar.forecast.plan import HISTORY_BITS, ForecastPlan, Rows, Second
from dqar.forecast.promise import Rule, check_enough, check_promise, fit_ladder, rungs
from dqar.forecast.run import channels_back, channels_first, from_patches, stored, to_patches, weighted_sum
from dqar.forecast.steps import RIDGE, Jumps, choose_steps, gram, least_squares

Target = Literal["reference", "converged"]

FINER = 5
"""Steps of the converged run for each one of the planned run."""
HISTORY = 4
"""Outputs of each branch that a forecast draws on."""
KERNELS = {1: (), 2: (5, 5), 3: (3, 3, 3)}
"""Kernels by the axes of the latents' grid: on the digits, each size more (1, 3, 5) brought 1 to 2 dB on images not
fitted on. Packed tokens have none."""
NEIGHBOURS_RIDGE = 1e-5
"""As ``RIDGE``, for the weights of a pixel's neighbours, the many of which would else fit noise."""
READOUT_RIDGE = 3e-3
"""The same for what is read from the hidden states."""
TRUST, TRUST_IMAGES = 50, 32
"""An image weighs at most so many times as much as one of median error, and at least so many times less; fewer images
than ``TRUST_IMAGES`` weigh alike. On 200 digits not fitted on, this brought 0.2 dB an image with 120 calibration ones,
and 1.2 with 240, of which one ends at 23 dB.
"""
CLASS_IMAGES = 12
"""A class of which fewer images are fitted on has the weights of all. With so many of each digit, weights of each class
brought 0.9 dB an image on 200 others, and 1.3 with twice as many.
"""
CLASS_RIDGE, CLASS_READOUT_RIDGE = 1e-3, 3e-2
"""Of what a class adds to the weights and to the readouts, relative to the columns of all images."""
FIRMER = 10
"""Times as much of the last three ridges is tried too. With 240 images of each, it brought 0.8 dB an image on
photographs and took 0.2 from digits, neither fitted on.
"""
STARTS = ((0, 0), (0.5, 0), (1, 0), (1, 2), (1, 4))
"""Powers of the gains, and of the jumps' lengths, by which the first sets of steps are predicted. Beside (1, 0), powers
of the lengths brought 4.2, 4.0 and 3.8 dB an image at 24, 16 and 12 of 50 steps, to the converged solution on 40
photographs not fitted on, with 64 fitted on. Fewer than ``TRUST_IMAGES`` are too few to tell such sets apart.
"""
TRIAL_SHARE = 0.75
"""Of the images, those that weights are fitted on where sets of steps are compared; the others compare them."""
GAIN_IMAGES, GAIN_POINTS = 8, 10
"""Images, and steps, at which it is measured what an error does to the finished image."""


def fit_plan(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    num_inference_steps: int,
    macs: float = 3.0,
    target: Target = "reference",
    *,
    promise: tuple[float, float] | None = None,
    refinements: int = 12,
    seed: int = 0,
    work: str | Path | None = None,
    max_bytes: float | None = None,
    history_bits: int = 16,
    rule: Rule = "linear",
) -> ForecastPlan | PlanLadder:
    """Makes a plan for any diffusers pipeline with a transformer, from calls of the pipeline itself.

    Args:
        pipe: the pipeline, with the scheduler it is to be used with, on its device, in its dtype. It is left as it was.
        calls: one dictionary of keyword arguments for each call: prompts, images, guidance, sizes, as they will be
            used. 60 to 120 images of different content are a good number; a call may draw several. A class of which
            there are ``CLASS_IMAGES`` gets weights of its own. Each call is drawn from the noise of its ``generator``
            or ``latents``, or of a seed of its own.
        num_inference_steps: of the runs that the plan is for.
        macs: full compute's multiply-accumulates over the plan's, at least.
        target: what the plan is to reach: the run itself, or the solution that five times the steps find. With
            DPM-Solver++ these come 11 to 14 dB nearer to 1,000 steps where they are even in log-SNR
            (``use_lu_lambdas``) than in time.
        promise: ``(decibels, share)``: the least PSNR (dB) that this share of images is to have to the same call
            without the plan. Half the calls are then kept to fit no plan on, but to choose and to calibrate: 140
            images in all, or more, for a share of 0.95.
        refinements: neighbouring sets of steps to try.
        seed: of the first call without generator or latents; the next one's is one more.
        work: a folder for what was computed: a fit that was interrupted goes on from there.
        max_bytes: refuses to begin where the trajectories may need more memory than this.
        history_bits: 8 or 4: the plan's runs keep what they forecast from in so many bits, and the weights are fitted
            to outputs that went through them; not with a ``promise``.
        rule: of a ``promise``, that chooses each image's plan: ``"linear"``, or ``"policy"``, slide 7's network.

    Returns:
        The plan, its provenance with the errors of all that was tried; with a ``promise`` a ``PlanLadder``, which keeps
        it with 90 % confidence, of plans from 1.5 to ``macs`` times fewer multiply-accumulates.

    Raises:
        ValueError: what can't be planned, before the first image where it can be told: fewer than two images, another
            argument out of range, a stochastic scheduler, guidance that isn't a weighted sum of its branches; a promise
            that even the densest plan doesn't keep, or too few images to tell.
        RuntimeError, FloatingPointError: a call failed, naming it.
    """
    check_count("num_inference_steps", num_inference_steps, 4)
    check("macs", macs, is_number(macs) and 1 <= macs <= num_inference_steps / 2, "from 1 to half the steps")
    calls = list(calls)
    options: dict[str, Any] = {"seed": seed, "work": work, "max_bytes": max_bytes, "history_bits": history_bits}
    if promise is None:
        calibration = Calibration(pipe, calls, num_inference_steps, target, **options)
        return calibration.plan(max(2, int(calibration.num_steps / macs)), refinements)
    check("promise", promise, isinstance(promise, tuple) and len(promise) == 2, "a tuple (decibels, share)")
    check_promise(*promise)
    check("target", target, target == "reference", "'reference', which a promise is about")
    check("history_bits", history_bits, history_bits == 16, "16, which a promise needs")
    check_choice("rule", rule, get_args(Rule))
    half = max(1, len(calls) // 2)
    calibration = Calibration(pipe, calls[:half], num_inference_steps, target, **options)
    held_out = calibration.images * (len(calls) - half) // half  # as many a call as before
    check_enough(held_out, promise[1])
    plans = [calibration.plan(number, refinements) for number in rungs(calibration.num_steps, macs)]
    return fit_ladder(pipe, plans, calls[half:], *promise, rule=rule, seed=seed + half)


@dataclass(frozen=True)
class Trajectory:
    """One call in full compute: where each step led, ``[steps, images, ...]``, and what the choice of steps needs."""

    previous: torch.Tensor
    gram: torch.Tensor
    timesteps: tuple[float, ...]
    branches: tuple[str, ...]
    scales: tuple[float, float]
    """The least and the largest guidance scale of its steps."""
    latents: tuple[int, ...]
    """Shape of one image's output."""
    hidden_states: tuple[int, ...]
    """Tokens and width of one branch's, 0 where they aren't known."""
    second: Second | None = None
    embedded_guidance: tuple[float, float] | None = None
    """Both as ``ForecastPlan`` has them."""

    @property
    def images(self) -> int:
        """Images of the call."""
        return self.previous.shape[1]


@dataclass(frozen=True)
class Fitted:
    """A planned run that was followed: its ``weights``, ``readouts`` and ``classes``, as ``ForecastPlan`` has them, and
    each image's mean squared error when finished, ``[images]``.

    ``guided`` is what the schedulers were given, and ``raw`` what the model returned at computed steps, for each call
    by step: a fit that begins alike goes on from it.
    """

    computed: tuple[int, ...]
    fitted_on: int
    firmness: float
    weights: Rows
    readouts: Rows
    classes: dict[int, tuple[Rows, Rows]]
    error: torch.Tensor
    guided: list[dict[int, torch.Tensor]] = field(repr=False)
    raw: list[dict[int, list[torch.Tensor]]] = field(repr=False)


class Calibration:
    """Calibration calls of a pipeline, run in full compute once; plans of any number of computed steps follow.

    Args: see ``fit_plan``.

    Attributes:
        trajectories: one for each call.
        num_steps: of the runs; fewer than ``num_inference_steps`` where they begin late.

    Raises:
        ValueError: as ``fit_plan``.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Mapping[str, Any]],
        num_inference_steps: int,
        target: Target = "reference",
        *,
        seed: int = 0,
        work: str | Path | None = None,
        max_bytes: float | None = None,
        history_bits: int = 16,
    ):
        check_choice("history_bits", history_bits, HISTORY_BITS)
        check_choice("target", target, get_args(Target))
        calls = list(calls)
        check(
            "calls", calls, bool(calls) and all(isinstance(call, Mapping) for call in calls), "one or more dictionaries"
        )
        check_count("num_inference_steps", num_inference_steps, 4)
        self.pipe, self.calls, self.target, self.seed = pipe, calls, target, seed
        self.num_inference_steps, self.history_bits = num_inference_steps, history_bits
        self._work = None if work is None else Path(work)
        if self._work is not None:
            self._work.mkdir(parents=True, exist_ok=True)
        with Lockstep(pipe, num_inference_steps):  # refuses pipelines of another kind
            models = transformers(pipe)
        self._model = describe_models(models)
        parameters = (p for model in models for p in bare(model).parameters() if not p.is_meta)
        weights = [begin for p in parameters for begin in _begins(p)]
        # Diffusers notes there which values were given, in an order that differs from process to process.
        config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
        scheduler = type(pipe.scheduler).__name__, config
        self._key = _digest(self._model, weights, scheduler, num_inference_steps, target, seed)
        self.trajectories: list[Trajectory] = []
        with tqdm(total=len(calls) * num_inference_steps, desc=f"{target} trajectories", leave=False) as bar:
            for number, call in enumerate(calls):
                self.trajectories.append(self._kept(number, call, bar))
                if number == 0:
                    bound = self._memory()
                    bar.set_postfix_str(f"at most {bound / 1e9:.2f} GB beside the pipeline")
                    if max_bytes is not None and bound > max_bytes:
                        raise ValueError(
                            f"{len(calls)} calls may take {bound / 1e9:.2f} GB, more than max_bytes: give a folder "
                            "`work`, or fewer calls"
                        )
        first = self.trajectories[0]
        for number, other in enumerate(self.trajectories):
            for name in ("timesteps", "branches", "latents"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(f"calibration call {number} has other {name} than call 0: make a plan for each")
        images = sum(trajectory.images for trajectory in self.trajectories)
        check("calls", f"{len(calls)} of {images} images", images >= 2, "two images or more, better 60 to 120")
        self.num_steps, self.images = len(first.timesteps), images

    def plan(self, num_computed: int, refinements: int = 12, starts: Sequence[tuple[int, ...]] = ()) -> ForecastPlan:
        """The best plan found that computes ``num_computed`` steps.

        Args:
            num_computed: how many; the first step always is.
            refinements: neighbours to try.
            starts: sets of steps to begin with, in place of the predicted ones: of an earlier plan that is to be
                improved.

        Its provenance has ``firmness``, and ``trials``: the sets of steps that were tried, each with its ``predicted``
        and ``measured`` mean squared error, the latter of finished latents that the weights had not been fitted on.

        Raises:
            ValueError: names the argument, its value and what is accepted.
        """
        check("refinements", refinements, isinstance(refinements, int) and refinements >= 0, "an int of 0 or more")
        size = sum(math.prod(trajectory.previous.shape[1:]) for trajectory in self.trajectories)
        jumps = Jumps(torch.stack([trajectory.gram for trajectory in self.trajectories]).sum(0), size, self.num_steps)
        part = max(1, int(TRIAL_SHARE * self.images))
        best: Fitted | None = None
        fits = f"trials-{self._digest()}-{num_computed}-{self.history_bits}-{part}.json"
        path = None if self._work is None else self._work / fits
        done = json.loads(path.read_text()) if path is not None and path.exists() else []
        trials = {tuple(steps): (predicted, measured) for steps, predicted, measured in done}
        tried: dict[tuple[int, ...], tuple[float, float]] = {}
        generator = np.random.default_rng(len(starts))
        powers = STARTS if self.images >= TRUST_IMAGES else [powers for powers in STARTS if not powers[1]]
        starts = starts or [choose_steps(jumps, num_computed, self.gains**power, by)[0] for power, by in powers]
        for trial in tqdm(range(len(starts) + refinements), desc=f"refining {num_computed} steps", leave=False):
            steps = starts[trial] if trial < len(starts) else self._neighbour(tried, generator)
            if steps in tried:
                continue
            fitted = None
            if steps not in trials:
                fitted = self.fit(steps, part, like=best)
                trials[steps] = self._predicted(jumps, steps), fitted.error[part:].mean().item()
                if path is not None:
                    write_json(path, [[list(s), *errors] for s, errors in trials.items()])
            if not tried or trials[steps][1] < min(measured for _, measured in tried.values()):
                best = fitted
            tried[steps] = trials[steps]
        computed = min(tried, key=lambda steps: tried[steps][1])
        kept = None if path is None else path.with_name(f"firmer-{path.name}")
        firm = dict(json.loads(kept.read_text())) if kept is not None and kept.exists() else {}
        if str(computed) not in firm:
            firm[str(computed)] = self.fit(computed, part, firmness=FIRMER).error[part:].mean().item()
            if kept is not None:
                write_json(kept, firm)
        errors = [{"computed": list(s), "predicted": p, "measured": m} for s, (p, m) in tried.items()]
        firmness = FIRMER if firm[str(computed)] < tried[computed][1] else 1
        return self.plan_of(self.fit(computed, self.images, firmness=firmness), errors)

    def plan_of(self, fitted: Fitted, trials: Sequence[Mapping[str, Any]] = ()) -> ForecastPlan:
        """The plan of a fit; its provenance has the ``trials`` that led to it."""
        first = self.trajectories[0]
        seconds = [trajectory.second for trajectory in self.trajectories if trajectory.second]
        embedded = [scale for trajectory in self.trajectories for scale in trajectory.embedded_guidance or ()]
        source = {
            "target": self.target,
            "calibration_images": fitted.fitted_on,
            "firmness": fitted.firmness,
            "num_inference_steps": self.num_inference_steps,
            "trials": list(trials),
            "calls": self._digest(),
            "versions": {name: version(name) for name in ("torch", "diffusers")},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return ForecastPlan(
            fitted.weights,
            frozenset(fitted.computed),
            first.timesteps,
            _rounded(*(t.scales for t in self.trajectories)) if len(first.branches) > 1 else (1.0, 1.0),
            HISTORY,
            self._model,
            self.kernel,
            source,
            fitted.readouts,
            type(self.pipe.scheduler).__name__,
            first.latents,
            self.history_bits,
            fitted.classes,
            (seconds[0][0], _rounded(*(s[1] for s in seconds)), _rounded(*(s[2] for s in seconds)))
            if seconds
            else None,
            (min(embedded), max(embedded)) if embedded else None,
        )

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernels' sides, by the latents' grid."""
        return KERNELS[len(self.trajectories[0].latents) - 1]

    def fit(
        self,
        computed: tuple[int, ...],
        fitted_on: int,
        like: Fitted | None = None,
        class_images: float = CLASS_IMAGES,
        firmness: float = 1,
    ) -> Fitted:
        """Follows the calls, computing only at ``computed``, and fits each step's weights as it comes by.

        Args:
            fitted_on: the first so many images are fitted on; all are followed.
            like: an earlier fit on the same images: what it did before the first step that differs is replayed.
            class_images: a class of which fewer images are fitted on has the weights of all; ``inf``: as all have.
            firmness: so many times the ridges of readouts and classes.
        """
        start = 0
        rows: dict[int | None, list[tuple[float, ...]]] = {}  # of all images: None; and what each class adds
        readouts: dict[int | None, list[tuple[float, ...]]] = {}
        replayed: list[dict[int, list[torch.Tensor]]] = []
        earlier: list[dict[int, torch.Tensor]] = []
        if like is not None and (like.fitted_on, like.firmness) == (fitted_on, firmness):
            start = min(set(computed) ^ set(like.computed), default=self.num_steps - 1)
        if like is not None and start:
            # The last computed step before is computed anew, for its hidden states.
            again = max((step for step in computed if step < start), default=0)
            replayed = [{step: raw for step, raw in by_step.items() if step < again} for by_step in like.raw]
            earlier = like.guided
            for label, (own, read) in ((None, (like.weights, like.readouts)), *like.classes.items()):
                rows[label], readouts[label] = list(own[:start]), list(read[:start])
        guided: list[dict[int, torch.Tensor]] = [{} for _ in self.calls]
        raw: list[dict[int, list[torch.Tensor]]] = [{} for _ in self.calls]
        channels = family(transformers(self.pipe)[0]).channels
        step = 0
        runs: list[CallRun] = []
        bits = self.history_bits
        with Lockstep(self.pipe, self.num_inference_steps, self.seed, history_bits=bits) as lockstep:
            for runs, moments in lockstep.follow(self.calls, computed, replayed or None, HISTORY):  # noqa: B007
                if step in computed:
                    for computed_raw, moment in zip(raw, moments, strict=True):
                        computed_raw[step] = moment.raw
                answers: list[torch.Tensor | None]
                if step < start:
                    answers = [kept.get(step) for kept in earlier]
                elif step == 0:
                    for label in (None, *_classes(moments, fitted_on, class_images)):
                        rows[label], readouts[label] = [()], [()]
                    answers = [None] * len(moments)
                else:
                    fits = self._fit_step(step, moments, fitted_on, channels, list(rows), firmness)
                    for label, (weights, matrices) in fits.items():
                        digits = (7, 5) if label is None else (5, 4)
                        rows[label].append(_as_row(weights, digits[0]))
                        readouts[label].append(() if matrices is None else _as_row(matrices, digits[1]))
                    answers = [_forecast(moment, fits, self.kernel, channels, bits) for moment in moments]
                for by_step, answer in zip(guided, answers, strict=True):
                    if answer is not None:
                        by_step[step] = answer.cpu()
                lockstep.answers = [Answer(answer) for answer in answers]
                step += 1
        errors = [
            (self._finished(run.previous.float()) - self._finished(trajectory.previous[-1].float()))
            .square()
            .flatten(1)
            .mean(1)
            for run, trajectory in zip(runs, self.trajectories, strict=True)
        ]
        fitted = {label: (tuple(own), tuple(readouts[label])) for label, own in rows.items()}
        classes = {label: own for label, own in fitted.items() if label is not None}
        return Fitted(computed, fitted_on, firmness, *fitted[None], classes, torch.cat(errors), guided, raw)

    # --- recording ---------------------------------------------------------------------------------------------------

    def _kept(self, number: int, call: Mapping[str, Any], bar: tqdm) -> Trajectory:
        if self._work is None:
            return self._record(number, call, bar)
        path = self._work / f"call-{number}-{_digest(self._key, call)}.pt"
        if not path.exists():
            with atomic_path(path) as temporary:
                torch.save(vars(self._record(number, call, bar)), temporary)
        return Trajectory(**torch.load(path, weights_only=True, mmap=True))

    def _record(self, number: int, call: Mapping[str, Any], bar: tqdm) -> Trajectory:
        if self.target == "reference":
            trajectory = self._run(number, call, self.num_inference_steps, 1, bar)
            assert trajectory is not None  # no timesteps are expected of it
            return trajectory
        coarse = self._timesteps(number, call)
        # Without and with both ends.
        for steps in (FINER * self.num_inference_steps, FINER * (self.num_inference_steps - 1) + 1):
            fine = self._run(number, call, steps, FINER, bar, expected=coarse)
            if fine is not None:
                return fine
        raise ValueError(
            f"{type(self.pipe.scheduler).__name__} with {FINER} times {self.num_inference_steps} steps doesn't visit "
            "the same timesteps: use timestep_spacing='trailing', or target='reference'"
        )

    def _timesteps(self, number: int, call: Mapping[str, Any]) -> tuple[float, ...]:
        """Those that a run of this call visits."""
        with Lockstep(self.pipe, self.num_inference_steps, self.seed) as lockstep:
            for [run], [_] in lockstep.follow([call], first=number):
                return run.upcoming
        return ()

    def _run(
        self,
        number: int,
        call: Mapping[str, Any],
        steps: int,
        every: int,
        bar: tqdm,
        expected: tuple[float, ...] | None = None,
    ) -> Trajectory | None:
        latents, timesteps, scales, models = [], [], [], []
        outputs: dict[str, list[torch.Tensor]] = {}
        kept: Moment | None = None
        with Lockstep(self.pipe, steps, self.seed) as lockstep:
            for step, ([run], [moment]) in enumerate(lockstep.follow([call], first=number)):
                if expected is not None and step == 0 and run.upcoming[::every] != expected:
                    return None
                kept = moment
                if step == 0:
                    moment.line()  # refuses stochastic samplers and those that clip
                    if moment.scale < 0:
                        name = self._model.split()[0]
                        raise ValueError(f"{name} stacks the conditional branch first: dqar.families needs to know")
                if step % every == 0:
                    latents.append(moment.of_images(moment.sample).cpu())
                    timesteps.append(moment.timestep)
                    scales.append(moment.scale)
                    models.append(moment.model)
                    for branch, tensors in moment.outputs.items():
                        outputs.setdefault(branch, []).append(tensors[0][moment.part])
                    bar.update()
        assert kept is not None  # a run has steps
        latents.append(run.previous)
        stacked = torch.stack(latents)
        for name, values in {"latents": stacked, **{k: torch.stack(v) for k, v in outputs.items()}}.items():
            if not values.isfinite().all():
                raise FloatingPointError(
                    f"the {name} of calibration call {number} hold NaN or inf: draw it without DQAR"
                )
        begins = models.index(1) if {*models} == {0, 1} else 0
        before, after = (
            (min(stage, default=1.0), max(stage, default=1.0)) for stage in (scales[:begins], scales[begins:])
        )
        return Trajectory(
            stacked[1:],
            gram(stacked, {branch: torch.stack(tensors) for branch, tensors in outputs.items()}),
            tuple(timesteps),
            tuple(outputs),
            (min(scales), max(scales)),
            tuple(kept.outputs["cond"][0].shape[1:]),
            tuple(kept.hidden_states["cond"].shape[1:]) if kept.hidden_states else (0, 0),
            (begins, before, after) if begins else None,
            run.embedded_guidance,
        )

    def _memory(self) -> int:
        """The most bytes that the fit takes beside the pipeline, if all calls are as the first."""
        first, calls = self.trajectories[0], len(self.calls)
        branches, latents, numbers = len(first.branches), first.previous[0].nbytes, first.previous[0].numel()
        (tokens, width), steps = first.hidden_states, len(first.timesteps)
        trajectories = 0 if self._work is not None else calls * steps * latents
        classes = 0 if null_class(bare(transformers(self.pipe)[0])) is None else calls * first.images // CLASS_IMAGES
        # What each call shows, and what this fit and the best one so far keep: outputs, at half the steps at most.
        hidden = branches * first.images * tokens * width * latents // numbers
        followed = calls * (hidden + (HISTORY + 1) * branches * latents)
        kept = 2 * calls * (steps + steps * branches // 2) * latents
        kernels = branches * (HISTORY + 1) * math.prod(self.kernel)
        patch = numbers // first.images // tokens if tokens else 0
        system = 8 * (2 * (branches * width) ** 2 + 3 * branches * width * patch * kernels + 3 * numbers * kernels)
        return trajectories + followed + kept + (2 + classes) * system  # of all images, of each class, of the others

    def _digest(self) -> str:
        return _digest(self._key, self.calls)

    # --- which steps -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def gains(self) -> np.ndarray:
        """What a squared error of the latents at each step is worth in the end, ``[steps + 1]``; measured once."""
        path = None if self._work is None else self._work / f"gains-{self._digest()}.json"
        if path is not None and path.exists():
            return np.array(json.loads(path.read_text()))
        gains = self._measure_gains()
        if path is not None:
            write_json(path, gains.tolist())
        return gains

    def _measure_gains(self) -> np.ndarray:
        """The squared error of the finished image for a squared error of the latents at each step, ``[steps + 1]``.

        At ``GAIN_POINTS`` steps the latents of the first ``GAIN_IMAGES`` are displaced by the error of a jump of the
        usual length, and the run is finished in full compute; between the points, interpolated.
        """
        number = 1
        while (
            number < len(self.calls)
            and sum(trajectory.images for trajectory in self.trajectories[:number]) < GAIN_IMAGES
        ):
            number += 1
        calls, steps = self.calls[:number], self.num_steps
        jump = max(1, steps // 16)
        where = np.unique(np.linspace(jump, steps - 1, GAIN_POINTS).round().astype(int))
        latents, outputs = [], []
        raw: list[dict[int, list[torch.Tensor]]] = [{} for _ in calls]
        with Lockstep(self.pipe, self.num_inference_steps, self.seed) as lockstep:
            for step, (runs, moments) in enumerate(lockstep.follow(calls)):  # noqa: B007
                latents.append([moment.of_images(moment.sample).cpu() for moment in moments])
                outputs.append([[kept[0][m.part] for kept in m.outputs.values()] for m in moments])
                for kept, moment in zip(raw, moments, strict=True):
                    kept[step] = moment.raw
            final = [self._finished(run.previous.float()) for run in runs]
        measured = []
        for point in tqdm(where.tolist(), desc="gains", leave=False):
            start = max(0, point - jump)
            columns = torch.stack(
                [
                    torch.cat([x.flatten() for x in parts])
                    for parts in (latents[start], *zip(*outputs[start], strict=True))
                ],
                1,
            ).double()
            target = torch.cat([x.flatten() for x in latents[point]]).double()
            displaced = (columns @ least_squares(columns, target) - target).split([x.numel() for x in latents[point]])
            displacements = [d.view_as(x).to(x.dtype) for d, x in zip(displaced, latents[point], strict=True)]
            replayed = [{step: kept[step] for step in range(point)} for kept in raw]
            with Lockstep(self.pipe, self.num_inference_steps, self.seed) as lockstep:
                for step, (runs, _) in enumerate(lockstep.follow(calls, replayed=replayed)):  # noqa: B007
                    if step == point - 1:
                        lockstep.answers = [Answer(displacement=d) for d in displacements]
                moved = [self._finished(run.previous.float()) - kept for run, kept in zip(runs, final, strict=True)]
            error = torch.cat([x.flatten() for x in moved]).square().mean()
            measured.append(float(error / torch.cat([x.flatten() for x in displacements]).float().square().mean()))
        return np.interp(np.arange(steps + 1), where, measured)

    def _predicted(self, jumps: Jumps, computed: tuple[int, ...]) -> float:
        landings = zip((None, *computed[:-1]), computed, (*computed[1:], jumps.num_steps), strict=True)
        return float(
            sum(self.gains[later] * jumps.errors(step, before)[later - step - 1] for before, step, later in landings)
        )

    def _neighbour(
        self, tried: Mapping[tuple[int, ...], tuple[float, float]], generator: np.random.Generator
    ) -> tuple[int, ...]:
        """One computed step of the best set, but not the first, moved by one or two, so that the set is new."""
        computed = min(tried, key=lambda steps: tried[steps][1])
        for _ in range(100):
            moved = list(computed)
            which = generator.integers(1, len(moved))
            moved[which] += int(generator.choice([-2, -1, 1, 2]))
            if 0 < moved[which] < self.num_steps and moved[which] not in computed and tuple(sorted(moved)) not in tried:
                return tuple(sorted(moved))
        return computed  # nearly all steps are computed, or all neighbours tried

    # --- weights -----------------------------------------------------------------------------------------------------

    def _fit_step(
        self,
        step: int,
        moments: Sequence[Moment],
        fitted_on: int,
        channels: int,
        labels: Sequence[int | None],
        firmness: float,
    ) -> dict[int | None, tuple[torch.Tensor, torch.Tensor | None]]:
        """One step's weights ``[branches, tensors, ...kernel]`` and readouts ``[branches, width, size]``, float64.

        Of all images, labelled ``None``, which come first; and what each class adds to them.
        """
        goals, errors, left = [], [], fitted_on
        for moment, trajectory in zip(moments, self.trajectories, strict=True):
            start, slope = moment.line()
            goal = trajectory.previous[step].to(moment.guided.device).float() - moment.of_images(start)
            goal = goal / slope - moment.of_images(moment.guided).float()
            goals.append(channels_first(goal, channels)[:left])
            error = moment.of_images(moment.sample).float() - trajectory.previous[step - 1].to(goal)
            errors.append(error.square().flatten(1).mean(1)[:left])
            left -= len(goals[-1])
            if not left:
                break
        roots = trust(torch.cat(errors)).sqrt().split([len(goal) for goal in goals])
        branches = len(moments[0].outputs)

        def system_of(label: int | None) -> StepSystem:
            """Of the images that have a class's weights; ``None``: of those that have no class's."""
            system = StepSystem(self.kernel, firmness)
            for moment, goal, root in zip(moments, goals, roots, strict=False):
                kinds = [own if own in labels else None for own in moment.classes[: len(goal)]]
                images = [i for i, own in enumerate(kinds) if own == label]
                if images:
                    maps, states = _columns(moment, images, self.kernel, channels)
                    states = None if states is None else _times(states, root[images])
                    system.add(_times(maps, root[images]), states, _times(goal[images], root[images]))
            return system

        def shaped(weights: torch.Tensor, matrix: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            matrix = None if matrix is None else matrix.view(branches, -1, matrix.shape[-1])
            return weights.reshape(branches, -1, *self.kernel), matrix

        systems, of_all = [system_of(label) for label in labels], StepSystem(self.kernel, firmness)
        for system in systems:
            of_all.merge(system)
        solution = of_all.solve()
        fits: dict[int | None, tuple[torch.Tensor, torch.Tensor | None]] = {None: shaped(*solution)}
        for label, system in zip(labels[1:], systems[1:], strict=True):
            fits[label] = shaped(*system.solve_beyond(of_all, *solution))
        # What was fitted is a change of the newest output.
        center: tuple[Any, ...] = (slice(None), 0, *(side // 2 for side in self.kernel))
        fits[None][0][center] += 1
        return fits

    def _finished(self, latents: torch.Tensor) -> torch.Tensor:
        """What is compared in the end: a pixel-space model's latents are the picture, which clips them."""
        return latents if hasattr(self.pipe, "vae") else latents.clamp(-1, 1)


class StepSystem:
    """Least squares for one step's weights, summed up over calls: the kernels, and the matrix of the hidden states.

    The kernels are the same for all pixels, while the matrix has a column for each of a patch's. It is eliminated
    first, which leaves a small system for the kernels.
    """

    def __init__(self, kernel: tuple[int, ...], firmness: float = 1):
        side = math.prod(kernel)
        self._firmness = firmness
        self._ridge = torch.full((side,), NEIGHBOURS_RIDGE, dtype=torch.float64)
        self._ridge[side // 2] = RIDGE
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, maps: torch.Tensor, states: torch.Tensor | None, goal: torch.Tensor) -> None:
        """Adds images.

        Args:
            maps: ``[images, C, ...grid, K]`` float64, what the kernels see.
            states: ``[images, tokens, width]``, the hidden states, if they are read.
            goal: ``[images, C, ...grid]``.
        """
        kernels = maps.shape[-1]
        if states is None:
            maps, goal = maps.reshape(-1, kernels), goal.double().flatten()
            self._sum("maps", maps.T @ maps)
            self._sum("goal", maps.T @ goal)
            return
        tokens = states.shape[1]
        maps = maps.movedim(-1, 1).flatten(0, 1)
        maps = to_patches(maps, tokens).view(len(goal), kernels, tokens, -1).permute(0, 2, 3, 1).flatten(0, 1)
        goal = to_patches(goal.double(), tokens).flatten(0, 1)  # [rows, size]; maps [rows, size, K]
        states, flat = states.double().flatten(0, 1), maps.flatten(0, 1)
        self._sum("maps", flat.T @ flat)
        self._sum("goal", flat.T @ goal.flatten())
        self._sum("states", states.T @ states)
        self._sum("states_maps", states.T @ maps.flatten(1))
        self._sum("states_goal", states.T @ goal)

    def merge(self, other: StepSystem) -> None:
        """Adds the images of another system."""
        for name, part in other._sums.items():
            self._sum(name, part)

    def _sum(self, name: str, part: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + part if name in self._sums else part

    def solve(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[K]``, and ``[width, size of a patch]`` or ``None``; float64."""
        return self._solve(self._sums, self._ridge, self._firmness * READOUT_RIDGE)

    def solve_beyond(
        self, other: StepSystem, weights: torch.Tensor, matrix: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What these images ask for beyond another system's solution, which has them too: shapes as ``solve`` has them.

        By ridge regression on the columns of the other system.
        """
        sums, rest = self._sums, dict(self._sums)
        rest["goal"] = sums["goal"] - sums["maps"] @ weights
        if matrix is not None:
            by_maps = sums["states_maps"].view(*matrix.shape, -1)
            rest["goal"] -= torch.einsum("wpk,wp->k", by_maps, matrix)
            rest["states_goal"] = sums["states_goal"] - sums["states"] @ matrix - by_maps @ weights
        ridge, readout_ridge = (self._firmness * ridge for ridge in (CLASS_RIDGE, CLASS_READOUT_RIDGE))
        return self._solve(rest, torch.full_like(self._ridge, ridge), readout_ridge, other._sums)

    @staticmethod
    def _solve(
        sums: Mapping[str, torch.Tensor],
        ridge: torch.Tensor,
        readout_ridge: float,
        scale: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The ridge is relative to the columns of the sums ``scale``, or their own."""
        scale = scale or sums
        kernels, norms = len(sums["goal"]), scale["maps"].diagonal().sqrt().clamp_min(1e-12)
        system, goal = sums["maps"] / norms / norms[:, None], sums["goal"] / norms
        for_maps = for_goal = None
        if "states" in sums:
            state_norms = scale["states"].diagonal().sqrt().clamp_min(1e-12)
            of_states = sums["states"] / state_norms / state_norms[:, None]
            of_states.diagonal().add_(readout_ridge)
            factor = torch.linalg.cholesky(of_states)
            by_maps = (sums["states_maps"] / state_norms[:, None]).view(len(state_norms), -1, kernels) / norms
            by_goal = sums["states_goal"] / state_norms[:, None]
            for_maps = torch.cholesky_solve(by_maps.flatten(1), factor).reshape(-1, kernels)
            for_goal = torch.cholesky_solve(by_goal, factor)
            system = system - by_maps.reshape(-1, kernels).T @ for_maps
            goal = goal - by_maps.reshape(-1, kernels).T @ for_goal.flatten()
        system.diagonal().add_(ridge.to(system).repeat(kernels // len(ridge)))
        weights = torch.linalg.solve(system, goal)
        if for_maps is None:
            return weights / norms, None
        matrix = for_goal - (for_maps @ weights).view_as(for_goal)
        return weights / norms, matrix / state_norms[:, None]


def neighbourhoods(tensors: Sequence[torch.Tensor], kernel: tuple[int, ...]) -> torch.Tensor:
    """What the kernels see of ``[images, C, ...grid]`` tensors, zeros beyond edges, as ``[images, C, ...grid, K]``.

    In float64. K counts the kernels' numbers, one tensor's after the other's.
    """
    seen = []
    for x in tensors:
        x = x.double()
        padded = F.pad(x, [pad for side in reversed(kernel) for pad in (side // 2, side // 2)])
        for axis, side in enumerate(kernel):
            padded = padded.unfold(2 + axis, side, 1)
        seen.append(padded.reshape(*x.shape, -1))
    return torch.cat(seen, -1)


def _begins(weights: torch.Tensor) -> list[torch.Tensor]:
    """The first numbers of a parameter, or of all that a quantized one is made of."""
    if is_traceable_wrapper_subclass(weights):
        return [first for name in weights.__tensor_flatten__()[0] for first in _begins(getattr(weights, name))]
    return [weights.flatten()[:8].float()]


def trust(errors: torch.Tensor) -> torch.Tensor:
    """How much each image weighs in a step's fit, by its squared error so far ``[images]``, over the median to −½.

    A few images that have gone astray would else decide for all.
    """
    if len(errors) < TRUST_IMAGES:
        return torch.ones_like(errors, dtype=torch.float64)
    least = 1e-10  # rounding
    return ((errors.double() + least) / (errors.median() + least)).rsqrt().clamp(1 / TRUST, TRUST)


def _times(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Each image of ``x`` ``[n, ...]`` times its factor ``[n]``."""
    return x * factors.view(-1, *[1] * (x.ndim - 1))


def _columns(
    moment: Moment, images: Sequence[int], kernel: tuple[int, ...], channels: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What ``StepSystem.add`` is given of some images: how what guidance makes of them changes with each weight."""
    device, maps, states = moment.guided.device, [], []
    for branch, outputs in moment.outputs.items():
        tensors = [channels_first(x[moment.part].to(device), channels) for x in (*outputs, moment.latents)]
        seen, share = neighbourhoods([x[images] for x in tensors], kernel), moment.shares[branch]
        maps.append(_through_lengths(moment, branch, images, seen, channels) if moment.keeps_lengths else share * seen)
        if moment.hidden_states:
            states.append(share * moment.hidden_states[branch][images].to(device).double())
    return torch.cat(maps, -1), torch.cat(states, -1) if states else None


def _forecast(
    moment: Moment,
    fits: Mapping[int | None, tuple[torch.Tensor, torch.Tensor | None]],
    kernel: tuple[int, ...],
    channels: int,
    history_bits: int,
) -> torch.Tensor:
    """What the scheduler is given in place of ``moment.guided``, if each branch's output is its forecast.

    Args:
        fits: of ``Calibration._fit_step``.
    """
    device, forecasts = moment.guided.device, {}
    for number, (branch, outputs) in enumerate(moment.outputs.items()):
        tensors = [channels_first(x[moment.part].to(device), channels) for x in (*outputs, moment.latents)]
        forecast = torch.zeros_like(tensors[0], dtype=torch.float64)
        for label in dict.fromkeys(moment.classes):
            rows = [row for row, other in enumerate(moment.classes) if other == label]
            weights, matrices = fits[None]
            if label in fits and label is not None:
                class_weights, class_matrices = fits[label]
                weights = weights + class_weights
                matrices = None if matrices is None or class_matrices is None else matrices + class_matrices
            part = weighted_sum([x[rows] for x in tensors], weights[number])
            if matrices is not None:
                states = moment.hidden_states[branch][rows].to(device).double()
                read = from_patches(states @ matrices[number], part.shape)
                part = part + (read if history_bits == 16 else stored(read, history_bits).dequantize())
            forecast[rows] = part
        forecasts[branch] = channels_back(forecast, channels).to(outputs[0].dtype)
    return moment.guide(forecasts)


def _classes(moments: Sequence[Moment], fitted_on: int, least: float) -> list[int]:
    """The classes of which ``least`` or more of the first ``fitted_on`` images are."""
    labels = [label for moment in moments for label in moment.classes][:fitted_on]
    return sorted(label for label in {*labels} if label is not None and labels.count(label) >= least)


def _as_row(numbers: torch.Tensor, digits: int) -> tuple[float, ...]:
    return tuple(float(f"{number:.{digits}g}") for number in numbers.flatten().tolist())


def _through_lengths(
    moment: Moment, branch: str, images: Sequence[int], maps: torch.Tensor, channels: int
) -> torch.Tensor:
    """How what guidance makes changes with a branch's output, where it keeps each row's length; to first order.

    Across a row's direction as much as the branch's share is; along it, as the length of the conditional output.

    Args:
        maps: ``[images, C, ...grid, K]``, changes of the branch's output, of some ``images``.
    """

    def rows(x: torch.Tensor) -> torch.Tensor:
        return channels_first(x, channels)[images][..., None].to(maps)

    newest, axis = moment.outputs["cond"][0][moment.part], 1 if moment.guided.ndim == 3 else -2
    along = F.normalize(rows(moment.of_images(moment.guided)), dim=axis)
    change = rows(moment.shares[branch].expand(newest.shape)) * (maps - along * (along * maps).sum(axis, keepdim=True))
    if branch == "cond":
        change += along * (F.normalize(rows(newest), dim=axis) * maps).sum(axis, keepdim=True)
    return change


def _rounded(*ranges: tuple[float, float]) -> tuple[float, float]:
    """The least and the largest guidance scale, as they were probably given: measured ones are off by rounding."""
    least, largest = min(scales[0] for scales in ranges), max(scales[1] for scales in ranges)
    return max(1.0, float(f"{least:.4g}")), max(1.0, float(f"{largest:.4g}"))


def _digest(*parts: Any) -> str:
    """Twelve letters that stand for any arguments of calls, by what they hold."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(type(part).__name__.encode())
        if isinstance(part, torch.Tensor):
            digest.update(str(part.shape).encode() + part.detach().cpu().float().numpy().tobytes())
        elif isinstance(part, torch.Generator):
            add(part.get_state())
        elif isinstance(part, Mapping):
            for name in sorted(part, key=str):
                add(str(name))
                add(part[name])
        elif isinstance(part, (list, tuple)):
            for member in part:
                add(member)
        elif hasattr(part, "tobytes"):  # NumPy's arrays, PIL's images
            digest.update(part.tobytes())
        elif isinstance(part, (str, int, float, bool, type(None))):
            digest.update(repr(part).encode())
        else:
            digest.update(repr(type(part)).encode())

    add(parts)
    return digest.hexdigest()[:12]
