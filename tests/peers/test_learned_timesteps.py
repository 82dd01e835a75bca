import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from peers.test_bespoke import ALPHAS, drawn, predict, solution

from dqar.peers.bespoke import as_weights, learn
from dqar.peers.learned_timesteps import TimestepsSolver, dpm_solver_weights

SPACINGS = {
    "even timesteps": DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    "even log-SNR": DPMSolverMultistepScheduler(use_exponential_sigmas=True),
    "Karras": DPMSolverMultistepScheduler(use_karras_sigmas=True),
}


@pytest.mark.parametrize("name", SPACINGS)
def test_the_weights_are_those_that_diffusers_steps_with(name):
    timesteps, noise, clean = as_weights(SPACINGS[name], 9)
    ours = dpm_solver_weights(ALPHAS, torch.tensor(timesteps, dtype=torch.float64))
    assert torch.allclose(ours[0], torch.tensor(noise, dtype=torch.float64), atol=1e-4)
    for i, row in enumerate(clean):
        assert torch.allclose(ours[1][i, : i + 1], torch.tensor(row, dtype=torch.float64), atol=1e-4)
        assert (ours[1][i, i + 1 :] == 0).all()


def test_learning_brings_it_nearer_to_the_exact_solution_on_noise_it_has_not_seen():
    noise = torch.randn(96, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solver = TimestepsSolver(SPACINGS["even log-SNR"], 6)
    learned = learn(solver, predict, noise[:64], solution(noise[:64]), iterations=150)
    errors = [
        (drawn(solver, noise[64:], 6) - solution(noise[64:])).square().mean().item()
        for solver in (learned, *SPACINGS.values())
    ]
    assert errors[0] < min(errors[1:]) / 2
    assert learned.timesteps.diff().max() < 0 and learned.timesteps[0] == 999


def test_another_solver_is_refused():
    with pytest.raises(ValueError, match="solver_order=3.* is not accepted"):
        TimestepsSolver(DPMSolverMultistepScheduler(solver_order=3), 4)
