"""Every state that a power cut may leave of a backup, and how the next session finds it.

The scenarios and the invariants are in scenarios.py, what a disk may forget in disk.py.
POWER_LOSS_SEED sets the seed, which is printed.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import durable
from backend import FOREIGN_KEYS_OFF
from commands.standing import promote
from destinations import backend_for
from filebackend import FileBackend
from standby import state as keeping
from standby.promoting import Promotion
from standby.state import State
from tests import scenarios, support
from tests.disk import SECTOR, Disk, Fault, Inode, Killed, Model, Op, standing_in
from tests.scenarios import SCENARIOS
from wallet import restore

IN_TEST = 25_000
IN_SOAK = 1_000_000
BATCH = 8
"""Scenarios that a process runs before it says how many states it saw."""
LONG = "a whole life"


def work() -> Iterator[tuple[str, int]]:
    """Scenarios with their seeds: each of them once, then mostly random lives."""
    seed = int(os.environ.get("POWER_LOSS_SEED") or random.randrange(2**32))
    print(f"POWER_LOSS_SEED={seed}")
    for number in itertools.count(seed):
        yield from ((name, number) for name in SCENARIOS)
        yield from ((LONG, number + 2**32 * i) for i in range(1, 2 * BATCH))


def check(least: int) -> None:
    """Check at least ``least`` states, on every processor."""
    began, states, restored = time.monotonic(), dict.fromkeys(SCENARIOS, 0), 0
    todo = work()
    # Not forked: the workers must not be slowed down by what measures coverage.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        running: set[concurrent.futures.Future[tuple[dict[str, int], int]]] = set()
        done: set[concurrent.futures.Future[tuple[dict[str, int], int]]]
        try:
            while sum(states.values()) < least:
                while len(running) < 2 * (os.cpu_count() or 1):
                    batch = list(itertools.islice(todo, BATCH))
                    directory = tempfile.mkdtemp(prefix="power-loss-", dir=support.FAST)
                    running.add(pool.submit(scenarios.run_many, directory, batch))
                done, running = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    found, count = future.result()
                    restored += count
                    for name, number in found.items():
                        states[name] += number
        finally:
            pool.shutdown(cancel_futures=True)
    for name, number in states.items():
        print(f"{number:9} {name}")
    seconds = time.monotonic() - began
    print(f"{sum(states.values()):9} states, {restored} restored with SQLite, {seconds:.0f} s")
    assert all(states.values()), "every scenario was there"


def test_power_cut_in_every_scenario() -> None:
    check(IN_TEST)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_million_power_cuts() -> None:
    check(IN_SOAK)


# The bed itself: a disk that forgot too little would prove nothing.


def contents(inode: Inode, seed: int = 1) -> set[bytes]:
    return {data for _, data in inode.states(random.Random(seed))}


def test_unflushed_write_may_be_missing_torn_or_there() -> None:
    inode = Inode(b"a" * 100)
    inode.write(1, 100, b"b" * 1500)
    old, new = b"a" * 100, b"a" * 100 + b"b" * 1500
    found = contents(inode)
    assert {old, new, old + bytes(1500)} <= found, "dropped, kept, a size without its data"
    assert new[:SECTOR] + bytes(1600 - SECTOR) in found, "torn"
    assert old + bytes(SECTOR - 100) + new[SECTOR:] in found, "its end without its beginning"
    assert new[:SECTOR] + bytes(SECTOR) + new[2 * SECTOR :] in found, "a sector of it zero"
    assert all(data[:100] == old for data in found), "a sector is written all or nothing"
    inode.flush()
    assert contents(inode) == {new}


def test_later_write_may_be_kept_without_the_earlier() -> None:
    inode = Inode(bytes(4 * SECTOR))
    inode.write(1, 0, b"1" * SECTOR)
    inode.write(2, 2 * SECTOR, b"2" * SECTOR)
    one, two, none = b"1" * SECTOR, b"2" * SECTOR, bytes(SECTOR)
    assert contents(inode) == {
        first + none + second + none for first in (one, none) for second in (two, none)
    }


def test_failed_flush_forgets_for_good() -> None:
    inode = Inode(bytes(2 * SECTOR))
    inode.write(1, 0, b"1" * 2 * SECTOR)
    inode.forget()
    inode.flush()
    assert bytes(2 * SECTOR) in contents(inode), "a later flush does not bring it back"
    inode.write(2, 0, b"1" * SECTOR)
    inode.flush()
    assert {data[:SECTOR] for data in contents(inode)} == {b"1" * SECTOR}, "but writing it does"
    assert len(contents(inode)) == 2


def test_names_may_be_lost_until_the_directory_is_flushed() -> None:
    model = Model({"log": b"old"})
    for op in (
        Op("create", 2, name="new"),
        Op("write", 2, 0, b"n"),
        Op("flush", 2),
        Op("rename", 2, name="new", target="log"),
    ):
        model.apply(op)
    rng = random.Random(1)
    found = {tuple(sorted(files.items())) for _, files in model.states(rng, "scratch")}
    assert found == {
        (("log", b"old"),),
        (("log", b"old"), ("new", b"n")),
        (("log", b"n"),),
        (("log", b"n"), ("new", b"n")),
    }
    model.apply(Op("sync"))
    assert [files for _, files in model.states(rng, "scratch")] == [{"log": b"n"}]


def test_journal_holds_what_was_done(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path))
    disk.put({})
    with standing_in(disk, durable):
        durable.write_file(f"{tmp_path}/name", b"content")
    assert [op.kind for op in disk.journal] == [
        "create", "write", "flush", "link", "unlink", "sync"
    ]  # fmt: skip
    assert disk.files() == {"name": b"content"}
    assert [files for _, files in disk.model().states(random.Random(1), "x")] == [disk.files()]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("flush", "append"),
        ("sync_dir", "resync"),
        ("sync_dir", "heal"),
        ("sync_dir", "compaction"),
        ("flush", "server"),
        ("flush", "upgrade"),
    ],
)
def test_bed_finds_a_flush_that_is_missing(
    name: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, name, lambda what: None)
    with pytest.raises(AssertionError):
        run_seeds(broken, 5, tmp_path)


def run_seeds(name: str, count: int, directory: Path) -> None:
    for seed in range(count):
        scenarios.Bed(str(directory)).run(name, seed)


# Files that are not the log.


def test_restored_database_is_whole_or_not_there(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/node.bkp"
    calls = [*support.first_changes(3), (3, [FOREIGN_KEYS_OFF]), support.change(4, "SELECT 1")]
    support.make_backup(url, calls)
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(str(root))
    disk.put({})
    with standing_in(disk, durable, restore):
        reading = FileBackend(url).read()
        restore.restore(reading, f"{root}/node.sqlite3", False, lambda *_: None)
        reading.close()
        disk.mark("restored")
    whole = (root / "node.sqlite3").read_bytes()
    model, rng, states = Model({}), random.Random(1), 0
    for op in disk.journal:
        model.apply(op)
        for _, files in model.states(rng, "node.sqlite3.restoring"):
            states += 1
            assert files.get("node.sqlite3", whole) == whole
            rest = {name for name in files if not name.startswith("node.sqlite3.restoring-")}
            assert rest <= {"node.sqlite3"}
            assert op.kind != "mark" or rest == {"node.sqlite3"}
    assert states > 10


def test_small_file_is_whole_or_not_there(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path))
    disk.put({})
    with standing_in(disk, durable):
        durable.write_file(f"{tmp_path}/backup.lock", b"x" * 2000)
        disk.mark("written")
    model, rng, states = Model({}), random.Random(1), 0
    for op in disk.journal:
        model.apply(op)
        for _, files in model.states(rng, "backup.lock.new"):
            states += 1
            assert files.get("backup.lock", b"x" * 2000) == b"x" * 2000
            assert op.kind != "mark" or files == {"backup.lock": b"x" * 2000}
    assert states > 8


def test_promoted_database_is_there_and_known(tmp_path: Path) -> None:
    """SQLite flushes what it writes itself; from there on each step is in here."""
    url, root = f"file://{tmp_path}/node.bkp", tmp_path / "regtest"
    support.make_backup(url, support.first_changes(4))
    root.mkdir()
    (root / "backup.lock").write_bytes(b"a former one")
    keeping.write(str(root), State((url,), 1.0))
    state = keeping.read(str(root))
    assert state is not None
    Promotion(str(root), state, backend_for).take_over()
    disk = Disk(str(root))
    names = "backup.lock", "backup.standby", "lightningd.sqlite3.standby"
    files = {name: (root / name).read_bytes() for name in names}
    whole = files["lightningd.sqlite3.standby"]
    disk.put(files)
    with standing_in(disk, durable):
        promote.main(["--lightning-dir", str(root)], standalone_mode=False)
        disk.mark("promoted")
    lock = (root / "backup.lock").read_bytes()
    model, rng, states = Model(files), random.Random(1), 0
    for op in disk.journal:
        model.apply(op)
        for _, found in model.states(rng, "backup.lock.new"):
            states += 1
            databases = {name: data for name, data in found.items() if "lightningd" in name}
            assert databases and set(databases.values()) == {whole}
            is_done = "lightningd.sqlite3" in databases and found.get("backup.lock") == lock
            assert is_done or found["backup.standby"] == files["backup.standby"]
            assert found.get("backup.lock", lock) == lock or b"a former one" in found.values()
    last = {"backup.lock", "backup.lock.old", "lightningd.sqlite3"}
    assert set(found) == last and states > 20


def test_killed_process_does_nothing_more(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path))
    disk.put({})
    disk.fault = Fault(2, 0)
    with standing_in(disk, durable), pytest.raises(Killed):
        durable.write_file(f"{tmp_path}/name", b"content")
    assert disk.files().keys() <= {"name.new"}
