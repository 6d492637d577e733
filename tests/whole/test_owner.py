"""Who may write: the owner in backup.lock and in the backup, over a file and over a server."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import NOBODY, Change, bump
from errors import BackupError, OtherOwner
from filebackend import FileBackend
from filelog import layout2
from filelog.layout2 import Kind
from protocol import Details, Metadata, encode_metadata
from remote.link import Refused
from socketbackend import SocketBackend
from tests import support
from tests.peers import METADATA, REQ_METADATA, OldServer, ServerProcess
from tests.support import PluginProcess, change, first_changes, run_cli
from upkeep import compaction

ME, OTHER = secrets.token_bytes(16), secrets.token_bytes(16)


@pytest.fixture(params=["file", "socket"])
def place(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    """URL of an empty backup of nobody's, in a file or on a server."""
    support.make_backup(url)
    if request.param == "file":
        yield url
        return
    with ServerProcess(url) as server:
        yield server.url


def backend_at(place: str) -> FileBackend | SocketBackend:
    return SocketBackend(place) if place.startswith("socket:") else FileBackend(place)


def write(place: str, owner: bytes | None, version: int) -> None:
    """A session of ``owner`` with one change."""
    backend = backend_at(place)
    backend.open(owner)
    try:
        backend.add_change(Change(version, None, [bump(version)]))
    finally:
        backend.close()


def claim(place: str, owner: bytes) -> None:
    backend = backend_at(place)
    backend.open()
    backend.take_over(owner)
    backend.close()


def test_only_the_owner_writes(place: str) -> None:
    write(place, NOBODY, 1)
    with pytest.raises(BackupError, match="nobody's"):
        write(place, ME, 2)
    claim(place, ME)
    write(place, ME, 2)
    for stranger in (OTHER, NOBODY):
        with pytest.raises(BackupError, match=r"belongs to another node: .* took it over at 20"):
            write(place, stranger, 3)
    claim(place, OTHER)
    with pytest.raises(BackupError, match="belongs to another node"):
        write(place, ME, 3)
    write(place, OTHER, 3)
    assert backend_at(place).status().version == 3
    assert backend_at(place).status().owner == OTHER[:8].hex()


def test_a_take_over_repeats_what_it_stands_behind(url: str) -> None:
    path = support.make_backup(url, first_changes(3))
    before = support.records_of(path)[-1][0]
    claim(url, ME)
    owner, payload = support.records_of(path)[-1]
    assert owner.kind == Kind.OWNER and owner.session == ME and owner.rewindable
    assert layout2.decode_owner(payload)[1] == os.uname().nodename
    for name in ("version", "changes", "time_ns", "chain_before", "chain"):
        assert getattr(owner, name) == getattr(before, name)


def test_the_change_before_a_take_over_can_be_rewound(place: str) -> None:
    for version in (1, 2):
        write(place, NOBODY, version)
    claim(place, ME)
    backend = backend_at(place)
    backend.open(ME)
    assert (backend.version, backend.rewindable) == (2, True)
    backend.rewind()
    backend.add_change(Change(2, None, ["-- instead", bump(2)]))
    backend.close()
    with_content = [c for _, c in support.passed(backend_at(place).read()).calls]
    assert with_content == [[bump(1)], ["-- instead", bump(2)]]


def test_an_open_session_ends_with_the_take_over(url: str) -> None:
    support.make_backup(url)
    with ServerProcess(url) as server:
        running = SocketBackend(server.url)
        running.open()
        running.add_change(Change(1, None, [bump(1)]))
        claim(server.url, OTHER)
        with pytest.raises(BackupError, match="another node"):
            running.add_change(Change(2, None, [bump(2)]))
        server.stop()
    assert FileBackend(url).status().version == 1
    with ServerProcess(url) as server, pytest.raises(Refused, match="took it over"):
        SocketBackend(server.url).open(NOBODY)


@pytest.mark.parametrize("rest", [0, 1, 3])
def test_a_compaction_keeps_the_owner(rest: int, url: str) -> None:
    path = support.make_backup(url, first_changes(4))
    claim(url, OTHER)
    claim(url, ME)
    for version in range(5, 5 + rest):
        write(url, ME, version)
    before = [r for r in support.records_of(path) if r[0].kind == Kind.OWNER][-1]
    run_cli("compact", url)
    heads = support.records_of(path)
    assert heads[0][0].kind == Kind.SNAPSHOT
    after = [r for r in heads if r[0].kind == Kind.OWNER][-1]
    assert (after[1], after[0].session) == (before[1], ME)
    with pytest.raises(OtherOwner):
        write(url, OTHER, 5 + rest)
    write(url, ME, 5 + rest)


def test_a_take_over_right_behind_what_a_compaction_folds(url: str) -> None:
    path = support.make_backup(url, first_changes(3))
    with contextlib.closing(FileBackend(url)) as backend:
        backend.open()
        backend.rewind()  # It is the newest record, and folded, too.
        prefix = f"{backend.scratch_prefix}compact"
        built = compaction.build(str(path), prefix)
        backend.take_over(ME)
        backend.adopt(f"{prefix}-log", built["copied"], built["last"])
        compaction.remove_scratch(prefix)
    write(url, ME, 3)
    assert FileBackend(url).status(check=True).damage is None
    assert "sound" in run_cli("compact", url).stdout + run_cli("verify", url).stdout
    write(url, ME, 4)


def node_at(directory: Path, version: int) -> Path:
    path = directory / "lightningd.sqlite3"
    path.unlink(missing_ok=True)
    support.apply_calls(path, first_changes(version))
    return path


def test_each_command_sets_an_owner(node_dir: Path, url: str) -> None:
    node_at(node_dir, 3)
    owners = set()

    def owner() -> str:
        found = str(json.loads((node_dir / "backup.lock").read_text())["owner"])
        assert FileBackend(url).status().owner == found[:16]
        return found

    run_cli("init", "--lightning-dir", node_dir, url)
    owners.add(owner())
    node_at(node_dir, 5)
    run_cli("resync", "--yes", "--lightning-dir", node_dir)
    assert owner() in owners, "the same node"
    run_cli("attach", "--lightning-dir", node_dir, url)
    owners.add(owner())
    run_cli("resync", "--yes", "--override", "--lightning-dir", node_dir)
    owners.add(owner())
    assert len(owners) == 3


def test_resync_replaces_a_file_that_had_no_owner_yet(node_dir: Path, url: str) -> None:
    node_at(node_dir, 8)
    path = Path(url.removeprefix("file://"))
    shutil.copy(support.DATA / "golden" / "layout2-rules0.bkp", path)
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    run_cli("resync", "--yes", "--lightning-dir", node_dir)
    owner = json.loads((node_dir / "backup.lock").read_text())["owner"]
    found = FileBackend(url).status()
    assert (found.version, found.owner) == (8, owner[:16])


@pytest.mark.parametrize("done", [False, True])
def test_resync_that_fails_late_leaves_the_lock_that_fits(
    done: bool, node_dir: Path, url: str
) -> None:
    """Once the new backup stands, its owner stays in backup.lock; before that, the old one."""
    node_at(node_dir, 5)
    support.make_backup(url, first_changes(3))
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from commands import main; from errors import BackupError; import filebackend\n"
        "real = filebackend.FileBackend.replace\n"
        "def replace(*arguments, **named):\n"
        f"    if {done}: real(*arguments, **named)\n"
        "    raise BackupError('the answer is lost')\n"
        "filebackend.FileBackend.replace = replace\n"
        "main()\n"
    )
    words = ["resync", "--yes", "--lightning-dir", str(node_dir)]
    command = [sys.executable, "-c", code, str(support.ROOT), *words]
    assert subprocess.run(command, capture_output=True).returncode == 1
    found = json.loads((node_dir / "backup.lock").read_text()).get("owner", NOBODY.hex())
    assert FileBackend(url).status().owner == found[:16]
    run_cli("resync", "--yes", "--lightning-dir", node_dir)


def test_the_old_node_is_refused_by_name(node_dir: Path, place: str, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    if place.startswith("file:"):
        Path(place.removeprefix("file://")).unlink()
    run_cli("init", "--lightning-dir", node_dir, place)
    elsewhere = support.network_dir(tmp_path / "elsewhere")
    run_cli("restore", place, elsewhere)
    run_cli("attach", "--lightning-dir", elsewhere, place)
    with PluginProcess(elsewhere) as plugin:
        plugin.write(*change(4, "SELECT 1"))
        assert plugin.close() == 0
    with PluginProcess(node_dir) as plugin:
        with pytest.raises(support.Refused):
            plugin.write(*change(4, "SELECT 2"))
        assert any("belongs to another node" in line for line in plugin.errors())
        assert any("attach --lightning-dir" in line for line in plugin.errors())
    # Nor may it put its own state in place of the other's.
    node_at(node_dir, 9)
    done = run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
    assert "belongs to another node" in done.stderr
    assert backend_at(place).status().version == 4
    run_cli("resync", "--yes", "--override", "--lightning-dir", node_dir)
    assert backend_at(place).status().version == 9


def test_an_emptied_place_is_noticed(node_dir: Path, url: str) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    path = url.removeprefix("file://")
    shutil.move(path, f"{path}.away")
    support.make_backup(url)
    with PluginProcess(node_dir) as plugin:
        with pytest.raises(support.Refused):
            plugin.write(*first_changes(1)[0])
        assert any("is nobody's" in line for line in plugin.errors())


def test_protocol_1_writes_only_what_is_nobodys(url: str) -> None:
    support.make_backup(url)
    with ServerProcess(url) as server:
        with server.client() as client:
            assert client.change(*first_changes(1)[0])[0] == 6
        claim(server.url, ME)
        with server.client() as client:
            client.metadata()
            assert client.change(*first_changes(2)[1])[0] == 7
    assert FileBackend(url).status().version == 1


def test_a_writer_of_1_0_writes_only_what_is_nobodys(url: str) -> None:
    """It offers protocol 2, but cannot name an owner: its sessions would be taken for one."""
    support.make_backup(url)
    with ServerProcess(url) as server:
        with server.client() as client:
            kind, answer = client.ask(REQ_METADATA, b"\0\0\0\2")
            assert (kind, answer[:4]) == (METADATA, b"\0\0\0\1")
            assert client.change(*first_changes(1)[0])[0] == 6
        write(server.url, NOBODY, 2)
        claim(server.url, ME)
        with server.client() as client:
            client.ask(REQ_METADATA, b"\0\0\0\2")
            assert client.change(*change(3, "SELECT 1"))[0] == 7


@pytest.mark.parametrize("owner", [ME, NOBODY], ids=["owner", "nobody"])
def test_protocol_1_is_refused_once_protocol_2_has_written(owner: bytes, url: str) -> None:
    """Also by nobody, also after a restart; the operator may allow it."""
    support.make_backup(url)
    calls = first_changes(4)
    with ServerProcess(url) as server:
        with server.client() as client:
            assert client.change(*calls[0])[0] == 6
        if owner != NOBODY:
            claim(server.url, owner)
        write(server.url, owner, 2)
    for _ in range(2):
        with ServerProcess(url) as server, server.client() as client:
            assert client.metadata().version == 2
            assert client.change(*calls[2])[0] == client.rewind(1)[0] == 7
            server.wait_for("--allow-protocol-1")
    with ServerProcess(url, options=["--allow-protocol-1"]) as server, server.client() as client:
        assert client.change(*calls[2])[0] == 6
        write(server.url, owner, 4)


def test_a_server_that_takes_no_owner_is_named(node_dir: Path) -> None:
    """That of 1.0 ends the connection at each take-over: no loop, and nothing has changed."""
    server = OldServer()
    details = Details(bytes(16), 0, bytes(16), bytes(16), bytes(16), 0, 64, "1.0")
    answer = encode_metadata(Metadata(2, 0, 0, 0, details))[5:]
    server.script[REQ_METADATA] = [(METADATA, answer)]
    done = run_cli("init", "--lightning-dir", node_dir, server.url, check=1)
    server.kill()
    assert "takes no owner" in done.stderr and "earlier release" in done.stderr
    assert os.listdir(node_dir) == []


def test_a_session_of_1_0_is_no_owner(node_dir: Path, url: str, tmp_path: Path) -> None:
    path = Path(url.removeprefix("file://"))
    shutil.copy(support.DATA / "golden" / "layout2-rules0.bkp", path)
    assert FileBackend(url).status().owner is None
    new = f"file://{tmp_path}/new.bkp"
    run_cli("move", url, new)
    write(new, NOBODY, 8)
    # Nor does it keep the node from a new backup.
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    node_at(node_dir, 9)
    run_cli("resync", "--yes", "--lightning-dir", node_dir)
    with PluginProcess(node_dir) as plugin:
        plugin.write(*change(10, "SELECT 1"))
        assert plugin.close() == 0


# The path and the open file


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_log_that_leaves_its_place_takes_no_change(
    how: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filelog.appender.RETRY_FOR_S", 0.3)
    path = support.make_backup(url, first_changes(2))
    copy = shutil.copy(path, f"{path}.copy")
    backend = FileBackend(url)
    backend.open()
    if how == "removed":
        path.unlink()
    elif how == "moved":
        path.rename(f"{path}.away")
    else:
        backend.add_change(Change(3, None, [bump(3)]))
        os.replace(copy, path)
    with pytest.raises(BackupError, match=r"No such file|another file stands"):
        backend.add_change(
            Change(4 if how == "replaced" else 3, None, [bump(3 + (how == "replaced"))])
        )
    backend.close()


def test_a_log_that_comes_back_in_time_goes_on(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = support.make_backup(url, first_changes(2))
    backend = FileBackend(url)
    backend.open()
    path.rename(f"{path}.away")
    monkeypatch.setattr("filelog.appender.time.sleep", lambda _: Path(f"{path}.away").rename(path))
    backend.add_change(Change(3, None, [bump(3)]))
    backend.close()
    assert FileBackend(url).status(check=True).version == 3


def test_a_lost_writer_file_lets_nobody_else_in(url: str) -> None:
    path = support.make_backup(url, first_changes(3))
    backend = FileBackend(url)
    backend.open()
    Path(f"{path}.writer").unlink()
    done = run_cli("compact", url, check=1)
    assert "holds the backup" in done.stderr
    backend.add_change(Change(4, None, [bump(4)]))
    backend.close()
    assert FileBackend(url).status(check=True).version == 4


# Whose backup it is: attach compares content


NODE_IDS = "ALTER TABLE vars ADD COLUMN blobval BLOB"


def other_node(directory: Path, version: int, *extra: str) -> None:
    """A node at ``version`` whose rows are not those of first_changes."""
    path = directory / "lightningd.sqlite3"
    path.unlink(missing_ok=True)
    calls = first_changes(version)
    last = calls[-1][1]
    support.apply_calls(path, [*calls[:-1], (version, [*last[:-1], *extra, last[-1]])])


@pytest.mark.parametrize("ahead", [0, 1])
def test_attach_refuses_other_content_of_the_same_version(
    ahead: int, node_dir: Path, place: str
) -> None:
    for call in first_changes(5 + ahead):
        backend = backend_at(place)
        backend.open()
        backend.add_change(Change(call[0], None, call[1]))
        backend.close()
    other_node(node_dir, 5, "UPDATE items SET body = 'mine' WHERE id = 3")
    done = run_cli("attach", "--lightning-dir", node_dir, place, check=1)
    assert "is not a backup of" in done.stderr and "id = 3" in done.stderr
    assert not (node_dir / "backup.lock").exists()
    assert backend_at(place).status().owner == NOBODY[:8].hex()
    done = run_cli("attach", "--no-compare", "--lightning-dir", node_dir, place)
    assert "Only the versions were compared: 5" in done.stdout


def test_attach_names_another_nodes_backup(node_dir: Path, url: str) -> None:
    mine, theirs = f"x'02{'aa' * 32}'", f"x'03{'bb' * 32}'"
    insert = "INSERT INTO vars (name, blobval) VALUES ('node_id', {})"
    calls = first_changes(4)
    calls[-1][1][:0] = [NODE_IDS, insert.format(theirs)]
    support.make_backup(url, calls)
    other_node(node_dir, 4, NODE_IDS, insert.format(mine))
    done = run_cli("attach", "--lightning-dir", node_dir, url, check=1)
    assert f"of node 03{'bb' * 32}, the database of node 02{'aa' * 32}" in done.stderr


# move


def test_move_between_any_two_places(node_dir: Path, url: str, tmp_path: Path) -> None:
    """To a file, a server, a file; the node goes on at each, and rewinds its last change."""
    node_at(node_dir, 3)
    run_cli("init", "--lightning-dir", node_dir, url)
    (tmp_path / "served").mkdir()
    served = f"file://{tmp_path}/served/node.bkp"
    support.make_backup(served)
    with ServerProcess(served) as server:
        places = [url, f"file://{tmp_path}/second.bkp", server.url, f"file://{tmp_path}/third.bkp"]
        for version, (old, new) in enumerate(itertools.pairwise(places), 4):
            with PluginProcess(node_dir) as plugin:
                plugin.write(*first_changes(version)[-1])
                assert plugin.close() == 0
            node_at(node_dir, version - 1)  # Announced, and not committed.
            done = run_cli("move", "--lightning-dir", node_dir, old, new)
            assert f"the node goes on with {new}" in done.stdout.replace("The node", "the node")
            with PluginProcess(node_dir) as plugin:
                plugin.write(*first_changes(version)[-1])
                assert plugin.logged("rewinding non-committed")
                assert plugin.close() == 0
            node_at(node_dir, version)
            assert "belongs to another" in refusal(old, new) or "nobody" in refusal(old, new)
        run_cli("verify", places[-1], "--against", node_dir / "lightningd.sqlite3")
    assert not list(tmp_path.rglob("*scratch*"))


def refusal(old: str, new: str) -> str:
    """What the owner of ``new`` is told at ``old``."""
    tag = bytes.fromhex(backend_at(new).status().owner or "")
    with pytest.raises(BackupError) as refused:
        backend_at(old).open(tag + bytes(8))
    return str(refused.value)


def test_move_of_a_servers_file_keeps_the_owner(url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, first_changes(3))
    claim(url, ME)
    new = f"file://{tmp_path}/new.bkp"
    backend = FileBackend(url)
    backend.open()
    assert "holds the backup" in run_cli("move", url, new, check=1).stderr
    backend.close()
    run_cli("move", url, new)
    write(new, ME, 4)
    assert path.exists() and FileBackend(new).status().version == 4
    assert "exists already" in run_cli("move", url, new, check=1).stderr


def test_move_refuses_what_is_not_sound(node_dir: Path, url: str, tmp_path: Path) -> None:
    path = support.make_backup(url, first_changes(5))
    support.flip(path, support.records_of(path)[2][0].offset + 130)
    new = tmp_path / "new.bkp"
    assert "is damaged" in run_cli("move", url, f"file://{new}", check=1).stderr
    assert not new.exists()
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": "file:///elsewhere"}))
    done = run_cli("move", "--lightning-dir", node_dir, url, f"file://{new}", check=1)
    assert "is file:///elsewhere, not" in done.stderr


# Whose server it is


def refused(node_dir: Path, version: int) -> str:
    """What the plugin says when it refuses its first change, to ``version``."""
    with PluginProcess(node_dir) as plugin:
        with pytest.raises(support.Refused):
            plugin.write(*first_changes(version)[-1])
        (error,) = plugin.errors()
    return error


@pytest.fixture
def served_node(node_dir: Path, url: str) -> Iterator[ServerProcess]:
    """The server of a node at version 3 that has written once."""
    node_at(node_dir, 2)
    support.make_backup(url)
    with ServerProcess(url) as server:
        run_cli("init", "--lightning-dir", node_dir, server.url)
        with PluginProcess(node_dir) as plugin:
            plugin.write(*first_changes(3)[-1])
        node_at(node_dir, 3)
        yield server


OTHERS = {
    "emptied": "it is not the one that this node wrote",
    "nobody's": "it is not the one that this node wrote",
    "another node's": "belongs to another node",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_server_that_is_not_the_nodes_gets_nothing(
    other: str, served_node: ServerProcess, node_dir: Path, tmp_path: Path
) -> None:
    new = f"file://{tmp_path}/new.bkp"
    path = support.make_backup(new, [] if other == "emptied" else first_changes(4))
    if other == "another node's":
        claim(new, OTHER)
    served_node.kill()
    with ServerProcess(new, served_node.port):
        before = path.read_bytes()
        assert OTHERS[other] in refused(node_dir, 4)
        assert path.read_bytes() == before
        # What was emptied is filled again by whoever types this.
        done = run_cli("resync", "--yes", "--lightning-dir", node_dir, check=None)
        assert done.returncode == (0 if other == "emptied" else 1)
        assert (path.read_bytes() == before) is (other != "emptied")


def test_a_server_of_protocol_1_is_not_the_nodes(
    served_node: ServerProcess, node_dir: Path
) -> None:
    with OldServer() as old:
        old.version, old.prev, old.count = 3, 2, 2
        lock = node_dir / "backup.lock"
        lock.write_text(lock.read_text().replace(served_node.url, old.url))
        assert "names no owner, and no history" in refused(node_dir, 4)
        done = run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
        assert "names no owner, and no history" in done.stderr
        assert {kind for kind, _ in old.requests} == {REQ_METADATA}
        run_cli("resync", "--yes", "--override", "--lightning-dir", node_dir)
        assert "owner" not in json.loads(lock.read_text())
        with PluginProcess(node_dir) as plugin:
            plugin.write(*first_changes(4)[-1])
            assert plugin.errors() == []


def test_a_server_of_protocol_1_in_mid_session_gets_nothing(
    served_node: ServerProcess, node_dir: Path, url: str
) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*first_changes(4)[-1])
        served_node.kill()
        before = support.contents(Path(url.removeprefix("file://")).parent)
        patch = "import protocol; protocol.NEWEST = 1"
        refusal = pytest.raises(support.Refused, match="names no owner, and no history")
        with ServerProcess(url, served_node.port, patch=patch), refusal:
            plugin.write(*first_changes(5)[-1])
    assert support.contents(Path(url.removeprefix("file://")).parent) == before


def test_a_node_of_a_server_of_protocol_1_goes_on_once_that_is_a_newer_one(
    node_dir: Path, url: str
) -> None:
    node_at(node_dir, 2)
    support.make_backup(url)
    server = ServerProcess(url, patch="import protocol; protocol.NEWEST = 1").ready()
    run_cli("init", "--lightning-dir", node_dir, server.url)
    assert "owner" not in json.loads((node_dir / "backup.lock").read_text())
    for version in (3, 4):
        with PluginProcess(node_dir) as plugin:
            plugin.write(*first_changes(version)[-1])
            assert plugin.errors() == []
        server.kill()
        server = ServerProcess(url, server.port).ready()
    node_at(node_dir, 4)
    run_cli("attach", "--lightning-dir", node_dir, server.url)
    assert "owner" in json.loads((node_dir / "backup.lock").read_text())
    server.kill()
    # And back: only if the operator says so.
    with ServerProcess(url, server.port, patch="import protocol; protocol.NEWEST = 1"):
        assert "attach --lightning-dir" in refused(node_dir, 5)


# Somebody else


def write_as_the_node(url: str, version: int) -> None:
    """What a stranger can do who reaches the server: everything it tells him suffices."""
    backend = SocketBackend(url)
    with contextlib.closing(backend):
        backend.open(bytes.fromhex(backend.status().owner or "").ljust(16, b"\0"))
        backend.add_change(Change(version, None, ["-- foreign", bump(version)]))


def test_the_node_goes_on_from_its_own_state(
    served_node: ServerProcess, node_dir: Path, url: str, tmp_path: Path
) -> None:
    for version in (4, 5):
        write_as_the_node(served_node.url, version)
    before = SocketBackend(served_node.url).status().owner
    error = refused(node_dir, 4)
    assert "the backup is ahead" in error and "somebody else has written to the backup" in error
    by = rf"last written by machine {os.uname().nodename}, 127\.0\.0\.1, 20\d\d-"
    assert re.search(by, error)
    done = run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
    assert "the backup is ahead" in done.stderr and "resync --override" in done.stderr
    assert re.search(by, done.stderr)
    done = run_cli("resync", "--yes", "--override", "--lightning-dir", node_dir)
    assert "Warning: the backup is ahead" in done.stderr
    assert SocketBackend(served_node.url).status().owner != before
    with PluginProcess(node_dir) as plugin:
        plugin.write(*first_changes(4)[-1])
        assert plugin.errors() == []
    (kept,) = Path(url.removeprefix("file://")).parent.glob("*.old-*")
    assert FileBackend(f"file://{kept}").status().version == 5
    run_cli("verify", served_node.url, cwd=tmp_path)


def test_who_writes_meanwhile_is_named(served_node: ServerProcess, node_dir: Path) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*first_changes(4)[-1])
        write_as_the_node(served_node.url, 5)
        with pytest.raises(support.Refused) as caught:
            plugin.write(*first_changes(5)[-1])
    assert re.search(r"last written by machine .*, 127\.0\.0\.1, 20", str(caught.value))
    assert "resync --override" in str(caught.value)


def test_each_new_writer_is_named_in_the_log_once(url: str) -> None:
    support.make_backup(url)
    with ServerProcess(url, options=["--allow-protocol-1"]) as server:
        for version in (1, 2):
            write(server.url, None, version)
        SocketBackend(server.url).status()
        with server.client() as client:
            assert client.change(*change(3, "SELECT 1"))[0] == 6
        server.stop()
        named = [line for line in server.lines if "writes for the first time" in line]
    assert [line.rpartition("machine ")[2] for line in named] == [os.uname().nodename, "127.0.0.1"]
