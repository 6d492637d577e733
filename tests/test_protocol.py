"""Packets of protocol 1: golden ones, torn ones, hostile ones."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import protocol
from backend import MAX_CHUNK_SIZE, Change, bump
from errors import InvalidChange
from protocol import Decoder, Inflater, Metadata, Packet, PacketType, ProtocolError, SnapshotPart
from tests import support

GOLDEN: list[dict[str, Any]] = json.loads((support.DATA / "golden/protocol1.json").read_text())
LIMITS = {"client": protocol.TO_SERVER, "server": protocol.TO_CLIENT}
CHANGE = Change(7, None, ["INSERT INTO t VALUES (1)", bump(7)])


def raw(entry: dict[str, Any]) -> bytes:
    """The golden packet."""
    return bytes.fromhex(entry["hex"])


def golden_id(entry: dict[str, Any]) -> str:
    """A name for a parametrized test."""
    return f"{entry['type']}-{len(raw(entry))}"


def decode_all(pieces: Iterable[bytes], limits: Any) -> list[protocol.Event]:
    """The events of a stream that comes in ``pieces``, a snapshot's parts joined."""
    decoder, found = Decoder(limits), list[protocol.Event]()
    for piece in pieces:
        for event in decoder.feed(piece):
            last = found[-1] if found else None
            if isinstance(event, SnapshotPart) and not event.first:
                assert isinstance(last, SnapshotPart) and not last.last
                found[-1] = last._replace(data=last.data + event.data, last=event.last)
            else:
                found.append(event)
    assert not decoder.in_packet
    return found


def check_golden(event: protocol.Event, entry: dict[str, Any]) -> None:
    """Compare what a decoder made of a golden packet with what the packet holds."""
    if isinstance(event, SnapshotPart):
        assert entry["type"] == "SNAPSHOT" and event.first and event.last
        assert event.version == entry["version"]
        assert zlib.decompress(event.data).hex() == entry["file"]
        return
    assert isinstance(event, Packet) and event.type.name == entry["type"]
    if "statements" in entry:
        change = protocol.decode_change(event.payload)
        assert (change.version, change.transaction) == (entry["version"], entry["statements"])
    elif "version" in entry:
        assert protocol.decode_version(event.payload) == entry["version"]
    elif "metadata" in entry:
        found = protocol.decode_metadata(event.payload)
        assert list(found) == [*entry["metadata"], None]
    elif "json" in entry:
        assert json.loads(event.payload) == entry["json"]
    else:
        assert event.payload == b""


def test_golden_packets_cover_every_type() -> None:
    second = {"RECORD", "COMING", "STATUS", "STATUS_RES", "HELD"}
    second |= {"FOLLOW", "FOLLOWING", "PAUSE"}
    assert {entry["type"] for entry in GOLDEN} == set(PacketType.__members__) - second


@pytest.mark.parametrize("entry", GOLDEN, ids=golden_id)
def test_golden_packet_decodes(entry: dict[str, Any]) -> None:
    data, limits = raw(entry), LIMITS[entry["from"]]
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        (event,) = decode_all(pieces, limits)
        check_golden(event, entry)


@pytest.mark.parametrize("entry", GOLDEN, ids=golden_id)
def test_golden_packet_is_what_we_encode(entry: dict[str, Any]) -> None:
    kind, data = PacketType[entry["type"]], raw(entry)
    if kind is PacketType.CHANGE:
        ours = protocol.encode_change(Change(entry["version"], None, entry["statements"]))
        # Another zlib may compress otherwise: what counts is what comes out of it.
        assert ours[:1] == data[:1] and ours[5:9] == data[5:9]
        assert struct.unpack("!I", ours[1:5])[0] == len(ours) - 5
        assert zlib.decompress(ours[9:]) == zlib.decompress(data[9:])
    elif kind is PacketType.SNAPSHOT:
        assert protocol.snapshot_header(entry["version"], len(data) - 9) == data[:9]
    elif kind is PacketType.METADATA:
        assert protocol.encode_metadata(Metadata(*entry["metadata"])) == data
    elif "version" in entry:
        assert protocol.encode_version(kind, entry["version"]) == data
    else:
        assert protocol.encode(kind, data[5:]) == data


@pytest.mark.parametrize("side", ["client", "server"])
def test_stream_of_packets_in_pieces_of_every_size(side: str) -> None:
    entries = [entry for entry in GOLDEN if entry["from"] == side] * 2
    stream = b"".join(map(raw, entries))
    for size in (*range(1, 40), len(stream)):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        events = decode_all(pieces, LIMITS[side])
        assert len(events) == len(entries)
        for event, entry in zip(events, entries, strict=True):
            check_golden(event, entry)


@pytest.mark.parametrize("entry", GOLDEN, ids=golden_id)
def test_trailing_data_is_the_next_packet(entry: dict[str, Any]) -> None:
    decoder = Decoder(LIMITS[entry["from"]])
    (event,) = decoder.feed(raw(entry) + raw(entry)[:1])
    check_golden(event, entry)
    assert decoder.in_packet
    (event,) = decoder.feed(raw(entry)[1:])
    check_golden(event, entry)
    assert not decoder.in_packet


@pytest.mark.parametrize("limits", [protocol.TO_SERVER, protocol.TO_CLIENT])
def test_type_that_may_not_come_is_refused_at_its_first_byte(limits: Any) -> None:
    for kind in range(256):
        decoder = Decoder(limits)
        if kind in limits:
            assert list(decoder.feed(bytes([kind]))) == []
            continue
        with pytest.raises(ProtocolError, match=f"type {kind:02x} may not come"):
            list(decoder.feed(bytes([kind])))


def test_each_side_takes_what_the_other_may_send() -> None:
    for entry in GOLDEN:
        assert PacketType[entry["type"]] in LIMITS[entry["from"]]
    both = set(protocol.TO_SERVER) & set(protocol.TO_CLIENT)
    one = {PacketType.CHANGE, PacketType.SNAPSHOT, PacketType.ACK}
    assert both == one | {PacketType.RECORD, PacketType.HELD}


@pytest.mark.parametrize("limits", [protocol.TO_SERVER, protocol.TO_CLIENT])
def test_length_over_the_limit_is_refused_before_the_payload(limits: Any) -> None:
    for kind, limit in limits.items():
        if limit == protocol.MAX_PACKET_SIZE:
            continue
        if limit:  # Without a payload it is complete.
            assert list(Decoder(limits).feed(struct.pack("!BI", kind, limit))) == []
        for length in (limit + 1, 2**32 - 1):
            with pytest.raises(ProtocolError, match=f"{length} bytes; the limit is {limit}"):
                list(Decoder(limits).feed(struct.pack("!BI", kind, length)))


@pytest.mark.parametrize("length", range(4))
def test_snapshot_without_a_version_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match="without a version"):
        list(Decoder(protocol.TO_SERVER).feed(struct.pack("!BI", 2, length)))


@pytest.mark.parametrize("payload", [b"", b"\0\0\0", b"\0" * 5])
def test_version_of_another_size_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"version of {len(payload)} bytes"):
        protocol.decode_version(payload)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "0 bytes in place of 20"),
        (bytes(19), "19 bytes in place of 20"),
        (struct.pack("!IIIQ", 1, 1, 0, 1) + b"x", "of protocol 1 is not known"),
        (struct.pack("!IIIQ", 0, 1, 0, 1), "of protocol 0 is not known"),
        (struct.pack("!IIIQ", 2, 1, 0, 1), "of protocol 2 is not known"),
        (struct.pack("!IIIQ", 3, 1, 0, 1), "of protocol 3 is not known"),
    ],
)
def test_metadata_that_is_none_of_protocol_1_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        protocol.decode_metadata(payload)


def test_snapshot_beyond_one_packet_is_refused() -> None:
    assert protocol.snapshot_header(1, 2**32 - 1 - 4)[:5] == b"\x02\xff\xff\xff\xff"
    with pytest.raises(ProtocolError, match="does not fit into one packet"):
        protocol.snapshot_header(1, 2**32 - 4)


def bad_changes() -> Sequence[Any]:
    """Payloads of CHANGE packets with the error that each must raise."""
    good, whole = zlib.compress(b"SELECT 1"), protocol.encode_change(CHANGE)[5:]
    version = struct.pack("!I", 7)
    return [
        (b"\0\0\0", ProtocolError, "without a version"),
        (version, ProtocolError, "ends early"),
        (whole[:-1], ProtocolError, "ends early"),
        (whole[:-4], ProtocolError, "ends early"),
        (whole[:12], ProtocolError, "ends early"),
        (whole + b"x", ProtocolError, "behind the end"),
        (version + good + good, ProtocolError, "behind the end"),
        (version + b"no zlib", ProtocolError, "is broken"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), ProtocolError, "is broken"),
        (version + zlib.compress(b""), InvalidChange, "empty statement"),
        (version + zlib.compress(b"SELECT 1\0"), InvalidChange, "empty statement"),
        (version + zlib.compress(b"SELECT 1\0\0SELECT 2"), InvalidChange, "empty statement"),
        (version + zlib.compress(b"\xff\xfe"), InvalidChange, "not UTF-8"),
    ]


@pytest.mark.parametrize(("payload", "error", "reason"), bad_changes())
def test_broken_change_is_refused(payload: bytes, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        protocol.decode_change(payload)


def test_change_survives_the_wire() -> None:
    statements = ["x" * 70_000, "UPDATE t SET a = x'00ff', b = 'ü\n--'", bump(2**32 - 1)]
    change = Change(2**32 - 1, None, statements)
    packet = protocol.encode_change(change)
    (event,) = Decoder(protocol.TO_SERVER).feed(packet)
    assert isinstance(event, Packet) and protocol.decode_change(event.payload) == change


def test_bomb_is_refused_without_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CHANGE_SIZE", 64 << 20)
    bomb = zlib.compress(bytes(65 << 20), 9)
    assert len(bomb) < 1 << 17
    peak = peak_of(lambda: refuse_bomb(bomb))
    assert peak < 8 << 20


def refuse_bomb(bomb: bytes) -> None:
    with pytest.raises(ProtocolError, match="past the limit"):
        protocol.decode_change(struct.pack("!I", 7) + bomb)


def test_swarm_of_tiny_statements_is_refused_without_much_memory() -> None:
    size = 32 << 20
    for text in (b"\0", b"a\0"):
        packed = struct.pack("!I", 7) + zlib.compress((text * size)[:size] + b"a")
        assert peak_of(partial(refuse_swarm, packed)) < 4 * size


def refuse_swarm(packed: bytes) -> None:
    with pytest.raises(InvalidChange):
        protocol.decode_change(packed)


def peak_of(call: Callable[[], None]) -> int:
    """The most bytes that Python held during ``call``."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_inflater_gives_pieces_of_bounded_size() -> None:
    data = random.Random(1).randbytes(3 << 20) + bytes(20 << 20)
    packed = zlib.compress(data)
    for size in (len(packed), 1 << 16):
        inflater, found = Inflater(len(data)), bytearray()
        for start in range(0, len(packed), size):
            for piece in inflater.feed(packed[start : start + size]):
                assert 0 < len(piece) <= MAX_CHUNK_SIZE
                found += piece
        inflater.finish()
        assert found == data


def test_inflater_byte_by_byte() -> None:
    packed = zlib.compress(b"some text " * 50)
    inflater = Inflater(500)
    pieces = [b"".join(inflater.feed(packed[i : i + 1])) for i in range(len(packed))]
    inflater.finish()
    assert b"".join(pieces) == b"some text " * 50
    with pytest.raises(ProtocolError, match="behind the end"):
        list(inflater.feed(b"x"))


def test_inflater_refuses_one_byte_more_than_the_limit() -> None:
    packed = zlib.compress(bytes(1000))
    assert b"".join(Inflater(1000).feed(packed)) == bytes(1000)
    with pytest.raises(ProtocolError, match="past the limit"):
        list(Inflater(999).feed(packed))


@pytest.mark.parametrize("cut", range(0, 20))
def test_inflater_refuses_a_truncated_stream(cut: int) -> None:
    packed = zlib.compress(b"some text")
    inflater = Inflater(100)
    list(inflater.feed(packed[: min(cut, len(packed) - 1)]))
    with pytest.raises(ProtocolError, match="ends early"):
        inflater.finish()


def test_snapshot_comes_in_parts_as_its_bytes_come() -> None:
    decoder = Decoder(protocol.TO_SERVER)
    assert list(decoder.feed(protocol.snapshot_header(9, 6)[:-1])) == []
    assert list(decoder.feed(b"\x09")) == [SnapshotPart(9, b"", True, False)]
    assert decoder.in_packet
    assert list(decoder.feed(b"")) == []
    assert list(decoder.feed(b"abc")) == [SnapshotPart(9, b"abc", False, False)]
    events = list(decoder.feed(b"def" + protocol.encode_version(PacketType.REWIND, 1)))
    assert events == [
        SnapshotPart(9, b"def", False, True),
        Packet(PacketType.REWIND, b"\0\0\0\1"),
    ]
    assert not decoder.in_packet


def test_snapshot_parts_hold_no_more_than_was_fed() -> None:
    decoder = Decoder(protocol.TO_SERVER)
    list(decoder.feed(protocol.snapshot_header(1, 2**32 - 5)))
    total = 0
    for _ in range(64):
        for event in decoder.feed(bytes(1 << 20)):
            assert isinstance(event, SnapshotPart) and len(event.data) <= 1 << 20
            total += len(event.data)
    assert total == 64 << 20


def test_empty_snapshot_is_first_and_last_at_once() -> None:
    events = list(Decoder(protocol.TO_SERVER).feed(protocol.snapshot_header(3, 0) + b"\x05"))
    assert events == [SnapshotPart(3, b"", True, True)]


# Random and mutated packets

PACKETS = [raw(entry) for entry in GOLDEN]
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255), st.integers(0, 3)), max_size=4)


def mutate(packet: bytes, edits: Sequence[tuple[int, int, int]]) -> bytes:
    """Change, insert, remove or cut at some places of ``packet``."""
    data = bytearray(packet)
    for place, byte, what in edits:
        at = place % (len(data) + 1)
        if what == 0 and at < len(data):
            data[at] = byte
        elif what == 1:
            data.insert(at, byte)
        elif what == 2:
            del data[at : at + 1 + byte % 8]
        elif what == 3:
            del data[at:]
    return bytes(data)


def consume(data: bytes, limits: Any, size: int) -> None:
    """Decode ``data`` in pieces as a peer would; only the two errors may come out."""
    decoder, inflater = Decoder(limits), Inflater(1 << 20)
    try:
        for start in range(0, len(data), size):
            for event in decoder.feed(data[start : start + size]):
                if isinstance(event, SnapshotPart):
                    inflater = Inflater(1 << 20) if event.first else inflater
                    list(inflater.feed(event.data))
                    if event.last:
                        inflater.finish()
                    continue
                assert isinstance(event, Packet)
                if event.type is PacketType.CHANGE:
                    assert isinstance(protocol.decode_change(event.payload), Change)
                elif event.type is PacketType.METADATA:
                    protocol.decode_metadata(event.payload)
                elif event.type in (PacketType.REWIND, PacketType.ACK):
                    protocol.decode_version(event.payload)
    except (ProtocolError, InvalidChange):
        pass


framed = st.builds(
    lambda kind, body: struct.pack("!BI", kind, len(body)) + body,
    st.integers(0, 12),
    st.binary(max_size=40),
)
changes = st.builds(
    lambda version, body: protocol.encode(
        PacketType.CHANGE, struct.pack("!I", version) + zlib.compress(body)
    ),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=40),
)
mutated = st.builds(mutate, st.sampled_from(PACKETS), EDITS)
packets = st.one_of(st.binary(max_size=60), framed, changes, mutated)


@settings(max_examples=1000, deadline=None)
@given(st.lists(packets, min_size=20, max_size=20), st.integers(1, 64), st.booleans())
def test_20000_random_packets(batch: list[bytes], size: int, to_server: bool) -> None:
    limits = protocol.TO_SERVER if to_server else protocol.TO_CLIENT
    for packet in batch:
        consume(packet, limits, size)
    consume(b"".join(batch), limits, size)
