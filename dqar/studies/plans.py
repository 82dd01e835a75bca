"""Notebook 11, on plans alone: promises, other samplers, a quantized history or model, and weights of each class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dqar.forecast.fit import CLASS_IMAGES
from dqar.forecast.ladder import Promise, first_step_features
from dqar.forecast.lockstep import Lockstep
from dqar.forecast.plan import HISTORY_BITS, ForecastPlan
from dqar.forecast.profiles import calibrate_profile, profile_calls
from dqar.forecast.promise import CONFIDENCE, RULE_SHARE, Rule, images_needed, is_certain, ladder_from
from dqar.measure.metrics import IDENTICAL, decibels
from dqar.measure.results import Run, load_table, slug
from dqar.models.profiles import Profile
from dqar.studies import pareto, results
from dqar.studies.arena import JUDGED, gain
from dqar.studies.compare import FULL, Method, compare
from dqar.studies.recording import ARENA_SEED, RESULT_SEED, Recording

PROMISES = ((40.0, 0.99), (45.0, 0.95), (50.0, 0.9))
"""The least PSNR (dB) to full compute, and the share of images that are promised to have it."""
HELD_OUT = 0.45
"""Of the recorded images, those that a promise is calibrated on; it is judged on the others."""
WAYS = LADDER, MIX, FIXED = "a plan for each image", "random mix of two plans", "one plan for all"
NETWORK = "a plan for each image, by slide 7's network"
RULES: dict[str, Rule] = {LADDER: "linear", NETWORK: "policy"}
"""What chooses each image's plan."""
SPARSER = np.linspace(0, 1, 21)
"""Shares of the sparser plan in a random mix, tried in this order."""
BUDGET = 3
"""Full compute's MACs over those of the plan that other samplers follow, and that is fitted anew in other ways."""
OTHER_SAMPLERS = ("ddim", "dpm-solver++3")
"""On the timesteps of ``dpm-solver++``: of first and of third order."""
COMMON, OF_CLASS = "common", "by-class"
"""Weights that a plan has."""
QUANTIZED = Method("W8A8", w8a8="plain")
"""A model in integers, all steps computed."""


def ladder_methods(profile: Profile, folder: Path) -> dict[int, Method]:
    """The recorded plans that a ladder is made of, by their computed steps, the most first.

    Args:
        folder: of the profile's recorded tables.
    """
    by_number: dict[int, Method] = {}
    for method in results.plans(profile, folder):
        by_number.setdefault(len(_plan(method).computed), method)
    return by_number


def promises(run: Run) -> pd.DataFrame | None:
    """``judged`` of the recorded images; ``None`` if they aren't recorded with the plans that there are.

    ``NETWORK`` is among the ways where ``record_rules`` has judged it on these images, and not on earlier ones.
    """
    table, methods = run.recorded("promise"), ladder_methods(run.profile, run.recordings)
    if table is None or set(methods) != set(table.computed):
        return None
    outcomes, network = judged(table, list(map(_plan, methods.values()))), run.recorded("rules")
    if network is not None and _date(network) >= _date(table):
        facts, outcomes = outcomes.attrs, pd.concat([outcomes, network], ignore_index=True)
        outcomes.attrs = facts
    return outcomes


def _date(table: pd.DataFrame) -> str:
    return table.attrs["provenance"]["date"]


def judged(
    table: pd.DataFrame,
    plans: Sequence[ForecastPlan],
    splits: int = 40,
    ways: Sequence[str] = WAYS,
) -> pd.DataFrame:
    """Ways to keep each promise with ``CONFIDENCE``, on images that none of them was calibrated on.

    The images are split at random, again and again. A ladder spends ``RULE_SHARE`` of its part on the rule that chooses
    a plan for each image; two other ways have no rule and calibrate on all of it. A random mix is the fastest of all
    pairs of plans, which favours it. Where nothing can be promised, full compute is left.

    Args:
        table: of ``record_promise``.
        plans: that it was recorded with.
        splits: of the images.
        ways: of ``WAYS`` and ``RULES``.

    Returns:
        A row a split, promise and way: ``decibels``, ``share``, ``way``; of the other images ``kept``, the share that
        has so many dB, and ``macs_speedup``; ``promised``, whether anything could be. No rows of a promise that so few
        images can't tell.
    """
    numbers = [len(plan.computed) for plan in plans]
    wide = table.pivot(index="image", columns="computed", values="mse")[numbers]
    quality = decibels(wide.clip(lower=IDENTICAL).to_numpy())
    first = table[table.computed == numbers[0]].set_index("image").loc[wide.index]
    features = torch.tensor(np.stack(list(first.features))).double()
    costs = 1 / table.groupby("computed").macs_speedup.first()[numbers].to_numpy()
    generator, number, rows = np.random.default_rng(0), int(HELD_OUT * len(wide)), []
    for split in range(splits):
        held_out, others = np.split(generator.permutation(len(wide)), [number])
        draws = generator.random(number)
        for target, share in PROMISES:
            if number - int(RULE_SHARE * number) < images_needed(share, CONFIDENCE):
                continue
            good = quality >= target
            for way in ways:
                if way in RULES:
                    taken = _ladder(plans, features, quality, held_out, others, target, share, RULES[way])
                elif way == FIXED:
                    taken = _fixed(good[held_out], share)
                else:
                    taken = _mixed(good[held_out], share, costs, draws)
                kept, cost = (1.0, 1.0) if taken is None else _outcome(taken, good[others], costs)
                rows.append((split, target, share, way, kept, 1 / cost, taken is not None))
    columns = ["split", "decibels", "share", "way", "kept", "macs_speedup", "promised"]
    outcomes = pd.DataFrame(rows, columns=columns)
    outcomes.attrs = {**table.attrs, "images": len(wide)}
    return outcomes


def typical(judged: pd.DataFrame, column: str = "macs_speedup") -> pd.DataFrame:
    """The median over the splits: a row a promise, a column a way."""
    return judged.pivot_table(column, ["decibels", "share"], "way", aggfunc="median")


def _outcome(taken: np.ndarray, good: np.ndarray, costs: np.ndarray) -> tuple[float, float]:
    """Share of good images, and mean cost, where each image gets each plan with a probability ``[images, plans]``."""
    taken = np.broadcast_to(taken, good.shape)
    return float((taken * good).sum(1).mean()), float((taken * costs).sum(1).mean())


def _ladder(
    plans: Sequence[ForecastPlan],
    features: torch.Tensor,
    quality: np.ndarray,
    held_out: np.ndarray,
    others: np.ndarray,
    target: float,
    share: float,
    rule: Rule,
) -> np.ndarray | None:
    """The plan of each of the other images, as ones and zeros ``[images, plans]``; ``None``: nothing is promised."""
    promise = Promise(target, share, CONFIDENCE, 0, 0, 0.0, 1.0)
    try:
        ladder = ladder_from(plans, features[held_out], quality[held_out], promise, rule)
    except ValueError:
        return None
    return np.eye(len(plans))[ladder.choose(features[others])]


def _fixed(good: np.ndarray, share: float) -> np.ndarray | None:
    """The sparsest plan of which the held-out images ``[images, plans]`` say that it keeps the promise."""
    certain = good.sum(0) >= least_kept(len(good), share)
    number = len(certain) if certain.all() else int(certain.argmin())  # tried from the densest on, until one fails
    return np.eye(len(certain))[number - 1] if number else None


def _mixed(good: np.ndarray, share: float, costs: np.ndarray, draws: np.ndarray) -> np.ndarray | None:
    """Of two plans the sparser one with the largest probability that the held-out images allow."""
    best, least = None, np.inf
    for dense, sparse in itertools.combinations(range(good.shape[1]), 2):
        for probability in SPARSER:
            kept = np.where(draws < probability, good[:, sparse], good[:, dense]).sum()
            if kept < least_kept(len(good), share):
                break
            cost = probability * costs[sparse] + (1 - probability) * costs[dense]
            if cost < least:
                best, least = np.zeros(len(costs)), cost
                best[[dense, sparse]] = 1 - probability, probability
    return best


@functools.cache
def least_kept(images: int, share: float) -> int:
    """How many of so many images have to keep a promise that is made with ``CONFIDENCE``."""
    return next((kept for kept in range(images + 1) if is_certain(kept, images, share, CONFIDENCE)), images + 1)


# --- other samplers, a quantized history, and weights of each class --------------------------------------------------


def samplers(run: Run) -> pd.DataFrame | None:
    """PSNR (dB) of a plan under each sampler, to full compute under it: by ``sampler`` and ``made_under``."""
    table = run.recorded("samplers")
    return None if table is None else _quality(table, ["sampler", "made_under"])


def history(run: Run) -> pd.DataFrame | None:
    """PSNR (dB) and ``cache_bytes`` of a plan by ``bits`` and ``fitted_in``: those that its weights were fitted in."""
    table = run.recorded("history")
    if table is None:
        return None
    by = ["bits", "fitted_in"]
    return _quality(table, by).join(table.groupby(by).cache_bytes.first())


def classes(run: Run) -> pd.DataFrame | None:
    """PSNR (dB) of a plan by ``calibration_images`` and ``weights``: ``COMMON`` or ``OF_CLASS``."""
    table = run.recorded("classes")
    return None if table is None else _quality(table, ["calibration_images", "weights"])


def class_gains(run: Run) -> pd.DataFrame | None:
    """How many dB weights of each class gain on the same images: by ``calibration_images`` and measure.

    Returns:
        ``gain``, and its 95 % interval from ``low`` to ``high``: paired bootstrap over the images.
    """
    table = run.recorded("classes")
    if table is None:
        return None
    rows = {}
    for images, part in table.groupby("calibration_images"):
        errors = part.pivot(index="image", columns="weights", values="mse")
        for measure in JUDGED:
            rows[images, measure] = gain(errors[COMMON].to_numpy(), errors[OF_CLASS].to_numpy(), measure)
    gains = pd.DataFrame.from_dict(rows, orient="index", columns=["gain", "low", "high"])
    gains.index = pd.MultiIndex.from_tuples(rows, names=["calibration_images", "measure"])
    return gains


def w8a8(run: Run) -> pd.DataFrame | None:
    """PSNR (dB) of what a W8A8 model draws, by ``plan`` (the model that it was fitted on, or ``"none"``) and what it is
    compared ``to``: full compute of the model as it was, or of the W8A8 one."""
    table = run.recorded("w8a8")
    if table is None:
        return None
    errors = {"the model as it was": table.mse, "the W8A8 model": table.mse_w8a8}
    both = pd.concat([table.assign(mse=mse, to=to) for to, mse in errors.items()])
    return _quality(both, ["to", "plan"])


def other_ways(run: Run) -> dict[str, pd.DataFrame]:
    """What is recorded of the plan of ``BUDGET`` in other ways, by what differs."""
    tables = {
        "other samplers": samplers(run),
        "quantized history": history(run),
        "W8A8": w8a8(run),
        "weights of each class": classes(run),
        "what they gain": class_gains(run),
    }
    return {what: table.round(2) for what, table in tables.items() if table is not None}


def _quality(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    errors = table.assign(mse=table.mse.clip(lower=IDENTICAL)).groupby(by).mse
    return pd.DataFrame(
        {
            "images": errors.size(),
            "mean": decibels(errors.mean()),
            "median": decibels(errors.median()),
            "5th percentile": decibels(errors.quantile(0.95)),
        }
    )


# --- recording -------------------------------------------------------------------------------------------------------


def record_promise(recording: Recording) -> None:
    """What each image's first step tells, and how near each plan comes to it, a row an image and plan.

    ``image``, ``label``, ``computed`` (steps of the plan), ``mse`` to full compute, ``macs_speedup``; ``features`` of
    ``first_step_features`` in the rows of the densest plan.

    Raises:
        ValueError: no plan is recorded.
    """
    methods = ladder_methods(recording.profile, recording.folder)
    if not methods:
        raise ValueError(f"no plan is in {recording.folder}: record plans first")
    recording.table("promise", {"all": functools.partial(_promise, recording, methods)}, RESULT_SEED)


def _promise(recording: Recording, methods: Mapping[int, Method]) -> pd.DataFrame:
    columns, tables = ["image", "label", "mse", "macs_speedup"], []
    for number, method in methods.items():
        tables.append(results.recorded_samples(recording, method)[columns].assign(computed=number))
    told = first_steps(recording.profile, RESULT_SEED, len(tables[0]))
    tables[0]["features"] = list(told.half().numpy())
    return pd.concat(tables, ignore_index=True)


def record_rules(recording: Recording) -> None:
    """``judged`` of the images of ``record_promise`` by slide 7's network, which takes a second for each of its plans.

    Raises:
        ValueError: no promise is recorded.
    """
    path, methods = recording.folder / "promise.parquet", ladder_methods(recording.profile, recording.folder)
    if not path.exists() or not methods:
        raise ValueError("no images with features are recorded: record promise first")
    own = list(map(_plan, methods.values()))
    judge = functools.partial(judged, load_table(path), own, ways=(NETWORK,))
    recording.table("rules", {"all": judge}, RESULT_SEED)


def record_samplers(recording: Recording) -> None:
    """The plan of ``BUDGET`` under other samplers, beside their own, a row an image.

    ``sampler``, ``made_under`` (the sampler that the plan was fitted under), and columns of ``compare``.

    Raises:
        ValueError: no plan is recorded.
    """
    profile, number = recording.profile, recording.sizes.part

    def measure() -> pd.DataFrame:
        tables = list[pd.DataFrame]()
        for sampler in dict.fromkeys((profile.scheduler, *OTHER_SAMPLERS)):
            reference = recording.drawn(Method(FULL.name, scheduler=sampler), ARENA_SEED, 0, number)
            for made_under in dict.fromkeys((profile.scheduler, sampler)):
                plan = pareto.recorded_plan(recording.folder, profile, BUDGET, made_under)
                if plan is not None:
                    method = Method(f"plan of {made_under}", config=plan, scheduler=sampler)
                    rows = compare(method, reference, recording.many_at_once, ARENA_SEED)
                    tables.append(_numbers(rows).assign(sampler=sampler, made_under=made_under))
        if not tables:
            raise ValueError(f"no plan of {BUDGET}× is in {recording.folder}: record plans first")
        return pd.concat(tables, ignore_index=True)

    recording.table("samplers", {"all": measure}, ARENA_SEED)


def record_history(recording: Recording) -> None:
    """The plan of ``BUDGET`` with its history in fewer bits, fitted in them or not, a row an image.

    ``bits``, ``fitted_in``, and columns of ``compare``, of which ``cache_bytes`` is an image's.

    Raises:
        ValueError: no plan is recorded.
    """
    profile, sizes, plan = recording.profile, recording.sizes, _of_budget(recording)
    full = Method(FULL.name, scheduler=profile.scheduler)

    @functools.cache
    def fitted(bits: int) -> ForecastPlan:
        pipe, work = full.pipeline(profile), recording.parts / "fits"
        fits = calibrate_profile(pipe, profile, "reference", sizes.plan_images, work, bits)
        return fits.plan_of(fits.fit(tuple(sorted(plan.computed)), fits.images))

    def measure(bits: int, fitted_in: int) -> pd.DataFrame:
        method = Method(f"{bits} bits", config=dataclasses.replace(fitted(fitted_in), history_bits=bits))
        reference = recording.drawn(full, ARENA_SEED, 0, sizes.arena_images)
        rows = compare(method, reference, recording.many_at_once, ARENA_SEED)
        return _numbers(rows).assign(bits=bits, fitted_in=fitted_in)

    formats = [(bits, fitted_in) for bits in HISTORY_BITS for fitted_in in dict.fromkeys((16, bits))]
    parts = {f"{bits}-{fitted_in}": functools.partial(measure, bits, fitted_in) for bits, fitted_in in formats}
    recording.table("history", parts, ARENA_SEED)


def record_classes(recording: Recording) -> None:
    """The steps of the plan of ``BUDGET``, with weights of each class or not, a row an image.

    ``calibration_images``, ``weights``, and columns of ``compare``. Both weights are fitted on the same images and
    judged on the same others.

    Raises:
        ValueError: no plan is recorded.
    """
    profile, sizes, plan = recording.profile, recording.sizes, _of_budget(recording)
    full, steps = Method(FULL.name, scheduler=profile.scheduler), tuple(sorted(plan.computed))

    def measure(images: int, least: float, weights: str) -> pd.DataFrame:
        fits = calibrate_profile(full.pipeline(profile), profile, "reference", images, recording.parts / "fits")
        config = fits.plan_of(fits.fit(steps, images, class_images=least))
        reference = recording.drawn(full, ARENA_SEED, 0, sizes.arena_images)
        rows = compare(Method(f"{weights} weights", config=config), reference, recording.many_at_once, ARENA_SEED)
        return _numbers(rows).assign(calibration_images=images, weights=weights)

    fitted = {COMMON: math.inf, OF_CLASS: CLASS_IMAGES}
    parts = {
        f"{images}-{weights}": functools.partial(measure, images, least, weights)
        for images in (sizes.plan_images, 2 * sizes.plan_images)
        for weights, least in fitted.items()
    }
    recording.table("classes", parts, ARENA_SEED)


def record_w8a8(recording: Recording) -> None:
    """A W8A8 model in full compute, and by the steps of the plan of ``BUDGET``, fitted on it or on the model as it was.

    ``plan``, and columns of ``compare``, a row an image; ``mse_w8a8`` is to the W8A8 model's full compute.

    Raises:
        ValueError: no plan is recorded.
    """
    profile, sizes, steps = recording.profile, recording.sizes, tuple(sorted(_of_budget(recording).computed))
    full = Method(FULL.name, scheduler=profile.scheduler)

    def measure(fitted_on: Method | None) -> pd.DataFrame:
        method = QUANTIZED
        if fitted_on is not None:
            pipe, work = fitted_on.pipeline(profile), recording.parts / "fits" / slug(fitted_on.name)
            fits = calibrate_profile(pipe, profile, "reference", sizes.plan_images, work)
            plan = fits.plan_of(fits.fit(steps, fits.images))
            method = dataclasses.replace(QUANTIZED, name=f"plan of {fitted_on.name}", config=plan)
        reference, own = (recording.drawn(drawn, ARENA_SEED, 0, sizes.arena_images) for drawn in (full, QUANTIZED))
        rows = compare(method, reference, recording.many_at_once, ARENA_SEED, beside={"w8a8": own.images})
        return _numbers(rows).assign(mse_w8a8=rows.mse_w8a8, plan="none" if fitted_on is None else fitted_on.name)

    fitted = {"none": None, "full": full, "w8a8": QUANTIZED}
    parts = {name: functools.partial(measure, method) for name, method in fitted.items()}
    recording.table("w8a8", parts, ARENA_SEED)


def _of_budget(recording: Recording) -> ForecastPlan:
    plan = pareto.recorded_plan(recording.folder, recording.profile, BUDGET)
    if plan is None:
        raise ValueError(f"no plan of {BUDGET}× is in {recording.folder}: record plans first")
    return plan


def _numbers(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[["image", "label", "mse", "macs_speedup", "cache_bytes"]]


def first_steps(profile: Profile, seed: int, number: int) -> torch.Tensor:
    """``first_step_features`` of the first images of a seed's set, ``[number, F]``."""
    pipe, told = FULL.pipeline(profile), []
    with Lockstep(pipe, profile.num_inference_steps) as lockstep:
        for call in profile_calls(pipe, profile, number, seed):
            with contextlib.closing(lockstep.follow([call])) as steps:
                _, [moment] = next(steps)
            outputs = {branch: newest[0][moment.part] for branch, newest in moment.outputs.items()}
            told.append(first_step_features(outputs, moment.hidden_states.get("cond"), None))
    return torch.cat(told)


def _plan(method: Method) -> ForecastPlan:
    assert isinstance(method.config, ForecastPlan)
    return method.config
