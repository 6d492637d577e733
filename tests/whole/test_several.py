"""A node with several destinations, through the plugin's process and the commands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from destinations import backend_for
from several import hearing
from tests import support
from tests.cutproxy import CutProxy
from tests.peers import ServerProcess, patched
from tests.support import PluginProcess, Refused, run_cli

CALLS = support.first_changes(12)
SOON_S = 60.0
"""Longer than any catching up takes on a slow machine; only a hang meets it."""


def files(tmp_path: Path, count: int) -> list[str]:
    for number in range(count):
        (tmp_path / f"disk{number}").mkdir()
    return [f"file://{tmp_path}/disk{number}/node.bkp" for number in range(count)]


def path_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def write(plugin: PluginProcess, first: int, last: int) -> None:
    for version, statements in CALLS[first - 1 : last]:
        plugin.write(version, statements)


def until(done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SOON_S
    while not done():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def versions(urls: list[str]) -> list[int]:
    return [json.loads(run_cli("status", "--json", url).stdout)["version"] for url in urls]


def rows(stdout: str) -> list[tuple[int | None, str]]:
    found: list[dict[str, Any]] = json.loads(stdout)["destinations"]
    return [(row["version"], row["standing"]) for row in found]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server on an empty backup."""
    (tmp_path / "served").mkdir()
    url = f"file://{tmp_path}/served/node.bkp"
    run_cli("init", url)
    with ServerProcess(url) as server:
        yield server


def node_database(node_dir: Path, calls: int) -> Path:
    """The node's database, as it is when its first ``calls`` changes are committed."""
    path = node_dir / "lightningd.sqlite3"
    path.unlink(missing_ok=True)
    support.apply_calls(path, CALLS[:calls])
    return path


def test_a_life_from_init_to_restore(node_dir: Path, tmp_path: Path, served: ServerProcess) -> None:
    urls = [*files(tmp_path, 1), served.url]
    node_database(node_dir, 2)
    done = run_cli("init", "--lightning-dir", node_dir, *urls)
    assert "2 of 2 destinations acknowledge: the backup survives the loss of 1" in done.stdout
    lock = json.loads((node_dir / "backup.lock").read_text())
    assert (lock["backend_url"], lock["backend_urls"], lock["acks"]) == (urls[0], urls, 2)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 3, 8)
        status = plugin.call("backup-status")
        assert [row["standing"] for row in status["destinations"]] == ["in step"] * 2
        done = run_cli("status", "--json", "--lightning-dir", node_dir)
        assert rows(done.stdout) == [(8, "in step")] * 2
    assert versions(urls) == [8, 8]
    shown = run_cli("status", urls[0]).stdout
    assert all(url in shown for url in urls), "each of them names the others"
    node_database(node_dir, 8)
    against = ["--against", node_dir / "lightningd.sqlite3"]
    said = run_cli("verify", "--lightning-dir", node_dir, *against).stdout
    assert all(f"{url}: The backup is sound" in said for url in urls)
    run_cli("restore", *urls, tmp_path / "restored.sqlite3")
    run_cli("verify", urls[1], "--against", tmp_path / "restored.sqlite3")
    # With all acknowledging, any one of them has all.
    run_cli("restore", urls[0], tmp_path / "from_one.sqlite3")
    with PluginProcess(node_dir) as plugin:
        assert plugin.call("backup-status")
        write(plugin, 9, 9)
        plugin.call("backup-compact")
        write(plugin, 10, 10)
    run_cli("compact", *urls)
    assert versions(urls) == [10, 10]
    assert all(url in run_cli("status", urls[0]).stdout for url in urls), "also when compacted"


def test_one_that_fails_is_left_behind_and_comes_back(
    node_dir: Path, tmp_path: Path, served: ServerProcess
) -> None:
    remote = f"{served.url}?retry_for=0"
    urls = [*files(tmp_path, 2), remote]
    run_cli("init", "--lightning-dir", node_dir, "--acks", 2, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 3)
        until(lambda: versions(urls) == [3, 3, 3])
        served.kill()
        write(plugin, 4, 6)
        until(lambda: plugin.logged(f"{remote} is not in step any more"))
        done = run_cli("status", "--lightning-dir", node_dir, check=4)
        assert "cannot be reached: Connection refused." in done.stdout
        assert "2 are in step" in done.stdout and "None" not in done.stdout
        row = plugin.call("backup-status")["destinations"][2]
        assert row["standing"] == "lagging" and "cannot be reached" in row["last_error"]
        with ServerProcess(f"file://{tmp_path}/served/node.bkp", port=served.port):
            until(lambda: plugin.logged(f"{remote} is in step again"))
            write(plugin, 7, 7)
            until(lambda: versions(urls) == [7, 7, 7])
            assert sum("is not in step any more" in line for _, line in plugin.log) == 1
            run_cli("status", "--lightning-dir", node_dir)


def test_status_says_since_when_one_lags(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 2)
    run_cli("init", "--lightning-dir", node_dir, "--acks", 1, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 3)
    image = path_of(urls[1]).read_bytes()
    with PluginProcess(node_dir) as plugin:
        write(plugin, 4, 6)
    path_of(urls[1]).write_bytes(image)
    row = json.loads(run_cli("status", "--json", *urls, check=4).stdout)["destinations"][1]
    assert row["standing"] == "lagging: it lacks the newest records"
    assert row["since_ns"] == row["last_change_ns"]
    assert "\nsince:  " in run_cli("status", *urls, check=4).stdout
    path_of(urls[1]).unlink()
    assert "version:        not known\n" in run_cli("status", *urls, check=1).stdout


def test_who_comes_up_between_two_looks_is_in_step(node_dir: Path, tmp_path: Path) -> None:
    """Beside a node that runs, one is always looked at before the other."""
    urls = files(tmp_path, 2)
    run_cli("init", "--lightning-dir", node_dir, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 3)
        image = path_of(urls[1]).read_bytes()
        write(plugin, 4, 6)
    newest = path_of(urls[1]).read_bytes()
    path_of(urls[1]).write_bytes(image)
    found = hearing.hear([backend_for(url) for url in urls])
    leader, _ = hearing.choose(found)
    assert hearing.standing(found[1], leader) == "lagging: it lacks the newest records"
    path_of(urls[1]).write_bytes(newest)
    assert hearing.standing(found[1], leader) == "in step"


def test_fewer_than_k_halt_the_node(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 2)
    run_cli("init", "--lightning-dir", node_dir, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 2)
    path_of(urls[1]).rename(tmp_path / "aside")
    with PluginProcess(node_dir) as plugin, pytest.raises(Refused, match="2 are needed") as caught:
        write(plugin, 3, 3)
    assert urls[1] in str(caught.value)
    assert run_cli("status", "--lightning-dir", node_dir, check=1)


def test_restore_needs_those_that_may_have_the_newest(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 3)
    run_cli("init", "--lightning-dir", node_dir, "--acks", 1, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 3)
        until(lambda: versions(urls) == [3, 3, 3])
    dest = tmp_path / "restored.sqlite3"
    done = run_cli("restore", *urls[:2], dest, check=1)
    assert "2 of the backup's 3 destinations answered, and 3 are needed" in done.stderr
    assert urls[2] in done.stderr and not dest.exists()
    # The same destination by another name, or a copy of it, is no further one.
    copy = tmp_path / "copy.bkp"
    copy.write_bytes(path_of(urls[0]).read_bytes())
    run_cli("restore", *urls[:2], f"file://{copy}", dest, check=1)
    done = run_cli("restore", "--allow-missing", *urls[:2], dest, check=3)
    assert "OLD state" in done.stderr and dest.exists()
    run_cli("restore", *urls, tmp_path / "all.sqlite3")


def test_an_empty_server_gets_the_backup_of_a_node_that_began_with_it(
    node_dir: Path, tmp_path: Path, served: ServerProcess
) -> None:
    """It holds no snapshot, so its first record says whose it is: the server has to know."""
    (url,) = files(tmp_path, 1)
    run_cli("init", "--lightning-dir", node_dir, url)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 4)
    node_database(node_dir, 4)
    run_cli("attach", "--lightning-dir", node_dir, url, served.url)
    assert versions([url, served.url]) == [4, 4]
    with PluginProcess(node_dir) as plugin:
        write(plugin, 5, 6)
    assert versions([url, served.url]) == [6, 6]


def test_destinations_are_added_and_dropped(
    node_dir: Path, tmp_path: Path, served: ServerProcess
) -> None:
    urls = files(tmp_path, 3)
    database = node_database(node_dir, 1)
    run_cli("init", "--lightning-dir", node_dir, urls[0])
    with PluginProcess(node_dir) as plugin:
        write(plugin, 2, 4)
    node_database(node_dir, 4)
    attach = ["attach", "--lightning-dir", node_dir, "--acks", 1]
    run_cli(*attach, urls[0], urls[1], served.url)
    assert versions([urls[0], urls[1], served.url]) == [4, 4, 4]
    with PluginProcess(node_dir) as plugin:
        write(plugin, 5, 6)
        until(lambda: versions([urls[0], urls[1], served.url]) == [6, 6, 6])
    node_database(node_dir, 6)
    # One that lags is brought up to date; one of the former that is silent could know more.
    path_of(urls[1]).rename(tmp_path / "aside")
    done = run_cli(*attach, urls[0], served.url, check=1)
    assert "2 of the backup's 3 destinations answered" in done.stderr and urls[1] in done.stderr
    (tmp_path / "aside").rename(path_of(urls[1]))
    run_cli(*attach, urls[2], served.url)
    lock = json.loads((node_dir / "backup.lock").read_text())
    assert (lock["backend_urls"], lock["epoch"]) == ([urls[2], served.url], 2)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 7, 7)
        until(lambda: versions([urls[2], served.url]) == [7, 7])
    node_database(node_dir, 7)
    run_cli("attach", "--lightning-dir", node_dir, urls[2])
    assert "backend_urls" not in json.loads((node_dir / "backup.lock").read_text())
    assert "one of several" not in run_cli("status", urls[2]).stdout
    with PluginProcess(node_dir) as plugin:
        write(plugin, 8, 8)
    node_database(node_dir, 8)
    run_cli("verify", urls[2], "--against", database)


def test_another_history_is_refused_by_name(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 3)
    node_database(node_dir, 3)
    run_cli("init", "--lightning-dir", node_dir, urls[0])
    support.make_backup(urls[1], CALLS[:3])
    other = [*CALLS[:1], support.change(2, "INSERT INTO items VALUES (9, 'x')")]
    support.make_backup(urls[2], other)
    before = support.contents(tmp_path)
    for url in urls[1:]:
        done = run_cli("attach", "--lightning-dir", node_dir, urls[0], url, check=1)
        assert "different histories" in done.stderr and url in done.stderr
    assert support.contents(tmp_path) == before


def test_resync_of_several(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 2)
    node_database(node_dir, 1)
    run_cli("init", "--lightning-dir", node_dir, *urls)
    database = node_database(node_dir, 4)
    done = run_cli("resync", "--yes", "--lightning-dir", node_dir)
    assert done.stdout.count("node.bkp.old-") == 2
    with PluginProcess(node_dir) as plugin:
        write(plugin, 5, 5)
    node_database(node_dir, 5)
    run_cli("verify", *urls, "--against", database)


def test_damage_is_no_vote_and_is_not_overwritten_by_itself(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 3)
    node_database(node_dir, 1)
    run_cli("init", "--lightning-dir", node_dir, "--acks", 2, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 2, 4)
        until(lambda: versions(urls) == [4, 4, 4])
    damaged = path_of(urls[1])
    support.flip(damaged, support.records_of(damaged)[-1][0].end - 20)
    before = damaged.read_bytes()
    with PluginProcess(node_dir) as plugin:
        write(plugin, 5, 6)
        assert plugin.logged(f"{urls[1]} is not in step any more: ")
    assert damaged.read_bytes() == before
    done = run_cli("status", "--lightning-dir", node_dir, check=1)
    assert "damaged at offset" in done.stdout
    run_cli("restore", *urls, tmp_path / "restored.sqlite3")
    # One of the two sound ones is gone, too: what is left may lack the newest.
    path_of(urls[2]).rename(tmp_path / "aside")
    run_cli("restore", *urls, tmp_path / "none.sqlite3", check=1)
    with PluginProcess(node_dir) as plugin, pytest.raises(Refused, match="2 are needed"):
        write(plugin, 7, 7)
    (tmp_path / "aside").rename(path_of(urls[2]))
    database = node_database(node_dir, 6)
    done = run_cli("resync", "--yes", "--lightning-dir", node_dir)
    assert done.stdout.count("node.bkp.old-") == 3 and "damaged" in done.stderr
    run_cli("verify", *urls, "--against", database)


def test_a_server_that_stands_still_keeps_nobody(
    node_dir: Path, tmp_path: Path, served: ServerProcess
) -> None:
    urls = [*files(tmp_path, 1), served.url]
    run_cli("init", "--lightning-dir", node_dir, "--acks", 1, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 2)
        served.process.send_signal(signal.SIGSTOP)
        write(plugin, 3, 9)
        served.process.send_signal(signal.SIGCONT)
        until(lambda: versions(urls) == [9, 9])
        write(plugin, 10, 10)
        until(lambda: versions(urls) == [10, 10])


def test_one_that_falls_behind_what_is_in_memory(
    node_dir: Path, tmp_path: Path, served: ServerProcess
) -> None:
    urls = [*files(tmp_path, 1), served.url]
    run_cli("init", "--lightning-dir", node_dir, "--acks", 1, *urls)
    calls = [support.change(version, f"-- {'x' * (1 << 20)}") for version in range(3, 15)]
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 2)
        until(lambda: versions(urls) == [2, 2])
        served.process.send_signal(signal.SIGSTOP)
        for version, statements in calls:
            plugin.write(version, statements)
        assert plugin.logged(f"{served.url} is too slow and fell behind")
        served.process.send_signal(signal.SIGCONT)
        until(lambda: plugin.logged(f"{served.url} is in step again"))
        assert versions(urls) == [14, 14]
    assert support.stored(urls[0]) == support.stored(f"file://{tmp_path}/served/node.bkp")


def test_a_slow_line_keeps_nobody(node_dir: Path, tmp_path: Path, served: ServerProcess) -> None:
    """20 ms and 100 kB/s: the changes come faster than they go through."""
    with CutProxy(("127.0.0.1", served.port), 0.02, 100_000) as line:
        urls = [*files(tmp_path, 2), f"socket:127.0.0.1:{line.port}"]
        run_cli("init", "--lightning-dir", node_dir, "--acks", 2, *urls)
        calls = [support.change(version, os.urandom(10_000).hex()) for version in range(1, 21)]
        with PluginProcess(node_dir) as plugin:
            for version, statements in calls:
                plugin.write(version, statements)
            assert versions(urls[:2]) == [20, 20]
            until(lambda: versions([served.url]) == [20])
    assert support.stored(urls[0]) == support.stored(f"file://{tmp_path}/served/node.bkp")


STUCK = """
import os, time, durable
real = durable.flush
def flush(fd):
    while os.path.exists({marker!r}) and {disk!r} in os.readlink(f"/proc/self/fd/{{fd}}"):
        time.sleep(0.01)
    real(fd)
durable.flush = flush
"""
"""A disk that flushes nothing as long as a file is there."""


def test_a_disk_that_stands_still_keeps_nobody(node_dir: Path, tmp_path: Path) -> None:
    urls, marker = files(tmp_path, 3), tmp_path / "stuck"
    run_cli("init", "--lightning-dir", node_dir, "--acks", 2, *urls)
    patch = STUCK.format(marker=str(marker), disk=str(tmp_path / "disk1"))
    with PluginProcess(node_dir, patched(support.PLUGIN, patch)) as plugin:
        write(plugin, 1, 2)
        until(lambda: versions(urls) == [2, 2, 2])
        marker.touch()
        write(plugin, 3, 9)
        assert versions([urls[0], urls[2]]) == [9, 9]
        assert json.loads(run_cli("status", "--json", urls[1]).stdout)["version"] < 9
        marker.unlink()
        until(lambda: versions(urls) == [9, 9, 9])


def test_the_last_change_of_a_killed_plugin_is_restored(node_dir: Path, tmp_path: Path) -> None:
    """What two of three have is acknowledged: any two restore it, whichever lags."""
    urls, marker = files(tmp_path, 3), tmp_path / "stuck"
    run_cli("init", "--lightning-dir", node_dir, "--acks", 2, *urls)
    patch = STUCK.format(marker=str(marker), disk=str(tmp_path / "disk0"))
    with PluginProcess(node_dir, patched(support.PLUGIN, patch)) as plugin:
        write(plugin, 1, 2)
        until(lambda: versions(urls) == [2, 2, 2])
        marker.touch()
        write(plugin, 3, 5)
        plugin.kill()
    for number, two in enumerate((urls[:2], urls[1:], [urls[0], urls[2]])):
        done = run_cli("restore", *two, tmp_path / f"restored-{number}.sqlite3")
        assert "Restored version 5" in done.stdout
    with PluginProcess(node_dir) as plugin:
        write(plugin, 6, 6)
        until(lambda: versions(urls) == [6, 6, 6])


def test_a_node_that_is_ahead_heals_all(
    node_dir: Path, tmp_path: Path, served: ServerProcess
) -> None:
    urls = [*files(tmp_path, 2), served.url]
    node_database(node_dir, 2)
    run_cli("init", "--lightning-dir", node_dir, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 3, 4)
    database = node_database(node_dir, 8)  # It has run without the plugin.
    with PluginProcess(node_dir) as plugin:
        write(plugin, 9, 10)
        assert plugin.logged("Healed: ")
        assert plugin.call("backup-compact")
    node_database(node_dir, 10)
    run_cli("verify", *urls, "--against", database)


def test_a_second_node_shuts_the_first_one_out(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 3)
    run_cli("init", "--lightning-dir", node_dir, "--acks", 2, *urls)
    with PluginProcess(node_dir) as plugin:
        write(plugin, 1, 3)
        until(lambda: versions(urls) == [3, 3, 3])
    second = tmp_path / "second" / "regtest"
    second.mkdir(parents=True)
    run_cli("restore", *urls, second)
    run_cli("attach", "--lightning-dir", second, "--acks", 2, *urls)
    with PluginProcess(node_dir) as plugin, pytest.raises(Refused, match="took it over"):
        write(plugin, 4, 4)
    with PluginProcess(second) as plugin:
        write(plugin, 4, 4)


@pytest.mark.parametrize("arguments", [["--acks", 3], ["--acks", 0]])
def test_acks_that_cannot_be(arguments: list[object], node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 2)
    done = run_cli("init", "--lightning-dir", node_dir, *arguments, *urls, check=None)
    assert done.returncode in (1, 2) and not os.listdir(tmp_path / "disk0")
    again = run_cli("init", "--lightning-dir", node_dir, urls[0], urls[0], check=1)
    assert "named twice" in again.stderr


def test_one_file_by_two_names_is_not_begun(node_dir: Path, tmp_path: Path) -> None:
    (url,) = files(tmp_path, 1)
    (tmp_path / "link").symlink_to("disk0")
    done = run_cli("init", "--lightning-dir", node_dir, url, url.replace("disk0", "link"), check=1)
    assert "one file, by two names" in done.stderr
    assert not list((tmp_path / "disk0").iterdir())


def test_fewer_than_half_are_warned_of(node_dir: Path, tmp_path: Path) -> None:
    urls = files(tmp_path, 2)
    done = run_cli("init", "--lightning-dir", node_dir, "--acks", 1, *urls)
    assert "no majority" in done.stderr
    assert shlex.join(urls) in done.stdout, "how to restore it"
