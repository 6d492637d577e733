"""One of several destinations is brought to what another one holds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from backend import EMPTY_CHAIN, TAG_SIZE, log
from errors import BackupError
from filelog.layout2 import Head, Kind, rewind_behind
from quorum import End, Mark, Relation, compare
from replica import Pause, Record, Replica, unvoting


class Moved(BackupError):
    """What was read does not continue what is there: one of the two has changed meanwhile."""


def marks(
    records: Iterable[Record], passed: Callable[[int, Head], None] = lambda *_: None
) -> Iterator[Mark]:
    """What the records of a log tell of its history; the snapshot, or nothing, is the first.

    Args:
        passed: called with each record, and the number of marks up to it.
    """
    count = 0
    for head, _ in records:
        if not count:
            count = 1
            snapshot = head.kind == Kind.SNAPSHOT
            yield Mark(head.chain, False, head.version) if snapshot else Mark(EMPTY_CHAIN, False, 0)
        if head.kind != Kind.SNAPSHOT:
            count += 1
            yield Mark(head.chain, head.rewindable, head.version)
        passed(count, head)
    if not count:
        yield Mark(EMPTY_CHAIN, False, 0)


class Standing(NamedTuple):
    """How a destination stands to a source (see quorum.compare).

    Attributes:
        after: the source's record behind which it goes on; None: from the beginning.
    """

    relation: Relation
    after: Head | None


def stand(end: End, tag: bytes, source: Replica) -> Standing:
    """How a destination that ends in ``end`` stands to ``source``.

    Args:
        tag: of the owner that it knows.

    Raises:
        BackupError: that does not answer, or is damaged.
    """
    possible: dict[int, Head] = {}

    def passed(count: int, head: Head) -> None:
        if head.chain in (end.chain, end.chain_before):
            possible[count] = head

    with source.records() as records:
        relation, place = compare(end, marks(records, passed))
    after = possible.get(place)
    if after is not None and after.kind == Kind.OWNER and after.tag != tag:
        # It leads to no other chain, but without it a server refuses what follows.
        after = possible.get(place - 1)
    return Standing(relation, after)


def continues(newest: Head, head: Head) -> bool:
    """Whether the record ``head`` fits behind ``newest``; a snapshot never does."""
    if head.kind == Kind.SNAPSHOT:
        return False
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
        self._add_all([(head, payload)])

    def _add_all(self, records: Iterable[Record]) -> None:
        self._target.add_records(self._continuing(records), self._lock)

    def _continuing(self, records: Iterable[Record]) -> Iterator[Record]:
        newest = self._target.newest
        for head, payload in records:
            if not continues(newest, head):
                raise Moved(f"{self._target.url} has changed while it was brought up to date.")
            yield head, payload
            newest = head

    def bring(self, source: Replica, standing: Standing) -> None:
        """Give it all that ``source`` has.

        Args:
            standing: how it stands to that; not APART.

        Raises:
            BackupError: either of the two failed, or has changed meanwhile.
        """
        is_all = standing.after is None and self._target.takes_quickly
        if is_all or standing.relation in (Relation.FOLDED, Relation.ONE_MORE_FOR_GOOD):
            return self.begin_anew(source)
        with source.follow(standing.after) as found:
            rest = _all_there_is(found)
            if standing.relation is Relation.ONE_MORE:
                first = next(rest, None)
                self._take_back(first)
                rest = itertools.chain([first] if first else [], rest)
            self._add_all(self._as_it_votes(rest))

    def _take_back(self, following: Record | None) -> None:
        """Take back the one change that nobody else has."""
        newest = self._target.newest
        # In the session that goes on from there: a server takes no session that was before.
        session = following[0].session if following else _next_session(newest.session)
        log.info(f"{self._target.url}: one change that nobody else has is taken back")
        head = rewind_behind(newest, session, newest.time_ns)
        self.add(head, b"")

    def begin_anew(self, source: Replica) -> None:
        """Replace it by all that ``source`` has; what it was is kept."""
        target = self._target
        with source.records() as records, self._lock:
            kept = target.take_all(self._as_it_votes(records), self._owner)
        if kept is not None:
            log.info(f"{target.url} begins anew, with all of {source.url}; kept: {kept}")


def _next_session(session: bytes) -> bytes:
    number = int.from_bytes(session[TAG_SIZE:], "big") + 1
    return session[:TAG_SIZE] + number.to_bytes(len(session) - TAG_SIZE, "big")


def _all_there_is(found: Iterable[Record | Pause]) -> Iterator[Record]:
    for each in found:
        if isinstance(each, Pause):
            return
        yield each
