import dataclasses
import functools
import json
import math
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch

from dqar import workbook
from dqar.figures import style
from dqar.measure import calibrate, metrics, sampling
from dqar.measure.results import Run, load_table
from dqar.measure.sampling import sample
from dqar.models import profiles
from dqar.models.classifier import load_classifier
from dqar.models.data import load_digits_split
from dqar.models.pipelines import cached_pipeline, load_embedded, load_pipeline, make_scheduler
from dqar.models.profiles import WEIGHTS, Weights, get_profile
from dqar.studies import claims, compare, trace
from dqar.training import digits
from dqar.training.digits import Recipe, build_transformer, train_transformer


def write_notebook(folder, name, *code):
    cells = [nbformat.v4.new_code_cell('profile = "smoke"\nseed = 0\nout = "out"', metadata={"tags": ["parameters"]})]
    notebook = nbformat.v4.new_notebook(cells=cells + [nbformat.v4.new_code_cell(text) for text in code])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / name)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(
        workbook, "choose", lambda only, trained, folder=folder, choose=workbook.choose: choose(only, folder)
    )
    return folder


def test_the_workbook_runs_keeps_and_names_what_failed(notebooks, tmp_path, capsys):
    write_notebook(
        notebooks, "01_good.ipynb", "from pathlib import Path\nPath(out, 'figures', 'seed').write_text(str(seed))"
    )
    write_notebook(notebooks, "02_bad.ipynb", "1 / 0")
    arguments = ["--profile", "smoke", "--seed", "7", "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "f")]
    assert workbook.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "cell 2 of 02_bad.ipynb: ZeroDivisionError" in " ".join(printed.split())
    assert (tmp_path / "out/notebooks/01_good.html").exists()
    assert (tmp_path / "out/notebooks/02_bad.failed.ipynb").exists()
    assert not (tmp_path / "out/notebooks/02_bad.ipynb").exists() and not (tmp_path / "f").exists()
    write_notebook(notebooks, "02_bad.ipynb", "1 / 1")
    assert workbook.main([*arguments, "--jobs", "2"]) == 0
    assert "kept" in capsys.readouterr().out
    assert (tmp_path / "f/seed").read_text() == "7"


def test_relative_folders_stay_where_they_are_when_notebooks_run_side_by_side(notebooks, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, seconds in (("01_short.ipynb", 0), ("02_long.ipynb", 3)):
        code = f"import time\nfrom pathlib import Path\ntime.sleep({seconds})\nPath(out, 'figures', 'made').touch()"
        write_notebook(notebooks, name, code)
    assert workbook.main(["--profile", "smoke", "--jobs", "2", "--out", "o", "--figures", "f"]) == 0
    assert Path.cwd() == here and not (notebooks / "f").exists() and not (notebooks / "o").exists()
    assert (here / "f/made").exists() and (here / "o/notebooks/02_long.html").exists()


def test_ctrl_c_stops_with_one_message(notebooks, tmp_path, capsys, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(workbook.papermill, "execute_notebook", interrupt)
    write_notebook(notebooks, "01_any.ipynb", "1")
    assert workbook.main(["--profile", "smoke", "--out", str(tmp_path / "out")]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert list((tmp_path / "out/notebooks").iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--profile", "huge"],
            "profile 'huge' is unknown: choose one of smoke, digits, moving-digits, cifar10, dit-xl-2, "
            "dit-xl-2-random, pixart",
        ),
        (["--only", "99"], "no notebook '99'"),
        (["--jobs", "0"], "--jobs 0"),
        (["--out", "/dev/null/x"], "cannot write results to /dev/null/x"),
    ],
)
def test_bad_arguments_get_one_clear_message(arguments, message, capsys, tmp_path):
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    assert workbook.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"dqar workbook: {message}")


def test_without_notebooks_nothing_is_made_and_the_message_says_where_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workbook.choose, "__defaults__", (tmp_path / "notebooks", True))
    assert workbook.main(["--profile", "smoke", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"no notebooks in {tmp_path / 'notebooks'}" in said and "repository" in said
    assert not (tmp_path / "out").exists()


def test_every_notebook_is_thin_clean_and_has_parameters():
    for path in workbook.choose(None):
        cells = nbformat.read(path, as_version=4).cells
        parameters = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(parameters) == 1, path
        assert {"profile", "seed", "out"} <= {line.split(" =")[0] for line in parameters[0].source.splitlines()}
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert sum(len(cell.source.splitlines()) for cell in code) < 45, path


def test_tables_are_whole_resumed_and_traceable(tmp_path):
    run, calls = Run("smoke", 3, tmp_path), []

    def measure():
        calls.append(1)
        return pd.DataFrame({"x": [1, 2]})

    first, second = run.table("t", measure), run.table("t", measure)
    assert calls == [1] and first.equals(second)
    source = second.attrs["provenance"]
    assert source["profile"]["name"] == "smoke" and source["seed"] == 3
    assert {"device", "dtype", "versions", "commit", "date", "seconds"} <= set(source)
    assert len(Run("smoke", 4, tmp_path).table("t", measure)) == 2 and len(calls) == 2  # another seed, another table

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.table("u", fail)
    assert sorted(path.name for path in run.results.iterdir()) == ["t-seed3.parquet", "t-seed4.parquet"]
    path = run.results / "t-seed3.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"t-seed3\.parquet is truncated"):
        load_table(path)


def test_a_figure_has_picture_vector_and_sidecar(tmp_path):
    run = Run("smoke", 0, tmp_path)
    figure, axes = plt.subplots()
    axes.set_title("a finding")
    style.save(run, "slide99_test", figure, pd.DataFrame())
    assert {path.suffix for path in (run.figures / "appendix").iterdir()} == {".png", ".svg", ".json"}
    assert plt.imread(run.figures / "appendix/slide99_test.png").shape[:2] == (1080, 1920)
    sidecar = json.loads((run.figures / "appendix/slide99_test.json").read_text())
    assert sidecar["title"] == "a finding" and sidecar["seed"] == 0 and sidecar["commit"]


def test_unknown_profiles_fields_and_schedulers_are_named():
    with pytest.raises(ValueError, match="profile 'tiny' is unknown"):
        get_profile("tiny")
    with pytest.raises(ValueError, match="profile field 'stpes' is unknown"):
        get_profile("digits", stpes=3)
    with pytest.raises(ValueError, match="scheduler 'pndm' is unknown"):
        make_scheduler("pndm", load_pipeline(get_profile("smoke")).scheduler)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'dit-xl-2' needs a CUDA GPU"):
            load_pipeline(get_profile("dit-xl-2"))


def test_dit_xl_2_is_loaded_by_its_own_code_path(dit_folder, monkeypatch, tmp_path):
    """From a small DiTPipeline saved locally; the tables that make sense without a digit classifier come out whole."""
    tiny = {
        "weights": Weights(str(dit_folder)),
        "device": "cpu",
        "dtype": torch.float32,
        "num_samples": 2,
        "num_inference_steps": 4,
        "repeats": 1,
    }
    monkeypatch.setitem(profiles.PROFILES, "tiny", get_profile("dit-xl-2", **tiny))
    run = Run("tiny", 0, tmp_path)
    pipe = load_pipeline(run.profile)
    assert type(pipe).__name__ == "DiTPipeline" and type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    sites = trace.sites(run)
    assert len(sites) == 4 * 4 * 2 and sites.entropy.between(0, math.log(16)).all()
    assert sites.change.isna().sum() == 4 * 2  # the first step has none before it
    configs = {"closed": sampling.LOOK, "open": sampling.OPEN}
    methods = [compare.Method(name, config=config) for name, config in configs.items()]
    table = compare.compare_all([*methods, compare.Method("half", num_inference_steps=2)], run.profile, 0)
    assert table.psnr[0] == math.inf and table.psnr[1] < 60 and "class_accuracy" not in table
    assert 1 < table.macs_speedup[1] < table.macs_speedup[2] < 2  # the VAE is counted, too


def test_truncated_weights_are_named(tmp_path):
    subprocess.run(["cp", "-r", str(WEIGHTS / "digits"), str(tmp_path)], check=True)
    shard = next((tmp_path / "digits/transformer").glob("*-00002-*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(OSError, match="can't be read"):
        load_embedded("digits", folder=tmp_path)
    with pytest.raises(OSError, match="missing"):
        load_embedded("nothing", folder=tmp_path)


@functools.cache
def two_digits(scheduler, steps, **options):
    """Drawn by the embedded model, whose reference is to converge."""
    pipe, profile = cached_pipeline(get_profile("smoke", scheduler=scheduler)), get_profile("smoke", num_samples=2)
    like = pipe.scheduler
    pipe.scheduler = type(like).from_config(like.config, **options)
    try:
        return sample(pipe, profile, 0, num_inference_steps=steps).images
    finally:
        pipe.scheduler = like


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++", "euler"])
def test_more_steps_come_closer_to_many_steps(scheduler):
    coarse, fine, finest = (two_digits(scheduler, steps) for steps in (4, 8, 16))
    assert metrics.mean_psnr(fine, finest) > metrics.mean_psnr(coarse, finest) + 3 > 20


def test_clipping_keeps_guided_ddim_from_converging():
    """Why ``make_scheduler`` switches it off."""
    clipped, free = (
        metrics.mean_psnr(*(two_digits("ddim", steps, **options) for steps in (8, 16)))
        for options in ({"clip_sample": True}, {})
    )
    assert free > clipped + 6


def test_the_embedded_model_draws_the_digits_it_is_asked_for():
    pipe, profile = load_pipeline(get_profile("smoke")), get_profile("smoke", num_samples=10, batch_size=10)
    drawn = sample(pipe, profile, 0, num_inference_steps=8)
    predicted, _ = metrics.classify(load_classifier(), drawn.images)
    assert predicted.tolist() == drawn.labels.tolist() == list(range(10))


def test_the_classifier_is_as_good_as_its_card_says():
    images, labels = load_digits_split("test")
    predicted, _ = metrics.classify(load_classifier(), images / 2 + 0.5)
    accuracy = (predicted == labels).double().mean().item()
    card = json.loads((WEIGHTS / "digits-classifier/card.json").read_text())
    assert accuracy == pytest.approx(card["held_out_accuracy"], abs=0.003) and accuracy >= 0.97
    digits = load_digits_split("train")[0].flatten(1)
    assert len(digits) + len(images) == 1797


def test_an_image_depends_on_its_seed_and_index_only():
    profile = get_profile("smoke", num_samples=3, batch_size=3, num_inference_steps=4)
    pipe = load_pipeline(profile)
    together = sample(pipe, profile, 5)
    one_by_one = sample(pipe, dataclasses.replace(profile, batch_size=1), 5)
    torch.testing.assert_close(together.images, one_by_one.images, atol=1e-4, rtol=0)
    assert not torch.equal(together.images, sample(pipe, profile, 6).images)


def test_a_proposed_gate_opens_for_the_wanted_share():
    table = pd.DataFrame({"snr": [0.1] * 50 + [1.0] * 100, "entropy": [0.0] * 50 + [i / 100 for i in range(100)]})
    gate = calibrate.propose_gate(table, share=0.3)
    inside = table[table.snr.between(*gate.snr_range)]
    assert (inside.entropy < gate.entropy_threshold).mean() == pytest.approx(0.3, abs=0.011)
    with pytest.raises(ValueError, match="share=0"):
        calibrate.propose_gate(table, share=0)
    with pytest.raises(ValueError, match="snr_range"):
        calibrate.propose_gate(table, snr_range=(1e3, 1e4))


def test_slide_12s_bounds():
    bound = claims.bounds().set_index(["target", "sites"]).speedup_bound
    assert bound["kv", 1400] == pytest.approx(1.19, abs=0.005)
    assert bound["output", 1400] == pytest.approx(1.56, abs=0.005)
    assert 1 - 1 / bound["output", 47] == pytest.approx(0.012, abs=0.0005)


def test_training_resumes_as_if_never_interrupted(tmp_path, monkeypatch):
    small = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1, "batch_size": 4}
    recipe = Recipe(num_steps=4, warmup_steps=1, **small)
    straight = train_transformer(recipe, tmp_path / "a", checkpoint_every=2)
    steps = iter([False, False, False, True])

    def interrupted_loss(*arguments, loss=digits.training_loss):
        if next(steps, False):
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(digits, "training_loss", interrupted_loss)
    with pytest.raises(KeyboardInterrupt):
        train_transformer(recipe, tmp_path / "b", checkpoint_every=2)
    resumed = train_transformer(recipe, tmp_path / "b", checkpoint_every=2)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "a/loss.jsonl").read_text() == (tmp_path / "b/loss.jsonl").read_text()
    with pytest.raises(ValueError, match="another recipe"):
        train_transformer(Recipe(num_steps=9), tmp_path / "b")


def test_training_starts_from_the_identity():
    recipe = Recipe(num_layers=2, attention_head_dim=8, num_attention_heads=1)
    model = build_transformer(recipe)
    output = model(torch.randn(2, 1, 8, 8), timestep=torch.tensor([3, 4]), class_labels=torch.tensor([1, 10])).sample
    assert output.abs().max() == 0
