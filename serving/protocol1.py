"""Protocol 1 as a server speaks it: what clients of before send, and understand.

It names neither owner nor chain. Together with its rules (the end of ``rules``) it stands apart, so
that it can be dropped one day.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Generator, Iterable, Iterator

import protocol
from backend import MAX_CHANGE_SIZE, Beginning, Change, Ending, Found, Step, payload_bumps
from errors import InvalidChange
from protocol import Event, Nack, PacketType, Part, ProtocolError, SnapshotPart
from serving import rules
from serving.client import Answer, Client, Dropped, Stored
from serving.keeper import Keeper
from serving.memory import Memory, Payload
from serving.outgoing import BLOCK_SIZE, Outgoing
from serving.rules import Offer
from serving.spool import Arrival


class Protocol1:
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
        self._change: tuple[int, Payload] | None = None
        self._inflater = protocol.Inflater(0)

    def take(self, event: Event) -> None:
        """Store what the client sends; Dropped if that may not come."""
        if isinstance(event, SnapshotPart):
            return self._take_snapshot(event)
        if isinstance(event, Part):
            return self._take_part(event)
        match event.type:
            case PacketType.CHANGE:
                self._take_part(Part(event.type, event.payload, first=True, last=True))
            case PacketType.REWIND:
                version = protocol.decode_version(event.payload)
                self._client.write(lambda: self._rewind(version))
            case _:
                raise Dropped(f"{event.type.name} may not come now")

    def _take_part(self, part: Part) -> None:
        if part.type is not PacketType.CHANGE:
            raise Dropped(f"{part.type.name} may not come now")
        data = part.data
        if part.first:
            if len(data) < protocol.VERSION.size:
                raise ProtocolError("A CHANGE without a version.")
            version, data = protocol.decode_version(data[:4]), data[4:]
            self._inflater = protocol.Inflater(MAX_CHANGE_SIZE)
            self._change = version, self._payload(version, data if part.last else None)
        assert self._change is not None
        version, payload = self._change
        if payload.refused is None:
            payload.add(self._inflater.feed(data))
        if part.last:
            self._change = None
            self._end_change(version, payload)
            payload.close()

    def _payload(self, version: int, whole: bytes | None) -> Payload:
        """Takes what ``whole``, if that came, inflates to."""
        client, keeper, memory = self._client, self._keeper, self._memory

        def admit() -> int | Nack:
            with keeper.lock:
                decision = rules.large_change_1(keeper.state(client), version)
                if (
                    nack := keeper.refused(decision, f"the change to version {version}")
                ) is not None:
                    return nack
            if whole is None:
                return memory.size  # It may become any size.
            with memory.inflating:
                return sum(map(len, protocol.Inflater(MAX_CHANGE_SIZE).feed(whole)))

        return Payload(memory, client, False, keeper.is_writer(client), admit)

    def _end_change(self, version: int, gathered: Payload) -> None:
        if (refused := gathered.refused) is not None:
            self._client.ask(lambda: refused)
            return
        self._inflater.finish()
        payload = gathered.end()
        try:
            bumps = payload_bumps(version, payload)
        except InvalidChange as error:
            return self._client.refuse(str(error))
        self._client.write(lambda: self._store(version, payload, bumps))

    def _store(self, version: int, payload: bytes, bumps: bool) -> Answer:
        keeper, backend = self._keeper, self._keeper.backend
        state, is_last = keeper.state(self._client), backend.is_last(version, payload)
        return keeper.carry_out(
            self._client,
            rules.change_1(state, version - 1 if bumps else version, bumps, is_last),
            f"the change to version {version}",
            lambda: backend.add_payload(version, payload, bumps),
            Stored(version),
        )

    def _rewind(self, version: int) -> Answer:
        keeper = self._keeper
        return keeper.carry_out(
            self._client,
            rules.rewind_1(keeper.state(self._client), version),
            f"the rewind to version {version}",
            keeper.backend.rewind,
            Stored(version),
        )

    def _take_snapshot(self, part: SnapshotPart) -> None:
        if part.first:
            self._inflater = protocol.Inflater(protocol.MAX_SNAPSHOT_SIZE)
            self._arrival.begin(Offer(part.version), rules.snapshot_1)
        if self._arrival.is_wanted:
            for piece in self._inflater.feed(part.data):
                self._arrival.add(piece)
        if part.last:
            if self._arrival.is_wanted:
                self._inflater.finish()
            self._arrival.end()

    def metadata(self) -> bytes:
        """The answer to REQ_METADATA: numbers only."""
        found = self._keeper.metadata()
        return protocol.encode_metadata(found._replace(protocol=1, details=None))

    @staticmethod
    def encode(answer: Answer) -> bytes:
        """The packet of ``answer``: versions only."""
        if isinstance(answer, Nack):
            return protocol.encode_version(PacketType.NACK, answer.version or 0)
        return protocol.encode_version(PacketType.ACK, answer.version)

    def restore(self, _payload: bytes) -> None:
        """Send a snapshot and the changes after it, without those that were taken back."""
        backend = self._keeper.backend
        with contextlib.ExitStack() as stack:
            with self._keeper.lock:  # Both of one file, though another may be put in its place.
                counted, sent = (
                    stack.enter_context(contextlib.closing(backend.read())) for _ in range(2)
                )
            for block in blocks(counted, sent):
                self._outgoing.send_block(block)
        self._outgoing.send_block(protocol.encode(PacketType.DONE))


def blocks(counted: Iterable[Step], sent: Iterable[Step]) -> Iterator[bytes]:
    """The SNAPSHOT and CHANGE packets of a restore, in blocks that are good to send.

    Args:
        counted, sent: two passes over one file.

    Raises:
        Dropped: behind them stands damage.
    """
    all_found = (step.found for step in sent)
    block = bytearray()
    for found in all_found:
        if isinstance(found, Beginning):
            found = yield from _snapshot_blocks(found.version, counted, all_found)
        if isinstance(found, Ending):
            yield bytes(block)
            if found.damage is not None:
                raise Dropped(f"the backup is damaged: {found.damage}")
            return
        assert isinstance(found, Change)
        block += protocol.encode_change(found)
        if len(block) >= BLOCK_SIZE:
            yield bytes(block)
            block.clear()


def _snapshot_blocks(
    version: int, counted: Iterable[Step], following: Iterator[Found]
) -> Generator[bytes, None, Found]:
    """The SNAPSHOT packet of the pieces that come first; returns what comes after them."""
    # The packet begins with its length, and neither memory nor disk is for readers to fill: so
    # all is compressed twice.
    size = 0
    for data in _deflated(step.found for step in counted if not isinstance(step.found, Beginning)):
        size += len(data)
        yield b""  # Others may have their turn.
    yield protocol.snapshot_header(version, size)
    return (yield from _deflated(following))


def _deflated(following: Iterator[Found]) -> Generator[bytes, None, Found]:
    """The pieces of a snapshot, compressed; returns what comes after them."""
    deflate = zlib.compressobj(1)
    for found in following:
        if not isinstance(found, Change) or found.snapshot is None:
            break
        yield deflate.compress(found.snapshot)
    yield deflate.flush()
    return found
