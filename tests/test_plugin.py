"""The plugin's process as lightningd sees it: manifest, log lines, refusals, shutdown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import backup
from backend import bump
from tests import support
from tests.support import CLI, Call, PluginProcess, change, first_changes
from wallet import database

OFF = "PRAGMA foreign_keys = OFF;"


@pytest.fixture
def filled(node_dir: Path, url: str) -> Path:
    """A backup at version 5, which backup.lock names; its file."""
    name_in_lock(node_dir, url)
    return support.make_backup(url, first_changes(5))


def name_in_lock(node_dir: Path, url: str) -> None:
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))


def restored_version(url: str, tmp_path: Path) -> int:
    target = tmp_path / "restored.sqlite3"
    support.run_cli("restore", url, target)
    return database.version_of(str(target))


# What it says of itself


def test_manifest(node_dir: Path) -> None:
    with PluginProcess(node_dir) as plugin:
        manifest = plugin.manifest()
        hooks = [hook if isinstance(hook, str) else hook["name"] for hook in manifest["hooks"]]
        assert hooks == ["db_write"]
        assert manifest["dynamic"] is False
        assert manifest["subscriptions"] == ["shutdown"]
        assert "backup-destination" in [option["name"] for option in manifest["options"]]
        assert plugin.close() == 0


@pytest.mark.parametrize("lock_file", [False, True])
def test_manifest_touches_no_file(lock_file: bool, node_dir: Path, tmp_path: Path) -> None:
    if lock_file:
        name_in_lock(node_dir, f"file://{tmp_path}/missing.bkp")
    before = support.contents(tmp_path)
    with PluginProcess(node_dir) as plugin:
        plugin.manifest()
        plugin.init(node_dir)
        assert support.contents(tmp_path) == before
        assert plugin.close() == 0
        assert plugin.log == []
    assert support.contents(tmp_path) == before
    assert not list(tmp_path.rglob("*.writer"))


def test_manifest_beside_a_running_node(filled: Path, node_dir: Path, url: str) -> None:
    with PluginProcess(node_dir) as running, PluginProcess(node_dir) as second:
        running.write(*change(6, "SELECT 1"))
        # A second lightningd asks for the manifest, then fails on its pid file.
        second.manifest()
        assert second.close() == 0
        running.write(*change(7, "SELECT 1"))
        assert running.close() == 0


def test_through_a_symbolic_link(filled: Path, node_dir: Path, tmp_path: Path) -> None:
    link = tmp_path / "plugins" / "backup.py"
    link.parent.mkdir()
    link.symlink_to(support.PLUGIN)
    with PluginProcess(node_dir, [sys.executable, str(link)]) as plugin:
        plugin.manifest()
        plugin.write(*change(6, "SELECT 1"))
        assert plugin.close() == 0
        assert plugin.errors() == []


def test_option_backup_destination_is_deprecated(node_dir: Path) -> None:
    text = (
        "The `--backup-destination` option is deprecated and will be removed in future"
        " versions of the backup plugin."
    )
    with PluginProcess(node_dir) as plugin:
        plugin.init(node_dir)
        assert plugin.log == []
        plugin.init(node_dir, **{"backup-destination": "file:///elsewhere"})
        ((level, line),) = plugin.log
        assert level == "warn"
        assert line.startswith(text)


# A session


def test_serves_writes_before_and_after_init(
    node_dir: Path, url: str, filled: Path, tmp_path: Path
) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.manifest()
        plugin.write(*change(6, "INSERT INTO items VALUES (6, 'before')"))
        first, second = plugin.log
        assert first[0] == second[0] == "info"
        assert first[1].startswith("Comparing backup version 5 with the node's version 5")
        assert second[1] == "Versions match up"
        plugin.init(node_dir)
        plugin.write(*change(7, "INSERT INTO items VALUES (7, 'after')"))
        assert len(plugin.log) == 2
        assert plugin.close() == 0
    assert restored_version(url, tmp_path) == 7


def test_rewinds_what_was_never_committed(
    node_dir: Path, url: str, filled: Path, tmp_path: Path
) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*change(5, "INSERT INTO items VALUES (50, 'in place of 5')"))
        assert [line for _, line in plugin.log[1:]] == [
            "Last changes not applied, rewinding non-committed transaction"
        ]
        assert plugin.log[0][1].startswith("Comparing backup version 5 with the node's version 4")
        plugin.write(*change(6, "SELECT 1"))
        assert plugin.errors() == []
    target = tmp_path / "restored.sqlite3"
    support.run_cli("restore", url, target)
    with database.opened(str(target)) as connection:
        rows = [row for (row,) in connection.execute("SELECT id FROM items ORDER BY id")]
    assert rows == [2, 3, 4, 50]


def test_a_pragma_first_is_no_rewind(node_dir: Path, filled: Path) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(5, [OFF])
        plugin.write(*change(6, "SELECT 1"))
        assert plugin.logged("Versions match up")
        assert not plugin.logged("rewinding")


def test_ends_when_stdin_does_in_mid_session(node_dir: Path, url: str, filled: Path) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*change(6, "SELECT 1"))
        assert plugin.close() == 0
    support.add_session(url, [change(7, "SELECT 1")])  # The writer's place is free.


def test_ctrl_c_is_for_lightningd(node_dir: Path, filled: Path) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*NEXT)
        plugin.process.send_signal(signal.SIGINT)
        plugin.write(*change(7, "SELECT 1"))
        assert plugin.close() == 0


def test_a_large_change_with_every_awkward_character(
    node_dir: Path, url: str, filled: Path, tmp_path: Path
) -> None:
    text = "'' -- /* \n\r\t\x01\x7f\\ \" é € 😀 \u2028 \ufffe ; \ud7ff" + "x" * 1_000_000
    with PluginProcess(node_dir) as plugin:
        plugin.write(*change(6, f"INSERT INTO items VALUES (6, '{text}')"))
        assert plugin.close() == 0
    target = tmp_path / "restored.sqlite3"
    support.run_cli("restore", url, target)
    with database.opened(str(target)) as connection:
        (body,) = connection.execute("SELECT body FROM items WHERE id = 6").fetchone()
    assert body == text.replace("''", "'")


# Refusals: one line, an error for this and every later write, nothing changed


@pytest.mark.parametrize("size", [1, 1000, 65536, 1 << 20])
def test_requests_come_in_pieces_of_any_size(
    size: int, node_dir: Path, filled: Path, url: str, tmp_path: Path
) -> None:
    long = "a" * (3000 if size == 1 else 200_000)
    requests = b""
    for version, text in ((6, "b"), (7, long), (8, "c")):
        _, statements = change(version, f"INSERT INTO items VALUES ({version}, '{text}')")
        params = {"data_version": version, "writes": statements}
        message = {"jsonrpc": "2.0", "id": version, "method": "db_write", "params": params}
        requests += json.dumps(message).encode() + b"\n\n"
    early, late = requests[:-10], requests[-10:]
    with PluginProcess(node_dir) as plugin:
        plugin.manifest()
        assert plugin.process.stdin is not None
        for start in range(0, len(early), size):
            plugin.process.stdin.write(early[start : start + size])
            plugin.process.stdin.flush()
        for version in (6, 7):  # What is complete does not wait for the end of the next.
            assert plugin.answer(version) == {"result": "continue"}
        plugin.process.stdin.write(late)
        plugin.process.stdin.flush()
        assert plugin.answer(8) == {"result": "continue"}
        assert plugin.close() == 0
    assert restored_version(url, tmp_path) == 8


NEXT = change(6, "INSERT INTO items VALUES (6, 'six')")


def write_lock(content: str) -> Callable[[Path, Path], None]:
    return lambda file, lock: (lock.write_text(content), None)[1]


def damage_end(file: Path, lock: Path) -> None:
    last = support.records_of(file)[-1][0]
    support.flip(file, last.end - 10)


def damage_header(file: Path, lock: Path) -> None:
    support.flip(file, 30)


def not_a_directory(file: Path, lock: Path) -> None:
    lock.unlink()
    lock.mkdir()


REFUSALS: dict[str, tuple[Callable[[Path, Path], object], Call, list[str]]] = {
    "no backup.lock": (
        lambda file, lock: lock.unlink(),
        NEXT,
        ["Could not find backup.lock in the lightning-dir", f"`{CLI} init --lightning-dir"],
    ),
    "backup.lock is no JSON": (
        write_lock('{"backend_url": "file:'),
        NEXT,
        ["backup.lock is damaged", f"`{CLI} attach --lightning-dir"],
    ),
    "backup.lock is a list": (write_lock("[]"), NEXT, ["backup.lock is damaged", "attach"]),
    "backup.lock without url": (write_lock("{}"), NEXT, ["backup.lock is damaged", "attach"]),
    "url is a number": (
        write_lock('{"backend_url": 5}'),
        NEXT,
        ["backup.lock is damaged", "attach"],
    ),
    "backup.lock is not UTF-8": (
        lambda file, lock: lock.write_bytes(b'{"backend_url": "\xff"}'),
        NEXT,
        ["backup.lock is damaged", "attach"],
    ),
    "backup.lock is a directory": (not_a_directory, NEXT, ["Could not read", "backup.lock"]),
    "unknown url": (
        write_lock('{"backend_url": "ftp://there/node.bkp"}'),
        NEXT,
        ["'ftp://there/node.bkp' is no backup URL", "file:///path/to/file"],
    ),
    "no backup": (
        lambda file, lock: file.unlink(),
        NEXT,
        ["There is no backup at file://", "is mounted", f"`{CLI} attach ", f"`{CLI} init "],
    ),
    "disk not mounted": (
        lambda file, lock: file.parent.rename(file.parent.with_name("unmounted")),
        NEXT,
        ["There is no backup at file://", "is mounted"],
    ),
    "last record damaged": (
        damage_end,
        NEXT,
        ["is damaged at offset", "good up to version 4", f"`{CLI} resync", "--allow-damaged"],
    ),
    "header damaged": (
        damage_header,
        NEXT,
        ["is damaged at offset 0", f"`{CLI} resync", f"`{CLI} salvage FILE OUTDIR`"],
    ),
    "layout 1": (
        lambda file, lock: support.layout1_file(file),
        NEXT,
        ["layout 1", f"`{CLI} "],
    ),
    "not a backup": (
        lambda file, lock: file.write_text("My shopping list\n" * 100),
        NEXT,
        ["is not a backup", "Check the URL"],
    ),
    "an empty file": (
        lambda file, lock: file.write_bytes(b""),
        NEXT,
        ["is not a backup", "Check the URL"],
    ),
    "node ahead": (
        lambda file, lock: None,
        change(8, "SELECT 1"),
        [
            "Backup is out of date",
            "The node is at version 7, the backup at version 5",
            f"`{CLI} resync --lightning-dir",
        ],
    ),
    "node ahead, PRAGMA first": (
        lambda file, lock: None,
        (6, [OFF]),
        ["Backup is out of date", "The node is at version 6, the backup at version 5"],
    ),
    "backup ahead": (
        lambda file, lock: None,
        change(4, "SELECT 1"),
        [
            "seems to have lost some state",
            "The node is at version 3, the backup at version 5",
            f"`{CLI} restore file://",
        ],
    ),
    "a fresh node": (
        lambda file, lock: None,
        change(1, "CREATE TABLE vars (name, intval)"),
        ["seems to have lost some state", "The node is at version 0, the backup at version 5"],
    ),
    "a form that is not known": (
        lambda file, lock: None,
        (6, ["INSERT INTO items VALUES (6, 'six')", "UPDATE vars SET version = 6"]),
        [
            "announces changes in a form that is not known",
            "to version 6 ends with 'UPDATE vars SET version = 6'",
            "newer release",
        ],
    ),
    "a form that is not known, of the version before": (
        lambda file, lock: None,
        (5, ["PRAGMA user_version = 5;"]),
        ["announces changes in a form that is not known", "'PRAGMA user_version = 5;'"],
    ),
    "no statements": (lambda file, lock: None, (6, []), ["PostgreSQL"]),
    "a NUL byte": (
        lambda file, lock: None,
        change(6, "INSERT INTO items VALUES (6, 'a\0b')"),
        ["The change to version 6", "NUL byte"],
    ),
    "an empty statement": (
        lambda file, lock: None,
        change(6, ""),
        ["The change to version 6", "empty statement"],
    ),
    "a version that does not fit": (
        lambda file, lock: None,
        change(2**32, "SELECT 1"),
        ["4294967296 is no data_version"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str, node_dir: Path, filled: Path, tmp_path: Path) -> None:
    prepare, call, expected = REFUSALS[name]
    prepare(filled, node_dir / "backup.lock")
    before = support.contents(tmp_path)
    with PluginProcess(node_dir) as plugin:
        plugin.manifest()
        check_refused(plugin, call, expected)
        # Also what would have fitted, and however often.
        for later in (NEXT, change(7, "SELECT 1")):
            with pytest.raises(support.Refused):
                plugin.write(*later)
        assert plugin.close() == 0
    after = support.contents(tmp_path)
    if "lost some state" in expected[0]:  # That is remembered.
        lock = "lightning/regtest/backup.lock"
        assert after.pop(lock) != before.pop(lock)
    assert after == before


def check_refused(plugin: PluginProcess, call: Call, expected: list[str]) -> None:
    """The write is refused with exactly one line that says all of ``expected``."""
    with pytest.raises(support.Refused):
        plugin.write(*call)
    (line,) = plugin.errors()
    for text in expected:
        assert text in line
    assert "\n" not in line
    assert "Traceback" not in line
    assert "Internal error" not in line


def plugin_with(settings: str) -> list[str]:
    """The plugin with ``settings`` made before it starts; an argument list."""
    program = f"import sys; sys.path.insert(0, {str(support.ROOT)!r})\nimport backup\n"
    return [sys.executable, "-c", f"{program}{settings}\nbackup.main()"]


def test_internal_error_is_refused_and_its_place_is_logged(node_dir: Path, filled: Path) -> None:
    broken = plugin_with("backup.destinations.backend_for = lambda url: [].pop()")
    with PluginProcess(node_dir, broken) as plugin:
        for _ in range(2):
            with pytest.raises(support.Refused, match="pop from empty list"):
                plugin.write(*NEXT)
        assert plugin.errors() == 2 * ["Internal error: IndexError('pop from empty list')"]
        assert plugin.logged("in _begin")


def test_refused_while_another_process_holds_the_backup(
    node_dir: Path, filled: Path, url: str, tmp_path: Path
) -> None:
    impatient = plugin_with("backup.BUSY_FOR_S = 0.0")
    with PluginProcess(node_dir) as holder, PluginProcess(node_dir, impatient) as plugin:
        holder.write(*NEXT)
        before = support.contents(tmp_path)
        pid = f"(pid {holder.process.pid})"
        check_refused(plugin, change(7, "SELECT 1"), ["Another process", pid, "Stop that"])
        assert support.contents(tmp_path) == before
        holder.write(*change(7, "SELECT 1"))
        holder.kill()
        # A refusal lasts, even when its reason is gone.
        with pytest.raises(support.Refused):
            plugin.write(*change(8, "SELECT 1"))
    assert restored_version(url, tmp_path) == 7


def test_waits_at_a_start_for_another_process_that_holds_the_backup(
    node_dir: Path, filled: Path, url: str, tmp_path: Path
) -> None:
    patient = plugin_with("backup.BUSY_FOR_S = 1e9")
    with PluginProcess(node_dir) as holder, PluginProcess(node_dir, patient) as plugin:
        holder.write(*NEXT)
        data_version, writes = change(7, "SELECT 1")
        number = plugin.send("db_write", {"data_version": data_version, "writes": writes})
        wait_for(lambda: bool(plugin.log))
        ((level, line),) = plugin.log
        assert level == "warn"
        assert f"Another process (pid {holder.process.pid}) holds the backup" in line
        assert "Waiting up to" in line
        assert not plugin.answered(number)
        assert holder.close() == 0
        assert plugin.answer(number) == {"result": "continue"}
        assert plugin.errors() == []
        assert plugin.close() == 0
    assert restored_version(url, tmp_path) == 7


# What is no request


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"writes": ["SELECT 1"]}, "None is no data_version"),
        ({"data_version": 6}, "without a list of statements"),
        ({"data_version": 6, "writes": "SELECT 1"}, "is not a list of strings"),
        ({"data_version": 6, "writes": {"a": 1}}, "is not a list of strings"),
        ({"data_version": 6, "writes": ["SELECT 1", 5]}, "is not a list of strings"),
        ({"data_version": -1, "writes": ["SELECT 1"]}, "-1 is no data_version"),
        ({"data_version": True, "writes": ["SELECT 1"]}, "True is no data_version"),
        ({"data_version": 6.0, "writes": ["SELECT 1"]}, "6.0 is no data_version"),
        ({"data_version": "6" * 999, "writes": ["SELECT 1"]}, "'666666666"),
        ([6, ["SELECT 1"]], "without a list of statements"),
        (None, "without a list of statements"),
    ],
)
def test_wrong_parameters_are_refused(
    params: Any, expected: str, node_dir: Path, filled: Path
) -> None:
    with PluginProcess(node_dir) as plugin:
        with pytest.raises(support.Refused):
            plugin.answer(plugin.send("db_write", params))
        ((_, line),) = plugin.log
        assert expected in line and len(line) < 300
        with pytest.raises(support.Refused):
            plugin.write(*NEXT)
        assert not plugin.logged("Traceback")
        assert plugin.close() == 0


BROKEN = {
    "no JSON": b'{"jsonrpc": "2.0", "method": "db_write", "par\n\n',
    "no UTF-8": b'{"jsonrpc": "2.0", "id": 1, "method": "db_write", "params": "\xff"}\n\n',
    "deep": b"[" * 100_000 + b"\n\n",
    "a number of 5000 digits": b'{"id": 1, "method": "db_write", "params": '
    + b"9" * 5000
    + b"}\n\n",
    "a list": b"[1, 2]\n\n",
    "nothing": b"\n\n\n\n",
    "no method": b'{"id": 1, "params": {}}\n\n',
    "an unknown method": b'{"id": 1, "method": "nonsense", "params": {}}\n\n',
    "an unknown notification": b'{"method": "nonsense", "params": {}}\n\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_request_ends_it_with_one_line(
    name: str, node_dir: Path, filled: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*NEXT)
        plugin.log.clear()
        assert plugin.process.stdin is not None
        plugin.process.stdin.write(BROKEN[name])
        plugin.process.stdin.flush()
        assert plugin.process.wait(timeout=support.ANSWER_S) == 1
        wait_for(lambda: bool(plugin.log))
        ((level, line),) = plugin.log
        assert level == "error"
        assert "lightningd sent what is no request" in line and len(line) < 300
    assert capfd.readouterr().err == ""


def test_lightningd_is_gone_when_the_answer_comes(
    node_dir: Path, filled: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    data_version, writes = NEXT
    params = {"data_version": data_version, "writes": writes}
    message = {"jsonrpc": "2.0", "id": 1, "method": "db_write", "params": params}
    done = subprocess.run(
        [sys.executable, str(support.PLUGIN)],
        cwd=node_dir,
        env=dict(os.environ, LIGHTNINGD_PLUGIN="1"),
        input=json.dumps(message).encode() + b"\n\n",
        stdout=writing,
    )
    os.close(writing)
    assert done.returncode == 1
    assert capfd.readouterr().err == ""


# A change that is too large


def test_a_change_over_the_limit_names_the_way_out(node_dir: Path, filled: Path) -> None:
    small = plugin_with("import backend; backend.MAX_CHANGE_SIZE = 1000")
    with PluginProcess(node_dir, small) as plugin:
        says = ["bytes; the limit is 1000.", "without the plugin", f"`{CLI} resync --lightning-dir"]
        check_refused(plugin, change(6, "x" * 1001), says)


def limited(mib: int) -> list[str]:
    """The plugin with memory for ``mib`` MiB more than it starts with."""
    return plugin_with(
        "import resource\n"
        "with open('/proc/self/statm') as file: pages = int(file.read().split()[0])\n"
        f"limit = pages * resource.getpagesize() + {mib << 20}\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))"
    )


HUGE = change(6, *["INSERT INTO items (body) VALUES ('" + "x" * 9_966 + "')"] * 3_000)
"""30 MB."""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_that_does_not_suffice_to_parse(node_dir: Path, filled: Path) -> None:
    with PluginProcess(node_dir, limited(50)) as plugin:
        with pytest.raises(support.Refused, match="the plugin is gone"):
            plugin.write(*HUGE)
        assert plugin.process.wait(timeout=support.ANSWER_S) == 1
        (line,) = plugin.errors()
        assert "memory does not suffice for what lightningd sent" in line
        assert "without the plugin" in line and "resync" in line


def test_memory_that_does_not_suffice_to_store(node_dir: Path, filled: Path) -> None:
    broken = plugin_with(
        "from filelog import layout2\n"
        "def encode(head, payload): raise MemoryError\n"
        "layout2.encode = encode"
    )
    with PluginProcess(node_dir, broken) as plugin:
        check_refused(plugin, NEXT, ["memory does not suffice", "without the plugin", "resync"])
        with pytest.raises(support.Refused):
            plugin.write(*NEXT)
        assert not plugin.logged("Traceback")


def peak(plugin: PluginProcess) -> int:
    """The most memory that it held so far, in bytes."""
    status = Path(f"/proc/{plugin.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_of_four_times_the_change_suffices(node_dir: Path, filled: Path) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*NEXT)
        before = peak(plugin)
        plugin.write(7, [*HUGE[1][:-1], bump(7)])
        size = sum(map(len, HUGE[1]))
        assert size < peak(plugin) - before < 4 * size
        assert plugin.close() == 0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (change(8, "SELECT 1"), ["Backup is out of date", "version 7, the backup at version 6"]),
        (change(6, "SELECT 1"), ["lost some state", "version 5, the backup at version 6"]),
        ((5, [OFF]), ["lost some state", "version 5, the backup at version 6"]),
        ((6, []), ["PostgreSQL"]),
        ((7, ["SELECT 1"]), ["announces changes in a form that is not known"]),
        ((6, ["SELECT 1"]), ["announces changes in a form that is not known"]),
    ],
)
def test_refused_in_mid_session(
    call: Call, expected: list[str], node_dir: Path, filled: Path, url: str, tmp_path: Path
) -> None:
    with PluginProcess(node_dir) as plugin:
        plugin.write(*NEXT)
        before = support.contents(tmp_path)
        check_refused(plugin, call, expected)
        with pytest.raises(support.Refused):
            plugin.write(*change(7, "SELECT 1"))
        assert plugin.close() == 0
    assert support.contents(tmp_path) == before
    assert restored_version(url, tmp_path) == 6


# Shutdown: a lightningd with other children, in a process of its own

PARENT = """
import os, subprocess, sys
os.environ["LIGHTNINGD_PLUGIN"] = "1"
plugin = subprocess.Popen([*{wrappers!r}, sys.executable, sys.argv[1]])
children = [subprocess.Popen(command, stdin=0, stdout=2) for command in {children!r}]
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0), os.dup2(null, 1)
for child in children[:{unreaped}]:
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
open("ready", "w").close()
sys.stdout.flush()
os._exit(plugin.wait())
"""
"""Stands for lightningd: its plugin's stdin and stdout are the test's."""

WRAPPER = """
import sys
sys.path.insert(0, {root!r})
sys.argv[0] = {plugin!r}
import backup
{settings}
look = backup.other_plugins
def looked():
    found = look()
    with open("looks", "a") as file:
        print(found, file=file)
    return found
backup.other_plugins = looked
backup.main()
"""
"""The plugin, noting in a file each time that it looked for other plugins."""

NO_LIMIT = "backup.LEAVE_AFTER_S = backup.LEAVE_BLIND_AFTER_S = 1e9; backup.ALONE_FOR_S = 0.0"
"""Only being alone lets it leave, at once: no test depends on how long anything takes."""


class Family:
    """A lightningd with the plugin and other children, each living until ``release``.

    Args:
        names: program names of the other children.
        unreaped: how many dead ones come before them, which their parent leaves zombies.
        wrappers: how many scripts that do not exec stand between lightningd and the plugin.
    """

    def __init__(
        self,
        directory: Path,
        names: list[str],
        unreaped: int = 0,
        settings: str = NO_LIMIT,
        wrappers: int = 0,
    ) -> None:
        self.directory = directory
        self._gate = directory / "gate"
        os.mkfifo(self._gate)
        commands = [[sys.executable, "-c", ""]] * unreaped
        commands += [[str(self._program(name))] for name in names]
        waiting = ["sh", "-c", '"$@"; exit $?', "sh"] * wrappers
        parent = PARENT.format(children=commands, unreaped=unreaped, wrappers=waiting)
        (directory / "parent.py").write_text(parent)
        (directory / "wrapper.py").write_text(
            WRAPPER.format(root=str(support.ROOT), plugin=str(support.PLUGIN), settings=settings)
        )
        # lightningd tells its plugins by this variable, and is not told so itself.
        untold = ["env", "-u", "LIGHTNINGD_PLUGIN", sys.executable]
        self.plugin = PluginProcess(directory, [*untold, "parent.py", "wrapper.py"])
        self._holding = open(self._gate, "r+b", buffering=0)  # noqa: SIM115

    def _program(self, name: str) -> Path:
        # The name of a process is that of its script.
        path = self.directory / name
        path.write_text(f"#!/bin/sh\nread line < {self._gate}\n")
        path.chmod(0o755)
        return path

    def release(self) -> None:
        """Let one other child end."""
        self._holding.write(b"\n")

    def looks(self) -> list[str]:
        """What the plugin has found each time it looked for other plugins."""
        path = self.directory / "looks"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_looks(self, more: int) -> None:
        """Return once the plugin has looked ``more`` times."""
        enough = len(self.looks()) + more
        wait_for(lambda: len(self.looks()) >= enough)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + support.ANSWER_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@contextlib.contextmanager
def family(
    directory: Path,
    names: list[str],
    unreaped: int = 0,
    settings: str = NO_LIMIT,
    wrappers: int = 0,
) -> Iterator[Family]:
    found = Family(directory, names, unreaped, settings, wrappers)
    with found.plugin:
        wait_for((directory / "ready").exists)
        found.plugin.manifest()
        found.plugin.write(*change(6, "SELECT 1"))
        found.plugin.init(directory)
        try:
            yield found
        finally:
            for _ in names:
                found.release()


def leaves(found: Family) -> None:
    """The plugin ends by itself, well, with its stdin still open."""
    assert found.plugin.process.wait(timeout=support.ANSWER_S) == 0


def test_shutdown_serves_late_writes_until_the_last_other_plugin_is_gone(
    node_dir: Path, url: str, filled: Path, tmp_path: Path
) -> None:
    with family(node_dir, ["python_plugin", "python_plugin"]) as found:
        found.plugin.send("shutdown", {}, notification=True)
        for version in (7, 8, 9):
            found.plugin.write(*change(version, "SELECT 1"))
            found.wait_for_looks(3)
        assert all(len(look.split()) == 2 for look in found.looks())
        found.release()
        wait_for(lambda: len(found.looks()[-1].split()) == 1)
        found.plugin.write(*change(10, "SELECT 1"))
        found.wait_for_looks(3)
        assert found.plugin.process.poll() is None
        found.release()
        leaves(found)
        assert found.looks()[-1] == "[]"
        assert found.plugin.errors() == []
    assert restored_version(url, tmp_path) == 10


def test_shutdown_alone(node_dir: Path, filled: Path) -> None:
    with family(node_dir, []) as found:
        assert found.looks() == []
        found.plugin.send("shutdown", {}, notification=True)
        leaves(found)


def test_shutdown_does_not_wait_for_zombies(node_dir: Path, filled: Path) -> None:
    with family(node_dir, [], unreaped=2) as found:
        found.plugin.send("shutdown", {}, notification=True)
        leaves(found)
        assert set(found.looks()) == {"[]"}


def test_shutdown_does_not_wait_for_subdaemons(node_dir: Path, filled: Path) -> None:
    names = ["lightning_hsmd", "lightning_connectd", "lightning_channeld"]
    with family(node_dir, names) as found:
        found.plugin.send("shutdown", {}, notification=True)
        leaves(found)
        assert set(found.looks()) == {"[]"}


def test_a_plugin_named_like_lightningd_counts(node_dir: Path, filled: Path) -> None:
    with family(node_dir, ["lightning-terminal"]) as found:
        found.plugin.send("shutdown", {}, notification=True)
        found.wait_for_looks(3)
        assert found.plugin.process.poll() is None
        assert "[]" not in found.looks()


@pytest.mark.parametrize("wrappers", [1, 3])
def test_shutdown_behind_wrappers_that_do_not_exec(
    wrappers: int, node_dir: Path, filled: Path
) -> None:
    with family(node_dir, ["python_plugin"], wrappers=wrappers) as found:
        found.plugin.send("shutdown", {}, notification=True)
        found.wait_for_looks(3)
        found.plugin.write(*change(7, "SELECT 1"))
        assert all(len(look.split()) == 1 for look in found.looks())
        assert "[]" not in found.looks()
        found.release()
        leaves(found)
        assert found.looks()[-1] == "[]"


@pytest.mark.parametrize(
    "settings",
    [
        "backup.LEAVE_AFTER_S = 0.2",
        "backup.LEAVE_BLIND_AFTER_S = 0.2; backup.other_plugins = lambda: None",
    ],
)
def test_shutdown_does_not_wait_for_ever(settings: str, node_dir: Path, filled: Path) -> None:
    with family(node_dir, ["lightning-terminal"], settings=settings) as found:
        found.plugin.send("shutdown", {}, notification=True)
        leaves(found)
        assert len(found.looks()) > 1


class Gone(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("busy", "what"),
    [(3.0, "nothing"), (3.0, "plugin"), (3.0, "call"), (3.0, "hook"), (30.0, "plugin")],
)
def test_when_it_leaves(busy: float, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second after the last sign of life of ``what``, by a clock of the test's own."""
    hook = backup.Hook()
    clock = [100.0]

    def sleep(duration_s: float) -> None:
        clock[0] += duration_s
        active = clock[0] < 100 + busy
        if what == "call" and active:
            hook.calls += 1
        if what == "hook" and active != hook.lock.locked():
            hook.lock.acquire() if active else hook.lock.release()

    def leave(code: int) -> None:
        raise Gone(code)

    def others() -> list[int]:
        return [4711] if what == "plugin" and clock[0] < 100 + busy else []

    # Not the module's own functions: other threads of this process use them.
    fake = types.SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0])
    monkeypatch.setattr(backup, "time", fake)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(backup, "other_plugins", others)
    with pytest.raises(Gone, match="0"):
        backup.leave_last(hook)
    stayed_s = clock[0] - 100
    expected_s = 0.5 if what == "nothing" else min(busy + 0.5, 20.0)
    assert expected_s - 0.1 < stayed_s < expected_s + 0.2


def test_no_shutdown_no_leaving(node_dir: Path, filled: Path) -> None:
    with family(node_dir, []) as found:
        found.plugin.write(*change(7, "SELECT 1"))
        assert found.looks() == []
        assert found.plugin.close() == 0
