import dataclasses
import math

import pandas as pd
import pytest

from dqar.figures.pareto import SAMPLER_NAMES, SIGNS
from dqar.forecast.plan import ForecastPlan
from dqar.measure.results import RECORDED, Run, load_table, slug
from dqar.models.profiles import get_profile
from dqar.peers.registry import RIVALS
from dqar.studies import arena, pareto, results
from dqar.studies.compare import FULL, OURS, Method
from dqar.studies.recording import PARETO_SEED, Recording

COLUMNS = {"image": 0, "predicted": 1, "label": 1, "cache_bytes": 0.0, "schedule": "all", "target": "block"}


def points(rows):
    """A recorded table with one image per contender: family, target that it is made for, MACs, PSNR to both."""
    table = pd.DataFrame(rows, columns=["method", "family", "made_for", "macs", "reference", "converged"])
    errors = {"mse": 10 ** (-table.reference / 10), "mse_converged": 10 ** (-table.converged / 10)}
    table = table.assign(**errors, macs_speedup=table.macs.iloc[0] / table.macs, **COLUMNS)
    return table.assign(interval=2, order=1, bits=8, converged_by=pareto.CONVERGED_BY)


TABLE = points(
    [
        ("full compute", "full compute", None, 100, 120, 44),
        ("25 steps", "fewer steps", None, 50, 40, 41),
        ("10 steps", "fewer steps", None, 20, 30, 31),
        ("a", "output extrapolation", None, 50, 45, 42),
        ("b", "output extrapolation", None, 55, 39, 42),
        ("plan of 2", "DQAR plan", "reference", 50, 50, 40),
        ("plan of 3", "DQAR plan", "reference", 30, 46, 40),
        ("converged plan of 2", "DQAR plan", "converged", 50, 43, 41.5),
        ("every 2", "DQAR sites", None, 50, 60, 60),
        ("learned", "bespoke solver", "converged", 45, 55, 41.8),
    ]
)


def test_summary_has_speed_and_decibels():
    points = pareto.summary(TABLE).set_index("method")
    assert points.macs_speedup["10 steps"] == 5
    assert points.psnr_reference["a"] == pytest.approx(45) and points.psnr_converged["full compute"] == pytest.approx(
        44
    )
    assert points.class_accuracy.eq(1).all()


def test_the_mean_is_of_errors_not_of_decibels():
    two = pd.concat([TABLE, TABLE.assign(image=1, mse=TABLE.mse * 3)])
    points = pareto.summary(two)
    assert points.psnr_reference[1] == pytest.approx(40 - 10 * math.log10(2))


def test_points_inside_the_blocks_are_drawn_only_if_all_are_there():
    assert pareto.site_points(None) is None and pareto.site_points(TABLE) is None
    settings = [(interval, *kind) for interval, kinds in pareto.SITE_KINDS.items() for kind in kinds]
    rows = [
        TABLE.iloc[:1].assign(
            **{"method": f"{interval} {order} {bits}", "family": pareto.SITES, "schedule": "static", "target": "block"},
            **{"interval": interval, "order": order, "bits": bits},
        )
        for interval, order, bits in settings
    ]
    points = pareto.site_points(pd.concat(rows))
    assert list(zip(points.interval, points.order, points.bits, strict=True)) == settings
    assert pareto.site_points(pd.concat(rows[1:])) is None


@pytest.mark.parametrize("sampler", list(pareto.SAMPLERS))
def test_every_contender_has_a_name_of_its_own_and_all_families_are_there(sampler):
    methods = pareto.contenders(get_profile("digits"), sampler, RECORDED / "digits")
    assert len({method.name for method in methods}) == len(methods)
    families = {method.family for method in methods}
    families -= {*pareto.SOLVERS.values()}  # as far as they are recorded
    assert families == {"full compute", "fewer steps", "output extrapolation", "DQAR sites", "DQAR plan", *RIVALS}
    assert len({(m.peer, m.config, m.scheduler, m.num_inference_steps, m.solver) for m in methods}) == len(methods)
    table = load_table(RECORDED / "digits" / f"pareto-{slug(sampler)}.parquet")
    # Later rivals wait for the next recording: all that is recorded is one of these.
    assert {*table.method} <= {method.name for method in methods}
    facts = table.drop_duplicates("method").set_index("method")
    for method in (method for method in methods if method.name in facts.index):
        columns = method.columns()
        unrecorded = ("method", "made")  # when plans were made wasn't recorded from the start
        assert all(facts[name][method.name] == value for name, value in columns.items() if name not in unrecorded)


@pytest.mark.parametrize("sampler, targets", [("dpm-solver++", 2), ("ddim", 1)])
def test_a_measurement_counts_what_runs(tmp_path, sampler, targets):
    """On the embedded model: the reference is its own target, and skipped steps cost no MACs."""
    profile = get_profile("smoke", num_inference_steps=4)
    skipping = {m.name: m for m in pareto.extrapolations(profile, sampler)}[
        f"output extrapolation: every 3, last 1, order 1, {sampler}"
    ]
    full = pareto.contenders(profile, sampler, tmp_path)[0]
    recording = Recording(profile, tmp_path / "work", tmp_path / "out")
    parts = pareto.comparisons(recording, [full, skipping], sampler, PARETO_SEED, 2)
    full, table = (measure() for measure in parts.values())
    assert "features" not in table and table.fd.nunique() == 1
    assert full.mse.eq(0).all() and len(full) == 2
    assert len([name for name in full if name.startswith("mse")]) == targets
    if targets == 2:
        assert full.mse_converged.gt(0).all() and set(table.converged_by) == {pareto.CONVERGED_BY}
    assert all(pareto.holds([skipping], pareto.targets(sampler))(skipping.name, rows) for rows in (full, table))
    assert table.macs[0] == pytest.approx(full.macs[0] / 2, rel=1e-4) and table.mse.gt(0).all()
    assert table.cache_bytes[0] == 2 * 2 * 64 * 4  # two outputs, two branches
    assert pareto.computed_steps(profile, 2) == 2 and pareto.computed_steps(profile, 4) == 2


def test_rows_hold_until_a_plan_is_made_anew_or_the_converged_solution_is_drawn_otherwise():
    plan = ForecastPlan(((),), frozenset({0}), (1.0,), (1.0, 1.0), 1, "", (), {"date": "Tuesday"})
    methods, judge = [FULL, Method("plan", config=plan)], {"converged_by": [pareto.CONVERGED_BY] * 2}
    holds, of_ddim = (pareto.holds(methods, pareto.targets(sampler)) for sampler in ("dpm-solver++", "ddim"))
    for method in (method.name for method in methods):
        now, early = pd.DataFrame({**judge, "made": ["Tuesday"] * 2}), pd.DataFrame(judge)
        assert holds(method, now) and holds(method, early)  # early rows don't say when
        for other in (early.drop(columns="converged_by"), early.assign(converged_by=[pareto.CONVERGED_BY, None])):
            assert not holds(method, other) and of_ddim(method, other)
    assert not holds("plan", now.assign(made="Monday")) and holds(FULL.name, now.assign(made=None))


def test_the_converged_solution_is_nearer_to_many_more_steps_than_other_samplers_with_as_many():
    profile = get_profile("smoke", num_inference_steps=6)
    judge = pareto.converged(profile)
    many = [Method(name, scheduler=name, num_inference_steps=150) for name in ("dpm-solver++", pareto.CONVERGED_BY)]
    others = [dataclasses.replace(judge, scheduler=name) for name in pareto.SAMPLERS]
    near, *far = (method.draw(profile, 0, num_samples=3).images for method in (judge, *others))
    for method in many:  # whether these are even in time or in log-SNR
        truth = method.draw(profile, 0, num_samples=3).images
        assert all((near - truth).square().mean() < (other - truth).square().mean() / 2 for other in far)


def test_what_is_drawn_beside_a_plan_saves_as_much_and_is_the_best_that_was_recorded():
    points = pareto.summary(load_table(RECORDED / "digits" / "pareto-dpm-solver.parquet"))
    for method in results.methods(get_profile("digits"), RECORDED / "digits"):
        if method.budget and method.family not in ("fewer steps", *OURS):
            within = points[(points.macs_speedup.round(2) >= method.budget) & points.family.isin([method.family])]
            best = within.loc[within.psnr_reference.idxmax()]
            assert best.scheduler == method.scheduler and method.budget <= 1.001 * best.macs_speedup
            if method.peer is not None:
                assert all(f"{key} {value}" in best.method for key, value in method.peer.settings)


def test_recorded_plans_are_found(tmp_path):
    made = pareto.made_plans(Run("digits", 0, tmp_path))
    assert len(made) == 3 and all(plans[0].macs_speedup < plans[-1].macs_speedup for plans in made.values())


COMPARED = [("digits", sampler, name) for sampler, name in SAMPLER_NAMES.items()]
COMPARED += [("digits-guidance-scale-4-0", "dpm-solver++", "guidance 4"), ("cifar10", "dpm-solver++", "photographs")]


@pytest.mark.parametrize("profile, sampler, name", COMPARED)
def test_the_readme_says_what_was_recorded(profile, sampler, name):
    path = RECORDED / profile / f"arena-{slug(sampler)}.parquet"
    text = (RECORDED.parent / "README.md").read_text()
    if not path.exists():
        assert f"| {name}, to the" not in text
        return
    table = load_table(path)
    strongest = arena.strongest(arena.verdicts(table)).set_index(["target", "measure"])
    for target, where in (("reference", "the 50-step reference"), ("converged", "the converged solution")):
        if target not in strongest.index:  # not measured
            assert f"| {name}, to {where}" not in text
            continue
        for measure in arena.JUDGED if name == SAMPLER_NAMES["dpm-solver++"] else arena.SHOWN:
            rows = strongest.loc[(target, measure)].itertuples()
            numbers = " | ".join(f"{row.ours:.1f} / {row.theirs:.1f} {SIGNS[row.verdict]}" for row in rows)
            assert f"| {name}, to {where}, {measure} | {numbers} |" in text


def test_the_readme_says_how_many_rivals_were_drawn(tmp_path):
    table = load_table(RECORDED / "digits/arena-dpm-solver.parquet")
    verdicts = arena.shown(arena.verdicts(table))
    [drawn, *counts] = [verdicts.family.nunique(), *verdicts.groupby("budget").family.nunique()]
    caches = drawn - len({"fewer steps", "output extrapolation", *pareto.SOLVERS})
    fastest = arena.fastest(Run("digits", 0, tmp_path))
    slow = set(fastest.index[fastest < 2])
    rivals = {"fewer steps", "output extrapolation", *pareto.SOLVERS.values(), *pareto.RIVALS} - slow
    texts = ((RECORDED.parent / name).read_text() for name in ("README.md", "docs/rivals.md"))
    said = " ".join(" ".join(texts).split())
    assert drawn == len(rivals) and f"All {drawn} rivals that reach 2× have been drawn on so many images" in said
    number, converged = (arena.images(table, target) for target in ("reference", "converged"))
    assert f"(left, of {number:,} images) or to the converged solution (right, of {converged:,})" in said
    assert f"n = {number:,} held-out images of the embedded model under DPM-Solver++ at guidance 2, of which" in said
    assert f"of which {converged} are compared with the converged solution" in said
    assert all(f"{name} reaches {fastest[name]:.2f}× at most" in said for name in slow & {*pareto.RIVALS})
    near, converged = (set(verdicts[verdicts.target == target].family) for target in arena.ERRORS)
    assert near - converged == {"LeMiCa", "BudCache"}
    assert f"two learned solvers and {caches} caches; LeMiCa and BudCache aren't compared with the converged" in said
    assert "{} stand in the comparison at 2×, {} at 3× and {} at 4×".format(*counts) in said
