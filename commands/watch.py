"""The command that shows a backup live."""

from __future__ import annotations

import os
import sys
import time
from collections import deque

import click

import destinations
from commands.look import look_at
from commands.shared import backup_of_option, chosen_urls, main
from errors import BackupError
from monitoring import screen
from monitoring.screen import Sample
from wallet import node

EVERY_S = 1.0
RATE_OVER = 10
"""Looks over which the rate of changes is taken."""
HOME = "\033[H\033[J"
"""What empties a terminal's screen."""


@main.command()
@click.argument("urls", metavar="URL...", nargs=-1)
@backup_of_option
def watch(urls: tuple[str, ...], lightning_dir: str | None) -> None:
    """Show the backup at URL live, until Ctrl-C.

    With --lightning-dir of a running node: how long its commits wait for the backup, too.
    Without a terminal each look is a line.

    \b
    Example:
        backup-cli watch --lightning-dir ~/.lightning/bitcoin
    """
    chosen = chosen_urls(urls, lightning_dir)
    directory = None if lightning_dir is None else node.network_dir(lightning_dir)
    backends = [destinations.backend_for(url) for url in chosen]
    prefixes = [backend.scratch_paths(None) for backend in backends if backend.directories]
    prefixes += [os.path.join(directory, node.DATABASE_NAME)] if directory else []
    samples: deque[Sample] = deque(maxlen=RATE_OVER)
    is_terminal = sys.stdout.isatty()
    while True:
        began_s = time.monotonic()
        found = node.ask(directory, "backup-status") if directory else None
        if found is None or "url" not in found:
            try:
                found = look_at(chosen, check=False).shown
            except BackupError as error:
                found = {"url": " ".join(chosen), "error": str(error)}
        samples.append(Sample(began_s, found, screen.work_beside(prefixes)))
        if is_terminal:
            click.echo(HOME + screen.screen(samples))
        else:
            click.echo(screen.one_line(samples))
            sys.stdout.flush()
        time.sleep(max(0.0, began_s + EVERY_S - time.monotonic()))
