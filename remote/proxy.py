"""Through a SOCKS5 proxy, such as Tor, and what it means when that does not lead to the server.

PySocks (1.7.1) sends lengths above 127 as two bytes: hence the limits here.
"""

from __future__ import annotations

import os
import shlex
import socket
import stat

from errors import ConfigError, DiskError

PROXY_TIMEOUT_S = 60.0
"""A new Tor circuit may take this long."""
MAX_NAME_SIZE = 127
"""Bytes of a name, a user or a password."""

_LOOK = "Look into the proxy's log."
_UP = "Check that Tor and the backup server run on the backup's machine, and the name in the URL."
_KEY = "Check this node's ClientOnionAuthDir (in torrc), and that its Tor can read the key there."
_PATIENCE = "Tor tries other ways by itself; if it goes on, look into the logs of both Tors."
_REPLIES = {
    0x01: ("it failed, and does not say why", _LOOK),
    0x02: ("its rules do not allow that connection", "Allow it in the proxy's configuration."),
    0x03: ("it does not reach the server's network", "Check the proxy's own way out."),
    0x04: (
        "it does not find the server, or its machine is not up",
        "Check the name in the URL, and the server's machine.",
    ),
    0x05: (
        "at the server nobody listens on that port",
        "Check that the server runs, and the port in the URL.",
    ),
    0x06: ("the way from there to the server took too long", "Check the server's machine."),
    0x07: ("it makes no connections for others, or is no SOCKS5 proxy", _LOOK),
    0x08: ("it does not take that kind of address", "Name the server in another way in the URL."),
}
"""What a SOCKS5 proxy answers (RFC 1928): what it means, and what to do."""
_OF_AN_ONION = {
    0x01: (
        "Tor failed, and does not say why; it may have no connection yet",
        "Look into its log: it must have come to `Bootstrapped 100%`.",
    ),
    0x04: (
        "Tor finds no such service: it is not up, or this node has no key for it",
        f"{_UP} {_KEY} With `SocksPort 9050 ExtendedErrors` in torrc Tor tells which it is.",
    ),
    0x05: (
        "the onion service is up, but nobody listens behind that port",
        "Check that the backup server runs, and HiddenServicePort on its machine.",
    ),
    0x06: ("the way through Tor took too long", _PATIENCE),
    # With ExtendedErrors.
    0xF0: ("there is no descriptor: the onion service is not up, or never was", _UP),
    0xF1: ("the onion service's descriptor is not valid", "Update Tor on both machines."),
    0xF2: ("the onion service has gone: it answers none of its introductions", _UP),
    0xF3: ("the onion service does not meet this node's Tor", _PATIENCE),
    0xF4: ("the onion service wants a key of its clients, and this node has none", _KEY),
    0xF5: ("the onion service does not take this node's key", _KEY),
    0xF6: ("Tor says that this is no onion name", "Check the name in the URL."),
    0xF7: ("the onion service does not answer in time", _PATIENCE),
}
"""What Tor answers for an onion service (also its SOCKS extensions, proposal 304)."""


class NoWay(OSError):
    """A proxy did not lead to the server, or a stranger has taken its place.

    Args:
        problem: why, without an end.
        next_step: what the operator should do now.
    """

    def __init__(self, problem: str, next_step: str) -> None:
        self.next_step = next_step
        super().__init__(problem)


def through(
    proxy: tuple[str, int], target: tuple[str, int], auth_file: str | None
) -> socket.socket:
    """A connection to ``target``, whose name ``proxy`` resolves.

    Args:
        auth_file: see ``read_auth``; None: the proxy asks for no password.

    Raises:
        NoWay: the proxy is not there, is none, refuses, or does not get to the target.
        ConfigError, DiskError: there is something wrong with the file.
    """
    import socks  # Only those who use a proxy need it.

    user, password = read_auth(auth_file) if auth_file else (None, None)
    host, port = proxy
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        # An onion name means nothing to anybody else: so the proxy resolves it.
        sock: socket.socket = socks.create_connection(
            target,
            timeout=PROXY_TIMEOUT_S,
            proxy_type=socks.SOCKS5,
            proxy_addr=host,
            proxy_port=port,
            proxy_rdns=True,
            proxy_username=user,
            proxy_password=password,
        )
    except (socket.gaierror, socks.ProxyConnectionError) as error:
        raise NoWay(
            f"the proxy {shown} is not there ({getattr(error, 'socket_err', error)})",
            "Check that it runs (Tor: `systemctl status tor@default`), and proxy= in the URL.",
        ) from error
    except socks.ProxyError as error:
        # PySocks wraps its own errors, too.
        problem, next_step = _meaning(error.socket_err or error, target[0], auth_file)
        raise NoWay(f"through the proxy {shown}: {problem}", next_step) from error
    return sock


def _meaning(error: OSError, name: str, auth_file: str | None) -> tuple[str, str]:
    """What ``error`` of the proxy means for who wanted to reach ``name``, and what to do."""
    import socks

    if isinstance(error, socks.SOCKS5Error):
        code = int(str(error).partition(":")[0], 16)
        replies = _REPLIES | _OF_AN_ONION if is_onion(name) else _REPLIES
        problem, next_step = replies.get(code, ("it failed in a way of its own", _LOOK))
        return f"{problem} (SOCKS 0x{code:02X})", next_step
    if isinstance(error, socks.SOCKS5AuthError):
        if auth_file:
            return (
                f"it does not take the user and password in {auth_file}",
                "Compare them with the proxy's configuration.",
            )
        return (
            "it asks for a user and a password",
            "Write them as one line user:password into a file with mode 600, and name that in the"
            " URL with proxy_auth=/path/to/file.",
        )
    if isinstance(error, TimeoutError):
        return f"no answer within {PROXY_TIMEOUT_S:.0f} s", _LOOK
    if isinstance(error, socks.GeneralProxyError):
        # It closed the connection, or said what no SOCKS5 proxy says.
        return (
            "what listens there does not answer as a SOCKS5 proxy does",
            "See with `ss -ltnp` which program has that port; Tor's is 9050.",
        )
    return f"the connection was lost ({error})", _LOOK


def is_onion(host: str) -> bool:
    """Whether ``host`` is a name that only Tor can resolve."""
    return host.lower().rstrip(".").rpartition(".")[2] == "onion"


def read_auth(path: str) -> tuple[str, str]:
    """User and password for a proxy: the file ``path`` is one line ``user:password``.

    Raises:
        ConfigError: others than its owner may read it, or it is of another form.
        DiskError: it cannot be read.
    """
    try:
        # A pipe must not keep the node waiting.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise ConfigError(
                    f"Others can read {path}, the password for the proxy.",
                    f"Run `chmod 600 {shlex.quote(path)}`.",
                )
            data = file.read(2 * MAX_NAME_SIZE + 4) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise DiskError(path, error, "read") from error
    user, _, password = data.removesuffix(b"\n").removesuffix(b"\r").partition(b":")
    sizes = range(1, MAX_NAME_SIZE + 1)
    try:
        if len(user) in sizes and len(password) in sizes and b"\n" not in data[:-1]:
            return user.decode(), password.decode()
    except UnicodeDecodeError:
        pass
    raise ConfigError(
        f"{path} is not one line user:password, each of 1 to {MAX_NAME_SIZE} bytes.",
        "Write the proxy's user and password there.",
    )
