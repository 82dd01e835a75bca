"""Notebook 05: what the controller is attached to (slides 9, 10, 11)."""

from __future__ import annotations

from dqar.measure.results import Run
from dqar.models.pipelines import cached_pipeline


def transformer_facts(run: Run) -> dict[str, str]:
    """Size and shape of the profile's model, in words, for slide 11's table."""
    transformer = cached_pipeline(run.profile).transformer
    config, millions = transformer.config, sum(p.numel() for p in transformer.parameters()) / 1e6
    size = config.sample_size
    tokens = (size // config.patch_size) ** 2
    width = config.num_attention_heads * config.attention_head_dim
    return {
        "model": f"DiT, {config.num_layers} layers, {width} wide, {millions:.1f}M params",
        "classes": str(config.num_embeds_ada_norm),
        "resolution": f"{size}×{size} {'pixels' if config.in_channels == 1 else 'latents'}, {tokens} tokens",
    }
