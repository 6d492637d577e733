"""Wire protocols 1 and 2: packets to bytes and back. No sockets here: bytes in, events out.

A packet, all numbers big-endian and unsigned:

    offset  size  field    meaning
         0     1  type     see below
         1     4  length   of the payload
         5     n  payload

Protocol 1:

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

Protocol 2 begins on a connection when the client sends REQ_METADATA with the payload
``protocol u32 = 2, claims u8, owner 16 bytes, name of the client's machine in UTF-8`` and the
server answers METADATA with protocol 2; a server of protocol 1 ignores the payload and
answers as always. With a payload that ends before the name, as that of 1.0, which knew of no
owner, both stay with protocol 1. A writer claims its owner with 1: where the backup is
another's, the server answers NACK. From then on, in place of CHANGE, SNAPSHOT and REWIND:

    type  name      from    payload                                          answer
      10  RECORD    both    a record, compressed                             ACK or NACK
      05  RESTORE   client  none, or a place: offset u64, sequence u64, chain 16 bytes  see below
      11  COMING    server  of the log: bytes u64, of its snapshot: bytes u64, backup id 16 bytes
      12  STATUS    client  none                                             STATUS_RES or NACK
      13  STATUS_RES  server  JSON, an object with the fields of backend.Status
      14  HELD      client  chain 16 bytes of a snapshot whose connection broke    HELD
                    server  bytes u64 of it that are there; 0: none; all ones: all, and they are
                            being looked at
      15  FOLLOW    client  none, or the last record it has, as a head of file layout 2   see below
    16  FOLLOWING  server  as COMING, then the head behind which it goes on, if one was named
    17  PAUSE     server  none
    06  ACK       server  version u32, chain 16 bytes, that are now stored
      07  NACK      server  version u32 of the backup, code u16, text in UTF-8
      08  METADATA  server  as in protocol 1 with protocol = 2, then: backup id 16 bytes,
                            sequence u64, chain before 16, chain 16, session 16,
                            time u64 (ns), size of the log u64, the server's name and
                            version in UTF-8, as a second line who wrote last, if known, and as
                            a third one what its check found wrong with the backup, if anything

A record is what file layout 2 (filelog/layout2.py) stores, and its fields mean the same but for
the crc:

    offset  size  field         meaning
         0     1  kind          1 snapshot, 2 change, 3 rewind, 4 owner
         1     1  flags         bit 0: bumps, bit 1: last piece of the snapshot; bit 2, of a
                                snapshot to the server: also if the backup is ahead, another
                                owner's, or another node's; of an owner: behind whatever record
                                is the newest
         2     4  data_version
         6     8  sequence      in a restore; 0 from a client
        14     4  crc           CRC-32 of all of the record, with 0 here
        18     8  time
        26    16  session       of a snapshot to the server: the owner of the new backup
        42    16  chain before  what the receiver must have
        58    16  chain         what it has then
        74     4  length        of the payload
        78     n  payload

The records of one direction of one connection are one raw deflate stream, with a sync
flush after each: it keeps its window, and a new connection begins with a new one. A
snapshot's pieces are records of at most 1 MiB; only the last is answered, unless a NACK comes
before: the pieces after that are of no use. Where the connection breaks before the answer, the
server keeps what came for a while: over another one the client asks with HELD how much that is,
and goes on there. RESTORE is
answered by COMING, the log's records as they stand, rewinds included, and DONE; or by
NACK where the log is damaged. With a place only what stands behind that record comes: the one
that ends at that offset of the log, with that sequence and chain. If none does, as after a
compaction, the answer is NACK with code 16, and the client begins anew.

FOLLOW is answered by FOLLOWING, the records behind the one that is named, or all, and then those
that come, once they are on stable storage: it has no end, and the client may send nothing but
ACK. With PAUSE the server says that all there is was sent, and goes on saying so every 10 s. The
record is found by its sequence and chain, so also behind a compaction; in a log of another backup
id by chain. If it is not there, or a snapshot takes the log's place, the answer is NACK with
code 16; where the log is damaged, NACK with code 7.

A client appends only onto the chain it knows; once another session has written, every record
of the session before gets a NACK, and so does a record whose session does not begin like the
backup's owner. An owner is taken from any client, if its chains are the backup's, or with flag
bit 2; then the term of one of several destinations stays as it is.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from backend import (
    CHAIN_SIZE,
    MAX_CHANGE_SIZE,
    MAX_CHUNK_SIZE,
    NOBODY,
    Change,
    Status,
    chain_after,
)
from errors import BackupError, printable
from filelog import layout2
from filelog.layout2 import MAX_LENGTH, Head, Kind

NEWEST = 2
"""The newest protocol spoken here."""
HEADER = struct.Struct("!BI")
VERSION = struct.Struct("!I")
CLAIM = struct.Struct("!IB16s")
METADATA = struct.Struct("!IIIQ")
DETAILS = struct.Struct("!16sQ16s16s16sQQ")
NACK = struct.Struct("!IH")
ACK = struct.Struct("!I16s")
COMING = struct.Struct("!QQ16s")
PLACE = struct.Struct("!QQ16s")
HELD = struct.Struct("!Q")
KEEP_S = 10.0
"""How often a server that has nothing to send says PAUSE to who follows."""
ALL_HELD = 2**64 - 1
"""In a HELD: all of the snapshot came, and the server is at work on it."""
PACKING_LEVEL = 4
"""zlib's; takes a sixth less time than 6 for a node's changes, and a fortieth more bytes."""
RECORD = struct.Struct("!BBIQIQ16s16s16sI")
OVERRIDE = 4
"""Flag of a RECORD: see above."""
_CRC = struct.Struct("!I")
_CRC_AT = 14
_NO_CRC = bytes(_CRC.size)
MAX_PACKET_SIZE = 2**32 - 1
"""A packet's length is a u32."""
WHOLE_SIZE = MAX_CHUNK_SIZE + (MAX_CHUNK_SIZE >> 8)
"""The longest packet that a server takes whole: holds any piece of a snapshot, compressed."""
_PART_SIZE = 1 << 12
"""The first part of a longer packet has so much at least: enough for the fields of a record."""
MAX_SNAPSHOT_SIZE = 1 << 40
"""Bytes that a SNAPSHOT may inflate to."""
MAX_TEXT_SIZE = 1 << 16
MAX_STATUS_SIZE = 1 << 20
MAX_STATUS_TEXT = 4096
"""Characters of one text in a STATUS_RES."""
MAX_STATUS_TEXTS = 16
"""Notes, or warnings."""
MAX_NACK_TEXT = 4096
MAX_MACHINE_SIZE = 255
_MAX_CHANGE_PACKET = VERSION.size + MAX_CHANGE_SIZE + MAX_CHANGE_SIZE // 1000 + 64
"""zlib adds less than a thousandth to what it cannot compress."""
_STORED = struct.Struct("<BHH")
_MAX_STORED = 0xFFFF
_GREATEST_RATIO = 1032
"""zlib compresses to no less than one byte in this many."""
_SLICE_SIZE = 1 << 16


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
    RECORD = 16
    COMING = 17
    STATUS = 18
    STATUS_RES = 19
    HELD = 20
    FOLLOW = 21
    FOLLOWING = 22
    PAUSE = 23


_TYPES = {int(kind): kind for kind in PacketType}
"""Quicker than ``PacketType(number)``."""
TO_SERVER: Mapping[int, int] = {
    PacketType.CHANGE: _MAX_CHANGE_PACKET,
    PacketType.SNAPSHOT: MAX_PACKET_SIZE,
    PacketType.REWIND: VERSION.size,
    PacketType.REQ_METADATA: MAX_TEXT_SIZE,
    PacketType.RESTORE: MAX_TEXT_SIZE,
    PacketType.ACK: VERSION.size,
    PacketType.COMPACT: MAX_TEXT_SIZE,
    PacketType.RECORD: _MAX_CHANGE_PACKET,
    PacketType.HELD: CHAIN_SIZE,
    PacketType.STATUS: 0,
    PacketType.FOLLOW: layout2.HEAD.size,
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
    PacketType.RECORD: _MAX_CHANGE_PACKET,
    PacketType.COMING: COMING.size,
    PacketType.HELD: HELD.size,
    PacketType.STATUS_RES: MAX_STATUS_SIZE,
    PacketType.FOLLOWING: COMING.size + layout2.HEAD.size,
    PacketType.PAUSE: 0,
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


class Part(NamedTuple):
    """Some of the payload of a packet that is too long to come whole."""

    type: PacketType
    data: bytes
    first: bool
    last: bool


Event = Packet | SnapshotPart | Part


class Details(NamedTuple):
    """What METADATA carries in protocol 2; the fields are those of the last record.

    Attributes:
        size: bytes of the log.
        server: its name and version.
        last_writer: who wrote last and when, in words, "" if it is not known.
        unsound: what the server's check found wrong with the backup, or "".
    """

    backup_id: bytes
    sequence: int
    chain_before: bytes
    chain: bytes
    session: bytes
    time_ns: int
    size: int
    server: str
    last_writer: str = ""
    unsound: str = ""


class Metadata(NamedTuple):
    """The answer to REQ_METADATA; ``details`` in protocol 2 only."""

    protocol: int
    version: int
    prev_version: int
    version_count: int
    details: Details | None = None


class Coming(NamedTuple):
    """The log whose records come.

    Attributes:
        size: of the log, in bytes.
        snapshot_size: bytes of the SQLite file that it starts with.
    """

    size: int
    snapshot_size: int
    backup_id: bytes


class Place(NamedTuple):
    """A record of a log, by where it ends: what stands behind it is asked for.

    Attributes:
        offset: of its end.
    """

    offset: int
    sequence: int
    chain: bytes


class NackCode(enum.IntEnum):
    """Why a server of protocol 2 refuses."""

    OTHER = 0
    OUT_OF_DATE = 1
    LOST_STATE = 2
    TAKEN_OVER = 3
    OTHER_HISTORY = 4
    OLD_SNAPSHOT = 5
    INVALID = 6
    DAMAGED = 7
    READ_ONLY = 8
    NOT_ALLOWED = 9
    NO_ROOM = 10
    OTHER_NODE = 11
    MANY_KEPT = 12
    OTHER_OWNER = 13
    NO_SUCH_PLACE = 16


class Nack(NamedTuple):
    """The content of a NACK; protocol 1 has at most the version."""

    version: int | None
    code: NackCode
    text: str


def encode(kind: PacketType, payload: bytes = b"") -> bytes:
    """One packet."""
    return HEADER.pack(kind, len(payload)) + payload


def encode_version(kind: PacketType, version: int) -> bytes:
    """A packet that holds only a version: REWIND, ACK, NACK."""
    return encode(kind, VERSION.pack(version))


def encode_change(change: Change) -> bytes:
    """The CHANGE packet of a transaction."""
    return encode_payload(change.version, change.payload)


def encode_payload(version: int, payload: bytes) -> bytes:
    """The CHANGE packet of a transaction's payload."""
    return encode(PacketType.CHANGE, VERSION.pack(version) + zlib.compress(payload))


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
    payload = METADATA.pack(*metadata[:4])
    if metadata.details is not None:
        *numbers, server, last_writer, unsound = metadata.details
        text = f"{server}\n{last_writer}\n{printable(unsound)}".rstrip("\n")
        payload += DETAILS.pack(*numbers) + text.encode()
    return encode(PacketType.METADATA, payload)


def decode_metadata(payload: bytes) -> Metadata:
    """The content of a METADATA packet; ProtocolError if it is none that is known here."""
    if len(payload) < METADATA.size:
        raise ProtocolError(f"METADATA of {len(payload)} bytes in place of {METADATA.size}.")
    metadata = Metadata(*METADATA.unpack_from(payload))
    rest = payload[METADATA.size :]
    if metadata.protocol == 1 and not rest:
        return metadata
    if metadata.protocol != 2 or len(rest) < DETAILS.size:
        raise ProtocolError(f"METADATA of protocol {metadata.protocol} is not known here.")
    lines = [*rest[DETAILS.size :].decode(errors="replace").split("\n", 2), "", ""][:3]
    details = Details._make((*DETAILS.unpack_from(rest), *(printable(line) for line in lines)))
    return metadata._replace(details=details)


def encode_request_metadata(owner: bytes | None = None, machine: str = "") -> bytes:
    """The REQ_METADATA packet that offers protocol 2.

    Args:
        owner: who means to write, or None.
        machine: its name.
    """
    claim = CLAIM.pack(NEWEST, owner is not None, owner or NOBODY)
    return encode(PacketType.REQ_METADATA, claim + machine.encode()[:MAX_MACHINE_SIZE])


def claimed_owner(payload: bytes) -> tuple[bytes | None, str]:
    """The owner, None if none is claimed, and the machine of a REQ_METADATA."""
    if len(payload) < CLAIM.size:
        return None, ""
    _, claims, owner = CLAIM.unpack_from(payload)
    machine = payload[CLAIM.size :][:MAX_MACHINE_SIZE].decode(errors="replace")
    # It goes into logs, and to other clients.
    shown = "".join(letter if letter.isprintable() else "?" for letter in machine)
    return owner if claims else None, shown


def agreed_protocol(payload: bytes) -> int:
    """The protocol that a REQ_METADATA with ``payload`` leads to.

    Who cannot name an owner, as 1.0 could not, writes by protocol 1: only what is nobody's.
    """
    if len(payload) < CLAIM.size:
        return 1
    return min(NEWEST, max(1, decode_version(payload[: VERSION.size])))


def encode_nack(nack: Nack) -> bytes:
    """The NACK packet of protocol 2."""
    text = nack.text.encode()[:MAX_NACK_TEXT]
    return encode(PacketType.NACK, NACK.pack(nack.version or 0, nack.code) + text)


def decode_nack(payload: bytes) -> Nack:
    """The content of a NACK of either protocol."""
    if len(payload) < NACK.size:
        version = decode_version(payload) if len(payload) == VERSION.size else None
        return Nack(version, NackCode.OTHER, "")
    version, code = NACK.unpack_from(payload)
    known = NackCode(code) if code in NackCode._value2member_map_ else NackCode.OTHER
    return Nack(version, known, payload[NACK.size :].decode(errors="replace"))


def decode_coming(payload: bytes) -> Coming:
    """The log that a COMING packet announces."""
    if len(payload) != COMING.size:
        raise ProtocolError(f"COMING of {len(payload)} bytes in place of {COMING.size}.")
    return Coming._make(COMING.unpack(payload))


def decode_held(payload: bytes) -> int:
    """The bytes that a server's HELD packet names."""
    if len(payload) != HELD.size:
        raise ProtocolError(f"HELD of {len(payload)} bytes in place of {HELD.size}.")
    return int(HELD.unpack(payload)[0])


def encode_restore(place: Place | None) -> bytes:
    """The RESTORE packet for all behind ``place``; None: for the whole log."""
    return encode(PacketType.RESTORE, PLACE.pack(*place) if place is not None else b"")


def decode_restore(payload: bytes) -> Place | None:
    """The place that a RESTORE of protocol 2 names, None for the beginning."""
    if not payload:
        return None
    if len(payload) != PLACE.size:
        raise ProtocolError(f"RESTORE of {len(payload)} bytes in place of {PLACE.size}.")
    return Place._make(PLACE.unpack(payload))


def encode_follow(last: Head | None) -> bytes:
    """The FOLLOW packet for what comes behind ``last``; None: for all."""
    return encode(PacketType.FOLLOW, _optional_head(last))


def _optional_head(head: Head | None) -> bytes:
    return b"" if head is None else layout2.HEAD.pack(*head)


def decode_follow(payload: bytes) -> Head | None:
    """The record that a FOLLOW names."""
    if not payload:
        return None
    if len(payload) != layout2.HEAD.size:
        raise ProtocolError(f"A head of {len(payload)} bytes in place of {layout2.HEAD.size}.")
    return Head._make(layout2.HEAD.unpack(payload))


def encode_following(coming: Coming, last: Head | None) -> bytes:
    """The FOLLOWING packet of a log, of which comes what stands behind ``last``."""
    return encode(PacketType.FOLLOWING, COMING.pack(*coming) + _optional_head(last))


def decode_following(payload: bytes) -> tuple[Coming, Head | None]:
    """The content of a FOLLOWING packet."""
    return decode_coming(payload[: COMING.size]), decode_follow(payload[COMING.size :])


def encode_status(status: Status) -> bytes:
    """The STATUS_RES packet."""
    found = dataclasses.asdict(status)
    for name, value in found.items():
        if isinstance(value, str):
            found[name] = value[:MAX_STATUS_TEXT]
        elif isinstance(value, list):
            found[name] = [text[:MAX_STATUS_TEXT] for text in value[:MAX_STATUS_TEXTS]]
    return encode(PacketType.STATUS_RES, json.dumps(found).encode())


def decode_status(payload: bytes) -> Status:
    """The content of a STATUS_RES; ProtocolError if it is not what it should be."""
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("The server's status is no JSON.") from error
    if not isinstance(found, dict):
        raise ProtocolError("The server's status is no JSON object.")
    values = {
        field.name: _status_value(field, found.get(field.name))
        for field in dataclasses.fields(Status)
        if field.name in found or field.name in _ALWAYS
    }
    return Status(**values)


def _status_value(field: dataclasses.Field[Any], value: Any) -> Any:
    kind = str(field.type)
    if value is None and kind.endswith(" | None"):
        return None
    if not _IS_STATUS[kind.removesuffix(" | None")](value) or (
        field.name in ("owner", "backup_id") and re.fullmatch("[0-9a-f]{0,32}", value) is None
    ):
        raise ProtocolError(f"The server's status has a wrong {field.name}: {value!r:.60}.")
    if isinstance(value, list):
        return [printable(text) for text in value]
    return printable(value) if isinstance(value, str) else value


_ALWAYS = ("url", "layout", "version", "prev_version", "version_count")
"""What every STATUS_RES has."""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_STATUS_TEXT


_IS_STATUS: Mapping[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "int": lambda value: type(value) is int and 0 <= value < 2**63,
    "bool": lambda value: type(value) is bool,
    "list[str]": lambda value: (
        isinstance(value, list) and len(value) <= MAX_STATUS_TEXTS and all(map(_is_text, value))
    ),
}
"""By the type of a field of Status: whether a value may stand there."""


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
        for piece in _sliced(data):
            yield from self._feed(piece)

    def _feed(self, data: bytes) -> Iterator[bytes]:
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


def _sliced(data: bytes) -> Iterable[bytes]:
    """``data`` for an inflater, which copies what it has not consumed with each piece it makes."""
    if len(data) <= _SLICE_SIZE:
        return (data,)
    return (data[start : start + _SLICE_SIZE] for start in range(0, len(data), _SLICE_SIZE))


class RecordPacker:
    """One direction of a connection of protocol 2: records to RECORD packets.

    Args:
        level: zlib's, 0 to 9.

    Attributes:
        level: the one of the next record.
    """

    def __init__(self, level: int = PACKING_LEVEL) -> None:
        self.go_on_at(level)

    def go_on_at(self, level: int) -> None:
        """Pack the next records at ``level``."""
        if getattr(self, "level", None) == level:
            return
        self.level = level
        # In mid-stream, too: the flush ended a block, and a new beginning looks back at nothing.
        # Filtered: matches of a few bytes, of numbers in a statement, cost more than they save.
        self._zlib = zlib.compressobj(
            level, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_FILTERED
        )

    def pack(self, head: Head, payload: bytes) -> bytes:
        """The RECORD packet; the CRC is computed here."""
        fields = _fields(head)
        _CRC.pack_into(fields, _CRC_AT, zlib.crc32(payload, zlib.crc32(fields)))
        if self.level == 0:
            blocks = [*_stored(fields), *_stored(payload)]
            header = HEADER.pack(PacketType.RECORD, sum(map(len, blocks)))
            return b"".join((header, *blocks))
        data = self._zlib.compress(fields + payload)
        return encode(PacketType.RECORD, data + self._zlib.flush(zlib.Z_SYNC_FLUSH))


def _stored(data: bytes | bytearray) -> Iterator[bytes | memoryview]:
    """Deflate's blocks of plain bytes: zlib would copy them thrice."""
    view = memoryview(data)
    for start in range(0, len(view), _MAX_STORED):
        block = view[start : start + _MAX_STORED]
        yield _STORED.pack(0, len(block), len(block) ^ 0xFFFF)
        yield block


class RecordUnpacker:
    """The other end of a RecordPacker.

    A record comes by ``unpack``, or by ``begin``, ``pieces`` as often as it has parts, ``end``.

    Raises:
        ProtocolError: it does not inflate, or not to what it says, or does not check.
    """

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
        self._fields = b""
        self._crc = 0
        self._left = 0
        """Bytes of the payload still to come."""

    def unpack(self, data: bytes) -> tuple[Head, bytes]:
        """The record of a RECORD packet; its CRC and its offset are not set."""
        head = self.begin(data)
        return head, self.rest(head)

    def begin(self, data: bytes) -> Head:
        """The head of the record that ``data`` begins with. It may not be what was sent: ``end``
        tells."""
        fields = self._inflate(data, RECORD.size)
        limit = MAX_LENGTH.get(fields[0], -1) if len(fields) == RECORD.size else -1
        if limit < 0:
            raise ProtocolError("A RECORD of no known kind.")
        found = RECORD.unpack(fields)
        kind, flags, version, sequence, _, time_ns, session, before, chain, length = found
        if length > limit:
            raise ProtocolError(f"A RECORD of {length} bytes is past its limit of {limit}.")
        self._fields, self._left = fields, length
        self._crc = zlib.crc32(_NO_CRC, zlib.crc32(fields[:_CRC_AT]))
        self._crc = zlib.crc32(fields[_CRC_AT + _CRC.size :], self._crc)
        return Head(
            kind=kind,
            flags=flags,
            sequence=sequence,
            version=version,
            time_ns=time_ns,
            session=session,
            length=length,
            chain_before=before,
            chain=chain,
        )

    def rest(self, head: Head) -> bytes:
        """The payload, where all of the record was given to ``begin``."""
        tail = self._zlib.unconsumed_tail
        if head.length <= MAX_CHUNK_SIZE:
            payload = self._take(tail)
        else:
            gathered = io.BytesIO()
            for piece in self.pieces(tail):
                gathered.write(piece)
            payload = gathered.getvalue()
        self.end(head, payload)
        return payload

    def pieces(self, data: bytes | None = None) -> Iterator[bytes]:
        """What ``data`` adds to the payload, in pieces of about 1 MiB at most.

        Args:
            data: the next part of the packet; None: what is left of that for ``begin``.
        """
        for part in _sliced(self._zlib.unconsumed_tail if data is None else data):
            piece = self._take(part)
            yield piece
            # What does not fit into one piece waits in the inflater, too.
            while self._zlib.unconsumed_tail or len(piece) > MAX_CHUNK_SIZE:
                piece = self._take(self._zlib.unconsumed_tail)
                yield piece

    def end(self, head: Head, payload: bytes | None) -> None:
        """All of the record came: check it.

        Args:
            payload: None: it was of no use, and only what came is checked.
        """
        if self._left or self._zlib.unconsumed_tail or self._zlib.unused_data:
            raise ProtocolError("A RECORD does not inflate to what it says.")
        if (self._crc,) != _CRC.unpack_from(self._fields, _CRC_AT):
            raise ProtocolError("A RECORD does not match its checksum.")
        if payload is None or head.kind != Kind.CHANGE:
            return
        if head.chain != chain_after(head.chain_before, head.version, payload):
            raise ProtocolError("A RECORD does not match its chain.")

    def _take(self, data: bytes) -> bytes:
        # One byte more than may come shows that it is too much.
        piece = self._inflate(data, min(self._left, MAX_CHUNK_SIZE) + 1)
        self._left -= len(piece)
        if self._left < 0:
            raise ProtocolError("A RECORD inflates past what it says.")
        self._crc = zlib.crc32(piece, self._crc)
        return piece

    def _inflate(self, data: bytes, size: int) -> bytes:
        try:
            piece = self._zlib.decompress(data, size)
        except zlib.error as error:
            raise ProtocolError(f"Compressed data is broken: {error}.") from error
        # It goes on from packet to packet. After an end zlib would keep the same tail for ever.
        if self._zlib.eof:
            raise ProtocolError("Compressed data ends within a connection.")
        return piece


def _fields(head: Head) -> bytearray:
    """What stands before the payload of a record, with a crc of 0."""
    kind, version, sequence = head.kind, head.version, head.sequence
    history = head.time_ns, head.session, head.chain_before, head.chain
    return bytearray(RECORD.pack(kind, head.flags, version, sequence, 0, *history, head.length))


class Decoder:
    """Cuts a stream of bytes into events.

    Args:
        limits: packet types that may come, with the greatest length of each.
        whole: the longest packet that comes whole; a longer one comes in parts.
    """

    def __init__(self, limits: Mapping[int, int], whole: int = MAX_PACKET_SIZE) -> None:
        self._limits = limits
        self._whole = whole
        self._buffer = bytearray()
        self._part: Callable[[bytes, bool, bool], Event] | None = None
        """Makes an event of what comes of the packet that has begun."""
        self._left = 0
        """Bytes of it still to come."""

    @property
    def in_packet(self) -> bool:
        """Whether a packet has begun and not ended."""
        return bool(self._buffer) or self._part is not None

    def feed(self, data: bytes) -> Iterable[Event]:
        """The events that ``data`` completes; to be iterated before the next call.

        Raises:
            ProtocolError: a type that may not come, or a length over the limit.
        """
        packet = self._one_packet(data)
        return self._events(data) if packet is None else (packet,)

    def _events(self, data: bytes) -> Iterator[Event]:
        self._buffer += data
        while (event := self._next()) is not None:
            yield event

    def _one_packet(self, data: bytes) -> Packet | None:
        """``data`` where it is one packet: that of a change mostly comes at once."""
        if self.in_packet or len(data) < HEADER.size:
            return None
        kind, length = HEADER.unpack_from(data)
        if len(data) != HEADER.size + length or length > self._limits.get(kind, -1):
            return None
        known = _TYPES[kind]
        if known is PacketType.SNAPSHOT or length > self._whole:
            return None
        return Packet(known, data[HEADER.size :])

    def _next(self) -> Event | None:
        if self._part is not None:
            return self._next_part(self._part, first=False)
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
        if length > self._whole:
            return self._begin_part(_TYPES[kind], length)
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[HEADER.size : end])
        del self._buffer[:end]
        return Packet(_TYPES[kind], payload)

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
        self._left = length - VERSION.size
        return self._next_part(functools.partial(SnapshotPart, version), first=True)

    def _begin_part(self, kind: PacketType, length: int) -> Event | None:
        if len(self._buffer) < HEADER.size + _PART_SIZE:
            return None
        del self._buffer[: HEADER.size]
        self._left = length
        return self._next_part(functools.partial(Part, kind), first=True)

    def _next_part(self, part: Callable[[bytes, bool, bool], Event], first: bool) -> Event | None:
        if not self._buffer and self._left and not first:
            return None
        data = bytes(self._buffer[: self._left])
        del self._buffer[: len(data)]
        self._left -= len(data)
        self._part = part if self._left else None
        return part(data, first, not self._left)
