"""Commands of a second machine, which can take the node's place: standby, promote."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import click

import destinations
import durable
import unwind
from backend import TAG_SIZE, log
from commands.serve import log_mode_option, log_to_stderr
from commands.shared import (
    EXIT_UNSOUND,
    directory_option,
    in_place_of_the_former,
    main,
    with_destinations,
)
from errors import CLI, PLUGIN, BackupError, ConfigError, OtherOwner
from standby import promoting
from standby import state as keeping
from standby.following import Standby
from standby.state import State
from wallet import confined, database, node

DAY_S = 24 * 3600.0
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _seconds(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if found is None or not int(found[1]):
        raise click.BadParameter(f"{text!r} is no time such as 12h: a number and s, m, h or d.")
    return float(int(found[1]) * UNITS_S[found[2]])


@main.command()
@directory_option
@click.option(
    "--check-every",
    "check_every_s",
    metavar="TIME",
    default="1d",
    show_default=True,
    callback=_seconds,
    help="How often SQLite checks all of the database, such as 12h.",
)
@log_mode_option
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
def standby(lightning_dir: str, check_every_s: float, log_mode: str, urls: tuple[str, ...]) -> None:
    """Keep a database in DIR that is always in step with the backup at URL.

    DIR is the network directory of a second machine, where no lightningd runs. It has the same
    hsm_secret. `promote` lets it take the node's place. Of several destinations name all.

    Runs until SIGTERM, SIGINT or SIGHUP ends it, or `promote`.

    \b
    Example:
        backup-cli standby --lightning-dir ~/.lightning/bitcoin socket:backup.example.org:8700
    """
    directory = node.network_dir(lightning_dir)
    _require_no_database(directory)
    destinations.destination_for(urls)  # Checks what was typed.
    log_to_stderr(log_mode, logging.INFO)
    with keeping.held(directory), confined.ending_on_signals(lambda: None):
        _require_no_database(directory)  # A promote may just have ended.
        state = _state(directory, urls, check_every_s)
        for number in unwind.SIGNALS:
            signal.signal(number, _end)
        Standby(directory, state, lambda: destinations.destination_for(urls)).run()


def _end(number: int, _frame: FrameType | None) -> None:
    """End at once: a standby can be killed at any moment, and what is not committed comes again."""
    os.write(2, f"Stopped by {signal.Signals(number).name}.\n".encode())
    os._exit(0)


def _require_no_database(directory: str) -> None:
    database.require_none(
        _database(directory),
        lambda: (
            "A standby has another machine's place to take: if this is the node, it is"
            " here already. If it is an old copy, move it away."
        ),
    )


def _state(directory: str, urls: tuple[str, ...], check_every_s: float) -> State:
    """What is known of the standby in ``directory``, with what was typed."""
    state = keeping.read(directory)
    if state is None:
        state = State(urls, check_every_s)
    elif state.owner is not None:
        raise ConfigError(
            f"The standby in {directory} is being promoted.",
            f"Run `{CLI} promote --lightning-dir {shlex.quote(directory)}` again, or to follow on,"
            f" which begins again: `{keeping.remedy(directory)}`.",
        )
    state = dataclasses.replace(state, urls=urls, check_every_s=check_every_s, error=None)
    keeping.write(directory, state)
    where = f" from version {state.place.version} on" if state.place else ", from its beginning"
    log.info(f"following {' '.join(urls)}{where}")
    return state


@main.command()
@directory_option
def promote(lightning_dir: str) -> None:
    """Let the standby in DIR take the node's place: nobody else can write to the backup then.

    Takes the backup over for good, brings the database up to the last change, gives it its name
    and writes backup.lock. A standby that runs in DIR is ended. If it is interrupted, type it
    again.

    \b
    Example:
        backup-cli promote --lightning-dir ~/.lightning/bitcoin
    """
    directory = node.network_dir(lightning_dir)
    found = keeping.read(directory)
    if found is None:
        return _report_former(directory)
    if not found.complete:
        promoting.require_no_database(directory)
    with promoting.alone(directory) as ended, node.stopped(directory, _database(directory)):
        state = keeping.read(directory)
        if state is None:  # Another promote has just done it.
            keeping.remove(directory)
            return _report_former(directory)
        promotion = promoting.Promotion(directory, state, destinations.backend_for)
        with confined.ending_on_signals(lambda: None), _telling(promotion, ended):
            promotion.take_over()
        promotion.name()
        _write_lock_file(directory, promotion.state)
        keeping.remove(directory)
    place = promotion.state.place
    click.echo(f"{_database(directory)} is at version {place.version if place else 0}.")
    click.echo(
        f"The backup {' '.join(state.urls)} is this machine's: the old node is refused from now"
        " on, at its next commit."
    )
    _report_start(directory)
    if state.proof is not None and state.proof.problems:
        click.echo(
            f"Warning: SQLite's checks of it found: {'; '.join(state.proof.problems)}.", err=True
        )
        sys.exit(EXIT_UNSOUND)


def _database(directory: str) -> str:
    return os.path.join(directory, node.DATABASE_NAME)


@contextlib.contextmanager
def _telling(promotion: promoting.Promotion, ended: bool) -> Iterator[None]:
    """Say of a refusal that nothing follows the backup now, if a standby was ended for it."""
    try:
        yield
    except BackupError:
        if ended and promotion.state.owner is None:
            click.echo(
                "Warning: the standby was ended for this. To follow on, start it again:"
                " `systemctl start node-standby`, or as it was started before.",
                err=True,
            )
        raise


def _report_former(directory: str) -> None:
    """There is no standby: there never was, or it is the node's already."""
    if not os.path.exists(_database(directory)):
        raise ConfigError(
            f"There is no standby in {directory}.",
            f"Run `{CLI} standby --lightning-dir {shlex.quote(directory)} URL`, or `{CLI} restore`"
            " and `attach`.",
        )
    lock_file = node.read_lock_file(directory)
    _require_the_node(directory, lock_file)
    urls = " ".join(lock_file.urls)
    click.echo(
        f"{_database(directory)} goes on with {urls} already: there is no standby here. If this"
        " is the machine that was to be replaced, type it on the standby's."
    )
    _report_start(directory)


def _require_the_node(directory: str, lock_file: node.LockFile) -> None:
    """Refuse to say that lightningd may start: it runs, or another machine is the node by now."""
    try:
        with node.stopped(directory, _database(directory)):
            pass
    except ConfigError as error:
        raise ConfigError(
            f"There is no standby in {directory}. {error.problem}",
            "If this machine was promoted, all is done. If it is to be replaced, type this on the"
            " standby's.",
        ) from error
    owner = None
    with contextlib.suppress(BackupError):  # It need not be reached: nothing is changed.
        owner = destinations.destination_of(lock_file).status().owner
    if owner is not None and owner != lock_file.owner[:TAG_SIZE].hex():
        raise OtherOwner(lock_file.urls[0], "it was taken over since this one wrote to it")


def _report_start(directory: str) -> None:
    if not os.path.exists(os.path.join(directory, "hsm_secret")):
        click.echo(
            f"Warning: there is no hsm_secret in {directory}: without the node's this database is"
            " useless, and lightningd makes another node.",
            err=True,
        )
    click.echo(f"Add to lightningd's config: important-plugin={PLUGIN}")
    click.echo(
        f"Start lightningd on {directory}, with the node's hsm_secret there."
        " Never start the old node again."
    )


def _write_lock_file(directory: str, state: State) -> None:
    assert state.owner is not None, "it took the backup over"
    lock_file = node.LockFile(state.urls[0], owner=state.owner, node_id=state.node_id)
    lock_file = with_destinations(lock_file, state.urls, state.acks, state.epoch)
    with contextlib.suppress(ConfigError):
        if node.read_lock_file(directory).owner == state.owner:
            # It was killed after that.
            return durable.discard(f"{os.path.join(directory, node.LOCK_NAME)}.new")
    with in_place_of_the_former(directory) as kept:
        node.write_lock_file(directory, lock_file, kept)
    if kept is not None:
        click.echo(f"The former backup.lock is kept: {kept}")
