"""File layout 2, down to the byte. All numbers are big-endian and unsigned.

File header, written once, 64 bytes:

    offset  size  field      meaning
         0    16  magic      89 "CLN backup" 0d 0a 1a 0a 00
        16     4  layout     2
        20     4  rules      1; 0: of a file whose end may not be zero, and that has no owner
        24    16  backup id  random; also in every record
        40     8  created    Unix time in nanoseconds, informative
        48     8  log start  offset of the first record after the snapshot; 64 without one
        56     4  reserved   0
        60     4  crc        CRC-32 of bytes 0 to 59

Then records, back to back from byte 64. Each is a head of 124 bytes, its payload and a
trailer of 4 bytes:

    offset  size  field         meaning
         0     4  marker        c5 "rec"
         4     1  kind          1 snapshot, 2 change, 3 rewind, 4 owner
         5     1  flags         bit 0: the change bumps data_version
                                bit 1: last piece of the snapshot
         6     2  reserved      0
         8    16  backup id     that of the file header
        24     8  sequence      1 and up by one a record; goes on across compaction. All
                                pieces of a snapshot have that of the last record it
                                stands for, 0 for a new one
        32     8  offset        of this record in this file
        40     4  data_version  of the database with this record applied
        44     4  payload crc   CRC-32 of the payload
        48     8  changes       changes that count since the snapshot, this one included
        56     8  time          Unix time in nanoseconds, informative
        64    16  session       8 bytes of the owner, then random, one for each start of the
                                plugin; of an owner, all of it; for several
                                destinations, two numbers of 4 bytes are in place of what
                                is random: the start that wrote the newest change, and
                                the one that wrote this record
        80     8  length        of the payload
        88    16  chain before  names the history before this record
       104    16  chain         names the history with this record
       120     4  head crc      CRC-32 of bytes 0 to 119
       124     n  payload       see below
     124+n     4  trailer       the low 3 bytes of the offset, 0a; not zero, so it shows that a
                                write got to its end, and which one

Payloads: of a snapshot, a piece of at most 1 MiB of an SQLite file; of a change, its
statements in UTF-8, joined by one NUL byte (no statement is empty or holds a NUL); of a
rewind, nothing; of an owner, Unix time in nanoseconds as 8 bytes and the name in UTF-8 of
the machine that took over. Where the backup has several destinations, each keeps the list of
them there: behind the name a NUL byte, and in JSON [epoch, acknowledgements, [URL, ...], votes].
Without a vote it is none of them, or not yet.

A snapshot is all of the records before "log start", the last one flagged, or there is
none. It is written and verified before the file gets its name. Its chain is random, or
for a compacted file the chain of the history it stands for; for an empty backup the
chain is 16 zero bytes. A change's chain is BLAKE2b-128(chain before, data_version as 4
bytes, payload). A rewind follows a change that bumps and takes it back: its data_version
is one less, and its chain is that change's chain before.

An owner says who may write from there on: 16 random bytes, all zero for nobody in
particular. It repeats the record before it in all that it says of the history (flags,
data_version, changes, time, chain before, chain). Right behind a snapshot it has the
snapshot's sequence, so that a compaction can put it there again; or the next one, where
the take-over came while a compaction made that snapshot.

Behind the newest record the file is zero, up to any size, but for at least one byte: zeros
are written and flushed before the record in front of them. So a file that ends inside a
record or right behind one was cut off. Its end may also hold a torn tail: an append that
never finished, so was never acknowledged (``judge_tail``).
"""

from __future__ import annotations

import enum
import json
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from backend import (
    EMPTY_CHAIN,
    MAX_CHANGE_SIZE,
    MAX_CHUNK_SIZE,
    NOBODY,
    TAG_SIZE,
    Change,
    Snapshot,
    chain_after,
)
from errors import ConfigError, printable
from quorum import Roster

MAGIC = b"\x89CLN backup\r\n\x1a\n\x00"
LAYOUT = 2
RULES = 1
FILE_HEADER = struct.Struct("!16sII16sQQ4xI")
MARKER = b"\xc5rec"
HEAD = struct.Struct("!4sBB2x16sQQIIQQ16sQ16s16sI")
_TRAILER_SIZE = 4
BUMPS = 1
FINAL = 2
SECTOR = 512
"""Bytes that a disk writes all or nothing."""
CUT_OFF = "the file was cut off there: this is the beginning of a copy"
WINDOW = 1 << 20
"""Bytes read at once when a record is searched."""

assert (FILE_HEADER.size, HEAD.size, len(MAGIC)) == (64, 124, 16)
FIRST_RECORD = FILE_HEADER.size
OVERHEAD = HEAD.size + _TRAILER_SIZE
MAX_OWNER_PAYLOAD = 16 << 10
MAX_MACHINE = 1 << 10
MAX_DESTINATIONS = 16
_CRC = struct.Struct("!I")


class Kind(enum.IntEnum):
    """What a record is."""

    SNAPSHOT = 1
    CHANGE = 2
    REWIND = 3
    OWNER = 4


CHANGES_STEP: dict[int, int] = {Kind.CHANGE: 1, Kind.REWIND: -1, Kind.OWNER: 0}
"""What a kind adds to the number of changes."""
MAX_LENGTH: dict[int, int] = {
    Kind.SNAPSHOT: MAX_CHUNK_SIZE,
    Kind.CHANGE: MAX_CHANGE_SIZE,
    Kind.REWIND: 0,
    Kind.OWNER: MAX_OWNER_PAYLOAD,
}
"""Bytes of payload that a kind may have."""


class Head(NamedTuple):
    """The head of a record, field by field as in the table above."""

    marker: bytes = MARKER
    kind: int = 0
    flags: int = 0
    backup_id: bytes = b""
    sequence: int = 0
    offset: int = 0
    version: int = 0
    payload_crc: int = 0
    changes: int = 0
    time_ns: int = 0
    session: bytes = b""
    length: int = 0
    chain_before: bytes = EMPTY_CHAIN
    chain: bytes = EMPTY_CHAIN
    crc: int = 0

    @property
    def end(self) -> int:
        """Offset of the byte after this record."""
        return self.offset + OVERHEAD + self.length

    @property
    def rewindable(self) -> bool:
        """Whether a rewind may follow this record."""
        return self.kind in (Kind.CHANGE, Kind.OWNER) and bool(self.flags & BUMPS)

    @property
    def tag(self) -> bytes:
        """What the session tells of the owner."""
        return self.session[:TAG_SIZE]


_CRC_FIELD = Head._fields.index("payload_crc")
BEFORE_FIRST = Head(offset=FIRST_RECORD - OVERHEAD, session=NOBODY)
"""Stands for the record before the first one: version 0, nothing to rewind, ends at 64."""


def behind(
    before: Head,
    length: int,
    *,
    kind: int,
    flags: int,
    version: int,
    time_ns: int,
    session: bytes,
    chain: bytes,
) -> Head:
    """The head of a new change or rewind of ``length`` bytes behind ``before``."""
    return Head(
        kind=kind,
        flags=flags,
        backup_id=before.backup_id,
        sequence=before.sequence + 1,
        offset=before.end,
        version=version,
        changes=before.changes + CHANGES_STEP[kind],
        time_ns=time_ns,
        session=session,
        length=length,
        chain_before=before.chain,
        chain=chain,
    )


def change_behind(before: Head, change: Change, session: bytes, time_ns: int) -> Head:
    """The head of ``change``, whose base is the version at ``before``."""
    assert change.base == before.version, "the version rule comes first"
    payload = change.payload
    return behind(
        before,
        len(payload),
        kind=Kind.CHANGE,
        flags=BUMPS if change.bumps else 0,
        version=change.version,
        time_ns=time_ns,
        session=session,
        chain=chain_after(before.chain, change.version, payload),
    )


def rewind_behind(before: Head, session: bytes, time_ns: int) -> Head:
    """The head of the rewind that takes back ``before``."""
    assert before.rewindable, "the version rule comes first"
    return behind(
        before,
        0,
        kind=Kind.REWIND,
        flags=0,
        version=before.version - 1,
        time_ns=time_ns,
        session=session,
        chain=before.chain_before,
    )


def moved(head: Head, before: Head) -> Head:
    """``head`` of anything but a snapshot, as it stands behind ``before`` in another file."""
    # Its sequence stays: it goes on across a compaction.
    return head._replace(
        backup_id=before.backup_id,
        offset=before.end,
        changes=before.changes + CHANGES_STEP[head.kind],
    )


def owner_behind(before: Head, owner: bytes, payload: bytes) -> Head:
    """The head of an owner record behind ``before``.

    Args:
        owner: 16 bytes.
        payload: see encode_owner.
    """
    behind_snapshot = before.kind == Kind.SNAPSHOT
    return before._replace(
        kind=Kind.OWNER,
        flags=BUMPS if before.rewindable else 0,
        sequence=before.sequence + (0 if behind_snapshot else 1),
        offset=before.end,
        session=owner,
        length=len(payload),
    )


def encode_owner(time_ns: int, machine: str, roster: Roster | None = None) -> bytes:
    """The payload of an owner record: when which machine took over, and the destinations.

    Raises:
        ConfigError: the list of destinations is too long.
    """
    payload = time_ns.to_bytes(8, "big") + machine.encode()[:MAX_MACHINE]
    if roster is not None:
        payload += b"\0" + json.dumps(roster).encode()
    if len(payload) > MAX_OWNER_PAYLOAD:
        raise ConfigError("The URLs are too long to be kept.", "Use shorter ones.")
    return payload


def decode_owner(payload: bytes) -> tuple[int, str]:
    """Unix time in nanoseconds and machine of an owner record."""
    machine, _, _ = payload[8:].partition(b"\0")
    return int.from_bytes(payload[:8], "big"), machine.decode(errors="replace")


def decode_roster(payload: bytes) -> Roster | None:
    """The list of destinations in an owner record; None if it has none, or no valid one."""
    _, _, text = payload[8:].partition(b"\0")
    try:
        epoch, acks, urls, votes = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
    if not isinstance(urls, list) or not 1 <= len(urls) <= MAX_DESTINATIONS:
        return None
    if not all(isinstance(url, str) and url == printable(url) for url in urls):
        return None
    if type(epoch) is not int or type(acks) is not int or not 1 <= acks <= len(urls):
        return None
    return Roster(epoch, acks, tuple(urls), bool(votes))


def without_vote(payload: bytes) -> bytes:
    """The payload of an owner record, for a destination that has no vote."""
    roster = decode_roster(payload)
    if roster is None:
        return payload
    time_ns, machine = decode_owner(payload)
    return encode_owner(time_ns, machine, roster._replace(votes=False))


def term_of(session: bytes) -> int:
    """The start that wrote the newest change, as a session of one of several tells."""
    return int.from_bytes(session[TAG_SIZE : TAG_SIZE + 4], "big")


def start_of(session: bytes) -> int:
    """The start that wrote the newest record, as a session of one of several tells."""
    return int.from_bytes(session[TAG_SIZE + 4 :], "big")


def session_of(owner: bytes, term: int, start: int) -> bytes:
    """The session of ``owner`` in the start number ``start`` of the node.

    Args:
        term: the start that wrote the newest change.
    """
    return owner[:TAG_SIZE] + term.to_bytes(4, "big") + start.to_bytes(4, "big")


def session_behind(snapshot: Head, owner: Head, payload: bytes) -> bytes:
    """The session of an owner record right behind a snapshot, which stands for later changes.

    Args:
        owner, payload: the record as it was.
    """
    roster = decode_roster(payload)
    if roster is None or len(roster.urls) == 1:
        return owner.session
    term = max(term_of(owner.session), term_of(snapshot.session))
    return session_of(owner.session, term, start_of(owner.session))


def snapshot_head(snapshot: Snapshot, owner: bytes, time_ns: int) -> Head:
    """What the heads of all pieces of ``snapshot``, which is ``owner``'s, have in common."""
    return BEFORE_FIRST._replace(
        kind=Kind.SNAPSHOT,
        version=snapshot.version,
        time_ns=time_ns,
        session=owner,
        chain=snapshot.chain,
    )


class HeaderError(ValueError):
    """A file header that does not check; the text says why."""


def encode_header(backup_id: bytes, created_ns: int, snapshot_size: int) -> bytes:
    """The 64 bytes that begin a file whose snapshot has ``snapshot_size`` bytes."""
    log_start = log_start_of(snapshot_size)
    body = FILE_HEADER.pack(MAGIC, LAYOUT, RULES, backup_id, created_ns, log_start, 0)[:-4]
    return body + _CRC.pack(zlib.crc32(body))


def decode_header(data: bytes) -> tuple[bytes, int, int]:
    """Backup id, log start and rules of a file that begins with ``data``.

    Raises:
        HeaderError: it does not check.
    """
    if len(data) < FILE_HEADER.size:
        raise HeaderError("the file header is cut off")
    magic, layout, rules, backup_id, _, log_start, crc = FILE_HEADER.unpack_from(data)
    if zlib.crc32(data[: FILE_HEADER.size - 4]) != crc:
        raise HeaderError("the file header does not match its checksum")
    if magic != MAGIC or layout != LAYOUT or rules > RULES:
        raise HeaderError(f"the file header names layout {layout}, rules {rules}")
    return backup_id, log_start, rules


def log_start_of(snapshot_size: int) -> int:
    """Where the first record stands behind an SQLite file of ``snapshot_size`` bytes."""
    return FIRST_RECORD + -(-snapshot_size // MAX_CHUNK_SIZE) * OVERHEAD + snapshot_size


def snapshot_size(log_start: int) -> int:
    """Bytes of the SQLite file that stands before ``log_start``."""
    stored = log_start - FIRST_RECORD
    return stored - -(-stored // (MAX_CHUNK_SIZE + OVERHEAD)) * OVERHEAD


def encode(head: Head, payload: bytes) -> bytes:
    """A whole record. Both CRCs of ``head`` are set here, its length must fit."""
    return b"".join((encode_head(head, payload), payload, trailer(head.offset)))


def trailer(offset: int) -> bytes:
    """What stands at the end of the record that begins at ``offset``."""
    return (offset & 0xFFFFFF).to_bytes(3, "big") + b"\n"


def encode_head(head: Head, payload: bytes | memoryview) -> bytes:
    """What stands before ``payload``: see ``encode``."""
    assert head.length == len(payload)
    body = HEAD.pack(*head[:_CRC_FIELD], zlib.crc32(payload), *head[_CRC_FIELD + 1 :])[:-4]
    return body + _CRC.pack(zlib.crc32(body))


def decode_head(data: bytes, offset: int, backup_id: bytes | None) -> Head | None:
    """The head at the beginning of ``data``, or None if there is no valid one.

    Args:
        data: at least HEAD.size bytes, or fewer at the end of a file.
        offset: where ``data`` stands in the file.
        backup_id: the file's, or None to take any.
    """
    if len(data) < HEAD.size or not data.startswith(MARKER):
        return None
    head = Head._make(HEAD.unpack_from(data))
    # Offset and random id are this file's own, so that no payload can pass for a record.
    if zlib.crc32(data[: HEAD.size - 4]) != head.crc or head.offset != offset:
        return None
    if backup_id is not None and head.backup_id != backup_id:
        return None
    if head.length > MAX_LENGTH.get(head.kind, -1):
        return None
    return head


def follows(before: Head | None, head: Head, log_start: int) -> str:
    """Why ``head`` cannot come after ``before`` (None: the first record), or ""."""
    if (head.kind == Kind.SNAPSHOT) != (head.offset < log_start):
        return "a snapshot stands only at the beginning"
    if head.kind == Kind.SNAPSHOT:
        alike = before is None or _stands_for(before) == _stands_for(head)
        final = bool(head.flags & FINAL) == (head.end == log_start)
        return "" if alike and final else "the snapshot's pieces do not fit"
    last = before or BEFORE_FIRST
    if head.kind == Kind.OWNER:
        repeats = owner_behind(last, head.session, b"")
        if last.kind == Kind.SNAPSHOT and head.sequence == last.sequence + 1:
            repeats = repeats._replace(sequence=head.sequence)  # It came meanwhile.
        return (
            "" if _state(head) == _state(repeats) else "the record does not continue the one before"
        )
    if head.kind == Kind.REWIND:
        expected = (last.version - 1, last.changes - 1, last.chain, last.chain_before)
        possible = last.rewindable
    else:
        bumps = head.flags & BUMPS
        expected = (last.version + bumps, last.changes + 1, last.chain, head.chain)
        possible = True
    found = (head.version, head.changes, head.chain_before, head.chain)
    if head.sequence != last.sequence + 1 or not possible or found != expected:
        return "the record does not continue the one before"
    return ""


def log_start_by(head: Head) -> int:
    """The log start that fits ``head``, where the file header cannot tell it."""
    if head.kind != Kind.SNAPSHOT:
        return head.offset
    return head.end if head.flags & FINAL else head.end + 1  # More pieces are to come.


def _stands_for(head: Head) -> tuple[int, int, bytes]:
    return head.sequence, head.version, head.chain


def _state(head: Head) -> tuple[object, ...]:
    history = head.version, head.changes, head.time_ns, head.chain_before, head.chain
    return head.sequence, head.flags, *history


# Finding the end of a file.

Pread = Callable[[int, int], bytes]
"""``pread(offset, size)``: the bytes there, fewer at the end of the file."""


class TailKind(enum.Enum):
    """What stands behind a file's newest valid record."""

    CLEAN = "nothing"
    TORN = "an append that was never acknowledged"
    DAMAGED = "something that does not check"


class Tail(NamedTuple):
    """A file's end from ``offset`` on, and why it was taken for what it is."""

    kind: TailKind
    offset: int
    reason: str = ""


def payload_checks(pread: Pread, head: Head) -> bool:
    """Whether the payload behind ``head`` is complete and matches its checksum."""
    crc, position, end = 0, head.offset + HEAD.size, head.end - _TRAILER_SIZE
    while position < end:
        data = pread(position, min(WINDOW, end - position))
        if not data:
            return False
        crc = zlib.crc32(data, crc)
        position += len(data)
    return crc == head.payload_crc


def find_last(
    pread: Pread, start: int, end: int, backup_id: bytes | None, kind: Kind | None = None
) -> Head | None:
    """The last record with a valid head (of ``kind``) that begins in [start, end), if any."""
    begins = MARKER if kind is None else MARKER + bytes([kind])
    high = end
    while high > start:
        low = max(start, high - WINDOW)
        data = pread(low, high - low + HEAD.size)
        at = data.rfind(begins, 0, high - low + len(begins) - 1)
        while at >= 0:
            head = decode_head(data[at : at + HEAD.size], low + at, backup_id)
            if head is not None:
                return head
            at = data.rfind(begins, 0, at + len(begins) - 1)
        high = low
    return None


def find_next(pread: Pread, start: int, end: int, backup_id: bytes | None) -> Head | None:
    """The first record with a valid head that begins in [start, end), if any."""
    for low in range(start, end, WINDOW):
        data = pread(low, min(WINDOW, end - low) + HEAD.size)
        at = data.find(MARKER)
        while 0 <= at < WINDOW and low + at < end:
            head = decode_head(data[at : at + HEAD.size], low + at, backup_id)
            if head is not None:
                return head
            at = data.find(MARKER, at + 1)
    return None


def judge_tail(
    pread: Pread, offset: int, size: int, backup_id: bytes | None, rules: int = RULES
) -> Tail:
    """What stands at ``offset``, where no valid record does, in a file of ``size`` bytes.

    Torn means: it was written by an append that did not get to its end, which shows in a
    write that stops early or in a sector of it that is still zero, and no later append
    follows. A record that was acknowledged cannot look like that: no sector of it is all zero.

    Args:
        rules: the file header's; in a file of rules 0 there may be no zeros at the end.
    """
    written = _last_nonzero(pread, offset, size) - offset
    if rules and size <= offset + (OVERHEAD if written > 0 else 0):
        return Tail(TailKind.DAMAGED, offset, CUT_OFF)
    if written <= 0:
        return Tail(TailKind.CLEAN, offset)
    if find_next(pread, offset + 1, offset + written, backup_id) is not None:
        return Tail(TailKind.DAMAGED, offset, "a broken record with others behind it")
    if written < HEAD.size:
        return Tail(TailKind.TORN, offset, "its head is not complete")
    head = decode_head(pread(offset, HEAD.size), offset, backup_id)
    if head is None:
        return _judge_headless(pread, offset, written, size, rules)
    return _judge_headed(pread, head, written, size, rules)


def _judge_headed(pread: Pread, head: Head, written: int, size: int, rules: int) -> Tail:
    extent = head.end - head.offset
    if rules and head.end >= size:
        return Tail(TailKind.DAMAGED, head.offset, CUT_OFF)
    if head.kind == Kind.SNAPSHOT:
        return Tail(TailKind.DAMAGED, head.offset, "a piece of the snapshot that does not check")
    if written > extent:
        return Tail(TailKind.DAMAGED, head.offset, "a broken record with a later append behind it")
    if head.end > size or written <= extent - _TRAILER_SIZE:
        return Tail(TailKind.TORN, head.offset, "it ends early")
    return _judge_sectors(pread, head.offset, head.end)


def _judge_headless(pread: Pread, offset: int, written: int, size: int, rules: int) -> Tail:
    last = pread(offset + written - _TRAILER_SIZE, _TRAILER_SIZE)
    # A trailer names its record: one that begins further on is of a later append.
    apart = (int.from_bytes(last[:3], "big") - offset) & 0xFFFFFF
    if rules and last.endswith(b"\n") and 0 < apart < written:
        return Tail(TailKind.DAMAGED, offset, "a broken record with a later append behind it")
    # Whole sectors: the end of a sound head may be zero, alone in the next.
    return _judge_sectors(pread, offset, min(-(-(offset + HEAD.size) // SECTOR) * SECTOR, size))


def _judge_sectors(pread: Pread, offset: int, end: int) -> Tail:
    if _has_zero_sector(pread, offset, end):
        return Tail(TailKind.TORN, offset, "a sector of it was never written")
    return Tail(TailKind.DAMAGED, offset, "the last record does not check")


def find_newest(
    pread: Pread, size: int, backup_id: bytes, log_start: int, rules: int = RULES
) -> tuple[Head | None, Tail]:
    """The newest valid record of a file, and what stands behind it. Reads only the end."""
    head = find_last(pread, FIRST_RECORD, size, backup_id)
    end = FIRST_RECORD if head is None else head.end
    tail = judge_tail(pread, end, size, backup_id, rules)
    if head is not None and not payload_checks(pread, head):
        tail = judge_tail(pread, head.offset, size, backup_id, rules)
        head = find_last(pread, FIRST_RECORD, head.offset, backup_id)
        if head is not None and not payload_checks(pread, head):
            tail = Tail(TailKind.DAMAGED, head.offset, "the last records do not check")
    end = FIRST_RECORD if head is None else head.end
    if tail.kind is not TailKind.DAMAGED and (end != tail.offset or end < log_start):
        tail = Tail(TailKind.DAMAGED, end, "what should follow is missing")
    return head, tail


def _last_nonzero(pread: Pread, start: int, end: int) -> int:
    """The offset after the last byte in [start, end) that is not zero, or ``start``."""
    high = end
    while high > start:
        low = max(start, high - WINDOW)
        data = pread(low, high - low).rstrip(b"\0")
        if data:
            return low + len(data)
        high = low
    return start


def _has_zero_sector(pread: Pread, start: int, end: int) -> bool:
    low = start
    while low < end:
        high = min(end, (low // SECTOR + 1) * SECTOR)
        if not pread(low, high - low).strip(b"\0"):
            return True
        low = high
    return False
