"""Sessions under the version rule, and what a Change takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import backend
from backend import (
    EMPTY_CHAIN,
    FOREIGN_KEYS_OFF,
    MAX_CHUNK_SIZE,
    Backend,
    Change,
    Session,
    bump,
    chain_after,
    payload_bumps,
)
from errors import BackupError, InvalidChange, LostState, OutOfDate

FOREIGN_KEYS_ON = "PRAGMA foreign_keys = ON;"

# Sessions of a made-up node that does everything a node can do.


class MemoryBackend(Backend):
    """The changes that count, in a list, and every call that was made."""

    def __init__(self) -> None:
        super().__init__("file:///made/up")
        self.stored: list[Change] = []
        self.calls: list[str] = []

    def add_change(self, change: Change) -> None:
        assert change.base == self.version
        self.stored.append(change)
        self.version, self.rewindable = change.version, change.bumps
        self.calls.append("add")

    def rewind(self) -> None:
        assert self.rewindable and self.stored.pop().bumps
        self.version, self.rewindable = self.version - 1, False
        self.calls.append("rewind")

    def unused(self, *_: object) -> Any:
        raise AssertionError

    create = open = replace = take_over = read = status = close = require_absent = unused  # type: ignore
    note_proven = is_old = unused


class Node:
    """A node that writes through a Session, and its history as the node itself knows it.

    Attributes:
        history: the calls of the hook that count: commits that happened, and PRAGMA calls.
        version: the data_version of its database.
        abandoned: whether a commit was announced last that never happened.
    """

    def __init__(self) -> None:
        self.backend = MemoryBackend()
        self.history: list[Change] = []
        self.version = 0
        self.abandoned = False
        self._numbers = itertools.count()
        self.restart()

    def restart(self) -> None:
        """A new lightningd process: a new session."""
        self.session = Session(self.backend, "/node")

    def announce(self, *statements: str) -> Change:
        """One call of the hook. Unlike any other, so that a mix-up shows."""
        number = next(self._numbers)
        change = Change(self.version + 1, None, [f"-- {number}", *statements])
        self.session.write(change)
        self.abandoned = False
        return change

    def commit(self) -> None:
        self.history.append(self.announce(bump(self.version + 1)))
        self.version += 1

    def crash_before_commit(self) -> None:
        self.announce(bump(self.version + 1))
        self.abandoned = True
        self.restart()

    def crash_after_commit(self) -> None:
        self.commit()
        self.restart()

    def pragma(self) -> None:
        self.pragma_call(FOREIGN_KEYS_OFF)

    def pragma_on_and_crash(self) -> None:
        self.pragma_call(FOREIGN_KEYS_ON)
        self.restart()

    def pragma_call(self, statement: str) -> None:
        change = Change(self.version, None, [statement])
        self.session.write(change)
        self.abandoned = False
        self.history.append(change)

    # What must be noticed: the node's database moves without the backup.

    def write_alone(self, commits: int) -> None:
        self.version += commits
        self.restart()

    def go_back(self, commits: int) -> None:
        self.version -= commits
        self.restart()

    def check(self) -> None:
        """The backup holds the history, and at most the one change that was announced."""
        stored = self.backend.stored
        assert (stored[:-1] if self.abandoned else stored) == self.history
        versions = [change.version for change in stored if change.bumps]
        assert versions == list(range(1, len(versions) + 1)), "one change a version"


EVENTS = {
    "commit": Node.commit,
    "crash_before": Node.crash_before_commit,
    "crash_after": Node.crash_after_commit,
    "pragma": Node.pragma,
    "pragma_crash": Node.pragma_on_and_crash,
    "restart": Node.restart,
}
SEQUENCES = [names for n in range(6) for names in itertools.product(EVENTS, repeat=n)]


def test_no_sequence_of_a_sound_node_is_refused() -> None:
    rewinds = 0
    for names in SEQUENCES:
        node = Node()
        for name in names:
            EVENTS[name](node)
            node.check()
        rewinds += node.backend.calls.count("rewind")
        # However it stopped, the next session goes on.
        node.restart()
        node.commit()
        node.check()
    assert rewinds > 1000


def first_call(node: Node, pragma: bool) -> None:
    if pragma:
        node.pragma()
    else:
        node.commit()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("pragma", [False, True])
@pytest.mark.parametrize("commits", [1, 2])
def test_node_that_wrote_alone_is_refused_after_every_sequence(commits: int, pragma: bool) -> None:
    for names in SEQUENCES:
        node = Node()
        for name in names:
            EVENTS[name](node)
        node.write_alone(commits)
        before = list(node.backend.stored)
        if node.version <= node.backend.version:
            # It committed just the change that had been abandoned: no rule can tell.
            assert node.abandoned and commits == 1
            continue
        with pytest.raises(OutOfDate) as caught:
            first_call(node, pragma)
        assert caught.value.node_version == node.version
        assert caught.value.backup_version == node.backend.version
        assert node.backend.stored == before


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("pragma", [False, True])
@pytest.mark.parametrize("commits", [1, 2])
def test_node_that_lost_state_is_refused_after_every_sequence(commits: int, pragma: bool) -> None:
    refused = 0
    for names in SEQUENCES:
        node = Node()
        for name in names:
            EVENTS[name](node)
        if node.version < commits:
            continue
        node.go_back(commits)
        before, rewindable = list(node.backend.stored), node.backend.rewindable
        if rewindable and node.version == node.backend.version - 1:
            continue  # It looks like a crash before the commit.
        with pytest.raises(LostState) as caught:
            first_call(node, pragma)
        assert caught.value.node_version == node.version < node.backend.version
        assert node.backend.stored == before
        refused += 1
    assert refused > 1000


def test_only_the_first_change_of_a_session_rewinds() -> None:
    node = Node()
    node.commit()
    node.commit()
    node.version -= 1
    with pytest.raises(LostState):
        node.commit()
    assert node.backend.calls == ["add", "add"]


def test_a_refused_first_change_leaves_the_session_at_its_first() -> None:
    node = Node()
    node.commit()
    node.commit()
    node.go_back(2)
    with pytest.raises(LostState):
        node.commit()
    node.version = 1
    node.commit()
    assert node.backend.calls == ["add", "add", "rewind", "add"]


@pytest.mark.parametrize(
    ("crash", "line"),
    [
        (False, "Versions match up"),
        (True, "Last changes not applied, rewinding non-committed transaction"),
    ],
)
def test_lines_that_scripts_watch_for(
    crash: bool, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = Node()
    node.commit()
    (node.crash_before_commit if crash else node.crash_after_commit)()
    caplog.clear()
    with caplog.at_level("INFO", "backup"):
        node.commit()
        node.commit()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("Comparing backup version 2 ")
    assert second == line


# Change.


def of(*statements: str, version: int = 5) -> Change:
    return Change(version, None, statements)


AWKWARD = [
    "x",
    " ",
    "\n",
    "INSERT INTO t VALUES ('it''s', \"a\"\"b\", `c`, [d])",
    "-- a comment; DROP TABLE t",
    "SELECT 1 -- ends in a comment",
    "/* a\n * b\n */ SELECT 1 /* not closed",
    "a;b;;c",
    "line\none\r\ntwo\rthree\u2028four\u0085five\x0bsix\x1cseven",
    "\t\x01\x1b[0m\x7f\x80\x9f\ufeff\ufffe\uffff\ufffd",
    "emoji 👩‍👩‍👧 and 𝒜 \U0010ffff",
    "é and e\u0301 \u202e right to left",
    "\\0 \\n %s ? :name @x $y {} %(z)s",
    "x'00ff'",
    "'" * 1001,
    bump(4),
    FOREIGN_KEYS_OFF,
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_is_kept_exactly(text: str) -> None:
    for statements in ([text], [text, text], [text, bump(5)], ["a", text, "b"]):
        change = of(*statements)
        assert change.payload == "\0".join(statements).encode("utf-8")
        decoded = Change.decode(5, change.payload)
        assert decoded.transaction == statements
        assert decoded.payload == change.payload
        assert decoded == Change(5, None, statements) and decoded.bumps == change.bumps


def test_all_awkward_texts_in_one_change() -> None:
    assert Change.decode(5, of(*AWKWARD).payload).transaction == AWKWARD


@pytest.mark.parametrize("version", [-1, 2**32, 2**64, True, 1.0, "1", None])
def test_version_out_of_range_is_refused(version: Any) -> None:
    with pytest.raises(InvalidChange, match="data_version"):
        Change(version, None, ["x"])
    with pytest.raises(InvalidChange, match="data_version"):
        Change.decode(version, b"x")


@pytest.mark.parametrize("version", [0, 1, 2**31, 2**32 - 1])
def test_version_in_range_is_taken(version: int) -> None:
    assert of("x", version=version).version == version


@pytest.mark.parametrize("writes", ["x", "", b"x", 5, {"a": 1}, [1], [b"x"], [None], [["x"]]])
def test_writes_that_are_no_list_of_strings_are_refused(writes: Any) -> None:
    with pytest.raises(InvalidChange, match="version 5 is not a list of strings"):
        Change(5, None, writes)


def test_empty_writes_name_postgresql() -> None:
    with pytest.raises(InvalidChange, match="PostgreSQL") as caught:
        of()
    assert "cannot back up such a node" in caught.value.next_step


@pytest.mark.parametrize(
    "statements",
    [["\0"], ["a\0b"], ["a", "b\0"], ["\0", bump(5)], [""], ["a", ""], ["", "a"], ["a", "", "b"]],
)
def test_nul_and_empty_statements_are_refused_never_split(statements: list[str]) -> None:
    with pytest.raises(InvalidChange, match=r"version 5 .* NUL"):
        of(*statements)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc80\ud800"])
def test_lone_surrogate_is_refused(text: str) -> None:
    with pytest.raises(InvalidChange, match="version 5 is no valid text"):
        of("a", text)


def test_change_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.MAX_CHANGE_SIZE == 1 << 30
    monkeypatch.setattr(backend, "MAX_CHANGE_SIZE", 10)
    assert of("1234", "56789").payload == b"1234\x0056789"
    assert of("ééééé").version == 5
    for statements in (["1234", "567890"], ["éééééé"], ["x" * 11]):
        with pytest.raises(InvalidChange, match=r"version 5 has 1\d bytes; the limit is 10"):
            of(*statements)
        with pytest.raises(InvalidChange, match=r"version 5 has 1\d bytes; the limit is 10"):
            Change.decode(5, "\0".join(statements).encode())


def test_too_many_statements_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MAX_STATEMENTS", 3)
    assert Change.decode(5, of("a", "b", "c").payload).transaction == ["a", "b", "c"]
    with pytest.raises(InvalidChange, match="has 4 statements; the limit is 3"):
        of("a", "b", "c", "d")
    with pytest.raises(InvalidChange, match="has 4 statements; the limit is 3"):
        Change.decode(5, b"a\0b\0c\0d")


@pytest.mark.parametrize(("piece", "transaction"), [(None, None), (b"x", ["x"])])
def test_neither_or_both_kinds_are_refused(
    piece: bytes | None, transaction: Sequence[str] | None
) -> None:
    with pytest.raises(InvalidChange, match="either a piece of a snapshot or a transaction"):
        Change(5, piece, transaction)


def test_piece_of_a_snapshot_has_a_limit() -> None:
    assert len(Change(5, bytes(MAX_CHUNK_SIZE), None).payload) == MAX_CHUNK_SIZE
    for piece in (b"", bytes(MAX_CHUNK_SIZE + 1)):
        with pytest.raises(InvalidChange, match=f"piece of a snapshot has {len(piece)} bytes"):
            Change(5, piece, None)


@pytest.mark.parametrize(
    "payload", [b"", b"\0", b"a\0", b"\0a", b"a\0\0b", b"\xff", b"\xed\xa0\x80"]
)
def test_payload_that_is_no_transaction_does_not_decode(payload: bytes) -> None:
    with pytest.raises(InvalidChange):
        Change.decode(5, payload)


def judged(look: Callable[[int, bytes], bool], payload: bytes) -> bool | str:
    """What ``look`` says of ``payload`` at version 5, or why it refuses."""
    try:
        return look(5, payload)
    except InvalidChange as error:
        return str(error)


def test_look_at_a_payload_says_what_its_change_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MAX_STATEMENTS", 3)
    monkeypatch.setattr(backend, "MAX_CHANGE_SIZE", 3 * len(bump(5)))
    pieces = [b"", b"\0", b"a", "é".encode(), b"\xff", bump(5).encode(), bump(6).encode()]
    found = set()
    for length in range(6):
        for parts in itertools.product(pieces, repeat=length):
            payload = b"".join(parts)
            expected = judged(lambda *of: Change.decode(*of).bumps, payload)
            assert judged(payload_bumps, payload) == expected, payload
            found.add(expected)
    assert len(found) > 5 and {True, False} < found


def test_large_changes_are_handled_in_pieces() -> None:
    many = [f"statement {number} é \U0001f600" for number in range(3 * backend.JOINED_AT_ONCE + 1)]
    for statements in (
        many,
        many[: backend.JOINED_AT_ONCE],
        [*many, bump(5)],
        ["\U0001f600" * 2**19],
    ):
        found = of(*statements)
        assert found.payload == "\0".join(statements).encode()
        assert Change.decode(5, found.payload).transaction == statements
        assert payload_bumps(5, found.payload) == found.bumps == (statements[-1] == bump(5))
    for wrong in ("\ud800", "a\0b", ""):
        for place in (0, backend.JOINED_AT_ONCE, len(many)):
            with pytest.raises(InvalidChange):
                of(*many[:place], wrong, *many[place:])
    for shift in range(4):  # A character lies on the border of two pieces, or is cut off there.
        text = b"x" * (MAX_CHUNK_SIZE - shift) + "\U0001f600".encode()
        assert not payload_bumps(5, text)
        for cut in (text[:-1], text[: MAX_CHUNK_SIZE - shift + 1] + b"x" * MAX_CHUNK_SIZE):
            with pytest.raises(InvalidChange, match="not UTF-8"):
                payload_bumps(5, cut)
            with pytest.raises(InvalidChange, match="not UTF-8"):
                Change.decode(5, cut)


def test_known_forms() -> None:
    for known in (["a", bump(5)], ["PRAGMA foreign_keys = OFF;"], ["PRAGMA foreign_keys = ON;"]):
        assert of(*known).is_known
    for unknown in (["a"], [bump(6)], ["PRAGMA foreign_keys = OFF"], ["PRAGMA a = 1;"]):
        assert not of(*unknown).is_known
    assert not of("PRAGMA foreign_keys = OFF;", "PRAGMA foreign_keys = ON;").is_known


def test_bump_is_recognised_only_as_the_last_statement_and_word_for_word() -> None:
    # From the recorded traffic of a node.
    text = "UPDATE vars SET intval = intval + 1 WHERE name = 'data_version' AND intval = 4"
    assert bump(5) == text
    assert of("a", text).bumps and of("a", text).base == 4
    for statements in ([text, "a"], ["a"], [text + ";"], [" " + text], [bump(4)], [bump(6)]):
        assert not of(*statements).bumps
        assert of(*statements).base == 5
    assert not Change(5, b"a piece", None).bumps


def test_change_cannot_be_altered() -> None:
    for name in ("version", "snapshot", "transaction", "payload"):
        with pytest.raises(AttributeError):
            setattr(of("x"), name, None)
    assert not hasattr(of("x"), "__dict__")


def test_chain_names_a_history() -> None:
    one = chain_after(EMPTY_CHAIN, 1, b"a")
    # BLAKE2b of 16 bytes, from the coreutils: printf '\0...(16)\0\0\0\1a' | b2sum -l 128
    assert one.hex() == "5df6c7bd801c0da6af337326a83419d5"
    others = {
        chain_after(EMPTY_CHAIN, 2, b"a"),
        chain_after(EMPTY_CHAIN, 1, b"b"),
        chain_after(one, 1, b"a"),
    }
    assert len(others | {one}) == 4


def test_errors_are_one_line() -> None:
    for error in (OutOfDate(5, 7, "/n"), LostState(7, 5, "file:///x"), BackupError("a\nb", "c\n")):
        assert "\n" not in str(error)
