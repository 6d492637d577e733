"""File layout 1, of the earlier backup plugin: read, never written. All big-endian.

Header, 512 bytes:

    offset  size  field          meaning
         0     4  layout         1
         4     4  version        of the last entry
         8     8  offset         end of the last good entry
        16     4  prev version   before the last entry
        20     8  prev offset    its end
        28     8  version count  entries ever added, those taken back included
        36   476  padding        zero

Then entries, back to back from byte 512:

    offset  size  field    meaning
         0     4  length   of the payload
         4     4  version  data_version with this entry
         8     1  type     1: statements in UTF-8, joined by NUL; 2: an SQLite file, which
                           replaces everything before it
         9     n  payload

The plugin that wrote this never flushed, and appended always at the end of the file. So
the end can be torn or zero, the header can be behind the entries or ahead of them, and a
change that a rewind took back still stands there, followed by what came in its place.
The version rule, read one entry later, tells which of the two was abandoned.

The header was written before a change was acknowledged. So an end that cannot be read,
while the header is not ahead of what can, was never acknowledged: a torn tail. If the
header is ahead, or a later version is seen behind that end, acknowledged changes are
lost: damage.

There are no checksums: a byte that went wrong inside a statement or a snapshot is seen
only if SQLite then refuses it.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator

from backend import (
    MAX_CHANGE_SIZE,
    MAX_CHUNK_SIZE,
    MAX_VERSION,
    Change,
    Reading,
    Status,
    bump,
)
from decisions import Verdict, judge
from errors import BackupError, BackupMissing, Damaged, DiskError, InvalidChange

START = b"\x00\x00\x00\x01"
"""How a file of layout 1 begins."""
HEADER = struct.Struct("!IIQIQQ")
FIRST_ENTRY = 512
ENTRY = struct.Struct("!IIB")
TRANSACTION = 1
SNAPSHOT = 2
_BUMP = re.compile(re.escape(bump(1).removesuffix("0").encode()) + rb"([0-9]{1,10})")


class Layout1Reading(Reading):
    """A pass over a file of layout 1 (see Reading).

    Attributes:
        abandoned: changes left out because the node never committed them.
        changes: changes since the snapshot that count.
        snapshot_size: bytes of the last snapshot.
        notes: what else was found, in words.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.total = os.fstat(self._fd).st_size
        except FileNotFoundError as error:
            raise BackupMissing(f"file://{path}") from error
        except OSError as error:
            raise DiskError(path, error, "open") from error
        self.position = FIRST_ENTRY
        self.abandoned = 0
        self.changes = 0
        self.snapshot_size = 0
        self.notes: list[str] = []
        self.rewindable = False
        self._held: Change | None = None
        self._reason = ""
        self._entries = 0
        self._highest = 0

    def __iter__(self) -> Iterator[Change]:
        header = self._pread(0, FIRST_ENTRY)
        try:
            while self.position < self.total and not self._reason:
                yield from self._next_entry()
        except BackupError as error:
            self.damage = error
        if self._held is not None:
            yield self._held
        if self.damage is not None:
            return
        if len(header) < FIRST_ENTRY:
            self.damage = self._damaged("the header is cut off", "and there may be more")
        else:
            _, version, _, _, _, count = HEADER.unpack_from(header)
            self._judge_end(version, count)

    def _next_entry(self) -> Iterator[Change]:
        head = self._pread(self.position, ENTRY.size)
        if len(head) < ENTRY.size:
            return self._stop("it ends inside an entry")
        length, version, kind = ENTRY.unpack(head)
        end = self.position + ENTRY.size + length
        if not any(head):
            return self._stop("the rest is zero")
        if kind not in (TRANSACTION, SNAPSHOT):
            return self._stop(f"an entry of the unknown type {kind}")
        if end > self.total:
            return self._unreadable(version, kind, length, "it ends inside an entry")
        if kind == SNAPSHOT:
            yield from self._snapshot(version, length)
        else:
            yield from self._transaction(version, length)
        if not self._reason:
            self.position = end
            self._entries += 1
            self._highest = max(self._highest, version)

    def _stop(self, reason: str) -> None:
        self._reason = reason

    def _unreadable(self, version: int, kind: int, length: int, reason: str) -> None:
        """Stop before an entry of which only the head can be read."""
        bumps = kind == TRANSACTION and length >= len(bump(version))
        if bumps and self.rewindable and version == self.version:
            # It came in place of the change before it, which was abandoned.
            self._held, self.rewindable = None, False
            self.version -= 1
            self.changes -= 1
            self.abandoned += 1
        self._stop(reason)

    def _snapshot(self, version: int, length: int) -> Iterator[Change]:
        self._held = None
        self.version, self.changes, self.snapshot_size = version, 0, length
        self.rewindable = False
        yield Change(version, b"", None)
        start = self.position + ENTRY.size
        for offset in range(start, start + length, MAX_CHUNK_SIZE):
            size = min(MAX_CHUNK_SIZE, start + length - offset)
            yield Change(version, self._pread(offset, size), None)

    def _transaction(self, version: int, length: int) -> Iterator[Change]:
        try:
            if length > MAX_CHANGE_SIZE:
                raise InvalidChange("an entry over the limit of a change")
            change = Change.decode(version, self._pread(self.position + ENTRY.size, length))
        except InvalidChange as error:
            return self._unreadable(version, TRANSACTION, length, error.problem.rstrip("."))
        if not change.is_known:
            raise self._damaged(
                f"the change to version {version} does not end with the statement that every"
                " change ends with",
                "and what follows is not known",
            )
        verdict = judge(change.base, self.version, self.rewindable, first=True)
        if verdict is Verdict.REWIND:
            self.abandoned += 1
            self.changes -= 1
        elif verdict is not Verdict.APPEND:
            raise self._damaged(
                f"an entry of version {version} follows one of version {self.version}",
                "the ones between are missing",
            )
        elif self._held is not None:
            yield self._held
        self._held = change
        self.version, self.rewindable = version, change.bumps
        self.changes += 1

    def _judge_end(self, header_version: int, header_count: int) -> None:
        """Compare the header, and what stands behind the end, with the entries read."""
        reason, lost = self._reason or "the file ends there", ""
        behind = self._newest_behind() if self._reason else 0
        if header_version > self._highest:
            lost = f"but its header names version {header_version}: what is between is lost"
        elif header_version > self.version and header_count == self._entries and not self._reason:
            lost = f"but its header names version {header_version}"
        elif header_count > self._entries:
            lost = f"but its header counts {header_count} entries, and {self._entries} are there"
        elif behind > self.version + 1:
            lost = f"versions {self.version + 1} to {behind} stand behind the damage"
        if lost:
            self.damage = self._damaged(reason, lost)
        elif self._reason:
            self.torn_tail = True
            self.notes.append(f"At offset {self.position} {reason}; it was left out.")
        if header_version < self.version:
            self.notes.append(
                f"The header is behind: it names version {header_version}, and the entries"
                f" lead to version {self.version}."
            )

    def _newest_behind(self) -> int:
        """The highest version that a change behind the end of the entries leads to, or 0."""
        newest, overlap = 0, len(bump(MAX_VERSION))
        for offset in range(self.position, self.total, MAX_CHUNK_SIZE):
            window = self._pread(offset, MAX_CHUNK_SIZE + overlap)
            newest = max([newest, *(int(match[1]) + 1 for match in _BUMP.finditer(window))])
        return newest

    def _damaged(self, reason: str, lost: str) -> Damaged:
        return Damaged(self.path, self.position, reason, self.version, lost)

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise DiskError(self.path, error, f"read at offset {offset}") from error

    def close(self) -> None:
        """See Reading."""
        os.close(self._fd)


def is_layout_1(path: str) -> bool:
    """Whether the file ``path`` begins like layout 1."""
    if not os.path.isfile(path):  # To open a FIFO would wait for ever.
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(START)) == START
    except OSError:
        return False  # Whoever opens it next says why.


def header_version(path: str) -> int:
    """The version that the header of the file ``path`` names; 0 if it is cut off."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise DiskError(path, error, "read") from error
    return int(HEADER.unpack(header)[1]) if len(header) == HEADER.size else 0


def status(url: str, path: str) -> Status:
    """A look at the file of layout 1 ``path``."""
    reading = Layout1Reading(path)
    try:
        for _ in reading:
            pass
    finally:
        reading.close()
    notes = list(reading.notes)
    if reading.abandoned:
        notes.append(f"{reading.abandoned} changes that never happened are left out.")
    return Status(
        url=url,
        layout="file layout 1, of the earlier plugin",
        version=reading.version,
        prev_version=reading.version - 1 if reading.rewindable else None,
        version_count=reading.changes + (reading.snapshot_size > 0),
        changes=reading.changes,
        snapshot_size=reading.snapshot_size,
        size=reading.position,
        allocated=reading.total,
        torn_tail=reading.torn_tail,
        checked=True,
        damage=str(reading.damage) if reading.damage else None,
        notes=notes,
    )
