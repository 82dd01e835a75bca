"""What the recorded images are compared with as a set: published statistics, a folder, or full compute's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dqar.files import atomic_path
from dqar.measure.metrics import Gaussian
from dqar.measure.quality import Reference, extractor_of, features_of_files, image_files, load_reference
from dqar.models.profiles import Profile
from dqar.studies.compare import FULL
from dqar.studies.recording import REFERENCE_SEED, Recording


def check_reference(profile: Profile) -> None:
    """Checks the profile's ``reference`` before anything is measured.

    Raises:
        OSError: it isn't there or can't be read, or Inception's weights, which it is for, can't be had.
        ValueError: statistics of another number of features, or too few images.
    """
    extractor = None if profile.embedded else extractor_of(profile)
    if profile.reference is None or profile.embedded:
        return
    path = Path(profile.reference)
    if extractor is None:
        raise OSError(f"the reference {path} is for FID, and Inception-v3 can't be had: pip install 'dqar[gpu]'")
    if path.is_dir():
        image_files(path)
    else:
        load_reference(path, extractor.widths)


def record_reference(recording: Recording) -> None:
    """``reference.npz``: Gaussians of the reference's features; of an embedded model there is nothing to record.

    Without a ``reference``, they are of as many images as are compared, drawn in full compute from other seeds: full
    compute itself then has the distance that two sets of the same kind have.
    """
    profile, path = recording.profile, recording.folder / "reference.npz"
    extractor = None if profile.embedded else extractor_of(profile)
    if extractor is None or path.exists():
        return
    if profile.reference is None:
        columns = _full_compute(recording)
    elif Path(profile.reference).is_dir():
        pipe = FULL.pipeline(profile)
        size = pipe.transformer.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        columns = features_of_files(extractor, image_files(Path(profile.reference)), size)
    else:
        reference = load_reference(Path(profile.reference), extractor.widths)
        columns = {}
    if columns:
        reference = Reference(**{name: Gaussian.of(x) for name, x in columns.items()})
    with atomic_path(path) as temporary:
        reference.save(temporary)


def _full_compute(recording: Recording) -> dict[str, torch.Tensor]:
    table = recording.compared("reference", FULL, REFERENCE_SEED, recording.sizes.samples)
    return {
        name: torch.tensor(np.stack(list(table[name]))).float() for name in ("features", "spatial") if name in table
    }
