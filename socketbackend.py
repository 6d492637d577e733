"""A backup on a server, over TCP: ``socket:<host>:<port>[?proxy=socks5:<host>:<port>]``."""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import json
import os
import platform
import re
import socket
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple
from urllib.parse import parse_qsl

import protocol
from backend import (
    EMPTY_CHAIN,
    MAX_CHUNK_SIZE,
    NOBODY,
    TAG_SIZE,
    Change,
    Destination,
    Progress,
    Reading,
    Snapshot,
    Status,
    chain_after,
    committed,
    log,
    new_session,
    taken_over,
)
from errors import CLI, BackupError, BackupExists, ConfigError
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, Head, Kind
from filelog.reader import effective
from protocol import (
    Details,
    Metadata,
    Nack,
    NackCode,
    Packet,
    PacketType,
    ProtocolError,
    SnapshotPart,
)
from stream import Stream

DEFAULT_RETRY_FOR_S = 120.0
"""How long a node waits for its server to come back before the change is refused."""
CONNECT_TIMEOUT_S = 15.0
PROXY_TIMEOUT_S = 60.0
"""A new Tor circuit may take this long."""
ANSWER_TIMEOUT_S = 90.0
"""Longer than a server retries its disk."""
SLOWEST_RATE = 10 << 10
"""Bytes a second that the slowest line brings; a large change gets so much more time."""
TIMEOUT_STEP_S = 10
"""A timeout grows in steps: to set another one is a call of the system."""
SNAPSHOT_TIMEOUT_S = 3600.0
"""A server verifies a snapshot before it answers."""
COMPACT_TIMEOUT_S = 6 * 3600.0
"""Keepalive notices a server that is gone much earlier."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
OWNER_TRIES = 3


class AddrType(enum.Enum):
    """What a URL's host is."""

    IPv4 = "IPv4"
    IPv6 = "IPv6"
    NAME = "NAME"


class ProxyType(enum.Enum):
    """How the server is reached."""

    DIRECT = "direct"
    SOCKS5 = "socks5"


class HostPort(NamedTuple):
    """A host, its port, and what kind of host it is."""

    host: str
    port: int
    addrtype: AddrType

    def __str__(self) -> str:
        host = f"[{self.host}]" if self.addrtype is AddrType.IPv6 else self.host
        return f"{host}:{self.port}"


class SocketUrl(NamedTuple):
    """A parsed ``socket:`` URL; ``retry_for`` in seconds."""

    target: HostPort
    proxytype: ProxyType
    proxytarget: HostPort | None
    retry_for: float


def parse_host_port(text: str) -> HostPort:
    """``host:port``, ``1.2.3.4:port`` or ``[v6]:port``; ValueError says what is wrong."""
    host, colon, digits = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", digits) or not 0 < int(digits) < 65536:
        raise ValueError(f"{text!r} does not end with a port between 1 and 65535")
    port = int(digits)
    if host.startswith("[") and host.endswith("]"):
        try:
            return HostPort(str(ipaddress.IPv6Address(host[1:-1])), port, AddrType.IPv6)
        except ValueError as error:
            raise ValueError(f"{host!r} is no IPv6 address") from error
    if ":" in host:
        raise ValueError(f"an IPv6 address stands in brackets: [{host}]:{port}")
    try:
        return HostPort(str(ipaddress.IPv4Address(host)), port, AddrType.IPv4)
    except ValueError:
        pass
    if not re.fullmatch(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?", host) or len(host) > 253:
        raise ValueError(f"{host!r} is no host")
    if re.fullmatch(r"[0-9.]+", host):
        raise ValueError(f"{host!r} is no IPv4 address")
    return HostPort(host, port, AddrType.NAME)


def parse_socket_url(url: str) -> SocketUrl:
    """Take a ``socket:`` URL apart; ValueError says what is wrong with it.

    The form is ``socket:<host>:<port>``, with the parameters ``proxy=socks5:<host>:<port>``
    and ``retry_for=<seconds>``.
    """
    rest = url.removeprefix("socket:")
    if rest == url:
        raise ValueError("the URL does not begin with socket:")
    address, question, query = rest.partition("?")
    target = parse_host_port(address.removeprefix("//"))
    proxytype, proxytarget, retry_for = ProxyType.DIRECT, None, DEFAULT_RETRY_FOR_S
    seen: set[str] = set()
    try:
        if question and not query:
            raise ValueError("nothing behind the question mark")
        parameters = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(question))
    except ValueError as error:
        raise ValueError(f"the parameters {query!r} are not of the form name=value") from error
    for name, value in parameters:
        if name in seen:
            raise ValueError(f"the parameter {name!r} stands twice")
        seen.add(name)
        if name == "proxy":
            proxytype, proxytarget = _parse_proxy(value)
        elif name == "retry_for":
            if not re.fullmatch(r"[0-9]{1,6}", value):
                raise ValueError(f"retry_for={value!r} is no number of seconds")
            retry_for = float(value)
        else:
            raise ValueError(f"the parameter {name!r} is unknown")
    return SocketUrl(target, proxytype, proxytarget, retry_for)


def _parse_proxy(text: str) -> tuple[ProxyType, HostPort]:
    kind, _, address = text.partition(":")
    if kind != ProxyType.SOCKS5.value:
        raise ValueError(f"the proxy type {kind!r} is unknown; there is only socks5")
    try:
        return ProxyType.SOCKS5, parse_host_port(address)
    except ValueError as error:
        raise ValueError(f"the proxy: {error}") from error


class Unreachable(BackupError):
    """The server does not answer; nothing follows about what it holds."""

    def __init__(self, target: HostPort, reason: object) -> None:
        self.target = target
        super().__init__(
            f"The backup server {target} cannot be reached: {reason}.",
            "Check that it runs, and the forward, VPN or Tor on the way to it.",
        )


class Refused(BackupError):
    """The server answered NACK."""

    def __init__(self, nack: Nack) -> None:
        text = nack.text or "it does not say why, but its log does"
        self.code = nack.code
        super().__init__(f"The backup server says no: {text}.", NEXT_STEPS[nack.code])


class Diverged(BackupError):
    """The server holds another history than this node's."""

    def __init__(self, code: NackCode, text: str) -> None:
        self.code = code
        super().__init__(f"The backup server has another history: {text}.", NEXT_STEPS[code])


NEXT_STEPS = {
    NackCode.OTHER: "Compare `backup-cli status` of it with the node.",
    NackCode.OUT_OF_DATE: f"With the node stopped run `{CLI} resync --lightning-dir DIR`.",
    NackCode.LOST_STATE: f"Move the node's database away and run `{CLI} restore URL DEST`.",
    NackCode.TAKEN_OVER: "Two nodes write to this backup: find out which one holds the latest"
    " state, and never run the other again. If it is right that this node goes on with it, run"
    f" `{CLI} attach --lightning-dir DIR URL`.",
    NackCode.OTHER_HISTORY: "If this node holds the latest state, stop it and run"
    f" `{CLI} resync --lightning-dir DIR`.",
    NackCode.OLD_SNAPSHOT: "The backup is the newer copy: restore it in place of the node's.",
    NackCode.INVALID: "Look at both logs before you start lightningd again.",
    NackCode.DAMAGED: f"With the node stopped run `{CLI} resync --lightning-dir DIR`.",
}


def connect(url: SocketUrl) -> socket.socket:
    """A connection to the server, each of its addresses tried in turn; OSError if none."""
    if url.proxytarget is None:
        sock = socket.create_connection(url.target[:2], timeout=CONNECT_TIMEOUT_S)
    else:
        import socks  # Only those who use a proxy need it.

        # The proxy resolves the name: an onion name means nothing to anybody else.
        sock = socks.create_connection(
            url.target[:2],
            timeout=PROXY_TIMEOUT_S,
            proxy_type=socks.SOCKS5,
            proxy_addr=url.proxytarget.host,
            proxy_port=url.proxytarget.port,
            proxy_rdns=True,
        )
    return sock


class Link:
    """One connection to the server: requests out, events in.

    Raises:
        OSError: the connection is lost, or an answer took too long.
        ProtocolError: the server broke a rule.
    """

    def __init__(self, url: SocketUrl) -> None:
        self._stream = Stream(connect(url))
        self._decoder = protocol.Decoder(protocol.TO_CLIENT)
        self._events: deque[protocol.Event] = deque()
        self._packer = protocol.RecordPacker()
        self._unpacker = protocol.RecordUnpacker()
        self.protocol = 1

    def send(self, data: bytes) -> None:
        """Send ``data``, as long as it moves on."""
        self._stream.send(data, ANSWER_TIMEOUT_S)

    def event(self, timeout_s: float | None = None) -> protocol.Event:
        """The next event from the server."""
        while not self._events:
            data = self._stream.receive(ANSWER_TIMEOUT_S if timeout_s is None else timeout_s)
            if not data:
                raise ConnectionError("the server closed the connection")
            self._events.extend(self._decoder.feed(data))
        return self._events.popleft()

    def answer(self, timeout_s: float | None = None) -> Packet:
        """The next packet from the server, where no SNAPSHOT may come."""
        event = self.event(timeout_s)
        if not isinstance(event, Packet):
            raise ProtocolError("The server sent a SNAPSHOT that nobody asked for.")
        return event

    def metadata(self, owner: bytes | None = None) -> Metadata:
        """Ask for METADATA, and agree on a protocol.

        Args:
            owner: who means to write; Refused if the backup is not his.
        """
        self.send(protocol.encode_request_metadata(owner, platform.node()))
        packet = self.answer()
        if packet.type is PacketType.NACK:
            raise Refused(protocol.decode_nack(packet.payload))
        if packet.type is not PacketType.METADATA:
            raise ProtocolError(f"The server answered {packet.type.name} in place of METADATA.")
        metadata = protocol.decode_metadata(packet.payload)
        self.protocol = metadata.protocol
        return metadata

    def send_record(self, head: Head, payload: bytes) -> None:
        """Send a change, a rewind or, in protocol 2, a piece of a snapshot."""
        if self.protocol == 2:
            self.send(self._packer.pack(head, payload))
        elif head.kind == Kind.REWIND:
            self.send(protocol.encode_version(PacketType.REWIND, head.version))
        else:
            self.send(protocol.encode_payload(head.version, payload))

    def record(self, packet: Packet) -> tuple[Head, bytes]:
        """The record that a RECORD packet holds."""
        return self._unpacker.unpack(packet.payload)

    def ack_of(self, head: Head) -> Packet:
        """What the server sends when ``head`` is stored."""
        if self.protocol == 2:
            return Packet(PacketType.ACK, protocol.ACK.pack(head.version, head.chain))
        return Packet(PacketType.ACK, protocol.VERSION.pack(head.version))

    @staticmethod
    def check_ack(packet: Packet, expected: Packet) -> None:
        """Make sure that ``packet`` is what ``ack_of`` said.

        Raises:
            Refused: it is a NACK.
            ProtocolError: it is something else.
        """
        if packet == expected:
            return
        if packet.type is PacketType.NACK:
            raise Refused(protocol.decode_nack(packet.payload))
        raise ProtocolError(
            f"The backup server answered {packet.type.name} {packet.payload[:20].hex()}"
            f" in place of ACK {expected.payload.hex()}."
        )

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()


class Fate(enum.Enum):
    """What became of a request whose answer was lost."""

    STORED = "the server has it"
    LOST = "the server never got it"
    UNKNOWN = "the server holds something else"


def fate_of_change(change: Change, before: Metadata, now: Metadata) -> Fate:
    """Whether ``change``, sent when the server was at ``before``, is stored ``now``."""
    moved = now.version_count - before.version_count
    if now.version == change.version and moved == 1:
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


def fate_by_content(head: Head, before: Details, now: Details) -> Fate:
    """Whether the record ``head``, sent when the server was at ``before``, is stored ``now``."""
    if (now.chain, now.session) == (before.chain, before.session):
        return Fate.LOST
    if (now.chain, now.session) == (head.chain, head.session):
        return Fate.STORED
    return Fate.UNKNOWN


class SocketBackend(Destination):
    """A destination ``socket:<host>:<port>``.

    Args:
        url: see parse_socket_url; ConfigError if it is not of that form.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        try:
            self._url = parse_socket_url(url)
        except ValueError as error:
            raise ConfigError(f"{url!r} is no backup URL: {error}.") from error
        self.medium = f"the backup server {self._url.target}"
        self._link: Link | None = None
        self._known = Metadata(1, 0, 0, 0)
        self._owner: bytes | None = None
        self._session = NOBODY
        self._written = False
        self._refusal: BackupError | None = None
        self._rewound: Metadata | None = None
        """What a server of protocol 1 said before the rewind that was the last request."""

    # One request on a connection of its own

    def _once(self) -> tuple[Link, Metadata]:
        try:
            link = Link(self._url)
        except OSError as error:
            raise Unreachable(self._url.target, error) from error
        try:
            return link, link.metadata()
        except OSError as error:
            link.close()
            raise Unreachable(self._url.target, error) from error
        except BaseException:
            link.close()
            raise

    def require_absent(self) -> None:
        """See Backend."""
        link, found = self._once()
        link.close()
        self._check_empty(found)

    def _check_empty(self, found: Metadata) -> None:
        if found.version_count or found.version:
            raise BackupExists(
                f"A backup at version {found.version} on {self._url.target}",
                f"To go on with it run `{CLI} attach`; else let the server keep another file.",
            )

    def create(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, changes: Sequence[Change] = ()
    ) -> None:
        """See Backend. The server was started on an empty backup; it gets the snapshot."""
        link, found = self._once()
        try:
            self._check_empty(found)
            if snapshot is not None:
                self._send_snapshot(link, snapshot, owner)
        finally:
            link.close()
        with contextlib.closing(self):
            self.open()
            if snapshot is None and owner != NOBODY:
                self.take_over(owner)
            for change in changes:
                self.add_change(change)

    def replace(self, snapshot: Snapshot, owner: bytes = NOBODY) -> str:
        """See Backend. The server keeps the old backup and names it in its log."""
        if self._link is not None:  # Refused there if another one has written meanwhile.
            self._send_snapshot(self._link, snapshot, owner)
            self._refresh()
        else:
            link, _ = self._once()
            try:
                self._send_snapshot(link, snapshot, owner)
            finally:
                link.close()
        return f"on {self._url.target}, under the name that the server's log gives"

    def _send_snapshot(self, link: Link, snapshot: Snapshot, owner: bytes) -> None:
        head = BEFORE_FIRST._replace(
            kind=Kind.SNAPSHOT,
            version=snapshot.version,
            time_ns=time.time_ns(),
            session=owner,
            chain=snapshot.chain,
        )
        try:
            with open(snapshot.path, "rb") as source:
                if link.protocol == 2:
                    _send_pieces(link, source, head)
                else:
                    _send_packed(link, source, snapshot)
            packet = link.answer(SNAPSHOT_TIMEOUT_S)
        except OSError as error:
            raise Unreachable(self._url.target, error) from error
        link.check_ack(packet, link.ack_of(head))

    def status(self, check: bool = False) -> Status:
        """See Backend. A server of protocol 1 tells versions only; none checks its file."""
        link, found = self._once()
        link.close()
        status = Status(
            url=self.url,
            layout="server of protocol 1",
            version=found.version,
            prev_version=found.prev_version if found.prev_version != found.version else None,
            version_count=found.version_count,
        )
        if found.details is not None:
            status.layout = f"{found.details.server}, protocol 2"
            status.backup_id = found.details.backup_id.hex()
            status.size = found.details.size
            status.last_change_ns = found.details.time_ns or None
            status.owner = found.details.session[:TAG_SIZE].hex()
        return status

    def read(self) -> Reading:
        """See Backend."""
        link, found = self._once()
        return SocketReading(link, found, self._url.target)

    def keep_house(self, lock: threading.Lock, least: int | None) -> None:
        """See Destination. The server does."""

    def compact(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """See Destination. The server does it, and does not say how far it is."""
        link, _ = self._once()
        try:
            link.send(protocol.encode(PacketType.COMPACT))
            packet = link.answer(COMPACT_TIMEOUT_S)
            if packet.type is PacketType.NACK:
                raise Refused(protocol.decode_nack(packet.payload))
            if packet.type is not PacketType.COMPACT_RES:
                raise ProtocolError(f"The server answered {packet.type.name} to COMPACT.")
            return dict(json.loads(packet.payload))
        except (OSError, ValueError) as error:
            raise Unreachable(self._url.target, error) from error
        finally:
            link.close()

    def note_proven(self) -> None:
        """See Backend. A server takes no such note."""

    def is_old(self) -> bool:
        """See Backend."""
        raise self._for_its_server()

    def rebuild(self, owner: bytes, progress: Callable[[Reading], None]) -> str | None:
        """See Destination."""
        raise self._for_its_server()

    def _for_its_server(self) -> ConfigError:
        return ConfigError(
            f"{self.url} is kept by a server.",
            f"Stop the server and run `{CLI} upgrade FILE_URL` on its host.",
        )

    # The writer's connection

    def open(self, owner: bytes | None = None) -> None:
        """See Backend. Waits for the server as long as a change would.

        A server of protocol 1 keeps no owner, and takes any.
        """
        self._owner = owner
        self._reconnect(time.monotonic())
        details = self._known.details
        self._session = new_session(owner or (details.session if details else NOBODY))

    def take_over(self, owner: bytes) -> None:
        """See Backend. A server of protocol 1 keeps no owner."""
        details = self._known.details
        if details is not None:
            payload = layout2.encode_owner(time.time_ns(), platform.node())
            head = Head(
                kind=Kind.OWNER,
                version=self.version,
                time_ns=details.time_ns,
                session=owner,
                flags=layout2.BUMPS if self.rewindable else 0,
                length=len(payload),
                chain_before=details.chain_before,
                chain=details.chain,
            )
            self._deliver(head, payload, lambda now: Fate.UNKNOWN)
        self._owner, self._session = owner, new_session(owner)

    def _note(self, known: Metadata) -> None:
        if self._written and known.details is not None and self._known.details is None:
            # What was written in protocol 1 bears a session that the server made up.
            self._session = known.details.session
        self._known = known
        self.version, self.version_count = known.version, known.version_count
        self.rewindable = known.prev_version == known.version - 1

    def add_change(self, change: Change) -> None:
        """See Backend."""
        assert change.base == self.version, "the version rule comes first"
        before = self._known
        chain = before.details.chain if before.details else EMPTY_CHAIN
        head = Head(
            kind=Kind.CHANGE,
            version=change.version,
            time_ns=time.time_ns(),
            session=self._session,
            flags=layout2.BUMPS if change.bumps else 0,
            length=len(change.payload),
            chain_before=chain,
            chain=chain_after(chain, change.version, change.payload),
        )
        rewound = self._rewound

        def by_count(now: Metadata) -> Fate:
            # A server that forgot the rewind shows what it would show with this change.
            return Fate.UNKNOWN if now == rewound else fate_of_change(change, before, now)

        self._deliver(head, change.payload, by_count)
        self._rewound = None
        if self._known.details is None and not change.bumps:
            self._refresh()  # A server may take a repeated PRAGMA for the one it has.

    def rewind(self) -> None:
        """See Backend."""
        assert self.rewindable, "the version rule comes first"
        before = self._known
        head = Head(
            kind=Kind.REWIND,
            version=before.prev_version,
            time_ns=time.time_ns(),
            session=self._session,
        )
        if before.details is not None:
            details = before.details
            head = head._replace(chain_before=details.chain, chain=details.chain_before)
        self._deliver(head, b"", lambda now: fate_of_rewind(before, now))
        if self._known.details is None:
            self._rewound = before
            self._refresh()  # Servers differ in what they count.
            if self.version != head.version:
                self._refusal = Diverged(
                    NackCode.INVALID, "it has forgotten a rewind that it acknowledged"
                )
                raise self._refusal

    def _with_record(self, head: Head) -> Metadata:
        """What METADATA will say when ``head`` is stored."""
        known, details = self._known, self._known.details
        if details is not None:
            details = details._replace(
                sequence=details.sequence + 1,
                chain_before=head.chain_before,
                chain=head.chain,
                session=head.session,
                time_ns=head.time_ns,
            )
        step = layout2.CHANGES_STEP[head.kind]
        return Metadata(
            known.protocol,
            head.version,
            head.version - (1 if head.rewindable else 0),
            known.version_count + step,
            details,
        )

    def _refresh(self) -> None:
        try:
            assert self._link is not None
            self._note(self._link.metadata(self._owner))
        except OSError:
            self._reconnect(time.monotonic())

    def _deliver(self, head: Head, payload: bytes, by_count: Callable[[Metadata], Fate]) -> None:
        """Send a record until its ACK came, or METADATA shows that it is stored.

        Args:
            by_count: what became of it by versions and counts, for a server of protocol 1.
        """
        if self._refusal is not None:
            raise self._refusal
        started, before, losses = time.monotonic(), self._known, 0
        try:
            while True:
                try:
                    assert self._link is not None
                    self._link.send_record(head, payload)
                    # While the server is at work.
                    stored, expected = self._with_record(head), self._link.ack_of(head)
                    steps = -(-len(payload) // (SLOWEST_RATE * TIMEOUT_STEP_S))
                    timeout_s = ANSWER_TIMEOUT_S + steps * TIMEOUT_STEP_S
                    self._link.check_ack(self._link.answer(timeout_s), expected)
                    self._note(stored)
                    self._written = True
                    return
                except OSError as error:
                    log.warning(f"Lost the backup server {self._url.target}: {error}")
                    self.reconnects += 1
                    self._reconnect(started)
                now = self._known
                if before.details is not None and now.details is not None:
                    fate = fate_by_content(head, before.details, now.details)
                else:
                    fate = by_count(now)
                if fate is Fate.UNKNOWN:
                    diverged = self._diverged(before, now)
                    self._note(before)  # What this node knows of is what it goes by.
                    raise diverged
                log.info(f"Connected to {self._url.target} again: {fate.value}")
                if fate is Fate.STORED:
                    self._written = True
                    if now.details is not None:
                        # Of a change sent in protocol 1, the server made it up.
                        self._session = now.details.session
                    return
                losses += 1
                self._pause_after(losses, head)
                if before.details is None and now.details is not None:
                    head, before = self._continuing(head, payload, now.details), now
        except BackupError as error:
            self._refusal = error
            raise

    def _pause_after(self, losses: int, head: Head) -> None:
        """Wait before ``head``, which was lost ``losses`` times, is sent again."""
        if head.kind == Kind.OWNER and losses == OWNER_TRIES:
            raise BackupError(
                f"The backup server {self._url.target} takes no owner: each time it closes the"
                " connection.",
                "It may be of an earlier release: update it, then try again.",
            )
        if losses > 1:  # The first loss is as usual; a server that takes no record is not.
            time.sleep(min(FIRST_PAUSE_S * 2 ** min(losses - 2, 10), LONGEST_PAUSE_S))

    def _continuing(self, head: Head, payload: bytes, now: Details) -> Head:
        """``head``, made for a server that spoke protocol 1, as it continues ``now``."""
        chain = now.chain_before
        if head.kind == Kind.CHANGE:
            chain = chain_after(now.chain, head.version, payload)
        return head._replace(session=self._session, chain_before=now.chain, chain=chain)

    def _diverged(self, before: Metadata, now: Metadata) -> Diverged:
        """The server holds something else than what it had and what was sent."""
        code = NackCode.OTHER_HISTORY
        text = (
            f"it acknowledged version {before.version} to this node, and now is at version"
            f" {now.version} with another content"
        )
        if now.details and now.version >= before.version:
            if now.details.session != self._session:
                code = NackCode.TAKEN_OVER
                text = taken_over(now.version, now.details.time_ns)
        elif now.version < before.version:
            text = (
                f"it has lost acknowledged changes: it is at version {now.version}, this node"
                f" at version {before.version}"
            )
        return Diverged(code, text)

    def _reconnect(self, started: float) -> None:
        """A new link, with fresh METADATA; Unreachable after ``retry_for``."""
        pause = FIRST_PAUSE_S
        while True:
            self.close()
            try:
                self._link = Link(self._url)
                self._note(self._link.metadata(self._owner))
                return
            except OSError as error:
                waited = time.monotonic() - started
                if waited + pause > self._url.retry_for:
                    raise Unreachable(self._url.target, error) from error
                log.warning(
                    f"The backup server {self._url.target} cannot be reached ({error}); the"
                    f" node has been waiting for {waited:.1f} s, next try in {pause:.1f} s"
                )
            except BackupError:
                self.close()
                raise
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def close(self) -> None:
        """See Backend."""
        if self._link is not None:
            self._link.close()
            self._link = None


def _send_pieces(link: Link, source: BinaryIO, head: Head) -> None:
    size = os.fstat(source.fileno()).st_size
    while piece := source.read(MAX_CHUNK_SIZE):
        flags = layout2.FINAL if source.tell() == size else 0
        link.send_record(head._replace(flags=flags, length=len(piece)), piece)


def _send_packed(link: Link, source: BinaryIO, snapshot: Snapshot) -> None:
    with compressed(source, os.path.dirname(snapshot.path)) as packed:
        size = packed.seek(0, os.SEEK_END)
        packed.seek(0)
        link.send(protocol.snapshot_header(snapshot.version, size))
        while piece := packed.read(MAX_CHUNK_SIZE):
            link.send(piece)


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


class SocketReading(Reading):
    """A pass over a server's backup (see Reading).

    Args:
        link: a connection that is this reading's alone.
        found: what the server said of itself; the pass must get there.
        target: the server, for error messages.
    """

    def __init__(self, link: Link, found: Metadata, target: HostPort) -> None:
        self._link = link
        self._found = found
        self._target = target
        self._last: Head | None = None

    def __iter__(self) -> Iterator[Change]:
        try:
            self._link.send(protocol.encode(PacketType.RESTORE))
            if self._link.protocol == 2:
                yield from effective(self._records())
            else:
                yield from self._noted(committed(self._changes()))
        except OSError as error:
            self.damage = Unreachable(self._target, error)
        except BackupError as error:
            self.damage = error
        if self.damage is None and self.version < self._found.prev_version:
            self.damage = ProtocolError(
                f"The backup server {self._target} is at version {self._found.version}, but what"
                f" it sent ends at version {self.version}."
            )

    def _noted(self, changes: Iterator[Change]) -> Iterator[Change]:
        for change in changes:
            self.version = change.version
            yield change

    def _changes(self) -> Iterator[Change]:
        """What a server of protocol 1 sends: old ones also what was taken back."""
        inflater = protocol.Inflater(protocol.MAX_SNAPSHOT_SIZE)
        timeout_s: float | None = SNAPSHOT_TIMEOUT_S
        while True:
            # Before its first byte a server compresses all of the snapshot.
            event, timeout_s = self._link.event(timeout_s), None
            if isinstance(event, SnapshotPart):
                if event.first:
                    inflater = protocol.Inflater(protocol.MAX_SNAPSHOT_SIZE)
                    yield Change(event.version, b"", None)
                for piece in inflater.feed(event.data):
                    yield Change(event.version, piece, None)
                if event.last:
                    inflater.finish()
            elif event.type is PacketType.CHANGE:
                yield protocol.decode_change(event.payload)
            elif event.type is PacketType.DONE:
                return
            else:
                raise ProtocolError(f"{event.type.name} may not come in a restore.")

    def _records(self) -> Iterator[tuple[Head, bytes]]:
        """What a server of protocol 2 sends: its log, checked like a file."""
        while True:
            packet = self._link.answer()
            if packet.type is PacketType.RECORD:
                yield self._checked(*self._link.record(packet))
            elif packet.type is PacketType.COMING:
                self.total = protocol.decode_coming(packet.payload)
                self.position = layout2.FIRST_RECORD
            elif packet.type is PacketType.NACK:
                raise Refused(protocol.decode_nack(packet.payload))
            elif packet.type is PacketType.DONE:
                return
            else:
                raise ProtocolError(f"{packet.type.name} may not come in a restore.")

    def _checked(self, head: Head, payload: bytes) -> tuple[Head, bytes]:
        last = self._last or BEFORE_FIRST
        if head.kind != Kind.SNAPSHOT:
            head = layout2.moved(head, last)
        problem = layout2.follows(self._last, head, layout2.log_start_by(head))
        if problem:
            raise ProtocolError(f"Version {head.version} came out of order: {problem}.")
        self._last, self.version, self.last_change_ns = head, head.version, head.time_ns
        self.position += layout2.OVERHEAD + len(payload)
        return head, payload

    def close(self) -> None:
        """See Reading."""
        self._link.close()
