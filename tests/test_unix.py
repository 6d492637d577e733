"""Unix sockets between node and server: who may come in, and who may be there."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import unixsocket
from backend import Change, bump
from errors import BackupError, ConfigError
from protocol import Nack, NackCode, encode_nack
from remote.address import connect, parse_socket_url
from remote.link import Link, Refused, Unreachable
from socketbackend import SocketBackend
from tests import peers, support
from tests.peers import ACK, CHANGE, METADATA, NACK, OldClient, ServerProcess, pack_change
from tests.test_server import eventually
from tests.whole.test_remote import check_way

NOBODY = "nobody"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as two users: needs root")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Act as another user: the kernel notes who connects or listens when he does so."""
    found = pwd.getpwnam(NOBODY)
    groups = os.getgroups()
    os.setgroups([found.pw_gid])
    os.seteuid(found.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setgroups(groups)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for sockets, with a short path, for its owner alone."""
    with tempfile.TemporaryDirectory(prefix="unix-") as directory:
        yield Path(directory)


@pytest.fixture
def sock(place: Path) -> Path:
    """Path of a socket that is not there yet."""
    return place / "server.sock"


def served(url: str, path: Path, *options: str) -> ServerProcess:
    """A server of the backup at ``url`` at the unix socket ``path``."""
    return ServerProcess(url, address=f"unix:{path}", options=options)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def write(url: str, version: int) -> None:
    """A session with one change."""
    backend = SocketBackend(url)
    with contextlib.closing(backend):
        backend.open()
        backend.add_change(Change(version, None, [bump(version)]))


# A life


def test_a_node_and_its_backup(url: str, sock: Path, node_dir: Path, tmp_path: Path) -> None:
    support.make_backup(url)
    with served(url, sock) as server:
        assert server.logged(f"on unix:{sock}")
        check_way(f"{server.url}?retry_for=60", node_dir, tmp_path)
        support.run_cli("verify", server.url)
        support.run_cli("compact", server.url)
        server.wait_for(f"user {unixsocket.name_of(os.geteuid())}, process")
        assert server.stop() == 0
    assert not sock.exists()


def test_the_server_comes_back_behind_its_socket(url: str, sock: Path, node_dir: Path) -> None:
    calls = support.first_changes(3)
    support.make_backup(url)
    server = served(url, sock).ready()
    support.run_cli("init", "--lightning-dir", node_dir, server.url)
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        plugin.write(*calls[0])
        server.kill()
        assert sock.exists()  # Of nobody any more: replaced.
        with served(url, sock):
            plugin.write(*calls[1])
        assert not sock.exists()
        with served(url, sock):
            plugin.write(*calls[2])
        assert plugin.errors() == []
    assert support.stored(url) == calls


# The socket and its directory


def test_it_is_never_wider_open_than_asked_for(sock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, chown = list[int](), os.chown

    def noting(path: str, *what: int, **how: bool) -> None:
        modes.append(mode_of(sock))
        chown(path, *what, **how)

    monkeypatch.setattr(os, "chown", noting)
    group = grp.getgrgid(os.getegid()).gr_name
    before = os.umask(0)
    try:
        with unixsocket.listen(str(sock), None):
            assert mode_of(sock) == 0o600
        with unixsocket.listen(str(sock), group):
            assert (mode_of(sock), sock.lstat().st_gid) == (0o660, os.getegid())
    finally:
        os.umask(before)
    assert modes == [0o600]
    with pytest.raises(ConfigError, match="no group 'no such'"):
        unixsocket.listen(str(sock), "no such")
    assert not sock.exists()


@pytest.mark.parametrize("mode", [0o755, 0o701, 0o702, 0o770, 0o1777])
def test_directory_that_others_can_enter_or_write_to(mode: int, place: Path, sock: Path) -> None:
    place.chmod(mode)
    with pytest.raises(ConfigError, match="Others can enter the directory") as caught:
        unixsocket.listen(str(sock), None)
    assert f"`chmod g-w,o-wx {place}`" in caught.value.next_step
    assert os.listdir(place) == []
    place.chmod(0o750)
    unixsocket.listen(str(sock), None).close()


@needs_root
def test_directory_of_another_user(place: Path, sock: Path) -> None:
    os.chown(place, pwd.getpwnam(NOBODY).pw_uid, -1)
    with pytest.raises(ConfigError, match="belongs to user nobody"):
        unixsocket.listen(str(sock), None)


def test_what_is_there_already(url: str, tmp_path: Path, sock: Path) -> None:
    support.make_backup(url)
    other = f"file://{tmp_path}/disk2/other.bkp"
    support.make_backup(other)
    command = ("server", other, f"unix:{sock}")
    with served(url, sock) as server:
        done = support.run_cli(*command, check=1)
        assert f"Something listens at {sock} already." in done.stderr
        write(server.url, 1)
        sock.unlink()
        sock.write_text("not ours")
    assert sock.read_text() == "not ours"
    done = support.run_cli(*command, check=1)
    assert f"{sock} is there, and no socket." in done.stderr
    assert sock.read_text() == "not ours"


def test_all_or_no_addresses(url: str, place: Path, sock: Path) -> None:
    support.make_backup(url)
    options = ("--read-only", f"unix:{place}/missing/s")
    done = support.run_cli("server", *options, url, f"unix:{sock}", check=1)
    assert f"The directory {place}/missing does not exist." in done.stderr
    assert not sock.exists()
    for more in (("--group", "root"), ("--allow-user", "root")):
        done = support.run_cli("server", *more, url, "127.0.0.1:1", check=1)
        assert "groups and users are for unix sockets" in done.stderr
    done = support.run_cli("server", "--allow-user", "no such", url, f"unix:{sock}", check=1)
    assert "There is no user 'no such'" in done.stderr
    done = support.run_cli("server", "--read-only-user", "root", url, f"unix:{sock}", check=2)
    assert "need --read-only ADDRESS" in done.stderr


# Who comes in


@needs_root
def test_a_stranger_is_turned_away(url: str, place: Path, sock: Path) -> None:
    support.make_backup(url)
    group = grp.getgrgid(pwd.getpwnam(NOBODY).pw_gid).gr_name
    os.chown(place, 0, grp.getgrnam(group).gr_gid)
    place.chmod(0o750)
    with served(url, sock, "--group", group) as server:
        for _ in range(2):
            with as_nobody(), pytest.raises(Refused, match="user nobody is none of") as caught:
                SocketBackend(server.url).status()
            assert "--allow-user" in caught.value.next_step
        write(server.url, 1)
        server.stop()
        assert sum("turned away" in line for line in server.lines) == 1
    with served(url, sock, "--group", group, "--allow-user", NOBODY) as server:
        with as_nobody():
            assert SocketBackend(f"{server.url}?peer=root").status().version == 1
        write(server.url, 2)
    not_his = pytest.raises(Unreachable, match="user nobody may not use that socket")
    with served(url, sock) as server, as_nobody(), not_his:
        SocketBackend(server.url).status()


def test_who_is_turned_away_before_he_said_anything_still_reads_why(sock: Path) -> None:
    with unixsocket.listen(str(sock), None) as listener:
        link = Link(parse_socket_url(f"socket:unix:{sock}"))
        connection, _ = listener.accept()
        connection.send(encode_nack(Nack(None, NackCode.NOT_ALLOWED, "not you")))
        connection.close()
        with pytest.raises(Refused, match="not you"):
            link.metadata()
        link.close()


class Stranger:
    """Listens where a server should, as another user, and notes what comes."""

    def __init__(self, path: Path) -> None:
        self.came = b""
        with as_nobody():
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    while data := connection.recv(1 << 16):
                        self.came += data

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@needs_root
def test_a_stranger_in_place_of_the_server_gets_nothing(
    url: str, place: Path, sock: Path, node_dir: Path
) -> None:
    support.make_backup(url)
    calls = support.first_changes(3)
    with served(url, sock) as server:
        support.run_cli("init", "--lightning-dir", node_dir, f"{server.url}?retry_for=600")
        plugin = support.PluginProcess(node_dir)
        plugin.manifest()
        plugin.write(*calls[0])
    place.chmod(0o777)
    with plugin:
        with Stranger(sock) as stranger:
            with pytest.raises(Unreachable, match="user nobody, process") as e:
                SocketBackend(server.url).status()
            assert "who is not root" in e.value.problem and "peer=nobody" in e.value.next_step
            number = plugin.send("db_write", {"data_version": 2, "writes": calls[1][1]})
            eventually(lambda: plugin.logged("user nobody"))
            assert not plugin.answered(number)
        assert stranger.came == b""
        sock.unlink()
        place.chmod(0o700)
        with served(url, sock):
            plugin.answer(number)
            plugin.write(*calls[2])
    assert support.stored(url) == calls


@needs_root
def test_a_stranger_who_stays_is_named_in_the_refusal(place: Path, sock: Path) -> None:
    place.chmod(0o777)
    backend = SocketBackend(f"socket:unix:{sock}?retry_for=0")
    with Stranger(sock) as stranger:
        with pytest.raises(Unreachable, match="user nobody"):
            backend.open()
        connect(parse_socket_url(f"socket:unix:{sock}?peer=nobody")).close()
    assert stranger.came == b""


def test_peer_that_is_no_user(sock: Path) -> None:
    with pytest.raises(ConfigError, match="There is no user 'no such'"):
        SocketBackend(f"socket:unix:{sock}?peer=no%20such").status()


# For reading only


@pytest.fixture(params=["unix", "tcp"])
def reader(request: pytest.FixtureRequest, place: Path) -> str:
    """An address for readers."""
    return f"unix:{place}/read" if request.param == "unix" else f"127.0.0.1:{peers.free_port()}"


def test_readers_read_and_never_write(
    url: str, sock: Path, reader: str, node_dir: Path, tmp_path: Path
) -> None:
    support.make_backup(url, support.first_changes(2))
    read_url = f"socket:{reader}"
    with served(url, sock, "--read-only", reader) as server:
        support.run_cli("restore", read_url, tmp_path / "restored.sqlite3")
        support.run_cli("verify", read_url, cwd=tmp_path)
        assert "version:        2\n" in support.run_cli("status", read_url).stdout
        before = peers.digest(Path(url.removeprefix("file://")))
        writer = SocketBackend(read_url)
        writer.open()
        for act in (
            lambda: writer.add_change(Change(3, None, [bump(3)])),
            lambda: SocketBackend(read_url).open(bytes(16)),
            lambda: SocketBackend(read_url).compact(),
            lambda: take_over(read_url),
            lambda: rewind(read_url),
        ):
            with pytest.raises(Refused, match="for reading only") as caught:
                act()
            assert "the server's other address" in caught.value.next_step
        restored = tmp_path / "restored.sqlite3"
        restored.rename(node_dir / "lightningd.sqlite3")
        done = support.run_cli("attach", "--lightning-dir", node_dir, read_url, check=1)
        assert "for reading only" in done.stderr
        assert not (node_dir / "backup.lock").exists()
        assert peers.digest(Path(url.removeprefix("file://"))) == before
        assert not server.logged("takes over as writer")
        support.run_cli("attach", "--lightning-dir", node_dir, server.url)
        lock = node_dir / "backup.lock"
        lock.write_text(lock.read_text().replace(server.url, read_url))
        done = support.run_cli("resync", "--yes", "--lightning-dir", node_dir, check=1)
        assert "for reading only" in done.stderr
        assert SocketBackend(server.url).status().version == 2


def take_over(url: str) -> None:
    backend = SocketBackend(url)
    with contextlib.closing(backend):
        backend.open()
        backend.take_over(b"\1" * 16)


def rewind(url: str) -> None:
    backend = SocketBackend(url)
    with contextlib.closing(backend):
        backend.open()
        backend.rewind()


def test_readers_of_protocol_1(url: str) -> None:
    support.make_backup(url, support.first_changes(2))
    port = peers.free_port()
    with ServerProcess(url, options=("--read-only", f"127.0.0.1:{port}")) as server:
        with OldClient("127.0.0.1", port) as client:
            assert client.metadata().version == 2
            assert client.change(3, [bump(3)])[0] == NACK
            assert client.rewind(1)[0] == NACK
            assert client.snapshot(9, bytes(100_000))[0] == NACK
            assert client.ask(peers.COMPACT)[0] == NACK
            assert [version for _, version, _ in client.restore()] == [1, 2]
        with server.client() as client:
            assert client.ask(CHANGE, pack_change(3, [bump(3)]))[0] == ACK
            assert client.ask(peers.REQ_METADATA)[0] == METADATA


@needs_root
def test_readers_have_a_group_and_users_of_their_own(url: str, place: Path, sock: Path) -> None:
    support.make_backup(url, support.first_changes(2))
    group = grp.getgrgid(pwd.getpwnam(NOBODY).pw_gid).gr_name
    os.chown(place, 0, grp.getgrnam(group).gr_gid)
    place.chmod(0o750)
    read = place / "read"
    options = ("--read-only", f"unix:{read}", "--read-only-group", group)
    with served(url, sock, *options, "--read-only-user", NOBODY) as server:
        assert (mode_of(sock), mode_of(read)) == (0o600, 0o660)
        with as_nobody():
            assert SocketBackend(f"socket:unix:{read}").status().version == 2
            with pytest.raises(BackupError, match="may not use that socket"):
                SocketBackend(server.url).status()
