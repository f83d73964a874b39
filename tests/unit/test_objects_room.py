"""Which writes a gateway refuses while disks are full."""

from __future__ import annotations

import os

import pytest

from storaged.errors import InsufficientStorage
from storaged.meta.names import object_name
from storaged.objects.service import ObjectService
from tests.worlds.objects import World, bucket_of, got, put

pytestmark = pytest.mark.virtual_time

TINY, LARGE = os.urandom(100), os.urandom(100_000)


class Filling:
    def __init__(self) -> None:
        self.world = World()
        self.bucket = bucket_of(self.world)
        self.objects = ObjectService(self.world.plane())
        self.all = frozenset(self.world.disks.disks)
        name = object_name(self.bucket.id, self.bucket.shard_numbers, b"key")
        self.replicas = self.world.layouts.current.replicas_of(name.partition)

    def full(self, *disks: str) -> None:
        self.world.disks.known_full = frozenset(disks)
        for disk_id, disk in self.world.disks.disks.items():
            disk.full = disk_id in disks

    async def taken(self, data: bytes) -> bool:
        try:
            await put(self.objects, self.bucket, data)
        except InsufficientStorage:
            return False
        assert await got(self.objects, self.bucket) == data
        return True


async def test_a_full_cluster_takes_nothing_and_one_full_disk_stops_nothing() -> None:
    filling = Filling()
    filling.full(filling.replicas[0])
    assert await filling.taken(TINY)
    assert await filling.taken(LARGE)
    filling.full(*filling.all)
    assert not await filling.taken(TINY)
    assert not await filling.taken(LARGE)
    assert (await filling.objects.delete(filling.bucket, b"key")).existed
    filling.full()
    assert await filling.taken(TINY)
    assert await filling.taken(LARGE)
    await filling.objects.close()


async def test_a_majority_of_the_replicas_has_to_take_rows() -> None:
    filling = Filling()
    filling.full(*filling.replicas[:2])
    assert await filling.taken(TINY)
    filling.world.disks.without_rows = frozenset(filling.replicas[:1])
    assert await filling.taken(TINY)
    filling.world.disks.without_rows = frozenset(filling.replicas[:2])
    assert not await filling.taken(TINY)
    await filling.objects.close()


async def test_room_that_deleted_rows_have_left_is_for_rows_alone() -> None:
    filling = Filling()
    filling.full(*filling.all)
    filling.world.disks.ample = frozenset(filling.replicas)
    assert await filling.taken(TINY)
    assert not await filling.taken(LARGE), "no 503: a retry does not help"
    filling.world.disks.ample = frozenset(filling.replicas[1:])
    assert not await filling.taken(TINY)
    await filling.objects.close()
