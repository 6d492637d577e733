"""What a hostile client may cost the server's real process, and the node that writes to it."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest

import protocol
import space
from backend import MAX_CHANGE_SIZE, MAX_CHUNK_SIZE, NOBODY, Snapshot, bump, chain_after
from filebackend import FileBackend
from filelog.layout2 import BUMPS, FINAL, Head, Kind
from protocol import Metadata, NackCode, PacketType, RecordPacker
from serving.client import Client, Dropped
from serving.memory import Memory
from serving.places import Place, Places, Writers
from serving.room import STEP, Room
from tests import support
from tests.peers import ACK, NACK, RESTORE, SNAPSHOT, OldClient, ServerProcess
from tests.stopping import eventually

MIB = 1 << 20
OWNER = b"owner".ljust(16, b".")


class NewClient(OldClient):
    """A client of protocol 2 that packs what it is told to.

    Attributes:
        known: what the server said last.
        deflate: the stream of its records.
    """

    def __init__(self, server: ServerProcess, owner: bytes | None = None) -> None:
        super().__init__(server.host, server.port)
        self.deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
        self.owner = owner
        self.known = self.look()

    def __enter__(self) -> NewClient:
        return self

    def look(self) -> Metadata:
        """Ask for METADATA."""
        self.sock.sendall(protocol.encode_request_metadata(self.owner, "evil"))
        kind, payload = self.receive()
        assert kind == PacketType.METADATA
        return protocol.decode_metadata(payload)

    def head(self, payload: bytes, **fields: int | bytes) -> Head:
        """A head of the next change, which fits but for ``fields``."""
        details = self.known.details
        assert details is not None
        version = self.known.version + 1
        head = Head(
            kind=Kind.CHANGE,
            flags=BUMPS,
            version=version,
            session=(self.owner or NOBODY)[:8] + b"session.",
            length=len(payload),
            chain_before=details.chain,
            chain=chain_after(details.chain, version, payload),
        )
        return head._replace(**fields)  # type: ignore[arg-type]

    def write(self, text: str) -> None:
        """A change that must be acknowledged."""
        payload = f"{text}\0{bump(self.known.version + 1)}".encode()
        head = self.head(payload)
        self.sock.sendall(self.packed(head, payload))
        assert self.receive() == (PacketType.ACK, protocol.ACK.pack(head.version, head.chain))
        details = self.known.details
        assert details is not None
        self.known = self.known._replace(
            version=head.version, details=details._replace(chain=head.chain)
        )

    def packed(self, head: Head, payload: bytes) -> bytes:
        """The RECORD packet, of this client's stream."""
        packed = RecordPacker().pack(head, payload)[5:]
        plain = zlib.decompressobj(-15).decompress(packed)
        body = self.deflate.compress(plain) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
        return protocol.encode(PacketType.RECORD, body)


@pytest.fixture
def backup(url: str) -> Path:
    """An empty backup of OWNER's, made for a server; its file."""
    FileBackend(url).create(None, OWNER)
    return Path(url.removeprefix("file://"))


@pytest.fixture
def server(url: str, backup: Path) -> Iterator[ServerProcess]:
    """A server of that backup."""
    with ServerProcess(url) as process:
        yield process


def bomb(head: Head, size: int) -> bytes:
    """A RECORD packet of about a thousandth of ``size``, the zeros that it inflates to."""
    plain = zlib.decompressobj(-15).decompress(RecordPacker().pack(head, b"")[5:])
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(plain) + deflate.flush(zlib.Z_FULL_FLUSH)
    piece = deflate.compress(bytes(MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    again = deflate.compress(bytes(MIB)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return protocol.encode(PacketType.RECORD, body + piece + again * (size // MIB - 1))


def test_chain_is_asked_before_a_bomb_is_inflated(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(NewClient(server, OWNER))
        node.write("SELECT 1")
        evil = stack.enter_context(NewClient(server))
        other = evil.head(b"", length=MAX_CHANGE_SIZE, chain_before=b"x" * 16)
        evil.sock.sendall(bomb(other, 64 * MIB))
        assert evil.is_closed()  # It inflates to less than it says.
        evil = stack.enter_context(NewClient(server))
        payload = b"x" * (3 * MIB)
        for _ in range(2):  # And what came was taken out of the stream.
            evil.sock.sendall(evil.packed(evil.head(payload, chain_before=b"x" * 16), payload))
            kind, answer = evil.receive()
            assert kind == NACK
            assert protocol.decode_nack(answer).code is NackCode.OTHER_OWNER
        node.write("SELECT 2")
    assert server.peak_rss() < 64 * MIB


@pytest.mark.parametrize("kind", [PacketType.CHANGE, PacketType.RECORD])
def test_large_changes_of_all_share_one_budget(url: str, kind: PacketType) -> None:
    FileBackend(url).create(None)  # Nobody's: so protocol 1 writes, too.
    patch = "from serving import memory; memory.BUDGET = 160 << 20"
    with ServerProcess(url, patch=patch) as server, contextlib.ExitStack() as stack:
        evils = [stack.enter_context(NewClient(server)) for _ in range(8)]
        for evil in evils:
            packet = bomb(evil.head(b"", length=40 * MIB), 40 * MIB)
            if kind is PacketType.CHANGE:
                evil.sock.sendall(protocol.encode(PacketType.REQ_METADATA))
                assert evil.receive()[0] == PacketType.METADATA
                body = struct.pack("!I", 1) + zlib.compress(bytes(40 * MIB), 9)
                packet = protocol.encode(kind, body)
            evil.sock.sendall(packet)
        for evil in evils:
            with contextlib.suppress(ConnectionError):
                assert evil.receive()[0] == NACK  # Zeros are no change.
        assert server.peak_rss() < 200 * MIB


def test_announced_packet_keeps_no_memory_from_the_writer(url: str, backup: Path) -> None:
    patch = "from serving import memory; memory.BUDGET = 200 << 20"
    with ServerProcess(url, patch=patch) as server, contextlib.ExitStack() as stack:
        node = stack.enter_context(NewClient(server, OWNER))
        node.write("SELECT 1")
        evil = stack.enter_context(NewClient(server))
        evil.owner = OWNER  # As a reader may find out.
        whole = bomb(evil.head(b"", length=MAX_CHANGE_SIZE), 64 * MIB)
        evil.sock.sendall(struct.pack("!BI", PacketType.RECORD, MAX_CHANGE_SIZE) + whole[5:])
        node.write("SELECT 2")
        node.write("-- " + "x" * (2 * MIB))
        assert evil.is_closed()
        node.write("SELECT 3")


def test_who_claims_the_backup_takes_no_memory_from_its_writer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose change may come over a slow line."""
    monkeypatch.setattr("serving.memory.LOOK_S", 0.01)
    writer, evil = Mock(ended=False), Mock(ended=False)
    memory = Memory(10, cast(Writers, SimpleNamespace(is_writer=lambda client: client is writer)))
    memory.reserve(writer, 9, True)
    evil.ended = True  # So that it does not wait for long.
    with pytest.raises(Dropped):
        memory.reserve(evil, 9, True)
    assert not writer.cut.called
    memory.release(writer)
    memory.reserve(evil, 9, True)
    evil.cut.side_effect = lambda: threading.Thread(target=memory.release, args=(evil,)).start()
    memory.reserve(writer, 9, True)


def test_millions_of_statements_are_not_made_into_as_many_objects(url: str) -> None:
    FileBackend(url).create(None)
    with ServerProcess(url) as server, server.client() as client:
        for end, answer in ((b"\0" + bump(1).encode(), NACK), (bump(1).encode(), ACK)):
            payload = b"--\0" * (3 * MIB) + end
            packet = protocol.encode(
                PacketType.CHANGE, struct.pack("!I", 1) + zlib.compress(payload)
            )
            assert len(packet) < 12_000
            client.sock.sendall(packet)
            assert client.receive()[0] == answer
        assert server.peak_rss() < 96 * MIB


def test_who_claims_the_backup_always_gets_in(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(NewClient(server, OWNER))
        node.write("SELECT 1")
        for _ in range(3):
            for begins in (b"", b"\x04\0\0", protocol.encode(PacketType.REQ_METADATA) + b"\x04"):
                for _ in range(17):
                    evil = stack.enter_context(server.client())
                    evil.sock.sendall(begins)
            for _ in range(5):
                stack.enter_context(NewClient(server, OWNER))
            node.write("SELECT 2")
        with NewClient(server, OWNER) as again:
            again.write("SELECT 3")


def test_who_always_comes_again_drives_out_only_himself() -> None:
    writers: list[object] = []
    places = Places(cast(Writers, SimpleNamespace(is_writer=lambda client: client in writers)))
    cut: list[int] = []

    def come(number: int, who: str) -> Client:
        client = Mock(number=number, who=who, ended=False, cut=lambda: cut.append(number))
        places.enter(client, Place.OWNER)
        return cast(Client, client)

    writers.append(come(1, "node"))
    come(2, "node")  # It comes again, and has not written yet.
    for number in range(3, 9):
        come(number, "evil")
    assert cut == [3, 4, 5, 6]
    places.make_way()
    assert cut[4:] == [7]
    come(9, "a")
    come(10, "b")  # All have one: the oldest goes.
    assert cut[5:] == [2]


QUICK = "from serving import incoming; incoming.FIRST_PACKET_S = incoming.GRACE_S = 0.5"


def test_snapshot_whose_bytes_do_not_come_ends(url: str, backup: Path) -> None:
    patch = f"{QUICK}\nfrom serving import spool; spool.KEPT_FOR_S = 0.1"
    with ServerProcess(url, patch=patch) as server, NewClient(server, OWNER) as evil:
        piece = evil.head(b"x", kind=Kind.SNAPSHOT, flags=0, version=9, chain=b"c" * 16)
        evil.sock.sendall(evil.packed(piece, b"x"))
        assert evil.is_closed()
        server.wait_for("are too slow")
        # It waits for its client to come back, but not for ever.
        eventually(lambda: not list(backup.parent.glob("*.scratch-*")))


def test_one_snapshot_of_strangers_is_looked_at_at_a_time(url: str, backup: Path) -> None:
    """Each look may take a core and a gibibyte, and its client need not wait for it."""
    waits, looks = backup.with_name("waits"), backup.with_name("looks")
    waits.touch()
    patch = (
        "import os, serving.keeper as k, time\n"
        "real, at_work = k.examine, []\n"
        "def examine(path, *more):\n"
        "    at_work.append(path)\n"
        f"    open({str(looks)!r}, 'a').write(f'{{len(at_work)}}\\n')\n"
        f"    while os.path.exists({str(waits)!r}):\n"
        "        time.sleep(0.005)\n"
        "    found = real(path, *more)\n"
        "    at_work.remove(path)\n"
        "    return found\n"
        "k.examine = examine"
    )

    def offer(client: NewClient) -> bytes:
        chain = random.randbytes(16)
        piece = client.head(b"none", kind=Kind.SNAPSHOT, flags=FINAL, session=OWNER, chain=chain)
        client.sock.sendall(client.packed(piece, b"none"))
        return chain

    with ServerProcess(url, patch=patch) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(NewClient(server)) for _ in range(4)]
        asking = clients.pop()
        chains = [offer(client) for client in clients]
        came = [protocol.HELD.pack(protocol.ALL_HELD)] * len(chains)
        eventually(lambda: [asking.ask(PacketType.HELD, chain)[1] for chain in chains] == came)
        eventually(looks.exists)
        node = stack.enter_context(NewClient(server, OWNER))
        offer(node)  # A node that heals waits for none of them.
        eventually(lambda: len(looks.read_text().split()) == 2)
        waits.unlink()
        assert all(client.receive()[0] == NACK for client in [*clients, node])
        assert len(looks.read_text().split()) == 4 and max(looks.read_text()) == "2"


def test_a_server_that_stops_refuses_no_snapshot(url: str, backup: Path) -> None:
    """What fails then is no reason: the client goes on when it is there again."""
    ends = backup.with_name("ends")
    ends.touch()
    patch = (
        "import os, threading, time\n"
        "def wait():\n"
        f"    while os.path.exists({str(ends)!r}):\n"
        "        time.sleep(0.005)\n"
        "threading.Thread(target=wait).start()"  # It does not end before that.
    )
    piece = bytes(MAX_CHUNK_SIZE)
    with ServerProcess(url, patch=patch) as server, NewClient(server) as client:
        head = client.head(piece, kind=Kind.SNAPSHOT, flags=0, session=OWNER, chain=bytes(16))

        def is_there_after_a_piece() -> bool:
            client.sock.sendall(client.packed(head, piece))
            return bool(list(backup.parent.glob("*.scratch-*")))

        eventually(is_there_after_a_piece)
        server.process.terminate()
        server.wait_for("stopped")
        eventually(lambda: not is_there_after_a_piece())
        ends.unlink()
        with pytest.raises(ConnectionError):
            client.receive()


def test_one_client_at_a_time_is_told_the_status(url: str, backup: Path) -> None:
    """The log's end is searched for it, and the writer's thread waits meanwhile."""
    patch = (
        "import filebackend, time\n"
        "real, at_work = filebackend.FileBackend.status, []\n"
        "def status(backend):\n"
        "    at_work.append(1)\n"
        "    time.sleep(0.01)\n"
        "    found = real(backend)\n"
        "    found.notes.append(str(len(at_work)))\n"
        "    at_work.pop()\n"
        "    return found\n"
        "filebackend.FileBackend.status = status"
    )
    with ServerProcess(url, patch=patch) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(NewClient(server)) for _ in range(8)]
        for client in clients:
            client.send(PacketType.STATUS)
        for client in clients:
            kind, answer = client.receive()
            assert kind == PacketType.STATUS_RES
            assert protocol.decode_status(answer).notes[-1] == "1"


def test_no_thread_for_a_timer_keeps_nothing(url: str, backup: Path) -> None:
    patch = (
        "import threading\n"
        "def start(timer):\n"
        '    raise RuntimeError("can\'t start new thread")\n'
        "threading.Timer.start = start"
    )
    with ServerProcess(url, patch=patch) as server:
        for flags in (0, FINAL):
            with NewClient(server, OWNER) as evil:
                piece = evil.head(b"x", kind=Kind.SNAPSHOT, flags=flags, chain=b"c" * 16)
                evil.sock.sendall(evil.packed(piece._replace(session=OWNER), b"x"))
                if flags == FINAL:
                    assert evil.receive()[0] == NACK
                else:
                    eventually(lambda: list(backup.parent.glob("*.scratch-*")))
        server.wait_for("2): left")
        eventually(lambda: not list(backup.parent.glob("*.scratch-*")))
        assert can_write(server)
        assert not server.logged("Traceback")


def fill(url: str, mebibytes: int) -> None:
    """Make the backup at ``url`` so large that no socket's buffers hold it."""
    big = f"INSERT INTO items VALUES (1, '{random.Random(6).randbytes(MIB // 2).hex()}')"
    changes = [support.change(number, big) for number in range(1, mebibytes + 1)]
    FileBackend(url).create(None)
    support.add_session(url, changes)


def test_who_takes_nothing_keeps_no_turn(url: str) -> None:
    fill(url, 12)
    patch = "from serving.places import Place; Place.READER.limit = 4"
    with ServerProcess(url, patch=patch) as server, contextlib.ExitStack() as stack:
        for number in range(4):
            lazy = stack.enter_context(NewClient(server) if number % 2 else server.client())
            lazy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.sock.sendall(protocol.encode(PacketType.RESTORE))
        eventually(lambda: sum("restores the backup" in line for line in server.lines) == 4)
        # There is room for no more of them, until one leaves.
        late = stack.enter_context(server.client())
        late.send(RESTORE)
        server.wait_for("4 clients read the backup")
        lazy.close()
        eventually(lambda: can_restore(server))


def can_restore(server: ServerProcess) -> bool:
    """Whether the server gives its backup to a new connection."""
    with server.client() as client, contextlib.suppress(ConnectionError):
        return len(client.restore(acks=False)) == 12
    return False


def test_reader_that_is_slow_in_all_its_time_ends(url: str) -> None:
    fill(url, 12)
    patch = "from serving import outgoing; outgoing.PAUSE_S, outgoing.MIN_RATE = 1, 1 << 30"
    with ServerProcess(url, patch=patch) as server, server.client() as slow:
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.send(RESTORE)
        while not server.logged("that is too slow"):
            assert slow.sock.recv(1 << 8)
            time.sleep(0.02)


def test_no_thread_and_no_descriptor_end_no_server(url: str, backup: Path) -> None:
    patch = (
        "import resource, threading\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))\n"
        "started, start = [], threading.Thread.start\n"
        "def fails(thread):\n"
        "    if 'run' in repr(thread.name):\n"
        "        started.append(thread)\n"
        "        if len(started) % 3 == 0:\n"
        '            raise RuntimeError("can\'t start new thread")\n'
        "    start(thread)\n"
        "threading.Thread.start = fails"
    )
    with ServerProcess(url, patch=patch) as server, contextlib.ExitStack() as stack:
        node = stack.enter_context(NewClient(server, OWNER))
        node.write("SELECT 1")
        for _ in range(40):
            stack.enter_context(server.client())
        node.write("SELECT 2")
        server.wait_for("can't start new thread")
        server.wait_for("could not be accepted")
        eventually(lambda: can_write(server))
        assert not server.logged("Traceback")


def test_no_memory_for_a_connection_ends_no_server(url: str, backup: Path) -> None:
    patch = (
        "import server\n"
        "real, made = server.Connection, []\n"
        "def connection(*arguments):\n"
        "    made.append(arguments)\n"
        "    if len(made) == 2:\n"
        "        raise MemoryError\n"
        "    return real(*arguments)\n"
        "server.Connection = connection"
    )
    with ServerProcess(url, patch=patch) as server, NewClient(server, OWNER):
        with server.client() as second:
            assert second.is_closed()
        eventually(lambda: can_write(server))
        assert server.logged("closed: out of memory") and not server.logged("Traceback")


def can_write(server: ServerProcess) -> bool:
    """Whether a new connection of the owner can write."""
    with contextlib.suppress(ConnectionError), NewClient(server, OWNER) as client:
        client.write("SELECT 3")
        return True
    return False


def test_nobody_fills_the_log(url: str, backup: Path) -> None:
    patch = "import serving.fewlines as f; f.PERIOD_S = 0.5"
    with ServerProcess(url, patch=patch) as server:
        for number in range(300):
            with server.client() as evil:
                assert evil.rewind(number) == (NACK, 0)
        server.wait_for("more lines like:")
        assert sum("refused the rewind" in line for line in server.lines) < 250


def test_restore_of_protocol_1_makes_no_file(url: str, tmp_path: Path) -> None:
    source = tmp_path / "node.sqlite3"
    support.apply_calls(source, support.first_changes(2))
    FileBackend(url).create(Snapshot(str(source), 2))
    patch = "import tempfile; del tempfile.TemporaryFile, tempfile.NamedTemporaryFile"
    with ServerProcess(url, patch=patch) as server, server.client() as client:
        assert client.restore() == [(SNAPSHOT, 2, source.read_bytes())]


def test_snapshots_of_all_share_what_the_disk_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [space.RESERVE + 10 * STEP]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    room = Room(str(tmp_path / "node.bkp"))
    clients = [cast(Client, object()) for _ in range(10)]
    for client in clients[:5]:
        room.take(client)  # Each needs its step twice.
    with pytest.raises(space.NoRoom):
        room.take(clients[5])
    free[0] -= 2 * STEP  # The first has written what it has.
    with pytest.raises(space.NoRoom):
        room.take(clients[0])
    room.give(clients[1])
    room.take(clients[0])
