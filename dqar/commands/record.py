"""``dqar record``: makes the long measurements of a profile, table by table; an interrupted recording goes on."""

from __future__ import annotations

import logging
from pathlib import Path

from dqar.commands.parser import Parser, asked_profile
from dqar.measure.results import RECORDED
from dqar.models.profiles import profile_of
from dqar.studies.record import TABLES
from dqar.studies.recording import Recording
from dqar.studies.reference import check_reference


def run(arguments: list[str]) -> int:
    """Records the chosen tables; its log is ``record.log`` in the folder of parts.

    Raises:
        ValueError: an argument isn't accepted, or the profile can't be recorded.
        OSError: weights or finished parts can't be read, or tables can't be written.
    """
    parser = Parser("record", "Makes the long measurements that the figures draw from. Takes hours; resumes.")
    parser.add_profile()
    parser.add_changes()
    parser.add_argument("--only", metavar="TABLES", help=f"comma-separated, of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--out", type=Path, default=RECORDED, help="folder of the tables (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/record"), help="parts and log (default: runs/record)")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else list(TABLES)
    if unknown := [name for name in chosen if name not in TABLES]:
        raise ValueError(f"table {unknown[0]!r} is unknown: choose from {', '.join(TABLES)}")
    profile = profile_of(asked_profile(options))
    check_reference(profile)
    recording = Recording(profile, options.work, options.out)
    logging.basicConfig(filename=options.work / "record.log", level=logging.INFO, format="%(asctime)s %(message)s")
    for name in chosen:
        TABLES[name](recording)
        print(f"{name}: recorded in {recording.folder}")
    return 0
