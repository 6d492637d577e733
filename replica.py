"""What a destination must do besides, to be one of several: hand out and take records."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from backend import Destination
from filelog.layout2 import Head
from quorum import Roster

Record = tuple[Head, bytes]
"""A record with its payload. Of the head only counts what is of the history, not of a file."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at one of several destinations tells.

    Attributes:
        backup_id: 16 bytes that tell two backups apart.
        newest: head of its newest record.
        version_count: see Backend.
    """

    backup_id: bytes
    newest: Head
    version_count: int


class Replica(Destination):
    """A Destination that can be one of several."""

    @abstractmethod
    def look(self) -> Look:
        """What it holds, without changing a byte; only if not open.

        Raises:
            BackupError: it is missing, damaged or does not answer, or cannot be one of several.
        """

    @abstractmethod
    def roster(self) -> Roster | None:
        """The list of destinations that it keeps, None if it is the only one."""

    @property
    @abstractmethod
    def newest(self) -> Head:
        """Head of its newest record; only once open."""

    @abstractmethod
    def add_record(self, head: Head, payload: bytes) -> None:
        """Store a change, a rewind or an owner as another one holds it; durable on return.

        Args:
            head: continues ``newest``.
        """

    @abstractmethod
    def records(self) -> contextlib.AbstractContextManager[Iterator[Record]]:
        """All of its records in order, beginning with the pieces of its snapshot.

        Needs no open. The iterator raises BackupError where they are damaged.
        """
