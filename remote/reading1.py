"""A restore from a server of protocol 1: snapshots as packets, and what was taken back, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import protocol
from backend import Beginning, Change
from decisions import Verdict, judge
from errors import BackupError
from protocol import Packet, PacketType, ProtocolError, SnapshotPart
from remote.link import SNAPSHOT_TIMEOUT_S, Link


def received(link: Link) -> Iterator[Beginning | Change]:
    """What the server sends after RESTORE; old ones also what was taken back.

    Raises:
        OSError: the connection is lost.
        BackupError: the server broke a rule.
    """
    inflater = protocol.Inflater(protocol.MAX_SNAPSHOT_SIZE)
    timeout_s: float | None = SNAPSHOT_TIMEOUT_S
    while True:
        # Before its first byte a server compresses all of the snapshot.
        event, timeout_s = link.event(timeout_s), None
        if isinstance(event, SnapshotPart):
            if event.first:
                inflater = protocol.Inflater(protocol.MAX_SNAPSHOT_SIZE)
                yield Beginning(event.version)
            for piece in inflater.feed(event.data):
                yield Change(event.version, piece, None)
            if event.last:
                inflater.finish()
        elif isinstance(event, Packet) and event.type is PacketType.CHANGE:
            yield protocol.decode_change(event.payload)
        elif event.type is PacketType.DONE:
            return
        else:
            raise ProtocolError(f"{event.type.name} may not come in a restore.")


def committed(all_found: Iterable[Beginning | Change]) -> Iterator[Beginning | Change]:
    """What the earlier plugin stored, without the changes that the node never committed.

    There, a change that was taken back is followed by what came in its place.

    Raises:
        BackupError: the versions do not follow each other; what stands before was given.
    """
    version, held = 0, None
    for found in all_found:
        if isinstance(found, Beginning) or found.snapshot is not None:
            version, held = found.version, None
            yield found
            continue
        rewindable = held is not None and held.bumps
        verdict = judge(found.base, version, rewindable, first=True)
        if verdict is not Verdict.REWIND and held is not None:
            yield held
        if verdict not in (Verdict.APPEND, Verdict.REWIND):
            raise BackupError(f"A change to version {found.version} follows version {version}.")
        version, held = found.version, found
    if held is not None:
        yield held
