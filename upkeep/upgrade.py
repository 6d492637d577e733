"""A new backup from the content of another: from an old file, or at another place."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import scratch
import space
from backend import FOREIGN_KEYS_OFF, Backend, Change, Reading, Snapshot
from errors import BackupError, DiskError
from filebackend import FileBackend
from wallet import database, restore


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
        snapshot = _folded(reading, f"{prefix}.sqlite3", progress)
        return backend.replace(snapshot, owner, reading.tail)


def to_another_place(
    source: Backend,
    target: Backend,
    owner: bytes,
    prefix: str,
    progress: Callable[[Reading], None],
) -> None:
    """Make ``target`` a backup with the content of ``source``, and prove that it is one.

    Args:
        owner: who may write to it, 16 bytes.
        prefix: how the paths of scratch files begin.
        progress: called now and then with a pass over either.

    Raises:
        BackupError: ``source`` is damaged, or ``target`` could not be made, or is not the same.
    """
    with (
        contextlib.closing(AllButTail(source.read())) as reading,
        scratch.held(prefix) as base,
    ):
        path = f"{base}.sqlite3"
        snapshot = _folded(reading, path, progress)
        target.create(snapshot, owner, reading.tail)
        replayer = database.Replayer(path)
        with contextlib.closing(replayer):
            for change in reading.tail:
                replayer.apply(change)
            replayer.finish()
        with contextlib.closing(target.read()) as stored:
            step = functools.partial(progress, stored)
            _, problems = restore.verify(stored, f"{base}-new", path, step)
    if problems:
        raise BackupError(
            f"{target.url} does not hold what {source.url} holds: {'; '.join(problems)}.",
            "Remove it, and look at that disk before you try again.",
        )


def _folded(reading: AllButTail, path: str, progress: Callable[[Reading], None]) -> Snapshot | None:
    """A snapshot in the new file ``path`` of all but the tail of ``reading``; None of nothing."""

    def report() -> None:
        space.require(path)
        progress(reading)

    try:
        version, _ = restore.build(reading, path, False, report)
        space.require(path, os.path.getsize(path))
    except restore.NothingToRestore:
        return None  # All there is, if anything, is the tail.
    except OSError as error:
        raise DiskError(path, error, "write") from error
    return Snapshot(path, version)
