"""What a recording will take, before it is made: a few timed steps, times the steps, images and bytes of each part."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pandas as pd
import torch

from dqar.families import taken_layers
from dqar.forecast.fit import FINER
from dqar.measure import bits, metrics
from dqar.measure.quality import extractor_of, scores
from dqar.measure.sampling import LOOK
from dqar.models.pipelines import cached_pipeline
from dqar.models.profiles import Profile
from dqar.peers.registry import RIVALS
from dqar.studies import arena, batches, layers, pareto, plans, policy, qat, quantized_cache, results
from dqar.studies.compare import FULL, Method
from dqar.studies.recording import Sizes

TARGETS, DECIDERS = len(policy.LABELLED), 2 * 4 * 4
"""Reuse targets of the labels; targets, shares and deciders that are compared."""


@dataclasses.dataclass(frozen=True)
class Work:
    """An upper bound of the work in one part; reuse and plans need less.

    Attributes:
        steps: of single guided images, in batches as large as pay.
        small: the same in batches of four; ``alone``: one image at once, its entropy measured.
        images: that are decoded; ``scored``: of these, by the networks of ``quality.scores``.
        kept: images that are kept until the recording is done.
    """

    steps: int
    small: int = 0
    alone: int = 0
    images: int = 0
    scored: int = 0
    kept: int = 0


def works(profile: Profile, folder: Path) -> dict[str, Work]:
    """The work of every part that takes time, by its name in ``record.TABLES``.

    ``policy`` and ``rules`` ask nothing of the model; ``solvers`` and ``video`` are recorded of embedded models alone.

    Args:
        folder: of the recorded tables. What their methods will be is counted as far as it is known without them.
    """
    sizes, steps = Sizes.of(profile), profile.num_inference_steps
    labelled, sweep, part = sizes.label_images, sizes.sweep_images, sizes.part
    trials = labelled * sizes.sites_per_step
    numbers = [pareto.computed_steps(profile, budget) for budget in pareto.PLAN_BUDGETS]
    budgets = sorted(set(numbers))
    # Three starts, a firmer ridge, and the plan itself.
    fits = sum((5 + sizes.refinements * budgets[-1] // number) * number for number in budgets)
    each = {
        "reference": sizes.plan_images * (steps + fits),
        "converged": sizes.converged_images * (FINER * steps + fits),
    }
    follow = sum(each[target] for _, target in pareto.aims())
    compared = [_some(profile, sampler, folder, sizes) for sampler in pareto.SAMPLERS]
    calibrated = sum(
        RIVALS[name].calibration_images for methods in compared for name in {m.family for m in methods} & RIVALS.keys()
    )
    in_arena = [arena.number_of_images(profile, sizes, sampler) for sampler in pareto.SAMPLERS]
    aimed = [len(pareto.targets(sampler)) for sampler in pareto.SAMPLERS]
    families = sum(len({x.family for x in m}) * n * t for m, n, t in zip(compared, in_arena, aimed, strict=True))
    finer = [FINER * ("converged" in pareto.targets(sampler)) for sampler in pareto.SAMPLERS]
    finalists = families * len(arena.BUDGETS)
    drawn_beside = sum(n * (1 + more) for n, more in zip(in_arena, finer, strict=True))
    # Full compute, and at each budget a plan and a rival by each measure.
    before_decoder = pareto.has_decoder(profile) * (1 + len(arena.BUDGETS) * (1 + len(arena.SHOWN)))
    before_decoder *= arena.number_of_images(profile, sizes, profile.scheduler)
    # Rule and policy for two targets, and for each budget a plan, fewer steps and two rivals, are still to come.
    methods = max(len(results.methods(profile, folder)), 11 + 4 + 4 * len(pareto.BUDGETS))
    dtypes = 2 * part
    drawn = (methods - 2) * sizes.samples + dtypes
    overhead = 5 * (4 * profile.repeats + 1) * 4
    one_site = labelled * (1 + 2 * steps) + trials * steps * (steps - 1) // 2
    computed = pareto.computed_steps(profile, plans.BUDGET)
    own_reference = not profile.embedded and profile.reference is None
    searched = (sizes.search_trials + 1) * sizes.search_images
    again = (sizes.front_points + 1) * sizes.front_images
    # A tuning computes an image once with gradients, as much as three passes, and twice without: two passes are a step.
    tuned, tunings = profile.model == "digits", len(qat.MODELS) - 1
    qat_images = tuned * len(qat.MODELS) * len(qat.CACHES) * sizes.tuned_images
    formats = 1 + 2 * len(quantized_cache.cache_methods("kv"))
    # Each width of each layer, and of each step that is reused once: every second.
    number = len(taken_layers(cached_pipeline(profile).transformer))
    by_bits = (2 + len(bits.FEW) * (number + steps // 2)) * sizes.bits_images
    shared = 2 * len(layers.THETAS) + 2  # alone and on top of reuse, that reuse, and full compute
    mixed = sum(1 + len(uniform) + len(budgets) for uniform, budgets in quantized_cache.MIXED.values())
    mixed, by_bits = mixed * sizes.arena_images, by_bits * len(quantized_cache.MIXED)
    return {
        "reference": Work(*(own_reference * x for x in (sizes.samples * steps, 0, 0, *3 * (sizes.samples,)))),
        "labels": Work(
            TARGETS * one_site, alone=TARGETS * labelled * steps, images=TARGETS * (2 * labelled + trials * (steps - 1))
        ),
        "oracle": Work(6 * part * steps, images=6 * part, scored=5 * part, kept=part),
        "deciders": Work((DECIDERS + 1) * sweep * steps, images=DECIDERS * sweep, scored=DECIDERS * sweep, kept=sweep),
        "overhead": Work(0, small=overhead * steps, images=overhead),
        "accumulation": Work(16 * sweep * steps, images=16 * sweep),
        "sharing": Work(10 * sweep * steps, images=10 * sweep, scored=10 * sweep),
        "plans": Work(follow),
        "pareto": Work(
            ((sum(map(len, compared)) + len(compared) + sum(finer)) * sizes.pareto_images + calibrated) * steps,
            images=sum(map(len, compared)) * sizes.pareto_images + calibrated,
        ),
        "arena": Work((finalists + drawn_beside + calibrated) * steps, images=finalists + calibrated),
        "latents": Work(before_decoder * steps, images=before_decoder),
        "speed": Work(0, small=methods * (profile.repeats + 1) * 4 * steps, images=methods * 4 * (profile.repeats + 1)),
        "memory": Work(0, small=methods * 4 * steps, images=methods * 4),
        "promise": Work(sizes.samples),
        "samplers": Work(part * (3 * steps + 4 * computed), images=7 * part, scored=7 * part, kept=3 * part),
        "history": Work(
            sizes.plan_images * (steps + 3 * computed) + sizes.arena_images * (steps + 5 * computed),
            **dict.fromkeys(("images", "scored"), 6 * sizes.arena_images),
            kept=sizes.arena_images,
        ),
        "formats": Work(
            formats * sizes.arena_images * steps,
            **dict.fromkeys(("images", "scored"), formats * sizes.arena_images),
            kept=3 * sizes.arena_images,
        ),
        "bits": Work(
            (by_bits + mixed) * steps,
            images=by_bits + mixed,
            scored=mixed,
            kept=len(quantized_cache.MIXED) * sizes.arena_images,
        ),
        "classes": Work(
            sizes.plan_images * (2 * steps + 6 * computed) + sizes.arena_images * (steps + 4 * computed),
            **dict.fromkeys(("images", "scored"), 5 * sizes.arena_images),
            kept=sizes.arena_images,
        ),
        "w8a8": Work(
            sizes.plan_images * 2 * (steps + computed) + sizes.arena_images * (2 * steps + 2 * computed),
            **dict.fromkeys(("images", "scored"), 5 * sizes.arena_images),
            kept=2 * sizes.arena_images,
        ),
        "layers": Work(
            (shared * sweep + min(layers.IMAGES, profile.num_samples)) * steps,
            **dict.fromkeys(("images", "scored"), shared * sweep),
            kept=sweep,
        ),
        "samples": Work((drawn + sizes.samples) * steps, images=drawn, scored=drawn, kept=sizes.samples),
        "batches": Work(
            (2 * len(batches.SIZES) + 1) * sizes.batch_images * steps,
            small=3 * (sizes.batch_repeats + 1) * sum(batches.SIZES) * steps,
            images=2 * len(batches.SIZES) * sizes.batch_images + 3 * (sizes.batch_repeats + 1) * sum(batches.SIZES),
        ),
        "qat": Work(
            qat_images * steps + tuned * tunings * sizes.tuning_steps * sizes.tuning_batch * 3,
            **dict.fromkeys(("images", "scored"), qat_images),
        ),
        "search": Work((searched + again) * steps, images=searched + again, scored=again),
    }


def _some(profile: Profile, sampler: str, folder: Path, sizes: Sizes) -> list[Method]:
    return pareto.some_of_each(pareto.contenders(profile, sampler, folder), sizes.pareto_settings)


def estimate(profile: Profile, folder: Path) -> pd.DataFrame:
    """One row a part: ``part``, ``hours`` and ``disk_gb``, both at most; ``attrs`` has what was measured for it.

    ``attrs``: ``images_at_once``, ``seconds_per_step`` (of a guided image, in so large a batch), ``seconds_per_image``
    (to decode it), ``seconds_per_score``, ``peak_bytes`` (allocated on a GPU, resident on a CPU) and ``device``.
    """
    at_once = min(50, profile.images)
    large, four = (dataclasses.replace(profile, batch_size=n) for n in (at_once, min(4, profile.images)))
    FULL.draw(large, 0, num_samples=at_once, num_inference_steps=2)  # warm
    metrics.reset_peak_memory(profile.device)
    short, longer = (_seconds(FULL, large, steps) for steps in (2, 6))
    peak = metrics.peak_memory_bytes(profile.device)
    step = max(longer - short, 1e-9) / 4 / at_once
    decode = max(short / at_once - 2 * step, 0.0)
    few = _slope(FULL, four)
    alone = _slope(Method("looking", config=LOOK), dataclasses.replace(profile, batch_size=1))
    drawn = FULL.draw(large, 0, num_samples=at_once, num_inference_steps=2)
    started = time.perf_counter()
    scores(profile, drawn.images, drawn.labels, drawn.images)
    score = (time.perf_counter() - started) / at_once
    extractor = None if profile.embedded else extractor_of(profile)
    row_bytes = 200 + 2 * sum(extractor.widths.values() if extractor else (64,))
    image_bytes = drawn.images[0].nbytes
    rows = []
    for part, work in works(profile, folder).items():
        seconds = work.steps * step + work.small * few + work.alone * alone + work.images * decode + work.scored * score
        disk = work.scored * row_bytes * 2 + work.kept * image_bytes  # rows stand in the parts and in the table
        rows.append({"part": part, "hours": seconds / 3600, "disk_gb": disk / 1e9})
    table = pd.DataFrame(rows)
    device = torch.cuda.get_device_name() if profile.device == "cuda" else "this CPU"
    measured = {"images_at_once": at_once, "seconds_per_step": step, "seconds_per_image": decode}
    table.attrs = {**measured, "seconds_per_score": score, "peak_bytes": peak, "device": device}
    return table


def _slope(method: Method, batch: Profile) -> float:
    """Seconds of one step of a guided image, all else taken out."""
    short, longer = (_seconds(method, batch, steps) for steps in (2, 6))
    return max(longer - short, 1e-9) / 4 / batch.batch_size


def _seconds(method: Method, batch: Profile, steps: int) -> float:
    """Of one batch, whose images come back to the CPU and so are done."""
    started = time.perf_counter()
    method.draw(batch, 0, num_samples=batch.batch_size, num_inference_steps=steps)
    return time.perf_counter() - started
