"""Plugin, server and what is between them: restarts, proxies, forwards, cuts and kills."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import Change, Session
from remote import patience
from remote.link import Diverged
from socketbackend import SocketBackend
from tests import peers, support
from tests.cutproxy import DOWN, UP, CutProxy
from tests.peers import ServerProcess
from tests.test_server import eventually
from wallet.database import compare, version_of

pytestmark = pytest.mark.usefixtures("unmeasured")

PROTOCOL_1 = "import protocol; protocol.NEWEST = 1"
PATCHES = {"protocol 1": PROTOCOL_1, "protocol 2": ""}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.1)


@contextlib.contextmanager
def node(url: str) -> Iterator[Session]:
    """A session of a node whose backup is at ``url``."""
    backend = SocketBackend(url)
    backend.open()
    yield Session(backend, "/nowhere")
    backend.close()


def write(session: Session, *calls: support.Call) -> None:
    """What the plugin does with ``calls``."""
    for version, statements in calls:
        session.write(Change(version, None, statements))


def stored(url: str) -> list[support.Call]:
    """The changes in the backup file that a restore would apply."""
    return support.stored(url)


# Recorded sessions


@pytest.mark.parametrize(("name", "limit"), [("payer", None), ("router", None), ("crash", 20)])
def test_recorded_sessions_with_the_server_restarted_in_the_middle(
    name: str, limit: int | None, tmp_path: Path, node_dir: Path, url: str
) -> None:
    sessions = support.trace_sessions(name)[:limit]
    middle = sum(map(len, sessions)) // 2
    support.run_cli("init", url, cwd=tmp_path)
    server = ServerProcess(url).ready()
    support.run_cli("init", "--lightning-dir", node_dir, server.url)
    count = 0
    for calls in sessions:
        with support.PluginProcess(node_dir) as plugin:
            plugin.manifest()
            for call in calls:
                plugin.write(*call)
                count += 1
                if count in (middle // 2, middle):
                    # Once as an operator does it, once as a power cut does.
                    assert count == middle or server.stop() == 0
                    server.kill()
                    server = ServerProcess(url, server.port).ready()
            plugin.init(node_dir)
            assert plugin.close() == 0
            assert plugin.errors() == []
    restored = tmp_path / "restored.sqlite3"
    support.run_cli("restore", server.url, restored)
    server.kill()
    if limit is None:
        expected = support.trace_database(name, tmp_path)
    else:
        expected = replayed(tmp_path, sessions)
    assert compare(str(expected), str(restored)) == []
    assert version_of(str(restored)) == version_of(str(expected)) > 0


def replayed(tmp_path: Path, sessions: list[list[support.Call]]) -> Path:
    """What a backup in a local file makes of ``sessions``."""
    url, path = f"file://{tmp_path}/local.bkp", tmp_path / "local.sqlite3"
    support.make_backup(url)
    for calls in sessions:
        support.add_session(url, calls)
    support.run_cli("restore", url, path)
    return path


# Ways to a server


def check_way(url: str, node_dir: Path, tmp_path: Path) -> None:
    """A node's life with a backup at ``url``."""
    calls = support.first_changes(30)
    support.run_cli("init", "--lightning-dir", node_dir, url)
    for part in (calls[:15], calls[15:]):
        with support.PluginProcess(node_dir) as plugin:
            plugin.manifest()
            for call in part:
                plugin.write(*call)
            assert plugin.errors() == []
    assert "version:        30\n" in support.run_cli("status", url).stdout
    support.run_cli("restore", url, tmp_path / "restored.sqlite3")
    support.apply_calls(tmp_path / "node.sqlite3", calls)
    assert compare(str(tmp_path / "node.sqlite3"), str(tmp_path / "restored.sqlite3")) == []


def test_over_ipv6(url: str, node_dir: Path, tmp_path: Path) -> None:
    try:
        peers.free_port("::1")
    except OSError as error:
        pytest.skip(f"this system has no ::1: {error}")
    support.make_backup(url)
    with ServerProcess(url, host="::1") as server:
        check_way(server.url, node_dir, tmp_path)


def needs(*programs: str) -> list[str]:
    """The paths of ``programs``; skips the test where one is missing."""
    found = []
    for program in programs:
        path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            pytest.skip(f"{program} is not installed")
        found.append(path)
    return found


def listens(port: int) -> bool:
    """Whether something listens at ``port``."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a program that listens at ``port``."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        eventually(lambda: listens(port) or process.poll() is not None)
        if process.poll() is not None:
            pytest.skip(f"{command[0]} does not run here: {log.read_text()[-500:]}")
        yield
    finally:
        process.terminate()
        process.wait(support.ANSWER_S)


NAME = "backup-server.invalid"
"""A name that nobody resolves, but the proxy in its own mount namespace."""


def test_through_socks5_with_a_name_that_only_the_proxy_resolves(
    url: str, node_dir: Path, tmp_path: Path
) -> None:
    unshare, sh, microsocks = needs("unshare", "sh", "microsocks")
    with pytest.raises(OSError, match=r".*"):
        socket.getaddrinfo(NAME, 1)
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {NAME}\n")
    port = peers.free_port()
    mount = f"mount --bind {hosts} /etc/hosts && exec {microsocks} -i 127.0.0.1 -p {port}"
    own_namespace = [unshare, "-m"] if os.geteuid() == 0 else [unshare, "-rm"]
    support.make_backup(url)
    with (
        ServerProcess(url) as server,
        running([*own_namespace, sh, "-c", mount], port, tmp_path / "log"),
    ):
        way = f"socket:{NAME}:{server.port}?proxy=socks5:127.0.0.1:{port}"
        check_way(way, node_dir, tmp_path)
        # What the proxy cannot reach, and no proxy at all, is unreachable, not empty.
        for other in (
            f"socket:{NAME}:{peers.free_port()}?proxy=socks5:127.0.0.1:{port}",
            f"socket:other.invalid:{server.port}?proxy=socks5:127.0.0.1:{port}",
            f"socket:{NAME}:{server.port}?proxy=socks5:127.0.0.1:{peers.free_port()}",
            f"socket:{NAME}:{server.port}",
        ):
            assert "cannot be reached" in support.run_cli("status", other, check=1).stderr


def test_through_socks5_with_a_password(url: str, node_dir: Path, tmp_path: Path) -> None:
    (microsocks,) = needs("microsocks")
    port, auth = peers.free_port(), tmp_path / "auth"
    command = [microsocks, "-i", "127.0.0.1", "-p", str(port), "-u", "node", "-P", "se:cret"]
    support.make_backup(url)
    with ServerProcess(url) as server, running(command, port, tmp_path / "log"):
        way = f"{server.url}?proxy=socks5://127.0.0.1:{port}"
        assert "asks for a user" in support.run_cli("status", way, check=1).stderr
        way += f"&proxy_auth={auth}"
        for text, mode, problem in (
            ("node:se:cret\n", 0o644, "Others can read"),
            ("node:wrong\n", 0o600, "does not take the user and password"),
        ):
            auth.write_text(text)
            auth.chmod(mode)
            done = support.run_cli("status", way, check=1)
            assert problem in done.stderr and "cret" not in done.stderr
        auth.write_text("node:se:cret\n")
        check_way(way, node_dir, tmp_path)
        other = way.replace(f":{server.port}?", f":{peers.free_port()}?")
        assert "nobody listens on that port" in support.run_cli("status", other, check=1).stderr
    # A proxy that has gone, and a server in its place.
    assert f":{port} is not there" in support.run_cli("status", way, check=1).stderr
    assert "cret" not in (node_dir / "backup.lock").read_text()


def ssh_keys(tmp_path: Path, keygen: str) -> None:
    """Make a host's and a user's key, and allow the one to the other."""
    for name in ("host", "user"):
        command = [keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")


def test_through_an_ssh_forward(url: str, node_dir: Path, tmp_path: Path) -> None:
    sshd, ssh, keygen = needs("sshd", "ssh", "ssh-keygen")
    ssh_keys(tmp_path, keygen)
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)  # Where sshd separates privileges.
    sshd_port, port = peers.free_port(), peers.free_port()
    config = tmp_path / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{sshd_port}\nHostKey {tmp_path}/host\n"
        f"AuthorizedKeysFile {tmp_path}/authorized\nPidFile none\nUsePAM no\n"
        "StrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    support.make_backup(url)
    with ServerProcess(url) as server:
        forward = [
            *(ssh, "-F", "none", "-N", "-p", str(sshd_port), "-i", f"{tmp_path}/user"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "ExitOnForwardFailure=yes", "-o", "BatchMode=yes"),
            *("-L", f"127.0.0.1:{port}:{server.address}", f"{getpass.getuser()}@127.0.0.1"),
        ]
        with (
            running([sshd, "-D", "-e", "-f", str(config)], sshd_port, tmp_path / "sshd.log"),
            running(forward, port, tmp_path / "ssh.log"),
        ):
            check_way(f"socket:127.0.0.1:{port}", node_dir, tmp_path)
            server.stop()
            # The forward still takes connections, and closes them.
            done = support.run_cli("status", f"socket:127.0.0.1:{port}", check=1)
            assert "cannot be reached" in done.stderr


# Cuts at every byte


def sizes(proxy: CutProxy, start: int) -> tuple[int, int]:
    """Bytes that went through each way since there were ``start`` moves."""
    moves = proxy.moves[start:]
    up, down = (sum(m.size for m in moves if m.direction == d) for d in (UP, DOWN))
    return up, down


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_cut_at_every_byte_of_a_change(patch: str, url: str) -> None:
    support.make_backup(url)
    calls = support.first_changes(2)
    with (
        ServerProcess(url, patch=patch) as server,
        CutProxy((server.host, server.port)) as proxy,
        node(f"socket:127.0.0.1:{proxy.port}") as session,
    ):
        write(session, calls[0])
        start = len(proxy.moves)
        write(session, calls[1])
        measured = sizes(proxy, start)
        cuts = [(way, at) for way in (UP, DOWN) for at in range(measured[way] + 1)]
        for way, at in cuts:
            version = len(calls) + 1
            calls.append(support.change(version, f"INSERT INTO items VALUES ({version}, 'x')"))
            proxy.cut_after(way, at)
            write(session, calls[-1])
            proxy.cut_no_more()
        assert proxy.cuts > len(cuts) * 3 // 4  # A change without its window is longer.
    assert stored(url) == calls


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_cut_at_every_byte_of_a_rewind(patch: str, url: str) -> None:
    support.make_backup(url, support.first_changes(1))
    expected = support.first_changes(1)
    with ServerProcess(url, patch=patch) as server, CutProxy((server.host, server.port)) as proxy:
        way_there = f"socket:127.0.0.1:{proxy.port}"
        cuts: list[tuple[int, int]] = [(UP, 1 << 20)]
        while cuts:
            way, at = cuts.pop()
            version = len(expected) + 1
            with node(way_there) as session:
                write(session, support.change(version, "SELECT 'abandoned'"))
            expected.append(support.change(version, "SELECT 'done'"))
            rewind_and_write(way_there, expected[-1], proxy, way, at, patch == PROTOCOL_1)
            if at == 1 << 20:
                start = len(proxy.moves) - 4
                measured = sizes(proxy, start)
                cuts = [(w, n) for w in (UP, DOWN) for n in range(measured[w] + 1)]
        assert proxy.cuts > 50
    assert stored(url) == expected


def rewind_and_write(
    url: str, call: support.Call, proxy: CutProxy, way: int, at: int, may_refuse: bool
) -> None:
    """What a node does that never committed the last change, with one cut."""
    try:
        with node(url) as session:
            proxy.cut_after(way, at)
            write(session, call)
    except Diverged:
        # In protocol 1 a server that forgot the rewind looks the same: the node starts again.
        assert may_refuse
        proxy.cut_no_more()
        with node(url) as session:
            write(session, call)
    proxy.cut_no_more()


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_cut_at_every_byte_of_a_metadata_exchange(patch: str, url: str) -> None:
    calls = support.first_changes(3)
    support.make_backup(url, calls)
    with ServerProcess(url, patch=patch) as server, CutProxy((server.host, server.port)) as proxy:
        way_there = f"socket:127.0.0.1:{proxy.port}"
        first = SocketBackend(way_there)
        first.open()
        first.close()
        measured = sizes(proxy, 0)
        cuts = [(way, at) for way in (UP, DOWN) for at in range(measured[way] + 1)]
        for way, at in cuts:
            backend = SocketBackend(way_there)
            proxy.cut_after(way, at)
            backend.open()
            assert (backend.version, backend.version_count, backend.rewindable) == (3, 3, True)
            backend.close()
            proxy.cut_no_more()
        assert proxy.cuts >= len(cuts) - 2
    assert stored(url) == calls


# SIGKILL of the server


def deadly(flag: Path, patch: str) -> str:
    """A patch: the server kills itself at the point that the file ``flag`` names."""
    return (
        f"{patch}\n"
        "import os, signal\nfrom filelog import appender\n"
        "from serving.connection import Connection\n"
        "def at(point):\n"
        f"    flag = {str(flag)!r}\n"
        "    if os.path.exists(flag) and open(flag).read() == point:\n"
        "        os.unlink(flag)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "def around(owner, name, before, after):\n"
        "    real = getattr(owner, name)\n"
        "    def call(*arguments, **options):\n"
        "        at(before)\n"
        "        real(*arguments, **options)\n"
        "        at(after)\n"
        "    setattr(owner, name, call)\n"
        "around(appender.LogAppender, '_put', 'before write', 'after write')\n"
        "around(Connection, 'answer', 'before ack', 'after ack')"
    )


class Phoenix:
    """A server that is started again whenever it was killed."""

    def __init__(self, url: str, patch: str) -> None:
        self._url, self._patch = url, patch
        self.deaths = 0
        self._server = ServerProcess(url, patch=patch).ready()
        self.url = self._server.url
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._server.process.wait() == -signal.SIGKILL:
            self.deaths += 1
            self._server = ServerProcess(self._url, self._server.port, patch=self._patch)

    def __enter__(self) -> Phoenix:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.process.terminate()
        self._thread.join()


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_server_killed_around_its_write_and_its_ack(patch: str, url: str, tmp_path: Path) -> None:
    flag, off = tmp_path / "flag", ["PRAGMA foreign_keys = OFF;"]
    support.make_backup(url, support.first_changes(1))
    expected = support.first_changes(1)
    points = ["before write", "after write", "before ack", "after ack"]
    with Phoenix(url, deadly(flag, patch)) as server:
        for point in points:
            version = expected[-1][0]
            # In the middle of a session: a change, a PRAGMA, and the change it is for.
            calls = [
                support.change(version + 1, "SELECT 'first'"),
                support.change(version + 2, "SELECT 'second'"),
                (version + 2, off),
                support.change(version + 3, "SELECT 'third'"),
            ]
            with node(server.url) as session:
                write(session, calls[0])
                for call in calls[1:]:
                    flag.write_text(point)
                    write(session, call)
                    eventually(lambda: not flag.exists())
                write(session, support.change(version + 4, "SELECT 'abandoned'"))
            # And a rewind.
            done = support.change(version + 4, "SELECT 'done'")
            with node(server.url) as session:
                flag.write_text(point)
                write(session, done)
                eventually(lambda: not flag.exists())
            expected += [*calls, done]
        eventually(lambda: server.deaths == 4 * len(points))
    assert stored(url) == expected
