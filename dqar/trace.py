"""The trace: one row per site, tidy, filled without waiting for the device within a step."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

SELF_ATTENTION, CROSS_ATTENTION, MODEL = "self_attention", "cross_attention", "model"


class Trace:
    """Rows of plain values and, until ``resolve``, of tensors that still lie on the device."""

    def __init__(self):
        self.rows: list[dict[str, Any]] = []
        self._unresolved = 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, **row: Any) -> dict[str, Any]:
        """Appends a row and returns it, so that its maker can still complete it."""
        self.rows.append(row)
        return row

    def clear(self) -> None:
        """Forgets all rows."""
        self.rows.clear()
        self._unresolved = 0

    def resolve(self) -> None:
        """Brings all entropies measured since the last call to the host, in one transfer."""
        rows = [row for row in self.rows[self._unresolved :] if isinstance(row.get("entropy_per_head"), torch.Tensor)]
        self._unresolved = len(self.rows)
        if rows:
            values = torch.cat([row["entropy_per_head"].flatten() for row in rows]).tolist()
            for row in rows:
                heads = row["entropy_per_head"].numel()
                row["entropy_per_head"], values = values[:heads], values[heads:]
                row["entropy"] = sum(row["entropy_per_head"]) / heads

    def to_pandas(self, module: str = SELF_ATTENTION) -> pd.DataFrame:
        """One row per site: run, step, timestep, layer, branch, decision, reason, entropy (nats), snr, bytes, ...

        Args:
            module: ``"self_attention"``, which is what the gate decides about, ``"cross_attention"``, or ``"model"``:
                whether a ``ForecastPlan`` computed or forecast the whole output (layer -1).
        """
        self.resolve()
        columns = [name for name in self.rows[0] if name != "entropy_per_head"] if self.rows else []
        return pd.DataFrame((row for row in self.rows if row["module"] == module), columns=columns)

    def heads_to_pandas(self) -> pd.DataFrame:
        """One row per computed self-attention site and head: run, step, layer, branch, head, entropy (nats)."""
        self.resolve()
        keys = ("run", "step", "layer", "branch")
        return pd.DataFrame(
            {**{key: row[key] for key in keys}, "head": head, "entropy": value}
            for row in self.rows
            if row["decision"] == "compute" and row["module"] == SELF_ATTENTION
            for head, value in enumerate(row["entropy_per_head"] or ())
        )
