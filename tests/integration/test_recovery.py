"""Partitions that lost a majority of their replicas for good go on from those that are left.

The ring of the product runs on replicas in memory. A layout calls two disks lost; what was chosen where another replica
is left, is read afterwards, and what only the lost disks had is lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from storaged.cli.recovering import describe
from storaged.cluster import partitions
from storaged.cluster.layout import Layout
from storaged.cluster.partitions import PartitionRecord, PartitionState, check_step, next_step, recovery_of
from storaged.errors import InvalidArgument, LayoutRefused, ServiceUnavailable
from storaged.maintain.partition_mover import PartitionMover
from storaged.meta.names import Change, RegisterName, Table, Visibility
from storaged.node.losses import Losses
from tests.doubles.layouts import layout_of
from tests.integration.test_partition_mover import Disks, Gateway

BUCKETS = [number.to_bytes(16, "big") for number in range(1, 41)]
LOST = ("d0", "e0")
SIX = layout_of((1, 1, 1, 1, 1, 1))
LEFT = replace(
    SIX,
    epoch=100,
    base=1,
    disks=tuple(disk for disk in SIX.disks if disk.id not in LOST),
    lost=LOST,
)
NAMES = [RegisterName(Table.OBJECT, scope, shard, b"key %d" % shard) for scope in BUCKETS for shard in range(3)]
MOVED = sorted({name.partition for name in NAMES})


def stopped(name: RegisterName) -> bool:
    return set(LOST) <= set(SIX.replicas_of(name.partition))


@dataclass
class World:
    disks: Disks
    gateway: Gateway
    other: Gateway
    """It does not hear of anything, but when a replica refuses it."""

    async def lose(self, after: Layout = LEFT) -> None:
        self.disks.away = set(LOST)
        for gateway in (self.gateway, self.other):
            gateway.layouts.learn(after)
            await gateway.follower.read_all()

    async def move_some(self) -> None:
        """Until partitions are recovered, and before all of them are whole."""
        self.gateway.mover = PartitionMover(self.gateway.ports, at_once=16, joint_max=1, lost_s=1e9, partitions=MOVED)
        await self.gateway.mover.round()

    async def move(self) -> None:
        async with asyncio.timeout(120):
            while await self.gateway.mover.round():
                pass


@pytest.fixture
async def world() -> AsyncIterator[World]:
    disks = Disks(disk.id for disk in SIX.disks)
    gateways = Gateway("g1", disks, SIX), Gateway("g2", disks, SIX)
    for gateway in gateways:
        gateway.mover = PartitionMover(gateway.ports, at_once=16, lost_s=1e9, partitions=MOVED)
    yield World(disks, *gateways)
    for gateway in gateways:
        await gateway.client.close()


async def test_what_a_survivor_has_is_kept_and_the_set_becomes_whole(world: World) -> None:
    assert sum(map(stopped, NAMES)) >= 10
    for name in NAMES:
        await world.gateway.put(name, name.pack())
    world.disks.away = set(LOST)
    some = next(filter(stopped, NAMES))
    with pytest.raises(ServiceUnavailable):
        await world.gateway.get(some)
    await world.lose()
    await world.move()
    for name in NAMES:
        state = world.gateway.layouts.partition(name.partition)
        assert (state.lost, state.coming) == ((), ())
        assert set(state.present) == set(LEFT.replicas_of(name.partition))
        assert await world.other.get(name) == name.pack(), "the other gateway finds its way by itself"
        await world.other.put(name, b"after")
    for scope in BUCKETS:
        assert len(await world.other.listed(scope)) == 3
    for away in ("a0", "b0", "c0", "f0"):
        world.disks.away = {*LOST, away}
        for name in NAMES:
            assert await world.gateway.get(name) == b"after", "any one of the new replicas may be away"


async def test_deleted_keys_stay_deleted_and_what_only_lost_disks_had_is_lost(world: World) -> None:
    dead = [name for name in NAMES if stopped(name)]
    for name in dead:
        await world.gateway.put(name, b"body")
    for name in dead[::2]:
        await world.gateway.client.change(name, lambda _before: Change(b"", Visibility.TOMBSTONE))
    survivors = {next(disk for disk in SIX.replicas_of(name.partition) if disk not in LOST) for name in dead}
    world.disks.away = survivors
    late = [replace_key(name, b"late") for name in dead]
    for name in late:
        await world.gateway.put(name, b"only at lost disks")
    await world.lose()
    await world.move()
    for index, name in enumerate(dead):
        assert await world.other.get(name) == (b"body" if index % 2 else None)
    for name in late:
        assert await world.other.get(name) is None


def replace_key(name: RegisterName, key: bytes) -> RegisterName:
    return RegisterName(name.table, name.scope, name.shard, key)


async def test_no_operation_of_an_earlier_step_ends_after_it(world: World) -> None:
    """A gateway that knows the old step alone, and two disks that were said to be lost and are not."""
    dead = [name for name in NAMES if stopped(name)]
    for name in dead:
        await world.gateway.put(name, b"before")
    await world.lose()
    await world.move()
    for name in dead:
        await world.gateway.put(name, b"after")
    world.disks.away = set(LOST)
    late = Gateway("g3", world.disks, SIX)

    async def hears_nothing(_partition: int) -> None:
        pass

    late.follower.refresh = hears_nothing  # type: ignore[method-assign]
    try:
        with pytest.raises(ServiceUnavailable):
            await late.get(dead[0])
        with pytest.raises(ServiceUnavailable):
            await late.put(dead[0], b"too late")
        assert await world.other.get(dead[0]) == b"after"
    finally:
        await late.client.close()


async def test_a_recovery_that_begins_with_blank_disks_loses_what_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted wrong form: the new set at once, with two blank disks beside the survivor."""

    def wrong(state: PartitionState, layout: Layout) -> PartitionRecord | None:
        right = recovery_of(state, layout)
        if right is None:
            return None
        survivors = [disk for disk in right.present if disk not in right.lost]
        blank = [disk for disk in layout.replicas_of(state.partition) if disk not in survivors]
        present = tuple(blank.pop() if disk in right.lost else disk for disk in right.present)
        return replace(right, present=present, lost=())

    dead = [name for name in NAMES if stopped(name)]
    for name in dead:
        await world.gateway.put(name, b"body")
    monkeypatch.setattr(partitions, "recovery_of", wrong)
    monkeypatch.setattr("storaged.maintain.partition_mover.check_step", lambda *_: None)
    await world.lose()
    await world.move()
    found = []
    for name in dead:
        world.disks.away = {*LOST, next(disk for disk in SIX.replicas_of(name.partition) if disk not in LOST)}
        found.append(await world.gateway.get(name))
    assert None in found, "the planted form did no harm, so this test shows nothing"


@pytest.mark.parametrize("seed", range(3))
async def test_the_last_write_that_a_survivor_has_is_read(world: World, seed: int) -> None:
    """Whichever replica each write misses, and whether the disks were removed before they are called lost."""
    rng = random.Random(seed)
    expected: dict[RegisterName, bytes | None] = dict.fromkeys(filter(stopped, NAMES))
    for number in range(3):
        for name in expected:
            (survivor,) = set(SIX.replicas_of(name.partition)) - set(LOST)
            world.disks.away = {rng.choice(SIX.replicas_of(name.partition))}
            body = b"write %d" % number
            await world.gateway.put(name, body)
            if survivor not in world.disks.away:
                expected[name] = body
    if seed:
        await world.lose(replace(LEFT, lost=()))
        for _ in range(2):
            await world.gateway.mover.round()
    await world.lose(replace(LEFT, epoch=200))
    await world.move()
    for name, body in expected.items():
        assert await world.other.get(name) == body
        await world.gateway.put(name, b"after")
        assert await world.other.get(name) == b"after"


async def test_a_record_with_lost_disks_needs_a_layout_that_says_so(world: World) -> None:
    for name in NAMES:
        await world.gateway.put(name, b"body")
    await world.lose()
    stranger = Gateway("g3", world.disks, SIX)
    stranger.layouts.learn(replace(LEFT, epoch=99, lost=()))
    await world.move_some()
    try:
        await stranger.follower.read_all()
        recovered = [number for number in MOVED if world.gateway.layouts.partition(number).lost]
        assert recovered
        assert all(stranger.layouts.partition(number).step == 0 for number in recovered)
        stranger.layouts.learn(LEFT)
        await stranger.follower.read_all()
        assert all(stranger.layouts.partition(number).lost for number in recovered)
    finally:
        await stranger.client.close()


async def test_losses_say_what_is_left(world: World) -> None:
    for name in NAMES:
        await world.gateway.put(name, b"body")
    for gateway in (world.gateway, world.other):
        gateway.layouts.partitions.complete = True
    world.disks.away = set(LOST)
    losses = Losses(world.gateway.layouts, world.gateway.client.moves, world.disks.disk_readable)
    found = await losses.of(LOST)
    assert (found["system_lost"], found["nothing_left"], found["answering"]) == (False, [], [])
    rows = {row["partition"]: row for row in found["partitions"]}
    assert rows.keys() == {number for number in range(1024) if set(LOST) <= set(SIX.replicas_of(number))}
    for number in MOVED:
        if number in rows:
            (left,) = set(SIX.replicas_of(number)) - set(LOST)
            keys = sum(name.partition == number for name in NAMES)
            assert (rows[number]["left"], rows[number]["keys"]) == ([left], keys)
    assert "nothing is lost" in describe(await losses.of(LOST[:1]))[0]
    world.disks.away = set(SIX.disk_by_id) - {"f0"}
    found = await losses.of(("a0", "b0", "c0"))
    assert found["system_lost"]
    assert found["nothing_left"]
    assert {row["keys"] for row in found["partitions"] if "f0" not in row["left"]} == {None}
    world.disks.away = set()
    assert (await losses.of(LOST))["answering"] == list(LOST)
    with pytest.raises(InvalidArgument, match="has no disk z9"):
        await losses.of(("z9",))


async def test_disks_that_were_removed_first_are_recovered_all_the_same(world: World) -> None:
    """The ordinary removal makes the partitions joint, and they can't end without a majority of the present set."""
    for name in NAMES:
        await world.gateway.put(name, name.pack())
    await world.lose(replace(LEFT, lost=()))
    for _ in range(3):
        await world.gateway.mover.round()
    joint = [number for number in MOVED if world.gateway.layouts.partition(number).coming]
    assert any(recovery_of(world.gateway.layouts.partition(number), LEFT) for number in joint)
    for gateway in (world.gateway, world.other):
        gateway.layouts.learn(replace(LEFT, epoch=200))
    await world.move()
    for name in NAMES:
        assert await world.other.get(name) == name.pack()
        assert set(world.gateway.layouts.partition(name.partition).present) == set(LEFT.replicas_of(name.partition))


async def test_what_only_the_disk_that_comes_has_counts_like_what_only_the_one_that_goes_has(world: World) -> None:
    """A joint partition loses the two replicas that both of its sets have. Each of the others missed a write."""
    name = next(filter(stopped, NAMES))
    late = replace_key(name, b"late")
    (goes,) = set(SIX.replicas_of(name.partition)) - set(LOST)
    before = replace(SIX, epoch=50, base=1, disks=tuple(disk for disk in SIX.disks if disk.id != goes))
    for gateway in (world.gateway, world.other):
        gateway.layouts.learn(before)
        await gateway.follower.read_all()
    mover = world.gateway.mover = PartitionMover(world.gateway.ports, lost_s=1e9, partitions=[name.partition])
    await mover.round()
    state = world.gateway.layouts.partition(name.partition)
    assert state.goes == goes
    world.disks.away = {goes}
    await world.gateway.put(name, b"missed by the one that goes")
    world.disks.away = {state.comes}
    await world.gateway.put(late, b"missed by the one that comes")
    gone = tuple(disk for disk in before.disks if disk.id not in LOST)
    await world.lose(replace(LEFT, disks=gone, seeds=before.seeds))
    await mover.round()
    assert await world.gateway.get(name) == b"missed by the one that goes"
    assert await world.gateway.get(late) == b"missed by the one that comes"
    await world.move()
    state = world.gateway.layouts.partition(name.partition)
    assert (state.lost, state.coming) == ((), ())
    assert await world.other.get(name) == b"missed by the one that goes"
    assert await world.other.get(late) == b"missed by the one that comes"


# --- the step itself


def state_of(
    present: tuple[str, ...], coming: tuple[str, ...] = (), step: int = 0, lost: tuple[str, ...] = ()
) -> PartitionState:
    return PartitionState(7, step, 0, present, coming, lost)


@pytest.mark.parametrize(
    ("state", "step", "present", "lost"),
    [
        (state_of(("d0", "a0", "e0")), 2, ("d0", "a0", "e0"), ("d0", "e0")),
        (state_of(("d0", "a0", "e0"), ("d0", "a0", "b0"), 3), 4, ("d0", "a0", "b0"), ("d0",)),
        (state_of(("d0", "a0", "e0"), ("b0", "a0", "e0"), 3), 4, ("b0", "a0", "e0"), ("e0",)),
        (state_of(("d0", "a0", "b0"), ("d0", "a0", "e0"), 3), None, (), ()),
        (state_of(("e0", "a0", "b0"), step=4, lost=("e0",)), None, (), ()),
        (state_of(("e0", "d0", "b0"), step=4, lost=("e0",)), 6, ("e0", "d0", "b0"), ("e0", "d0")),
        (state_of(("d0", "a0", "b0")), None, (), ()),
        (state_of(("d0", "e0", "g0")), 2, ("d0", "e0", "g0"), ("d0", "e0")),
    ],
)
def test_which_step_recovers(
    state: PartitionState, step: int | None, present: tuple[str, ...], lost: tuple[str, ...]
) -> None:
    found = recovery_of(state, LEFT)
    assert (found is None) == (step is None)
    if found is not None:
        assert (found.step, found.present, found.coming, found.lost) == (step, present, (), lost)
        check_step(state, found, LEFT)
        for wrong in (
            replace(found, step=found.step + 2),
            replace(found, present=found.present[::-1]),
            replace(found, lost=(*found.lost, "a0")),
        ):
            with pytest.raises(LayoutRefused):
                check_step(state, wrong, LEFT)
        with pytest.raises(LayoutRefused):
            check_step(state, found, replace(LEFT, lost=()))


def test_a_partition_of_which_each_set_has_a_disk_left_that_the_other_lacks_stays_joint() -> None:
    state = state_of(("d0", "e0", "a0"), ("d0", "e0", "b0"), 3)
    found = recovery_of(state, LEFT)
    assert found is not None
    assert (found.step, found.present, found.coming, found.lost) == (5, state.present, state.coming, LOST)
    check_step(state, found, LEFT)
    after = state_of(found.present, found.coming, found.step, found.lost)
    assert after.voters == (("a0",), ("b0",))
    assert recovery_of(after, LEFT) is None


def test_a_coming_set_that_is_lost_is_given_up_as_ever() -> None:
    state = state_of(("d0", "a0", "b0"), ("d0", "a0", "e0"), 3)
    found = next_step(state, LEFT)
    assert found is not None
    assert (found.step, found.present, found.coming, found.lost) == (4, state.present, (), ())
    check_step(state, found, LEFT)


def test_nothing_goes_on_where_no_disk_is_left() -> None:
    three = replace(LEFT, lost=("a0", "d0", "e0"))
    assert recovery_of(state_of(("d0", "a0", "e0")), three) is None
