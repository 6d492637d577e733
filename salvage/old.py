"""What stands in files of layout 1, as the records of layout 2 that an upgrade would make of it.

That layout has no checksums and names no backup. So its entries are followed from where a file
or a snapshot begins, as long as each fits the one before, and a break inside of one is the end.
A snapshot's chain is made of its content: copies of it, and what follows them, agree then.
"""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Iterator

from backend import (
    CHAIN_SIZE,
    MAX_CHANGE_SIZE,
    MAX_CHUNK_SIZE,
    NOBODY,
    Change,
    chain_after,
)
from decisions import Verdict, judge
from errors import InvalidChange
from filelog import layout1, layout2
from filelog.layout2 import BEFORE_FIRST, Head, Kind
from salvage.images import Images
from salvage.index import Index, row
from salvage.scan import SQLITE, Effort

BATCH = 1000
"""Records put into the index at once."""
ID = b"layout 1".ljust(16, b"\0")
"""In place of a backup id, where a file began empty."""


def follow_all(images: Images, index: Index, effort: Effort) -> None:
    """Put the entries of all files of layout 1 that the scan saw into ``index``."""
    if index.note("olds") == "followed":
        return
    with index.changing():
        end = 0
        for place, is_header, _ in index.olds():
            first = place + layout1.FIRST_ENTRY if is_header else place
            if first < end:
                continue  # Within what was followed from before it.
            walk = _Walk(images, effort, first)
            batch: list[tuple[object, ...]] = []
            for found in walk:
                batch.append(found)
                if len(batch) == BATCH:
                    index.add(batch)
                    batch.clear()
            index.add(batch)
            end = max(end, walk.position)
        index.set_note("olds", "followed")


class _Walk:
    """The entries from ``first`` on.

    Attributes:
        position: behind the last one that fits.
    """

    def __init__(self, images: Images, effort: Effort, first: int) -> None:
        self._images = images
        self._effort = effort
        self.position = first
        self._last: Head = BEFORE_FIRST._replace(backup_id=ID)
        self._sequence = 0
        self._any = False

    def __iter__(self) -> Iterator[tuple[object, ...]]:
        while found := self._entry():
            yield from found

    def _entry(self) -> list[tuple[object, ...]]:
        failures = self._images.failures
        rows, end = self._rows()
        # No checksum tells that zeros stand for what cannot be read.
        if not rows or self._images.failures != failures:
            return []
        self.position = end
        return rows

    def _rows(self) -> tuple[list[tuple[object, ...]], int]:
        """The records of the entry at ``position``, none if it does not fit, and its end."""
        head = self._images.read(self.position, layout1.ENTRY.size)
        if len(head) < layout1.ENTRY.size:
            return [], 0
        length, version, kind = layout1.ENTRY.unpack(head)
        payload = self.position + layout1.ENTRY.size
        if not self._effort.allow(length) or not self._images.is_known(self.position, length + 9):
            return [], 0
        if kind == layout1.SNAPSHOT:
            return self._snapshot(version, payload, length), payload + length
        if kind == layout1.TRANSACTION and length <= MAX_CHANGE_SIZE:
            return self._change(version, payload, length), payload + length
        return [], 0

    def _snapshot(self, version: int, payload: int, length: int) -> list[tuple[object, ...]]:
        start = self._images.read(payload, 100)
        if not start.startswith(SQLITE) or not _is_sized(start, length):
            return []
        digest = hashlib.blake2b(b"snapshot", digest_size=CHAIN_SIZE)
        crcs: array[int] = array("L")
        for at in range(0, length, MAX_CHUNK_SIZE):
            piece = self._images.read(payload + at, min(MAX_CHUNK_SIZE, length - at))
            digest.update(piece)
            crcs.append(zlib.crc32(piece))
        chain = digest.digest()
        rows, offset = [], layout2.FIRST_RECORD
        for at, crc in zip(range(0, length, MAX_CHUNK_SIZE), crcs, strict=True):
            size = min(MAX_CHUNK_SIZE, length - at)
            self._last = Head(
                kind=Kind.SNAPSHOT,
                flags=layout2.FINAL if at + size == length else 0,
                backup_id=chain,
                offset=offset,
                version=version,
                payload_crc=crc,
                session=NOBODY,
                length=size,
                chain_before=chain,
                chain=chain,
            )
            rows.append(self._row(payload + at))
            offset = self._last.end
        return rows

    def _change(self, version: int, payload: int, length: int) -> list[tuple[object, ...]]:
        try:
            change = Change.decode(version, self._images.read(payload, length))
        except InvalidChange:
            return []
        last = self._last
        verdict = judge(change.base, last.version, last.rewindable, first=True)
        if not change.is_known or verdict not in (Verdict.APPEND, Verdict.REWIND):
            return []
        rows = []
        if verdict is Verdict.REWIND:
            self._last = layout2.rewind_behind(last, NOBODY, 0)
            rows.append(self._row(payload))
        chain = chain_after(self._last.chain, version, change.payload)
        self._last = layout2.behind(
            self._last,
            length,
            kind=Kind.CHANGE,
            flags=layout2.BUMPS if change.bumps else 0,
            version=version,
            time_ns=0,
            session=NOBODY,
            chain=chain,
        )._replace(payload_crc=zlib.crc32(change.payload))
        return [*rows, self._row(payload)]

    def _row(self, payload: int) -> tuple[object, ...]:
        raw = layout2.HEAD.pack(*self._last)
        return row(payload, self._last, raw, True, payload, layout=1)


def _is_sized(start: bytes, length: int) -> bool:
    """Whether an SQLite file that begins with ``start`` can have ``length`` bytes."""
    page = int.from_bytes(start[16:18], "big")
    page = 65536 if page == 1 else page
    if page < 512 or page & (page - 1) or length % page or len(start) < 100:
        return False
    is_told = start[24:28] == start[92:96]  # Else an old release of SQLite wrote it.
    return not is_told or int.from_bytes(start[28:32], "big") == length // page
