"""The command for what is left when only an old state is: channels."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from typing import Any

import click

import destinations
import scratch as scratching
from backend import Reading
from commands.shared import (
    EXIT_UNSOUND,
    at_hand,
    expand,
    main,
    progress_bar,
    scratch_option,
    scratch_prefix,
)
from errors import CLI, ConfigError, DiskError, DoesNotReplay
from monitoring.screen import in_columns
from wallet import channels as reading_channels
from wallet import node, restore
from wallet.channels import Channel, Found

OLD_STATE = (
    "WARNING: unless you know that this is the node's newest state, take it for an OLD one: never"
    " start lightningd on it, or the peers may take the channels' whole funds."
)
LAST_RESORT = (
    "WARNING: `lightning-cli recoverchannel` asks the peers to close these channels, which cannot"
    " be taken back. Only if the newest state is lost for good, start lightningd with the same"
    " hsm_secret and no database, and run:"
)


@main.command()
@click.argument("source", metavar="DB|URL", callback=expand)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--static",
    is_flag=True,
    help="One line of hex for each open channel, for `lightning-cli recoverchannel`.",
)
@scratch_option
def channels(source: str, as_json: bool, static: bool, scratch: str | None) -> None:
    """List the channels in a node's database, or in the backup at URL: any, old ones too.

    With --static their static channel backups, with which a new node asks the peers to close
    when the newest state is lost: docs/channels.md.

    \b
    Example:
        backup-cli channels ~/old/lightningd.sqlite3
        backup-cli channels --static file:///mnt/disk2/node.bkp
    """
    found, problems = _from(source, scratch)
    if found.damage is not None:
        problems.append(found.damage)
    for channel in found.channels:
        problems += [f"channel {_name(channel)}: {note}" for note in channel.notes]
    if as_json:
        click.echo(json.dumps(_for_programs(found, problems, static), indent=2))
    elif static:
        for channel in found.channels:
            if channel.scb is not None:
                click.echo(channel.scb)
    else:
        click.echo(_in_words(found))
    click.echo(OLD_STATE, err=True)
    if static and any(channel.scb for channel in found.channels):
        command = shlex.join([CLI, "channels", "--static", source])
        click.echo(LAST_RESORT, err=True)
        click.echo(
            f"    {command} | while read -r scb; do lightning-cli recoverchannel"
            ' "[\\"$scb\\"]"; done',
            err=True,
        )
    for problem in problems:
        click.echo(f"WARNING: {problem}.", err=True)
    if problems:
        sys.exit(EXIT_UNSOUND)


def _from(source: str, scratch: str | None) -> tuple[Found, list[str]]:
    """What is found in ``source``, and what is wrong with it."""
    if source.startswith(destinations.SCHEMES):
        return _from_backup(source, scratch)
    if os.path.isdir(source):
        database = os.path.join(source, node.DATABASE_NAME)
        raise ConfigError(f"{source} is a directory.", f"Name the database: {database}.")
    if not os.path.isfile(source):
        raise ConfigError(
            f"{source!r} is no file and no backup URL.",
            "A URL is file:///path/to/file, socket:unix:/path/to/socket, socket:host:port or"
            " postgresql://user@host1,host2/dbname.",
        )
    if scratch is not None and not os.path.isdir(scratch):
        raise ConfigError(f"The directory {scratch} does not exist.", "Check --scratch.")
    try:
        with open(source, "rb") as file:
            begins_with = file.read(16)
    except OSError as error:
        raise DiskError(source, error, "read") from error
    if begins_with != b"SQLite format 3\0":
        raise ConfigError(
            f"{source} is no SQLite database.",
            f"If it is a backup, name it as {shlex.quote(f'file://{os.path.abspath(source)}')}.",
        )
    path = os.path.realpath(source)
    beside = scratch or os.path.dirname(path)
    prefix = os.path.join(beside, f"{os.path.basename(path)}.channels-")
    return reading_channels.of_file(path, prefix), []


def _from_backup(url: str, scratch: str | None) -> tuple[Found, list[str]]:
    """As much as the backup leads to."""
    backend = destinations.backend_for(url)
    prefix = scratch_prefix(backend, scratch)
    with at_hand(backend, prefix) as read, scratching.held(prefix) as base:
        try:
            return _replayed(read(), base)
        except DoesNotReplay as error:
            if not error.base:
                raise
            found, problems = _replayed(read(), base, error.base)
            return found, [error.problem.rstrip("."), *problems]


def _replayed(reading: Reading, base: str, up_to: int | None = None) -> tuple[Found, list[str]]:
    with (
        contextlib.closing(reading) as steps,
        progress_bar("Reading", 0) as advance,
        restore.rebuilt(steps, base, advance, up_to) as (path, ending),
    ):
        found = reading_channels.read(path)
    damage = ending.damage
    return found, [] if damage is None else [damage.problem.rstrip(".")]


def _for_programs(found: Found, problems: list[str], static: bool) -> dict[str, Any]:
    rows = [dataclasses.asdict(channel) for channel in found.channels]
    if not static:
        for row in rows:
            del row["scb"]
    return {
        "node_id": found.node_id,
        "version": found.version,
        "channels": rows,
        "problems": problems,
    }


def _name(channel: Channel) -> str:
    return channel.short_channel_id or channel.funding or f"number {channel.id}"


def _in_words(found: Found) -> str:
    blocks = [_channel_in_words(channel) for channel in found.channels]
    still_open = [channel for channel in found.channels if channel.is_open]
    share = sum(channel.our_msat or 0 for channel in still_open)
    version = "unknown" if found.version is None else found.version
    blocks.append(
        f"Node {found.node_id or 'unknown'} at version {version}: {len(found.channels)} channels,"
        f" {len(still_open)} of them open. Our share of those, as last known: {_satoshi(share)}."
    )
    return "\n\n".join(blocks)


def _channel_in_words(channel: Channel) -> str:
    rows = [
        ("peer", channel.peer_id),
        ("last seen at", channel.address),
        ("channel", channel.short_channel_id),
        ("funding", channel.funding),
        ("state", channel.state),
        ("capacity", channel.capacity_sat and _satoshi(channel.capacity_sat * 1000)),
        ("our share", None if channel.our_msat is None else _satoshi(channel.our_msat)),
    ]
    return in_columns((name, value or "unknown") for name, value in rows)


def _satoshi(msat: int) -> str:
    rest = f".{msat % 1000:03}" if msat % 1000 else ""
    return f"{msat // 1000:,}{rest} sat"
