"""What is decided about versions, owners and databases: pure functions of plain values.

Nothing is read and nothing is done here. Who asks has looked before, and acts after.
"""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """What the version rule says of a change."""

    APPEND = "append"
    REWIND = "rewind the last change, then append"
    OUT_OF_DATE = "the node is ahead"
    LOST_STATE = "the backup is ahead"


class Obstacle(enum.Enum):
    """Why a command may not go on."""

    NO_DATABASE = "the node has no database, and the backup has one"
    OUT_OF_DATE = "the node is ahead"
    ONE_BEHIND = "the backup is ahead by the change that a crash leaves"
    LOST_STATE = "the backup is ahead"
    OLD_COPY = "the backup is damaged, and the node is behind what its header names"
    HEALING_OFF = 'backup.lock says "heal": "off"'
    LOST_BEFORE = "a start was refused before, because the node seemed to have lost some state"
    NOT_ITS_OWN = "the backup holds nothing and is nobody's: it may be another one in its place"
    DAMAGED_END = "the backup's end is damaged, so that newer versions may have stood there"
    OTHER_VERSION = "the node's database is of another version than lightningd's change"
    OTHER_NODE = "the backup is of another node than the database"


def judge(base: int, version: int, rewindable: bool, first: bool) -> Verdict:
    """The version rule.

    Args:
        base: the version that the node's database has before the change.
        version: the backup's version.
        rewindable: the backup's last record is a change that bumps.
        first: the change is the first of a session, where the last stored one may
            never have been committed.
    """
    if base == version:
        return Verdict.APPEND
    if first and rewindable and base == version - 1:
        return Verdict.REWIND
    return Verdict.OUT_OF_DATE if base > version else Verdict.LOST_STATE


def may_attach(node: int, backup: int, rewindable: bool, has_database: bool) -> Obstacle | None:
    """What keeps a node from going on with a backup, or None: its next change would fit.

    Args:
        node: the version of the node's database, 0 if it has none.
        backup: the backup's version.
        rewindable: the backup's last record is a change that bumps.
        has_database: the node has a database, be it an empty one.
    """
    verdict = judge(node, backup, rewindable, first=True)
    if verdict is Verdict.OUT_OF_DATE:
        return Obstacle.OUT_OF_DATE
    if verdict is Verdict.LOST_STATE:
        return Obstacle.LOST_STATE if has_database else Obstacle.NO_DATABASE
    return None


def may_resync(node: int, backup: int) -> Obstacle | None:
    """What keeps the node's database from replacing a backup, or None: it is no older.

    Args:
        node: the version of the node's database, 0 if it has none or an empty one.
        backup: the highest version that is known of the backup, also behind damage.
    """
    if node == 0:
        return Obstacle.NO_DATABASE
    if node >= backup:
        return None
    return Obstacle.ONE_BEHIND if node == backup - 1 else Obstacle.LOST_STATE


def may_upgrade(node: int, backup: int, rewindable: bool, named: int) -> Obstacle | None:
    """What keeps the node's database from replacing a backup of the earlier plugin, or None.

    The database is ahead where that plugin missed a change, and behind by one where the last
    change is an abandoned one: it has the last word.

    Args:
        node: the version of the node's database.
        backup: the version up to which the backup is good.
        rewindable: the backup's last record is a change that bumps.
        named: the version that the backup's header names, 0 if it names none.
    """
    if judge(node, backup, rewindable, first=True) is Verdict.LOST_STATE:
        return Obstacle.LOST_STATE
    return Obstacle.OLD_COPY if node < named - 1 else None


def may_write(found: bytes, owner: bytes | None) -> bool:
    """Whether ``owner`` may write to a backup.

    Args:
        found: the tag of the backup's owner (backend.TAG_SIZE bytes, zeros for nobody).
        owner: who wants to write, or None: whose the backup is does not matter.
    """
    return owner is None or owner[: len(found)] == found


def may_replace(found: bytes | None, owner: bytes | None) -> bool:
    """Whether ``owner`` may start a backup over: also one of nobody, or if nobody can tell.

    Args:
        found, owner: as in ``may_write``; None as ``found``: the destination cannot tell.
    """
    return found is None or not any(found) or may_write(found, owner)


def may_heal(
    verdict: Verdict, first: bool, off: bool, lost: bool, end_holds: bool, unknown: bool
) -> Obstacle | None:
    """What keeps a backup from being replaced by a snapshot while lightningd waits, or None.

    Args:
        verdict: of the change that waits, by the backup's newest record.
        first: that change is the first of its session.
        off: healing is switched off.
        lost: a start was refused for LOST_STATE, and no operator has looked since: a run
            without the plugin may have brought an old database up to any version.
        end_holds: the newest record is valid, and nothing behind it is in doubt.
        unknown: neither an owner nor a record tells that the backup is this node's.
    """
    if verdict is Verdict.LOST_STATE:
        return Obstacle.LOST_STATE
    if verdict is Verdict.OUT_OF_DATE and not first:
        return Obstacle.OUT_OF_DATE  # No node does that: something else is wrong.
    if not end_holds:
        return Obstacle.DAMAGED_END
    if unknown:
        return Obstacle.NOT_ITS_OWN
    if lost:
        return Obstacle.LOST_BEFORE
    return Obstacle.HEALING_OFF if off else None


def may_stand_for(base: int, found: int, node: str | None, backup: str | None) -> Obstacle | None:
    """What keeps a snapshot from standing for all that is before the change that waits, or None.

    Args:
        base: the version that the node's database has before the change.
        found: the snapshot's version.
        node: which node the snapshot is of, or None: it does not say.
        backup: which node the backup is of, or None.
    """
    if found != base:
        return Obstacle.OTHER_VERSION
    return Obstacle.OTHER_NODE if None not in (node, backup) and node != backup else None
