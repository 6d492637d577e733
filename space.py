"""Room on a disk: housekeeping leaves a reserve for the changes of a node that runs."""

from __future__ import annotations

import os
import shlex
import shutil

from errors import BackupError, DiskError

RESERVE = 64 << 20
"""Bytes that stay free: the node's changes for a while, until somebody has made room."""
LOW_DISK_BYTES = 512 << 20
COMPACTION_FACTOR = 2
"""A compaction replays into a database and writes that into a new log, beside the old one."""


class NoRoom(BackupError):
    """The disk has no room for what was to be written."""


def require(path: str, needed: int = 0, way_out: str = "") -> None:
    """Refuse if ``needed`` more bytes on the disk of ``path`` leave less than RESERVE.

    Args:
        path: a file that need not be there, in a directory that is.
        way_out: what else can be done than to make room: a sentence.

    Raises:
        NoRoom, DiskError.
    """
    directory = os.path.dirname(path)
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise DiskError(directory, error, "look at the disk of") from error
    if free < needed + RESERVE:
        need = f"{needed / 2**20:.0f} MiB are needed, and " if needed else ""
        raise NoRoom(
            f"There is too little room in {directory}: {free >> 20} MiB are free, {need}"
            f"{RESERVE >> 20} MiB have to stay free for the node's changes.",
            f"Make room on that disk (`df -h {shlex.quote(directory)}`). {way_out}",
        )


def disk_warnings(path: str, backup_size: int) -> list[str]:
    """What to tell the operator about the space left on the disk of the backup ``path``.

    Args:
        backup_size: bytes of its snapshot and of its changes.
    """
    usage = shutil.disk_usage(os.path.dirname(path))
    need = wanted(backup_size)
    if usage.free >= need:
        return []
    return [
        f"The disk of {path} is nearly full: {usage.free >> 20} MiB of"
        f" {usage.total >> 20} MiB are free, and the backup may soon need {need >> 20} MiB."
        " When it is full the node stops."
    ]


def wanted(backup_size: int) -> int:
    """Free bytes below which a disk with a backup of ``backup_size`` bytes is nearly full.

    A share of the disk would say nothing: a backup of 1 GB needs no 190 GB of 4 TB.
    """
    return max(LOW_DISK_BYTES, COMPACTION_FACTOR * backup_size)
