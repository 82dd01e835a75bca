"""The options of all subcommands: errors for the one place that answers them, and the profile's names."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, NoReturn

from dqar.models.profiles import PROFILES, Weights, get_profile, profile_of


class Parser(argparse.ArgumentParser):
    """A subcommand's parser. It raises ``ValueError`` in place of printing its usage and leaving."""

    def __init__(self, command: str, description: str):
        super().__init__(f"dqar {command}", description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        """Raises ``ValueError`` with argparse's message."""
        raise ValueError(message)

    def add_profile(self) -> None:
        """Adds ``--profile``."""
        names = " ".join(PROFILES)
        self.add_argument("--profile", default="digits", metavar="NAME", help=f"{names} (default: digits)")

    def add_changes(self, *names: str) -> None:
        """Adds the options that change a profile, or those of these names only; ``asked_profile`` reads them."""
        group = self.add_argument_group("changes to the profile: give `record` and `workbook` the same ones")
        options: dict[str, dict[str, Any]] = {
            "weights": {"metavar": "FROM", "help": "a whole pipeline: a folder, REPO or REPO@REVISION"},
            "device": {"help": "cpu or cuda"},
            "images": {"type": int, "metavar": "N", "help": "maximum number of images per method"},
            "reference": {"metavar": "FROM", "help": "of FID: an .npz with mu and sigma, or a folder of images"},
            "set": {
                **{"action": "append", "default": [], "metavar": "FIELD=VALUE"},
                "help": "any field, such as guidance_scale=4.0",
            },
        }
        for name in names or options:
            group.add_argument(f"--{name}", **options[name])


class _Formatter(argparse.HelpFormatter):
    """One line an option, in 120 columns; the options aren't listed twice."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size((120, 24)).columns, 120))

    def add_usage(self, usage, actions, groups, prefix=None):
        positionals = [action for action in actions if not action.option_strings]
        names = [f"{{{','.join(action.choices)}}}" if action.choices else action.dest for action in positionals]
        super().add_usage(" ".join([self._prog, *names, "[OPTIONS]"]), actions, groups, prefix)


def asked_profile(options: argparse.Namespace) -> dict[str, str]:
    """The profile's name and its changed fields as texts, for ``profiles.profile_of``; notebooks are given the same.

    Raises:
        ValueError: a profile, field or value that isn't accepted.
    """
    asked, given = {"name": options.profile}, vars(options)
    if given.get("weights") is not None:  # a whole pipeline, with its own transformer
        weights = Weights.parse(options.weights)
        asked |= {"weights": "@".join(filter(None, (weights.source, weights.revision))), "transformer": "none"}
    if given.get("images") is not None:
        images = get_profile(options.profile, images=str(options.images)).images
        asked |= {"images": str(images), "num_samples": str(min(images, get_profile(options.profile).num_samples))}
    asked |= {name: value for name in ("device", "reference") if (value := given.get(name)) is not None}
    for text in options.set:
        field, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text} is not accepted: FIELD=VALUE, such as guidance_scale=4.0")
        asked[field] = value
    if "reference" in asked:  # notebooks run in another folder
        asked["reference"] = str(Path(asked["reference"]).resolve())
    profile_of(asked)
    return asked
