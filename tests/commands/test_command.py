"""The ``dqar`` command: what it says, where, and with which exit code."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

import dqar
from dqar import __main__ as command


def answering(monkeypatch, run):
    """Makes ``run`` what ``dqar train`` does."""
    monkeypatch.setitem(sys.modules, "dqar.commands.train", types.SimpleNamespace(run=run))


def test_a_citation_names_the_packages_version():
    citation = (Path(__file__).parents[2] / "CITATION.cff").read_text()
    assert f"\nversion: {dqar.__version__}\n" in citation


def test_help_is_there_before_torch_is():
    code = "import sys; from dqar.__main__ import main; main(['--help'])\n"
    code += "print(sorted({'torch', 'diffusers'} & {*sys.modules}))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith("usage: dqar COMMAND") and said.endswith("[]\n")
    assert all(f"  {name} " in said for name in command.COMMANDS) and max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: dqar {name} ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["wrkbook"], "dqar: command 'wrkbook' is unknown: choose one of workbook, deck, plan, "),
        (["plan", "--macs", "much"], "dqar plan: argument --macs: invalid float value: 'much'"),
        (["plan", "--prof", "digits"], "dqar plan: unrecognized arguments: --prof digits"),
        (
            ["plan", "--steps", "20"],
            "dqar plan: --steps is for a --pipeline: of a profile, --set num_inference_steps=N",
        ),
        (["plan", "--out", "."], "dqar plan: --out . is not accepted: it is a folder"),
        (["plan", "--promise", "45", "95"], "dqar plan: share=95.0 is not accepted"),
        (["plan", "--offload"], "dqar plan: --offload is for a --pipeline: of a profile, --set offload=true"),
        (["plan", "--set", "images=0"], "dqar plan: profile field images=0 is not accepted"),
        (["plan", "--pipeline", "x", "--prompts", "y", "--weights", "z"], "dqar plan: --weights changes a profile"),
        (["calibrate", "--share", "0.5", "--set", "steps=9"], "dqar calibrate: profile field 'steps' is unknown"),
        (["calibrate"], "dqar calibrate: one of the arguments --share --psnr --bytes is required"),
        (["train", "imagenet"], "dqar train: argument model: invalid choice: 'imagenet' (choose from "),
    ],
)
def test_wrong_arguments_get_one_line_and_code_2(arguments, message, capsys):
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(message) and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, message",
    [
        (ValueError("share=2 is not accepted:\n in (0, 1]"), 2, "share=2 is not accepted: in (0, 1]"),
        (FileNotFoundError(2, "No such file or directory", "plan.json"), 2, "'plan.json'"),
        (RuntimeError("needs a CUDA GPU"), 1, "needs a CUDA GPU"),
        (RuntimeError(), 1, "RuntimeError"),
        (ImportError("cannot import name 'x'"), 1, "cannot import name 'x'"),
        (ModuleNotFoundError(name="pyarrow.parquet"), 1, "needs pyarrow, which isn't installed: pip install"),
        (ModuleNotFoundError(name="torch_fidelity"), 1, "isn't installed: pip install 'dqar[gpu]'"),
        (KeyboardInterrupt(), 130, "stopped; what is finished is kept, and the same command continues"),
    ],
)
def test_whatever_fails_is_one_line(error, code, message, monkeypatch, capsys):
    def run(_options):
        raise error

    answering(monkeypatch, run)
    assert command.main(["train", "digits"]) == code
    said = capsys.readouterr().err
    assert said.startswith("dqar train: ") and message in said and said.count("\n") == 1


def test_public_names_are_found_when_they_are_asked_for():
    assert set(dqar.__all__) <= set(dir(dqar)) and all(hasattr(dqar, name) for name in dqar.__all__)
    with pytest.raises(AttributeError, match="module 'dqar' has no attribute 'apply'"):
        dqar.apply  # noqa: B018
