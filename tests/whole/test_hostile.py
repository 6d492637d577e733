"""The server's real process under packets that hostile clients send, beside a node that writes."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import protocol
from backend import chain_after
from filebackend import FileBackend
from filelog.layout2 import Head, Kind
from protocol import PacketType
from tests import support
from tests.peers import ServerProcess
from tests.serving.test_limits import OWNER, NewClient
from tests.test_protocol import PACKETS, mutate

pytestmark = pytest.mark.usefixtures("unmeasured")

MIB = 1 << 20
CLIENTS = 6
PACKETS_EACH = 40
"""That one connection sends, if it lives for so long."""
GROWTH = 24 * MIB
"""Of the server's memory in the second half: malloc takes its time to find its size."""
LATE_S = 1.0
"""A change that takes so long was held up."""


def count(process: int, what: str) -> int:
    """Threads ("task") or descriptors ("fd") of ``process``."""
    return len(os.listdir(f"/proc/{process}/{what}"))


def rss(process: int) -> int:
    """Bytes of memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


class Hostile(threading.Thread):
    """Sends packets of all kinds, sound and broken ones, until it has sent its share.

    Attributes:
        sent: packets so far.
    """

    def __init__(self, server: ServerProcess, seed: int, share: int) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self._server = server
        self._chance = random.Random(seed)
        self._share = share
        self._kinds: list[Callable[[NewClient], bytes]] = [
            self._noise,
            self._mutated,
            self._framed,
            self._record,
            self._bomb,
            self._restore,
            self._follow,
        ]

    def run(self) -> None:
        while self.sent < self._share:
            with contextlib.suppress(OSError, AssertionError, struct.error, zlib.error):
                self._one_connection()

    def _one_connection(self) -> None:
        owner = OWNER if self._chance.random() < 0.3 else None
        with NewClient(self._server, owner) as client:
            for _ in range(PACKETS_EACH):
                weights = (1, 4, 4, 8, 0.05, 0.2, 0.2)
                (kind,) = self._chance.choices(self._kinds, weights)
                self.sent += 1
                client.sock.sendall(kind(client))
                client.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while client.sock.recv(1 << 16):
                        pass
                client.sock.settimeout(support.ANSWER_S)
            if self._chance.random() < 0.5:
                client.sock.shutdown(socket.SHUT_WR)
                while client.sock.recv(1 << 16):
                    pass

    def _noise(self, client: NewClient) -> bytes:
        return self._chance.randbytes(self._chance.randrange(80))

    def _mutated(self, client: NewClient) -> bytes:
        edits = [
            (self._chance.randrange(400), self._chance.randrange(256), self._chance.randrange(4))
            for _ in range(self._chance.randrange(3))
        ]
        return self._harmless(mutate(self._chance.choice(PACKETS), edits))

    def _framed(self, client: NewClient) -> bytes:
        kind = self._chance.choice(list(PacketType))
        return self._harmless(
            protocol.encode(kind, self._chance.randbytes(self._chance.choice((0, 4, 200))))
        )

    @staticmethod
    def _harmless(packet: bytes) -> bytes:
        """``packet``, but for compactions: those are as slow as the backup is large."""
        return b"" if packet[:1] == bytes([PacketType.COMPACT]) else packet

    def _record(self, client: NewClient) -> bytes:
        """A sound record of this connection, with one thing wrong; the owner's chain never fits."""
        payload = self._chance.randbytes(self._chance.choice((0, 10, 1000)))
        kind = self._chance.choice(list(Kind))
        head = client.head(payload, kind=kind, flags=self._chance.randrange(4))
        before = self._chance.randbytes(16)
        chain = chain_after(before, head.version, payload)
        head = head._replace(chain_before=before, chain=chain)
        if kind is Kind.SNAPSHOT:
            head = head._replace(version=self._chance.choice((0, head.version)))
        return client.packed(head, payload)

    def _bomb(self, client: NewClient) -> bytes:
        size = self._chance.choice((2, 20)) * MIB
        head: Head = client.head(b"", length=size, chain_before=b"x" * 16)
        if self._chance.random() < 0.5:
            return client.packed(head, bytes(size))
        return protocol.encode(PacketType.CHANGE, bytes(4) + zlib.compress(bytes(size)))

    def _restore(self, client: NewClient) -> bytes:
        return protocol.encode(PacketType.RESTORE)

    def _follow(self, client: NewClient) -> bytes:
        wild = self._chance.randrange(1 << 64), self._chance.randrange(1 << 64)
        head = client.head(b"", sequence=wild[0], offset=wild[1], session=bytes(16))
        last = head._replace(backup_id=self._chance.randbytes(16), kind=self._chance.randrange(9))
        return protocol.encode_follow(self._chance.choice((None, last)))


NOT_KEPT = "from serving import spool; spool.KEPT_FOR_S = 0.1"
"""What came of a snapshot waits for its client to come back, with a thread and a file."""


def torment(url: str, packets: int) -> list[float]:
    """Send so many packets to a server while a node writes; its memory stays as it is.

    Returns:
        Seconds of each of the node's changes.
    """
    seed = random.randrange(1 << 32)
    print(f"\nseed {seed}")
    FileBackend(url).create(None, OWNER)
    with (
        ServerProcess(url, options=("--log-level", "info"), patch=NOT_KEPT) as server,
        NewClient(server, OWNER) as node,
    ):
        pid = server.process.pid
        node.write("SELECT 1")
        quiet = count(pid, "task"), count(pid, "fd")
        hostile = [Hostile(server, seed + n, packets // CLIENTS) for n in range(CLIENTS)]
        for one in hostile:
            one.start()
        waits, sizes = [], []
        while any(one.is_alive() for one in hostile):
            began = time.monotonic()
            node.write("SELECT 2")
            waits.append(time.monotonic() - began)
            sizes.append(rss(pid))
            time.sleep(0.01)
        half = len(sizes) // 2
        print(
            f"{sum(one.sent for one in hostile)} packets, {len(waits)} changes, the slowest in"
            f" {max(waits):.3f} s; {sizes[half] >> 20} to {sizes[-1] >> 20} MiB"
        )
        deadline = time.monotonic() + support.ANSWER_S
        while (count(pid, "task"), count(pid, "fd")) > quiet:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert max(sizes[half:]) < max(sizes[:half]) + GROWTH
        assert server.peak_rss() < 300 * MIB
        assert not server.logged("Traceback")
        assert not server.logged("CRITICAL")
        assert node.look().version == node.known.version
        return waits


def test_some_thousand_hostile_packets(url: str) -> None:
    torment(url, 6000)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_million_hostile_packets(url: str) -> None:
    waits = torment(url, 1_000_000)
    assert sum(wait > LATE_S for wait in waits) <= len(waits) // 100
