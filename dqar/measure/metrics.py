"""What a configuration costs and what it does to the images: quality, Fréchet distance, MACs, time, memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm.auto import tqdm

from dqar.models.classifier import Classifier


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch has formulas for the attention kernels of GPUs, but not for the CPU's, nor for integers.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._int_mm: flop_registry[torch.ops.aten.mm],
}


def squared_errors(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each image, ``[N]`` float64, of two sets ``[N, ...]``."""
    _same_shape(images, reference)
    return (images.double() - reference.double()).square().flatten(1).mean(1)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per image, ``[N]``, of images in [0, 1]; ``inf`` where they are identical."""
    return -10 * squared_errors(images, reference).log10()


def mean_psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """PSNR in dB of the mean squared error of all images ``[N, ...]``; one identical image can't make it infinite."""
    return float(-10 * squared_errors(images, reference).mean().log10())


IDENTICAL = 1e-12
"""A mean squared error that counts as none: 120 dB."""


def decibels(squared_error: float | pd.Series) -> Any:
    """PSNR in dB of a mean squared error of images in [0, 1], or of a series of them; ``inf`` at 0."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(squared_error)


def psnr_interval(
    squared_error: np.ndarray, measure: Callable[..., np.ndarray] = np.mean, resamples: int = 2000
) -> tuple[float, float]:
    """The 95 % interval of the PSNR (dB) of images' squared errors ``[N]``: percentile bootstrap over the images.

    Args:
        measure: of the errors, over an ``axis``: ``np.mean`` or ``np.median``.

    Returns:
        Low and high; ``inf`` where images are identical.
    """
    chosen = np.random.default_rng(0).integers(0, len(squared_error), (resamples, len(squared_error)))
    most, least = np.quantile(measure(squared_error[chosen], axis=1), (0.975, 0.025))
    return float(decibels(most)), float(decibels(least))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity per image, ``[N]``; a 3-pixel window (σ 0.5) below 32 pixels, else 11 (σ 1.5).

    Of videos ``[N, F, C, H, W]`` the mean of their frames.
    """
    _same_shape(images, reference)
    if images.ndim == 5:
        return ssim(images.flatten(0, 1), reference.flatten(0, 1)).view(len(images), -1).mean(1)
    small = images.shape[-1] < 32
    similarity = structural_similarity_index_measure(
        images, reference, sigma=0.5 if small else 1.5, kernel_size=3 if small else 11, data_range=1.0, reduction="none"
    )
    assert isinstance(similarity, torch.Tensor)  # a tuple only where the whole image is asked for
    return similarity


@dataclass(frozen=True)
class Gaussian:
    """What a Fréchet distance knows of a set of features: mean ``[D]`` and covariance ``[D, D]``, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Gaussian:
        """Of features ``[N >= 2, D]``.

        Raises:
            ValueError: fewer than two samples, or NaN or inf in the features.
        """
        _check_features("reference", features)
        return cls(features.double().mean(0), torch.cov(features.double().T))

    @functools.cached_property
    def root(self) -> torch.Tensor:
        """The covariance's square root ``[D, D]``."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet_distance(features: torch.Tensor, reference: torch.Tensor | Gaussian) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features ``[N, D]`` (Heusel et al. 2017), in float64.

    ``‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½)``. Name it after the extractor (``FD-digits``); FID is Inception's only.

    Raises:
        ValueError: fewer than two samples, NaN or inf in the features, or another number of them than the reference's.
    """
    _check_features("features", features)
    other = reference if isinstance(reference, Gaussian) else Gaussian.of(reference)
    if features.shape[1] != len(other.mean):
        raise ValueError(f"{features.shape[1]} features can't be compared with a reference of {len(other.mean)}")
    a = features.to(other.mean)
    centred = (a - a.mean(0)) / (len(a) - 1) ** 0.5
    # With X the centred features, (Σ₁Σ₂)^½ has the trace of the nuclear norm of X√Σ₂: its Gram matrix is symmetric, and
    # of N or of D rows, whichever are fewer.
    product = centred @ other.root
    gram = product @ product.T if len(product) < product.shape[1] else product.T @ product
    root_trace = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - other.mean).square().sum() + centred.square().sum() + other.covariance.trace()
    return float((distance - 2 * root_trace).clamp_min(0))


def _check_features(name: str, x: torch.Tensor) -> None:
    if x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
        raise ValueError(f"{name} of shape {tuple(x.shape)}: needs [N >= 2, D] finite values")


@torch.no_grad()
def classify(classifier: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted classes ``[N]`` and features ``[N, D]`` of images ``[N, C, H, W]`` in [0, 1]."""
    features = torch.cat([classifier.features(part * 2 - 1) for part in images.split(500)])
    return classifier.head(features).argmax(1), features


class _FlopCounter(TorchDispatchMode):
    """``torch.utils.flop_counter.FlopCounterMode``'s sum alone: following the modules, too, takes it twice the time."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def count_macs(call: Callable[[], object]) -> int:
    """Multiply-accumulates of all matrix products, convolutions and attentions that ``call`` executes.

    By the formulas of ``torch.utils.flop_counter``, of whatever reaches a kernel: nothing is derived.
    """
    with _FlopCounter() as counter:
        call()
    return counter.flops // 2


def cost_clock(device: str) -> Callable[[], float]:
    """What tells the cost of a call: this process's CPU time on a CPU, whatever else runs there; else the wall's."""
    return time.process_time if device == "cpu" else time.perf_counter


def interleaved_times(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> pd.DataFrame:
    """Times the calls in turn (A B C A B C ...) after one warm-up each; tidy: method, repeat, seconds.

    Only ratios within one such table are meaningful: never compare across runs. ``clock`` may be ``cost_clock``'s.
    """
    rows = []
    for repeat in tqdm(range(-1, repeats), desc="timing", leave=False):
        for method, call in calls.items():
            _synchronize(device)
            started = clock()
            call()
            _synchronize(device)
            if repeat >= 0:
                rows.append({"method": method, "repeat": repeat, "seconds": clock() - started})
    return pd.DataFrame(rows)


def speedups(times: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Median and quartiles of each method's speedup over ``baseline``, paired by repeat."""
    wide = times.pivot(index="repeat", columns="method", values="seconds")
    ratios = wide.rdiv(wide[baseline], axis=0)
    return ratios.quantile([0.25, 0.5, 0.75]).T.set_axis(["speedup_low", "speedup", "speedup_high"], axis=1)


def reset_peak_memory(device: str = "cpu") -> None:
    """Begins a new peak, so that what was needed to load a model doesn't hide what running it needs."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: str = "cpu") -> int:
    """Peak since ``reset_peak_memory``: allocated bytes on a GPU, resident bytes of this process on a CPU (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _same_shape(images: torch.Tensor, reference: torch.Tensor) -> None:
    if images.shape != reference.shape:
        raise ValueError(f"images {tuple(images.shape)} and reference {tuple(reference.shape)} must have one shape")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
