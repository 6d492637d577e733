"""Commands that let a node go on with another backup: attach, move."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import click

import destinations
import scratch as scratching
from backend import NOBODY, Backend, new_owner
from commands.shared import (
    acks_option,
    at_hand,
    directory_option,
    in_place_of_the_former,
    main,
    node_database,
    progress_bar,
    report_rule,
    scratch_option,
    scratch_prefix,
    to_note,
    wallet_option,
    with_destinations,
)
from decisions import Obstacle, may_attach
from errors import CLI, PLUGIN, BackupError, ConfigError, LostState, OutOfDate, UnsupportedLayout
from quorum import Roster
from several import joining
from upkeep import upgrade as upgrading
from wallet import database, node
from wallet import restore as restoring

NOTHING: Mapping[str, Any] = MappingProxyType({})


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
    report_rule(urls, acks)
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
