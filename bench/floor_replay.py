"""Prints the seconds that sqlite3 takes for a trace's statements, which are in memory."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import committed, sessions_of


def main(trace: str, path: str, journal: str) -> None:
    """Execute one transaction a change, without syncing, into the new database ``path``."""
    calls = committed(sessions_of(Path(trace)))
    started = time.perf_counter()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA foreign_keys = ON")
    if journal:
        connection.execute(f"PRAGMA journal_mode = {journal}")
    for _, statements in calls:
        outside = statements[0].startswith("PRAGMA")
        if not outside:
            connection.execute("BEGIN")
        for statement in statements:
            connection.execute(statement)
        if not outside:
            connection.execute("COMMIT")
    connection.close()
    print(time.perf_counter() - started)
    os.unlink(path)


main(*sys.argv[1:])
