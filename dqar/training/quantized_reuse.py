"""Fine-tunes the digits model to be reused from a quantized cache: quantization-aware training.

A training step takes one noise to two neighbouring timesteps of the sampler. At the first the model is computed; at the
second its attentions and feed-forwards answer with what the cache gives back of the first. The target is what the
shipped model predicts at both, so that without reuse there would be nothing to learn (distillation, as in EfficientDM,
He et al. 2023, arXiv 2310.03270). Rounding passes gradients on unchanged: the straight-through estimator (Bengio et al.
2013, arXiv 1308.3432).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.training_utils import compute_snr

from dqar.cache import Name, QuantizedCache, Tensors, recall
from dqar.config import CacheFormat, DQARConfig
from dqar.families import taken_layers
from dqar.measure.sampling import OPEN
from dqar.models.data import load_split
from dqar.models.pipelines import load_embedded, make_scheduler
from dqar.takeover import taken_over
from dqar.training.digits import train_steps
from dqar.training.latent_dit import NOISE_SCHEDULE, min_snr_loss

Pair = tuple[torch.Tensor, torch.Tensor]
"""The same at a computed timestep and at the next one, which reuses."""


@dataclass(frozen=True)
class TuningRecipe:
    """Everything that decides a fine-tuning; changing a field makes a different model.

    Attributes:
        bits: of the cache that is in the loop; 16: none of its values is rounded.
        scheduler, num_inference_steps: whose timesteps are trained on.
    """

    bits: int
    scheduler: str = "dpm-solver++"
    num_inference_steps: int = 50
    num_steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup_steps: int = 10
    label_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    ema_decay: float = 0.9
    seed: int = 0


def cache_config(bits: int) -> DQARConfig:
    """Attention and feed-forward reused at every second step, from a cache of 16, 8, 4 or 2 bits, the last two fitted.

    Raises:
        ValueError: other bits.
    """
    cache = CacheFormat(fitted=bits in (4, 2))
    return dataclasses.replace(OPEN, schedule="static", reuse_target="block", quantize_bits=bits, cache=cache)


def through_cache(tensors: Tensors, config: DQARConfig) -> Tensors:
    """What the cache gives back of one layer's ``tensors`` ``[B, N, C]``, with the gradients of the tensors."""
    cache = QuantizedCache(config)
    entries = cache.put(0, {"cond": slice(None)}, 0, tensors)
    # x - x is exactly 0: the values are the cache's to the bit.
    return {name: recall(entries, 1, name) + (x - x.detach()) for name, x in tensors.items()}


def reused_outputs(
    model: DiTTransformer2DModel, hidden_states: Pair, timesteps: Pair, class_labels: torch.Tensor, config: DQARConfig
) -> Pair:
    """What the model predicts at a computed step and at the next one, which reuses, differentiably.

    Args:
        model: to train; DQAR isn't applied to it, since ``apply_dqar`` keeps nothing while gradients are on.
        hidden_states: noisy images ``[B, C, H, W]`` of both steps.
        timesteps: ``[B]`` int64 of both.
        class_labels: ``[B]`` int64.
        config: of ``cache_config``.

    Returns:
        Two of ``[B, C, H, W]``.
    """
    layers = taken_layers(model)
    computed: list[Tensors] = [{} for _ in layers]

    def keep(layer_id: int, name: Name, original: Callable, *args: Any, **named: Any) -> torch.Tensor:
        computed[layer_id][name] = original(*args, **named)
        return computed[layer_id][name]

    def reuse(layer_id: int, name: Name, *_args: Any, **_named: Any) -> torch.Tensor:
        return cached[layer_id][name]

    def predict(answer: Callable, step: int) -> torch.Tensor:
        sites = [(layer.attention, i, "output") for i, layer in enumerate(layers)]
        sites += [(layer.block.ff, i, "feed_forward") for i, layer in enumerate(layers)]
        with taken_over({module: functools.partial(answer, i, name) for module, i, name in sites}):
            return model(hidden_states[step], timesteps[step], class_labels, return_dict=False)[0]

    first = predict(keep, 0)
    cached = [through_cache(tensors, config) for tensors in computed]
    return first, predict(reuse, 1)


def tuning_loss(
    recipe: TuningRecipe,
    model: DiTTransformer2DModel,
    shipped: DiTTransformer2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    step: int,
) -> torch.Tensor:
    """Mean min-SNR-weighted squared error to the noise that ``shipped`` predicts, at the two timesteps of a step.

    Images, noise and timesteps are drawn by ``(seed, step)``. Computed timesteps are spread evenly over the sampler's.

    Args:
        recipe: of the tuning.
        model: to tune.
        shipped: computes everything.
        images: ``[N, 1, 8, 8]`` float32 in [-1, 1].
        labels: ``[N]`` int64.
        step: number of the step.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    size, noise_scheduler = recipe.batch_size, DDPMScheduler(**NOISE_SCHEDULE)
    sampler: Any = make_scheduler(recipe.scheduler, noise_scheduler)
    sampler.set_timesteps(recipe.num_inference_steps)
    chosen = torch.randint(len(images), (size,), generator=generator)
    noise = torch.randn((size, *images.shape[1:]), generator=generator)
    places = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    dropped = torch.rand(size, generator=generator) < recipe.label_dropout
    class_labels = torch.where(dropped, model.config.num_embeds_ada_norm, labels[chosen])
    first = 2 * (places * (len(sampler.timesteps) // 2)).long()
    timesteps = sampler.timesteps[first].long(), sampler.timesteps[first + 1].long()
    noisy = [noise_scheduler.add_noise(images[chosen], noise, t) for t in timesteps]
    predicted = reused_outputs(model, (noisy[0], noisy[1]), timesteps, class_labels, cache_config(recipe.bits))
    losses = []
    for x, t, prediction in zip(noisy, timesteps, predicted, strict=True):
        with torch.no_grad():
            target = shipped(x, t, class_labels, return_dict=False)[0]
        losses.append(min_snr_loss(compute_snr(noise_scheduler, t), prediction, target, recipe.min_snr_gamma))
    return (losses[0] + losses[1]) / 2


def tune(recipe: TuningRecipe, out: Path) -> DiTTransformer2DModel:
    """Fine-tunes the shipped model from the last checkpoint in ``out``, or from the start: ``train_steps``.

    Raises:
        ValueError: unknown bits; the checkpoint is unreadable, or another recipe's.
    """
    cache_config(recipe.bits)
    images, labels = load_split("digits", "train")
    model, shipped = (load_embedded("digits").transformer for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.0, fused=True)
    loss = functools.partial(tuning_loss, recipe, model, shipped, images, labels)
    return train_steps(asdict(recipe), model, [optimizer], loss, out, checkpoint_every=20)
