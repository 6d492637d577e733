"""What goes to a client: answers, and a backup."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator

from serving.client import Client, Dropped
from serving.incoming import MIN_RATE, Incoming
from serving.turns import Turns
from stream import Stream

SEND_TIMEOUT_S = 60.0
PAUSE_S = 600.0
"""How long a client may take nothing of a backup: it may be replaying what it has."""
STALL_S = 0.2
"""Who takes nothing for so long lets others be served."""
BLOCK_SIZE = 1 << 16
"""Bytes of a backup that are good to send at once."""


class Outgoing:
    """What goes over ``stream``.

    Args:
        incoming: what comes over it.
        turns: of those who read the backup.
    """

    def __init__(self, stream: Stream, incoming: Incoming, client: Client, turns: Turns) -> None:
        self._stream = stream
        self._incoming = incoming
        self._client = client
        self._turns = turns
        self._began = 0.0
        """When the restore began, not counting its waits for a turn."""
        self._sent = 0

    def send(self, data: bytes) -> None:
        """Send all of ``data``; TimeoutError if it does not move on."""
        self._stream.send(data, SEND_TIMEOUT_S)

    def send_now(self, packet: bytes) -> None:
        """Send ``packet`` at once or never: Dropped if the client has read too little."""
        if self._stream.send_now(packet) != len(packet):
            raise Dropped("it does not read its answers")

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """For ``send_block``: waits for this client's turn."""
        self._turns.take(self._client)
        self._began, self._sent = time.monotonic(), 0
        self._stream.let_it_pause(2 * PAUSE_S)  # _await_writable says why it ends, earlier.
        try:
            yield
        finally:
            self._turns.give(self._client)

    def send_block(self, data: bytes) -> None:
        """Send ``data`` of a backup while taking the ACKs that the client may send meanwhile.

        Raises:
            Dropped: the client takes nothing, or too little in all the time.
        """
        if self._turns.is_over(self._client):
            self._turns.give(self._client)
            self._take_turn()
        view = memoryview(data)
        while view:
            if not self._is_writable(STALL_S):
                self._await_writable()
            sent = self._stream.send_now(view)
            view, self._sent = view[sent:], self._sent + sent

    def hear(self) -> None:
        """Take the ACKs that came; ConnectionError if the client left."""
        self._is_writable(0)

    def _is_writable(self, timeout_s: float) -> bool:
        """Whether the client takes more by then; it may send ACKs meanwhile."""
        readable, writable, _ = select.select([self._stream], [self._stream], [], timeout_s)
        if readable:
            received = self._stream.receive(SEND_TIMEOUT_S)
            if not received:
                raise ConnectionError("it left during a restore")
            self._incoming.take_acks(received)
        return bool(writable)

    def _await_writable(self) -> None:
        """Let others be served until the client takes more."""
        self._turns.give(self._client)
        moved, queued = time.monotonic(), self._stream.queued()
        while not self._is_writable(STALL_S):
            # On a slow line some of it moves long before send() could go on.
            now, before, queued = time.monotonic(), queued, self._stream.queued()
            if queued != before:
                moved = now
            if now - moved > PAUSE_S:
                raise Dropped(f"it took nothing for {PAUSE_S:.0f} s")
            spent_s = now - self._began
            if spent_s > PAUSE_S + self._sent / MIN_RATE:
                raise Dropped(f"it took {self._sent} bytes in {spent_s:.0f} s: that is too slow")
        self._take_turn()

    def _take_turn(self) -> None:
        waits = time.monotonic()
        self._turns.take(self._client)
        self._began += time.monotonic() - waits
