"""The forecast engine: the whole model's output from the last computed ones, as a ``ForecastPlan`` weights them."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dqar.controller import DQARController
from dqar.families import as_batch, as_output, bare, describe_models, family, last_layer
from dqar.forecast.plan import ForecastPlan
from dqar.noise import adds_noise
from dqar.plan import BRANCHES
from dqar.quantizer import QuantizedTensor, quantize
from dqar.run import Call, Run, Stream
from dqar.takeover import Handler
from dqar.trace import MODEL, StepFacts, Trace


class ForecastEngine:
    """Computes the whole model at some steps and forecasts its output at the others. See ``dqar.attention.Engine``.

    A step is counted from where the plan's runs begin, in the trace too.

    Args:
        models: the diffusers transformers that denoise in turn, without wrappers; nearly always one.
        plan: which steps are computed, and how the others are forecast.
        trace: to write to.

    Raises:
        ValueError: a plan for another model, or readouts for a model whose last layer isn't known.
    """

    looks, saves = False, True

    def __init__(self, models: Sequence[torch.nn.Module], plan: ForecastPlan, trace: Trace):
        plan.check_model(describe_models(models))
        self.model, self.plan, self.trace, self._models = models[0], plan, trace, models
        self._family = family(self.model)
        self._seen = FinalHiddenStates(models) if any(plan.readouts) else None

    @property
    def controller(self) -> DQARController:
        """There is none: raises ``AttributeError``."""
        raise AttributeError("a ForecastPlan decides about no site, so that there is no controller: read the trace")

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """The modules to take over, and who answers their calls."""
        return [] if self._seen is None else [(layer, self._seen.see) for layer in self._seen.layers]

    def new_state(self) -> OutputForecast:
        """For one stream."""
        return OutputForecast(self.plan, self._family.channels)

    def clear(self) -> None:
        """Nothing is kept but the streams' own."""

    def begin_run(self, run: Run, latents: torch.Tensor) -> None:
        """Raises ``ValueError`` for a run, or latents ``[B, ...]``, that the plan wasn't made for."""
        if run.timesteps is None:
            raise ValueError(
                "a ForecastPlan needs the timesteps: apply it to the pipeline, not to its transformer, and call "
                "scheduler.set_timesteps in a loop of your own"
            )
        late = self._late(run)
        if self.plan.scheduler is not None and adds_noise(run.scheduler):
            raise ValueError(
                f"{type(run.scheduler).__name__} adds noise at each step, the plan was fitted under "
                f"{self.plan.scheduler}: use that, or another deterministic sampler"
            )
        self.plan.check_run(run.timesteps.values[late:])
        if run.index < late:
            raise ValueError(
                f"the plan was made for runs that begin at timestep {self.plan.timesteps[0]:g}, this one begins at "
                f"{run.timestep:g}: make one for this strength"
            )

    def call(self, compute: Callable[[], Any], run: Run, call: Call, named: dict[str, Any], first: bool) -> Any:
        """The model's output, computed and corrected, or forecast, as the plan says.

        Raises:
            ValueError: what a forecast draws on wasn't computed, as in a run that began late.
        """
        plan, step = self.plan, run.index - self._late(run)
        forecast: OutputForecast = call.stream.state
        latents, branches = as_batch(named[self._family.latents]), tuple(call.slices)
        self._check_model(compute, step)
        fresh = step in plan.computed
        if step == min(plan.computed):
            plan.check_embedded_guidance(named.get("guidance"))
        if not forecast.rows and ((classes := call.stream.classes) is not None or step):
            forecast.know(classes, latents.device)
        if fresh:
            output = compute()
            call.output = as_batch(output[0])
            forecast.keep(step, call.output, call.slices, latents)
            if step == min(plan.computed):
                size = getattr(self.model.config, "sample_size", None)
                plan.check_latents(forecast.outputs[branches[0]][0].shape[1:], size)
            if self._seen is not None:
                forecast.read_out(step, self._seen.take(), call.slices)
        newest = call.output
        if newest is None or not (fresh or forecast.usable(step, branches)):
            raise ValueError(
                f"at step {step} the plan draws on what steps {plan.drawn_on(step)} computed, which isn't there: the "
                "run began late, or changed what it draws; make a plan for such runs, or one that computes step "
                f"{step}"
            )
        self._record(run, step, branches, fresh, forecast.nbytes(newest) // len(branches))
        if fresh and plan.history_bits < 16:  # its shape is still needed, its numbers are kept in fewer bits
            call.output = newest.new_zeros(()).expand(newest.shape)
        if fresh and not (plan.weights[step] and forecast.usable(step, branches)):
            return output
        sample = forecast.output(step, latents, newest, call.slices)
        return as_output(sample, self._family, named.get("return_dict", True))

    def _check_model(self, compute: Callable[[], Any], step: int) -> None:
        """Raises ``ValueError`` for a step that another of two transformers makes than the plan was made for."""
        second = self.plan.second
        if second is None:
            return
        assert isinstance(compute, functools.partial)
        called: Any = compute.func  # bound to the transformer
        if (bare(called.__self__) is self._models[-1]) != (step >= second[0]):
            raise ValueError(
                f"the plan was made for a second transformer from step {second[0]} on, here another one makes step "
                f"{step}: make one for this boundary_ratio"
            )

    def _record(self, run: Run, step: int, branches: Sequence[str], fresh: bool, nbytes: int) -> None:
        """Traces whether a call was computed or forecast, and the bytes kept for each of its branches."""
        snr = None if run.levels is None else run.levels.snr(run.index)
        facts = StepFacts(run.number, step, run.total_steps - self._late(run), run.timestep, snr_schedule=snr)
        rows = self.trace.open(MODEL, facts)
        for branch in branches:
            rows.add(-1, branch, "compute" if fresh else "reuse", "plan", nbytes)

    def unguided(self, stream: Stream) -> None:
        """Raises ``ValueError`` for a plan that was made for guidance."""
        self.plan.check_guidance(1.0, 0.0, step=0)

    @property
    def guided(self) -> bool | None:
        """``False`` for a plan that was made without guidance."""
        return None if self.plan.guided else False

    def before_step(self, run: Run, stream: Stream, given: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` for a run of another guidance scale, as the guided ``model_output`` ``[b, ...]`` tells.

        And for a step that adds noise, as DDIM's does with ``eta``, if the plan was fitted without. The scale is waited
        for at the first step, so that no run is drawn in vain, also of a second transformer, and at the last one for
        all others.
        """
        forecast: OutputForecast = stream.state
        step, second = run.index - self._late(run), self.plan.second
        if (eta := given.get("eta")) and self.plan.scheduler is not None:
            raise ValueError(
                f"eta={eta} is not accepted: the plan was fitted without noise at each step, so leave it 0"
            )
        scale = forecast.guidance(step, given["model_output"])
        if scale is not None:
            forecast.scales.append((step, scale))
        if forecast.scales and (run.count == 1 or run.last or (second is not None and step == second[0])):
            steps, scales = zip(*forecast.scales, strict=True)
            forecast.scales = []
            for step, (value, noise) in zip(steps, torch.stack(scales).tolist(), strict=True):
                self.plan.check_guidance(value, noise, step)

    def _late(self, run: Run) -> int:
        return 0 if run.timesteps is None else self.plan.late(run.timesteps.values)


class FinalHiddenStates:
    """Sees what the models' last layers are given, ``[B, tokens, width]``; the computation stays untouched.

    A context manager, by hooks of PyTorch's own; or ``see`` answers the layers' calls.

    Raises:
        ValueError: a model whose last layer isn't known.
    """

    def __init__(self, models: Sequence[torch.nn.Module]):
        self.layers = [last_layer(model) for model in models]
        self._newest: dict[int, torch.Tensor] = {}  # by thread

    def see(self, original: Callable[..., Any], hidden_states: torch.Tensor) -> torch.Tensor:
        """Answers a last layer's calls, as it would, on ``[B, tokens, width]``."""
        self._newest[threading.get_ident()] = hidden_states
        return original(hidden_states)

    def take(self) -> torch.Tensor:
        """Those ``[B, tokens, width]`` of this thread's newest forward pass, once."""
        return self._newest.pop(threading.get_ident())

    def __enter__(self) -> FinalHiddenStates:
        self._handles = [
            layer.register_forward_pre_hook(lambda _module, args: self._newest.update({threading.get_ident(): args[0]}))
            for layer in self.layers
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()


def shared_part(output: torch.Tensor, latents: torch.Tensor) -> tuple[slice, ...]:
    """The part of an output ``[B, ...]`` that says where the latents ``[B, ...]`` go, as an index of both.

    Learned variances follow the noise in more channels; the latents' own channels and tokens come before those of
    masks, images and references that are given with them.

    Raises:
        ValueError: an output of another layout than the latents.
    """
    if output.ndim != latents.ndim or output.ndim < 3:
        raise ValueError(
            f"the model makes {tuple(output.shape)} of latents {tuple(latents.shape)}: a ForecastPlan needs an output "
            "of its input's layout"
        )
    return (slice(None), *(slice(min(sides)) for sides in zip(output.shape[1:], latents.shape[1:], strict=True)))


def channels_first(x: torch.Tensor, channels: int) -> torch.Tensor:
    """``[B, ..., C, ...]`` as ``[B, C, ...grid]``; ``channels`` is the axis of C. Packed tokens: ``[B, C, tokens]``."""
    return x.movedim(2 if x.ndim == 3 else channels, 1)


def channels_back(x: torch.Tensor, channels: int) -> torch.Tensor:
    """What ``channels_first`` moved to ``[B, C, ...]``, as it was."""
    return x.movedim(1, 2 if x.ndim == 3 else channels)


def patch_sides(grid: Sequence[int], tokens: int) -> tuple[int, ...] | None:
    """The sides of each token's patch of a grid ``([frames,] height, width)``, or of packed tokens ``(tokens,)``.

    A patch is square; what then remains is its frames. ``None``: tokens that don't tile the grid.
    """
    size, rest = divmod(math.prod(grid), tokens)
    if rest or len(grid) == 1:
        return None if rest or size != 1 else (1,)
    for side in range(math.isqrt(size), 0, -1):
        frames = size // side**2
        sides = (side, side) if len(grid) == 2 else (frames, side, side)
        if size == math.prod(sides) and not any(whole % part for whole, part in zip(grid, sides, strict=True)):
            return sides
    return None


def _tiling(grid: Sequence[int], tokens: int) -> tuple[int, ...]:
    sides = patch_sides(grid, tokens)
    if sides is None:
        raise ValueError(f"{tokens} tokens don't tile latents of {tuple(grid)}: make a plan without readouts")
    return sides


def to_patches(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """``[B, C, ...grid]`` as ``[B, tokens, size]``: each token's patch, its places in order, and their channels."""
    grid, sides = x.shape[2:], _tiling(x.shape[2:], tokens)
    split = [number for whole, side in zip(grid, sides, strict=True) for number in (whole // side, side)]
    axes = len(grid)
    order = (0, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 1)
    return x.reshape(*x.shape[:2], *split).permute(order).reshape(len(x), tokens, -1)


def from_patches(patches: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What ``to_patches`` made of a tensor of this shape, put together again."""
    grid, sides = shape[2:], _tiling(shape[2:], patches.shape[1])
    axes = len(grid)
    parts = patches.view(len(patches), *(g // s for g, s in zip(grid, sides, strict=True)), *sides, shape[1])
    order = (0, 1 + 2 * axes, *(axis for pair in range(1, 1 + axes) for axis in (pair, pair + axes)))
    return parts.permute(order).reshape(shape)


def weighted_sum(tensors: Sequence[torch.Tensor], kernels: torch.Tensor) -> torch.Tensor:
    """The sum of ``[B, C, ...grid]`` tensors, each convolved by its kernel ``[tensors, ...sides]``, zeros beyond edges.

    In the kernels' dtype. Kernels without sides are one number each.
    """
    if kernels.ndim == 1:
        return sum(x.to(kernels.dtype) * kernel for x, kernel in zip(tensors, kernels, strict=True))
    stacked = torch.stack(list(tensors), 2).to(kernels.dtype).flatten(0, 1)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[kernels.ndim - 2]
    padding = tuple(side // 2 for side in kernels.shape[1:])
    return convolve(stacked, kernels[None], padding=padding).view_as(tensors[0])


def stored(x: torch.Tensor, bits: int) -> QuantizedTensor:
    """``[B, C, ...grid]`` in 8 or 4 bits, by slide 6's formula, with a scale for each image and channel.

    NaN and inf aren't looked for, which would make a GPU wait: a run's last step does.
    """
    return quantize(x, bits, batch_dims=2, scale_dtype=torch.float16, check_finite=False)


class OutputForecast:
    """The outputs of one run's last computed steps, in the plan's ``history_bits``, newest first.

    They have the latents' size, a thousandth of what the sites inside a DiT-XL/2 would take. Hidden states aren't kept:
    what all steps up to the next computed one read from them is read at once, and kept in the same bits. A computed
    step's own output is corrected before it is quantized. With a quantized history, what is beyond the latents' part of
    an output, as learned variances, is 0 at forecast steps.

    Args:
        plan: whose forecasts these are.
        channels: the axis of the latents' channels.
    """

    def __init__(self, plan: ForecastPlan, channels: int = 1):
        self.plan, self.channels = plan, channels
        self._kernels: dict[int | None, list[torch.Tensor]] = {}
        self._matrices: dict[int | None, list[torch.Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """Drops everything: a new run begins."""
        self.outputs: dict[str, list[Any]] = {branch: [] for branch in BRANCHES}
        """``[b, ...]``, or quantized, with the channels first."""
        self.steps: dict[str, list[int]] = {branch: [] for branch in BRANCHES}
        self.read: dict[str, dict[int, Any]] = {branch: {} for branch in BRANCHES}
        self._returned: dict[str, tuple[int, torch.Tensor]] = {}
        self.scales: list[tuple[int, torch.Tensor]] = []
        """By step, guidance scales that nobody has looked at yet, and how far rounding may have moved each, ``[2]``."""
        self.rows: dict[int | None, torch.Tensor] = {} if self.plan.classes else {None: torch.empty(0)}
        """A branch's rows of each class, ``[n]``; of one alone they aren't looked at. Empty: see ``know``."""
        self._unread: list[tuple[int, torch.Tensor, dict[str, slice]]] = []

    def know(self, classes: Sequence[int] | None, device: torch.device) -> None:
        """Takes each image's class, of which those that the plan doesn't know are one: ``None``, as all are without.

        Until then no hidden states are read: the unconditional branch, if it comes first, doesn't tell the class.
        """
        labels = [label if label in self.plan.classes else None for label in classes or (None,)]
        self.rows = {
            label: torch.tensor([row for row, other in enumerate(labels) if other == label], device=device)
            for label in dict.fromkeys(labels)
        }
        self._places = torch.cat(list(self.rows.values())).argsort()
        unread, self._unread = self._unread, []
        for arguments in unread:
            self.read_out(*arguments)

    def _by_class(self, make: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """``make(class, *rows)`` of each class's rows of tensors ``[b, ...]``, put together as they were."""
        if len(self.rows) == 1:
            return make(*self.rows, *tensors)
        made = [make(label, *(x[rows] for x in tensors)) for label, rows in self.rows.items()]
        return torch.cat(made)[self._places]

    def nbytes(self, newest: torch.Tensor) -> int:
        """Bytes kept, of both branches; all of ``newest`` ``[B, ...]`` counts once, unless it is kept in fewer bits."""
        whole = self.plan.history_bits == 16
        outputs = [output for outputs in self.outputs.values() for output in outputs[whole:]]
        read = [tensor for by_step in self.read.values() for tensor in by_step.values()]
        return sum(tensor.nbytes for tensor in (*outputs, *read)) + whole * newest.nbytes

    def keep(self, step: int, output: torch.Tensor, rows: dict[str, slice], latents: torch.Tensor) -> None:
        """Keeps the output ``[B, ...]`` of a computed step, so much of it as is about the ``latents`` ``[B, ...]``."""
        output = output[shared_part(output, latents)]
        for branch, part in rows.items():
            outputs, steps = self.outputs[branch], self.steps[branch]
            outputs.insert(0, output[part])
            if self.plan.history_bits < 16:
                outputs[0] = stored(channels_first(output[part], self.channels), self.plan.history_bits)
            steps.insert(0, step)
            del outputs[self.plan.history :], steps[self.plan.history :]
            self._returned[branch] = step, output[part]

    def usable(self, step: int, branches: Sequence[str]) -> bool:
        """Whether all that the plan's weights of this step draw on is there, and from the steps that it expects."""
        expected = self.plan.drawn_on(step)
        if any(b not in self.plan.branches or self.steps[b][: len(expected)] != expected for b in branches):
            return False
        return not self.plan.readouts[step] or all(step in self.read[branch] for branch in branches)

    def read_out(self, step: int, hidden_states: torch.Tensor, rows: dict[str, slice]) -> None:
        """Reads what this step and those up to the next computed one add to their forecasts, after ``keep``.

        Args:
            hidden_states: ``[B, tokens, width]``, or frame by frame ``[B * frames, tokens, width]``, of the computed
                step.
            rows: the branches' rows of the batch.

        Raises:
            ValueError: a plan whose readouts are of another size than the model's hidden states and patches.
        """
        if not self.rows:
            self._unread.append((step, hidden_states, rows))
            return
        coming = range(step, min((c for c in self.plan.computed if c > step), default=len(self.plan.readouts)))
        batch, device = sum(part.stop - part.start for part in rows.values()), hidden_states.device
        states = hidden_states.reshape(batch, -1, hidden_states.shape[-1]).to(_widest(device))
        shape = self._kept(self.outputs[next(iter(rows))][0]).shape
        size, bits = math.prod(shape[1:]) // states.shape[1], self.plan.history_bits

        def read(label: int | None, own: torch.Tensor) -> torch.Tensor:
            return own @ self._matrix(later, branch, label, size, own)

        for branch, part in rows.items():
            if branch in self.plan.branches:
                self.read[branch] = {}
                for later in coming:
                    x = from_patches(self._by_class(read, states[part]), shape)
                    self.read[branch][later] = stored(x, bits) if bits < 16 else x

    def output(self, step: int, latents: torch.Tensor, newest: torch.Tensor, rows: dict[str, slice]) -> torch.Tensor:
        """The model's output at ``step``: the ``newest`` computed one ``[B, ...]``, with the latents' part forecast.

        Args:
            latents: ``[B, ...]``, as the model is given them.
            rows: the branches' rows of the batch.
        """
        output, part = newest.clone(), shared_part(newest, latents)
        for branch, place in rows.items():
            drawn_on = self.outputs[branch][: len(self.plan.drawn_on(step))]
            if step in self.plan.computed:
                drawn_on = [newest[part][place], *drawn_on[1:]]
            parts = [self._kept(x) for x in (*drawn_on, latents[part][place])]
            forecast = self._by_class(
                lambda label, *own, branch=branch: weighted_sum(own, self._kernel(step, branch, latents.device, label)),
                *parts,
            )
            if step in self.read[branch]:
                read = self.read[branch][step]
                forecast = forecast + (read.dequantize() if isinstance(read, QuantizedTensor) else read)
            forecast = channels_back(forecast, self.channels).to(output.dtype)
            output[part][place] = forecast
            self._returned[branch] = step, forecast
        return output

    def _kept(self, x: torch.Tensor | QuantizedTensor) -> torch.Tensor:
        """An output, or what was stored of it, ``[b, C, ...grid]``."""
        return x.dequantize() if isinstance(x, QuantizedTensor) else channels_first(x, self.channels)

    def guidance(self, step: int, guided: torch.Tensor) -> torch.Tensor | None:
        """The guidance scale that made ``guided`` of the step's outputs, and how far rounding may have moved it.

        Both on the device, ``[2]`` float32; ``None``: can't tell.

        Raises:
            ValueError: a plan without guidance, and two branches.
        """
        returned = {branch: output for branch, (made, output) in self._returned.items() if made == step}
        if "cond" not in returned:
            return None
        if "uncond" not in returned:
            if len(guided) < len(returned["cond"]):
                raise ValueError("the plan was made without guidance, this run has two branches: make one for it")
            return torch.tensor([1.0, 0.0], device=guided.device)
        uncond, cond = (returned[branch].float() for branch in ("uncond", "cond"))
        if guided.ndim != cond.ndim:
            return None
        guided = guided[: len(cond)][shared_part(guided, cond)].float()  # DiTPipeline denoises both halves
        if guided.shape != cond.shape:
            return None
        eps = torch.finfo(returned["cond"].dtype).eps
        scale = torch.where(
            keeps_lengths(guided, cond), bent_scale(guided, cond, uncond), mixture(guided, cond, uncond)[0]
        )
        difference, size = cond - uncond, math.sqrt(guided.numel())
        return torch.stack([scale, 16 * eps * (guided.norm() + uncond.norm()) / difference.norm() / size])

    def _kernel(self, step: int, branch: str, device: torch.device, label: int | None) -> torch.Tensor:
        """A step's weights of a branch ``[tensors, ...sides]``; those of a class's steps go to the device at once.

        In float64 where the device has it: of neighbouring outputs the weights nearly cancel, which TF32 would turn
        into noise.
        """
        branches, rows = self.plan.branches, self.plan.weights
        if label not in self._kernels or self._kernels[label][0].device != device:
            numbers = torch.tensor([w for row in rows for w in row], dtype=_widest(device))
            if label is not None:
                numbers += numbers.new_tensor([w for row in self.plan.classes[label][0] for w in row])
            parts = numbers.to(device).split([len(row) for row in rows])
            tensors = [len(row) // len(branches) // math.prod(self.plan.kernel) for row in rows]
            self._kernels[label] = [
                part.view(len(branches), number, *self.plan.kernel) for part, number in zip(parts, tensors, strict=True)
            ]
        return self._kernels[label][step][branches.index(branch)]

    def _matrix(self, step: int, branch: str, label: int | None, size: int, states: torch.Tensor) -> torch.Tensor:
        """A step's readout of a branch ``[width, size]``, for ``states`` ``[b, tokens, width]``; kept alike."""
        branches, width = self.plan.branches, states.shape[-1]
        if label not in self._matrices or self._matrices[label][0].device != states.device:
            count, numbers = len(branches) * width * size, torch.zeros(())
            for rows in (self.plan.readouts, *([] if label is None else [self.plan.classes[label][1]])):
                given = [row or (0.0,) * count for row in rows]
                if {len(row) for row in given} != {count}:
                    raise ValueError(
                        f"the plan's readouts are not accepted: {count} numbers a step fit this model; make a plan for "
                        "it"
                    )
                numbers = numbers + torch.tensor(given, dtype=states.dtype)
            matrices = numbers.view(len(numbers), len(branches), width, size).to(states.device)
            self._matrices[label] = list(matrices.unbind())
        return self._matrices[label][step][branches.index(branch)]


def mixture(
    guided: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How ``guided`` is made of both branches' outputs: ``a * cond + b * uncond``, by least squares.

    Returns:
        The guidance scale ``a / (a + b)``, ``a`` and ``b``, scalars on the device. Pipelines that negate the model's
        output have ``a + b = -1``.
    """
    dtype = _widest(guided.device)
    guided, difference, uncond = (x.flatten().to(dtype) for x in (guided, cond - uncond, uncond))
    dd, du, uu = difference @ difference, difference @ uncond, uncond @ uncond
    gd, gu = guided @ difference, guided @ uncond
    determinant = dd * uu - du.square()
    ahead, total = (gd * uu - gu * du) / determinant, (gu * dd - gd * du) / determinant
    return (ahead / total).float(), ahead, total - ahead


def keeps_lengths(guided: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Whether each row of ``guided``, along the last axis, is as long as ``cond``'s: Qwen-Image and Lumina 2 do that.

    A scalar bool on the device; within bfloat16's rounding.
    """
    lengths, expected = guided.float().norm(dim=-1), cond.float().norm(dim=-1)
    return ((lengths - expected).abs() <= 1e-2 * expected).all()


def bent_scale(guided: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """The guidance scale, a scalar on the device, where each row of ``guided`` was scaled: told from directions alone.

    By least squares of what ``uncond + scale * (cond - uncond)`` has across the direction of ``guided``.
    """
    along, uncond, ahead = (x.to(_widest(x.device)) for x in (guided, uncond, cond - uncond))
    along = along / along.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    uncond, ahead = (x - (x * along).sum(-1, keepdim=True) * along for x in (uncond, ahead))
    return (-(uncond * ahead).sum() / (ahead * ahead).sum()).float()


def _widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have none, as Apple's."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32
