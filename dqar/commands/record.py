"""``dqar record``: makes the long measurements of a profile, table by table; an interrupted recording goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError

from dqar.commands.parser import Parser, asked_profile
from dqar.measure.results import RECORDED
from dqar.models.pipelines import check_device
from dqar.models.profiles import Profile, profile_of
from dqar.studies.estimate import estimate
from dqar.studies.record import TABLES
from dqar.studies.recording import Recording, check_recordable
from dqar.studies.reference import check_reference


def run(arguments: list[str]) -> int:
    """Records the chosen tables; its log is ``record.log`` in the folder of parts.

    Raises:
        ValueError: an argument isn't accepted, or the profile can't be recorded.
        OSError: weights or finished parts can't be read, or tables can't be written.
        RuntimeError: the device failed.
        FloatingPointError: NaN or inf. Of these four, each says in which table; finished parts stay.
    """
    parser = Parser("record", "Makes the long measurements that the figures draw from. Takes hours; resumes.")
    parser.add_profile()
    parser.add_changes()
    parser.add_argument("--only", metavar="TABLES", help=f"comma-separated, of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--out", type=Path, default=RECORDED, help="folder of the tables (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/record"), help="parts and log (default: runs/record)")
    parser.add_argument("--estimate", action="store_true", help="time a few steps, say what it will take, and stop")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else list(TABLES)
    if unknown := [name for name in chosen if name not in TABLES]:
        raise ValueError(f"table {unknown[0]!r} is unknown: choose from {', '.join(TABLES)}")
    profile = profile_of(asked_profile(options))
    check_recordable(profile)
    check_device(profile)
    check_reference(profile)
    if options.estimate:
        print(_estimate(profile, options.out, chosen))
        return 0
    recording = Recording(profile, options.work, options.out)
    logging.basicConfig(filename=options.work / "record.log", level=logging.INFO, format="%(asctime)s %(message)s")
    for name in chosen:
        try:
            TABLES[name](recording)
        except (ValueError, OSError, RuntimeError, FloatingPointError, SafetensorError) as error:
            # Of Safetensors' errors, writing to a full disk is the likely one.
            kinds = (ValueError, RuntimeError, FloatingPointError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            kept = f"finished parts are kept in {recording.parts}, and the same command goes on"
            raise kind(f"{name}: {reason}; {kept}") from error
        print(f"{name}: recorded in {recording.folder}")
    return 0


def _estimate(profile: Profile, out: Path, chosen: list[str]) -> str:
    table = estimate(profile, out / profile.label)
    table = table[table.part.isin(chosen)]
    total = pd.DataFrame([{"part": "in all", "hours": table.hours.sum(), "disk_gb": table.disk_gb.sum()}])
    measured = (
        f"{profile.label} on {table.attrs['device']}, {table.attrs['images_at_once']} images at once: "
        f"{1000 * table.attrs['seconds_per_step']:.1f} ms a step of a guided image, "
        f"{1000 * table.attrs['seconds_per_image']:.1f} ms to decode it, "
        f"{table.attrs['peak_bytes'] / 1e9:.1f} GB of memory at the peak"
    )
    rows = pd.concat([table, total]).to_string(index=False, float_format="{:.2f}".format)
    return f"{measured}\nat most:\n{rows}"
