"""Which destinations go on with a backup, as an operator says: they are added and dropped here."""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from backend import EMPTY_CHAIN, Progress, log
from errors import BackupError, BackupMissing, ConfigError
from filelog import layout2
from quorum import Relation, Roster
from replica import Replica
from several.catchup import CatchUp, Standing, stand
from several.hearing import (
    Branched,
    Heard,
    Make,
    choose,
    end_of,
    hear,
    missing,
    newest_roster,
    same_twice,
    voters,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What an attach means to do.

    Attributes:
        leader: has all there is.
        roster: the new list; of one URL if there is one destination.
        start: number of the take-over, see quorum.
        relations: how each of the new list stands to the leader; None: there is none yet.
        former: the list that they were of, None if it was one.
        members: those of the former list that answered.
        dropped: those of them that are not of the new list.
        unheard: URL of the former list, and why it did not answer.
    """

    leader: Heard
    roster: Roster
    start: int
    relations: dict[str, Standing | None]
    former: Roster | None
    members: list[Heard]
    dropped: list[Heard]
    unheard: dict[str, BackupError]


def plan(urls: Sequence[str], acks: int, former: Roster | None, make: Make) -> Plan:
    """What has to be done so that ``urls`` go on with the backup; nothing is changed.

    Args:
        former: the list that backup.lock names, None if it names none.

    Raises:
        Silent: too few of the former list answer.
        Branched: one of them is of another history.
        ConfigError: two of ``urls`` are one destination, or one is a copy of the other's file.
        BackupError: one of ``urls`` does not answer, or is damaged; or none holds anything.
    """
    others = [url for url in (former.urls if former else ()) if url not in urls]
    found = hear([make(url) for url in (*urls, *others)])
    chosen = found[: len(urls)]
    for heard in chosen:
        if heard.error is not None and not _is_absent(heard):
            raise heard.error
    ids = _check_distinct(chosen)
    # One that only has another name now is not dropped.
    found = [h for h in found if h in chosen or h.look is None or h.look.backup_id not in ids]
    before = newest_roster(found, former)
    if before is not None and (doubt := missing(found, before)) is not None:
        raise doubt
    members = voters(found, before)
    if before is None:
        members = [heard for heard in members if not _is_empty(heard)] or members
    if not members:
        raise BackupMissing(" ".join(urls))
    leader, _ = choose(members)
    for heard in chosen:
        if heard in members and heard.error is not None:
            raise heard.error
    members = [heard for heard in members if heard.look is not None]
    return Plan(
        leader,
        Roster(1 + (before.epoch if before is not None else 0), acks, tuple(urls)),
        1 + max(layout2.start_of(heard.head.session) for heard in found if heard.look is not None),
        {heard.url: _relation(heard, leader) for heard in chosen},
        before,
        members,
        [heard for heard in members if heard not in chosen],
        {heard.url: heard.error for heard in found if heard.url in others and heard.error},
    )


def _check_distinct(chosen: Sequence[Heard]) -> set[bytes]:
    """Their ids; ConfigError if two of them are one destination."""
    ids = [(heard.look.backup_id, heard.url) for heard in chosen if heard.look is not None]
    if (same := same_twice(ids)) is not None:
        raise ConfigError(
            f"{same[0]} and {same[1]} are one destination by two names, or one is a copy of the"
            " other's file.",
            "Name one of them once. Remove a copy: an empty destination gets all there is.",
        )
    return {backup_id for backup_id, _ in ids}


def _is_absent(heard: Heard) -> bool:
    return isinstance(heard.error, BackupMissing)


def _is_empty(heard: Heard) -> bool:
    return heard.look is None or heard.look.newest.chain == EMPTY_CHAIN


def _relation(heard: Heard, leader: Heard) -> Standing | None:
    if heard.look is None:
        return None
    assert leader.look is not None
    newest, leading = heard.head, leader.head
    standing = stand(end_of(newest), newest.tag, leader.replica)
    # Where nothing shows whether it is of this history, it is not of this node's either.
    is_folded = standing.relation is Relation.FOLDED
    foreign = is_folded and newest.tag != leading.tag and not _is_empty(heard)
    if foreign:
        raise BackupError(
            f"{heard.url} ends at version {newest.version}, which {leader.url} has folded into a"
            " snapshot since: they may be of different histories, which cannot be told any more.",
            "Nothing was changed. Look at both with `status`. If it may go, let it be empty (move"
            " the file away, in a cluster take another backup=NAME): it gets all there is.",
        )
    if standing.relation is Relation.APART:
        raise Branched(heard.url, leader.url)
    return standing


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
            newest = replica.look().newest
            found = stand(end_of(newest), newest.tag, plan.leader.replica)
        if url == plan.leader.url or found.relation is Relation.EQUAL:
            continue
        with contextlib.closing(replica):
            replica.open()
            owner = plan.leader.head.session
            votes = any(heard.url == url for heard in plan.members)
            catch_up = CatchUp(replica, threading.Lock(), owner, votes)
            catch_up.bring(plan.leader.replica, found)


def take_over(plan: Plan, owner: bytes, make: Make) -> list[str]:
    """Let ``owner`` write to each of the new list from here on, and each keep that list.

    Returns:
        Those that were dropped and do not know it: what they hold looks like a whole backup.
    """
    leading = plan.leader.head.chain
    # First the node of the former list is shut out, so that nothing is acknowledged there any
    # more: else a death in the middle leaves two lists, either of which is enough to go on with.
    for heard in plan.members:
        expected = heard.head.chain if heard in plan.dropped else leading
        _claim(make(heard.url), owner, plan.start, plan.former, expected)
    for url in plan.roster.urls:
        _claim(make(url), owner, plan.start + 1, plan.roster, leading)
    unaware = list(plan.unheard)
    for heard in plan.dropped:
        try:
            none_of_them = plan.roster._replace(votes=False)
            _claim(make(heard.url), owner, plan.start + 1, none_of_them, heard.head.chain)
        except BackupError as error:
            log.warning(f"{heard.url}: {error}")
            unaware.append(heard.url)
    return unaware


def _claim(
    replica: Replica, owner: bytes, start: int, roster: Roster | None, expected: bytes
) -> None:
    """Let ``replica`` be of ``owner`` and keep ``roster``, if it ends in the chain ``expected``."""
    with contextlib.closing(replica):
        replica.open()
        newest = replica.newest
        if newest.chain != expected:
            raise BackupError(f"{replica.url} has changed meanwhile.", "Look who writes to it.")
        is_of_several = roster is not None and len(roster.urls) > 1
        # Of an only one the session was random, so that it tells no term.
        known = replica.roster()
        term = layout2.term_of(newest.session) if known and len(known.urls) > 1 else 0
        session = layout2.session_of(owner, term, start) if is_of_several else owner
        payload = layout2.encode_owner(time.time_ns(), platform.node(), roster)
        replica.add_record(layout2.owner_behind(newest, session, payload), payload)


def is_of_several(urls: Sequence[str], former: Roster | None, make: Make) -> bool:
    """Whether ``urls``, or what they are one of, are several destinations."""
    if len(urls) > 1 or former is not None:
        return True
    with contextlib.suppress(BackupError):  # Whoever goes on with the only one will say it.
        return make(urls[0]).roster() is not None
    return False
