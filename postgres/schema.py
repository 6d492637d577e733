"""The tables of a cluster, version 1, in the schema ``cln_backup``.

    table    column         meaning
    layout   version        of these tables: 1
    backups  number         tells one from another for ever
             name           backup= of the URL; of a kept one, NAME.old-TIME
             identity       16 random bytes, the backup id
             snapshot       whose pieces its records begin with; 0: none
             snapshot_size  bytes of that
             opened         raised by each connection that is to write
    pieces   snapshot, number   of which snapshot, from 0
             digest         BLAKE2b-128 of the data
             data           at most 1 MiB of an SQLite file
    records  backup, sequence   up by one a record; never reused
             kind           1 snapshot, 2 change, 3 rewind, 4 owner, as in filelog/layout2.py
             flags, version, session, chain_before, chain, time_ns, payload   as there
             changes        that count, over the life of the backup
             position       bytes that its records would take in a file, over its life

A backup begins with one record of kind snapshot, whose payload is that of the last owner record
that it stands for. A record has the sequence after the one that its writer knew, whose chain and
session are compared in the same statement; so of two writers one fails at the primary key. An
owner record is a take-over: the 16 bytes of its session are the owner, and all later sessions
begin with 8 of them. What is replaced ends with an owner record of nobody who writes.
"""

from __future__ import annotations

from errors import BackupMissing, UnsupportedLayout
from filelog.layout2 import OVERHEAD
from postgres.link import NAMES, Denied, Link

VERSION = 1
_MISSING = ("42P01", "3F000")
"""There is no such table, or schema."""
_NO_RIGHT = "42501"
LOCK = 0x636C6E62
"""Of those who make the tables."""

TABLES = (
    "CREATE SCHEMA cln_backup",
    "CREATE TABLE cln_backup.layout (version integer PRIMARY KEY)",
    f"INSERT INTO cln_backup.layout VALUES ({VERSION})",
    "CREATE SEQUENCE cln_backup.numbers",
    """CREATE TABLE cln_backup.backups (
        number bigint PRIMARY KEY, name text NOT NULL UNIQUE, identity bytea NOT NULL,
        snapshot bigint NOT NULL, snapshot_size bigint NOT NULL,
        opened bigint NOT NULL DEFAULT 0)""",
    """CREATE TABLE cln_backup.pieces (
        snapshot bigint, number integer, digest bytea NOT NULL, data bytea NOT NULL,
        PRIMARY KEY (snapshot, number))""",
    """CREATE TABLE cln_backup.records (
        backup bigint, sequence bigint, kind smallint NOT NULL, flags smallint NOT NULL,
        version bigint NOT NULL, session bytea NOT NULL, chain_before bytea NOT NULL,
        chain bytea NOT NULL, changes bigint NOT NULL, time_ns bigint NOT NULL,
        position bigint NOT NULL, payload bytea NOT NULL, PRIMARY KEY (backup, sequence))""",
    # Not compressed: what is read is what was written, and no time goes into it.
    "ALTER TABLE cln_backup.pieces ALTER COLUMN data SET STORAGE EXTERNAL",
    "ALTER TABLE cln_backup.records ALTER COLUMN payload SET STORAGE EXTERNAL",
)

HEAD = "sequence, kind, flags, version, session, chain_before, chain, changes, time_ns, position"
COLUMNS = f"backup, {HEAD}, payload"
INSERT = f"""INSERT INTO cln_backup.records ({COLUMNS})
    SELECT $1, $2 + 1, $5, $6, $7, $8, $9, $10, changes + $11, $12,
        position + {OVERHEAD} + octet_length($13), $13
    FROM cln_backup.records
    WHERE backup = $1 AND sequence = $2 AND chain = $3 AND session = $4
    RETURNING {NAMES}"""
"""A record behind the one of sequence $2, chain $3 and session $4; no row if that is not there."""
INSERT_TYPES = (20, 20, 17, 17, 20, 20, 20, 17, 17, 17, 20, 20, 17)
LOOK = f"""SELECT b.number, b.identity, b.snapshot, b.snapshot_size,
    first.sequence, first.changes, first.position, {", ".join(f"l.{c}" for c in HEAD.split(", "))},
    octet_length(l.payload)
    FROM cln_backup.backups b
    CROSS JOIN LATERAL (SELECT * FROM cln_backup.records WHERE backup = b.number
        ORDER BY sequence LIMIT 1) first
    CROSS JOIN LATERAL (SELECT * FROM cln_backup.records WHERE backup = b.number
        ORDER BY sequence DESC LIMIT 1) l
    WHERE b.name = $1 OR b.number = $2"""
OWNER = """SELECT payload FROM cln_backup.records
    WHERE backup = $1 AND kind IN (1, 4) ORDER BY sequence DESC LIMIT 1"""


def make(link: Link, role_of: str) -> None:
    """Make the tables if they are not there, in the transaction that has begun.

    Args:
        role_of: the URL, for the refusal.
    """
    link.run("SELECT pg_catalog.pg_advisory_xact_lock($1)", LOCK)
    if link.run("SELECT pg_catalog.to_regclass('cln_backup.layout') IS NOT NULL")[0][0]:
        return require(link, role_of)
    try:
        for statement in TABLES:
            link.run(statement)
    except Denied as error:
        raise denied(error) from error


def require(link: Link, backup_url: str) -> None:
    """Refuse tables that are not there, or of another version.

    Raises:
        BackupMissing, UnsupportedLayout, Denied.
    """
    try:
        found = [row[0] for row in link.run("SELECT version FROM cln_backup.layout")]
    except Denied as error:
        if error.sqlstate in _MISSING:
            raise BackupMissing(backup_url) from error
        raise denied(error) from error
    if found != [VERSION]:
        named = " and ".join(map(str, found)) or "none"
        raise UnsupportedLayout(
            backup_url,
            f"in tables (schema cln_backup) of version {named}, and this release knows {VERSION}",
            "Run the release that wrote it, or a newer one.",
        )


def denied(error: Denied) -> Denied:
    """``error``, with the GRANT that helps if it is a right that is missing."""
    if error.sqlstate != _NO_RIGHT:
        return error
    return Denied(
        error.problem,
        error.sqlstate,
        "The role must own the schema cln_backup, or make it: as a superuser run `GRANT CREATE ON"
        " DATABASE dbname TO role;`, or `ALTER SCHEMA cln_backup OWNER TO role;` and the same for"
        " its tables and its sequence.",
    )
