"""Compaction: what may be folded, when it is done, how it is asked for, what goes on beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import durable
import protocol
from backend import FOREIGN_KEYS_OFF, Change, Ending, Progress, Session, Snapshot, bump
from errors import BackupBusy, BackupError, ConfigError
from filebackend import FileBackend
from filelog.writer import check_log
from protocol import Decoder, Packet, PacketType
from socketbackend import SocketBackend
from tests import support
from tests.peers import free_port
from tests.stopping import Stops, compacting, eventually, is_running
from tests.support import ROOT, PluginProcess, Refused, run_cli
from upkeep import child, compaction
from upkeep.child import NICE
from upkeep.compaction import Compactor, Housekeeper, parse_least
from wallet import database, node, restore

FOREIGN_KEYS_ON = "PRAGMA foreign_keys = ON;"
Statistics = dict[str, dict[str, int]]


@pytest.fixture
def stops(tmp_path: Path) -> Stops:
    return Stops(tmp_path / "stops")


def compacted(url: str) -> Statistics:
    """Compact the backup of a stopped node at ``url`` in the real way."""
    with support.opened(url) as backend:
        return Compactor(backend, threading.Lock()).run()


def write(backend: FileBackend, calls: list[support.Call]) -> None:
    """Append one session of ``calls``."""
    session = Session(backend, "/nowhere")
    for version, statements in calls:
        session.write(Change(version, None, statements))


def restored(url: str, directory: Path) -> str:
    """A dump of the database that a restore of ``url`` gives."""
    return dump(restored_file(url, directory))


def restored_file(url: str, directory: Path) -> Path:
    """The database that a restore of ``url`` gives, a new file in ``directory``."""
    path = directory / f"restored-{len(list(directory.iterdir()))}.sqlite3"
    with contextlib.closing(FileBackend(url).read()) as reading:
        found = restore.restore(reading, str(path), False, lambda *_: None)
    assert found.problems == [] and not found.ending.torn_tail
    return path


def dump(path: Path) -> str:
    with database.opened(str(path)) as connection:
        return "\n".join(connection.iterdump())


def is_free(url: str) -> bool:
    """Whether nothing of a killed writer is left: its newborn child has its lock, too."""
    try:
        durable.WriterLock(FileBackend(url).path).release()
    except BackupBusy:
        return False
    return not compacting(url)


def strays(url: str) -> list[str]:
    """Files beside the backup that only a compaction makes."""
    path = Path(FileBackend(url).path)
    return [name for name in os.listdir(path.parent) if ".scratch-" in name]


# Every short history, compacted at every place in it


@dataclass
class Story:
    """What a node did, in letters, played on a backup and on plain Python sets.

    c: a change. s: a change of a new session. R: a new session that takes the last change
    back. o: PRAGMA foreign_keys = OFF. n: ON. On a server a new session needs no new start,
    but right after OFF it is the old one.
    """

    url: str
    on_server: bool = False
    version: int = 0
    tries: int = 0
    session: int = 0
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    """Letter, session and number of each call that counts."""
    rewindable: bool = False
    backend: FileBackend = field(init=False)

    def __post_init__(self) -> None:
        self.backend = FileBackend(self.url)

    def begin(self, snapshot: Path | None) -> None:
        self.backend.create(Snapshot(str(snapshot), 1) if snapshot else None)
        self.backend.open()
        if snapshot is not None:
            self.version = self.tries = 1
            self.calls.append(("c", 0, 1))

    def can(self, letter: str) -> bool:
        return letter != "R" or self.rewindable

    def play(self, letter: str) -> None:
        if letter in "sR":
            self._begin_session()
        if letter == "R":
            self.backend.rewind()
            self.calls.pop()
            self.version -= 1
        elif letter in "on":
            pragma = FOREIGN_KEYS_OFF if letter == "o" else FOREIGN_KEYS_ON
            self.backend.add_change(Change(self.version, None, [pragma]))
            self.calls.append((letter, self.session, 0))
        else:
            self.tries += 1
            self.version += 1
            self.backend.add_change(Change(self.version, None, self._statements()))
            self.calls.append(("c", self.session, self.tries))
        self.rewindable = letter in "cs"

    def _begin_session(self) -> None:
        if self.on_server:
            self.backend.begin_session()
            self.session += self.calls[-1:] == [] or self.calls[-1][0] != "o"
            return
        self.session += 1
        self.backend.close()
        self.backend = FileBackend(self.url)
        self.backend.open()

    def _statements(self) -> list[str]:
        made = any(letter == "c" for letter, _, _ in self.calls)
        return [*([] if made else TABLES), *rows(self.tries), bump(self.version)]

    def rows(self) -> tuple[list[int], list[int]]:
        """What stands in both tables: a child outlives its parent only where OFF held."""
        parents: set[int] = set()
        children: set[int] = set()
        before = ("", 0, 0)
        for call in self.calls:
            letter, session, number = call
            if letter == "c":
                if before[:2] != ("o", session):
                    children -= parents
                parents = {number}
                children.add(number)
            before = call
        return sorted(parents), sorted(children)


TABLES = (
    "CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)",
    "INSERT INTO vars VALUES ('data_version', 0)",
    "CREATE TABLE parents (id INTEGER PRIMARY KEY)",
    "CREATE TABLE children (id INTEGER PRIMARY KEY,"
    " parent INTEGER REFERENCES parents(id) ON DELETE CASCADE)",
)


def rows(number: int) -> list[str]:
    """Statements whose effect depends on what was there and on foreign_keys."""
    return [
        f"INSERT INTO parents VALUES ({number})",
        f"INSERT INTO children VALUES ({number}, {number})",
        f"DELETE FROM parents WHERE id < {number}",
    ]


def check_story(story: Story, directory: Path) -> None:
    """The backup holds what ``story`` tells."""
    beside = str(directory / "check.sqlite3")
    restore.remove_database(beside)
    assert story.backend.version == story.version
    assert story.backend.rewindable == story.rewindable
    if not story.calls:
        return
    with contextlib.closing(FileBackend(story.url).read()) as reading:
        if not any(letter == "c" for letter, _, _ in story.calls):
            return  # Idle PRAGMA calls alone restore to nothing at all.
        assert restore.build(reading, beside, False, lambda *_: None)[0].version == story.version
    with database.opened(beside) as connection:
        found = tuple(
            [row[0] for row in connection.execute(f"SELECT id FROM {table} ORDER BY id")]
            for table in ("parents", "children")
        )
    assert found == story.rows()


def compact_here(backend: FileBackend, meanwhile: Callable[[], None] = lambda: None) -> bool:
    """Compact within this process; whether there was something to fold.

    Args:
        meanwhile: called when the new log is written, before it is adopted.
    """
    prefix = f"{backend.scratch_prefix}compact"
    message = compaction.build(backend.path, prefix)
    meanwhile()
    newest = backend.newest
    if "copied" in message:
        backend.adopt(f"{prefix}-log", message["copied"], message["last"])
    compaction.remove_scratch(prefix)
    now = backend.newest
    assert (now.sequence, now.chain, now.version) == (
        newest.sequence,
        newest.chain,
        newest.version,
    )
    check_log(backend.path)
    return "copied" in message


def stories(length: int) -> Iterator[str]:
    """Every history of ``length`` letters that can be."""
    histories = [""]
    for _ in range(length):
        histories = [
            history + letter
            for history in histories
            for letter in "csRon"
            if letter != "R" or history[-1:] in ("c", "s")
        ]
    return iter(histories)


@pytest.fixture
def quick(unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without flushes and of few bytes, for a great many backups."""
    monkeypatch.setattr(durable, "flush", lambda fd: None)
    monkeypatch.setattr(durable, "sync_dir", lambda path: None)
    monkeypatch.setattr(durable, "PREALLOCATE_STEP", 4096)


def play(history: str, places: set[int], snapshot: Path | None, directory: Path) -> None:
    """Play ``history``, compact before the letters at ``places``, compare all along."""
    story = begun(Story(f"file://{directory}/story.bkp"), snapshot)
    try:
        for place, letter in enumerate([*history, ""]):
            if place in places:
                compact_here(story.backend)
                check_story(story, directory)
                assert not compact_here(story.backend), "nothing is left to fold"
            if letter:
                story.play(letter)
        check_story(story, directory)
    finally:
        story.backend.close()


def play_beside(history: str, place: int, lag: int, directory: Path) -> None:
    """Play ``history`` on a server; ``lag`` letters from ``place`` on come during a compaction."""

    def meanwhile() -> None:
        for letter in history[place : place + lag]:
            story.play(letter)

    story = begun(Story(f"file://{directory}/story.bkp", on_server=True), None)
    try:
        for letter in history[:place]:
            story.play(letter)
        compact_here(story.backend, meanwhile)
        check_story(story, directory)
        for letter in history[place + lag :]:
            story.play(letter)
        check_story(story, directory)
        compact_here(story.backend)
        check_story(story, directory)
    finally:
        story.backend.close()


def begun(story: Story, snapshot: Path | None) -> Story:
    """``story`` with a new file."""
    Path(story.backend.path).unlink(missing_ok=True)
    story.begin(snapshot)
    return story


@pytest.fixture
def first_snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "first.sqlite3"
    support.apply_calls(path, [(1, [*TABLES, *rows(1), bump(1)])])
    return path


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("with_snapshot", [False, True])
def test_every_short_history_compacted_at_every_place(
    with_snapshot: bool, fast_dir: Path, first_snapshot: Path
) -> None:
    snapshot = first_snapshot if with_snapshot else None
    for length in range(4):
        for history in stories(length):
            for place in range(length + 1):
                try:
                    play(history, {place}, snapshot, fast_dir)
                except BaseException:
                    print(f"history {history!r}, compacted at {place}")
                    raise


@pytest.mark.usefixtures("quick")
def test_what_comes_during_a_compaction_is_copied(fast_dir: Path) -> None:
    for length, places in ((3, ((1, 1), (1, 2), (2, 1))), (4, ((1, 3), (2, 1), (2, 2)))):
        for history in stories(length):
            for place, lag in places:
                try:
                    play_beside(history, place, lag, fast_dir)
                except BaseException:
                    print(f"history {history!r}, {lag} letters from {place} on meanwhile")
                    raise


@pytest.mark.usefixtures("quick")
def test_long_histories_compacted_again_and_again(fast_dir: Path, first_snapshot: Path) -> None:
    choice = random.Random(4)
    for number in range(150):
        history = ""
        while len(history) < 12:
            letter = choice.choice("ccsRRoon")
            if letter != "R" or history[-1:] in ("c", "s"):
                history += letter
        places = {place for place in range(13) if choice.random() < 0.4}
        print(f"history {history!r}, compacted at {places}")
        play(history, places, first_snapshot if number % 2 else None, fast_dir)


# The whole of it, with its process


def test_result_has_the_statistics_that_tools_know(
    url: str, tmp_path: Path, log_lines: pytest.LogCaptureFixture
) -> None:
    support.make_backup(url, support.first_changes(500))
    before = restored(url, tmp_path)
    size = FileBackend(url).status().size
    result = compacted(url)
    status = FileBackend(url).status()
    assert result == {
        "before": {"backupsize": size, "version_count": 500},
        "after": {"backupsize": status.size, "version_count": 2},
    }
    assert status.size is not None and size is not None and status.size < size / 2
    assert (status.version, status.prev_version, status.changes) == (500, 499, 1)
    assert restored(url, tmp_path) == before
    assert strays(url) == []
    assert f"Starting compaction of {size} bytes" in log_lines.text
    assert f"The compaction left {status.size} bytes" in log_lines.text


def test_sequence_chain_and_identity_go_on(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, support.first_changes(20))
    before = support.records_of(path)
    twin = tmp_path / "twin.bkp"
    twin.write_bytes(path.read_bytes())
    compacted(url)
    (snapshot, _), (newest, payload) = support.records_of(path)
    assert (snapshot.sequence, snapshot.chain) == (before[18][0].sequence, before[18][0].chain)
    assert snapshot.version == 19 and snapshot.session == before[18][0].session
    assert payload == before[19][1]
    for name in ("sequence", "chain", "chain_before", "session", "time_ns", "backup_id"):
        assert getattr(newest, name) == getattr(before[19][0], name)
    calls = [support.change(21, "INSERT INTO items VALUES (21, 'more')")]
    support.add_session(url, calls)
    support.add_session(f"file://{twin}", calls)
    mine, theirs = support.records_of(path)[-1][0], support.records_of(twin)[-1][0]
    assert (mine.sequence, mine.chain) == (theirs.sequence, theirs.chain)
    assert mine.sequence == 21


@pytest.mark.parametrize(
    ("history", "folded"),
    [
        ("", False),
        ("c", False),
        ("cR", False),
        ("o", False),
        ("cc", True),
        ("ccR", True),
        ("ccRc", True),
        ("ccRsRs", True),
        ("cco", True),
        ("ccoc", True),
        ("ccocn", True),
        ("ccos", True),
    ],
)
def test_special_backups_in_the_real_process(
    history: str, folded: bool, url: str, tmp_path: Path
) -> None:
    story = Story(url)
    story.begin(None)
    for letter in history:
        story.play(letter)
    story.backend.close()
    path = Path(story.backend.path)
    inode, content = path.stat().st_ino, path.read_bytes()
    result = compacted(url)
    assert (result["before"] != result["after"]) == folded == (path.stat().st_ino != inode)
    assert folded or path.read_bytes() == content
    assert strays(url) == []
    story.backend.open()
    check_story(story, tmp_path)
    for letter in "cRoc":
        story.play(letter)
        check_story(story, tmp_path)
    story.backend.close()


def test_only_a_snapshot_is_left_as_it_is(url: str, first_snapshot: Path) -> None:
    backend = FileBackend(url)
    backend.create(Snapshot(str(first_snapshot), 1))
    content = Path(backend.path).read_bytes()
    result = compacted(url)
    assert result["before"] == result["after"]
    assert result["after"]["version_count"] == 1
    assert Path(backend.path).read_bytes() == content


def test_off_and_its_change_stay_together(url: str) -> None:
    path = support.make_backup(url, support.first_changes(3))
    with support.opened(url) as backend:
        backend.add_change(Change(3, None, [FOREIGN_KEYS_OFF]))
        Compactor(backend, threading.Lock()).run()
        assert [payload for _, payload in support.records_of(path)[1:]] == [
            FOREIGN_KEYS_OFF.encode()
        ]
        backend.add_change(Change(4, None, [f"DELETE FROM items WHERE id = {2}", bump(4)]))
        Compactor(backend, threading.Lock()).run()
        assert [head.version for head, _ in support.records_of(path)] == [3, 3, 4]
        backend.add_change(Change(4, None, [FOREIGN_KEYS_ON]))
        Compactor(backend, threading.Lock()).run()
        assert [head.version for head, _ in support.records_of(path)] == [4]


def test_rewind_right_after_a_compaction(url: str, tmp_path: Path) -> None:
    support.make_backup(url, support.first_changes(9))
    compacted(url)
    with support.opened(url) as backend:
        # As after a crash between the hook and the commit: the same version, other content.
        write(backend, [support.change(9, "INSERT INTO items VALUES (900, 'other')")])
        assert backend.version == 9
    with database.opened(str(restored_file(url, tmp_path))) as connection:
        found = [row[0] for row in connection.execute("SELECT id FROM items")]
    assert found == [2, 3, 4, 5, 6, 7, 8, 900]


def test_open_file_is_the_file_at_the_path_after_every_swap(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, support.first_changes(5))
    inodes = [path.stat().st_ino]
    with support.opened(url) as backend:
        holder = path.open("rb")  # So that no inode's number comes again.
        for version in range(6, 12):
            Compactor(backend, threading.Lock()).run()
            assert backend._log is not None
            here, there = os.fstat(backend._log.file.fd), path.stat()
            assert (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)
            assert here.st_ino != inodes[-1]
            inodes.append(here.st_ino)
            write(backend, [support.change(version, f"INSERT INTO items VALUES ({version}, 'x')")])
            assert support.records_of(path)[-1][0].version == version
        holder.close()
    assert restored(url, tmp_path).count("'x'") == 6


def test_much_that_comes_meanwhile_is_copied_in_pieces(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.make_backup(url, support.first_changes(5))
    sizes: list[int] = []
    append = durable.LogFile.append

    def noted(file: durable.LogFile, offset: int, data: bytes) -> None:
        sizes.append(len(data))
        append(file, offset, data)

    def meanwhile() -> None:
        for version in range(6, 66):
            write(backend, [support.change(version, f"INSERT INTO items VALUES ({version}, 'x')")])
        sizes.clear()

    monkeypatch.setattr(durable, "COPY_SIZE", 2000)
    monkeypatch.setattr(durable.LogFile, "append", noted)
    with support.opened(url) as backend:
        compact_here(backend, meanwhile)
        assert len(sizes) > 5 and max(sizes) < 2500
        write(backend, [support.change(66, "INSERT INTO items VALUES (66, 'x')")])
    assert restored(url, tmp_path).count("'x'") == 61


def test_no_descriptor_is_left_open(url: str) -> None:
    path = support.make_backup(url, support.first_changes(5))
    with support.opened(url) as backend:
        before = {name for name in support.open_files() if not name.endswith(path.name)}
        for version in range(6, 9):
            write(backend, [support.change(version, f"INSERT INTO items VALUES ({version}, 'x')")])
            Compactor(backend, threading.Lock()).run()
        after = {name for name in support.open_files() if not name.endswith(path.name)}
        assert after <= before


def open_inodes() -> set[int]:
    """The files that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.stat(f"/proc/self/fd/{name}").st_ino)
    return found


def test_another_backup_took_its_place_meanwhile(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.make_backup(url, support.first_changes(5))
    run_cli("restore", url, tmp_path / "node.sqlite3")
    follow = Compactor._follow

    def healed(process: child.Child, progress: Progress) -> object:
        ready = follow(process, progress)
        backend.replace(Snapshot(str(tmp_path / "node.sqlite3"), 5))
        return ready

    monkeypatch.setattr(Compactor, "_follow", staticmethod(healed))
    with support.opened(url) as backend:
        with pytest.raises(BackupError, match="took the place") as caught:
            Compactor(backend, threading.Lock()).run()
        assert "damaged" not in str(caught.value)
        write(backend, [support.change(6, "INSERT INTO items VALUES (6, 'x')")])
    assert "'x'" in restored(url, tmp_path)


class WatchedLock:
    """A lock that notes which files are open when it is let go."""

    def __init__(self) -> None:
        self.inodes: set[int] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.inodes = open_inodes()


def test_old_log_is_freed_when_no_change_waits(url: str) -> None:
    path = support.make_backup(url, support.first_changes(5))
    inode, lock = path.stat().st_ino, WatchedLock()
    with support.opened(url) as backend:
        Compactor(backend, lock).run()  # type: ignore[arg-type]
    assert inode in lock.inodes
    assert inode not in open_inodes()


def test_scratch_database_is_flushed_in_steps(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    support.make_backup(url, support.first_changes(200))
    flushed: list[str] = []
    monkeypatch.setattr(
        durable, "flush", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    monkeypatch.setattr(child, "FLUSH_STEP", 4000)
    with support.opened(url) as backend:
        assert compact_here(backend)
    assert sum(name.endswith("-new.sqlite3") for name in flushed) >= 12


def test_reader_that_began_before_finishes(url: str, tmp_path: Path) -> None:
    calls = support.first_changes(300)
    support.make_backup(url, calls)
    with support.opened(url) as backend, contextlib.closing(backend.read()) as reading:
        steps = iter(reading)
        seen = [next(steps) for _ in range(3)]
        Compactor(backend, threading.Lock()).run()
        write(backend, [support.change(301, "INSERT INTO items VALUES (301, 'x')")])
        Compactor(backend, threading.Lock()).run()
        seen += steps
    *changes, (ending, _, _) = seen
    assert [step.found for step in changes] == [Change(version, None, s) for version, s in calls]
    assert isinstance(ending, Ending) and ending.version == 300
    assert ending.damage is None and not ending.torn_tail


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The sizes that a file was cut to, in steps of 1000 bytes."""
    with open(tmp_path / "leased", "w") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except (OSError, AttributeError) as error:
            pytest.skip(f"this file system tells nobody who has a file open: {error}")
    os.unlink(tmp_path / "leased")
    sizes: list[int] = []
    truncate = os.ftruncate

    def note(fd: int, size: int) -> None:
        sizes.append(size)
        truncate(fd, size)

    monkeypatch.setattr(durable, "FREE_STEP", 1000)
    monkeypatch.setattr(os, "ftruncate", note)
    return sizes


def test_space_of_the_old_log_is_given_back_in_steps(tmp_path: Path, given_back: list[int]) -> None:
    path, new = tmp_path / "node.bkp", tmp_path / "new"
    path.write_bytes(bytes(2500))
    new.write_bytes(b"new")
    with durable.giving_back(str(path)):
        new.replace(path)
    assert given_back == [2000, 1000, 0] and path.read_bytes() == b"new"


@pytest.mark.parametrize("why", ["has its name", "has another name", "is being read", "failed"])
def test_old_log_in_use_is_left_whole(why: str, tmp_path: Path, given_back: list[int]) -> None:
    path, new, other = tmp_path / "node.bkp", tmp_path / "new", tmp_path / "other"
    content = os.urandom(2500)
    path.write_bytes(content)
    new.write_bytes(b"new")
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(open(path, "rb"))
        if why != "is being read":
            reader.close()
        if why == "has another name":
            os.link(path, other)
        if why == "failed":
            stack.enter_context(contextlib.suppress(RuntimeError))
        with durable.giving_back(str(path)):
            if why != "has its name":
                new.replace(path)
            if why == "failed":
                raise RuntimeError
        assert why != "is being read" or reader.read() == content
    assert given_back == []
    assert why != "has its name" or path.read_bytes() == content
    assert why != "has another name" or other.read_bytes() == content


def test_opening_a_file_that_is_given_back_does_no_harm(tmp_path: Path) -> None:
    """The kernel tells the process of it by a signal, whose default would be to end it."""
    code = (
        "import os, subprocess, sys, durable\n"
        "path = sys.argv[1]\n"
        "durable.FREE_STEP, durable.FREE_PAUSE_S = 1 << 10, 0.3\n"
        "with durable.giving_back(path):\n"
        "    held = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')]\n"
        "    name = next(n for n in held if os.path.realpath(n) == path)\n"
        "    name = name.replace('self', str(os.getpid()))\n"
        "    os.unlink(path)\n"
        "    reader = subprocess.Popen(['sh', '-c', f'sleep 0.2; cat {name} >/dev/null'])\n"
        "sys.exit(reader.wait() and 9)\n"
    )
    path = tmp_path / "node.bkp"
    path.write_bytes(bytes(4096))
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=60)
    assert done.returncode == 0


def test_scratch_file_with_another_name_is_left_whole(
    tmp_path: Path, given_back: list[int]
) -> None:
    """A rename that the system calls failed may have happened all the same."""
    path = tmp_path / "node.bkp"
    path.write_bytes(bytes(2500))
    os.link(path, f"{path}.scratch-compact-1-log")
    compaction.remove_scratch(f"{path}.scratch-compact-1")
    assert given_back == [] and path.read_bytes() == bytes(2500)
    assert os.listdir(tmp_path) == ["node.bkp"]


def test_housekeeper_that_was_stopped_begins_nothing(household: Household) -> None:
    household.log_size = 1000
    household.clock = Clock(100)
    household.monkeypatch.setattr(compaction, "time", household.clock)
    housekeeper = Housekeeper(household, household, 100)  # type: ignore[arg-type]
    housekeeper.stop()
    housekeeper._run()
    assert household.at == []


def test_scratch_files_are_given_back_in_steps(tmp_path: Path, given_back: list[int]) -> None:
    prefix = str(tmp_path / "node.bkp.scratch-compact-1")
    for name in ("-log", "-new.sqlite3"):
        Path(prefix + name).write_bytes(bytes(1500))
    compaction.remove_scratch(prefix)
    assert given_back == [1000, 0] * 2 and os.listdir(tmp_path) == []


def test_child_ends_by_itself_without_a_sound(url: str, tmp_path: Path) -> None:
    """It says what became of it and exits with 0 while its stdin is still open."""
    path = support.make_backup(url, support.first_changes(5))
    for number in range(2):
        command = [
            sys.executable,
            str(ROOT / "upkeep" / "compaction.py"),
            str(path),
            f"{path}.scratch-{number}",
        ]
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe
        ) as child:
            assert child.wait(timeout=support.ANSWER_S) == 0
            assert child.stdout is not None and child.stderr is not None
            assert set(json.loads(child.stdout.read())) == {"copied", "last", "sound"}
            assert child.stderr.read() == b""


def test_child_ends_with_its_parent(url: str, stops: Stops) -> None:
    path = support.make_backup(url, support.first_changes(5))
    stops.at("replayed")
    child = subprocess.Popen(
        [*stops.program, str(path), f"{path}.scratch-x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert stops.reached("replayed") == child.pid
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == NICE
    assert child.stdin is not None and child.stdout is not None
    child.stdin.close()
    assert child.wait(timeout=support.ANSWER_S) == 1
    child.stdout.close()


def test_command_ends_at_ctrl_c(url: str, stops: Stops) -> None:
    path = support.make_backup(url, support.first_changes(5))
    before = path.read_bytes()
    stops.at("replayed")
    command = subprocess.Popen(
        [*stops.cli, "compact", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    child = stops.reached("replayed")
    groups = os.getpgid(child), os.getpgid(command.pid)
    os.killpg(command.pid, signal.SIGINT)
    output, _ = command.communicate(timeout=support.ANSWER_S)
    assert groups[0] != groups[1]  # A terminal signals a whole group.
    assert command.returncode == 128 + signal.SIGINT
    assert output.splitlines()[-1] == "Stopped by SIGINT." and "Traceback" not in output
    assert not is_running(child)
    assert path.read_bytes() == before and strays(url) == []


# When


@pytest.mark.parametrize(
    ("value", "least"),
    [
        (None, 64 << 20),
        ("off", None),
        (0, 0),
        (1000, 1000),
        ("1000", 1000),
        ("1000B", 1000),
        ("5k", 5000),
        ("5kB", 5000),
        ("5 kB", 5000),
        ("5kiB", 5 << 10),
        ("256MiB", 256 << 20),
        ("256 MiB", 256 << 20),
        ("2GB", 2 * 10**9),
        ("1TiB", 1 << 40),
    ],
)
def test_parse_least(value: object, least: int | None) -> None:
    assert parse_least(value) == least


@pytest.mark.parametrize(
    "value",
    [
        *("", "on", "OFF", "-1", -1, 1.5, True, False, "1.5G", "5  kB", "5KB", "5 XB"),
        *("9" * 16, ["off"], {}, "5kB\n", "٥"),
    ],
)
def test_parse_least_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match='Use "off" or a size'):
        parse_least(value)


class Over(Exception):
    """The made-up time is over."""


class Clock:
    """Stands for the module time; ``Over`` once ``end`` has passed."""

    def __init__(self, end: float) -> None:
        self.now = 1000.0
        self._end = self.now + end

    def monotonic(self) -> float:
        return self.now

    def sleep(self, pause_s: float) -> None:
        self.now += pause_s
        if self.now > self._end:
            raise Over


Usage = namedtuple("Usage", "total used free")
GIB = 1 << 30


@dataclass
class Household:
    """A Housekeeper over figures, and what it did: the times at which it compacted."""

    monkeypatch: pytest.MonkeyPatch
    log_size: int = 0
    snapshot_size: int = 0
    path: str = "/mnt/node.bkp"
    free: int = 100 * GIB
    error: BackupError | None = None
    checks: list[float] = field(default_factory=list)
    """The times at which it was asked whether a check is due."""
    check_is_due: bool = True
    at: list[float] = field(default_factory=list)

    def run(self) -> Statistics:
        """In place of Compactor.run."""
        self.at.append(self.clock.now - 1000)
        if self.error is not None:
            raise self.error
        self.snapshot_size, self.log_size = self.log_size, 0
        return {}

    @property
    def scrubber(self) -> Household:
        return self

    def run_if_due(self) -> bool:
        """In place of Scrubber.run_if_due."""
        self.checks.append(self.clock.now - 1000)
        return self.check_is_due

    def live(self, seconds: float, least: int | None) -> list[float]:
        self.clock = Clock(seconds)
        self.monkeypatch.setattr(compaction, "time", self.clock)
        self.monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(200 * GIB, 0, self.free))
        with pytest.raises(Over):
            Housekeeper(self, self, least)._run()  # type: ignore[arg-type]
        return self.at


@pytest.fixture
def household(monkeypatch: pytest.MonkeyPatch) -> Household:
    return Household(monkeypatch)


def test_nothing_in_the_first_minute(household: Household) -> None:
    household.log_size = 1 * GIB
    assert household.live(59, 64 << 20) == []
    assert household.live(70, 64 << 20) == [60]


@pytest.mark.parametrize(
    ("log_size", "snapshot_size", "least", "is_due"),
    [
        (101, 0, 100, True),
        (100, 0, 100, False),
        (101, 100, 100, True),
        (101, 101, 100, False),
        (99, 0, 100, False),
        (1 * GIB, 0, None, False),
        (1, 0, 0, True),
        (0, 0, 0, False),
    ],
)
def test_due_when_changes_outgrow_the_snapshot_and_the_least(
    log_size: int, snapshot_size: int, least: int | None, is_due: bool, household: Household
) -> None:
    household.log_size, household.snapshot_size = log_size, snapshot_size
    assert bool(household.live(300, least)) == is_due


def test_due_again_when_it_has_grown_again(household: Household) -> None:
    household.log_size = 200
    household.live(100, 100)
    assert household.at == [60]
    household.log_size = 201
    household.at.clear()
    assert household.live(100, 100) == [60]


def test_too_little_disk_is_told_and_tried_an_hour_later(
    household: Household, log_lines: pytest.LogCaptureFixture
) -> None:
    household.log_size, household.free = 90 * GIB, 170 * GIB
    assert household.live(3700, 100) == []
    told = [text for text in log_lines.messages if "should be compacted" in text]
    assert len(told) == 2
    assert f"{180 << 10} MiB" in told[0] and f"{170 << 10} MiB are free" in told[0]
    household.free = 190 * GIB
    assert household.live(100, 100) == [60]


def test_checks_are_not_in_the_first_minute_and_not_put_off_by_compactions(
    household: Household,
) -> None:
    household.log_size, household.error = 1000, BackupError("No.")
    household.live(59, None)
    assert household.checks == []
    household.live(7400, 100)
    assert household.checks == [60, 3660, 7260]
    household.check_is_due = False
    household.checks.clear()
    household.live(70, None)
    assert household.checks == [60, 65, 70]


def test_failure_is_tried_again_an_hour_later(household: Household) -> None:
    household.log_size, household.error = 1000, BackupError("No.")
    at = household.live(7400, 100)
    assert at == [60, 3660, 7260]


def test_disk_that_fills_up_is_a_warning_every_ten_minutes(
    household: Household, log_lines: pytest.LogCaptureFixture
) -> None:
    household.free = GIB // 4
    household.live(1300, 100)
    told = [text for text in log_lines.messages if "nearly full" in text]
    assert len(told) == 3
    assert f"256 MiB of {200 << 10} MiB are free" in told[0]
    assert all(record.levelname == "WARNING" for record in log_lines.records)


def test_disk_with_room_is_no_warning(
    household: Household, log_lines: pytest.LogCaptureFixture
) -> None:
    household.free = 11 * GIB
    household.live(1300, 100)
    assert log_lines.messages == []


def test_disk_that_cannot_be_looked_at_is_told(
    household: Household, log_lines: pytest.LogCaptureFixture
) -> None:
    def fail(path: str) -> Usage:
        raise OSError(5, "Input/output error")

    household.log_size = 1000
    household.clock = Clock(100)
    household.monkeypatch.setattr(compaction, "time", household.clock)
    household.monkeypatch.setattr(shutil, "disk_usage", fail)
    with pytest.raises(Over):
        Housekeeper(household, household, 100)._run()  # type: ignore[arg-type]
    assert household.at == []
    assert sum("cannot be looked at" in text for text in log_lines.messages) == 2


# Through the plugin


def set_up(directory: Path, url: str, compact: object = None) -> None:
    """A backup.lock in ``directory`` for the new backup at ``url``."""
    FileBackend(url).create(None)
    node.write_lock_file(str(directory), node.LockFile(url, compact))


@contextlib.contextmanager
def running(directory: Path, calls: list[support.Call], stops: Stops) -> Iterator[PluginProcess]:
    """A plugin that has stored ``calls``; it must end without an error."""
    with PluginProcess(directory, stops.program) as plugin:
        plugin.manifest()
        for call in calls:
            plugin.write(*call)
        yield plugin
        assert plugin.close() == 0
        assert plugin.errors() == []


def item(version: int) -> support.Call:
    return support.change(version, f"INSERT INTO items VALUES ({version}, 'item {version}')")


def test_requests_are_answered_while_a_compaction_runs(
    node_dir: Path, url: str, tmp_path: Path, stops: Stops
) -> None:
    set_up(node_dir, url)
    stops.at("replayed")
    with running(node_dir, support.first_changes(20), stops) as plugin:
        plugin.init(node_dir)
        compact = plugin.send("backup-compact", {})
        stops.reached("replayed")
        assert plugin.logged("Starting compaction")
        for version in range(21, 31):
            plugin.write(*item(version))
        with pytest.raises(Refused, match="A compaction is running already"):
            plugin.call("backup-compact")
        status = plugin.call("backup-status")
        assert (status["version"], status["changes_this_session"]) == (30, 30)
        plugin.write(*item(31))
        assert not plugin.answered(compact)
        stops.go("replayed")
        result = plugin.answer(compact)
        assert result["before"]["version_count"] == 20
        assert result["after"]["version_count"] == 13, "the snapshot, and changes 20 to 31"
        plugin.write(*item(32))
        assert plugin.call("backup-compact")["after"]["version_count"] == 2
    assert "item 32" in restored(url, tmp_path)
    assert strays(url) == []


def test_what_comes_after_the_verification_is_copied(
    node_dir: Path, url: str, tmp_path: Path, stops: Stops
) -> None:
    set_up(node_dir, url)
    stops.at("verified")
    with running(node_dir, support.first_changes(20), stops) as plugin:
        compact = plugin.send("backup-compact", {})
        stops.reached("verified")
        for version in range(21, 31):
            plugin.write(*item(version))
        stops.go("verified")
        assert plugin.answer(compact)["after"]["version_count"] == 12
        plugin.write(*item(31))
    found = restored(url, tmp_path)
    assert [version for version in range(2, 32) if f"'item {version}'" in found] == [*range(2, 32)]


def test_figures_of_backup_status(node_dir: Path, url: str, stops: Stops) -> None:
    set_up(node_dir, url)
    with running(node_dir, support.first_changes(20), stops) as plugin:
        status = plugin.call("backup-status")
        told = json.loads(support.run_cli("status", "--json", url).stdout)
        for name in set(told) - {"disk_free", "warnings"}:
            assert status[name] == told[name], name
        assert status["changes_this_session"] == 20
        assert 0 < status["median_hook_ms"] <= status["worst_hook_ms"] < 120_000
        assert status["last_error"] is None and status["reconnects"] == 0


def test_status_before_the_first_write(node_dir: Path, stops: Stops) -> None:
    with running(node_dir, [], stops) as plugin:
        assert plugin.call("backup-status")["changes_this_session"] == 0
        with pytest.raises(Refused, match="The backup is not open yet"):
            plugin.call("backup-compact")


def test_progress_notifications(node_dir: Path, url: str, stops: Stops) -> None:
    set_up(node_dir, url)
    text = "x" * 400_000
    calls = support.first_changes(2)
    for version in range(3, 13):
        calls.append(support.change(version, f"INSERT INTO items VALUES ({version}, '{text}')"))
    with running(node_dir, calls, stops) as plugin:
        number = plugin.send("backup-compact", {})
        plugin.answer(number)
        told = [m["params"] for m in plugin.notifications if m["method"] == "progress"]
    assert len(told) == 3
    assert all(params["id"] == number for params in told)
    done = [params["num"] for params in told]
    assert done == sorted(done) and done[0] >= 1 << 20
    assert len({params["total"] for params in told}) == 1 and done[-1] <= told[-1]["total"]


def test_size_in_backup_lock_compacts_by_itself(
    node_dir: Path, url: str, tmp_path: Path, stops: Stops
) -> None:
    set_up(node_dir, url, "4 kB")
    stops.set(compaction__FIRST_AFTER_S=0, compaction__PAUSE_S=0.01)
    with running(node_dir, support.first_changes(20), stops) as plugin:
        eventually(lambda: plugin.logged("The compaction left"))
        plugin.write(*item(21))
    assert Path(FileBackend(url).path).read_bytes().count(b"SQLite format 3\0") == 1
    assert "item 21" in restored(url, tmp_path)


@pytest.mark.parametrize("compact", ["off", None, "1 GB"])
def test_not_due_by_backup_lock(compact: object, node_dir: Path, url: str, stops: Stops) -> None:
    set_up(node_dir, url, compact)
    stops.set(compaction__FIRST_AFTER_S=0, compaction__PAUSE_S=0.01)
    with running(node_dir, support.first_changes(20), stops) as plugin:
        looks = plugin.log.count(("info", "due: False"))
        eventually(lambda: plugin.log.count(("info", "due: False")) > looks + 3)
        assert not plugin.logged("due: True") and not plugin.logged("Starting compaction")


def test_wrong_size_in_backup_lock_is_refused(node_dir: Path, url: str) -> None:
    set_up(node_dir, url, "much")
    with PluginProcess(node_dir) as plugin:
        plugin.manifest()
        with pytest.raises(Refused):
            plugin.write(*support.first_changes(1)[0])
        assert any("compact is 'much'." in error for error in plugin.errors())


def test_command_beside_a_running_node_is_refused(node_dir: Path, url: str, stops: Stops) -> None:
    set_up(node_dir, url)
    with running(node_dir, support.first_changes(20), stops) as plugin:
        path = Path(FileBackend(url).path)
        before = path.read_bytes()
        refused = support.run_cli("compact", url, check=1)
        assert "lightning-cli backup-compact" in refused.stderr
        assert f"(pid {plugin.process.pid})" in refused.stderr
        assert path.read_bytes() == before and strays(url) == []
    result = json.loads(support.run_cli("compact", url).stdout)
    assert result["before"]["version_count"] == 20 and result["after"]["version_count"] == 2


class Nonstop:
    """Asks a plugin for one compaction after the other."""

    def __init__(self) -> None:
        self.runs = 0
        self._pending: int | None = None

    def step(self, plugin: PluginProcess) -> None:
        """Look for an answer, and ask again."""
        if self._pending is not None and plugin.answered(self._pending):
            self.finish(plugin)
        if self._pending is None:
            self._pending = plugin.send("backup-compact", {})

    def finish(self, plugin: PluginProcess) -> None:
        """Wait for the last answer."""
        if self._pending is not None:
            assert set(plugin.answer(self._pending)) == {"before", "after"}
            self._pending = None
            self.runs += 1

    def forget(self) -> None:
        """The plugin is gone."""
        self._pending = None


def test_traffic_goes_on_while_compactions_run_back_to_back(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    set_up(node_dir, url)
    nonstop = Nonstop()
    for calls in support.trace_sessions("payer"):
        with PluginProcess(node_dir) as plugin:
            plugin.manifest()
            for call in calls:
                plugin.write(*call)
                nonstop.step(plugin)
            nonstop.finish(plugin)
            assert plugin.close() == 0
            assert plugin.errors() == []
    assert nonstop.runs >= 2
    recorded = support.trace_database("payer", tmp_path)
    assert database.compare(str(recorded), str(restored_file(url, tmp_path))) == []
    assert strays(url) == []


def test_crashing_node_while_compactions_run_back_to_back(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    """The recorded node was killed again and again; so is the plugin, in mid-compaction."""
    set_up(node_dir, url)
    nonstop = Nonstop()
    sessions = support.trace_sessions("crash")
    for number, calls in enumerate(sessions):
        if number % 8:  # A start of the plugin takes long; the others go the short way.
            with support.opened(url) as backend:
                write(backend, calls)
                if number % 8 == 4:
                    compact_here(backend)
            continue
        with PluginProcess(node_dir) as plugin:
            plugin.manifest()
            for call in calls:
                plugin.write(*call)
                nonstop.step(plugin)
            plugin.kill()
            nonstop.forget()
            eventually(lambda: is_free(url), "the end of the compacting process")
    recorded = support.trace_database("crash", tmp_path)
    assert database.compare(str(recorded), str(restored_file(url, tmp_path))) == []
    with support.opened(url):
        assert strays(url) == []


# On a server


@contextlib.contextmanager
def serving(url: str, stops: Stops, *options: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """A server of the backup at ``url``: its socket URL, and a function for its log."""
    address = f"127.0.0.1:{free_port()}"
    lines: list[str] = []
    process = subprocess.Popen(
        [*stops.cli, "server", *options, url, address], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    stream = process.stderr
    thread = threading.Thread(target=lambda: lines.extend(stream))
    thread.start()
    try:
        eventually(lambda: any("serving" in line for line in lines))
        yield f"socket:{address}", lambda: "".join(lines)
    finally:
        process.terminate()
        assert process.wait(timeout=support.ANSWER_S) == 0
        thread.join()
        stream.close()


def test_server_compacts_by_its_option(url: str, stops: Stops) -> None:
    support.make_backup(url, support.first_changes(20))
    stops.set(compaction__FIRST_AFTER_S=0, compaction__PAUSE_S=0.01)
    with serving(url, stops, "--compact", "4kB") as (_, log):
        eventually(lambda: "The compaction left" in log())
    assert FileBackend(url).status().version_count == 2


def test_server_leaves_it_by_its_option(url: str, stops: Stops) -> None:
    support.make_backup(url, support.first_changes(20))
    stops.set(compaction__FIRST_AFTER_S=0, compaction__PAUSE_S=0.01)
    with serving(url, stops, "--compact", "off") as (_, log):
        eventually(lambda: log().count("due: False") > 3)
        assert "Starting compaction" not in log()
    assert FileBackend(url).status().version_count == 20


def test_server_refuses_a_wrong_size(url: str) -> None:
    support.make_backup(url)
    refused = support.run_cli("server", "--compact", "1x", url, "127.0.0.1:1", check=1)
    assert "compact is '1x'." in refused.stderr


def test_command_over_a_socket(url: str, tmp_path: Path, stops: Stops) -> None:
    support.make_backup(url, support.first_changes(50))
    size = FileBackend(url).status().size
    before = restored(url, tmp_path)
    with serving(url, stops) as (socket_url, log):
        result = json.loads(support.run_cli("compact", socket_url).stdout)
        assert result["before"] == {"backupsize": size, "version_count": 50}
        assert result["after"]["version_count"] == 2
        eventually(lambda: "Starting compaction" in log())
        refused = support.run_cli("compact", url, check=1)
        assert "compact socket:" in refused.stderr
    assert restored(url, tmp_path) == before


def ask(socket_url: str, packet: bytes) -> Packet:
    """Send one packet to the server, and read one."""
    host, port = socket_url.removeprefix("socket:").split(":")
    with socket.create_connection((host, int(port)), timeout=support.ANSWER_S) as connection:
        connection.sendall(packet)
        decoder = Decoder(protocol.TO_CLIENT)
        while data := connection.recv(65536):
            for event in decoder.feed(data):
                assert isinstance(event, Packet)
                return event
    raise AssertionError("the server hung up")


def test_packet_and_a_second_request(url: str, stops: Stops) -> None:
    support.make_backup(url, support.first_changes(50))
    stops.at("replayed")
    with serving(url, stops) as (socket_url, log):
        answers: list[Packet] = []
        first = threading.Thread(
            target=lambda: answers.append(ask(socket_url, protocol.encode(PacketType.COMPACT)))
        )
        first.start()
        stops.reached("replayed")
        second = ask(socket_url, protocol.encode(PacketType.COMPACT))
        assert second == Packet(PacketType.NACK, protocol.VERSION.pack(50))
        eventually(lambda: "A compaction is running already." in log())
        refused = support.run_cli("compact", socket_url, check=1)
        assert "A compaction is running already." in refused.stderr
        stops.go("replayed")
        first.join(support.ANSWER_S)
    assert answers[0].type is PacketType.COMPACT_RES
    result = json.loads(answers[0].payload)
    assert result["after"]["version_count"] == 2


def test_remote_node_writes_while_the_server_compacts(
    url: str, node_dir: Path, tmp_path: Path, stops: Stops
) -> None:
    support.make_backup(url)
    stops.at("snapshot-written")
    with serving(url, stops) as (socket_url, _):
        node.write_lock_file(str(node_dir), node.LockFile(socket_url))
        with PluginProcess(node_dir) as plugin:
            plugin.manifest()
            for call in support.first_changes(30):
                plugin.write(*call)
            compact = plugin.send("backup-compact", {})
            stops.reached("snapshot-written")
            for version in range(31, 41):
                plugin.write(*item(version))
            stops.go("snapshot-written")
            assert plugin.answer(compact)["after"]["version_count"] == 12
            plugin.write(*item(41))
            assert plugin.call("backup-status")["version"] == 41
            assert plugin.errors() == []
    found = restored(url, tmp_path)
    assert [version for version in range(2, 42) if f"'item {version}'" in found] == [*range(2, 42)]


def test_readers_over_a_socket_while_the_server_compacts(
    url: str, tmp_path: Path, stops: Stops
) -> None:
    text = "x" * 500_000
    calls = support.first_changes(3)
    for version in range(4, 44):
        calls.append(support.change(version, f"INSERT INTO items VALUES ({version}, '{text}')"))
    support.make_backup(url, calls)
    stops.at("replayed")
    with serving(url, stops) as (socket_url, _):
        # More than the sockets hold: the server is still reading the old file.
        before = SocketBackend(socket_url).read()
        steps = iter(before)
        seen = [next(steps)]
        answer = threading.Thread(target=SocketBackend(socket_url).compact)
        answer.start()
        stops.reached("replayed")
        beside = tmp_path / "beside.sqlite3"
        support.run_cli("restore", socket_url, beside)
        stops.go("replayed")
        answer.join(support.ANSWER_S)
        assert FileBackend(url).status().version_count == 2
        seen += steps
        before.close()
        after = tmp_path / "after.sqlite3"
        support.run_cli("restore", socket_url, after)
    assert [step.found for step in seen[:-1]] == [Change(version, None, s) for version, s in calls]
    node_database = tmp_path / "node.sqlite3"
    support.apply_calls(node_database, calls)
    for found in (beside, after):
        assert database.compare(str(node_database), str(found)) == []
