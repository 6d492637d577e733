"""A second machine, through the commands and the plugin's process: it follows, and takes over."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

import mirrorbackend
from backend import FOREIGN_KEYS_OFF, new_owner
from commands.standing import promote
from errors import CLI
from filebackend import FileBackend
from socketbackend import SocketBackend
from tests import support
from tests.peers import ServerProcess, patched
from tests.stopping import eventually
from tests.support import PluginProcess, Refused, run_cli
from wallet import database

CALLS = support.first_changes(2000)
TOOK_OVER = rf"{os.uname().nodename} took it over at 20\d\d-"


class StandbyProcess:
    """``backup-cli standby`` in a process of its own."""

    def __init__(self, directory: Path, *words: str, patch: str = "") -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [*patched(support.CLI, patch), "standby", "--lightning-dir", str(directory), *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line)

    def wait_for(self, text: str) -> None:
        eventually(lambda: any(text in line for line in list(self.lines)), text)

    def wait_for_version(self, version: int) -> None:
        eventually(lambda: self.noted_version() >= version, f"version {version}")

    def noted_version(self) -> int:
        """What it has noted beside its database."""
        with contextlib.suppress(FileNotFoundError):
            place = json.loads((self.directory / "backup.standby").read_text())["place"]
            return place["version"] if place else 0
        return 0

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(support.ANSWER_S)

    def __enter__(self) -> StandbyProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """The network directory of the second machine."""
    directory = tmp_path / "second" / "regtest"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture(params=["file", "socket"])
def place(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    """URL where a node's backup goes: nothing is there yet."""
    if request.param == "file":
        yield url
        return
    run_cli("init", url, cwd=os.path.dirname(url.removeprefix("file://")))
    with ServerProcess(url) as server:
        yield server.url


def node_database(path: Path, calls: int) -> Path:
    """What a node has after its first changes."""
    path.unlink(missing_ok=True)
    support.apply_calls(path, CALLS[:calls])
    return path


def write(plugin: PluginProcess, calls: Sequence[support.Call]) -> None:
    for call in calls:
        plugin.write(*call)


def test_from_nothing_to_a_fail_over(
    node_dir: Path, second: Path, place: str, tmp_path: Path
) -> None:
    run_cli("init", "--lightning-dir", node_dir, place)
    with StandbyProcess(second, place) as standby:
        with PluginProcess(node_dir) as plugin:
            write(plugin, CALLS[:20])
            standby.wait_for_version(19)
            write(plugin, CALLS[20:40])
            plugin.kill()
        standby.wait_for_version(39)
        standby.wait_for("is proven at version")
        done = run_cli("status", "--json", "--lightning-dir", second)
        shown = json.loads(done.stdout)
        assert (shown["version"], shown["backup_version"], shown["behind"]) == (39, 40, 1)
        assert "sound at version 40" in run_cli("verify", "--lightning-dir", second).stdout
        done = run_cli("resync", "--lightning-dir", second, check=1)
        assert "A standby is kept there" in done.stderr and "promote --lig" in done.stderr
        assert shown["process"] == standby.process.pid and shown["last_proven_ns"]
        assert not (second / "lightningd.sqlite3").exists()
        done = run_cli("promote", "--lightning-dir", second)
        assert "the old node is refused from now on" in done.stdout
        assert standby.process.wait() == 0
    assert sorted(path.name for path in second.iterdir()) == ["backup.lock", "lightningd.sqlite3"]
    expected = node_database(tmp_path / "expected.sqlite3", 40)
    assert database.compare(str(expected), str(second / "lightningd.sqlite3")) == []
    with PluginProcess(node_dir) as plugin, pytest.raises(Refused, match=TOOK_OVER) as caught:
        plugin.write(*CALLS[40])
    # Not how an old state gets back into the backup.
    assert "must stay off" in str(caught.value) and "--override" not in str(caught.value)
    done = run_cli("status", "--lightning-dir", node_dir, check=1)
    assert "another node's now" in done.stderr
    run_cli("status", "--lightning-dir", second)
    assert "attach" in run_cli("promote", "--lightning-dir", node_dir, check=1).stderr
    node_database(node_dir / "lightningd.sqlite3", 40)
    done = run_cli("promote", "--lightning-dir", node_dir, check=1)
    assert "belongs to another node: it was taken over" in done.stderr and not done.stdout
    with open(node_dir.parent / f"lightningd-{node_dir.name}.pid", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = run_cli("promote", "--lightning-dir", node_dir, check=1)
    assert "no standby" in done.stderr and "lightningd is running" in done.stderr
    with PluginProcess(second) as plugin:
        write(plugin, CALLS[40:42])
        assert "goes on with" in run_cli("promote", "--lightning-dir", second).stdout
        assert plugin.logged("Versions match up")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(number: int, second: Path, url: str) -> None:
    support.make_backup(url, CALLS[:10])
    with StandbyProcess(second, url) as standby:
        standby.wait_for("in step")
        assert standby.end(number) == 0
    done = run_cli("status", "--json", "--lightning-dir", second, check=4)
    assert (json.loads(done.stdout)["version"], json.loads(done.stdout)["process"]) == (9, None)
    assert "It does not run" in done.stderr


def test_refused(node_dir: Path, second: Path, url: str) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    node_database(node_dir / "lightningd.sqlite3", 3)
    done = run_cli("standby", "--lightning-dir", node_dir, url, check=1)
    assert "exists already and is never overwritten" in done.stderr
    assert "There is no standby" in run_cli("promote", "--lightning-dir", second, check=1).stderr
    with PluginProcess(node_dir) as plugin, StandbyProcess(second, url) as standby:
        write(plugin, CALLS[:3])
        standby.wait_for_version(2)
        other = run_cli("standby", "--lightning-dir", second, url, check=1)
        assert f"Another process (pid {standby.process.pid}) works on the standby" in other.stderr
        # A file has one writer, and that one cannot be told that its place is taken.
        done = run_cli("promote", "--lightning-dir", second, check=1)
        assert "Stop that lightningd" in done.stderr
        assert "the standby was ended for this" in done.stderr
        write(plugin, CALLS[3:5])
    with StandbyProcess(second, url) as standby:
        standby.wait_for_version(4)
        (second / "lightningd.sqlite3").touch()
        done = run_cli("promote", "--lightning-dir", second, check=1)
        assert "never overwritten" in done.stderr and standby.process.poll() is None
    (second / "lightningd.sqlite3").unlink()
    run_cli("promote", "--lightning-dir", second)
    assert database.version_of(str(second / "lightningd.sqlite3")) == 5


STEPS = """
import durable, itertools, os
from filelog import appender
from tests.support import *
count = itertools.count(1)
def ending(owner, name):
    inner = getattr(owner, name)
    def outer(*arguments, **options):
        found = inner(*arguments, **options)
        if next(count) == {step}:
            os._exit(9)
        return found
    setattr(owner, name, outer)
for name in ("replace", "publish", "_link"):
    ending(durable, name)
ending(appender.LogAppender, "add_owner")
"""


def test_promote_is_killed_at_every_second_step(
    node_dir: Path, second: Path, url: str, tmp_path: Path
) -> None:
    kill_at(range(1, 100, 2), node_dir, second, url, tmp_path)


@pytest.mark.soak
def test_promote_is_killed_at_the_others(
    node_dir: Path, second: Path, url: str, tmp_path: Path
) -> None:
    kill_at(range(2, 100, 2), node_dir, second, url, tmp_path)


def kill_at(steps: Iterable[int], node_dir: Path, second: Path, url: str, tmp_path: Path) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    with PluginProcess(node_dir) as plugin, StandbyProcess(second, url) as standby:
        write(plugin, CALLS[:10])
        standby.wait_for_version(9)
        write(plugin, CALLS[10:12])
    for name in ("second", "disk2"):
        (tmp_path / name).rename(tmp_path / f"{name}-before")
    expected = node_database(tmp_path / "expected.sqlite3", 12)
    for step in steps:
        for name in ("second", "disk2"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(tmp_path / f"{name}-before", tmp_path / name)
        killed = promote_killed_at(step, second)
        promote.main(["--lightning-dir", str(second)], standalone_mode=False)
        names = sorted(path.name for path in second.iterdir())
        assert names == ["backup.lock", "lightningd.sqlite3"]
        assert database.compare(str(expected), str(second / "lightningd.sqlite3")) == []
        owner = json.loads((second / "backup.lock").read_text())["owner"]
        assert FileBackend(url).status().owner == owner[:16]
        if not killed:
            break
    assert step > 7


def promote_killed_at(step: int, directory: Path) -> bool:
    """Whether ``promote`` came to that step, where it was killed."""
    words = patched(support.CLI, STEPS.format(step=step))
    done = subprocess.run(
        [*words, "promote", "--lightning-dir", str(directory)], capture_output=True, text=True
    )
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9


class Race:
    """A node that writes as fast as it can, and a machine that takes its place."""

    def __init__(self, tmp_path: Path, second: Path, url: str) -> None:
        self.node_dir, self.second, self.url = support.network_dir(tmp_path), second, url
        self.expected = tmp_path / "expected.sqlite3"
        self.acknowledged = 0
        self.refusal = ""

    def traffic(self, plugin: PluginProcess) -> None:
        try:
            for version, statements in CALLS:
                plugin.write(version, statements)
                self.acknowledged = version
        except Refused as error:
            self.refusal = str(error)

    def run(self, dice: random.Random) -> None:
        owner = new_owner()
        FileBackend(self.url).create(None, owner)
        with ServerProcess(self.url) as server:
            lock = {"backend_url": server.url, "owner": owner.hex()}
            (self.node_dir / "backup.lock").write_text(json.dumps(lock))
            with StandbyProcess(self.second, server.url) as standby:
                self.race(standby, dice.randrange(1, 80))
            server.stop()
        with ServerProcess(self.url, server.port):
            with PluginProcess(self.node_dir) as plugin, pytest.raises(Refused, match=TOOK_OVER):
                plugin.write(*CALLS[self.acknowledged])
            with PluginProcess(self.second) as plugin:
                write(plugin, CALLS[self.found : self.found + 2])

    def race(self, standby: StandbyProcess, at: int) -> None:
        standby.wait_for("following")
        with PluginProcess(self.node_dir) as plugin:
            thread = threading.Thread(target=self.traffic, args=(plugin,))
            thread.start()
            eventually(lambda: self.acknowledged >= at)
            promote.main(["--lightning-dir", str(self.second)], standalone_mode=False)
            thread.join()
        assert standby.process.wait() == 0
        assert "took it over at" in self.refusal
        path = self.second / "lightningd.sqlite3"
        self.found = database.version_of(str(path))
        # The one that was announced last may not have been acknowledged.
        assert self.found in (self.acknowledged, self.acknowledged + 1)
        node_database(self.expected, self.found)
        assert database.compare(str(self.expected), str(path)) == []


@pytest.mark.parametrize("seed", range(5))
def test_old_and_new_node_race(seed: int, tmp_path: Path, second: Path, url: str) -> None:
    Race(tmp_path, second, url).run(random.Random(seed))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(5, 200))
def test_old_and_new_node_race_on(seed: int, tmp_path: Path, second: Path, url: str) -> None:
    Race(tmp_path, second, url).run(random.Random(seed))


def killed_in_turn(
    node_dir: Path, second: Path, file_url: str, dice: random.Random, rounds: int
) -> int:
    """Traffic over a server, in which node, server and standby are killed; versions written."""
    FileBackend(file_url).create(None)
    server, version = ServerProcess(file_url).ready(), 0
    run_cli("init", "--lightning-dir", node_dir, server.url)
    plugin, standby = PluginProcess(node_dir), StandbyProcess(second, server.url)
    try:
        for _ in range(rounds):
            for _ in range(dice.randrange(1, 30)):
                version += 1
                plugin.write(*CALLS[version - 1])
            match dice.choice(["node", "server", "standby", "compact", "both"]):
                case "node":
                    plugin.kill()
                    plugin = PluginProcess(node_dir)
                case "server":
                    server.kill()
                    server = ServerProcess(file_url, server.port)
                case "compact":
                    server.ready()
                    SocketBackend(server.url).compact()
                case what:
                    standby.process.kill()
                    standby.process.wait()
                    if what == "both":
                        server.kill()
                        server = ServerProcess(file_url, server.port)
                    standby = StandbyProcess(second, server.url)
        server.ready()
        plugin.kill()
        promote.main(["--lightning-dir", str(second)], standalone_mode=False)
    finally:
        server.kill()
        standby.__exit__()
        plugin.__exit__()
    return version


def test_all_three_are_killed(node_dir: Path, second: Path, url: str, tmp_path: Path) -> None:
    version = killed_in_turn(node_dir, second, url, random.Random(0), rounds=6)
    expected = node_database(tmp_path / "expected.sqlite3", version)
    assert database.compare(str(expected), str(second / "lightningd.sqlite3")) == []


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(1, 20))
def test_all_three_are_killed_on(
    seed: int, node_dir: Path, second: Path, url: str, tmp_path: Path
) -> None:
    version = killed_in_turn(node_dir, second, url, random.Random(seed), rounds=30)
    expected = node_database(tmp_path / "expected.sqlite3", version)
    assert database.compare(str(expected), str(second / "lightningd.sqlite3")) == []


def test_a_resync_begins_it_again(node_dir: Path, second: Path, url: str, tmp_path: Path) -> None:
    run_cli("init", "--lightning-dir", node_dir, url)
    with StandbyProcess(second, url) as standby:
        with PluginProcess(node_dir) as plugin:
            write(plugin, CALLS[:10])
            standby.wait_for_version(9)
        # The node went on without the plugin.
        node_database(node_dir / "lightningd.sqlite3", 15)
        run_cli("resync", "--yes", "--lightning-dir", node_dir)
        standby.wait_for("Beginning again")
        standby.wait_for_version(15)
        run_cli("promote", "--lightning-dir", second)
    ours = str(second / "lightningd.sqlite3")
    assert database.compare(str(node_dir / "lightningd.sqlite3"), ours) == []


def test_what_a_proof_finds_begins_it_again(
    node_dir: Path, second: Path, url: str, tmp_path: Path
) -> None:
    support.make_backup(url, CALLS[:10])
    with StandbyProcess(second, url) as standby:
        standby.wait_for("is proven")
        standby.end()
    with contextlib.closing(sqlite3.connect(second / "lightningd.sqlite3.standby")) as found:
        found.execute("CREATE TABLE strange (item REFERENCES items (id))")
        found.execute("INSERT INTO strange VALUES (4711)")
        found.commit()
    with StandbyProcess(second, "--check-every", "1s", url) as standby:
        standby.wait_for("is not sound: foreign_key_check")
        standby.wait_for("is proven")
    run_cli("promote", "--lightning-dir", second)
    expected = node_database(tmp_path / "expected.sqlite3", 10)
    assert database.compare(str(expected), str(second / "lightningd.sqlite3")) == []


def test_a_backup_that_is_not_sound_does_not_begin_for_ever(second: Path, url: str) -> None:
    broken = ("CREATE TABLE a (id INTEGER PRIMARY KEY)", "CREATE TABLE b (x REFERENCES a (id))")
    off = (4, [FOREIGN_KEYS_OFF])
    strange = support.change(5, "INSERT INTO b VALUES (7)")
    support.make_backup(url, [*CALLS[:3], support.change(4, *broken), off, strange, CALLS[5]])
    with StandbyProcess(second, "--check-every", "1s", url) as standby:
        standby.wait_for("ERROR")
        assert sum("Beginning again" in line for line in standby.lines) == 1
    done = run_cli("promote", "--lightning-dir", second, check=3)
    assert "Warning: SQLite's checks of it found: foreign_key_check" in done.stderr


FULL = """
import errno
from standby import state
inner = state.write
def full(directory, found):
    if found.error is not None:
        state.write = inner
        raise state.DiskError(directory, OSError(errno.ENOSPC, "full"), "write")
    inner(directory, found)
state.write = full
"""


def test_an_error_that_cannot_be_noted_does_not_end_it(second: Path, url: str) -> None:
    with StandbyProcess(second, url, patch=FULL) as standby:
        standby.wait_for("There is no backup at")
        support.make_backup(url, CALLS[:10])
        standby.wait_for("in step")


def test_two_promotes_at_once(second: Path, url: str) -> None:
    support.make_backup(url, CALLS[:10])
    with StandbyProcess(second, url) as standby:
        standby.wait_for("in step")
    words = [*patched(support.CLI, ""), "promote", "--lightning-dir", str(second)]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    codes = set()
    for process in both:
        _, stderr = process.communicate()
        assert "Traceback" not in stderr
        codes.add(process.returncode)
    assert 0 in codes
    assert database.version_of(str(second / "lightningd.sqlite3")) == 10
    assert sorted(path.name for path in second.iterdir()) == ["backup.lock", "lightningd.sqlite3"]


# Several destinations


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[ServerProcess]]:
    """Three servers, each with an empty backup."""
    with contextlib.ExitStack() as stack:
        found = []
        for number in range(3):
            (tmp_path / f"disk{number}").mkdir()
            FileBackend(f"file://{tmp_path}/disk{number}/node.bkp").create(None)
            server = ServerProcess(f"file://{tmp_path}/disk{number}/node.bkp")
            found.append(stack.enter_context(server))
        yield found


def test_several_are_taken_over_with_one_away(
    node_dir: Path, second: Path, three: list[ServerProcess], tmp_path: Path
) -> None:
    """Two of three are enough, while the old node writes, by whatever way it goes there."""
    urls = [f"{server.url}?retry_for=2" for server in three]
    run_cli("init", "--lightning-dir", node_dir, "--acks", "2", *(server.url for server in three))
    with PluginProcess(node_dir) as plugin, StandbyProcess(second, *urls) as standby:
        write(plugin, CALLS[:10])
        standby.wait_for_version(9)
        three[2].kill()
        write(plugin, CALLS[10:15])
        promote.main(["--lightning-dir", str(second)], standalone_mode=False)
        began_s = time.monotonic()
        with pytest.raises(Refused, match=TOOK_OVER):
            write(plugin, CALLS[15:17])
        assert time.monotonic() - began_s < mirrorbackend.RETRY_FOR_S / 2
        node_database(node_dir / "lightningd.sqlite3", 15)
        done = run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
        assert "must stay off" in done.stderr and "--override" not in done.stderr
        found = database.version_of(str(second / "lightningd.sqlite3"))
    assert found == 15
    expected = node_database(tmp_path / "expected.sqlite3", found)
    assert database.compare(str(expected), str(second / "lightningd.sqlite3")) == []
    lock = json.loads((second / "backup.lock").read_text())
    assert (lock["backend_urls"], lock["acks"], lock["epoch"]) == (urls, 2, 2)
    # The third one comes back, still the old node's: it is nobody's majority.
    with ServerProcess(f"file://{tmp_path}/disk2/node.bkp", three[2].port):
        with PluginProcess(node_dir) as plugin, pytest.raises(Refused, match=TOOK_OVER):
            plugin.write(*CALLS[15])
        with PluginProcess(second) as plugin:
            write(plugin, CALLS[15:20])


def test_too_few_of_several_are_not_taken_over(
    node_dir: Path, second: Path, tmp_path: Path
) -> None:
    urls = [f"file://{tmp_path}/disk{number}/node.bkp" for number in range(3)]
    for number in range(3):
        (tmp_path / f"disk{number}").mkdir()
    run_cli("init", "--lightning-dir", node_dir, "--acks", "2", *urls)
    with PluginProcess(node_dir) as plugin, StandbyProcess(second, *urls) as standby:
        write(plugin, CALLS[:10])
        standby.wait_for_version(9)
    for number in range(2):
        (tmp_path / f"disk{number}").rename(tmp_path / f"away{number}")
    done = run_cli("promote", "--lightning-dir", second, check=1)
    assert "1 of the backup's destinations can be taken over, and 2 are needed" in done.stderr
    for number in range(2):
        (tmp_path / f"away{number}").rename(tmp_path / f"disk{number}")
    with PluginProcess(node_dir) as plugin:
        plugin.write(*CALLS[10])


def test_one_of_two_goes_on_alone(node_dir: Path, second: Path, tmp_path: Path) -> None:
    """Where both had to acknowledge, any one of them has everything and shuts the old node out."""
    urls = [f"file://{tmp_path}/disk{number}/node.bkp" for number in range(2)]
    for number in range(2):
        (tmp_path / f"disk{number}").mkdir()
    run_cli("init", "--lightning-dir", node_dir, *urls)
    with PluginProcess(node_dir) as plugin, StandbyProcess(second, *urls) as standby:
        write(plugin, CALLS[:10])
        standby.wait_for_version(9)
    (tmp_path / "disk0").rename(tmp_path / "away")
    done = run_cli("promote", "--lightning-dir", second, check=1)
    assert f"`{CLI} standby --lightning-dir {second} {urls[1]}` until it" in done.stderr
    with StandbyProcess(second, urls[1]) as standby:
        standby.wait_for("in step")
    (tmp_path / "away").rename(tmp_path / "disk0")
    promote.main(["--lightning-dir", str(second)], standalone_mode=False)
    with PluginProcess(node_dir) as plugin, pytest.raises(Refused, match=TOOK_OVER):
        plugin.write(*CALLS[10])
    with PluginProcess(second) as plugin:
        write(plugin, CALLS[10:12])
    run_cli("restore", *urls, tmp_path / "restored.sqlite3")
    assert database.version_of(str(tmp_path / "restored.sqlite3")) == 12
