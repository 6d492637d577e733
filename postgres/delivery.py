"""The writer's connection: a record is sent until it is known to be on all its standbys."""

from __future__ import annotations

import time
from collections.abc import Callable

from backend import NOBODY, TAG_SIZE, log, new_session, taken_over, too_large
from decisions import may_write
from errors import BackupError, OtherOwner
from filelog.layout2 import CHANGES_STEP, OVERHEAD, Head
from postgres import schema
from postgres.cluster import Cluster, Unreachable
from postgres.link import Denied, Failed, Link
from postgres.look import State, look, owner_payload, taken_over_by
from protocol import NackCode
from remote.fate import Fate
from remote.link import SLOWEST_RATE, Diverged
from remote.patience import Patience

LONGEST_TRY_S = 30.0
"""How long one server is waited for, before all of them are asked again who takes changes."""
ENDING_S = 10.0
"""What a server may take to end an old connection of ours."""
LOOK_AGAIN_S = 0.02
MAX_PAYLOAD = 1 << 29
"""Bytes. PostgreSQL has a limit of 1 GiB for a row on its way."""
STATEMENT = "change"
UNIQUE = "23505"


class Delivery:
    """One node's records on their way to a cluster, one at a time.

    Args:
        cluster: where the backup is.
        url: as the operator wrote it.
        noted: called when ``known`` or ``reconnects`` has changed.

    Attributes:
        known: what the backup holds, as far as this node has heard; None before ``open``.
        session: of the records to come.
        reconnects: how often the way was lost.
    """

    def __init__(self, cluster: Cluster, url: str, noted: Callable[[], None]) -> None:
        self._cluster = cluster
        self._url = url
        self._noted = noted
        self._link: Link | None = None
        self._owner: bytes | None = None
        self._refusal: BackupError | None = None
        self._lost = Failed()
        """Why the way was lost the last time."""
        self.known: State | None = None
        self.session = NOBODY
        self.reconnects = 0

    def open(self, owner: bytes | None) -> None:
        """Begin a session of ``owner``, None: of whoever's the backup is.

        Raises:
            Unreachable: no host took changes within ``retry_for``.
            OtherOwner, BackupMissing, Denied.
        """
        self._owner = owner
        self._note(self._connect(Patience(self._cluster.url)))
        assert self.known is not None
        self.session = new_session(owner or self.known.newest.session)

    @property
    def link(self) -> Link:
        """The writer's connection; only once open."""
        if self._link is None:
            now, before = self._connect(Patience(self._cluster.url)), self.known
            assert before is not None
            if end_of(now) != end_of(before):
                raise self._diverged(before, now)
        assert self._link is not None
        return self._link

    def go_on_as(self, owner: bytes) -> None:
        """Write as ``owner`` from now on."""
        self._owner, self.session = owner, new_session(owner)

    def go_on_with(self, state: State) -> None:
        """The backup was replaced by ``state``, by this connection."""
        self.session = new_session(state.newest.session)
        self._note(state)

    def compacted(self, state: State) -> None:
        """The backup begins as ``state`` does, which another connection was told."""
        known = self.known
        if known is not None and known.number == state.number:
            self._note(known.beginning_as(state))

    def deliver(self, head: Head, payload: bytes) -> None:
        """Store a record behind the newest; on return all its standbys have it.

        Args:
            head: its sequence is found here.

        Raises:
            BackupError: it was refused, and so is every later one: whether it is stored is
                not known any more.
        """
        if self._refusal is not None:
            raise self._refusal
        assert self.known is not None, "open comes first"
        if len(payload) > MAX_PAYLOAD:
            raise too_large(
                f"The change to version {head.version} has {len(payload)} bytes; a cluster takes"
                f" {MAX_PAYLOAD}."
            )
        patience, before = Patience(self._cluster.url), self.known
        stored, losses = _with_record(before, head), 0
        try:
            while not self._sent(stored, payload, before, patience):
                now = self._connect(patience)
                fate = fate_of(stored, before, now)
                if fate is Fate.UNKNOWN:
                    raise self._diverged(before, now)
                log.info(f"Connected to {self._cluster.url.backup} again: {_WORDS[fate]}")
                if fate is Fate.STORED:
                    stored = now
                    break
                losses += 1
                self._pause_after(losses, patience)
            self._note(stored)
        except BackupError as error:
            self._refusal = error
            raise

    def _pause_after(self, losses: int, patience: Patience) -> None:
        """Wait before a record that was lost ``losses`` times is sent again."""
        if losses == 1:
            return
        pause_s = patience.pause()
        if pause_s is None:
            raise BackupError(
                f"The PostgreSQL cluster answers, but {losses} times it did not store a change:"
                f" {self._lost}.",
                "Look at the primary's log, and at the room on its disk.",
            )
        time.sleep(pause_s)

    def _sent(self, stored: State, payload: bytes, before: State, patience: Patience) -> bool:
        """Send the newest record of ``stored``; False if what became of it has to be asked."""
        if self._link is None:
            return False
        head, newest = stored.newest, before.newest
        limit_s = min(patience.still_s, LONGEST_TRY_S) + len(payload) / SLOWEST_RATE
        try:
            rows = self._link.confirmed(
                STATEMENT,
                *(before.number, newest.sequence, newest.chain, newest.session),
                *(head.kind, head.flags, head.version, head.session),
                *(head.chain_before, head.chain, CHANGES_STEP[head.kind], head.time_ns, payload),
                timeout_s=limit_s,
                prepared=True,
            )
        except Failed as error:
            self._lose(error)
            return False
        except Denied as error:
            self.close()
            if error.sqlstate != UNIQUE:
                raise schema.denied(error) from error
            rows = []
        if rows:
            return True
        # Another one has written, or replaced the backup.
        self.close()
        return False

    def _lose(self, error: Failed) -> None:
        self._lost = error
        log.warning(f"Lost the PostgreSQL server of backup {self._cluster.url.backup}: {error}")
        self.close()
        self.reconnects += 1
        self._noted()

    def _connect(self, patience: Patience) -> State:
        """A new link, and what the backup holds, also on its standbys; Unreachable at the end."""
        while True:
            self.close()
            try:
                self._link = self._cluster.writer(patience.still_s)
                return self._settle(self._link, patience)
            except Failed as error:
                pause_s = patience.pause()
                self.close()
                if pause_s is None:
                    raise Unreachable(error) from error
                log.warning(
                    f"No host takes changes ({error}); the node has been waiting for"
                    f" {patience.waited_s:.1f} s, next try in {pause_s:.1f} s"
                )
            except BackupError:
                self.close()
                raise
            time.sleep(pause_s)

    def _settle(self, link: Link, patience: Patience) -> State:
        """Let nothing of this node's be on its way to the backup, and know all that is there."""
        try:
            state = self._looked(link)
            if self._owner is not None:
                self._end_old(link, f"cln-backup {state.backup_id[:6].hex()} {_tag(self._owner)}")
            # After a restart of the primary a commit may be visible that no standby has. This
            # one changes a row, or it would wait for nobody; all before it then is there, too.
            link.confirmed(
                "UPDATE cln_backup.backups SET opened = opened + 1 WHERE number = $1",
                state.number,
                timeout_s=min(patience.still_s, LONGEST_TRY_S),
            )
            state = self._looked(link)
            link.prepare(STATEMENT, schema.INSERT, schema.INSERT_TYPES)
        except Denied as error:
            raise schema.denied(error) from error
        return state

    def _looked(self, link: Link) -> State:
        state = look(link, self._cluster.url.backup, url=self._url)
        if not may_write(state.newest.tag, self._owner):
            raise OtherOwner(self._url, taken_over_by(owner_payload(link, state.number)))
        return state

    def _end_old(self, link: Link, name: str) -> None:
        """End this node's other connections: while one waits, what it has done is not seen."""
        deadline = time.monotonic() + ENDING_S
        others = (
            "FROM pg_catalog.pg_stat_activity WHERE application_name = $1"
            " AND usename = current_user AND pid <> pg_catalog.pg_backend_pid()"
        )
        link.run("SELECT pg_catalog.set_config('application_name', $1, false)", name)
        while link.run(f"SELECT pg_catalog.pg_terminate_backend(pid) {others}", name):
            if time.monotonic() > deadline:
                raise Failed("an old connection of this node does not end")
            time.sleep(LOOK_AGAIN_S)

    def _diverged(self, before: State, now: State) -> Diverged:
        """The cluster holds something else than what it had and what was sent."""
        was, newest = before.newest, now.newest
        code = NackCode.OTHER_HISTORY
        text = (
            f"it acknowledged version {was.version} to this node, and now is at version"
            f" {newest.version} with another content"
        )
        if now.number == before.number and newest.sequence < was.sequence:
            code = NackCode.OUT_OF_DATE
            text = (
                f"it has lost acknowledged changes: it is at version {newest.version}, this node"
                f" at version {was.version}"
            )
        elif newest.session != self.session:
            code = NackCode.TAKEN_OVER
            text = taken_over(newest.version, newest.time_ns)
        return Diverged(code, text)

    def _note(self, known: State) -> None:
        self.known = known
        self._noted()

    def close(self) -> None:
        """End the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None


def _tag(owner: bytes) -> str:
    return owner[:TAG_SIZE].hex()


def _with_record(before: State, head: Head) -> State:
    """What a look finds once ``head`` is stored behind ``before``."""
    newest = head._replace(
        backup_id=before.backup_id,
        sequence=before.newest.sequence + 1,
        offset=0,
        changes=0,
        payload_crc=0,
        crc=0,
    )
    return before._replace(
        newest=newest,
        position=before.position + OVERHEAD + head.length,
        changes=before.changes + CHANGES_STEP[head.kind],
    )


_WORDS = {Fate.STORED: "the server has it", Fate.LOST: "the server never got it"}


def end_of(state: State) -> tuple[object, ...]:
    """What of a backup no compaction changes."""
    newest = state.newest
    return state.number, state.backup_id, newest.sequence, newest.chain, newest.session


def fate_of(stored: State, before: State, now: State) -> Fate:
    """What became of a record.

    Args:
        stored: the backup with it.
        before: the backup when it was sent.
        now: the backup as it is.
    """
    if end_of(now) == end_of(before):
        return Fate.LOST
    return Fate.STORED if end_of(now) == end_of(stored) else Fate.UNKNOWN
