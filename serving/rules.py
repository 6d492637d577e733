"""Who may write what to a backup that is served: pure functions of plain values.

Nothing is read and nothing is done here: ``keeper.Keeper`` looks before, and acts after.
"""

from __future__ import annotations

import enum
from collections.abc import Set
from typing import NamedTuple

from backend import EMPTY_CHAIN, NOBODY, is_over_2
from decisions import Verdict, judge, may_replace, may_write
from filelog import former, layout2
from filelog.layout2 import Head, Kind
from protocol import OVERRIDE, NackCode

MOST_KEPT = 2 * former.AT_MOST
"""Backups kept beside a served one, at which a snapshot with ``override`` is refused."""


class Act(enum.Enum):
    """What is to be done with a request."""

    STORE = "store it, and say so"
    KNOWN = "it is stored already: only say so"
    REFUSE = "store nothing, and say why"


class Reason(enum.Enum):
    """Why nothing is stored: what a client of protocol 2 is told.

    Attributes:
        code: for the client's program.
        text: for people; ``{version}`` is the backup's, ``{previous}`` the one before its last
            change, ``{whose}`` and ``{taken_over}`` tell of who else wrote, ``{path}`` is its
            file, ``{damage}`` what does not hold.
    """

    code: NackCode
    text: str

    def __init__(self, code: NackCode, text: str) -> None:
        self.code, self.text = code, text

    OTHER_OWNER = NackCode.OTHER_OWNER, "{whose}"
    TAKEN_OVER = NackCode.TAKEN_OVER, "{taken_over}"
    OTHER_HISTORY = (
        NackCode.OTHER_HISTORY,
        "it continues another history than the backup's, which is at version {version}",
    )
    MOVED_ON = NackCode.OTHER_HISTORY, "the backup has moved on, or is of another history"
    DAMAGED = NackCode.DAMAGED, "{damage}"
    NO_REWIND = NackCode.INVALID, "the last change cannot be taken back"
    OUT_OF_DATE = (
        NackCode.OUT_OF_DATE,
        f"{Verdict.OUT_OF_DATE.value}: the backup is at version {{version}}",
    )
    LOST_STATE = (
        NackCode.LOST_STATE,
        f"{Verdict.LOST_STATE.value}: the backup is at version {{version}}",
    )
    OLD_SNAPSHOT = (
        NackCode.OLD_SNAPSHOT,
        "it is older than the backup, at version {version}",
    )
    NEWER_CONNECTION = NackCode.OTHER, "a newer connection has written"
    OTHER_NODE = (
        NackCode.OTHER_NODE,
        "it is of another node than the backup: only `resync --override` may put it in its place",
    )
    MANY_KEPT = (
        NackCode.MANY_KEPT,
        "backups that were replaced are kept beside it already, {path}.old-*, and none of them is"
        " removed for another node",
    )

    # Protocol 1, whose clients are told no reason: for the log alone.
    OWNED = (
        NackCode.OTHER,
        "a node that speaks protocol 2 has written to the backup (see --allow-protocol-1)",
    )
    NOTHING_TO_REWIND = NackCode.OTHER, "the last entry is not a change that can be taken back"
    OTHER_REWIND = NackCode.OTHER, "it could only go back to version {previous}"
    HAS_WRITTEN = NackCode.OTHER, "this connection has written already"


class State(NamedTuple):
    """What the rules look at.

    Attributes:
        newest: head of the backup's newest record.
        superseded: sessions that wrote, or tried to, and after which another one wrote.
        is_writer: the connection that asks was the last to write.
        outdated: a connection that came after it has written.
        damaged: the backup is, so ``newest`` may stand behind the damage.
        allows_1: protocol 1 may write also after protocol 2.
    """

    newest: Head
    superseded: Set[bytes]
    is_writer: bool
    outdated: bool
    damaged: bool = False
    allows_1: bool = False

    @property
    def is_owned(self) -> bool:
        """Whether protocol 1 may not write to it: a node that speaks 2 has written."""
        return is_over_2(self.newest.session) and not self.allows_1


class Offer(NamedTuple):
    """A snapshot that the backup is to start over with.

    Attributes:
        owner: whose the backup is to be.
        override: its sender knows that what is there is somebody else's: another owner's or
            another node's, or a newer state.
    """

    version: int
    owner: bytes = NOBODY
    override: bool = False


class Decision(NamedTuple):
    """What a rule says.

    Attributes:
        reason: why it is refused.
        superseded: a session that is refused for good from here on.
    """

    act: Act
    reason: Reason | None = None
    superseded: bytes | None = None


_STORE, _KNOWN = Decision(Act.STORE), Decision(Act.KNOWN)


def _refuse(reason: Reason, superseded: bytes | None = None) -> Decision:
    return Decision(Act.REFUSE, reason, superseded)


def record(state: State, head: Head) -> Decision:
    """A change or a rewind: owner and session first, then the chain, then the version."""
    newest = state.newest
    if state.damaged:
        return _refuse(Reason.DAMAGED)
    if (head.chain, head.session) == (newest.chain, newest.session) and not state.outdated:
        return _KNOWN
    if not may_write(newest.tag, head.session):
        return _refuse(Reason.OTHER_OWNER)
    if state.outdated or head.session in state.superseded:
        return _refuse(Reason.TAKEN_OVER)
    if head.chain_before != newest.chain:
        if newest.session in (head.session, NOBODY):
            return _refuse(Reason.OTHER_HISTORY)
        # For good: a rewind by the other one may bring this session's chain back.
        return _refuse(Reason.TAKEN_OVER, superseded=head.session)
    reason = _unfit_rewind(newest, head) if head.kind == Kind.REWIND else _unfit(newest, head)
    if reason is not None:
        return _refuse(reason)
    if head.session == newest.session:
        return _STORE
    return Decision(Act.STORE, superseded=newest.session)


def _unfit_rewind(newest: Head, head: Head) -> Reason | None:
    # Within a session nothing is taken back.
    fits = newest.rewindable and head.session != newest.session
    fits = fits and (head.version, head.chain) == (newest.version - 1, newest.chain_before)
    return None if fits else Reason.NO_REWIND


def _unfit(newest: Head, head: Head) -> Reason | None:
    return _verdict(newest, head.version - (1 if head.flags & layout2.BUMPS else 0))


def _verdict(newest: Head, base: int) -> Reason | None:
    # Never the first of a session: a rewind is a request of its own.
    verdict = judge(base, newest.version, newest.rewindable, first=False)
    if verdict is Verdict.APPEND:
        return None
    return Reason.OUT_OF_DATE if verdict is Verdict.OUT_OF_DATE else Reason.LOST_STATE


def take_over(state: State, head: Head) -> Decision:
    """The record of another owner, which is taken from whoever knows the newest record.

    Also from who says that he need not: he reads all of the log when nobody else writes any more.
    """
    newest = state.newest
    if state.damaged:
        return _refuse(Reason.DAMAGED)
    known = (head.chain_before, head.chain) == (newest.chain_before, newest.chain)
    if not (known or head.flags & OVERRIDE) or state.outdated:
        return _refuse(Reason.MOVED_ON)
    is_newest = newest.kind == Kind.OWNER and head.length == newest.length
    # One of several destinations gets its vote by a record of the session that it is at.
    return _KNOWN if head.session == newest.session and is_newest else _STORE


def snapshot(state: State, offer: Offer) -> Decision:
    """A snapshot that the backup is to start over with."""
    if state.outdated:
        return _refuse(Reason.NEWER_CONNECTION)
    newest = state.newest
    # An empty one is everybody's: an `init` that was given up leaves its owner there.
    is_owners = (newest.chain == EMPTY_CHAIN and not state.damaged) or may_replace(
        newest.tag, offer.owner
    )
    if offer.override:
        return _STORE
    if not is_owners:
        return _refuse(Reason.OTHER_OWNER)
    return _refuse(Reason.OLD_SNAPSHOT) if offer.version < newest.version else _STORE


def in_place(offer: Offer, node: str | None, of_backup: str | None, kept: int) -> Decision:
    """A snapshot that was looked at, when it is to take the backup's place.

    Args:
        node: whose database it is, None: it does not say.
        of_backup: that of the backup, None: not known.
        kept: backups beside it whose place another one has taken.
    """
    if offer.override:  # None of them is removed then: one may be the copy that is missed.
        return _refuse(Reason.MANY_KEPT) if kept >= MOST_KEPT else _STORE
    if None not in (node, of_backup) and node != of_backup:
        return _refuse(Reason.OTHER_NODE)
    return _STORE


# Protocol 1, whose clients name neither owner nor chain: they write what is nobody's.


def change_1(state: State, base: int, bumps: bool, is_last: bool) -> Decision:
    """A change of protocol 1.

    Args:
        base, bumps: see backend.Change.
        is_last: it is, by content, the backup's newest record.
    """
    if state.is_owned or state.damaged:
        return _refuse(Reason.OWNED if state.is_owned else Reason.DAMAGED)
    # A PRAGMA that comes twice over one connection was announced twice.
    if is_last and (bumps or not state.is_writer) and not state.outdated:
        return _KNOWN
    reason = _verdict(state.newest, base)
    if reason is None and state.outdated:
        reason = Reason.NEWER_CONNECTION
    return _STORE if reason is None else _refuse(reason)


def large_change_1(state: State, version: int) -> Decision:
    """Whether a change of protocol 1 may come at all, when only its version is known."""
    if state.is_owned or state.damaged:
        return _refuse(Reason.OWNED if state.is_owned else Reason.DAMAGED)
    if state.outdated:
        return _refuse(Reason.NEWER_CONNECTION)
    newest = state.newest.version
    reason = None if version in (newest, newest + 1) else _verdict(state.newest, version - 1)
    return _STORE if reason is None else _refuse(reason)


def rewind_1(state: State, version: int) -> Decision:
    """A rewind of protocol 1, back to ``version``: the first that a connection writes."""
    newest = state.newest
    if state.is_owned or state.damaged:
        return _refuse(Reason.OWNED if state.is_owned else Reason.DAMAGED)
    if not newest.rewindable:
        return _refuse(Reason.NOTHING_TO_REWIND)
    if version != newest.version - 1:
        return _refuse(Reason.OTHER_REWIND)
    if state.is_writer:
        return _refuse(Reason.HAS_WRITTEN)
    return _refuse(Reason.NEWER_CONNECTION) if state.outdated else _STORE


def snapshot_1(state: State, offer: Offer) -> Decision:
    """A snapshot of protocol 1."""
    if state.is_owned and not state.outdated:
        return _refuse(Reason.OWNED)
    return snapshot(state, offer)
