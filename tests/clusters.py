"""Real PostgreSQL: a primary and a synchronous standby, made by examples/two-clusters.

The fixture ``pair`` (conftest.py) gives each test the same two, again as they were made: ``a`` is
the primary and demands ``b``, which streams. They end with pytest, also when that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests import support

SCRIPT = support.ROOT / "examples" / "two-clusters"
SETTINGS = """
shared_buffers = 4MB
autovacuum_naptime = 10min
log_min_messages = warning
listen_addresses = '*'
dynamic_shared_memory_type = mmap
"""
"""What these clusters have besides what the script gives. fsync stays on, and a
server that is killed leaves nothing in /dev/shm."""
EVERYBODY = (
    "local all all trust\nhost all all all scram-sha-256\nhost replication all all scram-sha-256\n"
)
NAMES = ("a", "b")


def missing() -> str | None:
    """Why no clusters can be had here, or None."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed: make install POSTGRES=1"
    if shutil.which("pg_config") is None and not list(Path("/usr/lib/postgresql").glob("*/bin")):
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "PostgreSQL does not run as root, and setpriv is not on PATH"
    return None


def new_place() -> Path:
    """A directory for a pair, which is not there yet: in memory, where that is possible."""
    return Path(support.FAST or "/tmp") / f"clusters-{secrets.token_hex(4)}"


def bindir() -> Path:
    """Where PostgreSQL's programs are: the newest that is here."""
    found = [
        path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "initdb").exists()
    ]
    if not found:
        return Path(run("pg_config", "--bindir").strip())
    return max(found, key=lambda path: float(path.parent.name))


def as_owner() -> list[str]:
    """What goes before a command that runs as the user who owns the clusters."""
    if os.geteuid() != 0:
        return []
    name = "nobody"
    with contextlib.suppress(KeyError):
        name = pwd.getpwnam("postgres").pw_name
    group = str(pwd.getpwnam(name).pw_gid)
    return ["setpriv", "--reuid", name, "--regid", group, "--clear-groups"]


def run(*command: object, **options: Any) -> str:
    """What ``command`` prints; AssertionError, with all of it, if it fails."""
    # Into a file: a pipe would be held open by the servers that pg_ctl starts.
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd="/",
            timeout=support.ANSWER_S,
            **options,
        )
        said.seek(0)
        text = said.read()
    assert done.returncode == 0, f"{command}\n{text}"
    return text


def until(true: Callable[[], object], what: str) -> None:
    """Return when ``true()`` is; AssertionError if that takes as long as only a hang does."""
    end = time.monotonic() + support.ANSWER_S
    while not true():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.005)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, below those that the kernel gives to connections."""
    found: list[int] = []
    for port in itertools.count(11000 + os.getpid() * 7 % 18000):
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("0.0.0.0", port))
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError


class Cluster:
    """One PostgreSQL server in ``directory``, as examples/two-clusters made it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.data = directory / name / "data"
        self.log = directory / name / "log"
        self.settings = [self.data / "postgresql.auto.conf", directory / name / "own.conf"]
        """The files of what is its own."""
        self.sockets = directory / "run"
        self.port = int((directory / name / "port").read_text())
        self.host = "127.0.0.1"
        self.prefix: list[str] = []
        """What goes before the command that starts it."""

    def start(self) -> None:
        """Start it; it answers when this returns."""
        try:
            with adopting():
                self.run("start", "-l", self.log, "-w")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()}") from None

    def stop(self, mode: str = "fast") -> None:
        """Stop it, if it runs: ``fast`` as it should be, ``immediate`` by SIGQUIT."""
        if pids := self.pids():
            self.run("stop", "-m", mode, "-w")
            collect(pids[0])

    def kill(self) -> None:
        """End all its processes by SIGKILL, at once, as far as that goes."""
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(is_running, pids)), "its processes are gone")
        collect(*pids[:1])
        if pids:
            self._free_memory()

    def _free_memory(self) -> None:
        """What a loss of power frees: its piece of shared memory; a system has a few thousand."""
        lines = (self.data / "postmaster.pid").read_text().splitlines()
        if len(lines) > 6 and (words := lines[6].split()):
            subprocess.run(["ipcrm", "-m", words[1]], stderr=subprocess.DEVNULL, check=False)

    def freeze(self) -> None:
        """Let it hang: what is connected stays so, and nothing answers."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        for pid in self.pids():
            os.kill(pid, signal.SIGCONT)

    def pids(self) -> list[int]:
        """Its processes, the first one first; none if it does not run."""
        try:
            first = int((self.data / "postmaster.pid").read_text().split("\n")[0])
        except (FileNotFoundError, ValueError):
            return []
        return [first, *children(first)] if is_running(first) else []

    def run(self, action: str, *options: object) -> None:
        """pg_ctl ``action`` on it."""
        run(*self.prefix, *as_owner(), bindir() / "pg_ctl", action, "-D", self.data, *options)

    def connect(self, dbname: str = "postgres", **options: Any) -> Any:
        """A connection of the superuser that waits for no standby, by the socket."""
        import psycopg

        return psycopg.connect(
            host=str(self.sockets),
            port=self.port,
            user="postgres",
            dbname=dbname,
            options="-c synchronous_commit=local",
            autocommit=True,
            **options,
        )

    def sql(self, statement: str, *values: object, dbname: str = "postgres") -> list[Any]:
        """The rows of ``statement``, asked by the superuser."""
        with self.connect(dbname) as connection:
            cursor = connection.execute(statement, values or None)
            return list(cursor.fetchall()) if cursor.description else []

    def configure(self, name: str, value: str | None) -> None:
        """Set ``name`` for the server and reload it; None: back to what it was."""
        change = f"= '{value}'" if value is not None else ""
        self.sql(f"ALTER SYSTEM {'SET' if change else 'RESET'} {name} {change}")
        self.reload()

    def reload(self) -> None:
        """Let it read its files again; all of it has when this returns."""
        ((before,),) = self.sql("SELECT pg_conf_load_time()")
        self.sql("SELECT pg_reload_conf()")
        until(lambda: self.sql("SELECT pg_conf_load_time()") > [(before,)], "it is reloaded")

    def is_standby(self) -> bool:
        """Whether it follows somebody."""
        return (self.data / "standby.signal").exists()


class Pair:
    """The clusters ``a`` and ``b`` in ``directory``, and who of them is the primary."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ports = dict(zip(("PORT_A", "PORT_B"), map(str, free_ports(2)), strict=True))
        # Its input ends with this process, also when that is killed.
        destroy = 'cat >/dev/null; exec "$0" destroy "$1" >/dev/null 2>&1'
        self._keeper = subprocess.Popen(
            ["sh", "-c", destroy, SCRIPT, directory],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        with adopting():
            run(SCRIPT, "start", directory, env={**os.environ, **ports})
        self.clusters = {name: Cluster(directory, name) for name in NAMES}
        self.passfile = directory / "passfile"
        self._numbers = itertools.count(1)
        self._make_template()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def primary(self) -> Cluster:
        """Who is the primary, whether it runs or not."""
        return self.clusters[(self.directory / "primary").read_text().strip()]

    @property
    def standby(self) -> Cluster:
        """The other one."""
        (other,) = (cluster for cluster in self.clusters.values() if cluster is not self.primary)
        return other

    def url(
        self, *hosts: Cluster, user: str = "backup", dbname: str = "backup", **more: str
    ) -> str:
        """URL of both, or of ``hosts``; ``more`` are its parameters."""
        chosen = hosts or tuple(self.clusters.values())
        places = ",".join(f"{cluster.host}:{cluster.port}" for cluster in chosen)
        return f"postgresql://{user}@{places}/{dbname}?" + urlencode(
            {"passfile": str(self.passfile), **more}, safe="/"
        )

    def database(self, owner: str = "backup") -> str:
        """The name of a new, empty database."""
        name = f"backup{next(self._numbers)}"
        self.primary.sql(f"CREATE DATABASE {name} OWNER {owner}")
        return name

    def role(self, *granted: str) -> str:
        """The name of a new role, which may come in, and is in the roles ``granted``."""
        name = f"role{next(self._numbers)}"
        password = self.passfile.read_text().strip().rpartition(":")[2]
        self.primary.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        for other in granted:
            self.primary.sql(f"GRANT {other} TO {name}")
        return name

    def promote(self) -> None:
        """Make the standby the primary. The old one is left as it is: running, or not."""
        new = self.standby
        new.run("promote", "-w")
        self._primary_is(new)

    def rejoin(self) -> None:
        """Bring the old primary back as a standby; it streams when this returns."""
        self.standby.stop("immediate")
        with adopting():
            run(SCRIPT, "rejoin", self.directory)

    def await_streaming(self) -> None:
        """Return when the standby streams, and has all that the primary has."""
        caught_up = (
            "SELECT 1 FROM pg_stat_replication"
            " WHERE state = 'streaming' AND flush_lsn >= pg_current_wal_flush_lsn()"
        )
        until(lambda: self.primary.sql(caught_up), "the standby streams")

    def await_waiting(self) -> None:
        """Return when somebody waits for the standby."""
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: self.primary.sql(waits), "somebody waits for the standby")

    def is_as_made(self) -> bool:
        """Whether everybody runs with the place and the settings of the beginning."""
        return self._state() == self._as_made

    def reset(self) -> None:
        """Back to the first state, databases and roles included."""
        for cluster in self.clusters.values():
            cluster.kill()
        for name in (*NAMES, "archive", "primary"):
            run("rm", "-rf", self.directory / name)
            run("cp", "-a", self.directory / "template" / name, self.directory)
        self._start()

    def _state(self) -> object:
        return self.primary.name, [
            (cluster.pids()[:1], *(path.read_text() for path in cluster.settings))
            for cluster in self.clusters.values()
        ]

    def close(self) -> None:
        """Remove it."""
        self._keeper.communicate()

    def _make_template(self) -> None:
        with open(self.directory / "both.conf", "a") as file:
            file.write(SETTINGS)
        for cluster in (self.primary, self.standby):
            (cluster.data / "pg_hba.conf").write_text(EVERYBODY)
            cluster.stop()
        template = self.directory / "template"
        run(*as_owner(), "mkdir", template)
        run(
            "cp",
            "-a",
            *(self.directory / name for name in (*NAMES, "archive", "primary")),
            template,
        )
        self._start()

    def _start(self) -> None:
        self.primary.start()
        self.standby.start()
        self.await_streaming()
        self._as_made = self._state()

    def _primary_is(self, cluster: Cluster) -> None:
        (self.directory / "primary").write_text(f"{cluster.name}\n")


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Servers that are started in here become children of this process.

    A server that was killed is in the way of its successor until its parent has collected it,
    and an init may take seconds.
    """
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    prctl(set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(set_child_subreaper, 0, 0, 0, 0)


def collect(*pids: int) -> None:
    """Wait for those of ``pids`` that are children of this process."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def children(pid: int) -> Sequence[int]:
    """The processes that ``pid`` has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_running(pid: int) -> bool:
    """Whether ``pid`` is there, and more than what its parent has not yet collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
