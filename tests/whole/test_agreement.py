"""Our client and our server over protocol 2: who may write, and what became of a change.

The first half runs both in this process and cuts the connection at every byte; the second
runs the real plugin against the server's real process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import socket
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import protocol
from backend import (
    EMPTY_CHAIN,
    FOREIGN_KEYS_OFF,
    Change,
    Ending,
    Session,
    Snapshot,
    bump,
    chain_after,
)
from filebackend import FileBackend
from filelog.layout2 import BEFORE_FIRST, BUMPS, FINAL, Head, Kind
from protocol import NackCode
from remote import address, delivery, protocol1
from remote.address import SocketUrl, parse_socket_url
from remote.fate import Fate
from remote.link import NEXT_STEPS, Diverged, Link, Refused, Unreachable
from socketbackend import SocketBackend
from tests import peers, support
from tests.cutproxy import DOWN, UP, CutProxy
from tests.peers import OldClient, ServerProcess
from tests.stopping import eventually
from tests.support import Call, PluginProcess, change
from tests.whole.test_model import CutSocket, ServerThread, compact_in_process, in_this_process
from wallet import restore
from wallet.database import compare

OFF: Call = (0, [FOREIGN_KEYS_OFF])
ON: Call = (0, ["PRAGMA foreign_keys = ON;"])
PROTOCOL_1 = "import protocol; protocol.NEWEST = 1"
NO_CUT = 1 << 40
AT_ANSWER = -1
"""Cut when the server answers, whatever was sent."""


class ByteCut(CutSocket):
    """Passes so many bytes of both directions together, then cuts; then the next number."""

    def send(self, data: bytes, flags: int = 0) -> int:
        if self._budget[0] == AT_ANSWER:
            return self._sock.send(data, flags)
        return super().send(data, flags)

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
        self.fates: list[Fate] = []
        self._patch(patch)
        self.port = peers.free_port()
        FileBackend(self.file_url).create(None)
        self.start()

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        in_this_process(patch)
        real_connect, real_agreed = address.connect, protocol.agreed_protocol

        def connect(url: SocketUrl) -> ByteCut:
            self.on_connect()
            self.connections += 1
            return ByteCut(real_connect(url), self.plan)

        def agreed(payload: bytes) -> int:
            now = self.protocols[(self.connections - 1) % len(self.protocols)]
            return min(now, real_agreed(payload))

        patch.setattr(address, "connect", connect)
        patch.setattr(protocol, "agreed_protocol", agreed)
        for module, name in (
            (delivery, "fate_by_content"),
            (protocol1, "fate_of_change"),
            (protocol1, "fate_of_rewind"),
        ):
            patch.setattr(module, name, self._noting(getattr(module, name)))

    def _noting(self, judge: Callable[..., Fate]) -> Callable[..., object]:
        def noting(*arguments: object) -> Fate:
            self.fates.append(judge(*arguments))
            return self.fates[-1]

        return noting

    def start(self) -> None:
        self._running = ServerThread(self.file_url, self.port)
        self.server = self._running.server

    def stop(self) -> None:
        self._running.stop()

    def backend(self) -> SocketBackend:
        return SocketBackend(f"socket:127.0.0.1:{self.port}?retry_for=20")

    def compact(self) -> None:
        backend = self.server.keeper.backend
        compact_in_process(backend, self.server.keeper.lock)

    def restored(self, directory: Path) -> Path:
        """The database that a restore over the network gives."""
        path = directory / "restored.sqlite3"
        reading = self.backend().read()
        restore.restore(reading, str(path), False, lambda *_: None)
        reading.close()
        return path

    def stored(self) -> list[Call]:
        """What a restore would apply, apart from the snapshot."""
        return support.stored(self.file_url)


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    with tempfile.TemporaryDirectory(dir=support.FAST) as directory:
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


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_every_byte(kind: str, local: Local) -> None:
    """From the first byte of the METADATA exchange to the last of the last ACK."""
    count = cut_everywhere(local, kind)
    assert count > 300
    assert set(local.fates) == {Fate.STORED, Fate.LOST}


@pytest.mark.parametrize("kind", KINDS)
def test_cut_and_compacted_before_the_reconnect(kind: str, local: Local, tmp_path: Path) -> None:
    """The record in question may stand in a snapshot then: the chain still names it."""
    lives = Lives(local)
    local.on_connect = local.compact
    for size in range(100, 700, 23):
        local.plan[:] = [size, NO_CUT]
        lives.live(kind)
    assert {Fate.STORED, Fate.LOST} == set(local.fates)
    local.plan[:] = [NO_CUT]
    expected = tmp_path / "expected.sqlite3"
    support.apply_calls(expected, lives.expected)
    assert compare(str(expected), str(local.restored(tmp_path))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_server_of_another_protocol_after_the_cut(kind: str, local: Local) -> None:
    """A server is replaced by a newer one while the plugin waits for it."""
    # One that is replaced has ended: what came to it is done with before the other one is asked.
    local.on_connect = lambda: eventually(lambda: not local.server.places._at)
    lives = Lives(local)
    for size in itertools.count(0, 5):
        # The connection that is cut is the last of those to come.
        local.protocols = [1, 2] if kind != "a rewind" else [2, 1, 2]
        local.connections = 0
        local.plan[:] = [size, NO_CUT]
        lives.live(kind)
        if len(local.plan) > 1:
            break
    local.protocols = [2]
    lives.check()
    assert set(local.fates) == {Fate.STORED, Fate.LOST}


def test_protocol_1_becomes_protocol_2_in_one_session(local: Local) -> None:
    lives, backend = Lives(local), local.backend()
    local.protocols = [1] * 9 + [2] * 99
    backend.open()
    session = Session(backend, "DIR")
    for number in range(24):
        pragma = (OFF, None, ON)[number % 3]
        lives.announce(session, at(lives.version, pragma) if pragma else lives.next_commit())
        for connection in list(local.server.places._at):
            connection.cut()
    assert backend.reconnects == 23
    backend.close()
    local.protocols = [2]
    assert Fate.UNKNOWN not in local.fates
    lives.check()


@pytest.mark.parametrize("seed", range(6))
def test_cut_again_and_again(seed: int, local: Local) -> None:
    chance, lives = random.Random(seed), Lives(local)
    for _ in range(40):
        # Protocol 1 cannot tell what became of a change right after a rewind.
        kind = chance.choice(KINDS)
        local.protocols = chance.choice([[2], [1] + [2] * 9, [1] * 4 + [2] * 99])
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
        for connection in list(local.server.places._at):
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
        assert caught.value.code is NackCode.OUT_OF_DATE
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
    assert local.fates == [Fate.LOST]
    assert local.stored()[4:] == [call]


# What a server of protocol 2 refuses


def link_to(local: Local) -> Link:
    """A connection that agreed on protocol 2, without the client's own checks."""
    link = Link(parse_socket_url(f"socket:127.0.0.1:{local.port}"))
    assert link.metadata().protocol == 2
    return link


MINE, THEIRS = bytes(8) + bytes(range(8)), bytes(8) + bytes(range(1, 9))


def as_record(call: Call, before: bytes, session: bytes = MINE) -> tuple[Head, bytes]:
    """The record of a change behind the chain ``before``."""
    one = Change(call[0], None, call[1])
    head = BEFORE_FIRST._replace(
        kind=Kind.CHANGE,
        flags=BUMPS if one.bumps else 0,
        version=one.version,
        time_ns=1,
        session=session,
        length=len(one.payload),
        chain_before=before,
        chain=chain_after(before, one.version, one.payload),
    )
    return head, one.payload


def rewind_of(head: Head, session: bytes) -> tuple[Head, bytes]:
    back = head._replace(kind=Kind.REWIND, flags=0, version=head.version - 1, session=session)
    return back._replace(length=0, chain_before=head.chain, chain=head.chain_before), b""


Refusal = tuple[Callable[[Head], tuple[Head, bytes]], NackCode, str]
REFUSALS: dict[str, Refusal] = {
    "ahead": (
        lambda last: as_record(item(9, "x"), last.chain),
        NackCode.OUT_OF_DATE,
        "the node is ahead: the backup is at version 3",
    ),
    "pragma ahead": (
        lambda last: as_record(at(4, OFF), last.chain),
        NackCode.OUT_OF_DATE,
        "the node is ahead",
    ),
    "behind": (
        lambda last: as_record(item(3, "x"), last.chain),
        NackCode.LOST_STATE,
        "the backup is ahead: the backup is at version 3",
    ),
    "another history": (
        lambda last: as_record(item(4, "x"), last.chain_before),
        NackCode.OTHER_HISTORY,
        "it continues another history than the backup's, which is at version 3",
    ),
    "another node's history": (
        lambda last: as_record(item(4, "x"), last.chain_before, THEIRS),
        NackCode.TAKEN_OVER,
        "another node took over at version 3, 1970-01-01 00:00:00 UTC",
    ),
    "rewind by the session that wrote": (
        lambda last: rewind_of(last, MINE),
        NackCode.INVALID,
        "cannot be taken back",
    ),
    "rewind to another version": (
        lambda last: (rewind_of(last, THEIRS)[0]._replace(version=1), b""),
        NackCode.INVALID,
        "cannot be taken back",
    ),
    "rewind to another chain": (
        lambda last: (rewind_of(last, THEIRS)[0]._replace(chain=MINE), b""),
        NackCode.INVALID,
        "cannot be taken back",
    ),
    "empty statement": (
        lambda last: _with_payload(last, b"SELECT 1\0\0SELECT 2"),
        NackCode.INVALID,
        "empty statement",
    ),
    "no UTF-8": (lambda last: _with_payload(last, b"\xff"), NackCode.INVALID, "not UTF-8"),
    "bump that is not flagged": (
        lambda last: (as_record(item(4, "x"), last.chain)[0]._replace(flags=0), _item_4()),
        NackCode.INVALID,
        "its flags do not fit",
    ),
    "flag that means nothing": (
        lambda last: (as_record(item(4, "x"), last.chain)[0]._replace(flags=129), _item_4()),
        NackCode.INVALID,
        "its flags do not fit",
    ),
    "older snapshot": (
        lambda last: (
            BEFORE_FIRST._replace(
                kind=Kind.SNAPSHOT, flags=FINAL, version=2, session=MINE, length=1, chain=MINE
            ),
            b"x",
        ),
        NackCode.OLD_SNAPSHOT,
        "it is older than the backup, at version 3",
    ),
}


def _item_4() -> bytes:
    return Change(4, None, item(4, "x")[1]).payload


def _with_payload(last: Head, payload: bytes) -> tuple[Head, bytes]:
    head = as_record(item(4, "x"), last.chain)[0]._replace(length=len(payload))
    return head._replace(chain=chain_after(last.chain, 4, payload)), payload


@pytest.mark.parametrize("name", REFUSALS)
def test_nack_says_why_and_changes_nothing(name: str, local: Local) -> None:
    make, code, text = REFUSALS[name]
    link, last = link_to(local), BEFORE_FIRST
    for call in support.first_changes(3):
        record = as_record(call, last.chain)
        last = record[0]
        link.send_record(*record)
        link.check_ack(link.answer(), link.ack_of(last))
    before = peers.digest(local.directory / "node.bkp")
    link.send_record(*make(last))
    with pytest.raises(Refused, match=re.escape(text)) as caught:
        link.check_ack(link.answer(), link.ack_of(last))
    assert caught.value.code is code
    assert caught.value.next_step == NEXT_STEPS[code]
    assert peers.digest(local.directory / "node.bkp") == before
    # And the session is none the worse for it.
    head, payload = as_record(item(4, "x"), last.chain)
    link.send_record(head, payload)
    link.check_ack(link.answer(), link.ack_of(head))
    link.close()
    assert [call[0] for call in local.stored()] == [1, 2, 3, 4]


def test_foreign_history_onto_an_empty_backup(local: Local) -> None:
    link = link_to(local)
    head, payload = as_record(item(1, "x"), MINE)
    link.send_record(head, payload)
    with pytest.raises(Refused, match="another history") as caught:
        link.check_ack(link.answer(), link.ack_of(head))
    assert caught.value.code is NackCode.OTHER_HISTORY
    link.close()


def test_record_before_protocol_2_is_agreed_on_ends_the_connection(local: Local) -> None:
    link = Link(parse_socket_url(f"socket:127.0.0.1:{local.port}"))
    link.protocol = 2
    link.send_record(*as_record(item(1, "x"), EMPTY_CHAIN))
    with pytest.raises(ConnectionError):
        link.answer()
    link.close()
    assert local.stored() == []


def test_repeat_is_acknowledged_and_stored_once(local: Local) -> None:
    link, last = link_to(local), BEFORE_FIRST
    for call in (*support.first_changes(1), at(1, OFF), item(2, "x"), at(2, ON)):
        head, payload = as_record(call, last.chain)
        for _ in range(3):
            link.send_record(head, payload)
            link.check_ack(link.answer(), link.ack_of(head))
        last = head
    link.close()
    found = [call[1][-1] for call in local.stored()]
    assert found == [bump(1), OFF[1][0], bump(2), ON[1][0]]


# Snapshots and restores


def database_of(directory: Path, version: int, size: int) -> Path:
    """A node's database of more than ``size`` bytes that do not compress."""
    path = directory / f"at-{version}.sqlite3"
    support.apply_calls(path, support.first_changes(version))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE filler (x)")
        for _ in range(size >> 18):
            connection.execute("INSERT INTO filler VALUES (randomblob(?))", (1 << 18,))
        connection.commit()
    return path


def test_snapshot_goes_in_pieces_both_ways(local: Local, tmp_path: Path) -> None:
    node = database_of(tmp_path, 3, 5 << 20)
    local.backend().create(Snapshot(str(node), 3))
    found = support.records_of(local.directory / "node.bkp")
    assert len(found) == -(-node.stat().st_size // (1 << 20)) > 5
    assert b"".join(payload for _, payload in found) == node.read_bytes()
    restored = support.passed(local.backend().read())
    assert restored.ending.damage is None and restored.ending.version == 3
    assert restored.snapshot == node.read_bytes()
    assert max(map(len, restored.pieces)) == 1 << 20
    write(begin(local)[1], item(4, "after the snapshot"))


def test_snapshot_over_a_line_that_breaks_goes_on(local: Local, tmp_path: Path) -> None:
    write(begin(local)[1], *support.first_changes(3))
    path = str(database_of(tmp_path, 4, 3 << 20))
    for size in (400, 5000, 1 << 20, (2 << 20) + 77, 3 << 20):
        local.plan[:] = [size, NO_CUT]
        snapshot = Snapshot(path, 4)
        assert local.backend().replace(snapshot)
        assert len(local.plan) == 1
        assert local.server.keeper.backend.newest.chain == snapshot.chain
        eventually(lambda: not list(local.directory.glob("*.scratch-*")))
    assert local.backend().status().version == 4
    remove_kept(local)


def remove_kept(local: Local) -> None:
    for path in local.directory.glob("*.old-*"):
        path.unlink()


def test_snapshot_that_is_not_what_it_says_leaves_nothing(local: Local, tmp_path: Path) -> None:
    write(begin(local)[1], *support.first_changes(3))
    before = support.contents(local.directory)
    path = str(database_of(tmp_path, 4, 1 << 20))
    (tmp_path / "text").write_text("no database")
    for snapshot in (Snapshot(path, 5), Snapshot(str(tmp_path / "text"), 4)):
        with pytest.raises(Refused, match=r"holds 4|is not a database"):
            local.backend().replace(snapshot)
        eventually(lambda: support.contents(local.directory) == before)


@pytest.mark.parametrize("size", [0, 9, 160, 5000, 1 << 20, 2 << 20])
def test_broken_restore_delivers_nothing(size: int, local: Local, tmp_path: Path) -> None:
    local.backend().create(Snapshot(str(database_of(tmp_path, 3, 2 << 20)), 3))
    write(begin(local)[1], item(4, "x"))
    target = tmp_path / "target"
    target.mkdir()
    reading = local.backend().read()
    local.plan[:] = [size, NO_CUT]
    with pytest.raises(Unreachable):
        restore.restore(reading, str(target), False, lambda *_: None)
    reading.close()
    assert len(local.plan) == 1 and not list(target.iterdir())
    assert local.restored(target).exists()


def test_coming_makes_the_progress_true(local: Local, tmp_path: Path) -> None:
    local.backend().create(Snapshot(str(database_of(tmp_path, 3, 2 << 20)), 3))
    write(begin(local)[1], item(4, "a" * 3000), item(5, "abandoned"))
    write(begin(local)[1], item(5, "b"), at(5, OFF), item(6, "c"), at(6, ON))
    places = [0]
    with contextlib.closing(local.backend().read()) as reading:
        for step in reading:
            ending, position, total = step
            assert places[-1] <= position <= total
            places.append(position)
    assert len(set(places)) > 5
    assert position == total == local.server.keeper.backend.size
    assert isinstance(ending, Ending)
    assert ending.damage is None and ending.last_change_ns is not None


def test_progress_goes_on_beside_a_writer(local: Local) -> None:
    _, session = begin(local)
    write(session, *support.first_changes(3))
    reading = local.backend().read()
    write(session, item(4, "before it is asked for"))
    *changes, (ending, position, total) = reading
    reading.close()
    assert [getattr(step.found, "version", 0) for step in changes] == [1, 2, 3, 4]
    assert isinstance(ending, Ending) and ending.damage is None and position == total


def test_damage_in_a_restore_is_named_behind_what_is_sound(local: Local) -> None:
    """The NACK waits its turn behind megabytes that nobody reads yet."""
    _, session = begin(local)
    write(session, *support.first_changes(1))
    noise = random.Random(1)
    for version in range(2, 9):
        write(session, item(version, noise.randbytes(1 << 19).hex()))
    path = local.directory / "node.bkp"
    last = support.records_of(path)[-1][0]
    support.flip(path, last.offset + 5000)
    with OldClient("127.0.0.1", local.port) as client:
        assert client.ask(peers.REQ_METADATA, b"\0\0\0\2" + bytes(17))[0] == peers.METADATA
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        client.send(peers.RESTORE)
        found = [client.receive()]
        while found[-1][0] in (protocol.PacketType.COMING, protocol.PacketType.RECORD):
            found.append(client.receive())
    kind, payload = found[-1]
    assert kind == peers.NACK and len(found) == 9
    nack = protocol.decode_nack(payload)
    assert nack.code is NackCode.DAMAGED
    assert f"is damaged at offset {last.offset}" in nack.text


# The real plugin and the server's real process


def name_in_lock(node_dir: Path, url: str) -> None:
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))


def second_node(tmp_path: Path, url: str) -> Path:
    directory = tmp_path / "copy" / "regtest"
    directory.mkdir(parents=True)
    name_in_lock(directory, url)
    return directory


def test_two_real_nodes_with_one_ancestor(url: str, node_dir: Path, tmp_path: Path) -> None:
    support.make_backup(url)
    server = ServerProcess(url).ready()
    name_in_lock(node_dir, server.url)
    calls = support.first_changes(5)
    with PluginProcess(node_dir) as original:
        for call in calls:
            original.write(*call)
        restored = tmp_path / "copy.sqlite3"
        support.run_cli("restore", server.url, restored)
        with PluginProcess(second_node(tmp_path, server.url)) as copy:
            copy.write(*item(6, "of the copy"))
            for _ in range(2):
                with pytest.raises(support.Refused):
                    original.write(*item(6, "of the original"))
            (error, *_) = original.errors()
            assert re.search(TAKEN.format(6), error)
            assert "find out which one holds the latest state" in error
            server.kill()
            server = ServerProcess(url, server.port).ready()
            copy.write(*item(7, "of the copy"))
            with pytest.raises(support.Refused):
                original.write(*item(6, "of the original"))
            assert copy.errors() == []
            support.apply_calls(restored, [item(6, "of the copy"), item(7, "of the copy")])
    support.run_cli("restore", server.url, tmp_path / "found.sqlite3")
    server.kill()
    assert compare(str(restored), str(tmp_path / "found.sqlite3")) == []


def test_older_disk_image_and_its_way_back(url: str, node_dir: Path, tmp_path: Path) -> None:
    backup = support.make_backup(url)
    server = ServerProcess(url).ready()
    name_in_lock(node_dir, server.url)
    calls = support.first_changes(7)
    with PluginProcess(node_dir) as plugin:
        for call in calls[:3]:
            plugin.write(*call)
        image = backup.read_bytes()
        for call in calls[3:6]:
            plugin.write(*call)
        assert server.stop() == 0
        backup.write_bytes(image)
        server = ServerProcess(url, server.port).ready()
        with pytest.raises(support.Refused):
            plugin.write(*calls[6])
        (error,) = plugin.errors()
        assert "it is at version 3, this node at version 6" in error
        assert "resync --lightning-dir" in error
    # A new start of the node tells the same by the version rule.
    with PluginProcess(node_dir) as plugin:
        with pytest.raises(support.Refused):
            plugin.write(*calls[6])
        assert "The node is at version 6, the backup at version 3" in plugin.errors()[0]
    node = node_dir / "lightningd.sqlite3"
    support.apply_calls(node, calls[:6])
    support.run_cli("resync", "--yes", "--lightning-dir", node_dir)
    with PluginProcess(node_dir) as plugin:
        plugin.write(*calls[6])
    support.apply_calls(node, calls[6:])
    support.run_cli("restore", server.url, tmp_path / "found.sqlite3")
    server.kill()
    assert compare(str(node), str(tmp_path / "found.sqlite3")) == []


def test_window_begins_anew_when_the_connection_is_lost(url: str, node_dir: Path) -> None:
    support.make_backup(url)
    server = ServerProcess(url).ready()
    text = random.Random(1).randbytes(2000).hex()
    calls = [*support.first_changes(1), *(item(v, f"{text} {v}") for v in range(2, 42))]
    with CutProxy(("127.0.0.1", server.port)) as proxy, PluginProcess(node_dir) as plugin:
        name_in_lock(node_dir, f"socket:127.0.0.1:{proxy.port}")
        sizes = []
        for number, call in enumerate(calls):
            before = len(proxy.moves)
            if number % 10 == 5:
                # Once in mid-record, once in mid-ACK, once behind it.
                proxy.cut_after((UP, DOWN, DOWN, UP)[number // 10], (50, 3, 0, 1)[number // 10])
            plugin.write(*call)
            sizes.append(sum(move.size for move in proxy.moves[before:] if move.direction == UP))
        assert plugin.errors() == []
    assert proxy.cuts == 4
    first = sizes[1]
    assert first > 2000
    for number, size in enumerate(sizes[2:], 2):
        # Sent again with a fresh window, or found to be there; then the next has it anew.
        if number % 10 not in (5, 6):
            assert size < first / 4, number
    assert sum(size > 2000 for size in sizes) == 5
    server.kill()
    assert support.stored(url) == calls


COMPACT = "compact"
EVENTS = {
    "payer": {0: COMPACT, 1: COMPACT, 2: COMPACT, 60: "", 120: COMPACT},
    "router": {-1: PROTOCOL_1, 0: PROTOCOL_1, 1: PROTOCOL_1, 2: "", 60: "", 61: COMPACT},
}
"""What happens behind the change of that number: the first are OFF, its change, and ON."""


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", EVENTS)
def test_recorded_node_while_its_server_changes(
    name: str, url: str, node_dir: Path, tmp_path: Path
) -> None:
    """Killed each time, and compacted before or replaced by one of a newer protocol."""
    support.make_backup(url)
    server = ServerProcess(url).ready()
    name_in_lock(node_dir, server.url)
    for calls in support.trace_sessions(name):
        server.kill()
        server = ServerProcess(url, server.port, patch=EVENTS[name].get(-1, "")).ready()
        with PluginProcess(node_dir) as plugin:
            for number, call in enumerate(calls):
                plugin.write(*call)
                event = EVENTS[name].get(number)
                if event is None:
                    continue
                if event is COMPACT:
                    SocketBackend(server.url).compact()
                server.kill()
                server = ServerProcess(url, server.port, patch=event.replace(COMPACT, ""))
                server.ready()
            assert plugin.errors() == []
            assert plugin.close() == 0
    server.ready()
    restored = tmp_path / "restored.sqlite3"
    support.run_cli("restore", server.url, restored)
    server.kill()
    assert compare(str(support.trace_database(name, tmp_path)), str(restored)) == []


def test_refusal_of_the_server_reaches_the_log_of_the_plugin(url: str, node_dir: Path) -> None:
    """Code and text of a NACK, where the client itself sees nothing wrong."""
    support.make_backup(url)
    patch = (
        "from serving import rules\n"
        "real = rules.record\n"
        "rules.record = lambda state, head: (\n"
        "    rules.Decision(rules.Act.REFUSE, rules.Reason.LOST_STATE) if head.version == 3\n"
        "    else real(state, head))\n"
        "rules.Reason.LOST_STATE.text = 'the reason of the day'"
    )
    with ServerProcess(url, patch=patch) as server, PluginProcess(node_dir) as plugin:
        name_in_lock(node_dir, server.url)
        calls = support.first_changes(3)
        plugin.write(*calls[0])
        plugin.write(*calls[1])
        with pytest.raises(support.Refused, match="the reason of the day"):
            plugin.write(*calls[2])
        (error,) = plugin.errors()
        assert error.startswith("The backup server says no: refused the change to version 3: the")
        assert error.endswith(NEXT_STEPS[NackCode.LOST_STATE])
        server.wait_for("refused the change to version 3: the reason of the day")


def test_damage_on_the_server_is_named_where_it_is_restored(url: str, tmp_path: Path) -> None:
    backup = support.make_backup(url, support.first_changes(5))
    second = support.records_of(backup)[1][0]
    with ServerProcess(url) as server:
        support.flip(backup, second.offset + 130)
        done = support.run_cli("restore", server.url, tmp_path / "restored.sqlite3", check=1)
        assert f"damaged at offset {second.offset}" in done.stderr
        assert "good up to version 1" in done.stderr
        assert not (tmp_path / "restored.sqlite3").exists()
