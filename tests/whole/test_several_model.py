"""Random lives of a node with several destinations that die, hang, come back and are put back.

What a restore may give is known at each moment: the last acknowledged state, or one that was
announced since. Any N-K+1 destinations must give it, as long as no more than K-1 have lost
what they acknowledged.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import mirrorbackend
from backend import FOREIGN_KEYS_OFF, Change, Session, new_owner
from destinations import FileDestination
from errors import BackupError, DiskError
from filelog import appender
from filelog.layout2 import SECTOR, Head, start_of
from mirrorbackend import MirrorBackend
from quorum import Part, Roster, Rule
from replica import Look, Pause, Record, Replica
from several import hearing
from socketbackend import SocketBackend
from tests import support
from tests.peers import free_port
from tests.whole.test_model import (
    MIGRATION,
    Model,
    Node,
    ServerThread,
    State,
    compact_in_process,
    in_this_process,
    state_of,
)
from wallet import restore

STEPS = 60
SETTLED_S = 60.0
"""Longer than any catching up takes on a slow machine; only a hang meets it."""


class Place:
    """What happens at one destination.

    Args:
        path: the file, or that of the server.
    """

    def __init__(self, url: str, path: Path | None = None) -> None:
        self.url = url
        self.is_served = path is not None
        self.path = path or Path(url.removeprefix("file://"))
        self.up = True
        self.fails = ""
        """What the next record meets: "before", "after", "torn"; or nothing."""
        self.hangs: threading.Event | None = None
        self.image: bytes | None = None
        self.lost = False
        """It may lack what it acknowledged, as an older image was put back."""

    def check(self) -> None:
        if not self.up:
            raise DiskError(str(self.path), OSError(5, "injected"), "use")


class Failing(Replica):
    """A destination that does what its Place says."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.url)
        self.place = place

    def open(self, owner: bytes | None = None, *arguments: bool) -> None:
        self.place.check()
        super().open(owner, *arguments)  # type: ignore[safe-super]

    def look(self) -> Look:
        self.place.check()
        return super().look()  # type: ignore[safe-super]

    @contextlib.contextmanager
    def records(self) -> Iterator[Iterator[Record]]:
        self.place.check()
        with super().records() as records:  # type: ignore[safe-super]
            yield records

    @contextlib.contextmanager
    def follow(self, after: Head | None) -> Iterator[Iterator[Record | Pause]]:
        self.place.check()
        with super().follow(after) as records:  # type: ignore[safe-super]
            yield records

    def add_record(self, head: Head, payload: bytes) -> None:
        place, fails = self.place, self.begin_to_add()
        start = self.newest.end
        super().add_record(head, payload)  # type: ignore[safe-super]
        if fails == "torn" and not place.is_served:
            self._tear(start, self.newest.end)
        self.end_to_add(fails)

    def begin_to_add(self) -> str:
        """Hang, or go down, if that is to be; how it fails afterwards."""
        place = self.place
        if place.hangs is not None:
            place.hangs.wait()
        place.check()
        fails, place.fails = place.fails, ""
        if fails == "before":
            place.up = False
            place.check()
        return fails

    def end_to_add(self, fails: str) -> None:
        if fails:
            self.place.up = False
            self.place.check()

    def _tear(self, start: int, end: int) -> None:
        """A loss of power in the middle of an append: one of its sectors never got there."""
        sector = -(-start // SECTOR) * SECTOR
        if sector + SECTOR <= end:
            with self.place.path.open("r+b") as file:
                file.seek(sector)
                file.write(bytes(SECTOR))


class Flaky(Failing, FileDestination):
    """A file whose disk fails."""


class FlakyServed(Failing, SocketBackend):
    """A server behind a line that fails."""

    def add_record_while(self, head: Head, payload: bytes, meanwhile: Callable[[], None]) -> None:
        fails = self.begin_to_add()
        super().add_record_while(head, payload, meanwhile)
        self.end_to_add(fails)

    def add_records(self, records: Iterable[Record], lock: threading.Lock) -> None:
        """Some, if it is to fail: what was sent ahead may have come."""
        fails = self.begin_to_add()
        super().add_records(itertools.islice(records, 2) if fails else records, lock)
        self.end_to_add(fails)


class SeveralLife:
    """One node and its backup at ``rule.n`` places, ``rule.k`` of which acknowledge.

    Args:
        is_served: the first is on a server, the others are files.
    """

    def __init__(self, rule: Rule, seed: str, is_served: bool = False) -> None:
        self.rule, self.random = rule, random.Random(seed)
        self.directory = Path(tempfile.mkdtemp(dir=support.FAST))
        self.places: dict[str, Place] = {}
        for number in range(rule.n):
            (self.directory / str(number)).mkdir()
            url = f"file://{self.directory}/{number}/node.bkp"
            self.places[url] = Place(url)
        self.server: ServerThread | None = None
        if is_served:
            self.serve()
        self.owner = new_owner()
        self.roster = Roster(1, rule.k, tuple(self.places))
        self.node, self.model = Node(), Model()
        self.announced: list[State] = []
        """What may have been stored since the last acknowledgement."""
        self.mirror: MirrorBackend | None = None
        self.session: Session | None = None
        self.first = True
        self.make_mirror().create(None, self.owner)

    def serve(self) -> None:
        """Let a server keep the first."""
        url, place = next(iter(self.places.items()))
        support.make_backup(url)
        port = free_port()
        self.server = ServerThread(url, port)
        served = Place(f"socket:127.0.0.1:{port}?retry_for=0", place.path)
        self.places = {served.url: served, **{u: p for u, p in self.places.items() if u != url}}

    def make(self, url: str) -> Failing:
        place = self.places[url]
        return FlakyServed(place) if place.is_served else Flaky(place)

    def make_mirror(self) -> MirrorBackend:
        return MirrorBackend(self.roster, self.make)

    # What happens

    def step(self) -> None:
        actions = [
            *[self.commit] * 8,
            *[self.migrate, self.crash, self.killed, self.commit_and_die, self.restart] * 2,
            *[self.goes, self.comes, self.fails, self.comes] * 3,
            *[self.fails_in_the_middle] * 4,
            *[self.hangs, self.goes_on, self.compact, self.take_image, self.put_image_back],
            self.check,
        ]
        self.random.choice(actions)()

    def commit(self) -> None:
        self.announce(self.node.next_commit(), commit=True)

    def commit_and_die(self) -> None:
        self.announce(self.node.next_commit(), commit=False)
        self.killed()

    def migrate(self) -> None:
        if not self.node.version:
            return
        calls: list[Callable[[], Change]] = [
            lambda: Change(self.node.version, None, [FOREIGN_KEYS_OFF]),
            lambda: self.node.next_commit(*MIGRATION),
            lambda: Change(self.node.version, None, ["PRAGMA foreign_keys = ON;"]),
        ]
        stop_after = self.random.randrange(1, 5)
        for number, call in enumerate(calls, 1):
            if not self.announce(call(), commit=number != stop_after) or number == stop_after:
                return self.killed()

    def announce(self, change: Change, commit: bool) -> bool:
        """One call of the hook; whether it was acknowledged."""
        clear = [p for p in self.answering() if p.hangs is None and not p.fails]
        if len(clear) < self.rule.to_start:  # The node would wait for those that hang.
            for place in self.places.values():
                self.release(place)
        before = len(self.answering())
        try:
            session = self.connected()
        except hearing.Silent:
            self.crash()
            # One that failed meanwhile may have been the only one with the newest change.
            if before > len(self.answering()) or before < self.rule.to_start:
                return False
            for place in self.answering():
                place.fails = ""
            with patient():  # Bringing one up to date may have taken too long.
                session = self.connected()
        after = self.node.apply(change, commit=False)
        expected = self.model.after(change, after, self.first)
        assert isinstance(expected, Model), "a sound node is never refused"
        try:
            session.write(change)
        except hearing.Silent:
            self.announced += [after, self.model.rewound().states[-1]] if self.first else [after]
            self.crash()
            return False
        self.first, self.model, self.announced = False, expected, []
        if commit:
            self.node.apply(change, commit=True)
        return True

    def connected(self) -> Session:
        if self.session is None:
            self.mirror = self.make_mirror()
            with self.without_the_lost():
                self.mirror.open(self.owner)
            self.session, self.first = Session(self.mirror, "DIR"), True
            # Any start that comes after this one hears of it.
            sessions = [each.backend.newest.session for each in self.mirror._members if each.heard]
            starts = [start_of(session) for session in sessions]
            assert starts.count(start_of(self.mirror._session)) >= self.rule.k
        return self.session

    @contextlib.contextmanager
    def without_the_lost(self) -> Iterator[None]:
        """Without what lacks what it acknowledged: it may have been one of those that matter."""
        places = list(self.places.values())
        lost = [place for place in places if place.lost]
        sound = [place for place in places if not place.lost]
        was_up = [place.up for place in lost]
        if lost and len(sound) >= self.rule.to_start:
            for place in sound:
                self.release(place)
                place.up, place.fails = True, ""
            for place in lost:
                place.up = False
        try:
            yield
        finally:
            for place, up in zip(lost, was_up, strict=True):
                place.up = up

    def answering(self) -> list[Place]:
        return [place for place in self.places.values() if place.up]

    def crash(self) -> None:
        """The node and the plugin end in order: what is in hand is stored."""
        for place in self.places.values():
            self.release(place)
        if self.mirror is not None:
            self.mirror.close()
        self.mirror = self.session = None
        self.node.restart()

    def killed(self) -> None:
        """They end at once: what is in hand is stored at some destinations."""
        up = self.answering()
        for place in up:
            place.up = False
        self.crash()
        for place in up:
            place.up = True

    restart = crash

    def any(self) -> Place:
        return self.random.choice(list(self.places.values()))

    def goes(self) -> None:
        self.any().up = False

    def comes(self) -> None:
        place = self.any()
        self.release(place)
        place.up = True

    def fails(self) -> None:
        self.any().fails = self.random.choice(["before", "after", "torn"])

    def fails_in_the_middle(self) -> None:
        """One fails in a session that is well."""
        self.comes()
        self.commit()
        self.commit()
        self.fails()
        self.commit()

    def hangs(self) -> None:
        place = self.any()
        place.hangs = place.hangs or threading.Event()

    def goes_on(self) -> None:
        self.release(self.any())

    @staticmethod
    def release(place: Place) -> None:
        if place.hangs is not None:
            event, place.hangs = place.hangs, None
            event.set()

    def compact(self) -> None:
        # What dies while a server is given the whole backup leaves it without a vote, which may
        # be one too few to start with: there it has to be resynced.
        if self.mirror is None or self.server is not None:
            return
        self.compact_files()

    def compact_files(self) -> None:
        assert self.mirror is not None
        for member in self.mirror._members:
            is_served = self.places[member.url].is_served
            if member.part is Part.IN_STEP and not is_served and self.random.random() < 0.5:
                with contextlib.suppress(BackupError):
                    compact_in_process(member.backend, member.lock)  # type: ignore[arg-type]

    def take_image(self) -> None:
        self.crash()
        place = self.any()
        place.image = place.path.read_bytes()

    def put_image_back(self) -> None:
        """An old state of a destination, as of a disk that was restored, is put in its place."""
        place = self.any()
        lost = [p for p in self.places.values() if p.lost]
        if (
            place.is_served
            or place.image is None
            or len({*lost, place}) > self.rule.survives
            or self.announced
        ):
            return
        self.crash()
        place.path.write_bytes(place.image)
        place.lost = True

    # What must hold

    def check(self) -> None:
        """Any N-K+1 of them restore to what was acknowledged, or announced since."""
        self.settle_appends()
        lost = [p for p in self.places.values() if p.lost]
        allowed = [self.model.states[-1], *self.announced]
        for some in itertools.combinations(self.places.values(), self.rule.to_read):
            if len(some) - len(set(some) & set(lost)) < self.rule.to_read and lost:
                continue
            assert self.restored(list(some)) in allowed

    def settle_appends(self) -> None:
        self.crash()

    def restored(self, places: list[Place]) -> State:
        """The state that a restore from ``places`` gives."""
        up = [(place, place.up) for place in places]
        for place in places:
            place.up = True
        try:
            chosen, doubt = hearing.choose(hearing.hear([self.make(place.url) for place in places]))
            assert doubt is None
            path = self.directory / "restored.sqlite3"
            with contextlib.closing(chosen.replica.read()) as reading:
                restore.build(reading, str(path), False, lambda *_: None)
            with contextlib.closing(sqlite3.connect(path)) as source:
                return state_of(source)
        except restore.NothingToRestore:
            return 0, ()
        finally:
            restore.remove_database(str(self.directory / "restored.sqlite3"))
            for place, was_up in up:
                place.up = was_up

    def finish(self) -> None:
        """All come back: a lagging one always becomes equal, and all restore to one state."""
        self.crash()
        for place in self.places.values():
            place.up, place.fails = True, ""
        with patient():
            assert self.announce(self.node.next_commit(), commit=True)
        assert self.mirror is not None
        deadline_s = time.monotonic() + SETTLED_S
        while not all(member.part == "in step" for member in self.mirror.members()):
            assert time.monotonic() < deadline_s, self.mirror.members()
            if self.server is not None:
                self.compact_files()  # It cannot begin anew with nothing but changes.
            time.sleep(0.002)
        self.crash()
        for place in self.places.values():
            place.lost = False
            assert self.of_one(place) == self.model.states[-1] == state_of(self.node.connection)
        self.check()
        for name in (
            name for place in self.places.values() for name in os.listdir(place.path.parent)
        ):
            assert ".scratch-" not in name

    def of_one(self, place: Place) -> State:
        """The state that a pass over one of them gives."""
        path = self.directory / "one.sqlite3"
        with contextlib.closing(self.make(place.url).read()) as reading:
            restore.build(reading, str(path), False, lambda *_: None)
        with contextlib.closing(sqlite3.connect(path)) as source:
            found = state_of(source)
        restore.remove_database(str(path))
        return found

    def end(self) -> None:
        self.crash()
        if self.server is not None:
            self.server.stop()
        self.node.connection.close()
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """What must succeed has time to, also on a machine that is busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirrorbackend, "RETRY_FOR_S", SETTLED_S)
        yield


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrorbackend, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(mirrorbackend, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(mirrorbackend, "RETRY_FOR_S", 0.05)
    monkeypatch.setattr(mirrorbackend, "PATIENCE_S", 0.05)
    monkeypatch.setattr(appender, "RETRY_FOR_S", 0.0)


RULES = [Rule(2, 1), Rule(2, 2), Rule(3, 1), Rule(3, 2), Rule(3, 3)]
LIVES = 8  # With 5 rules and 60 steps each: 2,400 steps. Soak tells of more.


def live(rule: Rule, seed: str, steps: int, is_served: bool = False) -> None:
    life = SeveralLife(rule, seed, is_served)
    try:
        for _ in range(steps):
            life.step()
        life.finish()
    finally:
        life.end()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.k} of {rule.n}")
def test_lives(rule: Rule) -> None:
    for number in range(LIVES):
        print("life", number)
        live(rule, f"{rule} {number}", STEPS)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.k} of {rule.n}")
def test_lives_with_a_server(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    live(rule, f"server {rule}", STEPS, is_served=True)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_lives_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    until, lives = time.monotonic() + 60 * support.SOAK_MINUTES, 0
    while lives == 0 or time.monotonic() < until:
        seed = f"soak {time.time_ns()}"
        print(seed)
        live(RULES[lives % len(RULES)], seed, STEPS, is_served=lives % 2 == 1)
        lives += 1
