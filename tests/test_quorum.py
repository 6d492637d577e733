"""Decisions about several destinations: every combination of small ones, against their meaning."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest

from quorum import (
    Branches,
    End,
    Mark,
    Relation,
    Rule,
    compare,
    lead,
    may_go_on,
    may_start,
)

RULES = [Rule(n, k) for n in range(1, 6) for k in range(1, n + 1)]


def subsets(n: int, size: int) -> Iterator[set[int]]:
    return map(set, itertools.combinations(range(n), size))


@pytest.mark.parametrize("rule", RULES)
def test_numbers_by_enumeration(rule: Rule) -> None:
    for stored in subsets(rule.n, rule.k):
        assert all(stored & heard for heard in subsets(rule.n, rule.to_read))
        assert all(stored & heard for heard in subsets(rule.n, rule.to_start))
        assert all(stored - lost for lost in subsets(rule.n, rule.survives))
        assert any(not stored - lost for lost in subsets(rule.n, rule.survives + 1))
    fewer = subsets(rule.n, rule.to_read - 1)
    assert any(not stored & heard for heard in fewer for stored in subsets(rule.n, rule.k))
    assert rule.n - rule.goes_on_without >= rule.k > rule.n - rule.goes_on_without - 1
    apart = any(not a & b for a in subsets(rule.n, rule.k) for b in subsets(rule.n, rule.k))
    assert rule.may_split == apart


def test_acknowledged_and_started_by_enumeration() -> None:
    for rule in RULES:
        for one, other in itertools.product(range(rule.n + 1), repeat=2):
            if one + other > rule.n:
                continue
            expected = None if rule.k <= one + other else False
            assert may_go_on(rule, one, other) is (True if one >= rule.k else expected)
            for voting, patient in itertools.product(range(one + 1), (False, True)):
                found = may_start(rule, voting, one, other, patient)
                knows, writes = rule.n - rule.k + 1, rule.k
                if voting >= knows and one >= writes:
                    assert found is (None if other and patient else True)
                else:
                    possible = voting + other >= knows and one + other >= writes
                    assert found is (None if possible else False)


# Histories, as small logs: each record is a letter; "<" takes the one before it back.
# Capitals bump, small letters do not (a PRAGMA call).


class Log:
    """A log of ``text``, of which the first ``folded`` records stand in a snapshot."""

    def __init__(self, text: str, folded: int = 0) -> None:
        self.text = text
        self.marks: list[Mark] = [Mark(b"", False, 0)]
        self.befores = [b""]
        for letter in text:
            last = self.marks[-1]
            if letter == "<":
                assert last.rewindable
                mark = Mark(self.befores[-1], False, last.version - 1)
            else:
                bumps = letter.isupper()
                mark = Mark(last.chain + letter.encode(), bumps, last.version + bumps)
            self.befores.append(last.chain)
            self.marks.append(mark)
        del self.marks[:folded]
        if folded:
            # A snapshot cannot be taken back; the newest change is never in it.
            self.marks[0] = self.marks[0]._replace(rewindable=False)

    def end(self, term: int = 0) -> End:
        last = self.marks[-1]
        return End(term, last.chain, last.rewindable, last.version, self.befores[-1])


def texts(longest: int) -> Iterator[str]:
    """All logs of few letters that a node can write."""
    for size in range(longest + 1):
        for letters in itertools.product("ABo<", repeat=size):
            text = "".join(letters)
            if all(a.isupper() for a, b in zip(" " + text, text, strict=False) if b == "<"):
                yield text


def effective(text: str) -> str:
    found = ""
    for letter in text:
        found = found[:-1] if letter == "<" else found + letter
    return found


ALL = list(texts(4))


def test_comparison_by_enumeration() -> None:
    seen = set()
    for mine, theirs in itertools.product(ALL, repeat=2):
        own, leader = Log(mine), Log(theirs)
        relation, place = compare(own.end(), leader.marks)
        seen.add(relation)
        if relation in (Relation.EQUAL, Relation.BEHIND):
            # Whatever it holds, with the rest it is what the leader is.
            assert effective(mine + "".join(theirs[place - 1 :])) == effective(theirs)
            assert (relation is Relation.EQUAL) == (place == len(leader.marks))
        elif relation is Relation.ONE_MORE:
            assert effective(mine + "<" + theirs[place - 1 :]) == effective(theirs)
        elif relation is Relation.APART:
            # More than one change that the other one has not, or one more and then a rewind.
            ends = {effective(theirs[:n]) for n in range(len(theirs) + 1)}
            assert effective(mine) not in ends
            assert mine.endswith("<") or effective(mine)[:-1] not in ends
        if theirs.startswith(mine):
            assert relation in (Relation.EQUAL, Relation.BEHIND)
            assert theirs[place - 1 :].count("<") <= theirs[len(mine) :].count("<")
        if mine == theirs:
            assert relation is Relation.EQUAL
    assert seen == set(Relation)


def test_a_change_that_can_be_taken_back_is_not_equal_to_one_that_was_not() -> None:
    """The log after a rewind, and one that ends in the change before: equal chains."""
    assert compare(Log("A").end(), Log("AB<").marks) == (Relation.BEHIND, 2)
    assert compare(Log("AB<").end(), Log("A").marks) == (Relation.EQUAL, 2)
    assert compare(Log("AB<").end(), Log("AB").marks)[0] is Relation.BEHIND
    assert compare(Log("A").end(), Log("AB<", folded=3).marks)[0] is Relation.FOLDED


def test_what_is_folded_away() -> None:
    leader = Log("ABABAB", folded=4)
    for text in ("", "A", "AB", "ABB", "AA", "ABAA"):
        assert compare(Log(text).end(), leader.marks) == (Relation.FOLDED, 0)
    assert compare(Log("ABAB").end(), leader.marks) == (Relation.BEHIND, 1)
    assert compare(Log("ABABA").end(), leader.marks) == (Relation.BEHIND, 2)
    assert compare(Log("ABABB").end(), leader.marks) == (Relation.ONE_MORE, 1)
    assert compare(Log("ABABo").end(), leader.marks)[0] is Relation.ONE_MORE_FOR_GOOD
    assert compare(Log("AAAAAA").end(), leader.marks)[0] is Relation.APART


def test_no_compaction_makes_another_history_of_one() -> None:
    """Whoever can be brought up to date still can, wherever the leader's log is cut."""
    theirs = [text for text in texts(5) if text[:2] == "Ao"]
    for mine, leading in itertools.product(texts(3), theirs):
        end = Log(mine).end()
        if compare(end, Log(leading).marks)[0] is Relation.APART:
            continue
        for folded in range(1, len(leading)):
            found, _ = compare(end, Log(leading, folded).marks)
            assert found is not Relation.APART, (mine, leading, folded)


def relation_of(logs: Sequence[Log]) -> tuple[list[End], object]:
    ends = [log.end() for log in logs]
    return ends, lambda one, other: compare(ends[one], logs[other].marks)[0]


def test_of_one_term_the_longest_leads() -> None:
    """Some hold the start of a term, others what came then, which may begin with a rewind."""
    for before, written in itertools.product(texts(2), texts(3)):
        for rewind in ("", "<") if before.endswith(("A", "B")) else ("",):
            whole = before + rewind + written
            if "<" in written:
                continue  # Within a session nothing is taken back.
            sizes = range(len(before), len(whole) + 1)
            for some in itertools.product(sizes, repeat=3):
                logs = [Log(whole[:size]) for size in some]
                ends = [
                    log.end(6 + (size > len(before))) for log, size in zip(logs, some, strict=True)
                ]
                leader = lead(ends, lambda a, b: compare(ends[a], logs[b].marks)[0])  # noqa: B023
                longest = logs[some.index(max(some))].end()
                found = logs[leader].end()
                assert (found.chain, found.rewindable) == (longest.chain, longest.rewindable)


def test_the_higher_term_leads_though_it_is_shorter() -> None:
    logs = [Log("ABA"), Log("AB"), Log("ABB")]
    for terms, leader in (((1, 2, 1), 1), ((3, 2, 1), 0), ((1, 2, 3), 2)):
        ends = [log.end(term) for log, term in zip(logs, terms, strict=True)]
        assert lead(ends, lambda a, b: compare(ends[a], logs[b].marks)[0]) == leader  # noqa: B023


def test_two_branches_are_refused_and_named() -> None:
    logs = [Log("ABAA"), Log("AB"), Log("ABBB")]
    ends = [logs[0].end(1), logs[1].end(1), logs[2].end(2)]
    with pytest.raises(Branches) as caught:
        lead(ends, lambda a, b: compare(ends[a], logs[b].marks)[0])
    assert (caught.value.one, caught.value.other) == (0, 2)


def test_equal_ends_ask_for_no_records() -> None:
    def never(one: int, other: int) -> Relation:
        raise AssertionError((one, other))

    ends = [Log("AB").end(3), Log("AB").end(4), Log("AB").end(3)]
    assert lead(ends, never) == 1
