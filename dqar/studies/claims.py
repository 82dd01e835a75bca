"""Notebook 00: the doubtful claims of the deck beside facts and measurements."""

from __future__ import annotations

import math

import pandas as pd

from dqar import stats
from dqar.measure import metrics
from dqar.measure.results import Run
from dqar.studies import gate, policy, schedules, trace
from dqar.studies.compare import FULL, only


def bounds(tokens: int = 256, reused: int = 47) -> pd.DataFrame:
    """Slide 12's speed claim against arithmetic: the most that reuse of ``reused`` sites, or of all, can save.

    A block at N tokens and width d costs ``12Nd² + 2N²d`` MACs; K and V projections ``2Nd²``, the whole attention
    ``4Nd² + 2N²d``: here of DiT-XL/2's 28 blocks in 50 steps. The defaults are its tokens at 256², and the deck's
    reuses.

    Returns:
        ``target``, ``sites``, ``share_of_block``, ``speedup_bound``.
    """
    width, sites_in_all = 1152, 28 * 50
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    saved = {"kv": 2 * tokens * width**2 / block, "output": (4 * tokens * width**2 + 2 * tokens**2 * width) / block}
    rows = []
    for target, share in saved.items():
        for sites_reused in (reused, sites_in_all):
            speedup = 1 / (1 - share * sites_reused / sites_in_all)
            rows.append({"target": target, "sites": sites_reused, "share_of_block": share, "speedup_bound": speedup})
    return pd.DataFrame(rows)


def errata(run: Run) -> pd.DataFrame:
    """One row per doubtful statement of the slides: slide, claimed, bound (fact or limit), measured (this run)."""
    sites, gates, by_schedule = trace.sites(run), gate.gates(run), schedules.schedules(run)
    deck, calibrated = (only(gates, family=family, target="kv") for family in ("deck's gate", "calibrated"))
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    tokens, layers = int(sites.tokens.iloc[0]), sites.layer.nunique()
    low, high = sites.entropy.min(), sites.entropy.max()
    most = bounds().set_index(["target", "sites"]).speedup_bound
    relations = trace.relations(sites)
    every = {target: only(by_schedule, family="static 2", target=target) for target in ("kv", "output")}
    rows = [
        (
            "4",
            "H sums A·log A over all i, j",
            f"up to N·ln N = {tokens * math.log(tokens):.0f} nats at {tokens} tokens (1420 at 256); "
            f"a mean is at most ln N = {math.log(tokens):.2f}",
            f"mean over heads and queries: {low:.2f} to {high:.2f} nats",
        ),
        (
            "4",
            "SNR = ‖x0‖² / ‖x_t − x0‖²",
            "x0 is unknown while sampling",
            f"by predicted x0: {by_step.snr.iloc[0]:.2g} to {by_step.snr.iloc[-1]:.3g}; the schedule's is traced too",
        ),
        (
            "5",
            "entropy threshold 2.0 opens the gate",
            f"entropy scales with ln N = {math.log(tokens):.2f}",
            f"lowest entropy {low:.2f}: opens for {(sites.entropy < 2).mean():.1%} of the sites",
        ),
        ("5, 15", "τ(8) ≈ 2.0", f"2.0·√(8/64) = {stats.tau(2.0, 8):.2f}; τ(64) = 2.00", "formula kept"),
        (
            "5",
            "low entropy: safe to reuse",
            "ρ(entropy, error of the image) should be clearly positive",
            f"{_errors(run)}; ρ(entropy, change since the step before) = {relations['entropy']:+.2f}",
        ),
        ("8", "layers 20 to 28", "28 blocks are numbered 0 to 27", f"{layers} layers, clamped to 0 to {layers - 1}"),
        (
            "9",
            "the reuse path never computes Q",
            "K and V need a fresh Q; only the output needs none",
            f"every 2nd step: kv {every['kv'].psnr:.1f} dB at {every['kv'].macs_speedup:.2f}× MACs, "
            f"output {every['output'].psnr:.1f} dB at {every['output'].macs_speedup:.2f}×",
        ),
        (
            "12",
            "47 reuses a run give −23 % time",
            f"47 of 1400 sites save at most {1 - 1 / most['kv', 47]:.1%} (kv) or {1 - 1 / most['output', 47]:.1%} "
            f"(output); all sites {most['kv', 1400]:.2f}× or {most['output', 1400]:.2f}×",
            f"deck's gate reuses {deck.sites_reused:.1%} of the sites, a calibrated one "
            f"{calibrated.sites_reused:.1%}; {_speed(run)}",
        ),
        (
            "12",
            "baseline memory 199 MB",
            "675 M parameters in FP16 are 1.35 GB",
            f"cache of the calibrated gate: {calibrated.cache_bytes / 1024:.0f} KiB an image",
        ),
        (
            "14",
            "entropy falls monotonically, 4.8 to 0.8",
            f"at most ln N = {math.log(tokens):.2f}",
            f"{by_step.entropy.iloc[0]:.2f} to {by_step.entropy.iloc[-1]:.2f}, falls in "
            f"{(by_step.entropy.diff().dropna() <= 0).mean():.0%} of the steps",
        ),
        (
            "14",
            "SNR grows exponentially, 0.1 to 201",
            "log SNR would be a straight line",
            f"{by_step.snr.iloc[0]:.2g} to {by_step.snr.iloc[-1]:.3g}; correlation of log SNR with the step "
            f"{by_step.snr.map(math.log).corr(pd.Series(by_step.index, index=by_step.index, dtype=float)):.2f}",
        ),
        ("5, 14", "reuse only for SNR in [0.5, 50]", "slide 14 has 117 events at SNR above 50", _events(run)),
    ]
    return pd.DataFrame(rows, columns=["slide", "claimed", "bound", "measured"])


def _speed(run: Run) -> str:
    """The one recorded speed of a gate, so that it has one value in the whole workbook."""
    times = run.recorded("speed")
    if times is None:
        return "its speed is not measured yet"
    speedup = metrics.speedups(times, FULL.name).speedup["DQAR rule, kv"]
    return f"recorded speed {speedup:.2f}× ({run.profile.name}, {times.attrs['provenance']['device']})"


def _errors(run: Run) -> str:
    labels = run.recorded("labels-output")
    if labels is None:
        return "ρ(entropy, error) is not measured yet"
    held = policy.partial_correlation(labels, "entropy", ("step", "snr"))
    plain = labels.entropy.corr(labels.error, "spearman")
    return f"ρ(entropy, error) = {plain:+.2f}, with step and SNR held fixed {held:+.2f}"


def _events(run: Run) -> str:
    gated = gate.gated_sites(run)
    reuse = gated[(gated.family == "calibrated") & (gated.target == "kv") & (gated.decision == "reuse")]
    if reuse.empty:
        return "no reuse"
    outside = int((~reuse.snr_gate.between(0.5, 50)).sum())
    peak = reuse.groupby("step").size().idxmax()
    return f"{outside} events outside; peak at step {peak} (the deck: 25 to 35)"
