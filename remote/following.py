"""What a server keeps is followed: it sends each record as soon as it is on stable storage."""

from __future__ import annotations

import time
from collections.abc import Iterator

import protocol
from errors import PlaceGone
from filelog.layout2 import Head
from protocol import NackCode, Packet, PacketType, ProtocolError
from remote.link import Link, Refused
from remote.reading import Received

PAUSE_S = 1.0
"""How often whoever follows gets to do something else."""
SILENT_S = 45.0
"""Who hears nothing for so long has lost the server: it speaks every protocol.KEEP_S."""


class Following:
    """The records that a server sends as they come, checked like those of a file.

    Args:
        link: a connection to it, which speaks protocol 2.
        last: the record that they follow, None: all come.
        where: names the backup in an error.

    Attributes:
        last: the last record that came, or that they follow.
    """

    def __init__(self, link: Link, last: Head | None, where: str) -> None:
        self._link = link
        self._after = last
        self._where = where
        self._received = Received(link, last)

    @property
    def last(self) -> Head | None:
        """See the class."""
        return self._received.last

    def records(self) -> Iterator[tuple[Head, bytes] | None]:
        """The records; None where all there is was given, and then every PAUSE_S.

        Raises:
            OSError: the connection is lost, or the server silent.
            PlaceGone: the server does not hold the record that they follow.
            BackupError: it refuses, or broke a rule.
        """
        self._link.send(protocol.encode_follow(self._after))
        self._begin(self._link.answer())
        in_step = False
        while True:
            packet = self._next()
            if packet is not None and packet.type is PacketType.RECORD:
                in_step = False
                yield self._received.checked(*self._link.record(packet))
                continue
            if packet is not None:
                self._expect(packet, PacketType.PAUSE)
                in_step = True
            if in_step:
                yield None

    def _next(self) -> Packet | None:
        """The next packet, None if none is whole in PAUSE_S."""
        try:
            return self._link.answer(PAUSE_S)
        except TimeoutError:
            if time.monotonic() - self._link.heard_s > SILENT_S:
                raise
            return None

    def _begin(self, packet: Packet) -> None:
        self._expect(packet, PacketType.FOLLOWING)
        coming, place = protocol.decode_following(packet.payload)
        after = self._after
        if (place is None) != (after is None):
            raise ProtocolError("The server goes on from another record.")
        if place is not None and after is not None:
            # As it stands there: it may be of another log, or a snapshot that stands for it.
            if place.chain != after.chain or (place.rewindable and not after.rewindable):
                raise ProtocolError("The server goes on from another record.")
            self._received.last = place
        self._received.begin(coming)

    def _expect(self, packet: Packet, kind: PacketType) -> None:
        if packet.type is kind:
            return
        if packet.type is not PacketType.NACK:
            raise ProtocolError(f"{packet.type.name} may not come while a backup is followed.")
        nack = protocol.decode_nack(packet.payload)
        if nack.code is NackCode.NO_SUCH_PLACE:
            raise PlaceGone(self._where, self.last.version if self.last is not None else 0)
        raise Refused(nack)
