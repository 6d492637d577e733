"""Deaths at chosen moments of a node with several destinations, and what is restored then."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import mirrorbackend
from backend import Change, Session, Snapshot, new_owner, outcome
from errors import BackupError, ConfigError, DiskError, OtherOwner
from filelog import appender
from filelog.layout2 import (
    Head,
    Kind,
    change_behind,
    encode_owner,
    owner_behind,
    session_of,
    start_of,
    term_of,
)
from mirrorbackend import MirrorBackend
from quorum import Relation, Roster
from several import hearing, joining
from several.catchup import CatchUp, stand
from tests import support
from tests.peers import ServerProcess
from tests.whole.test_several_model import Failing, Flaky, FlakyServed, Place

CALLS = support.first_changes(9)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrorbackend, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(mirrorbackend, "RETRY_FOR_S", 0.05)
    monkeypatch.setattr(mirrorbackend, "PATIENCE_S", 0.05)
    monkeypatch.setattr(appender, "RETRY_FOR_S", 0.0)


class Several:
    """A backup at some files, whose disks do what they are told."""

    def __init__(self, directory: Path, count: int, acks: int) -> None:
        self.places: list[Place] = []
        for number in range(count):
            (directory / str(number)).mkdir()
            self.places.append(Place(f"file://{directory}/{number}/node.bkp"))
        self.by_url = {place.url: place for place in self.places}
        self.roster = Roster(1, acks, tuple(self.by_url))
        self.owner = new_owner()
        self.mirror().create(None, self.owner)

    def make(self, url: str) -> Flaky:
        return Flaky(self.by_url[url])

    def mirror(self) -> MirrorBackend:
        return MirrorBackend(self.roster, self.make)

    def up(self, *numbers: int) -> None:
        for number, place in enumerate(self.places):
            place.up = number in numbers

    def run(self, *versions: int) -> None:
        """A run of the node that writes ``versions``, and is killed."""
        mirror = self.mirror()
        with contextlib.closing(mirror):
            mirror.open(self.owner)
            session = Session(mirror, "DIR")
            for version in versions:
                session.write(Change(version, None, CALLS[version - 1][1]))

    def restored(self, numbers: Sequence[int]) -> int:
        """The version that a restore from some of them gives."""
        for place in self.places:
            place.up = True
        found = hearing.hear([self.make(self.places[number].url) for number in numbers])
        chosen, _ = hearing.choose(found)
        with contextlib.closing(chosen.replica.read()) as reading:
            return outcome(reading).version


def test_starts_that_came_no_further_do_not_outvote_what_was_acknowledged(tmp_path: Path) -> None:
    """Each took a number, and only one destination has heard of it."""
    several = Several(tmp_path, 3, 2)
    several.up(0, 1, 2)
    several.run(1, 2)
    for _ in range(3):
        several.up(0, 2)
        several.places[0].fails = "before"
        with pytest.raises(BackupError):
            several.run(3)
    several.up(0, 1)
    several.places[0].fails = ""
    several.run(3)
    for two in itertools.combinations(range(3), 2):
        assert several.restored(two) == 3
    several.up(1, 2)
    several.run(4)
    for two in itertools.combinations(range(3), 2):
        assert several.restored(two) == 4


def rewritten(several: Several, urls: Sequence[str], acks: int) -> None:
    """An attach of ``urls`` by another owner."""
    plan = joining.plan(urls, acks, several.roster, several.make)
    joining.bring_all(plan, several.make, lambda *_: None)
    owner = new_owner()
    unaware = joining.take_over(plan, owner, several.make)
    assert not unaware
    several.owner, several.roster = owner, plan.roster


def test_the_node_of_before_is_shut_out_of_the_whole_former_list(tmp_path: Path) -> None:
    """Another node goes on with one of three, and a new one: two of the three are left."""
    several = Several(tmp_path, 4, 2)
    urls = [place.url for place in several.places]
    before = several.roster, several.owner
    several.up(0, 1, 2, 3)
    several.run(1, 2)
    rewritten(several, urls[:1], 1)
    after = several.roster, several.owner
    several.roster, several.owner = before
    several.up(1, 2, 3)
    with pytest.raises(BackupError):
        several.run(3)
    several.roster, several.owner = after


def test_one_that_was_dropped_says_so(tmp_path: Path) -> None:
    """Alone it looks like a whole backup, and where all acknowledge one is enough."""
    several = Several(tmp_path, 3, 3)
    urls = [place.url for place in several.places]
    several.up(0, 1, 2)
    several.run(1, 2)
    rewritten(several, urls[:2], 2)
    several.run(3)
    with pytest.raises(hearing.Silent, match="none of them"):
        several.restored([2])
    assert several.restored([2, 0]) == 3


def test_a_copy_that_is_older_does_not_stand_for_its_original(tmp_path: Path) -> None:
    several = Several(tmp_path, 3, 2)
    several.up(0, 1, 2)
    several.run(1, 2)
    copy = Place(f"file://{tmp_path}/copy.bkp")
    copy.path.write_bytes(several.places[0].path.read_bytes())
    several.up(0, 2)
    several.run(3)
    several.places.append(copy)
    several.by_url[copy.url] = copy
    for some in itertools.permutations([3, 0, 1]):
        assert several.restored(some) == 3
    with pytest.raises(hearing.Silent):
        several.restored([3, 0])
    with pytest.raises(ConfigError, match="copy"):
        joining.plan([copy.url, several.places[0].url], 2, several.roster, several.make)


def test_a_copy_that_an_attach_left_halfway_has_no_vote(tmp_path: Path) -> None:
    several = Several(tmp_path, 4, 2)
    urls = [place.url for place in several.places]
    several.places[3].path.unlink()
    several.roster = several.roster._replace(urls=tuple(urls[:3]))
    for place in several.places[:3]:
        place.path.unlink()
    several.mirror().create(None, several.owner)
    several.up(0, 1, 2, 3)
    several.run(1, 2)
    plan = joining.plan(urls, 2, several.roster, several.make)
    joining.bring_all(plan, several.make, lambda *_: None)
    several.up(0, 1)
    several.run(3)  # It was killed there, and the node goes on as before.
    with pytest.raises(hearing.Silent):
        several.restored([2, 3])
    assert several.restored([1, 2, 3]) == 3


@pytest.mark.parametrize("deaths", range(7))
def test_an_attach_that_dies_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    """Whatever it came to, one list alone can go on, and each that restores restores all."""
    several = Several(tmp_path, 3, 2)
    urls = [place.url for place in several.places]
    several.up(0, 1, 2)
    several.run(1, 2)
    left, add = deaths, Flaky.add_record

    def dying(flaky: Flaky, head: Head, payload: bytes) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        add(flaky, head, payload)

    before = several.roster, several.owner
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Flaky, "add_record", dying)
        rewritten(several, urls[:1], 1)
    several.roster, several.owner = before
    newest = 2
    with contextlib.suppress(BackupError):
        several.up(1, 2)
        several.run(3)
        newest = 3
    assert newest == (2 if deaths > 1 else 3)
    for some in itertools.chain.from_iterable(
        itertools.permutations(range(3), n) for n in (1, 2, 3)
    ):
        with contextlib.suppress(hearing.Silent):
            assert several.restored(some) == newest, some
    assert several.restored([0, 1, 2]) == newest


def test_one_that_fails_when_it_has_just_been_opened_is_not_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = Several(tmp_path, 3, 2)
    several.up(0, 1, 2)
    failing, roster = [several.places[2].url], Flaky.roster

    def fails_once(flaky: Flaky) -> Roster | None:
        if flaky.url in failing:
            failing.remove(flaky.url)
            raise DiskError(flaky.path, OSError(5, "injected"), "read")
        return roster(flaky)

    monkeypatch.setattr(Flaky, "roster", fails_once)
    mirror = several.mirror()
    with contextlib.closing(mirror):
        mirror.open(several.owner)
        settle(mirror)


def test_what_to_type_where_one_has_no_vote(tmp_path: Path) -> None:
    several = Several(tmp_path, 2, 1)
    several.up(0, 1)
    several.run(1, 2)
    copied_to = several.make(several.places[1].url)
    payload = encode_owner(0, "here", several.roster._replace(votes=False))
    with contextlib.closing(copied_to):
        copied_to.open(several.owner)
        newest = copied_to.newest
        copied_to.add_record(owner_behind(newest, newest.session, payload), payload)
    with pytest.raises(hearing.Silent, match=r"was being given the whole.*resync --lightning-dir"):
        several.run(3)
    several.up(0)
    with pytest.raises(hearing.Silent, match="Bring them back"):
        several.run(3)
    several.up(0, 1)
    several.roster = several.roster._replace(epoch=2)
    with pytest.raises(hearing.Silent, match=r"another list of.*attach --lightning-dir"):
        several.run(3)


def test_what_another_node_took_over_is_not_started_over(tmp_path: Path) -> None:
    several = Several(tmp_path, 3, 2)
    several.up(0, 1, 2)
    several.run(1)
    before = [place.path.read_bytes() for place in several.places]
    support.apply_calls(tmp_path / "node.sqlite3", CALLS[:3])
    snapshot = Snapshot(str(tmp_path / "node.sqlite3"), 3)
    with pytest.raises(OtherOwner):
        several.mirror().replace(snapshot, new_owner())
    assert [place.path.read_bytes() for place in several.places] == before
    several.mirror().replace(snapshot, several.owner)
    assert several.restored([0, 1, 2]) == 3


def test_one_that_cannot_be_compacted_keeps_no_other_from_it(tmp_path: Path) -> None:
    several = Several(tmp_path, 2, 2)
    several.up(0, 1)
    several.run(1, 2, 3)
    several.up(1)
    with pytest.raises(BackupError, match=f"compacted: {several.places[0].url}: .*injected"):
        several.mirror().compact()
    assert several.make(several.places[1].url).status().changes == 1


def settle(mirror: MirrorBackend) -> None:
    """Wait until each of them has all."""

    def is_settled() -> bool:
        number = mirror._first + len(mirror._tail)
        return all(mirror._has(member, number) for member in mirror._members)

    with mirror._changed:
        assert mirror._changed.wait_for(is_settled, 60)


def broken(place: Place) -> None:
    """A bit turns in the middle of the log, which nobody sees who looks at its end."""
    support.flip(place.path, support.records_of(place.path)[2][0].end - 6)


def test_damage_in_the_middle_is_no_reason_to_stand_still(tmp_path: Path) -> None:
    """What is behind has to be compared with one that can be read."""
    several = Several(tmp_path, 3, 2)
    several.up(0, 1, 2)
    several.run(1, 2)
    several.up(0, 1)
    several.run(3, 4)
    broken(several.places[0])
    assert several.restored([0, 1, 2]) == 4
    with pytest.raises(hearing.Silent):
        several.restored([0, 2])
    mirror = several.mirror()
    with contextlib.closing(mirror):
        mirror.open(several.owner)
        Session(mirror, "DIR").write(Change(5, None, CALLS[4][1]))
        with mirror._changed:
            assert mirror._changed.wait_for(lambda: mirror._members[0].was_mended, 60)
        settle(mirror)
    for numbers in ([0, 1], [0, 2], [1, 2]):
        assert several.restored(numbers) == 5


def test_restore_takes_another_one_that_holds_the_same(tmp_path: Path) -> None:
    several = Several(tmp_path, 3, 3)
    several.up(0, 1, 2)
    several.run(1, 2, 3)
    broken(several.places[0])
    urls = [place.url for place in several.places]
    done = support.run_cli("restore", *urls, tmp_path / "restored.sqlite3")
    assert "Restored version 3" in done.stdout and "holds the same is taken" in done.stderr
    support.run_cli("restore", urls[0], tmp_path / "none.sqlite3", check=1)


def test_one_that_a_check_found_unsound_is_replaced(tmp_path: Path) -> None:
    several = Several(tmp_path, 3, 2)
    several.up(0, 1, 2)
    mirror = several.mirror()
    with contextlib.closing(mirror):
        mirror.open(several.owner)
        session = Session(mirror, "DIR")
        for version in (1, 2, 3):
            session.write(Change(version, None, CALLS[version - 1][1]))
        settle(mirror)
        broken(several.places[1])
        was = several.places[1].path.read_bytes()
        mirror._members[1].backend.unsound = "found by a check"
        session.write(Change(4, None, CALLS[3][1]))
        with mirror._changed:
            assert mirror._changed.wait_for(lambda: mirror._members[1].was_mended, 60)
        settle(mirror)
        assert mirror._members[1].backend.unsound is None
    kept = [path for path in several.places[1].path.parent.iterdir() if ".old-" in path.name]
    assert len(kept) == 1 and kept[0].read_bytes()[: 1 << 10] == was[: 1 << 10]
    assert several.restored([1, 2]) == 4


def test_an_unsound_one_is_never_replaced_by_one_that_has_less(tmp_path: Path) -> None:
    """What it acknowledged counts: without that it would still vote."""
    several = Several(tmp_path, 3, 2)
    several.up(0, 1, 2)
    mirror, slow = several.mirror(), several.places[0]
    with contextlib.closing(mirror):
        mirror.open(several.owner)
        session = Session(mirror, "DIR")
        session.write(Change(1, None, CALLS[0][1]))
        settle(mirror)
        slow.hangs = threading.Event()
        session.write(Change(2, None, CALLS[1][1]))
        unsound = mirror._members[2]
        with mirror._changed:
            unsound.backend.unsound = "found by a check"
            assert not mirror._may_mend(unsound)
            mirror._changed.notify_all()
        slow.hangs.set()
        with mirror._changed:
            assert mirror._changed.wait_for(lambda: unsound.was_mended, 60)
        settle(mirror)
    assert several.restored([0, 2]) == 2


def test_a_compaction_keeps_the_term(tmp_path: Path) -> None:
    """Also where nothing is left behind the snapshot but whose the backup is."""
    several = Several(tmp_path, 3, 2)
    several.up(0, 1)
    several.run(1, 2)
    mirror = several.mirror()
    with contextlib.closing(mirror):
        mirror.open(several.owner)
        session = Session(mirror, "DIR")
        session.write(Change(3, None, CALLS[2][1]))
        session.write(Change(3, None, ["PRAGMA foreign_keys = ON;"]))
    before = several.make(several.places[0].url).look().newest
    several.make(several.places[0].url).compact()
    after = several.make(several.places[0].url).look().newest
    assert (after.kind, after.chain) == (Kind.OWNER, before.chain)
    assert term_of(after.session) == term_of(before.session)


def test_a_server_that_begins_anew_is_never_without_what_it_acknowledged(tmp_path: Path) -> None:
    """It is cut off in the middle: right behind the snapshot it has a vote again."""
    several = Several(tmp_path, 2, 1)
    several.up(0, 1)
    several.run(1, 2)
    served = several.places[1]
    with ServerProcess(served.url) as server:
        target = FlakyServed(Place(server.url, served.path))
        served.up = False
        source = several.make(several.places[0].url)
        more = LogAdder(source, several.owner)
        more.add(3, 4, 5)
        source.compact()
        more.add(6, 7)
        with contextlib.closing(target):
            target.open(several.owner)
            standing = stand(hearing.end_of(target.newest), target.newest.tag, source)
            assert standing.relation is Relation.FOLDED
            start = start_of(target.newest.session)
            target.place.fails = "after"
            catch_up = CatchUp(target, threading.Lock(), several.owner, True)
            with pytest.raises(BackupError):
                catch_up.bring(source, standing)
            target.place.up = True
        with contextlib.closing(target):
            target.open(several.owner)
            assert start_of(target.newest.session) >= start
            assert target.roster() == several.roster
            CatchUp(target, threading.Lock(), several.owner, True).bring(
                source, stand(hearing.end_of(target.newest), target.newest.tag, source)
            )
            assert target.newest.chain == source.look().newest.chain


class LogAdder:
    """Adds changes to one file behind the node's back, as a node of that file alone."""

    def __init__(self, flaky: Failing, owner: bytes) -> None:
        self.flaky, self.owner = flaky, owner

    def add(self, *versions: int) -> None:
        with contextlib.closing(self.flaky):
            self.flaky.open(self.owner)
            for version in versions:
                change = Change(version, None, CALLS[version - 1][1])
                head = change_behind(self.flaky.newest, change, session_of(self.owner, 9, 9), 1)
                self.flaky.add_record(head, change.payload)


def test_one_that_only_has_another_name_is_not_dropped(tmp_path: Path) -> None:
    several = Several(tmp_path, 2, 1)
    several.up(0, 1)
    several.run(1, 2)
    urls = [place.url for place in several.places]
    renamed = Place(urls[0].replace("/0/", "/./0/"))
    several.places[0] = several.by_url[renamed.url] = renamed
    rewritten(several, [renamed.url, urls[1]], 1)
    assert several.restored([0, 1]) == 2
    several.up(0, 1)
    several.run(3)
    assert several.restored([0, 1]) == 3
