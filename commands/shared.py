"""What the commands share: the group, options, the node's database, progress bars."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

import durable
import scratch as scratching
import space
import unwind
from backend import (
    RELEASE,
    Backend,
    Reading,
    Snapshot,
    log,
)
from errors import (
    CLI,
    BackupError,
    ConfigError,
    DiskError,
)
from quorum import Rule
from standby import state as keeping
from wallet import database, node, restore

EXIT_UNSOUND = 3
"""A database was delivered, but it is incomplete or SQLite's checks found something."""


EXIT_WARNING = 4


class Commands(click.Group):
    """Turns every BackupError into one line and its exit code, in one place."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BackupError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(unwind.exit_code(error.exit_code))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"Error: {where}{error.strerror or error}.", err=True)
            sys.exit(unwind.exit_code(1))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(RELEASE, prog_name="backup-cli")
def main() -> None:
    """Keep a Core Lightning node's database safe, commit by commit.

    \b
    A new backup:        backup-cli init --lightning-dir ~/.lightning/bitcoin file:///mnt/disk2/node.bkp
    Its state:           backup-cli status file:///mnt/disk2/node.bkp
    After a disaster:    backup-cli restore file:///mnt/disk2/node.bkp ~/.lightning/bitcoin

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 delivered but not to be trusted,
    4 sound with a warning.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)


def expand(_context: click.Context, _parameter: click.Parameter, path: str | None) -> str | None:
    """A path whose ``~`` the shell left as it is, as in ``--against=~/copy``."""
    return None if path is None else os.path.expanduser(path)


directory_option = click.option(
    "--lightning-dir",
    metavar="DIR",
    required=True,
    help="The node's network directory, such as ~/.lightning/bitcoin.",
)


scratch_option = click.option(
    "--scratch",
    metavar="DIR",
    callback=expand,
    help="Where to replay; by default beside the backup.",
)


wallet_option = click.option(
    "--wallet", metavar="FILE", help="The node's database, if it is not in DIR."
)


acks_option = click.option(
    "--acks",
    type=click.IntRange(min=1),
    metavar="K",
    help="How many of several destinations must have stored a change.  [default: all]",
)


def in_words(rule: Rule) -> str:
    """What ``rule`` means for an operator."""
    return (
        f"{rule.k} of {rule.n} destinations acknowledge: the backup survives the loss of"
        f" {rule.survives}, and the node goes on without {rule.goes_on_without}"
    )


def report_rule(urls: Sequence[str], acks: int | None) -> None:
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


def chosen_urls(urls: Sequence[str], lightning_dir: str | None) -> tuple[str, ...]:
    """The URLs that were typed, or those of the node's backup.lock, or what a standby follows."""
    if bool(urls) == (lightning_dir is not None):
        raise click.UsageError("Give either URLs or --lightning-dir DIR.")
    if lightning_dir is None:
        return tuple(urls)
    directory = node.network_dir(lightning_dir)
    standby = keeping.read(directory)
    if standby is not None and not os.path.lexists(os.path.join(directory, node.LOCK_NAME)):
        return standby.urls
    return node.read_lock_file(directory).urls


backup_of_option = click.option(
    "--lightning-dir",
    metavar="DIR",
    help="In place of URLs: those of the backup.lock in this network directory.",
)


def node_database(directory: str, wallet: str | None) -> str:
    """The node's database: ``wallet`` as a path or as lightningd takes it.

    Without it, what backup.lock says, by default the one in ``directory``.
    """
    if wallet is None:
        with contextlib.suppress(BackupError):  # Who needs that file will say what is wrong.
            wallet = node.read_lock_file(directory).wallet
        wallet = wallet and os.path.join(directory, wallet)
    if wallet is None:
        return node.database(directory)
    if wallet.startswith("postgres:"):
        raise ConfigError(
            "A wallet on PostgreSQL is never announced to plugins.",
            "This plugin cannot back up such a node: use PostgreSQL's replication.",
        )
    path = wallet.removeprefix("sqlite3://")
    if path != wallet:
        path = path.partition(":")[0]  # sqlite3://a:b names a replica b, too.
    path = os.path.realpath(os.path.expanduser(path))
    if not os.path.isfile(path):
        raise ConfigError(f"There is no database at {path}.", "Check --wallet.")
    return path


def to_note(directory: str, wallet_path: str) -> dict[str, Any]:
    """What an operator's command knows for backup.lock: fields of node.LockFile.

    Where the database ``wallet_path`` is, if not in ``directory``, and which node it is of. He
    has seen to it that the node has lost no state.
    """
    default = os.path.realpath(os.path.join(directory, node.DATABASE_NAME))
    has_one = os.path.exists(wallet_path) and os.path.getsize(wallet_path)
    return {
        "wallet": None if os.path.realpath(wallet_path) == default else wallet_path,
        "node_id": database.node_id_of(wallet_path) if has_one else None,
        "lost_state": None,
    }


def scratch_prefix(backend: Backend, scratch: str | None, otherwise: str | None = None) -> str:
    """How scratch files begin: in ``scratch``, by default beside the backup.

    Args:
        otherwise: the directory for a backup that is no file; None: the current one.
    """
    prefix = backend.scratch_paths(scratch, otherwise)
    directory = scratch or os.path.dirname(prefix)
    if not os.path.isdir(directory):
        next_step = "Create or mount it." if scratch is None else "Check --scratch."
        raise ConfigError(f"The directory {directory} does not exist.", next_step)
    return prefix


@contextlib.contextmanager
def node_snapshot(backend: Backend, directory: str, wallet: str) -> Iterator[Snapshot | None]:
    """A copy of the stopped node's database in a scratch file, or None if it has none."""
    if not os.path.exists(wallet) or not os.path.getsize(wallet):
        yield None
        return
    prefix = backend.scratch_paths(None, directory)
    space.require(prefix, backend.snapshot_copies * database.size_with_side_files(wallet))
    with scratching.held(prefix) as base:
        with progress_bar("Copying", 0) as advance:
            snapshot = database.copy(wallet, f"{base}.sqlite3", advance)
        yield snapshot


@contextlib.contextmanager
def at_hand(
    backend: Backend, prefix: str, only_verdict: bool = False
) -> Iterator[Callable[[], Reading]]:
    """Passes over ``backend`` that do not wait for a line: see Backend.at_hand.

    Args:
        only_verdict: a copy is of no more use once something is found to be wrong with it.
    """
    found: BackupError | None = None
    with contextlib.ExitStack() as stack:
        with progress_bar("Fetching", 0) as advance:
            read = stack.enter_context(backend.at_hand(prefix, advance))
        try:
            yield read
        except (DiskError, space.NoRoom):
            raise
        except BackupError as error:
            # A restore can be told to deliver what there is.
            nothing = isinstance(error, restore.VersionNotHeld | restore.NothingToRestore)
            if not (only_verdict or nothing):
                raise
            found = error
    if found is not None:
        raise found


@contextlib.contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for a callback of (done, total)."""
    if not sys.stderr.isatty():  # click would print the label.
        yield lambda done, of: None
        return
    with click.progressbar(length=max(total, 1), label=label, file=sys.stderr) as bar:

        def advance(done: int, of: int) -> None:
            bar.length = max(of, 1)
            bar.update(done - bar.pos)

        yield advance


def warn_old_state(backup: str) -> None:
    """Say that what was delivered is an old state, and what it is good for.

    Args:
        backup: the database, or the URL of the backup.
    """
    click.echo(
        "WARNING: this database is an OLD state. Never start the node on it: its peers may take"
        " the channels' whole funds. Start a new node with the same hsm_secret and"
        " emergency.recover, and run `lightning-cli emergencyrecover`; use this database only"
        " to look things up.",
        err=True,
    )
    shown = shlex.quote(backup)
    click.echo(f"The channels in it: {CLI} channels {shown}", err=True)
    click.echo(f"For their peers to close them: {CLI} channels --static {shown}", err=True)


def readable(size: float | None) -> str:
    """``size`` in bytes, as an operator reads it."""
    if size is None:
        return "unknown"
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


@contextlib.contextmanager
def in_place_of_the_former(directory: str) -> Iterator[str | None]:
    """Put backup.lock aside, and back if the block fails; where it is kept."""
    lock_path, kept = os.path.join(directory, node.LOCK_NAME), None
    if os.path.lexists(lock_path):
        kept = durable.free_name(f"{lock_path}.old")
        durable.keep(lock_path, kept)
        durable.remove(lock_path)
    try:
        yield kept
    except BaseException:
        if kept is not None:
            durable.replace(kept, lock_path)
        raise


def with_destinations(
    lock_file: node.LockFile, urls: Sequence[str], acks: int | None, epoch: int = 1
) -> node.LockFile:
    """``lock_file``, naming one destination or several; of those ``acks`` acknowledge, or all."""
    several: dict[str, Any] = {"backend_urls": (), "acks": 1, "epoch": 0}
    if len(urls) > 1:
        several = {"backend_urls": tuple(urls), "acks": acks or len(urls), "epoch": epoch}
    return dataclasses.replace(lock_file, backend_url=urls[0], **several)
