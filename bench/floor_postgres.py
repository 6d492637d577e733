"""COPY of a backup's records from a cluster, and their statements executed by sqlite3."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import psycopg

KIND_CHANGE, KIND_REWIND = 2, 3
ROWS = "SELECT kind, payload FROM cln_backup.records ORDER BY sequence"
COPY = f"COPY ({ROWS}) TO STDOUT (FORMAT BINARY)"


def main(url: str, path: str) -> None:
    """Leave out what a rewind took back, and execute the rest."""
    Path(path).unlink(missing_ok=True)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA foreign_keys = ON")
    last: bytes | None = None

    def execute(payload: bytes) -> None:
        statements = payload.decode().split("\0")
        database.execute("BEGIN")
        for statement in statements:
            database.execute(statement)
        database.execute("COMMIT")

    with psycopg.connect(url) as connection, connection.cursor().copy(COPY) as copy:
        copy.set_types(["int2", "bytea"])
        for kind, payload in copy.rows():
            if kind == KIND_CHANGE and last is not None:
                execute(last)
            if kind in (KIND_CHANGE, KIND_REWIND):
                last = payload if kind == KIND_CHANGE else None
    if last is not None:
        execute(last)
    database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
