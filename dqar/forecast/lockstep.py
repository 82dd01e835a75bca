"""Runs a pipeline's calls side by side, each in a thread of its own, of which one at a time is at work.

A call goes on by itself until its scheduler is about to step. There it waits, and shows what it has: a ``Moment``.
Whoever follows the calls looks at all moments of one step together, says what the schedulers shall be given, and lets
each call go on. So prompts, guidance, image inputs and schedulers stay the pipeline's business.
"""

from __future__ import annotations

import copy
import inspect
import queue
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dqar.families import as_batch, as_output, bare, conditions, family, guides, null_class, transformers
from dqar.forecast.run import (
    FinalHiddenStates,
    bent_scale,
    channels_back,
    channels_first,
    keeps_lengths,
    mixture,
    patch_sides,
    shared_part,
    stored,
)
from dqar.plan import BRANCHES
from dqar.run import Call, Run, RunFinder
from dqar.takeover import WATCH, give_back, take_over

LARGEST_RESIDUAL = 0.05
"""Of what guidance makes of the branches' outputs, beyond their weighted sum; rounding to bfloat16 makes up to 0.01."""
ROUNDING = 1e-5
"""A residual that float32 rounding explains; which of two smaller ones is the smallest tells nothing."""


class _Left(BaseException):
    """Leaves a pipeline: after its last step, before anything is decoded, or because another call failed."""


class _Forgetful:
    """What the run finder keeps for each stream: nothing."""

    def forget(self) -> None:
        """Drops nothing."""


@dataclass
class Moment:
    """A call whose scheduler is about to step. Tensors lie on the CPU where they are kept for later steps.

    Attributes:
        latents: ``[b, ...]``, the model's input, as much of it as the output says where it goes.
        outputs: of each branch, newest first, ``[b, ...]``.
        hidden_states: of each branch, ``[b, tokens, width]``, of the newest computed step; empty where the model's last
            layer isn't known.
        raw: the newest computed outputs as the model returned them, one for each of its calls a step.
        guided: what the pipeline made of the branches' outputs for the scheduler.
        sample: the latents that the scheduler steps from.
        scale: the guidance scale; 1 without guidance.
        shares: how much of each branch's output is in ``guided``: a number, or ``[b, ..., 1]`` where guidance keeps
            each row's length.
        classes: of each image; ``None``: the model has none.
        model: number of the transformer that was called.
    """

    timestep: float
    latents: torch.Tensor
    outputs: dict[str, list[torch.Tensor]]
    hidden_states: dict[str, torch.Tensor]
    raw: list[torch.Tensor]
    guided: torch.Tensor
    sample: torch.Tensor
    scale: float
    shares: dict[str, Any]
    scheduler: Any
    arguments: inspect.BoundArguments
    classes: tuple[int | None, ...]
    model: int

    @property
    def images(self) -> int:
        """Images of the call."""
        return len(self.latents)

    @property
    def keeps_lengths(self) -> bool:
        """Whether guidance keeps the length of each row of the conditional output."""
        return isinstance(self.shares["cond"], torch.Tensor)

    def guide(self, forecasts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the pipeline would make of other outputs of the branches ``[b, ...]``, in place of ``guided``."""
        guided, images = self.guided.clone(), self.images
        if self.keeps_lengths:
            sign = self.shares["cond"].sum().sign()
            forecast = sign * bent(forecasts["cond"].double(), forecasts["uncond"].double(), self.scale)
        else:
            forecast = self.of_images(guided).double()
            for branch, output in forecasts.items():
                newest = self.outputs[branch][0][self.part].to(output.device)
                forecast = forecast + self.shares[branch] * (output.double() - newest.double())
        for first in range(0, len(guided), images):
            guided[first : first + images][self.part] = forecast.to(guided.dtype)
        return guided

    @property
    def part(self) -> tuple[slice, ...]:
        """Of a branch's output, what is in ``guided``, and the other way round."""
        return shared_part(self.guided, self.outputs["cond"][0])

    def of_images(self, x: torch.Tensor) -> torch.Tensor:
        """``guided``, ``sample`` or what the scheduler makes of them, ``[b, ...]``: DiTPipeline's hold images twice."""
        return x[: self.images][self.part]

    def after(self, guided: torch.Tensor) -> torch.Tensor:
        """Where the scheduler would go if it were given ``guided`` ``[b, ...]``, float32; it stays where it is."""
        scheduler = copy.deepcopy(self.scheduler)
        vars(scheduler).pop("step", None)
        named = dict(self.arguments.arguments)
        sample = self.sample.float() if self.sample.is_floating_point() else self.sample
        named |= {"model_output": guided.float(), "sample": sample, "self": scheduler}
        call = inspect.BoundArguments(self.arguments.signature, named)
        result = inspect.unwrap(type(scheduler).step)(*call.args, **call.kwargs)
        return result[0]

    def line(self) -> tuple[torch.Tensor, float]:
        """The scheduler's next latents ``[b, ...]`` as ``start + slope * guided``.

        Raises:
            ValueError: they are no such line, as of stochastic samplers and those that clip.
        """
        random = [torch.random.get_rng_state(), *_generator_states(self.arguments.arguments.get("generator"))]
        start = self.after(torch.zeros_like(self.guided))
        difference = self.after(torch.ones_like(self.guided)) - start
        now = [torch.random.get_rng_state(), *_generator_states(self.arguments.arguments.get("generator"))]
        name = type(self.scheduler).__name__
        if not all(map(torch.equal, random, now)):
            raise ValueError(f"{name} adds noise at each step: a ForecastPlan needs a deterministic sampler")
        slope = difference.flatten()[0].item()
        spread = (difference - slope).abs().max().item()
        # Rounding of numbers as large as the latents.
        if not slope or spread > 1e-2 * abs(slope) + 1e-5 * start.abs().max().item():
            raise ValueError(
                f"{name} doesn't step along the model's output: set clip_sample=False and thresholding=False"
            )
        return start, slope


@dataclass
class Answer:
    """What a waiting call goes on with: what its scheduler is given, and what is added to where it goes."""

    guided: torch.Tensor | None = None
    displacement: torch.Tensor | None = None


@dataclass
class CallRun:
    """One call of the pipeline, in a thread of its own, and what it has come to.

    Attributes:
        previous: the latents after the newest step, as ``Moment.of_images``.
        steps: the timesteps that it visited.
        upcoming: those that it visits if it goes on to the end.
        embedded_guidance: where guidance is an argument of the model, the least and the largest so far.
    """

    number: int
    computed: Collection[int] | None
    """The steps at which the model is computed; ``None``: all."""
    replayed: Mapping[int, Sequence[torch.Tensor]]
    """What the model's calls return at some steps, in place of computing it again."""
    history: int
    previous: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[float] = field(default_factory=list)
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {branch: [] for branch in BRANCHES})
    hidden_states: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[int, torch.Tensor] = field(default_factory=dict)
    upcoming: tuple[float, ...] = ()
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    classes: tuple[int | None, ...] = ()
    model: int = 0
    branches: tuple[str, ...] = ()
    embedded_guidance: tuple[float, float] | None = None
    open: list[str] = field(default_factory=list)
    """The branches that the model was asked for since the newest step."""
    last: bool = False
    fresh: bool = False
    """Whether the newest outputs were computed at this step."""

    def __post_init__(self):
        self._to_call: queue.SimpleQueue = queue.SimpleQueue()
        self._from_call: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, target: Callable[[], Any]) -> None:
        """Makes the thread; it begins when it is first let go on."""

        def follow() -> None:
            try:
                if self._to_call.get() is not None:
                    target()
                self._from_call.put(None)
            except _Left:
                self._from_call.put(None)
            except BaseException as error:
                self._from_call.put(error)

        self._thread = threading.Thread(target=follow, name=f"calibration call {self.number}", daemon=True)
        self._thread.start()

    def go_on(self, answer: Answer | None = None) -> Moment | None:
        """Lets the call go on to its next step; ``None``: it is over.

        Raises:
            RuntimeError: it failed, saying where and why.
        """
        self._to_call.put(answer or Answer())
        reached = self._from_call.get()
        if isinstance(reached, (KeyboardInterrupt, SystemExit)):
            raise reached
        if isinstance(reached, BaseException):
            where = f"at step {len(self.steps)}" if self.steps or self.open else "before its first step"
            kinds = [kind for kind in (ValueError, FloatingPointError) if isinstance(reached, kind)]
            kind = kinds[0] if kinds else RuntimeError
            raise kind(f"calibration call {self.number} failed {where}: {reached}") from reached
        return reached

    def cancel(self) -> None:
        """Ends the thread, wherever it waits."""
        if self._thread is not None:
            self._to_call.put(None)
            self._thread.join()

    def wait(self, moment: Moment) -> Answer:
        """In the call's thread: shows where it is, and waits to be let go on."""
        self._from_call.put(moment)
        answer = self._to_call.get()
        if answer is None:
            raise _Left
        return answer


class Lockstep:
    """The calls of a pipeline, followed step by step; a context manager that leaves the model as it was.

    Args:
        pipe: a pipeline with a ``transformer`` and a ``scheduler``.
        num_inference_steps: of every call.
        seed: of the calls that bring neither generators nor latents.
        history_bits: in which outputs are kept for later steps, see ``ForecastPlan``.

    Raises:
        ValueError: no pipeline of this kind, or DQAR is applied to it.
    """

    def __init__(self, pipe: Any, num_inference_steps: int, seed: int = 0, history_bits: int = 16):
        self._transformers = transformers(pipe)
        if self._transformers[0] is pipe or not hasattr(pipe, "scheduler"):
            raise ValueError(f"{type(pipe).__name__} has no transformer and scheduler: a plan needs a pipeline of both")
        self.pipe, self.num_inference_steps, self.seed = pipe, num_inference_steps, seed
        self._history_bits = history_bits
        self._runs: dict[int, CallRun] = {}
        self._pipes: dict[int, Any] = {}  # of each call a copy, by thread
        self._model = bare(self._transformers[0])
        self._argument_names = list(inspect.signature(type(self._model).forward).parameters)[1:]
        self._family = family(self._model)
        self._finder = RunFinder(
            self._family,
            null_class(self._model),
            lambda: getattr(self._pipes.get(threading.get_ident()), "scheduler", None),
            lambda: guides(self._pipes.get(threading.get_ident())),
            _Forgetful,
            lambda: 0,
            lambda run: None,
        )
        try:
            self._states: FinalHiddenStates | None = FinalHiddenStates([bare(model) for model in self._transformers])
        except ValueError:
            self._states = None

    def __enter__(self) -> Lockstep:
        for taken, transformer in enumerate(self._transformers):
            try:
                take_over(transformer, self._forward)
            except ValueError:
                for other in self._transformers[:taken]:
                    give_back(other)
                raise
        if self._states is not None:
            self._states.__enter__()
        WATCH.listen(self, self.pipe.scheduler)
        return self

    def __exit__(self, *exception: object) -> None:
        WATCH.leave(self)
        if self._states is not None:
            self._states.__exit__(*exception)
        for transformer in self._transformers:
            give_back(transformer)
        self._finder.clear()
        if callable(free := getattr(self.pipe, "maybe_free_model_hooks", None)):
            free()

    def follow(
        self,
        calls: Sequence[Mapping[str, Any]],
        computed: Collection[int] | None = None,
        replayed: Sequence[Mapping[int, Sequence[torch.Tensor]]] | None = None,
        history: int = 1,
        first: int = 0,
    ) -> Generator[tuple[list[CallRun], list[Moment]], None, None]:
        """The runs and their moments, step by step; ``answers`` says what each goes on with.

        Args:
            calls: keyword arguments of the pipeline.
            computed: the steps at which the model is computed; at others it returns what it last did.
            replayed: for each call, the ``[B, ...]`` that the model returns at some steps, without computing it again.
            history: outputs of each branch that moments show.
            first: number of the first call, for messages and seeds.

        Raises:
            ValueError, RuntimeError: a call failed, all others are ended then; or calls of different lengths.
        """
        runs = [CallRun(first + i, computed, replayed[i] if replayed else {}, history) for i in range(len(calls))]
        self.answers: list[Answer | None] = [None] * len(runs)
        try:
            for run, call in zip(runs, calls, strict=True):
                self._begin(run, call)
            while True:
                reached = [run.go_on(answer) for run, answer in zip(runs, self.answers, strict=True)]
                moments = [moment for moment in reached if moment is not None]
                if not moments:
                    return
                if len(moments) < len(runs):
                    lengths = sorted({len(run.steps) for run in runs})
                    raise ValueError(f"the calls take {lengths} steps: calibrate with calls of one length")
                self.answers = [None] * len(runs)
                yield runs, moments
        finally:
            for run in runs:
                run.cancel()

    # --- a call's own thread -----------------------------------------------------------------------------------------

    def _begin(self, run: CallRun, call: Mapping[str, Any]) -> None:
        pipe = copy.copy(self.pipe)
        pipe.scheduler = copy.deepcopy(self.pipe.scheduler)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        original = type(pipe.scheduler).step
        signature, scheduler = inspect.signature(original), pipe.scheduler

        def step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(scheduler, *args, **kwargs)
            return self._step(run, original, bound)

        vars(step)["__signature__"] = inspect.signature(scheduler.step)  # pipelines look for `eta` and `generator`
        scheduler.step = step
        named = call_arguments(self.pipe, call, self.num_inference_steps, self.seed + run.number)

        def draw() -> None:
            thread = threading.get_ident()
            self._runs[thread], self._pipes[thread] = run, pipe
            try:
                pipe(**named)
            finally:
                del self._runs[thread], self._pipes[thread]

        run.start(draw)

    def _step(self, run: CallRun, original: Callable, bound: inspect.BoundArguments) -> Any:
        named = bound.arguments
        moment = self._moment(run, bound)
        answer = run.wait(moment)
        if answer.guided is not None:
            named["model_output"] = answer.guided.to(moment.guided)
        result = original(*bound.args, **bound.kwargs)
        reached = result[0]
        if answer.displacement is not None:
            copies = len(reached) // moment.images
            reached.add_(answer.displacement.to(reached).repeat(copies, *[1] * (reached.ndim - 1)))
        run.previous = moment.of_images(reached).cpu()
        if run.fresh and self._history_bits < 16:
            for kept in run.outputs.values():
                kept[:1] = map(self._as_kept, kept[:1])
        run.fresh = False
        run.steps.append(moment.timestep)
        run.open.clear()
        if run.last:
            raise _Left
        return result

    def _moment(self, run: CallRun, bound: inspect.BoundArguments) -> Moment:
        named = bound.arguments
        guided, sample = named["model_output"], named["sample"]
        missing = [branch for branch in run.branches or BRANCHES[:1] if branch not in run.open]
        if missing or len(run.open) != len(run.branches):
            raise ValueError(
                f"the scheduler steps after {run.open or 'no branch'} of {list(run.branches) or ['the model']} "
                "was computed by pipe.transformer: a plan needs the same calls of one model at every step"
            )
        outputs = {branch: run.outputs[branch] for branch in run.branches}
        newest = {branch: kept[0].to(guided) for branch, kept in outputs.items()}
        if guided.ndim != newest["cond"].ndim or len(guided) % len(newest["cond"]):
            raise ValueError(
                f"the model makes {tuple(newest['cond'].shape)}, the scheduler is given {tuple(guided.shape)}: "
                "a plan needs both in one layout"
            )
        moment = Moment(
            float(torch.as_tensor(named["timestep"]).flatten()[0]),
            run.latents,
            outputs,
            dict(run.hidden_states),
            [run.raw[key] for key in sorted(run.raw)],
            guided,
            sample,
            1.0,
            {},
            bound.arguments["self"],
            bound,
            run.classes,
            run.model,
        )
        of_images = moment.of_images(guided)
        shown = [x[moment.part] for x in newest.values()]
        shares: list[Any]
        if len(shown) == 2:
            _, *shares = (x.item() for x in mixture(of_images.float(), shown[0].float(), shown[1].float()))
            if any(share != share for share in shares):  # NaN: both branches say the same
                shares = [1.0, 0.0]
        else:
            flat = shown[0].flatten().double()
            shares = [(of_images.flatten().double() @ flat / (flat @ flat)).item()]
        moment.scale = shares[0] / sum(shares)
        rest = _rest(of_images, shares, shown)
        if rest > ROUNDING and len(shown) == 2 and keeps_lengths(of_images, shown[0]):
            scale = bent_scale(of_images.float(), shown[0].float(), shown[1].float()).item()
            bent_shares = _bent_shares(of_images, shown[0], shown[1], scale)
            if (bent_rest := _rest(of_images, bent_shares, shown)) < 0.5 * rest:
                shares, rest, moment.scale = bent_shares, bent_rest, scale
        moment.shares = dict(zip(run.branches, shares, strict=True))
        if not rest <= LARGEST_RESIDUAL:
            if not of_images.isfinite().all():
                raise FloatingPointError("the model's output holds NaN or inf")
            raise ValueError(
                "guidance makes no weighted sum of the branches' outputs: leave out guidance_rescale and the like"
            )
        if moment.keeps_lengths:
            moment.hidden_states = {}  # what is read would go into each row by a matrix of its own
        return moment

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers the transformer's calls: computes, replays, or returns what it last did."""
        run = self._runs.get(threading.get_ident())
        named = dict(zip(self._argument_names, args, strict=False)) | kwargs
        if run is None:
            return original(*args, **kwargs)
        latents = as_batch(named.get(self._family.latents))
        if not isinstance(latents, torch.Tensor):
            raise ValueError(
                f"{type(self._model).__name__} takes no tensor `{self._family.latents}`: plans can't follow it"
            )
        followed, call, _ = self._finder.find(latents, named.get(self._family.timestep), conditions(named))
        if followed.timesteps is None:
            raise ValueError("the model is given a timestep that isn't the scheduler's")
        if len(followed.streams) > 1:
            raise ValueError("the pipeline denoises tiles or windows side by side: plans follow one stream of latents")
        run.last = followed.last
        run.upcoming = run.upcoming or tuple(followed.timesteps.values[followed.index :])
        if isinstance(embedded := named.get("guidance"), torch.Tensor):
            scales = (*embedded.flatten().tolist(), *(run.embedded_guidance or ()))
            run.embedded_guidance = min(scales), max(scales)
        key, step = call.stream.calls.index(call), len(run.steps)
        if step in run.replayed:
            output = None
            self._keep(run, call, key, run.replayed[step][key].to(latents.device), latents, None)
        elif run.computed is None or step in run.computed:
            output = original(*args, **kwargs)
            states = self._states.take() if self._states is not None else None
            self._keep(run, call, key, as_batch(output[0]), latents, states)
        else:
            output = None
            self._look(run, call, run.raw[key], latents)
        run.model = self._transformers.index(original.__self__)
        run.classes = call.stream.classes or (None,) * len(run.latents)
        run.open += [branch for branch in call.slices if branch not in run.open]
        run.branches = tuple(branch for branch in BRANCHES if run.outputs[branch])
        if output is not None:
            return output
        sample = run.raw[key].to(latents.device, copy=True)
        for branch, rows in call.slices.items():
            sample[shared_part(sample, latents)][rows] = run.outputs[branch][0].to(sample)
        return as_output(sample, self._family, named.get("return_dict", True))

    def _as_kept(self, output: torch.Tensor) -> torch.Tensor:
        """What later steps see of an output ``[b, ...]``."""
        channels = self._finder.family.channels
        return channels_back(stored(channels_first(output, channels), self._history_bits).dequantize(), channels)

    def _look(self, run: CallRun, call: Call, raw: torch.Tensor, latents: torch.Tensor) -> None:
        part, rows = shared_part(raw, latents), next(iter(call.slices.values()))
        run.latents = latents[part][rows].cpu()

    def _keep(
        self,
        run: CallRun,
        call: Call,
        key: int,
        raw: torch.Tensor,
        latents: torch.Tensor,
        hidden_states: torch.Tensor | None,
    ) -> None:
        part = shared_part(raw, latents)
        run.raw[key], run.fresh = raw.cpu(), True
        self._look(run, call, raw, latents)
        if hidden_states is not None:
            hidden_states = hidden_states.reshape(len(latents), -1, hidden_states.shape[-1])
            if patch_sides(_grid(raw[part], self._finder.family.channels), hidden_states.shape[1]) is None:
                hidden_states = None
        for branch, rows in call.slices.items():
            run.outputs[branch].insert(0, raw[part][rows].cpu())
            del run.outputs[branch][run.history :]
            if hidden_states is not None:
                run.hidden_states[branch] = hidden_states[rows].cpu()

    # --- the schedulers ----------------------------------------------------------------------------------------------

    def timesteps_set(self, scheduler: Any) -> None:
        """See ``SchedulerWatch``."""
        self._finder.timesteps_set(scheduler)

    def before_step(self, scheduler: Any, given: Mapping[str, Any]) -> None:
        """See ``SchedulerWatch``: calls wait before this."""

    def after_step(self, scheduler: Any) -> None:
        """See ``SchedulerWatch``."""
        run: Run | None = self._finder.finishing(scheduler)
        if run is not None:
            self._finder.give_up(run)


def _grid(x: torch.Tensor, channels: int) -> tuple[int, ...]:
    """The latents' sides, without batch and channels."""
    axis = x.ndim - 1 if x.ndim == 3 else channels
    return tuple(side for i, side in enumerate(x.shape) if i not in (0, axis))


def bent(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Guidance ``[..., C]`` that gives each row the length that it has in ``cond``."""
    guided = uncond + scale * (cond - uncond)
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def _bent_shares(guided: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """How much of each branch is in what ``bent`` makes of them, or in its negative, ``[b, ..., 1]``."""
    straight = uncond + scale * (cond - uncond)
    stretch = (guided * straight).sum(-1, keepdim=True) / straight.square().sum(-1, keepdim=True).clamp_min(1e-12)
    return [scale * stretch, (1 - scale) * stretch]


def _rest(guided: torch.Tensor, shares: Sequence[Any], shown: Sequence[torch.Tensor]) -> float:
    """How much of ``guided`` isn't the sum of what is shown by these shares."""
    rest = guided.double() - sum(share * x.double() for share, x in zip(shares, shown, strict=True))
    return (rest.norm() / guided.double().norm()).item()


def _generator_states(generator: Any) -> list[torch.Tensor]:
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    return [item.get_state() for item in generators if isinstance(item, torch.Generator)]


def _copied(value: Any) -> Any:
    """A call's argument for one of its runs: generators advance as they are used, so each run gets its own."""
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Generator) for item in value):
        return [_copied(item) for item in value]
    return value


def call_arguments(pipe: Any, call: Mapping[str, Any], num_inference_steps: int, seed: int) -> dict[str, Any]:
    """A call's keyword arguments, so that each of its runs draws the same from the same noise.

    Raises:
        ValueError: arguments that the pipeline doesn't take, or that are given otherwise.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "num_inference_steps" not in accepted:
        raise ValueError(f"{type(pipe).__name__} takes no num_inference_steps: a plan is made for a number of steps")
    if "num_inference_steps" in call:
        raise ValueError("a calibration call holds num_inference_steps: give it once, for all calls")
    unknown = set(call) - set(accepted)
    if unknown and not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        raise ValueError(f"{type(pipe).__name__} takes no argument {sorted(unknown)[0]!r}")
    named = {name: _copied(value) for name, value in call.items()}
    if "generator" in accepted and named.get("generator") is None:
        named["generator"] = torch.Generator().manual_seed(seed)
    return {**named, "num_inference_steps": num_inference_steps}
