"""What became of a record, as a client tells by the versions and counts of protocol 1."""

from __future__ import annotations

from backend import Change, bump
from protocol import Metadata
from remote.fate import Fate
from remote.protocol1 import fate_of_change, fate_of_rewind

OFF = ["PRAGMA foreign_keys = OFF;"]


def test_fate_of_a_change_by_enumeration() -> None:
    for bumps in (True, False):
        for version in range(1, 4):
            statements = ["SELECT 1", bump(version)] if bumps else OFF
            change = Change(version, None, statements)
            before = Metadata(1, change.base, change.base - 1 if change.base else 0, 5)
            for now_version in range(6):
                for count in range(9):
                    now = Metadata(1, now_version, max(now_version - 1, 0), count)
                    expected = Fate.UNKNOWN
                    if (now_version, count) == (version, 6):
                        expected = Fate.STORED
                    elif (now_version, count) == (change.base, 5):
                        expected = Fate.LOST
                    assert fate_of_change(version, before, now) is expected


def test_fate_of_a_rewind_by_enumeration() -> None:
    before = Metadata(1, 4, 3, 5)
    for version in range(7):
        for prev in range(7):
            for count in range(9):
                now = Metadata(1, version, prev, count)
                expected = Fate.UNKNOWN
                if now == before:
                    expected = Fate.LOST
                elif version == 3 and count in (4, 5):
                    expected = Fate.STORED
                assert fate_of_rewind(before, now) is expected
