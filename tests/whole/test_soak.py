"""Plugin, proxy and server under traffic for SOAK_MINUTES, while all of them are tormented.

The traffic is a recorded node's, then made-up commits and migrations. A reference database
gets every call that a node would commit; in the end, and from time to time, the restored
backup must be the same. Three lives are watched for memory and descriptors that grow.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from backend import FOREIGN_KEYS_OFF
from socketbackend import SocketBackend
from tests import support
from tests.cutproxy import DOWN, UP, CutProxy
from tests.peers import ServerProcess
from tests.support import Call, PluginProcess, change
from wallet.database import compare

CHECKS = 6
"""How often the backup is restored and compared on the way."""
KEPT_ROWS = 500
LEAST_SAMPLES = 20
GROWTH = 6 << 20
"""Bytes that a process may grow by between the second and the last quarter of its life."""
SPARE_DESCRIPTORS = 6
"""What a compaction, a restore and connections that are about to close may hold for a while."""

Unit = list[Call]
"""One commit, or a migration: PRAGMA foreign_keys = OFF, the commit, ON."""


class Sample(NamedTuple):
    rss: int
    descriptors: int


class Watch:
    """Looks at processes from time to time, each under the name of its life."""

    def __init__(self) -> None:
        self.lives: dict[str, list[Sample]] = {}
        self._now: dict[str, int] = {}

    def born(self, name: str, pid: int) -> None:
        kind = name.split()[0]
        self._now = {k: v for k, v in self._now.items() if k.split()[0] != kind} | {name: pid}

    def look(self) -> None:
        for name, pid in list(self._now.items()):
            with contextlib.suppress(OSError, ValueError, IndexError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                count = len(os.listdir(f"/proc/{pid}/fd"))
                sample = Sample(pages * os.sysconf("SC_PAGESIZE"), count)
                self.lives.setdefault(name, []).append(sample)

    def check(self) -> None:
        """Every long life is flat."""
        for name, samples in self.lives.items():
            if len(samples) < LEAST_SAMPLES:
                continue
            quarter = len(samples) // 4
            early, late = samples[quarter : 2 * quarter], samples[-quarter:]
            before, after = (statistics.median(s.rss for s in part) for part in (early, late))
            fds = [statistics.median(s.descriptors for s in part) for part in (early, late)]
            most = max(s.descriptors for s in late)
            print(
                f"{name}: {len(samples)} looks, {before / 2**20:.1f} to {after / 2**20:.1f} MiB,"
                f" {fds[0]:.0f} to {fds[1]:.0f} descriptors, at most {most}"
            )
            assert after <= before + GROWTH, name
            assert fds[1] <= fds[0] + 1 and most <= fds[0] + SPARE_DESCRIPTORS, name


class Traffic:
    """What the node wants to commit."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._recorded = recorded_units()
        self._tokens = 0

    def next(self, version: int) -> Unit:
        """The next unit of a node at ``version``; asked again if it was not committed."""
        if version < len(self._recorded):
            return self._recorded[version]
        self._tokens += 1
        if version == len(self._recorded):
            return [change(version + 1, *SCHEMA)]
        if self._chance.random() < 0.01:
            return self._migration(version)
        return [change(version + 1, *self._statements())]

    def _statements(self) -> Iterator[str]:
        token, body = self._tokens, self._chance.randbytes(self._chance.randrange(300)).hex()
        if self._chance.random() < 0.01:
            body *= 200
        yield f"INSERT INTO soak_parent(id, body) VALUES ({token}, 'caf\u00e9 {body}')"
        for number in range(self._chance.randrange(4)):
            yield f"INSERT INTO soak_child(parent, body) VALUES ({token}, 'child {number}')"
        if self._chance.random() < 0.5:
            yield f"UPDATE soak_parent SET body = 'new {token}' WHERE id % 17 = {token % 17}"
        yield f"DELETE FROM soak_parent WHERE id <= {token - KEPT_ROWS}"

    def _migration(self, version: int) -> Unit:
        # With foreign keys ON the DROP would empty soak_child.
        commit = change(
            version + 1,
            f"CREATE TABLE soak_new ({COLUMNS})",
            f"INSERT INTO soak_new SELECT id, body || '.{self._tokens}' FROM soak_parent",
            "DROP TABLE soak_parent",
            "ALTER TABLE soak_new RENAME TO soak_parent",
        )
        on = (version + 1, ["PRAGMA foreign_keys = ON;"])
        return [(version, [FOREIGN_KEYS_OFF]), commit, on]


COLUMNS = "id INTEGER PRIMARY KEY, body TEXT"
SCHEMA = (
    f"CREATE TABLE soak_parent ({COLUMNS})",
    "CREATE TABLE soak_child (parent INTEGER REFERENCES soak_parent(id) ON DELETE CASCADE,"
    " body TEXT)",
)


def recorded_units() -> list[Unit]:
    """The payer's calls: the unit at index n leads from version n to n + 1."""
    units: list[Unit] = []
    pending: Unit = []
    for call in (call for session in support.trace_sessions("payer") for call in session):
        if call[1] == [FOREIGN_KEYS_OFF]:
            pending = [call]
        elif call[1][0].startswith("PRAGMA"):
            units[-1].append(call)
        else:
            assert call[0] == len(units) + 1
            units.append([*pending, call])
            pending = []
    return units


class Node:
    """lightningd: a database, the plugin, and deaths at bad moments."""

    def __init__(self, directory: Path, watch: Watch, chance: random.Random) -> None:
        self.path = directory / "lightningd.sqlite3"
        self.version = 0
        self.counts: Counter[str] = Counter()
        self._directory = directory
        self._watch = watch
        self._chance = chance
        self._traffic = Traffic(chance)
        self.start()

    def start(self) -> None:
        self.counts["lives of the node"] += 1
        self._database = sqlite3.connect(self.path, isolation_level=None)
        self._database.execute("PRAGMA foreign_keys = ON")
        self._database.execute("PRAGMA synchronous = OFF")
        self.plugin = PluginProcess(self._directory)
        name = f"plugin {self.counts['lives of the node']}"
        self._watch.born(name, self.plugin.process.pid)

    def die(self) -> None:
        """SIGKILL of both; what was not committed never will be."""
        self.plugin.kill()
        self._database.close()

    def step(self, mortal: bool) -> None:
        """One unit; a mortal node may die at any moment of it, and then starts again."""
        for version, statements in self._traffic.next(self.version):
            dies = self._chance.choice(DEATHS) if mortal and self._chance.random() < 0.004 else ""
            if dies == "before it is announced":
                return self._again(dies)
            number = self.plugin.send("db_write", {"data_version": version, "writes": statements})
            if dies == "while it is stored":
                time.sleep(self._chance.random() * 0.002)
                return self._again(dies)
            try:
                assert self.plugin.answer(number) == {"result": "continue"}
            except support.Refused as error:
                raise AssertionError(f"{error}: {self.plugin.log[-10:]}") from error
            if dies == "before it is committed":
                return self._again(dies)
            self._commit(statements)
            self.counts["changes"] += 1
            self.version = version

    def _commit(self, statements: list[str]) -> None:
        pragma = statements[0].startswith("PRAGMA")
        for statement in statements if pragma else ["BEGIN", *statements, "COMMIT"]:
            self._database.execute(statement)

    def _again(self, died: str) -> None:
        self.counts[f"died {died}"] += 1
        self.die()
        self.start()


DEATHS = ("before it is announced", "while it is stored", "before it is committed")


class Torment(threading.Thread):
    """Cuts, kills and compacts in the background.

    Attributes:
        kills: whether the server is killed, too.
    """

    def __init__(self, url: str, watch: Watch, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.kills = True
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        """Held while something is done; who holds it has peace."""
        self._url = url
        self._watch = watch
        self._chance = chance
        self._ended = threading.Event()
        self._start_server(None)
        self.proxy = CutProxy(("127.0.0.1", self.server.port))
        self.failure: BaseException | None = None

    def _start_server(self, port: int | None) -> None:
        self.counts["lives of the server"] += 1
        self.server = ServerProcess(self._url, port, options=["--log-level", "info"]).ready()
        name = f"server {self.counts['lives of the server']}"
        self._watch.born(name, self.server.process.pid)

    def run(self) -> None:
        try:
            while not self._ended.wait(self._chance.random() * 0.6):
                with self.lock:
                    self._torment()
                    self._watch.look()
        except BaseException as error:
            self.failure = error

    def _torment(self) -> None:
        self.proxy.moves.clear()
        what = self._chance.choice(TORMENTS)
        if what in ("kill", "stop") and not self.kills:
            what = "cut"
        self.counts[what] += 1
        if what == "cut":
            direction, size = self._chance.choice((UP, DOWN)), self._chance.randrange(2000)
            self.proxy.cut_after(direction, size)
        elif what == "cut now":
            self.proxy.cut_now()
        elif what == "compact":
            SocketBackend(self.server.url).compact()
        else:
            if what == "kill":
                self.server.kill()
            else:
                assert self.server.stop() == 0
            self._start_server(self.server.port)

    def end(self) -> None:
        """Let everything in peace; raises what went wrong."""
        self._ended.set()
        self.join()
        if self.failure is not None:
            raise self.failure


TORMENTS = ("cut", "cut", "cut", "cut now", "cut now", "compact", "compact", "kill", "stop")


class Phase(NamedTuple):
    """A part of the time."""

    name: str
    mortal: bool
    kills: bool


PHASES = (
    Phase("kills of both", True, True),
    Phase("the server lives on", True, False),
    Phase("the node lives on", False, True),
    Phase("nobody is killed", False, False),
)


def check(node: Node, torment: Torment, scratch: Path) -> None:
    """The backup restores to the node's database."""
    with torment.lock:
        path = scratch / "restored.sqlite3"
        support.run_cli("restore", torment.server.url, path)
        assert compare(str(node.path), str(path)) == []
        path.unlink()


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_soak(url: str, node_dir: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"\nseed {seed}, {support.SOAK_MINUTES:g} minutes")
    support.make_backup(url)
    watch = Watch()
    torment = Torment(url, watch, random.Random(seed + 1))
    lock = {"backend_url": f"socket:127.0.0.1:{torment.proxy.port}"}
    (node_dir / "backup.lock").write_text(json.dumps(lock))
    node = Node(node_dir, watch, random.Random(seed))
    torment.start()
    try:
        began = time.monotonic()
        checks = 0
        while (part := (time.monotonic() - began) / (60 * support.SOAK_MINUTES)) < 1:
            phase = PHASES[int(part * len(PHASES))]
            torment.kills = phase.kills
            node.step(phase.mortal)
            assert torment.failure is None, torment.failure
            if checks < part * CHECKS - 0.5 and node.version:
                checks += 1
                node.step(mortal=False)  # What was abandoned is contradicted.
                check(node, torment, tmp_path)
        torment.end()
        node.step(mortal=False)
        check(node, torment, tmp_path)
        assert node.plugin.close() == 0
        assert torment.server.stop() == 0
    finally:
        node.plugin.process.kill()
        torment.server.process.kill()
        torment.proxy.close()
    print(f"version {node.version}, {dict(node.counts)}, {dict(torment.counts)}")
    kept = {path.name for path in Path(url.removeprefix("file://")).parent.iterdir()}
    assert {name for name in kept if ".torn-" not in name} == {"node.bkp", "node.bkp.writer"}
    watch.check()
