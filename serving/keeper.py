"""The one place where a served backup changes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import space
from backend import NOBODY, NOTICE, RELEASE, TAG_SIZE, Snapshot, Status, log, taken_over, utc
from decisions import may_write
from errors import BackupError, DiskError, Unsound
from filebackend import FileBackend
from filelog import former
from filelog.layout2 import Head, Kind, decode_roster
from filelog.reader import LogReader
from filelog.writer import check_log
from protocol import OVERRIDE, Details, Metadata, Nack, NackCode
from serving import rules
from serving.client import Answer, Client, Stored
from serving.following import Bell
from serving.rules import Act, Decision, Offer, Reason, State
from serving.turns import Turns
from upkeep.examine import Findings, examine

SERVER_NAME = f"backup-cli server {RELEASE}"
Rule = Callable[[State, Offer], Decision]


class Ready(NamedTuple):
    """A new backup that only has to take its place: the log of a snapshot (see log_of).

    Attributes:
        found: what its database is.
        compared: id of the backup that it was compared with.
    """

    snapshot: Snapshot
    offer: Offer
    found: Findings
    compared: bytes


MAX_SEEN = 100
"""Peers that are remembered as writers."""
FOREIGN = frozenset(
    {
        NackCode.LOST_STATE,
        NackCode.OTHER_OWNER,
        NackCode.TAKEN_OVER,
        NackCode.OTHER_HISTORY,
        NackCode.OLD_SNAPSHOT,
    }
)
"""Refusals that somebody else's writing may be the reason of."""


class Keeper:
    """Does what the rules say to the backup, whichever client asks.

    Whoever wrote last is the writer. Whoever calls what returns an Answer holds ``lock`` until the
    client has it: see connection.Connection.ask.

    Args:
        backend: open for writing.
        allows_1: protocol 1 may write also after protocol 2 has.

    Attributes:
        bell: rung after what was written.
    """

    def __init__(self, backend: FileBackend, allows_1: bool = False) -> None:
        self._allows_1 = allows_1
        self.backend = backend
        self.lock = threading.Lock()
        self.bell = Bell()
        self._writer: Client | None = None
        self._newest_writer = 0
        self._told = NOBODY, ""
        """The owner's tag when ``_whose`` was last asked, and its answer."""
        self._last: tuple[str, str, int] | None = None
        """Machine, peer and Unix time (ns) of what was stored last, since the server started."""
        self._seen: set[tuple[str, str]] = set()
        """Peers and machines that have written: each is named in the log once."""
        self._superseded: set[bytes] = set()
        """Sessions that wrote, and after which another one wrote."""
        self._node: tuple[bytes, str | None] = b"", None
        """The id of the backup whose node was last looked for, and that."""
        # A look costs a core and a gibibyte, also if its client has left. A node that heals has
        # a turn of its own: it does not wait for what strangers sent.
        self._guests_look, self._owners_look = Turns(1), Turns(1)
        self._statuses = Turns(1)

    # What is asked without writing

    def metadata(self) -> Metadata:
        """What REQ_METADATA is told."""
        with self.lock:
            backend, newest = self.backend, self.backend.newest
            details = Details(
                newest.backup_id,
                newest.sequence,
                newest.chain_before,
                newest.chain,
                newest.session,
                newest.time_ns,
                backend.size,
                SERVER_NAME,
                self._last_writer(),
                backend.unsound or "",
            )
            return Metadata(
                2, backend.version, backend.prev_version, backend.version_count, details
            )

    def status(self, client: Client) -> Status:
        """What STATUS is told. It reads the log's end, so one client at a time is told."""
        with self._statuses.turn(client):
            return self.backend.status()

    def _last_writer(self) -> str:
        if self._last is None:
            return ""
        machine, who, time_ns = self._last
        return f"machine {machine}, {who}, {utc(time_ns)}"

    def is_foreign(self, owner: bytes) -> bool:
        """Whether the backup is not ``owner``'s."""
        with self.lock:
            return not may_write(self.backend.newest.tag, owner)

    def whose(self) -> str:
        """Whose the backup is, for who may not write to it."""
        # Looked up once for each owner: the log is searched, and changes wait for the lock.
        tag = self.backend.newest.tag
        if self._told[0] != tag:
            self._told = tag, self._look_whose()
        return self._told[1]

    def _look_whose(self) -> str:
        try:
            with contextlib.closing(LogReader(self.backend.path)) as reader:
                taken = reader.taken_over()
        except BackupError as error:  # No descriptor is left, say. That ends no server.
            return f"the backup belongs to another node; {error.problem}"
        if not taken:
            return "this backup is nobody's: it is not the one that this node wrote"
        return f"the backup belongs to another node: {taken}"

    def refusal(self, client: Client, offer: Offer, rule: Rule) -> Reason | None:
        """Why the snapshot that ``client`` offers need not come at all, as it is now."""
        with self.lock:
            return rule(self.state(client), offer).reason

    def prepare(self, client: Client, snapshot: Snapshot, offer: Offer) -> Ready:
        """Look at a snapshot that came, and at the log that was written of it.

        Changes go on meanwhile: not under ``lock``. Other snapshots wait for their turn.

        Raises:
            BackupError: it is not sound, or not what it was called; or there is no room to look.
            Dropped: its connection was cut before its turn came.
        """
        with (self._owners_look if client.claims else self._guests_look).turn(client):
            ready = self._prepare(snapshot, offer)
            if ready.compared != self.backend.newest.backup_id:
                # An earlier one of this node, most likely: killed when it had sent all.
                ready = self._prepare(snapshot, offer)
            return ready

    def _prepare(self, snapshot: Snapshot, offer: Offer) -> Ready:
        backend, backup_id = self.backend, self.backend.newest.backup_id
        is_known = offer.override or self._node[0] == backup_id
        # The node of the backup that is here stands in its snapshot.
        space.require(snapshot.path, 0 if is_known else backend.snapshot_size)
        of_backup = None if is_known else backend.path
        found = examine(snapshot.path, of_backup, lambda: _check_log(snapshot))
        if found.problems:
            raise Unsound(f"It is not sound: {'; '.join(found.problems)}.")
        if found.version != snapshot.version:
            raise Unsound(f"It is called version {snapshot.version}, but holds {found.version}.")
        if is_known:
            found = found._replace(of_backup=self._node[1])
        else:
            self._node = backup_id, found.of_backup
        return Ready(snapshot, offer, found, backup_id)

    def is_writer(self, client: Client) -> bool:
        """Whether ``client`` was the last to write."""
        return self._writer is client

    # What is written

    def record(self, client: Client, head: Head, payload: bytes) -> Answer:
        """Store a change or a rewind, or refuse it."""
        return self.carry_out(
            client,
            rules.record(self.state(client), head),
            _what(head),
            lambda: self.backend.add_record(head, payload),
            Stored(head.version, head.chain),
        )

    def record_refusal(self, client: Client, head: Head) -> Nack | None:
        """Why ``record`` would refuse ``head`` now, whatever its payload; None if it would not."""
        with self.lock:
            return self.refused(rules.record(self.state(client), head), _what(head))

    def refuse(self, client: Client, head: Head, nack: Nack) -> Answer:
        """What ``record_refusal`` said holds: all of the record came, as it was sent."""
        decision = rules.record(self.state(client), head)
        if decision.act is Act.REFUSE and decision.superseded is not None:
            self._superseded.add(decision.superseded)
        return nack

    def take_over(self, client: Client, head: Head, payload: bytes) -> Answer:
        """Let another owner write from here on, or refuse it."""
        decision = rules.take_over(self.state(client), head)
        stored = Stored(head.version, head.chain)
        if decision.act is Act.KNOWN:
            return stored  # And whoever writes by now goes on.

        def add() -> None:
            session = head.session
            roster = decode_roster(payload)
            if head.flags & OVERRIDE and roster is not None and len(roster.urls) > 1:
                # Its sender may not know the newest term.
                session = session[:TAG_SIZE] + self.backend.newest.session[TAG_SIZE:]
            self.backend.add_owner(session, payload)
            log.log(NOTICE, f"{client}: {client.machine} took the backup over")

        return self.carry_out(client, decision, "the take-over", add, stored)

    def replace(self, client: Client, ready: Ready, rule: Rule = rules.snapshot) -> Answer:
        """Start over with what ``prepare`` found sound, or refuse it.

        Args:
            rule: says whether that may be: the backup may have changed meanwhile.
        """
        snapshot, offer, found, compared = ready
        decision = rule(self.state(client), offer)
        if decision.reason is None and compared != self.backend.newest.backup_id:
            decision = Decision(Act.REFUSE, Reason.MOVED_ON)
        elif decision.reason is None:
            kept = former.count(self.backend.path)
            decision = rules.in_place(offer, found.node, found.of_backup, kept)
        return self.carry_out(
            client,
            decision,
            f"the snapshot of version {snapshot.version}",
            lambda: self._start_over(client, ready),
            Stored(snapshot.version, snapshot.chain),
        )

    def _start_over(self, client: Client, ready: Ready) -> None:
        kept = self.backend.put(log_of(ready.snapshot))
        self._node = self.backend.newest.backup_id, ready.found.node
        log.log(
            NOTICE,
            f"{client}: the backup starts over with a snapshot of version"
            f" {ready.snapshot.version}; the old one "
            + (f"is kept as {kept}" if kept else "was empty"),
        )

    def state(self, client: Client) -> State:
        """What the rules need to know when ``client`` asks."""
        outdated = client.number < self._newest_writer
        damaged = self.backend.damage is not None
        asking = self.is_writer(client), outdated, damaged, self._allows_1
        return State(self.backend.newest, self._superseded, *asking)

    def carry_out(
        self,
        client: Client,
        decision: Decision,
        what: str,
        store: Callable[[], object],
        stored: Stored,
    ) -> Answer:
        """Do what a rule says of ``what`` that ``client`` asked for.

        Args:
            store: does it, durably.
            stored: the answer if it is stored.
        """
        if decision.superseded is not None:
            self._superseded.add(decision.superseded)
        if (nack := self.refused(decision, what)) is not None:
            return nack
        if decision.act is Act.KNOWN:
            log.info(f"{client}: version {stored.version} came again; it is stored already")
        self._become_writer(client)
        if decision.act is Act.STORE:
            store()
            self._last = client.machine, client.who, time.time_ns()
        return stored

    def refused(self, decision: Decision, what: str) -> Nack | None:
        """What a client is told if a rule refuses ``what``."""
        if decision.reason is None:
            return None
        text = f"refused {what}: {self.words(decision.reason)}"
        return Nack(self.backend.version, decision.reason.code, text)

    def words(self, reason: Reason) -> str:
        """Why nothing is stored, for people."""
        newest = self.backend.newest
        words = reason.text.format(
            version=newest.version,
            previous=self.backend.prev_version,
            whose=self.whose() if reason is Reason.OTHER_OWNER else "",
            taken_over=taken_over(newest.version, newest.time_ns),
            path=self.backend.path,
            damage=self.backend.damage.problem if self.backend.damage else "",
        )
        by = self._last_writer() if reason.code in FOREIGN else ""
        return f"{words}; last written by {by}" if by else words

    def _become_writer(self, client: Client) -> None:
        """Make ``client`` the writer; a half-open one before it is closed."""
        if self.is_writer(client):
            return
        if self._writer is not None:
            log.log(NOTICE, f"{client} takes over as writer from {self._writer}")
            self._writer.cut()
        self._writer = client
        self._newest_writer = client.number
        self._name(client)
        self.backend.begin_session()

    def _name(self, client: Client) -> None:
        """Tell the log of a peer that has not written before."""
        peer = client.who, client.machine
        if peer not in self._seen:
            if len(self._seen) == MAX_SEEN:  # The name of a machine is anything that it says.
                self._seen.clear()
            self._seen.add(peer)
            log.log(NOTICE, f"{client}: writes for the first time: machine {client.machine}")

    def forget(self, client: Client) -> None:
        """The connection of ``client`` is closed."""
        with self.lock:
            if self._writer is client:
                self._writer = None


def log_of(snapshot: Snapshot) -> str:
    """Where the log of a snapshot is written as it comes."""
    return f"{snapshot.path}-log"


def _check_log(snapshot: Snapshot) -> None:
    """Read the whole log of ``snapshot``, which must begin with the database that is looked at."""
    try:
        with open(snapshot.path, "rb") as database:

            def compare(head: Head, payload: bytes) -> None:
                if head.kind == Kind.SNAPSHOT and database.read(len(payload)) != payload:
                    raise BackupError("What was written of it is not what came.")

            check_log(log_of(snapshot), compare)
            if database.read(1):
                raise BackupError("What was written of it is not all that came.")
    except OSError as error:
        raise DiskError(snapshot.path, error, "read") from error


def _what(head: Head) -> str:
    return f"the {'rewind' if head.kind == Kind.REWIND else 'change'} to version {head.version}"
