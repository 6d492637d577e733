"""verify: the proof that a backup restores, and that it is the node's database."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from backend import Snapshot
from commands import main
from filebackend import FileBackend
from filelog import reader as logreader
from tests import peers, support
from tests.layout1_files import written
from tests.peers import ACK, OldServer, ServerProcess
from tests.support import (
    CLI,
    Call,
    add_session,
    apply_calls,
    change,
    contents,
    first_changes,
    make_backup,
    run_cli,
)
from wallet import database

CALLS = [
    *first_changes(4),
    change(
        5,
        "CREATE TABLE keys (id INTEGER PRIMARY KEY, item REFERENCES items(id), secret BLOB)",
        "INSERT INTO keys VALUES (1, 2, x'000102030405'), (2, 3, NULL)",
    ),
]
SOUND = "The backup is sound at version 5: every record checks and it replays.\n"


@pytest.fixture
def verify() -> Callable[..., Result]:
    """Run ``backup-cli verify`` in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["verify", *map(str, arguments)])

    return run


@pytest.fixture
def backup(url: str) -> Path:
    """A backup of CALLS; its file."""
    return make_backup(url, CALLS)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The database of the node that it is of."""
    path = tmp_path / "node" / "lightningd.sqlite3"
    path.parent.mkdir()
    apply_calls(path, CALLS)
    return path


@pytest.fixture(params=["file", "socket"])
def served(request: pytest.FixtureRequest, url: str, backup: Path) -> Iterator[str]:
    """The URL of that backup, in a file, or on a server that runs."""
    if request.param == "file":
        yield url
        return
    with ServerProcess(url) as server:
        yield server.url


def execute(path: Path, *statements: str) -> None:
    """Change the database ``path``."""
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def failed(result: Result, *texts: str) -> str:
    """It found something: exit code 1 and one line with ``texts``, and nothing is left behind."""
    assert result.exit_code == 1, result.output
    assert "sound at version" not in result.stdout
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr
    return str(result.stderr)


# Sound


def test_sound(served: str, node: Path, tmp_path: Path) -> None:
    """As a process, its exit code and what it leaves: nothing."""
    before = contents(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = run_cli("verify", served, cwd=scratch)
    assert done.stdout == SOUND
    assert done.stderr == ""
    done = run_cli("verify", served, "--against", node, cwd=scratch)
    assert done.stdout == SOUND + f"It is the same as {node}.\n"
    done = run_cli("verify", served, "--against", node, "--scratch", scratch)
    assert done.stdout == SOUND + f"It is the same as {node}.\n"
    assert list(scratch.iterdir()) == []
    scratch.rmdir()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("then", [0, 1, 3])
def test_sound_with_a_snapshot(
    then: int, url: str, verify: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "snapshot"
    apply_calls(path, CALLS)
    FileBackend(url).create(Snapshot(str(path), 5))
    calls = [change(6 + i, f"INSERT INTO items VALUES ({60 + i}, '')") for i in range(then)]
    add_session(url, calls)
    apply_calls(path, calls)
    assert verify(url, "--against", path).exit_code == 0


def test_sound_layout_1(url: str, verify: Callable[..., Result], node: Path) -> None:
    path = Path(url.removeprefix("file://"))
    written(path, [*CALLS[:4], change(5, "SELECT 'never'")], CALLS[4:])
    before = contents(path.parent)
    result = verify(url, "--against", node)
    assert (result.exit_code, result.stdout) == (0, SOUND + f"It is the same as {node}.\n")
    assert contents(path.parent) == before


def test_after_a_rewind(url: str, backup: Path, node: Path, verify: Callable[..., Result]) -> None:
    """The change taken back is not in the result."""
    add_session(url, [change(6, "DELETE FROM keys")])
    assert "the backup is at version 6" in failed(verify(url, "--against", node))
    add_session(url, [change(6, "INSERT INTO items VALUES (6, '')")])
    apply_calls(node, [change(6, "INSERT INTO items VALUES (6, '')")])
    assert verify(url, "--against", node).exit_code == 0


def test_beside_a_writer(url: str, backup: Path, node: Path, verify: Callable[..., Result]) -> None:
    """It takes no lock, and no lock stops it."""
    writer = FileBackend(url)
    writer.open()
    assert verify(url, "--against", node).exit_code == 0
    writer.close()


def test_torn_tail(url: str, backup: Path, node: Path, verify: Callable[..., Result]) -> None:
    """Never acknowledged, so nothing is missing; but it is said."""
    last = support.records_of(backup)[-1][0]
    with backup.open("r+b") as file:
        record = file.read()[last.offset : last.end]
        file.seek(last.end)
        file.write(record[:40])
        file.truncate()
        file.truncate(last.end + 1000)
    result = verify(url, "--against", node)
    assert result.exit_code == 0
    assert "never acknowledged stands at the end" in result.stdout


def test_a_server_with_connections(url: str, backup: Path, node: Path) -> None:
    """It does not disturb the node that writes there."""
    with ServerProcess(url) as server, server.client() as client:
        assert client.change(*change(6, "INSERT INTO items VALUES (6, '')")) == (ACK, 6)
        apply_calls(node, [change(6, "INSERT INTO items VALUES (6, '')")])
        run_cli("verify", server.url, "--against", node, cwd=node.parent)
        assert client.change(*change(7, "SELECT 1")) == (ACK, 7)


@pytest.mark.parametrize("counts", [False, True])
def test_an_old_server_with_rewinds(
    counts: bool, node: Path, verify: Callable[..., Result]
) -> None:
    """It streams what was taken back, too, followed by what came in its place."""
    server = OldServer(counts)
    with peers.OldClient("127.0.0.1", server.port) as client:
        for call in [*CALLS[:4], change(5, "DELETE FROM vars")]:
            assert client.change(*call)[0] == ACK
        assert client.rewind(4)[0] == ACK
        assert client.change(*CALLS[4])[0] == ACK
    result = verify(server.url, "--against", node, "--scratch", node.parent)
    assert result.exit_code == 0, result.output
    with peers.OldClient("127.0.0.1", server.port) as client:
        assert client.change(*change(7, "SELECT 'a gap'"))[0] == ACK
    result = verify(server.url, "--against", node, "--scratch", node.parent)
    failed(result, "A change to version 7 follows version 5")
    server.kill()


# Against another database


DIFFERENT: dict[str, tuple[list[str], str]] = {
    "a row missing": (
        ["DELETE FROM items WHERE id = 3"],
        "table items: the row with id = 3 is only in the backup",
    ),
    "a row more": (
        ["INSERT INTO items VALUES (9, '')"],
        "table items: the row with id = 9 is only in the database",
    ),
    "one byte of a blob": (
        ["UPDATE keys SET secret = x'000102030407' WHERE id = 1"],
        "table keys: in the row with id = 1, secret is 000102030405 in the backup and"
        " 000102030407 in the database",
    ),
    "the type alone": (
        ["UPDATE items SET body = CAST(body AS BLOB) WHERE id = 2"],
        "table items: in the row with id = 2, body is 'item 2' in the backup",
    ),
    "NULL": (
        ["UPDATE keys SET secret = x'' WHERE id = 2"],
        "table keys: in the row with id = 2, secret is None in the backup",
    ),
    "a table missing": (["DROP TABLE keys"], "table keys is only in the backup"),
    "a table more": (["CREATE TABLE more (x)"], "table more is only in the database"),
    "an index": (["CREATE INDEX i ON items(body)"], "index i is only in the database"),
    "a column": (["ALTER TABLE items ADD COLUMN x"], "table items has another definition"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different(name: str, served: str, node: Path, verify: Callable[..., Result]) -> None:
    statements, text = DIFFERENT[name]
    execute(node, *statements)
    before = contents(node.parent)
    result = verify(served, "--against", node, "--scratch", node.parent)
    line = failed(result, "The backup at version 5 does not hold", text, "find out which copy")
    assert line.count(";") == 0 or name in ("a column", "a table missing")
    assert contents(node.parent) == before


@pytest.mark.parametrize("version", [4, 6])
def test_another_version(
    version: int, served: str, node: Path, verify: Callable[..., Result]
) -> None:
    """The database is one commit behind, or one ahead."""
    node.unlink()
    apply_calls(node, [*CALLS, change(6, "SELECT 1")][:version])
    result = verify(served, "--against", node, "--scratch", node.parent)
    failed(result, f"the backup is at version 5, the database at version {version}")


def test_another_node(url: str, backup: Path, node: Path, verify: Callable[..., Result]) -> None:
    """At the same version. Only the first differences are named."""
    node.unlink()
    apply_calls(node, first_changes(1))
    for version in range(2, 6):
        rows = ", ".join(f"({version * 100 + i}, 'of another node')" for i in range(50))
        apply_calls(node, [change(version, f"INSERT INTO items VALUES {rows}")])
    line = failed(verify(url, "--against", node), "items")
    assert line.count(";") < 2 * database.MAX_REPORTED


def test_against_nothing(
    url: str, backup: Path, tmp_path: Path, verify: Callable[..., Result]
) -> None:
    before = contents(tmp_path)
    failed(verify(url, "--against", tmp_path / "missing"), "missing: there is no such file")
    failed(verify(url, "--against", tmp_path), "there is no such file")
    failed(verify(url, "--against", backup), "file is not a database")
    assert contents(tmp_path) == before


def die_with_open_database(path: Path, *statements: str) -> None:
    """Execute ``statements`` in a process that is then killed with the database open."""
    program = (
        "import os, signal, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: connection.execute(statement).fetchall()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path), *statements])
    assert done.returncode == -signal.SIGKILL


def test_hot_journal(
    url: str, backup: Path, node: Path, tmp_path: Path, verify: Callable[..., Result]
) -> None:
    """The node died in a transaction that is not to count; verify leaves it to the node."""
    die_with_open_database(
        node,
        "PRAGMA cache_size = 1",
        "BEGIN",
        "UPDATE items SET body = 'torn'",
        "CREATE TABLE spill AS SELECT zeroblob(100000) AS x",
    )
    before = contents(node.parent)
    assert len(before) == 2
    alone = tmp_path / "without its journal"
    shutil.copy(node, alone)
    assert verify(url, "--against", alone).exit_code == 1, "so the journal matters"
    assert verify(url, "--against", node).exit_code == 0
    assert contents(node.parent) == before


def test_wal(url: str, backup: Path, node: Path, verify: Callable[..., Result]) -> None:
    """What is committed in the WAL counts; verify does not fold it in."""
    add_session(url, [change(6, "INSERT INTO items VALUES (6, 'in the WAL')")])
    statements = change(6, "INSERT INTO items VALUES (6, 'in the WAL')")[1]
    die_with_open_database(
        node,
        "PRAGMA journal_mode = WAL",
        "BEGIN",
        *statements,
        "COMMIT",
        "BEGIN",
        "DELETE FROM items",
    )
    before = contents(node.parent)
    assert Path(f"{node}-wal").stat().st_size > 0
    assert verify(url, "--against", node).exit_code == 0
    assert contents(node.parent) == before


# Damage


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody appends: a reader need not wait for that."""
    monkeypatch.setattr(logreader, "GROWING_TAIL_S", 0.0)


def test_every_record_flipped(
    url: str, backup: Path, tmp_path: Path, verify: Callable[..., Result], impatient: None
) -> None:
    """In its head and in its payload: the offset of the record is named.

    The trailer's four bytes hold nothing: they only show that a write got to its end.
    """
    image, heads = backup.read_bytes(), [head for head, _ in support.records_of(backup)]
    for head in heads:
        for offset in (head.offset, head.offset + 50, head.offset + 130, head.end - 5):
            support.flip(backup, offset)
            before = contents(tmp_path)
            failed(verify(url), f"{backup} is damaged at offset {head.offset}:")
            assert contents(tmp_path) == before
            backup.write_bytes(image)
    support.flip(backup, 20)
    failed(verify(url), str(backup))


def test_flip_in_a_snapshot(url: str, tmp_path: Path, verify: Callable[..., Result]) -> None:
    path = tmp_path / "snapshot"
    apply_calls(path, CALLS)
    execute(path, "CREATE TABLE large AS SELECT zeroblob(3000000) AS x")
    FileBackend(url).create(Snapshot(str(path), 5))
    backup = Path(url.removeprefix("file://"))
    heads = [head for head, _ in support.records_of(backup)]
    assert len(heads) > 2
    support.flip(backup, heads[1].offset + 5000)
    before = contents(tmp_path)
    failed(verify(url), f"damaged at offset {heads[1].offset}:")
    assert contents(tmp_path) == before


def test_flip_under_a_server(
    url: str, backup: Path, tmp_path: Path, verify: Callable[..., Result]
) -> None:
    head = support.records_of(backup)[2][0]
    with ServerProcess(url) as server:
        support.flip(backup, head.offset + 130)
        before = contents(tmp_path)
        failed(verify(server.url, "--scratch", tmp_path))
        assert contents(tmp_path) == before
        server.wait_for(f"damaged at offset {head.offset}:")


def test_does_not_replay(url: str, tmp_path: Path, verify: Callable[..., Result]) -> None:
    """Every record checks, and yet no database comes of it."""
    make_backup(url, [*CALLS, change(6, "INSERT INTO nowhere VALUES (1)")])
    before = contents(tmp_path)
    failed(verify(url), "change to version 6 does not replay: no such table: nowhere")
    assert contents(tmp_path) == before


def test_another_data_version(url: str, tmp_path: Path, verify: Callable[..., Result]) -> None:
    """The statements lead elsewhere than the records say."""
    calls = [*CALLS, change(6, "UPDATE vars SET intval = 70")]
    make_backup(url, calls)
    failed(verify(url), "data_version is 70, but the backup's is 6")


def test_foreign_keys(url: str, tmp_path: Path, verify: Callable[..., Result]) -> None:
    path = tmp_path / "snapshot"
    apply_calls(path, CALLS)
    execute(path, "INSERT INTO keys VALUES (3, 77, NULL)")
    FileBackend(url).create(Snapshot(str(path), 5))
    before = contents(tmp_path)
    failed(verify(url), "foreign_key_check: row 3 of keys points to no row of items")
    failed(verify(url, "--against", path), "foreign_key_check")
    assert contents(tmp_path) == before


def test_integrity(url: str, tmp_path: Path, verify: Callable[..., Result]) -> None:
    path = tmp_path / "snapshot"
    apply_calls(path, [*CALLS, change(6, "CREATE INDEX bodies ON items(body)")])
    execute(
        path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = 'CREATE INDEX bodies ON items(id)' WHERE name = 'bodies'",
    )
    FileBackend(url).create(Snapshot(str(path), 6))
    before = contents(tmp_path)
    failed(verify(url), "integrity_check: ")
    assert contents(tmp_path) == before


def test_empty(url: str, tmp_path: Path, verify: Callable[..., Result]) -> None:
    make_backup(url)
    before = contents(tmp_path)
    failed(verify(url), "holds no change yet")
    assert contents(tmp_path) == before


def test_missing(url: str, verify: Callable[..., Result]) -> None:
    failed(verify(url), "There is no backup at")
    failed(verify(f"socket:127.0.0.1:{peers.free_port()}"), "cannot be reached")


def test_usage(verify: Callable[..., Result]) -> None:
    assert verify().exit_code == 2
    assert verify("--nonsense", "file:///x").exit_code == 2


# Scratch


@pytest.mark.parametrize("where", ["beside", "elsewhere", "here"])
def test_scratch(
    where: str,
    url: str,
    backup: Path,
    node: Path,
    tmp_path: Path,
    verify: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a file, or where --scratch says; for a server in the current directory."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places: list[str] = []

    def check(path: str) -> list[str]:
        places.append(os.path.dirname(path))
        return []

    monkeypatch.setattr(database, "check", check)
    arguments = ["--scratch", tmp_path / "elsewhere"] if where == "elsewhere" else []
    if where == "here":
        with ServerProcess(url) as server:
            assert verify(server.url).exit_code == 0
    else:
        assert verify(url, *arguments, "--against", node).exit_code == 0
    wanted = {
        "beside": backup.parent,
        "elsewhere": tmp_path / "elsewhere",
        "here": tmp_path / "here",
    }
    assert places == [str(wanted[where])]


def test_no_scratch(url: str, backup: Path, tmp_path: Path, verify: Callable[..., Result]) -> None:
    missing = tmp_path / "missing"
    failed(verify(url, "--scratch", missing), f"The directory {missing} does not exist")
    failed(verify(url, "--scratch", backup), "does not exist")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("cable")])
@pytest.mark.parametrize("step", ["check", "copy_files", "compare"])
def test_scratch_is_removed(
    step: str,
    error: BaseException,
    url: str,
    backup: Path,
    node: Path,
    tmp_path: Path,
    verify: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However it ends."""
    before = contents(tmp_path)

    def stop(*_: object) -> list[str]:
        raise error

    monkeypatch.setattr(database, step, stop)
    assert verify(url, "--against", node).exit_code == 1
    assert contents(tmp_path) == before


def test_full_scratch_disk(url: str, backup: Path, small_disk: Path, tmp_path: Path) -> None:
    add_session(url, [change(6, "INSERT INTO items VALUES (9, zeroblob(3000000))")])
    done = run_cli("verify", url, "--scratch", small_disk, check=1)
    assert "too little room" in done.stderr and str(small_disk) in done.stderr
    assert "add --scratch DIR" in done.stderr
    assert list(small_disk.iterdir()) == []
    path = tmp_path / "snapshot"
    apply_calls(path, [*CALLS, change(6, "INSERT INTO items VALUES (9, zeroblob(3000000))")])
    FileBackend(url).replace(Snapshot(str(path), 6))
    done = run_cli("verify", url, "--scratch", small_disk, check=1)
    assert "too little room" in done.stderr and str(small_disk) in done.stderr
    assert list(small_disk.iterdir()) == []


# Memory


def peak_kib(*arguments: object) -> int:
    """The most memory that a run of backup-cli, which must succeed, had."""
    process = subprocess.Popen(
        [sys.executable, str(CLI), *map(str, arguments)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss


def test_memory(url: str, tmp_path: Path) -> None:
    """A backup of 100 MB, of a snapshot and changes, needs no more than a small one."""
    small = f"{url}.small"
    make_backup(small, CALLS)
    node = tmp_path / "node"
    apply_calls(node, CALLS)
    base = peak_kib("verify", small, "--against", node)
    execute(node, "CREATE TABLE large (id INTEGER PRIMARY KEY, x BLOB)")
    blobs = "INSERT INTO large SELECT NULL, zeroblob(1000000) FROM n"
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60)"
    execute(node, f"{count} {blobs}")
    FileBackend(url).create(Snapshot(str(node), 5))
    literal = f"INSERT INTO large VALUES (NULL, '{'y' * 1_000_000}')"
    calls: list[Call] = [change(version, literal) for version in range(6, 46)]
    add_session(url, calls)
    apply_calls(node, calls)
    grown = peak_kib("verify", url, "--against", node) - base
    # SQLite's page cache of 16 MB, and the text of the largest change several times.
    assert grown < 40 << 10, f"{grown >> 10} MiB more"
