"""Trains the embedded digits model (``dqar train digits``).

A class-conditional diffusers ``DiTTransformer2DModel`` that predicts the noise (Ho et al. 2020), with min-SNR loss
weighting (Hang et al. 2023), adaLN-Zero initialisation (Peebles & Xie 2023), label dropout for classifier-free guidance
and an exponential moving average of the weights. Like every training here it goes on from its last checkpoint, is
seeded per step, logs its loss and writes a model card.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel, compute_snr
from torch import nn
from tqdm.auto import tqdm

from dqar.files import write_json
from dqar.models.data import load_split
from dqar.models.pipelines import EmbeddedDiTPipeline
from dqar.training.card import pipeline_parts, training_facts
from dqar.training.checkpoints import cut_log, load_checkpoint, save_checkpoint
from dqar.training.latent_dit import NOISE_SCHEDULE, min_snr_loss


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the digits model's training; changing a field makes a different model."""

    num_layers: int = 28
    num_attention_heads: int = 4
    attention_head_dim: int = 24
    sample_size: int = 8
    in_channels: int = 1
    patch_size: int = 1
    num_classes: int = 10
    batch_size: int = 64
    num_steps: int = 2400
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    label_dropout: float = 0.1
    min_snr_gamma: float = 5.0
    ema_decay: float = 0.998
    seed: int = 0


def build_transformer(recipe: Recipe) -> DiTTransformer2DModel:
    """A ``DiTTransformer2DModel`` with DiT's own initialisation, which diffusers leaves out.

    Xavier weights, and zeros where adaLN-Zero wants them: each block starts as the identity and the model's first
    output is exactly zero.
    """
    torch.manual_seed(recipe.seed)
    model = DiTTransformer2DModel(
        num_attention_heads=recipe.num_attention_heads,
        attention_head_dim=recipe.attention_head_dim,
        in_channels=recipe.in_channels,
        out_channels=recipe.in_channels,
        num_layers=recipe.num_layers,
        sample_size=recipe.sample_size,
        patch_size=recipe.patch_size,
        num_embeds_ada_norm=recipe.num_classes,
    )
    init_linears(model)
    for block in model.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for linear in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
    # diffusers' LabelEmbedding drops labels in train mode, in every block by itself, so that no sample ever sees the
    # null class in all of them. The recipe drops them once per sample, and the model has no other mode-dependent part.
    return model.eval()


def init_linears(model: nn.Module) -> None:
    """Xavier weights and no biases in every linear layer (Peebles & Xie 2023)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def training_loss(model, noise_scheduler, images, labels, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Mean min-SNR-weighted squared error of the predicted noise; ``images`` ``[B, C, H, W]`` in [-1, 1]."""
    batch, device = len(images), images.device
    noise = torch.randn(images.shape, generator=generator, device=device)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch,), generator=generator, device=device)
    dropped = torch.rand(batch, generator=generator, device=device) < recipe.label_dropout
    labels = torch.where(dropped, recipe.num_classes, labels)
    noisy = noise_scheduler.add_noise(images, noise, timesteps)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        predicted = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0].float()
    return min_snr_loss(compute_snr(noise_scheduler, timesteps), predicted, noise, recipe.min_snr_gamma)


def train_transformer(recipe: Recipe, out: Path, checkpoint_every: int = 100) -> DiTTransformer2DModel:
    """Trains from the last checkpoint in ``out``, or from nothing, and returns the averaged model: ``train_steps``."""
    images, labels = load_split("digits", "train")
    model = build_transformer(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(images), (recipe.batch_size,), generator=generator)
        return training_loss(model, noise_scheduler, images[chosen], labels[chosen], recipe, generator)

    return train_steps(asdict(recipe), model, [optimizer], loss, out, checkpoint_every)


def learning_rate(warmup_steps: int, cycle_steps: int) -> Callable[[int], float]:
    """A step's share of the highest learning rate: it warms up and falls as a cosine, again in every cycle."""

    def share(step: int) -> float:
        step %= cycle_steps
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, cycle_steps - warmup_steps)))

    return share


def train_steps(
    recipe: dict,
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[int], torch.Tensor],
    out: Path,
    checkpoint_every: int = 100,
) -> Any:
    """Trains ``model`` from the last checkpoint in ``out``, or from nothing, and returns it with the averaged weights.

    ``out/checkpoint.pt`` holds the state, ``out/loss.jsonl`` one line per step. What a step draws depends on its number
    only, so an interrupted run continues as if it hadn't been.

    Args:
        recipe: all that decides the training, with ``num_steps``, ``warmup_steps``, ``ema_decay`` and, where the
            learning rate falls to 0 several times, ``cycle_steps``.
        model: as training begins with it.
        optimizers: of its parameters.
        loss_of: the loss, a scalar, of the step with this number.
        out: folder of checkpoint and log.
        checkpoint_every: so many steps.

    Raises:
        ValueError: the checkpoint is unreadable, or another recipe's.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = recipe["num_steps"]
    ema = EMAModel(model.parameters(), decay=recipe["ema_decay"], use_ema_warmup=False)
    rate = learning_rate(recipe["warmup_steps"], recipe.get("cycle_steps", steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    parts = {"model": model, "ema": ema}
    for number, (optimizer, schedule) in enumerate(zip(optimizers, schedules, strict=True)):
        suffix = "" if number == 0 else f"_{number}"
        parts |= {f"optimizer{suffix}": optimizer, f"lr_schedule{suffix}": schedule}
    checkpoint, log, first, seconds = out / "checkpoint.pt", out / "loss.jsonl", 0, 0.0
    if (state := load_checkpoint(checkpoint, recipe)) is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, seconds = state["step"], state["seconds"]
    cut_log(log, first)
    started = time.monotonic() - seconds
    with log.open("a") as log_file:
        for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc="train")):
            loss = loss_of(step)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for schedule in schedules:
                schedule.step()
            ema.step(model.parameters())
            log_file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
            bar.set_postfix(loss=f"{loss.item():.4f}")
            if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                log_file.flush()
                state = {"recipe": recipe, "step": step + 1, "seconds": time.monotonic() - started}
                save_checkpoint(checkpoint, state | {name: part.state_dict() for name, part in parts.items()})
    ema.copy_to(model.parameters())
    return model


def export_digits(model: DiTTransformer2DModel, recipe: Recipe, work: Path, weights: Path) -> None:
    """Saves the pipeline the way diffusers loads DiT-XL/2, FP16 in small shards, and how it was trained."""
    pipe = EmbeddedDiTPipeline(transformer=model.half(), **pipeline_parts("digits"))
    export_pipeline(pipe, asdict(recipe), work, weights / "digits")


def export_pipeline(pipe: DiffusionPipeline, recipe: dict, work: Path, folder: Path) -> None:
    """Saves a pipeline in small shards, and in ``training.json`` how ``train_steps`` trained it in ``work``."""
    pipe.save_pretrained(folder, max_shard_size="4MB")
    losses = [json.loads(line)["loss"] for line in (work / "loss.jsonl").read_text().splitlines()]
    seconds = torch.load(work / "checkpoint.pt", weights_only=True)["seconds"]
    seen, parameters = recipe["batch_size"] * recipe["num_steps"], sum(p.numel() for p in pipe.transformer.parameters())
    write_json(folder / "training.json", training_facts(recipe, parameters, seen, seconds, losses, "cpu"), indent=1)
