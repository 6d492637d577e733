"""One backup at several destinations: K of them acknowledge, and the others catch up."""

from __future__ import annotations

import contextlib
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from backend import (
    NOBODY,
    Change,
    MemberStatus,
    Progress,
    Reading,
    Snapshot,
    Status,
    log,
)
from decisions import may_replace
from errors import CLI, BackupBusy, BackupError, ConfigError, Damaged, OtherOwner
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, Head
from monitoring.fields import IN_STEP
from protocol import NackCode
from quorum import Part, Relation, Roster, may_go_on, may_start
from replica import Followable, Pause, Record, Replica
from several import following, hearing
from several.catchup import CatchUp, continues, stand
from several.hearing import Branched, Heard, Make, Silent, end_of, hear

FIRST_START = 1
BACKLOG_SIZE = 8 << 20
"""Bytes of records that are kept for destinations that are slower; at least the newest one."""
PATIENCE_S = 2.0
"""How long a start waits for the answers of destinations that it does not need."""
RETRY_FOR_S = 60.0
"""How long a change waits for destinations that have failed to come back, before it is refused."""
SLOW_AFTER_S = 10.0
"""A destination that takes longer for one record, while K others go on, is lagging."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 60.0
SWITCH_INTERVAL_S = 0.0002
"""How long the thread of one destination may keep the hook's from going on."""
LEAVE_S = 5.0
"""The longest wait for the slower destinations when the backup is closed."""


class Member:
    """One destination, and the thread that brings it all records.

    Attributes:
        part: what it does; changed under the mirror's lock, as all that follows.
        done: how many of the mirror's records it has on stable storage.
        heard: it has answered, and what it holds is known.
        kept: the list of destinations that it keeps.
        votes: it has all that it ever acknowledged, see quorum.Roster.
        was_mended: it was replaced, as a check had found it unsound.
        failed: its first try to answer has failed.
        is_carried: the hook's own thread is giving it the newest record.
        failure: why it did not get that; for its own thread, which tries again.
    """

    def __init__(self, url: str, make: Make) -> None:
        self.url = url
        self.lock = threading.Lock()
        self.backend = make(url)
        self.part = Part.OPENING
        self.since_ns = time.time_ns()
        self.error: BackupError | None = None
        self.done = 0
        self.kept: Roster | None = None
        self.heard = self.failed = self.votes = self.was_mended = False
        self.is_carried = False
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.reconnects = 0
        self.busy_since_s: float | None = None

    def status(self) -> MemberStatus:
        """How it does."""
        return MemberStatus(
            self.url,
            self.backend.version,
            self.part.value,
            self.since_ns,
            str(self.error) if self.error else None,
        )


class MirrorBackend(Followable):
    """Several destinations as one.

    Args:
        roster: the list of them; ConfigError if it is none.
        make: see hearing.Make.
    """

    def __init__(self, roster: Roster, make: Make) -> None:
        if len(set(roster.urls)) < len(roster.urls):
            raise ConfigError("One of the destinations is named twice.")
        if len(roster.urls) > layout2.MAX_DESTINATIONS:
            raise ConfigError(f"A backup has at most {layout2.MAX_DESTINATIONS} destinations.")
        if not 1 <= roster.acks <= len(roster.urls):
            raise ConfigError(
                f"{roster.acks} of {len(roster.urls)} destinations cannot acknowledge.",
                f"--acks is 1 to {len(roster.urls)}.",
            )
        super().__init__(" ".join(roster.urls))
        self.roster = roster
        self._make = make
        self._rule = roster.rule
        found = [make(url) for url in roster.urls]
        self.directories = [place for each in found for place in each.directories]
        self.snapshot_copies = sum(each.snapshot_copies for each in found if each.directories) or 1
        self.medium = f"{roster.acks} of {len(found)} destinations"
        self.allow_missing = False
        """Whether ``read`` takes what there is; ``doubt`` says then what it lacks."""
        self.doubt: Silent | None = None
        self._forget()

    def _forget(self) -> None:
        """Back to what it was before ``open``."""
        self._changed = threading.Condition()
        self._members: list[Member] = []
        self._tail: deque[Record] = deque()
        self._first = 0
        """Number of the first record in ``_tail``."""
        self._tail_size = 0
        self._acknowledged = 0
        """Number of records that K have."""
        self._newest = BEFORE_FIRST
        self._leader: Replica | None = None
        self._started = self._closing = False
        self._owner: bytes | None = None
        self._start_record: Record | None = None
        self._session = NOBODY
        self._house: Callable[[Member], None] | None = None
        self._turn = threading.Lock()

    # Its destinations one by one

    def _all(self) -> list[Replica]:
        found = [self._make(url) for url in self.roster.urls]
        for each in found:
            each.home = self.home
        return found

    def require_absent(self) -> None:
        """See Backend."""
        files = [each.scratch_paths(None) for each in self._all() if each.directories]
        if len(set(files)) < len(files):
            raise ConfigError(
                "Two of the destinations are one file, by two names.", "Name it once."
            )
        for each in self._all():
            each.require_absent()

    def create(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, changes: Sequence[Change] = ()
    ) -> None:
        """See Backend. All of them get the same snapshot, with the same chain."""
        self.require_absent()
        for each in self._all():
            each.create(snapshot)
        for each in self._all():
            self._claim(each, layout2.session_of(owner, 0, FIRST_START))
        if changes:
            with contextlib.closing(self):
                self.open(owner)
                for change in changes:
                    self.add_change(change)

    def replace(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, *, override: bool = False
    ) -> str | None:
        """See Backend. As many as a start needs must be there; the others catch up later."""
        if not self._members:
            return self._replace(snapshot, owner, override)
        house = self._house
        self.close()
        kept = self._replace(snapshot, owner, override)
        self.open(owner)
        if house is not None:
            self._keep_house(house)
        return kept

    def _replace(self, snapshot: Snapshot | None, owner: bytes, override: bool) -> str | None:
        found = hear(self._all())
        for heard in found if not override else ():
            # Of a cluster another node may have taken them over while this one was idle.
            if heard.look is not None and not may_replace(heard.look.newest.tag, owner):
                with contextlib.closing(heard.replica):
                    heard.replica.open(owner)  # It knows who took it over.
        sessions = [heard.look.newest.session for heard in found if heard.look is not None]
        start = 1 + max(map(layout2.start_of, sessions), default=0)
        kept, errors = [], []
        taken: list[BackupError] = []
        for each in found:
            try:
                # Whoever is of this number leads: what was before it is replaced.
                session = layout2.session_of(owner, start, start)
                where = each.replica.replace(snapshot, session, override=override)
                self._claim(each.replica, session)
                kept.append(f"{each.url}: {where}" if where else "")
            except BackupError as error:
                errors.append(f"{each.url}: {error.problem}")
                taken += [error] if _is_taken(error) else []
        if self._rule.n - len(taken) < self._rule.to_start:
            raise taken[0]
        if len(kept) < self._rule.to_start:
            raise Silent(
                f"{len(kept)} of {self._rule.n} destinations could be replaced, and"
                f" {self._rule.to_start} are needed: {' '.join(errors)}"
            )
        return ", ".join(filter(None, kept)) or None

    def _claim(self, replica: Replica, session: bytes) -> None:
        """Let ``replica`` keep the list, and the owner of ``session`` write to it."""
        with contextlib.closing(replica):
            replica.open()
            payload = self._payload()
            replica.add_record(layout2.owner_behind(replica.newest, session, payload), payload)

    def _payload(self) -> bytes:
        return layout2.encode_owner(time.time_ns(), platform.node(), self.roster)

    # Looking

    def hear(self) -> list[Heard]:
        """What each of them says of itself."""
        return hear(self._all())

    def read(self) -> Reading:
        """See Backend: a pass over the one that has all there is."""
        chosen, self.doubt = hearing.choose(self.hear(), self.allow_missing)
        return chosen.replica.read()

    @contextlib.contextmanager
    def follow(self, after: Head | None) -> Iterator[Iterator[Record | Pause]]:
        """See Followable: those of one that has all there is, and of another if that fails."""
        with contextlib.closing(following.follow(self.hear, after)) as records:
            yield records

    def status(self, check: bool = False) -> Status:
        """See Backend: of the one that has all there is, with warnings of the others."""
        found = self.hear()
        chosen, _ = hearing.choose(found)
        status = chosen.replica.status(check)
        status.url = self.url
        for heard in found:
            how = hearing.standing(heard, chosen)
            if how != IN_STEP:
                status.warnings.append(f"{heard.url} is not in step: {how}")
        return status

    def scratch_paths(self, chosen: str | None, otherwise: str | None = None) -> str:
        """See Backend: beside the first that is a file."""
        beside = next((each for each in self._all() if each.directories), None)
        if beside is None:
            return super().scratch_paths(chosen, otherwise)
        return beside.scratch_paths(chosen, otherwise)

    def note_proven(self) -> None:
        """See Backend."""

    def is_old(self) -> bool:
        """See Backend: none that is one of several can be."""
        return False

    def members(self) -> list[MemberStatus]:
        """How each of them does, by what the open backup knows."""
        with self._changed:
            return [member.status() for member in self._members]

    # The start

    def open(self, owner: bytes | None = None) -> None:
        """See Backend.

        Raises:
            Silent: too few of them answer.
            Branched: two of them are of different histories.
            BackupBusy: another process holds one that is needed.
            OtherOwner: another node took the backup over.
        """
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._owner = owner
        self._members = [Member(url, self._make) for url in self.roster.urls]
        for member in self._members:
            member.thread = threading.Thread(target=self._run, args=(member,), daemon=True)
            member.thread.start()
        try:
            self._await_answers()
            self._begin()
        except BaseException:
            self.close()
            raise

    def _await_answers(self) -> None:
        deadline_s: float | None = None
        with self._changed:
            while True:
                if (taken := self._taken(self._rule.to_start)) is not None:
                    raise taken
                heard = sum(member.heard for member in self._members)
                voting = sum(member.heard and member.votes for member in self._members)
                silent = sum(not m.heard and not m.failed for m in self._members)
                now = time.monotonic()
                patient = deadline_s is None or now < deadline_s
                verdict = may_start(self._rule, voting, heard, silent, patient)
                if verdict:
                    return
                if verdict is False and not (silent and patient):
                    raise self._too_few(voting, heard)
                enough = may_start(self._rule, voting, heard, silent, patient=False)
                if deadline_s is None and enough is not None:
                    deadline_s = now + PATIENCE_S
                self._changed.wait(deadline_s and deadline_s - now)

    def _taken(self, needed: int) -> BackupError | None:
        """Why ``needed`` of them will never take what this node writes: another took them over."""
        errors = [m.error for m in self._members if m.error is not None and _is_taken(m.error)]
        # One that was away when another node was shut out is still that one's: it may lag.
        return errors[0] if len(self._members) - len(errors) < needed else None

    def _too_few(self, voting: int, heard: int) -> BackupError:
        errors = [(m.url, m.error) for m in self._members if not m.heard and m.error is not None]
        for _, error in errors:
            if isinstance(error, BackupBusy):
                return error
        told = [f"{url}: {error.problem}" for url, error in errors]
        voiceless = [m for m in self._members if m.heard and not m.votes]
        told += [f"{m.url} has no vote: {self._why(m)}." for m in voiceless]
        way_out = ""
        if voiceless and heard >= self._rule.to_start:  # There is nobody to be brought back.
            moved = any(self._keeps_another_list(m) for m in voiceless)
            way_out = (
                f"Stop the node and run `{CLI} attach --lightning-dir DIR --acks K URL...` with"
                " those that there are to be."
                if moved
                else f"Stop the node and run `{CLI} resync --lightning-dir DIR`: all of them begin"
                " anew with the node's database, and what they held is kept."
            )
        return Silent(
            f"{min(voting, heard)} of {self._rule.n} destinations answered, and"
            f" {self._rule.to_start} are needed: the newest change may be on those that are"
            f" missing. {' '.join(told)}",
            way_out,
        )

    def _keeps_another_list(self, member: Member) -> bool:
        return member.kept is not None and member.kept._replace(votes=True) != self.roster

    def _why(self, member: Member) -> str:
        if self._keeps_another_list(member):
            return "it keeps another list of destinations than backup.lock"
        return "it was being given the whole backup, and does not have all of it yet"

    def _begin(self) -> None:
        """Find out what was acknowledged, and let K of them have it, with a new term."""
        while True:
            with self._changed:
                heard = [member for member in self._members if member.heard]
                voting = [member for member in heard if member.votes]
            # It may be asked for again: those that could not be read are unknown.
            if not may_start(self._rule, len(voting), len(heard), 0, patient=False):
                raise self._too_few(len(voting), len(heard))
            heads = [member.backend.newest for member in voting]
            try:
                number = hearing.leader_of([self._make(m.url) for m in voting], heads)
                break
            except hearing.Unreadable as unread:
                self._set_aside(voting[unread.number], unread.error)
        leader, newest = voting[number], heads[number]
        self._check_distinct(heard)
        start = 1 + max(layout2.start_of(member.backend.newest.session) for member in heard)
        owner = newest.session if self._owner is None else self._owner
        with self._changed:
            self._leader, self._newest = self._make(leader.url), newest
            self.version_count = leader.backend.version_count
            self._settle()
        self._claim_as(owner, start)

    def _set_aside(self, member: Member, error: BackupError) -> None:
        """What ``member`` holds is not known after all."""
        with self._changed:
            member.heard = member.votes = False
            if isinstance(error, Damaged) or getattr(error, "code", None) is NackCode.DAMAGED:
                member.backend.unsound = str(error)
            self._lag(member, error)

    @staticmethod
    def _check_distinct(heard: Sequence[Member]) -> None:
        same = hearing.same_twice((m.backend.newest.backup_id, m.url) for m in heard)
        if same is not None:
            raise ConfigError(
                f"{same[0]} and {same[1]} are one destination, or one is a copy of the other.",
                f"Move the copy away, and run `{CLI} attach` with those that there are to be.",
            )

    def _claim_as(self, owner: bytes, start: int) -> None:
        """Begin the start number ``start``, of ``owner``."""
        payload = self._payload()
        # The number alone outvotes nobody: of two starts with one number at most one had K.
        session = layout2.session_of(owner, layout2.term_of(self._newest.session), start)
        # Another one than that of the start: within a session nothing is taken back.
        self._session = layout2.session_of(owner, start, start)
        self._store(layout2.owner_behind(self._newest, session, payload), payload, is_start=True)

    # Writing

    def add_change(self, change: Change) -> None:
        """See Backend."""
        assert change.base == self.version, "the version rule comes first"
        head = layout2.change_behind(self._newest, change, self._session, time.time_ns())
        self._store(head, change.payload)

    def rewind(self) -> None:
        """See Backend."""
        head = layout2.rewind_behind(self._newest, self._session, time.time_ns())
        self._store(head, b"")

    def take_over(self, owner: bytes) -> None:
        """See Backend. Each of them must have it."""
        self._owner = owner
        self._claim_as(owner, 1 + layout2.start_of(self._session))
        self._await_all()

    def _await_all(self) -> None:
        """Wait until each destination has all."""
        deadline_s = time.monotonic() + RETRY_FOR_S
        with self._changed:
            number = self._first + len(self._tail)
            while not all(self._has(member, number) for member in self._members):
                if time.monotonic() > deadline_s:
                    lacking = [m for m in self._members if not self._has(m, number)]
                    raise Silent(
                        "These destinations could not be brought up to date: "
                        + " ".join(f"{m.url}: {m.error or 'it does not answer.'}" for m in lacking)
                    )
                self._changed.wait(1.0)

    def _store(self, head: Head, payload: bytes, is_start: bool = False) -> None:
        """Give a record to all; returns when K have it on stable storage."""
        began_s = time.monotonic()
        with self._changed:
            if is_start:  # Nobody joins before, or he would seem to have it.
                self._start_record, self._started = (head, payload), True
            self._tail.append((head, payload))
            self._tail_size += len(payload)
            number = self._first + len(self._tail)
            self._trim()
            carried = self._carried()
            for member in carried:
                member.is_carried = True
            if len(carried) < len(self._members):
                self._changed.notify_all()
        if carried:
            self._carry(carried, (head, payload))
        with self._changed:
            while True:
                stored = sum(self._has(member, number) for member in self._members)
                late = time.monotonic() - began_s > RETRY_FOR_S
                verdict = may_go_on(self._rule, stored, self._working(number, late))
                if verdict:
                    break
                if verdict is False:
                    raise self._not_stored(stored)
                self._changed.wait(1.0)
            self._acknowledged = number
            self._newest = head
            self.version_count += layout2.CHANGES_STEP[head.kind]
            self._settle()
            self._trim()

    def _carried(self) -> list[Member]:
        """Those that the hook's thread serves by itself: where it has to wait for each of them
        anyway, all that can be at work at once by one thread. To wake others takes its time."""
        if self._rule.k < self._rule.n or any(m.part is not Part.IN_STEP for m in self._members):
            return []
        elsewhere = [m for m in self._members if m.backend.works_elsewhere]
        here = [m for m in self._members if not m.backend.works_elsewhere]
        return elsewhere + here[:1]

    def _carry(self, members: Sequence[Member], record: Record) -> None:
        """Give ``record`` to each of ``members``, while those before it are at work on it."""
        waiting, done = deque(members), []

        def carry_next() -> None:
            if not waiting:
                return
            member = waiting.popleft()
            try:
                with member.lock:
                    member.backend.add_record_while(*record, carry_next)
                done.append(member)
            except Exception as error:
                member.failure = error

        try:
            while waiting:
                carry_next()
        finally:
            with self._changed:
                for member in members:
                    member.is_carried = False
                    if member in done:
                        member.done += 1
                    elif member.failure is None:  # Cut short: whether it has it is not known.
                        member.failure = BackupError(f"{member.url}: interrupted.")
                if len(done) < len(members) or any(map(self._may_mend, members)):
                    self._changed.notify_all()

    @staticmethod
    def _has(member: Member, number: int) -> bool:
        return member.part is Part.IN_STEP and member.done >= number

    def _working(self, number: int, late: bool) -> int:
        """How many may come to have record ``number``: those that failed not for ever."""
        return sum(
            not self._has(member, number) and (member.part is Part.IN_STEP or not late)
            for member in self._members
            if member.error is None or not _is_taken(member.error)
        )

    def _not_stored(self, stored: int) -> BackupError:
        if (taken := self._taken(self._rule.k)) is not None:
            return taken
        told = " ".join(f"{m.url}: {m.error.problem}" for m in self._members if m.error is not None)
        return Silent(
            f"{stored} of {self._rule.n} destinations have stored the change, and {self._rule.k}"
            f" must. {told}"
        )

    def _settle(self) -> None:
        self.version, self.rewindable = self._newest.version, self._newest.rewindable
        self.reconnects = sum(m.reconnects + m.backend.reconnects for m in self._members)

    def _trim(self) -> None:
        """Keep no more than BACKLOG_SIZE of what is acknowledged; who lacks more falls behind."""
        while self._tail_size > BACKLOG_SIZE and self._first < self._acknowledged:
            _, payload = self._tail.popleft()
            self._tail_size -= len(payload)
            self._first += 1
        now_s = time.monotonic()
        for member in self._members:
            if member.part is not Part.IN_STEP or member.done >= self._acknowledged:
                continue
            stands = member.busy_since_s is not None and now_s - member.busy_since_s > SLOW_AFTER_S
            if stands or member.done < self._first:
                self._lag(member, BackupError(f"{member.url} is too slow and fell behind."))

    def close(self) -> None:
        """See Backend. Those that are slower get LEAVE_S to store what they have not yet."""
        members = self._members
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        began_s = time.monotonic()
        for member in members:
            # One that does not answer is not waited for.
            longest_s = LEAVE_S if member.part is Part.IN_STEP or not member.failed else 0.5
            if member.thread is not None:
                member.thread.join(max(0.0, began_s + longest_s - time.monotonic()))
        self._forget()

    # The thread of each

    def _run(self, member: Member) -> None:
        changed, pause_s = self._changed, FIRST_PAUSE_S
        try:
            while True:
                try:
                    return self._serve(member)
                except BackupError as error:
                    failure = error
                except Exception as error:
                    failure = BackupError(f"{member.url}: internal error: {error!r}.")
                with changed:
                    if changed is not self._changed:
                        return  # All ended, and may have begun again, meanwhile.
                    was_in_step = member.part is Part.IN_STEP
                    self._lag(member, failure)
                pause_s = FIRST_PAUSE_S if was_in_step else min(2 * pause_s, LONGEST_PAUSE_S)
                with changed:
                    changed.wait_for(lambda: self._is_closing(changed), pause_s)
                    if self._is_closing(changed):
                        return
        finally:
            self._close(member)

    def _is_closing(self, changed: threading.Condition) -> bool:
        return self._closing or changed is not self._changed

    def _lag(self, member: Member, error: BackupError) -> None:
        """``member`` is out of the path of a change from now on."""
        if member.error is None or member.part is Part.IN_STEP:
            log.warning(f"{member.url} is not in step any more: {error}")
        if member.part is not Part.LAGGING:
            member.since_ns = time.time_ns()
        member.part, member.error, member.failed = Part.LAGGING, error, True
        member.busy_since_s = None
        self._changed.notify_all()

    def _close(self, member: Member) -> None:
        with contextlib.suppress(BackupError, OSError), member.lock:
            member.backend.close()

    def _serve(self, member: Member) -> None:
        """Open it, bring it up to date, and give it what comes, until the end."""
        changed = self._changed
        self._close(member)
        with member.lock:
            member.reconnects += member.backend.reconnects
            backend = self._make(member.url)
            backend.home = self.home
            try:
                self._open(backend)
                kept = backend.roster()
            except BaseException:
                backend.close()  # Or it would be in its own way at the next try.
                raise
            member.backend = backend
        with changed:
            member.heard, member.kept, member.votes = True, kept, kept == self.roster
            changed.notify_all()
            changed.wait_for(lambda: self._started or self._is_closing(changed))
        while not self._is_closing(changed):
            self._bring_up(member)
            self._follow(member)
            self._mend(member)

    def _open(self, backend: Replica) -> None:
        try:
            backend.open(self._owner)
        except BackupError as error:
            # An old image has another owner, too; but it knows less than this node.
            if _is_taken(error):
                known = self._make(backend.url).roster()
                if known is not None and known.epoch < self.roster.epoch:
                    raise BackupError(
                        f"{backend.url} has missed an attach: it holds an old state.",
                        f"Run `{CLI} attach` with those that there are to be.",
                    ) from error
            raise

    def _bring_up(self, member: Member) -> None:
        """Let it catch up until it is in step."""
        changed = self._changed
        owner = self._owner or self._session
        catch_up = CatchUp(member.backend, member.lock, owner, member.votes)
        pause_s = FIRST_PAUSE_S
        while not self._is_closing(changed):
            if self._join(member, catch_up):
                return
            if self._bring(member, catch_up):
                continue
            with changed:
                changed.wait_for(lambda: self._is_closing(changed), pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _join(self, member: Member, catch_up: CatchUp) -> bool:
        """Take it in, if what it lacks is in memory."""
        with self._changed:
            place = self._place_of(member.backend.newest)
            if place is None:
                return False
            late = self._start_record
            start = 0 if late is None else self._number_of(late)
            needs_start = late is not None and place >= start and _is_before(member, late[0])
        if late is not None and (needs_start or not catch_up.votes):
            newest = member.backend.newest
            session = late[0].session if needs_start else newest.session
            catch_up.add(layout2.owner_behind(newest, session, late[1]), late[1])
            catch_up.votes = member.votes = True
        with self._changed:
            place = self._place_of(member.backend.newest)
            if place is None or place < self._first or self._start_record is not late:
                return False
            if member.error is not None:
                log.info(f"{member.url} is in step again")
            member.done, member.part, member.error = place, Part.IN_STEP, None
            member.since_ns = time.time_ns()
            self._changed.notify_all()
        if self._house is not None:
            self._house(member)
        return True

    def _number_of(self, record: Record) -> int:
        """How many records there were with ``record``, 0 if it is not in memory any more."""
        for number, each in enumerate(self._tail, self._first + 1):
            if each is record or each[0] is record[0]:
                return number
        return 0

    def _place_of(self, newest: Head) -> int | None:
        """How many of the mirror's records one has that ends in ``newest``; None: unknown."""
        found = None
        for number, (head, _) in enumerate(self._tail, self._first):
            if continues(newest, head):
                found = number
            if (head.chain, head.rewindable) == (newest.chain, newest.rewindable):
                found = number + 1
        last = self._tail[-1][0] if self._tail else self._newest
        # Whoever took back a change that nobody else has stands at the same chain.
        if last.chain == newest.chain and (last.rewindable or not newest.rewindable):
            found = self._first + len(self._tail)
        return found

    def _sources(self, member: Member) -> list[Replica]:
        """Those that may have more than ``member``: all in step, and the one that led the start."""
        with self._changed:
            others = [m for m in self._members if m is not member and m.part is Part.IN_STEP]
            others.sort(key=lambda other: other.backend.unsound is not None)
            found = [self._make(other.url) for other in others]
            leader = self._leader
        if leader is not None and leader.url not in [member.url, *(each.url for each in found)]:
            found.append(leader)
        return found

    def _bring(self, member: Member, catch_up: CatchUp) -> bool:
        """Bring it to what another one has; False if that is no more than it has already."""
        failure: BackupError | None = None
        for source in self._sources(member):
            try:
                standing = stand(end_of(member.backend.newest), member.backend.newest.tag, source)
            except BackupError as error:  # Another one may be sound.
                failure = error
                continue
            if standing.relation is Relation.APART:
                raise Branched(member.url, source.url)
            if standing.relation is Relation.EQUAL:
                return False
            catch_up.bring(source, standing)
            return True
        if failure is not None:
            raise failure
        return False

    def _may_mend(self, member: Member) -> bool:
        """Whether a check found it unsound, and there are enough others that are sound."""
        if member.backend.unsound is None or member.was_mended or member.part is not Part.IN_STEP:
            return False
        # Enough to start with: no change waits for it, and nothing is on it alone.
        return len(self._as_far_as(member)) >= self._rule.to_start

    def _as_far_as(self, member: Member) -> list[Member]:
        """Those in step that are sound, and have all that ``member`` has acknowledged."""
        others = [other for other in self._members if other.part is Part.IN_STEP]
        sound = [other for other in others if other.backend.unsound is None]
        return [other for other in sound if other.done >= member.done]

    def _mend(self, member: Member) -> None:
        """A check found ``member`` unsound: replace it by the whole of a sound one."""
        with self._changed:
            if not self._may_mend(member):
                return
            member.was_mended = True  # Not again and again, if it is not the file.
            what = f"{member.backend.unsound} It gets the whole backup from another one."
            source = self._make(self._as_far_as(member)[0].url)
            self._lag(member, BackupError(what))
        owner = self._owner or self._session
        CatchUp(member.backend, member.lock, owner, member.votes).begin_anew(source)

    def _follow(self, member: Member) -> None:
        """Give it what comes, until it falls behind or all ends."""
        changed = self._changed
        while True:
            with changed:
                changed.wait_for(
                    lambda: (
                        not member.is_carried
                        and (
                            member.part is not Part.IN_STEP
                            or member.failure is not None
                            or self._may_mend(member)
                            or member.done < self._first + len(self._tail)
                            or self._is_closing(changed)
                        )
                    )
                )
                if member.failure is not None:
                    failure, member.failure = member.failure, None
                    raise failure
                if member.part is not Part.IN_STEP or changed is not self._changed:
                    return
                if self._may_mend(member):
                    return
                if member.done == self._first + len(self._tail):
                    return  # All ends.
                head, payload = self._tail[member.done - self._first]
            member.busy_since_s = time.monotonic()
            with member.lock:
                member.backend.add_record(head, payload)
            with changed:
                member.busy_since_s = None
                member.done += 1
                changed.notify_all()

    # Beside the node

    def keep_house(
        self, lock: threading.Lock, least: int | None, turn: threading.Lock | None = None
    ) -> None:
        """See Destination. Each compacts by itself, one at a time."""

        def keep(member: Member) -> None:
            member.backend.keep_house(member.lock, least, self._turn)

        self._keep_house(keep)

    def _keep_house(self, keep: Callable[[Member], None]) -> None:
        with self._changed:
            self._house = keep
            in_step = [member for member in self._members if member.part is Part.IN_STEP]
        for member in in_step:
            keep(member)

    def compact(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """See Destination: of all that are in step, or of all; their sizes in sum."""
        total = {when: {"backupsize": 0, "version_count": 0} for when in ("before", "after")}
        failed = []
        for each in self._to_compact():
            try:
                found = each.compact(progress)
            except BackupError as error:  # That is no reason for the others to stay large.
                failed.append(f"{each.url}: {error}")
                continue
            for when, sizes in total.items():
                sizes["backupsize"] += found[when]["backupsize"]
                count = found[when]["version_count"]
                sizes["version_count"] = max(sizes["version_count"], count)
        if failed:
            raise BackupError(f"Not all of them could be compacted: {' '.join(failed)}")
        return total

    def _to_compact(self) -> Iterator[Replica]:
        if not self._members:
            yield from self._all()
        for member in self._members:
            if member.part is Part.IN_STEP:
                yield member.backend

    def rebuild(self, owner: bytes, progress: Progress) -> str | None:
        """See Destination."""
        raise ConfigError("None of several destinations is of an old layout.")


def _is_taken(error: BackupError) -> bool:
    """Whether another node took the backup over."""
    if isinstance(error, OtherOwner):
        return bool(error.taken)
    return getattr(error, "code", None) in (NackCode.OTHER_OWNER, NackCode.TAKEN_OVER)


def _is_before(member: Member, start: Head) -> bool:
    """Whether ``member`` lacks the record of this start."""
    return layout2.start_of(member.backend.newest.session) < layout2.start_of(start.session)
