"""From the plugin's start to its first acknowledgement, whatever the length of the log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from backend import bump
from bench.common import MIB, PLUGIN, Call, Options, Row, median_of, median_ratio, node_dir, pairs
from bench.common import record as record_backup
from bench.hook import FLOOR, encode, start
from filebackend import FileBackend

BODY = "x" * 1000
"""Half of the changes of a node have about 1 kB."""


def change(version: int) -> Call:
    """A made-up commit to ``version``."""
    return version, [f"INSERT INTO items VALUES ({version}, '{BODY}')", bump(version)]


def first_acknowledgement(directory: Path, call: Call, *words: object) -> tuple[float, str]:
    """Seconds from the start of the plugin ``words`` to its answer, and its peak memory."""
    version, statements = call
    message = encode("db_write", {"data_version": version, "writes": statements}, 1)
    started = time.perf_counter()
    plugin = start(directory, *words)
    plugin.call(message)
    took_s = time.perf_counter() - started
    peak = ""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{plugin.process.pid}/status").read_text()
        peak = f"{int(status.partition('VmHWM:')[2].split()[0]) / 1024:.0f} MiB"
    plugin.close()
    return took_s, peak


class Starts:
    """The three kinds of start, each measurable again and again.

    Attributes:
        peak: of the last start on the long log.
    """

    def __init__(self, scratch: Path, changes: int) -> None:
        self.scratch = scratch
        self.log = scratch / "long.bkp"
        long_url = record_backup(self.log, [[change(n) for n in range(1, changes + 1)]])
        self._long = node_dir(scratch, "long", long_url)
        self._space = scratch / "floor.bin"
        self._space.write_bytes(bytes(MIB))
        self._version = changes
        self._number = 0
        self.peak = ""

    def floor(self) -> float:
        """The plugin that only writes and flushes."""
        return first_acknowledgement(self.scratch, change(1), FLOOR, self._space)[0]

    def empty(self) -> float:
        """Ours, on a new empty backup."""
        self._number += 1
        url = f"file://{self.scratch}/empty-{self._number}.bkp"
        FileBackend(url).create(None)
        directory = node_dir(self.scratch, f"empty-{self._number}", url)
        return first_acknowledgement(directory, change(1), PLUGIN)[0]

    def long(self) -> float:
        """Ours, on the long log; each start adds a change."""
        self._version += 1
        took_s, self.peak = first_acknowledgement(self._long, change(self._version), PLUGIN)
        return took_s


def run(options: Options) -> list[Row]:
    """An empty log against the floor, a long one against the empty one."""
    scratch = options.scratch / "start"
    scratch.mkdir()
    starts = Starts(scratch, options.changes)
    rounds = 3 * options.rounds
    return list(_rows(starts, options.changes, rounds))


def _rows(starts: Starts, changes: int, rounds: int) -> Iterator[Row]:
    what = "start to first acknowledgement"
    results = pairs(rounds, starts.empty, starts.floor)
    yield _row(f"{what}, empty log", results, "a plugin that only writes and flushes", "")
    results = pairs(rounds, starts.long, starts.empty)
    size_mb = starts.log.stat().st_size / 1e6
    note = f"log of {size_mb:.0f} MB, peak memory {starts.peak or 'unknown'}"
    yield _row(f"{what}, {changes} changes", results, "the empty log", note)


def _row(what: str, results: list[tuple[float, float]], floor: str, note: str) -> Row:
    return Row(
        what,
        f"{median_of([own for own, _ in results]) * 1000:.0f} ms",
        f"{median_of([against for _, against in results]) * 1000:.0f} ms, {floor}",
        median_ratio(results),
        None,
        note,
    )
