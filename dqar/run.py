"""Which step of which run a forward pass is: the only place that knows.

A *run* is one pass down a scheduler's timesteps; its step is found from the timestep that the model is given. A run
denoises one *stream* of latents or, in tiles, windows and micro-batches, several side by side. A step is one forward
pass of a stream, or several: one for each branch of guidance. What is kept belongs to a stream.
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
"""Unfinished runs that are kept side by side; a stopped one leaves when so many others began."""
MAX_STREAMS = 256
"""Streams of one run: beyond, each call is taken for a run of its own."""
Condition = tuple[torch.Tensor | None, ...]


class Timesteps:
    """The timesteps of one scheduler, as ``set_timesteps`` left them."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.tensor = scheduler, scheduler.timesteps
        self.values = [float(t) for t in torch.as_tensor(self.tensor).tolist()]
        self._levels: NoiseLevels | None = None
        self._asked = False

    @property
    def current(self) -> bool:
        """Whether the scheduler hasn't got others since."""
        return getattr(self.scheduler, "timesteps", None) is self.tensor

    @property
    def levels(self) -> NoiseLevels | None:
        """Signal and noise at each step, where the scheduler tells."""
        if not self._asked:
            self._levels, self._asked = noise_levels(self.scheduler, self.values), True
        return self._levels

    def index_by_memory(self, timestep: Any) -> int | None:
        """The index of a timestep that is a view of these, as pipelines' are: no device has to be waited for."""
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
        """Where the value may stand, the nearest first.

        Flux-like models are given a thousandth of it. In bfloat16 it was rounded before and after the division, by up
        to 0.4 % each, and the first steps of a shifted schedule are as near to each other as that.
        """
        exact = [i for i, own in enumerate(self.values) if own == value]
        if exact:
            return exact
        for scaled in (value, 1000 * value):
            near = [i for i, own in enumerate(self.values) if abs(own - scaled) <= 8e-3 * max(abs(own), 1e-3)]
            if near:
                return sorted(near, key=lambda i: abs(self.values[i] - scaled))
        return []


@dataclass
class Kept:
    """One tensor that a run keeps to, and how to notice that it changed, in place too."""

    tensor: torch.Tensor
    version: int | None
    copy: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> Kept | None:
        """What is to be compared with later."""
        if tensor is None:
            return None
        if tensor.is_inference():  # without a version counter
            return cls(tensor, None, tensor.clone())
        return cls(tensor, tensor._version, None)

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is or holds the same; another object is looked into only if this one didn't change."""
        if tensor is self.tensor and self.version is not None:
            return tensor._version == self.version
        if self.copy is not None:
            return tensor.shape == self.copy.shape and torch.equal(tensor, self.copy)
        if self.tensor._version != self.version or tensor.shape != self.tensor.shape:
            return False
        return torch.equal(tensor, self.tensor)


@dataclass
class Call:
    """One of a stream's forward passes: the same branches of the same condition, at every step once."""

    stream: Stream
    slices: dict[str, slice]
    """The branches' rows of the batch."""
    condition: tuple[Kept | None, ...]
    batch: int
    claimed: int = 0
    """The count of the step at which it was last made."""
    caption: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """K and V of each cross-attention, which are the caption's."""
    output: torch.Tensor | None = None
    """The newest computed one, whole, where outputs are forecast."""

    @functools.cached_property
    def labels(self) -> tuple[int, ...] | None:
        """The class labels, where the model is given any; the device is waited for once a run."""
        labels = self.condition[0]
        return None if labels is None else tuple(labels.tensor.tolist())

    def keeps_to(self, condition: Condition) -> bool:
        """Whether the condition is the call's."""
        return len(condition) == len(self.condition) and all(
            kept is tensor if kept is None or tensor is None else kept.still(tensor)
            for kept, tensor in zip(self.condition, condition, strict=True)
        )


@dataclass
class Stream:
    """Latents that are denoised together, with what is kept for them: ``state``, which has ``forget``."""

    state: Any
    latents: torch.Tensor
    """The newest, of one branch ``[b, C, H, W]``."""
    calls: list[Call] = field(default_factory=list)
    opened: int = 0
    """The count of the step that was last opened for it."""


@dataclass
class Run:
    """One pass down the timesteps."""

    number: int
    timesteps: Timesteps | None
    """``None``: nobody knows them, as of a transformer without a scheduler."""
    streams: list[Stream] = field(default_factory=list)
    index: int = -1
    """The step, in ``timesteps``; without them: counted."""
    count: int = 0
    """Steps taken, the open one included."""
    timestep: float = 0.0
    first_timestep: float = 0.0
    guess: int = 1
    stepped: bool = False
    """Whether the scheduler took a step since the last forward pass."""
    unseen: torch.Tensor | None = None
    """The sum of all outputs that nobody has looked at yet."""

    @property
    def scheduler(self) -> Any:
        """Whose timesteps these are; ``None``: unknown."""
        return None if self.timesteps is None else self.timesteps.scheduler

    @property
    def levels(self) -> NoiseLevels | None:
        """Signal and noise at each step, where they are known."""
        return None if self.timesteps is None else self.timesteps.levels

    @property
    def total_steps(self) -> int:
        """Steps of a whole run; without timesteps guessed: evenly spaced ones down to zero tell from the first two."""
        if self.timesteps is not None:
            return len(self.timesteps.values)
        return max(self.index + 1, self.guess)

    @property
    def last(self) -> bool:
        """Whether the open step is the run's last one."""
        return self.timesteps is not None and self.index + 1 == len(self.timesteps.values)


class RunFinder:
    """Finds run, step and stream of each forward pass, for one session.

    Args:
        family: of the model.
        null_class: of the unconditional branch, where the model has classes.
        scheduler: a function that returns the pipeline's own scheduler, now; ``None`` for a transformer alone.
        new_state: makes what a stream keeps.
        begin_run: returns the number of a new run.
        end_run: is told of a run that ended or was given up.
    """

    def __init__(
        self,
        family: Family,
        null_class: int | None,
        scheduler: Callable[[], Any],
        new_state: Callable[[], Any],
        begin_run: Callable[[], int],
        end_run: Callable[[Run], None],
    ):
        self.family, self.null_class, self.scheduler = family, null_class, scheduler
        self.new_state, self.begin_run, self.end_run = new_state, begin_run, end_run
        self._runs: dict[tuple[int, int | None], Run] = {}
        self._lists: dict[int, Timesteps] = {}
        self._set_here: dict[int, list[weakref.ref]] = {}  # schedulers whose timesteps were set, by thread, newest last

    # --- the scheduler -----------------------------------------------------------------------------------------------

    def timesteps_set(self, scheduler: Any) -> None:
        """A scheduler of this thread got its timesteps: a run on it is over."""
        thread = threading.get_ident()
        here = [r for r in self._set_here.get(thread, []) if r() not in (None, scheduler)]
        self._set_here[thread] = [*here, weakref.ref(scheduler)][-MAX_RUNS:]
        self.give_up(self._runs.get((thread, id(scheduler))))

    def stepping(self, scheduler: Any) -> Run | None:
        """The run whose open step the scheduler is about to take."""
        run = self._runs.get((threading.get_ident(), id(scheduler)))
        return run if run is not None and run.count and not run.stepped else None

    def finishing(self, scheduler: Any) -> Run | None:
        """Notes that the scheduler took a step; the run, if it was its last, before anything is decoded."""
        run = self._runs.get((threading.get_ident(), id(scheduler)))
        if run is None or not run.count:
            return None
        run.stepped = True
        # Tiles that each take a step of their own come here once a tile.
        claimed = all(call.claimed == run.count for stream in run.streams for call in stream.calls)
        return run if run.last and claimed else None

    def give_up(self, run: Run | None) -> None:
        """Ends a run, and frees what was kept for it."""
        for key, one in list(self._runs.items()):
            if one is run:
                del self._runs[key]
                self.end_run(one)

    def clear(self) -> None:
        """Ends all runs."""
        for run in list(self._runs.values()):
            self.give_up(run)
        self._set_here.clear()
        self._lists.clear()

    # --- the forward pass --------------------------------------------------------------------------------------------

    def find(self, latents: torch.Tensor, timestep: Any, condition: Condition) -> tuple[Run, Call, bool]:
        """The run, opened at its step, the call, and whether it is the stream's first at this step.

        Args:
            latents: ``[B, C, H, W]``, all branches of the call.
            timestep: as the model is given it: of all samples the same.
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
        if timesteps is None:
            return self._count(run, value)
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
        """The step of a run whose timesteps nobody knows: each lower timestep is the next one."""
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
        """Whose timestep it is, where it may stand among them, and its value (0 where that wasn't read)."""
        own = self.scheduler()
        here = [ref() for ref in reversed(self._set_here.get(threading.get_ident(), []))]
        candidates: list[Timesteps] = []
        for scheduler in (own, *here):
            if scheduler is None or any(scheduler is one.scheduler for one in candidates):
                continue
            # Before set_timesteps a scheduler lists all it was trained with: a list that nobody chose.
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
                return timesteps, [index], 0.0
            candidates.append(timesteps)
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
        """Whether latents after left-out steps are those that the run was at, rather than another run's."""
        return any(_alike(stream.latents, latents[: len(stream.latents)]) > 0.5 for stream in run.streams)

    def _find_call(self, run: Run, latents: torch.Tensor, condition: Condition) -> Call | None:
        """Which of the run's calls this is, if it was made before; each is made once a step."""
        calls = [call for stream in run.streams for call in stream.calls]
        if len(calls) == 1 and calls[0].claimed != run.count and _fits(calls[0], latents):
            return calls[0] if calls[0].keeps_to(condition) else self._changed(calls[0], latents, condition)
        same = [call for call in calls if _fits(call, latents) and call.keeps_to(condition)]
        free = [call for call in same if call.claimed != run.count]
        if len(same) == 1 and free:
            return free[0]
        if free:  # windows of one prompt: the latents tell
            call = max(free, key=lambda one: _likeness(one, latents))
            return call if _likeness(call, latents) > 0.5 else None
        if len(calls) == 1 and calls[0].claimed != run.count:
            return self._changed(calls[0], latents, condition)
        return None

    def _changed(self, call: Call, latents: torch.Tensor, condition: Condition) -> Call | None:
        """The only call of the only stream, for which something else is to be drawn now, or by other branches."""
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
        """Which part of the batch is which branch; guidance doubles the batch, with equal latents in both halves."""
        batch, half, labels = len(latents), len(latents) // 2, condition[0]
        classes = labels if labels is not None and labels.ndim == 1 else None
        if batch % 2 == 0 and torch.equal(latents[:half], latents[half:]):
            order = self.family.branch_order
            if classes is None or self._is_null(classes[half:]):
                return {order[0]: slice(0, half), order[1]: slice(half, batch)}
        return {"uncond" if self._is_null(classes) else "cond": slice(0, batch)}


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
