"""A look at a database that somebody sent, in a process of its own, before it counts as a backup.

Its pages may be made so that SQLite computes or allocates without an end. So the process that
``examine`` starts has limits on memory and time besides those of wallet.confined. Its one message:

    {"version": data_version, "node": id or null, "of_backup": id or null, "problems": [text]}
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from backend import Reading
from errors import BackupError
from filelog.reader import FileReading
from upkeep import child
from upkeep.child import Child, Message
from wallet import database, identity

MAX_MEMORY = 1 << 30
"""Bytes of address space: ten times what a check of a node's database takes."""
LIMIT_S = 120.0
RATE = 1 << 20
"""Bytes a second that a check reads at least, after LIMIT_S."""
NAMED_PROBLEMS = 3


class Findings(NamedTuple):
    """What a database is.

    Attributes:
        node: the node it belongs to, None: it does not say.
        of_backup: that of the backup it was compared with, None: not known, or not asked.
        problems: what does not hold, in words.
    """

    version: int
    node: str | None
    of_backup: str | None
    problems: list[str]


def examine(path: str, log: str | None, meanwhile: Callable[[], None]) -> Findings:
    """Look at the database ``path``.

    Args:
        log: the backup whose node is asked for, too; None: it does not matter.
        meanwhile: is done beside that; what it raises ends the look.

    Raises:
        BackupError: the process found no answer within its limits.
    """
    limit_s = LIMIT_S + os.path.getsize(path) / RATE
    with Child("examining", __file__, path, log or "", str(round(limit_s))) as process:
        timer = threading.Timer(limit_s, process.kill)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:  # No thread is left.
            raise BackupError(f"It cannot be checked now: {error}.") from error
        try:
            meanwhile()
            found = _answer(process, limit_s)
        finally:
            timer.cancel()
    return Findings(found["version"], found["node"], found["of_backup"], found["problems"])


def _answer(process: Child, limit_s: float) -> Message:
    try:
        return next(process.messages())
    except BackupError as error:
        raise BackupError(
            f"Its check did not end within {limit_s:.0f} s and {MAX_MEMORY >> 20} MiB of"
            f" memory: {'it was killed' if process.was_killed else error.problem}"
        ) from error


# What follows runs in the process of its own.


def _look(path: str, log: str, limit_s: int) -> Message:
    for kind, most in (resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_CPU, limit_s):
        with contextlib.suppress(ValueError):  # A lower one is in force, or macOS takes none.
            resource.setrlimit(kind, (most, most))
    try:
        version, node = database.version_of(path), database.node_id_of(path)
        problems = database.integrity_problems(path)[:NAMED_PROBLEMS]
    except BackupError as error:
        return {
            "version": 0,
            "node": None,
            "of_backup": None,
            "problems": [error.problem.removeprefix(f"{path}: ")],
        }
    of_backup = _node_of(log, f"{path}-backup") if log and not problems else None
    return {"version": version, "node": node, "of_backup": of_backup, "problems": problems}


def _node_of(log: str, scratch: str) -> str | None:
    reading: Reading = FileReading(log)
    with contextlib.closing(reading):
        try:
            return identity.of_backup(reading, scratch)
        except MemoryError:  # A change that is too large for this process, so it cannot be told.
            return None


def main(path: str, log: str, limit_s: str) -> None:
    """Look at the database, and say what was found."""
    child.run(path, path, lambda: _look(path, log, int(limit_s)))


if __name__ == "__main__":
    main(*sys.argv[1:])
