"""The backup server: listens, and gives each client's connection its thread."""

from __future__ import annotations

import errno
import itertools
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

import unwind
from backend import NOTICE, log
from errors import DiskError
from filebackend import FileBackend
from serving import memory, places
from serving.connection import Connection
from serving.door import Door
from serving.fewlines import PERIOD_S, FewLines
from serving.keeper import Keeper
from serving.memory import Memory
from serving.places import Place, Places
from serving.room import Room
from serving.spool import Shelf
from serving.turns import Turns
from stream import Stream
from upkeep.compaction import Compactor, Housekeeper

ACCEPT_PAUSE_S = 0.1
SWITCH_INTERVAL_S = 0.0002
"""So that a thread that streams a backup does not make the writer's thread wait."""


class Server:
    """Listens, and gives each connection its thread.

    Args:
        backend: open for writing.
        doors: where it listens; ``run`` closes them.
        least: when to compact, see compaction.parse_least.
        allows_1: clients of protocol 1 may write also after one of protocol 2 has.
    """

    def __init__(
        self,
        backend: FileBackend,
        doors: Sequence[Door],
        least: int | None,
        allows_1: bool = False,
    ) -> None:
        self.keeper = Keeper(backend, allows_1)
        self.memory = Memory(memory.BUDGET - places.ALL * memory.SHARE, self.keeper)
        self.places = Places(self.keeper)
        self.room = Room(backend.path)
        self.turns = Turns()
        self.compactor = Compactor(backend, self.keeper.lock)
        self.shelf = Shelf()
        self._numbers = itertools.count(1)
        self._wake_read, self._wake_write = os.pipe()
        self._exit_code: int | None = None
        self._stopping = threading.RLock()  # A signal may come while it is held.
        self._doors = doors
        self._housekeeper = Housekeeper(backend, self.compactor, least)

    def run(self) -> int:
        """Serve until a signal or a failing disk; the exit code."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for number in unwind.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: self._stop(0))
        # A signal that comes just before select() sleeps would not end that sleep.
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        few = FewLines()
        log.addFilter(few)
        self._housekeeper.start()
        with selectors.DefaultSelector() as selector:
            for door in self._doors:
                selector.register(door, selectors.EVENT_READ, door)
            selector.register(self._wake_read, selectors.EVENT_READ, None)
            while self._exit_code is None:
                for key, _ in selector.select(PERIOD_S):
                    if key.data is not None:
                        self._accept(key.data)
                few.report()
        for door in self._doors:
            door.close()
        signal.set_wakeup_fd(-1)
        with self._stopping:  # Whoever stopped it may not have written yet.
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._housekeeper.stop()
        # Finish the change in hand; nothing is written after it.
        self.keeper.lock.acquire()
        self.keeper.backend.close()
        log.removeFilter(few)
        log.log(NOTICE, "stopped")
        return self._exit_code

    def _stop(self, exit_code: int) -> None:
        with self._stopping:
            if self._exit_code is None:
                self._exit_code = exit_code
                os.write(self._wake_write, b"x")

    def guard(self, write: Callable[[], None]) -> None:
        """Call ``write``; if the disk fails, stop: what it holds can only be seen anew."""
        try:
            write()
        except DiskError as error:
            log.critical(f"{error} The server stops; start it again when the disk is well.")
            self._stop(1)
            raise

    def _accept(self, door: Door) -> None:
        try:
            accepted = door.accept()
            if accepted is None:
                return
            sock, caller = accepted
            stream = Stream(sock)
        except OSError as error:
            log.warning(f"a connection could not be accepted: {error}")
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.places.make_way()
            time.sleep(ACCEPT_PAUSE_S)  # Do not spin.
            return
        number, connection = next(self._numbers), None
        try:
            connection = Connection(self, stream, caller, number, door.is_read_only)
            self.places.enter(connection, Place.NEW)
            threading.Thread(target=connection.run, daemon=True).start()
        except (RuntimeError, MemoryError) as error:  # No thread or no memory is left.
            log.warning(
                f"{caller.at} (connection {number}): closed: {str(error) or 'out of memory'}"
            )
            if connection is not None:
                self.places.leave(connection)
            stream.close()
            self.places.make_way()
