"""Compaction that is killed, or fails, at every step: the old file or the new one, complete."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import durable
from backend import Change, Session, Snapshot, bump
from errors import BackupError, DiskError
from filebackend import FileBackend
from tests import support
from tests.stopping import CHILD_STEPS, WRITER_STEPS, Stops, compacting, eventually, is_running
from tests.support import PluginProcess, Refused
from upkeep.compaction import Compactor
from wallet import database, node, restore

FIRST = 30
"""Changes before anything happens."""
ROUNDS = [20, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(0)])]
SIZE = 3 << 20
"""Bytes of a value that makes the snapshot one of several pieces."""


@pytest.fixture
def stops(tmp_path: Path) -> Stops:
    return Stops(tmp_path / "stops")


class Node:
    """A node whose plugin and whose compactions are killed; it knows what it committed.

    Args:
        directory: its network directory.
        url: of the new backup.
    """

    def __init__(self, directory: Path, url: str, stops: Stops) -> None:
        self._directory = directory
        self._stops = stops
        self.url = url
        self.path = Path(FileBackend(url).path)
        self.items: dict[int, str] = {}
        """The table that its database holds."""
        self.version = 0
        self.announced: int | None = None
        """The version of a change that was sent and neither acknowledged nor refused."""
        self.tries = 0
        FileBackend(url).create(None)
        node.write_lock_file(str(directory), node.LockFile(url, "off"))
        self.plugin = self._started()

    def _started(self) -> PluginProcess:
        plugin = PluginProcess(self._directory, self._stops.program)
        plugin.manifest()
        return plugin

    def _next(self) -> tuple[str, support.Call]:
        self.tries += 1
        version, text = self.version + 1, f"try {self.tries}"
        if version == 1:
            return "", support.first_changes(1)[0]
        return text, support.change(version, f"INSERT INTO items VALUES ({version}, '{text}')")

    def write(self, count: int = 1) -> None:
        """Commit ``count`` changes."""
        for _ in range(count):
            text, call = self._next()
            self.plugin.write(*call)
            self.announced = None
            self.version += 1
            if self.version > 1:
                self.items[self.version] = text

    def grow(self) -> None:
        """Commit a change that makes the snapshot big, and one that leaves it so."""
        for version, statement in (
            (self.version + 1, "CREATE TABLE ballast (body BLOB)"),
            (self.version + 2, f"INSERT INTO ballast VALUES (zeroblob({SIZE}))"),
        ):
            self.plugin.write(*support.change(version, statement))
        self.version += 2

    def announce(self) -> None:
        """Send a change and do not wait for the answer."""
        _, (version, statements) = self._next()
        with contextlib.suppress(BrokenPipeError):
            self.plugin.send("db_write", {"data_version": version, "writes": statements})
        self.announced = version

    def restart(self) -> None:
        """Start again after a crash."""
        self.plugin.process.wait()
        self.plugin = self._started()

    def check(self, directory: Path) -> None:
        """The backup holds what was committed, and at most the change that was announced."""
        path = directory / "check.sqlite3"
        restore.remove_database(str(path))
        with contextlib.closing(FileBackend(self.url).read()) as reading:
            found = restore.restore(reading, str(path), False, lambda *_: None)
        assert found.problems == []
        assert found.ending.version in (self.version, self.announced)
        with database.opened(str(path)) as connection:
            items = dict(connection.execute("SELECT id, body FROM items"))
        if found.ending.version != self.version:
            assert items.pop(found.ending.version).startswith("try ")
        assert items == self.items

    def strays(self) -> list[str]:
        """Files that only a compaction makes."""
        return [name for name in os.listdir(self.path.parent) if ".scratch-" in name]

    def leftovers(self) -> list[int]:
        """Compacting processes."""
        return compacting(self.url)


@pytest.fixture
def a_node(node_dir: Path, url: str, stops: Stops) -> Iterator[Node]:
    found = Node(node_dir, url, stops)
    found.write(FIRST)
    yield found
    found.plugin.kill()


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def has_new_file(found: Node, inode: int) -> bool:
    return found.path.stat().st_ino != inode


# SIGKILL at every step


@pytest.mark.parametrize("step", CHILD_STEPS[:-1])
def test_compacting_process_is_killed(
    step: str, a_node: Node, stops: Stops, tmp_path: Path
) -> None:
    a_node.grow()
    inode = a_node.path.stat().st_ino
    stops.at(step)
    request = a_node.plugin.send("backup-compact", {})
    child = stops.reached(step)
    a_node.write(5)
    kill(child)
    with pytest.raises(Refused, match="The compacting process ended with status -9"):
        a_node.plugin.answer(request)
    assert a_node.plugin.logged("The compaction failed, the backup goes on as it was")
    assert a_node.strays() == [] and not is_running(child)
    assert not has_new_file(a_node, inode)
    a_node.write(5)
    a_node.check(tmp_path)
    stops.go(step)
    a_node.plugin.call("backup-compact")
    assert has_new_file(a_node, inode)
    a_node.write(5)
    a_node.check(tmp_path)


@pytest.mark.parametrize("step", WRITER_STEPS)
def test_compacting_process_is_killed_after_its_message(
    step: str, a_node: Node, stops: Stops, tmp_path: Path
) -> None:
    """Its work is done: the writer goes on without it."""
    inode = a_node.path.stat().st_ino
    stops.at("said")
    stops.at(step)
    request = a_node.plugin.send("backup-compact", {})
    child = stops.reached("said")
    stops.reached(step)
    kill(child)
    stops.go(step)
    assert a_node.plugin.answer(request)["after"]["version_count"] == 2
    assert has_new_file(a_node, inode) and a_node.strays() == []
    a_node.write(5)
    a_node.check(tmp_path)


@pytest.mark.parametrize("both", [False, True], ids=["plugin", "both"])
@pytest.mark.parametrize("step", [*CHILD_STEPS, *WRITER_STEPS])
def test_plugin_is_killed(
    step: str, both: bool, a_node: Node, stops: Stops, tmp_path: Path
) -> None:
    a_node.grow()
    inode = a_node.path.stat().st_ino
    writer_step = step if step in WRITER_STEPS else "before-copy"
    child_step = step if step in CHILD_STEPS else "said"
    stops.at(child_step)
    stops.at(writer_step)
    a_node.plugin.send("backup-compact", {})
    child = stops.reached(child_step)
    if child_step == "said":
        stops.reached(writer_step)
    else:
        a_node.write(5)
    a_node.announce()
    kill(a_node.plugin.process.pid, *[child] * both)
    a_node.plugin.process.wait()
    eventually(lambda: not is_running(child), "the end of the compacting process")
    assert has_new_file(a_node, inode) == (step in ("renamed", "adopted"))
    a_node.check(tmp_path)
    a_node.restart()
    a_node.write(5)
    assert a_node.strays() == [] and a_node.leftovers() == []
    a_node.check(tmp_path)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("rounds", ROUNDS)
def test_killed_at_random_moments(rounds: int, a_node: Node, tmp_path: Path) -> None:
    choice = random.Random(50)
    a_node.grow()
    for _ in range(rounds):
        victims = choice.choice(["plugin", "child", "both"])
        request = a_node.plugin.send("backup-compact", {})
        until = time.monotonic() + choice.uniform(0, 0.3)
        while time.monotonic() < until:
            a_node.write()
        children = a_node.leftovers() if victims != "plugin" else []
        if victims == "child":
            kill(*children)
            with contextlib.suppress(Refused):
                a_node.plugin.answer(request)
            a_node.write()
            assert a_node.strays() == []
            continue
        if choice.random() < 0.7:
            a_node.announce()
        kill(a_node.plugin.process.pid, *children)
        a_node.plugin.process.wait()
        eventually(lambda: not a_node.leftovers(), "the end of the compacting process")
        a_node.check(tmp_path)
        a_node.restart()
        a_node.write()
        assert a_node.strays() == []
        assert not [name for name in os.listdir(a_node.path.parent) if ".torn-" in name]
    assert a_node.plugin.call("backup-compact")["after"]["version_count"] == 2
    a_node.check(tmp_path)


# What fails by itself


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.parametrize(
    ("count", "reserve", "reason"),
    [(14, 0, "full"), (9, 0, "too little room"), (9, 7 << 20, "have to stay free")],
    ids=["replay", "new-log", "reserve"],
)
def test_disk_full_in_the_middle(
    count: int,
    reserve: int,
    reason: str,
    small_disk: Path,
    node_dir: Path,
    stops: Stops,
    tmp_path: Path,
) -> None:
    stops.set(space__RESERVE=reserve)
    found = Node(node_dir, f"file://{small_disk}/node.bkp", stops)
    found.write(FIRST)
    found.plugin.write(*support.change(found.version + 1, "CREATE TABLE ballast (body BLOB)"))
    found.version += 1
    text = "x" * 500_000
    for _ in range(count):
        call = support.change(found.version + 1, f"INSERT INTO ballast VALUES ('{text}')")
        found.plugin.write(*call)
        found.version += 1
    inode, space = found.path.stat().st_ino, space_of(found.path)
    request = found.plugin.send("backup-compact", {})
    while not found.plugin.answered(request):
        found.write()
        time.sleep(0.02)  # Not the changes are to fill the disk, while the child starts.
    with pytest.raises(Refused, match=reason):
        found.plugin.answer(request)
    assert found.plugin.logged("The compaction failed, the backup goes on as it was")
    assert not has_new_file(found, inode) and found.strays() == []
    eventually(lambda: space_of(found.path) == space, "giving back what only the log may take")
    found.write(20)
    assert found.plugin.errors() == [] and found.plugin.close() == 0
    found.check(tmp_path)


def space_of(path: Path) -> int:
    """Free bytes of the disk of ``path``, and those that ``path`` itself takes."""
    found = os.statvfs(path.parent)
    return found.f_bavail * found.f_frsize + path.stat().st_blocks * 512


def test_flush_fails_in_the_compacting_process(a_node: Node, stops: Stops, tmp_path: Path) -> None:
    inode = a_node.path.stat().st_ino
    stops.set(fail="flush")
    for _ in range(2):
        with pytest.raises(Refused, match="Input/output error"):
            a_node.plugin.call("backup-compact")
        assert a_node.strays() == [] and not has_new_file(a_node, inode)
        a_node.write(5)
    stops.set()
    a_node.plugin.call("backup-compact")
    a_node.write(5)
    assert has_new_file(a_node, inode)
    a_node.check(tmp_path)


class Broken:
    """Stands for a function of durable and fails at its call number ``at``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: object, name: str, at: int) -> None:
        self._inner = getattr(module, name)
        self._left = at
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments: object) -> object:
        self._left -= 1
        if self._left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._inner(*arguments)


@pytest.fixture
def backend(url: str) -> Iterator[FileBackend]:
    support.make_backup(url, support.first_changes(FIRST))
    found = FileBackend(url)
    found.open()
    yield found
    found.close()


def compact(backend: FileBackend) -> None:
    Compactor(backend, threading.Lock()).run()


def write_next(backend: FileBackend) -> None:
    version = backend.version + 1
    call = support.change(version, f"INSERT INTO items VALUES ({version}, 'more')")
    backend.add_change(Change(version, None, call[1]))


def files_beside(backend: FileBackend) -> list[str]:
    return [name for name in os.listdir(os.path.dirname(backend.path)) if ".scratch-" in name]


@pytest.mark.parametrize(
    ("module", "name"), [(durable, "flush"), (os, "rename")], ids=["flush", "rename"]
)
def test_adopting_fails_before_the_rename(
    module: object, name: str, backend: FileBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file stays in use: the path still means it, and no loss of power changes that."""
    inode = os.stat(backend.path).st_ino
    with monkeypatch.context() as patch:
        Broken(patch, module, name, 1)
        with pytest.raises(DiskError, match="Input/output error"):
            compact(backend)
    assert os.stat(backend.path).st_ino == inode and files_beside(backend) == []
    write_next(backend)
    assert support.records_of(Path(backend.path))[-1][0].version == FIRST + 1
    compact(backend)
    assert os.stat(backend.path).st_ino != inode
    write_next(backend)
    assert support.records_of(Path(backend.path))[-1][0].version == FIRST + 2


def test_directory_is_not_flushed(backend: FileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which file a loss of power would leave is not known: nothing more is acknowledged."""
    with monkeypatch.context() as patch:
        Broken(patch, durable, "sync_dir", 1)
        with pytest.raises(DiskError):
            compact(backend)
    with pytest.raises(DiskError, match="Could not replace"):
        write_next(backend)
    assert files_beside(backend) == []
    backend.close()
    again = FileBackend(backend.url)
    again.open()
    assert again.version == FIRST
    write_next(again)
    again.close()


def test_change_that_does_not_replay(a_node: Node, stops: Stops) -> None:
    inode = a_node.path.stat().st_ino
    version = a_node.version + 1
    a_node.plugin.write(*support.change(version, "INSERT INTO nowhere VALUES (1)"))
    a_node.version += 1
    a_node.write(3)
    reason = f"the change to version {version} does not replay: no such table: nowhere"
    with pytest.raises(Refused, match=reason):
        a_node.plugin.call("backup-compact")
    assert a_node.plugin.logged(reason)
    assert not has_new_file(a_node, inode) and a_node.strays() == []
    a_node.write(3)
    found, healing, left = a_node.plugin.errors()
    assert reason in found and reason in healing and "Healing that" in healing
    assert "was not healed" in left and "the node's database is not there" in left
    assert (FileBackend(a_node.url).status().unsound or "nothing") in found


def test_damage_in_the_log(a_node: Node, stops: Stops) -> None:
    inode = a_node.path.stat().st_ino
    head, _ = support.records_of(a_node.path)[10]
    support.flip(a_node.path, head.end - 20)
    with pytest.raises(Refused, match=f"damaged at offset {head.offset}"):
        a_node.plugin.call("backup-compact")
    assert not has_new_file(a_node, inode) and a_node.strays() == []
    assert [f"at offset {head.offset}" in text for text in a_node.plugin.errors()] == [True]
    a_node.write(3)


UNSOUND = (
    "CREATE TABLE spoilt (a, b)",
    "CREATE INDEX spoilt_a ON spoilt (a)",
    "INSERT INTO spoilt VALUES (1, 2)",
)
SPOIL = (
    "UPDATE sqlite_master SET sql = 'CREATE INDEX spoilt_a ON spoilt (b)' WHERE name = 'spoilt_a'"
)


def spoil(backend: FileBackend) -> None:
    """Append a change after which SQLite's integrity_check complains."""
    statements = [
        # Holds while it is replayed, on a connection that has inserted a row, and never again.
        "CREATE TABLE spoilt (a CHECK (a = 0 OR last_insert_rowid() = 7))",
        *("INSERT INTO spoilt (rowid, a) VALUES (7, 0)", "INSERT INTO spoilt (a) VALUES (1)"),
    ]
    version = backend.version + 1
    backend.add_change(Change(version, None, [*statements, bump(version)]))


def test_snapshot_that_is_not_sound_while_the_old_one_was(backend: FileBackend) -> None:
    spoil(backend)
    for _ in range(2):
        write_next(backend)
    inode = os.stat(backend.path).st_ino
    with pytest.raises(BackupError, match="The new snapshot would not be sound: integrity_check"):
        compact(backend)
    assert os.stat(backend.path).st_ino == inode and files_beside(backend) == []


def spoilt_database(path: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for _, statements in support.first_changes(version):
            for statement in statements:
                connection.execute(statement)
        for statement in (*UNSOUND, "PRAGMA writable_schema = ON", SPOIL):
            connection.execute(statement)


def test_snapshot_that_is_no_worse_than_the_old_one(url: str, tmp_path: Path) -> None:
    wallet = tmp_path / "spoilt.sqlite3"
    spoilt_database(wallet, 5)
    assert database.integrity_problems(str(wallet)) != []
    found = FileBackend(url)
    found.create(Snapshot(str(wallet), 5))
    found.open()
    for _ in range(3):
        write_next(found)
    compact(found)
    assert found.version_count == 2 and files_beside(found) == []
    found.close()


def test_new_snapshot_against_an_old_sound_one(url: str, tmp_path: Path) -> None:
    wallet = tmp_path / "sound.sqlite3"
    support.apply_calls(wallet, support.first_changes(5))
    found = FileBackend(url)
    found.create(Snapshot(str(wallet), 5))
    found.open()
    spoil(found)
    write_next(found)
    content = Path(found.path).read_bytes()
    with pytest.raises(BackupError, match="would not be sound"):
        compact(found)
    assert Path(found.path).read_bytes() == content and files_beside(found) == []
    found.close()


def test_new_log_of_another_history_is_refused(backend: FileBackend, tmp_path: Path) -> None:
    other = support.make_backup(f"file://{tmp_path}/other.bkp", support.first_changes(FIRST + 5))
    last = support.records_of(other)[-1][0].offset
    copied = support.records_of(Path(backend.path))[-1][0].offset
    content = Path(backend.path).read_bytes()
    with pytest.raises(BackupError, match="does not stand for the same history"):
        backend.adopt(str(other), copied, last)
    assert Path(backend.path).read_bytes() == content
    write_next(backend)


def test_new_log_that_ends_early_is_refused(backend: FileBackend, tmp_path: Path) -> None:
    twin = tmp_path / "twin.bkp"
    twin.write_bytes(Path(backend.path).read_bytes())
    records = support.records_of(Path(backend.path))
    support.flip(Path(backend.path), records[-2][0].end - 20)
    offset = records[5][0].offset
    with pytest.raises(BackupError):
        backend.adopt(str(twin), offset, offset)
    assert backend._log is not None
    assert os.fstat(backend._log.file.fd).st_ino == os.stat(backend.path).st_ino


def test_session_goes_on_after_a_failed_compaction(backend: FileBackend) -> None:
    session = Session(backend, "/nowhere")
    with pytest.raises(BackupError):
        backend.adopt("/nowhere/at-all", 64, 64)
    session.write(Change(FIRST + 1, None, ["DELETE FROM items", bump(FIRST + 1)]))
    assert backend.version == FIRST + 1
