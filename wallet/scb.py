"""Static channel backups as Core Lightning has them, as pure functions of plain values.

``modern_scb_chan`` of its ``common/scb_wire.csv`` (v26.06), all big-endian:

    | bytes | field |
    |---|---|
    | 8 | id: lightningd's number of the channel, from which it derives its own keys |
    | 32 | channel id |
    | 33 | the peer's node id |
    | 7 to 259 | address: kind (1 IPv4, 2 IPv6, 4 Tor, 5 name), the name's length, address, port |
    | 32 + 4 | funding outpoint: txid as hashed, not as shown; output |
    | 8 | capacity, satoshi |
    | 2 + n | channel type: length, feature bits |
    | 4 + n | length of what follows: type, length, value, each of which may be missing: |
    | | 1: the peer's secrets (shachain): lowest index, u32 count, then (index, secret) each |
    | | 3: the peer's basepoints: revocation, payment, htlc, delayed payment |
    | | 5: who opened it: 0 we, 1 the peer |
    | | 7: to_self_delay of the peer's configuration, u16 |

``lightning-cli recoverchannel`` skips what it cannot decode without a word, and lightningd
ends by itself at a node id that is no point of the curve. So nothing such is made here.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

MAX_SECRETS = 49
"""Entries of a shachain: lightningd's indices have 48 bits."""
NOWHERE = bytes((1, 127, 0, 0, 1, 0, 1))
"""127.0.0.1:1, what lightningd itself takes for an address that it cannot read."""
_FIELD_PRIME = 2**256 - 2**32 - 977
_LENGTHS = {1: 4, 2: 16, 4: 35}
_ONION = re.compile(r"([a-z2-7]{56})\.onion", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


@dataclass(frozen=True, slots=True)
class Shachain:
    """The peer's revoked secrets, as many as all others follow from: (index, secret)."""

    lowest: int
    known: Sequence[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class StaticBackup:
    """All that ``recoverchannel`` can be told of a channel; None: it is not known.

    Attributes:
        id: lightningd's number of the channel.
        address: as on the wire.
        features: the channel type.
        basepoints: revocation, payment, htlc, delayed payment, one behind the other.
        opener: 0 we, 1 the peer.
        delay: to_self_delay, blocks.
    """

    id: int
    channel_id: bytes
    peer_id: bytes
    address: bytes
    funding_txid: bytes
    funding_output: int
    capacity_sat: int
    features: bytes
    shachain: Shachain | None = None
    basepoints: bytes | None = None
    opener: int | None = None
    delay: int | None = None

    def encode(self) -> bytes:
        """What ``recoverchannel`` takes, in hex, and ``staticbackup`` gives."""
        tlvs = b"".join(
            _bigsize(number) + _bigsize(len(value)) + value
            for number, value in (
                (1, _secrets(self.shachain)),
                (3, self.basepoints),
                (5, None if self.opener is None else bytes((self.opener,))),
                (7, None if self.delay is None else struct.pack("!H", self.delay)),
            )
            if value is not None
        )
        return b"".join(
            (
                struct.pack("!Q", self.id),
                self.channel_id,
                self.peer_id,
                self.address,
                self.funding_txid,
                struct.pack("!IQ", self.funding_output, self.capacity_sat),
                struct.pack("!H", len(self.features)) + self.features,
                struct.pack("!I", len(tlvs)) + tlvs,
            )
        )


def _secrets(chain: Shachain | None) -> bytes | None:
    if chain is None:
        return None
    known = b"".join(struct.pack("!Q", index) + secret for index, secret in chain.known)
    return struct.pack("!QI", chain.lowest, len(chain.known)) + known


def _bigsize(number: int) -> bytes:
    return bytes((number,)) if number < 0xFD else b"\xfd" + struct.pack("!H", number)


def is_point(key: bytes) -> bool:
    """Whether ``key`` is a compressed point of secp256k1."""
    x = int.from_bytes(key[1:], "big")
    if len(key) != 33 or key[0] not in (2, 3) or x >= _FIELD_PRIME:
        return False
    return pow(x**3 + 7, (_FIELD_PRIME - 1) // 2, _FIELD_PRIME) == 1


def channel_id_of(txid: bytes, output: int) -> bytes:
    """The channel id of before dual funding: the txid, xor the output in its last two bytes."""
    return txid[:30] + bytes((txid[30] ^ output >> 8, txid[31] ^ output & 0xFF))


def features_of(bits: Sequence[int]) -> bytes:
    """A channel type of these feature bits."""
    number = sum(1 << bit for bit in bits)
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def address_in_words(wire: bytes) -> str | None:
    """An address on the wire as lightning-cli takes it; None if it is none."""
    body, port = wire[1:-2], int.from_bytes(wire[-2:], "big")
    if not body or not port:
        return None
    if wire[0] == 5 and body[0] == len(body) - 1:
        name = body[1:].decode("latin-1")
        return f"{name}:{port}" if _NAME.fullmatch(name) else None
    if _LENGTHS.get(wire[0]) != len(body):
        return None
    if wire[0] == 4:
        return f"{base64.b32encode(body).decode().lower()}.onion:{port}"
    host = str(ipaddress.ip_address(body))
    return f"[{host}]:{port}" if wire[0] == 2 else f"{host}:{port}"


def address_on_wire(text: str) -> bytes | None:
    """What lightningd writes into a database as text, on the wire; None if that is no address.

    There always is a port. Onion addresses of version 2, sockets and websockets are none.
    """
    host, _, digits = text.removeprefix("dns:").rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", digits) or not 0 < int(digits) < 65536:
        return None
    port = struct.pack("!H", int(digits))
    try:
        packed = ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).packed
        return bytes((1 if len(packed) == 4 else 2,)) + packed + port
    except ValueError:
        pass
    if (onion := _ONION.fullmatch(host)) is not None:
        return b"\4" + base64.b32decode(onion[1], casefold=True) + port
    if host.lower().endswith(".onion") or not _NAME.fullmatch(host):
        return None
    return bytes((5, len(host))) + host.encode() + port
