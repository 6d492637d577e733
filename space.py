"""Room on a disk: housekeeping leaves a reserve for the changes of a node that runs."""

from __future__ import annotations

import os
import shlex
import shutil

from errors import BackupError, DiskError

RESERVE = 64 << 20
"""Bytes that stay free: the node's changes for a while, until somebody has made room."""


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
