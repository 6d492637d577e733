"""Prints the seconds that sqlite3 takes for the statements of a backup, reading not counted."""

from __future__ import annotations

import itertools
import os
import sqlite3
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backend import Change
from filebackend import FileBackend

AT_ONCE = 1000
"""Changes that are read into memory before the clock runs."""


def main(url: str, path: str) -> None:
    """Execute one transaction a change, without syncing, into the new database ``path``."""
    took_s = 0.0
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA foreign_keys = ON")
    steps = FileBackend(url).read()
    changes = (step.found for step in steps if isinstance(step.found, Change))
    while block := list(itertools.islice(changes, AT_ONCE)):
        started = time.perf_counter()
        for change in block:
            assert change.transaction is not None
            outside = change.transaction[0].startswith("PRAGMA")
            if not outside:
                connection.execute("BEGIN")
            for statement in change.transaction:
                connection.execute(statement)
            if not outside:
                connection.execute("COMMIT")
        took_s += time.perf_counter() - started
    connection.close()
    print(took_s)
    os.unlink(path)


main(*sys.argv[1:])
