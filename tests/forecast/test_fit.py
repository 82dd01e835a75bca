import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers import embedded_pipeline

from dqar import DQARConfig, ForecastPlan
from dqar.families import describe_model
from dqar.forecast.fit import READOUT_RIDGE, fit, fit_step, main, make_plan
from dqar.forecast.plan import extrapolation
from dqar.forecast.steps import Jumps, choose_steps, measure_gains
from dqar.forecast.trajectories import RIDGE, Trajectories, trajectories
from dqar.measure import metrics
from dqar.measure.sampling import sample
from dqar.models.pipelines import make_scheduler
from dqar.models.profiles import Profile

PROFILE = Profile("tiny", "digits", num_inference_steps=10, guidance_scale=3.0, batch_size=8)


@pytest.fixture(params=["ddim", "dpm-solver++", "dpm-solver++-lu"])
def pipe(request):
    pipe = embedded_pipeline()
    pipe.scheduler = make_scheduler(request.param, pipe.scheduler)
    for parameter in pipe.transformer.parameters():
        parameter.data *= 0.4  # tame enough for a run to converge
    return pipe


def test_trajectories_are_those_of_the_pipeline(pipe):
    known = trajectories(pipe, PROFILE, "reference", 4, seed=5)
    images = sample(pipe, PROFILE, 5, num_samples=4).images
    torch.testing.assert_close((known.latents[-1] / 2 + 0.5).clamp(0, 1), images)
    assert known.latents.shape == (11, 4, 1, 8, 8) and known.cond.shape == known.uncond.shape == (10, 4, 1, 8, 8)


def test_converged_trajectories_are_of_the_same_timesteps(pipe):
    coarse, fine = (trajectories(pipe, PROFILE, target, 4) for target in ("reference", "converged"))
    assert torch.equal(coarse.latents[0], fine.latents[0]) and torch.equal(coarse.cond[0], fine.cond[0])
    assert fine.latents.shape == coarse.latents.shape and not torch.equal(fine.latents[1], coarse.latents[1])


def test_a_spacing_without_finer_steps_is_refused():
    pipe = embedded_pipeline()
    pipe.scheduler = make_scheduler("ddim-leading", pipe.scheduler)
    with pytest.raises(ValueError, match="doesn't visit the same timesteps"):
        trajectories(pipe, PROFILE, "converged", 2)
    with pytest.raises(ValueError, match="target='best'"):
        trajectories(pipe, PROFILE, "best", 2)


def test_jumps_are_least_squares():
    torch.manual_seed(0)
    known = Trajectories(torch.randn(7, 3, 1, 4, 4), *torch.randn(2, 6, 3, 1, 4, 4), torch.arange(3), "reference")
    jumps = Jumps(known)
    for step, before in ((0, None), (3, 1), (5, 4)):
        columns = [known.latents[step], known.cond[step], known.uncond[step]]
        columns += [] if before is None else [known.cond[before], known.uncond[before]]
        columns = np.stack([x.flatten().double() for x in columns], 1)
        for later, error in enumerate(jumps.errors(step, before), step + 1):
            wanted = known.latents[later].flatten().double().numpy()
            rest = wanted - columns @ np.linalg.lstsq(columns, wanted, rcond=None)[0]
            assert error == pytest.approx((rest**2).mean(), rel=1e-6)


def test_chosen_steps_are_the_best_of_all():
    torch.manual_seed(1)
    known = Trajectories(torch.randn(8, 2, 1, 4, 4), *torch.randn(2, 7, 2, 1, 4, 4), torch.arange(2), "reference")
    jumps, gains = Jumps(known), np.linspace(0.5, 2, 8)

    def total(path):
        ends = [None, *path, 7]
        jumps_of = zip(ends[:-2], ends[1:-1], ends[2:], strict=True)
        return sum(gains[c] * jumps.errors(b, a)[c - b - 1] for a, b, c in jumps_of)

    best = min(((0, *rest) for rest in itertools.combinations(range(1, 7), 3)), key=total)
    path, error = choose_steps(jumps, 4, gains)
    assert path == best and error == pytest.approx(total(best))
    other, _ = choose_steps(jumps, 4, gains[::-1] ** 6)
    assert other != path  # gains matter
    with pytest.raises(ValueError, match="num_computed=8 is not accepted"):
        choose_steps(jumps, 8, gains)


def test_kernels_and_hidden_states_are_fitted_together(monkeypatch):
    """Against one large system in NumPy: three columns for all pixels, and five hidden states for each of a patch."""
    monkeypatch.setattr("dqar.forecast.fit.KERNEL", 1)
    torch.manual_seed(0)
    columns, states, wanted = torch.randn(6, 32, 3).double(), torch.randn(6, 4, 5), torch.randn(6, 2, 4, 4)
    weights, matrix = fit_step(columns, states, wanted)
    size = 8  # 2 x 2 pixels of two channels
    maps = columns.view(6, 2, 2, 2, 2, 2, 3).permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, size, 3).numpy()
    goal = wanted.view(6, 2, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, size).double().numpy()
    hidden = states.flatten(0, 1).double().numpy()
    design = np.zeros((len(hidden), size, 3 + size * 5))
    design[:, :, :3] = maps
    for pixel in range(size):
        design[:, pixel, 3 + 5 * pixel : 8 + 5 * pixel] = hidden
    norms = np.sqrt((maps**2).sum((0, 1))), np.linalg.norm(hidden, axis=0)
    ridge = np.concatenate([RIDGE * norms[0] ** 2, np.tile(READOUT_RIDGE * norms[1] ** 2, size)])
    design = design.reshape(-1, 3 + size * 5)
    expected = np.linalg.solve(design.T @ design + np.diag(ridge), design.T @ goal.flatten())
    np.testing.assert_allclose(weights, expected[:3], rtol=1e-8)
    np.testing.assert_allclose(matrix.T.flatten(), expected[3:], rtol=1e-8)


def test_computing_every_step_reaches_the_reference(pipe):
    known = trajectories(pipe, PROFILE, "reference", 4)
    assert fit(pipe, PROFILE, tuple(range(10)), known, 4).error.max() < 1e-6


def test_a_fit_goes_on_from_a_like_one(pipe):
    known = trajectories(pipe, PROFILE, "reference", 4)
    like = fit(pipe, PROFILE, (0, 2, 3, 6, 9), known, 2)
    computed = []
    handle = pipe.transformer.register_forward_hook(lambda *_: computed.append(1))
    again = fit(pipe, PROFILE, (0, 2, 3, 7, 9), known, 2, like)
    handle.remove()
    anew = fit(pipe, PROFILE, (0, 2, 3, 7, 9), known, 2)
    assert len(computed) == 2 and again.weights == anew.weights and torch.equal(again.error, anew.error)
    assert again.weights[:6] == like.weights[:6] and again.weights[6] != like.weights[6]
    assert fit(pipe, PROFILE, like.computed, known, 4, like).weights != like.weights  # fitted on other images


def test_a_plan_beats_extrapolation_on_other_images(pipe):
    known = trajectories(pipe, PROFILE, "reference", 8)
    gains = measure_gains(pipe, PROFILE, known, points=4)
    plan = make_plan(pipe, PROFILE, 5, known, gains, refinements=3)
    assert len(plan.computed) == 5 and len(plan.provenance["trials"]) >= 3
    best = min(plan.provenance["trials"], key=lambda trial: trial["measured"])
    assert sorted(plan.computed) == best["computed"]
    reference = sample(pipe, PROFILE, 77, num_samples=8).images
    line = extrapolation(plan.computed, plan.timesteps, 3.0, describe_model(pipe.transformer))
    ours, theirs = (
        metrics.mean_psnr(sample(pipe, PROFILE, 77, DQARConfig(plan=p), num_samples=8).images, reference)
        for p in (plan, line)
    )
    assert ours > theirs + 3


def test_an_earlier_plan_is_where_a_better_one_starts(pipe):
    known, steps = trajectories(pipe, PROFILE, "reference", 4), (0, 1, 5, 6, 8)
    plan = make_plan(pipe, PROFILE, 5, known, np.ones(11), 2, [steps])
    trials = plan.provenance["trials"]
    assert trials[0]["computed"] == list(steps) and len(trials) > 2
    assert sorted(plan.computed) == min(trials, key=lambda trial: trial["measured"])["computed"]


def test_what_the_planner_follows_is_what_the_pipeline_runs(pipe):
    """Weights fitted on one run, replayed through the session on the same images, give the error that was fitted."""
    known = trajectories(pipe, PROFILE, "reference", 4, seed=5)
    fitted = fit(pipe, PROFILE, (0, 2, 3, 6, 9), known, 4)
    plan = make_plan(pipe, PROFILE, 5, known, np.ones(11), refinements=0)
    plan = dataclasses.replace(plan, weights=fitted.weights, readouts=fitted.readouts, computed={0, 2, 3, 6, 9})
    drawn = sample(pipe, PROFILE, 5, DQARConfig(plan=plan), num_samples=4).images * 2 - 1
    replayed = (drawn - known.latents[-1].clamp(-1, 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(replayed, fitted.error, rtol=0.02, atol=1e-8)


def test_without_guidance():
    pipe = embedded_pipeline()
    profile = dataclasses.replace(PROFILE, guidance_scale=1.0)
    known = trajectories(pipe, profile, "reference", 4)
    assert known.uncond is None
    plan = make_plan(pipe, profile, 5, known, np.ones(11), refinements=1)
    assert not plan.guided
    sample(pipe, profile, 3, DQARConfig(plan=plan), num_samples=2)


def test_the_command_line_saves_a_plan_and_names_wrong_arguments(tmp_path, capsys, monkeypatch):
    path = tmp_path / "plan.json"

    def load_pipeline(profile):  # the embedded model has 28 layers
        pipe = embedded_pipeline()
        pipe.scheduler = make_scheduler(profile.scheduler, pipe.scheduler)
        return pipe

    monkeypatch.setattr("dqar.forecast.fit.load_pipeline", load_pipeline)
    options = ["--profile", "smoke", "--macs", "2", "--images", "2", "--refinements", "1", "--out", str(path)]
    assert main(options) == 0 and "4 of 8 steps, 2.00× fewer MACs" in capsys.readouterr().out
    plan = ForecastPlan.load(path)
    assert len(plan.computed) == 4 and plan.provenance["profile"]["name"] == "smoke"
    assert main([*options, "--start", str(path), "--refinements", "0"]) == 0
    assert ForecastPlan.load(path).provenance["trials"][0]["computed"] == sorted(plan.computed)
    assert main([*options, "--start", str(path), "--macs", "4"]) == 2
    assert "computes 4 steps, 2 are wanted" in " ".join(capsys.readouterr().out.split())
    wrongs = (["--refinements", "-1"], ["--macs", "0.5"], ["--target", "best"], ["--scheduler", "heun"])
    for wrong in (*wrongs, ["--profile", "x"]):
        assert main([*options, *wrong]) == 2
        assert wrong[1] in capsys.readouterr().out
