"""Quality against speed: every method on the same model, sampler, seeds and images, and MACs counted as they run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch

from dqar.config import CacheFormat, DQARConfig
from dqar.forecast.fit import make_plan
from dqar.forecast.plan import ForecastPlan
from dqar.forecast.steps import measure_gains
from dqar.forecast.trajectories import FINER, Target, trajectories
from dqar.measure import metrics
from dqar.measure.results import RECORDED, Run, load_table, slug
from dqar.measure.sampling import OPEN
from dqar.models.classifier import load_classifier
from dqar.models.profiles import Profile
from dqar.peers.registry import SWEEPS, Peer
from dqar.studies import policy
from dqar.studies.methods import Method, computed_steps, extrapolated, plan_path, policy_config, policy_path

PARETO_SEED = 700


SAMPLERS = {"dpm-solver++": "dpm-solver++-lu", "ddim": "ddim"}
"""Each sampler, and the spacing of its steps that a plan for the converged solution uses."""


SPACINGS = {
    "dpm-solver++": ("dpm-solver++", "dpm-solver++-lu", "dpm-solver++3-lu", "dpm-solver++-karras"),
    "ddim": ("ddim", "ddim-leading"),
}


CALIBRATED = ("SmoothCache", "MagCache")


STRONGEST = ("SeaCache", "TaylorSeer")
"""Of the peers, in a first look: tried with both spacings of the steps."""


SITE_KINDS = {2: ((0, 8), (1, 16), (1, 8), (1, 4), (2, 16), (2, 8), (2, 4)), 3: ((1, 16), (1, 8), (2, 8))}
"""Forecast orders and bits inside the blocks, by interval of the computed steps."""


BUDGETS = (1.5, 2, 2.15, 2.5, 3, 3.8, 4, 5, 5.5)
"""Full compute's MACs over a plan's, at least."""


OURS = "DQAR plan"


def make_plans(
    profile: Profile, sampler: str, target: Target, num_images: int = 120, refinements: int = 24
) -> list[ForecastPlan]:
    """The plans of all budgets for one sampler and target, read where they have been made already.

    Args:
        refinements: neighbours tried for the slowest of them; the others get more, as they take less time.
    """
    wanted = {plan_path(profile, sampler, target, n): n for n in (computed_steps(profile, b) for b in BUDGETS)}
    missing = {path: number for path, number in wanted.items() if not path.exists()}
    if missing:
        scheduler = SAMPLERS[sampler] if target == "converged" else sampler
        profile = dataclasses.replace(profile, scheduler=scheduler)
        pipe = Method().pipeline(profile)
        known = trajectories(pipe, profile, target, num_images)
        gains = measure_gains(pipe, profile, known.first(8))
        for path, number in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            tries = refinements * max(wanted.values()) // number  # what takes the same time at every budget
            make_plan(pipe, profile, number, known, gains, tries).save(path)
    return [ForecastPlan.load(path) for path in wanted]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method in the comparison, with its family and settings."""

    family: str
    settings: str
    method: Method

    @property
    def name(self) -> str:
        """For files and labels."""
        return f"{self.family}: {self.settings}" if self.settings else self.family


def contenders(profile: Profile, sampler: str) -> list[Contender]:
    """Everything that is compared under one sampler, at all its settings; plans as far as they have been made."""
    found = [Contender("full compute", "", Method(scheduler=sampler))]
    steps = profile.num_inference_steps
    counts = sorted({max(2, round(steps * share)) for share in (0.8, 0.66, 0.5, 0.4, 0.32, 0.24, 0.2)})
    for spacing in SPACINGS[sampler]:
        for count in reversed(counts):
            method = Method(scheduler=spacing, num_inference_steps=count)
            found.append(Contender("fewer steps", f"{count} of {spacing}", method))
    for grid in dict.fromkeys((sampler, SAMPLERS[sampler])):
        for interval, last, order in itertools.product((2, 3, 4, 5, 6), (1, 4, 8), (0, 1, 2)):
            plan = extrapolated(dataclasses.replace(profile, scheduler=grid), interval, last, order)
            settings = f"every {interval}, last {last}, order {order}, {grid}"
            method = Method(plan, scheduler=grid)
            found.append(Contender("output extrapolation", settings, method))
    for name, sweep in SWEEPS.items():
        grids = (sampler, SAMPLERS[sampler]) if name in STRONGEST else (sampler,)
        for grid in dict.fromkeys(grids):
            for settings in sweep:
                if name in CALIBRATED:
                    settings = {**settings, "guidance_scale": profile.guidance_scale}
                text = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "guidance_scale")
                method = Method(scheduler=grid, peer=Peer(name, tuple(settings.items())))
                found.append(Contender(name, f"{text}, {grid}", method))
    for name, config in {**site_configs(), **_deciding(profile)}.items():
        found.append(Contender("DQAR sites", name, Method(config, scheduler=sampler)))
    for target, grid in (("reference", sampler), ("converged", SAMPLERS[sampler])):
        for budget in BUDGETS:
            number = computed_steps(profile, budget)
            path = plan_path(profile, sampler, target, number)
            if path.exists():
                method = Method(ForecastPlan.load(path), scheduler=grid)
                found.append(Contender(f"{OURS}, {target}", f"{number} of {steps} steps, {grid}", method))
    return found


def site_configs() -> dict[str, DQARConfig]:
    """DQAR inside the blocks: attention and feed-forward of all layers, or all of a block, from a quantized cache."""
    configs = {}
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
    linear = {f"every {n}": configs[f"every {n}, order 1, 8 bit"] for n in SITE_KINDS}
    others = {"attention only, every 2, order 1, 8 bit": dataclasses.replace(linear["every 2"], reuse_target="output")}
    for interval, config in linear.items():
        name = f"whole blocks, {interval}, order 1, 8 bit"
        others[name] = dataclasses.replace(config, reuse_target="residual")
    return {**others, **configs}


def _deciding(profile: Profile) -> dict[str, DQARConfig]:
    """Rule and policy over attention and feed-forward of all layers, as far as labels and policy are recorded."""
    path, network = RECORDED / profile.name / "labels-block.parquet", policy_path(profile, "block")
    if not (path.exists() and network.exists()):
        return {}
    rule = dataclasses.replace(policy.rule_gate(load_table(path)), reuse_target="block")
    return {"rule, 8 bit": rule, "policy, 8 bit": policy_config(network, "block")}


def targets(profile: Profile, sampler: str, num_images: int) -> dict[Target, torch.Tensor]:
    """The images ``[N, C, H, W]`` that all are compared with: the run's own, and those of ``FINER`` times the steps."""
    steps = {"reference": profile.num_inference_steps, "converged": FINER * profile.num_inference_steps}
    return {
        target: Method(scheduler=sampler, num_inference_steps=number)
        .draw(profile, PARETO_SEED, num_samples=num_images, description=target)
        .images
        for target, number in steps.items()
    }


def measure(contender: Contender, profile: Profile, wanted: dict[Target, torch.Tensor]) -> pd.DataFrame:
    """Draws what ``wanted`` shows; one row an image.

    Returns:
        ``family``, ``settings``, ``image``, ``mse_reference``, ``mse_converged``, ``predicted`` and ``label``;
        ``macs`` (an image, counted) and ``cache_bytes`` (an image, largest at any step; NaN for peers).
    """
    number = len(wanted["reference"])
    own = dataclasses.replace(profile, batch_size=number)
    if contender.method.peer is not None:  # calibrates some of them: not part of what drawing costs
        with contender.method.peer.attach(contender.method.pipeline(own), own.num_inference_steps):
            pass
    drawn = []
    macs = metrics.count_macs(
        lambda: drawn.append(contender.method.draw(own, PARETO_SEED, num_samples=number, description=contender.name))
    )
    images, trace = drawn[0].images, drawn[0].trace
    predicted, _ = metrics.classify(load_classifier(profile.model), images)
    table = pd.DataFrame({"family": contender.family, "settings": contender.settings, "image": range(number)})
    for target, theirs in wanted.items():
        table[f"mse_{target}"] = (images.double() - theirs.double()).square().flatten(1).mean(1)
    cached = math.nan
    if trace is not None:
        rows = pd.concat([trace.to_pandas(), trace.to_pandas("model")])
        cached = rows.groupby(["run", "step"])["bytes"].sum().max() / number
    elif contender.method.peer is None:
        cached = 0.0
    return table.assign(predicted=predicted, label=drawn[0].labels, macs=macs / number, cache_bytes=cached)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per contender: ``macs_speedup``, ``psnr_reference``, ``psnr_converged`` (dB), ``accuracy``, bytes."""
    by = table.groupby(["family", "settings"], sort=False)
    found = by[["macs", "cache_bytes"]].first()
    for target in ("reference", "converged"):
        found[f"psnr_{target}"] = -10 * np.log10(by[f"mse_{target}"].mean().clip(lower=1e-12))
    found["accuracy"] = by.apply(lambda own: (own.predicted == own.label).mean(), include_groups=False)
    found = found.reset_index()
    full = found.macs[found.family == "full compute"].iloc[0]
    return found.assign(macs_speedup=full / found.macs)


def site_points(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Forecasts inside the blocks: ``summary`` with ``interval``, ``order``, ``bits``; ``None`` if some are missing."""
    if table is None:
        return None
    points = summary(table)
    points = points[(points.family == "DQAR sites") & points.settings.str.startswith("every")]
    parts = points.settings.str.extract(r"every (?P<interval>\d), order (?P<order>\d), (?P<bits>\d+) bit")
    points = points.join(parts.dropna().astype(int), how="inner")
    points.attrs = table.attrs
    return points if len(points) == sum(map(len, SITE_KINDS.values())) else None


def frontier(points: pd.DataFrame, target: Target) -> pd.DataFrame:
    """The points that no other beats in both speed and quality, by rising speed."""
    points = points.sort_values(["macs_speedup", f"psnr_{target}"], ascending=False)
    best = points[f"psnr_{target}"].cummax()
    return points[points[f"psnr_{target}"] >= best].drop_duplicates("macs_speedup").sort_values("macs_speedup")


def at_budget(points: pd.DataFrame, target: Target, budget: float) -> float:
    """The best quality (dB) at ``budget`` times fewer MACs, or more; NaN if nothing is as fast."""
    within = points[points.macs_speedup >= budget * 0.999][f"psnr_{target}"]
    return within.max() if len(within) else math.nan


def verdicts(points: pd.DataFrame, budgets: Sequence[float] = (1.5, 2, 3, 4)) -> pd.DataFrame:
    """At each budget: DQAR's best plan and the best peer, in dB, and the MACs that each needs for the other's quality.

    Returns:
        ``target``, ``budget``, ``ours``, ``peer`` (dB), ``which`` (the peer), and ``macs_needed``: our MACs over the
        peer's at the peer's quality or better, by the plans that were made.
    """
    rows = []
    for target in ("reference", "converged"):
        mine = points[points.family == f"{OURS}, {target}"]
        peers = points[~points.family.str.startswith("DQAR") & (points.family != "full compute")]
        for budget in budgets:
            within = peers[peers.macs_speedup >= budget * 0.999]
            if not len(within) or not len(mine):
                continue
            best = within.loc[within[f"psnr_{target}"].idxmax()]
            as_good = mine[mine[f"psnr_{target}"] >= best[f"psnr_{target}"]]
            needed = best.macs_speedup / as_good.macs_speedup.max() if len(as_good) else math.nan
            rows.append(
                {
                    "target": target,
                    "budget": budget,
                    "ours": at_budget(mine, target, budget),
                    "peer": best[f"psnr_{target}"],
                    "which": f"{best.family}: {best.settings}",
                    "macs_needed": needed,
                }
            )
    return pd.DataFrame(rows, columns=["target", "budget", "ours", "peer", "which", "macs_needed"])


def parts(
    profile: Profile, sampler: str, num_images: int, per_family: int | None = None
) -> dict[str, Callable[[], pd.DataFrame]]:
    """A measurement for every contender, by name; they share the images that they are compared with.

    Args:
        per_family: so many settings of each at most; ``None``: all.
    """
    wanted: dict[Target, torch.Tensor] = {}

    def one(contender: Contender) -> pd.DataFrame:
        if not wanted:
            wanted.update(targets(dataclasses.replace(profile, batch_size=num_images), sampler, num_images))
        return measure(contender, profile, wanted)

    families: dict[str, list[Contender]] = {}
    for contender in contenders(profile, sampler):
        families.setdefault(contender.family, []).append(contender)
    chosen = [contender for own in families.values() for contender in own[:per_family]]
    return {slug(contender.name): functools.partial(one, contender) for contender in chosen}


def recorded(run: Run, sampler: str) -> pd.DataFrame | None:
    """The recorded comparison under one sampler."""
    return run.recorded(f"pareto-{slug(sampler)}")


def made_plans(profile: Profile) -> dict[str, list[ForecastPlan]]:
    """The recorded plans by sampler and target, the least saving first."""
    found = {}
    for sampler in SAMPLERS:
        for target in ("reference", "converged"):
            paths = [plan_path(profile, sampler, target, computed_steps(profile, budget)) for budget in BUDGETS]
            plans = [ForecastPlan.load(path) for path in dict.fromkeys(paths) if path.exists()]
            if plans:
                found[f"{sampler}, {target}"] = plans
    return found


def best_of_families(table: pd.DataFrame, target: Target, budgets: Sequence[float] = (1.5, 2, 3, 4)) -> pd.DataFrame:
    """The best quality (dB) of each family at each budget, best first."""
    points = summary(table)
    rows = {
        family: [at_budget(own, target, budget) for budget in budgets]
        for family, own in points.groupby("family", sort=False)
    }
    columns = [f"{budget:g}×, {target}" for budget in budgets]
    best = pd.DataFrame.from_dict(rows, orient="index", columns=columns).dropna(how="all")
    return best.sort_values(columns[1], ascending=False).round(1)


def check_recorded(
    run: Run, sampler: str, table: pd.DataFrame, number: int = 2, tolerance: float = 3.0
) -> pd.DataFrame:
    """Draws the first images anew with a plan and its rivals, and warns where they disagree with what was recorded.

    Returns:
        ``method``, and the PSNR (dB) of these images to the reference, ``recorded`` and ``live``. Within ``tolerance``
        dB, or both beyond 60 dB, counts as agreement.
    """
    profile = dataclasses.replace(run.profile, batch_size=number)
    draw = {"num_samples": number, "description": "check"}
    reference = Method(scheduler=sampler).draw(profile, PARETO_SEED, **draw).images
    rows, families = [], (f"{OURS}, reference", "output extrapolation", "fewer steps", "TaylorSeer")
    chosen = {own.family: own for own in reversed(contenders(run.profile, sampler)) if own.family in families}
    for family in families:
        if family not in chosen:
            continue
        contender = chosen[family]
        before = table[(table.family == family) & (table.settings == contender.settings) & (table.image < number)]
        images = contender.method.draw(profile, PARETO_SEED, **draw).images
        live, was = metrics.mean_psnr(images, reference), -10 * math.log10(max(before.mse_reference.mean(), 1e-12))
        rows.append({"method": contender.name, "recorded": was, "live": live})
        if abs(was - live) > tolerance and min(was, live) < 60:
            text = f"{contender.name}: recorded {was:.1f} dB, now {live:.1f} dB: run `make results` anew"
            warnings.warn(text, stacklevel=2)
    return pd.DataFrame(rows, columns=["method", "recorded", "live"])
