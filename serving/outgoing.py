"""What goes to a client: answers, and a backup."""

from __future__ import annotations

import select
import time

from serving.client import Dropped
from serving.incoming import Incoming
from stream import Stream

SEND_TIMEOUT_S = 60.0
PAUSE_S = 600.0
"""How long a client may take nothing of a backup: it may be replaying what it has."""
LOOK_S = 5.0
"""Time between two looks whether something moves: not everything that does lets send() go on."""
BLOCK_SIZE = 1 << 16
"""Bytes of a backup that are good to send at once."""


class Outgoing:
    """What goes over ``stream``.

    Args:
        incoming: what comes over it.
    """

    def __init__(self, stream: Stream, incoming: Incoming) -> None:
        self._stream = stream
        self._incoming = incoming

    def send(self, data: bytes) -> None:
        """Send all of ``data``; TimeoutError if it does not move on."""
        self._stream.send(data, SEND_TIMEOUT_S)

    def send_now(self, packet: bytes) -> None:
        """Send ``packet`` at once or never: Dropped if the client has read too little."""
        if self._stream.send_now(packet) != len(packet):
            raise Dropped("it does not read its answers")

    def begin_backup(self) -> None:
        """Blocks of a backup come next."""
        self._stream.let_it_pause(2 * PAUSE_S)  # send_block says why it ends, earlier.

    def send_block(self, data: bytes) -> None:
        """Send ``data`` of a backup while taking the ACKs that the client may send meanwhile."""
        view, moved, queued = memoryview(data), time.monotonic(), self._stream.queued()
        while view:
            readable, writable, _ = select.select(
                [self._stream], [self._stream], [], min(LOOK_S, PAUSE_S)
            )
            before, queued = queued, self._stream.queued()
            if queued != before:
                moved = time.monotonic()
            if time.monotonic() - moved > PAUSE_S:
                raise Dropped(f"it took nothing for {PAUSE_S:.0f} s")
            if readable:
                received = self._stream.receive(SEND_TIMEOUT_S)
                if not received:
                    raise ConnectionError("it left during a restore")
                self._incoming.take_acks(received)
            if writable and (sent := self._stream.send_now(view)):
                view, moved, queued = view[sent:], time.monotonic(), self._stream.queued()
