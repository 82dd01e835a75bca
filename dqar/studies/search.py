"""Notebook 09's search: which settings of reuse, or of extrapolation, buy the most quality for their MACs.

Optuna proposes them; a study in SQLite keeps every trial, so that a stopped search goes on. The front is measured
again on images that it wasn't searched on.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dqar.checks import check_count
from dqar.config import CacheFormat, DQARConfig
from dqar.families import taken_layers
from dqar.measure import metrics
from dqar.measure.results import provenance, save_table, settings
from dqar.models.profiles import Profile
from dqar.studies.compare import FULL, Method, compare
from dqar.studies.pareto import extrapolated
from dqar.studies.recording import RESULT_FIELDS, Recording

if TYPE_CHECKING:
    import optuna  # an extra: only who searches needs it

SEARCH_SEED, FRONT_SEED = 1000, 1100
"""Of the images that are searched on, and of those that the front is measured on again."""
THIRDS = ("bits_shallow", "bits_middle", "bits_deep")
SPACE: dict[str, tuple[Any, ...]] = {
    "target": ("kv", "output", "block", "residual", "model"),
    "schedule": ("static", "all", "depth_aware", "linear"),
    "interval": (2, 6),
    "order": (0, 2),
    **dict.fromkeys(THIRDS, (2, 4, 8, 16)),
    "entropy": (2.5, 4.2),
    "snr": (0.3, 3.0),
    "last": (0, 8),
}
"""What is searched: choices, or the least and the greatest number.

``target``: of reuse, or ``"model"``: the whole model's output is extrapolated, and schedule, bits, entropy and snr
have no say. ``interval``: every n-th step computes; outside the static schedule, every site at least at every n-th.
``order``: of the forecast; K and V have none. ``bits_…``: of the cache, by thirds of the layers. ``entropy`` (nats),
``snr``: reuse below, and from there on. ``last``: steps at the end that always compute.
"""
CHOICES, LOGARITHMIC = ("target", "schedule", *THIRDS), ("snr",)
BY_HAND: tuple[dict[str, Any], ...] = (
    {"target": "model", "interval": 3, "order": 1, "last": 4},
    {"target": "block", "interval": 2, "order": 1, "last": 4},
    {"target": "output", "schedule": "all", "interval": 4, "order": 0, "entropy": 3.56, "snr": 0.5, "last": 0},
)
"""Settings of this project's other notebooks, to begin with."""
DEFAULTS = {"schedule": "static", **dict.fromkeys(THIRDS, 8), "entropy": SPACE["entropy"][1], "snr": SPACE["snr"][0]}
"""What ``BY_HAND`` leaves out."""
BEST = 80.0
"""dB that count as identical."""


@dataclass(frozen=True)
class Trials:
    """A study of one recording.

    Args:
        recording: profile, folders, and how many images a trial has.

    Raises:
        ValueError: the file is no study, or one of another search space, profile or number of images.
        ModuleNotFoundError: without Optuna.
    """

    recording: Recording

    @property
    def path(self) -> Path:
        """The SQLite file, beside the recording's finished parts."""
        return self.recording.parts / "search.db"

    @functools.cached_property
    def study(self) -> optuna.Study:
        """The study, made if it isn't there; trials that were cut off are put back.

        Raises:
            ValueError: its file is damaged, or another search's.
        """
        import optuna
        from sqlalchemy.exc import DatabaseError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                study = optuna.create_study(
                    storage=f"sqlite:///{self.path.resolve()}",
                    study_name="dqar",
                    directions=["minimize", "maximize"],
                    load_if_exists=True,
                )
            except (DatabaseError, RuntimeError) as error:
                message = f"{self.path} is no study of this Optuna: remove it, or choose another --work"
                raise ValueError(message) from error
            # Seeded by what is there, so that a search that goes on doesn't propose the same again.
            seed = len(study.get_trials(deepcopy=False))
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=16, multivariate=True)
        self._begin(study)
        return study

    def _begin(self, study: optuna.Study) -> None:
        """Writes what the study is about, or refuses another one; puts back trials that were cut off."""
        from optuna.trial import TrialState

        now = facts(self.recording)
        before = study.user_attrs.get("facts")
        if before is None:
            study.set_user_attr("facts", now)
            for values in BY_HAND:
                study.enqueue_trial({**DEFAULTS, **values})
        elif (differs := [name for name in now if before.get(name) != now[name]]) or before.keys() != now.keys():
            name = differs[0] if differs else next(iter(before.keys() - now.keys()))
            raise ValueError(
                f"{self.path} is a study of another search space: {name} is {before.get(name)} there and "
                f"{now.get(name)} here: choose another --work, or remove it"
            )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that came to their end, in order."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def run(self, number: int) -> None:
        """Goes on until ``number`` trials are finished."""
        missing = number - len(self.finished())
        if missing > 0:
            self.study.optimize(self._measure, n_trials=missing, show_progress_bar=False)

    def _measure(self, trial: optuna.Trial) -> tuple[float, float]:
        """Share of full compute's MACs, and dB at the 5th percentile, of the settings that Optuna proposes."""
        recording = self.recording
        reference = recording.drawn(FULL, SEARCH_SEED, 0, recording.sizes.search_images)
        method = method_of(trial.number, suggest(trial), recording.profile)
        rows = compare(method, reference, recording.many_at_once, SEARCH_SEED)
        trial.set_user_attr("mse", rows.mse.tolist())
        return 1 / float(rows.macs_speedup[0]), tail(rows.mse)

    def table(self) -> pd.DataFrame:
        """One row a trial and image: ``trial``, settings by ``SPACE``'s names, ``macs_speedup``, ``image``, ``mse``.

        ``front``: whether no other trial has both fewer MACs and more dB at the 5th percentile.
        """
        best = {trial.number for trial in self.study.best_trials}
        rows = []
        for trial in self.finished():
            same = {"trial": trial.number, **trial.params, "macs_speedup": 1 / trial.values[0]}
            same["front"] = trial.number in best
            rows += [{**same, "image": image, "mse": mse} for image, mse in enumerate(trial.user_attrs["mse"])]
        return pd.DataFrame(rows)

    def importance(self) -> pd.DataFrame:
        """By fANOVA (Hutter et al. 2014): what matters over the whole space.

        Returns:
            ``objective`` (``"MACs"``, ``"dB"``), ``setting`` and ``importance``: the share of the objective's variance
            that the setting explains by itself; what settings do together is in none of them.
        """
        import optuna

        rows = []
        targets = {"MACs": lambda trial: trial.values[0], "dB": lambda trial: trial.values[1]}
        for objective, target in targets.items():
            shares = dict.fromkeys(SPACE, 0.0)
            if len(set(map(target, self.finished()))) > 1:
                evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    shares |= optuna.importance.get_param_importances(
                        self.study, evaluator=evaluator, target=target, normalize=False
                    )
            rows += [{"objective": objective, "setting": name, "importance": value} for name, value in shares.items()]
        return pd.DataFrame(rows)


def facts(recording: Recording) -> dict[str, Any]:
    """What makes two studies the same: space, images, and what changes the profile's results."""
    fields = settings(recording.profile)
    same = {"space": SPACE, "images": recording.sizes.search_images, "seed": SEARCH_SEED}
    return json.loads(json.dumps({**same, **{name: fields[name] for name in RESULT_FIELDS}}, default=str))


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """What Optuna proposes, by ``SPACE``'s names."""
    values: dict[str, Any] = {}
    for name, among in SPACE.items():
        if name in CHOICES:
            values[name] = trial.suggest_categorical(name, among)
        elif isinstance(among[0], int):
            values[name] = trial.suggest_int(name, *among)
        else:
            values[name] = trial.suggest_float(name, *among, log=name in LOGARITHMIC)
    return values


def method_of(number: int, values: Mapping[str, Any], profile: Profile) -> Method:
    """The settings of a trial as a method; ``values`` by ``SPACE``'s names."""
    name, family = f"trial {number}", "searched"
    if values["target"] == "model":
        plan = extrapolated(profile, values["interval"], max(1, values["last"]), values["order"])
        return Method(name, family, plan)
    layers = len(taken_layers(FULL.pipeline(profile).transformer))
    bits = tuple(values[THIRDS[len(THIRDS) * layer // layers]] for layer in range(layers))
    config = DQARConfig(
        entropy_threshold=values["entropy"],
        snr_range=(values["snr"], math.inf),
        reuse_target=values["target"],
        schedule=values["schedule"],
        static_interval=values["interval"],
        max_reuse_streak=values["interval"] - 1,
        cooldown=values["last"],
        cache=CacheFormat(0 if values["target"] == "kv" else values["order"], layer_bits=bits),
    )
    return Method(name, family, config)


def tail(mse: pd.Series) -> float:
    """PSNR (dB) at the 5th percentile of images with these squared errors, at most ``BEST``."""
    return float(np.quantile(metrics.decibels(mse.clip(lower=10 ** (-BEST / 10))), 0.05))


def points(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a trial of recorded rows: everything that its images have in common, and ``psnr_5th``: ``tail`` (dB)."""
    by = rows.groupby("trial", sort=False)
    table = by[[name for name in ("macs_speedup", "front", *SPACE) if name in rows]].first()
    table["psnr_5th"] = by.mse.agg(tail)
    table.attrs = rows.attrs
    return table.reset_index()


def front_of(table: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most ``most`` points of the front that save at least 5 % of the MACs, evenly spread over its ranks."""
    front = points(table).query("front and macs_speedup >= 1.05").sort_values("macs_speedup")
    front = front.drop_duplicates(["macs_speedup", "psnr_5th"])  # Optuna may propose the same twice
    ranks = np.linspace(0, len(front) - 1, min(most, len(front)))  # never empty: what saves most is on the front
    return front.iloc[np.unique(ranks.round().astype(int))]


def remeasured(trials: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``points`` of ``search-front``'s ``rows``: the front of ``trials``, the least saving first, and ``BY_HAND``."""
    table = points(rows).sort_values("macs_speedup", ignore_index=True)
    return table[table.trial.isin(trials.trial[trials.front])], table[table.trial < len(BY_HAND)]


def record_search(recording: Recording, trials: int | None = None) -> pd.DataFrame:
    """Searches until so many trials are finished (``sizes.search_trials`` if left out), then measures the front again,
    and ``BY_HAND`` beside it.

    Writes ``search`` (``Trials.table``), ``search-importance`` (``Trials.importance``) and ``search-front``: the rows
    of ``compare`` with ``trial``, on images of ``FRONT_SEED``; ``remeasured`` tells the two apart.

    Returns:
        ``search-front``.

    Raises:
        ValueError: ``trials`` below 3, or see ``Trials``.
    """
    sizes = recording.sizes
    trials = sizes.search_trials if trials is None else trials
    check_count("trials", trials, 3)
    study = Trials(recording)
    study.run(trials)
    table, source = study.table(), provenance(recording.profile, SEARCH_SEED)
    save_table(table, recording.folder / "search.parquet", source)
    save_table(study.importance(), recording.folder / "search-importance.parquet", source)
    front, tried = front_of(table, sizes.front_points), points(table)
    chosen = tried[(tried.trial < len(BY_HAND)) | tried.trial.isin(front.trial)]

    def again(row: Any) -> pd.DataFrame:
        method = method_of(row.trial, row._asdict(), recording.profile)
        rows = recording.compare(method, FRONT_SEED, 0, sizes.front_images)
        return rows.drop(columns="features", errors="ignore").assign(trial=row.trial)

    parts: dict[str, Callable[[], pd.DataFrame]] = {
        f"trial {row.trial}": functools.partial(again, row) for row in chosen.itertuples(index=False)
    }
    return recording.growing("search-front", parts, FRONT_SEED, sizes.front_images)
