import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from dqar.measure.results import Run, load_table, provenance, save_table, slug
from dqar.measure.sampling import first_latents
from dqar.models.profiles import get_profile
from dqar.studies import arena, pareto, solvers
from dqar.studies.compare import FULL, Method
from dqar.studies.recording import ARENA_SEED, Recording, Sizes

SPEEDUPS = {"full": 1, "plan 2": 2, "plan 3": 3.1, "other plan": 2, "20 steps": 2.5, "25 steps": 2, "cache": 3}


def table(decibels, made_for="reference"):
    """An arena: PSNR (dB) of each image by method, the same to both targets."""
    rows = []
    for method, values in decibels.items():
        family = {"full": FULL.name, "plan": pareto.PLAN, "other": pareto.PLAN}.get(method.split()[0], method)
        family = "fewer steps" if "steps" in method else family
        for image, value in enumerate(values):
            error = 10 ** (-value / 10)
            target = {"plan": made_for, "other": "converged"}.get(method.split()[0])
            rows.append((method, family, target, SPEEDUPS[method], 1.0, image, error, error))
    columns = ["method", "family", "made_for", "macs_speedup", "fd", "image", "mse", "mse_converged"]
    return pd.DataFrame(rows, columns=columns).assign(converged_by=pareto.CONVERGED_BY)


def test_standings_are_of_errors_in_the_mean_and_of_images_otherwise():
    judged = arena.standings(table({"full": [50, 50, 50], "25 steps": [40, 50, 20]}), "reference").set_index("method")
    assert judged["mean"]["25 steps"] == pytest.approx(-10 * math.log10((1e-4 + 1e-5 + 1e-2) / 3))
    assert judged["median"]["25 steps"] == pytest.approx(40)
    assert judged["5th percentile"]["25 steps"] == pytest.approx(22)  # a tenth of the way from 20 to 40
    assert judged["worst"]["25 steps"] == pytest.approx(20)


def test_verdicts_follow_from_paired_intervals():
    images = np.linspace(30, 60, 50)
    noise = np.random.default_rng(1).normal(size=50)
    own = table({"full": images + 60, "plan 2": images, "25 steps": images - 1, "cache": images + noise / 100})
    judged = arena.verdicts(own, 500).set_index(["target", "budget", "measure", "family"])
    row = judged.loc["reference", 2, "median", "fewer steps"]
    # Images differ by far more than the methods do: only in pairs can a lead of 1 dB be seen.
    assert row.verdict == "ahead" and row.lead == pytest.approx(1) and row.lead_low == pytest.approx(1)
    assert judged.loc["reference", 2, "median", "cache"].verdict == "level"
    assert "converged" not in judged.index  # no plan is made for it


def test_a_plan_is_behind_where_a_rival_is_better():
    judged = arena.verdicts(table({"full": [90] * 9, "plan 2": [40] * 9, "25 steps": [41] * 9}), 50)
    assert set(judged.verdict) == {"behind"} and set(judged.budget) == {2}


def test_a_rival_has_its_best_setting_by_each_measure_and_a_plan_the_one_of_its_budget():
    steady, steep = [40, 40, 40, 40, 40], [50, 50, 50, 20, 20]
    own = table({"full": [90] * 5, "plan 2": [45] * 5, "plan 3": [49] * 5, "20 steps": steady, "25 steps": steep})
    judged = arena.verdicts(own, 50).set_index(["budget", "measure"])
    assert judged.method[2, "median"] == "25 steps" and judged.method[2, "5th percentile"] == "20 steps"
    assert set(judged.plan[2]) == {"plan 2"}  # although the one of three times fewer is better
    assert (3, "median") not in judged.index  # no rival is so fast


def test_the_strongest_rival_leaves_the_smallest_lead():
    own = table({"full": [90] * 5, "plan 2": [45] * 5, "25 steps": [40] * 5, "cache": [43] * 5})
    judged = arena.strongest(arena.verdicts(own, 50)).set_index(["budget", "measure"])
    assert judged.family[2, "median"] == "cache" and judged.lead[2, "median"] == pytest.approx(2)


def test_kinds_show_their_best_and_no_plan_for_another_target():
    own = table({"full": [90] * 5, "plan 2": [45] * 5, "other plan": [60] * 5, "25 steps": [40] * 5, "cache": [43] * 5})
    judged = arena.best_of_kinds(own, "reference").set_index(["budget", "kind"])
    assert judged["median"][2, "DQAR plan"] == pytest.approx(45)
    assert judged["median"][2, "best cache"] == pytest.approx(43) and (2, "fewer steps") in judged.index


def test_lossless_is_as_near_to_the_converged_solution_as_full_compute_in_median_and_tail():
    own = {"full": [44] * 5, "plan 2": [45] * 5, "plan 3": [50, 50, 50, 50, 30]}
    assert arena.lossless(table(own, "converged")) == 2
    assert math.isnan(arena.lossless(table({**own, "plan 2": [43] * 5}, "converged")))
    # Nearer in the median, but not for certain.
    assert math.isnan(arena.lossless(table({**own, "plan 2": [45, 45, 45, 43, 43]}, "converged")))


def test_photographs_stand_beside_other_runs_and_not_twice_in_their_own(tmp_path):
    beside = arena.of_photographs(Run("digits", 0, tmp_path))
    assert beside is not None and beside[0].profile.name == "cifar10" and beside[1].image.nunique() == 250
    assert arena.of_photographs(Run("cifar10", 0, tmp_path)) is None


def test_conditions_are_what_is_recorded_of_the_model_and_of_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "RECORDED", tmp_path / "recorded")
    digits, photographs = get_profile("digits"), get_profile("cifar10")
    guided = get_profile("digits", guidance_scale=4.0)
    conditions = [arena.Condition(*x) for x in ((digits, "dpm-solver++"), (guided, "ddim"), (photographs, "ddim"))]
    conditions.append(arena.Condition(photographs, "dpm-solver++", latents=True))
    for condition in reversed(conditions):
        name = f"{'latents' if condition.latents else 'arena'}-{slug(condition.sampler)}.parquet"
        path = tmp_path / "recorded" / condition.profile.label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(table({"full": [50, 50]}), path, provenance(condition.profile, 1))
    assert set(arena.conditions(Run("digits", 0, tmp_path))) == set(conditions)
    assert list(arena.conditions(Run("digits", 0, tmp_path)))[0] == conditions[0]
    assert set(arena.conditions(Run("cifar10", 0, tmp_path))) == set(conditions[2:])


def test_a_table_without_converged_errors_is_judged_by_the_reference_alone():
    own = table({"full": [90] * 5, "plan 2": [45] * 5, "25 steps": [40] * 5}).drop(columns="mse_converged")
    assert set(arena.verdicts(own, 50).target) == {"reference"}
    assert math.isnan(arena.lossless(own))


def test_latents_are_compared_before_the_decoder(tmp_path):
    profile = get_profile("cifar10", num_inference_steps=6, images=2, device="cpu")
    own, sampler = Recording(profile, tmp_path / "work", tmp_path / "out"), profile.scheduler
    path = pareto.plan_path(own.folder, sampler, "reference", 2)
    path.parent.mkdir()
    plan = pareto.extrapolated(profile, 5, 1, 1)  # steps 0 and 5
    dataclasses.replace(plan, provenance={"date": "Monday"}).save(path)
    methods = [m for m in pareto.contenders(profile, sampler, own.folder) if m.family == pareto.PLAN]
    few = Method("fewer steps: 2 of dpm-solver++", "fewer steps", num_inference_steps=2, scheduler=sampler)
    own.growing("arena-dpm-solver", pareto.comparisons(own, [few, *methods], sampler, ARENA_SEED, 2), ARENA_SEED, 2)
    vae = FULL.pipeline(profile).vae
    arena.record_latents(own)
    assert "decode" not in vars(vae)
    recorded = load_table(own.folder / "latents-dpm-solver.parquet")
    # Without the pipeline: the same noise through the scheduler.
    pipe, images = FULL.pipeline(profile), torch.arange(2)
    predict, ends = solvers.guided(pipe, profile.guidance_scale), []
    for steps in (6, 2):
        latents = first_latents(pipe, pipe.scheduler, ARENA_SEED, images)
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps:
            latents = pipe.scheduler.step(predict(latents, t, images).detach(), t, latents).prev_sample
        ends.append(latents.double())
    expected = (ends[0] - ends[1]).square().flatten(1).mean(1)
    found = recorded[recorded.method == few.name].mse.to_numpy()
    assert found == pytest.approx(expected.numpy(), rel=1e-3)
    assert set(recorded.method) == {few.name, *(m.name for m in methods)}
    assert set(arena.verdicts(recorded, 50).budget) == {2}
    # The plan's are measured anew when it was made anew.
    dataclasses.replace(pareto.extrapolated(profile, 3, 0, 1), provenance={"date": "Tuesday"}).save(path)
    arena.record_latents(own)
    before, after = (
        x.set_index(["family", "image"]).mse for x in (recorded, load_table(own.folder / "latents-dpm-solver.parquet"))
    )
    assert (before != after).groupby("family").all().to_dict() == {pareto.PLAN: True, few.family: False}


def test_nothing_is_before_the_decoder_of_a_model_of_pixels(tmp_path):
    own = recording(tmp_path)
    own.growing("arena-dpm-solver", {"full compute": lambda: table({"full": [50, 50]})}, 1, 2)
    arena.record_latents(own)
    assert not (own.folder / "latents-dpm-solver.parquet").exists()


def test_only_images_that_all_have_drawn_are_judged():
    own = table({"full": [90] * 6, "plan 2": [45, 45, 45, 10, 10, 10], "25 steps": [40] * 6})
    some = own[(own.family != pareto.PLAN) | (own.image < 3)]
    judged = arena.verdicts(some, 50)
    assert (
        arena.images(some, "reference") == 3 and set(judged.verdict) == {"ahead"} and (judged.lead.round(9) == 5).all()
    )


def test_errors_to_another_converged_solution_stand_beside_no_others():
    own = table({"full": [44] * 5, "plan 2": [45] * 5, "25 steps": [40] * 5}, "converged")
    assert set(arena.verdicts(own, 50).verdict) == {"ahead"}
    judge = own.family.map({FULL.name: pareto.CONVERGED_BY, pareto.PLAN: pareto.CONVERGED_BY, "fewer steps": "ddim"})
    mixed = own.assign(converged_by=judge)
    assert arena.verdicts(mixed, 50).empty
    assert arena.standings(mixed, "converged").method.tolist() == ["full", "plan 2"] and arena.lossless(mixed) == 2


def test_what_no_image_is_compared_with_is_not_measured():
    own = table({"full": [90] * 5, "plan 2": [45] * 5, "25 steps": [40] * 5}).assign(mse_converged=math.nan)
    assert arena.measured(own) == ["reference"] and set(arena.verdicts(own, 50).target) == {"reference"}
    assert math.isnan(arena.lossless(own))
    methods = [Method(name, family) for name, family in own[["method", "family"]].drop_duplicates().values]
    assert [method.name for method in arena.finalists(methods, own)] == ["full", "plan 2", "25 steps"]


def test_finalists_are_the_best_at_some_budget_and_the_plans_that_are_judged():
    own = {"20 steps": [41] * 2, "25 steps": [40] * 2, "cache": [43] * 2, "plan 2": [45] * 2, "full": [90] * 2}
    methods = [Method(name, family) for name, family in table(own)[["method", "family"]].drop_duplicates().values]
    chosen = [method.name for method in arena.finalists(methods, table(own))]
    assert chosen == ["full", "plan 2", "cache", "20 steps"]  # at 2x, 20 steps are better than 25: only those


def test_finalists_are_the_best_by_every_measure_that_is_judged():
    own = {"20 steps": [41] * 20, "25 steps": [45] * 18 + [20] * 2, "plan 2": [50] * 20, "full": [90] * 20}
    methods = [Method(name, family) for name, family in table(own)[["method", "family"]].drop_duplicates().values]
    assert {x.name for x in arena.finalists(methods, table(own))} == {"full", "plan 2", "20 steps", "25 steps"}


def recording(tmp_path):
    return Recording(get_profile("smoke"), tmp_path / "work", tmp_path / "out")


def test_an_arena_has_most_images_under_the_profiles_own_sampler_and_settings():
    sizes = Sizes(arena_images=2, headline_images=5)
    digits, others = (
        get_profile("digits"),
        [get_profile("digits", guidance_scale=4.0), get_profile("digits", batch_size=7)],
    )
    assert [arena.number_of_images(digits, sizes, sampler) for sampler in ("dpm-solver++", "ddim")] == [5, 2]
    assert [arena.number_of_images(other, sizes, "dpm-solver++") for other in others] == [2, 5]


def test_a_growing_table_measures_only_what_it_lacks_and_drops_what_nobody_asks_for(tmp_path):
    measured, own = [], recording(tmp_path)

    def part(name):
        measured.append(name)
        return pd.DataFrame({"method": [name] * 2, "mse": [1.0, 2.0]})

    def parts(*names):
        return {name: lambda name=name: part(name) for name in names}

    own.growing("arena-x", parts("a", "b"), 1, 2)
    grown = own.growing("arena-x", parts("c", "b"), 1, 2)
    assert measured == ["a", "b", "c"] and grown.method.tolist() == ["c", "c", "b", "b"]
    assert len(grown.attrs["provenance"]["sittings"]) == 2


def test_a_growing_table_measures_anew_what_does_not_hold_or_is_of_other_images(tmp_path):
    measured, own = [], recording(tmp_path)

    def parts(number):
        return {
            name: lambda name=name, number=number: measured.append(name) or pd.DataFrame({"method": [name] * number})
            for name, number in (("a", 2), ("b", 2), ("c", number))
        }

    own.growing("arena-x", parts(1), 1, 2)
    own.growing("arena-x", parts(2), 1, 2, lambda method, rows: method != "b" and len(rows) == 2)
    assert measured == ["a", "b", "c", "b", "c"]


def test_a_growing_table_keeps_what_was_measured_before_a_failure(tmp_path):
    own = recording(tmp_path)

    def fails():
        raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="power"):
        own.growing("arena-x", {"a": lambda: pd.DataFrame({"method": ["a"]}), "b": fails}, 1, 1)
    assert load_table(own.folder / "arena-x.parquet").method.tolist() == ["a"]


@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("seed, number", [(1, 3), (2, 2)])
def test_a_growing_table_of_other_images_is_refused_before_anything_is_drawn(tmp_path, names, seed, number):
    """Even if it lacks nothing: else 1,000 images would be asked for, and 200 told."""
    own, drawn = recording(tmp_path), []

    def part(name, number):
        return lambda: drawn.append(name) or pd.DataFrame({"method": name, "image": range(number)})

    own.growing("arena-x", {"a": part("a", 2)}, 1, 2)
    with pytest.raises(ValueError, match=f"2 images of seed 1, and {number} of seed {seed} are asked for"):
        own.growing("arena-x", {name: part(name, number) for name in names}, seed, number)
    assert drawn == ["a"]
    assert load_table(own.folder / "arena-x.parquet").method.tolist() == ["a", "a"]


def test_a_growing_table_of_another_model_is_refused(tmp_path):
    own = recording(tmp_path)
    other = get_profile("smoke", guidance_scale=3.0)
    save_table(pd.DataFrame({"method": ["a"]}), own.folder / "arena-x.parquet", provenance(other, 1))
    with pytest.raises(ValueError, match="guidance_scale 3.0"):
        own.growing("arena-x", {}, 1, 1)
