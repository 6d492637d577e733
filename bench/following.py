"""What it costs the node that somebody follows its backup, and whether they keep up."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.common import (
    PLUGIN,
    ROOT,
    Call,
    Options,
    Row,
    committed,
    median_of,
    node_dir,
    percentile,
    record,
    sessions_of,
)
from bench.hook import messages, start, with_and_without
from bench.remote import our_server
from destinations import backend_for
from replica import Pause
from tests.peers import free_port

MAX_CHANGES = 200
"""Sent while one follows, and as many while nobody does, in turn; fewer of a short trace."""
TARGET = 1.2
KEEPS_UP = 1.1
"""All has come by then, as a multiple of the time that the node took."""


def follow_for_ever(url: str, last_version: int) -> None:
    """Follow ``url``; say when all that was there has come, and when that version has."""
    with backend_for(url).follow(None) as records:
        said = False
        for each in records:
            if not isinstance(each, Pause) and each[0].version == last_version:
                print(time.monotonic(), flush=True)
            elif isinstance(each, Pause) and not said:
                said = True
                print("in step", flush=True)


@contextlib.contextmanager
def follower(url: str, last_version: int = -1) -> Iterator[subprocess.Popen[bytes]]:
    """One that is in step, in a process of its own."""
    words = sys.executable, "-m", "bench.following", url, str(last_version)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def destination(scratch: Path, kind: str, begins: Sequence[Call]) -> Iterator[str]:
    """The URL of a file with the changes ``begins``, or of the server that keeps it."""
    url, port = record(scratch / f"{kind}.bkp", [begins]), free_port()
    if kind == "file":
        yield url
        return
    with our_server(url, port):
        yield f"socket:127.0.0.1:{port}"


def cost(scratch: Path, kind: str, calls: Sequence[Call], rounds: int) -> Row:
    """The median of a change while one follows, against it while nobody does."""
    half = len(calls) // 2
    each = min(MAX_CHANGES, (half - 1) // (2 * rounds))
    with destination(scratch, kind, calls[:half]) as url:
        node = start(node_dir(scratch, f"{kind}-node", url), PLUGIN)
        beside, quiet = with_and_without(node, calls[half:], each, rounds, lambda: follower(url))
        node.close()
    return Row(
        f"change to a {kind} that is followed, {len(beside)} changes",
        f"{median_of(beside) * 1000:.3f} ms",
        f"{median_of(quiet) * 1000:.3f} ms without",
        median_of(beside) / median_of(quiet),
        TARGET,
        f"p99 {percentile(beside, 99) * 1000:.1f} ms, {percentile(quiet, 99) * 1000:.1f} without",
    )


def keeps_up(scratch: Path, kind: str, calls: Sequence[Call]) -> Row:
    """When the last of ``calls`` has come, against when the node had written it."""
    with destination(scratch, kind, calls[:1]) as url:
        node = start(node_dir(scratch, f"{kind}-node", url), PLUGIN)
        with follower(url, calls[-1][0]) as process:
            began = time.monotonic()
            for message in messages(calls[1:]):
                node.call(message)
            took = time.monotonic() - began
            assert process.stdout is not None
            came = float(process.stdout.readline()) - began
        node.close()
    rate = len(calls) / took
    return Row(
        f"followed at the node's top rate, {kind}, {len(calls)} changes",
        f"{came:.2f} s",
        f"{took:.2f} s, {rate:.0f} changes a second",
        came / took,
        KEEPS_UP,
    )


def run(options: Options) -> list[Row]:
    """Both, of a file and of a server, by the longest trace."""
    calls = max((committed(sessions_of(trace)) for trace in options.traces), key=len)
    rows = []
    for kind in ("file", "socket"):
        scratch = options.scratch / f"following-{kind}"
        scratch.mkdir()
        rows.append(cost(scratch, kind, calls, options.rounds))
        scratch = options.scratch / f"keeping-up-{kind}"
        scratch.mkdir()
        rows.append(keeps_up(scratch, kind, calls))
    return rows


if __name__ == "__main__":
    follow_for_ever(sys.argv[1], int(sys.argv[2]))
