"""Plans of the forecast engine: which steps are computed, and the weights of the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqar.plan import FORECAST_FORMAT, is_index, lagrange_weights, reading, steps_in_words, write_json


@dataclass(frozen=True)
class ForecastPlan:
    """The steps at which the whole model is computed; at all others its guided output is forecast from the cache.

    The forecast of a step is a weighted sum of what the cache holds, newest first, and of the latents:
    ``Σ_k a_k cond_k + Σ_k b_k uncond_k + c x_t``, with weights that ``dqar.forecast.fit`` fits: small kernels by which
    tensors are convolved, the same for all channels. A computed step has weights too, by which its fresh output is
    corrected; without any, it passes as it is.

    To that a step may add a read-out of the hidden states that the newest computed step gave to the model's last layer:
    that layer only reads the output from them, but they tell more of where it goes.

    Attributes:
        weights: one row per step: ``(a_1 ... a_K, b_1 ... b_K, c)``, or without guidance ``(a_1 ... a_K, c)``, with K
            the number of outputs cached by then, ``history`` at most, and each weight a kernel of ``kernel`` ×
            ``kernel`` numbers, row by row; ``()``: the fresh output as it is.
        computed: the steps that compute.
        timesteps: of the scheduler that it was made with.
        guidance_scale: of the runs that it was made for; 1: without guidance.
        history: outputs that are kept.
        model: ``describe_model`` of the model that it was made for.
        kernel: side of the kernels, odd; 1: each weight is one number.
        readouts: one row per step: a matrix from a token's hidden states of both branches, cond first, to what is added
            to the forecast of its patch (rows, columns and channels of it), row by row; ``()``: nothing is added.
        provenance: where it comes from, and with which errors; saved with it, not compared.
        scheduler: class name of the sampler that its weights were fitted under; ``None``: any, as of an extrapolation.

    Raises:
        ValueError: step 0 isn't computed as it is, or a row of the wrong length, naming it.
    """

    weights: tuple[tuple[float, ...], ...] = field(repr=False)
    computed: frozenset[int]
    timesteps: tuple[float, ...] = field(repr=False)
    guidance_scale: float
    history: int
    model: str
    kernel: int = 1
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    readouts: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    scheduler: str | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "readouts"):
            object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in getattr(self, name)))
        object.__setattr__(self, "readouts", self.readouts or ((),) * len(self.weights))
        object.__setattr__(self, "computed", frozenset(self.computed))
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))
        steps = len(self.timesteps)
        if not is_index(self.history, None) or self.history < 1:
            raise ValueError(f"history={self.history!r} is not accepted: an int of 1 or more")
        if not is_index(self.kernel, None) or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel!r} is not accepted: an odd int of 1 or more")
        if len(self.weights) != steps or not all(is_index(step, steps) for step in self.computed):
            raise ValueError(f"{len(self.weights)} rows and computed steps {sorted(self.computed)} for {steps} steps")
        if 0 not in self.computed or self.weights[0]:
            raise ValueError("step 0 is not accepted: it has nothing to forecast from, and no weights")
        for step, row in enumerate(self.weights):
            length = ((2 if self.guided else 1) * self.cached_at(step) + 1) * self.kernel**2
            if not all(map(math.isfinite, row)) or len(row) not in (
                (0, length) if step in self.computed else (length,)
            ):
                raise ValueError(f"the {len(row)} weights of step {step} are not accepted: {length} finite numbers")
        sizes = {len(row) for row in self.readouts}
        finite = all(math.isfinite(number) for row in self.readouts for number in row)
        if len(self.readouts) != steps or len(sizes - {0}) > 1 or not finite:
            raise ValueError(
                f"{len(self.readouts)} readouts of {sorted(sizes)} numbers are not accepted: one size, finite"
            )
        for step, row in enumerate(self.readouts):
            if row and not self.weights[step]:
                raise ValueError(f"step {step} is not accepted: a readout, but no weights that it adds to")

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self.guidance_scale > 1

    @property
    def num_inference_steps(self) -> int:
        """Denoising steps of the runs that it was made for."""
        return len(self.timesteps)

    @property
    def macs_speedup(self) -> float:
        """Steps over computed steps."""
        return len(self.timesteps) / len(self.computed)

    def cached_at(self, step: int) -> int:
        """Outputs that a step's forecast can draw on, its own fresh one included."""
        return min(self.history, sum(done <= step for done in self.computed))

    def drawn_on(self, step: int) -> list[int]:
        """The computed steps whose outputs a step's forecast draws on, newest first, its own included."""
        return sorted((done for done in self.computed if done <= step), reverse=True)[: self.history]

    def check_run(self, timesteps: Sequence[float], scheduler: str | None = None) -> None:
        """Raises ``ValueError`` for a run with other timesteps or another sampler, saying how they differ."""
        if None not in (scheduler, self.scheduler) and scheduler != self.scheduler:
            raise ValueError(
                f"the plan was fitted under {self.scheduler}, this run uses {scheduler}: make one for this sampler"
            )
        if len(timesteps) != len(self.timesteps):
            raise ValueError(
                f"the plan was made for {steps_in_words(len(self.timesteps))}, this run takes {len(timesteps)}: "
                "make one for this number of steps"
            )
        for step, (wanted, given) in enumerate(zip(self.timesteps, timesteps, strict=True)):
            if wanted != float(given):
                raise ValueError(
                    f"the plan was made for another spacing of the timesteps: step {step} is at {wanted:g}, "
                    f"in this run at {float(given):g}"
                )

    def check_guidance(self, scale: float, noise: float) -> None:
        """Raises ``ValueError`` for a run of another guidance scale, which rounding may have moved by ``noise``."""
        if abs(scale - self.guidance_scale) > 1e-4 * self.guidance_scale + noise:
            run = "is without guidance" if abs(scale - 1) < 1e-3 else f"has {scale:.4g}"
            raise ValueError(
                f"the plan was made for guidance_scale={self.guidance_scale:g}, this run {run}: make one for this "
                "guidance"
            )

    def check_latents(self, shape: Sequence[int], sample_size: int | None) -> None:
        """Raises ``ValueError`` for latents ``[C, H, W]`` of another size than the model was made for, as plans are."""
        if sample_size is not None and any(side != sample_size for side in shape[-2:]):
            raise ValueError(
                f"the plan was made for {sample_size} x {sample_size} latents, these are {shape[-2]} x {shape[-1]}: "
                "make one for this size"
            )

    def check_model(self, model: str) -> None:
        """Raises ``ValueError`` for another model than the plan's."""
        if model != self.model:
            raise ValueError(f"the plan was made for {self.model}, this is {model}: make one for this model")

    def save(self, path: str | Path) -> None:
        """Writes JSON: a row of weights per step, and which are computed."""
        content = {"format": FORECAST_FORMAT, **vars(self)}
        write_json(path, {**content, "computed": sorted(self.computed), "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> ForecastPlan:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: truncated, or no plan.
        """
        with reading(path, FORECAST_FORMAT) as content:
            return cls(**content)


def extrapolation(
    computed: Collection[int], timesteps: Sequence[float], guidance_scale: float, model: str, order: int = 1
) -> ForecastPlan:
    """The plainest plan: the guided output continued in a straight line (``order=1``), or as it was last (0).

    The polynomial is in the step's index, through the last ``order + 1`` computed outputs. ``guidance_scale`` is 1 for
    a run without guidance.
    """
    rows: list[tuple[float, ...]] = []
    done: list[int] = []
    for step in range(len(timesteps)):
        if step in computed:
            done.insert(0, step)
            rows.append(())
            continue
        line = lagrange_weights(done[: order + 1], step)
        cond = [w * guidance_scale for w in line]
        uncond = [w * (1 - guidance_scale) for w in line] if guidance_scale > 1 else []
        rows.append((*cond, *uncond, 0.0))
    return ForecastPlan(tuple(rows), frozenset(computed), tuple(timesteps), guidance_scale, order + 1, model)
