"""The client of a remote backup, against a minimal server of protocol 1 and our own."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import Change, Session
from errors import BackupError, BackupExists
from filelog.layout2 import owner_behind
from protocol import ProtocolError
from remote import link, patience
from remote.link import Diverged, NotTaken, Refused, Unreachable
from socketbackend import SocketBackend
from tests import peers, support
from tests.cutproxy import UP, CutProxy
from tests.peers import (
    ACK,
    CHANGE,
    DONE,
    METADATA,
    NACK,
    REQ_METADATA,
    RESTORE,
    REWIND,
    SNAPSHOT,
    OldServer,
    ServerProcess,
)
from wallet.database import compare

OFF = ["PRAGMA foreign_keys = OFF;"]


@pytest.fixture
def old() -> Iterator[OldServer]:
    """An empty server of protocol 1."""
    with OldServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)


OPEN: list[SocketBackend] = []
"""The node that ran last."""


def session(url: str) -> Session:
    """A session of a node whose backup is at ``url``; the node before it has ended."""
    while OPEN:
        OPEN.pop().close()
    backend = SocketBackend(url)
    OPEN.append(backend)
    backend.open()
    return Session(backend, "/nowhere")


def run(url: str, calls: list[support.Call]) -> None:
    """A whole session of a node."""
    write(session(url), calls)
    OPEN.pop().close()


def write(node: Session, calls: list[support.Call]) -> None:
    """What the plugin does with ``calls``."""
    for version, statements in calls:
        node.write(Change(version, None, statements))


def stored(server: OldServer) -> list[tuple[int, list[str]]]:
    """The changes that a server of protocol 1 holds."""
    return [(v, data.decode().split("\0")) for k, v, data in server.entries if k == CHANGE]


# With a server of protocol 1


def test_plugin_with_an_old_server(old: OldServer, node_dir: Path, tmp_path: Path) -> None:
    calls = support.first_changes(6)
    support.run_cli("init", "--lightning-dir", node_dir, old.url)
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        for call in calls[:3]:
            plugin.write(*call)
        old.restart()
        plugin.write(*calls[3])
        old.die_before = CHANGE
        plugin.write(*calls[4])
        old.die_after = CHANGE
        plugin.write(*calls[5])
        assert plugin.errors() == []
        assert plugin.logged("Connected to") and plugin.logged("the server never got it")
        assert plugin.logged("the server has it")
    assert stored(old) == calls
    assert "version:        6\n" in support.run_cli("status", old.url).stdout
    restored = tmp_path / "restored.sqlite3"
    support.run_cli("restore", old.url, restored)
    support.apply_calls(tmp_path / "node.sqlite3", calls)
    assert compare(str(restored), str(tmp_path / "node.sqlite3")) == []


def test_first_request_is_one_an_old_server_understands(old: OldServer) -> None:
    run(old.url, support.first_changes(2))
    assert [kind for kind, _ in old.requests] == [REQ_METADATA, CHANGE, CHANGE]
    for kind, payload in old.requests[1:]:
        assert kind == CHANGE and zlib.decompress(payload[4:])


def test_abandoned_change_on_an_old_server(old: OldServer, tmp_path: Path) -> None:
    calls = support.first_changes(4)
    run(old.url, calls)
    other = support.change(4, "INSERT INTO items VALUES (4, 'other')")
    run(old.url, [other, support.change(5, "INSERT INTO items VALUES (5, 'item 5')")])
    assert [kind for kind, _ in old.requests].count(REWIND) == 1
    # The old server's file still has the abandoned change; a restore must leave it out.
    assert [version for version, _ in stored(old)] == [1, 2, 3, 4, 4, 5]
    restored = tmp_path / "restored.sqlite3"
    support.run_cli("restore", old.url, restored)
    expected = tmp_path / "node.sqlite3"
    write_calls = [*calls[:3], other, support.change(5, "INSERT INTO items VALUES (5, 'item 5')")]
    support.apply_calls(expected, write_calls)
    assert compare(str(restored), str(expected)) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_rewind_is_sent_again_if_an_old_server_lost_it(moment: str, old: OldServer) -> None:
    run(old.url, support.first_changes(4))
    # It forgets what it has done by then: in both cases the rewind did not happen.
    setattr(old, f"die_{moment}", REWIND)
    other = support.change(4, "INSERT INTO items VALUES (4, 'other')")
    run(old.url, [other])
    assert [kind for kind, _ in old.requests].count(REWIND) == 2
    assert (old.version, stored(old)[-1]) == (4, other)


@pytest.mark.parametrize("counts_rewinds", [False, True])
def test_forgotten_rewind_is_never_taken_for_the_change(counts_rewinds: bool) -> None:
    with OldServer(counts_rewinds) as old:
        calls = support.first_changes(4)
        run(old.url, calls)
        node = session(old.url)
        # Killed with the rewind acknowledged and forgotten, the change not there.
        old.die_before = CHANGE
        other = support.change(4, "INSERT INTO items VALUES (4, 'other')")
        with pytest.raises((Diverged, Refused)):
            write(node, [other])
        assert stored(old) == calls
        # A new start of the node sorts it out.
        run(old.url, [other])
        assert old.version == 4 and stored(old)[-1] == other


def test_rewind_forgotten_before_the_change_is_sent(old: OldServer) -> None:
    run(old.url, support.first_changes(4))
    node = session(old.url)
    # Killed right after the ACK of the rewind, when it is asked what it holds now.
    old.die_before = REQ_METADATA
    with pytest.raises(BackupError, match="rewind"):
        write(node, [support.change(4, "INSERT INTO items VALUES (4, 'other')")])
    assert old.version == 4


@pytest.mark.parametrize("moment", ["before", "after"])
def test_pragma_whose_answer_is_lost(moment: str, old: OldServer) -> None:
    node, calls = session(old.url), support.first_changes(2)
    write(node, calls)
    setattr(old, f"die_{moment}", CHANGE)
    write(node, [(2, OFF), support.change(3, "SELECT 1")])
    assert [version for version, _ in stored(old)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("version", "count"), [(4, 3), (4, 5), (3, 4), (3, 2), (5, 5), (2, 2), (0, 0), (9, 9)]
)
def test_anything_else_after_a_reconnect_is_refused(
    version: int, count: int, old: OldServer
) -> None:
    node, calls = session(old.url), support.first_changes(4)
    write(node, calls[:3])
    old._on_disk = version, max(version - 1, 0), count
    old.die_before = CHANGE
    with pytest.raises(Diverged):
        write(node, calls[3:])
    # And for good: nothing else is sent.
    sent = len(old.requests)
    with pytest.raises(BackupError):
        write(node, calls[3:])
    assert len(old.requests) == sent


def test_nack_without_payload_is_refused(old: OldServer, node_dir: Path) -> None:
    support.run_cli("init", "--lightning-dir", node_dir, old.url)
    old.script[CHANGE] = [(NACK, b"")]
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        with pytest.raises(support.Refused):
            plugin.write(*support.first_changes(1)[0])
        assert any("says no" in line for line in plugin.errors())


ANSWERS = {
    "another version": [(ACK, struct.pack("!I", 7))],
    "ACK without version": [(ACK, b"")],
    "ACK too long": [(ACK, struct.pack("!II", 1, 1))],
    "METADATA": [(METADATA, struct.pack("!IIIQ", 1, 1, 0, 1))],
    "DONE": [(DONE, b"")],
    "CHANGE": [(CHANGE, peers.pack_change(1, ["SELECT 1"]))],
    "SNAPSHOT": [(SNAPSHOT, b"\0\0\0\1")],
    "unknown": [(99, b"")],
    "too long": [(ACK, bytes(1 << 17))],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_wrong_answer_is_refused(name: str, old: OldServer) -> None:
    node = session(old.url)
    old.script[CHANGE] = ANSWERS[name]
    with pytest.raises(ProtocolError):
        write(node, support.first_changes(1))


@pytest.mark.parametrize(
    "answer",
    [
        [(METADATA, b"")],
        [(METADATA, bytes(19))],
        [(METADATA, struct.pack("!IIIQ", 7, 1, 0, 1))],
        [(ACK, bytes(4))],
        [(NACK, b"")],
        [(0, b"")],
    ],
)
def test_wrong_metadata_is_refused_and_not_retried(
    answer: list[tuple[int, bytes]], old: OldServer
) -> None:
    old.script[REQ_METADATA] = answer
    for call in (SocketBackend(old.url).open, SocketBackend(old.url).status):
        with pytest.raises((ProtocolError, Refused)):
            call()
    assert len(old.requests) == 2
    assert support.run_cli("status", old.url, check=1).stdout == ""


# Unreachable


def test_unreachable_is_never_taken_for_empty(node_dir: Path, tmp_path: Path) -> None:
    url = f"socket:127.0.0.1:{peers.free_port()}"
    before = support.contents(node_dir)
    for command in (
        ["init", "--lightning-dir", node_dir, url],
        ["status", url],
        ["restore", url, tmp_path / "restored.sqlite3"],
        ["attach", "--lightning-dir", node_dir, url],
    ):
        done = support.run_cli(*command, check=1)
        assert "cannot be reached" in done.stderr and done.stderr.count("\n") == 1
    assert support.contents(node_dir) == before
    assert not (tmp_path / "restored.sqlite3").exists()
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    support.apply_calls(node_dir / "lightningd.sqlite3", support.first_changes(2))
    done = support.run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
    assert "cannot be reached" in done.stderr


def test_server_that_closes_at_once_is_unreachable() -> None:
    # As an ssh forward does whose other end finds no server.
    with CutProxy(("127.0.0.1", peers.free_port())) as proxy:
        done = support.run_cli("status", f"socket:127.0.0.1:{proxy.port}", check=1)
        assert "cannot be reached" in done.stderr


def test_plugin_waits_for_retry_for_then_refuses(node_dir: Path) -> None:
    port = peers.free_port()
    url = f"socket:127.0.0.1:{port}?retry_for=1"
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        started = time.monotonic()
        with pytest.raises(support.Refused):
            plugin.write(*support.first_changes(1)[0])
        assert time.monotonic() - started < 30
        assert any("cannot be reached" in line for line in plugin.errors())
        waits = [
            float(found[1])
            for _, line in plugin.log
            if (found := re.search(r"has been waiting for ([0-9.]+) s, next try in", line))
        ]
    assert len(waits) >= 2 and waits == sorted(waits) and waits[-1] <= 1


def test_plugin_goes_on_when_the_server_comes_back(node_dir: Path) -> None:
    with OldServer() as old:
        support.run_cli("init", "--lightning-dir", node_dir, old.url)
        calls = support.first_changes(4)
        with support.PluginProcess(node_dir) as plugin:
            plugin.manifest()
            plugin.write(*calls[0])
            plugin.write(*calls[1])
            old.kill()
            number = plugin.send("db_write", {"data_version": 3, "writes": calls[2][1]})
            while not plugin.logged("has been waiting for"):
                time.sleep(0.01)
            old.start()
            assert plugin.answer(number) == {"result": "continue"}
            plugin.write(*calls[3])
            assert plugin.errors() == []
        assert stored(old) == calls


def test_change_is_refused_for_good_after_retry_for(old: OldServer) -> None:
    node = session(f"{old.url}?retry_for=0")
    calls = support.first_changes(2)
    write(node, calls[:1])
    old.kill()
    for _ in range(2):
        with pytest.raises(Unreachable):
            write(node, calls[1:])
    old.start()
    # Whether it is stored is not known any more: only a new start asks.
    with pytest.raises(Unreachable):
        write(node, calls[1:])
    run(old.url, calls[1:])
    assert stored(old) == calls


def test_server_that_answers_but_takes_no_change(old: OldServer) -> None:
    node = session(f"{old.url}?retry_for=2")
    calls = support.first_changes(3)
    write(node, calls[:1])
    old.hang_up_before = CHANGE
    with pytest.raises(NotTaken, match="times the line was lost"):
        write(node, calls[1:2])
    # One pause for all tries, which grows: from 0.01 s to the two that may be.
    assert sum(kind == CHANGE for kind, _ in old.requests) < 12


def test_change_that_is_swallowed(old: OldServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a line does that loses large packets.
    monkeypatch.setattr(patience, "LEAST_TRY_S", 0.1)
    node = session(f"{old.url}?retry_for=1")
    calls = support.first_changes(3)
    write(node, calls[:1])
    old.swallow = CHANGE
    started = time.monotonic()
    with pytest.raises((NotTaken, Unreachable)):
        write(node, calls[1:2])
    assert time.monotonic() - started < link.ANSWER_TIMEOUT_S / 2


def test_answer_that_does_not_come(old: OldServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "ANSWER_TIMEOUT_S", 0.2)
    node = session(f"{old.url}?retry_for=1")
    write(node, support.first_changes(1))
    old.mute = True
    with pytest.raises(Unreachable, match="timed out"):
        write(node, support.first_changes(2)[1:])
    for call in (SocketBackend(old.url).status, SocketBackend(old.url).require_absent):
        with pytest.raises(Unreachable, match="timed out"):
            call()


def test_answer_that_comes_a_byte_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something moves, so that no timeout of a call ends it."""
    monkeypatch.setattr(link, "ANSWER_TIMEOUT_S", 0.2)

    def dribble(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            sock.sendall(struct.pack("!BI", METADATA, 60_000))
            for _ in range(100):
                sock.sendall(b"x")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=dribble, args=(listener,), daemon=True).start()
        with pytest.raises(Unreachable, match=r"too slow|timed out"):
            SocketBackend(f"socket:127.0.0.1:{listener.getsockname()[1]}?retry_for=0").open()


def test_half_open_connection_is_left_and_the_change_sent_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ANSWER_TIMEOUT_S", 0.3)
    backup, calls = support.make_backup(url), support.first_changes(4)
    with ServerProcess(url) as server, CutProxy((server.host, server.port)) as proxy:
        node = session(f"socket:127.0.0.1:{proxy.port}")
        for call in calls:
            write(node, [call])
            proxy.hold()  # As if the machine on the other side had lost power.
        assert proxy.connections >= 4
    found = [head.version for head, _ in support.records_of(backup)]
    assert found == [1, 2, 3, 4]


def test_large_change_over_a_slow_line(old: OldServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # It takes longer than the timeout of an answer, but moves on all the time.
    monkeypatch.setattr(link, "ANSWER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(link, "SLOWEST_RATE", 1 << 16)
    blob = "".join(f"{number:x}" for number in range(1 << 19))
    calls = [support.change(1, f"SELECT x'{blob[: 1 << 21]}'")]
    with CutProxy(("127.0.0.1", old.port), rate=1 << 20) as proxy:
        write(session(f"socket:127.0.0.1:{proxy.port}?retry_for=1"), calls)
        assert proxy.connections == 1
    assert stored(old) == calls


# Commands


def node_with_database(node_dir: Path, version: int) -> Path:
    """A stopped node at ``version``; its database."""
    path = node_dir / "lightningd.sqlite3"
    path.unlink(missing_ok=True)
    support.apply_calls(path, support.first_changes(version))
    return path


def test_init_onto_an_old_server_with_a_backup(old: OldServer, node_dir: Path) -> None:
    run(old.url, support.first_changes(3))
    check_init_is_refused(old.url, node_dir)
    assert len(stored(old)) == 3


def test_init_onto_a_server_with_a_backup(url: str, node_dir: Path) -> None:
    support.make_backup(url, support.first_changes(3))
    with ServerProcess(url) as server:
        check_init_is_refused(server.url, node_dir)


def check_init_is_refused(url: str, node_dir: Path) -> None:
    """``init`` must name the version that is there, and leave nothing."""
    for database in (False, True):
        if database:
            node_with_database(node_dir, 5)
        before = support.contents(node_dir)
        done = support.run_cli("init", "--lightning-dir", node_dir, url, check=1)
        assert "version 3" in done.stderr and "exists already" in done.stderr
        assert support.contents(node_dir) == before
    with pytest.raises(BackupExists, match="version 3"):
        SocketBackend(url).create(None)


def test_commands_with_an_old_server(old: OldServer, node_dir: Path, tmp_path: Path) -> None:
    check_commands(old.url, node_dir, tmp_path)


def test_commands_with_our_server(url: str, node_dir: Path, tmp_path: Path) -> None:
    support.make_backup(url)
    with ServerProcess(url) as server:
        check_commands(server.url, node_dir, tmp_path)


def check_commands(url: str, node_dir: Path, tmp_path: Path) -> None:
    """init, status, restore, resync and attach as an operator uses them."""
    database = node_with_database(node_dir, 3)
    support.run_cli("init", "--lightning-dir", node_dir, url)
    found = json.loads(support.run_cli("status", "--json", url).stdout)
    assert (found["version"], found["prev_version"], found["version_count"]) == (3, None, 1)
    restored = tmp_path / "first.sqlite3"
    support.run_cli("restore", url, restored)
    assert compare(str(restored), str(database)) == []
    # The node runs on without the plugin.
    node_with_database(node_dir, 7)
    support.change_lock(node_dir, heal="off")
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        with pytest.raises(support.Refused):
            plugin.write(*support.change(8, "SELECT 1"))
        assert any("Backup is out of date" in line for line in plugin.errors())
    support.run_cli("resync", "--yes", "--lightning-dir", node_dir)
    found = json.loads(support.run_cli("status", "--json", url).stdout)
    assert (found["version"], found["version_count"]) == (7, 1)
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        plugin.write(*support.change(8, "INSERT INTO items VALUES (8, 'item 8')"))
    # The node is lost: restored elsewhere, it goes on with the same backup.
    elsewhere = support.network_dir(tmp_path / "elsewhere")
    support.run_cli("restore", url, elsewhere)
    support.run_cli("attach", "--lightning-dir", elsewhere, url)
    with support.PluginProcess(elsewhere) as plugin:
        plugin.manifest()
        plugin.write(*support.change(9, "INSERT INTO items VALUES (9, 'item 9')"))
    assert json.loads(support.run_cli("status", "--json", url).stdout)["version"] == 9


def test_resync_with_an_older_database_is_refused(url: str, node_dir: Path) -> None:
    support.make_backup(url, support.first_changes(6))
    node_with_database(node_dir, 2)
    with ServerProcess(url) as server:
        (node_dir / "backup.lock").write_text(json.dumps({"backend_url": server.url}))
        done = support.run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
        assert "lost some state" in done.stderr
        with server.client() as client:
            assert client.metadata().version == 6


BROKEN_STREAMS = {
    "no DONE": [(CHANGE, peers.pack_change(*support.first_changes(1)[0]))],
    "nothing": [(DONE, b"")],
    "too little": [(CHANGE, peers.pack_change(*support.first_changes(1)[0])), (DONE, b"")],
    "a gap": [
        *((CHANGE, peers.pack_change(*support.first_changes(3)[i])) for i in (0, 2)),
        (DONE, b""),
    ],
    "no zlib": [(CHANGE, b"\0\0\0\1no zlib"), (DONE, b"")],
    "broken snapshot": [(SNAPSHOT, b"\0\0\0\1" + zlib.compress(bytes(9000))[:-3]), (DONE, b"")],
    "no database": [(SNAPSHOT, b"\0\0\0\3" + zlib.compress(bytes(9000))), (DONE, b"")],
    "METADATA": [(METADATA, bytes(20))],
    "NACK": [(NACK, b"")],
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_restore_of_a_broken_stream_delivers_nothing(
    name: str, old: OldServer, tmp_path: Path
) -> None:
    run(old.url, support.first_changes(3))
    old.script[RESTORE] = BROKEN_STREAMS[name]
    old.hang_up_after = RESTORE
    done = support.run_cli("restore", old.url, tmp_path / "restored.sqlite3", check=1)
    assert done.stderr.startswith("Error: ")
    assert list(tmp_path.iterdir()) == []


# The wire


@pytest.mark.parametrize("server", ["old", "ours"])
def test_every_packet_is_one_segment_and_a_change_one_exchange(
    server: str, old: OldServer, url: str
) -> None:
    support.make_backup(url)
    calls = support.first_changes(20)
    with ServerProcess(url) as process:
        target = ("127.0.0.1", old.port if server == "old" else process.port)
        with CutProxy(target) as proxy:
            node = session(f"socket:127.0.0.1:{proxy.port}")
            write(node, calls[:1])
            before = len(proxy.moves)
            write(node, calls[1:])
            moves = proxy.moves[before:]
    up = [move for move in moves if move.direction == UP]
    assert len(up) == 19
    if server == "ours":
        assert [move.direction for move in moves] == [UP, 1 - UP] * 19


def test_others_are_served_before_one_that_is_away_is_waited_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.make_backup(url)
    with ServerProcess(url) as server:
        backend = SocketBackend(f"{server.url}?retry_for=0")
        backend.open()
        head = owner_behind(backend.newest, bytes(16), b"")

    def broken(*_: object) -> None:
        raise ConnectionError("injected")

    monkeypatch.setattr(link.Link, "send", broken)
    calls: list[bool] = []
    with contextlib.closing(backend), pytest.raises(Unreachable):
        backend.add_record_while(head, b"", lambda: calls.append(True))
    assert calls == [True]
