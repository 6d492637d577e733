"""Protocol 2 against protocol 1: bytes on the wire, and the round trip of one change."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import protocol
import records
from backend import CHAIN_SIZE, Change, chain_after
from bench.common import (
    CLI,
    PLUGIN,
    ROOT,
    Call,
    Options,
    Row,
    committed,
    median_of,
    median_ratio,
    node_dir,
    sessions_of,
    sync_all,
)
from bench.hook import messages, start
from filebackend import FileBackend

MAX_CHANGES = 2000
"""Changes of one trace; more of a long one would measure the same."""
BYTES_TARGET = 0.5
TIME_TARGET = 1.0
PROTOCOL_1 = (
    "import runpy, sys\n"
    f"sys.path.insert(0, {str(ROOT)!r})\n"
    "import protocol\n"
    "protocol.agreed_protocol = lambda payload: 1\n"
    f"sys.argv = [{str(CLI)!r}, *sys.argv[1:]]\n"
    f"runpy.run_path({str(CLI)!r}, run_name='__main__')\n"
)
"""The server, but it agrees on protocol 1 whatever is offered."""


def sent(calls: Sequence[Call]) -> tuple[int, int]:
    """Bytes of one session of ``calls`` in protocol 2, and with zlib level 6 a change."""
    packer, session = protocol.RecordPacker(), secrets.token_bytes(16)
    chain = secrets.token_bytes(CHAIN_SIZE)
    ours = plain = 0
    for version, statements in calls:
        change = Change(version, None, statements)
        before, chain = chain, chain_after(chain, version, change.payload)
        head = records.BEFORE_FIRST._replace(
            kind=records.Kind.CHANGE,
            flags=records.BUMPS if change.bumps else 0,
            version=version,
            time_ns=time.time_ns(),
            session=session,
            chain_before=before,
            chain=chain,
        )
        ours += len(packer.pack(head, change.payload))
        plain += len(protocol.encode_change(change))
    return ours, plain


@contextlib.contextmanager
def server(scratch: Path, name: str, *words: object) -> Iterator[str]:
    """A server of an empty backup, started by ``words``; its URL."""
    url = f"file://{scratch}/{name}.bkp"
    FileBackend(url).create(None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, *map(str, words), "server", "--log-level", "notice", url, address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "serving" in line:
            break
    else:
        sys.exit("the server did not start")
    try:
        yield f"socket:{address}"
    finally:
        process.terminate()
        process.communicate()


def measure(scratch: Path, calls: Sequence[Call]) -> tuple[list[float], list[float]]:
    """Seconds of each of ``calls`` in protocol 2 and in protocol 1, called in turn."""
    with (
        server(scratch, "two", CLI) as two,
        server(scratch, "one", "-c", PROTOCOL_1) as one,
    ):
        plugins = [
            start(node_dir(scratch, f"{name}-node", url), PLUGIN)
            for name, url in (("two", two), ("one", one))
        ]
        sync_all()
        times: tuple[list[float], list[float]] = [], []
        for number, message in enumerate(messages(calls)):
            first = number % 2
            for which in (first, 1 - first):
                times[which].append(plugins[which].call(message))
        for plugin in plugins:
            plugin.close()
    return times


def run(options: Options) -> list[Row]:
    """Bytes over all recorded sessions; the median of a round trip over their changes."""
    ours = plain = count = 0
    two: list[float] = []
    one: list[float] = []
    for trace in options.traces:
        sessions = sessions_of(trace)
        for calls in sessions:
            own, other = sent(calls)
            ours, plain, count = ours + own, plain + other, count + len(calls)
        scratch = options.scratch / f"wire-{trace.name}"
        scratch.mkdir()
        times = measure(scratch, committed(sessions)[:MAX_CHANGES])
        # The first call connects.
        two += times[0][1:]
        one += times[1][1:]
    return [
        Row(
            f"bytes on the wire, {count} changes",
            f"{ours / count:.0f} bytes a change",
            f"{plain / count:.0f} bytes, zlib level 6 for each",
            ours / plain,
            BYTES_TARGET,
        ),
        Row(
            f"remote round trip, median, {len(two)} changes",
            f"{median_of(two) * 1000:.3f} ms",
            f"{median_of(one) * 1000:.3f} ms in protocol 1",
            median_ratio(list(zip(two, one, strict=True))),
            TIME_TARGET,
        ),
    ]
