"""Notebook 09's batches: what drawing N images at once does to time and quality, where one gate decides for all.

A gate takes the mean of a batch's signals, so that its images share each decision; images drawn one by one have
decisions of their own. A plan decides beforehand, and is the same in every batch.
"""

from __future__ import annotations

import dataclasses
import functools

import pandas as pd

from dqar.measure import metrics
from dqar.measure.calibrate import propose_gate
from dqar.models.profiles import Profile
from dqar.studies import arena, policy
from dqar.studies.compare import FULL, Method, compare
from dqar.studies.pareto import PLAN, recorded_plan
from dqar.studies.recording import RESULT_SEED, Recording

GATE = "DQAR rule"
SIZES = (1, 2, 4, 8)
"""Images at once."""
BUDGET = 3
"""Full compute's MACs over the plan's."""


def methods(recording: Recording) -> list[Method]:
    """Full compute, the calibrated gate on the attention's output, and a forecast plan if one is recorded."""
    gate = propose_gate(policy.recorded_labels(recording, "output"))
    chosen = [FULL, Method(GATE, config=dataclasses.replace(gate, reuse_target="output"))]
    plan = recorded_plan(recording.folder, recording.profile, BUDGET)
    return chosen if plan is None else [*chosen, Method(PLAN, config=plan)]


def record_batches(recording: Recording) -> pd.DataFrame:
    """Quality and time of each method in batches of each size.

    Returns:
        ``together`` (images at once) and ``method``; either ``image``, ``mse``, ``macs_speedup`` and ``sites_reused``
        of the same images in every size, or ``repeat`` and ``seconds``: CPU time an image of one process (of a GPU:
        wall time), all methods and sizes in turn.
    """
    sizes, profile = recording.sizes, recording.profile
    clock = metrics.cost_clock(profile.device)

    def at_once(number: int) -> Profile:
        return dataclasses.replace(profile, batch_size=number)

    def quality(together: int) -> pd.DataFrame:
        reference = recording.drawn(FULL, RESULT_SEED, 0, sizes.batch_images)
        rows = [compare(method, reference, at_once(together), RESULT_SEED) for method in methods(recording)[1:]]
        kept = ["method", "image", "mse", "macs_speedup", "sites_reused"]
        return pd.concat(rows)[kept].assign(together=together)

    def seconds() -> pd.DataFrame:
        calls = {
            (method.name, together): functools.partial(
                method.draw, at_once(together), RESULT_SEED, num_samples=together
            )
            for together in SIZES
            for method in methods(recording)
        }
        named = {f"{name}|{together}": call for (name, together), call in calls.items()}
        table = metrics.interleaved_times(named, sizes.batch_repeats, profile.device, clock)
        split = table.method.str.rsplit("|", n=1, expand=True)
        together = split[1].astype(int)
        return table.assign(method=split[0], together=together, seconds=table.seconds / together)

    parts = {f"{number}-at-once": functools.partial(quality, number) for number in SIZES}
    return recording.table("batches", {**parts, "seconds": seconds}, RESULT_SEED)


def points(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method and batch size of what was recorded.

    Returns:
        ``together``, ``method``; ``speed``: how many images are drawn in the time that full compute takes for one of
        one, median of the repeats, with quartiles ``speed_low`` and ``speed_high``; ``median`` and ``worst``: PSNR (dB)
        of the middle and of the worst image; ``sites_reused``, ``macs_speedup``. NaN where nothing was measured.
    """
    timed = table[table.repeat.notna()]
    alone = timed[(timed.method == FULL.name) & (timed.together == 1)].set_index("repeat").seconds
    ratio = timed.assign(ratio=timed.repeat.map(alone) / timed.seconds).groupby(["together", "method"]).ratio
    speed = ratio.quantile([0.25, 0.5, 0.75]).unstack().set_axis(["speed_low", "speed", "speed_high"], axis=1)
    drawn = table[table.image.notna()]
    psnr = drawn.assign(psnr=metrics.decibels(drawn.mse.clip(lower=metrics.IDENTICAL))).groupby(["together", "method"])
    quality = psnr.psnr.agg(median="median", worst="min").join(psnr[["sites_reused", "macs_speedup"]].first())
    points = speed.join(quality, how="outer").reset_index()
    points.attrs = table.attrs
    return points


def sharing(table: pd.DataFrame) -> tuple[float, float, float]:
    """What one gate for the largest batch, instead of one an image, changes of their median PSNR (dB).

    Returns:
        The change, and its 95% interval: paired bootstrap over the images.
    """
    mse = table[(table.method == GATE) & table.image.notna()].pivot(index="image", columns="together", values="mse")
    return arena.gain(mse.iloc[:, 0].to_numpy(), mse.iloc[:, -1].to_numpy())
