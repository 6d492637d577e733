"""The server's real process against a minimal client of protocol 1."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import selectors
import signal
import socket
import sqlite3
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import protocol
from backend import MAX_CHANGE_SIZE
from tests import peers, support
from tests.peers import (
    ACK,
    CHANGE,
    METADATA,
    NACK,
    REQ_METADATA,
    RESTORE,
    REWIND,
    SNAPSHOT,
    OldClient,
    ServerProcess,
    digest,
)
from tests.test_protocol import PACKETS, mutate
from tests.whole.test_model import ServerThread, in_this_process
from wallet.database import compare

OFF = ["PRAGMA foreign_keys = OFF;"]
MIB = 1 << 20
QUICK = "from serving import incoming; incoming.FIRST_PACKET_S = incoming.GRACE_S = 0.5"


@pytest.fixture
def backup(url: str) -> Path:
    """An empty backup, made for a server; its file."""
    return support.make_backup(url)


@pytest.fixture
def server(url: str, backup: Path) -> Iterator[ServerProcess]:
    """A server of that backup."""
    with ServerProcess(url) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OldClient]:
    """A connection to it."""
    with server.client() as connected:
        yield connected


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; only a defect meets the deadline."""
    deadline = time.monotonic() + support.ANSWER_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write(client: OldClient, calls: list[support.Call]) -> None:
    """Send changes that must all be acknowledged."""
    for version, statements in calls:
        assert client.change(version, statements) == (ACK, version)


def stored(url: str) -> list[tuple[int, list[str]]]:
    """The changes in the backup file that a restore would apply."""
    return support.stored(url)


def database(path: Path, version: int) -> bytes:
    """A node's database at ``version``, made at ``path``."""
    support.apply_calls(path, support.first_changes(version))
    return path.read_bytes()


def big_database(path: Path, mebibytes: int) -> None:
    """Make a node's database with that many large blobs."""
    support.apply_calls(path, support.first_changes(3))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE filler (x)")
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO filler SELECT zeroblob(?) FROM n",
            (mebibytes, MIB),
        )
        connection.commit()


def names(backup: Path) -> set[str]:
    """What lies in the backup's directory."""
    return {path.name for path in backup.parent.iterdir()}


# The version rule


def test_changes_are_acknowledged_and_stored(client: OldClient, url: str) -> None:
    assert client.metadata() == (1, 0, 0, 0)
    calls = support.first_changes(5)
    write(client, calls)
    assert client.metadata() == (1, 5, 4, 5)
    assert stored(url) == calls
    assert [entry[1] for entry in client.restore()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (support.change(5, "INSERT INTO items VALUES (5, 'x')"), "the node is ahead"),
        (support.change(3, "INSERT INTO items VALUES (9, 'x')"), "the backup is ahead"),
        (support.change(1, "INSERT INTO items VALUES (9, 'x')"), "the backup is ahead"),
        (support.change(2**32 - 1, "SELECT 1"), "the node is ahead"),
        ((2, OFF), "the backup is ahead"),
        ((4, OFF), "the node is ahead"),
        ((4, ["", "SELECT 1"]), "empty statement"),
    ],
)
def test_change_that_does_not_fit_is_refused_and_changes_nothing(
    call: support.Call, reason: str, server: ServerProcess, backup: Path
) -> None:
    with server.client() as client:
        write(client, support.first_changes(3))
        before = digest(backup)
        # Refused whether the connection has written yet or not.
        assert client.change(*call) == (NACK, 3)
        with server.client() as other:
            assert other.change(*call) == (NACK, 3)
        assert digest(backup) == before
        server.wait_for(reason)
        # And neither is the writer any worse off.
        write(client, [support.change(4, "INSERT INTO items VALUES (4, 'x')")])


def test_repeat_of_the_last_change_is_acknowledged_and_stored_once(
    server: ServerProcess, backup: Path, url: str
) -> None:
    calls = support.first_changes(3)
    with server.client() as client:
        write(client, calls)
        before = digest(backup)
        assert client.change(*calls[-1]) == (ACK, 3)
        assert client.metadata() == (1, 3, 2, 3)
    with server.client() as again:
        assert again.change(*calls[-1]) == (ACK, 3)
        # Not the last one, or the same version with other content: no repeat.
        assert again.change(*calls[0]) == (NACK, 3)
        assert again.change(*support.change(3, "SELECT 2")) == (NACK, 3)
    assert digest(backup) == before
    assert stored(url) == calls


def test_repeated_pragma_after_a_reconnect_is_stored_once(server: ServerProcess, url: str) -> None:
    with server.client() as client:
        write(client, [*support.first_changes(2), (2, OFF)])
    with server.client() as client:
        write(client, [(2, OFF)])
        assert client.metadata().entries == 3
        write(client, [support.change(3, "SELECT 1"), (3, ["PRAGMA foreign_keys = ON;"])])
    assert [version for version, _ in stored(url)] == [1, 2, 2, 3, 3]


def test_two_equal_pragmas_of_one_connection_are_two_changes(client: OldClient) -> None:
    write(client, [*support.first_changes(2), (2, OFF), (2, OFF)])
    assert client.metadata() == (1, 2, 2, 4)


# Rewinds


def test_rewind_is_on_disk_before_its_ack(url: str, backup: Path) -> None:
    calls = support.first_changes(3)
    with ServerProcess(url) as server:
        with server.client() as client:
            write(client, calls)
        with server.client() as client:
            assert client.rewind(2) == (ACK, 2)
            server.kill()
    with ServerProcess(url) as server, server.client() as client:
        assert client.metadata() == (1, 2, 2, 2)
        other = support.change(3, "INSERT INTO items VALUES (3, 'other')")
        write(client, [other])
    assert stored(url) == [*calls[:2], other]


def test_rewind_is_refused_where_it_cannot_be(server: ServerProcess, backup: Path) -> None:
    with server.client() as client:
        assert client.rewind(0) == (NACK, 0)  # Nothing is there.
        write(client, support.first_changes(3))
        before = digest(backup)
        assert client.rewind(2) == (NACK, 3)
        server.wait_for("this connection has written already")
    with server.client() as other:
        for version in (0, 1, 3, 4, 2**32 - 1):
            assert other.rewind(version) == (NACK, 3)
        server.wait_for("it could only go back to version 2")
        assert digest(backup) == before
        assert other.rewind(2) == (ACK, 2)
        before = digest(backup)
        assert other.rewind(1) == (NACK, 2)  # One step only.
        assert other.rewind(2) == (NACK, 2)
    with server.client() as third:
        assert third.rewind(1) == (NACK, 2)
        assert digest(backup) == before


def test_pragma_cannot_be_rewound(server: ServerProcess) -> None:
    with server.client() as client:
        write(client, [*support.first_changes(3), (3, OFF)])
    with server.client() as other:
        assert other.metadata() == (1, 3, 3, 4)
        assert other.rewind(3) == (NACK, 3)
        assert other.rewind(2) == (NACK, 3)


def test_rewind_of_another_size_ends_the_connection(server: ServerProcess) -> None:
    for payload in (b"", b"\0\0\0"):
        with server.client() as client:
            client.send(REWIND, payload)
            assert client.is_closed()


# Snapshots


def test_snapshot_onto_an_empty_backup(server: ServerProcess, tmp_path: Path, backup: Path) -> None:
    data = database(tmp_path / "node.sqlite3", 4)
    with server.client() as client:
        assert client.snapshot(4, data) == (ACK, 4)
        assert client.metadata() == (1, 4, 4, 1)
        write(client, [support.change(5, "INSERT INTO items VALUES (5, 'item 5')")])
        found = client.restore()
    assert [entry[:2] for entry in found] == [(SNAPSHOT, 4), (CHANGE, 5)]
    assert found[0][2] == data
    assert names(backup) == {"node.bkp", "node.bkp.writer"}


@pytest.mark.parametrize("version", [3, 7])
def test_snapshot_of_the_same_version_or_a_newer_one_keeps_the_old_file(
    version: int, server: ServerProcess, tmp_path: Path, backup: Path, url: str
) -> None:
    calls = support.first_changes(3)
    with server.client() as client:
        write(client, calls)
        before = digest(backup)
        data = database(tmp_path / "node.sqlite3", version)
        assert client.snapshot(version, data) == (ACK, version)
        # The writer goes on, in the new file.
        write(client, [support.change(version + 1, "INSERT INTO items VALUES (99, 'x')")])
    (kept,) = backup.parent.glob("node.bkp.old-*")
    assert digest(kept) == before
    server.wait_for(f"is kept as {kept}")
    assert stored(f"file://{kept}") == calls
    server.stop()
    assert [found for found, _ in stored(url)] == [version + 1]


def test_older_snapshot_is_refused(server: ServerProcess, tmp_path: Path, backup: Path) -> None:
    with server.client() as client:
        write(client, support.first_changes(3))
        before = support.contents(backup.parent)
        assert client.snapshot(2, database(tmp_path / "node.sqlite3", 2)) == (NACK, 3)
        server.wait_for("older than the backup, at version 3")
        assert support.contents(backup.parent) == before
        write(client, [support.change(4, "SELECT 1")])


NO_STREAM = ("no zlib", "truncated", "without checksum", "trailing", "empty")
"""Of ``broken_snapshots``, what breaks the protocol."""


def broken_snapshots(data: bytes) -> dict[str, bytes]:
    """Payloads of SNAPSHOT packets that are no database of the version they name."""
    packed, version = zlib.compress(data), struct.pack("!I", 4)
    torn = data[:4096] + b"\xff" * (len(data) - 4096)
    return {
        "no zlib": version + b"no zlib at all",
        "truncated": version + packed[:-10],
        "without checksum": version + packed[:-4],
        "trailing": version + packed + b"x",
        "empty": version,
        "no database": version + zlib.compress(b"no database" * 1000),
        "nothing": version + zlib.compress(b""),
        "half a database": version + zlib.compress(data[: len(data) // 2]),
        "garbage pages": version + zlib.compress(torn),
        "another version": struct.pack("!I", 5) + packed,
        "a far version": struct.pack("!I", 2**32 - 1) + packed,
    }


@pytest.mark.parametrize("start", [0, 3])
def test_broken_snapshot_leaves_nothing(start: int, url: str, tmp_path: Path) -> None:
    calls = support.first_changes(start + 1)
    backup = support.make_backup(url, calls[:start])
    data = database(tmp_path / "node.sqlite3", 4)
    with ServerProcess(url) as server, server.client() as writer:
        assert writer.metadata().version == start
        before = support.contents(backup.parent)
        for name, payload in broken_snapshots(data).items():
            with server.client() as client:
                client.send(SNAPSHOT, payload)
                if name in NO_STREAM:
                    assert client.is_closed(), name
                else:
                    assert client.receive() == (NACK, struct.pack("!I", start)), name
                    client.close()
            eventually(lambda: support.contents(backup.parent) == before)
            assert support.contents(backup.parent) == before, name
        # The node that writes has noticed nothing.
        write(writer, calls[start:])


def test_snapshot_cut_in_the_middle_leaves_nothing(server: ServerProcess, backup: Path) -> None:
    before = names(backup)
    with server.client() as client:
        client.sock.sendall(struct.pack("!BII", SNAPSHOT, 100_000, 7))
        client.sock.sendall(zlib.compress(random.Random(1).randbytes(1 << 16))[:40_000])
        eventually(lambda: "node.bkp.scratch-in-1" in names(backup))
    eventually(lambda: names(backup) == before)


def test_scratch_files_of_a_killed_server_go_at_the_next_start(url: str, backup: Path) -> None:
    before = names(backup) | {"node.bkp.writer"}
    with ServerProcess(url) as server, server.client() as client:
        client.sock.sendall(struct.pack("!BII", SNAPSHOT, 100_000, 7) + zlib.compress(b"x")[:2])
        eventually(lambda: names(backup) != before)
        server.kill()
    assert names(backup) != before
    with ServerProcess(url):
        assert names(backup) == before


# Who writes


def test_newer_connection_takes_over_with_its_first_accepted_write(server: ServerProcess) -> None:
    calls = support.first_changes(6)
    with server.client() as old, server.client() as new:
        write(old, calls[:2])
        # Looks and refused writes cut nobody off.
        assert new.metadata().version == 2
        assert len(new.restore()) == 2
        assert new.change(*calls[3]) == (NACK, 2)
        assert new.rewind(0) == (NACK, 2)
        write(old, calls[2:3])
        write(new, calls[3:4])
        assert old.is_closed()
        server.wait_for("takes over as writer")
        write(new, calls[4:])


def test_older_connection_cannot_take_over_from_a_newer_one(server: ServerProcess) -> None:
    calls = support.first_changes(5)
    with server.client() as older:
        assert older.metadata().version == 0
        with server.client() as newer:
            write(newer, calls[:2])
            assert older.change(*calls[2]) == (NACK, 2)
            assert older.rewind(1) == (NACK, 2)
            server.wait_for("a newer connection has written")
            write(newer, calls[2:4])
        # Not even once the newer one has left.
        server.wait_for("(connection 2): left")
        assert older.change(*calls[4]) == (NACK, 4)


def test_half_open_writer_cannot_lock_a_node_out(server: ServerProcess) -> None:
    calls = support.first_changes(3)
    with server.client() as gone:
        write(gone, calls[:1])
        gone.sock.sendall(struct.pack("!BI", CHANGE, 1000) + b"half a change")
        with server.client() as back:
            write(back, calls[1:])


def test_rewind_and_snapshot_take_over_too(server: ServerProcess, tmp_path: Path) -> None:
    data = database(tmp_path / "node.sqlite3", 5)
    with server.client() as first, server.client() as second, server.client() as third:
        write(first, support.first_changes(3))
        assert second.metadata().version == third.metadata().version == 3
        assert second.rewind(2) == (ACK, 2)
        assert first.is_closed()
        assert third.snapshot(5, data) == (ACK, 5)
        assert second.is_closed()


def gate(flag: Path) -> str:
    """A patch: while ``flag`` exists, every flush waits, and says so by ``flag.waiting``."""
    return (
        "import durable, os, time\n"
        "real = durable.flush\n"
        "def flush(fd):\n"
        f"    if os.path.exists({str(flag)!r}):\n"
        f"        open({str(flag)!r} + '.waiting', 'w').close()\n"
        f"    while os.path.exists({str(flag)!r}):\n"
        "        time.sleep(0.005)\n"
        "    real(fd)\n"
        "durable.flush = flush"
    )


def test_take_over_waits_for_an_append_in_flight(url: str, backup: Path, tmp_path: Path) -> None:
    flag, calls = tmp_path / "flag", support.first_changes(4)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess(url, patch=gate(flag)))
        old, new = (stack.enter_context(server.client()) for _ in range(2))
        write(old, calls[:1])
        flag.touch()
        old.send(CHANGE, peers.pack_change(*calls[1]))
        eventually((tmp_path / "flag.waiting").exists)
        new.send(CHANGE, peers.pack_change(*calls[2]))
        flag.unlink()
        assert new.receive() == (ACK, struct.pack("!I", 3))
        assert old.receive() == (ACK, struct.pack("!I", 2))
        assert old.is_closed()
        write(new, calls[3:])
    assert stored(url) == calls


def test_take_over_waits_for_an_answer_in_flight(url: str, backup: Path, tmp_path: Path) -> None:
    """Else the one before is cut off between its change and the ACK for that."""
    flag, calls = tmp_path / "flag", support.first_changes(3)
    patch = (
        f"import os, time\nflag = {str(flag)!r}\n"
        "from serving.outgoing import Outgoing\n"
        "real = Outgoing.send_now\n"
        "def send_now(outgoing, packet):\n"
        "    if os.path.exists(flag) and not os.path.exists(flag + '.waiting'):\n"
        "        open(flag + '.waiting', 'w').close()\n"
        "        while os.path.exists(flag):\n"
        "            time.sleep(0.005)\n"
        "    real(outgoing, packet)\n"
        "Outgoing.send_now = send_now"
    )
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess(url, patch=patch))
        old, new = (stack.enter_context(server.client()) for _ in range(2))
        write(old, calls[:1])
        flag.touch()
        old.send(CHANGE, peers.pack_change(*calls[1]))
        eventually((tmp_path / "flag.waiting").exists)
        new.send(CHANGE, peers.pack_change(*calls[2]))
        assert select.select([new.sock], [], [], 0.3)[0] == []
        flag.unlink()
        assert old.receive() == (ACK, struct.pack("!I", 2))
        assert new.receive() == (ACK, struct.pack("!I", 3))
        assert old.is_closed()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_finishes_the_change_in_hand(
    number: signal.Signals, url: str, backup: Path, tmp_path: Path
) -> None:
    flag, calls = tmp_path / "flag", support.first_changes(2)
    with ServerProcess(url, patch=gate(flag)) as server, server.client() as client:
        write(client, calls[:1])
        flag.touch()
        client.send(CHANGE, peers.pack_change(*calls[1]))
        eventually((tmp_path / "flag.waiting").exists)
        server.process.send_signal(number)
        flag.unlink()
        assert client.receive() == (ACK, struct.pack("!I", 2))
        assert server.wait() == 0
        assert server.logged("stopped")
    assert stored(url) == calls


def test_stop_is_noticed_before_it_wakes_the_server(
    url: str, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    port, write = peers.free_port(), os.write
    running = ServerThread(url, port)

    def write_late(fd: int, data: bytes) -> int:
        # This wakes it, too, unless it has not slept yet.
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
        running.thread.join(0.5)
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_late)
    running.stop()


# Peers that break rules


def test_silent_connection_is_closed(url: str, backup: Path) -> None:
    with ServerProcess(url, patch=QUICK) as server, server.client() as writer:
        write(writer, support.first_changes(1))
        with server.client() as silent:
            assert silent.is_closed()
        server.wait_for("it said nothing for")
        # Who has spoken once may be silent for long.
        assert writer.metadata().version == 1


def test_byte_a_time_is_too_slow(url: str, backup: Path) -> None:
    with ServerProcess(url, patch=QUICK) as server, server.client() as slow:
        slow.sock.settimeout(0.05)
        data = struct.pack("!BI", CHANGE, 100_000)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000:
                slow.sock.sendall(data[sent : sent + 1] or b"x")
                sent += 1
                with contextlib.suppress(TimeoutError):
                    if slow.sock.recv(1) == b"":
                        break
        assert sent < 1000
        server.wait_for("are too slow")
        with server.client() as client:
            write(client, support.first_changes(1))


@pytest.mark.parametrize("acks", [False, True], ids=["silent", "only ACKs"])
def test_restore_that_nobody_reads_ends(url: str, acks: bool) -> None:
    big = f"INSERT INTO items VALUES (1, '{random.randbytes(MIB).hex()}')"
    support.make_backup(url, [support.change(number, big) for number in range(1, 13)])
    # The system ends it after twice that, without a word: a loaded one lets the server be late.
    with ServerProcess(url, patch="from serving import outgoing; outgoing.PAUSE_S = 4") as server:
        with server.client() as lazy:
            # Else a system may take all of the backup, which nobody reads.
            lazy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.send(RESTORE)
            while not server.logged("it took nothing for"):
                if acks:
                    with contextlib.suppress(ConnectionError):
                        lazy.send(ACK, bytes(4))
                time.sleep(0.05)
        with server.client() as client:
            assert client.metadata().version == 12


def test_length_of_4_gib_is_refused_at_once(server: ServerProcess) -> None:
    for kind in (CHANGE, REWIND, REQ_METADATA, RESTORE, ACK):
        with server.client() as client:
            client.sock.sendall(struct.pack("!BI", kind, 2**32 - 1))
            assert client.is_closed()
    server.wait_for("CHANGE of 4294967295 bytes; the limit is")
    assert server.peak_rss() < 64 * MIB


def test_unknown_types_and_answers_end_the_connection(server: ServerProcess) -> None:
    for kind in (0, 6, 7, 8, 9, 11, 12, 255):
        with server.client() as client:
            client.send(kind)
            assert client.is_closed()
    with server.client() as client:
        assert client.metadata().version == 0


def test_bombs_are_refused_and_cost_no_memory(server: ServerProcess, backup: Path) -> None:
    before = support.contents(backup.parent)
    deflate = zlib.compressobj(9)
    first, again = (
        deflate.compress(bytes(32 * MIB)) + deflate.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    bomb = first + again * (MAX_CHANGE_SIZE // (32 * MIB))
    # What is longer comes in parts, and may take what one change of that size takes.
    bomb = bomb[: protocol.WHOLE_SIZE - 100]
    for kind in (CHANGE, SNAPSHOT):
        with server.client() as client:
            client.send(kind, struct.pack("!I", 1) + bomb)
            assert client.is_closed()
    assert support.contents(backup.parent) == before
    assert server.peak_rss() < 64 * MIB
    with server.client() as client:
        write(client, support.first_changes(1))


def test_snapshot_may_not_fill_the_disk(url: str, backup: Path) -> None:
    patch = "import space; space.RESERVE = 1 << 60"
    before = names(backup) | {"node.bkp.writer"}
    with ServerProcess(url, patch=patch) as server, server.client() as client:
        data = b"SQLite format 3\0" + bytes(2 * MIB)
        client.send(SNAPSHOT, struct.pack("!I", 1) + zlib.compress(data))
        assert client.receive() == (NACK, bytes(4))
        server.wait_for("There is too little room")
        assert names(backup) == before
        write(client, support.first_changes(1))


def test_who_reads_no_answers_holds_nobody_up(url: str, backup: Path) -> None:
    patch = "from serving import outgoing; outgoing.SEND_TIMEOUT_S = 10_000"
    server = ServerProcess(url, patch=patch, options=("--log-level", "error"))
    with contextlib.ExitStack() as stack:
        stack.push(server.__exit__)
        eventually(lambda: can_connect(server))
        writer, flooder = (stack.enter_context(server.client()) for _ in range(2))
        write(writer, support.first_changes(1))
        # Else a system may take megabytes of answers that nobody reads.
        flooder.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flooder.sock.setblocking(False)
        rewinds = struct.pack("!BII", REWIND, 4, 77) * 100
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(flooder.sock, selectors.EVENT_WRITE)
        with contextlib.suppress(ConnectionError):
            while selector.select(1):
                flooder.sock.send(rewinds)
        write(writer, support.first_changes(3)[1:])


def test_newest_connection_gets_in_and_the_writer_stays(server: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(server.client())
        write(writer, support.first_changes(1))
        guests = [stack.enter_context(server.client()) for _ in range(16)]
        for guest in guests:
            assert guest.metadata().version == 1
        # The oldest makes way; the writer, which is older, does not.
        assert guests[0].is_closed()
        server.wait_for("it is the oldest of 16")
        # It is the same where each of them is in the middle of a packet, or has said nothing.
        for busy in guests[1:]:
            busy.sock.sendall(struct.pack("!BI", REQ_METADATA, 9) + b"\x01")
        for _ in range(20):
            silent = stack.enter_context(server.client())
            silent.sock.sendall(struct.pack("!BI", REQ_METADATA, 9) + b"\x01")
        with server.client() as late:
            assert late.metadata().version == 1
            write(writer, support.first_changes(2)[1:])
            write(late, support.first_changes(3)[2:])


def test_500_random_and_mutated_packets(server: ServerProcess, backup: Path) -> None:
    chance = random.Random(20)
    with server.client() as client:
        write(client, support.first_changes(100))
    before = digest(backup)
    for _ in range(500):
        packet = chance.randbytes(chance.randrange(80))
        if chance.random() < 0.7:
            edits = [
                (chance.randrange(400), chance.randrange(256), chance.randrange(4))
                for _ in range(chance.randrange(3))
            ]
            packet = mutate(chance.choice(PACKETS), edits)
        if packet[:5] == struct.pack("!BI", peers.COMPACT, 0):
            continue  # That does change the file.
        with server.client() as client, contextlib.suppress(ConnectionError):
            client.sock.sendall(packet)
            client.sock.shutdown(socket.SHUT_WR)
            while client.sock.recv(1 << 16):
                pass
    assert digest(backup) == before
    with server.client() as client:
        assert client.metadata() == (1, 100, 99, 100)
        write(client, [support.change(101, "SELECT 1")])
    assert not server.logged("Traceback")
    assert server.peak_rss() < 64 * MIB


# Old clients


def test_two_sends_a_packet_with_nagle(server: ServerProcess) -> None:
    with OldClient(server.host, server.port, nodelay=False) as client:
        write(client, support.first_changes(3))


def test_payload_of_a_metadata_request_is_ignored(client: OldClient) -> None:
    for payload in (b"x", b"\0\0\0\1", b"\0" * 100):
        kind, answer = client.ask(REQ_METADATA, payload)
        assert kind == METADATA and len(answer) == 20


def test_acks_of_a_restore_may_come_late(server: ServerProcess) -> None:
    with server.client() as client:
        write(client, support.first_changes(50))
        found = client.restore(acks=False)
        for _, version, _ in found:
            client.send(ACK, struct.pack("!I", version))
        assert client.metadata().version == 50
        assert client.restore(acks=True) == found


def test_compaction_on_request(client: OldClient) -> None:
    write(client, support.first_changes(20))
    kind, payload = client.ask(peers.COMPACT)
    found = json.loads(payload)
    assert kind == peers.COMPACT_RES and set(found) == {"before", "after"}
    assert found["before"]["version_count"] == 20
    assert found["after"]["version_count"] == client.metadata().entries < 20
    assert client.restore()[-1][1] == 20


def test_reconnect_and_resend(server: ServerProcess, url: str) -> None:
    calls = support.first_changes(4)
    for call in calls:
        with server.client() as client:
            client.send(CHANGE, peers.pack_change(*call))  # Its ACK is lost.
        with server.client() as client:
            assert client.change(*call) == (ACK, call[0])
    assert stored(url) == calls


# Running it


def refusal(*arguments: object) -> str:
    """What a server that must not start prints: one line."""
    done = support.run_cli("server", *arguments, check=1)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("Error: ")
    return str(done.stderr)


def test_port_in_use(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = f"file://{tmp_path}/other/node.bkp"
    support.make_backup(other)
    assert "Cannot listen on" in refusal(other, server.address)


def test_backup_missing(url: str) -> None:
    assert "There is no backup at" in refusal(url, "127.0.0.1:8700")


def test_backup_held_by_another_process(server: ServerProcess, url: str) -> None:
    pid = server.process.pid
    assert f"Another process (pid {pid}) holds" in refusal(url, f"127.0.0.1:{peers.free_port()}")


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1:8700", "127.0.0.1:0", ":1", ""])
def test_bad_address(address: str, url: str, backup: Path) -> None:
    assert "Cannot listen on" in refusal(url, address)
    with ServerProcess(url):  # And the backup is free again.
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_it_with_exit_code_0(number: signal.Signals, server: ServerProcess) -> None:
    with server.client() as client:
        write(client, support.first_changes(1))
        server.process.send_signal(number)
        assert server.wait() == 0
        assert client.is_closed()


def test_systemd_log_mode(url: str, backup: Path) -> None:
    with ServerProcess(url, options=("--log-mode", "systemd", "--log-level", "debug")) as server:
        with server.client() as client:
            assert client.rewind(0) == (NACK, 0)
        server.stop()
    assert all(line[0] == "<" and line[2] == ">" for line in server.lines)
    assert any(line.startswith("<5>serving ") for line in server.lines)
    assert any(line.startswith("<4>") and "refused" in line for line in server.lines)
    assert any(line.startswith("<7>") and "connected" in line for line in server.lines)


def test_plain_log_mode(server: ServerProcess) -> None:
    assert " NOTICE serving " in server.lines[-1]


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", 4), ("info", 3), ("notice", 2), ("warning", 1), ("error", 0), ("critical", 0)],
)
def test_log_levels(level: str, shown: int, url: str, backup: Path) -> None:
    server = ServerProcess(url, options=("--log-level", level))
    with contextlib.ExitStack() as stack:
        stack.push(server.__exit__)
        eventually(lambda: can_connect(server))
        with server.client() as client:
            assert client.rewind(0) == (NACK, 0)
            assert client.restore() == []
        assert server.stop() == 0
    words = ["refused", "serving", "restores", "connected"]
    assert [server.logged(word) for word in words] == [shown > n for n in range(4)]


def can_connect(server: ServerProcess) -> bool:
    """Whether it listens yet."""
    with contextlib.suppress(OSError), server.client():
        return True
    return False


def test_warning_for_an_address_that_is_not_loopback(url: str, backup: Path) -> None:
    with ServerProcess(url, host="0.0.0.0") as server:
        assert server.logged("WARNING") and server.logged("is not a loopback address")
    with ServerProcess(url) as server:
        assert not server.logged("WARNING")


def test_name_means_all_its_addresses(url: str, backup: Path) -> None:
    found = {info[4][0] for info in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)}
    with ServerProcess(url, host="localhost") as server:
        for address in found:
            with OldClient(str(address), server.port) as client:
                assert client.metadata().protocol == 1


def test_restart_goes_on_where_it_was(url: str, backup: Path) -> None:
    calls, port = support.first_changes(6), peers.free_port()
    for start in (0, 2, 4):
        with ServerProcess(url, port) as server, server.client() as client:
            assert client.metadata().version == start
            write(client, calls[start : start + 2])
            if start == 2:
                server.kill()
            else:
                assert server.stop() == 0
    assert stored(url) == calls


def failing_disk(flag: Path, retry_for_s: float) -> str:
    """A patch: while ``flag`` exists, every flush fails."""
    return (
        "import durable, errno, os; from filelog import appender\n"
        f"appender.RETRY_FOR_S = {retry_for_s}\n"
        "real = durable.flush\n"
        "def flush(fd):\n"
        f"    if os.path.exists({str(flag)!r}):\n"
        "        raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
        "    real(fd)\n"
        "durable.flush = flush"
    )


def test_failing_disk_ends_the_server_without_an_ack(
    url: str, backup: Path, tmp_path: Path
) -> None:
    flag, calls = tmp_path / "flag", support.first_changes(3)
    with ServerProcess(url, patch=failing_disk(flag, 0.2)) as server, server.client() as client:
        write(client, calls[:2])
        flag.touch()
        client.send(CHANGE, peers.pack_change(*calls[2]))
        assert client.is_closed()
        assert server.wait() == 1
        assert server.logged("CRITICAL") and server.logged("The server stops")
    flag.unlink()
    with ServerProcess(url) as server, server.client() as client:
        # What became of the change only the disk knows; either way it goes on.
        assert client.metadata().version in (2, 3)
        assert client.change(*calls[2]) == (ACK, 3)
    assert stored(url) == calls


def test_disk_that_recovers_delays_the_ack(url: str, backup: Path, tmp_path: Path) -> None:
    flag, calls = tmp_path / "flag", support.first_changes(3)
    with ServerProcess(url, patch=failing_disk(flag, 100)) as server, server.client() as client:
        write(client, calls[:2])
        flag.touch()
        client.send(CHANGE, peers.pack_change(*calls[2]))
        server.wait_for("the node has been waiting")
        flag.unlink()
        assert client.receive() == (ACK, struct.pack("!I", 3))
    assert stored(url) == calls


def test_snapshot_that_may_or_may_not_be_in_place_ends_the_server(
    url: str, backup: Path, tmp_path: Path
) -> None:
    # After a failed flush of the directory no change may go to either file.
    flag = tmp_path / "flag"
    patch = (
        "import durable, errno, os\n"
        "real = durable.replace\n"
        "def replace(beside, path):\n"
        "    real(beside, path)\n"
        f"    if os.path.exists({str(flag)!r}):\n"
        "        raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
        "durable.replace = replace"
    )
    data = database(tmp_path / "node.sqlite3", 3)
    with ServerProcess(url, patch=patch) as server, server.client() as writer:
        write(writer, support.first_changes(3))
        flag.touch()
        with server.client() as client:
            client.send(SNAPSHOT, struct.pack("!I", 3) + zlib.compress(data))
            assert client.is_closed()
        with contextlib.suppress(OSError), server.client() as client:
            client.send(CHANGE, peers.pack_change(*support.change(4, "SELECT 1")))
            assert client.is_closed()
        assert server.wait() == 1


# Size

REPORT = (
    "import atexit, re, sys\n"
    "def report():\n"
    "    status = open('/proc/self/status').read()\n"
    "    print('peak', re.search(r'VmHWM:\\s*([0-9]+) kB', status)[1], file=sys.stderr)\n"
    "atexit.register(report)"
)


def test_memory_with_a_big_snapshot_both_ways(
    url: str, backup: Path, tmp_path: Path, node_dir: Path
) -> None:
    big_database(node_dir / "lightningd.sqlite3", 160)
    with ServerProcess(url) as server:
        restored = tmp_path / "restored.sqlite3"
        for arguments in (
            ["init", "--lightning-dir", str(node_dir), server.url],
            ["restore", server.url, str(restored)],
        ):
            done = subprocess.run(
                [*peers.patched(support.CLI, REPORT), *arguments], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert int(done.stderr.split("peak ")[1]) << 10 < 64 * MIB
        assert server.peak_rss() < 64 * MIB
    assert restored.stat().st_size > 160 * MIB
    assert compare(str(restored), str(node_dir / "lightningd.sqlite3")) == []


def test_readers_while_a_node_writes(server: ServerProcess, tmp_path: Path) -> None:
    done, acknowledged = threading.Event(), [0]

    def node() -> None:
        with server.client() as client:
            for version, statements in support.first_changes(100_000):
                assert client.change(version, statements) == (ACK, version)
                acknowledged[0] = version
                if done.is_set():
                    return

    writer = threading.Thread(target=node)
    writer.start()
    try:
        eventually(lambda: acknowledged[0] > 100)
        for number in range(3):
            before, restored = acknowledged[0], tmp_path / f"{number}.sqlite3"
            assert "version:" in support.run_cli("status", server.url).stdout
            support.run_cli("restore", server.url, restored)
            with contextlib.closing(sqlite3.connect(restored)) as connection:
                ids = [row[0] for row in connection.execute("SELECT id FROM items ORDER BY id")]
            assert before <= ids[-1] <= acknowledged[0] + 1
            assert ids == list(range(2, ids[-1] + 1))
    finally:
        done.set()
        writer.join()
    assert not server.logged("takes over")
