"""Restoring recorded changes, against the sqlite3 library executing the same statements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.common import (
    CLI,
    TRACE_FILE,
    Options,
    Row,
    committed,
    median_of,
    median_ratio,
    pairs,
    record,
    run_measured,
    sessions_of,
)

FLOOR = Path(__file__).with_name("floor_replay.py")
TARGET = 0.9
TARGET_CHANGES = 20_000
"""The target is for this many changes: with fewer, starting the command is much of the time."""
FLOORS = (
    ("OFF", "sqlite3 alone, no sync, no journal", TARGET),
    ("", "the same with a journal", None),
)
"""Journal mode of the floor, what to call it, and the target against it."""


def run(options: Options) -> list[Row]:
    """The longest of the traces, by the real command and all of its checks."""
    trace = max(options.traces, key=lambda folder: (folder / TRACE_FILE).stat().st_size)
    sessions = sessions_of(trace)
    changes = len(committed(sessions))
    scratch = options.scratch / "restore"
    scratch.mkdir()
    url = record(scratch / "restore.bkp", sessions)
    peaks: list[float] = []

    def ours() -> float:
        restored = scratch / "restored.sqlite3"
        done = run_measured(CLI, "restore", url, restored)
        restored.unlink()
        peaks.append(done.peak_mib)
        return done.took_s

    def floor(journal: str) -> Callable[[], float]:
        words = FLOOR, trace, scratch / "replayed.sqlite3", journal
        return lambda: float(run_measured(*words).output)

    rows = []
    note = "" if changes >= TARGET_CHANGES else f"target is for {TARGET_CHANGES}, use --trace; "
    for journal, name, target in FLOORS:
        results = pairs(options.rounds, ours, floor(journal))
        rows.append(
            Row(
                f"restore of {changes} changes",
                f"{median_of([own for own, _ in results]):.2f} s",
                f"{median_of([against for _, against in results]):.2f} s, {name}",
                median_ratio(results),
                target if changes >= TARGET_CHANGES else None,
                note + f"peak memory {max(peaks):.0f} MiB",
            )
        )
    return rows
