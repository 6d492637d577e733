"""Compacts a backup in a PostgreSQL cluster, beside the node.

Its records are replayed here, in a process of its own; the snapshot goes up in one transaction,
which takes the place of what it stands for. The node's own connection has no part in that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from backend import Destination, Ending, Progress, Step, log
from errors import BackupError, Unsound
from filelog.layout2 import Head, Kind
from filelog.reader import effective, is_foreign_keys_off
from postgres.look import Records
from postgresbackend import PostgresBackend
from upkeep import child
from upkeep.child import Child
from upkeep.compaction import AFTER_FAILURE_S, FIRST_AFTER_S, PAUSE_S, reporter
from wallet import database, restore

LOOKED_AT = 1000
"""Records at the end in which a place to cut is looked for."""


class PostgresDestination(PostgresBackend, Destination):
    """A PostgresBackend and its upkeep."""

    _lock: threading.Lock | None = None
    _stopped: threading.Event | None = None

    def keep_house(
        self, lock: threading.Lock, least: int | None, turn: threading.Lock | None = None
    ) -> None:
        """See Destination."""
        if self._lock is None:
            self._lock, self._stopped = lock, threading.Event()
            work = self._stopped, least, turn or threading.Lock()
            threading.Thread(target=self._run, args=work, daemon=True).start()

    def _run(self, stopped: threading.Event, least: int | None, turn: threading.Lock) -> None:
        not_before = time.monotonic() + FIRST_AFTER_S
        while least is not None and not stopped.wait(PAUSE_S):
            if time.monotonic() < not_before or not self._is_due(least):
                continue
            try:
                with turn:
                    self.compact()
            except BackupError as error:
                log.warning(f"The compaction failed, the backup goes on as it was: {error}")
                not_before = time.monotonic() + AFTER_FAILURE_S

    def _is_due(self, least: int) -> bool:
        known = self.known
        return known is not None and known.log_size > max(least, known.snapshot_size)

    def compact(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """See Destination."""
        before = self.state()
        prefix = self.scratch_paths(None, self.home) + f"compact-{secrets.token_hex(4)}"
        try:
            with Child("compacting", __file__, self.url, prefix) as process:
                for message in process.messages():
                    if "ready" in message:
                        break
                    if progress is not None:
                        progress(message["done"], message["of"])
        finally:
            restore.remove_database(f"{prefix}.sqlite3")
        after = self.state()
        with self._lock or contextlib.nullcontext():
            self.begins_anew(after)
        return {
            "before": {"backupsize": before.size, "version_count": before.version_count},
            "after": {"backupsize": after.size, "version_count": after.version_count},
        }

    def rebuild(self, owner: bytes, progress: Progress) -> str | None:
        """See Destination."""
        raise BackupError(f"{self.url} is of today's layout.", "There is nothing to do.")

    def close(self) -> None:
        """See Backend."""
        if self._stopped is not None:
            self._stopped.set()
        self._lock = self._stopped = None
        super().close()


# What follows runs in the process of its own.


def boundary(newest: Sequence[Head]) -> Head | None:
    """The last record that a new snapshot may stand for, or None if there is none.

    The newest record stays, and the newest change if that may be rewound; no rewind is cut from
    its change, nor a PRAGMA foreign_keys = OFF from the change that it is for.

    Args:
        newest: heads of the last records, the newest first.
    """
    behind: Head | None = None
    """The next one that is no owner."""
    for place, head in enumerate(newest):
        if head.kind in (Kind.SNAPSHOT, 0):
            return None
        cuts = is_foreign_keys_off(head) or (behind is not None and behind.kind == Kind.REWIND)
        if place and not cuts and (behind is not None or not newest[0].rewindable):
            return head
        if head.kind != Kind.OWNER:
            behind = head
    return None


def up_to(records: Records, last: Head) -> Iterator[Step]:
    """A pass over the records up to ``last``."""
    reached: Head | None = None

    def taken() -> Iterator[tuple[Head, bytes]]:
        nonlocal reached
        for reached, payload in records:
            yield reached, payload
            if reached.sequence == last.sequence and reached.kind == last.kind:
                return

    for head, found in effective(taken(), records.state.snapshot_size):
        yield Step(found, head.end, records.state.size)
    assert reached is not None
    yield Step(Ending(reached.version), reached.end, records.state.size)


def build(url: str, prefix: str) -> child.Message:
    """Fold the records of the backup at ``url`` into a snapshot; the last message."""
    backend, scratch = PostgresDestination(url), f"{prefix}.sqlite3"
    with backend.passing() as records:
        last = boundary(backend.newest_heads(records.state, LOOKED_AT))
        if last is None:
            return {"ready": False}
        try:
            restore.build(up_to(records, last), scratch, False, reporter(scratch))
        except restore.NothingToRestore:
            return {"ready": False}
        if not os.path.getsize(scratch):  # PRAGMA calls alone: a snapshot has at least a page.
            return {"ready": False}
        problems = database.integrity_problems(scratch)
        if problems:
            raise Unsound(f"The new snapshot would not be sound: {problems[0]}.")
        backend.fold(records.state, last, scratch)
    return {"ready": True}


def main(url: str, prefix: str) -> None:
    """Compact, and say what became of it."""
    child.run(url, prefix, lambda: build(url, prefix))


if __name__ == "__main__":
    main(*sys.argv[1:])
