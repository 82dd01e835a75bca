"""Signal and noise levels of each step's latents, and the clean latents that the model predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

STOCHASTIC = (
    "DDPM", "Ancestral", "SDE", "Sde", "LCM", "TCD", "SCM", "Consistency", "Stochastic", "SASolver", "UnCLIP",
    "RePaint", "CogVideoXDPM",
)  # fmt: skip
"""In the names of diffusers' schedulers that add noise at each step, whatever they are configured to."""


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler adds fresh noise at each step, as its class or its configuration says."""
    config = getattr(scheduler, "config", {})
    return (
        any(part in type(scheduler).__name__ for part in STOCHASTIC)
        or str(config.get("algorithm_type")).startswith("sde")
        or bool(config.get("stochastic_sampling"))
    )


@dataclass(frozen=True)
class NoiseLevels:
    """The noise schedule of one run: ``x_t = signal · x0 + noise · ε`` at each step.

    Attributes:
        signal, noise: one number a step.
        prediction: what the model predicts: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or
            ``"flow_prediction"`` (``ε − x0``); EDM models, whose scheduler preconditions them, ``"edm"``.
        sigma_data: standard deviation of the data that EDM's preconditioning assumes.
    """

    signal: tuple[float, ...]
    noise: tuple[float, ...]
    prediction: str
    sigma_data: float = 0.5

    def snr(self, step: int) -> float:
        """SNR of the schedule at a step, ``(signal / noise)²``."""
        return (self.signal[step] / self.noise[step]) ** 2 if self.noise[step] else math.inf

    def latents(self, step: int, model_input: torch.Tensor) -> torch.Tensor:
        """``x_t`` ``[B, ...]`` from the model's input, which EDM schedulers scale to unit variance."""
        if self.prediction != "edm":
            return model_input
        return model_input * math.sqrt(self.noise[step] ** 2 + self.sigma_data**2)

    def clean(self, step: int, latents: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
        """x0 as the guided ``model_output`` predicts it in ``latents``, both ``[B, ...]``."""
        signal, noise = self.signal[step], self.noise[step]
        if self.prediction == "epsilon":
            return (latents - noise * model_output) / signal
        if self.prediction == "v_prediction":
            return signal * latents - noise * model_output
        if self.prediction == "flow_prediction":
            return latents - noise * model_output
        if self.prediction == "edm":  # Karras et al. 2022, table 1
            variance = noise**2 + self.sigma_data**2
            output = model_output * noise * self.sigma_data / math.sqrt(variance)
            return self.sigma_data**2 / variance * latents + output
        return model_output


def noise_levels(scheduler: Any, timesteps: list[float]) -> NoiseLevels | None:
    """The levels of a scheduler's current timesteps; ``None`` for an unknown kind of scheduler.

    For variance-preserving schedulers ᾱ comes from the scheduler's sigmas if there is one for each timestep, else from
    its table at the integer timesteps. So it is for variance-exploding schedulers (Euler, Heun, KDPM2 …), whose
    ``scale_model_input`` makes the model's input variance-preserving. Flow matching has ``x_t = (1 − σ) x0 + σ ε``,
    EDM ``x_t = x0 + σ ε``.
    """
    config = getattr(scheduler, "config", {})
    name, prediction = type(scheduler).__name__, config.get("prediction_type", "epsilon")
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = sigmas.tolist() if isinstance(sigmas, torch.Tensor) and len(sigmas) - len(timesteps) in (0, 1) else None
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas") or prediction == "flow_prediction"
    if flow or name.startswith("EDM"):
        if sigmas is None:
            return None
        noise = tuple(sigmas[: len(timesteps)])
        if flow:
            return NoiseLevels(tuple(1 - sigma for sigma in noise), noise, "flow_prediction")
        if prediction != "epsilon":
            return None
        return NoiseLevels((1.0,) * len(noise), noise, "edm", config.get("sigma_data", 0.5))
    if prediction not in ("epsilon", "v_prediction", "sample"):
        return None
    table = getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None:
        alpha_bars = [1 / (1 + sigma**2) for sigma in sigmas[: len(timesteps)]]
    elif isinstance(table, torch.Tensor) and all(0 <= t < len(table) for t in timesteps):
        alpha_bars = table[torch.tensor(timesteps).long()].tolist()
    else:
        return None
    return NoiseLevels(tuple(map(math.sqrt, alpha_bars)), tuple(math.sqrt(1 - a) for a in alpha_bars), prediction)
