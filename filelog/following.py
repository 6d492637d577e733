"""A log is followed: its records are read as they come, behind a place that is known."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator

from errors import PlaceGone
from filelog import layout2
from filelog.layout2 import MARKER, Head, Kind, TailKind
from filelog.reader import GROWING_TAIL_S, LogReader

QUICK_S = 0.02
"""How long to wait before the next look, where something came lately."""
SLOW_S = 0.05
LATELY_S = 1.0
PAUSE_S = 1.0
"""How often whoever follows gets to do something else."""


class LogFollower:
    """What comes behind a place in the log at ``path``, whichever file that is by then.

    No file is held open between two calls: a log that a compaction replaced is freed in steps
    only if nobody has it open.

    Args:
        last: see ``Replica.follow``.

    Attributes:
        last: the last record that was given, as it stands in the log that it was read from.
    """

    def __init__(self, path: str, last: Head | None) -> None:
        self.last = last
        self._path = path
        self._began: bytes | None = None
        """The id of the log that was read first."""
        self._look_s = 0.0
        """When to look next at what stands behind the last record."""
        self._broken_at: int | None = None
        """Where the last such look found damage: an append in flight looks like that, too."""

    def fresh(
        self,
        may_go: Callable[[Head], bool] = lambda head: True,
        begins: Callable[[LogReader], None] | None = None,
    ) -> Iterator[tuple[Head, bytes]]:
        """The records that are there now; with the file open, however long they take.

        Args:
            may_go: whether a record is given, or with all behind it left for a later call.
            begins: called with the log before its records.

        Raises:
            PlaceGone: the log does not hold the last record any more.
            BackupError: see LogReader; or it is damaged behind the last record.
        """
        with contextlib.closing(LogReader(self._path)) as reader:
            if reader.rules != layout2.RULES:
                raise reader.of_old_rules()
            if reader.damage is not None:
                raise reader.damage
            self._place(reader)
            if begins is not None:
                begins(reader)
            # One read of a few bytes: mostly there is nothing.
            if reader.pread(reader.position, len(MARKER)) == MARKER:
                for head, payload in reader.whole():
                    if not may_go(head):
                        return
                    self.last = head
                    yield head, payload
            if reader.damage is not None:
                raise reader.damage
            self._judge(reader)

    def records(self) -> Generator[tuple[Head, bytes] | None, None, None]:
        """The records as they come, which never ends.

        Where all that is there was given it gives None, and then every PAUSE_S.
        """
        pause_s = came_s = 0.0
        while True:
            came = False
            for record in self.fresh():
                came = True
                yield record
            now = time.monotonic()
            if came or now >= pause_s:
                yield None
                now = time.monotonic()
                pause_s = now + PAUSE_S
            came_s = now if came else came_s
            time.sleep(QUICK_S if now - came_s < LATELY_S else SLOW_S)

    def _place(self, reader: LogReader) -> None:
        """Have ``reader`` begin behind the last record."""
        if self.last is None:
            if self._began not in (None, reader.backup_id):
                raise PlaceGone(self._path, 0)  # It was empty, and another took its place.
            self._began = reader.backup_id
            return
        found = place_of(reader, self.last)
        if found is None:
            raise PlaceGone(self._path, self.last.version)
        reader.start_after(found)
        if found.kind == Kind.SNAPSHOT and self.last.kind != Kind.SNAPSHOT:
            # A compaction wrote the owner again, which was given before.
            data = reader.pread(found.end, layout2.HEAD.size)
            behind = layout2.decode_head(data, found.end, reader.backup_id)
            if behind is not None and behind.sequence == found.sequence:
                found = behind
                reader.start_after(found)
        self.last = found

    def _judge(self, reader: LogReader) -> None:
        """Raise Damaged if what stands behind the last record is no append in flight."""
        now = time.monotonic()
        if now < self._look_s:
            return
        self._look_s = now + GROWING_TAIL_S
        tail = reader.judge()
        if tail.kind is not TailKind.DAMAGED:
            self._broken_at = None
        elif self._broken_at == tail.offset:
            raise reader.as_damage(tail.offset, tail.reason)
        else:
            self._broken_at = tail.offset


def place_of(reader: LogReader, last: Head) -> Head | None:
    """The record of this log behind which it goes on from ``last``; None if there is none.

    That is the record itself, or the end of the snapshot that stands for exactly that. In a log
    of another backup id, as that of another of several destinations, it is found by its chain.
    """
    hint = reader.ending_at(last.end)
    if hint is not None and _is_same(hint, last):
        return hint
    if last.kind == Kind.SNAPSHOT and not last.flags & layout2.FINAL:
        return None
    if last.backup_id != reader.backup_id:
        return _by_chain(reader, last)
    log_start = reader.log_start or layout2.FIRST_RECORD
    snapshot = reader.ending_at(log_start)
    if snapshot is not None and _stands_at(snapshot, last):
        return snapshot
    found = _by_sequence(reader, log_start, last.sequence)
    return found if found is not None and _stands_at(found, last) else None


def _is_same(found: Head, last: Head) -> bool:
    ids = found.backup_id == last.backup_id and found.kind == last.kind
    return ids and _stands_at(found, last)


def _stands_at(found: Head, last: Head) -> bool:
    return (found.sequence, found.chain) == (last.sequence, last.chain)


def _by_sequence(reader: LogReader, low: int, sequence: int) -> Head | None:
    """The record with that number, which begins at ``low`` or behind it."""
    high = reader.allocated
    while low < high:
        middle = (low + high) // 2
        head = layout2.find_next(reader.pread, middle, high, reader.backup_id)
        if head is None or head.sequence > sequence:
            high = middle
        elif head.sequence == sequence:
            return head
        else:
            low = head.end
    return None


def _by_chain(reader: LogReader, last: Head) -> Head | None:
    """The last record at which the history is that at ``last``.

    A rewind leads back to a chain: better where the newest change can be taken back, or not, as
    at ``last``.
    """
    exact = alike = None
    for head in reader.heads():
        is_end = head.kind != Kind.SNAPSHOT or head.flags & layout2.FINAL
        if head.chain == last.chain and is_end:
            alike = head
            exact = head if head.rewindable == last.rewindable else exact
    return exact or alike
