"""The database of a standby: records of a backup go in, whatever ends the process."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Iterator

import durable
import space
from backend import NOTICE, Change, log
from errors import BackupError, DatabaseError, DiskError, PlaceGone
from filelog import layout2
from filelog.layout2 import Head, Kind
from filelog.reader import is_foreign_keys_off
from replica import Record
from standby import state as keeping
from standby.state import State
from wallet import database, restore
from wallet.live import LiveDatabase, is_damage, is_wal

SAVE_AFTER_S = 1.0
"""How old the place in backup.standby may be; what the database has beyond, its version tells."""
ROOM_STEP = 64 << 20
"""Bytes of a snapshot between two looks at the room that is left."""


class Unfit(BackupError):
    """What comes does not continue what the standby has: it has to begin again."""


class Foreign(BackupError):
    """What came may not take the place of what the standby has."""


class Applier:
    """Brings records into the database of the standby in ``directory``.

    The newest change is kept back: it may be taken back still.

    Args:
        state: as it was read; its place is believed.

    Attributes:
        state: as it is now; ``save`` writes it.

    Raises:
        BackupError: the database cannot be opened.
    """

    def __init__(self, directory: str, state: State) -> None:
        self.state = state
        self._directory = directory
        self._path = os.path.join(directory, keeping.STANDBY_NAME)
        self._live: LiveDatabase | None = None
        self._anew: _Anew | None = None
        self._newest: Record | None = None
        """The newest change, if it may be taken back."""
        self._off: Record | None = None
        """A PRAGMA foreign_keys = OFF whose change has not come."""
        self._has_come = False
        """A record came since ``begin``."""
        self._place: Head | None = None
        """What the database has everything up to, with what is not committed."""
        self._saved = state
        self._save_at_s = 0.0

    @property
    def version(self) -> int:
        """data_version of the database, 0 if there is none."""
        return self._live.version if self._live is not None else 0

    def begin(self) -> Head | None:
        """Go on from here with the records that follow what is returned; None: with all of them."""
        self._newest = self._off = None
        self._has_come = False
        self._abandon()
        # Opened anew: what failed may have left a PRAGMA in force.
        self._close()
        place, beginning = self.state.place, os.path.join(self._directory, keeping.BEGINNING_NAME)
        if place is None:
            self._anew = _Anew(beginning)
            return None
        restore.remove_database(beginning, durable.remove)  # Of one that was killed.
        self._open(place)
        self._place = place
        return place

    def _open(self, place: Head) -> None:
        if not os.path.exists(self._path):
            raise Unfit(f"{self._path} is gone.", f"Begin again: `{self._remedy()}`.")
        node_id, known = database.node_id_of(self._path), self.state.node_id
        if known not in (None, node_id):
            raise Unfit(
                f"{self._path} is of node {node_id}, and was of node {known}.",
                f"Begin again: `{self._remedy()}`.",
            )
        self.state = dataclasses.replace(self.state, node_id=node_id)
        live = LiveDatabase(self._path)
        if live.version < place.version:
            live.close()
            raise Unfit(
                f"{self._path} is at version {live.version}, and was at version {place.version}.",
                f"Begin again: `{self._remedy()}`.",
            )
        self._live = live

    def _remedy(self) -> str:
        return keeping.remedy(self._directory)

    def go_back(self, error: BackupError) -> bool:
        """Be ready for another ``begin`` after ``error``: with all of the backup if it must be.

        Returns:
            Whether that can do better at once.
        """
        if not (isinstance(error, (PlaceGone, Unfit)) or is_damage(error) or self._failed(error)):
            return False
        # What is gone may be the newest change only, which is not applied: then go on as before.
        newest_gone = isinstance(error, PlaceGone) and self._has_come
        if not newest_gone:
            log.log(NOTICE, "Beginning again with all of the backup")
            self.state = dataclasses.replace(self.state, place=None)
        return True

    def _failed(self, error: BackupError) -> bool:
        """Whether a write or flush of the database failed: what it shows may not be on the disk."""
        return isinstance(error, DiskError) and (error.path, error.errno) == (self._path, errno.EIO)

    def feed(self, head: Head, payload: bytes) -> None:
        """Take the next record.

        Raises:
            DoesNotReplay: a change cannot be executed; what stands before it is committed.
            Unfit: it does not continue what came before.
            BackupError: the disk or the database failed.
        """
        self._has_come = True
        if head.kind == Kind.SNAPSHOT:
            self._take_piece(head, payload)
        elif head.kind == Kind.REWIND:
            if self._newest is None:
                raise Unfit(f"A change is taken back at version {head.version}, and none is there.")
            self._newest = None
        elif head.kind == Kind.CHANGE:
            self._settle()
            self._newest = head, payload

    def _take_piece(self, head: Head, payload: bytes) -> None:
        if self._anew is None:
            raise Unfit("A snapshot came where changes should.")
        self._anew.add(payload)
        if head.flags & layout2.FINAL:
            self._start(head)

    def _start(self, head: Head) -> None:
        """The snapshot that ends with ``head`` is complete: changes follow."""
        assert self._anew is not None
        live = self._from_nothing()
        if live.version != head.version:
            raise Unfit(f"The snapshot is called version {head.version}, but holds {live.version}.")
        self._place = head

    def _settle(self) -> None:
        """The newest change counts: another one came."""
        if self._newest is None:
            return
        (head, payload), self._newest = self._newest, None
        if is_foreign_keys_off(head):
            self._off = head, payload
            return
        # A new lightningd has foreign_keys ON: OFF holds for its own session alone.
        off, self._off = self._off, None
        if off is not None and off[0].session == head.session:
            self._apply(*off)
        self._apply(head, payload)
        self._place = head

    def _apply(self, head: Head, payload: bytes) -> None:
        live = self._live or self._from_nothing()
        bumps = head.flags & layout2.BUMPS
        if bumps and head.version <= live.version:
            return  # What it had beyond its place.
        if head.version - bumps < live.version:
            return  # A PRAGMA for one of those.
        if head.version - bumps != live.version:
            raise Unfit(f"The change to version {head.version} came at version {live.version}.")
        live.apply(Change.decode(head.version, payload))

    def _from_nothing(self) -> LiveDatabase:
        """The database that begins anew, with the snapshot that came or empty."""
        if self._anew is None:
            raise Unfit("There is no database to apply a change to.")
        self._live, wal = self._anew.opened()
        self.state = dataclasses.replace(self.state, wal=wal)
        return self._live

    # What is kept

    def rest(self) -> None:
        """All that is there was given: commit, and put what began anew in its place.

        Raises:
            Foreign: it is of another node, or older than what is there.
        """
        if self._live is None:
            return
        self._live.commit()
        if self._anew is not None:
            self._publish()
            self._save_at_s = 0.0
        self.state = dataclasses.replace(self.state, place=self._place)
        if self.state != self._saved and time.monotonic() >= self._save_at_s:
            self.save()

    def save(self) -> None:
        """Write the state, durably."""
        keeping.write(self._directory, self.state)
        self._saved = self.state
        self._save_at_s = time.monotonic() + SAVE_AFTER_S

    def _publish(self) -> None:
        """Put the database that began anew in the place of the former one."""
        assert self._anew is not None and self._live is not None
        path = self._anew.path
        self._live.hand_over(wal=True)
        self._live = None
        node_id = database.node_id_of(path)
        self._check_may_replace(path, node_id)
        # First: what is at the path is not to be believed until the place is known again.
        keeping.write(self._directory, dataclasses.replace(self.state, place=None))
        restore.remove_database(self._path, durable.remove)
        with _disk(self._path):
            durable.replace(path, self._path)
        self._anew = None
        self._live = LiveDatabase(self._path)
        self.state = dataclasses.replace(self.state, node_id=node_id)

    def _check_may_replace(self, path: str, node_id: str | None) -> None:
        """Refuse another node's database, or an older one, in the place of a good one."""
        former = self.state.node_id
        if None not in (former, node_id) and former != node_id:
            raise Foreign(
                f"The backup is of node {node_id}, and this standby of node {former}.",
                "Check the URLs.",
            )
        had, has = 0, database.version_of(path)
        with contextlib.suppress(DatabaseError):  # Whatever that is, it is no good copy.
            had = database.version_of(self._path)
        if has < had:
            raise Foreign(
                f"The backup is at version {has}, and this standby at version {had} already.",
                f"If that is right, as after `resync --override`, run `{self._remedy()}`.",
            )

    def finish(self) -> None:
        """Nothing comes any more: apply the newest change, too, and close it as a node's file."""
        self._settle()
        self.rest()
        if self._live is None:
            raise restore.NothingToRestore
        self._live.hand_over(self.state.wal)
        self._live = None

    def stored_version(self) -> int:
        """What the database says itself of its version."""
        return self._live.stored_version() if self._live is not None else 0

    def close(self) -> None:
        """Leave it; what is not committed comes again."""
        self._close()
        self._abandon()

    def _close(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None

    def _abandon(self) -> None:
        """Remove what began anew, and was not ready."""
        if self._anew is None:
            return
        self._close()
        self._anew.remove()
        self._anew = None


class _Anew:
    """The file of a database that begins with a snapshot, or empty."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._size = 0
        self.remove()
        with _disk(path):
            self._fd: int | None = durable.create(path)

    def add(self, data: bytes) -> None:
        """The next piece."""
        assert self._fd is not None, "changes have come already"
        if not self._size % ROOM_STEP:
            space.require(self.path)
        with _disk(self.path):
            durable.write_all(self._fd, data, self._size)
        self._size += len(data)

    def opened(self) -> tuple[LiveDatabase, bool]:
        """All pieces have come: the database, and whether it was in WAL mode."""
        assert self._fd is not None, "it was opened before"
        fd, self._fd = self._fd, None
        with _disk(self.path):
            durable.flush(fd)
            os.close(fd)
            wal = is_wal(self.path)
        return LiveDatabase(self.path), wal

    def remove(self) -> None:
        """It is of no use."""
        restore.remove_database(self.path, durable.remove)


@contextlib.contextmanager
def _disk(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(path, error, "write") from error
