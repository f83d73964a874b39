"""Repair, rebuilding and recoding of objects with SSE-C: nodes work on sealed bytes, and nobody sends them a key."""

from __future__ import annotations

import os

from storaged.errors import InvalidRequest
from storaged.objects.api import BodyChecks, CompletedPart, NewMeta
from storaged.objects.encryption import CUSTOMER, Encryption
from storaged.objects.records import BucketRecord
from tests.integration.memory_cluster import WHO, Cluster, body_of, run
from tests.integration.test_profile_changes import LIMITS, change, outdated

KEY = bytes(range(32))
META = NewMeta(encryption=Encryption(CUSTOMER, customer_key=KEY))
DATA = {b"inline": os.urandom(10), b"small": os.urandom(5_000), b"large": os.urandom(2_500_000)}
PARTS = [os.urandom(300_000), os.urandom(7)]


async def store(cluster: Cluster) -> BucketRecord:
    bucket = await cluster.bucket()
    for key, data in DATA.items():
        await cluster.objects.put(bucket, key, body_of(data), META, BodyChecks(len(data)), owner=WHO.user_id)
    upload = await cluster.objects.create_upload(bucket, b"parts", META, owner=WHO.user_id)
    done = []
    for number, data in enumerate(PARTS, 1):
        result = await cluster.objects.put_part(
            bucket, b"parts", upload.upload_id, number, body_of(data), BodyChecks(len(data)), customer_key=KEY
        )
        done.append(CompletedPart(number, result.etag))
    await cluster.objects.complete(bucket, b"parts", upload.upload_id, done, owner=WHO.user_id, customer_key=KEY)
    return bucket


async def check(cluster: Cluster, bucket: BucketRecord) -> None:
    for key, data in {**DATA, b"parts": b"".join(PARTS)}.items():
        assert await cluster.is_whole(bucket, key), key
        stream = await cluster.objects.get(bucket, key, customer_key=KEY)
        assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data
        try:
            await cluster.objects.get(bucket, key)
        except InvalidRequest:
            continue
        raise AssertionError(f"{key!r} opens without the key")


def test_lost_fragments_are_rebuilt_without_the_customers_key() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        for key in (b"small", b"large", b"parts"):
            for place in await cluster.places(bucket, key):
                for fragment, disk in list(place.fragments)[:2]:
                    await cluster.store(disk).delete([fragment])
        cluster.maintain()
        assert await cluster.settled() == (0, 0)
        await check(cluster, bucket)

    run(scenario)


def test_objects_are_coded_again_without_the_customers_key() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await store(cluster)
        cluster.maintain()
        await cluster.settled()
        change(cluster, "2+1")
        for _ in range(600):
            await cluster.pass_s(1.0)
            places = await cluster.places(bucket, b"large")
            if not await outdated(cluster) and {str(place.profile) for place in places} == {"2+1"}:
                break
        assert {str(place.profile) for place in await cluster.places(bucket, b"parts")} <= {"2+1", "1+2"}
        await check(cluster, bucket)

    run(scenario, limits=LIMITS)
