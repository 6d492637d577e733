"""Where a compaction in a cluster may cut: every short history."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("psycopg")

from backend import FOREIGN_KEYS_OFF, FOREIGN_KEYS_ON, NOBODY, Change, bump, new_owner
from filelog import layout2
from filelog.layout2 import FINAL, Head, Kind
from filelog.reader import is_foreign_keys_off
from upkeep.inpostgres import boundary

SESSION = bytes(16)
BASE = Head(kind=Kind.SNAPSHOT, flags=FINAL, version=5, session=NOBODY, chain=b"c" * 16)


def records(letters: str) -> list[Head] | None:
    """A history: c is a change, o OFF, n ON, r a rewind, w an owner; None: there is none such."""
    heads = [BASE]
    for letter in letters:
        last = heads[-1]
        if letter == "w":
            head = layout2.owner_behind(last, new_owner(), b"")._replace(sequence=len(heads))
        elif letter == "r":
            if not last.rewindable:
                return None
            head = layout2.rewind_behind(last, SESSION, 1)
        else:
            pragma = {"o": FOREIGN_KEYS_OFF, "n": FOREIGN_KEYS_ON}
            version = last.version + (letter == "c")
            text = bump(version) if letter == "c" else pragma[letter]
            head = layout2.change_behind(last, Change(version, None, [text]), SESSION, 1)
        heads.append(head)
    return heads


def may_cut(heads: list[Head], place: int) -> bool:
    """Whether a snapshot may stand for all up to ``place``: told in another way."""
    behind = heads[place + 1 :]
    others = [head for head in behind if head.kind != Kind.OWNER]
    if place == 0 or not behind or is_foreign_keys_off(heads[place]):
        return False
    if others and others[0].kind == Kind.REWIND:
        return False
    return bool(others) or not heads[-1].rewindable


def test_every_short_history_is_cut_where_it_may_be() -> None:
    seen = 0
    for size in range(7):
        for letters in itertools.product("conrw", repeat=size):
            heads = records("".join(letters))
            if heads is None:
                continue
            seen += 1
            places = [place for place in range(len(heads)) if may_cut(heads, place)]
            expected = heads[places[-1]] if places else None
            assert boundary(heads[::-1]) == expected, letters
    assert seen > 5000
