"""A snapshot on its way to a server, over a line that may break."""

from __future__ import annotations

import contextlib
import os
import time
from typing import BinaryIO

import protocol
from backend import MAX_CHUNK_SIZE, Snapshot, log
from filelog import layout2
from filelog.layout2 import Head
from protocol import Details, Metadata, NackCode, ProtocolError, RecordPacker
from remote import protocol1
from remote.address import SocketUrl
from remote.effort import LEVELS, Effort
from remote.link import SNAPSHOT_TIMEOUT_S, Diverged, Link, Unreachable
from remote.patience import Patience

SAMPLE_SIZE = 1 << 17
"""Bytes of a piece that show what a level costs."""
BUSY_PAUSE_S = 1.0
"""Between two questions whether the server is done with a snapshot."""


def send_snapshot(
    url: SocketUrl, link: Link, before: Metadata, snapshot: Snapshot, owner: bytes, flags: int = 0
) -> None:
    """Have the server start over with ``snapshot``, which belongs to ``owner`` then.

    In protocol 2, when the line breaks a new one goes on where the server has it.

    Args:
        link: agreed on a protocol.
        before: what the server said there.
        flags: protocol.OVERRIDE, or 0.

    Raises:
        Unreachable: for ``retry_for`` nothing more of it came there.
        Refused: the server does not take it.
        ProtocolError: it broke a rule.
    """
    head = layout2.snapshot_head(snapshot, owner, time.time_ns())._replace(flags=flags)
    try:
        with open(snapshot.path, "rb") as source:
            if before.details is not None:
                return _Sending(url, source, head, before.details).run(link)
            protocol1.send_snapshot(link.send, source, snapshot)
        link.check_ack(link.answer(SNAPSHOT_TIMEOUT_S), link.ack_of(head))
    except OSError as error:
        raise link.last_words() or Unreachable(url.target, error) from error


class _Sending:
    def __init__(self, url: SocketUrl, source: BinaryIO, head: Head, before: Details) -> None:
        self._url = url
        self._source = source
        self._head = head
        self._before = before
        self._size = os.fstat(source.fileno()).st_size
        self._held = 0
        self._patience = Patience(url)

    def run(self, link: Link) -> None:
        """Send all of it, first over ``link``; OSError if the line broke for too long."""
        try:
            return self._send_rest(link)
        except OSError as error:
            lost = error
        while True:
            pause_s = self._patience.pause()
            if pause_s is None:
                raise lost
            log.warning(f"The line broke ({lost}); next try in {pause_s:.1f} s")
            time.sleep(pause_s)
            try:
                with contextlib.closing(Link(self._url)) as again:
                    if not self._is_stored(again):
                        self._send_rest(again)
                    return
            except OSError as error:
                lost = error

    def _is_stored(self, link: Link) -> bool:
        """Whether the server started over with it already; if not, go to where it has it."""
        while True:
            details = link.metadata().details
            if details is None:
                raise ProtocolError(f"The server {self._url.target} speaks protocol 1 now.")
            if details.chain == self._head.chain:
                return True
            if details.chain != self._before.chain:
                raise Diverged(NackCode.OTHER_HISTORY, "another one has written meanwhile")
            held = link.held(self._head.chain)
            if held != protocol.ALL_HELD:
                break
            self._patience.came_on()  # It looks at what it has, which takes a while.
            time.sleep(BUSY_PAUSE_S)
        if held > self._held:
            self._patience.came_on()
        self._held = held
        self._source.seek(held)
        return False

    def _send_rest(self, link: Link) -> None:
        try:
            self._send_pieces(link)
            link.check_ack(link.answer(SNAPSHOT_TIMEOUT_S), link.ack_of(self._head))
        except OSError as error:
            refused = link.last_words()
            if refused is not None:
                raise refused from error
            raise

    def _send_pieces(self, link: Link) -> None:
        link.still_s = self._patience.still_s
        effort, number = Effort(), 0
        # An answer that comes early says no.
        while not link.has_answer() and (piece := self._source.read(MAX_CHUNK_SIZE)):
            flags = layout2.FINAL if self._source.tell() == self._size else 0
            flags |= self._head.flags
            head, number = self._head._replace(flags=flags, length=len(piece)), number + 1
            # What the levels cost is seen at the 1st, 2nd, 4th, 8th ... piece.
            for level in LEVELS if number & (number - 1) == 0 else ():
                _timed(effort, RecordPacker(level), head, piece[:SAMPLE_SIZE])
            link.packer.go_on_at(effort.level)
            packet = _timed(effort, link.packer, head, piece)
            link.send(packet)
            effort.sent(len(packet), link.queued())


def _timed(effort: Effort, packer: RecordPacker, head: Head, piece: bytes) -> bytes:
    began = time.perf_counter()
    packet = packer.pack(head, piece)
    effort.tried(packer.level, len(piece), len(packet), time.perf_counter() - began)
    return packet
