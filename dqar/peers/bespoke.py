"""A learned solver: own timesteps, and each next state a learned sum of the noise and all earlier predictions of x0.

Bespoke non-stationary solvers (Shaul et al., ICML 2024, arXiv 2403.01329), written from the paper. They report 45 dB to
the converged solution and an FID of 1.76 at 16 model calls, for class-conditional ImageNet-64. Where this one differs:
it begins as any deterministic solver of diffusers, not as one of their family of scale and time transforms, and the
timesteps are ordered by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from dqar.checks import check

Prediction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The guided noise ``[B, ...]`` in latents ``[B, ...]`` at a timestep ``[]``, of the images numbered ``[B]``."""


BATCH, AT_ONCE = 8, 16
"""Pairs in an iteration, and those that are drawn at once without gradients."""


class BespokeScheduler(SchedulerMixin, ConfigMixin):
    """A solver of a fixed number of steps: ``x_{i+1} = a_i x_T + Σ_{j ≤ i} w_ij x0_j``, with ``x0_j`` predicted at t_j.

    Args:
        alphas_cumprod: ᾱ of every training timestep.
        timesteps: t_0 > t_1 > ..., of any value between 0 and the last training timestep.
        noise_weights: a, one for each step.
        clean_weights: w, ``i + 1`` numbers for step i.

    Raises:
        ValueError: numbers of weights that don't fit the steps.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: Sequence[float],
        timesteps: Sequence[float],
        noise_weights: Sequence[float],
        clean_weights: Sequence[Sequence[float]],
    ):
        lengths = [len(row) for row in clean_weights]
        if len(noise_weights) != len(timesteps) or lengths != list(range(1, len(timesteps) + 1)):
            raise ValueError(
                f"weights of {len(noise_weights)} steps, with {lengths} predictions each, don't fit "
                f"{len(timesteps)} timesteps: step i takes one weight of the noise and i + 1 of predictions"
            )
        self.alphas_cumprod = torch.tensor(alphas_cumprod)
        self.set_timesteps(len(timesteps))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begins a run.

        Raises:
            ValueError: another number of steps than it was made for.
        """
        made_for = len(self.config.timesteps)
        fits = num_inference_steps == made_for
        check("num_inference_steps", num_inference_steps, fits, f"this solver takes {made_for}")
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(self.config.timesteps, dtype=torch.float32, device=device)
        self._noise: torch.Tensor | None = None
        self._clean: list[torch.Tensor] = []

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The model sees the latents ``[B, ...]`` as they are."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor | float, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The next latents ``[B, ...]``, from the noise that the model predicts in ``sample``; the first is x_T."""
        if self._noise is None or len(self._clean) == self.num_inference_steps:
            self._noise, self._clean = sample, []
        i = len(self._clean)
        signal, noise = signal_and_noise(self.alphas_cumprod, self.timesteps[i].cpu())
        self._clean.append((sample - noise.item() * model_output) / signal.item())
        weights = self.config.clean_weights[i]
        latents = self.config.noise_weights[i] * self._noise
        latents = latents + sum(weight * x for weight, x in zip(weights, self._clean, strict=True))
        latents = latents.to(sample.dtype)
        return SchedulerOutput(prev_sample=latents) if return_dict else (latents,)


def signal_and_noise(alphas_cumprod: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """√ᾱ and √(1 − ᾱ), in the timestep's shape: between two training timesteps the log-SNR is interpolated."""
    log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod)).to(timestep.dtype)
    below = timestep.detach().floor().long().clamp(0, len(log_snr) - 2)
    between = log_snr[below] + (timestep - below) * (log_snr[below + 1] - log_snr[below])
    return torch.sigmoid(between).sqrt(), torch.sigmoid(-between).sqrt()


def as_weights(
    scheduler: SchedulerMixin, num_inference_steps: int
) -> tuple[list[float], list[float], list[list[float]]]:
    """Timesteps, noise weights and clean weights of a deterministic solver of diffusers, which steps linearly in both.

    Found by letting it step through unit vectors: the noise is the first, the prediction of step j the (j + 2)th.
    Where diffusers rounds the timestep that belongs to a noise level, this has the level's own.

    Raises:
        ValueError: a solver whose steps aren't that, such as an ancestral one, or one that repeats timesteps.
    """
    solver = type(scheduler).from_config(scheduler.config, prediction_type="sample")
    solver.set_timesteps(num_inference_steps)
    if len(solver.timesteps) != num_inference_steps or solver.init_noise_sigma != 1:
        raise ValueError(
            f"{type(scheduler).__name__} is not accepted: needs one that calls the model once a step, on x_t"
        )
    unit = torch.eye(num_inference_steps + 1, dtype=torch.float64)[:, None, None, None]
    latents, noise_weights, clean_weights = unit[0], [], []
    for i, t in enumerate(solver.timesteps):
        latents = solver.step(unit[i + 1], t, latents).prev_sample
        weights = latents.flatten().tolist()
        noise_weights.append(weights[0])
        clean_weights.append(weights[1 : i + 2])
    timesteps = solver.timesteps.tolist()
    if hasattr(solver, "sigmas"):  # of the variance-exploding form, as all of diffusers' are
        timesteps = _timesteps_of(solver.sigmas[:num_inference_steps], solver.alphas_cumprod)
    return timesteps, noise_weights, clean_weights


def _timesteps_of(sigmas: torch.Tensor, alphas_cumprod: torch.Tensor) -> list[float]:
    """The timesteps whose ``signal_and_noise`` have these ratios of noise to signal."""
    alphas = alphas_cumprod.double().numpy()
    log_sigmas = np.log((1 - alphas) / alphas) / 2
    return np.interp(np.log(sigmas.double().numpy()), log_sigmas, np.arange(len(log_sigmas))).tolist()


class LearnedSolver(nn.Module):
    """A solver while it is learned; ``gaps`` are logarithms of the distances between timesteps, the last to 0.

    Args:
        timesteps: as it begins.
        alphas_cumprod: ᾱ of every training timestep, ``[timesteps]``.
    """

    learning_rate: float
    """Relative to the root mean squared error that it begins with: what is nearly right takes small steps."""

    def __init__(self, timesteps: list[float], alphas_cumprod: torch.Tensor):
        super().__init__()
        times = torch.tensor([*timesteps, 0.0], dtype=torch.float64)
        self.first, self.alphas_cumprod = times[0], alphas_cumprod.double()
        self.gaps = nn.Parameter((times[:-1] - times[1:]).clamp(min=0.5).log())

    def timesteps(self) -> torch.Tensor:
        """``[steps]``, falling, the first as it was."""
        passed = self.gaps.softmax(0).cumsum(0)
        return self.first * torch.cat([torch.ones_like(passed[:1]), 1 - passed[:-1]])

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the noise ``[steps]``, and of the predictions of x0 ``[steps, steps]``, zeros above the diagonal."""
        raise NotImplementedError

    def forward(self, predict: Prediction, noise: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """What becomes of ``noise`` ``[B, ...]``, of the images numbered ``[B]``."""
        latents, clean = noise, list[torch.Tensor]()
        noise_weights, clean_weights = (x.to(noise.dtype) for x in self.weights())
        for i, timestep in enumerate(self.timesteps()):
            signal, sigma = (x.to(noise.dtype) for x in signal_and_noise(self.alphas_cumprod, timestep))
            # Computed anew for gradients: what 25 steps would keep for them takes 20 GB, and longer than computing it.
            predicted = checkpoint(predict, latents, timestep, images, use_reentrant=False)
            clean.append((latents - sigma * predicted) / signal)
            latents = noise_weights[i] * noise
            latents = latents + sum(weight * x for weight, x in zip(clean_weights[i], clean, strict=False))
        return latents

    @torch.no_grad()
    def scheduler(self) -> BespokeScheduler:
        """As it is now."""
        noise_weights, clean_weights = self.weights()
        rows = [row[: i + 1] for i, row in enumerate(clean_weights.tolist())]
        return BespokeScheduler(self.alphas_cumprod.tolist(), self.timesteps().tolist(), noise_weights.tolist(), rows)


class BespokeSolver(LearnedSolver):
    """Learns timesteps and weights.

    The weights are those that keep a constant prediction right at any timesteps, plus what is learned: how much each
    older prediction counts in place of the newest, and corrections of both sums. Learned as they stand, all weights of
    a step would change its noise level together.

    Args:
        start: the solver that it begins as; its ``alphas_cumprod`` are the model's.
        num_inference_steps: model calls.
    """

    learning_rate = 0.04

    def __init__(self, start: SchedulerMixin, num_inference_steps: int):
        timesteps, noise_weights, clean_weights = as_weights(start, num_inference_steps)
        super().__init__(timesteps, start.alphas_cumprod)
        rows = torch.zeros(num_inference_steps, num_inference_steps, dtype=torch.float64)
        for i, row in enumerate(clean_weights):
            rows[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
        noise, clean = self._sums()
        self.older = nn.Parameter(rows.tril(-1))
        self.noise_correction = nn.Parameter(torch.tensor(noise_weights, dtype=torch.float64) - noise.detach())
        self.clean_correction = nn.Parameter(rows.sum(1) - clean.detach())

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each step, the weight of the noise, and the sum of the predictions' weights if all of them agreed."""
        signals, sigmas = signal_and_noise(self.alphas_cumprod, self.timesteps())
        noise = torch.cat([sigmas[1:], sigmas.new_zeros(1)]) / sigmas[0]
        return noise, torch.cat([signals[1:], signals.new_ones(1)]) - noise * signals[0]

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[steps]`` and ``[steps, steps]``, as they were learned."""
        noise, clean = self._sums()
        older = self.older.tril(-1)
        return noise + self.noise_correction, older + torch.diag(clean + self.clean_correction - older.sum(1))


@torch.no_grad()
def best_start(
    predict: Prediction,
    starts: Sequence[SchedulerMixin],
    num_inference_steps: int,
    noise: torch.Tensor,
    target: torch.Tensor,
) -> SchedulerMixin:
    """The one of ``starts`` with the least ``log_error`` on all pairs ``[N, ...]``; the others as for ``learn``."""
    errors = []
    for start in starts:
        solver = BespokeSolver(start, num_inference_steps)
        parts = torch.arange(len(noise)).split(AT_ONCE)
        drawn = torch.cat([solver(predict, noise[images], images) for images in parts])
        errors.append(log_error(drawn, target).item())
    return starts[errors.index(min(errors))]


def learn(
    solver: LearnedSolver,
    predict: Prediction,
    noise: torch.Tensor,
    target: torch.Tensor,
    *,
    iterations: int,
) -> BespokeScheduler:
    """Learns a solver end to end, through all model calls, from pairs of noise and what it should become.

    The loss is the mean logarithm of each image's squared error, as Shaul et al.'s: no image outweighs the others.

    Args:
        solver: as it begins.
        predict: differentiable in latents and timestep.
        noise, target: ``[N, ...]``: x_T, and the converged solution or the reference for it.
        iterations: of Adam on ``BATCH`` pairs each, with a cosine to zero.
    """
    images = torch.arange(min(BATCH, len(noise)))
    with torch.no_grad():
        error = log_error(solver(predict, noise[images], images), target[images]).div(2).exp().item()
    optimizer = torch.optim.Adam(solver.parameters(), lr=error * solver.learning_rate, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    with tqdm(range(iterations), desc=f"solver of {len(solver.gaps)} steps", leave=False) as progress:
        for _ in progress:
            if len(order) < BATCH:
                order = torch.randperm(len(noise), generator=generator).tolist()
            images, order = torch.tensor(order[:BATCH]), order[BATCH:]
            loss = log_error(solver(predict, noise[images], images), target[images])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
            optimizer.step()
            rate.step()
            progress.set_postfix(dB=f"{-10 / math.log(10) * loss.item():.1f}", refresh=False)
    return solver.scheduler()


def log_error(drawn: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean logarithm of each image's mean squared error, of ``[N, ...]``."""
    return (drawn - target).square().flatten(1).mean(1).clamp(min=1e-12).log().mean()
