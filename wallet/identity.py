"""Which node a backup is of, from the backup itself."""

from __future__ import annotations

import contextlib
import os
import re

import durable
from backend import Reading
from errors import Damaged, DatabaseError
from wallet import database, restore

_NAMED = re.compile(r"INSERT INTO vars \(name, blobval\) VALUES \('node_id', x'([0-9a-f]{66})'\);?")
"""How lightningd stores its id, once: at the first start of a node, or of its first release
that does."""


def of_backup(reading: Reading, scratch: str) -> str | None:
    """The ``database.node_id_of`` of what ``reading`` leads to; None if that cannot be told.

    It stands in the snapshot, or is among the changes of a backup that began without a node.

    Args:
        scratch: a file that is not there, for the snapshot; removed again.

    Raises:
        BackupError: the backup could not be read, for another reason than damage.
    """
    fd, has_snapshot = durable.create(scratch), False
    try:
        for change in reading:
            if change.snapshot is not None:
                if not change.snapshot:  # Another one begins.
                    os.ftruncate(fd, 0)
                durable.write_all(fd, change.snapshot, os.lseek(fd, 0, os.SEEK_END))
                has_snapshot = True
                continue
            if has_snapshot and (found := _of_snapshot(scratch)) is not None:
                return found
            has_snapshot = False
            assert change.transaction is not None
            for statement in change.transaction:
                if (named := _NAMED.fullmatch(statement)) is not None:
                    return named[1]
        if reading.damage is not None and not isinstance(reading.damage, Damaged):
            raise reading.damage
        return _of_snapshot(scratch) if has_snapshot else None
    finally:
        os.close(fd)
        restore.remove_database(scratch)


def _of_snapshot(path: str) -> str | None:
    with contextlib.suppress(DatabaseError):  # Damage may have cut it off.
        return database.node_id_of(path)
    return None
