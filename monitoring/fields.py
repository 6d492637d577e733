"""What ``status --json`` prints and ``backup-status`` returns; docs/json.md describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from backend import MemberStatus, Status

Fields = dict[str, Any]

IN_STEP = "in step"
"""The standing of a destination that has all there is."""


def destination(
    url: str,
    found: Status | None = None,
    standing: str | None = None,
    error: str | None = None,
) -> Fields:
    """One of several destinations, as far as it is known."""
    return {
        "url": url,
        "standing": standing,
        "version": found.version if found else None,
        "last_change_ns": found.last_change_ns if found else None,
        "damage": (found.damage or found.unsound) if found else None,
        "warnings": found.warnings if found else [],
        "error": error,
        "since_ns": None,
        "last_error": None,
    }


def of_one(found: Status) -> Fields:
    """A backup that was looked at by itself."""
    several = {"in_step": None, "survives_loss_of": None, "goes_on_without": None}
    rows = [destination(url) for url in found.destinations]
    return dataclasses.asdict(found) | several | {"destinations": rows}


def of_several(leader: Status, rows: Sequence[Fields], acks: int) -> Fields:
    """A backup with several destinations.

    Args:
        leader: of the one that has all there is.
        rows: of each, see ``destination``.
        acks: how many must have stored a change.
    """
    in_step = sum(row["standing"] == IN_STEP and not row["damage"] for row in rows)
    return dataclasses.asdict(leader) | {
        "destinations": list(rows),
        "acks": acks,
        "in_step": in_step,
        "survives_loss_of": max(0, in_step - 1),
        "goes_on_without": max(0, in_step - acks),
    }


def with_members(shown: Fields, members: Sequence[MemberStatus]) -> Fields:
    """``shown`` with what the writer knows of each destination, which nobody else can."""
    known = {member.url: member for member in members}
    rows = shown.get("destinations") or [destination(url) for url in known]
    for row in rows:
        member = known.get(row["url"])
        if member is not None:
            row["standing"], row["since_ns"] = member.part, member.since_ns
            row["last_error"] = member.last_error
    return shown | {"destinations": rows}
