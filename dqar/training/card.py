"""What a trained model is shipped with: the pipeline's folder, measurements, a grid of samples and a model card."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch.nn import functional as F

from dqar.files import write_json
from dqar.measure import metrics
from dqar.measure.sampling import sample
from dqar.models.classifier import Classifier, load_classifier
from dqar.models.data import load_split
from dqar.models.pipelines import load_pipeline, make_scheduler
from dqar.models.profiles import CLASS_NAMES, Profile
from dqar.training.latent_dit import NOISE_SCHEDULE


def pipeline_parts(name: str) -> dict:
    """Scheduler and class names of an embedded model's pipeline."""
    # Guided sampling with clip_sample=True, DDIM's default, doesn't converge as steps are added.
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    return {"scheduler": scheduler, "id2label": {str(i): label for i, label in enumerate(CLASS_NAMES[name])}}


def training_facts(recipe: dict, parameters: int, images_seen: int, seconds: float, losses: list, device: str) -> dict:
    """What ``training.json`` says of a run, its loss as the mean of each of about a hundred stretches."""
    span = max(1, len(losses) // 100)
    means = torch.tensor(losses)[: len(losses) // span * span].view(-1, span).mean(1)
    return {
        "recipe": recipe,
        "parameters": parameters,
        "images_seen": images_seen,
        "hours": round(seconds / 3600, 2),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} shared CPU cores",
        "torch": torch.__version__,
        "steps_a_loss": span,
        "loss": [round(x, 5) for x in means.tolist()],
    }


def quality(
    images: torch.Tensor, labels: torch.Tensor, name: Literal["digits", "cifar10"], classifier: Classifier
) -> dict[str, float]:
    """Class accuracy, Fréchet distances and, against memorising, the distances to the nearest training images.

    Args:
        images, labels: ``[N, C, H, W]`` in [0, 1], and the classes ``[N]`` that were asked for.
        name: of the data set.
        classifier: of the same.
    """
    predicted, features = metrics.classify(classifier, images)
    real = {split: load_split(name, split)[0] / 2 + 0.5 for split in ("train", "test")}
    real_features = {split: metrics.classify(classifier, x)[1] for split, x in real.items()}
    distance = {split: metrics.frechet_distance(features, x) for split, x in real_features.items()}

    def nearest(x: torch.Tensor) -> float:
        parts = (torch.cdist(part.flatten(1), real["train"].flatten(1)).min(1).values for part in x.split(200))
        return torch.cat(list(parts)).median().item()

    return {
        "samples": len(images),
        "class_accuracy": (predicted == labels).double().mean().item(),
        f"FD-{name} to held-out": distance["test"],
        f"FD-{name} to train": distance["train"],
        f"FD-{name} of train to held-out": metrics.frechet_distance(real_features["train"], real_features["test"]),
        "median distance to nearest training image": nearest(images),
        "the same for held-out images": nearest(real["test"][:1000]),
    }


def convergence(pipe: DiffusionPipeline, profile: Profile) -> dict[str, float]:
    """PSNR in dB between images of the profile's steps and of five times as many, under DPM-Solver++ and DDIM."""
    decibels, scheduler, steps = {}, pipe.scheduler, profile.num_inference_steps
    for name in ("dpm-solver++", "ddim"):
        pipe.scheduler = make_scheduler(name, scheduler)
        coarse, fine = (
            sample(pipe, profile, 0, num_samples=20, num_inference_steps=count).images for count in (steps, 5 * steps)
        )
        decibels[name] = metrics.mean_psnr(coarse, fine)
    pipe.scheduler = scheduler
    return decibels


def own_classifier(name: str, weights: Path) -> Classifier:
    """The classifier beside the weights if there is one, else the package's own."""
    return load_classifier(name, weights if (weights / f"{name}-classifier").exists() else None)


def evaluate_digits(weights: Path, profile: Profile, num_samples: int = 500) -> dict[str, float]:
    """Measures guided samples of the exported digits model; writes ``evaluation.json``, grid and model card."""
    folder = weights / "digits"
    drawn = sample(load_pipeline(profile, weights), profile, seed=1, num_samples=num_samples)
    results = quality(drawn.images, drawn.labels, "digits", own_classifier("digits", weights))
    write_json(folder / "evaluation.json", results, indent=1)
    save_grid(drawn.images[:100], folder / "samples.png")
    facts = json.loads((folder / "training.json").read_text())
    recipe = facts["recipe"]
    about = (
        "Class-conditional Diffusion Transformer (diffusers `DiTTransformer2DModel`) on 8×8 handwritten digits, made "
    )
    items = wrapped(
        "- **Data:** 80 % of scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits, CC BY 4.0), "
        "1,437 images; the other 20 % were not trained on. Weights: MIT, as the project.",
        f"- **Training:** `dqar train digits`, {recipe['num_steps']:,} steps of {recipe['batch_size']} "
        f"images, noise prediction, min-SNR weighting, label dropout {recipe['label_dropout']}, EMA "
        f"{recipe['ema_decay']}, seed {recipe['seed']}; {facts['hours']} hours on {facts['hardware']}, torch "
        f"{facts['torch']}. Loss and recipe: `training.json`.",
        f"- **Sampling:** {profile.num_inference_steps} steps of DPM-Solver++, guidance {profile.guidance_scale:g}, no "
        "clipping.",
        *quality_items("digits", results),
    )
    write_card(folder, about + f"to be looked into: {shape_words(facts, recipe)}.", items)
    return results


def write_card(folder: Path, about: str, items: str, shown: str = "100 guided samples, one class a column") -> None:
    """``README.md``: a sentence, the grid of samples, what it shows, and a list."""
    text = f"# {folder.name}\n\n{textwrap.fill(about, 120, break_on_hyphens=False)}\n\n"
    (folder / "README.md").write_text(f"{text}![{shown}](samples.png)\n\n{items}\n")


def shape_words(facts: dict, recipe: dict) -> str:
    """Blocks, heads, tokens and parameters, for the first sentence of a card."""
    tokens = (recipe["sample_size"] // recipe["patch_size"]) ** 2
    heads, size = recipe["num_attention_heads"], recipe["attention_head_dim"]
    blocks, parameters = recipe["num_layers"], facts["parameters"]
    return f"{blocks} blocks, {heads} heads of {size}, {tokens} tokens, {parameters:,} parameters, FP16"


def quality_items(name: str, results: dict) -> tuple[str, str]:
    """What ``quality`` found, as two items of a card's list."""
    return (
        f"- **Quality** of {results['samples']:,} samples (`evaluation.json`): {results['class_accuracy']:.1%} are "
        f"classified as asked by `{name}-classifier`; Fréchet distance in its features, FD-{name}, "
        f"{results[f'FD-{name} to held-out']:.2f} to held-out images (training images: "
        f"{results[f'FD-{name} of train to held-out']:.2f}).",
        f"- **Not memorised:** a sample's nearest training image is "
        f"{results['median distance to nearest training image']:.2f} away (median), a held-out image's "
        f"{results['the same for held-out images']:.2f}.",
    )


def wrapped(*items: str) -> str:
    """Lines of 120 characters at most."""
    return "\n".join(
        textwrap.fill(item, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for item in items
    )


def save_grid(images: torch.Tensor, path: Path, a_row: int = 10) -> None:
    """Images ``[N, C, S, S]``, so many ``a_row`` that all rows are full, enlarged to about 60 pixels each."""
    padded = F.pad(images, (1, 1, 1, 1))
    channels, size = padded.shape[1], padded.shape[2]
    grid = padded.view(-1, a_row, channels, size, size).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(-1, a_row * size, channels)
    times = max(1, 60 // size)
    grid = grid.repeat_interleave(times, 0).repeat_interleave(times, 1)
    plt.imsave(path, grid.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
