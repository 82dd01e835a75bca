"""The training of the classifiers behind ``FD-<model>`` and class accuracy."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.nn import functional as F

from dqar.measure.metrics import Gaussian
from dqar.measure.quality import Reference, classify_held_out
from dqar.models.classifier import CLASSIFIERS, Classifier
from dqar.models.data import Dataset, load_split
from dqar.training.checkpoints import load_checkpoint, save_checkpoint
from dqar.training.muon import StackedMuon


@dataclass(frozen=True)
class ClassifierRecipe:
    """Everything that decides a classifier's training."""

    dataset: Dataset
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    noise: float
    """Standard deviation of what is added to the images, which are in [-1, 1]."""
    moved: bool
    """Mirrors images, and shifts them by up to four pixels."""
    muon_learning_rate: float | None = None
    """Of the convolutions, which Muon then trains; ``None``: AdamW trains everything."""
    seed: int = 0

    def optimizers(self, model: Classifier) -> list[torch.optim.Optimizer]:
        """What trains the model."""
        parameters = list(model.parameters())
        adam = partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.muon_learning_rate is None:
            return [adam(parameters)]
        kernels = [x for x in parameters if x.ndim == 4]
        return [adam([x for x in parameters if x.ndim != 4]), StackedMuon(kernels, self.muon_learning_rate)]


CLASSIFIER_RECIPES = {
    "digits": ClassifierRecipe("digits", 60, 64, 2e-3, 1e-2, noise=0.1, moved=False),
    "cifar10": ClassifierRecipe("cifar10", 24, 128, 4e-3, 5e-2, noise=0.0, moved=True, muon_learning_rate=0.03),
}


def train_classifier(recipe: ClassifierRecipe, out: Path, *, device: str = "cpu") -> Classifier:
    """The classifier, in eval mode on the CPU.

    Goes on from the checkpoint in ``out``, which is written at the end of an epoch if the last is five
    minutes old. Convolutions compute in BF16.

    Raises:
        ValueError: the checkpoint is unreadable, or another recipe's.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "classifier-checkpoint.pt"
    torch.manual_seed(recipe.seed)
    images, labels = load_split(recipe.dataset, "train")
    model = CLASSIFIERS[recipe.dataset]().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = recipe.optimizers(model)
    batches = -(-len(images) // recipe.batch_size)
    rates = [get_cosine_schedule_with_warmup(each, batches, recipe.epochs * batches) for each in optimizers]
    first = 0
    if (state := load_checkpoint(checkpoint, asdict(recipe), device)) is not None:
        model.load_state_dict(state["model"])
        for each, kept in zip([*optimizers, *rates], [*state["optimizers"], *state["rates"]], strict=True):
            each.load_state_dict(kept)
        first = state["epoch"]
    saved = time.monotonic()
    for epoch in range(first, recipe.epochs):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(recipe.batch_size):
            seen = _moved(images[chosen], generator) if recipe.moved else images[chosen]
            seen = seen + recipe.noise * torch.randn(seen.shape, generator=generator)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                logits = model(seen.to(device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.05)
            model.zero_grad()
            loss.backward()
            for each in (*optimizers, *rates):
                each.step()
            total += loss.item() * len(chosen)
        if recipe.dataset != "digits":
            print(f"classifier: epoch {epoch + 1} of {recipe.epochs}, loss {total / len(images):.4f}", flush=True)
        if time.monotonic() - saved > 300 or epoch + 1 == recipe.epochs:
            state = {"recipe": asdict(recipe), "epoch": epoch + 1, "model": model.state_dict()}
            state |= {"optimizers": [x.state_dict() for x in optimizers], "rates": [x.state_dict() for x in rates]}
            save_checkpoint(checkpoint, state)
            saved = time.monotonic()
    return model.eval().to("cpu", memory_format=torch.contiguous_format)


def export_classifier(model: Classifier, name: Dataset, weights: Path) -> None:
    """Writes the classifier and its card to ``weights/<name>-classifier``; of CIFAR-10, which isn't in a package, also
    the held-out images' features, as the mean and covariance that Fréchet distances are to."""
    folder = weights / f"{name}-classifier"
    data = {"digits": "scikit-learn digits, fixed 80/20 split", "cifar10": "CIFAR-10, its own split"}[name]
    predicted, features = classify_held_out(model, name)
    accuracy = (predicted == load_split(name, "test")[1]).double().mean().item()
    model.save_pretrained(folder, held_out_accuracy=accuracy, data=data)
    if name == "cifar10":
        Reference(Gaussian.of(features)).save(folder / "reference.npz")
    print(f"held-out accuracy {accuracy:.4f}")


def _moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each of ``[B, C, H, W]`` mirrored at random, and shifted by up to 4 pixels."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    left, top = torch.randint(9, (2, batch), generator=generator)
    columns = left[:, None] + torch.arange(width)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)[:, None, :]
    rows = (top[:, None] + torch.arange(height))[:, :, None]
    return padded.permute(0, 2, 3, 1)[torch.arange(batch)[:, None, None], rows, columns].permute(0, 3, 1, 2)
