"""Long measurements in parts: each is saved when it is finished, so that an interrupted recording resumes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from dqar.files import atomic_path
from dqar.measure.results import load_table, provenance, save_table, settings, slug
from dqar.models.profiles import Profile
from dqar.studies.compare import FULL, Drawn, Method, compare, draw

# Other images than the notebooks' and the results' (seed 0): a policy mustn't be judged on what it was trained on.
LABEL_SEED, SWEEP_SEED, RESULT_SEED, PARETO_SEED, REFERENCE_SEED, ARENA_SEED = 100, 200, 0, 700, 600, 800
RESULT_FIELDS = ("weights", "transformer", "num_inference_steps", "guidance_scale", "dtype", "scheduler", "reference")
"""Of a profile: parts that differ in one of them don't belong together."""


@dataclass(frozen=True)
class Sizes:
    """How much is recorded for a profile: images, unless said otherwise."""

    label_images: int = 20
    sites_per_step: int = 3
    """Reuses tried at every step of each labelled image."""
    sweep_images: int = 20
    samples: int = 1000
    """Of each method that the results compare, and of the reference."""
    part: int = 100
    plan_images: int = 120
    converged_images: int = 240
    """That plans for the converged solution are fitted on, which learned solvers aim at: on 200 other digits, twice the
    images of ``plan_images`` brought 0.4 dB more, on 64 other photographs 0.1."""
    refinements: int = 24
    """Neighbouring sets of steps that are tried for a plan."""
    solver_pairs: int = 64
    """Of noise and image, that a solver is learned from."""
    solver_iterations: int = 300
    pareto_images: int = 20
    pareto_settings: int | None = None
    """Settings of each family at most; ``None``: all."""
    arena_images: int = 200
    """Of each family's best settings; ``headline_images``: under the profile's own sampler and settings."""
    headline_images: int = 200
    bits_images: int = 4
    """That the bits of each layer are chosen by."""
    search_trials: int = 60
    search_images: int = 24
    """Of each trial; they are drawn at once, since a gate decides for a batch."""
    front_points: int = 6
    front_images: int = 48
    """Of each point of the front, which aren't searched on."""
    tuning_steps: int = 100
    """Of the optimizer, for each fine-tuned model; ``tuning_batch``: images of each."""
    tuning_batch: int = 16
    tuned_images: int = 64
    """That each of these models draws with each cache: as many as a Fréchet distance has features."""
    batch_images: int = 16
    batch_repeats: int = 3
    """Timings of each method in each batch size."""

    @classmethod
    def of(cls, profile: Profile) -> Sizes:
        """Of a profile: ``samples`` are its ``images``, which limit plans' calibration and what ``LIMITED`` names."""
        few, most = profile.rehearsal or profile.name == "smoke", profile.images
        sizes = cls(**FEW) if few else cls(**MORE.get(profile.model, {}))
        if not few:
            fitted = {"plan_images": max(2, most), "converged_images": 2 * max(2, most)}
            sizes = dataclasses.replace(sizes, **{name: min(getattr(sizes, name), n) for name, n in fitted.items()})
        limited = {name: min(getattr(sizes, name), most) for name in LIMITED}
        return dataclasses.replace(sizes, label_images=10 if most < 20 else 20, samples=most, **limited)


FEW: dict[str, Any] = {
    **{"sites_per_step": 2, "sweep_images": 2, "part": 3, "plan_images": 10, "converged_images": 20, "refinements": 1},
    **{"solver_pairs": 4, "solver_iterations": 2, "pareto_images": 2, "pareto_settings": 1, "arena_images": 2},
    **{
        "headline_images": 2,
        "search_trials": 3,
        "search_images": 2,
        "front_points": 1,
        "front_images": 2,
        "batch_images": 2,
    },
    **{"batch_repeats": 1, "bits_images": 2, "tuning_steps": 2, "tuning_batch": 4, "tuned_images": 2},
}
"""``Sizes`` that show whether all works."""
MORE: dict[str, dict[str, Any]] = {
    "digits": {"headline_images": 1000},
    "cifar10": {"refinements": 2, "arena_images": 250, "headline_images": 250},
}
"""``Sizes`` of embedded models that have their own: a fit to photographs takes minutes."""
LIMITED = (
    *("sweep_images", "part", "pareto_images", "arena_images", "headline_images", "search_images", "front_images"),
    *("batch_images", "tuned_images", "bits_images"),
)
"""``Sizes`` that are a profile's ``images`` at most."""


def check_recordable(profile: Profile) -> None:
    """Raises ``ValueError`` for random weights, videos, an offloaded model, or settings that the profile can't use."""
    if profile.video:
        raise ValueError(f"profile {profile.name!r} is recorded beside the digits: dqar record --only video")
    if not profile.trained:
        raise ValueError(f"profile {profile.name!r} can't be recorded: its weights are random; see `dqar benchmark`")
    if profile.offload:
        raise ValueError(
            "offload=True can't be recorded: rivals' caches and W8A8 don't take an offloaded model; a GPU with more "
            "memory does without"
        )
    for field in ("weights", "reference", "rehearsal"):
        if profile.embedded and getattr(profile, field):
            raise ValueError(f"profile {profile.name!r} takes no {field}: it is an embedded model, with its own")


class Recording:
    """The recorded tables of one profile, and their finished parts.

    Args:
        profile: with a trained model.
        work: folder of the finished parts.
        out: folder of the finished tables, which go to one of the profile's label in it.

    Raises:
        ValueError: see ``check_recordable``.
        OSError: the folders can't be made.
    """

    def __init__(self, profile: Profile, work: Path, out: Path):
        check_recordable(profile)
        self.profile, self.sizes = profile, Sizes.of(profile)
        self.folder, self.parts = out / profile.label, work / profile.label
        for folder in (self.folder, self.parts):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def many_at_once(self) -> Profile:
        """The profile with as many images at once as pay; ``sample`` takes fewer where they don't fit."""
        return dataclasses.replace(self.profile, batch_size=50)

    def table(self, name: str, parts: Mapping[Any, Callable[[], pd.DataFrame]], seed: int) -> pd.DataFrame:
        """The table ``name``: read if it is finished, else made of its parts, of which finished ones are read."""
        path = self.folder / f"{name}.parquet"
        if path.exists():
            return self._of_this_profile(load_table(path))
        tables = []
        for part, measure in tqdm(parts.items(), desc=name):
            tables.append(self.part(name, part, measure, seed))
        self.join(name, tables)
        return load_table(path)

    def join(self, name: str, tables: Sequence[pd.DataFrame]) -> Path:
        """Saves finished parts as the table ``name``; returns where."""
        path = self.folder / f"{name}.parquet"
        sources = [table.attrs["provenance"] for table in tables]
        for table in tables:
            table.attrs = {}
        source = {**sources[-1], "seconds": sum(source["seconds"] for source in sources)}
        save_table(pd.concat(tables, ignore_index=True), path, source)
        return path

    def part(self, name: str, part: Any, measure: Callable[[], pd.DataFrame], seed: int) -> pd.DataFrame:
        """One part of the table ``name``: read if it is finished, else measured and saved."""
        path = self.part_path(name, part)
        if not path.exists():
            started = time.monotonic()
            table = measure()
            seconds = time.monotonic() - started
            save_table(table, path, {**provenance(self.profile, seed), "seconds": seconds})
            logging.info("%s, part %s: %d rows in %.0f s", name, part, len(table), seconds)
        return self._of_this_profile(load_table(path))

    def part_path(self, name: str, part: Any) -> Path:
        """Where a part is kept."""
        return self.parts / f"{name}-{part}.parquet"

    def growing(
        self,
        name: str,
        parts: Mapping[str, Callable[[], pd.DataFrame]],
        seed: int,
        number: int,
        holds: Callable[[str, pd.DataFrame], bool] | None = None,
    ) -> pd.DataFrame:
        """The table ``name``, a part for each method: rows that it has are kept, missing ones measured.

        It is saved after each part, so that what is recorded can be used, and other methods can be added later.
        Methods that aren't asked for any more are left out as soon as a missing one is measured.

        Args:
            name: of the table.
            parts: a measurement for each method, by its name; the rows have a column ``method``.
            seed, number: of the images, a row each.
            holds: whether a method's rows, by its name, still hold, else they are measured anew; ``None``: all do.

        Raises:
            ValueError: the rows that it has are of other images or of another profile; nothing is measured.
        """
        path = self.folder / f"{name}.parquet"
        before = self._of_this_profile(load_table(path)) if path.exists() else None
        tables, sources = dict[str, pd.DataFrame](), list[dict[str, Any]]()
        if before is not None:
            for method, rows in before.groupby("method", sort=False):
                if method in parts and len(rows) == number and (holds is None or holds(method, rows)):
                    tables[method] = rows
            source, there = before.attrs["provenance"], int(before.groupby("method").size().iloc[0])
            if (there, source["seed"]) != (number, seed):
                raise ValueError(
                    f"{path} has {there} images of seed {source['seed']}, and {number} of seed {seed} are asked for: "
                    "remove it, or choose another --out"
                )
            sources = source.get("sittings") or [_sitting(source)]
        missing = [method for method in parts if method not in tables]
        now, started = provenance(self.profile, seed), time.monotonic()
        for table in tables.values():
            table.attrs = {}
        for method in tqdm(missing, desc=name):
            tables[method] = parts[method]()
            tables[method].attrs = {}
            now["seconds"] = time.monotonic() - started
            rows = pd.concat([tables[method] for method in parts if method in tables], ignore_index=True)
            save_table(rows, path, {**now, "sittings": [*sources, _sitting(now)]})
        return load_table(path)

    def _of_this_profile(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table, if nothing that changes results was otherwise when it was recorded."""
        self._check_profile(table.attrs["provenance"]["profile"], table.attrs["folder"])
        return table

    def _check_profile(self, before: Mapping[str, Any], where: str | Path) -> None:
        now = settings(self.profile)
        for field in RESULT_FIELDS:
            if field in before and before[field] != now[field]:
                raise ValueError(
                    f"{where} has parts that were recorded with {field} {before[field]}, and {now[field]} is asked "
                    "for: choose another --out and --work, or remove them"
                )

    def compare(self, method: Method, seed: int, first_image: int, number: int) -> pd.DataFrame:
        """``compare`` with full compute, whose images are kept beside the parts."""
        reference = self.drawn(FULL, seed, first_image, number)
        return compare(method, reference, self.many_at_once, seed, first_image, networks=True)

    def compared(self, name: str, method: Method, seed: int, number: int) -> pd.DataFrame:
        """The table ``name`` of ``compare`` for the first ``number`` images of a seed, ``sizes.part`` at a time."""
        size = self.sizes.part
        parts = {
            first: functools.partial(self.compare, method, seed, first, min(size, number - first))
            for first in range(0, number, size)
        }
        return self.table(name, parts, seed)

    def drawn(self, method: Method, seed: int, first_image: int, number: int) -> Drawn:
        """Images that others are compared with: drawn once, ``sizes.part`` at a time, and kept beside the parts.

        Raises:
            ValueError: kept ones are of another profile.
        """
        name = slug(f"{method.name} {method.scheduler or self.profile.scheduler}")
        kept = []
        for first in range(first_image, first_image + number, self.sizes.part):
            count = min(self.sizes.part, first_image + number - first)
            path = self.parts / f"{name}-{seed}-{first}-{count}.pt"
            if not path.exists():
                drawn = draw(method, self.many_at_once, seed, first, count)
                with atomic_path(path) as temporary:
                    what = {"images": drawn.images, "labels": drawn.labels, "macs": drawn.macs}
                    torch.save({**what, "profile": settings(self.profile)}, temporary)
            kept.append(torch.load(path, weights_only=True))
            self._check_profile(kept[-1].get("profile", {}), path)
        images, labels = (torch.cat([part[field] for part in kept]) for field in ("images", "labels"))
        macs = sum(part["macs"] * len(part["labels"]) for part in kept) / number
        return Drawn(method, images, labels, macs, sites_reused=0.0, events=0.0, cache_bytes=0.0)


def _sitting(source: Mapping[str, Any]) -> dict[str, Any]:
    """Where, when and by which code some of a table's rows were measured."""
    return {name: source.get(name) for name in ("commit", "date", "device", "seconds")}
