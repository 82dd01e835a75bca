"""A Diffusion Transformer with frozen weights, laid out for speed: the same function as diffusers' stock class.

``DiTTransformer2DModel`` calls every block's own embedder and modulation layer, and a module for every product. Solvers
that are learned through all model calls need gradients to latents and timesteps only. So here the weights take none,
all blocks' embeddings and modulations come out of a few batched products, and query, key and value out of one.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch.nn import functional as F

from dqar.checks import check_choice


class FrozenDiT:
    """What ``model`` predicts, float32, at one timestep for all images; differentiable in latents and timestep.

    Args:
        model: a ``DiTTransformer2DModel``; its weights are copied, on its device.

    Raises:
        ValueError: another activation than DiT's.
    """

    def __init__(self, model: DiTTransformer2DModel):
        config, blocks = model.config, list[Any](model.transformer_blocks)
        check_choice("activation_fn", config.activation_fn, ("gelu-approximate",))
        self.heads, self.patch = config.num_attention_heads, config.patch_size
        self.in_channels, self.out_channels = config.in_channels, model.out_channels
        patches = model.pos_embed
        self.patch_weight, self.patch_bias = _weights(patches.proj)
        self.patch_weight = self.patch_weight.flatten(1)
        self.positions = patches.pos_embed.detach().float()
        embedders = [block.norm1.emb for block in blocks]
        self.time_1 = _stacked([emb.timestep_embedder.linear_1 for emb in embedders])
        self.time_2 = _stacked([emb.timestep_embedder.linear_2 for emb in embedders])
        self.classes = torch.stack([emb.class_embedder.embedding_table.weight.detach().float() for emb in embedders])
        self.modulation = _stacked([block.norm1.linear for block in blocks])
        self.layers = [
            (
                *(torch.cat(parts) for parts in zip(*map(_weights, _projections(block)), strict=True)),
                *_weights(block.attn1.to_out[0]),
                *_weights(block.ff.net[0].proj),
                *_weights(block.ff.net[2]),
            )
            for block in blocks
        ]
        self.last_modulation, self.last = _weights(model.proj_out_1), _weights(model.proj_out_2)

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The noise ``[B, C, S, S]`` float32 in ``latents`` at ``timestep`` ``[]``, for ``classes`` ``[B]``."""
        batch, channels, size, _ = latents.shape
        side, patch = size // self.patch, self.patch
        patches = latents.view(batch, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        hidden = F.linear(patches.reshape(batch, side * side, -1), self.patch_weight, self.patch_bias) + self.positions
        conditioning = F.silu(self._embed(timestep.to(latents.dtype)) + self.classes[:, classes])
        modulations = _products(conditioning, self.modulation)
        for modulation, layer in zip(modulations, self.layers, strict=True):
            hidden = _block(hidden, modulation, layer, self.heads)
        shift, scale = F.linear(conditioning[0], *self.last_modulation)[:, None].chunk(2, -1)
        out = F.linear(_modulated(hidden, shift, scale, 1e-6), *self.last)
        out = out.view(batch, side, side, patch, patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(batch, self.out_channels, size, size)[:, : self.in_channels]

    def _embed(self, timestep: torch.Tensor) -> torch.Tensor:
        """Every block's embedding of the timestep, ``[blocks, 1, width]``."""
        waves = get_timestep_embedding(timestep.reshape(1), 256, flip_sin_to_cos=True, downscale_freq_shift=1)
        waves = waves.expand(len(self.layers), 1, -1)
        return _products(F.silu(_products(waves, self.time_1)), self.time_2)


def _weights(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    return weight.detach().float(), bias.detach().float()


def _stacked(linears: list[nn.Module]) -> tuple[torch.Tensor, torch.Tensor]:
    weights, biases = zip(*map(_weights, linears), strict=True)
    return torch.stack(weights).transpose(1, 2).contiguous(), torch.stack(biases)[:, None]


def _projections(block: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    return block.attn1.to_q, block.attn1.to_k, block.attn1.to_v


def _products(x: torch.Tensor, linears: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Every block's own layer: ``[blocks, B, in]`` to ``[blocks, B, out]``."""
    return torch.baddbmm(linears[1], x, linears[0])


def _modulated(hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(hidden, hidden.shape[-1:], eps=eps), 1 + scale)


def _block(
    hidden: torch.Tensor, modulation: torch.Tensor, weights: tuple[torch.Tensor, ...], heads: int
) -> torch.Tensor:
    """One adaLN-Zero block on ``hidden`` ``[B, N, D]``."""
    batch, tokens, width = hidden.shape
    qkv_weight, qkv_bias, out_weight, out_bias, up_weight, up_bias, down_weight, down_bias = weights
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation[:, None].chunk(6, -1)
    qkv = F.linear(_modulated(hidden, shift_1, scale_1, 1e-6), qkv_weight, qkv_bias)
    query, key, value = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
    hidden = torch.addcmul(hidden, gate_1, F.linear(attended, out_weight, out_bias))
    normed = _modulated(hidden, shift_2, scale_2, 1e-5)
    inner = F.gelu(F.linear(normed, up_weight, up_bias), approximate="tanh")
    return torch.addcmul(hidden, gate_2, F.linear(inner, down_weight, down_bias))
