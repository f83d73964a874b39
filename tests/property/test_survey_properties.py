"""Judging blocks, and saying where they are after a move: laws over every shape of damage and every
way to cut a run.
"""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.layout import Profile
from storaged.cluster.partitions import PartitionRecord
from storaged.fragments.ports import FragmentId
from storaged.maintain.health import BlockPlace, Presence, Room, Tally, blocks_of, claims, judge_block
from storaged.maintain.moves import replace_blocks
from storaged.objects.code.place import choose
from storaged.objects.records import PartEntry, Run
from storaged.sov1 import MAGIC, SUITE
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.examples import examples

LAYOUT = layout_of((3, 3, 3))
LAYOUTS = KnownLayouts(LAYOUT)
HEADER = MAGIC + bytes([SUITE, 16, 0, 0]) + bytes(56)
CELL = 65536 - 16
profiles = st.sampled_from([Profile(4, 2), Profile(2, 2), Profile(3, 2), Profile(1, 2)])


@st.composite
def entries(draw: st.DrawFn) -> PartEntry:
    """A coded part whose runs were written while different disks were away."""
    data_id = draw(st.binary(min_size=16, max_size=16))
    block_cells, runs, first = 12, [], 0
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 3))
        away = draw(st.sets(st.sampled_from([disk.id for disk in LAYOUT.disks]), max_size=4))
        placement = choose(
            LAYOUT, data_id, draw(profiles), {disk.id: disk.id not in away for disk in LAYOUT.disks}.__getitem__
        )
        runs.append(Run(first, count, placement.profile.k, placement.profile.m, LAYOUT.epoch, dict(placement.moved)))
        first += count
    cells = block_cells * (first - 1) + draw(st.integers(1, block_cells))
    return PartEntry(1, data_id, cells * CELL - draw(st.integers(0, CELL - 1)), HEADER, block_cells, "4+2", tuple(runs))


def places_of(entry: PartEntry) -> list[BlockPlace]:
    return list(blocks_of(entry, 0, LAYOUTS, ()))


@given(entries(), st.data())
def test_a_block_is_readable_exactly_while_enough_fragments_are_left(entry: PartEntry, data: st.DataObject) -> None:
    for place in places_of(entry):
        state = {where: data.draw(st.sampled_from(list(Presence))) for where in place.fragments}
        health = judge_block(place, state)
        shape, profile = place.shape, place.profile
        unneeded = {p for p in range(profile.k) if profile.k > 1 and p >= shape.cells}
        known = {fragment.position for (fragment, _), kind in state.items() if kind == Presence.OK} | unneeded
        assert health.readable == (len(known) >= profile.k)
        assert health.spare == len(known) - profile.k
        assert sorted((*health.present, *health.missing, *health.away)) == list(range(profile.n))


@given(entries(), st.data())
def test_there_is_a_finding_exactly_when_something_is_not_as_it_should_be(
    entry: PartEntry, data: st.DataObject
) -> None:
    tally, whole, worst, lost = Tally(b"name"), True, 1 << 30, False
    for place in places_of(entry):
        kinds = st.sampled_from([Presence.OK, Presence.OK, Presence.OK, Presence.MISSING, Presence.AWAY])
        health = judge_block(place, {where: data.draw(kinds) for where in place.fragments})
        tally.add(health, Room(data.draw(st.booleans()), frozenset()))
        if not health.whole:
            whole, worst = False, min(worst, health.spare)
            # Lost is what no return of disks brings back; with some only away, the block has merely stopped.
            unneeded = range(place.shape.cells, place.profile.k) if place.profile.k > 1 else ()
            lost = lost or health.spare + sum(position not in unneeded for position in health.away) < 0
    finding = tally.finding()
    assert (finding is None) == whole
    if finding is not None:
        assert finding.spare == worst
        assert finding.lost == lost


@given(entries())
def test_a_part_claims_what_its_blocks_name_and_nothing_else(entry: PartEntry) -> None:
    for place in places_of(entry):
        named = dict(place.fragments)
        for fragment, disk in named.items():
            for other in LAYOUT.disks:
                assert claims(entry, fragment, other.id, 0, LAYOUTS, ()) == (other.id == disk)
        for stray in (
            FragmentId(entry.data_id, place.block, 5, 1, 0),
            FragmentId(entry.data_id, 10_000, place.run.k, place.run.m, 0),
            FragmentId(bytes(16), place.block, place.run.k, place.run.m, 0)._replace(
                data_id=bytes(b ^ 1 for b in entry.data_id)
            ),
        ):
            assert not any(claims(entry, stray, disk.id, 0, LAYOUTS, ()) for disk in LAYOUT.disks)


@given(entries(), st.data())
@settings(max_examples=examples(200))
def test_a_move_changes_its_blocks_and_no_others(entry: PartEntry, data: st.DataObject) -> None:
    old = data.draw(st.sampled_from(entry.runs))
    first = data.draw(st.integers(old.first, old.first + old.count - 1))
    count = data.draw(st.integers(1, old.first + old.count - first))
    new = Run(first, count, 2, 2, 7, {0: "a0"})
    runs = replace_blocks(entry.runs, old, new)
    assert runs is not None
    before, after = by_block(entry.runs), by_block(runs)
    assert list(after) == list(before) == list(range(len(before)))
    for block, where in after.items():
        assert where == ((2, 2, 7, {0: "a0"}) if first <= block < first + count else before[block])
    assert all(by_block((one,))[one.first] != by_block((two,))[two.first] for one, two in itertools.pairwise(runs))
    assert replace_blocks(runs, old, new) is None


def by_block(runs: tuple[Run, ...]) -> dict[int, tuple[int, int, int, dict[int, str]]]:
    return {
        block: (run.k, run.m, run.epoch, run.moved) for run in runs for block in range(run.first, run.first + run.count)
    }


def test_small_copies_belong_to_the_replicas_of_both_sets_by_position() -> None:
    layouts = KnownLayouts(LAYOUT)
    layouts.partitions.learn(PartitionRecord(7, 1, ("a0", "b0", "c0"), ("a0", "b1", "c0"), LAYOUT.epoch))
    entry = PartEntry(1, b"d" * 16, 5_000, HEADER, 1, "4+2", (Run(0, 1, 1, 2, LAYOUT.epoch),), small=True)
    copies = [FragmentId(entry.data_id, 0, 1, 2, position) for position in range(3)]
    claimed = {
        (copy.position, disk.id)
        for copy in copies
        for disk in LAYOUT.disks
        if claims(entry, copy, disk.id, 7, layouts, ())
    }
    assert claimed == {(0, "a0"), (1, "b0"), (1, "b1"), (2, "c0")}
    [place] = blocks_of(entry, 7, layouts, ())
    assert place.disks == ("a0", "b0", "c0")
    layouts.partitions.learn(PartitionRecord(7, 2, ("a0", "b1", "c0"), (), LAYOUT.epoch))
    assert not claims(entry, copies[1], "b0", 7, layouts, ())
    [place] = blocks_of(entry, 7, layouts, ())
    assert place.disks == ("a0", "b1", "c0")
