"""Promises: a plan's images come so near to the full run's, in such a share of all images that are drawn alike.

What is promised is told from images that the plan wasn't fitted on, and holds for any distribution of errors:

- **In expectation**, by split conformal prediction (Vovk et al. 2005; Lei et al. 2018): of n + 1 images that are drawn
  alike, each is as likely to be the k-th worst. So the next one is at least as good as the k-th worst of n with
  probability 1 − k / (n + 1).
- **With confidence**, by Clopper and Pearson (1934): the least share of good images under which as many good ones of n
  as were seen would be rarer than 1 − confidence.

Several plans are tried from the densest to the sparsest, until one fails: so each is tried only if all before it keep
the promise, and the confidence holds for the plan that is taken, with no correction for how many were tried
(fixed-sequence testing; Bauer 1991).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dqar.attention import apply_dqar
from dqar.config import check
from dqar.forecast.lockstep import call_arguments
from dqar.forecast.plan import ForecastPlan


@dataclass(frozen=True)
class Promise:
    """What was promised of a plan's images, and on what grounds.

    Attributes:
        decibels: the least PSNR to the same call without the plan, in dB.
        share: of all images, that have it.
        confidence: that this is so.
        kept: of the images that it was tried on, those that have it.
        images: that it was tried on.
        expected: the PSNR (dB) that the next image has with probability ``share``, over the draw of all images.
    """

    decibels: float
    share: float
    confidence: float
    kept: int
    images: int
    expected: float

    @property
    def holds(self) -> bool:
        """Whether the images are grounds enough for it."""
        return least_share(self.kept, self.images, self.confidence) >= self.share

    def __str__(self) -> str:
        return (
            f"PSNR >= {self.decibels:g} dB in {self.share:.0%} of images, with {self.confidence:.0%} confidence: "
            f"{self.kept} of {self.images} others have it"
        )


def conformal_bound(values: Sequence[float], share: float) -> float:
    """The bound that the next value is at least with probability ``share``; −inf if there are too few values."""
    rank = math.floor((len(values) + 1) * (1 - share) + 1e-9)
    return float(np.sort(values)[rank - 1]) if rank else -math.inf


def least_share(kept: int, images: int, confidence: float) -> float:
    """The least share of good images that ``kept`` good ones of ``images`` leave possible, by Clopper and Pearson."""
    low, high = 0.0, 1.0
    for _ in range(60 if kept else 0):
        share = (low + high) / 2
        low, high = (low, share) if _at_least(kept, images, share) > 1 - confidence else (share, high)
    return low


def images_needed(share: float, confidence: float) -> int:
    """The fewest images that a promise can be told from: all of them keep it."""
    return math.ceil(math.log(1 - confidence) / math.log(share) - 1e-9)


def keep_promise(
    pipe: Any,
    plans: Sequence[ForecastPlan],
    calls: Sequence[Mapping[str, Any]],
    decibels: float = 45.0,
    share: float = 0.95,
    confidence: float = 0.9,
    *,
    seed: int = 1_000_000,
) -> ForecastPlan:
    """The plan of ``plans`` that computes least and keeps the promise, with the promise in its provenance.

    Args:
        pipe: the pipeline that the plans were made for.
        plans: of one number of steps.
        calls: keyword arguments of the pipeline, as for ``fit_plan``, but other images than the plans were fitted on,
            drawn as those will be that the promise is about.
        decibels, share, confidence: what is promised, see ``Promise``.
        seed: of the first call without generator or latents; the next one's is one more.

    Raises:
        ValueError: too few images for the promise, or no plan keeps it.
    """
    check("plans", len(plans), len({plan.timesteps for plan in plans}) == 1, "plans for the same timesteps")
    for name, value in (("share", share), ("confidence", confidence)):
        check(name, value, 0 < value < 1, "a number between 0 and 1")
    calls = list(calls)
    needed = images_needed(share, confidence)
    reference: list[np.ndarray] = []
    kept: ForecastPlan | None = None
    for plan in sorted(plans, key=lambda own: -len(own.computed)):
        values: list[float] = []
        for number, call in enumerate(tqdm(calls, desc=f"{len(plan.computed)} computed steps", leave=False)):
            if number == len(reference):
                reference.append(_draw(pipe, plan, call, seed + number))
                drawn = sum(map(len, reference))
            with apply_dqar(pipe, plan):
                images = _draw(pipe, plan, call, seed + number)
            values += [_psnr(ours, theirs) for ours, theirs in zip(images, reference[number], strict=True)]
        check("calls", f"{drawn} images", drawn >= needed, f"{needed} or more, for a promise of this share")
        good = sum(value >= decibels for value in values)
        promise = Promise(decibels, share, confidence, good, len(values), conformal_bound(values, share))
        if not promise.holds:
            break
        said = {**dataclasses.asdict(promise), "statement": str(promise)}
        kept = dataclasses.replace(plan, provenance={**plan.provenance, "promise": said})
    if kept is None:
        raise ValueError(
            f"no plan keeps the promise: with the densest, {promise.kept} of {promise.images} images have it"
        )
    return kept


def _draw(pipe: Any, plan: ForecastPlan, call: Mapping[str, Any], seed: int) -> np.ndarray:
    """The call's images or videos ``[N, ...]`` in [0, 1]."""
    steps = plan.provenance.get("num_inference_steps", len(plan.timesteps))
    named = call_arguments(pipe, call, steps, seed)
    return np.asarray(pipe(**named, output_type="np", return_dict=False)[0])


def _psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = float(np.square(ours.astype(np.float64) - theirs).mean())
    return -10 * math.log10(max(error, 1e-30))


def _at_least(kept: int, images: int, share: float) -> float:
    """The probability that ``kept`` or more of ``images`` are good if ``share`` of all are."""
    log = math.lgamma
    return math.fsum(
        math.exp(
            log(images + 1) - log(k + 1) - log(images - k + 1) + k * math.log(share) + (images - k) * math.log1p(-share)
        )
        for k in range(kept, images + 1)
    )
