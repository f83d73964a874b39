"""The bytes of a record that was opened lately are read while the record is read, and count only if it is the same."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import msgspec
import pytest

from storaged.cluster.layout import Profile
from storaged.errors import KeyringUnavailable, NoSuchKey
from storaged.fragments.ports import FragmentId
from storaged.maintain.moved_record import body_after
from storaged.maintain.moves import MoveAsk
from storaged.meta.names import Change, object_name
from storaged.meta.ports import Reading
from storaged.objects.api import CopySource, FailedRead, ObjectInfo, ReadResult
from storaged.objects.code.versions import Place, decode_record
from storaged.objects.read.borrowed import find_data
from storaged.objects.read.streams import VerifiedStream
from storaged.objects.read.window import WindowJob
from storaged.objects.records import sharing_of
from storaged.objects.service import ObjectService
from tests.doubles.disks import FarDisk
from tests.worlds.objects import OWNER, World, bucket_of, entry_of, put

pytestmark = pytest.mark.virtual_time

SIZE = 300_000


class Rig:
    """A gateway whose reads of records may be held back, and another one."""

    def __init__(self) -> None:
        self.world = World(far=True)
        self.objects, self.other = ObjectService(self.world.plane()), ObjectService(self.world.plane())
        self.bucket = bucket_of(self.world)
        self.record_comes = asyncio.Event()
        self.record_comes.set()
        ring: Any = self.world.ring
        try_read = ring.try_read

        def held_back(*read: Any) -> None:
            waiting = asyncio.create_task(self.record_comes.wait())
            waiting.add_done_callback(lambda _: try_read(*read))

        ring.try_read = held_back

    def begin(self) -> asyncio.Future[ReadResult]:
        told: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
        self.objects.try_read(self.bucket, b"key", True, told.set_result)
        return told

    async def whole(self) -> bytes:
        found = await self.begin()
        assert isinstance(found, VerifiedStream)
        assert found.held is not None
        data = bytes(found.held)
        found.release()
        return data

    def fragment_reads(self) -> int:
        return sum(disk.reads for disk in self.world.disks.disks.values())

    def nothing_is_held(self) -> bool:
        plane = self.objects.plane
        return (plane.get_buffers.bytes_leased, plane.get_buffers.transfers, plane.long_reads._reads) == (0, 0, {})

    async def close(self) -> None:
        await self.objects.close()
        await self.other.close()


async def test_fragments_are_asked_for_with_the_record_and_counted_once() -> None:
    rig, data = Rig(), os.urandom(SIZE)
    await put(rig.other, rig.bucket, data)
    assert await rig.whole() == data
    rig.record_comes.clear()
    before, counted = rig.fragment_reads(), rig.objects.statistics()
    told = rig.begin()
    await asyncio.sleep(0.01)
    assert rig.fragment_reads() == before + 4
    assert not told.done()
    assert rig.objects.statistics() == counted, "nothing was read yet"
    rig.record_comes.set()
    found = await told
    assert isinstance(found, VerifiedStream)
    assert found.held == data
    assert rig.fragment_reads() == before + 4, "they are not asked for again"
    after = rig.objects.statistics()
    assert (after.gets - counted.gets, after.bytes_out - counted.bytes_out) == (1, SIZE)
    found.release()
    assert rig.nothing_is_held()
    await rig.close()


async def test_a_slow_fragment_is_waited_for_after_the_record() -> None:
    rig, data = Rig(), os.urandom(SIZE)
    await put(rig.other, rig.bucket, data)
    assert await rig.whole() == data
    for disk in rig.world.disks.disks.values():
        disk.slow_s = 0.01
    assert await rig.whole() == data
    assert rig.nothing_is_held()
    await rig.close()


@pytest.mark.parametrize("when", ["before the read", "while it reads"])
@pytest.mark.parametrize("change", ["another body", "deleted", "the same body again"])
async def test_a_change_of_another_gateway_is_seen_and_old_fragments_are_no_damage(change: str, when: str) -> None:
    rig, data, newer = Rig(), os.urandom(SIZE), os.urandom(SIZE)
    await put(rig.other, rig.bucket, data)
    for _ in range(2):
        assert await rig.whole() == data
    if when == "while it reads":
        rig.record_comes.clear()
        told = rig.begin()
        await asyncio.sleep(0.01)
    old = rig.world.disks.of(entry_of(rig.world).data_id)
    if change == "deleted":
        await rig.other.delete(rig.bucket, b"key")
    else:
        await put(rig.other, rig.bucket, newer if change == "another body" else data)
    if when == "before the read":
        for name, fragment in old:  # collected
            rig.world.disks.disks[name].lose(fragment)
        told = rig.begin()
    rig.record_comes.set()
    found = await told
    if change == "deleted":
        assert isinstance(found, NoSuchKey)
    else:
        assert isinstance(found, VerifiedStream)
        assert found.held == (newer if change == "another body" else data)
        found.release()
    assert rig.world.damage == []
    assert rig.nothing_is_held()
    await rig.close()


async def test_after_a_wrong_guess_none_is_made_until_the_record_was_seen_twice() -> None:
    rig = Rig()
    await put(rig.other, rig.bucket, os.urandom(SIZE))
    await rig.whole()
    costs = []
    for changes in (True, True, False, False):
        if changes:
            await put(rig.other, rig.bucket, os.urandom(SIZE))
        rig.record_comes.clear()
        told, before = rig.begin(), rig.fragment_reads()
        await asyncio.sleep(0.01)
        costs.append(rig.fragment_reads() - before)
        rig.record_comes.set()
        found = await told
        assert isinstance(found, VerifiedStream)
        found.release()
    assert costs == [4, 0, 0, 4]
    await rig.other.delete(rig.bucket, b"key")
    before = rig.fragment_reads()
    for _ in range(3):
        assert isinstance(await rig.begin(), NoSuchKey)
    assert rig.fragment_reads() == before + 4, "a deleted key costs one guess"
    await rig.close()


async def test_while_replicas_do_not_agree_at_once_one_guess_is_made() -> None:
    rig, data = Rig(), os.urandom(SIZE)
    await put(rig.other, rig.bucket, data)
    assert await rig.whole() == data
    ring: Any = rig.world.ring
    try_read = ring.try_read
    ring.try_read = lambda _name, _want_payload, then: asyncio.get_running_loop().call_later(0.01, then, None)
    costs = []
    for _ in range(3):
        before = rig.fragment_reads()
        assert await rig.begin() is None
        costs.append(rig.fragment_reads() - before)
        assert rig.nothing_is_held()
        stream = await rig.objects.get(rig.bucket, b"key")  # what the connection's task does then
        assert b"".join([bytes(piece) async for piece in stream.chunks()]) == data
    assert costs == [4, 0, 0]
    ring.try_read = try_read
    assert await rig.whole() == data
    rig.record_comes.clear()
    told, before = rig.begin(), rig.fragment_reads()
    await asyncio.sleep(0.01)
    assert rig.fragment_reads() == before + 4, "they agree again"
    rig.record_comes.set()
    found = await told
    assert isinstance(found, VerifiedStream)
    found.release()
    await rig.close()


async def test_a_read_of_the_record_that_raises_keeps_nothing_of_its_guess() -> None:
    rig = Rig()
    await put(rig.other, rig.bucket, os.urandom(SIZE))
    await rig.whole()
    ring: Any = rig.world.ring

    def fails(*_read: Any) -> None:
        raise RuntimeError("a mistake")

    ring.try_read = fails
    before = rig.fragment_reads()
    with pytest.raises(RuntimeError):
        rig.begin()
    await asyncio.sleep(0.01)
    assert rig.fragment_reads() == before + 4
    assert rig.nothing_is_held()
    await rig.close()


async def test_a_key_that_another_gateway_deleted_is_not_there_also_while_the_keyring_is_locked() -> None:
    rig = Rig()
    await put(rig.other, rig.bucket, os.urandom(SIZE))
    await rig.whole()
    await rig.other.delete(rig.bucket, b"key")
    keys: Any = rig.world.keys

    def locked(*_which: Any) -> None:
        raise KeyringUnavailable

    keys.try_bucket_key = locked
    before = rig.fragment_reads()
    assert isinstance(await rig.begin(), NoSuchKey)
    assert rig.fragment_reads() == before
    assert rig.nothing_is_held()
    await rig.close()


async def test_damage_is_reported_once_the_guess_was_right() -> None:
    rig, data = Rig(), os.urandom(SIZE)
    await put(rig.other, rig.bucket, data)
    assert await rig.whole() == data
    places = rig.world.disks.of(entry_of(rig.world).data_id)
    name, fragment = next((name, fragment) for name, fragment in places if fragment.position == 0)
    rig.world.disks.disks[name].lose(fragment)
    rig.record_comes.clear()
    told = rig.begin()
    await asyncio.sleep(0.01)
    assert rig.world.damage == []
    rig.record_comes.set()
    found = await told
    assert isinstance(found, VerifiedStream)
    assert found.held == data
    assert [(damage.disk, damage.reason) for damage in rig.world.damage] == [(name, "missing")]
    found.release()
    await rig.close()


async def test_a_disk_that_hangs_keeps_nothing_of_a_guess_that_was_dropped() -> None:
    rig = Rig()
    await put(rig.other, rig.bucket, os.urandom(SIZE))
    await rig.whole()
    for disk in rig.world.disks.disks.values():
        disk.hang = asyncio.Event()
    gc.collect()
    gc.disable()
    try:
        told = rig.begin()
        await asyncio.sleep(0)
        rig.world.ring.values.clear()  # deleted, and expunged
        assert isinstance(await told, NoSuchKey)
        del told
        assert rig.nothing_is_held()
        assert sum(len(disk._asking) for disk in rig.world.disks.disks.values() if isinstance(disk, FarDisk)) == 4
        assert [one for one in gc.get_objects() if isinstance(one, WindowJob | VerifiedStream)] == []
    finally:
        gc.enable()
    for disk in rig.world.disks.disks.values():
        assert disk.hang is not None
        disk.hang.set()
    await rig.close()


async def test_a_head_reads_no_fragment() -> None:
    rig, data = Rig(), os.urandom(SIZE)
    await put(rig.other, rig.bucket, data)
    assert await rig.whole() == data
    before = rig.fragment_reads()
    told: asyncio.Future[ReadResult] = asyncio.get_running_loop().create_future()
    rig.objects.try_read(rig.bucket, b"key", False, told.set_result)
    assert isinstance(await told, ObjectInfo)
    assert rig.fragment_reads() == before
    await rig.close()


# --- copies, whose data another key's record names


class CopyRig(Rig):
    """``key`` is a copy of ``source``, and was read once. ``owner_reads``: of the record of ``source`` since."""

    def __init__(self) -> None:
        super().__init__()
        self.owner_reads = 0
        ring: Any = self.world.ring
        read = ring.read

        def counted(*which: Any, **how: Any) -> Any:
            self.owner_reads += which[0].key == b"source"
            return read(*which, **how)

        ring.read = counted

    async def make(self) -> bytes:
        data = os.urandom(SIZE)
        await put(self.other, self.bucket, data, key=b"source")
        await self.other.copy(CopySource(self.bucket, b"source"), self.bucket, b"key", owner=OWNER, meta=None)
        assert await self.by_task() == data
        self.owner_reads = 0
        return data

    async def by_task(self) -> bytes:
        """As a connection whose callbacks leave the request to its task."""
        reading = await self.begin()
        assert isinstance(reading, Reading | FailedRead)
        failed = reading.error if isinstance(reading, FailedRead) else None
        if isinstance(reading, FailedRead):
            reading = reading.reading
        stream = await self.objects.get(self.bucket, b"key", reading=reading, failed=failed)
        return b"".join([bytes(piece) async for piece in stream.chunks()])

    async def places(self) -> list[tuple[str, FragmentId]]:
        """The disks that have the copy's data, and which fragment each has."""
        found = await find_data(self.other.plane, self.bucket, b"key", "")
        return self.world.disks.of(found.opened.version.parts[0].data_id)

    async def move(self, *positions: int) -> None:
        """These fragments go to the disk that has the last one, and the owner's record says so."""
        places = {fragment.position: (name, fragment) for name, fragment in await self.places()}
        to = places[max(places)][0]
        owner = object_name(self.bucket.id, self.bucket.shard_numbers, b"source")
        value = self.world.ring.values[owner]
        [loan] = sharing_of(decode_record(value)).loans
        assert loan.part is not None
        run = loan.part.runs[0]
        moved = msgspec.structs.replace(run, moved=dict.fromkeys(positions, to))
        ask = MoveAsk(owner.pack(), loan.part.data_id, run, moved)
        after = await body_after(self.other.plane.pages, owner, value, [(ask, Profile(run.k, run.m))])
        assert after is not None
        change = Change(after[0], value.visibility, value.payload)
        await self.other.plane.registers.change(owner, lambda _value: change)
        disks = self.world.disks.disks
        for name, fragment in (places[position] for position in positions):
            if name != to:
                await disks[to].write(disks[name].header(fragment), [disks[name].payload(fragment)])
                disks[name].lose(fragment)
        self.owner_reads = 0

    def guess_nothing(self) -> None:
        """The next read is no guess, as after a wrong one."""
        self.objects.plane.opened_records._records[Place(self.bucket.id, b"key")].steady = False


async def test_a_copy_that_was_read_lately_costs_no_read_of_its_owners_record() -> None:
    rig = CopyRig()
    data = await rig.make()
    rig.record_comes.clear()
    before = rig.fragment_reads()
    told = rig.begin()
    await asyncio.sleep(0.01)
    assert rig.fragment_reads() == before + 4
    rig.record_comes.set()
    found = await told
    assert isinstance(found, VerifiedStream)
    assert found.held == data
    assert rig.owner_reads == 0
    found.release()
    assert rig.nothing_is_held()
    await rig.close()


async def test_data_of_a_copy_that_has_moved_is_no_damage_and_its_place_is_asked_for_again() -> None:
    rig = CopyRig()
    data = await rig.make()
    await rig.move(0)
    assert await rig.by_task() == data
    assert rig.owner_reads == 1
    rig.guess_nothing()
    assert await rig.whole() == data
    await rig.move(0, 1)
    rig.guess_nothing()
    assert await rig.whole() == data, "the other fragments suffice"
    assert rig.owner_reads == 0
    assert await rig.by_task() == data
    assert await rig.whole() == data
    assert rig.owner_reads == 1
    assert rig.world.damage == []
    assert rig.nothing_is_held()
    await rig.close()


@pytest.mark.parametrize("guesses", [True, False])
async def test_damage_of_a_copy_is_reported_by_the_read_that_asked_its_owner(guesses: bool) -> None:
    rig = CopyRig()
    data = await rig.make()
    [(name, fragment), *_] = sorted(await rig.places(), key=lambda place: place[1].position)
    rig.world.disks.disks[name].lose(fragment)
    if not guesses:
        rig.guess_nothing()
        assert await rig.whole() == data
    assert rig.world.damage == []
    assert await rig.by_task() == data
    assert [(damage.disk, damage.reason) for damage in rig.world.damage] == [(name, "missing")]
    await rig.close()


async def test_a_copy_with_too_few_fragments_at_its_known_places_is_found_where_it_is() -> None:
    rig = CopyRig()
    data = await rig.make()
    await rig.move(0, 1, 2)
    assert await rig.by_task() == data
    assert rig.world.damage == []
    assert await rig.whole() == data
    assert rig.nothing_is_held()
    await rig.close()


async def test_a_copy_that_was_overwritten_or_deleted_is_seen() -> None:
    rig = CopyRig()
    await rig.make()
    newer = os.urandom(SIZE)
    await put(rig.other, rig.bucket, newer)
    assert await rig.whole() == newer
    await rig.other.delete(rig.bucket, b"key")
    assert isinstance(await rig.begin(), NoSuchKey)
    assert rig.world.damage == []
    assert rig.nothing_is_held()
    await rig.close()


async def test_the_source_of_a_copy_may_go() -> None:
    rig = CopyRig()
    data = await rig.make()
    await rig.other.delete(rig.bucket, b"source")
    await rig.other.plane.background.settle()
    assert await rig.whole() == data
    assert rig.world.damage == []
    await rig.close()
