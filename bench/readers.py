"""A change to a server while 15 readers take its backup, against one while nobody does."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import protocol
from bench.common import (
    PLUGIN,
    ROOT,
    Options,
    Row,
    committed,
    median_of,
    node_dir,
    percentile,
    record,
    sessions_of,
)
from bench.hook import start, with_and_without
from bench.remote import our_server
from protocol import PacketType
from tests.peers import free_port

READERS = 15
CHANGES = 100
"""Sent beside the readers, and as many without them, in turn."""
TARGET = 3.0


def read_for_ever(port: int, version: int) -> None:
    """Take the backup at ``port`` again and again by protocol ``version``."""
    request, end = protocol.encode(PacketType.RESTORE), protocol.encode(PacketType.DONE)
    if version == 2:
        request = protocol.encode_request_metadata() + request
    print("reading", flush=True)
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(request)
            tail = b""
            while tail != end and (data := sock.recv(1 << 20)):
                tail = (tail + data)[-len(end) :]


@contextlib.contextmanager
def readers(port: int, version: int) -> Iterator[None]:
    """That many at work, in a process of their own."""
    words = sys.executable, "-m", "bench.readers", str(port), str(version)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(READERS):
            process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def row(options: Options, version: int) -> Row:
    """The median of a change beside readers of protocol ``version``, against it without."""
    scratch = options.scratch / f"readers-{version}"
    scratch.mkdir()
    changes = committed(sessions_of(options.traces[0]))
    half = len(changes) // 2
    url, port = record(scratch / "readers.bkp", [changes[:half]]), free_port()
    with our_server(url, port):
        node = start(node_dir(scratch, "node", f"socket:127.0.0.1:{port}"), PLUGIN)
        beside, quiet = with_and_without(
            node, changes[half:], CHANGES, options.rounds, lambda: readers(port, version)
        )
        node.close()
    return Row(
        f"change beside {READERS} readers of protocol {version}",
        f"{median_of(beside) * 1000:.2f} ms",
        f"{median_of(quiet) * 1000:.2f} ms without them",
        median_of(beside) / median_of(quiet),
        TARGET,
        f"p99 {percentile(beside, 99) * 1000:.1f} ms",
    )


def run(options: Options) -> list[Row]:
    """All of it."""
    return [row(options, version) for version in (1, 2)]


if __name__ == "__main__":
    for _ in range(READERS):
        threading.Thread(target=read_for_ever, args=tuple(map(int, sys.argv[1:]))).start()
