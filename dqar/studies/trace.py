"""Notebook 01: what entropy and SNR do while a model denoises (slides 4, 14)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dqar.measure.calibrate import trace_sites
from dqar.measure.results import Run
from dqar.measure.sampling import LOOK, sample
from dqar.models.pipelines import cached_pipeline


def sites(run: Run) -> pd.DataFrame:
    """Every site of an untouched denoising: entropy, SNR, and the change of its output since the step before.

    One row per step, layer and branch (means over the profile's images): ``entropy`` (nats, mean over heads and
    queries), ``snr`` (by predicted x0), ``snr_schedule``, ``change`` (relative: what reuse would do wrong there),
    ``layer_change`` (the same against the layer before); of captions, ``prompt_length`` (tokens).
    """

    def measure() -> pd.DataFrame:
        table = trace_sites(cached_pipeline(run.profile), run.profile, run.seed)
        means = ["entropy", "snr", "snr_schedule", "change", "layer_change"]
        means += ["prompt_length"] if "prompt_length" in table else []
        return table.groupby(["step", "timestep", "layer", "branch", "tokens"], as_index=False)[means].mean()

    return run.table("sites", measure)


def heads(run: Run) -> pd.DataFrame:
    """Entropy (nats) of every head at every step, layer and branch, mean over four images."""

    def measure() -> pd.DataFrame:
        drawn = sample(cached_pipeline(run.profile), run.profile, run.seed, LOOK, num_samples=4, description="heads")
        sites = ["step", "layer", "branch", "head"]
        return drawn.traced.heads_to_pandas().groupby(sites, as_index=False)[["entropy"]].mean()

    return run.table("heads", measure)


def relations(table: pd.DataFrame) -> dict[str, float]:
    """Spearman's ρ of the two signals with ``change``, overall and within steps (entropy) or layers (SNR)."""
    later = table.dropna(subset=["change"])  # than the first step

    def within(by: str, signal: str) -> float:
        return float(np.mean([part[signal].corr(part.change, "spearman") for _, part in later.groupby(by)]))

    return {
        "entropy": later.entropy.corr(later.change, "spearman"),
        "entropy_within_step": within("step", "entropy"),
        "snr": later.snr.corr(later.change, "spearman"),
        "snr_within_layer": within("layer", "snr"),
    }
