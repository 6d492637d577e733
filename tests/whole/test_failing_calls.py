"""Every call that a scenario makes fails in its turn, once and for good; nothing is lost by it.

The scenarios and the invariants are those of scenarios.py. test_faults.py has what a session
does about a failure: how it tries again, and what the plugin tells the node.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import durable
from backend import NOBODY, Change, Snapshot, bump
from errors import BackupError, DiskError
from filebackend import FileBackend
from filelog import reader as logreader
from filelog import writer as logwriter
from serving import rules
from serving.rules import Offer
from serving.spool import Spool
from tests import support
from tests.disk import Disk, Fault, Killed, standing_in
from tests.layout1_files import EarlierPlugin
from tests.scenarios import LOG, SCENARIOS, Bed, Life, prepared
from upkeep import upgrade
from wallet import database, restore

ONE_BYTE, HALF = -1, -2
POWER_CUTS = {errno.EIO: 4}
"""States checked of those that a power cut right after a failure may leave; else 1."""


def torn(life: Life) -> None:
    """A torn tail is there."""
    life.init()
    life.start()
    life.write()
    life.killed(2)
    life.power_cut()


def unflushed(life: Life) -> None:
    """The page cache shows a change that never reached the disk."""
    life.init()
    life.start()
    life.write()
    life.killed(1, ("fdatasync",), error=errno.EIO)
    life.look()


def go_on(life: Life) -> None:
    life.start()
    life.write()
    life.write()


def nothing(life: Life) -> None:
    """Nothing is there yet."""


STORIES: dict[str, tuple[Callable[[Life], None], Callable[[Life], None]]] = {
    **{
        name: (nothing, SCENARIOS[name])
        for name in (
            "init",
            "init with a snapshot",
            "init, no links",
            "append",
            "rewind",
            "resync",
            "resync, no links",
            "upgrade",
            "upgrade, no links",
            "compaction",
            "server",
        )
    },
    "torn tail": (torn, go_on),
    "page cache": (unflushed, go_on),
}
"""What is there before, and what then happens while calls fail."""


def descriptors(directory: str | Path) -> int:
    """Open files below ``directory``: threads of tests before this one may have others."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}").startswith(f"{directory}/")
    return count


def every_call(name: str, bed: Bed, error: int, for_good: bool) -> Iterator[BaseException | None]:
    """Tell the story ``name`` again and again, with the failure one call later each time."""
    prepare, act = STORIES[name]
    for number in itertools.count(1):
        before = descriptors(bed.directory)
        calls = ("pwrite",) if error < 0 else ()
        fault = Fault(number, error, for_good, calls)
        failure: BaseException | None = None
        with bed.playing(name, 1) as life:
            prepare(life)
            life.disk.fault = fault
            try:
                act(life)
            except (BackupError, OSError, Killed) as caught:
                failure = caught
            life.disk.revive()
            life.end()
        assert not error or descriptors(bed.directory) <= before, "no descriptor is left over"
        where = f"{name}, {os.strerror(error) if error > 0 else 'short'} at call {number}"
        check_what_is_left(bed, life, where, POWER_CUTS.get(error, 1))
        yield failure
        if not fault.hits:
            assert failure is None and number > (1 if calls else 5)
            print(f"{number - 1} calls failed in turn, {bed.checked} states checked")
            return


def check_what_is_left(bed: Bed, life: Life, where: str, cuts: int) -> None:
    """The next process finds what this one left; or the power goes first."""
    rng = random.Random(where)
    with prepared(rng):
        bed.check(life.disk.files(), life.expected, life.library, where)
        states = list(life.disk.model().states(rng, f"{LOG}.scratch-"))
        for what, files in rng.sample(states, min(cuts, len(states))):
            bed.check(files, life.expected, life.library, f"{where}, then a power cut, {what}")


@pytest.fixture
def bed(unmeasured: None) -> Iterator[Bed]:
    with tempfile.TemporaryDirectory(prefix="failing-calls-", dir=support.FAST) as directory:
        yield Bed(directory)


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EINTR])
@pytest.mark.parametrize("name", STORIES)
def test_failing_call_loses_nothing(name: str, error: int, for_good: bool, bed: Bed) -> None:
    for failure in every_call(name, bed, error, for_good):
        assert failure is None or isinstance(failure, BackupError), repr(failure)


# Not byte by byte for good: a snapshot would take minutes.
@pytest.mark.parametrize(("error", "for_good"), [(ONE_BYTE, False), (HALF, False), (HALF, True)])
@pytest.mark.parametrize("name", STORIES)
def test_short_writes_are_continued(name: str, error: int, for_good: bool, bed: Bed) -> None:
    for failure in every_call(name, bed, error, for_good):
        assert failure is None


@pytest.mark.parametrize("name", STORIES)
def test_process_killed_at_any_call(name: str, bed: Bed) -> None:
    for failure in every_call(name, bed, 0, True):
        assert failure is None or isinstance(failure, Killed)


# What it found, each by itself.


def test_torn_tail_that_was_cut_does_not_come_back(url: str) -> None:
    """The flush of a cut fails: the page cache shows zeros, and the disk has the tail."""
    path = support.make_backup(url, support.first_changes(2))
    end = support.records_of(path)[-1][0].end
    support.add_session(url, [support.change(3, f"-- {'torn' * 1000}")])
    with path.open("r+b") as file:
        file.truncate(end + 3000)
        file.truncate(end + 9000)
    disk = Disk(str(path.parent))
    disk.put({path.name: path.read_bytes()})
    backend = FileBackend(url)
    with standing_in(disk, durable):
        disk.fault = Fault(2, errno.EIO, calls=("fdatasync",))
        with pytest.raises(DiskError):
            backend.open()
        disk.revive()
        assert not path.read_bytes()[end:].strip(b"\0")
        backend.open()
        backend.add_change(Change(3, None, ["-- short", bump(3)]))
        backend.close()
    for _, files in disk.model().states(random.Random(1), "scratch"):
        path.write_bytes(files[path.name])
        status = FileBackend(url).status()
        assert (status.version, status.damage, status.torn_tail) == (3, None, False)


def failing(name: str, error: int = errno.EIO) -> Callable[..., None]:
    """Stands in for the function ``name`` of os."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error), name)

    return fail


def test_failure_is_named_even_if_the_scratch_file_cannot_be_removed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        monkeypatch.setattr(os, "unlink", failing("unlink"))
        failing("fdatasync", errno.ENOSPC)()

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(DiskError, match="No space left"):
        FileBackend(url).create(None)


def test_replace_is_done_even_if_its_scratch_file_cannot_be_looked_for(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = support.make_backup(url, support.first_changes(3))
    source = tmp_path / "snapshot"
    source.write_bytes(b"x" * 1000)
    rename = os.rename

    def rename_and_fail_then(old: str, new: str) -> None:
        rename(old, new)
        monkeypatch.setattr(os, "unlink", failing("unlink"))

    monkeypatch.setattr(os, "rename", rename_and_fail_then)
    kept = FileBackend(url).replace(Snapshot(str(source), 7))
    assert kept is not None and os.path.exists(kept)
    assert FileBackend(f"file://{path}").status().version == 7


def test_stray_that_cannot_be_removed_does_not_stop_the_node(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = support.make_backup(url, support.first_changes(3))
    path.with_name(f"{path.name}.scratch-x").write_bytes(b"half")
    backend = FileBackend(url)
    monkeypatch.setattr(os, "unlink", failing("unlink"))
    backend.open()
    backend.close()
    assert backend.version == 3


def test_journal_that_cannot_be_removed_is_not_applied_to_a_restore(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.make_backup(url, support.first_changes(3))
    (tmp_path / "node.sqlite3.restoring-journal").write_bytes(b"of another database")
    unlink = os.unlink

    def keep_the_journal(path: str) -> None:
        if path.endswith("-journal"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path)

    monkeypatch.setattr(os, "unlink", keep_the_journal)
    reading = FileBackend(url).read()
    restore.restore(reading, str(tmp_path / "node.sqlite3"), False, lambda *_: None)
    reading.close()
    assert database.version_of(str(tmp_path / "node.sqlite3")) == 3


def test_upgrade_names_a_full_disk(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(url.removeprefix("file://"))
    EarlierPlugin(path).session(support.first_changes(3))
    before = support.contents(path.parent)
    monkeypatch.setattr(os, "fdatasync", failing("fdatasync", errno.ENOSPC))
    with pytest.raises(DiskError, match="No space left"):
        upgrade.from_log(FileBackend(url), NOBODY, lambda *_: None)
    assert support.contents(path.parent) == before


@pytest.mark.parametrize("call", ["fstat", "pwrite"])
def test_failure_at_the_beginning_of_a_file_leaves_no_descriptor(
    call: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = support.make_backup(url, support.first_changes(3))
    before = descriptors(path.parent)
    monkeypatch.setattr(os, call, failing(call))
    for function in (
        lambda: logreader.LogReader(str(path)),
        lambda: durable.LogFile(str(path)),
        lambda: logwriter.LogWriter(f"{path}-{call}", bytes(16), 0),
    ):
        with contextlib.suppress(OSError, DiskError):
            function().close()
    monkeypatch.undo()
    assert descriptors(path.parent) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_snapshot_that_finds_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in-1"

    def full(name: str, *more: str | None) -> int:
        if name != str(path):
            return create(name, *more)
        path.write_bytes(b"")
        opened.append(os.open("/dev/full", os.O_WRONLY))
        return opened[-1]

    opened: list[int] = []
    create = durable.create
    backend = FileBackend(f"file://{tmp_path}/node.bkp")
    support.make_backup(backend.url)
    monkeypatch.setattr(durable, "create", full)
    spool = Spool(backend, Snapshot(str(path), 1), Offer(1), rules.snapshot)
    spool.add(b"some")  # It stays in memory.
    with pytest.raises(DiskError, match="No space left"):
        spool.add(bytes(1 << 20))
    spool.close()
    assert not list(tmp_path.glob("in-1*"))
    with contextlib.suppress(OSError):  # It is closed, or another thread's by now.
        assert os.readlink(f"/proc/self/fd/{opened[0]}") != "/dev/full"
