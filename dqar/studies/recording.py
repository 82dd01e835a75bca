"""Long measurements in parts: each is saved when it is finished, so that an interrupted recording resumes."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from dqar.measure.results import atomic_path, load_table, provenance, save_table
from dqar.models.profiles import Profile
from dqar.studies.compare import FULL, Drawn, Method, classifier_of, compare, draw

# Other images than the notebooks' and the results' (seed 0): a policy mustn't be judged on what it was trained on.
LABEL_SEED, SWEEP_SEED, RESULT_SEED, PARETO_SEED = 100, 200, 0, 700


@dataclass(frozen=True)
class Sizes:
    """How much is recorded for a profile: images, unless said otherwise."""

    label_images: int = 20
    sites_per_step: int = 3
    """Reuses tried at every step of each labelled image."""
    sweep_images: int = 20
    samples: int = 1000
    """Of each method that the results compare."""
    part: int = 100
    plan_images: int = 120
    refinements: int = 24
    """Neighbouring sets of steps that are tried for a plan."""
    pareto_images: int = 20
    pareto_settings: int | None = None
    """Settings of each family at most; ``None``: all."""


SIZES = {
    "smoke": Sizes(
        label_images=10,
        sites_per_step=2,
        sweep_images=2,
        samples=6,
        part=3,
        plan_images=10,
        refinements=1,
        pareto_images=2,
        pareto_settings=1,
    )
}


class Recording:
    """The recorded tables of one profile, and their finished parts.

    Args:
        profile: with a trained model whose images a classifier knows.
        work: folder of the finished parts.
        out: folder of the finished tables, which go to one of the profile's name in it.

    Raises:
        ValueError: no classifier of the profile's images.
        OSError: the folders can't be made.
    """

    def __init__(self, profile: Profile, work: Path, out: Path):
        if classifier_of(profile) is None:
            raise ValueError(f"profile {profile.name!r} can't be recorded: no classifier of its images is at hand")
        self.profile, self.sizes = profile, SIZES.get(profile.name, Sizes())
        self.folder, self.parts = out / profile.name, work / profile.name
        for folder in (self.folder, self.parts):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def many_at_once(self) -> Profile:
        """The profile with as many images at once as pay."""
        return dataclasses.replace(self.profile, batch_size=50)

    def table(self, name: str, parts: Mapping[Any, Callable[[], pd.DataFrame]], seed: int) -> pd.DataFrame:
        """The table ``name``: read if it is finished, else made of its parts, of which finished ones are read."""
        path = self.folder / f"{name}.parquet"
        if path.exists():
            return load_table(path)
        tables = []
        for part, measure in tqdm(parts.items(), desc=name):
            piece = self.parts / f"{name}-{part}.parquet"
            if not piece.exists():
                started = time.monotonic()
                table = measure()
                seconds = time.monotonic() - started
                save_table(table, piece, {**provenance(self.profile, seed), "seconds": seconds})
                logging.info("%s, part %s: %d rows in %.0f s", name, part, len(table), seconds)
            tables.append(load_table(piece))
        sources = [table.attrs.pop("provenance") for table in tables]
        source = {**sources[-1], "seconds": sum(source["seconds"] for source in sources)}
        save_table(pd.concat(tables, ignore_index=True), path, source)
        return load_table(path)

    def compare(self, method: Method, seed: int, first_image: int, number: int) -> pd.DataFrame:
        """``compare`` with full compute, whose images are kept beside the parts."""
        reference = self._full_compute(seed, first_image, number)
        return compare(method, reference, self.many_at_once, seed, first_image)

    def _full_compute(self, seed: int, first_image: int, number: int) -> Drawn:
        path = self.parts / f"full-compute-{seed}-{first_image}-{number}.pt"
        if not path.exists():
            drawn = draw(FULL, self.many_at_once, seed, first_image, number)
            with atomic_path(path) as temporary:
                torch.save({"images": drawn.images, "labels": drawn.labels, "macs": drawn.macs}, temporary)
        return Drawn(FULL, **torch.load(path, weights_only=True), sites_reused=0.0, events=0.0, cache_bytes=0.0)
