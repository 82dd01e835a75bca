"""Which schedulers add noise: what their names and configurations say, against what two steps of each do."""

import copy

import diffusers
import pytest
import torch

from dqar.noise import adds_noise

CONFIGS = [
    *((name, {}) for name in dir(diffusers) if name.endswith("Scheduler")),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
]
TESTED: list[str] = []


def stepped(scheduler, seed):
    """Where a step from the middle of a run leads, with this seed of all noise."""
    scheduler, generator = copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
    sample, output = torch.randn(2, 1, 3, 8, 8, generator=generator)
    for t in scheduler.timesteps[:3]:
        torch.manual_seed(seed)
        sample = scheduler.step(output, t, sample)[0]
    return sample


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_schedulers_add_noise_as_they_say(name, config):
    try:
        scheduler = getattr(diffusers, name)(**config)
        scheduler.set_timesteps(8)
        differs = not torch.equal(stepped(scheduler, 1), stepped(scheduler, 2))
    except Exception as reason:  # of another kind: text, audio, or a package that isn't there
        pytest.skip(f"{name}: {reason}"[:100])
    TESTED.append(name)
    assert adds_noise(scheduler) == differs


def test_enough_schedulers_were_tested():
    assert len(TESTED) >= 20 and {"DDIMScheduler", "DDPMScheduler", "UniPCMultistepScheduler"} <= set(TESTED)
