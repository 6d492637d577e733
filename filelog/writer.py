"""Writing a whole file of layout 2, to be verified and renamed into place."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import durable
from backend import MAX_CHUNK_SIZE, NOBODY, Change, Snapshot, new_session
from errors import ConfigError
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, Head, Kind, TailKind
from filelog.reader import LogReader

FLUSH_STEP = 32 << 20
"""Bytes between two flushes where no node waits."""
SMALL_FLUSH_STEP = 4 << 20
"""Bytes between two flushes beside a running node: its own flush waits for no more."""


class LogWriter:
    """A new log, written from its beginning.

    Args:
        path: the file, which must not exist.
        backup_id: 16 bytes.
        snapshot_size: bytes of the snapshot that ``add_snapshot`` will add; 0 for none, or if
            it comes by ``add_piece``.
        flush_step: bytes between two flushes.
        like: see durable.create.

    Attributes:
        last: the last record written.
    """

    def __init__(
        self,
        path: str,
        backup_id: bytes,
        snapshot_size: int,
        flush_step: int = FLUSH_STEP,
        like: str | None = None,
    ) -> None:
        self.path = path
        self._fd = durable.create(path, like)
        self._flush_step = flush_step
        self._unflushed = 0
        self._end = 0
        self._snapshot_size = 0
        self.last = BEFORE_FIRST._replace(backup_id=backup_id)
        try:
            self._write(layout2.encode_header(backup_id, time.time_ns(), snapshot_size))
        except BaseException:
            self.close()
            raise

    def add_snapshot(self, path: str, head: Head) -> None:
        """Add the SQLite file ``path`` in pieces.

        Args:
            head: what it stands for: version, sequence, chain, time and session are used.
        """
        size = os.path.getsize(path)
        # One buffer for all pieces, never joined with their heads: new memory for each of
        # them costs as much time as the disk.
        buffer = memoryview(bytearray(MAX_CHUNK_SIZE))
        with open(path, "rb") as source:
            while length := source.readinto(buffer):
                flags = layout2.FINAL if source.tell() == size else 0
                piece_head = head._replace(kind=Kind.SNAPSHOT, flags=flags, length=length)
                self._add_piece(piece_head, buffer[:length])
            if source.tell() != size:
                raise ConfigError(f"{path} changed while it was read.", "Stop whoever writes it.")

    def add_owner(self, owner: bytes, payload: bytes) -> None:
        """Say who may write from here on (see layout2.encode_owner)."""
        head = layout2.owner_behind(self.last, owner, payload)
        self._add(head, layout2.encode(head, payload))

    def add_first_owner(self, owner: bytes, machine: str) -> None:
        """Say behind the snapshot who may write: ``owner`` on ``machine``, or anybody."""
        if owner != NOBODY:
            self.add_owner(owner, layout2.encode_owner(time.time_ns(), machine))

    def add_change(self, change: Change, session: bytes) -> None:
        """Add a change of ``session`` that no log holds yet."""
        head = layout2.change_behind(self.last, change, session, time.time_ns())
        self._add(head, layout2.encode(head, change.payload))

    def add(self, head: Head, payload: bytes) -> None:
        """Add a record, but no snapshot, that another log holds."""
        moved = layout2.moved(head, self.last)
        self._add(moved, layout2.encode(moved, payload))

    def add_piece(self, head: Head, payload: bytes) -> None:
        """Add a piece of a snapshot as another log holds it; its size need not be known before."""
        self._add_piece(head, payload)
        self._snapshot_size += len(payload)
        if head.flags & layout2.FINAL:
            size = self._snapshot_size
            header = layout2.encode_header(self.last.backup_id, time.time_ns(), size)
            durable.write_all(self._fd, header, 0)

    def _add_piece(self, head: Head, payload: bytes | memoryview) -> None:
        here = head._replace(backup_id=self.last.backup_id, offset=self._end, changes=0)
        self._add(here, layout2.encode_head(here, payload), payload, layout2.trailer(here.offset))

    def _add(self, head: Head, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._write(part)
        self.last = head

    def _write(self, data: bytes | memoryview) -> None:
        durable.write_all(self._fd, data, self._end)
        self._end += len(data)
        self._unflushed += len(data)
        if self._unflushed >= self._flush_step:
            self.flush()

    def flush(self) -> None:
        """Put all that was added on stable storage."""
        durable.flush(self._fd)
        self._unflushed = 0

    def forget(self) -> None:
        """Let the page cache go of what was flushed: it is large, and read once more only."""
        durable.forget(self._fd, self._end - self._unflushed)

    def finish(self) -> None:
        """Zero the space ahead and flush."""
        step = durable.PREALLOCATE_STEP
        durable.write_all(self._fd, bytes(step - self._end % step), self._end)
        self.flush()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def write_log(
    path: str,
    snapshot: Snapshot | None,
    owner: bytes,
    machine: str,
    changes: Sequence[Change] = (),
    like: str | None = None,
    flush_step: int = FLUSH_STEP,
) -> None:
    """Write a new log of ``snapshot`` (or an empty one) to the new file ``path``.

    It is complete, flushed and verified then, so it may be renamed into place.

    Args:
        owner: who may write to it, 16 bytes, on ``machine``.
        changes: what follows the snapshot.
        like: see durable.create.
        flush_step: see LogWriter.
    """
    size = os.path.getsize(snapshot.path) if snapshot else 0
    writer = LogWriter(path, secrets.token_bytes(16), size, flush_step, like)
    try:
        if snapshot is not None:
            begin = layout2.snapshot_head(snapshot, owner, time.time_ns())
            writer.add_snapshot(snapshot.path, begin)
        writer.add_first_owner(owner, machine)
        session = new_session(owner)
        for change in changes:
            writer.add_change(change, session)
        writer.finish()
    finally:
        writer.close()
    check_log(path)


def copy_log(
    path: str,
    records: Iterable[tuple[Head, bytes]],
    like: str | None = None,
    flush_step: int = FLUSH_STEP,
) -> None:
    """Write a new log with all the ``records`` of another one to the new file ``path``.

    It is complete, flushed and verified then, as that of ``write_log``.
    """
    writer = LogWriter(path, secrets.token_bytes(16), 0, sys.maxsize, like)
    # What is written is flushed while the next is read.
    with contextlib.closing(writer), ThreadPoolExecutor(1) as flusher:
        flushing, asked = flusher.submit(writer.flush), 0
        for head, payload in records:
            if head.kind == Kind.SNAPSHOT:
                writer.add_piece(head, payload)
            else:
                writer.add(head, payload)
            if writer.last.end - asked >= flush_step:
                flushing.result()
                flushing, asked = flusher.submit(writer.flush), writer.last.end
        flushing.result()
        writer.finish()
    check_log(path)


def check_log(path: str, passed: Callable[[Head, bytes], None] = lambda *_: None) -> None:
    """Read the whole log at ``path``; raises Damaged if not all of it checks.

    Args:
        passed: called with each record.
    """
    reader, forgotten = LogReader(path), 0
    try:
        for head, payload in reader:
            passed(head, payload)
            if head.end - forgotten > SMALL_FLUSH_STEP:
                reader.forget()
                forgotten = head.end
        if reader.damage is not None:
            raise reader.damage
        if reader.tail.kind is not TailKind.CLEAN:
            raise reader.as_damage(reader.tail.offset, reader.tail.reason)
    finally:
        reader.close()
