"""Units of a sweep are shared by processes, and survive them; a gate decides alike on the ranks of a group."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import draw, embedded_pipeline, image_pipeline, sites_of

from dqar import DQARConfig, apply_dqar
from dqar.__main__ import main
from dqar.measure.results import load_table
from dqar.measure.sampling import LOOK
from dqar.models.profiles import get_profile
from dqar.studies import compare
from dqar.studies.recording import Recording
from dqar.studies.sweep import Sweep, grid

FIELDS = {"reuse_target": ["output", "block"], "schedule": ["static"], "entropy_threshold": [None], "snr_range": [None]}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A folder, after two processes have worked in it, of which the second was killed in its second unit."""
    folder = tmp_path_factory.mktemp("sweep")
    pipe = embedded_pipeline()
    with apply_dqar(pipe, LOOK) as session:
        draw(pipe, [1, 2])
    signals = session.trace.to_pandas()[["entropy", "snr"]].median()
    (folder / "gate.json").write_text(json.dumps({"entropy": signals.entropy, "snr": signals.snr}))
    (folder / "grid.json").write_text(json.dumps(FIELDS))
    options = ["--per-seed", "2", "--part", "1", "--seeds", "0,1", "--out", folder / "out", "--work", folder / "work"]
    asked = ["sweep", "--profile", "smoke", "--grid", folder / "grid.json", *options]
    (folder / "sweep.json").write_text(json.dumps([str(word) for word in asked]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(compare.__file__).parents[2]), str(Path(__file__).parents[1])]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    shared |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).parents[1] / "two_processes.py"), str(folder)]
    done = subprocess.run(command, env={**os.environ, **shared}, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("exit codes 0 and -9\n"), done
    return folder, done.stdout


def units(folder):
    return sorted(path.name for path in (folder / "work").rglob("sweep-*.parquet"))


def test_ranks_that_share_an_image_decide_alike(launched):
    folder, _ = launched
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["alone"] != second["alone"]  # they see different signals
    assert first["together"] == second["together"]
    # The mean over ranks is what a batch of both images decides by in one process.
    gate, pipe = json.loads((folder / "gate.json").read_text()), embedded_pipeline()
    config = DQARConfig(entropy_threshold=gate["entropy"], snr_range=(gate["snr"], 1e9), schedule="all")
    with apply_dqar(pipe, config) as session:
        draw(pipe, [1, 2])
    assert first["together"] == sorted(map(list, sites_of(session.trace.to_pandas())))
    assert 0 < len(first["together"]) < 8 * 4 * 2
    latents = "latents [2, 1, 8, 8]"
    message = f"rank 0: 6 steps from 0 on, {latents}; rank 1: 7 steps from 0 on, {latents}"
    assert first["refused"] == second["refused"] and first["refused"].endswith(message)


def test_a_dead_process_takes_only_its_own_unit_and_the_same_command_goes_on(launched, monkeypatch, capsys):
    folder, said = launched
    asked = json.loads((folder / "sweep.json").read_text())
    # Of 2 methods × 2 seeds × 2 images each process had four; the one that was killed finished one of them.
    assert "process 0 of 2: 4 units measured" in said and len(units(folder)) == 5
    assert main([*asked, "--merge"]) == 2
    message = "3 of 8 units are missing, first reuse_target block"
    assert message in capsys.readouterr().err and not list((folder / "out").rglob("*.parquet"))
    monkeypatch.setattr(compare, "cached_pipeline", lambda profile: image_pipeline())
    drawn, measure = [], Recording.compare
    monkeypatch.setattr(Recording, "compare", lambda self, *own: drawn.append(own) or measure(self, *own))
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert len(drawn) == 3 and "process 0 of 1: 3 units measured" in said and "saved: " in said
    (path,) = (folder / "out").rglob("sweep.parquet")
    table = load_table(path)
    assert len(table) == 8 and len(table[["method", "seed", "image"]].drop_duplicates()) == 8
    profile = get_profile("smoke", batch_size=1)
    for method in grid(FIELDS):
        for seed in (0, 1):
            reference = compare.draw(compare.FULL, profile, seed, num_samples=2)
            own = compare.compare(method, reference, profile, seed)
            kept = table[(table.method == method.name) & (table.seed == seed)].sort_values("image")
            assert kept.mse.to_numpy() == pytest.approx(own.mse.to_numpy(), rel=1e-4) and own.mse.min() > 0
    drawn.clear()
    assert main(asked) == 0 and not drawn  # nothing is drawn twice


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] is not accepted: one or more, each once"),
        ({"part": 0}, "part=0 is not accepted: 1 or more"),
        ({"name": "../x"}, "name='../x' is not accepted: letters, digits and hyphens"),
        ({"methods": grid(FIELDS) + grid(FIELDS)}, "each of its own name"),
        ({"methods": []}, "each of its own name"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(changes, message, tmp_path):
    recording = Recording(get_profile("smoke"), tmp_path, tmp_path)
    with pytest.raises(ValueError, match=message):
        Sweep(recording, **{"methods": grid(FIELDS), "seeds": [0], "images": 2, **changes})


def test_a_grid_is_every_combination():
    methods = grid({"cache.forecast_order": [0, 1], "reuse_target": ["output"], "probe.interval": [1, 2]})
    kinds = [(m.config.cache.forecast_order, m.config.reuse_target, m.config.probe.interval) for m in methods]
    assert kinds == [(0, "output", 1), (0, "output", 2), (1, "output", 1), (1, "output", 2)]
    assert len({method.name for method in methods}) == 4
    for fields, message in (
        ({"bits": [8]}, "unexpected keyword argument 'bits'"),
        ({"cache.order": [1]}, "unexpected keyword argument 'order'"),
        ({"quantize_bits": 8}, "quantize_bits=8 is not accepted: a list of values"),
        ({"quantize_bits": [7]}, "quantize_bits=7 is not accepted: choose one of"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(fields)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--families", "none"], "family 'none' is unknown: choose from full compute, fewer steps"),
        (["--families", "fewer steps", "--seeds", "a"], "--seeds=a is not accepted: whole numbers"),
        (["--grid", "/nowhere.json"], "No such file"),
        (["--families", "x", "--grid", "y"], "not allowed with argument"),
    ],
)
def test_wrong_arguments_are_one_message(options, message, tmp_path, capsys):
    assert main(["sweep", "--profile", "smoke", "--out", str(tmp_path), "--work", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
