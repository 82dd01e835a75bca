"""Plans of the forecast engine: which steps are computed, and the weights of the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dqar.checks import check, check_choice, check_count, is_count
from dqar.files import reading, write_json
from dqar.plan import BRANCHES, FORECAST_FORMAT, check_steps, is_index, lagrange_weights

HISTORY_BITS = (16, 8, 4)
"""In which a run keeps what it forecasts from; 16: as it is, outputs in the model's dtype, readouts in float64."""
Rows = tuple[tuple[float, ...], ...]
"""Numbers of each step."""
Second = tuple[int, tuple[float, float], tuple[float, float]]
"""A step, and the least and the largest guidance scale before, and from there on."""


@dataclass(frozen=True)
class ForecastPlan:
    """The steps at which the whole model is computed; at all others its output is forecast from the cache.

    Each branch of guidance is forecast from its own outputs, newest first, and from the model's input:
    ``Σ_k a_k output_k + c x_t``, with weights that ``dqar.forecast.fit`` fits: small kernels by which tensors are
    convolved, the same for all channels. A computed step has weights too, by which its fresh output is corrected;
    without any, it passes as it is.

    A step may also add a linear readout of the last hidden states, which predict how the output will change better
    than the output itself does: of those that the newest computed step gave to the model's last layer.

    A class may have weights of its own, which both branches of its images are forecast by.

    Attributes:
        weights: one row per step: ``(a_1 ... a_K, c)`` of the conditional branch, then of the unconditional one where
            there is guidance, with K the number of outputs cached by then, ``history`` at most, and each weight a
            ``kernel``, row by row; ``()``: the fresh output as it is.
        computed: the steps that compute.
        timesteps: of the runs that it was made for; of a run that begins late, those that it visits.
        guidance: the least and the largest guidance scale that it was made for; ``(1, 1)``: without guidance.
        history: outputs that are kept of each branch.
        model: ``describe_model`` of the model that it was made for.
        kernel: the kernels' sides, odd, one for each axis of the latents' grid; ``()``: each weight is one number.
        readouts: one row per step: for each branch a matrix from a token's hidden states to what is added to the
            forecast of its patch (rows, columns and channels of it), row by row, cond first; ``()``: nothing is added.
        provenance: where it comes from, and with which errors; saved with it, not compared.
        scheduler: class name of the sampler that its weights were fitted under, which other deterministic ones may take
            the place of; ``None``: none, as of an extrapolation.
        latents: shape of one image's output, without the batch; ``None``: any, as of an extrapolation.
        history_bits: 8 or 4: what a run keeps for later steps, outputs and readouts, is quantized, with a scale for
            each image and channel; 16: it isn't.
        classes: of each calibrated class what is added to ``weights`` and to ``readouts``, each with rows as long as
            theirs; all other images have those alone.
        second: where the second of two transformers takes over, as Wan 2.2's of low noise does: its first step, and the
            least and the largest guidance scale before, and from there on; ``None``: one transformer, or wherever it
            does.
        embedded_guidance: where guidance is an argument of the model, the least and the largest that it was made for,
            as the model is given them; ``None``: the model takes none, or any, as of an extrapolation.

    Raises:
        ValueError: step 0 isn't computed as it is, or a row of the wrong length, naming it.
    """

    weights: Rows = field(repr=False)
    computed: frozenset[int]
    timesteps: tuple[float, ...] = field(repr=False)
    guidance: tuple[float, float]
    history: int
    model: str
    kernel: tuple[int, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    readouts: Rows = field(default=(), repr=False)
    scheduler: str | None = None
    latents: tuple[int, ...] | None = None
    history_bits: int = 16
    classes: Mapping[int, tuple[Rows, Rows]] = field(default_factory=dict, repr=False, hash=False)
    second: Second | None = None
    embedded_guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "readouts"):
            object.__setattr__(self, name, as_rows(getattr(self, name)))
        object.__setattr__(self, "readouts", self.readouts or ((),) * len(self.weights))
        classes = {int(label): (as_rows(own), as_rows(read)) for label, (own, read) in self.classes.items()}
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "computed", frozenset(self.computed))
        for name in ("timesteps", "guidance"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        object.__setattr__(self, "kernel", tuple(self.kernel))
        object.__setattr__(self, "latents", None if self.latents is None else tuple(self.latents))
        steps = len(self.timesteps)
        check_count("history", self.history, 1)
        check_choice("history_bits", self.history_bits, HISTORY_BITS)
        odd = all(is_count(side) and side % 2 for side in self.kernel)
        check("kernel", self.kernel, odd, "odd sides of 1 or more")
        check("guidance", self.guidance, _ordered(self.guidance), "two scales, 1 <= least <= largest")
        if self.second is not None:
            begins, before, after = self.second
            right = is_index(begins, steps) and begins > 0 and _ordered(before) and _ordered(after)
            check("second", self.second, right, "a step after the first, and twice two scales, 1 <= least <= largest")
            object.__setattr__(self, "second", (begins, tuple(map(float, before)), tuple(map(float, after))))
        if self.embedded_guidance is not None:
            scales = tuple(map(float, self.embedded_guidance))
            right = len(scales) == 2 and -math.inf < scales[0] <= scales[1] < math.inf
            check("embedded_guidance", self.embedded_guidance, right, "two scales, least <= largest")
            object.__setattr__(self, "embedded_guidance", scales)
        if len(self.weights) != steps or not all(is_index(step, steps) for step in self.computed):
            raise ValueError(f"{len(self.weights)} rows and computed steps {sorted(self.computed)} for {steps} steps")
        if 0 not in self.computed or self.weights[0]:
            raise ValueError(
                f"computed steps {sorted(self.computed)} with {len(self.weights[0])} weights of step 0 are not "
                "accepted: step 0 has nothing to forecast from, so it computes, without weights"
            )
        for step, row in enumerate(self.weights):
            length = len(self.branches) * (self.cached_at(step) + 1) * math.prod(self.kernel)
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
        for label, own in self.classes.items():
            lengths = [list(map(len, rows)) for rows in own]
            numbers = (number for rows in own for row in rows for number in row)
            if lengths != [list(map(len, rows)) for rows in (self.weights, self.readouts)] or not all(
                map(math.isfinite, numbers)
            ):
                raise ValueError(f"the rows of class {label} are not accepted: finite, as long as those of all classes")

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self.guidance[1] > 1

    @property
    def branches(self) -> tuple[str, ...]:
        """Those that it forecasts."""
        return BRANCHES if self.guided else BRANCHES[:1]

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

    def late(self, timesteps: Sequence[float]) -> int:
        """How many of a scheduler's timesteps are over when the plan's runs begin, as in image-to-image."""
        late = len(timesteps) - len(self.timesteps)
        return late if late > 0 and _close(self.timesteps, timesteps[late:]) else 0

    def check_run(self, timesteps: Sequence[float]) -> None:
        """Raises ``ValueError`` for a run that visits other timesteps, saying how they differ."""
        check_steps(len(self.timesteps), len(timesteps))
        for step, (planned, given) in enumerate(zip(self.timesteps, timesteps, strict=True)):
            if not _close([planned], [given]):
                raise ValueError(
                    f"the plan was made for another spacing of the timesteps: step {step} is at {planned:g}, "
                    f"in this run at {float(given):g}"
                )

    def check_guidance(self, scale: float, noise: float, step: int) -> None:
        """Raises ``ValueError`` for another guidance scale at a step, which rounding may have moved by ``noise``."""
        least, largest = self.guidance
        if self.second is not None:
            begins, before, after = self.second
            least, largest = before if step < begins else after
        slack = 1e-4 * largest + noise
        if scale < least - slack or scale > largest + slack:
            run = "is without guidance" if abs(scale - 1) < 1e-3 else f"has {scale:.4g}"
            where = "" if self.second is None else f" at step {step}"
            raise ValueError(
                f"the plan was made for guidance_scale={_span(least, largest)}{where}, this run {run}: make one for "
                "this guidance"
            )

    def check_embedded_guidance(self, scales: torch.Tensor | None) -> None:
        """Raises ``ValueError`` for other guidance than the plan's, where it is an argument of the model.

        Args:
            scales: ``[B]``, as the model is given them; ``None``: it isn't given any. They are waited for.
        """
        if self.embedded_guidance is None or scales is None:
            return
        least, largest = self.embedded_guidance
        slack = 4e-3 * abs(largest)  # bfloat16 rounds by half of this
        for scale in scales.flatten().tolist():
            if scale < least - slack or scale > largest + slack:
                raise ValueError(
                    f"the plan was made for a model that is given guidance={_span(least, largest)}, this run gives it "
                    f"{scale:.4g}: make one for this guidance_scale"
                )

    def check_latents(self, shape: Sequence[int], sample_size: Any) -> None:
        """Raises ``ValueError`` for outputs of another size than the plan was fitted on.

        Args:
            shape: of one image's output, without the batch.
            sample_size: of images that the model was made for, where an int: an extrapolation's, which wasn't fitted.
        """
        expected = self.latents
        if expected is None and isinstance(sample_size, int) and len(shape) == 3:
            expected = (shape[0], sample_size, sample_size)
        if expected is not None and tuple(shape) != expected:
            raise ValueError(
                f"the plan was made for {_sides(expected)} latents, these are {_sides(shape)}: make one for this size"
            )

    def check_model(self, model: str) -> None:
        """Raises ``ValueError`` for another model than the plan's."""
        if model != self.model:
            raise ValueError(f"the plan was made for {self.model}, this is {model}: make one for this model")

    def save(self, path: str | Path) -> None:
        """Writes JSON: a row of weights per step, and which are computed."""
        write_json(path, {"format": FORECAST_FORMAT, **self.to_json()})

    def to_json(self) -> dict[str, Any]:
        """Its fields, as JSON takes them and ``ForecastPlan`` does."""
        return {**vars(self), "computed": sorted(self.computed), "provenance": dict(self.provenance)}

    @classmethod
    def load(cls, path: str | Path) -> ForecastPlan:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: truncated, or no plan.
        """
        with reading(path, FORECAST_FORMAT) as content:
            return cls(**content)


def _ordered(scales: Sequence[float]) -> bool:
    return len(scales) == 2 and 1 <= scales[0] <= scales[1] < math.inf


def _span(least: float, largest: float) -> str:
    """What lies between two scales, in words."""
    return f"{least:g}" if least == largest else f"{least:g} to {largest:g}"


def as_rows(given: Sequence[Sequence[float]]) -> Rows:
    """Numbers as a plan keeps them."""
    return tuple(tuple(map(float, row)) for row in given)


def _close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two lists of timesteps are the same but for the rounding of another device."""
    return all(math.isclose(our, float(their), rel_tol=1e-6) for our, their in zip(ours, theirs, strict=True))


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape[1:] if len(shape) == 3 else shape))


def extrapolation(
    computed: Collection[int], timesteps: Sequence[float], guidance_scale: float, model: str, order: int = 1
) -> ForecastPlan:
    """The plainest plan: the guided output continued in a straight line (``order=1``), or as it was last (0).

    The polynomial is in the step's index, through each branch's last ``order + 1`` computed outputs.
    ``guidance_scale`` is 1 for a run without guidance.
    """
    rows: list[tuple[float, ...]] = []
    done: list[int] = []
    for step in range(len(timesteps)):
        if step in computed:
            done.insert(0, step)
            rows.append(())
            continue
        line = lagrange_weights(done[: order + 1], step)
        rows.append((*line, 0.0) * (2 if guidance_scale > 1 else 1))
    scale = max(1, guidance_scale)
    return ForecastPlan(tuple(rows), frozenset(computed), tuple(timesteps), (scale, scale), order + 1, model)
