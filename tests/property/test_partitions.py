"""Partitions go from any places to those of a layout, one replica at a time, and never through three sets."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, Layout
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import (
    PartitionRecord,
    PartitionState,
    check_step,
    epoch_of,
    is_settled,
    layout_epoch_of,
    next_step,
    state_of,
    step_of,
)
from storaged.errors import LayoutRefused, ServiceUnavailable
from tests.doubles.layouts import layout_of

RACKS = st.lists(st.integers(1, 4), min_size=3, max_size=6)


def follow(state: PartitionState, record: PartitionRecord, layout: Layout) -> PartitionState:
    check_step(state, record)
    return state_of(state.partition, record, layout, layout)


@given(RACKS, RACKS, st.integers(0, PARTITIONS - 1))
def test_a_partition_reaches_the_places_of_a_layout_one_replica_at_a_time(
    before: list[int], after: list[int], number: int
) -> None:
    old, new = layout_of(before), layout_of(after, epoch=2)
    state = state_of(number, None, new, old)
    wanted = len(set(new.replicas_of(number)) - set(state.present))
    joints = 0
    while (record := next_step(state, new, whole=True)) is not None:
        moved = follow(state, record, new)
        assert moved.epoch > state.epoch
        assert len(moved.sets) <= 2
        if moved.coming:
            joints += 1
            assert moved.goes not in new.replicas_of(number)
            assert moved.comes in new.replicas_of(number)
            assert len(moved.disks) == len(moved.present) + 1
            assert moved.position_of(moved.comes) == moved.position_of(moved.goes)
        state = moved
    assert is_settled(state, new)
    assert joints == wanted


@given(RACKS, RACKS, st.integers(0, PARTITIONS - 1))
def test_replicas_stay_in_distinct_domains_where_an_exchange_allows_it(
    before: list[int], after: list[int], number: int
) -> None:
    old, new = layout_of(before), layout_of(after, epoch=2)
    assume(len(before) <= len(after))  # every rack of before is there
    domains = new.domain_by_disk
    state = state_of(number, None, new, old)
    while (record := next_step(state, new, whole=True)) is not None:
        state = follow(state, record, new)
        named = [domains[disk] for disk in state.present if disk in domains]
        assert len(set(named)) == len(named)


def test_a_joint_state_ends_when_whole_or_when_its_new_disk_is_lost() -> None:
    old, new = layout_of((1, 1, 1)), layout_of((1, 1, 1, 1), epoch=2)
    number = next(p for p in range(PARTITIONS) if "d0" in new.replicas_of(p))
    joint = state_of(number, next_step(state_of(number, None, new, old), new), new, old)
    assert joint.comes == "d0"
    assert next_step(joint, new) is None
    assert next_step(joint, new, whole=True) == PartitionRecord(number, 2, joint.coming, (), 2)
    back = next_step(joint, new, lost={"d0"})
    assert back == PartitionRecord(number, 2, joint.present, (), 2)
    check_step(joint, back)
    assert next_step(state_of(number, back, new, old), new, lost={"d0"}) is None


def test_a_disk_that_is_gone_goes_first() -> None:
    old, new = layout_of((2, 2, 2)), layout_of((2, 2, 2), epoch=2)
    for number in range(200):
        present = old.replicas_of(number)
        others = tuple({"a0": "a1", "a1": "a0", "b0": "b1", "b1": "b0"}.get(disk, disk) for disk in present)
        state = PartitionState(number, 0, 1, others)
        for position, disk in enumerate(others):
            if disk not in present:
                record = next_step(state, new, lost={disk})
                assert record is not None
                assert record.coming[position] != disk


@pytest.mark.parametrize(
    "record",
    [
        PartitionRecord(5, 2, ("a", "b", "c"), ("a", "b", "d"), 2),
        PartitionRecord(6, 1, ("a", "b", "c"), ("a", "b", "d"), 2),
        PartitionRecord(5, 1, ("a", "b", "x"), ("a", "b", "d"), 2),
        PartitionRecord(5, 1, ("a", "b", "c"), ("a", "e", "d"), 2),
        PartitionRecord(5, 1, ("a", "b", "c"), ("a", "b", "b"), 2),
        PartitionRecord(5, 1, ("a", "b", "c"), ("a", "b", "c"), 2),
        PartitionRecord(5, 1, ("a", "b", "c"), ("a", "b"), 2),
        PartitionRecord(5, 1, ("a", "b", "d"), (), 2),
    ],
)
def test_a_record_that_is_not_the_next_step_is_refused(record: PartitionRecord) -> None:
    with pytest.raises(LayoutRefused):
        check_step(PartitionState(5, 0, 1, ("a", "b", "c")), record)


def test_a_joint_state_goes_on_to_one_of_its_sets_only() -> None:
    joint = PartitionState(5, 1, epoch_of(1, 1), ("a", "b", "c"), ("a", "b", "d"))
    check_step(joint, PartitionRecord(5, 2, ("a", "b", "d"), (), 2))
    check_step(joint, PartitionRecord(5, 2, ("a", "b", "c"), (), 2))
    for present, coming in ((("a", "b", "e"), ()), (("a", "b", "d"), ("a", "e", "d"))):
        with pytest.raises(LayoutRefused):
            check_step(joint, PartitionRecord(5, 2, present, coming, 2))


@given(st.integers(0, 1 << 28), st.integers(0, (1 << 32) - 1))
def test_epochs_hold_step_and_layout(step: int, layout: int) -> None:
    epoch = epoch_of(step, layout)
    assert (step_of(epoch), layout_epoch_of(epoch)) == (step, layout)
    assert epoch_of(step + 1, 0) > epoch


def test_a_map_takes_newer_records_only_and_waits_for_the_base_layout() -> None:
    known = PartitionMap()
    old, new = layout_of((1, 1, 1)), layout_of((1, 1, 1, 1), epoch=2)
    moving = Layout(
        new.cluster,
        2,
        new.nodes,
        new.disks,
        new.seeds,
        new.profile,
        base=1,
        seeds_next=("a0", "b0", "d0"),
        seeds_step=1,
    )
    layouts: dict[int, Layout] = {}
    with pytest.raises(ServiceUnavailable):
        known.of(5, moving, layouts.__getitem__)
    layouts[1] = old
    with pytest.raises(ServiceUnavailable, match="which partitions have moved"):
        known.of(5, moving, layouts.__getitem__)
    known.complete = True
    assert known.of(5, moving, layouts.__getitem__).present == old.replicas_of(5)
    assert known.of(SYSTEM_PARTITION, moving, layouts.__getitem__) == PartitionState(
        SYSTEM_PARTITION, 1, epoch_of(1, 2), moving.seeds, moving.seeds_next
    )
    record = PartitionRecord(5, 1, ("a0", "b0", "c0"), ("a0", "b0", "d0"), 2)
    assert known.learn(record)
    assert not known.learn(record)
    assert known.steps == 1
    assert known.of(5, moving, layouts.__getitem__).coming == ("a0", "b0", "d0")
    for forged in (PartitionRecord(PARTITIONS, 1, ("a",), (), 1), PartitionRecord(1, 0, ("a",), (), 1)):
        with pytest.raises(LayoutRefused):
            known.learn(forged)
