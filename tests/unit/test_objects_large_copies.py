"""Whole copies of more than 64 KiB: their clients share the memory of transfers, as those of coded objects do."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from storaged.errors import BadDigest, IncompleteBody, InvalidRequest, XAmzContentSHA256Mismatch
from storaged.objects.api import BodyChecks, NewMeta, RangeSpec, Reading, ReadResult
from storaged.objects.cache.buffers import BufferPool
from storaged.objects.read.streams import FREE_BYTES_MAX, HeldStream, LeasedStream
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.wire import Buffer
from tests.worlds.objects import OWNER, World, bucket_of, entry_of, got, pieces, put

pytestmark = pytest.mark.virtual_time

KIB, MIB = 1024, 1024 * 1024
CELL = 64 * KIB - 16
LARGEST = 256 * KIB
WAIT_S = 5.0
"""Who must wait for memory gets SlowDown after this, and fails the test."""
BORDERS = [64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 2 * CELL - 1, 2 * CELL, 128 * KIB, LARGEST, LARGEST + 1]


def world_of(**limits: Any) -> World:
    return World(small_bytes_max=LARGEST, buffer_wait_s=WAIT_S, **limits)


def is_unused(*pools: BufferPool) -> bool:
    return not any(pool.bytes_leased or pool.transfers for pool in pools)


def pools_of(objects: ObjectService) -> tuple[BufferPool, ...]:
    plane = objects.plane
    return plane.fill_buffers, plane.put_buffers, plane.get_buffers


async def soon(objects: ObjectService, bucket: BucketRecord, span: RangeSpec | None = None) -> ReadResult:
    told: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
    objects.try_read(bucket, b"key", True, told.set_result, span)
    return await told


@pytest.mark.parametrize("size", BORDERS)
async def test_a_copy_is_read_back_as_it_was_written_with_a_task_and_without(size: int) -> None:
    world = world_of()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    await put(objects, bucket, data)
    assert entry_of(world).small == (size <= LARGEST)
    assert await got(objects, bucket) == data
    found = await soon(objects, bucket)
    if size <= LARGEST:
        assert isinstance(found, HeldStream)
        assert (found.held, found.length, found.partial) == (data, size, False)
        assert is_unused(*pools_of(objects)) == (size <= FREE_BYTES_MAX)
        found.release()
        found.release()
    assert is_unused(*pools_of(objects))
    await objects.close()


@pytest.mark.parametrize("size", [2 * CELL, LARGEST])
async def test_a_range_of_a_copy_holds_the_memory_of_its_chunks_alone(size: int) -> None:
    world = world_of()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    await put(objects, bucket, data)
    pool = objects.plane.get_buffers
    edges = [0, 1, CELL - 1, CELL, CELL + 1, 2 * CELL - 1, 2 * CELL, 64 * KIB, size - CELL - 1, size - 2, size - 1]
    for first in (at for at in edges if at < size):
        for last in (at for at in edges if first <= at < size):
            span = RangeSpec(first, last)
            found = await soon(objects, bucket, span)
            assert isinstance(found, HeldStream)
            assert found.held == data[first : last + 1]
            chunks = last // CELL - first // CELL + 1
            assert pool.bytes_leased <= (0 if last - first < FREE_BYTES_MAX else chunks * 64 * KIB)
            found.release()
            assert is_unused(pool)
            assert await got(objects, bucket, span=span) == data[first : last + 1]
            assert is_unused(pool)
    await objects.close()


async def test_an_opened_copy_gives_its_memory_back_however_it_ends_and_it_is_used_again() -> None:
    world = world_of()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(LARGEST)
    await put(objects, bucket, data)
    pool = objects.plane.get_buffers
    stream = await objects.get(bucket, b"key")
    assert isinstance(stream, LeasedStream)
    assert (pool.bytes_leased, pool.transfers) == (LARGEST, 1)
    await stream.close()
    await stream.close()
    assert is_unused(pool)
    chunks = (await objects.get(bucket, b"key")).chunks()
    assert await anext(chunks) == data
    await chunks.aclose()  # type: ignore[attr-defined]
    assert is_unused(pool)
    del chunks, stream
    gc.collect()
    assert pool.bytes_free == LARGEST, "one buffer has served both"
    await objects.close()


async def test_clients_that_take_no_copy_hold_a_bounded_memory_and_no_other_waits_for_them() -> None:
    world = world_of(get_buffer_bytes_max=8 * MIB)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(LARGEST)
    await put(objects, bucket, data)
    pool = objects.plane.get_buffers
    held: list[HeldStream] = []
    standing = []
    for _ in range(40):
        found = await soon(objects, bucket)
        if isinstance(found, HeldStream):
            held.append(found)
            continue
        assert isinstance(found, Reading)
        assert found.payload is None, "who waits for memory must not hold the copy"
        stream = await objects.get(bucket, b"key", reading=found)
        chunks = stream.chunks()
        assert data.startswith(first := bytes(await anext(chunks)))
        assert len(first) < LARGEST
        standing.append(chunks)
    assert pool.bytes_leased <= pool.bytes_max
    assert 20 < len(held) < 32
    assert await got(objects, bucket) == data
    for one in held:
        assert one.held == data
        one.release()
    for chunks in standing:
        assert data.endswith(b"".join([bytes(piece) async for piece in chunks]))
    assert is_unused(pool)
    await objects.close()


async def test_who_waits_for_memory_holds_no_copy_and_gets_it_when_there_is_room() -> None:
    world = world_of(get_buffer_bytes_max=MIB)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(LARGEST)
    await put(objects, bucket, data)
    read, copies = world.ring.read, list[weakref.ref[memoryview]]()

    async def noted(*which: Any, **how_read: Any) -> Reading:
        found = await read(*which, **how_read)
        if found.payload is None:
            return found
        copy = memoryview(bytes(found.payload))
        copies.append(weakref.ref(copy))
        return Reading(found.value, copy)

    world.ring.read = noted  # type: ignore[method-assign]
    pool = objects.plane.get_buffers
    others = await pool.lease(MIB)
    reading = asyncio.create_task(got(objects, bucket))
    await asyncio.sleep(0.1)
    assert pool._waiting
    assert copies
    assert [copy() for copy in copies] == [None] * len(copies)
    others.release()
    assert await reading == data
    assert is_unused(pool)
    await objects.close()


@pytest.mark.parametrize("how", ["cut", "one chunk less", "altered"])
async def test_a_copy_that_does_not_open_is_asked_of_others_and_gives_its_memory_back(how: str) -> None:
    world = world_of()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(LARGEST)
    await put(objects, bucket, data)
    read = world.ring.read

    async def lie(*which: Any, **how_read: Any) -> Reading:
        found = await read(*which, **how_read)
        assert found.payload is not None
        copy = bytearray(found.payload)
        if how == "altered":
            copy[-1] ^= 1
        return Reading(found.value, memoryview(copy[: {"cut": -1, "one chunk less": 4 * 64 * KIB}.get(how)]))

    world.ring.read = lie  # type: ignore[method-assign]
    for span in (None, RangeSpec(LARGEST - 1, None)):
        found = await soon(objects, bucket, span)
        assert isinstance(found, Reading)
        assert is_unused(objects.plane.get_buffers)
        assert await got(objects, bucket, span=span) == (data if span is None else data[-1:])
        assert is_unused(objects.plane.get_buffers)
    await objects.close()


@pytest.mark.parametrize("size", BORDERS)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"size": 1}, IncompleteBody),
        ({"size": -1}, IncompleteBody),
        ({"md5": bytes(16)}, BadDigest),
        ({"sha256": "0" * 64}, XAmzContentSHA256Mismatch),
        ({"checksums": {"CRC32": "AAAAAA=="}}, BadDigest),
        ({"algorithms": ("CRC32",), "trailing": lambda: {"CRC32": "AAAAAA=="}}, BadDigest),
        ({"trailing": lambda: {"CRC32": "AAAAAA=="}}, InvalidRequest),
    ],
    ids=["longer", "shorter", "md5", "sha256", "crc32", "trailer", "unannounced"],
)
async def test_a_body_that_is_not_what_was_declared_changes_nothing_and_gives_its_memory_back(
    size: int, wrong: dict[str, Any], error: type[Exception]
) -> None:
    world = world_of()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    await put(objects, bucket, b"before")
    checks = BodyChecks(**{**wrong, "size": size + wrong.get("size", 0)})
    with pytest.raises(error):
        await objects.put(bucket, b"key", pieces(data), NewMeta(), checks, owner=OWNER)
    assert await got(objects, bucket) == b"before"
    assert objects.statistics().puts_small == 0
    await objects.plane.background.settle()
    assert is_unused(*pools_of(objects))
    await objects.close()


@pytest.mark.parametrize("end", ["goes", "is given up"])
async def test_an_upload_that_ends_in_its_middle_gives_its_memory_back(end: str) -> None:
    world = world_of()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    stands, go = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[Buffer]:
        yield bytes(150_000)
        stands.set()
        await go.wait()
        raise IncompleteBody

    checks = BodyChecks(size=200_000)
    upload = asyncio.create_task(objects.put(bucket, b"key", body(), NewMeta(), checks, owner=OWNER))
    await stands.wait()
    filling, working, _ = pools_of(objects)
    assert filling.bytes_leased
    assert not working.bytes_leased, "no transfer holds it while it waits for a client"
    if end == "goes":
        go.set()
        with pytest.raises(IncompleteBody):
            await upload
    else:
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
    assert is_unused(filling, working)
    await objects.close()
