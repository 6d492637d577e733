"""Protocol 2 as a server speaks it: records in, answers and records out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import protocol
from backend import MAX_CHUNK_SIZE, NOBODY, log, payload_bumps
from errors import BackupError, InvalidChange
from filelog import layout2
from filelog.layout2 import Head, Kind
from filelog.reader import LogReader
from protocol import Event, Nack, NackCode, PacketType, Part, Place, SnapshotPart
from serving import rules
from serving.client import Answer, Client, Dropped
from serving.following import Follow
from serving.keeper import Keeper
from serving.memory import Memory, Payload
from serving.outgoing import BLOCK_SIZE, Outgoing
from serving.rules import Offer
from serving.spool import Arrival


class Protocol2:
    """One client's.

    Args:
        arrival: takes its snapshots.
        outgoing: what goes to it.
        memory: for its large changes.
    """

    def __init__(
        self,
        client: Client,
        keeper: Keeper,
        arrival: Arrival,
        outgoing: Outgoing,
        memory: Memory,
    ) -> None:
        self._client = client
        self._keeper = keeper
        self._arrival = arrival
        self._outgoing = outgoing
        self._memory = memory
        self._large: tuple[Head, Payload] | None = None
        self._unpacker = protocol.RecordUnpacker()
        self._packer = protocol.RecordPacker(level=1)

    def take(self, event: Event) -> None:
        """Store what the client sends; Dropped if that may not come."""
        if isinstance(event, SnapshotPart):
            raise Dropped("SNAPSHOT may not come now")
        if isinstance(event, Part):
            return self._take_part(event)
        if event.type is PacketType.HELD:
            held = protocol.HELD.pack(self._arrival.go_on(event.payload))
            return self._outgoing.send(protocol.encode(PacketType.HELD, held))
        if event.type is PacketType.STATUS:
            return self._tell_status()
        if event.type is not PacketType.RECORD:
            raise Dropped(f"{event.type.name} may not come now")
        head = self._unpacker.begin(event.payload)
        if head.length > MAX_CHUNK_SIZE:
            return self._take_large(head, self._unpacker.pieces(), last=True)
        self._take_record(head, self._unpacker.rest(head))

    def _take_part(self, part: Part) -> None:
        if part.type is not PacketType.RECORD:
            raise Dropped(f"{part.type.name} may not come now")
        if part.first:
            head = self._unpacker.begin(part.data)
            return self._take_large(head, self._unpacker.pieces(), part.last)
        assert self._large is not None
        self._take_large(self._large[0], self._unpacker.pieces(part.data), part.last)

    def _take_large(self, head: Head, pieces: Iterable[bytes], last: bool) -> None:
        """Take some of the payload of a change for which memory is to be had first."""
        if self._large is None:
            if head.kind != Kind.CHANGE:
                raise Dropped(f"a record of kind {head.kind} is too large")
            client, keeper = self._client, self._keeper
            first = client.claims or keeper.is_writer(client)
            large = Payload(
                self._memory,
                client,
                True,
                first,
                lambda: keeper.record_refusal(client, head) or head.length,
            )
            self._large = head, large
        large = self._large[1]
        large.add(pieces)
        if last:
            self._large = None
            self._end_large(head, large)

    def _end_large(self, head: Head, large: Payload) -> None:
        refused = large.refused
        payload = large.end() if refused is None else None
        self._unpacker.end(head, payload)
        if payload is not None:
            self._take_record(head, payload)
        elif refused is not None:
            self._client.ask(lambda: self._keeper.refuse(self._client, head, refused))
        large.close()

    def _take_record(self, head: Head, payload: bytes) -> None:
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
            found = self._keeper.status(self._client)
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

    def restore(self, payload: bytes) -> None:
        """Send the log as it stands, or what stands behind the place that is asked for."""
        backend, place = self._keeper.backend, protocol.decode_restore(payload)
        with contextlib.closing(LogReader(backend.path)) as reader:
            if place is not None and not _goes_on(reader, place):
                text = "the place to go on from is not in the log any more: it was compacted"
                nack = Nack(backend.version, NackCode.NO_SUCH_PLACE, text)
                return self._outgoing.send_block(protocol.encode_nack(nack))
            self._send_records(reader)
        if reader.damage is not None:
            log.warning(f"{self._client}: the restore ends early: {reader.damage}")
            nack = Nack(backend.version, NackCode.DAMAGED, str(reader.damage))
            return self._outgoing.send_block(protocol.encode_nack(nack))
        self._outgoing.send_block(protocol.encode(PacketType.DONE))

    def follow(self, payload: bytes) -> None:
        """Send the log, or what stands behind the record that is named, and what comes."""
        last = protocol.decode_follow(payload)
        keeper = self._keeper
        parts = keeper.backend, self._outgoing, self._packer, keeper.bell
        Follow(self._client, *parts).run(last)

    def _send_records(self, reader: LogReader) -> None:
        log_start = reader.log_start or layout2.FIRST_RECORD
        size, backup_id = self._keeper.backend.size, reader.backup_id or NOBODY
        coming = size, layout2.snapshot_size(log_start), backup_id
        block = bytearray(protocol.encode(PacketType.COMING, protocol.COMING.pack(*coming)))
        for head, payload in reader:
            block += self._packer.pack(head, payload)
            if len(block) >= BLOCK_SIZE:
                self._outgoing.send_block(bytes(block))
                block.clear()
        self._outgoing.send_block(bytes(block))


def _goes_on(reader: LogReader, place: Place) -> bool:
    """Have ``reader`` begin behind ``place``; False if that is not in its log."""
    head = reader.ending_at(place.offset)
    if head is None or (head.sequence, head.chain) != (place.sequence, place.chain):
        return False
    reader.start_after(head)
    return True
