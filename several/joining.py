"""Which destinations go on with a backup, as an operator says: they are added and dropped here."""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from backend import EMPTY_CHAIN, Progress
from errors import BackupError, BackupMissing
from filelog import layout2
from quorum import Relation, Roster, compare
from replica import Replica
from several.catchup import CatchUp, marks
from several.hearing import (
    Branched,
    Heard,
    Make,
    choose,
    distinct,
    end_of,
    hear,
    missing,
    newest_roster,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What an attach means to do.

    Attributes:
        leader: has all there is.
        roster: the new list; of one URL if there is one destination.
        term: of the take-over.
        relations: how each of the new list stands to the leader; None: there is none yet.
    """

    leader: Heard
    roster: Roster
    term: int
    relations: dict[str, tuple[Relation, int] | None]


def plan(urls: Sequence[str], acks: int, former: Roster | None, make: Make) -> Plan:
    """What has to be done so that ``urls`` go on with the backup; nothing is changed.

    Args:
        former: the list that backup.lock names, None if it names none.

    Raises:
        Silent: too few of the former list answer.
        Branched: one of them is of another history.
        BackupError: one of ``urls`` does not answer, or is damaged; or none holds anything.
    """
    others = [url for url in (former.urls if former else ()) if url not in urls]
    found = hear([make(url) for url in (*urls, *others)])
    for heard in found[: len(urls)]:
        if heard.error is not None and not _is_absent(heard):
            raise heard.error
    filled = [heard for heard in found if not _is_empty(heard)]
    before = newest_roster(found, former)
    if before is not None and (doubt := missing(filled, before)) is not None:
        raise doubt
    if not filled:
        raise BackupMissing(" ".join(urls))
    leader, _ = choose(filled)
    relations = {heard.url: _relation(heard, leader) for heard in found[: len(urls)]}
    terms = [end_of(h.look.newest).term for h in distinct(found) if h.look is not None]
    epoch = 1 + (before.epoch if before is not None else 0)
    return Plan(leader, Roster(epoch, acks, tuple(urls)), 2 + max(terms) // 2 * 2, relations)


def _is_absent(heard: Heard) -> bool:
    return isinstance(heard.error, BackupMissing)


def _is_empty(heard: Heard) -> bool:
    return heard.look is None or heard.look.newest.chain == EMPTY_CHAIN


def _relation(heard: Heard, leader: Heard) -> tuple[Relation, int] | None:
    if heard.look is None:
        return None
    assert leader.look is not None
    newest, leading = heard.look.newest, leader.look.newest
    with leader.replica.records() as records:
        relation, place = compare(end_of(newest), marks(records))
    # Where nothing shows whether it is of this history, it is not of this node's either.
    foreign = relation is Relation.FOLDED and newest.tag != leading.tag and not _is_empty(heard)
    if relation is Relation.APART or foreign:
        raise Branched(heard.url, leader.url)
    return relation, place


def bring_all(plan: Plan, make: Make, progress: Progress) -> None:
    """Let each of the new list hold what the leader holds.

    Args:
        progress: called with the number of those that are done, and of all.
    """
    for number, url in enumerate(plan.roster.urls):
        progress(number, len(plan.roster.urls))
        replica, found = make(url), plan.relations[url]
        if found is None:
            replica.create(None)
            with plan.leader.replica.records() as records:
                found = compare(end_of(replica.look().newest), marks(records))
        relation, place = found
        if url == plan.leader.url or relation is Relation.EQUAL:
            continue
        with contextlib.closing(replica):
            replica.open()
            assert plan.leader.look is not None
            owner = plan.leader.look.newest.session
            CatchUp(replica, threading.Lock(), owner).bring(plan.leader.replica, relation, place)


def take_over(plan: Plan, owner: bytes, make: Make) -> None:
    """Let ``owner`` write to each of the new list from here on, and each keep that list."""
    assert plan.leader.look is not None
    chain = plan.leader.look.newest.chain
    for url in plan.roster.urls:
        replica = make(url)
        with contextlib.closing(replica):
            replica.open()
            if replica.newest.chain != chain:
                raise BackupError(f"{url} has changed meanwhile.", "Look who writes to it.")
            _claim(replica, plan, owner)


def _claim(replica: Replica, plan: Plan, owner: bytes) -> None:
    roster = plan.roster if len(plan.roster.urls) > 1 else None
    session = layout2.session_of(owner, plan.term) if roster else owner
    payload = layout2.encode_owner(time.time_ns(), platform.node(), roster)
    replica.add_record(layout2.owner_behind(replica.newest, session, payload), payload)


def is_of_several(urls: Sequence[str], former: Roster | None, make: Make) -> bool:
    """Whether ``urls``, or what they are one of, are several destinations."""
    if len(urls) > 1 or former is not None:
        return True
    with contextlib.suppress(BackupError):  # Whoever goes on with the only one will say it.
        return make(urls[0]).roster() is not None
    return False
