"""What is known of a standby, beside its database: backup.standby in its directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shlex
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import durable
from backend import NOBODY
from errors import CLI, BackupBusy, ConfigError, DiskError
from filelog.layout2 import HEAD, Head
from wallet.node import DATABASE_NAME, STANDBY_STATE

STATE_NAME = STANDBY_STATE
STANDBY_NAME = f"{DATABASE_NAME}.standby"
"""The database until it is promoted: lightningd does not know that name."""
BEGINNING_NAME = f"{STANDBY_NAME}.new"
"""One that begins again, until it has what the former one has."""
HELD_FOR_S = 2.0
"""The longest wait for somebody who only looks who holds the lock."""
LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Proof:
    """What a look at the whole database found.

    Attributes:
        time_ns: when it ended, Unix time, nanoseconds.
        version: data_version that was proven, at least.
        problems: what does not hold, in words.
        failure: why it did not come to its end, or None.
    """

    time_ns: int
    version: int
    problems: tuple[str, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What backup.standby says.

    Attributes:
        urls: what is followed.
        check_every_s: seconds between two proofs.
        node_id: which node the database is of, in hex, None if it does not say.
        wal: a node's database of this backup is in WAL mode.
        place: the record up to which the database has everything; it may have more, which its
            data_version tells. None: it is not to be believed, and begins again.
        proof: the last one.
        error: why the backup is not followed just now, or None.
        owner: who takes the backup over, once that was asked for.
        taken: that one has it.
        needed: how many destinations must be that one's.
        acks, epoch: of the list of destinations that it goes on with, see quorum.Roster.
        listed: they keep that list.
        complete: the database has everything, and only needs its name.
    """

    urls: tuple[str, ...]
    check_every_s: float
    node_id: str | None = None
    wal: bool = False
    place: Head | None = None
    proof: Proof | None = None
    error: str | None = None
    owner: bytes | None = None
    taken: bool = False
    needed: int = 1
    acks: int = 1
    epoch: int = 0
    listed: bool = True
    complete: bool = False


def _as_json(state: State) -> bytes:
    content = {name: getattr(state, name) for name in State.__slots__}
    content["place"] = state.place and {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in state.place._asdict().items()
    }
    content["owner"] = state.owner and state.owner.hex()
    content["proof"] = state.proof and asdict(state.proof)
    return json.dumps(content).encode()


def _parse(content: dict[str, Any]) -> State:
    """Raises ValueError, TypeError or KeyError for what is damaged."""
    place, owner, proof = content["place"], content["owner"], content["proof"]
    if place is not None:
        heads: dict[str, Any] = {
            name: bytes.fromhex(value) if isinstance(value, str) else value
            for name, value in place.items()
        }
        if any(type(heads[name]) is not type(value) for name, value in Head()._asdict().items()):
            raise ValueError("the place is none")
        place = Head(**heads)
        if HEAD.unpack(HEAD.pack(*place)) != place:
            raise ValueError("the place is out of range")
    if proof is not None:
        proof = Proof(**proof | {"problems": tuple(proof["problems"])})
    known = content | {
        "place": place,
        "owner": None if owner is None else bytes.fromhex(owner),
        "proof": proof,
        "urls": tuple(content["urls"]),
    }
    state = State(**known)
    _check(state)
    return state


def _check(state: State) -> None:
    """Raises ValueError, TypeError or AttributeError for what no standby writes."""
    texts = [*state.urls, state.node_id, state.error]
    numbers = [state.needed, state.acks, state.epoch, state.acks - 1]
    proof, owner = state.proof, state.owner
    if proof is not None:
        texts += [*proof.problems, proof.failure]
        numbers += [proof.time_ns, proof.version]
    for text in texts:
        if text is not None:
            text.encode(errors="surrogateescape")  # JSON can hold what is no text, nor bytes.
    flags = state.wal, state.taken, state.listed, state.complete
    is_owned = owner is not None and len(owner) == len(NOBODY)
    if (
        not state.urls
        or not all(type(number) is int and number >= 0 for number in numbers)
        or not all(type(flag) is bool for flag in flags)
        or not 0 < state.check_every_s < math.inf
        or not (is_owned if owner is not None else not (state.taken or state.complete))
    ):
        raise ValueError("a value is out of range")


def path_in(directory: str) -> str:
    """Path of the backup.standby of ``directory``."""
    return os.path.join(directory, STATE_NAME)


def read(directory: str) -> State | None:
    """The state of the standby in ``directory``; None if there is none.

    Raises:
        ConfigError: it is damaged.
        DiskError: it cannot be read.
    """
    path = path_in(directory)
    try:
        with open(path, encoding="utf-8") as file:
            return _parse(json.load(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError(path, error, "read") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise ConfigError(
            f"{path} is damaged, or of a later release.",
            f"If it is damaged, run `{remedy(directory)}`: `{CLI} standby` begins again.",
        ) from error


def write(directory: str, state: State) -> None:
    """Put ``state`` in place of what is there, durably; DiskError if that fails."""
    path = path_in(directory)
    try:
        durable.replace(durable.prepare(path, _as_json(state)), path)
    except OSError as error:
        raise DiskError(path, error, "write") from error


def remove(directory: str) -> None:
    """There is no standby in ``directory`` any more."""
    for name in (f"{path_in(directory)}.writer", path_in(directory)):
        durable.remove(name)
    durable.sync_dir(directory)


@contextlib.contextmanager
def held(directory: str) -> Iterator[None]:
    """Be the only one who works on the standby in ``directory``.

    Raises:
        ConfigError: another process does.
    """
    until_s = time.monotonic() + HELD_FOR_S
    while True:
        try:
            lock = durable.WriterLock(path_in(directory))
            break
        except BackupBusy as error:
            if time.monotonic() >= until_s:
                raise ConfigError(
                    f"Another process{error.holder} works on the standby in {directory}.",
                    "Stop it, or wait for its end.",
                ) from error
        time.sleep(LOOK_S)
    try:
        yield
    finally:
        lock.release()


def holder(directory: str) -> int | None:
    """Id of the process that works on the standby in ``directory``; None if none does."""
    path = f"{path_in(directory)}.writer"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        number = os.pread(fd, 20, 0).strip()
        return int(number) if number.isdigit() else 0
    finally:
        os.close(fd)


def remedy(directory: str) -> str:
    """What to type to begin a standby again from nothing."""
    names = (STATE_NAME, STANDBY_NAME, f"{STANDBY_NAME}-wal", f"{STANDBY_NAME}-shm")
    paths = [os.path.join(directory, name) for name in names]
    return f"rm -f {shlex.join(paths)}"
