"""Where a server is, ``socket:<host>:<port>`` or ``socket:unix:/<path>``, and the way there."""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import ipaddress
import os
import re
import shlex
import socket
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import parse_qsl

import unixsocket
from errors import ConfigError
from remote.proxy import MAX_NAME_SIZE, NoWay, is_onion, through

DEFAULT_RETRY_FOR_S = 120.0
"""How long a node waits for its server to come back before the change is refused."""
CONNECT_TIMEOUT_S = 15.0
MAX_LABEL_SIZE = 63
"""Characters between two dots of a name."""
ONION_SIZE = 56
ONION_VERSION = 3
TOR = "socks5:127.0.0.1:9050"
"""A node's own Tor, as Tor comes."""


class AddrType(enum.Enum):
    """What a URL's host is."""

    IPv4 = "IPv4"
    IPv6 = "IPv6"
    NAME = "NAME"
    UNIX = "UNIX"


class ProxyType(enum.Enum):
    """How the server is reached."""

    DIRECT = "direct"
    SOCKS5 = "socks5"


class HostPort(NamedTuple):
    """A host, its port, and what kind of host it is; or a unix socket: its path, and 0."""

    host: str
    port: int
    addrtype: AddrType

    def __str__(self) -> str:
        if self.addrtype is AddrType.UNIX:
            return f"unix:{self.host}"
        host = f"[{self.host}]" if self.addrtype is AddrType.IPv6 else self.host
        return f"{host}:{self.port}"


class SocketUrl(NamedTuple):
    """A parsed ``socket:`` URL; ``retry_for`` in seconds, ``proxy_auth`` a path.

    ``peer`` is who may listen at a unix socket besides oneself and root.
    """

    target: HostPort
    proxytype: ProxyType
    proxytarget: HostPort | None
    retry_for: float
    proxy_auth: str | None = None
    peer: str | None = None


def parse_address(text: str) -> HostPort:
    """``unix:/path``, or what parse_host_port takes; ValueError says what is wrong."""
    path = text.removeprefix("unix:")
    if path != text:
        return HostPort(unixsocket.parse_path(path), 0, AddrType.UNIX)
    return parse_host_port(text)


def parse_host_port(text: str) -> HostPort:
    """``host:port``, ``1.2.3.4:port`` or ``[v6]:port``; ValueError says what is wrong."""
    host, colon, digits = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", digits) or not 0 < int(digits) < 65536:
        raise ValueError(f"{text!r} does not end with a port between 1 and 65535")
    port = int(digits)
    if host.startswith("[") and host.endswith("]"):
        try:
            return HostPort(str(ipaddress.IPv6Address(host[1:-1])), port, AddrType.IPv6)
        except ValueError as error:
            raise ValueError(f"{host!r} is no IPv6 address") from error
    if ":" in host:
        raise ValueError(f"an IPv6 address stands in brackets: [{host}]:{port}")
    try:
        return HostPort(str(ipaddress.IPv4Address(host)), port, AddrType.IPv4)
    except ValueError:
        pass
    if not re.fullmatch(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?", host) or len(host) > 253:
        raise ValueError(f"{host!r} is no host")
    longest = max(map(len, host.split(".")))
    if re.fullmatch(r"[0-9.]+", host):
        raise ValueError(f"{host!r} is no IPv4 address")
    if longest > MAX_LABEL_SIZE:
        raise ValueError(
            f"{host!r} has {longest} characters without a dot, and a name at most {MAX_LABEL_SIZE}"
        )
    if is_onion(host):
        _check_onion(host)
    return HostPort(host, port, AddrType.NAME)


def _check_onion(host: str) -> None:
    """Find a typo in an onion name (Tor's rend-spec-v3): ValueError says what is wrong."""
    if host.endswith("."):
        raise ValueError(f"{host!r} ends with a dot, as no onion name does")
    name = host.lower().split(".")[-2:][0]  # What stands before it, Tor leaves to the service.
    if len(name) == 16:
        raise ValueError(f"{host!r} is an onion name of version 2, which Tor has given up")
    if len(name) != ONION_SIZE:
        raise ValueError(
            f"{host!r} is no onion name: it has {len(name)} characters in place of {ONION_SIZE}"
        )
    try:
        data = base64.b32decode(name, casefold=True)
    except binascii.Error as error:
        raise ValueError(f"{host!r} is no onion name: such are of a to z and 2 to 7") from error
    key, checksum, version = data[:32], data[32:34], data[34:]
    if hashlib.sha3_256(b".onion checksum" + key + version).digest()[:2] != checksum:
        raise ValueError(f"{host!r} has a typo: its checksum does not fit")
    if version[0] != ONION_VERSION:
        raise ValueError(f"{host!r} is an onion name of version {version[0]}, which is not known")


def parse_socket_url(url: str) -> SocketUrl:
    """Take a ``socket:`` URL apart; ValueError says what is wrong with it.

    The form is ``socket:<host>:<port>``, with the parameters ``proxy=socks5:<host>:<port>``,
    ``proxy_auth=<path of a file>`` (see proxy.read_auth) and ``retry_for=<seconds>``; or
    ``socket:unix:/<path>`` with ``peer=<user>`` (who may listen there) and ``retry_for``.

    Raises:
        ConfigError: it holds a password, which is not shown, or an onion name without a proxy.
    """
    rest = url.removeprefix("socket:")
    if rest == url:
        raise ValueError("the URL does not begin with socket:")
    _refuse_password(rest)
    address, question, query = rest.partition("?")
    target = parse_address(address.removeprefix("//"))
    parameters = _parameters(query, bool(question))
    proxytype, proxytarget, retry_for = ProxyType.DIRECT, None, DEFAULT_RETRY_FOR_S
    proxy_auth, peer = parameters.pop("proxy_auth", None), parameters.pop("peer", None)
    for name, value in parameters.items():
        if name == "proxy":
            proxytype, proxytarget = _parse_proxy(value)
        elif name == "retry_for":
            if not re.fullmatch(r"[0-9]{1,6}", value):
                raise ValueError(f"retry_for={value!r} is no number of seconds")
            retry_for = float(value)
        else:
            raise ValueError(f"the parameter {name!r} is unknown")
    if target.addrtype is AddrType.UNIX and proxytarget is not None:
        raise ValueError("a unix socket is of this machine: no proxy leads there")
    if peer is not None and (target.addrtype is not AddrType.UNIX or not peer):
        raise ValueError("peer= names the user who listens at a unix socket")
    if proxytarget is not None and len(target.host) > MAX_NAME_SIZE:
        raise ValueError(f"a proxy takes no name of more than {MAX_NAME_SIZE} characters")
    if proxytarget is None and is_onion(target.host):
        named = f"{url}{'&' if question else '?'}proxy={TOR}"
        raise ConfigError(
            f"{target.host} is an onion name: only Tor leads there.",
            f"Name the node's Tor in the URL: {shlex.quote(named)}.",
        )
    if proxy_auth is not None and proxytarget is None:
        raise ValueError("proxy_auth is of no use without proxy")
    return SocketUrl(target, proxytype, proxytarget, retry_for, proxy_auth, peer)


def _refuse_password(rest: str) -> None:
    """Also one that makes the rest malformed: no message may show it."""
    others = re.sub(r"[?&]proxy_auth=/[^&]*|^(//)?unix:/[^?]*", "", rest)
    if "@" in others or "proxy_auth=" in others:
        raise ConfigError(
            "A backup URL holds no user and no password: it stands in logs, and in the list of"
            " processes.",
            "Write those for a proxy as one line user:password into a file with mode 600, and name"
            " it in the URL with proxy_auth=/path/to/file.",
        )


def _parameters(query: str, expected: bool) -> dict[str, str]:
    try:
        if expected and not query:
            raise ValueError("nothing behind the question mark")
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=expected)
    except ValueError as error:
        raise ValueError(f"the parameters {query!r} are not of the form name=value") from error
    parameters: dict[str, str] = {}
    for name, value in pairs:
        if name in parameters:
            raise ValueError(f"the parameter {name!r} stands twice")
        parameters[name] = value
    return parameters


def _parse_proxy(text: str) -> tuple[ProxyType, HostPort]:
    kind, _, address = text.partition(":")
    # With h, others mean that the proxy resolves the name: here it always does.
    if kind not in ("socks5", "socks5h"):
        raise ValueError(f"the proxy type {kind!r} is unknown; there is only socks5")
    try:
        proxy = parse_host_port(address.removeprefix("//"))
    except ValueError as error:
        raise ValueError(f"the proxy: {error}") from error
    if is_onion(proxy.host):
        raise ValueError(f"the proxy {proxy.host} is an onion name, which only a proxy can reach")
    return ProxyType.SOCKS5, proxy


def connect(url: SocketUrl) -> socket.socket:
    """A connection to the server, each of its addresses tried in turn.

    Raises:
        OSError: none leads there; NoWay if it is the proxy that says so, or a stranger listens.
        ConfigError, DiskError: the file ``proxy_auth`` is of no use, or ``peer`` is no user.
    """
    if url.target.addrtype is AddrType.UNIX:
        return _connected(url.target.host, url.peer)
    if url.proxytarget is None:
        return socket.create_connection(url.target[:2], timeout=CONNECT_TIMEOUT_S)
    return through(url.proxytarget[:2], url.target[:2], url.proxy_auth)


def _connected(path: str, peer: str | None) -> socket.socket:
    """A connection to the unix socket ``path``, where ``peer``, oneself or root listens."""
    allowed = unixsocket.user_ids([peer] if peer else [])
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(CONNECT_TIMEOUT_S)
        sock.connect(path)
        found = unixsocket.peer_of(sock)
        if found.uid not in allowed:
            # Before a byte goes there: while a tunnel is down, anybody may take its place.
            raise NoWay(
                f"{found} listens there, who is not {' or '.join(_names(allowed))}",
                f"If that is right, add peer={unixsocket.name_of(found.uid)} to the URL. Else find"
                f" out why he could: `namei -l {shlex.quote(path)}`.",
            )
    except PermissionError as error:
        sock.close()
        raise NoWay(
            f"user {unixsocket.name_of(os.geteuid())} may not use that socket",
            f"See who may: `namei -l {shlex.quote(path)}`; the server's --group lets others in.",
        ) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _names(users: Iterable[int]) -> list[str]:
    return [unixsocket.name_of(uid) for uid in sorted(users, reverse=True)]
