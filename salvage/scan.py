"""One pass over the images: where records of layout 2 stand, and files of layout 1 may begin."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator

from backend import CHAIN_SIZE, Progress
from filelog import layout1, layout2
from filelog.layout2 import HEAD, MARKER, SECTOR, Head, Kind
from salvage.images import Images
from salvage.index import Index, is_ours, row

WINDOW = 4 << 20
"""Bytes looked at at once."""
STEP = 1 << 20
"""Bytes of a long payload read at once."""
SQLITE = b"SQLite format 3\0"
_BEFORE = layout1.ENTRY.size
"""What stands before the snapshot in an entry of layout 1."""
_OVERLAP = max(HEAD.size, layout1.FIRST_ENTRY)
_LOG_END = b"\n" + bytes(31)
"""The end of a trailer, and of the zeros that are behind the newest record."""
_NO_PADDING = bytes(layout1.FIRST_ENTRY - layout1.HEADER.size)


class Effort:
    """How many bytes may be read to check what was found.

    Forged records may overlap as they like, and each is read whole.
    """

    FACTOR = 4
    FREE = 1 << 30

    def __init__(self, size: int) -> None:
        self._left = self.FACTOR * size + self.FREE
        self.refused = 0
        """How often it was too much."""

    def allow(self, size: int) -> bool:
        """Whether ``size`` bytes more may be read."""
        if size > self._left:
            self.refused += 1
            return False
        self._left -= size
        return True


def scan(images: Images, index: Index, effort: Effort, progress: Progress) -> None:
    """Put into ``index`` what is found; goes on where a former scan of it ended.

    Args:
        progress: called with bytes scanned, and in all.
    """
    if index.note("scanned") == "all":
        return
    ranges = images.ranges()
    total = sum(end - begin for begin, end in ranges)
    done, position = 0, int(index.note("scanned") or 0)
    for begin, end in ranges:
        for low in range(begin, end, WINDOW):
            high = min(low + WINDOW, end)
            if low >= position:
                _scan_window(images, index, effort, low, high)
            done += high - low
            progress(done, total)
    with index.changing():
        index.finish()
        index.set_note("scanned", "all")


def _scan_window(images: Images, index: Index, effort: Effort, low: int, high: int) -> None:
    data = images.read(low, high - low + _OVERLAP)
    if data == bytes(len(data)):  # As most of an empty disk is.
        return
    with index.changing():
        index.add(_records(images, effort, data, low, high))
        index.add_olds(_headers(images, data, low, high))
        index.add_olds(_snapshots(images, data, low, high))
        index.add_log_ends(_log_ends(data, low, high))
        index.set_note("scanned", high)


def _records(
    images: Images, effort: Effort, data: bytes, low: int, high: int
) -> Iterator[tuple[object, ...]]:
    view, end = memoryview(data), high - low + len(MARKER) - 1
    at = data.find(MARKER, 0, end)
    while at >= 0:
        raw = data[at : at + HEAD.size]
        head = layout2.decode_head(raw, int.from_bytes(raw[32:40], "big"), None)
        if head is not None and is_ours(raw):
            payload = view[at + HEAD.size : at + HEAD.size + head.length]
            whole = effort.allow(head.length) and _checks(images, head, low + at, payload)
            yield row(low + at, head, raw, whole)
        at = data.find(MARKER, at + 1, end)


def _checks(images: Images, head: Head, place: int, seen: memoryview) -> bool:
    """Whether the payload behind ``place`` is there; ``seen`` is all of it, or its beginning."""
    if len(seen) == head.length:
        if zlib.crc32(seen) != head.payload_crc:
            return False
        return head.kind != Kind.CHANGE or _chain(head, seen) == head.chain
    return _checks_in_steps(images, head, place, seen)


def _chain(head: Head, payload: memoryview) -> bytes:
    before = head.chain_before + head.version.to_bytes(4, "big")
    digest = hashlib.blake2b(before, digest_size=CHAIN_SIZE)
    digest.update(payload)
    return digest.digest()


def _checks_in_steps(images: Images, head: Head, place: int, seen: memoryview) -> bool:
    """``_checks``, however long the payload is."""
    crc = zlib.crc32(seen)
    chain = hashlib.blake2b(head.chain_before, digest_size=CHAIN_SIZE)
    chain.update(head.version.to_bytes(4, "big"))
    chain.update(seen)
    position, end = place + HEAD.size + len(seen), place + HEAD.size + head.length
    while position < end:
        data = images.read(position, min(STEP, end - position))
        if not data:
            return False
        crc = zlib.crc32(data, crc)
        chain.update(data)
        position += len(data)
    if crc != head.payload_crc:
        return False
    return head.kind != Kind.CHANGE or chain.digest() == head.chain


def _log_ends(data: bytes, low: int, high: int) -> Iterator[tuple[int, int]]:
    at = data.find(_LOG_END)
    while 0 <= at < high - low:
        if at >= 3:  # Else it is the end of a record that is not cut there.
            yield low + at + 1, int.from_bytes(data[at - 3 : at], "big")
        at = data.find(_LOG_END, at + 1)


def _headers(images: Images, data: bytes, low: int, high: int) -> Iterator[tuple[int, bool, int]]:
    """Headers of layout 1: at the beginning of a sector, or of an image."""
    # Every last byte of START where one may stand, in one step; the rest of it only there.
    ones, at = data[len(layout1.START) - 1 :: SECTOR], -1
    while (at := ones.find(layout1.START[-1], at + 1)) >= 0 and at * SECTOR < high - low:
        header = data[at * SECTOR : at * SECTOR + layout1.FIRST_ENTRY]
        if header.startswith(layout1.START) and is_header(header):
            yield low + at * SECTOR, True, layout1.HEADER.unpack_from(header)[1]


def is_header(header: bytes) -> bool:
    """Whether these 512 bytes can begin a file of layout 1."""
    if len(header) < layout1.FIRST_ENTRY or not header.endswith(_NO_PADDING):
        return False
    _, version, offset, before, offset_before, _ = layout1.HEADER.unpack_from(header)
    in_order = layout1.FIRST_ENTRY <= offset < 1 << 48 and offset_before < 1 << 48
    return bool(in_order and (before <= version + 1))


def _snapshots(images: Images, data: bytes, low: int, high: int) -> Iterator[tuple[int, bool, int]]:
    """Entries of layout 1 with a whole SQLite file."""
    at = data.find(SQLITE)
    while 0 <= at < high - low:
        place = low + at - _BEFORE
        before = images.read(place, _BEFORE) if place >= 0 else b""
        if len(before) == _BEFORE:
            length, version, kind = layout1.ENTRY.unpack(before)
            if kind == layout1.SNAPSHOT and length >= SECTOR and not length % SECTOR:
                yield place, False, version
        at = data.find(SQLITE, at + 1)
