"""The options of all subcommands: errors for the one place that answers them, and the profile's names."""

from __future__ import annotations

import argparse
import shutil
from typing import NoReturn

from dqar.models.profiles import PROFILES


class Parser(argparse.ArgumentParser):
    """A subcommand's parser. It raises ``ValueError`` in place of printing its usage and leaving."""

    def __init__(self, command: str, description: str):
        super().__init__(f"dqar {command}", description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def add_profile(self) -> None:
        """Adds ``--profile``."""
        names = " ".join(PROFILES)
        self.add_argument("--profile", default="digits", metavar="NAME", help=f"{names} (default: digits)")


class _Formatter(argparse.HelpFormatter):
    """One line an option, in 120 columns; the options aren't listed twice."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size((120, 24)).columns, 120))

    def add_usage(self, usage, actions, groups, prefix=None):
        positionals = [action for action in actions if not action.option_strings]
        names = [f"{{{','.join(action.choices)}}}" if action.choices else action.dest for action in positionals]
        super().add_usage(" ".join([self._prog, *names, "[OPTIONS]"]), actions, groups, prefix)
