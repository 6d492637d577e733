"""A node's network directory: whether it is the right one, its lock files, its database."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import json
import os
import re
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import durable
from backend import NOBODY
from errors import CLI, BackupExists, ConfigError, DiskError

LOCK_NAME = "backup.lock"
DATABASE_NAME = "lightningd.sqlite3"
STANDBY_STATE = "backup.standby"
"""Says that the directory is a standby's: see standby/state.py."""
RPC_NAME = "lightning-rpc"
ANSWER_S = 10.0
PROC = "/proc"
"""Where the system tells of its processes; not on every one."""
LISTENER_S = 1.0
"""The longest wait for who may listen on lightningd's socket."""
NETWORKS = (
    *("bitcoin", "testnet", "testnet4", "signet", "regtest"),
    *("liquid", "liquid-regtest", "litecoin", "litecoin-testnet"),
)


@dataclass(frozen=True, slots=True)
class LockFile:
    """What backup.lock says: JSON ``{"backend_url": "<url>", "owner": "<32 hex digits>"}``.

    A file of the earlier plugin has no owner. ``"compact"``, ``"heal"`` and ``"metrics"`` may be
    added by hand; what else is there stays. Several destinations are ``"backend_urls"``,
    ``"acks"`` and ``"epoch"`` (see quorum.Roster); then ``"backend_url"`` is the first of them.

    Attributes:
        compact: see compaction.parse_least; None if not given.
        owner: what the backup knows this node by, 16 bytes.
        wallet: the node's database, if it is not in the directory: a path, relative to that.
        node_id: which node the backup is of, in hex; None if that was not known yet.
        metrics: a file for the figures of monitoring.metrics, or None.
        heals: whether the plugin may bring the backup up to date by itself: ``"heal": "off"``.
        lost_state: when a start was last refused because the node seemed to have lost some
            state, in words, or None. It never heals from then on until `resync` or `attach`.
        others: keys that are not known here, and their values.
        backend_urls: all of several destinations, else empty.
        acks: how many of them acknowledge.
        epoch: of the list of them.
    """

    backend_url: str
    compact: object = None
    owner: bytes = NOBODY
    wallet: str | None = None
    node_id: str | None = None
    heals: bool = True
    lost_state: str | None = None
    metrics: str | None = None
    others: Mapping[str, object] = field(default_factory=dict)
    backend_urls: tuple[str, ...] = ()
    acks: int = 1
    epoch: int = 0

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all destinations."""
        return self.backend_urls or (self.backend_url,)

    def as_json(self) -> bytes:
        """The file's content."""
        content: dict[str, object] = {**self.others, "backend_url": self.backend_url}
        if self.owner != NOBODY:
            content["owner"] = self.owner.hex()
        if self.compact is not None:
            content["compact"] = self.compact
        if self.wallet is not None:
            content["wallet"] = self.wallet
        if self.node_id is not None:
            content["node_id"] = self.node_id
        if not self.heals:
            content["heal"] = "off"
        if self.metrics is not None:
            content["metrics"] = self.metrics
        if self.lost_state is not None:
            content["lost_state"] = self.lost_state
        if self.backend_urls:
            content["backend_urls"] = list(self.backend_urls)
            content["acks"], content["epoch"] = self.acks, self.epoch
        return json.dumps(content).encode()


TEXTS = ("wallet", "node_id", "lost_state", "metrics")
"""Keys of backup.lock whose value is a string."""


def _parse_lock_file(content: Any) -> LockFile:
    """Raises ConfigError, or ValueError, TypeError or KeyError for what is damaged."""
    others = dict(content)
    url, compact = others.pop("backend_url"), others.pop("compact", None)
    if not isinstance(url, str):
        raise TypeError("backend_url is no string")
    url.encode(errors="surrogateescape")  # JSON can hold what is no text, nor bytes.
    owner = bytes.fromhex(others.pop("owner", NOBODY.hex()))
    if len(owner) != len(NOBODY):
        raise ValueError("owner is not of 16 bytes")
    texts = {name: others.pop(name, None) for name in TEXTS}
    for name, text in texts.items():
        if text is not None and (not isinstance(text, str) or "\0" in text):
            raise TypeError(f"{name} is no string")
        (text or "").encode(errors="surrogateescape")
    heal = others.pop("heal", "on")
    if heal not in ("on", "off"):
        raise ConfigError(f"heal is {heal!r:.40} in backup.lock.", 'Use "off", or leave it out.')
    urls, acks, epoch = _several(url, others)
    for each in urls:
        each.encode(errors="surrogateescape")
    return LockFile(
        url,
        compact,
        owner,
        heals=heal == "on",
        others=others,
        backend_urls=urls,
        acks=acks,
        epoch=epoch,
        **texts,
    )


def read_lock_file(directory: str) -> LockFile:
    """The backup.lock of the network directory ``directory``.

    Raises:
        ConfigError: it is missing, or not what it should be.
    """
    path = os.path.join(directory, LOCK_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return _parse_lock_file(content)
    except FileNotFoundError as error:
        next_step = (
            f"Stop lightningd and run `{CLI} init --lightning-dir {shlex.quote(directory)} URL`, or"
            " `attach` in place of `init` for a backup that exists."
        )
        if os.path.lexists(os.path.join(directory, STANDBY_STATE)):
            next_step = (
                "A standby is kept there: start no lightningd on it. If it is to take the node's"
                f" place, run `{CLI} promote --lightning-dir {shlex.quote(directory)}`."
            )
        raise ConfigError(
            f"Could not find backup.lock in the lightning-dir {directory}.", next_step
        ) from error
    except OSError as error:
        raise DiskError(path, error, "read") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f'{path} is damaged: it should read {{"backend_url": "<url>"}}.',
            f"Move it away and run `{CLI} attach --lightning-dir {shlex.quote(directory)} URL`.",
        ) from error


def _several(url: str, others: dict[str, Any]) -> tuple[tuple[str, ...], int, int]:
    """URLs, acknowledgements and epoch of several destinations; no URLs if there is one."""
    urls, acks, epoch = (others.pop(name, None) for name in ("backend_urls", "acks", "epoch"))
    if urls is None:
        return (), 1, 0
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise TypeError("backend_urls is no list of strings")
    if type(acks) is not int or type(epoch) is not int or not 1 <= acks <= len(urls):
        raise ValueError("acks or epoch is out of range")
    if urls[:1] != [url]:
        raise ValueError("backend_url is not the first of backend_urls")
    return tuple(urls), acks, epoch


def write_lock_file(
    directory: str, lock_file: LockFile, like: str | None = None, replace: bool = False
) -> None:
    """Write backup.lock.

    Args:
        like: the former one, whose owner and mode it gets.
        replace: in place of the one that is there; else BackupExists if there is one.
    """
    with new_lock_file(directory, lock_file, like, replace):
        pass


@contextlib.contextmanager
def new_lock_file(
    directory: str, lock_file: LockFile, like: str | None = None, replace: bool = False
) -> Iterator[None]:
    """``write_lock_file``, whose file gets its name once the block has ended well."""
    path = os.path.join(directory, LOCK_NAME)
    try:
        beside = durable.prepare(path, lock_file.as_json(), path if replace else like)
    except OSError as error:
        raise DiskError(path, error, "write") from error
    try:
        yield
        _publish(beside, path, replace)
    except BaseException:
        durable.discard(beside)
        raise


def _publish(beside: str, path: str, replace: bool) -> None:
    try:
        (durable.replace if replace else durable.publish)(beside, path)
    except FileExistsError as error:
        raise BackupExists(path) from error
    except OSError as error:
        raise DiskError(path, error, "write") from error


def is_network_dir(path: str) -> bool:
    """Whether ``path`` shows that it is a node's network directory."""
    return os.path.basename(path) in NETWORKS or any(
        os.path.lexists(os.path.join(path, name)) for name in (DATABASE_NAME, "hsm_secret")
    )


def network_dir(directory: str) -> str:
    """The absolute path of ``directory``, if it can be a node's network directory.

    Links stay: lightningd's pid file is in the directory that holds the name as configured.

    Raises:
        ConfigError: it is missing, or the base directory of several networks.
    """
    path = os.path.expanduser(directory)
    # Behind a link, "name/.." is not what it seems.
    path = os.path.realpath(path) if ".." in path.split(os.sep) else os.path.abspath(path)
    if not os.path.isdir(path):
        raise ConfigError(
            f"The directory {path} does not exist.",
            f"Check the path, or for a new node run `mkdir -p {shlex.quote(path)}`.",
        )
    if is_network_dir(path):
        return path
    inside = sorted(name for name in NETWORKS if os.path.isdir(os.path.join(path, name)))
    if inside or os.path.basename(path) == ".lightning":
        places = [os.path.join(path, name) for name in inside or ["bitcoin"]]
        right = " or ".join(map(shlex.quote, places))
        raise ConfigError(
            f"{path} is not a network directory: lightningd runs the plugin one level below.",
            f"Use --lightning-dir {right}.",
        )
    return path


def database(directory: str) -> str:
    """Path of the database in the network directory ``directory``, whether it is there or not.

    Raises:
        ConfigError: it is a link that leads nowhere: that is not a node without a database.
    """
    path = os.path.join(directory, DATABASE_NAME)
    if os.path.islink(path) and not os.path.exists(path):
        raise ConfigError(
            f"The node's database {path} is a link to {os.readlink(path)}, which is not there.",
            "If its disk is not mounted, mount it.",
        )
    return path


def wallet(directory: str, lock_file: LockFile) -> str:
    """Path of the node's database, where ``lock_file`` of ``directory`` says; see ``database``."""
    if lock_file.wallet is not None:
        return os.path.join(directory, lock_file.wallet)
    return database(directory)


@contextlib.contextmanager
def stopped(directory: str, wallet: str) -> Iterator[None]:
    """Make sure that no lightningd runs in ``directory``, and that none starts meanwhile.

    lightningd holds a lockf lock on ``lightningd-<network>.pid`` one level up, listens on
    ``lightning-rpc``, and has the database ``wallet`` open.

    Raises:
        ConfigError: it runs, or another process has the database open.
        DiskError: a pid file cannot be opened.
    """
    with contextlib.ExitStack() as locks:
        for path in _pid_files(directory):
            locks.enter_context(_locked(path, directory))
        socket_path = os.path.join(directory, RPC_NAME)
        if _is_listening(socket_path):
            raise ConfigError(
                f"lightningd is running in {directory}: it listens on {socket_path}.",
                f"Run `lightning-cli --rpc-file={shlex.quote(socket_path)} stop`, then try again.",
            )
        pid = next(_processes_with(wallet), None)
        if pid is not None:
            raise ConfigError(
                f"Process {pid}{_name_of(pid)} has the node's database {wallet} open.",
                "If it is lightningd, stop that; or else end it. Then try again.",
            )
        yield


def _pid_files(directory: str) -> Iterator[str]:
    """The pid files there are, by the directory's name as given and by its real one."""
    seen: set[str] = set()  # To close a lockf'd file's second descriptor gives up the lock.
    for path in (directory, os.path.realpath(directory)):
        base, network = os.path.split(path)
        pid_file = os.path.join(base, f"lightningd-{network}.pid")
        if os.path.lexists(pid_file) and os.path.realpath(pid_file) not in seen:
            seen.add(os.path.realpath(pid_file))
            yield pid_file


@contextlib.contextmanager
def _locked(path: str, directory: str) -> Iterator[None]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DiskError(path, error, "open") from error
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        base, network = os.path.dirname(path), os.path.basename(path)[len("lightningd-") : -4]
        where = f"--lightning-dir={shlex.quote(base)} --network={shlex.quote(network)}"
        raise ConfigError(
            f"lightningd is running in {directory}: it holds the lock on {path}.",
            f"Run `lightning-cli {where} stop`, then try again.",
        ) from error
    try:
        yield
    finally:
        os.close(fd)


def ask(directory: str, method: str) -> dict[str, Any] | None:
    """What the lightningd that runs in ``directory`` answers to a method without parameters.

    None: none does, or it refuses.
    """
    request = {"jsonrpc": "2.0", "id": f"backup-cli:{method}#1", "method": method, "params": {}}
    answer, parse = "", json.JSONDecoder().raw_decode
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError, ValueError):
        client.settimeout(ANSWER_S)
        client.connect(os.path.join(directory, RPC_NAME))
        client.sendall(json.dumps(request).encode())
        while data := client.recv(1 << 16):
            answer += data.decode()
            with contextlib.suppress(ValueError):
                found = parse(answer)[0].get("result")
                return found if isinstance(found, dict) else None
    return None


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LISTENER_S)
        try:
            client.connect(path)
        except (BlockingIOError, TimeoutError):
            return True  # Its queue is full: lightningd waits for a plugin.
        except OSError:
            return False
    return True


def _processes_with(path: str) -> Iterator[int]:
    """Ids of the other processes that have ``path`` open, or its WAL index, as far as seen."""
    files = set()
    for name in (path, f"{path}-shm"):
        with contextlib.suppress(OSError):
            found = os.stat(name)
            files.add((found.st_dev, found.st_ino))
    # Another user's lock can be seen, where his descriptors cannot.
    pids = itertools.chain(_with_open(files), _with_lock(files))
    return (pid for pid in pids if pid != os.getpid())


def _with_open(files: set[tuple[int, int]]) -> Iterator[int]:
    for directory in glob.iglob(f"{PROC}/[0-9]*/fd"):
        with contextlib.suppress(OSError):  # Another user's, or gone.
            for name in os.listdir(directory):
                with contextlib.suppress(OSError):
                    found = os.stat(f"{directory}/{name}")
                    if (found.st_dev, found.st_ino) in files:
                        yield int(directory.split("/")[-2])
                        break


_LOCK = re.compile(r" (-?\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) ")
"""Process id, device and inode in a line of /proc/locks."""


def _with_lock(files: set[tuple[int, int]]) -> Iterator[int]:
    with contextlib.suppress(OSError), open(f"{PROC}/locks") as locks:
        for line in locks:
            # "1: POSIX  ADVISORY  READ 4711 08:02:1837 124 124"; "->" before one that waits.
            found = _LOCK.search(line)  # A file that is gone stands there as "<none>:0".
            if found is None:
                continue
            pid, major, minor, inode = found.groups()
            if (os.makedev(int(major, 16), int(minor, 16)), int(inode)) in files:
                yield int(pid)


def _name_of(pid: int) -> str:
    try:
        with open(f"{PROC}/{pid}/comm", errors="replace") as file:
            return f" ({file.read().strip()})"
    except OSError:
        return ""
