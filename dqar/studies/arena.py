"""Notebook 11, on many images: each method at its best settings, and whether a plan's lead over it is certain."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline

from dqar.forecast.fit import Target
from dqar.measure import metrics
from dqar.measure.results import RECORDED, Run, load_table, slug
from dqar.models.profiles import PROFILES, Profile
from dqar.studies import pareto
from dqar.studies.compare import FULL, OURS, Method, draw
from dqar.studies.recording import ARENA_SEED, Recording, Sizes

BUDGETS = (2, 3, 4)
"""Full compute's MACs over a method's, at least."""
MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda mse: metrics.decibels(mse.mean(-1)),
    "median": lambda mse: np.median(metrics.decibels(mse), -1),
    "5th percentile": lambda mse: np.percentile(metrics.decibels(mse), 5, axis=-1),
    "worst": lambda mse: metrics.decibels(mse.max(-1)),
}
"""PSNR (dB) of images' squared errors ``[..., N]``: of their mean, and of the median, the 5th percentile and the worst
image."""
JUDGED = ("mean", "median", "5th percentile")
"""On which verdicts are passed: one worst image has no interval."""
SHOWN = ("median", "5th percentile")
"""The verdicts that figures show: one image that turns into another picture decides a mean."""
KINDS = {pareto.PLAN: "DQAR plan", pareto.SITES: "DQAR inside the blocks", "fewer steps": "fewer steps"}
KINDS |= {"output extrapolation": "output extrapolation", **dict.fromkeys(pareto.SOLVERS.values(), "learned solver")}
"""Of families; all others are caches."""
ERRORS: dict[Target, str] = {"reference": "mse", "converged": "mse_converged"}
"""Columns of ``pareto.comparisons`` by what a plan is made for."""
KEPT = ("family", "made_for", "macs_speedup")
"""Columns of ``compare`` that ``standings`` keep."""
GUIDANCE_SCALE = 4.0
"""At which arenas are recorded beside a profile's own: ``dqar record --set guidance_scale=4``."""


@dataclass(frozen=True)
class Condition:
    """Where an arena was recorded.

    Attributes:
        profile: model, guidance and number of steps.
        sampler: a key of ``pareto.SAMPLERS``.
        latents: whether errors are those of the latents, before the decoder.
    """

    profile: Profile
    sampler: str
    latents: bool = False


def table_name(sampler: str, latents: bool = False) -> str:
    """Of what is recorded under one sampler: errors in pixels, or in latents."""
    return f"{'latents' if latents else 'arena'}-{slug(sampler)}"


def finalists(methods: list[Method], screened: pd.DataFrame) -> list[Method]:
    """Full compute, the plans that are judged, and of each family the settings that were best at some budget, by one of
    ``JUDGED``.

    The strongest come first, so that what is recorded first is worth the most.

    Args:
        methods: that were screened.
        screened: rows of ``compare`` on a few images.
    """
    plans, best = dict[str, None](), dict[str, float]()
    for target in measured(screened):
        points = standings(screened, target)
        for budget, measure in itertools.product(BUDGETS, JUDGED):
            own, rivals = _facing(points, target, budget)
            plans |= dict.fromkeys(own.method)
            for _, settings in rivals.groupby("family"):
                point = settings.loc[settings[measure].idxmax()]
                behind = point[measure] - rivals[measure].max()
                best[point.method] = max(best.get(point.method, -math.inf), behind)
    chosen = [*plans, *sorted(best, key=lambda name: -best[name])]
    by_name = {method.name: method for method in methods}
    full = next(method for method in methods if method.family == FULL.name)
    return [full, *(by_name[name] for name in chosen if name in by_name)]


def number_of_images(profile: Profile, sizes: Sizes, sampler: str) -> int:
    """That an arena is recorded on: more under a profile's own sampler and settings, which headlines rest on."""
    headline = sampler == profile.scheduler and profile.label == profile.name
    return sizes.headline_images if headline else sizes.arena_images


def record_arena(recording: Recording) -> None:
    """The finalists of every sampler's screening, on many images: ``pareto.comparisons``."""
    for sampler in pareto.SAMPLERS:
        methods = pareto.contenders(recording.profile, sampler, recording.folder)
        chosen = finalists(methods, pareto.screened(recording, sampler))
        number = number_of_images(recording.profile, recording.sizes, sampler)
        parts = pareto.comparisons(recording, chosen, sampler, ARENA_SEED, number)
        recording.growing(table_name(sampler), parts, ARENA_SEED, number, pareto.holds(chosen, pareto.targets(sampler)))


def record_latents(recording: Recording) -> None:
    """How far latents are from full compute's before the decoder: of the plans and the strongest rivals of the arena.

    Nothing of a model that draws pixels, or whose arena has no plan beside a rival.
    """
    profile = recording.profile
    path = recording.folder / f"{table_name(profile.scheduler)}.parquet"
    if not (path.exists() and pareto.has_decoder(profile)):
        return
    judged = strongest(shown(verdicts(load_table(path))))
    names = set(judged[judged.target == "reference"][["plan", "method"]].to_numpy().flat)
    number = number_of_images(profile, recording.sizes, profile.scheduler)

    @functools.cache
    def drawn(method: Method) -> tuple[torch.Tensor, float]:
        with _decoded(method.pipeline(profile)) as seen:
            macs = draw(method, recording.many_at_once, ARENA_SEED, num_samples=number).macs
        return torch.cat(seen)[-number:], macs

    def one(method: Method) -> pd.DataFrame:
        (reference, full), (latents, macs) = drawn(FULL), drawn(method)
        errors = metrics.squared_errors(latents, reference).numpy()
        return pd.DataFrame({"image": range(number), "mse": errors}).assign(
            **method.columns(), macs_speedup=full / macs
        )

    methods = pareto.contenders(profile, profile.scheduler, recording.folder)
    if parts := {method.name: functools.partial(one, method) for method in methods if method.name in names}:
        holds = pareto.holds(methods, ("reference",))
        recording.growing(table_name(profile.scheduler, latents=True), parts, ARENA_SEED, number, holds)


@contextmanager
def _decoded(pipe: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """The latents ``[N, C, H, W]`` that a pipeline decodes meanwhile, as the model has them."""
    seen: list[torch.Tensor] = []
    decode = pipe.vae.decode

    @functools.wraps(decode)
    def watched(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents * pipe.vae.config.scaling_factor)
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = watched
    try:
        yield seen
    finally:
        del pipe.vae.decode


def recorded(run: Run, sampler: str) -> pd.DataFrame | None:
    """The recorded arena under one sampler."""
    return run.recorded(table_name(sampler))


def of_photographs(run: Run) -> tuple[Run, pd.DataFrame] | None:
    """The same of the embedded model of photographs, beside another run; ``None`` beside its own, or if unrecorded."""
    photographs = Run("cifar10", run.seed, run.figures.parent)
    if run.profile.name == photographs.profile.name:
        return None
    table = recorded(photographs, photographs.profile.scheduler)
    return None if table is None else (photographs, table)


def conditions(run: Run) -> dict[Condition, pd.DataFrame]:
    """All that is recorded of a run's model and of photographs: samplers, guidance, latents; the run's own first."""
    profiles = [
        dataclasses.replace(profile, guidance_scale=guidance)
        for profile in dict.fromkeys((run.profile, PROFILES["cifar10"]))
        for guidance in dict.fromkeys((profile.guidance_scale, GUIDANCE_SCALE))
    ]
    kinds = itertools.product(profiles, pareto.SAMPLERS, (False, True))
    paths = {
        Condition(profile, sampler, latents): RECORDED / profile.label / f"{table_name(sampler, latents)}.parquet"
        for profile, sampler, latents in kinds
    }
    return {condition: load_table(path) for condition, path in paths.items() if path.exists()}


def fastest(run: Run) -> pd.Series:
    """By family, the most times fewer MACs that any of its settings takes, of all samplers' screenings."""
    screened = [table for sampler in pareto.SAMPLERS if (table := pareto.recorded(run, sampler)) is not None]
    columns = ["family", "macs_speedup"]
    return (
        pd.concat([pd.DataFrame(columns=columns), *(x[columns] for x in screened)]).groupby("family").macs_speedup.max()
    )


def gain(before: np.ndarray, after: np.ndarray, measure: str = "median") -> tuple[float, float, float]:
    """How many dB a measure of the same images' squared errors ``[N]`` gains from ``before`` to ``after``.

    Args:
        measure: a key of ``MEASURES``.

    Returns:
        The gain, and its 95 % interval: paired bootstrap over the images.
    """
    errors = np.stack([before, after]).clip(min=metrics.IDENTICAL)
    chosen = np.random.default_rng(0).integers(0, errors.shape[1], (5000, errors.shape[1]))
    gains = np.diff(MEASURES[measure](errors[:, chosen]), axis=0)[0]
    low, high = np.quantile(gains, (0.025, 0.975))
    return float(np.diff(MEASURES[measure](errors))[0]), float(low), float(high)


def standings(table: pd.DataFrame, target: Target, facts: Sequence[str] = KEPT) -> pd.DataFrame:
    """One row a method: ``method``, its ``facts`` (columns of ``table``), and PSNR (dB) by each of ``MEASURES``."""
    errors, columns = _errors(table, target), list(facts)
    points = (
        table.reindex(columns=["method", *columns]).groupby("method", sort=False)[columns].first().loc[errors.index]
    )
    for name, measure in MEASURES.items():
        points[name] = measure(errors.to_numpy())
    return points.reset_index()


def images(table: pd.DataFrame, target: Target) -> int:
    """How many images a table compares with a target; 0 if none."""
    return _errors(table, target).shape[1] if ERRORS[target] in table else 0


def measured(table: pd.DataFrame) -> list[Target]:
    """The targets that a table compares images with."""
    return [target for target in ERRORS if images(table, target)]


def verdicts(table: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """At each budget: a plan beside every other family at its best setting, with a paired bootstrap interval.

    The plan is the one that computes the most steps within the budget. A rival's setting is chosen by the very images
    and measure that it is judged by, which favours it. Images are drawn with replacement, the same ones for both.

    Args:
        table: of ``record_arena`` or ``record_latents``.
        resamples: of the bootstrap.

    Returns:
        ``target``, ``budget``, ``measure`` (of ``JUDGED``), ``family``, ``method``, ``plan``; ``ours``, ``theirs`` and
        ``lead`` in dB; ``lead_low``, ``lead_high``: its 95 % interval; ``verdict``: ``"ahead"`` or ``"behind"`` where
        that is without 0, else ``"level"``.
    """
    generator, rows = np.random.default_rng(0), []
    for target in measured(table):
        errors, points = _errors(table, target), standings(table, target)
        chosen = generator.integers(errors.shape[1], size=(resamples, errors.shape[1]))
        for budget, measure in itertools.product(BUDGETS, JUDGED):
            plans, rivals = _facing(points, target, budget)
            if plans.empty:
                continue
            plan = plans.iloc[0]
            trials = MEASURES[measure](errors.loc[plan.method].to_numpy()[chosen])
            for family, settings in rivals.groupby("family", sort=False):
                best = settings.loc[settings[measure].idxmax()]
                leads = trials - MEASURES[measure](errors.loc[best.method].to_numpy()[chosen])
                low, high = np.quantile(leads, [0.025, 0.975])
                verdict = "ahead" if low > 0 else "behind" if high < 0 else "level"
                values = (plan[measure], best[measure], plan[measure] - best[measure], low, high, verdict)
                rows.append((target, budget, measure, family, best.method, plan.method, *values))
    columns = ["target", "budget", "measure", "family", "method", "plan", "ours", "theirs", "lead", "lead_low"]
    return pd.DataFrame(rows, columns=[*columns, "lead_high", "verdict"])


def _facing(points: pd.DataFrame, target: Target, budget: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of ``standings``, the plans that compute the most steps within a budget, and all that they are compared with."""
    within = pareto.within(pareto.made_for(points, target), budget)
    own = within[within.family == pareto.PLAN]
    return own[own.macs_speedup == own.macs_speedup.min()], within[~within.family.isin((pareto.PLAN, FULL.name))]


def strongest(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Of ``verdicts``, at each target, budget and measure, the rival that leaves a plan the smallest lead."""
    rivals = verdicts[~verdicts.family.isin(OURS)]
    least = rivals.groupby(["target", "budget", "measure"], sort=False).lead.idxmin()
    return rivals.loc[least].reset_index(drop=True)


def shown(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Of ``verdicts``, those over rivals that figures and answers stand on."""
    return verdicts[verdicts.measure.isin(SHOWN) & ~verdicts.family.isin(OURS)]


def best_of_kinds(table: pd.DataFrame, target: Target) -> pd.DataFrame:
    """At each budget, the setting of each kind whose median image is best; of plans, as in ``verdicts``.

    Returns:
        ``budget``, ``kind`` and the columns of ``standings``.
    """
    points, rows = standings(table, target), []
    points = pareto.made_for(points[points.family != FULL.name], target)
    points["kind"] = points.family.map(KINDS).fillna("best cache")
    for budget in BUDGETS:
        for kind, settings in pareto.within(points, budget).groupby("kind", sort=False):
            best = settings.macs_speedup.idxmin() if kind == KINDS[pareto.PLAN] else settings["median"].idxmax()
            rows.append({"budget": budget, "kind": kind, **settings.loc[best].drop("kind")})
    return pd.DataFrame(rows)


def lossless(table: pd.DataFrame) -> float:
    """How many times fewer MACs the cheapest plan takes that is as near to the converged solution as full compute is,
    in the median and in the 5th percentile, by the 95 % interval of ``gain``; NaN if none is, or if that wasn't
    measured."""
    if "converged" not in measured(table):
        return math.nan
    points, errors = standings(table, "converged"), _errors(table, "converged").T
    full = errors[points.method[points.family == FULL.name].item()].to_numpy()
    plans = pareto.own_plans(points, "converged").set_index("method").macs_speedup
    as_near = [
        speedup
        for method, speedup in plans.items()
        if all(gain(full, errors[method].to_numpy(), measure)[1] >= 0 for measure in SHOWN)
    ]
    return max(as_near, default=math.nan)


def _errors(table: pd.DataFrame, target: Target) -> pd.DataFrame:
    """Squared errors, methods by images, in the table's order: of all that were compared with the target, those images
    that each of them drew."""
    rows = table[table[ERRORS[target]].notna()]
    if target == "converged":  # never beside errors to another solution, as are those that don't say
        rows = rows[rows.reindex(columns=["converged_by"]).converged_by == pareto.CONVERGED_BY]
    wide = rows.pivot(index="method", columns="image", values=ERRORS[target]).dropna(axis=1)
    return wide.clip(lower=metrics.IDENTICAL).loc[rows.method.unique()]
