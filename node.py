"""A node's network directory: whether it is the right one, its lock files, its database."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import durable
from backend import NOBODY
from errors import CLI, BackupExists, ConfigError, DiskError

LOCK_NAME = "backup.lock"
DATABASE_NAME = "lightningd.sqlite3"
NETWORKS = (
    *("bitcoin", "testnet", "testnet4", "signet", "regtest"),
    *("liquid", "liquid-regtest", "litecoin", "litecoin-testnet"),
)


@dataclass(frozen=True, slots=True)
class LockFile:
    """What backup.lock says: JSON ``{"backend_url": "<url>", "owner": "<32 hex digits>"}``.

    A file of the earlier plugin has no owner. ``"compact"`` may be added by hand.

    Attributes:
        compact: see compaction.parse_least; None if not given.
        owner: what the backup knows this node by, 16 bytes.
    """

    backend_url: str
    compact: object = None
    owner: bytes = NOBODY


def read_lock_file(directory: str) -> LockFile:
    """The backup.lock of the network directory ``directory``.

    Raises:
        ConfigError: it is missing, or not what it should be.
    """
    path = os.path.join(directory, LOCK_NAME)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        url = content["backend_url"]
        if not isinstance(url, str):
            raise TypeError("backend_url is no string")
        owner = bytes.fromhex(content.get("owner", NOBODY.hex()))
        if len(owner) != len(NOBODY):
            raise ValueError("owner is not of 16 bytes")
    except FileNotFoundError as error:
        raise ConfigError(
            f"Could not find backup.lock in the lightning-dir {directory}.",
            f"Stop lightningd and run `{CLI} init --lightning-dir {shlex.quote(directory)} URL`, or"
            " `attach` in place of `init` for a backup that exists.",
        ) from error
    except OSError as error:
        raise DiskError(path, error, "read") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f'{path} is damaged: it should read {{"backend_url": "<url>"}}.',
            f"Move it away and run `{CLI} attach --lightning-dir {shlex.quote(directory)} URL`.",
        ) from error
    return LockFile(url, content.get("compact"), owner)


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
    content: dict[str, object] = {"backend_url": lock_file.backend_url}
    if lock_file.owner != NOBODY:
        content["owner"] = lock_file.owner.hex()
    if lock_file.compact is not None:
        content["compact"] = lock_file.compact
    try:
        beside = durable.prepare(path, json.dumps(content).encode(), path if replace else like)
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
    """The real path of ``directory``, if it can be a node's network directory.

    Raises:
        ConfigError: it is missing, or the base directory of several networks.
    """
    path = os.path.realpath(os.path.expanduser(directory))
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


@contextlib.contextmanager
def stopped(directory: str) -> Iterator[None]:
    """Make sure that no lightningd runs in ``directory``, and that none starts meanwhile.

    lightningd holds a lockf lock on ``lightningd-<network>.pid`` one level up.

    Raises:
        ConfigError: it runs.
    """
    base, network = os.path.split(directory)
    path = os.path.join(base, f"lightningd-{network}.pid")
    if not os.path.lexists(path):  # No lightningd has run here.
        yield
        return
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DiskError(path, error, "open") from error
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"lightningd is running in {directory}: it holds the lock on {path}.",
            f"Run `lightning-cli --lightning-dir={shlex.quote(base)}"
            f" --network={shlex.quote(network)} stop`, then try again.",
        ) from error
    try:
        yield
    finally:
        os.close(fd)
