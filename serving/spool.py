"""A snapshot on its way in."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import durable
from backend import Snapshot
from errors import BackupError, DiskError
from filelog import former
from protocol import NackCode
from serving import room, rules
from serving.client import Client, Stored
from serving.keeper import Keeper, Rule
from serving.room import Room
from serving.rules import Offer
from space import NoRoom
from wallet import restore


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
        self._offer = Offer(0)
        self._rule: Rule = rules.snapshot
        self._spool: Spool | None = None
        self._promised = 0
        """Bytes for which there is room on the disk."""

    @property
    def is_wanted(self) -> bool:
        """Whether its pieces are of any use: it was not refused."""
        return self._spool is not None

    def begin(self, offer: Offer, rule: Rule, chain: bytes | None = None) -> None:
        """Another snapshot comes; what came of the one before is dropped.

        Args:
            rule: says whether it may take the backup's place.
        """
        self.drop()
        self.chain, self._offer, self._rule = chain, offer, rule
        reason = self._keeper.refusal(self._client, offer, rule)
        if reason is not None:
            return self._refuse(self._keeper.words(reason), reason.code)
        path = f"{self._keeper.backend.scratch_prefix}in-{self._client.number}"
        given = (offer.version,) if chain is None else (offer.version, chain)
        with self._refusing():
            self._spool, self._promised = Spool(Snapshot(path, *given)), 0
            self.is_open = True

    def add(self, piece: bytes) -> None:
        """Take a piece."""
        if self._spool is not None:
            with self._refusing():
                self._take_room(self._spool.size, len(piece))
                self._spool.add(piece)

    def _take_room(self, size: int, more: int) -> None:
        if size + more > self._promised:
            self._room.take(self._client, size)
            self._promised = size + room.STEP

    def end(self) -> None:
        """All of it came: if it is sound, it takes the backup's place."""
        self.chain, self.is_open = None, False
        if self._spool is None:
            return  # That was said already.
        with self._refusing():
            self._spool.finish()
            ready = self._keeper.prepare(self._client, self._spool.snapshot, self._offer)
        if self._spool is None:
            return
        answer = self._client.ask(lambda: self._keeper.replace(self._client, ready, self._rule))
        self.drop()
        if isinstance(answer, Stored) and not self._offer.override:
            former.prune(self._keeper.backend.path)  # The new one was read whole.

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """What goes wrong is answered at once; what still comes of this snapshot is read past."""
        try:
            yield
        except BackupError as error:
            is_full = isinstance(error, DiskError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            code = NackCode.NO_ROOM if is_full or isinstance(error, NoRoom) else NackCode.INVALID
            self._refuse(error.problem, code)

    def _refuse(self, why: str, code: NackCode) -> None:
        self.drop()
        self._client.refuse(f"a snapshot of version {self._offer.version}: {why.rstrip('.')}", code)

    def drop(self) -> None:
        """Remove what came."""
        self.is_open = False
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
        """All of it is written."""
        with self._writing():
            self._file.close()

    def close(self) -> None:
        """Remove the scratch file."""
        with contextlib.suppress(OSError):  # What is still in memory may find no room.
            self._file.close()
        restore.remove_database(self.snapshot.path)
        restore.remove_database(f"{self.snapshot.path}-backup")
        durable.discard(f"{self.snapshot.path}-log")
