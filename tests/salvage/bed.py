"""Backups of a recorded node, images that hold what is left of them, and what may come out."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import durable
from backend import Change
from commands.salvage import salvaged
from filelog.layout2 import BUMPS, Head, Kind
from filelog.reader import FileReading, effective
from filelog.writer import LogWriter
from salvage.images import Images
from salvage.report import Report
from tests.layout1_files import EarlierPlugin
from tests.support import Call, add_session, make_backup, records_of, trace_sessions
from wallet import database, restore

SESSIONS = 14
"""Of the recorded node, whose backups are all about."""


@dataclass(frozen=True)
class Bed:
    """A recorded node.

    Attributes:
        files: content of each file of layout 2 that was ever made of its backup: whole, of
            before, compacted, and a copy with another id.
        earlier: content of each file of layout 1.
        states: version of the node by a digest of its database, for each state that it had or
            announced.
        version: the newest.
    """

    files: dict[str, bytes]
    earlier: dict[str, bytes]
    states: dict[str, int]
    version: int


def dump(connection: sqlite3.Connection) -> str:
    """A digest of all that a database holds."""
    text = "\n".join(connection.iterdump())
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def make(directory: Path) -> Bed:
    """The first sessions of the node that was killed again and again."""
    sessions = trace_sessions("crash")[:SESSIONS]
    path = make_backup(f"file://{directory}/whole.bkp", sessions[0])
    for calls in sessions[1:]:
        add_session(f"file://{path}", calls)
    records = records_of(path)
    content = path.read_bytes()
    middle = [head for head, _ in records if head.kind == Kind.CHANGE][len(records) // 2]
    files = {"whole": content, "old": content[: middle.end].ljust(len(content), b"\0")}
    for name, share in ("compacted", 0.3), ("again", 0.6):
        files[name] = compacted(directory, records, share)
    files["copy"] = compacted(directory, records, 0.5, os.urandom(16))
    states = states_of(sessions)
    earlier = {"earlier": _earlier(directory, sessions, None)}
    earlier["earlier-snapshot"] = _earlier(directory, sessions, _after_a_stop(sessions))
    return Bed(files, earlier, states, sessions[-1][-1][0])


def states_of(sessions: Sequence[Sequence[Call]]) -> dict[str, int]:
    """What ``Bed.states`` is, by the trace alone."""
    found = {}
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for number, calls in enumerate(sessions):
            connection.execute("PRAGMA foreign_keys = ON")
            following = sessions[number + 1][0][0] if number + 1 < len(sessions) else None
            for version, statements in calls:
                if statements[0].startswith("PRAGMA"):
                    connection.execute(statements[0])
                    continue
                connection.execute("BEGIN")
                for statement in statements:
                    connection.execute(statement)
                found[dump(connection)] = version
                is_last = (version, statements) == tuple(calls[-1])
                connection.execute("ROLLBACK" if is_last and following == version else "COMMIT")
    return found


def compacted(
    directory: Path,
    records: Sequence[tuple[Head, bytes]],
    share: float,
    backup_id: bytes | None = None,
) -> bytes:
    """What a compaction makes of a log: a snapshot of its first ``share``, then the records."""
    at = int(len(records) * share)
    while not records[at][0].flags & BUMPS or records[at + 1][0].kind == Kind.REWIND:
        at += 1
    head = records[at][0]
    scratch, log = directory / "snapshot.sqlite3", directory / "compacted.bkp"
    _replay(records[: at + 1], scratch)
    writer = LogWriter(str(log), backup_id or head.backup_id, os.path.getsize(scratch))
    writer.add_snapshot(str(scratch), head)
    for record in records[at + 1 :]:
        writer.add(*record)
    writer.finish()
    writer.close()
    content = log.read_bytes()
    log.unlink()
    scratch.unlink()
    return content


def _replay(records: Sequence[tuple[Head, bytes]], path: Path) -> None:
    os.close(durable.create(str(path)))
    replayer = database.Replayer(str(path))
    for _, found in effective(records):
        assert isinstance(found, Change)
        replayer.apply(found)
    replayer.finish()


def _after_a_stop(sessions: Sequence[Sequence[Call]]) -> int:
    """A session that goes on with all that the one before it announced."""
    ends = [(calls[0][0] - 1, before[-1][0]) for before, calls in itertools.pairwise(sessions)]
    return next(n for n in range(4, len(sessions)) if len(set(ends[n - 1])) == 1)


def _earlier(directory: Path, sessions: Sequence[Sequence[Call]], snapshot: int | None) -> bytes:
    """A file of layout 1, which begins with a snapshot after some sessions, or empty."""
    plugin = EarlierPlugin(directory / "earlier.bkp")
    for number, calls in enumerate(sessions):
        if number == snapshot:
            path = make_backup(f"file://{directory}/before.bkp", sessions[0])
            for before in sessions[1:number]:
                add_session(f"file://{path}", before)
            scratch = directory / "snapshot.sqlite3"
            restore.build(FileReading(str(path)), str(scratch), False, lambda done, of: None)
            plugin = EarlierPlugin(directory / "earlier.bkp")
            plugin.snapshot(sessions[number - 1][-1][0], scratch.read_bytes())
            path.unlink()
            scratch.unlink()
        plugin.session(calls)
    content = plugin.path.read_bytes()
    plugin.path.unlink()
    return content


def run(directory: Path, *images: Path) -> Report:
    """A salvage, in this process, into the new ``directory``."""
    directory.mkdir()
    with contextlib.closing(Images([str(path) for path in images])) as found:
        return salvaged(found, str(directory))


def state_of(path: str, scratch: Path) -> str:
    """A digest of the database that the backup file ``path`` leads to."""
    with contextlib.closing(FileReading(path)) as reading:
        restore.build(reading, str(scratch), False, lambda done, of: None)
    with contextlib.closing(sqlite3.connect(scratch)) as connection:
        found = dump(connection)
    scratch.unlink()
    return found


def check(bed: Bed, report: Report, scratch: Path) -> list[int]:
    """That all that was delivered are states of the node; their versions."""
    versions = []
    for delivered in report.delivered:
        if delivered.path is not None:
            version = bed.states.get(state_of(delivered.path, scratch))
            assert version == delivered.version, "the node never had that state"
            versions.append(version)
    return versions


# Images


def cut(rng: random.Random, content: bytes, extent: int) -> list[bytes]:
    """``content`` in extents of ``extent`` bytes or some times that."""
    found, at = [], 0
    while at < len(content):
        size = extent * rng.choice((1, 1, 2, 3, 8, 32))
        found.append(
            content[at : at + size].ljust(
                -(-len(content[at : at + size]) // extent) * extent, b"\0"
            )
        )
        at += size
    return found


def interleaved(rng: random.Random, files: Sequence[Sequence[bytes]]) -> list[bytes]:
    """The extents of files that were written at once: each file's are in order."""
    left = [list(extents) for extents in files]
    found = []
    while any(left):
        chosen = rng.choice([extents for extents in left if extents])
        found.append(chosen.pop(0))
    return found


def random_image(rng: random.Random, bed: Bed, path: Path) -> None:
    """An image that holds some of the files, with all that can befall a disk."""
    is_earlier = rng.random() < 0.3
    source = bed.earlier if is_earlier else bed.files
    names = rng.sample(sorted(source), rng.randint(1, min(4, len(source))))
    extent = rng.choice((4096, 4096, 65536, 512))
    if rng.random() < 0.3:
        extents = [bytes(rng.randint(0, 3) * 512), *(source[name] for name in names)]
    else:
        extents = interleaved(rng, [cut(rng, source[name], extent) for name in names])
    if rng.random() < 0.4:
        rng.shuffle(extents)
    junk = [rng.randbytes(extent) for _ in range(rng.randint(0, 5))]
    for block in junk:
        extents.insert(rng.randint(0, len(extents)), block)
    if rng.random() < 0.4:  # Overwritten since they were deleted.
        for _ in range(rng.randint(1, 4)):
            extents[rng.randrange(len(extents))] = rng.randbytes(extent)
    data = bytearray(b"".join(extents))
    if not is_earlier:  # That has no checksums.
        for _ in range(rng.choice((0, 0, 1, 5))):
            at = rng.randrange(len(data)) // 4096 * 4096
            data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        for _ in range(rng.choice((0, 0, 1, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    path.write_bytes(data)
