"""What was found, in an SQLite file of our own: memory stays flat, and a scan can go on later."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import durable
from errors import ConfigError, DiskError
from filelog.layout2 import HEAD, Head, Kind

NAME = "salvage.index"
MOST_CHILDREN = 1000
"""Changes looked at behind one state. A node makes two at most; empty are all at the beginning."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS olds (place INTEGER PRIMARY KEY, is_header INTEGER, version INTEGER);
CREATE TABLE IF NOT EXISTS log_ends (place INTEGER PRIMARY KEY, low INTEGER);
CREATE TABLE IF NOT EXISTS pieces (id INTEGER PRIMARY KEY, place INTEGER, payload INTEGER,
  layout INTEGER, whole INTEGER, split INTEGER, tail INTEGER, head BLOB, kind INTEGER, backup BLOB,
  sequence INTEGER, offset INTEGER, ends INTEGER, version INTEGER, before BLOB, chain BLOB);
"""
_INDEXES = """
CREATE INDEX IF NOT EXISTS by_low ON log_ends (low);
CREATE INDEX IF NOT EXISTS by_before ON pieces (before, kind, whole, chain);
CREATE INDEX IF NOT EXISTS by_chain ON pieces (chain, kind, whole, sequence);
CREATE INDEX IF NOT EXISTS by_offset ON pieces (backup, offset, sequence);
CREATE INDEX IF NOT EXISTS by_sequence ON pieces (backup, sequence, offset);
CREATE INDEX IF NOT EXISTS broken ON pieces (id) WHERE whole = 0;
CREATE INDEX IF NOT EXISTS snapshots ON pieces (backup, chain, sequence, version, offset)
  WHERE kind = 1;
"""
_INSERT = f"INSERT INTO pieces VALUES (NULL{', ?' * 15})"
_ROW = "id, place, payload, layout, whole, split, tail, head"


class Piece(NamedTuple):
    """A record that was found.

    Attributes:
        place: of its head.
        payload: place of its payload.
        layout: of the file that it was in.
        whole: its payload is there, and checks.
        split: how many bytes of the record stand at ``place`` if it was in two pieces, else 0.
        tail: place of the rest of it then.
    """

    id: int
    place: int
    payload: int
    layout: int
    whole: int
    split: int
    tail: int
    head: Head


def row(
    place: int, head: Head, raw: bytes, whole: bool, payload: int | None = None, layout: int = 2
) -> tuple[object, ...]:
    """What ``Index.add`` takes: ``raw`` is ``head`` as bytes."""
    at = place + HEAD.size if payload is None else payload
    found = place, at, layout, int(whole), 0, 0, raw, head.kind, head.backup_id, head.sequence
    return (*found, head.offset, head.end, head.version, head.chain_before, head.chain)


class Index:
    """The file ``salvage.index`` in ``directory``.

    Args:
        images: what tells the images from others.

    Raises:
        ConfigError: it is of other images.
        DiskError: it cannot be used.
    """

    def __init__(self, directory: str, images: object) -> None:
        self.path = os.path.join(directory, NAME)
        try:
            if not os.path.exists(self.path):
                os.close(durable.create(self.path))
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.execute("PRAGMA synchronous = OFF")  # What a loss of power takes is redone.
            self._db.execute("PRAGMA cache_size = -8000")
            self._db.executescript(_SCHEMA)
            known = self.note("images")
            if known is None:
                self.set_note("images", json.dumps(images))
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error
        if known not in (None, json.dumps(images)):
            self._db.close()
            raise ConfigError(
                f"{self.path} is of other images, or they have changed.", "Name another OUTDIR."
            )

    def _unusable(self, error: Exception) -> Exception:
        if isinstance(error, OSError):
            return DiskError(self.path, error, "use")
        return ConfigError(
            f"{self.path} cannot be used: {error}.",
            "Make room if that disk is full; else remove the file, and begin again.",
        )

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """What SQLite refuses meanwhile, as on a full disk, leaves as BackupError."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """What is changed meanwhile is kept together, or not at all."""
        self._db.execute("BEGIN")
        yield
        self._db.execute("COMMIT")

    def note(self, name: str) -> str | None:
        """What ``set_note`` kept."""
        found = self._db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def set_note(self, name: str, value: object) -> None:
        """Keep a word for the next run."""
        self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, str(value)))

    def add(self, rows: Iterable[tuple[object, ...]]) -> None:
        """Add records, as ``row`` makes them."""
        self._db.executemany(_INSERT, rows)

    def add_olds(self, rows: Iterable[tuple[int, bool, int]]) -> None:
        """Add where a file of layout 1 may begin: place, whether with its header, version."""
        self._db.executemany("INSERT OR REPLACE INTO olds VALUES (?, ?, ?)", rows)

    def add_log_ends(self, rows: Iterable[tuple[int, int]]) -> None:
        """Add where a log may end: place, and the low bytes of an offset in a trailer."""
        self._db.executemany("INSERT OR REPLACE INTO log_ends VALUES (?, ?)", rows)

    def log_ends(self, low: int, most: int) -> list[int]:
        """Places that ``add_log_ends`` took with ``low``."""
        query = "SELECT place FROM log_ends WHERE low = ? LIMIT ?"
        return [place for (place,) in self._db.execute(query, (low, most))]

    def olds(self) -> Iterator[tuple[int, bool, int]]:
        """What ``add_olds`` took, in the order of places."""
        yield from self._db.execute("SELECT place, is_header, version FROM olds ORDER BY place")

    def finish(self) -> None:
        """All was added: it is searched from now on."""
        for statement in _INDEXES.split(";"):  # Not executescript, which ends the transaction.
            self._db.execute(statement)

    def set_joined(self, piece: int, split: int, tail: int) -> None:
        """The record is whole, in two pieces."""
        self._db.execute(
            "UPDATE pieces SET whole = 1, split = ?, tail = ? WHERE id = ?", (split, tail, piece)
        )

    def add_joined(self, place: int, head: Head, raw: bytes, split: int, tail: int) -> None:
        """Add a record whose head was in two pieces."""
        self.add([row(place, head, raw, True)])
        self._db.execute(
            "UPDATE pieces SET split = ?, tail = ? WHERE id = last_insert_rowid()", (split, tail)
        )

    def highest_old(self) -> tuple[int, int]:
        """The highest version that a header of layout 1 names, and its place; zeros if none."""
        query = "SELECT version, place FROM olds WHERE is_header ORDER BY version DESC LIMIT 1"
        found = self._db.execute(query).fetchone()
        return (0, 0) if found is None else (found[0], found[1])

    def pieces(self, where: str, *values: object) -> Iterator[Piece]:
        """The records for which ``where`` holds, which may end in an order and a limit."""
        for found in self._db.execute(f"SELECT {_ROW} FROM pieces WHERE {where}", values):
            yield Piece._make((*found[:-1], Head._make(HEAD.unpack(found[-1]))))

    def piece(self, where: str, *values: object) -> Piece | None:
        """The first of ``pieces``."""
        return next(self.pieces(f"{where} LIMIT 1", *values), None)

    def ask(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query that has few."""
        return self._db.execute(query, values).fetchall()

    def walk(self, query: str, *values: object) -> Iterator[tuple[Any, ...]]:
        """The rows of a query that may have many."""
        yield from self._db.execute(query, values)

    # Histories

    def children(self, chain: bytes) -> list[bytes]:
        """The chains that one whole change behind ``chain`` leads to."""
        query = (
            "SELECT DISTINCT chain FROM pieces WHERE before = ? AND kind = 2 AND whole = 1 LIMIT ?"
        )
        return [found for (found,) in self._db.execute(query, (chain, MOST_CHILDREN))]

    def change_to(self, chain: bytes) -> Piece | None:
        """The last whole record of the change that leads to ``chain``."""
        # Taken back and sent again, it stands there twice: the later one counts, by its session.
        return self.piece(
            f"chain = ? AND kind = {Kind.CHANGE} AND whole = 1 ORDER BY layout DESC, sequence DESC",
            chain,
        )

    def close(self, done: bool) -> None:
        """Close it.

        Args:
            done: it is of no more use.
        """
        self._db.close()
        if done:
            durable.discard(self.path)


def is_ours(raw: bytes) -> bool:
    """Whether SQLite can hold the numbers of a head."""
    return not (raw[24] | raw[32] | raw[48] | raw[56]) & 0xC0
