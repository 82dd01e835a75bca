"""What forecasting caches weigh: bytes of a cache of every site, from published model configurations, no weights.

A forecast of order n needs the n + 1 last outputs (or finite differences) of a site, each as large as one output.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from dqar.checks import check_choice, check_count
from dqar.quantizer import BITS

ORDERS = (0, 1, 2)
"""Of the table: reuse, linear and quadratic forecast."""
CARD_BYTES = 24 * 2**30
"""Bytes of a consumer card sold as 24 GB (RTX 3090, RTX 4090), before driver, activations, text encoders and VAE."""


@dataclass(frozen=True)
class Shape:
    """What a transformer computes in one forward pass for one sample, and what it weighs.

    Attributes:
        name: model and size of the sample.
        sites: cached tensors of a forward pass and branch: (how many, tokens, channels). A module that returns
            an image and a text tensor makes two, because each has scales of its own.
        branches: forward passes a step: 2 with classifier-free guidance, 1 where guidance is distilled.
        parameters: of diffusers' class with the model's configuration.
        output_values: numbers in the model's output for one sample and branch, a learned variance included.
    """

    name: str
    sites: tuple[tuple[int, int, int], ...]
    branches: int
    parameters: int
    output_values: int


def _double_single(double: int, single: int, image: int, text: int, width: int) -> tuple[tuple[int, int, int], ...]:
    # Double blocks: attention and feed-forward, each for both streams. Single blocks compute attention and MLP in
    # parallel on the joined sequence; one projection adds both to the residual, so that is one site.
    return (2 * double, image, width), (2 * double, text, width), (single, image + text, width)


# Width is heads × head_dim. Image tokens are (pixels / VAE factor / patch)², the VAE factor 8. Configurations are the
# defaults of diffusers 0.42.1's classes unless a config.json is named. `tests/studies/test_cache_memory.py` builds
# every model on the meta device, runs it, and compares sites, parameters and outputs.
MODELS = (
    # DIT_XL_2_CONFIG of dqar.models: 28 blocks, 16 × 72 wide, patch 2, 8 channels out (noise, variance). 675 M in the
    # paper (arXiv 2212.09748); diffusers repeats the timestep and label embedding, 2.8 M, in each of the blocks.
    Shape("DiT-XL/2 256²", ((2 * 28, 16**2, 1152),), 2, 749_826_464, 8 * 32**2),
    Shape("DiT-XL/2 512²", ((2 * 28, 32**2, 1152),), 2, 749_826_464, 8 * 64**2),
    # config.json of PixArt-alpha/PixArt-XL-2-512x512 and -1024-MS: the same 28 blocks with cross-attention, so three
    # sites each. Only the 1024² model embeds resolution and aspect ratio, hence its 0.5 M more.
    Shape("PixArt-α XL/2 256²", ((3 * 28, 16**2, 1152),), 2, 610_856_096, 8 * 32**2),
    Shape("PixArt-α XL/2 512²", ((3 * 28, 32**2, 1152),), 2, 610_856_096, 8 * 64**2),
    Shape("PixArt-α XL/2 1024²", ((3 * 28, 64**2, 1152),), 2, 611_349_152, 8 * 128**2),
    # config.json of stabilityai/stable-diffusion-3-medium-diffusers: 24 joint blocks, 24 × 64 wide, patch 2, 16
    # channels; 77 CLIP + 256 T5 tokens (StableDiffusion3Pipeline). The last block drops its text stream.
    Shape("SD3-medium 1024²", ((2 * 24, 64**2, 1536), (2 * 23, 77 + 256, 1536)), 2, 2_028_328_000, 16 * 128**2),
    # config.json of black-forest-labs/FLUX.1-dev: 19 double and 38 single blocks, 24 × 128 wide; 2 × 2 latents of 16
    # channels packed to 64; 512 T5 tokens (FluxPipeline). Guidance is an input of the model: one branch.
    Shape("FLUX.1-dev 1024²", _double_single(19, 38, 64**2, 512, 3072), 1, 11_901_408_320, 64 * 64**2),
    # config.json of zai-org/CogVideoX-5b: 42 blocks, 48 × 64 wide, patch 2, 49 frames in 13 latents (1 + 48 / 4) of
    # 60 × 90, 226 T5 tokens. Attention returns video and text, the feed-forward takes both in one sequence.
    Shape(
        "CogVideoX-5B 480×720, 49 frames",
        ((42, 13 * 30 * 45, 3072), (42, 226, 3072), (42, 13 * 30 * 45 + 226, 3072)),
        2,
        5_570_283_072,
        13 * 16 * 60 * 90,
    ),
    # config.json of hunyuanvideo-community/HunyuanVideo: 20 double and 40 single blocks, 24 × 128 wide, patch
    # 1 × 2 × 2; HunyuanVideoPipeline's defaults: 720 × 1280, 129 frames in 33 latents (1 + 128 / 4) of 90 × 160,
    # 256 text tokens. Guidance is an input: one branch. The two small blocks that refine the text are left out.
    Shape(
        "HunyuanVideo 720×1280, 129 frames",
        _double_single(20, 40, 33 * 45 * 80, 256, 3072),
        1,
        12_821_012_544,
        16 * 33 * 90 * 160,
    ),
)


def site_bytes(tokens: int, width: int, bits: int, images: int = 1) -> int:
    """Bytes of one stored ``[images, tokens, width]``: in 16 bit as it is, else as ``quantize`` packs it.

    That is ``quantize(x, bits, "per_channel", batch_dims=1)``: whole bytes of each sample's integers, and a float32
    scale for each sample and channel.
    """
    integers = images * -(-tokens * width * bits // 8)
    return integers if bits == 16 else integers + 4 * images * width


def cache_bytes(shape: Shape, order: int, bits: int, images: int = 1) -> int:
    """Bytes of a cache of every site in every branch, with ``order + 1`` stored tensors a site, scales included.

    Raises:
        ValueError: names the argument, the value and what is accepted.
    """
    check_count("order", order, 0)
    check_count("images", images, 1)
    check_choice("bits", bits, (16, *BITS))
    once = sum(count * site_bytes(tokens, width, bits, images) for count, tokens, width in shape.sites)
    return (order + 1) * shape.branches * once


def output_cache_bytes(shape: Shape, order: int, images: int = 1) -> int:
    """Bytes of a cache of nothing but the model's last ``order + 1`` outputs, of every branch, in 16 bit.

    Raises:
        ValueError: an order below 0, or no image.
    """
    check_count("order", order, 0)
    check_count("images", images, 1)
    return (order + 1) * shape.branches * 2 * shape.output_values * images


def table() -> pd.DataFrame:
    """One row per model, order and bits, for one sample; bytes. Weights are in 16 bit.

    ``fits_24gb``: weights and cache together leave something of a 24 GB card. Needed, not enough: activations, text
    encoders and VAE are not counted.
    """
    return pd.DataFrame(
        {
            "model": shape.name,
            "order": order,
            "bits": bits,
            "cache_bytes": (cache := cache_bytes(shape, order, bits)),
            "weight_bytes": (weights := 2 * shape.parameters),
            "output_cache_bytes": output_cache_bytes(shape, order),
            "fits_24gb": weights + cache < CARD_BYTES,
        }
        for shape in MODELS
        for order in ORDERS
        for bits in (16, 8, 4)
    )
