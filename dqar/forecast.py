"""Forecasts of the whole model's output from the last computed ones, as a ``ForecastPlan`` weights them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dqar.plan import ForecastPlan


class FinalHiddenStates:
    """Sees what the model's last layer is given, ``[B, tokens, width]``; the computation stays untouched.

    A context manager, or to be ended with ``remove``.

    Raises:
        ValueError: a model whose last layer isn't known.
    """

    def __init__(self, transformer: torch.nn.Module):
        found = (getattr(transformer, name, None) for name in ("proj_out_2", "proj_out"))  # DiT's, PixArt's
        last = next((layer for layer in found if isinstance(layer, torch.nn.Linear)), None)
        if last is None:
            raise ValueError(f"{type(transformer).__name__} has no final linear layer proj_out_2 or proj_out")
        self._newest: torch.Tensor | None = None
        self._handle = last.register_forward_pre_hook(self._see)

    def _see(self, _module: torch.nn.Module, args: tuple) -> None:
        self._newest = args[0]

    def take(self) -> torch.Tensor:
        """Those of the newest forward pass, once."""
        newest, self._newest = self._newest, None
        return newest

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()

    def __enter__(self) -> FinalHiddenStates:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


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
        self._kernels: list[torch.Tensor] | None = None
        self._matrices: torch.Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Drops everything: a new run begins."""
        self.cond: list[torch.Tensor] = []
        self.uncond: list[torch.Tensor] = []
        self.newest: torch.Tensor | None = None
        self.read: dict[int, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes kept, of both branches; the whole newest output counts once."""
        older = sum(output.nbytes for output in (*self.cond[1:], *self.uncond[1:], *self.read.values()))
        return older + (0 if self.newest is None else self.newest.nbytes)

    def keep(self, output: torch.Tensor, branches: dict[str, slice], channels: int) -> None:
        """Caches the output ``[B, C, H, W]`` of a computed step; the first ``channels`` predict noise, others don't."""
        self.newest = output
        for branch, history in (("cond", self.cond), ("uncond", self.uncond)):
            if branch in branches:
                history.insert(0, output[branches[branch], :channels])
                del history[self.plan.history :]

    def read_out(self, step: int, hidden_states: torch.Tensor, branches: dict[str, slice], latents: torch.Size) -> None:
        """Reads what this step and those up to the next computed one add to their forecasts.

        Args:
            hidden_states: ``[B, tokens, width]``, of the computed step.
            latents: ``[b, c, H, W]``, the size of one branch's.

        Raises:
            ValueError: a plan whose readouts are of another size than the model's hidden states and patches.
        """
        coming = range(step, min((c for c in self.plan.computed if c > step), default=len(self.plan.readouts)))
        states = torch.cat([hidden_states[branches[b]] for b in ("cond", "uncond") if b in branches], -1).double()
        size = math.prod(latents[1:]) // states.shape[1]
        if self._matrices is None or self._matrices.device != states.device:
            wanted = states.shape[-1] * size
            rows = [row or (0.0,) * wanted for row in self.plan.readouts]
            if {len(row) for row in rows} != {wanted}:
                raise ValueError(f"the plan's readouts are not accepted: {wanted} numbers a step fit this model")
            matrices = torch.tensor(rows, dtype=torch.float64).view(len(rows), states.shape[-1], size)
            self._matrices = matrices.to(states.device)
        self.read = {later: from_patches(states @ self._matrices[later], latents) for later in coming}

    def output(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """The model's output at ``step``, like the newest computed one ``[B, C, H, W]``, with the noise forecast.

        Both branches get the same, guided forecast, which guidance of any scale then leaves as it is.

        Args:
            latents: ``[b, c, H, W]`` of one branch.
        """
        if not self.plan.weights[step]:
            return self.newest
        cached = torch.stack([*self.cond, *self.uncond, latents], 2).double()
        kernel = self._kernel(step, latents.device)
        forecast = F.conv2d(cached.flatten(0, 1), kernel, padding=self.plan.kernel // 2).view_as(latents)
        if step in self.read:
            forecast = forecast + self.read[step]
        output = self.newest.clone()
        channels = latents.shape[1]
        output[:, :channels] = forecast.to(output.dtype).repeat(len(output) // len(forecast), 1, 1, 1)
        return output

    def _kernel(self, step: int, device: torch.device) -> torch.Tensor:
        """A step's weights ``[1, tensors, kernel, kernel]``; those of all steps go to the device at once.

        In float64: of neighbouring outputs the weights nearly cancel, which TF32 would turn into noise.
        """
        if self._kernels is None or self._kernels[0].device != device:
            rows = self.plan.weights
            numbers = torch.tensor([w for row in rows for w in row], dtype=torch.float64).to(device)
            parts = numbers.split([len(row) for row in rows])
            self._kernels = [part.view(1, -1, self.plan.kernel, self.plan.kernel) for part in parts]
        return self._kernels[step]

    def check_guidance(self, guided: torch.Tensor) -> None:
        """Raises ``ValueError`` if the run's first guided prediction shows another scale than the plan's."""
        if not self.uncond:
            scale = 1.0
        else:
            cond, uncond = self.cond[0].float(), self.uncond[0].float()
            difference = cond - uncond
            guided = guided[: len(cond), : cond.shape[1]].float()  # DiTPipeline denoises both halves
            scale = (((guided - uncond) * difference).sum() / difference.square().sum()).item()
        if abs(scale - self.plan.guidance_scale) > 0.02 * self.plan.guidance_scale:
            raise ValueError(
                f"the plan was made for guidance_scale={self.plan.guidance_scale:g}, this run has {scale:.3g}"
            )
