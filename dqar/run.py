"""Finds the run and the step that a forward pass belongs to. No other module does this.

A *run* is one pass through a scheduler's timesteps. Its current step follows from the timestep that the model is given.
A run denoises one *stream* of latents, or several side by side (tiles, windows, micro-batches). At each step a stream
needs one forward pass (a *call*), or one for each branch of guidance. A stream owns what is cached for it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dqar.families import Family
from dqar.noise import NoiseLevels, noise_levels
from dqar.plan import BRANCHES

MAX_RUNS = 16
"""Unfinished runs to remember; the oldest is dropped when more begin."""
MAX_STREAMS = 256
"""Streams to remember in one run; each further call counts as a run of its own."""
Condition = tuple[torch.Tensor | None, ...]


class Timesteps:
    """The timesteps that ``set_timesteps`` gave one scheduler."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.tensor = scheduler, scheduler.timesteps
        self.values = [float(t) for t in torch.as_tensor(self.tensor).tolist()]
        self._version = _version(self.tensor)
        self._levels: NoiseLevels | None = None
        self._asked = False

    @property
    def current(self) -> bool:
        """Whether the scheduler still has these timesteps, unchanged."""
        return getattr(self.scheduler, "timesteps", None) is self.tensor and _version(self.tensor) == self._version

    @property
    def levels(self) -> NoiseLevels | None:
        """Signal and noise at each step; ``None`` for a scheduler of an unknown kind."""
        if not self._asked:
            self._levels, self._asked = noise_levels(self.scheduler, self.values), True
        return self._levels

    def index_by_memory(self, timestep: Any) -> int | None:
        """The index of a timestep that is a view of these, as a pipeline's is: found without waiting for the device."""
        ours = self.tensor
        if not (isinstance(timestep, torch.Tensor) and isinstance(ours, torch.Tensor)) or timestep.dtype != ours.dtype:
            return None
        if timestep.numel() == 0 or timestep.device != ours.device or ours.device.type == "meta":
            return None
        if timestep.untyped_storage().data_ptr() != ours.untyped_storage().data_ptr() or any(
            size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)
        ):
            return None
        index = int(timestep.storage_offset() - ours.storage_offset())
        return index if 0 <= index < len(self.values) else None

    def indices_by_value(self, value: float) -> list[int]:
        """The indices of timesteps that may be meant by ``value``, the nearest first.

        Flux-like models get the timestep divided by 1000. In bfloat16 it is rounded before and after the division, by
        up to 0.4 % each time, and the first timesteps of a shifted schedule are no further apart than that.
        """
        exact = [i for i, t in enumerate(self.values) if t == value]
        if exact:
            return exact
        for scaled in (value, 1000 * value):
            near = [i for i, t in enumerate(self.values) if abs(t - scaled) <= 8e-3 * max(abs(t), 1e-3)]
            if near:
                return sorted(near, key=lambda i: abs(self.values[i] - scaled))
        return []


@dataclass
class Kept:
    """A tensor that is expected to stay the same in a run; detects changes, those in place included."""

    tensor: torch.Tensor
    version: int | None
    copy: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> Kept | None:
        """Remembers a tensor of any shape for a later comparison."""
        if tensor is None:
            return None
        if tensor.is_inference():  # without a version counter
            return cls(tensor, None, tensor.clone())
        return cls(tensor, tensor._version, None)

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is the same object, unchanged, or holds equal values in the same shape."""
        if tensor is self.tensor and self.version is not None:
            return tensor._version == self.version
        if self.copy is not None:
            return tensor.shape == self.copy.shape and torch.equal(tensor, self.copy)
        if self.tensor._version != self.version or tensor.shape != self.tensor.shape:
            return False
        return torch.equal(tensor, self.tensor)


@dataclass
class Call:
    """A forward pass that a stream makes once at every step, with the same branches and the same condition."""

    stream: Stream
    slices: dict[str, slice]
    """The rows of the batch that hold each branch."""
    condition: tuple[Kept | None, ...]
    batch: int
    claimed: int = 0
    """``Run.count`` when it was last made."""
    caption: dict[int, Any] = field(default_factory=dict)
    """What each cross-attention keeps: it depends on the caption only."""
    output: torch.Tensor | None = None
    """The newest computed output, all branches, if outputs are forecast."""

    @functools.cached_property
    def labels(self) -> tuple[int, ...] | None:
        """The class labels, if the model takes any. Waits for the device once a run."""
        labels = self.condition[0]
        return None if labels is None else tuple(labels.tensor.tolist())

    def keeps_to(self, condition: Condition) -> bool:
        """Whether ``condition`` equals the call's."""
        return len(condition) == len(self.condition) and all(
            kept is tensor if kept is None or tensor is None else kept.still(tensor)
            for kept, tensor in zip(self.condition, condition, strict=True)
        )


@dataclass
class Stream:
    """Latents that are denoised together, and ``state``: what is cached for them, with a method ``forget``."""

    state: Any
    latents: torch.Tensor
    """The newest latents of one branch, ``[b, C, H, W]``."""
    calls: list[Call] = field(default_factory=list)
    opened: int = 0
    """``Run.count`` when its last step began."""

    @property
    def classes(self) -> tuple[int, ...] | None:
        """Each image's class, as the conditional branch has it; ``None``: without that branch, or without classes."""
        for call in self.calls:
            if "cond" in call.slices and call.labels is not None:
                return call.labels[call.slices["cond"]]
        return None


@dataclass
class Run:
    """One pass through the timesteps."""

    number: int
    timesteps: Timesteps | None
    """``None`` if they are unknown, as for a transformer without a scheduler."""
    streams: list[Stream] = field(default_factory=list)
    index: int = -1
    """The step's index in ``timesteps``; without timesteps, steps are counted."""
    count: int = 0
    """Steps begun so far."""
    timestep: float = 0.0
    given: float = 0.0
    """The timestep that the newest call was given, which may be another one than the scheduler's nearest."""
    first_timestep: float = 0.0
    guess: int = 1
    stepped: bool = False
    """Whether the scheduler has stepped since the last forward pass."""
    unseen: torch.Tensor | None = None
    """The sum of all outputs that were not yet checked for NaN."""

    @property
    def scheduler(self) -> Any:
        """The scheduler of this run; ``None`` if unknown."""
        return None if self.timesteps is None else self.timesteps.scheduler

    @property
    def levels(self) -> NoiseLevels | None:
        """Signal and noise at each step; ``None`` if unknown."""
        return None if self.timesteps is None else self.timesteps.levels

    @property
    def total_steps(self) -> int:
        """Steps of a whole run; without timesteps guessed from the first two, taken as evenly spaced down to zero."""
        if self.timesteps is not None:
            return len(self.timesteps.values)
        return max(self.index + 1, self.guess)

    @property
    def last(self) -> bool:
        """Whether the current step is the run's last."""
        return self.timesteps is not None and self.index + 1 == len(self.timesteps.values)


class RunFinder:
    """Finds run, step and stream of each forward pass of one session.

    Args:
        family: of the model.
        null_class: class of the unconditional branch, if the model has classes.
        scheduler: returns the pipeline's present scheduler, or ``None`` for a transformer alone.
        guided: returns whether the pipeline draws with guidance now; ``None`` if it doesn't say.
        new_state: makes the state of a new stream.
        begin_run: returns the number of a new run.
        end_run: called with each run that ends or is given up.
    """

    def __init__(
        self,
        family: Family,
        null_class: int | None,
        scheduler: Callable[[], Any],
        guided: Callable[[], bool | None],
        new_state: Callable[[], Any],
        begin_run: Callable[[], int],
        end_run: Callable[[Run], None],
    ):
        self.family, self.null_class, self.scheduler, self.guided = family, null_class, scheduler, guided
        self.new_state, self.begin_run, self.end_run = new_state, begin_run, end_run
        self._runs: dict[tuple[int, int | None], Run] = {}
        self._lists: dict[int, Timesteps] = {}
        self._set_here: dict[int, list[weakref.ref]] = {}  # schedulers whose timesteps were set, by thread, newest last

    # --- the scheduler -----------------------------------------------------------------------------------------------

    def timesteps_set(self, scheduler: Any) -> None:
        """A scheduler of this thread got new timesteps: its run is over."""
        thread = threading.get_ident()
        here = [r for r in self._set_here.get(thread, []) if r() not in (None, scheduler)]
        self._set_here[thread] = [*here, weakref.ref(scheduler)][-MAX_RUNS:]
        self.give_up(self._runs.get((thread, id(scheduler))))

    def stepping(self, scheduler: Any) -> Run | None:
        """The run whose current step the scheduler is about to take."""
        run = self._runs.get((threading.get_ident(), id(scheduler)))
        return run if run is not None and run.count and not run.stepped else None

    def one_branch(self, run: Run, sample: torch.Tensor) -> bool:
        """Whether the two branches of a run's only call were images of one seed, as the sampler is given them all.

        Args:
            sample: ``[b, ...]``, of the run's first step. The call then has one branch.
        """
        calls = [call for stream in run.streams for call in stream.calls]
        if run.count > 1 or len(calls) != 1 or len(calls[0].slices) == 1 or calls[0].condition[0] is not None:
            return False
        call = calls[0]
        if len(sample) != call.batch:
            return False
        call.slices = {"cond": slice(0, call.batch)}
        call.stream.latents = torch.cat([call.stream.latents] * 2)
        return True

    def finishing(self, scheduler: Any) -> Run | None:
        """Notes that the scheduler has stepped. Returns the run if that was its last step: latents are decoded next."""
        run = self._runs.get((threading.get_ident(), id(scheduler)))
        if run is None or not run.count:
            return None
        run.stepped = True
        # Tiles that each take a step of their own come here once a tile.
        claimed = all(call.claimed == run.count for stream in run.streams for call in stream.calls)
        return run if run.last and claimed else None

    def give_up(self, run: Run | None) -> None:
        """Ends a run and frees its cache."""
        for key, kept in list(self._runs.items()):
            if kept is run:
                del self._runs[key]
                self.end_run(kept)

    def clear(self) -> None:
        """Ends all runs."""
        for run in list(self._runs.values()):
            self.give_up(run)
        self._set_here.clear()
        self._lists.clear()

    # --- the forward pass --------------------------------------------------------------------------------------------

    def find(self, latents: torch.Tensor, timestep: Any, condition: Condition) -> tuple[Run, Call, bool]:
        """Returns the run at its present step, the call, and whether it is the stream's first call at this step.

        Args:
            latents: ``[B, C, H, W]``, all branches of the call.
            timestep: as the model gets it; the same for all samples.
            condition: ``families.conditions`` of the call.

        Raises:
            ValueError: samples at different timesteps.
        """
        run, opens = self._find_run(latents, timestep)
        if opens:
            run.count += 1
        run.stepped = False
        call = self._find_call(run, latents, condition)
        if call is None and len(run.streams) >= MAX_STREAMS:
            run = self._new_run(run.timesteps, run.index, run.timestep)
            run.count = 1
        if call is None:
            call = self._new_call(run, latents, condition)
        call.claimed = run.count
        stream, rows = call.stream, call.slices[next(iter(call.slices))]
        first = stream.opened != run.count
        stream.opened, stream.latents = run.count, latents[rows]
        return run, call, first

    def _find_run(self, latents: torch.Tensor, timestep: Any) -> tuple[Run, bool]:
        thread = threading.get_ident()
        timesteps, indices, value = self._locate(timestep)
        key = (thread, None if timesteps is None else id(timesteps.scheduler))
        run = self._runs.get(key)
        if run is not None and run.timesteps is not timesteps:
            self.give_up(run)
            run = None
        if run is None:
            _check_same_timestep(timestep)
        run, opens = self._count(run, value) if timesteps is None else self._follow(run, timesteps, indices, latents)
        run.given = value
        return run, opens

    def _follow(
        self, run: Run | None, timesteps: Timesteps, indices: list[int], latents: torch.Tensor
    ) -> tuple[Run, bool]:
        """The step of a run with known timesteps."""
        index = indices[0]
        if run is not None and len(indices) > 1:  # a timestep that is there twice, as Heun's, or was rounded
            index = min((i for i in indices if i >= run.index + run.stepped), default=index)
        elif (begin := getattr(timesteps.scheduler, "begin_index", None)) in indices:
            index = begin
        if run is not None and index == run.index:
            return run, False
        if run is not None and (index < run.index or (index > run.index + 1 and not self._goes_on(run, latents))):
            self.give_up(run)
            run = None
        if run is None:
            run = self._new_run(timesteps, index, timesteps.values[index])
        run.index, run.timestep = index, timesteps.values[index]
        return run, True

    def _count(self, run: Run | None, value: float) -> tuple[Run, bool]:
        """The step of a run with unknown timesteps: each lower timestep is the next step."""
        if run is not None and value == run.timestep:
            return run, False
        if run is not None and value > run.timestep:
            self.give_up(run)
            run = None
        if run is None:
            run = self._new_run(None, -1, value)
            run.first_timestep = value
        run.index += 1
        run.timestep = value
        if run.index == 1:
            run.guess = int(run.first_timestep / (run.first_timestep - value)) + 1
        return run, True

    def _locate(self, timestep: Any) -> tuple[Timesteps | None, list[int], float]:
        """The timesteps it belongs to, its possible indices there, and its value (the index's if it wasn't read)."""
        present = self.scheduler()
        here = [ref() for ref in reversed(self._set_here.get(threading.get_ident(), []))]
        candidates: list[Timesteps] = []
        for scheduler in (present, *here):
            if scheduler is None or any(scheduler is candidate.scheduler for candidate in candidates):
                continue
            # Before set_timesteps a scheduler lists all its training timesteps, which nobody chose.
            if getattr(scheduler, "num_inference_steps", 0) is None and scheduler not in here:
                continue
            timesteps = self._lists.get(id(scheduler))
            if timesteps is None or timesteps.scheduler is not scheduler or not timesteps.current:
                if getattr(scheduler, "timesteps", None) is None:
                    continue
                timesteps = self._lists[id(scheduler)] = Timesteps(scheduler)
                while len(self._lists) > MAX_RUNS:
                    del self._lists[next(iter(self._lists))]
            index = timesteps.index_by_memory(timestep)
            if index is not None:
                return timesteps, [index], timesteps.values[index]
            candidates.append(timesteps)
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            # DiTPipeline copies its timesteps to the GPU. Reading one would wait for all that is queued there; a
            # scheduler that counts its own steps has to be stepped in turn anyway.
            for timesteps in candidates:
                run = self._runs.get((threading.get_ident(), id(timesteps.scheduler)))
                if run is not None and run.timesteps is timesteps:
                    index = getattr(timesteps.scheduler, "step_index", None)
                    if index == run.index + run.stepped and index < len(timesteps.values):
                        return timesteps, [index], timesteps.values[index]
        value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        value = 1 - value if self.family.reversed_time else value
        for timesteps in candidates:
            if indices := timesteps.indices_by_value(value):
                return timesteps, indices, value
        return None, [], value

    def _new_run(self, timesteps: Timesteps | None, index: int, timestep: float) -> Run:
        key = (threading.get_ident(), None if timesteps is None else id(timesteps.scheduler))
        self.give_up(self._runs.get(key))
        while len(self._runs) >= MAX_RUNS:
            self.give_up(next(iter(self._runs.values())))
        run = self._runs[key] = Run(self.begin_run(), timesteps, index=index, timestep=timestep)
        return run

    def _goes_on(self, run: Run, latents: torch.Tensor) -> bool:
        """Whether latents that skip steps continue this run, rather than begin another."""
        return any(_alike(stream.latents, latents[: len(stream.latents)]) > 0.5 for stream in run.streams)

    def _find_call(self, run: Run, latents: torch.Tensor, condition: Condition) -> Call | None:
        """The run's call that this forward pass repeats, if any; each call is made once a step."""
        calls = [call for stream in run.streams for call in stream.calls]
        if len(calls) == 1 and calls[0].claimed != run.count and _fits(calls[0], latents):
            return calls[0] if calls[0].keeps_to(condition) else self._changed(calls[0], latents, condition)
        same = [call for call in calls if _fits(call, latents) and call.keeps_to(condition)]
        free = [call for call in same if call.claimed != run.count]
        if len(same) == 1 and free:
            return free[0]
        if free:  # windows of one prompt: the latents tell
            call = max(free, key=lambda candidate: _likeness(candidate, latents))
            return call if _likeness(call, latents) > 0.5 else None
        if len(calls) == 1 and calls[0].claimed != run.count:
            return self._changed(calls[0], latents, condition)
        return None

    def _changed(self, call: Call, latents: torch.Tensor, condition: Condition) -> Call | None:
        """Starts the only stream anew: its condition or its branches have changed."""
        stream, slices = call.stream, self._branch_slices(latents, condition)
        if latents[next(iter(slices.values()))].shape != stream.latents.shape:
            return None
        stream.state.forget()
        stream.calls.clear()
        changed = Call(stream, slices, tuple(map(Kept.of, condition)), len(latents))
        stream.calls.append(changed)
        return changed

    def _new_call(self, run: Run, latents: torch.Tensor, condition: Condition) -> Call:
        slices = self._branch_slices(latents, condition)
        part = latents[next(iter(slices.values()))]
        stream = None
        for other in run.streams:  # another branch of what was just given, in a call of its own
            taken = {branch for call in other.calls for branch in call.slices}
            if other.opened != run.count or len(slices) > 1 or other.latents.shape != part.shape:
                continue
            if any(call.keeps_to(condition) for call in other.calls):  # the same once more is no branch of it
                continue
            if len(taken) < len(BRANCHES) and torch.equal(other.latents, part):
                [branch] = slices
                free = [b for b in BRANCHES if b not in taken]
                if branch not in free and not self._is_null(condition[0]):
                    slices = {free[0]: slice(0, len(latents))}
                    branch = free[0]
                if branch in free:
                    stream = other
                    break
        if stream is None:
            stream = Stream(self.new_state(), part)
            run.streams.append(stream)
        call = Call(stream, slices, tuple(map(Kept.of, condition)), len(latents))
        stream.calls.append(call)
        return call

    def _is_null(self, labels: torch.Tensor | None) -> bool:
        return labels is not None and self.null_class is not None and bool((labels == self.null_class).all())

    def _branch_slices(self, latents: torch.Tensor, condition: Condition) -> dict[str, slice]:
        """The rows of each branch. Guidance doubles the batch, with equal latents in both halves.

        So do images of one seed, of a pipeline that doesn't say whether it guides: ``one_branch`` tells them later.
        """
        batch, half, labels = len(latents), len(latents) // 2, condition[0]
        classes = labels if labels is not None and labels.ndim == 1 else None
        may_stack = batch % 2 == 0 and self.family.stacks
        if classes is None:
            may_stack = may_stack and self.guided() is not False
        else:
            may_stack = may_stack and self._is_null(classes[half:])
        if may_stack and torch.equal(latents[:half], latents[half:]):
            order = self.family.branch_order
            return {order[0]: slice(0, half), order[1]: slice(half, batch)}
        return {"uncond" if self._is_null(classes) else "cond": slice(0, batch)}


def _version(timesteps: Any) -> int | None:
    """Changes with every change in place, where a tensor counts them."""
    counts = isinstance(timesteps, torch.Tensor) and not timesteps.is_inference()
    return timesteps._version if counts else None


def _fits(call: Call, latents: torch.Tensor) -> bool:
    return call.batch == len(latents) and call.stream.latents.shape[1:] == latents.shape[1:]


def _likeness(call: Call, latents: torch.Tensor) -> float:
    rows = next(iter(call.slices.values()))
    return _alike(call.stream.latents, latents[rows])


def _alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors; −1 for different shapes."""
    if a.shape != b.shape:
        return -1.0
    a, b = a.flatten().float(), b.flatten().float()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-12)).item()


def _check_same_timestep(timestep: Any) -> None:
    if not isinstance(timestep, torch.Tensor) or timestep.numel() < 2 or not any(timestep.stride()):
        return
    if bool((timestep != timestep.flatten()[0]).any()):
        raise ValueError(
            f"the samples of one call are at different timesteps, {timestep.flatten()[:4].tolist()} ...: DQAR takes "
            "batches at one timestep; call remove_dqar first"
        )
