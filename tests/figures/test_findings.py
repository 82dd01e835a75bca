"""The answers below the notebooks, from tables so small that each number can be worked out by hand."""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from dqar.figures import findings
from dqar.figures.notebook import shows
from dqar.measure.results import Run


@pytest.fixture
def run(tmp_path):
    return Run("smoke", 0, tmp_path)


def gates(family, sites_reused, macs_speedup, psnr):
    return {
        "family": family,
        "target": "output",
        "sites_reused": sites_reused,
        "macs_speedup": macs_speedup,
        "psnr": psnr,
    }


@pytest.mark.parametrize("speedup, change", [(1.25, "-20%"), (0.8, "+25%")])
def test_claims_say_what_arithmetic_allows_and_what_a_gate_did_to_the_macs(run, speedup, change):
    table = pd.DataFrame([gates("deck's gate", 0.0, 0.95, math.inf), gates("calibrated", 0.4, speedup, 33.25)])
    said = findings.claims(run, table)
    # An attention of N = 256, d = 1152 takes 4Nd² + 2N²d of a block's 12Nd² + 2N²d: (4d + 2N) / (12d + 2N).
    share = (4 * 1152 + 2 * 256) / (12 * 1152 + 2 * 256)
    assert f"save at most {47 / 1400 * share:.1%}" in said and "1.2%" in said
    assert f"would save {share:.0%}" in said and "36%" in said
    assert "the deck's gate reuses 0% of the" in said
    assert f"reuses 40% and changes the MACs by {change}, with images at 33.2 dB" in said


def sites(entropy, snr):
    rows = [(step, e, s, 64) for step, (e, s) in enumerate(zip(entropy, snr, strict=True))]
    return pd.DataFrame(rows, columns=["step", "entropy", "snr", "tokens"])


def test_a_trace_that_falls_and_grows_is_said_to(run):
    gated = pd.DataFrame({"family": ["deck's gate", "calibrated"], "decision": ["compute", "reuse"]})
    said = findings.trace(run, sites([4.0, 3.5, 3.0], [0.5, 11, 200]), gated)
    assert said.startswith("Entropy falls: it starts at 4.0 nats and ends at 3.0, where the deck says 4.8 and 0.8")
    assert "64 tokens allow at most 4.16" in said  # ln 64
    assert "The SNR grows, from 0.5 to 200, and first passes 10 at step 1 of 3." in said
    assert "lowest entropy of a site is 3.0 nats, and the deck's gate at 2.0 nats reuses 0 times" in said


def test_a_trace_that_does_the_opposite_is_not_said_to_fall_or_grow(run):
    gated = pd.DataFrame({"family": ["deck's gate"] * 3, "decision": ["reuse", "reuse", "compute"]})
    said = findings.trace(run, sites([1.5, 2.0, 3.0], [9, 5, 1]), gated)
    assert said.startswith("Entropy does not fall: it starts at 1.5 nats and ends at 3.0")
    assert "The SNR does not grow, from 9.0 to 1, and never passes 10." in said
    assert "lowest entropy of a site is 1.5 nats, and the deck's gate at 2.0 nats reuses 2 times" in said


@pytest.mark.parametrize(
    "change, error, starts",
    [([1, 2, 3], [1, 2, 3], "Yes, somewhat"), ([1, 2, 3], [3, 2, 1], "No."), ([2, 1, 2], [1, 2, 3], "No.")],
)
def test_low_entropy_is_called_safe_only_if_both_errors_grow_with_it(run, change, error, starts):
    traced = pd.DataFrame({"step": [1, 1, 1], "layer": [0, 0, 0], "snr": [1, 2, 3], "entropy": [1, 2, 3]})
    labels = pd.DataFrame({"entropy": [1.0, 2.0, 3.0], "error": error})
    said = findings.gate(run, traced.assign(change=change), labels)
    rho = {(1, 2, 3): "+1.00", (3, 2, 1): "-1.00", (2, 1, 2): "+0.00"}  # Spearman's ρ with 1, 2, 3
    assert said.startswith(starts) and rho[tuple(change)] in said and rho[tuple(error)] in said


@pytest.mark.parametrize("psnr, verdict", [(40.0, "pays"), (34.0, "does not pay")])
@pytest.mark.parametrize("shallow, word", [(0.1, "calmer"), (0.3, "no calmer")])
def test_a_schedule_pays_only_where_it_beats_fewer_steps_at_equal_macs(run, psnr, verdict, shallow, word):
    rows = [(step, layer, {0: shallow, 1: 9.0, 2: 9.0, 3: 0.2}[layer]) for step in range(11) for layer in range(4)]
    traced = pd.DataFrame(rows, columns=["step", "layer", "change"])
    table = pd.DataFrame(
        [
            ("static 2", "output", 1.25, psnr),
            ("fewer steps", None, 1.5, 30.0),
            ("fewer steps", None, 1.0, 40.0),  # so 1.25× is half way: 35 dB
        ],
        columns=["family", "target", "macs_speedup", "psnr"],
    )
    said = findings.schedules(run, traced, table)
    assert said.startswith(f"Shallow layers are {word} than deep ones late in a run ({shallow:.0%} against 20%")
    assert f"A fixed schedule {verdict}: " in said and f"by -20%, with images at {psnr:.1f} dB" in said
    assert said.endswith("fewer steps at equal MACs give 35.0 dB.")


@pytest.mark.parametrize(
    "quality, fewest",
    [
        ((60, 45, 41), "2 bits are enough"),
        ((60, 45, 25), "4 bits are enough"),
        ((39, 30, 20), "no width below 16 bits"),
    ],
)
def test_the_fewest_bits_are_those_at_40_db(run, quality, fewest):
    rows = [("output", 16, "per_channel", math.inf, 4000)]
    for bits, psnr in zip((8, 4, 2), quality, strict=True):
        rows += [("output", bits, "per_channel", psnr - 3, 1100), ("output", bits, "per_channel fitted", psnr, 1200)]
    said = findings.quantized_cache(
        run, pd.DataFrame(rows, columns=["target", "bits", "mode", "psnr_cache", "cache_bytes"])
    )
    assert fewest in said and "8, 4 and 2 bits come to {} , {} and {} dB".replace(" ,", ",").format(*quality) in said
    assert run.profile.dtype.itemsize == 4 and "takes 0.55 of it" in said  # 1100 of FP16's 2000 bytes


def test_the_controllers_answers_are_counted_by_reason(run):
    reasons = ["reuse", "reuse", "entropy", "snr"]
    own = pd.DataFrame({"family": "calibrated", "target": "kv", "reason": reasons})
    others = pd.DataFrame({"family": ["calibrated", "deck's gate"], "target": ["output", "kv"], "reason": "schedule"})
    said = findings.controller(run, pd.concat([own, others]))
    assert "reused 50%, entropy too high 25%, SNR outside its window 25% (n = 4)" in said and "scheduled" not in said


@pytest.mark.parametrize(
    "rule, chance, policy, best, compared",
    [
        (1e-4, 1e-4, 1e-5, "The network.", "as good as chance"),
        (1e-3, 1e-4, 1e-5, "The network.", "10.0 dB worse than chance"),
        (1e-5, 1e-4, 1e-4, "The deck's rule.", "10.0 dB better than chance"),
        (1e-3, 1e-4, 1e-3, "Chance.", "10.0 dB worse than chance"),
    ],
)
def test_the_decider_with_the_best_images_is_named(run, rule, chance, policy, best, compared):
    rows = [
        ("output", method, share, image, mse * 2 * image, share)  # images 0 and 1: the mean is mse
        for method, mse in (("rule", rule), ("chance", chance), ("policy", policy))
        for share in (0.1, 0.3)
        for image in (0, 1)
    ]
    rows.append(("kv", "oracle", 0.2, 0, 1e-9, 0.2))  # of another target
    columns = ["target", "method", "wanted", "image", "mse", "sites_reused"]
    said = findings.policy(run, pd.DataFrame(rows, columns=columns))
    assert said.startswith(best) and compared in said and "measured errors" not in said
    assert (
        f"the network {-10 * math.log10(policy):.1f} dB" in said and f"chance {-10 * math.log10(chance):.1f} dB" in said
    )


@pytest.mark.parametrize(
    "kv, output, said_of_time",
    [(0.7, 0.8, "costs time here"), (1.2, 1.1, "saves time here"), (0.9, 1.1, "saves time in one form")],
)
def test_results_say_whether_the_decks_method_saves_time(run, kv, output, said_of_time):
    table = pd.DataFrame(
        [("DQAR rule", "kv", None, kv, 35.0, 1000), ("DQAR rule", "output", None, output, 36.0, 1000),
         ("DQAR plan", None, 2, 1.9, 54.7, 1000)],
        columns=["family", "target", "budget", "speedup", "psnr", "images"],
    )  # fmt: skip
    said = findings.results(run, table)
    assert said.startswith(f"The deck's own method {said_of_time}: a gate runs at {kv:.2f} (K and V) and {output:.2f}")
    assert "at 35.0 and 36.0 dB" in said and "1.90 times full speed, with images at 54.7 dB (n = 1,000" in said
    unmeasured = findings.results(run, table.assign(speedup=math.nan))
    assert unmeasured == "Speed is not measured yet for the profile smoke."


def test_conclusions_name_every_claim_under_its_verdict():
    verdicts = pd.DataFrame({"claim": ["a", "b", "c"], "verdict": ["holds", "does not hold", "holds"]})
    hopes = pd.DataFrame({"direction": ["d", "e"], "verdict": ["not testable here", "does not hold"]})
    said = findings.conclusions(verdicts, hopes)
    assert "these hold: “a”; “c”. These do not hold on this model: “b”. Not testable here: none." in said
    assert said.endswith("what holds: none; what does not: “e”; not testable here: “d”.")


def test_benchmarks_set_the_clock_beside_the_macs():
    rows = [
        ("step", method, family, "output", repeat, seconds, macs, 0)
        for method, family, seconds, macs in (
            ("untouched", "untouched", 1.0, 100.0),
            ("plan", "plan", 0.625, 50.0),  # 1.6× faster where the MACs promise 2×: 60 %
            ("slow", "gate", 1.25, 80.0),  # 0.8× where they promise 1.25×: -80 %
            ("entropy, exact", "entropy", 1.5, 100.0),
        )
        for repeat in range(3)
    ]
    columns = ["part", "method", "family", "target", "repeat", "seconds", "macs", "peak_bytes"]
    said = findings.benchmarks({"a CPU": pd.DataFrame(rows, columns=columns)})
    assert said.startswith(
        "On a CPU, the clock shows this much of the speedup that the MACs promise: gate -80%, plan 60%."
    )
    assert said.endswith("Looking at the entropy makes a step up to 1.50 times as long.")
    assert findings.benchmarks({}).startswith("Not measured yet")


@pytest.mark.parametrize(
    "plan, counts, lead",
    [(1e-5, (3, 0, 0), "+10.0"), (1e-4, (0, 3, 0), "+0.0"), (1e-3, (0, 0, 3), "-10.0")],
)
def test_plans_are_ahead_level_or_behind_as_they_were_measured(run, plan, counts, lead):
    rows = [
        (method, family, made_for, image, mse, mse, 4.0)
        for method, family, made_for, mse in (
            ("full compute", "full compute", None, 1e-9),
            ("plan", "DQAR plan", "reference", plan),
            ("rival", "TaylorSeer", None, 1e-4),
        )
        for image in range(3)
    ]
    columns = ["method", "family", "made_for", "image", "mse", "mse_converged", "macs_speedup"]
    said = findings.pareto(run, {"DPM": pd.DataFrame(rows, columns=columns)})
    # Three budgets, and one target: no plan was made for the other.
    numbers = "ahead of their rivals in {} of 3 comparisons, level in {}, behind in {}".format(*counts)
    for measure in ("median", "5th percentile"):
        assert f"In the {measure} of 3 images, DQAR's forecast plans are {numbers}" in said
    assert f"the smallest lead is {lead} dB, over TaylorSeer at 2×" in said
    without = pd.DataFrame(rows, columns=columns).query("family != 'DQAR plan'")
    assert findings.pareto(run, {"DPM": without}) == "No plan has been compared yet for the profile smoke."


def test_challenges_repeat_their_panels_finding(run):
    panel = SimpleNamespace(get_suptitle=lambda: "Balancing\nhelps")
    assert findings.challenges(run, panel).startswith("Balancing helps. The deck's τ(p) was not tested")
    gap = findings.challenges(run, SimpleNamespace(get_suptitle=lambda: ""))
    assert gap == "Not measured yet for the profile smoke: `dqar record --profile smoke`."


@pytest.mark.parametrize("answer", [findings.gate, findings.policy, findings.results, findings.pareto])
def test_an_answer_whose_table_is_missing_says_so_and_names_the_command(run, answer):
    tables = (None, None) if answer is findings.gate else (None,)
    assert answer(run, *tables).endswith("`dqar record --profile smoke` makes the tables.")


def test_a_notebooks_last_lines_are_its_answer_and_the_findings_of_its_figures():
    figure = plt.figure()
    figure.suptitle("Two\nlines")
    said = shows("It changes by -20%.", figure, plt.figure()).data
    plt.close("all")
    assert said == "## What this shows\n\n**It changes by −20%.**\n\n- Two lines."
