"""What the tests share: recorded traffic, the plugin's and the CLI's real processes.

``PluginProcess`` plays lightningd's side of the plugin's stdio protocol.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import lzma
import os
import queue
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from backend import Beginning, Change, Ending, Reading, Session, bump
from filebackend import FileBackend
from filelog.layout2 import Head
from filelog.reader import LogReader

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
PLUGIN = ROOT / "backup.py"
CLI = ROOT / "backup-cli"
FAST = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A directory in memory, for tests that write much, or None: the usual one."""
SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
ANSWER_S = 120.0
"""Longer than any answer takes on a slow machine; only a hang meets it."""

Call = tuple[int, list[str]]
"""data_version and statements of one db_write call."""


def trace(name: str) -> Iterator[dict[str, Any]]:
    """The lines of a recorded trace (tests/data/README.md)."""
    with lzma.open(DATA / name / "db_writes.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def trace_sessions(name: str) -> list[list[Call]]:
    """The calls of a recorded trace, one list a lightningd process."""
    sessions: list[list[Call]] = []
    for entry in trace(name):
        if "session" in entry:
            sessions.append([])
        elif "w" in entry:
            sessions[-1].append((entry["v"], entry["w"]))
    return sessions


def trace_database(name: str, directory: Path) -> Path:
    """The recorded node's database, unpacked into ``directory``."""
    path = directory / f"{name}.sqlite3"
    path.write_bytes(lzma.decompress((DATA / name / "lightningd.sqlite3.xz").read_bytes()))
    return path


def change(version: int, *statements: str) -> Call:
    """A call that bumps to ``version``."""
    return version, [*statements, bump(version)]


def first_changes(count: int) -> list[Call]:
    """The first ``count`` commits of a made-up fresh node with a small table."""
    calls = [
        change(
            1,
            "CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)",
            "INSERT INTO vars VALUES ('data_version', 0)",
            "CREATE TABLE items (id INTEGER PRIMARY KEY, body TEXT)",
        )
    ]
    for version in range(2, count + 1):
        calls.append(change(version, f"INSERT INTO items VALUES ({version}, 'item {version}')"))
    return calls


def apply_calls(path: Path, calls: Sequence[Call]) -> None:
    """Do to the database ``path`` what a node of one session does."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        for _, statements in calls:
            pragma = statements[0].startswith("PRAGMA")
            for statement in statements if pragma else ["BEGIN", *statements, "COMMIT"]:
                connection.execute(statement)


def run_cli(*arguments: object, check: int | None = 0, **options: Any) -> Any:
    """Run backup-cli; ``check`` is the exit code that must come out."""
    done = subprocess.run(
        [sys.executable, str(CLI), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=ANSWER_S,
        **options,
    )
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


class Refused(Exception):
    """The plugin answered a request with an error: lightningd would abort."""


class PluginProcess:
    """The real plugin in a process of its own, and lightningd's side of its stdio.

    Args:
        directory: the node's network directory, where backup.lock lies.
        program: what to run in place of backup.py, as an argument list.
    """

    def __init__(self, directory: Path, program: Sequence[str] | None = None) -> None:
        environment = dict(os.environ, LIGHTNINGD_PLUGIN="1", LIGHTNINGD_VERSION="v26.06")
        self.process = subprocess.Popen(
            list(program or [sys.executable, str(PLUGIN)]),
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.log: list[tuple[str, str]] = []
        """Level and text of every line the plugin logged."""
        self.notifications: list[dict[str, Any]] = []
        self._ids = itertools.count(1)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._early: dict[int, dict[str, Any]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self._take_all(lines)
        self._answers.put(None)

    def _take_all(self, lines: IO[bytes]) -> None:
        partial = b""
        for line in lines:
            partial += line
            if line != b"\n" or not partial.strip():
                continue
            message = json.loads(partial)
            partial = b""
            if message.get("method") == "log":
                self.log.append((message["params"]["level"], message["params"]["message"]))
            elif "method" in message:
                self.notifications.append(message)
            else:
                self._answers.put(message)

    def send(self, method: str, params: dict[str, Any], notification: bool = False) -> int:
        """Send a request or a notification; the request's id."""
        number = next(self._ids)
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if not notification:
            message["id"] = number
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n\n")
        self.process.stdin.flush()
        return number

    def answer(self, number: int) -> Any:
        """The result of request ``number``; Refused if it is an error or the plugin died."""
        while not self.answered(number):
            self._take(self._answers.get(timeout=ANSWER_S))
        message = self._early.pop(number)
        if "error" in message:
            raise Refused(message["error"]["message"])
        return message["result"]

    def answered(self, number: int) -> bool:
        """Whether the answer to request ``number`` has come."""
        while not self._answers.empty():
            self._take(self._answers.get())
        return number in self._early

    def _take(self, message: dict[str, Any] | None) -> None:
        if message is None:
            self._answers.put(None)
            raise Refused("the plugin is gone")
        self._early[message["id"]] = message

    def call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """Send a request and wait for its result."""
        return self.answer(self.send(method, params or {}))

    def manifest(self) -> Any:
        """Answer to getmanifest."""
        return self.call("getmanifest", {"allow-deprecated-apis": False})

    def init(self, directory: Path, **options: Any) -> Any:
        """Send init, as lightningd does once its database is open."""
        configuration = {
            "lightning-dir": str(directory),
            "rpc-file": "lightning-rpc",
            "startup": True,
            "network": "regtest",
        }
        return self.call("init", {"options": options, "configuration": configuration})

    def write(self, version: int, statements: Sequence[str]) -> None:
        """One db_write; returns when it is acknowledged, Refused if it is not."""
        result = self.call("db_write", {"data_version": version, "writes": list(statements)})
        assert result == {"result": "continue"}

    def errors(self) -> list[str]:
        """The lines logged at level error."""
        return [text for level, text in list(self.log) if level == "error"]

    def logged(self, text: str) -> bool:
        """Whether a log line contains ``text``."""
        return any(text in line for _, line in list(self.log))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> int:
        """Close stdin, as lightningd's end does; the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(timeout=ANSWER_S)

    def __enter__(self) -> PluginProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # What was not sent any more.
            self.process.stdin.close()


def network_dir(tmp_path: Path) -> Path:
    """A fresh node's network directory ``<tmp>/lightning/regtest``."""
    directory = tmp_path / "lightning" / "regtest"
    directory.mkdir(parents=True)
    return directory


def contents(directory: Path) -> dict[str, str]:
    """Every name below ``directory`` and a hash of what it is: equal if nothing changed.

    Files of the writer's lock are left out: they hold a process id, and no data.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            what = f"link to {os.readlink(path)}"
        elif path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = "other"
        if not path.name.endswith(".writer"):
            found[str(path.relative_to(directory))] = what
    return found


def change_lock(directory: Path, **values: object) -> None:
    """Add ``values`` to backup.lock, as an operator does by hand."""
    path = directory / "backup.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_backup(url: str, calls: Sequence[Call] = ()) -> Path:
    """A new backup of one session of ``calls``, without a snapshot; its file."""
    backend = FileBackend(url)
    backend.create(None)
    add_session(url, calls)
    return Path(backend.path)


def add_session(url: str, calls: Sequence[Call]) -> None:
    """Append a session of ``calls`` to the backup at ``url``."""
    backend = FileBackend(url)
    backend.open()
    session = Session(backend, "/nowhere")
    for version, statements in calls:
        session.write(Change(version, None, statements))
    backend.close()


@contextlib.contextmanager
def opened(url: str) -> Iterator[FileBackend]:
    """The backup at ``url``, open for writing."""
    backend = FileBackend(url)
    backend.open()
    try:
        yield backend
    finally:
        backend.close()


class Passed(NamedTuple):
    """All that a pass over a backup found."""

    calls: list[Call]
    pieces: list[bytes]
    ending: Ending

    @property
    def snapshot(self) -> bytes:
        """What a restore would write before it replays the calls."""
        return b"".join(self.pieces)


def passed(reading: Reading) -> Passed:
    """Go through ``reading`` and close it."""
    calls, pieces = list[Call](), list[bytes]()
    with contextlib.closing(reading):
        for found, _, _ in reading:
            if isinstance(found, Ending):
                return Passed(calls, pieces, found)
            if isinstance(found, Beginning):
                calls.clear()
                pieces.clear()
            elif found.snapshot is not None:
                assert not calls, "a snapshot comes first"
                pieces.append(found.snapshot)
            else:
                calls.append((found.version, list(found.transaction or ())))
    raise AssertionError("a pass ends in an Ending")


def stored(url: str) -> list[Call]:
    """The changes in the backup file at ``url`` that a restore would apply; nothing is damaged."""
    found = passed(FileBackend(url).read())
    assert found.ending.damage is None
    return found.calls


def open_files() -> set[str]:
    """What this process has open. Threads of tests before may still be closing theirs."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


def records_of(path: Path) -> list[tuple[Head, bytes]]:
    """Head and payload of every record of the backup file ``path``, in order."""
    reader = LogReader(str(path))
    found = list(reader)
    reader.close()
    return found


def flip(path: Path, offset: int) -> None:
    """Turn one bit of the byte at ``offset``."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def layout1_file(path: Path) -> None:
    """A file as the earlier plugin wrote it, with one change."""
    payload = b"CREATE TABLE t (x)\0INSERT INTO t VALUES (1)"
    entry = struct.pack("!IIB", len(payload), 1, 1) + payload
    header = struct.pack("!IIQIQQ", 1, 1, 512, 0, 0, 1).ljust(512, b"\0")
    path.write_bytes(header + entry)
