"""All of SQLite: copy, data_version, replay, checks, comparison."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import operator
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import durable
from backend import FOREIGN_KEYS_OFF, FOREIGN_KEYS_ON, MAX_VERSION, Change, Snapshot
from errors import BackupExists, DatabaseError, DiskError, DoesNotReplay, printable
from wallet import confined
from wallet.confined import Confined, Refused

COPY_PAGES = 1024
"""Pages that SQLite's backup API moves at a time."""
CACHED_STATEMENTS = 64
"""More than half of a node's statements come again soon: BEGIN, COMMIT and many UPDATEs."""
LARGE_CHANGE = 256 << 10
"""Bytes of a change whose statements are not kept in the cache."""
OTHER_ROWIDS = (
    "the rows are the same, but not their rowids, which lightningd refers to; VACUUM may change"
    " them, and no plugin hears of it: take a new snapshot with `backup-cli resync`"
)
MAX_REPORTED = 10
"""Problems or differences named before the rest is only counted."""
SIDE_FILES = ("-journal", "-wal", "-shm")

Progress = Callable[[int, int], None]
"""``progress(done, total)``; the unit is the caller's."""
Row = tuple[Any, ...]
Rank = tuple[int, Any, bool]


@contextlib.contextmanager
def opened(path: str, mode: str = "rw", settings: Sequence[str] = ()) -> Iterator[Confined]:
    """The existing database ``path``, confined; sqlite3.Error leaves as DatabaseError.

    Args:
        mode: "rw", so that SQLite can roll a hot journal back, or "ro".
        settings: PRAGMAs that the connection begins with.
    """
    connecting = confined.connect(path, mode, confined.READING, settings)
    with contextlib.closing(connecting) as connection, connection.explaining(path):
        yield connection


def data_version(connection: sqlite3.Connection) -> int:
    """The node's data_version; 0 where an old release has not stored one yet.

    Raises:
        Refused: ``vars`` is no table, or what it holds is no data_version.
    """
    found = _variable(connection, "data_version", "intval")
    if found is None:
        return 0
    if not isinstance(found, int) or not 0 <= found <= MAX_VERSION:
        raise Refused(f"its data_version is {_short(found)}, which is none")
    return found


def _variable(connection: sqlite3.Connection, name: str, column: str) -> Any:
    """What ``vars`` holds under ``name``; None if it does not."""
    if not {"name", column} <= columns(connection, "vars"):
        return None
    row = connection.execute(f"SELECT {column} FROM vars WHERE name = ?", (name,)).fetchone()
    return row and row[0]


def columns(connection: sqlite3.Connection, table: str) -> set[str]:
    """The names of the columns of ``table`` that hold values; none if there is no such table.

    Raises:
        Refused: it is a view.
    """
    kinds = connection.execute(
        "SELECT type FROM sqlite_master WHERE lower(name) = ? AND type IN ('table', 'view')",
        (table,),
    ).fetchall()
    if kinds not in ([], [("table",)]):  # A view could run for ever.
        raise Refused(f"its {table} is no table")
    # This does not list generated columns, which could compute anything.
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def node_id_of(path: str) -> str | None:
    """Which node the database ``path`` belongs to, in hex; None in those of old releases."""
    with opened(path) as connection:
        connection.allow(confined.READ_LIMIT_S)
        found = _variable(connection, "node_id", "blobval")
    return found.hex() if isinstance(found, bytes) else None


def version_of(path: str) -> int:
    """data_version of the database ``path``; 0 if there is no such file."""
    if not os.path.exists(path):
        return 0
    with opened(path) as connection:
        connection.allow(confined.READ_LIMIT_S)
        return data_version(connection)


def copy(source: str, target: str, progress: Progress | None = None) -> Snapshot:
    """Copy a database with SQLite's backup API: a hot journal or a WAL is included.

    Args:
        source: the node's database.
        target: path of the copy, which must not exist.

    Returns:
        The copy, and the version that it has itself: a writer may have gone on meanwhile.

    Raises:
        DatabaseError: it cannot be copied, or integrity_check complains of the copy.
    """

    def report(_status: int, remaining: int, total: int) -> None:
        if progress is not None:
            progress(total - remaining, total)

    with opened(source) as node:
        _create(target)
        # The copy is thrown away after a crash: nothing of it needs to be durable.
        with opened(target, settings=["synchronous = OFF"]) as snapshot:
            try:
                node.backup(snapshot, pages=COPY_PAGES, progress=report, sleep=0)
            except sqlite3.Error as error:
                is_full = "full" in str(error)
                problem = f"SQLite says: {error}, copying {source} to {target}"
                raise DatabaseError(target if is_full else source, problem) from error
    problems = integrity_problems(target)
    if problems:
        raise DatabaseError(
            source,
            f"it is not sound: {problems[0]}",
            "Nothing was stored. If there is a backup, it may be the better copy.",
        )
    with opened(target) as snapshot, snapshot.explaining(source):
        return Snapshot(target, data_version(snapshot))


def _create(path: str) -> None:
    """Create ``path`` empty and for its owner only; SQLite and shutil keep its mode."""
    try:
        os.close(durable.create(path))
    except OSError as error:
        raise DiskError(path, error, "create") from error


_MISSING_SPACE = re.compile(
    r"""(?P<literal>'[^']*'|"[^"]*")|(?P<value>\b(?:reserved_til|peer_id)=[0-9]+)(?=WHERE\b)"""
)


def mend(statement: str) -> str:
    """``statement`` with the space that releases of 2020 left out before some WHEREs."""
    return _MISSING_SPACE.sub(lambda m: m["literal"] or f"{m['value']} ", statement)


def files_of(path: str) -> tuple[str, ...]:
    """Every name that the database ``path`` may have files by."""
    return path, *(path + suffix for suffix in SIDE_FILES)


def require_none(path: str, next_step: Callable[[], str]) -> None:
    """Raise BackupExists if there is anything in place of a new database ``path``.

    SQLite would apply a journal found beside it to the new one.
    """
    for taken in files_of(path):
        if os.path.lexists(taken):
            raise BackupExists(taken, next_step())


def size_with_side_files(path: str) -> int:
    """Bytes of the database ``path`` with its journal or WAL; 0 if it is not there."""
    return sum(os.path.getsize(name) for name in files_of(path) if os.path.exists(name))


def copy_files(source: str, target: str) -> None:
    """Copy a stopped node's database with its journal or WAL, without touching it.

    Opening the original could roll a hot journal back or fold a WAL in: a look must not.
    """
    if not os.path.isfile(source):
        raise DatabaseError(source, "there is no such file")
    for suffix in ("", *SIDE_FILES):
        if os.path.exists(source + suffix):
            _create(target + suffix)
            shutil.copyfile(source + suffix, target + suffix)


_OF_THE_DISK = {"database or disk is full": errno.ENOSPC, "disk I/O error": errno.EIO}
"""What SQLite says that is no fault of a statement."""
_changes_rows = operator.methodcaller("startswith", ("UPDATE ", "INSERT ", "DELETE "))
"""Whether a statement begins like one that changes rows alone; others may do so, too."""


class Replayer:
    """Applies changes to the database file ``path``, as the node's own connection did.

    Many of them share a transaction of SQLite, and nothing can tell: each statement checks what
    it did. Only what a COMMIT would check, deferred foreign keys, keeps each change by itself.
    It keeps no journal, or one UPDATE of a large table would take as much memory: after an
    error the file is garbage.

    Raises:
        DoesNotReplay: a change does not replay.
        DiskError: the disk is full, or fails.
    """

    journal: Sequence[str] = (
        "journal_mode = OFF",
        "synchronous = OFF",
        "locking_mode = EXCLUSIVE",
    )
    transaction_size = 4 << 20
    """Bytes of changes after which it commits; 0: after each."""

    def __init__(self, path: str) -> None:
        self.path = path
        settings = (
            *self.journal,
            "cache_size = -16000",
            "foreign_keys = ON",
            _temporary_files_beside(path),
        )
        self._connection = confined.connect(
            path, "rwc", confined.REPLAYING, settings, CACHED_STATEMENTS
        )
        self._execute = self._connection.cursor().execute
        self._off = False
        self._has_deferred: bool | None = None
        self._open_size = 0
        """Bytes of the changes in the transaction that is open."""
        self._statement = ""
        """The one that is executed."""

    def apply(self, change: Change) -> None:
        """Execute one change. A PRAGMA call runs outside of any transaction, as on the node."""
        self._named(change, self._apply)

    def _apply(self, change: Change) -> None:
        if change.is_pragma:
            self._apply_pragmas(change)
            return
        if not self._connection.in_transaction:
            self._execute("BEGIN")
            self._open_size = 0
        rows_only = self._execute_all(change)
        self._open_size += len(change.payload)
        if self._stands_alone(rows_only) or self._open_size > self.transaction_size:
            self._commit()
        if self._off:  # OFF holds for exactly one change.
            self._execute("PRAGMA foreign_keys = ON")
            self._off = False

    def _apply_pragmas(self, change: Change) -> None:
        assert change.transaction is not None
        self._commit()
        for self._statement in change.transaction:
            if self._statement not in (FOREIGN_KEYS_OFF, FOREIGN_KEYS_ON):
                raise Refused("it is no PRAGMA that lightningd announces")
            self._execute(self._statement)
        self._off = change.transaction == [FOREIGN_KEYS_OFF]

    def _stands_alone(self, rows_only: bool) -> bool:
        """Whether the change just executed has to be committed before another one comes."""
        if not rows_only or self._has_deferred is None:
            found = self._execute("SELECT 1 FROM sqlite_master WHERE sql LIKE '%deferr%' LIMIT 1")
            self._has_deferred = found.fetchone() is not None
        # A change of the schema may have had some for a while.
        return self._off or self._has_deferred or not rows_only

    def _commit(self) -> None:
        if self._connection.in_transaction:
            self._execute("COMMIT")

    def _named(self, change: Change, work: Callable[[Change], object]) -> None:
        """Do ``work``: what fails is the fault of ``change``, but for a full or broken disk."""
        self._connection.allow(confined.LIMIT_S)
        self._statement = ""
        try:
            work(change)
        except confined.ERRORS as error:
            reason = self._connection.reason(error)
            if isinstance(error, sqlite3.OperationalError) and reason in _OF_THE_DISK:
                raise DiskError(
                    self.path, OSError(_OF_THE_DISK[reason], reason), "write"
                ) from error
            raise DoesNotReplay(
                self.path, change.version, change.base, reason, self._statement
            ) from error

    def _execute_all(self, change: Change) -> bool:
        """The statements of ``change``, in the open transaction; whether they change rows only."""
        assert change.transaction is not None
        execute = self._execute
        rows_only = all(map(_changes_rows, change.transaction))
        self._connection.expect(rows_only)
        for self._statement in change.transaction:
            try:
                execute(self._statement)
            except sqlite3.OperationalError as error:
                # Only what failed before it did anything can be tried again.
                if not str(error).startswith("unrecognized token"):
                    raise
                mended = mend(self._statement)
                if mended == self._statement:
                    raise
                execute(mended)
            # What changes rows cannot end it without an error.
            if not rows_only and not self._connection.in_transaction:
                raise Refused("it ends the transaction that it is in")
        if len(change.payload) > LARGE_CHANGE:
            self._forget_statements()
        return rows_only

    def _forget_statements(self) -> None:
        """Push large statements out of the statement cache, or they fill the memory."""
        for number in range(CACHED_STATEMENTS):
            self._execute(f"SELECT {number}")

    def finish(self) -> int:
        """Close the database in the journal mode it had; its data_version."""
        try:
            with self._connection.explaining(self.path):
                self._commit()
                self._connection.allow(confined.READ_LIMIT_S)
                version = data_version(self._connection)
                self._connection.release()
                if self._connection.journal_mode == "wal":
                    self._execute("PRAGMA locking_mode = NORMAL")
                    self._execute("PRAGMA journal_mode = WAL")
                return version
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _temporary_files_beside(path: str) -> str:
    """The PRAGMA that makes SQLite sort beside ``path``, not in /var/tmp, in this process."""
    directory = os.path.dirname(os.path.realpath(path)).replace("'", "''")
    try:
        directory.encode()
    except UnicodeEncodeError:  # SQL is UTF-8: such a path cannot be named in it.
        return "temp_store = DEFAULT"
    return f"temp_store_directory = '{directory}'"


def check(path: str) -> list[str]:
    """What integrity_check and foreign_key_check say of ``path``: empty if it is sound."""
    return integrity_problems(path) + _foreign_key_problems(path)


def _foreign_key_problems(path: str) -> list[str]:
    try:
        with opened(path) as connection:
            rows = connection.execute("PRAGMA foreign_key_check").fetchmany(MAX_REPORTED)
    except DatabaseError as error:  # The schema itself may be one that it cannot check.
        return [f"foreign_key_check: {error}"]
    return [  # Names out of a backup.
        printable(f"foreign_key_check: row {row} of {table} points to no row of {parent}")
        for table, row, parent, _ in rows
    ]


def integrity_problems(path: str) -> list[str]:
    """What integrity_check says of ``path``: empty if it is sound."""
    try:
        with opened(path) as connection:
            rows = connection.execute(f"PRAGMA integrity_check({MAX_REPORTED})").fetchall()
    except DatabaseError as error:
        return [f"integrity_check: {error}"]
    return [printable(f"integrity_check: {text}") for (text,) in rows if text != "ok"]


def compare(
    left: str, right: str, first_name: str = "the first", second_name: str = "the second"
) -> list[str]:
    """How two databases differ, schema and rows, in words: empty if they are the same.

    Args:
        first_name: what ``left`` is called.
        second_name: what ``right`` is called.
    """
    sorting = _temporary_files_beside(left)
    with opened(left, settings=[sorting]) as first, opened(right) as second:
        for connection in first, second:
            connection.allow(math.inf)  # Reading tables ends; it takes as long as they are large.
            connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        differences = list(_compare_schema(first, second, first_name, second_name))
        for table in sorted(_tables(first) & _tables(second)):
            if len(differences) < MAX_REPORTED:
                walk = _TableWalk(first, second, table, first_name, second_name)
                differences += _compare_table(walk, first, second, table)
    return differences


def _compare_table(
    walk: _TableWalk, first: sqlite3.Connection, second: sqlite3.Connection, table: str
) -> list[str]:
    other_rowids = []
    with contextlib.suppress(sqlite3.OperationalError):  # Other columns, which is named already.
        if _same_rows(first, second, table):
            return []
        other_rowids = [f"table {table}: {OTHER_ROWIDS}"]
    return [*itertools.islice(walk.differences(), MAX_REPORTED)] or other_rowids


def _same_rows(first: sqlite3.Connection, second: sqlite3.Connection, table: str) -> bool:
    """Whether the rows and their rowids are the same, in the order that they are stored in."""
    query = rows_as_stored(first, table)
    one, two = first.execute(query), second.execute(query)
    return all(
        a == b and [*map(type, a)] == [*map(type, b)]
        for a, b in itertools.zip_longest(one, two, fillvalue=())
    )


def rows_as_stored(connection: sqlite3.Connection, table: str) -> str:
    """The query for all rows of ``table``, with their rowid, that needs no sorting."""
    info = connection.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
    columns = [f"{_quoted(table)}.{_quoted(column[1])}" for column in info]
    taken = {str(column[1]).lower() for column in info}
    for rowid in {"rowid", "_rowid_", "oid"} - taken:
        with contextlib.suppress(sqlite3.OperationalError):  # It is WITHOUT ROWID.
            query = f"SELECT {rowid}, {', '.join(columns)} FROM {_quoted(table)} ORDER BY {rowid}"
            connection.execute(f"EXPLAIN {query}").close()
            return query
    # By the primary key, and in its own collation.
    key = [place for _, place in sorted((column[5], column[0]) for column in info if column[5])]
    order = ", ".join(columns[place] for place in key or range(len(columns)))
    return f"SELECT {', '.join(columns)} FROM {_quoted(table)} ORDER BY {order}"


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
        self._connections = first, second

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
        try:
            first, second = map(self._sorted, self._connections)
        except sqlite3.OperationalError:  # Other columns: the schema's difference was named.
            return
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
