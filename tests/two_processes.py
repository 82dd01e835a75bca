"""Run by test_sweep in two processes at once, with the environment that ``accelerate launch`` sets."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from helpers import draw, embedded_pipeline, image_pipeline, sites_of
from torch import distributed

from dqar import DQARConfig, apply_dqar
from dqar.__main__ import main
from dqar.studies import compare
from dqar.studies.recording import Recording

torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
asked = json.loads((folder / "gate.json").read_text())
PartialState(cpu=True)


def decided(steps, group):
    """The sites that a gate lets this rank's own image reuse."""
    config = DQARConfig(entropy_threshold=asked["entropy"], snr_range=(asked["snr"], 1e9), schedule="all")
    pipe = embedded_pipeline()
    with apply_dqar(pipe, config, group=group) as session:
        draw(pipe, [rank + 1], steps=steps, seed=rank)
    return sorted(map(list, sites_of(session.trace.to_pandas())))


found = {"alone": decided(8, None)}
try:
    decided(6 + rank, distributed.group.WORLD)
except ValueError as error:
    found["refused"] = str(error)
found["together"] = decided(8, distributed.group.WORLD)
(folder / f"rank-{rank}.json").write_text(json.dumps(found))

compare.cached_pipeline = lambda profile: image_pipeline()
measure, measured = Recording.compare, []


def dying(self, *arguments):
    """Rank 1 is killed in its second unit."""
    measured.append(arguments)
    if rank == 1 and len(measured) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, *arguments)


Recording.compare = dying
sys.exit(main(json.loads((folder / "sweep.json").read_text())))
