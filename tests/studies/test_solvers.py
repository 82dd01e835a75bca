import dataclasses

import pytest
import torch

from dqar.models.profiles import get_profile
from dqar.studies import pareto, solvers
from dqar.studies.compare import FULL, draw
from dqar.studies.recording import Recording

PROFILE = get_profile("smoke", num_inference_steps=6)


@pytest.mark.parametrize("target", ["reference", "converged"])
def test_pairs_are_what_the_pipeline_draws(target):
    pairs = solvers.make_pairs(PROFILE, target, 2)
    method = {"reference": FULL, "converged": pareto.converged(PROFILE)}[target]
    images = method.draw(PROFILE, solvers.SOLVER_SEED, num_samples=2).images
    torch.testing.assert_close((pairs.target / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=1e-4)


def test_a_solver_for_half_the_macs_has_a_step_less_with_a_decoder():
    assert pareto.solver_steps(get_profile("digits")) == [25, 16, 12]
    assert pareto.solver_steps(get_profile("cifar10", device="cpu")) == [24, 16, 12]


def test_solvers_are_recorded_once_and_draw_with_as_many_steps_as_they_have(tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "SOLVER_BUDGETS", (2,))
    monkeypatch.setattr(solvers, "STARTS", dict.fromkeys(solvers.STARTS, solvers.SPACED[:2]))
    recording = Recording(PROFILE, tmp_path / "work", tmp_path / "out")
    recording.sizes = dataclasses.replace(recording.sizes, solver_pairs=2, solver_iterations=1)
    solvers.record_solvers(recording)
    made = list(pareto.learned_solvers(PROFILE, PROFILE.scheduler, recording.folder))
    others = [sampler for sampler in pareto.SAMPLERS if sampler != PROFILE.scheduler]
    for sampler in others:  # whose reference they weren't learned from
        assert not [m for m in pareto.contenders(PROFILE, sampler, recording.folder) if m.solver is not None]
    assert [method.name for method in made] == [
        f"{family}: 3 steps for the {target}"
        for family in ("bespoke solver", "learned timesteps")
        for target in ("reference", "converged")
    ]
    monkeypatch.setattr(solvers, "make_pairs", None)  # nothing is made anew
    solvers.record_solvers(recording)
    full, images = draw(FULL, PROFILE, 0, num_samples=2), []
    for method in made:
        drawn = draw(method, PROFILE, 0, num_samples=2)
        assert full.macs == 2 * drawn.macs
        images.append(drawn.images)
        assert (drawn.images - full.images).square().mean() < 0.05
    assert all((images[0] != other).any() for other in images[1:])
