"""Backups go to a few readers at a time, so that the writer does not wait."""

from __future__ import annotations

import threading
import time

from serving.client import Client, Dropped

AT_ONCE = 2
SLICE_S = 0.5
"""How long a reader is served while others wait."""
LOOK_S = 1.0


class Turns:
    """Who is served now; the others wait in turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._served: dict[Client, float] = {}
        """Until when, if others wait."""
        self._waiting: list[Client] = []

    def take(self, client: Client) -> None:
        """Wait until it is the turn of ``client``; Dropped if its connection ends meanwhile."""
        with self._changed:
            self._waiting.append(client)
            try:
                while not self._changed.wait_for(lambda: self._is_next(client), LOOK_S):
                    if client.ended:
                        raise Dropped("it made way for others")
                self._served[client] = time.monotonic() + SLICE_S
            finally:
                self._waiting.remove(client)
                self._changed.notify_all()

    def _is_next(self, client: Client) -> bool:
        return len(self._served) < AT_ONCE and self._waiting[0] is client

    def is_over(self, client: Client) -> bool:
        """Whether ``client`` was served for long enough, and others wait."""
        return bool(self._waiting) and time.monotonic() > self._served[client]

    def give(self, client: Client) -> None:
        """Let the next have the turn of ``client``, if that has it."""
        with self._changed:
            self._served.pop(client, None)
            self._changed.notify_all()
