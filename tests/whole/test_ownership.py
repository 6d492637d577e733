"""Whose the files are, and who may read them: what root leaves, the node must be able to use."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import durable
from backend import Snapshot
from filebackend import FileBackend
from tests import support
from tests.support import first_changes, make_backup, run_cli

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def give_all(directory: Path, owner: int) -> None:
    """Give ``directory`` and what is in it to ``owner``."""
    for path in (directory, *directory.rglob("*")):
        os.chown(path, owner, owner)


def check_all_belong(directory: Path, owner: int) -> None:
    for path in directory.rglob("*"):
        assert path.stat().st_uid == owner, path


def node_at(node_dir: Path, version: int) -> Path:
    path = node_dir / "lightningd.sqlite3"
    support.apply_calls(path, first_changes(version))
    return path


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o640])
@pytest.mark.parametrize("lock_file", ["there", "removed", "of root"])
def test_compaction_keeps_owner_and_mode(mode: int, lock_file: str, url: str) -> None:
    path = make_backup(url, first_changes(5))
    path.chmod(mode)
    give_all(path.parent, NOBODY)
    writer = path.with_name("node.bkp.writer")
    if lock_file == "removed":
        writer.unlink()
    elif lock_file == "of root":
        os.chown(writer, 0, 0)
    inode = path.stat().st_ino
    run_cli("compact", url)
    assert path.stat().st_ino != inode
    assert owner_and_mode(path) == (NOBODY, NOBODY, mode)
    check_all_belong(path.parent, NOBODY)


@pytest.fixture
def passable() -> Iterator[tuple[Path, str]]:
    """A network directory and a URL where every user gets to; pytest's are its user's only."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        Path(directory, "disk2").mkdir()
        yield support.network_dir(Path(directory)), f"file://{directory}/disk2/node.bkp"


@as_root
def test_init_by_root_gives_all_to_the_node(passable: tuple[Path, str]) -> None:
    node_dir, url = passable
    node_at(node_dir, 3)
    disk = Path(url.removeprefix("file://")).parent
    give_all(node_dir, NOBODY)
    give_all(disk, NOBODY)
    run_cli("init", "--lightning-dir", node_dir, url)
    check_all_belong(node_dir, NOBODY)
    check_all_belong(disk, NOBODY)
    assert owner_and_mode(node_dir / "backup.lock") == (NOBODY, NOBODY, 0o600)


@as_root
def test_init_by_root_where_only_a_group_writes(passable: tuple[Path, str]) -> None:
    """The directory is root's, and the node may write in it: the node's owner decides."""
    node_dir, url = passable
    disk = Path(url.removeprefix("file://")).parent
    os.chown(disk, 0, NOBODY)
    disk.chmod(0o770)
    give_all(node_dir, NOBODY)
    run_cli("init", "--lightning-dir", node_dir, url)
    check_all_belong(disk, NOBODY)


@as_root
def test_init_by_root_where_the_node_cannot_write(node_dir: Path, url: str) -> None:
    disk = Path(url.removeprefix("file://")).parent
    give_all(node_dir, NOBODY)
    done = run_cli("init", "--lightning-dir", node_dir, url, check=1)
    assert f"who owns {node_dir}, cannot write in {disk}" in done.stderr
    assert f"Run `chown nobody {disk}`" in done.stderr
    assert list(disk.iterdir()) == [] and list(node_dir.iterdir()) == []


@as_root
def test_server_files_belong_to_the_owner_of_their_directory(url: str) -> None:
    disk = Path(url.removeprefix("file://")).parent
    give_all(disk, NOBODY)
    run_cli("init", url)
    check_all_belong(disk, NOBODY)


@as_root
@pytest.mark.parametrize("command", ["resync", "upgrade"])
def test_replacements_keep_owner_and_mode(command: str, node_dir: Path, url: str) -> None:
    node_at(node_dir, 5)
    path = Path(url.removeprefix("file://"))
    (node_dir / "backup.lock").write_text(f'{{"backend_url": "{url}"}}')
    if command == "upgrade":
        support.layout1_file(path)
    else:
        make_backup(url, first_changes(3))
    path.chmod(0o640)
    give_all(path.parent, NOBODY)
    run_cli(command, "--lightning-dir", node_dir, *(["--yes"] if command == "resync" else []))
    assert FileBackend(url).status().version == 5
    assert owner_and_mode(path) == (NOBODY, NOBODY, 0o640)
    check_all_belong(path.parent, NOBODY)


@as_root
def test_attach_keeps_owner_and_mode_of_backup_lock(node_dir: Path, url: str) -> None:
    node_at(node_dir, 3)
    make_backup(url, first_changes(3))
    lock = node_dir / "backup.lock"
    lock.write_text('{"backend_url": "file:///elsewhere"}')
    lock.chmod(0o644)
    os.chown(lock, NOBODY, NOBODY)
    run_cli("attach", "--lightning-dir", node_dir, url)
    assert owner_and_mode(lock) == (NOBODY, NOBODY, 0o644)


@as_root
def test_torn_tail_that_root_moves_aside_belongs_to_the_log_s_owner(url: str) -> None:
    path = make_backup(url, first_changes(3))
    last = support.records_of(path)[-1][0]
    with path.open("r+b") as file:
        file.seek(last.end - 100)
        file.write(bytes(100))
    give_all(path.parent, NOBODY)
    backend = FileBackend(url)
    backend.open()
    backend.close()
    (aside,) = path.parent.glob("*.torn-*")
    assert owner_and_mode(aside) == owner_and_mode(path)


@as_root
def test_restore_by_root_into_a_user_s_directory(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(3))
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    run_cli("restore", url, home)
    assert owner_and_mode(home / "lightningd.sqlite3") == (NOBODY, NOBODY, 0o600)


def test_mode_is_kept_by_any_user(url: str, tmp_path: Path) -> None:
    path = make_backup(url, first_changes(3))
    path.chmod(0o640)
    support.apply_calls(tmp_path / "node.sqlite3", first_changes(4))
    FileBackend(url).replace(Snapshot(str(tmp_path / "node.sqlite3"), 4))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_group_that_cannot_be_kept_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits would be for the group of whoever compacts."""
    old = tmp_path / "old"
    old.write_bytes(b"")
    old.chmod(0o660)
    found = os.stat(old)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    real = os.stat

    def other_group(path: object) -> object:
        result = real(path)  # type: ignore[arg-type]
        return result if path != str(old) else Found(found)

    class Found:
        def __init__(self, inner: os.stat_result) -> None:
            self.st_mode, self.st_uid, self.st_gid = inner.st_mode, inner.st_uid, 4242

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "stat", other_group)
    monkeypatch.setattr(os, "chown", refuse)
    os.close(durable.create(str(tmp_path / "new"), like=str(old)))
    monkeypatch.undo()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


# From the moment they exist


WATCHED = """
import os, runpy, sys
places = sys.argv[1].split(os.pathsep)
def watch(event, arguments):
    if event in ('sqlite3.connect', 'sqlite3.connect/handle', 'os.rename', 'os.link', 'os.remove'):
        for directory in places:
            for name in os.listdir(directory):
                mode = os.stat(os.path.join(directory, name)).st_mode & 0o777
                if mode & 0o077 and not name.startswith('lightningd.sqlite3'):  # The node's.
                    sys.stderr.write(f'OPEN {name} {mode:o}\\n')
sys.addaudithook(watch)
program = sys.argv[2]
del sys.argv[1:2]
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(program))
runpy.run_path(program, run_name='__main__')
"""


@pytest.mark.parametrize("command", ["init", "resync", "compact", "verify", "restore", "upgrade"])
def test_every_file_is_its_owner_s_from_the_moment_it_exists(
    command: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    """Whatever the umask is: looked at each time a database is opened or a name changes."""
    path = Path(url.removeprefix("file://"))
    source = node_at(node_dir, 5)
    with contextlib.closing(sqlite3.connect(source)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    source.chmod(0o644)
    if command == "upgrade":
        support.layout1_file(path)
        path.chmod(0o600)
    elif command != "init":
        make_backup(url, first_changes(5 if command != "resync" else 3))
    if command != "init":
        (node_dir / "backup.lock").write_text(f'{{"backend_url": "{url}"}}')
        (node_dir / "backup.lock").chmod(0o600)  # What replaces it keeps that.
    arguments: dict[str, list[object]] = {
        "init": ["--lightning-dir", node_dir, url],
        "resync": ["--yes", "--lightning-dir", node_dir],
        "upgrade": ["--lightning-dir", node_dir],
        "compact": [url],
        "verify": [url, "--against", source],
        "restore": [url, path.parent / "restored.sqlite3"],
    }
    places = os.pathsep.join([str(path.parent), str(node_dir)])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, places, str(support.CLI), command]
        + [str(word) for word in arguments[command]],
        capture_output=True,
        text=True,
        umask=0,
    )
    assert done.returncode == 0, done.stderr
    assert "OPEN" not in done.stderr, done.stderr
    for found in path.parent.iterdir():
        assert stat.S_IMODE(found.stat().st_mode) == 0o600, found


def test_plugin_s_files_are_its_owner_s(node_dir: Path, url: str) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    program = ["env", "sh", "-c", f"umask 0; exec {sys.executable} {support.PLUGIN}"]
    with support.PluginProcess(node_dir, program) as plugin:
        for call in first_changes(4):
            plugin.write(*call)
        plugin.call("backup-compact")
        assert plugin.close() == 0
    for found in Path(url.removeprefix("file://")).parent.iterdir():
        assert stat.S_IMODE(found.stat().st_mode) == 0o600, found


@as_root
def test_what_root_salvages_is_of_the_directory_s_owner(url: str, tmp_path: Path) -> None:
    path, place = make_backup(url, first_changes(3)), tmp_path / "found"
    place.mkdir()
    give_all(place, NOBODY)
    run_cli("salvage", path, place / "of" / "today", check=3)
    assert owner_and_mode(place / "of" / "today") == (NOBODY, NOBODY, 0o700)
    check_all_belong(place, NOBODY)
