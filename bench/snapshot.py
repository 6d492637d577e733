"""A large database into a new backup and out of it, against a plain copy of the file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import (
    CLI,
    MIB,
    Finished,
    Options,
    Row,
    median_of,
    median_ratio,
    pairs,
    run_measured,
    sync_all,
)

BLOB_SIZE = 64 << 10
ROUNDS = 3
"""At most: each moves the database several times."""


def make_database(path: Path, size_mib: int) -> None:
    """A database of about ``size_mib`` MiB of random blobs, with a data_version."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)")
    connection.execute("INSERT INTO vars VALUES ('data_version', 1)")
    connection.execute("CREATE TABLE blobs (id INTEGER PRIMARY KEY, body BLOB)")
    connection.execute("BEGIN")
    for _ in range(size_mib * MIB // BLOB_SIZE):
        connection.execute("INSERT INTO blobs (body) VALUES (randomblob(?))", (BLOB_SIZE,))
    connection.execute("COMMIT")
    connection.close()


def plain_copy(source: Path, target: Path) -> float:
    """The seconds that a copy with a flush takes: the disk's speed."""
    sync_all()
    started = time.perf_counter()
    with open(source, "rb") as read, open(target, "wb", buffering=0) as write:
        while piece := read.read(MIB):
            write.write(piece)
        os.fsync(write.fileno())
    took_s = time.perf_counter() - started
    target.unlink()
    return took_s


def backup_and_copy(source: Path, target: Path) -> float:
    """The seconds that SQLite's backup API takes, and a copy with a flush of what it made."""
    between = target.with_name("between")
    sync_all()
    started = time.perf_counter()
    node, copy = sqlite3.connect(source), sqlite3.connect(between)
    copy.execute("PRAGMA synchronous = OFF")
    node.backup(copy)
    node.close()
    copy.close()
    took_s = time.perf_counter() - started
    took_s += plain_copy(between, target)
    between.unlink()
    return took_s


def run(options: Options) -> list[Row]:
    """init with that database, then restore of what init stored."""
    scratch = options.scratch / "snapshot"
    directory = scratch / "node" / "regtest"
    directory.mkdir(parents=True)
    database = directory / "lightningd.sqlite3"
    make_database(database, options.size_mib)
    sync_all()
    log = scratch / "disk2" / "node.bkp"
    log.parent.mkdir()
    url = f"file://{log}"
    restored = scratch / "restored.sqlite3"

    def init() -> Finished:
        (directory / "backup.lock").unlink(missing_ok=True)
        shutil.rmtree(log.parent)
        log.parent.mkdir()
        return run_measured(CLI, "init", "--lightning-dir", directory, url)

    def restore() -> Finished:
        restored.unlink(missing_ok=True)
        return run_measured(CLI, "restore", url, restored)

    rounds = min(options.rounds, ROUNDS)
    copy = scratch / "copy"
    plain = "a copy of the file with fsync", lambda: plain_copy(database, copy)
    twice = "SQLite's backup API, then a copy", lambda: backup_and_copy(database, copy)
    made = "init (copies, stores, verifies)"
    rows = [
        _row(what, command, against, database, rounds)
        for what, command, against in (
            (made, init, plain),
            (made, init, twice),
            ("restore", restore, plain),
        )
    ]
    shutil.rmtree(scratch)
    return rows


def _row(
    what: str,
    ours: Callable[[], Finished],
    against: tuple[str, Callable[[], float]],
    database: Path,
    rounds: int,
) -> Row:
    name, floor = against
    peaks: list[float] = []

    def timed() -> float:
        sync_all()
        done = ours()
        peaks.append(done.peak_mib)
        return done.took_s

    results = pairs(rounds, timed, floor)
    size_mib = database.stat().st_size / MIB
    return Row(
        f"{what}, database of {size_mib:.0f} MiB",
        f"{median_of([own for own, _ in results]):.2f} s",
        f"{median_of([other for _, other in results]):.2f} s, {name}",
        median_ratio(results),
        None,
        f"peak memory {max(peaks):.0f} MiB",
    )
