"""Protocol 2 against protocol 1: bytes on the wire, and the round trip of one change."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import protocol
from backend import CHAIN_SIZE, Change, chain_after
from bench.common import (
    CLI,
    PLUGIN,
    ROOT,
    Call,
    Options,
    Row,
    median_of,
    median_ratio,
    node_dir,
    sessions_of,
    sync_all,
)
from bench.hook import Times, in_turn, over_traces, start
from bench.remote import MAX_CHANGES, our_server
from filebackend import FileBackend
from filelog import layout2
from tests.peers import free_port

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
        head = layout2.BEFORE_FIRST._replace(
            kind=layout2.Kind.CHANGE,
            flags=layout2.BUMPS if change.bumps else 0,
            version=version,
            time_ns=time.time_ns(),
            session=session,
            chain_before=before,
            chain=chain,
        )
        ours += len(packer.pack(head, change.payload))
        plain += len(protocol.encode_change(change))
    return ours, plain


def measure(scratch: Path, calls: Sequence[Call]) -> Times:
    """Seconds of each of ``calls`` in protocol 2 and in protocol 1, called in turn."""
    with contextlib.ExitStack() as stack:
        plugins = []
        for name, program in (("two", ()), ("one", ("-c", PROTOCOL_1))):
            url, port = f"file://{scratch}/{name}.bkp", free_port()
            FileBackend(url).create(None)
            stack.enter_context(our_server(url, port, *program))
            directory = node_dir(scratch, f"{name}-node", f"socket:127.0.0.1:{port}")
            plugins.append(start(directory, PLUGIN))
        sync_all()
        times = in_turn(plugins, calls)
        for plugin in plugins:
            plugin.close()
    return times


def run(options: Options) -> list[Row]:
    """Bytes over all recorded sessions; the median of a round trip over their changes."""
    ours = plain = count = 0
    for trace in options.traces:
        for calls in sessions_of(trace):
            own, other = sent(calls)
            ours, plain, count = ours + own, plain + other, count + len(calls)
    two, one = over_traces(options, "wire", MAX_CHANGES, measure)
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
