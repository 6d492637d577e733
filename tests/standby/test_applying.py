"""The database of a standby, record by record, against what the node had at that moment."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import destinations
import durable
from backend import FOREIGN_KEYS_OFF, FOREIGN_KEYS_ON, Change, Session
from destinations import FileDestination
from errors import ConfigError, DiskError, DoesNotReplay, PlaceGone
from filelog import layout2
from standby import state as keeping
from standby.applying import Applier, Foreign
from standby.promoting import Promotion
from standby.state import State
from tests import support
from tests.standby.common import begun, bring, caught_up, promoted
from wallet import database
from wallet.live import LiveDatabase

EVERY = 50


class Oracle:
    """The recorded node's own database: what it had announced last may not have happened."""

    def __init__(self) -> None:
        self.committed = sqlite3.connect(":memory:", isolation_level=None)
        self.announced: Change | None = None
        self.begin_session()

    def begin_session(self) -> None:
        self.is_first = True

    def announce(self, change: Change) -> None:
        last = self.announced
        if last is not None and not (self.is_first and change.base < last.version):
            self.apply(self.committed, last)
        if self.is_first:
            self.committed.execute("PRAGMA foreign_keys = ON")
        self.announced, self.is_first = change, False

    @staticmethod
    def apply(connection: sqlite3.Connection, change: Change) -> None:
        assert change.transaction is not None
        words = change.transaction if change.is_pragma else ["BEGIN", *change.transaction, "COMMIT"]
        for statement in words:
            connection.execute(statement)

    def save(self, path: Path) -> Path:
        """What it would have if the last one happens."""
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as target:
            self.committed.backup(target)
            (keys,) = self.committed.execute("PRAGMA foreign_keys").fetchone()
            target.execute(f"PRAGMA foreign_keys = {keys}")
            assert self.announced is not None
            self.apply(target, self.announced)
        return path


@pytest.mark.parametrize("name", ["payer", "crash"])
def test_promoted_at_every_50th_moment(name: str) -> None:
    oracle = Oracle()
    with (
        tempfile.TemporaryDirectory(dir=support.FAST) as base,
        contextlib.closing(oracle.committed),
    ):
        follow_and_promote(name, oracle, Path(base))


def follow_and_promote(name: str, oracle: Oracle, base: Path) -> None:
    """Follow in steps of random length, ended by kills; promote a copy now and then."""
    dice = random.Random(name)
    log = base / "node.bkp"
    backend = FileDestination(f"file://{log}")
    backend.create(None)
    directory = begun(base / "standby", backend.url)
    moment = next_look = 0
    for calls in support.trace_sessions(name):
        oracle.begin_session()
        backend.open()
        session = Session(backend, "DIR")
        for version, statements in calls:
            change = Change(version, None, statements)
            session.write(change)
            oracle.announce(change)
            moment += 1
            if moment == next_look or not moment % EVERY:
                next_look = moment + dice.randrange(1, 2 * EVERY)
                caught_up(directory, backend)
            if not moment % EVERY:
                copy = base / "copy.bkp"
                shutil.copy(log, copy)
                found = promoted(directory, base / "promoted", f"file://{copy}")
                expected = oracle.save(base / "oracle.sqlite3")
                assert database.compare(str(expected), str(found)) == [], moment
                assert database.version_of(str(found)) == version
                shutil.rmtree(base / "promoted")
                expected.unlink()
        backend.close()


@pytest.mark.parametrize("seed", range(3))
def test_what_it_has_beyond_its_place_is_not_applied_twice(
    seed: int, tmp_path: Path, url: str
) -> None:
    """Committed, and killed before that was noted; also in the middle of a migration."""
    calls = support.first_changes(5)
    for version in range(6, 40, 3):
        rebuilt = (
            f"CREATE TABLE new_items (id INTEGER PRIMARY KEY, body TEXT, c{version})",
            f"INSERT INTO new_items SELECT id, body, {version} FROM items",
            "DROP TABLE items",
            "ALTER TABLE new_items RENAME TO items",
        )
        calls += [
            support.change(version, f"INSERT INTO items (id) VALUES ({version})"),
            (version, [FOREIGN_KEYS_OFF]),
            support.change(version + 1, *rebuilt),
            (version + 1, [FOREIGN_KEYS_ON]),
            support.change(version + 2, f"UPDATE items SET body = body || {version}"),
        ]
    dice, directory = random.Random(seed), begun(tmp_path / "standby", url)
    support.make_backup(url)
    with support.opened(url) as backend:
        session = Session(backend, "DIR")
        for version, statements in calls:
            session.write(Change(version, None, statements))
            if dice.random() < 0.3:
                committed_unnoted(directory, url, dice.randrange(1, 8))
    found = promoted(directory, tmp_path / "promoted", url)
    support.apply_calls(tmp_path / "node.sqlite3", calls)
    assert database.compare(str(tmp_path / "node.sqlite3"), str(found)) == []


def committed_unnoted(directory: Path, url: str, most: int) -> None:
    state = keeping.read(str(directory))
    assert state is not None
    with contextlib.closing(Applier(str(directory), state)) as applier:
        if not bring(applier, FileDestination(url), most) and state.place is not None:
            assert applier._live is not None
            applier._live.commit()


def test_a_group_that_fails_is_begun_again_change_by_change(tmp_path: Path) -> None:
    """What stands before the change that does not replay is there, and that is named."""
    path = str(tmp_path / "db.sqlite3")
    live = LiveDatabase(path)
    deferred = "CREATE TABLE later (item REFERENCES items (id) DEFERRABLE INITIALLY DEFERRED)"
    for version, statements in [*support.first_changes(3), support.change(4, deferred)]:
        live.apply(Change(version, None, statements))
    live.commit()
    live.apply(Change(5, None, support.change(5, "INSERT INTO items VALUES (5, 'five')")[1]))
    live.apply(Change(6, None, support.change(6, "INSERT INTO later VALUES (99)")[1]))
    live.apply(Change(7, None, support.change(7, "INSERT INTO items VALUES (7, '')")[1]))
    with pytest.raises(DoesNotReplay, match="the change to version 6 does not replay: FOREIGN KEY"):
        live.commit()
    live.close()
    assert database.version_of(path) == 5


@pytest.mark.parametrize(
    "hostile",
    ["COMMIT", "BEGIN", "ROLLBACK", "/* */ commit", "END", "SAVEPOINT x", "ATTACH 'x' AS y"],
)
def test_a_change_never_leaves_its_transaction(hostile: str, tmp_path: Path) -> None:
    """Nor commits what stands before it in the same one."""
    path = str(tmp_path / "db.sqlite3")
    live = LiveDatabase(path)
    for version, statements in support.first_changes(3):
        live.apply(Change(version, None, statements))
    live.commit()
    live.apply(Change(4, None, support.change(4, "INSERT INTO items VALUES (4, '')")[1]))
    bad = Change(5, None, support.change(5, "INSERT INTO items VALUES (5, '')", hostile)[1])
    with pytest.raises(DoesNotReplay, match="to version 5"):
        live.apply(bad)
    assert live.version == live.committed == 4
    live.close()
    with contextlib.closing(sqlite3.connect(path)) as found:
        assert found.execute("SELECT max(id) FROM items").fetchone() == (4,)


def test_another_node_s_or_an_older_backup_does_not_take_its_place(
    tmp_path: Path, url: str
) -> None:
    log = support.make_backup(url, support.first_changes(9))
    directory = begun(tmp_path / "standby", url)
    caught_up(directory, FileDestination(url))
    log.unlink()
    support.make_backup(url, support.first_changes(5))
    before = support.contents(directory)
    state = keeping.read(str(directory))
    assert state is not None
    with contextlib.closing(Applier(str(directory), state)) as applier:
        with pytest.raises(PlaceGone) as gone:
            bring(applier, FileDestination(url))
        applier.go_back(gone.value)
        with pytest.raises(Foreign, match="at version 4, and this standby at version 8 already"):
            bring(applier, FileDestination(url))
    assert support.contents(directory) == before


def node_calls(node: str, count: int) -> list[support.Call]:
    """The first commits of the node of that id."""
    tables = (
        "CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER, blobval BLOB)",
        f"INSERT INTO vars VALUES ('data_version', 0, NULL), ('node_id', NULL, x'{node}')",
        "CREATE TABLE items (id INTEGER PRIMARY KEY, body TEXT)",
    )
    return [support.change(1, *tables), *support.first_changes(count)[1:]]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def garble(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(byte ^ 0x5A for byte in data[4096:]))


def swap(path: Path) -> None:
    path.unlink()
    support.apply_calls(path, node_calls("bb", 9))


@pytest.mark.parametrize("harm", [cut_off, garble, swap, Path.unlink, Path.touch])
def test_a_database_that_is_none_of_this_node_begins_again(
    harm: Callable[[Path], None], tmp_path: Path, url: str
) -> None:
    calls = node_calls("aa", 10)
    support.make_backup(url, calls)
    directory = begun(tmp_path / "standby", url)
    caught_up(directory, FileDestination(url))
    harm(directory / keeping.STANDBY_NAME)
    (directory / keeping.BEGINNING_NAME).touch()  # Another was killed before.
    found = promoted(directory, tmp_path / "promoted", url)
    support.apply_calls(tmp_path / "expected.sqlite3", calls)
    assert database.compare(str(tmp_path / "expected.sqlite3"), str(found)) == []
    assert not (tmp_path / "promoted" / keeping.BEGINNING_NAME).exists()


def test_a_full_disk_is_no_fault_of_a_change(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = support.first_changes(9)
    support.make_backup(url, calls)
    directory = begun(tmp_path / "standby", url)
    caught_up(directory, FileDestination(url))
    more = [support.change(10, f"INSERT INTO items VALUES (10, '{'x' * 99999}')")]
    support.add_session(url, [*more, support.change(11, "SELECT 1")])
    state = keeping.read(str(directory))
    assert state is not None
    monkeypatch.setattr(LiveDatabase, "journal", (*LiveDatabase.journal, "max_page_count = 8"))
    with contextlib.closing(Applier(str(directory), state)) as applier:
        with pytest.raises(DiskError, match=f"Make room on that disk: `df -h {directory}") as full:
            bring(applier, FileDestination(url))
        assert not applier.go_back(full.value) and applier.state.place is not None
        # As a disk's failed flush: what is read back then may never have reached it.
        path = str(directory / keeping.STANDBY_NAME)
        assert applier.go_back(DiskError(path, OSError(errno.EIO, "failed"), "write"))
        assert applier.state.place is None


@pytest.mark.parametrize(
    "harm",
    [
        {"taken": True},
        {"complete": True},
        {"urls": []},
        {"urls": [7]},
        {"check_every_s": "x"},
        {"check_every_s": None},
        {"node_id": 7},
        {"wal": 0},
        {"owner": "00"},
        {"acks": "x"},
        {"error": ["x"]},
        {"proof": {"time_ns": "x", "version": 1, "problems": [], "failure": None}},
        {"place": {}},
        {"later": 1},
    ],
    ids=str,
)
def test_a_state_that_no_standby_wrote_is_refused(harm: dict[str, object], tmp_path: Path) -> None:
    directory = begun(tmp_path / "standby", "file:///x")
    path = directory / keeping.STATE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | harm))
    with pytest.raises(ConfigError, match="is damaged, or of a later release"):
        keeping.read(str(directory))


def test_a_place_out_of_range_is_refused(tmp_path: Path) -> None:
    directory = begun(tmp_path / "standby", "file:///x")
    head = layout2.BEFORE_FIRST._replace(version=2**32, backup_id=bytes(16))
    keeping.write(str(directory), State(("file:///x",), 1.0, place=head))
    with pytest.raises(ConfigError, match="is damaged"):
        keeping.read(str(directory))


def test_a_name_that_cannot_be_flushed_loses_no_database(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.make_backup(url, support.first_changes(9))
    directory = begun(tmp_path / "standby", url)
    state = keeping.read(str(directory))
    assert state is not None
    promotion = Promotion(str(directory), state, destinations.backend_for)
    promotion.take_over()

    def fail(_path: str) -> None:
        raise OSError(errno.EIO, "failed")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_dir", fail)
        with pytest.raises(DiskError):
            promotion.name()
    promotion.name()
    assert database.version_of(str(directory / "lightningd.sqlite3")) == 9
    (directory / "lightningd.sqlite3").unlink()
    with pytest.raises(ConfigError, match=rf"backup-cli restore {url} {directory}`, then"):
        promotion.name()
