"""What a proxy that does not lead to the server tells an operator."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from errors import BackupError, ConfigError, DiskError
from remote import proxy
from remote.address import connect, parse_socket_url
from remote.link import Unreachable
from remote.proxy import NoWay, read_auth
from socketbackend import SocketBackend
from tests import peers, support
from tests.remote.test_address import KNOWN_ONION

Talk = Callable[[socket.socket], None]


@contextlib.contextmanager
def listening(talk: Talk) -> Iterator[str]:
    """Something that answers one connection with ``talk``; its ``host:port``."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(support.ANSWER_S)

        def serve() -> None:
            with contextlib.suppress(OSError):
                peer, _ = server.accept()
                with peer:
                    peer.settimeout(support.ANSWER_S)
                    talk(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def received(peer: socket.socket, size: int) -> bytes:
    """The next ``size`` bytes."""
    data = b""
    while len(data) < size:
        piece = peer.recv(size - len(data))
        if not piece:
            raise ConnectionError("the client closed the connection")
        data += piece
    return data


def replying(code: int, seen: list[bytes]) -> Talk:
    """A SOCKS5 proxy without a password that answers ``code``; ``seen`` gets the name."""

    def talk(peer: socket.socket) -> None:
        assert received(peer, 3) == b"\5\1\0"
        peer.sendall(b"\5\0")
        start = received(peer, 5)
        assert start[:4] == b"\5\1\0\3"
        seen.append(received(peer, start[4]))
        received(peer, 2)
        peer.sendall(bytes([5, code, 0, 1]) + bytes(6))
        peer.recv(1)

    return talk


def failure(url: str) -> BackupError:
    """How ``status`` of ``url`` ends."""
    with pytest.raises(BackupError) as caught:
        SocketBackend(url).status()
    return caught.value


CODES = {
    0x01: ("does not say why", "Tor failed"),
    0x02: ("rules do not allow", "rules do not allow"),
    0x03: ("network", "network"),
    0x04: ("does not find the server", "no such service.* or this node has no key"),
    0x05: ("nobody listens on that port", "service is up, but nobody listens.*HiddenServicePort"),
    0x06: ("too long", "through Tor took too long"),
    0x07: ("no connections for others", "no connections for others"),
    0x08: ("kind of address", "kind of address"),
    0x09: ("a way of its own", "a way of its own"),
    0xF0: ("a way of its own", "no descriptor: .* not up"),
    0xF1: ("a way of its own", "descriptor is not valid"),
    0xF2: ("a way of its own", "none of its introductions"),
    0xF3: ("a way of its own", "does not meet"),
    0xF4: ("a way of its own", "wants a key.* has none.*ClientOnionAuthDir"),
    0xF5: ("a way of its own", "does not take this node's key.*ClientOnionAuthDir"),
    0xF6: ("a way of its own", "no onion name"),
    0xF7: ("a way of its own", "does not answer in time"),
}


@pytest.mark.parametrize("code", CODES)
def test_each_answer_of_a_proxy_is_said_in_words(code: int) -> None:
    seen: list[bytes] = []
    for host, words in zip(("server.invalid", KNOWN_ONION), CODES[code], strict=True):
        with listening(replying(code, seen)) as way:
            error = failure(f"socket:{host}:8700?proxy=socks5://{way}")
        assert isinstance(error, Unreachable)
        assert f"SOCKS 0x{code:02X}" in error.problem and f"proxy {way}" in error.problem
        assert error.next_step
        assert re.search(words, str(error))
    assert seen == [b"server.invalid", KNOWN_ONION.encode()]


def test_all_that_is_known_is_tried() -> None:
    assert set(CODES) - {9} == set(proxy._REPLIES) | set(proxy._OF_AN_ONION)


def test_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    error = failure(f"socket:h:1?proxy=socks5:127.0.0.1:{peers.free_port()}")
    assert "is not there" in error.problem and "refused" in error.problem
    assert "proxy= in the URL" in error.next_step
    assert "the proxy [::1]:1 is not there" in failure("socket:h:1?proxy=socks5:[::1]:1").problem

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = failure("socket:h:1?proxy=socks5:nobody.invalid:9050")
    assert "nobody.invalid:9050 is not there" in error.problem


def closes(peer: socket.socket) -> None:
    peer.recv(3)


def greets(peer: socket.socket) -> None:
    peer.sendall(b"SSH-2.0-x\r\n")
    peer.recv(3)


def stays(peer: socket.socket) -> None:
    received(peer, 4)  # More than comes.


@pytest.mark.parametrize("talk", [closes, greets])
def test_no_proxy_at_all(talk: Talk) -> None:
    with listening(talk) as way:
        error = failure(f"socket:h:1?proxy=socks5:{way}")
    assert "as a SOCKS5 proxy does" in error.problem and "ss -ltnp" in error.next_step


def test_proxy_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "PROXY_TIMEOUT_S", 0.1)
    with listening(stays) as way:
        error = failure(f"socket:h:1?proxy=socks5:{way}")
    assert "no answer within" in error.problem


# Passwords


def asking(accepts: bytes) -> Talk:
    """A proxy that wants ``user:password`` and gets nowhere."""

    def talk(peer: socket.socket) -> None:
        methods = received(peer, received(peer, 2)[1])
        peer.sendall(b"\5\2" if b"\2" in methods else b"\5\xff")
        user = received(peer, received(peer, 2)[1])
        password = received(peer, received(peer, 1)[0])
        peer.sendall(b"\1\0" if user + b":" + password == accepts else b"\1\1")
        received(peer, 5)
        peer.sendall(b"\5\5\0\1" + bytes(6))

    return talk


def test_proxy_that_asks_for_a_password(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("me:se:cret\n")
    file.chmod(0o600)
    url = f"&proxy_auth={tmp_path}/a%20file"
    with listening(asking(b"me:se:cret")) as way:
        error = failure(f"socket:h:1?proxy=socks5:{way}")
    assert "asks for a user and a password" in error.problem and "proxy_auth=" in error.next_step
    with listening(asking(b"me:other")) as way:
        error = failure(f"socket:h:1?proxy=socks5:{way}{url}")
    assert "does not take the user and password" in error.problem
    assert "cret" not in str(error) and "a file" in str(error)
    with listening(asking(b"me:se:cret")) as way:
        error = failure(f"socket:h:1?proxy=socks5:{way}{url}")
    assert "SOCKS 0x05" in error.problem
    # It is read at each connection.
    file.write_text("me:other\n")
    with listening(asking(b"me:other")) as way, pytest.raises(NoWay, match="0x05"):
        connect(parse_socket_url(f"socket:h:1?proxy=socks5:{way}{url}"))


LONGEST = "a" * proxy.MAX_NAME_SIZE


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("me:secret", ("me", "secret")),
        ("me:secret\n", ("me", "secret")),
        ("me:secret\r\n", ("me", "secret")),
        ("me: s:e \n", ("me", " s:e ")),
        ("mé:sécret\n", ("mé", "sécret")),
        (f"{LONGEST}:{LONGEST}\n", (LONGEST, LONGEST)),
        *((text, None) for text in ("", "\n", "me\n", "me:\n", ":secret\n", "me:a\n\n", "me:a\nb")),
        *(
            (text, None)
            for text in (f"a{LONGEST}:a", f"a:a{LONGEST}", "a:" + "a" * 999, "me:\udcff")
        ),
    ],
)
def test_file_with_a_password(text: str, found: tuple[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "auth"
    path.write_bytes(text.encode(errors="surrogateescape"))
    path.chmod(0o600)
    if found is not None:
        assert read_auth(str(path)) == found
        return
    with pytest.raises(ConfigError, match="not one line user:password"):
        read_auth(str(path))


def test_file_with_a_password_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "auth"
    path.write_text("me:secret\n")
    for mode in (0o604, 0o640, 0o644, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
            read_auth(str(path))
    path.chmod(0o400)
    assert read_auth(str(path)) == ("me", "secret")


def test_file_with_a_password_that_is_none(tmp_path: Path) -> None:
    error = failure(f"socket:h:1?proxy=socks5:h:1&proxy_auth={tmp_path}/none")
    assert isinstance(error, DiskError)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="not one line"):
        read_auth(str(tmp_path / "pipe"))
