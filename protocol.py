"""Wire protocol 1: packets to bytes and back. No sockets here: bytes in, events out.

A packet, all numbers big-endian and unsigned:

    offset  size  field    meaning
         0     1  type     see below
         1     4  length   of the payload
         5     n  payload

    type  name          from    payload                                      answer
      01  CHANGE        client  version u32, zlib(statements joined by NUL)  ACK or NACK
      02  SNAPSHOT      client  version u32, zlib(SQLite file)               ACK or NACK
      03  REWIND        client  version u32 to go back to                    ACK or NACK
      04  REQ_METADATA  client  none (any is ignored)                        METADATA
      05  RESTORE       client  none           SNAPSHOT and CHANGE packets, then DONE
      06  ACK           server  version u32 that is now stored
      07  NACK          server  version u32 of the backup, or none
      08  METADATA      server  protocol u32 = 1, version u32, prev_version u32,
                                version_count u64
      09  DONE          server  none
      0a  COMPACT       client  none                              COMPACT_RES or NACK
      0b  COMPACT_RES   server  JSON {"before": {"backupsize", "version_count"}, "after": ...}

The statements are UTF-8, without a NUL after the last. A SNAPSHOT replaces what was stored
before. A REWIND names the server's prev_version: one step only. The client may ACK the
packets of a RESTORE. prev_version is the version before the last change; it equals
version where nothing can be rewound. version_count is the number of changes since the
snapshot, and one for the snapshot.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from backend import MAX_CHANGE_SIZE, MAX_CHUNK_SIZE, Change
from errors import BackupError

PROTOCOL = 1
HEADER = struct.Struct("!BI")
VERSION = struct.Struct("!I")
METADATA = struct.Struct("!IIIQ")
MAX_PACKET_SIZE = 2**32 - 1
"""A packet's length is a u32."""
MAX_SNAPSHOT_SIZE = 1 << 40
"""Bytes that a SNAPSHOT may inflate to."""
MAX_TEXT_SIZE = 1 << 16
_MAX_CHANGE_PACKET = VERSION.size + MAX_CHANGE_SIZE + MAX_CHANGE_SIZE // 1000 + 64
"""zlib adds less than a thousandth to what it cannot compress."""
_GREATEST_RATIO = 1032
"""zlib compresses to no less than one byte in this many."""


class PacketType(enum.IntEnum):
    """The first byte of a packet."""

    CHANGE = 1
    SNAPSHOT = 2
    REWIND = 3
    REQ_METADATA = 4
    RESTORE = 5
    ACK = 6
    NACK = 7
    METADATA = 8
    DONE = 9
    COMPACT = 10
    COMPACT_RES = 11


TO_SERVER: Mapping[int, int] = {
    PacketType.CHANGE: _MAX_CHANGE_PACKET,
    PacketType.SNAPSHOT: MAX_PACKET_SIZE,
    PacketType.REWIND: VERSION.size,
    PacketType.REQ_METADATA: MAX_TEXT_SIZE,
    PacketType.RESTORE: MAX_TEXT_SIZE,
    PacketType.ACK: VERSION.size,
    PacketType.COMPACT: MAX_TEXT_SIZE,
}
"""What a server accepts: packet type to the greatest length."""
TO_CLIENT: Mapping[int, int] = {
    PacketType.CHANGE: _MAX_CHANGE_PACKET,
    PacketType.SNAPSHOT: MAX_PACKET_SIZE,
    PacketType.ACK: MAX_TEXT_SIZE,
    PacketType.NACK: MAX_TEXT_SIZE,
    PacketType.METADATA: MAX_TEXT_SIZE,
    PacketType.DONE: MAX_TEXT_SIZE,
    PacketType.COMPACT_RES: MAX_TEXT_SIZE,
}
"""What a client accepts: packet type to the greatest length."""


class ProtocolError(BackupError):
    """The peer broke a rule of the protocol; the connection is of no use any more."""


class Packet(NamedTuple):
    """A complete packet of any type but SNAPSHOT."""

    type: PacketType
    payload: bytes


class SnapshotPart(NamedTuple):
    """Some of the compressed bytes of a SNAPSHOT packet, which may be huge."""

    version: int
    data: bytes
    first: bool
    last: bool


Event = Packet | SnapshotPart


class Metadata(NamedTuple):
    """The answer to REQ_METADATA."""

    protocol: int
    version: int
    prev_version: int
    version_count: int


def encode(kind: PacketType, payload: bytes = b"") -> bytes:
    """One packet."""
    return HEADER.pack(kind, len(payload)) + payload


def encode_version(kind: PacketType, version: int) -> bytes:
    """A packet that holds only a version: REWIND, ACK, NACK."""
    return encode(kind, VERSION.pack(version))


def encode_change(change: Change) -> bytes:
    """The CHANGE packet of a transaction."""
    data = zlib.compress(change.payload)
    return encode(PacketType.CHANGE, VERSION.pack(change.version) + data)


def snapshot_header(version: int, compressed_size: int) -> bytes:
    """What goes before the compressed file in a SNAPSHOT packet.

    Raises:
        ProtocolError: the file is too large for protocol 1.
    """
    length = VERSION.size + compressed_size
    if length > MAX_PACKET_SIZE:
        raise ProtocolError(
            f"A snapshot of {compressed_size} compressed bytes does not fit into one packet of"
            " protocol 1, which ends at 4 GiB."
        )
    return HEADER.pack(PacketType.SNAPSHOT, length) + VERSION.pack(version)


def encode_metadata(metadata: Metadata) -> bytes:
    """The METADATA packet."""
    return encode(PacketType.METADATA, METADATA.pack(*metadata))


def decode_metadata(payload: bytes) -> Metadata:
    """The content of a METADATA packet; ProtocolError if it is none of protocol 1."""
    if len(payload) != METADATA.size:
        raise ProtocolError(f"METADATA of {len(payload)} bytes in place of {METADATA.size}.")
    metadata = Metadata._make(METADATA.unpack(payload))
    if metadata.protocol != PROTOCOL:
        raise ProtocolError(f"The server speaks protocol {metadata.protocol}, not {PROTOCOL}.")
    return metadata


def decode_version(payload: bytes) -> int:
    """The version that is all of ``payload``."""
    if len(payload) != VERSION.size:
        raise ProtocolError(f"A version of {len(payload)} bytes in place of {VERSION.size}.")
    return int(VERSION.unpack(payload)[0])


def decode_change(payload: bytes) -> Change:
    """The content of a CHANGE packet.

    Raises:
        ProtocolError: it does not inflate, or past the limit.
        InvalidChange: it breaks a rule for changes.
    """
    if len(payload) < VERSION.size:
        raise ProtocolError("A CHANGE without a version.")
    packed = payload[VERSION.size :]
    if len(packed) > MAX_CHANGE_SIZE // _GREATEST_RATIO:
        # Measure first what may be a bomb: it must not fill the memory.
        for _ in Inflater(MAX_CHANGE_SIZE).feed(packed):
            pass
    inflater = Inflater(MAX_CHANGE_SIZE)
    data = b"".join(inflater.feed(packed))
    inflater.finish()
    return Change.decode(decode_version(payload[: VERSION.size]), data)


class Inflater:
    """zlib decompression in bounded steps.

    Args:
        limit: bytes that may come out in all.

    Raises:
        ProtocolError: the data is no zlib stream, or inflates past the limit.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._zlib = zlib.decompressobj()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What ``data`` inflates to, in pieces of at most 1 MiB."""
        while data:
            try:
                piece = self._zlib.decompress(data, MAX_CHUNK_SIZE)
            except zlib.error as error:
                raise ProtocolError(f"Compressed data is broken: {error}.") from error
            self._left -= len(piece)
            if self._left < 0:
                raise ProtocolError("Compressed data inflates past the limit.")
            if self._zlib.unused_data:
                raise ProtocolError("There is data behind the end of compressed data.")
            if piece:
                yield piece
            data = self._zlib.unconsumed_tail

    def finish(self) -> None:
        """Check that the stream is complete and its checksum matched."""
        if not self._zlib.eof:
            raise ProtocolError("Compressed data ends early.")


class Decoder:
    """Cuts a stream of bytes into events.

    Args:
        limits: packet types that may come, with the greatest length of each.
    """

    def __init__(self, limits: Mapping[int, int]) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._part: tuple[int, int] | None = None
        """Version and bytes still to come of a SNAPSHOT that has begun."""

    @property
    def in_packet(self) -> bool:
        """Whether a packet has begun and not ended."""
        return bool(self._buffer) or self._part is not None

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that ``data`` completes.

        Raises:
            ProtocolError: a type that may not come, or a length over the limit.
        """
        self._buffer += data
        while (event := self._next()) is not None:
            yield event

    def _next(self) -> Event | None:
        if self._part is not None:
            return self._next_part(*self._part, first=False)
        if len(self._buffer) < HEADER.size:
            self._check_type()
            return None
        kind, length = HEADER.unpack_from(self._buffer)
        self._check_type()
        if length > self._limits[kind]:
            raise ProtocolError(
                f"{PacketType(kind).name} of {length} bytes; the limit is {self._limits[kind]}."
            )
        if kind == PacketType.SNAPSHOT:
            return self._begin_snapshot(length)
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[HEADER.size : end])
        del self._buffer[:end]
        return Packet(PacketType(kind), payload)

    def _check_type(self) -> None:
        if self._buffer and self._buffer[0] not in self._limits:
            raise ProtocolError(f"A packet of type {self._buffer[0]:02x} may not come here.")

    def _begin_snapshot(self, length: int) -> Event | None:
        if length < VERSION.size:
            raise ProtocolError("A SNAPSHOT without a version.")
        start = HEADER.size + VERSION.size
        if len(self._buffer) < start:
            return None
        version = decode_version(bytes(self._buffer[HEADER.size : start]))
        del self._buffer[:start]
        return self._next_part(version, length - VERSION.size, first=True)

    def _next_part(self, version: int, left: int, first: bool) -> Event | None:
        if not self._buffer and left and not first:
            return None
        data = bytes(self._buffer[:left])
        del self._buffer[:left]
        left -= len(data)
        self._part = (version, left) if left else None
        return SnapshotPart(version, data, first, last=not left)
