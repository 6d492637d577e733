"""What ``backup-cli watch`` shows: samples of a backup as one screen, or as one line."""

from __future__ import annotations

import glob
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from backend import utc
from scratch import HELD

WORK = (
    ("compaction", ".scratch-compact-"),
    ("check", ".scratch-scrub-"),
    ("snapshot on its way in", ".scratch-in-"),
    ("restore", ".restoring-"),
    ("copy from a server", ".fetched"),
    ("replay beside the backup", ".scratch-"),
)
"""What goes on, and what the names of its scratch files have; the first that fits counts."""


class Work(NamedTuple):
    """Something that goes on beside the node: what, and how many bytes it has written."""

    what: str
    size: int


class Sample(NamedTuple):
    """One look.

    Attributes:
        at_s: time.monotonic().
        found: as ``status --json`` prints it, perhaps with what ``backup-status`` adds.
        work: what goes on beside.
    """

    at_s: float
    found: Mapping[str, Any]
    work: Sequence[Work] = ()


def work_beside(prefixes: Sequence[str]) -> list[Work]:
    """What goes on, by the scratch files whose paths begin with one of ``prefixes``."""
    sizes: dict[str, int] = {}
    for path in itertools.chain.from_iterable(
        glob.iglob(glob.escape(prefix) + "*") for prefix in prefixes
    ):
        what = next((what for what, mark in WORK if mark in os.path.basename(path)), None)
        if what is not None and not path.endswith(HELD):
            sizes[what] = sizes.get(what, 0) + _allocated(path)
    return [Work(what, size) for what, size in sizes.items()]


def _allocated(path: str) -> int:
    try:
        return 512 * os.stat(path).st_blocks
    except OSError:  # It has just come to its end.
        return 0


def rate(samples: Sequence[Sample]) -> float | None:
    """Changes a second over ``samples``, oldest first; None: not known."""
    known = [sample for sample in samples if sample.found.get("version") is not None]
    if len(known) < 2:
        return None
    changes: int = known[-1].found["version"] - known[0].found["version"]
    return changes / (known[-1].at_s - known[0].at_s)


def one_line(samples: Sequence[Sample]) -> str:
    """The newest of ``samples`` for who has no terminal."""
    return ", ".join([time.strftime("%H:%M:%S"), *(f"{a} {b}" for a, b in _rows(samples))])


def screen(samples: Sequence[Sample]) -> str:
    """The newest of ``samples`` on several lines."""
    return in_columns(_rows(samples))


def in_columns(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, a line each; one without a name goes on with the one before."""
    return "\n".join(f"{name + ':' if name else '':16}{value}" for name, value in rows)


def _rows(samples: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    found = samples[-1].found
    yield "backup", str(found.get("url", "unknown"))
    if "error" in found:
        yield "error", str(found["error"])
        return
    per_s = rate(samples)
    yield "version", str(found.get("version"))
    yield "changes", "unknown" if per_s is None else f"{per_s:.1f} a second"
    last_ns = found.get("last_change_ns")
    yield "last change", utc(last_ns) if last_ns else "none"
    if "median_hook_ms" in found:
        yield (
            "hook",
            f"{found['median_hook_ms']} ms (median), {found['p99_hook_ms']} ms (99 of 100),"
            f" {found['worst_hook_ms']} ms (longest)",
        )
    if found.get("size") is not None:
        yield "size", f"{found['size'] / 1e6:.1f} MB"
    for row in found.get("destinations") or []:
        lag = "" if row["version"] is None else f", {_lag(found, row)} changes behind"
        yield "destination", f"{row['url']}: {row['standing'] or 'not looked at'}{lag}"
    for work in samples[-1].work:
        yield work.what, f"{work.size / 1e6:.1f} MB written"
    for problem in (found.get("damage"), found.get("unsound"), *found.get("warnings", ())):
        if problem:
            yield "attention", str(problem)


def _lag(found: Mapping[str, Any], row: Mapping[str, Any]) -> int:
    behind: int = found["version"] - row["version"]
    return max(0, behind)
