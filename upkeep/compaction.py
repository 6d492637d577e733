"""Compaction: the same backup with a new snapshot in place of most of its changes.

``Compactor`` runs this file as a process of its own (child.py). That process reads the log
like any reader, replays it into a scratch database beside it, and writes and verifies the
new log. Its messages:

    {"done": bytes, "of": bytes}           how far the replay is
    {"copied": offset, "last": offset, "sound": bool}
                                           ready: the last record taken over, in the old
                                           file and in the new one, and whether SQLite
                                           finds no fault in the new snapshot
    {"nothing": true}                      there is nothing to fold into a snapshot

Then whoever writes the backup copies the few records that came meanwhile and renames
(FileBackend.adopt): the only moment when a change waits. So every record was read and
checked, and all but the last ones replayed: a compaction counts as a check and as a proof.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

import durable
import space
from backend import Ending, Progress, Step, log
from errors import BackupError, ConfigError, Unsound
from filebackend import FileBackend
from filelog import layout2
from filelog.layout2 import Head, Kind
from filelog.reader import LogReader, effective, is_foreign_keys_off
from filelog.writer import SMALL_FLUSH_STEP, LogWriter
from upkeep import child
from upkeep.child import Child, Message
from upkeep.scrub import Scrubber
from wallet import database, restore

REPORT_STEP = 1 << 20
"""Bytes of log between two progress messages."""
CATCH_UP_BYTES = 64 << 10
"""What the writer may be left to copy while a change waits."""
CATCH_UP_ROUNDS = 20
DEFAULT_LEAST = 64 << 20
"""Bytes of changes below which nothing is compacted by itself."""
FIRST_AFTER_S = 60.0
"""Nothing is compacted by itself so soon after a start."""
PAUSE_S = 5.0
AFTER_FAILURE_S = 3600.0
AFTER_CHECK_S = 3600.0
"""No check begins so soon after another, even if that one failed or could not be kept."""
DISK_CHECK_S = 600.0

Entry = tuple[Head, bytes]


class Compactor:
    """Compacts one open FileBackend, one run at a time.

    Args:
        backend: open for writing.
        lock: held by whoever changes the backend.

    Attributes:
        scrubber: checks that backend, but not during a run.
    """

    def __init__(self, backend: FileBackend, lock: threading.Lock) -> None:
        self.scrubber = Scrubber(backend)
        self._backend = backend
        self._lock = lock
        self._running = threading.Lock()

    def run(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """Compact now, in this thread; changes go on meanwhile.

        Args:
            progress: called with bytes done and in all.

        Returns:
            ``{"before": {"backupsize", "version_count"}, "after": {...}}``, sizes in bytes.

        Raises:
            BackupError: another run is going on, or it failed; the old log stays in use.
        """
        if not self._running.acquire(blocking=False):
            raise BackupError("A compaction is running already.", "Wait for it to end.")
        backup_id = self._backend.newest.backup_id
        try:
            before = self._backend.statistics()
            log.info(f"Starting compaction of {before['backupsize']} bytes")
            with self.scrubber.held_off():
                if self._build_and_adopt(backup_id, progress or (lambda done, of: None)):
                    self.scrubber.note_proven(backup_id)
            after = self._backend.statistics()
        except Unsound as error:
            log.error(f"{error} The compaction left the backup as it was.")
            self.scrubber.note(backup_id, unsound=str(error))
            raise
        except BackupError as error:
            log.warning(f"The compaction failed, the backup goes on as it was: {error}")
            raise
        finally:
            self._running.release()
        log.info(f"The compaction left {after['backupsize']} bytes")
        return {"before": before, "after": after}

    def _build_and_adopt(self, backup_id: bytes, progress: Progress) -> bool:
        """Whether all of the log was read and replayed, and is sound."""
        # A new name each time: the process of a killed parent may need a moment to end.
        prefix = f"{self._backend.scratch_prefix}compact-{secrets.token_hex(4)}"
        try:
            with Child("compacting", __file__, self._backend.path, prefix) as process:
                ready = self._follow(process, progress)
                if ready is None:
                    return False
                # The lock goes first: no change waits while the old log is freed.
                with durable.giving_back(self._backend.path), self._lock:
                    if self._backend.newest.backup_id != backup_id:
                        path = self._backend.path
                        raise BackupError(f"Another backup took the place of {path} meanwhile.")
                    self._backend.adopt(f"{prefix}-log", ready["copied"], ready["last"])
                return bool(ready["sound"])
        finally:
            remove_scratch(prefix)

    @staticmethod
    def _follow(process: Child, progress: Progress) -> Message | None:
        for message in process.messages():
            if "copied" in message:
                return message
            if "nothing" in message:
                return None
            progress(message["done"], message["of"])
        raise AssertionError("it says more, or raises")


def parse_least(value: object) -> int | None:
    """What ``"compact"`` in backup.lock and ``--compact`` mean.

    Args:
        value: "off", a number of bytes, or a string such as "256 MiB"; None for the default.

    Returns:
        The bytes of changes from which on the log is compacted by itself, or None: never.

    Raises:
        ConfigError: it is none of these.
    """
    if value is None:
        return DEFAULT_LEAST
    if value == "off":
        return None
    found = re.fullmatch(r"([0-9]{1,15}) ?([kMGT]?)(i?)B?", str(value))
    if found is None or isinstance(value, bool):
        raise ConfigError(f"compact is {value!r}.", 'Use "off" or a size such as "256MiB".')
    base = 1024 if found[3] else 1000
    return int(found[1]) * int(base ** " kMGT".index(found[2] or " "))


class Housekeeper:
    """Compacts and checks when it is time, and warns of a disk that fills up, in its own thread.

    Args:
        least: see parse_least.
        turn: held during a compaction, where several do not compact at once.
    """

    def __init__(
        self,
        backend: FileBackend,
        compactor: Compactor,
        least: int | None,
        turn: threading.Lock | None = None,
    ) -> None:
        self._backend = backend
        self._compactor = compactor
        self._least = least
        self._turn = turn or threading.Lock()
        self._not_before = self._no_check_before = time.monotonic() + FIRST_AFTER_S
        self._next_disk_check = 0.0
        self._stopped = False

    def start(self) -> None:
        """Begin; ends with the process, or after ``stop``."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Begin no more work: the thread ends when it looks next, in PAUSE_S at most."""
        self._stopped = True

    def _run(self) -> None:
        while not self._stopped:
            now = time.monotonic()
            if now >= self._next_disk_check:
                self._next_disk_check = now + DISK_CHECK_S
                self._check_disk()
            if now >= self._not_before and self._is_due():
                with self._turn:
                    self._compact()
            if now >= self._no_check_before and self._compactor.scrubber.run_if_due():
                self._no_check_before = time.monotonic() + AFTER_CHECK_S
            time.sleep(PAUSE_S)

    def _check_disk(self) -> None:
        try:
            size = self._backend.log_size + self._backend.snapshot_size
            for warning in space.disk_warnings(self._backend.path, size):
                log.warning(warning)
        except OSError as error:
            log.warning(f"The disk of {self._backend.path} cannot be looked at: {error}")

    def _is_due(self) -> bool:
        changes, snapshot = self._backend.log_size, self._backend.snapshot_size
        return self._least is not None and changes > max(self._least, snapshot)

    def _compact(self) -> None:
        try:
            needed = space.COMPACTION_FACTOR * (
                self._backend.log_size + self._backend.snapshot_size
            )
            free = shutil.disk_usage(os.path.dirname(self._backend.path)).free
            if free >= needed:
                self._compactor.run()
                return
            log.warning(
                f"{self._backend.path} should be compacted, but of the {needed >> 20} MiB that"
                f" may take only {free >> 20} MiB are free on its disk"
            )
        except BackupError:
            pass  # Compactor has told the log.
        except OSError as error:
            log.warning(f"The disk of {self._backend.path} cannot be looked at: {error}")
        self._not_before = time.monotonic() + AFTER_FAILURE_S


def remove_scratch(prefix: str) -> None:
    """Remove what a run may have left under ``prefix``."""
    durable.discard_gently(f"{prefix}-log")
    for name in ("new", "old"):
        restore.remove_database(f"{prefix}-{name}.sqlite3", durable.discard_gently)


# What follows runs in the process of its own.


def boundary(reader: LogReader) -> Head | None:
    """The last record that a new snapshot may stand for, or None if there is none.

    The newest change stays a record, so that it can be rewound, and a PRAGMA
    foreign_keys = OFF stays together with the change that it is for.
    """
    head, _ = reader.newest()

    def before(head: Head) -> Head | None:
        start = layout2.FIRST_RECORD
        return layout2.find_last(reader.pread, start, head.offset, reader.backup_id)

    if head is not None and head.rewindable:
        while head is not None and head.kind == Kind.OWNER:
            head = before(head)
        head = head and before(head)
    while head is not None and is_foreign_keys_off(head):
        head = before(head)
    if head is None or _ends_snapshot(head, before):
        return None
    is_empty = not head.changes and reader.log_start == layout2.FIRST_RECORD
    return None if is_empty else head


def _ends_snapshot(head: Head, before: Callable[[Head], Head | None]) -> bool:
    """Whether nothing but a snapshot stands up to ``head``, and perhaps whose it is."""
    last: Head | None = head
    if head.kind == Kind.OWNER:
        last = before(head)
    return last is not None and last.kind == Kind.SNAPSHOT


def fold(
    reader: LogReader, entries: Iterator[Entry], last: Head, owners: list[Entry]
) -> Iterator[Step]:
    """A pass over the records up to ``last``; takes no more of ``entries`` than those.

    Args:
        owners: gets the owner records among them.
    """
    reached: Head | None = None

    def up_to_last() -> Iterator[Entry]:
        nonlocal reached
        for reached, payload in entries:
            if reached.kind == Kind.OWNER:
                owners.append((reached, payload))
            yield reached, payload
            if reached.offset == last.offset:
                return

    for head, found in effective(up_to_last()):
        yield Step(found, head.end, last.end)
    damage: BackupError | None = None
    if reached is None or reached.end < last.end:
        damage = reader.damage or BackupError("The log ended before its time.")
    version, end = (reached.version, reached.end) if reached else (0, 0)
    yield Step(Ending(version, damage=damage), end, last.end)


def build(path: str, prefix: str) -> Message:
    """Write the compacted log of ``path`` to ``<prefix>-log``; the last message.

    The scratch database stays, for ``remove_scratch``.
    """
    with contextlib.closing(LogReader(path)) as reader:
        last = boundary(reader)
        if last is None:
            return {"nothing": True}
        entries = iter(reader)
        scratch = f"{prefix}-new.sqlite3"
        owners: list[Entry] = []
        assert reader.log_start is not None
        space.require(scratch, space.COMPACTION_FACTOR * layout2.snapshot_size(reader.log_start))
        with contextlib.suppress(restore.NothingToRestore):
            steps = fold(reader, entries, last, owners)
            restore.build(steps, scratch, False, reporter(scratch))
        if not os.path.getsize(scratch):  # PRAGMA calls alone: a snapshot has at least a page.
            return {"nothing": True}
        is_sound = check_sound(scratch, path, prefix)
        assert reader.backup_id is not None
        size = os.path.getsize(scratch)
        space.require(scratch, size)
        writer = LogWriter(f"{prefix}-log", reader.backup_id, size, SMALL_FLUSH_STEP, like=path)
        with contextlib.closing(writer), contextlib.closing(LogReader(writer.path)) as verifier:
            writer.add_snapshot(scratch, last)
            if owners:
                head, payload = owners[-1]
                writer.add_owner(layout2.session_behind(last, head, payload), payload)
            return {**catch_up(reader, entries, writer, verifier), "sound": is_sound}


def reporter(scratch: str) -> Progress:
    """A callback that says how far the replay into ``scratch`` is, and flushes that file."""
    said = 0
    flush = child.flushing(scratch)

    def report(done: int, of: int) -> None:
        nonlocal said
        space.require(scratch)
        if done >= said + REPORT_STEP:
            said = done
            child.say({"done": done, "of": of})
        flush(done, of)

    return report


def check_sound(scratch: str, path: str, prefix: str) -> bool:
    """Whether integrity_check is content with a new snapshot.

    Raises:
        Unsound: it is not, and it was with the old one.
    """
    problems = database.integrity_problems(scratch)
    if not problems:
        return True
    old = f"{prefix}-old.sqlite3"
    reader = LogReader(path)
    space.require(old, layout2.snapshot_size(reader.log_start or layout2.FIRST_RECORD))
    pieces = itertools.takewhile(lambda entry: entry[0].kind == Kind.SNAPSHOT, reader)
    with open(durable.create(old), "wb") as file:
        for _, piece in pieces:
            file.write(piece)
    reader.close()
    if not os.path.getsize(old) or not database.integrity_problems(old):
        raise Unsound(f"The new snapshot would not be sound: {problems[0]}.")
    return False


def catch_up(
    reader: LogReader, entries: Iterator[Entry], writer: LogWriter, verifier: LogReader
) -> Message:
    """Copy what the snapshot does not stand for, verify all of it; the last message."""
    copied = None
    for _ in range(CATCH_UP_ROUNDS):
        began = writer.last.end
        for head, payload in entries:
            writer.add(head, payload)
        writer.finish()
        for _ in verifier:
            pass
        damage = reader.damage or verifier.damage
        if damage is not None:
            raise damage
        entries = iter(reader)
        if copied is not None and writer.last.end - began < CATCH_UP_BYTES:
            break
        copied = writer.last.end
    assert reader.last is not None and verifier.last is not None
    if (verifier.last.chain, verifier.last.end) != (reader.last.chain, writer.last.end):
        raise BackupError("The new log does not stand for the same history.")
    return {"copied": reader.last.offset, "last": writer.last.offset}


def main(path: str, prefix: str) -> None:
    """Build the compacted log, and say what became of it."""
    child.run(path, prefix, lambda: build(path, prefix))


if __name__ == "__main__":
    main(*sys.argv[1:])
