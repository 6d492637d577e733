"""Building a node's database from a backup: beside its destination, then renamed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass

import database
import durable
import node
import scratch
import space
from backend import Reading
from errors import BackupError, BackupExists, ConfigError, DatabaseError, DiskError


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


def destination(dest: str) -> str:
    """The file that a restore to ``dest`` creates; refuses what is in the way.

    Args:
        dest: a file, whose name has a suffix, or an existing directory.
    """
    if os.path.isdir(dest):
        dest = os.path.join(dest, node.DATABASE_NAME)
    elif not os.path.splitext(os.path.basename(dest))[1] and not os.path.lexists(dest):
        # ~/.lightning/bitcoin before its mkdir, say: no database is to have that name.
        named = shlex.quote(f"{dest.rstrip('/')}.sqlite3")
        raise ConfigError(
            f"There is no directory {dest}.",
            f"If it should be one, run `mkdir -p {shlex.quote(dest)}` first. For a file, give"
            f" its name a suffix: {named}.",
        )
    path = os.path.realpath(dest)
    if not os.path.isdir(os.path.dirname(path)):
        raise ConfigError(f"The directory {os.path.dirname(path)} does not exist.", "Create it.")
    for taken in (path, *(path + suffix for suffix in database.SIDE_FILES)):
        if os.path.lexists(taken):
            # SQLite would apply a journal found beside the new database to it.
            raise BackupExists(taken, "Move it away, with its -wal and -journal files.")
    return path


def build(
    reading: Reading, beside: str, allow_damaged: bool, progress: Callable[[], None]
) -> tuple[int, int]:
    """Write the database that ``reading`` leads to into the new file ``beside``.

    Args:
        allow_damaged: deliver what stands before damage, too.
        progress: called after every change.

    Returns:
        The data_version reached, and the number of changes replayed.

    Raises:
        BackupError: damage, a change that does not replay, another data_version than the
            backup's, or a backup that holds nothing.
    """
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
    reading: Reading, dest: str, allow_damaged: bool, progress: Callable[[], None]
) -> Restored:
    """Restore to ``dest`` (see destination), which is complete once it has its name.

    Raises:
        BackupError: as build does, or the destination is taken or cannot be written.
    """
    path = destination(dest)
    remove_database(f"{path}.restoring")  # As release 1.0 called it.
    with scratch.held(f"{path}.restoring-") as prefix:
        beside = f"{prefix}.sqlite3"
        try:
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
    reading: Reading, scratch: str, against: str | None, progress: Callable[[], None]
) -> tuple[int, list[str]]:
    """Replay the whole backup into the scratch database ``scratch`` and check it.

    Args:
        against: a stopped node's database that must be the same, or None.

    Returns:
        The version reached, and every problem found, in words.

    Raises:
        BackupError: the backup is damaged or does not replay.
    """
    copy = f"{scratch}.against"

    def leave_room(needed: int = 0) -> None:
        space.require(scratch, needed, "Or verify on another disk: add --scratch DIR.")

    def report() -> None:
        leave_room()
        progress()

    try:
        needed = database.size_with_side_files(against) if against is not None else 0
        leave_room(reading.snapshot_size + needed)
        version, _ = build(reading, scratch, False, report)
        problems = database.check(scratch)
        if against is not None:
            leave_room(needed)
            database.copy_files(against, copy)
            problems += _compare(scratch, version, copy)
        return version, problems
    except OSError as error:
        raise DiskError(scratch, error, "write") from error
    finally:
        remove_database(scratch)
        remove_database(copy)


def _compare(backup: str, version: int, node_database: str) -> list[str]:
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
