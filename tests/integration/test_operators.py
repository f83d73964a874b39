"""Four operators host one cloud together, and none of them is trusted alone."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from storaged.cluster.layout import Layout, problems_of
from storaged.cluster.spread import OPERATORS
from storaged.errors import ServiceUnavailable
from storaged.maintain.context import MaintainLimits
from storaged.objects.records import BucketRecord
from storaged.objects.where import where
from tests.integration.memory_cluster import RACKS, WHO, Cluster, layout_of, run
from tests.integration.test_maintain_collect import upload_parts

FOUR = {**RACKS, "d": "FR/lyo2/d"}
SIZES = (0, 1, 900, 4_000, 16_000, 50_000, 300_001)
LARGE = 40
"""So many that some lie where they may not, whatever their random ids are."""
LIMITS = MaintainLimits(drop_delay_s=30, recode_delay_s=60)


def spread_over(racks: dict[str, str], epoch: int = 1, *, base: int = 0) -> Layout:
    """Each rack has an operator of its own."""
    named = tuple(sorted((location, f"operator {rack}") for rack, location in racks.items()))
    layout = layout_of(2, epoch=epoch, racks=racks)
    layout = replace(layout, operators=named, spread=OPERATORS, base=base)
    assert not problems_of(layout)
    return layout


def body_of(key: bytes) -> bytes:
    return key[-1:] * SIZES[key[-1]]


async def store(cluster: Cluster, bucket: BucketRecord, name: bytes) -> list[bytes]:
    keys = [name + bytes([number]) for number in range(len(SIZES))]
    for key in keys:
        await cluster.put(bucket, key, body_of(key))
    return keys


async def check(cluster: Cluster, bucket: BucketRecord, keys: list[bytes]) -> None:
    """All can be read, are coded, and at no operator are so many fragments that it could read or withhold them."""
    for key in keys:
        assert await cluster.get(bucket, key) == body_of(key)
        entry = await cluster.entry(bucket, key)
        assert not entry.small
        assert not entry.inline
        places = await cluster.places(bucket, key)
        assert places
        for place in places:
            assert str(place.profile) == "4+2"
            assert max(Counter(disk[0] for disk in place.disks).values()) <= 2
            assert all(cluster.holds(disk, fragment) for fragment, disk in place.fragments)


def test_four_operators_write_while_one_is_away_and_nothing_is_a_whole_copy() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(FOUR))
        bucket = await cluster.bucket()
        keys = await store(cluster, bucket, b"before")
        await check(cluster, bucket, keys)
        for operator in FOUR:
            await cluster.kill(f"n{operator}")
            for key in keys:
                assert await cluster.get(bucket, key) == body_of(key)
            more = await store(cluster, bucket, f"without {operator}".encode())
            await check(cluster, bucket, more)
            for key in more:
                assert not any(disk.startswith(operator) for p in await cluster.places(bucket, key) for disk in p.disks)
            keys += more
            cluster.start(f"n{operator}", maintain=False)
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await check(cluster, bucket, keys)

    run(scenario, racks=FOUR, limits=LIMITS)


def test_what_an_operator_had_that_is_gone_is_rebuilt_at_the_others() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(FOUR))
        bucket = await cluster.bucket()
        keys = await store(cluster, bucket, b"key")
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        await cluster.pass_s(300)
        await check(cluster, bucket, keys)
        for key in keys:
            assert not any(disk.startswith("b") for place in await cluster.places(bucket, key) for disk in place.disks)

    run(scenario, racks=FOUR, limits=LIMITS)


def test_with_three_operators_nothing_is_written_weaker_while_one_is_away() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(dict(RACKS)))
        bucket = await cluster.bucket()
        keys = await store(cluster, bucket, b"key")
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        for size in SIZES:
            with pytest.raises(ServiceUnavailable, match="spread over operators"):
                await cluster.put(bucket, b"new", bytes(size))
        await cluster.pass_s(300)  # nothing is recoded for the operators that are left either
        for key in keys:
            assert await cluster.get(bucket, key) == body_of(key)
        cluster.start("nb")
        assert await cluster.settled() == (0, 0)
        await check(cluster, bucket, keys)
        await store(cluster, bucket, b"again")

    run(scenario, limits=LIMITS)


def test_what_was_coded_before_moves_to_where_no_operator_can_read_or_withhold_it() -> None:
    """Racks a and d have one operator. What was a whole copy stays one until it is written again."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        old = await store(cluster, bucket, b"old")
        large = [f"large {number}".encode() for number in range(LARGE)]
        for key in large:
            await cluster.put(bucket, key, key * 4000)
        cluster.maintain()
        await cluster.settled()
        spread = spread_over(FIVE, 2, base=1)
        named = tuple((rack, "operator a" if name == "operator d" else name) for rack, name in spread.operators)
        spread = replace(spread, operators=named)
        assert not problems_of(spread)

        async def shares() -> int:
            places = [place for key in large for place in await cluster.places(bucket, key)]
            return max(sum(disk[0] in "ad" for disk in place.disks) for place in places)

        assert await shares() > 2
        cluster.layouts.partitions.complete = True
        cluster.layouts.learn(spread)
        for _ in range(300):
            await cluster.pass_s(1)
            if not sum(status.misplaced for status in await cluster.statuses()) and await shares() <= 2:
                break
        assert await shares() <= 2
        for key in large:
            assert await cluster.get(bucket, key) == key * 4000
        for key in old:
            assert await cluster.get(bucket, key) == body_of(key)
            await cluster.put(bucket, key, body_of(key))
        await check(cluster, bucket, old)

    run(scenario, racks=FIVE, limits=LIMITS)


FIVE = {**FOUR, "e": "DE/fra1/e"}


def test_small_parts_are_coded_too_and_where_names_the_operators() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.layouts.learn(spread_over(FOUR))
        bucket = await cluster.bucket()
        upload_id, parts, whole = await upload_parts(cluster, bucket, b"many", {1: 20_000, 2: 5})
        await cluster.objects.complete(bucket, b"many", upload_id, parts, owner=WHO.user_id)
        assert await cluster.get(bucket, b"many") == whole
        for part in (await cluster.record(bucket, b"many")).versions[0].parts:
            assert part.runs
            assert not part.inline
        found = await where(cluster.gateway.objects.plane, bucket, b"many")
        for run_place in found.runs:
            named = Counter(fragment.operator for fragment in run_place.fragments)
            assert set(named) <= {f"operator {rack}" for rack in FOUR}
            assert max(named.values()) <= 2
        assert len({replica.operator for replica in found.replicas}) == 3

    run(scenario, racks=FOUR, limits=LIMITS)
