"""The options of all subcommands: errors for the one place that answers them, and the profile's names."""

from __future__ import annotations

import argparse

from dqar.models.profiles import PROFILES


class Parser(argparse.ArgumentParser):
    """A subcommand's parser. It raises ``ValueError`` in place of printing its usage and leaving."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"dqar {command}", description=description, allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message)

    def add_profile(self) -> None:
        """Adds ``--profile``."""
        names = ", ".join(PROFILES)
        self.add_argument("--profile", default="digits", metavar="NAME", help=f"one of {names} (default: digits)")
