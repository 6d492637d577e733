"""Under a real lightningd: fresh and existing nodes, restarts, clean stops, SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.peers import ServerProcess, free_port
from tests.support import run_cli
from wallet import database

NEEDED = ["lightningd", "lightning-cli", "bitcoind", "bitcoin-cli"]
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)}")

READY_S = 120.0
"""Longer than any start or stop takes; only a hang meets it."""
LATE_WRITES = 20

LATE_PLUGIN = f"""#!{sys.executable}
import json, os, socket, time
from pyln.client import Plugin
plugin = Plugin()
connection = socket.socket(socket.AF_UNIX)
@plugin.init()
def init(configuration, **_):
    # While it stops lightningd takes no new connection, but serves those it has.
    connection.connect(os.path.join(configuration["lightning-dir"], configuration["rpc-file"]))
@plugin.subscribe("shutdown")
def on_shutdown(**_):
    time.sleep(1.5)  # Longer than a backup that only waits for quiet would stay.
    answers = connection.makefile()
    for number in range({LATE_WRITES}):
        params = {{"key": ["late", str(number)], "string": "x" * 1000}}
        request = {{"jsonrpc": "2.0", "id": number, "method": "datastore", "params": params}}
        connection.sendall(json.dumps(request).encode())
        while answers.readline().strip():
            pass
    os._exit(0)
plugin.run()
"""
"""A plugin that makes the node write its database while it stops."""


class Bitcoind:
    """A bitcoind on regtest."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.options = [f"-datadir={directory}", f"-rpcport={self.port}", "-regtest"]
        (directory / "bitcoin.conf").write_text("regtest=1\nrpcuser=rpc\nrpcpassword=rpc\n")
        extra = ["-server", "-listen=0", "-dnsseed=0", "-printtoconsole=0"]
        self.process = subprocess.Popen(["bitcoind", *self.options, *extra])
        self.cli("-rpcwait", f"-rpcwaittimeout={READY_S:.0f}", "getblockcount")
        self.cli("createwallet", "test")
        self.mine(5)

    def cli(self, *arguments: str) -> str:
        command = ["bitcoin-cli", *self.options, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def mine(self, blocks: int) -> None:
        self.cli("generatetoaddress", str(blocks), self.cli("getnewaddress"))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=READY_S)


@pytest.fixture(scope="module")
def bitcoind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bitcoind]:
    running = Bitcoind(tmp_path_factory.mktemp("bitcoin"))
    yield running
    running.stop()


class Refusal(Exception):
    """lightningd ended by itself while it started."""


class Lightningd:
    """A node, started and stopped any number of times.

    Attributes:
        directory: its network directory.
        log: its log file, of all starts.
    """

    def __init__(self, base: Path, bitcoind: Bitcoind) -> None:
        self.base = base
        self.directory = base / "regtest"
        self.database = self.directory / "lightningd.sqlite3"
        self.log = base.parent / "node.log"
        self._bitcoind = bitcoind
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.directory.mkdir(parents=True)

    def start(self, *options: str, backup: bool = True, listen: bool = False) -> None:
        """Start; returns once it answers. Refusal if it ends instead.

        Args:
            listen: at ``port``, for peers; otherwise it knows no network.
        """
        bitcoin = self._bitcoind
        reach = f"--bind-addr=127.0.0.1:{self.port}" if listen else "--offline"
        command = [
            *("lightningd", "--network=regtest", f"--lightning-dir={self.base}"),
            *("--developer", "--dev-fast-gossip", "--dev-bitcoind-poll=1", reach),
            *("--autolisten=false", "--disable-dns", "--log-level=debug"),
            *(f"--log-file={self.log}", f"--bitcoin-cli={shutil.which('bitcoin-cli')}"),
            *(f"--bitcoin-datadir={bitcoin.directory}", "--bitcoin-rpcconnect=127.0.0.1"),
            *(f"--bitcoin-rpcport={bitcoin.port}", "--bitcoin-rpcuser=rpc"),
            "--bitcoin-rpcpassword=rpc",
            *([f"--important-plugin={support.PLUGIN}"] if backup else []),
            *options,
        ]
        # The plugin's first line finds the python that has the packages.
        path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            command,
            env=dict(os.environ, PATH=path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + READY_S
        while not self._answers():
            if self._process.poll() is not None:
                raise Refusal(self._process.returncode)
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.05)

    def _answers(self) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            return bool(self.rpc("getinfo")["id"])
        return False

    def rpc(self, *arguments: str) -> Any:
        """What ``lightning-cli`` answers."""
        command = ["lightning-cli", f"--lightning-dir={self.base}", "--network=regtest"]
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout

    def act(self, count: int = 5) -> None:
        """Make the node write its database in several ways."""
        for _ in range(count):
            self.rpc("newaddr")
            self.rpc("invoice", "1000", f"label {time.time_ns()}", "text with 'quotes' -- é")
            self.rpc("datastore", f'["act", "{time.time_ns()}"]', "x" * 5000)

    def stop(self) -> None:
        """``lightning-cli stop``; returns when the process has ended, and well."""
        assert self._process is not None
        self.rpc("stop")
        assert self._process.wait(timeout=READY_S) == 0, self.log.read_text()[-5000:]

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def kill_plugin(self) -> None:
        """SIGKILL to the plugin."""
        assert self._process is not None
        with open(f"/proc/{self._process.pid}/task/{self._process.pid}/children") as children:
            pids = [int(pid) for pid in children.read().split()]
        (plugin,) = (
            pid for pid in pids if b"backup.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(plugin, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until it has ended by itself."""
        assert self._process is not None
        self._process.wait(timeout=READY_S)

    def end(self) -> None:
        """Leave no process behind, whatever a test did."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def logged(self, text: str) -> int:
        """How many lines of the log contain ``text``."""
        return sum(text in line for line in self.log.read_text().splitlines())


@pytest.fixture
def lightningd(tmp_path: Path, bitcoind: Bitcoind) -> Iterator[Lightningd]:
    found = Lightningd(tmp_path / "lightning", bitcoind)
    yield found
    found.end()


@pytest.fixture(params=["file", "socket"])
def destination(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    """URL of a destination, each kind in turn. No backup is there yet."""
    if request.param == "file":
        yield url
        return
    run_cli("init", url, cwd=os.path.dirname(url.removeprefix("file://")))
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen([sys.executable, support.CLI, "server", url, address])
    deadline = time.monotonic() + READY_S
    while "version" not in status(f"socket:{address}"):
        assert time.monotonic() < deadline
    yield f"socket:{address}"
    server.terminate()
    assert server.wait(timeout=READY_S) == 0


@pytest.fixture
def node(lightningd: Lightningd, destination: str) -> Lightningd:
    """A fresh node with an empty backup, not started yet."""
    run_cli("init", "--lightning-dir", lightningd.directory, destination)
    return lightningd


def status(url: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_cli("status", "--json", url, check=None).stdout)
    return found


def assert_same(node: Lightningd, url: str, target: Path) -> None:
    """The stopped node's database and the restored one are identical, at one version."""
    run_cli("restore", url, target)
    version = database.version_of(str(node.database))
    assert version == status(url)["version"] == database.version_of(str(target)) > 0
    assert database.compare(str(node.database), str(target)) == []


# A life with the backup


def test_a_fresh_node_and_five_restarts(node: Lightningd, destination: str, tmp_path: Path) -> None:
    seen = []
    for number in range(6):
        node.start()
        node.act()
        node.stop()
        seen.append(status(destination)["version"])
        assert_same(node, destination, tmp_path / f"restored-{number}")
    assert seen == sorted(set(seen))
    assert node.logged("Versions match up") == 6
    assert node.logged("rewinding") == 0
    assert node.logged("**BROKEN** plugin-backup.py") == 0


def test_a_stop_in_the_middle_of_activity_leaves_no_gap(
    node: Lightningd, destination: str, tmp_path: Path
) -> None:
    late = tmp_path / "late.py"
    late.write_text(LATE_PLUGIN)
    late.chmod(0o755)
    for number in range(3):
        node.start(f"--plugin={late}")
        stored = node.rpc("listdatastore", '["late"]')["datastore"]
        assert len(stored) == (LATE_WRITES if number else 0), "no late writes: it shows nothing"
        for entry in stored:
            node.rpc("deldatastore", json.dumps(entry["key"]))
        node.act(1)
        node.stop()
        assert_same(node, destination, tmp_path / f"restored-{number}")
    assert node.logged("Versions match up") == 3


def test_sigkill_and_start_again(node: Lightningd, destination: str, tmp_path: Path) -> None:
    for number in range(4):
        node.start()
        worker = threading.Thread(target=act_until_it_dies, args=(node,))
        worker.start()
        wait_for_versions(destination, status(destination)["version"] + 3 + number)
        node.kill()
        worker.join()
        version = database.version_of(str(node.database))
        assert status(destination)["version"] - version in (0, 1)
    node.start()
    assert node.logged("Versions match up") + node.logged("rewinding non-committed") == 5
    node.stop()
    assert_same(node, destination, tmp_path / "restored.sqlite3")


def act_until_it_dies(node: Lightningd) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):
        while True:
            node.act(1)


def wait_for_versions(url: str, version: int) -> None:
    deadline = time.monotonic() + READY_S
    while status(url)["version"] < version:
        assert time.monotonic() < deadline


def test_restored_onto_a_new_machine(
    node: Lightningd, destination: str, bitcoind: Bitcoind, tmp_path: Path
) -> None:
    node.start()
    node.act()
    identity = node.rpc("getinfo")["id"]
    stored = node.rpc("listdatastore", '["act"]')
    node.stop()
    fresh = Lightningd(tmp_path / "new-machine" / "lightning", bitcoind)
    shutil.copy(node.directory / "hsm_secret", fresh.directory)
    out = run_cli("restore", destination, fresh.directory).stdout
    assert "attach" in out
    run_cli("attach", "--lightning-dir", fresh.directory, destination)
    try:
        fresh.start()
        assert fresh.rpc("getinfo")["id"] == identity
        assert fresh.rpc("listdatastore", '["act"]') == stored
        fresh.act()
        fresh.stop()
    finally:
        fresh.end()
    assert fresh.logged("Versions match up") == 1
    assert_same(fresh, destination, tmp_path / "restored.sqlite3")


@pytest.mark.parametrize("destination", ["socket"], indirect=True)
def test_a_standby_takes_the_place_of_a_node_that_runs(
    node: Lightningd, destination: str, bitcoind: Bitcoind, tmp_path: Path
) -> None:
    """With a channel; then the old node halts, and halts again when it is started by mistake."""
    peer = Lightningd(tmp_path / "peer" / "lightning", bitcoind)
    fresh = Lightningd(tmp_path / "new-machine" / "lightning", bitcoind)
    standby = None
    try:
        peer.start("--dev-no-reconnect", backup=False, listen=True)
        node.start(listen=True)
        open_channels(bitcoind, node, [peer])
        ((channel, _),) = states(node)
        shutil.copy(node.directory / "hsm_secret", fresh.directory)
        words = ["standby", "--lightning-dir", str(fresh.directory), destination]
        standby = subprocess.Popen([sys.executable, support.CLI, *words])
        worker = threading.Thread(target=act_until_it_dies, args=(node,))
        worker.start()
        wait_for_versions(destination, status(destination)["version"] + 5)
        run_cli("promote", "--lightning-dir", fresh.directory)
        worker.join()
        node.wait()
        assert standby.wait(timeout=READY_S) == 0
        assert node.logged("took it over at")
        fresh.start(listen=True)
        assert fresh.rpc("getinfo")["id"] == peer.rpc("listpeerchannels")["channels"][0]["peer_id"]
        connect(fresh, peer)
        wait_until(lambda: states(fresh) == [(channel, "CHANNELD_NORMAL")])
        pay(fresh, peer)
        with pytest.raises(Refusal):
            node.start(listen=True)
        assert node.logged("**BROKEN** plugin-backup.py") >= 2
        pay(fresh, peer)
        fresh.stop()
        assert_same(fresh, destination, tmp_path / "restored.sqlite3")
    finally:
        for running in node, fresh, peer:
            running.end()
        if standby is not None:
            standby.kill()


def connect(node: Lightningd, peer: Lightningd) -> None:
    node.rpc("connect", peer.rpc("getinfo")["id"], "127.0.0.1", str(peer.port))


def states(node: Lightningd) -> list[tuple[str, str]]:
    """short_channel_id and state of each channel."""
    channels = node.rpc("listpeerchannels")["channels"]
    return [(each.get("short_channel_id", ""), each["state"]) for each in channels]


def pay(node: Lightningd, peer: Lightningd) -> None:
    bolt11 = peer.rpc("invoice", "100000", f"label {time.time_ns()}", "paid")["bolt11"]
    assert node.rpc("--notifications=none", "pay", bolt11)["status"] == "complete"


def test_compaction_and_status_by_lightning_cli(
    node: Lightningd, destination: str, tmp_path: Path
) -> None:
    node.start()
    node.act()
    found = node.rpc("backup-status")
    assert found["version"] > 0
    assert found["changes_this_session"] > 0
    result = node.rpc("backup-compact")
    assert result["after"]["version_count"] < result["before"]["version_count"]
    node.act()
    node.stop()
    assert_same(node, destination, tmp_path / "restored.sqlite3")


def test_init_on_an_existing_node(lightningd: Lightningd, destination: str, tmp_path: Path) -> None:
    lightningd.start(backup=False)
    lightningd.act()
    lightningd.stop()
    out = run_cli("init", "--lightning-dir", lightningd.directory, destination).stdout
    assert "Found an existing database" in out
    assert_same(lightningd, destination, tmp_path / "snapshot")
    lightningd.start()
    lightningd.act()
    lightningd.stop()
    assert lightningd.logged("Versions match up") == 1
    assert_same(lightningd, destination, tmp_path / "restored.sqlite3")


def test_a_run_without_the_plugin_heals(node: Lightningd, destination: str, tmp_path: Path) -> None:
    node.start()
    node.stop()
    node.start(backup=False)
    node.act()
    node.stop()
    version = database.version_of(str(node.database))
    support.change_lock(node.directory, heal="off")
    with pytest.raises(Refusal):
        node.start()
    assert node.logged("**BROKEN** plugin-backup.py: Backup is out of date") == 1
    assert database.version_of(str(node.database)) == version, "lightningd committed all the same"
    support.change_lock(node.directory, heal="on")
    node.start()
    assert node.logged("plugin-backup.py: Healed: ") == 1
    node.act()
    node.stop()
    assert_same(node, destination, tmp_path / "restored.sqlite3")


def kill_the_plugin(node: Lightningd, destination: str, kills: int) -> None:
    """Kill the plugin under traffic, again and again: each start works without a command."""
    for number in range(kills):
        node.start()
        worker = threading.Thread(target=act_until_it_dies, args=(node,))
        worker.start()
        wait_for_versions(destination, status(destination)["version"] + 2 + number % 3)
        node.kill_plugin()
        worker.join()
        node.wait()
    node.start()
    node.stop()


@pytest.mark.parametrize("destination", ["file"], indirect=True)
def test_the_plugin_is_killed_under_traffic(
    node: Lightningd, destination: str, tmp_path: Path
) -> None:
    kill_the_plugin(node, destination, 5)
    assert_same(node, destination, tmp_path / "restored.sqlite3")


def test_several_destinations_and_kills_of_all(lightningd: Lightningd, tmp_path: Path) -> None:
    """Two files and a server, two of which acknowledge; node, plugin and server are killed."""
    places = [tmp_path / name for name in ("one", "two", "served")]
    for place in places:
        place.mkdir()
    files = [f"file://{place}/node.bkp" for place in places]
    run_cli("init", files[2])
    port, node = free_port(), lightningd
    urls = [*files[:2], f"socket:127.0.0.1:{port}?retry_for=0"]
    server = ServerProcess(files[2], port).ready()
    try:
        run_cli("init", "--lightning-dir", node.directory, "--acks", 2, *urls)
        for kill in (node.kill, node.kill_plugin, node.kill):
            node.start()
            worker = threading.Thread(target=act_until_it_dies, args=(node,))
            worker.start()
            wait_for_versions(files[0], status(files[0])["version"] + 3)
            server.kill()
            wait_for_versions(files[0], status(files[0])["version"] + 3)
            server = ServerProcess(files[2], port).ready()
            kill()
            worker.join()
            node.wait()
        node.start()
        node.act(1)
        version = status(files[0])["version"]
        for file in files:
            wait_for_versions(file, version)
        node.stop()
        for number, two in enumerate((urls[:2], urls[1:], [urls[0], urls[2]])):
            target = tmp_path / f"restored-{number}.sqlite3"
            run_cli("restore", *two, target)
            assert database.compare(str(node.database), str(target)) == []
    finally:
        server.kill()


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_the_plugin_is_killed_a_hundred_times(
    node: Lightningd, destination: str, tmp_path: Path
) -> None:
    kill_the_plugin(node, destination, 100)
    print(f"\n{node.logged('plugin-backup.py: Healed: ')} of 100 starts healed")
    assert_same(node, destination, tmp_path / "restored.sqlite3")


@pytest.mark.skipif(shutil.which("lightning-downgrade") is None, reason="no lightning-downgrade")
@pytest.mark.parametrize("destination", ["file"], indirect=True)
def test_a_downgrade_and_the_upgrade_after_it(
    node: Lightningd, destination: str, tmp_path: Path
) -> None:
    node.start()
    node.act(1)
    node.stop()
    before = database.version_of(str(node.database))
    command = ["lightning-downgrade", f"--lightning-dir={node.base}", "--network=regtest"]
    subprocess.run(command, check=True, capture_output=True)
    # With no migration between the two releases it has nothing to do.
    has_written = database.version_of(str(node.database)) > before
    node.start()
    assert node.logged("plugin-backup.py: Healed: ") == has_written
    node.act(1)
    node.stop()
    assert_same(node, destination, tmp_path / "restored.sqlite3")


# What an old state is good for


def test_recoverchannel_takes_what_channels_gives(bitcoind: Bitcoind, tmp_path: Path) -> None:
    """Of a node only a database or a backup is left: its peers close, and it has its money back.

    A peer closes at once where the channel was not used yet. Otherwise Core Lightning 26.06.6 was
    seen to warn only, as the error that follows comes too early for its channeld, until its
    operator closes.
    """
    names = "alice", "again", "bob", "carol"
    nodes = [Lightningd(tmp_path / name / "lightning", bitcoind) for name in names]
    alice, again, *peers = nodes
    backup = f"file://{tmp_path}/alice.bkp"
    run_cli("init", "--lightning-dir", alice.directory, backup)
    try:
        alice.start(listen=True)
        for peer in peers:
            peer.start(backup=False, listen=True)
        open_channels(bitcoind, alice, peers)
        pay_some(alice, peers[1])
        theirs = alice.rpc("staticbackup")["scb"]
        alice.stop()
        for source in (alice.database, backup):
            ours = run_cli("channels", "--static", source)
            assert sorted(ours.stdout.split()) == sorted(theirs)
            assert "never start lightningd on it" in ours.stderr
        channels = json.loads(run_cli("channels", "--json", backup).stdout)["channels"]
        seen = [channels_of(peer)[0] for peer in peers]
        for channel, peer, sees in zip(channels, peers, seen, strict=True):
            info = peer.rpc("getinfo")
            assert channel["peer_id"] == info["id"]
            assert channel["address"] == f"127.0.0.1:{info['binding'][0]['port']}"
            assert channel["short_channel_id"] == sees["short_channel_id"]
            assert channel["funding"] == f"{sees['funding_txid']}:{sees['funding_outnum']}"
            assert channel["our_msat"] + sees["to_us_msat"] == channel["capacity_sat"] * 1000
        shutil.copy(alice.directory / "hsm_secret", again.directory)
        again.start(backup=False, listen=True)
        for scb in ours.stdout.split():
            (stub,) = again.rpc("recoverchannel", f'["{scb}"]')["stubs"]
            assert stub in [sees["channel_id"] for sees in seen]
        wait_until(lambda: is_spent(bitcoind, channels[0]))
        with contextlib.suppress(subprocess.CalledProcessError):  # It may have done so by itself.
            peers[1].rpc("close", seen[1]["channel_id"], "1")
        wait_until(lambda: is_spent(bitcoind, channels[1]))
        bitcoind.mine(1)
        wait_until(lambda: len(again.rpc("listfunds")["outputs"]) == 2)
    finally:
        for node in nodes:
            node.end()


def open_channels(bitcoind: Bitcoind, node: Lightningd, peers: Sequence[Lightningd]) -> None:
    """A channel from ``node`` to each of ``peers``."""
    bitcoind.mine(101)
    for _ in peers:
        address = node.rpc("newaddr")["p2tr"]
        bitcoind.cli("-named", "sendtoaddress", f"address={address}", "amount=0.1", "fee_rate=5")
    bitcoind.mine(1)
    wait_until(lambda: len(node.rpc("listfunds")["outputs"]) == len(peers))
    for peer in peers:
        info = peer.rpc("getinfo")
        node.rpc("connect", info["id"], "127.0.0.1", str(info["binding"][0]["port"]))
        node.rpc("fundchannel", info["id"], "1000000")
    bitcoind.mine(6)
    wait_until(lambda: all(map(is_normal, (node, *peers))))


def pay_some(node: Lightningd, peer: Lightningd) -> None:
    """Payments, so that both have a share of the channel, and it has revoked secrets."""
    for number in range(3):
        node.rpc("pay", peer.rpc("invoice", "10000000", f"pay {number}", "")["bolt11"])
    wait_until(lambda: not any(each["htlcs"] for each in channels_of(node)))


def channels_of(node: Lightningd) -> Any:
    return node.rpc("listpeerchannels")["channels"]


def is_spent(bitcoind: Bitcoind, channel: dict[str, Any]) -> bool:
    """Also if it is in the mempool only."""
    return not bitcoind.cli("gettxout", *channel["funding"].split(":"))


def is_normal(node: Lightningd) -> bool:
    return all(channel["state"] == "CHANNELD_NORMAL" for channel in channels_of(node))


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + READY_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# What must not be


def test_no_start_without_backup_lock(lightningd: Lightningd) -> None:
    with pytest.raises(Refusal):
        lightningd.start()
    line = "**BROKEN** plugin-backup.py: Could not find backup.lock in the lightning-dir"
    assert lightningd.logged(line) == 1
    assert database.version_of(str(lightningd.database)) == 0


def test_no_start_on_lost_state(node: Lightningd, tmp_path: Path) -> None:
    node.start()
    node.stop()
    shutil.copy(node.database, tmp_path / "old")
    node.start()
    node.act()
    node.stop()
    shutil.copy(tmp_path / "old", node.database)
    with pytest.raises(Refusal):
        node.start()
    assert node.logged("**BROKEN** plugin-backup.py: lightningd seems to have lost some state") == 1
    assert (tmp_path / "old").read_bytes() == node.database.read_bytes()


def test_commands_beside_a_running_node(node: Lightningd, destination: str, tmp_path: Path) -> None:
    node.start()
    node.act()
    for command in (["resync", "--yes"], ["attach", destination], ["init", destination]):
        done = run_cli(*command, "--lightning-dir", node.directory, check=1)
        assert "lightningd is running" in done.stderr
    stop = done.stderr.partition("Run `")[2].partition("`")[0]
    assert stop == f"lightning-cli --lightning-dir={node.base} --network=regtest stop"
    assert status(destination)["damage"] is None
    run_cli("restore", destination, tmp_path / "beside.sqlite3")
    assert database.check(str(tmp_path / "beside.sqlite3")) == []
    node.act()
    node.stop()
    assert_same(node, destination, tmp_path / "restored.sqlite3")


def test_a_second_start_and_help_do_no_harm(
    node: Lightningd, destination: str, tmp_path: Path
) -> None:
    node.start()
    node.act(1)
    options = ["--network=regtest", f"--lightning-dir={node.base}"]
    plugin = f"--important-plugin={support.PLUGIN}"
    for extra in ["--help"], []:
        command = ["lightningd", *options, plugin, *extra]
        done = subprocess.run(command, capture_output=True, timeout=READY_S)
        assert (done.returncode == 0) == bool(extra), done.stdout + done.stderr
    node.act(1)
    node.stop()
    assert_same(node, destination, tmp_path / "restored.sqlite3")
