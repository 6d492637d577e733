"""SQLite connections for what came out of a backup: kept to their own file and to a time.

Statements, schemas and pages of a backup may have been written by somebody else. SQLite
executes them, so every connection of this project is opened here, and an authorizer refuses
what leads out of the database (ATTACH, which VACUUM INTO uses as well, extensions, PRAGMAs),
what no node's database has (virtual tables, views, things of TEMP) and what takes too long.
Statements that only change rows need no authorizer, which takes an eighth of a replay's time:
see ``Confined.expect``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import unwind
from backend import MAX_CHANGE_SIZE
from errors import DatabaseError

READ_LIMIT_S = 60.0
"""Processor time for opening a database and reading its data_version."""
LIMIT_S = 3600.0
"""Processor time for one change, or one check of a whole database. The longest change of a node,
a migration of 256 MiB of SQL, takes some seconds; a DROP TABLE that looks for rows of other tables
without an index takes as long here as on the node, which nobody waits an hour for."""
PROGRESS_STEP = 1000
"""Steps of SQLite's virtual machine between two looks at the time and for Ctrl-C."""
GRACE_S = 3.0
"""How long a signal may take to end a command the usual way."""
READING = frozenset({"foreign_key_check", "integrity_check", "table_info"})
REPLAYING = frozenset({"foreign_keys", "quick_check", "table_info"})
"""PRAGMAs of a replay. SQLite itself uses quick_check inside ALTER TABLE."""

# Action codes of sqlite3_set_authorizer; Python 3.10 has names for a part of them only.
_PRAGMA, _TRANSACTION, _FUNCTION = 19, 22, 31
_OK = sqlite3.SQLITE_OK
_HARMLESS = frozenset(
    {
        *(10, 11, 16),  # DROP INDEX, TABLE, TRIGGER
        *(9, 18, 20, 21, 23),  # DELETE, INSERT, READ, SELECT, UPDATE
        *(22, 26, 27, 28, 33),  # TRANSACTION, ALTER TABLE, REINDEX, ANALYZE, RECURSIVE
    }
)
_CREATING = frozenset({1, 2, 7})  # CREATE INDEX, TABLE, TRIGGER
# Refuse the functions that reach out, not all that are unknown: a later lightningd may use
# those, and its backup has to restore.
_DANGEROUS = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"})
# What others do is not known: `bytecode` prepares any text that it is given.
_PLAIN_MODULES = frozenset(
    {
        *("dbstat", "json_each", "json_tree", "jsonb_each", "jsonb_tree", "sqlite_stmt"),
        *("fts3", "fts3tokenize", "fts4", "fts4aux", "fts5", "fts5vocab", "rtree", "rtree_i32"),
        "geopoly",
    }
)
"""Modules of SQLite that lead nowhere; no table is of one, see ``check_schema``."""
_WORDS = MappingProxyType(
    {
        **dict.fromkeys((1, 3), "makes a temporary index"),
        **dict.fromkeys((2, 4), "makes a temporary table"),
        **dict.fromkeys((5, 7), "makes a temporary trigger"),
        **{6: "makes a temporary view", 8: "makes a view"},
        **{24: "attaches another file", 25: "detaches a file", 29: "makes a virtual table"},
        **{30: "drops a virtual table", 32: "sets a savepoint"},
    }
)
_LIMITS = MappingProxyType(
    {
        0: 2 * MAX_CHANGE_SIZE,  # LENGTH, of a value or a row
        1: MAX_CHANGE_SIZE + 1024,  # SQL_LENGTH; database.mend adds some bytes
        3: 1000,  # EXPR_DEPTH, what the node's own SQLite has, and
        4: 500,  # COMPOUND_SELECT likewise
        5: 10_000_000,  # VDBE_OP: of a program, 24 bytes each
        7: 0,  # ATTACHED
        8: 1000,  # LIKE_PATTERN_LENGTH: matching is one step for the progress handler
        10: 100,  # TRIGGER_DEPTH, of cascades, too
    }
)
_SETTINGS = ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0")
_BEGINNINGS = MappingProxyType(
    {
        "table": ("CREATE TABLE ",),
        "index": ("CREATE INDEX ", "CREATE UNIQUE INDEX "),
        "trigger": ("CREATE TRIGGER ",),
        "view": ("CREATE VIEW ",),
    }
)
"""How SQLite itself writes the definition of each kind of thing into a schema."""


# Python cannot always decode what SQLite says: it quotes a damaged schema as it is.
ERRORS = (sqlite3.Error, sqlite3.Warning, MemoryError, UnicodeDecodeError)
"""What a statement may end with."""


class Refused(sqlite3.DatabaseError):
    """Not SQLite's refusal but ours; the text is the whole reason."""


class Confined(sqlite3.Connection):
    """A connection that does only what a replay or a check needs. ``connect`` makes it."""

    refused = ""
    """Why the authorizer or the time limit stopped a statement."""
    pragmas: frozenset[str] = READING
    journal_mode = ""
    """The one that the file had."""
    in_change = False
    """A change is executed that shares its transaction with others."""
    _released = False
    _asks, _may_spare = True, False
    """Whether the authorizer is asked, and whether what changes rows can do without it."""
    _deadline, _limit_s = math.inf, math.inf

    def confine(self, pragmas: frozenset[str]) -> None:
        """From now on nothing leads out of the file, and only these PRAGMAs are executed."""
        self.pragmas = pragmas
        closed_otherwise = self._closed_otherwise()
        if sys.version_info >= (3, 11):
            for category, most in _LIMITS.items():
                self.setlimit(category, min(most, 2**31 - 1))
            self._may_spare = closed_otherwise  # Python 3.10 refuses everything in its place.
        self.set_authorizer(self._authorize)
        self.set_progress_handler(self._look, PROGRESS_STEP)

    def _closed_otherwise(self) -> bool:
        """Replace ``_DANGEROUS``; whether changing rows leads nowhere then, by itself."""
        if sqlite3.sqlite_version_info < (3, 31):  # It has no trusted_schema.
            return False
        functions = self.execute("PRAGMA function_list").fetchall()
        for name, _builtin, _type, _encoding, arguments, _flags in functions:
            if name.lower() in _DANGEROUS:
                self.create_function(name, arguments, functools.partial(self._refuse_call, name))
        modules = {name for (name,) in self.execute("PRAGMA module_list")}
        return bool(functions) and modules <= _PLAIN_MODULES

    def _refuse_call(self, name: str, *_arguments: object) -> None:
        self.refused = f"it calls {name}, which is never part of a backup"
        raise Refused(self.refused)

    def expect(self, rows_only: bool) -> None:
        """Say what the next statements are: the authorizer is not asked where it need not be.

        It is asked, in Python, for each table, column and function that a statement names. In an
        INSERT, UPDATE or DELETE and the triggers that it fires, SQLite's grammar has nothing that
        it refuses, but for functions, and those are replaced. Or a module would have to prepare
        another statement: those that are there do so only for PRAGMAs as tables, which just read.

        Args:
            rows_only: each of them begins with INSERT, UPDATE or DELETE.
        """
        asks = not (rows_only and self._may_spare)
        if asks != self._asks:
            # With it, SQLite prepares again what it prepared without.
            self.set_authorizer(self._authorize if asks else None)
            self._asks = asks

    def release(self) -> None:
        """No statement of a backup follows: PRAGMAs of our own may."""
        self._released = True

    def allow(self, limit_s: float) -> None:
        """Give what follows ``limit_s`` seconds of this thread's processor time."""
        self._limit_s, self._deadline = limit_s, time.thread_time() + limit_s

    def _authorize(self, action: int, first: Any, second: Any, where: Any, _by: Any) -> int:
        if action == _TRANSACTION and self.in_change:
            self.refused = "it begins or ends a transaction"
            return sqlite3.SQLITE_DENY
        if action in _HARMLESS or self._released:
            return _OK
        if action in _CREATING and where != "temp":
            return _OK
        if action == _FUNCTION and str(second).lower() not in _DANGEROUS:
            return _OK
        if action == _PRAGMA and str(first).lower() in self.pragmas:
            return _OK
        self.refused = "it " + _WORDS.get(action, f"does what has the number {action}")
        if action == _FUNCTION:
            self.refused = f"it calls {second}"
        elif action == _PRAGMA:
            self.refused = f"it sets or asks for PRAGMA {first}"
        self.refused += ", which is never part of a backup"
        return sqlite3.SQLITE_DENY

    def _look(self) -> int:
        if time.thread_time() <= self._deadline:
            return 0
        self.refused = f"it takes more than {self._limit_s:g} seconds of processor time"
        return 1

    def reason(self, error: Exception) -> str:
        """Why ``error`` came, in words without a full stop.

        Raises:
            SystemExit: Ctrl-C or another signal stopped the statement.
        """
        refused, self.refused = self.refused, ""
        # An exception of a signal handler inside our two callbacks stops SQLite but is lost.
        if not refused and str(error).endswith(("interrupted", "not authorized", "prohibited")):
            raise SystemExit(unwind.exit_code(130)) from error
        if isinstance(error, UnicodeDecodeError):
            return refused or error.object.decode("utf-8", "replace")
        # What sqlite3 makes of SQLITE_NOMEM, which is also the answer to a program over VDBE_OP.
        if isinstance(error, MemoryError):
            return refused or "no memory"
        # Python 3.10 gives no text that is not UTF-8.
        return refused or str(error) or "something that is no text"

    @contextlib.contextmanager
    def explaining(self, path: str) -> Iterator[None]:
        """What a statement ends with leaves as the DatabaseError of ``path``."""
        try:
            yield
        except ERRORS as error:
            says = "" if self.refused or isinstance(error, Refused) else "SQLite says: "
            raise DatabaseError(path, says + self.reason(error)) from error

    def check_schema(self) -> None:
        """Refuse virtual tables, and a definition of something else than its row says."""
        for kind, name, sql in self.execute("SELECT type, name, sql FROM sqlite_master"):
            if sql is None and kind == "index":
                continue  # What a UNIQUE or PRIMARY KEY made.
            if not str(sql).startswith(_BEGINNINGS.get(kind, ())):
                raise Refused(
                    f"its {kind!s:.20} {name!s:.40} is {str(sql)[:60]!r}, as in no node's database"
                )


def connect(
    path: str,
    mode: str,
    pragmas: frozenset[str] = READING,
    settings: Sequence[str] = (),
    cached_statements: int = 16,
) -> Confined:
    """A confined connection to the database ``path``.

    Args:
        mode: "rw", so that SQLite can roll a hot journal back, "ro", or "rwc" to create it.
        pragmas: names of the PRAGMAs that it may execute.
        settings: PRAGMAs that it begins with.

    Raises:
        DatabaseError: it is no database, or one that no node has.
    """
    uri = f"file:{quote(os.fsencode(path))}?mode={mode}"
    try:
        connection = sqlite3.connect(
            uri,
            uri=True,
            isolation_level=None,
            cached_statements=cached_statements,
            factory=Confined,
        )
    except sqlite3.Error as error:
        raise DatabaseError(path, f"SQLite says: {error}") from error
    try:
        with connection.explaining(path):
            (connection.journal_mode,) = connection.execute("PRAGMA journal_mode").fetchone()
            for setting in (*_SETTINGS, *settings):
                connection.execute(f"PRAGMA {setting}")
            connection.confine(pragmas)
            connection.allow(READ_LIMIT_S)
            connection.check_schema()
            connection.allow(LIMIT_S)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def ending_on_signals(remove: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C end what runs meanwhile even in a step of SQLite that does not end.

    The progress handler and Python's own signal handlers run between two steps only, and one
    alone, instr() of two large values say, can take days.

    Args:
        remove: discards the scratch files. Where the main thread has not ended GRACE_S after
            a signal, another one calls it and ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        number = reader.recv(1)  # Nothing once the other end is closed.
        if number and not ended.wait(GRACE_S):
            remove()
            os.write(2, f"Stopped by {signal.Signals(number[0]).name}.\n".encode())
            os._exit(128 + number[0])

    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        reader.close()
