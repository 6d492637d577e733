"""Scratch files: whoever makes them holds a lock, and whoever comes next clears the others.

A process that is killed leaves its files, and the system drops its lock. The files come in
sets: ``<prefix><token>`` begins the names of one set, and ``<prefix><token>.held`` is locked
as long as its process lives. Only the scratch files of a backup's writer are in no set:
``<backup>.scratch-log`` and the like are under the writer's own lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import secrets
from collections.abc import Iterator

import durable
from errors import DiskError

HELD = ".held"
_TOKEN = re.compile("[0-9a-f]{8}(?=[.-])")


@contextlib.contextmanager
def held(prefix: str) -> Iterator[str]:
    """How the names of a new set of scratch files begin; they are removed at the end.

    Args:
        prefix: a path. Sets that begin so and that nobody holds are removed first.

    Raises:
        DiskError: no file can be made there.
    """
    clear(prefix)
    try:
        base, lock = _take(prefix)
    except OSError as error:
        raise DiskError(prefix + HELD, error, "create") from error
    try:
        yield base
    finally:
        try:
            remove(base)
        finally:
            os.close(lock)


def clear(prefix: str, writers: bool = False) -> None:
    """Remove the sets that begin with ``prefix`` and that nobody holds.

    Args:
        writers: what is in no set, too; for who holds the writer's lock.
    """
    for name in _named(prefix):
        token = _TOKEN.match(name, len(prefix))
        base = name[: token.end()] if token else ""
        if name == base + HELD:
            _remove_unless_held(base)
        # The lock comes first and goes last: what is without it is of nobody.
        elif writers if not token else not os.path.exists(base + HELD):
            durable.discard(name)


def _take(prefix: str) -> tuple[str, int]:
    while True:
        base = f"{prefix}{secrets.token_hex(4)}"
        lock = durable.create(base + HELD)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Someone who clears was quicker.
            os.close(lock)
            continue
        except OSError:
            pass  # Where locks do not work nobody else can take it: it counts as held.
        if os.path.exists(base + HELD):
            return base, lock
        os.close(lock)


def _remove_unless_held(base: str) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(base + HELD, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(base)
        finally:
            os.close(lock)


def remove(base: str) -> None:
    """Remove the whole set that begins with ``base``, which ``held`` gave."""
    for name in _named(base):
        if name != base + HELD:
            durable.discard(name)
    durable.discard(base + HELD)


def _named(prefix: str) -> list[str]:
    return glob.glob(glob.escape(prefix) + "*")
