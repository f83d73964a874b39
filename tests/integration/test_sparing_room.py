"""A disk is away for good, and the others have too little room for what it had: nothing begins, or it pauses in the
middle, until there is room. All nodes of the product in one process, in virtual time.
"""

from __future__ import annotations

import asyncio
import os

from storaged.maintain.repair import NO_RECODING_S, NO_ROOM
from storaged.maintain.spare_room import MARGIN_BYTES_MIN
from storaged.objects.records import BucketRecord
from storaged.wire import Message
from tests.integration.memory_cluster import WHO, Cluster, run
from tests.integration.test_maintain_cluster import DELAY_S

RACKS = {"a": "FR/par1/a", "b": "FR/par2/b", "c": "FR/lyo1/c", "d": "FR/lyo2/d"}
OBJECTS, BYTES = 32, 300_000


async def filled(cluster: Cluster, countries: tuple[str, ...] = ()) -> tuple[BucketRecord, str]:
    """A bucket with coded objects, and one of the disks that have some of it."""
    bucket = await cluster.buckets.create(WHO, "bucket", region="eu-fr-1", countries=countries)
    for number in range(OBJECTS):
        await cluster.put(bucket, b"%d" % number, os.urandom(BYTES))
    return bucket, "d0"


def held(cluster: Cluster) -> dict[str, int]:
    return {disk: store.held_bytes for node in cluster.nodes.values() for disk, store in node.fragments.items()}


def give_room(cluster: Cluster, spare: int) -> dict[str, int]:
    """Each disk may have so much more than it has, besides the margin. Returns what it may have."""
    bounds = {disk: used + spare for disk, used in held(cluster).items()}
    cluster.alive.room_bytes = {disk: bound + MARGIN_BYTES_MIN for disk, bound in bounds.items()}
    return bounds


async def on_disk(cluster: Cluster, bucket: BucketRecord, disk: str) -> int:
    places = [place for number in range(OBJECTS) for place in await cluster.places(bucket, b"%d" % number)]
    return sum(disk in place.disks for place in places)


def test_without_room_nothing_is_written_anew_and_it_begins_by_itself_when_there_is_room() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, lost = await filled(cluster)
        before = await on_disk(cluster, bucket, lost)
        assert before > 2
        had = held(cluster)[lost]
        give_room(cluster, had // 16)
        cluster.maintain()
        await cluster.settled()
        cluster.lose_disk(lost)
        await cluster.pass_s(DELAY_S + 120)
        statuses = await cluster.statuses()
        assert sum(status.away_bytes for status in statuses) > had // 2
        assert not sum(status.fragments_rebuilt for status in statuses)
        assert await on_disk(cluster, bucket, lost) == before
        assert any("have no room" in line for node in cluster.nodes.values() for line in node.log)
        assert all(status.waits.recode_in_s == NO_RECODING_S for status in statuses)

        give_room(cluster, had)
        await cluster.pass_s(300)
        await cluster.settled()
        assert await on_disk(cluster, bucket, lost) == 0
        assert sum(status.away_bytes for status in await cluster.statuses()) == 0

        asked: list[str] = []

        async def counted(_caller: str, _node: str, method: str, _request: Message) -> None:
            asked.append(method)

        cluster.intercept = counted
        await cluster.pass_s(60)
        assert "maintain.status" not in asked, "nothing is left to write anew, though the disk never returns"

    run(scenario, racks=RACKS)


def test_when_the_room_is_taken_in_the_middle_it_pauses_and_no_disk_is_filled() -> None:
    """What clients write takes it."""

    async def slow(_caller: str, _node: str, method: str, _request: Message) -> None:
        if method == "fragment.write":
            await asyncio.sleep(12)

    async def scenario(cluster: Cluster) -> None:
        bucket, lost = await filled(cluster)
        cluster.intercept = slow
        before = await on_disk(cluster, bucket, lost)
        cluster.maintain()
        await cluster.settled()
        give_room(cluster, held(cluster)[lost])
        cluster.lose_disk(lost)
        await cluster.pass_s(DELAY_S - 5)
        while await on_disk(cluster, bucket, lost) == before:
            await cluster.pass_s(1)
        bounds = give_room(cluster, BYTES // 8)
        await cluster.pass_s(60)
        left = await on_disk(cluster, bucket, lost)
        assert 0 < left < before, "it has begun, and pauses"
        await cluster.pass_s(120)
        assert await on_disk(cluster, bucket, lost) == left
        found = held(cluster)
        over = {disk: found[disk] - bound for disk, bound in bounds.items() if found[disk] > bound}
        assert sum(over.values()) <= 3 * BYTES, "what had begun has ended"
        for number in range(OBJECTS):
            assert len(await cluster.get(bucket, b"%d" % number)) == BYTES

        give_room(cluster, held(cluster)[lost])
        await cluster.pass_s(600)
        await cluster.settled()
        assert await on_disk(cluster, bucket, lost) == 0

    run(scenario, racks=RACKS)


def test_what_has_no_spare_left_is_written_anew_as_far_as_there_is_room() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, _ = await filled(cluster)
        cluster.maintain()
        await cluster.settled()
        disks = ("d0", "d1")
        lost_bytes = sum(held(cluster)[disk] for disk in disks)
        give_room(cluster, 0)
        counts = dict.fromkeys(range(OBJECTS), 0)
        for number in counts:
            for place in await cluster.places(bucket, b"%d" % number):
                counts[number] = max(counts[number], len(set(disks) & set(place.disks)))
        assert set(counts.values()) >= {1, 2}
        for disk in disks:
            cluster.lose_disk(disk)

        async def still() -> set[int]:
            """The objects that name a disk that is lost."""
            found = [(number, place) for number in counts for place in await cluster.places(bucket, b"%d" % number)]
            return {number for number, place in found if set(disks) & set(place.disks)}

        await cluster.pass_s(DELAY_S + 300)
        touched = {number for number, count in counts.items() if count}
        assert await still() == touched, "there is no room at all"
        bounds = give_room(cluster, lost_bytes // 8)  # six disks would have to take a sixth each
        await cluster.pass_s(600)
        found = await still()
        assert found < touched
        assert {counts[number] for number in touched - found} == {2}
        over = {disk: held(cluster)[disk] - bound for disk, bound in bounds.items() if disk not in disks}
        assert max(over.values()) <= BYTES, over
        give_room(cluster, lost_bytes)
        await cluster.pass_s(300)
        assert await still() == set()

    run(scenario, racks=RACKS)


def test_room_in_other_countries_than_those_of_a_bucket_does_not_fill_the_disks_that_may_have_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, lost = await filled(cluster, ("FR",))
        before = await on_disk(cluster, bucket, lost)
        had = held(cluster)[lost]
        cluster.maintain()
        await cluster.settled()
        bounds = give_room(cluster, had // 16)
        for disk in ("e0", "e1", "f0", "f1", "g0", "g1"):
            cluster.alive.room_bytes[disk] += 100 * had
        cluster.lose_disk(lost)
        await cluster.pass_s(DELAY_S + 300)
        over = {disk: held(cluster)[disk] - bound for disk, bound in bounds.items() if disk != lost}
        assert max(over.values()) <= BYTES // 3, over  # one fragment: three cells of 32 KiB
        assert 0 < await on_disk(cluster, bucket, lost) < before, "as far as there is room"
        reasons = [reason for status in await cluster.statuses() for reason, _ in status.unrepaired]
        assert NO_ROOM in reasons

        give_room(cluster, had)
        await cluster.pass_s(3700)
        await cluster.settled()
        assert await on_disk(cluster, bucket, lost) == 0

    run(scenario, racks={**RACKS, "e": "DE/fra1/e", "f": "DE/ber1/f", "g": "DE/ham1/g"})
