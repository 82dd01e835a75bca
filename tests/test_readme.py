"""The numbers of README and docs/rivals.md are the recorded ones; some are checked beside their studies."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from dqar.measure import metrics
from dqar.measure.results import RECORDED, load_table
from dqar.models.profiles import WEIGHTS, get_profile
from dqar.studies import arena, benchmarks, conclusions, layers, pareto, plans, qat, quantized_cache, video
from dqar.studies.compare import FULL, OURS

README = (RECORDED.parent / "README.md").read_text()
SAID = " ".join((README + (RECORDED.parent / "docs/rivals.md").read_text()).split())
ROWS = {
    "DQAR plan": ("dqar-plan-1-5", ["DQAR plan, 1.5×", "DQAR plan, 2×", "DQAR plan, 3×", "DQAR plan, 4×"]),
    "output extrapolation": ("extrapolation-1-5", [f"extrapolation, {budget}×" for budget in (1.5, 2, 3, 4)]),
    "fewer steps": ("33-steps", ["33 steps", "25 steps", "16 steps", "12 steps"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_quality_and_time_beside_fewer_steps_are_what_was_recorded(name):
    file, timed = ROWS[name]
    table = load_table(RECORDED / "digits" / f"samples-{file}.parquet")
    mse, saved = table.mse.to_numpy(), table.macs_speedup.iloc[0]
    assert len(mse) == 1000
    psnr = -10 * np.log10(mse)
    quality = " / ".join(f"{x:.1f}" for x in (-10 * np.log10(mse.mean()), *np.quantile(psnr, (0.5, 0.05))))
    speedups = metrics.speedups(load_table(RECORDED / "digits/speed.parquet"), "full compute").speedup
    times = " | ".join(f"{speedups[method]:.2f}×" for method in timed)
    assert f"| {name} | {quality} at {saved:.2f}× | {times} |" in README


def test_the_speed_of_the_decks_gate_is_what_was_recorded():
    speed = metrics.speedups(load_table(RECORDED / "digits/speed.parquet"), "full compute").speedup
    assert f"it runs at {speed['DQAR rule, kv']:.2f}× (K and V) and {speed['DQAR rule, output']:.2f}×" in SAID


@pytest.mark.parametrize(
    "row, method, file",
    [
        ("forecast plan, 2× fewer MACs", "DQAR plan, 2×", "dqar-plan-2"),
        ("forecast plan, 3× fewer MACs", "DQAR plan, 3×", "dqar-plan-3"),
        ("reuse of K and V by a calibrated gate", "DQAR rule, kv", "dqar-rule-kv"),
        ("reuse of the attention output by a calibrated gate", "DQAR rule, output", "dqar-rule-output"),
    ],
)
def test_what_an_engine_gains_is_what_was_recorded(row, method, file):
    seconds = load_table(RECORDED / "digits/speed.parquet").pivot(index="repeat", columns="method", values="seconds")
    low, speed, high = (seconds["full compute"] / seconds[method]).quantile([0.25, 0.5, 0.75])
    images = load_table(RECORDED / f"digits/samples-{file}.parquet")
    mse = images.mse.to_numpy()
    assert len(mse) == 1000 and len(seconds) == 5
    resampled = np.random.default_rng(0).choice(mse, (2000, len(mse))).mean(1)
    worst, best = -10 * np.log10(np.quantile(resampled, [0.975, 0.025]))
    cells = f"{speed:.2f}× ({low:.2f}–{high:.2f}) | {-10 * np.log10(mse.mean()):.1f} ({worst:.1f}–{best:.1f})"
    assert f"| {row} | {cells} | {-10 * np.log10(np.median(mse)):.1f} |" in README
    if "rule" in method:
        assert f"| {images.cache_bytes.mean() / 1024:.0f} KiB of cache an image" in README
    else:
        low = (-10 * np.log10(mse) < 40).sum()
        said = [line for line in README.splitlines() if line.startswith(f"| {row} |")]
        assert len(said) == 1 and f"; {low} of 1,000 images are under 40 dB" in said[0]


def test_what_can_be_promised_is_what_was_recorded():
    judged = plans.promises(digits())
    speedups, kept = plans.typical(judged), plans.typical(judged, "kept")
    for decibels, share in speedups.index:
        ways = plans.LADDER, plans.NETWORK, plans.MIX, plans.FIXED
        own = [(speedups[way][decibels, share], kept[way][decibels, share]) for way in ways]
        cells = " | ".join(f"{speedup:.2f}×, {100 * part:.1f}%" for speedup, part in own)
        assert f"| {decibels:g} dB in {share:.0%} of images | {cells} |" in README
    ours, mix, alone = (1 / speedups[way][45.0, 0.95] for way in plans.WAYS)
    splits = judged[(judged.decibels == 45) & (judged.share == 0.95)]
    splits = splits.pivot(index="split", columns="way", values="macs_speedup")
    more = (splits[plans.LADDER] > splits[plans.MIX]).sum()
    said = f"takes {1 - ours / alone:.0%} fewer MACs than one plan for all, and {1 - ours / mix:.0%} fewer than the "
    said += f"random mix (fewer in {more} of {len(splits)} splits)."
    assert said in SAID
    assert (speedups[plans.NETWORK] < speedups[plans.MIX]).all()  # "saves less than the mix in all three"


def digits():
    folder = RECORDED / "digits"

    def recorded(name):
        return load_table(path) if (path := folder / f"{name}.parquet").exists() else None

    return SimpleNamespace(profile=get_profile("digits"), recordings=folder, recorded=recorded)


def test_what_weights_of_each_class_gain_is_what_was_recorded():
    gains = plans.class_gains(digits())
    first, second = (gains.loc[images, "median"] for images in (120, 240))
    assert f"median {first.gain:+.1f} dB (95% interval {first.low:+.1f} to {first.high:+.1f}, n = 200)" in SAID
    assert f"with 120 images in all, {second.gain:+.1f} ({second.low:+.1f} to {second.high:+.1f}) with 240" in SAID
    tail = gains.xs("5th percentile", level="measure")
    assert ((tail.low < 0) & (tail.high > 0)).all()  # "within its interval"


def test_what_bits_of_each_layer_gain_is_what_was_recorded():
    said = quantized_cache.mixed_in_words(digits().recorded("bits-output"), digits().recorded("bits-kv"))
    assert said[0].lower() + said[1:] in SAID


def test_what_a_plan_does_on_a_quantized_model_is_what_was_recorded():
    median = plans.w8a8(digits())["median"]["the model as it was"]
    said = f"{median['full compute']:.1f} dB to full compute of the model as it was, where one fitted on the copy has "
    assert said + f"{median['W8A8']:.1f}." in SAID


def test_the_time_of_a_reuse_plan_at_the_decks_size_is_what_was_recorded():
    [table] = benchmarks.recorded().values()
    cost = benchmarks.summary(table).set_index("method").cost["plan: output, 3 of 4 steps"]
    assert f"reuses attention outputs at 3 of 4 steps takes {cost:.2f} of the time" in README


def test_what_a_learned_solver_comes_to_is_what_was_recorded():
    table = arena.standings(load_table(RECORDED / "digits/arena-dpm-solver.parquet"), "reference").set_index("method")
    solver = table.loc["bespoke solver: 16 steps for the reference"]
    plan = table.loc["DQAR plan: for the reference, 16 of 50 steps, dpm-solver++"]
    said = f"comes to {solver['median']:.1f} dB (median) and {solver['5th percentile']:.1f} dB (5th percentile) at 3×, "
    said += f"where the plan has {plan['median']:.1f} and {plan['5th percentile']:.1f}."
    assert said in SAID
    photographs = load_table(RECORDED / "cifar10/arena-dpm-solver.parquet")
    table = arena.standings(photographs, "reference").set_index("method")
    numbers = (table.loc[name, measure] for name in (solver.name, plan.name) for measure in arena.SHOWN)
    said = "On photographs it comes to {:.1f} and {:.1f}, the plan to {:.1f} and {:.1f}."
    assert said.format(*numbers) in SAID


def test_what_solvers_learned_for_the_converged_solution_come_to_is_what_was_recorded():
    table = load_table(RECORDED / "digits/arena-dpm-solver.parquet")
    points = arena.standings(table, "converged").set_index("method")
    solvers = points.loc[[f"bespoke solver: {steps} steps for the converged" for steps in (25, 16, 12)]]
    said = (
        "with 25, 16 and 12 steps it comes to {:.1f}, {:.1f} and {:.1f} dB, and to {:.1f}, {:.1f} and {:.1f} dB in the"
    )
    assert said.format(*solvers["median"], *solvers["5th percentile"]) in SAID
    photographs = arena.standings(load_table(RECORDED / "cifar10/arena-dpm-solver.parquet"), "converged")
    names = [f"bespoke solver: {steps} steps for the converged" for steps in (24, 16, 12)]
    of_photographs = photographs.set_index("method").loc[names]
    said = "on photographs with 24, 16 and 12 to {:.1f}, {:.1f} and {:.1f}, and to {:.1f}, {:.1f} and {:.1f}."
    assert said.format(*of_photographs["median"], *of_photographs["5th percentile"]) in SAID
    strongest = arena.strongest(arena.verdicts(table)).set_index(["target", "measure"])
    assert set(strongest.loc[("converged", "median")].family) == {"bespoke solver"}
    timesteps = points[points.family == "learned timesteps"]  # they "come to less"
    assert timesteps["median"].max() < points["median"]["bespoke solver: 16 steps for the converged"]


def test_how_plans_stand_on_the_worst_image_is_what_was_recorded():
    table = load_table(RECORDED / "digits/arena-dpm-solver.parquet")
    seen = table[table.image < 200]
    judged = arena.verdicts(table[table.image >= 200])
    assert set(judged[~judged.family.isin(OURS)].verdict) == {"ahead"} and not arena.images(seen, "converged")
    points, worst = arena.standings(table, "converged"), []
    for budget in arena.BUDGETS:
        within = pareto.within(pareto.made_for(points, "converged"), budget)
        plans_there = within[within.family == pareto.PLAN]
        ours = plans_there.worst[plans_there.macs_speedup.idxmin()]
        rivals_there = within[~within.family.isin((*OURS, FULL.name))]
        best = rivals_there.loc[rivals_there.worst.idxmax()]
        worst.append((ours, best.worst))
        if ours < best.worst:
            assert best.family == "output extrapolation"
    own, rivals = ("{:.1f}, {:.1f} and {:.1f}".format(*numbers) for numbers in zip(*worst, strict=True))
    [behind] = [budget for budget, (ours, best) in zip(arena.BUDGETS, worst, strict=True) if ours < best]
    number = arena.images(table, "converged")
    for said in (
        "Digits 0 to 199 had been seen then; the converged solution is compared on others, and to the reference plans "
        f"are ahead on the other {table.image.nunique() - seen.image.nunique()} as well",
        f"Of these {number}, the single image",
        f"of {number:,}, the worst to the converged solution has {own} dB under plans at 2×, 3× and 4×, and {rivals} "
        f"under the rival that is best there: output extrapolation is before the plan at {behind}×.",
        f"farthest from it is farther under the plan of {behind}× than under the rival",
    ):
        assert said in SAID


def test_how_far_full_compute_is_from_the_converged_solution_is_what_was_recorded():
    points = arena.standings(load_table(RECORDED / "digits/arena-dpm-solver.parquet"), "converged").set_index("method")
    said = "itself is {:.1f} dB (median) and {:.1f} dB (5th percentile) away from it."
    assert said.format(*points.loc[FULL.name, list(arena.SHOWN)]) in SAID


def test_what_the_frechet_distance_says_of_rivals_is_what_was_recorded():
    table = load_table(RECORDED / "digits/arena-dpm-solver.parquet")
    distances, images = table.groupby("method").fd.first(), table[table.fd.notna()].image
    made = distances[table[table.family == pareto.PLAN].method.unique()]
    [nearest] = distances.index[distances == distances.min()]
    point = arena.standings(table, "reference").set_index("method").loc[nearest]
    assert point.family == "DBCache"
    said = (
        f"FD-digits of {images.nunique()} images ({images.min()} to {images.max()}): full compute "
        f"{distances[FULL.name]:.2f}, plans {made.min():.2f} to {made.max():.2f}; DBCache, whose median image is "
        f"{point['median']:.1f} dB from full compute's at {point.macs_speedup:.1f}×, has {distances.min():.2f}."
    )
    assert said in SAID


def test_what_plans_do_on_photographs_is_what_was_recorded():
    table = load_table(RECORDED / "cifar10/arena-dpm-solver.parquet")
    points = arena.standings(table, "converged").set_index("method")
    full, few = points.loc["full compute"], points.loc["fewer steps: 24 of unipc3-exponential"]
    for nearer in (few, points.loc["bespoke solver: 24 steps for the converged"]):
        assert nearer["median"] > full["median"] and nearer["5th percentile"] > full["5th percentile"]
    judged = arena.shown(arena.verdicts(table))
    rivals, converged = (
        part.groupby("budget").family.nunique() for part in (judged, judged[judged.target == "converged"])
    )
    for said in (
        f"n = {table.image.nunique()} held-out images of `cifar10`",
        f"is {full['median']:.1f} dB (median) and {full['5th percentile']:.1f} dB (5th percentile) away from the "
        f"converged solution. A plan of {arena.lossless(table):.1f} times fewer MACs is nearer to it than full compute",
        f"so are, at {few.macs_speedup:.1f}×, a bespoke solver of 24 steps and UniPC in 24 steps",
        "{} rivals are compared at 2×, {} at 3× and {} at 4×".format(*rivals),
        "{}, {} and {} to the converged solution".format(*converged),
    ):
        assert said in SAID


def test_the_smallest_lead_on_photographs_is_what_was_recorded():
    judged = arena.strongest(arena.verdicts(load_table(RECORDED / "cifar10/arena-dpm-solver.parquet")))
    judged = judged.set_index(["target", "budget", "measure"]).loc["converged", 2]
    median, tail = judged.loc["median"], judged.loc["5th percentile"]
    assert median.method == tail.method == "bespoke solver: 24 steps for the converged"
    assert (median.verdict, tail.verdict) == ("ahead", "level") and "24 of 50" in median.plan
    said = "by {:.1f} dB in the median ({:.1f} to {:.1f}), and level with it in the tail, "
    said += "{:.1f} dB before it ({:.1f} to {:.1f})"
    numbers = (row[name] for row in (median, tail) for name in ("lead", "lead_low", "lead_high"))
    assert said.format(*numbers).replace("(-", "(−") in SAID


def test_the_readme_says_how_many_rivals_were_drawn_under_ddim():
    judged = arena.shown(arena.verdicts(load_table(RECORDED / "digits/arena-ddim.parquet")))
    assert f"Under DDIM {judged.family.nunique()} rivals are drawn" in SAID and set(judged.target) == {"reference"}
    assert f"At 4× {judged[judged.budget == 4].family.nunique()} stand in the comparison." in SAID


def test_the_readme_says_how_plans_stand_at_guidance_4():
    table = load_table(RECORDED / "digits-guidance-scale-4-0/arena-dpm-solver.parquet")
    judged = arena.shown(arena.verdicts(table))
    assert set(judged.verdict) == {"ahead"} and table.image.nunique() == 200
    assert "learned timesteps" not in set(table.family) and "mse_converged" not in table
    assert f"{judged.family.nunique()} rivals at settings that were best in sweeps at guidance 4" in SAID
    counts = judged.groupby("budget").family.nunique()
    assert "guidance 4: {} stand in the comparison at 2×, {} at 3× and {} at 4×;".format(*counts) in SAID
    assert f"plans are ahead everywhere, by {judged.lead.min():.1f} dB or more" in SAID


def test_what_plans_do_before_the_decoder_is_what_was_recorded():
    judged = arena.shown(arena.verdicts(load_table(RECORDED / "cifar10/latents-dpm-solver.parquet")))
    assert set(judged.verdict) == {"ahead"} and set(judged.budget) == {2, 3, 4} and set(judged.target) == {"reference"}
    said = f"ahead of the rivals that are strongest in pixels by {judged.lead.min():.1f} dB or more"
    assert said in SAID


def test_what_the_photograph_model_draws_is_what_its_card_says():
    measured = json.loads((WEIGHTS / "cifar10/evaluation.json").read_text())
    seen = json.loads((WEIGHTS / "cifar10/training.json").read_text())["images_seen"]
    accuracies = measured["class_accuracy"], measured["guidance scales"]["3.0"]["class_accuracy"]
    assert (
        "takes {:.0%} of its pictures for what was asked for at guidance 2, {:.0%} at guidance 3".format(*accuracies)
        in SAID
    )
    assert f"goes on from the {round(seen, -3):,} images that the shipped model has seen" in SAID


def test_what_a_quantized_history_costs_is_what_was_recorded():
    table = load_table(RECORDED / "digits/history.parquet")
    assert table.image.nunique() == 200
    fitted = table[table.bits == table.fitted_in].groupby("bits").mse.median()
    words = "the median is {:.1f} dB in INT8, {:.1f} dB in INT4, and {:.1f} dB unquantized"
    assert words.format(*(-10 * np.log10(fitted[[8, 4, 16]]))) in SAID


def test_what_became_of_the_decks_hopes_is_what_was_recorded():
    table = {name: load_table(RECORDED / f"digits/{name}.parquet")
             for name in ("layers", "video", "qat", "history", "search", "search-front", "batches")}  # fmt: skip
    said = {
        "sharing between layers": layers.in_words(table["layers"]),
        "video": video.in_words(table["video"]),
        "training through the quantizer": qat.in_words(table["qat"], table["history"]),
        "search": conclusions.by_search(table["search"], table["search-front"], "")[1],
        "production": conclusions.production(table["batches"]),
    }
    for direction, words in said.items():
        [row] = re.findall(rf"^\| {direction} \| [^|]* \| ([^|]*) \|$", README, re.M)
        assert row == re.sub(r"(?<![\w])-(?=\d)", "−", words)


CLASSES = {
    "DiT": "DiT",
    "PixArt-α": "PixArtAlpha",
    "PixArt-Σ": "PixArtSigma",
    "Latte": "Latte",
    "SD3 and SD3.5": "StableDiffusion3",
    "SD3 image to image": "StableDiffusion3Img2Img",
    "Flux": "Flux",
    "Flux Control": "FluxControl",
    "Hunyuan-DiT": "HunyuanDiT",
    "Sana": "Sana",
    "AuraFlow": "AuraFlow",
    "Lumina 2": "Lumina2",
    "Z-Image": "ZImage",
    "Qwen-Image": "QwenImage",
    "LTX": "LTX",
    "CogVideoX": "CogVideoX",
    "Wan 2.1 and 2.2": "Wan",
    "HunyuanVideo": "HunyuanVideo",
}


def test_the_table_of_models_says_what_the_docs_say_of_each_pipeline():
    docs = (RECORDED.parent / "docs/families.md").read_text()
    listed = {name: (plan, trace, reuse) for name, plan, trace, reuse in
             re.findall(r"^\| `(\w+)Pipeline` \| (\w+) \| ([\w ]+) \| ([^|]+) \|", docs, re.M)}  # fmt: skip
    table = README.split("| pipeline | forecast plan |")[1].split("\n\n")[0].splitlines()[2:]
    said = {}
    for row in table:
        names, *support = (cell.strip() for cell in row.strip("|").split("|"))
        said |= {CLASSES[name]: tuple(support) for name in re.sub(r" \(.*\)", "", names).split(", ")}
    assert len(table) < 12 and said == listed and len(listed) == 18
