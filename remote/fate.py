"""What became of a record whose answer was lost: pure functions of plain values."""

from __future__ import annotations

import enum

from filelog.layout2 import Head
from protocol import Details


class Fate(enum.Enum):
    """What became of a request whose answer was lost."""

    STORED = "the server has it"
    LOST = "the server never got it"
    UNKNOWN = "the server holds something else"


def fate_by_content(head: Head, before: Details, now: Details) -> Fate:
    """Whether the record ``head``, sent when the server was at ``before``, is stored ``now``."""
    if (now.chain, now.session) == (before.chain, before.session):
        return Fate.LOST
    if (now.chain, now.session) == (head.chain, head.session):
        return Fate.STORED
    return Fate.UNKNOWN
