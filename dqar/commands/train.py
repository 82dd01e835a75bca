"""``dqar train``: trains an embedded model, or the classifier that scores it; an interrupted training goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

from dqar.commands.parser import Parser
from dqar.models.profiles import get_profile
from dqar.training import cifar10
from dqar.training.card import evaluate_digits
from dqar.training.classifier import CLASSIFIER_RECIPES, export_classifier, train_classifier
from dqar.training.digits import Recipe, export_digits, train_transformer
from dqar.training.latent_dit import LatentRecipe
from dqar.training.moving_digits import VideoRecipe, evaluate_video, export_video, train_video


def run(arguments: list[str]) -> int:
    """Trains, and writes weights, measurements and card into ``--out``, or beside the checkpoints in ``--work``.

    Raises:
        ValueError: an argument isn't accepted, or the checkpoint is another recipe's.
        OSError: a data set or checkpoint is missing or can't be read, or nothing can be written.
    """
    parser = Parser("train", "Trains the embedded models, and the classifiers of digits and cifar10.")
    models = ("digits", "moving-digits", "cifar10", "digits-classifier", "cifar10-classifier")
    parser.add_argument("model", choices=models)
    parser.add_argument("--work", type=Path, default=Path("runs/train"), help="checkpoints (default: runs/train)")
    parser.add_argument("--out", type=Path, help="folder of weights, such as dqar/weights (default: weights in --work)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    parser.add_argument("--steps", type=int, help=f"digits: {Recipe.num_steps}, moving-digits: {VideoRecipe.num_steps}")
    cifar = parser.add_argument_group("cifar10")
    cifar.add_argument("--images", type=int, default=4_000_000, help="images to train on in all (default: %(default)s)")
    cifar.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    cifar.add_argument("--heads", type=int, default=4, help="of 32 channels each (default: 4)")
    cifar.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each, on a CPU")
    cifar.add_argument("--start", type=Path, metavar="WEIGHTS", help="go on from an exported model, as dqar/weights")
    cifar.add_argument("--export", action="store_true", help="export the last checkpoint, and train nothing")
    options = parser.parse_args(arguments)
    name = options.model.removesuffix("-classifier")
    work = options.work / name
    weights = options.out or work / "weights"
    if options.model != name:
        classifier = dataclasses.replace(CLASSIFIER_RECIPES[name], seed=options.seed)
        export_classifier(train_classifier(classifier, work, device=options.device), classifier.dataset, weights)
    elif name == "digits":
        recipe = Recipe(num_steps=options.steps or Recipe.num_steps, seed=options.seed)
        export_digits(train_transformer(recipe, work), recipe, work, weights)
        print(json.dumps(evaluate_digits(weights, get_profile("digits", batch_size=50)), indent=1))
    elif name == "moving-digits":
        video = VideoRecipe(num_steps=options.steps or VideoRecipe.num_steps, seed=options.seed)
        export_video(train_video(video, work), video, work, weights)
        print(json.dumps(evaluate_video(weights, get_profile(name, batch_size=25)), indent=1))
    else:
        latent = LatentRecipe(num_attention_heads=options.heads, seed=options.seed)
        if options.start:
            cifar10.take_up(latent, options.start, work)
        if not options.export:
            limits = {"workers": options.workers, "minutes": options.minutes}
            images = cifar10.train(latent, work, options.images, options.device, **limits)
            if images < options.images:
                print(f"stopped at {images:,} images; the same command goes on, with --export it writes weights")
                return 0
        cifar10.export(latent, work, weights, options.device)
    print(f"written to {weights / options.model}")
    return 0
