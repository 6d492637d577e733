"""Who may write to a served backup: every combination, against the rules in words."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

from backend import NOBODY
from filelog.layout2 import BUMPS, Head, Kind
from protocol import OVERRIDE
from serving import rules
from serving.rules import MOST_KEPT, Act, Decision, Offer, Reason, State

YES_NO = [False, True]
VERSION = 5
BEFORE, NOW, ELSEWHERE = b"before".ljust(16), b"now".ljust(16), b"elsewhere".ljust(16)
OURS, OURS_LATER, OTHER = b"A" * 8 + b"1" * 8, b"A" * 8 + b"2" * 8, b"B" * 8 + b"1" * 8
"""Two sessions of one owner, one of another. The first 8 bytes tell of the owner."""
NEWEST = [
    Head(kind=kind, flags=flags, version=VERSION, session=session, chain_before=BEFORE, chain=NOW)
    for kind, flags in [
        (Kind.SNAPSHOT, 0),
        (Kind.CHANGE, BUMPS),
        (Kind.CHANGE, 0),
        (Kind.REWIND, 0),
        (Kind.OWNER, BUMPS),
        (Kind.OWNER, 0),
    ]
    for session in [OURS, OTHER, NOBODY]
]


def states() -> Iterator[State]:
    """What the backup may be like, and who asks; who is the writer is not outdated."""
    told: list[frozenset[bytes]] = [frozenset(), frozenset([OURS]), frozenset([OURS_LATER, OTHER])]
    for newest, superseded in itertools.product(NEWEST, told):
        for is_writer, outdated in [(False, False), (True, False), (False, True)]:
            yield State(newest, superseded, is_writer, outdated)


def heads() -> Iterator[Head]:
    """What a client of protocol 2 may send."""
    kinds = [(Kind.CHANGE, BUMPS), (Kind.CHANGE, 0), (Kind.REWIND, 0)]
    sessions, chains = [OURS, OURS_LATER, OTHER, NOBODY], [BEFORE, NOW, ELSEWHERE]
    for (kind, flags), version, session, before, chain in itertools.product(
        kinds, range(VERSION - 2, VERSION + 3), sessions, chains, chains
    ):
        yield Head(
            kind=kind,
            flags=flags,
            version=version,
            session=session,
            chain_before=before,
            chain=chain,
        )


def first(*reasons: tuple[Reason, bool]) -> Reason | None:
    """The first that holds."""
    return next((reason for reason, holds in reasons if holds), None)


def is_rewindable(newest: Head) -> bool:
    """A change that bumps is the last thing stored, perhaps with another owner since."""
    return newest.kind in (Kind.CHANGE, Kind.OWNER) and newest.flags == BUMPS


def test_record_by_enumeration() -> None:
    seen = set()
    for state, head in itertools.product(states(), heads()):
        newest, found = state.newest, rules.record(state, head)
        seen.add((found.act, found.reason))
        is_last = head.chain == newest.chain and head.session == newest.session
        if is_last and not state.outdated:
            assert found == Decision(Act.KNOWN), (state, head)
            continue
        continues, another = head.chain_before == NOW, newest.session not in (head.session, NOBODY)
        is_rewind = head.kind == Kind.REWIND
        takes_back = (head.version, head.chain) == (VERSION - 1, BEFORE)
        base = head.version - (1 if head.flags else 0)
        reason = first(
            (Reason.OTHER_OWNER, head.session[:8] != newest.session[:8]),
            (Reason.TAKEN_OVER, state.outdated),
            (Reason.TAKEN_OVER, head.session in state.superseded),
            (Reason.TAKEN_OVER, not continues and another),
            (Reason.OTHER_HISTORY, not continues),
            # One that goes back to where the backup is, and only at the start of a session.
            (Reason.NO_REWIND, is_rewind and not is_rewindable(newest)),
            (Reason.NO_REWIND, is_rewind and head.session == newest.session),
            (Reason.NO_REWIND, is_rewind and not takes_back),
            (Reason.OUT_OF_DATE, not is_rewind and base > VERSION),
            (Reason.LOST_STATE, not is_rewind and base < VERSION),
        )
        assert (found.act is Act.STORE, found.reason) == (reason is None, reason), (state, head)
        if reason is None:
            # The session before never writes again.
            assert found.superseded == (newest.session if newest.session != head.session else None)
        else:
            # Nor does one that comes too late, though a rewind may bring its chain back.
            late = reason is Reason.TAKEN_OVER and not state.outdated
            late = late and head.session not in state.superseded
            assert found.superseded == (head.session if late else None)
    assert {reason for _, reason in seen} == {
        None,
        Reason.OTHER_OWNER,
        Reason.TAKEN_OVER,
        Reason.OTHER_HISTORY,
        Reason.NO_REWIND,
        Reason.OUT_OF_DATE,
        Reason.LOST_STATE,
    }


def test_take_over_by_enumeration() -> None:
    seen = set()
    for state, session in itertools.product(states(), [OURS, OURS_LATER, OTHER]):
        for before, chain in itertools.product([BEFORE, NOW, ELSEWHERE], repeat=2):
            head = Head(kind=Kind.OWNER, session=session, chain_before=before, chain=chain)
            found = rules.take_over(state, head)
            # From anybody who knows the newest record, whoever's the backup is.
            if state.outdated or (before, chain) != (BEFORE, NOW):
                assert found == Decision(Act.REFUSE, Reason.MOVED_ON)
            else:
                again = session == state.newest.session and state.newest.kind == Kind.OWNER
                assert found == Decision(Act.KNOWN if again else Act.STORE)
            seen.add(found.act)
            # Or from who need not know it.
            blind = rules.take_over(state, head._replace(flags=OVERRIDE))
            assert blind.act is (Act.REFUSE if state.outdated else blind.act)
            assert state.outdated or blind.act is not Act.REFUSE
    assert seen == set(Act)


def test_snapshot_by_enumeration() -> None:
    versions, seen = range(VERSION - 2, VERSION + 3), set()
    for state, version, override in itertools.product(states(), versions, YES_NO):
        for owner in [OURS, OTHER, NOBODY]:
            offer = Offer(version, owner, override)
            anothers = state.newest.session not in (owner, NOBODY)
            reason = first(
                (Reason.NEWER_CONNECTION, state.outdated),
                (Reason.OTHER_OWNER, anothers and not override),
                (Reason.OLD_SNAPSHOT, version < VERSION and not override),
            )
            act = Act.STORE if reason is None else Act.REFUSE
            assert rules.snapshot(state, offer) == Decision(act, reason)
            seen.add(reason)
        if state.newest.session != NOBODY and not state.outdated:
            assert rules.snapshot_1(state, offer) == Decision(Act.REFUSE, Reason.OWNED)
    assert len(seen) == 4


def test_an_empty_backup_is_everybodys() -> None:
    newest = Head(kind=Kind.OWNER, session=OTHER)
    state = State(newest, frozenset(), False, False)
    assert rules.snapshot(state, Offer(VERSION, OURS)) == Decision(Act.STORE)
    # Of a damaged one nobody knows that it is empty.
    found = rules.snapshot(state._replace(damaged=True), Offer(VERSION, OURS))
    assert found.reason is Reason.OTHER_OWNER


def test_a_damaged_backup_takes_nothing_but_a_snapshot() -> None:
    for state in (found._replace(damaged=True) for found in states()):
        for head in heads():
            for rule in rules.record, rules.take_over:
                assert rule(state, head) == Decision(Act.REFUSE, Reason.DAMAGED)
        for decision in rules.change_1(state, VERSION, True, True), rules.rewind_1(state, 4):
            assert decision.reason in (Reason.DAMAGED, Reason.OWNED)
        offer = Offer(VERSION, state.newest.session)
        sound = state._replace(damaged=False)
        assert rules.snapshot(state, offer) == rules.snapshot(sound, offer)


def test_what_takes_the_place_by_enumeration() -> None:
    nodes, kept = ["02aa", "03bb", None], range(MOST_KEPT + 2)
    for node, of_backup, number, override in itertools.product(nodes, nodes, kept, YES_NO):
        reason = first(
            (Reason.OTHER_NODE, not override and {node, of_backup} == {"02aa", "03bb"}),
            (Reason.MANY_KEPT, override and number >= MOST_KEPT),
        )
        act = Act.STORE if reason is None else Act.REFUSE
        found = rules.in_place(Offer(VERSION, OURS, override), node, of_backup, number)
        assert found == Decision(act, reason)


def test_change_of_protocol_1_by_enumeration() -> None:
    seen = set()
    for state, base in itertools.product(states(), range(VERSION - 2, VERSION + 3)):
        for bumps, is_last in itertools.product(YES_NO, repeat=2):
            found = rules.change_1(state, base, bumps, is_last)
            owned = state.newest.session != NOBODY
            # Of two equal PRAGMAs of the writer, the second is another change.
            again = is_last and not state.outdated and not (state.is_writer and not bumps)
            reason = first(
                (Reason.OWNED, owned),
                (Reason.OUT_OF_DATE, base > VERSION),
                (Reason.LOST_STATE, base < VERSION),
                (Reason.NEWER_CONNECTION, state.outdated),
            )
            act = Act.STORE if reason is None else Act.REFUSE
            expected = Decision(Act.KNOWN) if again and not owned else Decision(act, reason)
            assert found == expected, (state, base, bumps, is_last)
            seen.add(found.reason)
    assert len(seen) == 5


def test_rewind_of_protocol_1_by_enumeration() -> None:
    seen = set()
    for state, version in itertools.product(states(), range(VERSION - 2, VERSION + 3)):
        reason = first(
            (Reason.OWNED, state.newest.session != NOBODY),
            (Reason.NOTHING_TO_REWIND, not is_rewindable(state.newest)),
            (Reason.OTHER_REWIND, version != VERSION - 1),
            (Reason.HAS_WRITTEN, state.is_writer),
            (Reason.NEWER_CONNECTION, state.outdated),
        )
        act = Act.STORE if reason is None else Act.REFUSE
        assert rules.rewind_1(state, version) == Decision(act, reason), (state, version)
        seen.add(reason)
    assert len(seen) == 6


def test_every_reason_can_be_said() -> None:
    """And none is another one by another name, which an enum would allow."""
    assert list(Reason.__members__) == [reason.name for reason in Reason]
    for reason in Reason:
        said = reason.text.format(
            version=7, previous=6, whose="a node", taken_over="another", path="/x", damage="damage"
        )
        assert said and "{" not in said


def test_rules_look_at_nothing() -> None:
    """Pure: plain values in, a plain value out."""
    tree = ast.parse(Path(rules.__file__).read_text())
    imported = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"enum"}
    assert modules - {"__future__", "collections.abc", "typing"} == {
        "backend",
        "decisions",
        "filelog",
        "filelog.layout2",
        "protocol",
    }
