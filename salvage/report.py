"""What a salvage found, in words for an operator, and for a program."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from backend import utc
from errors import CLI, printable
from salvage.delivery import Delivered
from salvage.histories import Hole
from salvage.images import Images
from salvage.index import Index

MOST_DELIVERED = 16
"""Histories for which a file is made."""
MOST_HOLES = 20
"""Runs of changes behind a hole that are named."""
MOST_SAID = 20
"""Lines of a kind."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    Attributes:
        size: bytes of the images.
        records: found, whole or not; copies count.
        broken: those of them that are not whole.
        delivered: what was made of it, the highest version first.
        not_tried: versions of the histories for which no file was made.
        holes: what stands behind a hole, in words and figures.
        hole_count: how many of these there are.
        limits: what was not looked at, in words.
    """

    size: int
    records: int
    broken: int
    delivered: Sequence[Delivered]
    not_tried: Sequence[int]
    holes: Sequence[Hole]
    hole_count: int
    limits: Sequence[str]


def counted(index: Index) -> tuple[int, int]:
    """Records in the index, and those that are not whole."""
    ((records, whole),) = index.ask("SELECT count(*), coalesce(sum(whole), 0) FROM pieces")
    return records, records - whole


def lines(report: Report, images: Images) -> Iterator[str]:
    """The report in words."""
    broken = f", {report.broken} of them not whole" if report.broken else ""
    yield f"{report.records} records were found in {report.size} bytes{broken}."
    for number, delivered in enumerate(report.delivered, 1):
        yield ""
        yield from _of_history(number, delivered)
    if report.not_tried:
        versions = ", ".join(str(v) for v in report.not_tried[:MOST_SAID])
        yield ""
        yield (f"{len(report.not_tried)} more histories were not delivered: versions {versions}")
    if report.holes:
        yield ""
        yield from _of_holes(report, images)
    yield from report.limits


def _of_history(number: int, found: Delivered) -> Iterator[str]:
    root = found.history.root
    begins = f"a snapshot at version {root.version}" if root.pieces else "the empty beginning"
    yield f"{number}. Version {found.version}: {begins} and {found.changes} changes"
    yield f"   file: {printable(found.path or 'none')}"
    if found.last_change_ns:
        yield f"   last change: {utc(found.last_change_ns)}"
    if found.layout == 1:
        yield "   out of a file of layout 1, which has no checksums: a wrong byte may not be seen"
    else:
        yield f"   sequence: {found.history.tip.sequence}"
    if found.history.branches:
        yield "   It parts from another one that was found. Neither is known to be the newest."
    yield f"   taken from {found.extent_count} places:"
    for extent in found.extents:
        yield f"     {printable(extent.path)}: {extent.size} bytes at offset {extent.offset}"
    if found.extent_count > len(found.extents):
        yield f"     and {found.extent_count - len(found.extents)} more"
    if found.failure:
        yield f"   {'It ends early' if found.path else 'Not delivered'}: {found.failure}"
    for problem in found.problems[:MOST_SAID]:
        yield f"   WARNING: {printable(problem)}"
    if found.path:
        restored = shlex.quote(f"v{found.version}.sqlite3")
        yield f"   to look into it: {CLI} restore {shlex.quote('file://' + found.path)} {restored}"


def _of_holes(report: Report, images: Images) -> Iterator[str]:
    yield "Behind holes, and never applied, because changes before them are missing:"
    for hole in report.holes:
        path, offset = images.where(hole.place)
        yield (
            f"   versions {hole.first} to {hole.last} ({hole.count} changes) of backup"
            f" {hole.backup_id.hex()[:12]}, from {printable(path)} offset {offset} on"
        )
    if report.hole_count > len(report.holes):
        yield f"   and {report.hole_count - len(report.holes)} more"


def as_json(report: Report, images: Images) -> dict[str, Any]:
    """The report for a program."""
    return {
        "bytes": report.size,
        "records": report.records,
        "broken_records": report.broken,
        "histories": [_history_json(found) for found in report.delivered],
        "not_delivered_versions": list(report.not_tried),
        "behind_holes": [
            {
                "first_version": hole.first,
                "last_version": hole.last,
                "changes": hole.count,
                "backup_id": hole.backup_id.hex(),
                "image": images.where(hole.place)[0],
                "offset": images.where(hole.place)[1],
            }
            for hole in report.holes
        ],
        "limits": list(report.limits),
    }


def _history_json(found: Delivered) -> dict[str, Any]:
    return {
        "file": found.path,
        "version": found.version,
        "last_change_ns": found.last_change_ns or None,
        "snapshot_version": found.history.root.version if found.history.root.pieces else None,
        "changes": found.changes,
        "sequence": found.history.tip.sequence if found.layout == 2 else None,
        "layout": found.layout,
        "branches": found.history.branches,
        "places": [
            {"image": e.path, "offset": e.offset, "size": e.size, "records": e.records}
            for e in found.extents
        ],
        "place_count": found.extent_count,
        "problems": found.problems,
        "failure": found.failure,
    }
