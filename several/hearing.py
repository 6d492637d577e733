"""What several destinations say of themselves, and which of them has all there is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from backend import EMPTY_CHAIN
from errors import CLI, BackupError
from filelog import layout2
from filelog.layout2 import Head, Kind
from monitoring.fields import IN_STEP
from quorum import Branches, End, Relation, Roster, compare, lead
from replica import Look, Replica
from several.catchup import marks


class Silent(BackupError):
    """Too few destinations answered: the newest change may be on those that did not."""

    def __init__(self, problem: str, next_step: str = "") -> None:
        super().__init__(
            problem,
            next_step or "Bring them back: mount the disk, start the server, mend the line.",
        )


class Branched(BackupError):
    """Two destinations are of different histories."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(
            f"{one} and {other} are of different histories: each holds what the other has not.",
            f"Nothing was changed. Look at both with `{CLI} status`; move the wrong one away, and"
            f" run `{CLI} attach` with the right ones.",
        )


def end_of(head: Head) -> End:
    """What the newest record ``head`` tells of a destination."""
    begins = head.chain_before == EMPTY_CHAIN and not head.rewindable
    before = head.chain if begins or head.kind == Kind.SNAPSHOT else head.chain_before
    term = layout2.term_of(head.session)
    return End(term, head.chain, head.rewindable, head.version, before)


def leader_of(replicas: Sequence[Replica], heads: Sequence[Head]) -> int:
    """The number of the one that has all that was acknowledged.

    Raises:
        Branched: two are of different histories.
        Unreadable: one that had to be read could not.
    """
    ends = [end_of(head) for head in heads]

    def relation(one: int, other: int) -> Relation:
        try:
            with replicas[other].records() as records:
                return compare(ends[one], marks(records))[0]
        except BackupError as error:
            raise Unreadable(other, error) from error

    try:
        return lead(ends, relation)
    except Branches as found:
        raise Branched(replicas[found.one].url, replicas[found.other].url) from found


@dataclass(slots=True)
class Heard:
    """One destination's answer.

    Attributes:
        look: what it holds, or None.
        error: why it has not answered, or None.
        roster: the list that it keeps.
    """

    replica: Replica
    look: Look | None = None
    error: BackupError | None = None
    roster: Roster | None = None

    @property
    def url(self) -> str:
        """Of the destination."""
        return self.replica.url

    @property
    def head(self) -> Head:
        """Of its newest record; of an only one without a term, as its session is random."""
        assert self.look is not None
        newest = self.look.newest
        if self.roster is not None and len(self.roster.urls) > 1:
            return newest
        return newest._replace(session=newest.tag.ljust(len(newest.session), b"\0"))


def hear(replicas: Sequence[Replica]) -> list[Heard]:
    """Ask all of them at once; each answer that is a BackupError is kept, not raised."""
    found = [Heard(replica) for replica in replicas]

    def ask(heard: Heard) -> None:
        try:
            heard.look = heard.replica.look()
            heard.roster = heard.replica.roster()
        except BackupError as error:
            heard.look, heard.error = None, error

    threads = [threading.Thread(target=ask, args=(heard,), daemon=True) for heard in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def newest_roster(found: Sequence[Heard], fallback: Roster | None) -> Roster | None:
    """The list that counts: that of the highest epoch.

    Raises:
        Branched: there are two.
    """
    newest = fallback
    said_by = "backup.lock"
    for heard in found:
        if heard.roster is None:
            continue
        roster = heard.roster._replace(votes=True)
        if newest is None or roster.epoch > newest.epoch:
            newest, said_by = roster, heard.url
        elif roster.epoch == newest.epoch and roster != newest:
            raise Branched(heard.url, said_by)
    return newest


def voters(found: Sequence[Heard], roster: Roster | None) -> list[Heard]:
    """Those that answered as one of ``roster``: with all that they acknowledged.

    One that an operator has dropped, that missed an attach, or is being copied to is none of
    them. The same one by two names, or a copy of it, is there twice: see ``missing``.
    """
    only_one = roster is not None and len(roster.urls) == 1
    lists = (roster, None) if only_one else (roster,)  # As one that was moved keeps none.
    return [heard for heard in found if heard.look is not None and heard.roster in lists]


def missing(found: Sequence[Heard], roster: Roster) -> Silent | None:
    """Why what was heard may not be all that was acknowledged, None if it is."""
    voting = voters(found, roster)
    # Two URLs, or a copy of a file, may be one destination.
    count = len({heard.look.backup_id for heard in voting if heard.look is not None})
    if count >= roster.rule.to_read:
        return None
    errors = {heard.url: heard.error for heard in found if heard.error is not None}
    heard_urls = {heard.url for heard in voting}
    silent = [url for url in roster.urls if url not in heard_urls]
    silent += [url for url in errors if url not in silent]
    others = [heard.url for heard in found if heard.look is not None and heard not in voting]
    reasons = dict.fromkeys(others, "it missed an attach, or was being given the whole backup")
    reasons |= {url: error.problem for url, error in errors.items()}
    told = [f"{url} ({reasons[url]})" if url in reasons else url for url in silent]
    strange = [url for url in others if url not in roster.urls]
    are = "are" if len(strange) > 1 else "is"
    none_of_them = f" {' and '.join(strange)} {are} none of them." if strange else ""
    return Silent(
        f"{count} of the backup's {len(roster.urls)} destinations answered, and"
        f" {roster.rule.to_read} are needed: the newest change may be on those that are missing,"
        f" {' and '.join(told)}.{none_of_them}",
        "Name those that you have as further URLs, and bring the others back.",
    )


def choose(found: Sequence[Heard], allow_missing: bool = False) -> tuple[Heard, Silent | None]:
    """The destination that has all there is, and what makes that doubtful.

    Args:
        allow_missing: take the best there is.

    Raises:
        Silent: too few answered.
        Branched: two are of different histories.
        BackupError: the only one did not answer.
    """
    while True:
        answered = [heard for heard in found if heard.look is not None]
        if not answered:
            raise _first_error(found)
        roster = newest_roster(found, None)
        doubt = missing(found, roster) if roster is not None else None
        if doubt is not None and not allow_missing:
            raise doubt
        voting = voters(found, roster) or answered
        try:
            return voting[leader_of([h.replica for h in voting], [h.head for h in voting])], doubt
        except Unreadable as unread:
            # Unknown, as one that does not answer.
            heard = voting[unread.number]
            heard.look, heard.error = None, unread.error


def alike(found: Sequence[Heard], chosen: Heard) -> list[Heard]:
    """``chosen``, and those that hold just the same by their newest record."""
    same = [h for h in found if h is not chosen and h.look is not None]
    return [chosen, *[h for h in same if _place(h.head) == _place(chosen.head)]]


def _place(head: Head) -> tuple[bytes, bool]:
    return head.chain, head.rewindable


def same_twice(found: Iterable[tuple[bytes, str]]) -> tuple[str, str] | None:
    """Two of the URLs that are one destination, or one is a copy of the other.

    Args:
        found: the backup id and the URL of each.
    """
    by_id: dict[bytes, str] = {}
    for backup_id, url in found:
        other = by_id.setdefault(backup_id, url)
        if other != url:
            return other, url
    return None


class Unreadable(Exception):
    """The destination of this number had to be read, and could not be."""

    def __init__(self, number: int, error: BackupError) -> None:
        self.number, self.error = number, error
        super().__init__(f"{number}: {error}")


def _first_error(found: Sequence[Heard]) -> BackupError:
    for heard in found:
        if heard.error is not None:
            return heard.error
    raise AssertionError("each answers or fails")


def standing(heard: Heard, leader: Heard) -> str:
    """How ``heard`` stands to the one that has all there is, in words."""
    if heard.look is None or leader.look is None:
        return f"unknown: {heard.error}"
    mine, theirs = end_of(heard.look.newest), end_of(leader.look.newest)
    if heard.roster != leader.roster:
        return NO_VOTE
    if (mine.chain, mine.rewindable) == (theirs.chain, theirs.rewindable):
        return IN_STEP
    with leader.replica.records() as records:
        relation, _ = compare(mine, marks(records))
    if relation is Relation.EQUAL or _has_by_now(heard, theirs):
        return IN_STEP
    if relation is not Relation.APART:
        return f"{LAGGING}: {relation.value}"
    return str(relation.value)


def _has_by_now(heard: Heard, end: End) -> bool:
    """Whether ``heard`` has come to ``end`` since it was looked at.

    Beside a node that runs no two looks are of the same moment.
    """
    with contextlib.suppress(BackupError), heard.replica.records() as records:
        return compare(end, marks(records))[0] in (Relation.EQUAL, Relation.BEHIND)
    return False


LAGGING = "lagging"
NO_VOTE = "none of the destinations, or not yet"
Make = Callable[[str], Replica]
"""The destination of a URL, not open yet; ConfigError for a URL of no known form."""
