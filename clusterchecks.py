"""Whether a PostgreSQL cluster keeps a commit on several machines: pure functions of plain values.

Nothing is asked here. Who asks has been at the server, and says what these return.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

CONFIRMING = ("sync", "quorum")
"""``sync_state`` of a standby whose confirmation lets a commit go on: with ANY all of those named
are ``quorum``, and as many as it says are enough; with FIRST the others are ``potential``."""
_DEMANDS = re.compile(r"\s*(?:(?:FIRST|ANY)\s+)?([0-9]+)\s*\(", re.IGNORECASE)


class Server(NamedTuple):
    """What a server says of itself, to ``role``.

    Attributes:
        names: its synchronous_standby_names.
        sees: the role may see what the standbys do; else those columns are NULL.
        confirming: standbys that stream, and whose confirmation a commit waits for.
        subscribers: names of those that follow tables only, and yet may confirm a commit.
    """

    role: str
    is_standby: bool
    read_only: bool
    fsync: bool
    full_page_writes: bool
    names: str
    sees: bool
    confirming: int
    subscribers: str = ""


class Standby(NamedTuple):
    """A row of pg_stat_replication.

    Attributes:
        state, sync_state: as PostgreSQL has them.
        behind: bytes that it has not yet flushed, None: it has said nothing yet.
        logical: it follows tables, and is no copy of the cluster.
    """

    name: str
    state: str
    sync_state: str
    behind: int | None
    logical: bool = False

    @property
    def confirms(self) -> bool:
        """Whether it is there for a commit that waits."""
        return self.state == "streaming" and self.sync_state in CONFIRMING and not self.logical

    @property
    def is_mistaken(self) -> bool:
        """Whether its confirmation may let a commit go on, though it does not keep it."""
        return self.logical and self.sync_state != "async"


class Slot(NamedTuple):
    """A row of pg_replication_slots, of the physical ones; ``held`` are bytes kept for it."""

    name: str
    active: bool
    wal_status: str
    held: int | None


class Fallback(NamedTuple):
    """What is kept for a standby that is away.

    Attributes:
        archive_mode: the setting.
        failing: the last try to archive did not succeed.
    """

    wal_level: str
    archive_mode: str
    failing: bool
    slots: Sequence[Slot]


class WalletCluster(NamedTuple):
    """What was found of the cluster of somebody's database.

    Attributes:
        where: user, host, port and database, without a password.
        version: of the server, as it says it.
        synchronous_commit: what its commits wait for.
        problems: why a commit is not on two machines; none if it is.
        warnings: what may become a problem.
    """

    where: str
    version: str
    server: Server
    synchronous_commit: str
    standbys: list[Standby]
    fallback: Fallback
    problems: list[str]
    warnings: list[str]


def demanded(names: str) -> int:
    """How many standbys a commit waits for by this value of synchronous_standby_names."""
    if not names.strip():
        return 0
    found = _DEMANDS.match(names)
    return int(found[1]) if found else 1


def grant(role: str) -> str:
    """The statement that lets ``role`` see the standbys."""
    quoted = role.replace('"', '""')
    return f'GRANT pg_monitor TO "{quoted}";'


def problems(server: Server, wanted: int) -> list[str]:
    """Why a commit on this server is not kept there and on ``wanted`` standbys, in words."""
    if server.is_standby:
        return ["it is a standby"]
    found = []
    if server.read_only:
        found.append("it is read-only (default_transaction_read_only)")
    if not server.fsync:
        found.append("fsync is off: a loss of power may damage all of it")
    if not server.full_page_writes:
        found.append("full_page_writes is off: a loss of power may damage all of it")
    return found + (_of_standbys(server, wanted) if wanted else [])


def _of_standbys(server: Server, wanted: int) -> list[str]:
    demands = demanded(server.names)
    if demands < wanted:
        return [
            f"synchronous_standby_names is '{server.names}': a commit waits for {demands} standbys,"
            f" and {wanted} must have it"
        ]
    if not server.sees:
        return [
            f"the role {server.role} may not see the standbys: as a superuser run"
            f" `{grant(server.role)}`"
        ]
    if server.subscribers:
        return [
            f"{server.subscribers} follows tables only (logical replication), and may confirm a"
            f" commit all the same: let synchronous_standby_names ('{server.names}') name the"
            " standbys and nobody else"
        ]
    # All that the setting demands: with fewer each commit waits.
    if server.confirming < demands:
        return [
            f"{server.confirming} synchronous standbys stream from it, and a commit waits for"
            f" {demands} (synchronous_standby_names is '{server.names}')"
        ]
    return []


def of_commit(synchronous_commit: str) -> tuple[list[str], list[str]]:
    """Problems and warnings of what somebody's commits wait for."""
    if synchronous_commit in ("on", "remote_apply"):
        return [], []
    said = f"synchronous_commit is {synchronous_commit}"
    if synchronous_commit == "remote_write":
        return [], [
            f"{said}: the standby has received a commit, and not flushed it. If both machines"
            " lose power, it may be lost"
        ]
    return [f"{said}: a commit waits for no standby"], []


def warnings(standbys: Sequence[Standby], fallback: Fallback) -> list[str]:
    """What does not keep a commit from being on two machines now, but may later."""
    found = [
        f"the standby {standby.name} does not keep up: {standby.state}"
        for standby in standbys
        if standby.state != "streaming" and not standby.logical
    ]
    for slot in fallback.slots:
        if slot.wal_status in ("unreserved", "lost"):
            found.append(f"the slot {slot.name} has lost its place: make its standby anew")
        elif not slot.active:
            found.append(
                f"nobody uses the slot {slot.name}: the log is kept for it, and may fill the disk"
            )
    if fallback.archive_mode != "off" and fallback.failing:
        found.append("archiving fails: look into the server's log")
    if fallback.archive_mode == "off" and not fallback.slots:
        found.append(
            "there is neither a slot nor an archive: a standby that was away cannot catch up"
        )
    return found
