"""Our client and our server over protocol 2: who may write, and what became of a change.

The first half runs both in this process and cuts the connection at every byte; the second
runs the real plugin against the server's real process.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import compaction
import protocol
import restore
import server
import socketbackend
from backend import FOREIGN_KEYS_OFF, Change, Session, Snapshot
from database import compare
from filebackend import FileBackend
from protocol import NackCode
from socketbackend import Diverged, Refused, SocketBackend
from tests import peers, support
from tests.peers import OldClient
from tests.support import Call, change
from tests.test_model import FAST, CutSocket, compact_in_process

OFF: Call = (0, [FOREIGN_KEYS_OFF])
ON: Call = (0, ["PRAGMA foreign_keys = ON;"])
NO_CUT = 1 << 40
AT_ANSWER = -1
"""Cut when the server answers, whatever was sent."""


class ByteCut(CutSocket):
    """Passes so many bytes of both directions together, then cuts; then the next number."""

    def sendall(self, data: bytes) -> None:
        if self._budget[0] == AT_ANSWER:
            return self._sock.sendall(data)
        super().sendall(data)

    def send(self, data: bytes) -> int:
        self.sendall(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        if self._budget[0] == AT_ANSWER:
            self._sock.recv(1)
        if self._budget[0] in (0, AT_ANSWER):
            self._cut()
        data = self._sock.recv(min(size, self._budget[0]))
        self._spend(len(data))
        return data

    def _cut(self) -> None:
        del self._budget[0]
        self._sock.close()
        raise ConnectionResetError("injected")


class Local:
    """A server in a thread of this process, and a network that is cut by plan.

    Attributes:
        plan: bytes until each cut to come; the last entry is for ever.
        protocols: what the server speaks on each new connection, in turn.
        on_connect: called before each new connection.
    """

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.file_url = f"file://{directory}/node.bkp"
        self.plan = [NO_CUT]
        self.protocols = [2]
        self.connections = 0
        self.on_connect: Callable[[], None] = lambda: None
        self.fates: list[socketbackend.Fate] = []
        self._patch(patch)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        FileBackend(self.file_url).create(None)
        self.start()

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(signal, "signal", lambda *_: None)  # The server runs in a thread here.
        patch.setattr(socketbackend, "FIRST_PAUSE_S", 0.001)
        real_connect, real_agreed = socketbackend.connect, protocol.agreed_protocol

        def connect(url: socketbackend.SocketUrl) -> ByteCut:
            self.on_connect()
            self.connections += 1
            return ByteCut(real_connect(url), self.plan)

        def agreed(payload: bytes) -> int:
            now = self.protocols[(self.connections - 1) % len(self.protocols)]
            return min(now, real_agreed(payload))

        patch.setattr(socketbackend, "connect", connect)
        patch.setattr(protocol, "agreed_protocol", agreed)
        patch.setattr(
            compaction.Compactor,
            "_build_and_adopt",
            lambda compactor, _: compact_in_process(compactor._backend, compactor._lock),
        )
        for name in ("fate_by_content", "fate_of_change", "fate_of_rewind"):
            patch.setattr(socketbackend, name, self._noting(getattr(socketbackend, name)))

    def _noting(self, judge: Callable[..., socketbackend.Fate]) -> Callable[..., object]:
        def noting(*arguments: object) -> socketbackend.Fate:
            self.fates.append(judge(*arguments))
            return self.fates[-1]

        return noting

    def start(self) -> None:
        backend = FileBackend(self.file_url)
        backend.open()
        self.server = server.Server(backend, f"127.0.0.1:{self.port}", None)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def stop(self) -> None:
        self.server._stop(0)
        self._thread.join()
        for connection in list(self.server._connections):
            connection.cut()
        self.server.keeper.lock.release()

    def backend(self) -> SocketBackend:
        return SocketBackend(f"socket:127.0.0.1:{self.port}?retry_for=20")

    def compact(self) -> None:
        backend = self.server.keeper.backend
        compact_in_process(backend, self.server.keeper.lock)

    def restored(self, directory: Path) -> Path:
        """The database that a restore over the network gives."""
        path = directory / "restored.sqlite3"
        reading = self.backend().read()
        restore.restore(reading, str(path), False, lambda: None)
        reading.close()
        return path

    def stored(self) -> list[Call]:
        """What a restore would apply, apart from the snapshot."""
        reading = FileBackend(self.file_url).read()
        found = [(c.version, list(c.transaction)) for c in reading if c.transaction]
        reading.close()
        assert reading.damage is None and not reading.torn_tail
        return found


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    with tempfile.TemporaryDirectory(dir=FAST) as directory:
        running = Local(Path(directory), monkeypatch)
        yield running
        running.stop()
        assert set(os.listdir(directory)) <= {"node.bkp", "node.bkp.writer"}


def at(version: int, call: Call) -> Call:
    """``call`` of a PRAGMA, at ``version``."""
    return version, call[1]


def write(session: Session, *calls: Call) -> None:
    for version, statements in calls:
        session.write(Change(version, None, statements))


class Lives:
    """A node that lives again and again, and what its backup must hold."""

    def __init__(self, local: Local) -> None:
        self.local = local
        self.expected = support.first_changes(1)
        self.version = 1
        self.tokens = itertools.count(1)
        backend = local.backend()
        backend.open()
        write(Session(backend, "DIR"), *self.expected)
        backend.close()

    def next_commit(self) -> Call:
        body = f"token {next(self.tokens):06}"
        return change(self.version + 1, f"INSERT INTO items(body) VALUES ('{body}')")

    def live(self, kind: str) -> None:
        """One session: ``kind`` is what it does; what comes before is not cut."""
        plan, self.local.plan[:] = list(self.local.plan), [NO_CUT]
        backend = self.local.backend()
        if kind == "a rewind":
            backend.open()
            write(Session(backend, "DIR"), self.next_commit())
            backend.close()
            backend = self.local.backend()
        self.local.plan[:] = plan
        backend.open()
        session = Session(backend, "DIR")
        if kind == "a migration":
            self.announce(session, at(self.version, OFF))
        self.announce(session, self.next_commit())
        if kind == "a migration":
            self.announce(session, at(self.version, ON))
        assert backend.version == self.version
        backend.close()

    def announce(self, session: Session, call: Call) -> None:
        write(session, call)
        self.expected.append(call)
        self.version = call[0]

    def check(self) -> None:
        self.local.plan[:] = [NO_CUT]
        assert self.local.stored() == self.expected
        status = self.local.backend().status()
        assert status.version == self.version


def cut_everywhere(local: Local, kind: str, step: int = 1) -> int:
    """Live until a cut after so many bytes is no cut any more; that number."""
    lives = Lives(local)
    for size in itertools.count(0, step):
        local.plan[:] = [size, NO_CUT]
        lives.live(kind)
        if len(local.plan) > 1:
            lives.check()
            return size
    raise AssertionError


KINDS = ("a change", "a rewind", "a migration")


@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_every_byte(kind: str, local: Local) -> None:
    """From the first byte of the METADATA exchange to the last of the last ACK."""
    count = cut_everywhere(local, kind)
    assert count > 300
    assert set(local.fates) == {socketbackend.Fate.STORED, socketbackend.Fate.LOST}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_compacted_before_the_reconnect(kind: str, local: Local, tmp_path: Path) -> None:
    """The record in question may stand in a snapshot then: the chain still names it."""
    lives = Lives(local)
    local.on_connect = local.compact
    for size in range(100, 700, 23):
        local.plan[:] = [size, NO_CUT]
        lives.live(kind)
    assert {socketbackend.Fate.STORED, socketbackend.Fate.LOST} == set(local.fates)
    local.plan[:] = [NO_CUT]
    expected = tmp_path / "expected.sqlite3"
    support.apply_calls(expected, lives.expected)
    assert compare(str(expected), str(local.restored(tmp_path))) == []


@pytest.mark.parametrize("protocols", [[1, 2], [2, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_server_of_another_protocol_after_the_cut(
    kind: str, protocols: list[int], local: Local
) -> None:
    """A server is replaced by an older or a newer one while the plugin waits for it."""
    lives = Lives(local)
    for size in itertools.count(0, 5):
        # The connection that is cut is the last of those to come.
        local.protocols = protocols if kind != "a rewind" else [protocols[1], *protocols]
        local.connections = 0
        local.plan[:] = [size, NO_CUT]
        lives.live(kind)
        if len(local.plan) > 1:
            break
    local.protocols = [2]
    lives.check()
    assert set(local.fates) == {socketbackend.Fate.STORED, socketbackend.Fate.LOST}


def test_protocols_change_back_and_forth_in_one_session(local: Local) -> None:
    lives, backend = Lives(local), local.backend()
    local.protocols = [2, 1, 1, 2, 2, 1]
    backend.open()
    session = Session(backend, "DIR")
    for number in range(24):
        pragma = (OFF, None, ON)[number % 3]
        lives.announce(session, at(lives.version, pragma) if pragma else lives.next_commit())
        for connection in list(local.server._connections):
            connection.cut()
    assert backend.reconnects == 23
    backend.close()
    local.protocols = [2]
    assert socketbackend.Fate.UNKNOWN not in local.fates
    lives.check()


@pytest.mark.parametrize("seed", range(6))
def test_cut_again_and_again(seed: int, local: Local) -> None:
    chance, lives = random.Random(seed), Lives(local)
    for _ in range(40):
        # Protocol 1 cannot tell what became of a change right after a rewind.
        kind = chance.choice(KINDS)
        local.protocols = chance.choice([[2], [1] + [2] * 9, [2] + [1] * 9])
        if kind == "a rewind":
            local.protocols = [2]
        local.connections = 0
        local.plan[:] = [chance.randrange(400) for _ in range(chance.randrange(6))] + [NO_CUT]
        lives.live(kind)
        if chance.random() < 0.2:
            local.stop()
            local.start()
    lives.check()


# Two nodes with one ancestor


def begin(local: Local) -> tuple[SocketBackend, Session]:
    """A node's connection and its session."""
    backend = local.backend()
    backend.open()
    return backend, Session(backend, "DIR")


def item(version: int, body: str) -> Call:
    return change(version, f"INSERT INTO items VALUES ({version}, '{body}')")


TAKEN = r"another node took over at version {}, \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


def check_taken_over(session: Session, call: Call, version: int) -> None:
    """``call`` is refused, by name and for good."""
    for _ in range(2):
        with pytest.raises((Refused, Diverged), match=TAKEN.format(version)) as caught:
            write(session, call)
        assert isinstance(caught.value, (Refused, Diverged))
        assert caught.value.code is NackCode.TAKEN_OVER
        assert "Two nodes write to this backup" in caught.value.next_step


@pytest.mark.parametrize("between", ["nothing", "a cut", "a new server"])
def test_first_of_two_nodes_to_write_wins(between: str, local: Local) -> None:
    calls = support.first_changes(3)
    original, first = begin(local)
    write(first, *calls)
    copy, second = begin(local)
    write(second, item(4, "of the copy"))
    if between == "a cut":
        for connection in list(local.server._connections):
            connection.cut()
    elif between == "a new server":
        local.stop()
        local.start()
    check_taken_over(first, item(4, "of the original"), 4)
    write(second, item(5, "of the copy"))
    # A reconnect does not help it, and neither does the copy's end.
    original.close()
    copy.close()
    check_taken_over(first, item(4, "of the original"), 4)
    assert local.stored() == [*calls, item(4, "of the copy"), item(5, "of the copy")]
    third = begin(local)[1]
    write(third, item(6, "of the copy, restarted"))


@pytest.mark.parametrize("between", ["nothing", "a new server"])
def test_session_of_before_is_refused_though_its_chain_fits_again(
    between: str, local: Local
) -> None:
    """What the copy wrote was taken back by the copy's next start: there is no way back."""
    calls = support.first_changes(3)
    _, first = begin(local)
    write(first, *calls)
    copy, second = begin(local)
    write(second, item(4, "abandoned"))
    copy.close()
    again = local.backend()
    again.open()
    again.rewind()
    if between == "a new server":
        local.stop()
        local.start()
    check_taken_over(first, item(4, "of the original"), 3)
    again.add_change(Change(4, None, item(4, "of the copy")[1]))
    assert local.stored() == [*calls, item(4, "of the copy")]


def test_copy_that_never_wrote_takes_nothing_over(local: Local) -> None:
    original, first = begin(local)
    write(first, *support.first_changes(3))
    _, second = begin(local)
    write(first, item(4, "of the original"))
    check_taken_over(second, item(4, "of the copy"), 4)
    write(first, item(5, "of the original"))
    assert [call[0] for call in local.stored()] == [1, 2, 3, 4, 5]
    assert original.reconnects == 0


def test_change_in_hand_when_the_other_node_writes(local: Local) -> None:
    """The connection is cut, and before it comes back the copy has written."""
    _, first = begin(local)
    write(first, *support.first_changes(3))
    others: list[Session] = []

    def other_writes() -> None:
        local.on_connect = lambda: None
        others.append(begin(local)[1])
        write(others[0], item(4, "of the copy"))

    local.on_connect = other_writes
    local.plan[:] = [20, NO_CUT, NO_CUT]
    check_taken_over(first, item(4, "of the original"), 4)
    write(others[0], item(5, "of the copy"))
    assert local.stored()[3:] == [item(4, "of the copy"), item(5, "of the copy")]


def test_node_of_protocol_1_takes_over_from_one_of_protocol_2(local: Local) -> None:
    _, first = begin(local)
    write(first, *support.first_changes(3))
    with OldClient("127.0.0.1", local.port) as old:
        assert old.metadata() == (1, 3, 2, 3)
        assert old.change(*item(4, "of an old client")) == (peers.ACK, 4)
        check_taken_over(first, item(4, "of the original"), 4)
        assert old.change(*item(5, "of an old client")) == (peers.ACK, 5)
    write(begin(local)[1], item(6, "of a new session"))
    assert [call[0] for call in local.stored()] == [1, 2, 3, 4, 5, 6]


def test_snapshot_of_the_copy_ends_the_session_of_the_original(
    local: Local, tmp_path: Path
) -> None:
    _, first = begin(local)
    write(first, *support.first_changes(3))
    support.apply_calls(tmp_path / "copy.sqlite3", support.first_changes(3))
    assert local.backend().replace(Snapshot(str(tmp_path / "copy.sqlite3"), 3))
    check_taken_over(first, item(4, "of the original"), 3)
    for name in os.listdir(local.directory):
        if ".old-" in name:
            (local.directory / name).unlink()


# A server that lost acknowledged changes


@pytest.mark.parametrize("kind", ["a change", "a pragma"])
@pytest.mark.parametrize("lost", [1, 2])
def test_older_disk_image_is_refused_with_both_versions(lost: int, kind: str, local: Local) -> None:
    backend, session = begin(local)
    write(session, *support.first_changes(5 - lost))
    image = (local.directory / "node.bkp").read_bytes()
    write(session, *support.first_changes(5)[5 - lost :])
    local.stop()
    (local.directory / "node.bkp").write_bytes(image)
    local.start()
    text = f"it is at version {5 - lost}, this node at version 5"
    call = item(6, "more") if kind == "a change" else at(5, OFF)
    for _ in range(2):
        with pytest.raises(Diverged, match=f"has lost acknowledged changes: {text}") as caught:
            write(session, call)
        assert caught.value.code is NackCode.OTHER_HISTORY
        assert "resync" in caught.value.next_step
    backend.close()
    assert local.stored() == support.first_changes(5 - lost)


def test_older_image_that_lacks_only_the_change_in_hand_heals_itself(local: Local) -> None:
    """Its ACK was never received: sending it again loses nothing."""
    _, session = begin(local)
    write(session, *support.first_changes(4))
    image = (local.directory / "node.bkp").read_bytes()

    def put_back() -> None:
        local.on_connect = lambda: None
        local.stop()
        assert len(local.stored()) == 5
        (local.directory / "node.bkp").write_bytes(image)
        local.start()

    local.on_connect = put_back
    call = item(5, "in hand")
    local.plan[:] = [AT_ANSWER, NO_CUT]
    write(session, call)
    assert local.fates == [socketbackend.Fate.LOST]
    assert local.stored()[4:] == [call]
