"""A database that is kept in step with a backup: whatever ends the process, it is of one version.

It has a journal, unlike that of a restore, so what was committed survives a loss of power, and
another process can read one version of it while it goes on.
"""

from __future__ import annotations

import os
import re
import sqlite3

from backend import Change
from errors import BackupError, DatabaseError, DoesNotReplay
from wallet import confined, database
from wallet.confined import Refused

GROUP_CHANGES = 1000
GROUP_SIZE = 4 << 20
"""At most so many changes, and bytes of them, are one transaction of SQLite."""
OWN = ("BEGIN", "COMMIT")
WAL_BYTES = slice(18, 20)
"""Where an SQLite file says whether it is in WAL mode: both are 2 then."""


def is_wal(path: str) -> bool:
    """Whether the closed database ``path`` is in WAL mode."""
    with open(path, "rb") as file:
        return file.read(WAL_BYTES.stop)[WAL_BYTES] == b"\2\2"


_DAMAGE = re.compile("malformed|not a database|^$")
"""What SQLite says; Python 3.10 has no text for bytes that are none."""


def is_damage(error: BackupError) -> bool:
    """Whether ``error`` came because a database is damaged, or no node's.

    Not where it cannot be used just now, as on a full disk, or where a change is refused.
    """
    cause = error.__cause__
    if isinstance(cause, Refused):
        return not isinstance(error, DoesNotReplay)
    if isinstance(cause, UnicodeDecodeError):  # SQLite quotes a damaged schema as it is.
        return True
    return type(cause) is sqlite3.DatabaseError and _DAMAGE.search(str(cause)) is not None


class LiveDatabase(database.Replayer):
    """Applies changes to the database ``path``, many in one transaction of SQLite.

    What stands in a transaction that did not end is not there after a crash.

    Raises:
        DatabaseError: it cannot be opened.
    """

    # WAL: a check of the whole of it reads beside the changes.
    journal = ("journal_mode = WAL", "synchronous = FULL")
    transaction_size = 0  # Which change is committed is decided here.

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._group: list[Change] = []
        self._group_size = 0
        try:
            with self._connection.explaining(path):
                self.version = database.data_version(self._connection)
        except BaseException:
            self.close()
            raise
        self.committed = self.version
        """The version that survives whatever happens."""

    def apply(self, change: Change) -> None:
        """Execute ``change``; it is committed with others, at the latest by ``commit``.

        Raises:
            DoesNotReplay: it, or one before it, does not replay. What stands before that is
                committed.
        """
        if change.is_pragma or self._off:
            # A PRAGMA has an effect outside of a transaction only.
            self.commit()
            self._alone(change)
            return
        if not self._group:
            self._execute("BEGIN")
        self._group.append(change)
        self._group_size += len(change.payload)
        try:
            self._named(change, self._execute_all)
        except DoesNotReplay:
            self._one_by_one()
            return
        self.version = change.version
        if len(self._group) >= GROUP_CHANGES or self._group_size >= GROUP_SIZE:
            self.commit()

    def _execute_all(self, change: Change) -> bool:
        assert change.transaction is not None
        for self._statement in OWN:  # Prepared before, so the authorizer is not asked again.
            if self._statement in change.transaction:
                raise Refused("it begins or ends a transaction")
        # What else is in the transaction must not be committed by a change that is refused.
        self._connection.in_change = True
        try:
            return super()._execute_all(change)
        finally:
            self._connection.in_change = False

    def commit(self) -> None:
        """End the transaction: what was applied is on stable storage."""
        if not self._group:
            return
        try:
            self._named(self._group[-1], lambda _: self._execute("COMMIT"))
        except DoesNotReplay:  # A deferred foreign key, of any of them.
            self._one_by_one()
            return
        self._settle()

    def _settle(self) -> None:
        self._group, self._group_size = [], 0
        self.committed = self.version

    def _one_by_one(self) -> None:
        """Begin a group that failed again, one change at a time: which one does not replay?"""
        group = self._group
        self._group, self._group_size = [], 0
        self._roll_back()
        for change in group:
            self._alone(change)

    def _alone(self, change: Change) -> None:
        """Execute one change in a transaction of its own."""
        try:
            super().apply(change)
        except DoesNotReplay:
            self._roll_back()
            raise
        if not change.is_pragma:
            self.version = self.committed = change.version

    def _roll_back(self) -> None:
        self._connection.rollback()
        with self._connection.explaining(self.path):
            self.version = self.committed = database.data_version(self._connection)

    def stored_version(self) -> int:
        """The data_version that it says itself."""
        with self._connection.explaining(self.path):
            self._connection.allow(confined.READ_LIMIT_S)
            return database.data_version(self._connection)

    def hand_over(self, wal: bool) -> None:
        """Commit, and close it as one file in the journal mode of a node's.

        Args:
            wal: whether that is WAL.

        Raises:
            DatabaseError: another process has it open.
        """
        self.commit()
        with self._connection.explaining(self.path):
            self._connection.release()
            if not wal:
                self._execute("PRAGMA journal_mode = DELETE").fetchall()  # To its end.
        self.close()
        left = [s for s in database.SIDE_FILES if os.path.exists(self.path + s)]
        if left:
            raise DatabaseError(
                self.path,
                f"{self.path}{left[0]} is still there",
                "Look which process has it open, and try again when that has ended.",
            )
