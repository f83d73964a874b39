"""Deletions of one bucket by several gateways at once, on a whole cluster: nothing that was acknowledged is in a bucket
that is gone, and no bucket stays closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from storaged.errors import BucketNotEmpty, NoSuchBucket, ServiceUnavailable, StoragedError
from storaged.meta.client import RingClient
from storaged.objects.api import CompletedPart, NewMeta
from storaged.objects.records import BucketRecord
from tests.integration.memory_cluster import Cluster, run


class Fences:
    """A gateway's fences, with its steps held up: before each one ``gate(step)`` is awaited."""

    def __init__(self, ring: RingClient) -> None:
        self._ring = ring
        self.reached: dict[str, asyncio.Event] = {}
        self.held: dict[str, asyncio.Event] = {}

    def hold(self, step: str) -> tuple[asyncio.Event, asyncio.Event]:
        self.reached[step], self.held[step] = asyncio.Event(), asyncio.Event()
        return self.reached[step], self.held[step]

    async def _gate(self, step: str) -> None:
        if step in self.held:
            self.reached[step].set()
            await self.held[step].wait()

    async def fence(
        self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False, lends: bool = False
    ) -> bool:
        await self._gate("final" if final else "lends" if lends else "fence")
        return await self._ring.fence(scope, shards, nonce, final=final, lends=lends)

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        await self._gate("unfence")
        return await self._ring.unfence(scope, shards, nonce)


def test_a_fence_that_comes_after_another_gateway_gave_the_bucket_back_does_not_close_it_for_ever() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        slow = cluster.new_gateway("slow")
        slow.plane.fences = fences = Fences(slow.ring)
        reached, held = fences.hold("fence")
        deleting = asyncio.ensure_future(slow.buckets.delete(bucket))
        await reached.wait()
        await cluster.put(bucket, b"key", b"precious")
        (record,) = await cluster.buckets.every_bucket()
        assert record.state == "deleting"
        await cluster.buckets.resume(record)
        held.set()
        with pytest.raises(ServiceUnavailable):
            await deleting
        bucket = await cluster.buckets.get("bucket")
        assert (bucket.state, bucket.nonce) == ("active", b"")
        assert await cluster.get(bucket, b"key") == b"precious"
        await cluster.put(bucket, b"key", b"more")

    run(scenario)


def test_no_gateway_lifts_the_fence_behind_which_another_finds_the_bucket_empty() -> None:
    """Two gateways take up a deletion; an object slips in before the first one's fence, and is deleted before the
    second one's.
    """

    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        first, second = cluster.new_gateway("first"), cluster.new_gateway("second")
        first.plane.fences = fences = Fences(first.ring)
        reached, held = fences.hold("fence")
        deleting = asyncio.ensure_future(first.buckets.delete(bucket))
        await reached.wait()
        await cluster.put(bucket, b"slipped in", b"")
        lifting, lift = fences.hold("unfence")
        held.set()
        await asyncio.wait({deleting, asyncio.ensure_future(lifting.wait())}, return_when=asyncio.FIRST_COMPLETED)
        acknowledged = False
        step = second.buckets._step

        async def slow_step(record: BucketRecord, after: BucketRecord, **more: bytes) -> BucketRecord | None:
            nonlocal acknowledged
            if after.state == "deleted":
                fences.hold("fence")
                lift.set()
                await cluster.pass_s(1)
                try:
                    await cluster.put(bucket, b"key", b"precious")
                    acknowledged = True
                except StoragedError:
                    pass
            return await step(record, after, **more)

        second.buckets._step = slow_step  # type: ignore[method-assign]
        for record in await second.buckets.every_bucket():
            await second.buckets.resume(record)
        await cluster.objects.delete(bucket, b"slipped in")
        await second.buckets.delete(await second.buckets.renewed("bucket"))
        lift.set()
        for event in fences.held.values():
            event.set()
        await asyncio.gather(deleting, return_exceptions=True)
        if acknowledged:
            assert await cluster.get(await cluster.buckets.get("bucket"), b"key") == b"precious"
        else:
            with pytest.raises(NoSuchBucket):
                await cluster.buckets.get("bucket")

    run(scenario)


def test_an_upload_that_is_created_while_its_bucket_is_deleted_does_not_keep_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        slow = cluster.new_gateway("slow")
        slow.plane.fences = fences = Fences(slow.ring)
        reached, held = fences.hold("fence")
        deleting = asyncio.ensure_future(slow.buckets.delete(bucket))
        await reached.wait()
        await cluster.objects.create_upload(bucket, b"upload", NewMeta(), owner="o")
        fences.held.clear()
        held.set()
        await deleting
        with pytest.raises(NoSuchBucket):
            await cluster.buckets.get("bucket")

    run(scenario)


def test_a_delete_that_an_object_prevents_just_before_the_fence_leaves_open_uploads_as_they_were() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket()
        upload = await cluster.objects.create_upload(bucket, b"upload", NewMeta(), owner="o")
        part = await cluster.put_part(bucket, b"upload", upload.upload_id, 1, b"a part")
        slow = cluster.new_gateway("slow")
        slow.plane.fences = fences = Fences(slow.ring)
        reached, held = fences.hold("fence")
        deleting = asyncio.ensure_future(slow.buckets.delete(bucket))
        await reached.wait()
        await cluster.put(bucket, b"key", b"precious")
        fences.held.clear()
        held.set()
        with pytest.raises(BucketNotEmpty):
            await deleting
        assert await cluster.get(bucket, b"key") == b"precious"
        [found] = (await cluster.objects.list_uploads(bucket))[0]
        assert found.upload_id == upload.upload_id
        parts = [CompletedPart(1, part.etag)]
        await cluster.objects.complete(bucket, b"upload", upload.upload_id, parts, owner="o")
        assert await cluster.get(bucket, b"upload") == b"a part"

    run(scenario)
