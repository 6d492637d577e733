"""A scrub: a look at the whole backup beside the node, so that damage is found early.

``Scrubber`` runs this file as a process of its own (child.py), which takes a small share of
a core and of the disk. To check is to read the log like any reader: every CRC, the whole
chain. To prove is to replay it, too, into a scratch database beside it, which SQLite then
checks. What the node appends meanwhile is read as well. Its one message:

    {"sound": data_version}

When it was done and what it found outlives the process that asked (proof.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import durable
from backend import Ending, Step, log
from errors import CLI, BackupError, CheckRunning, Unsound
from filebackend import FileBackend
from filelog import former, proof
from filelog.proof import Proof
from filelog.reader import FileReading
from upkeep import child
from upkeep.child import Child, Message
from wallet import database, restore

CHECK_AFTER_NS = 86400 * 10**9
PROVE_AFTER_NS = 7 * CHECK_AFTER_NS
RESERVE = 64 << 20
"""Bytes on the log's disk that a proof leaves to the node."""
WORK_S = 0.025
"""How long the process works before it rests."""
REST = 3.0
"""Its rest, in times of the work before it: a fourth of a core, and of the disk."""
NAMED_PROBLEMS = 3

CHECK = "check"
PROVE = "prove"


def due(known: Proof, now_ns: int) -> str | None:
    """What it is time for: CHECK, PROVE or nothing.

    What a proof found stays until the next one, which therefore is not put off.
    """
    if not _is_past(known.checked_ns, CHECK_AFTER_NS, now_ns):
        return None
    is_stale = _is_past(known.proven_ns, PROVE_AFTER_NS, now_ns)
    return PROVE if is_stale or known.unsound is not None else CHECK


def _is_past(then_ns: int | None, age_ns: int, now_ns: int) -> bool:
    return then_ns is None or now_ns - then_ns >= age_ns


class Scrubber:
    """Checks one open FileBackend, and remembers beside it what was found."""

    def __init__(self, backend: FileBackend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._held_off = False
        self._has_told_of_space = False

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """End a check that runs, and let none begin: a compaction does the same work."""
        with self._lock:
            self._held_off = True
            if self._child is not None:
                self._child.kill()
        try:
            yield
        finally:
            self._held_off = False

    def run_if_due(self) -> bool:
        """Check or prove the backup if it is time; whether it was, once that is done.

        What it finds, and that it failed, is in the log, and remembered.
        """
        path, backup_id = self._backend.path, self._backend.newest.backup_id
        mode = due(proof.read(path, backup_id), time.time_ns())
        if mode is None:
            return False
        try:
            with contextlib.suppress(CheckRunning), proof.checking(path):
                self._check(CHECK if mode == PROVE and not self._has_space() else mode, backup_id)
        except BackupError as error:
            log.warning(f"The check of {path} did not come to its end: {error}")
            self.note(backup_id, failure=str(error))
        return True

    def _has_space(self) -> bool:
        needed = self._backend.log_size + self._backend.snapshot_size + RESERVE
        directory = os.path.dirname(self._backend.path)
        try:
            free = shutil.disk_usage(directory).free
        except OSError as error:
            raise BackupError(f"{directory} cannot be looked at: {error}.") from error
        if free < needed and not self._has_told_of_space:
            self._has_told_of_space = True
            log.warning(
                f"To replay {self._backend.path} for a proof may take {needed >> 20} MiB, and"
                f" {free >> 20} MiB are free on its disk: it is read and checked, but not replayed"
            )
        return free >= needed

    def _check(self, mode: str, backup_id: bytes) -> None:
        path = self._backend.path
        try:
            version = self._ask(mode)
        except Unsound as error:
            log.error(str(error))
            self.note(backup_id, checked_ns=time.time_ns(), unsound=str(error), failure=None)
            return
        if version is None:
            return
        if mode == PROVE:
            log.info(f"{path} is proven: every record checks, and it restores version {version}")
            self.note_proven(backup_id)
        else:
            log.info(f"{path} is checked: every record of it, up to version {version}")
            self.note(backup_id, checked_ns=time.time_ns(), failure=None)

    def _ask(self, mode: str) -> int | None:
        """The version that the log leads to, or None: held off."""
        prefix = f"{self._backend.scratch_prefix}scrub-{secrets.token_hex(4)}"
        with self._lock:
            if self._held_off:
                return None
            self._child = process = Child("checking", __file__, self._backend.path, prefix, mode)
        try:
            with process:
                return int(next(process.messages())["sound"])
        except BackupError:
            if process.was_killed:
                return None
            raise
        finally:
            with self._lock:
                self._child = None
            restore.remove_database(_scratch(prefix), durable.discard_gently)

    def note(self, backup_id: bytes, **changes: Any) -> None:
        """Change what is remembered (see Proof), as far as the disk lets us.

        Args:
            backup_id: what was looked at; another backup may stand in its place by now.
        """
        path = self._backend.path
        with self._lock:
            if backup_id != self._backend.newest.backup_id:
                return
            self._backend.unsound = changes.get("unsound", self._backend.unsound)
            try:
                proof.note(path, backup_id, **changes)
            except OSError as error:
                log.warning(f"When {path} was checked cannot be kept beside it: {error}")

    def note_proven(self, backup_id: bytes) -> None:
        """The whole backup was read, replayed and found sound just now."""
        self.note(backup_id, **proof.proven_now())
        if backup_id == self._backend.newest.backup_id:
            former.prune(self._backend.path)


def _scratch(prefix: str) -> str:
    return f"{prefix}.sqlite3"


# What follows runs in the process of its own.


def rest_after(worked_s: float) -> float:
    """How long to rest after so long a work, in seconds; 0: it may go on."""
    return worked_s * REST if worked_s >= WORK_S else 0.0


class Pace:
    """Holds the process to its share.

    What was appended since the pass began is read without a rest, or a busy node would
    always be ahead.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()

    def step(self, done: int, of: int) -> None:
        """A step of work is done, ``done`` bytes of ``of``: rest if that is due."""
        pause_s = rest_after(time.monotonic() - self._began)
        if pause_s and done < of:
            time.sleep(pause_s)
            self._began = time.monotonic()


def check(steps: Iterable[Step]) -> int:
    """Read the whole log, to the version returned; raises what is wrong with it."""
    pace = Pace()
    for step in steps:
        pace.step(step.position, step.total)
    ending = step.found
    assert isinstance(ending, Ending), "a pass ends in one"
    if ending.damage is not None:
        raise ending.damage
    return ending.version


def prove(path: str, steps: Iterable[Step], scratch: str) -> int:
    """Replay the whole log ``path`` into ``scratch``, to the version returned.

    Raises what is wrong with either.
    """
    flush, pace = child.flushing(scratch), Pace()

    def progress(done: int, of: int) -> None:
        flush(done, of)
        pace.step(done, of)

    try:
        ending, _ = restore.build(steps, scratch, False, progress)
    except restore.NothingToRestore:
        return 0
    problems = database.check(scratch)
    if problems:
        raise Unsound(
            f"The backup {path} restores version {ending.version}, but SQLite's checks complain:"
            f" {'; '.join(problems[:NAMED_PROBLEMS])}.",
            "The node's own database may be like that. With the node stopped, compare it:"
            f" `{CLI} verify --against DB {shlex.quote(f'file://{path}')}`.",
        )
    return ending.version


def scrub(path: str, prefix: str, mode: str) -> Message:
    """Check or prove the log ``path``; the message."""
    with contextlib.closing(FileReading(path)) as reading:
        if mode == PROVE:
            return {"sound": prove(path, reading, _scratch(prefix))}
        return {"sound": check(reading)}


def main(path: str, prefix: str, mode: str) -> None:
    """Look at the backup, and say what was found."""
    child.run(path, prefix, lambda: scrub(path, prefix, mode))


if __name__ == "__main__":
    main(*sys.argv[1:])
