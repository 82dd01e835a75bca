"""The cache: one entry per layer and CFG branch, quantized, every byte accounted for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dqar.config import DQARConfig, ReuseTarget
from dqar.plan import BRANCHES, lagrange_weights
from dqar.quantizer import QuantizedTensor, quantize
from dqar.trace import Entropies


@dataclass(frozen=True)
class StoredTensor:
    """A tensor kept as it is, with ``QuantizedTensor``'s interface."""

    data: torch.Tensor
    dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in its shape, and in its original dtype unless another is given."""
        return self.data.to(dtype or self.dtype)

    def rows(self, rows: slice) -> StoredTensor:
        """Some of the batch's samples, as a view of the same memory."""
        return StoredTensor(self.data[rows], self.dtype)

    def clone(self) -> StoredTensor:
        """The same in memory of its own."""
        return StoredTensor(self.data.clone(), self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes, as stored."""
        return self.data.nbytes


Stored = QuantizedTensor | StoredTensor
Name = Literal["k", "v", "output", "feed_forward", "text_k", "text_v", "text_output"]
Tensors = dict[Name, torch.Tensor]
NAMES: dict[ReuseTarget, tuple[Name, ...]] = {
    "kv": ("k", "v"),
    "output": ("output",),
    "block": ("output", "feed_forward"),
    "residual": ("output",),
}
"""What an entry holds, by ``reuse_target``: keys and values; the attention's output; that and the feed-forward's; or,
as ``output``, what the whole block adds to its input. A joint attention's has the same of its caption, as ``text_``."""


@dataclass
class CacheEntry:
    """What one layer computed at one step in one branch: the tensors ``NAMES`` lists, ``[B, N, C]`` each."""

    layer_id: int
    branch: str
    step: int
    """When it was computed."""
    stored: dict[Name, Stored]
    """By name; empty: nothing to reuse. Branches computed together share the tensors, and each has its rows of them."""
    rows: slice | None = None
    """``None``: all of them."""
    own_bytes: int = 0
    """Of the entry's own rows, without the history."""
    entropies: Entropies | None = None
    """Of the attention that computed it, if they were measured."""
    streak: int = 0
    """Steps in a row that this entry has served."""
    history: tuple[CacheEntry, ...] = ()
    """What the same site computed before, newest first: as many as ``cache.forecast_order`` asks for."""
    _parts: dict[Name, Stored] = field(default_factory=dict)
    """Its own rows, where somebody asked for them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the entry's own rows of all its tensors, history included."""
        return self.own_bytes + sum(past.own_bytes for past in self.history) if self.history else self.own_bytes

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it to reuse."""
        return not self.stored

    @property
    def k(self) -> Stored | None:
        """The keys."""
        return self.part("k")

    @property
    def v(self) -> Stored | None:
        """The values."""
        return self.part("v")

    @property
    def output(self) -> Stored | None:
        """The output."""
        return self.part("output")

    @property
    def feed_forward(self) -> Stored | None:
        """The feed-forward's output."""
        return self.part("feed_forward")

    def separate(self) -> None:
        """Gives the entry memory of its own, where it shares some."""
        if self.rows is not None:
            self.stored = {name: stored.rows(self.rows).clone() for name, stored in self.stored.items()}
            self.rows = None
            self._parts.clear()

    def part(self, name: Name) -> Stored | None:
        """The entry's own rows of a tensor, if it is there."""
        stored = self.stored.get(name)
        if stored is None or self.rows is None:
            return stored
        if name not in self._parts:
            self._parts[name] = stored.rows(self.rows)
        return self._parts[name]


def recall(entries: Sequence[CacheEntry], step: int, name: Name) -> torch.Tensor:
    """A cached tensor of one layer's entries, one below the other ``[B, N, C]``, continued to ``step``.

    Branches that were stored as one tensor are read as one.
    """
    first = entries[0]
    if len(entries) > 1 and all(_together(first, entry) for entry in entries[1:]):
        chain = (first, *first.history)
        return _continued([past.stored[name] for past in chain], [past.step for past in chain], step)
    parts = []
    for entry in entries:
        chain = (entry, *entry.history)
        stored = [past.part(name) for past in chain]
        parts.append(
            _continued([tensor for tensor in stored if tensor is not None], [past.step for past in chain], step)
        )
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _together(first: CacheEntry, other: CacheEntry) -> bool:
    """Whether two branches' entries and all their history were stored as one, ``first`` before ``other``."""
    if first.stored is not other.stored or len(first.history) != len(other.history):
        return False
    if first.rows is None or other.rows is None or first.rows.stop != other.rows.start:
        return False
    return all(map(_together, first.history, other.history))


def _continued(stored: Sequence[Stored], steps: Sequence[int], step: int) -> torch.Tensor:
    """The polynomial in the step's index through what was ``stored`` at ``steps``, newest first, at ``step``.

    Whatever the distances between them (TaylorSeer, Liu et al. 2025, with Lagrange's form in place of finite
    differences). One alone: as cached.
    """
    newest = stored[0]
    if len(stored) == 1:
        return newest.dequantize()
    weights = lagrange_weights(steps, step)
    # Weights of either sign cancel: half precision would lose what they leave.
    dtype = torch.promote_types(newest.dtype, torch.float32)
    total = newest.dequantize(dtype) * weights[0]
    for past, weight in zip(stored[1:], weights[1:], strict=True):
        total.add_(past.dequantize(dtype), alpha=weight)
    return total.to(newest.dtype)


class QuantizedCache:
    """Entries by ``(layer_id, branch)``; a new entry takes the place of the old one, which joins its history if any."""

    def __init__(self, config: DQARConfig):
        self.config = config
        self._entries: dict[tuple[int, str], CacheEntry] = {}

    def get(self, layer_id: int, branch: str) -> CacheEntry | None:
        """The entry, or ``None``."""
        return self._entries.get((layer_id, branch))

    def entries(self, layer_id: int, branches: Sequence[str]) -> list[CacheEntry]:
        """Those of several branches, which must be there."""
        return [self._entries[layer_id, branch] for branch in branches]

    def put(
        self,
        layer_id: int,
        rows: Mapping[str, slice],
        step: int,
        tensors: Tensors,
        partners: Tensors | None = None,
        entropies: Entropies | None = None,
        check_finite: bool = True,
    ) -> list[CacheEntry]:
        """Keeps what a layer computed, for several branches quantized and stored as one.

        Args:
            layer_id, step: where and when it was computed.
            rows: of the tensors, by branch; of one branch alone they are all its own.
            tensors: ``[B, N, C]``; those of ``NAMES`` are kept if they are all there, and a joint attention's ``text_``
                beside them, others never.
            partners: of each for ``balance``, as ``quantize`` takes them; else, for fitted levels, its ``factor``.
            entropies: of the attention, if they were measured.
            check_finite: look for NaN and inf, where no GPU has to wait for it.

        Returns:
            The new entries, in the order of ``rows``.

        Raises:
            ValueError: NaN or inf, with ``check_finite``.
        """
        names, partners = NAMES[self.config.reuse_target], partners or {}
        stored: dict[Name, Stored] = {}
        if all(name in tensors for name in names):
            names = (*names, *(name for name in tensors if name.startswith("text_")))
            bits = self.config.bits_of(layer_id)
            stored = {name: self._store(name, tensors[name], bits, partners.get(name), check_finite) for name in names}
        nbytes = sum(whole.nbytes for whole in stored.values())
        batch = len(next(iter(stored.values())).data) if stored else 1
        self._separate(layer_id, rows)
        entries = []
        for branch, part in rows.items():
            entry = CacheEntry(layer_id, branch, step, stored, None, nbytes, entropies)
            if len(rows) > 1:
                entry.rows, entry.own_bytes = part, nbytes * (part.stop - part.start) // batch
            last = self._entries.get((layer_id, branch))
            if self.config.cache.forecast_order and last is not None:
                earlier = (dataclasses.replace(last, history=()), *last.history)  # a chain would never end
                # Computed twice at a step, the later result counts.
                usable = [past for past in earlier if not past.empty and past.step != step]
                entry.history = tuple(usable[: self.config.cache.forecast_order])
            self._entries[layer_id, branch] = entry
            entries.append(entry)
        return entries

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

    def _separate(self, layer_id: int, replaced: Mapping[str, slice]) -> None:
        """Gives what a branch keeps memory of its own, where the other branch's part of it is about to go."""
        for branch in BRANCHES:
            entry = self._entries.get((layer_id, branch))
            if branch not in replaced and entry is not None:
                for past in (entry, *entry.history):
                    past.separate()

    def _store(
        self, name: Name, x: torch.Tensor, bits: int, partner: torch.Tensor | None, check_finite: bool
    ) -> Stored:
        config = self.config
        if bits == 16:
            return StoredTensor(x.detach().clone(), x.dtype)  # a view would keep the whole batch's memory alive
        if name in ("k", "text_k") and config.mixed_precision:
            half = torch.float16 if x.dtype == torch.float32 else x.dtype
            return StoredTensor(x.detach().to(half, copy=True), x.dtype)
        # batch_dims=1: a shared scale would let one image of a batch change another.
        return quantize(
            x.detach(),
            bits,
            config.quantize_mode,
            batch_dims=1,
            partner=partner if config.balance else None,
            keep_channels=config.cache.keep_channels,
            fitted=config.cache.fitted,
            factor=partner if config.spares_products else None,
            over_tokens=name == "v",
            scale_dtype=torch.float16 if config.cache.fitted else torch.float32,
            check_finite=check_finite and x.device.type == "cpu",
        )
