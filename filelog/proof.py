"""When a backup's log was last read whole, and last proven to restore: ``<log>.proof``.

One JSON object with the fields of ``Proof``. One that is missing, torn or of another backup
counts as never, so that the only harm is a check that comes early. It is written in place,
not renamed: whoever checks holds a lock on it, and it keeps its owner and its mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import durable
from backend import utc
from errors import CLI, CheckRunning, DiskError, printable

SUFFIX = ".proof"
MAX_SIZE = 64 << 10
STALE_NS = 31 * 86400 * 10**9
"""Age of the last proof from which on the operator is warned."""
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Proof:
    """What is known of a backup from the checks beside its node.

    Attributes:
        backup_id: in hexadecimal.
        checked_ns: Unix time of the last look at the whole log, whatever it found.
        proven_ns: Unix time at which it was last replayed and found sound.
        unsound: what does not hold, until a proof shows that all of it does; or None.
        failure: why the last check did not come to its end, or None.
    """

    backup_id: str
    checked_ns: int | None = None
    proven_ns: int | None = None
    unsound: str | None = None
    failure: str | None = None


def read(path: str, backup_id: bytes | None) -> Proof:
    """What is known of the backup ``backup_id`` in the log ``path``; never raises."""
    never = Proof((backup_id or b"").hex())
    try:
        with open(path + SUFFIX, "rb") as file:
            found = json.loads(file.read(MAX_SIZE))
    except (OSError, ValueError, RecursionError):
        return never
    if not isinstance(found, dict) or found.get("backup_id") != never.backup_id:
        return never
    return Proof(
        never.backup_id,
        _time(found.get("checked_ns")),
        _time(found.get("proven_ns")),
        _text(found.get("unsound")),
        _text(found.get("failure")),
    )


def _time(value: object) -> int | None:
    # A clock that jumped back would put the next check off for as long.
    return value if type(value) is int and 0 < value <= time.time_ns() else None


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None


def warnings(proof: Proof, url: str) -> list[str]:
    """What to tell the operator of a backup at ``url`` whose checks do not take place."""
    found = []
    if proof.failure is not None:
        found.append(f"The last check beside the node did not come to its end: {proof.failure}")
    if proof.proven_ns is not None and time.time_ns() - proof.proven_ns > STALE_NS:
        found.append(
            f"It was last proven that this backup restores on {utc(proof.proven_ns)}."
            f" Run `{CLI} verify {shlex.quote(url)}`."
        )
    return found


def note(path: str, backup_id: bytes, **changes: Any) -> None:
    """Change fields of the log's ``Proof``, durably; OSError if they cannot be kept."""
    proof = dataclasses.replace(read(path, backup_id), **changes)
    data = json.dumps(dataclasses.asdict(proof)).encode() + b"\n"
    fd = _open(path)
    try:
        durable.write_all(fd, data, 0)
        os.ftruncate(fd, len(data))
        durable.flush(fd)
    finally:
        os.close(fd)


def proven_now() -> dict[str, Any]:
    """For ``note``: the whole log was read, replayed and found sound just now."""
    now = time.time_ns()
    return {"checked_ns": now, "proven_ns": now, "unsound": None, "failure": None}


def _open(path: str) -> int:
    fd = os.open(path + SUFFIX, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.geteuid() == 0:  # The node's user has to open it, too.
        with contextlib.suppress(OSError):
            log = os.stat(path)
            os.fchown(fd, log.st_uid, log.st_gid)
    return fd


@contextlib.contextmanager
def checking(path: str) -> Iterator[None]:
    """Be the only one who checks the log ``path``.

    Who may not write beside the log, such as on a disk mounted read-only, checks all the same.

    Raises:
        CheckRunning: somebody else is.
        DiskError: locks do not work there.
    """
    fd = _locked(path)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _locked(path: str) -> int | None:
    try:
        fd = _open(path)
    except OSError as error:
        if error.errno in NOT_OURS:
            return None
        raise DiskError(path + SUFFIX, error, "open the lock file") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckRunning(path) from error
        raise DiskError(path + SUFFIX, error, "lock (locks must work there)") from error
    return fd
