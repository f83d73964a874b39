"""The key of a deleted bucket is destroyed once nothing of the bucket is left, and not before; only gateways of the
keyring can do it.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from storaged.errors import DataDamaged, PeerUnreachable, ServiceUnavailable
from storaged.fragments.ports import Retirement
from storaged.meta.names import Value, Visibility, object_name, system_name
from storaged.node.housekeeping import tidy
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.keyends import DUE_MAX, Ends, destroy_ended_keys
from storaged.wire import decode, encode
from tests.unit.test_objects_buckets import ANNE, world_of
from tests.unit.test_objects_put_get import put
from tests.worlds.objects import World

NAME = system_name("bucket/b")


class Rig:
    def __init__(self) -> None:
        self.ends = Ends()
        self.world: World
        self.objects: ObjectService
        self.buckets: BucketService
        self.world, self.objects, self.buckets = world_of()
        self.plane = self.objects.plane
        self.world.keys.now_ms = self.world.clock.wall_ms
        self.delay_ms = self.plane.limits.retire_delay_ms

    async def deleted(self) -> BucketRecord:
        bucket = await self.buckets.create(ANNE, "b", region="eu-fr-1")
        await self.buckets.delete(bucket)
        return bucket

    async def look(self) -> int:
        self.ends = await destroy_ended_keys(self.plane, self.buckets)
        return self.ends.destroyed

    def forge(self, change: Callable[[Value], Value]) -> None:
        self.world.ring.values[NAME] = change(self.world.ring.values[NAME])


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_the_key_goes_after_the_delay_and_the_name_may_have_been_taken_again(rig: Rig) -> None:
    first = await rig.deleted()
    second = await rig.deleted()
    third = await rig.buckets.create(ANNE, "b", region="eu-fr-1")
    rig.world.clock.wall += rig.delay_ms - 1000
    assert await rig.look() == 0
    rig.world.clock.wall += 1000
    assert await rig.look() == 2
    assert rig.world.keys.newest == {third.id: 1}
    assert [rig.world.ring.fences[bucket.id][1] for bucket in (first, second)] == [True, True]
    assert await rig.look() == 0
    await put(rig.objects, third, b"data")


async def test_it_is_part_of_housekeeping(rig: Rig) -> None:
    await rig.deleted()
    kept = await rig.buckets.create(ANNE, "kept", region="eu-fr-1")
    rig.world.clock.wall += rig.delay_ms
    await tidy(rig.plane, rig.buckets)
    assert rig.world.keys.newest == {kept.id: 1}
    assert rig.world.keys.looked_after == [{kept.id: ()}]


async def test_a_bucket_of_which_any_disk_still_has_garbage_keeps_its_key(rig: Rig) -> None:
    bucket = await rig.deleted()
    disk = next(iter(rig.plane.layouts.current.disk_by_id))
    owner = object_name(bucket.id, bucket.shard_numbers, b"key").pack()
    await rig.plane.stores.store(disk).retire([Retirement(b"d" * 16, owner, rig.world.clock.wall_ms())])
    rig.world.clock.wall += rig.delay_ms
    assert await rig.look() == 0
    assert (rig.ends.waiting, rig.ends.reason) == (1, "it has garbage")
    await rig.plane.stores.store(disk).unretire(b"d" * 16)
    assert await rig.look() == 1


async def test_every_disk_must_answer_and_must_not_be_behind_with_its_garbage(rig: Rig) -> None:
    await rig.deleted()
    rig.world.clock.wall += rig.delay_ms
    disk = rig.plane.stores.store(next(iter(rig.plane.layouts.current.disk_by_id)))

    async def away(now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        raise PeerUnreachable

    async def full(now_ms: int, limit: int) -> list[tuple[bytes, bytes]]:
        return [(b"d" * 16, b"x")] * limit

    original = disk.retired
    for answer, reason in ((away, "does not answer"), (full, "has not yet collected its garbage")):
        disk.retired = answer  # type: ignore[method-assign]
        assert await rig.look() == 0
        assert rig.ends.waiting == 1
        assert rig.world.clock.wall - rig.ends.oldest_ms >= rig.delay_ms
        assert reason in rig.ends.reason
    disk.retired = original  # type: ignore[method-assign]
    assert DUE_MAX == 10_000
    assert await rig.look() == 1


@pytest.mark.parametrize("what", ["forged", "emptied", "active again", "an older bucket's"])
async def test_a_bucket_record_that_does_not_prove_the_deletion_keeps_the_key(rig: Rig, what: str) -> None:
    older = await rig.buckets.create(ANNE, "b", region="eu-fr-1")
    before = rig.world.ring.values[NAME]
    await rig.buckets.delete(older)
    bucket = await rig.deleted()
    rig.world.clock.wall += rig.delay_ms
    await rig.look()
    rig.world.keys.newest[bucket.id] = 1
    await rig.world.keys.end_bucket_key(bucket.id, "b", rig.world.ring.fences[bucket.id][0], bucket.shard_numbers)
    rig.world.clock.wall += rig.delay_ms
    if what == "forged":
        record = msgspec.structs.replace(decode(rig.world.ring.values[NAME].body, BucketRecord), owner="another")
        rig.forge(lambda value: Value(value.sequence, value.operation, Visibility.TOMBSTONE, encode(record)))
    elif what == "emptied":
        rig.forge(lambda value: Value(value.sequence + 1, value.operation, Visibility.TOMBSTONE, b""))
    elif what == "active again":
        value = rig.world.ring.values[NAME]
        record = msgspec.structs.replace(decode(value.body, BucketRecord), state="active")
        change = rig.buckets._records.change(NAME, value, record)
        rig.forge(lambda value: Value(value.sequence + 1, value.operation, Visibility.LIVE, change.body))
    else:
        rig.forge(lambda value: before)
    assert await rig.look() == 0
    assert rig.ends.waiting == 1
    assert "proves" in rig.ends.reason or "not authentic" in rig.ends.reason
    assert bucket.id in rig.world.keys.newest


async def test_a_record_that_is_not_authentic_says_so(rig: Rig) -> None:
    bucket = await rig.deleted()
    rig.forge(lambda value: Value(value.sequence, value.operation, value.visibility, b"\xc1"))
    with pytest.raises(DataDamaged):
        await rig.buckets.is_deleted("b", bucket.id, b"n" * 16)
    assert not await rig.buckets.is_deleted("never-was", bucket.id, b"n" * 16)


async def test_a_bucket_is_not_deleted_while_the_end_of_its_key_cannot_be_noted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = await rig.buckets.create(ANNE, "b", region="eu-fr-1")

    async def unavailable(*_: object) -> None:
        raise ServiceUnavailable("no majority")

    with monkeypatch.context() as patched:
        patched.setattr(rig.world.keys, "end_bucket_key", unavailable)
        with pytest.raises(ServiceUnavailable):
            await rig.buckets.delete(bucket)
    assert decode(rig.world.ring.values[NAME].body, BucketRecord).state == "deleting"
    await tidy(rig.plane, rig.buckets)
    assert decode(rig.world.ring.values[NAME].body, BucketRecord).state == "deleted"
    rig.world.clock.wall += rig.delay_ms
    assert await rig.look() == 1


async def test_a_bucket_that_was_not_empty_has_no_end(rig: Rig) -> None:
    bucket = await rig.buckets.create(ANNE, "b", region="eu-fr-1")
    await put(rig.objects, bucket, b"data")
    with pytest.raises(Exception, match="not empty"):
        await rig.buckets.delete(bucket)
    assert rig.world.keys.ended == {}
    assert encode(bucket)
