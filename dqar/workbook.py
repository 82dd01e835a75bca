"""``dqar workbook``: runs the notebooks headlessly, keeps executed copies and HTML, and collects the figures."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
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

from dqar import __main__ as command
from dqar.commands.parser import Parser
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
        ValueError: there are no notebooks in ``folder``, or none begins so.
    """
    notebooks = sorted(folder.glob("[0-9]*.ipynb"))
    if not notebooks:
        raise ValueError(
            f"no notebooks in {folder}: the package is without them. Get dqar's repository and run "
            "`pip install -e '.[workbook]'` and `dqar workbook` there"
        )
    if not trained:
        notebooks = [path for path in notebooks if path.stem in ABOUT_TIME]
    if only is None:
        return notebooks
    chosen = []
    for prefix in only.split(","):
        found = [path for path in notebooks if prefix.strip() and path.name.startswith(prefix.strip())]
        if not found:
            names = ", ".join(path.stem for path in notebooks)
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
    """``dqar workbook`` for callers in Python: returns the exit code that ``dqar.__main__.main`` explains."""
    return command.main(["workbook", *(sys.argv[1:] if arguments is None else arguments)])


def run(arguments: list[str]) -> int:
    """Runs the chosen notebooks; returns 0, or 1 if one failed.

    Raises:
        ValueError: an argument isn't accepted, or there are no notebooks.
        OSError: ``--out`` or ``--figures`` can't be written.
    """
    parser = Parser("workbook", "Runs the notebooks and makes the figures. Keeps what is finished; resumes.")
    parser.add_profile()
    parser.add_argument("--only", metavar="NAMES", help="comma-separated beginnings of notebook names, such as 01,03")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once; more spoil timings (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all sampling (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of all that is made (default: out)")
    parser.add_argument("--figures", type=Path, help="folder for a copy of the figures, when all notebooks succeed")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs} is not accepted: 1 or more")
    profile = get_profile(options.profile)
    notebooks = choose(options.only, trained=profile.trained)
    Run(options.profile, options.seed, options.out)
    logging.basicConfig(filename=options.out / "workbook.log", level=logging.INFO, format="%(asctime)s %(message)s")
    warnings.filterwarnings("ignore", category=nbformat.validator.MissingIDFieldWarning)

    def one(path: Path) -> Outcome:
        return run_notebook(path, options.profile, options.seed, options.out)

    if options.jobs == 1:
        outcomes = [one(path) for path in notebooks]
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            outcomes = list(pool.map(one, notebooks))
    console = Console()
    table = Table("notebook", "status", "seconds", title=f"profile {options.profile}, seed {options.seed}")
    for outcome in outcomes:
        logging.info("%s: %s in %.0f s %s", outcome.notebook, outcome.status, outcome.seconds, outcome.error)
        table.add_row(outcome.notebook, outcome.status, f"{outcome.seconds:.0f}")
    console.print(table)
    failed = [outcome.error for outcome in outcomes if outcome.status == "failed"]
    for error in failed:
        console.print(f"failed: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    if not failed and options.figures:
        publish(options.out / "figures", options.figures)
    return 1 if failed else 0


def _plain(text: str) -> str:
    """Without the colour codes of tracebacks."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
