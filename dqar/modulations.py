"""Keeps the modulations of DiT's blocks, which depend on timestep and labels only, not on the latents.

Every block of diffusers' DiT owns an embedder and a modulation layer (``AdaLayerNormZero``): at a step they are given a
timestep and labels, and nothing else. So their results are kept, and serve whenever the same labels come to the same
timestep again, to the bit; and blocks whose embedders have equal weights, as in converted checkpoints, embed once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZero

from dqar.run import Call, Run
from dqar.takeover import Handler, original_class
from dqar.unchanged import Unchanged

MAX_BYTES = 64 * 2**20
"""Of kept results: DiT-XL/2's of one guided image in FP16 are 43 MB at 50 steps."""


class Modulations:
    """The results of one model's embedders and modulation layers.

    Args:
        blocks: the transformer's; those without an ``AdaLayerNormZero`` of their own are left alone.
        constants: a function that returns what the open forward pass keeps, by module, or ``None``.
    """

    def __init__(self, blocks: Sequence[torch.nn.Module], constants: Callable[[], dict[int, torch.Tensor] | None]):
        norms = [getattr(block, "norm1", None) for block in blocks]
        self._norms = [n for n in norms if isinstance(n, AdaLayerNormZero) and n.emb is not None]
        self._constants = constants
        self._kept: OrderedDict[tuple[Any, ...], dict[int, torch.Tensor]] = OrderedDict()
        self._bytes = 0
        """Of all kept results."""
        self._run: int | None = None
        self._usable = False
        self._weights = Unchanged(())
        self._hashes: list[float] = []
        self._alike: dict[int, int] = {}
        """The embedder that stands for each, by ``id``."""

    def handlers(self) -> list[tuple[torch.nn.Module, Handler]]:
        """The modules to take over, and who answers their calls."""
        return [(m, self._answers(m)) for norm in self._norms for m in (norm.emb, norm.linear)]

    def clear(self) -> None:
        """Forgets everything kept."""
        self._kept.clear()
        self._bytes = 0
        self._hashes, self._weights = [], Unchanged(())

    def open(self, run: Run, call: Call, latents: torch.Tensor) -> dict[int, torch.Tensor] | None:
        """What is kept for a forward pass, to be read and added to; ``None``: nothing may be kept.

        Args:
            run, call: which pass it is; weights are looked at once a run.
            latents: ``[B, ...]``, of the dtype and on the device that the model is given.
        """
        if not self._norms or call.labels is None:
            return None
        if run.number != self._run or not self._weights.still():
            self._run, self._usable = run.number, self._look_at_weights()
        if not self._usable:
            return None
        key = _key(run, call, latents)
        kept = self._kept.get(key)
        if kept is None:
            return {}
        self._kept.move_to_end(key)
        return kept

    def close(self, run: Run, call: Call, latents: torch.Tensor, results: dict[int, torch.Tensor]) -> None:
        """Stores a forward pass's results ``[B, ...]``; where there is no room, the least recently used go."""
        key = _key(run, call, latents)
        if key in self._kept:
            return
        size = _nbytes(results)
        while self._kept and self._bytes + size > MAX_BYTES and next(iter(self._kept))[1] != call.labels:
            self._bytes -= _nbytes(self._kept.popitem(last=False)[1])
        if self._bytes + size <= MAX_BYTES:
            self._kept[key] = results
            self._bytes += size

    def _answers(self, module: torch.nn.Module) -> Handler:
        number = id(module)

        def handler(original: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
            results = self._constants()
            if results is None:
                return original(*args, **kwargs)
            name = self._alike.get(number, number)
            result = results.get(name)
            if result is None:
                result = results[name] = original(*args, **kwargs)
            return result

        return handler

    def _look_at_weights(self) -> bool:
        """Whether results may be kept; forgets those of other weights."""
        self._weights = Unchanged(self._norms)
        parameters = self._weights.parameters
        classes = {
            original_class(m) for m in self._weights.modules if any(p is not None for p in m._parameters.values())
        }
        trains = any(m.training for m in self._weights.modules)  # labels are dropped then
        plain = self._weights.known and not self._weights.touched and classes <= {torch.nn.Linear, torch.nn.Embedding}
        if trains or not plain:
            self.clear()
            return False
        # Changes through `.data` leave no version: so a few thousand numbers of each are looked at, once a run.
        looks = [p.detach().flatten()[:: max(1, p.numel() // 4096)] for p in parameters]
        hashes = torch.stack([torch.hash_tensor(look) for look in looks]).tolist()
        hashes += torch.stack([look.sum(dtype=torch.float32) for look in looks]).tolist()
        if hashes != self._hashes:
            self._kept.clear()
            self._bytes = 0
            self._hashes = hashes
            self._alike = _representatives([norm.emb for norm in self._norms])
        return True


def _key(run: Run, call: Call, latents: torch.Tensor) -> tuple[Any, ...]:
    dtype, device = latents.dtype, latents.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return run.given, call.labels, dtype, device, autocast


def _nbytes(results: dict[int, torch.Tensor]) -> int:
    return sum(result.nbytes for result in results.values())


def _representatives(modules: list[torch.nn.Module]) -> dict[int, int]:
    """The first module of equal weights, for each, by ``id``."""
    first: list[torch.nn.Module] = []
    chosen = {}
    for module in modules:
        same = next((earlier for earlier in first if _equal(earlier, module)), None)
        if same is None:
            first.append(module)
        chosen[id(module)] = id(same or module)
    return chosen


def _equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = dict(first.named_parameters()), dict(second.named_parameters())
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a)
