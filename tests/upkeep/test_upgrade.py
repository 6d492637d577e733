"""Taking over a backup of layout 1: from the node's database, from the old log, on a server."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import durable
from backend import NOBODY, Change, Session, Snapshot
from commands import main
from errors import UnsupportedLayout
from filebackend import FileBackend
from filelog.layout1 import is_layout_1
from tests import support
from tests.layout1_files import EarlierPlugin, change_entry, written
from tests.peers import ACK, NACK, ServerProcess
from tests.support import (
    CLI,
    Call,
    PluginProcess,
    Refused,
    apply_calls,
    change,
    contents,
    first_changes,
    run_cli,
)
from tests.whole.test_faults import KEEPS, Disk, PowerCut
from upkeep import upgrade
from wallet import database, restore

OFF, ON = "PRAGMA foreign_keys = OFF;", "PRAGMA foreign_keys = ON;"
ABANDONED = change(6, "INSERT INTO items VALUES (90, 'this never happened')")
CALLS = first_changes(5)


@pytest.fixture
def old(url: str) -> Path:
    """Where the backup is, of layout 1."""
    return Path(url.removeprefix("file://"))


@pytest.fixture
def node(node_dir: Path, url: str) -> Path:
    """The path of the node's database; backup.lock names the backup."""
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    return node_dir / "lightningd.sqlite3"


def kept_of(old: Path) -> Path:
    """Where the one old file is kept."""
    (kept,) = old.parent.glob(f"{old.name}.old-*")
    return kept


def changes_of(url: str) -> list[Call]:
    """The changes behind the snapshot."""
    return support.stored(url)


def assert_restores(url: str, calls: Sequence[Call], tmp_path: Path) -> None:
    """The backup leads to the database of a node that committed ``calls``."""
    result, wanted = tmp_path / "result.sqlite3", tmp_path / "wanted"
    run_cli("restore", url, result)
    apply_calls(wanted, calls)
    assert database.compare(str(wanted), str(result)) == []
    result.unlink()
    wanted.unlink()


def refused(tmp_path: Path, *arguments: object, says: Sequence[str], **options: Any) -> None:
    """The command refuses in one line, and changes nothing."""
    before = contents(tmp_path)
    done = run_cli(*arguments, check=1, **options)
    assert contents(tmp_path) == before
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    for text in says:
        assert text in done.stderr


# From the node's database


@pytest.mark.parametrize("ahead", [3, 1, 0, -1])
def test_from_the_node(
    ahead: int, old: Path, url: str, node: Path, node_dir: Path, tmp_path: Path
) -> None:
    """Ahead: it ran without the plugin. One behind: the last change was abandoned."""
    written(old, CALLS, [ABANDONED] if ahead == -1 else [])
    before, calls = old.read_bytes(), first_changes(5 + max(ahead, 0))
    apply_calls(node, calls)
    done = run_cli("upgrade", "--lightning-dir", node_dir)
    assert f"upgraded, at version {calls[-1][0]}." in done.stdout
    assert str(kept_of(old)) in done.stdout
    assert kept_of(old).read_bytes() == before
    assert changes_of(url) == []
    assert FileBackend(url).status().layout == "file layout 2"
    run_cli("verify", url, "--against", node)
    with PluginProcess(node_dir) as plugin:
        plugin.write(*change(calls[-1][0] + 1, "INSERT INTO items VALUES (80, 'goes on')"))
        assert plugin.logged("Versions match up")
    goes_on = change(calls[-1][0] + 1, "INSERT INTO items VALUES (80, 'goes on')")
    assert_restores(url, [*calls, goes_on], tmp_path)


def test_node_with_a_hot_journal(old: Path, url: str, node: Path, node_dir: Path) -> None:
    """What a killed node's last transaction left is rolled back, as the node would."""
    written(old, CALLS)
    apply_calls(node, CALLS)
    hot_journal(node, "UPDATE items SET body = 'torn'", "UPDATE vars SET intval = 6")
    run_cli("upgrade", "--lightning-dir", node_dir)
    status = FileBackend(url).status()
    assert (status.version, status.changes) == (5, 0)


def hot_journal(path: Path, *statements: str) -> None:
    """Leave ``path`` as a process does that is killed in the middle of a transaction."""
    program = (
        "import os, signal, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('PRAGMA cache_size = 1')\n"
        "connection.execute('BEGIN')\n"
        "for statement in sys.argv[2:]: connection.execute(statement)\n"
        "connection.execute('CREATE TABLE spill AS SELECT zeroblob(100000) AS x')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path), *statements])
    assert done.returncode == -signal.SIGKILL
    assert Path(f"{path}-journal").stat().st_size > 0


@pytest.mark.parametrize("last", [[ABANDONED, change(7, "SELECT 1")], [(5, [OFF])]])
def test_node_behind(last: list[Call], old: Path, node: Path, node_dir: Path) -> None:
    """By two changes, or by one that cannot have been abandoned."""
    written(old, [*CALLS, *last])
    version = last[-1][0] - (2 if len(last) == 2 else 1)
    apply_calls(node, first_changes(version))
    refused(
        node_dir.parent.parent,
        *("upgrade", "--lightning-dir", node_dir),
        says=["lost some state", f"node is at version {version}", f"at version {last[-1][0]}"],
    )


def test_unsound_node(old: Path, node: Path, node_dir: Path, tmp_path: Path) -> None:
    written(old, CALLS)
    apply_calls(node, [*CALLS, change(6, "CREATE INDEX bodies ON items(body)")])
    with sqlite3.connect(node) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET rootpage = 2 WHERE name = 'bodies'")
    connection.close()
    says = ["not sound", "may be the better copy"]
    refused(tmp_path, "upgrade", "--lightning-dir", node_dir, says=says)


def test_wallet_elsewhere(old: Path, url: str, node_dir: Path, node: Path, tmp_path: Path) -> None:
    written(old, CALLS)
    elsewhere = tmp_path / "elsewhere.sqlite3"
    apply_calls(elsewhere, first_changes(7))
    run_cli("upgrade", "--lightning-dir", node_dir, "--wallet", f"sqlite3://{elsewhere}")
    assert FileBackend(url).status().version == 7


# A damaged old log


def damaged(old: Path) -> None:
    """Good up to version 3, of 5."""
    plugin = written(old, CALLS)
    data = bytearray(old.read_bytes())
    data[plugin.starts[3] + 8] = 7
    old.write_bytes(data)


def test_damaged_without_the_database(
    old: Path, url: str, node: Path, node_dir: Path, tmp_path: Path
) -> None:
    damaged(old)
    says = ["is damaged at offset", "up to version 3", "names version 5", "--allow-damaged"]
    refused(tmp_path, "upgrade", "--lightning-dir", node_dir, says=says)
    refused(tmp_path, "upgrade", url, says=says)
    node.touch()  # An empty file is no database.
    refused(tmp_path, "upgrade", "--lightning-dir", node_dir, says=says)


@pytest.mark.parametrize("version", [4, 5, 8])
def test_damaged_with_the_database(
    version: int, old: Path, url: str, node: Path, node_dir: Path
) -> None:
    damaged(old)
    apply_calls(node, first_changes(version))
    run_cli("upgrade", "--lightning-dir", node_dir)
    run_cli("verify", url, "--against", node)
    assert FileBackend(url).status().version == version


def test_damaged_with_an_old_database(
    old: Path, url: str, node: Path, node_dir: Path, tmp_path: Path
) -> None:
    """Its version fits what can be read of the backup, but not what the header names."""
    damaged(old)
    apply_calls(node, first_changes(3))
    says = ["up to version 3", "names version 5", "may be an old copy", "resync --lightning-dir"]
    refused(tmp_path, "upgrade", "--lightning-dir", node_dir, says=says)
    run_cli("resync", "--lightning-dir", node_dir, "--yes")
    assert FileBackend(url).status().version == 3
    assert is_layout_1(str(kept_of(old)))


# From the old log alone


TAILS: dict[str, list[Call]] = {
    "a change": [change(6, "INSERT INTO items VALUES (6, 'the last')")],
    "OFF": [(5, [OFF])],
    "OFF and its change": [(5, [OFF]), change(6, "DROP TABLE items")],
    "ON": [(5, [OFF]), change(6, "SELECT 1"), (6, [ON])],
}


@pytest.mark.parametrize("server", [False, True], ids=["node", "server"])
@pytest.mark.parametrize("tail", TAILS)
def test_from_the_log(
    tail: str, server: bool, old: Path, url: str, node: Path, node_dir: Path, tmp_path: Path
) -> None:
    """The last change stays one, so that it can be rewound."""
    calls = [*CALLS, *TAILS[tail]]
    written(old, [*CALLS, change(6, "SELECT 'never'")], [])
    old.unlink()
    plugin = written(old, [*CALLS[:4], change(5, "SELECT 'never'")], [CALLS[4], *TAILS[tail]])
    before = old.read_bytes()
    done = run_cli("upgrade", *([url] if server else ["--lightning-dir", node_dir]))
    assert "1 changes that never happened are left out." in done.stdout
    assert f"at version {calls[-1][0]}." in done.stdout
    assert kept_of(old).read_bytes() == before
    status = FileBackend(url).status()
    bumps = calls[-1][1][0] not in (OFF, ON)
    assert status.prev_version == (5 if bumps else None)
    # An OFF that nothing follows had no effect: a restore leaves it out.
    tail_calls = TAILS[tail] if tail == "OFF and its change" else TAILS[tail][-1:]
    assert changes_of(url) == ([] if tail == "OFF" else tail_calls)
    assert_restores(url, calls, tmp_path)
    assert plugin.version == status.version


def test_the_last_change_rewinds(
    old: Path, url: str, node: Path, node_dir: Path, tmp_path: Path
) -> None:
    """The whole way: upgraded, restored, and then the node is one behind."""
    written(old, CALLS, [ABANDONED])
    run_cli("upgrade", "--lightning-dir", node_dir)
    instead = change(6, "INSERT INTO items VALUES (6, 'in its place')")
    with PluginProcess(node_dir) as plugin:
        plugin.write(*instead)
        assert plugin.logged("Last changes not applied, rewinding non-committed transaction")
        plugin.write(*change(7, "SELECT 1"))
        assert plugin.close() == 0
    assert_restores(url, [*CALLS, instead, change(7, "SELECT 1")], tmp_path)


def test_the_last_change_stays(
    old: Path, url: str, node: Path, node_dir: Path, tmp_path: Path
) -> None:
    """Restored with its last change, the node goes on behind it."""
    written(old, CALLS)
    run_cli("upgrade", "--lightning-dir", node_dir)
    run_cli("restore", url, node_dir)
    with PluginProcess(node_dir) as plugin:
        plugin.write(*change(6, "INSERT INTO items VALUES (6, 'later')"))
        assert plugin.logged("Versions match up")
    calls = [*CALLS, change(6, "INSERT INTO items VALUES (6, 'later')")]
    assert_restores(url, calls, tmp_path)


@pytest.mark.parametrize("count", [0, 1])
def test_short_log(count: int, old: Path, url: str) -> None:
    """Empty, or one change, which can be rewound."""
    written(old, CALLS[:count])
    run_cli("upgrade", url)
    status = FileBackend(url).status()
    assert (status.version, status.changes, status.snapshot_size) == (count, count, 0)
    assert status.prev_version == (0 if count else None)
    assert changes_of(url) == CALLS[:count]
    assert is_layout_1(str(kept_of(old)))


@pytest.mark.parametrize("then", [0, 1, 2])
def test_log_with_a_snapshot(then: int, old: Path, url: str, tmp_path: Path) -> None:
    apply_calls(tmp_path / "snapshot", CALLS[:3])
    plugin = EarlierPlugin(old)
    plugin.snapshot(3, (tmp_path / "snapshot").read_bytes())
    plugin.session(CALLS[3 : 3 + then])
    run_cli("upgrade", url)
    status = FileBackend(url).status()
    assert (status.version, status.changes) == (3 + then, min(then, 1))
    assert_restores(url, CALLS[: 3 + then], tmp_path)


def test_log_with_a_torn_tail(old: Path, url: str, tmp_path: Path) -> None:
    """What was never acknowledged stays behind, and that is said."""
    written(old, CALLS[:4])
    size = old.stat().st_size
    with old.open("ab") as file:
        file.write(change_entry(CALLS[4])[:-1])
    done = run_cli("upgrade", url)
    assert f"At offset {size} it ends inside an entry; it was left out." in done.stdout
    assert_restores(url, CALLS[:4], tmp_path)


def test_missing_spaces_in_the_tail(old: Path, url: str, tmp_path: Path) -> None:
    table = change(2, "CREATE TABLE outputs (id INTEGER PRIMARY KEY, reserved_til INTEGER)")
    row = change(3, "INSERT INTO outputs VALUES (1, 0)")
    broken, mended = (
        change(4, f"UPDATE outputs SET reserved_til=14{space}WHERE id=1") for space in ("", " ")
    )
    written(old, [CALLS[0], table, row, broken])
    run_cli("upgrade", url)
    assert_restores(url, [CALLS[0], table, row, mended], tmp_path)


def test_crash_trace(old: Path, url: str, tmp_path: Path) -> None:
    written(old, *support.trace_sessions("crash"))
    run_cli("upgrade", url)
    run_cli("verify", url, "--against", support.trace_database("crash", tmp_path))


def test_progress(old: Path, url: str) -> None:
    """It goes up to the size of the old file."""
    written(old, CALLS)
    size = old.stat().st_size
    seen: list[tuple[int, int]] = []
    upgrade.from_log(FileBackend(url), NOBODY, lambda *place: seen.append(place))
    assert len(seen) == 5
    assert seen == sorted(seen) and len(set(seen)) == 4
    assert {total for _, total in seen} == {size} and seen[-1][0] == size


# Who refuses what


def test_plugin_refuses_layout_1(old: Path, node: Path, node_dir: Path, tmp_path: Path) -> None:
    written(old, CALLS)
    before = contents(tmp_path)
    with PluginProcess(node_dir) as plugin:
        plugin.manifest()
        with pytest.raises(Refused, match="layout 1"):
            plugin.write(*change(6, "SELECT 1"))
        (line,) = plugin.errors()
    assert f"{old} is of layout 1" in line
    assert f"`{CLI} upgrade --lightning-dir DIR`" in line
    assert contents(tmp_path) == before


def test_server_refuses_layout_1(old: Path, url: str, tmp_path: Path) -> None:
    written(old, CALLS)
    says = [f"{old} is of layout 1", f"`{CLI} upgrade {url}`"]
    refused(tmp_path, "server", url, "127.0.0.1:1", says=says)


def test_next_command_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "a & b.bkp"
    shutil.copy(support.ROOT / "tests" / "data" / "golden" / "layout2-rules0.bkp", path)
    with pytest.raises(UnsupportedLayout, match=re.escape(f"upgrade 'file://{path}'`")):
        FileBackend(f"file://{path}").open()


def test_socket_url(node_dir: Path, tmp_path: Path) -> None:
    url = "socket:127.0.0.1:8700"
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    says = [f"{url} is kept by a server", f"Stop the server and run `{CLI} upgrade FILE_URL`"]
    refused(tmp_path, "upgrade", "--lightning-dir", node_dir, says=says)
    refused(tmp_path, "upgrade", url, says=says)


def test_running_node(old: Path, node: Path, node_dir: Path, tmp_path: Path) -> None:
    written(old, CALLS)
    apply_calls(node, CALLS)
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pid_file = node_dir.parent / "lightningd-regtest.pid"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(pid_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        says = ["lightningd is running", "stop"]
        refused(tmp_path, "upgrade", "--lightning-dir", node_dir, says=says)
        holder.kill()
    run_cli("upgrade", "--lightning-dir", node_dir)


def test_busy(old: Path, node: Path, node_dir: Path, url: str) -> None:
    """Somebody else upgrades it at this moment."""
    written(old, CALLS)
    before = old.read_bytes()
    with FileBackend(url)._locked():
        done = run_cli("upgrade", url, check=1)
    assert "holds the backup" in done.stderr
    assert old.read_bytes() == before
    assert not list(old.parent.glob("*.scratch-*"))


def test_no_lock_file(node_dir: Path, tmp_path: Path) -> None:
    says = ["Could not find backup.lock"]
    refused(tmp_path, "upgrade", "--lightning-dir", node_dir, says=says)


def test_usage(node_dir: Path, url: str) -> None:
    for arguments in [], ["--lightning-dir", node_dir, url]:
        done = run_cli("upgrade", *arguments, check=2)
        assert "either --lightning-dir DIR or the URL" in done.stderr


@pytest.mark.parametrize("server", [False, True], ids=["node", "server"])
def test_twice(server: bool, old: Path, url: str, node: Path, node_dir: Path) -> None:
    written(old, CALLS)
    if not server:
        apply_calls(node, CALLS)
    arguments = ["upgrade", *([url] if server else ["--lightning-dir", node_dir])]
    run_cli(*arguments)
    before = contents(old.parent)
    done = run_cli(*arguments)
    assert "of file layout 2 already: there is nothing to do." in done.stdout
    assert contents(old.parent) == before


def test_old_client_of_an_upgraded_server(old: Path, url: str, tmp_path: Path) -> None:
    """Protocol 1, from before: its next change, a rewind after a crash, a restore."""
    written(old, CALLS[:4], [CALLS[4]])
    run_cli("upgrade", url)
    instead = change(5, "INSERT INTO items VALUES (50, 'in place of item 5')")
    later = change(6, "INSERT INTO items VALUES (6, 'later')")
    with ServerProcess(url) as server:
        with server.client() as client:
            assert client.metadata()[:3] == (1, 5, 4)
            assert client.change(7, change(7, "SELECT 1")[1])[0] == NACK
            assert client.rewind(4) == (ACK, 4)
            assert client.change(*instead) == (ACK, 5)
        with server.client() as client:
            assert client.metadata()[:3] == (1, 5, 4)
            assert client.change(*later) == (ACK, 6)
            versions = [(kind, version) for kind, version, _ in client.restore()]
            assert versions == [(2, 4), (1, 5), (1, 6)]
        assert server.stop() == 0
    assert_restores(url, [*CALLS[:4], instead, later], tmp_path)


# Interrupted


STEPS = ("pwrite", "fdatasync", "fsync", "link", "rename", "unlink", "ftruncate")


def run_killed(kill_at: int, links: bool, arguments: list[str]) -> bool:
    """Run backup-cli in a fork that is killed in its n-th durable step; whether it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
        return os.WIFSIGNALED(status)
    with contextlib.suppress(BaseException):
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        count = 0

        def stepping(name: str, real: Any) -> Any:
            def step(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == kill_at:
                    if name == "pwrite":  # It gets half-way.
                        real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == "link" and not links:
                    raise PermissionError(1, "no hard links here")
                return real(*args, **options)

            return step

        for name in STEPS:
            setattr(os, name, stepping(name, getattr(os, name)))
        main(arguments, standalone_mode=False)
        os._exit(0)
    os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("source", ["node", "log"])
def test_killed_at_every_step(
    source: str,
    links: bool,
    old: Path,
    url: str,
    node: Path,
    node_dir: Path,
    tmp_path: Path,
) -> None:
    """The old file or the new one is there, whole; a second run finishes."""
    written(old, CALLS)
    image = old.read_bytes()
    wanted = tmp_path / "wanted"
    apply_calls(wanted, CALLS)
    if source == "node":
        shutil.copy(wanted, node)
    arguments = ["upgrade", "--lightning-dir", str(node_dir)]
    outcomes = set()
    for kill_at in range(1, 1000):
        for stray in old.parent.iterdir():
            stray.unlink()
        old.write_bytes(image)
        killed = run_killed(kill_at, links, arguments)
        outcomes.add(look(old, image, wanted))
        if not old.exists():  # Without links the old file is renamed before the new one is.
            kept_of(old).rename(old)
        assert not run_killed(0, links, arguments)
        assert look(old, image, wanted) == "new"
        backend = FileBackend(url)
        backend.open()
        Session(backend, "/nowhere").write(Change(6, None, change(6, "SELECT 1")[1]))
        backend.close()
        assert not list(old.parent.glob("*.scratch-*"))
        if not killed:
            break
    assert kill_at > 15
    assert outcomes == ({"old", "new"} if links else {"old", "new", "kept"})


def look(old: Path, image: bytes, wanted: Path) -> str:
    """What stands there: whole, whichever it is, and the old file somewhere."""
    kept = [path for path in old.parent.glob(f"{old.name}.old-*") if path.read_bytes() == image]
    if not old.exists():
        assert kept
        return "kept"
    if is_layout_1(str(old)):
        assert old.read_bytes() == image
        return "old"
    assert kept
    result = old.parent / "result.sqlite3"
    reading = FileBackend(f"file://{old}").read()
    restore.restore(reading, str(result), False, lambda *_: None)
    reading.close()
    assert database.compare(str(wanted), str(result)) == []
    result.unlink()
    return "new"


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("source", ["node", "log"])
def test_power_lost_at_every_step(
    source: str, keeps: str, old: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that keeps only what was flushed, and of the rest what it likes."""
    written(old, CALLS)
    image, wanted = old.read_bytes(), tmp_path / "wanted"
    apply_calls(wanted, CALLS)
    monkeypatch.setattr(durable, "PREALLOCATE_STEP", 2048)
    outcomes: list[str] = []
    for number in itertools.count(1):
        for stray in old.parent.iterdir():
            stray.unlink()
        old.write_bytes(image)
        disk = Disk(old.parent, fail_at=number, error=0, keeps=keeps)
        with monkeypatch.context() as patch, contextlib.suppress(PowerCut):
            patch.setattr(durable, "os", disk)
            if source == "node":
                FileBackend(url).replace(Snapshot(str(wanted), 5))
            else:
                upgrade.from_log(FileBackend(url), NOBODY, lambda *_: None)
        disk.lose_power()
        outcomes.append(look(old, image, wanted))
        if not disk.failed:
            break
    assert outcomes == sorted(outcomes, reverse=True), "first the old file, then the new one"
    assert len(outcomes) > 8 and {*outcomes} == {"old", "new"}


# Too little disk


@pytest.mark.parametrize("source", ["node", "log"])
@pytest.mark.parametrize("rows", [10, 18])
def test_too_little_disk(
    rows: int, source: str, small_disk: Path, node_dir: Path, tmp_path: Path
) -> None:
    """At the scratch database, or later, at the new file: the old one stays as it is."""
    old = small_disk / "node.bkp"
    blob = "x" * 60_000
    calls = [*CALLS]
    for version in range(6, 6 + rows):
        calls.append(change(version, f"INSERT INTO items VALUES ({version}, '{blob}')"))
    written(old, calls)
    before = old.read_bytes()
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": f"file://{old}"}))
    if source == "node":
        apply_calls(node_dir / "lightningd.sqlite3", calls)
    done = run_cli("upgrade", "--lightning-dir", node_dir, check=1)
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert "too little room" in done.stderr
    assert str(small_disk) in done.stderr
    assert old.read_bytes() == before
    assert {path.name for path in small_disk.iterdir()} <= {"node.bkp", "node.bkp.writer"}
    # On a larger disk it goes through.
    subprocess.run(["mount", "-o", "remount,size=140m", str(small_disk)], check=True)
    run_cli("upgrade", "--lightning-dir", node_dir)
    assert_restores(f"file://{old}", calls, tmp_path)
