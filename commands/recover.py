"""The command that brings a database back: restore."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence

import click

import destinations
from backend import (
    Backend,
    Reading,
    utc,
)
from commands.shared import (
    EXIT_UNSOUND,
    at_hand,
    backup_of_option,
    chosen_urls,
    expand,
    main,
    progress_bar,
    warn_old_state,
)
from errors import (
    CLI,
    BackupError,
    DoesNotReplay,
)
from several import hearing
from wallet import node
from wallet import restore as restoring


@main.command()
@click.argument("urls", metavar="URL...", nargs=-1)
@click.argument("dest", callback=expand)
@backup_of_option
@click.option(
    "--allow-damaged", is_flag=True, help="Deliver what stands before damage. The last resort."
)
@click.option(
    "--up-to",
    type=click.IntRange(min=1),
    metavar="VERSION",
    help="Stop there, where a later change does not replay. An OLD state.",
)
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Deliver the newest of what answers, though too few of several destinations do.",
)
def restore(
    urls: tuple[str, ...],
    dest: str,
    lightning_dir: str | None,
    allow_damaged: bool,
    up_to: int | None,
    allow_missing: bool,
) -> None:
    """Restore the backup at URL to DEST, a new file or an existing directory.

    Nothing is overwritten. Of several destinations name all that you have: what was acknowledged
    last may be on any of them.

    \b
    Example:
        backup-cli restore file:///mnt/disk2/node.bkp ~/.lightning/bitcoin
    """
    chosen = chosen_urls(urls, lightning_dir)
    backends, doubt = _leaders(chosen, allow_missing)
    url = shlex.join(chosen)
    for backend in backends[:-1]:
        try:
            result, incomplete = _deliver(backend, chosen, dest, False, up_to)
            break
        except BackupError as error:
            said = (
                f"Warning: {backend.url}: {error.problem} Another one that holds the same is taken."
            )
            click.echo(said, err=True)
    else:
        result, incomplete = _deliver(backends[-1], chosen, dest, allow_damaged, up_to)
    ending, incomplete = result.ending, incomplete or doubt
    click.echo(f"Restored version {ending.version} to {result.path}")
    when = f"Last change: {utc(ending.last_change_ns)}; " if ending.last_change_ns else ""
    click.echo(f"{when}{result.changes} changes replayed")
    if ending.torn_tail:
        click.echo("An append that was never acknowledged stood at the end and was left out.")
    for note in ending.notes:
        click.echo(note)
    if up_to is not None:
        incomplete = BackupError(f"What came after version {up_to} is left out, as you asked.")
    incomplete = ending.damage or incomplete
    if incomplete is not None:
        _warn_incomplete(incomplete, result.path)
        _warn_problems(result.problems)
        sys.exit(EXIT_UNSOUND)
    click.echo(
        "A node must never run on anything but its latest state: if it ran after that time, or"
        " runs elsewhere, do not start it on this database."
    )
    directory, name = os.path.split(result.path)
    # Under another name it is lightningd's --wallet, which does not tell the node's directory.
    node_at = shlex.quote(directory) if name == node.DATABASE_NAME else "DIR"
    wallet = "" if name == node.DATABASE_NAME else f" --wallet {shlex.quote(result.path)}"
    click.echo(f"To go on with this backup: {CLI} attach --lightning-dir {node_at}{wallet} {url}")
    _warn_problems(result.problems)
    if result.problems:
        sys.exit(EXIT_UNSOUND)


def _deliver(
    backend: Backend, chosen: Sequence[str], dest: str, allow_damaged: bool, up_to: int | None
) -> tuple[restoring.Restored, BackupError | None]:
    """What ``backend`` delivered, and what did not replay."""
    with at_hand(backend, f"{restoring.destination(dest)}.") as read:
        try:
            return _restored(read, dest, allow_damaged, up_to), None
        except DoesNotReplay as error:
            if not allow_damaged or not error.base:
                raise BackupError(error.problem, error.way_out(chosen, dest)) from error
            return _restored(read, dest, allow_damaged, error.base), error


def _leaders(
    urls: Sequence[str], allow_missing: bool
) -> tuple[Sequence[Backend], BackupError | None]:
    """The destinations that have all there is, and what makes that doubtful."""
    backends = [destinations.backend_for(url) for url in urls]
    found = hearing.hear(backends)
    if len(found) == 1 and found[0].look is None:
        return backends, None  # Of an old layout, or damaged: a pass over it says more.
    chosen, doubt = hearing.choose(found, allow_missing)
    return [heard.replica for heard in hearing.alike(found, chosen)], doubt


def _restored(
    read: Callable[[], Reading], dest: str, allow_damaged: bool, up_to: int | None
) -> restoring.Restored:
    """What a pass over the backup delivered."""
    with (
        contextlib.closing(read()) as reading,
        progress_bar("Restoring", 0) as advance,
    ):
        return restoring.restore(reading, dest, allow_damaged, advance, up_to)


def _warn_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        click.echo(f"WARNING: {problem}", err=True)
    if problems:
        click.echo(
            "WARNING: SQLite's checks fail for this database. The node's own may have been"
            " like that: compare it if you still have it.",
            err=True,
        )


def _warn_incomplete(damage: BackupError, path: str) -> None:
    click.echo(f"WARNING: {damage.problem}", err=True)
    warn_old_state(path)
