"""What a salvage finds in images, and that it is never wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import sqlite3
import subprocess
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import durable
from backend import EMPTY_CHAIN, Change, Snapshot, chain_after
from commands.salvage import salvaged
from errors import BackupError, ConfigError
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, HEAD, OVERHEAD, Head, Kind
from filelog.writer import LogWriter, write_log
from salvage import histories, mapfile, pieces, scan
from salvage.histories import History, Root
from salvage.images import Images
from salvage.index import NAME, Index
from salvage.report import Report, as_json
from tests.layout1_files import entry, header
from tests.monitoring.test_json import check, contract
from tests.salvage import bed as beds
from tests.salvage.bed import Bed
from tests.support import add_session, change, first_changes, make_backup, records_of, run_cli


@pytest.fixture(scope="module", autouse=True)
def no_disk_waits() -> Iterator[None]:
    """Nothing here is about a loss of power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "flush", lambda fd: None)
        patch.setattr(durable, "sync_dir", lambda path: None)
        yield


@pytest.fixture(scope="module")
def bed(no_disk_waits: None, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return beds.make(tmp_path_factory.mktemp("bed"))


def one(bed: Bed, tmp_path: Path, number: int) -> list[int]:
    """The versions that come out of a random image."""
    image = tmp_path / "disk.img"
    beds.random_image(random.Random(number), bed, image)
    report = beds.run(tmp_path / "out", image)
    versions = beds.check(bed, report, tmp_path / "state.sqlite3")
    shutil.rmtree(tmp_path / "out")
    return versions


def found(bed: Bed, tmp_path: Path, *contents: bytes) -> Report:
    """What comes out of an image of these contents; all of it states of the node."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(contents))
    report = beds.run(tmp_path / "out", image)
    beds.check(bed, report, tmp_path / "state.sqlite3")
    return report


def versions(report: Report) -> list[int]:
    return [delivered.version for delivered in report.delivered if delivered.path]


def test_what_is_found_is_never_wrong(bed: Bed, tmp_path: Path) -> None:
    all_versions = [one(bed, tmp_path, number) for number in range(50)]
    assert sum(bed.version in some for some in all_versions) > 10, "far too little is found"


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_two_thousand_images(bed: Bed, tmp_path: Path) -> None:
    for number in range(1000, 3000):
        one(bed, tmp_path, number)


@pytest.mark.parametrize("name", ["whole", "compacted", "again", "copy"])
def test_whole_file_at_any_byte(bed: Bed, tmp_path: Path, name: str) -> None:
    report = found(bed, tmp_path, b"x" * 12345, bed.files[name], b"y" * 777)
    assert versions(report) == [bed.version]
    assert report.broken == 0 and not report.holes


def test_files_written_at_once(bed: Bed, tmp_path: Path) -> None:
    rng = random.Random(1)
    names = "whole", "copy", "again"
    extents = [beds.cut(rng, bed.files[name], 65536) for name in names]
    assert versions(found(bed, tmp_path, *beds.interleaved(rng, extents))) == [bed.version]


@pytest.mark.parametrize("extent", [65536, 32768])
def test_extents_in_any_order(bed: Bed, tmp_path: Path, extent: int) -> None:
    content = bed.files["whole"]
    extents = [content[at : at + extent] for at in range(0, len(content), extent)]
    random.Random(2).shuffle(extents)
    assert versions(found(bed, tmp_path, *extents)) == [bed.version]


def small(tmp_path: Path, count: int) -> Path:
    """A backup of ``count`` changes that are shorter than a block."""
    calls = first_changes(1)
    rng = random.Random(count)
    for version in range(2, count + 1):
        text = rng.randbytes(rng.randint(1, 900)).hex()
        calls.append(change(version, f"INSERT INTO items VALUES ({version}, '{text}')"))
    return make_backup(f"file://{tmp_path}/small.bkp", calls)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_in_any_order(tmp_path: Path, seed: int) -> None:
    content = small(tmp_path, 120).read_bytes()
    blocks = [content[at : at + 4096] for at in range(0, 1 << 18, 4096)]
    random.Random(seed).shuffle(blocks)
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(blocks))
    assert versions(beds.run(tmp_path / "out", image)) == [120]


def test_record_cut_at_every_sector(tmp_path: Path) -> None:
    """Head, payload and trailer, on either side."""
    path = small(tmp_path, 12)
    content = path.read_bytes()[: 1 << 15]
    for at in range(512, 1 << 13, 512):
        image = tmp_path / f"{at}.img"
        image.write_bytes(content[at:] + b"between" * 512 + content[:at].rjust(1 << 14, b"-"))
        assert versions(beds.run(tmp_path / f"out-{at}", image)) == [12], at


def test_two_images_of_one_disk(bed: Bed, tmp_path: Path) -> None:
    content = bed.files["whole"]
    first, second = tmp_path / "a.img", tmp_path / "b.img"
    first.write_bytes(content[: 1 << 19])
    second.write_bytes(content[1 << 19 :])
    assert versions(beds.run(tmp_path / "out", second, first)) == [bed.version]


def test_head_of_the_newest_is_cut(tmp_path: Path) -> None:
    """Nothing behind it tells how long it is."""
    done = 0
    for count in range(5, 60):
        path = small(tmp_path, count)
        newest, content = records_of(path)[-1][0].offset, path.read_bytes()[: 1 << 17]
        path.unlink()
        at = -(-newest // 512) * 512
        if not newest < at < newest + HEAD.size:
            continue
        image = tmp_path / f"{count}.img"
        image.write_bytes(content[at:] + b"between" * 512 + content[:at].rjust(1 << 17, b"-"))
        assert versions(beds.run(tmp_path / f"out-{count}", image)) == [count]
        done += 1
        if done == 3:
            return
    raise AssertionError("no such file was made")


def test_many_that_end_where_it_ends(tmp_path: Path) -> None:
    """Of the records that begin where a cut one ends, only some go on from it."""
    path = small(tmp_path, 3)
    contents = []
    for number in range(12):
        other = tmp_path / "other.bkp"
        shutil.copy(path, other)
        for version in 4, 5:
            sql = f"INSERT INTO items VALUES ({version}, '{number:x}{'-' * 2000}')"
            add_session(f"file://{other}", [change(version, sql)])
        contents.append(other.read_bytes()[: 1 << 15])
        other.unlink()
    (tmp_path / "last.bkp").write_bytes(contents[-1])
    at = next(h.offset for h, _ in records_of(tmp_path / "last.bkp") if h.version == 4)
    at = (at + HEAD.size) // 512 * 512 + 512
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join([*contents[:-1], contents[-1][at:], bytes(512), contents[-1][:at]]))
    assert versions(beds.run(tmp_path / "out", image)) == [5] * 12


def test_snapshot_of_one_generation_with_changes_of_another(bed: Bed, tmp_path: Path) -> None:
    compacted, whole = bed.files["compacted"], bed.files["whole"]
    _, log_start, _ = layout2.decode_header(compacted)
    report = found(bed, tmp_path, compacted[: log_start + 100], whole[len(whole) // 10 :])
    assert versions(report) == [bed.version]
    assert report.delivered[0].history.root.pieces


def test_nothing_behind_a_hole_is_applied(bed: Bed, tmp_path: Path) -> None:
    content = bytearray(bed.files["whole"])
    content[1 << 19 : (1 << 19) + 4096] = bytes(4096)
    report = found(bed, tmp_path, bytes(content))
    (reached,) = versions(report)
    (hole,) = report.holes
    with contextlib.closing(Images([str(tmp_path / "disk.img")])) as images:
        (shown,) = as_json(report, images)["behind_holes"]
    check(shown, contract("`backup-cli salvage --json`", 2))
    assert reached < hole.first <= hole.last == bed.version


def test_every_bit_of_a_record_turned(bed: Bed, tmp_path: Path) -> None:
    path = small(tmp_path, 6)
    fourth = [head for head, _ in records_of(path) if head.kind == Kind.CHANGE][3]
    content = path.read_bytes()
    image = tmp_path / "disk.img"
    for bit in range(0, 8 * (fourth.end - fourth.offset - 4), 97):
        data = bytearray(content[: 1 << 14])
        data[fourth.offset + bit // 8] ^= 1 << bit % 8
        image.write_bytes(data)
        assert versions(beds.run(tmp_path / f"out-{bit}", image)) == [3]


def test_branches_are_both_delivered(tmp_path: Path) -> None:
    path = make_backup(f"file://{tmp_path}/a.bkp", first_changes(3))
    other = tmp_path / "b.bkp"
    shutil.copy(path, other)
    add_session(f"file://{path}", [change(4, "INSERT INTO items VALUES (101, 'a')")])
    add_session(f"file://{other}", [change(4, "INSERT INTO items VALUES (101, 'b')")])
    report = beds.run(tmp_path / "out", path, other)
    assert versions(report) == [4, 4]
    assert all(delivered.history.branches for delivered in report.delivered)


def test_what_was_taken_back(tmp_path: Path) -> None:
    """Also if the rewind itself is lost; and not, if it was announced again."""
    path = make_backup(f"file://{tmp_path}/a.bkp", first_changes(3))
    lost, again = change(4, "INSERT INTO items VALUES (101, 'a')"), change(4, "DELETE FROM items")
    add_session(f"file://{path}", [lost])
    add_session(f"file://{path}", [again])
    rewind = next(head for head, _ in records_of(path) if head.kind == Kind.REWIND)
    content = bytearray(path.read_bytes())
    content[rewind.offset : rewind.end] = bytes(OVERHEAD)
    image = tmp_path / "disk.img"
    for number, data in enumerate((path.read_bytes(), bytes(content))):
        image.write_bytes(data)
        (delivered,) = beds.run(tmp_path / f"out-{number}", image).delivered
        assert delivered.path
        (last,) = [head for head, _ in records_of(Path(delivered.path)) if head.version == 4]
        assert last.chain == chain_after(
            last.chain_before, 4, Change(*again[:1], None, again[1]).payload
        )
    image.write_bytes(path.read_bytes()[: rewind.end + 10])
    assert versions(beds.run(tmp_path / "out-rewound", image)) == [3]


def test_announced_again_after_it_was_taken_back(tmp_path: Path) -> None:
    path = make_backup(f"file://{tmp_path}/a.bkp", first_changes(3))
    for _ in range(2):
        add_session(f"file://{path}", [change(4, "INSERT INTO items VALUES (101, 'a')")])
    assert versions(beds.run(tmp_path / "out", path)) == [4]


def test_backup_inside_of_another_ones_snapshot(bed: Bed, tmp_path: Path) -> None:
    inner = small(tmp_path, 9)
    database = tmp_path / "node.sqlite3"
    run_sql(database, "CREATE TABLE vars (name, intval, blobval)")
    run_sql(database, "INSERT INTO vars VALUES ('data_version', 77, ?)", inner.read_bytes())
    outer = tmp_path / "outer.bkp"
    write_log(str(outer), Snapshot(str(database), 77), bytes(16), "")
    reached = versions(beds.run(tmp_path / "out", outer))
    assert reached[0] == 77 and set(reached[1:]) <= set(range(1, 10))


def run_sql(path: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


# Layout 1


@pytest.mark.parametrize("name", ["earlier", "earlier-snapshot"])
def test_layout_1(bed: Bed, tmp_path: Path, name: str) -> None:
    report = found(bed, tmp_path, b"x" * 4096, bed.earlier[name], b"y" * 777)
    assert versions(report) == [bed.version]
    assert report.delivered[0].layout == 1


def test_layout_1_cut_off_or_overwritten(bed: Bed, tmp_path: Path) -> None:
    content = bed.earlier["earlier"]
    report = found(bed, tmp_path, content[: len(content) // 2], b"\xff" * 65536, content[-40000:])
    (reached,) = versions(report)
    assert 0 < reached < bed.version


def test_layout_1_without_its_header(bed: Bed, tmp_path: Path) -> None:
    content = bytearray(bed.earlier["earlier-snapshot"])
    content[:512] = bytes(512)
    assert versions(found(bed, tmp_path, bytes(content))) == [bed.version]


def test_layout_1_with_a_snapshot_that_is_not_sound(bed: Bed, tmp_path: Path) -> None:
    content = bytearray(bed.earlier["earlier-snapshot"])
    content[20000:60000] = bytes(40000)
    report = found(bed, tmp_path, bytes(content))
    assert not versions(report) and report.delivered[0].failure


def test_header_of_layout_1_that_is_ahead(bed: Bed, tmp_path: Path) -> None:
    content = header(bed.version + 5, 1 << 20) + bed.earlier["earlier"][512:]
    report = found(bed, tmp_path, b"x" * 512, content, bytes(9999))
    assert versions(report) == [bed.version]
    assert f"names version {bed.version + 5}, which was not reached" in report.limits[0]


def test_layout_1_with_an_end_of_zeros_or_half_an_entry(bed: Bed, tmp_path: Path) -> None:
    content = bed.earlier["earlier"]
    half = entry(bed.version + 1, b"UPDATE vars", length=100)
    assert versions(found(bed, tmp_path, content + half)) == [bed.version]
    shutil.rmtree(tmp_path / "out")
    assert versions(found(bed, tmp_path, content + bytes(4096) + content)) == [bed.version]


def test_two_snapshots_that_name_the_same(tmp_path: Path) -> None:
    """Their pieces are not mixed: one is taken that is whole in one extent."""
    logs = []
    for letter in "ab":
        database, log = tmp_path / f"{letter}.sqlite3", tmp_path / f"{letter}.bkp"
        run_sql(database, "CREATE TABLE vars (name, intval, blobval)")
        run_sql(database, "INSERT INTO vars VALUES ('data_version', 7, ?)", letter * 1_500_000)
        writer = LogWriter(str(log), b"the same".ljust(16), database.stat().st_size)
        writer.add_snapshot(str(database), BEFORE_FIRST._replace(version=7, chain=b"x" * 16))
        writer.finish()
        writer.close()
        logs.append(log.read_bytes())
    image = tmp_path / "disk.img"
    image.write_bytes(logs[0][1 << 19 :] + logs[1])
    (delivered,) = beds.run(tmp_path / "out", image).delivered
    assert delivered.path
    records = records_of(Path(delivered.path))
    assert b"".join(payload for _, payload in records) == (tmp_path / "b.sqlite3").read_bytes()


def snapshots(tmp_path: Path, *chains: bytes) -> Path:
    """An image of logs of one snapshot each, all of version 7."""
    image, database = tmp_path / "disk.img", tmp_path / "snapshot.sqlite3"
    for number, chain in enumerate(chains):
        run_sql(database, "CREATE TABLE IF NOT EXISTS vars (name, intval, blobval)")
        run_sql(database, "DELETE FROM vars")
        run_sql(database, "INSERT INTO vars VALUES ('data_version', 7, ?)", number)
        writer = LogWriter(str(tmp_path / "one.bkp"), chain, database.stat().st_size)
        writer.add_snapshot(str(database), BEFORE_FIRST._replace(version=7, chain=chain))
        writer.finish()
        writer.close()
        with image.open("ab") as file:
            file.write((tmp_path / "one.bkp").read_bytes())
        (tmp_path / "one.bkp").unlink()
    return image


def test_a_chain_that_begins_like_another_one_replaces_no_file(tmp_path: Path) -> None:
    image = snapshots(tmp_path, b"x" * 16, b"x" * 15 + b"y")
    paths = [delivered.path for delivered in beds.run(tmp_path / "out", image).delivered]
    assert len(set(paths)) == 2 and None not in paths


def test_more_snapshots_than_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = snapshots(tmp_path, b"x" * 16, b"y" * 16)
    monkeypatch.setattr(histories, "MOST_SNAPSHOTS", 1)
    report = beds.run(tmp_path / "out", image)
    assert versions(report) == [7] and "more than 1 snapshots" in report.limits[0]


def test_one_node_does_not_hide_another() -> None:
    def a_history(version: int, owner: bytes) -> History:
        tip = BEFORE_FIRST._replace(version=version, session=owner * 16)
        return History(Root(EMPTY_CHAIN, 0, array("q")), tip, False)

    found = [a_history(90 - n, b"a") for n in range(9)] + [a_history(5, b"b"), a_history(4, b"c")]
    chosen = histories.chosen(found, 4)
    assert [history.tip.version for history in chosen] == [90, 89, 5, 4]


# What cannot be read


@contextlib.contextmanager
def unreadable(block: int) -> Iterator[None]:
    """A block of 4096 bytes of every file fails, as it does on a device."""
    real, bad = os.pread, block * 4096

    def pread(fd: int, size: int, offset: int) -> bytes:
        if bad <= offset < bad + 4096:
            raise OSError(errno.EIO, "Input/output error")
        if offset < bad < offset + size:
            size = bad - offset  # The kernel gives what stands before it.
        return real(fd, size, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("salvage.images.os.pread", pread)
        yield


def test_block_that_cannot_be_read(bed: Bed, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bed.files["whole"])
    with unreadable(128):
        report = beds.run(tmp_path / "out", image)
    (reached,) = versions(report)
    (hole,) = report.holes
    assert reached < hole.first <= hole.last == bed.version
    assert report.limits == [f"{image}: the block at offset {128 * 4096} could not be read."]


def test_block_of_layout_1_that_cannot_be_read(tmp_path: Path) -> None:
    """Zeros in its place would pass every check that there is."""
    database, image = tmp_path / "node.sqlite3", tmp_path / "disk.img"
    run_sql(database, "CREATE TABLE vars (name, intval, blobval)")
    run_sql(database, "INSERT INTO vars VALUES ('data_version', 7, ?)", b"x" * 20000)
    image.write_bytes(header(7, 512) + entry(7, database.read_bytes(), kind=2))
    assert versions(beds.run(tmp_path / "out", image)) == [7]
    with unreadable(image.stat().st_size // 4096 - 1):
        assert not beds.run(tmp_path / "out-2", image).delivered


def test_loop_device_with_a_hole(bed: Bed, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bed.files["whole"].ljust(1 << 22, b"-") + bytes(1 << 22))
    with looped(image) as device:
        os.truncate(image, (1 << 22) + 4096)  # What is behind that fails.
        report = beds.run(tmp_path / "out", device)
    assert versions(report) == [bed.version] and "could not be read" in report.limits[0]


@pytest.mark.parametrize(("name", "reached"), [("compacted", 0), ("whole", 1)])
def test_image_that_changes_meanwhile(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reached: int
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bed.files[name])
    real = histories.find

    def find(index: Index) -> list[History]:
        data = bytearray(bed.files[name])
        data[1 << 17] ^= 1
        image.write_bytes(data)
        return real(index)

    monkeypatch.setattr(histories, "find", find)
    report = beds.run(tmp_path / "out", image)
    assert len(beds.check(bed, report, tmp_path / "state.sqlite3")) == reached
    assert "could not be read again" in str(report.delivered[0].failure)


# A map of ddrescue


def test_map_of_ddrescue(bed: Bed, tmp_path: Path) -> None:
    image, outdir, path = tmp_path / "disk.img", tmp_path / "out", tmp_path / "disk.map"
    content = bed.files["whole"]
    image.write_bytes(content)
    path.write_text(
        "# Mapfile. Created by GNU ddrescue version 1.27\n"
        "# current_pos  current_status  current_pass\n"
        "0x00000000     +               1\n"
        "#      pos        size  status\n"
        f"0x0  0x80000  +\n0x80000  0x200  -\n0x80200  0x1000  +\n0x81200  {len(content)}  ?\n"
    )
    good = mapfile.read(str(path))
    assert good == [(0, 0x80000), (0x80200, 0x81200)]
    with contextlib.closing(Images([str(image)], good)) as images:
        assert images.read(0x7FFFF, 3) == content[0x7FFFF:0x80000] + bytes(2)
        assert images.read(0x801FF, 2) == b"\0" + content[0x80200:0x80201]
        assert images.is_known(0, 0x80000) and not images.is_known(0, 0x80001)
        outdir.mkdir()
        report = salvaged(images, str(outdir))
    beds.check(bed, report, tmp_path / "state.sqlite3")
    assert 0 < versions(report)[0] < bed.version


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "0 + 1\n0 x +\n", "0 + 1\n0 9 +\n3 9 +\n", "0 +\n0 9 ++\n", "0 +\n1 2\n"],
)
def test_no_map_of_ddrescue(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no map of ddrescue"):
        mapfile.read(str(path))


@pytest.mark.parametrize("state", ["F", "G"])
def test_map_that_is_being_filled_or_generated(tmp_path: Path, state: str) -> None:
    path = tmp_path / "map"
    path.write_text(f"0x0 {state} 1\r\n\r\n# odd\n0x00 0x200 + \n  0x400\t0x200 + # end")
    assert mapfile.read(str(path)) == [(0, 512), (1024, 1536)]


# Going on


class Stopped(Exception):
    """By the test."""


def test_it_goes_on_where_it_was_stopped(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "WINDOW", 1 << 17)
    image, outdir = tmp_path / "disk.img", tmp_path / "out"
    image.write_bytes(bed.files["whole"])
    outdir.mkdir()

    def stop(done: int, of: int) -> None:
        if done >= of // 2:
            raise Stopped

    with contextlib.closing(Images([str(image)])) as images:
        index = Index(str(outdir), images.described())
        with pytest.raises(Stopped):
            scan.scan(images, index, scan.Effort(images.size), stop)
        index.close(done=False)
        places: list[int] = []
        read = images.read

        def noted(place: int, size: int) -> bytes:
            places.append(place)
            return read(place, size)

        monkeypatch.setattr(images, "read", noted)
        index = Index(str(outdir), images.described())
        scan.scan(images, index, scan.Effort(images.size), lambda done, of: None)
        index.close(done=False)
        assert min(places) >= images.size // 2 - 512
        report = salvaged(images, str(outdir))
    assert versions(report) == [bed.version]
    assert not (outdir / NAME).exists()


def test_the_index_of_other_images_is_refused(tmp_path: Path) -> None:
    Index(str(tmp_path), ["one"]).close(done=False)
    with pytest.raises(ConfigError, match="other images"):
        Index(str(tmp_path), ["two"])
    (tmp_path / NAME).write_bytes(b"x" * 5000)
    with pytest.raises(BackupError, match="cannot be used"):
        Index(str(tmp_path), ["one"])


# Records in two pieces


def test_crc_of_what_is_put_together() -> None:
    rng = random.Random(3)
    for size in 1, 511, 512, 5000:
        first, second = rng.randbytes(size + OVERHEAD), rng.randbytes(size + OVERHEAD)
        cuts = range(HEAD.size + rng.randrange(300), size + OVERHEAD, 512)
        for cut, crc in pieces._spliced(first, second, cuts):
            assert crc == zlib.crc32((first[:cut] + second[cut:])[HEAD.size :][:size])


# Somebody forged it


def forged(before: Head, payload: bytes, **fields: Any) -> tuple[Head, bytes]:
    version = before.version + 1
    head = before._replace(
        kind=Kind.CHANGE,
        flags=1,
        sequence=before.sequence + 1,
        offset=before.end,
        version=version,
        changes=before.changes + 1,
        length=len(payload),
        chain_before=before.chain,
        chain=chain_after(before.chain, version, payload),
    )._replace(**fields)
    length, head = head.length, head._replace(length=len(payload))
    raw = bytearray(layout2.encode(head, payload))
    if length != len(payload):
        raw[80:88] = length.to_bytes(8, "big")
        raw[120:124] = zlib.crc32(raw[:120]).to_bytes(4, "big")
    return head, bytes(raw)


START = BEFORE_FIRST._replace(backup_id=b"forged".ljust(16, b"."))
BUMP = "UPDATE vars SET intval = intval + 1 WHERE name = 'data_version' AND intval = {}"


def history(*statements: str) -> bytes:
    """Records of changes, one a statement, behind the first change of a node."""
    last, data = START, [layout2.encode_header(START.backup_id, 0, 0)]
    for version, sql in enumerate((first_changes(1)[0][1][0], *statements), 1):
        calls = first_changes(1)[0][1] if version == 1 else [sql, BUMP.format(version - 1)]
        last, raw = forged(last, "\0".join(calls).encode())
        data.append(raw)
    return b"".join(data)


@pytest.mark.parametrize(
    "attack",
    [
        "ATTACH 'evil.sqlite3' AS evil",
        "VACUUM INTO 'evil.sqlite3'",
        "PRAGMA writable_schema = ON",
        "SELECT load_extension('evil')",
        "COMMIT",
    ],
)
def test_sql_that_attacks(
    bed: Bed, tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "disk.img"
    image.write_bytes(history("INSERT INTO items VALUES (101, 'a')", attack, "DELETE FROM items"))
    (delivered,) = beds.run(tmp_path / "out", image).delivered
    assert delivered.version == 2 and "does not replay" in str(delivered.failure)
    assert {path.name for path in tmp_path.iterdir()} == {"disk.img", "out"}


def test_forged_numbers(bed: Bed, tmp_path: Path) -> None:
    last, payload = START, b"SELECT 1"
    data = []
    for fields in (
        {"sequence": 2**64 - 1},
        {"offset": 2**64 - 1},
        {"time_ns": 2**64 - 1},
        {"changes": 2**64 - 1},
        {"length": 1 << 30},
        {"chain": EMPTY_CHAIN, "chain_before": EMPTY_CHAIN},
        {"kind": Kind.SNAPSHOT, "flags": 2, "offset": 64},
        {"kind": Kind.SNAPSHOT, "flags": 0, "offset": 64, "length": 1 << 20},
        {"kind": Kind.REWIND, "chain_before": EMPTY_CHAIN},
        {"version": 2**32 - 1, "flags": 0},
    ):
        data += [forged(last, payload, **fields)[1], os.urandom(100)]
    report = found(bed, tmp_path, *data, bed.files["again"])
    assert versions(report) == [bed.version]


def test_forged_lengths_are_not_read_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan.Effort, "FREE", 1 << 22)
    _, raw = forged(START, b"SELECT 1", length=1 << 21)
    image = tmp_path / "disk.img"
    image.write_bytes(raw * 100)
    os.truncate(image, 1 << 22)
    report = beds.run(tmp_path / "out", image)
    assert not versions(report)
    (limit,) = report.limits
    assert "payloads were not checked" in limit


def test_index_on_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(forged(START, b"SELECT 1")[1] * 20000)
    done = run_cli("salvage", image, small_disk / "out", check=1)
    assert "is full" in done.stderr and "Traceback" not in done.stderr


def test_forged_entries_of_layout_1(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    sqlite = b"SQLite format 3\0\x10\0" + bytes(200)
    image.write_bytes(
        header(7, 1 << 40)
        + entry(7, sqlite, kind=2, length=0xFFFFF000)
        + header(1, 512)
        + entry(1, b"\xff\xff", length=0xFFFFFFFF)
        + header(1, 512)
        + entry(1, b"\0\0" + BUMP.format(0).encode())
    )
    assert not beds.run(tmp_path / "out", image).delivered


# The command


def test_command(bed: Bed, tmp_path: Path) -> None:
    image, outdir = tmp_path / "disk.img", tmp_path / "out"
    image.write_bytes(b"z" * 5000 + bed.files["whole"])
    before = image.stat().st_mtime_ns
    done = run_cli("salvage", image, outdir, check=3)
    assert f"1. Version {bed.version}: the empty beginning" in done.stdout
    assert "not proven to be the newest" in done.stderr and "OLD state" in done.stderr
    assert " channels file://" in done.stderr and " channels --static file://" in done.stderr
    (path,) = outdir.glob("*.bkp")
    assert {p.name for p in outdir.iterdir()} == {path.name, "report.txt"}
    assert (outdir / "report.txt").read_text() == done.stdout
    assert path.stat().st_mode & 0o777 == 0o600 and image.stat().st_mtime_ns == before
    run_cli("verify", f"file://{path}")
    assert "not empty" in run_cli("salvage", image, outdir, check=1).stderr
    done = run_cli("salvage", "--json", image, tmp_path / "out2", check=3)
    shown = json.loads(done.stdout)
    section = "`backup-cli salvage --json`"
    check(shown, contract(section))
    (history,) = shown["histories"]
    check(history, contract(section, 1))
    assert (history["version"], history["layout"]) == (bed.version, 2)


def test_command_finds_nothing(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(10000))
    done = run_cli("salvage", image, tmp_path / "out", check=1)
    assert "No history" in done.stderr
    os.mkfifo(tmp_path / "fifo")
    for wrong in tmp_path / "fifo", tmp_path, tmp_path / "missing":
        done = run_cli("salvage", wrong, tmp_path / "out2", check=1)
        assert "Traceback" not in done.stderr
    run_cli("salvage", image, image, tmp_path / "out2", "--mapfile", image, check=2)
    run_cli("salvage", image, tmp_path / "out2", "--mapfile", image, check=1)


# A real file system


@pytest.mark.skipif(
    not (shutil.which("mkfs.ext4") and shutil.which("debugfs")), reason="no mkfs.ext4 or debugfs"
)
@pytest.mark.parametrize("deleted", [False, True])
def test_ext4(bed: Bed, tmp_path: Path, deleted: bool) -> None:
    source, image = tmp_path / "source", tmp_path / "disk.img"
    source.mkdir()
    for name in "whole", "again":
        (source / f"{name}.bkp").write_bytes(bed.files[name])
    (source / "earlier.bkp").write_bytes(bed.earlier["earlier"])
    command = ["mkfs.ext4", "-q", "-d", str(source), str(image), "16M"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    if deleted:
        for name in "whole", "again":
            rm = ["debugfs", "-w", "-R", f"rm {name}.bkp", str(image)]
            subprocess.run(rm, check=True, capture_output=True)
    report = beds.run(tmp_path / "out", image)
    beds.check(bed, report, tmp_path / "state.sqlite3")
    assert bed.version in versions(report)
    assert report.delivered[0].layout == 2, "of two copies the one with checksums"


@contextlib.contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    """A new ext4 on the file ``image``, where this user may mount one."""
    directory.mkdir()
    for command in (
        ["mkfs.ext4", "-q", "-b", "1024", str(image), "16M"],
        ["mount", "-o", "loop", str(image), str(directory)],
    ):
        if not shutil.which(command[0]):
            pytest.skip(f"there is no {command[0]}")
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{command[0]}: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def looped(image: Path) -> Iterator[Path]:
    """The file ``image`` as a block device, where this user may make one."""
    command = ["losetup", "--find", "--show", str(image)]
    if not shutil.which(command[0]):
        pytest.skip("there is no losetup")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    try:
        yield Path(done.stdout.strip())
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_nothing_is_written_to_the_disk_that_is_searched(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk.img", tmp_path / "disk") as disk:
        number = disk.stat().st_dev
        device = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        path = Path("/dev") / os.path.basename(device)
        for outdir in disk, disk / "new" / "out":
            done = run_cli("salvage", path, outdir, check=1)
            assert "which is searched" in done.stderr
        assert [found.name for found in disk.iterdir()] == ["lost+found"]


def test_deleted_from_a_fragmented_ext4(bed: Bed, tmp_path: Path) -> None:
    """Several writers at once, as the blocks of the disk show; then all is deleted."""
    image, rng = tmp_path / "disk.img", random.Random(4)
    with mounted(image, tmp_path / "disk") as disk:
        contents = {"whole": bed.files["whole"][:1100000], "copy": bed.files["copy"]}
        contents["junk"] = rng.randbytes(1 << 20)
        done = dict.fromkeys(contents, 0)
        while left := [name for name in done if done[name] < len(contents[name])]:
            name = rng.choice(left)
            size = rng.randint(1, 60) * 1000
            with (disk / name).open("ab") as file:
                file.write(contents[name][done[name] : done[name] + size])
                file.flush()
                os.fsync(file.fileno())  # Or its blocks are chosen later, and in one.
            done[name] += size
        for name in contents:
            (disk / name).unlink()
    report = beds.run(tmp_path / "out", image)
    beds.check(bed, report, tmp_path / "state.sqlite3")
    assert bed.version in versions(report)
    assert report.delivered[0].extent_count > 1
