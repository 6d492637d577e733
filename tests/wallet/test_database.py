"""SQLite: copies, data_version, replay as the node's connection did it, checks, comparison."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from backend import Change, bump
from errors import DatabaseError, DoesNotReplay
from filebackend import FileBackend
from tests import support
from tests.support import run_cli
from wallet import database
from wallet.database import Replayer

OFF = ["PRAGMA foreign_keys = OFF;"]
ON = ["PRAGMA foreign_keys = ON;"]
FAMILY = [
    "CREATE TABLE parents (id INTEGER PRIMARY KEY, name TEXT)",
    "CREATE TABLE children (id INTEGER PRIMARY KEY,"
    " parent INTEGER REFERENCES parents (id) ON DELETE CASCADE)",
    "INSERT INTO parents VALUES (1, 'one'), (2, 'two')",
    "INSERT INTO children VALUES (10, 1), (20, 2)",
]
REBUILD = [
    "CREATE TABLE temp_parents (id INTEGER PRIMARY KEY, name TEXT, added INTEGER)",
    "INSERT INTO temp_parents SELECT id, name, 0 FROM parents",
    "DROP TABLE parents",
    "ALTER TABLE temp_parents RENAME TO parents",
]
"""How a schema migration replaces a table that others point to."""


def make(path: Path, *statements: str) -> str:
    """A database at ``path`` after ``statements``, with foreign keys not enforced."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    return str(path)


def rows(path: Path | str, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def versioned(version: int) -> list[str]:
    return [
        "CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)",
        f"INSERT INTO vars VALUES ('data_version', {version})",
    ]


def replay(path: Path, *calls: Sequence[str]) -> int:
    """Replay ``calls`` into ``path``; its data_version."""
    replayer = Replayer(str(path))
    try:
        for statements in calls:
            replayer.apply(Change(0, None, statements))
    except BaseException:
        replayer.close()
        raise
    return replayer.finish()


# data_version and copies


@pytest.mark.parametrize(
    ("statements", "version"),
    [
        (versioned(7), 7),
        (versioned(0), 0),
        (["CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)"], 0),
        (["CREATE TABLE vars (name, intval)", "INSERT INTO vars VALUES ('data_version', NULL)"], 0),
        (["CREATE TABLE vars (name, val)", "INSERT INTO vars VALUES ('data_version', '9')"], 0),
        (["CREATE TABLE other (x)"], 0),
        ([], 0),
    ],
)
def test_data_version(statements: list[str], version: int, tmp_path: Path) -> None:
    path = make(tmp_path / "node", *statements)
    assert database.version_of(path) == version
    if statements:
        assert database.copy(path, str(tmp_path / "copy")).version == version


def test_data_version_of_no_database(tmp_path: Path) -> None:
    assert database.version_of(str(tmp_path / "missing")) == 0
    assert list(tmp_path.iterdir()) == []


def test_data_version_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"no database " * 1000)
    with pytest.raises(DatabaseError, match="file is not a database"):
        database.version_of(str(tmp_path / "text"))


@pytest.mark.parametrize("name", ["node", "with space", "per%20cent", "what?mode=memory", "ha#sh"])
def test_copy(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / name, *versioned(3), *FAMILY)
    seen: list[tuple[int, int]] = []
    target = tmp_path / "copy"
    found = database.copy(source, str(target), lambda done, total: seen.append((done, total)))
    assert (found.path, found.version) == (str(target), 3)
    assert database.compare(source, str(target)) == []
    assert seen[-1][0] == seen[-1][1] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "copy"])


def test_copy_reports_progress_on_the_way(tmp_path: Path) -> None:
    source = make(tmp_path / "node", "CREATE TABLE t (x)")
    make(tmp_path / "node", "INSERT INTO t VALUES (zeroblob(10000000))")
    seen: list[int] = []
    database.copy(source, str(tmp_path / "copy"), lambda done, _total: seen.append(done))
    assert seen == sorted(seen)
    assert len(seen) >= 3


def test_copy_of_a_wal_that_was_never_written_back(tmp_path: Path) -> None:
    source = make(tmp_path / "node", *versioned(1), "PRAGMA journal_mode = WAL")
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
        connection.execute("UPDATE vars SET intval = 2")
        # Still open: what it wrote is in the WAL alone.
        found = database.copy(source, str(tmp_path / "copy"))
        assert found.version == 2
        assert rows(tmp_path / "copy", "SELECT intval FROM vars") == [(2,)]


def test_copy_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"no database " * 1000)
    with pytest.raises(DatabaseError, match="text: SQLite says: file is not a database"):
        database.copy(str(tmp_path / "text"), str(tmp_path / "copy"))
    with pytest.raises(DatabaseError, match="unable to open"):
        database.copy(str(tmp_path / "missing"), str(tmp_path / "copy-2"))


def test_copy_of_a_database_that_is_not_sound(tmp_path: Path) -> None:
    """It is never stored, by no command."""
    source = tmp_path / "node"
    make(source, *versioned(1), "CREATE TABLE t (x)", "CREATE INDEX i ON t (x)")
    make(source, "INSERT INTO t VALUES ('in the table and in the index')")
    data = bytearray(source.read_bytes())
    at = data.index(b"in the index")
    data[at : at + 12] = b"in XXX index"
    source.write_bytes(data)
    with pytest.raises(DatabaseError, match="node: it is not sound: integrity_check: row 1"):
        database.copy(str(source), str(tmp_path / "copy"))


def test_copy_beside_a_writer_has_its_own_version(tmp_path: Path) -> None:
    """A commit between the copy and the look at the version, which is then the copy's."""
    source = make(tmp_path / "node", *versioned(1), *FAMILY, "PRAGMA journal_mode = WAL")
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as writer:

        def write(done: int, total: int) -> None:
            if done == total:  # All pages are copied.
                writer.execute("UPDATE vars SET intval = intval + 1")

        found = database.copy(source, str(tmp_path / "copy"), write)
        assert writer.execute("SELECT intval FROM vars").fetchone() == (2,)
    assert found.version == 1
    assert rows(found.path, "SELECT intval FROM vars") == [(1,)]
    url = f"file://{tmp_path}/node.bkp"
    FileBackend(url).create(found)
    assert run_cli("verify", url).stdout.startswith("The backup is sound at version 1")


def test_copies_are_for_their_owner_only(tmp_path: Path) -> None:
    source = tmp_path / "node"
    make(source, *versioned(1), "PRAGMA journal_mode = WAL")
    source.chmod(0o644)
    with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
        connection.execute("UPDATE vars SET intval = 2")
        (tmp_path / "1").mkdir()
        (tmp_path / "2").mkdir()
        # From the moment that they exist: a copy that fails at once leaves them as they began.
        database.copy(str(source), str(tmp_path / "1" / "copy"))
        database.copy_files(str(source), str(tmp_path / "2" / "copy"))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("?/*"))
    assert found == ["1/copy", "2/copy", "2/copy-shm", "2/copy-wal"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("?/*")} == {0o600}


# Replay


def test_replay_of_one_update_needs_no_memory_for_the_table(tmp_path: Path) -> None:
    program = f"""
import resource, sys
from wallet import database
from backend import Change
replayer = database.Replayer({str(tmp_path / "there")!r})
count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 15000)"
replayer.apply(Change(0, None, ["CREATE TABLE t (id INTEGER PRIMARY KEY, a, b)"]))
replayer.apply(Change(0, None, ["INSERT INTO t " + count + " SELECT i, 0, zeroblob(4000) FROM n"]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
replayer.apply(Change(0, None, ["UPDATE t SET a = a + 1"]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
replayer.finish()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=support.ROOT, capture_output=True, check=True
    )
    assert (tmp_path / "there").stat().st_size > 60_000_000
    assert int(done.stdout) < 10 << 10, f"{int(done.stdout) >> 10} MiB more"


def test_only_what_failed_before_it_did_anything_is_tried_again(tmp_path: Path) -> None:
    """The space that releases of 2020 left out, and an error that is none of that."""
    table = "CREATE TABLE t (id INTEGER PRIMARY KEY, peer_id, body UNIQUE)"
    replay(tmp_path / "there", [table, "INSERT INTO t VALUES (1, 1, 'x')"])
    replay(tmp_path / "there", ["UPDATE t SET peer_id=7WHERE id=1"])
    assert rows(tmp_path / "there", "SELECT peer_id FROM t") == [(7,)]
    with pytest.raises(DatabaseError, match="no such table"):
        replay(tmp_path / "there", ["UPDATE u SET peer_id=7 WHERE x='peer_id=7WHERE '"])


def test_replay_from_nothing(tmp_path: Path) -> None:
    calls = support.first_changes(20)
    replayer = Replayer(str(tmp_path / "there"))
    for version, statements in calls:
        replayer.apply(Change(version, None, statements))
    assert replayer.finish() == 20
    support.apply_calls(tmp_path / "node", calls)
    assert database.compare(str(tmp_path / "node"), str(tmp_path / "there")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node", "there"]


LATE = "CREATE TABLE late (id INTEGER PRIMARY KEY, parent INTEGER REFERENCES parents (id) {})"
DEFERRED = LATE.format("DEFERRABLE INITIALLY DEFERRED")


def one_by_one(path: Path, calls: Sequence[list[str]]) -> int | None:
    """Execute ``calls`` as a node does; the place of the first that fails."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        is_off = False
        for place, statements in enumerate(calls):
            is_pragma = statements in (OFF, ON)
            try:
                for statement in statements if is_pragma else ["BEGIN", *statements, "COMMIT"]:
                    connection.execute(statement)
            except sqlite3.Error:
                return place
            if is_off:
                connection.execute("PRAGMA foreign_keys = ON")
            is_off = statements == OFF
    return None


def grouped(path: Path, calls: Sequence[list[str]]) -> int | None:
    """The same of a replay."""
    try:
        with contextlib.closing(Replayer(str(path))) as replayer:
            for place, statements in enumerate(calls):
                replayer.apply(Change(place, None, statements))
            replayer.finish()
    except DoesNotReplay as error:
        return error.version
    return None


@pytest.mark.parametrize(
    ("calls", "fails"),
    [
        (
            [
                [DEFERRED],
                ["INSERT INTO late VALUES (1, 9)"],
                ["INSERT INTO parents VALUES (9, '')"],
            ],
            2,
        ),
        ([[DEFERRED, "INSERT INTO late VALUES (1, 9)"], ["DELETE FROM late"]], 1),
        (
            [[DEFERRED, "INSERT INTO late VALUES (1, 9)", "DELETE FROM late"], ["DROP TABLE late"]],
            None,
        ),
        ([[DEFERRED.lower()], ["INSERT INTO late VALUES (1, 9)"], ["DELETE FROM late"]], 2),
        ([[LATE.format("")], ["INSERT INTO late VALUES (1, 9)"], ["DELETE FROM late"]], 2),
        ([["DELETE FROM parents"], ["INSERT INTO parents VALUES (9, '')"], ["nonsense"]], 3),
        (
            [OFF, ["INSERT INTO children VALUES (3, 9)"], ["INSERT INTO children VALUES (4, 9)"]],
            3,
        ),
    ],
)
def test_the_first_change_that_fails_is_named(
    calls: list[list[str]], fails: int | None, tmp_path: Path
) -> None:
    """Also if the next one would have put it right before a COMMIT of both."""
    assert one_by_one(tmp_path / "node", [FAMILY, *calls]) == fails
    assert grouped(tmp_path / "there", [FAMILY, *calls]) == fails


def some_history(chance: random.Random) -> list[list[str]]:
    """Changes of three tables that point to each other; every third history or so fails."""

    def statement() -> str:
        number, parent = chance.randrange(1000), 3 if chance.random() < 0.03 else 2
        usual = [
            f"INSERT OR IGNORE INTO children VALUES ({number}, {parent})",
            f"INSERT OR REPLACE INTO parents VALUES ({parent}, 'x{number}')",
            f"UPDATE children SET parent = 2 WHERE id < {number}",
            f"DELETE FROM children WHERE id > {number}",
        ]
        rare = [
            *(DEFERRED, "DROP TABLE late", LATE.format(""), "DELETE FROM parents WHERE id = 1"),
            *(f"INSERT INTO late VALUES ({number}, {parent})", "DELETE FROM late"),
            f"ALTER TABLE children ADD x{number} INTEGER",
        ]
        return chance.choice(rare if chance.random() < 0.05 else usual)

    calls = [FAMILY]
    for _ in range(chance.randrange(5, 25)):
        change = [statement() for _ in range(chance.randrange(1, 4))]
        calls += [OFF, change, ON] if chance.random() < 0.1 else [change]
    return calls


@pytest.mark.parametrize("size", [300, 4 << 20])
def test_changes_that_share_a_transaction_do_what_each_does_alone(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replayer, "transaction_size", size)
    whole = 0
    for seed in range(40):
        calls = some_history(random.Random(seed))
        node, there = tmp_path / f"node-{seed}", tmp_path / f"there-{seed}"
        fails = one_by_one(node, calls)
        assert grouped(there, calls) == fails
        if fails is None:
            assert database.compare(str(node), str(there)) == []
            whole += 1
    assert 10 < whole < 35


def test_replay_enforces_foreign_keys_as_the_node_does(tmp_path: Path) -> None:
    path = tmp_path / "there"
    replay(path, FAMILY, ["DELETE FROM parents WHERE id = 1"])
    assert rows(path, "SELECT id FROM children") == [(20,)]
    with pytest.raises(DatabaseError, match="FOREIGN KEY"):
        replay(path, ["INSERT INTO children VALUES (30, 99)"])


def test_drop_table_cascades_unless_foreign_keys_are_off(tmp_path: Path) -> None:
    replay(tmp_path / "on", FAMILY, REBUILD)
    assert rows(tmp_path / "on", "SELECT id FROM children") == []
    replay(tmp_path / "off", FAMILY, OFF, REBUILD, ON)
    assert rows(tmp_path / "off", "SELECT id FROM children") == [(10,), (20,)]


def test_off_holds_for_exactly_one_change(tmp_path: Path) -> None:
    # The session that sent OFF ended before it sent ON: the next one began with ON.
    replay(tmp_path / "there", FAMILY, OFF, REBUILD, ["DELETE FROM parents WHERE id = 1"])
    assert rows(tmp_path / "there", "SELECT id FROM children") == [(20,)]


def test_on_ends_off_before_any_change(tmp_path: Path) -> None:
    replay(tmp_path / "there", FAMILY, OFF, ON, ["DELETE FROM parents WHERE id = 1"])
    assert rows(tmp_path / "there", "SELECT id FROM children") == [(20,)]


def test_a_pragma_inside_a_transaction_has_no_effect_there(tmp_path: Path) -> None:
    # As on the node, whose every other call is one transaction.
    calls = [*OFF, "DELETE FROM parents WHERE id = 1"]
    replay(tmp_path / "there", FAMILY, calls)
    assert rows(tmp_path / "there", "SELECT id FROM children") == [(20,)]


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["INSERT INTO nowhere VALUES (1)"], "no such table: nowhere"),
        (["INSERT INTO parents VALUES (1, 'again')"], "UNIQUE constraint failed"),
        (["SELECT 1; SELECT 2"], "one statement at a time"),
        (["SELECT 2", "COMMIT"], "it ends the transaction"),
        (["SELECT 3", "ROLLBACK"], "it ends the transaction"),
        (["SELECT 4", "SAVEPOINT x"], "it sets a savepoint"),
        (["SELECT ?"], "binding"),
    ],
)
def test_a_statement_that_fails_names_its_version(
    statements: list[str], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "there"
    replay(path, FAMILY)
    replayer = Replayer(str(path))
    with pytest.raises(DatabaseError) as caught:
        replayer.apply(Change(4711, None, ["INSERT INTO parents VALUES (3, 'x')", *statements]))
    replayer.close()
    text = str(caught.value)
    assert text.startswith(f"{path}: the change to version 4711 does not replay: ")
    assert reason in text
    assert repr(statements[-1])[1:20] in text


def test_replay_of_a_wal_database_leaves_it_one(tmp_path: Path) -> None:
    for name, mode in (("wal", "wal"), ("plain", "delete")):
        path = tmp_path / name
        make(path, f"PRAGMA journal_mode = {mode}", *versioned(1))
        assert replay(path, ["INSERT INTO vars VALUES ('x', 1)", bump(2)]) == 2
        assert rows(path, "PRAGMA journal_mode") == [(mode,)]
        assert rows(path, "SELECT count(*) FROM vars") == [(2,)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "wal"]


def test_replay_holds_every_kind_of_value(tmp_path: Path) -> None:
    text = "quotes '' -- /* \n \r \t \x01 é 😀 \ufffe"
    insert = f"INSERT INTO t VALUES (1, '{text}', x'00ff27', 9223372036854775807, -0.5, NULL)"
    replay(tmp_path / "there", ["CREATE TABLE t (a, b, c, d, e, f)", insert])
    found = rows(tmp_path / "there", "SELECT b, c, d, e, f FROM t")
    assert found == [(text.replace("''", "'"), b"\x00\xff'", 2**63 - 1, -0.5, None)]


# Checks


def test_check_of_a_sound_database(tmp_path: Path) -> None:
    assert database.check(make(tmp_path / "node", *FAMILY)) == []


def test_check_names_rows_that_point_nowhere(tmp_path: Path) -> None:
    path = make(tmp_path / "node", *FAMILY, "DELETE FROM parents WHERE id = 2")
    (problem,) = database.check(path)
    assert problem == "foreign_key_check: row 20 of children points to no row of parents"


@pytest.mark.parametrize(
    "parents", ["id INTEGER, name TEXT", "id INTEGER, name TEXT, PRIMARY KEY (id, name)"]
)
def test_check_where_foreign_key_check_itself_fails(parents: str, tmp_path: Path) -> None:
    statements = [
        f"CREATE TABLE parents ({parents})",
        FAMILY[1],
        "INSERT INTO children VALUES (1, 2)",
    ]
    path = make(tmp_path / "node", *versioned(3), *statements)
    (problem,) = database.check(path)
    assert problem.startswith("foreign_key_check: ") and "foreign key mismatch" in problem
    url = f"file://{tmp_path}/node.bkp"
    FileBackend(url).create(database.copy(path, str(tmp_path / "copy")))
    done = run_cli("restore", url, tmp_path / "restored", check=3)
    assert f"WARNING: {problem}".split(": ")[1] in done.stderr
    assert rows(tmp_path / "restored", "SELECT * FROM children") == [(1, 2)]


def test_check_limits_what_it_names(tmp_path: Path) -> None:
    path = make(tmp_path / "node", *FAMILY, "DELETE FROM parents")
    make(tmp_path / "node", *(f"INSERT INTO children VALUES ({n}, 9)" for n in range(100, 150)))
    assert len(database.check(path)) == database.MAX_REPORTED


def test_integrity_problems_of_a_broken_page(tmp_path: Path) -> None:
    path = make(tmp_path / "node", "CREATE TABLE t (x)", "CREATE INDEX i ON t (x)")
    make(tmp_path / "node", "INSERT INTO t VALUES ('in the table and in the index')")
    assert database.integrity_problems(path) == []
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"in the index")
    data[at : at + 12] = b"in XXX index"
    Path(path).write_bytes(data)
    assert database.integrity_problems(path)[0].startswith("integrity_check: ")
    data[5000:9000] = bytes(4000)
    Path(path).write_bytes(data)
    assert database.integrity_problems(path)[0].startswith("integrity_check: ")


def test_names_that_a_terminal_would_obey(tmp_path: Path) -> None:
    """Whoever forged the database chose them, and they are printed."""
    index = '"i\x1b[2J\x07"'
    path = make(tmp_path / "node", "CREATE TABLE t (x)", f"CREATE INDEX {index} ON t (x)")
    make(tmp_path / "node", "INSERT INTO t VALUES ('in the table and in the index')")
    make(tmp_path / "node", 'CREATE TABLE "c\x1b[2J" (x REFERENCES t (rowid))')
    data = bytearray(Path(path).read_bytes())
    at = data.index(b"in the index")
    data[at : at + 12] = b"in XXX index"
    Path(path).write_bytes(data)
    problems = database.check(path)
    assert len(problems) == 2 and "".join(problems).isprintable()


# Comparison: every pair below differs in one thing, which is found and named

TABLE = "CREATE TABLE t (id INTEGER PRIMARY KEY, a, b)"
INSERT = "INSERT INTO t VALUES"

PAIRS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "a row missing in the second": (
        [TABLE, f"{INSERT} (1, 'x', NULL), (2, 'y', NULL)"],
        [TABLE, f"{INSERT} (1, 'x', NULL)"],
        ["table t: the row with id = 2 is only in the first"],
    ),
    "a row missing in the first": (
        [TABLE, f"{INSERT} (3, 'x', NULL)"],
        [TABLE, f"{INSERT} (1, 'w', 0), (3, 'x', NULL)"],
        ["table t: the row with id = 1 is only in the second"],
    ),
    "one byte of a blob": (
        [TABLE, f"{INSERT} (1, x'{'00' * 100}', 2)"],
        [TABLE, f"{INSERT} (1, x'{'00' * 99}01', 2)"],
        ["table t: in the row with id = 1, a is 000"],
    ),
    "a number and its text": (
        [TABLE, f"{INSERT} (1, 5, 2)"],
        [TABLE, f"{INSERT} (1, '5', 2)"],
        ["table t: in the row with id = 1, a is 5 in the first and '5' in the second"],
    ),
    "a text and its bytes": (
        [TABLE, f"{INSERT} (1, 'A', 2)"],
        [TABLE, f"{INSERT} (1, x'41', 2)"],
        ["table t: in the row with id = 1, a is 'A' in the first and 41 in the second"],
    ),
    "NULL and 0": (
        [TABLE, f"{INSERT} (1, 'A', NULL)"],
        [TABLE, f"{INSERT} (1, 'A', 0)"],
        ["table t: in the row with id = 1, b is None in the first and 0 in the second"],
    ),
    "an integer and a real": (
        ["CREATE TABLE t (id INTEGER PRIMARY KEY, a BLOB)", f"{INSERT} (1, 1)"],
        ["CREATE TABLE t (id INTEGER PRIMARY KEY, a BLOB)", f"{INSERT} (1, 1.0)"],
        ["table t: in the row with id = 1, a is 1 in the first and 1.0 in the second"],
    ),
    "large integers that are equal as reals": (
        [TABLE, f"{INSERT} (1, 9007199254740993, 0)"],
        [TABLE, f"{INSERT} (1, 9007199254740992, 0)"],
        ["table t: in the row with id = 1, a is 9007199254740993 in the first"],
    ),
    "a table only in the first": (
        [TABLE, "CREATE TABLE u (x)"],
        [TABLE],
        ["table u is only in the first"],
    ),
    "an index only in the second": (
        [TABLE],
        [TABLE, "CREATE INDEX i ON t (a)"],
        ["index i is only in the second"],
    ),
    "another definition": (
        [TABLE],
        [TABLE.replace("b)", "b NOT NULL)")],
        ["table t has another definition"],
    ),
    "a column more": (
        [TABLE, f"{INSERT} (1, 2, 3)"],
        ["CREATE TABLE t (id INTEGER PRIMARY KEY, a, b, c)", f"{INSERT} (1, 2, 3, 4)"],
        ["table t has another definition"],
    ),
    "one duplicate fewer": (
        ["CREATE TABLE t (a, b)", f"{INSERT} (1, 2), (1, 2), (1, 2)"],
        ["CREATE TABLE t (a, b)", f"{INSERT} (1, 2), (1, 2)"],
        ["table t: the row with a = 1, b = 2 is only in the first"],
    ),
    "without a key": (
        ["CREATE TABLE t (a, b)", f"{INSERT} (NULL, x'02'), ('z', 2)"],
        ["CREATE TABLE t (a, b)", f"{INSERT} (NULL, x'03'), ('z', 2)"],
        ["the row with a = None, b = 02 is only in the", "a = None, b = 03 is only in the second"],
    ),
    "NULL in a key": (
        ["CREATE TABLE t (k TEXT PRIMARY KEY, a)", f"{INSERT} (NULL, 1), (NULL, 2), ('x', 3)"],
        ["CREATE TABLE t (k TEXT PRIMARY KEY, a)", f"{INSERT} (NULL, 1), (NULL, 4), ('x', 3)"],
        ["table t: in the row with k = None, a is 2 in the first and 4 in the second"],
    ),
    "WITHOUT ROWID": (
        [
            "CREATE TABLE t (a, b, c, PRIMARY KEY (b, a)) WITHOUT ROWID",
            f"{INSERT} (1, 2, 'x'), (2, 1, 'y')",
        ],
        [
            "CREATE TABLE t (a, b, c, PRIMARY KEY (b, a)) WITHOUT ROWID",
            f"{INSERT} (1, 2, 'x'), (2, 1, 'z')",
        ],
        ["table t: in the row with b = 1, a = 2, c is 'y' in the first and 'z' in the second"],
    ),
    "a trigger": (
        [TABLE, "CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END"],
        [TABLE, "CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 2; END"],
        ["trigger g has another definition"],
    ),
    "AUTOINCREMENT's counter": (
        [
            "CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT)",
            f"{INSERT} (1), (9)",
            "DELETE FROM t WHERE id = 9",
        ],
        ["CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT)", f"{INSERT} (1)"],
        ["table sqlite_sequence"],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_compare(name: str, tmp_path: Path) -> None:
    left, right, expected = PAIRS[name]
    first, second = make(tmp_path / "1", *left), make(tmp_path / "2", *right)
    found = database.compare(first, second)
    for text in expected:
        assert any(text in line for line in found), found
    assert len(found) <= 2, found
    assert len(database.compare(second, first)) == len(found)
    assert database.compare(first, first) == database.compare(second, second) == []


@pytest.mark.parametrize("name", PAIRS)
def test_compare_does_not_care_for_the_order_of_insertion(name: str, tmp_path: Path) -> None:
    statements = PAIRS[name][0]
    first = make(tmp_path / "1", *statements)
    second = make(tmp_path / "2", *(s for s in statements if s.startswith("CREATE")))
    tables = [
        table for (table,) in rows(first, "SELECT name FROM sqlite_master WHERE type='table'")
    ]
    with contextlib.closing(sqlite3.connect(second, isolation_level=None)) as connection:
        connection.execute("ATTACH ? AS other", (first,))
        for table in map(str, tables):
            if not table.startswith("sqlite_"):
                order = "rowid DESC" if "WITHOUT" not in statements[0] else "a DESC"
                connection.execute(
                    f"INSERT INTO {table} SELECT * FROM other.{table} ORDER BY {order}"
                )
        if "sqlite_sequence" in tables:
            connection.execute("UPDATE sqlite_sequence SET seq = 9")
    # Where no column holds it, the rowid tells the order: lightningd uses it for `forwards`.
    numbered = [f"table t: {database.OTHER_ROWIDS}"]
    implicit = name in ("without a key", "NULL in a key")
    assert database.compare(first, second) == (numbered if implicit else [])


def test_compare_sorts_as_sqlite_does(tmp_path: Path) -> None:
    values = [
        *("NULL", "-1", "0", "0.5", "1", "9007199254740992", "9007199254740993", "1e300"),
        *("''", "'A'", "'B'", "'a'", "'é'", "'\uffff'", "'😀'", "x''", "x'00'", "x'ff'"),
    ]
    table = "CREATE TABLE t (k PRIMARY KEY, a)"
    inserts = [f"INSERT INTO t VALUES ({value}, {n})" for n, value in enumerate(values)]
    whole = make(tmp_path / "whole", table, *inserts)
    for missing in range(len(values)):
        path = tmp_path / f"without-{missing}"
        part = make(path, table, *(s for n, s in enumerate(inserts) if n != missing))
        for pair in ((whole, part), (part, whole)):
            assert len(database.compare(*pair)) == 1, values[missing]


def test_compare_with_a_collation_of_the_column(tmp_path: Path) -> None:
    table = "CREATE TABLE t (k TEXT PRIMARY KEY COLLATE NOCASE, a)"
    keys = ["b", "A", "c", "B2", "_", "Z", "a2"]
    inserts = [f"INSERT INTO t VALUES ('{key}', 1)" for key in keys]
    whole = make(tmp_path / "whole", table, *inserts)
    again = make(tmp_path / "again", table, *reversed(inserts))
    assert database.compare(whole, again) == [f"table t: {database.OTHER_ROWIDS}"]
    part = make(tmp_path / "part", table, *inserts[1:])
    assert len(database.compare(whole, part)) == 1


@pytest.mark.parametrize("columns", ["a, b", "a PRIMARY KEY, b", "rowid, oid", "a, b, UNIQUE (a)"])
@pytest.mark.parametrize("by", ["VACUUM", "UPDATE t SET _rowid_ = 9 WHERE _rowid_ = 3"])
def test_compare_finds_other_rowids(columns: str, by: str, tmp_path: Path) -> None:
    """lightningd names rows of `forwards` by them, and VACUUM on the node may change them."""
    setup = [f"CREATE TABLE t ({columns})", "INSERT INTO t VALUES ('x', 1), ('y', 2), ('z', 3)"]
    first, second = (
        make(tmp_path / name, *setup, "DELETE FROM t WHERE _rowid_ = 2") for name in "12"
    )
    assert database.compare(first, second) == []
    make(tmp_path / "2", by)
    before, after = (rows(path, "SELECT _rowid_ FROM t") for path in (first, second))
    assert before != after or by == "VACUUM"
    found = [f"table t: {database.OTHER_ROWIDS}"] if before != after else []
    assert database.compare(first, second) == found


def test_compare_sorts_beside_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has to sort at all: /var/tmp may be small."""
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)"
    insert = f"INSERT INTO t {count} SELECT hex(randomblob(2000)), i FROM n"
    (tmp_path / "there").mkdir()
    paths = (tmp_path / "there" / "1", tmp_path / "2")
    first, second = (make(path, "CREATE TABLE t (a, b)", insert) for path in paths)
    seen: set[str] = set()

    def look(_: object) -> str:
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # The one that lists the directory.
                seen.add(os.readlink(link))
        return ""

    monkeypatch.setattr(database, "_short", look)
    database.compare(first, second)
    assert {os.path.dirname(path) for path in seen if "etilqs" in path} == {f"{tmp_path}/there"}


def test_compare_without_a_name_for_the_rowid(tmp_path: Path) -> None:
    table = "CREATE TABLE t (rowid, _rowid_, oid)"
    first = make(tmp_path / "1", table, "INSERT INTO t VALUES (1, 2, 3), (4, 5, 6)")
    second = make(tmp_path / "2", table, "INSERT INTO t VALUES (4, 5, 6), (1, 2, 3)")
    assert database.compare(first, second) == []


@pytest.mark.parametrize(
    "columns",
    [
        "(id INTEGER PRIMARY KEY, a)",
        "(id INTEGER PRIMARY KEY DESC, a)",
        "(id TEXT PRIMARY KEY, a)",
        "(id, a)",
        "(id TEXT PRIMARY KEY, a) WITHOUT ROWID",
        "(id, a, PRIMARY KEY (a, id)) WITHOUT ROWID",
        "(id TEXT COLLATE NOCASE PRIMARY KEY, a) WITHOUT ROWID",
        "(id INTEGER PRIMARY KEY AUTOINCREMENT, a)",
    ],
)
def test_compare_needs_no_sorting(columns: str, tmp_path: Path) -> None:
    path = make(tmp_path / "1", f"CREATE TABLE t {columns}", "INSERT INTO t VALUES (1, 2), (3, 1)")
    with database.opened(path) as connection:
        query = database.rows_as_stored(connection, "t")
        plan = connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
    assert plan and not [step for step in plan if "TEMP B-TREE" in step[3]]


def test_compare_names_a_limited_number(tmp_path: Path) -> None:
    inserts = [f"{INSERT} ({n}, 1, 2)" for n in range(100)]
    first, second = make(tmp_path / "1", TABLE, *inserts), make(tmp_path / "2", TABLE)
    assert 0 < len(database.compare(first, second)) <= 2 * database.MAX_REPORTED


def test_compare_with_odd_names(tmp_path: Path) -> None:
    table = 'CREATE TABLE "my ""odd"" table" ("a b" PRIMARY KEY, "select")'
    first = make(tmp_path / "1", table, 'INSERT INTO "my ""odd"" table" VALUES (1, 2)')
    second = make(tmp_path / "2", table)
    (difference,) = database.compare(first, second)
    assert "a b = 1 is only in the first" in difference
    assert database.compare(first, first) == []


def test_compare_of_text_that_is_not_utf8(tmp_path: Path) -> None:
    for name, byte in (("1", "80"), ("2", "80"), ("3", "81")):
        make(tmp_path / name, TABLE, f"{INSERT} (1, CAST(x'41{byte}' AS TEXT), 0)")
    assert database.compare(str(tmp_path / "1"), str(tmp_path / "2")) == []
    assert len(database.compare(str(tmp_path / "1"), str(tmp_path / "3"))) == 1


def test_compare_leaves_both_as_they_are(tmp_path: Path) -> None:
    first, second = make(tmp_path / "1", *FAMILY), make(tmp_path / "2", TABLE)
    before = support.contents(tmp_path)
    database.compare(first, second)
    assert support.contents(tmp_path) == before
