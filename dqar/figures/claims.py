"""Figures of notebook 00: claims and configuration (slides 4, 11, 12)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import save_plain_table, save_table
from dqar.measure.results import Run, provenance
from dqar.studies import controller
from dqar.studies.compare import FULL


def slide11(run: Run) -> Figure:
    """Slide 11's configuration table beside this run's."""
    profile, source = run.profile, provenance(run.profile, run.seed)
    transformer = controller.transformer_facts(run)
    device = f"{source['device'].replace('(R)', '')}, {source['dtype']}"
    sampler = profile.scheduler.replace("dpm-solver", "DPM-Solver")
    rows = [
        ("Model", "DiT-XL/2 (28 layers, 675M params)", transformer["model"]),
        ("Hardware", "NVIDIA A100 80GB", device),
        ("Dataset", "COCO-2017 validation (128 prompts)", transformer["asked_for"]),
        ("Resolution", "256×256", transformer["resolution"]),
        ("Sampler", "DPM-Solver++ (50 steps)", f"{sampler} ({profile.num_inference_steps} steps)"),
        ("CFG scale", "7.5", f"{profile.guidance_scale:g}"),
        ("Batch size", "1", f"{profile.batch_size} (timing: 4)"),
        ("Quality", "FID", f"{profile.distance} ({profile.images:,} images), PSNR"),
    ]
    table = pd.DataFrame(rows, columns=["Parameter", "The deck", "Measured here"])
    parameters = transformer["model"].split(", ")[-1].removesuffix(" params")
    title = (
        "The deck's configuration, and this run's"
        if profile.model in ("dit-xl-2", "pixart")
        else f"Quality is measured on a model of {parameters} parameters; the deck's has 675M"
    )
    return save_table(run, "slide11", title, table, [14, 36, 40])


def slide04_claims(run: Run, errata: pd.DataFrame) -> pd.DataFrame:
    """Every doubtful statement of the slides, beside its bound and what was measured, as files; no picture.

    Args:
        errata: of ``studies.claims.errata``.
    """
    slides = {slide for slides in errata.slide for slide in slides.split(", ")}
    title = f"{len(errata)} statements on {len(slides)} slides, each beside its bound and what was measured"
    return save_plain_table(run, "slide04_claims", title, errata)


def slide12_gates(run: Run, gates: pd.DataFrame) -> Figure:
    """What each gate reuses, saves and does to the images; its time is in slide 12's table, from one recorded run."""
    method = gates.method.replace({FULL.name: "no gate", "looking only": "closed, signals measured"})
    method = method.str.replace("kv", "K and V")
    table = pd.DataFrame(
        {
            "Gate": method,
            "Sites reused": gates.sites_reused.map("{:.1%}".format),
            "MACs saved": (1 - 1 / gates.macs_speedup).map("{:.0%}".format),
            "PSNR to full compute (95%)": [
                "identical" if np.isinf(row.psnr) else f"{row.psnr:.1f} dB ({row.psnr_low:.1f} to {row.psnr_high:.1f})"
                for row in gates.itertuples()
            ],
        }
    )
    best = gates.loc[gates.macs_speedup.idxmax()]
    calibrated = gates[gates.family == "calibrated"].set_index("target")
    saved = 1 - 1 / calibrated.macs_speedup
    title = (
        f"The deck's gate reuses nothing; a calibrated one saves {saved['output']:.0%} of the MACs by the output, "
        f"{saved['kv']:.0%} by K and V, at {calibrated.psnr['output']:.0f} and {calibrated.psnr['kv']:.0f} dB"
        if (gates[gates.family == "deck's gate"].sites_reused == 0).all()
        else f"A gate saves at most {1 - 1 / best.macs_speedup:.0%} of the MACs, at {best.psnr:.0f} dB"
    )
    note = (
        f"n = {run.profile.num_samples} images; a batch decides together, so that slide 12's {run.profile.images:,} "
        "images reuse another share; MACs: counted, with those of measuring the signals"
    )
    return save_table(run, "slide12_gates", title, table, [29, 15, 15, 31], gates, note)
