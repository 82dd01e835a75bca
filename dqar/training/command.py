"""The command line of the trainers: ``python -m dqar train digits`` or ``cifar10``, and the classifiers of both."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path

from dqar.models.profiles import get_profile
from dqar.training import cifar10
from dqar.training.card import evaluate_digits
from dqar.training.classifier import CLASSIFIER_RECIPES, export_classifier, train_classifier
from dqar.training.digits import Recipe, export_digits, train_transformer
from dqar.training.latent_dit import LatentRecipe


def main(arguments: list[str] | None = None) -> int:
    """The command line; see ``--help``. Returns the exit code: 0, or 2 for a file that is missing or unreadable."""
    parser = argparse.ArgumentParser(prog="dqar train", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("digits", "cifar10", "digits-classifier", "cifar10-classifier"))
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="checkpoints and logs, a folder a model")
    parser.add_argument("--out", type=Path, help="folder of weights to write to, such as dqar/weights (default: work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=Recipe.num_steps, help="digits: optimizer steps")
    cifar = parser.add_argument_group("cifar10")
    cifar.add_argument("--images", type=int, default=4_000_000, help="trains until it has seen so many (4,000,000)")
    cifar.add_argument("--minutes", type=float, default=math.inf, help="stops after so many; the same command goes on")
    cifar.add_argument("--heads", type=int, default=4, help="of 32 numbers each: 6 are a model 192 wide")
    cifar.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread, on a CPU")
    cifar.add_argument("--export", action="store_true", help="exports the last checkpoint, and trains nothing")
    options = parser.parse_args(arguments)
    name = options.model.removesuffix("-classifier")
    work = options.work / name
    weights = options.out or work / "weights"
    try:
        if options.model != name:
            recipe = dataclasses.replace(CLASSIFIER_RECIPES[name], seed=options.seed)
            export_classifier(*train_classifier(recipe, work, device=options.device), name, weights)
        elif name == "digits":
            recipe = Recipe(num_steps=options.steps, seed=options.seed)
            export_digits(train_transformer(recipe, work), recipe, work, weights)
            print(json.dumps(evaluate_digits(weights, get_profile("digits", batch_size=50)), indent=1))
        else:
            recipe = LatentRecipe(num_attention_heads=options.heads, seed=options.seed)
            if not options.export:
                images = cifar10.train(
                    recipe, work, options.images, options.device, workers=options.workers, minutes=options.minutes
                )
                if images < options.images:
                    print(f"stopped at {images:,} images; the same command goes on, with --export it writes weights")
                    return 0
            cifar10.export(recipe, work, weights, options.device)
    except (OSError, ValueError) as error:
        print(error)
        return 2
    print(f"written to {weights / options.model}")
    return 0
