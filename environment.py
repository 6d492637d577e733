"""Moving into the ``.venv`` beside the code, where the packages are."""

from __future__ import annotations

import importlib
import os
import shlex
import sys

MOVED = "BACKUP_MOVED_INTO_VENV"
"""Environment variable: process id of a program that has moved already, as exec keeps it."""


def ensure(*modules: str) -> None:
    """Import ``modules``, in the ``.venv`` beside the code where there is one.

    A system's python moves there first, whatever it has itself: that may be too old, or not
    whole. The python of another virtual environment was chosen by somebody, and moves only when
    a module fails. The ``.venv`` is found by the file's real path, so a symbolic link works.
    Exits with one line on stderr that says what to type when the modules are nowhere.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    venv = os.path.join(here, ".venv")
    if sys.prefix == sys.base_prefix and os.path.lexists(venv):
        _move(here, venv, "")
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # A package too old for this python fails in any way.
        _move(here, venv, f"{error or type(error).__name__}, and ")
        _give_up(here, f"{error or type(error).__name__}")


def _move(here: str, venv: str, reason: str) -> None:
    """Start this program again inside ``venv``; returns if it has moved already."""
    # Not by sys.prefix: a broken .venv may start a python that does not know that it is in one.
    if os.environ.get(MOVED) == str(os.getpid()):
        return
    os.environ[MOVED] = str(os.getpid())
    python = os.path.join(venv, "bin", "python")
    try:
        os.execv(python, [python, *sys.argv])
    except OSError as error:
        _give_up(here, f"{reason}{python} does not start: {error.strerror}")


def _give_up(here: str, reason: str) -> None:
    line = f"{os.path.basename(sys.argv[0])}: {' '.join(reason.split())}."
    print(f"{line} Run `make -C {shlex.quote(here)} install`.", file=sys.stderr)
    sys.exit(1)
