"""``dqar workbook``: runs the notebooks, keeps executed copies and HTML, shows results in them, collects figures."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from latex2mathml.converter import convert as mathml
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from PIL import Image, ImageChops
from rich.console import Console
from rich.table import Table
from traitlets.config import Config

from dqar import __main__ as command
from dqar.commands.parser import Parser, asked_profile
from dqar.figures.gallery import NOTEBOOKS, code_of, publish
from dqar.figures.notebook import check_parameters, store
from dqar.figures.style import with_palette
from dqar.files import atomic_path
from dqar.measure.results import Run, code_hash, recorded_hash
from dqar.models.profiles import profile_of

ABOUT_TIME = ("10_benchmarks",)
"""Notebooks that score no image."""
LIVE = "live"
"""Tag of cells that measure time: what they print differs from run to run, and isn't shown in committed notebooks."""


@dataclass(frozen=True)
class Outcome:
    """How one notebook went: ``"done"``, ``"kept"`` or ``"failed"``; ``error`` says where and why."""

    notebook: str
    seconds: float
    status: str
    error: str = ""


def choose(only: str | None, folder: Path = NOTEBOOKS, trained: bool = True) -> list[Path]:
    """The notebooks whose numbers or words begin with one of the comma-separated ``only``; all if it is ``None``.

    Args:
        only: such as ``"01"``, ``"trace"`` or ``"01,03"``.
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
    for prefix in (part.strip() for part in only.split(",")):
        names = {path: (path.name, path.name.partition("_")[2]) for path in notebooks}
        matching = [path for path in notebooks if prefix and any(name.startswith(prefix) for name in names[path])]
        if not matching:
            there = ", ".join(path.stem for path in notebooks)
            kind = "" if trained else " that makes sense with random weights"
            raise ValueError(f"no notebook {prefix!r}{kind} in {folder}: there are {there}")
        chosen += matching
    return list(dict.fromkeys(chosen))


def of_slide(slide: int, notebooks: list[Path]) -> list[Path]:
    """Those of ``notebooks`` that draw the deck's picture of a slide.

    Raises:
        ValueError: none does.
    """
    drawn = {path: {int(number) for number in re.findall(r"\.slide(\d\d)\(", code_of(path))} for path in notebooks}
    drawing = [path for path in notebooks if slide in drawn[path]]
    if not drawing:
        there = ", ".join(map(str, sorted(set().union(*drawn.values()))))
        raise ValueError(f"--slide {slide} is not accepted: these notebooks draw slides {there}")
    return drawing


def run_notebook(path: Path, profile: str | Mapping[str, Any], seed: int, out: Path) -> Outcome:
    """Executes one notebook into ``out/notebooks`` as .ipynb and HTML; a copy that succeeded before is kept.

    ``profile`` is what ``Run`` takes.

    Whatever goes wrong with this one, a kernel that dies or is missing or a file that can't be read, is its outcome, so
    that the others run.
    """
    started = time.monotonic()
    folder = out / "notebooks"
    executed, failed = folder / path.name, folder / f"{path.stem}.failed.ipynb"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        source = nbformat.read(path, as_version=4)
        recordings = recorded_hash(profile_of(profile).label)
        made_of = f"{profile}|{seed}|{code_hash(everything=True)}|{recordings}|{_written(source)}"
        key = hashlib.sha256(made_of.encode()).hexdigest()
        if executed.exists() and (notebook := _finished(executed)).metadata.get("dqar_key") == key:
            if not executed.with_suffix(".html").exists():
                write_html(notebook, executed.with_suffix(".html"))
            return Outcome(path.stem, 0.0, "kept")
        parameters = {"profile": profile, "seed": seed, "out": str(out)}
        with atomic_path(executed) as temporary, tempfile.TemporaryDirectory() as sockets:
            try:
                options = {"progress_bar": {"desc": path.stem}, "cwd": path.parent, "config": by_sockets(sockets)}
                papermill.execute_notebook(path, temporary, parameters, **options)
            except Exception:
                if temporary.exists():
                    shutil.copy(temporary, failed)
                raise
            notebook = nbformat.read(temporary, as_version=4)
            notebook.metadata["dqar_key"] = key
            nbformat.write(notebook, temporary)
        write_html(notebook, executed.with_suffix(".html"))
        failed.unlink(missing_ok=True)
        return Outcome(path.stem, time.monotonic() - started, "done")
    except Exception as error:
        logging.debug("%s failed", path.name, exc_info=True)
        return Outcome(path.stem, time.monotonic() - started, "failed", f"{_place(error)}{path.name}: {_reason(error)}")


def by_sockets(folder: str) -> Config:
    """Has a kernel spoken to by sockets in ``folder``: over TCP, which is not encrypted, each would warn of that."""
    return Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}} if os.name == "posix" else {})


def write_html(notebook: NotebookNode, path: Path) -> None:
    """Writes an executed notebook as one HTML file that needs no network: its formulas are MathML."""
    offline = NotebookNode(notebook)
    offline.cells = [
        NotebookNode({**cell, "source": with_mathml(cell.source)}) if cell.cell_type == "markdown" else cell
        for cell in notebook.cells
    ]
    html, _ = HTMLExporter(mathjax_url="", require_js_url="", mermaid_js_url="").from_notebook_node(offline)
    html = re.sub(r'<script src="">\s*</script>', "", html)  # of what was switched off
    html = html.replace(  # no picture is wider than its page
        "</head>", "<style>.jp-RenderedImage img { max-width: min(100%, 60em); height: auto }</style></head>", 1
    )
    with atomic_path(path) as temporary:
        temporary.write_text(html)


def with_mathml(markdown: str) -> str:
    """``markdown`` with its ``$...$`` as MathML, which browsers draw by themselves; code in backticks stays."""
    return re.sub(r"(`[^`]*`)|\$([^$\n]+)\$", lambda match: match[1] or mathml(match[2]).replace("\n", " "), markdown)


def show_results(executed: NotebookNode, path: Path) -> bool:
    """Puts the outputs of an executed copy into the notebook at ``path``, for whoever reads it without running it.

    Only what the notebook found is taken: no times, no counts of execution, no warnings or bars, and a picture that
    shows the same keeps its bytes. So the file changes only where a result or a cell has.

    Returns:
        Whether the file was written.
    """
    notebook = nbformat.read(path, as_version=4)
    outputs = {cell.id: cell.get("outputs", []) for cell in executed.cells}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = presentable(outputs.get(cell.id, []), cell.outputs, LIVE in cell.metadata.get("tags", []))
            cell.execution_count = None
    text = nbformat.writes(notebook) + "\n"
    if text == path.read_text():
        return False
    with atomic_path(path) as temporary:
        temporary.write_text(text)
    return True


def presentable(outputs: list[NotebookNode], before: list[NotebookNode], live: bool) -> list[NotebookNode]:
    """What ``show_results`` puts in the place of ``before``; nothing of a cell that is tagged ``LIVE``."""
    kept: list[NotebookNode] = []
    pictures = [output.data["image/png"] for output in before if "image/png" in output.get("data", {})]
    for output in outputs:
        if live or (output.output_type == "stream" and output.name == "stderr"):
            continue
        if output.output_type == "stream":
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=output.text))
        elif output.output_type in ("display_data", "execute_result"):
            data = dict(output.data)
            if "image/png" in data:
                picture = _smaller(data["image/png"])
                picture = next((old for old in pictures if _same_picture(old, picture)), picture)
                data = {"image/png": picture, "text/plain": data.get("text/plain", "")}
            elif "text/markdown" in data:
                data = {"text/markdown": data["text/markdown"], "text/plain": data["text/markdown"]}
            elif "application/vnd.jupyter.widget-view+json" in data:
                continue
            kept.append(nbformat.v4.new_output("display_data", data=data))
    return kept


def _smaller(png: str) -> str:
    picture = with_palette(Image.open(io.BytesIO(base64.b64decode(png))))
    return base64.b64encode(picture).decode() + "\n"


def _same_picture(before: str, after: str) -> bool:
    first, second = (Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in (before, after))
    return first.size == second.size and ImageChops.difference(first, second).getbbox() is None


def _finished(executed: Path) -> NotebookNode:
    """An executed copy.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return nbformat.read(executed, as_version=4)
    except Exception as error:
        raise ValueError(f"its executed copy {executed} is damaged: remove it and run again") from error


def _written(notebook: NotebookNode) -> str:
    """What somebody wrote of a notebook: cells and tags, without outputs, which follow from them."""
    return repr([(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells])


def _place(error: Exception) -> str:
    return f"cell {error.cell_index} of " if isinstance(error, PapermillExecutionError) else ""


def _reason(error: Exception) -> str:
    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {_plain(error.evalue)}"
    if isinstance(error, NoSuchKernel):
        return f"its kernel {error.name!r} isn't installed"
    if isinstance(error, DeadKernelError):
        return "its kernel died, as it does when memory runs out"
    return _plain(str(error)) if isinstance(error, ValueError) else f"{type(error).__name__}: {_plain(str(error))}"


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
    parser.add_changes()
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="NAMES", help="comma-separated beginnings of notebooks: 01,03 or trace")
    which.add_argument("--slide", type=int, help="only what draws the deck's picture of this slide")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once; more spoil timings (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all sampling (default: 0)")
    parser.add_argument("--out", type=Path, help="folder of all that is made (default: out/PROFILE)")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="a notebook's parameter, as for papermill: profile, seed or out",
    )  # fmt: skip
    parser.add_argument("--figures", type=Path, help="folder for a copy of the figures, when all notebooks succeed")
    parser.add_argument("--show", action="store_true", help="put the results into the notebooks, for their readers")
    options = parser.parse_args(arguments)
    check_parameters(name for name, _ in options.parameters)
    if options.parameters:
        parser.parse_args([f"--{name}={value}" for name, value in options.parameters], options)
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs} is not accepted: 1 or more")
    asked = asked_profile(options)
    profile = profile_of(asked)
    if profile.video:
        raise ValueError(f"profile {profile.name!r} has no notebook of its own: 09 shows it beside the digits")
    notebooks = choose(options.only, trained=profile.trained)
    if options.slide is not None:
        notebooks = of_slide(options.slide, notebooks)
    # Papermill changes the process's folder, and with several jobs leaves it changed.
    out, figures = (options.out or store(profile.label)).resolve(), options.figures and options.figures.resolve()
    Run(asked, options.seed, out)
    logging.basicConfig(filename=out / "workbook.log", level=logging.INFO, format="%(asctime)s %(message)s")
    warnings.filterwarnings("ignore", category=nbformat.validator.MissingIDFieldWarning)
    os.environ.pop("JPY_SESSION_NAME", None)  # where a notebook runs this: nobody watches the kernels that it starts

    def one(path: Path) -> Outcome:
        return run_notebook(path, asked if len(asked) > 1 else options.profile, options.seed, out)

    if options.jobs == 1:
        outcomes = [one(path) for path in notebooks]
    else:
        with contextlib.chdir("."), ThreadPoolExecutor(options.jobs) as pool:
            outcomes = list(pool.map(one, notebooks))
    console = Console()
    table = Table("notebook", "status", "seconds", title=f"profile {profile.label}, seed {options.seed}")
    for outcome in outcomes:
        logging.info("%s: %s in %.0f s %s", outcome.notebook, outcome.status, outcome.seconds, outcome.error)
        table.add_row(outcome.notebook, outcome.status, f"{outcome.seconds:.0f}")
    console.print(table)
    failed = [outcome.error for outcome in outcomes if outcome.status == "failed"]
    for error in failed:
        console.print(f"failed: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    if not failed and figures:
        publish(out / "figures", figures)
    if options.show:
        for path, outcome in zip(notebooks, outcomes, strict=True):
            if outcome.status != "failed":
                show_results(_finished(out / "notebooks" / path.name), path)
    return 1 if failed else 0


def _plain(text: str) -> str:
    """Without the colour codes of tracebacks."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
