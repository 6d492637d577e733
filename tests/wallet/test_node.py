"""A node's directory: who runs there, and files that are not what they should be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError
from tests import support
from tests.support import run_cli
from wallet import node

LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")


@contextlib.contextmanager
def doing(program: str, *arguments: object) -> Iterator[int]:
    """A process that has run ``program`` and stays; its id."""
    command = [sys.executable, "-c", f"{program}\nprint(flush=True); import sys; sys.stdin.read()"]
    with subprocess.Popen(
        [*command, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


LOCK = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
OPEN = (
    "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None);"
    "connection.execute('SELECT * FROM sqlite_master').fetchall()"
)


@pytest.fixture
def wallet(node_dir: Path) -> Path:
    """The database of the node in ``node_dir``."""
    path = node_dir / node.DATABASE_NAME
    support.apply_calls(path, support.first_changes(3))
    return path


def refusal(directory: Path, wallet: Path | str = "/nowhere") -> str:
    """Why ``directory`` is not stopped."""
    with (
        pytest.raises(ConfigError) as caught,
        node.stopped(node.network_dir(str(directory)), str(wallet)),
    ):
        pass
    return str(caught.value)


# Who runs there


def test_the_lock_is_held_meanwhile(node_dir: Path) -> None:
    pid_file = node_dir.parent / f"lightningd-{node_dir.name}.pid"
    pid_file.touch()
    locking = [sys.executable, "-c", LOCK.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB")]
    with node.stopped(str(node_dir), "/nowhere"):
        assert subprocess.run([*locking, pid_file], stderr=subprocess.DEVNULL).returncode == 1
    assert subprocess.run([*locking, pid_file]).returncode == 0


def test_lightningd_in_a_directory_that_is_a_link(node_dir: Path, tmp_path: Path) -> None:
    """The pid file is beside the link, not beside what it leads to."""
    link = tmp_path / "base" / "bitcoin"
    link.parent.mkdir()
    link.symlink_to(node_dir)
    pid_file = link.parent / "lightningd-bitcoin.pid"
    with doing(LOCK, pid_file):
        line = refusal(link)
        assert f"holds the lock on {pid_file}" in line
        assert f"`lightning-cli --lightning-dir={link.parent} --network=bitcoin stop`" in line
        assert f"holds the lock on {pid_file}" in refusal(Path(f"{link}/"))
    with node.stopped(node.network_dir(str(link)), "/nowhere"):
        pass


def test_lightningd_in_a_directory_named_through_a_link(node_dir: Path, tmp_path: Path) -> None:
    link = tmp_path / "shortcut"
    link.symlink_to(node_dir)
    pid_file = node_dir.parent / f"lightningd-{node_dir.name}.pid"
    for directory in (link, link / ".." / node_dir.name):
        with doing(LOCK, pid_file):
            assert f"holds the lock on {pid_file}" in refusal(directory)


@LINUX
def test_lightningd_with_its_pid_file_elsewhere(node_dir: Path, wallet: Path) -> None:
    # Between two transactions it has the database open, and no lock on it.
    with doing(OPEN, wallet) as pid:
        line = refusal(node_dir, wallet)
        assert f"Process {pid} (python" in line
        assert f"has the node's database {wallet} open" in line
    with node.stopped(str(node_dir), str(wallet)):
        pass


@LINUX
def test_the_database_of_another_user_with_a_lock(
    node_dir: Path, wallet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His open files cannot be seen, his locks can: in WAL mode there is always one."""
    monkeypatch.setattr(node, "_with_open", lambda files: iter(()))
    with contextlib.closing(sqlite3.connect(wallet)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    with doing(OPEN, wallet) as pid:
        line = f"{os.stat(f'{wallet}-shm').st_ino}"
        if line not in Path("/proc/locks").read_text():
            pytest.skip("this system does not list locks")
        assert f"Process {pid} (python" in refusal(node_dir, wallet)


@LINUX
@pytest.mark.parametrize("command", ["init", "resync", "attach", "upgrade"])
def test_commands_refuse_a_database_in_use(
    command: str, node_dir: Path, wallet: Path, url: str, tmp_path: Path
) -> None:
    elsewhere = wallet.rename(tmp_path / "elsewhere.sqlite3")
    arguments = ["--lightning-dir", node_dir, "--wallet", elsewhere]
    before = support.contents(tmp_path)
    with doing(OPEN, elsewhere) as pid:
        urls = [url] if command in ("init", "attach") else []
        done = run_cli(command, *arguments, *urls, check=1)
    assert f"Process {pid} (python" in done.stderr
    assert support.contents(tmp_path) == before


def test_lightningd_listens() -> None:
    # A socket's path is short: not the test's own directory.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        directory = Path(short, "regtest")
        directory.mkdir()
        path = directory / "lightning-rpc"
        server.bind(str(path))
        with node.stopped(str(directory), "/nowhere"):  # What a dead one leaves.
            pass
        server.listen(0)
        expected = f"it listens on {path}. Run `lightning-cli --rpc-file={path} stop`"
        assert expected in refusal(directory)
        with contextlib.ExitStack() as clients:  # Nobody accepts, and its queue fills.
            for _ in range(3):
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.connect(str(path))
            assert expected in refusal(directory)


def test_a_system_without_proc(
    node_dir: Path, wallet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "PROC", "/nowhere/proc")
    with doing(OPEN, wallet), node.stopped(str(node_dir), str(wallet)):
        pid_file = node_dir.parent / f"lightningd-{node_dir.name}.pid"
        with open(pid_file, "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with doing(LOCK, pid_file):
        assert "holds the lock" in refusal(node_dir, wallet)


# Files that are not what they should be


@pytest.mark.parametrize("command", ["init", "attach"])
def test_a_link_to_a_database_that_is_not_there(
    command: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    (node_dir / node.DATABASE_NAME).symlink_to(tmp_path / "unmounted" / "lightningd.sqlite3")
    done = run_cli(command, "--lightning-dir", node_dir, url, check=1)
    assert (
        f"is a link to {tmp_path}/unmounted/lightningd.sqlite3, which is not there" in done.stderr
    )
    assert not list((tmp_path / "disk2").iterdir())
    assert not (node_dir / "backup.lock").exists()


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, '{"backend_url": "file:///\\ud800"}', "9" * 5000],
)
def test_strange_backup_locks(content: str, node_dir: Path) -> None:
    (node_dir / node.LOCK_NAME).write_text(content)
    with pytest.raises(ConfigError, match="is damaged: it should read"):
        node.read_lock_file(str(node_dir))


@pytest.mark.parametrize("version", [2**32, 2**63 - 1, -1])
def test_a_database_whose_version_is_none(
    version: int, node_dir: Path, wallet: Path, url: str, tmp_path: Path
) -> None:
    with contextlib.closing(sqlite3.connect(wallet)) as connection, connection:
        connection.execute("UPDATE vars SET intval = ?", (version,))
    done = run_cli("init", "--lightning-dir", node_dir, url, check=1)
    assert f"{wallet}: its data_version is {version}, which is none" in done.stderr
    assert not list((tmp_path / "disk2").iterdir())
    assert [path.name for path in node_dir.iterdir()] == [wallet.name]


def test_home_in_paths_that_no_shell_has_seen(node_dir: Path, url: str, tmp_path: Path) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    support.add_session(url, support.first_changes(3))
    home = tmp_path / "home"
    (home / "scratch").mkdir(parents=True)
    options: dict[str, Any] = {"env": dict(os.environ, HOME=str(home)), "cwd": tmp_path}
    run_cli("restore", url, "~/restored.sqlite3", **options)
    assert (home / "restored.sqlite3").exists()
    arguments = ["--against=~/restored.sqlite3", "--scratch=~/scratch"]
    assert "is the same as" in run_cli("verify", url, *arguments, **options).stdout
    assert not (tmp_path / "~").exists()


def test_locks_of_files_that_are_gone_are_passed_over(
    wallet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = wallet.stat()
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    (tmp_path / "locks").write_text(
        "1: POSIX  ADVISORY  READ 4710 <none>:0 124 124\n"
        f"2: POSIX  ADVISORY  READ 4711 {place} 124 124\n"
        f"2: -> POSIX  ADVISORY  WRITE 4712 {place} 0 EOF\n"
        "3: FLOCK\n"
    )
    monkeypatch.setattr(node, "PROC", str(tmp_path))
    assert list(node._with_lock({(found.st_dev, found.st_ino)})) == [4711, 4712]


def test_backup_lock_keeps_all_that_it_says(node_dir: Path) -> None:
    full = node.LockFile(
        "file:///a",
        "1GiB",
        b"x" * 16,
        "db.sqlite3",
        "02" * 33,
        False,
        "once",
        "/m.prom",
        {"later": [1]},
    )
    for lock_file in (node.LockFile("file:///a"), full):
        (node_dir / "backup.lock").unlink(missing_ok=True)
        node.write_lock_file(str(node_dir), lock_file)
        assert node.read_lock_file(str(node_dir)) == lock_file
    assert node.wallet(str(node_dir), full) == str(node_dir / "db.sqlite3")


@pytest.mark.parametrize("what", ['"wallet": 5', '"wallet": "a\\u0000b"', '"node_id": []'])
def test_backup_lock_with_what_is_no_text(what: str, node_dir: Path) -> None:
    (node_dir / "backup.lock").write_text(f'{{"backend_url": "file:///a", {what}}}')
    with pytest.raises(ConfigError, match="is damaged: it should read"):
        node.read_lock_file(str(node_dir))
