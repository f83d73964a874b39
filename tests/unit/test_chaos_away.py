"""The ledger of what the chaos of changes may take away: too little of it, and a run proves nothing; too much, and it
finds faults that are none."""

from __future__ import annotations

import pytest

from tests.chaos.away import Away, Block, blocks_stay, majorities_stay, worst_loss

S = ("a1", "b1", "c1")
"""Replicas in three racks."""


@pytest.mark.parametrize(
    ("states", "away", "lost"),
    [
        ([S], {"a1"}, 1),
        ([S], {"a1", "b1"}, 2),
        ([S], {"d1"}, 0),
        ([S, ("d1", "b1", "c1")], {"a1"}, 1),
        ([S, ("d1", "b1", "c1")], {"d1"}, 1),
        ([S, ("d1", "b1", "c1")], {"a1", "d1"}, 1),  # one place: one of the two is a replica
        ([S, ("d1", "b1", "c1")], {"a1", "b1"}, 2),
        ([S, ("d1", "b1", "c1")], {"d1", "b1"}, 2),
        ([S, ("d1", "e1", "c1")], {"a1", "d1"}, 2),  # two places: b1 goes first, and a1 and d1 are both replicas
        ([S, ("a1", "c1", "b1")], {"a1"}, 1),  # the order says nothing
        ([S, ("d1", "b1", "c1"), ("d1", "e1", "c1")], {"a1", "b1"}, 2),
        ([S, ("d1", "b1", "c1"), ("d1", "e1", "c1")], {"c1"}, 1),
    ],
)
def test_the_worst_state_on_the_way_between_layouts_counts(
    states: list[tuple[str, ...]], away: set[str], lost: int
) -> None:
    assert worst_loss(states, away) == lost


def test_a_majority_of_each_partition_stays() -> None:
    assert majorities_stay([[S], [("a1", "b2", "c2")]], {"a1"})
    assert not majorities_stay([[S], [("a1", "b2", "c2")]], {"a1", "b2"})
    assert majorities_stay([[(*S, "d1", "e1")]], {"a1", "b1"}), "of five two may be away"
    assert not majorities_stay([[S, (*S, "d1", "e1")]], {"a1", "b1"}), "of three that become five only one"


def test_a_block_keeps_what_it_needs() -> None:
    block = Block(4, ("a1", "a2", "b1", "b2", "c1", "c2"))
    assert blocks_stay([block], {"a1", "a2"})
    assert not blocks_stay([block], {"a1", "a2", "b1"})
    assert not blocks_stay([Block(1, ("a1",))], {"a1"})


def test_what_is_away_counts_until_it_is_back() -> None:
    ledger = Away([S])
    assert ledger.may("kill", {"a1"}, [])
    ledger.take("n1", {"a1"})
    assert not ledger.may("kill", {"b1"}, [])
    assert ledger.may("kill", {"d1"}, [])
    assert not ledger.may("kill", {"d1"}, [Block(1, ("a1", "d1"))])
    ledger.back("n1")
    assert ledger.may("kill", {"b1"}, [])
    assert ledger.document() == {"played": {"kill": 3}, "skipped": {"kill": 2}}


def test_a_disk_that_the_layout_gave_up_may_stay_away_when_everything_has_moved() -> None:
    ledger = Away([S])
    ledger.take("n1", {"a1"})
    ledger.begin_move([("d1", "b1", "c1")])
    assert not ledger.allows({"b1"}, [])
    assert ledger.allows({"d1"}, []), "a1 and d1 share a place"
    ledger.end_move()
    assert ledger.allows({"b1"}, [])
    assert ledger.disks == {"a1"}
