"""The deck's claims: errata of notebook 00, verdicts of slide 17, what of slide 16 is measured already."""

from __future__ import annotations

import math

import pandas as pd

from dqar import decisions, experiments, outcomes, pareto, stats
from dqar.methods import names_at
from dqar.results import Run


def errata(run: Run) -> pd.DataFrame:
    """One row per doubtful statement of the slides: slide, claimed, bound (fact or limit), measured (this run)."""
    sites, gates = experiments.sites(run), experiments.gates(run).set_index("method")
    schedules = experiments.schedules(run).set_index("method")
    deck, calibrated = gates.loc["deck's gate, kv"], gates.loc["calibrated, kv"]
    by_step = sites.groupby("step")[["entropy", "snr"]].mean()
    tokens, layers = int(sites.tokens.iloc[0]), sites.layer.nunique()
    low, high = sites.entropy.min(), sites.entropy.max()
    bounds = experiments.bounds().set_index(["target", "sites"]).speedup_bound
    relations = experiments.relations(sites)
    every = {target: schedules.loc[f"static 2, {target}"] for target in ("kv", "output")}
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
            "ρ(entropy, error) should be clearly positive",
            f"ρ = {relations['entropy']:+.2f} overall, {relations['entropy_within_step']:+.2f} within a step "
            f"(SNR within a layer {relations['snr_within_layer']:+.2f})",
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
            f"47 of 1400 sites save at most {1 - 1 / bounds['kv', 47]:.1%} (kv) or {1 - 1 / bounds['output', 47]:.1%} "
            f"(output); all sites {bounds['kv', 1400]:.2f}× or {bounds['output', 1400]:.2f}×",
            f"deck's gate: {deck.sites_reused:.1%} of sites, {deck.speedup:.2f}×; calibrated: "
            f"{calibrated.sites_reused:.1%}, {calibrated.speedup:.2f}× (small model, CPU)",
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


def _events(run: Run) -> str:
    gated = experiments.gated_sites(run)
    reuse = gated[(gated.method == "calibrated, kv") & (gated.decision == "reuse")]
    if reuse.empty:
        return "no reuse"
    outside = int((~reuse.snr_gate.between(0.5, 50)).sum())
    peak = reuse.groupby("step").size().idxmax()
    return f"{outside} events outside; peak at step {peak} (the deck: 25 to 35)"


def verdicts(run: Run) -> pd.DataFrame:
    """Slide 17, claim by claim: ``claim``, ``verdict`` (holds, does not hold, not testable here), ``reason``.

    Verdicts follow from what was recorded; a claim whose measurement is missing is not testable here.
    """
    summary = outcomes.summary(run).set_index("method")
    most = experiments.bounds().set_index(["target", "sites"]).speedup_bound
    half = f"{run.profile.num_inference_steps // 2} steps"
    plan_name = names_at(run.profile, 2)["DQAR plan"]
    full, kv, output, fewer, plan = (
        summary.loc[name] if name in summary.index else pd.Series(math.nan, index=summary.columns)
        for name in ("full compute", "DQAR rule, kv", "DQAR rule, output", half, plan_name)
    )
    full_bytes, kv_bytes = (row.weight_bytes + row.added_bytes for row in (full, kv))
    labels = run.recorded("labels-output")
    rho = math.nan if labels is None else decisions.partial_correlation(labels, "entropy", ("step", "snr"))
    tested = [
        (
            "Principled entropy and SNR metrics replace heuristics",
            rho,
            rho > 0.3,
            f"Low entropy should mean a harmless reuse; once step and SNR are known, ρ(entropy, error) is {rho:+.2f}. "
            "The deck's threshold of 2.0 never opens on this model.",
        ),
        (
            "23 % speedup",
            kv.speedup,
            kv.speedup >= 1.23,
            f"K/V reuse ran at {kv.speedup:.2f}× of full compute's speed here, output reuse at {output.speedup:.2f}×; "
            f"47 of 1400 sites can save {1 - 1 / most['kv', 47]:.1%}, all of them {1 - 1 / most['kv', 1400]:.0%}."
            + ("" if math.isnan(plan.speedup) else f" A plan of the steps: {plan.speedup:.2f}× at {plan.psnr:.0f} dB."),
        ),
        (
            "18 % less memory",
            kv_bytes / full_bytes,
            kv_bytes <= 0.82 * full_bytes,
            f"A cache adds memory and the weights stay: weights and peak of four images come to "
            f"{kv_bytes / full_bytes:.2f} of full compute's.",
        ),
        (
            "FID grows by less than 1",
            kv.fd_growth_high,
            kv.fd_growth_high < 1,
            f"FD-digits, not FID: {kv.fd_growth:+.2f} ({kv.fd_growth_low:+.2f} to {kv.fd_growth_high:+.2f}) at "
            f"{kv.macs_speedup:.2f}× fewer MACs; {half}: {fewer.fd_growth:+.2f} at {fewer.macs_speedup:.2f}×.",
        ),
    ]
    rows = [
        (
            "First to combine reuse and quantization for DiTs",
            "not testable here",
            "A statement about the literature; what is combined here is a gate and an INT8 cache.",
        ),
        *(
            (claim, "not testable here", "Not recorded yet: make results.")
            if math.isnan(value)
            else (claim, "holds" if holds else "does not hold", reason)
            for claim, value, holds, reason in tested
        ),
        (
            "Drop-in replacement, no retraining",
            "holds",
            "One call on a diffusers pipeline; bit-identical with the gate closed and after removal (tested).",
        ),
        ("Open source", "holds", "MIT licence; one command makes every figure anew."),
        (
            "Consumer GPUs, lower serving costs",
            "not testable here",
            "No GPU was measured; attention reuse alone is beaten by fewer steps of the same sampler (slide 8).",
        ),
    ]
    return pd.DataFrame(rows, columns=["claim", "verdict", "reason"])


def future_work(run: Run) -> pd.DataFrame:
    """Slide 16, direction by direction: ``direction``, ``deck``, ``measured`` (or that it isn't)."""
    quality = experiments.quantization_quality(run)
    unquantized = quality[quality.bits == 16].set_index("target").cache_bytes
    found = []
    for width in (8, 4, 2):
        part = quality[quality.bits == width]
        best = part.loc[part.psnr_cache.idxmax()]
        share = best.cache_bytes / unquantized[best.target] * run.profile.dtype.itemsize / 2
        found.append(f"INT{width} {best.psnr_cache:.0f} dB in {share:.2f}")
    distance = experiments.sites(run)[["layer_change", "change"]].median()
    labels, oracle = run.recorded("labels-output"), run.recorded("oracle")
    searched = "not measured yet"
    if labels is not None and oracle is not None:
        runs = decisions.accepted_runs(oracle).set_index("share").psnr
        searched = f"sites chosen by measured error: {runs[0.4]:.1f} dB with 40 % of all sites reused (notebook 06)"
    compared = pareto.recorded(run, run.profile.scheduler)
    if compared is not None:
        found_at = pareto.verdicts(pareto.summary(compared), (3,)).dropna(subset=["ours"])
        for row in found_at[found_at.target == "reference"].itertuples():
            searched += f"; planned steps: {row.ours:.1f} dB at 3× fewer MACs, best peer {row.peer:.1f} (notebook 11)"
    rows = [
        (
            "Lower bit-widths",
            "INT2: 4× less memory than INT8",
            f"best mode to an unquantized cache, and share of FP16's bytes: {', '.join(found)}",
        ),
        (
            "Cross-layer sharing",
            "2–3× more speed",
            f"an attention output is {distance.layer_change:.0%} away from the layer before, "
            f"{distance.change:.0%} from the step before (median)",
        ),
        ("Video DiTs", "reuse across frames", "not measured: no video model here"),
        ("Quantization-aware training", "learn to compensate INT8 errors", "not measured: nothing is retrained here"),
        ("Architecture search", "layers, thresholds, bits per layer", searched),
        (
            "Production deployment",
            "batches, several GPUs",
            "images don't depend on each other's cache scales (tested); one gate decides for a whole batch; "
            "several GPUs: not measured",
        ),
    ]
    return pd.DataFrame(rows, columns=["direction", "deck", "measured"])
