"""Commands that end by a signal: what they began is taken back, or cleared by the next one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import durable
import scratch
from errors import DiskError
from filebackend import FileBackend
from tests import support
from tests.peers import patched
from tests.support import contents, first_changes, make_backup, run_cli

ENDING = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]

# At its step the command says so, and stays there.
STAY = """
import os, time
def stay(*arguments):
    os.write(1, b"here\\n")
    while True: time.sleep(60)
"""
AT_CHECKS = STAY + "from wallet import database; database.check = stay"
AT_COPY = STAY + "from filelog import writer; writer.check_log = stay"


@contextlib.contextmanager
def staying(patch: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """backup-cli with ``arguments``, which has come to the step that ``patch`` names."""
    command = [*patched(support.CLI, patch), *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, b"")
            assert any(line == b"here\n" for line in lines)
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> str:
    """Send signal ``number``; what the process says of it."""
    process.send_signal(number)
    _, said = process.communicate(timeout=support.ANSWER_S)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    return said.decode()


def node_at(node_dir: Path, version: int) -> Path:
    path = node_dir / "lightningd.sqlite3"
    support.apply_calls(path, first_changes(version))
    return path


def command_at(command: str, node_dir: Path, url: str, tmp_path: Path) -> tuple[str, list[object]]:
    """A patch that stops ``command`` where it has scratch files, and its arguments."""
    source = node_at(node_dir, 5)
    if command == "init":
        return AT_COPY, ["init", "--lightning-dir", node_dir, url]
    make_backup(url, first_changes(3 if command == "resync" else 5))
    if command == "resync":
        (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
        return AT_COPY, ["resync", "--yes", "--lightning-dir", node_dir]
    if command == "verify":
        return AT_CHECKS, ["verify", url, "--against", source]
    return AT_CHECKS, ["restore", url, tmp_path / "there.sqlite3"]


COMMANDS = ["init", "resync", "verify", "restore"]


@pytest.mark.parametrize(
    ("command", "number"),
    [*((command, signal.SIGTERM) for command in COMMANDS), *(("init", n) for n in ENDING[1:])],
)
def test_signal_takes_back_what_was_begun(
    command: str, number: signal.Signals, node_dir: Path, url: str, tmp_path: Path
) -> None:
    patch, arguments = command_at(command, node_dir, url, tmp_path)
    before = contents(tmp_path)
    with staying(patch, *arguments) as process:
        assert contents(tmp_path) != before
        said = end(process, number)
    assert said == f"Stopped by {number.name}.\n"
    assert contents(tmp_path) == before
    run_cli(*arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_next_command_clears_what_a_killed_one_left(
    command: str, node_dir: Path, url: str, tmp_path: Path
) -> None:
    patch, arguments = command_at(command, node_dir, url, tmp_path)
    before = contents(tmp_path)
    with staying(patch, *arguments) as process:
        end(process, signal.SIGKILL)
    assert contents(tmp_path) != before
    assert (node_dir / "backup.lock").exists() == (command == "resync")
    run_cli(*arguments)
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if "scratch" in name or "restoring" in name], left


def test_writer_clears_what_a_killed_verify_left_and_no_other(url: str, tmp_path: Path) -> None:
    path = make_backup(url, first_changes(3))
    with staying(AT_CHECKS, "verify", url) as process:
        end(process, signal.SIGKILL)
    stale = set(path.parent.glob("*.scratch-*"))
    with staying(AT_CHECKS, "verify", url) as process:
        living = set(path.parent.glob("*.scratch-*"))
        assert stale and living and not stale & living  # The second verify has cleared, too.
        support.add_session(url, first_changes(4)[3:])
        assert set(path.parent.glob("*.scratch-*")) == living
        end(process, signal.SIGKILL)
    support.add_session(url, first_changes(5)[4:])
    assert not set(path.parent.glob("*.scratch-*"))


def test_two_restores_to_one_place_do_not_harm_each_other(url: str, tmp_path: Path) -> None:
    make_backup(url, first_changes(3))
    there = tmp_path / "there.sqlite3"
    with staying(AT_CHECKS, "restore", url, there) as process:
        files = set(tmp_path.glob("there.sqlite3.restoring-*"))
        run_cli("restore", url, there)
        assert files and set(tmp_path.glob("there.sqlite3.restoring-*")) == files
        end(process, signal.SIGTERM)
    assert set(tmp_path.glob("there*")) == {there}


def test_what_only_looks_like_a_scratch_file_stays(tmp_path: Path) -> None:
    base = str(tmp_path / "db")
    for name in ("db.restoring-notes.txt", "db.restoring-0123456", "db.restoring-01234567x"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "db.restoring-01234567.sqlite3").write_text("stale: its lock file is gone")
    with scratch.held(f"{base}.restoring-") as prefix:
        assert len(list(tmp_path.iterdir())) == 4
        with scratch.held(f"{base}.restoring-") as other:
            assert os.path.exists(prefix + scratch.HELD) and prefix != other
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("db.restoring-0123456", "db.restoring-01234567x", "db.restoring-notes.txt"),
    ]


def test_nohup_is_respected(url: str) -> None:
    """SIGHUP was ignored before the command began."""
    make_backup(url, first_changes(3))
    patch = [
        "import os, sys; from wallet import database",
        "database.check = lambda path: [] if os.write(1, b'here\\n') and os.read(0, 1) else ['?']",
    ]
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    code += "; os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", code, *patched(support.CLI, "\n".join(patch)), "verify", url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGHUP)
        out, said = process.communicate(b"x", timeout=support.ANSWER_S)
    assert process.returncode == 0 and b"is sound" in out and said == b""


@pytest.mark.parametrize("number", ENDING)
def test_signal_while_it_starts(number: signal.Signals) -> None:
    """Imports take a moment."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'upkeep.compaction': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.path.insert(0, {str(support.ROOT)!r})\n"
        f"runpy.run_path({str(support.CLI)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + number
    assert done.stderr == f"Stopped by {number.name}.\n"


def test_signal_inside_sqlite_is_a_signal_still(url: str) -> None:
    """What is raised while SQLite calls us becomes an error of SQLite."""
    make_backup(url, first_changes(3))
    patch = [
        "import errors, os, signal; from wallet import restore",
        "def verify(*_):",
        "    try: os.kill(os.getpid(), signal.SIGTERM)",
        "    except SystemExit: raise errors.DatabaseError('x', 'SQLite says: interrupted')",
        "restore.verify = verify",
    ]
    command = [*patched(support.CLI, "\n".join(patch)), "verify", url]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM


# init: the lock file and the backup


def test_init_killed_with_the_backup_there(node_dir: Path, url: str) -> None:
    """Between the two names: `attach` goes on, as `init` says."""
    node_at(node_dir, 3)
    patch = STAY + "from wallet import node; node._publish = stay"
    with staying(patch, "init", "--lightning-dir", node_dir, url) as process:
        end(process, signal.SIGKILL)
    assert not (node_dir / "backup.lock").exists()
    said = run_cli("init", "--lightning-dir", node_dir, url, check=1).stderr
    assert "It is a backup at version 3" in said and "attach" in said
    run_cli("attach", "--lightning-dir", node_dir, url)
    assert sorted(path.name for path in node_dir.iterdir()) == [
        *("backup.lock", "lightningd.sqlite3")
    ]


# Torn tails


def torn_backup(url: str) -> Path:
    path = make_backup(url, first_changes(3))
    last = support.records_of(path)[-1][0]
    with path.open("r+b") as file:
        file.seek(last.end - 600)
        file.write(bytes(600))
    return path


def open_and_close(url: str) -> None:
    backend = FileBackend(url)
    backend.open()
    backend.close()


def asides(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.torn-*"))


def test_failed_starts_do_not_pile_up_torn_tails(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is made, then the cut finds no room: the next start finds the copy."""
    path = torn_backup(url)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable.LogFile, "rewrite", full)
        for _ in range(3):
            with pytest.raises(DiskError, match="No space left"):
                open_and_close(url)
            assert len(asides(path)) == 1
    open_and_close(url)
    assert len(asides(path)) == 1
    assert not list(path.parent.glob("*.scratch-*"))


def test_copy_of_a_torn_tail_that_fails_leaves_no_half_of_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = torn_backup(url)
    pwrite: Callable[..., int] = os.pwrite
    log = path.stat().st_ino

    def full(fd: int, data: bytes, offset: int) -> int:
        if os.fstat(fd).st_ino != log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for _ in range(2):
            with pytest.raises(DiskError, match="No space left"):
                open_and_close(url)
    assert asides(path) == []
    open_and_close(url)
    assert len(asides(path)) == 1
