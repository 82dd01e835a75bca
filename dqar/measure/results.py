"""Results: tidy tables with their provenance, written whole or not at all, reused when a run is resumed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dqar.files import atomic_path
from dqar.models.profiles import WEIGHTS, Profile, profile_of

PACKAGE = Path(__file__).parent.parent
IN_A_CHECKOUT = (PACKAGE.parent / "pyproject.toml").exists()
_RECORDED = PACKAGE.parent / "recorded" if IN_A_CHECKOUT else Path("recorded")
RECORDED = Path(os.environ.get("DQAR_RECORDED", _RECORDED))
"""Long measurements of ``dqar.studies.record``, by profile: those in ``$DQAR_RECORDED``, in the repository, or, of an
installed package, in the working folder."""
BENCHMARKS = _RECORDED / "benchmarks"
"""Those of ``dqar benchmark``, which belong to no profile."""


class Run:
    """One run of the workbook: a profile, a seed, and the folder that its results and figures go to.

    Args:
        profile: name of a profile in ``dqar.models.profiles``, or a mapping of its ``name`` and fields to change.
        seed: of all sampling.
        out: folder for ``results/`` and ``figures/``, made if it isn't there.

    Raises:
        ValueError: unknown profile.
        OSError: ``out`` can't be written.
    """

    def __init__(self, profile: str | Mapping[str, Any], seed: int = 0, out: str | Path = "out"):
        self.profile = profile_of(profile)
        self.seed = seed
        label = self.profile.label
        self.recordings = RECORDED / label
        self.results, self.figures = Path(out) / "results" / label, Path(out) / "figures"
        for folder in (self.results, self.figures):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / ".writable").touch()
                (folder / ".writable").unlink()
            except OSError as error:
                raise OSError(f"cannot write results to {folder}: {error.strerror}; choose another `out`") from error

    def table(self, name: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table ``name`` of this run: read if it was measured by this very code, else measured and saved."""
        path = self.results / f"{name}-seed{self.seed}.parquet"
        key = _fingerprint(self.profile, self.seed)
        if path.exists():
            table = load_table(path)
            if table.attrs["provenance"]["fingerprint"] == key:
                return table
        started = time.monotonic()
        table = measure()
        save_table(table, path, {**provenance(self.profile, self.seed), "seconds": time.monotonic() - started})
        return load_table(path)

    def recorded(self, name: str) -> pd.DataFrame | None:
        """A table of ``dqar.studies.record`` for this profile, with its provenance; ``None`` if it isn't recorded."""
        path = self.recordings / f"{name}.parquet"
        return load_table(path) if path.exists() else None


def slug(name: str) -> str:
    """``name`` as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("---", "-").replace("--", "-").strip("-")


def provenance(profile: Profile, seed: int) -> dict[str, Any]:
    """What was run, on what, when, and by which code."""
    return {
        "profile": settings(profile),
        "seed": seed,
        "device": torch.cuda.get_device_name() if profile.device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(profile.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy", "pandas")},
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": _fingerprint(profile, seed),
    }


def settings(profile: Profile) -> dict[str, Any]:
    """The profile's fields as a provenance has them."""
    return {**dataclasses.asdict(profile), "dtype": str(profile.dtype)}


def save_table(table: pd.DataFrame, path: Path, source: dict[str, Any]) -> None:
    """Writes parquet with the provenance ``source`` in its metadata."""
    import pyarrow as pa  # here, since plans are fitted without any table
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), b"provenance": json.dumps(source).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(arrow, temporary)


def load_table(path: Path) -> pd.DataFrame:
    """Reads what ``save_table`` wrote; ``attrs`` has its ``provenance``, and the ``folder`` that it lies in.

    Raises:
        ValueError: truncated, or without provenance.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.read_table(path)
        source = json.loads(arrow.schema.metadata[b"provenance"])
    except (pa.ArrowInvalid, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated or no results file of dqar: remove it and run again") from error
    table = arrow.to_pandas()
    table.attrs = {"provenance": source, "folder": str(path.parent)}
    return table


def _fingerprint(profile: Profile, seed: int) -> str:
    return hashlib.sha256(f"{profile}|{seed}|{code_hash()}|{torch.__version__}".encode()).hexdigest()[:16]


_NOT_MEASURING = {
    *("workbook.py", "__main__.py", "api.py", "measure/results.py"),
    *("studies/architecture.py", "studies/arena.py", "studies/batches.py", "studies/cache_memory.py"),
    "studies/challenges.py",
    *("studies/claims.py", "studies/conclusions.py", "studies/controller.py", "studies/overhead.py"),
    *("studies/pareto.py", "studies/plans.py", "studies/policy.py", "studies/qat.py"),
    *("studies/record.py", "studies/recording.py"),
    *("studies/results.py", "studies/search.py", "studies/solvers.py", "studies/sweep.py", "studies/video.py"),
}
"""Modules that no table of ``Run.table`` depends on: they arrange, draw or record what is kept until it is removed."""


@functools.cache
def code_hash(everything: bool = False) -> str:
    """A digest of the weights and of the code that measures, or of all the code."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if everything or not (name in _NOT_MEASURING or name.startswith(("commands/", "figures/", "training/"))):
            digest.update(path.read_bytes())
    for path in sorted(WEIGHTS.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def recorded_hash(label: str) -> str:
    """A digest of the recorded tables of the profile with this label, and of the benchmarks, which belong to none."""
    digest = hashlib.sha256()
    for folder in (RECORDED / label, BENCHMARKS):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def commit() -> str:
    """The commit that the code is at, with ``+changes`` if it was changed since; words where there is no checkout."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py", "*.safetensors"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
