"""One connection to a PostgreSQL server all of whose calls end, and a commit that is one.

psycopg connects; statements go by libpq's own calls (psycopg.pq), so that each wait has a limit
and a change is one round trip.
"""

from __future__ import annotations

import select
import struct
import time
from collections.abc import Callable, Mapping, Sequence

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo

from errors import BackupError, printable

Value = int | bytes | str | bool | None
Row = tuple[Value, ...]

CONNECT_TIMEOUT_S = 10
QUERY_TIMEOUT_S = 60.0
"""A statement that waits for nobody but the server."""
KEEPALIVE: Mapping[str, str | int] = {
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20000,
}
"""A machine that is gone is noticed while it is waited for."""
WATCHED_STATEMENT = "watched"
NAMES = "pg_catalog.current_setting('synchronous_standby_names')"
WATCHED = f"""SELECT {NAMES}, pg_catalog.pg_conf_load_time()::text,
    pg_catalog.current_setting('synchronous_commit'), pg_catalog.pg_backend_pid()"""
"""What stays the same while a commit waits as it has to. The time as well: names that are emptied
and set again let it go on. The process: behind a pooler the next statement may meet another."""
_HARMLESS = (b"NOTICE", b"DEBUG", b"INFO", b"LOG")
_TRANSIENT = ("08", "25", "40", "53", "55", "57", "58", "XX", "F0")
"""Classes of SQLSTATE after which another try, or another host, may do. 25 is read-only."""
_OIDS = {bool: 16, bytes: 17, int: 20, str: 25}
_FAILED = (pq.ExecStatus.FATAL_ERROR, pq.ExecStatus.BAD_RESPONSE, pq.ExecStatus.PIPELINE_ABORTED)


class Failed(OSError):
    """The connection is lost, or the server could not do it now; what it did is not known."""


class NotConfirmed(Failed):
    """The server has committed, but not as it has to: a standby may not have it."""


class Denied(BackupError):
    """The server will not do it, however often it is asked.

    Attributes:
        sqlstate: why, by PostgreSQL's table of error codes.
    """

    def __init__(self, problem: str, sqlstate: str, next_step: str = "") -> None:
        self.sqlstate = sqlstate
        super().__init__(problem, next_step)


class Link:
    """A connection to one host.

    Args:
        options: libpq's parameters.

    Attributes:
        watched: what WATCHED has to be behind each commit, None: anything.

    Raises:
        Failed: nobody answers, or not as wanted.
    """

    def __init__(self, options: Mapping[str, str | int], timeout_s: float) -> None:
        limit = max(2, min(CONNECT_TIMEOUT_S, int(timeout_s)))
        chosen = {**KEEPALIVE, "connect_timeout": limit, **options}
        try:
            self._connection = psycopg.connect(make_conninfo("", **chosen), autocommit=True)
        except (psycopg.Error, OSError) as error:
            raise Failed(printable(str(error))) from error
        self._warning = ""
        self._connection.add_notice_handler(self._hear)
        self._pg = self._connection.pgconn
        self._poll = select.poll()
        self.watched: Row | None = None
        self._knows_watched = False

    def _hear(self, notice: psycopg.errors.Diagnostic) -> None:
        severity = (notice.severity_nonlocalized or notice.severity or "").encode()
        if severity not in _HARMLESS and not self._warning:
            self._warning = notice.message_primary or "a warning without a text"

    @property
    def server(self) -> int:
        """The server's version, as 150018."""
        return self._pg.server_version

    def close(self) -> None:
        """End it."""
        self._connection.close()

    # Statements

    def run(self, sql: str, *params: Value, timeout_s: float = QUERY_TIMEOUT_S) -> list[Row]:
        """The rows of one statement, a transaction of its own unless one has begun.

        Args:
            sql: with $1 and so on in place of ``params``.

        Raises:
            Failed, Denied.
        """
        self.ask(sql, *params)
        return self.answer(timeout_s)

    def ask(self, sql: str, *params: Value) -> None:
        """Send a statement; ``answer`` has what it brings, and must be the next call."""
        with _Broken():
            self._pg.send_query_params(sql.encode(), *_sent(params), result_format=1)
            self._pg.flush()

    def answer(self, timeout_s: float = QUERY_TIMEOUT_S) -> list[Row]:
        """The rows of the statement that was sent: see ``run``."""
        with _Broken():
            return self._last(self._results(time.monotonic() + timeout_s))

    def prepare(self, name: str, sql: str, oids: Sequence[int]) -> None:
        """Let the server know ``sql`` by ``name``, for ``confirmed``."""
        with _Broken():
            self._pg.send_prepare(name.encode(), sql.encode(), oids)
            self._last(self._results(time.monotonic() + QUERY_TIMEOUT_S))

    def confirmed(
        self, sql: str, *params: Value, timeout_s: float, prepared: bool = False
    ) -> list[Row]:
        """``run`` of a statement that commits: on return all its standbys have it.

        Whether the settings are those of before is asked behind the commit, in the same round
        trip: when the names are emptied, whoever waits for a standby goes on without a word.

        Args:
            prepared: ``sql`` is the name of a statement.

        Raises:
            NotConfirmed: it may be committed on that server alone. After an error the connection
                is closed.
        """
        if not self._knows_watched:
            self.prepare(WATCHED_STATEMENT, WATCHED, ())
            self._knows_watched = True
        try:
            return self._confirmed(sql, params, time.monotonic() + timeout_s, prepared)
        except BaseException:
            self.close()  # What else it has to say is not waited for.
            raise

    def _confirmed(
        self, sql: str, params: Sequence[Value], deadline: float, prepared: bool
    ) -> list[Row]:
        self._warning, pg = "", self._pg
        with _Broken():
            pg.enter_pipeline_mode()
            values, oids, formats = _sent(params)
            if prepared:
                pg.send_query_prepared(sql.encode(), values, formats, result_format=1)
            else:
                pg.send_query_params(sql.encode(), values, oids, formats, result_format=1)
            pg.pipeline_sync()
            pg.send_query_prepared(WATCHED_STATEMENT.encode(), None, result_format=1)
            pg.pipeline_sync()
            rows = self._last(self._results(deadline, synced=True))
            now = self._last(self._results(deadline, synced=True))[0]
            pg.exit_pipeline_mode()
        if self._warning:
            raise NotConfirmed(f"it committed with a warning: {self._warning}")
        if self.watched is not None and now != self.watched:
            raise NotConfirmed(
                "the server has loaded its settings anew, or another process of it answers"
                f" (synchronous_standby_names was {self.watched[0]!r}, and is {now[0]!r})"
            )
        return rows

    def _results(self, deadline: float, synced: bool = False) -> list[pq.abc.PGresult]:
        """What a statement brought; ``synced``: up to the end of its part of the pipeline."""
        pg, found = self._pg, list[pq.abc.PGresult]()
        # With much to send the server may have to say something first.
        while pg.flush():
            self._wait(deadline, select.POLLIN | select.POLLOUT)
        while True:
            while pg.is_busy():
                self._wait(deadline, select.POLLIN)
            result = pg.get_result()
            if result is None:
                if not synced:
                    return found
            elif result.status == pq.ExecStatus.PIPELINE_SYNC:
                return found
            else:
                found.append(result)

    def _wait(self, deadline: float, events: int) -> None:
        left_s = deadline - time.monotonic()
        self._poll.register(self._pg.socket, events)
        ready = self._poll.poll(1000 * left_s) if left_s > 0 else []
        if not ready:
            raise Failed("it did not answer in time")
        if ready[0][1] & ~select.POLLOUT:
            self._pg.consume_input()

    def _last(self, results: Sequence[pq.abc.PGresult]) -> list[Row]:
        for result in results:
            if result.status in _FAILED:
                raise self._failure(result)
        if not results:
            raise Failed("the connection is lost")
        return _rows(results[-1])

    def _failure(self, result: pq.abc.PGresult) -> Failed | Denied:
        state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        primary = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY)
        text = printable((primary or result.error_message or b"").decode(errors="replace"))
        if not state or state.startswith(_TRANSIENT):
            return Failed(text or "the connection is lost")
        return Denied(f"The server says: {text}.", state)


class _Broken:
    """What libpq raises of a connection that is lost is a Failed."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, psycopg.Error):
            raise Failed(printable(str(error)) or "the connection is lost") from error


def _sent(
    params: Sequence[Value],
) -> tuple[list[bytes | None] | None, list[int] | None, list[int] | None]:
    """Values, types and formats as libpq takes them."""
    if not params:
        return None, None, None
    values = [_encoded(value) for value in params]
    oids = [_oid(value) for value in params]
    return values, oids, [1] * len(values)


def _oid(value: Value) -> int:
    return next((oid for kind, oid in _OIDS.items() if isinstance(value, kind)), 0)


def _encoded(value: Value) -> bytes | None:
    if isinstance(value, bool):
        return b"\1" if value else b"\0"
    if isinstance(value, int):
        return struct.pack(">q", value)
    return value.encode() if isinstance(value, str) else value


def _rows(result: pq.abc.PGresult) -> list[Row]:
    get, columns = result.get_value, range(result.nfields)
    kinds = [_DECODERS.get(result.ftype(column), bytes.decode) for column in columns]
    return [
        tuple(
            [
                None if (data := get(row, column)) is None else decode(data)
                for column, decode in enumerate(kinds)
            ]
        )
        for row in range(result.ntuples)
    ]


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


_DECODERS: Mapping[int, Callable[[bytes], Value]] = {
    **dict.fromkeys((20, 21, 23), _signed),
    _OIDS[bool]: lambda data: data == b"\1",
    _OIDS[bytes]: bytes,
}
"""By the type of a column; all others are text."""
