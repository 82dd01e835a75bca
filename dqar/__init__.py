"""Dynamic Quantized Attention Reuse in Diffusion Transformers: see README.md; the public names are in ``dqar.api``.

They are imported when first asked for, so that ``dqar --help`` doesn't wait for torch and diffusers.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqar.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if not name.startswith("_") or name == "__all__":
        if find_spec(f"dqar.{name}"):
            return import_module(f"dqar.{name}")
        if hasattr(import_module("dqar.api"), name):
            return getattr(import_module("dqar.api"), name)
    raise AttributeError(f"module 'dqar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("dqar.api").__all__})
