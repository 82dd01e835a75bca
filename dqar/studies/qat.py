"""Notebook 09's panel on quantization-aware training: the model fine-tuned under reuse from a quantized cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline, DiTTransformer2DModel

from dqar.measure import metrics
from dqar.measure.quality import Reference
from dqar.models.pipelines import with_parts
from dqar.models.profiles import Profile
from dqar.studies import arena, results
from dqar.studies.compare import FULL, Drawn, Method, compare, draw, only
from dqar.studies.recording import ARENA_SEED, Recording
from dqar.training.quantized_reuse import TuningRecipe, cache_config, tune

CACHES: dict[int | None, str] = {None: FULL.name, 16: "float", 8: "INT8", 4: "INT4", 2: "INT2"}
"""What a model draws with, by the cache's bits: 16 keep the model's own dtype; ``None``: nothing is reused."""
SHIPPED, UNQUANTIZED = "shipped model", "tuned, float"
QUANTIZED = {"tuned, INT4": 4, "tuned, INT2": 2}
MODELS: dict[str, int | None] = {SHIPPED: None, UNQUANTIZED: 16, **QUANTIZED}
"""By the bits of the cache that each was tuned with. Tuned without reuse it would be the shipped one: the loss is the
distance to that."""
TUNED, FITTED, WITHOUT = "tuned model", "fitted plan", "without the quantizer"
"""What can know of the quantizer, and what it is compared with beside ``SHIPPED``."""


@dataclass(frozen=True)
class TunedMethod(Method):
    """A method of a fine-tuned model.

    Attributes:
        recipe: of the tuning; ``None``: the profile's own model.
        work: folder of the tuning's checkpoint, from which it goes on.
    """

    recipe: TuningRecipe | None = None
    work: Path = Path()

    def pipeline(self, profile: Profile) -> DiffusionPipeline:
        """See ``Method``; what isn't tuned yet is tuned first."""
        pipe = super().pipeline(profile)
        if self.recipe is None:
            return pipe
        return with_parts(pipe, transformer=_tuned(self.recipe, self.work).to(pipe.device, pipe.dtype))


@functools.lru_cache(maxsize=4)
def _tuned(recipe: TuningRecipe, work: Path) -> DiTTransformer2DModel:
    return tune(recipe, work)


def methods(recording: Recording) -> dict[tuple[str, int | None], TunedMethod]:
    """Every model with every cache, by the model's name and the cache's bits."""
    profile, sizes = recording.profile, recording.sizes
    by_cache = {}
    for model, tuned_with in MODELS.items():
        recipe = None
        if tuned_with is not None:
            sampler = profile.scheduler, profile.num_inference_steps
            recipe = TuningRecipe(tuned_with, *sampler, sizes.tuning_steps, sizes.tuning_batch)
        for bits, cache in CACHES.items():
            name = FULL.name if (model, bits) == (SHIPPED, None) else f"{model}, {cache}"
            config = None if bits is None else cache_config(bits)
            work = recording.parts / f"qat-{tuned_with}"
            by_cache[model, bits] = TunedMethod(name, model, config, recipe=recipe, work=work)
    return by_cache


def record_qat(recording: Recording) -> pd.DataFrame | None:
    """Every model with every cache on the same images; of the digits model, of others nothing.

    Returns:
        The columns of ``compare``, whose ``mse`` is to the same model's full compute, with ``mse_shipped`` to the
        shipped model's; ``tuning_steps`` and ``tuning_batch`` of the recipes.
    """
    if recording.profile.model != "digits":
        return None
    profile, sizes, by_cache = recording.many_at_once, recording.sizes, methods(recording)

    @functools.cache
    def full(model: str) -> Drawn:
        return draw(by_cache[model, None], profile, ARENA_SEED, num_samples=sizes.tuned_images)

    def part(model: str, bits: int | None) -> pd.DataFrame:
        beside = {"shipped": full(SHIPPED).images}
        rows = compare(by_cache[model, bits], full(model), profile, ARENA_SEED, beside=beside)
        return rows.assign(tuning_steps=sizes.tuning_steps, tuning_batch=sizes.tuning_batch)

    parts = {method.name: functools.partial(part, *key) for key, method in by_cache.items()}
    return recording.growing("qat", parts, ARENA_SEED, sizes.tuned_images)


def summary(table: pd.DataFrame, real: Reference) -> pd.DataFrame:
    """One row a method of ``record_qat``.

    Args:
        table: of ``record_qat``.
        real: what Fréchet distances are to.

    Returns:
        ``method``, ``family`` (the model), ``bits`` (NaN: full compute), ``macs_speedup``, ``class_accuracy``; the
        ``median`` of the PSNR (dB) to the shipped model's full compute, its 95 % bootstrap interval ``median_low`` and
        ``median_high``, and the ``5th percentile``; the same to the same model's full compute, which is the error of
        reuse alone, as ``reuse_…``; NaN where images are compared with themselves. And those of ``frechet_intervals``,
        NaN of fewer images than features.
    """
    by_method = table.groupby("method", sort=False)
    points = by_method[["family", "bits", "macs_speedup"]].first()
    points["class_accuracy"] = (table.predicted == table.label).groupby(table.method).mean()
    for prefix, column in (("", "mse_shipped"), ("reuse_", "mse")):
        errors = table.pivot(index="method", columns="image", values=column).clip(lower=metrics.IDENTICAL)
        errors = errors.loc[by_method[column].max() > 0]
        chosen = np.random.default_rng(0).integers(0, errors.shape[1], (2000, errors.shape[1]))
        trials = np.array([arena.MEASURES["median"](row[chosen]) for row in errors.to_numpy()])
        measured = {name: arena.MEASURES[name](errors.to_numpy()) for name in arena.SHOWN}
        measured |= {f"median_{end}": np.quantile(trials, x, axis=1) for end, x in (("low", 0.025), ("high", 0.975))}
        points = points.join(pd.DataFrame(measured, index=errors.index).add_prefix(prefix))
    distances = results.frechet_intervals(table, real).set_index("method")
    if table.image.nunique() < len(real.features.mean):
        distances[:] = np.nan
    return points.join(distances).reset_index()


def gains(table: pd.DataFrame, history: pd.DataFrame | None) -> pd.DataFrame:
    """What a quantizer in the loop changes, in the median PSNR (dB) to the shipped model's full compute.

    Args:
        table: of ``record_qat``.
        history: of ``plans.record_history``, the cheaper rival; ``None``: without it.

    Returns:
        ``what`` (``TUNED`` or ``FITTED``), ``over`` (``SHIPPED``, or ``WITHOUT`` a quantizer in tuning or fit) and
        ``bits``; ``gain`` with its 95 % interval ``low`` and ``high``, paired bootstrap over ``images``.
    """
    rows = []
    for model, bits in QUANTIZED.items():
        errors = table[table.bits == bits].pivot(index="image", columns="family", values="mse_shipped")
        for over, baseline in ((SHIPPED, SHIPPED), (WITHOUT, UNQUANTIZED)):
            change = arena.gain(errors[baseline].to_numpy(), errors[model].to_numpy())
            rows.append((TUNED, over, bits, *change, len(errors)))
    formats = [] if history is None else [(bits, drawn) for bits, drawn in history.groupby("bits") if bits != 16]
    for bits, drawn in reversed(formats):
        errors = drawn.pivot(index="image", columns="fitted_in", values="mse")
        change = arena.gain(errors[16].to_numpy(), errors[bits].to_numpy())
        rows.append((FITTED, WITHOUT, bits, *change, len(errors)))
    return pd.DataFrame(rows, columns=["what", "over", "bits", "gain", "low", "high", "images"])


def compensates(table: pd.DataFrame) -> bool:
    """Whether tuning with the quantizer gains over no tuning and over tuning without it, in INT4 and in INT2, by all
    intervals."""
    return bool((gains(table, None).low > 0).all())


def in_words(table: pd.DataFrame, history: pd.DataFrame) -> str:
    """The finding of ``record_qat``, beside the rival's."""
    changes = gains(table, history)
    four, two = (only(changes, what=TUNED, over=SHIPPED, bits=bits).gain for bits in (4, 2))
    return (
        f"Tuning through the quantizer changes the median by {four:+.1f} dB in INT4 and {two:+.1f} in INT2; fitting a "
        f"plan's weights through INT4 by {only(changes, what=FITTED, bits=4).gain:+.1f}"
    )


def in_short(table: pd.DataFrame, history: pd.DataFrame | None) -> str:
    """For slide 16's row: the gains over the shipped model, and of a plan's fit."""
    changes = gains(table, history)
    four, two = (only(changes, what=TUNED, over=SHIPPED, bits=bits) for bits in QUANTIZED.values())
    tuned = (f"INT{row.bits} {row.gain:+.1f} dB ({row.low:+.1f} to {row.high:+.1f})" for row in (four, two))
    shipped = table[table.family == SHIPPED].pivot(index="image", columns="bits", values="mse_shipped")
    cost = -arena.gain(shipped[16].to_numpy(), shipped[8].to_numpy())[0]
    words = f"INT8 costs {cost:.2f} dB. Tuning: {', '.join(tuned)}; n = {two.images}"
    if history is None:
        return words
    fit = only(changes, what=FITTED, bits=4)
    return f"{words}. A plan's weights fitted through INT4: {fit.gain:+.1f} dB; n = {fit.images}"
