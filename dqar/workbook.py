"""Runs all notebooks headlessly: ``python -m dqar workbook --profile digits``."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import shutil
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from dqar.figures.gallery import publish
from dqar.measure.results import Run, atomic_path, code_hash, recorded_hash
from dqar.models.profiles import get_profile

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
ABOUT_TIME = ("10_benchmarks",)
"""Notebooks that score no image."""


@dataclass(frozen=True)
class Outcome:
    """How one notebook went; ``error`` names the cell."""

    notebook: str
    seconds: float
    status: str
    error: str = ""


def choose(only: str | None, folder: Path = NOTEBOOKS, trained: bool = True) -> list[Path]:
    """The notebooks whose names begin with one of the comma-separated ``only``; all if it is ``None``.

    Args:
        trained: whether the model is; with random weights, only the notebooks about time make sense.

    Raises:
        ValueError: nothing there begins so.
    """
    notebooks = sorted(folder.glob("[0-9]*.ipynb"))
    if not trained:
        notebooks = [path for path in notebooks if path.stem in ABOUT_TIME]
    if only is None and notebooks:
        return notebooks
    chosen = []
    for prefix in (only or "").split(","):
        found = [path for path in notebooks if prefix.strip() and path.name.startswith(prefix.strip())]
        if not found:
            names = ", ".join(path.stem for path in notebooks) or "none"
            kind = "" if trained else " that makes sense with random weights"
            raise ValueError(f"no notebook {prefix!r}{kind} in {folder}: there are {names}")
        chosen += found
    return chosen


def run_notebook(path: Path, profile: str, seed: int, out: Path) -> Outcome:
    """Executes one notebook into ``out/notebooks`` as .ipynb and HTML; a copy that succeeded before is kept."""
    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / path.name
    made_of = f"{profile}|{seed}|{code_hash(everything=True)}|{recorded_hash(profile)}"
    key = hashlib.sha256(made_of.encode() + path.read_bytes()).hexdigest()
    if executed.exists() and nbformat.read(executed, as_version=4).metadata.get("dqar_key") == key:
        return Outcome(path.stem, 0.0, "kept")
    started = time.monotonic()
    parameters = {"profile": profile, "seed": seed, "out": str(out.resolve())}
    failed = folder / f"{path.stem}.failed.ipynb"
    os.environ["TQDM_DISABLE"] = "1"  # for the kernel, whose bars would stand in the page; papermill's own bar stays
    try:
        with atomic_path(executed) as temporary:
            try:
                progress = {"desc": path.stem}
                papermill.execute_notebook(path, temporary, parameters, progress_bar=progress, cwd=path.parent)
            except PapermillExecutionError:
                shutil.copy(temporary, failed)
                raise
            notebook = nbformat.read(temporary, as_version=4)
            notebook.metadata["dqar_key"] = key
            nbformat.write(notebook, temporary)
    except PapermillExecutionError as error:
        message = f"cell {error.cell_index} of {path.name}: {error.ename}: {_plain(error.evalue)}"
        return Outcome(path.stem, time.monotonic() - started, "failed", message)
    html, _ = HTMLExporter().from_notebook_node(notebook)
    with atomic_path(executed.with_suffix(".html")) as temporary:
        temporary.write_text(html)
    failed.unlink(missing_ok=True)
    return Outcome(path.stem, time.monotonic() - started, "done")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 if a notebook failed, 2 for a wrong argument, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="dqar workbook", description=__doc__)
    parser.add_argument("--profile", default="digits", help="see dqar/models/profiles.py (default: digits)")
    parser.add_argument("--only", help="comma-separated beginnings of notebook names, such as 01,03")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once; more than 1 spoils the timings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="results, figures and executed notebooks")
    parser.add_argument("--figures", type=Path, help="copy the figures here when all notebooks have succeeded")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs} is not accepted: 1 or more")
        profile = get_profile(options.profile)
        Run(options.profile, options.seed, options.out)
        notebooks = choose(options.only, trained=profile.trained)
        logging.basicConfig(filename=options.out / "workbook.log", level=logging.INFO, format="%(asctime)s %(message)s")
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    warnings.filterwarnings("ignore", category=nbformat.validator.MissingIDFieldWarning)

    def run(path: Path) -> Outcome:
        return run_notebook(path, options.profile, options.seed, options.out)

    try:
        if options.jobs == 1:
            outcomes = [run(path) for path in notebooks]
        else:
            with ThreadPoolExecutor(options.jobs) as pool:
                outcomes = list(pool.map(run, notebooks))
    except KeyboardInterrupt:
        console.print("[red]stopped; finished notebooks and tables are kept, the same command continues[/red]")
        return 130
    table = Table("notebook", "status", "seconds", title=f"profile {options.profile}, seed {options.seed}")
    for outcome in outcomes:
        logging.info("%s: %s in %.0f s %s", outcome.notebook, outcome.status, outcome.seconds, outcome.error)
        table.add_row(outcome.notebook, outcome.status, f"{outcome.seconds:.0f}")
    console.print(table)
    errors = [outcome.error for outcome in outcomes if outcome.status == "failed"]
    for error in errors:
        console.print(f"failed: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    if not errors and options.figures:
        publish(options.out / "figures", options.figures)
    return 1 if errors else 0


def _plain(text: str) -> str:
    """Without the colour codes of tracebacks."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
