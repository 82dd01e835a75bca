"""The package's structure is what DESIGN says: parts, arrows between them, no circle."""

import ast
import subprocess
import sys

import pytest

from dqar.studies import architecture

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
    code = "import sys; sys.modules['diffusers'] = None; import importlib.util, types\n"
    code += "import pathlib; p = types.ModuleType('dqar'); p.__path__ = [str(pathlib.Path('dqar').resolve())]\n"
    code += "sys.modules['dqar'] = p; import dqar.controller"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=architecture.PACKAGE.parent)


@pytest.mark.parametrize("name", architecture.module_names())
def test_a_module_says_in_its_first_line_what_it_is_for(name):
    docstring = ast.get_docstring(ast.parse(architecture.path_of(name).read_text()))
    assert docstring and docstring.splitlines()[0].endswith((".", ":", "?"))
