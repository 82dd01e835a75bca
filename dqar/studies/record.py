"""Long measurements, made once and committed: ``dqar record --profile digits`` (``make results``).

They take hours on a CPU, so figures read them from ``recorded/``, and a notebook draws a few of the images anew to see
whether they still agree. Each table is made of parts, saved as they are finished: an interrupted recording resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from dqar import stats
from dqar.config import CacheFormat, DQARConfig, Probe, ReuseTarget
from dqar.forecast.plan import ForecastPlan
from dqar.measure import metrics
from dqar.measure.recorders import StateRecorder
from dqar.measure.results import RECORDED, load_table, provenance, save_table, slug
from dqar.measure.sampling import LOOK, OPEN, Samples, class_labels
from dqar.measure.sensitivity import site_errors
from dqar.models.classifier import load_classifier
from dqar.models.profiles import Profile
from dqar.peers import w8a8
from dqar.policy import ReusePolicy
from dqar.studies import pareto, policy
from dqar.studies.compare import reuse_saving
from dqar.studies.methods import SMALL_BATCH, Method, methods, policy_path
from dqar.trace import MODEL, SELF_ATTENTION

# Other images than the notebooks' and the results' (seed 0): a policy mustn't be judged on what it was trained on.
LABEL_SEED, SWEEP_SEED, RESULT_SEED = 100, 200, 0


LABELLED: tuple[ReuseTarget, ...] = ("kv", "output", "block")
"""What policies are trained for."""


@dataclass(frozen=True)
class Sizes:
    """How much is recorded for a profile."""

    label_images: int = 20
    sites_per_step: int = 3
    sweep_images: int = 20
    samples: int = 1000
    part: int = 100
    plan_images: int = 120
    refinements: int = 24
    pareto_images: int = 20
    pareto_settings: int | None = None
    """Of each family at most; ``None``: all."""


SIZES = {
    "smoke": Sizes(
        label_images=10,
        sites_per_step=2,
        sweep_images=2,
        samples=6,
        part=3,
        plan_images=10,
        refinements=1,
        pareto_images=2,
        pareto_settings=1,
    )
}


class Recording:
    """The recorded tables of one profile. Each method returns a table, and measures first what it needs."""

    def __init__(self, profile: Profile, work: Path):
        if profile.model != "digits":
            raise ValueError(f"profile {profile.name!r} can't be recorded: no classifier of its images is at hand")
        self.profile, self.sizes = profile, SIZES.get(profile.name, Sizes())
        self.folder, self.parts = RECORDED / profile.name, work / profile.name
        for folder in (self.folder, self.parts):
            folder.mkdir(parents=True, exist_ok=True)
        self.pipe = Method().pipeline(profile)

    def labels(self, target: str) -> pd.DataFrame:
        """What single reuses do to the image, at sampled sites (``sensitivity.site_errors``)."""
        parts = {
            first: functools.partial(
                site_errors, self.pipe, self.profile, LABEL_SEED, target, first, 10, self.sizes.sites_per_step
            )
            for first in range(0, self.sizes.label_images, 10)
        }
        return self._table(f"labels-{target}", parts, LABEL_SEED)

    def oracle(self) -> pd.DataFrame:
        """Runs of nothing but accepted decisions, ``share`` of all sites and errors up to ``delta``."""

        def part(share: float) -> pd.DataFrame:
            steps, layers = self.profile.num_inference_steps, len(self.pipe.transformer.transformer_blocks)
            errors = policy.predicted_errors(self.labels("output"), steps, layers)
            plan, delta = policy.plan_of(errors, share, steps)
            config = DQARConfig(plan=plan, reuse_target="output")
            return self._draw("oracle", Method(config), SWEEP_SEED, 0, self.sizes.part).assign(share=share, delta=delta)

        shares = (0.0, 0.1, 0.2, 0.3, 0.4)
        return self._table("oracle", {share: functools.partial(part, share) for share in shares}, SWEEP_SEED)

    def policy(self, target: str) -> ReusePolicy:
        """The policy, trained on the labels; with δ from ``oracle``."""
        path = policy_path(self.profile, target)
        if not path.exists():
            labels, delta = self.labels(target), policy.calibrated_delta(self.oracle())
            study = policy.study(labels, delta, self.profile.num_inference_steps)
            source = labels.attrs["provenance"]
            card = {
                "target": target,
                "delta": delta,
                "labels": len(labels),
                "auc_held_out": study.auc(),
                "data": source,
            }
            study.policy.save(path, card)
        return ReusePolicy.load(path)

    def deciders(self) -> pd.DataFrame:
        """Rule, policy, oracle and chance at several shares of reuse, nothing reused twice in a row."""
        steps, layers = self.profile.num_inference_steps, len(self.pipe.transformer.transformer_blocks)

        def part(name: str, share: float, config: DQARConfig) -> pd.DataFrame:
            table = self._draw(name, Method(config), SWEEP_SEED, 0, self.sizes.sweep_images)
            return table.assign(target=config.reuse_target, wanted=share)

        parts = {}
        for target in ("output", "kv"):
            configs = policy.deciders(self.labels(target), self.policy(target), target, steps, layers)
            for (name, share), config in configs.items():
                parts[f"{target}-{name}-{share}"] = functools.partial(part, name, share, config)
        return self._table("deciders", parts, SWEEP_SEED)

    def methods(self) -> dict[str, Method]:
        """All methods of the results slides."""
        for target in ("output", "kv"):
            self.policy(target)
        return methods(self.profile, policy.rule_gate(self.labels("output")))

    def samples(self) -> pd.DataFrame:
        """Every method's images, one row each: class, features, error against full compute, cost."""
        tables, size = [], self.sizes.part
        for name, method in self.methods().items():
            # Another dtype changes next to nothing, and FP16 is slow on a CPU: no Fréchet distance of its own.
            number = self.sizes.samples if method.dtype is None else size
            parts = {
                first: functools.partial(self._draw, name, method, RESULT_SEED, first, min(size, number - first))
                for first in range(0, number, size)
            }
            tables.append(self._table(f"samples-{slug(name)}", parts, RESULT_SEED))
        return pd.concat(tables, ignore_index=True)

    def speed(self) -> pd.DataFrame:
        """Seconds of every method, four images a batch, taken in turn."""

        def measure() -> pd.DataFrame:
            profile = dataclasses.replace(self.profile, batch_size=4)
            calls = {
                name: functools.partial(method.draw, profile, RESULT_SEED, num_samples=4)
                for name, method in self.methods().items()
            }
            return metrics.interleaved_times(calls, profile.repeats, profile.device)

        return self._table("speed", {"all": measure}, RESULT_SEED)

    def memory(self) -> pd.DataFrame:
        """Bytes of weights and what drawing four images adds at its peak, every method in a process of its own."""

        def measure() -> pd.DataFrame:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                calls = [(self.profile, name, method) for name, method in self.methods().items()]
                return pd.DataFrame(tqdm(pool.imap(_memory, calls, chunksize=1), total=len(calls), desc="memory"))

        return self._table("memory", {"all": measure}, RESULT_SEED)

    def accumulation(self) -> pd.DataFrame:
        """Error of the latents at every step when K and V are kept in few bits, against an unquantized cache."""
        base, top = dataclasses.replace(OPEN, schedule="static"), CacheFormat(keep_channels=4)
        variants = {
            "per tensor": {"quantize_mode": "per_tensor"},
            "per tensor + CSB": {"quantize_mode": "per_tensor", "balance": True},
            "per tensor + top 4": {"quantize_mode": "per_tensor", "cache": top},
            "per tensor + CSB + top 4": {"quantize_mode": "per_tensor", "balance": True, "cache": top},
            "per channel": {"quantize_mode": "per_channel"},
        }

        def states(**options) -> tuple[torch.Tensor, float]:
            config = dataclasses.replace(base, **options)
            with StateRecorder(self.pipe.transformer) as recorder:
                drawn = Method(config).draw(self._batched(), SWEEP_SEED, num_samples=self.sizes.sweep_images)
            return recorder.states(), drawn.trace.to_pandas()["bytes"].max() / self.sizes.sweep_images

        def part(bits: int, variant: str) -> pd.DataFrame:
            got, nbytes = states(quantize_bits=bits, **variants[variant])
            error = (got - unquantized()).flatten(2).norm(dim=2) / unquantized().flatten(2).norm(dim=2)
            rows = {"step": range(len(error)), "relative_error": error.mean(1), "bytes_per_site": nbytes}
            return pd.DataFrame(rows).assign(bits=bits, variant=variant)

        @functools.cache
        def unquantized() -> torch.Tensor:
            return states(quantize_bits=16)[0]

        parts = {f"{b}-{slug(v)}": functools.partial(part, b, v) for b in (8, 4, 2) for v in variants}
        return self._table("accumulation", parts, SWEEP_SEED)

    def sharing(self) -> pd.DataFrame:
        """The unconditional branch takes the conditional one's, where their entropies differ by less than ε nats."""

        def part(target: str, epsilon: float) -> pd.DataFrame:
            config = DQARConfig(schedule="none", reuse_target=target, share_below=epsilon)
            table = self._draw(f"ε = {epsilon:g}", Method(config), SWEEP_SEED, 0, self.sizes.sweep_images)
            return table.assign(target=target, epsilon=epsilon)

        epsilons = (0.01, 0.03, 0.1, 0.3, math.inf)
        parts = {f"{t}-{e}": functools.partial(part, t, e) for t in ("kv", "output") for e in epsilons}
        return self._table("sharing", parts, SWEEP_SEED)

    def overhead(self) -> pd.DataFrame:
        """Seconds of a whole denoising with the entropy measured in different ways, taken in turn."""

        def with_maps(q, k, v, scale=None, num_queries=None):
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            return weights @ v, stats.attention_entropy(weights, reduction="none")

        def measure() -> pd.DataFrame:
            profile = dataclasses.replace(self.profile, batch_size=4)
            tokens = (self.pipe.transformer.config.sample_size // self.pipe.transformer.config.patch_size) ** 2
            few, seldom = Probe(record=True, queries=tokens // 8), Probe(record=True, interval=4)
            configs = {
                "none": DQARConfig(schedule="none"),
                "maps": LOOK,
                "fused": LOOK,
                f"fused, {tokens // 8} of {tokens} queries": dataclasses.replace(LOOK, probe=few),
                "fused, every 4th step": dataclasses.replace(LOOK, probe=seldom),
            }

            def call(name: str) -> None:
                fused = stats.fused_attention_with_entropy
                stats.fused_attention_with_entropy = with_maps if name == "maps" else fused
                try:
                    Method(configs[name]).draw(profile, RESULT_SEED, num_samples=4)
                finally:
                    stats.fused_attention_with_entropy = fused

            calls = {name: functools.partial(call, name) for name in configs}
            return metrics.interleaved_times(calls, 2 * profile.repeats, profile.device)

        return self._table("overhead", {"all": measure}, RESULT_SEED)

    def plans(self) -> None:
        """The forecast plans of all samplers, targets and budgets; saved one by one."""
        for sampler in pareto.SAMPLERS:
            for target in ("reference", "converged"):
                pareto.make_plans(self.profile, sampler, target, self.sizes.plan_images, self.sizes.refinements)

    def pareto(self) -> None:
        """Quality and MACs of every method at every setting, one table a sampler."""
        self.plans()
        sizes = self.sizes.pareto_images, self.sizes.pareto_settings
        for sampler in pareto.SAMPLERS:
            self._table(f"pareto-{slug(sampler)}", pareto.parts(self.profile, sampler, *sizes), pareto.PARETO_SEED)

    def _table(self, name: str, parts: dict[object, Callable[[], pd.DataFrame]], seed: int) -> pd.DataFrame:
        path = self.folder / f"{name}.parquet"
        if path.exists():
            return load_table(path)
        tables = []
        for part, measure in tqdm(parts.items(), desc=name):
            piece = self.parts / f"{name}-{part}.parquet"
            if not piece.exists():
                started = time.monotonic()
                table = measure()
                seconds = time.monotonic() - started
                save_table(table, piece, {**provenance(self.profile, seed), "seconds": seconds})
                logging.info("%s, part %s: %d rows in %.0f s", name, part, len(table), seconds)
            tables.append(load_table(piece))
        sources = [table.attrs.pop("provenance") for table in tables]
        source = {**sources[-1], "seconds": sum(source["seconds"] for source in sources)}
        save_table(pd.concat(tables, ignore_index=True), path, source)
        return load_table(path)

    def _batched(self) -> Profile:
        return dataclasses.replace(self.profile, batch_size=50)

    def _reference(self, seed: int, first: int, number: int) -> torch.Tensor:
        """Full compute's images, kept beside the parts."""
        path = self.parts / f"reference-{seed}-{first}-{number}.pt"
        if not path.exists():
            drawn = Method().draw(self._batched(), seed, first_image=first, num_samples=number)
            torch.save(drawn.images, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        return torch.load(path, weights_only=True)

    def _draw(self, name: str, method: Method, seed: int, first: int, number: int) -> pd.DataFrame:
        return draw(name, method, self._batched(), seed, first, self._reference(seed, first, number))


def draw(name: str, method: Method, profile: Profile, seed: int, first: int, reference: torch.Tensor) -> pd.DataFrame:
    """Draws the images that ``reference`` ``[N, C, H, W]`` shows in full compute, and compares.

    Returns:
        One row an image: ``method``, ``image``, ``label``, ``predicted``, ``mse``, ``ssim``, ``features``; and what all
        images of a method have in common: ``sites_reused`` (share), ``events`` (a run), ``macs_speedup``,
        ``cache_bytes`` (an image, at most). A peer has ``macs_speedup`` only, counted on the first five images.
    """
    if method == Method():  # the reference itself: drawn twice, it is the same to the bit
        drawn = Samples(reference, class_labels(method.pipeline(profile), torch.arange(first, first + len(reference))))
    else:
        drawn = method.draw(profile, seed, first_image=first, num_samples=len(reference), description=name)
    predicted, features = metrics.classify(load_classifier(), drawn.images)
    table = pd.DataFrame(
        {
            "method": name,
            "image": range(first, first + len(reference)),
            "label": drawn.labels,
            "predicted": predicted,
            "mse": (drawn.images.double() - reference.double()).square().flatten(1).mean(1),
            "ssim": metrics.ssim(drawn.images, reference),
            "features": list(features.half().numpy()),
        }
    )
    steps = profile.num_inference_steps
    costs = {"sites_reused": 0.0, "events": 0.0, "cache_bytes": 0.0}
    costs["macs_speedup"] = steps / (method.num_inference_steps or steps)
    if method.peer is not None:  # what it saves depends on the images
        few = {"first_image": first, "num_samples": min(SMALL_BATCH, len(reference))}
        step, macs = (
            metrics.count_macs(lambda m=m: m.draw(profile, seed, **few))
            for m in (Method(num_inference_steps=1), method)
        )
        costs = {"macs_speedup": steps * step / macs}
    if drawn.trace is not None:
        planned = isinstance(method.config, ForecastPlan)
        trace = drawn.trace.to_pandas(MODEL if planned else SELF_ATTENTION)
        saved = trace.decision != "compute"
        costs["sites_reused"], costs["events"] = saved.mean(), saved.sum() / trace.run.nunique()
        share = 1.0 if planned else reuse_saving(profile, method.config.reuse_target)
        costs["macs_speedup"] = 1 / (1 - saved.mean() * share)
        images = min(profile.batch_size, len(reference))
        costs["cache_bytes"] = trace.groupby(["run", "step"])["bytes"].sum().max() / images
    return table.assign(**costs)


def _memory(call: tuple[Profile, str, Method]) -> dict[str, object]:
    profile, name, method = call
    torch.set_num_threads(1)
    transformer = method.pipeline(profile).transformer
    gc.collect()
    metrics.reset_peak_memory(profile.device)
    loaded = metrics.peak_memory_bytes(profile.device)
    method.draw(dataclasses.replace(profile, batch_size=4), RESULT_SEED, num_samples=4)
    peak = metrics.peak_memory_bytes(profile.device)
    return {"method": name, "weight_bytes": w8a8.weight_bytes(transformer), "added_bytes": peak - loaded}


TABLES = (
    *("labels", "oracle", "policy", "plans", "deciders", "speed", "memory", "overhead", "accumulation", "sharing"),
    *("pareto", "samples"),
)
