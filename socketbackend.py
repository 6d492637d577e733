"""A backup on a server, over TCP: ``socket:<host>:<port>[?proxy=socks5:<host>:<port>]``."""

from __future__ import annotations

import contextlib
import json
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import protocol
from backend import (
    EMPTY_CHAIN,
    NOBODY,
    Change,
    Progress,
    Reading,
    Snapshot,
    Status,
    chain_after,
)
from errors import CLI, BackupExists, ConfigError
from filelog import layout2
from filelog.layout2 import Head, Kind
from protocol import Details, Metadata, PacketType, ProtocolError
from quorum import Roster
from remote.address import parse_socket_url
from remote.delivery import Delivery
from remote.fetching import fetched
from remote.following import Following
from remote.link import COMPACT_TIMEOUT_S, Link, Refused, Unreachable
from remote.reading import Received, SocketReading
from remote.sending import send_snapshot
from replica import Look, Pause, Record, Replica

CHECKS_BY_ITSELF = (
    "the server reads and checks all of its file each day and replays it each week, which nobody"
    " else makes it do: what it found last is shown here"
)


class SocketBackend(Replica):
    """A destination ``socket:<host>:<port>``.

    Args:
        url: see parse_socket_url; ConfigError if it is not of that form.
    """

    works_elsewhere = True

    def __init__(self, url: str) -> None:
        super().__init__(url)
        try:
            self._url = parse_socket_url(url)
        except ValueError as error:
            raise ConfigError(f"{url!r} is no backup URL: {error}.") from error
        self.medium = f"the backup server {self._url.target}"
        self._delivery = Delivery(self._url, self._note)

    # One request on a connection of its own

    def _once(self) -> tuple[Link, Metadata]:
        try:
            link = Link(self._url)
        except OSError as error:
            raise Unreachable(self._url.target, error) from error
        try:
            found = link.metadata()
            self._hear(found)
            return link, found
        except OSError as error:
            link.close()
            raise Unreachable(self._url.target, error) from error
        except BaseException:
            link.close()
            raise

    def require_absent(self) -> None:
        """See Backend."""
        link, found = self._once()
        link.close()
        self._check_empty(found)

    def _check_empty(self, found: Metadata) -> None:
        if found.version_count or found.version:
            raise BackupExists(
                f"A backup at version {found.version} on {self._url.target}",
                f"To go on with it run `{CLI} attach`; else let the server keep another file.",
            )

    def create(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, changes: Sequence[Change] = ()
    ) -> None:
        """See Backend. The server was started on an empty backup; it gets the snapshot."""
        link, found = self._once()
        try:
            self._check_empty(found)
            if snapshot is not None:
                send_snapshot(self._url, link, found, snapshot, owner)
        finally:
            link.close()
        with contextlib.closing(self):
            self.open()
            if snapshot is None and owner != NOBODY:
                self.take_over(owner)
            for change in changes:
                self.add_change(change)

    def replace(
        self, snapshot: Snapshot | None, owner: bytes = NOBODY, *, override: bool = False
    ) -> str:
        """See Backend. The server keeps the old backup and names it in its log."""
        if snapshot is None:
            raise ConfigError(
                f"The server of {self.url} cannot begin anew with an empty backup.",
                f"Run `{CLI} compact` on another destination.",
            )
        flags, link = protocol.OVERRIDE if override else 0, self._delivery.link()
        if link is not None:  # As the writer: refused if another one has written meanwhile.
            before = self._delivery.known
            send_snapshot(self._url, link, before, snapshot, owner, flags)
            self._delivery.look()
        else:
            link, before = self._once()
            try:
                send_snapshot(self._url, link, before, snapshot, owner, flags)
            finally:
                link.close()
        return f"on {self._url.target}, under the name that the server's log gives"

    def status(self, check: bool = False) -> Status:
        """See Backend. A server of protocol 1 tells versions only; none is made to check its file.

        Raises:
            Refused, Unreachable, ProtocolError.
        """
        link, found = self._once()
        with contextlib.closing(link):
            if found.details is None:
                return Status(
                    url=self.url,
                    layout="server of protocol 1",
                    version=found.version,
                    prev_version=found.prev_version
                    if found.prev_version != found.version
                    else None,
                    version_count=found.version_count,
                )
            try:
                status = link.status()
            except OSError as error:
                raise Unreachable(self._url.target, error) from error
        status.url, server = self.url, found.details.server
        status.layout = f"{server}, protocol 2, {status.layout}"
        if check:
            status.notes.append(CHECKS_BY_ITSELF)
        return status

    # One of several

    def look(self) -> Look:
        """See Replica."""
        link, found = self._once()
        link.close()
        return Look(self._details(found).backup_id, _newest(found), found.version_count)

    def _details(self, found: Metadata) -> Details:
        if found.details is None:
            raise ConfigError(
                f"{self.url} is kept by a server of protocol 1, which cannot be one of several.",
                "Update that server.",
            )
        return found.details

    @property
    def newest(self) -> Head:
        """See Replica."""
        self._details(self._delivery.known)
        return _newest(self._delivery.known)

    def roster(self) -> Roster | None:
        """See Replica."""
        found = self.status()
        if not found.destinations or found.acks is None or found.epoch is None:
            return None
        return Roster(found.epoch, found.acks, tuple(found.destinations), bool(found.votes))

    def add_record(self, head: Head, payload: bytes) -> None:
        """See Replica."""
        self.add_record_while(head, payload, lambda: None)

    def add_record_while(self, head: Head, payload: bytes, meanwhile: Callable[[], None]) -> None:
        """See Replica."""
        self._delivery.session = head.session
        self._delivery.deliver(head._replace(sequence=0), payload, meanwhile)

    def add_records(self, records: Iterable[Record], lock: threading.Lock) -> None:
        """See Replica. They are sent ahead of their answers, so that a long way costs once."""
        with lock:
            self._delivery.deliver_all(
                (head._replace(sequence=0), payload) for head, payload in records
            )

    @contextlib.contextmanager
    def records(self) -> Iterator[Iterator[tuple[Head, bytes]]]:
        """See Replica."""
        link, found = self._once()
        with contextlib.closing(link):
            self._details(found)
            yield self._received(link)

    @contextlib.contextmanager
    def follow(self, after: Head | None) -> Iterator[Iterator[Record | Pause]]:
        """See Replica."""
        link, found = self._once()
        with contextlib.closing(link):
            if found.details is None:
                raise ConfigError(
                    f"{self.url} is kept by a server of protocol 1, which cannot be followed.",
                    "Update that server.",
                )
            yield self._followed(Following(link, after, self.url))

    def _followed(self, following: Following) -> Iterator[Record | Pause]:
        try:
            for each in following.records():
                yield Pause(self.url, following.last) if each is None else each
        except OSError as error:
            raise Unreachable(self._url.target, error) from error

    def _received(self, link: Link) -> Iterator[tuple[Head, bytes]]:
        try:
            yield from Received(link)
        except OSError as error:
            raise Unreachable(self._url.target, error) from error

    def read(self) -> Reading:
        """See Backend."""
        if self._delivery.known.details is None:
            # Servers of protocol 1 may serve one connection at a time; ``replace`` makes it anew.
            self._delivery.close()
        link, found = self._once()
        return SocketReading(link, found, self._url.target)

    @contextlib.contextmanager
    def at_hand(self, prefix: str, progress: Progress) -> Iterator[Callable[[], Reading]]:
        """See Backend. A server of protocol 1 cannot go on in the middle: it is read as it is."""
        with fetched(self._url, prefix, progress) as copy:
            yield self.read if copy is None else copy.read

    def keep_house(
        self, lock: threading.Lock, least: int | None, turn: threading.Lock | None = None
    ) -> None:
        """See Destination. The server does."""

    def compact(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """See Destination. The server does it, and does not say how far it is."""
        link, _ = self._once()
        try:
            link.send(protocol.encode(PacketType.COMPACT))
            packet = link.answer(COMPACT_TIMEOUT_S)
            if packet.type is PacketType.NACK:
                raise Refused(protocol.decode_nack(packet.payload))
            if packet.type is not PacketType.COMPACT_RES:
                raise ProtocolError(f"The server answered {packet.type.name} to COMPACT.")
            return dict(json.loads(packet.payload))
        except (OSError, ValueError) as error:
            raise Unreachable(self._url.target, error) from error
        finally:
            link.close()

    def note_proven(self) -> None:
        """See Backend. A server takes no such note."""

    def is_old(self) -> bool:
        """See Backend."""
        raise self._for_its_server()

    def rebuild(self, owner: bytes, progress: Progress) -> str | None:
        """See Destination."""
        raise self._for_its_server()

    def _for_its_server(self) -> ConfigError:
        return ConfigError(
            f"{self.url} is kept by a server.",
            f"Stop the server and run `{CLI} upgrade FILE_URL` on its host.",
        )

    # The writer's connection

    def open(self, owner: bytes | None = None) -> None:
        """See Backend. Waits for the server as long as a change would.

        A server of protocol 1 keeps no owner, so that it is refused to one who has one.
        """
        self._delivery.open(owner)

    def take_over(self, owner: bytes) -> None:
        """See Backend. A server of protocol 1 keeps no owner."""
        details = self._delivery.known.details
        if details is not None:
            payload = layout2.encode_owner(time.time_ns(), platform.node())
            head = Head(
                kind=Kind.OWNER,
                version=self.version,
                time_ns=details.time_ns,
                session=owner,
                flags=layout2.BUMPS if self.rewindable else 0,
                length=len(payload),
                chain_before=details.chain_before,
                chain=details.chain,
            )
            self._delivery.deliver(head, payload)
        self._delivery.go_on_as(owner)

    def _note(self, known: Metadata, reconnects: int) -> None:
        self.version, self.version_count = known.version, known.version_count
        self.rewindable = known.prev_version == known.version - 1
        self.reconnects = reconnects
        self._hear(known)

    def _hear(self, found: Metadata) -> None:
        self.keeps_owner = found.details is not None
        self.last_writer = found.details.last_writer if found.details else ""
        self.unsound = found.details.unsound or None if found.details else None

    def add_change(self, change: Change) -> None:
        """See Backend."""
        assert change.base == self.version, "the version rule comes first"
        details = self._delivery.known.details
        chain = details.chain if details else EMPTY_CHAIN
        head = Head(
            kind=Kind.CHANGE,
            version=change.version,
            time_ns=time.time_ns(),
            session=self._delivery.session,
            flags=layout2.BUMPS if change.bumps else 0,
            length=len(change.payload),
            chain_before=chain,
            chain=chain_after(chain, change.version, change.payload),
        )
        self._delivery.deliver(head, change.payload)

    def rewind(self) -> None:
        """See Backend."""
        assert self.rewindable, "the version rule comes first"
        details = self._delivery.known.details
        head = Head(
            kind=Kind.REWIND,
            version=self.prev_version,
            time_ns=time.time_ns(),
            session=self._delivery.session,
        )
        if details is not None:
            head = head._replace(chain_before=details.chain, chain=details.chain_before)
        self._delivery.deliver(head, b"")

    def close(self) -> None:
        """See Backend."""
        self._delivery.close()


def _newest(found: Metadata) -> Head:
    details = found.details
    assert details is not None
    rewindable = found.prev_version == found.version - 1
    return Head(
        kind=Kind.CHANGE,
        backup_id=details.backup_id,
        flags=layout2.BUMPS if rewindable else 0,
        version=found.version,
        time_ns=details.time_ns,
        session=details.session,
        chain_before=details.chain_before,
        chain=details.chain,
    )
