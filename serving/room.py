"""One budget of the disk's room for the snapshots that clients send."""

from __future__ import annotations

import threading

import space
from serving.client import Client

STEP = 4 << 20
"""Bytes for which room is asked at once."""


class Room:
    """What is left on the disk of the backup at ``path``, beside the reserve for changes.

    A snapshot takes its size twice: it is written to a database and to a new log.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._promised: dict[Client, int] = {}
        """Bytes of the newest step of each: none, some or all of it may be written."""

    def take(self, client: Client) -> None:
        """Promise room for a STEP more to ``client``, which has written all of its last one.

        Raises:
            NoRoom: the disk has no room for it.
            DiskError: it does not say.
        """
        with self._lock:
            self._promised[client] = 0
            space.require(self._path, sum(self._promised.values()) + 2 * STEP)
            self._promised[client] = 2 * STEP

    def give(self, client: Client) -> None:
        """The snapshot of ``client`` is done with."""
        with self._lock:
            self._promised.pop(client, None)
