"""Quorums of one set of disks, and of two while a layout changes."""

from __future__ import annotations

from itertools import combinations

import pytest

from storaged.meta.consensus.quorums import Quorum, View, met_by_all

GROUP = Quorum(("a", "b", "c"))
JOINT = Quorum(("a", "b", "c"), ("c", "d", "e"))


def test_a_majority_of_every_set_is_needed() -> None:
    assert GROUP.met({"a", "c"})
    assert not GROUP.met({"a"})
    assert not GROUP.met({"a", "x", "y"})
    assert not JOINT.met({"a", "b", "c"})
    assert JOINT.met({"a", "c", "d"})
    assert not met_by_all((GROUP, JOINT), {"a", "b", "c"})


def test_what_can_be_met_no_more_is_lost() -> None:
    assert not GROUP.lost({"a"})
    assert GROUP.lost({"a", "b"})
    assert JOINT.lost({"d", "e"})
    assert not JOINT.lost({"c"})


def test_the_disks_of_two_sets_are_each_named_once() -> None:
    assert JOINT.disks == ("a", "b", "c", "d", "e")
    assert GROUP.disks == ("a", "b", "c")


def test_the_shortest_beginning_is_asked() -> None:
    assert list(GROUP.prefix(["c", "a", "b"])) == ["c", "a"]
    assert list(JOINT.prefix(["c", "a", "b", "d", "e"])) == ["c", "a", "b", "d"]
    assert list(GROUP.prefix(["a"])) == ["a"]


def test_spare_disks_are_counted_of_the_poorest_set() -> None:
    assert GROUP.spare({"a", "b", "c"}) == 1
    assert GROUP.spare({"a"}) == -1
    assert JOINT.spare({"a", "b", "c", "d"}) == 0


def test_agreed_is_what_a_quorum_reports_alike() -> None:
    assert GROUP.agreed({"a": 1, "b": 2, "c": 2}) == 2
    assert GROUP.agreed({"a": 1, "b": 2}) is None
    assert JOINT.agreed({"a": 1, "b": 1, "c": 1}) is None
    assert JOINT.agreed({"a": 1, "c": 1, "d": 1}) == 1


def test_a_number_is_vouched_for_by_a_quorum_that_reports_it_or_more() -> None:
    assert GROUP.vouched({}) == 0
    assert GROUP.vouched({"a": 9}) == 0
    assert GROUP.vouched({"a": 9, "b": 7}) == 7
    assert GROUP.vouched({"a": 9, "b": 7, "c": 8}) == 8
    assert JOINT.vouched({"a": 9, "c": 8, "d": 7}) == 8
    assert JOINT.vouched({"a": 9}) == 0


@pytest.mark.parametrize("sets", [(), ((),), (("a",), ()), (("a", "a", "b"),)])
def test_what_is_no_set_of_disks_is_refused(sets: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(ValueError):
        Quorum(*sets)


@pytest.mark.parametrize("quorum", [GROUP, JOINT, Quorum(("a", "b", "c", "d")), Quorum(("a",), ("b", "c"))])
def test_two_quorums_share_a_disk_of_every_set_and_one_without_the_other_is_lost(quorum: Quorum) -> None:
    every = [frozenset(some) for count in range(len(quorum.disks) + 1) for some in combinations(quorum.disks, count)]
    met = [some for some in every if quorum.met(some)]
    assert min(map(len, met)) >= quorum.fewest
    assert all(one & other & set(disks) for one in met for other in met for disks in quorum.sets)
    for some in every:
        assert quorum.lost(some) == (not quorum.met(set(quorum.disks) - some))
        assert (quorum.spare(some) >= 0) == quorum.met(some)


def test_quorums_are_values() -> None:
    assert Quorum(["a", "b", "c"]) == GROUP
    assert hash(Quorum(["a", "b", "c"])) == hash(GROUP)
    assert GROUP != JOINT
    assert repr(GROUP) == "Quorum(('a', 'b', 'c'))"


def test_half_of_a_set_is_no_quorum_whatever_other_disks_are_named() -> None:
    assert not Quorum(("a", "b", "c", "d")).met(("a", "b", "x", "y"))
    assert not Quorum(("a", "b"), ("c", "d", "e")).met(("a", "c", "d"))
    assert not Quorum(("c", "d", "e"), ("a", "b")).met(("a", "c", "d"))


def test_the_disk_that_comes_has_the_position_of_the_one_that_goes() -> None:
    view = View.of(7, ("a", "b", "c"), ("a", "d", "c"))
    assert view.quorum == Quorum(("a", "b", "c"), ("a", "d", "c"))
    assert dict(zip(view.quorum.disks, view.positions, strict=True)) == {"a": 0, "b": 1, "c": 2, "d": 1}
    assert view.by_disk(("first", "second", "third")) == ["first", "second", "third", "second"]


def test_of_one_set_each_disk_has_its_own_position() -> None:
    view = View.of(7, ("a", "b", "c"))
    given = ("first", "second", "third")
    assert view.by_disk(given) is given
    assert view.positions == (0, 1, 2)
    assert View.of(7, ("a", "b", "c"), ("a", "b", "d")).by_disk(()) == ()
