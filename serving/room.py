"""One budget of the disk's room for the snapshots that clients send."""

from __future__ import annotations

import threading

import space
from serving.client import Client

STEP = 4 << 20
"""Bytes for which room is asked at once."""


class Room:
    """What is left on the disk of the backup at ``path``, beside the reserve for changes.

    A snapshot needs its size once more: the new log is made of it before it is removed.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._promised: dict[Client, int] = {}
        """Bytes of the newest step of each: none, some or all of it may be written."""

    def take(self, client: Client, written: int) -> None:
        """Promise a STEP more to ``client``, which has written ``written`` bytes, its last step.

        Raises:
            NoRoom: the disk has no room for it.
            DiskError: it does not say.
        """
        with self._lock:
            self._promised[client] = 0
            needed = sum(self._promised.values()) + written + 2 * STEP
            space.require(self._path, needed)
            self._promised[client] = STEP

    def give(self, client: Client) -> None:
        """The snapshot of ``client`` is done with."""
        with self._lock:
            self._promised.pop(client, None)
