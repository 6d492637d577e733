"""How many clients are served at a time: the writer always gets in."""

from __future__ import annotations

import enum
import threading
from collections import Counter
from typing import Protocol

from backend import log
from serving.client import Client, Dropped


class Place(enum.Enum):
    """What a connection is there for, as far as it has shown.

    Attributes:
        limit: how many of them there are at a time.
    """

    limit: int

    def __init__(self, text: str, limit: int) -> None:
        self.text, self.limit = text, limit

    NEW = "have said nothing yet", 16
    GUEST = "ask, or write what is nobody's", 16
    READER = "read the backup", 15
    FOLLOWER = "follow the backup", 4
    OWNER = "claim the backup", 4


ALL = sum(place.limit for place in Place)
"""The most connections at a time."""


class Writers(Protocol):
    """Knows who was the last to write."""

    def is_writer(self, client: Client) -> bool:
        """Whether ``client`` was."""


class Places:
    """Who is connected.

    The newest connection gets in, and the oldest of its kind makes way: of those of the host or
    user who has most of them. So neither who holds on to what he has nor who always comes again
    keeps a node out that comes from elsewhere, and the writer never makes way. Only a backup that
    is on its way to a reader is left alone: there the newest has to wait.
    """

    def __init__(self, writers: Writers) -> None:
        self._writers = writers
        self._lock = threading.Lock()
        self._at: dict[Client, Place] = {}

    def enter(self, client: Client, place: Place) -> None:
        """Give ``client`` a place in place of the one that it has.

        Raises:
            Dropped: there is none for it.
        """
        with self._lock:
            if client.ended:
                raise Dropped("it made way for others")
            others = [other for other, its in self._at.items() if its is place]
            oldest = None
            if len(others) >= place.limit and client not in others:
                oldest = None if place is Place.READER else self._oldest(others, client.who)
                if oldest is None:
                    raise Dropped(f"{place.limit} clients {place.text}")
                del self._at[oldest]
            self._at[client] = place
        if oldest is not None:
            log.warning(f"{oldest}: closed: it is the oldest of {place.limit} that {place.text}")
            oldest.cut()

    def make_way(self) -> None:
        """End the oldest connection that is not the writer's: the system has no room left."""
        with self._lock:
            oldest = self._oldest(list(self._at))
            if oldest is None:
                return
            del self._at[oldest]
        oldest.cut()

    def _oldest(self, clients: list[Client], comes: str = "") -> Client | None:
        others = [client for client in clients if not self._writers.is_writer(client)]
        held = Counter([comes, *(client.who for client in others)])
        return min(others, key=lambda client: (-held[client.who], client.number), default=None)

    def leave(self, client: Client) -> None:
        """The connection of ``client`` is closed."""
        with self._lock:
            self._at.pop(client, None)
