"""One storage node lies about what there is, and an honest replica lags: nothing that is there is deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

from storaged.errors import SlowDown
from storaged.maintain.context import MaintainLimits
from storaged.meta.consensus.looks import Look
from storaged.meta.names import RegisterName, Table, object_name, upload_name
from storaged.meta.store_ports import Fence, StoreBatch
from storaged.node.housekeeping import tidy
from storaged.objects.records import BucketRecord
from storaged.objects.write.uploads import parse_upload_id
from tests.integration.memory_cluster import Cluster, run
from tests.integration.test_maintain_collect import (
    ORPHAN_S,
    PART,
    RETIRE_S,
    collect,
    leave_out_buckets,
    sweep,
    upload_parts,
)

KEY = b"k"
NONCE = bytes(16)
"""Below those of the bucket's record."""


async def open_upload(cluster: Cluster, bucket: BucketRecord) -> tuple[bytes, list[bytes]]:
    """Its id, and the data ids of the two attempts at its only part. The first one is on garbage lists."""
    upload_id, *_ = await upload_parts(cluster, bucket, KEY, {1: PART})
    first = {fragment.data_id for _, fragment in await cluster.fragments()}
    await cluster.put_part(bucket, KEY, upload_id, 1, os.urandom(PART))
    await cluster.pass_s(1)
    both = {fragment.data_id for _, fragment in await cluster.fragments()}
    return parse_upload_id(upload_id), [*first, *(both - first)]


def replicas_of(cluster: Cluster, bucket: BucketRecord) -> list[str]:
    name = object_name(bucket.id, bucket.shard_numbers, KEY)
    return list(cluster.layouts.partition(name.partition).present)


async def write_to(cluster: Cluster, disks: Iterable[str], batch: StoreBatch) -> None:
    """What these disks have, whatever was agreed."""
    for disk in disks:
        await cluster.meta(disk).commit(batch)
        cluster.nodes[cluster.layouts.current.node_of(disk)].replicas[disk]._fences._known.clear()


async def rows_of(cluster: Cluster, bucket: BucketRecord, table: Table) -> list[RegisterName]:
    return [
        name
        for disk in replicas_of(cluster, bucket)
        for name in map(RegisterName.unpack, cluster.rows(disk))
        if (name.table, name.scope) == (table, bucket.id)
    ]


@pytest.mark.parametrize("says", ["what is true", "that the fence stays"])
def test_a_node_that_hides_a_bucket_while_its_deletion_is_refused_costs_open_uploads_no_part(
    monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    """The fence is there for a moment, and the key of an open upload holds nothing: only that the fence stays for ever
    tells such a bucket from one that is gone.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await open_upload(cluster, bucket)
        before = await cluster.fragments()
        await cluster.leap(ORPHAN_S + 60)
        with monkeypatch.context() as lies:
            leave_out_buckets(cluster, lies)
            await cluster.gateway.ring.fence(bucket.id, bucket.shard_numbers, NONCE)
            if says == "that the fence stays":
                liar = replicas_of(cluster, bucket)[:1]
                await write_to(cluster, liar, StoreBatch(fences=[Fence(bucket.id, NONCE, True)]))
            await sweep(cluster)
            await cluster.pass_s(1)
            assert await collect(cluster) == 0
        assert await cluster.fragments() == before
        await cluster.gateway.ring.unfence(bucket.id, bucket.shard_numbers, NONCE)
        await cluster.buckets.delete(bucket)
        await cluster.pass_s(MaintainLimits().retry_max_s)
        for node in cluster.nodes.values():
            await node.maintenance.collector._judge.buckets.refresh(node.context)
        await cluster.leap(RETIRE_S + 60)
        await collect(cluster)
        assert await cluster.fragments() == [], "now it is gone"

    run(scenario)


def test_replicas_that_do_not_say_which_fences_stay_lead_to_no_deletion() -> None:
    """Those of version 0.1.0, of which a majority is left."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await open_upload(cluster, bucket)
        before = await cluster.fragments()
        await cluster.buckets.delete(bucket)
        await cluster.leap(RETIRE_S + 60)
        old = replicas_of(cluster, bucket)[:2]
        for node in cluster.nodes.values():
            look = node.context.look

            async def look_at_old(name: RegisterName, look: object = look) -> Look:
                found: Look = await look(name)  # type: ignore[operator]
                return found._replace(final=found.final.difference(old))

            monkey = node.maintenance.collector._judge._context
            monkey.look = look_at_old
        assert await collect(cluster) == 0
        assert await cluster.fragments() == before
        old.pop()
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await collect(cluster)
        assert await cluster.fragments() == []

    run(scenario)


def test_a_fence_that_its_gateway_did_not_make_final_is_made_so_by_housekeeping() -> None:
    """Otherwise the garbage would wait for it, and the key, whose end used to do that, for the garbage."""

    async def scenario(cluster: Cluster) -> None:
        cluster.keys.now_ms = cluster.clock.wall_ms
        bucket = await cluster.bucket()
        await open_upload(cluster, bucket)
        await cluster.buckets.delete(bucket)
        await cluster.pass_s(1)
        fence = cluster.meta(replicas_of(cluster, bucket)[0]).get_fence(bucket.id)
        assert fence is not None
        assert fence.final
        every = [disk.id for disk in cluster.layouts.current.disks]
        await write_to(cluster, every, StoreBatch(fences=[Fence(bucket.id, fence.nonce, False)]))
        await cluster.leap(RETIRE_S + 60)
        before = await cluster.fragments()
        assert await collect(cluster) == 0
        await tidy(cluster.gateway.plane, cluster.buckets)
        assert bucket.id in cluster.keys.newest, "its key waits for the garbage"
        await cluster.pass_s(MaintainLimits().retry_max_s)
        await collect(cluster)
        assert before
        assert await cluster.fragments() == []
        await tidy(cluster.gateway.plane, cluster.buckets)
        assert bucket.id not in cluster.keys.newest

    run(scenario)


@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_bucket_whose_last_object_a_liar_and_a_replica_that_lags_do_not_have_is_not_deleted(third: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, KEY, data := os.urandom(PART))
        name = object_name(bucket.id, bucket.shard_numbers, KEY)
        replicas = replicas_of(cluster, bucket)
        (slot,) = [slot for slot in [cluster.meta(replicas[third]).get(name)] if slot is not None]
        two = [disk for disk in replicas if disk != replicas[third]]
        await write_to(cluster, two, StoreBatch(gone=[name]))
        with pytest.raises(SlowDown, match="others do not know"):
            await cluster.buckets.delete(bucket)
        await write_to(cluster, two, StoreBatch(slots=[slot]))
        assert await cluster.get(bucket, KEY) == data

    run(scenario)


def test_what_an_interrupted_write_left_at_one_replica_keeps_a_bucket_until_repair_has_looked_at_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        await cluster.put(bucket, KEY, b"data")
        name = object_name(bucket.id, bucket.shard_numbers, KEY)
        await write_to(cluster, replicas_of(cluster, bucket)[1:], StoreBatch(gone=[name]))
        with pytest.raises(SlowDown, match="others do not know"):
            await cluster.buckets.delete(bucket)
        cluster.maintain()
        await cluster.pass_s(2 * MaintainLimits().walk_retry_max_s)
        await cluster.buckets.delete(await cluster.buckets.get(bucket.name))

    run(scenario)


def test_a_bucket_is_deleted_although_a_replica_missed_the_deletion_of_its_objects() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        keys = [b"%d" % number for number in range(30)]
        for key in keys:
            await cluster.put(bucket, key, b"data")
        await cluster.kill("nb")
        for key in keys:
            await cluster.objects.delete(bucket, key)
        cluster.start("nb", maintain=False)
        assert any(visibility for disk in ("b0", "b1") for _, visibility in cluster.rows(disk).values())
        await cluster.buckets.delete(bucket)

    run(scenario)


@pytest.mark.parametrize("way", ["retired", "swept"])
def test_an_upload_that_a_liar_and_a_replica_that_lags_do_not_have_keeps_its_parts(way: str) -> None:
    """The listing and the read of its row ask a majority: both see nothing of it."""

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, _ = await open_upload(cluster, bucket)
        before = await cluster.fragments()
        two = replicas_of(cluster, bucket)[:2]
        gone = [upload_name(bucket.id, KEY, upload_id), *await rows_of(cluster, bucket, Table.PART)]
        await write_to(cluster, two, StoreBatch(gone=gone))
        if way == "retired":
            await cluster.leap(RETIRE_S + 60)
        else:
            for store in (store for node in cluster.nodes.values() for store in node.fragments.values()):
                for data_id in {fragment.data_id for fragment in store.fragments}:
                    await store.unretire(data_id)
            await cluster.leap(ORPHAN_S + 60)
            await sweep(cluster)
            await cluster.pass_s(1)
        assert await collect(cluster) == 0
        assert await cluster.fragments() == before
        third = replicas_of(cluster, bucket)[2:]
        await write_to(cluster, third, StoreBatch(gone=gone))
        await cluster.pass_s(MaintainLimits().retry_max_s)
        assert await collect(cluster) > 0, "no replica has it"

    run(scenario)


@pytest.mark.parametrize("way", ["retired", "swept"])
def test_while_a_replica_is_away_an_upload_that_the_others_do_not_have_keeps_its_parts(way: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload_id, _ = await open_upload(cluster, bucket)
        *two, away = replicas_of(cluster, bucket)
        gone = [upload_name(bucket.id, KEY, upload_id), *await rows_of(cluster, bucket, Table.PART)]
        await write_to(cluster, two, StoreBatch(gone=gone))
        await cluster.leap(ORPHAN_S + 60)
        await cluster.kill(cluster.layouts.current.node_of(away))
        before = await cluster.fragments()
        if way == "swept":
            await sweep(cluster)
            await cluster.pass_s(1)
        assert await collect(cluster) == 0
        assert await cluster.fragments() == before

    run(scenario)
