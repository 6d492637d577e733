"""The writer's connection: a record is sent until it is known to be stored, over any cut."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from backend import NOBODY, log, session_over_2, taken_over
from errors import BackupError
from filelog import layout2
from filelog.layout2 import Head, Kind
from protocol import Metadata, NackCode, Packet
from remote import protocol1
from remote.address import SocketUrl
from remote.fate import Fate, fate_by_content
from remote.link import Diverged, Link, NoHistory, NotTaken, Unreachable
from remote.patience import Patience

OWNER_TRIES = 3
MOST_AHEAD = 256
"""Records on their way at once: the answers to them fit into any buffer."""
MOST_SIZE_AHEAD = 1 << 20


class Delivery:
    """One node's records on their way to one server, one at a time.

    Args:
        url: where the server is, and how long to wait for it.
        noted: called with ``known`` and ``reconnects`` when one of them has changed.

    Attributes:
        known: what the server holds, as far as this node has heard.
        session: of the records to come.
        reconnects: how often the way was lost.
    """

    def __init__(self, url: SocketUrl, noted: Callable[[Metadata, int], None]) -> None:
        self._url = url
        self._noted = noted
        self._link: Link | None = None
        self._owner: bytes | None = None
        self._refusal: BackupError | None = None
        self._lost = OSError()
        """Why the way was lost the last time."""
        self._counts = protocol1.Counts()
        self.known = Metadata(1, 0, 0, 0)
        self.session = NOBODY
        self.reconnects = 0

    def open(self, owner: bytes | None) -> None:
        """Begin a session of ``owner``, None: of whoever's the backup is.

        Raises:
            Unreachable: the server did not come within ``retry_for``.
            Refused: the backup is another's.
        """
        self._owner = owner
        self._connect(Patience(self._url))
        details = self.known.details
        self.session = session_over_2(owner or (details.session if details else NOBODY))

    def link(self) -> Link | None:
        """The writer's connection, made anew if it was closed; None if nobody has opened it."""
        if self._link is None and self.session != NOBODY:
            self._connect(Patience(self._url))
        return self._link

    def look(self, patience: Patience | None = None) -> None:
        """Ask the server what it holds now, as long as ``patience`` lasts."""
        try:
            self._ask()
        except OSError:
            self._connect(patience or Patience(self._url))

    def go_on_as(self, owner: bytes) -> None:
        """Write as ``owner`` from now on."""
        self._owner, self.session = owner, session_over_2(owner)

    def deliver(
        self, head: Head, payload: bytes, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Send a record until its ACK came, or METADATA shows that it is stored.

        ``meanwhile`` is called when it was sent the first time, and before it is sent again.

        All tries together end after ``retry_for``; the one in hand then goes on as long as it
        moves, so that a large record has the time that its line takes.

        Raises:
            BackupError: it was refused, and so is every later one: whether it is stored is
                not known any more.
        """
        if self._refusal is not None:
            raise self._refusal
        patience, before = Patience(self._url), self.known
        try:
            if not self._sent(head, payload, patience, meanwhile):
                meanwhile()  # Or several that are away would be waited for one after the other.
                self._send_again(head, payload, patience)
            if self._counts.stored(head, before, self.known):
                self._look_again(head, patience)
        except BackupError as error:
            self._refusal = error
            raise

    def deliver_all(self, records: Iterable[tuple[Head, bytes]]) -> None:
        """Send records ahead of their ACKs, each of which follows the one before.

        Raises:
            BackupError: not all are known to be stored. Open it again, to hear which are.
        """
        if self._refusal is not None:
            raise self._refusal
        assert self._link is not None
        link, known = self._link, self.known
        ahead: deque[tuple[Packet, int, Metadata]] = deque()
        size = 0
        try:
            for head, payload in records:
                link.send_record(head, payload)
                self.session, known = head.session, self._with_record(head, known)
                ahead.append((link.ack_of(head), len(payload), known))
                size += len(payload)
                while len(ahead) > MOST_AHEAD or size > MOST_SIZE_AHEAD:
                    size -= self._settled(link, *ahead.popleft())
            while ahead:
                self._settled(link, *ahead.popleft())
        except OSError as error:
            self._refusal = Unreachable(self._url.target, error)
            raise self._refusal from error
        except BackupError as error:
            self._refusal = error
            raise

    def _settled(self, link: Link, expected: Packet, size: int, known: Metadata) -> int:
        link.await_ack(expected, size)
        self._note(known)
        return size

    def _sent(
        self,
        head: Head,
        payload: bytes,
        patience: Patience,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> bool:
        """Send a record and wait for its ACK; False if the connection is lost meanwhile."""
        try:
            assert self._link is not None
            self._link.still_s = patience.still_s
            self._link.send_record(head, payload)
            # While the server is at work.
            stored, expected = self._with_record(head, self.known), self._link.ack_of(head)
            meanwhile()
            self._link.await_ack(expected, len(payload))
        except OSError as error:
            log.warning(f"Lost the backup server {self._url.target}: {error}")
            self._lost = error
            self.reconnects += 1
            self._noted(self.known, self.reconnects)
            return False
        self._note(stored)
        return True

    def _send_again(self, head: Head, payload: bytes, patience: Patience) -> None:
        """Ask what became of a record whose answer was lost, and send it until it is stored."""
        before, losses = self.known, 0
        while True:
            self._connect(patience)
            now = self.known
            if before.details is not None and now.details is not None:
                fate = fate_by_content(head, before.details, now.details)
            else:
                fate = self._counts.fate(head, before, now)
            if fate is Fate.UNKNOWN:
                diverged = self._diverged(before, now)
                self._note(before)  # What this node knows of is what it goes by.
                raise diverged
            log.info(f"Connected to {self._url.target} again: {fate.value}")
            if fate is Fate.STORED:
                self.session = self._counts.session(self.session, before, now, True)
                return
            losses += 1
            self._pause_after(losses, head, patience)
            head, before = self._counts.continuing(head, payload, self.session, before, now)
            if self._sent(head, payload, patience):
                return

    @staticmethod
    def _with_record(head: Head, known: Metadata) -> Metadata:
        """What METADATA will say when ``head`` is stored behind what is ``known``."""
        details = known.details
        if details is not None:
            details = details._replace(
                sequence=details.sequence + 1,
                chain_before=head.chain_before,
                chain=head.chain,
                session=head.session,
                time_ns=head.time_ns,
            )
        step = layout2.CHANGES_STEP[head.kind]
        return Metadata(
            known.protocol,
            head.version,
            head.version - (1 if head.rewindable else 0),
            known.version_count + step,
            details,
        )

    def _look_again(self, head: Head, patience: Patience) -> None:
        """``look``, now that ``head`` is stored."""
        self.look(patience)
        if head.kind == Kind.REWIND and self.known.version != head.version:
            raise Diverged(NackCode.INVALID, "it has forgotten a rewind that it acknowledged")

    def _pause_after(self, losses: int, head: Head, patience: Patience) -> None:
        """Wait before ``head``, which was lost ``losses`` times, is sent again."""
        if head.kind == Kind.OWNER and losses == OWNER_TRIES:
            raise BackupError(
                f"The backup server {self._url.target} takes no owner: each time it closes the"
                " connection.",
                "It may be of an earlier release: update it, then try again.",
            )
        if losses == 1:  # As usual; a server that answers, but takes no record, is not.
            return
        pause_s = patience.pause()
        if pause_s is None:
            raise NotTaken(self._url.target, head.length, losses, self._lost) from self._lost
        time.sleep(pause_s)

    def _diverged(self, before: Metadata, now: Metadata) -> Diverged:
        """The server holds something else than what it had and what was sent."""
        code = NackCode.OTHER_HISTORY
        text = (
            f"it acknowledged version {before.version} to this node, and now is at version"
            f" {now.version} with another content"
        )
        if now.details and now.version >= before.version:
            if now.details.session != self.session:
                code = NackCode.TAKEN_OVER
                text = taken_over(now.version, now.details.time_ns)
        elif now.version < before.version:
            code = NackCode.OUT_OF_DATE
            text = (
                f"it has lost acknowledged changes: it is at version {now.version}, this node"
                f" at version {before.version}"
            )
        if now.details and now.details.last_writer:
            text += f"; last written by {now.details.last_writer}"
        return Diverged(code, text)

    def _connect(self, patience: Patience) -> None:
        """A new link, with fresh METADATA; Unreachable after ``retry_for``."""
        while True:
            self.close()
            try:
                self._link = Link(self._url)
                self._link.still_s = patience.still_s
                self._ask()
                return
            except OSError as error:
                pause_s = patience.pause()
                if pause_s is None:
                    raise Unreachable(self._url.target, error) from error
                log.warning(
                    f"The backup server {self._url.target} cannot be reached ({error}); the node"
                    f" has been waiting for {patience.waited_s:.1f} s, next try in {pause_s:.1f} s"
                )
            except BackupError:
                self.close()
                raise
            time.sleep(pause_s)

    def _ask(self) -> None:
        assert self._link is not None
        found = self._link.metadata(self._owner)
        knew = self.known.details is not None or self._owner not in (None, NOBODY)
        if knew and found.details is None:
            raise NoHistory(self._url.target)
        self.session = self._counts.session(self.session, self.known, found)
        self._note(found)

    def _note(self, known: Metadata) -> None:
        self.known = known
        self._noted(known, self.reconnects)

    def close(self) -> None:
        """End the connection; ``open`` begins another."""
        if self._link is not None:
            self._link.close()
            self._link = None
