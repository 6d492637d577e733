"""The log in use: one writer appends to it, and what it says is stored is durable."""

from __future__ import annotations

import contextlib
import errno
import os
import time

import durable
from backend import Change, log
from decisions import may_write
from errors import BackupBusy, DiskError, OtherOwner
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, Head, Tail, TailKind
from filelog.reader import LogReader

RETRY_FOR_S = 60.0
"""How long a failing write is tried again before the change is refused."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


class LogAppender:
    """A log open for appending, and its newest record.

    A call that adds a record returns when that is durable. It raises DiskError if it is not,
    and then for good: the record may be there or not, which only the next open can tell.

    Args:
        file: the log, locked.
        newest: head of its last record, which is durable; BEFORE_FIRST, with the file's
            backup id, if there is none.
        log_start: from the file header.

    Attributes:
        file, newest, log_start: the same, as they are now.
    """

    def __init__(self, file: durable.LogFile, newest: Head, log_start: int) -> None:
        self.file = file
        self.newest = newest
        self.log_start = log_start
        self._failed: DiskError | None = None

    @property
    def path(self) -> str:
        """Where it is."""
        return self.file.path

    def add_change(self, change: Change, session: bytes) -> None:
        """Store ``change``, whose base is the newest record's version."""
        head = layout2.change_behind(self.newest, change, session, time.time_ns())
        self._put(head, change.payload)

    def rewind(self, session: bytes) -> None:
        """Take back the newest record, which is rewindable."""
        self._put(layout2.rewind_behind(self.newest, session, time.time_ns()), b"")

    def add_owner(self, owner: bytes, payload: bytes) -> None:
        """Say who may write from here on (see layout2.encode_owner)."""
        self._put(layout2.owner_behind(self.newest, owner, payload), payload)

    def add_record(self, head: Head, payload: bytes) -> None:
        """Store a change or a rewind as another log holds it.

        Args:
            head: continues this log: its chain before is this log's, and the version rule
                holds.
        """
        newest = self.newest
        assert head.chain_before == newest.chain, "the chain is compared first"
        # Not layout2.moved: another log may count its records otherwise.
        here = layout2.behind(
            newest,
            len(payload),
            kind=head.kind,
            flags=head.flags,
            version=head.version,
            time_ns=head.time_ns,
            session=head.session,
            chain=head.chain,
        )
        self._put(here, payload)

    def fail(self, failure: DiskError) -> None:
        """Refuse whatever comes from now on with ``failure``."""
        self._failed = failure

    def close(self) -> None:
        """Let the file go."""
        self.file.close()

    def _put(self, head: Head, payload: bytes) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            self._store(head.offset, layout2.encode(head, payload))
        except OSError as error:
            # Not to be tried again by a later call: nothing may stand behind such a record.
            self._failed = DiskError(self.path, error, "write to")
            raise self._failed from error
        self.newest = head

    def _store(self, offset: int, record: bytes) -> None:
        """Append ``record``; after an error, again from memory on a fresh descriptor."""
        started, pause, failed = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            try:
                # Do not retry a failed fsync: the kernel may have dropped the dirty pages.
                if failed:
                    self._reopen()
                self.file.append(offset, record)
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
        self.file.close()  # First: it holds the lock on the same file.
        self.file = durable.LogFile(self.path)
        # The lock on the name does not tell: an operator may have put another file there.
        if not _ends_with(self.file.fd, self.newest):
            raise OSError(errno.ESTALE, "another file stands in its place")


def _ends_with(fd: int, newest: Head) -> bool:
    """Whether the log ``fd`` is the one that has ``newest``, as far as two reads tell."""
    try:
        backup_id, _, _ = layout2.decode_header(os.pread(fd, layout2.FIRST_RECORD, 0))
    except layout2.HeaderError:
        return False
    if newest.sequence == 0:  # There may be no record to compare.
        return backup_id == newest.backup_id
    found = os.pread(fd, layout2.HEAD.size, newest.offset)
    head = layout2.decode_head(found, newest.offset, newest.backup_id)
    return head is not None and (head.sequence, head.chain) == (newest.sequence, newest.chain)


def open_log(path: str, url: str, owner: bytes | None = None) -> LogAppender:
    """The log ``path``, whose newest record is durable then; a torn tail is moved aside.

    Args:
        url: names the backup in an error.
        owner: who writes; None: whose it is does not matter.

    Raises:
        BackupMissing, BackupBusy, Damaged, OtherOwner, UnsupportedLayout, DiskError.
    """
    with contextlib.closing(LogReader(path)) as reader:
        newest, tail = reader.newest()
        if reader.rules != layout2.RULES:
            raise reader.of_old_rules()
        if tail.kind is TailKind.DAMAGED:
            reader.last = newest
            raise reader.as_damage(tail.offset, tail.reason)
        last = newest or BEFORE_FIRST._replace(backup_id=reader.backup_id or b"")
        _refuse_strangers(reader, url, last, owner)
        assert reader.log_start is not None
        file = lock_log(path)
        try:
            _make_durable(file, newest, tail, reader)
        except BaseException as error:
            file.close()
            if isinstance(error, OSError):
                raise DiskError(path, error, "open for writing") from error
            raise
        return LogAppender(file, last, reader.log_start)


def refuse_strangers(path: str, url: str, owner: bytes | None) -> None:
    """Raise OtherOwner if ``owner`` may not write to ``path``, where somebody may be at it."""
    with contextlib.closing(LogReader(path)) as reader:
        newest, _ = reader.newest()
        _refuse_strangers(reader, url, newest or BEFORE_FIRST, owner)


def _refuse_strangers(reader: LogReader, url: str, last: Head, owner: bytes | None) -> None:
    if not may_write(last.tag, owner):
        raise OtherOwner(url, reader.taken_over())


def lock_log(path: str) -> durable.LogFile:
    """The log ``path``, locked: whoever lost its ``.writer`` may still hold it."""
    try:
        return durable.LogFile(path)
    except BlockingIOError as error:
        raise BackupBusy(path, "") from error
    except OSError as error:
        raise DiskError(path, error, "open for writing") from error


def _make_durable(
    file: durable.LogFile, newest: Head | None, tail: Tail, reader: LogReader
) -> None:
    if tail.kind is TailKind.TORN:
        aside = file.copy_tail(tail.offset, f"{file.path}.torn-{tail.offset}")
        log.warning(
            f"{file.path}: an append that was never acknowledged stood at offset"
            f" {tail.offset} ({tail.reason}); moved to {aside}"
        )
    # What the page cache shows may never have reached the disk: write it again, the
    # zeros behind it too, or a tail that was cut could stand there again.
    start = newest.offset if newest else 0
    file.rewrite(start, reader.pread(start, tail.offset - start))
