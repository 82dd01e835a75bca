"""The training recipe of the embedded models: ``python -m dqar.train digits``.

Trains a class-conditional diffusers ``DiTTransformer2DModel`` to predict the noise (Ho et al. 2020), with min-SNR
loss weighting (Hang et al. 2023), adaLN-Zero initialisation (Peebles & Xie 2023), label dropout for classifier-free
guidance and an exponential moving average of the weights, and the small classifier whose features the Fréchet
distance uses. Resumes from its last checkpoint, is seeded per step, logs its loss and writes a model card.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dqar import metrics
from dqar.classifier import DigitClassifier
from dqar.data import load_digits_split
from dqar.models import DIGIT_NAMES, WEIGHTS, EmbeddedDiTPipeline, get_profile, load_classifier, load_pipeline
from dqar.sampling import sample

NOISE_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
"""Linear betas, as DiT-XL/2 was trained with."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; changing a field makes a different model."""

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
    batch = len(images)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < recipe.label_dropout
    labels = torch.where(dropped, recipe.num_classes, labels)
    noisy = noise_scheduler.add_noise(images, noise, timesteps)
    predicted = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
    snr = compute_snr(noise_scheduler, timesteps)
    weight = snr.clamp(max=recipe.min_snr_gamma) / snr
    return (weight * (predicted - noise).pow(2).mean(dim=(1, 2, 3))).mean()


def train_transformer(recipe: Recipe, out: Path, checkpoint_every: int = 100) -> DiTTransformer2DModel:
    """Trains from the last checkpoint in ``out`` (or from nothing) and returns the EMA model, in float32.

    ``out/checkpoint.pt`` holds the state, ``out/loss.jsonl`` one line per step. Step ``i`` draws from a generator
    seeded by ``(seed, i)``, so an interrupted run continues as if it hadn't been.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits_split("train")
    model = build_transformer(recipe)
    ema = EMAModel(model.parameters(), decay=recipe.ema_decay, use_ema_warmup=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    lr_schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.num_steps)
    noise_scheduler = DDPMScheduler(**NOISE_SCHEDULE)
    checkpoint, log, first, seconds = out / "checkpoint.pt", out / "loss.jsonl", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} was made by another recipe, {state['recipe']}; remove it to start anew")
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        lr_schedule.load_state_dict(state["lr_schedule"])
        first, seconds = state["step"], state["seconds"]
    lines = log.read_text().splitlines()[:first] if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines))
    started = time.monotonic() - seconds
    with log.open("a") as log_file:
        for step in (bar := tqdm(range(first, recipe.num_steps), initial=first, total=recipe.num_steps, desc="train")):
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            chosen = torch.randint(len(images), (recipe.batch_size,), generator=generator)
            loss = training_loss(model, noise_scheduler, images[chosen], labels[chosen], recipe, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_schedule.step()
            ema.step(model.parameters())
            log_file.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
            bar.set_postfix(loss=f"{loss.item():.4f}")
            if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.num_steps:
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
    ema.copy_to(model.parameters())
    return model


def train_classifier(seed: int = 0, epochs: int = 60) -> tuple[DigitClassifier, float]:
    """The feature extractor of ``FD-digits``, and its accuracy on the held-out digits."""
    torch.manual_seed(seed)
    images, labels = load_digits_split("train")
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    batches = -(-len(images) // 64)
    lr_schedule = get_cosine_schedule_with_warmup(optimizer, batches, epochs * batches)
    for _ in tqdm(range(epochs), desc="classifier"):
        for chosen in torch.randperm(len(images)).split(64):
            noisy = images[chosen] + 0.1 * torch.randn_like(images[chosen])
            loss = F.cross_entropy(model(noisy), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
    model.eval()
    images, labels = load_digits_split("test")
    with torch.no_grad():
        return model, (model(images).argmax(1) == labels).float().mean().item()


def export(model: DiTTransformer2DModel, recipe: Recipe, work: Path, out: Path) -> None:
    """Saves the pipeline the way diffusers loads DiT-XL/2, FP16 in shards of at most 4 MB, and how it was trained."""
    # Guided sampling with clip_sample=True, DDIM's default, doesn't converge as steps are added.
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    pipe = EmbeddedDiTPipeline(transformer=model.half(), scheduler=scheduler, id2label=DIGIT_NAMES)
    pipe.save_pretrained(out, max_shard_size="4MB")
    losses = [json.loads(line)["loss"] for line in (work / "loss.jsonl").read_text().splitlines()]
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    facts = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_seen": recipe.batch_size * recipe.num_steps,
        "hours": round(state["seconds"] / 3600, 2),
        "hardware": f"{os.cpu_count()} CPU cores, shared with other work",
        "torch": torch.__version__,
        "loss_mean_of_20_steps": torch.tensor(losses)[: len(losses) // 20 * 20].view(-1, 20).mean(1).tolist(),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def evaluate(folder: Path, num_samples: int = 500) -> dict[str, float]:
    """Draws guided samples from the exported model, measures them, and writes grid and model card."""
    profile = get_profile("digits", num_samples=num_samples, batch_size=50)
    drawn = sample(load_pipeline(profile), profile, seed=1, description="evaluate")
    classifier = load_classifier()
    predicted, features = metrics.classify(classifier, drawn.images)
    real = {split: load_digits_split(split)[0] / 2 + 0.5 for split in ("train", "test")}
    real_features = {split: metrics.classify(classifier, images)[1] for split, images in real.items()}
    distance = {name: metrics.frechet_distance(features, x) for name, x in real_features.items()}

    def nearest(images: torch.Tensor) -> float:
        return torch.cdist(images.flatten(1), real["train"].flatten(1)).min(1).values.median().item()

    results = {
        "samples": num_samples,
        "class_accuracy": (predicted == drawn.labels).double().mean().item(),
        "FD-digits to held-out": distance["test"],
        "FD-digits to train": distance["train"],
        "FD-digits of train to held-out": metrics.frechet_distance(real_features["train"], real_features["test"]),
        "median distance to nearest training image": nearest(drawn.images),
        "the same for held-out digits": nearest(real["test"]),
    }
    (folder / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    save_grid(drawn.images[:100], folder / "samples.png")
    facts = json.loads((folder / "training.json").read_text())
    recipe = facts["recipe"]
    card = f"""# digits

Class-conditional Diffusion Transformer (diffusers `DiTTransformer2DModel`) on 8×8 handwritten digits, made to be looked
into: {recipe["num_layers"]} blocks, {recipe["num_attention_heads"]} heads of {recipe["attention_head_dim"]},
64 tokens, {facts["parameters"]:,} parameters, FP16.

![100 guided samples, one class a column](samples.png)

- **Data:** 80 % of scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits, CC BY 4.0), 1,437
  images; the other 20 % were not trained on. Weights: MIT, as the project.
- **Training:** `python -m dqar.train digits`, {recipe["num_steps"]:,} steps of {recipe["batch_size"]} images, noise
  prediction, min-SNR weighting, label dropout {recipe["label_dropout"]}, EMA {recipe["ema_decay"]}, seed
  {recipe["seed"]}; {facts["hours"]} hours on {facts["hardware"]}, torch {facts["torch"]}. Loss and recipe:
  `training.json`.
- **Sampling:** {profile.num_inference_steps} steps of DPM-Solver++, guidance {profile.guidance_scale}, no clipping.
- **Quality** of {num_samples} samples (`evaluation.json`): {results["class_accuracy"]:.1%} are classified as asked by
  `digits-classifier`; Fréchet distance in its features, FD-digits, {distance["test"]:.2f} to held-out digits
  (training digits: {results["FD-digits of train to held-out"]:.2f}).
- **Not memorised:** a sample's nearest training image is {results["median distance to nearest training image"]:.2f}
  away (median), a held-out digit's {results["the same for held-out digits"]:.2f}.
"""
    (folder / "README.md").write_text(card)
    return results


def save_grid(images: torch.Tensor, path: Path) -> None:
    """100 images ``[100, 1, 8, 8]``, ten a row, six times enlarged."""
    grid = F.pad(images, (1, 1, 1, 1)).view(10, 10, 10, 10).permute(0, 2, 1, 3).reshape(100, 100)
    plt.imsave(path, grid.repeat_interleave(6, 0).repeat_interleave(6, 1), cmap="gray_r", vmin=0, vmax=1)


def main() -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m dqar.train", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["digits", "digits-classifier"])
    parser.add_argument("--steps", type=int, default=Recipe.num_steps, help="optimizer steps (digits)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="checkpoints and loss log")
    args = parser.parse_args()
    if args.model == "digits-classifier":
        model, accuracy = train_classifier(args.seed)
        model.save_pretrained(WEIGHTS / "digits-classifier", accuracy=accuracy)
        print(f"held-out accuracy {accuracy:.4f}")
        return
    recipe = Recipe(num_steps=args.steps, seed=args.seed)
    model = train_transformer(recipe, args.work)
    export(model, recipe, args.work, WEIGHTS / "digits")
    print(json.dumps(evaluate(WEIGHTS / "digits"), indent=1))


if __name__ == "__main__":
    main()
