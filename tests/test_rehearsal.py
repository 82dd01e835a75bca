"""The deck's own experiment, rehearsed: every part of ``dqar record`` and every notebook on tiny DiT and PixArt."""

import json
import os
import subprocess
import sys

import pytest
from diffusers import DDIMScheduler, DiTPipeline
from helpers import make_dit, make_pixart, randomize

from dqar.studies.record import TABLES

SETTINGS = ["--device", "cpu", "--images", "2"]
for setting in ("dtype=float32", "rehearsal=true", "num_inference_steps=6", "batch_size=2", "repeats=1"):
    SETTINGS += ["--set", setting]


def dqar(*arguments, **environment):
    """The command in a process of its own."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "dqar", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def save_tiny(name, folder):
    """A pipeline of 28 layers, 16 wide, as ``save_pretrained`` leaves it."""
    if name == "pixart":
        make_pixart(num_layers=28).save_pretrained(folder)
    else:
        parts = make_dit(scheduler=DDIMScheduler(clip_sample=False), num_layers=28).components
        DiTPipeline(**parts).save_pretrained(folder)


@pytest.mark.parametrize("name", ["dit-xl-2", "pixart"])
def test_every_slide_is_made(name, tmp_path):
    save_tiny(name, tmp_path / name)
