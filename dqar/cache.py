"""The cache: one entry per layer and CFG branch, quantized, every byte accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dqar.config import DQARConfig
from dqar.quantizer import QuantizedTensor, quantize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor kept as it is, with ``QuantizedTensor``'s interface."""

    data: torch.Tensor
    dtype: torch.dtype

    def dequantize(self) -> torch.Tensor:
        """The tensor in its original dtype."""
        return self.data.to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes, as stored."""
        return self.data.nbytes


Stored = QuantizedTensor | StoredTensor


@dataclass
class CacheEntry:
    """What one layer computed at one step in one branch: ``k`` and ``v``, or ``output``; ``[B, N, C]`` each."""

    layer_id: int
    branch: str
    row: dict[str, Any]
    """The trace row of the step that computed it: when, at what entropy."""
    k: Stored | None = None
    v: Stored | None = None
    output: Stored | None = None
    streak: int = 0
    """Steps in a row that this entry has served."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the entry."""
        return sum(stored.nbytes for stored in (self.k, self.v, self.output) if stored is not None)

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it to reuse."""
        return self.k is None and self.v is None and self.output is None


class QuantizedCache:
    """Entries by ``(layer_id, branch)``; a new entry takes the place of the old one."""

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
    ) -> None:
        """Stores ``entry`` with those of the tensors that ``reuse_target`` reuses."""
        if self.config.reuse_target == "kv":
            if keys is not None and values is not None:
                entry.k = self._half(keys) if self.config.mixed_precision else self._store(keys, key_partner)
                entry.v = self._store(values, value_partner)
        elif output is not None:
            entry.output = self._store(output)
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
