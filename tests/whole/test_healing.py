"""The node comes back by itself: backups that heal in the hook, and those that must not.

``Node`` plays lightningd with a real database, whose transaction is open while the plugin, a
process of its own, stores the change.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import healing
from backend import FOREIGN_KEYS_OFF, Change, Session, Snapshot, new_owner
from errors import LostState, OutOfDate
from filebackend import FileBackend
from filelog import layout2, proof
from filelog.reader import LogReader
from healing import Healer
from tests import support
from tests.peers import OldServer, ServerProcess, patched
from tests.stopping import eventually
from tests.support import Call, PluginProcess, Refused, change, change_lock, run_cli
from wallet import database, node

FIRST = change(
    1,
    "CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER, blobval BLOB)",
    "INSERT INTO vars (name, intval) VALUES ('data_version', 0)",
    "CREATE TABLE items (id INTEGER PRIMARY KEY, body TEXT)",
    "CREATE INDEX bodies ON items (body)",
    "CREATE TABLE child (item INTEGER REFERENCES items (id) ON DELETE CASCADE)",
)


def named(version: int, number: int) -> Call:
    """The change in which a node stores its id."""
    node_id = f"{number:02x}" * 33
    return change(version, f"INSERT INTO vars (name, blobval) VALUES ('node_id', x'{node_id}');")


class Node:
    """lightningd's side: a database, the changes of which the plugin hears first.

    Args:
        directory: its network directory.
        path: the database, by default the one in ``directory``.
    """

    def __init__(self, directory: Path, path: Path | None = None) -> None:
        self.directory = directory
        self.path = path or directory / node.DATABASE_NAME

    @property
    def version(self) -> int:
        return database.version_of(str(self.path))

    def begin(self, number: int = 1) -> None:
        """The first changes of the node ``number``, without a plugin."""
        support.apply_calls(self.path, [FIRST, named(2, number)])

    def next(self, text: str = "text") -> Call:
        """The next change."""
        version = self.version + 1
        return change(version, f"INSERT INTO items VALUES ({version}, '{text} {version}')")

    def run(self, count: int = 1) -> None:
        """Commits that no plugin hears of."""
        for _ in range(count):
            support.apply_calls(self.path, [self.next("alone")])

    def write(self, plugin: PluginProcess, call: Call | None = None, *settings: str) -> None:
        """One commit that ``plugin`` hears of; rolled back if it is refused."""
        version, statements = call or self.next()
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            for statement in ("PRAGMA foreign_keys = ON", *settings, "BEGIN", *statements):
                connection.execute(statement)
            plugin.write(version, statements)
            connection.execute("COMMIT")


@pytest.fixture
def alice(node_dir: Path, url: str) -> Node:
    """A node with a backup at ``url``, in step."""
    found, owner = Node(node_dir), new_owner()
    found.begin()
    backend = FileBackend(url)
    backend.create(Snapshot(str(found.path), 2), owner)
    node.write_lock_file(str(node_dir), node.LockFile(url, owner=owner))
    calls = []
    for _ in range(6):
        calls.append(found.next())
        support.apply_calls(found.path, calls[-1:])
    support.add_session(url, calls)
    return found


def check_same(url: str, found: Node, directory: Path) -> None:
    """A restore gives the node's database."""
    target = directory / "compared.sqlite3"
    run_cli("restore", url, target)
    assert database.compare(str(found.path), str(target)) == []
    assert database.version_of(str(target)) == found.version
    target.unlink()


@contextlib.contextmanager
def change_database(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def kept(url: str) -> list[Path]:
    path = Path(FileBackend(url).path)
    return sorted(path.parent.glob(f"{path.name}.old-*"))


HASTY = (
    "import sqlite3; connect = sqlite3.connect\n"
    "sqlite3.connect = lambda *arguments, **more: connect(*arguments, timeout=0.1, **more)"
)
"""Does not wait for a lock as long as usual."""


def refusal(found: Node, call: Call | None = None, *settings: str) -> str:
    """Why the first change of a new session is refused."""
    with PluginProcess(found.directory, patched(support.PLUGIN, HASTY)) as plugin:
        with pytest.raises(Refused):
            found.write(plugin, call, *settings)
        (text,) = plugin.errors()
    return text


def lock_of(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "backup.lock").read_text()))


# The node is ahead


def test_a_node_that_ran_without_its_plugin(alice: Node, url: str, tmp_path: Path) -> None:
    count = 30
    before = (tmp_path / "disk2" / "node.bkp").read_bytes()
    alice.run(count)
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        alice.write(plugin)
        assert plugin.errors() == []
        assert plugin.logged(f"node is at version {8 + count}, the backup at version 8")
        assert plugin.logged(f"went from version 8 to {8 + count} by a snapshot of")
        (old,) = kept(url)
        assert plugin.logged(f"The old backup is kept: {old}")
        assert plugin.close() == 0
    assert old.read_bytes() == before
    check_same(url, alice, tmp_path)
    with PluginProcess(alice.directory) as plugin:  # It goes on as if nothing had been.
        alice.write(plugin)
        assert plugin.logged("Versions match up")
    check_same(url, alice, tmp_path)
    assert sorted(p.name.partition(".old-")[0] for p in (tmp_path / "disk2").iterdir()) == [
        "node.bkp", "node.bkp", "node.bkp.writer"
    ]  # fmt: skip


def test_the_change_after_a_heal_can_be_rewound(alice: Node, url: str, tmp_path: Path) -> None:
    alice.run(3)
    with PluginProcess(alice.directory) as plugin:
        plugin.write(*alice.next("never committed"))
        plugin.kill()
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin, alice.next("in its place"))
        assert plugin.logged("rewinding non-committed transaction")
    check_same(url, alice, tmp_path)


def test_a_pragma_comes_first(alice: Node, url: str, tmp_path: Path) -> None:
    alice.run()
    drop = change(alice.version + 1, "DELETE FROM items WHERE id = 4")
    with PluginProcess(alice.directory) as plugin:
        plugin.write(alice.version, [FOREIGN_KEYS_OFF])
        assert plugin.logged("went from version 8 to 9")
        alice.write(plugin, drop)
    check_same(url, alice, tmp_path)


def test_over_a_socket(node_dir: Path, url: str, tmp_path: Path) -> None:
    alice = Node(node_dir)
    alice.begin()
    run_cli("init", url, cwd=tmp_path)
    with ServerProcess(url) as server:
        run_cli("init", "--lightning-dir", node_dir, server.url)
        for count in (0, 2, 1):
            alice.run(count)
            with PluginProcess(node_dir) as plugin:
                alice.write(plugin)
                alice.write(plugin)
                assert plugin.logged("Healed") == (count > 0) and not plugin.errors()
        assert len(kept(url)) == 2
        assert server.stop() == 0
    check_same(url, alice, tmp_path)


KILLED_AT_ITS_END = """
import os, socketbackend
inner = socketbackend.SocketBackend.replace
def outer(*arguments, **options):
    inner(*arguments, **options)
    os.kill(os.getpid(), 9)
socketbackend.SocketBackend.replace = outer
"""


def test_killed_when_the_server_has_the_snapshot(node_dir: Path, url: str, tmp_path: Path) -> None:
    alice = Node(node_dir)
    alice.begin()
    run_cli("init", url, cwd=tmp_path)
    with ServerProcess(url) as server:
        run_cli("init", "--lightning-dir", node_dir, server.url)
        alice.run()
        killed = PluginProcess(node_dir, patched(support.PLUGIN, KILLED_AT_ITS_END))
        with killed as plugin, pytest.raises(Refused):
            alice.write(plugin)
        assert list(node_dir.glob("backup.scratch-*"))
        with PluginProcess(node_dir) as plugin:
            alice.write(plugin)
            assert plugin.logged("Versions match up") and not plugin.logged("Healed")
        assert not list(node_dir.glob("backup.scratch-*"))
        assert server.stop() == 0
    check_same(url, alice, tmp_path)


KILLED_ALL_SENT = """
import os, remote.sending
inner = remote.sending._Sending._send_pieces
def outer(*arguments):
    inner(*arguments)
    os.kill(os.getpid(), 9)
remote.sending._Sending._send_pieces = outer
"""

FIRST_STORED_WHILE_THE_SECOND_IS_EXAMINED = """
import threading, serving.keeper as keeper
examine, prepare, start_over = keeper.examine, keeper.Keeper.prepare, keeper.Keeper._start_over
looks, prepared, came, stored = [], [], threading.Event(), threading.Event()
def looking(*arguments):
    looks.append(1)
    if len(looks) == 3:  # After those of `init` and of the first heal.
        came.set()
        stored.wait()
    return examine(*arguments)
def preparing(self, *arguments):
    ready = prepare(self, *arguments)
    prepared.append(1)
    if len(prepared) == 2:
        came.wait()
    return ready
def storing(self, *arguments):
    start_over(self, *arguments)
    if len(looks) > 1:
        stored.set()
keeper.examine, keeper.Keeper.prepare = looking, preparing
keeper.Keeper._start_over = storing
"""


def test_a_killed_heal_that_the_server_still_stores(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    alice = Node(node_dir)
    alice.begin()
    run_cli("init", url, cwd=tmp_path)
    with ServerProcess(url, patch=FIRST_STORED_WHILE_THE_SECOND_IS_EXAMINED) as server:
        run_cli("init", "--lightning-dir", node_dir, server.url)
        alice.run()
        killed = PluginProcess(node_dir, patched(support.PLUGIN, KILLED_ALL_SENT))
        with killed as plugin, pytest.raises(Refused):
            alice.write(plugin)
        with PluginProcess(node_dir) as plugin:
            alice.write(plugin)
            alice.write(plugin)
        assert server.stop() == 0
    check_same(url, alice, tmp_path)


def test_over_a_socket_of_protocol_1(node_dir: Path, tmp_path: Path) -> None:
    alice = Node(node_dir)
    alice.begin()
    with OldServer() as server:
        run_cli("init", "--lightning-dir", node_dir, server.url)
        alice.run(2)
        with PluginProcess(node_dir) as plugin:
            alice.write(plugin)
            alice.write(plugin)
            assert plugin.logged("Healed") and not plugin.errors()
        check_same(server.url, alice, tmp_path)


def test_a_wal(alice: Node, url: str, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(alice.path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        for _ in range(3):
            for statement in ("BEGIN", *alice.next("in the WAL")[1], "COMMIT"):
                connection.execute(statement)
        with PluginProcess(alice.directory) as plugin:
            alice.write(plugin)
            assert plugin.logged("went from version 8 to 11")
        assert os.path.getsize(f"{alice.path}-wal") > 0
        check_same(url, alice, tmp_path)


LEAVES_A_HOT_JOURNAL = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
connection.execute("UPDATE items SET body = hex(zeroblob(3000))")
connection.execute("UPDATE vars SET intval = 1000 WHERE name = 'data_version'")
connection.execute("INSERT INTO items SELECT id + 1000, hex(zeroblob(3000)) FROM items")
os._exit(0)
"""


def test_a_hot_journal(alice: Node, url: str, tmp_path: Path) -> None:
    alice.run(30)
    subprocess.run([sys.executable, "-c", LEAVES_A_HOT_JOURNAL, alice.path], check=True)
    assert os.path.getsize(f"{alice.path}-journal") > 0
    with PluginProcess(alice.directory) as plugin:
        plugin.write(38, [FOREIGN_KEYS_OFF])  # Before anybody has read the database.
        assert plugin.logged("went from version 8 to 38")
        alice.write(plugin)
    check_same(url, alice, tmp_path)


def test_a_database_elsewhere(node_dir: Path, url: str, tmp_path: Path) -> None:
    alice = Node(node_dir, tmp_path / "elsewhere.sqlite3")
    alice.begin()
    run_cli("init", "--lightning-dir", node_dir, "--wallet", f"sqlite3://{alice.path}", url)
    assert lock_of(node_dir)["wallet"] == str(alice.path)
    alice.run()
    with PluginProcess(node_dir) as plugin:
        alice.write(plugin)
        assert plugin.logged(f"by a snapshot of {alice.path}")
    run_cli("resync", "--lightning-dir", node_dir, "--yes")  # It knows where, too.
    moved = alice.path.rename(node_dir / node.DATABASE_NAME)
    run_cli("attach", "--lightning-dir", node_dir, "--wallet", moved, url)
    assert "wallet" not in lock_of(node_dir)
    check_same(url, Node(node_dir), tmp_path)


def test_a_healed_backup_is_of_the_same_owner(alice: Node, url: str) -> None:
    owner = lock_of(alice.directory)["owner"]
    alice.run()
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
    assert FileBackend(url).status().owner == str(owner)[:16]
    found = lock_of(alice.directory)
    assert (found["owner"], found["node_id"]) == (owner, "01" * 33)


AT_ONCE = "from upkeep import compaction as c; c.FIRST_AFTER_S = 0; c.PAUSE_S = 0.01"
"""The scrub begins at once."""


STEPS = {
    "before the copy": "wallet.database.copy",
    "copied": "healing.identity.of_backup",
    "while the new backup is written": "filebackend.write_log",
    "before the old one is kept": "durable.keep",
    "before the rename": "durable.replace",
    "renamed": "filebackend.FileBackend._load",
    "before the change": "filebackend.FileBackend.add_change",
}
"""Functions before which the process is killed; before the second call of ``_load``."""


@pytest.mark.parametrize("step", STEPS)
def test_killed_in_a_heal(step: str, alice: Node, url: str, tmp_path: Path) -> None:
    alice.run()
    owner, _, name = STEPS[step].rpartition(".")
    patch = (
        f"import os, wallet.database, durable, filebackend, healing\n"
        f"inner, calls = {owner}.{name}, []\n"
        f"def outer(*arguments, **options):\n"
        f"    calls.append(1)\n"
        f"    if len(calls) == {1 + (name == '_load')}: os.kill(os.getpid(), 9)\n"
        f"    return inner(*arguments, **options)\n"
        f"{owner}.{name} = outer\n"
    )
    killed = PluginProcess(alice.directory, patched(support.PLUGIN, patch))
    with killed as plugin, pytest.raises(Refused):
        alice.write(plugin)
    alice.run()  # And once more without it.
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        assert plugin.logged("Healed") and not plugin.errors()
        alice.write(plugin)
    check_same(url, alice, tmp_path)
    beside = {path.name.partition(".old-")[0] for path in (tmp_path / "disk2").iterdir()}
    assert beside == {"node.bkp", "node.bkp.writer"}
    # Before the rename it has its second name already.
    assert len(kept(url)) == 1 + (step in ("before the rename", "renamed", "before the change"))


def test_two_kept_copies_stay_once_the_new_backup_is_proven(alice: Node, url: str) -> None:
    path = Path(FileBackend(url).path)
    for number, name in enumerate(["20200101T000000Z", "20210101T000000Z", "20210101T000000Z-2"]):
        support.make_backup(f"file://{path}.old-{name}", support.first_changes(number + 1))
    support.layout1_file(path.with_name("node.bkp.old-20190101T000000Z"))
    mine = path.with_name("node.bkp.old-mine")
    mine.write_text("an operator's")
    alice.run()
    with PluginProcess(alice.directory, patched(support.PLUGIN, AT_ONCE)) as plugin:
        alice.write(plugin)
        eventually(lambda: plugin.logged("20210101T000000Z is removed"), "the proof")
        healed = next(line for _, line in plugin.log if line.startswith("Healed"))
    left = {p.name.partition(".old-")[2] for p in kept(url) if not p.name.endswith(".writer")}
    assert left == {
        "20190101T000000Z", "20210101T000000Z-2", healed.rpartition(".old-")[2], "mine"
    }  # fmt: skip


# What is not healed: refused as ever, and why


def swap(alice: Node, other: Node) -> None:
    os.replace(other.path, alice.path)


@pytest.mark.parametrize("is_noted", [False, True])
def test_of_another_node_with_a_snapshot(
    is_noted: bool, alice: Node, url: str, tmp_path: Path
) -> None:
    if is_noted:
        run_cli("attach", "--lightning-dir", alice.directory, url)
    assert lock_of(alice.directory).get("node_id") == ("01" * 33 if is_noted else None)
    bob = Node(tmp_path, tmp_path / "bob.sqlite3")
    bob.begin(number=2)
    bob.run(20)
    swap(alice, bob)
    text = refusal(alice)
    assert f"The backup is of node {'01' * 33}, the database of {'02' * 33}" in text
    assert text.startswith("Backup is out of date: the node is ahead. The node is at version 22")
    assert "resync" in text and kept(url) == []


def test_of_another_node_and_a_backup_that_began_empty(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    alice = Node(node_dir)
    run_cli("init", "--lightning-dir", node_dir, url)
    with PluginProcess(node_dir) as plugin:
        for call in (FIRST, named(2, 1)):
            alice.write(plugin, call)
    bob = Node(tmp_path, tmp_path / "bob.sqlite3")
    bob.begin(number=2)
    bob.run()
    swap(alice, bob)
    assert "the database of " in refusal(alice)
    with change_database(alice.path) as connection:
        connection.execute("UPDATE vars SET blobval = ? WHERE name = 'node_id'", (b"\1" * 33,))
    with PluginProcess(node_dir) as plugin:
        alice.write(plugin)
        assert plugin.logged("Healed")


def another_owner(alice: Node) -> None:
    backend = FileBackend(str(lock_of(alice.directory)["backend_url"]))
    with contextlib.closing(backend):
        backend.open()
        backend.take_over(b"somebody else...")


def damaged_end(alice: Node) -> None:
    path = Path(FileBackend(str(lock_of(alice.directory)["backend_url"])).path)
    support.flip(path, support.records_of(path)[-1][0].end - 10)


def no_backup(alice: Node) -> None:
    path = Path(FileBackend(str(lock_of(alice.directory)["backend_url"])).path)
    path.parent.rename(path.parent.with_name("unmounted"))


def emptied(alice: Node) -> None:
    """An empty backup stands in its place, and backup.lock is of a release without owners."""
    lock = lock_of(alice.directory)
    url = str(lock["backend_url"])
    Path(FileBackend(url).path).unlink()
    FileBackend(url).create(None)
    del lock["owner"]
    (alice.directory / "backup.lock").write_text(json.dumps(lock))


def not_sound(alice: Node) -> None:
    """An index that lacks what the table has."""
    with change_database(alice.path) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET rootpage = 3 WHERE name = 'bodies'")


def another_wallet(alice: Node) -> None:
    """The database that backup.lock names is an old copy."""
    copy = alice.directory / "copy.sqlite3"
    shutil.copy(alice.path, copy)
    change_lock(alice.directory, wallet="copy.sqlite3")
    alice.run()


REFUSED: dict[str, tuple[Callable[[Node], None], list[str]]] = {
    "another owner": (another_owner, ["belongs to another node", "attach"]),
    "damaged end": (damaged_end, ["is damaged at offset", "resync"]),
    "no backup": (no_backup, ["There is no backup at", "is mounted"]),
    "emptied": (emptied, ["out of date", "holds nothing and is nobody's", "resync"]),
    "switched off": (
        lambda alice: change_lock(alice.directory, heal="off"),
        ["out of date", '"heal": "off"', "resync"],
    ),
    "heal is no word": (
        lambda alice: change_lock(alice.directory, heal="maybe"),
        ["heal is 'maybe' in backup.lock", 'Use "off"'],
    ),
    "not sound": (not_sound, ["out of date", "It could not be healed", "resync"]),
    "another version": (
        another_wallet,
        ["out of date", "copy.sqlite3 is at version 9, not 10", "--wallet", "resync"],
    ),
    "not there": (
        lambda alice: change_lock(alice.directory, wallet="/nowhere/at/all"),
        ["out of date", "/nowhere/at/all: the node's database is not there", "resync"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, alice: Node, tmp_path: Path) -> None:
    spoil, expected = REFUSED[name]
    alice.run()
    call = alice.next()
    spoil(alice)
    if name == "another version":
        call = alice.next()
    before = support.contents(tmp_path)
    with PluginProcess(alice.directory) as plugin:
        for _ in range(2):
            with pytest.raises(Refused):
                plugin.write(*call)
        text = plugin.errors()[0]
        assert plugin.errors() == [text] * 2
    assert [part for part in expected if part not in text] == [], text
    assert support.contents(tmp_path) == before


def test_refused_while_its_cache_has_spilled(alice: Node, url: str, tmp_path: Path) -> None:
    """As a large migration does: then no other process can read what was committed."""
    alice.run()
    before = alice.version
    text = "x" * 3000
    many = [f"INSERT INTO items VALUES ({n}, '{text}')" for n in range(100, 200)]
    found = refusal(alice, change(10, *many), "PRAGMA cache_size = 2")
    assert "database is locked" in found and "resync" in found and "out of date" in found
    assert alice.version == before and kept(url) == []
    with PluginProcess(alice.directory) as plugin:  # The next start may fit.
        alice.write(plugin)
        assert plugin.logged("Healed")
    check_same(url, alice, tmp_path)


def test_refused_without_room(alice: Node, url: str, tmp_path: Path) -> None:
    alice.run()
    before = support.contents(tmp_path)
    program = patched(support.PLUGIN, "import space; space.RESERVE = 1 << 60")
    with PluginProcess(alice.directory, program) as plugin:
        with pytest.raises(Refused):
            plugin.write(*alice.next())
        (text,) = plugin.errors()
    assert "There is too little room in" in text and "resync" in text
    assert support.contents(tmp_path) == before


def test_refused_if_it_is_ahead_in_mid_session(alice: Node) -> None:
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        alice.run()
        with pytest.raises(Refused):
            alice.write(plugin)
        assert plugin.errors()[0].startswith("Backup is out of date")
        assert not plugin.logged("Healed")


def test_lost_state_ends_it_until_an_operator_has_looked(
    alice: Node, url: str, tmp_path: Path
) -> None:
    path = alice.directory / "backup.lock"
    path.chmod(0o640)
    change_lock(alice.directory, later="a key of a later release")
    old = tmp_path / "old.sqlite3"
    shutil.copy(alice.path, old)
    with PluginProcess(alice.directory) as plugin:
        for _ in range(3):
            alice.write(plugin)
    os.replace(old, alice.path)
    assert "lost some state" in refusal(alice)
    lost = lock_of(alice.directory)["lost_state"]
    assert "the backup was at version 11, the node's database at version 8" in str(lost)
    assert path.stat().st_mode & 0o777 == 0o640
    alice.run(5)  # Without the plugin: now it looks ahead.
    text = refusal(alice)
    assert "Backup is out of date" in text and str(lost) in text and "resync" in text
    done = run_cli("resync", "--lightning-dir", alice.directory, "--yes")
    assert str(lost) in done.stdout
    found = lock_of(alice.directory)
    assert "lost_state" not in found and found["later"] == "a key of a later release"
    alice.run()
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        assert plugin.logged("Healed")
    check_same(url, alice, tmp_path)


def test_attach_ends_that_too(alice: Node, url: str) -> None:
    change_lock(alice.directory, lost_state="in the past", heal="off", compact="off")
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        assert plugin.logged("No backup heals by itself any more: in the past")
    run_cli("attach", "--lightning-dir", alice.directory, url)
    found = lock_of(alice.directory)
    assert "lost_state" not in found and (found["heal"], found["compact"]) == ("off", "off")


def test_another_node_takes_over_meanwhile(node_dir: Path, url: str, tmp_path: Path) -> None:
    alice = Node(node_dir)
    alice.begin()
    run_cli("init", url, cwd=tmp_path)
    with ServerProcess(url) as server:
        run_cli("init", "--lightning-dir", node_dir, server.url)
        alice.run()
        other = node_dir.with_name("bitcoin")
        other.mkdir()
        shutil.copy(alice.path, other)
        attach = ["attach", "--lightning-dir", str(other), "--no-compare", server.url]
        patch = (
            "import subprocess, wallet.database as database\n"
            "def node_id_of(*_):\n"
            f"    command = {[sys.executable, str(support.CLI), *attach]!r}\n"
            "    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)\n"
            "database.node_id_of = node_id_of\n"
        )
        with change_database(other / node.DATABASE_NAME) as connection:
            # The other one went on from the backup.
            connection.execute("UPDATE vars SET intval = 2 WHERE name = 'data_version'")
        with PluginProcess(node_dir, patched(support.PLUGIN, patch)) as plugin:
            with pytest.raises(Refused):
                alice.write(plugin)
            assert "a newer connection has written" in plugin.errors()[0]
        assert kept(url) == []


# A damaged backup


def note(url: str, **changes: object) -> None:
    path = FileBackend(url).path
    with contextlib.closing(LogReader(path)) as reader:
        assert reader.backup_id is not None
        proof.note(path, reader.backup_id, **changes)


def flip_in_the_middle(url: str) -> None:
    path = Path(FileBackend(url).path)
    records = [head for head, _ in support.records_of(path) if head.kind == layout2.Kind.CHANGE]
    support.flip(path, records[len(records) // 2].end - 20)


def test_damage_that_the_scrub_finds_heals_in_the_next_hook(
    alice: Node, url: str, tmp_path: Path
) -> None:
    flip_in_the_middle(url)
    damaged = (tmp_path / "disk2" / "node.bkp").read_bytes()
    with PluginProcess(alice.directory, patched(support.PLUGIN, AT_ONCE)) as plugin:
        while not plugin.logged("went from version"):
            alice.write(plugin)
            time.sleep(0.01)
        alice.write(plugin)
        first, second = plugin.errors()
        assert "is damaged at offset" in first
        assert second == f"{first} Healing that; lightningd waits meanwhile."
        assert plugin.close() == 0
    (old,) = kept(url)
    assert old.read_bytes().startswith(damaged.rstrip(b"\0"))
    check_same(url, alice, tmp_path)


def test_damage_that_a_server_knows_heals_at_the_start(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    alice = Node(node_dir)
    alice.begin()
    run_cli("init", url, cwd=tmp_path)
    with ServerProcess(url) as server:
        run_cli("init", "--lightning-dir", node_dir, server.url)
        with PluginProcess(node_dir) as plugin:
            for _ in range(4):
                alice.write(plugin)
    flip_in_the_middle(url)
    note(url, unsound="It is\ndamaged.")
    with ServerProcess(url, port=server.port) as server:
        with PluginProcess(node_dir) as plugin:
            alice.write(plugin)
            assert plugin.errors() == ["It is damaged. Healing that; lightningd waits meanwhile."]
            alice.write(plugin)
        assert FileBackend(url).status().unsound is None
        assert server.stop() == 0
    check_same(url, alice, tmp_path)


@pytest.mark.parametrize("rewind", [False, True])
def test_damage_that_is_known_heals_at_the_start(
    rewind: bool, alice: Node, url: str, tmp_path: Path
) -> None:
    if rewind:
        with PluginProcess(alice.directory) as plugin:
            plugin.write(*alice.next("never committed"))
    flip_in_the_middle(url)
    note(url, unsound="It is damaged.")
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        assert plugin.errors() == ["It is damaged. Healing that; lightningd waits meanwhile."]
        alice.write(plugin)
    assert len(kept(url)) == 1 and FileBackend(url).status().unsound is None
    check_same(url, alice, tmp_path)


def test_a_damaged_backup_of_a_node_that_is_ahead(alice: Node, url: str, tmp_path: Path) -> None:
    flip_in_the_middle(url)
    note(url, unsound="It is damaged.")
    alice.run()
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        assert plugin.logged("went from version 8 to 9") and plugin.errors() == []
    check_same(url, alice, tmp_path)


@pytest.mark.parametrize(
    "spoil", [not_sound, lambda alice: change_lock(alice.directory, heal="off")]
)
def test_damage_that_cannot_be_healed_stops_no_node(
    spoil: Callable[[Node], None], alice: Node, url: str
) -> None:
    flip_in_the_middle(url)
    note(url, unsound="It is damaged.")
    call, later = alice.next(), change(alice.version + 2, "SELECT 1")
    spoil(alice)
    with PluginProcess(alice.directory) as plugin:
        plugin.write(*call)
        assert sum("was not healed" in line for line in plugin.errors()) == 1
        plugin.write(*later)  # Not tried again: the node would wait for that each time.
        assert sum("was not healed" in line for line in plugin.errors()) == 1
    assert kept(url) == [] and FileBackend(url).status().version == later[0]


def test_a_node_that_is_behind_a_damaged_backup_is_refused(alice: Node, url: str) -> None:
    old = alice.path.read_bytes()
    with PluginProcess(alice.directory) as plugin:
        alice.write(plugin)
        alice.write(plugin)
    alice.path.write_bytes(old)
    flip_in_the_middle(url)
    note(url, unsound="It is damaged.")
    assert "lost some state" in refusal(alice)
    assert kept(url) == []


# In this process


@contextlib.contextmanager
def healer(alice: Node, url: str) -> Iterator[tuple[Healer, FileBackend]]:
    lock_file = node.read_lock_file(str(alice.directory))
    with contextlib.closing(FileBackend(url)) as backend:
        backend.open(lock_file.owner)
        yield Healer(backend, str(alice.directory), lock_file), backend


def test_nothing_cuts_between_off_and_its_change(
    alice: Node, url: str, log_lines: pytest.LogCaptureFixture
) -> None:
    with healer(alice, url) as (heals, backend):
        session = Session(backend, "/nowhere")
        version = alice.version
        calls: list[Call] = [
            (version, [FOREIGN_KEYS_OFF]),
            change(version + 1, "DELETE FROM items WHERE id = 4"),
            (version + 1, ["PRAGMA foreign_keys = ON;"]),
        ]
        healed = []
        for number, (at, statements) in enumerate(calls):
            one = Change(at, None, statements)
            if number == 1:
                backend.unsound = "It is damaged."
            heals.mend(one, first=number == 0)
            session.write(one)
            if number == 1:
                support.apply_calls(alice.path, [(at, statements)])
            healed.append(len(kept(url)))
        assert healed == [0, 0, 1]


def test_a_damaged_end_in_mid_session_is_not_healed(
    alice: Node, url: str, log_lines: pytest.LogCaptureFixture
) -> None:
    with healer(alice, url) as (heals, backend):
        session = Session(backend, "/nowhere")
        for number in range(2):
            one = Change(alice.version + 1, None, alice.next()[1])
            if number == 1:
                backend.unsound = "It is damaged."
                support.flip(Path(FileBackend(url).path), backend.size - 20)
            heals.mend(one, first=number == 0)
            session.write(one)
            support.apply_calls(alice.path, [alice.next()])
    assert kept(url) == []
    assert "the backup's end is damaged" in log_lines.messages[-1]


def test_it_says_how_far_it_is(
    alice: Node, url: str, log_lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.run()
    monkeypatch.setattr(healing, "TELL_EVERY_S", 0.001)
    real = database.copy

    def slow(source: str, target: str, progress: database.Progress) -> object:
        progress(30, 100)
        while not any("copying the database, 30 %" in line for line in log_lines.messages):
            time.sleep(0.001)
        return real(source, target, progress)

    monkeypatch.setattr(database, "copy", slow)
    with healer(alice, url) as (heals, _):
        version, statements = alice.next()
        heals.catch_up(Change(version, None, statements), OutOfDate(8, 9, "DIR"))
    assert "Healing for 0 s: copying the database, 30 %" in log_lines.messages


def test_a_record_that_cannot_be_written_is_an_error(
    alice: Node, url: str, log_lines: pytest.LogCaptureFixture
) -> None:
    with healer(alice, url) as (heals, _):
        (alice.directory / "backup.lock").unlink()
        with pytest.raises(LostState):
            heals.catch_up(Change(2, None, ["SELECT 1"]), LostState(2, 1, url))
    assert "could not be noted" in log_lines.messages[-1]
