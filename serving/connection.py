"""One client's connection, which has a thread of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

import protocol
from backend import log
from errors import BackupError
from protocol import Event, Nack, NackCode, Packet, PacketType, Part, SnapshotPart
from serving.client import Answer, Dropped
from serving.door import Caller
from serving.incoming import Incoming
from serving.keeper import Keeper
from serving.memory import Memory
from serving.outgoing import Outgoing
from serving.places import Place, Places
from serving.protocol1 import Protocol1
from serving.protocol2 import Protocol2
from serving.room import Room
from serving.spool import Arrival, Shelf
from serving.turns import Turns
from stream import Stream
from upkeep.compaction import Compactor

READS = frozenset(
    {
        PacketType.REQ_METADATA,
        PacketType.RESTORE,
        PacketType.FOLLOW,
        PacketType.STATUS,
        PacketType.ACK,
    }
)
"""What a connection may send that is for reading only."""


class Host(Protocol):
    """The server, as its connections know it."""

    keeper: Keeper
    compactor: Compactor
    shelf: Shelf
    memory: Memory
    places: Places
    room: Room
    turns: Turns

    def guard(self, write: Callable[[], None]) -> None:
        """Call ``write``; if the disk fails, stop."""


class Connection:
    """One client: what both protocols have in common. It speaks 1 until 2 is agreed on.

    Args:
        host: whose connection it is.
        caller: who it is.
        number: connections are numbered as they come.
        is_read_only: whatever it asks for, it never writes.
    """

    def __init__(
        self, host: Host, stream: Stream, caller: Caller, number: int, is_read_only: bool
    ) -> None:
        self.number = number
        self.who = caller.who
        self.machine = caller.who
        self.claims = self.ended = False
        self._incoming = Incoming(stream, lambda: self._arrival.is_open)
        self._host = host
        self._keeper = host.keeper
        self._stream = stream
        self._peer = caller.at
        self._is_read_only = is_read_only
        self._introduced = self._restored = False
        self._outgoing = Outgoing(stream, self._incoming, self, host.turns)
        self._arrival = Arrival(self, self._keeper, host.room, host.shelf)
        parts = self, self._keeper, self._arrival, self._outgoing, host.memory
        # Both for as long as it lasts: the records of one direction are one stream.
        self._spoken_2 = Protocol2(*parts)
        self._spoken: dict[int, Protocol1 | Protocol2] = {1: Protocol1(*parts), 2: self._spoken_2}
        self._speaks = self._spoken[1]

    def __str__(self) -> str:
        return f"{self._peer} (connection {self.number})"

    def run(self) -> None:
        """Serve until the client leaves or breaks a rule."""
        try:
            log.debug(f"{self}: connected")
            for event in self._incoming:
                self._handle(event)
            log.debug(f"{self}: left")
        except Dropped as error:
            log.warning(f"{self}: closed: {error}")
        except (BackupError, MemoryError) as error:
            log.warning(f"{self}: closed: {str(error) or 'out of memory'}")
        except OSError as error:
            log.info(f"{self}: connection lost: {error}")
        finally:
            self._arrival.leave()
            self._host.memory.release(self)
            self._keeper.forget(self)
            self._host.places.leave(self)
            self._stream.close()

    def _handle(self, event: Event) -> None:
        if not self._introduced:
            self._introduced = True
            self._take_place()
        if not isinstance(event, Packet):
            return self._refuse_part(event) if self._is_read_only else self._speaks.take(event)
        if self._is_read_only and event.type not in READS:
            return self._refuse_to_write()
        match event.type:
            case PacketType.REQ_METADATA:
                self._introduce(event.payload)
            case PacketType.RESTORE:
                self._restore(event.payload)
            case PacketType.FOLLOW if self._speaks is self._spoken_2:
                self._follow(event.payload)
            case PacketType.COMPACT:
                self._compact()
            case PacketType.ACK if self._restored:
                pass  # Of a packet of the restore, which it is still reading.
            case _:
                self._speaks.take(event)

    def _introduce(self, payload: bytes) -> None:
        """REQ_METADATA: agree on a protocol, hear who it is, and tell what there is."""
        self._speaks = self._spoken[protocol.agreed_protocol(payload)]
        owner, machine = protocol.claimed_owner(payload)
        self.machine = machine or self.who
        if owner is not None and self._is_read_only:
            return self._refuse_to_write()
        if owner is not None and self._keeper.is_foreign(owner):
            text = f"{self.machine} as a writer: {self._keeper.whose()}"
            return self.refuse(text, NackCode.OTHER_OWNER)
        damage = self._keeper.backend.damage
        if owner is not None and damage is not None:
            return self.refuse(f"{self.machine} as a writer: {damage.problem}", NackCode.DAMAGED)
        self.claims = owner is not None
        self._take_place()
        self._outgoing.send(self._speaks.metadata())

    def _take_place(self) -> None:
        self._host.places.enter(self, Place.OWNER if self.claims else Place.GUEST)

    def _restore(self, payload: bytes) -> None:
        log.info(f"{self}: restores the backup")
        self._restored = True
        self._host.places.enter(self, Place.READER)
        with self._outgoing.restoring():
            self._speaks.restore(payload)
        self._take_place()

    def _follow(self, payload: bytes) -> None:
        log.info(f"{self}: follows the backup")
        self._restored = True
        self._host.places.enter(self, Place.FOLLOWER)
        self._spoken_2.follow(payload)
        self._take_place()

    def _refuse_part(self, part: SnapshotPart | Part) -> None:
        if part.last:
            self._refuse_to_write()

    def _refuse_to_write(self) -> None:
        text = f"{self.machine} as a writer: this address is for reading only"
        self.refuse(text, NackCode.READ_ONLY)

    def _compact(self) -> None:
        try:
            result = self._host.compactor.run()
        except BackupError as error:
            return self.refuse(f"compaction: {error}")
        self._outgoing.send(protocol.encode(PacketType.COMPACT_RES, json.dumps(result).encode()))

    # See client.Client

    def ask(self, decide: Callable[[], Answer]) -> Answer:
        """Call ``decide`` under the keeper's lock and send what it returns."""
        # The answer, too, under the lock: else who takes over, or a stop of the server, could end
        # this connection between a deed and its ACK. So it is sent at once or never.
        with self._keeper.lock:
            answer = decide()
            self.answer(answer)
        self._keeper.bell.ring()
        return answer

    def write(self, decide: Callable[[], Answer]) -> None:
        """``ask`` for what is appended: if the disk fails then, the server stops."""

        def ask() -> None:
            self.ask(decide)

        self._host.guard(ask)

    def refuse(self, reason: str, code: NackCode = NackCode.OTHER) -> None:
        """Answer that nothing was stored, and why."""
        self.answer(Nack(self._keeper.backend.version, code, f"refused {reason}"))

    def answer(self, answer: Answer) -> None:
        """Say what became of a request; the log is told of each refusal."""
        if isinstance(answer, Nack):
            log.warning(f"{self}: {answer.text}")
        self._outgoing.send_now(self._speaks.encode(answer))

    def cut(self) -> None:
        """End the connection from another thread."""
        self.ended = True
        self._stream.cut()
