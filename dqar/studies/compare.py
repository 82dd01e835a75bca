"""One way to measure: what a method draws beside a reference, a row an image, and what that took, counted as it ran."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from dqar.config import DQARConfig
from dqar.forecast.plan import ForecastPlan
from dqar.measure import metrics
from dqar.measure.quality import scores
from dqar.measure.sampling import Samples, images_at_once, sample
from dqar.models.pipelines import cached_pipeline, with_parts
from dqar.models.profiles import Profile
from dqar.peers import w8a8
from dqar.peers.bespoke import BespokeScheduler
from dqar.peers.registry import Peer
from dqar.plan import ReusePlan
from dqar.trace import MODEL, SELF_ATTENTION

CALIBRATION_SEED = 300
"""Of the images that W8A8's salience is measured on: none that is compared."""
AGREEMENT = 3.0
"""dB between what is recorded and what is drawn anew."""
SMALL_BATCH = 5
"""Images at once for rivals that decide for a whole batch."""
OURS = ("DQAR rule", "DQAR policy", "DQAR sites", "DQAR plan")
"""Families that are this project's own."""
FACTS = [
    *("method", "family", "budget", "made_for", "target", "schedule", "interval", "order", "bits", "mode", "scheduler"),
    *("steps", "dtype", "made"),
]
"""Columns of ``Method.columns``."""


@dataclass(frozen=True)
class Method:
    """One way to draw the same images.

    Attributes:
        name: for people and files, unlike any other's in a comparison.
        family: what it is one setting of; its name if left out.
        config: what DQAR is applied with.
        peer: a rival's cache, in place of DQAR.
        w8a8: linear layers in integers, with or without salience balancing.
        num_inference_steps, scheduler, dtype: in place of the profile's.
        solver: folder of a saved ``BespokeScheduler``, in place of any scheduler.
        budget: full compute's MACs over its own, at least: what it was chosen for.
        made_for: of a forecast plan or a learned solver, ``"reference"`` or ``"converged"``: what it was fitted to.
    """

    name: str
    family: str = ""
    config: DQARConfig | ReusePlan | ForecastPlan | None = None
    peer: Peer | None = None
    w8a8: Literal["plain", "balanced"] | None = None
    num_inference_steps: int | None = None
    scheduler: str | None = None
    solver: Path | None = None
    dtype: torch.dtype | None = None
    budget: float | None = None
    made_for: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "family", self.family or self.name)

    @property
    def made(self) -> str | None:
        """When its plan was fitted or its solver learned, as their provenance has it; ``None`` if it has neither."""
        if isinstance(self.config, ForecastPlan):
            return self.config.provenance.get("date")
        provenance = None if self.solver is None else self.solver / "provenance.json"
        return json.loads(provenance.read_text())["date"] if provenance is not None and provenance.exists() else None

    def columns(self) -> dict[str, Any]:
        """What the method is, by column of ``FACTS``; those that apply."""
        facts: dict[str, Any] = {"method": self.name, "family": self.family, "budget": self.budget}
        facts |= {"made_for": self.made_for, "scheduler": self.scheduler, "steps": self.num_inference_steps}
        facts |= {"made": self.made}
        facts["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        if isinstance(self.config, DQARConfig):
            config = self.config
            facts |= {"target": config.reuse_target, "schedule": config.schedule, "bits": config.mean_bits}
            mode = f"{config.quantize_mode} fitted" if config.cache.fitted else config.quantize_mode
            facts |= {"mode": "mixed" if config.mixed_precision else mode}
            facts |= {"order": config.cache.forecast_order}
            facts["interval"] = config.static_interval if config.schedule == "static" else None
        return {name: facts[name] for name in FACTS if facts.get(name) is not None}

    def pipeline(self, profile: Profile) -> DiffusionPipeline:
        """The pipeline that it draws with, DQAR not applied; loaded once."""
        profile = dataclasses.replace(
            profile, scheduler=self.scheduler or profile.scheduler, dtype=self.dtype or profile.dtype
        )
        if self.solver is not None:
            return with_parts(cached_pipeline(profile), scheduler=BespokeScheduler.from_pretrained(self.solver))
        if self.w8a8 is None:
            return cached_pipeline(profile)
        return _quantized_pipeline(dataclasses.replace(profile, batch_size=1), self.w8a8 == "balanced")

    def draw(self, profile: Profile, seed: int, **options: Any) -> Samples:
        """``sample`` by this method; ``options`` as there."""
        pipe, steps = self.pipeline(profile), self.num_inference_steps or profile.num_inference_steps
        options = {"description": self.name, "num_inference_steps": steps, **options}
        if self.peer is None:
            return sample(pipe, profile, seed, self.config, **options)
        if self.peer.rival.decides_by_batch:
            profile = dataclasses.replace(profile, batch_size=min(profile.batch_size, SMALL_BATCH))
        with self.peer.attach(pipe, steps):
            return sample(pipe, profile, seed, **options)


FULL = Method("full compute")
"""The untouched pipeline: what everything is compared with."""


@functools.lru_cache(maxsize=2)
def _quantized_pipeline(profile: Profile, balanced: bool) -> DiffusionPipeline:
    pipe = cached_pipeline(profile)
    salience = w8a8.measure_salience(pipe, profile, CALIBRATION_SEED) if balanced else None
    return with_parts(pipe, transformer=w8a8.quantize_transformer(pipe.transformer, salience))


@dataclass(frozen=True)
class Drawn:
    """What a method drew, and what that took.

    Attributes:
        method: that drew it.
        images: ``[N, C, H, W]`` float32 in [0, 1], on the CPU.
        labels: ``[N]``, classes or numbers of captions.
        macs: multiply-accumulates an image, counted as they ran.
        sites_reused: share of the sites (of a forecast plan: of the model's outputs) that weren't computed; 0 without
            DQAR, NaN for a rival, which doesn't say.
        events: such sites in a run.
        cache_bytes: an image's, at the step that keeps most.
        trace: what DQAR decided, a row a site (of a forecast plan: a step); ``None`` without DQAR.
    """

    method: Method
    images: torch.Tensor
    labels: torch.Tensor
    macs: float
    sites_reused: float
    events: float
    cache_bytes: float
    trace: pd.DataFrame | None = None


def draw(method: Method, profile: Profile, seed: int, first_image: int = 0, num_samples: int | None = None) -> Drawn:
    """Draws images of a seed's set and counts the multiply-accumulates that run meanwhile; see ``sample``."""
    pipe, number = method.pipeline(profile), num_samples or profile.num_samples
    if method.peer is not None and method.peer.rival.calibration_images:  # no part of what drawing costs
        with method.peer.attach(pipe, method.num_inference_steps or profile.num_inference_steps):
            pass
    results: list[Samples] = []

    def count() -> int:
        return metrics.count_macs(
            lambda: results.append(method.draw(profile, seed, first_image=first_image, num_samples=number))
        )

    before, macs = images_at_once(profile, number), count()
    if images_at_once(profile, number) < before:  # what was begun with too many at once was counted, too
        macs = count()
    drawn = results[-1]
    reused = events = cached = 0.0 if method.peer is None else math.nan
    trace = None
    if drawn.trace is not None:
        trace = drawn.trace.to_pandas(MODEL if isinstance(method.config, ForecastPlan) else SELF_ATTENTION)
        saved = trace.decision != "compute"
        reused, events = float(saved.mean()), float(saved.sum() / trace.run.nunique())
        cached = trace.groupby(["run", "step"])["bytes"].sum().max() / images_at_once(profile, number)
    return Drawn(method, drawn.images, drawn.labels, macs / number, reused, events, cached, trace)


def compare(
    method: Method,
    reference: Drawn,
    profile: Profile,
    seed: int,
    first_image: int = 0,
    beside: Mapping[str, torch.Tensor] | None = None,
    networks: bool = False,
) -> pd.DataFrame:
    """Draws by ``method`` the images that ``reference`` shows, and compares.

    Args:
        method: that draws; the reference's own isn't drawn again.
        reference: images of the same seed from ``first_image`` on.
        profile: model, sampler, guidance, steps and images at once.
        seed, first_image: as for ``sample``.
        beside: other images ``[N, C, H, W]`` to measure the error against, by name.
        networks: whether Inception, CLIP and LPIPS score models without a classifier of their own, too.

    Returns:
        One row an image: the columns of ``FACTS`` that apply, ``image``, ``label``; ``mse``, the mean squared error to
        the reference, and ``mse_<name>`` to each of ``beside``; ``ssim`` (it and ``mse`` are NaN of random weights);
        the columns of ``quality.scores``; and what
        all images have in common: ``macs``, ``macs_speedup`` (the reference's over these), ``sites_reused``,
        ``events`` and ``cache_bytes`` of ``Drawn``.
    """
    number = len(reference.images)
    drawn = reference if method == reference.method else draw(method, profile, seed, first_image, number)
    table = pd.DataFrame({"image": range(first_image, first_image + number), "label": drawn.labels})
    for name, value in reversed(method.columns().items()):
        table.insert(0, name, value)
    for name, images in {"": reference.images, **(beside or {})}.items():
        column = f"mse_{name}" if name else "mse"
        table[column] = metrics.squared_errors(drawn.images, images).numpy()
    table["ssim"] = metrics.ssim(drawn.images, reference.images).numpy()
    if not profile.trained:  # what a random model draws is no picture, and no method of it is better than another
        table[["mse", "ssim"]] = math.nan
    if networks or profile.embedded:
        for name, values in scores(profile, drawn.images, drawn.labels, reference.images).items():
            table[name] = values
    costs = {"macs": drawn.macs, "macs_speedup": reference.macs / drawn.macs, "sites_reused": drawn.sites_reused}
    return table.assign(**costs, events=drawn.events, cache_bytes=drawn.cache_bytes)


def compare_all(methods: Iterable[Method], profile: Profile, seed: int, num_samples: int | None = None) -> pd.DataFrame:
    """``summarize`` of all methods on the same seeds, beside full compute; and the 95 % interval of ``psnr``,
    ``psnr_low`` and ``psnr_high``."""
    reference = draw(FULL, profile, seed, num_samples=num_samples)
    rows = [compare(method, reference, profile, seed) for method in tqdm(list(methods), desc="compare", leave=False)]
    intervals = [metrics.psnr_interval(table.mse.to_numpy()) for table in rows]
    low, high = zip(*intervals, strict=True)
    return summarize(pd.concat(rows, ignore_index=True)).assign(psnr_low=low, psnr_high=high)


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method of ``compare``'s rows, in the same order.

    Returns:
        The columns of ``FACTS`` that are there; ``images``; ``psnr`` (dB of the mean squared error, ``inf`` if
        identical), and ``psnr_<name>`` for every ``mse_<name>``; ``class_accuracy``, and the means of ``ssim``,
        ``lpips``, ``clip`` and what all images have in common, so far as it is there.
    """
    by = rows.groupby("method", sort=False)
    table = by[[name for name in FACTS[1:] if name in rows]].first()
    table["images"] = by.size()
    for column in rows.columns[rows.columns.str.startswith("mse")]:
        table[column.replace("mse", "psnr")] = metrics.decibels(by[column].mean())
    if "predicted" in rows:
        table["class_accuracy"] = (rows.predicted == rows.label).groupby(rows.method, sort=False).mean()
    common = ("ssim", "lpips", "clip", "macs", "macs_speedup", "sites_reused", "events", "cache_bytes")
    table = table.join(by[[name for name in common if name in rows]].mean()).reset_index()
    table.attrs = rows.attrs
    return table


def times(methods: Iterable[Method], profile: Profile, seed: int) -> pd.DataFrame:
    """Seconds of drawing up to four images at once, the methods in turn: ``metrics.interleaved_times``."""
    profile = dataclasses.replace(profile, batch_size=4)
    number = min(4, profile.num_samples)
    calls = {m.name: functools.partial(m.draw, profile, seed, num_samples=number) for m in methods}
    return metrics.interleaved_times(calls, profile.repeats, profile.device)


def speeds(times: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Of each method of ``times``: ``speedup`` over full compute (median and quartiles of runs in turn), and
    ``ms_per_step``: full compute's median over that speedup, so that a drifting clock can't make the two disagree."""
    full = times.seconds[times.method == FULL.name].median() * 1000 / profile.num_inference_steps
    ratios = metrics.speedups(times, FULL.name)
    return ratios.assign(ms_per_step=full / ratios.speedup).reset_index()


def only(table: pd.DataFrame, **values: Any) -> pd.Series:
    """The first row that has these values, by column; nothing but NaN where there is none."""
    for column, value in values.items():
        table = table[table[column] == value] if column in table else table[:0]
    return table.iloc[0] if len(table) else pd.Series(math.nan, index=table.columns)


def check_again(
    methods: Iterable[Method],
    recorded: pd.DataFrame,
    profile: Profile,
    seed: int,
    number: int,
    full: Method = FULL,
) -> pd.DataFrame:
    """Draws the first images anew, and warns of every method that disagrees with what was recorded of it.

    ``AGREEMENT`` dB count as agreement, and so do any beyond 60 dB.

    Args:
        methods: that decide nothing by measured signals: a gate decides for a batch as a whole, so that fewer images at
            once are other decisions.
        recorded: rows of ``compare``.
        profile, seed: of the recorded rows.
        number: of images.
        full: whose images the recorded errors are to.

    Returns:
        ``method``, and the PSNR (dB) of these images, ``recorded`` and ``live``.
    """
    profile = dataclasses.replace(profile, batch_size=number)
    reference, rows = draw(full, profile, seed, num_samples=number), []
    for method in methods:
        before = recorded[(recorded.method == method.name) & (recorded.image < number)].mse.mean()
        now = compare(method, reference, profile, seed).mse.mean()
        was, live = (float(metrics.decibels(max(mse, metrics.IDENTICAL))) for mse in (before, now))
        rows.append({"method": method.name, "recorded": was, "live": live})
        if abs(was - live) > AGREEMENT and min(was, live) < 60:
            text = f"{method.name}: recorded {was:.1f} dB, now {live:.1f} dB: run `dqar record` anew"
            warnings.warn(text, stacklevel=2)
    return pd.DataFrame(rows, columns=["method", "recorded", "live"])
