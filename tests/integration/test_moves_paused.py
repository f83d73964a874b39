"""Moves are paused, resumed and paced, by a setting of the whole cluster that outlives every process."""

from __future__ import annotations

import asyncio
from dataclasses import replace as replace_ports

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from storaged.cluster.move_settings import PATH, UNKNOWN, MoveSettings, signed_bytes
from storaged.errors import ServiceUnavailable
from storaged.maintain.partition_mover import BURST_S, PartitionMover
from storaged.meta.names import Change, system_name
from storaged.node.move_settings import FollowedSettings
from storaged.wire import encode
from tests.doubles.clock import ManualClock
from tests.integration.memory_cluster import Cluster, layout_of, run
from tests.integration.test_fragments_follow import (
    FOUR,
    LIMITS,
    check,
    fragments_by_disk,
    layouts_of,
    store,
    until_placed,
)
from tests.integration.test_partition_mover import KEY, MOVED, SIGNER, World, key_of, names, world

__all__ = ["world"]


def sign(settings: MoveSettings) -> MoveSettings:
    return replace(settings, signer=SIGNER, signature=KEY.sign(signed_bytes("test", settings)))


def followed(one: World) -> FollowedSettings:
    return FollowedSettings(one.gateway.client, key_of, "test")


async def test_settings_are_the_clusters_and_outlive_processes(world: World) -> None:
    first, second = followed(world), followed(world)
    assert first.current is UNKNOWN
    await first.read()
    assert first.current == MoveSettings()
    await first.change("partitions", 5, sign, paused=True)
    await second.change("fragments", 6, sign, pace=1000)
    await first.read()
    started_later = followed(world)
    await started_later.read()
    for one in (first, second, started_later):
        assert (one.current.revision, one.current.partitions_paused, one.current.bytes_per_s) == (2, True, 1000)


async def test_without_a_majority_nothing_is_known_and_nothing_begins(world: World) -> None:
    world.disks.away = set(world.before.seeds[:2])
    unread = followed(world)
    with pytest.raises(ServiceUnavailable):
        await unread.read()
    world.disks.away = set()
    world.gateway.mover = PartitionMover(
        replace_ports(world.gateway.ports, settings=lambda: unread.current), partitions=MOVED
    )
    await world.learn()
    assert await world.gateway.mover.round() == 0
    assert "has not read yet whether moves are paused" in world.gateway.mover.progress.reason
    assert world.gateway.layouts.partitions.steps == 0


async def test_what_no_gateway_signed_is_not_believed_and_is_written_over(world: World) -> None:
    known = followed(world)
    await known.change("partitions", 5, sign, paused=True)
    other = Ed25519PrivateKey.generate()
    forged = MoveSettings(9)
    forged = replace(forged, signer=SIGNER, signature=other.sign(signed_bytes("test", forged)))
    for body in (encode(forged), b"no settings"):
        await world.gateway.client.change(system_name(PATH), lambda _before, body=body: Change(body))
        await known.read()
        assert known.problem
        assert known.current.partitions_paused, "what was known before counts"
        fresh = followed(world)
        await fresh.read()
        assert fresh.current is UNKNOWN, "a process that knows nothing else begins nothing"
    await known.change("fragments", 6, sign, paused=True)
    assert (known.problem, known.current.revision) == ("", 2)
    assert known.current.partitions_paused


async def test_a_paused_move_begins_nothing_and_leaves_nothing_joint(world: World) -> None:
    for name in names():
        await world.gateway.put(name, name.pack())
    settings, clock = MoveSettings(), ManualClock()
    ports = replace_ports(world.gateway.ports, settings=lambda: settings, clock=clock)
    world.gateway.mover = mover = PartitionMover(ports, at_once=2, joint_max=4, lost_s=1e9, partitions=MOVED)
    await world.learn()
    waiting = await mover.round()
    layouts = world.gateway.layouts
    joint = [number for number in MOVED if layouts.partition(number).coming]
    assert 0 < len(joint) <= 4 < waiting
    settings = MoveSettings(partitions_paused=True)
    async with asyncio.timeout(60):
        while await mover.round():
            pass
    assert not any(layouts.partition(number).coming for number in MOVED), "what was joint is settled"
    steps = layouts.partitions.steps
    for _ in range(3):
        assert await mover.round() == 0
    assert layouts.partitions.steps == steps
    for name in names():
        assert await world.other.get(name) == name.pack()
    settings = MoveSettings()
    await world.move()
    for name in names():
        assert await world.gateway.get(name) == name.pack()


async def test_a_change_that_is_taken_back_midway_ends_where_it_began(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"before")
    world.gateway.mover = mover = PartitionMover(
        world.gateway.ports, at_once=2, joint_max=4, lost_s=1e9, partitions=MOVED
    )
    await world.learn()
    layouts = world.gateway.layouts
    while not sum(layouts.partition(number).step == 2 for number in MOVED) > 4:
        assert await mover.round()
    assert any(layouts.partition(number).coming for number in MOVED)
    assert any(layouts.partition(number).step == 0 for number in MOVED)
    draining = tuple(replace(disk, state="draining") if disk.node == "nd" else disk for disk in world.after.disks)
    world.after = replace(world.after, epoch=3, disks=draining)
    for gateway in (world.gateway, world.other):
        gateway.layouts.learn(world.after)
    for name in names()[::3]:
        await world.other.put(name, b"meanwhile")
    await world.move()
    for number in MOVED:
        assert set(layouts.partition(number).present) == set(world.before.replicas_of(number))
    world.disks.away = {"d0"}
    for index, name in enumerate(names()):
        assert await world.other.get(name) == (b"before" if index % 3 else b"meanwhile")


async def test_exchanges_begin_within_the_pace(world: World) -> None:
    settings, clock = MoveSettings(partitions_per_min=6), ManualClock()
    ports = replace_ports(world.gateway.ports, settings=lambda: settings, clock=clock, gateways=lambda: 2)
    world.gateway.mover = mover = PartitionMover(ports, at_once=4, lost_s=1e9, partitions=MOVED)
    await world.learn()
    begun: list[int] = []
    layouts = world.gateway.layouts
    for _ in range(30):
        await mover.round()
        begun.append(sum(-(-layouts.partition(number).step // 2) for number in MOVED))
        clock.advance(10)
    assert begun[0] == 1
    assert begun[-1] <= 1 + (BURST_S + 300) / 20, "three a minute are this gateway's share of six"
    assert begun[-1] >= min(10, max(begun)), "and it does begin them"


def test_fragments_wait_while_they_are_paused_and_follow_within_the_pace() -> None:
    async def scenario(cluster: Cluster) -> None:
        layouts_of(cluster)
        await cluster.kill("nd")
        bucket = await store(cluster)
        before = await fragments_by_disk(cluster)
        settings = MoveSettings(revision=1, fragments_paused=True)
        for node in cluster.nodes.values():
            node.context.settings = lambda: settings
        cluster.maintain()
        await cluster.settled()
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(replace(layout_of(2, epoch=2, racks=FOUR), base=1))
        cluster.start("nd")
        cluster.nodes["nd"].context.settings = lambda: settings
        await cluster.pass_s(120)
        assert await fragments_by_disk(cluster) == before, "nothing moves"
        found = await cluster.statuses()
        assert sum(status.misplaced for status in found)
        assert sum(status.judged for status in found) == 24
        assert not any(status.busy for status in found), "a pause is not waited for"
        settings = MoveSettings(revision=2, bytes_per_s=5000)
        await cluster.pass_s(60)
        moved = sum(status.bytes_rebuilt for status in await cluster.statuses())
        assert 0 < moved <= 4 * (5000 * (60 + 20) + 250_000), "four nodes; each ends the object that it has begun"
        settings = MoveSettings(revision=3)
        await until_placed(cluster, bucket)
        await check(cluster, bucket)

    run(scenario, racks=FOUR, limits=LIMITS)
