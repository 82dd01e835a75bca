"""Scores of images by networks: class and features of the embedded models' classifiers, FID, sFID, CLIP, LPIPS."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from dqar.measure import metrics
from dqar.measure.metrics import Gaussian
from dqar.models.captions import coco_captions
from dqar.models.classifier import Classifier, load_classifier
from dqar.models.data import Dataset, load_split
from dqar.models.profiles import CLASS_NAMES, WEIGHTS, Profile

CLIP = "openai/clip-vit-large-patch14"
"""As torchmetrics' default."""
AT_ONCE = 50
"""Images that a network scores at once."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
"""Files of a reference's folder that are read."""


class Extractor(Protocol):
    """Features for Fréchet distances.

    Attributes:
        widths: number of features by column: ``"features"``, and ``"spatial"`` where there are such.
    """

    widths: dict[str, int]

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each column ``[N, D]`` of images ``[N, C, H, W]`` in [0, 1]."""


class StandIn:
    """What takes Inception's place in a rehearsal: coarse averages of the pixels. They say nothing of quality."""

    widths = {"features": 12}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """``{"features": [N, 12]}``."""
        return {"features": nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)}


class Inception:
    """Inception-v3's features of torchmetrics and torch-fidelity, as FID (Heusel et al. 2017) and sFID (Nash et al.
    2021, arXiv 2103.03841) take them: 2,048 pooled ones, and 7 channels of 17 × 17 places.

    Args:
        network: a ``NoTrainInceptionV3`` for its 2,048 features.
    """

    widths = {"features": 2048, "spatial": 17 * 17 * 7}

    def __init__(self, network: Any):
        self.network, self._seen = network, torch.empty(0)
        network.Mixed_6d.branch1x1.register_forward_hook(self._see)  # TensorFlow's mixed_6/conv

    def _see(self, _module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
        self._seen = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # in the order of the published statistics

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """``{"features": [N, 2048], "spatial": [N, 2023]}``, on the CPU."""
        device, columns = next(self.network.parameters()).device, []
        for part in images.split(AT_ONCE):
            pooled = self.network((part * 255).round().to(device, torch.uint8))
            columns.append((pooled.cpu(), self._seen.cpu()))
        return dict(zip(self.widths, map(torch.cat, zip(*columns, strict=True)), strict=True))


@functools.cache
def classifier(model: str) -> Classifier:
    """The embedded model's classifier, loaded once."""
    return load_classifier(model)


def extractor_of(profile: Profile) -> Extractor | None:
    """The feature extractor for a profile; ``None``, with one warning, where Inception's weights can't be had."""
    return StandIn() if profile.rehearsal else inception(profile.device)


@torch.no_grad()
def scores(
    profile: Profile, images: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """A value an image for each column of scores that can be had for a profile's model; none for random weights.

    Args:
        profile: of the images.
        images: ``[N, C, H, W]`` float32 in [0, 1].
        labels: ``[N]``, classes or numbers of captions.
        reference: the images ``[N, C, H, W]`` that LPIPS compares with.

    Returns:
        ``features`` (float16 ``[D]``), and of embedded models ``predicted`` (the class), else ``spatial``, ``lpips``
        and, of captions, ``clip`` (0 to 100), as far as their networks are at hand.
    """
    if not profile.trained:
        return {}
    if profile.embedded:
        predicted, features = metrics.classify(classifier(profile.model), images)
        return {"predicted": predicted.numpy(), "features": list(features.half().numpy())}
    extractor, columns = extractor_of(profile), dict[str, Any]()
    if extractor is not None:
        columns = {name: list(x.half().numpy()) for name, x in extractor(images).items()}
    if profile.rehearsal:
        return columns
    if (lpips := _lpips(profile.device)) is not None:
        columns["lpips"] = lpips(images, reference).numpy()
    if profile.model == "pixart" and (clip := _clip(profile.device)) is not None:
        captions = coco_captions()
        columns["clip"] = clip(images, [captions[label] for label in labels.tolist()]).numpy()
    return columns


def _at_hand(what: str, load: Callable[[], Any]) -> Any:
    """What ``load`` gives; ``None`` and one warning where package or weights can't be had."""
    try:
        return load()
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        text = f"no {what}; all else goes on: pip install 'dqar[gpu]'; the first use downloads weights"
        warnings.warn(f"{text} ({reason})", stacklevel=3)
        return None


@functools.cache
def inception(device: str) -> Inception | None:
    """The network on a device, loaded once; ``None`` where its weights can't be had."""

    def load() -> Inception:
        from torchmetrics.image.fid import NoTrainInceptionV3  # torch-fidelity's, which not everyone has

        return Inception(NoTrainInceptionV3("inception-v3-compat", ["2048"], antialias=False).to(device))

    return _at_hand("FID and sFID by Inception-v3", load)


@functools.cache
def _clip(device: str) -> Callable[[torch.Tensor, list[str]], torch.Tensor] | None:
    """``clip_scores`` by the weights of ``CLIP``; ``None`` where they can't be had."""

    def load() -> Any:
        from transformers import CLIPModel, CLIPProcessor

        return CLIPModel.from_pretrained(CLIP).to(device).eval(), CLIPProcessor.from_pretrained(CLIP)

    loaded = _at_hand("CLIP score", load)
    return None if loaded is None else functools.partial(clip_scores, *loaded)


def clip_scores(model: Any, processor: Any, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """CLIP score (Hessel et al. 2021, arXiv 2104.08718) of each image and its caption: ``[N]``, 0 to 100.

    Not torchmetrics', whose release 1.9.0 fails with transformers 5.

    Args:
        model, processor: a ``CLIPModel`` and what makes its inputs of images and captions.
        images: ``[N, 3, H, W]`` in [0, 1].
        captions: one an image; cut to the model's 77 tokens.
    """
    scores = []
    for first in range(0, len(images), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        pictures = list((images[part] * 255).round().to(torch.uint8))
        length = model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        output = model(**processor(text=captions[part], images=pictures, **options).to(model.device))
        cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
        scores.append(100 * cosine.clamp_min(0).cpu())
    return torch.cat(scores)


@functools.cache
def _lpips(device: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """LPIPS (Zhang et al. 2018) by AlexNet, only where torchvision's weights have been downloaded already."""
    if not (Path(torch.hub.get_dir()) / "checkpoints/alexnet-owt-7be5be79.pth").exists():
        return None
    if (network := _at_hand("LPIPS", lambda: LearnedPerceptualImagePatchSimilarity("alex", normalize=True))) is None:
        return None
    network = network.to(device)

    def score(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        pairs = zip(images.to(device), reference.to(device), strict=True)
        return torch.stack([network(a[None], b[None]).cpu() for a, b in pairs])

    return score


# --- what a set of images is compared with ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What Fréchet distances are to: Gaussians of features, and of spatial ones where there are such."""

    features: Gaussian
    spatial: Gaussian | None = None

    def save(self, path: Path) -> None:
        """Writes an ``.npz`` of float32, with the names of the ADM evaluator's statistics."""
        names = {"mu": self.features.mean, "sigma": self.features.covariance}
        if self.spatial is not None:
            names |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        np.savez(path, **cast(Any, {name: x.float().numpy() for name, x in names.items()}))


def reference_of(model: str, folder: Path) -> Reference | None:
    """The reference of a profile's model: test data of embedded ones, else what was recorded; ``None``: nothing was.

    Args:
        model: of a profile.
        folder: of the profile's recorded tables.
    """
    # CIFAR-10 itself is in no package, so the statistics of its features come with the classifier.
    path = (WEIGHTS / f"{model}-classifier" if model in CLASS_NAMES else folder) / "reference.npz"
    if path.exists():
        return load_reference(path)
    if model not in CLASS_NAMES:
        return None
    return Reference(_held_out(model))


@functools.cache
def _held_out(model: str) -> Gaussian:
    return Gaussian.of(classify_held_out(classifier(model), cast(Dataset, model))[1])


def classify_held_out(classifier: Classifier, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """``metrics.classify``, ``[N]`` and ``[N, D]``, of a data set's test images, which no embedded model has seen."""
    return metrics.classify(classifier, load_split(dataset, "test")[0] / 2 + 0.5)


def load_reference(path: Path, widths: dict[str, int] | None = None) -> Reference:
    """Reads ``mu`` and ``sigma``, and for sFID ``mu_s`` and ``sigma_s`` where they are, as the ADM evaluator writes.

    Args:
        path: an ``.npz``.
        widths: how many features the extractor has; ``None``: whatever they are.

    Raises:
        OSError: it isn't there or can't be read.
        ValueError: without such arrays, or of another number of features.
    """
    if not path.exists():
        raise OSError(f"the reference {path} isn't there: an .npz with mu and sigma, or a folder of images")
    try:
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]).double() for name in file.files if name[:2] in ("mu", "si")}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise OSError(f"the statistics in {path} can't be read: {error}") from error
    gaussians = {}
    for column, end in (("features", ""), ("spatial", "_s")):
        mean, covariance = arrays.get(f"mu{end}"), arrays.get(f"sigma{end}")
        if mean is None or covariance is None:
            continue
        width = (widths or {}).get(column, len(mean))
        if mean.shape != (width,) or covariance.shape != (width, width):
            shapes = f"mu{end} {tuple(mean.shape)} and sigma{end} {tuple(covariance.shape)}"
            raise ValueError(f"{path} has {shapes}: those of {width} features are needed")
        gaussians[column] = Gaussian(mean, covariance)
    if "features" not in gaussians:
        raise ValueError(f"{path} has the arrays {', '.join(sorted(arrays)) or 'of none'}: needs mu and sigma")
    return Reference(**gaussians)


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and those below, in order.

    Raises:
        ValueError: fewer than two.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if len(files) < 2:
        raise ValueError(f"the reference {folder} has {len(files)} images: two or more of {', '.join(IMAGES)}")
    return files


@torch.no_grad()
def features_of_files(extractor: Extractor, files: list[Path], size: int) -> dict[str, torch.Tensor]:
    """The extractor's columns ``[N, D]`` of image files, cropped to their middle square and resized to ``size``.

    Raises:
        OSError: a file that is no image, by name.
    """

    def read(path: Path) -> torch.Tensor:
        try:
            image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        except (UnidentifiedImageError, OSError) as error:
            raise OSError(f"{path} can't be read as an image: {error}") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    parts = [files[first : first + AT_ONCE] for first in range(0, len(files), AT_ONCE)]
    scored = [extractor(torch.stack([read(path) for path in part])) for part in parts]
    return {name: torch.cat([columns[name] for columns in scored]) for name in extractor.widths}
