"""The reuse engine: takes over the sites of a model's blocks, and does at each call what the controller decides."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import distributed

from dqar import stats
from dqar.config import DQARConfig
from dqar.controller import DQARController
from dqar.families import Layer, bare, check_processors, conditions, taken_layers
from dqar.forecast.run import shared_part
from dqar.joint import JOINT_SITES
from dqar.modulations import Modulations
from dqar.run import Call, Run, Stream
from dqar.sites import SITES, CrossAttention, OpenCall, Site
from dqar.takeover import Handler
from dqar.trace import CROSS_ATTENTION, SELF_ATTENTION, Trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ReuseState:
    """What is kept for one stream of latents."""

    def __init__(self, controller: DQARController):
        self.controller = controller
        self.clean: torch.Tensor | None = None
        """x0 as the step before predicted it, ``[b, C, H, W]``."""
        self.prompt_length: float | None = None

    def forget(self) -> None:
        """Drops what is kept: the run is over, or something else is to be drawn from here on."""
        self.controller.reset()
        self.clean = self.prompt_length = None


class ReuseEngine:
    """Computes, reuses or forecasts each site, as a ``DQARConfig`` says. See ``dqar.attention.Engine``.

    Args:
        transformer: with the wrappers around it.
        config: what decides.
        prompt_length: of all prompts, in words; ``None``: from the caption's mask, where there is one.
        trace: to write to.
        group: ranks that decide together, where signals decide; see ``apply_dqar``.

    Raises:
        ValueError: no attention that it can take over, a ``reuse_target`` that isn't for it, a plan or ``layer_bits``
            for another number of layers, or a group that this rank doesn't belong to.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        config: DQARConfig,
        prompt_length: float | None,
        trace: Trace,
        group: ProcessGroup | None = None,
    ):
        self.config, self.trace = config, trace
        self._group = group if config.gates_on_snr or config.gates_on_entropy else None
        if group is not None and distributed.get_rank(group) < 0:
            raise ValueError("this rank is no member of the group: give ranks that share an image their own group")
        self.guided = None
        self.looks, self.saves = config.measures_latents, config.schedule != "none"
        self._prompt_length = prompt_length
        self._layers = taken_layers(transformer)
        self._opened: dict[int, OpenCall] = {}
        """The forward pass that is under way in each thread."""
        self.controller = self.new_state().controller
        """Of the latents that were last given to the model."""
        self._handlers: list[tuple[torch.nn.Module, Handler]] = []
        for layer_id, layer in enumerate(self._layers):
            site = _site_of(layer, config)
            self._handlers += site(self._open_call, layer_id, layer, config).handlers()
            if (cross := layer.cross_attention) is not None:
                self._handlers.append((cross, CrossAttention(self._open_call, layer_id, cross, config).attend))
        trace.paths = {
            SELF_ATTENTION: {i: layer.path for i, layer in enumerate(self._layers)},
            CROSS_ATTENTION: {i: layer.cross_path for i, layer in enumerate(self._layers) if layer.cross_attention},
        }
        blocks = list(dict.fromkeys(layer.block for layer in self._layers))
        keeps = config.cache.modulations and not _compiled(transformer, bare(transformer), blocks)
        self._modulations = Modulations(blocks if keeps else (), lambda: getattr(self._open_call(), "constants", None))
        self._handlers += self._modulations.handlers()

    def _open_call(self) -> OpenCall | None:
        return self._opened.get(threading.get_ident())

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """The modules to take over, and who answers their calls.

        Raises:
            ValueError: an attention processor was exchanged meanwhile.
        """
        check_processors(self._layers)
        return self._handlers

    def new_state(self) -> ReuseState:
        """For one stream."""
        return ReuseState(DQARController(len(self._layers), self.config, self.trace))

    def clear(self) -> None:
        """Frees all that isn't a stream's."""
        self._opened.clear()
        self._modulations.clear()
        self.controller.reset()

    def begin_run(self, run: Run, latents: torch.Tensor) -> None:
        """Refuses what can't be followed, of ``latents`` ``[B, C, ...]``, before the first image.

        Raises:
            ValueError: an exchanged attention processor, a run that the plan wasn't made for, a gate on an SNR that
                the scheduler doesn't tell, or other runs on other ranks of the group.
        """
        if self._group is not None:
            _check_same_run(run, latents, self._group)
        check_processors(self._layers)
        config, scheduler = self.config, type(run.scheduler).__name__
        if config.plan is not None:
            config.plan.check_latents(_size(latents))
            if run.timesteps is not None:
                config.plan.check_run(run.total_steps, scheduler)
        if not config.gates_on_snr or config.probe.snr_source != "predicted" or run.levels is not None:
            return
        if run.timesteps is not None:
            raise ValueError(
                f"{scheduler} tells no noise levels, so that the SNR is unknown: set snr_range=None and no policy, or "
                "use another scheduler"
            )
        warnings.warn(
            "DQAR on a bare transformer knows no SNR, so the gate stays closed: apply it to the pipeline, or set "
            "snr_range=None and no policy",
            stacklevel=5,
        )

    def call(self, compute: Callable[[], Any], run: Run, call: Call, named: dict[str, Any], first: bool) -> Any:
        """The model's output, by sites that are computed or not."""
        state, latents = call.stream.state, named["hidden_states"]
        self.controller = controller = state.controller
        if first:
            self._begin_step(run, call, named)
        branches, thread = tuple(call.slices), threading.get_ident()
        # SD3's skip-layer guidance goes past some layers, which then have no rows.
        idle = not named.get("skip_layers") and controller.record_idle(branches)
        choices = [] if idle else controller.choices(branches)
        constants = self._modulations.open(run, call, latents)
        before = self._opened.get(thread)
        caption = named.get("encoder_hidden_states")
        words = 0 if caption is None else caption.shape[1]
        self._opened[thread] = OpenCall(controller, call, len(latents), run.index, choices, constants, words)
        try:
            output = compute()
        finally:
            if before is None:
                self._opened.pop(thread, None)
            else:
                self._opened[thread] = before
        if constants:
            self._modulations.close(run, call, latents, constants)
        return output

    def _begin_step(self, run: Run, call: Call, named: dict[str, Any]) -> None:
        """Opens the step in the stream's controller, with the numbers that its gate asks for.

        Raises:
            FloatingPointError: NaN or inf in the latents, where somebody looks at them.
        """
        config, stream, levels = self.config, call.stream, run.levels
        state = stream.state
        norm: torch.Tensor | float | None = None
        snr: torch.Tensor | float | None = None
        if config.asks_latents:
            noisy = stream.latents if levels is None else levels.latents(run.index, stream.latents)
            norm = stats.latent_norm(stream.latents).mean()
            latents = noisy if state.clean is None else noisy[shared_part(state.clean, noisy)]
            if state.clean is not None and state.clean.shape == latents.shape:
                snr = stats.snr(state.clean, latents).mean()
            if config.gates_on_snr or config.gates_on_entropy or stream.latents.device.type == "cpu":
                signals = (norm,) if snr is None else (norm, snr)
                norm, *rest = self.trace.resolve(*signals, group=self._group)
                snr = rest[0] if rest else None
                if not math.isfinite(norm):
                    raise FloatingPointError(f"the latents hold NaN or inf at step {run.index}, before layer 0")
        if state.prompt_length is None:
            state.prompt_length = self._length_of_prompt(call, named)
        total_steps = run.total_steps
        if config.plan is not None and run.timesteps is None:
            total_steps = config.plan.num_inference_steps
        state.controller.begin_step(
            run.index,
            total_steps,
            snr=snr,
            prompt_length=state.prompt_length,
            snr_schedule=None if levels is None else levels.snr(run.index),
            latent_norm=norm,
            timestep=run.timestep,
            run=run.number,
            latent_size=_size(stream.latents),
        )

    def _length_of_prompt(self, call: Call, named: dict[str, Any]) -> float | None:
        mask = conditions(named)[2]
        if self._prompt_length is not None or mask is None or mask.ndim != 2:
            return self._prompt_length
        rows = call.slices.get("cond", slice(None))
        return mask[rows].sum(dim=1, dtype=torch.float32).mean().item()

    def unguided(self, stream: Stream) -> None:
        """Drops what the first step kept for two branches: they are images of one."""
        stream.state.forget()

    def before_step(self, run: Run, stream: Stream, given: Mapping[str, Any]) -> None:
        """Notes the x0 that the guided ``model_output`` ``[B, C, H, W]`` tells, and its SNR."""
        prediction = given["model_output"]
        if not self.looks or run.levels is None:
            return
        latents = run.levels.latents(run.index, stream.latents)
        if prediction.ndim != latents.ndim:
            return
        guided = prediction[: len(latents)]  # DiTPipeline denoises both halves
        latents = latents[shared_part(guided, latents)]  # a control image's channels follow
        if guided.shape == latents.shape:
            stream.state.clean = run.levels.clean(run.index, latents, guided)
            stream.state.controller.complete_step(stats.snr(stream.state.clean, latents).mean())


def _check_same_run(run: Run, latents: torch.Tensor, group: ProcessGroup) -> None:
    """Raises ``ValueError`` on every rank if they don't draw alike: later, one would wait for another's step."""
    here = (run.index, None if run.timesteps is None else run.timesteps.values, tuple(latents.shape))
    runs: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(runs, here, group=group)
    if any(other != runs[0] for other in runs):
        drawn = "; ".join(
            f"rank {rank}: {'unknown' if values is None else len(values)} steps from {index} on, latents {list(shape)}"
            for rank, (index, values, shape) in enumerate(runs)
        )
        raise ValueError(f"ranks that decide together have to draw the same run: {drawn}")


def _site_of(layer: Layer, config: DQARConfig) -> type[Site]:
    """The class for a layer and a ``reuse_target``.

    Raises:
        ValueError: a setting that isn't for joint attentions.
    """
    joint = layer.place.processor != AttnProcessor2_0.__name__
    sites, whose = JOINT_SITES if joint else SITES, f"for {layer.path}, a joint attention of image and caption"
    if config.reuse_target not in sites:
        choices = " or ".join(map(repr, sites))
        raise ValueError(f"reuse_target={config.reuse_target!r} is not accepted {whose}: choose {choices}")
    if joint and config.balance:
        raise ValueError(f"balance=True is not accepted {whose}: False")
    return sites[config.reuse_target]


def _size(latents: torch.Tensor) -> str:
    """Height and width, as in ``"32 x 32"``; of packed tokens ``[B, N, C]`` their number, as in ``"4096 packed"``."""
    return f"{latents.shape[1]} packed" if latents.ndim == 3 else " x ".join(map(str, latents.shape[-2:]))


def _compiled(transformer: torch.nn.Module, model: torch.nn.Module, blocks: list[torch.nn.Module]) -> bool:
    """Whether the model, or a block of it, is compiled: each module taken over would break its graph."""
    return model is not transformer or any(
        vars(module).get("_compiled_call_impl") is not None for module in (transformer, *blocks)
    )
