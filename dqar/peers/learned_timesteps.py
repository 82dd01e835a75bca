"""Learned timesteps: those of DPM-Solver++ 2M, by gradients through all model calls.

LD3 (Tong et al. 2025, ICLR, arXiv 2405.15506), written from the paper. They report an FID of 2.38 for CIFAR-10 at 10
model calls, after minutes of training. Where this one differs: the target is each noise's own image, as that is what is
compared, where theirs may be that of a noise nearby; the loss is squared error, not LPIPS; and the model is given the
solver's own timesteps, theirs may be learned apart.
"""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler

from dqar.peers.bespoke import LearnedSolver, as_weights, signal_and_noise


class TimestepsSolver(LearnedSolver):
    """Learns the timesteps, with the weights that DPM-Solver++ 2M has at them.

    Args:
        start: DPM-Solver++ 2M at the spacing that it begins with; its ``alphas_cumprod`` are the model's.
        num_inference_steps: model calls.

    Raises:
        ValueError: another solver.
    """

    learning_rate = 1.0

    def __init__(self, start: DPMSolverMultistepScheduler, num_inference_steps: int):
        config = start.config
        if config.algorithm_type != "dpmsolver++" or config.solver_order != 2 or config.final_sigmas_type != "zero":
            raise ValueError(
                f"algorithm_type={config.algorithm_type!r}, solver_order={config.solver_order}, "
                f"final_sigmas_type={config.final_sigmas_type!r} is not accepted: needs 'dpmsolver++', 2 and 'zero'"
            )
        super().__init__(as_weights(start, num_inference_steps)[0], start.alphas_cumprod)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """DPM-Solver++'s at these timesteps, ``[steps]`` and ``[steps, steps]``."""
        return dpm_solver_weights(self.alphas_cumprod, self.timesteps())


def dpm_solver_weights(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2) as weights of the noise and of predictions of x0.

    The first step is of first order, and the last ends in the last prediction, as diffusers does it.

    Args:
        alphas_cumprod: ᾱ of every training timestep.
        timesteps: ``[steps]``, falling.

    Returns:
        ``[steps]`` and ``[steps, steps]``, zeros above the diagonal, differentiable in ``timesteps``.
    """
    steps = len(timesteps)
    signals, sigmas = zip(*(signal_and_noise(alphas_cumprod, t) for t in timesteps), strict=True)
    log_snr = [torch.log(signal / sigma) for signal, sigma in zip(signals, sigmas, strict=True)]
    unit = torch.eye(steps + 1, dtype=timesteps.dtype)  # x_T, then the predictions
    latents, rows = unit[0], []
    for i in range(steps - 1):
        step = log_snr[i + 1] - log_snr[i]
        clean = unit[i + 1]
        if i:
            slope = step / (log_snr[i] - log_snr[i - 1]) / 2
            clean = clean + slope * (clean - unit[i])
        latents = sigmas[i + 1] / sigmas[i] * latents - signals[i + 1] * torch.expm1(-step) * clean
        rows.append(latents)
    rows.append(unit[steps])
    weights = torch.stack(rows)
    return weights[:, 0], weights[:, 1:]
