"""Commands for a backup that is in use: server, compact."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from types import MappingProxyType

import click

import destinations
from backend import (
    NOTICE,
    log,
)
from commands.shared import (
    backup_of_option,
    chosen_urls,
    main,
    progress_bar,
)
from errors import (
    CLI,
    BackupBusy,
    BackupError,
)
from filebackend import FileBackend
from upkeep import compaction

LOG_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "notice": NOTICE,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


log_mode_option = click.option(
    "--log-mode",
    type=click.Choice(["plain", "systemd"]),
    default="plain",
    show_default=True,
    help="systemd: lines begin with <priority>, for journald.",
)


@main.command()
@log_mode_option
@click.option(
    "--log-level",
    type=click.Choice(list(LOG_LEVELS)),
    default="info",
    show_default=True,
    help="The least that is logged.",
)
@click.option(
    "--compact",
    "compact_at",
    metavar="SIZE|off",
    help="Compact once the changes outgrow the snapshot and SIZE.  [default: 64MiB]",
)
@click.option(
    "--allow-protocol-1",
    is_flag=True,
    help="Let the earlier plugin write also after this one has: to go back to it.",
)
@click.option("--group", metavar="G", help="Whose members may use the unix socket, too.")
@click.option(
    "--allow-user",
    "users",
    multiple=True,
    metavar="USER",
    help="Who may come in by the unix socket, besides this user and root. Several times.",
)
@click.option(
    "--read-only",
    "readers",
    multiple=True,
    metavar="ADDRESS",
    help="Another address, where nobody can ever write. Several times.",
)
@click.option("--read-only-group", metavar="G", help="As --group, for the read-only sockets.")
@click.option(
    "--read-only-user",
    "reading_users",
    multiple=True,
    metavar="USER",
    help="As --allow-user, for the read-only sockets.",
)
@click.argument("file_url")
@click.argument("address")
def server(
    file_url: str,
    address: str,
    log_mode: str,
    log_level: str,
    compact_at: str | None,
    allow_protocol_1: bool,
    group: str | None,
    users: tuple[str, ...],
    readers: tuple[str, ...],
    read_only_group: str | None,
    reading_users: tuple[str, ...],
) -> None:
    """Keep a remote node's backup in FILE_URL; the node uses socket:ADDRESS.

    ADDRESS is unix:/path/to/socket or HOST:PORT. The backup must exist: make an empty one with
    init on this host. One that is damaged is served up to the damage, and takes a resync of its
    node. SIGTERM, SIGINT and SIGHUP end the server once the change in hand is stored.

    \b
    Example:
        backup-cli init file:///srv/node.bkp
        backup-cli server file:///srv/node.bkp unix:/run/node-backup/server.sock
    """
    if (read_only_group or reading_users) and not readers:
        raise click.UsageError("--read-only-group and --read-only-user need --read-only ADDRESS.")
    from server import Server  # Only this command needs it.
    from serving import door

    log_to_stderr(log_mode, LOG_LEVELS[log_level])
    least = compaction.parse_least(compact_at)
    backend = FileBackend(file_url)
    entries = [
        door.Entry(address, False, group, users),
        *(door.Entry(each, True, read_only_group, reading_users) for each in readers),
    ]
    backend.open(though_damaged=True)
    if backend.damage is not None:
        log.error(f"{backend.damage} It is served, and takes nothing but that resync.")
    try:
        running = Server(backend, door.listen(entries), least, allow_protocol_1)
    except BaseException:
        backend.close()
        raise
    where = ", for reading only on ".join((address, *readers))
    log.log(NOTICE, f"serving {file_url}, at version {backend.version}, on {where}")
    sys.exit(running.run())


@main.command()
@click.argument("urls", metavar="URL...", nargs=-1)
@backup_of_option
def compact(urls: tuple[str, ...], lightning_dir: str | None) -> None:
    """Make the backup at URL small again: one snapshot in place of its changes.

    For a file the node is stopped; on a running node use `lightning-cli backup-compact`.
    For socket: the server does it. Prints the sizes before and after.

    \b
    Example:
        backup-cli compact file:///mnt/disk2/node.bkp
    """
    backend = destinations.destination_for(chosen_urls(urls, lightning_dir))
    try:
        with contextlib.ExitStack() as shown:
            # Not before there is something to show: a server does not say how far it is.
            bar = functools.cache(lambda: shown.enter_context(progress_bar("Compacting", 0)))
            result = backend.compact(lambda done, of: bar()(done, of))
    except BackupBusy as error:
        raise BackupError(
            error.problem,
            "On a running node use `lightning-cli backup-compact`; for a server's file"
            f" `{CLI} compact socket:HOST:PORT`.",
        ) from error
    click.echo(json.dumps(result, indent=2))


class SystemdFormatter(logging.Formatter):
    """Lines as journald takes them: the syslog priority in angle brackets first."""

    PRIORITIES = MappingProxyType({10: 7, 20: 6, NOTICE: 5, 30: 4, 40: 3, 50: 2})

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return f"<{self.PRIORITIES.get(record.levelno, 6)}>{record.getMessage()}"


def log_to_stderr(mode: str, level: int) -> None:
    """Let the log's lines have a time, or what journald takes in its place."""
    logging.addLevelName(NOTICE, "NOTICE")
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in log.handlers:
        handler.setFormatter(SystemdFormatter() if mode == "systemd" else plain)
    log.setLevel(level)
