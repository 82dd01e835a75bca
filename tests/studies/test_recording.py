"""What goes wrong in a recording is one clear message, and finished parts stay; what it takes is said beforehand."""

import dataclasses
import errno
import shutil

import pandas as pd
import pytest
import torch
from helpers import save_dit
from safetensors import SafetensorError
from safetensors.torch import save_file

from dqar.__main__ import main
from dqar.measure import results as files
from dqar.models.pipelines import cached_pipeline
from dqar.models.profiles import Weights, get_profile
from dqar.studies import estimate, pareto, policy, record
from dqar.studies.compare import FULL, Method, draw
from dqar.studies.recording import Recording, Sizes

ASKED = ["record", "--profile", "dit-xl-2", "--device", "cpu", "--set", "dtype=float32", "--set", "rehearsal=true"]


def record_all(tmp_path, *arguments):
    return main([*ASKED, *map(str, arguments), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])


def part(values):
    def measure():
        if isinstance(values, Exception):
            raise values
        return pd.DataFrame({"value": values})

    return measure


@pytest.mark.parametrize(
    "error, code, message",
    [
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be"),
            1,
            "unspecified",
        ),
        (RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."), 1, "driver"),
        (
            OSError(errno.ENOSPC, "No space left on device", "speed.parquet"),
            2,
            "No space left on device: 'speed.parquet'",
        ),
        (ValueError("nonsense"), 2, "nonsense"),
        (FloatingPointError("NaN or inf before step 3"), 1, "before step 3"),
        (SafetensorError("I/O error: No space left on device"), 2, "No space left"),
    ],
)
def test_what_fails_is_said_once_and_finished_parts_stay(error, code, message, tmp_path, monkeypatch, capsys):
    parts = {1: part([1]), 2: part(error)}
    monkeypatch.setitem(record.TABLES, "speed", lambda recording: recording.table("speed", parts, 0))
    assert record_all(tmp_path, "--only", "speed") == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dqar record: speed: ") and message in said and said.endswith("the same command goes on")
    assert [path.name for path in (tmp_path / "work").glob("*/*.parquet")] == ["speed-1.parquet"]
    parts[1], parts[2] = part(AssertionError("measured again")), part([2])
    assert record_all(tmp_path, "--only", "speed") == 0
    (table,) = (tmp_path / "out").rglob("speed.parquet")
    assert files.load_table(table).value.tolist() == [1, 2]


def test_parts_of_another_setting_are_never_mixed(tmp_path):
    def recorded(**changes):
        profile = get_profile("dit-xl-2", **{"weights": Weights("here/tiny"), "device": "cpu", **changes})
        return Recording(profile, tmp_path / "work", tmp_path / "out")

    recorded().table("t", {1: part([1])}, 0)
    other = recorded(guidance_scale=4.0)
    assert other.table("t", {1: part([2])}, 0).value.tolist() == [2] and other.folder != recorded().folder
    with pytest.raises(ValueError, match=r"parts that were recorded with weights .*here/tiny.*there/tiny"):
        recorded(weights=Weights("there/tiny")).table("t", {1: part([3])}, 0)


@pytest.mark.parametrize("damage", ["truncated", "missing", "of another model"])
def test_a_half_downloaded_snapshot_is_named(damage, dit_folder, tmp_path, capsys):
    shutil.copytree(dit_folder, tmp_path / "tiny")
    weights = next((tmp_path / "tiny/transformer").glob("*.safetensors"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    else:
        save_file({"pos_embed.proj.weight": torch.zeros(3, 3)}, weights)
    assert record_all(tmp_path, "--weights", tmp_path / "tiny", "--only", "reference") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"'dit-xl-2' needs {tmp_path / 'tiny'}" in said and "half-downloaded" in said


def test_a_wrong_revision_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert record_all(tmp_path, "--weights", "facebook/DiT-XL-2-256@abc", "--only", "reference") == 2
    assert "needs facebook/DiT-XL-2-256 at revision abc from" in capsys.readouterr().err


def test_work_is_what_a_recording_asks_of_the_model(tmp_path):
    """Counted by a hook: rows of guided batches, half of them being images."""
    weights = Weights(str(save_dit(tmp_path / "dit", num_layers=2)))
    changes = {"weights": weights, "device": "cpu", "dtype": torch.float32, "images": 2, "repeats": 1}
    profile = get_profile("dit-xl-2", rehearsal=True, num_inference_steps=4, **changes)
    recording, rows = Recording(profile, tmp_path / "work", tmp_path / "out"), [0]

    def count(_module, args, kwargs):
        rows[0] += len(args[0] if args else kwargs["hidden_states"]) // 2

    handle = cached_pipeline(profile).transformer.register_forward_pre_hook(count, with_kwargs=True)
    expected = estimate.works(profile, recording.folder)
    try:
        for name in (
            "reference",
            "labels",
            "oracle",
            "policy",
            "deciders",
            "overhead",
            "accumulation",
            "sharing",
            "bits",
            "layers",
        ):
            rows[0] = 0
            if name == "layers":  # counts the full compute that an earlier part has drawn
                next(recording.parts.glob("full-compute*-200-0-*.pt")).unlink()
            record.TABLES[name](recording)
            work = expected.get(name, estimate.Work(0))
            most = work.steps + work.small + work.alone  # two parts that draw the same full compute share it
            assert 0.95 * most <= rows[0] <= most, name
    finally:
        handle.remove()
    table = estimate.estimate(profile, recording.folder)
    assert set(table.part) <= set(record.TABLES) and (table.hours >= 0).all() and table.hours.sum() > 0
    assert table.attrs["seconds_per_step"] > 0 and table.attrs["peak_bytes"] > 0


def test_an_offloaded_model_is_refused_at_once(tmp_path, capsys):
    assert record_all(tmp_path, "--set", "offload=true") == 2
    assert "offload=True can't be recorded" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_method_that_ends_in_nan_leaves_the_others_as_they_are(tmp_path, monkeypatch):
    recording = Recording(get_profile("smoke"), tmp_path / "work", tmp_path / "out")

    def fails(_method, *_args, **_options):
        raise FloatingPointError("NaN or inf before step 3")

    half = Method("half", "fewer steps", num_inference_steps=4)
    monkeypatch.setattr(pareto, "compare", fails)
    (measure,) = pareto.comparisons(recording, [half], "dpm-solver++", 0, 2).values()
    with pytest.warns(UserWarning, match="half has no result: NaN or inf before step 3"):
        failed = measure()
    assert failed[["mse", "mse_converged", "macs_speedup"]].isna().all(axis=None) and failed.image.tolist() == [0, 1]
    fine = failed.assign(method="fine", mse=1e-4, mse_converged=1e-4, macs_speedup=2.0)
    points = pareto.summary(pd.concat([failed, fine], ignore_index=True))
    assert pareto.best_at(points, 1.5).method == "fine"


def test_without_two_kinds_of_labels_there_is_no_policy(tmp_path, monkeypatch):
    recording = Recording(get_profile("smoke"), tmp_path / "work", tmp_path / "out")
    monkeypatch.setattr(policy, "calibrated_delta", lambda _oracle: 1.0)
    monkeypatch.setattr(policy, "record_oracle", lambda _recording: None)
    monkeypatch.setattr(policy, "recorded_labels", lambda *_args: pd.DataFrame({"error": [0.1, 0.2]}))
    with pytest.warns(UserWarning, match="no policy for kv: all its errors are below δ = 1"):
        assert policy.recorded_policy(recording, "kv") is None
    assert not list(tmp_path.rglob("policy-*"))


def test_images_limit_every_part():
    few, many = (Sizes.of(get_profile("dit-xl-2", images=n)) for n in (5, 10_000))
    assert (few.samples, few.part, few.plan_images, few.pareto_images, few.sweep_images) == (5, 5, 5, 5, 5)
    assert (many.samples, many.part, many.plan_images, many.pareto_images) == (10_000, 100, 120, 20)
    assert (few.converged_images, many.converged_images) == (10, 240)
    assert few.label_images == 10  # or no class would be left for a policy to be judged by
    assert Sizes.of(get_profile("digits")) == Sizes(headline_images=1000)
    photographs = {"arena_images": 250, "headline_images": 250}
    assert Sizes.of(get_profile("cifar10")) == Sizes(refinements=2, **photographs)


def test_what_others_are_compared_with_is_drawn_in_parts_that_are_kept(tmp_path):
    own = Recording(get_profile("smoke"), tmp_path / "work", tmp_path / "out")
    own.sizes = dataclasses.replace(own.sizes, part=2)
    first = own.drawn(FULL, 5, 1, 3)
    kept = {path: path.stat().st_mtime_ns for path in own.parts.glob("*.pt")}
    whole, all_of_them = draw(FULL, own.many_at_once, 5, 1, 5), own.drawn(FULL, 5, 1, 5)
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len(list(own.parts.glob("*.pt"))) == 4  # of images 3 and 4 together, and of 5
    assert torch.equal(all_of_them.images[:2], first.images[:2])
    torch.testing.assert_close(all_of_them.images, whole.images)
    assert all_of_them.labels.tolist() == whole.labels.tolist() and all_of_them.macs == pytest.approx(whole.macs)
    own.profile = dataclasses.replace(own.profile, guidance_scale=3.5)
    with pytest.raises(ValueError, match=r"-5-1-2\.pt has .*with guidance_scale 2.0, and 3.5 is asked"):
        own.drawn(FULL, 5, 1, 3)
