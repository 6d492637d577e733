"""A disk that fails at the n-th call, for every n, and one that loses power there.

``Disk`` stands in for the module ``os`` in durable.py. It keeps apart what a file shows and
what would be left of it after a loss of power: data only once flushed, names only once
their directory was flushed. After a failed flush the dirty pages are gone, and a later
flush does not bring them back: so do Linux file systems.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import durable
from backend import FOREIGN_KEYS_OFF, Change, Snapshot
from errors import BackupError, BackupExists, DiskError
from filebackend import FileBackend
from filelog import appender
from filelog import reader as logreader
from tests import support
from tests.support import Call

SECTOR = 512
KEEPS: dict[str, Callable[[int, int], bool]] = {
    "nothing": lambda sector, count: False,
    "the first half": lambda sector, count: sector < count // 2,
    "the last half": lambda sector, count: sector >= count // 2,
    "every other sector": lambda sector, count: sector % 2 == 1,
    "everything": lambda sector, count: True,
}
"""Which sectors of a write that was not flushed are left, of so many."""


class PowerCut(BaseException):
    """The machine is off."""


class Disk:
    """Stands in for ``os``.

    Args:
        directory: where all files are.
        fail_at: number of the call that fails, from 1; 0 for none.
        error: errno of the failure, or 0 for a loss of power.
        for_good: whether every later call fails, too.
        keeps: what is left of data that was not flushed (see KEEPS).
        short: whether every write stops half-way.
        links: whether the file system has hard links.
    """

    def __init__(
        self,
        directory: Path,
        fail_at: int = 0,
        error: int = errno.EIO,
        for_good: bool = False,
        keeps: str = "nothing",
        short: bool = False,
        links: bool = True,
    ) -> None:
        self.directory = directory
        self.calls: list[str] = []
        self.failed = 0
        self._fail_at, self._error, self._for_good = fail_at, error, for_good
        self._keeps, self._short, self._links = keeps, short, links
        self._off = False
        self._stable: dict[int, bytearray] = {}
        self._dirty: dict[int, list[range]] = {}
        self._names = self._names_now()
        self._latest: tuple[str, str] | None = None
        for path in directory.iterdir():
            self._stable[path.stat().st_ino] = bytearray(path.read_bytes())

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _names_now(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self.directory.iterdir()}

    def _step(self, name: str) -> bool:
        """Count a call; whether it is to fail."""
        if self._off:
            raise PowerCut
        self.calls.append(name)
        fails = len(self.calls) == self._fail_at
        fails |= self._for_good and len(self.calls) > self._fail_at > 0
        self.failed += fails
        if fails and not self._error:
            self._off = True
        return fails

    def _fail(self) -> None:
        if not self._error:
            raise PowerCut
        raise OSError(self._error, os.strerror(self._error))

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if self._off:
            raise PowerCut
        fd = os.open(path, flags, mode)
        if flags & os.O_EXCL:  # A number of an inode may be used again.
            self._stable[os.fstat(fd).st_ino] = bytearray()
            self._dirty[os.fstat(fd).st_ino] = []
        return fd

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        fails = self._step("pwrite")
        part = bytes(data)
        if fails or (self._short and len(part) > 1):
            part = part[: len(part) // 2]
        os.pwrite(fd, part, offset)
        sectors = range(offset // SECTOR, (offset + len(part) - 1) // SECTOR + 1)
        self._dirty.setdefault(os.fstat(fd).st_ino, []).append(sectors)
        if fails:
            self._fail()
        return len(part)

    def fdatasync(self, fd: int) -> None:
        if self._step("fdatasync"):
            self._write_back(fd, self._keeps)
            self._fail()
        self._write_back(fd, "everything")

    def fsync(self, fd: int) -> None:
        assert stat.S_ISDIR(os.fstat(fd).st_mode)
        fails = self._step("fsync")
        if not fails or self._keeps == "everything":
            self._names, self._latest = self._names_now(), None
        if fails:
            self._fail()

    def link(self, source: str, target: str) -> None:
        if self._step("link"):
            self._fail()
        if not self._links:
            raise OSError(errno.EPERM, "no hard links here")
        os.link(source, target)
        self._latest = "", target

    def rename(self, source: str, target: str) -> None:
        if self._step("rename"):
            self._fail()
        os.rename(source, target)
        self._latest = source, target

    def unlink(self, path: str) -> None:
        if self._off:
            raise PowerCut
        os.unlink(path)

    def _write_back(self, fd: int, keeps: str) -> None:
        """Put what ``keeps`` says of the dirty sectors on stable storage, and forget the rest."""
        number = os.fstat(fd).st_ino
        stable = self._stable.setdefault(number, bytearray())
        for sectors in self._dirty.pop(number, []):
            for index, sector in enumerate(sectors):
                if KEEPS[keeps](index, len(sectors)):
                    low = sector * SECTOR
                    data = os.pread(fd, SECTOR, low)
                    stable.extend(bytes(max(0, low + len(data) - len(stable))))
                    stable[low : low + len(data)] = data

    def _names_left(self) -> dict[str, int]:
        now = self._names_now()
        if self._keeps == "everything":
            return now
        if self._keeps == "the last half" and self._latest is not None:
            # Of two new names the second one may be left alone.
            source, target = (os.path.basename(path) for path in self._latest)
            left = {name: number for name, number in self._names.items() if name != source}
            return left | ({target: now[target]} if target in now else {})
        return self._names

    def lose_power(self) -> None:
        """Leave in the directory what is on stable storage, and what ``keeps`` adds."""
        for path in self.directory.iterdir():
            with path.open("rb") as file:
                self._write_back(file.fileno(), self._keeps)
        names = self._names_left()
        for path in self.directory.iterdir():
            path.unlink()
        for name, number in names.items():
            (self.directory / name).write_bytes(self._stable.get(number, b""))


class Clock:
    """Stands in for ``time``: sleeping is free, and moves the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture(autouse=True)
def small_and_patient(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A minute of retries takes no time, and space is allocated in small steps."""
    clock = Clock()
    monkeypatch.setattr(appender, "time", clock)
    monkeypatch.setattr(logreader, "GROWING_TAIL_S", 0.0)
    monkeypatch.setattr(durable, "PREALLOCATE_STEP", 2048)
    return clock


History = list[Call]


def add(backend: FileBackend, call: Call) -> None:
    backend.add_change(Change(call[0], None, call[1]))


def stored(url: str) -> History:
    """What a restore would apply; nothing may be damaged."""
    return support.stored(url)


# One session on a disk that fails.

BEFORE = support.first_changes(3)
STEPS: list[tuple[str, Call]] = [
    ("rewind", BEFORE[2]),
    ("add", support.change(3, "-- instead")),
    ("add", support.change(4, f"-- {'long ' * 400}")),
    ("add", (4, [FOREIGN_KEYS_OFF])),
    ("add", support.change(5, f"-- {'long ' * 200}")),
    ("add", support.change(6)),
]


def session(
    backend: FileBackend, acknowledged: list[History], announced: list[History]
) -> Iterator[None]:
    """Open and go through STEPS; the lists hold the histories before and after each step."""
    announced[:] = acknowledged[:] = [list(BEFORE)]
    backend.open()
    for name, call in STEPS:
        history = acknowledged[-1]
        announced.append(history[:-1] if name == "rewind" else [*history, call])
        if name == "rewind":
            backend.rewind()
        else:
            add(backend, call)
        acknowledged.append(announced[-1])
        yield


def run_session(
    url: str, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> tuple[BaseException | None, int, FileBackend]:
    """Run a session on ``disk``, lose power, check what is left; the failure and how far."""
    backend = FileBackend(url)
    acknowledged: list[History] = []
    announced: list[History] = []
    failure: BaseException | None = None
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", disk)
        try:
            for _ in session(backend, acknowledged, announced):
                pass
        except (BackupError, PowerCut) as error:
            failure = error
        if isinstance(failure, DiskError) and len(announced) > 1:
            check_refuses_everything(backend, failure)
        disk.lose_power()
    backend.close()
    check_next_session(url, acknowledged[-1], announced[-1])
    return failure, len(acknowledged) - 1, backend


def check_refuses_everything(backend: FileBackend, failure: DiskError) -> None:
    size, version = os.path.getsize(backend.path), backend.version
    for _ in range(2):
        with pytest.raises(DiskError) as again:
            add(backend, support.change(version + 1, "-- later"))
        assert again.value is failure
        if backend.rewindable:
            with pytest.raises(DiskError):
                backend.rewind()
    assert (os.path.getsize(backend.path), backend.version) == (size, version)


def check_next_session(url: str, acknowledged: History, announced: History) -> None:
    """All that was acknowledged is there and at most what was announced; it goes on."""
    assert stored(url) in ([c for c in h if not is_idle(h, c)] for h in (acknowledged, announced))
    backend = FileBackend(url)
    backend.open()
    found = stored(url)
    call = support.change(backend.version + 1, "-- the next session")
    add(backend, call)
    backend.close()
    assert stored(url) == [*found, call]
    assert FileBackend(url).status().damage is None


def is_idle(history: History, call: Call) -> bool:
    """Whether ``call`` is a PRAGMA that nothing follows."""
    return call[1] == [FOREIGN_KEYS_OFF] and history[-1] is call


def every_call(
    path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[int], Disk]
) -> Iterator[tuple[Disk, BaseException | None, int]]:
    """Run the session again and again, with the failure one call later each time."""
    image = path.read_bytes()
    torn = support.records_of(path)[-1][0].end == len(image) - 1500
    for number in itertools.count(1):
        for stray in path.parent.iterdir():
            stray.unlink()
        path.write_bytes(image)
        disk = make(number)
        failure, steps, _ = run_session(f"file://{path}", disk, monkeypatch)
        if torn and steps:  # What was cut off is durable before anything takes its place.
            (aside,) = path.parent.glob(f"*.torn-{len(image) - 1500}")
            assert aside.read_bytes().rstrip(b"\0") == image[-1500:].rstrip(b"\0")
        yield disk, failure, steps
        if not disk.failed:
            assert failure is None and steps == len(STEPS)
            assert number > 15, "there are that many calls to fail"
            return


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_one_failing_call_costs_no_change(
    error: int, keeps: str, torn: bool, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_backup(url, torn)
    for disk, failure, steps in every_call(
        path, monkeypatch, lambda number: Disk(path.parent, number, error, keeps=keeps)
    ):
        if failure is not None:  # Opening is not tried again: nothing waits for it yet.
            assert isinstance(failure, DiskError) and failure.errno == error
            assert steps == 0
        else:
            assert steps == len(STEPS), disk.calls


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_disk_that_fails_for_good_is_never_acknowledged(
    error: int, keeps: str, torn: bool, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_backup(url, torn)
    reached = set()
    for disk, failure, steps in every_call(
        path, monkeypatch, lambda number: Disk(path.parent, number, error, True, keeps)
    ):
        if disk.failed:
            assert isinstance(failure, DiskError) and failure.errno == error
        reached.add(steps)
    assert reached == set(range(len(STEPS) + 1)), "it failed in every step"


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("keeps", KEEPS)
def test_loss_of_power_at_every_call(
    keeps: str, short: bool, torn: bool, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_backup(url, torn)
    reached = set()
    for disk, failure, steps in every_call(
        path, monkeypatch, lambda number: Disk(path.parent, number, 0, keeps=keeps, short=short)
    ):
        assert isinstance(failure, PowerCut) == bool(disk.failed)
        reached.add(steps)
    assert reached == set(range(len(STEPS) + 1))


def test_short_writes_are_continued(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_backup(url, torn=True)
    disk = Disk(path.parent, short=True)
    failure, steps, _ = run_session(url, disk, monkeypatch)
    assert (failure, steps) == (None, len(STEPS))
    assert disk.calls.count("pwrite") > 100


def test_write_of_nothing_is_a_failure_not_a_loop(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_backup(url, torn=False)
    backend = FileBackend(url)
    backend.open()
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(DiskError, match="wrote nothing"):
        add(backend, support.change(4))
    backend.close()


def a_backup(url: str, torn: bool) -> Path:
    """A backup of BEFORE, with an append behind it that never finished, or without."""
    path = support.make_backup(url, BEFORE)
    if torn:
        end = support.records_of(path)[-1][0].end
        backend = FileBackend(url)
        backend.open()
        add(backend, support.change(4, f"-- {'torn ' * 500}"))
        backend.close()
        with path.open("r+b") as file:
            file.truncate(end + 1500)
            file.truncate(end + 8192)
    return path


# How it is tried again.


def test_retries_take_a_minute_with_growing_pauses(
    url: str,
    small_and_patient: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = a_backup(url, torn=False)
    backend = FileBackend(url)
    backend.open()
    disk = Disk(path.parent, 1, errno.EIO, for_good=True)
    monkeypatch.setattr(durable, "os", disk)
    with pytest.raises(DiskError, match="Input/output error"):
        add(backend, support.change(4))
    monkeypatch.undo()
    assert 50 < small_and_patient.now <= 60
    lines = [record.getMessage() for record in caplog.records]
    assert 12 <= len(lines) == len(disk.calls) - 1 <= 30, "a line each time"
    assert all(line.startswith(f"Writing to {path} failed (Input/output error)") for line in lines)
    backend.close()


def test_each_try_has_a_fresh_descriptor(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_backup(url, torn=False)
    backend = FileBackend(url)
    backend.open()
    opened: list[int] = []
    flushed: list[int] = []

    class Watched(Disk):
        def open(self, path: str, flags: int, mode: int = 0o777) -> int:
            opened.append(len(flushed))
            return super().open(path, flags, mode)

        def fdatasync(self, fd: int) -> None:
            flushed.append(fd)
            if len(flushed) < 4:
                raise OSError(errno.EIO, "no")

    monkeypatch.setattr(durable, "os", Watched(path.parent))
    add(backend, support.change(4))
    assert opened == [1, 2, 3]
    backend.close()


@pytest.mark.parametrize("other", ["another backup", "garbage", "nothing", "an older copy"])
def test_file_that_took_the_place_meanwhile_is_not_written(
    other: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = a_backup(url, torn=False).read_bytes()
    support.add_session(url, [support.change(4)])
    path = Path(url.removeprefix("file://"))
    foreign = support.make_backup(f"file://{tmp_path}/foreign.bkp", support.first_changes(4))
    content = {
        "another backup": foreign.read_bytes(),
        "garbage": b"garbage" * 999,
        "nothing": b"",
        "an older copy": older,
    }[other]
    backend = FileBackend(url)
    backend.open()

    def fail_once(fd: int) -> None:
        path.rename(tmp_path / "moved.bkp")
        path.write_bytes(content)
        monkeypatch.undo()
        monkeypatch.setattr(appender, "time", Clock())
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable, "flush", fail_once)
    with pytest.raises(DiskError, match="another file stands in its place"):
        add(backend, support.change(5))
    backend.close()
    assert path.read_bytes() == content
    assert len(stored(f"file://{tmp_path}/moved.bkp")) >= 4


def test_file_that_is_away_for_a_while_is_waited_for(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_backup(url, torn=False)
    backend = FileBackend(url)
    backend.open()

    class Remounted(Clock):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if self.now > 20 and not path.exists():
                (tmp_path / "moved.bkp").rename(path)

    def fail_once(fd: int) -> None:
        path.rename(tmp_path / "moved.bkp")
        monkeypatch.undo()
        monkeypatch.setattr(appender, "time", Remounted())
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(durable, "flush", fail_once)
    add(backend, support.change(4))
    backend.close()
    assert stored(url) == [*BEFORE, support.change(4)]


# Creating and replacing.


def snapshot(directory: Path, size: int = 3000) -> Snapshot:
    path = directory / "snapshot"
    path.write_bytes(os.urandom(size))
    return Snapshot(str(path), 9)


def pieces(url: str) -> bytes:
    """The snapshot of a backup that holds nothing else."""
    found = support.passed(FileBackend(url).read())
    assert found.ending.damage is None and not found.calls
    return found.snapshot


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {"node.bkp.writer"}


FAILURES = [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (0, False)]


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize(("error", "for_good"), FAILURES)
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_create_on_a_failing_disk(
    empty: bool,
    links: bool,
    error: int,
    for_good: bool,
    keeps: str,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(url.removeprefix("file://"))
    source = None if empty else snapshot(tmp_path)
    content = Path(source.path).read_bytes() if source else b""
    for number in itertools.count(1):
        for stray in path.parent.iterdir():
            stray.unlink()
        disk = Disk(path.parent, number, error, for_good, keeps, links=links)
        failure: BaseException | None = None
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", disk)
            try:
                FileBackend(url).create(source)
            except (DiskError, PowerCut) as caught:
                failure = caught
        if isinstance(failure, DiskError):
            assert names(path.parent) == set(), (number, disk.calls)
        disk.lose_power()
        if failure is None:
            assert pieces(url) == content, "done is durable"
        elif path.exists():
            assert pieces(url) == content, "whole, or not there"
        else:
            FileBackend(url).create(source)
            assert pieces(url) == content
            assert names(path.parent) == {path.name}
        if not disk.failed:
            break
    assert number > 6


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize(("error", "for_good"), FAILURES)
@pytest.mark.parametrize("links", [True, False])
def test_replace_on_a_failing_disk(
    links: bool,
    error: int,
    for_good: bool,
    keeps: str,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = a_backup(url, torn=False)
    image, source = path.read_bytes(), snapshot(tmp_path)
    content = Path(source.path).read_bytes()
    for number in itertools.count(1):
        for stray in path.parent.iterdir():
            stray.unlink()
        path.write_bytes(image)
        disk = Disk(path.parent, number, error, for_good, keeps, links=links)
        failure: BaseException | None = None
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", disk)
            try:
                FileBackend(url).replace(source)
            except (DiskError, PowerCut) as caught:
                failure = caught
        if isinstance(failure, DiskError):
            # Without links a disk that fails for good cannot be asked to rename it back.
            assert path.exists() or (for_good and not links), (number, disk.calls)
            if path.exists() and path.read_bytes() == image:
                assert names(path.parent) == {path.name}, (number, disk.calls)
        disk.lose_power()
        kept = [file for file in path.parent.glob("node.bkp.old-*") if file.read_bytes() == image]
        if failure is None or (path.exists() and path.read_bytes() != image):
            assert pieces(url) == content
            assert len(kept) == 1, "the old one is kept"
        elif links:
            assert stored(url) == BEFORE
        else:
            assert kept or stored(url) == BEFORE
        if not disk.failed:
            break
    assert number > 8


def test_replace_that_cannot_be_verified_leaves_the_old_one(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_backup(url, torn=False)
    before = support.contents(path.parent)
    write_all = durable.write_all

    def with_a_bit_turned(fd: int, data: bytes | memoryview, offset: int) -> None:
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 4
        write_all(fd, bytes(changed), offset)

    monkeypatch.setattr(durable, "write_all", with_a_bit_turned)
    with pytest.raises(BackupError):
        FileBackend(url).replace(snapshot(tmp_path))
    with pytest.raises(BackupError):
        FileBackend(f"file://{path.parent}/new.bkp").create(snapshot(tmp_path))
    assert support.contents(path.parent) == before


def test_create_loses_a_race_without_harm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(url.removeprefix("file://"))
    publish = durable.publish

    def too_late(beside: str, target: str) -> None:
        path.write_bytes(b"someone else's")
        publish(beside, target)

    monkeypatch.setattr(durable, "publish", too_late)
    with pytest.raises((BackupExists, DiskError)):
        FileBackend(url).create(None)
    assert path.read_bytes() == b"someone else's"
    assert names(path.parent) == {path.name}


@pytest.mark.parametrize("failing", ["fdatasync", "link", "fsync"])
def test_small_file_is_whole_or_not_there(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "backup.lock"

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = Disk(tmp_path)
    monkeypatch.setattr(durable, "os", disk)
    monkeypatch.setattr(disk, failing, fail, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        durable.write_file(str(target), b"content")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    durable.write_file(str(target), b"content")
    assert target.read_bytes() == b"content"
    with pytest.raises(FileExistsError):
        durable.write_file(str(target), b"other")
    assert target.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("links", [True, False])
def test_second_name_that_may_not_last_is_taken_back(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    disk = Disk(tmp_path, 2 if links else 3, links=links)
    monkeypatch.setattr(durable, "os", disk)
    with pytest.raises(OSError, match="Input/output error"):
        durable.keep(str(path), str(tmp_path / "kept"))
    assert disk.calls[:2] == ["link", "fsync" if links else "rename"]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"content")]


# Through the real plugin.

WRAPPER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import backup, durable, filelog.appender
class Faulty:
    flushes = 0
    def __getattr__(self, name):
        return getattr(os, name)
    {patch}
durable.os = Faulty()
{setup}
backup.main()
"""


def plugin_with(node_dir: Path, patch: Sequence[str], setup: str = "") -> support.PluginProcess:
    """The plugin with the methods ``patch`` in place of those of ``os``."""
    program = WRAPPER.format(patch="\n    ".join(patch), setup=setup)
    arguments = [sys.executable, "-c", program, str(support.ROOT)]
    return support.PluginProcess(node_dir, arguments)


def attached(node_dir: Path, url: str) -> None:
    support.run_cli("init", "--lightning-dir", node_dir, url)


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for what another process does; a hang fails."""
    deadline = time.monotonic() + support.ANSWER_S
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def flush_that_fails(condition: str) -> list[str]:
    return [
        "def fdatasync(self, fd):",
        "    self.flushes += 1",
        f"    if {condition}: raise OSError(5, 'Input/output error')",
        "    os.fdatasync(fd)",
    ]


def test_plugin_refuses_when_the_disk_fails_for_good(node_dir: Path, url: str) -> None:
    attached(node_dir, url)
    calls = support.first_changes(4)
    # The first two flushes are of the opening.
    patch = flush_that_fails("self.flushes > 4")
    with plugin_with(node_dir, patch, "filelog.appender.RETRY_FOR_S = 0.5") as plugin:
        plugin.manifest()
        plugin.write(*calls[0])
        plugin.write(*calls[1])
        assert not plugin.errors()
        for call in (calls[2], calls[2], calls[3]):
            with pytest.raises(support.Refused):
                plugin.write(*call)
        (path,) = {url.removeprefix("file://")}
        for line in plugin.errors():
            assert line.startswith(f"Could not write to {path}: Input/output error.")
        assert len(plugin.errors()) == 3
        assert plugin.logged(f"Writing to {path} failed (Input/output error)")
    assert stored(url) in (calls[:2], calls[:3])
    with support.PluginProcess(node_dir) as plugin:
        plugin.write(*support.change(3, "-- instead"))
        assert plugin.close() == 0
    assert stored(url) == [*calls[:2], support.change(3, "-- instead")]


def test_plugin_acknowledges_once_a_retry_is_stored(node_dir: Path, url: str) -> None:
    attached(node_dir, url)
    calls = support.first_changes(4)
    with plugin_with(node_dir, flush_that_fails("self.flushes in (4, 5)")) as plugin:
        plugin.manifest()
        for call in calls:
            plugin.write(*call)
        assert plugin.close() == 0
        lines = [text for level, text in plugin.log if level == "warn"]
        assert not plugin.errors()
    assert [line.partition("; ")[0] for line in lines] == [
        f"Writing to {url.removeprefix('file://')} failed (Input/output error)"
    ] * 2
    assert all("the node has been waiting for" in line for line in lines)
    assert stored(url) == calls


def test_plugin_announces_a_write_that_hangs(node_dir: Path, url: str) -> None:
    attached(node_dir, url)
    patch = [
        "def pwrite(self, fd, data, offset):",
        "    if os.path.exists('hang'): open('hang').read()",
        "    return os.pwrite(fd, data, offset)",
    ]
    hang = node_dir / "hang"
    calls = support.first_changes(2)
    with plugin_with(node_dir, patch, "backup.FIRST_NOTICE_S = 0.0") as plugin:
        plugin.manifest()
        plugin.write(*calls[0])
        os.mkfifo(hang)
        number = plugin.send("db_write", {"data_version": 2, "writes": calls[1][1]})
        wait_until(lambda: plugin.logged("waiting for the disk for "))
        assert plugin._answers.empty(), "nothing is acknowledged meanwhile"
        assert stored(url) == calls[:1]
        with hang.open("w"):
            hang.unlink()
        assert plugin.answer(number) == {"result": "continue"}
        assert plugin.close() == 0
    assert stored(url) == calls
