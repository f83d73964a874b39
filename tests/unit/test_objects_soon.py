"""A read or a write without a task tells what one with a task tells, or what that one goes on from."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import weakref
from typing import Any

import msgspec
import pytest

from storaged.errors import (
    BadDigest,
    DataDamaged,
    IncompleteBody,
    InvalidRange,
    NoSuchBucket,
    NoSuchKey,
    PreconditionFailed,
    ServiceUnavailable,
    XAmzContentSHA256Mismatch,
)
from storaged.fragments.ports import CELLS_MAX, FragmentId
from storaged.meta.names import Value, object_name
from storaged.objects.api import (
    NO_WRITE_CONDITIONS,
    BodyChecks,
    FailedRead,
    NewMeta,
    ObjectInfo,
    PutResult,
    RangeSpec,
    Reading,
    ReadResult,
    WriteConditions,
)
from storaged.objects.etags import ANY, tag
from storaged.objects.read.streams import HeldStream, VerifiedStream
from storaged.objects.read.window import WindowJob
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from tests.doubles.disks import FarDisk
from tests.worlds.objects import OWNER, World, bucket_of, entry_of, got, pieces, put

pytestmark = pytest.mark.virtual_time

META = NewMeta({"content-type": "text/plain"}, {"color": "blue"}, {"a": "b"})


async def soon(
    objects: ObjectService, bucket: BucketRecord, want_plain: bool = True, span: RangeSpec | None = None
) -> ReadResult:
    told: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
    objects.try_read(bucket, b"key", want_plain, told.set_result, span)
    return await told


@pytest.mark.parametrize("size", [0, 100, 5000])
@pytest.mark.parametrize("fresh", [True, False])
async def test_a_small_object_is_told_whole_and_counted_once(size: int, fresh: bool) -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    await put(objects, bucket, data)
    info = await objects.head(bucket, b"key")
    if fresh:
        objects.plane.opened_records.clear()
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


@pytest.mark.parametrize("where", ["near", "far"])
async def test_a_coded_object_of_one_window_is_told_whole_and_its_memory_used_again(where: str) -> None:
    world = World(near=where == "near", far=where == "far")
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    await put(objects, bucket, data)
    pool = objects.plane.get_buffers
    kept: list[int] = []
    gc.disable()
    try:
        for _ in range(3):
            before = objects.statistics()
            found = await soon(objects, bucket)
            assert isinstance(found, VerifiedStream)
            assert found.held == data
            assert (found.info.size, found.first, found.length, found.partial) == (len(data), 0, len(data), False)
            after = objects.statistics()
            assert (after.gets - before.gets, after.bytes_out - before.bytes_out) == (1, len(data))
            assert (pool.bytes_leased > 0, pool.transfers, len(objects.plane.long_reads._reads)) == (True, 1, 1)
            found.release()
            found.release()
            assert (pool.bytes_leased, pool.transfers, objects.plane.long_reads._reads) == (0, 0, {})
            there = weakref.ref(found)
            del found
            await asyncio.sleep(0)  # the future that told it is gone
            assert there() is None, "only the collector could free it"
            kept.append(sum(map(len, pool._free.values())))
    finally:
        gc.enable()
    assert kept == [1, 1, 1]
    await objects.close()


async def test_a_coded_object_is_told_without_the_disk_that_hangs_lacks_or_damaged_its_fragment() -> None:
    world = World(far=True)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    await put(objects, bucket, data)
    first, second, third, *_ = [disk for disk, fragment in places_of(world) if fragment.position < 4]
    first.hang = asyncio.Event()
    found = await soon(objects, bucket)
    assert isinstance(found, VerifiedStream)
    assert found.held == data
    assert world.disks.late == [first.name]
    assert objects.statistics().reads_hedged == 1
    found.release()
    second.damage(next(fragment for disk, fragment in places_of(world) if disk is second), 0)
    found = await soon(objects, bucket)
    assert isinstance(found, VerifiedStream)
    assert found.held == data
    assert [(damage.disk, damage.reason) for damage in world.damage] == [(second.name, "checksum")]
    found.release()
    third.connected = False
    assert isinstance(await soon(objects, bucket), Reading)
    assert (objects.plane.get_buffers.bytes_leased, objects.plane.get_buffers.transfers) == (0, 0)
    first.hang.set()
    await objects.close()


@pytest.mark.parametrize("why", ["liar", "memory", "large"])
async def test_a_coded_object_that_needs_more_is_left_to_get(why: str) -> None:
    world = World(far=True)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    data = os.urandom(4_000_000 if why == "large" else 300_000)
    await put(objects, bucket, data)
    lease = objects.plane.get_buffers.try_lease(objects.plane.get_buffers.bytes_max) if why == "memory" else None
    liar, fragment = places_of(world)[0]
    if why == "liar":
        liar.flip(fragment, 0, lie=True)
    reading = await soon(objects, bucket)
    assert isinstance(reading, Reading)
    assert objects.statistics().gets == 0
    if lease is not None:
        lease.release()
    assert (objects.plane.get_buffers.bytes_leased, objects.plane.get_buffers.transfers) == (0, 0)
    stream = await objects.get(bucket, b"key", reading=reading)
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data
    assert [(damage.disk, damage.reason) for damage in world.damage] == ([(liar.name, "lied")] if why == "liar" else [])
    await objects.close()


async def test_a_coded_object_whose_disks_hang_fails_once_and_is_found_where_it_was_moved() -> None:
    world = World(far=True, read_timeout_s=0.5)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    await put(objects, bucket, data)
    hanging = [disk for disk, _ in places_of(world)[:3]]
    for disk in hanging:
        disk.hang = asyncio.Event()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    failed = await soon(objects, bucket)
    assert isinstance(failed, FailedRead)
    assert 0.5 <= loop.time() - began_s < 0.8
    with pytest.raises(ServiceUnavailable, match="do not answer now"):
        await objects.get(bucket, b"key", reading=failed.reading, failed=failed.error)
    assert loop.time() - began_s < 0.8, "the disks are not waited for again"
    newer = os.urandom(300_000)
    for disk in hanging:
        assert disk.hang is not None
        disk.hang.set()
        disk.hang = None
    await put(objects, bucket, newer)
    stream = await objects.get(bucket, b"key", reading=failed.reading, failed=failed.error)
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == newer
    await objects.close()


@pytest.mark.parametrize("path", ["without a task", "in a task"])
async def test_a_disk_that_hangs_keeps_nothing_of_a_read_that_went_on_without_it(path: str) -> None:
    world = World(far=True)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    await put(objects, bucket, data)
    hanging = places_of(world)[0][0]
    hanging.hang = asyncio.Event()
    gc.collect()
    gc.disable()
    try:
        if path == "without a task":
            stream = await soon(objects, bucket)
            assert isinstance(stream, VerifiedStream)
            assert stream.held == data
            stream.release()
        else:
            assert await got(objects, bucket) == data
        assert world.disks.late == [hanging.name]
        await asyncio.sleep(0)
        assert len(hanging._asking) == 1, "its call is still under way"
        assert [one for one in gc.get_objects() if isinstance(one, WindowJob)] == []
    finally:
        gc.enable()
    hanging.hang.set()
    await objects.close()


FAULTS = ("hangs", "slow", "down", "away", "lacks", "damaged", "lies")


def spoil(disk: FarDisk, fragment: FragmentId, fault: str, chance: random.Random) -> None:
    cell = chance.randrange(len(disk._cells(fragment, 0, CELLS_MAX).cells))
    match fault:
        case "hangs":
            disk.hang = asyncio.Event()
        case "slow":
            disk.slow_s = chance.choice((0.005, 0.05, 0.2))
        case "down":
            disk.down = True
        case "away":
            disk.connected, disk.down = False, True
        case "lacks":
            disk.lose(fragment)
        case "damaged":
            disk.flip(fragment, cell)
        case "lies":
            disk.flip(fragment, cell, lie=True)


@pytest.mark.parametrize("seed", range(60))
async def test_with_up_to_m_faults_of_any_kind_a_coded_object_is_read_one_way_or_the_other(seed: int) -> None:
    chance = random.Random(seed)
    world = World(far=True)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    data = chance.randbytes(chance.choice((70_000, 131_072, 200_001, 1_048_576, chance.randint(66_000, 3_000_000))))
    await put(objects, bucket, data)
    places = places_of(world)
    for disk, fragment in chance.sample(places, chance.randint(1, 2)):
        spoil(disk, fragment, chance.choice(FAULTS), chance)
    pool = objects.plane.get_buffers
    for _ in range(3):  # what the first read has learned of the disks counts for the others
        found = await soon(objects, bucket)
        if isinstance(found, VerifiedStream):
            assert found.held == data
            found.release()
        else:
            assert isinstance(found, Reading | FailedRead)
            known = {"failed": found.error} if isinstance(found, FailedRead) else {}
            reading = found.reading if isinstance(found, FailedRead) else found
            stream = await objects.get(bucket, b"key", reading=reading, **known)
            assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data
        assert (pool.bytes_leased, pool.transfers, objects.plane.long_reads._reads) == (0, 0, {})
    for disk, _ in places:
        if disk.hang is not None:
            disk.hang.set()
    await objects.close()


@pytest.mark.parametrize("size", [0, 100, 5000, 300_000, 8_000_000])
@pytest.mark.parametrize("faults", [0, 2])
async def test_a_range_is_read_one_way_or_the_other(size: int, faults: int) -> None:
    chance = random.Random(size + faults)
    world = World(far=True)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), chance.randbytes(size)
    await put(objects, bucket, data)
    for disk, fragment in chance.sample(places_of(world), faults if size > 5000 else 0):
        spoil(disk, fragment, chance.choice(FAULTS), chance)
    pool, at_once = objects.plane.get_buffers, 0
    for number in range(24):
        first, length = chance.randint(0, size), chance.choice((1, 70_000, size or 1))
        span = (
            RangeSpec(None, length)
            if number % 4 == 0
            else RangeSpec(first, None if number % 4 == 1 else first + length)
        )
        start = max(size - length, 0) if span.first is None else first
        wanted = data[start:] if span.last is None or span.first is None else data[start : span.last + 1]
        found = await soon(objects, bucket, span=span)
        if not wanted and not (span.first is None and not size):
            assert isinstance(found, InvalidRange)
            continue
        if isinstance(found, HeldStream | VerifiedStream):
            at_once += 1
            assert (found.held or b"", found.first, found.length) == (wanted, start, len(wanted))
            assert found.partial == (size > 0)
            found.release()
        else:
            assert isinstance(found, Reading | FailedRead)
            known = {"failed": found.error} if isinstance(found, FailedRead) else {}
            reading = found.reading if isinstance(found, FailedRead) else found
            stream = await objects.get(bucket, b"key", span=span, reading=reading, **known)
            assert b"".join([bytes(piece) async for piece in stream.chunks()]) == wanted
        assert (pool.bytes_leased, pool.transfers, objects.plane.long_reads._reads) == (0, 0, {})
    assert at_once >= (6 if size else 1) or faults
    for disk, _ in places_of(world) if size > 5000 else ():
        if disk.hang is not None:
            disk.hang.set()
    await objects.close()


def places_of(world: World) -> list[tuple[FarDisk, FragmentId]]:
    """The fragments of the only part, by position."""
    found = [(world.disks.disks[name], fragment) for name, fragment in world.disks.of(entry_of(world).data_id)]
    return sorted(
        ((disk, fragment) for disk, fragment in found if isinstance(disk, FarDisk)), key=lambda place: place[1].position
    )


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
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    value = world.ring.values[name]
    world.ring.values[name] = Value(value.sequence, value.operation, value.visibility, b"no record")
    assert isinstance(await soon(objects, bucket), DataDamaged)
    await objects.close()


async def test_that_there_is_no_such_object_is_told_and_leaves_no_garbage() -> None:
    world = World()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    told: asyncio.Future[tuple[type, weakref.ref[Exception]]] = asyncio.get_running_loop().create_future()

    def then(found: ReadResult) -> None:
        assert isinstance(found, Exception)
        told.set_result((type(found), weakref.ref(found)))

    gc.disable()
    try:
        objects.try_read(bucket, b"key", True, then)
        kind, held = await told
        assert (kind, held()) == (NoSuchKey, None)
    finally:
        gc.enable()
    await objects.close()


async def with_key_at_hand(world: World) -> tuple[ObjectService, BucketRecord]:
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await world.keys.bucket_key(bucket.id, ())
    return objects, bucket


async def put_now(
    objects: ObjectService,
    bucket: BucketRecord,
    data: bytes,
    meta: NewMeta = META,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
    **checks: Any,
) -> PutResult | Exception:
    told: asyncio.Future[PutResult | Exception] = asyncio.get_running_loop().create_future()
    asked = BodyChecks(size=len(data), **checks)
    assert objects.try_put(bucket, b"key", data, meta, asked, told.set_result, owner=OWNER, conditions=conditions)
    return await told


@pytest.mark.parametrize("size", [0, 100, 5000, 16 * 1024])
async def test_a_small_object_is_written_as_by_put_and_counted_once(size: int) -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    assert objects.small_bytes_max == 16 * 1024
    before = await objects.put(bucket, b"key", pieces(data), META, BodyChecks(size=size), owner=OWNER)
    first, one = await objects.head(bucket, b"key"), objects.statistics()
    after = await put_now(objects, bucket, data)
    assert isinstance(after, PutResult)
    second, two = await objects.head(bucket, b"key"), objects.statistics()
    assert msgspec.structs.replace(after, modified_ms=0) == msgspec.structs.replace(before, modified_ms=0)
    assert second._replace(modified_ms=0) == first._replace(modified_ms=0)
    assert await got(objects, bucket) == data
    assert [(n.puts_inline + n.puts_small, n.bytes_in) for n in (one, two)] == [(1, size), (2, 2 * size)]
    await asyncio.sleep(0.2)
    await objects.plane.background.settle()
    garbage = {data_id for disk in world.disks.disks.values() for data_id in disk.garbage}
    assert len(garbage) == (size > 1024)  # what was replaced, where it lay on disks
    await objects.close()


async def test_what_is_judged_at_the_commit_refuses_and_changes_nothing() -> None:
    world = World()
    objects, bucket = await with_key_at_hand(world)
    new = WriteConditions(if_none_match=ANY)
    assert isinstance(await put_now(objects, bucket, b"one", conditions=new), PutResult)
    assert isinstance(await put_now(objects, bucket, b"two", conditions=new), PreconditionFailed)
    assert isinstance(await put_now(objects, bucket, b"three", conditions=WriteConditions(if_match=ANY)), PutResult)
    assert await got(objects, bucket) == b"three"
    name = object_name(bucket.id, bucket.shard_numbers, b"key")
    value = world.ring.values[name]
    world.ring.values[name] = Value(value.sequence, value.operation, value.visibility, b"no record")
    assert isinstance(await put_now(objects, bucket, b"four"), DataDamaged)
    world.ring.fences[bucket.id] = (bytes(16), False)
    del world.ring.values[name]
    assert isinstance(await put_now(objects, bucket, b"five"), NoSuchBucket)
    await objects.close()


async def test_a_body_that_is_not_what_was_declared_is_raised_and_begins_nothing() -> None:
    world = World()
    objects, bucket = await with_key_at_hand(world)
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (BadDigest, {"md5": bytes(16)}), (XAmzContentSHA256Mismatch, {"sha256": "0" * 64}), (BadDigest, {"checksums": {"CRC32": "AAAAAA=="}}),  # noqa: E501
    ]  # fmt: skip
    for error, checks in wrong:
        with pytest.raises(error):
            await put_now(objects, bucket, b"data", **checks)
    with pytest.raises(IncompleteBody):
        objects.try_put(bucket, b"key", b"dat", META, BodyChecks(size=4), lambda _: pytest.fail("told"), owner=OWNER)
    assert world.ring.values == {}
    await objects.close()


@pytest.mark.parametrize("why", ["ring", "key", "disks", "etag", "size"])
async def test_what_is_no_common_case_is_left_to_put(why: str) -> None:
    world = World()
    (objects, bucket), data = await with_key_at_hand(world), os.urandom(5000)
    conditions = WriteConditions(if_match=tag("0" * 32)) if why == "etag" else NO_WRITE_CONDITIONS
    world.ring.busy, world.keys.late = why == "ring", why == "key"
    if why == "disks":
        for rack in "ab":
            world.disks.rack_down(rack)
    if why == "size":
        data *= 4
    before = objects.statistics()
    asked = BodyChecks(size=len(data))
    assert not objects.try_put(
        bucket, b"key", data, META, asked, lambda _: pytest.fail("told"), owner=OWNER, conditions=conditions
    )
    assert objects.statistics() == before
    assert world.ring.values == {}
    await objects.close()


@pytest.mark.parametrize("soon", [True, False])
@pytest.mark.parametrize("size", [100, 5000])
async def test_only_a_put_without_conditions_is_proposed_whatever_is_there(size: int, soon: bool) -> None:
    world = World()
    objects, bucket = await with_key_at_hand(world)
    data = os.urandom(size)

    async def put_with(conditions: WriteConditions) -> bool:
        before = len(world.ring.regardless)
        if soon:
            await put_now(objects, bucket, data, conditions=conditions)
        else:
            with contextlib.suppress(PreconditionFailed):
                await objects.put(
                    bucket, b"key", pieces(data), META, BodyChecks(size=size), owner=OWNER, conditions=conditions
                )
        return len(world.ring.regardless) > before and world.ring.regardless[-1]

    assert not await put_with(WriteConditions(if_none_match=ANY))
    assert await put_with(NO_WRITE_CONDITIONS)
    assert await put_with(NO_WRITE_CONDITIONS)
    assert not await put_with(WriteConditions(if_none_match=ANY))
    await objects.delete(bucket, b"key")
    assert not world.ring.regardless[-1]
    await objects.close()
