"""The package's own structure, read from its imports: what slide 10's picture is drawn from."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent


def import_graph() -> dict[str, set[str]]:
    """Which module of the package imports which others at run time; type-checking imports don't count."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return {name: _imports(PACKAGE / f"{name}.py") & modules - {name} for name in sorted(modules)}


def purposes() -> dict[str, str]:
    """First line of each module's docstring, up to its first colon, semicolon or full stop."""
    lines = {}
    for name in import_graph():
        docstring = ast.get_docstring(ast.parse((PACKAGE / f"{name}.py").read_text())) or ""
        first = docstring.splitlines()[0]
        for mark in (":", ";", "."):
            first = first.split(mark)[0]
        lines[name] = first
    return lines


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The longest chain of imports below each module; 0 for those that import none of the others.

    Raises:
        ValueError: the imports go in a circle.
    """
    found: dict[str, int] = {}

    def level(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"circular imports: {' → '.join([*above, name])}")
        if name not in found:
            found[name] = 1 + max((level(other, (*above, name)) for other in graph[name]), default=-1)
        return found[name]

    return {name: level(name) for name in graph}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module == "dqar":
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dqar."):
            names.add(node.module.split(".")[1])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names
