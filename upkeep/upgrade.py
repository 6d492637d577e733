"""A new backup from the content of another: from an old file, or at another place."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator

import scratch
import space
from backend import (
    FOREIGN_KEYS_OFF,
    Backend,
    Beginning,
    Change,
    Ending,
    Progress,
    Snapshot,
    Step,
)
from errors import BackupError, DiskError
from filebackend import FileBackend
from wallet import database, restore


def all_but_tail(steps: Iterable[Step], tail: list[Change]) -> Iterator[Step]:
    """A pass without its last change, which stays a change so that it can be rewound.

    Args:
        tail: gets what is held back: the last change, with a PRAGMA foreign_keys = OFF that
            is for it.
    """
    version = 0
    for step in steps:
        found = step.found
        if isinstance(found, Ending):
            yield step._replace(found=dataclasses.replace(found, version=version))
        elif isinstance(found, Beginning) or found.snapshot is not None:
            tail.clear()
            version = found.version
            yield step
        elif tail and tail[-1].transaction == [FOREIGN_KEYS_OFF]:
            tail.append(found)
        else:
            for held in tail:
                version = held.version
                yield step._replace(found=held)
            tail[:] = [found]


def from_log(backend: FileBackend, owner: bytes, progress: Progress) -> str | None:
    """Replace ``backend``'s old file by one of layout 2 with the same content.

    Args:
        owner: who may write to it, 16 bytes.
        progress: called now and then with bytes read of the old file, and in all.

    Returns:
        Where the old file is kept.

    Raises:
        BackupError: it is damaged or does not replay; it stays as it is.
    """
    with (
        contextlib.closing(backend.read()) as reading,
        scratch.held(backend.scratch_prefix) as prefix,
    ):
        snapshot, tail = _folded(reading, f"{prefix}.sqlite3", progress)
        return backend.replace(snapshot, owner, tail)


def to_another_place(
    source: Backend, target: Backend, owner: bytes, prefix: str, progress: Progress
) -> None:
    """Make ``target`` a backup with the content of ``source``, and prove that it is one.

    Args:
        owner: who may write to it, 16 bytes.
        prefix: how the paths of scratch files begin.
        progress: called now and then with bytes read of either, and in all.

    Raises:
        BackupError: ``source`` is damaged, or ``target`` could not be made, or is not the same.
    """
    with (
        contextlib.closing(source.read()) as reading,
        scratch.held(prefix) as base,
    ):
        path = f"{base}.sqlite3"
        snapshot, tail = _folded(reading, path, progress)
        target.create(snapshot, owner, tail)
        replayer = database.Replayer(path)
        with contextlib.closing(replayer):
            for change in tail:
                replayer.apply(change)
            replayer.finish()
        with contextlib.closing(target.read()) as stored:
            _, problems = restore.verify(stored, f"{base}-new", path, progress)
    if problems:
        raise BackupError(
            f"{target.url} does not hold what {source.url} holds: {'; '.join(problems)}.",
            "Remove it, and look at that disk before you try again.",
        )


def _folded(
    steps: Iterable[Step], path: str, progress: Progress
) -> tuple[Snapshot | None, list[Change]]:
    """A snapshot in the new file ``path`` of all but the tail of a pass, and that tail.

    None: there is nothing but the tail, if that.
    """
    tail: list[Change] = []

    def report(done: int, of: int) -> None:
        space.require(path)
        progress(done, of)

    try:
        ending, _ = restore.build(all_but_tail(steps, tail), path, False, report)
        space.require(path, os.path.getsize(path))
    except restore.NothingToRestore:
        return None, tail
    except OSError as error:
        raise DiskError(path, error, "write") from error
    return Snapshot(path, ending.version), tail
