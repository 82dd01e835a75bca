"""The package's structure is what DESIGN says: parts, arrows between them, no circle."""

import ast
import builtins
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dqar.peers.registry import ALL_RIVALS
from dqar.studies import architecture

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

BELOW = {
    "core": set(),
    "models": {"core"},
    "measure": {"core", "models"},
    "forecast": {"core", "models", "measure"},
    "training": {"core", "models", "measure"},
    "peers": {"core", "models", "measure"},
    "studies": {"core", "models", "measure", "forecast", "peers", "training"},
    "figures": {"core", "models", "measure", "forecast", "peers", "studies"},
    "commands": {"core", "models", "measure", "forecast", "peers", "studies", "figures", "training"},
}


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse(architecture.path_of(name).read_text())


def test_no_arrow_runs_up():
    graph = architecture.folder_graph()
    assert graph.keys() == BELOW.keys()
    for part, imports in graph.items():
        assert imports <= BELOW[part], part


def test_no_import_goes_in_a_circle():
    levels = architecture.levels(architecture.import_graph())
    assert levels["attention"] > levels["controller"]
    with pytest.raises(ValueError, match="a → b → a"):
        architecture.levels({"a": {"b"}, "b": {"a"}})


def test_the_controller_needs_no_diffusers():
    graph, needed = architecture.import_graph(), ["controller"]
    for name in needed:
        needed += graph[name] - {*needed}
        imports = [node for node in ast.walk(parsed(name)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert "diffusers" not in " ".join(map(ast.unparse, imports)), name


def test_no_test_uses_a_private_name():
    private, tests = set(), Path(__file__).parent
    for node in (node for name in architecture.module_names() for node in ast.walk(parsed(name))):
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        named = getattr(node, "name", None) or (stored and getattr(node, "attr", getattr(node, "id", None)))
        if named and re.match(r"_[^_]", named):
            private.add(named)
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dqar"):
                assert not private & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
                assert node.attr not in private, f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", architecture.module_names())
def test_a_module_says_in_its_first_line_what_it_is_for(name):
    docstring = ast.get_docstring(parsed(name))
    assert docstring and docstring.splitlines()[0].endswith((".", ":", "?"))


Documented = ast.FunctionDef | ast.ClassDef
SHAPE = re.compile(r"``[^`]*\[[^`]+\][^`]*``|\b(shapes?|scalars?)\b")
CHECKS = {"check", "check_choice", "check_count"}
"""Of ``dqar.checks``: they raise ``ValueError``."""


def public(name: str) -> Iterator[tuple[Documented, str]]:
    """A module's public classes, functions and methods with their docstrings; a constructor's is its class's."""

    def inside(node: ast.AST, docstring: str) -> Iterator[tuple[Documented, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Documented) and child.name == "__init__":
                yield child, docstring
            elif isinstance(child, Documented) and not child.name.startswith("_"):
                yield child, ast.get_docstring(child) or ""
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, ast.get_docstring(child) or "")

    return inside(parsed(name), "")


def takes_or_returns_a_tensor(node: Documented) -> bool:
    if isinstance(node, ast.ClassDef):
        return False
    given = [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)]
    written = [ast.unparse(each) for each in (*given, node.returns) if each is not None]
    return any("torch.Tensor" in each and not each.startswith("Callable") for each in written)


def errors_of(node: Documented) -> set[str]:
    """The built-in exceptions that a function raises itself."""
    if isinstance(node, ast.ClassDef):
        return set()
    errors = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call):
            errors.add(ast.unparse(each.exc.func))
        elif isinstance(each, ast.Call) and ast.unparse(each.func) in CHECKS:
            errors.add("ValueError")
    return errors & set(vars(builtins)) - {"NotImplementedError"}


def is_named(error: str, docstring: str) -> bool:
    """Whether it is named, or what it is a kind of."""
    return any(kind.__name__ in docstring for kind in vars(builtins)[error].__mro__[:-3])


def first_line(name: str) -> str:
    docstring = ast.get_docstring(parsed(name))
    assert docstring
    return docstring.splitlines()[0]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_a_question_is_a_notebook_a_study_and_a_figure_file_under_one_word(path):
    number, word = path.stem.split("_", 1)
    assert first_line(f"studies.{word}").startswith(f"Notebook {number}")
    assert first_line(f"figures.{word}").startswith(f"Figures of notebook {number}")


def test_a_command_is_the_file_of_its_name():
    files = {name.removeprefix("commands.") for name in architecture.module_names() if name.startswith("commands.")}
    for name in files - {"parser"}:
        assert first_line(f"commands.{name}").startswith(f"``dqar {name}``")


@pytest.mark.parametrize("rival", ALL_RIVALS.values(), ids=lambda rival: rival.name)
def test_a_rival_names_what_it_keeps_and_its_paper_or_library(rival):
    assert rival.keeps and re.search(r"arXiv \d{4}\.\d{5}|\b(19|20)\d\d\b|diffusers|cache-dit", rival.source)


@pytest.mark.parametrize("name", architecture.module_names())
def test_public_names_are_explained_with_shapes_units_and_errors(name):
    for node, docstring in public(name):
        assert docstring, f"{node.name} has no docstring"
        assert "PSNR" not in docstring or "dB" in docstring, f"{node.name} doesn't say that PSNR is in dB"
        if takes_or_returns_a_tensor(node):
            assert SHAPE.search(docstring), f"{node.name} says of no tensor which shape it has"
        missing = {error for error in errors_of(node) if not is_named(error, docstring)}
        assert not missing, f"{node.name} doesn't say when it raises {missing}"
