"""Records in two pieces, put together by what the records around them say.

A file's next extent may be anywhere on the disk. Where a record is cut by that, its head says
where it ends in its own file, and the next record's head says that it begins there: so the tail
stands before the next record; that of the last one before the zeros that are behind each log.
Between the two the cut is at one of the sectors, and the checksum (of a change its chain, too)
says at which. A record in more than two pieces is not put together.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

from backend import chain_after
from filelog import layout2
from filelog.layout2 import HEAD, OVERHEAD, SECTOR, Head, Kind
from salvage.images import Images
from salvage.index import Index, Piece
from salvage.scan import Effort

LONGEST = 8 << 20
"""Bytes of a payload that is put together; two of them are in memory at once."""
TAILS = 8
"""Places at which the tail of one record is tried."""
_POLYNOMIAL = 0xEDB88320


def join_all(images: Images, index: Index, effort: Effort) -> None:
    """Make whole what can be."""
    if index.note("joined") == "all":
        return
    with index.changing():
        last = 0
        while broken := index.piece("whole = 0 AND id > ? ORDER BY id", last):
            _join_payload(images, index, effort, broken)
            last = broken.id
        for before in _before_lost_heads(index):
            _join_head(images, index, effort, before)
        index.set_note("joined", "all")


def read(images: Images, piece: Piece) -> bytes:
    """The payload of ``piece``."""
    if not piece.split:
        return images.read(piece.payload, piece.head.length)
    size = piece.head.end - piece.head.offset
    record = images.read(piece.place, piece.split) + images.read(piece.tail, size - piece.split)
    return record[HEAD.size : HEAD.size + piece.head.length]


def _join_payload(images: Images, index: Index, effort: Effort, broken: Piece) -> None:
    head = broken.head
    size = head.end - head.offset
    if head.length > LONGEST:
        return
    following = index.pieces(
        f"backup = ? AND offset = ? AND place != ? LIMIT {100 * TAILS}",
        *(head.backup_id, head.end, broken.place + size),
    )
    fitting = (piece.place for piece in following if _may_follow(head, piece.head))
    places = list(itertools.islice(fitting, TAILS))
    low = int.from_bytes(layout2.trailer(head.offset)[:3], "big")
    for place in places or index.log_ends(low, TAILS):
        tail = place - size
        if not effort.allow(2 * size):
            continue
        first = images.read_padded(broken.place, size, broken.place)
        second = images.read_padded(tail, size, place)
        for split in _cuts(head, first, second, broken.place, place):
            index.set_joined(broken.id, split, tail + split)
            return


def _may_follow(head: Head, after: Head) -> bool:
    if after.kind == Kind.SNAPSHOT:
        return (after.sequence, after.chain) == (head.sequence, head.chain)
    if after.kind == Kind.OWNER:
        return after.chain == head.chain
    return after.chain_before == head.chain


def _cuts(head: Head, first: bytes, second: bytes, place: int, after: int) -> Iterator[int]:
    """Where ``first`` has to go on with ``second`` for the payload to check."""
    size = len(first)
    begin = HEAD.size + -(place + HEAD.size) % SECTOR
    if (after - place - size) % SECTOR:
        return  # Extents begin at sectors: so the two are apart by whole ones.
    cuts = range(begin, size, SECTOR)
    for cut, crc in _spliced(first, second, cuts):
        if crc == head.payload_crc and _is_chained(head, first, second, cut):
            yield cut


def _is_chained(head: Head, first: bytes, second: bytes, cut: int) -> bool:
    if head.kind != Kind.CHANGE:
        return True
    payload = (first[:cut] + second[cut:])[HEAD.size :][: head.length]
    return chain_after(head.chain_before, head.version, payload) == head.chain


def _spliced(first: bytes, second: bytes, cuts: range) -> Iterator[tuple[int, int]]:
    """Each cut, from the last one on, and the CRC-32 of the payload with it."""
    end = HEAD.size + max(len(first) - OVERHEAD, 0)
    before, crc, position = [], 0, HEAD.size
    for cut in cuts:
        crc = zlib.crc32(first[position : min(cut, end)], crc)
        before.append(crc)
        position = cut
    tail, weight, position = 0, 1 << 31, end
    for cut, crc in zip(reversed(cuts), reversed(before), strict=True):
        here = second[cut:position] if cut < position else b""
        tail ^= _times(weight, zlib.crc32(here))
        weight = _times(weight, _power(len(here)))
        position = min(position, cut)
        yield cut, _times(weight, crc) ^ tail


def _times(left: int, right: int) -> int:
    """The product of two polynomials modulo that of CRC-32; bit 31 is of x to the power 0."""
    product = 0
    while left:
        if left & 0x80000000:
            product ^= right
        left = left << 1 & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product


_POWERS: dict[int, int] = {0: 1 << 31}


def _power(size: int) -> int:
    """What ``size`` bytes behind it make of a CRC-32."""
    if size not in _POWERS and len(_POWERS) < 1024:
        _POWERS[size] = _power_of(size)
    return _POWERS[size] if size in _POWERS else _power_of(size)


def _power_of(size: int) -> int:
    result, square, bits = 1 << 31, 1 << 30, 8 * size
    while bits:
        if bits & 1:
            result = _times(result, square)
        square, bits = _times(square, square), bits >> 1
    return result


def _before_lost_heads(index: Index) -> Iterator[Piece]:
    """The records behind which the next one's head was not found."""
    last = 0
    while before := index.piece(  # A head is cut where a sector ends soon behind the record.
        f"whole = 1 AND layout = 2 AND id > ? AND (split OR (place + ends - offset) % {SECTOR}"
        f" > {SECTOR - HEAD.size}) AND NOT EXISTS (SELECT 1 FROM pieces b"
        " WHERE b.backup = pieces.backup AND b.offset = pieces.ends"
        " AND b.sequence BETWEEN pieces.sequence AND pieces.sequence + 1) ORDER BY id",
        last,
    ):
        last = before.id
        yield before


def _join_head(images: Images, index: Index, effort: Effort, before: Piece) -> None:
    """Make the record behind ``before`` whole if its head is cut."""
    size = before.head.end - before.head.offset
    place = before.tail + size - before.split if before.split else before.place + size
    cut = -place % SECTOR
    if not 0 < cut < HEAD.size:
        return
    first = images.read(place, cut)
    for tail, size in _tails_of_head(index, before.head, cut):
        if not effort.allow(SECTOR):
            return
        raw = first + images.read(tail, HEAD.size - cut)
        head = layout2.decode_head(raw, before.head.end, before.head.backup_id)
        if head is None or head.end - head.offset != size or not effort.allow(head.length):
            continue
        payload = images.read(tail + HEAD.size - cut, head.length)
        if zlib.crc32(payload) != head.payload_crc:
            continue
        chain = chain_after(head.chain_before, head.version, payload)
        if head.kind != Kind.CHANGE or chain == head.chain:
            index.add_joined(place, head, raw, cut, tail)
            return


def _tails_of_head(index: Index, before: Head, cut: int) -> Iterator[tuple[int, int]]:
    """Where what is behind ``cut`` bytes of the next head may stand, and the record's size then."""
    for sequence in before.sequence, before.sequence + 1, before.sequence + 2:
        for after in index.pieces(
            f"backup = ? AND sequence = ? AND offset > ? AND offset <= ? LIMIT {TAILS}",
            *(before.backup_id, sequence, before.end, before.end + OVERHEAD + LONGEST),
        ):
            size = after.head.offset - before.end
            yield after.place - size + cut, size
    # Of the newest of its log it is known where it ends, but not how long it is.
    low = int.from_bytes(layout2.trailer(before.end)[:3], "big")
    for end in index.log_ends(low, TAILS):
        highest = (end - OVERHEAD + cut) // SECTOR * SECTOR
        for tail in range(highest, max(end - LONGEST, 0) - 1, -SECTOR):
            yield tail, end - tail + cut
