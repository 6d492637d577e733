"""Heals a backup in the hook: a snapshot of the node's database takes its place.

lightningd waits there with its transaction open. SQLite shows others what was committed before,
which is the base of the change that waits, so a snapshot and that change are all there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator

import scratch
import space
from backend import FOREIGN_KEYS_OFF, NOBODY, Backend, Change, Snapshot, log, utc
from decisions import Obstacle, Verdict, judge, may_heal, may_stand_for
from errors import CLI, BackupError, DatabaseError, DiskError, LostState, OutOfDate
from wallet import database, identity, node

TELL_EVERY_S = 10.0
"""Time between two lines of the log about a snapshot that the node waits for."""


class Healer:
    """Heals the backup of one lightningd process, which waits meanwhile.

    Args:
        backend: open for writing, as the owner that ``lock_file`` names.
        directory: the node's network directory.
        lock_file: its backup.lock.
    """

    def __init__(self, backend: Backend, directory: str, lock_file: node.LockFile) -> None:
        self._backend = backend
        self._directory = directory
        self._lock_file = lock_file
        self._tried: str | None = None
        """What was found that could not be healed; not again, as the node waits for that."""
        self._holds_off = False
        self._doing = ""
        # Beside a file its writer does it. Here a killed heal leaves a copy of the whole database.
        scratch.clear(backend.scratch_paths(None, directory))
        if lock_file.lost_state is not None:
            log.warning(
                f"No backup heals by itself any more: {lock_file.lost_state}. Once it is sure that"
                f" the database is the node's latest state, run `{CLI} attach` or `resync`."
            )

    def catch_up(self, change: Change, refusal: OutOfDate | LostState) -> None:
        """The first ``change`` does not fit: if the node is ahead, bring the backup to its base.

        Raises:
            OutOfDate: ``refusal``, with why it could not be healed.
            LostState: ``refusal``, which is remembered.
        """
        if isinstance(refusal, LostState):
            self._note_lost(refusal)
            raise refusal
        obstacle = self._obstacle(Verdict.OUT_OF_DATE, True, end_holds=True)
        try:
            if obstacle is not None:
                raise BackupError(self._explained(obstacle))
            log.warning(f"{refusal.problem} Healing that; lightningd waits meanwhile.")
            self._heal(change.base)
        except BackupError as error:
            versions = refusal.backup_version, refusal.node_version
            raise OutOfDate(*versions, self._directory, str(error)) from error

    def mend(self, change: Change, first: bool) -> None:
        """Start the backup over if a check found that it does not hold, before ``change``.

        What keeps it from that is an error in the log: changes go on to the backup as it is.
        """
        # Nothing cuts between a PRAGMA foreign_keys = OFF and the change that it is for.
        holds_off, self._holds_off = self._holds_off, change.transaction == [FOREIGN_KEYS_OFF]
        backend = self._backend
        if backend.unsound in (None, self._tried) or holds_off:
            return
        self._tried = backend.unsound
        verdict = judge(change.base, backend.version, backend.rewindable, first)
        if verdict in (Verdict.OUT_OF_DATE, Verdict.LOST_STATE):
            return  # That is healed, or refused, on its own account.
        try:
            obstacle = self._obstacle(verdict, first, self._end_holds())
            if obstacle is not None:
                raise BackupError(self._explained(obstacle))
            log.error(f"{self._tried} Healing that; lightningd waits meanwhile.")
            self._heal(change.base, thoroughly=True)
        except (BackupError, OSError) as error:
            log.error(f"The backup {backend.url} does not hold, and was not healed: {error}")

    def _note(self, what: str, **changes: str | None) -> None:
        """Change backup.lock, as far as that can be written."""
        try:
            lock_file = node.read_lock_file(self._directory)
            lock_file = dataclasses.replace(lock_file, **changes)  # type: ignore[arg-type]
            node.write_lock_file(self._directory, lock_file, replace=True)
        except BackupError as error:
            log.error(f"{what} could not be noted in backup.lock: {error}")

    def _note_lost(self, refusal: LostState) -> None:
        """Remember ``refusal``: a run without the plugin would make the old database look ahead."""
        text = (
            f"{utc(time.time_ns())}: the backup was at version {refusal.backup_version},"
            f" the node's database at version {refusal.node_version}"
        )
        self._note("That the node lost state", lost_state=text)

    def _obstacle(self, verdict: Verdict, first: bool, end_holds: bool) -> Obstacle | None:
        lock_file = self._lock_file
        is_off, has_lost = not lock_file.heals, lock_file.lost_state is not None
        unknown = lock_file.owner == NOBODY and self._backend.version_count == 0
        return may_heal(verdict, first, is_off, has_lost, end_holds, unknown)

    def _explained(self, obstacle: Obstacle) -> str:
        if obstacle is Obstacle.LOST_BEFORE:
            return f"{obstacle.value} ({self._lock_file.lost_state})."
        return f"{obstacle.value}."

    def _end_holds(self) -> bool:
        found = self._backend.status()
        return found.damage is None and found.version == self._backend.version

    def _heal(self, base: int, thoroughly: bool = False) -> None:
        """Let a snapshot of the node's database at ``base`` take the backup's place.

        Args:
            thoroughly: check its foreign keys, too, as a proof of the new backup will.
        """
        backend, began = self._backend, time.monotonic()
        before, wallet = backend.version, node.wallet(self._directory, self._lock_file)
        if not os.path.isfile(wallet):
            raise DatabaseError(wallet, "the node's database is not there")
        prefix = backend.scratch_paths(None, self._directory)
        try:
            size = database.size_with_side_files(wallet)
            space.require(prefix, backend.snapshot_copies * size)
            with self._telling(began), scratch.held(prefix) as name:
                snapshot, node_id = self._snapshot(wallet, name, base, thoroughly)
                self._doing = "writing the new backup"
                kept = backend.replace(snapshot, self._lock_file.owner)
        except OSError as error:
            raise DiskError(wallet, error, "take a snapshot of") from error
        if node_id is not None and self._lock_file.node_id is None:
            self._note("Which node the backup is of", node_id=node_id)
            self._lock_file = dataclasses.replace(self._lock_file, node_id=node_id)
        log.warning(
            f"Healed: {backend.url} went from version {before} to {base} by a snapshot of {wallet}"
            f" ({size / 2**20:.1f} MiB, {time.monotonic() - began:.1f} s)."
            + (f" The old backup is kept: {kept}" if kept else "")
        )

    def _snapshot(
        self, wallet: str, name: str, base: int, thoroughly: bool
    ) -> tuple[Snapshot, str | None]:
        """A copy of ``wallet`` that may take the backup's place, and which node it is of.

        Scratch files begin with ``name``.
        """
        snapshot = database.copy(wallet, f"{name}.sqlite3", self._copying)
        problems = database.check(snapshot.path) if thoroughly else []
        if problems:
            raise DatabaseError(wallet, f"it is not sound either: {problems[0]}")
        return snapshot, self._compare(snapshot, base, f"{name}.old.sqlite3")

    def _compare(self, snapshot: Snapshot, base: int, path: str) -> str | None:
        """Refuse a snapshot that is not what the node has before its change."""
        self._doing = "comparing whose the backup is"
        node_id, backup_id = database.node_id_of(snapshot.path), self._lock_file.node_id
        if backup_id is None and node_id is not None and snapshot.version == base:
            with contextlib.closing(self._backend.read()) as reading:
                backup_id = identity.of_backup(reading, path)
        obstacle = may_stand_for(base, snapshot.version, node_id, backup_id)
        if obstacle is Obstacle.OTHER_VERSION:
            raise BackupError(
                f"The database {node.wallet(self._directory, self._lock_file)} is at version"
                f" {snapshot.version}, not {base}; if lightningd's is another, add `--wallet`."
            )
        if obstacle is not None:
            raise BackupError(f"The backup is of node {backup_id}, the database of {node_id}.")
        return node_id

    def _copying(self, done: int, of: int) -> None:
        self._doing = f"copying the database, {100 * done // max(of, 1)} %"
        if done == of:
            self._doing = "checking the copy"

    @contextlib.contextmanager
    def _telling(self, began: float) -> Iterator[None]:
        """Say now and then in the log how far the snapshot is."""
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(TELL_EVERY_S):
                log.info(f"Healing for {time.monotonic() - began:.0f} s: {self._doing}")

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()
