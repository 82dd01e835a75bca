"""The one command, ``dqar`` or ``python -m dqar``: finds the subcommand, and answers every error in one line."""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass

import dqar
from dqar.models.loggers import silence_torchao


@dataclass(frozen=True)
class Command:
    """A subcommand: the module whose ``run(arguments)`` does it and returns an exit code, and what it is for."""

    module: str
    purpose: str
    resumes: bool = False
    """Whether the same command goes on after an interruption."""


COMMANDS = {
    "workbook": Command("dqar.workbook", "run the notebooks and make the figures", resumes=True),
    "deck": Command("dqar.commands.deck", "make a PowerPoint file and a PDF of the figures"),
    "plan": Command("dqar.commands.plan", "fit a forecast plan, which computes only some steps of a run"),
    "calibrate": Command("dqar.commands.calibrate", "propose a gate, or the bits of each layer, for a model"),
    "record": Command("dqar.commands.record", "make the long measurements that the figures draw from", resumes=True),
    "sweep": Command("dqar.commands.sweep", "measure methods on many seeds, by many processes", resumes=True),
    "search": Command("dqar.commands.search", "search settings by Optuna: MACs against dB", resumes=True),
    "benchmark": Command("dqar.commands.benchmark", "time reuse at DiT-XL/2's size, or the cost of deciding"),
    "train": Command("dqar.commands.train", "train the embedded models", resumes=True),
}

EXTRAS = {
    "search": ("optuna", "sqlalchemy"),
    "gpu": ("google", "sentencepiece", "torch_fidelity", "torchvision"),
}
"""Packages, as they are imported, that another extra than ``workbook`` brings."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; errors go to standard error, one line each.

    Returns:
        The exit code: 0; 1 if something failed; 2 for a wrong argument, or a file that is missing or can't be read or
        written; 130 for Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *options = arguments
    if name == "--version":
        print(f"dqar {dqar.__version__}")
        return 0
    if name not in COMMANDS:
        return _fail("dqar", f"command {name!r} is unknown: choose one of {', '.join(COMMANDS)}", 2)
    silence_torchao()
    try:
        return importlib.import_module(COMMANDS[name].module).run(options)
    except KeyboardInterrupt:
        kept = "what is finished is kept, and the same command continues"
        return _fail(f"dqar {name}", f"stopped; {kept if COMMANDS[name].resumes else 'nothing was written'}", 130)
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        logging.getLogger(__name__).info("failed", exc_info=True)  # for the log file of commands that have one
        code = 2 if isinstance(error, (ValueError, OSError)) else 1
        return _fail(f"dqar {name}", _missing(error) or str(error) or type(error).__name__, code)


def usage() -> str:
    """What ``dqar --help`` prints."""
    lines = [f"  {name:10} {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dqar COMMAND [OPTIONS]",
            "",
            "Dynamic Quantized Attention Reuse in Diffusion Transformers.",
            "",
            "commands:",
            *lines,
            "",
            "`dqar COMMAND --help` lists a command's options, `dqar --version` prints the version.",
            "Exit codes: 0, 1 if something failed, 2 for a wrong argument or a missing file, 130 for Ctrl-C.",
        ]
    )


def _missing(error: Exception) -> str:
    """What to install if ``error`` is about a package that only an extra brings."""
    if not isinstance(error, ModuleNotFoundError) or not error.name or error.name.split(".")[0] == "dqar":
        return ""
    name = error.name.split(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if name in packages), "workbook")
    return f"needs {name}, which isn't installed: pip install 'dqar[{extra}]'"


def _fail(command: str, message: str, code: int) -> int:
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
