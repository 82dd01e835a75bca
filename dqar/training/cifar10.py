"""The CIFAR-10 model from data to checkpoints: autoencoder, latents, Diffusion Transformer, and looks in between."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from dqar import metrics
from dqar.classifier import Classifier
from dqar.data import load_split
from dqar.models import load_classifier
from dqar.training.card import save_grid, write_json
from dqar.training.latent_dit import MICROBATCH, LatentRecipe, draw_latents, held_out_loss, train_latent_dit
from dqar.training.stacked_dit import StackedDiT
from dqar.training.vae import VaeRecipe, encode, reconstruction_psnr, train_vae

CHECK_SAMPLES, CHECK_STEPS, CHECK_GUIDANCE = 320, 16, 2.0


def prepare_vae(work: Path, recipe: VaeRecipe, device: str = "cpu") -> AutoencoderKL:
    """The autoencoder in ``work/vae``, trained first if there is none; in float32, as rounded to FP16 on the disk.

    ``work/vae-quality.json`` says how well it does on the held-out images.
    """
    folder = work / "vae"
    if not (work / "vae-quality.json").exists():
        train_vae(recipe, load_split("cifar10", "train")[0], work, device=device).half().save_pretrained(folder)
        quality = reconstruction_psnr(_load_vae(folder), load_split("cifar10", "test")[0])
        write_json(work / "vae-quality.json", {"psnr": quality})
    return _load_vae(folder)


def _load_vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder, dtype=torch.float32).eval()


def prepare_latents(work: Path, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents ``[2, N, 4, 16, 16]`` float16 of the training images and their mirror images, and labels ``[N]``.

    Encoded once and kept in ``work/latents.safetensors``, which goes with ``work/vae``.
    """
    path = work / "latents.safetensors"
    if not path.exists():
        images, labels = load_split("cifar10", "train")
        latents = torch.stack([encode(vae, images).half(), encode(vae, images.flip(-1)).half()])
        save_file({"latents": latents, "labels": labels}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    kept = load_file(path)
    return kept["latents"], kept["labels"]


class Check:
    """A look at a model in training: held-out loss, a grid of samples and, with a classifier, FD and accuracy.

    320 samples in 16 steps: as long as some 5,000 images of training take. The Fréchet distance of so few is higher
    than that of many, so it compares checkpoints only.
    """

    def __init__(self, recipe: LatentRecipe, vae: AutoencoderKL, out: Path, classifier: Classifier | None):
        self._recipe, self._vae, self._out, self._classifier = recipe, vae, out, classifier
        images, labels = load_split("cifar10", "test")
        chosen = torch.arange(0, len(images), max(1, len(images) // 1024))[:1024]
        chosen = chosen[: len(chosen) // MICROBATCH * MICROBATCH]
        self._latents, self._labels = encode(vae, images[chosen]), labels[chosen]
        if classifier is not None:
            parts = (images / 2 + 0.5).split(500)
            self._features = torch.cat([metrics.classify(classifier, part)[1] for part in parts])

    def __call__(self, model: StackedDiT, images: int) -> dict[str, float]:
        """What is logged after ``images`` images; the grid goes to ``samples-<images>.png``."""
        found = {"held_out_loss": held_out_loss(model, self._recipe, self._latents, self._labels)}
        labels = torch.arange(CHECK_SAMPLES) % self._recipe.num_classes
        latents = draw_latents(model, labels, CHECK_GUIDANCE, CHECK_STEPS, seed=1)
        with torch.no_grad():
            drawn = torch.cat([self._vae.decode(part).sample for part in latents.split(128)])
        drawn = (drawn / 2 + 0.5).clamp(0, 1)
        save_grid(drawn[:100], self._out / f"samples-{images:08d}.png")
        if self._classifier is not None:
            predicted, features = metrics.classify(self._classifier, drawn)
            found["FD-cifar10"] = metrics.frechet_distance(features, self._features)
            found["class_accuracy"] = (predicted == labels).double().mean().item()
        return {name: round(value, 5) for name, value in found.items()}


def train(
    recipe: LatentRecipe,
    work: Path,
    num_images: int,
    device: str = "cpu",
    *,
    workers: int = 1,
    minutes: float = math.inf,
) -> int:
    """Trains everything but the classifier in ``work``, going on from what is there.

    Returns the count of images that the Diffusion Transformer has seen by then, all runs together.
    """
    vae = prepare_vae(work, VaeRecipe(), device)
    latents, labels = prepare_latents(work, vae)
    if device == "cpu":
        torch.set_num_threads(1)
    classifier = None
    if (work / "weights/cifar10-classifier").exists():
        classifier = load_classifier("cifar10", work / "weights")
    train_latent_dit(
        recipe,
        latents,
        labels,
        work,
        num_images=num_images,
        device=device,
        workers=workers if device == "cpu" else 1,
        minutes=minutes,
        check=Check(recipe, vae, work, classifier),
    )
    return torch.load(work / "checkpoint.pt", weights_only=True)["step"] * recipe.batch_size


def export(recipe: LatentRecipe, work: Path, weights: Path, device: str) -> None:
    raise NotImplementedError
