"""The addresses at which a server listens, and who comes in there."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import protocol
import unixsocket
from backend import log
from errors import ConfigError
from protocol import Nack, NackCode
from remote.address import AddrType, HostPort, parse_address


class Caller(NamedTuple):
    """Who connected.

    Attributes:
        who: a host's address or a user, the same for each of its connections.
        at: the same and where from, for the log.
    """

    who: str
    at: str


class Entry(NamedTuple):
    """An address to listen at.

    Attributes:
        address: ``host:port``, a name means all its addresses; or ``unix:/path``.
        is_read_only: who comes in there never writes.
        group: whose members may use a unix socket, too.
        users: who may use a unix socket besides this user and root.
    """

    address: str
    is_read_only: bool = False
    group: str | None = None
    users: Sequence[str] = ()


class Door:
    """A socket that listens.

    Args:
        sock: it; closed with this.
        path: of a unix socket, which is removed with it; else "".
        users: who may come in by a unix socket.
    """

    def __init__(
        self, sock: socket.socket, is_read_only: bool, path: str, users: frozenset[int]
    ) -> None:
        self.is_read_only = is_read_only
        self._sock = sock
        self._path = path
        self._users = users
        self._turned_away: set[int] = set()
        self._identity = _identity(path)

    def fileno(self) -> int:
        """For select()."""
        return self._sock.fileno()

    def accept(self) -> tuple[socket.socket, Caller] | None:
        """The next connection and who it is, None if he may not come in; OSError if it fails."""
        sock, address = self._sock.accept()
        try:
            if not self._path:
                form = "[{}]:{}" if sock.family is socket.AF_INET6 else "{}:{}"
                return sock, Caller(str(address[0]), form.format(*address[:2]))
            peer = unixsocket.peer_of(sock)
            if peer.uid in self._users:
                return sock, Caller(peer.user, str(peer))
            self._turn_away(sock, peer)
        except BaseException:
            sock.close()
            raise
        sock.close()
        return None

    def _turn_away(self, sock: socket.socket, peer: unixsocket.Peer) -> None:
        if peer.uid not in self._turned_away:  # Once: he may come as often as he likes.
            self._turned_away.add(peer.uid)
            log.warning(f"{peer}: may not use {self._path}, and is turned away each time")
        text = f"{peer.user} is none of those whom the server lets in"
        with contextlib.suppress(OSError):
            nack = protocol.encode_nack(Nack(None, NackCode.NOT_ALLOWED, text))
            sock.send(nack, socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Listen no more."""
        # While it is open, no other file can have its inode.
        if self._path and _identity(self._path) == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._sock.close()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def listen(entries: Sequence[Entry]) -> list[Door]:
    """Listen at all of ``entries``.

    Raises:
        ConfigError: one of them cannot be had; then none is.
    """
    doors: list[Door] = []
    try:
        for entry in entries:
            try:
                target = parse_address(entry.address)
                _listen(entry, target, doors)
            except (ValueError, OSError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(
                    f"Cannot listen on {entry.address!r}: {reason}.",
                    "Use HOST:PORT or unix:/path/to/socket that is of this machine and free.",
                ) from error
    except BaseException:
        for door in doors:
            door.close()
        raise
    return doors


def _listen(entry: Entry, target: HostPort, doors: list[Door]) -> None:
    if target.addrtype is AddrType.UNIX:
        users = unixsocket.user_ids(entry.users)
        sock = unixsocket.listen(target.host, entry.group)
        return doors.append(Door(sock, entry.is_read_only, target.host, users))
    if entry.group is not None or entry.users:
        raise ConfigError(
            f"At {entry.address} nobody can tell who comes: groups and users are for unix sockets.",
            "Use unix:/path/to/socket there, or leave them out.",
        )
    found = socket.getaddrinfo(
        target.host, target.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    places = []
    for family, _, _, _, place in dict.fromkeys(found):
        sock = socket.create_server(place[:2], family=family, backlog=unixsocket.BACKLOG)
        doors.append(Door(sock, entry.is_read_only, "", frozenset()))
        places.append(ipaddress.ip_address(sock.getsockname()[0]))
    if not all(place.is_loopback for place in places):
        can = "can read the backup" if entry.is_read_only else "can read the backup and write to it"
        log.warning(
            f"{entry.address} is not a loopback address: whoever reaches it {can}."
            " Use a VPN, an SSH forward or an onion service."
        )
