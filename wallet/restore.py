"""Building a node's database from a backup: beside its destination, then renamed."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import durable
import scratch
import space
from backend import Beginning, Ending, Progress, Step
from errors import BackupError, BackupExists, ConfigError, DatabaseError, DiskError
from wallet import confined, database, node


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore delivered.

    Attributes:
        path: the database; its data_version is the ending's.
        ending: how the pass over the backup went.
        changes: how many changes were replayed.
        problems: what SQLite's checks found, empty if nothing.
    """

    path: str
    ending: Ending
    changes: int
    problems: list[str]


class NothingToRestore(BackupError):
    """The backup is empty."""

    def __init__(self) -> None:
        super().__init__("The backup holds no change yet: there is nothing to restore.")


class VersionNotHeld(BackupError):
    """The backup never was at the version that was asked for."""

    def __init__(self, version: int, held: str) -> None:
        super().__init__(f"The backup has no version {version}: {held}.")


def _leading_to(steps: Iterable[Step], version: int) -> Iterator[Step]:
    """The part of a pass that leads to ``version``, whatever stands behind it.

    Raises:
        VersionNotHeld: the backup never was at it.
        BackupError: the damage before it.
    """
    first: int | None = None
    reached: int | None = None
    is_whole = False  # A snapshot may not be complete.
    notes: tuple[str, ...] = ()
    position = total = 0
    for step in steps:
        found, position, total = step
        if isinstance(found, Ending):
            notes = found.notes
            if found.damage and (not is_whole or reached is None or reached < version):
                raise found.damage
            break
        if isinstance(found, Beginning):
            if found.version > version:
                if not is_whole:
                    raise VersionNotHeld(version, f"it begins with version {found.version}")
                break
            first, is_whole = found.version, False
        elif found.snapshot is None:
            # A PRAGMA call at this version is for what comes next.
            if found.base >= version:
                break
            first = found.version if first is None else first
            is_whole = True
        reached = found.version
        yield step
    if reached != version:
        held = "it begins later" if reached is None else f"it holds versions {first} to {reached}"
        raise VersionNotHeld(version, held)
    yield Step(Ending(version, notes=notes), position, total)


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
    database.require_none(path, lambda: _out_of_the_way(path))
    return path


def _out_of_the_way(path: str) -> str:
    """What to do about a database at ``path``, which may be that of a node that runs."""
    try:
        with node.stopped(os.path.dirname(path), path):
            return "Move it away, with its -wal and -journal files."
    except BackupError as error:
        return f"Leave it where it is: {error.problem} For a look at the backup name a new file."


def _is_named_like_directory(dest: str) -> bool:
    base, name = os.path.split(dest)
    is_network = name in node.NETWORKS or os.path.basename(base) == ".lightning"
    return not name or name.startswith(".") or is_network


def build(
    steps: Iterable[Step],
    beside: str,
    allow_damaged: bool,
    progress: Progress,
    up_to: int | None = None,
) -> tuple[Ending, int]:
    """Write the database that a pass over a backup leads to into the new file ``beside``.

    After an error that file is garbage. What stands before a change that does not replay takes
    another pass, up to its base.

    Args:
        allow_damaged: deliver what stands before damage, too.
        progress: called after every step with bytes read, and in all.
        up_to: stop at this data_version.

    Returns:
        The pass's ending, of the data_version reached, and the number of changes replayed.

    Raises:
        DoesNotReplay: a change cannot be executed.
        VersionNotHeld: the backup never was at ``up_to``.
        BackupError: damage, another data_version than the backup's, or a backup that holds
            nothing.
    """
    if up_to is not None:
        steps = _leading_to(steps, up_to)
    ending: Ending | None = None
    replayer: database.Replayer | None = None
    changes = pieces = 0
    fd = durable.create(beside)
    try:
        for found, position, total in steps:
            if isinstance(found, Ending):
                ending = found
            elif isinstance(found, Beginning):
                if replayer is not None:
                    replayer.close()
                    replayer = None
                os.ftruncate(fd, 0)
                changes = pieces = 0
            elif found.snapshot is not None:
                durable.write_all(fd, found.snapshot, os.lseek(fd, 0, os.SEEK_END))
                pieces += 1
            else:
                replayer = replayer or database.Replayer(beside)
                replayer.apply(found)
                changes += 1
            progress(position, total)
        assert ending is not None, "a pass ends in one"
        if ending.damage is not None and not (allow_damaged and changes + pieces):
            raise ending.damage
        if not changes + pieces:
            raise NothingToRestore
        version = replayer.finish() if replayer else database.version_of(beside)
        replayer = None
        if version != ending.version:
            raise DatabaseError(
                beside,
                f"its data_version is {version}, but the backup's is {ending.version}",
                "Do not use this backup before that is understood.",
            )
        durable.flush(fd)
    finally:
        os.close(fd)
        if replayer is not None:
            replayer.close()
    return ending, changes


def restore(
    steps: Iterable[Step],
    dest: str,
    allow_damaged: bool,
    progress: Progress,
    up_to: int | None = None,
) -> Restored:
    """Restore to ``dest`` (see destination), which is complete once it has its name.

    Args: as build has them.

    Raises:
        BackupError: as build does, or the destination is taken or cannot be written.
    """
    path = destination(dest)
    remove_database(f"{path}.restoring")  # As release 1.0 called it.
    with scratch.held(f"{path}.restoring-") as prefix:
        beside = f"{prefix}.sqlite3"
        try:
            with confined.ending_on_signals(lambda: scratch.remove(prefix)):
                ending, changes = build(steps, beside, allow_damaged, progress, up_to)
                problems = database.check(beside)
            durable.publish(beside, path)
        except FileExistsError as error:
            raise BackupExists(path, "It appeared while the restore ran.") from error
        except OSError as error:
            raise DiskError(beside, error, "write") from error
    return Restored(path, ending, changes, problems)


def verify(
    steps: Iterable[Step],
    prefix: str,
    against: str | None,
    progress: Progress,
    up_to: int | None = None,
) -> tuple[Ending, list[str]]:
    """Replay the backup into a scratch database and check it.

    Args:
        prefix: how the names of the scratch files begin (see scratch.held).
        against: a stopped node's database that must be the same, or None.
        progress: called after every step with bytes read, and in all.
        up_to: compare at this data_version only, without SQLite's own checks.

    Returns:
        The pass's ending, of the version reached, and every problem found, in words.

    Raises:
        BackupError: the backup is damaged or does not replay.
    """
    path, copy = f"{prefix}.sqlite3", f"{prefix}.against"

    try:
        needed = database.size_with_side_files(against) if against is not None else 0
        _leave_room(path, needed)
        with confined.ending_on_signals(lambda: scratch.remove(prefix)):
            ending, _ = build(_in_room(steps, path, needed), path, False, progress, up_to)
            problems = database.check(path) if up_to is None else []
            if against is not None:
                _leave_room(path, needed)
                database.copy_files(against, copy)
                problems += _compare(path, ending.version, copy)
        return ending, problems
    except OSError as error:
        raise DiskError(path, error, "write") from error
    finally:
        remove_database(path)
        remove_database(copy)


@contextlib.contextmanager
def rebuilt(
    steps: Iterable[Step], prefix: str, progress: Progress, up_to: int | None = None
) -> Iterator[tuple[str, Ending]]:
    """A scratch database of what the backup leads to, or of what stands before damage.

    Args:
        prefix: how the names of the scratch files begin (see scratch.held).
        progress: called after every step with bytes read, and in all.
        up_to: stop at this data_version.

    Yields:
        The database, which is removed at the end, and how the pass went.

    Raises:
        DoesNotReplay: a change cannot be executed; up to its base there is something.
        BackupError: there is nothing, or no room for it.
    """
    path = f"{prefix}.sqlite3"
    try:
        _leave_room(path)
        with confined.ending_on_signals(lambda: scratch.remove(prefix)):
            ending, _ = build(_in_room(steps, path), path, True, progress, up_to)
            yield path, ending
    except OSError as error:
        raise DiskError(path, error, "write") from error
    finally:
        remove_database(path)


def _in_room(steps: Iterable[Step], path: str, besides: int = 0) -> Iterator[Step]:
    """The same steps, as long as ``path``'s disk has room, for snapshots before they come."""
    for step in steps:
        size = step.found.size if isinstance(step.found, Beginning) else None
        _leave_room(path, 0 if size is None else size + besides)
        yield step


def _leave_room(path: str, needed: int = 0) -> None:
    space.require(path, needed, "Or do it on another disk: add --scratch DIR.")


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
    for name in database.files_of(path):
        remove(name)
