"""The project's one kind of ``ValueError``: field, value, what is accepted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def check(field: str, value: Any, ok: bool, accepted: str) -> None:
    """Raises ``ValueError`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{field}={value!r} is not accepted: {accepted}")


def check_choice(field: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ``ValueError`` unless the value is one of a short list."""
    if value not in choices:
        check(field, value, False, f"choose one of {', '.join(map(repr, choices))}")


def check_count(field: str, value: Any, least: int) -> None:
    """Raises ``ValueError`` unless the value is an int of ``least`` or more."""
    check(field, value, is_count(value, least), f"an int of {least} or more")


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is an int of ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether it is a number of 0 or more, infinity included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
