"""Verdicts in titles, from tables so small that each can be judged by eye."""

import json

import pandas as pd
import pytest

from dqar.figures import conclusions, pareto, results, schedules
from dqar.measure.results import Run
from dqar.studies.pareto import CONVERGED_BY
from dqar.studies.schedules import settling


def changes(shallow, deep):
    """28 layers: 0 to 2 change by ``shallow``, 13 to 27 by ``deep``, each early and later; the rest by 0.2."""
    rows = []
    for step in range(1, 50):
        late = step / 49 >= 0.3
        rows += [
            (step, layer, shallow[late] if layer < 3 else deep[late] if layer > 12 else 0.2) for layer in range(28)
        ]
    return pd.DataFrame(rows, columns=["step", "layer", "change"])


@pytest.mark.parametrize(
    "shallow, deep, verdict",
    [
        (
            (0.12, 0.07),
            (0.15, 0.16),
            "do stabilise first (12% change a step early, 7% late); deep ones do not (15%, 16%)",
        ),
        ((0.17, 0.07), (0.15, 0.10), "are calmest only late (17% change a step early, 7% late); deep ones do too (15%"),
        ((0.12, 0.17), (0.15, 0.10), "do not stabilise first"),
    ],
)
def test_whether_shallow_layers_stabilise_first_is_said(shallow, deep, verdict):
    settled = settling(changes(shallow, deep), 50)
    assert settled.loc["shallow"].tolist() == [shallow[0], shallow[1], shallow[1]]
    assert settled.loc["middle"].eq(0.2).all() and settled.columns.tolist() == ["early", "middle", "late"]
    assert f"Shallow layers {verdict}" in schedules.settling_in_words(settled)


@pytest.mark.parametrize(
    "low, high, said",
    [
        (-0.4, 0.1, "moves FD-digits by no measurable amount (−0.40 to +0.10)"),
        (-0.4, -0.3, "moves FD-digits by −0.35 (−0.40 to −0.30)"),
    ],
)
def test_a_distance_has_moved_only_where_the_interval_of_pairs_leaves_out_zero(low, high, said):
    ours = pd.Series({"fd_growth": -0.35, "fd_growth_low": low, "fd_growth_high": high})
    assert results.compared(ours, "FD-digits").endswith(said)


@pytest.mark.parametrize(
    "verdicts, said",
    [
        (["holds", "does not hold"], "1 holds here, 1 does not, 0 can't be tested here"),
        (
            ["holds", "holds", "not certain", "not testable here"],
            "2 hold here, 0 do not, 1 is not certain, 1 can't be tested here",
        ),
    ],
)
def test_what_is_not_certain_is_counted_apart_and_has_a_mark_of_its_own(tmp_path, verdicts, said):
    run = Run("smoke", 0, tmp_path)
    conclusions.slide16(run, pd.DataFrame({"direction": "x", "deck": "y", "verdict": verdicts, "measured": "z"}))
    sidecar = json.loads((run.figures / "deck/slide16.json").read_text())
    assert sidecar["title"] == f"Of {len(verdicts)} hopes for future work, {said}"
    marks = [row[2] for row in sidecar["table"]["rows"]]
    assert marks.count("=") == verdicts.count("not certain") and "=: " in sidecar["note"]


@pytest.mark.parametrize(
    "leads, verdicts, said",
    [
        ([3.04, 5.0], ["ahead", "ahead"], "are ahead of the strongest rival by 3.0 dB or more, in 2 conditions"),
        (
            [3.0, -1.0],
            ["ahead", "level"],
            "are ahead of the strongest rival in 1 of 2 comparisons, level in 1, behind in 0, in 2 conditions",
        ),
    ],
)
def test_the_smallest_lead_is_told_only_where_plans_are_ahead_everywhere(leads, verdicts, said):
    table = pd.DataFrame({"condition": ["digits", "photographs"], "lead": leads, "verdict": verdicts, "latents": False})
    assert pareto.leads_in_words(table).endswith(said)
    # Latents are of images that are counted already.
    same_images = pd.DataFrame({"condition": "latents", "lead": [0.1], "verdict": ["level"], "latents": True})
    assert pareto.leads_in_words(pd.concat([table, same_images])).endswith(said + "; in latents ahead in 0 of 1")


def test_two_samplers_stand_in_one_table_under_one_title(tmp_path):
    """One is drawn as the other is: twice the comparisons, and the smallest lead is one."""
    rows = [
        (method, family, made_for, image, mse, mse, 4.0)
        for method, family, made_for, mse in (
            ("full compute", "full compute", None, 1e-9),
            ("plan", "DQAR plan", "reference", 1e-5),
            ("rival", "TaylorSeer", None, 1e-4),
        )
        for image in range(3)
    ]
    columns = ["method", "family", "made_for", "image", "mse", "mse_converged", "macs_speedup"]
    run, table = Run("digits", 0, tmp_path), pd.DataFrame(rows, columns=columns).assign(converged_by=CONVERGED_BY)
    pareto.slide12_pareto(run, {"dpm-solver++": table, "ddim": table})
    sidecar = json.loads((run.figures / "appendix/slide12_pareto.json").read_text())
    assert sidecar["title"].startswith("On digits, DQAR's plans are ahead of 1 rivals at 2×")
    assert "by 10.0 dB (10.0 to 10.0) or more" in sidecar["title"] and len(sidecar["table"]["rows"]) == 4
    assert sidecar["note"].endswith("n = 3")


@pytest.mark.parametrize("sampler, said", [("dpm-solver++", "not measured"), ("ddim", "not compared under DDIM")])
def test_where_the_converged_solution_was_not_measured_a_front_says_so(tmp_path, sampler, said):
    errors = {"full compute": 1e-9, "DQAR plan": 1e-5, "TaylorSeer": 1e-4}
    rows = [(name, i, mse) for name, mse in errors.items() for i in range(3)]
    table = pd.DataFrame(rows, columns=["family", "image", "mse"]).assign(macs_speedup=2.0, fd=1.0)
    table["made_for"] = table.family.map({"DQAR plan": "reference"})
    [figure] = pareto.slide13_fronts(Run("cifar10", 0, tmp_path), {sampler: table.assign(method=table.family)})
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert shown == [[], [said], []] and figure.axes[0].lines and not figure.axes[1].lines
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        "to the 50-step reference, n = 3",
        "to the converged solution",
    ]


def test_a_front_says_what_it_is_to_and_of_how_many_images(tmp_path):
    """Only some images are compared with the converged solution, and none with the one before it was chosen."""
    errors = {"full compute": 1e-9, "DQAR plan": 1e-5, "TaylorSeer": 1e-4}
    rows = [(name, i, mse, mse if i < 2 else None) for name, mse in errors.items() for i in range(4)]
    table = pd.DataFrame(rows, columns=["family", "image", "mse", "mse_converged"]).assign(macs_speedup=2.0)
    for made_for in ("reference", "converged"):
        table["made_for"] = table.family.map({"DQAR plan": made_for})
        before = table.assign(method=table.family)
        now = before.assign(converged_by=before.mse_converged.notna().map({True: CONVERGED_BY, False: None}))
        for shown, number in ((before, ""), (now, ", n = 2")):
            [figure] = pareto.slide13_fronts(Run("cifar10", 0, tmp_path), {"dpm-solver++": shown})
            assert [axes.get_title() for axes in figure.axes[:2]] == [
                "to the 50-step reference, n = 4",
                f"to the converged solution{number}",
            ]


def test_a_title_counts_the_rivals_under_each_sampler_and_target(tmp_path):
    """Two samplers, of unlike rivals and images; a solver stands beside plans for its own target alone."""
    run, tables = Run("digits", 0, tmp_path), {}
    for sampler, rivals, images in (("dpm-solver++", ("TaylorSeer", "SeaCache"), 4), ("ddim", ("SeaCache",), 3)):
        errors = {"full compute": 1e-9, "plan": 1e-5, "converged plan": 1e-5, "solver": 1e-4}
        errors |= dict.fromkeys(rivals, 1e-4)
        rows = [(name, i, mse, mse) for name, mse in errors.items() for i in range(images)]
        table = pd.DataFrame(rows, columns=["method", "image", "mse", "mse_converged"])
        families = {"plan": "DQAR plan", "converged plan": "DQAR plan", "solver": "bespoke solver"}
        table["family"] = table.method.replace(families)
        table["made_for"] = table.method.map(
            {"plan": "reference", "converged plan": "converged", "solver": "converged"}
        )
        tables[sampler] = table.assign(macs_speedup=2.0, converged_by=CONVERGED_BY)
    of_two = tables["dpm-solver++"].image >= 2  # whose features were kept
    distances = tables["dpm-solver++"].family.map({"DQAR plan": 1.5, "SeaCache": 0.5})
    tables["dpm-solver++"]["fd"] = distances.where(of_two)
    pareto.slide12_pareto(run, tables)
    written = (run.figures / "appendix/slide12_pareto.md").read_text().splitlines()
    [seacache, other] = [row for row in written if "reference" in row and "SeaCache" in row and "median" in row]
    assert "FD-digits: plan / rival (images)" in written[0] and seacache.split("|")[-2].strip() == "1.50 / 0.50 (2)"
    assert other.split("|")[-2].strip() == "–"
    sidecar = json.loads((run.figures / "appendix/slide12_pareto.json").read_text())
    assert "ahead of 1 to 3 rivals at 2×, in the median" in sidecar["title"] and sidecar["note"].endswith("n = 4 and 3")


def test_a_title_says_how_many_rivals_are_drawn_so_far(tmp_path, monkeypatch):
    """Of those that are as fast as the least budget in some setting."""
    monkeypatch.setattr(pareto.arena, "fastest", lambda _run: pd.Series({"PAB": 1.5, "SeaCache": 2.0, "DQAR plan": 5}))
    run = Run("digits", 0, tmp_path)
    table = pd.DataFrame({"family": ["full compute", "fewer steps", "SeaCache", "DQAR plan"]})
    rivals = len({"fewer steps", "output extrapolation", *pareto.pareto.SOLVERS.values(), *pareto.RIVALS}) - 1
    assert pareto.rivals_drawn(run, [table]) == f" (2 of {rivals} rivals drawn so far, no learned solver)"
    assert (
        pareto.rivals_drawn(run, [table, pd.DataFrame({"family": ["bespoke solver"]})])
        == f" (3 of {rivals} rivals drawn so far)"
    )
