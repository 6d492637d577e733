"""The copy of a server's backup, over a line that breaks."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from backend import Change, Snapshot, bump, outcome
from errors import BackupBusy, BackupError
from filebackend import FileBackend
from filelog.layout2 import Head, Kind
from remote import patience
from remote.address import parse_socket_url
from remote.fetching import SUFFIX, Copy, fetched
from remote.link import Unreachable
from space import NoRoom
from tests import support
from tests.cutproxy import DOWN, CutProxy
from tests.peers import ServerProcess
from wallet.database import compare

SNAPSHOT_MIB = 3
CHANGES = 30


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def kept(tmp_path: Path) -> FileBackend:
    """A backup with a snapshot of several pieces, and changes that do not compress."""
    database, noise = tmp_path / "node.sqlite3", random.Random(1)
    support.apply_calls(database, support.first_changes(1))
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE noise (data BLOB)")
        blob = noise.randbytes(SNAPSHOT_MIB << 20)
        connection.execute("INSERT INTO noise VALUES (?)", (blob,))
        connection.commit()
    backend = FileBackend(f"file://{tmp_path}/node.bkp")
    backend.create(Snapshot(str(database), 1))
    with contextlib.closing(backend):
        backend.open()
        for version in range(2, CHANGES + 2):
            insert = f"INSERT INTO noise VALUES (x'{noise.randbytes(1 << 14).hex()}')"
            backend.add_change(Change(version, None, [insert, bump(version)]))
    return backend


@pytest.fixture
def server(kept: FileBackend) -> Iterator[ServerProcess]:
    """It serves ``kept``."""
    with ServerProcess(kept.url) as process:
        yield process


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[CutProxy]:
    """The line to the server."""
    with CutProxy((server.host, server.port)) as line:
        yield line


def records(path: str | Path) -> list[tuple[Head, bytes]]:
    """All that a log holds."""
    return support.records_of(Path(path))


def down(proxy: CutProxy) -> int:
    """Bytes that came to the client."""
    return sum(move.size for move in proxy.moves if move.direction == DOWN)


def fetch(
    proxy: CutProxy, prefix: Path, retry_for: int = 60
) -> contextlib.AbstractContextManager[Copy | None]:
    """The copy, over ``proxy``."""
    url = parse_socket_url(f"socket:127.0.0.1:{proxy.port}?retry_for={retry_for}")
    return fetched(url, f"{prefix}/", lambda done, total: None)


def test_cut_in_the_snapshot(kept: FileBackend, proxy: CutProxy, tmp_path: Path) -> None:
    """A new connection goes on behind the last whole record, by itself."""
    place = tmp_path / "here"
    place.mkdir()
    proxy.cut_after(DOWN, (2 << 20) + (1 << 18))
    with fetch(proxy, place) as copy:
        assert copy is not None and copy.damage is None
        assert records(copy.path) == records(kept.path)
        with contextlib.closing(copy.read()) as reading:
            assert outcome(reading).version == CHANGES + 1
    assert proxy.cuts == 1 and proxy.connections == 2
    assert down(proxy) < kept.size + (1 << 20)
    assert list(place.iterdir()) == []


def test_next_run_goes_on(kept: FileBackend, proxy: CutProxy, tmp_path: Path) -> None:
    proxy.cut_after(DOWN, (2 << 20) + 5000)
    with pytest.raises(Unreachable), fetch(proxy, tmp_path, retry_for=0):
        pass
    (left,) = tmp_path.glob(f"*{SUFFIX}")
    whole = list(records(kept.path))
    assert left.stat().st_size > 1 << 20
    # As a run that was killed leaves it.
    with open(left, "ab") as file:
        file.write(b"\xc5rec, but no record")
    before = down(proxy)
    with fetch(proxy, tmp_path) as copy:
        assert copy is not None and records(copy.path) == whole
    assert down(proxy) - before < kept.size - (1 << 20)
    assert not left.exists()


def test_copy_is_kept_until_it_was_of_use(
    kept: FileBackend, proxy: CutProxy, tmp_path: Path
) -> None:
    with contextlib.suppress(KeyError), fetch(proxy, tmp_path) as copy:
        assert copy is not None
        with pytest.raises(BackupBusy):
            Copy(copy.path)
        raise KeyError  # As a replay that fails.
    before = down(proxy)
    with fetch(proxy, tmp_path) as copy:
        assert copy is not None and records(copy.path) == records(kept.path)
    assert down(proxy) - before < 1000


def test_compacted_meanwhile(
    kept: FileBackend, server: ServerProcess, proxy: CutProxy, tmp_path: Path
) -> None:
    """The place to go on from is not there any more."""
    proxy.cut_after(DOWN, (SNAPSHOT_MIB << 20) + (1 << 17))
    with pytest.raises(Unreachable), fetch(proxy, tmp_path, retry_for=0):
        pass
    support.run_cli("compact", server.url)
    with fetch(proxy, tmp_path) as copy:
        assert copy is not None and records(copy.path) == records(kept.path)
        kinds = [head.kind for head, _ in records(copy.path)]
    assert kinds[-1] == Kind.CHANGE and kinds.count(Kind.CHANGE) < CHANGES


def test_no_room(proxy: CutProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "RESERVE", 1 << 60)
    with pytest.raises(NoRoom), fetch(proxy, tmp_path):
        pass
    assert list(tmp_path.glob(f"*{SUFFIX}")) == []


def test_file_of_another_user_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    path.symlink_to(tmp_path / "other")
    with pytest.raises(BackupError):
        Copy(str(path))
    assert not (tmp_path / "other").exists()


def test_damage_of_the_server(kept: FileBackend, proxy: CutProxy, tmp_path: Path) -> None:
    """What stands before it comes, and the pass says what is wrong."""
    damaged = records(kept.path)[-5][0]
    support.flip(Path(kept.path), damaged.offset + 500)
    for _ in range(2):
        with contextlib.suppress(KeyError), fetch(proxy, tmp_path) as copy:
            assert copy is not None
            with contextlib.closing(copy.read()) as reading:
                ending = outcome(reading)
            raise KeyError
        assert ending.version == damaged.version - 1
        assert f"at offset {damaged.offset}" in str(ending.damage)


def test_restore_and_verify_over_a_line_that_breaks(
    kept: FileBackend, proxy: CutProxy, tmp_path: Path
) -> None:
    expected, restored = tmp_path / "expected.sqlite3", tmp_path / "restored.sqlite3"
    support.run_cli("restore", kept.url, expected)
    proxy.cut_after(DOWN, (2 << 20) + 5000)
    url = f"socket:127.0.0.1:{proxy.port}"
    done = support.run_cli("restore", url, restored)
    assert "The line broke" in done.stderr
    assert compare(str(expected), str(restored)) == []
    proxy.cut_after(DOWN, 3 << 20)
    support.run_cli("verify", "--scratch", tmp_path, "--against", restored, url)
    assert list(tmp_path.glob(f"*{SUFFIX}")) == []
