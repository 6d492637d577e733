"""What a client does for servers of protocol 1 alone: all that goes when they are gone.

Such a server tells a version and a count of changes, but no chain and no session. So what became
of a record is told by counting, servers differ in what they count, and old ones forget a rewind
when they are killed. A server may be replaced by one of protocol 2 at any reconnect; the other way
round is refused (link.NoHistory).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import protocol
from backend import MAX_CHUNK_SIZE, Snapshot, chain_after
from filelog.layout2 import Head, Kind
from protocol import Metadata, Packet, PacketType
from remote.fate import Fate

# Packets


def packet(head: Head, payload: bytes) -> bytes:
    """The packet of a change or a rewind."""
    if head.kind == Kind.REWIND:
        return protocol.encode_version(PacketType.REWIND, head.version)
    return protocol.encode_payload(head.version, payload)


def ack_of(head: Head) -> Packet:
    """What the server sends when ``head`` is stored."""
    return Packet(PacketType.ACK, protocol.VERSION.pack(head.version))


def send_snapshot(send: Callable[[bytes], None], source: BinaryIO, snapshot: Snapshot) -> None:
    """Send all of ``source``, the file of ``snapshot``, as one packet."""
    with compressed(source, os.path.dirname(snapshot.path)) as packed:
        size = packed.seek(0, os.SEEK_END)
        packed.seek(0)
        send(protocol.snapshot_header(snapshot.version, size))
        while piece := packed.read(MAX_CHUNK_SIZE):
            send(piece)


@contextlib.contextmanager
def compressed(source: BinaryIO, directory: str) -> Iterator[BinaryIO]:
    """A nameless scratch file in ``directory`` with all of ``source``, compressed by zlib.

    A packet begins with its length, and the memory is bounded: hence a file.
    """
    with tempfile.TemporaryFile(dir=directory) as packed:
        deflate = zlib.compressobj()
        while piece := source.read(MAX_CHUNK_SIZE):
            packed.write(deflate.compress(piece))
        packed.write(deflate.flush())
        yield packed


# What became of a record


def fate_of_change(version: int, before: Metadata, now: Metadata) -> Fate:
    """Whether the change to ``version``, sent when the server was at ``before``, is stored."""
    moved = now.version_count - before.version_count
    if now.version == version and moved == 1:
        return Fate.STORED
    if now.version == before.version and moved == 0:
        return Fate.LOST
    return Fate.UNKNOWN


def fate_of_rewind(before: Metadata, now: Metadata) -> Fate:
    """Whether a REWIND, sent when the server was at ``before``, is stored ``now``."""
    if now[1:4] == before[1:4]:
        return Fate.LOST
    moved = now.version_count - before.version_count
    if now.version == before.prev_version and moved in (-1, 0):  # Old servers keep the count.
        return Fate.STORED
    return Fate.UNKNOWN


class Counts:
    """What a writer must remember of a server that only counts."""

    def __init__(self) -> None:
        self._written = False
        self._rewound: Metadata | None = None
        """What the server said before the rewind that was the last record."""

    def fate(self, head: Head, before: Metadata, now: Metadata) -> Fate:
        """Whether ``head``, sent when the server was at ``before``, is stored ``now``."""
        if head.kind == Kind.REWIND:
            return fate_of_rewind(before, now)
        # A server that forgot the rewind shows what it would show with this change.
        if head.kind != Kind.CHANGE or now == self._rewound:
            return Fate.UNKNOWN
        return fate_of_change(head.version, before, now)

    def stored(self, head: Head, before: Metadata, now: Metadata) -> bool:
        """Note that ``head`` is stored; whether METADATA must be asked for what it counts now.

        Servers differ in what they count at a rewind, and one may take a repeated PRAGMA for
        the one that it has.
        """
        self._written = True
        by_counts = now.details is None
        self._rewound = before if by_counts and head.kind == Kind.REWIND else None
        return by_counts and not head.rewindable

    def session(
        self, session: bytes, before: Metadata, now: Metadata, stored: bool = False
    ) -> bytes:
        """The session to go on with after ``session``: another once the server speaks protocol 2.

        What was written in protocol 1 bears one that the server made up.

        Args:
            stored: what was sent last is stored, too.
        """
        if before.details is None and now.details is not None and (stored or self._written):
            return now.details.session
        return session

    @staticmethod
    def continuing(
        head: Head, payload: bytes, session: bytes, before: Metadata, now: Metadata
    ) -> tuple[Head, Metadata]:
        """``head`` as it is sent again, and what to compare with: other ones in protocol 2."""
        if before.details is not None or now.details is None:
            return head, before
        chain = now.details.chain_before
        if head.kind == Kind.CHANGE:
            chain = chain_after(now.details.chain, head.version, payload)
        return head._replace(session=session, chain_before=now.details.chain, chain=chain), now
