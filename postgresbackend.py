"""A backup in a PostgreSQL cluster: ``postgresql://user@host1,host2/dbname?backup=NAME``."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence

from backend import NOBODY, Change, Reading, Snapshot, Status, outcome
from errors import BackupError, BackupExists, BackupMissing
from filelog import layout2
from filelog.layout2 import Head, Kind
from postgres import building, checks, look, schema
from postgres.cluster import Cluster, Unreachable
from postgres.delivery import Delivery
from postgres.link import Denied, Failed, Link
from postgres.look import PostgresReading, Records, State
from protocol import OVERRIDE
from quorum import Roster
from replica import Look, Pause, Record, Replica

TRY_S = 10.0
"""What a command waits for a host to answer; it does not try again."""


class PostgresBackend(Replica):
    """A destination ``postgresql://...``, without the work beside the node.

    Args:
        url: see postgres/url.py; ConfigError if it is not of that form.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._cluster = Cluster(url)
        self._name = self._cluster.url.backup
        self._delivery = Delivery(self._cluster, url, self._note)
        self.medium = "the PostgreSQL cluster and its standby"

    # One request on a connection of its own

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Link]:
        """A connection to whom changes may be sent; the writer's own if that is open."""
        if self._delivery.known is not None:
            yield self._delivery.link
            return
        with self._once(self._cluster.writer) as link:
            yield link

    @contextlib.contextmanager
    def _once(self, connect: Callable[[float], Link]) -> Iterator[Link]:
        try:
            link = connect(TRY_S)
            with contextlib.closing(link):
                yield link
        except Failed as error:
            raise Unreachable(error) from error
        except Denied as error:
            raise schema.denied(error) from error

    def _state(self, link: Link) -> State:
        return look.look(link, self._name, url=self.url)

    def require_absent(self) -> None:
        """See Backend."""
        self._cluster.url.require_writable()
        with self._once(self._cluster.writer) as link, contextlib.suppress(BackupMissing):
            version = self._state(link).newest.version
            raise BackupExists(f"The backup {self._name} in that database, at version {version},")

    def create(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, changes: Sequence[Change] = ()
    ) -> None:
        """See Backend. It makes the tables, too, where there are none."""
        self._cluster.url.require_writable()
        with self._once(self._cluster.writer) as link:
            building.create(link, self._name, self.url, snapshot, owner)
        if changes:
            with contextlib.closing(self):
                self.open()
                for change in changes:
                    self.add_change(change)

    def replace(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, *, override: bool = False
    ) -> str | None:
        """See Backend. It takes any state, whosever it was: it is on the caller to compare."""
        known = self._delivery.known
        with self._writing() as link:
            old = known or self._state(link)
            kept = building.replace(link, self._name, old, snapshot, owner)
            if known is not None:
                self._delivery.go_on_with(self._state(link))
        return f"as backup={kept} in the same database"

    def status(self, check: bool = False) -> Status:
        """See Backend. What keeps the cluster from taking changes is a warning.

        Raises:
            Unreachable, BackupMissing, Denied.
        """
        with self._once(self._cluster.reader) as link:
            state = self._state(link)
            payload = look.owner_payload(link, state.number)
            _, wrong = checks.ask(link, self._cluster.url.standbys)
            server = link.server
        newest = state.newest
        found = Status(
            url=self.url,
            layout=f"PostgreSQL {server // 10000}.{server % 10000}, tables {schema.VERSION}",
            version=newest.version,
            prev_version=newest.version - 1 if newest.rewindable else None,
            version_count=state.version_count,
            backup_id=state.backup_id.hex(),
            changes=state.changes,
            snapshot_size=state.snapshot_size,
            size=state.size,
            last_change_ns=newest.time_ns if newest.kind else None,
            owner=newest.tag.hex(),
        )
        found.note_list(layout2.decode_roster(payload))
        found.warnings += [f"The node's changes would not be taken: {text}." for text in wrong]
        if check:
            found.checked = True
            with contextlib.closing(PostgresReading(self._cluster, self.url)) as reading:
                found.damage = _damage_of(reading)
        return found

    # One of several

    def look(self) -> Look:
        """See Replica."""
        with self._once(self._cluster.reader) as link:
            state = self._state(link)
        return Look(state.backup_id, state.newest, state.version_count)

    def roster(self) -> Roster | None:
        """See Replica."""
        with self._once(self._cluster.reader) as link:
            state = self._state(link)
            return layout2.decode_roster(look.owner_payload(link, state.number))

    @property
    def newest(self) -> Head:
        """See Replica."""
        return self._known.newest

    def add_record(self, head: Head, payload: bytes) -> None:
        """See Replica."""
        if head.flags & OVERRIDE:  # Open it again to know behind what.
            with self._writing() as link:
                return building.take_over(link, self._name, self.url, head.session, payload)
        self._delivery.session = head.session
        self._delivery.deliver(head, payload)

    @contextlib.contextmanager
    def records(self) -> Iterator[Iterator[Record]]:
        """See Replica."""
        with self.passing() as found:
            yield _with_owner(found)

    @contextlib.contextmanager
    def follow(self, after: Head | None) -> Iterator[Iterator[Record | Pause]]:
        """See replica.Followable."""
        with self.passing() as found:
            yield found.following(after)

    def passing(self) -> contextlib.closing[Records]:
        """All of its records, with what is known of them; see Records."""
        return contextlib.closing(Records(self._cluster, self.url))

    def read(self) -> Reading:
        """See Backend."""
        return PostgresReading(self._cluster, self.url)

    def note_proven(self) -> None:
        """See Backend. The older ones of those that are kept go."""
        with (
            contextlib.suppress(BackupError, Failed),
            contextlib.closing(self._cluster.writer(TRY_S)) as link,
        ):
            building.prune(link, self._name)

    def is_old(self) -> bool:
        """See Backend."""
        with self._once(self._cluster.reader) as link:
            schema.require(link, self.url)
        return False

    # The writer's connection

    def open(self, owner: bytes | None = None) -> None:
        """See Backend. Waits for the cluster as long as a change would."""
        self._cluster.url.require_writable()
        self._delivery.open(owner)

    def take_over(self, owner: bytes) -> None:
        """See Backend."""
        payload = layout2.encode_owner(time.time_ns(), platform.node())
        newest = self._known.newest
        head = Head(
            kind=Kind.OWNER,
            flags=layout2.BUMPS if newest.rewindable else 0,
            version=newest.version,
            time_ns=newest.time_ns,
            session=owner,
            length=len(payload),
            chain_before=newest.chain_before,
            chain=newest.chain,
        )
        self._delivery.deliver(head, payload)
        self._delivery.go_on_as(owner)

    @property
    def known(self) -> State | None:
        """What it holds, as far as the writer has heard; None if it is not open."""
        return self._delivery.known

    @property
    def _known(self) -> State:
        known = self._delivery.known
        assert known is not None, "open comes first"
        return known

    def _note(self) -> None:
        known = self._known
        self.version, self.version_count = known.newest.version, known.version_count
        self.rewindable, self.reconnects = known.newest.rewindable, self._delivery.reconnects

    def add_change(self, change: Change) -> None:
        """See Backend."""
        head = layout2.change_behind(
            self._known.newest, change, self._delivery.session, time.time_ns()
        )
        self._delivery.deliver(head, change.payload)

    def rewind(self) -> None:
        """See Backend."""
        head = layout2.rewind_behind(self._known.newest, self._delivery.session, time.time_ns())
        self._delivery.deliver(head, b"")

    def close(self) -> None:
        """See Backend."""
        self._delivery.close()
        self._delivery = Delivery(self._cluster, self.url, self._note)

    # A compaction

    def state(self) -> State:
        """A look at its end, on a connection of its own."""
        with self._once(self._cluster.writer) as link:
            return self._state(link)

    def newest_heads(self, state: State, count: int) -> list[Head]:
        """The last ``count`` records, the newest first."""
        with self._once(self._cluster.writer) as link:
            return look.newest_heads(link, state, count)

    def fold(self, state: State, last: Head, path: str) -> None:
        """Let the snapshot ``path`` stand for all up to ``last``: see building.fold."""
        with self._once(self._cluster.writer) as link:
            building.fold(link, state, last, path)

    def begins_anew(self, state: State) -> None:
        """A compaction is done, and has left ``state``; nothing is written meanwhile."""
        self._delivery.compacted(state)


def _with_owner(records: Records) -> Iterator[Record]:
    """``records`` with the owner that is folded into the snapshot, as a file has it behind that."""
    payload = records.folded_owner()
    snapshot: Head | None = None
    for head, data in records:
        if head.kind == Kind.SNAPSHOT:
            snapshot = head
        elif snapshot is not None and payload:
            yield layout2.owner_behind(snapshot, snapshot.session, payload), payload
            snapshot = None
        yield head, data


def _damage_of(reading: Reading) -> str | None:
    damage = outcome(reading).damage
    return str(damage) if damage is not None else None
