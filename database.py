"""All of SQLite: copy, data_version, replay, checks, comparison."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import durable
from backend import FOREIGN_KEYS_OFF, Change, Snapshot
from errors import DatabaseError, DiskError

COPY_PAGES = 1024
"""Pages that SQLite's backup API moves at a time."""
CACHED_STATEMENTS = 64
"""More than half of a node's statements come again soon: BEGIN, COMMIT and many UPDATEs."""
LARGE_CHANGE = 256 << 10
"""Bytes of a change whose statements are not kept in the cache."""
MAX_REPORTED = 10
"""Problems or differences named before the rest is only counted."""
SIDE_FILES = ("-journal", "-wal", "-shm")

Progress = Callable[[int, int], None]
"""``progress(done, total)``; the unit is the caller's."""
Row = tuple[Any, ...]
Rank = tuple[int, Any, bool]


@contextlib.contextmanager
def opened(path: str, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    """The existing database ``path``; sqlite3.Error leaves as DatabaseError.

    Args:
        mode: "rw", so that SQLite can roll a hot journal back, or "ro".
    """
    try:
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode={mode}", uri=True, isolation_level=None
        )
        with contextlib.closing(connection):
            yield connection
    except sqlite3.Error as error:
        raise DatabaseError(path, f"SQLite says: {error}") from error


def data_version(connection: sqlite3.Connection) -> int:
    """The node's data_version; 0 where an old release has not stored one yet."""
    columns = connection.execute("SELECT 1 FROM pragma_table_info('vars') WHERE name = 'intval'")
    if columns.fetchone() is None:
        return 0
    row = connection.execute("SELECT intval FROM vars WHERE name = 'data_version'").fetchone()
    return int(row[0]) if row and row[0] is not None else 0


def version_of(path: str) -> int:
    """data_version of the stopped node's database ``path``; 0 if there is no such file."""
    if not os.path.exists(path):
        return 0
    with opened(path) as connection:
        return data_version(connection)


def copy(source: str, target: str, progress: Progress | None = None) -> Snapshot:
    """Copy a database with SQLite's backup API: a hot journal or a WAL is included.

    Args:
        source: the node's database, of a stopped node.
        target: path of the copy, which must not exist.
    """

    def report(_status: int, remaining: int, total: int) -> None:
        if progress is not None:
            progress(total - remaining, total)

    try:
        os.close(durable.create(target))
    except OSError as error:
        raise DiskError(target, error, "create") from error
    with opened(source) as node, opened(target) as snapshot:
        # The copy is thrown away after a crash: nothing of it needs to be durable.
        snapshot.execute("PRAGMA synchronous = OFF")
        try:
            node.backup(snapshot, pages=COPY_PAGES, progress=report, sleep=0)
        except sqlite3.Error as error:
            is_full = "full" in str(error)
            problem = f"SQLite says: {error}, copying {source} to {target}"
            raise DatabaseError(target if is_full else source, problem) from error
        version = data_version(node)
    return Snapshot(target, version)


_MISSING_SPACE = re.compile(
    r"""(?P<literal>'[^']*'|"[^"]*")|(?P<value>\b(?:reserved_til|peer_id)=[0-9]+)(?=WHERE\b)"""
)


def mend(statement: str) -> str:
    """``statement`` with the space that releases of 2020 left out before some WHEREs."""
    return _MISSING_SPACE.sub(lambda m: m["literal"] or f"{m['value']} ", statement)


def size_with_side_files(path: str) -> int:
    """Bytes of the database ``path`` with its journal or WAL; 0 if it is not there."""
    names = (path, *(path + suffix for suffix in SIDE_FILES))
    return sum(os.path.getsize(name) for name in names if os.path.exists(name))


def copy_files(source: str, target: str) -> None:
    """Copy a stopped node's database with its journal or WAL, without touching it.

    Opening the original could roll a hot journal back or fold a WAL in: a look must not.
    """
    if not os.path.isfile(source):
        raise DatabaseError(source, "there is no such file")
    for suffix in ("", *SIDE_FILES):
        if os.path.exists(source + suffix):
            shutil.copyfile(source + suffix, target + suffix)


class Replayer:
    """Applies changes to the database file ``path``, as the node's own connection did.

    Raises:
        DatabaseError: a change does not replay.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._connection = sqlite3.connect(
            path, isolation_level=None, cached_statements=CACHED_STATEMENTS
        )
        self._execute = self._connection.cursor().execute
        self._off = False
        try:
            self._was_wal = self._execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            for pragma in (
                "journal_mode = MEMORY",
                "synchronous = OFF",
                "locking_mode = EXCLUSIVE",
                "cache_size = -16000",
                "foreign_keys = ON",
            ):
                self._execute(f"PRAGMA {pragma}")
        except sqlite3.Error as error:
            self._connection.close()
            raise DatabaseError(path, f"SQLite says: {error}") from error

    def apply(self, change: Change) -> None:
        """Execute one transaction. A PRAGMA call runs outside of any, as on the node."""
        assert change.transaction is not None
        statement = ""
        try:
            if change.is_pragma:
                for statement in change.transaction:
                    self._execute(statement)
                self._off = change.transaction == [FOREIGN_KEYS_OFF]
                return
            self._execute("BEGIN")
            for statement in change.transaction:
                try:
                    self._execute(statement)
                except sqlite3.OperationalError:
                    mended = mend(statement)
                    if mended == statement:
                        raise
                    self._execute(mended)
            self._execute("COMMIT")
            if len(change.payload) > LARGE_CHANGE:
                self._forget_statements()
            if self._off:  # OFF holds for exactly one change.
                self._execute("PRAGMA foreign_keys = ON")
                self._off = False
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise DatabaseError(
                self.path,
                f"the change to version {change.version} does not replay: {error},"
                f" in {statement[:100]!r}",
            ) from error

    def _forget_statements(self) -> None:
        """Push large statements out of the statement cache, or they fill the memory."""
        for number in range(CACHED_STATEMENTS):
            self._execute(f"SELECT {number}")

    def finish(self) -> int:
        """Close the database in the journal mode it had; its data_version."""
        try:
            version = data_version(self._connection)
            if self._was_wal:
                self._execute("PRAGMA locking_mode = NORMAL")
                self._execute("PRAGMA journal_mode = WAL")
            return version
        except sqlite3.Error as error:
            raise DatabaseError(self.path, f"SQLite says: {error}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def check(path: str) -> list[str]:
    """What integrity_check and foreign_key_check say of ``path``: empty if it is sound."""
    problems = integrity_problems(path)
    with opened(path) as connection:
        rows = connection.execute("PRAGMA foreign_key_check").fetchmany(MAX_REPORTED)
    return problems + [
        f"foreign_key_check: row {row} of {table} points to no row of {parent}"
        for table, row, parent, _ in rows
    ]


def integrity_problems(path: str) -> list[str]:
    """What integrity_check says of ``path``: empty if it is sound."""
    try:
        with opened(path) as connection:
            rows = connection.execute(f"PRAGMA integrity_check({MAX_REPORTED})").fetchall()
    except DatabaseError as error:
        return [f"integrity_check: {error}"]
    return [f"integrity_check: {text}" for (text,) in rows if text != "ok"]


def compare(
    left: str, right: str, first_name: str = "the first", second_name: str = "the second"
) -> list[str]:
    """How two databases differ, schema and rows, in words: empty if they are the same.

    Args:
        first_name: what ``left`` is called.
        second_name: what ``right`` is called.
    """
    with opened(left) as first, opened(right) as second:
        for connection in first, second:
            connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        differences = list(_compare_schema(first, second, first_name, second_name))
        for table in sorted(_tables(first) & _tables(second)):
            if len(differences) < MAX_REPORTED:
                walk = _TableWalk(first, second, table, first_name, second_name)
                differences += itertools.islice(walk.differences(), MAX_REPORTED)
    return differences


def _schema(connection: sqlite3.Connection) -> dict[tuple[str, str], str | None]:
    rows = connection.execute("SELECT type, name, sql FROM sqlite_master")
    return {(kind, name): sql for kind, name, sql in rows}


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for kind, name in _schema(connection) if kind == "table"}


def _compare_schema(
    first: sqlite3.Connection, second: sqlite3.Connection, first_name: str, second_name: str
) -> Iterator[str]:
    one, two = _schema(first), _schema(second)
    for key in sorted(one.keys() | two.keys()):
        what = " ".join(key)
        if key not in one or key not in two:
            yield f"{what} is only in {first_name if key in one else second_name}"
        elif one[key] != two[key]:
            yield f"{what} has another definition"


class _TableWalk:
    """Two tables side by side, both sorted by their key."""

    def __init__(
        self,
        first: sqlite3.Connection,
        second: sqlite3.Connection,
        table: str,
        first_name: str,
        second_name: str,
    ) -> None:
        self._table = table
        self._names = first_name, second_name
        info = first.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
        self._columns = [str(column[1]) for column in info]
        key = [i for _, i in sorted((column[5], i) for i, column in enumerate(info) if column[5])]
        self._key = key or list(range(len(self._columns)))
        try:
            self._rows = self._sorted(first), self._sorted(second)
        except sqlite3.OperationalError:  # Other columns: the schema's difference was named.
            self._rows = iter(()), iter(())

    def _sorted(self, connection: sqlite3.Connection) -> Iterator[Row]:
        # Behind the key all columns, so that even NULLs in a key leave one order.
        order = dict.fromkeys([*self._key, *range(len(self._columns))])
        # Without its table in front, SQLite takes a missing column's name for a text.
        names = [f"{_quoted(self._table)}.{_quoted(column)}" for column in self._columns]
        return connection.execute(
            f"SELECT {', '.join(names)} FROM {_quoted(self._table)}"
            f" ORDER BY {', '.join(f'{names[i]} COLLATE BINARY' for i in order)}"
        )

    def differences(self) -> Iterator[str]:
        """Each row that is missing or different, in words."""
        first, second = self._rows
        one, two = next(first, None), next(second, None)
        while one is not None or two is not None:
            if two is None or (one is not None and self._place(one) < self._place(two)):
                yield self._only(one, self._names[0])
                one = next(first, None)
            elif one is None or self._place(two) < self._place(one):
                yield self._only(two, self._names[1])
                two = next(second, None)
            else:
                if [*map(_rank, one)] != [*map(_rank, two)]:
                    yield f"table {self._table}: in {self._name(one)}, {self._cells(one, two)}"
                one, two = next(first, None), next(second, None)

    def _place(self, row: Row) -> list[Rank]:
        return [_rank(row[i]) for i in self._key]

    def _name(self, row: Row) -> str:
        cells = (f"{self._columns[i]} = {_short(row[i])}" for i in self._key[:4])
        return f"the row with {', '.join(cells)}"

    def _only(self, row: Row | None, where: str) -> str:
        assert row is not None
        return f"table {self._table}: {self._name(row)} is only in {where}"

    def _cells(self, one: Row, two: Row) -> str:
        first, second = self._names
        return "; ".join(
            f"{column} is {_short(a)} in {first} and {_short(b)} in {second}"
            for column, a, b in zip(self._columns, one, two, strict=True)
            if _rank(a) != _rank(b)
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _rank(value: Any) -> Rank:
    """``value``'s place in SQLite's order: NULL, numbers, text by its bytes, blobs."""
    if value is None:
        return 0, 0, False
    if isinstance(value, str):
        return 2, value.encode("utf-8", "surrogateescape"), False
    return (3, value, False) if isinstance(value, bytes) else (1, value, isinstance(value, float))


def _short(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
