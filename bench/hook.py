"""How long the node waits for one change, against the least that a plugin can do."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench.common import (
    MIB,
    PLUGIN,
    Call,
    Options,
    Row,
    committed,
    median_of,
    node_dir,
    payload_size,
    percentile,
    sessions_of,
    sync_all,
)
from filebackend import FileBackend

FLOOR = Path(__file__).with_name("floor_plugin.py")
LOOP = Path(__file__).with_name("floor_loop.py")
MAX_CHANGES = 4000
"""Changes of one trace; more of a long one would measure the same."""
TARGET = 1.25
PACES: tuple[tuple[float, float | None], ...] = ((0.0, None), (0.002, None), (0.01, 1.1))
"""Seconds between two changes of one plugin, 0.01 at a busy node, and the target."""
PACED_CHANGES = 200
"""Changes of one trace at one pace."""


class HookCaller:
    """A plugin's process, called with messages that were encoded before the clock runs."""

    def __init__(self, directory: Path, *words: object) -> None:
        environment = dict(os.environ, LIGHTNINGD_PLUGIN="1", LIGHTNINGD_VERSION="v26.06")
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()

    def call(self, message: bytes) -> float:
        """Send a request; the seconds until its answer, which must be no error."""
        started = time.perf_counter()
        view = memoryview(message)
        while view:
            view = view[os.write(self._in, view) :]
        received = b""
        while b'"result"' not in received or not received.endswith(b"\n\n"):
            data = os.read(self._out, 65536)
            if not data or b'"error"' in data:
                sys.exit(f"a plugin did not acknowledge: {(received + data)[:1000]!r}")
            received += data
        return time.perf_counter() - started

    def close(self) -> None:
        """Close stdin and wait for the end."""
        os.close(self._in)
        self.process.stdin = None
        self.process.communicate()


def encode(method: str, params: dict[str, Any], number: int) -> bytes:
    """A request as lightningd sends it."""
    message = {"jsonrpc": "2.0", "id": f"cln:{method}#{number}", "method": method}
    return json.dumps({**message, "params": params}, ensure_ascii=False).encode() + b"\n\n"


def messages(calls: Sequence[Call]) -> list[bytes]:
    """The requests for ``calls``."""
    return [
        encode("db_write", {"data_version": version, "writes": statements}, number)
        for number, (version, statements) in enumerate(calls)
    ]


def start(directory: Path, *words: object) -> HookCaller:
    """A plugin that has answered getmanifest."""
    caller = HookCaller(directory, *words)
    caller.call(encode("getmanifest", {"allow-deprecated-apis": False}, 0))
    return caller


def with_and_without(
    caller: HookCaller,
    calls: Sequence[Call],
    each: int,
    rounds: int,
    beside: Callable[[], AbstractContextManager[object]],
) -> Times:
    """Seconds of ``each`` calls while ``beside`` is at work and of as many without, in turn.

    The first call, which is another one, is not counted.
    """
    times: Times = [], []
    left = iter(messages(calls))
    caller.call(next(left))
    for _ in range(rounds):
        times[1].extend(caller.call(next(left)) for _ in range(each))
        with beside():
            times[0].extend(caller.call(next(left)) for _ in range(each))
    return times


Times = tuple[list[float], list[float]]
"""Seconds of each call: ours, and what it is measured against."""


def in_turn(callers: Sequence[HookCaller], calls: Sequence[Call], pause_s: float = 0.0) -> Times:
    """Send ``calls`` to both of ``callers``, changing who goes first, so that drift cancels.

    Args:
        pause_s: between two calls of the same; the other's comes in the middle.
    """
    times: Times = [], []
    for number, message in enumerate(messages(calls)):
        first = number % 2
        for which in (first, 1 - first):
            if pause_s:
                time.sleep(pause_s / 2)
            times[which].append(callers[which].call(message))
    return times


def measure(
    scratch: Path, calls: Sequence[Call], program: Path = FLOOR, pause_s: float = 0.0
) -> Times:
    """Seconds of each of ``calls`` in our plugin and in the floor ``program``, called in turn."""
    url = f"file://{scratch}/hook.bkp"
    FileBackend(url).create(None)
    ours = start(node_dir(scratch, "hook-node", url), PLUGIN)
    space = scratch / "floor.bin"
    space.write_bytes(bytes(payload_size(calls) + MIB))
    sync_all()
    floor = start(scratch, program, space)
    times = in_turn((ours, floor), calls, pause_s)
    ours.close()
    floor.close()
    return times


def over_traces(
    options: Options,
    name: str,
    most: int,
    measure_trace: Callable[[Path, Sequence[Call]], Times],
) -> Times:
    """The times of ``most`` changes of each trace; not of the first, which opens the backup.

    All of it several times: how the system places a process shows in all that it does.
    """
    times: Times = [], []
    for trace in options.traces:
        calls = committed(sessions_of(trace))[:most]
        for number in range(options.rounds):
            scratch = options.scratch / f"{name}-{trace.name}-{number}"
            scratch.mkdir()
            found = measure_trace(scratch, calls)
            for which in (0, 1):
                times[which].extend(found[which][1:])
    return times


def round_trip_rows(what: str, times: Times, floor: str, target: float | None) -> list[Row]:
    """Median, which has the target, and 99th percentile."""
    rows = []
    for name, figure, aim in (
        ("median", median_of, target),
        ("99th percentile", lambda values: percentile(values, 99), None),
    ):
        own, against = map(figure, times)
        rows.append(
            Row(
                f"{what}, {name}, {len(times[0])} changes",
                f"{own * 1000:.3f} ms",
                f"{against * 1000:.3f} ms, {floor}",
                own / against,
                aim,
            )
        )
    return rows


def paced_row(options: Options, pause_s: float, target: float | None) -> Row:
    """The median when changes come at a pace, against a loop without pyln-client."""
    name = f"{pause_s * 1000:.0f} ms between changes"
    measure_trace = functools.partial(measure, program=LOOP, pause_s=pause_s)
    times = over_traces(options, f"hook-{pause_s}", PACED_CHANGES, measure_trace)
    floor = "a bare loop that only writes and flushes"
    return round_trip_rows(f"hook round trip, {name}", times, floor, target)[0]


def run(options: Options) -> list[Row]:
    """Median and 99th percentile over all recorded changes, and medians at each pace."""
    times = over_traces(options, "hook", MAX_CHANGES, measure)
    floor = "a plugin that only writes and flushes"
    rows = round_trip_rows("hook round trip", times, floor, TARGET)
    return rows + [paced_row(options, *pace) for pace in PACES]
