"""The file backend: what opening costs, torn tails, damage, readers, locks, replacing."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import durable
import space
from backend import Change, Ending, Snapshot, new_owner
from errors import (
    BackupBusy,
    BackupError,
    BackupExists,
    BackupMissing,
    ConfigError,
    Damaged,
    DiskError,
    OtherOwner,
    UnsupportedLayout,
)
from filebackend import FileBackend
from filelog import former, layout2
from filelog import reader as logreader
from filelog.layout2 import HEAD, OVERHEAD, SECTOR
from filelog.reader import LogReader
from tests import support
from tests.support import Call

CALLS = support.first_changes(4)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers judge a tail at once, and flushing costs nothing: for tests that repeat."""
    monkeypatch.setattr(logreader, "GROWING_TAIL_S", 0.0)
    monkeypatch.setattr(durable, "flush", lambda fd: None)


def stored(url: str) -> tuple[list[Call], bytes, Exception | None, bool]:
    """What a restore would apply: calls and snapshot, then damage and torn tail."""
    calls, pieces, ending = support.passed(FileBackend(url).read())
    return calls, b"".join(pieces), ending.damage, ending.torn_tail


def opened_version(url: str) -> int:
    """The version after an open for writing."""
    backend = FileBackend(url)
    backend.open()
    backend.close()
    return backend.version


def node_snapshot(directory: Path, calls: Sequence[Call]) -> Snapshot:
    """A closed database after ``calls``, with pages of 512 bytes."""
    path = directory / f"node-{len(calls)}.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA page_size = 512")
        connection.execute("VACUUM")
    support.apply_calls(path, calls)
    return Snapshot(str(path), len(calls))


def put(path: Path, data: bytes | bytearray) -> None:
    """Make ``data`` the content of ``path``, in place: truncating a file is slow."""
    with path.open("r+b") as file:
        file.write(data)
        if os.fstat(file.fileno()).st_size != len(data):
            file.truncate()


# Reading.


@pytest.mark.usefixtures("impatient")
def test_log_that_becomes_smaller_while_it_is_read_is_damaged(url: str) -> None:
    """A cut at a record's end looks like the end of the log: nothing else would tell."""
    path = support.make_backup(url, [support.change(n, "x" * 500_000) for n in range(1, 9)])
    heads = [head for head, _ in support.records_of(path)]
    for cut in (0, heads[5].offset, heads[5].offset + 1000):
        content = path.read_bytes()
        with contextlib.closing(FileBackend(url).read()) as reading:
            steps = iter(reading)
            next(steps)
            os.truncate(path, cut)
            *changes, (ending, _, _) = steps
        assert 0 < len(changes) < 7
        assert isinstance(ending, Ending)
        assert "was cut while it was read" in str(ending.damage)
        path.write_bytes(content)


# Opening.


@pytest.mark.usefixtures("impatient")
def test_open_reads_only_the_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    read = LogReader.pread

    def counted(self: LogReader, offset: int, size: int) -> bytes:
        data = read(self, offset, size)
        costs.append(len(data))
        return data

    support.make_backup(url)
    version, seen = 0, []
    for goal in (1, 10, 3000):
        support.add_session(
            url, [support.change(v, f"-- {'x' * 2000}") for v in range(version + 1, goal + 1)]
        )
        version = goal
        monkeypatch.setattr(LogReader, "pread", counted)
        costs.clear()
        assert opened_version(url) == version
        seen.append((len(costs), sum(costs)))
        monkeypatch.undo()
        monkeypatch.setattr(durable, "flush", lambda fd: None)
    assert os.path.getsize(url.removeprefix("file://")) > 6 << 20
    # A few windows of 1 MiB, however long the log.
    assert all(calls <= 12 and read <= 8 << 20 for calls, read in seen), seen


def test_two_opens_change_nothing(url: str) -> None:
    path = support.make_backup(url, CALLS)
    assert opened_version(url) == 4
    before = support.contents(path.parent)
    assert opened_version(url) == 4
    assert support.contents(path.parent) == before


def test_open_writes_the_newest_record_again_before_it_believes_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = support.make_backup(url, CALLS)
    last = support.records_of(path)[-1][0]
    writes: list[tuple[int, bytes]] = []
    append = durable.LogFile.append

    def noted(self: durable.LogFile, offset: int, data: bytes) -> None:
        writes.append((offset, data))
        append(self, offset, data)

    monkeypatch.setattr(durable.LogFile, "append", noted)
    assert opened_version(url) == 4
    assert writes == [(last.offset, path.read_bytes()[last.offset : last.end])]


def test_open_clears_away_what_a_killed_process_left(url: str) -> None:
    path = support.make_backup(url, CALLS)
    for name in ("node.bkp.scratch-log", "node.bkp.scratch-x", "node.bkp2.scratch-log"):
        path.with_name(name).write_bytes(b"half")
    assert opened_version(url) == 4
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "node.bkp",
        "node.bkp.writer",
        "node.bkp2.scratch-log",
    ]


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"x" * 600, b"SQLite format 3\0" * 99])
def test_what_is_no_backup_is_refused_and_left_alone(url: str, content: bytes) -> None:
    path = Path(url.removeprefix("file://"))
    path.write_bytes(content)
    for look in (FileBackend(url).open, FileBackend(url).read, FileBackend(url).status):
        with pytest.raises(UnsupportedLayout, match="not a backup"):
            look()
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_missing_backup_is_refused_without_a_trace(url: str) -> None:
    with pytest.raises(BackupMissing, match="no backup at"):
        FileBackend(url).open()
    assert list(Path(url.removeprefix("file://")).parent.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["file:", "file://", "file://relative", "file://host/x", "file:///a/", "x", "file:///\0"]
)
def test_url_of_another_form_is_refused(url: str) -> None:
    if url == "file://host/x":
        url = "file://host"
    with pytest.raises(ConfigError):
        FileBackend(url)


def test_symbolic_link_stands_for_its_file(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, CALLS[:1])
    link = tmp_path / "link.bkp"
    link.symlink_to(path)
    support.add_session(f"file://{link}", CALLS[1:])
    FileBackend(f"file://{link}").replace(node_snapshot(tmp_path, CALLS))
    assert link.is_symlink() and FileBackend(url).status().snapshot_size
    assert not (tmp_path / "link.bkp.writer").exists()


# Torn tails.


def torn_aside(path: Path, offset: int) -> Path:
    """Where a torn tail at ``offset`` is kept."""
    return path.with_name(f"{path.name}.torn-{offset}")


@pytest.mark.usefixtures("impatient", "unmeasured")
@pytest.mark.parametrize("kind", ["change", "rewind", "first"])
def test_log_cut_at_every_byte_of_its_last_record(
    kind: str, fast_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{fast_dir}/node.bkp"
    path = support.make_backup(url, CALLS[:1] if kind == "first" else CALLS)
    if kind == "rewind":
        backend = FileBackend(url)
        backend.open()
        backend.rewind()
        backend.close()
    whole, last = path.read_bytes(), support.records_of(path)[-1][0]
    before = {"change": CALLS[:-1], "rewind": CALLS, "first": []}[kind]
    after = {"change": CALLS, "rewind": CALLS[:-1], "first": CALLS[:1]}[kind]
    for cut in range(last.offset, last.end + 1):
        left = whole[:cut] + bytes(8192)
        put(path, left)
        # Not by the cut alone: what was cut off a head may have been zero.
        complete = left.startswith(whole[: last.end - (OVERHEAD - HEAD.size)])
        # Flushed or not, an append that is complete counts: the node may have committed.
        good = after if complete else before
        calls, _, damage, torn = stored(url)
        assert (calls, damage) == (good, None), cut
        assert torn == (last.offset < cut and not complete), cut
        assert opened_version(url) == len(good)
        aside = torn_aside(path, last.offset)
        assert aside.exists() == torn, cut
        if torn:
            kept = aside.read_bytes()
            assert kept.rstrip(b"\0") == whole[last.offset : cut].rstrip(b"\0")
            data = path.read_bytes()
            assert (
                not data[last.offset :].strip(b"\0")
                and data[: last.offset] == whole[:cut][: last.offset]
            )
            assert str(aside) in caplog.records[-1].getMessage()
            aside.unlink()
        # And the next session goes on.
        again = support.change(len(good) + 1, "-- other content")
        support.add_session(url, [again] if good else CALLS[:1])
        assert stored(url) == ([*good, again] if good else CALLS[:1], b"", None, False)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fill", [0, 100, 333])
def test_zeroed_sectors_of_the_last_record(fill: int, url: str) -> None:
    calls = [*CALLS[:2], support.change(3, f"-- {'y' * fill}")]
    lost = support.change(4, f"-- {'x' * 2000}")
    path = support.make_backup(url, [*calls, lost])
    whole, last = path.read_bytes(), support.records_of(path)[-1][0]
    sectors = list(range(last.offset // SECTOR, (last.end - 1) // SECTOR + 1))
    groups = [[s] for s in sectors] + [sectors[i:] for i in range(len(sectors))]
    groups += [sectors[:i] for i in range(1, len(sectors))] + [sectors[::2], sectors[1::2]]
    for group in groups:
        data = bytearray(whole)
        for sector in group:
            low, high = max(sector * SECTOR, last.offset), min((sector + 1) * SECTOR, last.end)
            data[low:high] = bytes(high - low)
        path.write_bytes(data)
        if not data[last.offset : last.end].strip(b"\0"):
            assert stored(url) == (calls, b"", None, False)
        elif low >= last.end - (OVERHEAD - HEAD.size):
            assert stored(url) == ([*calls, lost], b"", None, False)
            continue
        else:
            assert stored(url) == (calls, b"", None, True), group
        support.add_session(url, [support.change(4, "-- again")])
        assert stored(url) == ([*calls, support.change(4, "-- again")], b"", None, False)


def test_second_torn_tail_at_one_place_overwrites_no_first(url: str) -> None:
    path = support.make_backup(url, CALLS)
    whole, last = path.read_bytes(), support.records_of(path)[-1][0]
    for size in (56, 60):
        path.write_bytes(whole[: last.offset + size] + bytes(1000))
        assert opened_version(url) == 3
    asides = sorted(path.parent.glob("*.torn-*"))
    assert [a.name for a in asides] == [f"node.bkp.torn-{last.offset}{n}" for n in ("", "-2")]
    assert [len(a.read_bytes().rstrip(b"\0")) for a in asides] == [56, 60]


# Damage.


def small_log(url: str, directory: Path) -> tuple[list[Call], bytes, int]:
    """A backup with a snapshot, changes, an abandoned one; calls, snapshot and its end."""
    snapshot = node_snapshot(directory, CALLS[:2])
    backend = FileBackend(url)
    backend.create(snapshot)
    support.add_session(url, [CALLS[2], support.change(4, "-- abandoned")])
    support.add_session(url, [CALLS[3]])
    path = Path(backend.path)
    with path.open("r+b") as file:
        file.truncate(support.records_of(path)[-1][0].end + 700)
    return CALLS[2:], Path(snapshot.path).read_bytes(), support.records_of(path)[-1][0].end


def check_changed_byte(url: str, calls: list[Call], snapshot: bytes, where: object) -> None:
    """All that was acknowledged is there, or the damage is named; for writers, too."""
    try:
        found, pieces, damage, _ = stored(url)
    except UnsupportedLayout:
        found, pieces, damage = [], b"", BackupError("not a backup")
    if damage is None:
        assert (found, pieces) == (calls, snapshot), where
    else:
        abandoned = support.change(4, "-- abandoned")
        assert snapshot.startswith(pieces), where
        # What is delivered before damage is a beginning of what was stored.
        assert found in (calls[: len(found)], [calls[0], abandoned]), where
    try:
        version = opened_version(url)
    except (Damaged, UnsupportedLayout):
        assert damage is not None, where
    else:
        assert version == 4, where


@pytest.mark.usefixtures("impatient", "unmeasured")
@pytest.mark.parametrize("mask", [0xFF, 0x01])
def test_every_byte_changed(mask: int, fast_dir: Path, tmp_path: Path) -> None:
    url = f"file://{fast_dir}/node.bkp"
    calls, snapshot, end = small_log(url, tmp_path)
    path = Path(url.removeprefix("file://"))
    whole = path.read_bytes()
    named = 0
    for offset in range(end + 600):
        if 700 < offset < 3000 and (mask != 0xFF or offset % 7):
            continue  # The middle of the snapshot is all the same.
        data = bytearray(whole)
        data[offset] ^= mask
        put(path, data)
        check_changed_byte(url, calls, snapshot, (offset, mask))
        for aside in path.parent.glob("*.torn-*"):
            assert offset >= end, "nothing that was acknowledged is moved away"
            aside.unlink()
        named += stored(url)[2] is not None if offset >= 64 else 0
    assert named > 400


@pytest.mark.usefixtures("impatient")
def test_every_bit_of_the_last_record_turned(url: str) -> None:
    path = support.make_backup(url, [support.change(1, "-- one"), support.change(2, "-- two")])
    calls, end = stored(url)[0], support.records_of(path)[-1][0].end
    whole = path.read_bytes()[: end + 512]
    for offset in range(support.records_of(path)[-1][0].offset, end):
        for bit in range(8):
            data = bytearray(whole)
            data[offset] ^= 1 << bit
            put(path, data)
            found, _, damage, _ = stored(url)
            assert found == calls or damage is not None, (offset, bit)
            try:
                assert opened_version(url) == 2
            except Damaged:
                assert damage is not None
    assert not list(path.parent.glob("*.torn-*"))


@pytest.mark.usefixtures("impatient")
def test_damage_names_file_offset_versions_and_what_to_do(url: str) -> None:
    path = support.make_backup(url, CALLS)
    third = support.records_of(path)[2][0]
    support.flip(path, third.offset + HEAD.size + 3)
    assert FileBackend(url).status().damage is None, "its end is sound"
    damage = FileBackend(url).status(check=True).damage
    assert damage is not None
    for text in (str(path), f"offset {third.offset}", "up to version 2", "versions 3 to 4"):
        assert text in damage
    assert "resync" in damage and "--allow-damaged" in damage
    assert stored(url)[0] == CALLS[:2]


@pytest.mark.usefixtures("impatient")
def test_damaged_end_refuses_writers_and_serves_readers(url: str) -> None:
    path = support.make_backup(url, CALLS)
    last = support.records_of(path)[-1][0]
    support.flip(path, last.offset + HEAD.size + 3)
    before = support.contents(path.parent)
    backend = FileBackend(url)
    with pytest.raises(Damaged) as caught:
        backend.open()
    assert (caught.value.offset, caught.value.last_good) == (last.offset, 3)
    assert stored(url)[0] == CALLS[:3]
    assert support.contents(path.parent) == before
    support.flip(path, last.offset + HEAD.size + 3)
    assert opened_version(url) == 4  # The refusal let go of the lock.


@pytest.mark.usefixtures("impatient")
def test_record_of_another_backup_in_the_place_is_damage(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, CALLS)
    other = support.make_backup(f"file://{tmp_path}/other.bkp", CALLS)
    second = support.records_of(path)[1][0]
    data, foreign = bytearray(path.read_bytes()), other.read_bytes()
    data[second.offset : second.end] = foreign[second.offset : second.end]
    path.write_bytes(data)
    calls, _, damage, _ = stored(url)
    assert calls == CALLS[:1] and isinstance(damage, Damaged)


@pytest.mark.usefixtures("impatient")
def test_record_taken_out_of_the_middle_is_damage(url: str) -> None:
    path = support.make_backup(url, CALLS)
    heads = [head for head, _ in support.records_of(path)]
    data = path.read_bytes()
    path.write_bytes(data[: heads[1].offset] + data[heads[2].offset :])
    calls, _, damage, _ = stored(url)
    assert calls == CALLS[:1] and isinstance(damage, Damaged)
    with pytest.raises(Damaged):
        opened_version(url)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("field", ["sequence", "version", "changes", "chain_before", "chain"])
def test_sound_record_that_does_not_continue_the_one_before_is_damage(field: str, url: str) -> None:
    path = support.make_backup(url, CALLS)
    head, payload = support.records_of(path)[-1]
    other: dict[str, Any] = {field: bytes(16) if "chain" in field else getattr(head, field) + 1}
    with path.open("r+b") as file:
        file.seek(head.offset)
        file.write(layout2.encode(head._replace(**other), payload))
    calls, _, damage, _ = stored(url)
    assert calls == CALLS[:-1]
    assert isinstance(damage, Damaged) and damage.offset == head.offset


# Readers.


def test_reader_beside_a_growing_tail(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The append that a reader sees half-done is finished before it judges."""
    path = support.make_backup(url, CALLS)
    whole, last = path.read_bytes(), support.records_of(path)[-1][0]
    path.write_bytes(whole[: last.offset + 150].ljust(len(whole), b"\0"))
    judge, judged = layout2.judge_tail, []

    def judge_and_let_it_grow(
        pread: layout2.Pread, offset: int, size: int, backup_id: bytes | None, rules: int
    ) -> layout2.Tail:
        judged.append(judge(pread, offset, size, backup_id, rules).kind)
        path.write_bytes(whole)
        return (
            judge(pread, offset, size, backup_id, rules)
            if len(judged) > 1
            else layout2.Tail(judged[0], offset)
        )

    monkeypatch.setattr(layout2, "judge_tail", judge_and_let_it_grow)
    assert stored(url) == (CALLS, b"", None, False)
    assert judged[0] is layout2.TailKind.TORN


def test_reader_beside_a_writer_sees_a_beginning(url: str) -> None:
    """Not torn, not damaged: whatever moment a pass begins, it ends with a whole change."""
    calls = support.first_changes(60)
    support.make_backup(url)
    backend = FileBackend(url)
    backend.open()
    for number, (version, statements) in enumerate(calls):
        backend.add_change(Change(version, None, statements))
        assert stored(url) == (calls[: number + 1], b"", None, False)
    backend.close()


def test_pass_finishes_on_the_file_it_began_with(url: str, tmp_path: Path) -> None:
    support.make_backup(url, CALLS)
    backend = FileBackend(url)
    reading = backend.read()
    steps = iter(reading)
    first = next(steps)
    snapshot = node_snapshot(tmp_path, CALLS[:3])
    backend.replace(snapshot)
    *changes, (ending, _, _) = [first, *steps]
    assert [getattr(c.found, "transaction", None) for c in changes] == [s for _, s in CALLS]
    assert isinstance(ending, Ending) and (ending.version, ending.damage) == (4, None)
    reading.close()
    assert stored(url) == ([], Path(snapshot.path).read_bytes(), None, False)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("state", ["sound", "torn", "damaged"])
def test_looking_changes_no_byte(state: str, url: str) -> None:
    path = support.make_backup(url, CALLS)
    last = support.records_of(path)[-1][0]
    if state == "torn":
        path.write_bytes(path.read_bytes()[: last.offset + 140] + bytes(1000))
    if state == "damaged":
        support.flip(path, last.offset + 130)
    path.with_name("node.bkp.writer").unlink()
    os.utime(path, ns=(1, 1))
    os.chmod(path, 0o400)
    before = support.contents(path.parent)
    stored(url)
    status = FileBackend(url).status()
    assert (status.torn_tail, status.damage is not None) == (state == "torn", state == "damaged")
    assert support.contents(path.parent) == before
    assert path.stat().st_mtime_ns == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["node.bkp"]


# The writer's lock.


def test_second_writer_is_refused_and_told_who(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, CALLS)
    program = (
        "import sys; from filebackend import FileBackend\n"
        "b = FileBackend(sys.argv[1]); b.open(); print('open', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, url],
        cwd=support.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        before = support.contents(path.parent)
        with pytest.raises(BackupBusy, match=rf"pid {holder.pid}\b"):
            FileBackend(url).open()
        with pytest.raises(BackupBusy):
            FileBackend(url).replace(node_snapshot(tmp_path, CALLS))
        assert stored(url)[0] == CALLS  # Readers need no lock.
        assert support.contents(path.parent) == before
        holder.kill()
    assert opened_version(url) == 4  # A killed holder leaves no lock behind.


def test_who_was_shut_out_is_told_so_also_while_the_new_owner_holds_it(url: str) -> None:
    """And neither waits for that one's end, nor is told to stop it."""
    old, new = new_owner(), new_owner()
    holder = FileBackend(url)
    holder.create(None)
    holder.open()
    with contextlib.closing(holder):
        holder.take_over(new)
        with pytest.raises(OtherOwner, match="took it over at"):
            FileBackend(url).open(old)
        with pytest.raises(BackupBusy):
            FileBackend(url).open(new)


def test_lock_that_does_not_work_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    support.make_backup(url, CALLS)

    def no_locks(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(DiskError, match="locks must work there"):
        FileBackend(url).open()


# New files.


def test_create_makes_one_file_that_only_its_owner_reads(url: str) -> None:
    FileBackend(url).create(None)
    path = Path(url.removeprefix("file://"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == durable.PREALLOCATE_STEP
    assert {p.name for p in path.parent.iterdir()} <= {"node.bkp", "node.bkp.writer"}


def test_create_refuses_what_is_there_and_says_what_it_is(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, CALLS)
    before = support.contents(path.parent)
    with pytest.raises(BackupExists, match="backup at version 4"):
        FileBackend(url).create(None)
    (tmp_path / "other").write_bytes(b"precious")
    with pytest.raises(BackupExists, match="not a backup"):
        FileBackend(f"file://{tmp_path}/other").create(None)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(BackupError):
        FileBackend(f"file://{tmp_path}/dangling").create(None)
    with pytest.raises(ConfigError, match="does not exist"):
        FileBackend(f"file://{tmp_path}/none/x").create(None)
    assert support.contents(path.parent) == before
    assert (tmp_path / "other").read_bytes() == b"precious"


def test_replace_keeps_the_old_file(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, CALLS)
    old = path.read_bytes()
    snapshots = [node_snapshot(tmp_path, CALLS[:n]) for n in (3, 2)]
    kept = [FileBackend(url).replace(snapshot) for snapshot in snapshots]
    assert kept[0] is not None and kept[1] is not None and kept[0] != kept[1]
    assert Path(kept[0]).read_bytes() == old
    assert stored(f"file://{kept[0]}")[0] == CALLS
    assert stored(f"file://{kept[1]}")[1] == Path(snapshots[0].path).read_bytes()
    assert stored(url) == ([], Path(snapshots[1].path).read_bytes(), None, False)
    names = {Path(k).name for k in kept if k} | {"node.bkp", "node.bkp.writer"}
    assert {p.name for p in path.parent.iterdir()} == names


def test_what_is_kept_last_is_the_newest_though_the_clock_was_set_back(url: str) -> None:
    path = support.make_backup(url, CALLS)
    for name in ("20990101T000000Z-2", "20990101T000000Z-3"):  # The first of them is gone.
        path.with_name(f"{path.name}.old-{name}").write_bytes(path.read_bytes())
    kept = FileBackend(url).replace(None)
    assert kept == f"{path}.old-20990101T000000Z-4"
    former.prune(str(path))
    left = {found.name for found in path.parent.glob("*.old-*")}
    assert left == {f"{path.name}.old-20990101T000000Z-{number}" for number in (3, 4)}


def test_replace_by_the_writer_goes_on_with_the_new_file(url: str, tmp_path: Path) -> None:
    support.make_backup(url, CALLS[:1])
    backend = FileBackend(url)
    backend.open()
    snapshot = node_snapshot(tmp_path, CALLS[:3])
    backend.replace(snapshot)
    assert (backend.version, backend.rewindable, backend.version_count) == (3, False, 1)
    backend.add_change(Change(CALLS[3][0], None, CALLS[3][1]))
    backend.close()
    assert stored(url) == (CALLS[3:], Path(snapshot.path).read_bytes(), None, False)


def test_snapshot_of_many_pieces(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3 * (1 << 20) + 17)
    (tmp_path / "big").write_bytes(content)
    backend = FileBackend(url)
    backend.create(Snapshot(str(tmp_path / "big"), 9))
    assert stored(url) == ([], content, None, False)
    status = backend.status()
    assert (status.snapshot_size, status.version, status.version_count) == (len(content), 9, 1)
    heads = [head for head, _ in support.records_of(Path(backend.path))]
    assert [head.length for head in heads] == [1 << 20] * 3 + [17]
    # One that loses a piece from its end is named, for writers too.
    path = Path(backend.path)
    path.write_bytes(path.read_bytes()[: heads[-1].offset])
    monkeypatch.setattr(logreader, "GROWING_TAIL_S", 0.0)
    assert isinstance(stored(url)[2], Damaged)
    with pytest.raises(Damaged):
        opened_version(url)


def test_low_disk_is_a_warning(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    support.make_backup(url, CALLS)
    usage = shutil.disk_usage
    assert usage("/")

    def nearly_full(path: str) -> object:
        return type(usage(path))(100 << 30, 99 << 30, 500 << 20)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    (warning,) = FileBackend(url).status().warnings
    assert "nearly full" in warning and "500 MiB" in warning


@pytest.mark.parametrize(
    ("backup_size", "wanted"),
    [
        (0, 512 << 20),
        (1 << 20, 512 << 20),
        (256 << 20, 512 << 20),
        ((256 << 20) + 1, (512 << 20) + 2),
        (10 << 30, 20 << 30),
    ],
)
def test_space_wanted(backup_size: int, wanted: int) -> None:
    assert space.wanted(backup_size) == wanted


def test_status_in_numbers(url: str, tmp_path: Path) -> None:
    began = time.time_ns()
    calls, snapshot, end = small_log(url, tmp_path)
    status = FileBackend(url).status()
    assert (status.version, status.prev_version) == (4, 3)
    assert (status.changes, status.version_count) == (len(calls), len(calls) + 1)
    assert (status.size, status.allocated) == (end, end + 700)
    assert status.snapshot_size == len(snapshot)
    assert status.last_change_ns is not None and began < status.last_change_ns < time.time_ns()
    assert (status.torn_tail, status.damage) == (False, None)
    assert status.layout == "file layout 2" and len(status.backup_id or "") == 32
    heads = [head for head, _ in support.records_of(Path(url.removeprefix("file://")))]
    assert end == 64 + sum(OVERHEAD + head.length for head in heads)
