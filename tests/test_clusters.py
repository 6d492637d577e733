"""examples/two-clusters makes what it says; the other tests with PostgreSQL rest on that."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import cutclusters, support
from tests.clusters import Cluster, Pair, is_running, until

psycopg = pytest.importorskip("psycopg")


def table(pair: Pair) -> str:
    """URL of a new database with a table ``t (n)``."""
    url = pair.url(dbname=pair.database(), target_session_attrs="read-write")
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE t (n int)")
    return url


def insert(url: str, n: int) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO t VALUES (%s)", (n,))


def rows(cluster: Cluster, url: str) -> list[int]:
    """What it shows; a standby, once it has replayed what it has received."""
    if cluster.is_standby():
        replayed = "SELECT 1 WHERE pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn()"
        until(lambda: cluster.sql(replayed), "it has replayed all")
    return [n for (n,) in cluster.sql("SELECT n FROM t ORDER BY n", dbname=database(url))]


def database(url: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(url)["dbname"])


def test_a_commit_waits_for_the_standby(pair: Pair) -> None:
    url = table(pair)
    pair.standby.stop()
    waiting = threading.Thread(target=insert, args=(url, 1))
    waiting.start()
    pair.await_waiting()
    assert waiting.is_alive()
    pair.standby.start()
    waiting.join(support.ANSWER_S)
    assert rows(pair.standby, url) == [1]


@pytest.mark.parametrize("hard", [False, True])
def test_fail_over_and_back(pair: Pair, hard: bool) -> None:
    url = table(pair)
    insert(url, 1)
    old, new = pair.primary, pair.standby
    old.kill() if hard else old.stop()
    pair.promote()
    assert pair.primary is new
    pair.rejoin()
    pair.await_streaming()
    assert old.is_standby()
    insert(url, 2)
    assert rows(old, url) == rows(new, url) == [1, 2]


def test_what_only_the_old_primary_has_is_taken_back(pair: Pair) -> None:
    url = table(pair)
    old, new = pair.primary, pair.standby
    new.kill()
    old.sql("INSERT INTO t VALUES (1)", dbname=database(url))
    assert rows(old, url) == [1]
    old.kill()
    new.start()
    pair.promote()
    pair.rejoin()
    insert(url, 2)
    pair.await_streaming()
    assert rows(old, url) == rows(new, url) == [2]


def test_it_is_made_anew_after_a_test_that_broke_it(pair: Pair) -> None:
    assert pair.is_as_made()
    pair.standby.stop()
    pair.primary.configure("synchronous_standby_names", "")
    insert(table(pair), 1)
    assert not pair.is_as_made()
    pair.reset()
    assert pair.is_as_made()
    assert pair.primary.sql("SHOW synchronous_standby_names") == [("ANY 1 (a, b)",)]


def test_it_ends_with_who_made_it(pair: Pair) -> None:
    maker = (
        "import os, signal\nfrom pathlib import Path\nfrom tests.clusters import Pair, new_place\n"
        "pair = Pair(new_place())\n"
        "print(pair.directory, *(c.pids()[0] for c in pair.clusters.values()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", maker], cwd=support.ROOT, stdout=subprocess.PIPE)
    directory, *pids = done.stdout.decode().split()
    until(lambda: not Path(directory).exists(), "it is removed")
    assert not any(is_running(int(pid)) for pid in pids)


@pytest.mark.parametrize("kind", [cutclusters.proxy, cutclusters.namespace])
def test_cut_apart_and_together_again(kind: Any, pair: Pair) -> None:
    if kind is cutclusters.namespace and (reason := cutclusters.no_namespaces()):
        pytest.skip(reason)
    url = table(pair)
    with kind(pair) as wire:
        insert(url, 1)
        wire.cut()
        waiting = threading.Thread(target=insert, args=(url, 2))
        waiting.start()
        pair.await_waiting()
        # Clients still reach both.
        with psycopg.connect(pair.url(pair.standby, dbname=database(url))) as connection:
            assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]
        assert waiting.is_alive()
        wire.mend()
        waiting.join(support.ANSWER_S)
        pair.await_streaming()
        assert rows(pair.standby, url) == [1, 2]
