"""Compaction: its speed against sqlite3, what the node notices of it, memory, restore after.

The backup is of recorded changes. Where one trace is not enough, each of its changes comes
again as often as SQLite accepts it on what the changes before left (a row that is there
already is refused), with its data_version renumbered. A database of such traffic stays
small, so a second backup has half of its bytes in rows that stay.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import itertools
import json
import os
import select
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend import Change, Session, bump
from bench.common import (
    CLI,
    MIB,
    PLUGIN,
    TRACE_FILE,
    Call,
    Options,
    Row,
    committed,
    node_dir,
    run_measured,
    sessions_of,
    sync_all,
    unflushed,
)
from bench.hook import HookCaller, encode
from filebackend import FileBackend

FLOOR = Path(__file__).with_name("floor_compaction.py")
PACE_S = 0.002
"""Between two calls of the hook: a very busy node."""
WARM_UP_CALLS = 500
BALLAST_SIZE = 40_000
AIM_MS = 20.0
"""How much longer than without a compaction the node may wait during one."""
MAX_PEAK_MIB = 64


class Replica:
    """The node's database: tells which recorded changes it takes, and takes them."""

    def __init__(self, trace: Path) -> None:
        self._calls = committed(sessions_of(trace))
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def calls(self) -> Iterator[Call]:
        """The trace, then what of it can come again, without an end."""
        version = 0
        for version, statements in self._calls:
            assert self._takes(statements)
            yield version, statements
        again = [statements[:-1] for known, statements in self._calls if ends(known, statements)]
        for statements in itertools.cycle(again):
            call = version + 1, [*statements, bump(version + 1)]
            if self._takes(call[1]):
                yield call
                version += 1

    def _takes(self, statements: Sequence[str]) -> bool:
        execute = self._connection.execute
        if statements[0].startswith("PRAGMA"):
            execute(statements[0])
            return True
        execute("BEGIN")
        try:
            for statement in statements:
                execute(statement)
        except sqlite3.Error:
            execute("ROLLBACK")
            return False
        execute("COMMIT")
        return True


def ends(version: int, statements: Sequence[str]) -> bool:
    """Whether the change bumps, as most do."""
    return statements[-1] == bump(version)


def with_ballast(calls: Iterator[Call]) -> Iterator[Call]:
    """``calls`` with a row of BALLAST_SIZE bytes for every such amount of statements."""
    size = 0
    for number, (version, statements) in enumerate(calls):
        if number == 0:
            yield version, ["CREATE TABLE ballast (body BLOB)", *statements]
            continue
        size += sum(map(len, statements))
        if size > BALLAST_SIZE and ends(version, statements):
            size -= BALLAST_SIZE
            body = os.urandom(BALLAST_SIZE // 2).hex()
            statements = [f"INSERT INTO ballast VALUES ('{body}')", *statements]
        yield version, statements


def record(path: Path, calls: Iterator[Call], size: int) -> tuple[str, int]:
    """Write a backup of ``size`` bytes of ``calls``; its URL and number of changes."""
    backend = FileBackend(f"file://{path}")
    with unflushed():
        backend.create(None)
        backend.open()
        session = Session(backend, "")
        for version, statements in calls:
            session.write(Change(version, None, statements))
            if backend.log_size >= size:
                break
        count = backend.version_count
        backend.close()
    sync_all()
    return backend.url, count


class Node(HookCaller):
    """lightningd's side: calls the hook at its pace, and may ask for a compaction meanwhile."""

    def __init__(self, directory: Path, calls: Iterator[Call]) -> None:
        super().__init__(directory, PLUGIN)
        self._calls = calls
        self._numbers = itertools.count()
        self._received = b""
        self.answers: dict[str, Any] = {}
        self.peaks_mib: dict[str, float] = {}
        self._wait(self._send("getmanifest", {"allow-deprecated-apis": False}))

    def _send(self, method: str, params: dict[str, Any]) -> str:
        number = next(self._numbers)
        view = memoryview(encode(method, params, number))
        while view:
            view = view[os.write(self._in, view) :]
        return f"cln:{method}#{number}"

    def _receive(self) -> None:
        data = os.read(self._out, 65536)
        if not data:
            sys.exit("the plugin is gone")
        *messages, self._received = (self._received + data).split(b"\n\n")
        for message in map(json.loads, filter(None, messages)):
            if "error" in message:
                sys.exit(f"the plugin refused: {message}")
            if "id" in message:
                self.answers[message["id"]] = message["result"]

    def _wait(self, request: str) -> Any:
        while request not in self.answers:
            self._receive()
        return self.answers.pop(request)

    def commit(self) -> float:
        """One change; the seconds until its acknowledgement."""
        version, statements = next(self._calls)
        started = time.perf_counter()
        self._wait(self._send("db_write", {"data_version": version, "writes": statements}))
        took_s = time.perf_counter() - started
        pause_until = started + PACE_S
        while (left_s := pause_until - time.perf_counter()) > 0:
            if select.select([self._out], [], [], left_s)[0]:
                self._receive()
        return took_s

    def quiet(self, count: int) -> list[float]:
        """The waits of ``count`` changes while nothing else happens."""
        return [self.commit() for _ in range(count)]

    def compact(self) -> tuple[list[float], float]:
        """The waits of all changes during a compaction, and the seconds it took."""
        started = time.perf_counter()
        request = self._send("backup-compact", {})
        waits = []
        while request not in self.answers:
            waits.append(self.commit())
            if len(waits) % 32 == 0:
                self._note_peaks()
        self.answers.pop(request)
        return waits, time.perf_counter() - started

    def _note_peaks(self) -> None:
        pid = self.process.pid
        for name in glob.glob(f"/proc/{pid}/task/*/children"):
            with contextlib.suppress(OSError):
                for child in Path(name).read_text().split():
                    self._note_peak("compacting process", child)
        self._note_peak("plugin", str(pid))

    def _note_peak(self, what: str, pid: str) -> None:
        with contextlib.suppress(OSError):
            found = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()
            if found:
                self.peaks_mib[what] = max(self.peaks_mib.get(what, 0), int(found[0]) / 1024)


@dataclass
class Waits:
    """What the hook took, in seconds, without a compaction and during one."""

    quiet: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)

    def row(self, what: str, figure: Any) -> Row:
        """One line of the table, which says whether the aim is met."""
        during_ms, quiet_ms = 1000 * figure(self.during), 1000 * figure(self.quiet)
        over = "" if during_ms - quiet_ms <= AIM_MS else ": missed"
        return Row(
            f"hook round trip during a compaction, {what}",
            f"{during_ms:.2f} ms",
            f"{quiet_ms:.2f} ms without one",
            note=f"{len(self.during)} changes; aim: at most {AIM_MS:.0f} ms more{over}",
        )


def per_mille_999(values: Sequence[float]) -> float:
    """The value that 99.9 % of ``values`` do not exceed."""
    return sorted(values)[int(len(values) * 0.999)]


def measure(scratch: Path, calls: Iterator[Call], size: int, kind: str) -> list[Row]:
    """All rows for one backup."""
    url, count = record(scratch / "compaction.bkp", calls, size)
    what = f"{count} changes, {size >> 20} MiB, {kind}"
    before = run_measured(CLI, "restore", url, scratch / "before.sqlite3")
    (scratch / "before.sqlite3").unlink()
    floor_s = float(run_measured(FLOOR, url, scratch / "floor.sqlite3").output)
    waits, took_s, peaks = under_traffic(scratch, url, calls)
    after = run_measured(CLI, "restore", url, scratch / "after.sqlite3")
    peak = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in sorted(peaks.items()))
    missed = "" if max(peaks.values()) <= MAX_PEAK_MIB else ": missed"
    return [
        Row(
            f"compaction beside a busy node, {what}",
            f"{took_s:.2f} s",
            f"{floor_s:.2f} s, sqlite3 executing the statements",
            took_s / floor_s,
            note=f"peak memory: {peak} (limit {MAX_PEAK_MIB}){missed}",
        ),
        waits.row("longest", max),
        waits.row("99.9th percentile", per_mille_999),
        Row(
            "restore after a compaction",
            f"{after.took_s:.2f} s",
            f"{before.took_s:.2f} s before",
            after.took_s / before.took_s,
        ),
    ]


def under_traffic(
    scratch: Path, url: str, calls: Iterator[Call]
) -> tuple[Waits, float, dict[str, float]]:
    """Waits, seconds and peak memory of a compaction while a node commits ``calls``."""
    node = Node(node_dir(scratch, "node", url), calls)
    waits = Waits()
    gc.disable()
    try:
        node.commit()  # Opens the backup: the bench of the start measures that.
        node.quiet(WARM_UP_CALLS)
        waits.during, took_s = node.compact()
        # As many as during the compaction: else their longest could not be compared.
        waits.quiet = node.quiet(len(waits.during))
    finally:
        gc.enable()
    node.close()
    return waits, took_s, node.peaks_mib


def run(options: Options) -> list[Row]:
    """The longest of the traces."""
    trace = max(options.traces, key=lambda folder: (folder / TRACE_FILE).stat().st_size)
    rows: list[Row] = []
    for kind in ("a small database", "half of it rows that stay"):
        scratch = options.scratch / f"compaction-{len(rows)}"
        scratch.mkdir()
        calls = Replica(trace).calls()
        if rows:
            calls = with_ballast(calls)
        rows += measure(scratch, calls, options.backup_mib * MIB, kind)
    return rows
