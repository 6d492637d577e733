"""Unix sockets of either side: who is at the other end, and who may be."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shlex
import socket
import stat
import struct
from collections.abc import Iterable
from typing import NamedTuple

from errors import ConfigError

MAX_PATH_SIZE = 107
"""Bytes of a path that the system takes."""
ROOT = 0
BACKLOG = 64
_CREDENTIALS = struct.Struct("=iII")


class Peer(NamedTuple):
    """The process that connected or, seen by who connects, that began to listen.

    Attributes:
        pid: its number, 0 where it is of another container.
    """

    pid: int
    uid: int

    @property
    def user(self) -> str:
        """Its user, in words."""
        return f"user {name_of(self.uid)}"

    def __str__(self) -> str:
        return f"{self.user}, process {self.pid}" if self.pid else self.user


def parse_path(text: str) -> str:
    """The path of a socket; ValueError says what is wrong with it."""
    size = len(os.fsencode(text))
    if not text.startswith("/") or text.endswith("/") or "\0" in text:
        raise ValueError(f"{text!r} is no absolute path of a socket")
    if size > MAX_PATH_SIZE:
        raise ValueError(f"{text!r} has {size} bytes; the path of a socket at most {MAX_PATH_SIZE}")
    return text


def name_of(uid: int) -> str:
    """The name of user ``uid``, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def user_ids(names: Iterable[str]) -> frozenset[int]:
    """Who may be at the other end: the users ``names``, by name or number, oneself and root.

    Raises:
        ConfigError: there is no such user.
    """
    return frozenset({ROOT, os.geteuid(), *map(_user_id, names)})


def _user_id(name: str) -> int:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name).pw_uid
    if name.isascii() and name.isdigit():
        return int(name)
    raise ConfigError(f"There is no user {name!r} on this machine.", "Check the name.")


def peer_of(sock: socket.socket) -> Peer:
    """Who is at the other end of ``sock``, which is connected: the kernel says so (unix(7)).

    Raises:
        ConfigError: this system does not say it.
    """
    _require_credentials()
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return Peer(pid, uid)


def _require_credentials() -> None:
    if not hasattr(socket, "SO_PEERCRED"):
        raise ConfigError("This system does not tell who uses a unix socket.", "Use a TCP port.")


def listen(path: str, group: str | None) -> socket.socket:
    """A socket that listens at ``path``, for this user and, if named, the members of ``group``.

    What a server left there that is gone is replaced.

    Raises:
        ConfigError: others can reach the directory, something is at ``path``, or there is no
            such group, or this user may not give it the socket; or see peer_of.
        OSError: the system says no.
    """
    _require_credentials()
    _check_directory(os.path.dirname(path))
    _clear(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        _bind(sock, path)
        try:
            if group is not None:
                _open_for(group, path)
            sock.listen(BACKLOG)
        except BaseException:
            os.unlink(path)
            raise
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, path: str) -> None:
    # A chmod would come too late: until then anybody may connect.
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _open_for(group: str, path: str) -> None:
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid, follow_symlinks=False)
        os.chmod(path, 0o660)
    except KeyError as error:
        raise ConfigError(f"There is no group {group!r} on this machine.", "Check it.") from error
    except PermissionError as error:
        user = name_of(os.geteuid())
        raise ConfigError(
            f"User {user} may not give the socket {path} to the group {group}.",
            f"Run `usermod -aG {shlex.quote(group)} {user}`, then start the server again.",
        ) from error


def _check_directory(directory: str) -> None:
    """Refuse a ``directory`` in which others could put a socket of their own in its place."""
    shown = shlex.quote(directory)
    try:
        found = os.stat(directory)
    except FileNotFoundError as error:
        raise ConfigError(
            f"The directory {directory} does not exist.", f"Run `install -d -m 750 {shown}`."
        ) from error
    if found.st_uid not in (ROOT, os.geteuid()):
        raise ConfigError(
            f"The directory {directory} belongs to user {name_of(found.st_uid)}, who could put"
            " another socket in place of the server's.",
            f"Run `chown {name_of(os.geteuid())} {shown}`, or make a directory for the socket.",
        )
    # Of the group, too: a member could take the server's place for the others.
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH | stat.S_IXOTH):
        raise ConfigError(
            f"Others can enter the directory {directory}, or write to it.",
            f"If it is for this socket alone, run `chmod g-w,o-wx {shown}`; if not, make one that"
            f" is: `install -d -m 750 {shlex.quote(os.path.join(directory, 'node-backup'))}`.",
        )


def _clear(path: str) -> None:
    """Remove the socket of a server that is gone from ``path``; anything else is refused."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is there, and no socket.", "Choose another path.")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return os.unlink(path)
        except OSError:
            pass  # Its queue is full, say: it is somebody's.
    raise ConfigError(
        f"Something listens at {path} already.",
        f"Stop it (see `ss -xlp src {shlex.quote(path)}`), or choose another path.",
    )
