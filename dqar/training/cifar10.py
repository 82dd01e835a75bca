"""The CIFAR-10 model from data to checkpoints: autoencoder, latents, Diffusion Transformer, and looks in between."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dqar.files import write_json
from dqar.measure import metrics
from dqar.measure.quality import classify_held_out
from dqar.measure.sampling import sample
from dqar.models.classifier import load_classifier
from dqar.models.data import load_split
from dqar.models.pipelines import load_pipeline
from dqar.models.profiles import Profile, get_profile
from dqar.training.card import (
    convergence,
    pipeline_parts,
    quality,
    quality_items,
    save_grid,
    shape_words,
    training_facts,
    wrapped,
    write_card,
)
from dqar.training.checkpoints import check_recipe, load_checkpoint, save_checkpoint
from dqar.training.latent_dit import MICROBATCH, LatentRecipe, draw_latents, held_out_loss, train_latent_dit
from dqar.training.stacked_dit import StackedDiT
from dqar.training.vae import VaeRecipe, encode, reconstruction_psnr, train_vae

CHECK_SAMPLES, CHECK_STEPS, CHECK_GUIDANCE = 320, 16, 2.0
GUIDANCE_SCALES = (1.5, 2.0, 3.0, 4.0)
"""What an exported model is tried at."""
GRID_GUIDANCE = 3.0
"""Of the grid: at this scale of those, FD-cifar10 is least, and people recognise what they asked for."""


def prepare_vae(work: Path, recipe: VaeRecipe, device: str = "cpu") -> AutoencoderKL:
    """The autoencoder in ``work/vae``, trained first if there is none; in float32, as rounded to FP16 on the disk.

    ``work/vae-quality.json`` says how well it does on the held-out images.
    """
    folder = work / "vae"
    if not (work / "vae-quality.json").exists():
        train_vae(recipe, load_split("cifar10", "train")[0], work, device=device).half().save_pretrained(folder)
        quality = reconstruction_psnr(_load_vae(folder), load_split("cifar10", "test")[0])
        write_json(work / "vae-quality.json", {"psnr": quality}, indent=1)
    return _load_vae(folder)


def _load_vae(folder: Path) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_pretrained(folder, dtype=torch.float32).eval()
    except (SafetensorError, OSError, ValueError) as error:
        raise OSError(f"the autoencoder in {folder} can't be read ({error}): remove it to train another") from error


def prepare_latents(work: Path, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents ``[2, N, 4, 16, 16]`` float16 of the training images and their mirror images, and labels ``[N]``.

    Encoded once and kept in ``work/latents.safetensors``, which goes with ``work/vae``.

    Raises:
        OSError: that file can't be read.
    """
    path = work / "latents.safetensors"
    if not path.exists():
        images, labels = load_split("cifar10", "train")
        latents = torch.stack([encode(vae, images).half(), encode(vae, images.flip(-1)).half()]).contiguous()
        save_file({"latents": latents, "labels": labels}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    try:
        kept = load_file(path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be read ({error}): remove it to encode anew") from error
    return kept["latents"], kept["labels"]


class Check:
    """A look at a model in training: held-out loss, a grid of samples and, once there is a classifier, FD and accuracy.

    320 samples in 16 steps: as long as some 5,000 images of training take. The Fréchet distance of so few is higher
    than that of many, so it compares checkpoints only.
    """

    def __init__(self, recipe: LatentRecipe, vae: AutoencoderKL, work: Path):
        self._recipe, self._vae, self._work = recipe, vae, work
        images, labels = load_split("cifar10", "test")
        chosen = torch.arange(0, len(images), max(1, len(images) // 1024))[:1024]
        chosen = chosen[: len(chosen) // MICROBATCH * MICROBATCH]
        self._latents, self._labels = encode(vae, images[chosen]), labels[chosen]

    def __call__(self, model: StackedDiT, images: int) -> dict[str, float]:
        """What is logged after ``images`` images; the grid goes to ``samples-<images>.png``."""
        measured = {"held_out_loss": held_out_loss(model, self._recipe, self._latents, self._labels)}
        labels = torch.arange(CHECK_SAMPLES) % self._recipe.num_classes
        drawn = _decode(self._vae, draw_latents(model, labels, CHECK_GUIDANCE, CHECK_STEPS, seed=1))
        save_grid(drawn[:100], self._work / f"samples-{images:08d}.png")
        if (self._work / "weights/cifar10-classifier/card.json").exists():
            classifier = load_classifier("cifar10", self._work / "weights")
            predicted, features = metrics.classify(classifier, drawn)
            measured["FD-cifar10"] = metrics.frechet_distance(features, classify_held_out(classifier, "cifar10")[1])
            measured["class_accuracy"] = (predicted == labels).double().mean().item()
        return {name: round(value, 5) for name, value in measured.items()}


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
    train_latent_dit(
        recipe,
        latents,
        labels,
        work,
        num_images=num_images,
        device=device,
        workers=workers if device == "cpu" else 1,
        minutes=minutes,
        check=Check(recipe, vae, work),
    )
    return torch.load(work / "checkpoint.pt", weights_only=True)["step"] * recipe.batch_size


def take_up(recipe: LatentRecipe, weights: Path, work: Path) -> None:
    """Begins ``work`` with the model that ``export`` wrote to ``weights``, unless there is a checkpoint already.

    Training goes on from the averaged weights in FP16 and without the optimizers' running means, which aren't shipped.

    Raises:
        OSError: there is no exported model, or it can't be read.
        ValueError: it was made by another recipe.
    """
    folder = weights / "cifar10"
    if (work / "checkpoint.pt").exists():
        return
    try:
        facts = json.loads((folder / "training.json").read_text())
        stock = DiTTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise OSError(f"{folder} holds no exported model that training can go on from ({error})") from error
    check_recipe(facts["recipe"], asdict(recipe), folder)
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "vae", work / "vae", dirs_exist_ok=True)
    shutil.copytree(weights / "cifar10-classifier", work / "weights/cifar10-classifier", dirs_exist_ok=True)
    write_json(work / "vae-quality.json", {"psnr": facts["vae"]["psnr"]}, indent=1)
    model, step = recipe.build(), facts["images_seen"] // recipe.batch_size
    model.load_stock(stock)
    losses = [facts["loss"][min(i // facts["steps_a_loss"], len(facts["loss"]) - 1)] for i in range(step)]
    for name, lines in (("checks", facts["checks"]), ("loss", [{"step": i, "loss": x} for i, x in enumerate(losses)])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "seconds": 3600 * facts["hours"],
        "model": model.state_dict(),
        "average": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in recipe.optimizers(model)],
    }
    save_checkpoint(work / "checkpoint.pt", state)


def export(recipe: LatentRecipe, work: Path, weights: Path, device: str = "cpu", num_samples: int = 1000) -> None:
    """Writes the averaged model of the last checkpoint to ``weights/cifar10`` as a ``DiTPipeline`` with a model card.

    The classifier goes along. Takes half an hour on a CPU: what is drawn from it is measured.

    Raises:
        OSError: no checkpoint in ``work``, or no classifier.
        ValueError: the checkpoint is unreadable, or another recipe's.
    """
    state = load_checkpoint(work / "checkpoint.pt", asdict(recipe))
    if state is None:
        raise OSError(f"there is no checkpoint in {work}: `dqar train cifar10` makes one")
    classifier_folder = weights / "cifar10-classifier"
    load_classifier("cifar10", work / "weights")
    if weights != work / "weights":
        shutil.copytree(work / "weights/cifar10-classifier", classifier_folder, dirs_exist_ok=True)
    model = recipe.build(compiled=True)
    model.load_state_dict(state["average"])
    folder = weights / "cifar10"
    parts = {"transformer": model.to_stock().half(), "vae": _load_vae(work / "vae").half()}
    parameters = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    pipe = DiTPipeline(**parts, **pipeline_parts("cifar10"))
    pipe.register_to_config(id2label=pipeline_parts("cifar10")["id2label"])  # diffusers forgets the names otherwise
    pipe.save_pretrained(folder, max_shard_size="14MB")
    losses = [json.loads(line)["loss"] for line in (work / "loss.jsonl").read_text().splitlines()][: state["step"]]
    facts = training_facts(
        asdict(recipe),
        parameters["transformer"],
        recipe.batch_size * state["step"],
        state["seconds"],
        losses,
        device,
    )
    checks = (work / "checks.jsonl").read_text().splitlines() if (work / "checks.jsonl").exists() else []
    vae = {"recipe": asdict(VaeRecipe()), "parameters": parameters["vae"]}
    vae |= json.loads((work / "vae-quality.json").read_text())
    facts |= {"checks": [json.loads(line) for line in checks], "vae": vae}
    write_json(folder / "training.json", facts, indent=1)
    evaluate(model.to(device), weights, get_profile("cifar10", device=device, batch_size=50), num_samples)


def evaluate(model: StackedDiT, weights: Path, profile: Profile, num_samples: int) -> dict:
    """Measures what the exported pipeline draws; writes ``evaluation.json``, curves, grid and model card.

    ``model`` is the same one in the form that is fast: it tries the guidance scales, on fewer samples and steps.
    """
    folder, classifier = weights / "cifar10", load_classifier("cifar10", weights)
    pipe = load_pipeline(profile, weights)
    real_features = classify_held_out(classifier, "cifar10")[1]
    labels = torch.arange(min(512, num_samples) // MICROBATCH * MICROBATCH) % model.num_classes
    scales = {}
    for scale in GUIDANCE_SCALES:
        latents = draw_latents(model, labels, scale, 20, seed=2)
        predicted, features = metrics.classify(classifier, _decode(pipe.vae, latents.to(profile.device)).cpu())
        scales[str(scale)] = {
            "FD-cifar10": metrics.frechet_distance(features, real_features),
            "class_accuracy": (predicted == labels).double().mean().item(),
        }
    drawn = sample(pipe, profile, seed=1, num_samples=num_samples)
    results = {
        **quality(drawn.images, drawn.labels, "cifar10", classifier),
        "guidance scales": {"samples": len(latents), "steps": 20, **scales},
        "PSNR to five times the steps": convergence(pipe, profile),
    }
    write_json(folder / "evaluation.json", results, indent=1)
    guided = dataclasses.replace(profile, guidance_scale=GRID_GUIDANCE)
    save_grid(sample(pipe, guided, seed=1, num_samples=min(100, num_samples)).images, folder / "samples.png")
    facts = json.loads((folder / "training.json").read_text())
    save_curves(facts, folder / "training.png")
    card = json.loads((weights / "cifar10-classifier/card.json").read_text())
    _write_card(folder, facts, results, card["held_out_accuracy"], profile)
    return results


@torch.no_grad()
def _decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images ``[N, 3, 32, 32]`` in [0, 1], as ``DiTPipeline`` decodes."""
    decoded = [vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(100)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def save_curves(facts: dict, path: Path) -> None:
    """Loss and FD-cifar10 against the images seen, from ``training.json``."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    images = torch.arange(1, len(facts["loss"]) + 1) * facts["steps_a_loss"] * facts["recipe"]["batch_size"]
    left.plot(images / 1e6, facts["loss"], label="training, weighted")
    checks = facts["checks"]
    seen = [check["images"] / 1e6 for check in checks]
    left.plot(seen, [check["held_out_loss"] for check in checks], ".-", label="held-out, averaged weights")
    left.set(xlabel="million images", ylabel="loss", ylim=(None, sorted(facts["loss"])[len(facts["loss"]) * 9 // 10]))
    left.legend()
    right.plot(seen, [check.get("FD-cifar10", math.nan) for check in checks], ".-")
    right.set(xlabel="million images", ylabel=f"FD-cifar10 of {CHECK_SAMPLES} samples")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _write_card(folder: Path, facts: dict, results: dict, accuracy: float, profile: Profile) -> None:
    recipe, vae, scales = facts["recipe"], facts["vae"], results["guidance scales"]
    rows = "\n".join(
        f"| {scale} | {measured['FD-cifar10']:.2f} | {measured['class_accuracy']:.1%} |"
        for scale, measured in scales.items()
        if isinstance(measured, dict)
    )
    psnr = results["PSNR to five times the steps"]
    items = wrapped(
        "- **Data:** CIFAR-10's 50,000 training images (Krizhevsky 2009, collected for research; no licence stated), "
        "mirrored at random, from JPEG; its 10,000 test images were not trained on. Weights: MIT, as the project.",
        f"- **Autoencoder:** 32×32×3 to 16×16×4, {vae['parameters']:,} parameters, {vae['psnr']:.1f} dB on held-out "
        f"images; squared error and {vae['recipe']['kl_weight']:g} KL, {vae['recipe']['num_steps']:,} steps of "
        f"{vae['recipe']['batch_size']} images. Every channel of its latents has mean 0 and variance 1.",
        f"- **Training:** `dqar train cifar10`, {facts['images_seen']:,} images in steps of "
        f"{recipe['batch_size']}, noise prediction, min-SNR weighting, label dropout {recipe['label_dropout']}, "
        f"weights averaged over the last ninth, seed {recipe['seed']}; {facts['hours']} hours on {facts['hardware']}, "
        f"torch {facts['torch']}. Loss and recipe: `training.json`.",
        f"- **Sampling:** {profile.num_inference_steps} steps of DPM-Solver++, guidance {profile.guidance_scale:g}, no "
        f"clipping. Five times the steps draw images {psnr['dpm-solver++']:.1f} dB away from these; DDIM's are "
        f"{psnr['ddim']:.1f} dB away from its own.",
        *quality_items("cifar10", results),
        f"- **Classifier:** `cifar10-classifier`, {accuracy:.1%} of the held-out images right.",
        f"- **Guidance**, on {scales['samples']} samples of {scales['steps']} steps (of fewer samples the distance is "
        "higher):",
    )
    about = (
        "Class-conditional latent Diffusion Transformer (diffusers `DiTPipeline`) on 32×32 photographs of ten kinds of "
        f"things, made to be looked into: {shape_words(facts, recipe)}."
    )
    table = f"| guidance | FD-cifar10 | classified as asked |\n| --- | --- | --- |\n{rows}"
    curves = "![Loss and Fréchet distance against images seen](training.png)"
    shown = f"100 samples at guidance {GRID_GUIDANCE:g}, one class a column"
    write_card(folder, about, f"{items}\n\n{table}\n\n{curves}", shown)
