"""Dynamic Quantized Attention Reuse in Diffusion Transformers: see README.md; the public names are in ``dqar.api``.

They are imported when first asked for, so that ``dqar --help`` doesn't wait for torch and diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqar.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if not name.startswith("__") or name == "__all__":
        api = import_module("dqar.api")
        if hasattr(api, name):
            return getattr(api, name)
        if name in globals():  # a module that came with it, such as dqar.stats
            return globals()[name]
    raise AttributeError(f"module 'dqar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("dqar.api").__all__})
