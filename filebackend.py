"""A backup in a local file of layout 2 (filelog/layout2.py): create, append, rewind, replace."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence

import durable
import scratch
from backend import (
    NOBODY,
    TAG_SIZE,
    Backend,
    Change,
    Reading,
    Snapshot,
    Status,
    chain_after,
    new_session,
)
from errors import CLI, BackupBusy, BackupError, BackupExists, ConfigError, Damaged, DiskError
from filelog import adoption, appender, following, former, layout1, layout2, look, proof
from filelog.appender import LogAppender
from filelog.layout2 import BEFORE_FIRST, Head, Kind, TailKind
from filelog.reader import FileReading, LogReader, is_foreign_keys_off
from filelog.writer import FLUSH_STEP, SMALL_FLUSH_STEP, LogWriter, copy_log, write_log
from quorum import Roster
from replica import Look, Pause


def parse_file_url(url: str) -> str:
    """The absolute path in ``file:///path``; ConfigError says what is wrong with another."""
    path = url.removeprefix("file://")
    if path == url or not path.startswith("/") or "\0" in path or path.endswith("/"):
        raise ConfigError(
            f"{url!r} is not of the form file:///path/to/file.",
            f"Name a file in it, such as {shlex.quote(url + 'node.bkp')}."
            if path.startswith("/") and path.endswith("/")
            else "Behind file:// comes an absolute path, with a / of its own and no ~.",
        )
    return path


def _sound(reader: LogReader) -> Iterator[tuple[Head, bytes]]:
    yield from reader
    if reader.damage is not None:
        raise reader.damage


class FileBackend(Backend):
    """A destination ``file:///path``.

    Args:
        url: ``file:///path``; ConfigError if it is not of that form.

    Attributes:
        newest: head of the last record, layout2.BEFORE_FIRST if there is none; once open.
        damage: what keeps changes from it, where it is open all the same.
    """

    can_be_served = True
    snapshot_copies = 2  # The new log is one, too.
    newest: Head = BEFORE_FIRST

    def __init__(self, url: str) -> None:
        super().__init__(url)
        # A rename would replace a symbolic link, not the file that it stands for.
        self.path = os.path.realpath(parse_file_url(url))
        self.directories = (os.path.dirname(self.path),)
        self.scratch_prefix: str = f"{self.path}.scratch-"
        self._lock: durable.WriterLock | None = None
        self._log: LogAppender | None = None
        self.damage: Damaged | None = None
        self._log_start = layout2.FIRST_RECORD
        self._session = new_session(NOBODY)

    # A new file

    def require_absent(self) -> None:
        """See Backend."""
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            raise ConfigError(f"The directory {directory} does not exist.", "Create or mount it.")
        if os.path.lexists(self.path):
            raise BackupExists(self.path, self._what_is_there())

    def create(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, changes: Sequence[Change] = ()
    ) -> None:
        """See Backend."""
        self.require_absent()
        with self._locked():
            try:
                beside = f"{self.scratch_prefix}log"
                self.build(beside, snapshot, owner, changes)
                durable.publish(beside, self.path)
            except BaseException as error:
                durable.discard(f"{self.scratch_prefix}log")
                durable.discard(f"{self.path}.writer")  # There is no backup that it is for.
                if isinstance(error, OSError):
                    raise DiskError(self.path, error, "create") from error
                raise

    def _what_is_there(self) -> str:
        try:
            found = f"It is a backup at version {self.status().version}."
        except BackupError as error:
            if not os.path.isfile(self.path):
                return str(error)
            found = error.problem
        return f"{found} Choose another name, or run `{CLI} attach` to go on with it."

    def replace(
        self,
        snapshot: Snapshot | None,
        owner: bytes = NOBODY,
        changes: Sequence[Change] = (),
        *,
        override: bool = False,
    ) -> str | None:
        """See Backend. A file takes any state, whosever it was: it is on the caller to compare.

        Args:
            changes: what follows the snapshot, so that the last of it can be rewound.
        """
        with self._locked():
            beside = f"{self.scratch_prefix}log"
            try:
                self.build(beside, snapshot, owner, changes)
                return self.put(beside)
            finally:
                durable.discard(beside)

    def take_all(self, records: Iterator[tuple[Head, bytes]], owner: bytes) -> str | None:
        """See replica.Replica."""
        beside = f"{self.scratch_prefix}log"
        try:
            durable.remove(beside)
            copy_log(beside, records, self.path, SMALL_FLUSH_STEP)
            return self.put(beside)
        except OSError as error:
            raise DiskError(self.path, error, "replace") from error
        finally:
            durable.discard(beside)

    def put(self, beside: str) -> str | None:
        """Go on with the file ``beside``, which ``build`` wrote; as ``replace``, once open."""
        kept = None
        try:
            if not self._is_empty():
                kept = former.new_name(self.path)
                # Before the rename, which would free it: a crash leaves both names.
                durable.keep(self.path, kept)
            self._put_in_place(beside)
        except BaseException as error:
            if kept is not None and os.path.lexists(beside):
                durable.unkeep(self.path, kept)  # The old file is the backup still.
            if isinstance(error, OSError):
                raise DiskError(self.path, error, "replace") from error
            raise
        return kept

    def _put_in_place(self, beside: str) -> None:
        try:
            durable.replace(beside, self.path)
        except OSError as error:
            failure = DiskError(self.path, error, "replace")
            # Which of the two files a restart finds is not known: nothing more is appended.
            if self._log is not None:
                self._log.fail(failure)
            raise failure from error
        if self._lock is None:
            return
        if self._log is not None:
            self._log.close()
        try:
            self._load()
        except BackupError as error:
            # The old log is not at its place any more, so it may not go on either.
            if self._log is not None:
                problem = OSError(errno.EIO, error.problem)
                self._log.fail(DiskError(self.path, problem, "go on with"))
            raise

    def _is_empty(self) -> bool:
        return not layout1.is_layout_1(self.path) and look.is_empty(self.path)

    def build(
        self,
        beside: str,
        snapshot: Snapshot | None,
        owner: bytes,
        changes: Sequence[Change] = (),
    ) -> None:
        """Write a complete, flushed, verified file ``beside`` the log.

        Raises:
            DiskError, Damaged.
        """
        try:
            durable.remove(beside)
            like = self.path if os.path.exists(self.path) else self.home
            # Of one that is open a node may wait for the same disk.
            step = FLUSH_STEP if self._lock is None else SMALL_FLUSH_STEP
            write_log(beside, snapshot, owner, platform.node(), changes, like, step)
        except OSError as error:
            raise DiskError(self.path, error, "write a new file beside") from error

    def begin_log(self, beside: str) -> LogWriter:
        """A new file ``beside`` the log, to be written while that one is in use.

        Raises:
            OSError.
        """
        durable.remove(beside)
        return LogWriter(beside, secrets.token_bytes(16), 0, SMALL_FLUSH_STEP, like=self.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._lock is not None:
            yield
            return
        lock = durable.WriterLock(self.path, self.home)
        try:
            with contextlib.ExitStack() as held:
                # The log, too: where somebody removed ``.writer``, that lock excludes nobody.
                if os.path.exists(self.path):
                    held.enter_context(contextlib.closing(appender.lock_log(self.path)))
                scratch.clear(self.scratch_prefix, writers=True)
                yield
        finally:
            lock.release()

    # Writing

    def open(self, owner: bytes | None = None, though_damaged: bool = False) -> None:
        """See Backend.

        Args:
            though_damaged: take the writer's place also if it is damaged: only ``put`` may
                come then.

        Raises:
            BackupMissing, BackupBusy, Damaged, OtherOwner, UnsupportedLayout, DiskError.
        """
        LogReader(self.path).close()  # Refuse what is no backup before a lock is made.
        try:
            self._lock = durable.WriterLock(self.path)
        except BackupBusy:
            # Who was shut out must not be told to stop the one that took it over.
            appender.refuse_strangers(self.path, self.url, owner)
            raise
        try:
            scratch.clear(self.scratch_prefix, writers=True)
            try:
                self._load(owner)
            except Damaged as error:
                if not though_damaged:
                    raise
                self._stay_damaged(error)
        except BaseException:
            self.close()
            raise

    def _stay_damaged(self, damage: Damaged) -> None:
        """Know what the file says of its owner and its newest version, also behind ``damage``."""
        with contextlib.closing(LogReader(self.path)) as reader:
            if reader.rules != layout2.RULES:
                raise reader.of_old_rules()
            seen = reader.newest_anywhere() or BEFORE_FIRST
            self.newest = seen._replace(backup_id=reader.backup_id or seen.backup_id)
            self._log_start = reader.log_start or layout2.FIRST_RECORD
        self.damage, self.version, self.rewindable = damage, self.newest.version, False
        self.version_count = self.newest.changes + (self._log_start > layout2.FIRST_RECORD)

    def _load(self, owner: bytes | None = None) -> None:
        self._log = appender.open_log(self.path, self.url, owner)
        self.damage = None
        self._session = self._log.newest.tag + self._session[TAG_SIZE:]
        self.unsound = proof.read(self.path, self._log.newest.backup_id).unsound
        self._settle()

    @property
    def _open_log(self) -> LogAppender:
        assert self._log is not None, "open comes first"
        return self._log

    def _settle(self) -> None:
        """Move the state in memory: only after the disk did."""
        log = self._log
        assert log is not None
        # Copies: what works beside the node may still ask when this is closed.
        newest, self._log_start = log.newest, log.log_start
        self.newest = newest
        self.version, self.rewindable = newest.version, newest.rewindable
        self.version_count = newest.changes + (self._log_start > layout2.FIRST_RECORD)

    def add_change(self, change: Change) -> None:
        """See Backend."""
        self._open_log.add_change(change, self._session)
        self._settle()

    def rewind(self) -> None:
        """See Backend."""
        self._open_log.rewind(self._session)
        self._settle()

    def take_over(self, owner: bytes) -> None:
        """See Backend."""
        self.add_owner(owner, layout2.encode_owner(time.time_ns(), platform.node()))

    def add_owner(self, owner: bytes, payload: bytes) -> None:
        """``take_over`` with the payload of the record (see layout2.encode_owner)."""
        self._open_log.add_owner(owner, payload)
        self._settle()
        self.begin_session()

    def add_record(self, head: Head, payload: bytes) -> None:
        """Store a change, a rewind or an owner as another log holds it: see LogAppender."""
        if head.kind == Kind.OWNER:
            return self.add_owner(head.session, payload)
        self._open_log.add_record(head, payload)
        self._settle()

    @property
    def size(self) -> int:
        """Offset of the log's end."""
        return self.newest.end

    def add_payload(self, version: int, payload: bytes, bumps: bool) -> None:
        """``add_change`` without its statements: see backend.payload_bumps."""
        newest = self.newest
        head = layout2.behind(
            newest,
            len(payload),
            kind=Kind.CHANGE,
            flags=layout2.BUMPS if bumps else 0,
            version=version,
            time_ns=time.time_ns(),
            session=self._session,
            chain=chain_after(newest.chain, version, payload),
        )
        self.add_record(head, payload)

    def is_last(self, version: int, payload: bytes) -> bool:
        """Whether a change is, by content, the last record: a repeat of it is known."""
        newest = self.newest
        if (newest.kind, newest.version, newest.length) != (Kind.CHANGE, version, len(payload)):
            return False
        return newest.chain == chain_after(newest.chain_before, version, payload)

    def begin_session(self) -> None:
        """Another client writes from here on.

        Right after a PRAGMA foreign_keys = OFF it goes on with the session before: a node
        that restarted sends OFF again, so this one has only reconnected.
        """
        newest = self.newest
        goes_on = is_foreign_keys_off(newest)
        self._session = newest.session if goes_on else new_session(newest.session)

    @property
    def log_size(self) -> int:
        """Bytes of the records since the snapshot."""
        return self.size - self._log_start

    @property
    def snapshot_size(self) -> int:
        """Bytes of the SQLite file that the log starts with."""
        return layout2.snapshot_size(self._log_start)

    def statistics(self) -> dict[str, int]:
        """What existing tools know of a backup's size, in bytes and entries."""
        return {"backupsize": self.size, "version_count": self.version_count}

    def adopt(self, path: str, copied: int, last: int) -> None:
        """Go on with the compacted log ``path`` in place of this one: see adoption.adopt."""
        if self._log is None:
            raise BackupError(f"{self.path} was closed meanwhile.")
        self._log = adoption.adopt(self._open_log, path, copied, last)
        self._settle()

    def close(self) -> None:
        """See Backend."""
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # What commands ask

    def scratch_paths(self, chosen: str | None, otherwise: str | None = None) -> str:
        """See Backend."""
        if chosen:
            return os.path.join(chosen, os.path.basename(self.scratch_prefix))
        return self.scratch_prefix

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See Backend. Nobody writes to a file of an old layout."""
        if self.is_old():
            yield
            return
        with contextlib.closing(self):
            self.open()
            yield

    def checking(self) -> contextlib.AbstractContextManager[None]:
        """See Backend."""
        return proof.checking(self.path) if self._is_checked() else contextlib.nullcontext()

    def note_proven(self) -> None:
        """See Backend."""
        if self._is_checked():
            with contextlib.suppress(OSError), contextlib.closing(LogReader(self.path)) as reader:
                if reader.backup_id is not None:
                    proof.note(self.path, reader.backup_id, **proof.proven_now())
                    former.prune(self.path)

    def _is_checked(self) -> bool:
        return os.path.exists(self.path + proof.SUFFIX)

    def named_version(self) -> int:
        """See Backend."""
        return layout1.header_version(self.path) if layout1.is_layout_1(self.path) else 0

    def is_old(self) -> bool:
        """See Backend."""
        if layout1.is_layout_1(self.path):
            return True
        with contextlib.closing(LogReader(self.path)) as reader:
            return reader.rules != layout2.RULES

    # Looking

    def look(self) -> Look:
        """See replica.Replica."""
        with contextlib.closing(LogReader(self.path)) as reader:
            newest, tail = reader.settled()
            if reader.rules != layout2.RULES:
                raise reader.of_old_rules()
            if tail.kind is TailKind.DAMAGED:
                reader.last = newest
                raise reader.as_damage(tail.offset, tail.reason)
            last = newest or BEFORE_FIRST
            has_snapshot = (reader.log_start or 0) > layout2.FIRST_RECORD
            return Look(reader.backup_id or b"", last, last.changes + has_snapshot)

    def roster(self) -> Roster | None:
        """See replica.Replica."""
        with contextlib.closing(LogReader(self.path)) as reader:
            return reader.roster()

    @contextlib.contextmanager
    def records(self) -> Iterator[Iterator[tuple[Head, bytes]]]:
        """See replica.Replica."""
        with contextlib.closing(LogReader(self.path)) as reader:
            yield _sound(reader)

    @contextlib.contextmanager
    def follow(self, after: Head | None) -> Iterator[Iterator[tuple[Head, bytes] | Pause]]:
        """See replica.Replica."""
        follower = following.LogFollower(self.path, after)
        with contextlib.closing(follower.records()) as records:
            yield (Pause(self.url, follower.last) if each is None else each for each in records)

    def read(self) -> Reading:
        """See Backend."""
        if layout1.is_layout_1(self.path):
            return layout1.Layout1Reading(self.path)
        return FileReading(self.path)

    def status(self, check: bool = False) -> Status:
        """See Backend. A file of layout 1 is read in full in any case."""
        if layout1.is_layout_1(self.path):
            return layout1.status(self.url, self.path)
        return look.status(self.url, self.path, check)
