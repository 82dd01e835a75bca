"""Promises: a plan's images come so near to the full run's, in such a share of all images that are drawn alike.

What is promised is told from images that the plan wasn't fitted on, and holds for any distribution of errors:

- **In expectation**, by split conformal prediction (Vovk et al. 2005; Lei et al. 2018): of n + 1 images that are drawn
  alike, each is as likely to be the k-th worst. So the next one is at least as good as the k-th worst of n with
  probability 1 − k / (n + 1).
- **With confidence**, by Clopper and Pearson (1934): the least share of good images under which as many good ones of n
  as were seen would be rarer than 1 − confidence.

A rule chooses a plan for each image: the sparsest of which it predicts a PSNR above a threshold, by ridge regression,
or of which slide 7's network is sure enough that it is good. Thresholds are tried from the highest down, until one
fails: so each is tried only if all before it keep the promise, and the confidence holds for the one that is taken, with
no correction for how many were tried (fixed-sequence testing; Bauer 1991).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from dqar.attention import apply_dqar
from dqar.checks import check, check_choice
from dqar.forecast.ladder import LadderEngine, PlanLadder, Promise
from dqar.forecast.lockstep import call_arguments
from dqar.forecast.plan import ForecastPlan, Rows, as_rows
from dqar.policy import train_policy

Rule = Literal["linear", "policy"]
CONFIDENCE = 0.9
"""That a promise is kept, unless asked for otherwise."""
RULE_SHARE = 1 / 3
"""Of the images that the plans weren't fitted on, those that the rule is fitted on."""
RUNGS = (1.5, 2.0, 3.0)
"""How many times fewer MACs a ladder's denser plans take."""
THRESHOLDS = np.arange(15, -15.5, -0.5)
"""In dB above what is promised, or as a network's logit; written down before any image is seen, as fixed-sequence
testing needs."""
RIDGES = tuple(10.0**power for power in range(-3, 3))
STOPPING = 4
"""One image of so many, of the rule's, says when the network has learned enough."""
BEST = 80.0
"""PSNR in dB that the rule tells no more apart: rounding."""


def conformal_bound(values: Sequence[float], share: float) -> float:
    """The bound that the next value is at least with probability ``share``; −inf if there are too few values."""
    rank = math.floor((len(values) + 1) * (1 - share) + 1e-9)
    return float(np.sort(values)[rank - 1]) if rank else -math.inf


def is_certain(kept: int, images: int, share: float, confidence: float) -> bool:
    """Whether ``kept`` good ones of ``images`` leave no share below ``share`` possible, by Clopper and Pearson."""
    return _at_least(kept, images, share) <= 1 - confidence


def images_needed(share: float, confidence: float) -> int:
    """The fewest images that a promise can be told from: all of them keep it."""
    return math.ceil(math.log(1 - confidence) / math.log(share) - 1e-9)


def fit_ladder(
    pipe: Any,
    plans: Sequence[ForecastPlan],
    calls: Sequence[Mapping[str, Any]],
    decibels: float,
    share: float,
    confidence: float = CONFIDENCE,
    *,
    rule: Rule = "linear",
    seed: int = 1_000_000,
) -> PlanLadder:
    """A ladder that keeps a promise at the least cost found: the rule that chooses a plan for each image, calibrated.

    Every call is drawn in full compute and by every plan. On the first ``RULE_SHARE`` of the images the rule learns to
    tell each plan's PSNR (dB) from ``first_step_features``; on the others the lowest threshold is sought with
    which the images keep the promise.

    Args:
        pipe: the pipeline that the plans were made for.
        plans: of one kind of run.
        calls: keyword arguments of the pipeline, as for ``fit_plan``, but other images than the plans were fitted on,
            drawn as those will be that the promise is about.
        decibels, share, confidence: what is promised, see ``Promise``.
        rule: ``"linear"``, ridge regression, or ``"policy"``, slide 7's network for each plan.
        seed: of the first call without generator or latents; the next one's is one more.

    Raises:
        ValueError: too few images for the promise, or the densest plan doesn't keep it.
    """
    check_promise(decibels, share, confidence)
    check_choice("rule", rule, get_args(Rule))
    plans = sorted(plans, key=lambda plan: -len(plan.computed))
    reference = [_draw(pipe, plans[0], call, seed + i) for i, call in enumerate(tqdm(calls, "held out", leave=False))]
    images = sum(map(len, reference))
    check_enough(images, share, confidence)
    quality = np.empty((images, len(plans)))
    features: list[torch.Tensor] = []
    for rung, plan in enumerate(plans):
        alone = PlanLadder((plan,), ((0.0,),), math.inf, Promise(decibels, share, confidence, 0, 0, 0.0, 1.0))
        values: list[float] = []
        with apply_dqar(pipe, alone) as session:
            for i, call in enumerate(tqdm(calls, f"{len(plan.computed)} computed steps", leave=False)):
                drawn = _draw(pipe, plan, call, seed + i)
                values += [_psnr(ours, theirs) for ours, theirs in zip(drawn, reference[i], strict=True)]
        quality[:, rung] = values
        assert isinstance(session.engine, LadderEngine)
        features = [told for told, _ in session.engine.chosen]
    check("calls", f"{len(features)} streams of {images} images", len(features) == images, "one stream of latents each")
    return ladder_from(plans, torch.stack(features), quality, alone.promise, rule)


def ladder_from(
    plans: Sequence[ForecastPlan],
    features: torch.Tensor,
    quality: np.ndarray,
    promise: Promise,
    rule: Rule = "linear",
) -> PlanLadder:
    """The ladder of images that were drawn already: the rule is fitted on the first, and calibrated on the others.

    Args:
        plans: from the densest to the sparsest.
        features: ``[images, F]``, see ``first_step_features``.
        quality: ``[images, plans]``, PSNR in dB.
        promise: what is promised; what it says of images isn't read.
        rule: see ``fit_ladder``.

    Raises:
        ValueError: the densest plan doesn't keep it.
    """
    first = int(RULE_SHARE * len(features))
    known, hidden = features[:first], list[tuple[Rows, ...]]()
    if rule == "policy":
        networks = [network(known, quality[:first, rung] >= promise.decibels) for rung in range(len(plans))]
        hidden, weights = [layers[:-1] for layers in networks], [layers[-1][0] for layers in networks]
    else:
        rows = (ridge(known.numpy(), np.minimum(decibels[:first], BEST)) for decibels in quality.T)
        weights = [tuple(float(f"{w:.7g}") for w in row) for row in rows]
    draft = PlanLadder(tuple(plans), tuple(weights), math.inf, promise, tuple(hidden))
    return calibrated(draft, features[first:], quality[first:])


def calibrated(draft: PlanLadder, features: torch.Tensor, quality: np.ndarray) -> PlanLadder:
    """The ladder with the lowest threshold with which images that its rule wasn't fitted on keep its promise.

    Args:
        features: ``[images, F]``, see ``first_step_features``.
        quality: ``[images, plans]``, PSNR in dB.

    Raises:
        ValueError: the densest plan doesn't keep it.
    """
    promise, taken = draft.promise, None
    steps, images = draft.plans[0].num_inference_steps, len(quality)
    for threshold in (math.inf, *((0.0 if draft.hidden else promise.decibels) + THRESHOLDS).tolist()):
        trial = dataclasses.replace(draft, threshold=threshold)
        rungs = trial.choose(features)
        chosen = quality[range(images), rungs]
        kept = int((chosen >= promise.decibels).sum())
        if not is_certain(kept, images, promise.share, promise.confidence):
            break
        facts: dict[str, Any] = {
            "kept": kept,
            "images": images,
            "expected": conformal_bound(chosen.tolist(), promise.share),
            "macs_speedup": steps * images / sum(len(draft.plans[rung].computed) for rung in rungs),
        }
        taken = dataclasses.replace(trial, promise=dataclasses.replace(promise, **facts))
    if taken is None:
        raise ValueError(
            f"no plan keeps the promise: with the densest, {kept} of {images} images have {promise.decibels:g} dB"
        )
    return taken


def check_promise(decibels: float, share: float, confidence: float = CONFIDENCE) -> None:
    """Raises ``ValueError`` for numbers that can't be promised."""
    check("decibels", decibels, isinstance(decibels, (int, float)) and math.isfinite(decibels), "a number of dB")
    for name, value in (("share", share), ("confidence", confidence)):
        check(name, value, isinstance(value, float) and 0 < value < 1, "a number between 0 and 1")


def rungs(num_steps: int, macs: float) -> list[int]:
    """How many steps a ladder's plans compute, the most first; the sparsest has ``macs`` times fewer MACs."""
    factors = [*(factor for factor in RUNGS if factor < macs), macs]
    return sorted({max(2, int(num_steps / factor)) for factor in factors}, reverse=True)


def ridge(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weights of ``features`` ``[n, F]``, and a constant, by ridge regression to ``values`` ``[n]``; ``[F + 1]``.

    On features of unit variance; of ``RIDGES`` the one with the least error when each image is left out in turn.
    """
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-9 * np.abs(mean) + 1e-12, scale, np.inf)  # what never varies tells nothing
    left, singular, right = np.linalg.svd((features - mean) / scale, full_matrices=False)
    goal, best = values - values.mean(), (math.inf, np.zeros(features.shape[1]))
    for strength in RIDGES:
        kept = singular**2 / (singular**2 + strength * len(values))
        leverage = np.minimum((left**2 * kept).sum(1) + 1 / len(values), 1 - 1e-6)
        error = np.square((goal - left @ (kept * (left.T @ goal))) / (1 - leverage)).mean()
        damped = singular / (singular**2 + strength * len(values))
        best = min(best, (error, right.T @ (damped * (left.T @ goal))), key=lambda pair: pair[0])
    weights = best[1] / scale
    return np.append(weights, values.mean() - weights @ mean)


def network(features: torch.Tensor, good: np.ndarray) -> tuple[Rows, ...]:
    """The layers of slide 7's network, as ``PlanLadder`` has them, trained to tell which images are good.

    Where all are alike it says that, whatever the features.

    Args:
        features: ``[n, F]``.
        good: ``[n]``, whether an image has what is promised.
    """
    stop, labels = torch.arange(len(features)) % STOPPING == STOPPING - 1, torch.tensor(good).float()
    told = features.float()
    if len(labels[~stop].unique()) < 2:
        sure = float(THRESHOLDS[0] if labels[0] else THRESHOLDS[-1])
        return ((0.0,) * (features.shape[1] + 1),), ((0.0, sure),)
    policy, _ = train_policy(told[~stop], labels[~stop], told[stop], labels[stop])
    state = {name: x.double() for name, x in policy.state_dict().items()}
    layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in (0, 2, 4)]
    matrix, bias = layers[0]
    layers[0] = matrix / state["std"], bias - matrix @ (state["mean"] / state["std"])
    return tuple(as_rows(torch.cat([matrix, bias[:, None]], 1).tolist()) for matrix, bias in layers)


def check_enough(images: int, share: float, confidence: float = CONFIDENCE) -> None:
    """Raises ``ValueError`` if so many images that no plan was fitted on are too few for a promise."""
    needed = images_needed(share, confidence)
    accepted = f"{math.ceil(needed / (1 - RULE_SHARE))} or more, and as many to fit the plans on"
    check("calls", f"{images} held-out images", images - int(RULE_SHARE * images) >= needed, accepted)


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
