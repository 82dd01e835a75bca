"""Figures of notebook 00: claims and configuration (slides 4, 11, 12)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dqar.figures.style import save_table
from dqar.measure.results import Run, provenance
from dqar.studies import controller


def slide11_configuration(run: Run) -> Figure:
    """Slide 11's configuration table beside this run's."""
    profile, source = run.profile, provenance(run.profile, run.seed)
    transformer = controller.transformer_facts(run)
    rows = [
        ("Model", "DiT-XL/2 (28 layers, 675M params)", transformer["model"]),
        ("Hardware", "NVIDIA A100 80GB", f"{source['device']}, {source['threads']} threads, {source['dtype']}"),
        (
            "Dataset",
            "COCO-2017 validation (128 prompts)",
            f"{transformer['asked_for']}, {profile.num_samples} images",
        ),
        ("Resolution", "256×256", transformer["resolution"]),
        ("Sampler", "DPM-Solver++ (50 steps)", f"{profile.scheduler} ({profile.num_inference_steps} steps)"),
        ("CFG scale", "7.5", f"{profile.guidance_scale:g}"),
        ("Batch size", "1", f"{profile.batch_size} (timing: 4)"),
        (
            "Baselines",
            "FP16 DiT; static reuse; PTQ4DiT",
            "FP32, FP16, BF16; every 2nd step; W8A8 with and without CSB; fewer steps",
        ),
        ("Metrics", "ms/step; MB RSS; reuse events; FID", "the same, with FD-digits for FID; MACs, PSNR, SSIM, class"),
    ]
    table = pd.DataFrame(rows, columns=["Parameter", "The deck", f"This run ({profile.name})"])
    return save_table(run, "slide11_configuration", "What the deck ran, and what was run here", table, [14, 38, 58])


def slide12_gates(run: Run, gates: pd.DataFrame) -> Figure:
    """What the gates cost and save on this model, in one table."""
    table = pd.DataFrame(
        {
            "Gate": gates.method,
            "Sites reused": gates.sites_reused.map("{:.1%}".format),
            "PSNR (dB)": gates.psnr.map(lambda x: "identical" if np.isinf(x) else f"{x:.1f}"),
            "MAC speedup": gates.macs_speedup.map("{:.2f}×".format),
            "Speedup (quartiles)": [
                f"{r.speedup:.2f}× ({r.speedup_low:.2f} to {r.speedup_high:.2f})" for r in gates.itertuples()
            ],
            "ms/step": gates.ms_per_step.map("{:.1f}".format),
        }
    )
    return save_table(
        run, "slide12_gates", "The gate, measured beside full compute", table, [24, 14, 12, 14, 28, 10], gates
    )
