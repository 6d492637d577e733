"""Layout 1: every state that its writer, a crash or a bad disk leaves, read without a change."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from backend import MAX_CHANGE_SIZE, bump
from errors import BackupError, BackupMissing, Damaged, DatabaseError, DiskError, UnsupportedLayout
from filebackend import FileBackend
from filelog.layout1 import Layout1Ending, Layout1Reading, header_version, is_layout_1
from tests import support
from tests.layout1_files import (
    FIRST_ENTRY,
    HEAD_SIZE,
    EarlierPlugin,
    change_entry,
    entry,
    header,
    set_header,
    written,
)
from tests.support import ROOT, Call, apply_calls, change, first_changes
from wallet import database, restore
from wallet.database import mend

OFF, ON = "PRAGMA foreign_keys = OFF;", "PRAGMA foreign_keys = ON;"
ABANDONED = change(5, "INSERT INTO items VALUES (90, 'this never happened')")
SECOND = change(5, "INSERT INTO items VALUES (91, 'neither did this, and it is longer')")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return tmp_path / "old.bkp"


def read(path: Path) -> tuple[list[Call], Layout1Ending]:
    """The changes that count, and how the pass went."""
    calls, _, ending = support.passed(Layout1Reading(str(path)))
    assert isinstance(ending, Layout1Ending)
    return calls, ending


def restored(path: Path, name: str = "restored.sqlite3", allow_damaged: bool = False) -> Path:
    target = path.parent / name
    reading = FileBackend(f"file://{path}").read()
    try:
        restore.restore(reading, str(target), allow_damaged, lambda *_: None)
    finally:
        reading.close()
    return target


def expected(path: Path, calls: Sequence[Call], name: str = "node.sqlite3") -> Path:
    """The database of a node that committed ``calls``."""
    target = path.parent / name
    apply_calls(target, calls)
    return target


def assert_restores(path: Path, calls: Sequence[Call], allow_damaged: bool = False) -> None:
    node, result = expected(path, calls), restored(path, allow_damaged=allow_damaged)
    assert database.compare(str(node), str(result)) == []
    node.unlink()
    result.unlink()


def assert_sound(path: Path, calls: Sequence[Call], notes: Sequence[str] = ()) -> None:
    """``path`` leads to ``calls``, undamaged, and says ``notes`` and no more."""
    found, ending = read(path)
    assert found == calls
    assert ending.damage is None
    assert ending.version == (calls[-1][0] if calls else 0)
    assert len(ending.notes) == len(notes), ending.notes
    for note, text in zip(ending.notes, notes, strict=True):
        assert text in note
    assert_restores(path, calls)


def assert_damaged(path: Path, offset: int, calls: Sequence[Call], *texts: str) -> None:
    """Refused, with the offset and ``texts``; --allow-damaged delivers ``calls``."""
    url = f"file://{path}"
    with pytest.raises(Damaged) as caught:
        restored(path)
    assert not list(path.parent.glob("restored*"))
    for text in (str(path), f"at offset {offset}:", f"good up to version {calls[-1][0]}", *texts):
        assert text in str(caught.value)
    status = FileBackend(url).status()
    assert status.damage == str(caught.value)
    assert status.version == calls[-1][0]
    assert_restores(path, calls, allow_damaged=True)


# What is no damage


def test_normal(old: Path) -> None:
    calls = first_changes(6)
    written(old, calls[:4], calls[4:])
    assert_sound(old, calls)
    status = FileBackend(f"file://{old}").status()
    assert (status.version, status.prev_version) == (6, 5)
    assert (status.changes, status.version_count, status.snapshot_size) == (6, 6, 0)
    assert (status.damage, status.torn_tail, status.notes) == (None, False, [])


def test_empty(old: Path) -> None:
    EarlierPlugin(old)
    calls, ending = read(old)
    assert (calls, ending.damage, ending.notes, ending.version) == ([], None, (), 0)
    with pytest.raises(restore.NothingToRestore):
        restored(old)
    assert not (old.parent / "restored.sqlite3").exists()


def test_empty_with_allow_damaged(old: Path) -> None:
    """Nothing stands before the damage: no empty database is made of that."""
    old.write_bytes(header(4, 900))
    with pytest.raises(Damaged):
        restored(old, allow_damaged=True)


@pytest.mark.parametrize("then", [0, 1, 3])
@pytest.mark.parametrize("times", [1, 2])
def test_after_a_rewind(times: int, then: int, old: Path) -> None:
    calls = first_changes(5 + then)
    plugin = written(old, [*calls[:4], ABANDONED], *([[SECOND]] if times == 2 else []), calls[4:])
    assert plugin.count == 5 + times + then
    assert plugin.offset < old.stat().st_size, "its header is wrong after that, and no matter"
    assert_sound(old, calls)
    status = FileBackend(f"file://{old}").status()
    assert status.changes == 5 + then
    assert status.notes == [f"{times} changes that never happened are left out."]


def test_the_last_change_may_be_the_abandoned_one(old: Path) -> None:
    """Nothing contradicts it yet, so it counts, and can be rewound."""
    calls = [*first_changes(4), ABANDONED]
    written(old, calls)
    assert_sound(old, calls)
    assert FileBackend(f"file://{old}").status().prev_version == 4


def test_the_first_change_abandoned(old: Path) -> None:
    calls = first_changes(2)
    written(old, [change(1, "CREATE TABLE never (x)")], calls)
    assert_sound(old, calls)


def test_pragmas_do_not_take_back_a_change(old: Path) -> None:
    """They carry the version of the commit before, and its change did happen."""
    calls = [
        *first_changes(3),
        (3, [OFF]),
        change(4, "CREATE TABLE more (id INTEGER PRIMARY KEY, item REFERENCES items(id))"),
        (4, [ON]),
        change(5, "INSERT INTO more VALUES (1, 2)"),
    ]
    written(old, calls)
    assert_sound(old, calls)


def test_a_change_abandoned_before_a_pragma(old: Path) -> None:
    calls = first_changes(4)
    rest = [(4, [OFF]), change(5, "CREATE TABLE more (x)"), (4 + 1, [ON])]
    plugin = written(old, [*calls, ABANDONED])
    for call in rest:
        with old.open("ab") as file:
            file.write(change_entry(call))
    plugin.count += 3
    plugin.write_header()
    assert_sound(old, [*calls, *rest])


def test_crash_trace(old: Path) -> None:
    """A recorded node, killed again and again, under the earlier plugin's writes."""
    sessions = support.trace_sessions("crash")
    plugin = written(old, *sessions)
    before = plugin.path.stat(), support.contents(old.parent)
    calls, ending = read(old)
    assert ending.damage is None and ending.notes == ()
    assert ending.abandoned == sum(map(len, sessions)) - len(calls) > 50
    result = restored(old)
    node = support.trace_database("crash", old.parent)
    assert database.compare(str(node), str(result)) == []
    result.unlink()
    node.unlink()
    assert support.contents(old.parent) == before[1]
    assert old.stat().st_mtime_ns == before[0].st_mtime_ns


def test_no_byte_is_changed(old: Path) -> None:
    """By status, verify and restore, damaged or not."""
    url = f"file://{old}"
    node = expected(old, first_changes(4))
    for tail, code in ((b"", 0), (b"\0\0\0", 0), (b"\0\0\0\x09\0\0\0\x09\x07", 0)):
        written(old, first_changes(4))
        with old.open("ab") as file:
            file.write(tail)
        old.chmod(0o400)
        os.utime(old, ns=(10**18, 10**18))
        before = support.contents(old.parent)
        support.run_cli("status", url, check=code)
        support.run_cli("verify", url, "--against", node, check=code)
        support.run_cli("restore", url, old.parent / "result.db", check=code)
        (old.parent / "result.db").unlink()
        assert support.contents(old.parent) == before
        assert old.stat().st_mtime_ns == 10**18
        assert not list(old.parent.glob("*.writer"))
        old.unlink()


# The end: torn, zero, or not as the header has it


@pytest.mark.parametrize("replaces", [False, True], ids=["new version", "after a rewind"])
def test_torn_at_every_byte(replaces: bool, old: Path) -> None:
    calls = first_changes(5)
    plugin = written(old, [*calls[:4], ABANDONED] if replaces else calls[:4])
    before = plugin.header()
    plugin.session(calls[4:])
    after, whole, start = plugin.header(), old.read_bytes(), plugin.starts[-1]
    for end in range(start, len(whole)):
        kept = calls[:4]
        if replaces and end < start + HEAD_SIZE:
            kept = [*kept, ABANDONED]  # Nothing is there yet to contradict it.
        old.write_bytes(before + whole[FIRST_ENTRY:end])
        found, ending = read(old)
        assert (found, ending.damage) == (kept, None), end
        assert ending.torn_tail == (end > start)
        assert ending.version == kept[-1][0]
        assert [note for note in ending.notes if "behind" in note] == []
        old.write_bytes(after + whole[FIRST_ENTRY:end])
        found, ending = read(old)
        assert found == kept
        assert isinstance(ending.damage, Damaged), end
        assert ending.damage.offset == start
        if end in (start, start + 3, start + HEAD_SIZE, len(whole) - 1):
            assert_damaged(old, start, kept)
            set_header(old, before)
            assert_restores(old, kept)


def test_torn_tail_is_reported(old: Path) -> None:
    calls = first_changes(5)
    plugin = written(old, calls[:4])
    before = plugin.header()
    plugin.session(calls[4:])
    os.truncate(old, old.stat().st_size - 1)
    set_header(old, before)
    note = f"At offset {plugin.starts[-1]} it ends inside an entry; it was left out."
    assert_sound(old, calls[:4], [note])
    url = f"file://{old}"
    assert FileBackend(url).status().torn_tail
    assert note in support.run_cli("status", url).stdout
    assert note in support.run_cli("verify", url).stdout
    assert note in support.run_cli("restore", url, old.parent / "result.db").stdout


def test_damage_needs_allow_damaged(old: Path) -> None:
    calls = first_changes(5)
    plugin = written(old, calls)
    os.truncate(old, old.stat().st_size - 1)
    assert_damaged(old, plugin.starts[-1], calls[:4], "names version 5")
    url = f"file://{old}"
    for command in ("status", url), ("verify", url), ("restore", url, old.parent / "result.db"):
        done = support.run_cli(*command, check=1)
        assert f"damaged at offset {plugin.starts[-1]}: it ends inside an entry" in done.stderr
    done = support.run_cli("restore", "--allow-damaged", url, old.parent / "result.db", check=3)
    assert "OLD state" in done.stderr


@pytest.mark.parametrize("size", [1, 8, 9, 10, 4096, (1 << 20) + 1])
def test_zero_tail(size: int, old: Path) -> None:
    calls = first_changes(4)
    plugin = written(old, calls)
    end = old.stat().st_size
    with old.open("ab") as file:
        file.write(bytes(size))
    reason = "the rest is zero" if size >= HEAD_SIZE else "it ends inside an entry"
    assert_sound(old, calls, [f"At offset {end} {reason}"])
    plugin.version = 5
    plugin.write_header()
    assert_damaged(old, end, calls, reason, "names version 5")


@pytest.mark.parametrize("replaces", [False, True], ids=["new version", "after a rewind"])
@pytest.mark.parametrize("good", [0, 1, 20], ids="{} bytes good".format)
def test_zero_filled_payload(good: int, replaces: bool, old: Path) -> None:
    """The size of the file was on the disk before its content."""
    calls = first_changes(5)
    plugin = written(old, [*calls[:4], ABANDONED] if replaces else calls[:4])
    before = plugin.header()
    plugin.session(calls[4:])
    data = old.read_bytes()
    keep = plugin.starts[-1] + HEAD_SIZE + good
    old.write_bytes(data[:keep] + bytes(len(data) - keep))
    assert_damaged(old, plugin.starts[-1], calls[:4], "empty statement")
    set_header(old, before)
    assert_sound(old, calls[:4], ["empty statement"])


def test_zeros_with_more_behind_are_no_tail(old: Path) -> None:
    """A block that never reached the disk, though later ones did, and a header that did not."""
    calls = first_changes(8)
    plugin = written(old, calls)
    data = bytearray(old.read_bytes())
    for behind in range(6):
        set_header(old, header(behind, 600))
        for start, end in ((plugin.starts[5], plugin.starts[6]), (plugin.starts[5] + 20,) * 2):
            data[start : max(end, start + 70)] = bytes(max(end, start + 70) - start)
            old.write_bytes(header(behind, 600) + data[FIRST_ENTRY:])
            assert_damaged(old, plugin.starts[5], calls[:5], "versions 6 to 8 stand behind")
        data = bytearray(plugin.header()) + b"".join(map(change_entry, calls))


@pytest.mark.parametrize("behind", [0, 1, 3, 4])
def test_header_behind(behind: int, old: Path) -> None:
    calls = first_changes(5)
    plugin = written(old, calls)
    set_header(old, header(behind, plugin.starts[behind], max(behind - 1, 0), 512, behind))
    assert_sound(old, calls, [f"header is behind: it names version {behind}"])


@pytest.mark.parametrize("ahead", [6, 7, 2**32 - 1])
def test_header_ahead(ahead: int, old: Path) -> None:
    calls = first_changes(5)
    written(old, calls)
    end = old.stat().st_size
    set_header(old, header(ahead, end + 100, 5, end, 6))
    assert_damaged(old, end, calls, "the file ends there", f"names version {ahead}")


def test_header_ahead_by_a_replacement(old: Path) -> None:
    """The version is the same, but the header counts an entry that is not there."""
    plugin = written(old, [*first_changes(4), ABANDONED])
    end = old.stat().st_size
    plugin.session([SECOND])
    os.truncate(old, end)
    assert_damaged(old, end, [*first_changes(4), ABANDONED], "counts 6 entries, and 5 are there")


@pytest.mark.parametrize("size", [4, 30, 511])
def test_header_cut_off(size: int, old: Path) -> None:
    old.write_bytes(header(3, 900)[:size])
    with pytest.raises(Damaged, match="the header is cut off"):
        restored(old, allow_damaged=True)


# Entries that should not be there


def test_length_past_the_end(old: Path) -> None:
    calls = first_changes(5)
    plugin = written(old, calls[:4])
    data = change_entry(calls[4])
    for length in (len(data) - HEAD_SIZE + 1, 2**31, 2**32 - 1):
        old.write_bytes(plugin.header() + b"".join(map(change_entry, calls[:4])))
        with old.open("ab") as file:
            file.write(entry(5, data[HEAD_SIZE:], length=length))
        size = old.stat().st_size - len(data)
        assert_sound(old, calls[:4], [f"At offset {size} it ends inside an entry"])
        set_header(old, header(5, size + len(data), 4, size, 5))
        assert_damaged(old, size, calls[:4], "it ends inside an entry")


@pytest.mark.parametrize("kind", [0, 3, 255])
def test_unknown_type(kind: int, old: Path) -> None:
    calls = first_changes(5)
    plugin = written(old, calls[:4])
    with old.open("ab") as file:
        file.write(entry(5, change_entry(calls[4])[HEAD_SIZE:], kind))
    end = old.stat().st_size - len(change_entry(calls[4]))
    assert_sound(old, calls[:4], [f"At offset {end} an entry of the unknown type {kind}"])
    plugin.session(calls[4:])
    assert_damaged(old, end, calls[:4], f"unknown type {kind}")


def test_gap(old: Path) -> None:
    calls = first_changes(6)
    plugin = written(old, calls)
    data = b"".join(map(change_entry, [*calls[:3], *calls[4:]]))
    for start in plugin.header(), header(0, 512):
        old.write_bytes(start + data)
        assert_damaged(old, plugin.starts[3], calls[:3], "version 5 follows one of version 3")


def test_an_entry_that_goes_back(old: Path) -> None:
    """Two versions back is no rewind."""
    calls = first_changes(5)
    written(old, calls)
    end = old.stat().st_size
    with old.open("ab") as file:
        file.write(change_entry(calls[3]))
    assert_damaged(old, end, calls, "version 4 follows one of version 5")


def test_no_rewind_of_a_rewind(old: Path) -> None:
    """After a change that did not bump nothing can be taken back."""
    calls = [*first_changes(5), (5, [OFF])]
    written(old, calls)
    end = old.stat().st_size
    with old.open("ab") as file:
        file.write(change_entry(calls[4]))
    assert_damaged(old, end, calls, "version 5 follows one of version 5")


def test_not_utf_8(old: Path) -> None:
    calls = first_changes(5)
    plugin = written(old, calls)
    data = bytearray(old.read_bytes())
    data[plugin.starts[3] + HEAD_SIZE + 2] = 0xFF
    old.write_bytes(data)
    assert_damaged(old, plugin.starts[3], calls[:3], "not UTF-8")


@pytest.mark.parametrize("last", [False, True])
def test_empty_entry(last: bool, old: Path) -> None:
    calls = first_changes(5)
    data = [*map(change_entry, calls[:4]), entry(5, b"")]
    rest = b"" if last else change_entry(change(6, "SELECT 1"))
    version = 5 if last else 6
    old.write_bytes(header(version, 0, count=version) + b"".join(data) + rest)
    offset = FIRST_ENTRY + sum(map(len, data[:4]))
    assert_damaged(old, offset, calls[:4], "empty statement")


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO items VALUES (50, 'a\0b')",
        "INSERT INTO items VALUES (50, 'a')\0",
        "\0INSERT INTO items VALUES (50, 'a')",
        "INSERT INTO items VALUES (50, 'a\0\0b')",
        "INSERT INTO items VALUES (50, x'00') -- it's\0'",
    ],
)
def test_nul_byte(statement: str, old: Path) -> None:
    """It fell into two statements when it was stored; the right one cannot be known."""
    calls = [*first_changes(4), change(5, statement), change(6, "INSERT INTO items VALUES (6, '')")]
    written(old, calls)
    with pytest.raises((DatabaseError, Damaged)) as caught:
        restored(old)
    assert not list(old.parent.glob("restored*"))
    text = str(caught.value)
    assert "change to version 5" in text
    assert "does not replay" in text or "NUL byte" in text


# Snapshots


def sqlite_file(path: Path, calls: Sequence[Call]) -> bytes:
    node = expected(path, calls, "snapshot.sqlite3")
    data = node.read_bytes()
    node.unlink()
    return data


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("then", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 1, 4])
def test_snapshot(before: int, then: int, count: int, old: Path) -> None:
    """It replaces what stands before it, twice if there are two in a row."""
    calls = first_changes(6 + then)
    plugin = written(old, [*calls[:before], ABANDONED][:5] if before == 4 else calls[:before])
    for extra in range(count):
        plugin.snapshot(5 + extra, sqlite_file(old, calls[: 5 + extra]))
    at = 4 + count
    plugin.session(calls[at : at + then])
    result, node = restored(old), expected(old, calls[: at + then])
    assert database.compare(str(node), str(result)) == []
    status = FileBackend(f"file://{old}").status()
    assert (status.version, status.changes) == (at + then, then)
    assert status.version_count == then + 1
    assert status.prev_version == (at + then - 1 if then else None)
    assert status.damage is None
    assert status.notes == []


def test_changes_before_and_behind_a_snapshot(old: Path) -> None:
    """A change taken back right behind it, too."""
    calls = first_changes(6)
    plugin = written(old, calls[:2])
    plugin.snapshot(4, sqlite_file(old, calls[:4]))
    plugin.session([ABANDONED])
    plugin.session(calls[4:])
    assert database.compare(str(restored(old)), str(expected(old, calls))) == []


def test_a_snapshot_cannot_be_taken_back(old: Path) -> None:
    calls = first_changes(5)
    plugin = EarlierPlugin(old)
    plugin.snapshot(5, sqlite_file(old, calls))
    end = old.stat().st_size
    with old.open("ab") as file:
        file.write(change_entry(calls[4]))
    _, ending = read(old)
    assert isinstance(ending.damage, Damaged)
    assert ending.damage.offset == end


def test_torn_snapshot(old: Path) -> None:
    """The changes before it still count."""
    calls = first_changes(4)
    plugin = written(old, calls)
    before, end = plugin.header(), old.stat().st_size
    plugin.snapshot(4, sqlite_file(old, calls))
    after = plugin.header()
    for size in (end + HEAD_SIZE, end + HEAD_SIZE + 100, old.stat().st_size - 1):
        os.truncate(old, old.stat().st_size if size > old.stat().st_size else size)
        set_header(old, before)
        assert_sound(old, calls, ["it ends inside an entry"])
        set_header(old, after)
        assert_damaged(old, end, calls, "counts 5 entries, and 4 are there")
        with old.open("ab") as file:
            file.truncate(end)
        plugin.count -= 1
        plugin.snapshot(4, sqlite_file(old, calls))


def test_empty_snapshot(old: Path) -> None:
    """Holds no version, so it is no backup of one."""
    plugin = EarlierPlugin(old)
    plugin.snapshot(5, b"")
    with pytest.raises(BackupError):
        restored(old)
    plugin.session([change(6, "CREATE TABLE t (x)")])
    with pytest.raises(DatabaseError, match="version 6 does not replay"):
        restored(old)
    assert not list(old.parent.glob("restored*"))


def test_snapshot_of_another_version(old: Path) -> None:
    plugin = EarlierPlugin(old)
    plugin.snapshot(6, sqlite_file(old, first_changes(5)))
    with pytest.raises(DatabaseError, match="data_version is 5, but the backup's is 6"):
        restored(old)


# Statements of 2020


OLD_TABLES = (
    "CREATE TABLE outputs (id INTEGER PRIMARY KEY, reserved_til INTEGER, label TEXT)",
    "CREATE TABLE channels (id INTEGER PRIMARY KEY, peer_id INTEGER)",
)
LOOKS_LIKE_IT = "reserved_til=1WHERE it''s peer_id=2WHERE channels.id="


def missing_space(broken: bool) -> list[Call]:
    space = "" if broken else " "
    return [
        (1, [*first_changes(1)[0][1][:-1], *OLD_TABLES, first_changes(1)[0][1][-1]]),
        change(
            2,
            f"INSERT INTO outputs VALUES (1, 0, '{LOOKS_LIKE_IT}'), (2, 0, 'second')",
            "INSERT INTO channels VALUES (1, 7), (22, 8)",
        ),
        change(3, f"UPDATE outputs SET reserved_til=1440{space}WHERE id=1"),
        change(4, f"UPDATE channels SET peer_id=9{space}WHERE channels.id=22"),
        change(
            5,
            f"UPDATE outputs SET label='{LOOKS_LIKE_IT}3', reserved_til=5{space}WHERE id=2",
            f'UPDATE outputs SET "reserved_til"=6, reserved_til=7{space}WHERE'
            f" label='{LOOKS_LIKE_IT}3'",
        ),
        change(6, "UPDATE outputs SET reserved_til=(8)WHERE id=1"),
    ]


def test_missing_spaces(old: Path) -> None:
    broken, whole = missing_space(True), missing_space(False)
    with pytest.raises(sqlite3.OperationalError):
        expected(old, broken, "broken.sqlite3")
    written(old, broken)
    node, result = expected(old, whole), restored(old)
    assert database.compare(str(node), str(result)) == []
    with contextlib.closing(sqlite3.connect(result)) as connection:
        rows = connection.execute("SELECT * FROM outputs").fetchall()
    literal = LOOKS_LIKE_IT.replace("''", "'")
    assert rows == [(1, 8, literal), (2, 7, literal + "3")]


@pytest.mark.parametrize(
    ("statement", "mended"),
    [
        ("SET reserved_til=1WHERE a=1", "SET reserved_til=1 WHERE a=1"),
        ("SET peer_id=12WHERE channels.id=3", "SET peer_id=12 WHERE channels.id=3"),
        ("SET peer_id=12 WHERE channels.id=3", None),
        ("SET peer_id=WHERE", None),
        ("SET other_peer_id=1WHEREVER, xreserved_til=1WHERE", None),
        ("SET a='peer_id=1WHERE'", None),
        ("SET a='it''s peer_id=1WHERE'", None),
        ('SET "peer_id=1WHERE"=1', None),
        ("SET a='x', peer_id=1WHERE b='peer_id=1WHERE'", "SET a='x', peer_id=1 WHERE b='peer_id=1"),
    ],
)
def test_mend(statement: str, mended: str | None) -> None:
    result = mend(statement)
    assert result.startswith(mended) if mended else result == statement


def test_a_good_statement_is_not_mended(old: Path) -> None:
    """SQLite has the first word: what it takes is executed as it stands."""
    calls = [*first_changes(2), change(3, f"INSERT INTO items VALUES (3, '{LOOKS_LIKE_IT}')")]
    written(old, calls)
    assert_sound(old, calls)


# Every byte


FLIPPED = {
    "changes": [first_changes(5)],
    "abandoned in the middle": [[*first_changes(4), ABANDONED], [first_changes(5)[4]]],
    "abandoned twice": [
        [*first_changes(3), change(4, "SELECT 'never'")],
        [first_changes(4)[3], ABANDONED],
        [SECOND],
        [first_changes(5)[4]],
    ],
    "pragmas": [[*first_changes(2), (2, [OFF]), change(3, "CREATE TABLE more (x)"), (3, [ON])]],
}


@pytest.mark.parametrize("name", FLIPPED)
def test_every_flip(name: str, old: Path) -> None:
    """Every bit of the header, of every entry's head, and of what bumps the version.

    Layout 1 has no checksums: a flip inside another statement that leaves valid SQL cannot
    be told from what the node wrote. Nothing else changes what is restored without a word.
    """
    plugin = written(old, *FLIPPED[name])
    data, (right, _) = old.read_bytes(), read(old)
    heads, bumps = set(range(40)), set()
    for start, end in zip(plugin.starts, [*plugin.starts[1:], len(data)], strict=True):
        heads |= {*range(start, start + HEAD_SIZE)}
        bumps |= {*range(max(end - len(bump(5)), start), end)} - heads
    for offset in sorted(heads | bumps):
        for bit in range(8) if offset in heads else (offset % 3, 5):
            assert not wrong_unseen(old, flipped(data, offset, bit), right), (offset, bit)
    unseen = 0
    for offset in sorted(set(range(FIRST_ENTRY, len(data))) - heads - bumps)[::9]:
        unseen += wrong_unseen(old, flipped(data, offset, offset % 7), right)
    assert unseen > 0, "then this test may ask for more"


def flipped(data: bytes, offset: int, bit: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


def wrong_unseen(path: Path, data: bytes, right: list[Call]) -> bool:
    """Whether a restore replays anything but ``right`` without a word."""
    path.write_bytes(data)
    if not is_layout_1(str(path)):
        return False  # Refused: see test_no_other_file.
    target = path.parent / "flipped.sqlite3"
    calls, ending = read(path)
    if calls == right or ending.damage is not None or ending.torn_tail:
        return False
    with contextlib.closing(Layout1Reading(str(path))) as reading:
        try:
            result = restore.restore(reading, str(target), False, lambda *_: None)
        except BackupError:
            return False
    target.unlink()
    return not result.problems


@pytest.mark.parametrize("offset", range(4))
def test_no_other_file(offset: int, old: Path) -> None:
    """A file that begins otherwise is not taken for one of layout 1."""
    data = written(old, first_changes(2)).path.read_bytes()
    for bit in range(8):
        old.write_bytes(flipped(data, offset, bit))
        with pytest.raises(UnsupportedLayout, match="not a backup"):
            restored(old)


def test_flips_around_a_snapshot(old: Path) -> None:
    """As above; a snapshot's own content has SQLite's checks alone."""
    calls = first_changes(7)
    plugin = written(old, calls[:2])
    plugin.snapshot(4, sqlite_file(old, calls[:4]))
    plugin.session([calls[4], change(6, "SELECT 'never'")])
    plugin.session(calls[5:])
    data, node = old.read_bytes(), expected(old, calls)
    result = old.parent / "flipped.sqlite3"
    for start in plugin.starts:
        for offset in range(start, start + HEAD_SIZE):
            for bit in range(8):
                old.write_bytes(flipped(data, offset, bit))
                try:
                    restored(old, result.name)
                except BackupError:
                    continue
                assert database.compare(str(node), str(result)) == [], (offset, bit)
                result.unlink()


def test_a_statement_of_another_version(old: Path) -> None:
    """The head says one version, the statements lead to another."""
    calls = first_changes(5)
    plugin = written(old, calls[:4])
    with old.open("ab") as file:
        file.write(entry(4, change_entry(calls[4])[HEAD_SIZE:]))
    end = plugin.starts[-1] + len(change_entry(calls[3]))
    assert_damaged(old, end, calls[:4], "change to version 4")


# Size


PROGRAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from errors import BackupError
from filelog import layout1
from wallet import restore
reading = layout1.Layout1Reading(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if len(sys.argv) == 4:
    restore.restore(reading, sys.argv[3], False, lambda *_: None)
else:
    *changes, (ending, _, _) = reading
    print(len(changes))
    print(ending.notes, ending.damage)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
assert grown < 48, f"{grown} MiB more than at the start"
"""


def with_little_memory(*arguments: object) -> list[str]:
    """Run the program above; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=support.ANSWER_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_large_snapshot_costs_no_memory(old: Path) -> None:
    calls = first_changes(4)
    node = expected(old, calls)
    with sqlite3.connect(node) as connection:
        connection.execute("CREATE TABLE large (body BLOB)")
        connection.executemany("INSERT INTO large VALUES (zeroblob(?))", [(1 << 20,)] * 120)
    connection.close()
    assert node.stat().st_size > 120 << 20
    plugin = EarlierPlugin(old)
    plugin.snapshot(4, node.read_bytes())
    plugin.session([change(5, "INSERT INTO items VALUES (99, 'later')")])
    with_little_memory(old, old.parent / "restored.sqlite3")
    assert database.version_of(str(old.parent / "restored.sqlite3")) == 5
    assert (old.parent / "restored.sqlite3").stat().st_size >= node.stat().st_size


def test_a_huge_entry_costs_no_memory(old: Path) -> None:
    """4 GiB by its head, and there, but far over the limit of a change."""
    written(old, first_changes(2))
    with old.open("ab") as file:
        file.write(entry(3, b"", length=2**32 - 1))
        file.truncate(file.tell() + MAX_CHANGE_SIZE + 1)
    count, what = with_little_memory(old)
    assert count == "2"
    assert "it ends inside an entry" in what
    with old.open("r+b") as file:
        file.seek(-(MAX_CHANGE_SIZE + 1) - HEAD_SIZE, os.SEEK_END)
        file.write(entry(3, b"", length=MAX_CHANGE_SIZE + 1))
    count, what = with_little_memory(old)
    assert count == "2"
    assert "over the limit" in what


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackupMissing):
        Layout1Reading(str(tmp_path / "missing"))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DiskError, match="loop"):
        Layout1Reading(str(loop))
    assert not is_layout_1(str(loop))
    with pytest.raises(DiskError, match="loop"):
        header_version(str(loop))
    short = tmp_path / "short"
    short.write_bytes(bytes(3))
    assert header_version(str(short)) == 0
