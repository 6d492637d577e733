"""The onion service as docs/onion.md has it: by Tor's own check, and in a Tor network of ours."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remote.proxy import is_onion
from tests import peers, support
from tests.peers import ServerProcess
from tests.test_contrib import DOCS
from tests.test_readme import blocks
from tests.whole.test_remote import check_way, needs

TOR = "debian-tor"
AUTHORITIES, RELAYS = 3, 3
BOOTSTRAP_S = 400.0
"""For a network that votes every 20 seconds to have a circuit of each kind."""
NETWORK = """
TestingTorNetwork 1
ShutdownWaitLength 0
AssumeReachable 1
VanguardsLiteEnabled 0
Log notice stdout
"""
RELAY = """
Address 127.0.0.1
ExitPolicy reject *:*
SocksPort 0
"""
AUTHORITY = """
AuthoritativeDirectory 1
V3AuthoritativeDirectory 1
ContactInfo nobody@invalid
TestingDirAuthVoteExit *
TestingDirAuthVoteHSDir *
TestingDirAuthVoteGuard *
V3AuthNIntervalsValid 2
TestingV3AuthInitialVotingInterval 5
TestingV3AuthInitialVoteDelay 2
TestingV3AuthInitialDistDelay 2
V3AuthVotingInterval 20
V3AuthVoteDelay 4
V3AuthDistDelay 4
"""


def shown(*parts: str, info: str = "") -> str:
    """The block of the page that holds ``parts``."""
    (found,) = [
        text
        for kind, text in blocks(DOCS / "onion.md")
        if kind == info and all(part in text for part in parts)
    ]
    return found


def service_lines(directory: Path, sock: Path) -> str:
    """What the page has in the torrc of the backup's machine, with these places."""
    lines = shown("HiddenServicePort").replace("/var/lib/tor/node-backup/", f"{directory}/")
    assert "unix:/run/node-backup/server.sock" in lines
    return lines.replace("/run/node-backup/server.sock", str(sock))


def client_lines(directory: Path, port: int) -> str:
    """And what it has in the node's."""
    lines = shown("ClientOnionAuthDir").replace("/var/lib/tor/onion-auth", str(directory))
    return lines.replace("SocksPort 9050", f"SocksPort {port}")


def key_pair(tmp_path: Path) -> tuple[str, str]:
    """Private and public half, as the page makes them."""
    script = shown("openssl", info="sh")
    made = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    private, public = made.stdout.split()
    return private, public


def test_tor_takes_the_lines_of_the_page(tmp_path: Path) -> None:
    (tor,) = needs("tor")
    (tmp_path / "auth").mkdir(mode=0o700)
    lines = service_lines(tmp_path / "service", tmp_path / "server.sock")
    lines += client_lines(tmp_path / "auth", peers.free_port())
    (tmp_path / "torrc").write_text(f"DataDirectory {tmp_path}/data\n{lines}")
    command = [tor, "--verify-config", "-f", str(tmp_path / "torrc")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=support.ANSWER_S)
    assert done.returncode == 0, done.stdout


class Network:
    """Authorities, relays and clients of a Tor network of its own, below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        (self._tor, self._gencert) = needs("tor", "tor-gencert")
        self._processes: list[subprocess.Popen[Any]] = []
        self._authorities = ""
        prepared = [self._prepare(f"authority{number}") for number in range(AUTHORITIES)]
        for name, lines in prepared:
            self._start(name, NETWORK + RELAY + AUTHORITY + lines)
        for number in range(RELAYS):
            lines = f"Nickname relay{number}\nORPort {peers.free_port()}\n"
            self._start(f"relay{number}", NETWORK + RELAY + lines)

    def _prepare(self, name: str) -> tuple[str, str]:
        """Make the keys of an authority, and the line that names it to all."""
        keys = self.directory(name) / "keys"
        keys.mkdir(mode=0o700)
        to, direct = peers.free_port(), peers.free_port()
        command = [self._gencert, "--create-identity-key", "--passphrase-fd", "0", "-m", "12"]
        subprocess.run(
            [*command, "-a", f"127.0.0.1:{direct}"],
            cwd=keys,
            input=b"none\n",
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        certificate = (keys / "authority_certificate").read_text()
        (identity,) = re.findall(r"^fingerprint (\S+)$", certificate, re.MULTILINE)
        command = [self._tor, "-f", "/dev/null", "--ignore-missing-torrc", "--quiet"]
        command += ["--DataDirectory", str(keys.parent), "--ORPort", "1", "--Nickname", name]
        said = subprocess.run([*command, "--list-fingerprint"], capture_output=True, text=True)
        fingerprint = "".join(said.stdout.split()[1:])
        self._authorities += (
            f"DirAuthority {name} orport={to} no-v2 v3ident={identity}"
            f" 127.0.0.1:{direct} {fingerprint}\n"
        )
        return name, f"Nickname {name}\nORPort {to}\nDirPort {direct}\n"

    def directory(self, name: str) -> Path:
        """The data directory of the process ``name``."""
        directory = self._root / name
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    def _start(self, name: str, lines: str) -> None:
        directory = self.directory(name)
        torrc = self._root / f"{name}.torrc"
        torrc.write_text(f"DataDirectory {directory}\n{self._authorities}{lines}")
        with (self._root / f"{name}.log").open("wb") as log:
            command = [self._tor, "-f", str(torrc)]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def client(self, name: str, lines: str) -> None:
        """Start a Tor that is no relay."""
        self._start(name, NETWORK + lines)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(support.ANSWER_S)

    def logs(self) -> str:
        """The end of each log."""
        found = sorted(self._root.glob("*.log"))
        return "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in found)


@pytest.fixture
def network() -> Iterator[Network]:
    # Others must be able to go there: Tor runs as a user of its own.
    with tempfile.TemporaryDirectory(prefix="onion-") as root:
        Path(root).chmod(0o711)
        made = Network(Path(root))
        try:
            yield made
        finally:
            made.close()


def answered(url: str, network: Network) -> None:
    """Wait until the server behind ``url`` answers."""
    deadline = time.monotonic() + BOOTSTRAP_S
    while support.run_cli("status", url, check=None).returncode != 0:
        assert time.monotonic() < deadline, network.logs()


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0, reason="acts as the server's user and as Tor's: needs root")
def test_only_the_node_with_the_key_reaches_the_server(
    network: Network, url: str, node_dir: Path, tmp_path: Path
) -> None:
    try:
        tor = pwd.getpwnam(TOR)
    except KeyError:
        pytest.skip(f"there is no user {TOR}")
    support.make_backup(url)
    service = network.directory("service")
    run, hidden = network.directory("run"), service / "node-backup"
    os.chown(run, 0, tor.pw_gid)
    run.chmod(0o750)
    sock = run / "server.sock"
    private, public = key_pair(tmp_path)
    (hidden / "authorized_clients").mkdir(parents=True, mode=0o700)
    hidden.chmod(0o700)
    allowed = hidden / "authorized_clients" / "node.auth"
    allowed.write_text(shown("PUBLIC").replace("PUBLIC", public))
    for path in (service, hidden, allowed.parent, allowed):
        os.chown(path, tor.pw_uid, tor.pw_gid)
    (options,) = re.findall(r'"OPTIONS=(.*)"', shown("OPTIONS", info="ini"))
    with ServerProcess(url, address=f"unix:{sock}", options=options.split()) as server:
        network.client("service", f"User {TOR}\nSocksPort 0\n{service_lines(hidden, sock)}")
        ports = peers.free_port(), peers.free_port()
        name = hostname(hidden)
        auth = network.directory("auth")
        key = shown("PRIVATE").replace("NAME", name.removesuffix(".onion"))
        (auth / "node-backup.auth_private").write_text(key.replace("PRIVATE", private))
        network.client("node", client_lines(auth, ports[0]))
        network.client("other", client_lines(network.directory("empty"), ports[1]))
        way, other = (f"socket:{name}:8700?proxy=socks5:127.0.0.1:{port}" for port in ports)
        answered(way, network)
        assert server.logged(f"user {TOR}")
        check_way(f"{way}&retry_for=600", node_dir, tmp_path)
        deadline = time.monotonic() + BOOTSTRAP_S
        said = ""
        while "key" not in said:  # Not because its Tor is not ready yet.
            assert time.monotonic() < deadline, said + network.logs()
            said = support.run_cli("status", other, check=1).stderr
        assert "wants a key of its clients" in said


def hostname(hidden: Path) -> str:
    """The name of the service, once Tor has made it."""
    path = hidden / "hostname"
    deadline = time.monotonic() + support.ANSWER_S
    while not path.exists() or not is_onion(path.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return path.read_text().strip()
