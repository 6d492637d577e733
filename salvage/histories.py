"""Which histories the records lead to: a whole snapshot, or the empty beginning, and changes.

The chain names a history, so each change has its place behind exactly one other, whatever file,
generation or destination it was found in. What leads on is followed to its last change; where it
parts in two, both ends are histories.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backend import EMPTY_CHAIN, TAG_SIZE
from filelog import layout2
from filelog.layout2 import Head
from salvage.index import Index, Piece

MOST_TIPS = 10_000
"""Ends of histories that are looked at."""
MOST_SNAPSHOTS = 10_000
"""Snapshots that are looked at."""
_SNAPSHOTS = (
    "SELECT DISTINCT backup, sequence, version, chain FROM pieces WHERE kind = 1 AND whole = 1"
    f" AND offset = {layout2.FIRST_RECORD}"
)


@dataclass(frozen=True, slots=True)
class Root:
    """Where a history can begin.

    Attributes:
        chain: what it stands for.
        version: its data_version.
        pieces: ids of the snapshot's pieces, in order; none for the empty beginning.
    """

    chain: bytes
    version: int
    pieces: array[int]


@dataclass(frozen=True, slots=True)
class History:
    """A root and an unbroken chain of changes from it.

    Attributes:
        root: where it begins.
        tip: head of the last change, or of the snapshot.
        branches: it parts from another one, so neither is known to be the newest.
    """

    root: Root
    tip: Head
    branches: bool


def find(index: Index) -> list[History]:
    """All histories, the highest version, and of that the highest sequence, first.

    If there are MOST_TIPS of them, there may be more.
    """
    roots = {root.chain: root for root in _roots(index)}
    covered: set[bytes] = set()
    tips: dict[bytes, tuple[Head, bool]] = {}
    for root in sorted(roots.values(), key=lambda r: r.version):
        if root.chain in covered:
            continue  # A compaction of what another root leads to.
        for tip, parts in _tips(index, root, roots, covered):
            tips[tip.chain] = tip, parts
            if len(tips) >= MOST_TIPS:
                break
    found = [History(_nearest(index, tip.chain, roots), tip, parts) for tip, parts in tips.values()]
    return sorted(found, key=lambda h: (-h.tip.version, -h.tip.sequence, h.tip.chain))


def chosen(histories: Sequence[History], most: int) -> list[History]:
    """``most`` of them, in the same order: of every owner the first, then of every the second.

    So the many of one node do not hide those of another one of lower versions.
    """
    seen: Counter[bytes] = Counter()
    ranks = []
    for found in histories:
        ranks.append(seen[found.tip.tag])
        seen[found.tip.tag] += 1
    best = sorted(range(len(ranks)), key=ranks.__getitem__)[:most]
    return [histories[number] for number in sorted(best)]


def snapshots_not_seen(index: Index) -> bool:
    """Whether there are more snapshots than are looked at."""
    query = f"SELECT 1 FROM ({_SNAPSHOTS}) LIMIT 1 OFFSET {MOST_SNAPSHOTS}"
    return bool(index.ask(query))


def _roots(index: Index) -> Iterator[Root]:
    if index.children(EMPTY_CHAIN):
        yield Root(EMPTY_CHAIN, 0, array("q"))
    groups = index.ask(f"{_SNAPSHOTS} ORDER BY version DESC LIMIT {MOST_SNAPSHOTS}")
    for group in groups:
        yield from _snapshots(index, group)


def _snapshots(index: Index, group: tuple[object, ...]) -> Iterator[Root]:
    """The whole snapshot of a group of pieces, if it is whole."""
    where = "kind = 1 AND whole = 1 AND backup = ? AND sequence = ? AND version = ? AND chain = ?"
    order = "ORDER BY offset, place"
    found = _assembled(index.pieces(f"{where} {order}", *group))
    if found is not None:
        yield found
        return
    # Two snapshots may name the same. Which piece is whose is only known of one in one extent.
    starts = index.pieces(f"{where} AND offset = {layout2.FIRST_RECORD} {order} LIMIT 100", *group)
    for start in list(starts):
        here = f"{where} AND place - offset = ? AND place >= ? {order}"
        apart = start.place - start.head.offset
        found = _assembled(index.pieces(here, *group, apart, start.place))
        if found is not None:
            yield found
            return


def _assembled(pieces: Iterator[Piece]) -> Root | None:
    """The snapshot of these pieces, which are in order, if it is whole and there is only one."""
    ids: array[int] = array("q")
    last: Head | None = None
    for piece in pieces:
        head = piece.head
        if last is not None and head.offset == last.offset:
            if _content(head) != _content(last):
                return None
            continue  # Another copy of it.
        if last is not None and (head.offset != last.end or last.flags & layout2.FINAL):
            return None
        if last is not None and _content(head)[:2] != _content(last)[:2]:
            return None
        ids.append(piece.id)
        last = head
    if last is None or not last.flags & layout2.FINAL:
        return None
    return Root(last.chain, last.version, ids)


def _content(head: Head) -> tuple[object, ...]:
    return head.time_ns, head.session, head.flags, head.length, head.payload_crc


def _tips(
    index: Index, root: Root, roots: dict[bytes, Root], covered: set[bytes]
) -> Iterator[tuple[Head, bool]]:
    """The ends of what leads on from ``root``, and whether each parts from another."""
    stack = [(root.chain, False)]
    while stack:
        chain, parts = stack.pop()
        if chain in roots:
            covered.add(chain)
        children = _alive(index, chain)
        # Of the empty beginning are many that have nothing to do with each other.
        parts = parts or (len(children) > 1 and chain != EMPTY_CHAIN)
        stack += [(child, parts) for child in children]
        if children or chain == EMPTY_CHAIN:
            continue
        piece = index.change_to(chain) or index.piece("id = ?", roots[chain].pieces[-1])
        assert piece is not None
        yield piece.head, parts


def _alive(index: Index, chain: bytes) -> list[bytes]:
    """What whole changes lead to from ``chain``, but for those that were taken back."""
    children = index.children(chain)
    alone = len(children) == 1
    return [c for c in children if index.children(c) or not _was_taken_back(index, c, alone)]


def _was_taken_back(index: Index, chain: bytes, alone: bool) -> bool:
    """Whether the change that leads to ``chain``, with none behind it, never was committed."""
    newest = "SELECT backup, max(sequence) FROM pieces WHERE kind = {} AND {} = ? GROUP BY backup"
    rewinds = index.ask(newest.format(3, "before"), chain)
    # Announced again after that, it may have been committed.
    changes = dict(index.ask(newest.format(2, "chain"), chain)) if rewinds else {}
    if any(sequence > changes.get(backup, -1) for backup, sequence in rewinds):
        return True
    own = None if alone else index.change_to(chain)
    return own is not None and _came_in_its_place(index, own)


def _came_in_its_place(index: Index, own: Piece) -> bool:
    """Whether its writer went on from before it: it must have been taken back in between."""
    head = own.head
    return any(
        other.head.backup_id == head.backup_id
        and other.head.sequence >= head.sequence + 2
        and other.head.session[:TAG_SIZE] == head.session[:TAG_SIZE]
        for other in index.pieces(
            "before = ? AND kind = 2 AND chain != ? LIMIT 100", head.chain_before, head.chain
        )
    )


def _nearest(index: Index, chain: bytes, roots: dict[bytes, Root]) -> Root:
    while chain not in roots:
        piece = index.change_to(chain)
        assert piece is not None
        chain = piece.head.chain_before
    return roots[chain]


def path(index: Index, history: History) -> array[int]:
    """The ids of the changes from the root to the tip."""
    ids: array[int] = array("q")
    chain = history.tip.chain
    while chain != history.root.chain:
        piece = index.change_to(chain)
        assert piece is not None
        ids.append(piece.id)
        chain = piece.head.chain_before
    ids.reverse()
    return ids


@dataclass(frozen=True, slots=True)
class Hole:
    """Changes that stand behind a hole.

    Attributes:
        first, last: data_versions of the first and the last of them, without another hole.
        count: how many there are.
        place: of the first.
        backup_id: of the first.
    """

    first: int
    last: int
    count: int
    place: int
    backup_id: bytes


def behind_holes(index: Index, most: int) -> tuple[list[Hole], int]:
    """What is whole, but has nothing whole before it.

    Returns:
        The ``most`` highest of them, the highest first, and how many there are.
    """
    lost = (
        " FROM pieces WHERE kind = 2 AND whole = 1 AND before != zeroblob(16) AND NOT EXISTS"
        " (SELECT 1 FROM pieces p WHERE p.chain = pieces.before AND p.whole = 1 AND p.kind < 3)"
    )
    ((count,),) = index.ask(f"SELECT count(DISTINCT chain){lost}")
    starts = index.ask(
        f"SELECT chain, max(version), min(place){lost} GROUP BY chain ORDER BY 2 DESC LIMIT ?", most
    )
    return [_run(index, *start) for start in starts], count


def _run(index: Index, chain: bytes, first: int, place: int) -> Hole:
    start = index.change_to(chain)
    assert start is not None
    last, count = start.head, 1
    while count < 10_000_000 and (children := _alive(index, last.chain)):
        piece = index.change_to(children[0])
        assert piece is not None
        last, count = piece.head, count + 1
    return Hole(first, last.version, count, place, start.head.backup_id)
