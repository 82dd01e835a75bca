"""A Diffusion Transformer laid out for fast training on a CPU, exported exactly to diffusers' stock class.

``DiTTransformer2DModel`` keeps an embedding of timestep and class in every block, and calls a module for every product.
Here one embedding serves all blocks, the blocks' weights are stacked along a first axis, all modulations come out of
one product, and one compiled function is every block: about three times the images a second of the stock class in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch.nn import functional as F

NULL_CLASS = 1000
"""Where ``DiTPipeline`` looks for the class of the unguided half; the classes are the first rows of the table."""


class StackedDiT(nn.Module):
    """Predicts the noise in latents ``[B, C, S, S]``; in training form, see ``to_stock``.

    Args:
        num_layers, num_attention_heads, attention_head_dim, patch_size: as ``DiTTransformer2DModel``'s.
        in_channels, sample_size: the latents' C and S.
        num_classes: classes; the null class is the one after them.
        seed: of DiT's own initialisation (Peebles & Xie 2023): Xavier weights, and zeros where adaLN-Zero wants them.
        compiled: compiles the block, once for each shape.
    """

    positions: torch.Tensor
    """Of the patches, ``[1, N, width]``."""

    def __init__(
        self,
        num_layers: int,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        sample_size: int,
        patch_size: int,
        num_classes: int,
        seed: int = 0,
        compiled: bool = False,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        patch = in_channels * patch_size**2
        self.num_attention_heads, self.attention_head_dim = num_attention_heads, attention_head_dim
        self.in_channels, self.sample_size, self.patch_size = in_channels, sample_size, patch_size
        self.num_classes, self.num_layers = num_classes, num_layers
        generator = torch.Generator().manual_seed(seed)

        def xavier(*shape: int) -> nn.Parameter:
            bound = (6 / (shape[-1] + shape[-2])) ** 0.5
            return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(shape, generator=generator))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        self.patch_weight, self.patch_bias = xavier(width, patch), zeros(width)
        self.time_weight_1, self.time_bias_1 = normal(width, 256), zeros(width)
        self.time_weight_2, self.time_bias_2 = normal(width, width), zeros(width)
        self.class_table = normal(num_classes + 1, width)
        self.modulation_weight, self.modulation_bias = zeros(num_layers, 6 * width, width), zeros(num_layers, 6 * width)
        # Query, key and value each have the initialisation of a square matrix.
        self.qkv_weight = nn.Parameter(torch.cat([xavier(num_layers, width, width).data for _ in range(3)], 1))
        self.qkv_bias = zeros(num_layers, 3 * width)
        self.out_weight, self.out_bias = xavier(num_layers, width, width), zeros(num_layers, width)
        self.up_weight, self.up_bias = xavier(num_layers, 4 * width, width), zeros(num_layers, 4 * width)
        self.down_weight, self.down_bias = xavier(num_layers, width, 4 * width), zeros(num_layers, width)
        self.final_modulation_weight, self.final_modulation_bias = zeros(2 * width, width), zeros(2 * width)
        self.final_weight, self.final_bias = zeros(patch, width), zeros(patch)
        stock = self._stock(num_layers=1)
        self.register_buffer("positions", stock.pos_embed.pos_embed.float().clone(), persistent=False)
        self._block: Callable[..., torch.Tensor] = torch.compile(_block, dynamic=False) if compiled else _block

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        classes: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise ``[B, C, S, S]`` float32 in ``latents`` at ``timesteps`` ``[B]``, for ``classes`` ``[B]``.

        ``dtype`` is the products' in the blocks; the sum that runs through them stays in float32. With ``kept``
        ``[B, K]``, only these tokens of each image go through the middle blocks, from the third to the fifth last:
        training steps then take less than two thirds of the time (token routing, TREAD: Krause et al. 2025).
        """
        batch, side, patch = len(latents), self.sample_size // self.patch_size, self.patch_size
        patches = latents.view(batch, self.in_channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        hidden = F.linear(patches.reshape(batch, side * side, -1), self.patch_weight, self.patch_bias) + self.positions
        conditioning = F.silu(self._conditioning(timesteps, classes))
        weights = self.modulation_weight.flatten(0, 1).to(dtype)
        modulations = F.linear(conditioning.to(dtype), weights, self.modulation_bias.flatten().to(dtype))
        attention = (self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias)
        stacks = (*attention, self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        layers = zip(*(x.to(dtype).unbind(0) for x in stacks), strict=True)
        first, last = 2, self.num_layers - 4
        if kept is not None and (kept.shape[1] == side * side or first >= last):
            kept = None
        for i, (modulation, layer) in enumerate(
            zip(modulations.view(batch, self.num_layers, -1).unbind(1), layers, strict=True)
        ):
            if kept is not None and i == first:
                places, every = kept[..., None].expand(-1, -1, hidden.shape[-1]), hidden
                hidden = hidden.gather(1, places)
            if kept is not None and i == last:
                hidden = every.scatter(1, places, hidden)
            hidden = self._block(hidden, modulation, *layer, self.num_attention_heads)
        shift, scale = F.linear(conditioning, self.final_modulation_weight, self.final_modulation_bias).chunk(2, 1)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        out = F.linear(hidden, self.final_weight, self.final_bias)
        out = out.view(batch, side, side, patch, patch, self.in_channels).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(latents.shape)

    def _conditioning(self, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        waves = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=1)
        hidden = F.silu(F.linear(waves, self.time_weight_1, self.time_bias_1))
        return F.linear(hidden, self.time_weight_2, self.time_bias_2) + self.class_table[classes]

    def _stock(self, num_layers: int) -> DiTTransformer2DModel:
        return DiTTransformer2DModel(
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=self.attention_head_dim,
            in_channels=self.in_channels,
            out_channels=self.in_channels,
            num_layers=num_layers,
            sample_size=self.sample_size,
            patch_size=self.patch_size,
            num_embeds_ada_norm=NULL_CLASS,
        )

    @torch.no_grad()
    def to_stock(self) -> DiTTransformer2DModel:
        """The same function as a ``DiTTransformer2DModel`` in eval mode, float32.

        Its null class is 1000, where ``DiTPipeline`` looks for it; the rows between it and the classes are zeros.
        """
        model = self._stock(self.num_layers).eval()
        blocks: Any = model.transformer_blocks
        for block in blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.zero_()
        for ours, theirs in self._pairs(model):
            theirs.copy_(ours)
        return model

    @torch.no_grad()
    def load_stock(self, model: DiTTransformer2DModel) -> None:
        """Takes over what ``to_stock`` wrote, in any dtype."""
        for ours, theirs in self._pairs(model):
            ours.copy_(theirs)

    def _pairs(self, model: DiTTransformer2DModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This model's parameters, or views of them, each with its place in the stock one."""
        width = self.num_attention_heads * self.attention_head_dim
        yield self.patch_weight.view_as(model.pos_embed.proj.weight), model.pos_embed.proj.weight
        yield self.patch_bias, model.pos_embed.proj.bias
        linears: list[tuple[torch.Tensor, torch.Tensor, Any]] = [
            (self.final_modulation_weight, self.final_modulation_bias, model.proj_out_1),
            (self.final_weight, self.final_bias, model.proj_out_2),
        ]
        blocks: Any = model.transformer_blocks
        for i, block in enumerate(blocks):
            embedder, attention, feed_forward = block.norm1.emb, block.attn1, block.ff.net
            table = embedder.class_embedder.embedding_table.weight
            yield self.class_table[:-1], table[: self.num_classes]
            yield self.class_table[-1], table[NULL_CLASS]
            projections = (attention.to_q, attention.to_k, attention.to_v)
            linears += [
                (self.time_weight_1, self.time_bias_1, embedder.timestep_embedder.linear_1),
                (self.time_weight_2, self.time_bias_2, embedder.timestep_embedder.linear_2),
                (self.modulation_weight[i], self.modulation_bias[i], block.norm1.linear),
                *zip(self.qkv_weight[i].split(width), self.qkv_bias[i].split(width), projections, strict=True),
                (self.out_weight[i], self.out_bias[i], attention.to_out[0]),
                (self.up_weight[i], self.up_bias[i], feed_forward[0].proj),
                (self.down_weight[i], self.down_bias[i], feed_forward[2]),
            ]
        for weight, bias, linear in linears:
            yield weight, linear.weight
            yield bias, linear.bias


def _block(
    hidden: torch.Tensor,
    modulation: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """One adaLN-Zero block on ``hidden`` ``[B, N, D]`` float32; products in the weights' dtype."""
    batch, tokens, width = hidden.shape
    dtype = qkv_weight.dtype
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.float()[:, None].chunk(6, -1)
    normed = F.layer_norm(hidden, (width,), eps=1e-6) * (1 + scale_1) + shift_1
    qkv = F.linear(normed.to(dtype), qkv_weight, qkv_bias)
    query, key, value = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    # Plain products: the backward of the CPU's bfloat16 scaled_dot_product_attention takes half of a step.
    scores = query @ key.transpose(-1, -2) * (width // heads) ** -0.5
    attended = scores.float().softmax(-1).to(dtype) @ value
    attended = F.linear(attended.transpose(1, 2).reshape(batch, tokens, width), out_weight, out_bias)
    hidden = hidden + gate_1 * attended.float()
    normed = F.layer_norm(hidden, (width,), eps=1e-5) * (1 + scale_2) + shift_2
    inner = _gelu(F.linear(normed.to(dtype), up_weight, up_bias).float()).to(dtype)
    return hidden + gate_2 * F.linear(inner, down_weight, down_bias).float()


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """The ``tanh`` approximation of GELU by a sigmoid, which is the same and compiles to twice as fast a loop."""
    return x * torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))
