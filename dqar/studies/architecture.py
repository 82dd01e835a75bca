"""The package's own structure, read from its imports: what slide 10's picture is drawn from, and a test checks."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
CORE = "core"
"""The top level of the package, and of ``forecast`` what a plan needs to run."""
ABOVE_THE_CORE = {"__init__", "__main__", "api", "workbook"}
"""Top-level modules that put the parts together."""
RUNTIME = {"forecast.plan", "forecast.run", "forecast.ladder"}


def module_names() -> list[str]:
    """Every module of the package but the ``__init__`` files, as in ``"measure.results"``."""
    paths = (path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(parts) for parts in paths if parts[-1] != "__init__")


def folder_of(module: str) -> str:
    """The part that a module belongs to: ``"core"``, or its folder's name; ``""`` for what puts the parts together."""
    if module in ABOVE_THE_CORE:
        return ""
    return CORE if "." not in module or module in RUNTIME else module.split(".")[0]


def import_graph() -> dict[str, set[str]]:
    """Which module imports which others at run time; type-checking imports don't count."""
    modules = set(module_names())
    return {name: _imports(path_of(name), modules) - {name} for name in modules}


def path_of(module: str) -> Path:
    """The file of a module."""
    return PACKAGE / (module.replace(".", "/") + ".py")


def core_graph() -> dict[str, set[str]]:
    """``import_graph`` of the core alone."""
    graph = import_graph()
    core = {name for name in graph if folder_of(name) == CORE}
    return {name: graph[name] & core for name in sorted(core)}


def folder_graph() -> dict[str, set[str]]:
    """Which part imports from which others."""
    parts: dict[str, set[str]] = {}
    for name, imports in import_graph().items():
        if folder_of(name):
            parts.setdefault(folder_of(name), set()).update(map(folder_of, imports))
    return {name: imports - {name, ""} for name, imports in parts.items()}


def purposes() -> dict[str, str]:
    """First line of each core module's docstring."""
    docstrings = {name: ast.get_docstring(ast.parse(path_of(name).read_text())) or "" for name in core_graph()}
    return {name: text.splitlines()[0] for name, text in docstrings.items()}


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The longest chain of imports below each module; 0 for those that import none of the others.

    Raises:
        ValueError: the imports go in a circle.
    """
    depths: dict[str, int] = {}

    def level(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"circular imports: {' → '.join([*above, name])}")
        if name not in depths:
            depths[name] = 1 + max((level(other, (*above, name)) for other in graph[name]), default=-1)
        return depths[name]

    return {name: level(name) for name in graph}


def _imports(path: Path, modules: set[str]) -> set[str]:
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith("dqar."):
            base = node.module.removeprefix("dqar").removeprefix(".")
            inside = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            names.update((inside | {base}) & modules)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names
