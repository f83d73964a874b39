"""Reads that are under way together: who is woken, when, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from storaged.objects.reads import HedgeDelay, Reads


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
    reads, disks = Reads(HedgeDelay(0.01)), [Disk() for _ in range(count)]
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
    turn = asyncio.create_task(reads.turn(0.1))
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
    assert 0 < reads.left_s(1.0) < 1.0
    assert reads.give_up(0.01) == [0, 1]
    assert len(reads) == 1
    await reads.close()
    assert [disk.cancelled for disk in (*disks, late)] == [True, True, False]  # the last never began


async def test_an_error_of_a_read_reaches_the_waiter() -> None:
    reads, disks = begun(2)
    disks[0].answer.set_exception(RuntimeError("a mistake"))
    with pytest.raises(RuntimeError, match="a mistake"):
        await reads.turn(5.0)
    await reads.close()
