"""A backup in a local file of layout 2 (filelog/layout2.py): create, append, rewind, replace."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shlex
import shutil
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
    log,
    new_session,
)
from decisions import may_write
from errors import (
    CLI,
    BackupBusy,
    BackupError,
    BackupExists,
    ConfigError,
    Damaged,
    DiskError,
    OtherOwner,
)
from filelog import kept, layout1, layout2, proof
from filelog.layout2 import BEFORE_FIRST, Head, Kind, Tail, TailKind
from filelog.reader import FileReading, LogReader, is_foreign_keys_off
from filelog.writer import LogWriter, check_log

RETRY_FOR_S = 60.0
"""How long a failing write is tried again before the change is refused."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
LOW_DISK_BYTES = 512 << 20
COMPACTION_FACTOR = 2
"""A compaction replays into a database and writes that into a new log, beside the old one."""


def parse_file_url(url: str) -> str:
    """The absolute path in ``file:///path``; ConfigError says what is wrong with another."""
    path = url.removeprefix("file://")
    if path == url or not path.startswith("/") or "\0" in path or path.endswith("/"):
        raise ConfigError(
            f"{url!r} is not of the form file:///path/to/file.",
            f"Name a file in it, such as {shlex.quote(url + 'node.bkp')}."
            if path.startswith("/") and path.endswith("/")
            else "",
        )
    return path


def write_log(
    path: str, snapshot: Snapshot | None, owner: bytes, machine: str, like: str | None = None
) -> None:
    """Write a new log of ``snapshot`` (or an empty one) to the new file ``path``, flushed.

    Args:
        owner: who may write to it, 16 bytes, on ``machine``.
        like: see durable.create.
    """
    size = os.path.getsize(snapshot.path) if snapshot else 0
    writer = LogWriter(path, secrets.token_bytes(16), size, like=like)
    try:
        if snapshot is not None:
            begin = BEFORE_FIRST._replace(
                version=snapshot.version,
                time_ns=time.time_ns(),
                session=owner,
                chain=snapshot.chain,
            )
            writer.add_snapshot(snapshot.path, begin)
        if owner != NOBODY:
            writer.add_owner(owner, layout2.encode_owner(time.time_ns(), machine))
        writer.finish()
    finally:
        writer.close()


class FileBackend(Backend):
    """A destination ``file:///path``.

    Args:
        url: ``file:///path``; ConfigError if it is not of that form.
    """

    can_be_served = True
    snapshot_copies = 2  # The new log is one, too.

    def __init__(self, url: str) -> None:
        super().__init__(url)
        # A rename would replace a symbolic link, not the file that it stands for.
        self.path = os.path.realpath(parse_file_url(url))
        self.directories = (os.path.dirname(self.path),)
        self.scratch_prefix: str = f"{self.path}.scratch-"
        self._lock: durable.WriterLock | None = None
        self._file: durable.LogFile | None = None
        self._log_start = layout2.FIRST_RECORD
        self._newest = BEFORE_FIRST
        self._end = layout2.FIRST_RECORD
        self._session = new_session(NOBODY)
        self._failed: DiskError | None = None

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
                durable.publish(self._build(snapshot, owner, changes), self.path)
            except BaseException as error:
                durable.discard(f"{self.scratch_prefix}log")
                durable.discard(f"{self.path}.writer")
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
        machine: str | None = None,
    ) -> str | None:
        """See Backend.

        Args:
            changes: what follows the snapshot, so that the last of it can be rewound.
            machine: whose node it is, by default this one.
        """
        with self._locked():
            beside, kept = f"{self.scratch_prefix}log", None
            try:
                self._build(snapshot, owner, changes, machine)
                if not self._is_empty():
                    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
                    kept = durable.free_name(f"{self.path}.old-{stamp}")
                    durable.keep(self.path, kept)
                self._put_in_place(beside)
            except BaseException as error:
                if kept is not None and os.path.lexists(beside):
                    durable.unkeep(self.path, kept)  # The old file is the backup still.
                if isinstance(error, OSError):
                    raise DiskError(self.path, error, "replace") from error
                raise
            finally:
                durable.discard(beside)
        return kept

    def _put_in_place(self, beside: str) -> None:
        try:
            durable.replace(beside, self.path)
        except OSError as error:
            # Which of the two files a restart finds is not known: nothing more is appended.
            self._failed = DiskError(self.path, error, "replace")
            raise self._failed from error
        if self._file is None:
            return
        self._file.close()
        try:
            self._load()
        except BackupError as error:
            problem = OSError(errno.EIO, error.problem)
            self._failed = DiskError(self.path, problem, "go on with")
            raise

    def _is_empty(self) -> bool:
        if layout1.is_layout_1(self.path):
            return False
        reader = LogReader(self.path)
        try:
            newest, tail = reader.newest()
        except Damaged:
            return False
        finally:
            reader.close()
        return newest is None and tail.kind is TailKind.CLEAN

    def _build(
        self,
        snapshot: Snapshot | None,
        owner: bytes,
        changes: Sequence[Change] = (),
        machine: str | None = None,
    ) -> str:
        """Write a complete, flushed, verified file beside the log; returns its name."""
        beside = f"{self.scratch_prefix}log"
        durable.remove(beside)
        like = self.path if os.path.exists(self.path) else self.home
        write_log(beside, snapshot, owner, machine or platform.node(), like)
        if changes:
            with contextlib.closing(FileBackend(f"file://{beside}")) as new:
                new._load()
                for change in changes:
                    new.add_change(change)
        check_log(beside)
        return beside

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._lock is not None:
            yield
            return
        lock = durable.WriterLock(self.path, self.home)
        try:
            with contextlib.ExitStack() as held:
                if os.path.exists(self.path):
                    held.enter_context(contextlib.closing(self._lock_log()))
                scratch.clear(self.scratch_prefix, writers=True)
                yield
        finally:
            lock.release()

    def _lock_log(self) -> durable.LogFile:
        """The log, locked: whoever lost its ``.writer`` may still hold it."""
        try:
            return durable.LogFile(self.path)
        except BlockingIOError as error:
            raise BackupBusy(self.path, "") from error
        except OSError as error:
            raise DiskError(self.path, error, "open for writing") from error

    # Writing

    def open(self, owner: bytes | None = None) -> None:
        """See Backend.

        Raises:
            BackupMissing, BackupBusy, Damaged, OtherOwner, UnsupportedLayout, DiskError.
        """
        LogReader(self.path).close()  # Refuse what is no backup before a lock is made.
        self._lock = durable.WriterLock(self.path)
        try:
            scratch.clear(self.scratch_prefix, writers=True)
            self._load(owner)
        except BaseException:
            self.close()
            raise

    def _load(self, owner: bytes | None = None) -> None:
        reader = LogReader(self.path)
        try:
            newest, tail = reader.newest()
            if reader.rules != layout2.RULES:
                raise reader.of_old_rules()
            if tail.kind is TailKind.DAMAGED:
                reader.last = newest
                raise reader.as_damage(tail.offset, tail.reason)
            last = newest or BEFORE_FIRST._replace(backup_id=reader.backup_id or b"")
            if not may_write(last.tag, owner):
                raise OtherOwner(self.url, reader.taken_over())
            self._make_durable(newest, tail, reader)
            self._end = tail.offset
            assert reader.log_start is not None
            self._log_start = reader.log_start
            self._session = last.tag + self._session[TAG_SIZE:]
            self.unsound = proof.read(self.path, reader.backup_id).unsound
            self._settle(last)
        except OSError as error:
            raise DiskError(self.path, error, "open for writing") from error
        finally:
            reader.close()

    def _make_durable(self, newest: Head | None, tail: Tail, reader: LogReader) -> None:
        self._file = self._lock_log()
        if tail.kind is TailKind.TORN:
            aside = self._file.copy_tail(tail.offset, f"{self.path}.torn-{tail.offset}")
            log.warning(
                f"{self.path}: an append that was never acknowledged stood at offset"
                f" {tail.offset} ({tail.reason}); moved to {aside}"
            )
        # What the page cache shows may never have reached the disk: write it again, the
        # zeros behind it too, or a tail that was cut could stand there again.
        start = newest.offset if newest else 0
        self._file.rewrite(start, reader.pread(start, tail.offset - start))

    def _settle(self, newest: Head) -> None:
        self._newest = newest
        self.version, self.rewindable = newest.version, newest.rewindable
        self.version_count = newest.changes + (self._log_start > layout2.FIRST_RECORD)

    def add_change(self, change: Change) -> None:
        """See Backend."""
        assert change.base == self.version, "the version rule comes first"
        self._append(
            change.payload,
            kind=Kind.CHANGE,
            flags=layout2.BUMPS if change.bumps else 0,
            version=change.version,
            time_ns=time.time_ns(),
            session=self._session,
            chain=chain_after(self._newest.chain, change.version, change.payload),
        )

    def rewind(self) -> None:
        """See Backend."""
        assert self.rewindable, "the version rule comes first"
        self._append(
            b"",
            kind=Kind.REWIND,
            flags=0,
            version=self._newest.version - 1,
            time_ns=time.time_ns(),
            session=self._session,
            chain=self._newest.chain_before,
        )

    def take_over(self, owner: bytes) -> None:
        """See Backend."""
        self.add_owner(owner, layout2.encode_owner(time.time_ns(), platform.node()))

    def add_owner(self, owner: bytes, payload: bytes) -> None:
        """``take_over`` with the payload of the record (see layout2.encode_owner)."""
        self._put(layout2.owner_behind(self._newest, owner, payload), payload)
        self.begin_session()

    def add_record(self, head: Head, payload: bytes) -> None:
        """Store a change or a rewind as another log holds it; returns when it is durable.

        Args:
            head: continues this log: its chain before is this log's, and the version rule
                holds.
        """
        assert head.chain_before == self._newest.chain, "the chain is compared first"
        self._append(
            payload,
            kind=head.kind,
            flags=head.flags,
            version=head.version,
            time_ns=head.time_ns,
            session=head.session,
            chain=head.chain,
        )

    @property
    def newest(self) -> Head:
        """Head of the last record; layout2.BEFORE_FIRST if there is none."""
        return self._newest

    @property
    def size(self) -> int:
        """Offset of the log's end."""
        return self._end

    def is_last(self, change: Change) -> bool:
        """Whether ``change`` is, by content, the last record: a repeat of it is known."""
        newest = self._newest
        return newest.kind == Kind.CHANGE and newest.chain == chain_after(
            newest.chain_before, change.version, change.payload
        )

    def begin_session(self) -> None:
        """Another client writes from here on.

        Right after a PRAGMA foreign_keys = OFF it goes on with the session before: a node
        that restarted sends OFF again, so this one has only reconnected.
        """
        newest = self._newest
        goes_on = is_foreign_keys_off(newest)
        self._session = newest.session if goes_on else new_session(newest.session)

    def _append(
        self,
        payload: bytes,
        *,
        kind: int,
        flags: int,
        version: int,
        time_ns: int,
        session: bytes,
        chain: bytes,
    ) -> None:
        before = self._newest
        head = Head(
            kind=kind,
            flags=flags,
            backup_id=before.backup_id,
            sequence=before.sequence + 1,
            offset=self._end,
            version=version,
            changes=before.changes + (1 if kind == Kind.CHANGE else -1),
            time_ns=time_ns,
            session=session,
            length=len(payload),
            chain_before=before.chain,
            chain=chain,
        )
        self._put(head, payload)

    def _put(self, head: Head, payload: bytes) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            self._store(layout2.encode(head, payload))
        except OSError as error:
            # The record may be there or not: only the next open can tell.
            self._failed = DiskError(self.path, error, "write to")
            raise self._failed from error
        self._end = head.end
        self._settle(head)

    def _store(self, record: bytes) -> None:
        """Append ``record``; after an error, again from memory on a fresh descriptor."""
        assert self._file is not None
        started, pause, failed = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            try:
                # Do not retry a failed fsync: the kernel may have dropped the dirty pages.
                if failed:
                    self._reopen()
                self._file.append(self._end, record)
                return
            except OSError as error:
                failed, waited = True, time.monotonic() - started
                if waited + pause > RETRY_FOR_S:
                    raise
                log.warning(
                    f"Writing to {self.path} failed ({error.strerror or error}); the node has"
                    f" been waiting for {waited:.1f} s, next try in {pause:.1f} s"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _reopen(self) -> None:
        assert self._file is not None
        self._file.close()  # First: it holds the lock on the same file.
        self._file = durable.LogFile(self.path)
        if not self._is_ours(self._file.fd):
            raise OSError(errno.ESTALE, "another file stands in its place")

    def _is_ours(self, fd: int) -> bool:
        newest = self._newest
        try:
            backup_id, _, _ = layout2.decode_header(os.pread(fd, layout2.FIRST_RECORD, 0))
        except layout2.HeaderError:
            return False
        if newest.sequence == 0:  # There may be no record to compare.
            return backup_id == newest.backup_id
        found = os.pread(fd, layout2.HEAD.size, newest.offset)
        head = layout2.decode_head(found, newest.offset, newest.backup_id)
        return head is not None and (head.sequence, head.chain) == (newest.sequence, newest.chain)

    @property
    def log_size(self) -> int:
        """Bytes of the records since the snapshot."""
        return self._end - self._log_start

    @property
    def snapshot_size(self) -> int:
        """Bytes of the SQLite file that the log starts with."""
        return layout2.snapshot_size(self._log_start)

    def statistics(self) -> dict[str, int]:
        """What existing tools know of a backup's size, in bytes and entries."""
        return {"backupsize": self._end, "version_count": self.version_count}

    def adopt(self, path: str, copied: int, last: int) -> None:
        """Go on with the compacted log ``path`` in place of this one.

        What was appended since is copied to it first. Nobody may append meanwhile.

        Args:
            path: a complete, verified log, beside this one.
            copied: offset in this log of the last record that ``path`` stands for.
            last: offset of that record's counterpart in ``path``.

        Raises:
            BackupError: the two do not agree, or a file could not be written or renamed; this
                log stays in use. Where the directory could not be flushed, it takes no
                more changes: which log a loss of power would leave is not known.
        """
        old = LogReader(self.path)
        try:
            file, newest, log_start = self._copy_rest(old, path, copied, last)
        except OSError as error:
            raise DiskError(path, error, "write") from error
        finally:
            old.close()
        assert self._file is not None
        try:
            durable.replace(path, self.path)
        except OSError as error:
            file.close()
            failure = DiskError(self.path, error, "replace")
            if not os.path.exists(path):  # Renamed, but that may not outlive a loss of power.
                self._failed = failure
            raise failure from error
        self._file.close()
        file.path = self.path  # Where an append looks for it from now on.
        self._file, self._end, self._log_start = file, newest.end, log_start
        self._settle(newest)

    def _copy_rest(
        self, old: LogReader, path: str, copied: int, last: int
    ) -> tuple[durable.LogFile, Head, int]:
        new = LogReader(path)
        try:
            head, counterpart = old.head_at(copied), new.head_at(last)
            assert new.log_start is not None
        finally:
            new.close()
        if (head.chain, head.sequence) != (counterpart.chain, counterpart.sequence):
            raise BackupError(f"{path} does not stand for the same history as {self.path}.")
        old.start_after(head)
        data = bytearray()  # All in one append: a change waits, and catch_up has left little.
        for head, payload in old:
            counterpart = layout2.moved(head, counterpart)
            data += layout2.encode(counterpart, payload)
        if counterpart.chain != self._newest.chain or old.damage is not None:
            raise BackupError(f"{path} does not end like {self.path}.")
        file = durable.LogFile(path)
        try:
            file.append(counterpart.end - len(data), bytes(data))
        except BaseException:
            file.close()
            raise
        return file, counterpart, new.log_start

    def close(self) -> None:
        """See Backend."""
        if self._file is not None:
            self._file.close()
            self._file = None
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
                    kept.prune(self.path)

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

    def read(self) -> Reading:
        """See Backend."""
        if layout1.is_layout_1(self.path):
            return layout1.Layout1Reading(self.path)
        return FileReading(self.path)

    def status(self, check: bool = False) -> Status:
        """See Backend. A file of layout 1 is read in full in any case."""
        if layout1.is_layout_1(self.path):
            return layout1.status(self.url, self.path)
        reader = LogReader(self.path)
        try:
            last, tail, damage = _checked(reader) if check else _seen(reader)
            log_start = reader.log_start or layout2.FIRST_RECORD
            known = proof.read(self.path, reader.backup_id)
            return Status(
                url=self.url,
                layout=f"file layout {layout2.LAYOUT}",
                backup_id=(reader.backup_id or b"").hex(),
                version=last.version,
                prev_version=last.version - 1 if last.rewindable else None,
                version_count=last.changes + (log_start > layout2.FIRST_RECORD),
                changes=last.changes,
                snapshot_size=layout2.snapshot_size(log_start),
                size=tail.offset,
                allocated=reader.allocated,
                last_change_ns=last.time_ns or None,
                owner=last.tag.hex() if reader.rules == layout2.RULES else None,
                torn_tail=tail.kind is TailKind.TORN,
                checked=check,
                damage=str(damage) if damage else None,
                last_checked_ns=known.checked_ns,
                last_proven_ns=known.proven_ns,
                unsound=known.unsound,
                disk_free=shutil.disk_usage(os.path.dirname(self.path)).free,
                warnings=[
                    *disk_warnings(self.path, tail.offset),
                    *proof.warnings(known, self.url),
                ],
            )
        finally:
            reader.close()


def _checked(reader: LogReader) -> tuple[Head, Tail, Damaged | None]:
    """The last record, the tail and the damage of a whole log, read to its end."""
    for _ in reader:
        pass
    tail = reader.tail._replace(offset=reader.position)
    return reader.last or BEFORE_FIRST, tail, reader.damage


def _seen(reader: LogReader) -> tuple[Head, Tail, Damaged | None]:
    """``_checked``, as far as the log's end tells."""
    if reader.damage is not None:
        return _checked(reader)
    newest, tail = reader.settled()
    damage = None
    if tail.kind is TailKind.DAMAGED:
        reader.last = newest
        damage = reader.as_damage(tail.offset, tail.reason)
    return newest or BEFORE_FIRST, tail, damage


def disk_warnings(path: str, backup_size: int) -> list[str]:
    """What to tell the operator about the space left on the disk of the backup ``path``.

    Args:
        backup_size: bytes of its snapshot and of its changes.
    """
    usage = shutil.disk_usage(os.path.dirname(path))
    wanted = space_wanted(backup_size)
    if usage.free >= wanted:
        return []
    return [
        f"The disk of {path} is nearly full: {usage.free >> 20} MiB of"
        f" {usage.total >> 20} MiB are free, and the backup may soon need {wanted >> 20} MiB."
        " When it is full the node stops."
    ]


def space_wanted(backup_size: int) -> int:
    """Free bytes below which a disk with a backup of ``backup_size`` bytes is nearly full.

    A share of the disk would say nothing: a backup of 1 GB needs no 190 GB of 4 TB.
    """
    return max(LOW_DISK_BYTES, COMPACTION_FACTOR * backup_size)
