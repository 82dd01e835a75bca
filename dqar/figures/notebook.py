"""What every notebook begins and ends with: checked parameters, one results store, quiet bars, and its answer."""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tqdm.auto
from IPython.core.getipython import get_ipython
from IPython.display import Markdown
from matplotlib.figure import Figure

from dqar.checks import check
from dqar.figures.style import with_minus
from dqar.measure.results import IN_A_CHECKOUT, PACKAGE, Run
from dqar.models.profiles import profile_of

PARAMETERS = ("profile", "seed", "out")
"""Of every notebook."""


def begin(profile: str | Mapping[str, Any], seed: int = 0, out: str | Path | None = None) -> Run:
    """The run that a notebook measures, draws and keeps its results in.

    Outside of JupyterLab and VS Code, as under papermill, it switches all progress bars off: nobody watches them, and
    they would stand in the page.

    Args:
        profile: a name from ``dqar.models.profiles``, or a mapping of its ``name`` and fields to change.
        seed: of all sampling.
        out: folder for results and figures; ``None``: ``store(profile)``.

    Raises:
        ValueError: papermill was given a parameter that notebooks don't take, the profile is unknown, or ``seed`` is no
            int.
        OSError: ``out`` can't be written.
    """
    shell = get_ipython()
    check_parameters(injected(shell.user_ns.get("In", [])) if shell is not None else [])
    check("seed", seed, isinstance(seed, int) and not isinstance(seed, bool), "an int")
    if not is_watched():
        tqdm.auto.tqdm.__init__ = functools.partialmethod(tqdm.auto.tqdm.__init__, disable=True)
    return Run(profile, seed, store(profile_of(profile).label) if out is None else out)


def store(profile: str) -> Path:
    """Where results of a profile are kept, for ``make``, command line and JupyterLab alike: ``out/<profile>``.

    In the repository, wherever the command runs; of an installed package, in the working folder.
    """
    return (PACKAGE.parent if IN_A_CHECKOUT else Path.cwd()) / "out" / profile


def check_parameters(names: Iterable[str]) -> None:
    """Raises ``ValueError`` for a parameter that notebooks don't take: papermill itself passes it on in silence."""
    for name in names:
        if name not in PARAMETERS:
            raise ValueError(f"parameter {name!r} is unknown: notebooks take {', '.join(PARAMETERS)}")


def injected(cells: Iterable[str]) -> list[str]:
    """The names that papermill's cell sets, among all cells that a kernel has run."""
    ours = (ast.parse(cell) for cell in cells if cell.startswith("# Parameters\n"))
    return [target.id for tree in ours for line in tree.body if isinstance(line, ast.Assign)
            for target in line.targets if isinstance(target, ast.Name)]  # fmt: skip


def is_watched() -> bool:
    """Whether someone sits before the notebook: JupyterLab's server names the session, VS Code the file."""
    shell = get_ipython()
    return "JPY_SESSION_NAME" in os.environ or (shell is not None and "__vsc_ipynb_file__" in shell.user_ns)


def shows(answer: str, *figures: Figure) -> Markdown:
    """A notebook's last lines: the answer to its question, its first sentence bold, and the findings that stand above
    its ``figures``."""
    findings = [" ".join(figure.get_suptitle().split()) for figure in figures if figure.get_suptitle()]
    first, gap, others = re.split(r"(?<=[.?!])(\s+|$)", with_minus(answer), maxsplit=1)
    return Markdown(
        f"## What this shows\n\n**{first}**{gap}{others}\n\n" + "\n".join(f"- {text}." for text in findings)
    )
