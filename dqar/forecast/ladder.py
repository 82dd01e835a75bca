"""Ladders of plans: at its first step each image of a batch gets the sparsest plan that is likely to be good enough."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dqar.families import CONDITIONS, as_batch, as_output, conditions
from dqar.files import reading, write_json
from dqar.forecast.plan import ForecastPlan, Rows, as_rows
from dqar.forecast.run import FinalHiddenStates, ForecastEngine, OutputForecast, shared_part
from dqar.plan import BRANCHES
from dqar.run import Call, Run
from dqar.trace import Trace

LADDER_FORMAT = "dqar-ladder-1"


@dataclass(frozen=True)
class Promise:
    """What was promised of a ladder's images, and on what grounds.

    Attributes:
        decibels: the least PSNR to the same call without the plan, in dB.
        share: of all images, that have it.
        confidence: that this is so.
        kept: of the images that it was tried on, those that have it.
        images: that it was tried on.
        expected: the PSNR (dB) that the next image has with probability ``share``, over the draw of all images.
        macs_speedup: of those images: all steps over the computed ones.
    """

    decibels: float
    share: float
    confidence: float
    kept: int
    images: int
    expected: float
    macs_speedup: float

    def __str__(self) -> str:
        return (
            f"PSNR >= {self.decibels:g} dB in {self.share:.0%} of images, with {self.confidence:.0%} confidence: "
            f"{self.kept} of {self.images} others have it, at {self.macs_speedup:.2f}× fewer MACs; the next image has "
            f"{self.expected:.1f} dB or more with a probability of {self.share:.0%}"
        )


@dataclass(frozen=True)
class PlanLadder:
    """Plans for the same runs, a rule that chooses one for each image, and what is promised of the images.

    The rule predicts each plan's PSNR in dB as a linear function of what the first step tells, which every plan
    computes; or, by slide 7's network, whether the plan's image is good enough. The sparsest plan that is predicted at
    ``threshold`` or more is taken, or else the densest.

    Attributes:
        plans: from the densest to the sparsest.
        weights: one row per plan: a number for each of ``first_step_features``, or of the network's last hidden units,
            and the constant.
        threshold: in dB, or the network's logit; ``inf``: the densest plan for all.
        promise: see ``Promise``.
        hidden: of a network, each plan's hidden layers of tanh: a row a unit, as in ``weights``; ``()``: a linear rule.

    Raises:
        ValueError: plans for different runs, in another order, or of a quantized history; or weights or layers that
            aren't one per plan.
    """

    plans: tuple[ForecastPlan, ...] = field(repr=False)
    weights: tuple[tuple[float, ...], ...] = field(repr=False)
    threshold: float
    promise: Promise
    hidden: tuple[tuple[Rows, ...], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", tuple(self.plans))
        object.__setattr__(self, "weights", as_rows(self.weights))
        object.__setattr__(self, "hidden", tuple(tuple(map(as_rows, layers)) for layers in self.hidden))
        runs = {
            (p.timesteps, p.guidance, p.model, p.latents, p.scheduler, p.second, p.embedded_guidance)
            for p in self.plans
        }
        if len(runs) != 1:
            raise ValueError(f"plans for {len(runs)} kinds of runs are not accepted: one kind")
        if any(plan.history_bits < 16 for plan in self.plans):
            raise ValueError("plans of fewer than 16 history_bits are not accepted in a ladder: make them with 16")
        computed = [len(plan.computed) for plan in self.plans]
        if computed != sorted(set(computed), reverse=True):
            raise ValueError(f"plans of {computed} computed steps are not accepted: from the densest to the sparsest")
        layers = [self.weights, *(rows for layers in self.hidden for rows in layers)]
        finite = all(math.isfinite(number) for rows in layers for row in rows for number in row)
        alike = self.hidden or len(set(map(len, self.weights))) == 1
        if len(self.weights) != len(self.plans) or not alike or not finite:
            raise ValueError(
                f"{len(self.weights)} rows of weights are not accepted: one for each of {computed}, finite"
            )
        if len(self.hidden) not in (0, len(self.plans)):
            raise ValueError(f"{len(self.hidden)} networks are not accepted: none, or one for each of {computed}")

    def choose(self, features: torch.Tensor) -> list[int]:
        """Which plan each image gets; ``features`` ``[images, F]`` float64 of ``first_step_features``.

        Raises:
            ValueError: another number of features than the rule was fitted on.
        """
        if len(self.plans) == 1 or self.threshold == math.inf:
            return [0] * len(features)
        read = len(self.hidden[0][0][0] if self.hidden else self.weights[0]) - 1
        if features.shape[1] != read:
            raise ValueError(
                f"the ladder's rule reads {read} numbers of the first step, this model and its captions give "
                f"{features.shape[1]}: make one for them"
            )
        scores = []
        for row, layers in zip(self.weights, self.hidden or ((),) * len(self.plans), strict=True):
            x = features
            for layer in layers:
                x = _linear(x, layer).tanh()
            scores.append(_linear(x, (row,)))
        good = torch.cat(scores, 1) >= self.threshold
        return (good * torch.arange(len(self.plans))).amax(1).tolist()

    def save(self, path: str | Path) -> None:
        """Writes JSON: all plans, the rule and the promise in one file."""
        plans = [plan.to_json() for plan in self.plans]
        threshold = None if self.threshold == math.inf else self.threshold
        content = {"plans": plans, "weights": self.weights, "threshold": threshold, "hidden": self.hidden}
        write_json(path, {"format": LADDER_FORMAT, **content, "promise": dataclasses.asdict(self.promise)})

    @classmethod
    def load(cls, path: str | Path) -> PlanLadder:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: truncated, or no ladder.
        """
        with reading(path, LADDER_FORMAT) as content:
            plans = tuple(ForecastPlan(**plan) for plan in content["plans"])
            threshold = math.inf if content["threshold"] is None else float(content["threshold"])
            return cls(plans, content["weights"], threshold, Promise(**content["promise"]), content.get("hidden", ()))


def _linear(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Of ``x`` ``[images, n]`` float64 a number a row, whose last one is its constant."""
    weights = torch.tensor(rows, dtype=torch.float64)
    return x @ weights[:, :-1].T + weights[:, -1]


def first_step_features(
    outputs: Mapping[str, torch.Tensor], hidden_states: torch.Tensor | None, captions: torch.Tensor | None
) -> torch.Tensor:
    """What the first step tells of each image, ``[images, F]`` float64 on the CPU.

    How far guidance goes, as the logarithm of the branches' difference over the conditional output; that output's
    size; the mean of the conditional hidden states, which also hold the class; and the caption's mean embedding.

    Args:
        outputs: of each branch, ``[images, ...]``.
        hidden_states: the conditional branch's ``[images, tokens, width]``, if known.
        captions: ``[images, width]``, if there are any.
    """
    cond = outputs["cond"].flatten(1).float()
    size = cond.norm(dim=1).clamp_min(1e-12)
    parts = [size.log()[:, None]]
    if "uncond" in outputs:
        gap = (cond - outputs["uncond"].flatten(1).float()).norm(dim=1)
        parts.append((gap / size).clamp_min(1e-12).log()[:, None])
    if hidden_states is not None:
        parts.append(hidden_states.float().mean(1))
    if captions is not None:
        parts.append(captions.float())
    return torch.cat(parts, 1).double().cpu()


@dataclass
class FirstStep:
    """One call of the model at the first step: what a plan's forecasts and the rule need of it."""

    call: Call
    output: torch.Tensor
    latents: torch.Tensor
    hidden_states: torch.Tensor | None
    captions: torch.Tensor | None


@dataclass(eq=False)
class Group:
    """The images ``[n]`` of a batch that follow one plan, and what is kept for them."""

    images: torch.Tensor
    plan: ForecastPlan
    forecast: OutputForecast

    def rows(self, slices: Mapping[str, slice]) -> torch.Tensor:
        """Their rows ``[2n]`` of a call's batch, branch after branch as in ``slices``."""
        return torch.cat([self.images + part.start for part in slices.values()])

    def slices(self, slices: Mapping[str, slice]) -> dict[str, slice]:
        """The branches in what ``rows`` takes out of a batch."""
        size = len(self.images)
        return {branch: slice(size * i, size * (i + 1)) for i, branch in enumerate(slices)}


class LadderForecast(OutputForecast):
    """What is kept for a stream of which each image follows a plan of its own."""

    def forget(self) -> None:
        """Drops everything: a new run begins."""
        super().forget()
        self.first: list[FirstStep] = []
        self.groups: list[Group] = []

    def returned(self, step: int, output: torch.Tensor, rows: Mapping[str, slice], latents: torch.Tensor) -> None:
        """Notes the ``[B, ...]`` that the model returned, which ``guidance`` compares with what guidance made of it."""
        part = shared_part(output, latents)
        for branch, place in rows.items():
            self._returned[branch] = step, output[part][place]


class LadderEngine(ForecastEngine):
    """Follows a ``PlanLadder``, image by image. See ``dqar.attention.Engine``.

    At a step that only some images' plans compute, the model is given these images' rows of every argument that has
    one row per image, and computes no others.

    Args: see ``ForecastEngine``.

    Attributes:
        chosen: of every image drawn, its features of the first step, and the index of its plan.
    """

    def __init__(self, models: Sequence[torch.nn.Module], ladder: PlanLadder, trace: Trace):
        super().__init__(models, ladder.plans[0], trace)
        self.ladder = ladder
        self.chosen: list[tuple[torch.Tensor, int]] = []
        try:
            self._seen = FinalHiddenStates(models)
        except ValueError:
            self._seen = None

    def new_state(self) -> LadderForecast:
        """For one stream."""
        return LadderForecast(self.plan, self._family.channels)

    def summary(self) -> dict[str, Any]:
        """``plan_of_image``: the computed steps of each image's plan, in the order drawn; and the ``promise``."""
        computed = [len(plan.computed) for plan in self.ladder.plans]
        return {"plan_of_image": [computed[rung] for _, rung in self.chosen], "promise": str(self.ladder.promise)}

    def call(self, compute: Callable[[], Any], run: Run, call: Call, named: dict[str, Any], first: bool) -> Any:
        """The model's output, of each image as its plan says.

        Raises:
            ValueError: what a forecast draws on wasn't computed, as in a run that began late.
        """
        step, state = run.index - self._late(run), call.stream.state
        latents = as_batch(named[self._family.latents])
        self._check_model(compute, step)
        if step == 0:
            output = compute()
            call.output = as_batch(output[0])
            part = shared_part(call.output, latents)
            size = getattr(self.model.config, "sample_size", None)
            self.plan.check_latents(call.output[part].shape[1:], size)
            states = None if self._seen is None else self._seen.take()
            states = None if states is None else states.reshape(len(latents), -1, states.shape[-1])
            state.first.append(FirstStep(call, call.output, latents, states, _captions(named)))
            self._record(run, 0, tuple(call.slices), True, call.output.nbytes // len(call.slices))
            state.returned(0, call.output, call.slices, latents)
            return output
        if state.first:
            self._choose(state)
        if not state.groups or call.output is None:
            raise ValueError(f"at step {step} the plans draw on the first step, which isn't there: the run began late")
        output = self._answer(compute, run, call, step, latents, state)
        state.returned(step, output, call.slices, latents)
        return as_output(output, self._family, named.get("return_dict", True))

    def _choose(self, state: LadderForecast) -> None:
        """Gives each image its plan, by what the first step told, and each plan what it needs of that step."""
        seen, state.first = state.first, []
        outputs = {
            branch: told.output[shared_part(told.output, told.latents)][rows]
            for told in seen
            for branch, rows in told.call.slices.items()
        }
        [cond] = [told for told in seen if "cond" in told.call.slices]
        states, captions = (
            None if x is None else x[cond.call.slices["cond"]] for x in (cond.hidden_states, cond.captions)
        )
        features = first_step_features({b: outputs[b] for b in BRANCHES if b in outputs}, states, captions)
        rungs = self.ladder.choose(features)
        self.chosen += zip(features.unbind(), rungs, strict=True)
        for rung in sorted(set(rungs)):
            plan = self.ladder.plans[rung]
            places = [i for i, chosen in enumerate(rungs) if chosen == rung]
            images = torch.tensor(places, device=cond.latents.device)
            group = Group(images, plan, OutputForecast(plan, self._family.channels))
            if plan.classes:
                classes = cond.call.stream.classes
                group.forecast.know(classes and [classes[place] for place in places], images.device)
            state.groups.append(group)
            for told in seen:
                rows, slices = group.rows(told.call.slices), group.slices(told.call.slices)
                group.forecast.keep(0, told.output[rows], slices, told.latents[rows])
                if any(plan.readouts) and told.hidden_states is not None:
                    group.forecast.read_out(0, told.hidden_states[rows], slices)
        for told in seen:
            told.call.output = told.output.clone()

    def _answer(
        self,
        compute: Callable[[], Any],
        run: Run,
        call: Call,
        step: int,
        latents: torch.Tensor,
        state: LadderForecast,
    ) -> torch.Tensor:
        """All images' outputs ``[B, ...]``, each computed and corrected, or forecast."""
        assert call.output is not None and isinstance(compute, functools.partial)
        fresh = [group for group in state.groups if step in group.plan.computed]
        if fresh:
            rows = torch.cat([group.rows(call.slices) for group in fresh])
            part = len(fresh) < len(state.groups)
            if part:
                take = functools.partial(rows_of, rows=rows, batch=len(latents))
                computed = compute.func(*map(take, compute.args), **{k: take(v) for k, v in compute.keywords.items()})
            else:
                computed = compute()
            new = as_batch(computed[0])
            call.output[rows] = new if part else new[rows]
            states = None if self._seen is None else self._seen.take()
            if states is not None:
                states = states.reshape(len(new), -1, states.shape[-1])
                states = states if part else states[rows]
        output, done = call.output.clone(), 0
        for group in state.groups:
            places, slices = group.rows(call.slices), group.slices(call.slices)
            newest, given, plan = call.output[places], latents[places], group.plan
            if group in fresh:
                group.forecast.keep(step, newest, slices, given)
                if any(plan.readouts) and states is not None:
                    group.forecast.read_out(step, states[done : done + len(places)], slices)
                done += len(places)
            if not group.forecast.usable(step, tuple(slices)):
                raise ValueError(
                    f"at step {step} the plan draws on what steps {plan.drawn_on(step)} computed, which isn't there: "
                    "the run began late, or changed what it draws"
                )
            if plan.weights[step]:
                output[places] = group.forecast.output(step, given, newest, slices)
            nbytes = group.forecast.nbytes(newest) // len(slices)
            self._record(run, step, tuple(slices), group in fresh, nbytes)
        return output


def rows_of(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """These rows ``[n]`` of an argument, where it has one for each of ``batch``: tensors, lists, and what they hold."""
    if isinstance(value, torch.Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: rows_of(member, rows, batch) for name, member in value.items()}
    if isinstance(value, list) and len(value) == batch:
        return [value[row] for row in rows.tolist()]
    return value


def _captions(named: Mapping[str, Any]) -> torch.Tensor | None:
    """The mean embedding of each row's caption, ``[B, width]``."""
    given = conditions(dict(named))
    listed = [caption.mean(0) for caption in given[len(CONDITIONS) :] if caption is not None]
    if listed:
        return torch.stack(listed)
    return given[1].mean(1) if given[1] is not None and given[1].ndim == 3 else None
