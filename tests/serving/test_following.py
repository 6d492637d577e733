"""A server's log is followed over its protocol: cuts, limits, and who must not wait for it."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import protocol
from backend import Change, Snapshot
from errors import BackupError, ConfigError, PlaceGone
from filebackend import FileBackend
from filelog.layout2 import Head, Kind
from protocol import Nack, NackCode, PacketType
from remote import following
from remote.link import Refused, Unreachable
from replica import Pause, Record
from socketbackend import SocketBackend
from tests import support
from tests.cutproxy import DOWN, CutProxy
from tests.peers import OldServer, ServerProcess
from tests.serving.test_limits import NewClient, can_restore, fill
from tests.stopping import eventually
from tests.support import change, first_changes, records_of

Shown = tuple[int, int, int, int, bytes, bytes]


@pytest.fixture
def backup(url: str) -> Path:
    """A backup of five changes."""
    return support.make_backup(url, first_changes(5))


@pytest.fixture
def server(url: str, backup: Path) -> Iterator[ServerProcess]:
    with ServerProcess(url) as process:
        yield process


@pytest.fixture
def writer(server: ServerProcess) -> Iterator[SocketBackend]:
    """The node's connection."""
    with contextlib.closing(SocketBackend(server.url)) as backend:
        backend.open()
        yield backend


def insert(version: int) -> Change:
    statements = change(version, f"INSERT INTO items VALUES ({version}, 'item {version}')")[1]
    return Change(version, None, statements)


def shown(record: Record) -> Shown:
    """What of a record is of the history."""
    head, payload = record
    return head.kind, head.flags, head.version, head.sequence, head.chain, payload


def take(records: Iterator[Record | Pause]) -> Record:
    """The next record."""
    return next(each for each in records if not isinstance(each, Pause))


def to_pause(records: Iterator[Record | Pause]) -> list[Record]:
    """What comes up to the next pause."""
    found = list[Record]()
    for each in records:
        if isinstance(each, Pause):
            return found
        found.append(each)
    raise AssertionError("it does not end")


def test_what_comes(server: ServerProcess, writer: SocketBackend, backup: Path) -> None:
    """Records of every kind, also those behind a compaction, as the file has them."""
    with SocketBackend(server.url).follow(None) as records:
        found = to_pause(records)
        pause = next(records)  # A second later.
        assert pause == Pause(server.url, found[-1][0])
        for version in (6, 7):
            writer.add_change(insert(version))
        found += [take(records), take(records)]
        assert list(map(shown, found)) == list(map(shown, records_of(backup)))
        writer.compact()
        with contextlib.closing(SocketBackend(server.url)) as again:
            again.open()
            again.rewind()
            again.add_change(insert(7))
            again.take_over(b"owner".ljust(16, b"."))
        found = [take(records) for _ in range(3)]
        assert [head.kind for head, _ in found] == [Kind.REWIND, Kind.CHANGE, Kind.OWNER]
        assert list(map(shown, found)) == list(map(shown, records_of(backup)[-3:]))


def test_from_each_record(server: ServerProcess, backup: Path) -> None:
    found = records_of(backup)
    for number, (head, _) in enumerate(found):
        for last in (head, head._replace(offset=head.offset + 9)):
            with SocketBackend(server.url).follow(last) as records:
                assert list(map(shown, to_pause(records))) == list(map(shown, found[number + 1 :]))
    elsewhere = found[-1][0]._replace(chain=bytes(16))
    with SocketBackend(server.url).follow(elsewhere) as records, pytest.raises(PlaceGone):
        next(records)


def test_snapshot(tmp_path: Path, url: str) -> None:
    node = tmp_path / "node.sqlite3"
    support.apply_calls(node, first_changes(5))
    FileBackend(url).create(Snapshot(str(node), 5), changes=[insert(6)])
    path = Path(url.removeprefix("file://"))
    with ServerProcess(url) as server, SocketBackend(server.url).follow(None) as records:
        assert list(map(shown, to_pause(records))) == list(map(shown, records_of(path)))


def test_another_backup_takes_its_place(
    server: ServerProcess, writer: SocketBackend, tmp_path: Path
) -> None:
    node = tmp_path / "node.sqlite3"
    support.apply_calls(node, first_changes(5))
    with SocketBackend(server.url).follow(None) as records:
        assert len(to_pause(records)) == 5
        writer.replace(Snapshot(str(node), 5), override=True)
        with pytest.raises(PlaceGone, match="version 5"):
            take(records)


def test_only_what_is_durable(url: str, backup: Path, tmp_path: Path) -> None:
    """A record that stands in the file, but was not flushed yet, does not come."""
    hold = tmp_path / "hold"
    patch = (
        "import durable, os, time\n"
        "flush = durable.flush\n"
        "def slowly(fd):\n"
        f"    while os.path.exists({str(hold)!r}):\n"
        "        time.sleep(0.01)\n"
        "    flush(fd)\n"
        "durable.flush = slowly\n"
    )
    with ServerProcess(url, patch=patch) as server, contextlib.ExitStack() as stack:
        node = stack.enter_context(contextlib.closing(SocketBackend(server.url)))
        node.open()
        node.add_change(insert(6))
        records = stack.enter_context(SocketBackend(server.url).follow(None))
        assert len(to_pause(records)) == 6
        hold.touch()
        writing = threading.Thread(target=node.add_change, args=(insert(7),))
        writing.start()
        eventually(lambda: len(records_of(backup)) == 7)
        assert to_pause(records) == to_pause(records) == []
        hold.unlink()
        assert take(records)[0].version == 7
        writing.join()


def test_cuts_at_many_bytes(server: ServerProcess, writer: SocketBackend, backup: Path) -> None:
    """It goes on behind the last record that came whole."""
    for version in range(6, 12):
        writer.add_change(insert(version))
    expected = list(map(shown, records_of(backup)))
    with CutProxy((server.host, server.port)) as proxy:
        for size in range(150, 1200, 61):
            found, last = list[Record](), None
            proxy.cut_after(DOWN, size)
            while len(found) < len(expected):
                with (
                    contextlib.suppress(Unreachable),
                    SocketBackend(f"socket:127.0.0.1:{proxy.port}").follow(last) as records,
                ):
                    while len(found) < len(expected):
                        found.append(take(records))
                        last = found[-1][0]
            assert list(map(shown, found)) == expected
            proxy.cut_no_more()
        assert proxy.cuts > 10


def test_server_that_is_killed_and_comes_back(url: str, backup: Path) -> None:
    with ServerProcess(url) as server:
        port = server.port
        with SocketBackend(server.url).follow(None) as records:
            last = to_pause(records)[-1][0]
            server.kill()
            with pytest.raises(Unreachable):
                take(records)
    with ServerProcess(url, port) as server, contextlib.closing(SocketBackend(server.url)) as node:
        node.open()
        node.add_change(insert(6))
        with SocketBackend(server.url).follow(last) as records:
            assert [head.version for head, _ in to_pause(records)] == [6]


def test_dead_line_is_noticed(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SILENT_S", 1.5)
    with (
        CutProxy((server.host, server.port)) as proxy,
        SocketBackend(f"socket:127.0.0.1:{proxy.port}").follow(None) as records,
    ):
        assert len(to_pause(records)) == 5
        proxy.hold()
        with pytest.raises(Unreachable):
            take(records)


def test_server_that_has_nothing_to_say_speaks(url: str, backup: Path) -> None:
    patch = "from serving import following; following.KEEP_S = 1.5"
    with ServerProcess(url, patch=patch) as server, NewClient(server) as client:
        client.sock.sendall(follow_request())
        kinds = [client.receive()[0] for _ in range(8)]
        assert kinds[-2:] == [PacketType.PAUSE, PacketType.PAUSE]


def test_damage(url: str, backup: Path) -> None:
    found = records_of(backup)
    patch = "from filelog import following; following.GROWING_TAIL_S = 0.01"
    with ServerProcess(url, patch=patch) as server:
        support.flip(backup, found[3][0].offset + 130)
        with SocketBackend(server.url).follow(None) as records:
            assert len(to_pause(records)) == 3
            with pytest.raises(Refused, match="damaged at offset"):
                take(records)


def test_server_of_protocol_1() -> None:
    old = OldServer()
    with (
        pytest.raises(ConfigError, match="protocol 1"),
        SocketBackend(old.url).follow(None),
    ):
        pass
    old.kill()


def follow_request(last: Head | None = None) -> bytes:
    return protocol.encode_follow(last)


def test_followers_take_no_turn_and_make_way(server: ServerProcess, writer: SocketBackend) -> None:
    """Five of them are one too many; readers and the writer go on."""
    with contextlib.ExitStack() as stack:
        for number in range(1, 6):
            client = stack.enter_context(NewClient(server))
            client.sock.sendall(follow_request())
            kinds = [client.receive()[0] for _ in range(7)]
            assert kinds == [PacketType.FOLLOWING, *[PacketType.RECORD] * 5, PacketType.PAUSE]
            assert number == 5 or not server.logged("it is the oldest")
        server.wait_for("closed: it is the oldest of 4 that follow")
        with server.client() as reader:
            assert len(reader.restore(acks=False)) == 5
        writer.add_change(insert(6))
        assert client.receive()[0] == PacketType.RECORD
    eventually(lambda: sum("connection lost" in line for line in server.lines) >= 4)


def test_follower_that_takes_nothing(url: str) -> None:
    """It keeps neither a turn nor memory, and the writer does not wait."""
    fill(url, 12)
    with ServerProcess(url) as server, contextlib.ExitStack() as stack:
        node = stack.enter_context(contextlib.closing(SocketBackend(server.url)))
        node.open()
        for _ in range(4):
            lazy = stack.enter_context(NewClient(server))
            lazy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.sock.sendall(follow_request())
        eventually(lambda: sum("follows the backup" in line for line in server.lines) == 4)
        assert can_restore(server)
        before = server.peak_rss()
        for version in range(13, 40):
            text = os.urandom(100_000).hex()
            statements = change(version, f"INSERT INTO items VALUES ({version}, '{text}')")[1]
            node.add_change(Change(version, None, statements))
        assert server.peak_rss() - before < 12 << 20


@pytest.mark.parametrize("payload", [b"x", bytes(123), bytes(124), b"\xff" * 124, bytes(125)])
def test_hostile_requests(server: ServerProcess, payload: bytes) -> None:
    with NewClient(server) as client:
        client.send(PacketType.FOLLOW, payload)
        if len(payload) == 124:
            kind, found = client.receive()
            assert kind == PacketType.NACK
            assert protocol.decode_nack(found).code is NackCode.NO_SUCH_PLACE
            client.look()  # Still served.
        else:
            assert client.is_closed()
    assert not server.logged("Traceback")


def test_who_follows_may_send_nothing_else(server: ServerProcess) -> None:
    for kind in (PacketType.RESTORE, PacketType.FOLLOW):
        with NewClient(server) as client:
            client.sock.sendall(follow_request())
            while client.receive()[0] != PacketType.PAUSE:
                pass
            client.send(PacketType.ACK)
            client.send(kind)
            assert client.is_closed()
    with server.client() as client_1:
        client_1.send(PacketType.FOLLOW)
        assert client_1.is_closed()
    server.wait_for("FOLLOW may not come now")


def test_address_for_reading_only(url: str, backup: Path, tmp_path: Path) -> None:
    place = f"unix:{tmp_path}/read.sock"
    with (
        ServerProcess(url, options=("--read-only", place)),
        SocketBackend(f"socket:{place}").follow(None) as records,
    ):
        assert len(to_pause(records)) == 5


class FakeServer(threading.Thread):
    """Answers FOLLOW with what it was given."""

    def __init__(self, metadata: bytes, answer: bytes) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._answers = metadata, answer
        self.url = f"socket:127.0.0.1:{self._listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        sock, _ = self._listener.accept()
        with sock, self._listener:
            for answer in self._answers:
                _, length = struct.unpack("!BI", sock.recv(5, socket.MSG_WAITALL))
                sock.recv(length, socket.MSG_WAITALL)
                sock.sendall(answer)
            sock.recv(1)


def test_server_that_breaks_the_rules(server: ServerProcess, backup: Path) -> None:
    """It may not lead to another history, nor end, nor send what nobody asked for."""
    with NewClient(server) as client:
        metadata = protocol.encode_metadata(client.known)
    last = records_of(backup)[2][0]
    coming = protocol.Coming(1000, 0, last.backup_id)
    packer = protocol.RecordPacker()
    after, skipped = records_of(backup)[3:5]
    begins = protocol.encode_following(coming, last)
    for answer in (
        protocol.encode_following(coming, None),
        protocol.encode_following(coming, last._replace(chain=bytes(16))),
        protocol.encode(PacketType.FOLLOWING, b"short"),
        protocol.encode(PacketType.PAUSE),
        protocol.encode(PacketType.DONE),
        begins + protocol.encode(PacketType.DONE),
        begins + begins,
        begins + packer.pack(*skipped),
        begins + protocol.RecordPacker().pack(*after)[:-3] + b"abc",
        protocol.encode_nack(Nack(3, NackCode.OTHER, "no")),
    ):
        with (
            SocketBackend(FakeServer(metadata, answer).url).follow(last) as records,
            pytest.raises(BackupError) as found,
        ):
            take(records)
        assert not isinstance(found.value, Unreachable)
