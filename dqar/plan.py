"""Plans: what a run computes and what it takes from its cache, decided beforehand, so that no step waits for a number.

``ReusePlan`` is about the layers' sites, ``ForecastPlan`` about the whole model's output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqar.checks import check_count, is_count
from dqar.files import reading, write_json

if TYPE_CHECKING:
    import pandas as pd

BRANCHES = ("cond", "uncond")
"""Of classifier-free guidance."""
FORMAT, FORECAST_FORMAT = "dqar-plan-1", "dqar-forecast-2"
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
        latent_size: height and width of the latents that it was made for, as in ``"32 x 32"``, or the number of packed
            tokens, as in ``"4096 packed"``; ``None``: any.

    Raises:
        ValueError: a site outside the table, named.
    """

    sites: frozenset[Site]
    num_layers: int
    num_inference_steps: int
    scheduler: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    latent_size: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_inference_steps"):
            check_count(name, getattr(self, name), 1)
        object.__setattr__(self, "sites", frozenset(self.sites))
        for site in self.sites:
            step, layer, branch = site if isinstance(site, tuple) and len(site) == 3 else (None, None, None)
            inside = is_index(step, self.num_inference_steps) and is_index(layer, self.num_layers)
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
        sizes = set(table.latent_size.dropna()) if "latent_size" in table else set()
        size = sizes.pop() if len(sizes) == 1 else None
        return cls(sites, int(table.layer.max()) + 1, int(steps[0]), scheduler, provenance or {}, size)

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

    def check_layers(self, num_layers: int) -> None:
        """Raises ``ValueError`` for a model of another number of attention layers."""
        if num_layers != self.num_layers:
            layers = f"{self.num_layers} layer" + "s" * (self.num_layers != 1)
            raise ValueError(f"the plan was made for {layers}, this model has {num_layers}: make one for it")

    def check_run(self, num_inference_steps: int, scheduler: str | None = None) -> None:
        """Raises ``ValueError`` for a run that the plan wasn't made for, saying what it was made for."""
        check_steps(self.num_inference_steps, num_inference_steps)
        if None not in (scheduler, self.scheduler) and scheduler != self.scheduler:
            raise ValueError(f"the plan was made with {self.scheduler}, this run uses {scheduler}")

    def check_latents(self, size: str) -> None:
        """Raises ``ValueError`` for latents of another size than the plan was made for."""
        if self.latent_size not in (None, size):
            raise ValueError(
                f"the plan was made for {self.latent_size} latents, these are {size}: make one for this size"
            )

    def save(self, path: str | Path) -> None:
        """Writes JSON: a row of 0 (compute) and 1 (reuse) per step, one digit a layer, by branch."""
        rows = {
            branch: [
                "".join("01"[(step, layer, branch) in self.sites] for layer in range(self.num_layers))
                for step in range(self.num_inference_steps)
            ]
            for branch in BRANCHES
        }
        facts = {"format": FORMAT, "scheduler": self.scheduler, "latent_size": self.latent_size}
        write_json(path, {**facts, "reuse": rows, "provenance": dict(self.provenance)})

    @classmethod
    def load(cls, path: str | Path) -> ReusePlan:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: truncated, or no plan.
        """
        with reading(path, FORMAT) as content:
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
            size = content.get("latent_size")  # which older files don't tell
            return cls(sites, layers, steps, content["scheduler"], content["provenance"], size)


def lagrange_weights(steps: Sequence[int], step: int) -> list[float]:
    """``∏_{b ≠ a} (step − b) / (a − b)`` for each of ``steps`` a: what each result weighs in a forecast of ``step``."""
    return [math.prod((step - b) / (a - b) for b in steps if b != a) for a in steps]


def is_index(value: Any, size: int) -> bool:
    """Whether it is an int from 0 to ``size - 1``."""
    return is_count(value) and value < size


def check_steps(planned: int, given: int) -> None:
    """Raises ``ValueError`` for a run of another number of steps than a plan was made for."""
    if given != planned:
        raise ValueError(
            f"the plan was made for {planned} step{'s' * (planned != 1)}, this run takes {given}: make one for this "
            "number of steps"
        )
