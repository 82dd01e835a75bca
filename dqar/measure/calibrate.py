"""Proposes a gate for any model, for a share of sites or a PSNR: ``dqar calibrate`` is the command."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from dqar.checks import check
from dqar.config import DQARConfig
from dqar.families import family
from dqar.measure import metrics
from dqar.measure.recorders import ChangeRecorder
from dqar.measure.sampling import LOOK, sample
from dqar.models.profiles import Profile

KEYS = ["run", "step", "layer", "branch"]


def trace_sites(pipe: DiffusionPipeline, profile: Profile, seed: int, num_samples: int | None = None) -> pd.DataFrame:
    """Every site of an untouched denoising: the trace, with the ``change`` of its output since the step before.

    Of captions, ``prompt_length`` is a run's mean number of tokens.
    """
    lengths: list[float] = []

    def look(_module: torch.nn.Module, _args: tuple, named: dict) -> None:
        mask = named.get("encoder_attention_mask")
        if mask is not None:
            half = family(pipe.transformer).branch_order.index("cond")
            lengths.append(mask.chunk(2)[half].sum(1).float().mean().item())

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    with hook, ChangeRecorder(pipe.transformer, profile.num_inference_steps) as changes:
        drawn = sample(pipe, profile, seed, LOOK, num_samples=num_samples, description="trace")
    table = drawn.traced.to_pandas().merge(pd.DataFrame(changes.rows), on=KEYS, how="left")
    if lengths:
        table["prompt_length"] = table.run.map(dict(enumerate(lengths[:: profile.num_inference_steps])))
    return table


def propose_gate(sites: pd.DataFrame, share: float = 0.5, snr_range: tuple[float, float] = (0.5, 50.0)) -> DQARConfig:
    """A gate whose entropy threshold lies above ``share`` of the entropies inside ``snr_range``.

    Args:
        sites: from ``trace_sites``.

    Raises:
        ValueError: ``share`` outside (0, 1], or no site inside ``snr_range``.
    """
    check("share", share, 0 < share <= 1, "more than 0, at most 1")
    inside = sites[sites.snr.between(*snr_range)]
    check(
        "snr_range", snr_range, not inside.empty, f"the trace's SNR is {sites.snr.min():.3g} to {sites.snr.max():.3g}"
    )
    # Just above the quantile, since the gate asks for strictly less.
    # As the base of slide 5's τ(p), which the gate scales by the length of captions.
    scale = (inside.prompt_length / 64) ** 0.5 if "prompt_length" in inside else 1.0
    threshold = math.nextafter(float((inside.entropy / scale).quantile(share)), math.inf)
    return DQARConfig(entropy_threshold=threshold, snr_range=snr_range, schedule="all")


def propose_snr_range(sites: pd.DataFrame) -> tuple[float, float]:
    """The SNRs of the three quarters of the steps at which a reuse errs least, first to last of them.

    Steps are ranked by the mean ``change`` of all their sites; the range is rounded outwards to two digits.
    """
    by_step = sites.dropna(subset=["change"]).groupby("step")[["change", "snr"]].mean()
    calm = by_step[by_step.change <= by_step.change.quantile(0.75)]
    return _round(calm.snr.min(), math.floor), _round(calm.snr.max(), math.ceil)


def calibrate(
    pipe: DiffusionPipeline,
    profile: Profile,
    seed: int,
    *,
    share: float | None = None,
    psnr: float | None = None,
    base: DQARConfig | None = None,
    num_samples: int = 4,
    trials: int = 6,
) -> tuple[DQARConfig, pd.DataFrame]:
    """Finds ``entropy_threshold`` and ``snr_range`` for a wanted share of reuse or a wanted quality, by trying.

    A short trace proposes the SNR range and the order of thresholds; bisection over the threshold's quantile, each
    trial a real run of the gate, finds the one that comes nearest (for ``psnr``: the cheapest that keeps it).

    Args:
        share: wanted share of sites reused, in (0, 1); or
        psnr: wanted PSNR to full compute, in dB.
        base: everything but threshold and range; the deck's, with all layers eligible, if left out.

    Returns:
        The proposed configuration, and one row a trial: ``quantile``, ``entropy_threshold``, ``share``, ``psnr``.

    Raises:
        ValueError: not exactly one goal, or one that no threshold reaches (says what was reached).
    """
    if (share is None) == (psnr is None):
        raise ValueError(f"share={share!r}, psnr={psnr!r} is not accepted: give one of them")
    check("share", share, share is None or 0 < share < 1, "more than 0, less than 1")
    sites = trace_sites(pipe, profile, seed, num_samples)
    snr_range = propose_snr_range(sites)
    reference = sample(pipe, profile, seed, num_samples=num_samples, description="reference").images
    base = base or DQARConfig(schedule="all")
    rows, low, high = [], 0.0, 1.0
    quantile = 1.0  # the widest gate first: it tells whether the goal can be reached
    for _ in tqdm(range(trials), desc="calibrate", leave=False):
        gate = propose_gate(sites, max(quantile, 1e-6), snr_range)
        config = dataclasses.replace(base, entropy_threshold=gate.entropy_threshold, snr_range=snr_range)
        drawn = sample(pipe, profile, seed, config, num_samples=num_samples, description=f"quantile {quantile:.2f}")
        reused = float((drawn.traced.to_pandas().decision == "reuse").mean())
        rows.append((quantile, config, reused, metrics.mean_psnr(drawn.images, reference)))
        too_open = reused > share if share is not None else rows[-1][3] < (psnr or 0)
        if quantile == 1.0 and not too_open:
            break
        low, high = (low, quantile) if too_open else (quantile, high)
        quantile = (low + high) / 2
    if share is not None:
        best = min(rows, key=lambda row: abs(row[2] - share))
        check("share", share, best[2] > share / 2, f"the widest gate, SNR in {snr_range}, reuses {rows[0][2]:.1%}")
    else:
        kept = [row for row in rows if row[3] >= (psnr or 0)]
        check("psnr", psnr, bool(kept), f"the narrowest gate tried reaches {max(row[3] for row in rows):.1f} dB")
        best = max(kept, key=lambda row: row[2])
    table = pd.DataFrame(
        [(q, config.entropy_threshold, reused, quality) for q, config, reused, quality in rows],
        columns=["quantile", "entropy_threshold", "share", "psnr"],
    )
    return best[1], table


def _round(value: float, direction) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{direction(value / unit) * unit:.6g}")
