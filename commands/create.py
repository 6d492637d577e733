"""Commands that make a backup, or make it anew: init, resync, upgrade."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import shlex
import subprocess
from collections.abc import Iterator, Sequence

import click

import destinations
from backend import NOBODY, TAG_SIZE, Backend, Destination, Snapshot, Status, new_owner, outcome
from commands.shared import (
    acks_option,
    directory_option,
    main,
    node_database,
    node_snapshot,
    progress_bar,
    readable,
    report_rule,
    to_note,
    wallet_option,
    with_destinations,
)
from decisions import Obstacle, may_replace, may_resync, may_upgrade
from errors import CLI, PLUGIN, BackupError, ConfigError, LostState, OtherOwner
from wallet import node


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
    report_rule(urls, acks)


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
