"""How a step is found without waiting for the device."""

import torch
from diffusers import DPMSolverMultistepScheduler

from dqar.families import Family
from dqar.run import RunFinder
from dqar.trace import Trace


class OnAGPU(torch.Tensor):
    """A timestep that was copied to another device; counts how often it is read."""

    read = 0

    @property
    def device(self):
        return torch.device("cuda")

    def __float__(self):
        OnAGPU.read += 1
        return float(self.as_subclass(torch.Tensor))


def test_only_the_timesteps_of_a_runs_first_step_are_read_from_the_device():
    """As of DiTPipeline, which copies each timestep to where the model is."""
    scheduler = DPMSolverMultistepScheduler()
    finder = RunFinder(Family(), None, lambda: scheduler, lambda: None, object, Trace().begin_run, lambda _run: None)
    latents = torch.randn(1, 1, 4, 4)

    def steps(number):
        indices = []
        for t in scheduler.timesteps[:number]:
            for _call in range(2):  # guidance by two calls
                condition = (torch.tensor([_call]),)
                run, _, _ = finder.find(latents, t[None].clone().as_subclass(OnAGPU), condition)
                indices.append(run.index)
            scheduler.step(torch.zeros_like(latents), t, latents)
            finder.finishing(scheduler)
        return indices

    scheduler.set_timesteps(6)
    finder.timesteps_set(scheduler)
    assert steps(4) == [0, 0, 1, 1, 2, 2, 3, 3] and OnAGPU.read == 2
    scheduler.set_timesteps(6)  # the last run ended early
    finder.timesteps_set(scheduler)
    assert steps(6)[::2] == [0, 1, 2, 3, 4, 5] and OnAGPU.read == 4
