"""Notebook 06: who should decide, the rule, the policy, measured errors, or chance (slide 7)."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from dqar.config import DQARConfig, ReuseTarget
from dqar.measure import metrics
from dqar.measure.calibrate import propose_gate
from dqar.measure.quality import reference_of
from dqar.measure.sensitivity import site_errors
from dqar.plan import BRANCHES, ReusePlan
from dqar.policy import FEATURES, ReusePolicy, policy_features, train_policy
from dqar.studies.compare import FULL, Method
from dqar.studies.recording import LABEL_SEED, SWEEP_SEED, Recording
from dqar.studies.reference import record_reference

LABELLED: tuple[ReuseTarget, ...] = ("kv", "output", "block")
"""What policies are trained for."""
GROUPS = 10
"""Labelled images, and with them their classes or captions, are in as many groups in turn; of digits, the classes."""
# Each image has a noise of its own, so that held-out classes are held-out seeds, too.
TRAIN, STOP, TEST = range(0, 6), range(6, 8), range(8, 10)
"""Groups that a policy is trained on, stopped early by, and judged by."""
DELTA_FD = 0.1
"""Accepted growth of the Fréchet distance, relative: what the deck accepts is below 1 of 10.2."""
DELTA_PSNR = 40.0
"""Accepted in its place where images have no features or are too few for them: PSNR to full compute, in dB."""


GIVEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "step and SNR": ("step", "snr"),
    "step, SNR and layer": ("step", "snr", "layer"),
}
"""What ``correlations`` hold fixed, and its columns."""


def features_of(labels: pd.DataFrame, total_steps: int) -> torch.Tensor:
    """Slide 7's features ``[B, 5]`` of labelled sites; class labels are prompts of one word."""
    lengths = labels.get("prompt_length", pd.Series(1.0, index=labels.index))
    rows = zip(labels.entropy, labels.snr, labels.latent_norm, labels.step, lengths, strict=True)
    return torch.tensor([policy_features(*row[:-1], total_steps, row[-1]) for row in rows])


@dataclass(frozen=True)
class Study:
    """A trained policy, its losses by epoch, and how it and the rule score the held-out sites."""

    policy: ReusePolicy
    history: pd.DataFrame
    held_out: pd.DataFrame
    """One row per site: ``harmless`` (the label), ``policy`` (p_reuse), ``rule`` (higher: rather reused)."""

    def auc(self, score: str = "policy") -> float:
        """Area under the ROC curve on the held-out sites; 0.5 is chance."""
        return float(roc_auc_score(self.held_out.harmless, self.held_out[score]))


def study(labels: pd.DataFrame, delta: float, total_steps: int, **training: Any) -> Study:
    """Trains a policy on slide 7's labels, 1 where a reuse alone changes the image by less than ``delta``.

    Args:
        labels: from ``sensitivity.site_errors``.
        delta: mean squared error of the image.
        training: options of ``train_policy``.
    """
    features = features_of(labels, total_steps)
    harmless = torch.tensor((labels.error < delta).to_numpy(), dtype=torch.float32)
    train, stop, test = (
        torch.tensor((labels.label % GROUPS).isin(groups).to_numpy()) for groups in (TRAIN, STOP, TEST)
    )
    network, history = train_policy(features[train], harmless[train], features[stop], harmless[stop], **training)
    judged = features[test]
    if omit := training.get("omit"):
        judged = judged.clone()
        judged[:, FEATURES.index(omit)] = cast(torch.Tensor, network.mean)[FEATURES.index(omit)]
    with torch.no_grad():
        scores = network(judged).numpy()
    rows = labels[test.numpy()]
    gate = propose_gate(labels)
    inside = rows.snr.between(*(gate.snr_range or (0, np.inf)))
    rule = np.where(inside, -rows.entropy, -rows.entropy - labels.entropy.max())
    held_out = rows.assign(harmless=harmless[test].bool().numpy(), policy=scores, rule=rule)
    return Study(network, pd.DataFrame(history), held_out)


def ablation(labels: pd.DataFrame, delta: float, total_steps: int, seeds: int = 3) -> pd.DataFrame:
    """Held-out AUC of the same network without each feature: ``omitted``, ``seed``, ``auc``."""
    rows = []
    for omitted in (None, *FEATURES):
        for seed in range(seeds):
            auc = study(labels, delta, total_steps, omit=omitted, seed=seed).auc()
            rows.append({"omitted": omitted or "nothing", "seed": seed, "auc": auc})
    return pd.DataFrame(rows)


def partial_correlation(labels: pd.DataFrame, of: str, given: tuple[str, ...]) -> float:
    """Spearman's ρ of ``of`` with the error, once what the ``given`` columns explain of both ranks is taken out."""
    ranks = labels[[of, "error", *given]].rank()
    explaining = np.column_stack([np.ones(len(ranks)), *(ranks[name] for name in given)])

    def rest(name: str) -> np.ndarray:
        return (ranks[name] - explaining @ np.linalg.lstsq(explaining, ranks[name], rcond=None)[0]).to_numpy()

    return float(np.corrcoef(rest(of), rest("error"))[0, 1])


def correlation_interval(
    labels: pd.DataFrame, of: str, given: tuple[str, ...], resamples: int = 400
) -> tuple[float, float]:
    """The 95 % interval of ``partial_correlation``, low and high: bootstrap over images, each with all its sites."""
    images = [part for _, part in labels.groupby("image")]
    chosen = np.random.default_rng(0).integers(0, len(images), (resamples, len(images)))
    trials = [partial_correlation(pd.concat([images[i] for i in rows]), of, given) for rows in chosen]
    low, high = np.quantile(trials, (0.025, 0.975))
    return float(low), float(high)


def correlations(labels: pd.DataFrame) -> pd.DataFrame:
    """Does entropy tell more than step and SNR do? ``signal``, ``given``, ``layer`` (-1: all), ``rho``."""
    rows = [
        {"signal": "entropy", "given": name, "layer": -1, "rho": partial_correlation(labels, "entropy", columns)}
        for name, columns in GIVEN.items()
    ]
    rows.append({"signal": "snr", "given": "step", "layer": -1, "rho": partial_correlation(labels, "snr", ("step",))})
    for layer, part in labels.groupby("layer"):
        rho = partial_correlation(part, "entropy", ("step", "snr"))
        rows.append({"signal": "entropy", "given": "step and SNR", "layer": layer, "rho": rho})
    return pd.DataFrame(rows)


def predicted_errors(labels: pd.DataFrame, total_steps: int, num_layers: int) -> pd.Series:
    """The error of each site by step, layer and branch: an additive fit of the logarithm, from the sampled sites."""
    log_error = labels.error.clip(lower=1e-14).map(np.log)
    mean = log_error.mean()
    sites = pd.MultiIndex.from_product([range(1, total_steps), range(num_layers), BRANCHES])
    total = pd.Series(mean, index=sites)
    for level, name in enumerate(("step", "layer", "branch")):
        effect = log_error.groupby(labels[name]).mean() - mean
        total += effect.reindex(sites.get_level_values(level)).fillna(0).to_numpy()
    return total.map(np.exp)


def plan_of(errors: pd.Series, share: float, total_steps: int) -> tuple[ReusePlan, float]:
    """The sites of least error, none reused twice in a row, until ``share`` of all are reused.

    Returns:
        The plan, and the largest error that it accepts.
    """
    layers = errors.index.get_level_values(1).nunique()
    number = round(share * total_steps * layers * len(BRANCHES))
    chosen: set[tuple[int, int, str]] = set()
    largest = 0.0
    order = errors.sort_values()
    for (step, layer, branch), error in zip(order.index, order, strict=True):
        if len(chosen) >= number:
            break
        if (step - 1, layer, branch) not in chosen and (step + 1, layer, branch) not in chosen:
            chosen.add((step, layer, branch))
            largest = float(error)
    return ReusePlan(frozenset(chosen), layers, total_steps), largest


def deciders(
    labels: pd.DataFrame, policy: ReusePolicy, target: ReuseTarget, total_steps: int, num_layers: int
) -> dict[tuple[str, float], Method]:
    """Rule, policy, oracle and chance at about equal shares of reuse, by name and the share that is asked for.

    Nothing is reused twice in a row, since the labels say nothing about that.
    """
    base = DQARConfig(schedule="all", max_reuse_streak=1, reuse_target=target)
    errors = predicted_errors(labels, total_steps, num_layers)
    by_chance = pd.Series(np.random.default_rng(0).random(len(errors)), index=errors.index)
    with torch.no_grad():
        scores = policy(features_of(labels, total_steps)).numpy()
    inside = labels.snr.between(0.5, 50).mean()
    configs: dict[tuple[str, float], DQARConfig] = {}
    for share in (0.1, 0.2, 0.3, 0.4):
        # A gate open for a of the sites at random reuses a / (1 + a) of them, if none twice in a row.
        opened = share / (1 - share)
        rule = propose_gate(labels, min(1.0, opened / inside))
        configs["rule", share] = dataclasses.replace(
            base, entropy_threshold=rule.entropy_threshold, snr_range=rule.snr_range
        )
        threshold = float(np.quantile(scores, 1 - opened))
        configs["policy", share] = dataclasses.replace(base, policy=policy, policy_threshold=threshold)
        for name, order in (("oracle", errors), ("chance", by_chance)):
            configs[name, share] = dataclasses.replace(base, plan=plan_of(order, share, total_steps)[0])
    return {key: Method(key[0], config=config) for key, config in configs.items()}


def runs_of_deciders(table: pd.DataFrame) -> pd.DataFrame:
    """One row a ``target``, ``method`` and share ``wanted`` of ``record_deciders``' table: ``psnr``, the median image's
    (dB), with its 95 % interval ``psnr_low`` and ``psnr_high``, and ``sites_reused``."""
    by = table.assign(psnr=metrics.decibels(table.mse)).groupby(["target", "method", "wanted"])
    runs = by.agg({"psnr": "median", "sites_reused": "mean"})
    low, high = zip(*(metrics.psnr_interval(part.mse.to_numpy(), np.median) for _, part in by), strict=True)
    return runs.assign(psnr_low=low, psnr_high=high).reset_index()


def psnr_at_share(runs: pd.DataFrame, share: float = 0.2) -> dict[str, float]:
    """PSNR (dB) of each decider at ``share`` of the sites, between the runs on either side of it."""
    at = {}
    for name, part in runs.groupby("method"):
        part = part.sort_values("sites_reused")
        if part.sites_reused.min() <= share <= part.sites_reused.max():
            at[str(name)] = float(np.interp(share, part.sites_reused, part.psnr))
    return at


def lead_at_share(table: pd.DataFrame, ours: str, theirs: str, share: float = 0.2) -> tuple[float, float, float]:
    """How many dB one decider's median image is ahead of another's at ``share`` of the attention outputs.

    Args:
        table: of ``record_deciders``.

    Returns:
        The lead, and its 95 % interval: paired bootstrap over the images; NaN where one of them isn't there.
    """
    table = table[table.target == "output"]
    images = table.image.nunique()
    chosen = np.random.default_rng(0).integers(0, images, (2000, images))
    at = []
    for name in (ours, theirs):
        runs = table[table.method == name].assign(psnr=metrics.decibels(table.mse))
        reused = runs.groupby("wanted").sites_reused.mean().sort_values()
        if reused.empty or not reused.min() <= share <= reused.max():
            return math.nan, math.nan, math.nan
        errors = runs.pivot(index="wanted", columns="image", values="psnr").loc[reused.index].to_numpy()
        medians = np.vstack([np.median(errors, 1), np.median(errors[:, chosen], 2).T])  # of all, and of each resample
        at.append(np.array([np.interp(share, reused, line) for line in medians]))
    leads = at[0] - at[1]
    low, high = np.quantile(leads[1:], (0.025, 0.975))
    return float(leads[0]), float(low), float(high)


def calibrated_delta(oracle: pd.DataFrame) -> float:
    """δ of the labels: the largest error that may be accepted while the set of images stays as good.

    Args:
        oracle: of ``record_oracle``: runs of accepted decisions, by ``share`` and ``delta``.

    Returns:
        The largest ``delta`` whose run keeps the Fréchet distance to its reference within ``DELTA_FD`` of full
        compute's (where that is NaN: whose images have ``DELTA_PSNR`` dB); of the smallest run, if none does.
    """
    table = accepted_runs(oracle)
    good = table.psnr >= DELTA_PSNR if table.fd.isna().all() else table.fd_growth <= DELTA_FD
    kept = table[(table.share > 0) & good]
    return float((kept if len(kept) else table[table.share > 0].head(1)).delta.max())


def accepted_runs(oracle: pd.DataFrame) -> pd.DataFrame:
    """Of each run of accepted decisions: ``share``, ``delta``, ``psnr`` (dB to full compute, of the mean squared error)
    with its 95 % interval ``psnr_low`` and ``psnr_high``, ``fd``, ``fd_growth``.

    The Fréchet distance is to the reference of the model that ``oracle``'s provenance names, beside which it lies; NaN
    where images have no features, or are fewer than their features: of 100 images Inception's distance is bias mostly.
    """
    real = reference_of(oracle.attrs["provenance"]["profile"]["model"], Path(oracle.attrs.get("folder", "")))
    rows, distance = [], math.nan
    for (share, delta), part in oracle.groupby(["share", "delta"]):
        if real is not None and "features" in part and len(part) >= len(part.features.iloc[0]):
            distance = metrics.frechet_distance(torch.tensor(np.stack(list(part.features))).float(), real.features)
        low, high = metrics.psnr_interval(part.mse.to_numpy())
        quality = {"psnr": metrics.decibels(part.mse.mean()), "psnr_low": low, "psnr_high": high}
        rows.append({"share": share, "delta": delta, **quality, "fd": distance})
    table = pd.DataFrame(rows).sort_values("share", ignore_index=True)
    return table.assign(fd_growth=table.fd / table.fd[table.share == 0].item() - 1)


def policy_path(folder: Path, target: ReuseTarget) -> Path:
    """Where the policy for a reuse target lies, beside the labels that it was trained on."""
    return folder / f"policy-{target}.safetensors"


def policy_config(path: Path, target: ReuseTarget) -> DQARConfig:
    """A trained policy decides; nothing twice in a row: its labels say what a single reuse does, and no more."""
    return DQARConfig(policy=ReusePolicy.load(path), schedule="all", reuse_target=target, max_reuse_streak=1)


# --- recording -------------------------------------------------------------------------------------------------------


def record_labels(recording: Recording) -> None:
    """What single reuses do to the image, at sampled sites, for every reuse target of ``LABELLED``."""
    for target in LABELLED:
        recorded_labels(recording, target)


def recorded_labels(recording: Recording, target: ReuseTarget) -> pd.DataFrame:
    """The table of ``sensitivity.site_errors`` for one reuse target, recorded if it isn't yet."""
    pipe, sizes = FULL.pipeline(recording.profile), recording.sizes
    parts = {
        first: functools.partial(
            site_errors, pipe, recording.profile, LABEL_SEED, target, first, 10, sizes.sites_per_step
        )
        for first in range(0, sizes.label_images, 10)
    }
    return recording.table(f"labels-{target}", parts, LABEL_SEED)


def record_oracle(recording: Recording) -> pd.DataFrame:
    """Runs of nothing but accepted decisions.

    Returns:
        The columns of ``compare``; ``share`` of all sites that are reused, and ``delta``, the largest error accepted.
    """
    steps, layers = _size(recording)

    def part(share: float) -> pd.DataFrame:
        errors = predicted_errors(recorded_labels(recording, "output"), steps, layers)
        plan, delta = plan_of(errors, share, steps)
        method = Method("oracle", config=DQARConfig(plan=plan, reuse_target="output"))
        return recording.compare(method, SWEEP_SEED, 0, recording.sizes.part).assign(share=share, delta=delta)

    shares = (0.0, 0.1, 0.2, 0.3, 0.4)
    return recording.table("oracle", {share: functools.partial(part, share) for share in shares}, SWEEP_SEED)


def record_policies(recording: Recording) -> None:
    """A policy for every reuse target of ``LABELLED``."""
    for target in LABELLED:
        recorded_policy(recording, target)


def recorded_policy(recording: Recording, target: ReuseTarget) -> ReusePolicy | None:
    """The policy for one reuse target, trained on its labels if it isn't yet; with δ from ``record_oracle``.

    ``None``: all labels are of one kind, so that there is nothing to learn; a warning says so.
    """
    path = policy_path(recording.folder, target)
    if not path.exists():
        record_reference(recording)
        labels, delta = recorded_labels(recording, target), calibrated_delta(record_oracle(recording))
        if (labels.error < delta).nunique() < 2:
            kind = "below" if labels.error[0] < delta else "above"
            warnings.warn(f"no policy for {target}: all its errors are {kind} δ = {delta:.2g}", stacklevel=2)
            return None
        trained = study(labels, delta, recording.profile.num_inference_steps)
        card = {"target": target, "delta": delta, "labels": len(labels), "auc_held_out": trained.auc()}
        trained.policy.save(path, {**card, "data": labels.attrs["provenance"]})
    return ReusePolicy.load(path)


def record_deciders(recording: Recording) -> None:
    """Rule, policy, oracle and chance at several shares of reuse, nothing reused twice in a row.

    The table has the columns of ``compare``, and ``wanted``, the share that was asked for; targets without a policy are
    left out.
    """

    def part(method: Method, share: float) -> pd.DataFrame:
        return recording.compare(method, SWEEP_SEED, 0, recording.sizes.sweep_images).assign(wanted=share)

    parts = {}
    targets: tuple[ReuseTarget, ...] = ("output", "kv")
    for target in targets:
        labels, network = recorded_labels(recording, target), recorded_policy(recording, target)
        if network is None:
            continue
        for (name, share), method in deciders(labels, network, target, *_size(recording)).items():
            parts[f"{target}-{name}-{share}"] = functools.partial(part, method, share)
    if parts:
        recording.table("deciders", parts, SWEEP_SEED)


def _size(recording: Recording) -> tuple[int, int]:
    """Steps and layers."""
    blocks = FULL.pipeline(recording.profile).transformer.transformer_blocks
    return recording.profile.num_inference_steps, len(blocks)
