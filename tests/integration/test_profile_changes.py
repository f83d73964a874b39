"""The target profile changes while the cluster works: what is written then has it at once, and repair codes everything
else again.
"""

from __future__ import annotations

import asyncio
from itertools import count

import pytest
from msgspec.structs import replace

from storaged.cluster.move_settings import MoveSettings
from storaged.maintain.context import MaintainLimits
from storaged.node.move_progress import MoveProgress, count_objects
from storaged.objects.records import BucketRecord
from tests.integration.memory_cluster import WHO, Cluster, run
from tests.integration.test_maintain_collect import upload_parts

DATA = {
    f"key {number}".encode(): bytes([number]) * size
    for number, size in enumerate((1, 900, 9_000, 16_000, 20_000, 70_000, 200_001, 400_000, 1_000_003))
}
SMALL = {key for key, data in DATA.items() if len(data) <= 16_000}
LIMITS = MaintainLimits(drop_delay_s=30, recode_delay_s=100)
DONE_S = 300


async def store(cluster: Cluster) -> BucketRecord:
    bucket = await cluster.bucket()
    for key, data in DATA.items():
        await cluster.put(bucket, key, data)
    return bucket


def change(cluster: Cluster, profile: str) -> None:
    """The next layout has another profile."""
    layout = cluster.layouts.current
    cluster.layouts.learn(replace(layout, epoch=layout.epoch + 1, profile=profile))


async def profiles(cluster: Cluster, bucket: BucketRecord, key: bytes) -> set[str]:
    """Of the blocks that are coded."""
    return {str(place.profile) for place in await cluster.places(bucket, key) if not place.entry.small}


async def outdated(cluster: Cluster) -> int:
    return sum(status.outdated for status in await cluster.statuses())


async def until_recoded(cluster: Cluster, bucket: BucketRecord, *keys: bytes, quiet: bool = True) -> None:
    """What waits only for the new profile is neither below target nor lost, and can be read at any time. ``quiet``:
    nothing else happens meanwhile.
    """
    target = str(cluster.layouts.current.target)
    for second in count():
        await cluster.pass_s(1)
        below, lost, counted = await cluster.counts()
        assert lost == 0
        assert below == 0 or not quiet
        for key in list(DATA)[second % 3 :: 3]:
            assert await cluster.get(bucket, key) == DATA[key]
        left = [key for key in (*DATA, *keys) if await profiles(cluster, bucket, key) - {target}]
        if not left and counted and not await outdated(cluster):
            return
        assert second < DONE_S, (left, [node.log[-3:] for node in cluster.nodes.values()])


async def check(cluster: Cluster, bucket: BucketRecord) -> None:
    target = str(cluster.layouts.current.target)
    for key, data in DATA.items():
        assert await cluster.get(bucket, key) == data
        assert await cluster.is_whole(bucket, key)
        entry = await cluster.entry(bucket, key)
        assert entry.target == (target if key not in SMALL else "4+2")


async def only_those_of_records(cluster: Cluster, bucket: BucketRecord, *keys: bytes) -> bool:
    named = {
        (disk, fragment)
        for key in (*DATA, *keys)
        for place in await cluster.places(bucket, key)
        for fragment, disk in place.fragments
    }
    return set(await cluster.fragments()) == named


def test_everything_gets_the_new_profile_and_the_old_fragments_go() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        new = []
        for profile in ("2+1", "1+2", "4+2"):
            change(cluster, profile)
            new.append(f"new {profile}".encode())
            await cluster.put(bucket, new[-1], b"n" * 50_000)
            assert await profiles(cluster, bucket, new[-1]) == {profile}
            await until_recoded(cluster, bucket)
            await check(cluster, bucket)
            await cluster.pass_s(120)  # the old places are kept for readers for a while
            assert await only_those_of_records(cluster, bucket, *new)
            await check(cluster, bucket)

    run(scenario, limits=LIMITS)


def test_what_is_left_is_counted_and_can_be_paused() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        for node in cluster.nodes.values():
            node.context.settings = lambda: MoveSettings(1, fragments_paused=True)
        change(cluster, "2+1")
        await cluster.pass_s(30)
        statuses = await cluster.statuses()
        assert await outdated(cluster) == len(DATA) - len(SMALL)
        job = MoveProgress(cluster.clock).jobs(None, count_objects(statuses), MoveSettings(1), "", "6 others")[0]
        assert (job.name, job.total - job.done) == ("fragments", len(DATA) - len(SMALL))
        assert job.detail.endswith("; 6 others")
        assert await profiles(cluster, bucket, b"key 8") == {"4+2"}
        for node in cluster.nodes.values():
            node.context.settings = lambda: MoveSettings(2)
        await until_recoded(cluster, bucket)
        await check(cluster, bucket)

    run(scenario, limits=LIMITS)


def test_the_target_may_change_again_before_all_have_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        for profile in ("2+1", "3+2", "2+1", "1+1", "4+2"):
            change(cluster, profile)
            await cluster.pass_s(3)
        await until_recoded(cluster, bucket, quiet=False)
        await cluster.pass_s(120)
        assert await only_those_of_records(cluster, bucket)
        await check(cluster, bucket)

    run(scenario, limits=LIMITS)


def test_a_node_that_starts_again_continues() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        change(cluster, "2+1")
        for node in cluster.nodes:
            await cluster.pass_s(2)
            await cluster.kill(node)
            await cluster.pass_s(2)
            cluster.start(node)
        await until_recoded(cluster, bucket, quiet=False)
        await cluster.pass_s(120)
        await check(cluster, bucket)

    run(scenario, limits=LIMITS)


@pytest.mark.parametrize("profile", ["2+1", "2+2"])
def test_while_a_rack_is_away_for_a_short_time_nothing_is_coded_again(profile: str) -> None:
    """Two racks can't hold 2+1, with at most one fragment in each. They can hold 2+2, but then the third would get
    nothing when it is back.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nc")
        change(cluster, profile)
        await cluster.pass_s(20)
        for key, data in DATA.items():
            assert await cluster.get(bucket, key) == data
            assert await profiles(cluster, bucket, key) <= {"4+2"}, "what can be read well stays as it is"
        cluster.start("nc")
        await until_recoded(cluster, bucket, quiet=False)
        await cluster.pass_s(120)
        await check(cluster, bucket)
        assert await only_those_of_records(cluster, bucket)

    run(scenario, limits=LIMITS)


def test_a_disk_that_is_away_for_long_does_not_hold_up_the_others() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        change(cluster, "2+1")
        await until_recoded(cluster, bucket)
        cluster.lose_disk("c1")
        change(cluster, "3+2")
        await cluster.pass_s(300)
        for key, data in DATA.items():
            assert await cluster.get(bucket, key) == data
            assert await profiles(cluster, bucket, key) <= {"3+2"}
            assert all("c1" not in place.disks for place in await cluster.places(bucket, key) if not place.entry.small)

    run(scenario, limits=LIMITS)


def test_all_parts_of_an_object_and_of_an_open_upload_are_coded_again() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        upload_id, parts, many = await upload_parts(cluster, bucket, b"many", dict.fromkeys(range(1, 41), 20_000))
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        assert (await cluster.record(bucket, b"many")).versions[0].manifest
        open_id, open_parts, whole = await upload_parts(cluster, bucket, b"open", {1: 300_000, 2: 20_000})
        cluster.maintain()
        await cluster.settled()
        change(cluster, "2+1")
        await until_recoded(cluster, bucket, b"many")
        assert not sum(status.misplaced for status in await cluster.statuses())
        await cluster.objects.complete(bucket, b"open", open_id, open_parts, owner=WHO.user_id)
        assert await profiles(cluster, bucket, b"open") == {"2+1"}
        assert await cluster.get(bucket, b"many") == many
        assert await cluster.get(bucket, b"open") == whole

    run(scenario, limits=LIMITS)


def test_a_body_that_was_begun_under_the_old_target_is_found() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        go = asyncio.Event()

        async def hold(_caller: str, _node: str, method: str, _request: object) -> None:
            if method == "fragment.sync":
                await go.wait()

        cluster.intercept = hold
        putting = asyncio.ensure_future(cluster.put(bucket, b"late", b"l" * 300_000))
        await cluster.pass_s(0.5)
        change(cluster, "2+1")
        cluster.intercept = None
        await cluster.pass_s(5)  # the walk after the new layout does not see it
        go.set()
        await putting
        await until_recoded(cluster, bucket, b"late", quiet=False)
        assert await cluster.get(bucket, b"late") == b"l" * 300_000

    run(scenario, limits=LIMITS)
