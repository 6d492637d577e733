"""Ending a command by a signal: what it began is taken back, as after an error.

Imports little: backup-cli calls it before its other imports, which take a moment in which
somebody may press Ctrl-C.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_caught: list[int] = []


def on_signals() -> None:
    """From now on a signal that ends this process raises SystemExit(128 + its number).

    One that was ignored from the start stays so: ``nohup`` sets SIGHUP to that.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    for other in SIGNALS:  # A second one must not cut the tidying up short.
        signal.signal(other, signal.SIG_IGN)
    _caught.append(number)
    try:
        behind_a_bar = "\n" if os.isatty(2) else ""
        os.write(2, f"{behind_a_bar}Stopped by {signal.Signals(number).name}.\n".encode())
    except OSError:
        pass  # The terminal is gone.
    sys.exit(128 + number)


def exit_code(otherwise: int) -> int:
    """``otherwise``, or 128 + the number of the signal that came.

    An exception that is raised while SQLite calls us becomes an error of SQLite.
    """
    return 128 + _caught[0] if _caught else otherwise


def print_anything() -> None:
    """Let stdout and stderr print every text: a path's bytes as they are, the rest escaped."""
    codecs.register_error("backup", _printable)
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backup")  # type: ignore[union-attr]


def _printable(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)
