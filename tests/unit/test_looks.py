"""What follows from two looks at a register."""

from __future__ import annotations

import pytest

from storaged.meta.consensus.looks import Held, Look, chosen, moved_on, refuses_creates
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


def holding(node: str = "g", *, created: str = "", **counters: int) -> Look:
    """``created``: the disks that hold a create."""
    operation = {disk: b"c" * 14 + (bytes(2) if disk in created else b"\0\1") for disk in counters}
    return Look(
        QUORUM,
        {
            disk: Held(
                Ballot(1, counter, node if counter else "", b""),
                Value(1, operation[disk], Visibility.LIVE, b"") if counter else None,
            )
            for disk, counter in counters.items()
        },
    )


def test_creates_are_refused_where_every_replica_holds_a_row_and_no_minority_a_create_on_top() -> None:
    assert refuses_creates(holding(a=1, b=1, c=1))
    assert refuses_creates(holding(a=1, b=2, c=3)), "changes that are under way are no creates"
    assert refuses_creates(holding(a=1, b=1, c=1, created="abc"))
    assert refuses_creates(holding(a=2, b=2, c=1, created="ab")), "a quorum has taken the create"
    assert refuses_creates(holding(a=2, b=1, c=1, created="bc")), "a quorum had promised the ballot above it"
    assert not refuses_creates(holding(a=1, b=1, c=0)), "a late create is taken there"
    assert not refuses_creates(holding(a=1, b=1)), "nor is it known of a replica that does not answer"
    assert not refuses_creates(holding(a=1, b=1, c=2, created="c")), "it may be carried on"
    assert not refuses_creates(holding(a=1, b=1, c=2, created="abc"))
    assert not refuses_creates(Look(Quorum(("a", "b", "c"), ("a", "b", "d")), holding(a=1, b=1, c=1).held))


def test_a_floor_is_no_row_that_refuses_creates() -> None:
    floors = holding("", a=1, b=1, c=1)
    rows = holding(a=2, b=2, c=2)
    assert refuses_creates(rows)
    assert not refuses_creates(floors)
    assert not refuses_creates(Look(QUORUM, {**rows.held, "c": floors.held["c"]}))
