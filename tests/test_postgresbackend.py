"""A backup in a PostgreSQL cluster: real servers that stop, lie, are killed and taken over."""

from __future__ import annotations

import contextlib
import itertools
import pwd
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend import Beginning, Change, Destination, Ending, Snapshot, new_owner
from destinations import backend_for
from errors import (
    BackupError,
    BackupExists,
    BackupMissing,
    ConfigError,
    OtherOwner,
    PlaceGone,
)
from filelog.layout2 import encode_owner, owner_behind, session_of
from quorum import Roster
from replica import Followable, Pause, Replica
from several.catchup import CatchUp, stand
from several.hearing import end_of
from tests import clusters, support
from tests.clusters import Cluster, Pair, until
from tests.support import Call

pytest.importorskip("psycopg")

from postgres import look
from postgres.wallet import examine

CHANGES = [support.change(version, f"-- {version}") for version in range(1, 40)]


class Writer:
    """One change that is sent in a thread, so that the test sees it wait."""

    def __init__(self, backend: Destination, call: Call) -> None:
        self.error: BackupError | None = None
        self.acknowledged = False
        self._work = backend, Change(call[0], None, call[1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        backend, change = self._work
        try:
            backend.add_change(change)
            self.acknowledged = True
        except BackupError as error:
            self.error = error

    def ended(self) -> Writer:
        """Itself, once the change is acknowledged or refused."""
        self._thread.join(support.ANSWER_S)
        assert not self._thread.is_alive(), "it hangs"
        return self


def add(backend: Destination, *calls: Call) -> None:
    for version, statements in calls:
        backend.add_change(Change(version, None, statements))


@contextlib.contextmanager
def opened(url: str, owner: bytes | None = None) -> Iterator[Destination]:
    backend = backend_for(url)
    with contextlib.closing(backend):
        backend.open(owner)
        yield backend


def made(url: str, owner: bytes = bytes(16)) -> str:
    """``url``, with an empty backup there."""
    backend_for(url).create(None, owner)
    return url


def stored(url: str) -> list[Call]:
    found = support.passed(backend_for(url).read())
    assert found.ending.damage is None
    return found.calls


@pytest.fixture
def url(pair: Pair) -> str:
    """URL of an empty backup in a database of its own."""
    return made(pair.url(dbname=pair.database()))


def of_more(pair: Pair, url: str, *hosts: Cluster, **more: str) -> str:
    """``url`` with other hosts and parameters."""
    dbname = url.rpartition("/")[2] if "?" not in url else url.partition("?")[0].rpartition("/")[2]
    return pair.url(*hosts, dbname=dbname, **more)


# What a change waits for


def test_a_change_waits_for_the_standby_and_goes_on(pair: Pair, url: str) -> None:
    with opened(url) as backend:
        add(backend, CHANGES[0])
        pair.standby.stop()
        writer = Writer(backend, CHANGES[1])
        pair.await_waiting()
        assert not writer.acknowledged and stored(url) == CHANGES[:1]
        pair.standby.start()
        assert writer.ended().acknowledged
        add(backend, CHANGES[2])
        assert backend.reconnects == 0
    assert stored(url) == CHANGES[:3]


def ended_by(pair: Pair, function: str) -> None:
    """End the wait of the one that waits for the standby."""
    waits = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    pair.primary.sql(f"SELECT {function}(pid) {waits}")


@pytest.mark.parametrize("function", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_wait_that_is_ended_is_no_ack(function: str, pair: Pair, url: str) -> None:
    with opened(url) as backend:
        add(backend, CHANGES[0])
        pair.standby.freeze()
        try:
            writer = Writer(backend, CHANGES[1])
            pair.await_waiting()
            ended_by(pair, function)
            until(lambda: backend.reconnects == 1, "it has noticed")
            pair.await_waiting()
            assert not writer.acknowledged, "it waits again, by a row of its own"
        finally:
            pair.standby.thaw()
        assert writer.ended().acknowledged
        add(backend, CHANGES[2])
    assert stored(url) == CHANGES[:3]


def test_names_that_are_emptied_in_mid_session_acknowledge_nothing(pair: Pair, url: str) -> None:
    with opened(of_more(pair, url, retry_for="1")) as backend:
        add(backend, CHANGES[0])
        pair.primary.configure("synchronous_standby_names", "")
        writer = Writer(backend, CHANGES[1]).ended()
        assert not writer.acknowledged
        assert "a commit waits for 0 standbys" in str(writer.error)


def test_names_that_are_emptied_while_a_change_waits_acknowledge_nothing(
    pair: Pair, url: str
) -> None:
    with opened(of_more(pair, url, retry_for="1")) as backend:
        add(backend, CHANGES[0])
        pair.standby.stop()
        writer = Writer(backend, CHANGES[1])
        pair.await_waiting()
        pair.primary.configure("synchronous_standby_names", "")
        assert not writer.ended().acknowledged
        assert "a commit waits for 0 standbys" in str(writer.error)


def test_names_that_change_and_still_demand_a_standby_go_on(pair: Pair, url: str) -> None:
    ((names,),) = pair.primary.sql("SHOW synchronous_standby_names")
    with opened(url) as backend:
        add(backend, CHANGES[0])
        pair.primary.configure("synchronous_standby_names", "ANY 1 (b, nobody)")
        add(backend, *CHANGES[1:3])
        assert backend.reconnects == 1 and names
    assert stored(url) == CHANGES[:3]


# What is refused at a connect


REFUSED = {
    "fsync": ("off", "fsync is off"),
    "full_page_writes": ("off", "full_page_writes is off"),
    "default_transaction_read_only": ("on", "it is read-only"),
    "synchronous_standby_names": ("", "a commit waits for 0 standbys"),
}


def refusal(url: str) -> str:
    with pytest.raises(BackupError) as caught:
        backend_for(url).open()
    return str(caught.value)


@pytest.mark.parametrize("setting", REFUSED)
def test_a_server_that_does_not_keep_what_it_acknowledges(
    setting: str, pair: Pair, url: str
) -> None:
    value, said = REFUSED[setting]
    pair.primary.configure(setting, value)
    try:
        assert said in refusal(of_more(pair, url, retry_for="0"))
        found = backend_for(url).status()
        assert any(said in warning for warning in found.warnings)
    finally:
        pair.primary.configure(setting, None)


def test_standbys_that_are_not_there(pair: Pair, url: str) -> None:
    assert "and 2 must have it" in refusal(of_more(pair, url, retry_for="0", standbys="2"))
    pair.standby.stop()
    at_once = of_more(pair, url, pair.primary, retry_for="0")
    assert "0 synchronous standbys stream from it" in refusal(at_once)
    pair.standby.start()
    pair.await_streaming()


def test_only_one_of_any_is_enough(pair: Pair, url: str) -> None:
    pair.primary.configure("synchronous_standby_names", "ANY 1 (b, c)")
    with opened(of_more(pair, url, retry_for="0")) as backend:
        add(backend, CHANGES[0])


def test_who_follows_tables_only_is_no_standby(pair: Pair, url: str, tmp_path: Path) -> None:
    """He takes part in the count of synchronous standbys, and confirms what he does not keep."""
    primary = pair.primary
    primary.sql("ALTER SYSTEM SET wal_level = logical")
    primary.stop()
    primary.start()
    pair.await_streaming()
    primary.sql("SELECT pg_create_logical_replication_slot('tables', 'test_decoding')")
    where = f"host={primary.sockets} port={primary.port} user=postgres dbname=postgres"
    follow = [clusters.bindir() / "pg_recvlogical", "-d", f"{where} application_name=a"]
    follow += ["-S", "tables", "--start", "-f", tmp_path / "tables", "-F", "1", "-s", "1"]
    with subprocess.Popen(list(map(str, follow))) as follower:
        counts = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'quorum'"
        until(lambda: len(primary.sql(counts)) == 2, "it counts as a synchronous standby")
        assert "a follows tables only" in refusal(of_more(pair, url, retry_for="0"))
        assert examine(of_more(pair, url, primary)).server.confirming == 1
        follower.kill()
    until(lambda: len(primary.sql(counts)) == 1, "it has gone")
    with opened(of_more(pair, url, retry_for="0")) as backend:
        add(backend, CHANGES[0])


def test_a_role_that_may_not_see_the_standbys_is_told_the_grant(pair: Pair) -> None:
    role = pair.role()
    blind = pair.url(user=role, dbname=pair.database(role), retry_for="0")
    with pytest.raises(BackupError, match=f'GRANT pg_monitor TO "{role}";'):
        backend_for(blind).create(None)
    pair.primary.sql(f"GRANT pg_monitor TO {role}")
    with opened(made(blind)) as backend:
        add(backend, CHANGES[0])


def test_a_role_without_rights_is_told_the_grant(pair: Pair, url: str) -> None:
    dbname = url.partition("?")[0].rpartition("/")[2]
    role = pair.role("pg_monitor")
    other = pair.url(user=role, dbname=dbname, retry_for="0")
    for refused in (
        lambda: backend_for(other).open(),
        lambda: backend_for(other).status(),
        lambda: backend_for(pair.url(user=role, dbname="postgres")).create(None),
    ):
        with pytest.raises(BackupError, match=r"permission denied for .*ALTER SCHEMA cln_backup"):
            refused()


def test_tables_of_another_version_are_refused_by_name(pair: Pair, url: str) -> None:
    dbname = url.partition("?")[0].rpartition("/")[2]
    pair.primary.sql("UPDATE cln_backup.layout SET version = 2", dbname=dbname)
    for refused in (lambda: backend_for(url).open(), lambda: backend_for(url).status()):
        with pytest.raises(BackupError, match="of version 2, and this release knows 1"):
            refused()


def test_a_password_that_is_not_there(pair: Pair, url: str) -> None:
    with pytest.raises(BackupError, match=r"no password supplied.*Check ~/\.pgpass"):
        backend_for(of_more(pair, url, passfile="/dev/null", retry_for="0")).status()


def test_a_backup_that_is_not_there(pair: Pair, url: str) -> None:
    with pytest.raises(BackupMissing):
        backend_for(of_more(pair, url, backup="other")).open()
    with pytest.raises(BackupMissing):
        backend_for(pair.url(dbname=pair.database())).status()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:secret@host/db", "holds no password"),
        ("postgresql://me@host/db?password=secret", "holds no password"),
        ("postgresql://me@host/db?sslpassword=secret", "holds no password"),
        ("postgresql://me@host/db?p%61ssword=secret", "holds no password"),
        ("postgresql:me@host", "not of the form"),
        ("postgresql://me@host/db?backup=a/b", "no name of a backup"),
        ("postgresql://me@host/db?standbys=-1", "no number of standbys"),
        ("postgresql://me@host/db?standbys=1&standbys=2", "stands twice"),
        ("postgresql://me@host/db?retry_for=soon", "no number of seconds"),
        ("postgresql://me@host/db?what=1", 'invalid URI query parameter: "what".'),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        backend_for(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["node.old-2026", "node.new-1", "x.old-y"])
def test_a_name_of_those_that_are_kept_is_none_to_write_to(name: str, url: str, pair: Pair) -> None:
    backend = backend_for(of_more(pair, url, backup=name))
    for write in (backend.require_absent, lambda: backend.create(None), backend.open):
        with pytest.raises(ConfigError, match=f"backup={name} is no name to write to"):
            write()
    with pytest.raises(BackupMissing):
        backend.read()


def test_what_is_kept_of_the_longest_name_can_be_read(pair: Pair, url: str) -> None:
    longest = made(of_more(pair, url, backup="n" * 100))
    with opened(longest) as backend:
        add(backend, *CHANGES[:2])
    backend_for(longest).replace(None)
    kept = backend_for(longest).replace(None) or ""
    name = kept.partition("backup=")[2].split()[0]
    assert stored(of_more(pair, url, backup=name)) == []


# Who is asked


def test_a_standby_can_be_read_and_takes_nothing(pair: Pair, url: str) -> None:
    with opened(url) as backend:
        add(backend, *CHANGES[:3])
    pair.await_streaming()
    only = of_more(pair, url, pair.standby, retry_for="0")
    assert stored(only) == CHANGES[:3]
    assert backend_for(only).status().version == 3
    assert "it is a standby" in refusal(only)


def test_hosts_of_a_service_file_are_walked_too(
    pair: Pair, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dbname = url.partition("?")[0].rpartition("/")[2]
    both = (pair.standby, pair.primary)
    (tmp_path / "services").write_text(
        f"[backup]\nhost={','.join(c.host for c in both)}\ndbname={dbname}\nuser=backup\n"
        f"port={','.join(str(c.port) for c in both)}\npassfile={pair.passfile}\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    with opened("postgresql:///?service=backup&retry_for=0") as backend:
        add(backend, CHANGES[0])
    assert stored(url) == CHANGES[:1]


# Who writes


def test_the_first_of_two_nodes_to_write_wins(pair: Pair) -> None:
    owner = new_owner()
    url = made(pair.url(dbname=pair.database()), owner)
    with opened(url, owner) as one, opened(url, owner) as other:
        add(other, CHANGES[0])
        for _ in range(2):
            with pytest.raises(BackupError, match="another node took over at version 1"):
                add(one, CHANGES[0])
        add(other, CHANGES[1])
    assert stored(url) == CHANGES[:2]


def test_two_nodes_at_once_write_one_history(pair: Pair, url: str) -> None:
    with opened(url) as one, opened(url) as other:
        pair.standby.freeze()
        try:
            first = Writer(one, CHANGES[0])
            pair.await_waiting()
            second = Writer(other, support.change(1, "-- of the other"))
        finally:
            pair.standby.thaw()
        first.ended(), second.ended()
    assert first.acknowledged and not second.acknowledged
    assert "another node took over" in str(second.error)
    assert stored(url) == CHANGES[:1]


def test_only_the_owner_writes(pair: Pair) -> None:
    one, other = new_owner(), new_owner()
    url = made(pair.url(dbname=pair.database()), one)
    with opened(url, one) as backend:
        add(backend, CHANGES[0])
        with pytest.raises(OtherOwner):
            backend_for(url).open(other)
        with opened(url) as attached:
            attached.take_over(other)
            assert attached.prev_version == 0, "the change before can be taken back"
            add(attached, CHANGES[1])
        with pytest.raises(BackupError, match="another node"):
            add(backend, CHANGES[1])
    with pytest.raises(OtherOwner, match="took it over at"):
        backend_for(url).open(one)
    assert stored(url) == CHANGES[:2]


def test_two_backups_in_one_database(pair: Pair, url: str) -> None:
    other = made(of_more(pair, url, backup="other"))
    with opened(url) as one, opened(other) as two:
        add(one, *support.first_changes(3))
        add(two, support.change(1, "-- of the other"))
    with pytest.raises(BackupExists):
        backend_for(other).create(None)
    backend_for(url).compact()
    assert stored(other) == [support.change(1, "-- of the other")]
    assert backend_for(url).status().version == 3


def test_a_writer_whose_backup_was_replaced_is_refused(
    pair: Pair, url: str, tmp_path: Path
) -> None:
    fresh = snapshot(tmp_path, 5)
    with opened(url) as backend:
        add(backend, *CHANGES[:2])
        kept = backend_for(url).replace(fresh)
        with pytest.raises(BackupError, match="another"):
            add(backend, CHANGES[2])
    assert kept is not None
    name = kept.partition("backup=")[2].split()[0]
    assert stored(of_more(pair, url, backup=name)) == CHANGES[:2]


def test_an_open_backup_goes_on_with_what_replaces_it(url: str, tmp_path: Path) -> None:
    with opened(url) as backend:
        add(backend, *CHANGES[:2])
        assert backend.replace(snapshot(tmp_path, 5))
        assert (backend.version, backend.prev_version, backend.version_count) == (5, 5, 1)
        add(backend, support.change(6))
    assert stored(url) == [support.change(6)]


def test_status_of_one_that_was_dropped_says_so(url: str) -> None:
    payload = encode_owner(0, "here", Roster(2, 1, ("file:///elsewhere",), votes=False))
    with opened(url) as backend:
        assert isinstance(backend, Replica)
        head = owner_behind(backend.newest, session_of(new_owner(), 2, 2), payload)
        backend.add_record(head, payload)
    found = backend_for(url).status()
    assert found.votes is False
    assert "those are file:///elsewhere." in found.warnings[-1]


def test_a_copy_of_a_compacted_one_keeps_the_list_of_destinations(url: str, tmp_path: Path) -> None:
    """Without it the copy would be an only one, whose state is never doubted."""
    roster, owner = Roster(1, 1, (url, "file:///elsewhere")), new_owner()
    payload = encode_owner(0, "here", roster)
    with opened(url) as backend:
        assert isinstance(backend, Replica)
        head = owner_behind(backend.newest, session_of(owner, 2, 2), payload)
        backend.add_record(head, payload)
        add(backend, *support.first_changes(3))
    backend_for(url).compact()
    assert (backend_for(url).roster(), backend_for(url).status().changes) == (roster, 1)
    copy = backend_for(f"file://{tmp_path}/copy")
    copy.create(None)
    with contextlib.closing(copy), backend_for(url).records() as records:
        copy.open()
        copy.take_all(records, owner)
    assert copy.roster() == roster
    with opened(url) as backend:  # And it is a place to go on from.
        add(backend, support.first_changes(4)[3])
    with contextlib.closing(copy):
        copy.open()
        catch_up = CatchUp(copy, threading.Lock(), owner, True)
        standing = stand(end_of(copy.newest), copy.newest.tag, backend_for(url))
        catch_up.bring(backend_for(url), standing)
    assert stored(copy.url) == stored(url)


def snapshot(directory: Path, version: int) -> Snapshot:
    path = directory / f"{version}.sqlite3"
    support.apply_calls(path, support.first_changes(version))
    return Snapshot(str(path), version)


# A standby takes over


def test_a_fail_over_waits_for_a_standby_and_nothing_is_lost(pair: Pair, url: str) -> None:
    with opened(url) as backend:
        add(backend, *CHANGES[:2])
        pair.primary.kill()
        writer = Writer(backend, CHANGES[2])
        pair.promote()
        assert not writer.acknowledged
        pair.rejoin()
        assert writer.ended().acknowledged, writer.error
        add(backend, CHANGES[3])
    assert stored(url) == CHANGES[:4]


def test_a_promoted_standby_without_acknowledged_changes_is_refused(pair: Pair, url: str) -> None:
    single = of_more(pair, url, standbys="0", retry_for="20")
    with opened(single) as backend:
        add(backend, CHANGES[0])
        pair.await_streaming()
        pair.standby.stop()
        pair.primary.configure("synchronous_standby_names", "")
        add(backend, *CHANGES[1:3])
        pair.primary.kill()
        pair.standby.start()
        pair.promote()
        with pytest.raises(BackupError, match="it is at version 1, this node at version 3"):
            add(backend, CHANGES[3])


def test_an_old_primary_that_comes_back_acknowledges_nothing(pair: Pair, url: str) -> None:
    old, new = pair.primary, pair.standby
    with opened(of_more(pair, url, old, retry_for="1")) as backend:
        add(backend, CHANGES[0])
        old.kill()
        pair.promote()
        old.start()
        writer = Writer(backend, CHANGES[1]).ended()
        assert not writer.acknowledged
        assert "0 synchronous standbys stream from it" in str(writer.error)
    assert stored(of_more(pair, url, new)) == CHANGES[:1]


def test_a_lost_commit_that_a_restarted_primary_shows_is_not_believed(pair: Pair, url: str) -> None:
    """What no standby has is visible after a restart: first a commit of our own goes through."""
    with opened(url) as backend:
        add(backend, CHANGES[0])
        pair.standby.stop()
        writer = Writer(backend, CHANGES[1])
        pair.await_waiting()
        pair.primary.kill()
        pair.primary.start()
        assert stored(url) == CHANGES[:2], "it shows, and no standby has it"
        assert not writer.acknowledged
        pair.standby.start()
        assert writer.ended().acknowledged, writer.error
    assert stored(url) == CHANGES[:2]


@pytest.fixture
def small_disk_of(pair: Pair) -> Iterator[Path]:
    """A disk of 4 MiB for the primary, where this user may mount one; there is no standby."""
    path = pair.directory / "small"
    path.mkdir()
    user = pwd.getpwuid(pair.primary.data.stat().st_uid)
    options = f"size=4m,uid={user.pw_uid},gid={user.pw_gid},mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        path.rmdir()
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    pair.standby.stop()
    pair.primary.configure("synchronous_standby_names", "")
    yield path
    pair.primary.kill()
    subprocess.run(["umount", str(path)], check=True)
    path.rmdir()


def test_a_full_disk_is_told_and_nothing_of_it_stays(
    pair: Pair, url: str, small_disk_of: Path
) -> None:
    dbname = url.partition("?")[0].rpartition("/")[2]
    pair.primary.sql(f"CREATE TABLESPACE small LOCATION '{small_disk_of}'")
    pair.primary.sql("ALTER TABLE cln_backup.records SET TABLESPACE small", dbname=dbname)
    calls = [support.change(version, "-- " + "x" * 500_000) for version in range(1, 12)]
    with opened(of_more(pair, url, pair.primary, standbys="0", retry_for="1")) as backend:
        with pytest.raises(BackupError, match="No space left on device"):
            add(backend, *calls)
        assert 0 < backend.version < 11
        with pytest.raises(BackupError, match="No space left on device"):
            add(backend, CHANGES[backend.version])
    del calls[backend.version :]
    assert stored(of_more(pair, url, pair.primary)) == calls


# Reading


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of five records."""
    monkeypatch.setattr(look, "_PAGE", look._PAGE.replace(f"LIMIT {look.PAGE_ROWS}", "LIMIT 5"))


def test_a_pass_that_a_compaction_overtakes_begins_anew(small_pages: None, url: str) -> None:
    calls = support.first_changes(30)
    with opened(url) as backend:
        add(backend, *calls)
    found: list[Call] = []
    snapshots = 0
    with contextlib.closing(backend_for(url).read()) as reading:
        for step in reading:
            if isinstance(step.found, Beginning):
                found.clear()
                snapshots += 1
            elif isinstance(step.found, Change) and step.found.transaction is not None:
                found.append((step.found.version, list(step.found.transaction)))
                if len(found) == 7 and not snapshots:
                    backend_for(url).compact()
    assert isinstance(step.found, Ending) and step.found.damage is None
    assert snapshots == 1 and found == calls[-1:]


def test_a_pass_goes_on_after_its_connection_was_ended(
    small_pages: None, pair: Pair, url: str
) -> None:
    with opened(url) as backend:
        add(backend, *CHANGES)
    with contextlib.closing(backend_for(url).read()) as reading:
        steps = iter(reading)
        found = [next(steps).found for _ in range(7)]
        pair.primary.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'backup'"
        )
        found += [step.found for step in steps]
    assert [each.version for each in found[:-1]] == [version for version, _ in CHANGES]
    assert isinstance(found[-1], Ending) and found[-1].damage is None


DAMAGE = {
    "a record is gone": "DELETE FROM cln_backup.records WHERE sequence = 3",
    "a record is another": "UPDATE cln_backup.records SET payload = payload || 'x' WHERE sequence"
    " = 3",
    "a record is another's": "UPDATE cln_backup.records SET chain = decode(repeat('00', 16), 'hex')"
    " WHERE sequence = 3",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str, pair: Pair, url: str) -> None:
    with opened(url) as backend:
        add(backend, *CHANGES[:6])
    pair.primary.sql(DAMAGE[name], dbname=url.partition("?")[0].rpartition("/")[2])
    found = backend_for(url).status(check=True)
    assert found.damage and "good up to version 2, versions 3 to 6 stand behind" in found.damage
    assert support.passed(backend_for(url).read()).calls == CHANGES[:2]


def test_a_piece_of_a_snapshot_that_does_not_check(pair: Pair, tmp_path: Path) -> None:
    url, first = pair.url(dbname=pair.database()), snapshot(tmp_path, 3)
    backend_for(url).create(first)
    dbname = url.partition("?")[0].rpartition("/")[2]
    pair.primary.sql("UPDATE cln_backup.pieces SET data = data || 'x'", dbname=dbname)
    assert "piece 0 of the snapshot does not check" in str(backend_for(url).status(True).damage)
    pair.primary.sql("DELETE FROM cln_backup.pieces", dbname=dbname)
    assert "piece 0 of the snapshot is missing" in str(backend_for(url).status(True).damage)


def test_who_follows_goes_on_behind_a_compaction_or_is_told(url: str) -> None:
    with opened(url) as backend:
        add(backend, *support.first_changes(8))
        destination = backend_for(url)
        assert isinstance(destination, Followable)
        with destination.follow(None) as records:
            heads = [
                each[0] for each in itertools.islice(records, 8) if not isinstance(each, Pause)
            ]
        destination.compact()
        add(backend, support.change(9))
        with destination.follow(heads[6]) as records:
            found = [each for each in itertools.islice(records, 3) if not isinstance(each, Pause)]
        assert [head.version for head, _ in found] == [8, 9]
        with destination.follow(heads[3]) as records, pytest.raises(PlaceGone):
            next(iter(records))


def test_a_record_that_became_the_snapshot_is_no_damage(url: str) -> None:
    """It is the next one that is to come, and a compaction lets the backup begin with it."""
    changes = support.first_changes(4)
    with opened(url) as backend:
        add(backend, *changes[:2])
        with backend_for(url).follow(None) as records:
            assert isinstance(list(itertools.islice(records, 3))[2], Pause)
            add(backend, *changes[2:])
            backend_for(url).compact()
            with pytest.raises(PlaceGone):
                next(records)
