"""Notebook 03: which layers may reuse at which steps (slide 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from dqar.measure.results import Run
from dqar.measure.sampling import OPEN
from dqar.scheduler import eligible_layers
from dqar.studies.compare import Method, compare_all

SCHEDULES: dict[str, dict[str, Any]] = {
    "depth_aware": {"schedule": "depth_aware"},
    "linear": {"schedule": "linear"},
    "linear_reverse": {"schedule": "linear_reverse"},
    "all": {"schedule": "all"},
    "static 2": {"schedule": "static", "static_interval": 2},
    "static 3": {"schedule": "static", "static_interval": 3},
}
"""Families of methods: the gate wide open under each schedule."""


def settling(sites: pd.DataFrame, steps: int) -> pd.DataFrame:
    """How much layers change from one step to the next (median), by depth and by part of the run.

    Both are the depth-aware schedule's own parts: at 28 layers, shallow is 0 to 2, middle 3 to 12, deep the rest;
    early is the first 30 % of the run, late the last 30 %.

    Args:
        sites: of ``trace.sites``.
        steps: of a run.

    Returns:
        Rows ``shallow``, ``middle``, ``deep``; columns ``early``, ``middle``, ``late``.
    """
    later = sites.dropna(subset=["change"])  # than the first step, which has none before it
    count = int(later.layer.max()) + 1
    ends = [len(eligible_layers(step, steps, count, "depth_aware")) for step in range(steps)]
    depth = pd.cut(
        later.layer, [-1, ends[0] - 1, ends[steps // 2] - 1, count - 1], labels=["shallow", "middle", "deep"]
    )
    part = pd.cut(later.step / (steps - 1), [0, 0.3, 0.7, 2], right=False, labels=["early", "middle", "late"])
    return later.groupby([depth, part], observed=False).change.median().unstack()


def schedule_methods() -> list[Method]:
    """Every schedule with the gate wide open, for both reuse targets."""
    return [
        Method(f"{family}, {target}", family, dataclasses.replace(OPEN, reuse_target=target, **options))
        for family, options in SCHEDULES.items()
        for target in ("kv", "output")
    ]


def schedules(run: Run, methods: Sequence[Method] | None = None) -> pd.DataFrame:
    """Quality and MACs of each schedule, and of simply taking fewer steps: ``compare.summarize``.

    Args:
        methods: to measure anew, in place of these, whose table is kept.
    """
    if methods is not None:
        return compare_all(methods, run.profile, run.seed)

    def measure() -> pd.DataFrame:
        full = run.profile.num_inference_steps
        counts = (full * 9 // 10, full * 8 // 10, full // 2)
        fewer = (Method(f"{steps} steps", "fewer steps", num_inference_steps=steps) for steps in counts)
        return compare_all([*schedule_methods(), *fewer], run.profile, run.seed)

    return run.table("schedules", measure)


def schedule_maps(run: Run) -> pd.DataFrame:
    """What each schedule did at each step and layer of one image, with the attention output reused.

    Returns:
        ``family``, ``step``, ``layer``, ``decision``, ``reason``.
    """

    def measure() -> pd.DataFrame:
        tables = []
        for method in schedule_methods():
            if method.columns()["target"] == "output":
                table = method.draw(run.profile, run.seed, num_samples=1).traced.to_pandas()
                tables.append(table[table.branch == "cond"].assign(family=method.family))
        return pd.concat(tables)[["family", "step", "layer", "decision", "reason"]]

    return run.table("schedule_maps", measure)
