"""Sweeps: methods × seeds × images in units, which many processes share; each unit's rows are a file of its own.

Which units are missing is agreed once, at the start. From then on no process waits for another, so that one that dies
takes only its own unit with it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dqar.checks import check
from dqar.config import CacheFormat, DQARConfig, Probe
from dqar.measure.results import slug
from dqar.studies.compare import Method
from dqar.studies.recording import Recording

if TYPE_CHECKING:
    from accelerate import PartialState  # an extra: only who sweeps needs it


@dataclass(frozen=True)
class Unit:
    """What one process measures at a time: images ``first_image ...`` of a seed's set by one method."""

    method: Method
    seed: int
    first_image: int
    number: int

    def __str__(self) -> str:
        last = self.first_image + self.number - 1
        return f"{self.method.name}, seed {self.seed}, images {self.first_image} to {last}"

    @property
    def file(self) -> str:
        """Part of its file's name; names that differ only in their signs have different ones."""
        digest = hashlib.sha256(self.method.name.encode()).hexdigest()[:8]
        return f"{slug(self.method.name)[:80]}-{digest}-{self.seed}-{self.first_image}-{self.number}"


@dataclass(frozen=True)
class Sweep:
    """Methods on the same seeds and images.

    Args:
        recording: profile and folders.
        methods: of different names.
        seeds: of the images' sets.
        images: of each seed; labels or captions come in turn.
        part: images of a unit, drawn at once where they fit.
        name: of the table.

    Raises:
        ValueError: names the argument, its value and what is accepted.
    """

    recording: Recording
    methods: Sequence[Method] = field(repr=False)
    seeds: Sequence[int]
    images: int
    part: int = 12
    name: str = "sweep"

    def __post_init__(self) -> None:
        check("seeds", list(self.seeds), len(set(self.seeds)) == len(self.seeds) > 0, "one or more, each once")
        for name in ("images", "part"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check("name", self.name, self.name == slug(self.name) != "", "letters, digits and hyphens")
        count = Counter(method.name for method in self.methods)
        check("methods", count.most_common(1), set(count.values()) == {1}, "one or more, each of its own name")

    def units(self) -> list[Unit]:
        """All of them; those that are compared with the same reference stand together."""
        firsts = range(0, self.images, self.part)
        return [
            Unit(method, seed, first, min(self.part, self.images - first))
            for seed, first, method in itertools.product(self.seeds, firsts, self.methods)
        ]

    def missing(self) -> list[Unit]:
        """The units without a file."""
        return [unit for unit in self.units() if not self.recording.part_path(self.name, unit.file).exists()]

    def measure(self, unit: Unit) -> pd.DataFrame:
        """A unit's rows: those of ``compare``, and ``seed``. Read if they are there, else drawn and kept."""

        def compared() -> pd.DataFrame:
            rows = self.recording.compare(unit.method, unit.seed, unit.first_image, unit.number)
            return rows.drop(columns="features", errors="ignore").assign(seed=unit.seed)

        return self.recording.part(self.name, unit.file, compared, unit.seed)

    def run(self, state: PartialState) -> int:
        """This process's share of what is missing; returns how many units that was.

        Args:
            state: of accelerate: how many processes there are, and which of them this is.
        """
        from accelerate.utils import broadcast_object_list

        # One process lists what is missing: another one might already see what the first has finished.
        [missing] = broadcast_object_list([[unit.file for unit in self.missing()]])
        state.destroy_process_group()
        units = [unit for unit in self.units() if unit.file in set(missing)]
        with state.split_between_processes(units) as share:
            for unit in share:
                self.measure(unit)
        return len(share)

    def merge(self) -> Path:
        """Writes all units' rows as one table; returns where.

        Raises:
            ValueError: some are missing; says how many, and names the first.
        """
        if missing := self.missing():
            raise ValueError(
                f"{len(missing)} of {len(self.units())} units are missing, first {missing[0]}: the same command "
                "without --merge measures them"
            )
        return self.recording.join(self.name, [self.measure(unit) for unit in self.units()])


def grid(fields: Mapping[str, Any]) -> list[Method]:
    """A method for each combination of values.

    Args:
        fields: of ``DQARConfig``, also ``"cache.forecast_order"`` and the like, each with a list of values.

    Raises:
        ValueError: an unknown field or value, or one that isn't a list.
    """
    for name, values in fields.items():
        check(name, values, isinstance(values, list) and len(values) > 0, "a list of values")
    methods = []
    for values in itertools.product(*fields.values()):
        options: dict[str, dict[str, Any]] = {"": {}, "cache": {}, "probe": {}}
        for name, value in zip(fields, values, strict=True):
            group, _, rest = name.rpartition(".")
            options.get(group, options[""])[rest if group in options else name] = value
        try:
            config = DQARConfig(**options[""], cache=CacheFormat(**options["cache"]), probe=Probe(**options["probe"]))
        except TypeError as error:
            text = f"{error}: the fields are DQARConfig's, such as reuse_target or cache.forecast_order"
            raise ValueError(text) from error
        text = ", ".join(f"{name} {value}" for name, value in zip(fields, values, strict=True))
        methods.append(Method(text, "grid", config))
    return methods
