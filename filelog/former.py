"""Backups whose place another has taken: ``<backup>.old-<time>``, two of them at most."""

from __future__ import annotations

import glob
import os
import re

import durable
from backend import log
from filelog import layout1

AT_MOST = 2
_NAME = re.compile(r"\.old-([0-9]{8}T[0-9]{6}Z)(?:-([0-9]+))?")


def prune(path: str) -> None:
    """Remove the older ones of the backup ``path``, once that is proven to restore.

    A backup of the earlier plugin stays, and does not count.
    """
    for name in _by_age(path)[:-AT_MOST]:
        durable.discard_gently(name)
        log.info(f"{name} is removed: {path} is proven to restore, and {AT_MOST} newer are kept")


def count(path: str) -> int:
    """How many there are of the backup ``path``."""
    return len(_by_age(path))


def _by_age(path: str) -> list[str]:
    """Those there are, the oldest first."""
    found = []
    for name in glob.glob(f"{glob.escape(path)}.old-*"):
        matched = _NAME.fullmatch(name, len(path))
        if matched is not None and os.path.isfile(name) and not layout1.is_layout_1(name):
            found.append((matched[1], int(matched[2] or 1), name))
    return [name for *_, name in sorted(found)]
