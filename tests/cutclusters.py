"""What lies between a primary and its standby, so that it can be cut.

Cut means silence: nothing gets through, and nobody is told. ``Namespace`` puts the standby on a
machine of its own, as far as the network goes; ``Proxy`` needs no rights for that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Protocol

from tests.clusters import Cluster, Pair, run
from tests.cutproxy import CutProxy

NETWORK = 10 << 24 | 192 << 16
"""10.192.0.0/10: each process has two networks of four addresses of it."""


class Wire(Protocol):
    """What lies between."""

    def cut(self) -> None:
        """Let nothing through."""

    def mend(self) -> None:
        """Let all through again."""


def no_namespaces() -> str | None:
    """Why network namespaces cannot be had here, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    name = f"try{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    run("ip", "netns", "del", name)
    return None


@contextlib.contextmanager
def wire(pair: Pair) -> Iterator[Wire]:
    """A wire between the two that can be cut: the best that can be had here."""
    with proxy(pair) if no_namespaces() else namespace(pair) as found:
        yield found


@contextlib.contextmanager
def proxy(pair: Pair) -> Iterator[Wire]:
    """The standby gets to the primary through a proxy."""
    with CutProxy((pair.primary.host, pair.primary.port)) as found, Silence() as silence:
        follows(pair.standby, "127.0.0.1", found.port, pair)
        pair.standby.reload()
        pair.await_streaming()
        yield ProxyWire(found, silence)


class Silence:
    """A port that takes connections and says nothing."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.place: tuple[str, int] = self._listener.getsockname()

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


class ProxyWire:
    """See Wire."""

    def __init__(self, proxy: CutProxy, silence: Silence) -> None:
        self._proxy = proxy
        self._silence = silence
        self._target = proxy.target

    def cut(self) -> None:
        """See Wire."""
        self._proxy.target = self._silence.place
        self._proxy.hold()

    def mend(self) -> None:
        """See Wire. What was connected is not any more."""
        self._proxy.target = self._target
        self._proxy.cut_now()


@contextlib.contextmanager
def namespace(pair: Pair) -> Iterator[Wire]:
    """The standby runs in a network namespace with two links: to the primary, and to its clients.

    So its ``host`` is another one, and clients reach both also when the two do not see each other.
    """
    found = NamespaceWire()
    standby, host = pair.standby, pair.standby.host
    standby.stop()
    try:
        follows(standby, found.addresses[0], pair.primary.port, pair)
        follows(pair.primary, found.addresses[1], standby.port, pair)
        standby.prefix = ["ip", "netns", "exec", found.name]
        standby.host = found.addresses[3]
        standby.start()
        pair.await_streaming()
        yield found
    finally:
        standby.kill()
        standby.prefix, standby.host = [], host
        found.remove()


class NamespaceWire:
    """See Wire. ``addresses``: of the two ends of the wire, and of the two of the clients' link."""

    def __init__(self) -> None:
        self.name = f"cut{os.getpid()}"
        first = NETWORK + os.getpid() * 8 % (1 << 22)
        numbers = (first + 1, first + 2, first + 5, first + 6)
        self.addresses = [socket.inet_ntoa(number.to_bytes(4, "big")) for number in numbers]
        run("ip", "netns", "add", self.name)
        self._in(True, "link", "set", "lo", "up")
        for here, there, kind in zip(self.addresses[::2], self.addresses[1::2], "rc", strict=True):
            link = self._link(kind)
            run("ip", "link", "add", link, "type", "veth", "peer", "name", link, "netns", self.name)
            for inside, address in ((False, here), (True, there)):
                self._in(inside, "address", "add", f"{address}/30", "dev", link)
                self._in(inside, "link", "set", link, "up")

    def _link(self, kind: str) -> str:
        return f"{kind}{os.getpid()}"

    def _in(self, inside: bool, *words: str) -> None:
        run("ip", *(("-n", self.name) if inside else ()), *words)

    def _neighbours(self, *state: str) -> None:
        for inside in (False, True):
            other = self.addresses[1 - inside]
            self._in(inside, "neigh", "replace", other, "dev", self._link("r"), *state)

    def cut(self) -> None:
        """See Wire."""
        # Each sends to a card that nobody has: no carrier is lost, and no route.
        self._neighbours("lladdr", "02:00:00:00:00:01", "nud", "permanent")

    def mend(self) -> None:
        """See Wire. What was connected still is."""
        self._neighbours("nud", "probe")

    def remove(self) -> None:
        """Take it away."""
        for kind in "rc":
            run("ip", "link", "del", self._link(kind))
        run("ip", "netns", "del", self.name)


def follows(cluster: Cluster, host: str, port: int, pair: Pair) -> None:
    """Let ``cluster``, if it is a standby, go to ``host`` from its next start or reload on."""
    with open(cluster.settings[-1], "a") as file:
        file.write(
            f"primary_conninfo = 'host={host} port={port} user=replicator"
            f" passfile={pair.passfile}'\n"
        )
