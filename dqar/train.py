"""The training recipe of the embedded models: ``python -m dqar.train digits``, or ``cifar10`` on a GPU.

Trains a class-conditional diffusers ``DiTTransformer2DModel`` to predict the noise (Ho et al. 2020), with min-SNR
loss weighting (Hang et al. 2023), adaLN-Zero initialisation (Peebles & Xie 2023), label dropout for classifier-free
guidance and an exponential moving average of the weights, and the small classifier whose features the Fréchet
distance uses. Resumes from its last checkpoint, is seeded per step, logs its loss and writes a model card.

A GPU that is lent for ten minutes at a time trains the CIFAR-10 model (about 25 minutes of an H100) by the same command
again and again, ``python -m dqar.train cifar10 --device cuda --minutes 9``, until it says that it is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dqar import metrics
from dqar.classifier import CLASSIFIERS, Classifier
from dqar.data import load_split
from dqar.models import CLASS_NAMES, WEIGHTS, EmbeddedDiTPipeline, get_profile, load_classifier, load_pipeline
from dqar.sampling import sample

NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
"""Linear betas, as DiT-XL/2 was trained with."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; changing a field makes a different model."""

    dataset: Literal["digits", "cifar10"] = "digits"
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
    flip: bool = False
    """Mirrors half of the images."""
    seed: int = 0


RECIPES = {
    "digits": Recipe(),
    # 21 M parameters, 42 MB in FP16; 256 tokens, as DiT-XL/2 has.
    "cifar10": Recipe(
        dataset="cifar10",
        num_attention_heads=3,
        attention_head_dim=64,
        sample_size=32,
        in_channels=3,
        patch_size=2,
        batch_size=256,
        num_steps=10_000,
        learning_rate=5e-4,
        warmup_steps=1000,
        ema_decay=0.9995,
        flip=True,
    ),
}


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
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for linear in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
    # diffusers' LabelEmbedding drops labels in train mode, in every block by itself, so that no sample ever sees the
    # null class in all of them. The recipe drops them once per sample, and the model has no other mode-dependent part.
    return model.eval()


def training_loss(model, noise_scheduler, images, labels, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Mean min-SNR-weighted squared error of the predicted noise; ``images`` ``[B, C, H, W]`` in [-1, 1]."""
    batch, device = len(images), images.device
    noise = torch.randn(images.shape, generator=generator, device=device)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch,), generator=generator, device=device)
    dropped = torch.rand(batch, generator=generator, device=device) < recipe.label_dropout
    if recipe.flip:
        mirrored = torch.rand(batch, generator=generator, device=device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    labels = torch.where(dropped, recipe.num_classes, labels)
    noisy = noise_scheduler.add_noise(images, noise, timesteps)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        predicted = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0].float()
    snr = compute_snr(noise_scheduler, timesteps)
    weight = snr.clamp(max=recipe.min_snr_gamma) / snr
    return (weight * (predicted - noise).pow(2).mean(dim=(1, 2, 3))).mean()


def train_transformer(
    recipe: Recipe, out: Path, checkpoint_every: int = 100, device: str = "cpu", minutes: float = math.inf
) -> DiTTransformer2DModel | None:
    """Trains from the last checkpoint in ``out`` (or from nothing) and returns the EMA model, in float32 on the CPU.

    ``out/checkpoint.pt`` holds the state, ``out/loss.jsonl`` one line per step. Step ``i`` draws from a generator
    seeded by ``(seed, i)``, so an interrupted run continues as if it hadn't been. On a GPU the model is compiled, and
    computes in BF16.

    Args:
        minutes: stop after so many, with a checkpoint and without a result (``None``), if it isn't done by then.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, labels = (x.to(device) for x in load_split(recipe.dataset, "train"))
    model = build_transformer(recipe).to(device)
    forward = torch.compile(model) if device == "cuda" else model
    ema = EMAModel(model.parameters(), decay=recipe.ema_decay, use_ema_warmup=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    lr_schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.num_steps)
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    checkpoint, log, first, seconds = out / "checkpoint.pt", out / "loss.jsonl", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} was made by another recipe, {state['recipe']}; remove it to start anew")
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        lr_schedule.load_state_dict(state["lr_schedule"])
        first, seconds = state["step"], state["seconds"]
    ema.to(device)
    lines = log.read_text().splitlines()[:first] if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines))
    started = time.monotonic() - seconds
    deadline = time.monotonic() + 60 * minutes
    with log.open("a") as log_file:
        for step in (bar := tqdm(range(first, recipe.num_steps), initial=first, total=recipe.num_steps, desc="train")):
            generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + step)
            chosen = torch.randint(len(images), (recipe.batch_size,), generator=generator, device=device)
            loss = training_loss(forward, noise_scheduler, images[chosen], labels[chosen], recipe, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_schedule.step()
            ema.step(model.parameters())
            log_file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
            bar.set_postfix(loss=f"{loss.item():.4f}")
            late = time.monotonic() > deadline
            if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.num_steps or late:
                log_file.flush()
                state = {
                    "recipe": asdict(recipe),
                    "step": step + 1,
                    "seconds": time.monotonic() - started,
                    "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "lr_schedule": lr_schedule.state_dict(),
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            if late and step + 1 < recipe.num_steps:
                return None
    ema.copy_to(model.parameters())
    return model.cpu()


def train_classifier(
    dataset: str = "digits", seed: int = 0, epochs: int = 60, device: str = "cpu"
) -> tuple[Classifier, float]:
    """The feature extractor of ``FD-<dataset>``, and its accuracy on the held-out images."""
    torch.manual_seed(seed)
    images, labels = (x.to(device) for x in load_split(dataset, "train"))
    model, size = CLASSIFIERS[dataset]().to(device), 64 if dataset == "digits" else 256
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batches = -(-len(images) // size)
    lr_schedule = get_cosine_schedule_with_warmup(optimizer, batches, epochs * batches)
    for _ in tqdm(range(epochs), desc="classifier"):
        for chosen in torch.randperm(len(images)).split(size):
            seen = images[chosen]
            if dataset == "cifar10":
                seen = _moved(seen)
            loss = F.cross_entropy(model(seen + 0.1 * torch.randn_like(seen)), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
    model.eval()
    images, labels = load_split(dataset, "test")
    predicted, _ = metrics.classify(model.cpu(), images / 2 + 0.5)
    return model, (predicted == labels).float().mean().item()


def _moved(images: torch.Tensor) -> torch.Tensor:
    """Mirrored at random, and shifted by up to 4 pixels: the whole batch alike, which is enough over the epochs."""
    left, top = torch.randint(9, (2,)).tolist()
    height, width = images.shape[2:]
    moved = F.pad(images, (4, 4, 4, 4), mode="reflect")[:, :, top : top + height, left : left + width]
    mirrored = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(-1), moved)


def export(model: DiTTransformer2DModel, recipe: Recipe, work: Path, out: Path, device: str = "cpu") -> None:
    """Saves the pipeline the way diffusers loads DiT-XL/2, FP16 in small shards, and how it was trained."""
    # Guided sampling with clip_sample=True, DDIM's default, doesn't converge as steps are added.
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    names = {str(number): name for number, name in enumerate(CLASS_NAMES[recipe.dataset])}
    pipe = EmbeddedDiTPipeline(transformer=model.half(), scheduler=scheduler, id2label=names)
    pipe.save_pretrained(out, max_shard_size="4MB" if recipe.dataset == "digits" else "14MB")
    losses = [json.loads(line)["loss"] for line in (work / "loss.jsonl").read_text().splitlines()]
    state = torch.load(work / "checkpoint.pt", weights_only=True, map_location="cpu")
    cores = f"{os.cpu_count()} CPU cores, shared with other work"
    facts = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_seen": recipe.batch_size * recipe.num_steps,
        "hours": round(state["seconds"] / 3600, 2),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cores,
        "torch": torch.__version__,
        "loss_mean_of_20_steps": torch.tensor(losses)[: len(losses) // 20 * 20].view(-1, 20).mean(1).tolist(),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


ABOUT = {
    "digits": {
        "pictures": "8×8 handwritten digits",
        "data": "80 % of scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits, CC BY 4.0),\n"
        "  1,437 images; the other 20 % were not trained on. Weights: MIT, as the project.",
    },
    "cifar10": {
        "pictures": "32×32 photographs of ten kinds of things",
        "data": "CIFAR-10's 50,000 training images (Krizhevsky 2009), mirrored at random; its 10,000 test images\n"
        "  were not trained on. Weights: MIT, as the project.",
    },
}


def evaluate(folder: Path, name: str = "digits", num_samples: int = 500, device: str = "cpu") -> dict[str, float]:
    """Draws guided samples from the exported model, measures them, and writes grid and model card."""
    profile = get_profile(name, num_samples=num_samples, batch_size=50, device=device)
    drawn = sample(load_pipeline(profile), profile, seed=1, description="evaluate")
    classifier = load_classifier(name)
    predicted, features = metrics.classify(classifier, drawn.images)
    real = {split: load_split(name, split)[0] / 2 + 0.5 for split in ("train", "test")}
    real_features = {
        split: torch.cat([metrics.classify(classifier, part)[1] for part in images.split(1000)])
        for split, images in real.items()
    }
    distance = {split: metrics.frechet_distance(features, x) for split, x in real_features.items()}

    def nearest(images: torch.Tensor) -> float:
        return torch.cdist(images.flatten(1), real["train"].flatten(1)).min(1).values.median().item()

    results = {
        "samples": num_samples,
        "class_accuracy": (predicted == drawn.labels).double().mean().item(),
        f"FD-{name} to held-out": distance["test"],
        f"FD-{name} to train": distance["train"],
        f"FD-{name} of train to held-out": metrics.frechet_distance(real_features["train"], real_features["test"]),
        "median distance to nearest training image": nearest(drawn.images),
        "the same for held-out images": nearest(real["test"][:1000]),
    }
    (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    save_grid(drawn.images[:100], folder / "samples.png")
    facts = json.loads((folder / "training.json").read_text())
    recipe = facts["recipe"]
    card = f"""# {name}

Class-conditional Diffusion Transformer (diffusers `DiTTransformer2DModel`) on {ABOUT[name]["pictures"]}, made to be
looked into: {recipe["num_layers"]} blocks, {recipe["num_attention_heads"]} heads of {recipe["attention_head_dim"]},
{(recipe["sample_size"] // recipe["patch_size"]) ** 2} tokens, {facts["parameters"]:,} parameters, FP16.

![100 guided samples, one class a column](samples.png)

- **Data:** {ABOUT[name]["data"]}
- **Training:** `python -m dqar.train {name}`, {recipe["num_steps"]:,} steps of {recipe["batch_size"]} images, noise
  prediction, min-SNR weighting, label dropout {recipe["label_dropout"]}, EMA {recipe["ema_decay"]}, seed
  {recipe["seed"]}; {facts["hours"]} hours on {facts["hardware"]}, torch {facts["torch"]}. Loss and recipe:
  `training.json`.
- **Sampling:** {profile.num_inference_steps} steps of DPM-Solver++, guidance {profile.guidance_scale}, no clipping.
- **Quality** of {num_samples} samples (`evaluation.json`): {results["class_accuracy"]:.1%} are classified as asked by
  `{name}-classifier`; Fréchet distance in its features, FD-{name}, {distance["test"]:.2f} to held-out images
  (training images: {results[f"FD-{name} of train to held-out"]:.2f}).
- **Not memorised:** a sample's nearest training image is {results["median distance to nearest training image"]:.2f}
  away (median), a held-out image's {results["the same for held-out images"]:.2f}.
"""
    (folder / "README.md").write_text(card)
    return results


def save_grid(images: torch.Tensor, path: Path) -> None:
    """100 images ``[100, C, S, S]``, ten a row, enlarged to about 600 pixels."""
    padded = F.pad(images, (1, 1, 1, 1))
    channels, size = padded.shape[1], padded.shape[2]
    grid = padded.view(10, 10, channels, size, size).permute(0, 3, 1, 4, 2).reshape(10 * size, 10 * size, channels)
    times = max(1, 60 // size)
    grid = grid.repeat_interleave(times, 0).repeat_interleave(times, 1)
    plt.imsave(path, grid.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see ``--help``. Returns the exit code: 0, also when there are steps left, or 2."""
    parser = argparse.ArgumentParser(prog="python -m dqar.train", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[*RECIPES, *(f"{name}-classifier" for name in RECIPES)])
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many; the same command continues"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="checkpoints and loss log")
    options = parser.parse_args(arguments)
    name = options.model.removesuffix("-classifier")
    try:
        if options.model != name:
            epochs = 60 if name == "digits" else 30
            model, accuracy = train_classifier(name, options.seed, epochs, options.device)
            data = "scikit-learn digits, fixed 80/20 split" if name == "digits" else "CIFAR-10, its own split"
            model.save_pretrained(WEIGHTS / options.model, held_out_accuracy=accuracy, data=data)
            print(f"held-out accuracy {accuracy:.4f}")
            return 0
        recipe = dataclasses.replace(RECIPES[name], seed=options.seed)
        if options.steps is not None:
            recipe = dataclasses.replace(recipe, num_steps=options.steps)
        work = options.work / name
        model = train_transformer(recipe, work, device=options.device, minutes=options.minutes)
    except OSError as error:
        print(error)
        return 2
    if model is None:
        print(f"stopped after {options.minutes:g} minutes; the same command continues from {work / 'checkpoint.pt'}")
        return 0
    export(model, recipe, work, WEIGHTS / name, options.device)
    print(json.dumps(evaluate(WEIGHTS / name, name, device=options.device), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
