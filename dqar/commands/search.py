"""``dqar search``: Optuna searches settings of reuse and extrapolation; a stopped search goes on."""

from __future__ import annotations

from pathlib import Path

from dqar.commands.parser import Parser, asked_profile
from dqar.measure.results import RECORDED
from dqar.models.profiles import profile_of
from dqar.studies.recording import Recording, check_recordable
from dqar.studies.search import BY_HAND, points, record_search


def run(arguments: list[str]) -> int:
    """Searches, measures the front again on images that weren't searched on, prints it, and writes three tables.

    Raises:
        ValueError: an argument isn't accepted, or the study is one of another search space.
        OSError: weights can't be read, or tables can't be written.
        ModuleNotFoundError: without Optuna.
    """
    parser = Parser("search", "Searches reuse and extrapolation: MACs against dB at the 5th percentile. Resumes.")
    parser.add_profile()
    parser.add_changes()
    parser.add_argument("--trials", type=int, metavar="N", help="in all, those of earlier calls included (default: 60)")
    parser.add_argument("--out", type=Path, default=RECORDED, help="folder of the tables (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/record"), help="the study (default: runs/record)")
    options = parser.parse_args(arguments)
    profile = profile_of(asked_profile(options))
    check_recordable(profile)
    recording = Recording(profile, options.work, options.out)
    front = points(record_search(recording, options.trials))
    print(front.sort_values("macs_speedup")[["trial", "macs_speedup", "psnr_5th"]].round(2).to_string(index=False))
    images = recording.sizes.front_images
    print(f"trials 0 to {len(BY_HAND) - 1} are settings by hand; {images} images that weren't searched on")
    print(f"saved: {recording.folder}/search*.parquet")
    return 0
