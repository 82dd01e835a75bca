import functools
from collections import Counter

import diffusers
import pytest
import torch

from dqar.models.pipelines import DIT_XL_2_CONFIG
from dqar.quantizer import quantize
from dqar.studies import cache_memory

PIXART = {"caption_channels": 4096}
CONFIGS = {  # sources: dqar/studies/cache_memory.py
    "DiT-XL/2 256²": ("DiTTransformer2DModel", DIT_XL_2_CONFIG),
    "DiT-XL/2 512²": ("DiTTransformer2DModel", {**DIT_XL_2_CONFIG, "sample_size": 64}),
    "PixArt-α XL/2 256²": ("PixArtTransformer2DModel", {**PIXART, "sample_size": 32}),
    "PixArt-α XL/2 512²": ("PixArtTransformer2DModel", {**PIXART, "sample_size": 64}),
    "PixArt-α XL/2 1024²": ("PixArtTransformer2DModel", {**PIXART, "sample_size": 128}),
    "SD3-medium 1024²": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    ),
    "FLUX.1-dev 1024²": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "CogVideoX-5B 480×720, 49 frames": (
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "HunyuanVideo 720×1280, 129 frames": ("HunyuanVideoTransformer3DModel", {}),
}
SHAPES = pytest.mark.parametrize("shape", cache_memory.MODELS, ids=lambda shape: shape.name)
FORECASTS = [(order, bits) for order in cache_memory.ORDERS for bits in (16, 8, 4)]


@functools.cache
def build(shape):
    name, config = CONFIGS[shape.name]
    with torch.device("meta"):
        return getattr(diffusers, name)(**config).eval()


def inputs(model):
    """What the pipelines call the model with, for one sample and branch."""
    config, text, one = model.config, lambda tokens: torch.empty(1, tokens, 4096), torch.ones(1)
    match type(model).__name__:
        case "DiTTransformer2DModel":
            latent = torch.empty(1, 4, config.sample_size, config.sample_size)
            return {"hidden_states": latent, "timestep": one, "class_labels": torch.ones(1, dtype=torch.long)}
        case "PixArtTransformer2DModel":
            latent = torch.empty(1, 4, config.sample_size, config.sample_size)
            extra = {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
            extra = extra if model.use_additional_conditions else {"resolution": None, "aspect_ratio": None}
            return {"hidden_states": latent, "encoder_hidden_states": text(120), "timestep": one,
                    "added_cond_kwargs": extra}  # fmt: skip
        case "SD3Transformer2DModel":
            return {"hidden_states": torch.empty(1, 16, 128, 128), "encoder_hidden_states": text(77 + 256),
                    "pooled_projections": torch.empty(1, 2048), "timestep": one}  # fmt: skip
        case "FluxTransformer2DModel":
            return {"hidden_states": torch.empty(1, 64 * 64, 64), "encoder_hidden_states": text(512),
                    "pooled_projections": torch.empty(1, 768), "timestep": one, "guidance": one,
                    "img_ids": torch.zeros(64 * 64, 3), "txt_ids": torch.zeros(512, 3)}  # fmt: skip
        case "CogVideoXTransformer3DModel":
            rotary = torch.empty(13 * 30 * 45, 64)
            return {"hidden_states": torch.empty(1, 13, 16, 60, 90), "encoder_hidden_states": text(226),
                    "timestep": one, "image_rotary_emb": (rotary, rotary)}  # fmt: skip
        case "HunyuanVideoTransformer3DModel":
            return {"hidden_states": torch.empty(1, 16, 33, 90, 160), "encoder_hidden_states": text(256),
                    "encoder_attention_mask": torch.ones(1, 256), "pooled_projections": torch.empty(1, 768),
                    "timestep": torch.ones(1, dtype=torch.long), "guidance": one}  # fmt: skip


def record_sites(model):
    """Counts what the blocks' attention and feed-forward layers return, ``(tokens, channels)``, during a call."""
    seen = Counter()

    def hook(dropped=False):
        def note(module, args, output):
            outputs = output if isinstance(output, tuple) else (output,)
            seen.update(tuple(x.shape[1:]) for x in outputs[: 1 if dropped else None] if x is not None)

        return note

    for block in model.transformer_blocks:
        for name in ("attn", "attn1", "attn2", "ff", "ff_context"):
            if (module := getattr(block, name, None)) is not None:
                # SD3's last block: its attention's text output goes nowhere
                module.register_forward_hook(hook(dropped=getattr(block, "context_pre_only", False)))
    for block in getattr(model, "single_transformer_blocks", ()):
        block.proj_out.register_forward_hook(hook())
    return seen


@SHAPES
@torch.no_grad()
def test_sites_parameters_and_output_are_those_of_the_real_model(shape):
    model = build(shape)
    seen = record_sites(model)
    with torch.device("meta"):
        output = model(**inputs(model), return_dict=False)[0]
    expected = Counter()
    for count, tokens, width in shape.sites:
        expected[tokens, width] += count
    assert seen == expected
    assert output.numel() == shape.output_values
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


@SHAPES
def test_tokens_are_those_of_the_patch_embedding(shape):
    model = build(shape)
    embed = next(getattr(model, name) for name in ("x_embedder", "patch_embed", "pos_embed") if hasattr(model, name))
    with torch.device("meta"):
        arguments = inputs(model)
        text = (arguments["encoder_hidden_states"],) if type(embed).__name__ == "CogVideoXPatchEmbed" else ()
        tokens = embed(*text, arguments["hidden_states"]).shape[1]
    assert shape.sites[-1 if text else 0][1] == tokens


def test_dit_has_the_675_million_parameters_of_the_paper_with_its_embeddings_counted_once():
    model = build(cache_memory.MODELS[0])
    repeated = sum(p.numel() for block in model.transformer_blocks[1:] for p in block.norm1.emb.parameters())
    assert cache_memory.MODELS[0].parameters - repeated == pytest.approx(675e6, rel=0.001)


@pytest.mark.parametrize(
    "name, published",
    [("PixArt-α XL/2 512²", 0.6e9), ("SD3", 2e9), ("FLUX", 12e9), ("CogVideoX", 5e9), ("HunyuanVideo", 13e9)],
)
def test_parameters_are_about_what_the_authors_say(name, published):
    shape = next(shape for shape in cache_memory.MODELS if shape.name.startswith(name))
    assert shape.parameters == pytest.approx(published, rel=0.12)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("tokens, width", [(1, 1), (5, 7), (16, 24), (33, 3), (64, 96)])
def test_the_closed_form_is_what_quantize_stores(bits, images, tokens, width):
    x = torch.randn(images, tokens, width, generator=torch.Generator().manual_seed(0)).half()
    stored = quantize(x, bits, "per_channel", batch_dims=1).nbytes
    assert cache_memory.site_bytes(tokens, width, bits, images) == stored
    assert cache_memory.site_bytes(tokens, width, 16, images) == x.nbytes


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("order, bits", FORECASTS)
def test_a_whole_cache_is_the_sum_of_its_really_quantized_tensors(order, bits, images):
    shape = cache_memory.Shape("odd", ((3, 5, 7), (2, 4, 6), (1, 9, 7)), 2, 0, 11)
    cache = [
        torch.randn(images, tokens, width).half()
        for _ in range((order + 1) * shape.branches)
        for count, tokens, width in shape.sites
        for _ in range(count)
    ]
    stored = [x if bits == 16 else quantize(x, bits, "per_channel", batch_dims=1) for x in cache]
    assert cache_memory.cache_bytes(shape, order, bits, images) == sum(x.nbytes for x in stored)
    outputs = [torch.randn(images, 11).half() for _ in range((order + 1) * shape.branches)]
    assert cache_memory.output_cache_bytes(shape, order, images) == sum(x.nbytes for x in outputs)


def test_dit_by_hand():
    # 28 blocks × 2 sites × 2 branches × 256 tokens × 1152 channels × 2 bytes
    assert cache_memory.cache_bytes(cache_memory.MODELS[0], 0, 16) == 66_060_288
    assert cache_memory.cache_bytes(cache_memory.MODELS[0], 2, 8, images=4) == 3 * 4 * (
        33_030_144 + 28 * 2 * 2 * 1152 * 4
    )


@SHAPES
@pytest.mark.parametrize("order", cache_memory.ORDERS)
def test_scales_hardly_count_at_real_sizes(shape, order):
    full, int8, int4 = (cache_memory.cache_bytes(shape, order, bits) for bits in (16, 8, 4))
    assert 0.5 < int8 / full <= 0.51 and 0.25 < int4 / full <= 0.27


def test_the_table_is_tidy_and_complete():
    table = cache_memory.table()
    assert list(table.columns) == [
        "model", "order", "bits", "cache_bytes", "weight_bytes", "output_cache_bytes", "fits_24gb"
    ]  # fmt: skip
    assert set(CONFIGS) == set(table.model)
    assert len(table) == len(CONFIGS) * len(FORECASTS) == len(table.drop_duplicates(["model", "order", "bits"]))
    assert (table.output_cache_bytes < 0.02 * table.cache_bytes).all()
    assert (table.fits_24gb == (table.weight_bytes + table.cache_bytes < 24 * 1024**3)).all()
    assert table.fits_24gb.any() and not table.fits_24gb.all()


@pytest.mark.parametrize(
    "order, bits, images, message",
    [
        (-1, 8, 1, "order=-1 is not accepted: an int of 0 or more"),
        (1.5, 8, 1, "order=1.5"),
        (True, 8, 1, "order=True"),
        ("2", 8, 1, "order='2'"),
        (0, 3, 1, "bits=3 is not accepted: choose one of 16, 8, 4, 2"),
        (0, 32, 1, "bits=32"),
        (0, None, 1, "bits=None"),
        (0, 8, 0, "images=0 is not accepted: an int of 1 or more"),
    ],
)
def test_wrong_arguments_are_named(order, bits, images, message):
    with pytest.raises(ValueError, match=message):
        cache_memory.cache_bytes(cache_memory.MODELS[0], order, bits, images)
