"""Commands that look at a backup: status, verify."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys

import click

import destinations
import scratch as scratching
from backend import (
    Status,
    utc,
)
from commands.shared import (
    EXIT_WARNING,
    expand,
    main,
    progress_bar,
    readable,
    scratch_option,
    scratch_prefix,
)
from errors import (
    BackupError,
    DoesNotReplay,
)
from wallet import restore as restoring

NOT_CHECKED = "none at its end (--check reads all of it)"


@main.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--check", is_flag=True, help="Read and check all of it, not only its end.")
def status(url: str, as_json: bool, check: bool) -> None:
    """Say what the backup at URL holds, by a look at its end. Works beside a running node.

    Exit code for cron: 0 sound, 1 unreadable or damaged, 4 a warning.

    \b
    Example:
        backup-cli status file:///mnt/disk2/node.bkp
    """
    try:
        backend = destinations.backend_for(url)
        with backend.checking() if check else contextlib.nullcontext():
            found = backend.status(check)
    except BackupError as error:
        if as_json:
            click.echo(json.dumps({"url": url, "error": str(error)}))
        raise
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else _describe(found))
    for warning in found.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if found.unsound and not found.damage:
        click.echo(f"Error: The last check beside the node found: {found.unsound}", err=True)
    if found.damage:
        click.echo(f"Error: {found.damage}", err=True)
    if found.damage or found.unsound:
        sys.exit(1)
    sys.exit(EXIT_WARNING if found.warnings else 0)


@main.command()
@click.argument("url")
@click.option(
    "--against",
    metavar="DB",
    callback=expand,
    help="A stopped node's database that must be the same.",
)
@scratch_option
def verify(url: str, against: str | None, scratch: str | None) -> None:
    """Prove that the backup at URL restores: check every byte, replay it, check the result.

    \b
    Example:
        backup-cli verify file:///mnt/disk2/node.bkp
        backup-cli verify URL --against ~/.lightning/bitcoin/lightningd.sqlite3
    """
    backend = destinations.backend_for(url)
    prefix = scratch_prefix(backend, scratch)
    with (
        contextlib.closing(backend.read()) as reading,
        scratching.held(prefix) as base,
        progress_bar("Verifying", 0) as advance,
    ):
        try:
            ending, problems = restoring.verify(reading, base, against, advance)
        except DoesNotReplay as error:
            raise BackupError(error.problem, error.way_out(url, "DEST")) from error
    version = ending.version
    for note in ending.notes:
        click.echo(note)
    if ending.torn_tail:
        click.echo("An append that was never acknowledged stands at the end.")
    if problems:
        raise BackupError(
            f"The backup at version {version} does not hold: {'; '.join(problems)}.",
            "Keep it, and find out which copy is right before anything is replaced.",
        )
    backend.note_proven()
    click.echo(f"The backup is sound at version {version}: every record checks and it replays.")
    if against is not None:
        click.echo(f"It is the same as {against}.")


def _describe(found: Status) -> str:
    rewind = "no" if found.prev_version is None else f"yes, to version {found.prev_version}"
    rows = [("backup", f"{found.url} ({found.layout})"), ("version", str(found.version))]
    rows.append(("can be rewound", rewind))
    if found.backup_id is not None:
        rows.append(("backup id", found.backup_id))
    if found.changes is None:
        rows.append(("entries", str(found.version_count)))
    else:
        started = {
            True: "the change before it was taken back: the node had not committed that",
            False: "as usual",
            None: "not known",
        }
        torn = "yes, an append that was never acknowledged" if found.torn_tail else "no"
        rows += [
            ("changes", f"{found.changes} since the snapshot"),
            ("snapshot", readable(found.snapshot_size)),
            ("size", f"{readable(found.size)}, {readable(found.allocated)} allocated"),
            ("last change", utc(found.last_change_ns) if found.last_change_ns else "none"),
            ("last start", started[found.last_start_rewound]),
            ("last checked", utc(found.last_checked_ns) if found.last_checked_ns else "never"),
            ("last proven", utc(found.last_proven_ns) if found.last_proven_ns else "never"),
            ("torn tail", torn),
            ("damage", found.damage or ("none" if found.checked else NOT_CHECKED)),
            ("disk free", readable(found.disk_free)),
        ]
    rows += [("note", note) for note in found.notes]
    return "\n".join(f"{name + ':':16}{value}" for name, value in rows)
