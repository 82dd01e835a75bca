"""Symmetric quantization of cached tensors to 8, 4 or 2 bits (slides 6 and 16), truly packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn import functional as F

QuantizeMode = Literal["per_tensor", "per_channel", "per_token"]
BITS = (8, 4, 2)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor kept as integers: ``x ≈ q · scale``.

    ``data`` is int8 for 8 bits; below, uint8 with 2 or 4 values a byte, flattened and padded to whole bytes.
    """

    data: torch.Tensor
    scale: torch.Tensor
    bits: int
    shape: torch.Size
    dtype: torch.dtype

    def dequantize(self) -> torch.Tensor:
        """``q · scale`` in the shape and dtype of the original."""
        integers = self.data if self.bits == 8 else _unpack(self.data, self.bits, self.shape)
        return (integers.float() * self.scale.float()).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales, as stored."""
        return self.data.nbytes + self.scale.nbytes


def quantize(
    x: torch.Tensor,
    bits: int,
    mode: QuantizeMode = "per_tensor",
    *,
    batch_dims: int = 0,
    scale_dtype: torch.dtype = torch.float32,
    check_finite: bool = True,
) -> QuantizedTensor:
    """Slide 6: ``q = clip(round(x / s), ±Q)`` with ``s = max|x| / Q`` and ``Q = 2^(bits − 1) − 1``.

    Args:
        x: any floating tensor; channels are its last dimension, tokens all the others.
        bits: 8, 4 or 2 (Q = 127, 7, 1).
        mode: what shares a scale: everything, a channel, or a token.
        batch_dims: so many leading dimensions never share a scale, whatever the mode.
        scale_dtype: float32 or float16, which saturates beyond 65,504 · Q.
        check_finite: off only where a GPU would have to wait for the answer and NaN is looked for elsewhere.

    Raises:
        ValueError: for other bits or modes, an integer tensor, or NaN or inf in ``x``.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} is not accepted: choose one of {BITS}")
    if mode not in get_args(QuantizeMode):
        raise ValueError(f"mode={mode!r} is not accepted: choose one of {get_args(QuantizeMode)}")
    if not x.is_floating_point():
        raise ValueError(f"a tensor of dtype {x.dtype} is not accepted: needs a floating dtype")
    if check_finite and not x.isfinite().all():
        raise ValueError(f"x of shape {tuple(x.shape)} holds NaN or inf: needs finite values")
    shared = {
        "per_tensor": range(batch_dims, x.ndim),
        "per_channel": range(batch_dims, x.ndim - 1),
        "per_token": range(max(x.ndim - 1, batch_dims), x.ndim),
    }[mode]
    largest = 2 ** (bits - 1) - 1
    values = x.float()
    peak = values.abs()
    if x.numel() and shared:
        peak = peak.amax(dim=tuple(shared), keepdim=True)
    # An all-zero group keeps its zeros under any scale, and a scale must not round to zero.
    limits = torch.finfo(scale_dtype)
    scale = (peak / largest).clamp_(limits.tiny, limits.max).to(scale_dtype)
    integers = (values / scale.float()).round_().clamp_(-largest, largest).to(torch.int8)
    return QuantizedTensor(integers if bits == 8 else _pack(integers, bits), scale, bits, x.shape, x.dtype)


def _pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    per_byte = 8 // bits
    fields = (integers.flatten() + 2 ** (bits - 1)).to(torch.uint8)  # non-negative fields of `bits` bits
    fields = F.pad(fields, (0, -len(fields) % per_byte)).view(-1, per_byte)
    packed = fields[:, 0].clone()
    for place in range(1, per_byte):
        packed |= fields[:, place] << (place * bits)
    return packed


def _unpack(packed: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = (packed[:, None] >> places) & (2**bits - 1)
    return (fields.flatten()[: shape.numel()].to(torch.int8) - 2 ** (bits - 1)).view(shape)
