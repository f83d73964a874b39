"""A bucket deleted and made again through one gateway, while another still remembers the record of the one that is
gone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.clock import SystemClock
from storaged.errors import AccessDenied, BucketNotEmpty, NoSuchBucket, NoSuchKey, ServiceUnavailable
from storaged.objects.api import NO_WRITE_CONDITIONS, BodyChecks, Grant, NewMeta, Principal
from storaged.objects.records import BucketRecord
from storaged.objects.system.fenced import FENCED_MAX, FencedBuckets
from storaged.s3 import bucket_retry
from storaged.s3.operation import Operation
from storaged.s3.reply import Reply
from storaged.s3.request import NO_TARGET
from tests.integration.memory_cluster import WHO, Cluster, Gateway, body_of, run

OTHER = Principal("other", "other", "AKOTHER")
ASKING = Principal(WHO.user_id, WHO.display_name, "AKTESTER")


async def remade(cluster: Cluster, owner: Principal = WHO) -> tuple[Gateway, BucketRecord, BucketRecord]:
    """A second gateway, the record that it remembers, and the bucket that has its name now, with the object ``k``."""
    second = cluster.new_gateway("g2")
    first = await cluster.bucket()
    await cluster.put(first, b"deleted", b"before")
    await cluster.objects.delete(first, b"deleted")
    assert await second.buckets.get("bucket") == first
    await cluster.buckets.delete(first)
    again = await cluster.buckets.create(owner, "bucket", region="eu-fr-1")
    await cluster.put(again, b"k", b"acknowledged")
    stale = second.buckets.try_get("bucket")
    assert stale is not None
    assert stale.id != again.id
    return second, stale, again


class Front:
    """What ``bucket_retry.handle`` and handlers use of the front."""

    def __init__(self, gateway: Gateway) -> None:
        self.buckets, self.objects, self.clock = gateway.buckets, gateway.objects, SystemClock()


async def asked(gateway: Gateway, bucket: BucketRecord, name: str, work: Callable[[Any, BucketRecord], Any]) -> Any:
    """What an operation answers, through ``handle``."""

    async def handler(front: Any, request: Any) -> Reply:
        assert request.bucket_record == bucket or request.reading is None
        return await work(front.objects, request.bucket_record)  # type: ignore[no-any-return]

    request: Any = Request(bucket, ASKING)
    return await bucket_retry.handle(Front(gateway), request, Operation(name, handler))  # type: ignore[arg-type]


class Request:
    def __init__(self, bucket: BucketRecord, who: Principal) -> None:
        self._bucket_record, self.who, self.headers = bucket, who, dict[str, str]()
        self._grant: Grant | None = None
        self.target, self.key, self.operation = NO_TARGET, b"k", ""
        self.reading: object = "what was read ahead"

    @property
    def bucket_record(self) -> BucketRecord:
        return self._bucket_record


async def get(objects: Any, bucket: BucketRecord) -> Any:
    stream = await objects.get(bucket, b"k")
    return stream.held or b"".join([bytes(chunk) async for chunk in stream.chunks()])


async def keys(objects: Any, bucket: BucketRecord) -> Any:
    return list((await objects.list_objects(bucket)).keys)


async def put(objects: Any, bucket: BucketRecord) -> Any:
    await objects.put(
        bucket, b"k2", body_of(b"x"), NewMeta(), BodyChecks(size=1), owner=WHO.user_id, conditions=NO_WRITE_CONDITIONS
    )


async def remove(objects: Any, bucket: BucketRecord) -> Any:
    return await objects.delete(bucket, b"k")


async def miss(objects: Any, bucket: BucketRecord) -> Any:
    return await objects.get(bucket, b"never")


def test_what_is_missing_in_a_bucket_that_is_gone_is_found_in_the_one_that_has_its_name() -> None:
    async def scenario(cluster: Cluster) -> None:
        second, stale, _again = await remade(cluster)
        assert await asked(second, stale, "GetObject", get) == b"acknowledged"
        assert await asked(second, stale, "ListObjectsV2", keys) == [b"k"]
        with pytest.raises(NoSuchKey):
            await asked(second, stale, "GetObject", miss)
        with pytest.raises(ServiceUnavailable, match="made again"):
            await asked(*(await remade_again(cluster, second)), "PutObject", put)

    async def remade_again(cluster: Cluster, second: Gateway) -> tuple[Gateway, BucketRecord]:
        found = await second.buckets.get("bucket")
        await cluster.objects.delete(found, b"k")
        await cluster.buckets.delete(found)
        await cluster.bucket()
        return second, found

    run(scenario)


@pytest.mark.parametrize(("name", "work"), [("ListObjectsV2", keys), ("DeleteObject", remove)])
def test_an_operation_that_succeeds_on_nothing_is_asked_again_where_the_bucket_was_gone(name: str, work: Any) -> None:
    async def scenario(cluster: Cluster) -> None:
        second, stale, again = await remade(cluster)
        answer = await asked(second, stale, name, work)
        assert name == "DeleteObject" or answer == [b"k"]
        assert await keys(cluster.objects, again) == ([b"k"] if name == "ListObjectsV2" else [])

    run(scenario)


def test_a_bucket_that_another_user_has_now_is_not_entered() -> None:
    async def scenario(cluster: Cluster) -> None:
        second, stale, _again = await remade(cluster, OTHER)
        with pytest.raises(AccessDenied):
            await asked(second, stale, "GetObject", get)

    run(scenario)


def test_a_bucket_that_is_gone_for_good_is_said_to_be() -> None:
    async def scenario(cluster: Cluster) -> None:
        second = cluster.new_gateway("g2")
        bucket = await cluster.bucket()
        stale = await second.buckets.get("bucket")
        await cluster.buckets.delete(bucket)
        with pytest.raises(NoSuchBucket):
            await asked(second, stale, "GetObject", get)
        assert second.buckets.try_get("bucket") is None

    run(scenario)


def test_a_bucket_in_use_is_doubted_by_nobody_and_one_that_was_not_empty_is_believed_again() -> None:
    async def scenario(cluster: Cluster) -> None:
        second = cluster.new_gateway("g2")
        bucket = await cluster.bucket()
        await cluster.put(bucket, b"k", b"here")
        for _ in range(3):
            assert await asked(second, bucket, "GetObject", get) == b"here"
            with pytest.raises(NoSuchKey):
                await asked(second, bucket, "GetObject", miss)
            assert await asked(second, bucket, "ListObjectsV2", keys) == [b"k"]
        assert second.buckets.fences_seen() == 0
        with pytest.raises(BucketNotEmpty):
            await cluster.buckets.delete(bucket)
        assert await asked(second, bucket, "GetObject", get) == b"here"
        assert await asked(second, bucket, "ListObjectsV2", keys) == [b"k"]
        assert not second.buckets.gone(await second.buckets.get("bucket"))

    run(scenario)


def test_the_short_way_to_a_read_does_not_answer_for_a_fenced_bucket() -> None:
    async def scenario(cluster: Cluster) -> None:
        second, stale, again = await remade(cluster)
        told: list[Any] = []
        for bucket in (stale, again):
            second.objects.try_read(bucket, b"k", False, told.append)
            while len(told) < (1 if bucket is stale else 2):
                await cluster.pass_s(0.01)
        assert told[0] is None
        assert told[1] is not None

    run(scenario)


# --- what is remembered


def clock(seconds: list[float]) -> Any:
    return SimpleNamespace(monotonic=lambda: seconds[0])


def test_a_record_that_was_asked_for_before_the_fence_was_seen_clears_nothing() -> None:
    fenced = FencedBuckets(clock([0.0]), 1.0)
    since = fenced.count
    assert fenced.note_fenced(b"a")
    fenced.note_active(b"a", since, lingers=False)
    assert fenced.is_fenced(b"a")
    fenced.note_active(b"a", fenced.count, lingers=False)
    assert not fenced.is_fenced(b"a")
    fenced.note_active(b"never seen", fenced.count, lingers=False)


def test_a_fence_that_lingers_is_passed_over_for_a_moment_and_the_memory_is_bounded() -> None:
    seconds = [0.0]
    fenced = FencedBuckets(clock(seconds), 1.0)
    assert fenced.note_fenced(b"a")
    fenced.note_active(b"a", fenced.count, lingers=True)
    assert not fenced.note_fenced(b"a")
    seconds[0] = 1.0
    assert fenced.note_fenced(b"a")
    for number in range(FENCED_MAX + 10):
        fenced.note_fenced(b"%d" % number)
    assert len(fenced._seen) == FENCED_MAX
