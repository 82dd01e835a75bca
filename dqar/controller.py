"""The controller: slide 9's calls, and every decision with its reason."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from dqar import stats
from dqar.cache import CacheEntry, Name, QuantizedCache, Tensors
from dqar.checks import check, check_choice, check_count
from dqar.config import DQARConfig
from dqar.gate import Step, make_gate
from dqar.plan import BRANCHES
from dqar.scheduler import eligible_layers
from dqar.trace import CROSS_ATTENTION, SELF_ATTENTION, Entropies, Rows, StepFacts, Trace

T = TypeVar("T")


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


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer's branches in one forward pass; what is shared is what the conditional one computes."""

    fresh: tuple[str, ...]
    cached: tuple[str, ...]
    shared: tuple[str, ...]

    @functools.cached_property
    def all_fresh(self) -> bool:
        """Whether every branch computes."""
        return not (self.cached or self.shared)

    def parts(self, fresh: Callable[[str], T], cached: Callable[[str], T]) -> dict[str, T]:
        """The result of each branch, from functions that compute it and take it from the cache."""
        parts = {branch: cached(branch) for branch in self.cached}
        parts |= {branch: fresh(branch) for branch in self.fresh}
        return parts | {branch: parts["cond"] for branch in self.shared}


class DQARController:
    """Decides site by site, keeps the cache and the trace. Knows no model: ``dqar.reuse`` connects it to one.

    Args:
        num_layers: attention layers of the model, numbered from 0.
        config: the deck's defaults if left out.
        trace: to write to, if it is shared with others.

    Raises:
        ValueError: ``num_layers`` below 1, or a plan or ``layer_bits`` for another number.
    """

    def __init__(self, num_layers: int, config: DQARConfig | None = None, trace: Trace | None = None):
        check_count("num_layers", num_layers, 1)
        self.num_layers = num_layers
        self.config = config or DQARConfig()
        if self.config.plan is not None:
            self.config.plan.check_layers(num_layers)
        bits = self.config.cache.layer_bits
        right = bits is None or len(bits) == num_layers
        check("cache.layer_bits", bits, right, f"the model has {num_layers} layers, these are {len(bits or ())}")
        self.cache = QuantizedCache(self.config)
        self.trace = Trace() if trace is None else trace
        self._gate = make_gate(self.config, num_layers)
        self._run = -1
        self.reset()

    def reset(self) -> None:
        """Forgets the cache and the position in the run; the next step begins a new one. The trace is kept."""
        self.cache.clear()
        self._open_step: Step | None = None
        self._measured: dict[tuple[int, str], Entropies] = {}
        self._tokens: dict[int, int] = {}
        self._share_streaks: dict[int, int] = {}

    def begin_step(
        self,
        step_index: int,
        total_steps: int,
        snr: torch.Tensor | float | None = None,
        prompt_length: float | None = None,
        *,
        snr_schedule: float | None = None,
        latent_norm: torch.Tensor | float | None = None,
        timestep: float | None = None,
        run: int | None = None,
        latent_size: str | None = None,
    ) -> None:
        """Opens a denoising step. A step that doesn't follow the last one begins a new run with an empty cache.

        A step count that changes in mid-run empties the cache too: the schedule was another one.

        Args:
            step_index: from 0 to ``total_steps - 1``.
            total_steps: denoising steps of the run.
            snr: the latents' SNR, a number or ``[B]`` (then their mean decides).
            prompt_length: words of the prompt; scales the entropy threshold by slide 5's τ(p). ``None``: unscaled.
            snr_schedule: the noise schedule's ᾱ/(1 − ᾱ); decides instead with ``probe.snr_source="schedule"``.
            latent_norm: ‖x_t‖₂, a scalar; a feature of the policy.
            timestep: for the trace.
            run: number of the run, where several share a trace.
            latent_size: height and width, as in ``"32 x 32"``, for the trace.

        Raises:
            ValueError: a step outside the run, or a run that the plan wasn't made for.
        """
        last = total_steps - 1
        check("step_index", step_index, 0 <= step_index <= last, f"from 0 to total_steps - 1 = {last}")
        config, before = self.config, self._open_step
        if config.plan is not None:
            config.plan.check_run(total_steps)
        if before is None or step_index <= before.index:
            self._run = self.trace.begin_run() if run is None else run
            self.reset()
        elif total_steps != before.total:
            self.reset()
        if config.gates_on_entropy:
            self.trace.resolve()
        if isinstance(snr, torch.Tensor) and config.gates_on_snr and config.probe.snr_source == "predicted":
            snr = snr.float().mean().item()
        if isinstance(latent_norm, torch.Tensor) and config.policy is not None:
            latent_norm = latent_norm.item()
        gate_snr = snr_schedule if config.probe.snr_source == "schedule" else snr
        threshold = math.inf if config.entropy_threshold is None else config.entropy_threshold
        if prompt_length is not None and threshold < math.inf:
            threshold = stats.tau(threshold, prompt_length)
        self._open_step = Step(
            step_index,
            total_steps,
            self._eligible_at(step_index, total_steps),
            _on_host(gate_snr),
            _on_host(latent_norm),
            prompt_length,
            threshold,
            self.cache,
            self._measured,
        )
        # With a forecast of order n, a result is still drawn on after n newer ones.
        coming = range(step_index + 1, step_index + 2 + config.cache.forecast_order)
        self._eligible_next: frozenset[int] = frozenset().union(*(self._eligible_at(s, total_steps) for s in coming))
        self._measures = config.measures_entropy
        self._looks = self._measures and step_index % config.probe.interval == 0
        self._table: dict[str, Sequence[str]] = {}
        self._rows: dict[str, Rows] = {}
        signals = (threshold, snr, gate_snr, snr_schedule, latent_norm, latent_size)
        self._facts = StepFacts(self._run, step_index, total_steps, timestep, *signals)

    def complete_step(self, snr: torch.Tensor | float) -> None:
        """Fills in the current step's predicted SNR, a scalar, known only after its model call."""
        self._facts.snr = snr

    # --- slide 9's calls ---------------------------------------------------------------------------------------------

    def should_reuse(self, layer_id: int, branch: str = "cond") -> Decision:
        """Decides for one layer and branch of the open step.

        Raises:
            ValueError: for a layer or branch that doesn't exist.
            RuntimeError: before the first ``begin_step``.
        """
        self._check_site(layer_id, branch)
        reason = self._reasons(branch, share="cond" in self._table)[layer_id]
        use_cache = reason == "reuse"
        return Decision(use_cache, self.cache.get(layer_id, branch) if use_cache else None, reason)

    def reuse(self, entry: CacheEntry) -> None:
        """Records that ``entry`` serves the open step."""
        entry.streak += 1
        age = self._step.index - entry.step
        self._open(SELF_ATTENTION).add(
            entry.layer_id, entry.branch, "reuse", "reuse", entry.nbytes, age, entry.entropies
        )

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
                with, ``[B, 1, channels]`` or ``[channels]``; else, for fitted levels, ``quantize``'s ``factor``.
            clean_latent, noisy_latent: x0 and x_t, ``[B, ...]``, for the trace's SNR.

        Raises:
            ValueError: a layer or branch that doesn't exist, NaN or inf in what is cached.
            RuntimeError: before the first ``begin_step``.
        """
        self._check_site(layer_id, branch)
        if attn_map is not None:
            entropy = stats.attention_entropy(attn_map, reduction="none")
        elif entropy is not None:
            entropy = torch.as_tensor(entropy, dtype=torch.float32)
            entropy = entropy if entropy.ndim == 2 else entropy.reshape(1, -1)
        if clean_latent is not None and noisy_latent is not None:
            self.complete_step(stats.snr(clean_latent, noisy_latent).mean())
        tokens = next((x.shape[-2] for x in (attn_map, keys, output) if x is not None and x.ndim > 1), None)
        names: tuple[Name, ...] = ("k", "v", "output", "feed_forward")
        tensors, partners = (
            {name: x for name, x in zip(names, given, strict=False) if x is not None}
            for given in ((keys, values, output, feed_forward), (key_partner, value_partner))
        )
        self.keep(layer_id, {branch: slice(None)}, entropy, tokens, tensors, partners, by_hand=True)

    # --- the same for all branches of a layer ------------------------------------------------------------------------

    def choices(self, branches: Sequence[str]) -> list[Choice]:
        """Compute, reuse or share: one ``Choice`` per layer for a forward pass of these branches."""
        table = {b: self._reasons(b, share="cond" in branches) for b in BRANCHES if b in branches}  # cond decides first
        made: dict[tuple[str, ...], Choice] = {}
        choices = []
        for layer_id in range(self.num_layers):
            reasons = tuple(table[branch][layer_id] for branch in branches)
            if reasons not in made:
                pairs = tuple(zip(branches, reasons, strict=True))
                made[reasons] = Choice(
                    tuple(b for b, reason in pairs if reason not in ("reuse", "shared")),
                    tuple(b for b, reason in pairs if reason == "reuse"),
                    tuple(b for b, reason in pairs if reason == "shared"),
                )
            choices.append(made[reasons])
        return choices

    def record_idle(self, branches: Sequence[str]) -> bool:
        """Records all sites of a step at which every layer is computed, and nothing kept or measured; else ``False``.

        Sites then skip all lookups.
        """
        if self._eligible_next or self._looks or self.config.share_below > 0:
            return False
        table = [self._reasons(branch, share=False) for branch in branches]
        if any("reuse" in reasons for reasons in table) or any(map(self.wants_entropy, range(self.num_layers))):
            return False
        layers = [layer_id for layer_id in range(self.num_layers) for _ in branches]
        reasons = [reason for together in zip(*table, strict=True) for reason in together]
        self._open(SELF_ATTENTION).add_computed(layers, tuple(branches) * self.num_layers, reasons)
        return True

    def wants_commit(self, layer_id: int) -> bool:
        """Whether what the layer computes now may be drawn on at a later step; if not, it needn't be cached."""
        return layer_id in self._eligible_next

    def wants_entropy(self, layer_id: int) -> bool:
        """Whether the layer's entropy is to be measured, if it is computed at the open step."""
        if self._looks or not self._measures:
            return self._looks
        return not any((layer_id, branch) in self._measured for branch in BRANCHES)

    def keep(
        self,
        layer_id: int,
        rows: dict[str, slice],
        entropy: torch.Tensor | None,
        tokens: int | None,
        tensors: Tensors,
        partners: Tensors | None = None,
        by_hand: bool = False,
    ) -> None:
        """``commit`` for several branches, whose ``rows`` of ``entropy`` and of the tensors these are.

        Only what may be drawn on later is cached, and NaN and inf are left to whoever looks at the model's output:
        both unless it is done ``by_hand``, as by slide 9's calls.

        ``entropy`` is ``[B, H]``, or ``stats.entropy_by_modality``'s ``[B, 3, H]``; tensors are ``[B, N, C]``.
        """
        entropies = self._entropies(layer_id, rows, entropy, tokens)
        sizes = dict.fromkeys(rows, 0)
        if by_hand or self.wants_commit(layer_id):
            entries = self.cache.put(layer_id, rows, self._step.index, tensors, partners, entropies, by_hand)
            sizes = {entry.branch: entry.nbytes for entry in entries}
        for branch, nbytes in sizes.items():
            self._add_computed(layer_id, branch, nbytes, entropies)

    def record_cross_attention(
        self,
        layer_id: int,
        rows: dict[str, slice],
        fresh: bool,
        nbytes: int,
        entropy: torch.Tensor | None,
        tokens: int,
    ) -> None:
        """Records a cross-attention, whose K and V come from the caption alone; nothing is decided about it.

        Args:
            layer_id, rows: where: the branches, with their rows.
            fresh: whether K and V were computed at this step, rather than kept from the run's first.
            nbytes: of the K and V kept for each branch.
            entropy: of its maps, ``[B, H]`` in nats, if measured.
            tokens: queries.
        """
        entropies = None if entropy is None else self.trace.measured(entropy, rows, tokens)
        table = self._open(CROSS_ATTENTION)
        table.tokens[layer_id] = tokens
        for branch in rows:
            table.add(layer_id, branch, "compute" if fresh else "reuse", "caption", nbytes, 0, entropies)

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _step(self) -> Step:
        if self._open_step is None:
            raise RuntimeError("no step is open: call begin_step first")
        return self._open_step

    def _open(self, module: str) -> Rows:
        rows = self._rows.get(module)
        if rows is None:
            rows = self._rows[module] = self.trace.open(module, self._facts)
            if module == SELF_ATTENTION:
                rows.tokens = self._tokens
        return rows

    def _entropies(
        self, layer_id: int, rows: dict[str, slice], entropy: torch.Tensor | None, tokens: int | None
    ) -> Entropies | None:
        if tokens is not None:
            self._tokens[layer_id] = tokens
        if entropy is None:
            return None
        entropies = self.trace.measured(entropy, rows, tokens)
        self._measured.update(((layer_id, branch), entropies) for branch in rows)
        return entropies

    def _add_computed(self, layer_id: int, branch: str, nbytes: int, entropies: Entropies | None) -> None:
        reasons = self._table.get(branch)
        reason = "not asked" if reasons is None else reasons[layer_id]
        shared = reason == "shared"
        decision = "share" if shared else "compute"
        self._open(SELF_ATTENTION).add(layer_id, branch, decision, reason, nbytes, 0, entropies)
        if branch == "uncond":
            self._share_streaks[layer_id] = self._share_streaks.get(layer_id, 0) + 1 if shared else 0

    def _check_site(self, layer_id: int, branch: str) -> None:
        """Raises ``RuntimeError`` where no step is open, ``ValueError`` for a site that doesn't exist."""
        _ = self._step
        check("layer_id", layer_id, 0 <= layer_id < self.num_layers, f"an int from 0 to {self.num_layers - 1}")
        check_choice("branch", branch, BRANCHES)

    def _eligible_at(self, step: int, total_steps: int) -> range | frozenset[int]:
        config = self.config
        if config.plan is not None:
            return config.plan.layers_at.get(step, frozenset())
        if not config.warmup <= step < total_steps - config.cooldown:
            return range(0)
        return eligible_layers(step, total_steps, self.num_layers, config.schedule, config.static_interval)

    def _reasons(self, branch: str, share: bool) -> Sequence[str]:
        """The open step's row of a branch; ``share``: the other branch is there to be shared."""
        row = self._table.get(branch)
        if row is None:
            row = self._gate.row(self._step, branch)
            if share and branch == "uncond" and self.config.share_below > 0:
                cond = self._table["cond"]
                shares = [
                    reason != "reuse" and other != "reuse" and self._may_share(layer_id)
                    for layer_id, (reason, other) in enumerate(zip(row, cond, strict=True))
                ]
                row = ["shared" if shared else reason for shared, reason in zip(shares, row, strict=True)]
            self._table[branch] = row
        return row

    def _may_share(self, layer_id: int) -> bool:
        config, step = self.config, self._step
        if not config.warmup <= step.index < step.total - config.cooldown:
            return False
        if self._share_streaks.get(layer_id, 0) >= config.max_reuse_streak:
            return False
        cond, uncond = (step.entropy(layer_id, branch) for branch in BRANCHES)
        return cond is not None and uncond is not None and abs(cond - uncond) < config.share_below


def _on_host(value: torch.Tensor | float | None) -> float | None:
    """The number, unless it is still on the device: then nobody needs it for a decision."""
    return None if isinstance(value, torch.Tensor) else value
