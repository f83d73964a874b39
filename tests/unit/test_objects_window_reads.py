"""Windows that are read ahead: from disks of other nodes without a task, and as well as with one when something is
wrong.
"""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.errors import DataDamaged, ServiceUnavailable
from storaged.fragments.ports import CELLS_MAX
from storaged.objects.read.part_reader import PartReader
from storaged.objects.read.window import Window, WindowJob
from storaged.objects.read.window_read import WindowRead
from storaged.objects.records import decode_object, encode_object
from storaged.objects.service import ObjectService
from tests.unit.test_objects_soon import FAULTS, places_of, spoil
from tests.worlds.objects import World, bucket_of, put

pytestmark = pytest.mark.virtual_time

BLOCK = 12 * 65_520
"""Plaintext of a block, and of a window."""


class Opened(list[str]):
    """Which way windows went, in their order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        read, open_fetched = PartReader.read, PartReader.open_fetched

        async def by_task(reader: PartReader, window: Window, out: memoryview) -> None:
            self.append(f"read {window.block}")
            await read(reader, window, out)

        def by_callbacks(reader: PartReader, window: Window, job: WindowJob, out: memoryview) -> None:
            self.append(f"open {window.block}")
            open_fetched(reader, window, job, out)

        patch.setattr(PartReader, "read", by_task)
        patch.setattr(PartReader, "open_fetched", by_callbacks)


async def stored(blocks: float, *, chance: random.Random | None = None, **world: Any) -> tuple[World, Any, Any, bytes]:
    made = World(**{"far": True, "block_cells_max": 12, **world})
    objects, bucket = ObjectService(made.plane()), bucket_of(made)
    data = (chance or random.Random(1)).randbytes(int(blocks * BLOCK))
    await put(objects, bucket, data)
    return made, objects, bucket, data


@pytest.mark.parametrize(("where", "way"), [("far", "open"), ("near", "read"), ("nowhere", "read")])
async def test_only_windows_of_other_nodes_need_no_task(where: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, objects, bucket, data = await stored(3.5, far=where == "far", near=where == "near")
    ways = Opened(monkeypatch)
    stream = await objects.get(bucket, b"key")
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data
    assert ways == ["read 0", f"{way} 1", f"{way} 2", f"{way} 3"]
    assert (objects.plane.get_buffers.bytes_leased, objects.plane.get_buffers.transfers) == (0, 0)
    await objects.close()


async def test_a_window_is_asked_for_before_the_one_in_front_is_sent_and_opened_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, objects, bucket, data = await stored(2)
    ways = Opened(monkeypatch)
    stream = await objects.get(bucket, b"key")
    pieces = stream.chunks()
    assert bytes(await anext(pieces)) == data[:BLOCK]
    for _ in range(20):
        await asyncio.sleep(0)
    assert ways == ["read 0"]
    for disk in world.disks.disks.values():
        disk.down = True  # what is to come has arrived
    assert bytes(await anext(pieces)) == data[BLOCK:]
    assert ways == ["read 0", "open 1"]
    assert [piece async for piece in pieces] == []
    await objects.close()


async def test_a_disk_without_a_connection_is_awaited_at_once_and_not_when_the_window_has_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, objects, bucket, data = await stored(2)
    ways = Opened(monkeypatch)
    stream = await objects.get(bucket, b"key")
    for disk, _ in places_of(world)[:1]:
        disk.connected = False
    pieces = stream.chunks()
    await anext(pieces)
    for _ in range(20):
        await asyncio.sleep(0)
    assert ways == ["read 0", "read 1"]
    for other in world.disks.disks.values():
        other.down = True
    assert bytes(await anext(pieces)) == data[BLOCK:]
    await pieces.aclose()
    await objects.close()


async def test_a_liar_in_a_window_that_was_read_ahead_is_found_and_reported_once() -> None:
    world, objects, bucket, data = await stored(2)
    liar, fragment = next(place for place in places_of(world) if place[1].block == 1)
    liar.flip(fragment, 1, lie=True)
    stream = await objects.get(bucket, b"key")
    assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data
    assert [(damage.disk, damage.reason) for damage in world.damage] == [(liar.name, "lied")]
    await objects.close()


@pytest.mark.parametrize("when", ["fetching", "fetched"])
async def test_a_stream_that_ends_early_leaves_nothing_behind(when: str) -> None:
    world, objects, bucket, data = await stored(3)
    stream = await objects.get(bucket, b"key")
    hanging = [disk for disk, fragment in places_of(world) if fragment.block == 1][:3]
    for disk in hanging if when == "fetching" else ():
        disk.hang = asyncio.Event()
    gc.collect()
    gc.disable()
    try:
        pieces = stream.chunks()
        piece = await anext(pieces)
        assert bytes(piece) == data[:BLOCK]
        del piece
        for _ in range(20):
            await asyncio.sleep(0)
        assert len([one for one in gc.get_objects() if isinstance(one, WindowRead)]) == 1
        await pieces.aclose()
        there = weakref.ref(stream)
        del pieces, stream
        await asyncio.sleep(0)
        assert there() is None, "only the collector could free it"
        assert [one for one in gc.get_objects() if isinstance(one, WindowJob | WindowRead)] == []
    finally:
        gc.enable()
    pool = objects.plane.get_buffers
    assert (pool.bytes_leased, pool.transfers, objects.plane.long_reads._reads) == (0, 0, {})
    for disk in hanging:
        if disk.hang is not None:
            disk.hang.set()
    await objects.close()


async def test_windows_are_found_where_repair_has_moved_them_meanwhile() -> None:
    world, objects, bucket, data = await stored(4)
    stream = await objects.get(bucket, b"key")
    pieces = stream.chunks()
    found = [bytes(await anext(pieces))]
    taken = [(d, f, d.header(f), d.payload(f)) for d, f in places_of(world) if f.position < 3]
    disks = {fragment.position: disk for disk, fragment, *_ in taken}
    for disk, fragment, *_ in taken:
        disk.lose(fragment)
    for _, fragment, header, payload in taken:
        await disks[(fragment.position + 1) % 3].write(header, [payload], sync=True)
    ((name, value),) = [(name, value) for name, value in world.ring.values.items() if name.key == b"key"]
    record = decode_object(value.body)
    (version,) = record.versions
    moved = {position: disks[(position + 1) % 3].name for position in range(3)}
    runs = tuple([replace(run, moved=moved) for run in version.parts[0].runs])
    version = replace(version, parts=(replace(version.parts[0], runs=runs),))
    world.ring.values[name] = replace(value, body=encode_object(replace(record, versions=(version,))))
    objects.plane.opened_records.clear()
    found += [bytes(piece) async for piece in pieces]
    assert b"".join(found) == data
    await objects.close()


async def test_a_window_that_is_being_sent_holds_no_sealed_cells() -> None:
    _, objects, bucket, data = await stored(2)
    stream = await objects.get(bucket, b"key")
    gc.collect()
    pieces = stream.chunks()
    assert await anext(pieces) == data[:BLOCK]
    assert await anext(pieces) == data[BLOCK:]
    assert [one for one in gc.get_objects() if isinstance(one, WindowJob)] == []
    await pieces.aclose()
    await objects.close()


async def test_a_stream_that_ends_early_ends_the_task_of_its_next_window() -> None:
    world, objects, bucket, data = await stored(2, far=False)
    stream = await objects.get(bucket, b"key")
    for disk in world.disks.disks.values():
        disk.hang = asyncio.Event()
    before = asyncio.all_tasks()
    pieces = stream.chunks()
    assert await anext(pieces) == data[:BLOCK]
    for _ in range(20):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() > before
    await pieces.aclose()
    assert asyncio.all_tasks() == before
    assert objects.plane.get_buffers.bytes_leased == 0
    await objects.close()


@pytest.mark.parametrize("fault", ["lacks", "down"])
async def test_a_window_that_can_not_be_read_ends_the_stream_when_its_turn_comes(fault: str) -> None:
    world, objects, bucket, data = await stored(2)
    chance = random.Random(2)
    for disk, fragment in [place for place in places_of(world) if place[1].block == 1][:3]:
        if fault == "lacks":
            spoil(disk, fragment, fault, chance)
    stream = await objects.get(bucket, b"key")
    for disk in list(world.disks.disks.values())[:3] if fault == "down" else ():
        disk.down = True
    pieces = stream.chunks()
    assert bytes(await anext(pieces)) == data[:BLOCK]
    with pytest.raises(DataDamaged if fault == "lacks" else ServiceUnavailable):
        await anext(pieces)
    assert (objects.plane.get_buffers.bytes_leased, objects.plane.get_buffers.transfers) == (0, 0)
    await objects.close()


@pytest.mark.parametrize("seed", range(80))
async def test_with_up_to_m_faults_that_begin_at_any_time_a_large_object_is_read(seed: int) -> None:
    chance = random.Random(seed)
    world, objects, bucket, data = await stored(chance.choice((1.5, 2, 2.01, 3.7)), chance=chance)
    names = chance.sample(sorted(world.disks.disks), 2)
    faults = [(name, chance.choice(FAULTS), chance.randint(0, 3)) for name in names[: chance.randint(1, 2)]]
    stream = await objects.get(bucket, b"key")
    found, number = [], 0
    async for piece in stream.chunks():
        for name, fault, at in faults:
            if at == number:
                for disk, fragment in places_of(world):
                    if disk.name == name and disk._cells(fragment, 0, CELLS_MAX).cells:
                        spoil(disk, fragment, fault, chance)
        found.append(bytes(piece))
        number += 1
        del piece
        await asyncio.sleep(chance.choice((0, 0.001, 0.02)))
    assert b"".join(found) == data
    pool = objects.plane.get_buffers
    assert (pool.bytes_leased, pool.transfers, objects.plane.long_reads._reads) == (0, 0, {})
    for disk in world.disks.disks.values():
        if disk.hang is not None:
            disk.hang.set()
    await objects.close()
