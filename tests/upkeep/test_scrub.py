"""The scrub beside a node: when it comes, what it finds, what it remembers, what it costs."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

import durable
from backend import Change, bump
from errors import BackupError, CheckRunning, Damaged, DatabaseError, DiskError
from filebackend import FileBackend
from filelog import proof
from filelog import reader as logreader
from filelog.proof import Proof
from tests import support
from tests.stopping import eventually, is_running
from tests.support import ROOT
from upkeep import child, compaction, scrub
from upkeep.compaction import Compactor, Housekeeper
from upkeep.scrub import CHECK, CHECK_AFTER_NS, PROVE, PROVE_AFTER_NS, Scrubber

Usage = namedtuple("Usage", "total used free")
NOW = 1_700_000_000 * 10**9
SLOW = (
    "import sys; from upkeep import scrub; scrub.WORK_S, scrub.REST = 0.0, 1e6;"
    " scrub.main(*sys.argv[1:])"
)
"""A scrub that rests for ever after its first step."""


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backup of a recorded node."""
    url = f"file://{tmp_path_factory.mktemp('traced')}/node.bkp"
    FileBackend(url).create(None)
    for session in support.trace_sessions("payer"):
        support.add_session(url, session)
    return Path(FileBackend(url).path)


@pytest.fixture
def traced_url(traced: Path, url: str) -> str:
    """A copy of it."""
    shutil.copyfile(traced, url.removeprefix("file://"))
    return url


def small(url: str) -> str:
    """A new backup of a few changes."""
    support.make_backup(url, support.first_changes(20))
    return url


def look(url: str) -> Proof:
    """Scrub the stopped node's backup at ``url`` if it is time; what is known then."""
    with support.opened(url) as backend:
        Scrubber(backend).run_if_due()
    return known(url)


def known(url: str) -> Proof:
    path = FileBackend(url).path
    with contextlib.closing(logreader.LogReader(path)) as reader:
        return proof.read(path, reader.backup_id)


def note(url: str, **changes: object) -> None:
    path = FileBackend(url).path
    with contextlib.closing(logreader.LogReader(path)) as reader:
        assert reader.backup_id is not None
        proof.note(path, reader.backup_id, **changes)


def ago(age_ns: int) -> int:
    return time.time_ns() - age_ns


def flip_in_the_middle(url: str) -> int:
    """Turn a bit in a record of the middle; that record's offset."""
    path = Path(FileBackend(url).path)
    records = support.records_of(path)
    head = records[len(records) // 2][0]
    support.flip(path, head.end - 20)
    return head.offset


def strays(url: str) -> list[str]:
    return [n for n in os.listdir(Path(FileBackend(url).path).parent) if ".scratch-" in n]


def told(log_lines: pytest.LogCaptureFixture, level: str) -> list[str]:
    """The log's lines of ``level``."""
    return [r.getMessage() for r in log_lines.records if r.levelname == level]


# When


@pytest.mark.parametrize(
    ("checked", "proven", "unsound", "mode"),
    [
        (None, None, None, PROVE),
        (CHECK_AFTER_NS - 1, None, None, None),
        (CHECK_AFTER_NS - 1, PROVE_AFTER_NS, "x", None),
        (CHECK_AFTER_NS, None, None, PROVE),
        (CHECK_AFTER_NS, PROVE_AFTER_NS - 1, None, CHECK),
        (CHECK_AFTER_NS, PROVE_AFTER_NS - 1, "x", PROVE),
        (CHECK_AFTER_NS, PROVE_AFTER_NS, None, PROVE),
        (None, 0, None, CHECK),
    ],
)
def test_due(
    checked: int | None, proven: int | None, unsound: str | None, mode: str | None
) -> None:
    checked_ns, proven_ns = (None if age is None else NOW - age for age in (checked, proven))
    assert scrub.due(Proof("id", checked_ns, proven_ns, unsound), NOW) == mode


def test_first_look_proves_the_rest_of_the_week_checks(
    traced_url: str, log_lines: pytest.LogCaptureFixture
) -> None:
    first = look(traced_url)
    assert first.proven_ns == first.checked_ns is not None
    assert (first.unsound, first.failure) == (None, None)
    assert "is proven: every record checks, and it restores version" in log_lines.text
    log_lines.clear()
    # Other objects, as after a restart: what was done is known.
    assert look(traced_url) == first and log_lines.messages == []
    note(traced_url, checked_ns=ago(CHECK_AFTER_NS), proven_ns=(proven := ago(CHECK_AFTER_NS)))
    second = look(traced_url)
    assert second.proven_ns == proven and second.checked_ns is not None
    assert second.checked_ns > first.checked_ns
    assert ["is checked: every record" in text for text in log_lines.messages] == [True]
    note(traced_url, checked_ns=ago(PROVE_AFTER_NS), proven_ns=ago(PROVE_AFTER_NS))
    third = look(traced_url)
    assert third.proven_ns is not None and third.proven_ns > second.checked_ns
    assert strays(traced_url) == []


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", '"x"', "[" * 60_000, '{"backup_id": "00"}', "\0", "{}x"),
        '{"backup_id": "%s", "checked_ns": true, "proven_ns": "1", "unsound": 1, "failure": []}',
        '{"backup_id": "%s", "checked_ns": 1e99, "proven_ns": -5}',
    ],
)
def test_proof_that_is_none_counts_as_never(content: str, url: str) -> None:
    small(url)
    identity = known(url).backup_id
    Path(FileBackend(url).path + proof.SUFFIX).write_text(content.replace("%s", identity))
    assert known(url) == Proof(identity)
    assert look(url).proven_ns is not None


def test_times_in_the_future_count_as_never(url: str) -> None:
    small(url)
    future = ago(-(10**12))
    note(url, checked_ns=future, proven_ns=future)
    assert known(url) == Proof(known(url).backup_id)
    found = look(url)
    assert found.proven_ns is not None and found.proven_ns < future


def test_proof_of_another_backup_at_the_same_place_counts_as_never(url: str) -> None:
    path = Path(FileBackend(small(url)).path)
    assert look(url).proven_ns is not None
    path.unlink()
    assert known(small(url)) == Proof(known(url).backup_id)


def test_proof_file_is_the_owners_only_and_stays_one_file(url: str) -> None:
    small(url)
    path = Path(FileBackend(url).path)
    if os.geteuid() == 0:
        os.chown(path, 1234, 1235)
    look(url)
    beside = path.with_name(path.name + proof.SUFFIX)
    before, owner = beside.stat(), path.stat()
    assert before.st_mode & 0o777 == 0o600
    assert (before.st_uid, before.st_gid) == (owner.st_uid, owner.st_gid)
    note(url, unsound="long " * 100)
    note(url, unsound=None)
    assert beside.stat().st_ino == before.st_ino
    assert set(json.loads(beside.read_text())) == set(Proof.__slots__)


# What it finds


def test_damage_is_an_error_at_once_and_stays_known(
    traced_url: str, log_lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the plugin and in the server: a Housekeeper in a thread of its own."""
    offset = flip_in_the_middle(traced_url)
    monkeypatch.setattr(compaction, "FIRST_AFTER_S", 0.0)
    with support.opened(traced_url) as backend:
        keeper = Housekeeper(backend, Compactor(backend, threading.Lock()), None)
        keeper.start()
        text = eventually(lambda: known(traced_url).unsound, "finding the damage")
        keeper.stop()
        version = backend.version + 1
        backend.add_change(Change(version, None, ["DELETE FROM peers", bump(version)]))
    assert told(log_lines, "ERROR") == [text]
    assert f"is damaged at offset {offset}" in text and "resync" in text
    status = FileBackend(traced_url).status()
    assert status.unsound == text and status.last_proven_ns is None
    assert status.last_checked_ns is not None
    assert strays(traced_url) == []


def test_damage_that_only_a_check_looks_for(url: str, log_lines: pytest.LogCaptureFixture) -> None:
    small(url)
    note(url, proven_ns=ago(CHECK_AFTER_NS))
    offset = flip_in_the_middle(url)
    found = look(url)
    assert found.unsound is not None and f"offset {offset}" in found.unsound
    assert told(log_lines, "ERROR") == [found.unsound]


def test_status_tells_what_was_found(url: str) -> None:
    small(url)
    support.add_session(url, [support.change(21, "INSERT INTO nowhere VALUES (1)")])
    support.add_session(url, [support.change(22, "INSERT INTO items VALUES (22, 'x')")])
    assert "last proven:    never" in support.run_cli("status", url).stdout
    found = look(url)
    assert found.unsound is not None and found.proven_ns is None
    assert "does not restore" in found.unsound
    assert "the change to version 21 does not replay: no such table: nowhere" in found.unsound
    done = support.run_cli("status", url, check=1)
    assert "last proven:    never" in done.stdout and "last checked:   20" in done.stdout
    assert f"Error: The last check beside the node found: {found.unsound}" in done.stderr
    values = json.loads(support.run_cli("status", "--json", url, check=1).stdout)
    assert values["unsound"] == found.unsound and values["last_proven_ns"] is None
    assert values["last_checked_ns"] == found.checked_ns


def test_what_a_proof_found_stays_until_the_next_proof(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(url)
    note(url, unsound="Something.", proven_ns=ago(CHECK_AFTER_NS))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
        assert look(url).unsound == "Something."
    note(url, checked_ns=None)
    assert look(url).unsound is None


def test_database_that_sqlite_complains_of(url: str, log_lines: pytest.LogCaptureFixture) -> None:
    url += " & b"
    calls = support.first_changes(3)
    calls.append(
        support.change(
            4,
            "CREATE TABLE children (id INTEGER, item INTEGER REFERENCES items(id))",
        )
    )
    support.make_backup(url, calls)
    support.add_session(
        url,
        [
            (4, ["PRAGMA foreign_keys = OFF;"]),
            support.change(5, "INSERT INTO children VALUES (1, 77)"),
        ],
    )
    found = look(url)
    assert found.unsound is not None and found.proven_ns is None
    assert "restores version 5, but SQLite's checks complain: foreign_key_check" in found.unsound
    assert f"verify --against DB {shlex.quote(url)}`" in found.unsound
    assert told(log_lines, "ERROR") == [found.unsound]


def test_empty_backup_is_sound(url: str) -> None:
    FileBackend(url).create(None)
    assert look(url).proven_ns is not None


def test_log_that_is_gone_is_an_error(url: str, log_lines: pytest.LogCaptureFixture) -> None:
    with support.opened(small(url)) as backend:
        os.unlink(backend.path)
        Scrubber(backend).run_if_due()
    assert ["There is no backup at" in text for text in told(log_lines, "ERROR")] == [True]


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (Damaged("/log", 1, "x", 1, "x"), "unsound"),
        (Damaged("/log.scratch-compact-1-log", 1, "x", 1, "x"), "error"),
        (DiskError("/log", OSError(5, "Input/output error"), "read"), "unsound"),
        (DiskError("/log", OSError(13, "Permission denied"), "open"), "error"),
        (DiskError("/scratch", OSError(5, "Input/output error"), "write"), "error"),
    ],
)
def test_what_counts_against_the_backup(error: BackupError, key: str) -> None:
    assert child._as_message(error, "/log") == {key: str(error)}


@pytest.mark.parametrize("cause", child.SHORTAGES)
def test_disk_that_is_full_does_not_count_against_the_backup(cause: str) -> None:
    error = DatabaseError("/log.scratch-1", f"the change to version 5 does not replay: {cause}")
    error.__cause__ = sqlite3.OperationalError(cause)
    assert child._as_message(error, "/log") == {"error": str(error)}
    error.__cause__ = sqlite3.OperationalError("no such table: x")
    assert child._as_message(error, "/log").keys() == {"unsound"}


def test_growth_meanwhile_is_no_damage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(url)
    with support.opened(url) as backend:
        scrubber = Scrubber(backend)
        thread = threading.Thread(target=scrubber.run_if_due)
        thread.start()
        version = 20
        while thread.is_alive():
            version += 1
            statement = f"INSERT INTO items VALUES ({version}, '{'x' * 2000}')"
            backend.add_change(Change(version, None, [statement, bump(version)]))
    assert known(url).proven_ns is not None and known(url).unsound is None


# What is in the way


def test_not_enough_space_for_a_proof_is_said_once(
    url: str, monkeypatch: pytest.MonkeyPatch, log_lines: pytest.LogCaptureFixture
) -> None:
    with support.opened(small(url)) as backend:
        needed = backend.log_size + backend.snapshot_size + scrub.RESERVE
        scrubber = Scrubber(backend)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, needed - 1))
        for _ in range(2):
            note(url, checked_ns=None)
            assert scrubber.run_if_due()
            assert (known(url).checked_ns is not None, known(url).proven_ns) == (True, None)
        (text,) = told(log_lines, "WARNING")
        assert "read and checked, but not replayed" in text
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, needed))
        note(url, checked_ns=None)
        assert scrubber.run_if_due() and known(url).proven_ns is not None


def test_only_one_checks_at_a_time(url: str, log_lines: pytest.LogCaptureFixture) -> None:
    path = FileBackend(small(url)).path
    program = (
        "import sys; from filelog import proof\n"
        "with proof.checking(sys.argv[1]):\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        with pytest.raises(CheckRunning, match=f"Another check of {path}"), proof.checking(path):
            pass
        assert look(url) == Proof(known(url).backup_id)
        assert told(log_lines, "WARNING") == told(log_lines, "ERROR") == []
        other.communicate()
    assert look(url).proven_ns is not None
    with proof.checking(path), pytest.raises(CheckRunning), proof.checking(path):
        pass


def test_failure_is_a_warning_and_no_finding(
    url: str, monkeypatch: pytest.MonkeyPatch, log_lines: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    small(url)
    program = tmp_path / "failing.py"
    program.write_text("raise SystemExit(7)")
    with monkeypatch.context() as patch:
        patch.setattr(scrub, "__file__", str(program))
        found = look(url)
    assert found == Proof(found.backup_id, failure="The checking process ended with status 7.")
    assert len(told(log_lines, "WARNING")) == 1 and told(log_lines, "ERROR") == []
    done = support.run_cli("status", url, check=4)
    assert "did not come to its end: The checking process ended with status 7." in done.stderr
    assert look(url).failure is None
    support.run_cli("status", url)


def test_proof_that_cannot_be_kept_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch, log_lines: pytest.LogCaptureFixture
) -> None:
    with support.opened(small(url)) as backend:
        monkeypatch.setattr(durable, "write_all", lambda *_: os.close(-1))
        assert Scrubber(backend).run_if_due()
    (text,) = told(log_lines, "WARNING")
    assert "cannot be kept beside it: [Errno 9]" in text


def test_status_warns_of_a_proof_of_long_ago_and_verify_renews_it(url: str) -> None:
    small(url)
    note(url, proven_ns=ago(proof.STALE_NS + 10**9))
    assert "last proven that this backup restores on" in (
        support.run_cli("status", url, check=4).stderr
    )
    support.run_cli("verify", url)
    support.run_cli("status", url)
    assert known(url).proven_ns == known(url).checked_ns is not None


# Beside a compaction


def test_compaction_counts_as_a_check_and_a_proof(url: str) -> None:
    with support.opened(small(url)) as backend:
        compactor = Compactor(backend, threading.Lock())
        note(url, unsound="Something.", failure="Something.")
        compactor.run()
        assert known(url).proven_ns == known(url).checked_ns is not None
        assert (known(url).unsound, known(url).failure) == (None, None)
        assert not compactor.scrubber.run_if_due()


def test_compaction_with_nothing_to_do_counts_as_nothing(url: str) -> None:
    support.make_backup(url, support.first_changes(1))
    with support.opened(url) as backend:
        Compactor(backend, threading.Lock()).run()
    assert known(url) == Proof(known(url).backup_id)


@pytest.fixture
def slow_scrub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrubs that rest for ever."""
    program = tmp_path / "slow.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {SLOW}")
    monkeypatch.setattr(scrub, "__file__", str(program))


def scrubbing(url: str) -> list[int]:
    """Processes that scrub the backup at ``url``, once they have a scratch database."""
    prefix = f"{FileBackend(url).path}.scratch-scrub-".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(word.startswith(prefix) for word in words) and strays(url):
                    found.append(int(entry.name))
    return found


@pytest.mark.usefixtures("slow_scrub")
def test_compaction_ends_a_scrub(url: str, log_lines: pytest.LogCaptureFixture) -> None:
    with support.opened(small(url)) as backend:
        compactor = Compactor(backend, threading.Lock())
        thread = threading.Thread(target=compactor.scrubber.run_if_due)
        thread.start()
        (process,) = eventually(lambda: scrubbing(url), "a scrub")
        compactor.run()
        thread.join()
        assert not is_running(process) and strays(url) == []
        assert known(url).proven_ns is not None
        assert told(log_lines, "WARNING") == told(log_lines, "ERROR") == []
        with compactor.scrubber.held_off():
            note(url, checked_ns=None)
            compactor.scrubber.run_if_due()
        assert known(url).checked_ns is None


# Its process


def started(url: str, mode: str = PROVE, program: str = SLOW) -> subprocess.Popen[bytes]:
    path = FileBackend(url).path
    return subprocess.Popen(
        [sys.executable, "-c", program, path, f"{path}.scratch-scrub-1", mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )


def test_process_ends_with_its_parent_and_leaves_nothing(url: str) -> None:
    process = started(small(url))
    eventually(lambda: strays(url), "a scratch database")
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == child.NICE
    assert process.communicate(timeout=support.ANSWER_S)[0] == b""
    assert process.returncode == 1 and strays(url) == []


def test_killed_in_the_middle_leaves_nothing_after_the_next_open(url: str) -> None:
    process = started(small(url))
    eventually(lambda: strays(url), "a scratch database")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert strays(url) != []
    with support.opened(url):
        assert strays(url) == []


def test_plugin_that_ends_takes_its_scrub_along(url: str, node_dir: Path, tmp_path: Path) -> None:
    """Whatever way it ends, and at once."""
    program = tmp_path / "plugin.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import backup; from upkeep import compaction, scrub\n"
        "compaction.FIRST_AFTER_S = compaction.PAUSE_S = 0.01\n"
        f"scrub.__file__ = {str(tmp_path / 'slow.py')!r}\n"
        "backup.main()\n"
    )
    (tmp_path / "slow.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {SLOW}")
    FileBackend(url).create(None)
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    with support.PluginProcess(node_dir, [sys.executable, str(program)]) as plugin:
        plugin.manifest()
        calls = support.first_changes(12)
        plugin.write(*calls[0])
        (process,) = eventually(lambda: scrubbing(url), "a scrub")
        for call in calls[1:]:
            plugin.write(*call)
        plugin.kill()
    eventually(lambda: not is_running(process), "the end of the scrub")
    # It removes its files while it may still be making one: the next open finds that.
    with contextlib.closing(FileBackend(url)) as backend:
        backend.open()
    assert strays(url) == []
    assert FileBackend(url).status().version == 12


def test_rest_is_three_times_the_work() -> None:
    assert scrub.rest_after(scrub.WORK_S / 2) == 0
    for worked_s in (scrub.WORK_S, 1.0):
        assert scrub.rest_after(worked_s) == 3 * worked_s


def test_pace_rests_between_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = rested = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, pause_s: float) -> None:
            self.now += pause_s
            self.rested += pause_s

    clock = Clock()
    monkeypatch.setattr(scrub, "time", clock)
    pace = scrub.Pace()
    for position in range(2000):
        clock.now += 0.002
        pace.step(position, 1000)
    assert clock.now - clock.rested == pytest.approx(4.0)
    assert clock.rested == pytest.approx(6.0, abs=0.2), "it rests until it has caught up"


def test_scratch_database_is_flushed_in_steps(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(child, "FLUSH_STEP", 400)
    path = FileBackend(small(url)).path
    monkeypatch.setattr(
        durable, "flush", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    assert scrub.scrub(path, f"{path}.scratch-scrub-1", PROVE) == {"sound": 20}
    assert len(flushed) >= 5 and set(flushed) == {f"{path}.scratch-scrub-1.sqlite3"}


def test_only_one_check_at_a_time(url: str) -> None:
    path = support.make_backup(url, support.first_changes(3))
    with proof.checking(str(path)):
        assert "Another check of" in support.run_cli("status", "--check", url, check=1).stderr
        support.run_cli("status", url, check=None)
    assert support.run_cli("status", "--check", url, check=None).returncode in (0, 4)
