"""A server on a damaged file: it is read up to the damage, and takes the snapshot of its owner."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from backend import Change, Snapshot
from filebackend import FileBackend
from filelog import proof
from protocol import NackCode
from remote.link import Refused
from socketbackend import SocketBackend
from tests import support
from tests.peers import NACK, ServerProcess
from tests.support import run_cli

ME, YOU = b"A" * 16, b"B" * 16


def damaged_backup(url: str) -> tuple[Path, int]:
    """A backup of ME at version 5 whose last record is damaged; and where that stands."""
    backend = FileBackend(url)
    backend.create(None, ME)
    path = Path(backend.path)
    with contextlib.closing(backend):
        backend.open(ME)
        for call in support.first_changes(5):
            backend.add_change(Change(call[0], None, call[1]))
    last = support.records_of(path)[-1][0]
    support.flip(path, last.offset + last.length // 2 + 128)
    return path, last.offset


def identity(url: str) -> bytes:
    """The backup's id."""
    return bytes.fromhex(FileBackend(url).status().backup_id or "")


def snapshot(path: Path, version: int) -> Snapshot:
    """A node's database."""
    support.apply_calls(path, support.first_changes(version))
    return Snapshot(str(path), version)


def test_it_is_served_and_mended(url: str, node_dir: Path, tmp_path: Path) -> None:
    path, offset = damaged_backup(url)
    damage = f"is damaged at offset {offset}"
    snapshot(node_dir / "lightningd.sqlite3", 6)
    with ServerProcess(url) as server:
        server.wait_for(damage)
        lock = {"backend_url": server.url, "owner": ME.hex()}
        (node_dir / "backup.lock").write_text(json.dumps(lock))
        # Readers
        done = run_cli("status", server.url, check=1)
        assert damage in done.stderr
        done = run_cli("restore", server.url, tmp_path / "restored.sqlite3", check=1)
        assert damage in done.stderr and "good up to version 4" in done.stderr
        # Writers
        with pytest.raises(Refused, match=damage) as caught:
            SocketBackend(server.url).open(ME)
        assert caught.value.code is NackCode.DAMAGED and "resync" in caught.value.next_step
        with server.client() as client:
            assert client.change(*support.change(6, "SELECT 1")) == (NACK, 5)
        # Snapshots: not of anybody, nor of an old copy; that of its owner.
        for owner, version, code in (
            (YOU, 7, NackCode.OTHER_OWNER),
            (ME, 4, NackCode.OLD_SNAPSHOT),
        ):
            with pytest.raises(Refused) as refused:
                SocketBackend(server.url).replace(snapshot(tmp_path / f"{version}", version), owner)
            assert refused.value.code is code
        done = run_cli("resync", "--yes", "--lightning-dir", node_dir)
        assert damage in done.stderr and "is now at version 6" in done.stdout
        backend = SocketBackend(server.url)
        with contextlib.closing(backend):
            backend.open(ME)
            backend.add_change(Change(7, None, support.change(7, "SELECT 1")[1]))
    assert FileBackend(url).status(check=True).damage is None
    (kept,) = path.parent.glob("*.old-*")
    assert FileBackend(f"file://{kept}").status().damage
    with ServerProcess(url) as server:
        assert SocketBackend(server.url).status().version == 7


def test_a_file_of_an_old_form_is_still_refused(url: str) -> None:
    path = Path(url.removeprefix("file://"))
    shutil.copy(support.DATA / "golden" / "layout2-rules0.bkp", path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run_cli("server", url, "127.0.0.1:1", check=1)
    assert "early form of layout 2" in done.stderr and "upgrade" in done.stderr


def test_status_over_a_socket_is_that_of_the_file(url: str) -> None:
    support.make_backup(url, support.first_changes(3))
    proof.note(FileBackend(url).path, identity(url), **proof.proven_now())
    of_file = json.loads(run_cli("status", "--json", url).stdout)
    with ServerProcess(url) as server:
        of_server = json.loads(run_cli("status", "--json", server.url).stdout)
        assert of_server.pop("layout").endswith(f"protocol 2, {of_file.pop('layout')}")
        assert of_server.pop("url") == server.url
        for status in (of_server, of_file):
            status.pop("disk_free")
        assert of_server == {key: value for key, value in of_file.items() if key != "url"}
        assert "checks all of its file each day" in run_cli("status", "--check", server.url).stdout
    with ServerProcess(url, patch="import space; space.LOW_DISK_BYTES = 1 << 60") as server:
        assert "is nearly full" in run_cli("status", server.url, check=4).stderr
    proof.note(FileBackend(url).path, identity(url), unsound="it does not replay")
    with ServerProcess(url) as server:
        assert "it does not replay" in run_cli("status", server.url, check=1).stderr
