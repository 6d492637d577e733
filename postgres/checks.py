"""What a server says of itself: whether it keeps what it acknowledges."""

from __future__ import annotations

import time

from clusterchecks import Server, problems
from postgres.link import NAMES, Link

LOOK_AGAIN_S = 0.05
LOGICAL = """EXISTS (SELECT FROM pg_catalog.pg_replication_slots s
  WHERE s.active_pid = r.pid AND slot_type = 'logical')"""
"""Whether ``r`` of pg_stat_replication is no standby: it follows tables, and always by a slot."""
_SERVER = f"""
SELECT current_user::text, pg_catalog.pg_is_in_recovery(),
  current_setting('transaction_read_only') = 'on', current_setting('fsync') = 'on',
  current_setting('full_page_writes') = 'on', {NAMES},
  pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
  (SELECT count(*) FROM pg_catalog.pg_stat_replication r WHERE state = 'streaming'
   AND sync_state IN ('sync', 'quorum') AND NOT {LOGICAL}),
  (SELECT coalesce(string_agg(application_name, ', '), '')
   FROM pg_catalog.pg_stat_replication r WHERE sync_state <> 'async' AND {LOGICAL}),
  (SELECT count(*) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n
   ON n.oid = c.relnamespace WHERE nspname = 'cln_backup' AND relpersistence = 'u')"""


def ask(link: Link, standbys: int) -> tuple[Server, list[str]]:
    """The server at the other end, and why it may not acknowledge changes, in words.

    Args:
        standbys: how many of them are to have a change.

    Raises:
        Failed, Denied.
    """
    *values, unlogged = link.run(_SERVER)[0]
    server = Server._make(values)
    found = problems(server, standbys)
    if unlogged and not server.is_standby:
        found.append("a table in cln_backup is UNLOGGED: a crash empties it")
    return server, found


_REPLAYED = """SELECT pg_catalog.pg_is_wal_replay_paused(),
    (SELECT (pg_catalog.pg_last_wal_replay_lsn() - '0/0')::bigint
     FROM pg_catalog.pg_stat_activity WHERE backend_type = 'startup'
     AND wait_event IN ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval')
     AND pg_catalog.pg_last_wal_replay_lsn()
         >= coalesce(pg_catalog.pg_last_wal_receive_lsn(), '0/0'))"""
"""The place in the log, if the standby has nothing left to replay, and waits for more."""


def replayed(link: Link, timeout_s: float) -> int | None:
    """Up to where the standby has replayed, once that is all it has; None: it does not get there.

    What is acknowledged is flushed there, and only shows when it is replayed: a standby may have
    a delay, be paused, or wait for somebody who reads.

    Raises:
        Failed, Denied.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        paused, place = link.run(_REPLAYED)[0]
        if isinstance(place, int):
            return place
        if paused or time.monotonic() >= deadline:
            return None
        time.sleep(LOOK_AGAIN_S)
