"""``status --wallet postgres://...``: of the real clusters, and what is said of each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from commands import main
from tests.clusters import Pair
from tests.monitoring.test_json import check_wallet
from tests.support import run_cli


def wallet(pair: Pair, **more: str) -> str:
    """The value of lightningd's option, of a wallet on the primary."""
    return pair.url(pair.primary, **more).replace("postgresql:", "postgres:", 1)


def look(pair: Pair, check: int, **more: str) -> str:
    """What is said of the wallet, and that the exit code is ``check``."""
    return run("--wallet", wallet(pair, **more), check=check)


def run(*arguments: str, check: int) -> str:
    """What ``status`` says, in this process: starting one for each takes most of the time."""
    done = CliRunner().invoke(main, ["status", *arguments])
    assert done.exit_code == check, done.output
    return str(done.output)


def test_each_commit_is_on_two_machines(pair: Pair) -> None:
    said = look(pair, 0)
    assert "for 1 standbys (synchronous_standby_names is 'ANY 1 (a, b)'" in said
    assert "standby:        b, streaming, quorum, 0 bytes behind" in said
    assert "slot:           b, in use, reserved" in said
    assert "archive:        on" in said


def test_json(pair: Pair) -> None:
    found = json.loads(run("--json", "--wallet", wallet(pair), check=0))
    check_wallet(found)
    assert found["problems"] == found["warnings"] == []
    assert found["server"]["confirming"] == 1
    assert found["standbys"][0]["name"] == "b"
    assert found["fallback"]["slots"][0]["active"]


def test_a_cluster_whose_settings_are_not_those(pair: Pair) -> None:
    primary = pair.primary
    primary.configure("synchronous_standby_names", "")
    assert "a commit waits for 0 standbys, and 1 must have it" in look(pair, 1)
    primary.configure("synchronous_standby_names", None)
    primary.configure("fsync", "off")
    primary.configure("full_page_writes", "off")
    said = look(pair, 1)
    assert "fsync is off" in said and "full_page_writes is off" in said
    primary.configure("fsync", None)
    primary.configure("full_page_writes", None)
    assert look(pair, 0)


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        ("off", 1, "waits for no standby"),
        ("remote_write", 4, "may be lost"),
        ("remote_apply", 0, ""),
    ],
)
def test_what_is_set_for_the_role_is_what_counts(
    value: str, code: int, said: str, pair: Pair
) -> None:
    role = pair.role("pg_monitor")
    pair.primary.sql(f"ALTER ROLE {role} SET synchronous_commit = {value}")
    assert said in look(pair, code, user=role)


def test_the_standby_is_gone_and_back(pair: Pair) -> None:
    pair.standby.stop()
    said = look(pair, 1)
    assert "0 synchronous standbys stream from it, and a commit waits for 1" in said
    assert "slot:           b, not in use" in said
    pair.standby.start()
    pair.await_streaming()
    assert look(pair, 0)


def test_a_role_that_sees_nothing_is_told_what_to_grant(pair: Pair) -> None:
    role = pair.role()
    assert f'`GRANT pg_monitor TO "{role}";`' in look(pair, 1, user=role)
    pair.primary.sql(f'GRANT pg_monitor TO "{role}"')
    assert look(pair, 0, user=role)


def test_a_standby_takes_no_wallet(pair: Pair) -> None:
    url = pair.url(pair.standby).replace("postgresql:", "postgres:", 1)
    assert "it is a standby" in run("--wallet", url, check=1)


def test_a_slot_that_nobody_uses_is_a_warning(pair: Pair) -> None:
    pair.primary.sql("SELECT pg_create_physical_replication_slot('left', true)")
    assert "nobody uses the slot left" in look(pair, 4)
    pair.primary.sql("SELECT pg_drop_replication_slot('left')")


def test_archiving_that_fails_is_a_warning(pair: Pair) -> None:
    pair.primary.configure("archive_command", "false")
    pair.primary.sql("SELECT pg_switch_wal() FROM pg_create_restore_point('x')")
    while not pair.primary.sql("SELECT 1 FROM pg_stat_archiver WHERE last_failed_wal IS NOT NULL"):
        pass
    assert "archiving fails" in look(pair, 4)


def test_a_server_that_does_not_answer(pair: Pair) -> None:
    pair.primary.stop()
    said = look(pair, 1)
    assert "cannot be asked" in said and "Traceback" not in said


def test_the_password_is_not_shown(pair: Pair) -> None:
    password = pair.passfile.read_text().strip().rpartition(":")[2]
    url = f"postgres://backup:{password}@127.0.0.1:{pair.primary.port}/backup"
    done = run_cli("status", "--wallet", url)
    assert f"backup@127.0.0.1:{pair.primary.port}/backup" in done.stdout
    assert password not in done.stdout + done.stderr
    wrong = url.replace(password, "not-the-password")
    said = run_cli("status", "--wallet", wrong, check=1).stderr
    assert "password authentication failed" in said and "not-the-password" not in said


@pytest.mark.parametrize(
    ("arguments", "check", "said"),
    [
        (["--wallet", "sqlite3:///x"], 1, "Only a wallet on PostgreSQL"),
        (["--wallet", "postgres://h/d?nonsense=1"], 1, "libpq does not take this --wallet"),
        (["--wallet", "postgres://h/d", "file:///x"], 2, "Give --wallet alone"),
        (["--wallet", "postgres://h/d", "--check"], 2, "Give --wallet alone"),
    ],
)
def test_other_values(arguments: list[str], check: int, said: str) -> None:
    assert said in run(*arguments, check=check)


def test_without_psycopg(tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('No module named psycopg')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run_cli("status", "--wallet", "postgres://h/d", check=1, env=environment)
    assert "install POSTGRES=1`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
