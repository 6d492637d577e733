"""What several destinations say of themselves, and which of them has all there is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backend import EMPTY_CHAIN
from errors import CLI, BackupError
from filelog import layout2
from filelog.layout2 import Head, Kind
from monitoring.fields import IN_STEP
from quorum import BY_RECORDS, Branches, End, Relation, Roster, compare, lead
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
        BackupError: one that had to be read could not.
    """
    ends = [end_of(head) for head in heads]

    def relation(one: int, other: int) -> Relation:
        with replicas[other].records() as records:
            return compare(ends[one], marks(records))[0]

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
    """The list that counts: that of the highest epoch."""
    rosters = [heard.roster for heard in found if heard.roster is not None]
    if fallback is not None:
        rosters.append(fallback)
    return max(rosters, key=lambda roster: roster.epoch, default=None)


def distinct(found: Sequence[Heard]) -> list[Heard]:
    """Those that answered, each once: two URLs, or a copy of a file, may be one destination."""
    by_id: dict[bytes, Heard] = {}
    for heard in found:
        if heard.look is not None:
            by_id.setdefault(heard.look.backup_id, heard)
    return list(by_id.values())


def missing(found: Sequence[Heard], roster: Roster) -> Silent | None:
    """Why what was heard may not be all that was acknowledged, None if it is."""
    answered = distinct(found)
    if len(answered) >= roster.rule.to_read:
        return None
    errors = {heard.url: heard.error for heard in found if heard.error is not None}
    heard_urls = {heard.url for heard in answered}
    silent = [url for url in roster.urls if url not in heard_urls]
    silent += [url for url in errors if url not in silent]
    told = [f"{url} ({errors[url].problem})" if url in errors else url for url in silent]
    return Silent(
        f"{len(answered)} of the backup's {len(roster.urls)} destinations answered, and"
        f" {roster.rule.to_read} are needed: the newest change may be on those that are missing,"
        f" {' and '.join(told)}.",
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
    roster = newest_roster(found, None)
    answered = distinct(found)
    if not answered:
        raise _first_error(found)
    doubt = missing(found, roster) if roster is not None else None
    if doubt is not None and not allow_missing:
        raise doubt
    if roster is not None:
        # One that an operator has dropped, or that missed an attach, has no vote of its own.
        of_list = [heard for heard in answered if heard.roster == roster]
        answered = of_list or answered
    replicas = [heard.replica for heard in answered]
    heads = [heard.look.newest for heard in answered if heard.look is not None]
    return answered[leader_of(replicas, heads)], doubt


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
    if (mine.chain, mine.rewindable) == (theirs.chain, theirs.rewindable):
        return IN_STEP
    with leader.replica.records() as records:
        relation, _ = compare(mine, marks(records))
    if relation is Relation.EQUAL:
        return IN_STEP
    if relation in BY_RECORDS or relation is not Relation.APART:
        return f"lagging: {relation.value}"
    return str(relation.value)


Make = Callable[[str], Replica]
"""The destination of a URL, not open yet; ConfigError for a URL of no known form."""
