"""A read without a task tells what one with a task tells, or what that one goes on from."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref

import pytest

from storaged.errors import DataDamaged, NoSuchKey
from storaged.meta.names import Value, object_name
from storaged.objects.api import ObjectInfo, Reading, Soon
from storaged.objects.get import HeldStream
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from tests.unit.object_world import World, bucket_of, put


async def soon(objects: ObjectService, bucket: BucketRecord, want_plain: bool = True) -> Soon:
    told: asyncio.Future[Soon] = asyncio.get_running_loop().create_future()
    objects.read_soon(bucket, b"key", want_plain, told.set_result)
    return await told


@pytest.mark.parametrize("size", [0, 100, 5000])
@pytest.mark.parametrize("fresh", [True, False])
async def test_a_small_object_is_told_whole_and_counted_once(size: int, fresh: bool) -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    await put(objects, bucket, data)
    info = await objects.head(bucket, b"key")
    if fresh:
        objects.plane.opened.clear()
    before = objects.statistics()
    found = await soon(objects, bucket)
    assert isinstance(found, HeldStream)
    assert (found.held, found.info, found.first, found.length, found.partial) == (data, info, 0, size, False)
    after = objects.statistics()
    assert (after.gets - before.gets, after.bytes_out - before.bytes_out) == (1, size)
    assert await soon(objects, bucket, want_plain=False) == info
    assert objects.statistics() == after
    await objects.close()


async def test_of_what_takes_longer_the_reading_is_told_and_counted_by_who_goes_on_from_it() -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(50_000)
    await put(objects, bucket, data)
    assert isinstance(await soon(objects, bucket, want_plain=False), ObjectInfo)
    reading = await soon(objects, bucket)
    assert isinstance(reading, Reading)
    assert objects.statistics().gets == 0
    stream = await objects.get(bucket, b"key", reading=reading)
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data
    assert objects.statistics().gets == 1
    world.keys.late = True
    for want_plain in (True, False):
        assert isinstance(await soon(objects, bucket, want_plain), Reading)
    await objects.close()


async def test_a_copy_that_does_not_open_is_left_to_who_can_ask_its_neighbours() -> None:
    world = World()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, os.urandom(5000))
    for disk in world.disks.disks.values():
        for fragment in disk.fragments:
            disk.flip(fragment, 0, lie=True)
    assert isinstance(await soon(objects, bucket), Reading)
    assert objects.statistics().gets == 0
    await objects.close()


async def test_a_record_that_cannot_be_read_is_told_of() -> None:
    world = World()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, b"data")
    name = object_name(bucket.id, bucket.shards, b"key")
    value = world.ring.values[name]
    world.ring.values[name] = Value(value.sequence, value.operation, value.visibility, b"no record")
    assert isinstance(await soon(objects, bucket), DataDamaged)
    await objects.close()


async def test_that_there_is_no_such_object_is_told_and_leaves_no_garbage() -> None:
    world = World()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    told: asyncio.Future[tuple[type, weakref.ref[Exception]]] = asyncio.get_running_loop().create_future()

    def then(found: Soon) -> None:
        assert isinstance(found, Exception)
        told.set_result((type(found), weakref.ref(found)))

    gc.disable()
    try:
        objects.read_soon(bucket, b"key", True, then)
        kind, held = await told
        assert (kind, held()) == (NoSuchKey, None)
    finally:
        gc.enable()
    await objects.close()
