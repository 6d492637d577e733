"""A backup is followed while the plugin's process, the server's and destinations come and go."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from backend import Change, Destination, bump
from destinations import destination_for
from errors import BackupError, PlaceGone
from filelog.layout2 import Head
from filelog.reader import effective
from replica import Pause, Record
from several import following
from several.hearing import Silent
from tests import support
from tests.cutproxy import CutProxy
from tests.peers import ServerProcess
from tests.support import Call, PluginProcess, first_changes, run_cli

CALLS = support.trace_sessions("crash")
SOON_S = 60.0


class Follower(threading.Thread):
    """Follows the backup at ``urls``, and goes on from its place, or begins again.

    Attributes:
        held: the records that it has.
        sources: the destinations that it followed, as they changed.
        begun: how often it began.
    """

    def __init__(self, urls: Sequence[str], acks: int | None = None) -> None:
        super().__init__(daemon=True)
        self.held: list[Record] = []
        self.sources: list[str] = []
        self.begun = 0
        self.error: BackupError | None = None
        self.over = False
        self._urls, self._acks = urls, acks

    def run(self) -> None:
        while not self.over:
            last = self.held[-1][0] if self.held else None
            self.begun += last is None
            try:
                self._follow(last)
            except PlaceGone:
                # The newest may be gone alone: it was not flushed, or one destination had it.
                self.held = self.held[:-1] if self.error is None else []
                self.error = PlaceGone("here", 0)
            except BackupError:
                time.sleep(0.02)

    def _follow(self, last: Head | None) -> None:
        with destination_for(self._urls, self._acks).follow(last) as records:
            for each in records:
                if self.over:
                    return
                if not isinstance(each, Pause):
                    self.error = None
                    self.held.append(each)
                elif self.sources[-1:] != [each.url]:
                    self.sources.append(each.url)

    def await_chain(self, chain: bytes) -> None:
        """Wait until what it has ends like that."""
        until(lambda: self.held and self.held[-1][0].chain == chain)

    def changes(self) -> list[Call]:
        """What a restore from what it has would apply."""
        found = [each for _, each in effective(self.held)]
        return [
            (each.version, list(each.transaction))
            for each in found
            if isinstance(each, Change) and each.transaction is not None
        ]


@contextlib.contextmanager
def followed(urls: Sequence[str], acks: int | None = None) -> Iterator[Follower]:
    """One that ends with the test."""
    follower = Follower(urls, acks)
    follower.start()
    try:
        yield follower
    finally:
        follower.over = True


def until(done: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not done():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def newest(url: str) -> bytes:
    """The chain at which the file ends."""
    return support.records_of(Path(url.removeprefix("file://")))[-1][0].chain


def live(node_dir: Path, chance: random.Random, between: Callable[[], None]) -> list[Call]:
    """Lives of a recorded node: it is killed, some changes are rewound, its backup is compacted.

    Returns:
        The commits that count.
    """
    written: dict[int, list[str]] = {}
    for calls in CALLS[:8]:
        with PluginProcess(node_dir) as plugin:
            plugin.manifest()
            plugin.init(node_dir)
            for version, statements in calls[:40]:
                plugin.write(version, statements)
                if statements[-1] == bump(version):
                    written[version] = statements
            if chance.random() < 0.5:
                plugin.call("backup-compact")
            if chance.random() < 0.5:
                plugin.kill()
        if len(calls) > 40:
            break
        between()
    return list(written.items())


@pytest.mark.parametrize("kind", ["file", "socket", "several"])
def test_lives_of_a_node(kind: str, url: str, node_dir: Path, tmp_path: Path) -> None:
    """What comes is what is stored, whatever dies meanwhile."""
    chance = random.Random(5)
    with contextlib.ExitStack() as stack:
        server = None
        urls = [url]
        if kind != "file":
            run_cli("init", url)
            server = stack.enter_context(ServerProcess(url))
            urls = [server.url]
        if kind == "several":
            urls.append(f"file://{tmp_path}/other.bkp")
        run_cli("init", "--lightning-dir", node_dir, *urls)
        follower = stack.enter_context(followed(urls))

        def between() -> None:
            nonlocal server
            if server is not None:
                port = server.port
                server.kill()
                server = stack.enter_context(ServerProcess(url, port))

        written = live(node_dir, chance, between)
        follower.await_chain(newest(url))
        commits = [(v, calls) for v, calls in follower.changes() if calls[-1] == bump(v)]
        assert commits == written[len(written) - len(commits) :]
        assert len(commits) == len(written) or follower.begun > 1


@contextlib.contextmanager
def writing(urls: Sequence[str], acks: int) -> Iterator[Destination]:
    """The node of a backup at ``urls``."""
    node = destination_for(urls, acks)
    with contextlib.closing(node):
        node.open(b"owner".ljust(16, b"."))
        yield node


def add(node: Destination, first: int, last: int) -> None:
    for version, statements in first_changes(last)[first - 1 :]:
        node.add_change(Change(version, None, statements))


def files(tmp_path: Path, count: int) -> list[str]:
    for number in range(count):
        (tmp_path / f"disk{number}").mkdir()
    return [f"file://{tmp_path}/disk{number}/node.bkp" for number in range(count)]


def test_another_destination_when_one_fails(tmp_path: Path) -> None:
    """It goes on there by chain, and without N-K+1 of them it waits."""
    urls = files(tmp_path, 3)
    destination_for(urls, 2).create(None, b"owner".ljust(16, b"."))
    with followed(urls, 2) as follower:
        with writing(urls, 2) as node:
            add(node, 1, 5)
            until(lambda: follower.held and follower.held[-1][0].version == 5)
            until(lambda: follower.sources)  # They are told when all that was there is given.
            first = follower.sources[-1]
            disk = Path(first.removeprefix("file://")).parent
            disk.rename(tmp_path / "away")
            add(node, 6, 9)
            until(lambda: follower.held[-1][0].version == 9)
            until(lambda: follower.sources[-1] != first)
            (tmp_path / "away").rename(disk)
            until(lambda: all(member.version == 9 for member in node.members()))
        assert follower.begun == 1
        assert [version for version, _ in follower.changes()] == list(range(1, 10))
    for number in (0, 1):
        (tmp_path / f"disk{number}").rename(tmp_path / f"away{number}")
    with (
        destination_for(urls, 2).follow(follower.held[-1][0]) as records,
        pytest.raises(Silent),
    ):
        next(records)


def test_another_destination_when_one_falls_behind(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node has lost the way to a server that is followed, and goes on without it."""
    monkeypatch.setattr(following, "CHECK_S", 0.2)
    support.make_backup(url)
    with ServerProcess(url) as server, CutProxy((server.host, server.port)) as proxy:
        disks = files(tmp_path, 2)
        theirs = [f"socket:127.0.0.1:{proxy.port}?retry_for=1", *disks]
        destination_for(theirs, 2).create(None, b"owner".ljust(16, b"."))
        with writing(theirs, 2) as node:
            add(node, 1, 5)
            until(lambda: all(member.version == 5 for member in node.members()))
            with followed([server.url, *disks], 2) as follower:
                until(lambda: follower.held and follower.held[-1][0].version == 5)
                until(lambda: follower.sources)
                assert follower.sources == [server.url]
                proxy.close()
                add(node, 6, 9)
                until(lambda: follower.held[-1][0].version == 9)
                until(lambda: follower.sources[-1] in disks)
                assert follower.begun == 1
