"""Files that are written whole or not at all, and JSON files that say what they are."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error.

    Raises:
        OSError: ``path`` is a folder, or in none.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict[str, Any] | list[Any], indent: int | None = None) -> None:
    """Writes JSON, in one line unless with an ``indent``."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n")


@contextlib.contextmanager
def reading(path: str | Path, form: str) -> Iterator[dict[str, Any]]:
    """The content of a JSON file of this format; whatever is wrong with it is a ``ValueError`` that names the file."""
    try:
        content = json.loads(Path(path).read_text())
        if content.pop("format") != form:
            raise ValueError(f"format {form} was expected")
        yield content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or no {form} file") from error
