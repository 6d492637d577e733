"""What is decided about several destinations of one backup: pure functions of plain values.

K of N acknowledge. So any N-K+1 of them hold among them all that was acknowledged, and any
K and any N-K+1 have one in common. Every start of a node takes a higher number than all that
it hears of, and has K destinations keep it before the first change, which then has that number
as its *term*. So of two ends the one of the higher term is the later: what it lacks was
acknowledged by fewer than K. A start that came no further than its number outvotes nobody.

Nothing is read and nothing is done here. Who asks has looked before, and acts after.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Rule(NamedTuple):
    """How many destinations there are, and how many of them acknowledge.

    Attributes:
        n: destinations, at least 1.
        k: acknowledgements, 1 to ``n``.
    """

    n: int
    k: int

    @property
    def to_read(self) -> int:
        """Destinations that must be heard before what they hold counts as all there is."""
        return self.n - self.k + 1

    @property
    def to_start(self) -> int:
        """Destinations that a node needs to begin with: to know, and to write."""
        return max(self.k, self.to_read)

    @property
    def survives(self) -> int:
        """Destinations that may be lost without the loss of a change."""
        return self.k - 1

    @property
    def goes_on_without(self) -> int:
        """Destinations that may be silent while the node goes on."""
        return self.n - self.k

    @property
    def may_split(self) -> bool:
        """Whether two nodes could each find enough destinations to write to."""
        return 2 * self.k <= self.n


class Roster(NamedTuple):
    """The destinations of one backup, as each of them keeps it.

    Attributes:
        epoch: counts up with each list that an operator made; the highest one counts.
        acks: how many of them acknowledge a change.
        urls: theirs, as the operator wrote them.
        votes: whoever keeps this has all that it acknowledged as one of them. Without, it is
            none of them, or not yet.
    """

    epoch: int
    acks: int
    urls: tuple[str, ...]
    votes: bool = True

    @property
    def rule(self) -> Rule:
        """Its numbers."""
        return Rule(len(self.urls), self.acks)


class Mark(NamedTuple):
    """What a record says of the history up to it.

    Attributes:
        chain: names that history.
        rewindable: the record is a change that may be taken back.
        version: data_version.
    """

    chain: bytes
    rewindable: bool
    version: int


class End(NamedTuple):
    """What a destination holds, by its newest record.

    Attributes:
        term: of the start that wrote its newest change, 0 if none did.
        chain, rewindable, version: as in a Mark.
        chain_before: the chain without the last record.
    """

    term: int
    chain: bytes
    rewindable: bool
    version: int
    chain_before: bytes


class Relation(enum.Enum):
    """How a destination stands to the one that leads."""

    EQUAL = "it holds the same"
    BEHIND = "it lacks the newest records"
    ONE_MORE = "it holds one change that the leading one has not, and that can be taken back"
    ONE_MORE_FOR_GOOD = "it holds one record more, which cannot be taken back"
    FOLDED = "what it lacks is folded into the leading one's snapshot"
    APART = "it is of another history"


def compare(end: End, marks: Iterable[Mark]) -> tuple[Relation, int]:
    """How a destination that ends in ``end`` stands to the one whose records are ``marks``.

    Args:
        marks: first what the records begin with, be it a snapshot or nothing; in order.

    Returns:
        The relation, and the number of ``marks`` that it has already: after ONE_MORE, once
        that change is taken back. 0 if it has to begin anew.
    """
    exact = alike = before = count = 0
    folded, last = 0, None
    for count, mark in enumerate(marks, 1):
        if count == 1:
            folded = mark.version
            if end.version < folded:
                return Relation.FOLDED, 0  # Nothing behind a snapshot is older than that.
        if mark.chain == end.chain:
            alike = count
            exact = count if mark.rewindable == end.rewindable else exact
        if mark.chain == end.chain_before:
            before = count
        last = mark
    assert last is not None, "a history begins with something"
    # A rewind leads back to a chain: only the last place with that chain is where it stands,
    # and with the rewind itself still to come it stands at the change, not at the rewind.
    place = exact or (alike if alike < count or not end.rewindable else 0)
    if place:
        return (Relation.EQUAL if place == count else Relation.BEHIND), place
    if before:
        more = Relation.ONE_MORE if end.rewindable else Relation.ONE_MORE_FOR_GOOD
        return more, before if end.rewindable else 0
    # Without its last change, which may be the one that nobody else has, it would be as old.
    is_folded = end.version - end.rewindable <= folded
    return (Relation.FOLDED if is_folded else Relation.APART), 0


def lead(ends: Sequence[End], relation: Callable[[int, int], Relation]) -> int:
    """Which of the destinations that were heard has everything that was acknowledged.

    Args:
        ends: theirs, at least one.
        relation: how the first of two numbers stands to the second; asked as rarely as can be.

    Returns:
        Its number in ``ends``; the others are brought to what it holds.

    Raises:
        Branches: two of them are of different histories.
    """
    term = max(end.term for end in ends)
    latest = [number for number, end in enumerate(ends) if end.term == term]
    leader = latest[0]
    for number in latest[1:]:  # Of one term there is one writer: one of two is the longer.
        if not _same(ends[number], ends[leader]) and _is_longer(number, leader, ends, relation):
            leader = number
    for number, end in enumerate(ends):
        same = number == leader or _same(end, ends[leader])
        if not same and relation(number, leader) is Relation.APART:
            raise Branches(number, leader)
    return leader


def _is_longer(
    one: int, other: int, ends: Sequence[End], relation: Callable[[int, int], Relation]
) -> bool:
    """Whether ``one`` of two of the same term has what the other has, and more."""
    mine = relation(one, other)
    if mine is Relation.FOLDED:  # Or a PRAGMA call, which leaves the version as it is, is more.
        return relation(other, one) is Relation.BEHIND
    if mine is not Relation.BEHIND:
        return mine is not Relation.EQUAL
    if not ends[one].rewindable or ends[other].rewindable:
        return False
    # A change may come again after its rewind, which is the first record of a term.
    return relation(other, one) is Relation.BEHIND


def _same(one: End, other: End) -> bool:
    return (one.chain, one.rewindable) == (other.chain, other.rewindable)


class Branches(Exception):
    """Two destinations are of different histories: their numbers."""

    def __init__(self, one: int, other: int) -> None:
        self.one, self.other = one, other
        super().__init__(f"{one} and {other}")


class Part(enum.Enum):
    """What a destination does at the moment."""

    OPENING = "is being opened"
    IN_STEP = "in step"
    LAGGING = "lagging"


def may_go_on(rule: Rule, stored: int, working: int) -> bool | None:
    """Whether a record counts as acknowledged; None: not yet, but it still may.

    Args:
        stored: destinations in step that have it, and all before it, on stable storage.
        working: destinations that may come to have it.
    """
    if stored >= rule.k:
        return True
    return None if stored + working >= rule.k else False


def may_start(rule: Rule, voting: int, heard: int, silent: int, patient: bool) -> bool | None:
    """Whether a node may begin with the destinations that were heard; None: wait for more.

    Args:
        voting: destinations that answered, and have all that they acknowledged.
        heard: all that answered, and can be written to.
        silent: those whose answer may still come.
        patient: there is time to wait for those, though they are not needed.
    """
    if voting >= rule.to_read and heard >= rule.k:
        return None if silent and patient else True
    possible = voting + silent >= rule.to_read and heard + silent >= rule.k
    return None if possible else False
