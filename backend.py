"""What every destination of a backup has in common: changes, the version rule, the chain."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import logging
import operator
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from decisions import Verdict, judge
from errors import CLI, BackupError, InvalidChange, LostState, OutOfDate
from quorum import Roster

RELEASE = "1.0.0"
log = logging.getLogger("backup")
NOTICE = 25
"""Log level between INFO and WARNING, as syslog has it."""

Progress = Callable[[int, int], None]
"""Takes bytes done and in all."""

MAX_VERSION = 2**32 - 1
"""data_version is a u32 in the hook."""
MAX_CHANGE_SIZE = 1 << 30
"""Bytes of one change's payload.

The largest seen in service is 400 kB, but a migration of lightningd's bookkeeper writes 385
bytes for each of its events at once: 270 MB for a node with 350,000 forwards. The plugin takes
3.3 times the size in memory, 5.3 times where an emoji is in it, 8.3 times where one is in each
statement, and one more for a server's backup; a restore takes 4.3 times. So 8 GiB bear it.
"""
MAX_STATEMENTS = 1 << 22
"""Statements of one change: each costs some 60 bytes of memory more, however short it is."""
JOINED_AT_ONCE = 1 << 12
"""Statements that are made into one string."""
MAX_CHUNK_SIZE = 1 << 20
"""Bytes of one piece of a snapshot."""
# The memory of each piece comes page by page from the kernel, which takes longer than copying
# it, until glibc has seen a larger block freed: from then on it keeps what pieces leave.
bytes(8 * MAX_CHUNK_SIZE)
CHAIN_SIZE = 16
EMPTY_CHAIN = bytes(CHAIN_SIZE)
"""The chain of a backup that holds nothing yet."""
NOBODY = bytes(16)
"""The owner of a backup that no node has claimed yet."""
TAG_SIZE = 8
"""Bytes of the owner with which every session begins."""
OVER_2 = b"rec2"
"""Stands behind the tag in sessions of nobody over protocol 2."""
FOREIGN_KEYS_OFF = "PRAGMA foreign_keys = OFF;"
FOREIGN_KEYS_ON = "PRAGMA foreign_keys = ON;"
NOT_BUMPING = (FOREIGN_KEYS_OFF.encode(), FOREIGN_KEYS_ON.encode())
"""Payloads. In every release all other changes end with the statement that raises data_version."""

_is_pragma = operator.methodcaller("startswith", "PRAGMA")


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
        snapshot: a piece of 1 byte to 1 MiB of an SQLite file, in order, or None.
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
        _check_version(self.version)
        if (self.snapshot is None) == (self.transaction is None):
            raise InvalidChange("A change is either a piece of a snapshot or a transaction.")
        if self.snapshot is not None:
            if not 0 < len(self.snapshot) <= MAX_CHUNK_SIZE:
                raise InvalidChange(
                    f"A piece of a snapshot has {len(self.snapshot)} bytes;"
                    f" the limit is {MAX_CHUNK_SIZE}, and none is empty."
                )
            self._derive(self.snapshot)
        else:
            assert self.transaction is not None
            self._derive(_payload(self.version, self.transaction))

    def _derive(self, payload: bytes) -> None:
        object.__setattr__(self, "payload", payload)
        last = self.transaction[-1] if self.transaction else None
        object.__setattr__(self, "bumps", last == bump(self.version))

    @classmethod
    def decode(cls, version: int, payload: bytes) -> Change:
        """The transaction that was stored as ``payload``; InvalidChange if it is none."""
        _check_version(version)
        if len(payload) >= MAX_STATEMENTS:  # A shorter one cannot hold too many.
            _check_count(version, payload.count(b"\0") + 1)
        if len(payload) <= MAX_CHUNK_SIZE:
            statements = _text(version, payload).split("\0")
        else:  # Not as one string: see _join.
            statements = [_text(version, s) for s in payload.split(b"\0")]
        _check_size(version, payload)
        if not all(statements):
            raise _unexecutable(version)
        # Without __init__, which would join them again; all of its rules were looked at.
        change = object.__new__(cls)
        object.__setattr__(change, "version", version)
        object.__setattr__(change, "snapshot", None)
        object.__setattr__(change, "transaction", statements)
        change._derive(payload)
        return change

    @property
    def is_pragma(self) -> bool:
        """Whether it is a call of PRAGMAs alone, which run outside of any transaction."""
        return self.transaction is not None and all(map(_is_pragma, self.transaction))

    @property
    def is_known(self) -> bool:
        """Whether it is of a form that a release of lightningd announces."""
        return self.bumps or self.payload in NOT_BUMPING

    @property
    def base(self) -> int:
        """The version that the database had before this change; only if ``is_known``."""
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
    # In pieces: no other thread runs meanwhile, and a server has other clients.
    starts = range(0, len(payload), MAX_CHUNK_SIZE)
    if len(payload) >= MAX_STATEMENTS:  # A shorter one cannot hold too many.
        nuls = sum(payload.count(b"\0", start, start + MAX_CHUNK_SIZE) for start in starts)
        _check_count(version, nuls + 1)
    if len(payload) > MAX_CHUNK_SIZE or not payload.isascii():
        _check_text(version, payload)
    _check_size(version, payload)
    if not payload or payload.startswith(b"\0") or payload.endswith(b"\0"):
        raise _unexecutable(version)
    if any(payload.find(b"\0\0", start, start + MAX_CHUNK_SIZE + 1) >= 0 for start in starts):
        raise _unexecutable(version)
    last = bump(version).encode()
    return payload.endswith(b"\0" + last) or payload == last


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
        payload = _join(statements)
    except TypeError as error:
        raise InvalidChange(f"The change to version {version} is not a list of strings.") from error
    except UnicodeEncodeError as error:
        raise InvalidChange(f"The change to version {version} is no valid text.") from error
    _check_count(version, len(statements))
    _check_size(version, payload)
    if not all(statements) or payload.count(b"\0") != len(statements) - 1:
        raise _unexecutable(version)
    return payload


def _join(statements: Sequence[str]) -> bytes:
    if len(statements) <= JOINED_AT_ONCE:
        return "\0".join(statements).encode()
    # In one string, a single emoji makes each character of all statements take four bytes.
    starts = range(0, len(statements), JOINED_AT_ONCE)
    return b"\0".join(["\0".join(statements[i : i + JOINED_AT_ONCE]).encode() for i in starts])


def _check_version(version: int) -> None:
    if type(version) is not int or not 0 <= version <= MAX_VERSION:
        raise InvalidChange(f"{version!r:.40} is no data_version between 0 and 2**32 - 1.")


def _check_size(version: int, payload: bytes) -> None:
    if len(payload) > MAX_CHANGE_SIZE:
        raise too_large(
            f"The change to version {version} has {len(payload)} bytes;"
            f" the limit is {MAX_CHANGE_SIZE}."
        )


def too_large(problem: str) -> InvalidChange:
    """The refusal of a change that is too large, and the way out."""
    return InvalidChange(
        problem,
        "If this is a start of the node, as with a migration of its database, start it this once"
        f" without the plugin, stop it, and run `{CLI} resync --lightning-dir DIR`.",
    )


def _unexecutable(version: int) -> InvalidChange:
    return InvalidChange(
        f"The change to version {version} has an empty statement or one with a NUL"
        " byte, which SQLite cannot execute."
    )


def _check_count(version: int, statements: int) -> None:
    if statements > MAX_STATEMENTS:
        raise too_large(
            f"The change to version {version} has {statements} statements;"
            f" the limit is {MAX_STATEMENTS}."
        )


def _text(version: int, payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise InvalidChange(f"The change to version {version} is not UTF-8.") from error


def _check_text(version: int, payload: bytes) -> None:
    """``_text`` in pieces: what it makes of a large payload would fill the memory."""
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(payload)
    try:
        for start in range(0, len(payload), MAX_CHUNK_SIZE):
            decoder.decode(view[start : start + MAX_CHUNK_SIZE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InvalidChange(f"The change to version {version} is not UTF-8.") from error


def utc(time_ns: int) -> str:
    """Unix time in nanoseconds, as an operator reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_ns // 10**9))


def new_owner() -> bytes:
    """A name for the node that may write to a backup: 16 bytes, random."""
    return secrets.token_bytes(len(NOBODY))


def new_session(owner: bytes) -> bytes:
    """A name for one run of a writer: 16 bytes, the first of ``owner``, the others random."""
    return owner[:TAG_SIZE] + secrets.token_bytes(CHAIN_SIZE - TAG_SIZE)


def session_over_2(owner: bytes) -> bytes:
    """``new_session`` for what is written by protocol 2: for nobody as the owner it is marked.

    A server refuses protocol 1 from then on (see ``is_over_2``), also after a restart.
    """
    session = new_session(owner)
    if any(owner[:TAG_SIZE]):
        return session
    return session[:TAG_SIZE] + OVER_2 + session[TAG_SIZE + len(OVER_2) :]


def is_over_2(session: bytes) -> bool:
    """Whether a record of ``session`` came by protocol 2: of an owner, or marked."""
    return any(session[:TAG_SIZE]) or session[TAG_SIZE:].startswith(OVER_2)


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

    Raises:
        InvalidChange: the version is none.
    """

    path: str
    version: int
    chain: bytes = field(default_factory=lambda: secrets.token_bytes(CHAIN_SIZE))

    def __post_init__(self) -> None:
        if not 0 <= self.version <= MAX_VERSION:
            raise InvalidChange(
                f"The database has the data_version {self.version}, which is not between 0 and"
                " 2**32 - 1.",
                "It is damaged, or not lightningd's.",
            )


@dataclass(slots=True)
class Status:
    """What a look at a backup tells; sizes in bytes. None: the destination cannot tell.

    Attributes:
        prev_version: the version that a rewind would lead to, or None if none can.
        version_count: changes since the snapshot, and one for the snapshot.
        last_change_ns: Unix time of the last record, nanoseconds.
        owner: what every session of the owner begins with, in hex; of zeros for nobody.
        last_start_rewound: the last start of the node took a change back, which the node had
            announced, and not committed; None also if that start is too far back.
        torn_tail: an append that was never acknowledged stands at the end.
        checked: all of it was read, not only its end.
        damage: what does not check, or None.
        last_checked_ns: Unix time at which the whole of it was last read beside the node,
            nanoseconds, or None: never, or not known.
        last_proven_ns: Unix time at which it was last replayed, too, and found sound.
        unsound: what a check beside the node found, or None.
        disk_free: free bytes for the writer.
        destinations: all that the backup has, if those are several and it keeps the list.
        acks: how many of them acknowledge a change.
        epoch, votes: of that list, see quorum.Roster.
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
    owner: str | None = None
    last_start_rewound: bool | None = None
    torn_tail: bool = False
    checked: bool = False
    damage: str | None = None
    last_checked_ns: int | None = None
    last_proven_ns: int | None = None
    unsound: str | None = None
    disk_free: int | None = None
    destinations: list[str] = field(default_factory=list)
    acks: int | None = None
    epoch: int | None = None
    votes: bool | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note_list(self, roster: Roster | None) -> None:
        """Say what the list tells that the destination keeps, if it keeps one."""
        if roster is None:
            return
        self.destinations, self.acks = list(roster.urls), roster.acks
        self.epoch, self.votes = roster.epoch, roster.votes
        if not roster.votes:
            urls = " and ".join(roster.urls)
            self.warnings.append(
                f"It is none of the backup's destinations, or not yet: those are {urls}."
            )


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """How one of several destinations does, by what the writer knows.

    Attributes:
        part: in step, lagging or being opened.
        since_ns: Unix time, nanoseconds, from which on it has been that.
        last_error: why it lags, or None.
    """

    url: str
    version: int
    part: str
    since_ns: int
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Beginning:
    """A snapshot begins: what came before it in the pass is replaced, its pieces follow.

    Attributes:
        version: its data_version.
        size: its bytes, or None if unknown.
    """

    version: int
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a pass over a backup went.

    Attributes:
        version: data_version that the whole backup leads to.
        last_change_ns: Unix time of the last record, nanoseconds, or None if unknown.
        torn_tail: an unacknowledged append at the end was left out.
        damage: what stopped the pass before the end, or None.
        notes: what else was found, in words.
    """

    version: int
    last_change_ns: int | None = None
    torn_tail: bool = False
    damage: BackupError | None = None
    notes: tuple[str, ...] = ()


Found = Beginning | Change | Ending
"""A Change is a piece of the snapshot that began last, or a transaction."""


class Step(NamedTuple):
    """One thing that a pass found, and how far the pass is with it.

    Attributes:
        position: bytes up to its end; at an Ending, all that were seen.
        total: bytes in all, or 0 if unknown.
    """

    found: Found
    position: int
    total: int


class Reading(ABC):
    """One pass over a backup: iterate it once, and close it, however far it came."""

    @abstractmethod
    def __iter__(self) -> Iterator[Step]:
        """Each snapshot's Beginning and pieces, the changes that count, and last the Ending.

        A change that a rewind took back is left out, and so is a PRAGMA call that no
        change of the same session follows: it had no effect. What is wrong with the backup
        is not raised: the Ending has it.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back the file, or the connection."""


def outcome(steps: Iterable[Step]) -> Ending:
    """Go through a pass to its end: how it went."""
    found: Found | None = None
    for step in steps:
        found = step.found
    assert isinstance(found, Ending), "a pass ends in one"
    return found


class Backend(ABC):
    """A destination. ``open`` it to write; the other calls need no open.

    Attributes:
        url: as the operator wrote it.
        version: data_version of the backup; valid once open.
        rewindable: whether the last record is a change that may be taken back.
        version_count: changes since the snapshot, and one for the snapshot.
        medium: what a slow call waits for, in words.
        reconnects: how often the way to it was lost and found again since ``open``.
        keeps_owner: it can hold who may write to it; known once it was looked at.
        last_writer: who wrote last and when, in words, as far as it was heard.
        directories: those on this machine in which it keeps its files; none if it is elsewhere.
        unsound: what a check beside the node found, until it is mended or proven wrong.
        home: the node's network directory, if known: what root creates belongs to its owner.
        can_be_served: `server` can keep it, so that an empty one can be made without a node.
        snapshot_copies: copies of a snapshot that ``create`` takes of the disk where scratch
            files are, with the snapshot itself.
    """

    medium = "the disk"
    directories: Sequence[str] = ()
    can_be_served = False
    keeps_owner = True
    snapshot_copies = 1

    def __init__(self, url: str) -> None:
        self.url = url
        self.version = 0
        self.rewindable = False
        self.version_count = 0
        self.reconnects = 0
        self.last_writer = ""
        self.unsound: str | None = None
        self.home: str | None = None

    @property
    def prev_version(self) -> int:
        """The version before the last change, or ``version`` if that cannot be rewound."""
        return self.version - 1 if self.rewindable else self.version

    @abstractmethod
    def require_absent(self) -> None:
        """Raise BackupExists, or what else stands in the way of ``create``."""

    @abstractmethod
    def create(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, changes: Sequence[Change] = ()
    ) -> None:
        """Make a new backup, empty or of a snapshot; BackupExists if one is there.

        Args:
            owner: who may write to it, 16 bytes.
            changes: what follows the snapshot, so that the last of it can be rewound.
        """

    @abstractmethod
    def open(self, owner: bytes | None = None) -> None:
        """Become the writer: know the newest record and that it is durable.

        Args:
            owner: who writes; OtherOwner if the backup is not his. None: whose it is does
                not matter.
        """

    @abstractmethod
    def take_over(self, owner: bytes) -> None:
        """Let ``owner`` write from here on, durably, and nobody else; only once open."""

    @abstractmethod
    def add_change(self, change: Change) -> None:
        """Store a transaction whose base is ``version``; returns when it is durable."""

    @abstractmethod
    def rewind(self) -> None:
        """Take back the last change, durably; only if ``rewindable``."""

    @abstractmethod
    def replace(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, *, override: bool = False
    ) -> str | None:
        """Start over with ``snapshot``, or empty, and go on with it if open.

        Args:
            owner: who may write to it from then on.
            override: also if a server keeps another owner's backup, another node's, or a newer
                state: what is there is somebody else's.

        Returns:
            Where the old backup is kept, None if it was empty.
        """

    @abstractmethod
    def read(self) -> Reading:
        """Begin a pass over the backup."""

    @abstractmethod
    def status(self, check: bool = False) -> Status:
        """Look at the backup without changing a byte.

        Args:
            check: read and check all of it, not only its end.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up the writer's place."""

    # What commands ask

    def scratch_paths(self, chosen: str | None, otherwise: str | None = None) -> str:
        """How the paths of scratch files begin: in ``chosen``, by default beside the backup.

        Args:
            otherwise: the directory for a backup that is elsewhere; None: the current one.
        """
        return os.path.join(chosen or otherwise or os.getcwd(), "backup.scratch-")

    @contextlib.contextmanager
    def at_hand(self, prefix: str, progress: Progress) -> Iterator[Callable[[], Reading]]:
        """``read``, as often as wanted, and however slowly: what is elsewhere is fetched first.

        Args:
            prefix: how the path of the copy begins. It stays after an error: the next call goes
                on with it.
            progress: called with bytes fetched, and in all.
        """
        yield self.read

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep writers away while it is copied, as far as the destination can."""
        return contextlib.nullcontext()

    def checking(self) -> contextlib.AbstractContextManager[None]:
        """Be the only one who checks all of it, if checks of a node are known of."""
        return contextlib.nullcontext()

    @abstractmethod
    def note_proven(self) -> None:
        """Remember that it was proven to restore, if a node's checks are remembered already."""

    @abstractmethod
    def is_old(self) -> bool:
        """Whether it is of a layout that is read, but not written any more.

        Raises:
            ConfigError: that is for the server to tell, who keeps it.
        """

    def named_version(self) -> int:
        """The version that the header of an old one names, 0 if it names none."""
        return 0


class Destination(Backend):
    """A Backend with the work that is done beside the node.

    That work needs a Backend, so it stands above those: see destinations.
    """

    @abstractmethod
    def keep_house(
        self, lock: threading.Lock, least: int | None, turn: threading.Lock | None = None
    ) -> None:
        """Compact and check it when it is time, as far as that is not done elsewhere.

        Args:
            lock: held by whoever changes the backup, which is open.
            least: bytes of changes from which on it is compacted, or None: never.
            turn: held by whoever compacts by himself, where several do not at once.
        """

    @abstractmethod
    def compact(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """Make it small now; of one that is open only if its house is kept.

        Args:
            progress: called with bytes done and in all, if they are known.

        Returns:
            ``{"before": {"backupsize", "version_count"}, "after": {...}}``, sizes in bytes.
        """

    def members(self) -> list[MemberStatus]:
        """How each of several does, if it is several and open."""
        return []

    @abstractmethod
    def rebuild(self, owner: bytes, progress: Progress) -> str | None:
        """Replace an old one by one of today's layout with the same content.

        Args:
            owner: who may write to it, 16 bytes.
            progress: called now and then with bytes read of the old one, and in all.

        Returns:
            Where the old one is kept.

        Raises:
            BackupError: it is damaged or does not replay; it stays as it is.
        """


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
            InvalidChange: it is of no known form, so that its base is not known either.
            OutOfDate, LostState: the change does not continue the backup.
            BackupError: it could not be stored.
        """
        backend = self._backend
        if not change.is_known:
            assert change.transaction
            raise InvalidChange(
                "This lightningd announces changes in a form that is not known: the one to version"
                f" {change.version} ends with {change.transaction[-1][-100:]!r}.",
                "Look for a newer release of this plugin; until then run the lightningd release"
                " that ran before.",
            )
        verdict = judge(change.base, backend.version, backend.rewindable, self._first)
        if self._first:
            log.info(
                f"Comparing backup version {backend.version} with the node's version"
                f" {change.base} before its first write"
            )
        if verdict is Verdict.OUT_OF_DATE:
            raise OutOfDate(backend.version, change.base, self._dir)
        if verdict is Verdict.LOST_STATE:
            raise LostState(backend.version, change.base, backend.url, backend.last_writer)
        if verdict is Verdict.REWIND:
            log.info("Last changes not applied, rewinding non-committed transaction")
            backend.rewind()
        elif self._first:
            log.info("Versions match up")
        self._first = False
        backend.add_change(change)
