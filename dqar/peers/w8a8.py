"""Slide 11's baseline "quantization only": W8A8 linear layers by torchao, PTQ4DiT's calibration in front of it.

PTQ4DiT (Wu et al. 2024, arXiv 2405.16005) evens out salient channels before quantization (CSB) by factors that hold
for all steps (SSC), and folds them into the weights that come before; its block-wise reconstruction is not done here.

torchao quantizes activations dynamically with a scale per token, weights with one per output channel. That absorbs
much of what CSB and SSC are for, since no scale has to last for all tokens and steps; still, a channel that is salient
in a token coarsens the others of that token. What they are worth here has to be measured, not assumed.
"""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from scipy.stats import spearmanr
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.utils import should_reduce_range

from dqar.measure.sampling import sample
from dqar.models.profiles import Profile
from dqar.takeover import handler_of

# Not norm1.linear, the timestep and label embedders and proj_out_1: they run on one token per image, so that they take
# hardly any time, and the salient channels that PTQ4DiT is about are in the layers that are named here. Nor pos_embed
# and proj_out_2, which are tiny. (norm1.linear holds a third of a block's weights all the same: less memory is saved
# than it seems.)
_QUANTIZED = re.compile(r"transformer_blocks\.\d+\.(attn1|attn2|ff)\.")


def quantize_transformer(
    transformer: DiTTransformer2DModel, salience: dict[str, torch.Tensor] | None = None
) -> DiTTransformer2DModel:
    """A W8A8 copy, on the same device: int8 attention and feed-forward layers, everything else as it was.

    On a CPU without VNNI, whose int8 products overflow, torchao uses 7 of the 8 bits.

    Args:
        transformer: stays as it is.
        salience: from ``measure_salience``, ``[channels]`` of each layer, turns on CSB; ``None`` leaves it out.

    Raises:
        ValueError: other blocks than DiT's or PixArt's, a transformer that is quantized already or carries hooks (which
            a copy would share with it), or another model's ``salience``.
    """
    _sites(transformer)
    if "forward" in vars(transformer) or handler_of(transformer) is not None:
        raise ValueError("the transformer carries hooks (DQAR's, or of offloading): quantize it without, then add them")
    quantized = copy.deepcopy(transformer)
    if salience is not None:
        balance(quantized, salience)
    # Inductor's settings are the whole process's, so that they would change what is compared with this.
    config = Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False, reduce_range=should_reduce_range(transformer.device)
    )
    quantize_(quantized, config, lambda module, name: isinstance(module, nn.Linear) and bool(_QUANTIZED.match(name)))
    return quantized


def measure_salience(
    pipe: DiffusionPipeline, profile: Profile, seed: int, num_samples: int = 4
) -> dict[str, torch.Tensor]:
    """Samples with the untouched model and measures how far the input channels of its linear layers go over all steps.

    A step's salience is max |x| over images, guidance branches and tokens; SSC's weighted mean makes one of all steps.

    Args:
        pipe: from ``load_pipeline``, not quantized.
        profile, seed, num_samples: as for ``sample``; take another seed than for the images to compare.

    Returns:
        Float32 ``[channels]`` on the CPU by the name of the layer; to_q's is also to_k's and to_v's.

    Raises:
        ValueError: other blocks than DiT's or PixArt's, or a quantized transformer.
    """
    sites = _sites(pipe.transformer)
    peaks: dict[str, dict[float, torch.Tensor]] = {name: {} for name in sites}
    timestep = 0.0

    def begin_step(_module, _args, kwargs):
        nonlocal timestep
        timestep = kwargs["timestep"].flatten()[0].item()

    def see(name):
        def hook(_module, args):
            peak = args[0].abs().flatten(0, -2).amax(0).float()
            last = peaks[name].get(timestep)  # of an earlier batch
            peaks[name][timestep] = peak if last is None else torch.maximum(last, peak)

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(pipe.transformer.register_forward_pre_hook(begin_step, with_kwargs=True))
        for name, site in sites.items():
            hooks.enter_context(site.readers[0].register_forward_pre_hook(see(name)))
        sample(pipe, profile, seed, num_samples=num_samples, description="salience")
    salience = {}
    for name, site in sites.items():
        steps = torch.stack(list(peaks[name].values())).double().cpu()
        salience[name] = (step_weights(steps, site.weight_salience().cpu()) @ steps).float()
    return salience


def step_weights(steps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """SSC's weights of the steps, ``[T]`` float64: η_t = exp(−ρ_t) / Σ_τ exp(−ρ_τ).

    ρ_t is Spearman's correlation of the activations' salience at step t with the weights': where both are salient in
    the same channels, balancing has nothing to shift, and the step counts less. Constant salience has no ranks: ρ = 0.

    Args:
        steps: salience of the activations ``[T, channels]``.
        weight: salience of the weights ``[channels]``.
    """
    rho = torch.zeros(len(steps), dtype=torch.float64)
    for t, step in enumerate(steps):
        if step.min() < step.max() and weight.min() < weight.max():
            rho[t] = spearmanr(step.numpy(), weight.numpy()).statistic
    return (-rho).softmax(0)


@torch.no_grad()
def balance(transformer: DiTTransformer2DModel, salience: dict[str, torch.Tensor]) -> None:
    """Folds CSB into the weights, in place; in exact arithmetic the model computes what it did before.

    Input channel j of a layer is divided by s_j = √(max|x_j| / max|w_j|), column j of its weights multiplied by it, so
    that both reach √(max|x_j| · max|w_j|). The division costs nothing while sampling:

    - to_q, to_k and to_v read one input, so they share s, by the largest |w_j| of the three. It goes into adaLN's rows
      for shift/s and scale' = (1 + scale)/s − 1, as does that of the first feed-forward layer.
    - to_out's goes into to_v's rows, since attention mixes tokens, never channels.
    - The second feed-forward layer lies behind a GELU, which nothing can be moved through: it isn't balanced.
    - PixArt's blocks share one adaLN layer, so of them only to_out is balanced.

    Args:
        transformer: diffusers', unquantized.
        salience: from ``measure_salience`` on this model, ``[channels]`` of each layer. A channel of none, or of zero
            weights, keeps s = 1.

    Raises:
        ValueError: other blocks than DiT's or PixArt's, a quantized transformer, or another model's ``salience``;
            nothing has changed then.
    """
    sites = _sites(transformer)
    _check_salience(salience, sites)
    for name, site in sites.items():
        weight = site.weight_salience()
        activation = salience[name].to(weight)
        factor = torch.where((activation > 0) & (weight > 0), (activation / weight).sqrt(), 1.0)
        for reader in site.readers:
            reader.weight.copy_(reader.weight.double() * factor)
        for rows in site.producers:
            rows.divide(factor)


def weight_bytes(transformer: nn.Module) -> int:
    """Bytes of all parameters and buffers; of a quantized tensor, its integers and whatever else it keeps.

    (Its own ``nbytes`` is that of the floating-point tensor it stands for.)
    """
    return sum(_stored_bytes(tensor) for tensor in (*transformer.parameters(), *transformer.buffers()))


def _stored_bytes(tensor: torch.Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_stored_bytes(getattr(tensor, name)) for name in names)


@dataclass(frozen=True)
class _Rows:
    """Output channels ``[start, stop)`` of a linear layer, to which whoever uses them adds ``offset``."""

    linear: nn.Linear
    start: int
    stop: int
    offset: float = 0.0

    def divide(self, factor: torch.Tensor) -> None:
        """Makes output + offset that much smaller."""
        weight, bias = self.linear.weight[self.start : self.stop], self.linear.bias
        weight.copy_(weight.double() / factor[:, None])
        if bias is not None:
            rows = bias[self.start : self.stop]
            rows.copy_((rows.double() + self.offset) / factor - self.offset)


@dataclass(frozen=True)
class _Site:
    """An activation that can be balanced: the layers that read it, and what produces it."""

    readers: tuple[nn.Linear, ...]
    producers: tuple[_Rows, ...]

    def weight_salience(self) -> torch.Tensor:
        """Max |w| of each input channel over all readers, ``[channels]`` float64."""
        return torch.cat([reader.weight.detach() for reader in self.readers]).abs().amax(0).double()


def _sites(transformer: nn.Module) -> dict[str, _Site]:
    """All that can be balanced, by the name of the first reader.

    to_out comes before to_q, since it changes to_v's weights, which have a say in to_q's factor.
    """
    blocks = getattr(transformer, "transformer_blocks", ())
    kinds = {str(getattr(block, "norm_type", type(block).__name__)) for block in blocks}
    if len(kinds) != 1 or not kinds <= {"ada_norm_zero", "ada_norm_single"}:
        raise ValueError(
            f"a {type(transformer).__name__} with transformer_blocks of {', '.join(sorted(kinds)) or 'no kind'} is not "
            "accepted: needs those of norm_type 'ada_norm_zero' or 'ada_norm_single', as DiT and PixArt have"
        )
    if any(is_traceable_wrapper_subclass(parameter) for parameter in transformer.parameters()):
        raise ValueError("a transformer that is quantized already is not accepted: needs the one it was made from")
    sites = {}
    for layer_id, block in enumerate(blocks):
        attn, name = block.attn1, f"transformer_blocks.{layer_id}"
        values = _Rows(attn.to_v, 0, attn.to_v.out_features)
        sites[f"{name}.attn1.to_out.0"] = _Site((attn.to_out[0],), (values,))
        if "ada_norm_single" in kinds:  # shift and scale are made for all blocks by one layer: nothing to fold into
            continue
        modulation, up = block.norm1.linear, block.ff.net[0].proj
        width = modulation.out_features // 6
        # AdaLayerNormZero's order: shift, scale and gate of attention, then of the feed-forward layers.
        shift_msa, scale_msa, _, shift_mlp, scale_mlp, _ = (
            _Rows(modulation, i * width, (i + 1) * width, offset=float(i in (1, 4))) for i in range(6)
        )
        sites[f"{name}.attn1.to_q"] = _Site((attn.to_q, attn.to_k, attn.to_v), (shift_msa, scale_msa))
        sites[f"{name}.ff.net.0.proj"] = _Site((up,), (shift_mlp, scale_mlp))
    return sites


def _check_salience(salience: dict[str, torch.Tensor], sites: dict[str, _Site]) -> None:
    if odd := sorted(salience.keys() ^ sites.keys()):
        problem = "missing" if odd[0] in sites else "not a layer of this one"
        raise ValueError(f"salience belongs to another model: {odd[0]} is {problem}")
    for name, site in sites.items():
        given, width = salience[name], site.readers[0].in_features
        if given.shape != (width,):
            raise ValueError(
                f"salience belongs to another model: {name} has {tuple(given.shape)} channels, not ({width},)"
            )
        if not given.isfinite().all():
            raise ValueError(f"salience of {name} holds NaN or inf: the model was not finite while it was measured")
