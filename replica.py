"""What a destination must do besides, to be one of several: hand out and take records."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import durable
import scratch
import space
from backend import Destination, Snapshot
from filelog.layout2 import (
    BEFORE_FIRST,
    Head,
    Kind,
    owner_behind,
    session_behind,
    session_of,
    start_of,
    term_of,
    without_vote,
)
from quorum import Roster

Record = tuple[Head, bytes]
"""A record with its payload. Of the head only counts what is of the history, not of a file."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at one of several destinations tells.

    Attributes:
        backup_id: 16 bytes that tell two backups apart.
        newest: head of its newest record.
        version_count: see Backend.
    """

    backup_id: bytes
    newest: Head
    version_count: int


class Pause(NamedTuple):
    """All that was there was given.

    Attributes:
        url: of the destination that is followed.
        newest: the newest record that is known of, as last given; None: there is none.
    """

    url: str
    newest: Head | None


class Followable(Destination):
    """A Destination whose records can be followed as they come."""

    @abstractmethod
    def follow(
        self, after: Head | None
    ) -> contextlib.AbstractContextManager[Iterator[Record | Pause]]:
        """The records behind ``after``, as ``records`` gives them, and then those that come.

        Needs no open, and changes nothing. It never ends by itself. Whenever all that is there was
        given it gives a Pause, and then one every second or so, until more comes.

        Only what is durable comes, but for one thing: of a file that is read beside its writer
        the newest record may not be flushed yet. Then it was not acknowledged, and after a
        loss of power it may be gone, or another stand there; whoever applies a change when the
        next record but a rewind came, which no writer begins before the flush, applies none of
        those. If that record is gone, PlaceGone is raised: try again behind the one before it.

        An owner may come that was given before, and after a change of destinations a record that
        is of the same history as ``after`` goes for it. Its sequence is that of the log it is
        read from.

        Args:
            after: the last record that the caller has, None: begin with the snapshot. It is
                found by sequence and chain, its offset is but a hint; in a log of another backup
                id, as that of another of several destinations, by chain. A compaction may have
                moved it, or folded it into a snapshot that stands for just that.

        Raises:
            PlaceGone: by the iterator: that record is not there any more. Follow from None.
            BackupError: by either: damage, or the destination does not answer, or is of a layout
                or a protocol that cannot be followed. After what passes, such as a server that is
                started again, follow from the last record.
        """


class Replica(Followable):
    """A Destination that can be one of several.

    Attributes:
        takes_quickly: ``take_all`` is quicker than to add many records.
        works_elsewhere: ``add_record_while`` has time to spare.
    """

    takes_quickly = False
    works_elsewhere = False

    @abstractmethod
    def look(self) -> Look:
        """What it holds, without changing a byte; only if not open.

        Raises:
            BackupError: it is missing, damaged or does not answer, or cannot be one of several.
        """

    @abstractmethod
    def roster(self) -> Roster | None:
        """The list of destinations that it keeps, None if it is the only one."""

    @property
    @abstractmethod
    def newest(self) -> Head:
        """Head of its newest record; only once open."""

    @abstractmethod
    def add_record(self, head: Head, payload: bytes) -> None:
        """Store a change, a rewind or an owner as another one holds it; durable on return.

        Args:
            head: continues ``newest``.
        """

    def add_record_while(self, head: Head, payload: bytes, meanwhile: Callable[[], None]) -> None:
        """``add_record``, and ``meanwhile`` where it has to wait, or not at all."""
        self.add_record(head, payload)

    def add_records(self, records: Iterable[Record], lock: threading.Lock) -> None:
        """``add_record`` for each of many; all are durable on return.

        Args:
            lock: held while something is added.
        """
        for head, payload in records:
            with lock:
                self.add_record(head, payload)

    def take_all(self, records: Iterator[Record], owner: bytes) -> str | None:
        """Start over with all the records of another one, and go on with them; only once open.

        Args:
            owner: who writes to it.

        Returns:
            Where the old backup is kept, None if it was empty.
        """
        with scratch.held(self.scratch_paths(None)) as base:
            snapshot, begins, first = _unpacked(records, f"{base}.sqlite3")
            # Who is cut off here goes on from here, and has not forgotten of which start it heard.
            session = session_of(owner, term_of(begins.session), start_of(self.newest.session))
            # Until all is there it lacks some of what it had acknowledged, if that is newer.
            lacks = snapshot is None or snapshot.version < self.version
            # As its writer: not if another node has taken it over meanwhile.
            kept = self.replace(snapshot, session, override=lacks)
            self.close()
            self.open(owner)
            last_owner, changes = b"", False

            def passing() -> Iterator[Record]:
                nonlocal last_owner, changes
                for head, payload in itertools.chain([first] if first else [], records):
                    if head.kind == Kind.OWNER:
                        last_owner = payload
                    changes = changes or head.kind != Kind.OWNER
                    if not changes:
                        # Not as it stands there: what was before a snapshot is not told.
                        session = session_behind(begins, head, payload)
                        head = owner_behind(self.newest, session, payload)
                    yield unvoting((head, payload)) if lacks else (head, payload)

            self.add_records(passing(), threading.Lock())
            if last_owner and lacks:
                newest = self.newest
                self.add_record(owner_behind(newest, newest.session, last_owner), last_owner)
        return kept

    @abstractmethod
    def records(self) -> contextlib.AbstractContextManager[Iterator[Record]]:
        """All of its records in order, beginning with the pieces of its snapshot.

        Needs no open. The iterator raises BackupError where they are damaged.
        """


def unvoting(record: Record) -> Record:
    """``record``, for a destination that has no vote (see quorum.Roster)."""
    head, payload = record
    if head.kind != Kind.OWNER:
        return record
    payload = without_vote(payload)
    return head._replace(length=len(payload)), payload


def _unpacked(records: Iterator[Record], path: str) -> tuple[Snapshot | None, Head, Record | None]:
    """The snapshot of a log as the new file ``path``, its head, and the first record behind it."""
    last: Head | None = None
    following: Record | None = None
    with contextlib.closing(_Spool(path)) as spool:
        for head, payload in records:
            if head.kind != Kind.SNAPSHOT:
                following = head, payload
                break
            spool.add(payload)
            last = head
    snapshot = Snapshot(path, last.version, last.chain) if last else None
    return snapshot, last or BEFORE_FIRST, following


class _Spool:
    """A new file, written from its beginning."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = durable.create(path)
        self._size = 0

    def add(self, data: bytes) -> None:
        if not self._size % (64 << 20):
            space.require(self._path)
        durable.write_all(self._fd, data, self._size)
        self._size += len(data)

    def close(self) -> None:
        os.close(self._fd)
