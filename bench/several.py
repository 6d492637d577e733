"""Several destinations: a change against the slower one alone, a stalled one, catching up."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from backend import Snapshot
from bench.common import (
    CLI,
    MIB,
    PLUGIN,
    ROOT,
    Call,
    Options,
    Row,
    median_of,
    median_ratio,
    node_dir,
    pairs,
    run_measured,
    sync_all,
)
from bench.hook import Times, in_turn, over_traces, round_trip_rows, start
from bench.remote import is_open, our_server
from filebackend import FileBackend
from tests.peers import free_port

MAX_CHANGES = 1000
BOTH_TARGET = 1.15
STALLED_TARGET = 1.1
COPY_TARGET = 2.0


def several(scratch: Path, name: str, acks: int, *urls: str) -> Path:
    """A node's network directory with a new backup at ``urls``."""
    directory = scratch / name / "regtest"
    directory.mkdir(parents=True)
    run_measured(CLI, "init", "--lightning-dir", directory, "--acks", acks, *urls)
    return directory


def new_server(scratch: Path, name: str) -> tuple[str, str, int]:
    """URL of a new, empty file, URL of the server that is to keep it, and its port."""
    url, port = f"file://{scratch}/{name}.bkp", free_port()
    FileBackend(url).create(None)
    return url, f"socket:127.0.0.1:{port}", port


def both_against_the_slower(scratch: Path, calls: Sequence[Call]) -> Times:
    """A file and a server, both acknowledging; a server alone."""
    files = [new_server(scratch, name) for name in ("one", "alone")]
    with our_server(files[0][0], files[0][2]), our_server(files[1][0], files[1][2]):
        both = several(scratch, "both", 2, f"file://{scratch}/two.bkp", files[0][1])
        callers = start(both, PLUGIN), start(node_dir(scratch, "alone", files[1][1]), PLUGIN)
        sync_all()
        times = in_turn(callers, calls)
        for caller in callers:
            caller.close()
    return times


def with_a_stalled_third(scratch: Path, calls: Sequence[Call]) -> Times:
    """Two of three acknowledge, the third stands still; two of two."""
    url, socket_url, port = new_server(scratch, "third")
    files = [f"file://{scratch}/{name}.bkp" for name in "abcd"]
    words = (CLI, "server", "--log-level", "warning", url, f"127.0.0.1:{port}")
    process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.DEVNULL)
    try:
        while not is_open(port):
            if process.poll() is not None:
                sys.exit("the server did not start")
        three = several(scratch, "three", 2, *files[:2], socket_url)
        callers = start(three, PLUGIN), start(several(scratch, "two", 2, *files[2:]), PLUGIN)
        in_turn(callers, calls[:10])
        process.send_signal(signal.SIGSTOP)
        sync_all()
        times = in_turn(callers, calls[10:])
        for caller in callers:
            caller.process.kill()
            caller.process.wait()
        return times
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


CATCH_UP = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from destinations import backend_for
from several.catchup import CatchUp, stand
from several.hearing import end_of
began = time.perf_counter()
source, target = backend_for(sys.argv[2]), backend_for(sys.argv[3])
target.create(None)
target.open()
found = stand(end_of(target.newest), target.newest.tag, source)
CatchUp(target, threading.Lock(), bytes(16), True).bring(source, found)
target.close()
print(time.perf_counter() - began)
"""
COPY = """
import os, sys, shutil, time
began = time.perf_counter()
shutil.copyfile(*sys.argv[1:])
os.sync()
print(time.perf_counter() - began)
"""


def catching_up_row(options: Options) -> Row:
    """A new destination that gets the whole backup, against a plain copy of its file.

    Without the start of either process: the plugin that does it runs already.
    """
    scratch = options.scratch / "several-copy"
    scratch.mkdir()
    programs = {}
    for name, code in (("catch_up", CATCH_UP), ("plain_copy", COPY)):
        programs[name] = scratch / f"{name}.py"
        programs[name].write_text(code)
    database, path, peak = scratch / "node.sqlite3", scratch / "whole.bkp", 0.0
    big_database(database, options.backup_mib)
    FileBackend(f"file://{path}").create(Snapshot(str(database), 1))

    def ours() -> float:
        nonlocal peak
        new = scratch / "new.bkp"
        done = run_measured(programs["catch_up"], ROOT, f"file://{path}", f"file://{new}")
        peak = max(peak, done.peak_mib)
        for each in scratch.glob("new.bkp*"):
            each.unlink()
        return float(done.output)

    def plain() -> float:
        done = run_measured(programs["plain_copy"], path, scratch / "copy.bkp")
        return float(done.output)

    results = pairs(options.rounds, ours, plain)
    return Row(
        f"a new destination gets {path.stat().st_size // MIB} MiB",
        f"{median_of([own for own, _ in results]):.2f} s",
        f"{median_of([against for _, against in results]):.2f} s, a plain copy",
        median_ratio(results),
        COPY_TARGET,
        f"peak {peak:.0f} MiB",
    )


def big_database(path: Path, size_mib: int) -> None:
    """A database of about ``size_mib``."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)")
        connection.execute("INSERT INTO vars VALUES ('data_version', 1)")
        connection.execute("CREATE TABLE filler (x BLOB)")
        for _ in range(size_mib):
            connection.execute("INSERT INTO filler VALUES (randomblob(1 << 20))")
        connection.commit()


def run(options: Options) -> list[Row]:
    """All of it."""
    both = over_traces(options, "several", MAX_CHANGES, both_against_the_slower)
    stalled = over_traces(options, "stalled", MAX_CHANGES, with_a_stalled_third)
    rows = round_trip_rows("file + server", both, "the server alone", BOTH_TARGET)
    # Both figures have this target.
    rows += [
        dataclasses.replace(row, target=STALLED_TARGET)
        for row in round_trip_rows("a stalled third", stalled, "two without it", None)
    ]
    return [*rows, catching_up_row(options)]
