"""Checkpoints that a killed run can be continued from, and loss logs that fit them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from dqar.files import atomic_path


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes ``state`` so that a kill at any moment leaves the old checkpoint or the new one, never half of one."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, recipe: dict, device: str = "cpu") -> dict | None:
    """The state last saved at ``path``; ``None`` if there is none.

    Raises:
        ValueError: it can't be read, or was made by another recipe: the message says which fields differ.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location=device)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} can't be read ({str(error).splitlines()[0]}): remove it to start anew") from error
    check_recipe(state["recipe"], recipe, path)
    return state


def check_recipe(made: dict, recipe: dict, path: Path) -> None:
    """Raises ``ValueError`` if what is at ``path`` was made by another recipe, naming the fields that differ."""
    made, recipe = (json.loads(json.dumps(fields)) for fields in (made, recipe))  # JSON knows lists only, no tuples
    if made != recipe:
        fields = [name for name in {**made, **recipe} if made.get(name) != recipe.get(name)]
        changes = ", ".join(f"{name} {made.get(name)} instead of {recipe.get(name)}" for name in fields)
        raise ValueError(f"{path} was made by another recipe ({changes}): remove it to start anew")


def cut_log(path: Path, steps: int) -> None:
    """Drops the lines of a log that come after its checkpoint: those of ``steps`` and more, and a torn last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] >= steps:
                break
        except json.JSONDecodeError:
            break
        kept.append(line + "\n")
    path.write_text("".join(kept))
