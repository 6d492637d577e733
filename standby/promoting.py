"""A standby takes the node's place: first nobody else can write, then it has everything."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import durable
from backend import TAG_SIZE, new_owner
from errors import CLI, BackupError, BackupExists, ConfigError, DiskError
from filelog import layout2
from filelog.layout2 import Head, Kind
from protocol import OVERRIDE, NackCode
from quorum import Roster, Rule
from remote.link import Diverged, Refused
from replica import Pause, Replica
from several import hearing
from several.hearing import Heard, Make, Silent
from standby import state as keeping
from standby.applying import Applier
from standby.state import State
from wallet import database, node, restore

TRY_FOR_S = 60.0
"""How long a take-over is tried again because the node has written meanwhile."""
AGAIN = (NackCode.OTHER_HISTORY, NackCode.TAKEN_OVER)
END_S = 60.0
"""The longest wait for the standby's own process to end."""
BRING_TRIES = 3
"""From the place, from there again if the newest change went, and with all of the backup."""
LOOK_S = 0.02


@contextlib.contextmanager
def alone(directory: str) -> Iterator[bool]:
    """Be the only one who works on the standby in ``directory``; whether one was ended for that.

    Raises:
        ConfigError: it does not end.
    """
    until_s, told = time.monotonic() + END_S, None
    while (holder := keeping.holder(directory)) is not None and time.monotonic() < until_s:
        if holder != told and holder:
            _end(holder)
            told = holder
        time.sleep(LOOK_S)
    with keeping.held(directory):
        yield told is not None


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise ConfigError(
            f"The standby runs as another user, as process {pid}.",
            "Stop it (`systemctl stop node-standby`), or run this as that user or root.",
        ) from error


def require_no_database(directory: str) -> None:
    """Raise BackupExists if there is something in place of the database to be."""
    database.require_none(
        os.path.join(directory, node.DATABASE_NAME),
        lambda: (
            "Look what it is: a standby's directory has none. If lightningd was started here by"
            " mistake, move away what it began, with its -wal and -journal files."
        ),
    )


class Promotion:
    """The standby in ``directory`` on its way to be the node's; whoever is killed begins anew.

    Args:
        make: see hearing.Make.

    Raises:
        ConfigError: something is in the way.
    """

    def __init__(self, directory: str, state: State, make: Make) -> None:
        self.state = state
        self._roster: Roster | None = None
        self._directory = directory
        self._make = make
        self._has_tried = state.owner is not None
        """A destination may have been taken over."""
        self._path = os.path.join(directory, keeping.STANDBY_NAME)
        self._target = os.path.join(directory, node.DATABASE_NAME)

    def _change(self, **values: Any) -> None:
        self.state = dataclasses.replace(self.state, **values)
        keeping.write(self._directory, self.state)

    def take_over(self) -> None:
        """Let nobody else write to the backup, durably, and apply all that it holds.

        Raises:
            BackupError: it cannot be made sure. What was done by then is kept.
        """
        if self.state.complete:
            return
        require_no_database(self._directory)
        if not self.state.taken:
            self._shut_out()
        assert self.state.owner is not None
        taken = self._taken(self.state.owner)
        if not self.state.listed:
            self._list(taken, self.state.owner)
        self._complete(self._choose(taken), self.state.owner)

    def _shut_out(self) -> None:
        """Let nobody else write to enough of the destinations."""
        found = self._heard()
        self._catch_up(self._choose(found))
        owner = self.state.owner or new_owner()
        # First, so that whoever is killed goes on as the same one.
        self._change(owner=owner)
        try:
            self._seize(found, owner)
        except BackupError:
            if not self._has_tried:  # The old node goes on, and so may the standby.
                self._change(owner=None)
            raise
        self._change(taken=True, needed=self._needed(), **self._destinations())

    def _destinations(self) -> dict[str, Any]:
        """How the new node goes on."""
        roster, urls = self._roster, self.state.urls
        if roster is None:
            return {}
        listed = roster.urls == urls
        epoch = roster.epoch if listed else roster.epoch + 1
        return {"acks": rule_of(roster, len(urls)).k, "epoch": epoch, "listed": listed}

    # Who is there

    def _answers(self) -> list[Heard]:
        """What each of them says of itself; raises what the only one says if that is an error."""
        found = hearing.hear([self._make(url) for url in self.state.urls])
        if len(found) == 1 and found[0].error is not None:
            raise found[0].error
        return found

    def _heard(self) -> list[Heard]:
        """All destinations that answer, if those are enough."""
        found = self._answers()
        self._roster = self._roster or hearing.newest_roster(found, None)
        if self._roster is None and len(found) > 1:
            raise ConfigError("These URLs are not the destinations of one backup.", "Check them.")
        there = [heard for heard in found if heard.look is not None]
        if self._roster is not None:  # Others do not have all that they acknowledged.
            there = hearing.voters(there, self._roster)
        self._require(there, found, self._needed())
        return there

    def _needed(self) -> int:
        return _needed(self._roster, len(self.state.urls))

    def _require(self, there: Sequence[Heard], found: Sequence[Heard], needed: int) -> None:
        """Raise Silent if those of ``there`` are not enough to shut the node out, and to go on."""
        has = len({heard.look.backup_id for heard in there if heard.look is not None})
        if has >= needed:
            return
        told = " ".join(f"{h.url}: {h.error.problem}" for h in found if h.error is not None)
        raise Silent(
            f"{has} of the backup's destinations can be taken over, and {needed} are needed, to"
            f" shut the old node out and to go on. {told}",
            self._with_fewer([heard.url for heard in there]),
        )

    def _with_fewer(self, urls: Sequence[str]) -> str:
        """What to type to go on with ``urls`` alone, "" if those do not have everything."""
        roster = self._roster
        if roster is None or self.state.owner is not None or _needed(roster, len(urls)) > len(urls):
            return ""
        words = shlex.join(["standby", "--lightning-dir", self._directory, *urls])
        return (
            f"Bring them back, or go on without: run `{CLI} {words}` until it is in step, then this"
            " again."
        )

    def _taken(self, owner: bytes) -> list[Heard]:
        """Those that are ``owner``'s, with equal votes."""
        found = self._answers()
        there = [(heard, heard.look) for heard in found if heard.look is not None]
        ours = [heard for heard, look in there if look.newest.tag == owner[:TAG_SIZE]]
        others = [heard for heard, _ in there if heard not in ours]
        # One that was away then may still be the old node's; so many are somebody else's.
        if len(self.state.urls) - len(others) < self.state.needed:
            with contextlib.closing(others[0].replica) as replica:
                replica.open(owner)  # It knows who took it over.
        self._require(ours, found, self.state.needed)
        if len(self.state.urls) > 1:  # Some may keep the new list already.
            for heard in ours:
                heard.roster = self._new_list()
        return ours

    def _new_list(self) -> Roster:
        """Of the destinations that the new node goes on with."""
        return Roster(self.state.epoch, self.state.acks, self.state.urls)

    def _choose(self, found: Sequence[Heard]) -> Replica:
        chosen, _ = hearing.choose(found, allow_missing=True)
        return chosen.replica

    # Taking over

    def _seize(self, found: Sequence[Heard], owner: bytes) -> None:
        """Make ``owner`` the owner of as many destinations as can be, and of enough of them."""
        for heard in found:
            try:
                self._seize_one(heard, owner)
            except BackupError as error:
                if len(found) == 1:
                    raise
                heard.look, heard.error = None, error
        self._require(found, found, self._needed())

    def _seize_one(self, heard: Heard, owner: bytes) -> None:
        """Make ``owner`` the owner of one destination, durably."""
        until_s = time.monotonic() + TRY_FOR_S
        while True:
            try:
                return self._seize_once(heard, owner)
            except (Refused, Diverged) as error:
                # The answer was lost; or the node has written since the look, and the server is
                # of an earlier release.
                if error.code not in AGAIN or time.monotonic() > until_s:
                    raise

    def _seize_once(self, heard: Heard, owner: bytes) -> None:
        replica, roster = heard.replica, heard.roster
        with contextlib.closing(replica):
            replica.open()
            if replica.newest.tag == owner[:TAG_SIZE]:
                return
            self._has_tried = True
            # A node that writes all the time would always be quicker: what it wrote is read later.
            _claim(replica, owner, roster, roster, OVERRIDE)

    def _list(self, taken: Sequence[Heard], owner: bytes) -> None:
        """Have them keep the list that the new node goes on with."""
        roster = self._new_list()
        for heard in taken:
            former = heard.replica.roster()
            if former != roster:
                with contextlib.closing(heard.replica):
                    heard.replica.open()
                    _claim(heard.replica, owner, former, roster)
        self._change(listed=True)

    # Applying

    def _catch_up(self, replica: Replica) -> None:
        """Apply all but the newest change: what cannot be applied is found before a take-over."""
        with contextlib.closing(Applier(self._directory, self.state)) as applier:
            if self._bring(applier, replica) is None:
                raise restore.NothingToRestore
            self.state = applier.state
            keeping.write(self._directory, self.state)

    def _bring(self, applier: Applier, replica: Replica) -> Head | None:
        """Give ``applier`` all that is there now; the head of the newest record."""
        tries = BRING_TRIES
        while True:
            try:
                with replica.follow(applier.begin()) as records:
                    for found in records:
                        if isinstance(found, Pause):
                            applier.rest()
                            return found.newest
                        applier.feed(*found)
            except BackupError as error:
                tries -= 1
                if not applier.go_back(error) or not tries:
                    raise

    def _complete(self, replica: Replica, owner: bytes) -> None:
        """Apply what is left, the newest change too; the database is a node's then."""
        with contextlib.closing(Applier(self._directory, self.state)) as applier:
            newest = self._bring(applier, replica)
            if newest is None or newest.kind != Kind.OWNER or newest.tag != owner[:TAG_SIZE]:
                raise BackupError(
                    f"The log of {replica.url} does not end with the take-over.",
                    f"Look who writes to it, with `{CLI} status {shlex.quote(replica.url)}`.",
                )
            applier.finish()
            self.state = applier.state
        with open(self._path, "rb") as file:
            durable.flush(file.fileno())
        found = database.version_of(self._path)
        if found != newest.version:
            raise BackupError(
                f"The database is at version {found}, and the backup at {newest.version}.",
                "Restore the backup, and find out why.",
            )
        node_id = database.node_id_of(self._path)
        self._change(place=newest, node_id=node_id, complete=True)

    def name(self) -> None:
        """Give the complete database its name, never in place of another."""
        path, target = self._path, self._target
        try:
            if os.path.lexists(path) and os.path.lexists(target) and os.path.samefile(path, target):
                durable.remove(path)  # Killed in between.
            elif os.path.lexists(path):
                require_no_database(self._directory)
                durable.keep(path, target)  # Before the only name that it has is gone.
                durable.remove(path)
            elif not os.path.lexists(target):
                raise ConfigError(
                    f"{path} is gone, and {target} is not there.",
                    f"The backup has everything: run `{self._restoring()}`, then this again.",
                )
            durable.sync_dir(self._directory)
        except FileExistsError as error:
            raise BackupExists(target) from error
        except OSError as error:
            raise DiskError(target, error, "name") from error

    def _restoring(self) -> str:
        return f"{CLI} restore {shlex.join([*self.state.urls, self._directory])}"


def _needed(roster: Roster | None, urls: int) -> int:
    """How many destinations must be taken over.

    N-K+1 of the old node's shut it out, and have all that was acknowledged. The new node needs
    enough of its own to start.
    """
    if roster is None:
        return urls
    return max(roster.rule.to_read, rule_of(roster, urls).to_start)


def rule_of(roster: Roster, urls: int) -> Rule:
    """The rule of a node that goes on with ``urls`` of the destinations of ``roster``."""
    return Rule(urls, min(roster.acks, urls))


def _claim(
    replica: Replica, owner: bytes, former: Roster | None, roster: Roster | None, flags: int = 0
) -> None:
    """Write to ``replica`` that it is of ``owner``, and keeps ``roster``."""
    newest, session = replica.newest, owner
    if roster is not None and len(roster.urls) > 1:
        # In the term that it is in: which of several has all there is must not change.
        is_of_several = former is not None and len(former.urls) > 1
        term, start = layout2.term_of(newest.session), layout2.start_of(newest.session)
        session = layout2.session_of(owner, *((term, start) if is_of_several else (0, 0)))
    payload = layout2.encode_owner(time.time_ns(), platform.node(), roster)
    head = layout2.owner_behind(newest, session, payload)
    replica.add_record(head._replace(flags=head.flags | flags), payload)
