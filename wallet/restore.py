"""Building a node's database from a backup: beside its destination, then renamed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import durable
import scratch
import space
from backend import Change, Reading
from errors import BackupError, BackupExists, ConfigError, DatabaseError, DiskError
from wallet import confined, database, node


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore delivered.

    Attributes:
        path: the database.
        version: its data_version.
        changes: how many changes were replayed.
        last_change_ns: Unix time of the last change, nanoseconds, or None.
        torn_tail: an append that was never acknowledged was left out.
        damage: what ended the backup early, or None.
        problems: what SQLite's checks found, empty if nothing.
    """

    path: str
    version: int
    changes: int
    last_change_ns: int | None
    torn_tail: bool
    damage: Exception | None
    problems: list[str]


class NothingToRestore(BackupError):
    """The backup is empty."""

    def __init__(self) -> None:
        super().__init__("The backup holds no change yet: there is nothing to restore.")


class VersionNotHeld(BackupError):
    """The backup never was at the version that was asked for."""

    def __init__(self, version: int, held: str) -> None:
        super().__init__(f"The backup has no version {version}: {held}.")


class UpTo(Reading):
    """The part of ``reading`` that leads to ``version``, whatever stands behind it.

    Iterating it raises VersionNotHeld, or the damage before that version.
    """

    def __init__(self, reading: Reading, version: int) -> None:
        self._reading = reading
        self.version = version
        self.total = reading.total
        self.snapshot_size = reading.snapshot_size

    def __iter__(self) -> Iterator[Change]:
        first: int | None = None
        last: Change | None = None
        for change in self._reading:
            self.position = self._reading.position
            is_snapshot = change.snapshot is not None
            if is_snapshot and change.version > self.version:
                if last is None or last.snapshot is not None:
                    raise VersionNotHeld(self.version, f"it begins with version {change.version}")
                break
            # A PRAGMA call at this version is for what comes next.
            if not is_snapshot and change.base >= self.version:
                break
            first = change.version if first is None or is_snapshot else first
            yield change
            last = change
        else:
            damage = self._reading.damage
            # A snapshot may not be complete.
            if damage and (
                last is None or last.snapshot is not None or last.version < self.version
            ):
                raise damage
        if last is None or last.version != self.version:
            held = f"it holds versions {first} to {last.version}" if last else "it begins later"
            raise VersionNotHeld(self.version, held)

    def close(self) -> None:
        """See Reading."""
        self._reading.close()


def destination(dest: str) -> str:
    """The file that a restore to ``dest`` creates; refuses what is in the way.

    Args:
        dest: a file that is not there, or an existing directory.
    """
    if os.path.isdir(dest):
        dest = os.path.join(dest, node.DATABASE_NAME)
    elif not os.path.lexists(dest) and _is_named_like_directory(dest):
        # ~/.lightning/bitcoin before its mkdir, say: no database is to have that name.
        raise ConfigError(
            f"There is no directory {dest}.", f"Run `mkdir -p {shlex.quote(dest)}` first."
        )
    path = os.path.realpath(dest)
    if not os.path.isdir(os.path.dirname(path)):
        raise ConfigError(f"The directory {os.path.dirname(path)} does not exist.", "Create it.")
    for taken in (path, *(path + suffix for suffix in database.SIDE_FILES)):
        if os.path.lexists(taken):
            # SQLite would apply a journal found beside the new database to it.
            raise BackupExists(taken, "Move it away, with its -wal and -journal files.")
    return path


def _is_named_like_directory(dest: str) -> bool:
    base, name = os.path.split(dest)
    is_network = name in node.NETWORKS or os.path.basename(base) == ".lightning"
    return not name or name.startswith(".") or is_network


def build(
    reading: Reading,
    beside: str,
    allow_damaged: bool,
    progress: Callable[[], None],
    up_to: int | None = None,
) -> tuple[int, int]:
    """Write the database that ``reading`` leads to into the new file ``beside``.

    After an error that file is garbage. What stands before a change that does not replay takes
    another pass, up to its base.

    Args:
        allow_damaged: deliver what stands before damage, too.
        progress: called after every change.
        up_to: stop at this data_version.

    Returns:
        The data_version reached, and the number of changes replayed.

    Raises:
        DoesNotReplay: a change cannot be executed.
        VersionNotHeld: the backup never was at ``up_to``.
        BackupError: damage, another data_version than the backup's, or a backup that holds
            nothing.
    """
    if up_to is not None:
        reading = UpTo(reading, up_to)
    replayer: database.Replayer | None = None
    changes = pieces = 0
    fd = durable.create(beside)
    try:
        for change in reading:
            if change.snapshot is not None:
                if not change.snapshot:
                    if replayer is not None:
                        replayer.close()
                        replayer = None
                    os.ftruncate(fd, 0)
                    changes = pieces = 0
                    continue
                durable.write_all(fd, change.snapshot, os.lseek(fd, 0, os.SEEK_END))
                pieces += 1
            else:
                replayer = replayer or database.Replayer(beside)
                replayer.apply(change)
                changes += 1
            progress()
        if reading.damage is not None and not (allow_damaged and changes + pieces):
            raise reading.damage
        if not changes + pieces:
            raise NothingToRestore
        version = replayer.finish() if replayer else database.version_of(beside)
        replayer = None
        if version != reading.version:
            raise DatabaseError(
                beside,
                f"its data_version is {version}, but the backup's is {reading.version}",
                "Do not use this backup before that is understood.",
            )
        durable.flush(fd)
    finally:
        os.close(fd)
        if replayer is not None:
            replayer.close()
    return version, changes


def restore(
    reading: Reading,
    dest: str,
    allow_damaged: bool,
    progress: Callable[[], None],
    up_to: int | None = None,
) -> Restored:
    """Restore to ``dest`` (see destination), which is complete once it has its name.

    Raises:
        BackupError: as build does, or the destination is taken or cannot be written.
    """
    path = destination(dest)
    if up_to is not None:
        reading = UpTo(reading, up_to)
    remove_database(f"{path}.restoring")  # As release 1.0 called it.
    with scratch.held(f"{path}.restoring-") as prefix:
        beside = f"{prefix}.sqlite3"
        try:
            with confined.ending_on_signals(lambda: scratch.remove(prefix)):
                version, changes = build(reading, beside, allow_damaged, progress)
                problems = database.check(beside)
            durable.publish(beside, path)
        except FileExistsError as error:
            raise BackupExists(path, "It appeared while the restore ran.") from error
        except OSError as error:
            raise DiskError(beside, error, "write") from error
    return Restored(
        path,
        version,
        changes,
        reading.last_change_ns,
        reading.torn_tail,
        reading.damage,
        problems,
    )


def verify(
    reading: Reading,
    prefix: str,
    against: str | None,
    progress: Callable[[], None],
    up_to: int | None = None,
) -> tuple[int, list[str]]:
    """Replay the backup into a scratch database and check it.

    Args:
        prefix: how the names of the scratch files begin (see scratch.held).
        against: a stopped node's database that must be the same, or None.
        up_to: compare at this data_version only, without SQLite's own checks.

    Returns:
        The version reached, and every problem found, in words.

    Raises:
        BackupError: the backup is damaged or does not replay.
    """
    path, copy = f"{prefix}.sqlite3", f"{prefix}.against"

    def leave_room(needed: int = 0) -> None:
        space.require(path, needed, "Or do it on another disk: add --scratch DIR.")

    def report() -> None:
        leave_room()
        progress()

    try:
        needed = database.size_with_side_files(against) if against is not None else 0
        leave_room(reading.snapshot_size + needed)
        with confined.ending_on_signals(lambda: scratch.remove(prefix)):
            version, _ = build(reading, path, False, report, up_to)
            problems = database.check(path) if up_to is None else []
            if against is not None:
                leave_room(needed)
                database.copy_files(against, copy)
                problems += _compare(path, version, copy)
        return version, problems
    except OSError as error:
        raise DiskError(path, error, "write") from error
    finally:
        remove_database(path)
        remove_database(copy)


def _compare(backup: str, version: int, node_database: str) -> list[str]:
    ids = database.node_id_of(backup), database.node_id_of(node_database)
    if None not in ids and ids[0] != ids[1]:
        return ["the backup is of node {}, the database of node {}".format(*ids)]
    found = database.version_of(node_database)
    problems = []
    if found != version:
        problems.append(f"the backup is at version {version}, the database at version {found}")
    return problems + database.compare(backup, node_database, "the backup", "the database")


def remove_database(path: str, remove: Callable[[str], None] = durable.discard) -> None:
    """Remove a scratch database and what SQLite may have left beside it.

    Args:
        remove: durable.remove where a file that stays would do harm.
    """
    for name in (path, *(path + suffix for suffix in database.SIDE_FILES)):
        remove(name)
