"""A wallet that is itself on PostgreSQL: whether its cluster keeps a commit on two machines."""

from __future__ import annotations

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import clusterchecks
from clusterchecks import Fallback, Server, Slot, Standby, WalletCluster
from errors import BackupError, ConfigError
from postgres.checks import LOGICAL

CONNECT_TIMEOUT_S = 10
QUERY_TIMEOUT_MS = 30_000
_SERVER = """
SELECT current_user::text, pg_catalog.pg_is_in_recovery(),
  current_setting('transaction_read_only') = 'on', current_setting('fsync') = 'on',
  current_setting('full_page_writes') = 'on', current_setting('synchronous_standby_names'),
  pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
  current_setting('server_version'), current_setting('synchronous_commit'),
  current_setting('wal_level'), current_setting('archive_mode'),
  (SELECT coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false)
   FROM pg_catalog.pg_stat_archiver)"""
_END = """CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_receive_lsn()
  ELSE pg_catalog.pg_current_wal_flush_lsn() END"""
_STANDBYS = f"""
SELECT application_name, state, sync_state, ({_END} - flush_lsn)::bigint, {LOGICAL}
FROM pg_catalog.pg_stat_replication r WHERE state IS NOT NULL ORDER BY application_name"""
_SLOTS = f"""
SELECT slot_name::text, active, wal_status, ({_END} - restart_lsn)::bigint
FROM pg_catalog.pg_replication_slots
WHERE slot_type = 'physical' AND NOT temporary AND restart_lsn IS NOT NULL ORDER BY slot_name"""


def examine(url: str) -> WalletCluster:
    """Look at the server that lightningd would write to with ``--wallet=url``.

    The connection is made from the same words, so what is set for its role or its database holds.

    Raises:
        BackupError: the server cannot be asked.
    """
    try:
        options = conninfo_to_dict(url)
    except psycopg.Error as error:
        raise ConfigError(f"libpq does not take this --wallet: {_one_line(error)}.") from error
    options.setdefault("connect_timeout", CONNECT_TIMEOUT_S)
    try:
        with psycopg.connect(make_conninfo("", **options), autocommit=True) as connection:
            connection.execute(f"SET statement_timeout = {QUERY_TIMEOUT_MS}")
            return _ask(connection)
    except psycopg.Error as error:
        raise BackupError(
            f"The wallet's server cannot be asked: {_one_line(error)}.",
            "Check that it runs, and the URL: it is the value of lightningd's option --wallet.",
        ) from error


def _ask(connection: psycopg.Connection) -> WalletCluster:
    row = connection.execute(_SERVER).fetchone()
    assert row is not None
    version, synchronous_commit, wal_level, archive_mode, failing = row[7:]
    standbys = [Standby(*values) for values in connection.execute(_STANDBYS)]
    slots = [Slot(*values) for values in connection.execute(_SLOTS)]
    confirming = sum(standby.confirms for standby in standbys)
    mistaken = ", ".join(standby.name for standby in standbys if standby.is_mistaken)
    server = Server._make([*row[:7], confirming, mistaken])
    fallback = Fallback(wal_level, archive_mode, failing, slots)
    wrong, doubtful = clusterchecks.of_commit(synchronous_commit)
    info = connection.info
    return WalletCluster(
        f"{info.user}@{info.host}:{info.port}/{info.dbname}",
        version,
        server,
        synchronous_commit,
        standbys,
        fallback,
        wrong + clusterchecks.problems(server, 1),
        doubtful + clusterchecks.warnings(standbys, fallback),
    )


def _one_line(error: psycopg.Error) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()).rstrip(".")
