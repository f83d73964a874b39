"""A layout with other disks moves few fragments: each disk that keeps one keeps its position."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from storaged.cluster.layout import PARTITIONS, Layout, Profile
from storaged.objects.code.place import choose, disks_of, first_choice, is_placed, near
from storaged.objects.records import Run
from tests.doubles.layouts import layout_of

PROFILES = [Profile(4, 2), Profile(2, 1), Profile(1, 2)]
DATA = st.binary(min_size=16, max_size=16)


def check_and_count_moved(before: Layout, after: Layout, data_id: bytes, profile: Profile) -> int:
    """Checks one part, and returns how many of its fragments move."""
    old = first_choice(before, data_id, profile)
    placement = choose(after, data_id, profile, lambda _disk: True)
    found = near(after, placement, data_id, old, ())
    assert set(found.disks) == set(placement.disks)
    assert all(new == was for was, new in zip(old, found.disks, strict=True) if was in placement.disks)
    run = Run(0, 1, profile.k, profile.m, after.epoch, dict(found.moved))
    assert disks_of(run, after, data_id) == found.disks
    assert is_placed(after, data_id, profile, found.disks, ())
    assert is_placed(after, data_id, profile, old, ()) == (set(old) == set(found.disks))
    return sum(was != new for was, new in zip(old, found.disks, strict=True))


@given(DATA, st.sampled_from(PROFILES), st.lists(st.integers(2, 4), min_size=3, max_size=5))
def test_a_disk_that_stays_keeps_the_position_of_its_fragment(data: bytes, profile: Profile, racks: list[int]) -> None:
    before = layout_of(racks)
    more = list(racks)
    more[0] += 1
    check_and_count_moved(before, layout_of(more, epoch=2), data, profile)
    check_and_count_moved(layout_of(more), layout_of(racks, epoch=2), data, profile)


@pytest.mark.parametrize("profile", [Profile(4, 2), Profile(2, 1)])
def test_a_disk_more_moves_about_its_share_of_the_fragments(profile: Profile) -> None:
    """The ideal: what the new disk takes over, and nothing else."""
    rng = random.Random(5)
    before, after = layout_of((3, 3, 3)), layout_of((3, 3, 3, 3), epoch=2)
    moved = gained = 0
    for _ in range(4_000):
        data_id = rng.randbytes(16)
        moved += check_and_count_moved(before, after, data_id, profile)
        gained += sum(disk.startswith("d") for disk in first_choice(after, data_id, profile))
    assert gained <= moved <= 1.1 * gained


def test_a_disk_that_replaces_another_gets_what_that_one_had_and_nothing_else_moves() -> None:
    before = layout_of((2, 2, 2))
    disks = tuple(replace(disk, id="new", rank="b1") if disk.id == "b1" else disk for disk in before.disks)
    after = replace(before, epoch=2, disks=disks)
    for number in range(PARTITIONS):
        old, new = before.replicas_of(number), after.replicas_of(number)
        assert tuple("new" if disk == "b1" else disk for disk in old) == new
    rng = random.Random(8)
    for _ in range(500):
        data_id = rng.randbytes(16)
        assert check_and_count_moved(before, after, data_id, Profile(4, 2)) == 1


def test_fragments_leave_a_draining_disk_and_no_other() -> None:
    before = layout_of((3, 3, 3))
    disks = tuple(replace(disk, state="draining") if disk.id == "b1" else disk for disk in before.disks)
    after = replace(before, epoch=2, disks=disks)
    rng = random.Random(6)
    moved = held = 0
    for _ in range(2_000):
        data_id = rng.randbytes(16)
        held += "b1" in first_choice(before, data_id, Profile(4, 2))
        moved += check_and_count_moved(before, after, data_id, Profile(4, 2))
    assert held <= moved <= 1.1 * held


def test_what_is_on_a_draining_disk_is_not_placed_where_too_few_disks_are_left() -> None:
    """Else status says that nothing waits, and the disk is removed with what is on it."""
    before = layout_of((1, 1, 1))
    disks = tuple(replace(disk, state="draining") if disk.id == "b0" else disk for disk in before.disks)
    after = replace(before, epoch=2, disks=disks)
    assert not is_placed(after, bytes(16), Profile(1, 2), ("a0", "b0", "c0"), ())
    assert is_placed(after, bytes(16), Profile(1, 2), ("a0", "c0"), ())
