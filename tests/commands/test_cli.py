"""The operator's commands as processes: what they print, leave behind, and refuse."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from backend import Change, Snapshot
from errors import BackupError, DiskError
from filebackend import FileBackend
from filelog import look
from tests import support
from tests.peers import ServerProcess
from tests.support import Call, add_session, change, contents, first_changes, make_backup, run_cli
from wallet import database

COMMANDS = ["init", "resync", "attach", "restore", "status"]


# What several tests share


def node_at(node_dir: Path, version: int) -> Path:
    """A stopped node's database at ``version``, as ``first_changes`` leaves it."""
    path = node_dir / "lightningd.sqlite3"
    support.apply_calls(path, first_changes(version))
    return path


def write_lock(node_dir: Path, url: str) -> Path:
    path = node_dir / "backup.lock"
    path.write_text(json.dumps({"backend_url": url}))
    return path


def file_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def refused(root: Path, *arguments: object, says: Sequence[str], **options: Any) -> str:
    """Run a command that must refuse: one line, exit code 1, nothing below ``root`` changed."""
    before = contents(root)
    done = run_cli(*arguments, check=1, **options)
    assert contents(root) == before
    assert done.stderr.startswith("Error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for text in says:
        assert text in done.stderr
    return str(done.stdout)


def restored_rows(url: str, target: Path) -> list[tuple[int, str]]:
    """Rows of the table items after a restore to ``target``."""
    run_cli("restore", url, target)
    with database.opened(str(target)) as connection:
        return connection.execute("SELECT id, body FROM items ORDER BY id").fetchall()


def expected_rows(version: int) -> list[tuple[int, str]]:
    return [(number, f"item {number}") for number in range(2, version + 1)]


@contextlib.contextmanager
def running(node_dir: Path) -> Iterator[None]:
    """A process that holds the lock on the pid file, as a lightningd of that directory does."""
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    path = node_dir.parent / f"lightningd-{node_dir.name}.pid"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        yield
        holder.kill()


def file_size_limit(size: int) -> Callable[[], None]:
    """For ``preexec_fn``: a process whose files cannot grow beyond ``size`` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def run_with_disk(free: int, total: int, *arguments: object, check: int) -> Any:
    """Run backup-cli in a process that finds ``free`` of ``total`` bytes on every disk."""
    program = (
        "import runpy, shutil, sys\n"
        f"shutil.disk_usage = lambda path: shutil._ntuple_diskusage({total}, 0, {free})\n"
        f"sys.path.insert(0, {str(support.ROOT)!r})\n"
        f"sys.argv[0] = {str(support.CLI)!r}\n"
        f"runpy.run_path({str(support.CLI)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


def die_with_open_database(path: Path, *statements: str) -> None:
    """Execute ``statements`` in a process that is then killed with the database open."""
    program = (
        "import os, signal, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: connection.execute(statement).fetchall()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path), *statements])
    assert done.returncode == -signal.SIGKILL


# Usage


def test_help_names_every_command() -> None:
    text = run_cli("--help").stdout
    for command in COMMANDS:
        assert f"  {command} " in text
    assert "backup-cli init --lightning-dir ~/.lightning/bitcoin file:///" in text
    assert "Exit codes:" in text
    assert run_cli("-h").stdout == text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    text = run_cli(command, "--help").stdout
    assert "Example" in text
    assert f"    backup-cli {command} " in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["--frobnicate"],
        *([command, "--frobnicate"] for command in COMMANDS),
        ["init"],
        ["resync"],
        ["attach"],
        ["attach", "file:///x"],
        ["attach", "--lightning-dir", "/tmp"],
        ["restore"],
        ["restore", "file:///x"],
        ["status"],
        ["status", "file:///x", "--lightning-dir", "/tmp"],
    ],
)
def test_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    done = run_cli(*arguments, check=2, cwd=tmp_path)
    assert "Usage: backup-cli" in done.stderr
    assert list(tmp_path.iterdir()) == []


# init


def test_init_empty(node_dir: Path, url: str, tmp_path: Path) -> None:
    done = run_cli("init", "--lightning-dir", node_dir, url)
    lock = json.loads((node_dir / "backup.lock").read_text())
    assert (lock["backend_url"], len(lock["owner"]), len(lock)) == (url, 32, 2)
    assert FileBackend(url).status().owner == lock["owner"][:16]
    assert sorted(path.name for path in node_dir.iterdir()) == ["backup.lock"]
    assert set(contents(tmp_path / "disk2")) == {"node.bkp"}
    out = done.stdout
    assert "Stored: nothing yet, data_version 0" in out
    assert "Found an existing database" not in out
    assert f"important-plugin={support.PLUGIN}\n" in out
    assert f"{node_dir}/hsm_secret" in out
    assert "on the same disk as the node" in done.stderr
    for private in (node_dir / "backup.lock", file_of(url)):
        assert private.stat().st_mode & 0o077 == 0
    assert json.loads(run_cli("status", url, "--json").stdout)["version"] == 0


def test_init_with_a_database(node_dir: Path, url: str, tmp_path: Path) -> None:
    source = node_at(node_dir, 5)
    original = source.read_bytes()
    done = run_cli("init", "--lightning-dir", node_dir, url)
    assert source.read_bytes() == original
    assert sorted(os.listdir(node_dir)) == ["backup.lock", "lightningd.sqlite3"]
    assert f"Found an existing database at {source}\n" in done.stdout
    assert f"Successfully written initial snapshot to {url}\n" in done.stdout
    assert f"Stored: {len(original) / 1000:.1f} kB, data_version 5\n" in done.stdout
    source.rename(tmp_path / "before.sqlite3")
    (command,) = (line for line in done.stdout.splitlines() if "This will restore it: " in line)
    program, *arguments = shlex.split(command.partition(": ")[2])
    assert program == str(support.CLI)
    run_cli(*arguments)
    assert database.compare(str(tmp_path / "before.sqlite3"), str(source)) == []


def test_init_quotes_the_commands_it_names(tmp_path: Path) -> None:
    node_dir = support.network_dir(tmp_path / "my node's")
    url = f"file://{tmp_path}/a $HOME disk.bkp"
    done = run_cli("init", "--lightning-dir", node_dir, url)
    (command,) = (line for line in done.stdout.splitlines() if "This will restore it: " in line)
    arguments = shlex.split(command.partition(": ")[2])
    assert arguments[1:] == ["restore", url, f"{node_dir}/lightningd.sqlite3"]


@pytest.mark.parametrize("form", ["{}", "sqlite3://{}", "sqlite3://{}:/elsewhere/replica.sqlite3"])
def test_init_with_the_database_elsewhere(
    form: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    wallet = node_at(elsewhere, 4)
    wallet = wallet.rename(elsewhere / "wallet.sqlite3")
    done = run_cli("init", "--lightning-dir", node_dir, "--wallet", form.format(wallet), url)
    assert f"Found an existing database at {wallet}\n" in done.stdout
    assert os.listdir(node_dir) == ["backup.lock"]
    assert restored_rows(url, tmp_path / "restored.sqlite3") == expected_rows(4)


def test_init_in_the_network_directory_needs_no_option(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    node_at(node_dir, 3)
    run_cli("init", url, cwd=node_dir)
    assert (node_dir / "backup.lock").exists()
    assert restored_rows(url, tmp_path / "restored.sqlite3") == expected_rows(3)


def test_init_with_a_wal_that_was_never_written_back(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    source = node_at(node_dir, 3)
    die_with_open_database(
        source,
        "PRAGMA journal_mode = WAL",
        "PRAGMA wal_autocheckpoint = 0",
        "INSERT INTO items VALUES (4, 'item 4')",
        "UPDATE vars SET intval = 4",
    )
    assert (node_dir / "lightningd.sqlite3-wal").stat().st_size > 0
    assert "data_version 4\n" in run_cli("init", "--lightning-dir", node_dir, url).stdout
    target = tmp_path / "restored.sqlite3"
    assert restored_rows(url, target) == expected_rows(4)
    with contextlib.closing(sqlite3.connect(target)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_init_with_a_hot_journal(node_dir: Path, url: str, tmp_path: Path) -> None:
    source = node_at(node_dir, 3)
    clean = source.read_bytes()
    die_with_open_database(
        source,
        "PRAGMA cache_size = 1",
        "PRAGMA cache_spill = 1",
        "BEGIN",
        "UPDATE items SET body = 'not committed'",
        "UPDATE vars SET intval = 4",
        "INSERT INTO items SELECT NULL, hex(randomblob(9000)) FROM items",
        "INSERT INTO items SELECT NULL, hex(randomblob(9000)) FROM items",
    )
    assert (node_dir / "lightningd.sqlite3-journal").stat().st_size > 0
    assert source.read_bytes() != clean, "nothing reached the file, so the test shows nothing"
    assert "data_version 3\n" in run_cli("init", "--lightning-dir", node_dir, url).stdout
    assert restored_rows(url, tmp_path / "restored.sqlite3") == expected_rows(3)


def test_init_with_a_database_of_0_bytes(node_dir: Path, url: str, tmp_path: Path) -> None:
    (node_dir / "lightningd.sqlite3").touch()
    done = run_cli("init", "--lightning-dir", node_dir, url)
    assert "Stored: nothing yet, data_version 0" in done.stdout
    assert "Found an existing database" not in done.stdout
    run_cli("attach", "--lightning-dir", node_dir, url)


@pytest.mark.parametrize(
    "schema",
    [
        "CREATE TABLE vars (name TEXT PRIMARY KEY, val TEXT)",
        "CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)",
        "CREATE TABLE other (x)",
    ],
)
def test_init_with_the_database_of_an_old_release(
    schema: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    source = node_dir / "lightningd.sqlite3"
    support.apply_calls(source, [(0, [schema])])
    done = run_cli("init", "--lightning-dir", node_dir, url)
    assert "data_version 0" in done.stdout
    assert "Successfully written initial snapshot" in done.stdout
    run_cli("restore", url, tmp_path / "restored.sqlite3")
    assert database.compare(str(source), str(tmp_path / "restored.sqlite3")) == []


def test_init_then_the_plugin_goes_on(node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    run_cli("init", "--lightning-dir", node_dir, url)
    with support.PluginProcess(node_dir) as plugin:
        plugin.write(*first_changes(4)[-1])
        assert plugin.logged("Versions match up")
        assert plugin.close() == 0
    assert restored_rows(url, tmp_path / "restored.sqlite3") == expected_rows(4)


# init refuses


def test_init_while_the_node_runs(node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    with running(node_dir):
        says = ["lightningd is running", "lightningd-regtest.pid", "lightning-cli", "stop`"]
        refused(tmp_path, "init", "--lightning-dir", node_dir, url, says=says)
    run_cli("init", "--lightning-dir", node_dir, url)


def test_init_twice(node_dir: Path, url: str, tmp_path: Path) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    says = ["backup.lock exists already", "`attach`"]
    for other in (url, f"{url}-2"):
        refused(tmp_path, "init", "--lightning-dir", node_dir, other, says=says)


def test_init_through_a_link_to_a_file_to_come(node_dir: Path, url: str, tmp_path: Path) -> None:
    file_of(url).symlink_to(tmp_path / "far-away.bkp")
    run_cli("init", "--lightning-dir", node_dir, url)
    assert file_of(url).is_symlink()
    assert (tmp_path / "far-away.bkp").stat().st_size > 0
    assert json.loads(run_cli("status", url, "--json", check=None).stdout)["version"] == 0


@pytest.mark.parametrize("kind", ["backup", "text", "directory"])
def test_init_where_something_is(kind: str, node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    path = file_of(url)
    says = ["exists already and is never overwritten"]
    says.append("is a directory" if kind == "directory" else "Choose another name")
    if kind == "backup":
        make_backup(url, first_changes(3))
        says.append("It is a backup at version 3")
    elif kind == "text":
        path.write_text("dear diary\n" * 100)
    else:
        path.mkdir()
    refused(tmp_path, "init", "--lightning-dir", node_dir, url, says=says)


@pytest.mark.parametrize(
    ("base", "networks", "right"),
    [
        (".lightning", ["bitcoin"], ["Use --lightning-dir {base}/bitcoin."]),
        (".lightning", [], ["Use --lightning-dir {base}/bitcoin."]),
        ("node", ["regtest"], ["Use --lightning-dir {base}/regtest."]),
        ("node", ["bitcoin", "signet"], ["{base}/bitcoin or {base}/signet."]),
    ],
)
@pytest.mark.parametrize("command", ["init", "attach", "resync"])
def test_base_directory_in_place_of_the_network_directory(
    command: str, base: str, networks: list[str], right: list[str], url: str, tmp_path: Path
) -> None:
    directory = tmp_path / base
    directory.mkdir()
    for network in networks:
        (directory / network).mkdir()
    arguments = [command, "--lightning-dir", directory, *([] if command == "resync" else [url])]
    refused(tmp_path, *arguments, says=[text.format(base=directory) for text in right])


@pytest.mark.parametrize("command", ["init", "attach", "resync"])
def test_missing_directory(command: str, url: str, tmp_path: Path) -> None:
    directory = tmp_path / "typo" / "bitcoin"
    arguments = [command, "--lightning-dir", directory, *([] if command == "resync" else [url])]
    refused(tmp_path, *arguments, says=[f"The directory {directory} does not exist"])


@pytest.mark.parametrize(
    ("command", "bad"),
    [
        ("init", "/mnt/node.bkp"),
        ("init", "file:node.bkp"),
        ("init", "file://node.bkp"),
        ("init", "file:///mnt/"),
        ("init", "ftp://host/node.bkp"),
        ("init", ""),
        ("attach", "node.bkp"),
        ("restore", "node.bkp"),
        ("status", "node.bkp"),
    ],
)
def test_bad_url(command: str, bad: str, node_dir: Path, tmp_path: Path) -> None:
    arguments: dict[str, list[object]] = {
        "init": ["--lightning-dir", node_dir, bad],
        "attach": ["--lightning-dir", node_dir, bad],
        "restore": [bad, tmp_path / "restored.sqlite3"],
        "status": [bad],
    }
    refused(tmp_path, command, *arguments[command], says=[repr(bad), "file:///path/to/file"])


def test_a_path_in_place_of_a_url(tmp_path: Path) -> None:
    for path in ("a disk/node.bkp", f"{tmp_path}/a disk/node.bkp"):
        says = [f"A file's is 'file://{tmp_path}/a disk/node.bkp'"]
        refused(tmp_path, "status", path, says=says, cwd=tmp_path)


def test_more_acknowledge_than_there_are(node_dir: Path, url: str, tmp_path: Path) -> None:
    says = ["2 of 1 destinations cannot acknowledge"]
    refused(tmp_path, "init", "--lightning-dir", node_dir, "--acks", 2, url, says=says)


def test_init_onto_a_disk_that_is_not_there(node_dir: Path, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    url = f"file://{tmp_path}/unmounted/node.bkp"
    says = [f"The directory {tmp_path}/unmounted does not exist", "mount it"]
    refused(tmp_path, "init", "--lightning-dir", node_dir, url, says=says)


@pytest.mark.parametrize(
    ("wallet", "says"),
    [
        ("/nowhere/wallet.sqlite3", "There is no database at /nowhere/wallet.sqlite3"),
        ("sqlite3:///nowhere/w.sqlite3:/b", "There is no database at /nowhere/w.sqlite3"),
        ("postgres://user@host/db", "PostgreSQL"),
    ],
)
@pytest.mark.parametrize("command", ["init", "attach", "resync"])
def test_wallet_that_cannot_be(
    command: str, wallet: str, says: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    arguments = [] if command == "resync" else [url]
    options = ["--lightning-dir", node_dir, "--wallet", wallet]
    refused(tmp_path, command, *options, *arguments, says=[says])


def test_init_with_a_file_that_is_no_database(node_dir: Path, url: str, tmp_path: Path) -> None:
    (node_dir / "lightningd.sqlite3").write_bytes(b"This is no database at all. " * 1000)
    says = ["lightningd.sqlite3: SQLite says: file is not a database"]
    refused(tmp_path, "init", "--lightning-dir", node_dir, url, says=says)


@pytest.mark.parametrize("limit", [10_000, 200_000, 700_000])
def test_failed_init_leaves_nothing(limit: int, node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    support.apply_calls(
        node_dir / "lightningd.sqlite3",
        [(3, ["INSERT INTO items VALUES (99, hex(zeroblob(150000)))"])],
    )
    out = refused(
        *(tmp_path, "init", "--lightning-dir", node_dir, url),
        says=["File too large"] if limit > 400_000 else [],
        preexec_fn=file_size_limit(limit),
    )
    assert "Successfully" not in out
    assert os.listdir(tmp_path / "disk2") == []
    run_cli("init", "--lightning-dir", node_dir, url)


def test_init_that_cannot_write_backup_lock(node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    (node_dir / "backup.lock.new").mkdir()  # Its scratch name is taken: not even root can.
    says = [f"Could not write {node_dir}/backup.lock"]
    refused(tmp_path, "init", "--lightning-dir", node_dir, url, says=says)
    assert os.listdir(tmp_path / "disk2") == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 512 kiB, where the system lets us have one."""
    mount = shutil.which("mount")
    path = tmp_path / "tiny"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=512k", "tmpfs", str(path)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_init_onto_a_full_disk(tiny_disk: Path, node_dir: Path, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    url = f"file://{tiny_disk}/node.bkp"
    says = ["too little room", "have to stay free"]
    refused(tmp_path, "init", "--lightning-dir", node_dir, url, says=says)
    assert os.listdir(tiny_disk) == []


# resync


@pytest.fixture
def outdated(node_dir: Path, url: str) -> Path:
    """A node at version 5 whose backup stayed at 3; the backup's file."""
    node_at(node_dir, 5)
    write_lock(node_dir, url)
    return make_backup(url, first_changes(3))


def resync(node_dir: Path, *options: str, check: int = 0, **more: Any) -> Any:
    return run_cli("resync", "--lightning-dir", node_dir, *options, check=check, **more)


@pytest.mark.parametrize("options", [["--yes"], []])
def test_resync(
    options: list[str], outdated: Path, node_dir: Path, url: str, tmp_path: Path
) -> None:
    old = outdated.read_bytes()
    done = resync(node_dir, *options, input="" if options else "y\n")
    assert "The node is at version 5, the backup at version 3." in done.stdout
    assert ("Replace the backup by a snapshot of the node? [y/N]" in done.stdout) != bool(options)
    assert f"The backup {url} is now at version 5." in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("The old one is kept"))
    kept = Path(line.partition(": ")[2])
    assert kept.read_bytes() == old
    assert restored_rows(f"file://{kept}", tmp_path / "from-old.sqlite3") == expected_rows(3)
    assert restored_rows(url, tmp_path / "from-new.sqlite3") == expected_rows(5)
    names = set(contents(outdated.parent))
    assert names == {outdated.name, kept.name}, "something was left behind"
    with support.PluginProcess(node_dir) as plugin:
        plugin.write(*first_changes(6)[-1])
        assert plugin.logged("Versions match up")
        assert plugin.close() == 0
    assert restored_rows(url, tmp_path / "gone-on.sqlite3") == expected_rows(6)


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "what\n"])
def test_resync_not_confirmed(answer: str, outdated: Path, node_dir: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    done = resync(node_dir, check=1, input=answer)
    assert contents(tmp_path) == before
    assert "The node is at version 5, the backup at version 3." in done.stdout
    assert done.stderr.splitlines()[-1] in ("Aborted!", "Error: Aborted!")


def test_resync_twice_keeps_both(outdated: Path, node_dir: Path) -> None:
    resync(node_dir, "--yes")
    done = resync(node_dir, "--yes")  # Up to date already: that is allowed.
    assert "The node is at version 5, the backup at version 5." in done.stdout
    assert len(contents(outdated.parent)) == 3


def test_resync_of_a_damaged_backup(
    outdated: Path, node_dir: Path, url: str, tmp_path: Path
) -> None:
    second = support.records_of(outdated)[1][0]
    support.flip(outdated, second.offset + 130)
    resync(node_dir, "--yes")
    assert restored_rows(url, tmp_path / "restored.sqlite3") == expected_rows(5)


def test_resync_of_an_empty_backup(node_dir: Path, url: str, tmp_path: Path) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    node_at(node_dir, 4)
    resync(node_dir, "--yes")
    assert restored_rows(url, tmp_path / "restored.sqlite3") == expected_rows(4)


def test_resync_heals_what_the_plugin_refuses(
    outdated: Path, node_dir: Path, url: str, tmp_path: Path
) -> None:
    support.change_lock(node_dir, heal="off")
    with support.PluginProcess(node_dir) as plugin:
        with pytest.raises(support.Refused):
            plugin.write(*first_changes(6)[-1])
        (line,) = plugin.errors()
        plugin.close()
    command = line.partition("`")[2].partition("`")[0]
    program, *arguments = shlex.split(command)
    assert program == str(support.CLI)
    run_cli(*arguments, input="y\n")
    assert restored_rows(url, tmp_path / "restored.sqlite3") == expected_rows(5)


@pytest.mark.parametrize(
    ("backup", "says"),
    [
        (6, ["lost some state", "version 5, the backup at version 6", "start the node"]),
        (7, ["lost some state", "version 5, the backup at version 7"]),
    ],
)
def test_resync_refuses_when_the_backup_is_ahead(
    backup: int, says: list[str], node_dir: Path, url: str, tmp_path: Path
) -> None:
    node_at(node_dir, 5)
    write_lock(node_dir, url)
    make_backup(url, first_changes(backup))
    refused(tmp_path, "resync", "--yes", "--lightning-dir", node_dir, says=says)


def test_resync_refuses_when_the_backup_was_ahead_before_its_damage(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    node_at(node_dir, 5)
    write_lock(node_dir, url)
    path = make_backup(url, first_changes(9))
    support.flip(path, support.records_of(path)[2][0].offset + 130)
    before = contents(tmp_path)
    done = run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
    assert contents(tmp_path) == before
    (error,) = done.stderr.splitlines()
    assert error.startswith("Error: lightningd seems to have lost some state")
    assert "The node is at version 5, the backup at version 9" in error


def test_resync_refuses_without_a_database(
    outdated: Path, node_dir: Path, url: str, tmp_path: Path
) -> None:
    path = node_dir / "lightningd.sqlite3"
    for content in (b"", None):
        path.unlink() if content is None else path.write_bytes(content)
        says = ["The node has no database, or an empty one", "add --wallet", f"restore {url}"]
        refused(tmp_path, "resync", "--yes", "--lightning-dir", node_dir, says=says)


def test_resync_refuses_an_unsound_database(outdated: Path, node_dir: Path, tmp_path: Path) -> None:
    path = node_dir / "lightningd.sqlite3"
    support.apply_calls(path, [(5, ["CREATE INDEX by_body ON items (body)"])])
    break_index(path, "by_body")
    says = ["is not sound: integrity_check", "Nothing was stored"]
    refused(tmp_path, "resync", "--yes", "--lightning-dir", node_dir, says=says)


def break_index(path: Path, name: str) -> None:
    """Let an entry of the index ``name`` differ from its row: reads go on, checks fail."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (root,) = connection.execute(query, (name,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    data = bytearray(path.read_bytes())
    at = data.index(b"item 3", (root - 1) * size)
    assert at < root * size
    data[at : at + 6] = b"item X"
    path.write_bytes(data)


def test_resync_refuses_without_backup_lock(outdated: Path, node_dir: Path, tmp_path: Path) -> None:
    (node_dir / "backup.lock").unlink()
    says = ["Could not find backup.lock in the lightning-dir"]
    refused(tmp_path, "resync", "--yes", "--lightning-dir", node_dir, says=says)


def test_resync_refuses_while_the_node_runs(outdated: Path, node_dir: Path, tmp_path: Path) -> None:
    with running(node_dir):
        says = ["lightningd is running"]
        refused(tmp_path, "resync", "--yes", "--lightning-dir", node_dir, says=says)


def test_resync_refuses_while_another_process_holds_the_backup(
    outdated: Path, node_dir: Path, tmp_path: Path
) -> None:
    with support.PluginProcess(node_dir) as plugin:
        plugin.write(*first_changes(4)[-1])
        says = ["Another process", f"(pid {plugin.process.pid})", "Stop that lightningd"]
        refused(tmp_path, "resync", "--yes", "--lightning-dir", node_dir, says=says)
        plugin.close()


def test_resync_refuses_without_a_backup(outdated: Path, node_dir: Path, tmp_path: Path) -> None:
    outdated.unlink()
    says = ["There is no backup at file://"]
    refused(tmp_path, "resync", "--yes", "--lightning-dir", node_dir, says=says)


@pytest.mark.parametrize("limit", [10_000, 500_000])
def test_failed_resync_leaves_the_old_backup(
    limit: int, outdated: Path, node_dir: Path, tmp_path: Path
) -> None:
    support.apply_calls(
        node_dir / "lightningd.sqlite3",
        [(5, ["INSERT INTO items VALUES (99, hex(zeroblob(150000)))"])],
    )
    refused(
        *(tmp_path, "resync", "--yes", "--lightning-dir", node_dir),
        says=[],
        preexec_fn=file_size_limit(limit),
    )


# attach


def attach(node_dir: Path, url: str) -> Any:
    return run_cli("attach", "--lightning-dir", node_dir, url)


def test_attach_after_a_restore(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(5))
    fresh = tmp_path / "new-machine" / "bitcoin"
    fresh.mkdir(parents=True)
    out = run_cli("restore", url, fresh).stdout
    (line,) = (line for line in out.splitlines() if "To go on with this backup" in line)
    program, *arguments = shlex.split(line.partition(": ")[2])
    assert program == str(support.CLI)
    done = run_cli(*arguments)
    assert f"{fresh}/backup.lock now names {url}, at version 5." in done.stdout
    assert f"important-plugin={support.PLUGIN}\n" in done.stdout
    assert sorted(os.listdir(fresh)) == ["backup.lock", "lightningd.sqlite3"]
    with support.PluginProcess(fresh) as plugin:
        plugin.write(*first_changes(6)[-1])
        assert plugin.logged("Versions match up")
        assert plugin.close() == 0


def test_attach_after_the_file_was_moved(node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 5)
    old_lock = write_lock(node_dir, url).read_bytes()
    moved = tmp_path / "moved.bkp"
    make_backup(url, first_changes(5)).rename(moved)
    for number in ("", "-2"):
        done = attach(node_dir, f"file://{moved}")
        kept = node_dir / f"backup.lock.old{number}"
        assert f"The former backup.lock is kept: {kept}\n" in done.stdout
    assert (node_dir / "backup.lock.old").read_bytes() == old_lock
    lock = json.loads((node_dir / "backup.lock").read_text())
    assert lock["backend_url"] == f"file://{moved}"
    assert FileBackend(f"file://{moved}").status().owner == lock["owner"][:16]


def test_attach_replaces_a_damaged_backup_lock(node_dir: Path, url: str) -> None:
    node_at(node_dir, 5)
    make_backup(url, first_changes(5))
    (node_dir / "backup.lock").write_text('{"backend_')
    attach(node_dir, url)
    assert (node_dir / "backup.lock.old").read_text() == '{"backend_'
    assert json.loads((node_dir / "backup.lock").read_text())["backend_url"] == url


@pytest.mark.parametrize("backup", [5, 6])
def test_attach_when_they_agree(backup: int, node_dir: Path, url: str) -> None:
    node_at(node_dir, 5)  # One change ahead is what the plugin rewinds.
    make_backup(url, first_changes(backup))
    attach(node_dir, url)


def test_attach_an_empty_backup_to_a_fresh_node(node_dir: Path, url: str) -> None:
    make_backup(url)
    attach(node_dir, url)


@pytest.mark.parametrize(
    ("node", "backup", "says"),
    [
        (6, 5, ["Backup is out of date", "version 6, the backup at version 5", "init`"]),
        (5, 7, ["lost some state", "version 5, the backup at version 7", "restore file://"]),
        (0, 5, ["There is no database at", "add --wallet", "restore file://", "first"]),
        (3, 0, ["Backup is out of date", "version 3, the backup at version 0", "init`"]),
    ],
)
def test_attach_refuses_when_they_disagree(
    node: int, backup: int, says: list[str], node_dir: Path, url: str, tmp_path: Path
) -> None:
    if node:
        node_at(node_dir, node)
    make_backup(url, first_changes(backup) if backup else [])
    write_lock(node_dir, "file:///the/old/one")
    refused(tmp_path, "attach", "--lightning-dir", node_dir, url, says=says)


def test_attach_names_the_command_for_a_backup_that_is_behind(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    run_cli("init", url)
    run_cli("init", "--lightning-dir", node_dir, f"file://{tmp_path}/own.bkp")
    node_at(node_dir, 3)
    with ServerProcess(url).ready() as server:
        for there, says in [(server.url, "move"), (f"file://{tmp_path}/own.bkp", "resync")]:
            done = run_cli("attach", "--lightning-dir", node_dir, there, check=1)
            assert "out of date" in done.stderr and f" {says} --lightning-dir" in done.stderr


def test_attach_refuses_one_ahead_that_cannot_be_rewound(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    node_at(node_dir, 5)
    make_backup(url, [*first_changes(6), (6, ["PRAGMA foreign_keys = OFF;"])])
    says = ["lost some state", "version 5, the backup at version 6"]
    refused(tmp_path, "attach", "--lightning-dir", node_dir, url, says=says)


def test_attach_refuses_damage(node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 5)
    path = make_backup(url, first_changes(5))
    support.flip(path, support.records_of(path)[2][0].offset + 130)
    says = ["is damaged at offset", "versions 3 to 5 stand behind the damage"]
    refused(tmp_path, "attach", "--lightning-dir", node_dir, url, says=says)


def test_attach_refuses_while_the_node_runs(node_dir: Path, url: str, tmp_path: Path) -> None:
    make_backup(url)
    with running(node_dir):
        says = ["lightningd is running"]
        refused(tmp_path, "attach", "--lightning-dir", node_dir, url, says=says)


def test_attach_refuses_without_a_backup(node_dir: Path, url: str, tmp_path: Path) -> None:
    says = [f"There is no backup at {url}"]
    refused(tmp_path, "attach", "--lightning-dir", node_dir, url, says=says)


def test_failed_attach_keeps_backup_lock(node_dir: Path, url: str, tmp_path: Path) -> None:
    make_backup(url)
    write_lock(node_dir, "file:///the/old/one")
    (node_dir / "backup.lock.new").mkdir()
    says = ["backup.lock"]
    refused(tmp_path, "attach", "--lightning-dir", node_dir, url, says=says)


# restore


def test_restore_to_a_file(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(5))
    before = contents(tmp_path)
    done = run_cli("restore", url, tmp_path / "there.sqlite3")
    assert f"Restored version 5 to {tmp_path}/there.sqlite3\n" in done.stdout
    assert "Last change: 20" in done.stdout
    assert "5 changes replayed" in done.stdout
    assert "never run on anything but its latest state" in done.stdout
    there = tmp_path / "there.sqlite3"
    assert f"attach --lightning-dir DIR --wallet {there} {url}\n" in done.stdout
    assert done.stderr == ""
    after = contents(tmp_path)
    assert set(after) - set(before) == {"there.sqlite3"}
    assert before.items() <= after.items()
    assert (tmp_path / "there.sqlite3").stat().st_mode & 0o077 == 0


def test_restore_to_a_directory(url: str, node_dir: Path) -> None:
    make_backup(url, first_changes(3))
    run_cli("restore", url, node_dir)
    assert os.listdir(node_dir) == ["lightningd.sqlite3"]
    assert database.version_of(str(node_dir / "lightningd.sqlite3")) == 3


def test_restore_beside_a_running_node(node_dir: Path, url: str, tmp_path: Path) -> None:
    write_lock(node_dir, url)
    make_backup(url, first_changes(3))
    with support.PluginProcess(node_dir) as plugin:
        plugin.write(*first_changes(4)[-1])
        assert restored_rows(url, tmp_path / "now.sqlite3") == expected_rows(4)
        plugin.write(*first_changes(5)[-1])
        assert plugin.close() == 0


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal", "-shm"])
def test_restore_never_overwrites(suffix: str, url: str, node_dir: Path, tmp_path: Path) -> None:
    make_backup(url, first_changes(3))
    taken = node_dir / f"lightningd.sqlite3{suffix}"
    taken.write_bytes(b"")
    says = [f"{taken} exists already and is never overwritten", "Move it away"]
    for dest in (node_dir, node_dir / "lightningd.sqlite3"):
        refused(tmp_path, "restore", url, dest, says=says)
        refused(tmp_path, "restore", "--allow-damaged", url, dest, says=says)
    with running(node_dir):
        says = [says[0], "Leave it where it is: lightningd is running"]
        refused(tmp_path, "restore", url, node_dir, says=says)


def test_restore_does_not_follow_a_link_onto_a_file(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(3))
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    refused(tmp_path, "restore", url, tmp_path / "link", says=["exists already"])


def test_restore_into_a_directory_that_is_not_there(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(3))
    says = [f"The directory {tmp_path}/typo does not exist"]
    refused(tmp_path, "restore", url, tmp_path / "typo" / "there.sqlite3", says=says)


def test_restore_without_a_backup(url: str, tmp_path: Path) -> None:
    refused(
        tmp_path, "restore", url, tmp_path / "there.sqlite3", says=[f"There is no backup at {url}"]
    )


def test_restore_of_something_else(url: str, tmp_path: Path) -> None:
    file_of(url).write_bytes(b"SQLite format 3\0" + bytes(5000))
    refused(tmp_path, "restore", url, tmp_path / "there.sqlite3", says=["is not a backup"])


def test_restore_of_an_empty_backup(url: str, tmp_path: Path) -> None:
    make_backup(url)
    for options in ([], ["--allow-damaged"]):
        says = ["The backup holds no change yet"]
        refused(tmp_path, "restore", *options, url, tmp_path / "there.sqlite3", says=says)


def test_restore_of_a_snapshot_alone(node_dir: Path, url: str, tmp_path: Path) -> None:
    source = node_at(node_dir, 5)
    support.apply_calls(source, [(5, ["INSERT INTO items VALUES (9, hex(zeroblob(2000000)))"])])
    run_cli("init", "--lightning-dir", node_dir, url)
    done = run_cli("restore", url, tmp_path / "there.sqlite3")
    assert "Restored version 5" in done.stdout
    assert "0 changes replayed" in done.stdout
    assert database.compare(str(source), str(tmp_path / "there.sqlite3")) == []


def test_restore_leaves_out_a_torn_tail(url: str, tmp_path: Path) -> None:
    path = make_backup(url, first_changes(5))
    last = support.records_of(path)[-1][0]
    os.truncate(path, last.end - 20)
    os.truncate(path, last.end + 1000)
    done = run_cli("restore", url, tmp_path / "there.sqlite3")
    assert "Restored version 4" in done.stdout
    assert "An append that was never acknowledged stood at the end and was left out." in done.stdout


def damaged_backup(url: str) -> Path:
    """A backup of 5 changes, the third of which does not check."""
    path = make_backup(url, first_changes(5))
    support.flip(path, support.records_of(path)[2][0].offset + 130)
    return path


def test_restore_refuses_damage(url: str, tmp_path: Path) -> None:
    damaged_backup(url)
    says = [
        "is damaged at offset",
        "good up to version 2",
        "versions 3 to 5 stand behind the damage",
        "`",
        "--allow-damaged",
    ]
    refused(tmp_path, "restore", url, tmp_path / "there.sqlite3", says=says)


def test_restore_of_what_stands_before_damage(url: str, tmp_path: Path) -> None:
    damaged_backup(url)
    done = run_cli("restore", "--allow-damaged", url, tmp_path / "there.sqlite3", check=3)
    assert "Restored version 2" in done.stdout
    assert "versions 3 to 5 stand behind the damage" in done.stderr
    assert "emergencyrecover" in done.stderr
    for command in ("channels", "channels --static"):
        assert f"{support.CLI} {command} {tmp_path}/there.sqlite3\n" in done.stderr
    assert "Never start the node on it" in done.stderr
    assert "attach" not in done.stdout
    with database.opened(str(tmp_path / "there.sqlite3")) as connection:
        assert connection.execute("SELECT id FROM items").fetchall() == [(2,)]


def test_restore_with_a_damaged_header(url: str, tmp_path: Path) -> None:
    support.flip(make_backup(url, first_changes(5)), 30)
    refused(tmp_path, "restore", url, tmp_path / "there.sqlite3", says=["is damaged at offset 0"])
    run_cli("restore", "--allow-damaged", url, tmp_path / "there.sqlite3", check=3)
    assert database.version_of(str(tmp_path / "there.sqlite3")) == 5


def test_restore_with_nothing_before_the_damage(url: str, tmp_path: Path) -> None:
    path = make_backup(url, first_changes(5))
    support.flip(path, support.records_of(path)[0][0].offset + 130)
    for options in ([], ["--allow-damaged"]):
        says = ["is damaged at offset 64", "salvage FILE OUTDIR`"]
        refused(tmp_path, "restore", *options, url, tmp_path / "there.sqlite3", says=says)


# restore --up-to


OFF, ON = (["PRAGMA foreign_keys = OFF;"], ["PRAGMA foreign_keys = ON;"])
BAD: dict[str, Call] = {
    "fails": change(6, "INSERT INTO nowhere VALUES (1)"),
    "fails half-way": change(6, "DELETE FROM items", "INSERT INTO nowhere VALUES (1)"),
    "does not bump": (5, ["DELETE FROM items", "INSERT INTO nowhere VALUES (1)"]),
    "a PRAGMA": (5, ["PRAGMA writable_schema = ON;"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_change_that_does_not_replay_leaves_what_stands_before(
    bad: str, url: str, tmp_path: Path
) -> None:
    """Named by verify and restore; --up-to, or --allow-damaged, deliver what stands before."""
    url += " ;'x"
    make_backup(url, first_changes(5))
    rest = [change(6, "SELECT 1"), change(7, "SELECT 1")]
    # Not by a session: it would not take what no node sends.
    with contextlib.closing(FileBackend(url)) as backend:
        backend.open()
        for version, statements in [BAD[bad], *rest[BAD[bad][0] - 5 :]]:
            backend.add_change(Change(version, None, statements))
    there = tmp_path / "the re.sqlite3"
    step = f"`{shlex.join([str(support.CLI), 'restore', '--up-to', '5', url, str(there)])}`"
    refused(tmp_path, "restore", url, there, says=["does not replay", step])
    verified = step.replace(shlex.quote(str(there)), "DEST")
    refused(tmp_path, "verify", url, says=["does not replay", verified])
    support.apply_calls(tmp_path / "node", first_changes(5))
    for options in (["--up-to", "5"], ["--allow-damaged"], ["--allow-damaged", "--up-to", "5"]):
        done = run_cli("restore", *options, url, there, check=3)
        assert f"Restored version 5 to {there}\n" in done.stdout
        assert "OLD state" in done.stderr and "attach" not in done.stdout
        what = "as you asked" if "--up-to" in options else "does not replay"
        assert what in done.stderr.splitlines()[0]
        assert database.compare(str(tmp_path / "node"), str(there)) == []
        there.unlink()


def test_restore_up_to_each_version(url: str, tmp_path: Path) -> None:
    """The node's own state at that version, whatever PRAGMA calls stand there."""
    calls = [
        change(
            4, "CREATE TABLE parents (id INTEGER PRIMARY KEY)", "INSERT INTO parents VALUES (1)"
        ),
        change(5, "CREATE TABLE children (p REFERENCES parents ON DELETE CASCADE)"),
        change(6, "INSERT INTO children VALUES (1)"),
        (6, OFF),
        change(7, "DROP TABLE parents", "CREATE TABLE parents (id INTEGER PRIMARY KEY)"),
        (7, ON),
        change(8, "INSERT INTO parents VALUES (1)"),
    ]
    support.apply_calls(tmp_path / "node", first_changes(3))
    FileBackend(url).create(database.copy(str(tmp_path / "node"), str(tmp_path / "copy")))
    add_session(url, calls)
    for version in range(3, 9):
        done = run_cli("restore", "--up-to", version, url, tmp_path / f"{version}.sqlite3", check=3)
        assert f"Restored version {version} " in done.stdout
        node = tmp_path / f"node{version}"
        shutil.copyfile(tmp_path / "node", node)
        support.apply_calls(node, [call for call in calls if call[0] <= version])
        assert database.compare(str(node), str(tmp_path / f"{version}.sqlite3")) == []
    for version, says in [
        (2, "has no version 2: it begins with version 3"),
        (9, "has no version 9: it holds versions 3 to 8"),
        (4294967296, "has no version 4294967296: it holds"),
    ]:
        refused(
            tmp_path, "restore", "--up-to", version, url, tmp_path / "there.sqlite3", says=[says]
        )
    run_cli("restore", "--up-to", 0, url, tmp_path / "there.sqlite3", check=2)


def test_restore_up_to_from_a_server(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(300))
    with ServerProcess(url) as server:
        for version in (1, 299, 300):
            run_cli(
                "restore", "--up-to", version, server.url, tmp_path / f"{version}.sqlite3", check=3
            )
            assert database.version_of(str(tmp_path / f"{version}.sqlite3")) == version
        arguments = ["restore", "--up-to", 301, server.url, tmp_path / "there.sqlite3"]
        refused(tmp_path, *arguments, says=["it holds versions 1 to 300"])


def test_restore_up_to_beside_damage(url: str, tmp_path: Path) -> None:
    """Before it all is well; behind it nothing can be had."""
    path = make_backup(url, first_changes(9))
    support.flip(path, support.records_of(path)[5][0].offset + 130)
    for version in (3, 5):
        run_cli("restore", "--up-to", version, url, tmp_path / f"{version}.sqlite3", check=3)
        support.apply_calls(tmp_path / f"node{version}", first_changes(version))
        paths = str(tmp_path / f"node{version}"), str(tmp_path / f"{version}.sqlite3")
        assert database.compare(*paths) == []
    for options in ([], ["--allow-damaged"]):
        arguments = ["restore", *options, "--up-to", 7, url, tmp_path / "there.sqlite3"]
        refused(tmp_path, *arguments, says=["good up to version 5"])


def test_restore_with_nothing_before_what_does_not_replay(url: str, tmp_path: Path) -> None:
    make_backup(url, [change(1, "INSERT INTO nowhere VALUES (1)")])
    for options in ([], ["--allow-damaged"]):
        done = run_cli("restore", *options, url, tmp_path / "there.sqlite3", check=1)
        assert "version 1 does not replay" in done.stderr and "--up-to" not in done.stderr
    refused(
        tmp_path,
        "restore",
        "--up-to",
        1,
        url,
        tmp_path / "there.sqlite3",
        says=["version 1 does not"],
    )


ORPHAN = [
    *("PRAGMA foreign_keys = OFF", "CREATE TABLE parents (id INTEGER PRIMARY KEY)"),
    "CREATE TABLE children (id INTEGER PRIMARY KEY, parent REFERENCES parents (id))",
    "INSERT INTO children VALUES (1, 77)",
]


@pytest.mark.parametrize("kind", ["foreign key", "index"])
def test_restore_delivers_what_sqlite_complains_of(
    kind: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    source = node_at(node_dir, 5)
    if kind == "index":
        support.apply_calls(source, [(5, ["CREATE INDEX by_body ON items (body)"])])
        break_index(source, "by_body")
    else:
        with contextlib.closing(sqlite3.connect(source, isolation_level=None)) as connection:
            for statement in ORPHAN:
                connection.execute(statement)
    FileBackend(url).create(Snapshot(str(source), 5))
    done = run_cli("restore", url, tmp_path / "there.sqlite3", check=3)
    assert "Restored version 5" in done.stdout
    assert "attach" in done.stdout
    if kind == "index":
        assert "WARNING: integrity_check: " in done.stderr
    else:
        assert "WARNING: foreign_key_check: row 1 of children" in done.stderr
    assert "WARNING: SQLite's checks fail for this database." in done.stderr
    assert database.compare(str(source), str(tmp_path / "there.sqlite3")) == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (change(6, "INSERT INTO nowhere VALUES (1)"), ["version 6 does not replay", "nowhere"]),
        (change(6, "UPDATE vars SET intval = 50"), ["data_version is 50", "the backup's is 6"]),
    ],
)
def test_restore_that_does_not_come_out(
    call: Call, says: list[str], url: str, tmp_path: Path
) -> None:
    make_backup(url, [*first_changes(5), call])
    refused(tmp_path, "restore", url, tmp_path / "there.sqlite3", says=says)


@pytest.mark.parametrize("limit", [5_000, 100_000])
def test_restore_to_a_full_disk(limit: int, node_dir: Path, url: str, tmp_path: Path) -> None:
    source = node_at(node_dir, 3)
    support.apply_calls(source, [(3, ["INSERT INTO items VALUES (9, hex(zeroblob(90000)))"])])
    run_cli("init", "--lightning-dir", node_dir, url)
    add_session(url, [change(4, "INSERT INTO items VALUES (10, hex(zeroblob(90000)))")])
    refused(
        *(tmp_path, "restore", url, tmp_path / "there.sqlite3"),
        says=["there.sqlite3.restoring"],
        preexec_fn=file_size_limit(limit),
    )


def test_restore_starts_over_after_an_interrupted_one(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(3))
    for suffix in ("", "-journal", "-wal"):
        (tmp_path / f"there.sqlite3.restoring{suffix}").write_bytes(b"half of it")
    run_cli("restore", url, tmp_path / "there.sqlite3")
    assert sorted(path.name for path in tmp_path.glob("there*")) == ["there.sqlite3"]


# status


def test_status(node_dir: Path, url: str, tmp_path: Path) -> None:
    node_at(node_dir, 3)
    run_cli("init", "--lightning-dir", node_dir, url)
    add_session(url, first_changes(5)[3:])
    before = contents(tmp_path)
    text = run_with_disk(10**12, 10**12, "status", url, check=0).stdout
    rows = dict(line.split(":", 1) for line in text.splitlines())
    found = {name: value.strip() for name, value in rows.items()}
    assert found["backup"] == f"{url} (file layout 2)"
    assert found["version"] == "5"
    assert found["changes"] == "2 since the snapshot"
    assert found["can be rewound"] == "yes, to version 4"
    assert found["torn tail"] == "no"
    assert found["damage"] == "none at its end (--check reads all of it)"
    checked = run_with_disk(10**12, 10**12, "status", "--check", url, check=0).stdout
    assert "damage:         none\n" in checked
    assert found["last change"].endswith(" UTC")
    shown = run_with_disk(10**12, 10**12, "status", "--json", url, check=0)
    values = json.loads(shown.stdout)
    assert values["backup_id"] == found["backup id"]
    assert (values["version"], values["prev_version"], values["version_count"]) == (5, 4, 3)
    assert values["changes"] == 2
    assert values["snapshot_size"] == (node_dir / "lightningd.sqlite3").stat().st_size
    assert values["allocated"] == file_of(url).stat().st_size
    assert values["size"] == support.records_of(file_of(url))[-1][0].end
    assert values["torn_tail"] is False
    assert values["damage"] is None
    assert values["warnings"] == []
    assert contents(tmp_path) == before


def test_status_of_an_empty_backup(url: str) -> None:
    make_backup(url)
    values = json.loads(run_with_disk(10**12, 10**12, "status", "--json", url, check=0).stdout)
    assert (values["version"], values["prev_version"], values["changes"]) == (0, None, 0)
    assert values["last_change_ns"] is None
    assert "none" in run_with_disk(10**12, 10**12, "status", url, check=0).stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_status_of_a_damaged_backup(as_json: bool, url: str, tmp_path: Path) -> None:
    damaged_backup(url)
    before = contents(tmp_path)
    options = ["--json"] if as_json else []
    done = run_with_disk(10**12, 10**12, "status", "--check", url, *options, check=1)
    assert contents(tmp_path) == before
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert "versions 3 to 5 stand behind the damage" in done.stderr
    if as_json:
        assert "is damaged at offset" in json.loads(done.stdout)["damage"]
    else:
        assert "version:        2\n" in done.stdout


def test_status_of_a_torn_tail(url: str) -> None:
    path = make_backup(url, first_changes(5))
    end = support.records_of(path)[-1][0].end
    os.truncate(path, end - 20)
    os.truncate(path, end + 1000)
    done = run_with_disk(10**12, 10**12, "status", url, check=0)
    assert "torn tail:      yes" in done.stdout


@pytest.mark.parametrize(
    ("free", "total"), [(100 << 20, 1 << 30), (500 << 20, 1 << 40), (0, 1 << 30)]
)
def test_status_warns_of_a_nearly_full_disk(free: int, total: int, url: str) -> None:
    path = make_backup(url, first_changes(5))
    done = run_with_disk(free, total, "status", url, check=4)
    assert done.stderr.startswith(f"Warning: The disk of {path} is nearly full")
    assert done.stderr.count("\n") == 1
    shown = run_with_disk(free, total, "status", "--json", url, check=4)
    assert "nearly full" in json.loads(shown.stdout)["warnings"][0]
    support.flip(path, support.records_of(path)[2][0].offset + 130)
    assert "Error: " in run_with_disk(free, total, "status", "--check", url, check=1).stderr


def test_status_of_a_disk_with_room(url: str) -> None:
    make_backup(url, first_changes(5))
    assert run_with_disk(1 << 30, 10 << 30, "status", url, check=0).stderr == ""
    assert run_with_disk(190 << 30, 4 << 40, "status", url, check=0).stderr == ""


def test_status_without_a_backup(url: str, tmp_path: Path) -> None:
    refused(tmp_path, "status", url, says=[f"There is no backup at {url}"])
    out = refused(tmp_path, "status", "--json", url, says=[f"There is no backup at {url}"])
    assert json.loads(out)["url"] == url
    assert "There is no backup" in json.loads(out)["error"]


def test_status_beside_a_running_node(node_dir: Path, url: str, tmp_path: Path) -> None:
    write_lock(node_dir, url)
    make_backup(url, first_changes(3))
    with support.PluginProcess(node_dir) as plugin:
        for call in first_changes(6)[3:]:
            plugin.write(*call)
            before = contents(tmp_path)
            values = json.loads(run_cli("status", "--json", url, check=None).stdout)
            assert (values["version"], values["damage"]) == (call[0], None)
            assert contents(tmp_path) == before
        assert plugin.close() == 0


def test_reading_commands_make_no_lock_file(url: str, tmp_path: Path) -> None:
    path = make_backup(url, first_changes(3))
    writer = path.with_name(f"{path.name}.writer")
    writer.unlink()
    run_cli("status", url, check=None)
    run_cli("restore", url, tmp_path / "there.sqlite3")
    assert not writer.exists()


# Words


def blank_dir(tmp_path: Path) -> Path:
    """A directory whose name a shell would take apart, and which has two blanks in a row."""
    path = tmp_path / "two  blanks; $(touch harm)"
    path.mkdir()
    return path


def next_command(line: str) -> list[str]:
    """The command in backticks that a message names, as a shell takes it apart."""
    return shlex.split(line.split("`")[1])


def test_next_commands_are_for_a_shell(tmp_path: Path) -> None:
    place = blank_dir(tmp_path)
    node_dir = support.network_dir(place)
    url = f"file://{place}/node.bkp"
    make_backup(url, first_changes(5))
    write_lock(node_dir, url)
    node_at(node_dir, 2)
    line = run_cli("resync", "--lightning-dir", node_dir, check=1).stderr
    assert next_command(line) == [str(support.CLI), "restore", url, "DEST"]
    (node_dir / "lightningd.sqlite3").unlink()
    line = run_cli("attach", "--lightning-dir", node_dir, url, check=1).stderr
    assert f"There is no database at {node_dir}/lightningd.sqlite3" in line
    assert next_command(line) == [str(support.CLI), "restore", url, str(node_dir)]
    (node_dir / "backup.lock").unlink()
    line = run_cli("resync", "--lightning-dir", node_dir, check=1).stderr
    assert next_command(line)[1:] == ["init", "--lightning-dir", str(node_dir), "URL"]
    node_at(node_dir, 5)
    with running(node_dir):
        line = run_cli("attach", "--lightning-dir", node_dir, url, check=1).stderr
    assert next_command(line)[1] == f"--lightning-dir={node_dir.parent}"
    missing = place / "missing"
    line = run_cli("attach", "--lightning-dir", missing, url, check=1).stderr
    assert next_command(line) == ["mkdir", "-p", str(missing)]
    line = run_cli("restore", url, f"{missing}/", check=1).stderr
    assert next_command(line) == ["mkdir", "-p", f"{missing}/"]


def test_messages_are_one_line_and_keep_what_is_in_it() -> None:
    error = BackupError("a  b\tc\r\nd \x1b[2J\u2028e", " now\n")
    assert str(error) == "a  b\tc d  [2J e now"


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "run it as the node's user"),
        (errno.EPERM, "`namei -l '/x  y'`"),
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "`df -h /`"),
        (errno.EDQUOT, "Make room"),
        (errno.EISDIR, "Check the path"),
        (errno.ENOTDIR, "Check the path"),
        (errno.ENAMETOOLONG, "Check the path"),
        (errno.EMFILE, "run out"),
        (errno.EIO, "cable"),
    ],
)
def test_disk_error_says_what_helps(number: int, says: str) -> None:
    error = DiskError("/x  y", OSError(number, os.strerror(number)), "write")
    assert says in error.next_step and ("cable" in error.next_step) == (number == errno.EIO)
    assert error.problem == f"Could not write /x  y: {os.strerror(number)}."


@pytest.mark.parametrize("command", ["init", "init-server", "status", "verify", "restore"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_url_of_what_is_no_file(
    kind: str, command: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    path = file_of(url)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    arguments: dict[str, list[object]] = {
        "init": ["init", "--lightning-dir", node_dir, url],
        "init-server": ["init", url],
        "restore": ["restore", url, tmp_path / "there.sqlite3"],
    }
    words = arguments.get(command, [command, url])
    says = ["is a directory" if kind == "directory" else "a FIFO, a socket or a device"]
    refused(tmp_path, *words, says=says)


@pytest.mark.parametrize("command", ["compact", "server", "upgrade"])
def test_fifo_is_not_waited_for(command: str, url: str, tmp_path: Path) -> None:
    os.mkfifo(file_of(url))
    words = [command, url, "127.0.0.1:1"] if command == "server" else [command, url]
    refused(tmp_path, *words, says=["a FIFO"])


@pytest.mark.parametrize("dest", ["bitcoin", "bitcoin/", "deep.er/", ".lightning"])
def test_restore_to_a_directory_that_is_not_there(dest: str, url: str, tmp_path: Path) -> None:
    """No database file of a directory's name."""
    make_backup(url, first_changes(3))
    path = f"{tmp_path}/{dest}"
    says = [f"There is no directory {path}", f"`mkdir -p {path}`"]
    refused(tmp_path, "restore", url, path, says=says)
    os.mkdir(path)
    run_cli("restore", url, path)
    assert database.version_of(os.path.join(path, "lightningd.sqlite3")) == 3


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that is mounted read-only, with a backup at version 3."""
    path = tmp_path / "read-only"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        make_backup(f"file://{path}/node.bkp", first_changes(3))
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("command", ["init", "resync", "compact", "verify"])
def test_read_only_backup_disk_is_what_is_named(
    command: str, read_only_disk: Path, node_dir: Path
) -> None:
    source, url = node_at(node_dir, 5), f"file://{read_only_disk}/node.bkp"
    if command == "resync":
        write_lock(node_dir, url)
    arguments: dict[str, list[object]] = {
        "init": ["--lightning-dir", node_dir, f"file://{read_only_disk}/new.bkp"],
        "resync": ["--yes", "--lightning-dir", node_dir],
    }
    done = run_with_disk(10**12, 10**12, command, *arguments.get(command, [url]), check=1)
    assert done.stderr.startswith("Error: Could not ") and str(source) not in done.stderr
    assert f"{read_only_disk}/" in done.stderr and "Read-only file system" in done.stderr
    assert "mounted read-only" in done.stderr and "cable" not in done.stderr


NOT_UTF8 = os.fsdecode(b"caf\xe9 \xff")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_paths_that_are_no_utf8(encoding: str, tmp_path: Path) -> None:
    place = tmp_path / NOT_UTF8
    node_dir = support.network_dir(place)
    node_at(node_dir, 3)
    url, dest = f"file://{place}/node.bkp", place / "there.sqlite3"
    options: dict[str, Any] = {
        "env": {**os.environ, "PYTHONIOENCODING": encoding},
        "errors": "surrogateescape",
    }
    for words in (
        ["init", "--lightning-dir", node_dir, url],
        ["status", url],
        ["status", "--json", url],
        ["verify", url, "--against", node_dir / "lightningd.sqlite3"],
        ["restore", url, dest],
        ["compact", url],
        ["attach", "--lightning-dir", node_dir, url],
        ["resync", "--yes", "--lightning-dir", node_dir],
    ):
        done = run_cli(*words, check=None, **options)
        assert done.returncode in (0, 4) and "Traceback" not in done.stderr, done.stderr
    line = run_cli("restore", url, dest, check=1, **options).stderr
    assert "exists already" in line and "Traceback" not in line
    if encoding == "utf-8":
        assert str(dest) in line


# Room


def test_no_room_is_seen_before_anything_is_written(
    node_dir: Path, url: str, tmp_path: Path
) -> None:
    source = node_at(node_dir, 5)
    free = 2 * source.stat().st_size + (64 << 20) - 1
    for command in (
        ["init", "--lightning-dir", node_dir, url],
        ["resync", "--yes", "--lightning-dir", node_dir],
        ["verify", url, "--against", source],
    ):
        before = contents(tmp_path)
        done = run_with_disk(free if command[0] == "init" else 64 << 20, 1 << 40, *command, check=1)
        assert done.stderr.splitlines()[-1].startswith("Error: There is too little room in")
        assert contents(tmp_path) == before
        assert ("add --scratch DIR" in done.stderr) == (command[0] == "verify")
        if command[0] == "init":
            assert run_with_disk(free + 1, 1 << 40, *command, check=0)
            add_session(url, first_changes(6)[5:])
            support.apply_calls(source, first_changes(6)[5:])


def test_verify_stops_before_the_disk_is_full(url: str, tmp_path: Path) -> None:
    """Room goes while it replays: the node beside it keeps its reserve."""
    make_backup(url, first_changes(50))
    program = (
        "import itertools, runpy, shutil, sys\n"
        "left = itertools.count(70 << 20, -(1 << 20))\n"
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 30, 0, next(left))\n"
        f"sys.path.insert(0, {str(support.ROOT)!r})\n"
        f"runpy.run_path({str(support.CLI)!r}, run_name='__main__')\n"
    )
    before = contents(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", url], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "too little room" in done.stderr and "63 MiB are free" in done.stderr
    assert contents(tmp_path) == before


# What was taken back


def test_restore_and_status_tell_of_a_change_that_was_taken_back(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(5))
    add_session(url, [support.change(5, "SELECT 1")])
    found = json.loads(run_cli("status", "--json", url).stdout)
    assert found["last_start_rewound"] is True
    assert "last start:     the change before it was taken back" in run_cli("status", url).stdout
    said = "1 change that the node announced, but never committed; the last one to version 5, taken"
    assert said in run_cli("restore", url, tmp_path / "first.sqlite3").stdout
    add_session(url, [support.change(6, "SELECT 1")])
    assert json.loads(run_cli("status", "--json", url).stdout)["last_start_rewound"] is False
    assert said in run_cli("restore", url, tmp_path / "second.sqlite3").stdout


def test_a_start_that_is_too_far_back_is_not_looked_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_backup(url, first_changes(5))
    add_session(
        url, [support.change(5, "SELECT 1"), *(support.change(n, "SELECT 1") for n in range(6, 30))]
    )
    monkeypatch.setattr(look, "LOOK_BACK", 2000)
    assert FileBackend(url).status().last_start_rewound is None
    add_session(url, [support.change(30, "SELECT 1")])
    assert FileBackend(url).status().last_start_rewound is False
    monkeypatch.undo()
    add_session(url, [support.change(30, "SELECT 2")])
    assert FileBackend(url).status().last_start_rewound is True
