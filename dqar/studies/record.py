"""Long measurements, made once and committed: ``dqar record --profile digits`` (``make results``).

They take hours on a CPU, so figures read them from ``recorded/``, and a notebook draws a few of the images anew to see
whether they still agree. Each stands beside its question; this is their list.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from dqar.measure.results import RECORDED
from dqar.models.profiles import get_profile
from dqar.studies import challenges, pareto, policy, results
from dqar.studies.recording import Recording

TABLES: dict[str, Callable[[Recording], object]] = {
    "labels": policy.record_labels,
    "oracle": policy.record_oracle,
    "policy": policy.record_policies,
    "deciders": policy.record_deciders,
    "overhead": challenges.record_overhead,
    "accumulation": challenges.record_accumulation,
    "sharing": challenges.record_sharing,
    "plans": pareto.record_plans,
    "pareto": pareto.record_pareto,
    "speed": results.record_speed,
    "memory": results.record_memory,
    "samples": results.record_samples,
}
"""In the order in which they are recorded: each also records what it needs of those before."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for a wrong argument, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dqar record", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--profile", default="digits", help="see dqar/models/profiles.py (default: digits)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(TABLES)}; default: all, in this order")
    parser.add_argument("--out", type=Path, default=RECORDED, help=f"folder of the tables (default: {RECORDED})")
    parser.add_argument("--work", type=Path, default=Path("runs/record"), help="finished parts and the log")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        chosen = options.only.split(",") if options.only else list(TABLES)
        if unknown := set(chosen) - set(TABLES):
            raise ValueError(f"table {sorted(unknown)[0]!r} is unknown: choose from {', '.join(TABLES)}")
        recording = Recording(get_profile(options.profile), options.work, options.out)
    except (ValueError, OSError, RuntimeError) as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    logging.basicConfig(filename=options.work / "record.log", level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        for name in chosen:
            TABLES[name](recording)
            console.print(f"{name}: recorded in {recording.folder}")
    except KeyboardInterrupt:
        console.print("[red]stopped; finished parts are kept, the same command continues[/red]")
        return 130
    return 0
