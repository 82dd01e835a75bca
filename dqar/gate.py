"""What decides: for each step one row of reasons a branch, filled when the step begins; a site only looks it up.

A new gate is one class with ``row``. A reason is ``"reuse"``, or the first condition that failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dqar.cache import CacheEntry, QuantizedCache
from dqar.config import DQARConfig
from dqar.plan import ReusePlan
from dqar.policy import policy_features
from dqar.trace import Entropies


@dataclass
class Step:
    """What a gate may look at: where the run is, and what its sites' last results were.

    Attributes:
        index, total: of the denoising steps.
        eligible: the layers that the schedule lets reuse.
        snr: that decides; ``None``: unknown.
        latent_norm: ‖x_t‖₂, mean of the batch; ``None``: unknown.
        prompt_length: words of the prompt; ``None``: unknown.
        threshold: of the entropy, τ(p).
        cache: the run's.
        entropies: of a site, when it was last measured; ``None``: never.
    """

    index: int
    total: int
    eligible: Collection[int]
    snr: float | None
    latent_norm: float | None
    prompt_length: int | float | None
    threshold: float
    cache: QuantizedCache
    entropies: Callable[[int, str], Entropies | None]

    def entropy(self, layer_id: int, branch: str) -> float | None:
        """The site's last measured entropy in nats, averaged over heads and images."""
        entropies = self.entropies(layer_id, branch)
        return None if entropies is None else entropies.mean.get(branch)


class Gate(Protocol):
    """Decides for all layers of a step at once."""

    def row(self, step: Step, branch: str) -> Sequence[str]:
        """The reason of each layer, from 0 up, in one branch."""


def make_gate(config: DQARConfig, num_layers: int) -> Gate:
    """The gate that the configuration asks for."""
    if isinstance(config.plan, ReusePlan):
        return PlanGate(config.plan, num_layers)
    return RuleGate(config, num_layers) if config.policy is None else PolicyGate(config, num_layers)


class PlanGate:
    """A ``ReusePlan``'s decisions; ``"no cache"`` where it reuses what isn't there, as in a run that began late."""

    def __init__(self, plan: ReusePlan, num_layers: int):
        self.plan, self.num_layers = plan, num_layers

    def row(self, step: Step, branch: str) -> Sequence[str]:
        """See ``Gate``."""
        reasons = ["plan"] * self.num_layers
        for layer_id in step.eligible:
            if (step.index, layer_id, branch) in self.plan.sites:
                reasons[layer_id] = "no cache" if _missing(step.cache.get(layer_id, branch)) else "reuse"
        return reasons


class RuleGate:
    """Slide 5's rule: schedule, streak, then SNR within its range and entropy below its threshold."""

    def __init__(self, config: DQARConfig, num_layers: int):
        self.config, self.num_layers = config, num_layers

    def row(self, step: Step, branch: str) -> Sequence[str]:
        """See ``Gate``."""
        config = self.config
        if step.index < config.warmup:
            return ["warmup"] * self.num_layers
        if step.index >= step.total - config.cooldown:
            return ["cooldown"] * self.num_layers
        reasons, undecided = ["schedule"] * self.num_layers, []
        for layer_id in step.eligible:
            entry = step.cache.get(layer_id, branch)
            if _missing(entry):
                reasons[layer_id] = "no cache"
            elif entry.streak >= config.max_reuse_streak:
                reasons[layer_id] = "streak"
            else:
                undecided.append(layer_id)
        if undecided:
            for layer_id, reason in zip(undecided, self.decide(step, branch, undecided), strict=True):
                reasons[layer_id] = reason
        return reasons

    def decide(self, step: Step, branch: str, layers: Sequence[int]) -> Iterable[str]:
        """The reasons of layers that have something to reuse and may."""
        config = self.config
        if config.snr_range is not None:
            low, high = config.snr_range
            if config.gates_on_snr and not (step.snr is not None and low <= step.snr <= high):
                return ["snr"] * len(layers)
        if step.threshold == math.inf:
            return ["reuse"] * len(layers)
        return ["reuse" if self._is_low(step.entropies(layer, branch), branch, step) else "entropy" for layer in layers]

    def _is_low(self, entropies: Entropies | None, branch: str, step: Step) -> bool:
        entropy = None if entropies is None else entropies.mean.get(branch)
        if entropy is None:
            return False
        scale = math.log(entropies.tokens) if self.config.probe.entropy_unit == "normalized" else 1.0
        return entropy / scale < step.threshold


class PolicyGate(RuleGate):
    """Slide 7's: schedule and streak as in the rule, then a trained policy."""

    def decide(self, step: Step, branch: str, layers: Sequence[int]) -> Iterable[str]:
        """All layers in one pass on the host, so that no site waits for the device.

        Raises:
            ValueError: a step whose SNR or norm isn't known.
        """
        entropies = [step.entropy(layer_id, branch) for layer_id in layers]
        known = [entropy for entropy in entropies if entropy is not None]
        scores = iter(())
        if known:
            if None in (step.snr, step.latent_norm):
                raise ValueError("the policy needs begin_step's snr and latent_norm from the second step on")
            length = step.prompt_length or 1
            features = [
                policy_features(entropy, step.snr, step.latent_norm, step.index, step.total, length)
                for entropy in known
            ]
            with torch.no_grad():
                scores = iter(self.config.policy(torch.tensor(features)).tolist())
        accepted = (next(scores) if entropy is not None else 0.0 for entropy in entropies)
        return ["reuse" if score >= self.config.policy_threshold else "policy" for score in accepted]


def _missing(entry: CacheEntry | None) -> bool:
    return entry is None or entry.empty
