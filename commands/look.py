"""Commands that look at a backup: status, verify."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

import destinations
import scratch as scratching
from backend import (
    Status,
    utc,
)
from clusterchecks import WalletCluster, demanded
from commands.shared import (
    EXIT_WARNING,
    at_hand,
    backup_of_option,
    chosen_urls,
    expand,
    in_words,
    main,
    progress_bar,
    readable,
    scratch_option,
    scratch_prefix,
)
from decisions import may_write
from errors import (
    CLI,
    BackupError,
    ConfigError,
    DoesNotReplay,
    NoPsycopg,
)
from monitoring import fields
from monitoring.fields import Fields
from monitoring.metrics import render
from monitoring.metrics import write as write_metrics
from monitoring.screen import in_columns
from quorum import Roster
from several import hearing
from several.hearing import Heard
from standby import standing
from standby import state as keeping
from standby.state import State
from wallet import node
from wallet import restore as restoring

NOT_CHECKED = "none at its end (--check reads all of it)"


@main.command()
@click.argument("urls", metavar="URL...", nargs=-1)
@backup_of_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--check", is_flag=True, help="Read and check all of it, not only its end.")
@click.option(
    "--metrics",
    metavar="FILE",
    callback=expand,
    help="Write the figures there, too, for node_exporter or Prometheus.",
)
@click.option(
    "--wallet",
    metavar="postgres://...",
    help="In place of a backup: a wallet on PostgreSQL, as lightningd's --wallet names it.",
)
def status(
    urls: tuple[str, ...],
    lightning_dir: str | None,
    as_json: bool,
    check: bool,
    metrics: str | None,
    wallet: str | None,
) -> None:
    """Say what the backup at URL holds, by a look at its end. Works beside a running node.

    With several URLs, or --lightning-dir for those of a node: how each of them stands. For the
    directory of a standby: its version, how far behind it is, and its last proof.

    Exit code for cron: 0 sound, 1 unreadable or damaged, another node's by now, or too few of
    several destinations are in step; 4 a warning, or not all of several are in step. Of a standby:
    1 it could not take the node's place as it should. Of a wallet on PostgreSQL: 0 each commit is
    on two machines, 1 it is not; 4 a warning.

    \b
    Example:
        backup-cli status file:///mnt/disk2/node.bkp
        backup-cli status --lightning-dir ~/.lightning/bitcoin
        backup-cli status --wallet postgres://lightning@localhost/lightning
    """
    if wallet is not None:
        if urls or lightning_dir is not None or check or metrics is not None:
            raise click.UsageError("Give --wallet alone, or with --json.")
        _status_of_wallet(wallet, as_json)
        return
    chosen: Sequence[str] = urls or [str(lightning_dir)]
    try:
        standby = _standby_in(lightning_dir) if not urls else None
        chosen = standby[1].urls if standby else chosen_urls(urls, lightning_dir)
        found = _status_of_standby(*standby) if standby else look_at(chosen, check)
    except BackupError as error:
        shown = {"url": " ".join(chosen), "error": str(error)}
        if as_json:
            click.echo(json.dumps(shown))
        if metrics is not None:
            write_metrics(metrics, render(shown, error.exit_code, time.time()))
        raise
    if lightning_dir is not None and standby is None:
        found.errors.extend(_whose(lightning_dir, found.shown["owner"]))
    click.echo(json.dumps(found.shown, indent=2) if as_json else found.text)
    for warning in found.warnings:
        click.echo(f"Warning: {warning}", err=True)
    for problem in found.errors:
        click.echo(f"Error: {problem}", err=True)
    if metrics is not None:
        write_metrics(metrics, render(found.shown, found.exit_code, time.time()))
    sys.exit(found.exit_code)


def _whose(lightning_dir: str, owner: str | None) -> list[str]:
    """Why the node may not write to a backup of ``owner``, if it may not."""
    lock_file = node.read_lock_file(node.network_dir(lightning_dir))
    if owner is None or may_write(bytes.fromhex(owner), lock_file.owner):
        return []
    return ["It is another node's now: a start of this one is refused, and says who took it over."]


class Found(NamedTuple):
    """What a look found: fields for programs, and the same for people."""

    shown: Fields
    text: str
    warnings: list[str]
    errors: list[str]
    all_in_step: bool = True

    @property
    def exit_code(self) -> int:
        """Of the command."""
        if self.errors:
            return 1
        is_warned = self.warnings or not self.all_in_step
        return EXIT_WARNING if is_warned else 0


def look_at(urls: Sequence[str], check: bool) -> Found:
    """How the backup at ``urls`` stands.

    Args:
        check: read and check all of it, not only its end.

    Raises:
        BackupError: it cannot be looked at.
    """
    return _status_of_one(urls[0], check) if len(urls) == 1 else _status_of_several(urls, check)


def _standby_in(lightning_dir: str | None) -> tuple[str, State] | None:
    """The network directory and the state of the standby there; None: it is no standby's."""
    if lightning_dir is None:
        return None
    directory = node.network_dir(lightning_dir)
    state = keeping.read(directory)
    return None if state is None else (directory, state)


def _status_of_standby(directory: str, state: State) -> Found:
    found = standing.look(directory, state, destinations.backend_for)
    behind = "not known"
    if found.behind is not None and found.behind_s is not None:
        behind = f"{found.behind} changes, {found.behind_s:.0f} s"
    rows = [
        *(("standby of", url) for url in found.urls),
        ("version", found.version),
        ("backup", "not known" if found.backup_version is None else found.backup_version),
        ("behind", behind),
        ("follows", f"process {found.process}" if found.process else "no"),
        ("last proven", utc(found.last_proven_ns) if found.last_proven_ns else "never"),
    ]
    return Found(dataclasses.asdict(found), in_columns(rows), found.warnings, found.errors)


def _status_of_several(urls: Sequence[str], check: bool) -> Found:
    found = hearing.hear([destinations.backend_for(url) for url in urls])
    leader, doubt = hearing.choose(found, allow_missing=True)
    roster = hearing.newest_roster(found, None) or Roster(0, len(urls), tuple(urls))
    rows = [_row(heard, leader, check) for heard in found]
    rule = roster.rule
    shown = fields.of_several(leader.replica.status(), rows, rule.k)
    in_step = shown["in_step"]
    text = (
        "\n\n".join(map(_describe_row, rows))
        + f"\n\n{in_words(rule)}. Now {in_step} are in step: it survives the loss of"
        f" {shown['survives_loss_of']}, and the node goes on without"
        f" {shown['goes_on_without']}."
    )
    warnings = [f"{url} is one of the destinations, too." for url in roster.urls if url not in urls]
    errors = []
    if doubt is not None or in_step < rule.k or any(row["damage"] for row in rows):
        errors.append(str(doubt or "Too few destinations are in step."))
    is_well = in_step >= rule.n and not any(row["warnings"] for row in rows)
    return Found(shown, text, warnings, errors, is_well)


def _row(heard: Heard, leader: Heard, check: bool) -> Fields:
    """What is shown of one of several destinations."""
    found = None
    with contextlib.suppress(BackupError):
        found = heard.replica.status(check)
    error = str(heard.error) if heard.error else None
    row = fields.destination(heard.url, found, hearing.standing(heard, leader), error)
    if row["standing"].startswith(hearing.LAGGING):
        row["since_ns"] = row["last_change_ns"]
    return row


def _describe_row(row: Fields) -> str:
    last = utc(row["last_change_ns"]) if row["last_change_ns"] else "none"
    version = "not known" if row["version"] is None else row["version"]
    lines = [("destination", row["url"]), ("version", version), ("last change", last)]
    lines += [("", row["standing"])]
    lines += [("since", utc(row["since_ns"]))] if row["since_ns"] else []
    lines += [("damage", row["damage"])] if row["damage"] else []
    lines += [("warning", warning) for warning in row["warnings"]]
    return in_columns(lines)


def _status_of_one(url: str, check: bool) -> Found:
    backend = destinations.backend_for(url)
    with backend.checking() if check else contextlib.nullcontext():
        found = backend.status(check)
    errors = [found.damage] if found.damage else []
    if found.unsound and not found.damage:
        errors.append(f"The last check beside the node found: {found.unsound}")
    return Found(fields.of_one(found), _describe(found), found.warnings, errors)


def _status_of_wallet(url: str, as_json: bool) -> None:
    if not url.startswith("postgres:"):
        raise ConfigError(
            "Only a wallet on PostgreSQL is looked at: postgres://...",
            f"One on SQLite has a backup: `{CLI} status --lightning-dir DIR`.",
        )
    try:
        from postgres import wallet
    except ImportError as error:
        raise NoPsycopg(error) from error
    found = wallet.examine(url)
    if as_json:
        click.echo(json.dumps(_plain(found), indent=2))
    else:
        click.echo(_describe_wallet(found))
    for warning in found.warnings:
        click.echo(f"Warning: {warning}.", err=True)
    if found.problems:
        raise BackupError(
            f"A commit of this wallet is not kept on two machines: {'; '.join(found.problems)}.",
            "docs/postgres.md has how it is set up.",
        )
    sys.exit(EXIT_WARNING if found.warnings else 0)


def _plain(found: Any) -> Any:
    """``found`` with its named tuples as dictionaries."""
    if hasattr(found, "_asdict"):
        return {name: _plain(value) for name, value in found._asdict().items()}
    return [_plain(each) for each in found] if isinstance(found, list) else found


def _describe_wallet(found: WalletCluster) -> str:
    server, fallback = found.server, found.fallback
    rows = [
        ("wallet", found.where),
        ("server", f"PostgreSQL {found.version}, {'standby' if server.is_standby else 'primary'}"),
        (
            "a commit waits",
            f"for {demanded(server.names)} standbys (synchronous_standby_names is"
            f" '{server.names}', synchronous_commit is {found.synchronous_commit})",
        ),
    ]
    for standby in found.standbys:
        behind = "not heard of" if standby.behind is None else f"{readable(standby.behind)} behind"
        kind = "logical" if standby.logical else standby.sync_state
        rows.append(("standby", f"{standby.name}, {standby.state}, {kind}, {behind}"))
    for slot in fallback.slots:
        held = "" if slot.held is None else f", {readable(slot.held)} kept"
        used = "in use" if slot.active else "not in use"
        rows.append(("slot", f"{slot.name}, {used}, {slot.wal_status}{held}"))
    archive = "failing" if fallback.failing else fallback.archive_mode
    rows += [("wal_level", fallback.wal_level), ("archive", archive)]
    return in_columns(rows)


@main.command()
@click.argument("urls", metavar="URL...", nargs=-1)
@backup_of_option
@click.option(
    "--against",
    metavar="DB",
    callback=expand,
    help="A stopped node's database that must be the same.",
)
@scratch_option
def verify(
    urls: tuple[str, ...], lightning_dir: str | None, against: str | None, scratch: str | None
) -> None:
    """Prove that the backup at URL restores: check every byte, replay it, check the result.

    Of several destinations each one is proven.

    \b
    Example:
        backup-cli verify file:///mnt/disk2/node.bkp
        backup-cli verify URL --against ~/.lightning/bitcoin/lightningd.sqlite3
    """
    chosen = chosen_urls(urls, lightning_dir)
    failed: list[BackupError] = []
    for url in chosen:
        try:
            _verify(url, against, scratch, f"{url}: " if len(chosen) > 1 else "")
        except BackupError as error:
            if len(chosen) == 1:
                raise
            failed.append(error)
            click.echo(f"Error: {url}: {error}", err=True)
    if failed:
        raise BackupError(f"{len(failed)} of {len(chosen)} destinations could not be proven.")
    if len(chosen) > 1:
        # That each of them is sound does not make them the same.
        found = _status_of_several(chosen, check=False)
        click.echo(found.text)
        for problem in found.errors:
            click.echo(f"Error: {problem}", err=True)
        sys.exit(found.exit_code)


def _verify(url: str, against: str | None, scratch: str | None, which: str) -> None:
    """Prove the backup at ``url``; lines about it begin with ``which``."""
    backend = destinations.backend_for(url)
    prefix = scratch_prefix(backend, scratch)
    with (
        at_hand(backend, prefix, only_verdict=True) as read,
        contextlib.closing(read()) as reading,
        scratching.held(prefix) as base,
        progress_bar("Verifying", 0) as advance,
    ):
        try:
            ending, problems = restoring.verify(reading, base, against, advance)
        except DoesNotReplay as error:
            raise BackupError(error.problem, error.way_out([url], "DEST")) from error
    version = ending.version
    for note in ending.notes:
        click.echo(f"{which}{note}")
    if ending.torn_tail:
        click.echo(f"{which}An append that was never acknowledged stands at the end.")
    if problems:
        raise BackupError(
            f"The backup at version {version} does not hold: {'; '.join(problems)}.",
            "Keep it, and find out which copy is right before anything is replaced.",
        )
    backend.note_proven()
    sound = f"The backup is sound at version {version}: every record checks and it replays."
    click.echo(f"{which}{sound}")
    if against is not None:
        click.echo(f"{which}It is the same as {against}.")


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
    if len(found.destinations) > 1 and found.votes:
        rows.append(("one of several", f"{found.acks} of {len(found.destinations)} acknowledge"))
        rows += [("destination", url) for url in found.destinations]
    rows += [("note", note) for note in found.notes]
    return in_columns(rows)
