"""Decisions about versions, owners and databases: every combination, against the rule in words."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import decisions
from backend import MAX_VERSION
from decisions import (
    Obstacle,
    Verdict,
    judge,
    may_attach,
    may_heal,
    may_replace,
    may_resync,
    may_stand_for,
    may_upgrade,
    may_write,
)

VERSIONS = [*range(6), MAX_VERSION - 1, MAX_VERSION]
YES_NO = [False, True]

# What design.md says in words, as a table: (base - version, clipped to -2..1) to the
# verdicts for (rewindable, first) = (no, no), (no, yes), (yes, no), (yes, yes).
A, R, O, L = Verdict.APPEND, Verdict.REWIND, Verdict.OUT_OF_DATE, Verdict.LOST_STATE  # noqa: E741
TABLE = {
    -2: (L, L, L, L),
    -1: (L, L, L, R),
    0: (A, A, A, A),
    1: (O, O, O, O),
}


def test_version_rule_by_enumeration() -> None:
    seen = set()
    for base, version in itertools.product(VERSIONS, repeat=2):
        for rewindable, first in itertools.product(YES_NO, repeat=2):
            row = TABLE[max(-2, min(1, base - version))]
            verdict = judge(base, version, rewindable, first)
            assert verdict is row[2 * rewindable + first], (base, version, rewindable, first)
            seen.add(verdict)
    assert seen == set(Verdict)


def nodes_and_backups() -> Iterator[tuple[int, int, bool]]:
    """(the node's version, the backup's, whether that can be rewound), as they can occur."""
    for node, backup, rewindable in itertools.product(VERSIONS, VERSIONS, YES_NO):
        if backup or not rewindable:
            yield node, backup, rewindable


def test_a_node_goes_on_with_a_backup_that_its_next_change_continues() -> None:
    seen = set()
    for (node, backup, rewindable), there in itertools.product(nodes_and_backups(), YES_NO):
        if node and not there:
            continue
        found = may_attach(node, backup, rewindable, there)
        fits = {backup, backup - 1} if rewindable else {backup}
        if node in fits:
            assert found is None, (node, backup, rewindable)
        elif node > backup:
            assert found is Obstacle.OUT_OF_DATE, (node, backup, rewindable)
        else:
            assert found is (Obstacle.LOST_STATE if there else Obstacle.NO_DATABASE)
        seen.add(found)
    assert seen == {None, Obstacle.OUT_OF_DATE, Obstacle.LOST_STATE, Obstacle.NO_DATABASE}


def test_only_a_database_that_is_no_older_replaces_a_backup() -> None:
    seen = set()
    for node, backup in itertools.product(VERSIONS, repeat=2):
        found = may_resync(node, backup)
        assert (found is None) == (node >= backup and node > 0), (node, backup)
        if found is not None:
            # Whom to tell what: no database at all, one change behind, or more.
            reason = {0: Obstacle.NO_DATABASE, backup - 1: Obstacle.ONE_BEHIND}
            reason[0] = Obstacle.NO_DATABASE  # Also where 0 is one behind.
            assert found is reason.get(node, Obstacle.LOST_STATE), (node, backup)
        seen.add(found)
    assert seen == {None, Obstacle.NO_DATABASE, Obstacle.ONE_BEHIND, Obstacle.LOST_STATE}


def test_an_old_file_gives_way_to_a_database_that_is_not_behind_anything_it_names() -> None:
    seen = set()
    for (node, backup, rewindable), named in itertools.product(nodes_and_backups(), VERSIONS):
        found = may_upgrade(node, backup, rewindable, named)
        lost = node < backup and not (rewindable and node == backup - 1)
        # One behind the header is the abandoned change, of which the file may hold no more.
        old_copy = node + 1 < named
        assert (found is None) == (not lost and not old_copy), (node, backup, rewindable, named)
        if found is not None:
            assert found is (Obstacle.LOST_STATE if lost else Obstacle.OLD_COPY)
        seen.add(found)
    assert seen == {None, Obstacle.LOST_STATE, Obstacle.OLD_COPY}


def test_only_the_owner_writes_and_nobodys_backup_may_be_started_over() -> None:
    nobody, ours, other = bytes(16), b"A" * 8 + b"1" * 8, b"B" * 8 + b"1" * 8
    for found, owner in itertools.product([nobody, ours, other], [None, nobody, ours, other]):
        # Of an owner the first half counts: the rest differs in each session.
        session = None if owner is None else owner[:8] + b"2" * 8
        same = owner in (None, found)
        assert may_write(found[:8], owner) == same
        assert may_write(found[:8], session) == same
        assert may_replace(found[:8], owner) == (same or found == nobody)
        assert may_replace(None, owner)


def test_what_heals_in_the_hook() -> None:
    seen = set()
    for verdict in Verdict:
        for first, off, lost, end_holds, unknown in itertools.product(YES_NO, repeat=5):
            found = may_heal(verdict, first, off, lost, end_holds, unknown)
            # A node that lost state must not go on, and no running node gets ahead.
            hopeless = verdict is Verdict.LOST_STATE or (
                verdict is Verdict.OUT_OF_DATE and not first
            )
            may = not hopeless and end_holds and not lost and not off and not unknown
            assert (found is None) == may, (verdict, first, off, lost, end_holds, unknown)
            if hopeless:
                assert found is not None and found.value == verdict.value
            seen.add(found)
    by_hand = {Obstacle.HEALING_OFF, Obstacle.LOST_BEFORE, Obstacle.DAMAGED_END}
    by_hand |= {Obstacle.NOT_ITS_OWN}
    assert seen == {None, Obstacle.LOST_STATE, Obstacle.OUT_OF_DATE} | by_hand


def test_only_the_nodes_own_database_at_the_very_version_stands_for_a_backup() -> None:
    seen = set()
    for base, found in itertools.product(VERSIONS, repeat=2):
        for node, backup in itertools.product([None, "a", "b"], repeat=2):
            obstacle = may_stand_for(base, found, node, backup)
            differ = {node, backup} == {"a", "b"}
            assert (obstacle is None) == (base == found and not differ)
            seen.add(obstacle)
    assert seen == {None, Obstacle.OTHER_VERSION, Obstacle.OTHER_NODE}


def test_decisions_look_at_nothing() -> None:
    """Pure: plain values in, a plain value out."""
    tree = ast.parse(Path(decisions.__file__).read_text())
    imported = [n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)]
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert imported == ["enum"] and modules == ["__future__"]
