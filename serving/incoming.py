"""The packets of a client as they come, with limits on time and rate."""

from __future__ import annotations

import time
from collections.abc import Iterator

import protocol
from protocol import Event, PacketType
from serving.client import Dropped
from stream import Stream

FIRST_PACKET_S = 30.0
"""How long a new connection may stay silent."""
GRACE_S = 30.0
MIN_RATE = 1024
"""Bytes a second that a packet's body must keep up, after the grace: Tor can."""
IDLE_CHECK_S = 3600.0


class Incoming:
    """What comes over ``stream``.

    Attributes:
        busy: a packet has begun, or is in hand.
        last_heard: when the last bytes came, by the monotonic clock.
    """

    def __init__(self, stream: Stream) -> None:
        self.busy = False
        self.last_heard = time.monotonic()
        self._stream = stream
        self._decoder = protocol.Decoder(protocol.TO_SERVER, protocol.WHOLE_SIZE)
        self._silent = True
        self._packet_began = self.last_heard
        self._packet_size = 0

    def __iter__(self) -> Iterator[Event]:
        """Packets until the client leaves.

        Raises:
            Dropped: it is too slow.
            ProtocolError: what came is no packet.
            OSError: the connection is lost.
        """
        while data := self._receive():
            for event in self._decoder.feed(data):
                self._silent, self.busy = False, True
                yield event
            self.busy = self._decoder.in_packet

    def take_acks(self, data: bytes) -> None:
        """``data`` came while a packet is in hand; Dropped if it is anything but ACKs."""
        for event in self._decoder.feed(data):
            if event[0] is not PacketType.ACK:
                raise Dropped("only ACK may come during a restore")

    def _receive(self) -> bytes:
        """The next bytes; b"" at the client's end. Dropped if it is too slow."""
        while True:
            now = time.monotonic()
            # Between packets it may be silent for ever: keepalive tells if it is gone.
            left_s, reason = IDLE_CHECK_S, ""
            if self._decoder.in_packet:
                spent_s = now - self._packet_began
                left_s = GRACE_S + self._packet_size / MIN_RATE - spent_s
                reason = f"{self._packet_size} bytes in {spent_s:.0f} s are too slow"
            elif self._silent:
                left_s = self.last_heard + FIRST_PACKET_S - now
                reason = f"it said nothing for {FIRST_PACKET_S:.0f} s"
            if left_s <= 0:
                raise Dropped(reason)
            try:
                data = self._stream.receive(left_s)
            except TimeoutError:
                continue
            self._note(len(data))
            return data

    def _note(self, size: int) -> None:
        now = time.monotonic()
        if not self._decoder.in_packet:
            self._packet_began, self._packet_size = now, 0
        self._packet_size += size
        self.last_heard = now
