"""URLs of servers, and the way there."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import socket

import pytest

from errors import ConfigError
from remote.address import AddrType, HostPort, ProxyType, parse_socket_url
from socketbackend import SocketBackend
from tests import support

TOR = "?proxy=socks5:127.0.0.1:9050"


def onion(key: bytes = bytes(range(32)), version: int = 3) -> str:
    """The onion name of a public key (Tor's rend-spec-v3, encoding of onion addresses)."""
    end = bytes([version])
    checksum = hashlib.sha3_256(b".onion checksum" + key + end).digest()[:2]
    return base64.b32encode(key + checksum + end).decode().lower() + ".onion"


KNOWN_ONION = "2gzyxa5ihm7nsggfxnu52rck2vv4rvmdlkiu3zzui5du4xyclen53wid.onion"
"""That of the Tor Project's own site."""


@pytest.mark.parametrize(
    ("text", "host", "addrtype"),
    [
        ("127.0.0.1", "127.0.0.1", AddrType.IPv4),
        ("[::1]", "::1", AddrType.IPv6),
        ("[2001:db8::7]", "2001:db8::7", AddrType.IPv6),
        ("[::ffff:1.2.3.4]", "::ffff:1.2.3.4", AddrType.IPv6),
        ("localhost", "localhost", AddrType.NAME),
        ("backup.example.org", "backup.example.org", AddrType.NAME),
        ("a" * 63 + ".example.org", "a" * 63 + ".example.org", AddrType.NAME),
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
    url = parse_socket_url(f"socket:{KNOWN_ONION}:8700{TOR}")
    assert url.target == HostPort(KNOWN_ONION, 8700, AddrType.NAME)
    assert url.proxytype is ProxyType.SOCKS5
    assert url.proxytarget == HostPort("127.0.0.1", 9050, AddrType.IPv4)
    url = parse_socket_url("socket:[::1]:1?proxy=socks5:[::2]:65535&retry_for=5")
    assert url.target == HostPort("::1", 1, AddrType.IPv6)
    assert url.proxytarget == HostPort("::2", 65535, AddrType.IPv6)
    assert url.retry_for == 5
    url = parse_socket_url("socket:h:1?retry_for=0&proxy=socks5:tor:9050")
    assert url.proxytarget == HostPort("tor", 9050, AddrType.NAME)
    assert url.retry_for == 0


@pytest.mark.parametrize("kind", ["socks5:", "socks5://", "socks5h:", "socks5h://"])
def test_forms_of_a_proxy_mean_the_same(kind: str) -> None:
    url = parse_socket_url(f"socket:h:1?proxy={kind}tor:9050&proxy_auth=/a%20file/u@h")
    assert url == parse_socket_url("socket:h:1?proxy=socks5:tor:9050")._replace(
        proxy_auth="/a file/u@h"
    )


@pytest.mark.parametrize(
    "url",
    [
        "socket:h:1?proxy=socks5:user:secret@tor:9050",
        "socket:h:1?proxy=socks5://user:secret@tor:9050",
        "socket:h:1?proxy=socks5://user:sec&ret@tor:9050&retry_for=x",
        "socket:user:secret@h:1",
        "socket:h:1?proxy=socks5:tor:9050&proxy_auth=user:secret",
        "socket:h:1?proxy_auth=/f&proxy=socks5:user:secret@tor:9050",
        "socket:h:x?proxy_auth=secret",
    ],
)
def test_password_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="proxy_auth=/path/to/file") as caught:
        SocketBackend(url)
    assert "sec" not in str(caught.value) and "ret@" not in str(caught.value)


# Onion names


@pytest.mark.parametrize(
    "host", [KNOWN_ONION, onion(), KNOWN_ONION.upper(), f"a.b-c.{onion()}", f"www.{KNOWN_ONION}"]
)
def test_onion_name(host: str) -> None:
    assert parse_socket_url(f"socket:{host}:8700{TOR}").target.host == host


def test_each_typo_in_an_onion_name_is_found() -> None:
    for at, letter in enumerate(KNOWN_ONION.removesuffix(".onion")):
        typo = KNOWN_ONION[:at] + ("a" if letter != "a" else "b") + KNOWN_ONION[at + 1 :]
        with pytest.raises(ValueError, match="checksum does not fit"):
            parse_socket_url(f"socket:{typo}:8700{TOR}")


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("expyuzz4wqqyqhjn.onion", "version 2, which Tor has given up"),
        ("www.expyuzz4wqqyqhjn.onion", "version 2, which Tor has given up"),
        (onion(version=4), "version 4, which is not known"),
        (onion()[1:], "55 characters in place of 56"),
        (f"a{onion()}", "57 characters in place of 56"),
        ("abc.onion", "3 characters in place of 56"),
        ("onion", "no onion name"),
        (f"{onion()}.", "ends with a dot"),
        ("1" + onion()[1:], "a to z and 2 to 7"),
        ("-" + onion()[1:], "no host"),
        (f"{'a' * 64}.{onion()}", "64 characters without a dot"),
    ],
)
def test_wrong_onion_name(host: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_socket_url(f"socket:{host}:8700{TOR}")


@pytest.mark.parametrize(
    ("rest", "named"), [("", TOR), ("?retry_for=600", "?retry_for=600&" + TOR[1:])]
)
def test_onion_without_a_proxy_asks_no_dns(
    rest: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *query, **_: asked.append(query))
    for host in (KNOWN_ONION, f"www.{KNOWN_ONION.upper()}"):
        url = f"socket:{host}:8700"
        with pytest.raises(ConfigError, match="only Tor leads there") as caught:
            SocketBackend(url + rest)
        assert caught.value.next_step.endswith(f" {shlex.quote(url + named)}.")
    assert asked == []


def test_unix_socket() -> None:
    url = parse_socket_url("socket:unix:/run/node-backup/server.sock?peer=me&retry_for=600")
    assert url.target == HostPort("/run/node-backup/server.sock", 0, AddrType.UNIX)
    assert (url.peer, url.retry_for, url.proxytarget) == ("me", 600, None)
    assert str(url.target) == "unix:/run/node-backup/server.sock"
    assert parse_socket_url("socket:unix:/a@b:1").target.host == "/a@b:1"
    assert len(parse_socket_url("socket:unix:/" + "x" * 106).target.host) == 107


# Malformed

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
    ("socket:" + "a" * 64 + ".example.org:8700", "64 characters without a dot"),
    ("socket:" + "a" * 70 + ":8700", "70 characters without a dot"),
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
    ("socket:h:1?proxy=socks5:///h:1", "the proxy: .* no host"),
    ("socket:h:1?proxy=socks5://h", "the proxy: .* port"),
    ("socket:h:1?proxy=http://h:1", "proxy type 'http'"),
    (f"socket:h:1?proxy=socks5:{KNOWN_ONION}:9050", "which only a proxy can reach"),
    ("socket:" + "a." * 64 + "org:1?proxy=socks5:h:1", "no name of more than 127"),
    ("socket:h:1?proxy_auth=/f", "without proxy"),
    ("socket:h:1?proxy=socks5:h:1&proxy_auth=/f&proxy_auth=/g", "'proxy_auth' stands twice"),
    ("socket:unix:", "no absolute path"),
    ("socket:unix:server.sock", "no absolute path"),
    ("socket:unix:/run/", "no absolute path"),
    ("socket:unix:/" + "x" * 107, "has 108 bytes"),
    ("socket:unix:/" + "ö" * 54, "has 109 bytes"),
    ("socket:unix:/s?proxy=socks5:h:1", "no proxy leads there"),
    ("socket:unix:/s?proxy_auth=/f", "without proxy"),
    ("socket:unix:/s?peer=", "names the user"),
    ("socket:unix:/s?peer=a&peer=b", "'peer' stands twice"),
    ("socket:h:1?peer=node-backup", "at a unix socket"),
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
