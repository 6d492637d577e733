"""What every Destination must do, whatever it is made of. Only its interface is used here."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backend import FOREIGN_KEYS_OFF, Beginning, Change, Destination, Ending, Snapshot
from destinations import backend_for, destination_for
from errors import BackupBusy, BackupError, BackupExists, ConfigError
from filelog.layout2 import Head
from filelog.layout2 import Kind as RecordKind
from replica import Followable, Pause, Record
from socketbackend import SocketBackend
from tests import clusters, support
from tests.peers import ServerProcess
from tests.support import ROOT, Call

OFF = [FOREIGN_KEYS_OFF]
ON = ["PRAGMA foreign_keys = ON;"]

Connect = Callable[[], Destination]
"""A new Destination object for the destination of this test."""
Kind = Callable[[Path], contextlib.AbstractContextManager[Connect]]
"""Makes a destination without a backup in a directory."""


@contextlib.contextmanager
def file_destination(directory: Path) -> Iterator[Connect]:
    """A file that does not exist yet."""
    yield lambda: backend_for(f"file://{directory}/node.bkp")


@contextlib.contextmanager
def socket_destination(directory: Path) -> Iterator[Connect]:
    """A server whose file is empty."""
    url = f"file://{directory}/node.bkp"
    support.make_backup(url)
    with ServerProcess(url) as server:
        yield lambda: SocketBackend(server.url)


@contextlib.contextmanager
def protocol_1_destination(directory: Path) -> Iterator[Connect]:
    """The same, where the two sides agree on protocol 1."""
    url = f"file://{directory}/node.bkp"
    support.make_backup(url)
    with ServerProcess(url, patch="import protocol; protocol.NEWEST = 1") as server:

        def of_protocol_1() -> Destination:
            return SocketBackend(server.url)

        yield of_protocol_1


def mirror_of(*kinds: Kind) -> Kind:
    """Several destinations as one, all of which acknowledge."""

    @contextlib.contextmanager
    def mirror_destination(directory: Path) -> Iterator[Connect]:
        with contextlib.ExitStack() as stack:
            urls = []
            for number, kind in enumerate(kinds):
                place = directory / str(number)
                place.mkdir()
                urls.append(stack.enter_context(kind(place))().url)
            yield lambda: destination_for(urls, None, 1)

    return mirror_destination


def in_postgres(pair: clusters.Pair) -> Connect:
    """A cluster with an empty database."""
    url = pair.url(dbname=pair.database())
    return lambda: backend_for(url)


DESTINATIONS: dict[str, Kind] = {
    "file": file_destination,
    "socket": socket_destination,
    "protocol 1": protocol_1_destination,
    "file, file": mirror_of(file_destination, file_destination),
    "file, socket": mirror_of(file_destination, socket_destination),
    "three": mirror_of(*[file_destination] * 3),
}


FILE_AND_POSTGRES = "file, postgres"


@pytest.fixture(
    params=[
        *DESTINATIONS,
        "postgres",
        pytest.param(FILE_AND_POSTGRES, marks=pytest.mark.soak),
    ]
)
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Connect]:
    """A destination without a backup, once for each kind."""
    if request.param in ("postgres", FILE_AND_POSTGRES):
        alone = in_postgres(request.getfixturevalue("pair"))
        urls = [f"file://{tmp_path}/node.bkp", alone().url]
        yield alone if request.param == "postgres" else lambda: destination_for(urls, None, 1)
        return
    (tmp_path / "destination").mkdir()
    with DESTINATIONS[request.param](tmp_path / "destination") as destination:
        yield destination


@contextlib.contextmanager
def opened(connect: Connect) -> Iterator[Destination]:
    """The writer: one session of lightningd."""
    backend = connect()
    backend.open()
    try:
        yield backend
    finally:
        backend.close()


def add(backend: Destination, *calls: Call) -> None:
    """Store ``calls`` as they come."""
    for version, statements in calls:
        backend.add_change(Change(version, None, statements))


def state(backend: Destination) -> tuple[int, int, bool, int]:
    """What a Destination that is open tells of itself."""
    return backend.version, backend.prev_version, backend.rewindable, backend.version_count


def restored(connect: Connect) -> tuple[bytes, list[Call]]:
    """The snapshot and the calls that a restore would apply."""
    calls, pieces, ending = support.passed(connect().read())
    assert (ending.damage, ending.torn_tail) == (None, False)
    return b"".join(pieces), calls


def snapshot(directory: Path, version: int, size: int = 8192) -> Snapshot:
    """A closed database at ``version``, of more than ``size`` bytes."""
    path = directory / f"snapshot-{version}.sqlite3"
    support.apply_calls(path, support.first_changes(version))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE filler AS SELECT randomblob(?) AS x", (size,))
    return Snapshot(str(path), version)


def content(of: Snapshot) -> bytes:
    return Path(of.path).read_bytes()


CALLS = support.first_changes(6)


def change(version: int, text: str = "") -> Call:
    return support.change(version, f"-- {text or version}")


def test_missing_backup_is_refused_by_everyone(connect: Connect) -> None:
    if "socket:" in connect().url:
        pytest.skip("a server does not start without its backup")
    connect().require_absent()
    with pytest.raises(BackupError):
        connect().open()
    with pytest.raises(BackupError):
        restored(connect)
    connect().require_absent()


def test_empty_backup(connect: Connect) -> None:
    connect().create(None)
    assert restored(connect) == (b"", [])
    with opened(connect) as backend:
        assert state(backend) == (0, 0, False, 0)
    with opened(connect) as backend:
        assert state(backend) == (0, 0, False, 0)


def test_backup_that_begins_with_a_snapshot(connect: Connect, tmp_path: Path) -> None:
    first = snapshot(tmp_path, 3, size=5 << 19)
    connect().create(first)
    assert os.path.getsize(first.path) > 2 << 20, "several pieces"
    assert restored(connect) == (content(first), [])
    with opened(connect) as backend:
        assert state(backend) == (3, 3, False, 1)
        add(backend, change(4))
        assert state(backend) == (4, 3, True, 2)
    assert restored(connect) == (content(first), [change(4)])


@pytest.mark.parametrize("filled", [False, True])
def test_create_refuses_what_is_there(filled: bool, connect: Connect, tmp_path: Path) -> None:
    connect().create(None if not filled else snapshot(tmp_path, 2))
    before = restored(connect)
    if filled:  # A destination may take an empty backup for none.
        for again in (None, snapshot(tmp_path, 4)):
            with pytest.raises(BackupExists):
                connect().create(again)
        with pytest.raises(BackupExists):
            connect().require_absent()
    with opened(connect) as backend:
        add(backend, change(2 * filled + 1))
    with pytest.raises(BackupExists):
        connect().create(None)
    with pytest.raises(BackupExists):
        connect().create(snapshot(tmp_path, 5))
    assert restored(connect) == (before[0], [change(2 * filled + 1)])


def test_changes_are_kept_in_order_over_sessions(connect: Connect) -> None:
    connect().create(None)
    for number, call in enumerate(CALLS, 1):
        with opened(connect) as backend:
            add(backend, call)
            assert state(backend) == (number, number - 1, True, number)
            assert restored(connect) == (b"", CALLS[:number]), "acknowledged is stored"
        assert restored(connect) == (b"", CALLS[:number])
    with opened(connect) as backend:
        assert state(backend) == (6, 5, True, 6)


def up_to_pause(records: Iterator[Record | Pause]) -> list[Head]:
    """The heads of the records that are there."""
    found: list[Head] = []
    for each in records:
        if isinstance(each, Pause):
            return found
        found.append(each[0])
    raise AssertionError("it does not end")


def test_what_is_written_is_followed(connect: Connect, tmp_path: Path) -> None:
    """From its beginning and from each place, with what is taken back; also while it is written."""
    source = connect()
    assert isinstance(source, Followable)
    source.create(snapshot(tmp_path, 2))
    if not source.keeps_owner:  # Protocol 1.
        with pytest.raises(ConfigError, match="protocol 1"), source.follow(None):
            pass
        return
    with opened(connect) as backend:
        add(backend, change(3), change(4))
    with opened(connect) as backend:
        backend.rewind()
        add(backend, change(4, "again"))
        with source.follow(None) as records:
            heads = up_to_pause(records)
            add(backend, change(5))
            heads += [next(each[0] for each in records if not isinstance(each, Pause))]
    assert heads[0].kind == RecordKind.SNAPSHOT
    steps = [head.version for head in heads if head.kind in (RecordKind.CHANGE, RecordKind.REWIND)]
    assert steps == [3, 4, 3, 4, 5]
    for place, head in enumerate(heads):
        with source.follow(head) as records:
            rest = up_to_pause(records)
        assert [each.chain for each in rest] == [each.chain for each in heads[place + 1 :]]


def test_content_comes_back_exactly(connect: Connect) -> None:
    texts = ["'it''s' -- /* \n\r\n */ ;", "\U0001f600 \ufeff\u2028\x85\x01", " ", "x" * 3_000_000]
    calls = [support.change(1, *texts), (1, ["-- no bump", "two"]), change(2)]
    connect().create(None)
    with opened(connect) as backend:
        add(backend, *calls)
    assert restored(connect) == (b"", calls)


def test_rewind_takes_back_one_change(connect: Connect, tmp_path: Path) -> None:
    first = snapshot(tmp_path, 2)
    connect().create(first)
    with opened(connect) as backend:
        add(backend, change(3), change(4, "abandoned"))
    with opened(connect) as backend:
        assert state(backend) == (4, 3, True, 3)
        backend.rewind()
        assert state(backend) == (3, 3, False, 2), "one can be taken back, no more"
        assert restored(connect) == (content(first), [change(3)])
    assert restored(connect) == (content(first), [change(3)])


def test_rewind_then_other_content_then_reopened(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, change(1), change(2, "abandoned"))
    for text in ("abandoned too", "abandoned again", "done"):
        with opened(connect) as backend:
            backend.rewind()
            add(backend, change(2, text))
            assert state(backend) == (2, 1, True, 2)
    with opened(connect) as backend:
        assert state(backend) == (2, 1, True, 2)
        add(backend, change(3))
    assert restored(connect) == (b"", [change(1), change(2, "done"), change(3)])


def test_rewind_is_kept_without_another_change(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, change(1), change(2))
    with opened(connect) as backend:
        backend.rewind()
    with opened(connect) as backend:
        assert (backend.version, backend.version_count) == (1, 1)
        add(backend, change(2, "other"))
    assert restored(connect) == (b"", [change(1), change(2, "other")])


def test_first_change_of_all_can_be_taken_back(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, change(1, "abandoned"))
    with opened(connect) as backend:
        backend.rewind()
        assert state(backend) == (0, 0, False, 0)
        assert restored(connect) == (b"", [])
        add(backend, change(1))
    assert restored(connect) == (b"", [change(1)])


def test_change_without_a_bump(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, change(1), (1, OFF))
        assert state(backend) == (1, 1, False, 2)
    with opened(connect) as backend:
        assert state(backend) == (1, 1, False, 2)


# PRAGMA foreign_keys = OFF holds for the one change that follows it in its session.

PRAGMA_CASES: dict[str, tuple[list[list[Call]], list[Call]]] = {
    "a migration": (
        [[change(1), (1, OFF), change(2), (2, ON), change(3)]],
        [change(1), (1, OFF), change(2), (2, ON), change(3)],
    ),
    "OFF at the end": ([[change(1), (1, OFF)]], [change(1)]),
    "OFF alone": ([[(0, OFF)]], []),
    "OFF across a restart": ([[change(1), (1, OFF)], [change(2)]], [change(1), change(2)]),
    "OFF again after a restart": (
        [[change(1), (1, OFF)], [(1, OFF), change(2), (2, ON)]],
        [change(1), (1, OFF), change(2), (2, ON)],
    ),
    "killed before ON": (
        [[change(1), (1, OFF), change(2)], [change(3)]],
        [change(1), (1, OFF), change(2), change(3)],
    ),
    "ON across a restart": ([[change(1)], [(1, ON), change(2)]], [change(1), (1, ON), change(2)]),
}


@pytest.mark.parametrize("name", PRAGMA_CASES)
def test_foreign_keys_off_holds_for_one_change_of_its_session(name: str, connect: Connect) -> None:
    sessions, expected = PRAGMA_CASES[name]
    if name == "OFF across a restart" and connect.__name__ == "of_protocol_1":
        pytest.skip("protocol 1 cannot tell a restart from a reconnect")
    connect().create(None)
    for calls in sessions:
        with opened(connect) as backend:
            add(backend, *calls)
    assert restored(connect) == (b"", expected)


def test_foreign_keys_off_does_not_outlive_the_abandoned_change(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, change(1), (1, OFF), change(2, "abandoned"))
    with opened(connect) as backend:
        backend.rewind()
        add(backend, change(2, "with foreign keys"))
    assert restored(connect) == (b"", [change(1), change(2, "with foreign keys")])


# Replacing.


def test_replace_starts_over_and_keeps_the_old(connect: Connect, tmp_path: Path) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, change(1), change(2))
    fresh = snapshot(tmp_path, 5)
    assert connect().replace(fresh), "where the old one is"
    assert restored(connect) == (content(fresh), [])
    with opened(connect) as backend:
        assert state(backend) == (5, 5, False, 1)
        add(backend, change(6))
        assert state(backend) == (6, 5, True, 2)
    assert restored(connect) == (content(fresh), [change(6)])


def test_replace_of_a_backup_that_began_with_a_snapshot(connect: Connect, tmp_path: Path) -> None:
    connect().create(snapshot(tmp_path, 2))
    for version in (3, 4):
        assert connect().replace(snapshot(tmp_path, version))
        assert restored(connect) == (content(snapshot_at(tmp_path, version)), [])


def snapshot_at(directory: Path, version: int) -> Snapshot:
    return Snapshot(str(directory / f"snapshot-{version}.sqlite3"), version)


# One writer, many readers.


def test_one_writer_at_a_time(connect: Connect, tmp_path: Path) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, change(1))
        if isinstance(backend, SocketBackend) or backend.url.startswith("postgresql:"):
            with opened(connect):
                pass  # A mere look: the first accepted write takes over.
        else:
            with pytest.raises(BackupError) as caught:
                connect().open()
            assert isinstance(caught.value, BackupBusy) or "another" in str(caught.value).lower()
        add(backend, change(2))
    with opened(connect) as backend:
        add(backend, change(3))
    assert restored(connect) == (b"", [change(1), change(2), change(3)])


def test_reading_in_mid_session_and_going_on(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, *CALLS[:2])
        reading = connect().read()
        found = next(iter(reading)).found
        assert isinstance(found, Change) and found.transaction == CALLS[0][1]
        add(backend, *CALLS[2:])
        reading.close()  # A pass may end early.
        assert restored(connect) == (b"", CALLS)


def test_reading_tells_how_far_it_came(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, *CALLS)
    reading = connect().read()
    *changes, (ending, position, total) = reading
    reading.close()
    assert [getattr(step.found, "version", 0) for step in changes] == [call[0] for call in CALLS]
    places = [step.position for step in changes]
    assert places == sorted(places) and places[-1] <= position
    assert isinstance(ending, Ending)
    assert (ending.version, ending.damage, ending.torn_tail) == (6, None, False)
    assert total == 0 or position == total


def test_pass_begins_with_the_snapshot_and_ends_once(connect: Connect, tmp_path: Path) -> None:
    source = snapshot(tmp_path, 4, 3 << 20)
    connect().create(source)
    with opened(connect) as backend:
        add(backend, change(5))
    with contextlib.closing(connect().read()) as reading:
        found = [step.found for step in reading]
    assert isinstance(found[0], Beginning) and found[0].version == 4
    assert found[0].size in (None, os.path.getsize(source.path))
    assert [getattr(each, "snapshot", None) is None for each in found[1:]].index(True) >= 3
    assert found[-2] == Change(5, None, change(5)[1])
    assert isinstance(found[-1], Ending) and found[-1].version == 5
    assert {type(each) for each in found[1:-1]} == {Change}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed elsewhere")
def test_pass_that_is_closed_early_keeps_nothing_open(connect: Connect, tmp_path: Path) -> None:
    connect().create(snapshot(tmp_path, 4))
    before = support.open_files()
    for steps in range(3):
        reading = connect().read()
        taken = list(itertools.islice(reading, steps))
        assert len(taken) == steps
        reading.close()
        assert support.open_files() <= before


# Status.


def test_status(connect: Connect, tmp_path: Path) -> None:
    first = snapshot(tmp_path, 2)
    connect().create(first)
    known = []
    for calls, version, prev, count in (
        ([], 2, None, 1),
        ([change(3)], 3, 2, 2),
        ([(3, OFF)], 3, None, 3),
        ([change(4)], 4, 3, 4),
    ):
        with opened(connect) as backend:
            add(backend, *calls)
            within = connect().status()
        status = connect().status()
        for found in (within, status):
            assert (found.version, found.prev_version, found.version_count) == (
                version,
                prev,
                count,
            )
            assert (found.damage, found.torn_tail) == (None, False)
            # What a destination cannot tell is None.
            assert found.changes in (None, count - 1)
            assert found.snapshot_size in (None, os.path.getsize(first.path))
            assert found.size is None or found.allocated is None or found.size <= found.allocated
        assert status.url == connect().url and status.layout
        known.append(status.backup_id)
    assert len(set(known)) == 1
    with opened(connect) as backend:
        backend.rewind()
    status = connect().status()
    assert (status.version, status.prev_version, status.version_count) == (3, None, 3)


# Work beside the node, and what the commands ask.


def test_an_idle_backup_is_compacted(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, *CALLS)
    done = connect().compact()
    assert done["before"]["version_count"] == len(CALLS)
    assert 0 < done["after"]["version_count"] < len(CALLS)
    assert connect().status().version == CALLS[-1][0]


def test_an_open_backup_whose_house_is_kept_is_compacted_and_goes_on(connect: Connect) -> None:
    connect().create(None)
    with opened(connect) as backend:
        add(backend, *CALLS)
        backend.keep_house(threading.Lock(), None)
        seen = list[tuple[int, int]]()
        assert backend.compact(lambda *at: seen.append(at))["after"]["version_count"] < len(CALLS)
        add(backend, change(CALLS[-1][0] + 1))
        assert all(done <= of for done, of in seen) and backend.reconnects == 0
    assert restored(connect)[1][-1] == change(CALLS[-1][0] + 1)


def test_scratch_files_stand_beside_it_or_where_they_are_wanted(
    connect: Connect, tmp_path: Path
) -> None:
    backend = connect()
    other = str(tmp_path / "other")
    beside = (*backend.directories, other)[0]
    assert os.path.dirname(backend.scratch_paths(None, other)) == beside
    assert os.path.dirname(backend.scratch_paths(None)) == (*backend.directories, os.getcwd())[0]
    assert os.path.dirname(backend.scratch_paths(other, str(tmp_path))) == other


def test_whoever_holds_or_checks_it_lets_go_of_it(connect: Connect) -> None:
    connect().create(None)
    with connect().held(), connect().checking():
        pass
    connect().note_proven()
    with opened(connect) as backend:
        add(backend, CALLS[0])
    assert connect().named_version() == 0


def test_a_held_file_has_no_other_writer(tmp_path: Path) -> None:
    with file_destination(tmp_path) as connect:
        connect().create(None)
        with connect().held(), pytest.raises(BackupBusy):
            connect().open()


def test_only_who_keeps_the_file_tells_whether_it_is_old(connect: Connect) -> None:
    connect().create(None)
    backend = connect()
    if not isinstance(backend, SocketBackend):
        assert not backend.is_old()
        return
    with pytest.raises(ConfigError, match="is kept by a server"):
        backend.is_old()
    with pytest.raises(ConfigError, match="is kept by a server"):
        backend.rebuild(bytes(16), lambda *_: None)


def test_commands_and_plugin_ask_the_interface() -> None:
    """They never ask which Destination it is, nor for what only one of them has."""
    files = [*(ROOT / "commands").glob("*.py"), ROOT / "backup.py"]
    for file in files:
        for found in ast.walk(ast.parse(file.read_text())):
            if isinstance(found, ast.Call) and isinstance(found.func, ast.Name):
                said = f"{file.name}:{found.lineno}: {ast.unparse(found)}"
                asked = found.func.id == "isinstance" and "Backend" in said.partition(" ")[2]
                assert not asked, said
                assert "backend" not in said or found.func.id not in ("getattr", "hasattr"), said
