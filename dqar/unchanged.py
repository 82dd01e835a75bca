"""Whether modules still compute what they did: what is kept of their results holds only as long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dqar.takeover import original_class


class Unchanged:
    """Some modules as they are now, with all inside them.

    Attributes:
        roots: the modules given; ``modules``, ``parameters``: all inside them.
        known: whether a change could be told: modules of PyTorch's and diffusers' own classes, whose weights have
            versions. Wrappers such as PEFT's, and quantized weights, change by ways of their own.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self.roots = tuple(modules)
        self.modules = [inside for root in self.roots for inside in root.modules()]
        self._inside = [(m._modules, name, child) for m in self.modules for name, child in m._modules.items()]
        owned = [(m._parameters, name, p) for m in self.modules for name, p in m._parameters.items() if p is not None]
        self.parameters = [p for _, _, p in owned]
        plain = all(original_class(m).__module__.partition(".")[0] in ("torch", "diffusers") for m in self.modules)
        self.known = plain and not any(
            p.device.type == "meta" or p.is_inference() or is_traceable_wrapper_subclass(p) for p in self.parameters
        )
        self._weights = [(owner, name, p, p._version) for owner, name, p in owned] if self.known else []
        self._hooks = [hooks for m in self.modules for hooks in (m._forward_pre_hooks, m._forward_hooks)]
        self._own = [vars(m) for m in self.modules]
        self._others = self._from_others()

    @property
    def touched(self) -> bool:
        """Whether others' hooks, or a ``forward`` of its own, stand before a module."""
        return bool(self._from_others())

    def still(self) -> bool:
        """Whether nothing has changed since, so far as it shows: changes through ``.data`` leave no trace."""
        if not self.known or self._from_others() != self._others:
            return False
        return all(owner.get(name) is p and p._version == version for owner, name, p, version in self._weights) and all(
            owner.get(name) is child for owner, name, child in self._inside
        )

    def _from_others(self) -> list[Any]:
        """Numbers of the hooks on each module, and its own ``forward``; nothing where there are none."""
        if not any(self._hooks) and not any("forward" in own for own in self._own):
            return []
        return [*map(tuple, self._hooks), *(own.get("forward") for own in self._own)]
