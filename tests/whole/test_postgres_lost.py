"""Attempts to lose what a PostgreSQL cluster acknowledged, or to read less than that."""

from __future__ import annotations

import os
import signal

import pytest

from destinations import backend_for
from errors import BackupError
from tests.clusters import Pair
from tests.test_postgresbackend import CHANGES, Writer, add, made, of_more, opened, stored


@pytest.fixture
def url(pair: Pair) -> str:
    """URL of an empty backup in a database of its own."""
    return made(pair.url(dbname=pair.database()))


def test_names_emptied_and_back_while_a_change_waits(pair: Pair, url: str) -> None:
    """The server that waits may see only the end of it, when it gets to run again."""
    primary = pair.primary
    with opened(of_more(pair, url, retry_for="2")) as backend:
        add(backend, CHANGES[0])
        pair.standby.stop()
        writer = Writer(backend, CHANGES[1])
        pair.await_waiting()
        ((pid,),) = primary.sql("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        os.kill(pid, signal.SIGSTOP)
        primary.configure("synchronous_standby_names", "")
        primary.sql("CHECKPOINT")  # Who does that lets those who wait go on, before.
        primary.configure("synchronous_standby_names", None)
        os.kill(pid, signal.SIGCONT)
        assert not writer.ended().acknowledged
    primary.kill()
    pair.standby.start()
    assert stored(of_more(pair, url, pair.standby)) == CHANGES[:1]


def test_two_primaries_are_not_read(pair: Pair, url: str) -> None:
    """The old one is back, and lacks what the new one acknowledged."""
    old, new = pair.primary, pair.standby
    with opened(url) as backend:
        add(backend, CHANGES[0])
    old.kill()
    pair.promote()
    with opened(of_more(pair, url, new, standbys="0")) as backend:
        add(backend, *CHANGES[1:3])
    old.start()
    for more in ({}, {"standbys": "0"}):
        both = of_more(pair, url, retry_for="0", **more)
        with pytest.raises(BackupError, match="both take changes"):
            stored(both)
    assert stored(of_more(pair, url, new)) == CHANGES[:3]
    old.kill()
    assert stored(of_more(pair, url)) == CHANGES[:3], "the only one that answers"


def test_a_standby_that_has_not_replayed_all_is_not_read(pair: Pair, url: str) -> None:
    """It has flushed what was acknowledged, and shows less."""
    with opened(url) as backend:
        add(backend, CHANGES[0])
        pair.await_streaming()
        pair.standby.sql("SELECT pg_wal_replay_pause()")
        add(backend, *CHANGES[1:3])
    pair.primary.kill()
    for hosts in ((), (pair.standby,)):
        with pytest.raises(BackupError, match="has not replayed all"):
            backend_for(of_more(pair, url, *hosts, retry_for="0")).status()
    pair.standby.sql("SELECT pg_wal_replay_resume()")
    assert stored(of_more(pair, url)) == CHANGES[:3]
