"""One connection to a server, and what it may say."""

from __future__ import annotations

import contextlib
import platform
import time
from collections import deque

import protocol
from backend import Status
from errors import CLI, OLD_COPY, OWN_STATE, BackupError, stay_off
from filelog.layout2 import Head
from protocol import Metadata, Nack, NackCode, Packet, PacketType, ProtocolError
from remote import address, protocol1
from remote.address import HostPort, SocketUrl
from remote.proxy import NoWay
from stream import Stream

ANSWER_TIMEOUT_S = 90.0
"""Longer than a server retries its disk."""
SLOWEST_RATE = 10 << 10
"""Bytes a second that the slowest line brings; a large change gets so much more time."""
LEAST_RATE = 1 << 10
"""Bytes a second that an answer keeps up in all its time, but for the timeout. A server that sends
one now and then would be waited for without an end."""
MOST_ON_THE_WAY = 16 << 20
"""Bytes that buffers on the way hold, those of a tunnel too: what is sent has not arrived."""
TIMEOUT_STEP_S = 10
"""A timeout grows in steps: to set another one is a call of the system."""
SNAPSHOT_TIMEOUT_S = 3600.0
"""A server verifies a snapshot before it answers."""
LAST_WORDS_S = 1.0
COMPACT_TIMEOUT_S = 6 * 3600.0
"""Keepalive notices a server that is gone much earlier."""


class Unreachable(BackupError):
    """The server does not answer; nothing follows about what it holds."""

    def __init__(self, target: HostPort, reason: object) -> None:
        self.target = target
        next_step = "Check that it runs, and the forward, VPN or Tor on the way to it."
        if isinstance(reason, NoWay):
            next_step = reason.next_step
        why = reason
        if isinstance(reason, OSError):
            why = reason.strerror or reason  # Without its number.
        super().__init__(f"The backup server {target} cannot be reached: {why}.", next_step)


class NotTaken(BackupError):
    """The server answers, but each time a record is sent the connection is lost."""

    def __init__(self, target: HostPort, size: int, tries: int, reason: object) -> None:
        super().__init__(
            f"The backup server {target} answers, but {tries} times the line was lost while it was"
            f" to store {size} bytes: {reason}.",
            "Look at its log and its memory, and whether the way to it carries large packets: a"
            " VPN may need a smaller MTU.",
        )


class Refused(BackupError):
    """The server answered NACK."""

    def __init__(self, nack: Nack) -> None:
        text = nack.text or "it does not say why, but its log does"
        self.code = nack.code
        super().__init__(f"The backup server says no: {text}.", NEXT_STEPS[nack.code])


class Diverged(BackupError):
    """The server holds another history than this node's."""

    def __init__(self, code: NackCode, text: str) -> None:
        self.code = code
        super().__init__(f"The backup server has another history: {text}.", NEXT_STEPS[code])


class NoHistory(BackupError):
    """The server speaks protocol 1, and this node has written with protocol 2."""

    def __init__(self, target: HostPort) -> None:
        super().__init__(
            f"The backup server {target} names no owner, and no history: it is not the one that"
            " this node wrote to.",
            "Look where the URL leads. If that server is right, and of an earlier release, run"
            f" `{CLI} attach --lightning-dir DIR URL`.",
        )


NEXT_STEPS = {
    NackCode.OTHER: "Compare `backup-cli status` of it with the node.",
    NackCode.OUT_OF_DATE: f"With the node stopped run `{CLI} resync --lightning-dir DIR`.",
    NackCode.LOST_STATE: f"{OLD_COPY} `{CLI} restore URL DEST`. {OWN_STATE}",
    NackCode.TAKEN_OVER: "Two nodes write to this backup: find out which one holds the latest"
    " state, and never run the other again. If it is right that this node goes on with it, run"
    f" `{CLI} attach --lightning-dir DIR URL`. {OWN_STATE}",
    NackCode.OTHER_OWNER: stay_off(),
    NackCode.OTHER_HISTORY: OWN_STATE,
    NackCode.OLD_SNAPSHOT: f"{OLD_COPY} `{CLI} restore URL DEST`. {OWN_STATE}",
    NackCode.INVALID: "Look at both logs before you start lightningd again.",
    NackCode.NO_SUCH_PLACE: "Try again.",
    NackCode.NO_ROOM: "Make room on the disk of the server, then try again.",
    NackCode.OTHER_NODE: "Check the URL: nodes never share a backup. If it is right that this"
    f" node's takes its place, stop it and run `{CLI} resync --override --lightning-dir DIR`.",
    NackCode.MANY_KEPT: "Move them away on the server's machine, then try again.",
    NackCode.DAMAGED: f"With the node stopped run `{CLI} resync --lightning-dir DIR`.",
    NackCode.READ_ONLY: "Use the server's other address, the one for the node.",
    NackCode.NOT_ALLOWED: "Start the server with --allow-user (--read-only-user for a reader), or"
    " run this as a user whom it lets in.",
}


class Link:
    """One connection to the server: requests out, events in.

    Attributes:
        protocol: what was agreed on.
        packer: packs what is sent in protocol 2.
        still_s: how long nothing may move.
        heard_s: when something came last, by the monotonic clock.

    Raises:
        OSError: the connection is lost, or an answer took too long.
        ProtocolError: the server broke a rule.
    """

    def __init__(self, url: SocketUrl) -> None:
        self._stream = Stream(address.connect(url))
        self._decoder = protocol.Decoder(protocol.TO_CLIENT)
        self._events: deque[protocol.Event] = deque()
        self.packer = protocol.RecordPacker()
        self._unpacker = protocol.RecordUnpacker()
        self.protocol = 1
        self.still_s = ANSWER_TIMEOUT_S
        self.heard_s = time.monotonic()

    def send(self, data: bytes) -> None:
        """Send ``data``, as long as it moves on."""
        self._stream.send(data, self.still_s)

    def event(self, timeout_s: float | None = None) -> protocol.Event:
        """The next event from the server."""
        limit_s = self.still_s if timeout_s is None else timeout_s
        began, came = time.monotonic(), 0
        while not self._events:
            spent_s = time.monotonic() - began
            if came and spent_s > limit_s + came / LEAST_RATE:
                raise TimeoutError(f"{came} bytes of an answer in {spent_s:.0f} s are too slow")
            data = self._stream.receive(limit_s)
            if not data:
                raise ConnectionError("the server closed the connection")
            came += len(data)
            self.heard_s = time.monotonic()
            self._events.extend(self._decoder.feed(data))
        return self._events.popleft()

    def answer(self, timeout_s: float | None = None) -> Packet:
        """The next packet from the server, where no SNAPSHOT may come."""
        event = self.event(timeout_s)
        if not isinstance(event, Packet):
            raise ProtocolError("The server sent a SNAPSHOT that nobody asked for.")
        return event

    def has_answer(self) -> bool:
        """Whether something came already, before all was sent that it may be the answer to."""
        return bool(self._events) or self._stream.has_data()

    def last_words(self) -> Refused | None:
        """The refusal that came before the connection was lost, if one did."""
        with contextlib.suppress(OSError, ProtocolError):
            packet = self.answer(LAST_WORDS_S)
            if packet.type is PacketType.NACK:
                return Refused(protocol.decode_nack(packet.payload))
        return None

    def metadata(self, owner: bytes | None = None) -> Metadata:
        """Ask for METADATA, and agree on a protocol.

        Args:
            owner: who means to write; Refused if the backup is not his.
        """
        # Who is turned away at the door can still read why.
        with contextlib.suppress(BrokenPipeError):
            self.send(protocol.encode_request_metadata(owner, platform.node()))
        packet = self.answer()
        if packet.type is PacketType.NACK:
            raise Refused(protocol.decode_nack(packet.payload))
        if packet.type is not PacketType.METADATA:
            raise ProtocolError(f"The server answered {packet.type.name} in place of METADATA.")
        metadata = protocol.decode_metadata(packet.payload)
        self.protocol = metadata.protocol
        return metadata

    def status(self) -> Status:
        """Ask a server of protocol 2 for all that it knows of its backup."""
        self.send(protocol.encode(PacketType.STATUS))
        packet = self.answer()
        if packet.type is PacketType.NACK:
            raise Refused(protocol.decode_nack(packet.payload))
        if packet.type is not PacketType.STATUS_RES:
            raise ProtocolError(f"The server answered {packet.type.name} to STATUS.")
        return protocol.decode_status(packet.payload)

    def send_record(self, head: Head, payload: bytes) -> None:
        """Send a change, a rewind or, in protocol 2, a piece of a snapshot."""
        if self.protocol == 2:
            self.send(self.packer.pack(head, payload))
        else:
            self.send(protocol1.packet(head, payload))

    def queued(self) -> int | None:
        """Bytes that the line has still to take, if that is known."""
        return self._stream.queued()

    def held(self, chain: bytes) -> int:
        """How much the server has of the snapshot ``chain``: ALL_HELD if it is at work on it."""
        self.send(protocol.encode(PacketType.HELD, chain))
        packet = self.answer()
        if packet.type is not PacketType.HELD:
            raise ProtocolError(f"The server answered {packet.type.name} to HELD.")
        return protocol.decode_held(packet.payload)

    def record(self, packet: Packet) -> tuple[Head, bytes]:
        """The record that a RECORD packet holds."""
        return self._unpacker.unpack(packet.payload)

    def ack_of(self, head: Head) -> Packet:
        """What the server sends when ``head`` is stored."""
        if self.protocol == 2:
            return Packet(PacketType.ACK, protocol.ACK.pack(head.version, head.chain))
        return protocol1.ack_of(head)

    def await_ack(self, expected: Packet, size: int) -> None:
        """Wait until a record with ``size`` bytes of payload is acknowledged (see check_ack)."""
        steps = min(size, MOST_ON_THE_WAY) // (SLOWEST_RATE * TIMEOUT_STEP_S)
        self.check_ack(self.answer(self.still_s + steps * TIMEOUT_STEP_S), expected)

    @staticmethod
    def check_ack(packet: Packet, expected: Packet) -> None:
        """Make sure that ``packet`` is what ``ack_of`` said.

        Raises:
            Refused: it is a NACK.
            ProtocolError: it is something else.
        """
        if packet == expected:
            return
        if packet.type is PacketType.NACK:
            raise Refused(protocol.decode_nack(packet.payload))
        raise ProtocolError(
            f"The backup server answered {packet.type.name} {packet.payload[:20].hex()}"
            f" in place of ACK {expected.payload.hex()}."
        )

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
