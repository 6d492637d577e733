"""What the benches share: options, rows of the table, recorded changes, measured processes."""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import durable
from backend import Change, Session
from filebackend import FileBackend

ROOT = Path(__file__).resolve().parent.parent
CLI = ROOT / "backup-cli"
PLUGIN = ROOT / "backup.py"
DATA = ROOT / "tests" / "data"
MEASURED = Path(__file__).with_name("measured.py")
TRACE_FILE = "db_writes.jsonl.xz"
MIB = 1 << 20

Call = tuple[int, list[str]]
"""data_version and statements of one db_write call."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        traces: folders of recorded traffic.
        size_mib: size of the database for the snapshot bench.
        backup_mib: size of the backup for the compaction bench.
        changes: length of the long log for the start bench.
        rounds: how often a pair is repeated.
        scratch: an empty directory on the disk to measure.
    """

    traces: list[Path]
    size_mib: int
    backup_mib: int
    changes: int
    rounds: int
    scratch: Path


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured, and on how much.
        ours: our figure with its unit.
        floor: what it is measured against, with its unit.
        ratio: ours by floor, or None where there is nothing to divide by.
        target: the highest ratio that is good enough, or None.
        note: peak memory and the like.
    """

    what: str
    ours: str
    floor: str = ""
    ratio: float | None = None
    target: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ran to its end: its time, its peak memory, what it printed."""

    took_s: float
    peak_mib: float
    output: str


def sessions_of(trace: Path) -> list[list[Call]]:
    """The calls of a recorded trace, one list a lightningd process."""
    sessions: list[list[Call]] = []
    with lzma.open(trace / TRACE_FILE, "rt", encoding="utf-8") as lines:
        for entry in map(json.loads, lines):
            if "session" in entry:
                sessions.append([])
            elif "w" in entry:
                sessions[-1].append((entry["v"], entry["w"]))
    return [calls for calls in sessions if calls]


def committed(sessions: Sequence[Sequence[Call]]) -> list[Call]:
    """The calls that the node committed: without those which the next session contradicts."""
    calls: list[Call] = []
    for session in sessions:
        first = Change(session[0][0], None, session[0][1])
        if calls and first.base < calls[-1][0]:
            calls.pop()
        calls += session
    return calls


def payload_size(calls: Sequence[Call]) -> int:
    """Bytes that a backup stores for ``calls``, without the frame around each."""
    return sum(len("\0".join(statements).encode()) for _, statements in calls)


def node_dir(scratch: Path, name: str, url: str) -> Path:
    """A node's network directory whose backup.lock names ``url``."""
    directory = scratch / name / "regtest"
    directory.mkdir(parents=True)
    (directory / "backup.lock").write_text(json.dumps({"backend_url": url}))
    return directory


@contextlib.contextmanager
def unflushed() -> Iterator[None]:
    """Let this process write a log without waiting for the disk: only to prepare one."""
    flush = durable.flush
    durable.flush = lambda fd: None
    try:
        yield
    finally:
        durable.flush = flush


def record(path: Path, sessions: Sequence[Sequence[Call]]) -> str:
    """Write a backup of recorded ``sessions`` to the new file ``path``; its URL."""
    url = f"file://{path}"
    with unflushed():
        FileBackend(url).create(None)
        for calls in sessions:
            backend = FileBackend(url)
            backend.open()
            session = Session(backend, "")
            for version, statements in calls:
                session.write(Change(version, None, statements))
            backend.close()
    sync_all()
    return url


def sync_all() -> None:
    """Let what was prepared reach the disk, so that it does not slow what is measured."""
    os.sync()


def run_measured(*words: object, expected: int = 0) -> Finished:
    """Run a program to its end with this Python; SystemExit if its exit code is another."""
    with tempfile.NamedTemporaryFile("r") as report:
        done = subprocess.run(
            [sys.executable, "-S", MEASURED, report.name, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        fields = report.read().split()
    if done.returncode or fields[2] != str(expected):
        sys.exit(f"{' '.join(map(str, words))} failed: {done.stdout}")
    return Finished(float(fields[0]), int(fields[1]) / 1024, done.stdout)


def pairs(
    rounds: int, ours: Callable[[], float], floor: Callable[[], float]
) -> list[tuple[float, float]]:
    """Measure both ``rounds`` times in turn, changing who goes first, so that drift cancels."""
    results = []
    for number in range(rounds):
        if number % 2:
            against, own = floor(), ours()
        else:
            own, against = ours(), floor()
        results.append((own, against))
    return results


def median_ratio(results: Sequence[tuple[float, float]]) -> float:
    """The median of the ratios of each pair."""
    return statistics.median(own / against for own, against in results)


def median_of(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that ``percent`` of ``values`` do not exceed."""
    return statistics.quantiles(values, n=100)[percent - 1]
