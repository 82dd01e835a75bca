"""Notebook 02: whether low entropy means that reuse is safe (slide 5)."""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch

from dqar.config import DQARConfig
from dqar.measure.calibrate import propose_gate
from dqar.measure.results import Run
from dqar.measure.sampling import LOOK, OPEN, sample
from dqar.models.pipelines import cached_pipeline
from dqar.studies.compare import compare, time_configs
from dqar.studies.trace import sites


def gate_configs(run: Run) -> dict[str, DQARConfig | None]:
    """The gates that slides 5 and 12 are about: closed, the deck's, and one calibrated on this model's trace."""
    calibrated = propose_gate(sites(run))
    return {
        "full compute": None,
        "looking only": LOOK,
        "deck's gate, kv": DQARConfig(reuse_target="kv"),
        "deck's gate, output": DQARConfig(reuse_target="output"),
        "calibrated, kv": dataclasses.replace(calibrated, reuse_target="kv"),
        "calibrated, output": dataclasses.replace(calibrated, reuse_target="output"),
    }


def gates(run: Run) -> pd.DataFrame:
    """Quality and cost of each gate, and its speed against full compute, measured in turn in one process."""

    def measure() -> pd.DataFrame:
        configs = gate_configs(run)
        return compare(run, configs).merge(time_configs(run, configs), on="method")

    return run.table("gates", measure)


def gated_sites(run: Run) -> pd.DataFrame:
    """The full trace, site by site, of the deck's gate and the calibrated one; column ``method``; four images."""

    def measure() -> pd.DataFrame:
        return pd.concat(
            sample(cached_pipeline(run.profile), run.profile, run.seed, config, num_samples=4, description=method)
            .trace.to_pandas()
            .assign(method=method)
            for method, config in gate_configs(run).items()
            if config is not None and config != LOOK
        )

    return run.table("gated_sites", measure)


def reuse_samples(run: Run) -> dict[str, torch.Tensor]:
    """Images ``[10, C, H, W]`` of the same seeds: full compute, the calibrated gate, and every step reused in turn."""
    configs = {
        "full compute": None,
        "calibrated gate, output": gate_configs(run)["calibrated, output"],
        "every 2nd step, output": dataclasses.replace(OPEN, schedule="static", reuse_target="output"),
        "every 2nd step, kv, INT2": dataclasses.replace(OPEN, schedule="static", quantize_bits=2),
    }
    pipe = cached_pipeline(run.profile)
    number = min(10, run.profile.num_samples)
    return {
        method: sample(pipe, run.profile, run.seed, config, num_samples=number, description=method).images
        for method, config in configs.items()
    }
