"""Clients that send or take little, or stand still, hold a bounded share of the memory of transfers, and nobody else up."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Sequence

from storaged.fragments.ports import FragmentHeader
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.get import SLOW_WINDOW_BYTES
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.wire import Buffer
from tests.unit.fakes_objects import World

KIB, MIB = 1024, 1024 * 1024
OWNER = "f" * 64
SLOW = 64
WAIT_S = 5.0
"""Who must wait for memory gets SlowDown after this, and fails the test."""


def bucket_of(world: World) -> BucketRecord:
    bucket = BucketRecord("b", b"B" * 16, OWNER, 1, "active", 16, "eu-fr-1")
    world.keys.newest[bucket.id] = 1
    return bucket


async def put(objects: ObjectService, bucket: BucketRecord, key: bytes, body: AsyncIterator[Buffer], size: int | None = None) -> None:
    await objects.put(bucket, key, body, NewMeta(), BodyChecks(size=size), owner=OWNER)


async def whole(data: bytes) -> AsyncIterator[Buffer]:
    for at in range(0, len(data), 100_000):
        yield data[at : at + 100_000]


async def got(objects: ObjectService, bucket: BucketRecord, key: bytes) -> bytes:
    return b"".join([bytes(piece) async for piece in (await objects.get(bucket, key)).chunks()])


class StandingBody:
    """A body whose client stands still after ``moving`` bytes until ``go``."""

    def __init__(self, data: bytes, moving: int, go: asyncio.Event) -> None:
        self._data, self._moving, self._go = data, moving, go
        self.stands = asyncio.Event()

    async def pieces(self) -> AsyncIterator[Buffer]:
        yield self._data[: self._moving]
        self.stands.set()
        await self._go.wait()
        yield self._data[self._moving :]


async def test_an_upload_does_not_wait_for_the_clients_of_64_others_that_stand_still() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket, go = ObjectService(world.plane()), bucket_of(world), asyncio.Event()
    filling, working = objects.plane.fill_buffers, objects.plane.put_buffers
    data = os.urandom(900_000)
    bodies = [StandingBody(data, 800_000, go) for _ in range(SLOW)]
    uploads = [asyncio.create_task(put(objects, bucket, b"slow%d" % n, body.pieces())) for n, body in enumerate(bodies)]
    for body in bodies:
        await body.stands.wait()
    await asyncio.sleep(0.1)  # the blocks that were filled reach their disks
    assert not working.bytes_leased
    assert filling.transfers == SLOW
    assert filling.bytes_leased <= filling.bytes_max
    fast = os.urandom(7 * MIB)
    await put(objects, bucket, b"fast", whole(fast), len(fast))
    await put(objects, bucket, b"unsized", whole(fast))
    assert filling.bytes_leased <= filling.bytes_max
    assert not any(upload.done() for upload in uploads)
    go.set()
    await asyncio.gather(*uploads)
    assert await got(objects, bucket, b"fast") == await got(objects, bucket, b"unsized") == fast
    for number in range(SLOW):
        assert await got(objects, bucket, b"slow%d" % number) == data
    assert filling.bytes_leased == working.bytes_leased == filling.transfers == 0
    await objects.close()


async def test_an_upload_that_is_given_up_gives_its_memory_back() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    body = StandingBody(os.urandom(900_000), 800_000, asyncio.Event())
    upload = asyncio.create_task(put(objects, bucket, b"key", body.pieces()))
    await body.stands.wait()
    assert objects.plane.fill_buffers.bytes_leased
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)
    assert objects.plane.fill_buffers.bytes_leased == objects.plane.put_buffers.bytes_leased == objects.plane.fill_buffers.transfers == 0
    await objects.close()


async def test_a_download_does_not_wait_for_the_clients_of_64_others_that_stand_still() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    pool = objects.plane.get_buffers
    data = os.urandom(8 * MIB)
    await put(objects, bucket, b"key", whole(data), len(data))
    standing = [(await objects.get(bucket, b"key")).chunks() for _ in range(SLOW)]
    received = [bytes(await anext(chunks)) for chunks in standing]
    assert pool.transfers == SLOW
    assert pool.bytes_leased <= pool.bytes_max
    assert await got(objects, bucket, b"key") == data
    for number, chunks in enumerate(standing):
        assert received[number] + b"".join([bytes(piece) async for piece in chunks]) == data
    assert pool.bytes_leased == pool.transfers == 0
    await objects.close()


async def test_a_download_by_a_slow_client_holds_one_small_window() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    pool = objects.plane.get_buffers
    data = os.urandom(8 * MIB)
    await put(objects, bucket, b"key", whole(data), len(data))
    chunks = (await objects.get(bucket, b"key")).chunks()
    held, received = [], b""
    async for piece in chunks:
        received += bytes(piece)
        held.append(pool.bytes_leased)
        world.clock.ahead_s += 3.0
    assert received == data
    assert held[0] > SLOW_WINDOW_BYTES
    assert max(held[2:]) <= SLOW_WINDOW_BYTES
    await objects.close()


async def test_what_a_late_write_still_refers_to_is_not_written_over() -> None:
    world = World(buffer_wait_s=WAIT_S, block_cells_max=12)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    kept: list[tuple[bytes, Sequence[Buffer]]] = []
    writes = itertools.count()
    for disk in world.disks.disks.values():
        write = disk.write

        async def remembered(header: FragmentHeader, payload: Sequence[Buffer], *, sync: bool = False, write: object = write) -> None:
            if next(writes) % 5 == 0:
                kept.append((b"".join(payload), payload))
            await write(header, payload, sync=sync)  # type: ignore[operator]

        disk.write = remembered  # type: ignore[method-assign]
    for number in range(3):
        await put(objects, bucket, b"key%d" % number, whole(os.urandom(4 * MIB)), 4 * MIB)
    assert len(kept) > 10
    assert all(b"".join(payload) == before for before, payload in kept)
    await objects.close()
