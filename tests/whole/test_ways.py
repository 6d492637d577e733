"""The ways to a server as their pages in docs/ have them: two machines, sshd and the units.

A ``Machine`` is a mount namespace with its own /etc, /run and /var/lib. The pages' commands run
there and their files are put where they say, so that what is tested is what is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import peers, support
from tests.support import PluginProcess, first_changes
from tests.test_contrib import CONTRIB, DOCS, server_command, setting
from tests.test_readme import blocks
from tests.test_server import eventually
from tests.whole.test_remote import listens, needs

if os.geteuid() != 0:
    pytest.skip("makes users and mounts: needs root", allow_module_level=True)

SYSTEMD = CONTRIB / "systemd"
HOME = "/var/lib/bitcoin"
"""The node's user's, in place of /home/bitcoin: the code under test may lie in /home."""
NODE_DIR = f"{HOME}/.lightning/bitcoin"
SETUP = """
set -e
mount -t tmpfs -o mode=755 tmpfs /var/lib
cp -a /etc /var/lib/etc
mount --bind /var/lib/etc /etc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd /etc/tmpfiles.d /etc/ssh/sshd_config.d
rm -f /etc/ssh/sshd_config.d/* /etc/ssh/ssh_config.d/* /etc/ssh/*host*
ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key
echo ready
exec cat
"""
SUDO = """#!/bin/sh
[ "$1" = -u ] || exec "$@"
user=$2
shift 2
exec setpriv --reuid="$user" --regid="$user" --init-groups -- "$@"
"""
SSHD = """
Include /etc/ssh/sshd_config.d/*.conf
ListenAddress 127.0.0.1:{port}
PidFile none
UsePAM no
PasswordAuthentication no
"""
SSH = "Host *.example.org\n    HostName 127.0.0.1\n    Port {port}\n"
READING = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""Lets a user execute the code here, wherever it lies. A socket asks for the right to write."""


class Service:
    """A process that is started again whenever it ends, as Restart=always does."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command, self._log = command, log
        self._lock = threading.Lock()
        self._stopped = False
        self._start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _watch(self) -> None:
        ended = threading.Event()
        while not self._stopped:
            self.process.wait()
            ended.wait(0.1)
            with self._lock:
                if not self._stopped:
                    self._start()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        self.process.kill()
        self.process.wait(support.ANSWER_S)


class Machine:
    """A machine with its own files and users.

    Args:
        directory: for what is of no machine: logs and the programs that do nothing here.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.services: list[Service] = []
        programs = directory / "bin"
        programs.mkdir(parents=True)
        for name in ("sudoedit", "systemctl"):
            (programs / name).write_text("#!/bin/sh\n")
        (programs / "sudo").write_text(SUDO)
        for program in programs.iterdir():
            program.chmod(0o755)
        self._path = f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._anchor = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", SETUP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._anchor.stdout is not None
        if self._anchor.stdout.readline() != "ready\n":
            pytest.skip("this system lets nobody mount")
        self._enter = ["nsenter", "-m", "-t", str(self._anchor.pid), "--"]

    def close(self) -> None:
        for service in self.services:
            service.stop()
        self._anchor.kill()
        self._anchor.wait(support.ANSWER_S)

    def path(self, path: str) -> Path:
        """``path`` of this machine, seen from here."""
        return Path(f"/proc/{self._anchor.pid}/root{path}")

    def run(self, script: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run what a page or a test types."""
        done = subprocess.run(
            [*self._enter, "bash", "-euo", "pipefail", "-c", script],
            env=os.environ | {"PATH": self._path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=support.ANSWER_S,
        )
        assert check is None or done.returncode == check, f"{script}\n{done.stdout}{done.stderr}"
        return done

    def write(self, path: str, text: str) -> None:
        """As an editor does: owner and mode of a file that is there stay."""
        self.path(path).write_text(text)

    def program(self, user: str, program: Path, *words: object) -> list[str]:
        """``program`` of this plugin, run by ``user`` in the node's directory."""
        as_user = [f"--reuid={user}", f"--regid={user}", "--init-groups", *READING]
        there = ["env", "-C", NODE_DIR if user == "bitcoin" else "/"]
        command = [*self._enter, "setpriv", *as_user, "--", *there, sys.executable, str(program)]
        return [*command, *map(str, words)]

    def cli(self, user: str, *words: object, check: int = 0) -> str:
        """What backup-cli prints to ``user``; ``check`` is the exit code that must come out."""
        command = self.program(user, support.CLI, *words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=support.ANSWER_S)
        assert done.returncode == check, done.stderr
        return done.stdout + done.stderr

    def sshd(self, port: int) -> Service:
        self.write("/etc/ssh/sshd_config", SSHD.format(port=port))
        (path,) = needs("sshd")
        return self._serve([path, "-D", "-e"], "sshd")

    def unit(self, name: str, words: list[str] | None = None) -> Service:
        """Start the unit ``name`` as systemd does, or ``words`` in place of its ExecStart."""
        unit = SYSTEMD / f"{name}.service"
        user = setting(unit, "User")
        if "\nRuntimeDirectory=" in unit.read_text():
            place, mode = setting(unit, "RuntimeDirectory"), setting(unit, "RuntimeDirectoryMode")
            self.run(f"install -d -o {user} -g {user} -m {mode} /run/{place}")
        if words is None:
            words = shlex.split(setting(unit, "ExecStart").replace("/home/bitcoin", HOME))
        if words[0].endswith("/backup-cli"):
            return self._serve(self.program(user, support.CLI, *words[1:])[5:], name)
        return self._serve(["sudo", "-u", user, *words], name)

    def _serve(self, command: list[str], name: str) -> Service:
        if command[0] == "sudo":
            command = [str(self._directory / "bin" / "sudo"), *command[1:]]
        service = Service([*self._enter, *command], self._directory / f"{name}.log")
        self.services.append(service)
        return service

    def log(self, name: str) -> str:
        return (self._directory / f"{name}.log").read_text()


@contextlib.contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    needs("unshare", "nsenter", "setpriv", "sshd", "ssh", "useradd", "systemd-tmpfiles")
    made = Machine(directory)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Machine]:
    """The node's machine, with its user."""
    with machine(tmp_path / "node") as made:
        made.run(f"useradd --create-home --home-dir {HOME} bitcoin")
        made.run(f"sudo -u bitcoin mkdir -p {NODE_DIR}")
        yield made


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Machine]:
    """The backup's machine, with the server's user and an empty backup."""
    with machine(tmp_path / "keeper") as made:
        account = next(text for _, text in blocks(DOCS / "remote.md") if "useradd" in text)
        made.run("\n".join(line for line in account.splitlines() if "/opt/" not in line))
        made.cli("node-backup", "init", "file:///var/lib/node-backup/node.bkp")
        yield made


def only(page: str, *parts: str) -> str:
    """The one block of ``page`` that holds all of ``parts``."""
    found = [text for _, text in blocks(DOCS / page) if all(part in text for part in parts)]
    assert len(found) == 1, (page, parts)
    return found[0].replace("/home/bitcoin", HOME)


def allow(host: Machine, page: str, user: str, home: str, public: str) -> int:
    """Do what ``page`` says on the machine of the account ``user``; the port of its sshd."""
    line = only(page, "ssh-ed25519 AAAA...")
    host.run(only(page, f"install -d -o {user}"))
    host.run(f"usermod -p '*' {user}")  # Without PAM, sshd takes what useradd makes for locked.
    host.write(f"{home}/.ssh/authorized_keys", line.replace("ssh-ed25519 AAAA...", public))
    host.write(f"/etc/ssh/sshd_config.d/{user}.conf", only(page, f"Match User {user}\n"))
    port = peers.free_port()
    host.sshd(port)
    host.run(only(page, "sshd -t"))
    return port


def meet(host: Machine, home: str, port: int) -> None:
    """First contact with the sshd at ``port``, for the user with that ``home``."""
    host.write("/etc/ssh/ssh_config", SSH.format(port=port))
    eventually(lambda: listens(port))
    host.run(f"ssh-keyscan -t ed25519 -p {port} 127.0.0.1 > {home}/.ssh/known_hosts")


def sessions(service: Service, user: str) -> list[int]:
    """The processes of an sshd that are ``user``'s."""
    found, left = [], [service.process.pid]
    while left:
        pid = left.pop()
        with contextlib.suppress(OSError):
            left += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            if re.match(rf"sshd(-session)?: {user}", command) and "[priv]" not in command:
                found.append(pid)
    return found


def breaks(line: Service, sshd: Service, user: str) -> list[Callable[[], None]]:
    """Ways to break a line at either side, where it does not expect it."""

    def kill_sessions() -> None:
        found = sessions(sshd, user)
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    return [line.process.kill, kill_sessions, lambda: line.process.kill()]


def check_socket(host: Machine, path: str, user: str) -> None:
    """Wait for the socket ``path``, which ``user`` may use and a stranger not."""
    eventually(host.path(path).is_socket)
    host.run(f"sudo -u {user} test -w {path}; sudo -u daemon test ! -e {path}")


def check_line(node: Machine, url: str, breaks: list[Callable[[], None]], tmp_path: Path) -> None:
    """A node's life at ``url``; before each change but the first, one of ``breaks``."""
    calls = first_changes(len(breaks) + 1)
    check_socket(node, "/run/node-backup-line/server.sock", "bitcoin")
    node.cli("bitcoin", "init", "--lightning-dir", NODE_DIR, url)
    with PluginProcess(tmp_path, node.program("bitcoin", support.PLUGIN)) as plugin:
        plugin.manifest()
        plugin.write(*calls[0])
        for act, call in zip(breaks, calls[1:], strict=True):
            act()
            plugin.write(*call)
        assert plugin.errors() == []
    node.cli("bitcoin", "verify", url)
    assert f"version:        {len(calls)}\n" in node.cli("bitcoin", "status", url)


def ssh_of(unit: str) -> tuple[list[str], str]:
    """The ssh of the line ``unit`` up to its forward, run by its user, and where it goes."""
    file = SYSTEMD / f"{unit}.service"
    words = shlex.split(setting(file, "ExecStart").replace("/home/bitcoin", HOME))
    return ["sudo", "-u", setting(file, "User"), *words[:-3]], words[-1]


def check_refused(host: Machine, unit: str, forward: str, says: str) -> None:
    """The line ``unit`` ends, and says so, when it asks for ``forward``."""
    ssh, target = ssh_of(unit)
    done = host.run(f"timeout 60 {shlex.join(ssh)} {forward} {target}", check=None)
    assert done.returncode == 255 and says in done.stderr, done.stderr


def check_key(host: Machine, unit: str, other: Machine) -> None:
    """The key of the line ``unit`` opens no port and no socket of ``other`` but its own."""
    ssh, target = ssh_of(unit)
    with listening(other.path("/run/lightning-rpc")) as came, listening(0) as came_by_port:
        check_refused(host, unit, f"-W {address(came_by_port)}", "prohibited")
        port = peers.free_port()
        check_refused(host, unit, f"-R 127.0.0.1:{port}:127.0.0.1:1", "forwarding failed")
        done = host.run(shlex.join([*(w for w in ssh if w != "-N"), target, "echo a shell"]), None)
        assert "a shell" not in done.stdout
        line = host.unit(unit, [*ssh[3:], "-L", f"127.0.0.1:{port}:/run/lightning-rpc", target])
        eventually(lambda: listens(port))
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(support.ANSWER_S)
            assert sock.recv(1) == b""
        line.stop()
        for listener in came, came_by_port:
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


def check_silent_break(node: Machine, url: str, line: Service, keeper: Machine) -> None:
    """What is left of a line at the node, whose other end does not answer, is in nobody's way."""
    sock = node.path("/run/node-backup-line/server.sock")
    before = sock.lstat().st_ino
    line.process.send_signal(signal.SIGSTOP)
    after = keeper.unit("node-backup-line-reverse")
    eventually(lambda: sock.exists() and sock.lstat().st_ino != before)
    node.cli("bitcoin", "status", url)
    after.stop()


def address(listener: socket.socket) -> str:
    return "{}:{}".format(*listener.getsockname())


def forget_match(host: Machine, user: str, sshd: Service, port: int) -> None:
    """Leave the account ``user`` to what its key's line says."""
    host.path(f"/etc/ssh/sshd_config.d/{user}.conf").unlink()
    before = sshd.process
    before.kill()
    eventually(lambda: sshd.process is not before and listens(port))


@contextlib.contextmanager
def listening(place: Path | int) -> Iterator[socket.socket]:
    """Something that everybody may connect to."""
    is_port = isinstance(place, int)
    with socket.socket(socket.AF_INET if is_port else socket.AF_UNIX) as listener:
        listener.bind(("127.0.0.1", place) if is_port else str(place))
        if isinstance(place, Path):
            place.chmod(0o666)
        listener.listen()
        yield listener


def test_ssh_to_the_backup(node: Machine, keeper: Machine, tmp_path: Path) -> None:
    page = "ssh-to-backup.md"
    node.run(only(page, "ssh-keygen"))
    public = node.path(f"{HOME}/.ssh/node-backup.pub").read_text()
    keeper.unit("node-backup", server_command({}))
    port = allow(keeper, page, "node-backup", "/var/lib/node-backup", public)
    meet(node, HOME, port)
    sshd, line = keeper.services[-1], node.unit("node-backup-line")
    (url,) = re.findall(r'"(socket:.*)"', only(page, "backup-cli status"))
    check_line(node, url, breaks(line, sshd, "node-backup"), tmp_path)
    line.stop()
    own_place = "-R /var/lib/node-backup/other.sock:/nowhere"
    check_refused(node, "node-backup-line", own_place, "forwarding failed")
    forget_match(keeper, "node-backup", sshd, port)
    check_key(node, "node-backup-line", keeper)


def test_ssh_to_the_node(node: Machine, keeper: Machine, tmp_path: Path) -> None:
    page = "ssh-to-node.md"
    keeper.run(only(page, "ssh-keygen"))
    public = keeper.path("/var/lib/backup-line/.ssh/id_ed25519.pub").read_text()
    keeper.run(only(page, "usermod"))
    (options,) = re.findall(r'"OPTIONS=(.*)"', only(page, "OPTIONS"))
    keeper.unit("node-backup", server_command({"OPTIONS": options}))
    node.write("/etc/tmpfiles.d/node-backup-line.conf", only(page, "2750"))
    port = allow(node, page, "backup-line", "/var/lib/backup-line", public)
    meet(keeper, "/var/lib/backup-line", port)
    sshd, line = node.services[-1], keeper.unit("node-backup-line-reverse")
    (url,) = re.findall(r'"(socket:.*)"', only(page, "backup-cli status"))
    check_line(node, url, breaks(line, sshd, "backup-line"), tmp_path)
    check_silent_break(node, url, line, keeper)
    line.stop()
    forget_match(node, "backup-line", sshd, port)
    check_key(keeper, "node-backup-line-reverse", node)


def test_who_may_only_read(keeper: Machine) -> None:
    (options,) = re.findall(r'"OPTIONS=(.*)"', only("remote.md", "--read-only"))
    text = (DOCS / "remote.md").read_text()
    (join,) = re.findall(r"`sudo (usermod -aG .* alice)`", text)
    (url,) = re.findall(r'`"(socket:.*read.sock.*)"`', text)
    keeper.run(f"useradd --create-home --home-dir /var/lib/alice alice; {join}")
    keeper.unit("node-backup", server_command({"OPTIONS": options}))
    check_socket(keeper, "/run/node-backup/read.sock", "alice")
    assert "version:        0\n" in keeper.cli("alice", "status", url)
    other = url.replace("read.sock", "server.sock")
    assert "may not use that socket" in keeper.cli("alice", "status", other, check=1)
