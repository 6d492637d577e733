"""A few clients are served at a time, so that the writer does not wait."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from serving.client import Client, Dropped

AT_ONCE = 2
"""Readers of the backup that are served at a time."""
SLICE_S = 0.5
"""How long a reader is served while others wait."""
LOOK_S = 1.0


class Turns:
    """Who is served now; the others wait in turn.

    Args:
        at_once: how many are served at a time.
    """

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
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
        return len(self._served) < self._at_once and self._waiting[0] is client

    def is_over(self, client: Client) -> bool:
        """Whether ``client`` was served for long enough, and others wait."""
        return bool(self._waiting) and time.monotonic() > self._served[client]

    def give(self, client: Client) -> None:
        """Let the next have the turn of ``client``, if that has it."""
        with self._changed:
            self._served.pop(client, None)
            self._changed.notify_all()

    @contextlib.contextmanager
    def turn(self, client: Client) -> Iterator[None]:
        """One turn, as long as it takes; Dropped as by ``take``."""
        self.take(client)
        try:
            yield
        finally:
            self.give(client)
