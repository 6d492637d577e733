"""A snapshot on its way in."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import durable
from backend import MAX_CHUNK_SIZE, Snapshot
from errors import BackupError, DiskError
from filebackend import FileBackend
from filelog import former, layout2
from filelog.layout2 import Head
from protocol import ALL_HELD, NackCode
from serving import room, rules
from serving.client import Client, Stored
from serving.keeper import Keeper, Rule, log_of
from serving.room import Room
from serving.rules import Offer
from space import NoRoom
from wallet import restore

KEPT_FOR_S = 600.0
"""How long what came of a snapshot waits for its client to come back."""
CUT_WITHIN_S = 10.0
"""Time in which a connection that is cut gives up its snapshot."""


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
        try:
            timer.start()
        except RuntimeError:  # No thread is left.
            self._drop_left(left)

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
        is_open: more of its pieces have to come.
        is_complete: all of it came, and it is looked at.
    """

    def __init__(self, client: Client, keeper: Keeper, room: Room, shelf: Shelf) -> None:
        self.chain: bytes | None = None
        self.is_open = self.is_complete = False
        self._shelf = shelf
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
            snapshot = Snapshot(path, *given)
            self._spool = Spool(self._keeper.backend, snapshot, offer, rule)
            self._promised = 0
            self.is_open = True
            if chain is not None:
                self._shelf.begin(chain, self)

    def go_on(self, chain: bytes) -> int:
        """The bytes that came of the snapshot ``chain`` before: the client sends the rest here.

        ALL_HELD if all of it came.
        """
        held, spool = self._shelf.take(chain)
        if spool is not None:
            self.drop()
            self.chain, self._spool, self._promised = chain, spool, 0
            self._offer, self._rule = spool.offer, spool.rule
            self.is_open = True
            self._shelf.begin(chain, self)
        return held

    def add(self, piece: bytes) -> None:
        """Take a piece."""
        if self._spool is not None:
            with self._refusing():
                self._take_room(self._spool.size, len(piece))
                self._spool.add(piece)

    def _take_room(self, size: int, more: int) -> None:
        if size + more > self._promised:
            self._room.take(self._client)
            self._promised = size + room.STEP

    def end(self) -> None:
        """All of it came: if it is sound, it takes the backup's place."""
        self.chain, self.is_open = None, False
        if self._spool is None:
            return  # That was said already.
        self.is_complete = True
        with self._refusing():
            self._spool.finish(self._client.machine)
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
        except BaseException:
            self.drop()  # A piece may be missing, in the database or in the log: nobody may go on.
            raise

    def _refuse(self, why: str, code: NackCode) -> None:
        self.drop()
        text = f"a snapshot of version {self._offer.version}: {why.rstrip('.')}"
        with self._keeper.lock:  # A server that stops holds it: what fails for that is no reason.
            self._client.refuse(text, code)

    def drop(self) -> None:
        """Remove what came."""
        self.is_open = False
        if self._spool is not None:
            self._spool.close()
            self._shelf.end(self._spool.snapshot.chain, self)
            self._spool = None
            self._room.give(self._client)
        self.is_complete = False

    def leave(self) -> None:
        """The connection is closed: what came without its end waits for the next one."""
        if self._spool is not None and self.chain is not None:
            self._shelf.end(self.chain, self, self._spool)
            self._room.give(self._client)
            self._spool = None
        self.drop()

    def cut(self) -> None:
        """End the connection from another thread."""
        self._client.cut()


class Spool:
    """A snapshot on its way in: as a database, to be looked at, and as a log, to be used.

    Args:
        backend: the backup beside which both are.
        snapshot: its path, which must not exist, and what the client says of it.
        offer, rule: see Arrival.begin.

    Attributes:
        size: bytes that came.
    """

    _turn = threading.Lock()
    """Held by the one of all that is written to its log, and flushed: a node's change, which
    has to be flushed, too, waits for no more than that."""

    def __init__(self, backend: FileBackend, snapshot: Snapshot, offer: Offer, rule: Rule) -> None:
        self.snapshot, self.offer, self.rule = snapshot, offer, rule
        self.size = 0
        self._head = layout2.snapshot_head(snapshot, offer.owner, time.time_ns())
        self._unlogged = bytearray()
        """What came last, at most MAX_CHUNK_SIZE: it may be the end, whose head says so."""
        self._logger = ThreadPoolExecutor(1)
        self._logging: Future[None] | None = None
        """The piece that is on its way into the log."""
        with self._writing(), contextlib.ExitStack() as undo:
            undo.callback(durable.discard, log_of(snapshot))
            self._log = backend.begin_log(log_of(snapshot))
            undo.callback(self._log.close)
            self._file = os.fdopen(durable.create(snapshot.path), "wb")
            undo.pop_all()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(self.snapshot.path, error, "write") from error
        except RuntimeError as error:  # No thread is left.
            raise BackupError(f"It cannot be written now: {error}.") from error

    def add(self, piece: bytes) -> None:
        """Take a piece of at most MAX_CHUNK_SIZE bytes."""
        self.size += len(piece)
        with self._writing():
            self._file.write(piece)
            missing = MAX_CHUNK_SIZE - len(self._unlogged)
            self._unlogged += piece[:missing]
            if len(piece) > missing:
                self._log_unlogged()
                self._unlogged += piece[missing:]

    def _log_unlogged(self, flags: int = 0) -> None:
        """Have it written, and flushed, while the next one comes."""
        piece, self._unlogged = bytes(self._unlogged), bytearray()
        self._await_log()
        head = self._head._replace(length=len(piece), flags=flags)
        self._logging = self._logger.submit(self._write, head, piece)

    def _write(self, head: Head, piece: bytes) -> None:
        with self._turn:
            self._log.add_piece(head, piece)
            self._log.forget()

    def _await_log(self) -> None:
        logging, self._logging = self._logging, None
        if logging is not None:
            logging.result()

    def finish(self, machine: str) -> None:
        """All of it came, from ``machine``, and is written."""
        with self._writing():
            self._file.close()
            self._log_unlogged(layout2.FINAL)
            self._await_log()
            self._log.add_first_owner(self.offer.owner, machine)
            self._log.finish()

    def close(self) -> None:
        """Remove the scratch files."""
        self._logger.shutdown()
        for file in self._file, self._log:
            with contextlib.suppress(OSError):  # What is still in memory may find no room.
                file.close()
        restore.remove_database(self.snapshot.path)
        restore.remove_database(f"{self.snapshot.path}-backup")
        durable.discard(log_of(self.snapshot))
