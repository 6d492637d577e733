"""A snapshot on its way in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import durable
from backend import Snapshot
from errors import DiskError
from protocol import NackCode, ProtocolError
from serving import room
from serving.client import Answer, Client
from serving.keeper import Keeper
from serving.room import Room
from wallet import database, restore


class Arrival:
    """The snapshot that a client sends, one at a time: in pieces, the last of which is answered.

    Attributes:
        chain: that of the snapshot that has begun, if its client named one; else None.
        is_open: more of its pieces have to come.
    """

    def __init__(self, client: Client, keeper: Keeper, room: Room) -> None:
        self.chain: bytes | None = None
        self.is_open = False
        self._client = client
        self._keeper = keeper
        self._room = room
        self._refused = ""
        self._spool: Spool | None = None
        self._promised = 0
        """Bytes for which there is room on the disk."""

    @property
    def is_wanted(self) -> bool:
        """Whether its pieces are of any use: it was not refused when it began."""
        return self._spool is not None

    def begin(self, version: int, chain: bytes | None = None, override: bool = False) -> None:
        """Another snapshot comes; what came of the one before is dropped.

        Args:
            override: also if it is older than the backup.
        """
        self.drop()
        self.chain = chain
        self.is_open = True
        self._refused = "" if override else self._keeper.old_snapshot(version)
        if not self._refused:
            path = f"{self._keeper.backend.scratch_prefix}in-{self._client.number}"
            snapshot = Snapshot(path, version) if chain is None else Snapshot(path, version, chain)
            self._spool, self._promised = Spool(snapshot), 0

    def add(self, piece: bytes) -> None:
        """Take a piece; Dropped if the disk has no room for it."""
        if self._spool is None:
            return
        if self._spool.size + len(piece) > self._promised:
            self._room.take(self._client, self._spool.size)
            self._promised = self._spool.size + room.STEP
        self._spool.add(piece)

    def end(self, version: int, replace: Callable[[Snapshot], Answer]) -> None:
        """All of it came: call ``replace`` with it if it holds ``version``, and answer."""
        self.chain, self.is_open = None, False
        if self._spool is None:
            what = f"a snapshot of version {version}: {self._refused}"
            return self._client.refuse(what, NackCode.OLD_SNAPSHOT)
        self._spool.finish()
        snapshot = self._spool.snapshot
        self._client.ask(lambda: replace(snapshot))
        self.drop()

    def drop(self) -> None:
        """Remove what came."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None
            self._room.give(self._client)


class Spool:
    """A snapshot on its way in: a scratch file beside the backup.

    Args:
        snapshot: its path, which must not exist, and what the client says of it.

    Attributes:
        size: bytes that came.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.size = 0
        with self._writing():
            self._file = os.fdopen(durable.create(snapshot.path), "wb")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(self.snapshot.path, error, "write") from error

    def add(self, piece: bytes) -> None:
        """Take a piece."""
        self.size += len(piece)
        with self._writing():
            self._file.write(piece)

    def finish(self) -> None:
        """Check that the file is the database it claims to be."""
        with self._writing():
            self._file.close()
        found = database.version_of(self.snapshot.path)
        if found != self.snapshot.version:
            raise ProtocolError(
                f"The snapshot is called version {self.snapshot.version}, but holds {found}."
            )

    def close(self) -> None:
        """Remove the scratch file."""
        with contextlib.suppress(OSError):  # What is still in memory may find no room.
            self._file.close()
        restore.remove_database(self.snapshot.path)
