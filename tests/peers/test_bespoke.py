import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dqar.peers.bespoke import BespokeScheduler, BespokeSolver, as_weights, learn, signal_and_noise

SPREAD = torch.tensor([0.3, 1.0, 2.5, 0.7], dtype=torch.float64).view(4, 1, 1)
"""Standard deviations of Gaussian data, whose score and whose solution are known."""
ALPHAS = DDIMScheduler().alphas_cumprod.double()


def predict(latents, timestep, _images=None):
    signal, noise = signal_and_noise(ALPHAS, torch.as_tensor(timestep, dtype=torch.float64))
    return latents * noise / (signal**2 * SPREAD**2 + noise**2)


def solution(noise):
    """The probability-flow ODE of Gaussian data scales each number by its standard deviations' ratio."""
    first, last = (signal_and_noise(ALPHAS, torch.tensor(float(t), dtype=torch.float64)) for t in (999, 0))
    start, end = ((signal**2 * SPREAD**2 + sigma**2).sqrt() for signal, sigma in (first, last))
    return noise * end / start


def drawn(scheduler, noise, steps, times=None):
    """``times``: what the model is told in place of the scheduler's own timesteps."""
    scheduler.set_timesteps(steps)
    latents = noise
    for i, t in enumerate(scheduler.timesteps):
        latents = scheduler.step(predict(latents, t if times is None else times[i]), t, latents).prev_sample
    return latents


SOLVERS = {
    "ddim": DDIMScheduler(clip_sample=False, timestep_spacing="linspace"),
    "dpm-solver++": DPMSolverMultistepScheduler(),
    "third order": DPMSolverMultistepScheduler(solver_order=3),
    "unipc": UniPCMultistepScheduler(),
    "log-snr": DPMSolverMultistepScheduler(use_exponential_sigmas=True),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_it_begins_as_the_solver_it_is_given(name):
    noise = torch.randn(3, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = BespokeScheduler(ALPHAS.tolist(), *as_weights(SOLVERS[name], 7))
    # diffusers rounds the timesteps that belong to its noise levels
    theirs = drawn(SOLVERS[name], noise, 7, ours.timesteps if name == "log-snr" else None)
    assert torch.allclose(drawn(ours, noise, 7), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_to_be_learned_begins_as_the_one_it_is_given(name):
    timesteps, noise_weights, clean_weights = as_weights(SOLVERS[name], 7)
    ours = BespokeSolver(SOLVERS[name], 7).scheduler().config
    assert ours.timesteps == pytest.approx(timesteps, abs=0.5)  # no two of them are nearer than half a timestep
    assert ours.noise_weights == pytest.approx(noise_weights, abs=1e-6)
    for own, row in zip(ours.clean_weights, clean_weights, strict=True):
        assert own == pytest.approx(row, abs=1e-6)


def test_moved_timesteps_keep_a_constant_prediction_right():
    solver = BespokeSolver(SOLVERS["dpm-solver++"], 6)
    with torch.no_grad():
        solver.gaps += 0.3 * torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean, noise = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.2, dtype=torch.float64)
    levels = [signal_and_noise(ALPHAS, t) for t in solver.timesteps()]
    noise_weights, clean_weights = solver.weights()
    first = levels[0][0] * clean + levels[0][1] * noise
    for i, (signal, sigma) in enumerate(levels[1:]):
        state = noise_weights[i] * first + clean_weights[i].sum() * clean
        assert state.item() == pytest.approx((signal * clean + sigma * noise).item(), abs=2e-3)


@pytest.mark.parametrize("name", ["gaps", "older", "clean_correction"])
def test_gradients_are_those_of_small_differences(name):
    """Through model calls that are computed anew for them."""
    noise = torch.randn(2, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver, images = BespokeSolver(SOLVERS["dpm-solver++"], 4), torch.arange(2)
    parameter, place = getattr(solver, name), (2, 1) if name == "older" else (2,)

    def loss(step=0.0):
        with torch.no_grad():
            parameter[place] += step
        return (solver(predict, noise, images) - solution(noise)).square().mean()

    loss().backward()
    with torch.no_grad():
        difference = (loss(1e-5) - loss(-2e-5)) / 2e-5
    assert parameter.grad[place].item() == pytest.approx(difference.item(), rel=1e-3)


def test_learning_brings_it_nearer_to_the_exact_solution_on_noise_it_has_not_seen():
    noise = torch.randn(96, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solver = BespokeSolver(SOLVERS["dpm-solver++"], 5)
    learned = learn(solver, predict, noise[:64], solution(noise[:64]), iterations=150)
    errors = [
        (drawn(solver, noise[64:], 5) - solution(noise[64:])).square().mean().item()
        for solver in (learned, *SOLVERS.values())
    ]
    assert errors[0] < min(errors[1:]) / 10
    assert learned.timesteps.diff().max() < 0


def test_it_is_saved_runs_twice_and_refuses_another_number_of_steps(tmp_path):
    scheduler = BespokeScheduler(ALPHAS.tolist(), *as_weights(SOLVERS["ddim"], 4))
    scheduler.save_pretrained(tmp_path)
    noise = torch.randn(2, 4, 1, 1, dtype=torch.float64)
    first = drawn(scheduler, noise, 4)
    assert torch.equal(first, drawn(scheduler, noise, 4))
    assert torch.equal(first, drawn(BespokeScheduler.from_pretrained(tmp_path), noise, 4))
    assert scheduler.step(noise, scheduler.timesteps[0], noise, return_dict=False)[0].shape == noise.shape
    with pytest.raises(ValueError, match="num_inference_steps=5 is not accepted: this solver takes 4"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="don't fit 2 timesteps"):
        BespokeScheduler([0.5, 0.1], [900.0, 100.0], [1.0, 1.0], [[1.0], [1.0]])
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler is not accepted"):
        as_weights(EulerAncestralDiscreteScheduler(), 4)


def test_signal_and_noise_are_the_schedules_at_its_own_timesteps():
    for t in (0, 17, 999):
        signal, noise = signal_and_noise(ALPHAS, torch.tensor(float(t), dtype=torch.float64))
        assert float(signal) == pytest.approx(math.sqrt(ALPHAS[t]))
        assert float(noise) == pytest.approx(math.sqrt(1 - ALPHAS[t]))
