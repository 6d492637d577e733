"""The packets of a client as they come, with limits on time and rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import protocol
from protocol import Event, PacketType
from serving.client import Dropped
from stream import Stream

FIRST_PACKET_S = 30.0
"""How long a new connection may stay silent."""
GRACE_S = 30.0
MIN_RATE = 1024
"""Bytes a second that a request must keep up in all its time, but for the grace: Tor can."""
IDLE_CHECK_S = 3600.0


class Incoming:
    """What comes over ``stream``.

    Args:
        is_unfinished: whether more packets have to come of a request of several.
    """

    def __init__(self, stream: Stream, is_unfinished: Callable[[], bool]) -> None:
        self._stream = stream
        self._is_unfinished = is_unfinished
        self._decoder = protocol.Decoder(protocol.TO_SERVER, protocol.WHOLE_SIZE)
        self._silent = True
        self._began = time.monotonic()
        """Of the request in hand, the first one with the connection."""
        self._size = 0

    def __iter__(self) -> Iterator[Event]:
        """Packets until the client leaves.

        Raises:
            Dropped: it is too slow.
            ProtocolError: what came is no packet.
            OSError: the connection is lost.
        """
        while data := self._receive():
            for event in self._decoder.feed(data):
                self._silent = False
                yield event

    def take_acks(self, data: bytes) -> None:
        """``data`` came while a packet is in hand; Dropped if it is anything but ACKs."""
        self._began, self._size = time.monotonic(), len(data)
        for event in self._decoder.feed(data):
            if event[0] is not PacketType.ACK:
                raise Dropped("only ACK may come during a restore")

    def _receive(self) -> bytes:
        """The next bytes; b"" at the client's end. Dropped if it is too slow."""
        while True:
            spent_s = time.monotonic() - self._began
            # Between packets it may be silent for ever: keepalive tells if it is gone.
            left_s, reason = IDLE_CHECK_S, ""
            if self._is_busy():
                left_s = GRACE_S + self._size / MIN_RATE - spent_s
                reason = f"{self._size} bytes in {spent_s:.0f} s are too slow"
            elif self._silent:
                left_s = FIRST_PACKET_S - spent_s
                reason = f"it said nothing for {FIRST_PACKET_S:.0f} s"
            if left_s <= 0:
                raise Dropped(reason)
            try:
                data = self._stream.receive(left_s)
            except TimeoutError:
                continue
            if not self._silent and not self._is_busy():
                self._began, self._size = time.monotonic(), 0
            self._size += len(data)
            return data

    def _is_busy(self) -> bool:
        return self._decoder.in_packet or self._is_unfinished()
