"""The answers below the notebooks, from tables so small that each number can be worked out by hand."""

import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from dqar.figures import findings
from dqar.figures.notebook import shows
from dqar.measure.results import Run
from dqar.studies import policy as policy_study
from dqar.studies.pareto import CONVERGED_BY


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


@pytest.mark.parametrize("speedup, change", [(1.25, "saves 20% of the MACs"), (0.8, "takes 25% more MACs")])
def test_claims_say_what_arithmetic_allows_and_what_a_gate_did_to_the_macs(run, speedup, change):
    table = pd.DataFrame([gates("deck's gate", 0.0, 0.95, math.inf), gates("calibrated", 0.4, speedup, 33.25)])
    said = findings.claims(run, table)
    # An attention of N = 256, d = 1152 takes 4Nd² + 2N²d of a block's 12Nd² + 2N²d: (4d + 2N) / (12d + 2N).
    share = (4 * 1152 + 2 * 256) / (12 * 1152 + 2 * 256)
    assert f"save at most {47 / 1400 * share:.1%}" in said and "1.2%" in said
    assert f"would save {share:.0%}" in said and "36%" in said
    assert "the deck's gate reuses 0% of the" in said
    assert f"reuses 40% and {change}, with images at 33.2 dB" in said


def sites(entropy, snr):
    rows = [(step, e, s, 64) for step, (e, s) in enumerate(zip(entropy, snr, strict=True))]
    return pd.DataFrame(rows, columns=["step", "entropy", "snr", "tokens"])


def test_a_trace_that_falls_and_grows_is_said_to(run):
    gated = pd.DataFrame({"family": ["deck's gate", "calibrated"], "decision": ["compute", "reuse"]})
    said = findings.trace(run, sites([4.0, 3.5, 3.0], [0.5, 11, 200]), gated)
    assert said.startswith(
        "Entropy falls: it starts at 4.00 nats, ends at 3.00 and falls in 100% of the steps; the deck says from 4.8 to "
    )
    assert "64 tokens allow at most 4.16" in said  # ln 64
    assert "The SNR grows, from 0.5 to 200, and first passes 10 at step 1 of 3." in said
    assert (
        "lowest entropy of a site is 3.0 nats (mean of 4 images), and the deck's gate at 2.0 nats reuses 0 times"
        in said
    )


def test_a_trace_that_rises_in_between_is_not_said_to_fall_steadily(run):
    gated = pd.DataFrame({"family": ["deck's gate"], "decision": ["compute"]})
    said = findings.trace(run, sites([4.0, 3.0, 3.5], [1, 2, 3]), gated)
    assert said.startswith("Entropy falls, but not steadily: ") and "falls in 50% of the steps" in said


def test_a_trace_that_does_the_opposite_is_not_said_to_fall_or_grow(run):
    gated = pd.DataFrame({"family": ["deck's gate"] * 3, "decision": ["reuse", "reuse", "compute"]})
    said = findings.trace(run, sites([1.5, 2.0, 3.0], [9, 5, 1]), gated)
    assert said.startswith("Entropy does not fall: it starts at 1.50 nats, ends at 3.00 and falls in 0% of the steps")
    assert "The SNR does not grow, from 9.0 to 1 after a low of 1.0 at step 2, and never passes 10." in said
    assert (
        "lowest entropy of a site is 1.5 nats (mean of 4 images), and the deck's gate at 2.0 nats reuses 2 times"
        in said
    )


@pytest.mark.parametrize(
    "change, error, held, starts",
    [
        ([1, 2, 3], [1, 2, 3], 0.5, "Yes, somewhat"),
        ([1, 2, 3], [3, 2, 1], 0.5, "No."),
        ([2, 1, 2], [1, 2, 3], 0.5, "No."),
        ([1, 2, 3], [1, 2, 3], -0.5, "No."),
    ],
)
def test_low_entropy_is_called_safe_only_if_both_errors_grow_with_it(run, change, error, held, starts, monkeypatch):
    monkeypatch.setattr(policy_study, "partial_correlation", lambda *_: held)
    traced = pd.DataFrame({"step": [1, 1, 1], "layer": [0, 0, 0], "snr": [1, 2, 3], "entropy": [1, 2, 3]})
    labels = pd.DataFrame({"entropy": [1.0, 2.0, 3.0], "error": error, "image": [0, 0, 1]})
    said = findings.gate(run, traced.assign(change=change), labels)
    rho = {(1, 2, 3): "+1.00", (3, 2, 1): "-1.00", (2, 1, 2): "+0.00"}  # Spearman's ρ with 1, 2, 3
    assert said.startswith(starts) and rho[tuple(change)] in said and rho[tuple(error)] in said
    assert f"with step and SNR held fixed {held:+.2f}" in said


@pytest.mark.parametrize("psnr, verdict", [(40.0, "pays"), (34.0, "does not pay")])
@pytest.mark.parametrize(
    "early, late, word",
    [(0.1, 0.1, "Yes"), (0.3, 0.1, "No"), (0.1, 0.3, "No")],
)
def test_a_schedule_pays_only_where_it_beats_fewer_steps_at_equal_macs(run, psnr, verdict, early, late, word):
    steps = run.profile.num_inference_steps
    first, last = math.ceil(0.3 * (steps - 1)), math.ceil(0.7 * (steps - 1))
    # Of four layers the deck reuses 0 at once, and 2 and 3 last.
    rows = [
        (step, layer, {0: early if step < first else late if step >= last else 9.0, 1: 9.0}.get(layer, 0.2))
        for step in range(steps)
        for layer in range(4)
    ]
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
    assert said.startswith(f"{word}, shallow layers")
    assert f"they change by {early:.0%} a step and deep layers by 20%, in the last 30% by {late:.0%} and 20%" in said
    assert f"A fixed schedule {verdict}: " in said and f"saves 20% of the MACs, with images at {psnr:.1f} dB" in said
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
    rows.append(("kv", 8, "mixed", 99, 3000))  # K in FP16: no cache of 8 bits
    columns = ["target", "bits", "mode", "median", "cache_bytes"]
    said = findings.quantized_cache(run, pd.DataFrame(rows, columns=columns).assign(images=9))
    assert fewest in said and "8, 4 and 2 bits come to {}, {} and {} dB (n = 9)".format(*quality) in said
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
        (1e-4, 1e-4, 1e-5, "The network.", "no better than chance here (+0.0 dB, +0.0 to +0.0)"),
        (1e-3, 1e-4, 1e-5, "The network.", "worse than chance here (-10.0 dB, -10.0 to -10.0)"),
        (1e-5, 1e-4, 1e-4, "The deck's rule.", "better than chance here (+10.0 dB, +10.0 to +10.0)"),
        (1e-3, 1e-4, 1e-3, "Chance.", "worse than chance here (-10.0 dB, -10.0 to -10.0)"),
    ],
)
@pytest.mark.parametrize(
    "without, helps",
    [(0.5, "Entropy helps the network:"), (0.89, "Entropy helps the network little:"), (0.95, "Entropy does not help")],
)
def test_the_decider_with_the_best_images_is_named(
    run, rule, chance, policy, best, compared, without, helps, monkeypatch
):
    areas = {None: 0.9, "entropy": without}
    monkeypatch.setattr(
        policy_study, "study", lambda *_, omit, seed: SimpleNamespace(auc=lambda: areas[omit] + 0.01 * (seed - 1))
    )
    monkeypatch.setattr(policy_study, "calibrated_delta", lambda oracle: 1.0)
    rows = [
        ("output", method, share, image, mse * 10 ** (image - 0.5), share)  # images 0 and 1: the median is mse's
        for method, mse in (("rule", rule), ("chance", chance), ("policy", policy))
        for share in (0.1, 0.3)
        for image in (0, 1)
    ]
    rows.append(("kv", "oracle", 0.2, 0, 1e-9, 0.2))  # of another target
    columns = ["target", "method", "wanted", "image", "mse", "sites_reused"]
    some = pd.DataFrame({"not": ["read"]})
    said = findings.policy(run, pd.DataFrame(rows, columns=columns), some, some)
    assert said.startswith(best) and compared in said and "measured errors" not in said
    assert helps in said and f"is 0.90 with it and {without:.2f} without." in said
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


def test_conclusions_name_every_claim_under_its_verdict_with_its_number():
    verdicts = pd.DataFrame(
        {
            "claim": ["a", "b", "c"],
            "verdict": ["holds", "does not hold", "holds"],
            "reason": ["One call.", "It should be faster; it ran at 0.73×. All 47 are too few.", "2 of 2."],
        }
    )
    hopes = pd.DataFrame(
        {
            "direction": ["d", "e"],
            "deck": ["", ""],
            "verdict": ["not testable here", "does not hold"],
            "measured": ["1 GPU", "8, 4 bits: 72, 48 dB; levels fitted"],
        }
    )
    said = findings.conclusions(verdicts, hopes)
    assert said == (
        "Of slide 17's 3 claims, 2 hold here: “a”; “c” (2 of 2). 1 does not hold: “b” (it ran at 0.73×). 0 can't be "
        "tested here: none. Of slide 16's 2 hopes, 0 hold here: none. 1 does not hold: “e” (8, 4 bits: 72, 48 dB). 1 "
        "can't be tested here: “d”."
    )


@pytest.mark.parametrize(
    "looking, met, missed",
    [(1.05, 2, "missed: realised share of MACs saved, half: 0.600 (goal 0.9)."), (1.5, 1, "exact entropy, share of")],
)
def test_benchmarks_set_the_clock_beside_the_macs_and_name_the_missed_targets(looking, met, missed):
    rows = [
        ("step", method, family, "output", repeat, seconds, macs, 0)
        for method, family, seconds, macs in (
            ("untouched", "untouched", 1.0, 100.0),
            ("half", "plan of sites", 0.625, 50.0),  # 1.6× faster where the MACs promise 2×: 60 %
            ("slow", "gate", 1.25, 80.0),  # 0.8× where they promise 1.25×: -80 %
            ("entropy, exact", "entropy", looking, 100.0),
            ("applied, closed", "closed", 1.0, 100.0),
        )
        for repeat in range(3)
    ]
    columns = ["part", "method", "family", "target", "repeat", "seconds", "macs", "peak_bytes"]
    table = pd.DataFrame(rows, columns=columns)
    table.attrs["provenance"] = {"profile": {"device": "cpu"}}
    names = ["attention output, INT8", "another"]
    deciding = pd.DataFrame(
        {"method": names, "anew": [1.1, 1], "kept": [1.3, 1], "met": [False, False], "met_kept": [True, False]}
    )
    said = findings.benchmarks({"a CPU": table}, deciding)
    assert "the speedup that the MACs promise: gate -80%, plan of sites 60%." in said
    assert f"exact entropy of every site adds {looking - 1:.0%} to a step. {met} of 3 targets are met; " in said
    assert missed in said and "applied" not in said
    assert "0 of 2 goals" in said and "made anew, 1 where they are kept" in said
    assert said.endswith("keeping them turns a speedup of 1.10 into 1.30.")
    assert findings.benchmarks({}, deciding).startswith("Not measured yet")


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
    table = pd.DataFrame(rows, columns=columns).assign(converged_by=CONVERGED_BY)
    said = findings.pareto(run, {"DPM": table})
    # Three budgets, and one target: no plan was made for the other.
    numbers = "ahead of their rivals in {} of 3 comparisons, level in {}, behind in {}".format(*counts)
    for measure in ("median", "5th percentile"):
        assert f"In the {measure} of 3 images, DQAR's forecast plans are {numbers}" in said
    assert f"the smallest lead is {lead} dB, over TaylorSeer at 2×" in said
    assert "of 6 comparisons" in findings.pareto(run, {"dpm-solver++": table, "ddim": table})
    without = table.query("family != 'DQAR plan'")
    assert findings.pareto(run, {"DPM": without}) == "No plan has been compared yet for the profile smoke."


@pytest.mark.parametrize(
    "balanced, channel, with_l2, fused, shared, words",
    [
        (0.01, 0.015, 0.95, 1.05, 1e-5, ["works here"] * 4),
        (0.01, 0.005, 0.90, 1.40, 1e-2, ["helps here, but a scale a channel helps more", "makes no difference here",
                                         "costs too much here", "costs too much quality here"]),
        (0.03, 0.015, 0.85, 1.05, 1e-2, ["does not help here", "does harm here", "works here",
                                         "costs too much quality here"]),
    ],
)  # fmt: skip
def test_challenges_have_a_verdict_each(run, balanced, channel, with_l2, fused, shared, words, monkeypatch):
    monkeypatch.setattr(policy_study, "calibrated_delta", lambda oracle: 1.0)
    monkeypatch.setattr(policy_study, "study", lambda *_, l2: SimpleNamespace(auc=lambda: with_l2 if l2 else 0.9))
    labels = pd.DataFrame({"label": [0, 0, 1, 1], "entropy": [1.0, 3.0, 1.0, 3.0]})  # standard deviation √2
    errors = {"per tensor": 0.02, "per tensor + CSB": balanced, "per channel": channel}
    accumulation = pd.DataFrame(
        [(8, variant, step, error * step) for variant, error in errors.items() for step in (0, 1)],
        columns=["bits", "variant", "step", "relative_error"],
    )
    seconds = {"none": 1.0, "fused": fused, "fused, every 4th step": 1.02, "maps": 1.2}
    overhead = pd.DataFrame([(method, 0, s) for method, s in seconds.items()], columns=["method", "repeat", "seconds"])
    sharing = pd.DataFrame(
        {"target": "output", "epsilon": [0.1, math.inf], "mse": [0.0, shared], "macs_speedup": [1.0, 1.25],
         "sites_reused": [0.0, 0.5]}
    )  # fmt: skip
    said = findings.challenges(run, labels, labels, accumulation, overhead, sharing)
    names = ("balancing of channels", "L2 against overfitting", "entropy in one pass", "sharing of branches")
    works = ", ".join(name for name, word in zip(names, words, strict=True) if word == "works here")
    none = "None of the deck's five solutions is the best choice here, and one can't be tested."
    first = f"Of the deck's five solutions, these work here: {works}." if works else none
    assert said.startswith(f"{first}\n\n1. Threshold calibration can't be ")
    for number, (name, word) in enumerate(zip(names, words, strict=True), 2):
        assert f".\n{number}. {name[0].upper()}{name[1:]} {word}: " in said
    assert "entropy varies by 1.41 nats from site to site." in said
    assert f"latents end {balanced:.2%} off, 2.00% without it; with a scale a channel {channel:.2%}." in said
    assert f"unseen classes {with_l2:.3f} with it, 0.900 without." in said
    assert f"adds {fused - 1:.0%} to a step, whole maps 20%; at every 4th step it adds 2%." in said
    at_most = f"at most it saves 20% of the MACs, with images at {-10 * math.log10(shared):.0f} dB"
    assert said.endswith(f"{at_most}; separate caches, the other half of this solution, are exact.")


@pytest.mark.parametrize("answer", [findings.gate, findings.policy, findings.results, findings.pareto])
def test_an_answer_whose_table_is_missing_says_so_and_names_the_command(run, answer):
    tables = (None,) * {findings.gate: 2, findings.policy: 3}.get(answer, 1)
    assert answer(run, *tables).endswith("`dqar record --profile smoke` makes the tables.")


def test_a_notebooks_last_lines_are_its_answer_and_the_findings_of_its_figures():
    figure = plt.figure()
    figure.suptitle("Two\nlines")
    said = shows("It changes by -20%. By 3.5 dB, too.\n1. More.", figure, plt.figure()).data
    plt.close("all")
    assert said == "## What this shows\n\n**It changes by −20%.** By 3.5 dB, too.\n1. More.\n\n- Two lines."
