"""A process of its own for work beside the node: niced, and ended with its parent.

A line of JSON on its stdout is a message. These are known to both sides:

    {"unsound": text}   the work found that the backup does not hold
    {"error": text}     the work failed

A process ends when its stdin does, so it never outlives its parent.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import durable
from backend import Progress
from errors import (
    BackupError,
    BackupMissing,
    Damaged,
    DatabaseError,
    DiskError,
    InvalidChange,
    Unsound,
    UnsupportedLayout,
)

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
"""Where the modules are."""
NICE = 19
"""The system's scheduler of disks takes its priority from this, too, where it has any."""
FLUSH_STEP = 1 << 20
"""Bytes of log between two flushes of the database that it is replayed into."""
MEDIUM_ERRORS = (errno.EIO, errno.EBADMSG)
SHORTAGES = ("database or disk is full", "disk I/O error", "unable to open database file")
"""What SQLite says when not the statement is at fault, but the scratch database's disk."""

Message = dict[str, Any]


class Child:
    """The parent's side; a context manager, which ends the process.

    Args:
        what: is named in errors, such as "compacting".
        program: a Python file.
        arguments: for it.

    Attributes:
        was_killed: by ``kill``.

    Raises:
        BackupError: it did not start.
    """

    def __init__(self, what: str, program: str, *arguments: str) -> None:
        self._what = what
        self.was_killed = False
        try:
            # Ctrl-C at a terminal is for the parent, in whose session this one is not.
            self._process = subprocess.Popen(
                [sys.executable, os.path.realpath(program), *arguments],
                env={**os.environ, "PYTHONPATH": ROOT},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise BackupError(f"The {what} process did not start: {error}.") from error

    def messages(self) -> Iterator[Message]:
        """What it says, until the caller has heard enough.

        Raises:
            Unsound, BackupError: it said so, or it ended.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message: Message = json.loads(line)
            if "unsound" in message:
                raise Unsound(message["unsound"])
            if "error" in message:
                raise BackupError(message["error"])
            yield message
        raise BackupError(f"The {self._what} process ended with status {self._process.wait()}.")

    def kill(self) -> None:
        """End it, from any thread."""
        self.was_killed = True
        self._process.kill()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.__exit__(kind, error, traceback)


# What follows runs in the process of its own.


def run(path: str, prefix: str, work: Callable[[], Message]) -> None:
    """Do ``work`` on the log ``path``, and say what became of it.

    Args:
        prefix: how the scratch files begin, of this process alone.
        work: returns the last message.
    """
    os.nice(NICE)
    if select.select([0], [], [], 0)[0]:
        return  # The parent is gone already: leave no file behind.
    threading.Thread(target=_end_with_stdin, args=(prefix,), daemon=True).start()
    try:
        say(work())
    except BackupError as error:
        say(_as_message(error, path))
    except OSError as error:
        say({"error": f"{error.filename or prefix}: {error.strerror}."})


def _end_with_stdin(prefix: str) -> None:
    # Not sys.stdin: a thread that reads it makes the interpreter abort at its end.
    os.read(0, 1)
    # The next open would do it, but a node may be stopped for long.
    for stray in glob.glob(glob.escape(prefix) + "*"):
        durable.discard(stray)
    os._exit(1)


def _as_message(error: BackupError, path: str) -> Message:
    if isinstance(error, DatabaseError) and str(error.__cause__) not in SHORTAGES:
        return {"unsound": f"The backup {path} does not restore: {error}"}
    is_unsound = isinstance(error, (InvalidChange, Unsound, BackupMissing))
    if isinstance(error, (Damaged, UnsupportedLayout)):
        is_unsound = error.path == path  # Not that of a new log, which is in nobody's way.
    if isinstance(error, DiskError):
        is_unsound = error.path == path and error.errno in MEDIUM_ERRORS
    return {"unsound" if is_unsound else "error": str(error)}


def say(message: Message) -> None:
    """Tell the parent."""
    print(json.dumps(message), flush=True)


def flushing(scratch: str) -> Progress:
    """A callback for a replay that flushes ``scratch`` from time to time.

    It need not be durable, but a node that shares the disk would wait long for all of it
    at once.
    """
    flushed = 0

    def flush(done: int, of: int) -> None:
        nonlocal flushed
        if done >= flushed + FLUSH_STEP:
            flushed = done
            with open(scratch, "rb") as file:
                durable.flush(file.fileno())

    return flush
