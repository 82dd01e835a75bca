"""The controller: slide 9's calls, and every decision with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dqar import stats
from dqar.cache import CacheEntry, QuantizedCache
from dqar.config import DQARConfig, check, check_choice
from dqar.plan import BRANCHES, ReusePlan
from dqar.policy import policy_features
from dqar.scheduler import eligible_layers
from dqar.trace import CROSS_ATTENTION, MODEL, SELF_ATTENTION, Trace


@dataclass(frozen=True)
class Decision:
    """Whether a site is reused, from which entry, and why or why not.

    ``reason`` is ``"reuse"``, or the first condition that failed: ``"warmup"``, ``"cooldown"``, ``"schedule"``,
    ``"no cache"``, ``"streak"``, then ``"policy"``, or ``"snr"`` and ``"entropy"``; with a plan ``"plan"`` or
    ``"no cache"``.
    ``"shared"``: the unconditional branch takes what the conditional one computes at this very step.
    """

    use_cache: bool
    entry: CacheEntry | None
    reason: str

    @property
    def shared(self) -> bool:
        """Whether the other branch's fresh result serves here."""
        return self.reason == "shared"


class DQARController:
    """Decides site by site, keeps the cache and the trace. Knows no model: ``dqar.attention`` connects it to one.

    Args:
        num_layers: attention layers of the model, numbered from 0.
        config: the deck's defaults if left out.
    """

    def __init__(self, num_layers: int, config: DQARConfig | None = None):
        check("num_layers", num_layers, isinstance(num_layers, int) and num_layers >= 1, "an int of 1 or more")
        self.num_layers = num_layers
        self.config = config or DQARConfig()
        plan = self.config.plan
        if isinstance(plan, ReusePlan) and plan.num_layers != num_layers:
            raise ValueError(f"the plan was made for {plan.num_layers} layers, this model has {num_layers}")
        self.cache = QuantizedCache(self.config)
        self.trace = Trace()
        self._run = -1
        self._total_steps = 0
        self.reset()

    def reset(self) -> None:
        """Forgets the cache and the position in the run; the next step begins a new one. The trace is kept."""
        self.cache.clear()
        self._step = None
        self._measured: dict[tuple[int, str], dict] = {}  # trace row of each site's last measured entropy
        self._share_streaks: dict[int, int] = {}

    def begin_step(
        self,
        step_index: int,
        total_steps: int,
        snr: torch.Tensor | float | None = None,
        prompt_length: int | None = None,
        *,
        snr_schedule: float | None = None,
        latent_norm: float | None = None,
        timestep: float | None = None,
    ) -> None:
        """Opens a denoising step. A step that doesn't follow the last one begins a new run with an empty cache.

        A step count that changes in mid-run empties the cache too: the schedule was another one.

        Args:
            step_index: from 0 to ``total_steps - 1``.
            total_steps: denoising steps of the run.
            snr: the latents' SNR, a number or one per sample (then their mean decides).
            prompt_length: words of the prompt; scales the entropy threshold by slide 5's τ(p). ``None``: unscaled.
            snr_schedule: the noise schedule's ᾱ/(1 − ᾱ); decides instead if ``snr_source="schedule"``.
            latent_norm: ‖x_t‖₂, a feature of the policy.
            timestep: for the trace.
        """
        if not 0 <= step_index < total_steps:
            raise ValueError(f"step_index={step_index} is not accepted: from 0 to total_steps - 1 = {total_steps - 1}")
        if isinstance(self.config.plan, ReusePlan):
            self.config.plan.check_run(total_steps)
        if self._step is None or step_index <= self._step:
            self._run += 1
            self.reset()
        elif total_steps != self._total_steps:
            self.reset()
        self.trace.resolve()
        self._step, self._total_steps = step_index, total_steps
        if isinstance(snr, torch.Tensor):
            snr = snr.float().mean().item()
        self._snr, self._snr_schedule = snr, snr_schedule
        self._gate_snr = snr_schedule if self.config.snr_source == "schedule" else snr
        self._prompt_length, self._latent_norm, self._timestep = prompt_length, latent_norm, timestep
        base = self.config.entropy_threshold
        self._threshold = base if prompt_length is None or base == math.inf else stats.tau(base, prompt_length)
        self._eligible = self._eligible_at(step_index)
        # With a forecast of order n, a result is still drawn on after n newer ones.
        coming = range(step_index + 1, step_index + 2 + self.config.forecast_order)
        self._eligible_next = frozenset().union(*map(self._eligible_at, coming))
        self._reasons: dict[tuple[int, str], str] = {}
        self._scores: dict[tuple[int, str], float] | None = None
        self._first_row = len(self.trace)

    def complete_step(self, snr: float) -> None:
        """Writes the SNR by the step's own prediction, known only after the model ran, to the step's trace rows."""
        for row in self.trace.rows[self._first_row :]:
            row["snr"] = snr

    def should_reuse(self, layer_id: int, branch: str = "cond") -> Decision:
        """Decides for one layer and branch of the open step.

        Raises:
            ValueError: for a layer or branch that doesn't exist.
            RuntimeError: before the first ``begin_step``.
        """
        self._check_site(layer_id, branch)
        entry = self.cache.get(layer_id, branch)
        reason = self._reason(layer_id, branch, entry)
        if reason != "reuse" and branch == "uncond" and self._may_share(layer_id):
            reason = "shared"
        self._reasons[layer_id, branch] = reason
        use_cache = reason == "reuse"
        return Decision(use_cache, entry if use_cache else None, reason)

    def wants_commit(self, layer_id: int) -> bool:
        """Whether what the layer computes now may be drawn on at a later step; if not, it needn't be cached."""
        return layer_id in self._eligible_next

    def wants_entropy(self, layer_id: int) -> bool:
        """Whether the layer's entropy is to be measured, if it is computed at the open step."""
        config = self.config
        due = self._step % config.entropy_interval == 0 or (layer_id, "cond") not in self._measured
        return config.measures_entropy and due

    def reuse(self, entry: CacheEntry) -> None:
        """Records that ``entry`` serves the open step."""
        entry.streak += 1
        self._add_row(entry.layer_id, entry.branch, "reuse", entry.nbytes, entry.row)

    def commit(
        self,
        layer_id: int,
        branch: str = "cond",
        attn_map: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        clean_latent: torch.Tensor | None = None,
        noisy_latent: torch.Tensor | None = None,
        *,
        entropy: torch.Tensor | float | None = None,
        output: torch.Tensor | None = None,
        key_partner: torch.Tensor | None = None,
        value_partner: torch.Tensor | None = None,
        feed_forward: torch.Tensor | None = None,
    ) -> None:
        """Records a computed site and caches it for the next steps.

        Args:
            layer_id, branch: the site.
            attn_map: attention map ``[B, H, Nq, Nk]``, for its entropy; or
            entropy: the entropy itself, in nats: ``[B, H]``, ``[H]`` or a number.
            keys, values: what ``reuse_target="kv"`` caches, ``[B, ..., channels]``.
            output: what ``reuse_target="output"`` caches, ``[B, ..., channels]``; ``"residual"`` the block's change;
                ``"block"`` the attention's and
            feed_forward: ``[B, ..., channels]``.
            key_partner, value_partner: for ``balance``: max |·| per channel of what keys and values are multiplied
                with, ``[B, 1, channels]`` or ``[channels]``.
            clean_latent, noisy_latent: x0 and x_t, ``[B, ...]``, for the trace's SNR.
        """
        self._check_site(layer_id, branch)
        per_head = None
        if attn_map is not None:
            per_head = stats.attention_entropy(attn_map, reduction="none").mean(0)
        elif entropy is not None:
            per_head = torch.as_tensor(entropy, dtype=torch.float32)
            per_head = per_head.mean(0) if per_head.ndim == 2 else per_head.reshape(-1)
        tokens = next((x.shape[-2] for x in (attn_map, keys, output) if x is not None and x.ndim > 1), None)
        row = self._add_computed(layer_id, branch, per_head, tokens)
        if clean_latent is not None and noisy_latent is not None:
            row["snr"] = stats.snr(clean_latent, noisy_latent).mean().item()
        entry = CacheEntry(layer_id, branch, row)
        self.cache.put(entry, keys, values, output, key_partner, value_partner, feed_forward)
        row["bytes"] = entry.nbytes

    def record(
        self, layer_id: int, branch: str, entropy: torch.Tensor | None = None, tokens: int | None = None
    ) -> None:
        """Records a computed site that no later step will reuse, so that nothing is cached; entropy ``[B, H]``."""
        self._add_computed(layer_id, branch, None if entropy is None else entropy.mean(0), tokens)

    def record_cross_attention(
        self, layer_id: int, branch: str, fresh: bool, nbytes: int, entropy: torch.Tensor | None, tokens: int
    ) -> None:
        """Records a cross-attention, whose K and V come from the caption alone; nothing is decided about it.

        Args:
            layer_id, branch: where.
            fresh: whether K and V were computed at this step, rather than kept from the run's first.
            nbytes: of the K and V kept.
            entropy: of its maps, ``[B, H]`` in nats, if measured.
            tokens: queries.
        """
        row = self._add_row(layer_id, branch, "compute" if fresh else "reuse", nbytes, module=CROSS_ATTENTION)
        row["entropy_per_head"], row["tokens"] = None if entropy is None else entropy.mean(0), tokens

    def record_output(self, branch: str, fresh: bool, nbytes: int) -> None:
        """Records whether a branch of the whole model was computed or forecast, and the bytes kept for it."""
        self._add_row(-1, branch, "compute" if fresh else "reuse", nbytes, module=MODEL)

    def _add_computed(self, layer_id: int, branch: str, per_head: torch.Tensor | None, tokens: int | None) -> dict:
        shared = self._reasons.get((layer_id, branch)) == "shared"
        row = self._add_row(layer_id, branch, "share" if shared else "compute", 0)
        row["entropy_per_head"], row["tokens"] = per_head, tokens
        if per_head is not None:
            self._measured[layer_id, branch] = row
        if branch == "uncond":
            self._share_streaks[layer_id] = self._share_streaks.get(layer_id, 0) + 1 if shared else 0
        return row

    def _check_site(self, layer_id: int, branch: str) -> None:
        if self._step is None:
            raise RuntimeError("no step is open: call begin_step first")
        check("layer_id", layer_id, 0 <= layer_id < self.num_layers, f"an int from 0 to {self.num_layers - 1}")
        check_choice("branch", branch, BRANCHES)

    def _eligible_at(self, step: int) -> range | frozenset[int]:
        if self.config.plan is not None:
            return getattr(self.config.plan, "layers_at", {}).get(step, frozenset())
        if not self.config.warmup <= step < self._total_steps - self.config.cooldown:
            return range(0)
        return eligible_layers(
            step, self._total_steps, self.num_layers, self.config.schedule, self.config.static_interval
        )

    def _reason(self, layer_id: int, branch: str, entry: CacheEntry | None) -> str:
        config = self.config
        if config.plan is not None:
            if (self._step, layer_id, branch) not in config.plan.sites:
                return "plan"
            return "no cache" if entry is None or entry.empty else "reuse"
        if self._step < config.warmup:
            return "warmup"
        if self._step >= self._total_steps - config.cooldown:
            return "cooldown"
        if layer_id not in self._eligible:
            return "schedule"
        if entry is None or entry.empty:
            return "no cache"
        if entry.streak >= config.max_reuse_streak:
            return "streak"
        if config.policy is not None:
            return "reuse" if self._policy_score(layer_id, branch) >= config.policy_threshold else "policy"
        low, high = config.snr_range
        if config.gates_on_snr and not (self._gate_snr is not None and low <= self._gate_snr <= high):
            return "snr"
        if config.gates_on_entropy:
            entropy = self._entropy(layer_id, branch)
            if config.entropy_unit == "normalized" and entropy is not None:
                entropy /= math.log(self._measured[layer_id, branch]["tokens"])
            if entropy is None or not entropy < self._threshold:
                return "entropy"
        return "reuse"

    def _may_share(self, layer_id: int) -> bool:
        config = self.config
        computed = self._reasons.get((layer_id, "cond"), "reuse") != "reuse"
        bounds = range(config.warmup, self._total_steps - config.cooldown)
        if not (config.share_below > 0 and computed and self._step in bounds):
            return False
        if self._share_streaks.get(layer_id, 0) >= config.max_reuse_streak:
            return False
        entropies = [self._entropy(layer_id, branch) for branch in BRANCHES]
        return None not in entropies and abs(entropies[0] - entropies[1]) < config.share_below

    def _entropy(self, layer_id: int, branch: str) -> float | None:
        """The site's last measured entropy, averaged over heads."""
        row = self._measured.get((layer_id, branch))
        if row is not None and isinstance(row["entropy_per_head"], torch.Tensor):
            self.trace.resolve()
        return None if row is None else row["entropy"]

    def _policy_score(self, layer_id: int, branch: str) -> float:
        # All sites of the step in one pass on the host: no layer waits for the device.
        if self._scores is None:
            known = {(e.layer_id, e.branch): self._entropy(e.layer_id, e.branch) for e in self.cache}
            known = {site: entropy for site, entropy in known.items() if entropy is not None}
            if None in (self._gate_snr, self._latent_norm):
                raise ValueError("the policy needs begin_step's snr and latent_norm from the second step on")
            features = [
                policy_features(
                    entropy,
                    self._gate_snr,
                    self._latent_norm,
                    self._step,
                    self._total_steps,
                    self._prompt_length or 1,
                )
                for entropy in known.values()
            ]
            with torch.no_grad():
                scores = self.config.policy(torch.tensor(features)).tolist()
            self._scores = dict(zip(known, scores, strict=True))
        return self._scores.get((layer_id, branch), 0.0)

    def _add_row(
        self,
        layer_id: int,
        branch: str,
        decision: str,
        nbytes: int,
        source: dict | None = None,
        module: str = SELF_ATTENTION,
    ) -> dict:
        source = source or {}
        reason = {CROSS_ATTENTION: "caption", MODEL: "plan"}.get(module)
        reason = reason or self._reasons.get((layer_id, branch), "not asked")
        return self.trace.add(
            run=self._run,
            step=self._step,
            total_steps=self._total_steps,
            timestep=self._timestep,
            module=module,
            layer=layer_id,
            branch=branch,
            decision=decision,
            reason=reason,
            entropy=source.get("entropy"),
            entropy_per_head=source.get("entropy_per_head"),
            age=self._step - source.get("step", self._step),
            threshold=self._threshold,
            snr=self._snr,
            snr_gate=self._gate_snr,
            snr_schedule=self._snr_schedule,
            latent_norm=self._latent_norm,
            tokens=source.get("tokens"),
            bytes=nbytes,
        )
