"""All of SQLite: copy, data_version, replay, checks, comparison."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any
from urllib.parse import quote

from backend import FOREIGN_KEYS_OFF, Change, Snapshot
from errors import DatabaseError

COPY_PAGES = 1024
"""Pages that SQLite's backup API moves at a time."""
MAX_REPORTED = 10
"""Problems or differences named before the rest is only counted."""
SIDE_FILES = ("-journal", "-wal", "-shm")

Progress = Callable[[int, int], None]
"""``progress(done, total)``; the unit is the caller's."""
Row = tuple[Any, ...]


@contextlib.contextmanager
def opened(path: str, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    """The existing database ``path``; sqlite3.Error leaves as DatabaseError.

    Args:
        mode: "rw", so that SQLite can roll a hot journal back, or "ro".
    """
    try:
        connection = sqlite3.connect(
            f"file:{quote(path)}?mode={mode}", uri=True, isolation_level=None
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

    with opened(source) as node, contextlib.closing(sqlite3.connect(target)) as snapshot:
        # The copy is thrown away after a crash: nothing of it needs to be durable.
        snapshot.execute("PRAGMA synchronous = OFF")
        node.backup(snapshot, pages=COPY_PAGES, progress=report, sleep=0)
        version = data_version(node)
    return Snapshot(target, version)


class Replayer:
    """Applies changes to the database file ``path``, as the node's own connection did.

    Raises:
        DatabaseError: a change does not replay.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Every statement is met once: a statement cache would only cost time.
        self._connection = sqlite3.connect(path, isolation_level=None, cached_statements=0)
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
            if all(s.startswith("PRAGMA") for s in change.transaction):
                for statement in change.transaction:
                    self._execute(statement)
                self._off = change.transaction == [FOREIGN_KEYS_OFF]
                return
            self._execute("BEGIN")
            for statement in change.transaction:
                self._execute(statement)
            self._execute("COMMIT")
            if self._off:  # OFF holds for exactly one change.
                self._execute("PRAGMA foreign_keys = ON")
                self._off = False
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise DatabaseError(
                self.path,
                f"the change to version {change.version} does not replay: {error},"
                f" in {statement[:100]!r}",
            ) from error

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


def compare(left: str, right: str, progress: Progress | None = None) -> list[str]:
    """How two databases differ, schema and rows, in words: empty if they are the same.

    Args:
        left: called "the first" in the text.
        right: called "the second".
    """
    with opened(left) as first, opened(right) as second:
        differences = list(_compare_schema(first, second))
        tables = sorted(_tables(first) & _tables(second))
        for number, table in enumerate(tables):
            if progress is not None:
                progress(number, len(tables))
            if len(differences) < MAX_REPORTED:
                differences += _compare_table(first, second, table)
    return differences


def _schema(connection: sqlite3.Connection) -> dict[tuple[str, str], str | None]:
    rows = connection.execute("SELECT type, name, sql FROM sqlite_master")
    return {(kind, name): sql for kind, name, sql in rows}


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for kind, name in _schema(connection) if kind == "table"}


def _compare_schema(first: sqlite3.Connection, second: sqlite3.Connection) -> Iterator[str]:
    one, two = _schema(first), _schema(second)
    for kind, name in sorted(one.keys() | two.keys()):
        key = kind, name
        if key not in one or key not in two:
            yield f"{kind} {name} is only in the {'first' if key in one else 'second'}"
        elif one[key] != two[key]:
            yield f"{kind} {name} has another definition"


def _compare_table(
    first: sqlite3.Connection, second: sqlite3.Connection, table: str
) -> Iterator[str]:
    quoted = '"' + table.replace('"', '""') + '"'
    info = first.execute(f"PRAGMA table_info({quoted})").fetchall()
    if [c[1] for c in info] != [
        c[1] for c in second.execute(f"PRAGMA table_info({quoted})").fetchall()
    ]:
        return  # The schema's difference has been named.
    columns = [str(column[1]) for column in info]
    keys = [i for _, i in sorted((c[5], i) for i, c in enumerate(info) if c[5])]
    keys = keys or list(range(len(columns)))
    # Behind the key all columns, so that even NULLs in a key leave one order.
    order = ", ".join(str(i + 1) for i in dict.fromkeys([*keys, *range(len(columns))]))
    select = f"SELECT * FROM {quoted} ORDER BY {order}"
    yield from _compare_rows(first.execute(select), second.execute(select), table, columns, keys)


def _compare_rows(
    first: Iterator[Row], second: Iterator[Row], table: str, columns: list[str], keys: list[int]
) -> Iterator[str]:
    """Walk two sorted tables side by side and name what differs, up to a limit."""
    found = 0
    one, two = next(first, None), next(second, None)
    while (one is not None or two is not None) and found < MAX_REPORTED:
        place = _order(one, keys), _order(two, keys)
        if one is not None and two is not None and place[0] == place[1]:
            if _order(one) != _order(two):
                found += 1
                yield f"table {table}, {_name(one, columns, keys)}: {_cells(one, two, columns)}"
            one, two = next(first, None), next(second, None)
        elif two is None or (one is not None and place[0] < place[1]):
            found += 1
            yield f"table {table}: {_name(one, columns, keys)} is only in the first"
            one = next(first, None)
        else:
            found += 1
            yield f"table {table}: {_name(two, columns, keys)} is only in the second"
            two = next(second, None)


def _order(row: Row | None, keys: Sequence[int] | None = None) -> list[tuple[int, Any]]:
    """``row`` as SQLite sorts it: NULL, numbers, text by its bytes, blobs."""
    values = row or () if keys is None else [row[i] for i in keys] if row else ()
    return [_rank(value) for value in values]


def _rank(value: Any) -> tuple[int, Any]:
    if value is None:
        return 0, 0
    if isinstance(value, (int, float)):
        return 1, value
    return (2, value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else (3, value)


def _name(row: Row | None, columns: list[str], keys: list[int]) -> str:
    assert row is not None
    return "the row with " + ", ".join(f"{columns[i]} = {_short(row[i])}" for i in keys[:4])


def _cells(one: Row, two: Row, columns: list[str]) -> str:
    return "; ".join(
        f"{column} is {_short(a)} in the first, {_short(b)} in the second"
        for column, a, b in zip_longest(columns, one, two)
        if _rank(a) != _rank(b)
    )


def _short(value: Any) -> str:
    text = value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
