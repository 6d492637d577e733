"""A pass over what a server keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import protocol
from backend import Ending, Reading, Step
from errors import BackupError
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, Head, Kind
from filelog.reader import Rewinds, effective
from protocol import Coming, Metadata, PacketType, Place, ProtocolError
from remote import reading1
from remote.address import HostPort
from remote.link import Link, Refused, Unreachable


class Received:
    """The records that a server of protocol 2 sends, checked like those of a file.

    Args:
        link: a connection to it.
        last: the record that they follow, None: all are asked for.
        begins: called with what the server says of its log, before the first of them.

    Attributes:
        last: the last record that came, or that they follow.
        position, total: bytes of the log up to the end of that, and in all.

    Raises:
        OSError: the connection is lost.
        Refused: the server has no such record, or its log is damaged behind the last that came.
        BackupError: the server broke a rule.
    """

    def __init__(
        self, link: Link, last: Head | None = None, begins: Callable[[Coming], None] | None = None
    ) -> None:
        self.last = last
        self.total = self.position = 0
        self._link = link
        self._begins = begins
        self._log_start = layout2.FIRST_RECORD
        self._first = BEFORE_FIRST

    def __iter__(self) -> Iterator[tuple[Head, bytes]]:
        last = self.last
        place = None if last is None else Place(last.end, last.sequence, last.chain)
        self._link.send(protocol.encode_restore(place))
        while True:
            packet = self._link.answer()
            if packet.type is PacketType.RECORD:
                yield self.checked(*self._link.record(packet))
            elif packet.type is PacketType.COMING:
                self.begin(protocol.decode_coming(packet.payload))
            elif packet.type is PacketType.NACK:
                raise Refused(protocol.decode_nack(packet.payload))
            elif packet.type is PacketType.DONE:
                return
            else:
                raise ProtocolError(f"{packet.type.name} may not come in a restore.")

    def begin(self, coming: Coming) -> None:
        """The server has said of which log the records come."""
        self.total = coming.size
        self.position = self.last.end if self.last is not None else layout2.FIRST_RECORD
        self._log_start = layout2.log_start_of(coming.snapshot_size)
        self._first = BEFORE_FIRST._replace(backup_id=coming.backup_id)
        if self.last is not None and self.last.backup_id != coming.backup_id:
            raise ProtocolError("The server goes on with another backup.")
        if self._begins is not None:
            self._begins(coming)

    def checked(self, head: Head, payload: bytes) -> tuple[Head, bytes]:
        """The record that came next, as it follows the last; ProtocolError if it does not."""
        last = self.last or self._first
        if head.kind == Kind.SNAPSHOT:
            head = head._replace(offset=last.end, backup_id=last.backup_id)
        else:
            head = layout2.moved(head, last)
        problem = layout2.follows(self.last, head, self._log_start)
        if problem:
            raise ProtocolError(f"Version {head.version} came out of order: {problem}.")
        self.last, self.position = head, head.end
        return head, payload


def falls_short(version: int, expected: Metadata, target: HostPort) -> ProtocolError | None:
    """What is wrong if all that the server ``target`` sent leads to ``version``."""
    if version >= expected.prev_version:
        return None
    return ProtocolError(
        f"The backup server {target} is at version {expected.version}, but what it sent ends at"
        f" version {version}."
    )


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
        self._received = Received(link)
        self._rewinds = Rewinds()
        self._version = 0

    def __iter__(self) -> Iterator[Step]:
        damage: BackupError | None = None
        received = self._received
        try:
            yield from self._steps() if self._link.protocol == 2 else self._steps_1()
        except OSError as error:
            damage = Unreachable(self._target, error)
        except BackupError as error:
            damage = error
        last = received.last
        version = last.version if last is not None else self._version
        damage = damage or falls_short(version, self._expected, self._target)
        last_change_ns = last.time_ns if last else None
        ending = Ending(version, last_change_ns, damage=damage, notes=self._rewinds.notes())
        yield Step(ending, received.position, received.total)

    def _steps_1(self) -> Iterator[Step]:
        self._link.send(protocol.encode(PacketType.RESTORE))
        for found in reading1.committed(reading1.received(self._link)):
            self._version = found.version
            yield Step(found, 0, 0)

    def _steps(self) -> Iterator[Step]:
        for head, found in effective(self._rewinds.seen(self._received)):
            yield Step(found, head.end, self._received.total)

    def close(self) -> None:
        """See Reading."""
        self._link.close()
