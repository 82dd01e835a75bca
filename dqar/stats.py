"""The signals of the gate: attention entropy and latent SNR (slide 4), and the threshold τ(p) (slide 5)."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from dqar.checks import check, check_choice

MAP_TOKENS = 128
"""Up to so many keys a whole attention map is cheaper than tiles of it."""


def attention_entropy(
    attn_map: torch.Tensor, eps: float = 1e-6, reduction: Literal["mean", "sum", "none"] = "mean"
) -> torch.Tensor:
    """Entropy of attention maps ``[B, H, Nq, Nk]``, in nats, accumulated in float32 at least.

    - ``"mean"``: ``-Σ_j A log A`` averaged over heads and queries, ``[B]``, between 0 and ln Nk;
    - ``"sum"``: slide 4 to the letter, ``-(1/H) Σ_h Σ_ij A log(A + ε)``, ``[B]``: up to Nq·ln Nk;
    - ``"none"``: averaged over queries only, ``[B, H]``.

    Except in ``"sum"``, ε is a lower bound of the logarithm's argument. Adding it, as the slide does, lowers every
    entropy by Nk·ε nats.

    Raises:
        ValueError: another shape or reduction.
    """
    if attn_map.ndim != 4:
        raise ValueError(f"attn_map of shape {tuple(attn_map.shape)} is not accepted: needs [B, H, Nq, Nk]")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    weights = attn_map.to(torch.promote_types(attn_map.dtype, torch.float32))
    if reduction == "sum":
        return -(weights * (weights + eps).log()).sum(dim=(2, 3)).mean(dim=1)
    per_head = -(weights * weights.clamp_min(eps).log()).sum(dim=3).mean(dim=2)
    return per_head.mean(dim=1) if reduction == "mean" else per_head


@torch.no_grad()
def query_entropy(query: torch.Tensor, key: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Exact entropy of each query's attention, ``[B, H, Nq]`` in nats, from ``[B, H, N, D]``; no map is kept.

    Up to ``MAP_TOKENS`` keys, whole maps are cheapest. Above, tile by tile of the scores, small enough for the
    processor's cache: with ``d = s - max s``, ``e = exp d`` and ``Z = Σ e``, the entropy ``-Σ p log p`` is
    ``log Z - Σ e·d / Z``. Half precision is raised to float32. On a GPU one Triton kernel does it, if Triton is there.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kernel = _kernel(query.device)
    if kernel is not None and query.dtype != torch.float64:
        return kernel(query, key, scale)
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape, num_keys = query.shape[:3], key.shape[2]
    if num_keys <= MAP_TOKENS:
        logs = ((query.to(dtype) * scale) @ key.to(dtype).mT).log_softmax(-1)
        return torch.linalg.vecdot(logs.exp(), logs).neg_()
    query = (query.to(dtype) * scale).flatten(0, 1)
    key = key.to(dtype).flatten(0, 1).transpose(1, 2)
    entropy = query.new_empty(query.shape[:2])
    tile_size = 2**17 if query.device.type == "cpu" else 2**26
    rows = max(1, min(shape[2], tile_size // num_keys))
    heads = max(1, tile_size // (rows * num_keys))
    # One pair of buffers for all tiles: fresh ones would cost more in page faults than the arithmetic does.
    buffers = query.new_empty(2, min(heads, len(query)), rows, num_keys)
    for head in range(0, len(query), heads):
        for row in range(0, shape[2], rows):
            part = query[head : head + heads, row : row + rows]
            scores, weights = buffers[:, : part.shape[0], : part.shape[1]]
            torch.bmm(part, key[head : head + heads], out=scores)
            scores -= scores.amax(dim=-1, keepdim=True)
            torch.exp(scores, out=weights)
            total = weights.sum(dim=-1)
            mean = torch.linalg.vecdot(weights, scores) / total
            entropy[head : head + heads, row : row + rows] = total.log() - mean
    return entropy.view(shape)


@functools.cache
def _kernel(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from dqar import kernels  # Triton is no dependency: it comes with torch's CUDA builds

    try:
        tokens = torch.ones(1, 1, 16, 16, device=device)
        kernels.query_entropy(tokens, tokens, 1.0)
    except Exception as error:  # whatever a missing compiler raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton can't compile here ({reason}): entropy is computed in tiles, slower", stacklevel=2)
        return None
    return kernels.query_entropy


def fused_attention_with_entropy(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    num_queries: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot-product attention and its entropy, without ever holding a whole attention map.

    Args:
        q, k, v: queries, keys and values, ``[B, H, N, D]``.
        scale: factor of the scores; ``D ** -0.5`` by default.
        num_queries: number of evenly spread queries to estimate the entropy from; exact, from all, by default.

    Returns:
        The output ``[B, H, N, D]``, bit for bit that of ``F.scaled_dot_product_attention``, and the entropy
        ``[B, H]`` in nats, float32 at least, averaged over queries.
    """
    output = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return output, mean_query_entropy(q, k, scale, num_queries)


def mean_query_entropy(
    query: torch.Tensor, key: torch.Tensor, scale: float | None = None, num_queries: int | None = None
) -> torch.Tensor:
    """``query_entropy`` averaged over queries, ``[B, H]``; over ``num_queries`` evenly spread ones if that is less."""
    return query_entropy(spread(query, num_queries), key, scale).mean(dim=-1)


def spread(query: torch.Tensor, number: int | None) -> torch.Tensor:
    """So many evenly spread ones of queries ``[B, H, N, D]``; all of them if there are no more, or for ``None``."""
    length = query.shape[2]
    if number is None or number >= length:
        return query
    # Golden-ratio steps spread over rows and columns alike; an even stride would always pick the same few columns.
    stride = next(s for s in range(round(0.618 * length), 2 * length) if math.gcd(s, length) == 1)
    return query[:, :, torch.arange(number, device=query.device) * stride % length]


def entropy_by_modality(
    query: torch.Tensor, key: torch.Tensor, image: slice, text: slice, num_queries: int | None = None
) -> torch.Tensor:
    """Entropy of a joint attention of image and text, in nats, ``[B, 3, H]``: of all queries, image's, and text's.

    Args:
        query, key: ``[B, H, N, D]`` of all tokens: each query attends to the keys of both.
        image, text: which tokens are whose.
        num_queries: of each, to estimate the entropy from; all by default.
    """
    parts = [query[:, :, part] for part in (image, text)]
    entropies = [mean_query_entropy(part, key, num_queries=num_queries) for part in parts]
    shares = [part.shape[2] / query.shape[2] for part in parts]
    whole = sum(share * entropy for share, entropy in zip(shares, entropies, strict=True))
    return torch.stack([torch.as_tensor(whole), *entropies], dim=1)


def latent_norm(latents: torch.Tensor) -> torch.Tensor:
    """‖x_t‖₂ per sample, ``[B]`` float32, of latents ``[B, ...]``; slide 7's third feature."""
    return latents.flatten(1).float().norm(dim=1)


def snr(clean: torch.Tensor, noisy: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Slide 4's ``‖x0‖² / (‖x_t − x0‖² + ε)`` per sample, ``[B]`` float32, of latents ``[B, ...]``.

    Raises:
        ValueError: latents of different shapes.
    """
    if clean.shape != noisy.shape:
        raise ValueError(f"clean {tuple(clean.shape)} and noisy {tuple(noisy.shape)} must have the same shape")
    clean, noisy = clean.flatten(1).float(), noisy.flatten(1).float()
    noise = noisy - clean
    return torch.linalg.vecdot(clean, clean) / (torch.linalg.vecdot(noise, noise) + eps)


def tau(base: float, prompt_length: float) -> float:
    """Slide 5's threshold for a prompt of ``prompt_length`` words, ``base · √(p / 64)``.

    Raises:
        ValueError: a negative length.
    """
    check("prompt_length", prompt_length, prompt_length >= 0, "0 or more")
    return base * math.sqrt(prompt_length / 64)
