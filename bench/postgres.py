"""A backup in a PostgreSQL cluster, primary and standby on one disk: a change, a restore."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from backend import Change, Session
from bench.common import (
    CLI,
    TRACE_FILE,
    Call,
    Options,
    Row,
    committed,
    median_of,
    median_ratio,
    pairs,
    percentile,
    run_measured,
    sessions_of,
)
from destinations import backend_for
from tests import clusters

FLOOR = Path(__file__).with_name("floor_postgres.py")
MAX_CHANGES = 2000
TARGET_CHANGES = 20_000
"""The target of a restore: with fewer, starting the command is much of the time."""
CHANGE_TARGET = 1.3
RESTORE_TARGET = 1.2
BARE = "CREATE TABLE bare (number bigint PRIMARY KEY, payload bytea NOT NULL)"
EXTERNAL = "ALTER TABLE bare ALTER COLUMN payload SET STORAGE EXTERNAL"
INSERT = "INSERT INTO bare VALUES (%s, %s)"


def timed(url: str, calls: Sequence[Call]) -> Iterator[tuple[float, float]]:
    """Seconds of each of ``calls`` by our backend and by a bare INSERT, in turn."""
    import psycopg

    backend = backend_for(url)
    backend.create(None)
    backend.open()
    bare = psycopg.connect(f"{url}&target_session_attrs=read-write", autocommit=True)
    bare.execute("SET synchronous_commit = on")
    bare.execute(BARE)
    bare.execute(EXTERNAL)
    cursor = bare.cursor(binary=True)
    for number, (version, statements) in enumerate(calls):
        change = Change(version, None, statements)

        def ours(change: Change = change) -> float:
            began = time.perf_counter()
            backend.add_change(change)
            return time.perf_counter() - began

        def floor(number: int = number, change: Change = change) -> float:
            began = time.perf_counter()
            cursor.execute(INSERT, (number, change.payload), prepare=True)
            return time.perf_counter() - began

        if number % 2:
            against, own = floor(), ours()
        else:
            own, against = ours(), floor()
        yield own, against
    backend.close()
    bare.close()


def change_row(pair: clusters.Pair, options: Options, trace: Path) -> Row:
    """Recorded changes, each against an INSERT of the same bytes."""
    calls = committed(sessions_of(trace))[:MAX_CHANGES]
    times = list(timed(pair.url(dbname=pair.database()), calls))[len(calls) // 10 :]
    own, against = [t for t, _ in times], [t for _, t in times]
    return Row(
        f"change into a cluster ({trace.name})",
        f"{median_of(own) * 1000:.2f} ms",
        f"{median_of(against) * 1000:.2f} ms, a bare prepared INSERT",
        median_of(own) / median_of(against),
        CHANGE_TARGET,
        f"99 %: {percentile(own, 99) * 1000:.1f} ms, {percentile(against, 99) * 1000:.1f} ms",
    )


def restore_row(pair: clusters.Pair, options: Options) -> Row:
    """The longest of the traces restored, against COPY into SQLite's replay."""
    trace = max(options.traces, key=lambda folder: (folder / TRACE_FILE).stat().st_size)
    sessions = sessions_of(trace)
    url = pair.url(dbname=pair.database())
    pair.primary.configure("synchronous_standby_names", "")
    backend = backend_for(f"{url}&standbys=0")
    backend.create(None)
    for calls in sessions:
        backend.open()
        session = Session(backend, "")
        for version, statements in calls:
            session.write(Change(version, None, statements))
        backend.close()
    restored = options.scratch / "postgres-restored.sqlite3"

    def ours() -> float:
        done = run_measured(CLI, "restore", url, restored)
        restored.unlink()
        peaks.append(done.peak_mib)
        return done.took_s

    def floor() -> float:
        done = run_measured(FLOOR, url, options.scratch / "postgres-floor.sqlite3")
        return done.took_s

    peaks: list[float] = []
    results = pairs(options.rounds, ours, floor)
    changes = len(committed(sessions))
    return Row(
        f"restore of {changes} changes from a cluster",
        f"{median_of([own for own, _ in results]):.2f} s",
        f"{median_of([against for _, against in results]):.2f} s, COPY to SQLite's replay",
        median_ratio(results),
        RESTORE_TARGET if changes >= TARGET_CHANGES else None,
        f"target is for {TARGET_CHANGES} changes; peak memory {max(peaks):.0f} MiB",
    )


def run(options: Options) -> list[Row]:
    """All of it; a line that says why where PostgreSQL is missing."""
    if reason := clusters.missing():
        return [Row("a backup in a PostgreSQL cluster", "not measured", note=reason)]
    options.scratch.chmod(0o711)  # PostgreSQL runs as another user than root.
    with clusters.Pair(options.scratch / "clusters") as pair:
        rows = [change_row(pair, options, trace) for trace in options.traces]
        return [*rows, restore_row(pair, options)]
