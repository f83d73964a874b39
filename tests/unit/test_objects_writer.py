"""Writes while disks fail: they die, hang, forget, are full or away, or are late."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import os
import random
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from storaged.errors import BadDigest, OutcomeUnknown, PreconditionFailed, ServiceUnavailable
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.meta.names import Change, RegisterName, Value
from storaged.meta.ports import Grounds, Outcome, Unasked, Update
from storaged.objects.api import BodyChecks, CopySource, NewMeta, WriteConditions
from storaged.objects.code.seal import PartSealer
from storaged.objects.etags import ANY
from storaged.objects.service import ObjectService
from storaged.objects.write import sealing
from storaged.objects.write.checksums import BodyDigest
from storaged.objects.write.writer import RunsChanged
from storaged.wire import Buffer
from tests.doubles.disks import FaultyDisk
from tests.doubles.layouts import layout_of
from tests.patience import GUARD_S
from tests.worlds.objects import OWNER, World, bucket_of, entry_of, got, pieces, put

pytestmark = pytest.mark.virtual_time

KIB, MIB = 1024, 1024 * 1024
CELL = 64 * KIB - 16


@pytest.mark.parametrize("rack", "abc")
@pytest.mark.parametrize("suspected", [True, False])
@pytest.mark.parametrize("size", [5000, 200_000, 7 * MIB])
async def test_a_rack_that_is_away_stops_neither_writes_nor_reads(rack: str, suspected: bool, size: int) -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(size)
    await put(objects, bucket, data, key=b"before")
    world.disks.rack_down(rack, suspected=suspected)
    assert await got(objects, bucket, key=b"before") == data
    await put(objects, bucket, data)
    assert await got(objects, bucket) == data
    for disk in list(world.disks.disks.values()):  # whichever disk dies next
        if disk.down:
            continue
        disk.down = True
        assert await got(objects, bucket) == data
        disk.down = False
    await objects.close()


@pytest.mark.parametrize("moment", range(1, 5))
@pytest.mark.parametrize("victims", [("a0",), ("b0", "b1"), ("a1", "c0")])
async def test_disks_that_die_during_an_upload_leave_it_acknowledged_and_safe(
    moment: int, victims: tuple[str, ...]
) -> None:
    world = World(block_cells_max=12)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(12 * CELL * 4 + 77)

    def kill(number: int) -> None:
        if number == moment:
            for name in victims:
                world.disks.disks[name].down = True

    world.disks.disks[victims[0]].on_write = kill
    await put(objects, bucket, data)
    world.disks.suspected.update(victims)
    assert await got(objects, bucket) == data
    for disk in world.disks.disks.values():
        if not disk.down:
            disk.down = True
            assert await got(objects, bucket) == data
            disk.down = False
    await objects.close()


@pytest.mark.parametrize("victims", [("a0",), ("b0", "b1"), ("a0", "b0")])
async def test_a_disk_whose_sync_fails_at_the_barrier_has_its_blocks_rebuilt_elsewhere(
    victims: tuple[str, ...],
) -> None:
    world = World(block_cells_max=12)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(12 * CELL * 3 + 5)
    for name in victims:
        world.disks.disks[name].fail_sync = True
    await put(objects, bucket, data)
    assert objects.plane.counters.blocks_rebuilt_at_barrier >= 4
    for name in victims:
        world.disks.disks[name].down = True
    for run in entry_of(world).runs:
        assert run.profile != (4, 2)
    for disk in world.disks.disks.values():
        if not disk.down:
            disk.down = True
            assert await got(objects, bucket) == data
            disk.down = False
    assert not any(disk.unsynced for name, disk in world.disks.disks.items() if name not in victims)
    await objects.close()


@pytest.mark.parametrize("fault", ["full", "down", "sync fails", "hangs", "slow"])
@pytest.mark.parametrize("size", [50_000, 1 * MIB])
async def test_a_disk_that_fails_at_the_only_call_of_a_part_of_one_block_is_left_out(fault: str, size: int) -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(size)
    victim = world.disks.disks["b1"]

    def fail(_number: int) -> None:
        if fault == "full":
            victim.full = True
        elif fault == "down":
            victim.down = True
        elif fault == "sync fails":
            victim.fail_sync = True
        elif fault == "hangs":
            victim.hang = asyncio.Event()
        else:
            victim.slow_s = 0.01

    victim.on_write = fail
    async with asyncio.timeout(GUARD_S):
        await put(objects, bucket, data)
    assert not any(disk.unsynced for disk in world.disks.disks.values() if disk is not victim)
    assert (objects.plane.put_buffers.bytes_leased, objects.plane.fill_buffers.bytes_leased) == (0, 0)
    victim.down, victim.hang = fault != "slow", None
    for disk in world.disks.disks.values():  # whichever disk dies next
        if disk is not victim:
            disk.down = True
            assert await got(objects, bucket) == data
            disk.down = False
    await objects.close()


async def test_a_part_of_one_block_costs_each_disk_one_call_after_the_promise() -> None:
    world = World()
    world.ring.new_keys = False
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    disks, real = world.disks.disks.values(), world.ring.change

    async def watched(name: RegisterName, update: Update, **more: Any) -> Outcome:
        await asyncio.sleep(0.05)
        assert not any(disk.writes for disk in disks)
        return await real(name, update, **more)

    world.ring.change = watched  # type: ignore[method-assign]
    await put(objects, bucket, data)
    assert [(disk.writes, disk.syncs) for disk in disks] == [(1, 0)] * 6
    assert await got(objects, bucket) == data
    await objects.close()


async def test_a_new_object_of_one_block_is_created_when_its_fragments_are_synced() -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    disks, real = world.disks.disks.values(), world.ring.change

    async def watched(name: RegisterName, update: Update, **more: Any) -> Outcome:
        assert [(disk.writes, disk.syncs, len(disk.unsynced)) for disk in disks] == [(1, 0, 0)] * 6
        return await real(name, update, **more)

    world.ring.change = watched  # type: ignore[method-assign]
    await put(objects, bucket, data)
    assert world.ring.created == 1
    assert [(disk.writes, disk.syncs) for disk in disks] == [(1, 0)] * 6
    assert await got(objects, bucket) == data
    await objects.close()


async def test_grounds_of_a_create_are_taken_before_anything_is_on_a_disk() -> None:
    world = World()
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    disks, real = world.disks.disks.values(), world.ring.grounds
    written: list[int] = []

    def watched(name: RegisterName) -> Grounds | None:
        written.append(sum(disk.writes for disk in disks))
        return real(name)

    world.ring.grounds = watched  # type: ignore[method-assign]
    await put(objects, bucket, os.urandom(300_000))
    assert written == [0]
    await put(objects, bucket, os.urandom(7 * MIB), key=b"blocks that are sent while others fill")
    await put(objects, bucket, os.urandom(300_000), key=b"condition", conditions=WriteConditions(if_none_match=ANY))
    assert (written, world.ring.created) == ([0], 1)
    await objects.close()


@pytest.mark.parametrize("deleted", [False, True])
async def test_where_a_create_is_refused_its_fragments_are_seen_after_a_promise(deleted: bool) -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    await put(objects, bucket, b"before")
    value, real = dict(world.ring.values), world.ring.change
    disks = list(world.disks.disks.values())
    spared: list[int] = []

    async def watched(
        name: RegisterName, update: Update, *, ready: Awaitable[None] | None = None, **more: Any
    ) -> Outcome:
        for disk in disks:
            disk.condemn(fragment.data_id for fragment in disk.fragments)
            if deleted:
                await disk.delete_condemned(disk.fragments)

        async def seen() -> None:
            assert ready is not None
            await ready
            spared.extend([await disk.delete_condemned(disk.fragments) for disk in disks])

        return await real(name, update, ready=seen(), **more)

    world.ring.change = watched  # type: ignore[method-assign]
    if deleted:
        with pytest.raises(ServiceUnavailable):
            await put(objects, bucket, data)
        assert world.ring.values == value
    else:
        await put(objects, bucket, data)
        assert spared == [0] * 6
        assert await got(objects, bucket) == data
    assert world.ring.created == 0
    await objects.close()


async def test_a_create_that_may_be_carried_on_finds_its_fragments_after_the_block_has_moved() -> None:
    """One replica has taken it, and two have refused it."""
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    created: list[tuple[RegisterName, Change]] = []

    async def refused(
        name: RegisterName, update: Update, *, ready: Awaitable[None], unasked: Unasked, **more: Any
    ) -> Outcome:
        created.append((name, unasked.change))
        world.disks.suspected.add("b1")
        update(None)
        with pytest.raises(RunsChanged):
            await ready
        raise OutcomeUnknown("the block has moved")

    world.ring.change = refused  # type: ignore[assignment,method-assign]
    with pytest.raises(OutcomeUnknown):
        await put(objects, bucket, data)
    world.disks.suspected.clear()
    [(name, change)] = created
    world.ring.values[name] = Value(1, os.urandom(16), change.visibility, change.body, change.payload)
    assert await got(objects, bucket) == data
    await objects.close()


async def test_a_create_names_the_places_that_are_left_when_a_disk_fails() -> None:
    world = World()
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    victim = world.disks.disks["b1"]

    def fail(_number: int) -> None:
        victim.down = True

    victim.on_write = fail
    await put(objects, bucket, data)
    assert world.ring.created == 1
    assert await got(objects, bucket) == data
    placed = {disk for disk, _ in world.disks.of(entry_of(world).data_id)}
    assert victim.name not in placed
    await objects.close()


@pytest.mark.parametrize("refused", ["digest", "commit"])
async def test_a_part_of_one_block_that_is_refused_before_it_was_sent_costs_no_disk_a_call(refused: str) -> None:
    world = World()
    world.ring.new_keys = False
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)

    async def refuse(_name: RegisterName, _update: Update, **_more: Any) -> Outcome:
        raise PreconditionFailed

    if refused == "commit":
        world.ring.change = refuse  # type: ignore[method-assign]
    checks = BodyChecks(size=len(data), md5=hashlib.md5(data[1:]).digest() if refused == "digest" else None)
    with pytest.raises(BadDigest if refused == "digest" else PreconditionFailed):
        await objects.put(bucket, b"key", pieces(data), NewMeta(), checks, owner=OWNER)
    assert (objects.plane.put_buffers.bytes_leased, objects.plane.fill_buffers.bytes_leased) == (0, 0)
    await objects.close()
    assert not any(disk.writes or disk.retirements for disk in world.disks.disks.values())


async def test_a_part_of_one_block_does_not_wait_for_its_promise_while_memory_is_short() -> None:
    world = World(put_buffer_bytes_max=MIB)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    disks, real = world.disks.disks.values(), world.ring.change

    async def watched(name: RegisterName, update: Update, **more: Any) -> Outcome:
        await asyncio.sleep(0.05)
        assert objects.plane.put_buffers.bytes_leased == 0
        return await real(name, update, **more)

    world.ring.change = watched  # type: ignore[method-assign]
    await put(objects, bucket, data)
    assert [(disk.writes, disk.syncs) for disk in disks] == [(1, 1)] * 6
    assert await got(objects, bucket) == data
    await objects.close()


async def test_a_node_that_restarts_and_forgets_before_the_barrier_is_noticed() -> None:
    world = World(block_cells_max=12)
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(12 * CELL * 3)

    async def body() -> AsyncIterator[Buffer]:
        yield data[: 30 * CELL]
        await asyncio.sleep(0.05)
        for name in ("c0", "c1"):
            world.disks.disks[name].lose()
        yield data[30 * CELL :]

    await objects.put(bucket, b"key", body(), NewMeta(), BodyChecks(len(data)), owner=OWNER)
    world.disks.rack_down("a")
    assert await got(objects, bucket) == data
    await objects.close()


async def test_a_hanging_disk_delays_a_write_by_no_more_than_the_grace() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    hang = world.disks.disks["b1"].hang = asyncio.Event()
    data = os.urandom(300_000)
    async with asyncio.timeout(GUARD_S):
        await put(objects, bucket, data)
        assert await got(objects, bucket) == data
    hang.set()
    await objects.close()


FAULTS = ("hangs", "slow", "down", "away", "full", "syncs nothing")


def spoil(disk: FaultyDisk, fault: str, chance: random.Random) -> None:
    match fault:
        case "hangs":
            disk.hang = asyncio.Event()
        case "slow":
            disk.slow_s = chance.choice((0.005, 0.05, 0.2))
        case "down":
            disk.down = True
        case "away":
            disk.connected, disk.down = False, True  # type: ignore[attr-defined]
        case "full":
            disk.full = True
        case "syncs nothing":
            disk.fail_sync = True


def heal(disk: FaultyDisk) -> None:
    """It is as before, with what it has synced, and nothing else."""
    if disk.hang is not None:
        disk.hang.set()
    disk.hang, disk.slow_s, disk.down, disk.full, disk.fail_sync = None, 0.0, False, False, False
    disk.crash()


@pytest.mark.parametrize("seed", range(60))
async def test_what_was_written_without_tasks_to_faulty_disks_survives_the_loss_of_any_rack(seed: int) -> None:
    chance = random.Random(seed)
    buffers = {"put_buffer_bytes_max": MIB} if chance.random() < 0.3 else {}  # blocks are sent before their promise
    world = World(layout_of((3, 3, 3)), far=True, **buffers)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    disks = list(world.disks.disks.values())
    for disk in chance.sample(disks, chance.randint(1, 2)):
        spoil(disk, chance.choice(FAULTS), chance)
    made = {}
    for number in range(3):  # what the first write has learned of the disks counts for the others
        made[b"%d" % number] = data = chance.randbytes(
            chance.choice((70_000, 200_001, chance.randint(66_000, 4 * MIB)))
        )
        async with asyncio.timeout(GUARD_S):
            await put(objects, bucket, data, key=b"%d" % number)
    assert (objects.plane.put_buffers.bytes_leased, objects.plane.fill_buffers.bytes_leased) == (0, 0)
    for disk in disks:
        heal(disk)
    for rack in "abc":
        world.disks.rack_down(rack, suspected=chance.random() < 0.5)
        for key, data in made.items():
            assert await got(objects, bucket, key=key) == data
        for disk in disks:
            disk.down = False
        world.disks.suspected.clear()
    await objects.close()


async def test_a_disk_that_hangs_in_its_sync_is_left_out_of_the_barrier_and_reported() -> None:
    world = World(sync_timeout_s=3600.0, put_buffer_bytes_max=MIB)  # too little for the block to wait for its promise
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    hung = world.disks.disks["b1"]

    async def sync(_ids: object) -> None:
        await asyncio.Event().wait()

    hung.sync = sync  # type: ignore[method-assign]
    loop = asyncio.get_running_loop()
    began = loop.time()
    await put(objects, bucket, data)
    assert loop.time() - began < 1.0
    assert world.disks.late == ["b1"]
    assert entry_of(world).runs[0].profile == (3, 2), "without it 4+2 would not survive the loss of a rack"
    for disk in world.disks.disks.values():
        disk.down = disk.name.startswith("a") or disk is hung
    assert await got(objects, bucket) == data
    await objects.close()


async def test_where_all_disks_are_slow_a_barrier_gives_none_up() -> None:
    world = World(sync_timeout_s=3600.0, put_buffer_bytes_max=MIB)  # too little for the block to wait for its promise
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    for number, disk in enumerate(world.disks.disks.values()):
        sync = disk.sync

        async def slowly(ids: Sequence[FragmentId], sync: Any = sync, slow_s: float = 1.0 + number / 10) -> None:
            await asyncio.sleep(slow_s)
            await sync(ids)

        disk.sync = slowly  # type: ignore[method-assign]
    await put(objects, bucket, data)
    assert world.disks.late == []
    assert not any(disk.unsynced for disk in world.disks.disks.values())
    await objects.close()


async def test_a_slow_disk_gets_no_fragments_while_the_others_can_hold_them() -> None:
    world = World(layout_of((3, 3, 3)))
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    world.disks.slow = {"a0", "b0"}
    for number in range(8):
        await put(objects, bucket, data, key=b"%d" % number)
    assert not world.disks.disks["a0"].fragments
    assert not world.disks.disks["b0"].fragments
    assert objects.plane.counters.blocks_fallback == 0
    world.disks.slow = set(world.disks.disks) - {"c0", "c1", "c2"}
    await put(objects, bucket, data)
    assert [run.profile for run in entry_of(world).runs] == [(4, 2)], "one rack alone would not be safe"
    assert await got(objects, bucket, key=b"3") == data
    await objects.close()


async def test_a_write_that_the_next_failure_would_lose_is_refused_and_changes_nothing() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    await put(objects, bucket, b"old")
    for name in ("a0", "a1", "b0", "b1", "c0"):
        world.disks.disks[name].full = True
    for size in (5000, 300_000):
        with pytest.raises(ServiceUnavailable):
            await put(objects, bucket, os.urandom(size))
    assert await got(objects, bucket) == b"old"
    await objects.close()


async def test_small_objects_are_coded_when_the_registers_disks_are_full() -> None:
    world = World(layout_of((3, 3, 3)))
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(9000)
    await put(objects, bucket, data)
    for disk, _ in world.disks.of(entry_of(world).data_id)[:2]:
        world.disks.disks[disk].full = True
    await put(objects, bucket, data[::-1])
    assert not entry_of(world).small
    assert await got(objects, bucket) == data[::-1]
    await objects.close()


@pytest.mark.parametrize("sized", [True, False])
async def test_a_small_object_that_is_coded_is_digested_once_and_sealed_once(
    monkeypatch: pytest.MonkeyPatch, sized: bool
) -> None:
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*args, **options)

        return call

    world = World(layout_of((3, 3, 3)))
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    data = os.urandom(5000)
    await put(objects, bucket, data)
    for disk, _ in world.disks.of(entry_of(world).data_id)[:2]:
        world.disks.disks[disk].full = True
    monkeypatch.setattr(sealing, "digest_of", counted("digest", sealing.digest_of))
    monkeypatch.setattr(sealing, "seal_part", counted("seal_part", sealing.seal_part))
    monkeypatch.setattr(BodyDigest, "update", counted("update", BodyDigest.update))
    monkeypatch.setattr(PartSealer, "seal_block", counted("seal_block", PartSealer.seal_block))
    checks = BodyChecks(
        size=5000 if sized else None,
        checksums={"CRC32": base64.b64encode(zlib.crc32(data[::-1]).to_bytes(4, "big")).decode()},
    )
    result = await objects.put(bucket, b"key", pieces(data[::-1]), NewMeta(), checks, owner=OWNER)
    assert calls == ["digest", "update", "seal_block"]  # the second is the first's: there is a checksum besides the MD5
    assert (result.etag, result.checksums) == (hashlib.md5(data[::-1]).hexdigest(), checks.checksums)
    assert not entry_of(world).small
    assert await got(objects, bucket) == data[::-1]
    assert (await objects.head(bucket, b"key")).checksums == checks.checksums
    await objects.close()


async def test_a_request_may_take_days() -> None:
    world = World()
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)

    async def slow() -> AsyncIterator[Buffer]:
        yield bytes(50_000)
        world.clock.ahead_s += 3 * 86_400
        world.clock.wall += 3 * 86_400_000
        yield bytes(50_000)

    await objects.put(bucket, b"key", slow(), NewMeta(), BodyChecks(100_000), owner=OWNER)
    assert await got(objects, bucket) == bytes(100_000)
    await objects.close()


@pytest.mark.parametrize("deleted", ["before the promise", "after the promise", "never"])
async def test_fragments_are_seen_after_each_promise(deleted: str) -> None:
    """A collector that condemned them before the promise either has deleted them when they are synced, or spares them
    from then on."""
    world = World(put_buffer_bytes_max=100_000)  # else the only block is sent after the promise
    objects = ObjectService(world.plane())
    bucket = bucket_of(world)
    real = world.ring.change
    disks = list(world.disks.disks.values())
    spared: list[int] = []

    async def collect() -> None:
        spared.extend([await disk.delete_condemned(disk.fragments) for disk in disks])

    async def watched(
        name: RegisterName, update: Update, *, ready: Awaitable[None] | None = None, **more: Any
    ) -> Outcome:
        await asyncio.sleep(0.05)  # the last block is on its way
        assert any(disk.unsynced for disk in disks)
        for disk in disks:
            disk.condemn(fragment.data_id for fragment in disk.fragments)
        if deleted == "before the promise":
            await collect()

        async def seen() -> None:
            assert ready is not None
            await ready
            if deleted == "after the promise":
                await collect()

        return await real(name, update, ready=seen(), **more)

    world.ring.change = watched  # type: ignore[method-assign]
    data = os.urandom(100_000)
    if deleted == "before the promise":
        with pytest.raises(ServiceUnavailable):
            await objects.put(bucket, b"key", pieces(data), NewMeta(), BodyChecks(100_000), owner=OWNER)
        assert not world.ring.values
    else:
        await objects.put(bucket, b"key", pieces(data), NewMeta(), BodyChecks(100_000), owner=OWNER)
        assert not any(spared)
        assert await got(objects, bucket) == data
    await objects.close()


async def test_what_a_late_write_still_refers_to_is_not_written_over() -> None:
    world = World(block_cells_max=12)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    kept: list[tuple[bytes, Sequence[Buffer]]] = []
    writes = itertools.count()
    for disk in world.disks.disks.values():
        write = disk.write

        async def remembered(
            header: FragmentHeader,
            payload: Sequence[Buffer],
            *,
            sync: bool = False,
            check: bytes = b"",
            write: object = write,
        ) -> None:
            if next(writes) % 5 == 0:
                kept.append((b"".join(payload), payload))
            await write(header, payload, sync=sync)  # type: ignore[operator]

        disk.write = remembered  # type: ignore[method-assign]
    for number in range(3):
        await put(objects, bucket, os.urandom(4 * MIB), key=b"key%d" % number)
    assert len(kept) > 10
    assert all(b"".join(payload) == before for before, payload in kept)
    await objects.close()


@pytest.mark.parametrize("over", ["lender", "copy"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
async def test_a_commit_that_begins_again_waits_for_the_block_that_is_on_its_way(over: str, blocks: int) -> None:
    """The record of a key that lends or borrows says that other versions are to be kept: then the commit begins anew,
    while the last block is being sent."""
    world = World(block_cells_max=12)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    before, data = os.urandom(300_000), os.urandom(12 * CELL * (blocks - 1) + 300_000)
    await put(objects, bucket, before, key=b"lender")
    await objects.copy(CopySource(bucket, b"lender"), bucket, b"copy", owner=OWNER, meta=None)
    for disk in world.disks.disks.values():
        disk.slow_s = 0.05
    await put(objects, bucket, data, key=over.encode())
    assert objects.plane.counters.blocks_rebuilt_at_barrier == 0
    for key in (b"lender", b"copy"):
        assert await got(objects, bucket, key=key) == (data if key == over.encode() else before)
    await objects.close()
