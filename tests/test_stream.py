"""Streams over real sockets: what they send, when they give up."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from stream import Stream

FILLING = bytes(64 << 20)
"""More than the system takes from a sender whose peer reads nothing."""


@pytest.fixture
def ends() -> Iterator[tuple[Stream, socket.socket]]:
    """A stream, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    with contextlib.closing(Stream(sock)) as stream, peer:
        yield stream, peer


def test_bytes_of_both_directions(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    stream.send(b"to the peer", 5)
    assert peer.recv(100) == b"to the peer"
    peer.sendall(b"from the peer")
    assert stream.receive(5) == b"from the peer"
    peer.close()
    assert stream.receive(5) == b""


@pytest.mark.parametrize("timeout_s", [0.2, 1e-9])
def test_peer_that_says_nothing(ends: tuple[Stream, socket.socket], timeout_s: float) -> None:
    stream, _ = ends
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="timed out"):
        stream.receive(timeout_s)
    assert time.monotonic() - began >= timeout_s


def test_peer_that_takes_nothing(ends: tuple[Stream, socket.socket]) -> None:
    stream, _ = ends
    with pytest.raises(TimeoutError, match="timed out"):
        stream.send(FILLING, 0.2)
    assert stream.send_now(b"more") == 0


@pytest.mark.parametrize("queues", [[900, 700, 500, 300], [900, 900], [None, None]])
def test_sender_whose_buffer_stays_full_for_long(
    queues: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux lets it wait until a third is free: what is confirmed counts, too."""
    ours, peer = socket.socketpair()
    left = iter(queues)
    monkeypatch.setattr(Stream, "_tune", lambda stream, sock: None)
    monkeypatch.setattr(Stream, "queued", lambda stream: next(left))
    sock = Full(fileno=ours.detach())
    with contextlib.closing(Stream(sock)) as stream, peer:
        if len(queues) == 4:
            stream.send(b"content", 5)
            assert peer.recv(100) == b"content"
        else:
            with pytest.raises(TimeoutError):
                stream.send(b"content", 5)


class Full(socket.socket):
    """A socket that takes nothing at the first three tries."""

    tries = 0

    def send(self, data: object, flags: int = 0) -> int:
        self.tries += 1
        if self.tries <= 3:
            raise BlockingIOError
        return super().send(data, flags)  # type: ignore[arg-type]


def test_peer_that_may_pause(ends: tuple[Stream, socket.socket]) -> None:
    stream, _ = ends
    assert stream.queued() == 0
    assert stream.send_now(FILLING) and (stream.queued() or 0) > 0
    stream.let_it_pause(600)
    with socket.socket(fileno=stream.fileno()) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 600_000
        sock.detach()


def test_slow_peer_gets_all(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    found: list[int] = []

    def read() -> None:
        while data := peer.recv(1 << 20):
            found.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    stream.send(FILLING, 5)
    stream.cut()
    reader.join()
    assert sum(found) == len(FILLING)


def test_what_the_system_takes_at_once(ends: tuple[Stream, socket.socket]) -> None:
    stream, peer = ends
    assert stream.send_now(b"short") == 5
    assert 0 < stream.send_now(FILLING) < len(FILLING)
    assert peer.recv(5) == b"short"


def test_cut_ends_a_call_of_another_thread(ends: tuple[Stream, socket.socket]) -> None:
    stream, _ = ends
    timer = threading.Timer(0.1, stream.cut)
    timer.start()
    assert stream.receive(60) == b""
    timer.join()


def test_keepalive_and_no_delay(ends: tuple[Stream, socket.socket]) -> None:
    stream, _ = ends
    with socket.socket(fileno=stream.fileno()) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 45_000
        sock.detach()


class Picky(socket.socket):
    """A socket that refuses an option, or timeouts of one size."""

    refused: object = None

    def setsockopt(self, level: int, option: int, value: object) -> None:  # type: ignore[override]
        if self.refused in (option, len(value) if isinstance(value, bytes) else None):
            raise OSError(22, "Invalid argument")
        super().setsockopt(level, option, value)  # type: ignore[call-overload]


def test_socket_that_cannot_be_tuned_is_closed() -> None:
    sock = Picky()
    sock.refused = socket.TCP_NODELAY
    with pytest.raises(OSError, match="Invalid argument"):
        Stream(sock)
    assert sock.fileno() == -1


def test_system_whose_times_are_larger_than_its_longs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on 32-bit systems with times of 64 bits: the first form is refused."""
    pack = struct.pack
    forms: list[str] = []

    def packing(form: str, *values: int) -> bytes:
        forms.append(form)
        return b"" if form == "ll" else pack(form, *values)

    sock = Picky()
    sock.refused = 0
    monkeypatch.setattr(struct, "pack", packing)
    with contextlib.closing(Stream(sock)) as stream, pytest.raises(OSError, match="not connected"):
        stream.receive(7)
    assert forms == ["ll", "qq"]
