"""What the installed commands start: the programs as a checkout has them.

They stand beside this package in a checkout and in its ``program`` once installed. Their modules
import each other by short names, so that directory, and no other, comes onto sys.path.
"""

from __future__ import annotations

import os
import runpy
import sys

_HERE = os.path.dirname(os.path.realpath(__file__))
_INSTALLED = os.path.join(_HERE, "program")
PROGRAM = _INSTALLED if os.path.isdir(_INSTALLED) else os.path.dirname(_HERE)
"""The directory with backup.py and backup-cli."""


def cli() -> None:
    """The command ``backup-cli``."""
    _run("backup-cli")


def plugin() -> None:
    """The command ``cln-backup-plugin``, for ``important-plugin=``."""
    _run("backup.py")


def _run(name: str) -> None:
    sys.path.insert(0, PROGRAM)
    runpy.run_path(os.path.join(PROGRAM, name), run_name="__main__")
