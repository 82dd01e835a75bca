"""How many bits each layer's cache needs: what few bits do to the images, layer by layer, and the best for a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from diffusers import DiffusionPipeline
from scipy.optimize import Bounds, LinearConstraint, milp
from tqdm.auto import tqdm

from dqar.attention import DQARSession, apply_dqar
from dqar.checks import check
from dqar.config import WIDTHS, DQARConfig
from dqar.families import taken_layers
from dqar.measure import metrics
from dqar.measure.sampling import Samples, images_at_once, sample
from dqar.models.profiles import Profile

FEW = tuple(bits for bits in WIDTHS if bits < 16)


def unquantized(config: DQARConfig) -> DQARConfig:
    """The same reuse from a cache that keeps the model's own dtype."""
    cache = dataclasses.replace(config.cache, fitted=False, keep_channels=0, layer_bits=None)
    return dataclasses.replace(config, quantize_bits=16, mixed_precision=False, balance=False, cache=cache)


def with_layer_bits(config: DQARConfig, bits: tuple[int, ...]) -> DQARConfig:
    """The same with these bits of each layer."""
    if min(bits) == 16:
        return unquantized(config)
    return dataclasses.replace(config, cache=dataclasses.replace(config.cache, layer_bits=bits))


def layer_errors(
    pipe: DiffusionPipeline, profile: Profile, seed: int, config: DQARConfig, num_samples: int | None = None
) -> pd.DataFrame:
    """What each layer's cache does to the finished images, when it alone is kept in few bits.

    Args:
        pipe: from ``load_pipeline``, without DQAR.
        config: of the reuse, which must not depend on what is measured, and of the cache's format; its bits have no
            say.

    Returns:
        One row a layer, width and image: ``layer``, ``bits`` (16, 8, 4, 2), ``image``; ``mse`` to the same reuse from
        an unquantized cache; ``bytes`` that the layer keeps for an image, at the step that keeps most.
    """
    number, plain = num_samples or profile.num_samples, unquantized(config)
    reference = sample(pipe, profile, seed, plain, num_samples=number, description="unquantized cache")
    layers, at_once = len(taken_layers(pipe.transformer)), images_at_once(profile, number)
    kept = _bytes(reference) / at_once
    rows = [_rows(reference, reference, layer=layer, bits=16, bytes=kept[layer]) for layer in range(layers)]
    for layer, bits in tqdm([*itertools.product(range(layers), FEW)], desc="bits, layer by layer", leave=False):
        alone = with_layer_bits(config, tuple(bits if other == layer else 16 for other in range(layers)))
        drawn = sample(pipe, profile, seed, alone, num_samples=number, description=f"layer {layer}, {bits} bits")
        rows.append(_rows(drawn, reference, layer=layer, bits=bits, bytes=_bytes(drawn)[layer] / at_once))
    return pd.concat(rows, ignore_index=True)


def step_errors(
    pipe: DiffusionPipeline, profile: Profile, seed: int, config: DQARConfig, num_samples: int | None = None
) -> pd.DataFrame:
    """What the cache of each step does to the finished images, when it alone is kept in few bits.

    Args:
        pipe, config: as of ``layer_errors``; the pipeline calls its transformer once a step.

    Returns:
        One row a step, width and image: ``step`` at which the cache is written, ``bits`` (8, 4, 2), ``image``, ``mse``
        to the same reuse from an unquantized cache.
    """
    reference = sample(
        pipe, profile, seed, unquantized(config), num_samples=num_samples, description="unquantized cache"
    )
    trace = reference.traced.to_pandas()
    steps = sorted(trace.step[(trace.decision == "compute") & (trace.bytes > 0)].unique())
    rows = []
    for step, bits in tqdm([*itertools.product(steps, FEW)], desc="bits, step by step", leave=False):
        cache = dataclasses.replace(config.cache, layer_bits=None)
        few = dataclasses.replace(config, quantize_bits=bits, cache=cache)
        with apply_dqar(pipe, few) as session, _quantized_at(session, step, profile.num_inference_steps):
            drawn = sample(pipe, profile, seed, num_samples=num_samples, description=f"step {step}, {bits} bits")
        rows.append(_rows(drawn, reference, step=step, bits=bits))
    return pd.concat(rows, ignore_index=True)


@contextmanager
def _quantized_at(session: DQARSession, step: int, steps: int) -> Iterator[None]:
    """Runs of so many steps whose cache is the session's at one step, and unquantized at all others."""
    assert isinstance(session.config, DQARConfig)
    config, plain, calls = session.config, unquantized(session.config), itertools.count()

    def choose(*_: Any) -> None:
        session.controller.cache.config = config if next(calls) % steps == step else plain

    first = taken_layers(session.transformer)[0].block
    with first.register_forward_pre_hook(choose):  # by then the call has its controller
        yield


def choose_bits(errors: pd.DataFrame, budget: float) -> tuple[int, ...]:
    """The bits of each layer with the least sum of errors among those that keep at most ``budget`` bytes for an image.

    Exact, by mixed-integer programming, so far as the errors of layers add up.

    Args:
        errors: of ``layer_errors``.

    Raises:
        ValueError: a budget below what the fewest bits take.
    """
    costs = errors.groupby(["layer", "bits"])[["mse", "bytes"]].mean()
    sizes, mse = (costs[name].unstack("bits").to_numpy() for name in ("bytes", "mse"))
    least = sizes.min(axis=1).sum()
    check("budget", budget, budget >= least, f"at least {least:.0f} bytes an image, of the fewest bits")
    layers, widths = sizes.shape
    unit = np.median(mse[mse > 0]) if mse.any() else 1.0  # solvers stop at a millionth, and errors of images are less
    each = LinearConstraint(np.kron(np.eye(layers), np.ones(widths)), 1, 1)
    within = LinearConstraint(sizes.reshape(1, -1) / budget, ub=1)
    solution = milp(
        mse.ravel() / unit, integrality=np.ones(mse.size), bounds=Bounds(0, 1), constraints=[each, within],
        options={"mip_rel_gap": 0},
    )  # fmt: skip
    assert solution.x is not None, solution.message
    names = costs.index.unique("bits").sort_values()
    return tuple(int(names[place]) for place in solution.x.reshape(layers, widths).argmax(axis=1))


def calibrate_bits(
    pipe: DiffusionPipeline, profile: Profile, seed: int, config: DQARConfig, share: float, num_samples: int = 4
) -> tuple[DQARConfig, pd.DataFrame]:
    """Chooses the bits of each layer's cache for a share of the 16-bit cache's bytes, and measures them on others.

    Args:
        pipe, config: as of ``layer_errors``.
        share: of the bytes of a 16-bit cache, at most.
        num_samples: images that bits are chosen by, and others that they are measured on.

    Returns:
        The configuration with ``cache.layer_bits``; and what it was measured to do, beside the most uniform bits that
        keep no more bytes: ``bits`` (mean of layers), ``share``, and PSNR (dB) to an unquantized cache, of the
        ``median`` and the ``worst`` image.

    Raises:
        ValueError: a share that isn't in (0, 1], or less than the fewest bits take.
    """
    check("bytes", share, 0 < share <= 1, "more than 0, at most 1")
    errors = layer_errors(pipe, profile, seed, config, num_samples)
    sizes = errors.groupby(["layer", "bits"]).bytes.mean().unstack()
    half = sizes[16].sum() * 2 / profile.dtype.itemsize
    least = sizes.min(axis=1).sum() / half
    check("bytes", share, share >= least, f"the fewest bits take {least:.3f} of a 16-bit cache")
    mixed = choose_bits(errors, share * half)
    kept = sum(sizes[bits][layer] for layer, bits in enumerate(mixed))
    fitting = max(bits for bits in sizes if sizes[bits].sum() <= kept * (1 + 1e-9))
    reference = sample(
        pipe, profile, seed, unquantized(config), num_samples=num_samples, first_image=num_samples,
        description="unquantized cache",
    )  # fmt: skip
    rows = []
    for bits in dict.fromkeys([mixed, (fitting,) * len(mixed)]):
        chosen = with_layer_bits(config, bits)
        drawn = sample(pipe, profile, seed, chosen, num_samples=num_samples, first_image=num_samples)
        quality = metrics.psnr(drawn.images, reference.images)
        size = sum(sizes[width][layer] for layer, width in enumerate(bits)) / half
        rows.append((chosen.mean_bits, size, quality.quantile(0.5).item(), quality.min().item()))
    table = pd.DataFrame(rows, columns=["bits", "share", "median", "worst"])
    return with_layer_bits(config, mixed), table


def _bytes(drawn: Samples) -> pd.Series:
    """Bytes of each layer's cache, of all images at once, at the step that keeps most."""
    by_step = drawn.traced.to_pandas().groupby(["layer", "run", "step"]).bytes.sum()
    return by_step.groupby("layer").max()


def _rows(drawn: Samples, reference: Samples, **same: float) -> pd.DataFrame:
    mse = metrics.squared_errors(drawn.images, reference.images)
    return pd.DataFrame({**same, "image": range(len(mse)), "mse": mse.numpy()})
