"""Layout 2: a golden file, heads that do not check, the end of a file and how it is judged."""

from __future__ import annotations

import hashlib
import random
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from backend import EMPTY_CHAIN, MAX_CHANGE_SIZE, MAX_CHUNK_SIZE, bump
from errors import ConfigError, UnsupportedLayout
from filebackend import FileBackend
from filelog import layout2
from filelog.layout2 import (
    BEFORE_FIRST,
    FIRST_RECORD,
    HEAD,
    OVERHEAD,
    SECTOR,
    Head,
    Kind,
    Tail,
    TailKind,
)
from filelog.reader import FileReading, LogReader
from quorum import Roster
from tests import support
from wallet import database, restore

# The golden file: a compacted backup of a small node. Read here without records.py.

GOLDEN = support.DATA / "golden" / "layout2.bkp"
OLD_GOLDEN = support.DATA / "golden" / "layout2-rules0.bkp"
ID = bytes(range(16))
CREATED_NS = 1_700_000_000_000_000_001
SNAPSHOT_CHAIN = bytes(range(0xA0, 0xB0))
OWNER, NEW_OWNER = b"\x88" * 8 + b"\x99" * 8, b"\xaa" * 8 + b"\xbb" * 8
FIRST, SECOND = OWNER[:8] + b"\x11" * 8, NEW_OWNER[:8] + b"\x22" * 8
OWNER_PAYLOAD = CREATED_NS.to_bytes(8, "big") + "maschine-\u00e4".encode()
HEADER_FIELDS = {
    "magic": (0, 16),
    "layout": (16, 4),
    "rules": (20, 4),
    "backup id": (24, 16),
    "created": (40, 8),
    "log start": (48, 8),
    "crc": (60, 4),
}
HEAD_FIELDS = {
    "marker": (0, 4),
    "kind": (4, 1),
    "flags": (5, 1),
    "reserved": (6, 2),
    "backup id": (8, 16),
    "sequence": (24, 8),
    "offset": (32, 8),
    "data_version": (40, 4),
    "payload crc": (44, 4),
    "changes": (48, 8),
    "time": (56, 8),
    "session": (64, 16),
    "length": (80, 8),
    "chain before": (88, 16),
    "chain": (104, 16),
    "head crc": (120, 4),
}
TRAILER_SIZE = OVERHEAD - HEAD.size
BYTES = {"magic", "marker", "backup id", "session", "chain before", "chain"}
# kind, flags, sequence, data_version, changes, session, payload
GOLDEN_RECORDS: list[tuple[int, int, int, int, int, bytes, bytes]] = [
    (4, 0, 41, 5, 0, OWNER, OWNER_PAYLOAD),
    (2, 1, 42, 6, 1, FIRST, f"INSERT INTO t VALUES ('one')\0{bump(6)}".encode()),
    (2, 0, 43, 6, 2, FIRST, b"PRAGMA foreign_keys = OFF;"),
    (2, 1, 44, 7, 3, FIRST, f"INSERT INTO t VALUES ('abandoned')\0{bump(7)}".encode()),
    (4, 1, 45, 7, 3, NEW_OWNER, OWNER_PAYLOAD),
    (3, 0, 46, 6, 2, SECOND, b""),
    (2, 1, 47, 7, 3, SECOND, f"INSERT INTO t VALUES ('zwei\n\U0001f600')\0{bump(7)}".encode()),
]


def fields(data: bytes, start: int, table: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """The fields of a header or a head, numbers as big-endian."""
    found: dict[str, Any] = {}
    for name, (offset, size) in table.items():
        raw = data[start + offset : start + offset + size]
        found[name] = raw if name in BYTES else int.from_bytes(raw, "big")
    return found


def golden_snapshot() -> bytes:
    """The SQLite file in the golden file."""
    data = GOLDEN.read_bytes()
    (length,) = struct.unpack_from("!Q", data, 64 + 80)
    return data[64 + 124 : 64 + 124 + length]


def golden_chains(
    older: bytes, chain: bytes, kind: int, version: int, payload: bytes
) -> tuple[bytes, bytes, int]:
    """Chain before, chain, and the nanoseconds after the record before."""
    if kind == 4:
        return older, chain, 0
    if kind == 3:
        return chain, older, 10**9
    digest = hashlib.blake2b(chain + struct.pack("!I", version) + payload, digest_size=16)
    return chain, digest.digest(), 10**9


def golden_again() -> bytes:
    """The golden file, encoded anew from its inputs."""
    snapshot = golden_snapshot()
    parts = [layout2.encode_header(ID, CREATED_NS, len(snapshot))]
    head = BEFORE_FIRST._replace(
        kind=1, flags=2, backup_id=ID, sequence=41, offset=64, version=5, time_ns=CREATED_NS,
        length=len(snapshot), session=OWNER, chain=SNAPSHOT_CHAIN,
    )  # fmt: skip
    parts.append(layout2.encode(head, snapshot))
    for kind, flags, sequence, version, changes, session, payload in GOLDEN_RECORDS:
        before, after, time_ns = golden_chains(
            head.chain_before, head.chain, kind, version, payload
        )
        head = head._replace(
            kind=kind, flags=flags, sequence=sequence, offset=head.end, version=version,
            changes=changes, time_ns=head.time_ns + time_ns, session=session, length=len(payload),
            chain_before=before, chain=after,
        )  # fmt: skip
        parts.append(layout2.encode(head, payload))
    return b"".join(parts).ljust(4096, b"\0")


def test_golden_file_is_what_we_encode() -> None:
    assert golden_again() == GOLDEN.read_bytes()


def test_golden_header_field_by_field() -> None:
    data = GOLDEN.read_bytes()
    assert fields(data, 0, HEADER_FIELDS) == {
        "magic": b"\x89CLN backup\r\n\x1a\n\0",
        "layout": 2,
        "rules": 1,
        "backup id": ID,
        "created": CREATED_NS,
        "log start": 64 + 128 + len(golden_snapshot()),
        "crc": zlib.crc32(data[:60]),
    }
    assert data[56:60] == bytes(4)


def test_golden_records_field_by_field() -> None:
    data, at, older, chain = GOLDEN.read_bytes(), 64, EMPTY_CHAIN, SNAPSHOT_CHAIN
    time_ns = CREATED_NS
    rows = [(1, 2, 41, 5, 0, OWNER, golden_snapshot()), *GOLDEN_RECORDS]
    for number, (kind, flags, sequence, version, changes, session, payload) in enumerate(rows):
        if number:
            older, chain, passed = golden_chains(older, chain, kind, version, payload)
            time_ns += passed
        assert fields(data, at, HEAD_FIELDS) == {
            "marker": b"\xc5rec",
            "kind": kind,
            "flags": flags,
            "reserved": 0,
            "backup id": ID,
            "sequence": sequence,
            "offset": at,
            "data_version": version,
            "payload crc": zlib.crc32(payload),
            "changes": changes,
            "time": time_ns,
            "session": session,
            "length": len(payload),
            "chain before": older,
            "chain": chain,
            "head crc": zlib.crc32(data[at : at + 120]),
        }
        end = at + 124 + len(payload)
        assert data[at + 124 : end] == payload
        assert data[end : end + 4] == at.to_bytes(3, "big") + b"\n"
        at = end + 4
    assert data[at:] == bytes(4096 - at)


def test_documented_tables_are_the_ones_tested() -> None:
    documented = re.findall(r"^ +(\d+) +(\d+)  (\w+(?: \w+)?)  ", layout2.__doc__ or "", re.M)
    tables = [(*place, name) for t in (HEADER_FIELDS, HEAD_FIELDS) for name, place in t.items()]
    tables.insert(6, (56, 4, "reserved"))
    assert [(int(offset), int(size), name) for offset, size, name in documented] == tables


def test_golden_file_is_read() -> None:
    reader = LogReader(str(GOLDEN))
    found = list(reader)
    reader.close()
    assert (reader.damage, reader.tail.kind) == (None, TailKind.CLEAN)
    heads = [head for head, _ in found]
    assert [head.kind for head in heads] == [1, 4, 2, 2, 2, 4, 3, 2]
    assert heads[-1].session == SECOND
    assert [payload for _, payload in found[1:]] == [row[-1] for row in GOLDEN_RECORDS]
    assert layout2.snapshot_size(reader.log_start or 0) == len(golden_snapshot())


@pytest.mark.parametrize("path", [GOLDEN, OLD_GOLDEN], ids=["rules 1", "rules 0"])
def test_golden_file_is_restored(path: Path, tmp_path: Path) -> None:
    reading = FileReading(str(path))
    result = restore.restore(reading, str(tmp_path / "db.sqlite3"), False, lambda *_: None)
    reading.close()
    assert (result.ending.version, result.changes, result.problems) == (7, 2, [])
    assert result.ending.last_change_ns == CREATED_NS + 5 * 10**9
    with database.opened(result.path) as connection:
        rows = connection.execute("SELECT x FROM t").fetchall()
    assert rows == [("zero",), ("one",), ("zwei\n\U0001f600",)]


def test_golden_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "node.bkp"
    path.write_bytes(GOLDEN.read_bytes())
    support.add_session(f"file://{path}", [support.change(8, "INSERT INTO t VALUES ('three')")])
    status = FileBackend(f"file://{path}").status()
    assert (status.version, status.changes, status.version_count) == (8, 4, 5)
    assert (status.backup_id, status.damage) == (ID.hex(), None)
    assert status.owner == NEW_OWNER[:8].hex()
    assert path.read_bytes().startswith(GOLDEN.read_bytes().rstrip(b"\0"))


def test_file_of_rules_0_is_read_and_upgraded_but_not_written(tmp_path: Path) -> None:
    path = tmp_path / "node.bkp"
    path.write_bytes(OLD_GOLDEN.read_bytes().rstrip(b"\0"))  # It needs no zeros at its end.
    url = f"file://{path}"
    assert FileBackend(url).status(check=True).damage is None
    with pytest.raises(UnsupportedLayout, match="upgrade"):
        FileBackend(url).open()
    done = support.run_cli("upgrade", url)
    assert "is upgraded, at version 7" in done.stdout
    support.add_session(url, [support.change(8, "INSERT INTO t VALUES ('three')")])
    assert "nothing to do" in support.run_cli("upgrade", url).stdout
    assert FileBackend(url).status(check=True).version == 8


# File headers and heads that do not check.


def test_every_bit_of_a_file_header_counts() -> None:
    header = layout2.encode_header(ID, CREATED_NS, 5)
    assert layout2.decode_header(header + b"more") == (ID, 64 + OVERHEAD + 5, 1)
    for bit in range(len(header) * 8):
        with pytest.raises(layout2.HeaderError):
            layout2.decode_header(turned(header, bit))
    for size in range(len(header)):
        with pytest.raises(layout2.HeaderError, match="cut off"):
            layout2.decode_header(header[:size])


@pytest.mark.parametrize("field", [(0, b"\x89CLN backuq\r\n\x1a\n\0"), (16, struct.pack("!I", 3))])
def test_header_of_another_layout_is_named(field: tuple[int, bytes]) -> None:
    header = bytearray(layout2.encode_header(ID, CREATED_NS, 0))
    header[field[0] : field[0] + len(field[1])] = field[1]
    header[60:] = struct.pack("!I", zlib.crc32(header[:60]))
    with pytest.raises(layout2.HeaderError, match="names layout"):
        layout2.decode_header(bytes(header))


@pytest.mark.parametrize(
    "size",
    [0, 1, MAX_CHUNK_SIZE - 1, MAX_CHUNK_SIZE, MAX_CHUNK_SIZE + 1, 5 * MAX_CHUNK_SIZE + 7, 6 << 30],
)
def test_size_of_the_snapshot_follows_from_log_start(size: int) -> None:
    _, log_start, _ = layout2.decode_header(layout2.encode_header(ID, CREATED_NS, size))
    assert layout2.snapshot_size(log_start) == size


def turned(data: bytes, bit: int) -> bytes:
    """``data`` with one bit turned."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def a_head(**changes: Any) -> Head:
    """The head of a change at offset 1000, with ``changes``."""
    head = BEFORE_FIRST._replace(
        kind=Kind.CHANGE, flags=layout2.BUMPS, backup_id=ID, sequence=3, offset=1000, version=8,
        session=FIRST,
    )  # fmt: skip
    return head._replace(**changes)


def test_a_head_comes_back() -> None:
    data = layout2.encode(a_head(length=5), b"hello")
    head = layout2.decode_head(data, 1000, ID)
    assert head is not None
    assert head == a_head(length=5, payload_crc=zlib.crc32(b"hello"), crc=head.crc)
    assert layout2.decode_head(data[: HEAD.size], 1000, None) == head
    assert data[HEAD.size :] == b"hello\0\x03\xe8\n"


def test_every_bit_of_a_head_counts() -> None:
    data = layout2.encode(a_head(length=5), b"hello")
    for bit in range(HEAD.size * 8):
        assert layout2.decode_head(turned(data, bit), 1000, ID) is None
    for size in range(HEAD.size):
        assert layout2.decode_head(data[:size], 1000, ID) is None


def test_head_of_another_place_or_file_is_refused() -> None:
    data = layout2.encode(a_head(), b"")
    assert layout2.decode_head(data, 1000, ID) is not None
    assert layout2.decode_head(data, 1001, ID) is None
    assert layout2.decode_head(data, 1000, bytes(16)) is None


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (Kind.SNAPSHOT, MAX_CHUNK_SIZE),
        (Kind.CHANGE, MAX_CHANGE_SIZE),
        (Kind.REWIND, 0),
        (Kind.OWNER, 16 << 10),
        (0, -1),
        (5, -1),
        (255, -1),
    ],
)
def test_length_over_its_limit_is_refused(kind: int, limit: int) -> None:
    for length in {0, max(limit, 0), limit + 1, 2**64 - 1}:
        body = HEAD.pack(*a_head(kind=kind, length=length))[:-4]
        head = layout2.decode_head(body + struct.pack("!I", zlib.crc32(body)), 1000, ID)
        assert (head is not None) == (length <= limit), length


# What may follow what.

CHAIN = b"c" * 16


def test_what_may_follow() -> None:
    before = a_head(version=8, changes=4, sequence=3, chain_before=b"b" * 16, chain=CHAIN)
    good = {
        "change": a_head(
            version=9, changes=5, sequence=4, offset=2000, chain_before=CHAIN, chain=b"d" * 16
        ),
        "no bump": a_head(
            version=8, changes=5, sequence=4, offset=2000, chain_before=CHAIN, chain=b"d" * 16,
            flags=0,
        ),
        "rewind": a_head(
            kind=Kind.REWIND, flags=0, version=7, changes=3, sequence=4, offset=2000,
            chain_before=CHAIN, chain=b"b" * 16,
        ),
    }  # fmt: skip
    for head in good.values():
        assert layout2.follows(before, head, 1000) == ""
        for name in ("version", "changes", "sequence"):
            for step in (-1, 1):
                wrong = head._replace(**{name: getattr(head, name) + step})
                assert "does not continue" in layout2.follows(before, wrong, 1000), (head, name)
        assert layout2.follows(before, head._replace(chain_before=b"x" * 16), 1000)
        assert "snapshot" in layout2.follows(before, head, 3000)
    assert layout2.follows(before, good["rewind"]._replace(chain=b"x" * 16), 1000)
    for last in (
        before._replace(flags=0),
        before._replace(kind=Kind.REWIND),
        before._replace(kind=Kind.SNAPSHOT, flags=layout2.FINAL),
    ):
        assert layout2.follows(last, good["change"], 1000) == ""
        assert layout2.follows(last, good["rewind"], 1000), "cannot be rewound"


def test_what_may_come_first() -> None:
    first = a_head(offset=64, version=1, changes=1, sequence=1, chain=CHAIN)
    assert layout2.follows(None, first, 64) == ""
    assert layout2.follows(None, first._replace(version=2), 64)
    assert layout2.follows(None, first._replace(sequence=2), 64)
    assert layout2.follows(None, first._replace(kind=Kind.REWIND, version=0), 64)
    piece = first._replace(kind=Kind.SNAPSHOT, flags=0, version=7, length=10)
    assert layout2.follows(None, piece, piece.end + 1) == ""
    assert layout2.follows(None, piece, piece.end), "the last piece is flagged"
    assert layout2.follows(None, piece._replace(flags=layout2.FINAL), piece.end) == ""
    assert layout2.follows(None, piece._replace(flags=layout2.FINAL), piece.end + 1)
    second = piece._replace(offset=piece.end, flags=layout2.FINAL)
    assert layout2.follows(piece, second, second.end) == ""
    wrongs: list[dict[str, Any]] = [{"version": 8}, {"chain": EMPTY_CHAIN}, {"sequence": 2}]
    for wrong in wrongs:
        assert layout2.follows(piece, second._replace(**wrong), second.end)
    assert layout2.follows(piece, second, piece.end), "a snapshot behind the beginning"


# Finding the end.


class Image:
    """A made-up file of records with payloads of given sizes; payloads hold lone markers.

    Those without a payload are rewinds.
    """

    def __init__(self, sizes: list[int], zeros: int = 0) -> None:
        self.heads: list[Head] = []
        data = layout2.encode_header(ID, CREATED_NS, 0)
        for number, size in enumerate(sizes, 1):
            payload = (layout2.MARKER + b"payload ") * (size // 12 + 1)
            head = a_head(offset=len(data), sequence=number, version=number, length=size)
            head = head if size else head._replace(kind=Kind.REWIND)
            data += layout2.encode(head, payload[:size])
            found = layout2.decode_head(data[head.offset :], head.offset, ID)
            assert found is not None
            self.heads.append(found)
        self.end = len(data)
        self.data = bytearray(data + bytes(zeros))

    def pread(self, offset: int, size: int) -> bytes:
        assert offset >= 0 and size >= 0
        return bytes(self.data[offset : offset + size])

    def last(self) -> Head | None:
        return layout2.find_last(self.pread, FIRST_RECORD, len(self.data), ID)

    def newest(self, rules: int = 1) -> tuple[Head | None, Tail]:
        return layout2.find_newest(self.pread, len(self.data), ID, FIRST_RECORD, rules)

    def tail(self, rules: int = 1) -> Tail:
        """What stands at the last record, were it not valid."""
        return layout2.judge_tail(self.pread, self.heads[-1].offset, len(self.data), ID, rules)


@pytest.mark.parametrize("window", [125, 127, 128, 130, 200, 256, 511, 1000])
def test_records_are_found_across_window_borders(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout2, "WINDOW", window)
    image = Image([0, 3, 50, 200, 1, 0, 0, 431, 12], zeros=300)
    starts = [head.offset for head in image.heads]
    for border in range(FIRST_RECORD, len(image.data) + 1):
        below = [head for head in image.heads if head.offset < border]
        found = layout2.find_last(image.pread, FIRST_RECORD, border, ID)
        assert found == (below[-1] if below else None)
        rewinds = [head for head in below if head.kind == Kind.REWIND]
        found = layout2.find_last(image.pread, FIRST_RECORD, border, ID, Kind.REWIND)
        assert found == (rewinds[-1] if rewinds else None)
        above = [head for head in image.heads if head.offset >= border]
        found = layout2.find_next(image.pread, border, len(image.data), ID)
        assert found == (above[0] if above else None)
    # The other end holds, too.
    for index, start in enumerate(starts):
        for end in range(start + 1, start + 500, 7):
            within = [head for head in image.heads if start < head.offset < end]
            found = layout2.find_next(image.pread, start + 1, end, ID)
            assert found == (within[0] if within else None)
        assert layout2.find_last(image.pread, start + 1, len(image.data), ID) == (
            image.heads[-1] if index + 1 < len(starts) else None
        )
        assert layout2.find_next(image.pread, FIRST_RECORD, start, ID) == (
            image.heads[0] if index else None
        )


def test_heads_of_other_files_are_passed_over() -> None:
    image = Image([10, 10, 300])
    foreign = layout2.encode(a_head(offset=image.heads[2].offset + HEAD.size), b"")
    at = image.heads[2].offset + HEAD.size
    # A head with the right offset but another id, then a right head at another offset.
    other = layout2.encode(a_head(offset=at, backup_id=bytes(16)), b"")
    for intruder in (other, foreign.replace(ID, bytes(16)), layout2.encode(a_head(), b"")):
        image.data[at : at + len(intruder)] = intruder
        assert image.last() == image.heads[2]
        assert layout2.find_next(image.pread, at, len(image.data), ID) is None
    assert layout2.find_last(image.pread, 64, len(image.data), None) is not None


def test_end_of_an_empty_file() -> None:
    for zeros in (1, 511, 5000):
        image = Image([], zeros)
        assert image.newest() == (None, Tail(TailKind.CLEAN, FIRST_RECORD))
    assert Image([]).newest(rules=0) == (None, Tail(TailKind.CLEAN, FIRST_RECORD))
    assert Image([]).newest() == (None, Tail(TailKind.DAMAGED, FIRST_RECORD, layout2.CUT_OFF))


def test_snapshot_that_is_missing_is_damage() -> None:
    image = Image([], zeros=5000)
    _, tail = layout2.find_newest(image.pread, len(image.data), ID, FIRST_RECORD + 1000)
    assert (tail.kind, tail.offset) == (TailKind.DAMAGED, FIRST_RECORD)


@pytest.mark.parametrize(("zeros", "rules"), [(0, 0), (1, 1), (1000, 1)])
def test_newest_of_a_sound_file(zeros: int, rules: int) -> None:
    image = Image([10, 700, 0], zeros)
    assert image.newest(rules) == (image.heads[-1], Tail(TailKind.CLEAN, image.end))


def test_copy_that_was_cut_off_anywhere_is_damage() -> None:
    image = Image([10, 700, 0, 90], zeros=1000)
    whole = bytes(image.data)
    for size in range(FIRST_RECORD, len(whole)):
        image.data[:] = whole[:size]
        newest, tail = image.newest()
        if size > image.end:
            assert (newest, tail.kind) == (image.heads[-1], TailKind.CLEAN)
        else:
            assert (tail.kind, tail.reason) == (TailKind.DAMAGED, layout2.CUT_OFF), size


# Judging a tail.


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("zeros", "rules"), [(0, 0), (4096, 0), (4096, 1)])
@pytest.mark.parametrize("size", [0, 1, 30, 400, 2000])
def test_write_that_stopped_early_is_torn(size: int, zeros: int, rules: int) -> None:
    whole = Image([300, size])
    last = whole.heads[-1]
    for written in range(1, OVERHEAD + size - TRAILER_SIZE):
        image = Image([300, size])
        image.data[last.offset + written :] = bytes(zeros)
        if written < HEAD.size + size:
            assert image.tail(rules).kind is TailKind.TORN, written
            assert image.newest(rules) == (image.heads[0], image.tail(rules))


@pytest.mark.parametrize("fill", range(0, SECTOR, 37))
def test_sector_never_written_is_torn(fill: int) -> None:
    image = Image([fill, 2000], zeros=1024)
    last, sound = image.heads[-1], bytes(image.data)
    for sector in range(last.offset // SECTOR, (last.end - 5) // SECTOR + 1):
        low, high = max(sector * SECTOR, last.offset), min((sector + 1) * SECTOR, last.end)
        image.data[:] = sound
        image.data[low:high] = bytes(high - low)
        assert image.tail().kind is TailKind.TORN, sector
        newest, tail = image.newest()
        assert (newest, tail.kind, tail.offset) == (image.heads[0], TailKind.TORN, last.offset)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("fill", range(0, SECTOR, 37))
def test_acknowledged_record_is_never_taken_for_torn(fill: int) -> None:
    image = Image([fill, 600], zeros=1024)
    last, sound = image.heads[-1], bytes(image.data)
    for at in range(last.offset, last.end - TRAILER_SIZE):
        for value in {0, sound[at] ^ 0xFF} - {sound[at]}:
            image.data[:] = sound
            image.data[at] = value
            # A byte that is alone in its sector is the sector.
            alone = at == last.offset and (at + 1) % SECTOR == 0 and not value
            if not alone:
                assert image.newest()[1].kind is TailKind.DAMAGED, (at, value)


def test_head_that_reaches_into_a_sector_by_zero_bytes_is_no_torn_one() -> None:
    """The last bytes of a head may be zero, alone of the head in the next sector."""
    for tries in range(2000):
        at = SECTOR - HEAD.size + 1  # One byte of the head stands in the second sector.
        data = layout2.encode(a_head(offset=at, time_ns=tries, length=100), b"x" * 100)
        if data[HEAD.size - 1] == 0:
            break
    else:
        pytest.fail("no checksum ends in a zero byte")
    image = Image([])
    image.data[:] = bytes(at) + data + bytes(2000)
    pread, size = image.pread, len(image.data)
    assert layout2.decode_head(pread(at, 200), at, ID) is not None
    for offset in range(at, at + HEAD.size - 1):
        image.data[offset] ^= 0xFF
        assert layout2.judge_tail(pread, at, size, ID).kind is TailKind.DAMAGED, offset
        image.data[offset] ^= 0xFF
    # While a head whose second sector was never written is one.
    image.data[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    image.data[2 * SECTOR : 2 * SECTOR + 50] = b"y" * 50
    image.data[at + 50] ^= 0xFF
    assert layout2.judge_tail(pread, at, size, ID).kind is TailKind.TORN


@pytest.mark.parametrize("length", [SECTOR, 4096])
def test_zeros_over_the_last_two_records_are_damage(length: int) -> None:
    """Bytes of the last one behind them show that it was there: both were acknowledged."""
    image = Image([100, 700, length + 200], zeros=2000)
    sound, (_, before, last) = bytes(image.data), image.heads
    for start in range(before.offset, before.end - TRAILER_SIZE):
        if last.offset < start + length < last.end - TRAILER_SIZE:
            image.data[:] = sound
            image.data[start : start + length] = bytes(length)
            assert image.newest()[1].kind is TailKind.DAMAGED, start


def test_broken_record_with_a_valid_one_behind_is_damage() -> None:
    image = Image([20, 1500, 20])
    broken = image.heads[1]
    image.data[broken.offset : broken.offset + 600] = bytes(600)
    tail = layout2.judge_tail(image.pread, broken.offset, len(image.data), ID)
    assert (tail.kind, tail.offset) == (TailKind.DAMAGED, broken.offset)
    assert "others behind it" in tail.reason


def test_piece_of_a_snapshot_is_never_torn() -> None:
    payload = bytes(2000)  # An SQLite file has zero sectors.
    head = a_head(kind=Kind.SNAPSHOT, offset=FIRST_RECORD, length=2000)
    data = layout2.encode_header(ID, CREATED_NS, 2000) + layout2.encode(head, payload)
    broken = data.replace(bytes(2000), bytes(1000) + b"\1" + bytes(999))

    def pread(offset: int, size: int) -> bytes:
        return broken[offset : offset + size]

    tail = layout2.judge_tail(pread, FIRST_RECORD, len(data) + 1, ID)
    assert (tail.kind, "snapshot" in tail.reason) == (TailKind.DAMAGED, True)
    for size in (len(data) - 1000, len(data)):
        cut = layout2.judge_tail(pread, FIRST_RECORD, size, ID)
        assert (cut.kind, cut.reason) == (TailKind.DAMAGED, layout2.CUT_OFF)


def test_last_two_records_broken_is_damage() -> None:
    image = Image([20, 500, 500])
    for head in image.heads[1:]:
        image.data[head.offset + HEAD.size + 5] ^= 1
    newest, tail = image.newest()
    assert (tail.kind, tail.offset) == (TailKind.DAMAGED, image.heads[1].offset)
    assert newest == image.heads[1]


def test_record_lost_before_a_torn_one_is_damage() -> None:
    image = Image([20, 500, 500])
    image.data[image.heads[1].offset + 3] ^= 1
    del image.data[image.heads[2].offset + 200 :]
    _, tail = image.newest()
    assert tail.kind is TailKind.DAMAGED


def test_random_tails_lose_no_acknowledged_record() -> None:
    """Whatever garbage follows, the newest record is found or damage is named."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        image = Image([rng.randrange(600) for _ in range(3)])
        image.data += rng.randbytes(rng.randrange(1, 2000)) + bytes(rng.randrange(1000))
        newest, tail = image.newest()
        assert newest == image.heads[-1]
        assert tail.offset == image.end and tail.kind is not TailKind.CLEAN


def test_payload_is_checked_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image([1000])
    for window in (1, 7, 999, 1000, 1001):
        monkeypatch.setattr(layout2, "WINDOW", window)
        assert layout2.payload_checks(image.pread, image.heads[0])
    image.data[FIRST_RECORD + HEAD.size + 999] ^= 1
    assert not layout2.payload_checks(image.pread, image.heads[0])
    del image.data[FIRST_RECORD + HEAD.size + 500 :]
    assert not layout2.payload_checks(image.pread, image.heads[0])


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1, 2]", "[" * 100_000, '[1, 1, ["a"]]', '[1, 3, ["a", "b"]]'),
        *(
            '[1, 0, ["a", "b"]]',
            '["1", 1, ["a", "b"]]',
            '[1, 1, ["a", 2]]',
            '[1, true, ["a", "b"]]',
        ),
        *('[1, 1, ["a", "b\\u001b"]]', f"[1, 1, {['a'] * 17}]".replace("'", '"'), "\udc80"),
    ],
)
def test_a_list_of_destinations_that_is_none(text: str) -> None:
    payload = layout2.encode_owner(1, "machine") + b"\0" + text.encode(errors="surrogateescape")
    assert layout2.decode_roster(payload) is None
    assert layout2.decode_owner(payload) == (1, "machine")


def test_a_list_of_destinations_comes_back() -> None:
    roster = Roster(7, 2, ("file:///a b", "socket:[::1]:8700?retry_for=3", "file:///ä"))
    payload = layout2.encode_owner(1, "machine", roster)
    assert layout2.decode_roster(payload) == roster
    without = layout2.without_vote(payload)
    assert layout2.decode_roster(without) == roster._replace(votes=False)
    assert layout2.decode_owner(without) == (1, "machine")
    assert layout2.decode_owner(payload) == (1, "machine")
    assert layout2.decode_roster(layout2.encode_owner(1, "machine")) is None
    with pytest.raises(ConfigError, match="too long"):
        layout2.encode_owner(1, "machine", Roster(1, 1, ("x" * 20_000, "y")))
