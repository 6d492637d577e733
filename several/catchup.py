"""One of several destinations is brought to what another one holds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator

from backend import EMPTY_CHAIN, TAG_SIZE, log
from errors import BackupError
from filelog.layout2 import Head, Kind, rewind_behind
from quorum import Mark, Relation
from replica import Record, Replica, unvoting


class Moved(BackupError):
    """What was read does not continue what is there: one of the two has changed meanwhile."""


def marks(records: Iterable[Record]) -> Iterator[Mark]:
    """What the records of a log tell of its history; the snapshot, or nothing, is the first."""
    begun = False
    for head, _ in records:
        if not begun:
            snapshot = head.kind == Kind.SNAPSHOT
            yield Mark(head.chain, False, head.version) if snapshot else Mark(EMPTY_CHAIN, False, 0)
            begun = True
        if head.kind != Kind.SNAPSHOT:
            yield Mark(head.chain, head.rewindable, head.version)
    if not begun:
        yield Mark(EMPTY_CHAIN, False, 0)


def continues(newest: Head, head: Head) -> bool:
    """Whether the record ``head``, no snapshot, fits behind ``newest``."""
    if head.kind == Kind.OWNER:
        return head.chain == newest.chain
    if head.kind == Kind.REWIND:
        history = head.chain_before, head.chain
        return newest.rewindable and history == (newest.chain, newest.chain_before)
    return head.chain_before == newest.chain


class CatchUp:
    """Brings ``target``, which is open, to what a source holds.

    Args:
        lock: held by whoever changes ``target``.
        owner: who writes.
        votes: see quorum.Roster; without, it gets none by what is copied.
    """

    def __init__(self, target: Replica, lock: threading.Lock, owner: bytes, votes: bool) -> None:
        self._target = target
        self._lock = lock
        self._owner = owner
        self.votes = votes

    def _as_it_votes(self, records: Iterator[Record]) -> Iterator[Record]:
        return records if self.votes else map(unvoting, records)

    def add(self, head: Head, payload: bytes) -> None:
        """Add one record, durably; Moved if it does not fit."""
        with self._lock:
            if not continues(self._target.newest, head):
                raise Moved(f"{self._target.url} has changed while it was brought up to date.")
            self._target.add_record(head, payload)

    def bring(self, source: Replica, relation: Relation, place: int) -> None:
        """Give it all that ``source`` has.

        Args:
            relation, place: how it stands to that: see quorum.compare; not APART.

        Raises:
            BackupError: either of the two failed, or has changed meanwhile.
        """
        if relation in (Relation.FOLDED, Relation.ONE_MORE_FOR_GOOD):
            return self._begin_anew(source)
        with source.records() as records:
            rest: Iterator[Record] = itertools.islice(_behind_snapshot(records), place - 1, None)
            if relation is Relation.ONE_MORE:
                first = next(rest, None)
                self._take_back(first)
                rest = itertools.chain([first] if first else [], rest)
            for head, payload in self._as_it_votes(rest):
                self.add(head, payload)

    def _take_back(self, following: Record | None) -> None:
        """Take back the one change that nobody else has."""
        newest = self._target.newest
        # In the session that goes on from there: a server takes no session that was before.
        session = following[0].session if following else _next_session(newest.session)
        log.info(f"{self._target.url}: one change that nobody else has is taken back")
        head = rewind_behind(newest, session, newest.time_ns)
        self.add(head, b"")

    def _begin_anew(self, source: Replica) -> None:
        """Replace it by all that ``source`` has; what it was is kept."""
        target = self._target
        with source.records() as records, self._lock:
            kept = target.take_all(self._as_it_votes(records), self._owner)
        if kept is not None:
            log.info(f"{target.url} begins anew, with all of {source.url}; kept: {kept}")


def _next_session(session: bytes) -> bytes:
    number = int.from_bytes(session[TAG_SIZE:], "big") + 1
    return session[:TAG_SIZE] + number.to_bytes(len(session) - TAG_SIZE, "big")


def _behind_snapshot(records: Iterable[Record]) -> Iterator[Record]:
    return (record for record in records if record[0].kind != Kind.SNAPSHOT)
