"""Commands that make a backup, or say whose it is: init, resync, upgrade, attach, move."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import click

import destinations
import scratch as scratching
from backend import (
    NOBODY,
    TAG_SIZE,
    Backend,
    Destination,
    Snapshot,
    Status,
    new_owner,
    outcome,
)
from commands.shared import (
    acks_option,
    at_hand,
    directory_option,
    in_place_of_the_former,
    in_words,
    main,
    node_database,
    node_snapshot,
    progress_bar,
    readable,
    scratch_option,
    scratch_prefix,
    to_note,
    wallet_option,
    with_destinations,
)
from decisions import Obstacle, may_attach, may_replace, may_resync, may_upgrade
from errors import (
    CLI,
    PLUGIN,
    BackupError,
    ConfigError,
    LostState,
    OtherOwner,
    OutOfDate,
    UnsupportedLayout,
)
from quorum import Roster, Rule
from several import joining
from upkeep import upgrade as upgrading
from wallet import database, node
from wallet import restore as restoring

NOTHING: Mapping[str, Any] = MappingProxyType({})


@main.command()
@click.option(
    "--lightning-dir",
    metavar="DIR",
    help="The node's network directory, such as ~/.lightning/bitcoin. Without it: the current"
    " directory if it is one, else an empty backup is made, for a server.",
)
@wallet_option
@acks_option
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
def init(
    lightning_dir: str | None, wallet: str | None, acks: int | None, urls: tuple[str, ...]
) -> None:
    """Create a backup at URL for a stopped node, and its backup.lock.

    If the node has a database, the backup starts with a snapshot of it. With several URLs each
    of them gets it, and --acks says how many must have stored a change before the node goes on.

    \b
    Examples:
        backup-cli init --lightning-dir ~/.lightning/bitcoin file:///mnt/disk2/node.bkp
        backup-cli init file:///srv/node.bkp          (an empty one, for a server)
        backup-cli init --lightning-dir DIR --acks 1 file:///mnt/disk2/node.bkp socket:host:8700
    """
    backend = destinations.destination_for(urls, acks)
    if lightning_dir is None and node.is_network_dir(os.getcwd()):
        lightning_dir = os.getcwd()
    if lightning_dir is None:
        return _init_for_server(urls)
    directory = node.network_dir(lightning_dir)
    wallet_path = node_database(directory, wallet)
    lock_path = os.path.join(directory, node.LOCK_NAME)
    with node.stopped(directory, wallet_path):
        if os.path.lexists(lock_path):
            raise ConfigError(
                f"{lock_path} exists already: this node has a backup.",
                "To point the node at another existing backup, use `attach`; to start over,"
                " move backup.lock away.",
            )
        backend.home = directory
        for place in backend.directories:
            _check_owner_can_write(directory, place)
        backend.require_absent()
        with node_snapshot(backend, directory, wallet_path) as snapshot:
            if snapshot is not None:
                click.echo(f"Found an existing database at {wallet_path}")
            # First the small file that is easily taken back: a server's backup is not. It gets
            # its name last: a node finds no backup.lock without a backup.
            owner = new_owner() if backend.keeps_owner else NOBODY
            lock_file = node.LockFile(urls[0], owner=owner)
            lock_file = dataclasses.replace(lock_file, **to_note(directory, wallet_path))
            with node.new_lock_file(directory, with_destinations(lock_file, urls, acks)):
                backend.create(snapshot, owner)
            stored = readable(os.path.getsize(snapshot.path)) if snapshot else "nothing yet"
    if snapshot is not None:
        click.echo(f"Successfully written initial snapshot to {backend.url}")
    _report_init(backend, shlex.join(urls), directory, wallet_path, stored, snapshot)
    _report_rule(urls, acks)


def _report_rule(urls: Sequence[str], acks: int | None) -> None:
    """What several destinations are good for."""
    if len(urls) == 1:
        return
    rule = Rule(len(urls), acks or len(urls))
    click.echo(f"{in_words(rule)}.")
    if rule.may_split:
        click.echo(
            f"Warning: {rule.k} of {rule.n} is no majority: two nodes that cannot see each other"
            " could each find enough destinations.",
            err=True,
        )


def _check_owner_can_write(directory: str, place: str) -> None:
    """As root: refuse a ``place`` where the owner of ``directory``, as the node, cannot write."""
    found = os.stat(directory)
    if os.geteuid() != 0 or found.st_uid == 0 or not os.path.isdir(place):
        return
    name, groups = str(found.st_uid), [found.st_gid]
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(found.st_uid).pw_name
        groups = os.getgrouplist(name, found.st_gid)
    command = ["test", "-w", place, "-a", "-x", place]
    user = {"user": found.st_uid, "group": found.st_gid, "extra_groups": groups}
    if subprocess.run(command, cwd="/", **user).returncode == 0:  # type: ignore[call-overload]
        return
    raise ConfigError(
        f"User {name}, who owns {directory}, cannot write in {place}: the plugin has to.",
        f"Run `chown {name} {shlex.quote(place)}`, or make a directory of that user there.",
    )


def _init_for_server(urls: Sequence[str]) -> None:
    if len(urls) > 1:
        raise click.UsageError("Several destinations are of a node: add --lightning-dir DIR.")
    url = urls[0]
    backend = destinations.backend_for(url)
    if not backend.can_be_served:
        raise ConfigError(
            f"A backup at {url} is of a node, and no node's directory is given.",
            "Add --lightning-dir DIR.",
        )
    backend.create(None)
    click.echo(f"Created an empty backup at {url}")
    click.echo(f"To serve it: {CLI} server {shlex.quote(url)} unix:/run/node-backup/server.sock")
    click.echo("For a node on this machine, run init with --lightning-dir DIR in place of this.")


def _report_init(
    backend: Backend,
    url: str,
    directory: str,
    wallet: str,
    stored: str,
    snapshot: Snapshot | None,
) -> None:
    click.echo(f"Stored: {stored}, data_version {snapshot.version if snapshot else 0}")
    click.echo(f"Add to lightningd's config: important-plugin={PLUGIN}")
    click.echo(f"This will restore it: {CLI} restore {url} {shlex.quote(wallet)}")
    click.echo(
        f"Keep a copy of {os.path.join(directory, 'hsm_secret')} elsewhere, once: it is not"
        " part of this backup, and without it a restored database is useless."
    )
    disks = [os.stat(place).st_dev for place in backend.directories]
    if os.stat(directory).st_dev in disks:
        click.echo(
            "Warning: the backup is on the same disk as the node. It will not survive the"
            " loss of that disk.",
            err=True,
        )


@main.command()
@directory_option
@wallet_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--override", is_flag=True, help="Also if somebody else has written to the backup.")
def resync(lightning_dir: str, wallet: str | None, yes: bool, override: bool) -> None:
    """Bring an outdated or damaged backup up to date with a fresh snapshot.

    The node must be stopped. The old backup is kept under another name.

    \b
    Example:
        backup-cli resync --lightning-dir ~/.lightning/bitcoin
    """
    directory = node.network_dir(lightning_dir)
    wallet_path = node_database(directory, wallet)
    with node.stopped(directory, wallet_path):
        lock_file = node.read_lock_file(directory)
        backend = destinations.destination_of(lock_file)
        url = backend.url
        claimed = None if override else lock_file.owner
        if lock_file.backend_urls:
            version = _version_of_all(lock_file.backend_urls, claimed)
        else:
            version = _version_reached(backend, claimed)
        with node_snapshot(backend, directory, wallet_path) as snapshot:
            found = snapshot.version if snapshot else 0
            _check_resync(found, version, backend, override)
            assert snapshot is not None
            click.echo(f"The node is at version {found}, the backup at version {version}.")
            if lock_file.lost_state is not None:
                click.echo(f"The node seemed to have lost some state: {lock_file.lost_state}.")
            if not yes:
                click.confirm("Replace the backup by a snapshot of the node?", abort=True)
            with _new_owner(backend, directory, lock_file, keep=not override) as owner:
                kept = backend.replace(snapshot, owner, override=override)
                noted = dataclasses.replace(lock_file, **to_note(directory, wallet_path))
                if noted != lock_file:
                    noted = dataclasses.replace(noted, owner=owner)
                    node.write_lock_file(directory, noted, replace=True)
    click.echo(f"The backup {url} is now at version {found}.")
    if kept is not None:
        click.echo(f"The old one is kept: {kept}")


@main.command()
@click.option(
    "--lightning-dir", metavar="DIR", help="The node's network directory, for a node's backup."
)
@wallet_option
@click.argument("file_url", required=False)
def upgrade(lightning_dir: str | None, wallet: str | None, file_url: str | None) -> None:
    """Take over a backup of the earlier plugin (file layout 1).

    On a node, which must be stopped, the new file starts with a snapshot of its database, or
    if that is lost, is built from the old file. For a server's file, name the file. The old
    file is kept under another name.

    \b
    Examples:
        backup-cli upgrade --lightning-dir ~/.lightning/bitcoin
        backup-cli upgrade file:///srv/node.bkp          (a server's file)
    """
    if (lightning_dir is None) == (file_url is None):
        raise click.UsageError("Give either --lightning-dir DIR or the URL of a server's file.")
    if lightning_dir is None:
        assert file_url is not None
        return _upgrade(destinations.backend_for(file_url), None, None, "")
    directory = node.network_dir(lightning_dir)
    wallet_path = node_database(directory, wallet)
    with node.stopped(directory, wallet_path):
        lock_file = node.read_lock_file(directory)
        backend = destinations.destination_of(lock_file)
        _upgrade(backend, lock_file, wallet_path, directory)


@contextlib.contextmanager
def _new_owner(
    backend: Backend, directory: str, lock_file: node.LockFile, keep: bool
) -> Iterator[bytes]:
    """The owner for a new backup, in backup.lock as soon as it is needed there.

    Args:
        keep: whether the owner that backup.lock names stays.
    """
    if keep and lock_file.owner != NOBODY:
        yield lock_file.owner
        return
    owner = new_owner() if backend.keeps_owner else NOBODY
    # First, so that a command that was killed can be typed again.
    node.write_lock_file(directory, dataclasses.replace(lock_file, owner=owner), replace=True)
    try:
        yield owner
    except BaseException:
        if not _may_be_owned(backend, owner):
            node.write_lock_file(directory, lock_file, replace=True)
        raise


def _may_be_owned(backend: Backend, owner: bytes) -> bool:
    """Whether ``owner`` may have got the backup before a command failed: an answer may be lost."""
    try:
        return backend.status().owner == owner[:TAG_SIZE].hex()
    except BackupError:
        return True


def _upgrade(
    backend: Destination, lock_file: node.LockFile | None, wallet: str | None, directory: str
) -> None:
    is_old = backend.is_old()
    found = backend.status()
    if not is_old:
        click.echo(f"{backend.url} is of {found.layout} already: there is nothing to do.")
        return
    claim = contextlib.nullcontext(NOBODY)
    with _new_owner(backend, directory, lock_file, keep=True) if lock_file else claim as owner:
        if wallet is not None and os.path.exists(wallet) and os.path.getsize(wallet):
            kept = _upgrade_from_node(backend, owner, found, wallet, directory)
        else:
            with progress_bar("Replaying the old backup", 0) as advance:
                kept = backend.rebuild(owner, advance)
    for note in found.notes:
        click.echo(note)
    click.echo(f"{backend.url} is upgraded, at version {backend.status().version}.")
    click.echo(f"The old one is kept: {kept}")


def _upgrade_from_node(
    backend: Backend, owner: bytes, found: Status, wallet: str, directory: str
) -> str | None:
    with node_snapshot(backend, directory, wallet) as snapshot:
        assert snapshot is not None
        rewindable, named = found.prev_version is not None, backend.named_version()
        obstacle = may_upgrade(snapshot.version, found.version, rewindable, named)
        if obstacle is Obstacle.LOST_STATE:
            raise LostState(found.version, snapshot.version, backend.url)
        if obstacle is not None:
            raise BackupError(
                f"The backup is damaged: it is good up to version {found.version}, and its header"
                f" names version {named}. The node's database is at version {snapshot.version}, so"
                " it may be an old copy.",
                "Only if you know that it is the node's latest state, run"
                f" `{CLI} resync --lightning-dir {shlex.quote(directory)}`.",
            )
        return backend.replace(snapshot, owner)


def _version_of_all(urls: Sequence[str], owner: bytes | None) -> int:
    """The newest version that any of several destinations has reached, also behind damage.

    Those that do not answer are announced: enough of them have to be replaced.
    """
    versions = [0]
    for url in urls:
        try:
            versions.append(_version_reached(destinations.backend_for(url), owner))
        except OtherOwner:
            raise
        except BackupError as error:
            click.echo(f"Warning: {url}: {error.problem}", err=True)
    return max(versions)


def _version_reached(backend: Backend, owner: bytes | None) -> int:
    """The version of the backup, also where it stands behind damage, which is announced.

    Args:
        owner: whose it must be, if it is not nobody's; None: anybody's.
    """
    status = backend.status()
    found = None if status.owner is None else bytes.fromhex(status.owner)
    if not may_replace(found, owner) or not (backend.keeps_owner or owner in (None, NOBODY)):
        with contextlib.closing(backend):
            backend.open(owner)  # It knows who took it over.
    if not status.damage:
        return status.version
    with contextlib.closing(backend.read()) as reading:
        damage = outcome(reading).damage
    click.echo(f"Warning: {damage.problem if damage else status.damage}", err=True)
    return max(status.version, getattr(damage, "newest", None) or 0)


def _check_resync(node_version: int, backup_version: int, backend: Backend, override: bool) -> None:
    obstacle = may_resync(node_version, backup_version)
    if obstacle is None:
        return
    if override and obstacle is not Obstacle.NO_DATABASE:
        click.echo(
            "Warning: the backup is ahead. Only if somebody else wrote to it is the node's database"
            " the right one: if that is an old copy, the node must never run on it.",
            err=True,
        )
        return
    if obstacle is Obstacle.NO_DATABASE:
        raise ConfigError(
            "The node has no database, or an empty one: there is nothing to take a snapshot of.",
            "If it is elsewhere, add --wallet. If it was lost, run"
            f" `{CLI} restore {shlex.quote(backend.url)} DEST`.",
        )
    refusal = LostState(backup_version, node_version, backend.url, backend.last_writer)
    if obstacle is Obstacle.ONE_BEHIND:
        refusal.next_step = (
            "One change ahead is usual after a crash: start the node, the plugin takes care of it."
        )
    raise BackupError(refusal.problem, refusal.next_step)


@main.command()
@directory_option
@wallet_option
@scratch_option
@click.option(
    "--no-compare", is_flag=True, help="Compare versions only, not content: for huge databases."
)
@acks_option
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
def attach(
    lightning_dir: str,
    wallet: str | None,
    scratch: str | None,
    no_compare: bool,
    acks: int | None,
    urls: tuple[str, ...],
) -> None:
    """Go on with the existing backup at URL: after a restore, or after it was put elsewhere.

    With several URLs: those are the backup's destinations from then on. One that is empty or
    behind is brought up to date.

    Writes backup.lock, if the node's database and the backup agree, version and content. From
    then on no other node can write to this backup.

    \b
    Example:
        backup-cli attach --lightning-dir ~/.lightning/bitcoin file:///mnt/disk2/node.bkp
    """
    directory = node.network_dir(lightning_dir)
    wallet_path = node_database(directory, wallet)
    with node.stopped(directory, wallet_path):
        plan = _plan(directory, urls, acks)
        backend = plan.leader.replica if plan else destinations.backend_for(urls[0])
        url = backend.url
        status = backend.status()
        if status.damage:
            raise BackupError(status.damage)
        version = database.version_of(wallet_path)
        rewindable, has_database = status.prev_version is not None, os.path.exists(wallet_path)
        obstacle = may_attach(version, status.version, rewindable, has_database)
        if obstacle is Obstacle.OUT_OF_DATE:
            refusal = OutOfDate(status.version, version, directory)
            raise BackupError(
                refusal.problem, _after_out_of_date(refusal, directory, urls, backend)
            )
        if obstacle is Obstacle.NO_DATABASE:
            raise ConfigError(
                f"There is no database at {wallet_path}, but the backup is at version"
                f" {status.version}.",
                f"If it is elsewhere, add --wallet. If it was lost, run `{CLI} restore"
                f" {shlex.quote(url)} {shlex.quote(directory)}` first.",
            )
        if obstacle is not None:
            raise LostState(status.version, version, url, backend.last_writer)
        if version and no_compare:
            click.echo(f"Only the versions were compared: {version}.")
        elif version:
            prefix = scratch_prefix(backend, scratch, directory)
            _check_same(backend, prefix, wallet_path, version)
        noted = to_note(directory, wallet_path)
        unaware: list[str] = []
        if plan is not None:
            kept, unaware = _take_over_all(plan, directory, noted)
        else:
            kept = _take_over(backend, directory, noted)
    if kept is not None:
        click.echo(f"The former backup.lock is kept: {kept}")
    click.echo(
        f"{os.path.join(directory, node.LOCK_NAME)} now names {' '.join(urls)}, at version"
        f" {status.version}."
    )
    _report_rule(urls, acks)
    for url in unaware:
        click.echo(
            f"Warning: {url} could not be told that it is none of the destinations any more: never"
            " restore from it. Erase it when it comes back.",
            err=True,
        )
    click.echo(f"Add to lightningd's config: important-plugin={PLUGIN}")


def _after_out_of_date(
    refusal: OutOfDate, directory: str, urls: Sequence[str], backend: Backend
) -> str:
    """What to do about ``backend``, which is behind the node in ``directory``."""
    named: tuple[str, ...] = ()
    with contextlib.suppress(BackupError):
        named = node.read_lock_file(directory).urls
    if named == tuple(urls):
        return refusal.next_step
    if len(named) == len(urls) == 1 and not refusal.backup_version and not backend.directories:
        # A server, or a cluster: a file would be in the way.
        command = shlex.join(["move", "--lightning-dir", directory, *named, *urls])
        return f"It is empty. To bring the node's backup there, run `{CLI} {command}`."
    return f"Move this backup away and run `{CLI} init` for a new one."


def _plan(directory: str, urls: Sequence[str], acks: int | None) -> joining.Plan | None:
    """What has to be done for several destinations; None: it is one, and was one."""
    destinations.destination_for(urls, acks)  # Checks what was typed.
    former = None
    with contextlib.suppress(BackupError):  # One that is damaged is moved out of the way.
        lock_file = node.read_lock_file(directory)
        if lock_file.backend_urls:
            former = Roster(lock_file.epoch, lock_file.acks, lock_file.backend_urls)
    if not joining.is_of_several(urls, former, destinations.backend_for):
        return None
    return joining.plan(urls, acks or len(urls), former, destinations.backend_for)


def _former_lock_file(directory: str, url: str) -> node.LockFile:
    """The node's backup.lock, or one that names ``url`` where there is none that can be read."""
    with contextlib.suppress(BackupError):
        return node.read_lock_file(directory)
    return node.LockFile(url)


def _take_over_all(
    plan: joining.Plan, directory: str, changes: Mapping[str, Any]
) -> tuple[str | None, list[str]]:
    """Make the node in ``directory`` the owner of all destinations of ``plan``.

    Returns:
        Where the former backup.lock is kept, and the dropped destinations that could not be told.
    """
    with progress_bar("Copying", 0) as advance:
        joining.bring_all(plan, destinations.backend_for, advance)
    owner, urls = new_owner(), plan.roster.urls
    lock_file = dataclasses.replace(_former_lock_file(directory, urls[0]), owner=owner)
    lock_file = dataclasses.replace(lock_file, **changes)
    lock_file = with_destinations(lock_file, urls, plan.roster.acks, plan.roster.epoch)
    with in_place_of_the_former(directory) as kept, node.new_lock_file(directory, lock_file, kept):
        unaware = joining.take_over(plan, owner, destinations.backend_for)
    return kept, unaware


def _check_same(backend: Backend, prefix: str, wallet: str, version: int) -> None:
    """Refuse a backup that does not hold what the node's database ``wallet`` holds.

    Args:
        version: the database's.
    """
    with (
        at_hand(backend, prefix, only_verdict=True) as read,
        contextlib.closing(read()) as reading,
        scratching.held(prefix) as base,
        progress_bar("Comparing", 0) as advance,
    ):
        # One change ahead is usual after a crash, and taken back when the node starts.
        _, problems = restoring.verify(reading, base, wallet, advance, up_to=version)
    if problems:
        raise BackupError(
            f"{backend.url} is not a backup of {wallet}: at version {version}"
            f" {'; '.join(problems)}.",
            "Check the URL. If the database is the node's latest state, move this backup away and"
            f" run `{CLI} init` for a new one.",
        )


def _take_over(
    backend: Backend, directory: str, changes: Mapping[str, Any] = NOTHING
) -> str | None:
    """Make the node in ``directory`` the backup's owner; where its old backup.lock is kept.

    Args:
        changes: what else the new one says, see node.LockFile.
    """
    with contextlib.closing(backend):
        owner = _claim(backend)
        lock_file = _former_lock_file(directory, backend.url)
        lock_file = dataclasses.replace(lock_file, backend_url=backend.url, owner=owner)
        lock_file = dataclasses.replace(lock_file, **changes)
        with (
            in_place_of_the_former(directory) as kept,
            node.new_lock_file(directory, lock_file, kept),
        ):
            if owner != NOBODY:
                backend.take_over(owner)
    return kept


def _claim(backend: Backend) -> bytes:
    """Open ``backend``; the new owner for it, NOBODY if it is too old to have one."""
    try:
        backend.open()
    except UnsupportedLayout as error:
        click.echo(f"Warning: {error}", err=True)
        return NOBODY
    return new_owner() if backend.keeps_owner else NOBODY


@main.command()
@click.option(
    "--lightning-dir",
    metavar="DIR",
    help="The network directory of the node, which must be stopped. Without it: a server's file.",
)
@wallet_option
@scratch_option
@click.argument("url")
@click.argument("new_url")
def move(
    lightning_dir: str | None, wallet: str | None, scratch: str | None, url: str, new_url: str
) -> None:
    """Move the backup at URL to NEW_URL: copy it, prove the copy, let the node go on with it.

    Between any two destinations. The old backup stays where it is.

    \b
    Example:
        backup-cli move --lightning-dir ~/.lightning/bitcoin file:///mnt/disk2/node.bkp \\
            file:///mnt/disk3/node.bkp
    """
    source, target = destinations.backend_for(url), destinations.backend_for(new_url)
    if lightning_dir is None:
        _move(source, target, scratch)
        click.echo(f"Where a server kept {url}, start it on {new_url}.")
        return
    directory = node.network_dir(lightning_dir)
    wallet_path = node_database(directory, wallet)
    with node.stopped(directory, wallet_path):
        lock_file = node.read_lock_file(directory)
        if lock_file.backend_urls:
            raise ConfigError(
                f"The backup of the node in {directory} has several destinations.",
                f"Run `{CLI} attach` with those that it is to have.",
            )
        found = lock_file.backend_url
        if found != url:
            raise ConfigError(
                f"The backup of the node in {directory} is {found}, not {url}.", "Check the URL."
            )
        _move(source, target, scratch, directory)
        kept = _take_over(target, directory)
    click.echo(f"The former backup.lock is kept: {kept}")
    click.echo(f"The node goes on with {new_url}; it cannot write to {url} any more.")


def _move(
    source: Backend, target: Backend, scratch: str | None, directory: str | None = None
) -> None:
    target.require_absent()
    beside = target if target.directories else source
    prefix = scratch_prefix(beside, scratch, directory)
    status = source.status()
    owner = bytes.fromhex(status.owner or "").ljust(len(NOBODY), b"\0")
    with source.held(), progress_bar("Copying", 0) as advance:
        upgrading.to_another_place(source, target, owner, prefix, advance)
    for note in status.notes:
        click.echo(note)
    click.echo(f"{target.url} holds what {source.url} holds, at version {target.status().version}.")
