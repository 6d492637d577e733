"""What every destination of a backup has in common: changes, the version rule, the chain."""

from __future__ import annotations

import enum
import hashlib
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from errors import BackupError, InvalidChange, LostState, OutOfDate

RELEASE = "1.0.0"
log = logging.getLogger("backup")
NOTICE = 25
"""Log level between INFO and WARNING, as syslog has it."""

MAX_VERSION = 2**32 - 1
"""data_version is a u32 in the hook."""
MAX_CHANGE_SIZE = 256 << 20
"""Bytes of one change's payload. The largest seen on a node is 400 kB."""
MAX_STATEMENTS = 1 << 22
"""Statements of one change: each costs memory, however short it is."""
MAX_CHUNK_SIZE = 1 << 20
"""Bytes of one piece of a snapshot."""
CHAIN_SIZE = 16
EMPTY_CHAIN = bytes(CHAIN_SIZE)
"""The chain of a backup that holds nothing yet."""
FOREIGN_KEYS_OFF = "PRAGMA foreign_keys = OFF;"
FOREIGN_KEYS_ON = "PRAGMA foreign_keys = ON;"


def chain_after(before: bytes, version: int, payload: bytes) -> bytes:
    """Name the history that ends with this change: 16 bytes of BLAKE2b.

    Args:
        before: the chain before the change.
        version: its data_version.
        payload: its payload.
    """
    digest = hashlib.blake2b(before, digest_size=CHAIN_SIZE)
    digest.update(version.to_bytes(4, "big"))
    digest.update(payload)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Change:
    """One call of the db_write hook, or one piece of a snapshot.

    Attributes:
        version: data_version after the change.
        snapshot: a piece of at most 1 MiB of an SQLite file, in order, or None.
        transaction: the statements of one commit, or None.
        bumps: the last statement raises data_version to ``version`` (a commit proper).

    Raises:
        InvalidChange: the fields break a rule, so that an invalid Change cannot exist.
    """

    version: int
    snapshot: bytes | None
    transaction: Sequence[str] | None
    payload: bytes = field(init=False, repr=False, compare=False)
    """What is stored: the snapshot's piece, or the statements joined by a NUL, in UTF-8."""
    bumps: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.version) is not int or not 0 <= self.version <= MAX_VERSION:
            raise InvalidChange(f"{self.version!r} is no data_version between 0 and 2**32 - 1.")
        if (self.snapshot is None) == (self.transaction is None):
            raise InvalidChange("A change is either a piece of a snapshot or a transaction.")
        if self.snapshot is not None:
            if len(self.snapshot) > MAX_CHUNK_SIZE:
                raise InvalidChange(
                    f"A piece of a snapshot has {len(self.snapshot)} bytes;"
                    f" the limit is {MAX_CHUNK_SIZE}."
                )
            object.__setattr__(self, "payload", self.snapshot)
        else:
            assert self.transaction is not None
            object.__setattr__(self, "payload", _payload(self.version, self.transaction))
        last = self.transaction[-1] if self.transaction else None
        object.__setattr__(self, "bumps", last == bump(self.version))

    @classmethod
    def decode(cls, version: int, payload: bytes) -> Change:
        """The transaction that was stored as ``payload``; InvalidChange if it is none."""
        _check_count(version, payload.count(b"\0") + 1)
        return cls(version, None, _text(version, payload).split("\0"))

    @property
    def is_pragma(self) -> bool:
        """Whether it is a call of PRAGMAs alone, which run outside of any transaction."""
        return self.transaction is not None and all(
            s.startswith("PRAGMA") for s in self.transaction
        )

    @property
    def base(self) -> int:
        """The version that the database had before this change."""
        return self.version - 1 if self.bumps else self.version


def bump(version: int) -> str:
    """The statement that ends a change which raises data_version to ``version``."""
    return (
        "UPDATE vars SET intval = intval + 1 WHERE name = 'data_version'"
        f" AND intval = {version - 1}"
    )


def payload_bumps(version: int, payload: bytes) -> bool:
    """``Change.decode(version, payload).bumps``, without building that change.

    Raises:
        InvalidChange: no transaction is stored like that.
    """
    if len(payload) >= MAX_STATEMENTS:  # A shorter one cannot hold too many.
        _check_count(version, payload.count(b"\0") + 1)
    _text(version, payload)
    _check_size(version, payload)
    statements = payload.split(b"\0")
    if b"" in statements:
        raise _unexecutable(version)
    return statements[-1] == bump(version).encode()


def _payload(version: int, statements: Sequence[str]) -> bytes:
    if not isinstance(statements, (list, tuple)):
        raise InvalidChange(f"The change to version {version} is not a list of strings.")
    if not statements:
        raise InvalidChange(
            f"The change to version {version} holds no statement. lightningd announces no"
            " statements when its own wallet is on PostgreSQL.",
            "This plugin cannot back up such a node: use PostgreSQL's replication.",
        )
    try:
        payload = "\0".join(statements).encode()
    except TypeError as error:
        raise InvalidChange(f"The change to version {version} is not a list of strings.") from error
    except UnicodeEncodeError as error:
        raise InvalidChange(f"The change to version {version} is no valid text.") from error
    _check_count(version, len(statements))
    _check_size(version, payload)
    if not all(statements) or payload.count(b"\0") != len(statements) - 1:
        raise _unexecutable(version)
    return payload


def _check_size(version: int, payload: bytes) -> None:
    if len(payload) > MAX_CHANGE_SIZE:
        raise InvalidChange(
            f"The change to version {version} has {len(payload)} bytes;"
            f" the limit is {MAX_CHANGE_SIZE}."
        )


def _unexecutable(version: int) -> InvalidChange:
    return InvalidChange(
        f"The change to version {version} has an empty statement or one with a NUL"
        " byte, which SQLite cannot execute."
    )


def _check_count(version: int, statements: int) -> None:
    if statements > MAX_STATEMENTS:
        raise InvalidChange(f"The change to version {version} has too many statements.")


def _text(version: int, payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise InvalidChange(f"The change to version {version} is not UTF-8.") from error


class Verdict(enum.Enum):
    """What the version rule says of a change."""

    APPEND = "append"
    REWIND = "rewind the last change, then append"
    OUT_OF_DATE = "the node is ahead"
    LOST_STATE = "the backup is ahead"


def judge(base: int, version: int, rewindable: bool, first: bool) -> Verdict:
    """The version rule.

    Args:
        base: the version that the node's database has before the change.
        version: the backup's version.
        rewindable: the backup's last record is a change that bumps.
        first: the change is the first of a session, where the last stored one may
            never have been committed.
    """
    if base == version:
        return Verdict.APPEND
    if first and rewindable and base == version - 1:
        return Verdict.REWIND
    return Verdict.OUT_OF_DATE if base > version else Verdict.LOST_STATE


def committed(changes: Iterable[Change]) -> Iterator[Change]:
    """What the earlier plugin stored, without the changes that the node never committed.

    There, a change that was taken back is followed by what came in its place.

    Raises:
        BackupError: the versions do not follow each other; what stands before was given.
    """
    version, held = 0, None
    for change in changes:
        if change.snapshot is not None:
            version, held = change.version, None
            yield change
            continue
        rewindable = held is not None and held.bumps
        verdict = judge(change.base, version, rewindable, first=True)
        if verdict is not Verdict.REWIND and held is not None:
            yield held
        if verdict not in (Verdict.APPEND, Verdict.REWIND):
            raise BackupError(f"A change to version {change.version} follows version {version}.")
        version, held = change.version, change
    if held is not None:
        yield held


def utc(time_ns: int) -> str:
    """Unix time in nanoseconds, as an operator reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_ns // 10**9))


def taken_over(version: int, time_ns: int) -> str:
    """Why a node may not write any more, by the last record of the one that does."""
    return f"another node took over at version {version}, {utc(time_ns)}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A closed SQLite file that a backup is to start with.

    Attributes:
        path: the file, which nobody changes meanwhile.
        version: its data_version.
        chain: names the history that begins with it: random.
    """

    path: str
    version: int
    chain: bytes = field(default_factory=lambda: secrets.token_bytes(CHAIN_SIZE))


@dataclass(slots=True)
class Status:
    """What a look at a backup tells; sizes in bytes. None: the destination cannot tell.

    Attributes:
        prev_version: the version that a rewind would lead to, or None if none can.
        version_count: changes since the snapshot, and one for the snapshot.
        last_change_ns: Unix time of the last record, nanoseconds.
        torn_tail: an append that was never acknowledged stands at the end.
        damage: what does not check, or None.
        disk_free: free bytes for the writer.
        notes: what else was found and does no harm.
        warnings: what the operator should act on.
    """

    url: str
    layout: str
    version: int
    prev_version: int | None
    version_count: int
    backup_id: str | None = None
    changes: int | None = None
    snapshot_size: int | None = None
    size: int | None = None
    allocated: int | None = None
    last_change_ns: int | None = None
    torn_tail: bool = False
    damage: str | None = None
    disk_free: int | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Reading(ABC):
    """One pass over a backup for a restore: iterate it, then ask how it went.

    Attributes:
        version: data_version that the whole backup leads to.
        total: bytes to come, or 0 if unknown.
        position: bytes seen so far.
        last_change_ns: Unix time of the last record seen, nanoseconds, or None.
        torn_tail: an unacknowledged append at the end was left out.
        damage: what stopped the pass before the end, or None.
        notes: what else was found, in words.
    """

    version = 0
    total = 0
    position = 0
    last_change_ns: int | None = None
    torn_tail = False
    damage: Exception | None = None
    notes: Sequence[str] = ()

    @abstractmethod
    def __iter__(self) -> Iterator[Change]:
        """The snapshot's pieces, then the changes that count, in order.

        A change that a rewind took back is left out, and so is a PRAGMA call that no
        change of the same session follows: it had no effect. An empty piece says that a
        snapshot begins and replaces what came before.
        """

    @abstractmethod
    def close(self) -> None:
        """End the pass."""


class Backend(ABC):
    """A destination. ``open`` it to write; the other calls need no open.

    Attributes:
        url: as the operator wrote it.
        version: data_version of the backup; valid once open.
        rewindable: whether the last record is a change that may be taken back.
        version_count: changes since the snapshot, and one for the snapshot.
        medium: what a slow call waits for, in words.
        scratch_prefix: how the path of a scratch file begins, or None if anywhere.
    """

    medium = "the disk"
    scratch_prefix: str | None = None

    def __init__(self, url: str) -> None:
        self.url = url
        self.version = 0
        self.rewindable = False
        self.version_count = 0

    @property
    def prev_version(self) -> int:
        """The version before the last change, or ``version`` if that cannot be rewound."""
        return self.version - 1 if self.rewindable else self.version

    @abstractmethod
    def require_absent(self) -> None:
        """Raise BackupExists, or what else stands in the way of ``create``."""

    @abstractmethod
    def create(self, snapshot: Snapshot | None) -> None:
        """Make a new backup, empty or of a snapshot; BackupExists if one is there."""

    @abstractmethod
    def open(self) -> None:
        """Become the writer: know the newest record and that it is durable."""

    @abstractmethod
    def add_change(self, change: Change) -> None:
        """Store a transaction whose base is ``version``; returns when it is durable."""

    @abstractmethod
    def rewind(self) -> None:
        """Take back the last change, durably; only if ``rewindable``."""

    @abstractmethod
    def replace(self, snapshot: Snapshot) -> str | None:
        """Start over with ``snapshot``; where the old backup is kept, None if it was empty."""

    @abstractmethod
    def read(self) -> Reading:
        """Begin a pass over the backup."""

    @abstractmethod
    def status(self) -> Status:
        """Look at the backup without changing a byte."""

    @abstractmethod
    def close(self) -> None:
        """Give up the writer's place."""


class Session:
    """The changes of one lightningd process, held to the version rule.

    Args:
        backend: open for writing.
        lightning_dir: the node's network directory, for the next steps named in errors.
    """

    def __init__(self, backend: Backend, lightning_dir: str) -> None:
        self._backend = backend
        self._dir = lightning_dir
        self._first = True

    def write(self, change: Change) -> None:
        """Store ``change``; returns when it is durable.

        Raises:
            OutOfDate, LostState: the change does not continue the backup.
            BackupError: it could not be stored.
        """
        backend = self._backend
        verdict = judge(change.base, backend.version, backend.rewindable, self._first)
        if self._first:
            log.info(
                f"Comparing backup version {backend.version} with the node's version"
                f" {change.base} before its first write"
            )
        if verdict is Verdict.OUT_OF_DATE:
            raise OutOfDate(backend.version, change.base, self._dir)
        if verdict is Verdict.LOST_STATE:
            raise LostState(backend.version, change.base, backend.url)
        if verdict is Verdict.REWIND:
            log.info("Last changes not applied, rewinding non-committed transaction")
            backend.rewind()
        elif self._first:
            log.info("Versions match up")
        self._first = False
        backend.add_change(change)
