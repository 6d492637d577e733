"""Reading a file of layout 2 in order: for restore, status and verification.

A reader needs no lock, writes no byte, and finishes on the file it began with, even
when a compaction replaces that file meanwhile.
"""

from __future__ import annotations

import os
import shlex
import stat
import time
import zlib
from collections.abc import Iterable, Iterator

import durable
from backend import (
    FOREIGN_KEYS_OFF,
    MAX_CHANGE_SIZE,
    MAX_CHUNK_SIZE,
    Beginning,
    Change,
    Ending,
    Reading,
    Step,
    chain_after,
    utc,
)
from errors import CLI, BackupError, BackupMissing, Damaged, DiskError, UnsupportedLayout
from filelog import layout1, layout2
from filelog.layout2 import BEFORE_FIRST, Head, Kind, Tail, TailKind
from quorum import Roster

GROWING_TAIL_S = 1.0
"""How long a reader waits for an append in flight before it judges the tail."""
LOOK_AGAIN_S = 0.02
READ_SIZE = MAX_CHUNK_SIZE + (4 << 10)
"""Bytes read at once: a piece of a snapshot and the next one's head, or each is read twice."""


class LogReader:
    """The records of one file, in order.

    Attributes:
        allocated: size of the file in bytes.
        backup_id, log_start: from the file header; None where that is damaged.
        rules: from the file header, see filelog/layout2.py.
        last: head of the last valid record seen, or None.
        position: offset of the next record.
        tail: what stands behind the last record, known after the iteration.
        damage: why the iteration ended early, or None.

    Raises:
        BackupMissing, UnsupportedLayout, DiskError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        _refuse_special(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise BackupMissing(f"file://{path}") from error
        except OSError as error:
            raise DiskError(path, error, "open") from error
        self.backup_id: bytes | None = None
        self.log_start: int | None = None
        self.rules = layout2.RULES
        self.last: Head | None = None
        self.position = layout2.FIRST_RECORD
        self.tail = Tail(TailKind.CLEAN, self.position)
        self.damage: Damaged | None = None
        self._buffer, self._buffer_at = b"", 0
        try:
            self.allocated = self._size()
            self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self) -> None:
        header = self.pread(0, layout2.FIRST_RECORD)
        if header.startswith(layout1.START):
            raise UnsupportedLayout(
                self.path,
                "of layout 1, of the earlier backup plugin",
                f"Stop the node and run `{CLI} upgrade --lightning-dir DIR`; for a server's"
                f" file run `{CLI} upgrade {shlex.quote(f'file://{self.path}')}`.",
            )
        try:
            self.backup_id, self.log_start, self.rules = layout2.decode_header(header)
        except layout2.HeaderError as error:
            if self.newest_anywhere() is None:
                found = f"not a backup: {error}"
                raise UnsupportedLayout(self.path, found, "Check the URL.") from error
            self.damage = self.as_damage(0, str(error))

    def of_old_rules(self) -> UnsupportedLayout:
        """The refusal to write to a file of rules 0."""
        return UnsupportedLayout(
            self.path,
            "of an early form of layout 2, which is not written any more",
            f"Stop the node and run `{CLI} upgrade --lightning-dir DIR`; for a server's"
            f" file run `{CLI} upgrade {shlex.quote(f'file://{self.path}')}`.",
        )

    def taken_over(self) -> str:
        """When and by which machine the backup was taken over, in words; "" if never."""
        payload = self._newest_owner()
        if not payload:
            return ""
        time_ns, machine = layout2.decode_owner(payload)
        return f"{machine} took it over at {utc(time_ns)}"

    def roster(self) -> Roster | None:
        """The list of destinations that the log keeps, None if it is the only one."""
        return layout2.decode_roster(self._newest_owner())

    def _newest_owner(self) -> bytes:
        """The payload of the newest owner record, b"" if there is none."""
        start = self.log_start or layout2.FIRST_RECORD
        head = layout2.find_last(self.pread, start, self.allocated, self.backup_id, Kind.OWNER)
        return self.pread(head.offset + layout2.HEAD.size, head.length) if head else b""

    def start_after(self, head: Head) -> None:
        """Begin behind ``head``, a record of this file, in place of the beginning."""
        self.last, self.position = head, head.end

    def head_at(self, offset: int) -> Head:
        """The head of the record at ``offset``; Damaged if there is none."""
        head = layout2.decode_head(self.pread(offset, layout2.HEAD.size), offset, self.backup_id)
        if head is None:
            raise self.as_damage(offset, "no record stands where one should")
        return head

    def ending_at(self, end: int) -> Head | None:
        """The head of the record that ends at ``end``, None if none does."""
        latest = end - layout2.OVERHEAD
        if not layout2.FIRST_RECORD <= latest < self.allocated:
            return None
        # The trailer has the low 3 bytes of the record's offset.
        low = int.from_bytes(self.pread(end - 4, 3), "big")
        offset = latest - (latest - low) % (1 << 24)
        while offset >= max(layout2.FIRST_RECORD, latest - MAX_CHANGE_SIZE):
            data = self.pread(offset, layout2.HEAD.size)
            head = layout2.decode_head(data, offset, self.backup_id)
            if head is not None and head.end == end:
                return head
            offset -= 1 << 24
        return None

    def _size(self) -> int:
        try:
            return os.fstat(self._fd).st_size
        except OSError as error:
            raise DiskError(self.path, error, "look at") from error

    def pread(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, fewer at the end of the file."""
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise DiskError(self.path, error, f"read at offset {offset}") from error

    def newest(self) -> tuple[Head | None, Tail]:
        """The newest valid record and what stands behind it, from the file's end alone.

        Raises:
            Damaged: the header does not check, so the rest cannot be judged.
        """
        if self.damage is not None:
            raise self.damage
        assert self.backup_id is not None and self.log_start is not None
        return layout2.find_newest(
            self.pread, self.allocated, self.backup_id, self.log_start, self.rules
        )

    def settled(self) -> tuple[Head | None, Tail]:
        """``newest``, after an append in flight: looks again for GROWING_TAIL_S."""
        deadline = time.monotonic() + GROWING_TAIL_S
        while True:
            found = self.newest()
            if found[1].kind is TailKind.CLEAN or time.monotonic() > deadline:
                return found
            time.sleep(LOOK_AGAIN_S)
            self.allocated = self._size()

    def __iter__(self) -> Iterator[tuple[Head, bytes]]:
        while (record := self._next()) is not None:
            if not self._takes(*record):
                return
            yield record
        if self.tail.kind is TailKind.DAMAGED:
            self.damage = self.as_damage(self.tail.offset, self.tail.reason)
        elif self.position < (self.log_start or 0):
            self.damage = self.as_damage(self.position, "the rest of the snapshot is missing")

    def whole(self) -> Iterator[tuple[Head, bytes]]:
        """The records that are whole; what stands behind the last of them is not judged."""
        while True:
            record = self._record_at(self.position)
            if record is None:
                self._buffer = b""  # What came meanwhile is not in it.
                record = self._record_at(self.position)
            if record is None or not self._takes(*record):
                return
            yield record

    def _takes(self, head: Head, payload: bytes) -> bool:
        """Go on behind this record, if it continues the one before; else ``damage`` is set."""
        # Without the file header each record is taken at its own word.
        log_start = self.log_start or layout2.log_start_by(head)
        problem = layout2.follows(self.last, head, log_start)
        if head.kind == Kind.CHANGE and not problem:
            chain = chain_after(head.chain_before, head.version, payload)
            problem = "" if chain == head.chain else "its content does not match its chain"
        if problem:
            self.damage = self.as_damage(head.offset, problem)
            return False
        self.backup_id, self.last, self.position = head.backup_id, head, head.end
        return True

    def judge(self) -> Tail:
        """What stands at ``position`` now, where no whole record does."""
        self.allocated = self._size()
        tail = layout2.judge_tail(
            self.pread, self.position, self.allocated, self.backup_id, self.rules
        )
        if self.position < (self.log_start or 0) and tail.kind is not TailKind.DAMAGED:
            reason = "the rest of the snapshot is missing"
            tail = Tail(TailKind.DAMAGED, self.position, reason)
        return tail

    def heads(self) -> Iterator[Head]:
        """The heads of the records from ``position`` on, without a look at their payloads."""
        at = self.position
        while True:
            data = self._peek(at, layout2.HEAD.size)
            head = layout2.decode_head(data, at, self.backup_id)
            if head is None:
                return
            yield head
            at = head.end

    def _next(self) -> tuple[Head, bytes] | None:
        """The record at ``position``; None at the end, where ``tail`` is then set."""
        deadline = time.monotonic() + GROWING_TAIL_S
        while True:
            record = self._record_at(self.position)
            if record is not None:
                return record
            self._buffer = b""
            before, self.allocated = self.allocated, self._size()
            if self.allocated < before:  # No log ever becomes smaller.
                reason = "the file was cut while it was read"
                self.tail = Tail(TailKind.DAMAGED, self.position, reason)
                return None
            self.tail = layout2.judge_tail(
                self.pread, self.position, self.allocated, self.backup_id, self.rules
            )
            if self.tail.kind is TailKind.CLEAN or time.monotonic() > deadline:
                return None
            time.sleep(LOOK_AGAIN_S)

    def _record_at(self, offset: int) -> tuple[Head, bytes] | None:
        head = layout2.decode_head(self._peek(offset, layout2.HEAD.size), offset, self.backup_id)
        if head is None:
            return None
        payload = self._peek(offset + layout2.HEAD.size, head.length)
        if len(payload) != head.length or zlib.crc32(payload) != head.payload_crc:
            return None
        return head, payload

    def _peek(self, offset: int, size: int) -> bytes:
        at = offset - self._buffer_at
        if at < 0 or at + size > len(self._buffer):
            self._buffer = self.pread(offset, max(size, READ_SIZE))
            self._buffer_at, at = offset, 0
        return self._buffer[at : at + size]

    def as_damage(self, offset: int, reason: str) -> Damaged:
        """The error that names damage at ``offset`` and the versions behind it."""
        newest = self.newest_anywhere()
        good = self.last.version if self.last else 0
        if newest is None or newest.version <= good:
            lost = "and whether a later one is lost cannot be told"
        else:
            lost = f"versions {good + 1} to {newest.version} stand behind the damage"
        return Damaged(self.path, offset, reason, good, lost, newest.version if newest else None)

    def newest_anywhere(self) -> Head | None:
        """The last record of all that is there, also behind damage."""
        start = layout2.FIRST_RECORD
        return layout2.find_last(self.pread, start, self.allocated, self.backup_id)

    def forget(self) -> None:
        """Let the page cache go of what was read."""
        durable.forget(self._fd, self.position)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def is_foreign_keys_off(head: Head) -> bool:
    """Whether the record is a PRAGMA foreign_keys = OFF, which its chain tells."""
    if head.kind != Kind.CHANGE or head.length != len(FOREIGN_KEYS_OFF):
        return False
    payload = FOREIGN_KEYS_OFF.encode()
    return head.chain == chain_after(head.chain_before, head.version, payload)


class Rewinds:
    """The rewinds among the records that pass."""

    def __init__(self) -> None:
        self._count = 0
        self._last: Head | None = None

    def seen(self, log_records: Iterable[tuple[Head, bytes]]) -> Iterator[tuple[Head, bytes]]:
        """``log_records``, as they are."""
        for record in log_records:
            if record[0].kind == Kind.REWIND:
                self._count, self._last = self._count + 1, record[0]
            yield record

    def notes(self) -> tuple[str, ...]:
        """What to tell of them: often the node was killed, but it may be its disk that forgets."""
        if self._last is None:
            return ()
        what = "1 change" if self._count == 1 else f"{self._count} changes"
        return (
            f"Left out: {what} that the node announced, but never committed; the last one to"
            f" version {self._last.version + 1}, taken back on {utc(self._last.time_ns)}.",
        )


def effective(
    log_records: Iterable[tuple[Head, bytes]], snapshot_size: int | None = None
) -> Iterator[tuple[Head, Beginning | Change]]:
    """What a restore applies, each with the head of its record.

    Changes taken back are left out, and so is an idle PRAGMA OFF.

    Args:
        snapshot_size: bytes of the snapshot that they begin with, if known.
    """
    off: tuple[Head, Change] | None = None
    in_snapshot = False
    for head, payload in _not_rewound(log_records):
        if head.kind == Kind.SNAPSHOT:
            if not in_snapshot:
                yield head, Beginning(head.version, snapshot_size)
            in_snapshot = not head.flags & layout2.FINAL
            yield head, Change(head.version, payload, None)
            continue
        change = Change.decode(head.version, payload)
        if is_foreign_keys_off(head):
            off = head, change
            continue
        # A new lightningd has foreign_keys ON: OFF holds for its own session alone.
        if off is not None and off[0].session == head.session:
            yield off
        off = None
        yield head, change


def _not_rewound(log_records: Iterable[tuple[Head, bytes]]) -> Iterator[tuple[Head, bytes]]:
    last: tuple[Head, bytes] | None = None
    for record in log_records:
        if record[0].kind == Kind.OWNER:
            continue
        if record[0].kind == Kind.REWIND:
            last = None
            continue
        if last is not None:
            yield last
        last = record
    if last is not None:
        yield last


def _refuse_special(path: str) -> None:
    """Refuse what is no file before it is opened: that of a FIFO would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # Opening it says why.
    if stat.S_ISDIR(mode):
        inside = shlex.quote(f"file://{os.path.join(path, 'node.bkp')}")
        raise UnsupportedLayout(path, "a directory", f"Name a file in it, such as {inside}.")
    if not stat.S_ISREG(mode):
        raise UnsupportedLayout(path, "a FIFO, a socket or a device, not a file", "Check the URL.")


class FileReading(Reading):
    """A pass over a file (see Reading)."""

    def __init__(self, path: str) -> None:
        self._reader = LogReader(path)

    def __iter__(self) -> Iterator[Step]:
        reader, total = self._reader, self._reader.allocated
        size = layout2.snapshot_size(reader.log_start) if reader.log_start else None
        damage: BackupError | None = None
        rewinds = Rewinds()
        try:
            for head, found in effective(rewinds.seen(reader), size):
                yield Step(found, head.end, total)
        except BackupError as error:
            damage = error
        last = reader.last or BEFORE_FIRST
        ending = Ending(
            version=last.version,
            last_change_ns=last.time_ns if reader.last else None,
            torn_tail=reader.tail.kind is TailKind.TORN,
            damage=damage or reader.damage,
            notes=rewinds.notes(),
        )
        yield Step(ending, reader.position if ending.damage else total, total)

    def close(self) -> None:
        """See Reading."""
        self._reader.close()
