"""The cache: one entry per layer and CFG branch, quantized, every byte accounted for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dqar.config import DQARConfig
from dqar.plan import lagrange_weights
from dqar.quantizer import QuantizedTensor, quantize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor kept as it is, with ``QuantizedTensor``'s interface."""

    data: torch.Tensor
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in its original dtype, unless another is given."""
        return self.data.to(dtype or self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes, as stored."""
        return self.data.nbytes


Stored = QuantizedTensor | StoredTensor


@dataclass
class CacheEntry:
    """What one layer computed at one step in one branch, ``[B, N, C]`` each.

    ``k`` and ``v``; or ``output``, of the attention; or that and ``feed_forward``; or, as ``output``, what the whole
    block adds to its input: as ``reuse_target`` says.
    """

    layer_id: int
    branch: str
    row: dict[str, Any]
    """The trace row of the step that computed it: when, at what entropy."""
    k: Stored | None = None
    v: Stored | None = None
    output: Stored | None = None
    feed_forward: Stored | None = None
    streak: int = 0
    """Steps in a row that this entry has served."""
    history: tuple[CacheEntry, ...] = ()
    """What the same site computed before, newest first: as many as a forecast of ``forecast_order`` draws on."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the entry, history included."""
        own = sum(stored.nbytes for stored in self._tensors if stored is not None)
        return own + sum(past.nbytes for past in self.history)

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it to reuse."""
        return all(stored is None for stored in self._tensors)

    def forecast(self, step: int, name: Literal["output", "feed_forward"] = "output") -> torch.Tensor:
        """A cached tensor ``[B, N, C]`` continued to ``step``, in its own dtype.

        The polynomial in the step's index through this entry and its history, whatever the distances between them
        (TaylorSeer, Liu et al. 2025, with Lagrange's form in place of finite differences). With no history: as cached.
        """
        newest: Stored = getattr(self, name)
        if not self.history:
            return newest.dequantize()
        known = (self, *self.history)
        weights = lagrange_weights([entry.row["step"] for entry in known], step)
        # Weights of either sign cancel: half precision would lose what they leave.
        dtype = torch.promote_types(newest.dtype, torch.float32)
        total = newest.dequantize(dtype) * weights[0]
        for entry, weight in zip(self.history, weights[1:], strict=True):
            total.add_(getattr(entry, name).dequantize(dtype), alpha=weight)
        return total.to(newest.dtype)

    @property
    def _tensors(self) -> tuple[Stored | None, ...]:
        return self.k, self.v, self.output, self.feed_forward


class QuantizedCache:
    """Entries by ``(layer_id, branch)``; a new entry takes the place of the old one, which joins its history if any."""

    def __init__(self, config: DQARConfig):
        self.config = config
        self._entries: dict[tuple[int, str], CacheEntry] = {}

    def get(self, layer_id: int, branch: str) -> CacheEntry | None:
        """The entry, or ``None``."""
        return self._entries.get((layer_id, branch))

    def put(
        self,
        entry: CacheEntry,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        key_partner: torch.Tensor | None = None,
        value_partner: torch.Tensor | None = None,
        feed_forward: torch.Tensor | None = None,
    ) -> None:
        """Stores ``entry`` with those of the tensors that ``reuse_target`` reuses; with all of them or none."""
        if self.config.reuse_target == "kv":
            if keys is not None and values is not None:
                entry.k = self._half(keys) if self.config.mixed_precision else self._store(keys, key_partner)
                entry.v = self._store(values, value_partner)
        elif self.config.reuse_target == "block":
            if output is not None and feed_forward is not None:
                entry.output, entry.feed_forward = self._store(output), self._store(feed_forward)
        elif output is not None:
            entry.output = self._store(output)
        last = self._entries.get((entry.layer_id, entry.branch))
        if self.config.forecast_order and last is not None:
            earlier = (dataclasses.replace(last, history=()), *last.history)  # a chain would never end
            same = entry.row.get("step")  # computed twice at a step, the later result counts
            earlier = [past for past in earlier if not past.empty and past.row.get("step") != same]
            entry.history = tuple(earlier[: self.config.forecast_order])
        self._entries[entry.layer_id, entry.branch] = entry

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CacheEntry]:
        return iter(self._entries.values())

    def _half(self, x: torch.Tensor) -> Stored:
        return StoredTensor(x.detach().to(torch.float16 if x.dtype == torch.float32 else x.dtype, copy=True), x.dtype)

    def _store(self, x: torch.Tensor, partner: torch.Tensor | None = None) -> Stored:
        if self.config.quantize_bits == 16:
            return StoredTensor(x.detach().clone(), x.dtype)  # a view would keep the whole batch's memory alive
        # batch_dims=1: a shared scale would let one image of a batch change another.
        return quantize(
            x.detach(),
            self.config.quantize_bits,
            self.config.quantize_mode,
            batch_dims=1,
            partner=partner if self.config.balance else None,
            keep_channels=self.config.keep_channels,
            check_finite=x.device.type == "cpu",
        )
