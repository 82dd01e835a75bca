"""Notebook 02: whether low entropy means that reuse is safe (slide 5)."""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch

from dqar.config import DQARConfig
from dqar.measure.calibrate import propose_gate
from dqar.measure.results import Run
from dqar.measure.sampling import LOOK, OPEN
from dqar.studies.compare import FULL, Method, compare_all, speeds, times
from dqar.studies.trace import sites


def gate_methods(run: Run) -> list[Method]:
    """The gates that slides 5 and 12 are about: closed, the deck's, and one calibrated on this model's trace."""
    gates = {"deck's gate": DQARConfig(), "calibrated": propose_gate(sites(run))}
    return [
        FULL,
        Method("looking only", config=LOOK),
        *(
            Method(f"{family}, {target}", family, dataclasses.replace(config, reuse_target=target))
            for family, config in gates.items()
            for target in ("kv", "output")
        ),
    ]


def gates(run: Run) -> pd.DataFrame:
    """Quality and cost of each gate (``compare.summarize``), and its speed, measured in turn (``compare.speeds``)."""

    def measure() -> pd.DataFrame:
        methods = gate_methods(run)
        seconds = times(methods, run.profile, run.seed)
        return compare_all(methods, run.profile, run.seed).merge(speeds(seconds, run.profile), on="method")

    return run.table("gates", measure)


def gated_sites(run: Run) -> pd.DataFrame:
    """The full trace, site by site, of the deck's gate and the calibrated one, with ``Method.columns``; four images."""

    def measure() -> pd.DataFrame:
        gated = [method for method in gate_methods(run) if method.family in ("deck's gate", "calibrated")]
        return pd.concat(
            method.draw(run.profile, run.seed, num_samples=4).traced.to_pandas().assign(**method.columns())
            for method in gated
        )

    return run.table("gated_sites", measure)


def reuse_samples(run: Run) -> dict[str, torch.Tensor]:
    """Images ``[10, C, H, W]`` of the same seeds: full compute, the calibrated gate, and every step reused in turn."""
    calibrated = next(m for m in gate_methods(run) if m.family == "calibrated" and m.columns()["target"] == "output")
    static = dataclasses.replace(OPEN, schedule="static")
    methods = (
        FULL,
        dataclasses.replace(calibrated, name="calibrated gate, output"),
        Method("every 2nd step, output", config=dataclasses.replace(static, reuse_target="output")),
        Method("every 2nd step, kv, INT2", config=dataclasses.replace(static, quantize_bits=2)),
    )
    number = min(10, run.profile.num_samples)
    return {method.name: method.draw(run.profile, run.seed, num_samples=number).images for method in methods}
