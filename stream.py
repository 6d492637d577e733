"""A connection of either side, by TCP or a unix socket, each of whose calls ends after a time."""

from __future__ import annotations

import contextlib
import fcntl
import select
import socket
import struct
import sys
import termios

KEEPALIVE_S = 15
RECEIVE_SIZE = 1 << 16
MUCH_SIZE = 1 << 18
"""Bytes to receive at once while much comes; as a buffer for an answer it would cost 10 us."""


class Stream:
    """A connection that sends packets at once and notices within a minute that its peer is gone.

    At a unix socket what carries it on, as ssh, has to notice that.

    Args:
        sock: connected; it is closed with this.

    Raises:
        OSError: the connection is lost.
        TimeoutError: a call of the system moved nothing in the time that the caller allows.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._comes_much = False
        self._timeouts_s: dict[int, float] = {}
        try:
            self._tune(sock)
        except OSError:  # It was lost at once.
            sock.close()
            raise

    @staticmethod
    def _tune(sock: socket.socket) -> None:
        # Python's own timeouts cost a poll() before each call, in the path of every change.
        sock.settimeout(None)
        if sock.family == socket.AF_UNIX:
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", KEEPALIVE_S),
            ("TCP_KEEPINTVL", KEEPALIVE_S),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 1000 * 3 * KEEPALIVE_S),
        ):
            if hasattr(socket, name):  # Not every system has them all.
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def receive(self, timeout_s: float) -> bytes:
        """The next bytes, as soon as there are some; b"" at the peer's end."""
        self._limit(socket.SO_RCVTIMEO, timeout_s)
        try:
            data = self._sock.recv(MUCH_SIZE if self._comes_much else RECEIVE_SIZE)
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error
        self._comes_much = len(data) >= RECEIVE_SIZE
        return data

    def has_data(self) -> bool:
        """Whether ``receive`` would return at once."""
        return bool(select.select([self._sock], [], [], 0)[0])

    def send(self, data: bytes, timeout_s: float) -> None:
        """Send all of ``data`` with as few segments as it needs, as long as it moves on."""
        left = memoryview(data)[self.send_now(data) :]
        if not left:
            return
        self._limit(socket.SO_SNDTIMEO, timeout_s)
        queued = self.queued()
        while left:
            before, sent = queued, 0
            try:
                # Not sendall: it says nothing of what went before a timeout.
                sent = self._sock.send(left)
            except BlockingIOError as error:
                queued = self.queued()
                # Linux wakes a sender when a third of its buffer is free: minutes at 10 kB/s.
                if queued is None or queued == before:
                    raise TimeoutError("timed out") from error
            else:
                queued = self.queued()
            left = left[sent:]

    def queued(self) -> int | None:
        """Bytes sent that the peer's system has not confirmed; None where this one cannot tell."""
        try:
            found = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
        except OSError:
            return None
        return int.from_bytes(found, sys.byteorder)

    def let_it_pause(self, pause_s: float) -> None:
        """The peer may stop reading for ``pause_s`` while more is sent to it."""
        if hasattr(socket, "TCP_USER_TIMEOUT") and self._sock.family != socket.AF_UNIX:
            # It counts also the time in which a peer that is well takes nothing.
            option = socket.TCP_USER_TIMEOUT
            self._sock.setsockopt(socket.IPPROTO_TCP, option, round(1000 * pause_s))

    def send_now(self, data: bytes | memoryview) -> int:
        """Send what the system takes without waiting; the bytes of it."""
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def _limit(self, option: int, timeout_s: float) -> None:
        if timeout_s == self._timeouts_s.get(option):
            return
        timeval = divmod(max(1, round(timeout_s * 10**6)), 10**6)  # Zero would mean for ever.
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", *timeval))
        except OSError:  # A 32-bit system whose times have 64 bits.
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("qq", *timeval))
        self._timeouts_s[option] = timeout_s

    def fileno(self) -> int:
        """For select()."""
        return self._sock.fileno()

    def cut(self) -> None:
        """End the connection from another thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()
