"""Clients that send or take little, or stand still, hold a bounded share of the memory of transfers, and hold up no
other client.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from storaged.objects.read.streams import SLOW_WINDOW_BYTES
from storaged.objects.service import ObjectService
from storaged.wire import Buffer
from tests.worlds.objects import World, bucket_of, got, put

pytestmark = pytest.mark.virtual_time

KIB, MIB = 1024, 1024 * 1024
SLOW = 64
WAIT_S = 5.0
"""Who must wait for memory gets SlowDown after this, and fails the test."""


class StandingBody:
    """A body whose client stops after ``moving`` bytes until ``go``."""

    def __init__(self, data: bytes, moving: int, go: asyncio.Event) -> None:
        self._data, self._moving, self._go = data, moving, go
        self.stands = asyncio.Event()

    async def pieces(self) -> AsyncIterator[Buffer]:
        yield self._data[: self._moving]
        self.stands.set()
        await self._go.wait()
        yield self._data[self._moving :]


@pytest.mark.slow
async def test_an_upload_does_not_wait_for_the_clients_of_64_others_that_stand_still() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket, go = ObjectService(world.plane()), bucket_of(world), asyncio.Event()
    filling, working = objects.plane.fill_buffers, objects.plane.put_buffers
    data = os.urandom(900_000)
    bodies = [StandingBody(data, 800_000, go) for _ in range(SLOW)]
    uploads = [
        asyncio.create_task(put(objects, bucket, body.pieces(), key=b"slow%d" % n)) for n, body in enumerate(bodies)
    ]
    for body in bodies:
        await body.stands.wait()
    await asyncio.sleep(0.1)  # the blocks that were filled reach their disks
    assert not working.bytes_leased
    assert filling.transfers == SLOW
    assert filling.bytes_leased <= filling.bytes_max
    fast = os.urandom(7 * MIB)
    await put(objects, bucket, fast, key=b"fast")
    await put(objects, bucket, fast, key=b"unsized", sized=False)
    assert filling.bytes_leased <= filling.bytes_max
    assert not any(upload.done() for upload in uploads)
    go.set()
    await asyncio.gather(*uploads)
    assert await got(objects, bucket, key=b"fast") == await got(objects, bucket, key=b"unsized") == fast
    for number in range(SLOW):
        assert await got(objects, bucket, key=b"slow%d" % number) == data
    assert filling.bytes_leased == working.bytes_leased == filling.transfers == 0
    await objects.close()


async def test_an_upload_that_is_given_up_gives_its_memory_back() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    body = StandingBody(os.urandom(900_000), 800_000, asyncio.Event())
    upload = asyncio.create_task(put(objects, bucket, body.pieces(), key=b"key"))
    await body.stands.wait()
    assert objects.plane.fill_buffers.bytes_leased
    upload.cancel()
    await asyncio.gather(upload, return_exceptions=True)
    assert (
        objects.plane.fill_buffers.bytes_leased
        == objects.plane.put_buffers.bytes_leased
        == objects.plane.fill_buffers.transfers
        == 0
    )
    await objects.close()


@pytest.mark.slow
async def test_a_download_does_not_wait_for_the_clients_of_64_others_that_stand_still() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    pool = objects.plane.get_buffers
    data = os.urandom(8 * MIB)
    await put(objects, bucket, data, key=b"key")
    standing = [(await objects.get(bucket, b"key")).chunks() for _ in range(SLOW)]
    received = [bytes(await anext(chunks)) for chunks in standing]
    assert pool.transfers == SLOW
    assert pool.bytes_leased <= pool.bytes_max
    assert await got(objects, bucket, key=b"key") == data
    for number, chunks in enumerate(standing):
        assert received[number] + b"".join([bytes(piece) async for piece in chunks]) == data
    assert pool.bytes_leased == pool.transfers == 0
    await objects.close()


async def test_a_download_by_a_slow_client_holds_one_small_window() -> None:
    world = World(buffer_wait_s=WAIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    pool = objects.plane.get_buffers
    data = os.urandom(8 * MIB)
    await put(objects, bucket, data, key=b"key")
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
