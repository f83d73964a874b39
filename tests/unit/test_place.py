"""Placement, on every small layout and every set of disks away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations

import msgspec
import pytest

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry, Profile
from storaged.cluster.partitions import PartitionState, epoch_of
from storaged.errors import ServiceUnavailable
from storaged.objects.code.place import (
    Placement,
    acceptable,
    choose,
    choose_prompt,
    copies_rule,
    copy_plan,
    disks_of,
    enough_copies,
    first_choice,
    spare,
)
from storaged.objects.records import Run

TARGETS = (Profile(4, 2), Profile(2, 1), Profile(3, 2), Profile(1, 2), Profile(1, 1))
RACKS = ((2, 2, 2), (1, 1, 1, 1, 1, 1), (2, 2, 1), (3, 3), (4, 1, 1), (6,), (2, 2, 2, 1), (1, 1, 1))


def layout_of(
    racks: Sequence[int], *, epoch: int = 1, countries: Sequence[str] = (), draining: Iterable[str] = ()
) -> Layout:
    """One node a rack, ``racks[i]`` disks each; disk ids are ``r<rack>d<number>``."""
    nodes = tuple(
        NodeEntry(f"n{rack}", f"{countries[rack] if countries else 'FR'}/site/{rack}", "127.0.0.1:1", ("storage",))
        for rack in range(len(racks))
    )
    disks = tuple(
        DiskEntry(
            f"r{rack}d{number}", f"n{rack}", 100, "draining" if f"r{rack}d{number}" in set(draining) else "active"
        )
        for rack, count in enumerate(racks)
        for number in range(count)
    )
    return Layout("c", epoch, nodes, disks, tuple(disk.id for disk in disks[:3]))


def data_ids(count: int) -> list[bytes]:
    return [(number * 2741 % 4096 << 4).to_bytes(2, "big") + bytes(14) for number in range(count)]


def survivors_after(layout: Layout, placement: Placement, lost: frozenset[str]) -> int:
    return sum(disk not in lost for disk in placement.disks)


def every_outage(layout: Layout) -> Iterable[frozenset[str]]:
    ids = [disk.id for disk in layout.disks]
    for count in range(len(ids) + 1):
        yield from (frozenset(away) for away in combinations(ids, count))


@pytest.mark.parametrize("racks", RACKS, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_whatever_is_away_a_chosen_placement_is_acceptable_and_survives_any_disk_and_any_domain_that_can_be_survived(
    racks, target
):
    layout = layout_of(racks)
    for away in every_outage(layout):
        living = {disk.id for disk in layout.disks} - away
        domains = {layout.domain_by_disk[disk] for disk in living}
        for data_id in data_ids(3):
            try:
                placement = choose(layout, data_id, target, lambda disk, away=away: disk not in away)
            except ServiceUnavailable:
                placement = None
            if placement is None:
                assert len(living) < 2
                continue
            assert set(placement.disks) <= living
            assert len(set(placement.disks)) == placement.profile.n
            for disk in living:
                assert survivors_after(layout, placement, frozenset([disk])) >= placement.profile.k
            if len(domains) >= 2:
                for domain in domains:
                    lost = frozenset(disk for disk in living if layout.domain_by_disk[disk] == domain)
                    assert survivors_after(layout, placement, lost) >= placement.profile.k
            assert acceptable(
                layout, placement.profile, dict(enumerate(placement.disks)), lambda disk, away=away: disk not in away
            )


@pytest.mark.parametrize("racks", [(2, 2, 2), (2, 2, 1), (3, 3), (6,)], ids=str)
@pytest.mark.parametrize("profile", [Profile(4, 2), Profile(2, 2), Profile(3, 2), Profile(1, 2)], ids=str)
def test_what_is_acceptable_keeps_k_fragments_whatever_single_disk_or_domain_dies_next_and_nothing_else_is(
    racks, profile
):
    layout = layout_of(racks)
    ids = [disk.id for disk in layout.disks]
    for away in every_outage(layout):
        living = [disk for disk in ids if disk not in away]
        domains = {layout.domain_by_disk[disk] for disk in living}
        for count in range(min(profile.n, len(living)) + 1):
            for synced in combinations(living, count):
                verdict = acceptable(layout, profile, dict(enumerate(synced)), lambda disk, away=away: disk not in away)
                after_disk = min((count - 1 for _ in synced), default=0)
                after_domain = count - max(Counter(layout.domain_by_disk[disk] for disk in synced).values(), default=0)
                wanted = after_disk >= profile.k and (after_domain >= profile.k or len(domains) < 2)
                assert verdict == wanted, (away, synced)


def test_all_disks_alive_gives_the_first_choice_under_the_rack_limit():
    layout = layout_of((4, 4, 4))
    for data_id in data_ids(200):
        placement = choose(layout, data_id, Profile(4, 2), lambda disk: True)
        assert placement == Placement(Profile(4, 2), first_choice(layout, data_id, Profile(4, 2)), {})
        assert max(Counter(layout.domain_by_disk[disk] for disk in placement.disks).values()) == 2


def placed(choosing, *arguments):
    try:
        return choosing(*arguments)
    except ServiceUnavailable as refused:
        return str(refused)


@pytest.mark.parametrize("racks", RACKS, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_where_all_disks_are_prompt_the_placement_is_that_of_the_general_rule_whatever_is_away(racks, target):
    layout = layout_of(racks)
    for away in every_outage(layout):
        for data_id in data_ids(3):
            living = (layout, data_id, target, lambda disk, away=away: disk not in away)
            assert placed(choose_prompt, *living, lambda disk: True) == placed(choose, *living)


def test_a_slow_first_choice_gets_no_fragment_where_the_others_do_as_well():
    layout, data_id, target = layout_of((3, 3, 3)), data_ids(1)[0], Profile(4, 2)
    slow = first_choice(layout, data_id, target)[1]
    placement = choose_prompt(layout, data_id, target, lambda disk: True, lambda disk: disk != slow)
    assert placement.profile == target
    assert slow not in placement.disks


def test_living_first_choices_keep_their_positions_and_the_next_disk_on_the_list_takes_a_dead_ones():
    layout = layout_of((4, 4, 4))
    for data_id in data_ids(50):
        first = first_choice(layout, data_id, Profile(4, 2))
        dead = first[3]
        placement = choose(layout, data_id, Profile(4, 2), lambda disk, dead=dead: disk != dead)
        assert list(placement.moved) == [3]
        assert [disk for position, disk in enumerate(placement.disks) if position != 3] == [*first[:3], *first[4:]]
        shares = Counter(layout.domain_by_disk[disk] for disk in first if disk != dead)
        heir = next(
            disk
            for disk in layout.preference(int.from_bytes(data_id[:2], "big") >> 4)
            if disk not in first and shares[layout.domain_by_disk[disk]] < 2
        )
        assert placement.disks[3] == placement.moved[3] == heir


@pytest.mark.parametrize(
    ("away", "profile"),
    [
        (["r2d1"], Profile(3, 2)),
        (["r2d0", "r2d1"], Profile(2, 2)),
        (["r1d1", "r2d1"], Profile(2, 2)),
        (["r1d0", "r2d0", "r2d1"], Profile(1, 2)),
        (["r1d0", "r1d1", "r2d0", "r2d1"], Profile(1, 1)),
    ],
    ids=str,
)
def test_the_cheapest_profile_that_survives_a_rack_is_the_fallback_of_4_2(away, profile):
    layout = layout_of((2, 2, 2))
    for data_id in data_ids(20):
        assert choose(layout, data_id, Profile(4, 2), lambda disk: disk not in away).profile == profile


def test_a_fallback_keeps_two_parity_fragments_where_it_can_so_that_a_disk_may_fail_during_the_write():
    layout = layout_of((1, 1, 1, 1, 1, 1))
    assert choose(layout, bytes(16), Profile(4, 2), lambda disk: disk != "r0d0").profile == Profile(3, 2)


def test_one_rack_left_still_survives_a_disk_with_the_widest_profile_it_holds():
    layout = layout_of((6, 3, 3))
    placement = choose(layout, bytes(16), Profile(4, 2), lambda disk: disk.startswith("r0"))
    assert placement.profile == Profile(4, 2)
    assert acceptable(layout, placement.profile, dict(enumerate(placement.disks)), lambda disk: disk.startswith("r0"))


def test_one_living_disk_is_refused_with_the_numbers():
    layout = layout_of((2, 2, 2))
    with pytest.raises(ServiceUnavailable, match="1 of 6 disks take writes, in 1 racks; the target 4\\+2 needs 6"):
        choose(layout, bytes(16), Profile(4, 2), lambda disk: disk == "r0d0")


def test_draining_disks_get_nothing_new():
    layout = layout_of((3, 3, 3), draining=["r0d0"])
    for data_id in data_ids(100):
        assert "r0d0" not in choose(layout, data_id, Profile(4, 2), lambda disk: True).disks
        assert "r0d0" not in choose(layout, data_id, Profile(4, 2), lambda disk: disk != "r1d1").disks


def test_no_fragment_leaves_the_allowed_countries_even_when_that_refuses_the_write():
    layout = layout_of((2, 2, 2, 2), countries=("FR", "FR", "FR", "DE"))
    for data_id in data_ids(50):
        for away in (frozenset[str](), frozenset({"r0d0"}), frozenset({"r0d0", "r0d1"})):
            placement = choose(layout, data_id, Profile(4, 2), lambda disk, away=away: disk not in away, ("FR",))
            assert not any(disk.startswith("r3") for disk in placement.disks)
    with pytest.raises(ServiceUnavailable, match="in IT"):
        choose(layout, bytes(16), Profile(4, 2), lambda disk: True, ("IT",))
    with pytest.raises(ServiceUnavailable, match="has 2 in DE"):
        first_choice(layout, bytes(16), Profile(4, 2), ("DE",))


def test_a_domain_outside_the_allowed_countries_does_not_make_its_survival_reachable():
    layout = layout_of((2, 2, 2), countries=("FR", "DE", "DE"))
    durable = {0: "r0d0", 1: "r0d1"}
    assert acceptable(layout, Profile(1, 1), durable, lambda disk: True, ("FR",))
    assert not acceptable(layout, Profile(1, 1), durable, lambda disk: True)


def test_a_run_names_its_disks_from_the_layout_of_its_epoch_and_its_exceptions():
    layout = layout_of((4, 4, 4), epoch=7)
    for data_id in data_ids(30):
        dead = first_choice(layout, data_id, Profile(4, 2))[1]
        for away in ({dead}, {disk.id for disk in layout.disks if disk.id.startswith("r1")}, set()):
            placement = choose(layout, data_id, Profile(4, 2), lambda disk, away=away: disk not in away)
            run = Run(0, 1, placement.profile.k, placement.profile.m, 7, placement.moved)
            assert disks_of(run, layout, data_id) == placement.disks
    with pytest.raises(ValueError, match="under layout 7, not 8"):
        disks_of(Run(0, 1, 4, 2, 7), layout_of((4, 4, 4), epoch=8), bytes(16))
    with pytest.raises(ValueError, match="only 3 disks"):
        disks_of(Run(0, 1, 4, 2, 7), layout_of((1, 1, 1), epoch=7), bytes(16))


def test_adding_a_disk_moves_few_fragments():
    before, after = layout_of((4, 4, 4)), layout_of((4, 4, 5))
    moved = total = 0
    for data_id in data_ids(300):
        old, new = first_choice(before, data_id, Profile(4, 2)), first_choice(after, data_id, Profile(4, 2))
        total += 6
        moved += len(set(new) - set(old))
    assert 0 < moved < total / 6


@pytest.mark.parametrize("away", [(), ("r0d0",), ("r1d0",), ("r0d0", "r1d0"), ("r0d0", "r1d0", "r2d0")])
def test_two_synced_copies_are_enough_and_one_never_is(away):
    layout = layout_of((2, 2, 2))
    replicas = ("r0d0", "r1d0", "r2d0")
    living = [disk for disk in replicas if disk not in away]
    for count in range(len(living) + 1):
        for synced in combinations(living, count):
            assert enough_copies(layout, replicas, frozenset(synced), lambda disk: disk not in away) == (count >= 2)


def test_copies_elsewhere_than_on_the_replicas_do_not_count():
    layout = layout_of((2, 2, 2))
    assert not enough_copies(layout, ("r0d0", "r1d0", "r2d0"), frozenset({"r0d0", "r1d1"}), lambda disk: True)


def test_two_copies_in_one_rack_are_enough_only_while_the_other_racks_replica_is_away():
    layout = layout_of((2, 2, 2))
    replicas, synced = ("r0d0", "r0d1", "r1d0"), frozenset({"r0d0", "r0d1"})
    assert not enough_copies(layout, replicas, synced, lambda disk: True)
    assert enough_copies(layout, replicas, synced, lambda disk: disk != "r1d0")


@pytest.mark.parametrize("racks", RACKS, ids=str)
def test_the_rule_made_for_a_registers_replicas_judges_copies_as_the_general_one_does(racks):
    layout = layout_of(racks)
    ids = [disk.id for disk in layout.disks]
    for replicas in [layout.replicas_of(3), *combinations(ids, 3)]:
        for away in [frozenset(away) for count in range(3) for away in combinations(replicas, count)]:
            rule = copies_rule(layout, replicas, lambda disk, away=away: disk not in away)
            for synced in [frozenset(synced) for count in range(5) for synced in combinations(ids, count)]:
                assert rule(synced) == enough_copies(layout, replicas, synced, lambda disk, away=away: disk not in away)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (range(6), (2, 1)),
        (range(5), (1, 0)),
        (range(4), (0, 0)),
        ((0, 2, 4, 5), (0, 0)),
        (range(3), (-1, -1)),
        ((), (-1, -1)),
    ],
    ids=str,
)
def test_spare_counts_the_worst_disks_and_the_worst_racks_that_may_still_fail(positions, expected):
    layout = layout_of((2, 2, 2))
    disks = sorted(disk.id for disk in layout.disks)
    assert spare(layout, Profile(4, 2), {position: disks[position] for position in positions}) == expected


def test_spare_of_copies_is_all_but_one():
    layout = layout_of((1, 1, 1))
    assert spare(layout, Profile(1, 2), {0: "r0d0", 1: "r1d0", 2: "r2d0"}) == (2, 2)


def test_nothing_is_placed_outside_the_countries_of_the_layout_whatever_a_bucket_names():
    mixed = layout_of((2, 2, 2, 2), countries=("FR", "DE", "FR", "DE"))
    narrowed = msgspec.structs.replace(mixed, countries=("FR",))
    for data_id in data_ids(40):
        placement = choose(narrowed, data_id, Profile(2, 1), lambda disk: True)
        assert {narrowed.country_of(disk) for disk in placement.disks} == {"FR"}
        assert {narrowed.country_of(disk) for disk in first_choice(narrowed, data_id, Profile(2, 1))} == {"FR"}
        with pytest.raises(ServiceUnavailable):
            choose(narrowed, data_id, Profile(1, 1), lambda disk: True, ("DE",))
    assert {
        mixed.country_of(disk) for disk in choose(mixed, data_ids(1)[0], Profile(4, 2), lambda disk: True).disks
    } == {"FR", "DE"}


def test_while_a_partition_moves_the_copies_must_be_enough_in_both_sets():
    layout = layout_of((2, 2, 2))
    state = PartitionState(5, 1, epoch_of(1, 1), ("r0d0", "r1d0", "r2d0"), ("r0d0", "r1d0", "r1d1"))
    plan = copy_plan(layout, state, lambda disk: True)
    assert (plan.copies, [(run.k, run.m) for run in plan.runs]) == (3, [(1, 2)])
    assert plan.enough(frozenset({"r0d0", "r1d0"}))
    assert not plan.enough(frozenset({"r0d0", "r2d0"})), "only one is in the set that comes"
    assert not plan.enough(frozenset({"r1d0", "r1d1", "r2d0"})), "the set that comes has two in one rack"
    assert plan.enough(frozenset({"r0d0", "r1d1", "r2d0"}))
