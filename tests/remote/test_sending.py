"""A snapshot on its way to a server, over a line that breaks; how hard it is compressed."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import Snapshot
from filebackend import FileBackend
from filelog.layout2 import BEFORE_FIRST, Kind
from protocol import RecordPacker, RecordUnpacker
from remote import patience
from remote.effort import EVIDENCE, FULL, LEVELS, Effort
from remote.link import Unreachable
from socketbackend import SocketBackend
from tests import support
from tests.cutproxy import UP, CutProxy
from tests.peers import ServerProcess

MIB = 1 << 20
SIZE_MIB = 5


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """A database that does not compress."""
    database = tmp_path / "node.sqlite3"
    support.apply_calls(database, support.first_changes(1))
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE noise (data BLOB)")
        blob = random.Random(1).randbytes(SIZE_MIB * MIB)
        connection.execute("INSERT INTO noise VALUES (?)", (blob,))
        connection.commit()
    return Snapshot(str(database), 1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """It keeps an empty backup."""
    url = f"file://{tmp_path}/node.bkp"
    FileBackend(url).create(None)
    with ServerProcess(url) as process:
        yield process


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[CutProxy]:
    """The line to the server."""
    with CutProxy((server.host, server.port)) as line:
        yield line


def up(proxy: CutProxy) -> int:
    """Bytes that came from the client."""
    return sum(move.size for move in proxy.moves if move.direction == UP)


def stored(tmp_path: Path) -> bytes:
    """The snapshot that the server keeps."""
    found = support.records_of(tmp_path / "node.bkp")
    return b"".join(payload for head, payload in found if head.kind == Kind.SNAPSHOT)


def create(proxy: CutProxy, snapshot: Snapshot, retry_for: int = 60) -> None:
    """What init does."""
    SocketBackend(f"socket:127.0.0.1:{proxy.port}?retry_for={retry_for}").create(snapshot)


def test_cut_in_a_snapshot(proxy: CutProxy, snapshot: Snapshot, tmp_path: Path) -> None:
    proxy.cut_after(UP, 4 * MIB)
    create(proxy, snapshot)
    assert stored(tmp_path) == Path(snapshot.path).read_bytes()
    assert proxy.cuts == 1
    # What was on its way when the line broke is sent again, not all.
    assert up(proxy) < (SIZE_MIB + 3) * MIB
    assert not list(tmp_path.glob("*.scratch-in-*"))


def test_line_that_breaks_without_a_word(
    server: ServerProcess, proxy: CutProxy, snapshot: Snapshot, tmp_path: Path
) -> None:
    """The server still waits at the old connection when the client comes by a new one."""

    def hold() -> None:
        server.wait_for("connected")
        while up(proxy) < 2 * MIB:
            time.sleep(0.001)
        proxy.hold()

    thread = threading.Thread(target=hold)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remote.link.ANSWER_TIMEOUT_S", 2.0)
        patch.setattr("remote.sending.SNAPSHOT_TIMEOUT_S", 2.0)
        create(proxy, snapshot)
    thread.join()
    assert stored(tmp_path) == Path(snapshot.path).read_bytes()


@pytest.mark.parametrize("size", [0, 100])
def test_answer_that_is_lost(
    size: int, proxy: CutProxy, snapshot: Snapshot, tmp_path: Path
) -> None:
    """All of it came, and only the ACK did not: it is not sent again."""
    total = Path(snapshot.path).stat().st_size
    proxy.cut_after(UP, total + size)
    with contextlib.suppress(Unreachable):
        create(proxy, snapshot)
    assert stored(tmp_path) == Path(snapshot.path).read_bytes()
    assert up(proxy) < total + 3 * MIB


def test_no_more_of_it_within_retry_for(proxy: CutProxy, snapshot: Snapshot) -> None:
    proxy.cut_after(UP, MIB)
    with pytest.raises(Unreachable):
        create(proxy, snapshot, retry_for=0)


def test_another_snapshot_takes_the_place_of_what_was_left(
    server: ServerProcess, proxy: CutProxy, snapshot: Snapshot, tmp_path: Path
) -> None:
    proxy.cut_after(UP, 3 * MIB)
    with pytest.raises(Unreachable):
        create(proxy, snapshot, retry_for=0)
    create(proxy, Snapshot(snapshot.path, 1))
    assert stored(tmp_path) == Path(snapshot.path).read_bytes()
    assert not list(tmp_path.glob("*.scratch-in-*"))


# How hard it is compressed


class Line:
    """A line of ``rate`` bytes a second behind a buffer, and what time it is there."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.now_s = self.queued = 0.0

    def wait(self, time_s: float) -> None:
        """Let it take bytes for so long."""
        self.now_s += time_s
        self.queued = max(0.0, self.queued - time_s * self.rate)

    def send(self, size: int) -> None:
        """Wait until the buffer of 4 MiB has room for them."""
        self.queued += size
        self.wait(max(0.0, self.queued - 4 * MIB) / self.rate)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(1e4, LEVELS[0]), (1e6, LEVELS[0]), (30e6, 1), (500e6, 0)],
)
def test_level_that_is_the_quickest(rate: float, expected: int) -> None:
    line = Line(rate)
    effort = Effort(lambda: line.now_s)
    costs = {LEVELS[0]: (30e-3, 0.3), 1: (12e-3, 0.35), 0: (1e-3, 1.0)}
    for level, (took_s, share) in costs.items():
        effort.tried(level, MIB, round(share * MIB), took_s)
    used: list[int] = []
    for _ in range(300):
        took_s, share = costs[effort.level]
        used.append(effort.level)
        line.wait(took_s)
        line.send(round(share * MIB))
        effort.sent(round(share * MIB), round(line.queued))
    assert used[-1] == expected and used.count(expected) > 250
    if expected == LEVELS[0]:
        assert set(used) == {expected}


def test_line_that_cannot_be_measured() -> None:
    effort = Effort()
    for _ in range(100):
        effort.tried(LEVELS[0], MIB, MIB, 1.0)
        effort.sent(EVIDENCE + FULL, None)
    assert effort.level == LEVELS[0]


def test_levels_change_in_mid_stream() -> None:
    packer, unpacker, noise = RecordPacker(), RecordUnpacker(), random.Random(1)
    head = BEFORE_FIRST._replace(kind=Kind.SNAPSHOT)
    for number in range(60):
        packer.go_on_at(noise.choice([0, 1, 4, 9]))
        size = noise.choice([1, 1000, 65535, 65536, MIB])
        payload = noise.randbytes(size) if number % 2 else bytes(size)
        packet = packer.pack(head._replace(length=size), payload)
        found, content = unpacker.unpack(packet[5:])
        assert content == payload and found.length == size
