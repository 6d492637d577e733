"""A remote backup over loopback: a change, a change over a long line, a restore."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.common import (
    CLI,
    MIB,
    PLUGIN,
    TRACE_FILE,
    Call,
    Options,
    Row,
    committed,
    median_of,
    median_ratio,
    node_dir,
    pairs,
    payload_size,
    record,
    run_measured,
    sessions_of,
    sync_all,
)
from bench.hook import Times, in_turn, messages, over_traces, round_trip_rows, start
from filebackend import FileBackend
from tests.cutproxy import CutProxy
from tests.peers import free_port

FLOOR = Path(__file__).with_name("floor_remote.py")
MAX_CHANGES = 2000
"""Changes of one trace; more of a long one would measure the same."""
LONG_LINE_CHANGES = 100
DELAY_S = 0.02
"""Added to every round trip."""
CHANGE_TARGET = 1.4
RESTORE_TARGET = 1.3
ROUND_TRIPS_TARGET = 1.5
"""Anything near 2 is a second round trip."""
START_S = 20.0


@contextlib.contextmanager
def serving(port: int, *words: object) -> Iterator[None]:
    """Run a server with this Python until the block ends."""
    process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not is_open(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{words[0]} did not start")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait()


def is_open(port: int) -> bool:
    """Whether something listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def our_server(url: str, port: int, *program: object) -> contextlib.AbstractContextManager[None]:
    """``backup-cli server``, or ``program`` in its place, for the backup at ``url``."""
    words = ("server", "--log-level", "warning", "--compact", "off", url, f"127.0.0.1:{port}")
    return serving(port, *(program or (CLI,)), *words)


def measure_changes(scratch: Path, calls: Sequence[Call]) -> Times:
    """Seconds of each of ``calls`` through ours and through the floor, called in turn."""
    url, ports = f"file://{scratch}/remote.bkp", (free_port(), free_port())
    FileBackend(url).create(None)
    space = scratch / "floor.bin"
    space.write_bytes(bytes(payload_size(calls) + MIB))
    sync_all()
    directory = node_dir(scratch, "remote-node", f"socket:127.0.0.1:{ports[0]}")
    with our_server(url, ports[0]), serving(ports[1], FLOOR, "server", ports[1], space):
        callers = start(directory, PLUGIN), start(scratch, FLOOR, "plugin", ports[1])
        times = in_turn(callers, calls)
        for caller in callers:
            caller.close()
    return times


def long_line_row(options: Options) -> Row:
    """What a change costs more when the line is longer, in round trips."""
    medians = []
    for delay_s in (0.0, DELAY_S):
        scratch = options.scratch / f"remote-delay-{delay_s}"
        scratch.mkdir()
        url, port = f"file://{scratch}/remote.bkp", free_port()
        FileBackend(url).create(None)
        calls = committed(sessions_of(options.traces[0]))[:LONG_LINE_CHANGES]
        line = CutProxy(("127.0.0.1", port), delay_s / 2)
        with our_server(url, port), line:
            directory = node_dir(scratch, "node", f"socket:127.0.0.1:{line.port}")
            caller = start(directory, PLUGIN)
            times = [caller.call(message) for message in messages(calls)]
            caller.close()
        medians.append(median_of(times[1:]))
    return Row(
        f"remote round trip, {DELAY_S * 1000:.0f} ms added",
        f"{medians[1] * 1000:.1f} ms",
        f"{medians[0] * 1000:.1f} ms without; the ratio counts round trips a change",
        (medians[1] - medians[0]) / DELAY_S,
        ROUND_TRIPS_TARGET,
    )


def restore_row(options: Options) -> Row:
    """The longest of the traces restored from a server, against the same from its file."""
    trace = max(options.traces, key=lambda folder: (folder / TRACE_FILE).stat().st_size)
    sessions = sessions_of(trace)
    scratch = options.scratch / "remote-restore"
    scratch.mkdir()
    url, port = record(scratch / "restore.bkp", sessions), free_port()
    restored = scratch / "restored.sqlite3"

    def restore(source: str) -> float:
        done = run_measured(CLI, "restore", source, restored)
        restored.unlink()
        return done.took_s

    with our_server(url, port):
        remote = f"socket:127.0.0.1:{port}"
        results = pairs(options.rounds, lambda: restore(remote), lambda: restore(url))
    return Row(
        f"restore of {len(committed(sessions))} changes from a server",
        f"{median_of([own for own, _ in results]):.2f} s",
        f"{median_of([against for _, against in results]):.2f} s, from its file",
        median_ratio(results),
        RESTORE_TARGET,
    )


def run(options: Options) -> list[Row]:
    """All of it."""
    times = over_traces(options, "remote", MAX_CHANGES, measure_changes)
    floor = "a plugin and a server that only write and flush"
    changes = round_trip_rows("remote round trip", times, floor, CHANGE_TARGET)
    return [*changes, long_line_row(options), restore_row(options)]
