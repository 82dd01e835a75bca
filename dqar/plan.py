"""Plans: what a run computes and what it takes from its cache, decided beforehand, so that no step waits for a number.

``ReusePlan`` is about the layers' sites, ``ForecastPlan`` about the whole model's output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

BRANCHES = ("cond", "uncond")
"""Of classifier-free guidance."""
FORMAT, FORECAST_FORMAT = "dqar-plan-1", "dqar-forecast-1"

Site = tuple[int, int, str]


@dataclass(frozen=True)
class ReusePlan:
    """A fixed step × layer table of compute and reuse, a table a branch.

    Attributes:
        sites: the sites to reuse, as (step, layer, branch); all others compute.
        num_layers: attention layers of the model it was made for.
        num_inference_steps: denoising steps of the runs it was made for.
        scheduler: class name of the scheduler it was made with; ``None``: any.
        provenance: where it comes from; saved with it, not compared.

    Raises:
        ValueError: a site outside the table, named.
    """

    sites: frozenset[Site]
    num_layers: int
    num_inference_steps: int
    scheduler: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        for name in ("num_layers", "num_inference_steps"):
            if not _is_index(getattr(self, name), None) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not accepted: an int of 1 or more")
        object.__setattr__(self, "sites", frozenset(self.sites))
        for site in self.sites:
            step, layer, branch = site if isinstance(site, tuple) and len(site) == 3 else (None, None, None)
            inside = _is_index(step, self.num_inference_steps) and _is_index(layer, self.num_layers)
            if not inside or branch not in BRANCHES:
                raise ValueError(
                    f"site {site!r} is not accepted: (step, layer, branch) with a step from 0 to "
                    f"{self.num_inference_steps - 1}, a layer from 0 to {self.num_layers - 1}, and one of {BRANCHES}"
                )

    @classmethod
    def from_trace(
        cls, table: pd.DataFrame, scheduler: str | None = None, provenance: Mapping[str, Any] | None = None
    ) -> ReusePlan:
        """What most of the traced runs did: the sites that at least half of them reused.

        Args:
            table: ``trace.to_pandas()`` of one run or several, all of one model and number of steps.
            scheduler: class name of the scheduler of those runs.
            provenance: of the trace.

        Raises:
            ValueError: no rows, or runs of different numbers of steps.
        """
        steps = sorted(set(table.total_steps.tolist()))
        if len(steps) != 1:
            raise ValueError(f"the trace has runs of {steps or 'no'} steps: a plan is made of runs of one number")
        whole = table.groupby("run").step.nunique() == steps[0]
        if not whole.any():
            raise ValueError(f"the trace has no run of all {steps[0]} steps: a plan is made of whole runs")
        table = table[table.run.isin(whole.index[whole])]  # stopped runs and late starts say nothing of what they left
        share = (table.decision == "reuse").groupby([table.step, table.layer, table.branch]).sum() / table.run.nunique()
        sites = frozenset((int(step), int(layer), branch) for step, layer, branch in share[share >= 0.5].index)
        return cls(sites, int(table.layer.max()) + 1, int(steps[0]), scheduler, provenance or {})

    @functools.cached_property
    def layers_at(self) -> dict[int, frozenset[int]]:
        """The layers that any branch reuses, by step; steps that compute everything are left out."""
        steps: dict[int, set[int]] = {}
        for step, layer, _ in self.sites:
            steps.setdefault(step, set()).add(layer)
        return {step: frozenset(layers) for step, layers in steps.items()}

    @property
    def share(self) -> float:
        """Share of a guided run's sites that are reused."""
        return len(self.sites) / (self.num_inference_steps * self.num_layers * len(BRANCHES))

    def check_run(self, num_inference_steps: int, scheduler: str | None = None) -> None:
        """Raises ``ValueError`` for a run that the plan wasn't made for, saying what it was made for."""
        if num_inference_steps != self.num_inference_steps:
            raise ValueError(
                f"the plan was made for {_steps(self.num_inference_steps)}, this run takes {num_inference_steps}: "
                "make one for this number of steps"
            )
        if None not in (scheduler, self.scheduler) and scheduler != self.scheduler:
            raise ValueError(f"the plan was made with {self.scheduler}, this run uses {scheduler}")

    def save(self, path: str | Path) -> None:
        """Writes JSON: a row of 0 (compute) and 1 (reuse) per step, one digit a layer, by branch."""
        rows = {
            branch: [
                "".join("01"[(step, layer, branch) in self.sites] for layer in range(self.num_layers))
                for step in range(self.num_inference_steps)
            ]
            for branch in BRANCHES
        }
        content = {"format": FORMAT, "scheduler": self.scheduler, "reuse": rows, "provenance": dict(self.provenance)}
        _write(path, content)

    @classmethod
    def load(cls, path: str | Path) -> ReusePlan:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: truncated, or no plan.
        """
        with _reading(path, FORMAT) as content:
            rows = content["reuse"]
            sizes = {(len(rows[branch]), len(row)) for branch in BRANCHES for row in rows[branch]}
            digits = {digit for branch in BRANCHES for row in rows[branch] for digit in row}
            if len(sizes) != 1 or not digits <= {"0", "1"}:
                raise ValueError("rows of one length, made of 0 and 1, were expected")
            [(steps, layers)] = sizes
            sites = frozenset(
                (step, layer, branch)
                for branch in BRANCHES
                for step, row in enumerate(rows[branch])
                for layer, digit in enumerate(row)
                if digit == "1"
            )
            return cls(sites, layers, steps, content["scheduler"], content["provenance"])


@dataclass(frozen=True)
class ForecastPlan:
    """The steps at which the whole model is computed; at all others its guided output is forecast from the cache.

    The forecast of a step is a weighted sum of what the cache holds, newest first, and of the latents:
    ``Σ_k a_k cond_k + Σ_k b_k uncond_k + c x_t``, with weights fitted by ``dqar.planner``: small kernels by which the
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

    weights: tuple[tuple[float, ...], ...]
    computed: frozenset[int]
    timesteps: tuple[float, ...]
    guidance_scale: float
    history: int
    model: str
    kernel: int = 1
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    readouts: tuple[tuple[float, ...], ...] = ()
    scheduler: str | None = None

    def __post_init__(self):
        for name in ("weights", "readouts"):
            object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in getattr(self, name)))
        object.__setattr__(self, "readouts", self.readouts or ((),) * len(self.weights))
        object.__setattr__(self, "computed", frozenset(self.computed))
        object.__setattr__(self, "timesteps", tuple(map(float, self.timesteps)))
        steps = len(self.timesteps)
        if not _is_index(self.history, None) or self.history < 1:
            raise ValueError(f"history={self.history!r} is not accepted: an int of 1 or more")
        if not _is_index(self.kernel, None) or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel!r} is not accepted: an odd int of 1 or more")
        if len(self.weights) != steps or not all(_is_index(step, steps) for step in self.computed):
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
                f"the plan was made for {_steps(len(self.timesteps))}, this run takes {len(timesteps)}: "
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
        _write(path, {**content, "computed": sorted(self.computed), "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> ForecastPlan:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: truncated, or no plan.
        """
        with _reading(path, FORECAST_FORMAT) as content:
            return cls(**content)


def extrapolation(
    computed: Collection[int], timesteps: Sequence[float], guidance_scale: float, model: str, order: int = 1
) -> ForecastPlan:
    """The plainest plan: the guided output continued in a straight line (``order=1``), or as it was last (0).

    The polynomial is in the step's index, through the last ``order + 1`` computed outputs. ``guidance_scale`` is 1 for
    a run without guidance.
    """
    rows, done = [], []
    for step in range(len(timesteps)):
        if step in computed:
            done.insert(0, step)
            rows.append(())
            continue
        line = lagrange_weights(done[: order + 1], step)
        row = [w * guidance_scale for w in line]
        rows.append((*row, *(w * (1 - guidance_scale) for w in line if guidance_scale > 1), 0.0))
    return ForecastPlan(rows, computed, timesteps, guidance_scale, order + 1, model)


def lagrange_weights(steps: Sequence[int], step: int) -> list[float]:
    """``∏_{b ≠ a} (step − b) / (a − b)`` for each of ``steps`` a: what each result weighs in a forecast of ``step``."""
    return [math.prod((step - b) / (a - b) for b in steps if b != a) for a in steps]


@contextlib.contextmanager
def _reading(path: str | Path, form: str) -> Iterator[dict[str, Any]]:
    """The content of a JSON file of this format; whatever is wrong with it is a ``ValueError`` that names the file."""
    try:
        content = json.loads(Path(path).read_text())
        if content.pop("format") != form:
            raise ValueError(f"format {form} was expected")
        yield content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or no {form} file") from error


def _write(path: str | Path, content: dict[str, Any]) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_index(value: Any, size: int | None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0 and (size is None or value < size)


def _steps(count: int) -> str:
    return f"{count} step" + "s" * (count != 1)
