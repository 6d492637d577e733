"""A snapshot on its way in."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator

import durable
import space
from backend import Snapshot
from errors import DiskError
from protocol import ALL_HELD, NackCode, ProtocolError
from serving.client import Answer, Client, Dropped
from serving.keeper import Keeper
from wallet import database, restore

MIN_FREE_BYTES = space.RESERVE
"""A snapshot that comes in leaves the disk at least this much for changes."""
KEPT_FOR_S = 600.0
"""How long what came of a snapshot waits for its client to come back."""
CUT_WITHIN_S = 10.0
"""Time in which a connection that is cut gives up its snapshot."""
SPACE_CHECK_BYTES = 16 << 20
"""Bytes of a snapshot between two looks at the free space."""


class Shelf:
    """Snapshots whose clients were lost, for when they come back; the newest alone has a place.

    A snapshot goes by its chain, which is random: who knows it, sent it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._coming: dict[bytes, Arrival] = {}
        self._left: tuple[bytes, Spool, threading.Timer] | None = None

    def begin(self, chain: bytes, arrival: Arrival) -> None:
        """A snapshot comes by ``arrival``."""
        with self._changed:
            self._coming[chain] = arrival
        self._drop_left()

    def end(self, chain: bytes, arrival: Arrival, left: Spool | None = None) -> None:
        """No more comes by ``arrival``, of which ``left`` is to be kept for a while."""
        with self._changed:
            if self._coming.get(chain) is arrival:
                del self._coming[chain]
            self._changed.notify_all()
        if left is None:
            return
        self._drop_left()
        timer = threading.Timer(KEPT_FOR_S, self._drop_left, (left,))
        timer.daemon = True
        with self._changed:
            self._left = chain, left, timer
            self._changed.notify_all()
        timer.start()

    def take(self, chain: bytes) -> tuple[int, Spool | None]:
        """How much there is of a snapshot, and the spool with that; ALL_HELD if all of it came.

        A connection over which it still came is cut off.
        """
        with self._changed:
            before = self._coming.get(chain)
            if before is not None and not before.is_complete:
                before.cut()
                self._changed.wait_for(lambda: chain not in self._coming, CUT_WITHIN_S)
            if chain in self._coming:
                return ALL_HELD, None
            if self._left is None or self._left[0] != chain:
                return 0, None
            _, spool, timer = self._left
            timer.cancel()
            self._left = None
            return spool.size, spool

    def _drop_left(self, only: Spool | None = None) -> None:
        with self._changed:
            if self._left is None or only not in (None, self._left[1]):
                return
            _, spool, timer = self._left
            self._left = None
        timer.cancel()
        spool.close()


class Arrival:
    """The snapshot that a client sends, one at a time: in pieces, the last of which is answered.

    Args:
        shelf: keeps what came when the connection breaks.

    Attributes:
        chain: that of the snapshot that has begun, if its client named one; else None.
        is_complete: all of it came, and it is looked at.
    """

    def __init__(self, client: Client, keeper: Keeper, shelf: Shelf) -> None:
        self.chain: bytes | None = None
        self.is_complete = False
        self._shelf = shelf
        self._client = client
        self._keeper = keeper
        self._refused = ""
        self._spool: Spool | None = None

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
        self._refused = "" if override else self._keeper.old_snapshot(version)
        if not self._refused:
            path = f"{self._keeper.backend.scratch_prefix}in-{self._client.number}"
            snapshot = Snapshot(path, version) if chain is None else Snapshot(path, version, chain)
            self._spool = Spool(snapshot)
            if chain is not None:
                self._shelf.begin(chain, self)

    def go_on(self, chain: bytes) -> int:
        """The bytes that came of the snapshot ``chain`` before: the client sends the rest here.

        ALL_HELD if all of it came.
        """
        held, spool = self._shelf.take(chain)
        if spool is not None:
            self.drop()
            self.chain, self._spool, self._refused = chain, spool, ""
            self._shelf.begin(chain, self)
        return held

    def add(self, piece: bytes) -> None:
        """Take a piece; Dropped if the disk has no room for it."""
        if self._spool is not None:
            self._spool.add(piece)

    def end(self, version: int, replace: Callable[[Snapshot], Answer]) -> None:
        """All of it came: call ``replace`` with it if it holds ``version``, and answer."""
        self.chain = None
        if self._spool is None:
            what = f"a snapshot of version {version}: {self._refused}"
            return self._client.refuse(what, NackCode.OLD_SNAPSHOT)
        self.is_complete = True
        self._spool.finish()
        snapshot = self._spool.snapshot
        self._client.ask(lambda: replace(snapshot))
        self.drop()

    def drop(self) -> None:
        """Remove what came."""
        if self._spool is not None:
            self._spool.close()
            self._shelf.end(self._spool.snapshot.chain, self)
            self._spool = None
        self.is_complete = False

    def leave(self) -> None:
        """The connection is closed: what came without its end waits for the next one."""
        if self._spool is not None and self.chain is not None:
            self._shelf.end(self.chain, self, self._spool)
            self._spool = None
        self.drop()

    def cut(self) -> None:
        """End the connection from another thread."""
        self._client.cut()


class Spool:
    """A snapshot on its way in: a scratch file beside the backup.

    Args:
        snapshot: its path, which must not exist, and what the client says of it.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        with self._writing():
            self._file = os.fdopen(durable.create(snapshot.path), "wb")
        self._unchecked = 0

    @property
    def size(self) -> int:
        """Bytes that came."""
        return self._file.tell()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(self.snapshot.path, error, "write") from error

    def add(self, piece: bytes) -> None:
        """Take a piece; Dropped if the disk has no room for it."""
        self._unchecked += len(piece)
        if self._unchecked >= SPACE_CHECK_BYTES:
            self._unchecked = 0
            self._check_space()
        with self._writing():
            self._file.write(piece)

    def _check_space(self) -> None:
        if shutil.disk_usage(os.path.dirname(self.snapshot.path)).free < MIN_FREE_BYTES:
            raise Dropped("the disk has no room for this snapshot")

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
