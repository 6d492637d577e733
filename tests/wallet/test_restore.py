"""Building a database from a pass over a backup: plain values in, a file out."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import space
from backend import Beginning, Change, Ending, Found, Step, outcome
from errors import BackupError
from tests import support
from wallet import restore

DAMAGE = BackupError("It is damaged.")
CALLS = support.first_changes(6)
CHANGES = [Change(version, None, statements) for version, statements in CALLS]


def steps(*found: Found) -> Iterator[Step]:
    """A pass over a backup of as many bytes as it has steps."""
    for number, each in enumerate(found, 1):
        yield Step(each, number, len(found))


def snapshot(directory: Path, version: int) -> list[Found]:
    """A snapshot of a node at ``version``: its beginning, and its pieces."""
    path = directory / f"snapshot-{version}"
    support.apply_calls(path, CALLS[:version])
    data = path.read_bytes()
    path.unlink()
    half = len(data) // 2
    pieces = [Change(version, piece, None) for piece in (data[:half], data[half:])]
    return [Beginning(version, len(data)), *pieces]


def items(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT id FROM items ORDER BY id")]


@pytest.mark.parametrize("before", ["nothing", "changes", "a snapshot", "half a snapshot"])
def test_snapshot_replaces_what_came_before(before: str, tmp_path: Path) -> None:
    first: dict[str, Sequence[Found]] = {
        "nothing": (),
        "changes": CHANGES[:3],
        "a snapshot": [*snapshot(tmp_path, 2), CHANGES[2]],
        "half a snapshot": snapshot(tmp_path, 2)[:2],
    }
    target, places = tmp_path / "target", list[tuple[int, int]]()
    found = [*first[before], *snapshot(tmp_path, 4), CHANGES[4], Ending(5)]
    ending, changes = restore.build(
        steps(*found), str(target), False, lambda *place: places.append(place)
    )
    assert (ending, changes, items(target)) == (Ending(5), 1, [2, 3, 4, 5])
    assert places == [(number, len(found)) for number in range(1, len(found) + 1)]


def test_beginning_alone_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(restore.NothingToRestore):
        restore.build(
            steps(*CHANGES[:2], Beginning(2), Ending(2)),
            str(tmp_path / "target"),
            False,
            lambda *_: None,
        )


@pytest.mark.parametrize("damage", [None, DAMAGE])
@pytest.mark.parametrize("up_to", range(1, 6))
def test_up_to_a_version_damage_behind_it_does_not_count(
    up_to: int, damage: BackupError | None, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    found: list[Found] = [*CHANGES[:4], Ending(4, 1, True, damage, ("a note",))]
    if up_to == 5:
        with pytest.raises(BackupError) as error:
            restore.build(steps(*found), str(target), False, lambda *_: None, up_to)
        assert error.value is damage or "holds versions 1 to 4" in str(error.value)
        return
    ending, changes = restore.build(steps(*found), str(target), False, lambda *_: None, up_to)
    assert ending == Ending(up_to, notes=("a note",) if up_to == 4 else ())
    assert (changes, items(target)) == (up_to, list(range(2, up_to + 1)))


def test_room_for_the_snapshot_is_asked_for_at_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = snapshot(tmp_path, 4)
    assert isinstance(begun[0], Beginning) and begun[0].size
    asked: list[int] = []
    monkeypatch.setattr(space, "require", lambda path, needed, way_out: asked.append(needed))
    restore.verify(steps(*begun, Ending(4)), str(tmp_path / "x"), None, lambda *_: None)
    assert asked == [0, begun[0].size, 0, 0, 0]


def test_outcome_is_the_ending() -> None:
    assert outcome(steps(*CHANGES, Ending(6, damage=DAMAGE))) == Ending(6, damage=DAMAGE)
    with pytest.raises(AssertionError, match="ends in one"):
        outcome(steps(*CHANGES))
