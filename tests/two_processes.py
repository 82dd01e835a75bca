"""Run by test_sweep: two processes at once, with the environment that ``accelerate launch`` sets.

Both are forks of this one, which imports torch and diffusers for them.
"""

import json
import multiprocessing
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
from dqar.commands import sweep  # noqa: F401 - imported once for both
from dqar.studies import compare
from dqar.studies.recording import Recording

folder = Path(sys.argv[1])
asked = json.loads((folder / "gate.json").read_text())


def decided(rank, steps, group):
    """The sites that a gate lets this rank's own image reuse."""
    config = DQARConfig(entropy_threshold=asked["entropy"], snr_range=(asked["snr"], 1e9), schedule="all")
    pipe = embedded_pipeline()
    with apply_dqar(pipe, config, group=group) as session:
        draw(pipe, [rank + 1], steps=steps, seed=rank)
    return sorted(map(list, sites_of(session.trace.to_pandas())))


def work(rank):
    """Decides with the other rank, and measures a sweep's units, in the second of which rank 1 is killed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    PartialState(cpu=True)
    decisions = {"alone": decided(rank, 8, None)}
    try:
        decided(rank, 6 + rank, distributed.group.WORLD)
    except ValueError as error:
        decisions["refused"] = str(error)
    decisions["together"] = decided(rank, 8, distributed.group.WORLD)
    (folder / f"rank-{rank}.json").write_text(json.dumps(decisions))

    compare.cached_pipeline = lambda profile: image_pipeline()
    measure, measured = Recording.compare, []

    def dying(self, *arguments):
        measured.append(arguments)
        if rank == 1 and len(measured) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(self, *arguments)

    Recording.compare = dying
    sys.exit(main(json.loads((folder / "sweep.json").read_text())))


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print("exit codes {} and {}".format(*(process.exitcode for process in processes)))
