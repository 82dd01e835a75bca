"""Notebook 09: which claims hold, and what is known of the future work (slides 16, 17)."""

from __future__ import annotations

import math

import pandas as pd

from dqar.measure.results import Run
from dqar.studies import arena, batches, claims, pareto, policy, quantized_cache, results, search, trace
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
            f"Low entropy should mean a harmless reuse; once step and SNR are known, ρ(entropy, error) is {rho:+.2f}. "
            f"The lowest entropy of a site is {lowest:.1f} nats, the deck's threshold 2.0.",
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
            "A statement about the literature; what is combined here is a gate and an INT8 cache.",
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
            + "ttention reuse alone is beaten by fewer steps of the same sampler (slide 8).",
        ),
    ]
    return pd.DataFrame(rows, columns=["claim", "verdict", "reason"])


def future_work(run: Run) -> pd.DataFrame:
    """Slide 16, direction by direction: ``direction``, ``deck``, ``verdict`` (as in ``verdicts``), ``measured``."""
    distance = trace.sites(run)[["layer_change", "change"]].median()
    verdict, found = searched(arena.recorded(run, run.profile.scheduler))
    rows = [
        ("Lower bit-widths", "INT8 → INT4 → INT2", *lower_bits(run, quantized_cache.quantization_quality(run))),
        (
            "Cross-layer sharing",
            "2–3× more speed",
            _verdict(distance.layer_change < distance.change),
            f"outputs are {distance.layer_change:.0%} away from the layer before, "
            f"{distance.change:.0%} from the step before (medians)",
        ),
        ("Video DiTs", "reuse across frames", _verdict(None), "no video model here"),
        ("Quantization-aware training", "compensate INT8's errors", _verdict(None), "nothing is retrained here"),
        (
            "Architecture search",
            "layers, thresholds, bits",
            verdict,
            f"{found}{by_search(run.recorded('search-front'))}",
        ),
        ("Production deployment", "batches, several GPUs", _verdict(None), production(run.recorded("batches"))),
    ]
    return pd.DataFrame(rows, columns=["direction", "deck", "verdict", "measured"])


def lower_bits(run: Run, quality: pd.DataFrame) -> tuple[str, str]:
    """Verdict and measurement of INT8, INT4 and INT2, each in its best mode: good is an image 40 dB from FP16's cache.

    Args:
        quality: of ``quantized_cache.quantization_quality``.
    """
    unquantized = quality[quality.bits == 16].set_index("target").cache_bytes
    integers = quality[(quality.bits < 16) & (quality["mode"] != "mixed")]  # which keeps K in FP16
    best = integers.loc[integers.groupby("bits").psnr_cache.idxmax()].set_index("bits").loc[[8, 4, 2]]
    shares = best.cache_bytes / best.target.map(unquantized) * run.profile.dtype.itemsize / 2
    fitted = best.index[best["mode"].str.endswith("fitted")]
    levels = f"; levels fitted in {' and '.join(map(str, fitted))} bits" if len(fitted) else ""
    return _verdict(best.psnr_cache[2] >= 40), (
        f"8, 4, 2 bits: {', '.join(best.psnr_cache.map('{:.0f}'.format))} dB in "
        f"{', '.join(shares.map('{:.2f}'.format))} of FP16's bytes{levels}"
    )


def searched(table: pd.DataFrame | None) -> tuple[str, str]:
    """Verdict and measurement of searching what to compute: plans at 3× fewer MACs beside the strongest rivals.

    Args:
        table: of ``arena.recorded``.
    """
    found = None if table is None else arena.strongest(arena.verdicts(table))
    if table is None or found is None or not ((found.budget == 3) & (found.target == "reference")).any():
        return _verdict(None), "not recorded yet: make results"
    at = found[(found.budget == 3) & (found.target == "reference")].set_index("measure").loc[list(arena.SHOWN)]
    words = ", ".join(f"{measure} {row.ours:.1f} dB (best rival {row.theirs:.1f})" for measure, row in at.iterrows())
    return _verdict(at.verdict.eq("ahead").all()), f"a fitted plan at 3×: {words}; n = {table.image.nunique():,}"


def by_search(front: pd.DataFrame | None) -> str:
    """What a search without any fitting found: its best at 2× fewer MACs or more.

    Args:
        front: of ``search.record_search``.
    """
    best = None if front is None else search.points(front).query("macs_speedup.round(2) >= 2").nlargest(1, "psnr_5th")
    if front is None or best is None or best.empty:
        return ""
    [row] = best.itertuples()
    images = front.image.nunique()
    return f"; searched settings at {row.macs_speedup:.1f}×: 5th percentile {row.psnr_5th:.1f} dB; n = {images}"


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
