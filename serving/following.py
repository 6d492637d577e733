"""Who follows the backup gets each record once it is on stable storage."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import protocol
from backend import NOBODY, log
from errors import BackupError, Damaged, PlaceGone
from filebackend import FileBackend
from filelog import layout2
from filelog.following import LogFollower
from filelog.layout2 import Head, Kind
from filelog.reader import LogReader
from protocol import KEEP_S, Coming, Nack, NackCode, PacketType, RecordPacker
from serving.client import Client, Dropped
from serving.outgoing import BLOCK_SIZE, Outgoing

LOOK_S = 1.0
"""How often it is seen that a client which follows has left."""
GATHER_S = 0.01
"""How long what comes is gathered: a node's changes come in bursts, and need the core more."""


class Bell:
    """Wakes those who wait for the backup to change."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = 0

    def ring(self) -> None:
        """It may have changed."""
        if self._waiting:  # In the path of each change: nothing to do for most.
            with self._changed:
                self._changed.notify_all()

    def wait(self, has_changed: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for that; whether it has."""
        with self._changed:
            self._waiting += 1
            try:
                return self._changed.wait_for(has_changed, timeout_s)
            finally:
                self._waiting -= 1


class Follow:
    """One client that follows ``backend``, until its connection ends.

    Args:
        packer: packs the records that go over that connection.
        bell: rung after each change.
    """

    def __init__(
        self,
        client: Client,
        backend: FileBackend,
        outgoing: Outgoing,
        packer: RecordPacker,
        bell: Bell,
    ) -> None:
        self._client = client
        self._backend = backend
        self._outgoing = outgoing
        self._packer = packer
        self._bell = bell
        self._block = bytearray()
        self._begun = False
        self._seen = backend.newest

    def run(self, last: Head | None) -> None:
        """Send what stands behind ``last``, and what comes; returns if that is refused.

        Raises:
            Dropped: the client takes too little, or made way for others.
            OSError: it left.
        """
        follower = LogFollower(self._backend.path, last)
        try:
            self._send_for_ever(follower)
        except PlaceGone as error:
            self._refuse(NackCode.NO_SUCH_PLACE, error)
        except Damaged as error:
            self._refuse(NackCode.DAMAGED, error)
        except BackupError as error:
            self._refuse(NackCode.OTHER, error)

    def _send_for_ever(self, follower: LogFollower) -> None:
        spoke_s = -math.inf
        while True:
            self._seen = self._backend.newest
            # For each burst: who is in step has no turn.
            with self._outgoing.restoring():
                if self._gather(follower) or time.monotonic() - spoke_s > KEEP_S - LOOK_S:
                    self._block += protocol.encode(PacketType.PAUSE)
                    spoke_s = time.monotonic()
                self._send()
            if self._bell.wait(lambda: self._backend.newest is not self._seen, LOOK_S):
                time.sleep(GATHER_S)
            if self._client.ended:
                raise Dropped("it made way for others")
            self._outgoing.hear()

    def _gather(self, follower: LogFollower) -> bool:
        """Send what is there, but for the last of it; whether there is anything."""
        came = False

        def begins(reader: LogReader) -> None:
            if not self._begun:
                self._begun = True
                log_start = reader.log_start or layout2.FIRST_RECORD
                sizes = self._backend.size, layout2.snapshot_size(log_start)
                coming = Coming(*sizes, reader.backup_id or NOBODY)
                self._block += protocol.encode_following(coming, follower.last)

        for head, payload in follower.fresh(self._is_durable, begins):
            came = True
            self._block += self._packer.pack(head, payload)
            if len(self._block) >= BLOCK_SIZE:
                self._send()
        return came

    def _is_durable(self, head: Head) -> bool:
        newest = self._backend.newest
        if head.kind == Kind.SNAPSHOT or head.backup_id != newest.backup_id:
            return True  # All of a file that takes its place is flushed before, or was.
        return head.sequence < newest.sequence or (head.sequence, head.kind) == (
            newest.sequence,
            newest.kind,
        )

    def _send(self) -> None:
        data = bytes(self._block)
        self._block.clear()
        self._outgoing.send_block(data)

    def _refuse(self, code: NackCode, error: BackupError) -> None:
        log.info(f"{self._client}: does not go on: {error.problem}")
        nack = Nack(self._backend.version, code, error.problem)
        self._block += protocol.encode_nack(nack)
        self._outgoing.send(bytes(self._block))
        self._block.clear()
