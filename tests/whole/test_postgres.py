"""A node whose backup is in a PostgreSQL cluster: commands and plugin, and machines that die."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import Change
from destinations import backend_for, destination_for
from errors import BackupError
from tests import clusters, support
from tests.clusters import Pair, until
from tests.cutproxy import DOWN, UP, CutProxy
from tests.standby.common import begun, promoted
from tests.support import Call
from wallet import database

pytest.importorskip("psycopg")


@pytest.fixture
def url(pair: Pair) -> str:
    """URL of a database of its own, without a backup."""
    return pair.url(dbname=pair.database())


def dbname(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


@contextlib.contextmanager
def running(node_dir: Path, first: Call) -> Iterator[support.PluginProcess]:
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        plugin.write(*first)
        plugin.init(node_dir)
        yield plugin
        assert plugin.close() == 0
        assert plugin.errors() == []


def calls_of(url: str) -> list[Call]:
    found = support.passed(backend_for(url).read())
    assert found.ending.damage is None
    return found.calls


@pytest.mark.parametrize(
    "name", ["payer", *(pytest.param(name, marks=pytest.mark.soak) for name in ("router", "crash"))]
)
def test_recorded_node_is_restored_exactly(
    name: str, tmp_path: Path, node_dir: Path, url: str
) -> None:
    support.run_cli("init", "--lightning-dir", node_dir, url)
    for calls in support.trace_sessions(name):
        with running(node_dir, calls[0]) as plugin:
            for call in calls[1:]:
                plugin.write(*call)
    support.run_cli("compact", url)
    restored = tmp_path / "restored.sqlite3"
    support.run_cli("restore", url, restored)
    node = support.trace_database(name, tmp_path)
    assert database.compare(str(node), str(restored)) == []
    assert database.version_of(str(restored)) == database.version_of(str(node)) > 0
    listed = [support.run_cli("channels", "--json", source).stdout for source in (url, node)]
    assert listed[0] == listed[1] and json.loads(listed[0])["channels"]


def test_all_commands(tmp_path: Path, node_dir: Path, url: str) -> None:
    wallet = node_dir / "lightningd.sqlite3"
    support.apply_calls(wallet, support.first_changes(3))
    said = support.run_cli("init", "--lightning-dir", node_dir, url)
    assert "data_version 3" in said.stdout
    changes = [support.change(version) for version in range(4, 12)]
    with running(node_dir, changes[0]) as plugin:
        plugin.write(*changes[1])
        assert plugin.call("backup-compact")["after"]["version_count"] == 2
        assert plugin.call("backup-status")["version"] == 5
        plugin.write(*changes[2])
    support.apply_calls(wallet, changes[:3])
    assert json.loads(support.run_cli("status", "--json", url).stdout)["version"] == 6
    assert "sound at version 6" in support.run_cli("verify", url, "--against", wallet).stdout
    assert "no table channels" in support.run_cli("channels", url, check=1).stderr
    support.run_cli("attach", "--lightning-dir", node_dir, url)
    support.apply_calls(wallet, changes[3:5])
    assert "at version 8" in support.run_cli("resync", "--yes", "--lightning-dir", node_dir).stdout
    with running(node_dir, changes[5]):
        pass
    support.apply_calls(wallet, changes[5:6])
    moved = f"file://{tmp_path}/moved.bkp"
    support.run_cli("move", "--lightning-dir", node_dir, url, moved)
    back = f"{url}&backup=again"
    support.run_cli("move", "--lightning-dir", node_dir, moved, back)
    assert json.loads(support.run_cli("compact", back).stdout)["after"]["version_count"] <= 2
    support.run_cli("restore", back, tmp_path / "restored.sqlite3")
    assert database.compare(str(wallet), str(tmp_path / "restored.sqlite3")) == []


def test_a_node_that_ran_without_the_plugin_heals(node_dir: Path, url: str, pair: Pair) -> None:
    wallet = node_dir / "lightningd.sqlite3"
    support.apply_calls(wallet, support.first_changes(3))
    support.run_cli("init", "--lightning-dir", node_dir, url)
    support.apply_calls(wallet, [support.change(4), support.change(5)])
    with running(node_dir, support.change(6)) as plugin:
        assert plugin.logged("The old backup is kept: as backup=node.old-")
    assert calls_of(url) == [support.change(6)]


def test_plugin_killed_while_its_change_waits(node_dir: Path, url: str, pair: Pair) -> None:
    """What its server goes on with is neither lost nor twice there."""
    support.run_cli("init", "--lightning-dir", node_dir, url)
    calls = support.first_changes(3)
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        plugin.write(*calls[0])
        pair.standby.freeze()
        try:
            plugin.send("db_write", {"data_version": 2, "writes": calls[1][1]})
            pair.await_waiting()
            plugin.kill()
            with support.PluginProcess(node_dir) as again:
                again.manifest()
                number = again.send("db_write", {"data_version": 2, "writes": calls[1][1]})
                until(lambda: len(waiting(pair)) == 1 and again.process.poll() is None, "it waits")
                pair.standby.thaw()
                assert again.answer(number) == {"result": "continue"}
                again.write(*calls[2])
        finally:
            pair.standby.thaw()
    assert calls_of(url) == calls


def test_plugin_killed_before_its_change_is_committed(node_dir: Path, url: str, pair: Pair) -> None:
    """Its server does not go on with it when the next plugin has looked."""
    support.run_cli("init", "--lightning-dir", node_dir, url)
    calls = support.first_changes(2)
    blocked = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with contextlib.ExitStack() as stack:
        plugin = stack.enter_context(support.PluginProcess(node_dir))
        plugin.manifest()
        plugin.write(*calls[0])
        blocker = stack.enter_context(contextlib.closing(pair.primary.connect(dbname(url))))
        blocker.autocommit = False
        blocker.execute("LOCK TABLE cln_backup.records IN SHARE MODE")
        plugin.send("db_write", {"data_version": 2, "writes": calls[1][1]})
        until(lambda: pair.primary.sql(blocked), "it waits for the lock")
        first = pair.primary.sql(blocked)
        plugin.kill()
        again = stack.enter_context(support.PluginProcess(node_dir))
        again.manifest()
        number = again.send("db_write", {"data_version": 2, "writes": calls[1][1]})
        until(lambda: set(pair.primary.sql(blocked)) - set(first), "the next one waits")
        assert not set(pair.primary.sql(blocked)) & set(first), "the one before is ended"
        blocker.rollback()
        assert again.answer(number) == {"result": "continue"}
    assert calls_of(url) == calls


def waiting(pair: Pair) -> list[object]:
    return pair.primary.sql("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")


# A machine that dies, in the middle of changes


class Node:
    """Writes change after change, and knows which were acknowledged."""

    def __init__(self, url: str) -> None:
        self.backend = backend_for(url)
        self.acknowledged: list[Call] = []
        self.error: BackupError | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Node:
        self.backend.open()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(support.ANSWER_S)
        assert not self._thread.is_alive(), "it hangs"
        self.backend.close()

    def _run(self) -> None:
        try:
            for version in itertools.count(1):
                call = support.change(version, f"-- {version}" + "x" * (version % 7) * 1000)
                self.backend.add_change(Change(version, None, call[1]))
                self.acknowledged.append(call)
                if self._ending.is_set():
                    return
        except BackupError as error:
            self.error = error

    def came_on(self, count: int) -> None:
        """Return when ``count`` more are acknowledged."""
        goal = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= goal or self.error, "it goes on")
        assert self.error is None, self.error


def killed(pair: Pair, url: str, times: int, rng: random.Random) -> None:
    """A primary that dies ``times``; every other time the standby takes over."""
    backend_for(url).create(None)
    with Node(url) as node:
        for number in range(times):
            node.came_on(rng.randint(1, 30))
            time.sleep(rng.random() * 0.002)
            pair.primary.kill()
            if number % 2:
                pair.promote()
                pair.rejoin()
            else:
                pair.primary.start()
        node.came_on(1)
    assert node.error is None and node.backend.reconnects >= times
    assert calls_of(url) == node.acknowledged


def test_primary_killed_in_the_middle_of_changes(pair: Pair, url: str) -> None:
    killed(pair, url, 5, random.Random(17))


def test_a_standby_takes_over_while_the_node_writes(url: str, tmp_path: Path) -> None:
    """What stands behind the take-over is a sound backup, and the new node's."""
    backend = backend_for(url)
    backend.create(None)
    calls = support.first_changes(5000)
    owner = bytes(range(16))
    with contextlib.closing(backend):
        backend.open()
        backend.take_over(owner)
        acknowledged: list[Call] = []
        refused: list[BackupError] = []

        def write() -> None:
            try:
                for call in calls:
                    backend.add_change(Change(call[0], None, call[1]))
                    acknowledged.append(call)
            except BackupError as error:
                refused.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        until(lambda: len(acknowledged) >= 10, "it writes")
        directory = begun(tmp_path / "standby", url)
        found = promoted(directory, tmp_path / "promoted", url)
        thread.join()
    assert "took it over at" in str(refused[0])
    version = database.version_of(str(found))
    assert version in (len(acknowledged), len(acknowledged) + 1)
    support.apply_calls(tmp_path / "expected.sqlite3", calls[:version])
    assert database.compare(str(tmp_path / "expected.sqlite3"), str(found)) == []
    assert calls_of(url) == calls[:version]


@pytest.mark.soak
def test_primary_killed_100_times(pair: Pair, url: str) -> None:
    killed(pair, url, 100, random.Random())


def through(pair: Pair, url: str, proxy: CutProxy) -> str:
    """``url`` of the primary alone, by ``proxy``."""
    place = f"{pair.primary.host}:{pair.primary.port}"
    hosts = url.partition("@")[2].partition("/")[0]
    assert place in hosts
    return url.replace(hosts, f"127.0.0.1:{proxy.port}")


def test_line_cut_in_a_change(pair: Pair, url: str) -> None:
    backend_for(url).create(None)
    calls = []
    with CutProxy((pair.primary.host, pair.primary.port)) as proxy:
        backend = backend_for(through(pair, f"{url}&sslmode=disable", proxy))
        with contextlib.closing(backend):
            backend.open()
            for version, (way, size) in enumerate(
                itertools.product((UP, DOWN), (1, 40, 150, 300, 700)), 1
            ):
                proxy.cut_after(way, size)
                calls.append(support.change(version))
                backend.add_change(Change(version, None, calls[-1][1]))
                proxy.cut_no_more()
            assert backend.reconnects >= 6
    assert calls_of(url) == calls


def test_primary_and_standby_that_do_not_see_each_other(pair: Pair, url: str) -> None:
    ((info,),) = pair.standby.sql("SHOW primary_conninfo")
    with CutProxy((pair.primary.host, pair.primary.port)) as proxy:
        words = [word for word in info.split() if not word.startswith(("port=", "host="))]
        by_proxy = " ".join([*words, "host=127.0.0.1", f"port={proxy.port}"]).replace("'", "''")
        pair.standby.configure("primary_conninfo", by_proxy)
        until(lambda: proxy.moves, "it streams by the proxy")
        pair.await_streaming()
        backend_for(url).create(None)
        with Node(url) as node:
            node.came_on(3)
            proxy.hold()
            pair.await_waiting()
            seen = len(node.acknowledged)
            assert len(calls_of(url)) == seen
            proxy.cut_now()
            node.came_on(3)
    assert calls_of(url) == node.acknowledged


def test_one_of_several_comes_back_and_catches_up(pair: Pair, url: str, tmp_path: Path) -> None:
    urls = [f"file://{tmp_path}/node.bkp", url]
    backend = destination_for(urls, 1)
    backend.create(None)
    calls = support.first_changes(12)
    with contextlib.closing(backend):
        backend.open()
        for version, statements in calls[:4]:
            backend.add_change(Change(version, None, statements))
        pair.primary.stop("immediate")
        for version, statements in calls[4:]:
            backend.add_change(Change(version, None, statements))
        pair.primary.start()
        until(lambda: all(each.version == 12 for each in backend.members()), "all have it")
    assert calls_of(url) == support.stored(urls[0]) == calls


# A compaction, and what is large


def test_changes_go_on_while_it_is_compacted(url: str) -> None:
    backend = backend_for(url)
    backend.create(None)
    first = support.first_changes(100)
    stop, done = threading.Event(), []
    with contextlib.closing(backend):
        backend.open()
        for version, statements in first:
            backend.add_change(Change(version, None, statements))
        lock = threading.Lock()
        backend.keep_house(lock, None)

        def compact() -> None:
            try:
                done.append(backend.compact())
            finally:
                stop.set()

        compacting = threading.Thread(target=compact, daemon=True)
        compacting.start()
        version = len(first)
        while not stop.is_set():
            version += 1
            with lock:
                backend.add_change(Change(version, None, support.change(version)[1]))
        compacting.join(support.ANSWER_S)
        assert done[0]["after"]["version_count"] <= backend.version_count < version
        assert backend.version_count == backend_for(url).status().version_count
        assert backend.reconnects == 0
    found = support.passed(backend_for(url).read())
    assert found.ending.damage is None and found.ending.version == version


def rows(pair: Pair, url: str) -> list[object]:
    tables = ("pieces", "records", "backups")
    counts = ", ".join(f"(SELECT count(*) FROM cln_backup.{table})" for table in tables)
    return pair.primary.sql(f"SELECT {counts}", dbname=dbname(url))


def test_a_killed_compaction_leaves_nothing_behind(
    pair: Pair, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_for(url)
    backend.create(None)
    with contextlib.closing(backend):
        backend.open()
        for version, statements in support.first_changes(20):
            backend.add_change(Change(version, None, statements))
    before = rows(pair, url)
    failed: list[BackupError] = []

    def compact() -> None:
        try:
            backend_for(url).compact()
        except BackupError as error:
            failed.append(error)

    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=compact, daemon=True)
    blocked = "FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with contextlib.closing(pair.primary.connect(dbname(url))) as blocker:
        blocker.autocommit = False
        blocker.execute("LOCK TABLE cln_backup.backups IN SHARE MODE")
        thread.start()
        until(lambda: pair.primary.sql(f"SELECT 1 {blocked}"), "it has sent its snapshot")
        pair.primary.sql(f"SELECT pg_terminate_backend(pid) {blocked}")
        thread.join(support.ANSWER_S)
    assert failed and rows(pair, url) == before
    assert not list(tmp_path.iterdir())
    assert backend_for(url).compact()["after"]["version_count"] == 2
    assert len(calls_of(url)) == 1


@pytest.mark.soak
def test_4_gib_of_snapshot_take_no_memory(tmp_path: Path) -> None:
    place = Path("/var/tmp") / f"clusters-{os.getpid()}"
    if reason := clusters.missing():
        pytest.skip(reason)
    if shutil.disk_usage(place.parent).free < 40 << 30:
        pytest.skip("two clusters, their logs and the archive need 40 GiB in /var/tmp")
    with clusters.Pair(place) as pair:
        create_and_read(pair.url(dbname=pair.database()), tmp_path, 4 << 30)


def create_and_read(url: str, tmp_path: Path, size: int) -> None:
    """A snapshot of more than ``size`` bytes goes there and comes back in flat memory."""
    with open(tmp_path / "large", "wb") as file:
        file.truncate(size + 1)
    work = (
        "import resource, sys\n"
        "from backend import Snapshot\n"
        "from destinations import backend_for\n"
        "backend_for(sys.argv[1]).create(Snapshot(sys.argv[2], 7))\n"
        "taken = sum(len(getattr(s.found, 'snapshot', None) or b'')"
        " for s in backend_for(sys.argv[1]).read())\n"
        "print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", work, url, str(tmp_path / "large")],
        env={**os.environ, "PYTHONPATH": str(support.ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, peak_kib = map(int, done.stdout.split())
    assert taken == size + 1 and peak_kib < 128 << 10
