"""One budget of memory for what all clients send."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable

from backend import MAX_CHUNK_SIZE
from protocol import Nack
from serving.client import Client, Dropped
from serving.places import Writers

BUDGET = 256 << 20
"""Bytes of memory for all connections."""
SHARE = 2 * MAX_CHUNK_SIZE
"""What each connection has of it unasked: a packet that comes whole, and what that inflates to."""
COPIES = 2
"""A payload stands in memory as it came, and in the record that is written."""
WAIT_S = 60.0
"""How long a payload waits for its turn; its client waits longer for an answer."""


LOOK_S = 1.0


class Memory:
    """What is left of the budget; who asks for it waits in turn.

    Args:
        size: bytes. Who needs more gets all of it, alone.
        writers: tells whose memory nobody takes: anybody may claim the backup.
    """

    def __init__(self, size: int, writers: Writers) -> None:
        self.size = size
        self._writers = writers
        self.inflating = threading.Lock()
        """Held while something large is inflated that is of no use: one at a time."""
        self._changed = threading.Condition()
        self._held: dict[Client, int] = {}
        self._waiting: list[Client] = []

    def reserve(self, client: Client, size: int, first: bool) -> None:
        """Wait until ``size`` bytes are free, and hold them for ``client``.

        Args:
            first: it waits for the writer alone: others who hold what it needs lose their
                connections.

        Raises:
            Dropped: it did not get them in time.
        """
        size = min(size, self.size)
        with self._changed:
            self._waiting.insert(0 if first else len(self._waiting), client)
            if first and not self._fits(size):
                for other in self._held:
                    if not self._writers.is_writer(other):
                        other.cut()
            try:
                waited_s = 0.0
                while not self._changed.wait_for(
                    lambda: self._waiting[0] is client and self._fits(size), LOOK_S
                ):
                    waited_s += LOOK_S
                    if client.ended or waited_s >= WAIT_S:
                        raise Dropped(f"no memory came free for it in {waited_s:.0f} s")
                self._held[client] = size
            finally:
                self._waiting.remove(client)
                self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return sum(self._held.values()) + size <= self.size

    def release(self, client: Client) -> None:
        """Give back what is held for ``client``, if anything is."""
        if client in self._held:
            with self._changed:
                del self._held[client]
                self._changed.notify_all()


class Payload:
    """A change's payload on its way in, of any size.

    Args:
        client: whose it is.
        large: it is known to be more than MAX_CHUNK_SIZE, up to which it needs nobody's leave.
        first: see Memory.reserve.
        admit: says what memory it needs, or why it need not come.

    Attributes:
        refused: why it need not come.
    """

    def __init__(
        self,
        memory: Memory,
        client: Client,
        large: bool,
        first: bool,
        admit: Callable[[], int | Nack],
    ) -> None:
        self.refused: Nack | None = None
        self._memory = memory
        self._client = client
        self._first = first
        self._admit = admit
        self._gathered = io.BytesIO()
        self._asked = False
        if large:
            self._ask()

    def add(self, pieces: Iterable[bytes]) -> None:
        """Take what comes next, as it is made; Dropped if there is no memory for it."""
        if self.refused is not None:
            with self._memory.inflating:
                for _ in pieces:
                    pass
            return
        for piece in pieces:
            if not self._asked and self._gathered.tell() + len(piece) > MAX_CHUNK_SIZE:
                self._ask()
                if self.refused is not None:
                    return
            self._gathered.write(piece)

    def _ask(self) -> None:
        self._asked = True
        answer = self._admit()
        if isinstance(answer, Nack):
            self.refused = answer
        else:
            self._memory.reserve(self._client, COPIES * answer, self._first)

    def end(self) -> bytes:
        """All of it; what it holds of the budget is released by ``close``."""
        return self._gathered.getvalue()

    def close(self) -> None:
        """Forget it."""
        self._gathered = io.BytesIO()
        self._memory.release(self._client)
