"""Random lives of a node against a model of a few lines that says what a restore must give.

The node is a real SQLite database in memory. It commits, crashes before and after the
acknowledgement, restarts, migrates with PRAGMAs, runs without the plugin, gets an old
state put back; disks fail, connections are cut, servers restart, logs are compacted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import signal
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import durable
import server
from backend import FOREIGN_KEYS_OFF, Backend, Change, Session, Snapshot, bump
from errors import BackupError, DiskError, LostState, OutOfDate
from filebackend import FileBackend
from filelog import appender
from healing import Healer
from remote import address, patience
from serving import door, keeper
from socketbackend import SocketBackend
from tests import peers, support
from tests.scenarios import examined
from upkeep import compaction
from wallet import database, node, restore

State = tuple[int, tuple[Any, ...]]
"""data_version of a database and all of its rows."""

SCHEMA = (
    "CREATE TABLE vars (name TEXT PRIMARY KEY, intval INTEGER)",
    "INSERT INTO vars VALUES ('data_version', 0)",
    "CREATE TABLE parent (id INTEGER PRIMARY KEY, body TEXT)",
    "CREATE TABLE child (parent INTEGER REFERENCES parent(id) ON DELETE CASCADE, body TEXT)",
)
# With foreign_keys ON the DROP would empty the child table.
MIGRATION = (
    "CREATE TABLE new_parent (id INTEGER PRIMARY KEY, body TEXT)",
    "INSERT INTO new_parent SELECT id, body || '.' FROM parent",
    "DROP TABLE parent",
    "ALTER TABLE new_parent RENAME TO parent",
)


def state_of(connection: sqlite3.Connection) -> State:
    """All that a database holds."""
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")
    rows = tuple(
        (name, tuple(connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2")))
        for (name,) in names.fetchall()
    )
    return database.data_version(connection), rows


class Node:
    """A node's database, and what lightningd does to it."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.tokens = itertools.count(1)
        self.restart()

    def restart(self) -> None:
        """A new lightningd: foreign_keys are ON again."""
        self.connection.execute("PRAGMA foreign_keys = ON")

    @property
    def version(self) -> int:
        return database.data_version(self.connection)

    def next_commit(self, *statements: str) -> Change:
        """The change that a commit of ``statements`` would announce."""
        token = next(self.tokens)
        version = self.version + 1
        work = list(statements or (f"INSERT INTO parent VALUES ({token}, 'text {token}')",))
        if version == 1:
            work[:0] = SCHEMA
        if not statements:
            work.append(f"INSERT INTO child VALUES ({token}, 'child of {token}')")
        return Change(version, None, [*work, bump(version)])

    def apply(self, change: Change, commit: bool) -> State:
        """The state after ``change``, which is committed or not."""
        assert change.transaction is not None
        if not change.bumps:
            if commit:
                self.connection.execute(change.transaction[0])
            return state_of(self.connection)
        self.connection.execute("BEGIN")
        for statement in change.transaction:
            self.connection.execute(statement)
        state = state_of(self.connection)
        self.connection.execute("COMMIT" if commit else "ROLLBACK")
        return state

    def copy(self) -> sqlite3.Connection:
        """A copy of the whole database."""
        target = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.backup(target)
        return target


class Model:
    """What the backup must hold: the states of its history, the newest last."""

    def __init__(self) -> None:
        self.states: list[State] = [(0, ())]
        self.rewindable = False

    def after(self, change: Change, state: State, first: bool) -> Model | type[BackupError]:
        """The model with ``change``, or the refusal that it must meet."""
        model = Model()
        version = self.states[-1][0]
        if change.base == version:
            model.states = [*self.states, state]
        elif first and self.rewindable and change.base == version - 1:
            model.states = [*self.states[:-1], state]
        else:
            return OutOfDate if change.base > version else LostState
        model.rewindable = change.bumps
        return model

    def rewound(self) -> Model:
        """The model with its last change taken back."""
        model = Model()
        model.states = self.states[:-1]
        return model


class Life(RuleBasedStateMachine):
    """One node and its backup; subclasses say where that is."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir=support.FAST))
        self.databases = contextlib.ExitStack()
        self.node = Node()
        self.until_the_end(self.node.connection)
        self.model = Model()
        self.old: list[sqlite3.Connection] = []
        self.session: Session | None = None
        self.backend: Backend | None = None
        self.healing = True
        self.undo = contextlib.ExitStack()

    def until_the_end(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        """Close it when this life ends."""
        return self.databases.enter_context(contextlib.closing(connection))

    # Where the backup is

    def make(self) -> Backend:
        raise NotImplementedError

    def start_over(self) -> None:
        """Make the first, empty backup."""
        raise NotImplementedError

    def fault(self, kind: str, after: int) -> contextlib.AbstractContextManager[None]:
        """Something that fails once, in the next write."""
        raise NotImplementedError

    @initialize()
    def begin(self) -> None:
        self.start_over()

    # The node's life

    def connect(self) -> Session:
        if self.session is None:
            self.backend = self.make()
            self.backend.open()
            self.session = Session(self.backend, "DIR")
            self.first = True
        return self.session

    def crash(self) -> None:
        """The node and the plugin end; a new lightningd comes."""
        if self.backend is not None:
            self.backend.close()
        self.backend = self.session = None
        self.node.restart()

    def announce(self, change: Change, commit: bool = True) -> None:
        """db_write, and the commit if it is acknowledged and the node lives."""
        session, first = self.connect(), self.session is not None and self.first
        expected = self.model.after(change, self.node.apply(change, commit=False), first)
        if not isinstance(expected, Model):
            with pytest.raises(expected) as refused:
                session.write(change)  # Invariant: a gap is refused, never bridged.
            # An empty backup of nobody could be another one in its place.
            known = self.backend is not None and self.backend.version_count > 0
            if expected is LostState or not self.healing or not known:
                self.crash()
                self.heal()
                return
            self.heal_in_the_hook(change, refused.value)
            expected = self.model.after(change, self.node.apply(change, commit=False), first)
            assert isinstance(expected, Model)
        session.write(change)
        self.first = False
        self.model = expected
        if commit:
            self.node.apply(change, commit=True)

    def heal_in_the_hook(self, change: Change, refusal: BackupError) -> None:
        """What the plugin does, while the node's transaction is open."""
        assert self.backend is not None and isinstance(refusal, OutOfDate)
        with contextlib.closing(sqlite3.connect(self.save(), isolation_level=None)) as waiting:
            waiting.execute("BEGIN IMMEDIATE")
            waiting.execute("UPDATE vars SET intval = intval + 1")
            lock_file = node.LockFile(self.backend.url, wallet="node.sqlite3")
            Healer(self.backend, str(self.directory), lock_file).catch_up(change, refusal)
        self.model = Model()
        self.model.states = [state_of(self.node.connection)]

    def heal(self) -> None:
        """What the operator does after a refusal: resync, or restore the newer copy."""
        version = self.model.states[-1][0]
        if self.node.version >= version:
            self.resync()
            return
        self.node.connection = self.until_the_end(self.restored())
        self.node.restart()
        assert state_of(self.node.connection) == self.model.states[-1]

    def save(self) -> Path:
        """The node's database as a file."""
        path = self.directory / "node.sqlite3"
        path.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as target:
            self.node.connection.backup(target)
        return path

    def resync(self) -> None:
        self.make().replace(Snapshot(str(self.save()), self.node.version))
        self.model = Model()
        self.model.states = [state_of(self.node.connection)]

    def restored(self) -> sqlite3.Connection:
        """The database that a restore gives."""
        path = self.directory / "restored.sqlite3"
        reading = self.make().read()
        try:
            restore.build(reading, str(path), False, lambda *_: None)
            target = sqlite3.connect(":memory:", isolation_level=None)
            with contextlib.closing(sqlite3.connect(path)) as source:
                source.backup(target)
            return target
        except restore.NothingToRestore:
            return sqlite3.connect(":memory:", isolation_level=None)
        finally:
            reading.close()
            restore.remove_database(str(path))

    @rule()
    def commit(self) -> None:
        self.keep_copy()
        self.announce(self.node.next_commit())

    @rule(count=st.integers(1, 8))
    def commits(self, count: int) -> None:
        for _ in range(count):
            self.announce(self.node.next_commit())

    @rule()
    def crash_before_commit(self) -> None:
        """Acknowledged, but never committed."""
        self.announce(self.node.next_commit(), commit=False)
        self.crash()

    @rule()
    def restart(self) -> None:
        self.crash()

    @precondition(lambda self: self.node.version > 0)
    @rule(stop_after=st.integers(1, 4))
    def migrate(self, stop_after: int) -> None:
        """OFF, one change, ON; the node may die between any two, or before the commit."""
        calls: list[Callable[[], Change]] = [
            lambda: Change(self.node.version, None, [FOREIGN_KEYS_OFF]),
            lambda: self.node.next_commit(*MIGRATION),
            lambda: Change(self.node.version, None, ["PRAGMA foreign_keys = ON;"]),
        ]
        self.connect()
        for number, call in enumerate(calls, 1):
            session = self.session
            self.announce(call(), commit=number != stop_after)
            if number == stop_after or self.session is not session:
                self.crash()
                return

    @rule(count=st.integers(1, 3), healing=st.booleans())
    def run_without_the_plugin(self, count: int, healing: bool) -> None:
        self.crash()
        self.healing = healing
        # A node that ends up at the backup's very version cannot be told from an honest
        # one by the hook: only `verify --against` compares the contents (docs/faults.md).
        while count > 0 or self.node.version <= self.model.states[-1][0]:
            self.node.apply(self.node.next_commit(), commit=True)
            count -= 1

    def keep_copy(self) -> None:
        self.old = [*self.old[-4:], self.until_the_end(self.node.copy())]

    @precondition(lambda self: bool(self.old))
    @rule()
    def put_an_old_state_back(self) -> None:
        self.crash()
        self.node.connection = self.old[0]
        self.old = []
        self.node.restart()

    @rule(kind=st.sampled_from(["write", "short", "flush"]), after=st.integers(0, 3))
    def commit_with_a_fault(self, kind: str, after: int) -> None:
        """The write fails: what the backup then holds is one of few states."""
        self.connect()
        change, first, model = self.node.next_commit(), self.first, self.model
        expected = model.after(change, self.node.apply(change, commit=False), first)
        if not isinstance(expected, Model):
            return
        try:
            with self.fault(kind, after):
                self.announce(change)
        except DiskError:
            self.crash()
            possible = [model, expected]
            if change.base != model.states[-1][0]:
                possible.append(model.rewound())
            found = state_of(self.until_the_end(self.restored()))
            # Invariant: one content for each version, the last acknowledged or announced.
            self.model = next(one for one in possible if one.states[-1] == found)

    @rule()
    def compact(self) -> None:
        raise NotImplementedError

    @invariant()
    def acknowledged_implies_restorable(self) -> None:
        assert state_of(self.until_the_end(self.restored())) == self.model.states[-1]

    def teardown(self) -> None:
        self.crash()
        self.undo.close()
        self.databases.close()
        self.check_nothing_left()
        shutil.rmtree(self.directory)

    def check_nothing_left(self) -> None:
        """Invariant: no file but the backup, its lock and proof, kept ones and torn tails."""
        for name in os.listdir(self.directory):
            kept = name.startswith(("node.bkp.old-", "node.bkp.torn-"))
            ours = "node.bkp", "node.bkp.writer", "node.bkp.proof", "node.sqlite3"
            assert kept or name in ours, name


@contextlib.contextmanager
def failing_disk(kind: str, after: int) -> Iterator[None]:
    """The ``after``-th write or flush from now on fails, and all that follow."""
    count = itertools.count()
    real_write, real_flush = durable.write_all, durable.flush

    def write(fd: int, data: bytes | memoryview, offset: int) -> None:
        if kind == "flush" or next(count) < after:
            return real_write(fd, data, offset)
        if kind == "short":
            real_write(fd, bytes(data)[: len(data) // 2], offset)
        raise OSError(errno.EIO, "injected")

    def flush(fd: int) -> None:
        if kind == "flush" and next(count) >= after:
            raise OSError(errno.EIO, "injected")
        real_flush(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "write_all", write)
        patch.setattr(durable, "flush", flush)
        patch.setattr(appender, "RETRY_FOR_S", 0.0)
        yield


def compact_in_process(backend: FileBackend, lock: threading.Lock) -> bool:
    """What Compactor does, without a process of its own; whether the log is proven."""
    prefix = f"{backend.scratch_prefix}compact"
    message = compaction.build(backend.path, prefix)
    if "copied" in message:
        with durable.giving_back(backend.path), lock:
            backend.adopt(f"{prefix}-log", message["copied"], message["last"])
    compaction.remove_scratch(prefix)
    return "copied" in message


class FileLife(Life):
    """The backup is a file."""

    def make(self) -> Backend:
        return FileBackend(f"file://{self.directory}/node.bkp")

    def start_over(self) -> None:
        self.make().create(None)

    def fault(self, kind: str, after: int) -> contextlib.AbstractContextManager[None]:
        return failing_disk(kind, after)

    @rule()
    def compact(self) -> None:
        self.connect()
        assert isinstance(self.backend, FileBackend)
        compact_in_process(self.backend, threading.Lock())


class CutSocket:
    """A socket whose connection ends after a number of bytes, in either direction."""

    def __init__(self, sock: socket.socket, budget: list[int]) -> None:
        self._sock = sock
        self._budget = budget

    def _spend(self, size: int) -> int:
        left = self._budget[0]
        self._budget[0] = max(0, left - size)
        return min(left, size)

    def send(self, data: bytes, flags: int = 0) -> int:
        allowed = self._spend(len(data))
        if allowed == 0:
            self._cut()
        return self._sock.send(data[:allowed], flags)

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(size)
        if self._spend(len(data)) < len(data):
            self._cut()
        return data

    def _cut(self) -> None:
        self._budget[0] = 1 << 40  # One cut is enough.
        self._sock.close()
        raise ConnectionResetError("injected")

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


def in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Let a server, its compactions and an impatient client run in this process."""
    patch.setattr(signal, "signal", lambda *_: None)  # A thread may set none.
    patch.setattr(signal, "set_wakeup_fd", lambda *_, **__: -1)
    patch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    patch.setattr(keeper, "examine", examined)
    patch.setattr(
        compaction.Compactor,
        "_build_and_adopt",
        lambda compactor, *_: compact_in_process(compactor._backend, compactor._lock),
    )


class ServerThread:
    """A server in a thread of this process, which ``in_this_process`` has prepared."""

    def __init__(self, file_url: str, port: int) -> None:
        backend = FileBackend(file_url)
        backend.open()
        doors = door.listen([door.Entry(f"127.0.0.1:{port}")])
        self.server = server.Server(backend, doors, None, allows_1=True)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def stop(self) -> None:
        self.server._stop(0)
        self.thread.join()
        for connection in list(self.server.places._at):
            connection.cut()
        self.server.keeper.lock.release()


class SocketLife(Life):
    """The backup is on a server, behind a network that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = [1 << 40]
        self.running: ServerThread | None = None
        patch = self.undo.enter_context(pytest.MonkeyPatch.context())
        in_this_process(patch)
        real = address.connect
        patch.setattr(address, "connect", lambda url: CutSocket(real(url), self.budget))
        self.port = peers.free_port()

    def make(self) -> Backend:
        return SocketBackend(f"socket:127.0.0.1:{self.port}?retry_for=20")

    def start_over(self) -> None:
        FileBackend(f"file://{self.directory}/node.bkp").create(None)
        self.serve()

    def serve(self) -> None:
        self.running = ServerThread(f"file://{self.directory}/node.bkp", self.port)

    def stop(self) -> None:
        if self.running is not None:
            self.running.stop()
            self.running = None

    @contextlib.contextmanager
    def fault(self, kind: str, after: int) -> Iterator[None]:
        self.budget[0] = {"write": 7, "short": 60, "flush": 130}[kind] * (1 + after)
        yield
        self.budget[0] = 1 << 40

    @rule()
    def restart_the_server(self) -> None:
        self.stop()
        self.serve()

    @rule()
    def compact(self) -> None:
        backend = self.make()
        assert isinstance(backend, SocketBackend)
        backend.compact()

    def teardown(self) -> None:
        self.crash()
        self.stop()
        super().teardown()


def steps(examples: int) -> settings:
    """So many lives of 50 steps each."""
    return settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


unmeasured = pytest.mark.usefixtures("unmeasured")
TestFileLife = unmeasured(FileLife.TestCase)
TestFileLife.settings = steps(30)
TestSocketLife = unmeasured(SocketLife.TestCase)
TestSocketLife.settings = steps(20)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("life", [FileLife, SocketLife])
def test_lives_for_half_of_the_time(life: type[Life]) -> None:
    until, lives = time.monotonic() + 30 * support.SOAK_MINUTES, 0
    while lives == 0 or time.monotonic() < until:
        run_state_machine_as_test(life, settings=steps(20))
        lives += 20
    print(f"\n{lives} lives of at most 50 steps each: {life.__name__}")
