"""What differs between model families, as data: branches, attentions, which module comes last, how it is called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from dqar.takeover import original_class


@dataclass(frozen=True)
class Place:
    """Where a family has attentions that DQAR can take over: one in each block of a list.

    Attributes:
        blocks: name of the list of blocks.
        name: of the attention in a block; blocks where it is ``None`` have none.
        processor: name of diffusers' class that DQAR stands for, to the bit; no other is taken over, nor a subclass. No
            class, since importing a model's module takes seconds.
        text: where a joint attention has the caption's tokens, before or after the image's; ``None``: it has none.
        cross: name of the block's cross-attention to the caption, if it has any.
    """

    blocks: str = "transformer_blocks"
    name: str = "attn1"
    processor: str = AttnProcessor2_0.__name__
    text: Literal["first", "last"] | None = None
    cross: str | None = "attn2"


@dataclass(frozen=True)
class Layer:
    """One attention of a model that DQAR decides about.

    Attributes:
        block_path: path of the block that it is in, within the model.
        block: itself.
        attention: itself.
        place: the family's entry.
    """

    block_path: str
    block: Any
    attention: Any
    place: Place

    @property
    def path(self) -> str:
        """Of the attention within the model, as ``get_submodule`` takes it."""
        return f"{self.block_path}.{self.place.name}"

    @property
    def cross_path(self) -> str:
        """Of the cross-attention, if there is one."""
        return f"{self.block_path}.{self.place.cross}"

    @property
    def cross_attention(self) -> Attention | None:
        """The block's attention to the caption alone; ``None``: there is none, or with another processor."""
        cross = getattr(self.block, self.place.cross or "", None)
        return cross if isinstance(cross, Attention) and type(cross.processor) is AttnProcessor2_0 else None


@dataclass(frozen=True)
class Family:
    """One family of diffusers transformers.

    Attributes:
        attentions: those of the model, in the order of their calls: one list of blocks after the other, block by block.
        branch_order: how the family's pipelines stack the branches of guidance in one batch.
        stacks: whether they do; else each branch is a call of its own, or guidance is an argument of the model.
        last_layer: the linear layer that reads the output from the last hidden states.
        channels: the axis of the latents' channels; of packed tokens ``[B, tokens, C]`` always the last.
        latents, timestep: names of the forward pass's arguments.
        lists: whether latents, captions and outputs are lists of one tensor an image, latents ``[C, 1, H, W]``.
        reversed_time: whether the model is given ``1 - t / 1000``, for the scheduler's ``t``.
    """

    attentions: tuple[Place, ...] = (Place(),)
    branch_order: tuple[str, str] = ("uncond", "cond")
    stacks: bool = True
    last_layer: str = "proj_out"
    channels: int = 1
    latents: str = "hidden_states"
    timestep: str = "timestep"
    lists: bool = False
    reversed_time: bool = False


_SD3 = (
    Place(name="attn", processor="JointAttnProcessor2_0", text="last", cross=None),
    Place(name="attn2", processor="JointAttnProcessor2_0", cross=None),  # of SD3.5 medium's first blocks: image alone
)
_FLUX = (
    Place(name="attn", processor="FluxAttnProcessor", text="first", cross=None),
    Place("single_transformer_blocks", "attn", "FluxAttnProcessor", "first", cross=None),
)
FAMILIES = {
    "DiTTransformer2DModel": Family(branch_order=("cond", "uncond"), last_layer="proj_out_2"),
    "PixArtTransformer2DModel": Family(),
    "LatteTransformer3DModel": Family(),  # its spatial attentions; the temporal ones are always computed
    "SD3Transformer2DModel": Family(_SD3),
    "FluxTransformer2DModel": Family(_FLUX, stacks=False),
    "LuminaNextDiT2DModel": Family(branch_order=("cond", "uncond")),
    "CogVideoXTransformer3DModel": Family(channels=2),
    "HunyuanVideoTransformer3DModel": Family(stacks=False),
    "Lumina2Transformer2DModel": Family(stacks=False, reversed_time=True),
    "QwenImageTransformer2DModel": Family(stacks=False),
    "WanTransformer3DModel": Family(stacks=False),
    "ZImageTransformer2DModel": Family(
        branch_order=("cond", "uncond"), latents="x", timestep="t", lists=True, reversed_time=True
    ),
}
CONDITIONS = ("class_labels", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
"""Arguments of a transformer that say what is to be drawn: constant in each branch of a run."""
CAPTION_LISTS = "cap_feats"
"""The same, where they are a list of one tensor an image."""


def bare(transformer: Any) -> Any:
    """The diffusers model itself, without the wrappers of ``torch.compile`` and PEFT."""
    while True:
        if isinstance(inside := vars(transformer).get("_modules", {}).get("_orig_mod"), torch.nn.Module):
            transformer = inside
        elif hasattr(type(transformer), "get_base_model"):
            transformer = transformer.get_base_model()
        else:
            return transformer


def transformers(pipe: Any) -> list[torch.nn.Module]:
    """The models that a pipeline denoises with, or the model itself: Wan 2.2 has one for high and one for low noise."""
    parts = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [part for part in parts if isinstance(part, torch.nn.Module)] or [pipe]


def family(transformer: torch.nn.Module) -> Family:
    """The model's family; the defaults where it is none of the listed ones."""
    return FAMILIES.get(original_class(bare(transformer)).__name__, Family())


def last_layer(transformer: torch.nn.Module) -> torch.nn.Linear:
    """The layer that reads the output from the last hidden states ``[B, tokens, width]``.

    Raises:
        ValueError: a model whose last layer isn't known, or is no linear layer.
    """
    model = bare(transformer)
    name = family(model).last_layer
    layer = getattr(model, name, None)
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(
            f"{original_class(model).__name__} has no final linear layer {name}: plans without readouts need none"
        )
    return layer


def find_layers(transformer: torch.nn.Module) -> list[Layer]:
    """The model's attentions in the order of their calls, whatever they are: ``None`` where a block has none."""
    model, layers = bare(transformer), []
    places = family(model).attentions
    for blocks in dict.fromkeys(place.blocks for place in places):
        for number, block in enumerate(getattr(model, blocks, ())):
            inside = [
                Layer(f"{blocks}.{number}", block, getattr(block, place.name, None), place)
                for place in places
                if place.blocks == blocks
            ]
            layers += [layer for i, layer in enumerate(inside) if layer.attention is not None or i == 0]
    return layers


def taken_layers(transformer: torch.nn.Module) -> list[Layer]:
    """The attentions that DQAR decides about, in the order of their calls.

    Raises:
        ValueError: blocks of another make, or another attention processor than the family's, by name.
    """
    layers = find_layers(transformer)
    if not layers or not all(isinstance(layer.attention, (Attention, AttentionModuleMixin)) for layer in layers):
        raise ValueError(
            f"{original_class(bare(transformer)).__name__} has no attention that DQAR can take over: needs "
            "`transformer_blocks` with a diffusers `attn1` each, or a model that docs/families.md lists; a "
            "ForecastPlan needs none"
        )
    check_processors(layers)
    return layers


def check_processors(layers: Iterable[Layer]) -> None:
    """Raises ``ValueError`` unless each layer's processor is exactly its family's, which DQAR stands for."""
    for layer_id, layer in enumerate(layers):
        check_processor(layer, layer_id)


def check_processor(layer: Layer, layer_id: int) -> None:
    """Raises ``ValueError`` unless the processor is exactly the family's."""
    present, replaced = type(layer.attention.processor), layer.place.processor
    if present.__name__ != replaced or not present.__module__.startswith("diffusers."):
        raise ValueError(
            f"layer {layer_id} has the attention processor {present.__name__}: DQAR takes the place of diffusers' "
            f"{replaced} only; set that, or remove_dqar first"
        )


def guides(pipe: Any) -> bool | None:
    """Whether the call that a pipeline is in has guidance by two branches; ``None`` if it doesn't say."""
    told = getattr(pipe, "do_classifier_free_guidance", None)
    return told if isinstance(told, bool) else None


def null_class(transformer: torch.nn.Module) -> int | None:
    """The class of the unconditional branch, where the model has classes."""
    return getattr(bare(transformer).config, "num_embeds_ada_norm", None)


def conditions(named: dict[str, Any]) -> tuple[torch.Tensor | None, ...]:
    """A call's ``CONDITIONS``, in that order, and the captions that are a list: ``[B, ...]`` each."""
    given = [named.get(name) for name in CONDITIONS] + list(named.get(CAPTION_LISTS, ()))
    return tuple(value if isinstance(value, torch.Tensor) else None for value in given)


def as_batch(images: Any) -> Any:
    """Latents or an output as one tensor ``[B, ...]``, where the family has a list of ``[C, 1, H, W]``.

    Raises:
        ValueError: images of different sizes, or other lists.
    """
    if isinstance(images, torch.Tensor) or not isinstance(images, (list, tuple)):
        return images
    shapes = {tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__ for image in images}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[1] != 1:
        raise ValueError(f"latents of {sorted(map(str, shapes)) or shape} are not accepted: images of one size")
    return torch.stack(list(images)).squeeze(2)


def as_output(sample: torch.Tensor, like: Family, return_dict: bool) -> Any:
    """An output ``[B, ...]`` as a model of the family returns it."""
    output: Any = list(sample.unsqueeze(2).unbind()) if like.lists else sample
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def describe_models(models: Iterable[Any]) -> str:
    """``describe_model`` of all that a pipeline denoises with."""
    return " and ".join(map(describe_model, models))


def describe_model(transformer: Any) -> str:
    """What a plan must fit: class, depth, width, input size and number of parameters of a diffusers transformer."""
    model = bare(transformer)
    config = model.config
    parts = [f"{getattr(config, 'num_layers', 'unknown')} layers"]
    if singles := getattr(config, "num_single_layers", None):
        parts.append(f"{singles} single layers")
    if hasattr(config, "num_attention_heads") and hasattr(config, "attention_head_dim"):
        parts.append(f"{config.num_attention_heads * config.attention_head_dim} wide")
    if size := getattr(config, "sample_size", None):
        parts.append(f"{size} x {size} inputs")
    parts.append(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    return f"{original_class(model).__name__} of {', '.join(parts)}"
