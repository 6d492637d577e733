"""URLs of servers, and the way there."""

from __future__ import annotations

import re
import socket

import pytest

from errors import ConfigError
from remote.address import AddrType, HostPort, ProxyType, parse_socket_url
from socketbackend import SocketBackend
from tests import support


@pytest.mark.parametrize(
    ("text", "host", "addrtype"),
    [
        ("127.0.0.1", "127.0.0.1", AddrType.IPv4),
        ("[::1]", "::1", AddrType.IPv6),
        ("[2001:db8::7]", "2001:db8::7", AddrType.IPv6),
        ("[::ffff:1.2.3.4]", "::ffff:1.2.3.4", AddrType.IPv6),
        ("localhost", "localhost", AddrType.NAME),
        ("backup.example.org", "backup.example.org", AddrType.NAME),
        ("a" * 56 + ".onion", "a" * 56 + ".onion", AddrType.NAME),
    ],
)
def test_url_names_a_target(text: str, host: str, addrtype: AddrType) -> None:
    url = parse_socket_url(f"socket:{text}:8700")
    target = url.target
    assert (target.port, target.addrtype) == (8700, addrtype)
    assert socket_address(target.host) == socket_address(host)
    assert (url.proxytype, url.proxytarget) == (ProxyType.DIRECT, None)
    assert url.retry_for == 120
    assert parse_socket_url(f"socket:{target}").target == target


def socket_address(host: str) -> bytes | str:
    """``host`` in a form in which equal addresses are equal."""
    return socket.inet_pton(socket.AF_INET6, host) if ":" in host else host


def test_url_names_a_proxy() -> None:
    url = parse_socket_url("socket:abc.onion:8700?proxy=socks5:127.0.0.1:9050")
    assert url.target == HostPort("abc.onion", 8700, AddrType.NAME)
    assert url.proxytype is ProxyType.SOCKS5
    assert url.proxytarget == HostPort("127.0.0.1", 9050, AddrType.IPv4)
    url = parse_socket_url("socket:[::1]:1?proxy=socks5:[::2]:65535&retry_for=5")
    assert url.target == HostPort("::1", 1, AddrType.IPv6)
    assert url.proxytarget == HostPort("::2", 65535, AddrType.IPv6)
    assert url.retry_for == 5
    url = parse_socket_url("socket:h:1?retry_for=0&proxy=socks5:tor:9050")
    assert url.proxytarget == HostPort("tor", 9050, AddrType.NAME)
    assert url.retry_for == 0


MALFORMED = [
    ("file:///a:1", "does not begin with socket:"),
    ("127.0.0.1:8700", "does not begin with socket:"),
    ("", "does not begin with socket:"),
    ("socket:", "port"),
    ("socket:127.0.0.1", "port"),
    ("socket:127.0.0.1:", "port"),
    ("socket:127.0.0.1:0", "port"),
    ("socket:127.0.0.1:65536", "port"),
    ("socket:127.0.0.1:-1", "port"),
    ("socket:127.0.0.1:+1", "port"),
    ("socket:127.0.0.1: 1", "port"),
    ("socket:127.0.0.1:1x", "port"),
    ("socket:127.0.0.1:١", "port"),
    ("socket:localhost:8700/", "port"),
    ("socket:localhost:8700#x", "port"),
    ("socket:[::1]", "port"),
    ("socket::8700", "no host"),
    ("socket:a b:8700", "no host"),
    ("socket:-a:8700", "no host"),
    ("socket:a..b:8700", "no host"),
    ("socket:user@host:8700", "no host"),
    ("socket:" + "a" * 254 + ":8700", "no host"),
    ("socket:1.2.3:8700", "no IPv4 address"),
    ("socket:1.2.3.256:8700", "no IPv4 address"),
    ("socket:::1:8700", "in brackets"),
    ("socket:fe80::1:8700", "in brackets"),
    ("socket:[::1:8700", "in brackets"),
    ("socket:[::g]:8700", "no IPv6 address"),
    ("socket:[127.0.0.1]:8700", "no IPv6 address"),
    ("socket:[]:8700", "no IPv6 address"),
    ("socket:h:1?", "name=value"),
    ("socket:h:1?proxy", "name=value"),
    ("socket:h:1?foo=bar", "'foo' is unknown"),
    ("socket:h:1?Proxy=socks5:h:1", "'Proxy' is unknown"),
    ("socket:h:1?proxy=", "proxy type"),
    ("socket:h:1?proxy=http:h:1", "proxy type 'http'"),
    ("socket:h:1?proxy=socks4:h:1", "proxy type 'socks4'"),
    ("socket:h:1?proxy=SOCKS5:h:1", "proxy type 'SOCKS5'"),
    ("socket:h:1?proxy=socks5", "the proxy: "),
    ("socket:h:1?proxy=socks5:", "the proxy: "),
    ("socket:h:1?proxy=socks5:h", "the proxy: .* port"),
    ("socket:h:1?proxy=socks5::1", "the proxy: .* no host"),
    ("socket:h:1?proxy=socks5:h:0", "the proxy: .* port"),
    ("socket:h:1?proxy=socks5:::1:9050", "the proxy: .* brackets"),
    ("socket:h:1?proxy=socks5:h:1&proxy=socks5:h:1", "'proxy' stands twice"),
    ("socket:h:1?retry_for=1&retry_for=1", "'retry_for' stands twice"),
    ("socket:h:1?retry_for=", "retry_for"),
    ("socket:h:1?retry_for=-1", "retry_for"),
    ("socket:h:1?retry_for=1.5", "retry_for"),
    ("socket:h:1?retry_for=soon", "retry_for"),
    ("socket:h:1?retry_for=1234567", "retry_for"),
]


@pytest.mark.parametrize(("url", "reason"), MALFORMED)
def test_malformed_url_is_a_value_error_with_its_reason(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_socket_url(url)
    if url.startswith("socket:"):
        with pytest.raises(ConfigError, match=re.escape(url)):
            SocketBackend(url)


def test_malformed_url_on_the_command_line() -> None:
    done = support.run_cli("status", "socket:h:1?foo=bar", check=1)
    assert done.stderr.startswith("Error: ") and "'foo' is unknown" in done.stderr
