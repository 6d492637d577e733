"""Packets of protocol 2: golden ones, corrupt ones, bombs, and the window that is kept."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import protocol
from backend import (
    EMPTY_CHAIN,
    MAX_CHANGE_SIZE,
    MAX_CHUNK_SIZE,
    Change,
    Status,
    bump,
    chain_after,
)
from filelog.layout2 import BUMPS, FINAL, MAX_LENGTH, Head, Kind
from protocol import (
    Decoder,
    Details,
    Metadata,
    Nack,
    NackCode,
    Packet,
    PacketType,
    Place,
    ProtocolError,
    RecordPacker,
    RecordUnpacker,
)
from tests import support

GOLDEN: list[dict[str, Any]] = json.loads((support.DATA / "golden/protocol2.json").read_text())
RECORDS = [entry for entry in GOLDEN if entry["type"] == "RECORD"]
STREAM = [entry for entry in RECORDS if entry["deflate"] == "stream"]
LIMITS = {"client": protocol.TO_SERVER, "server": protocol.TO_CLIENT}
FIELDS = ("kind", "flags", "version", "sequence", "time_ns", "session", "chain_before", "chain")
SESSION, CHAIN = bytes(range(16)), bytes(range(16, 32))
CHAIN_AFTER = bytes(range(0xAF, 0x9F, -1))
TIME_NS = 1_790_000_000_123_456_789


def raw(entry: dict[str, Any]) -> bytes:
    """The golden packet."""
    return bytes.fromhex(entry["hex"])


def golden_id(entry: dict[str, Any]) -> str:
    return f"{entry['type']}-{GOLDEN.index(entry)}"


def the_packet(entry: dict[str, Any]) -> Packet:
    """What the decoder makes of a golden packet, whole and byte by byte."""
    data, found = raw(entry), list[list[protocol.Event]]()
    for size in (len(data), 1):
        decoder = Decoder(LIMITS[entry["from"]])
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        found.append([event for piece in pieces for event in decoder.feed(piece)])
        assert not decoder.in_packet
    (packet,) = found[0]
    assert found[1] == [packet] and isinstance(packet, Packet)
    assert packet.type.name == entry["type"]
    return packet


def golden_head(entry: dict[str, Any]) -> tuple[Head, bytes]:
    """The record that a golden packet holds."""
    fields = {name: entry[name] for name in FIELDS}
    for name in ("session", "chain_before", "chain"):
        fields[name] = bytes.fromhex(fields[name])
    payload = bytes.fromhex(entry["payload"])
    return Head(length=len(payload), **fields), payload


def plain(data: bytes) -> bytes:
    """What one packet of a fresh connection inflates to."""
    return zlib.decompressobj(-15).decompress(data)


def record(kind: Kind, payload: bytes, version: int = 7, flags: int = 0) -> Head:
    """The head of a record as a client sends it."""
    after = CHAIN[::-1]
    if kind is Kind.CHANGE:
        after = chain_after(CHAIN, version, payload)
    return Head(
        kind=kind,
        flags=flags,
        version=version,
        time_ns=TIME_NS,
        session=SESSION,
        length=len(payload),
        chain_before=CHAIN,
        chain=after,
    )


def change(version: int, *statements: str) -> tuple[Head, bytes]:
    """A record of a change that bumps."""
    payload = Change(version, None, [*statements, bump(version)]).payload
    return record(Kind.CHANGE, payload, version, BUMPS), payload


SAMPLES: dict[str, tuple[Head, bytes]] = {
    "change": change(7, "INSERT INTO t VALUES ('\u00e9')"),
    "pragma": (record(Kind.CHANGE, b"PRAGMA foreign_keys = OFF;"), b"PRAGMA foreign_keys = OFF;"),
    "rewind": (record(Kind.REWIND, b"", 6), b""),
    "piece": (record(Kind.SNAPSHOT, bytes(range(40))), bytes(range(40))),
    "last piece": (record(Kind.SNAPSHOT, b"end", flags=FINAL), b"end"),
}


def content(packet: bytes) -> bytes:
    """The payload of a RECORD packet."""
    assert packet[0] == PacketType.RECORD
    assert struct.unpack("!I", packet[1:5])[0] == len(packet) - 5
    return packet[5:]


# Golden packets


def test_golden_packets_cover_what_protocol_2_adds() -> None:
    types = {"REQ_METADATA", "METADATA", "ACK", "NACK", "RECORD", "COMING", "RESTORE", "HELD"}
    types |= {"FOLLOW", "FOLLOWING", "PAUSE"}
    assert {entry["type"] for entry in GOLDEN} == types
    assert {entry["kind"] for entry in RECORDS} == set(Kind)


@pytest.mark.parametrize("entry", GOLDEN, ids=golden_id)
def test_golden_packet_is_cut_out_of_the_stream(entry: dict[str, Any]) -> None:
    assert the_packet(entry).payload == raw(entry)[5:]


def test_golden_request() -> None:
    for entry in [entry for entry in GOLDEN if entry["type"] == "REQ_METADATA"]:
        owner = bytes.fromhex(entry["owner"]) if entry["owner"] else None
        assert protocol.encode_request_metadata(owner, entry["machine"]) == raw(entry)
        payload = the_packet(entry).payload
        assert protocol.agreed_protocol(payload) == entry["offers"] == 2
        assert protocol.claimed_owner(payload) == (owner, entry["machine"])
    assert protocol.claimed_owner(protocol.VERSION.pack(2)) == (None, "")


def test_golden_metadata() -> None:
    (entry,) = [entry for entry in GOLDEN if entry["type"] == "METADATA"]
    expected = dict(entry["details"])
    for name in ("backup_id", "chain_before", "chain", "session"):
        expected[name] = bytes.fromhex(expected[name])
    metadata = Metadata(*entry["metadata"])._replace(details=Details(**expected))
    assert protocol.decode_metadata(the_packet(entry).payload) == metadata
    assert protocol.encode_metadata(metadata) == raw(entry)


def test_golden_ack() -> None:
    (entry,) = [entry for entry in GOLDEN if entry["type"] == "ACK"]
    expected = protocol.ACK.pack(entry["version"], bytes.fromhex(entry["chain"]))
    assert the_packet(entry).payload == expected


@pytest.mark.parametrize("entry", [e for e in GOLDEN if e["type"] == "NACK"], ids=golden_id)
def test_golden_nack(entry: dict[str, Any]) -> None:
    nack = Nack(entry["version"], NackCode[entry["code"]], entry["text"])
    assert protocol.decode_nack(the_packet(entry).payload) == nack
    assert protocol.encode_nack(nack) == raw(entry)


def test_golden_coming() -> None:
    (entry,) = [entry for entry in GOLDEN if entry["type"] == "COMING"]
    expected = entry["size"], entry["snapshot_size"], bytes.fromhex(entry["backup_id"])
    assert protocol.decode_coming(the_packet(entry).payload) == expected
    assert protocol.encode(PacketType.COMING, protocol.COMING.pack(*expected)) == raw(entry)


def test_golden_follow() -> None:
    nothing, asked = [entry for entry in GOLDEN if entry["type"] == "FOLLOW"]
    assert protocol.encode_follow(None) == raw(nothing)
    last = protocol.decode_follow(the_packet(asked).payload)
    assert last is not None and protocol.encode_follow(last) == raw(asked)
    assert last[1:5] == (Kind.CHANGE, BUMPS, SESSION, 0x1_0000_0005)
    assert (last.version, last.length, last.time_ns, last.chain) == (7, 41, TIME_NS, CHAIN_AFTER)
    (answer,) = [entry for entry in GOLDEN if entry["type"] == "FOLLOWING"]
    coming, place = protocol.decode_following(the_packet(answer).payload)
    assert (coming, place) == (protocol.Coming(0x2_0000_0040, 3 << 20, SESSION), last)
    assert protocol.encode_following(coming, place) == raw(answer)
    (pause,) = [entry for entry in GOLDEN if entry["type"] == "PAUSE"]
    assert protocol.encode(PacketType.PAUSE) == raw(pause)
    for cut in (1, 31, 33, 155):
        with pytest.raises(ProtocolError):
            protocol.decode_following(raw(answer)[5 : 5 + cut])


def test_golden_held() -> None:
    asked, answered = [entry for entry in GOLDEN if entry["type"] == "HELD"]
    assert protocol.encode(PacketType.HELD, bytes.fromhex(asked["chain"])) == raw(asked)
    assert protocol.decode_held(the_packet(answered).payload) == answered["held"]
    for size in (0, 7, 9):
        with pytest.raises(ProtocolError, match="HELD"):
            protocol.decode_held(bytes(size))


def test_golden_restore() -> None:
    (entry,) = [entry for entry in GOLDEN if entry["type"] == "RESTORE"]
    place = Place(entry["offset"], entry["sequence"], bytes.fromhex(entry["chain"]))
    assert protocol.encode_restore(place) == raw(entry)
    assert protocol.decode_restore(the_packet(entry).payload) == place
    assert protocol.decode_restore(protocol.encode_restore(None)[5:]) is None
    for size in (1, 8, 31, 33):
        with pytest.raises(ProtocolError, match="RESTORE"):
            protocol.decode_restore(bytes(size))


@pytest.mark.parametrize("entry", [e for e in RECORDS if e["deflate"] == "stored"], ids=golden_id)
def test_golden_record(entry: dict[str, Any]) -> None:
    expected = golden_head(entry)
    assert RecordUnpacker().unpack(the_packet(entry).payload) == expected
    # Another zlib may compress otherwise: what counts is what comes out of it.
    assert plain(content(RecordPacker().pack(*expected))) == plain(raw(entry)[5:])


def test_golden_stream_of_one_connection() -> None:
    unpacker, packer, plainer = RecordUnpacker(), RecordPacker(), zlib.decompressobj(-15)
    inflated = zlib.decompressobj(-15)
    for entry in STREAM:
        expected = golden_head(entry)
        assert unpacker.unpack(the_packet(entry).payload) == expected
        ours = inflated.decompress(content(packer.pack(*expected)))
        assert ours == plainer.decompress(raw(entry)[5:])
    # The later ones mean nothing without the window.
    for entry in STREAM[1:]:
        with pytest.raises(ProtocolError):
            RecordUnpacker().unpack(raw(entry)[5:])


# Records


@pytest.mark.parametrize("level", [1, 6, 9])
def test_records_come_back_as_they_went(level: int) -> None:
    packer, unpacker = RecordPacker(level), RecordUnpacker()
    for _ in range(3):
        for head, payload in SAMPLES.values():
            packet = packer.pack(head._replace(sequence=2**63), payload)
            found = unpacker.unpack(content(packet))
            assert found == (head._replace(sequence=2**63), payload)


def test_crc_is_over_every_field_and_the_payload() -> None:
    """The same record built by hand from the table of the protocol."""
    for head, payload in SAMPLES.values():
        begin = struct.pack("!BBIQ", head.kind, head.flags, head.version, 0)
        end = struct.pack("!Q", TIME_NS) + SESSION + head.chain_before + head.chain
        end += struct.pack("!I", len(payload))
        crc = zlib.crc32(begin + bytes(4) + end + payload)
        expected = begin + struct.pack("!I", crc) + end + payload
        assert plain(content(RecordPacker().pack(head, payload))) == expected


def deflated_stored(data: bytes) -> bytes:
    """``data`` as a stored block with a sync flush: a flip then reaches the content itself."""
    size = len(data)
    return b"\0" + struct.pack("<HH", size, size ^ 0xFFFF) + data + b"\0\0\0\xff\xff"


def check_flips(packets: list[bytes], which: int) -> None:
    """Flip every bit of one packet: no record may come out that was not sent.

    The packets before it give the window; those after it show that nothing false follows.
    """
    expected = []
    unpacker = RecordUnpacker()
    for packet in packets:
        expected.append(unpacker.unpack(packet))
    for at in range(len(packets[which])):
        for bit in range(8):
            bad = bytearray(packets[which])
            bad[at] ^= 1 << bit
            unpacker = RecordUnpacker()
            try:
                for number, packet in enumerate(packets):
                    data = bytes(bad) if number == which else packet
                    assert unpacker.unpack(data) == expected[number], (at, bit)
            except ProtocolError:
                continue


@pytest.mark.parametrize("name", SAMPLES)
def test_every_bit_of_a_stored_record_flipped(name: str) -> None:
    packets = [
        deflated_stored(plain(content(RecordPacker().pack(*sample))))
        for sample in (SAMPLES[name], SAMPLES["change"])
    ]
    check_flips(packets, 0)
    refused = 0
    body = packets[0]
    for at in range(5, len(body) - 5):
        bad = bytearray(body)
        bad[at] ^= 0xFF
        with pytest.raises(ProtocolError):
            RecordUnpacker().unpack(bytes(bad))
        refused += 1
    assert refused == protocol.RECORD.size + len(SAMPLES[name][1])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_bit_of_a_compressed_record_flipped(which: int) -> None:
    packer = RecordPacker()
    samples = (SAMPLES["change"], SAMPLES["pragma"], change(8, "INSERT INTO t VALUES ('\u00e9')"))
    check_flips([content(packer.pack(*sample)) for sample in samples], which)


@pytest.mark.parametrize("name", SAMPLES)
def test_record_cut_anywhere_is_refused(name: str) -> None:
    packet = content(RecordPacker().pack(*SAMPLES[name]))
    whole = RecordUnpacker().unpack(packet)
    for size in range(len(packet)):
        try:
            # Without the end of the flush the record may be complete already.
            assert RecordUnpacker().unpack(packet[:size]) == whole
            assert len(packet) - size <= 7
        except ProtocolError:
            pass


def test_change_with_another_chain_is_refused() -> None:
    head, payload = SAMPLES["change"]
    for wrong in (head._replace(chain=CHAIN), head._replace(chain_before=EMPTY_CHAIN)):
        with pytest.raises(ProtocolError, match="does not match its chain"):
            RecordUnpacker().unpack(content(RecordPacker().pack(wrong, payload)))


@pytest.mark.parametrize("kind", [0, 5, 255])
def test_unknown_kind_is_refused(kind: int) -> None:
    head, payload = SAMPLES["change"]
    with pytest.raises(ProtocolError, match="no known kind"):
        RecordUnpacker().unpack(content(RecordPacker().pack(head._replace(kind=kind), payload)))


@pytest.mark.parametrize("size", [0, 1, 77])
def test_record_without_all_of_its_fields_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match="no known kind"):
        RecordUnpacker().unpack(deflated_stored(bytes([2]) * size))


def test_last_block_is_refused() -> None:
    fields = plain(content(RecordPacker().pack(*SAMPLES["rewind"])))
    ended = bytearray(deflated_stored(fields))
    ended[0] |= 1  # The last block of the stream.
    for packet in (ended, ended[:-5]):  # With something behind the end, and without.
        with pytest.raises(ProtocolError, match="ends within a connection"):
            RecordUnpacker().unpack(bytes(packet))


# Limits and bombs


@pytest.mark.parametrize(("kind", "limit"), [(Kind.SNAPSHOT, MAX_CHUNK_SIZE), (Kind.REWIND, 0)])
def test_limit_of_each_kind(kind: Kind, limit: int) -> None:
    assert MAX_LENGTH[kind] == limit
    for noise in (bytes(limit), random.Random(1).randbytes(limit)):
        head = record(kind, noise)
        found = RecordUnpacker().unpack(content(RecordPacker().pack(head, noise)))
        assert found == (head, noise)
        for more in (noise + b"x", noise + bytes(100)):
            with pytest.raises(ProtocolError, match="past its limit"):
                RecordUnpacker().unpack(content(RecordPacker().pack(record(kind, more), more)))


def test_change_may_be_as_large_as_a_change_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    # The real limit would take a minute: the rule is the same for a small one.
    monkeypatch.setitem(MAX_LENGTH, Kind.CHANGE, 5000)
    for size, fits in ((4999, True), (5000, True), (5001, False), (50_000, False)):
        payload = b"x" * size
        packet = content(RecordPacker().pack(record(Kind.CHANGE, payload), payload))
        if fits:
            assert RecordUnpacker().unpack(packet)[1] == payload
            continue
        with pytest.raises(ProtocolError, match="past its limit"):
            RecordUnpacker().unpack(packet)


@pytest.mark.parametrize(
    "size", [0, 1, 5000, MAX_CHUNK_SIZE, MAX_CHUNK_SIZE + 1, 3 * MAX_CHUNK_SIZE]
)
@pytest.mark.parametrize("says", [-1, 0, 1])
def test_length_is_what_it_inflates_to(size: int, says: int) -> None:
    payload = random.Random(3).randbytes(size // 2) + bytes(size - size // 2)
    head = record(Kind.CHANGE, payload)
    if size + says < 0:
        return
    packet = content(RecordPacker().pack(head._replace(length=size + says), payload))
    if says == 0:
        assert RecordUnpacker().unpack(packet) == (head, payload)
        return
    with pytest.raises(ProtocolError, match=r"what it says|not match"):
        RecordUnpacker().unpack(packet)


def test_record_in_parts_of_any_size_is_the_same() -> None:
    payload = random.Random(4).randbytes(40_000) + bytes(3 * MAX_CHUNK_SIZE)
    head = record(Kind.CHANGE, payload)
    packer, unpacker = RecordPacker(), RecordUnpacker()
    for size in (1 << 12, 1 << 16, 1 << 30):
        packet = content(packer.pack(head, payload))
        parts = [packet[at : at + size] for at in range(0, len(packet), size)]
        assert unpacker.begin(parts[0]) == head
        found = b"".join(unpacker.pieces())
        for part in parts[1:]:
            pieces = list(unpacker.pieces(part))
            assert max(map(len, pieces)) <= MAX_CHUNK_SIZE + 1
            found += b"".join(pieces)
        assert found == payload
        unpacker.end(head, found)


def test_packet_that_is_too_long_to_be_held_comes_in_parts() -> None:
    body, small = random.Random(5).randbytes(10_000), protocol.encode(PacketType.RECORD, b"x" * 99)
    data = small + protocol.encode(PacketType.RECORD, body) + small
    for size in (1, 1000, 4096, 5000, len(data)):
        decoder, found = Decoder(protocol.TO_SERVER, whole=5000), list[protocol.Event]()
        for at in range(0, len(data), size):
            found += decoder.feed(data[at : at + size])
        assert not decoder.in_packet
        assert found[0] == found[-1] == Packet(PacketType.RECORD, b"x" * 99)
        parts = found[1:-1]
        assert all(isinstance(part, protocol.Part) for part in parts)
        assert b"".join(part.data for part in parts if isinstance(part, protocol.Part)) == body
        flags = [part[2:] for part in parts]
        assert len(flags) == 1 or (flags[0] == (True, False) and flags[-1] == (False, True))
        assert not any(any(flag) for flag in flags[1:-1])


def peak_of(call: Callable[[], None]) -> int:
    """The most bytes that Python held during ``call``."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", Kind)
def test_bomb_is_refused_and_costs_no_memory(kind: Kind) -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(plain(content(RecordPacker().pack(record(kind, b""), b""))))
    for _ in range(MAX_LENGTH[kind] // MAX_CHUNK_SIZE + 32):
        bomb += deflate.compress(bytes(MAX_CHUNK_SIZE))
    bomb += deflate.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < MAX_CHANGE_SIZE // 900

    def unpack() -> None:
        with pytest.raises(ProtocolError, match="past what it says"):
            RecordUnpacker().unpack(bomb)

    assert peak_of(unpack) < 16 << 20


@pytest.mark.parametrize("length", [5, 1 << 20, 1 << 21])
@pytest.mark.parametrize("behind", [b"", b"more"])
@pytest.mark.timeout(30)
def test_stream_that_ends_is_refused(length: int, behind: bytes) -> None:
    """zlib keeps what stands behind its end for ever, and grows with each look at it."""
    head = record(Kind.CHANGE, b"")
    fields = plain(content(RecordPacker().pack(head._replace(length=length), b"")))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packet = deflate.compress(fields + bytes(5)) + deflate.flush(zlib.Z_FINISH) + behind
    with pytest.raises(ProtocolError, match="ends within a connection"):
        RecordUnpacker().unpack(packet)


def test_large_change_is_measured_and_then_taken() -> None:
    noise = random.Random(2).randbytes(1 << 20).hex()
    packer, unpacker = RecordPacker(), RecordUnpacker()
    for version in (7, 8):
        large = change(version, f"-- {noise}")
        packet = content(packer.pack(*large))
        assert len(packet) > MAX_CHANGE_SIZE // 1032, "large enough to be a bomb"
        assert unpacker.unpack(packet) == large
        small = change(version + 2, "SELECT 1")
        assert unpacker.unpack(content(packer.pack(*small))) == small
    with pytest.raises(ProtocolError):
        RecordUnpacker().unpack(b"\x07" * (MAX_CHANGE_SIZE // 1032 + 1))


# The window


def test_window_is_kept_across_records_and_is_fresh_on_a_new_connection() -> None:
    texts = [random.Random(n).randbytes(60).hex() for n in range(20)]
    packer, unpacker = RecordPacker(), RecordUnpacker()
    first = [len(packer.pack(*change(n + 2, text))) for n, text in enumerate(texts)]
    again = [packer.pack(*change(n + 22, text)) for n, text in enumerate(texts)]
    for before, now in zip(first, again, strict=True):
        assert len(now) < before * 0.75, "the window is kept"
    fresh = [len(RecordPacker().pack(*change(n + 2, text))) for n, text in enumerate(texts)]
    assert sum(first[1:]) < 0.75 * sum(fresh[1:]) and first[0] == fresh[0]
    with pytest.raises(ProtocolError):
        unpacker.unpack(content(again[-1]))


def test_window_of_recorded_traffic_halves_its_bytes() -> None:
    packer, unpacker, ours, plainly = RecordPacker(), RecordUnpacker(), 0, 0
    for version, statements in support.trace_sessions("payer")[0]:
        one = Change(version, None, statements)
        head = record(Kind.CHANGE, one.payload, version, BUMPS if one.bumps else 0)
        packet = packer.pack(head, one.payload)
        assert unpacker.unpack(content(packet)) == (head, one.payload)
        ours += len(packet)
        plainly += len(protocol.encode_change(one))
    assert ours < 0.6 * plainly


# The other packets


def details(server: str = "some server") -> Details:
    return Details(bytes(16), 3, CHAIN, CHAIN[::-1], SESSION, TIME_NS, 4096, server)


def test_metadata_with_and_without_details() -> None:
    for metadata in (
        Metadata(1, 7, 6, 9),
        Metadata(2, 7, 6, 9, details()),
        Metadata(2, 2**32 - 1, 0, 2**64 - 1, details("")),
        Metadata(2, 0, 0, 0, details("\u00e9" * 1000)),
    ):
        packet = protocol.encode_metadata(metadata)
        assert protocol.decode_metadata(packet[5:]) == metadata


def test_metadata_of_another_form_is_refused() -> None:
    second = protocol.encode_metadata(Metadata(2, 7, 6, 9, details("")))[5:]
    first = protocol.encode_metadata(Metadata(1, 7, 6, 9))[5:]
    for size in range(len(second)):  # At the size of protocol 1 it says 2 and lacks the rest.
        with pytest.raises(ProtocolError):
            protocol.decode_metadata(second[:size])
    for bad in (first + b"x", first + second[20:], b"\0\0\0\3" + second[4:], bytes(len(second))):
        with pytest.raises(ProtocolError):
            protocol.decode_metadata(bad)
    text = protocol.decode_metadata(second + b"\xff\xfe").details
    assert text is not None and text.server == "\ufffd\ufffd", "a name is only shown"


@pytest.mark.parametrize(
    ("payload", "agreed"),
    [
        (b"", 1),
        (b"\0", 1),
        (b"\0\0\2", 1),
        (b"\0\0\0\0", 1),
        (b"\0\0\0\1", 1),
        (b"\0\0\0\2", 1),  # As from 1.0, which cannot name an owner.
        (b"\0\0\0\2" + bytes(16), 1),
        (b"\0\0\0\2" + bytes(17), 2),
        (b"\0\0\0\3" + bytes(17), 2),
        (b"\xff\xff\xff\xff" + bytes(17), 2),
        (b"\0\0\0\2" + bytes(17) + b" and more to come", 2),
        (b"\0\0\0\1" + bytes(17) + b" and more to come", 1),
        (b"\2\0\0\0" + bytes(17), 2),
    ],
)
def test_agreed_protocol(payload: bytes, agreed: int) -> None:
    assert protocol.agreed_protocol(payload) == agreed


@given(st.binary(max_size=40))
def test_agreed_protocol_is_one_that_is_spoken_here(payload: bytes) -> None:
    agreed = protocol.agreed_protocol(payload)
    assert agreed in (1, 2)
    offers = int.from_bytes(payload[:4], "big") if len(payload) >= 21 else 0
    assert agreed == (2 if offers >= 2 else 1)


def test_nacks_of_both_protocols() -> None:
    assert protocol.decode_nack(b"") == Nack(None, NackCode.OTHER, "")
    assert protocol.decode_nack(b"\0\0\0\7") == Nack(7, NackCode.OTHER, "")
    for size in (1, 2, 3, 5):
        assert protocol.decode_nack(bytes(size)) == Nack(None, NackCode.OTHER, "")
    for code in NackCode:
        nack = Nack(7, code, f"because of {code.name}")
        assert protocol.decode_nack(protocol.encode_nack(nack)[5:]) == nack
    unknown = struct.pack("!IH", 9, 4711) + b"of later times"
    assert protocol.decode_nack(unknown) == Nack(9, NackCode.OTHER, "of later times")
    broken = struct.pack("!IH", 9, 3) + b"caf\xc3"
    assert protocol.decode_nack(broken) == Nack(9, NackCode.TAKEN_OVER, "caf\ufffd")


def test_text_of_a_nack_is_bounded() -> None:
    packet = protocol.encode_nack(Nack(1, NackCode.DAMAGED, "\u00e9" * 10_000))
    assert len(packet) == 5 + 6 + protocol.MAX_NACK_TEXT
    assert protocol.decode_nack(packet[5:]).text == "\u00e9" * (protocol.MAX_NACK_TEXT // 2)
    assert len(protocol.encode_nack(Nack(None, NackCode.OTHER, ""))) == 11


@pytest.mark.parametrize("size", [0, 8, 31, 33])
def test_coming_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match="COMING"):
        protocol.decode_coming(bytes(size))


# Random and mutated packets

EDITS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 255), st.integers(0, 2)), min_size=1, max_size=4
)


def mutate(data: bytes, edits: list[tuple[int, int, int]]) -> bytes:
    """Change, insert or remove bytes at some places of ``data``."""
    found = bytearray(data)
    for place, byte, what in edits:
        at = place % (len(found) + 1)
        if what == 0 and at < len(found):
            found[at] = byte
        elif what == 1:
            found.insert(at, byte)
        else:
            del found[at : at + 1 + byte % 8]
    return bytes(found)


heads = st.builds(
    lambda kind, flags, numbers, names: Head(
        kind=kind,
        flags=flags,
        version=numbers[0] % 2**32,
        sequence=numbers[1],
        time_ns=numbers[2],
        session=names[0],
        chain_before=names[1],
        chain=names[2],
    ),
    st.sampled_from(Kind),
    st.integers(0, 255),
    st.tuples(*[st.integers(0, 2**64 - 1)] * 3),
    st.tuples(*[st.binary(min_size=16, max_size=16)] * 3),
)


def any_record(head: Head, payload: bytes) -> tuple[Head, bytes]:
    """A record whose payload and chain fit its kind."""
    payload = b"" if head.kind == Kind.REWIND else payload
    if head.kind == Kind.CHANGE:
        head = head._replace(chain=chain_after(head.chain_before, head.version, payload))
    return head._replace(length=len(payload)), payload


records = st.builds(any_record, heads, st.binary(max_size=200))


@settings(max_examples=150, deadline=None)
@given(st.lists(records, min_size=1, max_size=8), st.integers(1, 9))
def test_any_records_come_back(sent: list[tuple[Head, bytes]], level: int) -> None:
    packer, unpacker = RecordPacker(level), RecordUnpacker()
    for one in sent:
        assert unpacker.unpack(content(packer.pack(*one))) == one


@settings(max_examples=150, deadline=None)
@given(st.lists(records, min_size=1, max_size=4), st.integers(0, 3), EDITS, st.integers(0, 9))
def test_mutated_records_are_the_same_or_refused(
    sent: list[tuple[Head, bytes]], which: int, edits: list[tuple[int, int, int]], level: int
) -> None:
    packer, unpacker = RecordPacker(level), RecordUnpacker()
    try:
        for number, one in enumerate(sent):
            packet = content(packer.pack(*one))
            if number == which:
                packet = mutate(packet, edits)
            assert unpacker.unpack(packet) == one
    except ProtocolError:
        pass


framed = st.builds(
    lambda kind, body: protocol.encode(kind, body),
    st.sampled_from(PacketType),
    st.binary(max_size=300),
)
mutated = st.builds(lambda entry, edits: mutate(raw(entry), edits), st.sampled_from(GOLDEN), EDITS)


def consume(data: bytes, limits: Any, size: int) -> None:
    """Decode ``data`` in pieces as a peer would; only ProtocolError may come out."""
    decoder, unpacker = Decoder(limits), RecordUnpacker()
    try:
        for start in range(0, len(data), size):
            for event in decoder.feed(data[start : start + size]):
                if not isinstance(event, Packet):
                    continue
                if event.type is PacketType.RECORD:
                    unpacker.unpack(event.payload)
                elif event.type is PacketType.METADATA:
                    protocol.decode_metadata(event.payload)
                elif event.type is PacketType.NACK:
                    protocol.decode_nack(event.payload)
                elif event.type is PacketType.COMING:
                    protocol.decode_coming(event.payload)
                elif event.type is PacketType.RESTORE:
                    protocol.decode_restore(event.payload)
                elif event.type is PacketType.REQ_METADATA:
                    protocol.agreed_protocol(event.payload)
    except ProtocolError:
        pass


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=60), framed, mutated), min_size=10, max_size=10),
    st.integers(1, 64),
    st.booleans(),
)
def test_random_and_mutated_packets(batch: list[bytes], size: int, to_server: bool) -> None:
    limits = protocol.TO_SERVER if to_server else protocol.TO_CLIENT
    for packet in batch:
        consume(packet, limits, size)
    consume(b"".join(batch), limits, size)


# Status

STATUS = Status(
    url="file:///srv/node.bkp",
    layout="file layout 2",
    version=7,
    prev_version=6,
    version_count=8,
    backup_id="ab" * 16,
    owner="cd" * 8,
    size=2**40,
    damage="The backup is damaged.",
    notes=["a note"],
    warnings=["the disk is nearly full"],
)


def test_status_comes_back_as_it_went() -> None:
    (packet,) = Decoder(protocol.TO_CLIENT).feed(protocol.encode_status(STATUS))
    assert isinstance(packet, Packet) and packet.type is PacketType.STATUS_RES
    assert protocol.decode_status(packet.payload) == STATUS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", "7"),
        ("version", True),
        ("version", -1),
        ("version", None),
        ("size", 2**63),
        ("size", 1.5),
        ("last_change_ns", 10**30),
        ("layout", ["x"]),
        ("damage", "x" * 4097),
        ("owner", "no hex"),
        ("backup_id", "ab" * 17),
        ("torn_tail", 1),
        ("notes", "a note"),
        ("notes", [1]),
        ("warnings", ["x"] * 17),
    ],
)
def test_status_of_wrong_types_and_lengths_is_refused(name: str, value: object) -> None:
    found = {**dataclasses.asdict(STATUS), name: value}
    with pytest.raises(ProtocolError, match=f"wrong {name}"):
        protocol.decode_status(json.dumps(found).encode())


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b"9" * 5000])
def test_status_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_status(payload)


def test_status_obeys_no_terminal_and_grows_with_releases() -> None:
    found = {**dataclasses.asdict(STATUS), "damage": "\x1b[2Jgone\nnew", "new": {}}
    del found["notes"], found["disk_free"]
    status = protocol.decode_status(json.dumps(found).encode())
    assert status.damage == "[2Jgone new" and status.notes == []
    long = dataclasses.replace(STATUS, damage="x" * 10_000, warnings=["y" * 9000] * 40)
    assert len(protocol.decode_status(protocol.encode_status(long)[5:]).warnings) == 16
