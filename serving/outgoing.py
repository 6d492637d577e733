"""What goes to a client: answers, and a backup."""

from __future__ import annotations

import select
import time

from serving.client import Dropped
from serving.incoming import Incoming
from stream import Stream

SEND_TIMEOUT_S = 60.0
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

    def send_block(self, data: bytes) -> None:
        """Send ``data`` of a backup while taking the ACKs that the client may send meanwhile."""
        view, moved = memoryview(data), time.monotonic()
        while view:
            readable, writable, _ = select.select(
                [self._stream], [self._stream], [], SEND_TIMEOUT_S
            )
            if time.monotonic() - moved > SEND_TIMEOUT_S:
                raise Dropped(f"it took nothing for {SEND_TIMEOUT_S:.0f} s")
            if readable:
                received = self._stream.receive(SEND_TIMEOUT_S)
                if not received:
                    raise ConnectionError("it left during a restore")
                self._incoming.take_acks(received)
            if writable and (sent := self._stream.send_now(view)):
                view, moved = view[sent:], time.monotonic()
