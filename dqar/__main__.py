"""The one command, ``dqar`` or ``python -m dqar``: each subcommand is the ``main`` of the module that does the work."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "workbook": ("dqar.workbook", "runs the notebooks and makes the figures"),
    "plan": ("dqar.forecast.command", "makes a forecast plan for a pipeline or profile"),
    "calibrate": ("dqar.measure.calibrate", "proposes a gate for a profile's model"),
    "record": ("dqar.studies.record", "makes the long measurements that the figures draw from"),
    "benchmark": ("dqar.studies.benchmarks", "times the mechanism at DiT-XL/2's size"),
    "train": ("dqar.training.command", "trains the embedded models"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code, or 2 if there is none of that name."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    lines = [f"  {name:10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    print(
        "usage: dqar COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\n`dqar COMMAND --help` lists a command's options."
    )
    return 0 if arguments in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main())
