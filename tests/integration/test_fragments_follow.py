"""Fragments follow a newer layout: to a server that was added, and away from a disk that is drained."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from msgspec.structs import replace

from storaged.maintain.context import MaintainLimits
from storaged.objects.records import BucketRecord
from tests.integration.memory_cluster import RACKS, Cluster, layout_of, run

FOUR = {**RACKS, "d": "FR/lyo2/d"}
DATA = {f"key {number}".encode(): bytes([number]) * (200_000 + number) for number in range(24)}
LIMITS = MaintainLimits(drop_delay_s=30)


def layouts_of(cluster: Cluster) -> None:
    """The cluster begins without the disks of rack d."""
    everything = layout_of(2, racks=FOUR)
    some = tuple(disk for disk in everything.disks if disk.node != "nd")
    cluster.layouts.learn(replace(everything, disks=some))


async def store(cluster: Cluster) -> BucketRecord:
    bucket = await cluster.bucket()
    for key, data in DATA.items():
        await cluster.put(bucket, key, data)
    return bucket


async def fragments_by_disk(cluster: Cluster) -> Counter[str]:
    return Counter(disk for disk, _ in await cluster.fragments())


async def placed(cluster: Cluster, bucket: BucketRecord) -> bool:
    for key in DATA:
        if not all(place.placed for place in await cluster.places(bucket, key)):
            return False
    return True


async def until_placed(cluster: Cluster, bucket: BucketRecord) -> None:
    for _ in range(300):
        await cluster.pass_s(1)
        below, lost, _ = await cluster.counts()
        assert (below, lost) == (0, 0), "what only has to move is neither below target nor lost"
        for key in list(DATA)[:3]:
            assert await cluster.get(bucket, key) == DATA[key]
        if await placed(cluster, bucket):
            return
    raise AssertionError([node.log[-3:] for node in cluster.nodes.values()])


async def check(cluster: Cluster, bucket: BucketRecord) -> None:
    for key, data in DATA.items():
        assert await cluster.get(bucket, key) == data
        assert await cluster.is_whole(bucket, key)


def test_a_server_that_is_added_gets_its_share_and_no_more_than_that_moves() -> None:
    async def scenario(cluster: Cluster) -> None:
        layouts_of(cluster)
        await cluster.kill("nd")
        bucket = await store(cluster)
        before = await fragments_by_disk(cluster)
        cluster.maintain()
        await cluster.settled()
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(replace(layout_of(2, epoch=2, racks=FOUR), base=1))
        cluster.start("nd")
        await until_placed(cluster, bucket)
        await check(cluster, bucket)
        rebuilt = sum(status.fragments_rebuilt for status in await cluster.statuses())
        await cluster.pass_s(120)  # the old places are kept for readers for a while
        after = await fragments_by_disk(cluster)
        gained = after["d0"] + after["d1"]
        assert sum(after.values()) == sum(before.values())
        assert gained > sum(before.values()) / 8
        assert rebuilt <= 1.1 * gained
        await check(cluster, bucket)

    run(scenario, racks=FOUR, limits=LIMITS)


def test_a_node_says_by_which_layout_it_has_judged_what_moves() -> None:
    """Else nothing seems to move just after a layout is in force."""

    async def scenario(cluster: Cluster) -> None:
        layouts_of(cluster)
        await cluster.kill("nd")
        await store(cluster)
        cluster.maintain()
        await cluster.settled()
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(replace(layout_of(2, epoch=2, racks=FOUR), base=1))
        assert {status.layout for status in await cluster.statuses()} == {1}
        await cluster.pass_s(60)
        assert {status.layout for status in await cluster.statuses()} == {2}

    run(scenario, racks=FOUR, limits=LIMITS)


def test_a_server_that_is_added_and_comes_up_late_gets_its_share() -> None:
    async def scenario(cluster: Cluster) -> None:
        layouts_of(cluster)
        await cluster.kill("nd")
        bucket = await store(cluster)
        before = await fragments_by_disk(cluster)
        cluster.maintain()
        await cluster.settled()
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(replace(layout_of(2, epoch=2, racks=FOUR), base=1))
        await cluster.pass_s(200)
        assert await fragments_by_disk(cluster) == before, "what is whole waits for its place"
        assert sum(status.misplaced for status in await cluster.statuses())
        cluster.start("nd")
        await until_placed(cluster, bucket)
        await cluster.pass_s(120)
        after = await fragments_by_disk(cluster)
        assert after["d0"] + after["d1"] > sum(before.values()) / 8
        await check(cluster, bucket)

    run(scenario, racks=FOUR, limits=LIMITS)


@pytest.mark.parametrize("lost", [True, False])
def test_what_lay_on_a_disk_that_is_gone_is_rebuilt_elsewhere_at_once(lost: bool) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        if lost:
            cluster.lose_disk("d1")
        layout = layout_of(2, epoch=2, racks=FOUR)
        some = tuple(disk for disk in layout.disks if disk.id != "d1")
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(replace(layout, disks=some, base=1))
        for _ in range(120):
            await cluster.pass_s(1)
            places = [place for key in DATA for place in await cluster.places(bucket, key)]
            if not any("d1" in place.disks for place in places):
                break
        assert not any("d1" in place.disks for place in places), [node.log[-3:] for node in cluster.nodes.values()]
        for key, data in DATA.items():
            assert await cluster.get(bucket, key) == data

    run(scenario, racks=FOUR, limits=LIMITS)


def test_a_drained_disk_is_empty_in_the_end() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        assert (await fragments_by_disk(cluster))["d1"]
        layout = layout_of(2, epoch=2, racks=FOUR)
        disks = tuple(replace(disk, state="draining") if disk.id == "d1" else disk for disk in layout.disks)
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(replace(layout, disks=disks, base=1))
        await until_placed(cluster, bucket)
        await cluster.pass_s(120)
        assert not (await fragments_by_disk(cluster))["d1"]
        await check(cluster, bucket)

    run(scenario, racks=FOUR, limits=LIMITS)


def test_partitions_that_move_for_long_leave_time_for_repair() -> None:
    async def scenario(cluster: Cluster) -> None:
        maintenance = cluster.nodes["na"].maintenance
        began: list[float] = []
        moving_until = cluster.loop.time() + 600

        async def walk(_failures: list[str]) -> None:
            began.append(cluster.loop.time())
            await asyncio.sleep(10)

        maintenance.check._walk_ranges = walk  # type: ignore[method-assign]
        maintenance._context.steps = lambda: int(min(cluster.loop.time(), moving_until) / 5)
        cluster.maintain()
        await cluster.pass_s(600)
        assert 2 < len(began) <= 600 / 10 / 4, "each walk looks at everything, and repair does one thing after it"
        await cluster.pass_s(100)
        assert began[-1] > moving_until, "the places as they are in the end are looked at"
        assert maintenance.check.current

    run(scenario, limits=LIMITS)
