"""Methods on the same seeds, against full compute: what each costs and what it draws."""

from __future__ import annotations

import dataclasses
import functools
import math

import pandas as pd
from tqdm import tqdm

from dqar.config import CacheFormat, DQARConfig
from dqar.measure import metrics
from dqar.measure.results import Run
from dqar.measure.sampling import OPEN, sample
from dqar.models.classifier import CLASSIFIERS, load_classifier
from dqar.models.pipelines import cached_pipeline
from dqar.models.profiles import Profile


def compare(
    run: Run,
    methods: dict[str, DQARConfig | int | None],
    same_as: str | None = None,
    num_samples: int | None = None,
) -> pd.DataFrame:
    """One row per method, on the same seeds as the reference (full compute).

    Args:
        methods: a configuration, a number of steps, or ``None`` for the untouched pipeline.
        same_as: a method whose images ``psnr_cache`` compares with.
        num_samples: in place of the profile's.

    Returns:
        ``psnr`` (dB, ``inf`` if identical), ``ssim``, ``class_accuracy`` (where there is a classifier),
        ``sites_reused`` (share), ``macs_speedup`` (counted), ``cache_bytes`` (largest at any step, per image).
    """
    pipe, profile = cached_pipeline(run.profile), run.profile
    reference = sample(pipe, profile, run.seed, num_samples=num_samples, description="reference")
    classifier = load_classifier(profile.model) if profile.model in CLASSIFIERS and profile.trained else None
    rows, images = [], {}
    for method, how in tqdm(methods.items(), desc="compare", leave=False):
        if isinstance(how, int):
            drawn = sample(
                pipe, profile, run.seed, num_samples=num_samples, num_inference_steps=how, description=method
            )
        else:
            drawn = sample(pipe, profile, run.seed, how, num_samples=num_samples, description=method)
        images[method] = drawn.images
        row = {
            "method": method,
            # What a random model draws is no picture, and no method of it is better or worse than another.
            "psnr": metrics.mean_psnr(drawn.images, reference.images) if profile.trained else math.nan,
            "ssim": metrics.ssim(drawn.images, reference.images).mean().item() if profile.trained else math.nan,
            "sites_reused": 0.0,
            "macs_speedup": profile.num_inference_steps / how if isinstance(how, int) else 1.0,
            "cache_bytes": 0.0,
        }
        if classifier is not None:
            predicted, _ = metrics.classify(classifier, drawn.images)
            row["class_accuracy"] = (predicted == drawn.labels).double().mean().item()
        if same_as is not None:
            row["psnr_cache"] = metrics.mean_psnr(drawn.images, images[same_as])
        if drawn.trace is not None:
            table = drawn.trace.to_pandas()
            row["sites_reused"] = (table.decision != "compute").mean()
            saved = row["sites_reused"] * reuse_saving(run.profile, how.reuse_target)
            row["macs_speedup"] = 1 / (1 - saved)
            row["cache_bytes"] = table.groupby(["run", "step"])["bytes"].sum().max() / min(
                profile.batch_size, len(drawn.images)
            )
        rows.append(row)
    return pd.DataFrame(rows)


@functools.cache
def _macs(profile: Profile, target: str | None) -> int:
    """MACs of a two-step, one-image sampling; with a ``target``, all sites of the second step are reused."""
    config = None
    if target is not None:  # the sites alone: what is kept of the modulations saves some, too
        config = dataclasses.replace(OPEN, schedule="all", reuse_target=target, cache=CacheFormat(modulations=False))
    pipe = cached_pipeline(profile)
    return metrics.count_macs(
        lambda: sample(pipe, profile, 0, config, num_samples=1, num_inference_steps=2, description="count MACs")
    )


def reuse_saving(profile: Profile, target: str) -> float:
    """The share of a step's MACs that reusing every attention site of it saves."""
    full = _macs(profile, None)
    return (full - _macs(profile, target)) / (full / 2)


def time_configs(run: Run, configs: dict[str, DQARConfig | None]) -> pd.DataFrame:
    """Speedup over full compute: median and quartiles, the methods timed in turn."""
    pipe, profile = cached_pipeline(run.profile), dataclasses.replace(run.profile, batch_size=4)

    def call(config: DQARConfig | None):
        return lambda: sample(pipe, profile, run.seed, config, num_samples=min(4, profile.num_samples))

    times = metrics.interleaved_times({m: call(c) for m, c in configs.items()}, profile.repeats, profile.device)
    ms_per_step = times.groupby("method").seconds.median() * 1000 / profile.num_inference_steps
    return metrics.speedups(times, "full compute").assign(ms_per_step=ms_per_step).reset_index()
