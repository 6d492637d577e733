"""A file is followed: its records come as they are written, whatever becomes of the file."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from backend import Change, Session, Snapshot
from destinations import FileDestination
from errors import BackupError, BackupMissing, Damaged, PlaceGone, UnsupportedLayout
from filebackend import FileBackend
from filelog import following, layout2
from filelog.following import LogFollower
from filelog.layout2 import Head, Kind
from filelog.reader import effective
from replica import Pause, Record
from tests import support
from tests.support import change, first_changes, opened, records_of
from upkeep.compaction import Compactor

OWNER = b"owner".ljust(16, b".")
RULES_0 = support.DATA / "golden" / "layout2-rules0.bkp"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A backup of five changes, after the owner."""
    url = f"file://{tmp_path}/node.bkp"
    FileBackend(url).create(None, OWNER)
    support.add_session(url, first_changes(5))
    return tmp_path / "node.bkp"


@pytest.fixture
def url(path: Path) -> str:
    return f"file://{path}"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks broken twice is, without a second in between."""
    monkeypatch.setattr(following, "GROWING_TAIL_S", 0.0)


def insert(version: int) -> Change:
    """The change of a node to ``version``."""
    return Change(*_call(version))


def _call(version: int) -> tuple[int, None, list[str]]:
    _, statements = change(version, f"INSERT INTO items VALUES ({version}, 'item {version}')")
    return version, None, statements


def numbers(records: Iterable[Record]) -> list[int]:
    return [head.sequence for head, _ in records]


def compact(backend: FileBackend) -> None:
    Compactor(backend, threading.Lock()).run()


def test_records_come_as_they_are_written(path: Path, url: str) -> None:
    follower = LogFollower(str(path), None)
    assert list(follower.fresh()) == records_of(path)
    assert list(follower.fresh()) == []
    with opened(url) as backend:
        for version in (6, 7):
            backend.add_change(insert(version))
            ((head, payload),) = follower.fresh()
            assert (head, payload) == records_of(path)[-1]
    with opened(url) as backend:
        backend.rewind()
        backend.add_change(insert(7))
        backend.take_over(bytes(16))
    kinds = [head.kind for head, _ in follower.fresh()]
    assert kinds == [Kind.REWIND, Kind.CHANGE, Kind.OWNER]


def test_pauses(url: str) -> None:
    """One as soon as all was given, and then again and again."""
    destination = FileDestination(url)
    with destination.follow(None) as records:
        found = [next(records) for _ in range(6)]
        assert not any(isinstance(each, Pause) for each in found)
        pause = next(records)
        assert isinstance(pause, Pause)
        assert pause.url == url and pause.newest is not None and pause.newest.version == 5
        support.add_session(url, first_changes(6)[5:])
        each = next(records)
        while isinstance(each, Pause):
            each = next(records)
        assert each[0].version == 6 and isinstance(next(records), Pause)
        assert isinstance(next(records), Pause)


def test_empty_backup(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/empty.bkp"
    FileBackend(url).create(None)
    with FileDestination(url).follow(None) as records:
        assert next(records) == Pause(url, None)
        support.add_session(url, first_changes(1))
        each = next(records)
        while isinstance(each, Pause):
            each = next(records)
        assert each[0].version == 1


def test_no_file_is_held_in_between(path: Path) -> None:
    """Else a log that a compaction replaced could not be freed in steps."""
    before = support.open_files()
    follower = LogFollower(str(path), None)
    assert len(list(follower.fresh())) == 6
    assert support.open_files() - before == set()


@pytest.mark.parametrize("stale", [False, True])
def test_from_each_record(path: Path, stale: bool) -> None:
    """Also where its offset is one of another file."""
    found = records_of(path)
    for number, (head, _) in enumerate(found):
        last = head._replace(offset=head.offset + 7 * stale)
        assert list(LogFollower(str(path), last).fresh()) == found[number + 1 :]


@pytest.mark.parametrize("place", range(1, 10))
def test_compaction_at_each_place(path: Path, url: str, place: int) -> None:
    """It goes on from its place, or that was folded with others."""
    with opened(url) as backend:
        for version in (6, 7, 8):
            backend.add_change(insert(version))
        last = records_of(path)[place - 1][0]
        follower = LogFollower(str(path), last)
        compact(backend)  # Up to version 7: the newest can be taken back.
        if last.version < 7:
            with pytest.raises(PlaceGone):
                list(follower.fresh())
            return
        assert numbers(follower.fresh()) == list(range(last.sequence + 1, 10))
        backend.add_change(insert(9))
        assert numbers(follower.fresh()) == [10]


def test_compaction_while_it_reads(path: Path, url: str) -> None:
    """It comes to the end of the file that it began with, and goes on in the other one."""
    with opened(url) as backend:
        follower = LogFollower(str(path), None)
        coming = follower.fresh()
        first = [next(coming), next(coming)]
        for version in (6, 7):
            backend.add_change(insert(version))
        compact(backend)
        backend.add_change(insert(8))
        rest = numbers(coming)
        assert numbers(first) + rest == list(range(1, 9))
        assert numbers(follower.fresh()) == [9]


def test_rewind_in_a_compacted_log(path: Path, url: str) -> None:
    follower = LogFollower(str(path), None)
    assert len(list(follower.fresh())) == 6
    with opened(url) as backend:
        compact(backend)
    with opened(url) as backend:
        backend.rewind()
        compact(backend)
        backend.add_change(insert(5))
    with pytest.raises(PlaceGone):  # The rewind was folded, and it has the change still.
        list(follower.fresh())


def test_another_backup_takes_its_place(path: Path, url: str, tmp_path: Path) -> None:
    node = tmp_path / "node.sqlite3"
    support.apply_calls(node, first_changes(5))
    follower = LogFollower(str(path), None)
    assert len(list(follower.fresh())) == 6
    FileBackend(url).replace(Snapshot(str(node), 5), OWNER)
    with pytest.raises(PlaceGone, match="version 5"):
        list(follower.fresh())
    again = LogFollower(str(path), None)
    assert [head.kind for head, _ in again.fresh()] == [Kind.SNAPSHOT, Kind.OWNER]


def test_empty_log_whose_place_another_takes(tmp_path: Path, path: Path) -> None:
    """Who was told of a log without a snapshot gets none."""
    url = f"file://{tmp_path}/empty.bkp"
    FileBackend(url).create(None)
    follower = LogFollower(str(tmp_path / "empty.bkp"), None)
    assert list(follower.fresh()) == []
    os.replace(path, tmp_path / "empty.bkp")
    with pytest.raises(PlaceGone):
        list(follower.fresh())


def test_append_in_flight_at_every_byte(path: Path, url: str, tmp_path: Path) -> None:
    """Not there yet, and no damage, however long it takes."""
    before = path.read_bytes()
    with opened(url) as backend:
        backend.add_change(insert(6))
        head = backend.newest
    whole = path.read_bytes()
    partial = tmp_path / "partial.bkp"
    for cut in range(head.offset, head.end, 5):
        partial.write_bytes(whole[:cut] + bytes(len(before) - cut))
        follower = LogFollower(str(partial), records_of(path)[-2][0])
        assert [list(follower.fresh()) for _ in range(3)] == [[], [], []]
        # Torn for good: the next writer moves it away, and goes on.
        if cut % 25 == 0:
            with opened(f"file://{partial}") as writer:
                assert list(follower.fresh()) == []
                writer.add_change(insert(6))
                assert numbers(follower.fresh()) == [7]
        partial.write_bytes(whole)
        assert [head.version for head, _ in LogFollower(str(partial), follower.last).fresh()] in (
            [6],
            [],
        )


def damaged(records: LogFollower) -> Damaged:
    """What it says at last, where the first look could be at an append in flight."""

    def look() -> None:
        for _ in range(3):
            list(records.fresh())

    with pytest.raises(Damaged) as found:
        look()
    return found.value


def test_damage(path: Path) -> None:
    found = records_of(path)
    follower = LogFollower(str(path), found[1][0])
    support.flip(path, found[3][0].offset + 130)
    assert numbers(follower.fresh()) == [3]
    assert damaged(follower).offset == found[3][0].offset
    assert damaged(LogFollower(str(path), found[2][0])).last_good == 2


def test_hole_behind_the_last_record(path: Path, url: str) -> None:
    """A record that the disk lost with another behind it: it does not wait for ever."""
    follower = LogFollower(str(path), records_of(path)[-1][0])
    with opened(url) as backend:
        backend.add_change(insert(6))
        lost = backend.newest
        backend.add_change(insert(7))
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(lost.end - lost.offset), lost.offset)
    assert damaged(follower).offset == lost.offset


def test_file_that_was_cut(path: Path) -> None:
    found = records_of(path)
    os.truncate(path, found[4][0].offset + 10)
    assert damaged(LogFollower(str(path), found[2][0])).offset == found[4][0].offset
    with pytest.raises(PlaceGone):
        list(LogFollower(str(path), found[5][0]).fresh())


def test_newest_record_that_a_loss_of_power_took(path: Path, url: str) -> None:
    """It was never acknowledged; it goes on from the one before."""
    before = path.read_bytes()
    follower = LogFollower(str(path), None)
    with opened(url) as backend:
        backend.add_change(insert(6))
        assert len(list(follower.fresh())) == 7
    path.write_bytes(before)
    with pytest.raises(PlaceGone):
        list(follower.fresh())
    other = change(6, "INSERT INTO items VALUES (6, 'another')")
    support.add_session(url, [other])
    with pytest.raises(PlaceGone):
        list(follower.fresh())
    one_before = LogFollower(str(path), records_of(path)[-2][0])
    assert list(one_before.fresh()) == records_of(path)[-1:]


def test_refused(tmp_path: Path, path: Path) -> None:
    support.layout1_file(tmp_path / "old.bkp")
    shutil.copy(RULES_0, tmp_path / "rules0.bkp")
    for name in ("old.bkp", "rules0.bkp"):
        with (
            pytest.raises(UnsupportedLayout, match="upgrade"),
            FileDestination(f"file://{tmp_path}/{name}").follow(None) as records,
        ):
            next(records)
    with pytest.raises(BackupMissing):
        list(LogFollower(str(tmp_path / "none.bkp"), None).fresh())
    support.flip(path, 30)
    with pytest.raises(Damaged):
        list(LogFollower(str(path), None).fresh())


def test_another_log_of_the_same_history(path: Path, url: str, tmp_path: Path) -> None:
    """As several destinations hold it: numbered otherwise, and from each of its records."""
    with opened(url) as backend:
        backend.add_change(insert(6))
    with opened(url) as backend:
        backend.rewind()
        backend.add_change(insert(6))
        backend.add_change(insert(7))
    other = FileBackend(f"file://{tmp_path}/other.bkp")
    other.create(None)
    for number, (head, payload) in enumerate(records_of(path)):
        with opened(other.url) as writer:
            if number == 3:
                writer.take_over(OWNER)
            writer.add_record(head, payload)
    theirs = records_of(Path(other.path))
    for number, (head, _) in enumerate(records_of(path), 1):
        rest = list(LogFollower(other.path, head).fresh())
        expected = records_of(path)[number:]
        ahead = [record[0].chain for record in rest if record[0].kind != Kind.OWNER]
        # A place that comes twice is the later one.
        wanted = [each[0].chain for each in expected if each[0].kind != Kind.OWNER]
        assert ahead == wanted[len(wanted) - len(ahead) :], number
        assert len(ahead) == len(wanted) or head.chain in [h.chain for h, _ in expected]
    apart = theirs[-1][0]._replace(backup_id=bytes(16), chain=bytes(range(16)))
    with pytest.raises(PlaceGone):
        list(LogFollower(other.path, apart).fresh())


def test_hostile_places(path: Path) -> None:
    """A place that a client names may be anything."""
    chance = random.Random(7)
    last = records_of(path)[-1][0]
    big = 2**64 - 1
    for _ in range(300):
        name = chance.choice(Head._fields)
        value = getattr(last, name)
        wild: object = chance.randbytes(len(value)) if isinstance(value, bytes) else 0
        if isinstance(value, int):
            wild = chance.choice([0, 1, big, chance.getrandbits(64), value + 1, value - 1])
        head = last._replace(**{name: wild})  # type: ignore[arg-type]
        with contextlib.suppress(PlaceGone):
            assert list(LogFollower(str(path), head).fresh()) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_life(tmp_path: Path, seed: int) -> None:
    """Killed sessions, rewinds, PRAGMAs and compactions of a recorded node: nothing is lost."""
    url, chance = f"file://{tmp_path}/life.bkp", random.Random(seed)
    FileBackend(url).create(None, OWNER)
    follower, held = LogFollower(str(tmp_path / "life.bkp"), None), list[Record]()

    def look() -> None:
        nonlocal follower
        try:
            held.extend(follower.fresh())
        except PlaceGone:
            follower = LogFollower(str(tmp_path / "life.bkp"), None)
            held[:] = follower.fresh()

    for calls in support.trace_sessions("crash")[:12]:
        with opened(url) as backend:
            session = Session(backend, "/nowhere")
            for version, statements in calls[: chance.randrange(1, 30)]:
                try:
                    session.write(Change(version, None, statements))
                except BackupError:
                    break  # The part of the session before was left out.
                if chance.random() < 0.3:
                    look()
            if chance.random() < 0.3:
                compact(backend)
    look()
    everything = [found for _, found in effective(records_of(tmp_path / "life.bkp"))]
    ours = [found for _, found in effective(held)]
    changes = [each for each in everything if isinstance(each, Change) and each.transaction]
    assert ours[len(ours) - len(changes) :] == changes
    assert follower.last is not None
    assert follower.last.chain == records_of(tmp_path / "life.bkp")[-1][0].chain
    assert layout2.RULES == 1
