"""The node or the plugin dies: between the hook and the commit, everywhere, and at random."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from backend import FOREIGN_KEYS_OFF, Change, Session, bump
from filebackend import FileBackend
from tests import support
from tests.support import Call
from wallet import database, restore

PAYER = support.trace_sessions("payer")[0][:40]
"""A fresh node: the schema, its migrations with their PRAGMA calls, and the first commits."""
MADE_UP: list[Call] = [
    *support.first_changes(3),
    (3, [FOREIGN_KEYS_OFF]),
    support.change(4, "INSERT INTO items VALUES (40, 'forty')", "DELETE FROM items WHERE id = 2"),
    (4, ["PRAGMA foreign_keys = ON;"]),
    support.change(5, "UPDATE items SET body = 'it''s -- /* odd */'"),
    support.change(6, "INSERT INTO items VALUES (60, x'00ff')"),
]
ROUNDS = [20, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(0)])]


def write(session: Session, calls: Sequence[Call]) -> None:
    for version, statements in calls:
        session.write(Change(version, None, statements))


def stored(url: str) -> list[Call]:
    """What a restore would apply; nothing may be damaged."""
    return support.stored(url)


def check_restored(url: str, node: Path) -> None:
    """A restore gives the node's database, with one change a version."""
    target = node.with_name("restored.sqlite3")
    target.unlink(missing_ok=True)
    reading = FileBackend(url).read()
    result = restore.restore(reading, str(target), False, lambda *_: None)
    reading.close()
    assert result.problems == []
    assert database.compare(str(node), str(target)) == []
    assert result.ending.version == database.version_of(str(node))
    versions = [v for v, statements in stored(url) if statements[-1] == bump(v)]
    assert versions == list(range(1, result.ending.version + 1))


def version_of(calls: Sequence[Call]) -> int:
    """data_version of a database after ``calls``."""
    return calls[-1][0] if calls else 0


def other(calls: Sequence[Call], text: str) -> Call:
    """What a node that did ``calls`` does next, in place of what it had announced."""
    if not calls:
        version, statements = support.first_changes(1)[0]
        return version, [f"CREATE TABLE {text} (x)", *statements]
    return support.change(version_of(calls) + 1, f"CREATE TABLE {text} (x)")


def unless_created(url: str) -> FileBackend:
    """A new backup at ``url``, open, in the place of one that may be there."""
    Path(url.removeprefix("file://")).unlink(missing_ok=True)
    backend = FileBackend(url)
    backend.create(None)
    backend.open()
    return backend


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("trace", "crashes"), [("made up", 1), ("made up", 3), ("payer", 1)])
def test_crash_between_hook_and_commit_at_every_change(
    trace: str, crashes: int, fast_dir: Path
) -> None:
    calls = MADE_UP if trace == "made up" else PAYER
    url, node = f"file://{fast_dir}/node.bkp", fast_dir / "node.sqlite3"
    for count in range(len(calls)):
        backend = unless_created(url)
        write(Session(backend, "/node"), calls[: count + 1])
        backend.close()  # The last of them was announced, and never happened.
        for crash in range(crashes):
            # The node starts again, and announces something else; only the last one happens.
            backend = FileBackend(url)
            backend.open()
            done = other(calls[:count], f"try_{crash}")
            write(Session(backend, "/node"), [done])
            backend.close()
        node.unlink(missing_ok=True)
        support.apply_calls(node, calls[:count])
        support.apply_calls(node, [done])
        check_restored(url, node)


def test_crash_between_rewind_and_append(url: str, tmp_path: Path) -> None:
    node = tmp_path / "node.sqlite3"
    for count in range(1, len(MADE_UP)):
        if MADE_UP[count][1][-1] != bump(MADE_UP[count][0]):
            continue
        backend = unless_created(url)
        write(Session(backend, "/node"), MADE_UP[: count + 1])
        backend.close()
        backend = FileBackend(url)
        backend.open()
        backend.rewind()
        backend.close()  # Killed before the append.
        done = other(MADE_UP[:count], "instead")
        backend = FileBackend(url)
        backend.open()
        assert not backend.rewindable
        write(Session(backend, "/node"), [done])
        backend.close()
        node.unlink(missing_ok=True)
        support.apply_calls(node, MADE_UP[:count])
        support.apply_calls(node, [done])
        check_restored(url, node)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 39])
def test_crash_between_hook_and_commit_with_the_real_plugin(
    count: int, node_dir: Path, url: str, tmp_path: Path
) -> None:
    support.run_cli("init", "--lightning-dir", node_dir, url)
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        for call in PAYER[: count + 1]:
            plugin.write(*call)
        plugin.kill()
    done = other(PAYER[:count], "instead")
    announced = PAYER[count][1][-1] == bump(PAYER[count][0])
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        plugin.write(*done)
        plugin.write(*other([*PAYER[:count], done], "and_more"))
        rewound = plugin.logged("Last changes not applied, rewinding non-committed transaction")
        assert (rewound, plugin.logged("Versions match up")) == (announced, not announced)
        assert plugin.close() == 0
    node = tmp_path / "node.sqlite3"
    support.apply_calls(node, PAYER[:count])
    support.apply_calls(node, [done, other([*PAYER[:count], done], "and_more")])
    check_restored(url, node)


class Killed(Exception):
    """The plugin was killed before it answered."""


def announce(plugin: support.PluginProcess, call: Call) -> None:
    """One db_write; Killed if no answer came."""
    try:
        plugin.write(*call)
    except (support.Refused, OSError) as error:
        assert plugin.errors() == []
        raise Killed from error


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("rounds", ROUNDS)
def test_plugin_killed_at_random(rounds: int, node_dir: Path, url: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    support.run_cli("init", "--lightning-dir", node_dir, url)
    committed: list[Call] = []
    announced: list[Call] = []  # Since the last commit; none of them happened.
    reached = {"announced and stored": 0, "announced and lost": 0, "rewound": 0}
    for number in range(rounds):
        with support.PluginProcess(node_dir) as plugin:
            plugin.manifest()
            # One kill in three comes while the backup opens.
            delay_s = rng.choice((0.01, 0.06, 0.12)) * rng.random()
            timer = threading.Timer(delay_s, plugin.process.kill)
            timer.start()
            try:
                while True:
                    announced.append(a_change(committed, rng))
                    announce(plugin, announced[-1])
                    committed.append(announced[-1])
                    announced.clear()
            except Killed:
                timer.join()
                plugin.process.wait()
            reached["rewound"] += plugin.logged("rewinding non-committed")
        found = stored(url)
        assert found[: len(committed)] == committed, f"round {number}"
        more = found[len(committed) :]
        assert not more or (len(more) == 1 and more[0] in announced), f"round {number}"
        stayed = more == announced[-1:]
        reached["announced and stored" if stayed else "announced and lost"] += 1
    print(reached, len(committed))
    with support.PluginProcess(node_dir) as plugin:
        plugin.manifest()
        last = a_change(committed, rng)
        plugin.write(*last)
        assert plugin.close() == 0
    node = tmp_path / "node.sqlite3"
    support.apply_calls(node, [*committed, last])
    check_restored(url, node)
    assert len(committed) > rounds


def a_change(committed: Sequence[Call], rng: random.Random) -> Call:
    """A commit unlike any other, of a size that is seen on nodes or a larger one."""
    if not committed:
        return support.first_changes(1)[0]
    version = version_of(committed) + 1
    text = f"{rng.getrandbits(64):016x}" * rng.choice((1, 60, 500, 20_000))
    return support.change(version, f"INSERT INTO items VALUES ({version}, '{text}')")
