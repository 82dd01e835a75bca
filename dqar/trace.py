"""The trace: what was decided and measured at every site, column by column, filled without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    import pandas as pd  # which takes as long to import as half of torch: only who reads the trace waits for it
    from torch.distributed import ProcessGroup  # which not every build of torch has

SELF_ATTENTION, CROSS_ATTENTION, MODEL = "self_attention", "cross_attention", "model"
KEPT_RUNS = 1000
"""The trace drops the oldest run when there are more; one of 28 layers and 50 steps takes about a quarter megabyte."""


@dataclass(slots=True)
class Entropies:
    """The entropies of one layer's attention at one step, by branch; empty until ``Trace.resolve``.

    Attributes:
        rows: the branches' rows of the batch.
        tokens: keys that each query attends to; ``None``: unknown.
        per_head: one number a head, in nats, mean of the images.
        mean: of the heads, in nats.
        image, text: the same of a joint attention's image and text queries alone.
    """

    rows: dict[str, slice]
    tokens: int | None
    per_head: dict[str, list[float]] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)
    image: dict[str, float] = field(default_factory=dict)
    text: dict[str, float] = field(default_factory=dict)

    def set(self, values: list[list[float]], heads: int) -> None:
        """Takes the numbers that were brought over, ``[B][H]`` or ``[B][3 · H]``: of all, image and text queries."""
        for branch, rows in self.rows.items():
            images = values[rows]
            numbers = [sum(column) / len(images) for column in zip(*images, strict=True)]
            self.per_head[branch] = numbers[:heads]
            for number, means in enumerate((self.mean, self.image, self.text)[: len(numbers) // heads]):
                means[branch] = sum(numbers[number * heads : (number + 1) * heads]) / heads


@dataclass(slots=True)
class StepFacts:
    """What all sites of a step share. Device tensors become numbers when the trace is read."""

    run: int
    step: int
    total_steps: int
    timestep: float | None = None
    threshold: float | None = None
    """Of the entropy, τ(p)."""
    snr: torch.Tensor | float | None = None
    snr_gate: torch.Tensor | float | None = None
    """The SNR that decides."""
    snr_schedule: float | None = None
    """The noise schedule's own."""
    latent_norm: torch.Tensor | float | None = None
    latent_size: str | None = None
    """Height and width, as in ``"32 x 32"``."""


@dataclass(slots=True)
class Rows:
    """The sites of one module at one step: what they share, and one list a column."""

    module: str
    facts: StepFacts
    layer: list[int] = field(default_factory=list)
    branch: list[str] = field(default_factory=list)
    decision: list[str] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    age: list[int] = field(default_factory=list)
    """Steps since the site was computed."""
    entropies: list[Entropies | None] = field(default_factory=list)
    """Measured when the site was computed."""
    tokens: dict[int, int] = field(default_factory=dict)
    """Keys that each query attends to, by layer; none: nobody looked."""

    def add(
        self,
        layer: int,
        branch: str,
        decision: str,
        reason: str,
        nbytes: int,
        age: int = 0,
        entropies: Entropies | None = None,
    ) -> None:
        """Appends one site."""
        self.layer.append(layer)
        self.branch.append(branch)
        self.decision.append(decision)
        self.reason.append(reason)
        self.bytes.append(nbytes)
        self.age.append(age)
        self.entropies.append(entropies)

    def add_computed(self, layers: Sequence[int], branches: Sequence[str], reasons: Sequence[str]) -> None:
        """Appends computed sites of which nothing is kept or measured, a column each."""
        count = len(layers)
        self.layer += layers
        self.branch += branches
        self.decision += ("compute",) * count
        self.reason += reasons
        self.bytes += (0,) * count
        self.age += (0,) * count
        self.entropies += (None,) * count

    def __len__(self) -> int:
        return len(self.layer)


class Trace:
    """Rows of every run, up to ``KEPT_RUNS``; entropies still on the device until ``resolve``."""

    def __init__(self) -> None:
        self._runs: deque[list[Rows]] = deque(maxlen=KEPT_RUNS)
        self._unresolved: list[tuple[Entropies, torch.Tensor]] = []
        self._last_run: int | None = None
        self.num_runs = 0
        """Runs that were begun, whether they are still kept or not."""
        self.paths: dict[str, dict[int, str]] = {}
        """Of each module's layers within the model, if that is known."""

    def __len__(self) -> int:
        return sum(map(len, self._all()))

    def begin_run(self) -> int:
        """The number of a new run."""
        self.num_runs += 1
        return self.num_runs - 1

    def open(self, module: str, facts: StepFacts) -> Rows:
        """Begins the rows of one module at one step."""
        rows = Rows(module, facts)
        if facts.run != self._last_run or not self._runs:
            self._last_run = facts.run
            self._runs.append([])
        self._runs[-1].append(rows)
        return rows

    def measured(self, values: torch.Tensor, rows: dict[str, slice], tokens: int | None) -> Entropies:
        """Registers entropies (nats) that are still on the device: ``[B, H]``, or by modality ``[B, 3, H]``."""
        entropies = Entropies(rows, tokens)
        self._unresolved.append((entropies, values))
        return entropies

    def clear(self) -> None:
        """Forgets all rows; entropies that decisions wait for stay."""
        self._runs.clear()

    def resolve(self, *scalars: torch.Tensor, group: ProcessGroup | None = None) -> list[float]:
        """Brings all entropies measured since the last call to the host, and ``scalars`` with them: one transfer.

        Args:
            scalars: on the same device.
            group: ranks that call this together: each gets the mean of all, bit for bit the same.
        """
        pending, self._unresolved = self._unresolved, []
        if not pending and not scalars:
            return []
        tensors = (*(values for _, values in pending), *scalars)
        joined = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        if group is not None:
            distributed.all_reduce(joined, group=group)
            joined /= distributed.get_world_size(group)
        numbers = joined.tolist()
        first = 0
        for entropies, values in pending:
            images, size = len(values), values[0].numel()
            rows = [numbers[first + image * size : first + (image + 1) * size] for image in range(images)]
            entropies.set(rows, values.shape[-1])
            first += images * size
        return numbers[first:]

    def to_pandas(self, module: str = SELF_ATTENTION) -> pd.DataFrame:
        """One row per site: run, step, timestep, layer, branch, decision, reason, entropy (nats), snr, bytes, ...

        ``attention`` is the layer's path within the model. Of a joint attention ``entropy`` is that of all queries,
        ``entropy_image`` and ``entropy_text`` are those of its image and text queries alone.

        Args:
            module: ``"self_attention"``, which is what the gate decides about, ``"cross_attention"``, or ``"model"``:
                whether a ``ForecastPlan`` computed or forecast the whole output (layer -1).
        """
        import pandas as pd

        self.resolve()
        first = ("run", "step", "total_steps", "timestep")
        last = ("threshold", "snr", "snr_gate", "snr_schedule", "latent_norm", "latent_size")
        entropies = {"entropy": "mean", "entropy_image": "image", "entropy_text": "text"}
        sites = ("module", "layer", "attention", "branch", "decision", "reason", *entropies, "age")
        columns: dict[str, list[Any]] = {name: [] for name in (*first, *sites, *last, "tokens", "bytes")}
        for rows in self._all():
            if rows.module != module:
                continue
            columns["module"] += [module] * len(rows)
            for name in (*first, *last):
                columns[name] += [_number(getattr(rows.facts, name))] * len(rows)
            for name in ("layer", "branch", "decision", "reason", "bytes", "age"):
                columns[name] += getattr(rows, name)
            columns["tokens"] += map(rows.tokens.get, rows.layer)
            columns["attention"] += map(self.paths.get(module, {}).get, rows.layer)
            for column, name in entropies.items():
                pairs = zip(rows.branch, rows.entropies, strict=True)
                columns[column] += (None if e is None else getattr(e, name).get(branch) for branch, e in pairs)
        return pd.DataFrame(columns)

    def heads_to_pandas(self) -> pd.DataFrame:
        """One row per computed self-attention site and head: run, step, layer, branch, head, entropy (nats)."""
        import pandas as pd

        self.resolve()
        return pd.DataFrame(
            {
                "run": rows.facts.run,
                "step": rows.facts.step,
                "layer": layer,
                "branch": branch,
                "head": head,
                "entropy": value,
            }
            for rows in self._all()
            if rows.module == SELF_ATTENTION
            for layer, branch, decision, entropies in zip(
                rows.layer, rows.branch, rows.decision, rows.entropies, strict=True
            )
            if decision == "compute" and entropies is not None
            for head, value in enumerate(entropies.per_head.get(branch, ()))
        )

    def _all(self) -> Iterator[Rows]:
        for run in self._runs:
            yield from run


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
