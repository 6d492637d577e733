"""A TCP proxy that cuts its connections, delays what goes through, and counts it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from typing import NamedTuple

UP, DOWN = 0, 1
"""Directions: to the server, to the client."""


class Move(NamedTuple):
    """Bytes that came at once: a direction and how many."""

    direction: int
    size: int


class CutProxy:
    """Forwards 127.0.0.1:``port`` to ``target``.

    Args:
        target: where to connect, host and port.
        delay_s: how long each piece is held, in either direction.
        rate: bytes a second that go through at most, 0 for any number.
    """

    def __init__(self, target: tuple[str, int], delay_s: float = 0.0, rate: int = 0) -> None:
        self.target = target
        self.delay_s = delay_s
        self.rate = rate
        self.moves: list[Move] = []
        self.connections = 0
        self.cuts = 0
        self._left: list[int | None] = [None, None]
        self._lock = threading.Lock()
        self._held: list[tuple[socket.socket, socket.socket]] = []
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, direction: int, size: int) -> None:
        """Once, let ``size`` more bytes through in ``direction``, then cut the connection."""
        with self._lock:
            self._left[direction] = size

    def cut_no_more(self) -> None:
        """Forget a cut that did not happen."""
        with self._lock:
            self._left = [None, None]

    def hold(self) -> None:
        """Let nothing more through what is connected, and do not tell anybody."""
        self._held.extend(self._pairs)

    def cut_now(self) -> None:
        """Cut what is connected."""
        for pair in list(self._pairs):
            self._cut(pair)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(self.target, timeout=10)
                except OSError:
                    client.close()
                    continue
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pair = client, server
                self._pairs.append(pair)
                threading.Thread(target=self._forward, args=(pair,), daemon=True).start()

    def _forward(self, pair: tuple[socket.socket, socket.socket]) -> None:
        held: deque[tuple[float, int, bytes]] = deque()
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:
            for direction, source in enumerate(pair):
                selector.register(source, selectors.EVENT_READ, direction)
            while True:
                wait_s = held[0][0] - time.monotonic() if held else None
                for key, _ in selector.select(None if wait_s is None else max(wait_s, 0)):
                    data = pair[key.data].recv(1 << 16)
                    if pair in self._held:
                        continue
                    if self.rate:
                        time.sleep(len(data) / self.rate)
                    if not data:
                        break
                    self.moves.append(Move(key.data, len(data)))
                    held.append((time.monotonic() + self.delay_s, key.data, data))
                else:
                    if self._deliver(held, pair):
                        continue
                break
        self._cut(pair)

    def _deliver(
        self, held: deque[tuple[float, int, bytes]], pair: tuple[socket.socket, socket.socket]
    ) -> bool:
        """Send what was held long enough; False where the cut is."""
        while held and held[0][0] <= time.monotonic():
            _, direction, data = held.popleft()
            with self._lock:
                left = self._left[direction]
                passed = len(data) if left is None else min(left, len(data))
                if left is not None:
                    self._left[direction] = left - passed or None
                    if left == passed:
                        self.cuts += 1
            if passed:
                pair[1 - direction].sendall(data[:passed])
            if left == passed:
                return False
        return True

    def _cut(self, pair: tuple[socket.socket, socket.socket]) -> None:
        for sock in pair:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        with contextlib.suppress(ValueError):
            self._pairs.remove(pair)

    def close(self) -> None:
        """Cut everything and listen no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_now()

    def __enter__(self) -> CutProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
