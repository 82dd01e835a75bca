"""DQAR on a diffusers transformer: takes over what one of its two engines decides about, and nothing else.

Nothing of the model is edited: modules are taken over as ``dqar.takeover`` says, attention processors stay where they
are, and schedulers are watched without being touched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dqar.checks import check
from dqar.config import DQARConfig
from dqar.controller import DQARController
from dqar.families import as_batch, bare, conditions, family, find_layers, guides, null_class, transformers
from dqar.forecast.ladder import LadderEngine, PlanLadder
from dqar.forecast.plan import ForecastPlan
from dqar.forecast.run import ForecastEngine
from dqar.plan import ReusePlan
from dqar.reuse import ReuseEngine
from dqar.run import Call, Run, RunFinder, Stream
from dqar.takeover import WATCH, Handler, give_back, handler_of, take_over
from dqar.trace import MODEL, Trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SESSIONS: weakref.WeakSet[DQARSession] = weakref.WeakSet()


def apply_dqar(
    pipe: Any,
    config: DQARConfig | ReusePlan | ForecastPlan | PlanLadder | None = None,
    prompt_length: int | None = None,
    group: ProcessGroup | None = None,
) -> DQARSession:
    """Attaches DQAR to a diffusers pipeline or transformer; use as context manager, or end with ``remove_dqar``.

    Args:
        pipe: a pipeline with a ``transformer`` that docs/families.md lists, or the transformer; compiled, offloaded and
            wrapped ones too.
            A transformer alone has no scheduler to predict x0 with, so that its SNR is unknown and only
            ``snr_range=None`` opens the gate; it tells the number of steps from the first two timesteps, and reuses
            from the third step on.
        config: what decides: a ``DQARConfig``, or a ``ReusePlan`` with the defaults for all else, about the sites
            inside the model; a ``ForecastPlan`` about the whole model, a ``PlanLadder`` image by image. The deck's
            defaults if left out.
        prompt_length: words of the prompt or label, for slide 5's τ(p). ``None`` takes the caption's tokens (mean over
            the batch) where the model is given a caption with a mask, and else leaves the threshold as it is.
        group: of ``torch.distributed``: ranks that share an image, as in tensor or context parallelism. A gate's
            signals are averaged over it, so that all ranks decide alike; they have to draw the same runs to their ends,
            or wait for the group's timeout. Ranks with images of their own need none, and plans can't diverge.

    Returns:
        The session: its ``trace`` and ``controller`` stay readable after removal.

    Raises:
        ValueError: no attention that DQAR can take over, DQAR is there already, a plan or ``layer_bits`` for another
            model, or no ``config`` at all.
    """
    kinds = (DQARConfig, ReusePlan, ForecastPlan, PlanLadder)
    names = ", ".join(kind.__name__ for kind in kinds)
    check("config", config, config is None or isinstance(config, kinds), f"use a {names} or None; load files first")
    if isinstance(config, ReusePlan):
        config = DQARConfig(plan=config)
    session = DQARSession(pipe, DQARConfig() if config is None else config, prompt_length, group)
    session.attach()
    return session


def remove_dqar(pipe: Any) -> None:
    """Takes DQAR off a pipeline or transformer and frees its cache; does nothing where it isn't applied.

    A pipeline's own session is found even if its transformer was exchanged meanwhile.
    """
    transformer = getattr(pipe, "transformer", pipe)
    for session in list(_SESSIONS):
        if session.pipe is pipe or (session.attached and session.transformer is transformer):
            session.remove()


class Engine(Protocol):
    """One way to save work on a model. The session reports runs, calls and steps to it, and checks outputs for NaN.

    Attributes:
        looks: check outputs for NaN at every step (CPU only).
        saves: whether anything is ever left uncomputed.
        guided: ``False``: it takes runs without guidance only; ``None``: it doesn't tell.
    """

    looks: bool
    saves: bool

    @property
    def guided(self) -> bool | None:
        """See above."""

    @property
    def controller(self) -> DQARController:
        """See ``DQARSession``."""

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """The modules to take over inside the transformer, and who answers their calls."""

    def new_state(self) -> Any:
        """What is kept for one stream of latents, with ``forget``."""

    def begin_run(self, run: Run, latents: torch.Tensor) -> None:
        """Raises ``ValueError`` for a run that it can't follow; ``latents`` ``[B, ...]`` are the first call's."""

    def call(self, compute: Callable[[], Any], run: Run, call: Call, named: dict[str, Any], first: bool) -> Any:
        """The model's output.

        Args:
            compute: the model's call, as it was.
            run, call: which it is; ``first``: of its stream at this step.
            named: the call's arguments, by name.
        """

    def before_step(self, run: Run, stream: Stream, given: Mapping[str, Any]) -> None:
        """Is told what the scheduler is given for a run's only stream, by name: ``model_output`` is the guided
        ``[b, ...]``."""

    def unguided(self, stream: Stream) -> None:
        """Is told at a run's first step that what it took for two branches of a stream is one.

        Raises:
            ValueError: it was made for guidance.
        """

    def clear(self) -> None:
        """Frees all that isn't a stream's."""


class DQARSession:
    """DQAR on one model: what its engine has taken over, and what has to be put back.

    A context manager; entered again after it was left, it attaches again.

    Attributes:
        pipe: the pipeline or transformer it was made for.
        transformer: the module whose calls it takes over, with the wrappers around it; a pipeline's first one.
        config: what decides.
        engine: what does it, and what it has seen.
        trace: what was decided in every run since it was made.
    """

    def __init__(
        self,
        pipe: Any,
        config: DQARConfig | ForecastPlan | PlanLadder,
        prompt_length: int | None,
        group: ProcessGroup | None = None,
    ):
        self.pipe, self.config, self.trace = pipe, config, Trace()
        self._transformers = transformers(pipe)
        self.transformer: torch.nn.Module = self._transformers[0]
        self._model = bare(self.transformer)
        models = [bare(transformer) for transformer in self._transformers]
        self.engine: Engine
        if isinstance(config, PlanLadder):
            self.engine = LadderEngine(models, config, self.trace)
        elif isinstance(config, ForecastPlan):
            self.engine = ForecastEngine(models, config, self.trace)
        else:
            self.engine = ReuseEngine(self.transformer, config, prompt_length, self.trace, group)
        self._argument_names = list(inspect.signature(type(self._model).forward).parameters)[1:]
        self._family = family(self.transformer)
        self._finder = RunFinder(
            self._family,
            null_class(self.transformer),
            lambda: getattr(self.pipe, "scheduler", None),
            self._guides,
            self.engine.new_state,
            self.trace.begin_run,
            self._end_run,
        )
        self._taken: list[torch.nn.Module] = []
        self._warned = False

    def __enter__(self) -> DQARSession:
        if not self.attached:
            self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def attached(self) -> bool:
        """Whether it is on the model."""
        return bool(self._taken)

    @property
    def controller(self) -> DQARController:
        """The controller of the latents that were last given to the model: its cache, its decisions.

        Raises:
            AttributeError: with a ``ForecastPlan``, which decides about no site.
        """
        return self.engine.controller

    def attach(self) -> None:
        """Takes the modules over, all or none.

        Raises:
            ValueError: DQAR is there already, or an attention processor was exchanged meanwhile.
        """
        handlers = [*((transformer, self.forward) for transformer in self._transformers), *self.engine.handlers()]
        if any(handler_of(module) is not None for module, _ in handlers):
            raise ValueError("DQAR is already applied to this transformer: call remove_dqar first")
        for module, handler in handlers:
            take_over(module, handler)
            self._taken.append(module)
        _SESSIONS.add(self)
        WATCH.listen(self, getattr(self.pipe, "scheduler", None))

    def remove(self) -> None:
        """Gives the modules back, and empties the cache."""
        if not self.attached:
            return
        _SESSIONS.discard(self)
        WATCH.leave(self)
        for module in self._taken:
            give_back(module)
        self._taken.clear()
        self._finder.clear()
        self.engine.clear()

    def summary(self) -> dict[str, Any]:
        """What the runs since it was made did, so far as the trace still has them.

        Returns:
            ``runs``, ``steps``, ``sites_computed``, ``sites_reused``, ``sites_shared``, ``reused_share``,
            ``forecast_steps``, and ``peak_cache_bytes``, of the cache of one step; with a ``PlanLadder`` also
            ``plan_of_image``, the computed steps of each image's plan, and the ``promise``.
        """
        sites, outputs = self.trace.to_pandas(), self.trace.to_pandas(MODEL)
        table = outputs if sites.empty else sites
        steps = 0 if table.empty else len(table.drop_duplicates(["run", "step"]))
        counts = {} if sites.empty else sites.decision.value_counts().to_dict()
        reused = int(counts.get("reuse", 0))
        forecast = 0 if outputs.empty else len(outputs.query("decision == 'reuse'").drop_duplicates(["run", "step"]))
        return {
            "runs": self.trace.num_runs,
            "steps": steps,
            "sites_computed": int(counts.get("compute", 0)),
            "sites_reused": reused,
            "sites_shared": int(counts.get("share", 0)),
            "reused_share": reused / max(1, len(sites)),
            "forecast_steps": forecast,
            "peak_cache_bytes": 0 if table.empty else int(table.groupby(["run", "step"]).bytes.sum().max()),
            **(self.engine.summary() if isinstance(self.engine, LadderEngine) else {}),
        }

    # --- the transformer's calls -------------------------------------------------------------------------------------

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answers the transformer's calls: finds run and step, lets the engine answer, and looks at the output.

        Raises:
            ValueError: a model that is compiled as one graph; or whatever the engine can't follow.
        """
        named = dict(zip(self._argument_names, args, strict=False)) | kwargs
        latents = as_batch(named.get(self._family.latents))
        if not isinstance(latents, torch.Tensor) or self._trains(latents, named):
            return original(*args, **kwargs)
        run, call, first = self._finder.find(latents, named.get(self._family.timestep), conditions(named))
        compute = functools.partial(original, *args, **kwargs)
        try:
            if run.count == 1 and first:
                WATCH.look_around(self, run.scheduler)
                self.engine.begin_run(run, latents)
            output = self.engine.call(compute, run, call, named, first)
            self._look_at(as_batch(output[0]), run, call, compute)
        except BaseException as error:
            self._finder.give_up(run)
            if type(error).__module__ == "torch._dynamo.exc":
                raise ValueError(
                    "the model can't be compiled with DQAR inside: compile it without fullgraph=True, or apply a plan "
                    "without readouts"
                ) from error
            raise
        return output

    def _guides(self) -> bool | None:
        """Whether the present run has two branches, as the pipeline says, or an engine that takes no others."""
        told = guides(self.pipe)
        return self.engine.guided if told is None else told

    def _trains(self, latents: torch.Tensor, named: dict[str, Any]) -> bool:
        """Whether gradients are wanted: what is kept would tie one backward pass to the next, so nothing is."""
        if not torch.is_grad_enabled():
            return False
        given = (latents, *conditions(named))
        trains = any(t is not None and t.requires_grad for t in given) or any(
            p.requires_grad for p in self._model.parameters()
        )
        if trains and not self._warned and self.engine.saves:
            self._warned = True
            warnings.warn("gradients are on, so DQAR reuses nothing: draw under torch.no_grad()", stacklevel=5)
        return trains

    def _end_run(self, run: Run) -> None:
        """Frees what was kept for a run that is over."""
        for stream in run.streams:
            stream.state.forget()
        run.streams.clear()
        self.trace.resolve()

    # --- the scheduler -----------------------------------------------------------------------------------------------

    def timesteps_set(self, scheduler: Any) -> None:
        """See ``SchedulerWatch``."""
        self._finder.timesteps_set(scheduler)

    def before_step(self, scheduler: Any, given: Mapping[str, Any]) -> None:
        """See ``SchedulerWatch``: the engine is told what a step is given, if that can be whose it is."""
        run, sample = self._finder.stepping(scheduler), given.get("sample")
        if run is None or len(run.streams) != 1 or not isinstance(given.get("model_output"), torch.Tensor):
            return
        try:
            if isinstance(sample, torch.Tensor) and self._finder.one_branch(run, sample):
                self.engine.unguided(run.streams[0])
            self.engine.before_step(run, run.streams[0], given)
        except BaseException:
            self._finder.give_up(run)
            raise

    def after_step(self, scheduler: Any) -> None:
        """See ``SchedulerWatch``: a run's last step ends it."""
        self._finder.give_up(self._finder.finishing(scheduler))

    # --- NaN and inf -------------------------------------------------------------------------------------------------

    def _look_at(self, output: torch.Tensor, run: Run, call: Call, again: Callable[[], Any]) -> None:
        """Keeps an eye on the output: a run that is no longer finite is stopped, naming step and layer.

        Where a step would have to wait for that, the sum goes on to the run's last step.

        Raises:
            FloatingPointError: NaN or inf.
        """
        total = output.sum(dtype=torch.float32)
        if run.unseen is not None:
            total = run.unseen + total
        at_once = self.engine.looks and total.device.type == "cpu"
        if not (at_once or run.last or run.timesteps is None):
            run.unseen = total
            return
        run.unseen = None
        if math.isfinite(total.item()):
            return
        step = run.index
        if not call.stream.latents.isfinite().all():  # nobody has looked since it began
            if self.engine.looks:
                raise FloatingPointError(f"the latents hold NaN or inf at step {step}, before layer 0")
            raise FloatingPointError(f"NaN or inf before step {step}: a run without the plan tells where it begins")
        raise FloatingPointError(f"the model's output holds NaN or inf at step {step}, {self._first_bad_layer(again)}")

    def _first_bad_layer(self, again: Callable) -> str:
        """Repeats the failed forward pass without DQAR and finds the first block whose output isn't finite."""
        bad: list[int] = []

        def look(layer_id: int) -> Callable:
            def hook(_module: torch.nn.Module, _args: tuple, output: Any) -> None:
                streams = output if isinstance(output, tuple) else (output,)
                if not all(stream.isfinite().all() for stream in streams if stream is not None):
                    bad.append(layer_id)

            return hook

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for layer_id, layer in enumerate(find_layers(self._model)):
                hooks.enter_context(layer.block.register_forward_hook(look(layer_id)))
            again()
        return f"first in layer {bad[0]}" if bad else "after the last layer, or in a reused one"
