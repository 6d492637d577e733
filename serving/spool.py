"""A snapshot on its way in."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import durable
import space
from backend import Snapshot
from errors import BackupError, DiskError
from filelog import former
from protocol import NackCode
from serving import rules
from serving.client import Client, Stored
from serving.keeper import Keeper, Rule
from serving.rules import Offer
from space import NoRoom
from wallet import restore

SPACE_CHECK_BYTES = 16 << 20
"""Bytes of a snapshot between two looks at the free space."""


class Arrival:
    """The snapshot that a client sends, one at a time: in pieces, the last of which is answered.

    Attributes:
        chain: that of the snapshot that has begun, if its client named one; else None.
    """

    def __init__(self, client: Client, keeper: Keeper) -> None:
        self.chain: bytes | None = None
        self._client = client
        self._keeper = keeper
        self._offer = Offer(0)
        self._rule: Rule = rules.snapshot
        self._spool: Spool | None = None

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
            self._spool = Spool(Snapshot(path, *given))

    def add(self, piece: bytes) -> None:
        """Take a piece."""
        if self._spool is not None:
            with self._refusing():
                self._spool.add(piece)

    def end(self) -> None:
        """All of it came: if it is sound, it takes the backup's place."""
        self.chain = None
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
        if self._spool is not None:
            self._spool.close()
            self._spool = None


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

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(self.snapshot.path, error, "write") from error

    def add(self, piece: bytes) -> None:
        """Take a piece; NoRoom if with a log of all that came the disk would be full."""
        self._unchecked += len(piece)
        if self._unchecked >= SPACE_CHECK_BYTES:
            self._unchecked = 0
            space.require(self.snapshot.path, self._file.tell() + len(piece))
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
