"""The configuration of the reuse engine: frozen, and validated once, when it is made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dqar.checks import check, check_choice, check_count, is_count, is_number
from dqar.plan import ReusePlan
from dqar.quantizer import QuantizeMode
from dqar.scheduler import ScheduleKind

ReuseTarget = Literal["kv", "output", "block", "residual"]
EntropyUnit = Literal["nats", "normalized"]
SNRSource = Literal["predicted", "schedule"]
WIDTHS = (16, 8, 4, 2)
"""Bits that a cached value can have."""


@dataclass(frozen=True)
class CacheFormat:
    """What the cache keeps beside the newest result of each site.

    Attributes:
        forecast_order: 0: a cached result serves as it is; 1 or 2: it is continued to the open step by the line or
            parabola through the last 2 or 3 computed ones (as in TaylorSeer, Liu et al. 2025; early in a run, through
            as many as there are). All of them are kept, in ``quantize_bits``. Not with ``reuse_target="kv"``.
        keep_channels: number of most salient channels of a cached tensor that stay in 16 bit (slide 15).
        fitted: quantize to levels of least squared error instead of slide 6's, with scale and offset in float16. In 2
            bits that keeps 4 levels instead of 3 (slide 16). Of K and V it is the error of their products, with the
            queries and with the map, that counts, unless they are balanced or keep channels. Storing takes 5 (one
            image) to 40 times as long (48 at once), of K and V twice that.
        layer_bits: bits of each layer in place of ``quantize_bits``, from the first layer on: 16, 8, 4 or 2 each.
        cross_attention: keep the caption's K and V for the whole run, where there is cross-attention: exact.
        modulations: reuse DiT's modulations in later runs of equal timesteps and labels (64 MB at most), and compute
            them once where blocks have equal weights. Exact.

    Raises:
        ValueError: names the field, the value and what is accepted.
    """

    forecast_order: int = 0
    keep_channels: int = 0
    fitted: bool = False
    layer_bits: tuple[int, ...] | None = None
    cross_attention: bool = True
    modulations: bool = True

    def __post_init__(self) -> None:
        order = self.forecast_order
        check("cache.forecast_order", order, is_count(order, 0) and order <= 2, "an int from 0 to 2")
        check_count("cache.keep_channels", self.keep_channels, 0)
        bits = self.layer_bits
        if bits is not None:
            each = isinstance(bits, (tuple, list)) and all(is_count(width) and width in WIDTHS for width in bits)
            check("cache.layer_bits", bits, each, "None or 16, 8, 4 or 2 for each layer")
            object.__setattr__(self, "layer_bits", tuple(bits))
        for flag in ("fitted", "cross_attention", "modulations"):
            check_choice(f"cache.{flag}", getattr(self, flag), (True, False))


@dataclass(frozen=True)
class Probe:
    """What is measured of attention and latents, and how.

    Attributes:
        entropy_unit: of ``entropy_threshold``: ``"nats"`` as in the deck, or ``"normalized"``: H / ln N, from 0 to 1.
        snr_source: of the SNR that decides: ``"predicted"``: against the scheduler's newest predicted x0;
            ``"schedule"``: ᾱ / (1 − ᾱ).
        interval: the entropy is measured at every n-th step; in between, the last one measured decides.
        queries: number of evenly spread queries that the entropy is estimated from; ``None``: all of them.
        record: measure the entropy for the trace, even where no decision needs it.

    Raises:
        ValueError: names the field, the value and what is accepted.
    """

    entropy_unit: EntropyUnit = "nats"
    snr_source: SNRSource = "predicted"
    interval: int = 1
    queries: int | None = None
    record: bool = False

    def __post_init__(self) -> None:
        check_choice("probe.entropy_unit", self.entropy_unit, get_args(EntropyUnit))
        check_choice("probe.snr_source", self.snr_source, get_args(SNRSource))
        check_count("probe.interval", self.interval, 1)
        queries = self.queries
        check("probe.queries", queries, queries is None or is_count(queries, 1), "None or an int of 1 or more")
        check_choice("probe.record", self.record, (True, False))


@dataclass(frozen=True)
class DQARConfig:
    """When a site may be reused, what is reused, and in how many bits it is kept. Defaults are the deck's.

    A *site* is what ``reuse_target`` names in one layer, at one step, in one branch of classifier-free guidance.

    Attributes:
        entropy_threshold: reuse needs ``H < τ(p)``, with this as base, in ``probe.entropy_unit`` (slide 5). ``None``
            leaves the entropy out of the decision; unless something else needs it, it isn't computed then.
        snr_range: reuse needs an SNR within, both ends included (slide 5). ``None`` leaves the SNR out.
        policy: a trained ``ReusePolicy`` that decides instead of entropy and SNR (slide 7); any function from
            features ``[N, 5]`` to ``p_reuse`` ``[N]`` will do.
        policy_threshold: the least ``p_reuse`` at which the policy reuses.
        plan: the sites to reuse, decided beforehand. Replaces schedule, streak limit and gate; no signal is measured.
        schedule: which layers may reuse at a step (slide 8); see ``dqar.scheduler``.
        static_interval: of the ``"static"`` schedule: every n-th step computes, the others may reuse, so far as
            ``max_reuse_streak`` lets them.
        max_reuse_streak: steps in a row that one cached result may serve before it is computed afresh.
        warmup: number of first steps that always compute.
        cooldown: number of last steps that always compute.
        share_below: where the branches' last entropies differ by less (nats), the unconditional branch takes what the
            conditional one computes (slide 15); 0 never shares.
        reuse_target: ``"kv"``: fresh Q on cached K and V (slide 9); ``"output"``: the attention layer's cached output;
            ``"block"``: that and the feed-forward's, by one decision. Their adaLN gates, and PixArt's cross-attention,
            stay fresh. ``"residual"``: all that the block adds to its input, gates and cross-attention included.
            Joint attention (SD3, Flux) takes the first two, of image and caption.
        quantize_bits: 8, 4 or 2; 16 keeps the model's own dtype. ``cache.layer_bits`` may give each layer its own.
        quantize_mode: what shares one scale (slide 6): the sample's whole tensor, a channel, or a token.
        mixed_precision: K in 16 bit, V quantized (slide 6), where a layer is; only with ``reuse_target="kv"``.
        balance: channel-wise salience balancing of K and V before they are quantized (slide 15); ``"kv"`` only.
        cache: what else is kept.
        probe: what is measured, and how.

    Raises:
        ValueError: names the field, the value and what is accepted.
    """

    entropy_threshold: float | None = 2.0
    snr_range: tuple[float, float] | None = (0.5, 50.0)
    quantize_bits: int = 8
    quantize_mode: QuantizeMode = "per_channel"
    mixed_precision: bool = False
    balance: bool = False
    reuse_target: ReuseTarget = "kv"
    schedule: ScheduleKind = "depth_aware"
    static_interval: int = 2
    max_reuse_streak: int = 3
    warmup: int = 0
    cooldown: int = 0
    share_below: float = 0.0
    policy: Callable[[torch.Tensor], torch.Tensor] | None = None
    policy_threshold: float = 0.5
    plan: ReusePlan | None = None
    cache: CacheFormat = CacheFormat()
    probe: Probe = Probe()

    def __post_init__(self) -> None:
        threshold, bounds = self.entropy_threshold, self.snr_range
        asked = threshold is None or is_number(threshold)
        check("entropy_threshold", threshold, asked, "None or a number of 0 or more")
        if bounds is not None:
            pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(map(is_number, bounds))
            check("snr_range", bounds, pair and bounds[0] <= bounds[1], "None or two numbers, 0 <= low <= high")
            object.__setattr__(self, "snr_range", tuple(bounds))
        check_choice("quantize_bits", self.quantize_bits, WIDTHS)
        check_choice("quantize_mode", self.quantize_mode, get_args(QuantizeMode))
        check_choice("reuse_target", self.reuse_target, get_args(ReuseTarget))
        check_choice("schedule", self.schedule, get_args(ScheduleKind))
        check_count("static_interval", self.static_interval, 2)
        check_count("max_reuse_streak", self.max_reuse_streak, 1)
        check_count("warmup", self.warmup, 0)
        check_count("cooldown", self.cooldown, 0)
        check("share_below", self.share_below, is_number(self.share_below), "a number of 0 or more")
        check("policy", self.policy, self.policy is None or callable(self.policy), "None or a ReusePolicy")
        least = self.policy_threshold
        check("policy_threshold", least, is_number(least) and least <= 1, "a number from 0 to 1")
        planned = self.plan is None or isinstance(self.plan, ReusePlan)
        check("plan", self.plan, planned, "None or a ReusePlan; apply_dqar(pipe, plan) takes a ForecastPlan")
        for name, group in (("cache", CacheFormat), ("probe", Probe)):
            check(name, getattr(self, name), isinstance(getattr(self, name), group), f"a {group.__name__}")
        quantizes = min(self.cache.layer_bits or (self.quantize_bits,)) < 16
        bits = "only with quantize_bits 8, 4 or 2, or such cache.layer_bits"
        for flag in ("mixed_precision", "balance"):
            check_choice(flag, getattr(self, flag), (True, False))
            if getattr(self, flag):
                check(flag, True, self.reuse_target == "kv", "only with reuse_target='kv'")
                check(flag, True, quantizes, bits)
        order, kept = self.cache.forecast_order, self.cache.keep_channels
        others = "only with reuse_target 'output', 'block' or 'residual'"
        check("cache.forecast_order", order, order == 0 or self.reuse_target != "kv", others)
        check("cache.keep_channels", kept, kept == 0 or quantizes, bits)
        check("cache.fitted", self.cache.fitted, not self.cache.fitted or quantizes, bits)

    def bits_of(self, layer_id: int) -> int:
        """Bits of a layer's cached values."""
        return self.quantize_bits if self.cache.layer_bits is None else self.cache.layer_bits[layer_id]

    @property
    def mean_bits(self) -> float:
        """Bits of a cached value, mean of the layers."""
        return statistics.mean(self.cache.layer_bits or (self.quantize_bits,))

    @property
    def spares_products(self) -> bool:
        """Whether K's and V's levels are those that keep their products with queries and map."""
        return self.cache.fitted and not self.balance and not self.cache.keep_channels

    @property
    def gates(self) -> bool:
        """Whether signals decide anything: not with a plan, nor where the schedule lets nothing reuse."""
        return self.plan is None and self.schedule != "none"

    @property
    def gates_on_entropy(self) -> bool:
        """Whether a decision needs the attention entropy."""
        asked = self.policy is not None or self.entropy_threshold not in (None, math.inf)
        return self.share_below > 0 or (self.gates and asked)

    @property
    def gates_on_snr(self) -> bool:
        """Whether a decision needs the SNR."""
        return self.gates and (self.policy is not None or self.snr_range not in (None, (0, math.inf)))

    @property
    def measures_entropy(self) -> bool:
        """Whether the entropy is computed at all."""
        return self.probe.record or self.gates_on_entropy

    @property
    def measures_latents(self) -> bool:
        """Whether the trace records each step's predicted SNR; a plan needs none."""
        return self.plan is None or self.measures_entropy

    @property
    def asks_latents(self) -> bool:
        """Whether norm and SNR of the latents must be known when a step begins: to the gate, or for the trace."""
        return self.gates_on_snr or self.measures_entropy
