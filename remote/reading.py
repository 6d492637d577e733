"""A pass over what a server keeps."""

from __future__ import annotations

from collections.abc import Iterator

import protocol
from backend import Ending, Reading, Step
from errors import BackupError
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, Head, Kind
from filelog.reader import Rewinds, effective
from protocol import Metadata, PacketType, ProtocolError
from remote import reading1
from remote.address import HostPort
from remote.link import Link, Refused, Unreachable


class SocketReading(Reading):
    """A pass over a server's backup (see Reading).

    Args:
        link: a connection that is this reading's alone.
        expected: what the server said of itself; the pass must get there.
        target: the server, for error messages.
    """

    def __init__(self, link: Link, expected: Metadata, target: HostPort) -> None:
        self._link = link
        self._expected = expected
        self._target = target
        self._last: Head | None = None
        self._rewinds = Rewinds()
        self._version = self._position = self._total = 0

    def __iter__(self) -> Iterator[Step]:
        damage: BackupError | None = None
        try:
            self._link.send(protocol.encode(PacketType.RESTORE))
            yield from self._steps() if self._link.protocol == 2 else self._steps_1()
        except OSError as error:
            damage = Unreachable(self._target, error)
        except BackupError as error:
            damage = error
        if damage is None and self._version < self._expected.prev_version:
            damage = ProtocolError(
                f"The backup server {self._target} is at version {self._expected.version}, but"
                f" what it sent ends at version {self._version}."
            )
        last_change_ns = self._last.time_ns if self._last else None
        ending = Ending(self._version, last_change_ns, damage=damage, notes=self._rewinds.notes())
        yield Step(ending, self._position, self._total)

    def _steps_1(self) -> Iterator[Step]:
        for found in reading1.committed(reading1.received(self._link)):
            self._version = found.version
            yield Step(found, 0, 0)

    def _steps(self) -> Iterator[Step]:
        for head, found in effective(self._rewinds.seen(self._records())):
            yield Step(found, head.end, self._total)

    def _records(self) -> Iterator[tuple[Head, bytes]]:
        """What a server of protocol 2 sends: its log, checked like a file."""
        while True:
            packet = self._link.answer()
            if packet.type is PacketType.RECORD:
                yield self._checked(*self._link.record(packet))
            elif packet.type is PacketType.COMING:
                self._total = protocol.decode_coming(packet.payload)
                self._position = layout2.FIRST_RECORD
            elif packet.type is PacketType.NACK:
                raise Refused(protocol.decode_nack(packet.payload))
            elif packet.type is PacketType.DONE:
                return
            else:
                raise ProtocolError(f"{packet.type.name} may not come in a restore.")

    def _checked(self, head: Head, payload: bytes) -> tuple[Head, bytes]:
        last = self._last or BEFORE_FIRST
        if head.kind == Kind.SNAPSHOT:
            head = head._replace(offset=last.end)
        else:
            head = layout2.moved(head, last)
        problem = layout2.follows(self._last, head, layout2.log_start_by(head))
        if problem:
            raise ProtocolError(f"Version {head.version} came out of order: {problem}.")
        self._last, self._version, self._position = head, head.version, head.end
        return head, payload

    def close(self) -> None:
        """See Reading."""
        self._link.close()
