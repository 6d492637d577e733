"""Whether a server keeps what it acknowledges: on its disk, and on its standbys."""

from __future__ import annotations

import re
from typing import NamedTuple

from postgres.link import NAMES, Link

_DEMANDS = re.compile(r"\s*(?:(?:FIRST|ANY)\s+)?([0-9]+)\s*\(", re.IGNORECASE)
_SQL = f"""
SELECT pg_catalog.pg_is_in_recovery(), current_setting('transaction_read_only') = 'on',
  current_setting('fsync') = 'on', current_setting('full_page_writes') = 'on', {NAMES},
  pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
  (SELECT count(*) FROM pg_catalog.pg_stat_replication WHERE state = 'streaming'
   AND sync_state IN ('sync', 'quorum')), current_user::text,
  (SELECT relpersistence::text FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n
   ON n.oid = c.relnamespace WHERE nspname = 'cln_backup' AND relname = 'records')"""


class Facts(NamedTuple):
    """What a server says of itself.

    Attributes:
        names: its synchronous_standby_names.
        sees: the role may see what the standbys do.
        streaming: standbys that follow, and that commits wait for.
        role: who asks.
        persistence: of the table of records, "p" if it survives a crash; None: there is none.
    """

    is_standby: bool
    read_only: bool
    fsync: bool
    full_page_writes: bool
    names: str
    sees: bool
    streaming: int
    role: str
    persistence: str | None


def ask(link: Link) -> Facts:
    """The facts of the server at the other end; Failed, Denied."""
    return Facts._make(link.run(_SQL)[0])


def demanded(names: str) -> int:
    """How many standbys a commit waits for by this value of synchronous_standby_names."""
    if not names.strip():
        return 0
    found = _DEMANDS.match(names)
    return int(found[1]) if found else 1


def problems(facts: Facts, standbys: int) -> list[str]:
    """Why the server may not acknowledge changes that ``standbys`` are to have, in words."""
    if facts.is_standby:
        return ["it is a standby"]
    found = []
    if facts.read_only:
        found.append("it is read-only (default_transaction_read_only)")
    if not facts.fsync:
        found.append("fsync is off: a loss of power may damage all of it")
    if not facts.full_page_writes:
        found.append("full_page_writes is off: a loss of power may damage all of it")
    if facts.persistence == "u":
        found.append("the table cln_backup.records is UNLOGGED: a crash empties it")
    return found + (_of_standbys(facts, standbys) if standbys else [])


def _of_standbys(facts: Facts, standbys: int) -> list[str]:
    demands = demanded(facts.names)
    if demands < standbys:
        return [
            f"synchronous_standby_names is '{facts.names}': a commit waits for {demands} of the"
            f" {standbys} standbys that the URL demands (standbys=0 for a single server)"
        ]
    if not facts.sees:
        role = facts.role.replace('"', '""')
        return [
            f"the role {facts.role} may not see the standbys: as a superuser run"
            f' `GRANT pg_monitor TO "{role}";`'
        ]
    if facts.streaming < standbys:
        return [
            f"{facts.streaming} synchronous standbys stream from it, and {standbys} must"
            f" (synchronous_standby_names is '{facts.names}')"
        ]
    return []
