"""What a server does with the snapshots of anybody: looked at first, beside its other work."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import socket
import sqlite3
import threading
import zlib
from pathlib import Path
from unittest import mock

import pytest

from backend import MAX_CHUNK_SIZE, NOBODY, Snapshot
from errors import BackupError, DiskError
from filebackend import FileBackend
from filelog.layout2 import Kind
from filelog.reader import LogReader
from filelog.writer import LogWriter, check_log
from protocol import Details, Metadata, Nack, NackCode, PacketType, encode_metadata, encode_nack
from remote.link import Link, Refused
from serving import rules
from serving.keeper import log_of
from serving.rules import Offer
from serving.spool import Spool
from socketbackend import SocketBackend
from tests import peers, support
from tests.peers import ServerProcess
from tests.test_server import eventually, names, write

ME, YOU = b"A" * 16, b"B" * 16
MINE, YOURS = "02" + "aa" * 32, "03" + "bb" * 32
HUGE = "printf('%.*c', 30000000, 'a')"
ENDLESS = f"instr({HUGE}, printf('%.*c', 100000, 'a') || 'b')"
"""One step of SQLite that takes many minutes."""


def node_database(path: Path, version: int, node: str | None = None, *statements: str) -> Snapshot:
    """A node's database."""
    support.apply_calls(path, support.first_changes(version))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if node is not None:
            connection.execute("ALTER TABLE vars ADD COLUMN blobval BLOB")
            connection.execute(f"INSERT INTO vars (name, blobval) VALUES ('node_id', x'{node}')")
        for statement in statements:
            connection.execute(statement)
    return Snapshot(str(path), version)


def refusal(server: ServerProcess, snapshot: Snapshot, owner: bytes = NOBODY) -> Refused:
    """What the server says to ``snapshot``."""
    with pytest.raises(Refused) as caught:
        SocketBackend(server.url).replace(snapshot, owner)
    return caught.value


def damaged(snapshot: Snapshot) -> Snapshot:
    """``snapshot`` with a page of a table overwritten."""
    path = Path(snapshot.path)
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(range(256)) * 16
    path.write_bytes(data)
    return snapshot


def test_pages_that_do_not_check_are_refused(url: str, tmp_path: Path) -> None:
    filler = ["CREATE TABLE filler (x)", "INSERT INTO filler VALUES (zeroblob(20000))"]
    backup = support.make_backup(url, support.first_changes(3))
    before = names(backup) | {"node.bkp.writer"}
    with ServerProcess(url) as server:
        snapshot = damaged(node_database(tmp_path / "node", 4, None, *filler))
        found = refusal(server, snapshot)
        assert found.code is NackCode.INVALID and "It is not sound" in found.problem
        eventually(lambda: names(backup) == before)
    assert FileBackend(url).status().version == 3


def examined_by(directory: Path, code: str, limits: str = "") -> str:
    """A patch: a snapshot is examined by a process that executes ``code`` first."""
    program = directory / "examine.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(support.ROOT)!r})\nfrom upkeep import examine\n"
        f"real = examine._look\n{code}\nexamine.main(*sys.argv[1:])\n"
    )
    return f"from upkeep import examine; examine.__file__ = {str(program)!r}; {limits}"


@pytest.mark.parametrize(
    ("limits", "computes"),
    [
        ("examine._look = lambda path, log, _: real(path, log, 2)", f"x > {ENDLESS}"),
        ("examine.MAX_MEMORY = 400 << 20", "length(hex(zeroblob(300000000))) > x"),
    ],
    ids=["time", "memory"],
)
def test_what_computes_without_end_is_ended(
    limits: str, computes: str, url: str, tmp_path: Path
) -> None:
    """And the next snapshot is taken."""
    support.make_backup(url, support.first_changes(3))
    table = ["CREATE TABLE t (x)", "INSERT INTO t VALUES (1)", "PRAGMA writable_schema = ON"]
    definition = f"CREATE TABLE t (x CHECK ({computes}))".replace("'", "''")
    table.append(f"UPDATE sqlite_master SET sql = '{definition}' WHERE name = 't'")
    snapshot = node_database(tmp_path / "node", 4, None, *table)
    with ServerProcess(url, patch=examined_by(tmp_path, limits)) as server:
        found = refusal(server, snapshot)
        assert found.code is NackCode.INVALID
        assert re.search("did not end within|no memory", found.problem)
        SocketBackend(server.url).replace(node_database(tmp_path / "next", 4))
    assert FileBackend(url).status().version == 4


def test_an_examination_that_hangs_is_killed(url: str, tmp_path: Path) -> None:
    support.make_backup(url)
    hanging = "import time; examine._look = lambda *_: time.sleep(1000)"
    patch = examined_by(tmp_path, hanging, "examine.LIMIT_S = 0.1")
    with ServerProcess(url, patch=patch) as server:
        found = refusal(server, node_database(tmp_path / "node", 1))
        assert "did not end within 0 s" in found.problem and "it was killed" in found.problem


def test_metadata_and_changes_wait_for_no_snapshot(url: str, tmp_path: Path) -> None:
    support.make_backup(url, support.first_changes(2))
    flag = tmp_path / "flag"
    patch = (
        "import os, serving.keeper, time\nreal = serving.keeper.check_log\n"
        "def check_log(*arguments):\n"
        "    real(*arguments)\n"
        f"    open({str(flag)!r} + '.waiting', 'w').close()\n"
        f"    while os.path.exists({str(flag)!r}):\n"
        "        time.sleep(0.005)\n"
        "serving.keeper.check_log = check_log"
    )
    flag.touch()
    data = Path(node_database(tmp_path / "node", 5).path).read_bytes()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess(url, patch=patch))
        sending, writer = (stack.enter_context(server.client()) for _ in range(2))
        sending.send(peers.SNAPSHOT, (5).to_bytes(4, "big") + zlib.compress(data))
        eventually((tmp_path / "flag.waiting").exists)
        assert writer.metadata().version == 2
        write(writer, support.first_changes(3)[2:])
        flag.unlink()
        assert sending.receive() == (peers.NACK, (3).to_bytes(4, "big"))
        server.wait_for("a newer connection has written")
    assert FileBackend(url).status().version == 3


@pytest.mark.parametrize(
    "sizes",
    [
        [MAX_CHUNK_SIZE, MAX_CHUNK_SIZE],
        [MAX_CHUNK_SIZE, MAX_CHUNK_SIZE, 7],
        [1, MAX_CHUNK_SIZE, MAX_CHUNK_SIZE - 1],
        [600_000, 600_000, 5, 900_000, MAX_CHUNK_SIZE],
        [11],
    ],
    ids=str,
)
def test_the_log_is_written_of_pieces_of_any_size(sizes: list[int], url: str) -> None:
    backup = support.make_backup(url)
    snapshot = Snapshot(f"{backup}.scratch-in-1", 5)
    pieces = [random.randbytes(size) for size in sizes]
    spool = Spool(FileBackend(url), snapshot, Offer(5, ME), rules.snapshot)
    with contextlib.closing(spool):
        for piece in pieces:
            spool.add(piece)
        spool.finish("their machine")
        check_log(log_of(snapshot))
        with contextlib.closing(LogReader(log_of(snapshot))) as reader:
            found = [(head, payload) for head, payload in reader]
            assert "their machine took it over" in reader.taken_over()
        assert Path(snapshot.path).read_bytes() == b"".join(pieces)
    (*snapshots, (last, _)) = found
    assert b"".join(payload for _, payload in snapshots) == b"".join(pieces)
    assert {(head.version, head.chain) for head, _ in found} == {(5, snapshot.chain)}
    assert (last.kind, last.session) == (Kind.OWNER, ME)
    assert not list(backup.parent.glob("*.scratch-*"))


def test_a_snapshot_that_lacks_a_piece_is_not_gone_on_with(url: str, tmp_path: Path) -> None:
    """Its database may be whole, and its log not."""
    backup = support.make_backup(url)
    patch = (
        "from filelog import writer\n"
        "real, pieces = writer.LogWriter.add_piece, []\n"
        "def add_piece(*arguments):\n"
        "    pieces.append(1)\n"
        "    if len(pieces) == 3:\n"
        "        raise MemoryError\n"
        "    real(*arguments)\n"
        "writer.LogWriter.add_piece = add_piece"
    )
    snapshot = node_database(tmp_path / "node", 3, None, *FILLER)
    with ServerProcess(url, patch=patch) as server:
        SocketBackend(server.url).replace(snapshot)
        assert server.logged("out of memory")
    with contextlib.closing(LogReader(str(backup))) as reader:
        found = b"".join(payload for head, payload in reader if head.kind == Kind.SNAPSHOT)
    assert found == Path(snapshot.path).read_bytes()


def test_a_log_that_cannot_be_begun_leaves_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = support.make_backup(url)
    backend, snapshot = FileBackend(url), Snapshot(f"{backup}.scratch-in-1", 5)
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "full"))
    monkeypatch.setattr("durable.write_all", full)
    with pytest.raises(DiskError):
        Spool(backend, snapshot, Offer(5, ME), rules.snapshot)
    assert full.called and not list(backup.parent.glob("*.scratch-*"))


def test_a_log_that_fails_when_it_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over NFS, where what was written may find no room then."""
    backup = support.make_backup(url)
    snapshot = Snapshot(f"{backup}.scratch-in-1", 5)
    spool = Spool(FileBackend(url), snapshot, Offer(5, ME), rules.snapshot)
    real = LogWriter.close

    def close(log: LogWriter) -> None:
        real(log)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(LogWriter, "close", close)
    spool.close()
    assert not list(backup.parent.glob("*.scratch-*"))


@pytest.mark.parametrize("lost", ["1", "2"], ids=["in the middle", "at the end"])
def test_a_log_that_is_not_the_database_takes_no_place(lost: str, url: str, tmp_path: Path) -> None:
    """Each of the two is sound by itself; the last piece is lost with its end moved, too."""
    path = support.make_backup(url, support.first_changes(3))
    patch = (
        "import filelog.writer as s\nreal, seen = s.LogWriter.add_piece, []\n"
        "def add_piece(self, head, piece):\n"
        "    seen.append((head, piece))\n"
        f"    if {lost} == 1 and len(seen) == 2: return\n"
        f"    if {lost} == 2 and head.flags:\n"
        "        head, piece = head._replace(length=4096), piece[:4096]\n"
        "    real(self, head, piece)\n"
        "s.LogWriter.add_piece = add_piece"
    )
    filler = ["CREATE TABLE filler (x)", "INSERT INTO filler VALUES (randomblob(3000000))"]
    before = names(path) | {"node.bkp.writer"}
    with ServerProcess(url, patch=patch) as server:
        found = refusal(server, node_database(tmp_path / "node", 4, None, *filler))
        assert found.code is NackCode.INVALID and "What was written of it is not" in found.problem
        eventually(lambda: names(path) == before)
    assert FileBackend(url).status().version == 3


def test_only_the_owner_replaces_a_backup(url: str, tmp_path: Path) -> None:
    FileBackend(url).create(node_database(tmp_path / "first", 3), ME)
    with ServerProcess(url) as server:
        found = refusal(server, node_database(tmp_path / "yours", 4), YOU)
        assert found.code is NackCode.OTHER_OWNER and "belongs to another node" in found.problem
        assert "must stay off" in found.next_step and "--override" not in found.next_step
        SocketBackend(server.url).replace(node_database(tmp_path / "mine", 5), ME)
        yours = node_database(tmp_path / "again", 6)
        SocketBackend(server.url).replace(yours, YOU, override=True)
        late = node_database(tmp_path / "late", 7)
        assert refusal(server, late, ME).code is NackCode.OTHER_OWNER


def test_a_backup_of_another_node_is_refused(url: str, tmp_path: Path) -> None:
    FileBackend(url).create(node_database(tmp_path / "first", 3, MINE), ME)
    with ServerProcess(url) as server:
        yours = node_database(tmp_path / "yours", 4, YOURS)
        for _ in range(2):  # The second time its node is remembered.
            found = refusal(server, yours, ME)
            assert found.code is NackCode.OTHER_NODE and "resync --override" in found.next_step
        SocketBackend(server.url).replace(node_database(tmp_path / "mine", 5, MINE), ME)
        SocketBackend(server.url).replace(
            node_database(tmp_path / "meant", 6, YOURS), YOU, override=True
        )
        found = refusal(server, node_database(tmp_path / "late", 7, MINE), YOU)
        assert found.code is NackCode.OTHER_NODE


def test_what_is_kept_is_limited(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, support.first_changes(1))
    with ServerProcess(url) as server:

        def replace(version: int, override: bool) -> list[int]:
            snapshot = node_database(tmp_path / f"at-{version}", version)
            SocketBackend(server.url).replace(snapshot, override=override)
            return sorted(
                FileBackend(f"file://{kept}").status().version
                for kept in path.parent.glob("*.old-*")
            )

        assert [replace(version, False) for version in (2, 3)] == [[1], [1, 2]]
        # None that may be the one that is missed is removed for another node's.
        assert [replace(version, True) for version in (4, 5)] == [[1, 2, 3], [1, 2, 3, 4]]
        with pytest.raises(BackupError, match="none of them is removed"):
            replace(6, True)
        SocketBackend(server.url).replace(node_database(tmp_path / "last", 7))
        eventually(lambda: len(list(path.parent.glob("*.old-*"))) == 2)


def test_no_thread_is_left_for_the_log(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url)
    before = names(path) | {"node.bkp.writer"}
    patch = (
        "import concurrent.futures as f\n"
        'def submit(*_): raise RuntimeError("can\'t start new thread")\n'
        "f.ThreadPoolExecutor.submit = submit"
    )
    with ServerProcess(url, patch=patch) as server:
        found = refusal(server, node_database(tmp_path / "node", 4))
        assert "cannot be written now: can't start new thread" in found.problem
        eventually(lambda: names(path) == before)


FILLER = ["CREATE TABLE filler (x)", "INSERT INTO filler VALUES (randomblob(20 << 20))"]
FULL = "import space\nspace.RESERVE = 1 << 60"


def test_a_full_disk_is_a_reason(url: str, node_dir: Path) -> None:
    """`init` names it: that is not a server that cannot be reached."""
    support.make_backup(url)
    snapshot = node_database(node_dir / "lightningd.sqlite3", 3, None, *FILLER)
    with ServerProcess(url, patch=FULL) as server:
        found = refusal(server, snapshot)
        assert found.code is NackCode.NO_ROOM
        assert "MiB are free" in found.problem and "Make room" in found.next_step
        done = support.run_cli("init", "--lightning-dir", node_dir, server.url, check=1)
        assert "too little room" in done.stderr and "cannot be reached" not in done.stderr
    assert not (node_dir / "backup.lock").exists()


@pytest.mark.parametrize("heard", [0, 1000], ids=["at once", "when it closes"])
def test_an_answer_is_heard_before_all_was_sent(
    heard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server said, though the rest is of no use, or cannot be sent any more."""
    snapshot = node_database(tmp_path / "node", 3, None, *FILLER)
    nack = encode_nack(Nack(0, NackCode.NO_ROOM, "refused: the disk is full"))
    details = Details(bytes(16), 0, bytes(16), bytes(16), bytes(16), 0, 64, "a server")
    metadata = encode_metadata(Metadata(2, 0, 0, 0, details))
    listener = socket.create_server(("127.0.0.1", 0))
    sent: list[int] = []
    real = Link.send

    def counted(link: Link, data: bytes) -> None:
        if data[0] == PacketType.RECORD:
            sent.append(len(data))
        real(link, data)

    monkeypatch.setattr(Link, "send", counted)

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            sock.recv(1000)
            sock.sendall(metadata + (nack if not heard else b""))
            if heard:
                sock.recv(heard)
                sock.sendall(nack)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(Refused, match="the disk is full"):
        SocketBackend(f"socket:127.0.0.1:{listener.getsockname()[1]}").replace(snapshot)
    thread.join()
    assert bool(sent) == bool(heard)
