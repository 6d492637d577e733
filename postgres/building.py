"""A new backup in a cluster, or another snapshot for one: in one transaction, or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import time
from collections.abc import Iterator

from backend import EMPTY_CHAIN, MAX_CHUNK_SIZE, NOBODY, TAG_SIZE, Snapshot, new_owner, taken_over
from errors import BackupError, BackupExists
from filelog import layout2
from filelog.layout2 import FINAL, Head, Kind
from postgres import schema
from postgres.delivery import UNIQUE
from postgres.link import Denied, Failed, Link, Row
from postgres.look import State, digest_of, look
from protocol import NackCode
from remote.link import Diverged

COMMIT_TIMEOUT_S = 3600.0
"""A standby gets all of a snapshot before the commit returns."""
KEPT_AT_MOST = 2
"""Of the kept ones, once the backup is proven to restore."""


@contextlib.contextmanager
def transaction(link: Link) -> Iterator[None]:
    """All that the block does, committed on return, on the standbys too.

    Raises:
        BackupError: nothing of it is done; or the connection was lost in the commit.
    """
    try:
        link.run("BEGIN")
        yield
        link.confirmed("COMMIT", timeout_s=COMMIT_TIMEOUT_S)
    except Failed as error:
        link.close()
        raise BackupError(
            f"The PostgreSQL server failed meanwhile: {error}.",
            "Look at its log, and with `status` at what the backup holds; then try again.",
        ) from error
    except Denied as error:
        _roll_back(link)
        raise schema.denied(error) from error
    except BaseException:
        _roll_back(link)
        raise


def _roll_back(link: Link) -> None:
    with contextlib.suppress(Failed, Denied):
        link.run("ROLLBACK")


def add_snapshot(link: Link, path: str) -> tuple[int, int]:
    """Store the file ``path`` in pieces; the number of the snapshot, and its bytes."""
    (number,) = link.run("SELECT nextval('cln_backup.numbers')")[0]
    size = 0
    with open(path, "rb") as file:
        for place, data in enumerate(iter(lambda: file.read(MAX_CHUNK_SIZE), b"")):
            link.run(
                "INSERT INTO cln_backup.pieces VALUES ($1, $2, $3, $4)",
                *(number, place, digest_of(data), data),
            )
            size += len(data)
    assert isinstance(number, int) and size == os.path.getsize(path)
    return number, size


def create(link: Link, name: str, url: str, snapshot: Snapshot | None, owner: bytes) -> None:
    """Make the backup ``name``, and the tables if there are none."""
    with transaction(link):
        schema.make(link, url)
        found = link.run("SELECT 1 FROM cln_backup.backups WHERE name = $1", name)
        if found:
            raise BackupExists(f"The backup {name} in that database")
        _begin(link, name, snapshot, owner)


def _begin(link: Link, name: str, snapshot: Snapshot | None, owner: bytes) -> int:
    """The rows of a new backup; its number."""
    piled, size = add_snapshot(link, snapshot.path) if snapshot is not None else (0, 0)
    (number,) = link.run("SELECT nextval('cln_backup.numbers')")[0]
    assert isinstance(number, int)
    try:
        link.run(
            "INSERT INTO cln_backup.backups (number, name, identity, snapshot, snapshot_size)"
            " VALUES ($1, $2, $3, $4, $5)",
            *(number, name, secrets.token_bytes(16), piled, size),
        )
    except Denied as error:
        if error.sqlstate == UNIQUE:
            raise BackupExists(f"The backup {name} in that database") from error
        raise
    head = Head(
        kind=Kind.SNAPSHOT,
        flags=FINAL,
        version=snapshot.version if snapshot is not None else 0,
        time_ns=time.time_ns(),
        session=owner,
        chain=snapshot.chain if snapshot is not None else EMPTY_CHAIN,
    )
    payload = b"" if owner == NOBODY else layout2.encode_owner(time.time_ns(), platform.node())
    _add_base(link, number, head, payload)
    return number


def _add_base(link: Link, number: int, head: Head, payload: bytes) -> None:
    link.run(
        f"INSERT INTO cln_backup.records ({schema.COLUMNS})"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 0, $9, 0, $10)",
        *(number, head.sequence, head.kind, head.flags, head.version, head.session),
        *(head.chain_before, head.chain, head.time_ns, payload),
    )


def replace(link: Link, name: str, old: State, snapshot: Snapshot | None, owner: bytes) -> str:
    """Let a new backup take the place of ``old``; the name under which that is kept.

    Raises:
        Diverged: another one has written to it meanwhile.
    """
    kept = f"{name}.old-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    with transaction(link):
        beside = f"{name}.new-{secrets.token_hex(8)}"
        number = _begin(link, beside, snapshot, owner)
        _end(link, old)
        if link.run("SELECT 1 FROM cln_backup.backups WHERE name = $1", kept):
            kept += f"-{number}"
        rename = "UPDATE cln_backup.backups SET name = $1 WHERE number = $2"
        link.run(rename, kept, old.number)
        link.run(rename, name, number)
    return kept


def _end(link: Link, old: State) -> None:
    """Let nobody write to ``old`` any more: its last record takes the next one's place."""
    newest, payload = old.newest, layout2.encode_owner(time.time_ns(), platform.node())
    try:
        ended = _add_owner(link, old, new_owner(), payload)
    except Denied as error:
        if error.sqlstate != UNIQUE:
            raise
        ended = []
    if not ended:
        raise Diverged(NackCode.TAKEN_OVER, taken_over(newest.version, time.time_ns()))


def _add_owner(link: Link, state: State, session: bytes, payload: bytes) -> list[Row]:
    """Add an owner behind ``state``; no row if that is not the end any more."""
    newest = state.newest
    flags = layout2.BUMPS if newest.rewindable else 0
    return link.run(
        schema.INSERT,
        *(state.number, newest.sequence, newest.chain, newest.session),
        *(Kind.OWNER, flags, newest.version, session, newest.chain_before, newest.chain),
        *(0, newest.time_ns, payload),
    )


def take_over(link: Link, name: str, url: str, session: bytes, payload: bytes) -> None:
    """Add an owner behind whatever is the newest: a node that writes waits meanwhile.

    Args:
        session: the owner's; the rest of it is as it is there in one of several destinations.
        payload: see layout2.encode_owner.
    """
    with transaction(link):
        # Not tried again until nobody was quicker: a node can always be.
        link.run("LOCK TABLE cln_backup.records IN SHARE ROW EXCLUSIVE MODE")
        state = look(link, name, url=url)
        roster = layout2.decode_roster(payload)
        if roster is not None and len(roster.urls) > 1:
            session = session[:TAG_SIZE] + state.newest.session[TAG_SIZE:]
        added = _add_owner(link, state, session, payload)
        assert added, "nobody else could write"


def fold(link: Link, state: State, last: Head, path: str) -> None:
    """Let the snapshot ``path`` stand for all records up to ``last``.

    Raises:
        BackupError: somebody else compacted or replaced the backup meanwhile.
    """
    with transaction(link):
        number, size = add_snapshot(link, path)
        owner = "backup = $1 AND kind IN (1, 4) AND sequence <= $2 ORDER BY sequence DESC LIMIT 1"
        link.run(
            "UPDATE cln_backup.records SET kind = 1, flags = 2, payload ="
            f" (SELECT payload FROM cln_backup.records WHERE {owner})"
            " WHERE backup = $1 AND sequence = $2",
            *(state.number, last.sequence),
        )
        link.run(
            "DELETE FROM cln_backup.records WHERE backup = $1 AND sequence < $2",
            *(state.number, last.sequence),
            timeout_s=COMMIT_TIMEOUT_S,
        )
        delete = "DELETE FROM cln_backup.pieces WHERE snapshot = $1"
        link.run(delete, state.snapshot, timeout_s=COMMIT_TIMEOUT_S)
        # Last, as whoever connects to write waits for the row.
        switched = link.run(
            "UPDATE cln_backup.backups SET snapshot = $1, snapshot_size = $2"
            " WHERE number = $3 AND snapshot = $4 AND EXISTS (SELECT 1 FROM cln_backup.records"
            " WHERE backup = $3 AND sequence = $5 AND chain = $6) RETURNING number",
            *(number, size, state.number, state.snapshot, last.sequence, last.chain),
        )
        if not switched:
            raise BackupError("The backup was compacted or replaced by another one meanwhile.")


def prune(link: Link, name: str) -> list[str]:
    """Remove the older of those that are kept of ``name``; their names."""
    with transaction(link):
        rows = link.run(
            "DELETE FROM cln_backup.backups WHERE number IN (SELECT number FROM cln_backup.backups"
            " WHERE starts_with(name, $1) ORDER BY number DESC OFFSET $2)"
            " RETURNING name, number, snapshot",
            *(f"{name}.old-", KEPT_AT_MOST),
        )
        for _, number, snapshot in rows:
            records = "DELETE FROM cln_backup.records WHERE backup = $1"
            link.run(records, number, timeout_s=COMMIT_TIMEOUT_S)
            pieces = "DELETE FROM cln_backup.pieces WHERE snapshot = $1"
            link.run(pieces, snapshot, timeout_s=COMMIT_TIMEOUT_S)
    return [str(row[0]) for row in rows]
