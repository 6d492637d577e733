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

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from backend import (
    MAX_CHANGE_SIZE,
    MAX_CHUNK_SIZE,
    MAX_VERSION,
    Beginning,
    Change,
    Ending,
    Reading,
    Status,
    Step,
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


@dataclass(frozen=True, slots=True)
class Layout1Ending(Ending):
    """How a pass over a file of layout 1 went.

    Attributes:
        changes: changes since the snapshot that count.
        abandoned: changes left out because the node never committed them.
        snapshot_size: bytes of the last snapshot.
        rewindable: whether the last change may be taken back.
    """

    changes: int = 0
    abandoned: int = 0
    snapshot_size: int = 0
    rewindable: bool = False


class Layout1Reading(Reading):
    """A pass over a file of layout 1 (see Reading), which ends in a Layout1Ending."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._total = os.fstat(self._fd).st_size
        except FileNotFoundError as error:
            raise BackupMissing(f"file://{path}") from error
        except OSError as error:
            raise DiskError(path, error, "open") from error
        self._position = FIRST_ENTRY
        self._abandoned = 0
        self._changes = 0
        self._version = 0
        self._snapshot_size = 0
        self._rewindable = False
        self._held: Change | None = None
        self._reason = ""
        self._entries = 0
        self._highest = 0

    def __iter__(self) -> Iterator[Step]:
        for found in self._found():
            yield Step(found, self._position, self._total)

    def _found(self) -> Iterator[Beginning | Change | Layout1Ending]:
        header, damage = b"", None
        try:
            header = self._pread(0, FIRST_ENTRY)
            while self._position < self._total and not self._reason:
                yield from self._next_entry()
        except BackupError as error:
            damage = error
        if self._held is not None:
            yield self._held
        if damage is None and len(header) < FIRST_ENTRY:
            damage = self._damaged("the header is cut off", "and there may be more")
        if damage is not None:
            yield self._ending(damage)
        else:
            _, version, _, _, _, count = HEADER.unpack_from(header)
            yield self._judged(version, count)

    def _ending(self, damage: BackupError | None, *notes: str) -> Layout1Ending:
        return Layout1Ending(
            version=self._version,
            torn_tail=bool(self._reason) and damage is None,
            damage=damage,
            notes=notes,
            changes=self._changes,
            abandoned=self._abandoned,
            snapshot_size=self._snapshot_size,
            rewindable=self._rewindable,
        )

    def _next_entry(self) -> Iterator[Beginning | Change]:
        head = self._pread(self._position, ENTRY.size)
        if len(head) < ENTRY.size:
            return self._stop("it ends inside an entry")
        length, version, kind = ENTRY.unpack(head)
        end = self._position + ENTRY.size + length
        if not any(head):
            return self._stop("the rest is zero")
        if kind not in (TRANSACTION, SNAPSHOT):
            return self._stop(f"an entry of the unknown type {kind}")
        if end > self._total:
            return self._unreadable(version, kind, length, "it ends inside an entry")
        if kind == SNAPSHOT:
            yield from self._snapshot(version, length)
        else:
            yield from self._transaction(version, length)
        if not self._reason:
            self._position = end
            self._entries += 1
            self._highest = max(self._highest, version)

    def _stop(self, reason: str) -> None:
        self._reason = reason

    def _unreadable(self, version: int, kind: int, length: int, reason: str) -> None:
        """Stop before an entry of which only the head can be read."""
        bumps = kind == TRANSACTION and length >= len(bump(version))
        if bumps and self._rewindable and version == self._version:
            # It came in place of the change before it, which was abandoned.
            self._held, self._rewindable = None, False
            self._version -= 1
            self._changes -= 1
            self._abandoned += 1
        self._stop(reason)

    def _snapshot(self, version: int, length: int) -> Iterator[Beginning | Change]:
        self._held = None
        self._version, self._changes, self._snapshot_size = version, 0, length
        self._rewindable = False
        yield Beginning(version, length)
        start = self._position + ENTRY.size
        for offset in range(start, start + length, MAX_CHUNK_SIZE):
            size = min(MAX_CHUNK_SIZE, start + length - offset)
            yield Change(version, self._pread(offset, size), None)

    def _transaction(self, version: int, length: int) -> Iterator[Change]:
        try:
            if length > MAX_CHANGE_SIZE:
                raise InvalidChange("an entry over the limit of a change")
            change = Change.decode(version, self._pread(self._position + ENTRY.size, length))
        except InvalidChange as error:
            return self._unreadable(version, TRANSACTION, length, error.problem.rstrip("."))
        if not change.is_known:
            raise self._damaged(
                f"the change to version {version} does not end with the statement that every"
                " change ends with",
                "and what follows is not known",
            )
        verdict = judge(change.base, self._version, self._rewindable, first=True)
        if verdict is Verdict.REWIND:
            self._abandoned += 1
            self._changes -= 1
        elif verdict is not Verdict.APPEND:
            raise self._damaged(
                f"an entry of version {version} follows one of version {self._version}",
                "the ones between are missing",
            )
        elif self._held is not None:
            yield self._held
        self._held = change
        self._version, self._rewindable = version, change.bumps
        self._changes += 1

    def _judged(self, header_version: int, header_count: int) -> Layout1Ending:
        """The ending: compare the header, and what stands behind the end, with the entries read."""
        reason, lost = self._reason or "the file ends there", ""
        damage, notes = None, []
        behind = self._newest_behind() if self._reason else 0
        if header_version > self._highest:
            lost = f"but its header names version {header_version}: what is between is lost"
        elif header_version > self._version and header_count == self._entries and not self._reason:
            lost = f"but its header names version {header_version}"
        elif header_count > self._entries:
            lost = f"but its header counts {header_count} entries, and {self._entries} are there"
        elif behind > self._version + 1:
            lost = f"versions {self._version + 1} to {behind} stand behind the damage"
        if lost:
            damage = self._damaged(reason, lost)
        elif self._reason:
            notes.append(f"At offset {self._position} {reason}; it was left out.")
        if header_version < self._version:
            notes.append(
                f"The header is behind: it names version {header_version}, and the entries"
                f" lead to version {self._version}."
            )
        return self._ending(damage, *notes)

    def _newest_behind(self) -> int:
        """The highest version that a change behind the end of the entries leads to, or 0."""
        newest, overlap = 0, len(bump(MAX_VERSION))
        for offset in range(self._position, self._total, MAX_CHUNK_SIZE):
            window = self._pread(offset, MAX_CHUNK_SIZE + overlap)
            newest = max([newest, *(int(match[1]) + 1 for match in _BUMP.finditer(window))])
        return newest

    def _damaged(self, reason: str, lost: str) -> Damaged:
        return Damaged(self._path, self._position, reason, self._version, lost)

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise DiskError(self._path, error, f"read at offset {offset}") from error

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
    with contextlib.closing(Layout1Reading(path)) as reading:
        for step in reading:
            ending, position, total = step
    assert isinstance(ending, Layout1Ending), "a pass ends in one"
    notes = list(ending.notes)
    if ending.abandoned:
        notes.append(f"{ending.abandoned} changes that never happened are left out.")
    return Status(
        url=url,
        layout="file layout 1, of the earlier plugin",
        version=ending.version,
        prev_version=ending.version - 1 if ending.rewindable else None,
        version_count=ending.changes + (ending.snapshot_size > 0),
        changes=ending.changes,
        snapshot_size=ending.snapshot_size,
        size=position,
        allocated=total,
        torn_tail=ending.torn_tail,
        checked=True,
        damage=str(ending.damage) if ending.damage else None,
        notes=notes,
    )
