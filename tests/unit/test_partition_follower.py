"""When a node reads where partitions are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.node.partition_follower import PartitionFollower
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.authority import until


async def test_the_records_are_read_as_soon_as_a_layout_moves_data(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, nothing = KnownLayouts(layout_of()), Any
    follower = PartitionFollower(layouts, nothing, nothing, nothing, "c1")  # type: ignore[arg-type]  # nothing is called
    read = 0

    async def read_all() -> None:
        nonlocal read
        read += 1

    monkeypatch.setattr(follower, "read_all", read_all)
    monkeypatch.setattr("storaged.node.partition_follower.PAUSE_S", 0.0)
    task = asyncio.create_task(follower.run())
    try:
        await asyncio.sleep(0.05)
        assert not read, "in a cluster whose data never moved nothing is read"
        layouts.learn(replace(layout_of(), epoch=100, base=1))
        follower.wake()
        await until(lambda: read == 1)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
