"""Forecasts of the whole model's output from the last computed ones, as a ``ForecastPlan`` weights them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dqar.plan import ForecastPlan


class OutputForecast:
    """The outputs of one run's last computed steps, in the model's own dtype, newest first.

    They have the latents' size, a thousandth of what the sites inside a DiT-XL/2 would take, so they aren't quantized.
    """

    def __init__(self, plan: ForecastPlan):
        self.plan = plan
        self._kernels: list[torch.Tensor] | None = None
        self.forget()

    def forget(self) -> None:
        """Drops everything: a new run begins."""
        self.cond: list[torch.Tensor] = []
        self.uncond: list[torch.Tensor] = []
        self.newest: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes kept, of both branches; the whole newest output counts once."""
        older = sum(output.nbytes for output in (*self.cond[1:], *self.uncond[1:]))
        return older + (0 if self.newest is None else self.newest.nbytes)

    def keep(self, output: torch.Tensor, branches: dict[str, slice], channels: int) -> None:
        """Caches the output ``[B, C, H, W]`` of a computed step; the first ``channels`` predict noise, others don't."""
        self.newest = output
        for branch, history in (("cond", self.cond), ("uncond", self.uncond)):
            if branch in branches:
                history.insert(0, output[branches[branch], :channels])
                del history[self.plan.history :]

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
