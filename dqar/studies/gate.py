"""Notebook 02: whether low entropy means that reuse is safe (slide 5)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from dqar.checks import check_count
from dqar.config import DQARConfig
from dqar.measure import metrics
from dqar.measure.calibrate import propose_gate
from dqar.measure.results import Run
from dqar.measure.sampling import LOOK, OPEN
from dqar.models.profiles import Profile
from dqar.studies.compare import FULL, Drawn, Method, compare_all, draw
from dqar.studies.trace import sites


def calibrated_gate(run: Run) -> DQARConfig:
    """The gate of every figure: the one that was recorded for slide 12; where none was, one of this run's trace."""
    labels = run.recorded("labels-output")
    return propose_gate(sites(run) if labels is None else labels)


def gate_methods(run: Run) -> list[Method]:
    """The gates that slides 5 and 12 are about: closed, the deck's, and one calibrated on this model."""
    gates = {"deck's gate": DQARConfig(), "calibrated": calibrated_gate(run)}
    return [
        FULL,
        Method("looking only", config=LOOK),
        *(
            Method(f"{family}, {target}", family, dataclasses.replace(config, reuse_target=target))
            for family, config in gates.items()
            for target in ("kv", "output")
        ),
    ]


def gates(run: Run) -> pd.DataFrame:
    """Quality and MACs of each gate: ``compare.summarize``."""
    return run.table("gates", lambda: compare_all(gate_methods(run), run.profile, run.seed))


def gated_sites(run: Run, methods: Sequence[Method] | None = None) -> pd.DataFrame:
    """The full trace of four images, site by site, with ``Method.columns``.

    Args:
        methods: to trace anew, in place of the deck's gate and the calibrated one, whose table is kept.
    """

    def measure(gated: Sequence[Method]) -> pd.DataFrame:
        return pd.concat(
            method.draw(run.profile, run.seed, num_samples=4).traced.to_pandas().assign(**method.columns())
            for method in gated
        )

    if methods is not None:
        return measure(methods)
    kept = [method for method in gate_methods(run) if method.family in ("deck's gate", "calibrated")]
    return run.table("gated_sites", lambda: measure(kept))


@dataclass(frozen=True)
class Trial:
    """What one configuration decided, and what that did to cost and images.

    Attributes:
        config: that was tried.
        decisions: the trace, a row a site: ``DQARSession.trace.to_pandas()``.
        share: of the sites that were reused.
        macs_speedup: full compute's multiply-accumulates over these, both counted as they ran.
        psnr: dB of the mean squared error to full compute of the same seeds; ``inf`` if identical.
        images: how many were drawn.
    """

    config: DQARConfig
    decisions: pd.DataFrame
    share: float
    macs_speedup: float
    psnr: float
    images: int


def try_gate(run: Run, config: DQARConfig, images: int = 2) -> Trial:
    """Draws a few images with ``config`` and without, and compares them: a second or two on the digits model.

    Raises:
        ValueError: ``images`` is below 1.
    """
    check_count("images", images, 1)
    full = _full_compute(run.profile, run.seed, images)
    drawn = draw(Method("trial", config=config), run.profile, run.seed, num_samples=images)
    assert drawn.trace is not None  # with a configuration there is one
    psnr = metrics.mean_psnr(drawn.images, full.images)
    return Trial(config, drawn.trace, drawn.sites_reused, full.macs / drawn.macs, psnr, images)


@functools.lru_cache(maxsize=4)
def _full_compute(profile: Profile, seed: int, images: int) -> Drawn:
    return draw(FULL, profile, seed, num_samples=images)


def sample_methods(run: Run) -> list[Method]:
    """Full compute, the calibrated gate, and reuse at every second step, also in few bits."""
    calibrated = next(m for m in gate_methods(run) if m.family == "calibrated" and m.columns()["target"] == "output")
    static = dataclasses.replace(OPEN, schedule="static")
    return [
        FULL,
        dataclasses.replace(calibrated, name="calibrated gate, output"),
        Method("every 2nd step, output", config=dataclasses.replace(static, reuse_target="output")),
        Method("every 2nd step, kv, INT2", config=dataclasses.replace(static, quantize_bits=2)),
    ]


def reuse_samples(run: Run) -> dict[str, torch.Tensor]:
    """Images ``[10, C, H, W]`` of the same seeds by each of ``sample_methods``, by its name."""
    number = min(10, run.profile.num_samples)
    return {m.name: m.draw(run.profile, run.seed, num_samples=number).images for m in sample_methods(run)}
