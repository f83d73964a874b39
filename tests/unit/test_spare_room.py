"""Whether the disks that are left have room for what disks that are away had."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from msgspec.structs import replace

from storaged.cluster.layout import Layout
from storaged.cluster.ports import DiskStatus
from storaged.maintain.spare_room import (
    ENOUGH,
    UNKNOWN_BYTES,
    bytes_of_partition,
    disks_short,
    free_for_spares,
    needed_bytes,
    shortage_of,
    takes_some,
)
from storaged.units import GIB, TIB
from tests.doubles.layouts import KnownLayouts, layout_of

FIVE = layout_of((2, 2, 2, 2, 2))


class Said(NamedTuple):
    away_bytes: int = UNKNOWN_BYTES
    partition_bytes: int = UNKNOWN_BYTES


def reports(layout: Layout = FIVE, *, free: int = TIB, used: int = TIB) -> dict[str, DiskStatus]:
    return {disk.id: DiskStatus(disk.id, "", "ok", used, free) for disk in layout.disks}


def free_on(layout: Layout, each: int, **others: int) -> dict[str, int]:
    return {disk.id: others.get(disk.id, each) for disk in layout.disks}


def test_what_fits_within_the_limits_of_domains_fits_and_the_rest_is_short_by_its_bytes() -> None:
    gone = frozenset({"e0", "e1"})
    free = {disk: room for disk, room in free_on(FIVE, 10 * GIB).items() if disk not in gone}
    assert shortage_of(FIVE, gone, free, 60 * GIB).short_bytes == 0
    needed, short = shortage_of(FIVE, gone, free, 100 * GIB)
    assert needed == 100 * GIB
    assert 18 * GIB < short < 30 * GIB, "80 GiB are free"
    assert takes_some(FIVE, gone, free)
    assert not takes_some(FIVE, gone, dict.fromkeys(free, 0))
    assert shortage_of(FIVE, gone, free, 0) == ENOUGH
    assert shortage_of(FIVE, frozenset(), free, 100 * GIB) == ENOUGH


def test_a_full_disk_is_passed_over_and_a_full_rack_counts_only_for_what_may_not_lie_elsewhere() -> None:
    gone = frozenset({"e0"})
    free = {disk: room for disk, room in free_on(FIVE, TIB, e1=0, d0=0, d1=0).items() if disk not in gone}
    assert shortage_of(FIVE, gone, free, TIB).short_bytes == 0
    # Two racks with a fragment of 2+1 each, and one more in the third: only its other disks may take it.
    three = replace(layout_of((3, 3, 3)), profile="2+1")
    free = {disk: room for disk, room in free_on(three, TIB, c1=0, c2=0).items() if disk != "c0"}
    assert shortage_of(three, frozenset({"c0"}), free, GIB).short_bytes == pytest.approx(GIB, rel=0.02)
    free["c2"] = 2 * GIB
    assert shortage_of(three, frozenset({"c0"}), free, GIB).short_bytes == 0


def test_where_the_profile_can_not_be_held_room_for_weaker_blocks_is_needed() -> None:
    """With two of three racks 4+2 becomes 2+2: for two fragments that are lost, four of twice the size are written."""
    three = layout_of((2, 2, 2))
    gone = frozenset({"c0", "c1"})

    def short(room: int) -> int:
        free = {disk: room for disk in free_on(three, 0) if disk not in gone}
        return shortage_of(three, gone, free, GIB).short_bytes

    assert short(TIB) == 0
    assert short(0) == pytest.approx(GIB, rel=0.02)
    assert short(GIB + GIB // 32) == 0
    assert GIB // 8 < short(3 * GIB // 4) < GIB // 2


def test_where_disks_of_any_size_would_not_do_it_is_not_for_want_of_room() -> None:
    three = layout_of((2, 2, 2))
    gone = frozenset({"b0", "b1", "c0", "c1", "a1"})
    assert shortage_of(three, gone, {"a0": 0}, TIB).short_bytes == 0


def test_the_limits_of_operators_count_too() -> None:
    operators = (("FR/sitea/a", "anne"), ("FR/siteb/b", "bert"), ("FR/sitec/c", "carl"), ("FR/sited/d", "dora"))
    layout = replace(layout_of((3, 3, 3, 3)), operators=operators, spread="operators")
    free = {disk: room for disk, room in free_on(layout, TIB).items() if disk != "d0"}
    assert shortage_of(layout, frozenset({"d0"}), free, TIB).short_bytes == 0
    assert shortage_of(layout, frozenset({"d0"}), dict.fromkeys(free, 0), TIB).short_bytes == pytest.approx(
        TIB, rel=0.02
    )


def test_a_disk_takes_what_is_free_but_for_a_margin_and_only_if_it_takes_writes() -> None:
    found = free_for_spares(reports(free=TIB, used=TIB), lambda disk: disk != "a0")
    assert "a0" not in found
    assert found["a1"] == TIB - 2 * TIB // 50
    assert free_for_spares(reports(free=GIB, used=TIB), lambda disk: True)["a1"] == 0


def test_what_is_needed_is_what_nodes_have_counted_bounded_by_what_the_disk_had() -> None:
    gone, heard = frozenset({"e0"}), reports(used=100)
    honest = [Said(10), Said(20), Said(5)]
    assert needed_bytes(FIVE, gone, heard, honest) == 35
    assert needed_bytes(FIVE, gone, heard, [*honest, Said(TIB)]) == 100, "one claims too much"
    assert needed_bytes(FIVE, gone, heard, [Said(10), Said(), Said(20), Said()]) == 80, "two have not counted"
    assert needed_bytes(FIVE, gone, heard, [Said()]) == needed_bytes(FIVE, gone, heard, []) == 100
    heard["e0"] = DiskStatus("e0", "", "blank")
    assert needed_bytes(FIVE, gone, heard, []) == 100, "as much as the others have"
    del heard["e0"]
    assert needed_bytes(FIVE, gone, heard, []) == 100
    assert needed_bytes(FIVE, gone, {}, []) == 0
    assert needed_bytes(FIVE, frozenset(), heard, honest) == 0


def test_a_node_that_claims_less_than_nothing_hides_nothing_that_others_count() -> None:
    gone, heard = frozenset({"e0", "d0"}), reports(used=100)
    honest = [Said(10), Said(20), Said(6)]
    assert needed_bytes(FIVE, gone, heard, [*honest, Said(-TIB)]) == 36 + 200 // 4, "it has not counted"
    heard["d0"] = DiskStatus("d0", "", "ok", -TIB)
    assert needed_bytes(FIVE, gone, heard, [Said(150)]) == 150, "as much as the others have"
    heard["a0"] = DiskStatus("a0", "", "ok", -TIB)
    assert needed_bytes(FIVE, gone, heard, [Said(150)]) == 150
    assert bytes_of_partition([Said(0, 10), Said(0, -TIB)]) == 10


def test_partitions_need_room_on_the_very_disks_that_get_them() -> None:
    layout, known = layout_of((1, 1, 1, 1)), KnownLayouts(layout_of((1, 1, 1, 1)))
    out = frozenset({"d0"})
    wanted = replace(
        layout, disks=tuple(replace(disk, state="out") if disk.id in out else disk for disk in layout.disks)
    )
    states = [known.partition(number) for number in range(64)]
    comes = {
        disk: sum(
            disk in wanted.replicas_of(s.partition) and disk not in s.present for s in states if "d0" in s.present
        )
        for disk in ("a0", "b0", "c0")
    }
    assert all(comes.values())
    free = {disk: count * 10 for disk, count in comes.items()}
    assert disks_short(wanted, states, out, free, 10) == {}
    free["b0"] -= 1
    assert disks_short(wanted, states, out, free, 10) == {"b0": 1}
    assert disks_short(wanted, states, frozenset(), free, 10) == {}
    del free["b0"]
    assert disks_short(wanted, states, out, free, 10) == {}, "one that takes no writes is waited for anyway"


def test_one_node_that_lies_about_the_size_of_partitions_changes_little() -> None:
    assert bytes_of_partition([]) == bytes_of_partition([Said(), Said()]) == 0
    assert bytes_of_partition([Said(0, 10), Said(0, 12), Said(0, TIB), Said()]) == 12
