"""What follows from two looks at a register."""

from __future__ import annotations

import pytest

from storaged.meta.consensus.looks import Held, Look, accepted_everywhere, chosen, moved_on, outdated
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.names import ZERO_BALLOT, Ballot, Value, Visibility

QUORUM = Quorum(("a", "b", "c"))


def look(quorum: Quorum = QUORUM, **counters: int) -> Look:
    held = {
        disk: Held(
            Ballot(1, counter, "g", b"") if counter else ZERO_BALLOT, Value(counter, b"o", 2, b"") if counter else None
        )
        for disk, counter in counters.items()
    }
    return Look(quorum, held)


@pytest.mark.parametrize(
    ("first", "second", "found", "everywhere"),
    [
        ({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}, True, True),
        ({"a": 0, "b": 1, "c": 0}, {"a": 2, "b": 2, "c": 2}, True, True),
        ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}, False, False),
        ({"a": 0, "b": 0, "c": 0}, {"a": 0, "b": 0, "c": 0}, False, False),
        ({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 1}, True, False),
        ({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2}, True, False),
        ({"a": 1, "b": 1}, {"a": 2, "b": 2, "c": 2}, True, False),
        ({"a": 1, "b": 2, "c": 2}, {"a": 2, "b": 2, "c": 2}, False, False),
        ({"a": 1, "b": 1, "c": 2}, {"a": 2, "b": 2, "c": 2}, True, False),
        ({"a": 1}, {"a": 2, "b": 2, "c": 2}, False, False),
        ({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 3, "c": 1}, False, False),
        ({"a": 3, "b": 3, "c": 3}, {"a": 2, "b": 2, "c": 2}, False, False),
    ],
)
def test_only_what_a_group_has_accepted_since_counts(
    first: dict[str, int], second: dict[str, int], found: bool, everywhere: bool
) -> None:
    assert (moved_on(look(**first), look(**second)) is not None) is found
    assert (moved_on(look(**first), look(**second), everywhere=True) is not None) is everywhere


def test_replicas_that_hold_different_values_under_one_ballot_are_no_group() -> None:
    second = look(a=2, b=2, c=2)
    lie = Held(second.held["c"].ballot, None)
    second = second._replace(held={**second.held, "c": lie, "b": lie._replace(value=Value(2, b"another", 2, b""))})
    assert moved_on(look(a=1, b=1, c=1), second) is None


def test_looks_at_two_layouts_show_nothing() -> None:
    assert moved_on(look(a=1, b=1, c=1), look(Quorum(("a", "b", "d")), a=2, b=2, d=2)) is None


def test_while_a_layout_changes_both_sets_count() -> None:
    joint = Quorum(("a", "b", "c"), ("a", "d", "e"))
    before = look(joint, a=1, b=1, c=1, d=1, e=1)
    assert moved_on(before, look(joint, a=2, b=2, c=2, d=1, e=1)) is None
    assert moved_on(before, look(joint, a=2, b=2, c=1, d=2, e=1)) is not None


def test_a_replica_that_sends_another_value_with_the_right_digest_is_not_believed() -> None:
    at, before = Ballot(1, 2, "g", b""), Ballot(1, 1, "g", b"")
    lie, truth, old = (Value(1, b"o", Visibility.LIVE, body) for body in (b"lie", b"truth", b"old"))
    held = {"a": Held(at, lie), "b": Held(at, truth), "c": Held(before, old)}
    assert chosen(Look(QUORUM, held)) is None
    held["c"] = held["b"]
    found = chosen(Look(QUORUM, held))
    assert found is not None
    assert found.value == truth


def test_a_chosen_value_is_accepted_everywhere_when_no_replica_may_be_below_it() -> None:
    """Values with the body ``x`` come from it, or from an earlier proposal of the same change."""

    def holding(quorum: Quorum = QUORUM, *, without: str = "", **counters: int) -> Look:
        found = look(quorum, **counters)
        held = {
            disk: one._replace(value=Value(1, b"o", Visibility.LIVE, b"" if disk in without else b"x"))
            for disk, one in found.held.items()
        }
        return found._replace(held=held)

    def everywhere(found: Look) -> bool | None:
        return accepted_everywhere(found, lambda value: value.body == b"x")

    assert everywhere(holding(a=1, b=1, c=1))
    assert everywhere(holding(a=3, b=2, c=2)), "a change is under way"
    assert everywhere(holding(a=3, b=2, c=1)) is False, "the last one may have an earlier proposal"
    assert everywhere(holding(a=2, b=2, c=1)) is False
    assert everywhere(holding(a=1, b=1, c=1, without="c")) is False
    assert everywhere(look(a=1, b=1, c=0)) is False
    assert everywhere(holding(a=1, b=1)) is None
    joint = Quorum(("a", "b", "c"), ("a", "d", "e"))
    assert everywhere(holding(joint, a=2, b=2, c=1, d=1, e=1))
    assert everywhere(holding(joint, a=2, b=2, c=1, d=2, e=1)) is False
    assert everywhere(holding(joint, a=2, b=2, c=2, d=2)) is None


@pytest.mark.parametrize(
    ("objects", "others", "found"),
    [
        ({}, {"a": 1, "b": 2, "c": 3}, True),
        ({"c": 1}, {"a": 2, "b": 2}, True),
        ({"c": 1}, {"a": 2, "b": 0}, False),
        ({"c": 1}, {"a": 2}, False),
        ({"c": 3}, {"a": 2, "b": 2}, False),
        ({"b": 1, "c": 2}, {"a": 3}, False),
        ({"a": 1, "b": 2, "c": 2}, {}, False),
    ],
)
def test_an_object_is_outdated_when_a_majority_has_something_newer(
    objects: dict[str, int], others: dict[str, int], found: bool
) -> None:
    held = {disk: Held(Ballot(1, counter, "g", b""), Value(1, b"o", 2, b"object")) for disk, counter in objects.items()}
    assert outdated(Look(QUORUM, {**look(**others).held, **held}), lambda value: value.body == b"object") is found
