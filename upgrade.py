"""From an old file to one of layout 2 as it is written now, by replaying the old log."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import restore
import scratch
import space
from backend import FOREIGN_KEYS_OFF, Change, Reading, Snapshot
from errors import DiskError
from filebackend import FileBackend


class AllButTail(Reading):
    """``reading`` without its last change, which stays a change so that it can be rewound.

    Attributes:
        tail: what was held back: the last change, with a PRAGMA foreign_keys = OFF that is
            for it.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.total = reading.total
        self.tail: list[Change] = []

    def __iter__(self) -> Iterator[Change]:
        for change in self._reading:
            self.position = self._reading.position
            if change.snapshot is not None:
                self.tail = []
                yield self._noted(change)
            elif self.tail and self.tail[-1].transaction == [FOREIGN_KEYS_OFF]:
                self.tail.append(change)
            else:
                for held in self.tail:
                    yield self._noted(held)
                self.tail = [change]
        self.damage = self._reading.damage

    def _noted(self, change: Change) -> Change:
        self.version = change.version
        return change

    def close(self) -> None:
        """See Reading."""
        self._reading.close()


def from_log(backend: FileBackend, owner: bytes, progress: Callable[[Reading], None]) -> str | None:
    """Replace ``backend``'s old file by one of layout 2 with the same content.

    Args:
        owner: who may write to it, 16 bytes.
        progress: called now and then with the pass over the old file.

    Returns:
        Where the old file is kept.

    Raises:
        BackupError: it is damaged or does not replay; it stays as it is.
    """
    with (
        contextlib.closing(AllButTail(backend.read())) as reading,
        scratch.held(backend.scratch_prefix) as prefix,
    ):
        path = f"{prefix}.sqlite3"

        def report() -> None:
            space.require(path)
            progress(reading)

        snapshot = None
        try:
            version, _ = restore.build(reading, path, False, report)
            snapshot = Snapshot(path, version)
            space.require(path, os.path.getsize(path))
        except restore.NothingToRestore:
            pass  # All there is, if anything, is the tail.
        except OSError as error:
            raise DiskError(path, error, "write") from error
        return backend.replace(snapshot, owner, reading.tail)
