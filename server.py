"""The backup server: protocols 1 and 2 over TCP in front of one FileBackend.

Every connection has a thread. Whoever wrote last is the writer; ``Keeper`` decides what
may be written, one request at a time. Readers work on the file and never hold its lock.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import os
import select
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator

import durable
import protocol
import space
import unwind
from backend import (
    NOBODY,
    NOTICE,
    RELEASE,
    TAG_SIZE,
    Beginning,
    Change,
    Ending,
    Found,
    Snapshot,
    Step,
    log,
    payload_bumps,
    taken_over,
)
from decisions import Verdict, judge, may_write
from errors import BackupError, ConfigError, DiskError, InvalidChange
from filebackend import FileBackend
from filelog import layout2
from filelog.layout2 import Head, Kind
from filelog.reader import LogReader
from protocol import Details, Metadata, Nack, NackCode, PacketType, ProtocolError, SnapshotPart
from remote.address import parse_host_port
from stream import Stream
from upkeep.compaction import Compactor, Housekeeper
from wallet import database, restore

SERVER_NAME = f"backup-cli server {RELEASE}"
MAX_CONNECTIONS = 16
FIRST_PACKET_S = 30.0
"""How long a new connection may stay silent."""
GRACE_S = 30.0
MIN_RATE = 1024
"""Bytes a second that a packet's body must keep up, after the grace: Tor can."""
IDLE_CHECK_S = 3600.0
SEND_TIMEOUT_S = 60.0
BLOCK_SIZE = 1 << 16
ACCEPT_PAUSE_S = 0.1
MIN_FREE_BYTES = space.RESERVE
"""A snapshot that comes in leaves the disk at least this much for changes."""
SPACE_CHECK_BYTES = 16 << 20
"""Bytes of a snapshot between two looks at the free space."""
SWITCH_INTERVAL_S = 0.0002
"""So that a thread that streams a backup does not make the writer's thread wait."""


OWNED = "the backup belongs to a node that writes with protocol 2"


class Dropped(Exception):
    """The peer broke a rule or a limit: it loses its connection."""


class Keeper:
    """The one place where the backup changes, whichever connection asks.

    Args:
        backend: open for writing.
    """

    def __init__(self, backend: FileBackend) -> None:
        self.backend = backend
        self.lock = threading.Lock()
        self._writer: Connection | None = None
        self._newest_writer = 0
        self._told = NOBODY, ""
        """The owner's tag when ``_whose`` was last asked, and its answer."""
        self._superseded: set[bytes] = set()
        """Sessions that wrote, and after which another one wrote."""

    def metadata(self, agreed: int) -> Metadata:
        """What REQ_METADATA is told, in the protocol agreed on."""
        with self.lock:
            backend, newest = self.backend, self.backend.newest
            metadata = Metadata(
                agreed, backend.version, backend.prev_version, backend.version_count
            )
            if agreed == 1:
                return metadata
            details = Details(
                newest.backup_id,
                newest.sequence,
                newest.chain_before,
                newest.chain,
                newest.session,
                newest.time_ns,
                backend.size,
                SERVER_NAME,
            )
            return metadata._replace(details=details)

    def refuse_owner(self, connection: Connection, owner: bytes) -> bool:
        """Refuse ``connection`` if ``owner`` is not the backup's; whether it was."""
        with self.lock:
            fits = may_write(self.backend.newest.tag, owner)
        if not fits:
            text = f"{connection.machine} as a writer: {self._whose()}"
            connection.refuse(text, NackCode.TAKEN_OVER)
        return not fits

    def _whose(self) -> str:
        # Looked up once for each owner: the log is searched, and changes wait for the lock.
        tag = self.backend.newest.tag
        if self._told[0] != tag:
            self._told = tag, self._look_whose()
        return self._told[1]

    def _look_whose(self) -> str:
        with contextlib.closing(LogReader(self.backend.path)) as reader:
            taken = reader.taken_over()
        if not taken:
            return "this backup is nobody's: it is not the one that this node wrote"
        return f"the backup belongs to another node: {taken}"

    def is_writer(self, connection: Connection) -> bool:
        """Whether ``connection`` was the last to write."""
        return self._writer is connection

    def change(self, connection: Connection, change: Change) -> None:
        """Store ``change`` and acknowledge it, or refuse it."""
        with self.lock:
            backend = self.backend
            if self._is_owned():
                return connection.refuse(f"the change to version {change.version}: {OWNED}")
            first = not self.is_writer(connection)
            outdated = self._is_outdated(connection)
            # A PRAGMA that comes twice over one connection was announced twice.
            if backend.is_last(change) and (change.bumps or first) and not outdated:
                log.info(f"{connection}: version {change.version} came again; it is stored already")
                self._take_over(connection)
                return connection.acknowledge(change.version)
            # Never the first: a rewind is a request of its own.
            verdict = judge(change.base, backend.version, backend.rewindable, first=False)
            if verdict is not Verdict.APPEND or outdated:
                reason = "a newer connection has written"
                if verdict is not Verdict.APPEND:
                    reason = f"{verdict.value}: the backup is at version {backend.version}"
                return connection.refuse(f"the change to version {change.version}: {reason}")
            self._take_over(connection)
            backend.add_change(change)
            connection.acknowledge(change.version)

    def rewind(self, connection: Connection, version: int) -> None:
        """Take the last change back and acknowledge that, or refuse it."""
        with self.lock:
            backend = self.backend
            reason = ""
            if self._is_owned():
                reason = OWNED
            elif not backend.rewindable:
                reason = "the last entry is not a change that can be taken back"
            elif version != backend.prev_version:
                reason = f"it could only go back to version {backend.prev_version}"
            elif self.is_writer(connection):
                reason = "this connection has written already"
            elif self._is_outdated(connection):
                reason = "a newer connection has written"
            if reason:
                return connection.refuse(f"the rewind to version {version}: {reason}")
            self._take_over(connection)
            backend.rewind()
            connection.acknowledge(version)

    def _is_owned(self) -> bool:
        """Whether writers of protocol 1, which name no owner, are kept out."""
        return self.backend.newest.tag != NOBODY[:TAG_SIZE]

    def take_over(self, connection: Connection, head: Head, payload: bytes) -> None:
        """Let another owner write from here on and acknowledge that, or refuse it."""
        with self.lock:
            newest = self.backend.newest
            known = (head.chain_before, head.chain) == (newest.chain_before, newest.chain)
            if not known or self._is_outdated(connection):
                what = "the take-over: the backup has moved on, or is of another history"
                return connection.refuse(what, NackCode.OTHER_HISTORY)
            if newest.session != head.session:  # Else it came again.
                self._take_over(connection)
                self.backend.add_owner(head.session, payload)
                log.log(NOTICE, f"{connection}: {connection.machine} took the backup over")
            connection.acknowledge(head.version, head.chain)

    def record(self, connection: Connection, head: Head, payload: bytes) -> None:
        """Store a change or a rewind of protocol 2 and acknowledge it, or refuse it."""
        with self.lock:
            newest = self.backend.newest
            repeated = (head.chain, head.session) == (newest.chain, newest.session)
            if repeated and not self._is_outdated(connection):
                log.info(f"{connection}: version {head.version} came again; it is stored already")
                self._take_over(connection)
                return connection.acknowledge(head.version, head.chain)
            found = self._refusal(connection, head)
            if found is not None:
                what = "rewind" if head.kind == Kind.REWIND else "change"
                return connection.refuse(
                    f"the {what} to version {head.version}: {found[1]}", found[0]
                )
            self._take_over(connection)
            if newest.session != head.session:
                self._superseded.add(newest.session)
            self.backend.add_record(head, payload)
            connection.acknowledge(head.version, head.chain)

    def _refusal(self, connection: Connection, head: Head) -> tuple[NackCode, str] | None:
        """Why ``head`` may not be appended, or None. The chain decides, then the version."""
        newest = self.backend.newest
        if head.tag != newest.tag:
            return NackCode.TAKEN_OVER, self._whose()
        if head.session in self._superseded or self._is_outdated(connection):
            return NackCode.TAKEN_OVER, taken_over(newest.version, newest.time_ns)
        if head.chain_before != newest.chain:
            if newest.session not in (head.session, NOBODY):
                # For good: a rewind by the other one may bring this session's chain back.
                self._superseded.add(head.session)
                return NackCode.TAKEN_OVER, taken_over(newest.version, newest.time_ns)
            return NackCode.OTHER_HISTORY, (
                f"it continues another history than the backup's, which is at version"
                f" {newest.version}"
            )
        if head.kind == Kind.REWIND:
            fits = newest.rewindable and head.session != newest.session
            fits = fits and (head.version, head.chain) == (newest.version - 1, newest.chain_before)
            return None if fits else (NackCode.INVALID, "the last change cannot be taken back")
        base = head.version - (1 if head.flags & layout2.BUMPS else 0)
        verdict = judge(base, newest.version, newest.rewindable, first=False)
        if verdict is Verdict.APPEND:
            return None
        code = NackCode.OUT_OF_DATE if verdict is Verdict.OUT_OF_DATE else NackCode.LOST_STATE
        return code, f"{verdict.value}: the backup is at version {newest.version}"

    def too_old(self, version: int) -> str:
        """Why a snapshot of ``version`` may not replace the backup, or ""."""
        backend = self.backend
        if backend.version_count and version < backend.version:
            return f"it is older than the backup, at version {backend.version}"
        return ""

    def replace(self, connection: Connection, snapshot: Snapshot, owner: bytes | None) -> None:
        """Start over with ``snapshot`` and acknowledge that, or refuse it.

        Args:
            owner: whose the backup is then; None in protocol 1.
        """
        with self.lock:
            reason = self.too_old(snapshot.version)
            if owner is None and self._is_owned():
                reason = OWNED
            if self._is_outdated(connection):
                reason = "a newer connection has written"
            if reason:
                return connection.refuse(f"the snapshot of version {snapshot.version}: {reason}")
            self._take_over(connection)
            kept = self.backend.replace(snapshot, owner or NOBODY, machine=connection.machine)
            log.log(
                NOTICE,
                f"{connection}: the backup starts over with a snapshot of version"
                f" {snapshot.version}; the old one "
                + (f"is kept as {kept}" if kept else "was empty"),
            )
            connection.acknowledge(snapshot.version, snapshot.chain)

    def _is_outdated(self, connection: Connection) -> bool:
        return connection.number < self._newest_writer

    def _take_over(self, connection: Connection) -> None:
        """Make ``connection`` the writer; a half-open one before it is closed."""
        if self.is_writer(connection):
            return
        if self._writer is not None:
            log.log(NOTICE, f"{connection} takes over as writer from {self._writer}")
            self._writer.cut()
        self._writer = connection
        self._newest_writer = connection.number
        self.backend.begin_session()

    def forget(self, connection: Connection) -> None:
        """``connection`` is closed."""
        with self.lock:
            if self._writer is connection:
                self._writer = None


class Spool:
    """A snapshot on its way in: a scratch file beside the backup.

    Args:
        snapshot: its path, which must not exist, and what the client says of it.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        with self._writing():
            self._file = os.fdopen(durable.create(snapshot.path), "wb")
        self._unchecked = 0

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(self.snapshot.path, error, "write") from error

    def add(self, piece: bytes) -> None:
        """Take a piece; Dropped if the disk has no room for it."""
        self._unchecked += len(piece)
        if self._unchecked >= SPACE_CHECK_BYTES:
            self._unchecked = 0
            self._check_space()
        with self._writing():
            self._file.write(piece)

    def _check_space(self) -> None:
        if shutil.disk_usage(os.path.dirname(self.snapshot.path)).free < MIN_FREE_BYTES:
            raise Dropped("the disk has no room for this snapshot")

    def finish(self) -> None:
        """Check that the file is the database it claims to be."""
        with self._writing():
            self._file.close()
        found = database.version_of(self.snapshot.path)
        if found != self.snapshot.version:
            raise ProtocolError(
                f"The snapshot is called version {self.snapshot.version}, but holds {found}."
            )

    def close(self) -> None:
        """Remove the scratch file."""
        with contextlib.suppress(OSError):  # What is still in memory may find no room.
            self._file.close()
        restore.remove_database(self.snapshot.path)


class Connection:
    """One client.

    Args:
        number: connections are numbered as they come.
    """

    def __init__(self, server: Server, stream: Stream, peer: str, number: int) -> None:
        self.number = number
        self.busy = False
        self.last_heard = time.monotonic()
        self._server = server
        self._keeper = server.keeper
        self._stream = stream
        self._peer = peer
        self._decoder = protocol.Decoder(protocol.TO_SERVER)
        self._silent = True
        self._restored = False
        self._packet_began = self.last_heard
        self._packet_size = 0
        self._protocol = 1
        self._unpacker = protocol.RecordUnpacker()
        self._packer = protocol.RecordPacker(level=1)
        self._spool: Spool | None = None
        self._refused_snapshot = ""
        self._snapshot_chain: bytes | None = None
        self._snapshot_owner: bytes | None = None
        self.machine = peer
        self._inflater = protocol.Inflater(0)

    def __str__(self) -> str:
        return f"{self._peer} (connection {self.number})"

    def run(self) -> None:
        """Serve until the client leaves or breaks a rule."""
        try:
            log.debug(f"{self}: connected")
            while data := self._receive():
                for event in self._decoder.feed(data):
                    self._silent, self.busy = False, True
                    self._handle(event)
                self.busy = self._decoder.in_packet
            log.debug(f"{self}: left")
        except Dropped as error:
            log.warning(f"{self}: closed: {error}")
        except BackupError as error:
            log.warning(f"{self}: closed: {error}")
        except OSError as error:
            log.info(f"{self}: connection lost: {error}")
        finally:
            self._drop_spool()
            self._keeper.forget(self)
            self._server.forget(self)
            self._stream.close()

    def _receive(self) -> bytes:
        """The next bytes; b"" at the client's end. Dropped if it is too slow."""
        while True:
            now = time.monotonic()
            # Between packets it may be silent for ever: keepalive tells if it is gone.
            left_s, reason = IDLE_CHECK_S, ""
            if self._decoder.in_packet:
                spent_s = now - self._packet_began
                left_s = GRACE_S + self._packet_size / MIN_RATE - spent_s
                reason = f"{self._packet_size} bytes in {spent_s:.0f} s are too slow"
            elif self._silent:
                left_s = self.last_heard + FIRST_PACKET_S - now
                reason = f"it said nothing for {FIRST_PACKET_S:.0f} s"
            if left_s <= 0:
                raise Dropped(reason)
            try:
                data = self._stream.receive(left_s)
            except TimeoutError:
                continue
            self._note(len(data))
            return data

    def _note(self, size: int) -> None:
        now = time.monotonic()
        if not self._decoder.in_packet:
            self._packet_began, self._packet_size = now, 0
        self._packet_size += size
        self.last_heard = now

    def _handle(self, event: protocol.Event) -> None:
        if isinstance(event, SnapshotPart):
            return self._take_snapshot(event)
        match event.type:
            case PacketType.RECORD if self._protocol == 2:
                self._take_record(*self._unpacker.unpack(event.payload))
            case PacketType.CHANGE:
                self._write(event.payload)
            case PacketType.REWIND:
                version = protocol.decode_version(event.payload)
                self._server.guard(lambda: self._keeper.rewind(self, version))
            case PacketType.REQ_METADATA:
                self._protocol = protocol.agreed_protocol(event.payload)
                owner, machine = protocol.claimed_owner(event.payload)
                self.machine = machine or self._peer
                if owner is not None and self._keeper.refuse_owner(self, owner):
                    return
                self._send(protocol.encode_metadata(self._keeper.metadata(self._protocol)))
            case PacketType.RESTORE:
                self._stream_backup()
            case PacketType.COMPACT:
                self._compact()
            case PacketType.ACK if self._restored:
                pass  # Of a packet of the restore, which it is still reading.
            case _:
                raise Dropped(f"{event.type.name} may not come now")

    def _write(self, payload: bytes) -> None:
        try:
            change = protocol.decode_change(payload)
        except InvalidChange as error:
            return self.refuse(str(error))
        self._server.guard(lambda: self._keeper.change(self, change))

    def _compact(self) -> None:
        try:
            result = self._server.compactor.run()
        except BackupError as error:
            return self.refuse(f"compaction: {error}")
        self._send(protocol.encode(PacketType.COMPACT_RES, json.dumps(result).encode()))

    def _take_record(self, head: Head, payload: bytes) -> None:
        if head.kind == Kind.SNAPSHOT:
            return self._take_piece(head, payload)
        if head.kind == Kind.OWNER:
            return self._server.guard(lambda: self._keeper.take_over(self, head, payload))
        if head.kind == Kind.CHANGE:
            try:
                bumps = payload_bumps(head.version, payload)
            except InvalidChange as error:
                return self.refuse(str(error), NackCode.INVALID)
            if head.flags != (layout2.BUMPS if bumps else 0):
                what = f"the change to version {head.version}: its flags do not fit"
                return self.refuse(what, NackCode.INVALID)
        self._server.guard(lambda: self._keeper.record(self, head, payload))

    def acknowledge(self, version: int, chain: bytes = b"") -> None:
        """Say that ``version`` is stored, in protocol 2 with its chain."""
        if self._protocol == 2:
            return self._answer(protocol.encode(PacketType.ACK, protocol.ACK.pack(version, chain)))
        self._answer(protocol.encode_version(PacketType.ACK, version))

    def refuse(self, reason: str, code: NackCode = NackCode.OTHER) -> None:
        """Say that nothing was stored; the log says why, in protocol 2 the client is told."""
        log.warning(f"{self}: refused {reason}")
        version = self._keeper.backend.version
        if self._protocol == 2:
            return self._answer(protocol.encode_nack(Nack(version, code, f"refused {reason}")))
        self._answer(protocol.encode_version(PacketType.NACK, version))

    def _answer(self, packet: bytes) -> None:
        """Send ``packet`` at once or never: the keeper's lock is held, and others want it."""
        if self._stream.send_now(packet) != len(packet):
            raise Dropped("it does not read its answers")

    def _send(self, data: bytes) -> None:
        self._stream.send(data, SEND_TIMEOUT_S)

    def cut(self) -> None:
        """End the connection from another thread."""
        self._stream.cut()

    # Snapshots in, backups out

    def _take_snapshot(self, part: SnapshotPart) -> None:
        """Some of a SNAPSHOT of protocol 1."""
        if part.first:
            self._begin_snapshot(part.version, None, None)
        if self._spool is not None:
            for piece in self._inflater.feed(part.data):
                self._spool.add(piece)
        if part.last:
            if self._spool is not None:
                self._inflater.finish()
            self._end_snapshot(part.version)

    def _take_piece(self, head: Head, payload: bytes) -> None:
        """A piece of a snapshot of protocol 2."""
        if self._snapshot_chain != head.chain:
            self._begin_snapshot(head.version, head.chain, head.session)
        if self._spool is not None:
            self._spool.add(payload)
        if head.flags & layout2.FINAL:
            self._end_snapshot(head.version)

    def _begin_snapshot(self, version: int, chain: bytes | None, owner: bytes | None) -> None:
        self._drop_spool()
        self._snapshot_chain, self._snapshot_owner = chain, owner
        self._inflater = protocol.Inflater(protocol.MAX_SNAPSHOT_SIZE)
        self._refused_snapshot = self._keeper.too_old(version)
        if not self._refused_snapshot:
            path = f"{self._keeper.backend.scratch_prefix}in-{self.number}"
            snapshot = Snapshot(path, version) if chain is None else Snapshot(path, version, chain)
            self._spool = Spool(snapshot)

    def _end_snapshot(self, version: int) -> None:
        self._snapshot_chain = None
        if self._spool is None:
            what = f"a snapshot of version {version}: {self._refused_snapshot}"
            return self.refuse(what, NackCode.OLD_SNAPSHOT)
        self._spool.finish()
        self._keeper.replace(self, self._spool.snapshot, self._snapshot_owner)
        self._drop_spool()

    def _drop_spool(self) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def _stream_backup(self) -> None:
        log.info(f"{self}: restores the backup")
        self._restored = True
        if self._protocol == 2:
            return self._stream_records()
        reading = self._keeper.backend.read()
        with contextlib.closing(reading):
            for block in blocks(reading, os.path.dirname(self._keeper.backend.path)):
                self._send_block(block)
        self._send_block(protocol.encode(PacketType.DONE))

    def _stream_records(self) -> None:
        with contextlib.closing(LogReader(self._keeper.backend.path)) as reader:
            size = protocol.COMING.pack(self._keeper.backend.size)
            block = bytearray(protocol.encode(PacketType.COMING, size))
            for head, payload in reader:
                block += self._packer.pack(head, payload)
                if len(block) >= BLOCK_SIZE:
                    self._send_block(bytes(block))
                    block.clear()
            self._send_block(bytes(block))
        if reader.damage is not None:
            log.warning(f"{self}: the restore ends early: {reader.damage}")
            nack = Nack(self._keeper.backend.version, NackCode.DAMAGED, str(reader.damage))
            return self._send_block(protocol.encode_nack(nack))
        self._send_block(protocol.encode(PacketType.DONE))

    def _send_block(self, data: bytes) -> None:
        """Send ``data`` while taking the ACKs that the client may send meanwhile."""
        view, moved = memoryview(data), time.monotonic()
        while view:
            readable, writable, _ = select.select(
                [self._stream], [self._stream], [], SEND_TIMEOUT_S
            )
            if time.monotonic() - moved > SEND_TIMEOUT_S:
                raise Dropped(f"it took nothing for {SEND_TIMEOUT_S:.0f} s")
            if readable:
                received = self._stream.receive(SEND_TIMEOUT_S)
                if not received:
                    raise ConnectionError("it left during a restore")
                for event in self._decoder.feed(received):
                    if event[0] is not PacketType.ACK:
                        raise Dropped("only ACK may come during a restore")
            if writable and (sent := self._stream.send_now(view)):
                view, moved = view[sent:], time.monotonic()


def blocks(steps: Iterable[Step], directory: str) -> Iterator[bytes]:
    """The SNAPSHOT and CHANGE packets of a restore, in blocks that are good to send.

    Raises:
        Dropped: behind them stands damage.
    """
    all_found = (step.found for step in steps)
    block = bytearray()
    for found in all_found:
        while isinstance(found, Beginning):
            found = yield from _snapshot_blocks(found, all_found, directory)
        if isinstance(found, Ending):
            yield bytes(block)
            if found.damage is not None:
                raise Dropped(f"the backup is damaged: {found.damage}")
            return
        block += protocol.encode_change(found)
        if len(block) >= BLOCK_SIZE:
            yield bytes(block)
            block.clear()


def _snapshot_blocks(
    beginning: Beginning, following: Iterator[Found], directory: str
) -> Generator[bytes, None, Found]:
    """The SNAPSHOT packet of the pieces that come first; returns what comes after them."""
    deflate = zlib.compressobj(1)
    # The packet begins with its length, and memory is bounded: hence a scratch file.
    with tempfile.TemporaryFile(dir=directory) as packed:
        for found in following:
            if not isinstance(found, Change) or found.snapshot is None:
                break
            packed.write(deflate.compress(found.snapshot))
        packed.write(deflate.flush())
        yield protocol.snapshot_header(beginning.version, packed.tell())
        packed.seek(0)
        while block := packed.read(BLOCK_SIZE):
            yield block
    return found


class Server:
    """Listens, and gives each connection its thread.

    Args:
        backend: open for writing.
        address: where to listen, ``host:port``; a name means all its addresses.
        least: when to compact, see compaction.parse_least.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, backend: FileBackend, address: str, least: int | None) -> None:
        self.keeper = Keeper(backend)
        self.compactor = Compactor(backend, self.keeper.lock)
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._numbers = itertools.count(1)
        self._wake_read, self._wake_write = os.pipe()
        self._exit_code: int | None = None
        self._stopping = threading.RLock()  # A signal may come while it is held.
        self._listeners = listen(address)
        self._housekeeper = Housekeeper(backend, self.compactor, least)

    def run(self) -> int:
        """Serve until a signal or a failing disk; the exit code."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for number in unwind.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: self._stop(0))
        # A signal that comes just before select() sleeps would not end that sleep.
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._housekeeper.start()
        with selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ, listener)
            selector.register(self._wake_read, selectors.EVENT_READ, None)
            while self._exit_code is None:
                for key, _ in selector.select():
                    if key.data is not None:
                        self._accept(key.data)
        for listener in self._listeners:
            listener.close()
        signal.set_wakeup_fd(-1)
        with self._stopping:  # Whoever stopped it may not have written yet.
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._housekeeper.stop()
        # Finish the change in hand; nothing is written after it.
        self.keeper.lock.acquire()
        self.keeper.backend.close()
        log.log(NOTICE, "stopped")
        return self._exit_code

    def _stop(self, exit_code: int) -> None:
        with self._stopping:
            if self._exit_code is None:
                self._exit_code = exit_code
                os.write(self._wake_write, b"x")

    def guard(self, write: Callable[[], None]) -> None:
        """Call ``write``; if the disk fails, stop: what it holds can only be seen anew."""
        try:
            write()
        except DiskError as error:
            log.critical(f"{error} The server stops; start it again when the disk is well.")
            self._stop(1)
            raise

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
            stream = Stream(sock)
        except OSError as error:
            log.warning(f"a connection could not be accepted: {error}")
            time.sleep(ACCEPT_PAUSE_S)  # Out of descriptors, say: do not spin.
            return
        peer = "[{}]:{}" if sock.family is socket.AF_INET6 else "{}:{}"
        connection = Connection(self, stream, peer.format(*address[:2]), next(self._numbers))
        if not self._make_room():
            log.warning(f"{connection}: closed: {MAX_CONNECTIONS} connections are busy")
            stream.close()
            return
        with self._lock:
            self._connections.add(connection)
        threading.Thread(target=connection.run, daemon=True).start()

    def _make_room(self) -> bool:
        """Whether one more connection may come; the idlest reader makes way for it."""
        with self._lock:
            if len(self._connections) < MAX_CONNECTIONS:
                return True
            idle = [c for c in self._connections if not c.busy and not self.keeper.is_writer(c)]
            if not idle:
                return False
            idlest = min(idle, key=lambda connection: connection.last_heard)
            self._connections.discard(idlest)
        log.warning(f"{idlest}: closed: it was idle, and {MAX_CONNECTIONS} connections are open")
        idlest.cut()
        return True

    def forget(self, connection: Connection) -> None:
        """``connection`` is closed."""
        with self._lock:
            self._connections.discard(connection)


def listen(address: str) -> list[socket.socket]:
    """Sockets that listen at all addresses of ``host:port``; ConfigError if one cannot."""
    try:
        host = parse_host_port(address)
        found = socket.getaddrinfo(
            host.host, host.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"Cannot listen on {address!r}: {error}.", "Use HOST:PORT.") from error
    listeners: list[socket.socket] = []
    try:
        for family, _, _, _, place in dict.fromkeys(found):
            listeners.append(socket.create_server(place[:2], family=family, backlog=64))
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ConfigError(
            f"Cannot listen on {address}: {error.strerror or error}.",
            "Stop what uses the port, or choose another.",
        ) from error
    if not all(ipaddress.ip_address(sock.getsockname()[0]).is_loopback for sock in listeners):
        log.warning(
            f"{address} is not a loopback address: whoever reaches it can read the backup and"
            " write to it. Use a VPN, an SSH forward or an onion service."
        )
    return listeners
