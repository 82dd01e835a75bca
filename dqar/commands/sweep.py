"""``dqar sweep``: measures methods on many seeds, shared by the processes of ``accelerate launch``."""

from __future__ import annotations

import json
from pathlib import Path

from dqar.checks import check
from dqar.commands.parser import Parser, asked_profile
from dqar.measure.results import RECORDED
from dqar.models.profiles import profile_of
from dqar.studies import pareto
from dqar.studies.compare import Method
from dqar.studies.recording import Recording, check_recordable
from dqar.studies.sweep import Sweep, grid


def run(arguments: list[str]) -> int:
    """Measures this process's share of what is missing. The process that finds all units there merges them.

    Raises:
        ValueError: an argument isn't accepted, or ``--merge`` while units are missing.
        OSError: weights or units can't be read, or the table can't be written.
    """
    parser = Parser("sweep", "Measures methods × seeds; with `accelerate launch -m dqar sweep` by many processes.")
    parser.add_profile()
    parser.add_changes()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--families", metavar="NAMES", help="comma-separated, of those that notebook 11 compares")
    what.add_argument(
        "--grid", type=Path, metavar="FILE", help="JSON: fields of DQARConfig, each with a list of values"
    )
    parser.add_argument("--settings", type=int, metavar="N", help="of each family, the first N (default: all)")
    parser.add_argument("--seeds", default="0", metavar="SEEDS", help="comma-separated (default: 0)")
    parser.add_argument("--per-seed", type=int, metavar="N", help="images of each seed (default: the profile's)")
    parser.add_argument("--part", type=int, default=12, metavar="N", help="images of a unit (default: 12)")
    parser.add_argument("--name", default="sweep", help="of the table (default: sweep)")
    parser.add_argument("--merge", action="store_true", help="draw nothing: merge, or say what is missing")
    parser.add_argument("--out", type=Path, default=RECORDED, help="folder of the table (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep"), help="finished units (default: runs/sweep)")
    options = parser.parse_args(arguments)
    profile = profile_of(asked_profile(options))
    check_recordable(profile)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds={options.seeds} is not accepted: whole numbers, such as 0,1,2") from None
    recording = Recording(profile, options.work, options.out)
    methods = _grid(options.grid) if options.grid else _families(recording, options.families, options.settings)
    images = profile.num_samples if options.per_seed is None else options.per_seed
    sweep = Sweep(recording, methods, seeds, images, options.part, options.name)
    if not options.merge:
        from accelerate import PartialState

        state = PartialState(cpu=profile.device == "cpu")
        done = sweep.run(state)
        print(f"process {state.process_index} of {state.num_processes}: {done} units measured", flush=True)
        if left := len(sweep.missing()):
            print(f"{left} of {len(sweep.units())} units are still missing; --merge, when all processes have ended")
            return 0
    print(f"saved: {sweep.merge()}")
    return 0


def _families(recording: Recording, asked: str, settings: int | None) -> list[Method]:
    profile = recording.profile
    if profile.scheduler not in pareto.SAMPLERS:
        raise ValueError(
            f"--families is for samplers {', '.join(pareto.SAMPLERS)}, not {profile.scheduler}: use --grid"
        )
    methods = pareto.contenders(profile, profile.scheduler, recording.folder)
    names, families = asked.split(","), list(dict.fromkeys(method.family for method in methods))
    if unknown := [name for name in names if name not in families]:
        raise ValueError(f"family {unknown[0]!r} is unknown: choose from {', '.join(families)}")
    check("--settings", settings, settings is None or settings >= 1, "1 or more")
    return [
        method
        for name in names
        for method in [method for method in methods if method.family == name][:settings]
    ]  # fmt: skip


def _grid(path: Path) -> list[Method]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--grid {path} is no JSON: {error}") from error
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"--grid {path} is not accepted: an object of fields, each with a list of values")
    return grid(fields)
