import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import image_pipeline

from dqar import CacheFormat, DQARConfig, ReusePlan
from dqar.__main__ import main
from dqar.figures import pareto as pareto_figures
from dqar.figures import policy as figures
from dqar.measure import calibrate, metrics
from dqar.measure.quality import Reference
from dqar.measure.results import RECORDED, Run, load_table, slug
from dqar.measure.sampling import sample
from dqar.models.pipelines import load_pipeline
from dqar.models.profiles import get_profile
from dqar.policy import FEATURES, ReusePolicy
from dqar.studies import policy, record, results, trace
from dqar.studies.recording import Recording


def labels_of(number=1200, seed=0, error=lambda t: np.exp(t.snr)):
    """Synthetic labels, so that what decides the error is known."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "label": rng.integers(0, 10, number),
            "step": rng.integers(1, 50, number),
            "layer": rng.integers(0, 28, number),
            "branch": rng.choice(["cond", "uncond"], number),
            "entropy": rng.normal(3.5, 0.3, number),
            "snr": rng.uniform(0.5, 50, number),
            "latent_norm": rng.normal(8, 1, number).clip(1),
        }
    )
    return table.assign(error=error(table) * 1e-9)


def noisy(table):
    """An error that no network can be sure of."""
    return np.exp(0.05 * table.snr + np.random.default_rng(1).normal(0, 2, len(table)))


# --- policy training -------------------------------------------------------------------------------------------------


def test_the_policy_learns_what_decides_and_only_that():
    labels = labels_of()
    delta = float(labels.error.median())
    table = policy.ablation(labels, delta, 50, seeds=1).set_index("omitted").auc
    assert list(table.index) == ["nothing", *FEATURES]
    assert table["log_snr"] < 0.65 and table.drop("log_snr").min() > 0.95


def test_a_policy_is_judged_on_classes_it_never_saw():
    labels = labels_of(error=lambda t: np.where(t.label < 8, t.snr, 50.5 - t.snr))  # upside down where it is judged
    assert policy.study(labels, float(labels.error.median()), 50).auc() < 0.2
    assert not set(policy.TRAIN) & set(policy.STOP) and not set(policy.TEST) & {*range(8)}


def test_the_rule_is_scored_as_the_deck_means_it():
    labels = labels_of(error=lambda t: np.where(t.snr.between(0.5, 50), t.entropy, 100))
    study = policy.study(labels, float(labels.error.median()), 50)
    assert study.auc("rule") == 1.0


# --- analysis of the labels ------------------------------------------------------------------------------------------


def test_partial_correlation_takes_out_what_is_known():
    rng = np.random.default_rng(0)
    step = rng.uniform(0, 1, 4000)
    table = pd.DataFrame({"step": step, "error": step + 0.1 * rng.normal(size=4000)})
    table["entropy"] = step + 0.1 * rng.normal(size=4000)
    assert table.entropy.corr(table.error, "spearman") > 0.8
    assert abs(policy.partial_correlation(table, "entropy", ("step",))) < 0.05
    table["error"] += table.entropy
    assert policy.partial_correlation(table, "entropy", ("step",)) > 0.5


def test_an_additive_error_is_predicted_at_sites_never_seen():
    def error(t):
        return np.exp(0.1 * t.step + 0.05 * t.layer + 0.5 * (t.branch == "cond"))

    labels = labels_of(4000, error=error)
    sites = pd.MultiIndex.from_product([range(1, 50), range(28), ("cond", "uncond")], names=["step", "layer", "branch"])
    truth = error(sites.to_frame(index=False)) * 1e-9
    predicted = policy.predicted_errors(labels, 50, 28)
    assert np.corrcoef(np.log(predicted), np.log(truth))[0, 1] > 0.99


def test_a_plan_takes_the_least_errors_and_nothing_twice_in_a_row():
    sites = pd.MultiIndex.from_product([range(1, 6), range(2), ("cond", "uncond")])
    errors = pd.Series(np.arange(len(sites), dtype=float), index=sites)
    plan, delta = policy.plan_of(errors, share=0.25, total_steps=6)
    assert len(plan.sites) == 6 and plan.sites >= {
        (1, layer, branch) for layer in (0, 1) for branch in ("cond", "uncond")
    }
    assert not any((step + 1, layer, branch) in plan.sites for step, layer, branch in plan.sites)
    assert delta == max(errors[site] for site in plan.sites)
    assert policy.plan_of(errors, 0.0, 6) == (ReusePlan((), 2, 6), 0.0)


def test_deciders_differ_and_reuse_about_as_much_as_wanted():
    labels = labels_of(error=noisy)
    network = policy.study(labels, float(labels.error.median()), 50).policy
    methods = policy.deciders(labels, network, "kv", 50, 28)
    assert all(method.name == name for (name, _), method in methods.items())
    configs = {key: method.config for key, method in methods.items()}
    assert {name for name, _ in configs} == {"rule", "policy", "oracle", "chance"}
    assert len({str(config) for config in configs.values()}) == len(configs)
    for share in (0.1, 0.4):
        assert (
            len(configs["oracle", share].plan.sites) == len(configs["chance", share].plan.sites) == round(share * 2800)
        )
        assert configs["oracle", share].plan != configs["chance", share].plan
    assert configs["policy", 0.1].policy_threshold > configs["policy", 0.4].policy_threshold
    assert configs["rule", 0.1].entropy_threshold < configs["rule", 0.4].entropy_threshold


# --- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_tell_a_shifted_set_from_the_same_one():
    rng = np.random.default_rng(0)
    real = torch.tensor(rng.normal(size=(300, 4)))
    base = rng.normal(size=(200, 4))
    sets = {"full compute": base, "same": base, "near": base + 1e-3 * rng.normal(size=base.shape), "far": base + 0.5}
    images = pd.concat(
        pd.DataFrame({"method": name, "image": range(200), "features": list(x)}) for name, x in sets.items()
    )
    table = results.frechet_intervals(images, Reference(metrics.Gaussian.of(real)), resamples=100).set_index("method")
    for name, x in sets.items():
        assert table.fd[name] == pytest.approx(metrics.frechet_distance(torch.tensor(x), real))
        assert table.fd_low[name] < table.fd[name] < table.fd_high[name]
    assert table.fd_growth["same"] == table.fd_growth_low["same"] == table.fd_growth_high["same"] == 0
    assert table.fd_growth_low["near"] < 0.01 and abs(table.fd_growth["near"]) < 0.01
    assert table.fd_growth_low["far"] > 0.5


def test_distances_are_put_beside_plans(tmp_path, monkeypatch):
    real = np.random.default_rng(0).normal(size=(300, 4))
    reference = Reference(metrics.Gaussian.of(torch.tensor(real)))
    monkeypatch.setattr(results, "reference_of", lambda model, folder: reference)
    rows = [
        ("full compute", "full compute", math.nan, 0.0),
        ("plan", "DQAR plan", 3, 1e-5),
        ("cache", "SeaCache", 3, 3e-5),
        ("16 steps", "fewer steps", 3, 1e-4),
        ("25 steps", "fewer steps", 2, 1e-4),
        ("static, kv", "static reuse", math.nan, 1e-3),
    ]
    tables = [
        pd.DataFrame({"method": name, "family": family, "budget": budget, "image": range(300), "mse": mse}).assign(
            features=list(real + 3 * mse**0.25), ssim=1.0
        )
        for name, family, budget, mse in rows
    ]
    monkeypatch.setattr(results, "samples", lambda run, chosen: pd.concat(tables, ignore_index=True))
    table = results.beside_plans(Run("digits", 0, tmp_path), resamples=20)
    assert table.kind.tolist() == ["DQAR plan", "best other cache", "fewer steps"] and table.budget.eq(3).all()
    assert table.psnr.tolist() == pytest.approx([50, 45.2288, 40]) and table.fd_growth.is_monotonic_increasing
    del tables[1]
    assert results.beside_plans(Run("digits", 0, tmp_path)) is None


def test_what_was_recorded_is_of_the_methods_that_there_are():
    folder = RECORDED / "digits"
    methods = results.methods(get_profile("digits"), folder)
    assert {method.name for method in methods} == {*load_table(folder / "speed.parquet").method}
    assert all((folder / f"samples-{slug(method.name)}.parquet").exists() for method in methods)
    families = {method.family for method in methods if method.budget == 3}
    assert families == {"fewer steps", "output extrapolation", "SeaCache", "DQAR plan"}


# --- recording -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    return Recording(get_profile("smoke"), tmp_path / "work", tmp_path / "recorded")


def test_an_interrupted_recording_continues_and_keeps_what_was_finished(recorded):
    calls = []

    def part(number, fail=False):
        def measure():
            calls.append(number)
            if fail:
                raise KeyboardInterrupt
            return pd.DataFrame({"number": [number]})

        return measure

    with pytest.raises(KeyboardInterrupt):
        recorded.table("test", {1: part(1), 2: part(2, fail=True)}, seed=0)
    assert not (recorded.folder / "test.parquet").exists()
    table = recorded.table("test", {1: part(1), 2: part(2)}, seed=0)
    assert calls == [1, 2, 2] and table.number.tolist() == [1, 2]
    assert table.attrs["provenance"]["profile"]["name"] == "smoke" and table.attrs["provenance"]["seconds"] >= 0
    recorded.table("test", {1: part(1), 2: part(2)}, seed=0)
    assert calls == [1, 2, 2]
    run = Run("smoke", 0, recorded.parts)
    run.recordings = recorded.folder
    assert run.recorded("test").number.tolist() == [1, 2] and run.recorded("never") is None


def test_the_command_writes_where_it_is_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(record.TABLES, "speed", lambda recording: recording.table("speed", {1: pd.DataFrame}, 0))
    arguments = ["--profile", "smoke", "--only", "speed"]
    assert main(["record", *arguments, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 0
    assert (tmp_path / "out/smoke/speed.parquet").exists() and "speed: recorded in" in capsys.readouterr().out


def test_random_weights_are_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="'dit-xl-2-random' can't be recorded: its weights are random"):
        Recording(get_profile("dit-xl-2-random"), tmp_path, tmp_path)


def test_recording_names_an_unknown_table(capsys):
    assert main(["record", "--profile", "smoke", "--only", "nonsense"]) == 2
    assert "'nonsense' is unknown: choose from reference, labels" in capsys.readouterr().err


def test_what_was_not_recorded_is_drawn_as_missing(tmp_path):
    run = Run("smoke", 0, tmp_path)
    figures.slide07_deciders(run, None)
    assert "not measured yet" in (run.figures / "appendix/slide07_deciders.svg").read_text()
    assert json.loads((run.figures / "appendix/slide07_deciders.json").read_text())["figure"] == "slide07_deciders"
    pareto_figures.slide08_plans(run, {})
    assert "not measured yet" in (run.figures / "appendix/slide08_plans.svg").read_text()


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_reaches_the_wanted_share_and_quality():
    profile, pipe = get_profile("smoke"), image_pipeline()
    base = DQARConfig(schedule="all", reuse_target="output", max_reuse_streak=1)
    config, trials = calibrate.calibrate(pipe, profile, 0, share=0.2, base=base, num_samples=2)
    drawn = sample(pipe, profile, 0, config, num_samples=2)
    share = (drawn.trace.to_pandas().decision == "reuse").mean()
    assert share == pytest.approx(0.2, abs=0.05) and share in trials.share.tolist()
    config, trials = calibrate.calibrate(pipe, profile, 0, psnr=30.0, base=base, num_samples=2)
    reference = sample(pipe, profile, 0, num_samples=2).images
    drawn = sample(pipe, profile, 0, config, num_samples=2)
    assert metrics.mean_psnr(drawn.images, reference) >= 30 and trials.psnr.max() < math.inf
    for goals, message in (({}, "give one of them"), ({"share": 0.1, "psnr": 3.0}, "give one of them"),
                           ({"share": 1.5}, "share=1.5"), ({"share": 0.99}, "the widest gate")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            calibrate.calibrate(pipe, profile, 0, base=base, num_samples=1, trials=2, **goals)


def test_the_command_proposes_a_gate(capsys, monkeypatch):
    monkeypatch.setattr("dqar.commands.calibrate.load_pipeline", lambda profile: image_pipeline())
    assert main(["calibrate", "--profile", "smoke", "--share", "0.2", "--num-samples", "1"]) == 0
    said = capsys.readouterr().out
    proposal = json.loads(said[said.index("{") : said.index("}") + 1])
    DQARConfig(**proposal)
    assert "measured on 1 images of profile smoke, 8 steps" in said and "τ(p)" in said
    assert main(["calibrate", "--profile", "smoke", "--share", "2"]) == 2


def test_the_command_proposes_bits_of_layers(capsys, monkeypatch):
    monkeypatch.setattr("dqar.commands.calibrate.load_pipeline", lambda profile: image_pipeline())
    asked = ["calibrate", "--profile", "smoke", "--num-samples", "1", "--reuse-target", "kv", "--bytes"]
    assert main([*asked, "0.3"]) == 0
    said = capsys.readouterr().out
    proposal = json.loads(said[said.index("{") :])
    config = DQARConfig(**{**proposal, "cache": CacheFormat(**proposal["cache"])})
    assert len(config.cache.layer_bits) == 4 and config.reuse_target == "kv" and config.schedule == "static"
    assert "measured on 1 images of profile smoke, 8 steps" in said and "of a 16-bit cache at" in said
    assert main([*asked, "0.1"]) == 2
    assert "bytes=0.1 is not accepted: the fewest bits take 0.2" in capsys.readouterr().err
    assert main([*asked, "0.3", "--share", "0.2"]) == 2


def test_a_trained_policy_runs_in_the_controller(tmp_path):
    labels = labels_of(error=noisy)
    network = policy.study(labels, float(labels.error.median()), 50).policy
    network.save(tmp_path / "policy.safetensors")
    profile = get_profile("smoke")
    pipe, drawn = image_pipeline(), {}
    for threshold in (0.0, 1.0):
        config = DQARConfig(
            policy=ReusePolicy.load(tmp_path / "policy.safetensors"), schedule="all", policy_threshold=threshold
        )
        drawn[threshold] = sample(pipe, profile, 0, config, num_samples=1).trace.to_pandas()
    assert (drawn[0.0].reason == "policy").sum() == 0 < (drawn[0.0].decision == "reuse").sum()
    assert (drawn[1.0].decision == "reuse").sum() == 0 < (drawn[1.0].reason == "policy").sum()


def test_layers_are_compared_with_the_right_neighbours(tmp_path):
    run = Run("smoke", 0, tmp_path)
    pipe = load_pipeline(run.profile)
    seen = []
    blocks = pipe.transformer.transformer_blocks
    handles = [block.attn1.register_forward_hook(lambda *a: seen.append(a[2])) for block in blocks[4:6]]
    sample(pipe, run.profile, 0, num_samples=4)
    for handle in handles:
        handle.remove()
    table = trace.sites(run).groupby(["step", "layer"])[["layer_change", "change"]].mean().loc[(3, 5)]
    now, below, before = seen[7], seen[6], seen[5]
    for other, got in ((below, table.layer_change), (before, table.change)):
        expected = ((now - other).flatten(1).norm(dim=1) / now.flatten(1).norm(dim=1)).mean().item()
        assert got == pytest.approx(expected, rel=1e-5)
