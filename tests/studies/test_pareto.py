import math

import pandas as pd
import pytest

from dqar.figures.pareto import SAMPLER_NAMES
from dqar.measure import metrics
from dqar.measure.results import RECORDED, load_table, slug
from dqar.models.profiles import get_profile
from dqar.peers.registry import SWEEPS
from dqar.studies import pareto
from dqar.studies.methods import CACHES, EXTRAPOLATIONS, Method, computed_steps, extrapolated, names_at


def points(rows):
    """A recorded table with one image per contender: family, settings, MACs, PSNR to both targets."""
    return pd.DataFrame(
        {
            "family": family,
            "settings": settings,
            "image": 0,
            "mse_reference": 10 ** (-reference / 10),
            "mse_converged": 10 ** (-converged / 10),
            "predicted": 1,
            "label": 1,
            "macs": macs,
            "cache_bytes": 0.0,
        }
        for family, settings, macs, reference, converged in rows
    )


TABLE = points(
    [
        ("full compute", "", 100, 120, 44),
        ("fewer steps", "25", 50, 40, 41),
        ("fewer steps", "10", 20, 30, 31),
        ("output extrapolation", "a", 50, 45, 42),
        ("output extrapolation", "b", 55, 39, 42),
        ("DQAR plan, reference", "2", 50, 50, 40),
        ("DQAR plan, reference", "3", 30, 46, 40),
        ("DQAR plan, converged", "2", 50, 43, 41.5),
        ("DQAR sites", "every 2", 50, 60, 60),
    ]
)


def test_summary_has_speed_and_decibels():
    found = pareto.summary(TABLE).set_index(["family", "settings"])
    assert found.macs_speedup["fewer steps", "10"] == 5
    assert found.psnr_reference["output extrapolation", "a"] == pytest.approx(45)
    assert found.psnr_converged["full compute", ""] == pytest.approx(44)
    assert found.accuracy.eq(1).all()


def test_the_mean_is_of_errors_not_of_decibels():
    two = pd.concat([TABLE, TABLE.assign(image=1, mse_reference=TABLE.mse_reference * 3)])
    found = pareto.summary(two)
    assert found.psnr_reference[1] == pytest.approx(40 - 10 * math.log10(2))


def test_the_frontier_leaves_out_what_is_beaten():
    own = pareto.summary(TABLE)
    line = pareto.frontier(own[own.family == "output extrapolation"], "reference")
    assert line.settings.tolist() == ["a"]
    line = pareto.frontier(own[own.family == "fewer steps"], "reference")
    assert line.settings.tolist() == ["25", "10"]


def test_verdicts_name_the_best_peer_and_what_its_quality_takes():
    verdicts = pareto.verdicts(pareto.summary(TABLE), (2, 4)).set_index(["target", "budget"])
    row = verdicts.loc["reference", 2]
    assert row.ours == pytest.approx(50) and row.peer == pytest.approx(45) and row.which == "output extrapolation: a"
    assert row.macs_needed == pytest.approx(30 / 50)  # 46 dB are enough, at 30 of the peer's 50 MACs
    row = verdicts.loc["converged", 2]
    assert row.ours == pytest.approx(41.5) and row.peer == pytest.approx(42) and math.isnan(row.macs_needed)
    assert list(pareto.verdicts(pareto.summary(TABLE), (99,)).columns) == [
        "target",
        "budget",
        "ours",
        "peer",
        "which",
        "macs_needed",
    ]
    assert pareto.site_points(None) is None and pareto.site_points(TABLE) is None  # nothing to draw
    row = verdicts.loc["reference", 4]
    assert math.isnan(row.ours) and row.which == "fewer steps: 10"


def test_the_best_of_each_family_at_a_budget():
    best = pareto.best_of_families(TABLE, "reference", (2, 3))
    assert best.loc["fewer steps"].tolist() == [40, 30]
    assert best.loc["output extrapolation"].tolist()[0] == 45 and math.isnan(best.loc["output extrapolation"].iloc[1])


@pytest.mark.parametrize("sampler", list(pareto.SAMPLERS))
def test_every_contender_has_a_name_of_its_own_and_all_families_are_there(sampler):
    found = pareto.contenders(get_profile("digits"), sampler)
    assert len({contender.name for contender in found}) == len(found)
    families = {contender.family for contender in found}
    assert families >= {"full compute", "fewer steps", "output extrapolation", "DQAR sites", *SWEEPS}
    assert len(
        {(c.method.peer, c.method.config, c.method.scheduler, c.method.num_inference_steps) for c in found}
    ) == len(found)


def test_a_measurement_counts_what_runs():
    """On the embedded model: the reference is its own target, and skipped steps cost no MACs."""
    profile = get_profile("smoke", num_inference_steps=4, batch_size=2)
    wanted = pareto.targets(profile, "ddim", 2)
    full = pareto.measure(pareto.Contender("full compute", "", Method(scheduler="ddim")), profile, wanted)
    assert full.mse_reference.eq(0).all() and full.mse_converged.gt(0).all() and len(full) == 2
    found = {c.settings: c for c in pareto.contenders(profile, "ddim") if c.family == "output extrapolation"}
    skipping = pareto.measure(found["every 3, last 1, order 1, ddim"], profile, wanted)
    assert skipping.macs[0] == pytest.approx(full.macs[0] / 2, rel=1e-4) and skipping.mse_reference.gt(0).all()
    assert skipping.cache_bytes[0] == 2 * 2 * 64 * 4  # two outputs, two branches
    assert computed_steps(profile, 2) == 2 and computed_steps(profile, 4) == 2


@pytest.mark.parametrize("budget", list(EXTRAPOLATIONS))
def test_extrapolation_beside_a_plan_saves_as_much(budget):
    rival = extrapolated(get_profile("digits"), *EXTRAPOLATIONS[budget])
    assert budget <= rival.macs_speedup < 1.5 * budget and 49 in rival.computed


def test_what_is_drawn_beside_a_plan_is_the_best_that_was_recorded():
    profile = get_profile("digits")
    points = pareto.summary(load_table(RECORDED / "digits" / "pareto-dpm-solver.parquet"))
    methods = {(c.family, c.settings): c.method for c in pareto.contenders(profile, "dpm-solver++")}
    for budget, settings in EXTRAPOLATIONS.items():
        within = points[points.macs_speedup >= budget * 0.999].sort_values("psnr_reference", ascending=False)
        cache = within[within.family.isin(SWEEPS)].iloc[0]
        assert methods[cache.family, cache.settings] == Method(peer=CACHES[budget], scheduler="dpm-solver++")
        line = within[within.family == "output extrapolation"].iloc[0]
        assert methods[line.family, line.settings].config == extrapolated(profile, *settings)


@pytest.mark.parametrize("sampler", list(pareto.SAMPLERS))
def test_the_readme_says_what_was_recorded(sampler):
    verdicts = pareto.verdicts(pareto.summary(load_table(RECORDED / "digits" / f"pareto-{slug(sampler)}.parquet")))
    text = (RECORDED.parent / "README.md").read_text()
    for target, where in (("reference", "50-step reference"), ("converged", "converged solution")):
        own = verdicts[verdicts.target == target]
        numbers = " | ".join(f"{row.ours:.1f} / {row.peer:.1f}" for row in own.itertuples())
        assert f"| {SAMPLER_NAMES[sampler]}, to the {where} | {numbers} |" in text


def test_the_readme_says_what_the_plans_save_in_time():
    profile, speed = get_profile("digits"), load_table(RECORDED / "digits" / "speed.parquet")
    speedups = metrics.speedups(speed, "full compute").speedup
    numbers = " | ".join(f"{speedups[names_at(profile, budget)['DQAR plan']]:.2f}×" for budget in EXTRAPOLATIONS)
    row = f"| speedup by DPM-Solver++'s plans to the reference, two cores | {numbers} |"
    assert row in (RECORDED.parent / "README.md").read_text()
