"""From a URL to the Destination that serves it, with the work beside the node."""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Sequence

from backend import Progress
from errors import ConfigError, NoPsycopg
from filebackend import FileBackend
from mirrorbackend import MirrorBackend
from postgres.url import SCHEMES as POSTGRES
from quorum import Roster
from replica import Followable, Replica
from socketbackend import SocketBackend
from upkeep import upgrade
from upkeep.compaction import Compactor, Housekeeper
from wallet.node import LockFile

SCHEMES = ("file:", "socket:", *POSTGRES)
"""What a backup URL begins with."""


def destination_of(lock_file: LockFile) -> Followable:
    """The Destination that backup.lock names, not open yet."""
    return destination_for(lock_file.urls, lock_file.acks, lock_file.epoch)


def destination_for(urls: Sequence[str], acks: int | None = None, epoch: int = 1) -> Followable:
    """The Destination of one URL or of several, not open yet.

    Args:
        acks: how many of several acknowledge; None: all.
        epoch: see quorum.Roster.
    """
    if len(urls) == 1 and acks in (None, 1):
        return backend_for(urls[0])
    return MirrorBackend(Roster(epoch, acks or len(urls), tuple(urls)), backend_for)


def backend_for(url: str) -> Replica:
    """The Destination of ``url``, not open yet; ConfigError for a URL of no known form."""
    if url.startswith("file:"):
        return FileDestination(url)
    if url.startswith("socket:"):
        return SocketBackend(url)
    if url.startswith(POSTGRES):
        return _in_postgres(url)
    path = os.path.abspath(os.path.expanduser(url))
    raise ConfigError(
        f"{url!r} is no backup URL.",
        "The forms are file:///path/to/file, socket:unix:/path/to/socket, socket:host:port and"
        " postgresql://user@host1,host2/dbname."
        + (f" A file's is {shlex.quote(f'file://{path}')}." if url and ":" not in url else ""),
    )


def _in_postgres(url: str) -> Replica:
    """The Destination of a ``postgresql:`` URL; nobody else needs the packages for that."""
    try:
        from upkeep.inpostgres import PostgresDestination
    except ImportError as error:
        raise NoPsycopg(error) from error
    return PostgresDestination(url)


class FileDestination(FileBackend, Replica):
    """A FileBackend and its upkeep, which it cannot know itself: that imports FileBackend."""

    takes_quickly = True
    _compactor: Compactor | None = None
    _housekeeper: Housekeeper | None = None

    def keep_house(
        self, lock: threading.Lock, least: int | None, turn: threading.Lock | None = None
    ) -> None:
        """See Destination."""
        if self._housekeeper is not None:
            return
        self._compactor = Compactor(self, lock)
        self._housekeeper = Housekeeper(self, self._compactor, least, turn)
        self._housekeeper.start()

    def close(self) -> None:
        """See Backend."""
        if self._housekeeper is not None:
            self._housekeeper.stop()
        self._compactor = self._housekeeper = None
        super().close()

    def compact(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """See Destination. BackupBusy if another process writes to it."""
        if self._compactor is not None:
            return self._compactor.run(progress)
        self.open()
        with contextlib.closing(self):
            return Compactor(self, threading.Lock()).run(progress)

    def rebuild(self, owner: bytes, progress: Progress) -> str | None:
        """See Destination."""
        return upgrade.from_log(self, owner, progress)
