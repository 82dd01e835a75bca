"""The CIFAR-10 model's autoencoder: 32×32 pictures to 16×16 latents of four channels, each of mean 0 and variance 1."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm.auto import tqdm

from dqar.training.checkpoints import cut_log, load_checkpoint, save_checkpoint
from dqar.training.digits import learning_rate


@dataclass(frozen=True)
class VaeRecipe:
    """Everything that decides the autoencoder's training."""

    block_out_channels: tuple[int, ...] = (32, 64)
    latent_channels: int = 4
    batch_size: int = 32
    num_steps: int = 4200
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    kl_weight: float = 5e-5
    """Of the KL divergence a latent number, against the squared error a pixel in [-1, 1]."""
    seed: int = 0


def build_vae(recipe: VaeRecipe) -> AutoencoderKL:
    """An ``AutoencoderKL`` that halves height and width once; one layer a block, no attention."""
    torch.manual_seed(recipe.seed)
    blocks = len(recipe.block_out_channels)
    return AutoencoderKL(
        block_out_channels=recipe.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_vae(
    recipe: VaeRecipe, images: torch.Tensor, out: Path, *, device: str = "cpu", checkpoint_seconds: float = 300
) -> AutoencoderKL:
    """Trains from the checkpoint in ``out``, or from nothing, and returns the autoencoder, its latents normalised.

    Args:
        recipe: how.
        images: ``[N, 3, 32, 32]`` in [-1, 1]; mirrored at random.
        out: gets ``vae-checkpoint.pt`` and, a line a step, ``vae-loss.jsonl``.
        device: a torch device; computes in BF16.
        checkpoint_seconds: time between checkpoints.

    Raises:
        ValueError: the checkpoint is unreadable, or another recipe's.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out / "vae-checkpoint.pt", out / "vae-loss.jsonl"
    vae = build_vae(recipe).to(device, memory_format=torch.channels_last).train()
    rate = learning_rate(recipe.warmup_steps, recipe.num_steps)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    state = load_checkpoint(checkpoint, asdict(recipe), device)
    first, seconds = 0, 0.0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    cut_log(log, first)
    started = saved = time.monotonic()
    with log.open("a") as log_file:
        bar = tqdm(range(first, recipe.num_steps), initial=first, total=recipe.num_steps, desc="vae", mininterval=10)
        for step in bar:
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            chosen = torch.randint(len(images), (recipe.batch_size,), generator=generator)
            mirrored = torch.rand(recipe.batch_size, generator=generator) < 0.5
            seen = torch.where(mirrored[:, None, None, None], images[chosen].flip(-1), images[chosen]).to(device)
            shape = (recipe.batch_size, recipe.latent_channels, seen.shape[2] // 2, seen.shape[3] // 2)
            noise = torch.randn(shape, generator=generator).to(device)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate(step)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                posterior = vae.encode(seen.contiguous(memory_format=torch.channels_last)).latent_dist
                mean, std, logvar = (x.float() for x in (posterior.mean, posterior.std, posterior.logvar))
                decoded = vae.decode(mean + std * noise).sample.float()
            error = F.mse_loss(decoded, seen)
            divergence = 0.5 * (mean.square() + std.square() - 1 - logvar).mean()
            optimizer.zero_grad()
            (error + recipe.kl_weight * divergence).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            line = {"step": step, "psnr": _decibels(error.item()), "kl": divergence.item()}
            log_file.write(json.dumps(line) + "\n")
            bar.set_postfix(psnr=f"{line['psnr']:.2f}", kl=f"{line['kl']:.2f}", refresh=False)
            if time.monotonic() - saved > checkpoint_seconds or step + 1 == recipe.num_steps:
                log_file.flush()
                save_checkpoint(
                    checkpoint,
                    {
                        "recipe": asdict(recipe),
                        "step": step + 1,
                        "seconds": seconds + time.monotonic() - started,
                        "model": vae.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                )
                saved = time.monotonic()
    vae = vae.eval().to("cpu")
    normalise_latents(vae, images[:: max(1, len(images) // 5000)])
    return vae


def _decibels(squared_error: float) -> float:
    """PSNR of images in [-1, 1]."""
    return -10 * math.log10(squared_error / 4)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Folds each latent channel's mean and scale over images ``[N, C, H, W]`` into the latents' two 1×1 convolutions.

    The autoencoder decodes to the same pictures as before, and its latents have mean 0 and variance 1, channel by
    channel, so that any pipeline's ``latents / scaling_factor`` is right with a factor of 1.
    """
    latents = encode(vae, images)
    mean, scale = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    to_latents, from_latents = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    to_latents.weight[:channels] /= scale[:, None, None, None]
    to_latents.bias[:channels] = (to_latents.bias[:channels] - mean) / scale
    to_latents.bias[channels:] -= 2 * scale.log()  # the log of the variance, of a latent divided by its scale
    from_latents.bias += from_latents.weight[:, :, 0, 0] @ mean
    from_latents.weight *= scale[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Mean latents ``[N, 4, 16, 16]`` float32 of images ``[N, 3, 32, 32]`` in [-1, 1]."""
    parts = tqdm(images.split(50), desc="encode", mininterval=10, delay=5)  # minutes for the training images
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """PSNR in dB of the mean squared error of all images ``[N, C, H, W]``, decoded from mean latents and clipped."""
    errors = [
        (vae.decode(encode(vae, part)).sample.clamp(-1, 1) - part).square().flatten(1).mean(1)
        for part in images.split(500)
    ]
    return _decibels(torch.cat(errors).mean().item())
