"""``where`` tells apart what is lost and what only stops; the pools and the pure helpers keep their bounds."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest

from storaged.admin.where import where_document
from storaged.cli.status import print_where
from storaged.cluster.layout import Profile
from storaged.errors import NoSuchKey, NotModified, PreconditionFailed, SlowDown
from storaged.objects.api import ReadConditions, WriteConditions
from storaged.objects.cache.buffers import IDLE_BYTES_MAX, BufferPool, Lease, Transfer, block_size_for, window_bytes_for
from storaged.objects.conditions import Current, check_copy_source, check_write
from storaged.objects.etags import ANY, tag
from storaged.objects.plane import ObjectLimits
from storaged.objects.service import ObjectService
from storaged.objects.where import where
from tests.unit.test_objects_put_get import bucket_of, entry_of, put
from tests.worlds.objects import World

pytestmark = pytest.mark.virtual_time


async def test_where_names_every_fragment_and_what_may_fail() -> None:
    world = World(block_cells_max=12)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, os.urandom(3_000_000))
    found = await where(objects.plane, bucket, b"key")
    assert [(run.profile, run.first, run.kind) for run in found.runs] == [("4+2", 0, "coded")]
    assert sorted(f.disk for f in found.runs[0].fragments) == sorted(world.disks.disks)
    assert {f.state for f in found.runs[0].fragments} == {"ok"}
    assert {f.rack for f in found.runs[0].fragments} == {"FR/sitea/a", "FR/siteb/b", "FR/sitec/c"}
    assert (found.disks_may_fail, found.domains_may_fail, found.replicas_may_fail, found.domain_kind) == (
        2,
        1,
        1,
        "rack",
    )
    world.disks.rack_down("a")
    found = await where(objects.plane, bucket, b"key")
    assert {f.state for f in found.runs[0].fragments if f.disk[0] == "a"} == {"unreachable"}
    assert (found.disks_may_fail, found.domains_may_fail, found.replicas_may_fail) == (0, 0, 0)
    (disk, fragment) = next((d, f) for d, f in world.disks.of(entry_of(world).data_id) if d == "b0" and f.block == 1)
    world.disks.disks[disk].flip(fragment, 0)
    await world.disks.disks[disk].verify(fragment)  # as scrub does
    found = await where(objects.plane, bucket, b"key")
    assert [(f.state, f.blocks_bad) for f in found.runs[0].fragments if f.disk == "b0"] == [("damaged", 1)]
    assert (found.disks_may_fail, found.domains_may_fail) == (-1, -1)
    await objects.close()


@pytest.mark.parametrize(
    ("whole", "stays", "said"),
    [(0, "", None), (1, "", "it waits to be coded"), (1, "only its client has the key", "only its client has the key")],
)
async def test_where_prints_that_an_object_lies_whole_and_why(
    whole: int, stays: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, b"x" * 5000)
    found = replace(await where(objects.plane, bucket, b"key"), whole=whole, stays=stays)
    print_where(where_document("bucket", found), "s3://bucket/key")
    lines = [line for line in capsys.readouterr().out.splitlines() if "lies whole" in line]
    assert len(lines) == whole
    assert all(line.endswith(f"; {said}") for line in lines)
    await objects.close()


async def test_where_counts_copies_and_the_records_own_replicas() -> None:
    world = World()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, b"x" * 5000)
    found = await where(objects.plane, bucket, b"key")
    assert [(run.profile, run.kind, run.disks_may_fail) for run in found.runs] == [("1+2", "copies", 2)]
    await put(objects, bucket, b"tiny")
    world.disks.disks[found.replicas[0].disk].down = True
    found = await where(objects.plane, bucket, b"key")
    assert not found.runs
    assert (found.disks_may_fail, found.replicas_may_fail) == (1, 0)
    assert [replica.state for replica in found.replicas] == ["unreachable", "ok", "ok"]
    with pytest.raises(NoSuchKey):
        await where(objects.plane, bucket, b"missing")
    await objects.close()


async def test_a_pool_serves_in_order_never_above_its_bound_and_not_for_ever() -> None:
    pool = BufferPool(300_000, wait_s=0.05)
    first = await pool.lease(200_000)
    served: list[int] = []

    async def take(number: int, size: int) -> None:
        lease = await pool.lease(size)
        served.append(number)
        assert pool.bytes_leased <= pool.bytes_max
        await asyncio.sleep(0)
        lease.release()

    waiting = [asyncio.create_task(take(number, size)) for number, size in enumerate((200_000, 1000, 100_000))]
    await asyncio.sleep(0.01)
    assert served == []
    assert pool.try_lease(1000) is None
    first.release()
    await asyncio.gather(*waiting)
    assert served == [0, 1, 2]
    first = await pool.lease(250_000)
    with pytest.raises(SlowDown):
        await pool.lease(250_000)
    cancelled = asyncio.create_task(pool.lease(250_000))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    first.release()
    assert pool.bytes_leased == 0


async def test_a_pool_keeps_little_when_its_last_transfer_has_ended() -> None:
    pool = BufferPool(3 * IDLE_BYTES_MAX, wait_s=1)
    with Transfer(pool), Transfer(pool):
        for lease in [await pool.lease(IDLE_BYTES_MAX // 4) for _ in range(10)]:
            lease.release()
        assert pool.bytes_free == 10 * IDLE_BYTES_MAX // 4
        with Transfer(pool):
            pass
        assert pool.bytes_free == 10 * IDLE_BYTES_MAX // 4
    assert (pool.bytes_free, pool.bytes_leased) == (IDLE_BYTES_MAX, 0)


def test_windows_shrink_so_that_every_download_can_have_one() -> None:
    bytes_max = ObjectLimits().get_buffer_bytes_max
    for transfers in range(1, 129):
        assert window_bytes_for(transfers, 1.0) * transfers <= bytes_max
    leased = downloads = 0
    while leased + window_bytes_for(downloads + 1, 1 - leased / bytes_max) <= bytes_max:
        leased += window_bytes_for(downloads + 1, 1 - leased / bytes_max)
        downloads += 1
    assert downloads >= 70
    assert [window_bytes_for(transfers, 1.0) // 64 / 1024 for transfers in (1, 5, 17, 65)] == [48, 24, 8, 4]


async def test_memory_that_is_still_looked_at_is_not_leased_again() -> None:
    pool = BufferPool(1_000_000, wait_s=1)
    lease = await pool.lease(100_000)
    view = lease.view[:10]
    view[:] = b"0123456789"
    lease.release()
    other = await pool.lease(100_000)
    other.view[:10] = b"overwrites"
    assert bytes(view) == b"0123456789"
    other.release()
    del view
    again, third = await pool.lease(100_000), await pool.lease(100_000)
    assert bytes(again.view[:10]) in (b"0123456789", b"overwrites")
    assert bytes(third.view[:10]) in (b"0123456789", b"overwrites")


def test_blocks_hold_whole_stripes_of_every_fallback_and_shrink_as_memory_fills() -> None:
    for k in range(1, 9):
        for left in (1.0, 0.7, 0.5, 0.2, 0.1, 0.0):
            for size in (None, 1, 800_000, 2**30):
                block = block_size_for(Profile(k, 2), size, left, 48)
                assert all(block.cells % other == 0 for other in (k, 2, 3, 4))
                assert block.cell_bytes in (4096, 8192, 16384, 32768, 65536)
    sizes = [block_size_for(Profile(4, 2), None, left, 48) for left in (1.0, 0.7, 0.2, 0.1, 0.04, 0.0)]
    assert sizes == [(65536, 48), (65536, 12), (65536, 12), (32768, 12), (16384, 12), (8192, 12)]
    assert block_size_for(Profile(4, 2), 3 * 65520 - 1, 1.0, 48) == (65536, 12)
    assert (
        block_size_for(Profile(4, 2), 100_000, 0.5, 48)
        == block_size_for(Profile(4, 2), 100_000, 1.0, 48)
        == (32768, 12)
    )
    assert block_size_for(Profile(10, 4), 850_000, 0.5, 48) == (32768, 60), "26 cells of half the size"


@pytest.mark.parametrize(("workers", "uploads"), [(1, 4), (2, 2)])
async def test_the_first_uploads_get_blocks_of_full_size(workers: int, uploads: int) -> None:
    pool = BufferPool(ObjectLimits().fill_buffer_bytes_max // workers, wait_s=1)
    sizes: list[int] = []
    for _ in range(uploads + 1):
        block = block_size_for(Profile(4, 2), None, pool.left, 48)
        assert pool.try_lease(block.cells * (block.cell_bytes - 16)) is not None
        sizes.append(block.cells)
    assert sizes == [48] * uploads + [12]


@pytest.mark.parametrize(("workers", "whole", "half"), [(1, 7, 7), (2, 4, 3)])
async def test_uploads_of_known_size_get_larger_blocks(workers: int, whole: int, half: int) -> None:
    pool = BufferPool(ObjectLimits().fill_buffer_bytes_max // workers, wait_s=1)
    sizes: list[int] = []
    for _ in range(whole + half + 1):
        block = block_size_for(Profile(4, 2), 2**30, pool.left, 48)
        assert pool.try_lease(block.cells * (block.cell_bytes - 16)) is not None
        sizes.append(block.cells)
    assert sizes == [48] * whole + [24] * half + [12]


@pytest.mark.parametrize(
    ("k", "size", "uploads_min"), [(2, None, 75), (4, None, 75), (8, None, 64), (2, 2**30, 60), (4, 2**30, 60)]
)
async def test_shares_leave_every_upload_some(k: int, size: int | None, uploads_min: int) -> None:
    pool = BufferPool(ObjectLimits().fill_buffer_bytes_max, wait_s=1)
    leases: list[Lease] = []
    while True:
        block = block_size_for(Profile(k, 2), size, pool.left, 48)
        lease = pool.try_lease(block.cells * (block.cell_bytes - 16))
        if lease is None:
            break
        leases.append(lease)
    assert len(leases) >= uploads_min
    assert pool.bytes_leased <= pool.bytes_max


def test_write_conditions_as_a_table() -> None:
    current = Current("e1", 10, 5_000)
    good = [
        WriteConditions(),
        WriteConditions(if_match=tag("e1")),
        WriteConditions(if_match=ANY),
        WriteConditions(if_none_match=tag("e2")),
        WriteConditions(if_match_size=10, if_match_modified_ms=5_999),
    ]
    for conditions in good:
        check_write(conditions, current)
    for conditions in (
        WriteConditions(if_match=tag("e2")),
        WriteConditions(if_none_match=ANY),
        WriteConditions(if_none_match=tag("e1")),
        WriteConditions(if_match_size=9),
        WriteConditions(if_match_modified_ms=1),
    ):
        with pytest.raises(PreconditionFailed):
            check_write(conditions, current)
    for conditions in (
        WriteConditions(if_none_match=ANY),
        WriteConditions(if_match_size=9),
        WriteConditions(if_match_modified_ms=1),
    ):
        check_write(conditions, None)
    with pytest.raises(NoSuchKey):
        check_write(WriteConditions(if_match=ANY), None)


def test_a_copy_answers_412_where_a_read_answers_304() -> None:
    with pytest.raises(PreconditionFailed):
        check_copy_source(ReadConditions(if_none_match=tag("e")), "e", 0)
    assert not issubclass(PreconditionFailed, NotModified)
