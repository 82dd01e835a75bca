"""Forecasts of the whole model's output from the last computed ones, as a ``ForecastPlan`` weights them."""

from __future__ import annotations

import torch

from dqar.plan import ForecastPlan


class OutputForecast:
    """The outputs of one run's last computed steps, in the model's own dtype, newest first.

    They have the latents' size, a thousandth of what the sites inside a DiT-XL/2 would take, so they aren't quantized.
    """

    def __init__(self, plan: ForecastPlan):
        self.plan = plan
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
        row = self.plan.weights[step]
        if not row:
            return self.newest
        cached = [*self.cond, *self.uncond, latents]
        forecast = row[-1] * latents.float()
        for weight, tensor in zip(row[:-1], cached, strict=False):
            forecast.add_(tensor, alpha=weight)
        output = self.newest.clone()
        channels = latents.shape[1]
        output[:, :channels] = forecast.to(output.dtype).repeat(len(output) // len(forecast), 1, 1, 1)
        return output

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
