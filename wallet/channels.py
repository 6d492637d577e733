"""The channels in a node's database, of any release, old or salvaged: what there is, is read.

Where a fact is from: wallet/migrations.c, wallet/wallet.c (wallet_channels_load_active,
wallet_peer_load, wallet_shachain_load), wallet/db.c (what migrations fill in),
lightningd/channel_state.h and json_staticbackup of Core Lightning v26.06.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import scratch
import space
from backend import MAX_VERSION
from errors import DiskError, printable
from wallet import confined, database, live, scb
from wallet.confined import Confined, Refused

MAX_CHANNELS = 100_000
MAX_VALUE_SIZE = 4096
"""Bytes of a text or blob; no value that is read here is as long in a node's database."""
MAX_SATOSHI = 21_000_000 * 100_000_000
READ_LIMIT_S = 120.0
"""Processor time: the channels of a large node take a second."""
STATES = MappingProxyType(
    {
        **{1: "DUALOPEND_OPEN_INIT", 2: "CHANNELD_AWAITING_LOCKIN", 3: "CHANNELD_NORMAL"},
        **{4: "CHANNELD_SHUTTING_DOWN", 5: "CLOSINGD_SIGEXCHANGE", 6: "CLOSINGD_COMPLETE"},
        **{7: "AWAITING_UNILATERAL", 8: "FUNDING_SPEND_SEEN", 9: "ONCHAIN", 10: "CLOSED"},
        **{11: "DUALOPEND_OPEN_COMMITTED", 12: "DUALOPEND_AWAITING_LOCKIN"},
        **{13: "CHANNELD_AWAITING_SPLICE", 14: "DUALOPEND_OPEN_COMMIT_READY"},
    }
)
"""As numbered in a database; renumbered never since 2018."""
_NOT_OPEN = (1, 10)
"""Nothing is committed yet, or all is settled: lightningd's staticbackup has none of these."""
_NO_STATIC_REMOTEKEY = 2**63 - 1
"""local_static_remotekey_start of a channel that never will have it."""
_BASEPOINTS = tuple(
    f"{kind}_basepoint_remote" for kind in ("revocation", "payment", "htlc", "delayed_payment")
)
_NEEDED = ("id", "peer_id", "state", "funding_tx_id", "funding_tx_outnum", "funding_satoshi")
_OTHERS = (
    *("short_channel_id", "scid", "full_channel_id", "msatoshi_local", "funder"),
    *("shachain_remote_id", "channel_config_remote", *_BASEPOINTS),
    *("channel_type", "option_static_remotekey", "option_anchor_outputs"),
    *("local_static_remotekey_start", "alias_remote", "channel_flags", "minimum_depth"),
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel as the database has it; None: it is not in there, or is nothing that can be.

    Attributes:
        id: lightningd's number.
        address: where the peer was last reached.
        funding: the outpoint, txid:output.
        our_msat: our share, as last known.
        state: lightningd's name of it.
        is_open: it is neither settled nor only begun.
        scb: if open, the static channel backup, in hex.
        notes: what is missing, in words without a full stop.
    """

    id: int | None
    peer_id: str | None
    address: str | None
    funding: str | None
    short_channel_id: str | None
    capacity_sat: int | None
    our_msat: int | None
    state: str
    is_open: bool
    scb: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a database told.

    Attributes:
        version: its data_version, None if it has none that can be read.
        node_id: whose database it is, if it says so.
        damage: why there may be more channels, in words, or None.
    """

    version: int | None
    node_id: str | None
    channels: list[Channel]
    damage: str | None


def of_file(path: str, prefix: str) -> Found:
    """The channels in the database ``path``, to which nothing is done.

    Args:
        prefix: how scratch files begin: what was written last may be in a journal or a WAL, and
            SQLite puts that together in a copy.

    Raises:
        DatabaseError: it is no database of a node.
        DiskError, NoRoom: there is no place for the copy.
    """
    if _stands_alone(path):
        with confined.ending_on_signals(lambda: None):
            return read(path, "ro")
    space.require(prefix, database.size_with_side_files(path), "Or elsewhere: --scratch DIR.")
    with (
        scratch.held(prefix) as base,
        confined.ending_on_signals(lambda: scratch.remove(base)),
    ):
        copy = f"{base}.sqlite3"
        try:
            database.copy_files(path, copy)
        except OSError as error:
            raise DiskError(copy, error, "copy to") from error
        return read(copy)


def _stands_alone(path: str) -> bool:
    """Whether ``path`` can be read as it is, also where nothing can be written beside it."""
    if any(os.path.exists(path + suffix) for suffix in database.SIDE_FILES):
        return False
    try:
        return not live.is_wal(path)  # SQLite makes files beside it.
    except OSError as error:
        raise DiskError(path, error, "read") from error


def read(path: str, mode: str = "rw") -> Found:
    """As of_file does, the database ``path`` itself.

    Args:
        mode: see database.opened.
    """
    with database.opened(path, mode) as connection:
        connection.allow(READ_LIMIT_S)
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        tables = _Tables(connection)
        tables.require("channels", _NEEDED)
        node_id = _bytes(tables.variable("node_id", "blobval"), 33)
        channels, damage = list[Channel](), None
        try:
            for row in tables.rows("channels", (*_NEEDED, *_OTHERS)):
                if len(channels) == MAX_CHANNELS:
                    raise Refused(f"there are more than {MAX_CHANNELS}")
                channels.append(_channel(tables, row))
        except confined.ERRORS as error:
            reason = printable(connection.reason(error))
            damage = f"its channels cannot be read to the end: {reason}"
        version = _number(tables.variable("data_version", "intval"), MAX_VERSION + 1)
    return Found(version, _hex(node_id), channels, damage)


class _Tables:
    """Rows of a schema of which only what is there is asked for."""

    def __init__(self, connection: Confined) -> None:
        self._connection = connection
        self._columns: dict[str, set[str]] = {}

    def columns(self, table: str) -> set[str]:
        """Their names; none if there is no such table."""
        if table not in self._columns:
            self._columns[table] = database.columns(self._connection, table)
        return self._columns[table]

    def require(self, table: str, needed: Sequence[str]) -> None:
        """Refused if ``table`` lacks one of these."""
        there = self.columns(table)
        if not there:
            raise Refused(f"it has no table {table}: it is no node's database, or of one never run")
        missing = [name for name in needed if name not in there]
        if missing:
            raise Refused(
                f"its table {table} has no {', '.join(missing)}: it is of a release of Core"
                " Lightning that is not known here, or no node's"
            )

    def rows(
        self, table: str, names: Sequence[str], key: str = "", value: Any = None
    ) -> Iterator[Row]:
        """Rows with ``key`` = ``value``, or all; None where a column lacks or is too large."""
        there = self.columns(table)
        if not there or (key and key not in there):
            return
        asked = ", ".join(_limited(name) if name in there else "NULL" for name in names)
        where, values = (f" WHERE {key} = ?", (value,)) if key else ("", ())
        for row in self._connection.execute(f"SELECT {asked} FROM {table}{where}", values):
            yield dict(zip(names, row, strict=True))

    def some(
        self, table: str, names: Sequence[str], key: str, value: Any, most: int = 1
    ) -> list[Row]:
        """The first ``most`` of such rows; none if they cannot be read."""
        try:
            return list(itertools.islice(self.rows(table, names, key, value), most))
        except confined.ERRORS as error:
            self._connection.reason(error)
            return []

    def row(self, table: str, names: Sequence[str], key: str, value: Any) -> Row:
        """One such row; all None if there is none that can be read."""
        found = self.some(table, names, key, value)
        return found[0] if found else dict.fromkeys(names)

    def variable(self, name: str, column: str) -> Any:
        """What ``vars`` holds under ``name``, or None."""
        return self.row("vars", (column,), "name", name)[column]


def _limited(column: str) -> str:
    is_large = f"typeof({column}) IN ('text', 'blob') AND length({column}) > {MAX_VALUE_SIZE}"
    return f"CASE WHEN {is_large} THEN NULL ELSE {column} END"


def _channel(tables: _Tables, row: Row) -> Channel:
    peer = tables.row("peers", ("node_id", "address", "last_known_address"), "id", row["peer_id"])
    peer_id = _bytes(peer["node_id"], 33)
    address = _address(peer)
    txid, output = _bytes(row["funding_tx_id"], 32), _number(row["funding_tx_outnum"], 2**32)
    capacity = _number(row["funding_satoshi"], MAX_SATOSHI + 1)
    is_open = row["state"] not in _NOT_OPEN
    static, notes = None, list[str]()
    if is_open:
        static, notes = _static(tables, row, peer_id, address)
    return Channel(
        id=_number(row["id"], 2**63),
        peer_id=_hex(peer_id),
        address=None if address is None else scb.address_in_words(address),
        funding=None if txid is None or output is None else f"{txid[::-1].hex()}:{output}",
        short_channel_id=_short_channel_id(row),
        capacity_sat=capacity,
        our_msat=_number(row["msatoshi_local"], MAX_SATOSHI * 1000 + 1),
        state=STATES.get(row["state"]) or f"unknown state {printable(str(row['state'])):.20}",
        is_open=is_open,
        scb=_hex(None if static is None else static.encode()),
        notes=tuple(notes),
    )


def _static(
    tables: _Tables, row: Row, peer_id: bytes | None, address: bytes | None
) -> tuple[scb.StaticBackup | None, list[str]]:
    """The static channel backup of ``row`` if there can be one, and what is missing."""
    number = _number(row["id"], 2**63)
    txid, output = _bytes(row["funding_tx_id"], 32), _number(row["funding_tx_outnum"], 2**16)
    capacity = _number(row["funding_satoshi"], MAX_SATOSHI + 1)
    if peer_id is None or not scb.is_point(peer_id):
        return None, ["its peer is not known: there is no static backup of it"]
    if not number or txid is None or output is None or not capacity:
        return None, ["its funding is not known: there is no static backup of it"]
    found = scb.StaticBackup(
        id=number,
        channel_id=_bytes(row["full_channel_id"], 32) or scb.channel_id_of(txid, output),
        peer_id=peer_id,
        address=address or scb.NOWHERE,
        funding_txid=txid,
        funding_output=output,
        capacity_sat=capacity,
        features=_features(row, tables.columns("channels")),
        shachain=_shachain(tables, row["shachain_remote_id"]),
        basepoints=_basepoints(row),
        opener=_number(row["funder"], 2),
        delay=_delay(tables, row["channel_config_remote"]),
    )
    lacking = {
        "the address of its peer is not known: use `lightning-cli connect`": address,
        "the peer's revoked secrets cannot be read": found.shachain,
        "the peer's basepoints cannot be read": found.basepoints,
        "who opened it cannot be read": found.opener,
        "its delay cannot be read": found.delay,
    }
    return found, [words for words, value in lacking.items() if value is None]


def _address(peer: Row) -> bytes | None:
    """Where the peer was last reached, on the wire; of two that which lightningd prefers."""
    known, text = peer["last_known_address"], peer["address"]
    if isinstance(known, bytes) and scb.address_in_words(known) is not None:
        return known
    return scb.address_on_wire(text) if isinstance(text, str) else None


def _features(row: Row, columns: set[str]) -> bytes:
    """The channel type, as the migration to it (in 23.05) fills it in where it is missing."""
    if "channel_type" in columns:
        stored = row["channel_type"]
        return stored if isinstance(stored, bytes) else b""
    has_static_remotekey = row["option_static_remotekey"] == 1
    if "local_static_remotekey_start" in columns:
        has_static_remotekey = row["local_static_remotekey_start"] != _NO_STATIC_REMOTEKEY
    bits = [12] if has_static_remotekey else []
    if row["option_anchor_outputs"] == 1:
        bits = [12, 20]
    flags = _number(row["channel_flags"], 256) or 0
    if row["alias_remote"] is not None and not flags & 1:  # Not announced.
        bits.append(46)
    if row["minimum_depth"] == 0:
        bits.append(50)
    return scb.features_of(bits)


def _shachain(tables: _Tables, number: Any) -> scb.Shachain | None:
    """The peer's secrets if they are all there."""
    chain = tables.row("shachains", ("min_index", "num_valid"), "id", number)
    lowest, count = _number(chain["min_index"], 2**63), chain["num_valid"]
    if lowest is None or _number(count, scb.MAX_SECRETS + 1) is None:
        return None
    rows = tables.some(
        "shachain_known", ("pos", "idx", "hash"), "shachain_id", number, scb.MAX_SECRETS
    )
    at = {row["pos"]: (_number(row["idx"], 2**63), _bytes(row["hash"], 32)) for row in rows}
    known = [
        (index, secret)
        for index, secret in (at.get(place, (None, None)) for place in range(count))
        if index is not None and secret is not None
    ]
    return scb.Shachain(lowest, known) if len(known) == count else None


def _basepoints(row: Row) -> bytes | None:
    points = [_bytes(row[name], 33) for name in _BASEPOINTS]
    sound = [point for point in points if point is not None and scb.is_point(point)]
    return b"".join(sound) if len(sound) == len(points) else None


def _delay(tables: _Tables, number: Any) -> int | None:
    row = tables.row("channel_configs", ("to_self_delay",), "id", number)
    return _number(row["to_self_delay"], 2**16)


def _short_channel_id(row: Row) -> str | None:
    """A number since 22.11, text before."""
    number, text = _number(row["scid"], 2**63), row["short_channel_id"]
    if number is not None:
        return f"{number >> 40}x{number >> 16 & 0xFFFFFF}x{number & 0xFFFF}"
    if isinstance(text, str) and re.fullmatch("[0-9]{1,8}([x:])[0-9]{1,8}\\1[0-9]{1,5}", text):
        return text.replace(":", "x")
    return None


def _number(value: Any, end: int) -> int | None:
    """``value`` if it is a whole number from 0 up to, without, ``end``."""
    return value if isinstance(value, int) and 0 <= value < end else None


def _bytes(value: Any, size: int) -> bytes | None:
    return value if isinstance(value, bytes) and len(value) == size else None


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()
