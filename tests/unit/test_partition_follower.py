"""When a node reads where partitions are."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cluster.partitions import PartitionRecord
from storaged.errors import ServiceUnavailable
from storaged.node.partition_follower import RECORDS_A_SECOND, PartitionFollower
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.authority import until


async def test_the_records_are_read_as_soon_as_a_layout_moves_data(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, nothing = KnownLayouts(layout_of()), Any
    follower = PartitionFollower(layouts, nothing, nothing, nothing, "c1")  # type: ignore[arg-type]  # nothing is called
    read = 0

    async def read_all() -> None:
        nonlocal read
        read += 1
        layouts.partitions.complete = True

    monkeypatch.setattr(follower, "read_all", read_all)
    monkeypatch.setattr("storaged.node.partition_follower.PAUSE_S", 0.0)
    task = asyncio.create_task(follower.run())
    try:
        await asyncio.sleep(0.05)
        assert read == 1, "in a cluster whose data never moved they are read once"
        layouts.learn(replace(layout_of(), epoch=100, base=1))
        follower.wake()
        await until(lambda: read == 2)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_reading_that_fails_when_its_asker_has_gone_is_no_unhandled_error() -> None:
    layouts, nothing, fails = KnownLayouts(replace(layout_of(), epoch=100, base=1)), Any, asyncio.Event()

    class Registers:
        async def read(self, _name: object) -> None:
            await fails.wait()
            raise ServiceUnavailable("no majority")

    follower = PartitionFollower(layouts, Registers(), nothing, nothing, "c1")  # type: ignore[arg-type]
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    asker = asyncio.create_task(follower.refresh(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asker.cancel()
    await asyncio.wait((asker,))
    fails.set()
    await asyncio.sleep(0.01)
    del asker
    gc.collect()
    assert not told
    with pytest.raises(ServiceUnavailable):
        await follower.refresh(1)


@pytest.mark.virtual_time
async def test_a_node_that_lies_about_what_it_knows_has_the_records_read_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layouts, nothing = KnownLayouts(replace(layout_of(), epoch=100, base=1)), Any
    follower = PartitionFollower(layouts, nothing, nothing, nothing, "c1")  # type: ignore[arg-type]  # nothing is called
    read: list[float] = []
    brings = False

    async def read_all() -> None:
        read.append(asyncio.get_running_loop().time())
        if brings:
            layouts.partitions.learn(PartitionRecord(0, len(read), ("a0", "b0", "c0"), (), 100))

    async def lie() -> None:
        while True:
            layouts.partitions.hear("nb", layouts.partitions.steps + 1)
            await asyncio.sleep(0.5)

    monkeypatch.setattr(follower, "read_all", read_all)
    tasks = [asyncio.create_task(follower.run()), asyncio.create_task(lie())]
    try:
        await asyncio.sleep(100)
        assert len(read) < 20
        brings = True
        await asyncio.sleep(20)
        so_far = len(read)
        await asyncio.sleep(10)
        assert len(read) - so_far >= 5, "what is true is read as soon as before"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.virtual_time
async def test_the_more_partitions_have_moved_the_less_often_all_records_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layouts, nothing = KnownLayouts(replace(layout_of(), epoch=100, base=1)), Any
    follower = PartitionFollower(layouts, nothing, nothing, nothing, "c1")  # type: ignore[arg-type]  # nothing is called
    read = 0

    async def read_all() -> None:
        nonlocal read
        read += 1
        layouts.partitions.learn(PartitionRecord(0, read, ("a0", "b0", "c0"), (), 100))
        layouts.partitions.complete = True

    async def move() -> None:
        while True:
            layouts.partitions.hear("nb", layouts.partitions.steps + 1)
            await asyncio.sleep(0.5)

    monkeypatch.setattr(follower, "read_all", read_all)
    tasks = [asyncio.create_task(follower.run()), asyncio.create_task(move())]
    try:
        await asyncio.sleep(60)
        few = read
        for number in range(1, 4 * RECORDS_A_SECOND):
            layouts.partitions.learn(PartitionRecord(number, 1, ("a0", "b0", "c0"), (), 100))
        await asyncio.sleep(60)
        assert 2 * (read - few) < few
        assert read - few >= 10
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.virtual_time
async def test_a_first_reading_that_ended_halfway_is_repeated_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for partitions that are not known to have moved are refused meanwhile."""
    layouts, nothing = KnownLayouts(replace(layout_of(), epoch=100, base=1)), Any
    follower = PartitionFollower(layouts, nothing, nothing, nothing, "c1")  # type: ignore[arg-type]  # nothing is called
    began: list[float] = []

    async def read_all() -> None:
        began.append(asyncio.get_running_loop().time())
        for number in range(8 * RECORDS_A_SECOND):
            layouts.partitions.learn(PartitionRecord(number, 1, ("a0", "b0", "c0"), (), 100))
        raise ServiceUnavailable("no majority")

    monkeypatch.setattr(follower, "read_all", read_all)
    task = asyncio.create_task(follower.run())
    try:
        await asyncio.sleep(30)
        assert len(began) > 5
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
