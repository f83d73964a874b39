"""Reads that are under way together: which reader is woken, when, and what is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from typing import Any

import pytest

from storaged.deadlines import Deadlines
from storaged.errors import DataDamaged, ServiceUnavailable
from storaged.fragments.ports import FragmentId
from storaged.objects.hedge_delay import HedgeDelay
from storaged.objects.read.hedging import Reads
from storaged.objects.service import ObjectService
from tests.doubles.disks import FaultyDisk
from tests.worlds.objects import World, bucket_of, entry_of, got, put

pytestmark = pytest.mark.virtual_time


class Disk:
    """One read of it comes when ``answer`` says how."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    def read(self) -> Coroutine[Any, Any, bool]:
        async def run() -> bool:
            try:
                return await self.answer
            except asyncio.CancelledError:
                self.cancelled = True
                raise

        return run()


def begun(count: int) -> tuple[Reads, list[Disk]]:
    reads, disks = Reads(HedgeDelay(0.01), Deadlines()), [Disk() for _ in range(count)]
    for position, disk in enumerate(disks):
        reads.begin(position, disk.read())
    return reads, disks


async def test_a_waiter_is_woken_once_when_all_come() -> None:
    reads, disks = begun(3)
    turn = asyncio.create_task(reads.turn(5.0))
    for disk in disks:
        await asyncio.sleep(0.005)
        assert not turn.done()
        disk.answer.set_result(True)
    assert await turn == 0
    assert (len(reads), reads.stalled) == (0, False)


async def test_a_waiter_is_woken_at_once_by_a_read_that_failed() -> None:
    reads, disks = begun(3)
    turn = asyncio.create_task(reads.turn(5.0))
    await asyncio.sleep(0)
    disks[1].answer.set_result(False)
    assert await turn == 1
    assert len(reads) == 2
    disks[0].answer.set_result(False)
    disks[2].answer.set_result(False)
    await asyncio.sleep(0.005)
    assert await reads.turn(5.0) == 2
    await reads.close()


async def test_reads_that_come_one_after_the_other_put_off_the_alarm() -> None:
    reads, disks = begun(4)
    turn = asyncio.create_task(reads.turn(5.0, patience_s=0.1))
    for disk in disks[:3]:
        await asyncio.sleep(0.06)
        disk.answer.set_result(True)
    assert not turn.done()
    assert await turn == 0
    assert (len(reads), reads.stalled) == (1, True)
    await reads.close()
    assert disks[3].cancelled


async def test_whoever_reads_more_than_is_needed_hears_of_every_read() -> None:
    reads, disks = begun(2)
    reads.eager = True
    turn = asyncio.create_task(reads.turn(5.0))
    await asyncio.sleep(0)
    disks[0].answer.set_result(True)
    assert await turn == 0
    assert len(reads) == 1
    await reads.close()


async def test_a_read_that_takes_too_long_is_given_up_and_ended() -> None:
    reads, disks = begun(2)
    await asyncio.sleep(0.02)
    late = Disk()
    reads.begin(7, late.read())
    assert reads.give_up(1.0) == []
    assert reads.give_up(0.01) == [0, 1]
    assert len(reads) == 1
    await reads.close()
    assert [disk.cancelled for disk in (*disks, late)] == [True, True, False]  # the last never began


async def test_reads_that_come_do_not_give_another_more_time() -> None:
    reads, disks = begun(3)
    loop = asyncio.get_running_loop()
    started = loop.time()
    turn = asyncio.create_task(reads.turn(0.1))
    await asyncio.sleep(0.08)
    disks[0].answer.set_result(True)
    assert await turn == 0
    assert 0.09 < loop.time() - started < 0.16
    assert (len(reads), reads.stalled) == (2, False)
    assert reads.give_up(0.1) == [1, 2]
    await reads.close()


async def test_an_error_of_a_read_reaches_the_waiter() -> None:
    reads, disks = begun(2)
    disks[0].answer.set_exception(RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        await reads.turn(5.0)
    await reads.close()


LIMIT_S, SLOW_S = 0.6, 0.4
"""A disk that takes ``SLOW_S`` answers before one that hangs is given up, and must not put that off."""


async def test_disks_that_hang_are_given_up_after_the_time_of_one_read_however_late_the_others_come() -> None:
    world = World(read_timeout_s=LIMIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, os.urandom(300_000))
    for name, disk in world.disks.disks.items():
        if name in ("a0", "b0", "c0"):
            disk.hang = asyncio.Event()
        else:
            disk.slow_s = SLOW_S
    started = asyncio.get_running_loop().time()
    with pytest.raises(ServiceUnavailable, match="do not answer now") as raised:
        await got(objects, bucket)
    assert not isinstance(raised.value, DataDamaged)
    # Fragments beyond the first four are asked for after the hedge delays, of 0.02 s, and each has its own time. None
    # of them hangs when the first four have all three that do.
    assert LIMIT_S <= asyncio.get_running_loop().time() - started < LIMIT_S + SLOW_S - 0.1
    await objects.close()


async def test_a_disk_that_hangs_while_others_are_so_slow_that_no_hedge_comes_first_is_given_up_as_soon() -> None:
    world = World(read_timeout_s=LIMIT_S, hedge_floor_s=LIMIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, data := os.urandom(200_000))
    for disk in world.disks.disks.values():
        disk.slow_s = SLOW_S
    next(disk for disk in world.disks.disks.values() for f in disk.fragments if f.position == 0).hang = asyncio.Event()
    started = asyncio.get_running_loop().time()
    assert await got(objects, bucket) == data
    assert LIMIT_S + SLOW_S <= asyncio.get_running_loop().time() - started < LIMIT_S + 2 * SLOW_S - 0.1
    await objects.close()


async def test_a_disk_that_hangs_while_a_liar_is_looked_for_is_given_up_after_the_time_of_one_read() -> None:
    world = World(read_timeout_s=LIMIT_S)
    objects, bucket = ObjectService(world.plane()), bucket_of(world)
    await put(objects, bucket, data := os.urandom(300_000))
    places = {fragment.position: (disk, fragment) for disk in world.disks.disks.values() for fragment in disk.fragments}
    liar, fragment = places[0]
    liar.flip(fragment, 0, lie=True)
    places[5][0].hang = asyncio.Event()
    for position in range(5):
        places[position][0].slow_s = SLOW_S
    started = asyncio.get_running_loop().time()
    assert await got(objects, bucket) == data
    assert SLOW_S + LIMIT_S <= asyncio.get_running_loop().time() - started < SLOW_S + LIMIT_S + SLOW_S - 0.1
    assert {(damage.disk, damage.reason) for damage in world.damage} == {(liar.name, "lied")}
    await objects.close()


async def test_a_disk_that_others_overtake_is_reported_and_one_that_is_slow_is_asked_last() -> None:
    world = World(hedge_floor_s=0.05)
    objects, bucket, data = ObjectService(world.plane()), bucket_of(world), os.urandom(300_000)
    await put(objects, bucket, data)
    first, second = (disk for disk, fragment in places_of(world) if fragment.position < 2)
    first.slow_s = 5.0
    assert await got(objects, bucket) == data
    assert world.disks.late == [first.name]
    world.disks.slow = {first.name}
    reads = first.reads
    assert await got(objects, bucket) == data
    assert first.reads == reads, "the parity is read in its place"
    fragment = next(fragment for disk, fragment in places_of(world) if disk is second)
    second.damage(fragment, 0, unread=True)
    assert await got(objects, bucket) == data
    assert set(world.disks.late) == {first.name, second.name}, "a drive that reports an error is slow, too"
    await objects.close()


def places_of(world: World) -> list[tuple[FaultyDisk, FragmentId]]:
    """The fragments of the only part, by position."""
    entry = entry_of(world)
    return sorted(
        ((world.disks.disks[name], fragment) for name, fragment in world.disks.of(entry.data_id)),
        key=lambda place: place[1].position,
    )
