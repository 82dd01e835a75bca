"""Notebook 03: which layers may reuse at which steps (slide 8)."""

from __future__ import annotations

import dataclasses

import pandas as pd

from dqar.config import DQARConfig
from dqar.measure.results import Run
from dqar.measure.sampling import OPEN, sample
from dqar.models.pipelines import cached_pipeline
from dqar.studies.compare import compare


def schedule_configs() -> dict[str, DQARConfig]:
    """Every schedule with the gate wide open, for both reuse targets."""
    kinds = {
        "depth_aware": {"schedule": "depth_aware"},
        "linear": {"schedule": "linear"},
        "linear_reverse": {"schedule": "linear_reverse"},
        "all": {"schedule": "all"},
        "static 2": {"schedule": "static", "static_interval": 2},
        "static 3": {"schedule": "static", "static_interval": 3},
    }
    return {
        f"{name}, {target}": dataclasses.replace(OPEN, reuse_target=target, **options)
        for name, options in kinds.items()
        for target in ("kv", "output")
    }


def schedules(run: Run) -> pd.DataFrame:
    """Quality and MACs of each schedule, and of simply taking fewer steps."""

    def measure() -> pd.DataFrame:
        full = run.profile.num_inference_steps
        fewer = {f"{steps} steps": steps for steps in (full * 9 // 10, full * 8 // 10, full // 2)}
        return compare(run, {**schedule_configs(), **fewer})

    return run.table("schedules", measure)


def schedule_maps(run: Run) -> pd.DataFrame:
    """What each schedule did at each step and layer of one image, as traced: method, step, layer, decision."""

    def measure() -> pd.DataFrame:
        tables = []
        for method, config in schedule_configs().items():
            if config.reuse_target == "output":
                drawn = sample(
                    cached_pipeline(run.profile), run.profile, run.seed, config, num_samples=1, description=method
                )
                table = drawn.trace.to_pandas()
                tables.append(table[table.branch == "cond"].assign(method=method.split(",")[0]))
        return pd.concat(tables)[["method", "step", "layer", "decision", "reason"]]

    return run.table("schedule_maps", measure)
