"""The parts of the planner, against NumPy and SciPy, and what the command line makes of them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers import embedded_pipeline, image_pipeline
from scipy.ndimage import correlate

from dqar import ForecastPlan, PlanLadder
from dqar.__main__ import main
from dqar.families import describe_model
from dqar.forecast import fit
from dqar.forecast.fit import (
    CLASS_READOUT_RIDGE,
    CLASS_RIDGE,
    NEIGHBOURS_RIDGE,
    READOUT_RIDGE,
    TRUST,
    TRUST_IMAGES,
    StepSystem,
    neighbourhoods,
    trust,
)
from dqar.forecast.plan import extrapolation
from dqar.forecast.profiles import calibrate_profile
from dqar.forecast.run import weighted_sum
from dqar.forecast.steps import RIDGE, Jumps, choose_steps, gram
from dqar.measure import metrics
from dqar.measure.sampling import sample
from dqar.models.pipelines import make_scheduler
from dqar.models.profiles import Profile

PROFILE = Profile("tiny", "digits", num_inference_steps=10, guidance_scale=3.0, batch_size=8)


@pytest.fixture(params=["ddim", "dpm-solver++", "dpm-solver++-lu"])
def pipe(request):
    return tame(request.param)


def tame(scheduler="ddim"):
    """Weights so small that a run converges."""
    pipe = embedded_pipeline()
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    for parameter in pipe.transformer.parameters():
        parameter.data *= 0.4
    return pipe


def calibrate(pipe, num_images=4, target="reference", profile=PROFILE, **options):
    return calibrate_profile(pipe, profile, target, num_images, **options)


def test_trajectories_are_those_of_the_pipeline(pipe):
    calibration = calibrate(pipe, 10)
    assert [one.images for one in calibration.trajectories] == [8, 2] and calibration.images == 10
    images = sample(pipe, PROFILE, 500, num_samples=10).images
    ends = torch.cat([one.previous[-1] for one in calibration.trajectories])
    torch.testing.assert_close((ends / 2 + 0.5).clamp(0, 1), images)
    assert calibration.trajectories[0].scales == pytest.approx((3, 3), rel=1e-4)


def test_converged_trajectories_are_of_the_same_timesteps(pipe):
    coarse, fine = (calibrate(pipe, 4, target).trajectories[0] for target in ("reference", "converged"))
    assert fine.timesteps == coarse.timesteps and fine.previous.shape == coarse.previous.shape
    assert not torch.equal(fine.previous[0], coarse.previous[0])
    pipe.scheduler.set_timesteps(10)
    assert list(coarse.timesteps) == pipe.scheduler.timesteps.tolist()


def test_a_spacing_without_finer_steps_is_refused():
    pipe = tame("ddim-leading")
    with pytest.raises(ValueError, match="doesn't visit the same timesteps"):
        calibrate(pipe, 2, "converged")
    with pytest.raises(ValueError, match="target='best'"):
        calibrate(pipe, 2, "best")


def random_jumps(steps, images):
    latents, cond, uncond = torch.randn(steps + 1, images * 16), *torch.randn(2, steps, images * 16)
    jumps = Jumps(gram(latents, {"cond": cond, "uncond": uncond}), images * 16, steps)
    return jumps, latents.double().numpy(), cond.double().numpy(), uncond.double().numpy()


def test_jumps_are_least_squares():
    torch.manual_seed(0)
    jumps, latents, cond, uncond = random_jumps(6, 3)
    for step, before in ((0, None), (3, 1), (5, 4)):
        columns = [latents[step], cond[step], uncond[step]]
        columns += [] if before is None else [cond[before], uncond[before]]
        columns = np.stack(columns, 1)
        for later, error in enumerate(jumps.errors(step, before), step + 1):
            rest = latents[later] - columns @ np.linalg.lstsq(columns, latents[later], rcond=None)[0]
            assert error == pytest.approx((rest**2).mean(), rel=1e-6)


def test_chosen_steps_are_the_best_of_all():
    torch.manual_seed(1)
    jumps, gains = random_jumps(7, 2)[0], np.linspace(0.5, 2, 8)

    def total(path, length_power=0):
        ends = [None, *path, 7]
        jumps_of = zip(ends[:-2], ends[1:-1], ends[2:], strict=True)
        return sum(gains[c] * (c - b) ** length_power * jumps.errors(b, a)[c - b - 1] for a, b, c in jumps_of)

    paths = [(0, *rest) for rest in itertools.combinations(range(1, 7), 3)]
    best = min(paths, key=total)
    path, error = choose_steps(jumps, 4, gains)
    assert path == best and error == pytest.approx(total(best))
    for power in (2, 4):  # longer jumps count more
        even, error = choose_steps(jumps, 4, gains, power)
        assert even == min(paths, key=lambda path, power=power: total(path, power))
        assert error == pytest.approx(total(even, power))
    assert even != path
    other, _ = choose_steps(jumps, 4, gains[::-1] ** 6)
    assert other != path  # gains matter
    with pytest.raises(ValueError, match="num_computed=8 is not accepted"):
        choose_steps(jumps, 8, gains)


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 5), (3, 3, 3)])
def test_kernels_see_what_they_weight(kernel):
    """SciPy's correlation, zeros beyond the edges, for weights and for what they are fitted on."""
    torch.manual_seed(0)
    shape = (2, 3, *(4, 5, 6)[: len(kernel) or 1])
    tensors, kernels = [torch.randn(shape) for _ in range(3)], torch.randn(3, *kernel).double()
    expected = np.zeros(shape)
    for x, own in zip(tensors, kernels, strict=True):
        for image, channel in np.ndindex(2, 3):
            plane = x[image, channel].double().numpy()
            own_sides = own.numpy() if kernel else own.numpy().reshape(1)
            expected[image, channel] += correlate(plane, own_sides, mode="constant")
    np.testing.assert_allclose(weighted_sum(tensors, kernels), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(neighbourhoods(tensors, kernel) @ kernels.flatten(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("firmness", [1, 10])
def test_kernels_and_hidden_states_are_fitted_together(firmness):
    """Against one large system in NumPy: nine numbers for all pixels, and five hidden states for each of a patch."""
    torch.manual_seed(0)
    maps, states, goal = torch.randn(6, 2, 4, 4, 9).double(), torch.randn(6, 4, 5), torch.randn(6, 2, 4, 4)
    system = StepSystem((3, 3), firmness)
    system.add(maps[:2], states[:2], goal[:2])
    system.add(maps[2:], states[2:], goal[2:])
    weights, matrix = system.solve()
    size = 8  # 2 x 2 pixels of two channels
    rows = maps.view(6, 2, 2, 2, 2, 2, 9).permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, size, 9).numpy()
    target = goal.view(6, 2, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, size).double().numpy()
    hidden = states.flatten(0, 1).double().numpy()
    design = np.zeros((len(hidden), size, 9 + size * 5))
    design[:, :, :9] = rows
    for pixel in range(size):
        design[:, pixel, 9 + 5 * pixel : 14 + 5 * pixel] = hidden
    norms = np.sqrt((rows**2).sum((0, 1))), np.linalg.norm(hidden, axis=0)
    ridge = np.full(9, NEIGHBOURS_RIDGE)
    ridge[4] = RIDGE
    ridge = np.concatenate([ridge * norms[0] ** 2, np.tile(firmness * READOUT_RIDGE * norms[1] ** 2, size)])
    design = design.reshape(-1, 9 + size * 5)
    expected = np.linalg.solve(design.T @ design + np.diag(ridge), design.T @ target.flatten())
    np.testing.assert_allclose(weights, expected[:9], rtol=1e-7)
    np.testing.assert_allclose(matrix.T.flatten(), expected[9:], rtol=1e-7)


@pytest.mark.parametrize("firmness", [1, 10])
def test_a_class_adds_what_its_images_still_ask_for(firmness):
    """Against one large system in NumPy, of the class's images alone, with the ridge of all images' columns."""
    torch.manual_seed(0)
    maps, states, goal = torch.randn(6, 1, 4, 4, 9).double(), torch.randn(6, 16, 5), torch.randn(6, 1, 4, 4)
    of_all, own = StepSystem((3, 3), firmness), StepSystem((3, 3), firmness)
    own.add(maps[:2], states[:2], goal[:2])
    of_all.merge(own)
    of_all.add(maps[2:], states[2:], goal[2:])
    solution = of_all.solve()
    weights, matrix = own.solve_beyond(of_all, *solution)
    columns = torch.cat([maps.reshape(96, 9), states.double().reshape(96, 5)], 1).numpy()
    rest = goal.double().flatten().numpy() - columns @ torch.cat([solution[0], solution[1][:, 0]]).numpy()
    ridge = firmness * np.repeat([CLASS_RIDGE, CLASS_READOUT_RIDGE], [9, 5]) * (columns**2).sum(0)
    columns, rest = columns[:32], rest[:32]
    expected = np.linalg.solve(columns.T @ columns + np.diag(ridge), columns.T @ rest)
    np.testing.assert_allclose(weights, expected[:9], rtol=1e-7)
    np.testing.assert_allclose(matrix[:, 0], expected[9:], rtol=1e-7)


def test_images_that_went_astray_weigh_less():
    usual, few = torch.full((TRUST_IMAGES,), 1e-4), torch.tensor([4e-4, 1.0, 0.25e-4, 1e3])
    weights = trust(torch.cat([usual, few])).tolist()
    assert weights == pytest.approx([*[1] * TRUST_IMAGES, 0.5, 1 / TRUST, 2, 1 / TRUST], rel=1e-3)
    rounding = trust(torch.tensor([0.0, 1e-14, 3e-13]).repeat(TRUST_IMAGES))
    assert rounding.tolist() == pytest.approx([1] * 3 * TRUST_IMAGES, rel=1e-2)
    assert trust(few).tolist() == [1, 1, 1, 1]


def test_computing_every_step_reaches_the_reference(pipe):
    assert calibrate(pipe).fit(tuple(range(10)), 4).error.max() < 1e-6


@pytest.mark.parametrize("enough", [4, 5])
def test_sets_for_which_longer_jumps_count_more_are_tried_where_images_can_tell(monkeypatch, enough):
    monkeypatch.setattr(fit, "STARTS", ((0, 0), (0, 40)))
    monkeypatch.setattr(fit, "TRUST_IMAGES", enough)
    calibration = calibrate(tame())
    size = sum(trajectory.previous[0].numel() for trajectory in calibration.trajectories)
    jumps = Jumps(torch.stack([trajectory.gram for trajectory in calibration.trajectories]).sum(0), size, 10)
    short, even = (choose_steps(jumps, 4, np.ones(11), power)[0] for power in (0, 40))
    assert calibration.images == 4 and short != even
    tried = [tuple(trial["computed"]) for trial in calibration.plan(4, refinements=0).provenance["trials"]]
    assert tried == ([short, even] if enough == 4 else [short])


def test_a_fit_goes_on_from_a_like_one(pipe):
    calibration = calibrate(pipe)
    like = calibration.fit((0, 2, 3, 6, 9), 2)
    computed = []
    handle = pipe.transformer.register_forward_hook(lambda *_: computed.append(1))
    again = calibration.fit((0, 2, 3, 7, 9), 2, like)
    handle.remove()
    anew = calibration.fit((0, 2, 3, 7, 9), 2)
    assert len(computed) == 3  # steps 7 and 9, and 3 once more for its hidden states
    assert again.weights == anew.weights and torch.equal(again.error, anew.error)
    assert again.weights[:6] == like.weights[:6] and again.weights[6] != like.weights[6]
    assert calibration.fit(like.computed, 4, like).weights != like.weights  # fitted on other images


def test_a_plan_beats_extrapolation_on_other_images(pipe):
    plan = calibrate(pipe, 8).plan(5, refinements=3)
    assert len(plan.computed) == 5 and len(plan.provenance["trials"]) >= 3 and plan.guidance == (3, 3)
    best = min(plan.provenance["trials"], key=lambda trial: trial["measured"])
    assert sorted(plan.computed) == best["computed"]
    reference = sample(pipe, PROFILE, 77, num_samples=8).images
    line = extrapolation(plan.computed, plan.timesteps, 3.0, describe_model(pipe.transformer))
    ours, theirs = (
        metrics.mean_psnr(sample(pipe, PROFILE, 77, p, num_samples=8).images, reference) for p in (plan, line)
    )
    assert ours > theirs + 3


@pytest.mark.parametrize("firmer", [1e-3, 1e3])
def test_the_firmness_that_is_better_on_other_images_is_kept(monkeypatch, firmer):
    """Here a much softer ridge, and a much firmer one, by the errors of the quarter that neither was fitted on."""
    monkeypatch.setattr("dqar.forecast.fit.FIRMER", firmer)
    steps, calibration = (0, 2, 3, 6, 9), calibrate(tame(), 8)
    errors = {firmness: calibration.fit(steps, 6, firmness=firmness).error[6:].mean() for firmness in (1, firmer)}
    assert errors[1] != errors[firmer]
    plan, firmness = calibration.plan(5, 0, [steps]), min(errors, key=errors.get)
    assert plan.provenance["firmness"] == firmness
    assert plan.readouts == calibration.fit(steps, 8, firmness=firmness).readouts


def test_an_earlier_plan_is_where_a_better_one_starts():
    steps = (0, 1, 5, 6, 8)
    plan = calibrate(tame()).plan(5, 2, [steps])
    trials = plan.provenance["trials"]
    assert trials[0]["computed"] == list(steps) and len(trials) > 2
    assert sorted(plan.computed) == min(trials, key=lambda trial: trial["measured"])["computed"]


def test_what_the_planner_follows_is_what_the_pipeline_runs(pipe):
    """The same images drawn through the session have the error that was fitted."""
    calibration = calibrate(pipe)
    plan = calibration.plan(5, refinements=0)
    fitted = calibration.fit(tuple(sorted(plan.computed)), 4, firmness=plan.provenance["firmness"])
    assert fitted.weights == plan.weights and fitted.readouts == plan.readouts
    drawn = sample(pipe, PROFILE, 500, plan, num_samples=4).images * 2 - 1
    replayed = (drawn - calibration.trajectories[0].previous[-1].clamp(-1, 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(replayed, fitted.error, rtol=0.02, atol=1e-8)


def test_classes_with_enough_images_are_fitted_and_drawn_as_fitted():
    """Ten images of ten classes, and two more: classes 0 and 1 have two."""
    pipe, steps = image_pipeline(), (0, 2, 3, 6, 9)
    calibration = calibrate(pipe, 12)
    fitted = calibration.fit(steps, 12, class_images=2)
    plan = calibration.plan_of(fitted)
    assert set(plan.classes) == {0, 1} and any(map(any, plan.classes[0][1]))
    images = torch.cat([trajectory.previous[-1] for trajectory in calibration.trajectories]).clamp(-1, 1)
    errors = []
    for own in (plan, dataclasses.replace(plan, classes={})):
        drawn = sample(pipe, PROFILE, 500, own, num_samples=12).images * 2 - 1
        errors.append((drawn - images).square().flatten(1).mean(1))
    torch.testing.assert_close(errors[0], fitted.error, rtol=0.05, atol=1e-8)
    of_classes = torch.arange(12) % 10 < 2
    same = torch.isclose(*errors, rtol=1e-4, atol=1e-8)
    assert torch.equal(same, ~of_classes)
    like = calibration.fit((0, 2, 3, 7, 9), 12, class_images=2)
    again = calibration.fit(steps, 12, like, class_images=2)
    assert again.weights == fitted.weights and again.classes == fitted.classes
    assert not calibration.fit(steps, 10, class_images=2).classes  # the other two aren't fitted on


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_fitted_to_the_history_that_is_kept(bits):
    """The planner rounds as the pipeline does, and its weights make up for some of that."""
    pipe, steps = image_pipeline(), (0, 2, 3, 6, 9)
    fits = {b: calibrate(pipe, history_bits=b) for b in (16, bits)}
    whole, fitted = (own.plan_of(own.fit(steps, 4)) for own in fits.values())
    assert fitted.history_bits == bits and fitted.weights[1] != whole.weights[1]
    errors = {}
    for name, plan in {"after": dataclasses.replace(whole, history_bits=bits), "within": fitted}.items():
        drawn = sample(pipe, PROFILE, 500, plan, num_samples=4).images * 2 - 1
        end = fits[16].trajectories[0].previous[-1].clamp(-1, 1)
        errors[name] = (drawn - end).square().flatten(1).mean(1)
    expected = fits[bits].fit(steps, 4).error
    same = torch.isclose(errors["within"], expected, rtol=0.05, atol=1e-8)
    assert same.sum() >= 3  # of four: one rounding that flips ends elsewhere
    assert errors["within"].mean() < 0.1 * errors["after"].mean()
    like = fits[bits].fit((0, 2, 3, 7, 9), 4)
    assert fits[bits].fit(steps, 4, like).weights == fitted.weights


def test_the_command_line_saves_a_plan_and_names_wrong_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dqar.commands.plan.load_pipeline", lambda profile: tame(profile.scheduler))
    path = tmp_path / "plan.json"
    options = ["--profile", "smoke", "--macs", "2", "--images", "2", "--refinements", "1", "--out", str(path)]
    assert main(["plan", *options]) == 0 and "4 of 8 steps, 2.00× fewer MACs" in capsys.readouterr().out
    plan = ForecastPlan.load(path)
    assert len(plan.computed) == 4 and plan.provenance["profile"]["name"] == "smoke"
    assert main(["plan", *options, "--start", str(path), "--refinements", "0"]) == 0
    assert ForecastPlan.load(path).provenance["trials"][0]["computed"] == sorted(plan.computed)
    assert main(["plan", *options, "--start", str(path), "--promise", "40", "0.9"]) == 2
    assert "leave it out with --promise" in capsys.readouterr().err
    assert main(["plan", *options, "--start", str(path), "--macs", "4"]) == 2
    assert "computes 4 steps, 2 are wanted" in capsys.readouterr().err
    wrongs = (["--refinements", "-1"], ["--macs", "0.5"], ["--target", "best"], ["--scheduler", "heun"])
    for wrong in (*wrongs, ["--profile", "x"], ["--prompts", "x"]):
        assert main(["plan", *options, *wrong]) == 2
        assert wrong[0] in (error := capsys.readouterr().err) or wrong[1] in error


def test_the_command_line_saves_a_ladder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dqar.commands.plan.load_pipeline", lambda profile: tame(profile.scheduler))
    path = tmp_path / "ladder.json"
    options = ["--profile", "smoke", "--macs", "2", "--images", "32", "--refinements", "0", "--out", str(path)]
    assert main(["plan", *options, "--promise", "10", "0.5"]) == 0
    assert "5, 4 computed steps; PSNR >= 10 dB in 50% of images" in capsys.readouterr().out
    ladder = PlanLadder.load(path)
    assert ladder.plans[1].provenance["profile"]["name"] == "smoke" and not ladder.hidden
    assert main(["plan", *options, "--promise", "10", "0.5", "--rule", "policy"]) == 0
    assert len(PlanLadder.load(path).hidden) == 2  # a network for each plan
    assert main(["plan", *options, "--rule", "policy"]) == 2
    assert "--rule=policy is not accepted: only with --promise" in capsys.readouterr().err
    assert main(["plan", *options, "--promise", "10", "1.5"]) == 2 and "share=1.5" in capsys.readouterr().err


def test_the_command_line_plans_a_saved_pipeline(pixart_folder, tmp_path, capsys):
    path, prompts = tmp_path / "plan.json", tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\ntwo big red dog\na dog runs in the park\n")
    call = '{"guidance_scale": 4.5, "height": 8, "width": 8, "use_resolution_binning": false, "clean_caption": false}'
    options = ["--pipeline", str(pixart_folder), "--prompts", str(prompts), "--steps", "6", "--macs", "2"]
    options += ["--dtype", "float32", "--call", call, "--refinements", "0", "--out", str(path)]
    assert main(["plan", *options]) == 0 and "3 of 6 steps" in capsys.readouterr().out
    plan = ForecastPlan.load(path)
    assert plan.provenance["calibration_images"] == 3 and plan.guidance == (4.5, 4.5) and plan.latents == (4, 8, 8)
    for wrong in (
        ["--call", "[1]"],
        ["--dtype", "half-hearted"],
        ["--call", '{"num_inference_steps": 1}'],
        ["--macs", "9"],
    ):
        assert main(["plan", *options, *wrong]) == 2
        assert wrong[1].strip('{"[]} :1') in capsys.readouterr().err
    assert main(["plan", *options[:2]]) == 2 and "--prompts" in capsys.readouterr().err
