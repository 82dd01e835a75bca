"""DQAR on a diffusers transformer: takes over what it decides about, and nothing else.

Nothing of the model is edited: modules are taken over as ``dqar.takeover`` says, attention processors stay where they
are, and schedulers are watched without being touched.
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dqar import stats
from dqar.config import DQARConfig
from dqar.controller import DQARController
from dqar.families import (
    bare,
    check_processor,
    conditions,
    describe_model,
    family,
    null_class,
    self_attentions,
)
from dqar.forecast.plan import ForecastPlan
from dqar.forecast.run import FinalHiddenStates, OutputForecast
from dqar.modulations import Modulations
from dqar.plan import ReusePlan
from dqar.run import Call, Run, RunFinder, Stream
from dqar.sites import SITES, CrossAttention, OpenCall
from dqar.takeover import WATCH, Handler, give_back, handler_of, take_over
from dqar.trace import Trace

_SESSIONS: weakref.WeakSet[DQARSession] = weakref.WeakSet()


def apply_dqar(
    pipe: Any, config: DQARConfig | ReusePlan | ForecastPlan | None = None, prompt_length: int | None = None
) -> DQARSession:
    """Attaches DQAR to a diffusers pipeline or transformer; use as context manager, or end with ``remove_dqar``.

    Args:
        pipe: a pipeline with a DiT-like ``transformer``, or the transformer; compiled, offloaded and wrapped ones too.
            A transformer alone has no scheduler to predict x0 with, so that its SNR is unknown and only
            ``snr_range=None`` opens the gate; it tells the number of steps from the first two timesteps, and reuses
            from the third step on.
        config: what decides; a plan alone is one with the defaults for all else. The deck's defaults if left out.
        prompt_length: words of the prompt or label, for slide 5's τ(p). ``None`` takes the caption's tokens (mean over
            the batch) where the model is given a caption with a mask, and else leaves the threshold as it is.

    Returns:
        The session: its ``trace`` and ``controller`` stay readable after removal.

    Raises:
        ValueError: no self-attention that DQAR can take over, DQAR is there already, or a plan for another model.
    """
    if isinstance(config, ReusePlan):
        config = DQARConfig(plan=config)
    session = DQARSession(pipe, config or DQARConfig(), prompt_length)
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


class StreamState:
    """What a session keeps for one stream of latents: reuse of its sites, and forecasts of its outputs."""

    def __init__(self, num_layers: int, config: DQARConfig, trace: Trace, plan: ForecastPlan | None, channels: int = 1):
        self.controller = DQARController(num_layers, config, trace)
        self.forecast = None if plan is None else OutputForecast(plan, channels)
        # Of the step before, still on the device until somebody asks.
        self.clean: torch.Tensor | None = None

    def forget(self) -> None:
        """Drops what is kept: the run is over, or something else is to be drawn from here on."""
        self.controller.reset()
        self.clean = None
        if self.forecast is not None:
            self.forecast.forget()


class DQARSession:
    """DQAR on one model: trace and controller, and what has to be put back.

    A context manager; entered again after it was left, it attaches again.

    Attributes:
        pipe: the pipeline or transformer it was made for.
        transformer: the module whose calls it takes over, with the wrappers around it.
        config: what decides.
        trace: one row per site of every run since it was made.
    """

    def __init__(self, pipe: Any, config: DQARConfig | ForecastPlan, prompt_length: int | None):
        self._plan = config if isinstance(config, ForecastPlan) else None
        if isinstance(config, ForecastPlan):
            config = DQARConfig(plan=ReusePlan((), 1, config.num_inference_steps))
        self.pipe, self.config, self.trace = pipe, config, Trace()
        self.transformer: torch.nn.Module = getattr(pipe, "transformer", pipe)
        self.attached = False
        self._model = bare(self.transformer)
        self._prompt_length = prompt_length
        self._layers = self_attentions(self.transformer) if self._plan is None else []
        self._num_layers = len(self._layers) or 1
        if self._plan is not None:
            self._plan.check_model(describe_model(self._model))
        self._argument_names = list(inspect.signature(type(self._model).forward).parameters)[1:]
        self._opened: dict[int, OpenCall] = {}
        """The forward pass that is under way in each thread."""
        self._state = StreamState(self._num_layers, config, self.trace, self._plan)
        self._finder = RunFinder(
            family(self.transformer),
            null_class(self.transformer),
            lambda: getattr(self.pipe, "scheduler", None),
            lambda: StreamState(self._num_layers, config, self.trace, self._plan, family(self._model).channels),
            self.trace.begin_run,
            self._end_run,
        )
        self._warned = False
        self._sums: dict[int, torch.Tensor] = {}
        """By run, the sum of all outputs that nobody has looked at yet."""
        self._guidance: dict[int, list[torch.Tensor]] = {}
        """By run, the guidance scales that nobody has looked at yet, and how far rounding may have moved each."""
        self._hidden_states = (
            FinalHiddenStates(self._model) if self._plan is not None and any(self._plan.readouts) else None
        )
        blocks = [] if self._plan is not None else list(self._model.transformer_blocks)
        opened = lambda: self._opened.get(threading.get_ident())  # noqa: E731
        self._modulations: Modulations | None = None
        self._handlers: list[tuple[torch.nn.Module, Handler]] = [(self.transformer, self.forward)]
        for layer_id, block in enumerate(blocks):
            self._handlers += SITES[config.reuse_target](opened, layer_id, block, config).handlers()
            cross = getattr(block, "attn2", None)
            if isinstance(cross, Attention) and type(cross.processor) is AttnProcessor2_0:
                self._handlers.append((cross, CrossAttention(opened, layer_id, cross, config).attend))
        if config.cache.modulations and blocks and not _compiled(self.transformer, blocks):
            self._modulations = Modulations(blocks, lambda: getattr(opened(), "constants", None))
            self._handlers += self._modulations.handlers()
        if self._hidden_states is not None:
            self._handlers.append((self._hidden_states.layer, self._hidden_states.see))

    def __enter__(self) -> DQARSession:
        if not self.attached:
            self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def controller(self) -> DQARController:
        """The controller of the latents that were last given to the model: its cache, its decisions."""
        return self._state.controller

    def attach(self) -> None:
        """Takes the modules over, all or none.

        Raises:
            ValueError: DQAR is there already, or an attention processor was exchanged meanwhile.
        """
        for layer_id, layer in enumerate(self._layers):
            check_processor(layer, layer_id)
        if any(handler_of(module) is not None for module, _ in self._handlers):
            raise ValueError("DQAR is already applied to this transformer: call remove_dqar first")
        for module, handler in self._handlers:
            take_over(module, handler)
        self.attached = True
        _SESSIONS.add(self)
        WATCH.listen(self, getattr(self.pipe, "scheduler", None))

    def remove(self) -> None:
        """Gives the modules back, and empties the cache."""
        if not self.attached:
            return
        self.attached = False
        _SESSIONS.discard(self)
        WATCH.leave(self)
        for module, _ in self._handlers:
            give_back(module)
        self._finder.clear()
        self._opened.clear()
        self._state.controller.reset()
        if self._modulations is not None:
            self._modulations.clear()

    def summary(self) -> dict[str, Any]:
        """What the runs since it was made did, so far as the trace still has them.

        Returns:
            ``runs``, ``steps``, ``sites_computed``, ``sites_reused``, ``sites_shared``, ``reused_share``,
            ``forecast_steps``, and ``peak_cache_bytes``, of the cache of one step.
        """
        sites, outputs = self.trace.to_pandas(), self.trace.to_pandas("model")
        table = outputs if self._plan is not None else sites
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
        }

    # --- the transformer's calls -------------------------------------------------------------------------------------

    def forward(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Answers the transformer's calls: opens the step, lets the sites decide or forecasts, and closes it."""
        named = dict(zip(self._argument_names, args, strict=False)) | kwargs
        latents = named.get("hidden_states")
        if not isinstance(latents, torch.Tensor) or self._trains(latents, named):
            return original(*args, **kwargs)
        thread = threading.get_ident()
        condition = conditions(named)
        run, call, first = self._finder.find(latents, named.get("timestep"), condition)
        try:
            if run.count == 1 and first:
                self._begin_run(run)
            self._state = call.stream.state
            if first:
                self._begin_step(run, call, latents, condition)
            if self._plan is not None:
                output = self._forecast(original, args, kwargs, run, call, named)
            else:
                output = self._compute(original, args, kwargs, run, call, latents, condition)
            self._look_at(output, run, call, lambda: original(*args, **kwargs))
        except BaseException:
            self._opened.pop(thread, None)
            self._finder.give_up(run)
            raise
        return output

    def _trains(self, latents: torch.Tensor, named: dict[str, Any]) -> bool:
        """Whether gradients are wanted: what is kept would tie one backward pass to the next, so nothing is."""
        if not torch.is_grad_enabled():
            return False
        given = (latents, *conditions(named))
        trains = any(t is not None and t.requires_grad for t in given) or any(
            p.requires_grad for p in self._model.parameters()
        )
        if trains and not self._warned and self.config.schedule != "none":
            self._warned = True
            warnings.warn("gradients are on, so DQAR reuses nothing: draw under torch.no_grad()", stacklevel=4)
        return trains

    def _compute(
        self,
        original: Callable,
        args: tuple,
        kwargs: dict,
        run: Run,
        call: Call,
        latents: torch.Tensor,
        condition: tuple,
    ) -> Any:
        thread, controller = threading.get_ident(), call.stream.state.controller
        branches = tuple(call.slices)
        choices = [] if controller.record_idle(branches) else controller.choices(branches)
        opened = OpenCall(controller, call, len(latents), run.index, choices)
        labels = None
        if self._modulations is not None and condition[0] is not None:
            labels = call.labels(condition[0])
            opened.constants = self._modulations.open(run.number, run.timestep, labels, latents)
        before = self._opened.get(thread)
        self._opened[thread] = opened
        try:
            output = original(*args, **kwargs)
        finally:
            if before is None:
                self._opened.pop(thread, None)
            else:
                self._opened[thread] = before
        if opened.constants is not None:
            self._modulations.close(run.timestep, labels, latents, opened.constants)
        return output

    def _forecast(
        self, original: Callable, args: tuple, kwargs: dict, run: Run, call: Call, named: dict[str, Any]
    ) -> Any:
        """The model's output, computed and corrected, or forecast, as the plan says.

        Raises:
            ValueError: what a forecast draws on wasn't computed, as in a run that began late.
        """
        plan, state, step = self._plan, call.stream.state, run.index - self._plan.late(run.timesteps.values)
        forecast, latents, branches = state.forecast, named["hidden_states"], tuple(call.slices)
        fresh, drawn_on = step in plan.computed, plan.drawn_on(step)
        if fresh:
            output = original(*args, **kwargs)
            call.output = output[0]
            forecast.keep(step, output[0], call.slices, latents)
            if step == min(plan.computed):
                sample_size = getattr(self._model.config, "sample_size", None)
                plan.check_latents(forecast.outputs[branches[0]][0].shape[1:], sample_size)
            if self._hidden_states is not None:
                forecast.read_out(step, self._hidden_states.take(), call.slices)
        elif call.output is None or not forecast.usable(step, branches):
            raise ValueError(
                f"at step {step} the plan draws on what steps {drawn_on} computed, which isn't there: the run began "
                f"late, or changed what it draws; make a plan for such runs, or one that computes step {step}"
            )
        for branch in branches:
            state.controller.record_output(branch, fresh, forecast.nbytes(call.output) // len(branches))
        if fresh and not (plan.weights[step] and forecast.usable(step, branches)):
            return output
        sample = forecast.output(step, latents, call.output, call.slices)
        return Transformer2DModelOutput(sample=sample) if named.get("return_dict", True) else (sample,)

    # --- runs and steps ----------------------------------------------------------------------------------------------

    def _begin_run(self, run: Run) -> None:
        """Refuses what can't be followed, before the first image."""
        for layer_id, layer in enumerate(self._layers):
            check_processor(layer, layer_id)
        scheduler = None if run.timesteps is None else run.timesteps.scheduler
        WATCH.look_around(self, scheduler)
        plan = self.config.plan
        if self._plan is not None:
            if run.timesteps is None:
                own = getattr(self.pipe, "scheduler", None)
                where = "to the pipeline, not to its transformer" if own is None else "and call scheduler.set_timesteps"
                raise ValueError(f"a ForecastPlan needs the timesteps: apply it {where}")
            late = self._plan.late(run.timesteps.values)
            self._plan.check_run(run.timesteps.values[late:], type(scheduler).__name__)
            if run.index < late:
                raise ValueError(
                    f"the plan was made for runs that begin at timestep {self._plan.timesteps[0]:g}, this one begins "
                    f"at {run.timestep:g}: make one for this strength"
                )
        elif plan is not None and run.timesteps is not None:
            plan.check_run(len(run.timesteps.values), type(scheduler).__name__)
        asks = self.config.gates_on_snr and self.config.probe.snr_source == "predicted"
        if asks and (run.timesteps is None or run.timesteps.levels is None):
            if run.timesteps is not None:
                raise ValueError(
                    f"{type(scheduler).__name__} tells no noise levels, so that the SNR is unknown: set "
                    "snr_range=None and no policy, or use another scheduler"
                )
            warnings.warn(
                "DQAR on a bare transformer knows no SNR, so the gate stays closed: apply it to the pipeline, "
                "or set snr_range=None and no policy",
                stacklevel=4,
            )

    def _begin_step(self, run: Run, call: Call, latents: torch.Tensor, condition: tuple) -> None:
        """Opens the step in the stream's controller, with the numbers that its gate asks for."""
        config, stream = self.config, call.stream
        state = stream.state
        levels = None if run.timesteps is None else run.timesteps.levels
        norm = snr = None
        if config.asks_latents:
            noisy = stream.latents if levels is None else levels.latents(run.index, stream.latents)
            norm = stats.latent_norm(stream.latents).mean()
            if state.clean is not None and state.clean.shape == noisy.shape:
                snr = stats.snr(state.clean, noisy).mean()
            if (
                config.gates_on_snr or config.gates_on_entropy or latents.device.type == "cpu"
            ):  # which waits for nothing
                norm, *values = self.trace.resolve(norm, *(() if snr is None else (snr,)))
                snr = values[0] if values else None
                if not math.isfinite(norm):
                    raise FloatingPointError(f"the latents hold NaN or inf at step {run.index}, before layer 0")
        if stream.prompt_length is None:
            stream.prompt_length = self._length_of_prompt(call, condition[2])
        step, total_steps = run.index, run.total_steps
        if self._plan is not None:
            late = self._plan.late(run.timesteps.values)
            step, total_steps = step - late, total_steps - late
        elif run.timesteps is None and config.plan is not None:
            total_steps = config.plan.num_inference_steps
        state.controller.begin_step(
            step,
            total_steps,
            snr=snr,
            prompt_length=stream.prompt_length,
            snr_schedule=None if levels is None else levels.snr(run.index),
            latent_norm=norm,
            timestep=run.timestep,
            run=run.number,
        )

    def _length_of_prompt(self, call: Call, mask: torch.Tensor | None) -> float | None:
        if self._prompt_length is not None or mask is None or mask.ndim != 2:
            return self._prompt_length
        rows = call.slices.get("cond", slice(None))
        return mask[rows].sum(dim=1, dtype=torch.float32).mean().item()

    def _end_run(self, run: Run) -> None:
        """Frees what was kept for a run that is over."""
        for stream in run.streams:
            stream.state.forget()
        run.streams.clear()
        self.trace.resolve()
        self._sums.pop(run.number, None)
        self._guidance.pop(run.number, None)

    # --- the scheduler -----------------------------------------------------------------------------------------------

    def timesteps_set(self, scheduler: Any) -> None:
        """See ``SchedulerWatch``."""
        self._finder.timesteps_set(scheduler)

    def before_step(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        """Notes what the guided prediction tells: the guidance scale, x0 and its SNR."""
        run = self._finder.stepping(scheduler)
        if run is None or len(run.streams) != 1 or not isinstance(model_output, torch.Tensor):
            return
        [stream] = run.streams
        if self._plan is not None:
            self._check_guidance(run, stream, model_output)
        levels = run.timesteps.levels
        if not self.config.measures_latents or levels is None or stream.latents is None:
            return
        latents = levels.latents(run.index, stream.latents)
        guided = model_output[: len(latents)]  # DiTPipeline denoises both halves
        if guided.shape == latents.shape:
            stream.state.clean = levels.clean(run.index, latents, guided)
            stream.state.controller.complete_step(stats.snr(stream.state.clean, latents).mean())

    def after_step(self, scheduler: Any) -> None:
        """See ``SchedulerWatch``: a run's last step ends it."""
        run = self._finder.finishing(scheduler)
        if run is None:
            return
        try:
            self._check_scales(run)
        finally:
            self._finder.give_up(run)

    def _check_guidance(self, run: Run, stream: Stream, guided: torch.Tensor) -> None:
        scale = stream.state.forecast.guidance(run.index - self._plan.late(run.timesteps.values), guided)
        if scale is None:
            return
        self._guidance.setdefault(run.number, []).append(scale)
        if run.count == 1:  # waited for, so that a run isn't drawn in vain; the others only at its end
            self._check_scales(run)

    def _check_scales(self, run: Run) -> None:
        scales = self._guidance.pop(run.number, None)
        if scales:
            for scale, noise in torch.stack(scales).tolist():
                self._plan.check_guidance(scale, noise)

    # --- NaN and inf -------------------------------------------------------------------------------------------------

    def _look_at(self, output: Any, run: Run, call: Call, again: Callable) -> None:
        """Keeps an eye on the output: a run that is no longer finite is stopped, naming step and layer.

        Where a step would have to wait for that, the sum goes on to the run's last step.
        """
        total, before = output[0].sum(dtype=torch.float32), self._sums.pop(run.number, None)
        total = total if before is None else before + total
        at_once = total.device.type == "cpu" and self.config.measures_latents
        if not (at_once or run.last or run.timesteps is None):
            self._sums[run.number] = total
            return
        if math.isfinite(total.item()):
            return
        step = run.index
        if not call.stream.latents.isfinite().all():  # nobody has looked since it began
            if self.config.plan is None:
                raise FloatingPointError(f"the latents hold NaN or inf at step {step}, before layer 0")
            raise FloatingPointError(f"NaN or inf before step {step}: a run without the plan tells where it begins")
        raise FloatingPointError(f"the model's output holds NaN or inf at step {step}, {self._first_bad_layer(again)}")

    def _first_bad_layer(self, again: Callable) -> str:
        """Repeats the failed forward pass without DQAR and finds the first block whose output isn't finite."""
        bad: list[int] = []

        def look(layer_id: int) -> Callable:
            def hook(_module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> None:
                if not output.isfinite().all():
                    bad.append(layer_id)

            return hook

        blocks = getattr(self._model, "transformer_blocks", ())
        handles = [block.register_forward_hook(look(i)) for i, block in enumerate(blocks)]
        try:
            with torch.no_grad():
                again()
        finally:
            for handle in handles:
                handle.remove()
        return f"first in layer {bad[0]}" if bad else "after the last layer, or in a reused one"


def _compiled(transformer: torch.nn.Module, blocks: list[torch.nn.Module]) -> bool:
    """Whether the model, or a block of it, is compiled: each module taken over would break its graph."""
    wrapped = bare(transformer) is not transformer
    return wrapped or any(vars(m).get("_compiled_call_impl") is not None for m in (transformer, *blocks))
