"""The other end of protocol 1: our server's process, an old client, an old server.

``OldClient`` and ``OldServer`` share no code with the product: they are written from the
description of the protocol, with the quirks of the programs that exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests import support

END_S = 10.0
"""What a server that is not under test any more has to end by itself."""
CHANGE, SNAPSHOT, REWIND, REQ_METADATA, RESTORE, ACK, NACK, METADATA, DONE = range(1, 10)
COMPACT, COMPACT_RES = 10, 11


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as sock:
        return int(sock.getsockname()[1])


def measuring() -> str:
    """Python code that measures the coverage of a process, if that of this one is measured."""
    if not os.environ.get("MEASURE_COVERAGE"):
        return ""
    return (
        "import coverage\n"
        f"measured = coverage.Coverage({str(support.ROOT / '.coverage')!r}, data_suffix=True,"
        f" config_file={str(support.ROOT / 'pyproject.toml')!r}, source=[{str(support.ROOT)!r}],"
        f" omit={[str(support.ROOT / name) for name in ('tests/*', 'bench/*', 'demo.py')]})\n"
        "import atexit\n"
        "atexit.register(measured.save)\n"
        "measured.start()\n"
    )


def patched(program: Path, patch: str) -> list[str]:
    """Arguments that run ``program`` after the Python code ``patch``."""
    code = (
        f"{measuring()}import runpy, sys\n"
        f"sys.path.insert(0, {str(support.ROOT)!r})\n"
        f"sys.argv = [{str(program)!r}, *sys.argv[1:]]\n"
        f"{patch}\n"
        f"runpy.run_path({str(program)!r}, run_name='__main__')\n"
    )
    return [sys.executable, "-c", code]


class ServerProcess:
    """``backup-cli server`` in a process of its own.

    Args:
        url: the backup's.
        port: where to listen; None for a free one.
        host: the address to listen on.
        options: more of its options.
        patch: Python code that its process executes first.
        address: in place of host and port.
    """

    def __init__(
        self,
        url: str,
        port: int | None = None,
        host: str = "127.0.0.1",
        options: Sequence[str] = (),
        patch: str = "",
        address: str = "",
    ) -> None:
        self.host, self.port = host, port or free_port(host)
        tcp = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.address = address or tcp
        self.url = f"socket:{self.address}"
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        options = ("--log-level", "debug", *options)
        self.process = subprocess.Popen(
            [*patched(support.CLI, patch), "server", *options, url, self.address],
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def logged(self, text: str) -> bool:
        """Whether a line with ``text`` was logged so far."""
        return any(text in line for line in list(self.lines))

    def wait_for(self, text: str) -> None:
        """Wait until a line with ``text`` is logged."""
        with self._changed:
            found = self._changed.wait_for(
                lambda: self.logged(text) or self._ended, support.ANSWER_S
            )
        assert found and self.logged(text), "\n".join(self.lines)

    def ready(self) -> ServerProcess:
        """Wait until it serves."""
        self.wait_for("serving ")
        return self

    def wait(self) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(support.ANSWER_S)
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended, support.ANSWER_S)
        return code

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.wait()

    def peak_rss(self) -> int:
        """The most memory it had, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) << 10

    def client(self) -> OldClient:
        """A connection to it."""
        return OldClient(self.host, self.port)

    def __enter__(self) -> ServerProcess:
        return self.ready()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.kill()


class Meta(NamedTuple):
    """A METADATA packet's content."""

    protocol: int
    version: int
    prev: int
    entries: int


def pack_change(version: int, statements: Sequence[str]) -> bytes:
    """The payload of a CHANGE packet."""
    return struct.pack("!I", version) + zlib.compress("\0".join(statements).encode())


class OldClient:
    """A minimal client of protocol 1: two sends a packet, no checks of its own."""

    def __init__(self, host: str, port: int, nodelay: bool = True) -> None:
        self.sock = socket.create_connection((host, port), timeout=support.ANSWER_S)
        # The real ones leave it off; without it every packet costs 40 ms.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)

    def send(self, kind: int, payload: bytes = b"") -> None:
        """One packet, in two sends."""
        self.sock.sendall(struct.pack("!BI", kind, len(payload)))
        if payload:
            self.sock.sendall(payload)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise ConnectionError("closed")
            data += piece
        return data

    def receive(self) -> tuple[int, bytes]:
        """Type and payload of the next packet; ConnectionError at the end."""
        kind, length = struct.unpack("!BI", self._read(5))
        return kind, self._read(length)

    def ask(self, kind: int, payload: bytes = b"") -> tuple[int, bytes]:
        """Send a packet and receive one."""
        self.send(kind, payload)
        return self.receive()

    def _version(self, kind: int, payload: bytes = b"") -> tuple[int, int]:
        answer, data = self.ask(kind, payload)
        return answer, struct.unpack("!I", data)[0]

    def change(self, version: int, statements: Sequence[str]) -> tuple[int, int]:
        """Send a CHANGE; type and version of the answer."""
        return self._version(CHANGE, pack_change(version, statements))

    def rewind(self, version: int) -> tuple[int, int]:
        """Send a REWIND; type and version of the answer."""
        return self._version(REWIND, struct.pack("!I", version))

    def snapshot(self, version: int, data: bytes) -> tuple[int, int]:
        """Send a SNAPSHOT; type and version of the answer."""
        return self._version(SNAPSHOT, struct.pack("!I", version) + zlib.compress(data))

    def metadata(self) -> Meta:
        """Ask for METADATA."""
        kind, payload = self.ask(REQ_METADATA)
        assert kind == METADATA and len(payload) == 20
        return Meta(*struct.unpack("!IIIQ", payload))

    def restore(self, acks: bool = True) -> list[tuple[int, int, bytes]]:
        """Type, version and inflated content of every packet of a RESTORE."""
        self.send(RESTORE)
        found: list[tuple[int, int, bytes]] = []
        while True:
            kind, payload = self.receive()
            if kind == DONE:
                return found
            (version,) = struct.unpack("!I", payload[:4])
            found.append((kind, version, zlib.decompress(payload[4:])))
            if acks:
                self.send(ACK, payload[:4])

    def is_closed(self) -> bool:
        """Wait for the server to close; False if it sends something in its place."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        """Leave."""
        self.sock.close()

    def __enter__(self) -> OldClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OldServer:
    """A minimal server of protocol 1, with the quirks of the existing one.

    One connection at a time; the payload of REQ_METADATA is ignored; any CHANGE is taken; a
    NACK has no payload; a type it does not know ends the connection; a REWIND is in memory
    only, leaves the abandoned change in the file, and is forgotten by ``kill``.

    Attributes:
        entries: type, version and inflated content of what it stored, in order.
        requests: type and payload of every packet that came.
        counts_rewinds: whether a REWIND lowers version_count.
        die_before: a type; it is killed when such a packet has come, before it is stored.
        die_after: a type; it is killed when such a packet is stored, before the answer.
            Either way it starts again at once.
        mute: whether it takes requests and answers none.
        swallow: a type; it neither stores nor answers such a packet.
        hang_up_before: a type; it closes the connection when such a packet has come.
        hang_up_after: a type; it closes the connection behind the answer to it.
        script: answers to give in place of its own, by type of the request.
    """

    def __init__(self, counts_rewinds: bool = False) -> None:
        self.entries: list[tuple[int, int, bytes]] = []
        self.requests: list[tuple[int, bytes]] = []
        self.counts_rewinds = counts_rewinds
        self.version = self.prev = self.count = 0
        self.die_before: int | None = None
        self.die_after: int | None = None
        self.mute = False
        self.swallow: int | None = None
        self.hang_up_before: int | None = None
        self.hang_up_after: int | None = None
        self.script: dict[int, list[tuple[int, bytes]]] = {}
        self.port = free_port()
        self.url = f"socket:127.0.0.1:{self.port}"
        self._on_disk = (0, 0, 0)
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self.start()

    def start(self) -> None:
        """Listen, with what is on disk."""
        self.version, self.prev, self.count = self._on_disk
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def kill(self) -> None:
        """Close everything; what was not written to disk is gone."""
        for sock in (self._listener, self._client):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._listener = self._client = None

    def restart(self) -> None:
        """What a SIGKILL and a new start make of it."""
        self.kill()
        self.start()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while self._listener is listener:
                self._client, _ = listener.accept()
                with contextlib.suppress(OSError), self._client as sock:
                    while self._one(_Peer(sock)):
                        pass

    def _one(self, peer: OldClient) -> bool:
        """Serve one request; False to close the connection."""
        kind, payload = peer.receive()
        self.requests.append((kind, payload))
        if kind == self.die_before:
            self.die_before = None
            self.restart()
            return False
        if kind == self.swallow:
            return True
        answer = None if kind == self.hang_up_before else self._answer(kind, payload)
        if answer is None:
            return False
        if kind == self.die_after:
            self.die_after = None
            self.restart()
            return False
        if not self.mute:
            for packet in self.script.get(kind, answer):
                peer.send(*packet)
        return kind != self.hang_up_after

    def _answer(self, kind: int, payload: bytes) -> list[tuple[int, bytes]] | None:
        if kind in (CHANGE, SNAPSHOT):
            self._store(kind, payload)
            return [(ACK, payload[:4])]
        if kind == REWIND:
            if struct.unpack("!I", payload)[0] != self.prev or self.version == self.prev:
                return [(NACK, b"")]
            self.version = self.prev
            self.count -= self.counts_rewinds
            return [(ACK, payload)]
        if kind == REQ_METADATA:
            return [(METADATA, struct.pack("!IIIQ", 1, self.version, self.prev, self.count))]
        if kind == RESTORE:
            stored = [(k, struct.pack("!I", v) + zlib.compress(d)) for k, v, d in self.entries]
            return [*stored, (DONE, b"")]
        return [] if kind == ACK else None

    def _store(self, kind: int, payload: bytes) -> None:
        (version,) = struct.unpack("!I", payload[:4])
        if kind == SNAPSHOT:
            self.entries, self.version, self.count = [], version, 0
        self.entries.append((kind, version, zlib.decompress(payload[4:])))
        self.prev, self.version, self.count = self.version, version, self.count + 1
        self._on_disk = self.version, self.prev, self.count

    def __enter__(self) -> OldServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class _Peer(OldClient):
    """The server's end of a connection: the same two sends a packet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(support.ANSWER_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def digest(path: Path) -> str:
    """A hash of the file ``path``."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
