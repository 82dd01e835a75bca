"""The forecast engine: the whole model's output from the last computed ones, as a ``ForecastPlan`` weights them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dqar.controller import DQARController
from dqar.families import describe_model, last_layer
from dqar.forecast.plan import ForecastPlan
from dqar.plan import BRANCHES
from dqar.run import Call, Run, Stream
from dqar.takeover import Handler
from dqar.trace import MODEL, StepFacts, Trace


class ForecastEngine:
    """Computes the whole model at some steps and forecasts its output at the others. See ``dqar.attention.Engine``.

    Args:
        model: the diffusers transformer, without wrappers.
        plan: which steps are computed, and how the others are forecast.
        trace: to write to.

    Raises:
        ValueError: a plan for another model, or readouts for a model whose last layer isn't known.
    """

    looks, saves = False, True

    def __init__(self, model: torch.nn.Module, plan: ForecastPlan, trace: Trace):
        plan.check_model(describe_model(model))
        self.model, self.plan, self.trace = model, plan, trace
        self._seen = FinalHiddenStates(model) if any(plan.readouts) else None

    @property
    def controller(self) -> DQARController:
        """There is none: raises ``AttributeError``."""
        raise AttributeError("a ForecastPlan decides about no site, so that there is no controller: read the trace")

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """The modules to take over, and who answers their calls."""
        return [] if self._seen is None else [(self._seen.layer, self._seen.see)]

    def new_state(self) -> OutputForecast:
        """For one stream."""
        return OutputForecast(self.plan)

    def clear(self) -> None:
        """Nothing is kept but the streams' own."""

    def begin_run(self, run: Run, latents: torch.Tensor) -> None:
        """Raises ``ValueError`` for a run that the plan wasn't made for."""
        if run.timesteps is None:
            raise ValueError(
                "a ForecastPlan needs the timesteps: apply it to the pipeline, not to its transformer, and call "
                "scheduler.set_timesteps in a loop of your own"
            )
        self.plan.check_run(run.timesteps.values, type(run.scheduler).__name__)
        self.plan.check_latents(latents.shape[1:], getattr(self.model.config, "sample_size", None))

    def call(self, compute: Callable[[], Any], run: Run, call: Call, named: dict[str, Any], first: bool) -> Any:
        """The model's output, computed and corrected, or forecast, as the plan says.

        Raises:
            ValueError: what a forecast draws on wasn't computed, as in a run that began late.
        """
        plan, step, latents = self.plan, run.index, named["hidden_states"]
        forecast: OutputForecast = call.stream.state
        rows = next(iter(call.slices.values()))
        fresh = step in plan.computed
        if fresh:
            output = compute()
            call.output = output[0]
            forecast.keep(step, output[0], call.slices, latents.shape[1])
            if self._seen is not None:
                forecast.read_out(step, self._seen.take(), call.slices, latents[rows].shape)
        if call.output is None or not (fresh or forecast.usable(step)):
            raise ValueError(
                f"at step {step} the plan draws on what steps {plan.drawn_on(step)} computed, which isn't there: the "
                "run began late, or changed what it draws; make a plan for such runs, or one that computes step "
                f"{step}"
            )
        self._record(run, call, fresh, forecast.nbytes(call.output) // len(call.slices))
        if fresh and not (plan.weights[step] and forecast.usable(step)):
            return output
        if fresh and plan.guided and len(call.slices) == 1:
            raise ValueError(
                f"the plan corrects what is computed at step {step}, for which it needs both branches of guidance in "
                "one call, and this pipeline makes two: give it a plan without such weights"
            )
        sample = forecast.output(step, latents[rows], call.output, tuple(call.slices))
        return Transformer2DModelOutput(sample=sample) if named.get("return_dict", True) else (sample,)

    def _record(self, run: Run, call: Call, fresh: bool, nbytes: int) -> None:
        """Traces whether a call was computed or forecast, and the bytes kept for each of its branches."""
        snr = None if run.levels is None else run.levels.snr(run.index)
        facts = StepFacts(run.number, run.index, run.total_steps, run.timestep, snr_schedule=snr)
        rows = self.trace.open(MODEL, facts)
        for branch in call.slices:
            rows.add(-1, branch, "compute" if fresh else "reuse", "plan", nbytes)

    def before_step(self, run: Run, stream: Stream, prediction: torch.Tensor) -> None:
        """Raises ``ValueError`` for a run of another guidance scale, as the guided ``prediction`` tells.

        Waited for at the first step, so that no run is drawn in vain, and at the last one for all others.
        """
        forecast: OutputForecast = stream.state
        scale = forecast.guidance(run.index, prediction)
        if scale is not None:
            forecast.scales.append(scale)
        if forecast.scales and (run.index == 0 or run.last):
            scales, forecast.scales = torch.stack(forecast.scales).tolist(), []
            for value, noise in scales:
                self.plan.check_guidance(value, noise)


class FinalHiddenStates:
    """Sees what the model's last layer is given, ``[B, tokens, width]``; the computation stays untouched.

    A context manager, by a hook of PyTorch's own; or ``see`` answers the layer's calls.

    Raises:
        ValueError: a model whose last layer isn't known.
    """

    def __init__(self, transformer: torch.nn.Module):
        self.layer = last_layer(transformer)
        self._newest: dict[int, torch.Tensor] = {}  # by thread

    def see(self, original: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
        """Answers the last layer's calls, as it would."""
        self._newest[threading.get_ident()] = hidden_states
        return original(hidden_states)

    def take(self) -> torch.Tensor:
        """Those of this thread's newest forward pass, once."""
        return self._newest.pop(threading.get_ident())

    def __enter__(self) -> FinalHiddenStates:
        self._handle = self.layer.register_forward_pre_hook(
            lambda _module, args: self._newest.update({threading.get_ident(): args[0]})
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()


def to_patches(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[B, C, H, W]`` as ``[B, tokens, size]``: each token's square patch, its rows, columns and channels."""
    batch, channels, height, width = x.shape
    side = math.isqrt(height * width // tokens)
    parts = x.view(batch, channels, height // side, side, width // side, side)
    return parts.permute(0, 2, 4, 3, 5, 1).reshape(batch, tokens, side * side * channels)


def from_patches(patches: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What ``to_patches`` made of a tensor of this shape, put together again."""
    batch, channels, height, width = shape
    side = math.isqrt(height * width // patches.shape[1])
    parts = patches.view(batch, height // side, width // side, side, side, channels)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(shape)


class OutputForecast:
    """The outputs of one run's last computed steps, in the model's own dtype, newest first.

    They have the latents' size, a thousandth of what the sites inside a DiT-XL/2 would take, so they aren't quantized.
    Hidden states aren't kept: what all steps up to the next computed one read from them is read at once.
    """

    def __init__(self, plan: ForecastPlan):
        self.plan = plan
        self._branches = BRANCHES if plan.guided else BRANCHES[:1]
        self._kernels: list[torch.Tensor] = []
        self._matrices: list[torch.Tensor] = []
        self.forget()

    def forget(self) -> None:
        """Drops everything: a new run begins."""
        self.outputs: dict[str, list[torch.Tensor]] = {branch: [] for branch in BRANCHES}
        self.steps: dict[str, list[int]] = {branch: [] for branch in BRANCHES}
        self.read: dict[int, torch.Tensor] = {}
        self.scales: list[torch.Tensor] = []
        """Guidance scales that nobody has looked at yet, and how far rounding may have moved each, ``[2]``."""
        self._states: dict[str, torch.Tensor] = {}
        self._returned: tuple[torch.Tensor, torch.Tensor] | None = None

    def nbytes(self, newest: torch.Tensor) -> int:
        """Bytes kept, of both branches; the whole ``newest`` output counts once."""
        older = [output for outputs in self.outputs.values() for output in outputs[1:]]
        return sum(tensor.nbytes for tensor in (*older, *self.read.values())) + newest.nbytes

    def keep(self, step: int, output: torch.Tensor, rows: dict[str, slice], channels: int) -> None:
        """Keeps the output ``[B, C, H, W]`` of a computed step; the first ``channels`` predict noise, others don't."""
        for branch, part in rows.items():
            outputs, steps = self.outputs[branch], self.steps[branch]
            outputs.insert(0, output[part, :channels])
            steps.insert(0, step)
            del outputs[self.plan.history :], steps[self.plan.history :]

    def usable(self, step: int) -> bool:
        """Whether all that the plan's weights of this step draw on is there, and from the steps that it expects."""
        expected = self.plan.drawn_on(step)
        if any(self.steps[branch][: len(expected)] != expected for branch in self._branches):
            return False
        return not self.plan.readouts[step] or step in self.read

    def read_out(self, step: int, hidden_states: torch.Tensor, rows: dict[str, slice], latents: torch.Size) -> None:
        """Reads what this step and those up to the next computed one add to their forecasts.

        Args:
            hidden_states: ``[B, tokens, width]``, of the computed step.
            rows: the branches' rows of them; what is in several calls is read when it is complete.
            latents: ``[b, c, H, W]``, the size of one branch's.

        Raises:
            ValueError: a plan whose readouts are of another size than the model's hidden states and patches.
        """
        self._states |= {branch: hidden_states[part] for branch, part in rows.items()}
        if any(branch not in self._states for branch in self._branches):
            return
        coming = range(step, min((c for c in self.plan.computed if c > step), default=len(self.plan.readouts)))
        states = torch.cat([self._states.pop(branch) for branch in self._branches], -1)
        states = states.to(_widest(states.device))
        size = math.prod(latents[1:]) // states.shape[1]
        if not self._matrices or self._matrices[0].device != states.device:
            numbers = states.shape[-1] * size
            given = [row or (0.0,) * numbers for row in self.plan.readouts]
            if {len(row) for row in given} != {numbers}:
                raise ValueError(
                    f"the plan's readouts are not accepted: {numbers} numbers a step fit this model; make a plan for it"
                )
            matrices = torch.tensor(given, dtype=states.dtype).view(len(given), states.shape[-1], size)
            self._matrices = list(matrices.to(states.device))
        self.read = {later: from_patches(states @ self._matrices[later], latents) for later in coming}

    def output(self, step: int, latents: torch.Tensor, newest: torch.Tensor, branches: tuple[str, ...]) -> torch.Tensor:
        """The model's output at ``step``, like the ``newest`` computed one ``[B, C, H, W]``, with the noise forecast.

        The branches differ as they last did, so that guidance by the plan's scale makes the forecast of them, and any
        other scale shows.

        Args:
            latents: ``[b, c, H, W]`` of one branch.
            branches: of the call, as its batch stacks them.
        """
        kernel = self._kernel(step, latents.device)
        drawn_on = len(self.plan.drawn_on(step))
        outputs = [output for branch in self._branches for output in self.outputs[branch][:drawn_on]]
        cached = torch.stack([*outputs, latents], 2).to(kernel.dtype)
        forecast = F.conv2d(cached.flatten(0, 1), kernel, padding=self.plan.kernel // 2).view_as(latents)
        if step in self.read:
            forecast = forecast + self.read[step]
        parts = {"cond": forecast}
        if self.plan.guided:
            difference = (self.outputs["cond"][0] - self.outputs["uncond"][0]).to(forecast.dtype)
            uncond = forecast - self.plan.guidance_scale * difference
            parts = {"cond": uncond + difference, "uncond": uncond}
        output, channels = newest.clone(), latents.shape[1]
        output[:, :channels] = torch.cat([parts[branch] for branch in branches]).to(output.dtype)
        if self.plan.guided:
            self._returned = parts["uncond"].to(output.dtype), parts["cond"].to(output.dtype)
        return output

    def guidance(self, step: int, guided: torch.Tensor) -> torch.Tensor | None:
        """The guidance scale that made ``guided`` of the step's outputs, and how far rounding may have moved it.

        Both on the device, ``[2]`` float32; ``None``: can't tell.
        """
        returned, self._returned = self._returned, None
        if returned is None and self.steps["cond"][:1] == [step]:
            if self.steps["uncond"][:1] != [step]:
                return torch.tensor([1.0, 0.0], device=guided.device)
            returned = self.outputs["uncond"][0], self.outputs["cond"][0]
        if returned is None:
            return None
        eps = torch.finfo(guided.dtype).eps
        uncond, cond = (part.float() for part in returned)
        guided = guided[: len(cond), : cond.shape[1]].float()  # DiTPipeline denoises both halves
        difference, size = cond - uncond, math.sqrt(guided.numel())
        scale = ((guided - uncond) * difference).sum() / difference.square().sum()
        return torch.stack([scale, 16 * eps * (guided.norm() + uncond.norm()) / difference.norm() / size])

    def _kernel(self, step: int, device: torch.device) -> torch.Tensor:
        """A step's weights ``[1, tensors, kernel, kernel]``; those of all steps go to the device at once.

        In float64 where the device has it: of neighbouring outputs the weights nearly cancel, which TF32 would turn
        into noise.
        """
        if not self._kernels or self._kernels[0].device != device:
            rows = self.plan.weights
            numbers = torch.tensor([w for row in rows for w in row], dtype=_widest(device)).to(device)
            parts = numbers.split([len(row) for row in rows])
            self._kernels = [part.view(1, -1, self.plan.kernel, self.plan.kernel) for part in parts]
        return self._kernels[step]


def _widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have none, as Apple's."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32
