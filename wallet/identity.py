"""Which node a backup is of, from the backup itself."""

from __future__ import annotations

import contextlib
import os
import re

import durable
from backend import Beginning, Change, Ending, Reading
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
        for found, *_ in reading:
            if isinstance(found, Beginning):
                os.ftruncate(fd, 0)
            elif isinstance(found, Change) and found.snapshot is not None:
                durable.write_all(fd, found.snapshot, os.lseek(fd, 0, os.SEEK_END))
                has_snapshot = True
            else:  # The snapshot is complete, or what there is of it.
                if has_snapshot and (node_id := _of_snapshot(scratch)) is not None:
                    return node_id
                has_snapshot = False
                if isinstance(found, Ending):
                    break
                if (named := _named(found)) is not None:
                    return named
        assert isinstance(found, Ending), "a pass ends in one"
        if found.damage is not None and not isinstance(found.damage, Damaged):
            raise found.damage
        return None
    finally:
        os.close(fd)
        restore.remove_database(scratch)


def _named(change: Change) -> str | None:
    """The node's id if ``change`` stores it."""
    for statement in change.transaction or ():
        if (named := _NAMED.fullmatch(statement)) is not None:
            return named[1]
    return None


def _of_snapshot(path: str) -> str | None:
    with contextlib.suppress(DatabaseError):  # Damage may have cut it off.
        return database.node_id_of(path)
    return None
