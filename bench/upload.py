"""A snapshot into a server: over loopback against a file, over a slow line against one level."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from backend import MAX_CHUNK_SIZE
from bench.common import (
    CLI,
    MIB,
    Options,
    Row,
    median_of,
    median_ratio,
    pairs,
    run_measured,
    sync_all,
)
from bench.remote import our_server
from bench.snapshot import make_database
from filebackend import FileBackend
from filelog.layout2 import BEFORE_FIRST, Kind
from protocol import RecordPacker
from tests.cutproxy import CutProxy
from tests.peers import free_port

ROUNDS = 3
LOOPBACK_TARGET = 2.0
SLOW_TARGET = 1.1
SLOW_RATE = MIB
"""Bytes a second."""
SLOW_SIZE_MIB = 16


@contextlib.contextmanager
def _empty_server(scratch: Path) -> Iterator[int]:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    url, port = f"file://{scratch}/node.bkp", free_port()
    FileBackend(url).create(None)
    with our_server(url, port):
        yield port


def _init(directory: Path, url: str) -> float:
    (directory / "backup.lock").unlink(missing_ok=True)
    sync_all()
    return run_measured(CLI, "init", "--lightning-dir", directory, url).took_s


def _node(scratch: Path, size_mib: int) -> Path:
    directory = scratch / "node" / "regtest"
    directory.mkdir(parents=True)
    make_database(directory / "lightningd.sqlite3", size_mib)
    return directory


def _loopback(scratch: Path, options: Options) -> Row:
    directory = _node(scratch, options.size_mib)

    def over_a_socket() -> float:
        with _empty_server(scratch / "server") as port:
            return _init(directory, f"socket:127.0.0.1:{port}")

    def to_a_file() -> float:
        shutil.rmtree(scratch / "disk2", ignore_errors=True)
        (scratch / "disk2").mkdir()
        return _init(directory, f"file://{scratch}/disk2/node.bkp")

    results = pairs(min(options.rounds, ROUNDS), over_a_socket, to_a_file)
    return Row(
        f"init over loopback, database of {options.size_mib} MiB",
        f"{median_of([own for own, _ in results]):.2f} s",
        f"{median_of([other for _, other in results]):.2f} s, init to a file",
        median_ratio(results),
        LOOPBACK_TARGET,
    )


def _slow(scratch: Path) -> Row:
    directory = _node(scratch, SLOW_SIZE_MIB)
    packer, packed = RecordPacker(), 0
    with open(directory / "lightningd.sqlite3", "rb") as source:
        while piece := source.read(MAX_CHUNK_SIZE):
            head = BEFORE_FIRST._replace(kind=Kind.SNAPSHOT, length=len(piece))
            packed += len(packer.pack(head, piece))
    line = CutProxy(("127.0.0.1", 0), rate=SLOW_RATE)
    with _empty_server(scratch / "server") as port, line:
        line.target = "127.0.0.1", port
        took_s = _init(directory, f"socket:127.0.0.1:{line.port}")
    floor_s = packed / SLOW_RATE
    return Row(
        f"init over a line of {SLOW_RATE / MIB:.0f} MiB/s, database of {SLOW_SIZE_MIB} MiB",
        f"{took_s:.2f} s",
        f"{floor_s:.2f} s, what level {packer.level} alone leaves to send",
        took_s / floor_s,
        SLOW_TARGET,
    )


def run(options: Options) -> list[Row]:
    """Both."""
    scratch = options.scratch / "upload"
    scratch.mkdir()
    rows = [_loopback(scratch / "loopback", options), _slow(scratch / "slow")]
    shutil.rmtree(scratch)
    return rows
