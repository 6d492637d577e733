"""A standby: a promote of a large database against a small one, and keeping up with a node."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from backend import Change, Session, Snapshot, bump
from bench.common import (
    CLI,
    PLUGIN,
    Call,
    Options,
    Row,
    committed,
    median_of,
    node_dir,
    run_measured,
    sessions_of,
    sync_all,
)
from bench.following import destination
from bench.hook import messages, start
from bench.snapshot import make_database
from filebackend import FileBackend
from standby import state as keeping

SMALL_MIB = 64
TARGET = 1.5
KEEPS_UP = 1.1
"""The last change is applied by then, as a multiple of the time that the node took."""
CHANGES = 100
"""Behind the snapshot, the last ten of which come when nothing follows any more."""


@contextlib.contextmanager
def standby(directory: Path, url: str) -> Iterator[None]:
    """One that follows, in a process of its own."""
    words = (CLI, "standby", "--lightning-dir", directory, "--check-every", "300d", url)
    with subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def version_of(directory: Path) -> int:
    """data_version of the standby's database, which is looked at beside it; 0: none yet."""
    path = directory / keeping.STANDBY_NAME
    with contextlib.suppress(sqlite3.Error):
        uri = f"file:{path}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            query = "SELECT intval FROM vars WHERE name = 'data_version'"
            return int(connection.execute(query).fetchone()[0])
    return 0


def wait_for(directory: Path, version: int) -> float:
    """When the standby has applied that."""
    while version_of(directory) < version:
        time.sleep(0.01)
    return time.monotonic()


def add(url: str, first: int, last: int) -> None:
    """Changes of one row each."""
    backend = FileBackend(url)
    backend.open()
    session = Session(backend, "")
    for version in range(first, last + 1):
        blob = f"INSERT INTO blobs (body) VALUES (x'{version:08x}')"
        session.write(Change(version, None, [blob, bump(version)]))
    backend.close()


class InStep:
    """A standby of a database of ``size_mib``, that has all but the last changes."""

    def __init__(self, scratch: Path, size_mib: int) -> None:
        self.directory = scratch / f"standby-{size_mib}" / "regtest"
        self.directory.mkdir(parents=True)
        database, url = scratch / f"node-{size_mib}.sqlite3", f"file://{scratch}/{size_mib}.bkp"
        make_database(database, size_mib)
        FileBackend(url).create(Snapshot(str(database), 1))
        database.unlink()
        add(url, 2, CHANGES - 10)
        with standby(self.directory, url):
            while not (state := keeping.read(str(self.directory))) or not state.place:
                time.sleep(0.01)
            wait_for(self.directory, CHANGES - 11)
        self.state = state
        add(url, CHANGES - 9, CHANGES)

    def promote(self) -> float:
        """The seconds that it takes; then the standby stands where it stood."""
        sync_all()
        took_s = run_measured(CLI, "promote", "--lightning-dir", self.directory).took_s
        os.rename(self.directory / "lightningd.sqlite3", self.directory / keeping.STANDBY_NAME)
        keeping.write(str(self.directory), self.state)
        (self.directory / "backup.lock").unlink()
        return took_s


def promotes(scratch: Path, large_mib: int, rounds: int) -> Row:
    """A large one against a small one, in turn."""
    small, large = InStep(scratch, SMALL_MIB), InStep(scratch, large_mib)
    times = [(large.promote(), small.promote()) for _ in range(rounds)]
    ours, against = median_of([own for own, _ in times]), median_of([other for _, other in times])
    return Row(
        f"promote of {large_mib} MiB in step",
        f"{ours:.2f} s",
        f"{against:.2f} s, of {SMALL_MIB} MiB",
        ours / against,
        TARGET,
    )


def keeps_up(scratch: Path, kind: str, calls: Sequence[Call]) -> Row:
    """When the standby has applied all but the last, against when the node had written that."""
    directory = scratch / "second" / "regtest"
    directory.mkdir(parents=True)
    with destination(scratch, kind, calls[:2]) as url:
        node = start(node_dir(scratch, f"{kind}-node", url), PLUGIN)
        with standby(directory, url):
            wait_for(directory, calls[0][0])
            began = time.monotonic()
            for message in messages(calls[2:]):
                node.call(message)
            took = time.monotonic() - began
            came = wait_for(directory, calls[-2][0]) - began
        node.close()
    return Row(
        f"standby at the node's top rate, {kind}, {len(calls)} changes",
        f"{came:.2f} s",
        f"{took:.2f} s, {len(calls) / took:.0f} changes a second",
        came / took,
        KEEPS_UP,
    )


def run(options: Options) -> list[Row]:
    """Both; keeping up by the longest trace."""
    scratch = options.scratch / "promote"
    scratch.mkdir()
    rows = [promotes(scratch, options.size_mib, options.rounds)]
    calls = max((committed(sessions_of(trace)) for trace in options.traces), key=len)
    for kind in ("file", "socket"):
        scratch = options.scratch / f"standby-{kind}"
        scratch.mkdir()
        rows.append(keeps_up(scratch, kind, calls))
    return rows
