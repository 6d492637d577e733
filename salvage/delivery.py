"""A history as a new file of layout 2, replayed and checked. All that it holds is foreign."""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import durable
import scratch
import space
from backend import Progress
from errors import BackupError, DiskError, DoesNotReplay
from filelog import writer
from filelog.layout2 import Head, Kind
from filelog.reader import FileReading
from salvage import histories, pieces
from salvage.histories import History
from salvage.images import Images
from salvage.index import Index, Piece
from wallet import restore

EXTENTS = 20
"""Ranges of the images that a report names for one history."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of an image from which a history was taken.

    Attributes:
        path, offset: where it begins.
        size: from the beginning of its first record to the end of its last.
        records: how many of its records were taken.
    """

    path: str
    offset: int
    size: int
    records: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """A history that was delivered, or could not be.

    Attributes:
        history: which one.
        path: the file, or None.
        version: data_version that it leads to.
        last_change_ns: Unix time of its last change, or 0 where layout 1 does not tell.
        changes: how many follow its beginning.
        layout: the highest layout of which records were used.
        extents: where they stood, of all only the first ones.
        extent_count: how many there are.
        problems: what SQLite's checks found.
        failure: why it is not there, or ends early, in words.
    """

    history: History
    path: str | None
    version: int
    last_change_ns: int
    changes: int
    layout: int
    extents: list[Extent]
    extent_count: int
    problems: list[str]
    failure: str | None


class Changed(BackupError):
    """A record, of ``version``, is not what it was when it was found."""

    def __init__(self, version: int, path: str, offset: int) -> None:
        self.version = version
        super().__init__(f"{path}: what stood at offset {offset} could not be read again.")


def deliver(
    images: Images, index: Index, history: History, directory: str, progress: Progress
) -> Delivered:
    """Write ``history`` to a new file in ``directory``, and replay it.

    A change that does not replay or cannot be read again, and all behind it, is left out.

    Raises:
        NoRoom, DiskError: it cannot be written there.
    """
    ids = histories.path(index, history)
    failure: str | None = None
    while True:
        taken = _Taken(images, index, history, ids)
        try:
            path, problems = _write(taken, directory, progress)
            return taken.delivered(path, problems, failure)
        except (DoesNotReplay, Changed) as error:
            failure = failure or error.problem
            shorter = _before(index, ids, error.version)
            if len(shorter) == len(ids) or not len(shorter) + len(history.root.pieces):
                return taken.delivered(None, [], failure)
            ids = shorter
        except (DiskError, space.NoRoom):
            raise
        except BackupError as error:
            return taken.delivered(None, [], failure or error.problem)


def _before(index: Index, ids: array[int], version: int) -> array[int]:
    """``ids`` up to the first change to ``version``."""
    kept: array[int] = array("q")
    for number in ids:
        piece = _piece(index, number)
        if piece.head.version >= version:
            break
        kept.append(number)
    return kept


def _piece(index: Index, number: int) -> Piece:
    piece = index.piece("id = ?", number)
    assert piece is not None
    return piece


class _Taken:
    """The records of a history, in order, and where they stood."""

    def __init__(self, images: Images, index: Index, history: History, ids: array[int]) -> None:
        self._images, self._index = images, index
        self.history, self._ids = history, ids
        self._extents: list[Extent] = []
        self._count = self._end = 0
        self._layout = 2
        self.last = history.tip
        self.size = 0

    def __iter__(self) -> Iterator[tuple[Head, bytes]]:
        for number in (*self.history.root.pieces, *self._ids):
            piece = _piece(self._index, number)
            payload = pieces.read(self._images, piece)
            if zlib.crc32(payload) != piece.head.payload_crc:
                raise Changed(piece.head.version, *self._images.where(piece.place))
            self._note(piece)
            self.last = piece.head
            yield piece.head, payload

    def _note(self, piece: Piece) -> None:
        self._layout = min(self._layout, piece.layout)
        size = piece.payload + piece.head.length - piece.place
        parts = [(piece.place, size + (4 if piece.layout == 2 else 0))]
        if piece.split:
            whole = piece.head.end - piece.head.offset
            parts = [(piece.place, piece.split), (piece.tail, whole - piece.split)]
        for place, length in parts:
            self._note_part(place, length)

    def _note_part(self, place: int, length: int) -> None:
        # Owners, rewinds and the heads of layout 1 stand between.
        near = 0 <= place - self._end <= 4096 and self._count
        self._end = place + length
        if not near:
            self._count += 1
            if self._count > EXTENTS:
                return
            self._extents.append(Extent(*self._images.where(place), length, 1))
        elif self._count <= EXTENTS:
            last = self._extents[-1]
            size = self._images.where(place)[1] + length - last.offset
            self._extents[-1] = Extent(last.path, last.offset, size, last.records + 1)

    def delivered(self, path: str | None, problems: list[str], failure: str | None) -> Delivered:
        return Delivered(
            history=self.history,
            path=path,
            version=self.last.version,
            last_change_ns=self.last.time_ns,
            changes=len(self._ids),
            layout=self._layout,
            extents=self._extents,
            extent_count=self._count,
            problems=problems,
            failure=failure,
        )

    @property
    def is_old(self) -> bool:
        """Whether records without a checksum were used."""
        return self._layout == 1


def _write(taken: _Taken, directory: str, progress: Progress) -> tuple[str, list[str]]:
    """The file of these records, and what SQLite's checks say of what it leads to."""
    with scratch.held(os.path.join(directory, "salvage.scratch-")) as prefix:
        beside = f"{prefix}.log"
        try:
            _write_log(taken, beside)
            with contextlib.closing(FileReading(beside)) as reading:
                _, problems = restore.verify(reading, prefix, None, progress)
            if problems and taken.is_old:
                raise BackupError(f"It is not sound: {problems[0]}")
            path = _name(taken, directory)
            durable.replace(beside, path)  # A run that was ended may have left the same there.
        except OSError as error:
            raise DiskError(beside, error, "write") from error
    return path, problems


def _write_log(taken: _Taken, beside: str) -> None:
    log = writer.LogWriter(beside, secrets.token_bytes(16), 0)
    sequence, unchecked = 0, space.RESERVE
    try:
        for head, payload in taken:
            unchecked += len(payload)
            if unchecked >= space.RESERVE:
                space.require(beside, len(payload), "Or name an OUTDIR on another disk.")
                unchecked = 0
            if taken.history.root.pieces and head.kind == Kind.SNAPSHOT:
                log.add_piece(head, payload)
                sequence = head.sequence
                continue
            sequence += 1  # What was taken back is left out, so theirs have gaps.
            log.add(head._replace(sequence=sequence), payload)
        log.finish()
    finally:
        log.close()
    writer.check_log(beside)


def _name(taken: _Taken, directory: str) -> str:
    # All of the chain: a forged one could have the beginning of another one's, and replace it.
    return os.path.join(directory, f"v{taken.last.version}-{taken.last.chain.hex()}.bkp")
