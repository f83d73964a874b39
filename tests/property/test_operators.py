"""Where no operator is trusted alone: none can read a block, withhold it, or decide for a partition, whatever is away
and whatever moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, DiskEntry, Layout, NodeEntry, Profile, problems_of
from storaged.cluster.layout import weaknesses as weaknesses_of
from storaged.cluster.moves import moves_between, places_digest
from storaged.cluster.partitions import PartitionState, check_step, is_settled, next_step, state_of
from storaged.cluster.sparing import target
from storaged.cluster.spread import OPERATORS, minority_of
from storaged.errors import ServiceUnavailable
from storaged.objects.code.place import acceptable, choose, first_choice, is_placed, keeps_operators
from storaged.wire import decode, encode

Racks = Sequence[tuple[str, int]]
"""(operator, number of disks) of each rack."""


def layout_of(racks: Racks, profile: str = "4+2", epoch: int = 1, spread: str = OPERATORS, replicas: int = 3) -> Layout:
    """One node in each rack. Seeds as ``cli.create`` would choose them."""
    nodes = tuple(NodeEntry(f"n{number}", f"FR/par1/r{number}", "", ("storage",)) for number in range(len(racks)))
    disks = tuple(
        DiskEntry(f"{operator}-{number}-{index}", f"n{number}", 1)
        for number, (operator, count) in enumerate(racks)
        for index in range(count)
    )
    operators = tuple((f"FR/par1/r{number}", operator) for number, (operator, _) in enumerate(racks))
    seeds: list[str] = []
    for disk in disks:
        if operator_of(disk.id) not in map(operator_of, seeds) and len(seeds) < 3:
            seeds.append(disk.id)
    return Layout(
        "test", epoch, nodes, disks, tuple(seeds), profile, replicas=replicas, operators=operators, spread=spread
    )


def operator_of(disk: str) -> str:
    return disk.partition("-")[0]


def share(disks: Sequence[str]) -> int:
    return max(Counter(map(operator_of, disks)).values(), default=0)


RACKS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 4)), min_size=3, max_size=9)
PROFILES = st.sampled_from(["2+1", "3+2", "4+2", "2+2", "5+3", "8+3"])


def is_trusted(profile: Profile, disks: Sequence[str]) -> bool:
    """No operator has k fragments, and all others together have k."""
    return share(disks) < profile.k <= len(disks) - share(disks)


@given(RACKS, PROFILES, st.binary(min_size=16, max_size=16), st.data())
def test_no_operator_gets_enough_fragments_to_read_or_to_withhold(
    racks: list[tuple[str, int]], text: str, data_id: bytes, data: st.DataObject
) -> None:
    layout = layout_of(racks, text)
    profile = layout.target
    away = data.draw(st.sets(st.sampled_from([disk.id for disk in layout.disks])))

    def writable(disk: str) -> bool:
        return disk not in away

    holds = not [problem for problem in problems_of(layout) if "profile" in problem]
    living = replace(
        layout, disks=tuple(replace(d, state="active" if writable(d.id) else "draining") for d in layout.disks)
    )
    possible = not [problem for problem in problems_of(living) if "profile" in problem]
    try:
        first = first_choice(layout, data_id, profile)
    except ServiceUnavailable:
        assert not holds
        return
    assert holds
    assert is_trusted(profile, first)
    assert is_placed(layout, data_id, profile, first, ())
    if not possible:  # it never degrades
        with pytest.raises(ServiceUnavailable, match="never weaker"):
            choose(layout, data_id, profile, writable)
        return
    placement = choose(layout, data_id, profile, writable)
    assert placement.profile == profile
    assert not set(placement.disks) & away
    assert is_trusted(profile, placement.disks)
    assert keeps_operators(layout, profile, placement.disks)
    assert acceptable(layout, profile, dict(enumerate(placement.disks)), writable)


@given(RACKS, PROFILES, st.data())
def test_a_block_is_acknowledged_only_if_no_operator_can_read_or_withhold_it(
    racks: list[tuple[str, int]], text: str, data: st.DataObject
) -> None:
    layout = layout_of(racks, text)
    profile = layout.target
    disks = data.draw(st.lists(st.sampled_from([disk.id for disk in layout.disks]), unique=True, max_size=profile.n))
    assert acceptable(layout, profile, dict(enumerate(disks)), lambda _disk: True) == is_trusted(profile, disks)


@given(RACKS, st.sampled_from([3, 5]), st.integers(0, PARTITIONS - 1))
def test_no_operator_has_a_majority_of_replicas(racks: list[tuple[str, int]], replicas: int, number: int) -> None:
    layout = layout_of(racks, replicas=replicas)
    assume(layout.domain_kind == "rack")
    found = layout.replicas_of(number)
    assert share(found) <= minority_of(replicas)
    can = not [problem for problem in problems_of(layout) if "metadata" in problem]
    assert (len(found) == replicas) == can


@given(RACKS, RACKS, st.integers(0, PARTITIONS - 1), st.data())
def test_no_exchange_of_replicas_gives_an_operator_a_majority(
    before: list[tuple[str, int]], after: list[tuple[str, int]], number: int, data: st.DataObject
) -> None:
    old, new = layout_of(before), layout_of(after, epoch=2)
    assume(not problems_of(old) and not problems_of(new))
    state = state_of(number, None, new, old)
    lost = data.draw(st.sets(st.sampled_from([disk.id for disk in new.disks]), max_size=2))
    for _ in range(20):
        record = next_step(state, new, whole=data.draw(st.booleans()) or not lost, lost=lost)
        if record is None:
            lost = set()
            record = next_step(state, new, whole=True)
            if record is None:
                break
        check_step(state, record)
        state = PartitionState(number, record.step, 0, record.present, record.coming)
        for disks in state.sets:
            answer = [disk for disk in disks if disk in new.disk_by_id]
            assert share(answer) <= 1, "neither in the set that it has nor in the one that comes"
    assert is_settled(state, new), "it does not get stuck"


def test_what_was_placed_before_gets_better_with_every_exchange() -> None:
    racks = [("a", 2), ("a", 2), ("b", 2), ("c", 2), ("d", 2)]
    old, new = layout_of(racks, spread=""), layout_of(racks, epoch=2)
    shares = []
    for number in range(PARTITIONS):
        state = state_of(number, None, new, old)
        shares.append(share(state.present))
        while (record := next_step(state, new, whole=True)) is not None:
            now = PartitionState(number, record.step, 0, record.present, record.coming)
            assert max(map(share, now.sets)) <= max(map(share, state.sets))
            state = now
        assert share(state.present) == 1
    assert max(shares) == 2


FOUR: Racks = [(operator, 2) for operator in "abcd"]
THREE: Racks = FOUR[:3]


def test_four_operators_write_through_the_outage_of_one() -> None:
    four, three = layout_of(FOUR), layout_of(THREE)
    assert not problems_of(four)
    assert not weaknesses_of(four)
    assert not problems_of(three)
    assert weaknesses_of(three) == [
        "while one operator is away nothing is written: profile 4+2 needs 6 disks at the others, at most 2 at each, and"
        " they give 4"
    ]
    for group in range(64):
        data_id = bytes([group]) * 16
        for away in "abcd":
            placement = choose(four, data_id, four.target, lambda disk, away=away: operator_of(disk) != away)
            assert Counter(map(operator_of, placement.disks)) == {other: 2 for other in "abcd" if other != away}
        with pytest.raises(ServiceUnavailable, match="4 of 6 disks take writes, of 2 operators"):
            choose(three, data_id, three.target, lambda disk: operator_of(disk) != "a")


def test_an_operator_that_is_out_is_replaced_by_the_others_only_where_none_gets_a_majority() -> None:
    two_racks_each = layout_of([("a", 2), ("a", 2), ("b", 2), ("b", 2), ("c", 2)])
    assert target(two_racks_each, {"c-4-0", "c-4-1"}) is two_racks_each, "four racks are left, and two operators"
    assert target(two_racks_each, {"a-0-0", "a-0-1"}) is not two_racks_each, "a has another rack"
    four = layout_of(FOUR)
    left = target(four, {"c-2-0", "c-2-1"})
    for number in range(0, PARTITIONS, 16):
        found = left.replicas_of(number)
        assert set(map(operator_of, found)) == {"a", "b", "d"}


@pytest.mark.parametrize(
    ("racks", "facts", "said"),
    [
        (FOUR, {"profile": "1+2"}, "profile 1+2 spread over operators needs two data fragments"),
        (FOUR, {"profile": "8+3"}, "profile 8+3 spread over operators needs 11 disks with at most 3"),
        (FOUR, {"profile": "5+1"}, "needs 6 disks with at most 1 at one operator: 4 operators give 4"),
        ([("a", 4), ("a", 4), ("b", 4)], {}, "profile 4+2 spread over operators needs 6 disks with at most 2"),
        ([("a", 4), ("a", 4), ("b", 4)], {}, "3 replicas with at most 1 at one operator: 2 operators give 2"),
        (FOUR, {"operators": ()}, "rack FR/par1/r0 names no operator"),
        (FOUR, {"seeds": ("a-0-0", "a-0-1", "b-1-0")}, "one operator has 2 of 3 seed disks, and may have 1"),
        (FOUR, {"seeds_next": ("a-0-0", "a-0-1", "b-1-0")}, "one operator has 2 of 3 seed disks, and may have 1"),
        (FOUR, {"spread": "planets"}, "can't spread data over 'planets'"),
    ],
)
def test_a_layout_that_cannot_hold_it_is_refused_with_the_numbers(
    racks: Racks, facts: Mapping[str, object], said: str
) -> None:
    assert any(said in problem for problem in problems_of(replace(layout_of(racks), **facts)))


def test_layouts_without_operators_are_what_they_were() -> None:
    named = layout_of(FOUR, spread="")
    plain = replace(named, operators=())
    fields = decode(encode(plain), list)
    old = decode(encode(fields[: Layout.__struct_fields__.index("operators")]), Layout)
    assert old == plain
    assert places_digest(named) == places_digest(old), "operators alone move nothing"
    assert not moves_between(old, named)
    spread = layout_of(FOUR)
    assert moves_between(named, spread)
    assert places_digest(named) != places_digest(spread)
    other = replace(spread, operators=(*spread.operators[:3], ("FR/par1/r3", "a")))
    assert "the operator of rack FR/par1/r3 changes from d to a" in str(moves_between(spread, other))
    assert named.replicas_of(SYSTEM_PARTITION) == named.seeds
