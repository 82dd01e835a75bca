"""What decides: for each step one row of reasons a branch, filled when the step begins; a site only looks it up.

A new gate is one class with ``row``. A reason is ``"reuse"``, or the first condition that failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dqar.cache import QuantizedCache
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
        entropies: of each site, when it was last measured.
    """

    index: int
    total: int
    eligible: Collection[int]
    snr: float | None
    latent_norm: float | None
    prompt_length: int | float | None
    threshold: float
    cache: QuantizedCache
    entropies: Mapping[tuple[int, str], Entropies]

    def entropy(self, layer_id: int, branch: str) -> float | None:
        """The site's last measured entropy in nats, averaged over heads and images."""
        entropies = self.entropies.get((layer_id, branch))
        return None if entropies is None else entropies.mean.get(branch)


class Gate(Protocol):
    """Decides for all layers of a step at once."""

    def row(self, step: Step, branch: str) -> Sequence[str]:
        """The reason of each layer, from 0 up, in one branch."""


def make_gate(config: DQARConfig, num_layers: int) -> Gate:
    """The gate that the configuration asks for."""
    if config.plan is not None:
        return PlanGate(config.plan, num_layers)
    if config.policy is not None:
        return PolicyGate(config, config.policy, num_layers)
    return RuleGate(config, num_layers)


class PlanGate:
    """A ``ReusePlan``'s decisions; ``"no cache"`` where it reuses what isn't there, as in a run that began late."""

    def __init__(self, plan: ReusePlan, num_layers: int):
        self.plan, self.num_layers = plan, num_layers

    def row(self, step: Step, branch: str) -> Sequence[str]:
        """See ``Gate``."""
        reasons = ["plan"] * self.num_layers
        for layer_id in step.eligible:
            if (step.index, layer_id, branch) in self.plan.sites:
                entry = step.cache.get(layer_id, branch)
                reasons[layer_id] = "no cache" if entry is None or entry.empty else "reuse"
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
            if entry is None or entry.empty:
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
        if config.gates_on_snr and config.snr_range is not None:
            low, high = config.snr_range
            if step.snr is None or not low <= step.snr <= high:
                return ["snr"] * len(layers)
        if step.threshold == math.inf:
            return ["reuse"] * len(layers)
        return ["reuse" if self._is_low(step, layer_id, branch) else "entropy" for layer_id in layers]

    def _is_low(self, step: Step, layer_id: int, branch: str) -> bool:
        entropies = step.entropies.get((layer_id, branch))
        if entropies is None or branch not in entropies.mean:
            return False
        entropy = entropies.mean[branch]
        if self.config.probe.entropy_unit == "normalized":
            # Without the number of keys, as where slide 9's calls were given an entropy alone, nothing can be said.
            return entropies.tokens is not None and entropy < step.threshold * math.log(entropies.tokens)
        return entropy < step.threshold


class PolicyGate(RuleGate):
    """Slide 7's: schedule and streak as in the rule, then a trained policy."""

    def __init__(self, config: DQARConfig, policy: Callable[[torch.Tensor], torch.Tensor], num_layers: int):
        super().__init__(config, num_layers)
        self.policy = policy

    def decide(self, step: Step, branch: str, layers: Sequence[int]) -> Iterable[str]:
        """All layers in one pass on the host, so that no site waits for the device.

        Raises:
            ValueError: a step whose SNR or norm isn't known.
        """
        measured = {layer_id: step.entropy(layer_id, branch) for layer_id in layers}
        entropies = {layer_id: entropy for layer_id, entropy in measured.items() if entropy is not None}
        scores = dict(zip(entropies, self._scores(step, list(entropies.values())), strict=True))
        least = self.config.policy_threshold
        return ["reuse" if scores.get(layer_id, 0.0) >= least else "policy" for layer_id in layers]

    def _scores(self, step: Step, entropies: list[float]) -> list[float]:
        if not entropies:
            return []
        if step.snr is None or step.latent_norm is None:
            raise ValueError("the policy needs begin_step's snr and latent_norm from the second step on")
        place = step.snr, step.latent_norm, step.index, step.total, step.prompt_length or 1
        with torch.no_grad():
            return self.policy(torch.tensor([policy_features(entropy, *place) for entropy in entropies])).tolist()
