"""Notebook 09: which claims hold, and what is known of the future work (slides 16, 17)."""

from __future__ import annotations

import math

import pandas as pd

from dqar.measure.results import Run
from dqar.studies import (
    arena,
    batches,
    claims,
    layers,
    pareto,
    policy,
    qat,
    quantized_cache,
    results,
    search,
    trace,
    video,
)
from dqar.studies.compare import FULL, only


def verdicts(run: Run) -> pd.DataFrame:
    """Slide 17, claim by claim: ``claim``, ``verdict`` (holds, does not hold, not testable here), ``reason``.

    Verdicts follow from what was recorded; a claim whose measurement is missing is not testable here.
    """
    summary = results.summary(run)
    most = claims.bounds().set_index(["target", "sites"]).speedup_bound
    half = run.profile.num_inference_steps // 2
    full, plan = only(summary, method=FULL.name), only(summary, family=pareto.PLAN, budget=2)
    kv, output = (only(summary, family="DQAR rule", target=target) for target in ("kv", "output"))
    fewer = only(summary, family="fewer steps", steps=half)
    full_bytes, kv_bytes = (row.weight_bytes + row.added_bytes for row in (full, kv))
    labels = run.recorded("labels-output")
    rho = math.nan if labels is None else policy.partial_correlation(labels, "entropy", ("step", "snr"))
    lowest = trace.sites(run).entropy.min()
    tested = [
        (
            "Principled entropy and SNR metrics replace heuristics",
            rho,
            rho > 0.3,
            "Low entropy should mean a harmless reuse; with step and SNR held fixed, the rank correlation of entropy "
            f"and error is {rho:+.2f} (n = {0 if labels is None else len(labels):,}). "
            f"The lowest entropy of a site (mean of {run.profile.num_samples} images) is {lowest:.1f} nats, the deck's "
            "threshold 2.0.",
        ),
        (
            "23 % speedup",
            kv.speedup,
            kv.speedup >= 1.23,
            f"K/V reuse ran at {kv.speedup:.2f} ({kv.speedup_low:.2f} to {kv.speedup_high:.2f}) times full compute's "
            f"speed here, output reuse at {output.speedup:.2f}. "
            f"On DiT-XL/2, K and V reused at 47 of 1,400 sites (28 layers × 50 steps) save "
            f"{1 - 1 / most['kv', 47]:.1%} of the MACs, at all sites {1 - 1 / most['kv', 1400]:.0%}."
            + ("" if math.isnan(plan.speedup) else f" A plan of the steps: {plan.speedup:.2f}× at {plan.psnr:.0f} dB."),
        ),
        (
            "18 % less memory",
            kv_bytes / full_bytes,
            kv_bytes <= 0.82 * full_bytes,
            f"A cache adds memory and the weights stay: weights and peak of four images come to "
            f"{kv_bytes / full_bytes:.2f} times full compute's.",
        ),
    ]
    truly_fid = run.profile.distance == "FID"
    growth = "Not recorded yet: make results."
    if not math.isnan(kv.fd_growth):
        name = run.profile.distance if truly_fid else f"No FID, but {run.profile.distance}"
        growth = (
            f"{name}: {kv.fd_growth:+.2f} ({kv.fd_growth_low:+.2f} to {kv.fd_growth_high:+.2f}) at "
            f"{kv.macs_speedup:.2f}× fewer MACs; {half} steps: {fewer.fd_growth:+.2f} at {fewer.macs_speedup:.2f}×."
        )
    if truly_fid:
        tested.append(("FID grows by less than 1", kv.fd_growth, kv.fd_growth < 1, growth))
    rows = [
        (
            "First to combine reuse and quantization for DiTs",
            "not testable here",
            "QuantCache and CacheQuant (2025) quantize the model and cache features, Quant-VideoGen (2026) the K and V "
            "of autoregressive video. A quantized cache across the steps of a bidirectional DiT was not found "
            "elsewhere; that no one has it can't be measured.",
        ),
        *(
            (claim, "not testable here", "Not recorded yet: make results.")
            if math.isnan(value)
            else (claim, "holds" if holds else "does not hold", reason)
            for claim, value, holds, reason in tested
        ),
        *([] if truly_fid else [("FID grows by less than 1", "not testable here", growth)]),
        (
            "Drop-in replacement, no retraining",
            "holds",
            "One call on a diffusers pipeline; bit-identical with the gate closed and after removal (tested).",
        ),
        ("Open source", "holds", "MIT licence; one command makes every figure anew."),
        (
            "Consumer GPUs, lower serving costs",
            "not testable here",
            ("A" if run.profile.device == "cuda" else "No GPU was measured; a")
            + "ttention reuse alone is beaten by fewer steps of the same sampler (appendix).",
        ),
    ]
    return pd.DataFrame(rows, columns=["claim", "verdict", "reason"])


def future_work(run: Run) -> pd.DataFrame:
    """Slide 16, direction by direction: ``direction``, ``deck``, ``verdict`` (as in ``verdicts``; not certain, where an
    interval includes both), ``measured``."""
    distance = trace.sites(run)[["layer_change", "change"]].median()
    bits = lower_bits(run, quantized_cache.quantization_quality(run), run.recorded("bits-output"))
    plan = searched(arena.recorded(run, run.profile.scheduler))
    rows = [
        *(
            (f"Lower bit-widths: INT{width}", before, *judged)
            for (width, before), judged in zip(((4, "INT8 → INT4"), (2, "INT4 → INT2")), bits, strict=True)
        ),
        ("Cross-layer sharing", "2–3× faster", *across_layers(distance, run.recorded("layers"))),
        ("Video DiTs", "reuse across frames", *across_frames(run.recorded("video"))),
        (
            "Quantization-aware training",
            "compensate INT8's errors",
            *by_tuning(run.recorded("qat"), run.recorded("history")),
        ),
        (
            "Architecture search",
            "layers, thresholds, bits",
            *by_search(run.recorded("search"), run.recorded("search-front"), plan),
        ),
        ("Production deployment", "batches, several GPUs", _verdict(None), production(run.recorded("batches"))),
    ]
    return pd.DataFrame(rows, columns=["direction", "deck", "verdict", "measured"])


def lower_bits(run: Run, quality: pd.DataFrame, mixed: pd.DataFrame | None) -> list[tuple[str, str]]:
    """Verdict and measurement of INT4 and of INT2, each in its best mode: good is a median image 40 dB from FP16's
    cache.

    Args:
        quality: of ``quantized_cache.quantization_quality``.
        mixed: ``bits-output`` of ``quantized_cache.record_bits``: below 4 bits, its fewest bytes stand beside INT2's.
    """
    names = {"kv": "K and V", "output": "attention output"}
    unquantized = quality[quality.bits == 16].set_index("target").cache_bytes
    integers = quality[(quality.bits < 16) & (quality["mode"] != "mixed")]  # which keeps K in FP16
    best = integers.loc[integers.groupby("bits")["median"].idxmax()].set_index("bits").loc[[8, 4, 2]]
    shares = best.cache_bytes / best.target.map(unquantized) * run.profile.dtype.itemsize / 2
    images = int(quality.images.iloc[0])
    beside = dict.fromkeys((4, 2), f"INT8: {best['median'][8]:.0f} dB in {shares[8]:.2f}; n = {images}")
    if mixed is not None:
        points, number = arena.standings(mixed, "reference", ("family", "share")), mixed.image.nunique()
        fewest = points[points.family == "mixed"].nsmallest(1, "share").iloc[0]
        beside[2] = f"by layer: {fewest['median']:.0f} dB in {fewest.share:.2f}; n = {images}"
        beside[2] += f", {number}" * (number != images)
    judged = []
    for bits in (4, 2):
        row = best.loc[bits]
        fitted = ", levels fitted" if row["mode"].endswith("fitted") else ""
        judged.append(
            (
                _verdict(row["median"] >= 40),
                f"{row['median']:.0f} dB in {shares[bits]:.2f} of FP16's bytes ({names[row.target]}{fitted}); "
                + beside[bits],
            )
        )
    return judged


def searched(table: pd.DataFrame | None) -> str:
    """What fitting which steps to compute gives at 3× fewer MACs, beside the strongest rivals; "" if not recorded.

    Args:
        table: of ``arena.recorded``.
    """
    best = None if table is None else arena.strongest(arena.verdicts(table))
    if table is None or best is None or not ((best.budget == 3) & (best.target == "reference")).any():
        return ""
    row = only(best, budget=3, target="reference", measure="median")
    return f"fitted steps at 3×: median {row.ours:.1f} dB (best rival {row.theirs:.1f}); n = {table.image.nunique():,}"


def across_layers(distance: pd.Series, table: pd.DataFrame | None) -> tuple[str, str]:
    """Verdict and measurement of sharing between layers: it holds where it saves half of the computation.

    Args:
        distance: medians of ``layer_change`` and ``change`` of attention outputs.
        table: of ``layers.record_layers``.
    """
    words = (
        f"outputs are {distance.layer_change:.0%} away from the layer before, {distance.change:.0%} from the step "
        "before (medians)"
    )
    if table is None:
        return _verdict(distance.layer_change < distance.change), words
    most = only(layers.summary(table), family=layers.ALONE, theta=0.0)
    return _verdict(most.macs_speedup >= 2), (
        f"every other layer's map shared, the most: {most.macs_speedup:.2f}× at {most['median']:.1f} dB (n = "
        f"{table.image.nunique()}); {words}"
    )


def across_frames(table: pd.DataFrame | None) -> tuple[str, str]:
    """Verdict and measurement of reuse over frames: it holds where it keeps as much as reuse over steps.

    Args:
        table: of ``video.record_video``.
    """
    if table is None:
        return _verdict(None), "not recorded yet: make results"
    steps, frames, plan = video.halves(table)
    return _verdict(frames["median"] >= steps["median"]), (
        f"every other result in the blocks: {frames['median']:.1f} dB over frames, {steps['median']:.1f} over steps; a "
        f"plan {plan['median']:.1f} dB (medians, n = {table.image.nunique()} videos)"
    )


def by_tuning(table: pd.DataFrame | None, history: pd.DataFrame | None) -> tuple[str, str]:
    """Verdict and measurement of tuning with the quantizer in the loop: ``qat.compensates``.

    Args:
        table: of ``qat.record_qat``.
        history: of ``plans.record_history``, its cheaper rival.
    """
    if table is None:
        return _verdict(None), "not measured yet: make results"
    return _verdict(qat.compensates(table)), qat.in_short(table, history)


def by_search(trials: pd.DataFrame | None, front: pd.DataFrame | None, plan: str) -> tuple[str, str]:
    """Verdict and measurement of searching layers, thresholds and bits: it holds where it is ahead of settings by hand,
    and is not certain where the interval of its lead includes 0.

    Both take 2× fewer MACs or more, and are judged on the same images, which nothing was searched on.

    Args:
        trials, front: of ``search.record_search``; the settings by hand are ``search.BY_HAND``.
        plan: of ``searched``, which finds steps alone.
    """
    if trials is None or front is None:
        return _verdict(None), "; ".join(filter(None, ("layers, thresholds and bits: no search is recorded", plan)))

    best, by_hand = (
        table.query("macs_speedup.round(2) >= 2").nlargest(1, "psnr_5th") for table in search.remeasured(trials, front)
    )
    if best.empty or by_hand.empty:
        return _verdict(None), "; ".join(filter(None, ("nothing searched takes half of the MACs", plan)))
    [ours], [theirs] = best.itertuples(), by_hand.itertuples()
    before, after = (front[front.trial == row.trial].sort_values("image").mse.to_numpy() for row in (theirs, ours))
    gain, low, high = arena.gain(before, after, "5th percentile")
    medians = [arena.MEASURES["median"](errors) for errors in (after, before)]
    words = (
        f"5th percentile {ours.psnr_5th:.1f} dB at {ours.macs_speedup:.1f}×, by hand {theirs.psnr_5th:.1f} at "
        f"{theirs.macs_speedup:.1f}×: {gain:+.1f} ({low:+.1f} to {high:+.1f}); medians {medians[0]:.1f} and "
        f"{medians[1]:.1f}; n = {len(after)}"
    )
    verdict = "not certain" if low <= 0 <= high else _verdict(low > 0)
    return verdict, "; ".join(filter(None, (words, plan)))


def production(table: pd.DataFrame | None) -> str:
    """What batches do to speed and to a gate; several GPUs aren't there.

    Args:
        table: of ``batches.record_batches``.
    """
    processes = "two CPU processes tested"
    if table is None:
        return f"one gate decides for a whole batch; {processes}"
    speed, most = batches.points(table).set_index(["method", "together"]).speed, table.together.max()
    change, low, high = batches.sharing(table)
    return (
        f"{most} at once: {speed[FULL.name, most]:.2f}× as fast; one gate for all: {change:+.1f} dB in the median "
        f"({low:+.1f} to {high:+.1f}; n = {table.image.nunique()}); {processes}"
    )


def _verdict(holds: bool | None) -> str:
    return "not testable here" if holds is None else "holds" if holds else "does not hold"
