"""Protocol 1 as a server speaks it: what clients of before send, and understand.

It names neither owner nor chain. Together with its rules (the end of ``rules``) it stands apart, so
that it can be dropped one day.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Generator, Iterable, Iterator

import protocol
from backend import Beginning, Change, Ending, Found, Step
from errors import InvalidChange
from protocol import Event, Nack, PacketType, SnapshotPart
from serving import rules
from serving.client import Answer, Client, Dropped, Stored
from serving.keeper import Keeper
from serving.outgoing import BLOCK_SIZE, Outgoing
from serving.rules import Offer
from serving.spool import Arrival


class Protocol1:
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
        self._inflater = protocol.Inflater(0)

    def take(self, event: Event) -> None:
        """Store what the client sends; Dropped if that may not come."""
        if isinstance(event, SnapshotPart):
            return self._take_snapshot(event)
        match event.type:
            case PacketType.CHANGE:
                try:
                    change = protocol.decode_change(event.payload)
                except InvalidChange as error:
                    return self._client.refuse(str(error))
                self._client.write(lambda: self._change(change))
            case PacketType.REWIND:
                version = protocol.decode_version(event.payload)
                self._client.write(lambda: self._rewind(version))
            case _:
                raise Dropped(f"{event.type.name} may not come now")

    def _change(self, change: Change) -> Answer:
        keeper, backend = self._keeper, self._keeper.backend
        state, is_last = keeper.state(self._client), backend.is_last(change)
        return keeper.carry_out(
            self._client,
            rules.change_1(state, change.base, change.bumps, is_last),
            f"the change to version {change.version}",
            lambda: backend.add_change(change),
            Stored(change.version),
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

    def restore(self) -> None:
        """Send a snapshot and the changes after it, without those that were taken back."""
        backend = self._keeper.backend
        with contextlib.closing(backend.read()) as reading:
            for block in blocks(reading, os.path.dirname(backend.path)):
                self._outgoing.send_block(block)
        self._outgoing.send_block(protocol.encode(PacketType.DONE))


def blocks(steps: Iterable[Step], directory: str) -> Iterator[bytes]:
    """The SNAPSHOT and CHANGE packets of a restore, in blocks that are good to send.

    Raises:
        Dropped: behind them stands damage.
    """
    all_found = (step.found for step in steps)
    block = bytearray()
    for found in all_found:
        while isinstance(found, Beginning):
            found = yield from _snapshot_blocks(found, all_found, directory)
        if isinstance(found, Ending):
            yield bytes(block)
            if found.damage is not None:
                raise Dropped(f"the backup is damaged: {found.damage}")
            return
        block += protocol.encode_change(found)
        if len(block) >= BLOCK_SIZE:
            yield bytes(block)
            block.clear()


def _snapshot_blocks(
    beginning: Beginning, following: Iterator[Found], directory: str
) -> Generator[bytes, None, Found]:
    """The SNAPSHOT packet of the pieces that come first; returns what comes after them."""
    deflate = zlib.compressobj(1)
    # The packet begins with its length, and memory is bounded: hence a scratch file.
    with tempfile.TemporaryFile(dir=directory) as packed:
        for found in following:
            if not isinstance(found, Change) or found.snapshot is None:
                break
            packed.write(deflate.compress(found.snapshot))
        packed.write(deflate.flush())
        yield protocol.snapshot_header(beginning.version, packed.tell())
        packed.seek(0)
        while block := packed.read(BLOCK_SIZE):
            yield block
    return found
