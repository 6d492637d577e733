"""Protocol 2 as a server speaks it: records in, answers and records out."""

from __future__ import annotations

import contextlib

import protocol
from backend import log, payload_bumps
from errors import BackupError, InvalidChange
from filelog import layout2
from filelog.layout2 import Head, Kind
from filelog.reader import LogReader
from protocol import Event, Nack, NackCode, PacketType, SnapshotPart
from serving import rules
from serving.client import Answer, Client, Dropped
from serving.keeper import Keeper
from serving.outgoing import BLOCK_SIZE, Outgoing
from serving.rules import Offer
from serving.spool import Arrival


class Protocol2:
    """One client's.

    Args:
        arrival: takes its snapshots.
        outgoing: what goes to it.
    """

    def __init__(
        self, client: Client, keeper: Keeper, arrival: Arrival, outgoing: Outgoing
    ) -> None:
        self._client = client
        self._keeper = keeper
        self._arrival = arrival
        self._outgoing = outgoing
        self._unpacker = protocol.RecordUnpacker()
        self._packer = protocol.RecordPacker(level=1)

    def take(self, event: Event) -> None:
        """Store what the client sends; Dropped if that may not come."""
        if isinstance(event, SnapshotPart):
            raise Dropped("SNAPSHOT may not come now")
        if event.type is PacketType.STATUS:
            return self._tell_status()
        if event.type is not PacketType.RECORD:
            raise Dropped(f"{event.type.name} may not come now")
        head, payload = self._unpacker.unpack(event.payload)
        if head.kind == Kind.SNAPSHOT:
            return self._take_piece(head, payload)
        if head.kind == Kind.OWNER:
            return self._client.write(lambda: self._keeper.take_over(self._client, head, payload))
        if head.kind == Kind.CHANGE:
            try:
                bumps = payload_bumps(head.version, payload)
            except InvalidChange as error:
                return self._client.refuse(str(error), NackCode.INVALID)
            if head.flags != (layout2.BUMPS if bumps else 0):
                what = f"the change to version {head.version}: its flags do not fit"
                return self._client.refuse(what, NackCode.INVALID)
        self._client.write(lambda: self._keeper.record(self._client, head, payload))

    def _tell_status(self) -> None:
        try:
            found = self._keeper.backend.status()
        except BackupError as error:
            return self._client.refuse(f"a status: {error.problem}")
        self._outgoing.send(protocol.encode_status(found))

    def _take_piece(self, head: Head, payload: bytes) -> None:
        if self._arrival.chain != head.chain:
            offer = Offer(head.version, head.session, bool(head.flags & protocol.OVERRIDE))
            self._arrival.begin(offer, rules.snapshot, head.chain)
        self._arrival.add(payload)
        if head.flags & layout2.FINAL:
            self._arrival.end()

    def metadata(self) -> bytes:
        """The answer to REQ_METADATA."""
        return protocol.encode_metadata(self._keeper.metadata())

    @staticmethod
    def encode(answer: Answer) -> bytes:
        """The packet of ``answer``."""
        if isinstance(answer, Nack):
            return protocol.encode_nack(answer)
        return protocol.encode(PacketType.ACK, protocol.ACK.pack(*answer))

    def restore(self) -> None:
        """Send the log as it stands."""
        backend = self._keeper.backend
        with contextlib.closing(LogReader(backend.path)) as reader:
            size = protocol.COMING.pack(backend.size)
            block = bytearray(protocol.encode(PacketType.COMING, size))
            for head, payload in reader:
                block += self._packer.pack(head, payload)
                if len(block) >= BLOCK_SIZE:
                    self._outgoing.send_block(bytes(block))
                    block.clear()
            self._outgoing.send_block(bytes(block))
        if reader.damage is not None:
            log.warning(f"{self._client}: the restore ends early: {reader.damage}")
            nack = Nack(backend.version, NackCode.DAMAGED, str(reader.damage))
            return self._outgoing.send_block(protocol.encode_nack(nack))
        self._outgoing.send_block(protocol.encode(PacketType.DONE))
