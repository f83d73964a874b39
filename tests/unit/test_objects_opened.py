"""A record that was opened lately is not opened again, and an answer is never older than the register."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.errors import DataDamaged, KeyringUnavailable, NoSuchKey, ServiceUnavailable
from storaged.meta.names import Value, Visibility, object_name
from storaged.objects.api import BodyChecks, NewMeta, ObjectInfo, RangeSpec
from storaged.objects.cache.opened_records import ENTRY_BYTES, OpenedRecord, OpenedRecordCache
from storaged.objects.service import ObjectService
from tests.doubles.keys import PlainBucketKey
from tests.worlds.objects import OWNER, World, bucket_of, pieces

pytestmark = pytest.mark.virtual_time

SIZES = [100, 5000, 300_000]
OPENED: Any = SimpleNamespace(borrowed=None)


class Rig:
    """One bucket on doubles; ``unwraps`` counts how often a data key was unwrapped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: object) -> None:
        self.world = World(**limits)
        self.objects = ObjectService(self.world.plane())
        self.bucket = bucket_of(self.world)

    @property
    def unwraps(self) -> int:
        return self.world.keys.uses.unwraps

    async def put(self, data: bytes, key: bytes = b"key", **meta: str) -> None:
        await self.objects.put(
            self.bucket, key, pieces(data), NewMeta(user=meta), BodyChecks(size=len(data)), owner=OWNER
        )

    async def got(self, key: bytes = b"key", span: RangeSpec | None = None) -> tuple[bytes, ObjectInfo]:
        stream = await self.objects.get(self.bucket, key, span=span)
        return b"".join([bytes(piece) async for piece in stream.chunks()]), stream.info


@pytest.mark.parametrize("size", SIZES)
async def test_a_key_that_is_read_again_is_opened_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rig = Rig(monkeypatch)
    data = os.urandom(size)
    await rig.put(data, name="value")
    info = await rig.objects.head(rig.bucket, b"key")
    assert (info.size, info.user) == (size, {"name": "value"})
    for _ in range(3):
        assert await rig.got() == (data, info)
        assert (await rig.got(span=RangeSpec(10, 19)))[0] == data[10:20]
        assert await rig.objects.head(rig.bucket, b"key") == info
    assert rig.unwraps == 1
    await rig.objects.close()
    assert len(rig.objects.plane.opened_records) == 0


@pytest.mark.parametrize("size", SIZES)
async def test_what_changed_shows_at_once(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    rig = Rig(monkeypatch)
    other = ObjectService(rig.world.plane())
    for n in range(3):
        data = os.urandom(size)
        await rig.put(data, round=str(n))
        seen, info = await rig.got()
        assert (seen, info.user) == (data, {"round": str(n)})
        await other.set_tags(rig.bucket, b"key", {"n": str(n)})
        assert (await rig.objects.head(rig.bucket, b"key")).tags == {"n": str(n)}
        assert (await rig.got())[0] == data
    await other.delete(rig.bucket, b"key")
    for read in (rig.objects.head, rig.objects.get):
        with pytest.raises(NoSuchKey):
            await read(rig.bucket, b"key")  # type: ignore[operator]
    await rig.objects.close()
    await other.close()


async def test_a_deleted_key_whose_row_still_has_its_body_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    await rig.put(b"data")
    await rig.got()
    name = object_name(rig.bucket.id, rig.bucket.shard_numbers, b"key")
    value = rig.world.ring.values[name]
    rig.world.ring.values[name] = Value(value.sequence + 1, value.operation, Visibility.TOMBSTONE, value.body)
    with pytest.raises(NoSuchKey):
        await rig.objects.head(rig.bucket, b"key")
    await rig.objects.close()


async def test_nothing_is_told_of_a_record_whose_key_is_no_longer_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    await rig.put(b"data")
    await rig.got()
    del rig.world.keys.newest[rig.bucket.id]
    with pytest.raises(KeyringUnavailable):
        await rig.objects.head(rig.bucket, b"key")
    assert len(rig.objects.plane.opened_records) == 0
    rig.world.keys.newest[rig.bucket.id] = 1
    rig.world.keys.forget(1)
    rig.world.keys.key(1)  # released anew
    assert (await rig.got())[0] == b"data"
    assert rig.unwraps == 2
    await rig.objects.close()


async def test_data_keys_are_forgotten_with_the_buckets_key_that_opened_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    lately = rig.objects.plane.opened_records
    for key in (b"1", b"2", b"3"):
        await rig.put(b"data", key)
        await rig.got(key)
    rig.world.keys.newest[rig.bucket.id] = 2
    await rig.world.keys.bucket_key(rig.bucket.id, ())
    await rig.put(b"data", b"2")
    await rig.got(b"2")
    assert len(lately) == 3
    rig.world.keys.forget(1)
    await asyncio.sleep(0)
    assert len(lately) == 1
    assert (await rig.got(b"2"))[0] == b"data"
    assert rig.unwraps == 4
    rig.world.keys.forget()
    await asyncio.sleep(0)
    assert len(lately) == 0
    assert lately._bytes == 0
    await rig.objects.close()


async def test_data_keys_are_forgotten_on_the_loop_whichever_thread_lets_go_of_the_buckets_key_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lately, threads = OpenedRecordCache(10_000), list[int]()
    drop = OpenedRecordCache.drop

    def dropped(self: OpenedRecordCache, place: tuple[bytes, bytes]) -> None:
        threads.append(threading.get_ident())
        drop(self, place)

    held, value = [PlainBucketKey(1)], Value(1, b"", Visibility.LIVE, b"body")
    lately.put((b"b", b"k"), OpenedRecord(value, held[0], OPENED))
    monkeypatch.setattr(OpenedRecordCache, "drop", dropped)
    await asyncio.to_thread(held.clear)
    await asyncio.sleep(0)
    assert (len(lately), threads) == (0, [threading.get_ident()])


def test_a_key_that_is_let_go_of_after_the_loop_ended_troubles_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    lately, held = OpenedRecordCache(10_000), [PlainBucketKey(1)]

    async def keep() -> None:
        lately.put((b"b", b"k"), OpenedRecord(Value(1, b"", Visibility.LIVE, b"body"), held[0], OPENED))

    with asyncio.Runner() as runner:
        runner.run(keep())
    troubles: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", troubles.append)
    held.clear()
    assert troubles == []


async def test_one_record_under_two_keys_opens_for_the_one_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    await rig.put(b"data")
    await rig.got()
    value = rig.world.ring.values[object_name(rig.bucket.id, rig.bucket.shard_numbers, b"key")]
    rig.world.ring.values[object_name(rig.bucket.id, rig.bucket.shard_numbers, b"other")] = value
    with pytest.raises(DataDamaged):
        await rig.objects.head(rig.bucket, b"other")
    assert (await rig.got())[0] == b"data"
    await rig.objects.close()


async def test_a_copy_that_does_not_open_is_not_believed_the_second_time_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    data = os.urandom(5000)
    await rig.put(data)
    assert (await rig.got())[0] == data
    for disk in rig.world.disks.disks.values():
        for fragment in disk.fragments:
            disk.flip(fragment, 0, lie=True)
    for _ in range(2):
        with pytest.raises((DataDamaged, ServiceUnavailable)):
            await rig.got()
    await rig.objects.close()


async def test_memory_for_opened_records_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, opened_bytes_max=12 * (ENTRY_BYTES + 3 * 800))
    for n in range(20):
        await rig.put(b"data", b"%d" % n)
        assert (await rig.got(b"%d" % n))[0] == b"data"
        assert (await rig.got(b"0"))[0] == b"data"
    kept: Any = rig.objects.plane.opened_records
    assert 6 <= len(kept) < 20
    assert rig.unwraps == 20  # the key that is read all the time stays
    await rig.put(bytes(900), b"1")
    assert (await rig.got(b"1"))[0] == bytes(900)
    await rig.objects.close()


async def test_an_entry_larger_than_all_the_memory_is_not_kept() -> None:
    lately, value, bucket_key = (
        OpenedRecordCache(10_000),
        Value(1, b"", Visibility.LIVE, bytes(9000)),
        PlainBucketKey(1),
    )
    made: Any = OpenedRecord(value, bucket_key, OPENED)
    lately.put((b"b", b"k"), made)
    assert lately.get((b"b", b"k"), value) is None
    assert len(lately) == 0
