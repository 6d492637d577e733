"""Looking at a file of layout 2 without changing a byte: what it holds, and how it is."""

from __future__ import annotations

import contextlib
import os
import shutil

import space
from backend import Status
from errors import Damaged
from filelog import layout2, proof
from filelog.layout2 import BEFORE_FIRST, Head, Kind, Tail, TailKind
from filelog.reader import LogReader

LOOK_BACK = 16 << 20
"""Bytes at a log's end in which the last start is looked for."""


def status(url: str, path: str, check: bool) -> Status:
    """A look at the file ``path`` of the backup ``url``.

    Args:
        check: read and check all of it, not only its end.
    """
    with contextlib.closing(LogReader(path)) as reader:
        last, tail, damage = _checked(reader) if check else _seen(reader)
        log_start = reader.log_start or layout2.FIRST_RECORD
        known = proof.read(path, reader.backup_id)
        roster = reader.roster()
        found = Status(
            url=url,
            layout=f"file layout {layout2.LAYOUT}",
            backup_id=(reader.backup_id or b"").hex(),
            version=last.version,
            prev_version=last.version - 1 if last.rewindable else None,
            version_count=last.changes + (log_start > layout2.FIRST_RECORD),
            changes=last.changes,
            snapshot_size=layout2.snapshot_size(log_start),
            size=tail.offset,
            allocated=reader.allocated,
            last_change_ns=last.time_ns or None,
            owner=last.tag.hex() if reader.rules == layout2.RULES else None,
            last_start_rewound=_has_rewound(reader, last, log_start),
            torn_tail=tail.kind is TailKind.TORN,
            checked=check,
            damage=str(damage) if damage else None,
            last_checked_ns=known.checked_ns,
            last_proven_ns=known.proven_ns,
            unsound=known.unsound,
            disk_free=shutil.disk_usage(os.path.dirname(path)).free,
            warnings=[*space.disk_warnings(path, tail.offset), *proof.warnings(known, url)],
        )
    found.note_list(roster)
    return found


def _checked(reader: LogReader) -> tuple[Head, Tail, Damaged | None]:
    """The last record, the tail and the damage of a whole log, read to its end."""
    for _ in reader:
        pass
    tail = reader.tail._replace(offset=reader.position)
    return reader.last or BEFORE_FIRST, tail, reader.damage


def _seen(reader: LogReader) -> tuple[Head, Tail, Damaged | None]:
    """``_checked``, as far as the log's end tells."""
    if reader.damage is not None:
        return _checked(reader)
    newest, tail = reader.settled()
    damage = None
    if tail.kind is TailKind.DAMAGED:
        reader.last = newest
        damage = reader.as_damage(tail.offset, tail.reason)
    return newest or BEFORE_FIRST, tail, damage


def _has_rewound(reader: LogReader, last: Head, log_start: int) -> bool | None:
    """Whether the session of ``last`` began with a rewind; None if it began too far back."""
    start = max(log_start, last.end - LOOK_BACK)
    rewind = layout2.find_last(reader.pread, start, last.end, reader.backup_id, Kind.REWIND)
    if rewind is not None:
        return rewind.session == last.session
    first = layout2.find_next(reader.pread, start, last.end, reader.backup_id)
    is_whole = start == log_start or first is None or first.session != last.session
    return False if is_whole else None


def is_empty(path: str) -> bool:
    """Whether the file ``path`` holds nothing that would be worth to keep."""
    with contextlib.closing(LogReader(path)) as reader:
        try:
            newest, tail = reader.newest()
        except Damaged:
            return False  # What it held may be salvaged.
    return newest is None and tail.kind is TailKind.CLEAN
