"""Moving into the ``.venv`` beside the code when a package is missing."""

from __future__ import annotations

import importlib
import os
import shlex
import sys

MOVED = "BACKUP_MOVED_INTO_VENV"
"""Environment variable: process id of a program that has moved already, as exec keeps it."""


def ensure(*modules: str) -> None:
    """Import ``modules``; if that fails, start this program again inside ``.venv``, once.

    The ``.venv`` is found by the file's real path, so a symbolic link works. Exits with
    one line on stderr that says what to type when there is no ``.venv``, or a broken one.
    """
    try:
        for module in modules:
            importlib.import_module(module)
        return
    except ImportError as error:
        missing = error
    here = os.path.dirname(os.path.realpath(__file__))
    venv = os.path.join(here, ".venv")
    reason = f"{missing}"
    # Not by sys.prefix: a broken .venv may start a python that does not know that it is in one.
    if os.environ.get(MOVED) != str(os.getpid()):
        os.environ[MOVED] = str(os.getpid())
        python = os.path.join(venv, "bin", "python")
        try:
            os.execv(python, [python, *sys.argv])
        except OSError as error:
            reason += f", and {python} does not start: {error.strerror}"
    print(
        f"{os.path.basename(sys.argv[0])}: {reason}. Run `make -C {shlex.quote(here)} install`.",
        file=sys.stderr,
    )
    sys.exit(1)
