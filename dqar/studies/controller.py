"""Notebook 05: what the controller is attached to (slides 9, 10, 11)."""

from __future__ import annotations

from dqar.measure.results import Run
from dqar.models.captions import NUM_CAPTIONS
from dqar.models.pipelines import cached_pipeline, num_classes


def transformer_facts(run: Run) -> dict[str, str]:
    """``model``, ``asked_for`` and ``resolution`` of the profile's model, in words, for slide 11's table."""
    pipe = cached_pipeline(run.profile)
    config, millions = pipe.transformer.config, sum(p.numel() for p in pipe.transformer.parameters()) / 1e6
    size = config.sample_size
    tokens = (size // config.patch_size) ** 2
    width = config.num_attention_heads * config.attention_head_dim
    captions = hasattr(pipe, "text_encoder")
    return {
        "model": f"DiT, {config.num_layers} layers, {width} wide, {millions:.1f}M params",
        "asked_for": f"{NUM_CAPTIONS} captions" if captions else f"{num_classes(pipe)} class labels",
        "resolution": f"{size}×{size} {'latents' if hasattr(pipe, 'vae') else 'pixels'}, {tokens} tokens",
    }
