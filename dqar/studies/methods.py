"""What the results slides compare: full compute, slide 11's baselines, and DQAR's gates and plans."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from dqar.config import DQARConfig, ReuseTarget
from dqar.families import describe_model
from dqar.forecast.plan import ForecastPlan, extrapolation
from dqar.measure.results import RECORDED, slug
from dqar.measure.sampling import OPEN, Samples, sample
from dqar.models.pipelines import load_pipeline
from dqar.models.profiles import Profile
from dqar.peers.registry import Peer
from dqar.policy import ReusePolicy

CALIBRATION_SEED = 300
"""Of the images that W8A8's salience is measured on: none that is compared later."""


EXTRAPOLATIONS = {1.5: (2, 8, 2), 2: (4, 8, 2), 3: (4, 4, 2), 4: (6, 4, 2)}
"""Interval, last computed steps and order of output extrapolation, the best at so many times fewer MACs (slide 13)."""


_PATIENT = (("residual_diff_threshold", 0.08), ("max_warmup_steps", 4), ("max_continuous_cached_steps", 2))


CACHES = {
    1.5: Peer("DBCache + TaylorSeer", (("Fn_compute_blocks", 8), *_PATIENT)),
    2: Peer("DBCache + TaylorSeer", (("Fn_compute_blocks", 1), *_PATIENT)),
    3: Peer("SeaCache", (("threshold", 0.5), ("max_consecutive_cached", 3), ("residual_order", 1))),
    4: Peer("SeaCache", (("threshold", 1.0), ("max_consecutive_cached", 4), ("residual_order", 1))),
}
"""The other caches with the highest PSNR to the reference at so many times fewer MACs (notebook 11)."""


DECIDING = ("First-Block-Cache", "SeaCache", "DBCache", "DBCache + TaylorSeer")
"""Caches that decide by what they see, for a whole batch at once: they get small ones."""


SMALL_BATCH = 5


@dataclass(frozen=True)
class Method:
    """One way to draw the same images: gated or planned reuse, fewer steps, another spacing of them, a peer's cache,
    quantized linear layers, another dtype."""

    config: DQARConfig | ForecastPlan | None = None
    num_inference_steps: int | None = None
    w8a8: Literal["plain", "balanced"] | None = None
    dtype: torch.dtype | None = None
    scheduler: str | None = None
    peer: Peer | None = None

    def pipeline(self, profile: Profile) -> DiffusionPipeline:
        """The pipeline that it draws with, DQAR not applied; loaded once."""
        # One pipeline for all batch sizes, so that hooks on it see every drawing.
        profile = dataclasses.replace(profile, batch_size=1, scheduler=self.scheduler or profile.scheduler)
        return _pipeline(profile, self.w8a8, self.dtype or profile.dtype)

    def draw(self, profile: Profile, seed: int, **options) -> Samples:
        """``sample`` by this method; ``options`` as there."""
        pipe, steps = self.pipeline(profile), self.num_inference_steps or profile.num_inference_steps
        if self.peer is not None and self.peer.name in DECIDING:
            profile = dataclasses.replace(profile, batch_size=min(profile.batch_size, SMALL_BATCH))
        with contextlib.nullcontext() if self.peer is None else self.peer.attach(pipe, steps):
            return sample(pipe, profile, seed, self.config, num_inference_steps=steps, **options)


def policy_path(profile: Profile, target: ReuseTarget) -> Path:
    """Where the policy for a reuse target lies, beside the labels that it was trained on."""
    return RECORDED / profile.name / f"policy-{target}.safetensors"


def policy_config(path: Path, target: ReuseTarget) -> DQARConfig:
    """A trained policy decides; nothing twice in a row: its labels say what a single reuse does, and no more."""
    return DQARConfig(policy=ReusePolicy.load(path), schedule="all", reuse_target=target, max_reuse_streak=1)


def computed_steps(profile: Profile, budget: float) -> int:
    """The most steps that a plan may compute within a budget."""
    return max(2, int(profile.num_inference_steps / budget))


def plan_path(profile: Profile, sampler: str, target: str, num_computed: int) -> Path:
    """Where a plan is kept."""
    return RECORDED / profile.name / "plans" / f"{slug(sampler)}-{target}-{num_computed}.json"


def names_at(profile: Profile, budget: float) -> dict[str, str]:
    """The names in ``methods`` of what is compared at one budget, by kind."""
    return {
        "DQAR plan": f"DQAR plan, {budget}×",
        "fewer steps": f"{computed_steps(profile, budget)} steps",
        "output extrapolation": f"extrapolation, {budget}×",
        "best other cache": f"{CACHES[budget].name}, {budget}×",
    }


def methods(profile: Profile, gate: DQARConfig | None) -> dict[str, Method]:
    """Full compute, slide 11's baselines, DQAR by the rule with a calibrated ``gate``, by the policy and by plans, and
    beside each plan what saves as much.

    Without a gate, or as long as no policy has been trained or plan made, the methods that need one are left out.
    """
    steps = profile.num_inference_steps
    static = dataclasses.replace(OPEN, schedule="static")
    found = {"full compute": Method()}
    for name, dtype in (("FP16", torch.float16), ("BF16", torch.bfloat16), ("FP32", torch.float32)):
        if dtype != profile.dtype:
            found[f"full compute, {name}"] = Method(dtype=dtype)
    found |= {
        f"{steps * 4 // 5} steps": Method(num_inference_steps=steps * 4 // 5),
        f"{steps // 2} steps": Method(num_inference_steps=steps // 2),
        "static, kv": Method(static),
        "static, output": Method(dataclasses.replace(static, reuse_target="output")),
        "W8A8": Method(w8a8="plain"),
        "W8A8 + CSB": Method(w8a8="balanced"),
    }
    for target in ("kv", "output"):
        if gate is not None:
            found[f"DQAR rule, {target}"] = Method(dataclasses.replace(gate, reuse_target=target))
    for target in ("kv", "output"):
        if (path := policy_path(profile, target)).exists():
            found[f"DQAR policy, {target}"] = Method(policy_config(path, target))
    for budget, best in EXTRAPOLATIONS.items():
        number = computed_steps(profile, budget)
        path = plan_path(profile, profile.scheduler, "reference", number)
        if path.exists():
            names = names_at(profile, budget)
            found[names["fewer steps"]] = Method(num_inference_steps=number)
            found[names["output extrapolation"]] = Method(extrapolated(profile, *best))
            found[names["best other cache"]] = Method(peer=CACHES[budget])
            found[names["DQAR plan"]] = Method(ForecastPlan.load(path))
    return found


def extrapolated(profile: Profile, interval: int, last: int, order: int) -> ForecastPlan:
    """The output extrapolated from every ``interval``-th step; the ``last`` steps are all computed."""
    pipe, steps = Method().pipeline(profile), profile.num_inference_steps
    pipe.scheduler.set_timesteps(steps)
    computed = {*range(0, steps, interval), *range(max(0, steps - last), steps)}
    model, timesteps = describe_model(pipe.transformer), pipe.scheduler.timesteps.tolist()
    return extrapolation(computed, timesteps, max(1.0, profile.guidance_scale), model, order)


@functools.lru_cache(maxsize=8)
def _pipeline(profile: Profile, w8a8: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    pipe = load_pipeline(dataclasses.replace(profile, dtype=dtype))
    if w8a8 is not None:
        salience = w8a8.measure_salience(pipe, profile, CALIBRATION_SEED) if w8a8 == "balanced" else None
        pipe.transformer = w8a8.quantize_transformer(pipe.transformer, salience)
    return pipe
