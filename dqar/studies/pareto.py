"""Notebook 11: quality against speed, every method on the same model, sampler, seeds and images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch

from dqar.config import CacheFormat, DQARConfig
from dqar.families import describe_model
from dqar.forecast.fit import FINER, Target
from dqar.forecast.plan import ForecastPlan, extrapolation
from dqar.forecast.profiles import calibrate_profile, with_provenance
from dqar.measure import metrics
from dqar.measure.calibrate import propose_gate
from dqar.measure.quality import Reference, reference_of
from dqar.measure.results import Run, load_table, slug
from dqar.measure.sampling import OPEN
from dqar.models.pipelines import to_images
from dqar.models.profiles import Profile
from dqar.peers.registry import RIVALS, Peer
from dqar.studies import policy
from dqar.studies.compare import FULL, Drawn, Method, check_again, compare, draw, summarize
from dqar.studies.recording import PARETO_SEED, Recording

SAMPLERS = ("dpm-solver++", "ddim")
"""Under which everything is compared: with the reference, and under the first one with the converged solution, too."""
CONVERGED_BY = "dpm-solver++-lu"
"""The sampler whose ``FINER`` times the steps are the converged solution, and which plans for it follow. Its steps are
even in log-SNR: 250 of them come to 65 dB of 1,000 on digits and to 81 on photographs (medians of 8 images). As many
even in time come to 54 and 67, DDIM's to 54, which is an error of the size of what would be judged by it.
"""
SPACINGS = {
    "dpm-solver++": (
        *("dpm-solver++", "dpm-solver++-lu", "dpm-solver++3-lu", "dpm-solver++-karras"),
        *("unipc2-exponential", "unipc2-karras", "unipc3-exponential"),
        *("deis2-karras", "deis3-exponential", "sa-solver3-exponential"),
    ),
    # Both samplers converge to one solution: of the others, those that are nearest to it in few steps.
    "ddim": ("ddim", "ddim-leading", "unipc2-karras", "unipc2-exponential", "deis3-exponential"),
}
"""Of fewer steps: of diffusers' solvers and spacings, those that came near the best in a trial on ``digits``."""
SITE_KINDS = {2: ((0, 8), (1, 16), (1, 8), (1, 4), (2, 16), (2, 8), (2, 4)), 3: ((1, 16), (1, 8), (2, 8))}
"""Forecast orders and bits inside the blocks, by interval of the computed steps."""
PLAN_BUDGETS = (1.5, 2, 2.08, 2.15, 2.5, 3, 3.8, 4, 5, 5.5)
"""Full compute's MACs over a plan's, at least; 2.08 is 2 with a decoder."""
BUDGETS = (1.5, 2, 3, 4)
"""At which methods are compared."""
PLAN, SITES = "DQAR plan", "DQAR sites"
"""Families."""
SOLVERS = {"bespoke": "bespoke solver", "timesteps": "learned timesteps"}
"""Kinds of learned solvers, and their families."""
SOLVER_BUDGETS = (2, 3, 4)
"""Full compute's steps over a learned solver's."""
DECODER_SHARE = 0.96
"""Of the steps that a budget has without a decoder, those it has with one: 24 of 50 where 25, with it, would take more
than half of the MACs."""


# --- what is compared ------------------------------------------------------------------------------------------------


def computed_steps(profile: Profile, budget: float) -> int:
    """The most steps that a plan may compute within a budget."""
    return max(2, int(profile.num_inference_steps / budget))


def converged(profile: Profile) -> Method:
    """What finds the converged solution."""
    return Method("converged", scheduler=CONVERGED_BY, num_inference_steps=FINER * profile.num_inference_steps)


def targets(sampler: str) -> tuple[Target, ...]:
    """What is aimed at, and compared with, under a sampler."""
    return get_args(Target) if sampler == SAMPLERS[0] else ("reference",)


def aims() -> list[tuple[str, Target]]:
    """Each sampler with each of its ``targets``."""
    return [(sampler, target) for sampler in SAMPLERS for target in targets(sampler)]


def grids(sampler: str) -> list[str]:
    """The steps that extrapolations and ``strong`` rivals are tried on: the sampler's, and those of the converged
    solution's plans."""
    return list(dict.fromkeys((sampler, CONVERGED_BY) if "converged" in targets(sampler) else (sampler,)))


def plan_path(folder: Path, sampler: str, target: Target, num_computed: int) -> Path:
    """Where a plan is kept."""
    return folder / "plans" / f"{slug(sampler)}-{target}-{num_computed}.json"


def recorded_plan(folder: Path, profile: Profile, budget: float, sampler: str | None = None) -> ForecastPlan | None:
    """The recorded plan of a budget for full compute's images, by the profile's sampler or another.

    Args:
        folder: of the profile's recorded tables.
    """
    path = plan_path(folder, sampler or profile.scheduler, "reference", computed_steps(profile, budget))
    return ForecastPlan.load(path) if path.exists() else None


def make_plans(
    profile: Profile,
    folder: Path,
    sampler: str,
    target: Target,
    num_images: int = 120,
    refinements: int = 24,
    work: Path | None = None,
) -> list[ForecastPlan]:
    """The plans of all budgets for one sampler and target, read where they have been made already.

    Args:
        folder: of the profile's recorded tables.
        work: a folder from which an interrupted fit goes on.
        refinements: neighbours tried for the slowest of them; the others get more, as they take less time.
    """
    numbers = (computed_steps(profile, budget) for budget in PLAN_BUDGETS)
    paths = {plan_path(folder, sampler, target, number): number for number in numbers}
    missing = {path: number for path, number in paths.items() if not path.exists()}
    if missing:
        profile = dataclasses.replace(profile, scheduler=CONVERGED_BY if target == "converged" else sampler)
        calibration = calibrate_profile(FULL.pipeline(profile), profile, target, num_images, work)
        for path, number in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            tries = refinements * max(paths.values()) // number  # what takes the same time at every budget
            with_provenance(calibration.plan(number, tries), profile).save(path)
    return [ForecastPlan.load(path) for path in paths]


def contenders(profile: Profile, sampler: str, folder: Path) -> list[Method]:
    """Everything that is compared under one sampler, at all its settings.

    Args:
        folder: of the profile's recorded tables: plans, labels and policies, as far as they have been made.
    """
    return [
        Method(FULL.name, scheduler=sampler),
        *fewer_steps(profile, sampler),
        *extrapolations(profile, sampler),
        *rivals(profile, sampler),
        *(_method(SITES, name, sampler, config=config) for name, config in site_configs().items()),
        *_deciding(sampler, folder),
        *learned_solvers(profile, sampler, folder),
        *plans(profile, sampler, folder),
    ]


def fewer_steps(profile: Profile, sampler: str) -> Iterator[Method]:
    """Fewer steps of the sampler, spaced in every way."""
    # 0.48 is DECODER_SHARE of a half.
    counts = {max(2, round(profile.num_inference_steps * x)) for x in (0.8, 0.66, 0.5, 0.48, 0.4, 0.32, 0.24, 0.2)}
    for spacing in SPACINGS[sampler]:
        for count in sorted(counts, reverse=True):
            yield _method("fewer steps", f"{count} of {spacing}", spacing, num_inference_steps=count)


def extrapolations(profile: Profile, sampler: str) -> Iterator[Method]:
    """The model's output extrapolated from every n-th step; the last steps are all computed."""
    every = [*itertools.product((2, 3, 4, 5, 6), (1, 4, 8)), (3, 12), (4, 16)]  # the last two: 25 of 50 steps
    for grid in grids(sampler):
        for (interval, last), order in itertools.product(every, (0, 1, 2)):
            plan = extrapolated(dataclasses.replace(profile, scheduler=grid), interval, last, order)
            settings = f"every {interval}, last {last}, order {order}, {grid}"
            yield _method("output extrapolation", settings, grid, config=plan)


def extrapolated(profile: Profile, interval: int, last: int, order: int) -> ForecastPlan:
    """The output extrapolated from every ``interval``-th step; the ``last`` steps are all computed."""
    pipe, steps = FULL.pipeline(profile), profile.num_inference_steps
    pipe.scheduler.set_timesteps(steps)
    computed = {*range(0, steps, interval), *range(max(0, steps - last), steps)}
    model, timesteps = describe_model(pipe.transformer), pipe.scheduler.timesteps.tolist()
    return extrapolation(computed, timesteps, max(1.0, profile.guidance_scale), model, order)


def rivals(profile: Profile, sampler: str) -> Iterator[Method]:
    """Every rival at every setting of its sweep."""
    for name, rival in RIVALS.items():
        for grid in grids(sampler) if rival.strong else [sampler]:
            for settings in rival.sweep:
                text = ", ".join(f"{key} {value}" for key, value in settings.items())
                if rival.calibration_images:
                    settings = {**settings, "guidance_scale": profile.guidance_scale}
                yield _method(name, f"{text}, {grid}", grid, peer=Peer(name, tuple(settings.items())))


def plans(profile: Profile, sampler: str, folder: Path) -> Iterator[Method]:
    """The forecast plans that have been made."""
    steps, numbers = profile.num_inference_steps, dict[int, float]()
    for budget in PLAN_BUDGETS:
        numbers.setdefault(computed_steps(profile, budget), budget)
    for target, (number, budget) in itertools.product(targets(sampler), numbers.items()):
        grid = CONVERGED_BY if target == "converged" else sampler
        path = plan_path(folder, sampler, target, number)
        if path.exists():
            settings = f"for the {target}, {number} of {steps} steps, {grid}"
            plan = ForecastPlan.load(path)
            yield _method(PLAN, settings, grid, config=plan, budget=budget, made_for=target)


def solver_path(folder: Path, kind: str, target: Target, num_inference_steps: int) -> Path:
    """Where a learned solver is kept, alone in its folder as ``save_pretrained`` would have it."""
    return folder / "solvers" / f"{kind}-{target}-{num_inference_steps}" / "scheduler_config.json"


def has_decoder(profile: Profile) -> bool:
    """Whether the model draws latents, which a VAE decodes."""
    return getattr(FULL.pipeline(profile), "vae", None) is not None


def solver_steps(profile: Profile) -> list[int]:
    """The numbers of steps that solvers are learned for."""
    steps = profile.num_inference_steps * (DECODER_SHARE if has_decoder(profile) else 1)
    return list(dict.fromkeys(max(2, int(steps / budget)) for budget in SOLVER_BUDGETS))


def learned_solvers(profile: Profile, sampler: str, folder: Path) -> Iterator[Method]:
    """The learned solvers that have been made; those for the reference beside the sampler that they aim at alone."""
    made_for = [target for target in targets(sampler) if target == "converged" or sampler == profile.scheduler]
    for (kind, family), target, steps in itertools.product(SOLVERS.items(), made_for, solver_steps(profile)):
        path = solver_path(folder, kind, target, steps)
        if path.exists():
            yield Method(
                f"{family}: {steps} steps for the {target}",
                family,
                num_inference_steps=steps,
                scheduler=profile.scheduler,
                solver=path.parent,
                made_for=target,
            )


def _method(family: str, settings: str, scheduler: str, **options: Any) -> Method:
    return Method(f"{family}: {settings}", family, scheduler=scheduler, **options)


def site_configs() -> dict[str, DQARConfig]:
    """DQAR inside the blocks: attention and feed-forward of all layers, or all of a block, from a quantized cache."""
    configs: dict[str, DQARConfig] = {}
    for interval, kinds in SITE_KINDS.items():
        for order, bits in kinds:
            configs[f"every {interval}, order {order}, {bits} bit"] = dataclasses.replace(
                OPEN,
                schedule="static",
                static_interval=interval,
                max_reuse_streak=interval,
                reuse_target="block",
                cache=CacheFormat(forecast_order=order),
                quantize_bits=bits,
                cooldown=4,
            )
    linear = {n: configs[f"every {n}, order 1, 8 bit"] for n in SITE_KINDS}
    others = {"attention only, every 2, order 1, 8 bit": dataclasses.replace(linear[2], reuse_target="output")}
    for interval, config in linear.items():
        name = f"whole blocks, every {interval}, order 1, 8 bit"
        others[name] = dataclasses.replace(config, reuse_target="residual")
    return {**others, **configs}


def _deciding(sampler: str, folder: Path) -> list[Method]:
    """Rule and policy over attention and feed-forward of all layers, as far as labels and policy are recorded."""
    labels, network = folder / "labels-block.parquet", policy.policy_path(folder, "block")
    if not (labels.exists() and network.exists()):
        return []
    rule = dataclasses.replace(propose_gate(load_table(labels)), reuse_target="block")
    configs = {"rule, 8 bit": rule, "policy, 8 bit": policy.policy_config(network, "block")}
    return [_method(SITES, name, sampler, config=config) for name, config in configs.items()]


# --- what came out ---------------------------------------------------------------------------------------------------


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """``summarize`` of a comparison: ``psnr_reference`` and, where measured, ``psnr_converged`` (dB, at most 120)."""
    errors = {name: table[name].clip(lower=metrics.IDENTICAL) for name in ("mse", "mse_converged") if name in table}
    return summarize(table.assign(**errors)).rename(columns={"psnr": "psnr_reference"})


def site_points(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Attention and feed-forward forecast at fixed intervals: ``summary``; ``None`` if some are missing."""
    if table is None:
        return None
    points = summary(table)
    points = points[(points.family == SITES) & (points.schedule == "static") & (points.target == "block")]
    points = points.astype({"interval": int, "order": int, "bits": int})
    points.attrs = table.attrs
    return points if len(points) == sum(map(len, SITE_KINDS.values())) else None


def within(points: pd.DataFrame, budget: float) -> pd.DataFrame:
    """The points that take ``budget`` times fewer MACs or more, to two decimals."""
    return points[points.macs_speedup.round(2) >= budget]


def best_at(points: pd.DataFrame, budget: float) -> pd.Series | None:
    """The point nearest to the reference ``within`` a budget; ``None`` if nothing is as fast."""
    fast = within(points, budget)
    return fast.iloc[int(fast.psnr_reference.argmax())] if len(fast) else None


def made_for(points: pd.DataFrame, target: Target) -> pd.DataFrame:
    """The points that may be compared under a target: none that was fitted to another one."""
    return points[points.made_for.isna() | (points.made_for == target)]


def own_plans(points: pd.DataFrame, target: Target) -> pd.DataFrame:
    """DQAR's plans that were made for a target: none is compared under another one."""
    return points[(points.family == PLAN) & (points.made_for == target)]


def table_name(sampler: str) -> str:
    """Of what is recorded under one sampler: every method at every setting."""
    return f"pareto-{slug(sampler)}"


def recorded(run: Run, sampler: str) -> pd.DataFrame | None:
    """The recorded comparison under one sampler."""
    return run.recorded(table_name(sampler))


def made_plans(run: Run) -> dict[tuple[str, Target], list[ForecastPlan]]:
    """The recorded plans by sampler and target, the least saving first."""
    made: dict[tuple[str, Target], list[ForecastPlan]] = {}
    numbers = dict.fromkeys(computed_steps(run.profile, budget) for budget in PLAN_BUDGETS)
    for sampler, target in aims():
        paths = [plan_path(run.recordings, sampler, target, number) for number in numbers]
        if plans := [ForecastPlan.load(path) for path in paths if path.exists()]:
            made[sampler, target] = plans
    return made


@dataclass(frozen=True)
class Denoising:
    """Two runs from the same noise, step by step: full compute, and a plan.

    Attributes:
        full, planned: ``[steps + 1, N, C, H, W]`` in [0, 1]: what each step begins with, and the finished images.
        computed: the steps that the plan computes.
        macs_speedup: full compute's multiply-accumulates over the plan's, counted as they ran.
        psnr: of the plan's images to full compute's, in dB of the mean squared error.
    """

    full: torch.Tensor
    planned: torch.Tensor
    computed: tuple[int, ...]
    macs_speedup: float
    psnr: float


def denoising(run: Run) -> Denoising | None:
    """Draws ten images by full compute and by the recorded plan of 3 times fewer MACs; ``None`` without that plan."""
    number = 10
    profile = dataclasses.replace(run.profile, batch_size=number)
    plan = recorded_plan(run.recordings, profile, budget=3)
    if plan is None:
        return None
    drawn, states = [], []
    for method in (FULL, Method(PLAN, config=plan)):
        pipe = method.pipeline(profile)
        with _states(pipe.scheduler) as seen:
            drawn.append(draw(method, profile, run.seed, num_samples=number))
        # Some pipelines step both branches' latents, which are equal.
        states.append(torch.stack([*(to_images(pipe, x[:number]).cpu() for x in seen), drawn[-1].images]))
    speedup, psnr = drawn[0].macs / drawn[1].macs, metrics.mean_psnr(drawn[1].images, drawn[0].images)
    return Denoising(states[0], states[1], tuple(plan.computed), speedup, psnr)


@contextmanager
def _states(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """The latents ``[N, C, H, W]`` that each step begins with, whether the model is computed there or not."""
    seen: list[torch.Tensor] = []
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def watched(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(sample)
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = watched
    try:
        yield seen
    finally:
        del scheduler.step


def check_recorded(run: Run, sampler: str, table: pd.DataFrame) -> pd.DataFrame:
    """``check_again`` with the first recorded one of DQAR's plans, and of its plainest rivals."""
    full, profile = Method(FULL.name, scheduler=sampler), run.profile
    taylorseer = (method for method in rivals(profile, sampler) if method.family == "TaylorSeer")
    kinds = (plans(profile, sampler, run.recordings), extrapolations(profile, sampler), fewer_steps(profile, sampler))
    there = set(table.method)
    first = [next((method for method in methods if method.name in there), None) for methods in (*kinds, taylorseer)]
    chosen = [method for method in first if method is not None]
    return check_again(chosen, table, profile, PARETO_SEED, 2, full)


# --- recording -------------------------------------------------------------------------------------------------------


def record_plans(recording: Recording) -> None:
    """The forecast plans of all samplers, targets and budgets; saved one by one."""
    sizes = recording.sizes
    images: dict[Target, int] = {"reference": sizes.plan_images, "converged": sizes.converged_images}
    for sampler, target in aims():
        work, number = recording.parts / f"plans-{slug(sampler)}-{target}", images[target]
        make_plans(recording.profile, recording.folder, sampler, target, number, sizes.refinements, work)


def record_pareto(recording: Recording) -> None:
    """Quality and MACs of every method at every setting, one table a sampler: ``screened``."""
    record_plans(recording)
    for sampler in SAMPLERS:
        screened(recording, sampler)


def screened(recording: Recording, sampler: str) -> pd.DataFrame:
    """Every method at every setting under one sampler, on a few images: ``comparisons``."""
    methods = contenders(recording.profile, sampler, recording.folder)
    chosen = some_of_each(methods, recording.sizes.pareto_settings)
    number = recording.sizes.pareto_images
    parts = comparisons(recording, chosen, sampler, PARETO_SEED, number)
    return recording.growing(table_name(sampler), parts, PARETO_SEED, number, holds(chosen, targets(sampler)))


def comparisons(
    recording: Recording, methods: Sequence[Method], sampler: str, seed: int, number: int
) -> dict[str, Callable[[], pd.DataFrame]]:
    """A measurement for every method, by name: ``compare`` with all ``targets``, and ``converged_by``.

    ``fd``, where a classifier is at hand, is the Fréchet distance to test data of all images whose rows have it.
    A method that ends in NaN or inf has NaN for its errors and its speedup.
    """
    full, finer = Method(FULL.name, scheduler=sampler), converged(recording.profile)
    drawn_by = {"converged_by": CONVERGED_BY} if "converged" in targets(sampler) else {}

    @functools.cache
    def compared_with() -> tuple[Drawn, dict[str, torch.Tensor], Reference | None]:
        reference, beside = recording.drawn(full, seed, 0, number), {}
        if drawn_by:
            beside["converged"] = recording.drawn(finer, seed, 0, number).images
        return reference, beside, reference_of(recording.profile.model, recording.folder)

    def one(method: Method) -> pd.DataFrame:
        reference, beside, real = compared_with()
        try:
            table = compare(method, reference, recording.many_at_once, seed, beside=beside)
        except FloatingPointError as error:  # of half precision: no reason to lose all others
            warnings.warn(f"{method.name} has no result: {error}", stacklevel=2)
            columns = dict.fromkeys(("mse", *(f"mse_{name}" for name in beside), "macs_speedup"), math.nan)
            return pd.DataFrame({"image": range(number)}).assign(**method.columns(), **columns, **drawn_by)
        if "features" in table and real is not None and number > 1:
            features = torch.tensor(np.stack(list(table.features))).double()
            table["fd"] = metrics.frechet_distance(features, real.features)
        # Of hundreds of methods, features would weigh megabytes.
        return table.drop(columns="features", errors="ignore").assign(**drawn_by)

    return {method.name: functools.partial(one, method) for method in methods}


def holds(methods: Sequence[Method], aimed: Sequence[Target]) -> Callable[[str, pd.DataFrame], bool]:
    """Tells of a method, by name, and its recorded rows whether these are what would be measured now.

    They aren't if its plan or solver was made anew, or if the converged solution, where it is ``aimed`` at, was drawn
    otherwise.
    """
    made = {method.name: method.made for method in methods}

    def told(method: str, rows: pd.DataFrame) -> bool:
        drawn_by = rows.converged_by if "converged_by" in rows else pd.Series([None])
        if "converged" in aimed and not drawn_by.eq(CONVERGED_BY).all():
            return False
        before = {*rows.made.dropna()} if "made" in rows else set()
        return made[method] is None or before <= {made[method]}  # early rows don't say when

    return told


def some_of_each(methods: Sequence[Method], number: int | None) -> list[Method]:
    """The first ``number`` of each family; ``None``: all.

    Plans for another target are another family. DQAR's settings inside the blocks stay whole: one figure compares them
    with each other.
    """
    families: dict[tuple[str, str | None], list[Method]] = {}
    for method in methods:
        families.setdefault((method.family, method.made_for), []).append(method)
    return [
        method
        for (family, _), members in families.items()
        for method in (members if family == SITES else members[:number])
    ]
