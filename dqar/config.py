"""The configuration of a DQAR run: frozen, and validated once, when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from dqar.forecast.plan import ForecastPlan
from dqar.plan import ReusePlan
from dqar.quantizer import QuantizeMode
from dqar.scheduler import ScheduleKind

if TYPE_CHECKING:
    from dqar.policy import ReusePolicy

ReuseTarget = Literal["kv", "output", "block", "residual"]
EntropyUnit = Literal["nats", "normalized"]
SNRSource = Literal["predicted", "schedule"]


def check(field: str, value: Any, ok: bool, accepted: str) -> None:
    """Raises the project's one kind of ``ValueError``: field, value, what is accepted."""
    if not ok:
        raise ValueError(f"{field}={value!r} is not accepted: {accepted}")


def check_choice(field: str, value: Any, choices: tuple) -> None:
    """``check`` for a value out of a short list."""
    check(field, value, value in choices, f"choose one of {', '.join(map(repr, choices))}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class DQARConfig:
    """When a site may be reused, what is reused, and in how many bits it is kept. Defaults are the deck's.

    A *site* is one attention layer, with ``reuse_target="block"`` and its block's feed-forward, with ``"residual"`` the
    whole block, at one step in one CFG branch.

    Attributes:
        entropy_threshold: reuse needs ``H < τ(p)``, with this as base; in ``entropy_unit`` (slide 5). ``inf`` leaves
            the entropy out of the decision, and then it is not computed either.
        snr_range: reuse needs ``SNR`` within, both ends included (slide 5). ``(0, inf)`` leaves it out.
        quantize_bits: 8, 4 or 2, or 16 for no quantization: the cache keeps the model's own dtype.
        quantize_mode: what shares one scale (slide 6): the sample's whole tensor, a channel, or a token.
        mixed_precision: K in 16 bit, V quantized (slide 6); only with ``reuse_target="kv"``.
        reuse_target: ``"kv"``: fresh Q on cached K and V (slide 9); ``"output"``: the attention layer's cached output;
            ``"block"``: that and the feed-forward's, by one decision. Their adaLN gates, and PixArt's cross-attention,
            stay fresh. ``"residual"``: all that the block adds to its input, gates and cross-attention included.
        forecast_order: 0: a cached result serves as it is; 1 or 2: it is continued to the open step by the line or
            parabola through the last 2 or 3 computed ones (as TaylorSeer does; at a run's start, through as many as
            there are). All of them are kept in the cache, in ``quantize_bits``. Not with ``"kv"``.
        schedule: which layers may reuse at a step (slide 8); see ``dqar.scheduler``.
        static_interval: n of the ``"static"`` schedule: every n-th step computes, the others may reuse.
        max_reuse_streak: steps in a row that one cached result may serve, before it is computed afresh.
        warmup: first steps that always compute.
        cooldown: last steps that always compute.
        policy: a trained ``ReusePolicy`` that decides instead of the entropy and SNR rule (slide 7).
        policy_threshold: the least ``p_reuse`` that the policy reuses at.
        plan: which sites to reuse, decided beforehand: neither schedule, streak nor gate is asked, nothing is measured.
            A ``ForecastPlan`` is about the whole model's output; attention and what is said of it here aren't touched.
        entropy_unit: ``"nats"`` as in the deck, or ``"normalized"``: H / ln N, between 0 and 1.
        snr_source: ``"predicted"``: against the scheduler's newest predicted x0; ``"schedule"``: ᾱ / (1 − ᾱ).
        balance: channel-wise salience balancing of cached K and V before they are quantized (slide 15); ``"kv"`` only.
        keep_channels: so many most salient channels of a cached tensor stay in 16 bit (slide 15).
        share_below: where the branches' last entropies differ by less (nats), the unconditional branch takes what the
            conditional one computes (slide 15); 0 never shares.
        entropy_interval: measure the entropy at every n-th step only; in between the last one known decides.
        entropy_queries: estimate the entropy from so many evenly spread queries; ``None`` takes all of them.
        record_entropy: measure it for the trace even where the decision doesn't need it.
        cache_cross_attention: keep the caption's K and V, where there is cross-attention, for the whole run: exact.
        keep_modulations: keep what DiT's blocks make of timestep and labels for the next run of the same, in 64 MB at
            most, and compute it once where blocks have equal weights: exact.

    Raises:
        ValueError: names the field, the value and what is accepted.
    """

    entropy_threshold: float = 2.0
    snr_range: tuple[float, float] = (0.5, 50.0)
    quantize_bits: int = 8
    quantize_mode: QuantizeMode = "per_channel"
    mixed_precision: bool = False
    reuse_target: ReuseTarget = "kv"
    forecast_order: int = 0
    schedule: ScheduleKind = "depth_aware"
    static_interval: int = 2
    max_reuse_streak: int = 3
    warmup: int = 0
    cooldown: int = 0
    policy: ReusePolicy | None = None
    policy_threshold: float = 0.5
    plan: ReusePlan | ForecastPlan | None = None
    balance: bool = False
    keep_channels: int = 0
    share_below: float = 0.0
    entropy_unit: EntropyUnit = "nats"
    snr_source: SNRSource = "predicted"
    entropy_interval: int = 1
    entropy_queries: int | None = None
    record_entropy: bool = False
    cache_cross_attention: bool = True
    keep_modulations: bool = True

    def __post_init__(self):
        threshold = self.entropy_threshold
        check("entropy_threshold", threshold, _is_number(threshold) and threshold >= 0, "a number from 0 to inf")
        bounds = self.snr_range
        ordered = (
            isinstance(bounds, (tuple, list))
            and len(bounds) == 2
            and all(map(_is_number, bounds))
            and 0 <= bounds[0] <= bounds[1]
        )
        check("snr_range", bounds, ordered, "two numbers, 0 <= low <= high")
        object.__setattr__(self, "snr_range", tuple(bounds))
        check_choice("quantize_bits", self.quantize_bits, (16, 8, 4, 2))
        check_choice("quantize_mode", self.quantize_mode, get_args(QuantizeMode))
        check_choice("reuse_target", self.reuse_target, get_args(ReuseTarget))
        check_choice("schedule", self.schedule, get_args(ScheduleKind))
        check_choice("entropy_unit", self.entropy_unit, get_args(EntropyUnit))
        check_choice("snr_source", self.snr_source, get_args(SNRSource))
        for flag in ("mixed_precision", "record_entropy", "balance", "cache_cross_attention", "keep_modulations"):
            check_choice(flag, getattr(self, flag), (True, False))
        if self.mixed_precision:
            check("mixed_precision", True, self.reuse_target == "kv", "only with reuse_target='kv'")
            check("mixed_precision", True, self.quantize_bits < 16, "only with quantize_bits 8, 4 or 2")
        if self.balance:
            check("balance", True, self.reuse_target == "kv", "only with reuse_target='kv'")
            check("balance", True, self.quantize_bits < 16, "only with quantize_bits 8, 4 or 2")
        order = self.forecast_order
        check("forecast_order", order, _is_count(order, 0) and order <= 2, "an int from 0 to 2")
        check(
            "forecast_order",
            order,
            order == 0 or self.reuse_target != "kv",
            "only with reuse_target 'output', 'block' or 'residual'",
        )
        kept = self.keep_channels
        check("keep_channels", kept, _is_count(kept, 0), "an int of 0 or more")
        check("keep_channels", kept, kept == 0 or self.quantize_bits < 16, "only with quantize_bits 8, 4 or 2")
        share, threshold = self.share_below, self.policy_threshold
        check("share_below", share, _is_number(share) and share >= 0, "a number from 0 to inf")
        check("policy_threshold", threshold, _is_number(threshold) and 0 <= threshold <= 1, "a number from 0 to 1")
        check("entropy_interval", self.entropy_interval, _is_count(self.entropy_interval, 1), "an int of 1 or more")
        check("static_interval", self.static_interval, _is_count(self.static_interval, 2), "an int of 2 or more")
        check("max_reuse_streak", self.max_reuse_streak, _is_count(self.max_reuse_streak, 1), "an int of 1 or more")
        check("warmup", self.warmup, _is_count(self.warmup, 0), "an int of 0 or more")
        check("cooldown", self.cooldown, _is_count(self.cooldown, 0), "an int of 0 or more")
        queries = self.entropy_queries
        check("entropy_queries", queries, queries is None or _is_count(queries, 1), "None or an int of 1 or more")
        check("policy", self.policy, self.policy is None or callable(self.policy), "None or a ReusePolicy")
        planned = self.plan is None or isinstance(self.plan, (ReusePlan, ForecastPlan))
        check("plan", self.plan, planned, "None, a ReusePlan or a ForecastPlan")

    @property
    def gates_on_entropy(self) -> bool:
        """Whether a decision needs the attention entropy."""
        gate = self.plan is None and (self.policy is not None or self.entropy_threshold < math.inf)
        return self.share_below > 0 or (gate and self.schedule != "none")

    @property
    def gates_on_snr(self) -> bool:
        """Whether a decision needs the SNR."""
        if self.plan is not None or self.schedule == "none":
            return False
        return self.policy is not None or self.snr_range != (0, math.inf)

    @property
    def measures_entropy(self) -> bool:
        """Whether entropy is computed at all."""
        return self.record_entropy or self.gates_on_entropy

    @property
    def measures_latents(self) -> bool:
        """Whether the SNR by each step's own prediction is traced; a plan needs none, nor that a step waits for it."""
        return self.plan is None or self.measures_entropy

    @property
    def asks_latents(self) -> bool:
        """Whether norm and SNR of the latents are to be known when a step begins: to the gate, or for the trace."""
        return self.gates_on_snr or self.measures_entropy
