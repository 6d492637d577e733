"""What came out of a backup is kept to its own file: statements, schemas, pages, and the time."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import Change, Snapshot, bump
from errors import BackupError, DatabaseError, DoesNotReplay
from filebackend import FileBackend
from socketbackend import SocketBackend
from tests import support
from tests.peers import ServerProcess
from tests.support import CLI, change, contents, first_changes, make_backup, run_cli
from wallet import confined, database, live

FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
ENDLESS = f"INSERT INTO items (body) {FOREVER}SELECT 'x' FROM n WHERE i < 0"


def refused(path: Path, *statements: str) -> str:
    """Replay ``statements`` onto a small database; why the change is refused."""
    replayer = database.Replayer(str(path))
    try:
        for version, setup in first_changes(3):
            replayer.apply(Change(version, None, setup))
        with pytest.raises(DoesNotReplay) as caught:
            replayer.apply(Change(4, None, statements))
    finally:
        replayer.close()
    text = str(caught.value)
    assert "the change to version 4 does not replay: " in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("ATTACH '{victim}' AS v", "attaches another file"),
        ("ATTACH '{victim}' || '' AS v", "attaches another file"),
        ("ATTACH 'file:{victim}?mode=rwc' AS v", "attaches another file"),
        ("ATTACH '' AS v", "attaches another file"),
        ("DETACH main", "detaches a file"),
        ("VACUUM INTO '{victim}'", "VACUUM"),
        ("SELECT load_extension('{victim}')", "calls load_extension"),
        ("INSERT INTO items (body) SELECT LOAD_EXTENSION('{victim}')", "calls load_extension"),
        ("SELECT fts3_tokenizer('simple', x'00')", "fts3_tokenizer"),
        ("CREATE VIRTUAL TABLE v USING fts4(x)", "makes a virtual table"),
        ("CREATE VIEW v AS SELECT 1", "makes a view"),
        ("CREATE TEMP TABLE v (x)", "makes a temporary table"),
        ("CREATE TEMP VIEW v AS SELECT 1", "makes a temporary view"),
        ("CREATE TABLE temp.v (x)", "makes a temporary table"),
        ("SAVEPOINT v", "sets a savepoint"),
        ("PRAGMA journal_mode = WAL", "PRAGMA journal_mode"),
        ("PRAGMA writable_schema = ON", "PRAGMA writable_schema"),
        ("PRAGMA temp_store_directory = '{victim}'", "PRAGMA temp_store_directory"),
        ("PRAGMA main.user_version = 5", "PRAGMA user_version"),
        ("INSERT INTO items (body) SELECT file FROM pragma_database_list", "database_list"),
        ("INSERT INTO items (body) VALUES (zeroblob(999999999))", "too big"),
        ("INSERT INTO items (body) VALUES (1); ATTACH '{victim}' AS v", "one statement at a time"),
        ("DELETE FROM items;/**/COMMIT", "one statement at a time"),
    ],
)
def test_statement(statement: str, reason: str, tmp_path: Path) -> None:
    """Refused and named by version and statement, with no file made and none touched."""
    statement = statement.format(victim=tmp_path / "victim")
    there = tmp_path / "there"
    for statements in [["SELECT 1", statement, bump(4)], ["COMMIT", statement, bump(4)]]:
        text = refused(there, *statements)
        assert (reason if statements[0] != "COMMIT" else "ends the transaction") in text
        assert repr(statements[-2])[1:30] in text or statements[0] == "COMMIT"
        assert [*tmp_path.iterdir()] == [there]
        there.unlink()


@pytest.mark.parametrize(
    "statements",
    [
        ["PRAGMA journal_mode = WAL"],
        ["PRAGMA foreign_keys = 0"],
        ["PRAGMA foreign_keys = OFF;", "PRAGMA writable_schema = ON;"],
        ["PRAGMA foreign_keys(OFF)"],
    ],
)
def test_pragma_call(statements: list[str], tmp_path: Path) -> None:
    """Outside of transactions, only the two that lightningd announces."""
    assert "no PRAGMA that lightningd announces" in refused(tmp_path / "there", *statements)


@pytest.mark.parametrize("statement", ["ATTACH '{victim}' AS v", "VACUUM INTO '{victim}'"])
def test_outside_of_a_transaction(statement: str, tmp_path: Path) -> None:
    """The authorizer alone holds; VACUUM INTO attaches what it writes."""
    there = snapshot_of(tmp_path / "there", ["CREATE TABLE t (x)"]).path
    with pytest.raises(DatabaseError, match="attaches another file"), database.opened(there) as c:
        c.execute(statement.format(victim=tmp_path / "victim"))
    assert contents(tmp_path).keys() == {"there"}


def test_a_trigger_is_held_to_it_too(tmp_path: Path) -> None:
    text = refused(
        tmp_path / "there",
        "CREATE TRIGGER g AFTER INSERT ON items BEGIN"
        f" INSERT INTO vars SELECT load_extension('{tmp_path}/x'), 1; END",
        "INSERT INTO items (body) VALUES ('x')",
    )
    assert "calls load_extension" in text or "unsafe use of load_extension" in text


@pytest.mark.parametrize(
    "statements",
    [
        [ENDLESS],
        [f"SELECT (SELECT 1 FROM ({FOREVER}SELECT i FROM n) WHERE i < 0)"],
        [
            "CREATE TRIGGER g AFTER INSERT ON items BEGIN INSERT INTO vars"
            " WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n)"
            " SELECT 'x', i FROM n WHERE i < 0; END",
            "INSERT INTO items (body) VALUES ('x')",
        ],
    ],
)
def test_endless(statements: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "LIMIT_S", 0.1)
    text = refused(tmp_path / "there", *statements)
    assert "it takes more than 0.1 seconds of processor time" in text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="sqlite3 cannot set limits")
def test_a_program_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "_LIMITS", {5: 500})
    statement = f"INSERT INTO items (body) VALUES {','.join(['(1)'] * 1000)}"
    assert "does not replay: no memory, in 'INSERT" in refused(tmp_path / "there", statement)


def test_the_time_is_each_change_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "LIMIT_S", 0.3)
    count = FOREVER + "SELECT 1 FROM n WHERE i > 50000 LIMIT 1"
    replayer = database.Replayer(str(tmp_path / "there"))
    began = time.thread_time()
    while time.thread_time() < began + 0.5:
        replayer.apply(Change(0, None, [count]))
    replayer.close()


# Snapshots

VIEW = f"CREATE VIEW vars AS {FOREVER}SELECT 'x' AS name, i AS intval FROM n"
SCHEMAS = {
    "vars is an endless view": ([VIEW], "its vars is no table"),
    "vars says that it is a table": (
        [VIEW, "PRAGMA writable_schema = ON", "UPDATE sqlite_master SET type = 'table'"],
        "vars",  # Recent releases of SQLite say it themselves.
    ),
    "a virtual table": (
        ["CREATE TABLE vars (name, intval)", "CREATE VIRTUAL TABLE v USING fts4(x)"],
        "its table v is 'CREATE VIRTUAL TABLE v",
    ),
    "vars is a virtual table": (["CREATE VIRTUAL TABLE vars USING fts4(x)"], "VIRTUAL TABLE"),
    "a text for a version": (
        ["CREATE TABLE vars (name, intval)", "INSERT INTO vars VALUES ('data_version', 'x')"],
        "its data_version is 'x', which is none",
    ),
    "a version too large": (
        ["CREATE TABLE vars (name, intval)", f"INSERT INTO vars VALUES ('data_version', {2**32})"],
        "its data_version is 4294967296, which is none",
    ),
    "vars computes what it holds": (
        [
            "CREATE TABLE vars (intval)",
            "INSERT INTO vars VALUES (3)",
            "ALTER TABLE vars ADD name AS (instr(zeroblob(9e8), zeroblob(4e8) || x'01'))",
        ],
        "",
    ),
    "a schema that is none": (
        [
            "CREATE TABLE vars (name, intval)",
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = 'CREATE TABLE vars (('",
        ],
        "malformed database schema",
    ),
}


def snapshot_of(path: Path, statements: list[str]) -> Snapshot:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    return Snapshot(str(path), 3)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str, tmp_path: Path) -> None:
    statements, reason = SCHEMAS[name]
    snapshot = snapshot_of(tmp_path / "snapshot", statements)
    if reason:
        with pytest.raises(DatabaseError) as caught:
            database.version_of(snapshot.path)
        assert reason in str(caught.value)
    else:
        assert database.version_of(snapshot.path) == 0
        reason = "its data_version is 0, but the backup's is 3"
    url = f"file://{tmp_path}/node.bkp"
    FileBackend(url).create(snapshot)
    for arguments in (["verify", url], ["restore", url, tmp_path / "restored.sqlite3"]):
        assert reason in run_cli(*arguments, check=1).stderr
    assert not (tmp_path / "restored.sqlite3").exists()


def test_schema_that_arrives_at_a_server(tmp_path: Path) -> None:
    """Refused at once, and the next one is served."""
    url = f"file://{tmp_path}/node.bkp"
    make_backup(url, first_changes(2))
    with ServerProcess(url) as server:
        for name, (statements, _) in SCHEMAS.items():
            snapshot = snapshot_of(tmp_path / name, statements)
            with pytest.raises(BackupError):
                SocketBackend(server.url).replace(snapshot)
        assert SocketBackend(server.url).status().version == 2


def test_vars_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "READ_LIMIT_S", 0.0)
    statements = [
        "CREATE TABLE vars (name, intval)",
        f"INSERT INTO vars {FOREVER}SELECT i, i FROM n LIMIT 20000",
    ]
    snapshot = snapshot_of(tmp_path / "snapshot", statements)
    with pytest.raises(DatabaseError, match="takes more than 0 seconds"):
        database.version_of(snapshot.path)


# The commands

ATTACKS = [
    "ATTACH '{victim}' AS v",
    "CREATE TABLE v.t (x)",
    "INSERT INTO v.t VALUES (char(10) || 'ssh-ed25519 AAAA' || char(10))",
    bump(5),
]


@pytest.mark.parametrize("command", ["verify", "restore", "compact"])
def test_command(command: str, tmp_path: Path) -> None:
    victim = tmp_path / "authorized_keys"
    (tmp_path / "backup").mkdir()
    url = f"file://{tmp_path}/backup/node.bkp"
    attack = [statement.format(victim=victim) for statement in ATTACKS]
    make_backup(url, [*first_changes(4), (5, attack), change(6, "SELECT 1"), change(7, "SELECT 1")])
    before = contents(tmp_path)
    dest = [tmp_path / "restored.sqlite3"] if command == "restore" else []
    done = run_cli(command, url, *dest, check=1)
    assert "the change to version 5 does not replay: it attaches another file" in done.stderr
    assert "in \"ATTACH '" in done.stderr
    assert "restore --up-to 4 " in done.stderr
    (tmp_path / "backup/node.bkp.proof").unlink(missing_ok=True)  # What a compaction found.
    assert contents(tmp_path) == before


@contextlib.contextmanager
def busy(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """backup-cli, in the middle of a statement that does not end."""
    process = subprocess.Popen(
        [sys.executable, str(CLI), *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


INSTR = "SELECT instr(zeroblob(250000000), zeroblob(100000000) || x'01')"
"""A single step of SQLite that takes days."""


# What changes rows alone, and is spared the authorizer

REACHING_OUT = [
    *("load_extension('{victim}')", "Load_Extension('{victim}', 'x')", '"load_extension"(1)'),
    *("fts3_tokenizer('simple')", "FTS3_TOKENIZER('simple', x'0011223344556677')"),
]
ROWS = [
    "INSERT INTO items (body) VALUES ({})",
    "UPDATE items SET body = {}",
    "DELETE FROM items WHERE {}",
    "INSERT INTO items (body) VALUES ('x') RETURNING {}",
    "INSERT INTO items (id) SELECT id FROM items WHERE true ON CONFLICT DO UPDATE SET body = {}",
    "INSERT INTO items (body) WITH w AS (SELECT {} AS x) SELECT x FROM w",
]


@pytest.mark.parametrize("call", REACHING_OUT)
def test_function_that_reaches_out(call: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    call = call.format(victim=tmp_path / "victim")
    for statement in ROWS:
        text = refused(there, statement.format(call), bump(4)).lower()
        name = call.partition("(")[0].strip('"').lower()
        assert (
            f"it calls {name}, which is never part" in text or f"no such function: {name}" in text
        )
        assert [*tmp_path.iterdir()] == [there]
        there.unlink()


@pytest.mark.parametrize("call", REACHING_OUT)
@pytest.mark.parametrize(
    "schema",
    [
        "CREATE TRIGGER g AFTER INSERT ON items BEGIN UPDATE vars SET intval = {}; END",
        "CREATE TRIGGER g AFTER INSERT ON items WHEN {} BEGIN SELECT 1; END",
        "CREATE TABLE checked (id INTEGER PRIMARY KEY, body CHECK ({}))",
        "CREATE TABLE checked (id INTEGER PRIMARY KEY, body, more DEFAULT ({}))",
    ],
)
def test_schema_that_reaches_out(call: str, schema: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    schema = schema.format(call.format(victim=tmp_path / "victim"))
    table = "checked" if "checked" in schema else "items"
    tables = [
        "CREATE TABLE vars (name, intval)",
        "CREATE TABLE items (id INTEGER PRIMARY KEY, body)",
    ]
    try:
        snapshot_of(there, [*tables, schema])
    except sqlite3.OperationalError:  # Recent releases of SQLite do not even create it.
        return
    with (
        contextlib.closing(database.Replayer(str(there))) as replayer,
        pytest.raises(DoesNotReplay, match=r"calls|unsafe use of|no such function"),
    ):
        replayer.apply(Change(4, None, [f"INSERT INTO {table} (body) VALUES ('x')"]))
    assert [*tmp_path.iterdir()] == [there]


PRAGMA_ROWS = "INSERT INTO items (body) SELECT file FROM pragma_database_list"


def test_prepared_without_the_authorizer_is_not_executed_with_it(tmp_path: Path) -> None:
    with contextlib.closing(database.Replayer(str(tmp_path / "there"))) as replayer:
        for version, statements in first_changes(3):
            replayer.apply(Change(version, None, statements))
        with contextlib.suppress(DoesNotReplay):  # Where it is not spared at all.
            replayer.apply(Change(4, None, [PRAGMA_ROWS]))
        with pytest.raises(DoesNotReplay, match="PRAGMA database_list"):
            replayer.apply(Change(5, None, ["SELECT 1", PRAGMA_ROWS]))


def test_modules_that_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they prepare is looked at by the authorizer alone."""
    monkeypatch.setattr(confined, "_PLAIN_MODULES", frozenset())
    assert "PRAGMA database_list" in refused(tmp_path / "there", PRAGMA_ROWS, bump(4))


def settings(path: str, *statements: str) -> dict[str, list[object]]:
    """What all PRAGMAs say after ``statements``, of which each may be refused."""
    with contextlib.closing(confined.connect(path, "rw")) as connection:
        connection.expect(rows_only=True)
        for statement in statements:
            with contextlib.suppress(sqlite3.Error):
                connection.execute(statement)
        connection.refused = ""
        connection.expect(rows_only=False)
        connection.release()
        names = {str(name) for (name,) in connection.execute("PRAGMA pragma_list")}
        # Lists of what is in use: TEMP is there as soon as anything asks for it.
        names -= {"data_version", "database_list", "module_list"}
        return {name: connection.execute(f"PRAGMA {name}").fetchall() for name in sorted(names)}


def test_pragmas_as_tables_only_read(tmp_path: Path) -> None:
    path = snapshot_of(tmp_path / "there", ["CREATE TABLE items (id, body)"]).path
    before = settings(path)
    assert len(before) > 30
    values = ["", "(0)", "(1)", "(5)", "('ON')", "('OFF')", "('WAL')", f"('{tmp_path}')"]
    attempts = [
        f"INSERT INTO items SELECT 1, count(*) FROM pragma_{name}{value}"
        for name in before
        for value in values
    ]
    pages = "page_count", "freelist_count", "integrity_check"
    after = settings(path, *attempts)
    assert {**after, **{name: before[name] for name in pages}} == before
    assert [*tmp_path.iterdir()] == [tmp_path / "there"]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT OR ROLLBACK INTO items (id) VALUES (1)",
        "INSERT INTO items (id) VALUES (1)",
        "UPDATE vars SET intval = 9 WHERE name = 'data_version'",
    ],
)
@pytest.mark.parametrize("kind", [database.Replayer, live.LiveDatabase])
def test_rows_that_end_the_transaction(
    kind: type[database.Replayer], statement: str, tmp_path: Path
) -> None:
    """With an error each: nothing looks behind every statement whether one is open."""
    there = tmp_path / "there"
    snapshot_of(
        there,
        [
            "CREATE TABLE vars (name, intval)",
            "INSERT INTO vars VALUES ('data_version', 3)",
            "CREATE TABLE items (id UNIQUE ON CONFLICT ROLLBACK)",
            "INSERT INTO items VALUES (1)",
            "CREATE TRIGGER g AFTER UPDATE ON vars WHEN new.intval = 9"
            " BEGIN SELECT RAISE(ROLLBACK, 'rolled back'); END",
        ],
    )
    with contextlib.closing(kind(str(there))) as replayer:
        replayer.apply(Change(4, None, ["INSERT INTO items VALUES (2)", bump(4)]))
        with pytest.raises(DoesNotReplay, match=r"version 5 .*(UNIQUE|rolled back)"):
            replayer.apply(Change(5, None, [statement, "INSERT INTO items VALUES (3)", bump(5)]))
        if isinstance(replayer, live.LiveDatabase):  # The other has no journal.
            assert replayer.version == replayer.committed == replayer.stored_version() == 4


@pytest.mark.parametrize(
    ("command", "statement"), [("verify", ENDLESS), ("restore", ENDLESS), ("restore", INSTR)]
)
def test_ctrl_c_in_an_endless_statement(command: str, statement: str, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    (tmp_path / "there").mkdir()
    url = f"file://{tmp_path}/backup/node.bkp"
    grow = "INSERT INTO items (body) VALUES (zeroblob(100000))"
    make_backup(url, [*first_changes(3), change(4, grow, statement)])
    before = contents(tmp_path)
    options = ["--scratch", tmp_path / "there"] if command == "verify" else []
    dest = [tmp_path / "there"] if command == "restore" else []
    with busy(command, *options, url, *dest) as process:
        deadline = time.monotonic() + support.ANSWER_S
        cpu = Path(f"/proc/{process.pid}/stat")
        while not [*(tmp_path / "there").iterdir()] or int(cpu.read_text().split()[13]) < 100:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=support.ANSWER_S)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.strip() == "Stopped by SIGINT."
    assert contents(tmp_path) == before


def test_what_sqlite_says_need_not_be_text(tmp_path: Path) -> None:
    """It quotes a damaged schema as it is, and Python could not decode that."""
    path = tmp_path / "damaged.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE items (id)")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET name = CAST(x'ff' AS TEXT), sql = 'CREATE x'")
        connection.commit()
    with pytest.raises(DatabaseError, match=r"SQLite says: (malformed database schema|something)"):
        confined.connect(str(path), "ro")
    assert database.integrity_problems(str(path))[0].startswith("integrity_check: ")
