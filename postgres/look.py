"""What a backup in a cluster holds: by a look at its end, and record by record."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn, TypeVar

from backend import CHAIN_SIZE, MAX_CHUNK_SIZE, Ending, Reading, Step, chain_after, utc
from errors import BackupError, BackupMissing, Damaged, PlaceGone
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, FINAL, Head, Kind
from filelog.reader import Rewinds, effective
from postgres import schema
from postgres.cluster import Cluster, Unreachable
from postgres.link import Failed, Link, Row, Value
from remote.patience import Patience
from replica import Pause

T = TypeVar("T")
PAGE_ROWS = 4096
PAGE_BYTES = 4 << 20
"""Of one short transaction; and the record at its end may be larger."""
PAGE_PIECES = 4
PAUSE_S = 1.0
"""Between two looks at what came since, where somebody follows."""
MOST_RESTARTS = 10
"""How often a pass begins anew because a compaction took what it was about to read."""
_PAGE = f"""SELECT {schema.HEAD}, octet_length(payload), payload FROM (
    SELECT *, sum(octet_length(payload)) OVER (ORDER BY sequence) - octet_length(payload) AS before
    FROM (SELECT * FROM cln_backup.records WHERE backup = $1 AND sequence > $2
          ORDER BY sequence LIMIT {PAGE_ROWS}) page) counted
    WHERE before < {PAGE_BYTES} ORDER BY sequence"""
_PIECES = """SELECT number, digest, data FROM cln_backup.pieces
    WHERE snapshot = $1 AND number >= $2 AND number < $3 ORDER BY number"""
_HEADS = f"""SELECT {schema.HEAD}, octet_length(payload) FROM cln_backup.records
    WHERE backup = $1 ORDER BY sequence DESC LIMIT $2"""


class State(NamedTuple):
    """What a look at a backup's end tells.

    Attributes:
        number: see postgres/schema.py.
        snapshot: of its pieces; 0 without any.
        first: sequence of the record that it begins with.
        newest: head of its last record, with the sequence as it is there.
        position, changes: up to that one, since the backup began with its snapshot.
        began: both of them at the snapshot, over the life of the backup.
    """

    number: int
    backup_id: bytes
    snapshot: int
    snapshot_size: int
    first: int
    newest: Head
    position: int
    changes: int
    began: tuple[int, int]

    @property
    def log_size(self) -> int:
        """Bytes of the records behind the snapshot, as a file would have them."""
        return self.position

    @property
    def size(self) -> int:
        """Bytes in all, as a file would have them."""
        return layout2.log_start_of(self.snapshot_size) + self.position

    @property
    def version_count(self) -> int:
        """See Backend."""
        return self.changes + bool(self.snapshot_size)

    def beginning_as(self, other: State) -> State:
        """The same end, where a compaction has let the backup begin as ``other`` does."""
        position, changes = self.began
        return other._replace(
            newest=self.newest,
            position=self.position + position - other.began[0],
            changes=self.changes + changes - other.began[1],
        )


def look(link: Link, name: str, number: int = 0, url: str = "") -> State:
    """What the backup ``name``, or that of ``number``, holds.

    Raises:
        BackupMissing: there is none.
        Failed, BackupError.
    """
    schema.require(link, url)
    rows = link.run(schema.LOOK, name, number)
    if not rows:
        raise BackupMissing(url)
    return state_of(rows[0])


def state_of(row: Row) -> State:
    """A row of schema.LOOK."""
    number, identity, snapshot, size, first, changes, position, *rest = row
    assert isinstance(number, int) and isinstance(identity, bytes) and isinstance(snapshot, int)
    assert isinstance(size, int) and isinstance(first, int)
    assert isinstance(changes, int) and isinstance(position, int)
    newest, at, counted = head_of(tuple(rest), identity, bool(size))
    since = at - position, counted - changes
    return State(number, identity, snapshot, size, first, newest, *since, (position, changes))


def head_of(row: Row, identity: bytes, has_snapshot: bool) -> tuple[Head, int, int]:
    """The head of a record, with its ``position`` and ``changes``."""
    sequence, kind, flags, version, session, before, chain, changes, time_ns, position, size = row
    assert isinstance(sequence, int) and isinstance(kind, int) and isinstance(flags, int)
    assert isinstance(version, int) and isinstance(session, bytes) and isinstance(before, bytes)
    assert isinstance(chain, bytes) and isinstance(changes, int) and isinstance(time_ns, int)
    assert isinstance(position, int) and isinstance(size, int)
    head = Head(
        kind=kind,
        flags=flags,
        backup_id=identity,
        sequence=sequence,
        version=version,
        time_ns=time_ns,
        session=session,
        length=size,
        chain_before=before,
        chain=chain,
    )
    if kind == Kind.SNAPSHOT and not has_snapshot:
        head = BEFORE_FIRST._replace(
            backup_id=identity, sequence=sequence, session=session, length=size
        )
    return head, position, changes


def newest_heads(link: Link, state: State, count: int) -> list[Head]:
    """The last ``count`` records, the newest first."""
    rows = link.run(_HEADS, state.number, count)
    return [head_of(row, state.backup_id, bool(state.snapshot_size))[0] for row in rows]


def owner_payload(link: Link, number: int) -> bytes:
    """The payload of the newest owner record of a backup, b"" if there is none."""
    rows = link.run(schema.OWNER, number)
    return rows[0][0] if rows and isinstance(rows[0][0], bytes) else b""


def taken_over_by(payload: bytes) -> str:
    """When and by which machine a backup was taken over, in words; "" if never."""
    if not payload:
        return ""
    time_ns, machine = layout2.decode_owner(payload)
    return f"{machine} took it over at {utc(time_ns)}"


class Superseded(BackupError):
    """A compaction took what a pass was about to read."""

    def __init__(self) -> None:
        super().__init__("The backup was compacted while it was read.", "Try again.")


class Records:
    """The records of a backup in order, checked like those of a file, in short transactions.

    Args:
        cluster: where it is.
        backup_url: for messages.

    Attributes:
        state: of the backup when the pass began.
        last: the last record seen, or None.
        position, total: as bytes of a file, up to that, and in all.

    Raises:
        BackupError: there is no such backup, or it cannot be read.
    """

    def __init__(self, cluster: Cluster, backup_url: str) -> None:
        self._cluster = cluster
        self._url = backup_url
        self._link: Link | None = None
        self.last: Head | None = None
        try:
            self.state = self._asked(lambda link: look(link, cluster.url.backup, url=backup_url))
        except BaseException:
            self.close()
            raise

    def _asked(self, ask: Callable[[Link], T]) -> T:
        """What ``ask`` returns, on another connection if one is lost meanwhile."""
        patience = Patience(self._cluster.url)
        while True:
            try:
                if self._link is None:
                    self._link = self._cluster.reader(patience.still_s)
                return ask(self._link)
            except Failed as error:
                self.close()
                pause_s = patience.pause()
                if pause_s is None:
                    raise Unreachable(error) from error
            time.sleep(pause_s)

    def _rows(self, sql: str, *params: Value) -> list[Row]:
        return self._asked(lambda link: link.run(sql, *params))

    def _page(self, sequence: int) -> Callable[[], list[Row]]:
        """Ask for the records behind ``sequence``: what is called for them."""
        asked, link = (_PAGE, self.state.number, sequence), self._link
        if link is None:
            return lambda: self._rows(*asked)
        try:
            link.ask(*asked)
        except Failed:
            self.close()

        def rows() -> list[Row]:
            if link is self._link:
                with contextlib.suppress(Failed):
                    return link.answer()
                self.close()
            return self._rows(*asked)

        return rows

    @property
    def position(self) -> int:
        """Bytes up to the last record seen, as a file has them."""
        return self.last.end if self.last is not None else layout2.FIRST_RECORD

    def begin_anew(self) -> None:
        """Go on with what a compaction made."""
        number = self.state.number
        self.state = self._asked(lambda link: look(link, "", number, self._url))
        self.last = None

    def __iter__(self) -> Iterator[tuple[Head, bytes]]:
        state = self.state
        log_start = layout2.log_start_of(state.snapshot_size)
        yield from self._snapshot()
        sequence = state.first
        page = self._page(sequence)
        while rows := page():
            last = rows[-1][0]
            assert isinstance(last, int)
            page = self._page(last)  # On its way while this one is taken apart.
            for row in rows:
                head, _, _ = head_of(row[:-1], state.backup_id, True)
                if not _is_next(head, sequence):
                    self._missing(f"record {sequence + 1} is missing")
                sequence, payload = head.sequence, row[-1]
                assert isinstance(payload, bytes)
                yield self._checked(head, payload, log_start)

    def following(self, after: Head | None) -> Iterator[tuple[Head, bytes] | Pause]:
        """All that comes behind ``after``: see replica.Followable.follow."""
        try:
            if after is None:
                yield from self
            else:
                self.last = after._replace(sequence=self._place_of(after))
            sequence = self.last.sequence if self.last is not None else self.state.first
            while True:
                rows = self._rows(_PAGE, self.state.number, sequence)
                for row in rows:
                    head, _, _ = head_of(row[:-1], self.state.backup_id, True)
                    if not _is_next(head, sequence):
                        self._missing(f"record {sequence + 1} is missing")
                    sequence, payload = head.sequence, row[-1]
                    assert isinstance(payload, bytes)
                    yield self._checked(head, payload, layout2.FIRST_RECORD)
                if not rows:
                    yield Pause(self._url, self.last)
                    time.sleep(PAUSE_S)
        except Superseded as error:
            version = self.last.version if self.last is not None else 0
            raise PlaceGone(self._url, version) from error

    def _place_of(self, after: Head) -> int:
        """The sequence that ``after`` has here; PlaceGone if it is not there."""
        rows = self._rows(
            "SELECT sequence FROM cln_backup.records WHERE backup = $1 AND chain = $2"
            " AND (sequence = $3 OR $4) ORDER BY sequence DESC LIMIT 1",
            *(self.state.number, after.chain, after.sequence),
            after.backup_id != self.state.backup_id,
        )
        whole = after.kind != Kind.SNAPSHOT or after.flags & FINAL
        if not rows or not whole or not isinstance(rows[0][0], int):
            raise PlaceGone(self._url, after.version)
        return rows[0][0]

    def _snapshot(self) -> Iterator[tuple[Head, bytes]]:
        state, done, base = self.state, 0, self._base()
        count = -(-state.snapshot_size // MAX_CHUNK_SIZE)
        while done < count:
            rows = self._rows(_PIECES, state.snapshot, done, done + PAGE_PIECES)
            if not rows:
                self._missing(f"piece {done} of the snapshot is missing")
            for number, digest, data in rows:
                assert isinstance(data, bytes)
                if number != done or digest != digest_of(data):
                    raise self.as_damage(f"piece {done} of the snapshot does not check")
                done += 1
                piece = base._replace(length=len(data), flags=FINAL if done == count else 0)
                yield self._checked(piece, data, layout2.log_start_of(state.snapshot_size))

    def _base(self) -> Head:
        state = self.state
        rows = self._rows(
            f"SELECT {schema.HEAD}, octet_length(payload) FROM cln_backup.records"
            " WHERE backup = $1 AND sequence = $2",
            state.number,
            state.first,
        )
        if not rows:
            self._missing("its first record is missing")
        base, _, _ = head_of(rows[0], state.backup_id, True)
        if base.kind != Kind.SNAPSHOT:
            raise self.as_damage("it does not begin with a snapshot")
        return base

    def folded_owner(self) -> bytes:
        """The payload of the owner record that the snapshot stands for, too; b"" if none."""
        asked = "SELECT payload FROM cln_backup.records WHERE backup = $1 AND sequence = $2"
        rows = self._rows(asked, self.state.number, self.state.first)
        return rows[0][0] if rows and isinstance(rows[0][0], bytes) else b""

    def _missing(self, reason: str) -> NoReturn:
        """Why a row is not there: a compaction, or damage."""
        self.close()  # A page may be on its way.
        number = self.state.number
        now = self._asked(lambda link: look(link, "", number, self._url))
        if (now.snapshot, now.first) != (self.state.snapshot, self.state.first):
            raise Superseded
        raise self.as_damage(reason)

    def _checked(self, head: Head, payload: bytes, log_start: int) -> tuple[Head, bytes]:
        state = self.state
        last = self.last or BEFORE_FIRST._replace(backup_id=state.backup_id, sequence=state.first)
        if head.kind == Kind.SNAPSHOT:
            head = head._replace(offset=last.end)
            problem = layout2.follows(self.last, head, log_start)
        else:
            head = layout2.moved(head, last)
            problem = layout2.follows(last, head, log_start)
        if head.kind == Kind.CHANGE and not problem:
            chain = chain_after(head.chain_before, head.version, payload)
            problem = "" if chain == head.chain else "its content does not match its chain"
        if problem:
            raise self.as_damage(problem)
        self.last = head
        return head, payload

    def as_damage(self, reason: str) -> Damaged:
        """The error that names damage behind the last record seen, and the versions there."""
        good, newest = self.last.version if self.last else 0, self.state.newest.version
        lost = "and whether a later one is lost cannot be told"
        if newest > good:
            lost = f"versions {good + 1} to {newest} stand behind the damage"
        return Damaged(self._url, self.position, reason, good, lost, newest)

    def close(self) -> None:
        """End the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None


def _is_next(head: Head, sequence: int) -> bool:
    """Whether ``head`` is the record behind that of ``sequence``, and no compaction's base."""
    return head.sequence == sequence + 1 and head.kind != Kind.SNAPSHOT


def digest_of(data: bytes) -> bytes:
    """What is stored beside a piece of a snapshot."""
    return hashlib.blake2b(data, digest_size=CHAIN_SIZE).digest()


class PostgresReading(Reading):
    """A pass over a backup in a cluster (see Reading)."""

    def __init__(self, cluster: Cluster, backup_url: str) -> None:
        self._records = Records(cluster, backup_url)
        self._rewinds = Rewinds()
        self._damage: BackupError | None = None

    def __iter__(self) -> Iterator[Step]:
        records, restarts = self._records, 0
        expected = records.state.newest
        while True:
            self._rewinds = Rewinds()
            try:
                yield from self._steps()
            except Superseded as error:
                restarts += 1
                if restarts <= MOST_RESTARTS:
                    records.begin_anew()
                    continue
                self._damage = error
            except BackupError as error:
                self._damage = error
            break
        last, damage = records.last or BEFORE_FIRST, self._damage
        if damage is None and last.version < expected.version - expected.rewindable:
            damage = records.as_damage("it ends before the version that it was at")
        last_ns = last.time_ns if records.last else None
        ending = Ending(last.version, last_ns, damage=damage, notes=self._rewinds.notes())
        end = records.position
        records.close()
        yield Step(ending, end, max(end, records.state.size) if damage else end)

    def _steps(self) -> Iterator[Step]:
        records = self._records
        size = records.state.snapshot_size
        for head, found in effective(self._rewinds.seen(self._sound()), size):
            yield Step(found, head.end, max(records.state.size, head.end))

    def _sound(self) -> Iterator[tuple[Head, bytes]]:
        """The records before damage, all of which count."""
        try:
            yield from self._records
        except Superseded:
            raise
        except BackupError as error:
            self._damage = error

    def close(self) -> None:
        """See Reading."""
        self._records.close()
