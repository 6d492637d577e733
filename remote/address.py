"""Where a server is: ``socket:<host>:<port>[?proxy=socks5:<host>:<port>]``, and the way there."""

from __future__ import annotations

import enum
import ipaddress
import re
import socket
from typing import NamedTuple
from urllib.parse import parse_qsl

DEFAULT_RETRY_FOR_S = 120.0
"""How long a node waits for its server to come back before the change is refused."""
CONNECT_TIMEOUT_S = 15.0
PROXY_TIMEOUT_S = 60.0
"""A new Tor circuit may take this long."""


class AddrType(enum.Enum):
    """What a URL's host is."""

    IPv4 = "IPv4"
    IPv6 = "IPv6"
    NAME = "NAME"


class ProxyType(enum.Enum):
    """How the server is reached."""

    DIRECT = "direct"
    SOCKS5 = "socks5"


class HostPort(NamedTuple):
    """A host, its port, and what kind of host it is."""

    host: str
    port: int
    addrtype: AddrType

    def __str__(self) -> str:
        host = f"[{self.host}]" if self.addrtype is AddrType.IPv6 else self.host
        return f"{host}:{self.port}"


class SocketUrl(NamedTuple):
    """A parsed ``socket:`` URL; ``retry_for`` in seconds."""

    target: HostPort
    proxytype: ProxyType
    proxytarget: HostPort | None
    retry_for: float


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
    if re.fullmatch(r"[0-9.]+", host):
        raise ValueError(f"{host!r} is no IPv4 address")
    return HostPort(host, port, AddrType.NAME)


def parse_socket_url(url: str) -> SocketUrl:
    """Take a ``socket:`` URL apart; ValueError says what is wrong with it.

    The form is ``socket:<host>:<port>``, with the parameters ``proxy=socks5:<host>:<port>``
    and ``retry_for=<seconds>``.
    """
    rest = url.removeprefix("socket:")
    if rest == url:
        raise ValueError("the URL does not begin with socket:")
    address, question, query = rest.partition("?")
    target = parse_host_port(address.removeprefix("//"))
    proxytype, proxytarget, retry_for = ProxyType.DIRECT, None, DEFAULT_RETRY_FOR_S
    seen: set[str] = set()
    try:
        if question and not query:
            raise ValueError("nothing behind the question mark")
        parameters = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(question))
    except ValueError as error:
        raise ValueError(f"the parameters {query!r} are not of the form name=value") from error
    for name, value in parameters:
        if name in seen:
            raise ValueError(f"the parameter {name!r} stands twice")
        seen.add(name)
        if name == "proxy":
            proxytype, proxytarget = _parse_proxy(value)
        elif name == "retry_for":
            if not re.fullmatch(r"[0-9]{1,6}", value):
                raise ValueError(f"retry_for={value!r} is no number of seconds")
            retry_for = float(value)
        else:
            raise ValueError(f"the parameter {name!r} is unknown")
    return SocketUrl(target, proxytype, proxytarget, retry_for)


def _parse_proxy(text: str) -> tuple[ProxyType, HostPort]:
    kind, _, address = text.partition(":")
    if kind != ProxyType.SOCKS5.value:
        raise ValueError(f"the proxy type {kind!r} is unknown; there is only socks5")
    try:
        return ProxyType.SOCKS5, parse_host_port(address)
    except ValueError as error:
        raise ValueError(f"the proxy: {error}") from error


def connect(url: SocketUrl) -> socket.socket:
    """A connection to the server, each of its addresses tried in turn; OSError if none."""
    if url.proxytarget is None:
        sock = socket.create_connection(url.target[:2], timeout=CONNECT_TIMEOUT_S)
    else:
        import socks  # Only those who use a proxy need it.

        # The proxy resolves the name: an onion name means nothing to anybody else.
        sock = socks.create_connection(
            url.target[:2],
            timeout=PROXY_TIMEOUT_S,
            proxy_type=socks.SOCKS5,
            proxy_addr=url.proxytarget.host,
            proxy_port=url.proxytarget.port,
            proxy_rdns=True,
        )
    return sock
