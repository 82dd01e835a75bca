"""What ``import dqar`` brings along, in a process of its own."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, logging, sys
import torch, diffusers
before = set(sys.modules)
loggers = {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree", "diffusers")}
def decorated(*args, **kwargs):
    raise AssertionError("imports torch._dynamo where diffusers doesn't")
disable, torch.compiler.disable = torch.compiler.disable, decorated
import dqar
from dqar import *
DQARConfig, dqar.stats.snr
changed = [name for name, level in loggers.items() if logging.getLogger(name).level != level]
print(json.dumps([sorted(set(sys.modules) - before), changed]))
"""


@pytest.fixture(scope="module")
def imported():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    modules, loggers = json.loads(done.stdout)
    return {name.split(".")[0] for name in modules}, loggers, done.stderr


def test_it_brings_nothing_that_torch_and_diffusers_do_not(imported):
    slow = {"pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "torchao", "transformers", "accelerate", "triton"}
    packages, _, _ = imported
    assert "dqar" in packages and not packages & slow


def test_it_silences_nobody_and_says_nothing(imported):
    _, loggers, errors = imported
    assert not loggers and not errors
