"""A node and its backup on a disk that forgets: scenarios, and what must hold after a power cut.

A history is what a database holds: a snapshot or nothing, and the changes since. ``Life``
plays a node with its backup and marks in the disk's journal what is acknowledged; ``Bed``
takes each state that a power cut may leave, and goes on from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import durable
import filebackend
from backend import FOREIGN_KEYS_OFF, NOBODY, Change, Session, Snapshot, bump
from errors import BackupError, BackupMissing, LostState, OutOfDate, UnsupportedLayout
from filebackend import FileBackend
from filelog import adoption, appender, former, layout1, layout2
from filelog import reader as logreader
from filelog import writer as logwriter
from filelog.layout2 import Tail, TailKind
from serving import rules as serving_rules
from serving import spool
from serving.client import Stored
from serving.keeper import Keeper
from serving.rules import Offer
from tests import support
from tests.disk import Disk, Fault, Files, Killed, Model, standing_in
from upkeep import compaction, upgrade
from upkeep.examine import Findings
from wallet import database, restore

FOREIGN_KEYS_ON = "PRAGMA foreign_keys = ON;"
LOG = "node.bkp"
STEP = 4096
"""Bytes of space zeroed ahead: states stay small."""
SIZES = (0, 60, 250, 700, 2500, 6000)
"""Bytes of text in a change: in one sector, over its border, over pages."""
SQLITE_SHARE = 150
"""One state in so many is restored with SQLite."""
STATUS_SHARE = 10

Entry = tuple[int, bool, bytes]
"""Version, whether PRAGMA foreign_keys = OFF held, and the payload or a snapshot's name."""
History = tuple[Entry, ...]


class Redo(NamedTuple):
    """What an operator or a client does again after a power cut.

    Attributes:
        what: "create", "replace" or "upgrade".
        source: a snapshot's file, or "".
        history: what the backup holds then.
    """

    what: str
    source: str
    history: History


@dataclass(frozen=True, eq=False)
class Expected:
    """What must hold in every state from a marker of the journal on.

    Attributes:
        allowed: what a restore may give; None: there is no backup yet.
        nodes: histories that the node's own database may have when it returns.
        redo: what was going on, if a command of the operator or a snapshot was.
        kept: what must be readable under another name once ``redo.history`` is there.
    """

    allowed: frozenset[History | None]
    nodes: tuple[History, ...]
    redo: Redo | None = None
    kept: History | None = None
    torn: tuple[tuple[int, bytes], ...] = ()
    """Torn tails that stood in the log: offset and bytes."""


def version_of(history: History) -> int:
    """The data_version that ``history`` leads to."""
    return history[-1][0] if history else 0


def entries(url: str) -> tuple[bytes | None, History]:
    """The snapshot and the changes of the backup file at ``url``; no PRAGMA counts alone.

    Raises:
        BackupError: it is damaged, or not there.
    """
    calls, pieces, ending = support.passed(FileBackend(url).read())
    if ending.damage is not None:
        raise ending.damage
    found: list[Entry] = []
    off = False
    for version, statements in calls:
        if statements == [FOREIGN_KEYS_OFF]:
            off = True
        elif statements != [FOREIGN_KEYS_ON]:
            found.append((version, off, Change(version, None, statements).payload))
            off = False
    return b"".join(pieces) if pieces else None, tuple(found)


def dump(path: str) -> str:
    """All that the database ``path`` holds, in short."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return hashlib.sha256("\n".join(connection.iterdump()).encode()).hexdigest()


class Library:
    """Knows which history an SQLite file stands for."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._known: dict[bytes, History] = {}
        self._paths: dict[bytes, str] = {}
        self._numbers = itertools.count(1)

    def snapshot(self, version: int, tag: str) -> tuple[str, History]:
        """A new database of a node at ``version``, of small pages: its file and history."""
        path = os.path.join(self._directory, f"node-{next(self._numbers)}.sqlite3")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for statement in (
                "PRAGMA journal_mode = OFF",
                "PRAGMA page_size = 512",
                "CREATE TABLE vars (name TEXT, intval INTEGER)",
                f"INSERT INTO vars VALUES ('data_version', {version})",
                "CREATE TABLE items (id INTEGER PRIMARY KEY, body TEXT)",
                f"INSERT INTO items (body) VALUES ('{tag}')",
            ):
                connection.execute(statement)
        with open(path, "rb") as file:
            data = file.read()
        name = hashlib.sha256(data).digest()
        history: History = ((version, False, b"\0snapshot " + name),)
        self._known[name] = history
        self._paths[name] = path
        return path, history

    def database(self, history: History) -> str:
        """A new database that a node with ``history`` has."""
        path = os.path.join(self._directory, f"node-{next(self._numbers)}.sqlite3")
        rest = history
        if history and history[0][2].startswith(b"\0snapshot "):
            shutil.copyfile(self._paths[history[0][2].removeprefix(b"\0snapshot ")], path)
            rest = history[1:]
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            for _, _, payload in rest:
                for statement in payload.decode().split("\0"):
                    connection.execute(statement)
        return path

    def recognise(self, data: bytes, rest: History, candidates: Iterator[History]) -> History:
        """The history of a backup that holds the SQLite file ``data`` and then ``rest``.

        Args:
            candidates: what it may be; compared as databases if the file is a new one.
        """
        name = hashlib.sha256(data).digest()
        if name not in self._known:
            path = os.path.join(self._directory, "unknown.sqlite3")
            with open(path, "wb") as file:
                file.write(data)
            found = dump(path)
            for whole in candidates:
                prefix = whole[: len(whole) - len(rest)]
                if prefix + rest == whole and dump(self.database(prefix)) == found:
                    self._known[name] = prefix
                    break
            else:
                raise AssertionError("a snapshot of what the node never was")
        return self._known[name] + rest


class Bed:
    """One scenario after the other, in one process.

    Args:
        directory: for everything it writes, best in memory.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        for name in ("disk", "state", "library"):
            os.makedirs(os.path.join(directory, name), exist_ok=True)
        self.checked = 0
        self.restored = 0
        self._seen: set[bytes] = set()

    def run(self, name: str, seed: int) -> int:
        """Play the scenario ``name`` and check every state it may leave; how many."""
        before = self.checked
        with self.playing(name, seed) as life:
            SCENARIOS[name](life)
            life.end()
        with prepared(random.Random(seed)):
            for where, files, expected in self.states(life, seed):
                self.check(files, expected, life.library, f"{name}, seed {seed}, {where}")
        return self.checked - before

    @contextlib.contextmanager
    def playing(self, name: str, seed: int, fault: Fault | None = None) -> Iterator[Life]:
        """A life on a fresh disk, with the modules that write on that disk."""
        for part in ("disk", "library"):
            shutil.rmtree(os.path.join(self.directory, part))
            os.mkdir(os.path.join(self.directory, part))
        rng = random.Random(f"{name} {seed}")
        disk = Disk(os.path.join(self.directory, "disk"), links="no links" not in name)
        disk.fault = fault
        life = Life(disk, rng, Library(os.path.join(self.directory, "library")))
        with prepared(rng), standing_in(disk, *WRITERS):
            yield life

    def states(self, life: Life, seed: int) -> Iterator[tuple[str, Files, Expected]]:
        """Each distinct state of each prefix of the life's journals, and what must hold."""
        rng = random.Random(seed)
        self._seen.clear()
        for number, (start, journal) in enumerate(life.journals):
            model, expected = Model(start), None
            for position, op in enumerate(journal):
                model.apply(op)
                expected = op.mark or expected
                if expected is None:
                    continue
                for what, files in model.states(rng, f"{LOG}.scratch-"):
                    if self._is_new(files, expected):
                        yield f"journal {number}, prefix {position}, {what}", files, expected

    def _is_new(self, files: Files, expected: Expected) -> bool:
        digest = hashlib.blake2b(id(expected).to_bytes(8, "big"), digest_size=16)
        for name in sorted(files):
            digest.update(name.encode())
            digest.update(hashlib.blake2b(files[name], digest_size=16).digest())
        key = digest.digest()
        if key in self._seen:
            return False
        self._seen.add(key)
        return True

    def check(self, files: Files, expected: Expected, library: Library, where: str) -> None:
        """Put ``files`` into a directory and let the next session come."""
        directory = os.path.join(self.directory, "state")
        for entry in os.listdir(directory):
            os.unlink(os.path.join(directory, entry))
        for name, data in files.items():
            with open(os.path.join(directory, name), "wb", buffering=0) as file:
                file.write(data)
        self.checked += 1
        aftermath = Aftermath(directory, files, expected, library, self.checked)
        try:
            aftermath.check()
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}; {describe(files)}") from error
        self.restored += aftermath.restored


def describe(files: Files) -> str:
    """Names and sizes of ``files``."""
    return ", ".join(f"{name} ({len(data)} bytes)" for name, data in sorted(files.items()))


def examined(path: str, _: str | None, meanwhile: Callable[[], None]) -> Findings:
    """``upkeep.examine.examine`` in this process: each of thousands of lives would start one."""
    meanwhile()
    problems = database.integrity_problems(path)
    return Findings(database.version_of(path), database.node_id_of(path), None, problems)


@contextlib.contextmanager
def prepared(rng: random.Random) -> Iterator[None]:
    """Small steps, no waiting, and everything that is random drawn from ``rng``."""
    clock = itertools.count(1_700_000_000_000_000_000, 1000)
    logger = logging.getLogger("backup")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with (
        mock.patch.object(durable, "PREALLOCATE_STEP", STEP),
        mock.patch.object(logreader, "GROWING_TAIL_S", -1.0),
        mock.patch.object(appender, "RETRY_FOR_S", 0.4),
        mock.patch("serving.keeper.examine", new=examined),
        mock.patch("time.sleep", new=bool),
        mock.patch("time.time_ns", new=functools.partial(next, clock)),
        mock.patch("secrets.token_bytes", new=lambda size=32: rng.randbytes(size)),
        mock.patch("secrets.token_hex", new=lambda size=32: rng.randbytes(size).hex()),
    ):
        try:
            yield
        finally:
            logger.setLevel(level)


WRITERS = (
    *(durable, restore, compaction, spool, filebackend),
    *(logreader, logwriter, appender, adoption),
)
"""Modules whose ``os`` writes where the log is."""


class Aftermath:
    """What comes after a power cut: looks, opens, and the next change, each invariant named.

    Args:
        number: of the state; says which of its nodes returns, and which rare checks it gets.
    """

    def __init__(
        self, directory: str, files: Files, expected: Expected, library: Library, number: int
    ) -> None:
        self._directory = directory
        self._before = files
        self._expected = expected
        self._library = library
        self._number = number
        self._path = os.path.join(directory, LOG)
        self._url = f"file://{self._path}"
        self.restored = 0

    def check(self) -> None:
        """All of it; AssertionError or whatever the backup raised says what broke."""
        expected, files = self._expected, self._before
        found = self._read()
        if not self._number % STATUS_SHARE:
            self._check_status(found)
        assert self._files() == self._before, "read commands change no byte"
        assert found in expected.allowed, "acknowledged implies restorable, with one content"
        for offset, torn in expected.torn:
            asides = [data.rstrip(b"\0") for name, data in files.items() if ".torn-" in name]
            there = files[LOG][offset:].rstrip(b"\0") == torn
            assert there or torn in asides, "a torn tail is not cut before its copy is durable"
        if expected.redo is not None:
            found = self._redo(found, expected.redo)
        assert found is not None
        self._open(found)
        backend = FileBackend(self._url)
        try:
            self._open_again(backend)
            self._go_on(backend)
        finally:
            backend.close()

    def _read(self, path: str = "") -> History | None:
        try:
            snapshot, changes = entries(f"file://{path or self._path}")
        except BackupMissing:
            return None
        if snapshot is None:
            return changes
        return self._library.recognise(snapshot, changes, self._candidates())

    def _candidates(self) -> Iterator[History]:
        expected = self._expected
        yield from (history for history in expected.allowed if history is not None)
        yield from expected.nodes
        if expected.redo is not None:
            yield expected.redo.history

    def _check_status(self, found: History | None) -> None:
        try:
            status = FileBackend(self._url).status()
        except BackupMissing:
            assert found is None
        else:
            assert found is not None and status.damage is None
            assert status.version == version_of(found), "status tells what a restore gives"

    def _files(self) -> Files:
        found = {}
        for name in os.listdir(self._directory):
            if not name.endswith(".writer"):
                with open(os.path.join(self._directory, name), "rb", buffering=0) as file:
                    found[name] = file.read()
        return found

    def _redo(self, found: History | None, redo: Redo) -> History:
        """What was going on is done again, if it was not done."""
        backend = FileBackend(self._url)
        snapshot = Snapshot(redo.source, version_of(redo.history)) if redo.source else None
        if found is None and redo.what != "create":
            self._put_back()
            found = self._read()
        if found is None:
            assert None in self._expected.allowed
            backend.create(snapshot)
            found = self._read()
        elif redo.what == "upgrade" and layout1.is_layout_1(self._path):
            assert self._before[LOG] == self._old_bytes(), "the old file is as it was"
            with contextlib.suppress(UnsupportedLayout):
                backend.open()
                raise AssertionError("a file of layout 1 was opened for writing")
            upgrade.from_log(backend, NOBODY, lambda *_: None)
            found = self._read()
        elif redo.what == "replace" and found != redo.history:
            self._refuses(redo.history, OutOfDate)
            backend.replace(snapshot)
            found = self._read()
        assert found == redo.history, "what was done again is done"
        kept = self._expected.kept
        if kept is not None:
            names = [name for name in os.listdir(self._directory) if ".old-" in name]
            paths = [os.path.join(self._directory, name) for name in names]
            assert kept in [self._read(path) for path in paths], "what was replaced is kept"
        return found

    def _old_bytes(self) -> bytes:
        assert self._expected.redo is not None
        with open(self._expected.redo.source, "rb") as file:
            return file.read()

    def _put_back(self) -> None:
        """Without hard links the old file had to be moved, and the new one is not there yet."""
        *_, kept = sorted(name for name in self._before if ".old-" in name)
        os.rename(os.path.join(self._directory, kept), self._path)
        self._before = self._files()

    def _refuses(self, node: History, error: type[BackupError]) -> None:
        """A node with ``node`` does not fit: its change is refused, and no byte changes."""
        backend = FileBackend(self._url)
        backend.open()
        try:
            before = self._files()
            Session(backend, "/nowhere").write(next_change(node, "-- refused"))
        except error:
            assert self._files() == before, "a gap or foreign content is refused, never bridged"
        else:
            raise AssertionError("a gap or foreign content is refused, never bridged")
        finally:
            backend.close()

    def _open(self, found: History) -> None:
        backend = FileBackend(self._url)
        try:
            backend.open()
        finally:
            backend.close()
        assert self._read() == found, "opening keeps what reading showed"
        for name, data in self._files().items():
            if ".torn-" in name and name not in self._before:
                torn = self._before[LOG][int(name.partition(".torn-")[2].partition("-")[0]) :]
                assert data == torn, "a torn tail is kept aside, whole"
            else:
                known = name == LOG or ".old-" in name or name in self._before
                assert known and ".scratch-" not in name, f"{name} is left over"

    def _open_again(self, backend: FileBackend) -> None:
        once = self._files()
        backend.open()
        assert self._files() == once, "opening twice changes nothing"

    def _go_on(self, backend: FileBackend) -> None:
        """The node returns, and its next change is stored on top of what it has."""
        node = self._expected.nodes[self._number % len(self._expected.nodes)]
        self._refuses_strangers(backend, version_of(node))
        change = next_change(node, f"the one after state {self._number}")
        Session(backend, "/nowhere").write(change)
        after = (*node, (change.version, False, change.payload))
        assert self._read() == after, "the last acknowledged, and one content for each version"
        if not self._number % SQLITE_SHARE:
            self._check_restored(after)

    def _refuses_strangers(self, backend: FileBackend, version: int) -> None:
        sessions: list[tuple[int, type[BackupError]]] = [(version + 3, OutOfDate)]
        if version > 2:
            sessions.append((version - 2, LostState))
        size, newest = backend.size, backend.newest
        for base, error in sessions:
            try:
                Session(backend, "/nowhere").write(Change(base + 1, None, [bump(base + 1)]))
            except error:
                continue
            raise AssertionError("a gap or foreign content is refused, never bridged")
        assert (backend.size, backend.newest) == (size, newest)

    def _check_restored(self, history: History) -> None:
        target = os.path.join(self._directory, "restored.sqlite3")
        with contextlib.closing(FileBackend(self._url).read()) as reading:
            done = restore.restore(reading, target, False, lambda *_: None)
        assert not done.problems and done.ending.version == version_of(history)
        assert dump(target) == dump(self._library.database(history)), "the same database"
        self.restored += 1


def next_change(node: History, text: str) -> Change:
    """A commit of a node that has ``node``."""
    version = version_of(node) + 1
    statements = [f"INSERT INTO items (body) VALUES ('{text}')", bump(version)]
    if not node:
        statements[:0] = [
            "CREATE TABLE vars (name TEXT, intval INTEGER)",
            "INSERT INTO vars VALUES ('data_version', 0)",
            "CREATE TABLE items (id INTEGER PRIMARY KEY, body TEXT)",
        ]
    return Change(version, None, statements)


# A life.


@dataclass(eq=False)
class Client:
    """Stands for a connection of the server."""

    number: int
    machine: str = "client"
    who: str = "user client"
    claims: bool = False
    ended: bool = False


class Life:
    """A node, its backup, and the operator.

    Attributes:
        stored: what the backup holds.
        node: what the node's database holds for sure.
        nodes: what it may hold if the power goes now.
        journals: of each stretch between two power cuts, the files at its beginning and
            the journal.
    """

    def __init__(self, disk: Disk, rng: random.Random, library: Library) -> None:
        self.disk, self.rng, self.library = disk, rng, library
        self.url = f"file://{disk.root}/{LOG}"
        self.stored: History = ()
        self.node: History = ()
        self.nodes: tuple[History, ...] = ((),)
        self.expected = Expected(frozenset({None}), ((),))
        self.journals: list[tuple[Files, list[Any]]] = []
        self._backend: FileBackend | None = None
        self._session: Session | None = None
        self._is_first = True
        self._off = False
        self._texts = itertools.count(1)

    def mark(
        self,
        allowed: set[History | None],
        nodes: tuple[History, ...],
        redo: Redo | None = None,
        kept: History | None = None,
    ) -> None:
        """From here on this must hold."""
        self.nodes = nodes
        self.expected = Expected(frozenset(allowed), nodes, redo, kept, self.expected.torn)
        self.disk.mark(self.expected)

    @property
    def backend(self) -> FileBackend:
        """Open for writing."""
        assert self._backend is not None
        return self._backend

    # The operator

    def init(self, with_snapshot: bool = False) -> None:
        """A new backup."""
        source, history = "", self.node
        if with_snapshot:
            source, history = self.library.snapshot(self.rng.randrange(1, 5), self._text(20))
        self.node = history
        redo = Redo("create", source, history)
        self.mark({None, history}, (history,), redo)
        snapshot = Snapshot(source, version_of(history)) if source else None
        FileBackend(self.url).create(snapshot)
        self.stored = history
        self.mark({history}, (history,))

    def resync(self) -> None:
        """The node ran without its backup; the operator has it start over."""
        self.stop()
        version = max(map(version_of, (self.node, self.stored))) + self.rng.randrange(1, 4)
        source, history = self.library.snapshot(version, self._text(20))
        redo, kept = Redo("replace", source, history), self._kept()
        self.mark({self.stored, history, *self._gone()}, (history,), redo, kept)
        FileBackend(self.url).replace(Snapshot(source, version))
        self.node = self.stored = history
        self.mark({history}, (history,), redo, kept)
        self.start()

    def heal(self) -> None:
        """The node ran without its plugin, which takes a snapshot in its first hook."""
        self.stop()
        version = version_of(self.node) + self.rng.randrange(1, 4)
        version = max(version, version_of(self.stored) + 1)
        source, history = self.library.snapshot(version, self._text(20))
        kept, redo = self._kept(), Redo("replace", source, history)
        self.mark({self.stored, history, *self._gone()}, (history,), redo, kept)
        self.start()
        backend, session = self.backend, self._session
        assert session is not None
        change = next_change(history, self._text(20))
        try:
            session.write(change)
        except OutOfDate:
            backend.replace(Snapshot(source, version))
        else:
            raise AssertionError("a gap is never bridged")
        self.node = self.stored = history
        self.mark({history}, (history,), redo, kept)
        self.write()

    def _kept(self) -> History | None:
        is_empty = self.stored == () and not self._has_records()
        return None if is_empty else self.stored

    def _has_records(self) -> bool:
        with contextlib.closing(logreader.LogReader(f"{self.disk.root}/{LOG}")) as reader:
            return reader.newest()[0] is not None

    def _gone(self) -> list[None]:
        """Without hard links the old file is moved away before the new one is there."""
        return [] if self.disk.links else [None]

    def take_over(self, snapshot: bool, changes: int) -> None:
        """Begin with a file of the earlier plugin, and upgrade it."""
        entries_of: list[bytes] = []
        history: History = ()
        if snapshot:
            source, history = self.library.snapshot(3, self._text(20))
            with open(source, "rb") as file:
                entries_of.append(layout1_entry(3, 2, file.read()))
        for _ in range(changes):
            change = next_change(history, self._text(self.rng.choice(SIZES)))
            entries_of.append(layout1_entry(change.version, 1, change.payload))
            history = (*history, (change.version, False, change.payload))
        data = struct.pack(
            "!IIQIQQ", 1, version_of(history), 512 + sum(map(len, entries_of)), 0, 0,
            len(entries_of),
        ).ljust(512, b"\0") + b"".join(entries_of)  # fmt: skip
        original = f"{os.path.dirname(self.disk.root)}/library/original"
        with open(original, "wb") as file:
            file.write(data)
        fault = self.disk.fault
        self.disk.put({LOG: data})
        self.disk.fault = fault
        self.node = self.stored = history
        redo = Redo("upgrade", original, history)
        self.nodes = (history, history[:-1]) if changes else (history,)
        self.mark({history, *self._gone()}, self.nodes, redo, history)
        upgrade.from_log(FileBackend(self.url), NOBODY, lambda *_: None)
        self.mark({history}, self.nodes, redo, history)

    # The node

    def start(self) -> None:
        """The node comes up, its plugin with it."""
        assert self._backend is None
        backend = self._backend = FileBackend(self.url)
        backend.open()
        self._session = Session(backend, "/nowhere")
        self._is_first, self._off = True, False

    def stop(self) -> None:
        """The plugin is gone, tidily or not."""
        if self._backend is not None:
            self._backend.close()
        self._backend = self._session = None

    def write(self, size: int | None = None) -> None:
        """One commit: announced, acknowledged, committed."""
        size = self.rng.choice(SIZES) if size is None else size
        change = next_change(self.node, self._text(size))
        after = (*self.node, (change.version, self._off, change.payload))
        self._announce(change, after)
        self._off = False
        self.nodes = (self.node, after)
        self.mark({after}, self.nodes)
        self.node = after

    def pragma(self, statement: str) -> None:
        """A call that does not bump; it is in no database."""
        self._announce(Change(version_of(self.node), None, [statement]), self.node)
        self._off = statement == FOREIGN_KEYS_OFF
        self.mark({self.node}, (self.node,))

    def _announce(self, change: Change, after: History) -> None:
        assert self._session is not None
        self.mark({self.stored, self.node, after}, (self.node,))
        self._session.write(change)
        self.stored = after
        self._is_first = False

    def restart(self, lost: bool = False) -> None:
        """The node stops and starts again.

        Args:
            lost: it was killed before it committed what was acknowledged last.
        """
        self.stop()
        self.node = self.nodes[0 if lost else -1]
        self.start()

    def claim(self) -> None:
        """The node stops, another owner takes the backup over, and a node starts."""
        self.stop()
        with contextlib.closing(FileBackend(self.url)) as backend:
            backend.open()
            backend.take_over(self.rng.randbytes(16))
        self.node = self.rng.choice(self.nodes)
        self.start()

    def killed(self, at: int, calls: tuple[str, ...] = (), error: int = 0) -> None:
        """A commit in which the process is killed, or fails for good, at the n-th call."""
        self.disk.fault = Fault(at, error, for_good=True, calls=calls)
        with contextlib.suppress(Killed, BackupError):
            self.write()
        self.disk.revive()
        self.stop()

    def look(self) -> None:
        """After a failure: what the backup holds now, of all that it may hold."""
        snapshot, changes = entries(self.url)
        candidates = [history for history in self.expected.allowed if history is not None]
        found = changes
        if snapshot is not None:
            found = self.library.recognise(snapshot, changes, iter(candidates))
        assert found in candidates
        self.stored, self.node = found, self.rng.choice(self.nodes)

    def power_cut(self, torn: bool = True) -> None:
        """The power goes now; the life goes on from one of the states that may be left.

        Args:
            torn: from one with a torn tail, if there is one.
        """
        self.end()
        states = [files for _, files in self.disk.model().states(self.rng, f"{LOG}.scratch-")]
        states = [files for files in states if LOG in files]
        if torn:
            states = [files for files in states if is_torn(files[LOG])] or states
        files = self.rng.choice(states)
        self.disk.put(files)
        tail = tail_of(files[LOG])
        if tail is not None and tail.kind is TailKind.TORN:
            seen = (tail.offset, files[LOG][tail.offset :].rstrip(b"\0"))
            self.expected = dataclasses.replace(self.expected, torn=(*self.expected.torn, seen))
        self.disk.mark(self.expected)
        self.look()

    def end(self) -> None:
        """The scenario is over."""
        self.stop()
        self.journals.append((self.disk.start, self.disk.journal))

    # Housekeeping

    def compact(self, changes: int) -> None:
        """A compaction, with up to so many changes going on in the middle of it."""
        prefix = f"{self.backend.scratch_prefix}compact-1"
        scratch = os.path.basename(prefix)
        left = [changes]
        failures: list[BackupError] = []

        def interleave(name: str) -> None:
            if left[0] and name.startswith(scratch) and self.rng.random() < 0.3:
                left[0] -= 1
                try:
                    self.write()
                except BackupError as error:  # It ends the node, not the compaction.
                    failures.append(error)
                    left[0] = 0

        self.disk.listener = interleave
        try:
            # A reader that meets an append in flight looks again.
            with mock.patch.object(logreader, "GROWING_TAIL_S", 1.0):
                ready = self._build(prefix)
            self.disk.listener = None
            if failures:
                raise failures[0]
            if self.rng.random() < 0.5:
                self.write()
            if "copied" in ready:
                with durable.giving_back(self.backend.path):
                    self.backend.adopt(f"{prefix}-log", ready["copied"], ready["last"])
        finally:
            self.disk.listener = None
            compaction.remove_scratch(prefix)

    def _build(self, prefix: str) -> dict[str, Any]:
        """What compaction.main does in a process of its own."""
        try:
            return compaction.build(self.backend.path, prefix)
        except OSError as error:
            raise BackupError(str(error)) from error

    def snapshot_arrives(self) -> None:
        """A client of the server starts over; changes came before and come after."""
        if former.count(self.backend.path) >= serving_rules.MOST_KEPT:
            return  # That is refused.
        keeper = Keeper(self.backend)
        version = max(map(version_of, (self.node, self.stored))) + self.rng.randrange(1, 4)
        source, history = self.library.snapshot(version, self._text(20))
        client: Any = Client(1)
        with open(source, "rb") as file:
            data = file.read()
        offer = Offer(version, self.rng.randbytes(16), override=True)
        place = Snapshot(f"{self.backend.scratch_prefix}in-1", version)
        coming = spool.Spool(self.backend, place, offer, serving_rules.snapshot)
        try:
            for start in range(0, len(data), 1000):
                coming.add(data[start : start + 1000])
            coming.finish(client.machine)
            redo, kept = Redo("replace", source, history), self._kept()
            self.mark({self.stored, history, *self._gone()}, (history,), redo, kept)
            ready = keeper.prepare(client, coming.snapshot, offer)
            answer = keeper.replace(client, ready)
        finally:
            coming.close()
        assert answer == Stored(version, coming.snapshot.chain)
        self.node = self.stored = history
        self.mark({history}, (history,), redo, kept)
        self._session = Session(self.backend, "/nowhere")
        self._off = False

    def _text(self, size: int) -> str:
        """About ``size`` characters that no other change has."""
        return f"{next(self._texts)} ".ljust(size, "abcdefghijklmnopqrstuvwxyz"[size % 26])


def tail_of(data: bytes) -> Tail | None:
    """What stands behind the newest record of the log ``data``; None if it is no log."""
    try:
        backup_id, log_start, rules = layout2.decode_header(data)
    except layout2.HeaderError:
        return None

    def pread(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    return layout2.find_newest(pread, len(data), backup_id, log_start, rules)[1]


def is_torn(data: bytes) -> bool:
    """Whether the log ``data`` ends in an append that never finished."""
    tail = tail_of(data)
    return tail is not None and tail.kind is TailKind.TORN


def layout1_entry(version: int, kind: int, payload: bytes) -> bytes:
    """An entry of a file of the earlier plugin."""
    return struct.pack("!IIB", len(payload), version, kind) + payload


# The scenarios.


def init(life: Life) -> None:
    life.init(with_snapshot=False)


def init_with_a_snapshot(life: Life) -> None:
    life.init(with_snapshot=True)


def append(life: Life) -> None:
    life.init()
    life.start()
    sizes = list(SIZES)
    life.rng.shuffle(sizes)
    for size in sizes:
        life.write(size)
    life.pragma(FOREIGN_KEYS_OFF)
    life.write()
    life.pragma(FOREIGN_KEYS_ON)
    life.write()
    life.claim()
    life.write()


def rewind(life: Life) -> None:
    life.init(with_snapshot=life.rng.random() < 0.5)
    life.start()
    for _ in range(5):
        life.write()
        life.restart(lost=True)
    life.write()
    life.pragma(FOREIGN_KEYS_OFF)
    life.write()
    life.restart(lost=True)
    life.pragma(FOREIGN_KEYS_OFF)
    life.write()


def restart(life: Life) -> None:
    """Sessions that are killed in a commit; the next one sees only the page cache."""
    life.init()
    life.start()
    life.write()
    for at in range(1, 5):
        life.killed(at)
        life.look()
        life.start()
        life.write()
    life.restart()
    life.restart(lost=True)
    life.write()


def forgotten(life: Life) -> None:
    """Flushes that fail: what the page cache then shows never reached the disk."""
    life.init()
    life.start()
    life.write()
    for size in (250, 6000):
        life.disk.fault = Fault(1, 5, calls=("fdatasync",))
        life.write(size)
    life.killed(1, ("fdatasync",), error=5)
    life.look()
    life.start()
    life.write()
    life.write()
    life.killed(1, ("fdatasync",), error=5)
    life.look()
    life.start()
    life.restart(lost=True)
    life.write()


def torn_tail(life: Life) -> None:
    life.init()
    life.start()
    for size in (3000, 700, 6000):
        life.write()
        life.killed(life.rng.choice((2, 3)))
        life.power_cut()
        life.start()
        life.write(size)


def torn_tail_badly_cut(life: Life) -> None:
    """The flushes of a cut fail, or the process is killed in the middle of it."""
    life.init()
    life.start()
    life.write()
    for at in life.rng.sample(range(1, 14), 3):
        life.disk.fault = Fault(2, 0)
        with contextlib.suppress(Killed):
            life.write(6000)
        life.disk.revive()
        life.power_cut()
        life.disk.fault = Fault(at, life.rng.choice((0, 5)), for_good=True)
        with contextlib.suppress(Killed, BackupError):
            life.start()
        life.disk.revive()
        life.stop()
        life.look()
        life.start()
        life.write(life.rng.choice((60, 700)))
        life.write()


def resync(life: Life) -> None:
    life.init()
    life.start()
    life.resync()
    life.write()
    life.write()
    life.resync()
    life.write()


def healing(life: Life) -> None:
    life.init()
    life.start()
    life.write()
    life.heal()
    life.write()
    life.restart(lost=True)
    life.write()
    life.heal()


def upgrading(life: Life) -> None:
    life.take_over(snapshot=life.rng.random() < 0.7, changes=life.rng.randrange(1, 6))
    life.start()
    life.write()
    life.restart(lost=life.rng.random() < 0.5)
    life.write()


def compacting(life: Life) -> None:
    life.init(with_snapshot=True)
    life.start()
    for _ in range(4):
        life.write()
    life.compact(changes=3)
    life.write()
    life.restart(lost=True)
    life.write()
    life.compact(changes=2)
    life.write()


def serving(life: Life) -> None:
    life.init()
    life.start()
    life.snapshot_arrives()
    life.write()
    life.write()
    life.snapshot_arrives()
    life.write()


def whole_life(life: Life) -> None:
    """Whatever may come, in any order."""
    rng = life.rng
    if rng.random() < 0.2:
        life.take_over(rng.random() < 0.5, rng.randrange(1, 4))
    else:
        life.init(with_snapshot=rng.random() < 0.5)
    life.start()
    for _ in range(rng.randrange(6, 16)):
        name = rng.choices(list(STEPS), list(WEIGHTS))[0]
        STEPS[name](life)


def _migrate(life: Life) -> None:
    life.pragma(FOREIGN_KEYS_OFF)
    if life.rng.random() < 0.8:
        life.write()
        life.pragma(FOREIGN_KEYS_ON)
    else:
        life.restart()


def _kill(life: Life) -> None:
    life.killed(life.rng.randrange(1, 5))
    life.look()
    life.start()


def _forget(life: Life) -> None:
    if life.rng.random() < 0.5:
        life.disk.fault = Fault(life.rng.randrange(1, 3), 5, calls=("fdatasync", "pwrite"))
        return life.write()
    life.killed(1, ("fdatasync",), error=5)
    life.look()
    life.start()


def _cut_the_power(life: Life) -> None:
    if life.rng.random() < 0.7:
        life.killed(life.rng.randrange(1, 5))
    life.power_cut(torn=life.rng.random() < 0.7)
    life.start()


STEPS: dict[str, Callable[[Life], None]] = {
    "write": Life.write,
    "claim": Life.claim,
    "migrate": _migrate,
    "restart": Life.restart,
    "restart with a commit lost": lambda life: life.restart(lost=True),
    "kill": _kill,
    "forget": _forget,
    "cut the power": _cut_the_power,
    "resync": Life.resync,
    "heal": Life.heal,
    "compact": lambda life: life.compact(life.rng.randrange(3)),
    "a snapshot arrives": Life.snapshot_arrives,
}
WEIGHTS = (40, 6, 6, 8, 10, 8, 8, 8, 4, 4, 6, 4)

SCENARIOS: dict[str, Callable[[Life], None]] = {
    "init": init,
    "init with a snapshot": init_with_a_snapshot,
    "init, no links": init_with_a_snapshot,
    "append": append,
    "rewind": rewind,
    "restart": restart,
    "forgotten": forgotten,
    "torn tail": torn_tail,
    "torn tail badly cut": torn_tail_badly_cut,
    "resync": resync,
    "resync, no links": resync,
    "heal": healing,
    "heal, no links": healing,
    "upgrade": upgrading,
    "upgrade, no links": upgrading,
    "compaction": compacting,
    "server": serving,
    "server, no links": serving,
    "a whole life": whole_life,
}


def run_many(directory: str, work: list[tuple[str, int]]) -> tuple[dict[str, int], int]:
    """Run scenarios, each with its seed, in ``directory``; states of each, and restores."""
    states: dict[str, int] = {}
    bed = Bed(directory)
    try:
        for name, seed in work:
            states[name] = states.get(name, 0) + bed.run(name, seed)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return states, bed.restored
