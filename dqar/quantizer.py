"""Quantization of cached tensors to 8, 4 or 2 bits, truly packed: slide 6's formula, and fitted levels (slide 16)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F

from dqar.checks import check, check_choice

QuantizeMode = Literal["per_tensor", "per_channel", "per_token"]
MODES = get_args(QuantizeMode)
BITS = (8, 4, 2)
GAUSSIAN_STEPS = {8: 0.0308, 4: 0.3352, 2: 0.9957}
"""By bits: the distance of evenly spaced levels, in standard deviations, that suits Gaussian data best (Max 1960)."""
ROUNDS = 8
"""In which a head's channels, or its tokens, are rounded where the error of a product counts."""


@dataclass(slots=True, eq=False)
class QuantizedTensor:
    """A tensor kept as integers: ``x ≈ q · scale``, or ``q · scale + offset``.

    ``data`` is int8 for 8 bits; below, uint8 with 2 or 4 values a byte, flattened and padded to whole bytes, with
    ``batch_dims`` sample by sample.
    """

    data: torch.Tensor
    scale: torch.Tensor
    bits: int
    shape: torch.Size
    dtype: torch.dtype
    offset: torch.Tensor | None = None
    """Of fitted levels: the value of ``q = 0``, in the shape of ``scale``."""
    balance: torch.Tensor | None = None
    """The divisor of each channel before quantization (CSB)."""
    kept: torch.Tensor | None = None
    """Salient channels, unquantized in 16 bit, ``[..., tokens, k]``, and their numbers:"""
    kept_channels: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The original's approximation, in its shape, and in its dtype unless another is given."""
        integers = self.data if self.bits == 8 else _unpack(self.data, self.bits, self.shape)
        x = integers * self.scale.float()  # one pass: the product of int8 and float32 is float32
        if self.offset is not None:
            x += self.offset
        if self.balance is not None:
            x = x * self.balance
        if self.kept is not None and self.kept_channels is not None:
            x = x.scatter(-1, self.kept_channels.long().expand(self.kept.shape), self.kept.float())
        return x.to(dtype or self.dtype)

    def rows(self, rows: slice) -> QuantizedTensor:
        """Views of some of the batch's samples; only if quantized with ``batch_dims=1``."""
        part = self._each(lambda tensor: tensor[rows])
        part.shape = torch.Size((len(part.data), *self.shape[1:]))
        return part

    def clone(self) -> QuantizedTensor:
        """The same in memory of its own."""
        return self._each(torch.Tensor.clone)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedTensor:
        extras = {name: getattr(self, name) for name in ("offset", "balance", "kept", "kept_channels")}
        changed: dict[str, Any] = {name: None if part is None else change(part) for name, part in extras.items()}
        return dataclasses.replace(self, data=change(self.data), scale=change(self.scale), **changed)

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales and all else that is stored."""
        extras = (
            part.nbytes for part in (self.offset, self.balance, self.kept, self.kept_channels) if part is not None
        )
        return self.data.nbytes + self.scale.nbytes + sum(extras)


def quantize(
    x: torch.Tensor,
    bits: int,
    mode: QuantizeMode = "per_tensor",
    *,
    batch_dims: int = 0,
    scale_dtype: torch.dtype = torch.float32,
    check_finite: bool = True,
    partner: torch.Tensor | None = None,
    keep_channels: int = 0,
    fitted: bool = False,
    factor: torch.Tensor | None = None,
    over_tokens: bool = False,
) -> QuantizedTensor:
    """Slide 6: ``q = clip(round(x / s), ±Q)`` with ``s = max|x| / Q`` and ``Q = 2^(bits − 1) − 1``.

    That formula uses ``2^bits − 1`` levels, of which the outer ones serve the largest values only: in 2 bits it keeps
    hardly more than zeros. ``fitted`` levels are all ``2^bits``, evenly spaced, with the spacing and the offset of
    least squared error.

    Args:
        x: any floating tensor; channels are its last dimension, tokens all the others.
        bits: 8, 4 or 2 (Q = 127, 7, 1).
        mode: what shares one scale: the whole tensor, a channel, or a token.
        batch_dims: number of leading dimensions that keep separate scales in every mode.
        scale_dtype: float32 or float16, which saturates beyond 65,504 · Q.
        check_finite: whether to look for NaN and inf, which makes a GPU wait; off where the caller checks later.
        partner: max |·| per channel, ``[..., 1, channels]`` or ``[channels]``, of the factor that ``x`` will be
            multiplied with. Turns on PTQ4DiT's channel-wise salience balancing: each channel is divided by
            ``√(max|x| / partner)`` first, which evens out what the channels contribute to the product. A scale per
            channel makes it pointless.
        keep_channels: number of channels, those of largest max |x|, that stay unquantized in 16 bit.
        fitted: fits spacing and offset of the levels, for as many values as share a scale.
        factor: what the tensor will be multiplied with, head by head, or a sample of its rows: as queries with keys
            ``[..., heads, n, d]``, of ``heads · d`` channels. The error of that product counts then, and levels are
            others than the nearest. Fitted ones only, without ``partner`` and ``keep_channels``.
        over_tokens: the product's sum runs over tokens, as that of an attention map ``[..., heads, n, tokens]`` with
            values.

    Raises:
        ValueError: for other bits or modes, an integer tensor, NaN or inf in ``x``, or a ``factor`` that doesn't fit.
    """
    check_choice("bits", bits, BITS)
    check_choice("mode", mode, MODES)
    if factor is not None:
        alone = fitted and partner is None and not keep_channels
        fits = min(factor.ndim - 1, x.ndim) > 1 and x.shape[-1] % factor.shape[-3] == 0
        fits = fits and factor.shape[-1] == (x.shape[-2] if over_tokens else x.shape[-1] // factor.shape[-3])
        check("factor", list(factor.shape), alone and fits, "as x is multiplied by head, of fitted levels alone")
    if not x.is_floating_point():
        raise ValueError(f"a tensor of dtype {x.dtype} is not accepted: needs a floating dtype")
    first = batch_dims if mode != "per_token" else max(x.ndim - 1, batch_dims)
    shared = range(first, x.ndim - 1 if mode == "per_channel" else x.ndim)
    largest = 2 ** (bits - 1) - 1
    values, extras = x.float(), {}
    if keep_channels or partner is not None:
        salience = values.abs().amax(dim=tuple(range(batch_dims, x.ndim - 1)), keepdim=True)
    if keep_channels:
        channels = salience.topk(min(keep_channels, x.shape[-1]), dim=-1).indices
        index = channels.expand(*x.shape[:-1], -1)
        half = torch.float16 if x.dtype == torch.float32 else x.dtype
        numbers = torch.int16 if x.shape[-1] <= torch.iinfo(torch.int16).max else torch.int32
        extras = {"kept": values.gather(-1, index).to(half), "kept_channels": channels.to(numbers)}
        values = values.scatter(-1, index, 0.0)
    if partner is not None:
        tiny = torch.finfo(torch.float32).tiny
        # A channel that is zero on either side contributes nothing, whatever it is divided by.
        factor = (salience / partner.float().clamp_min(tiny)).sqrt()
        extras["balance"] = torch.where((salience > 0) & (partner > 0), factor, torch.ones_like(factor))
        values = values / extras["balance"]
    peak = values.abs()
    if x.numel() and shared:
        peak = peak.amax(dim=tuple(shared), keepdim=True)
    # Peaks are far fewer than values and show NaN and inf as well; but they leave out kept channels.
    if check_finite and not (salience if keep_channels else peak).isfinite().all():
        raise ValueError(f"x of shape {tuple(x.shape)} holds NaN or inf: needs finite values")
    if fitted:
        scale, extras["offset"] = _fit(values, tuple(shared), bits, scale_dtype)
        levels = values, scale.float(), extras["offset"].float(), bits
        integers = _nearest(*levels) if factor is None else _of_product(*levels, factor.float(), over_tokens)
        return QuantizedTensor(_packed(integers, bits, batch_dims), scale, bits, x.shape, x.dtype, **extras)
    # An all-zero group keeps its zeros under any scale, and a scale must not round to zero.
    scale = (peak / largest).clamp_min_(torch.finfo(scale_dtype).tiny)
    if scale_dtype == torch.float32:  # then |x| / scale rounds to `largest` at most, and needs no clamping
        integers = (values / scale).round_().to(torch.int8)
    else:
        scale = scale.clamp_max_(torch.finfo(scale_dtype).max).to(scale_dtype)
        integers = (values / scale.float()).round_().clamp_(-largest, largest).to(torch.int8)
    return QuantizedTensor(_packed(integers, bits, batch_dims), scale, bits, x.shape, x.dtype, **extras)


def _fit(x: torch.Tensor, shared: tuple[int, ...], bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset with the least squared error of ``q · scale + offset`` that Lloyd's algorithm finds.

    In turn it rounds to the nearest level and fits the line through ``(q, x)``. The turns only lead to a minimum near
    by. So they begin at several spacings, from the one for Gaussian data to the one that reaches all values, with the
    mean on a level and between two.
    """
    if not (x.numel() and shared):  # each value has a scale of its own
        return torch.ones_like(x, dtype=dtype), x.to(dtype)
    lowest, highest = _ends(bits)
    tiny = torch.finfo(torch.float16).tiny
    mean = x.mean(shared, keepdim=True)
    centred = x - mean
    gaussian = (centred.square().mean(shared, keepdim=True).sqrt() * GAUSSIAN_STEPS[bits]).clamp_min(tiny)
    reaching = (2 * centred.abs().amax(shared, keepdim=True) / (2**bits - 1)).clamp_min(tiny)
    least, best_scale, best_offset = torch.full_like(mean, math.inf), gaussian, gaussian / 2
    for share, place in itertools.product((0, 0.5, 1), (0, 0.5)):
        scale = gaussian * (reaching / gaussian) ** share
        offset = scale * place
        for _ in range(3):
            integers = ((centred - offset) / scale).round_().clamp_(lowest, highest)
            centre = integers.mean(shared, keepdim=True)
            spread = integers.square().mean(shared, keepdim=True) - centre.square()
            slope = (integers * centred).mean(shared, keepdim=True) / spread
            scale = torch.where(spread > 0, slope, scale).clamp_min(tiny)
            offset = -scale * centre
        error = (integers * scale + offset - centred).square_().mean(shared, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    largest = torch.finfo(dtype).max
    return best_scale.clamp(-largest, largest).to(dtype), (mean + best_offset).clamp(-largest, largest).to(dtype)


def _nearest(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 ``q`` of the levels ``q · scale + offset`` nearest to ``x``."""
    return ((x - offset) / scale).round_().clamp_(*_ends(bits)).to(torch.int8)


def _of_product(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bits: int, factor: torch.Tensor, over_tokens: bool
) -> torch.Tensor:
    """int8 ``q`` of levels ``q · scale + offset`` whose product with ``factor`` is near to that of ``x``.

    What the product sums over is rounded in turn, what weighs most in it first. Each round makes up for the error that
    the product has by now, as if nothing after it was to be rounded (LDLQ, Chee et al. 2023, arXiv 2307.13304, which is
    GPTQ's rule, Frantar et al. 2022, arXiv 2210.17323).
    """

    def by_head(part: torch.Tensor) -> torch.Tensor:
        """``[..., tokens, channels]`` as ``[..., heads, rows, summed]``."""
        part = part.expand_as(x).unflatten(-1, (factor.shape[-3], -1)).transpose(-2, -3)
        return part.mT if over_tokens else part

    weights = factor.square().sum(-2)
    order = weights.argsort(-1, descending=True)[..., None, :]
    factor = factor.gather(-1, order.expand_as(factor))
    values, scale, offset = (part.gather(-1, order.expand_as(part)) for part in map(by_head, (x, scale, offset)))
    # Rows that were not sampled count a hundredth: their errors aren't free.
    damping = weights.mean(-1).mul(0.01).clamp_min(torch.finfo(torch.float32).tiny)[..., None, None]
    damping = damping * torch.eye(factor.shape[-2], device=x.device)
    error = values.new_zeros(*values.shape[:-1], factor.shape[-2])  # of the product
    integers, size = torch.zeros_like(values), -(-values.shape[-1] // ROUNDS)
    for first in range(0, values.shape[-1], size):
        now, left = slice(first, first + size), factor[..., first:]
        lower = torch.linalg.cholesky_ex(left @ left.mT + damping).L  # which looks for no error: a GPU would wait
        wanted = values[..., now] - error @ torch.cholesky_solve(factor[..., now], lower)
        q = ((wanted - offset[..., now]) / scale[..., now]).round_().clamp_(*_ends(bits))
        error += (q * scale[..., now] + offset[..., now] - values[..., now]) @ factor[..., now].mT
        integers[..., now] = q
    integers = torch.empty_like(integers).scatter_(-1, order.expand_as(integers), integers)
    return (integers.mT if over_tokens else integers).transpose(-2, -3).flatten(-2).to(torch.int8)


def _ends(bits: int) -> tuple[int, int]:
    """The least and the greatest of all ``2^bits`` integers."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _packed(integers: torch.Tensor, bits: int, batch_dims: int) -> torch.Tensor:
    """int8 as it is, fewer bits sample by sample in whole bytes."""
    if bits == 8:
        return integers
    return _pack(integers.flatten(batch_dims) if batch_dims < integers.ndim else integers[..., None], bits)


def _pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., values]`` int8 as ``[..., bytes]`` uint8."""
    per_byte = 8 // bits
    fields = (integers + 2 ** (bits - 1)).to(torch.uint8)  # non-negative fields of `bits` bits
    fields = F.pad(fields, (0, -fields.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = fields[..., 0].clone()
    for place in range(1, per_byte):
        packed |= fields[..., place] << (place * bits)
    return packed


def _unpack(packed: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = ((packed[..., None] >> places) & (2**bits - 1)).flatten(-2)
    values = math.prod(shape[packed.ndim - 1 :])  # a sample's; what is left of its last byte is padding
    return (fields[..., :values].to(torch.int8) - 2 ** (bits - 1)).view(shape)
