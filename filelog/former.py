"""Backups whose place another has taken: ``<backup>.old-<time>``, two of them at most."""

from __future__ import annotations

import glob
import os
import re
import time

import durable
from backend import log
from filelog import layout1

AT_MOST = 2
_NAME = re.compile(r"\.old-([0-9]{8}T[0-9]{6}Z)(?:-([0-9]+))?")


def new_name(path: str) -> str:
    """A name for the backup ``path``, whose place another takes: after all there are by age.

    A machine without a clock of its own may have set that back.
    """
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    stamp, number = max([(now, 0), *(age for age, _ in _named(path))])
    return f"{path}.old-{stamp}" + (f"-{number + 1}" if number else "")


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
    names = [name for _, name in sorted(_named(path))]
    return [name for name in names if os.path.isfile(name) and not layout1.is_layout_1(name)]


def _named(path: str) -> list[tuple[tuple[str, int], str]]:
    """What is named like one, each with its place by age."""
    found = []
    for name in glob.glob(f"{glob.escape(path)}.old-*"):
        matched = _NAME.fullmatch(name, len(path))
        if matched is not None:
            found.append(((matched[1], int(matched[2] or 1)), name))
    return found
