"""What keeps a commit on several machines: every combination, against its meaning."""

from __future__ import annotations

import itertools
import re
import threading

import pytest

from clusterchecks import (
    CONFIRMING,
    Fallback,
    Server,
    Slot,
    Standby,
    demanded,
    of_commit,
    problems,
    warnings,
)
from tests import support
from tests.clusters import Pair

BOOLS = (False, True)
SOUND = Server("backup", False, False, True, True, "ANY 1 (a, b)", True, 1)
SOUND_FALLBACK = Fallback("replica", "on", False, [Slot("b", True, "reserved", 0)])


def test_demanded_by_enumeration() -> None:
    """The grammar of PostgreSQL's syncrep_gram.y, in every spelling."""
    every = ["*", "a", "a, b", '"ANY 2 (a)",b', "a , b,c", '"FIRST"', "any_2", "2"]
    assert [demanded(names) for names in every] == [1] * len(every)
    assert [demanded(names) for names in ("", " ", "\t")] == [0] * 3
    spellings = itertools.product(
        ("", "ANY ", "any  ", "FIRST ", "First\t"), (1, 2, 3, 10), ("", " "), every
    )
    for kind, number, blank, listed in spellings:
        assert demanded(f" {kind}{number}{blank}({listed})") == number


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_problems_by_enumeration(wanted: int) -> None:
    for flags in itertools.product(BOOLS, repeat=5):
        is_standby, read_only, fsync, full_page_writes, sees = flags
        for count, confirming in itertools.product(range(4), repeat=2):
            names = f"ANY {count} (a, b, c)" if count else ""
            server = Server(
                "backup", is_standby, read_only, fsync, full_page_writes, names, sees, confirming
            )
            keeps_on_disk = fsync and full_page_writes
            takes_changes = not is_standby and not read_only
            # A commit returns when `count` standbys have it, and those are there.
            on_standbys = sees and wanted <= count <= confirming
            sound = takes_changes and keeps_on_disk and (on_standbys or not wanted)
            assert (problems(server, wanted) == []) == sound


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_standby": True}, "it is a standby"),
        ({"read_only": True}, "default_transaction_read_only"),
        ({"fsync": False}, "fsync is off"),
        ({"full_page_writes": False}, "full_page_writes is off"),
        ({"names": ""}, "waits for 0 standbys, and 1 must have it"),
        ({"sees": False}, 'GRANT pg_monitor TO "backup";'),
        ({"sees": False, "role": 'a"b'}, 'GRANT pg_monitor TO "a""b";'),
        ({"confirming": 0}, "0 synchronous standbys stream from it, and a commit waits for 1"),
        ({"subscribers": "c"}, "c follows tables only"),
    ],
)
def test_what_is_said(change: dict[str, object], said: str) -> None:
    (problem,) = problems(SOUND._replace(**change), 1)  # type: ignore[arg-type]
    assert said in problem


def test_who_confirms_by_enumeration() -> None:
    states = ("streaming", "catchup", "startup", "backup", "stopping")
    kinds = ("sync", "quorum", "potential", "async")
    for state, sync_state, logical in itertools.product(states, kinds, BOOLS):
        expected = state == "streaming" and sync_state in CONFIRMING and not logical
        assert Standby("b", state, sync_state, 0, logical).confirms == expected


@pytest.mark.parametrize(
    ("value", "level"),
    [("on", 0), ("remote_apply", 0), ("remote_write", 4), ("local", 1), ("off", 1)],
)
def test_what_a_commit_waits_for(value: str, level: int) -> None:
    wrong, doubtful = of_commit(value)
    assert (bool(wrong), bool(doubtful)) == (level == 1, level == 4)


@pytest.mark.parametrize(
    ("standby", "fallback", "said"),
    [
        ({}, {}, None),
        ({"sync_state": "async"}, {}, None),
        ({"state": "catchup"}, {}, "b does not keep up: catchup"),
        ({}, {"slots": [Slot("b", False, "extended", 9)]}, "nobody uses the slot b"),
        ({}, {"slots": [Slot("b", False, "lost", None)]}, "b has lost its place"),
        ({}, {"slots": [Slot("b", True, "unreserved", 9)]}, "b has lost its place"),
        ({}, {"failing": True}, "archiving fails"),
        ({}, {"archive_mode": "off", "failing": True}, None),
        ({}, {"slots": []}, None),
        ({}, {"slots": [], "archive_mode": "off"}, "neither a slot nor an archive"),
    ],
)
def test_warnings(
    standby: dict[str, object], fallback: dict[str, object], said: str | None
) -> None:
    one = Standby("b", "streaming", "quorum", 0)._replace(**standby)  # type: ignore[arg-type]
    found = warnings([one], SOUND_FALLBACK._replace(**fallback))  # type: ignore[arg-type]
    assert bool(found) == (said is not None)
    assert all(re.search(said or "", line) for line in found)


@pytest.mark.parametrize(
    "names", ["", "*", "b", "a", "b, a", "ANY 1 (a, b)", "2 (a, b)", 'first 1("b",c)', "any 2 (*)"]
)
def test_a_commit_waits_for_as_many_as_that(names: str, pair: Pair) -> None:
    """On a real server, whose only standby is b."""
    primary = pair.primary
    primary.configure("synchronous_standby_names", names)
    pair.await_streaming()
    ((confirming,),) = primary.sql(
        "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"
    )
    heard: list[str | None] = []
    with primary.connect(pair.database()) as connection:
        connection.execute("SET synchronous_commit = on")
        connection.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        writer = threading.Thread(target=connection.execute, args=("CREATE TABLE t ()",))
        writer.start()
        if demanded(names) > confirming:
            pair.await_waiting()
            pair.await_streaming()
            pair.await_waiting()
            primary.sql("SELECT pg_cancel_backend(%s)", connection.info.backend_pid)
        writer.join(support.ANSWER_S)
    assert bool(heard) == (demanded(names) > confirming)
